"""What the README shows must run, and what it names must exist."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import eval as evaluation
import mdlm
import tie
import train_toy

pytest_plugins = "tiny"
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# Stands in for the package: a model with learned absolute positions.
TRANSFORMERS = """
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

    def forward(self, input_ids, attention_mask, position_ids):
        x = (self.words(input_ids) + self.places(position_ids)) * attention_mask[..., None]
        self.logits = (x + x.cumsum(1).tanh()) @ self.head.weight.T
        return self
"""
# The recipe for Hugging Face models decodes a padded row as the row alone.
RECIPE = """
for shift in (0, 1):
    member = hugging_face("another", shift)
    for prompt, row in zip(prompts, tie.decode(member, canvas).tokens):
        own = tie.Canvas.blank([prompt], suffix, 32, 8, mask_id=103, pad_id=0)
        alone = tie.decode(member, own).tokens[0]
        assert torch.equal(alone, row[-len(alone) :])
"""


def test_the_python_snippets_run_one_after_the_other(folders, tmp_path):
    for name in ("tie.py", "mdlm.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "transformers.py").write_text(TRANSFORMERS, encoding="utf-8")
    for name, folder in zip(("LLaDA-1.5", "Dream-v0-Instruct-7B"), folders.values()):
        (tmp_path / name).symlink_to(folder)
    first, *others = SNIPPETS
    script = "\nprint('---')\n".join([first + RECIPE, *others])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("---\n")
    assert len(shown) == len(SNIPPETS) >= 3 and all(map(str.strip, shown))


def test_its_command_lines_parse(monkeypatch):
    monkeypatch.setattr(train_toy, "train_members", lambda *given: [])
    lines = re.findall(r"(eval|train_toy)\.py((?: [^`\n]*)?)[`\n]", README)
    assert len(lines) > 5
    for program, arguments in lines:
        {"eval": evaluation.parse, "train_toy": train_toy.main}[program](shlex.split(arguments))


def test_its_options_names_and_files_exist():
    programs = "".join((ROOT / name).read_text() for name in ("eval.py", "tests/bench.py"))
    known = {
        *re.findall(r'"(--[a-z-]+)"', programs),
        "--nproc-per-node",
        "--hypothesis-profile",
        "--help",
    }
    known |= {f"--{field.name}" for field in fields(train_toy.Settings)}
    assert {*re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", README)} <= known
    for module, path, keyword in re.findall(r"`(tie|mdlm)\.(\w+(?:\.\w+)?)(?:\((\w+)=)?", README):
        thing = {"tie": tie, "mdlm": mdlm}[module]
        for part in () if path == "py" else path.split("."):
            thing = getattr(thing, part)
        assert not keyword or keyword in thing.__dataclass_fields__
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists()


def test_its_commands_are_those_that_ci_runs():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = re.findall(r'^(?:install|command)="(.*)"$', script, re.MULTILINE)
    assert len(commands) == 2 and {*commands} <= {*README.splitlines()}
