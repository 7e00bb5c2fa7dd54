"""What the README shows must run, and what it names must exist."""

import functools
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_real import folders  # noqa: F401, a fixture

import mdlm
import tie

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ELSEWHERE = {"--nproc-per-node", "--hypothesis-profile"}  # options of torchrun and pytest

TRANSFORMERS = """  # stands in for the package: a model with learned absolute positions
import zlib
import torch

class AutoModelForMaskedLM(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, name):
        torch.manual_seed(zlib.crc32(name.encode()))
        return cls()

    def __init__(self, V=4000):
        super().__init__()
        self.words, self.places, self.head = (torch.nn.Embedding(V, 32) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        self.logits = (x + x.cumsum(1).tanh()) @ self.head.weight.T
        return self
"""


def test_the_python_snippets_run_one_after_the_other(folders, tmp_path):  # noqa: F811
    assert len(SNIPPETS) >= 4
    for name in ("tie.py", "mdlm.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "transformers.py").write_text(TRANSFORMERS, encoding="utf-8")
    for name, folder in zip(("LLaDA-1.5", "Dream-v0-Instruct-7B"), folders.values()):
        (tmp_path / name).symlink_to(folder)
    script = "\nprint('---')\n".join(SNIPPETS)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(shown.strip() for shown in done.stdout.split("---\n")) and done.stdout.count("---\n") == len(SNIPPETS) - 1


@pytest.mark.parametrize("shift", [0, 1])
def test_the_hugging_face_recipe_decodes_a_padded_row_as_the_row_alone(shift):
    recipe: dict = {"torch": torch}
    exec(TRANSFORMERS, recipe)  # noqa: S102, our own text
    code = next(code for code in SNIPPETS if "def hugging_face(" in code)
    exec(re.search(r"def hugging_face.*?\n(?=\n)", code, re.DOTALL)[0], recipe)  # noqa: S102
    member = tie.Member(recipe["hugging_face"](recipe["AutoModelForMaskedLM"](100).eval(), shift), 99, 98)
    shape = {"suffix": [10], "reasoning_length": 6, "answer_length": 3, "mask_id": 99, "pad_id": 0}
    prompts = [[5, 6, 7, 8, 9], [8], [3, 4]]
    batch = tie.decode(member, tie.Canvas.blank(prompts, **shape), tie.Config(block_size=4))
    for prompt, row in zip(prompts, batch.tokens):
        alone = tie.decode(member, tie.Canvas.blank([prompt], **shape), tie.Config(block_size=4))
        assert torch.equal(alone.tokens[0], row[-alone.tokens.shape[1] :])


def unknown_names(text):
    """Of the code spans that begin with one of our modules, those that name nothing there."""
    unknown = []
    for span in re.findall(r"`((?:tie|mdlm)\.[^`\n]*)`", text):
        path, keyword = re.fullmatch(r"([\w.]+)(?:\((\w+)=.*\))?", span).groups()
        thing = {"tie": tie, "mdlm": mdlm}[path.split(".")[0]]
        for part in path.split(".")[1:]:
            thing = getattr(thing, part, None)
        known = keyword is None or thing is not None and keyword in inspect.signature(thing).parameters
        unknown += [] if (thing is not None and known) or path.endswith(".py") else [span]
    return unknown


def unknown_files(text):
    return [name for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", text) if not (ROOT / name).exists()]


@functools.cache
def known_options():
    options = set(ELSEWHERE)
    for program in ("eval.py", "train_toy.py", "tests/bench.py"):
        command = [sys.executable, str(ROOT / program), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        options |= set(re.findall(r"^ +(?:-[a-z], )?(--[a-z-]+)", shown, re.MULTILINE))
    return options


def unknown_options(text):
    return sorted(set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text)) - known_options())


def test_every_name_file_and_option_in_it_exists():
    assert unknown_names(README) == unknown_files(README) == unknown_options(README) == []
    assert "`tie.ensemble`" in README


def test_what_does_not_exist_is_found():
    assert unknown_names("`tie.lead` `tie.leads` `mdlm.Cached` `tie.Run.reads`") == ["tie.leads", "tie.Run.reads"]
    assert unknown_names("`tie.Config(commit=...)` `tie.Config(commits=...)`") == ["tie.Config(commits=...)"]
    assert unknown_files("`tie.py` `tests/bench.py` `bench.py`") == ["bench.py"]
    assert unknown_options("`--table 1`, `--repeats 5` and `--out`, not --outs, --tabl or `--vanish`") == [
        "--outs", "--tabl", "--vanish"]  # fmt: skip


def test_its_test_command_is_the_one_that_ci_runs():
    command = re.search(r'^command="(.*)"$', (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert command[1] in README.splitlines()
