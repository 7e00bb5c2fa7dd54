"""What the README shows must run, and what it names must exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tie

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS)
def test_every_python_snippet_runs(code, tmp_path):
    """Each snippet in a process of its own, beside a copy of tie.py and nothing else."""
    shutil.copy(ROOT / "tie.py", tmp_path)
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("shift", [0, 1])
def test_the_hugging_face_recipe_decodes_a_padded_row_as_the_row_alone(shift):
    recipe: dict = {}
    exec(next(code for code in SNIPPETS if "def hugging_face(" in code), recipe)  # noqa: S102, our own text
    member = tie.Member(recipe["hugging_face"](recipe["Bert"]().eval(), shift), 99, 98)
    shape = {"suffix": [10], "reasoning_length": 6, "answer_length": 3, "mask_id": 99, "pad_id": 0}
    prompts = [[5, 6, 7, 8, 9], [8], [3, 4]]
    batch = tie.decode(member, tie.Canvas.blank(prompts, **shape), tie.Config(block_size=4))
    for prompt, row in zip(prompts, batch.tokens):
        alone = tie.decode(member, tie.Canvas.blank([prompt], **shape), tie.Config(block_size=4))
        assert torch.equal(alone.tokens[0], row[-alone.tokens.shape[1] :])


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


def test_every_file_and_test_option_it_names_exists():
    programs = ("eval.py", "train_toy.py", "tests/bench.py")
    commands = "".join((ROOT / name).read_text(encoding="utf-8") for name in programs)
    for option in sorted(set(re.findall(r"`[^`\n]*?(--[a-z-]+)", README)) - {"--help", "--nproc-per-node"}):
        assert f'"{option}"' in commands or option.lstrip("-").replace("-", "_") in commands, option
    for name in re.findall(r"`(tie|mdlm|train_toy)\.([A-Za-z_]+)`", README):
        source = (ROOT / f"{name[0]}.py").read_text(encoding="utf-8")
        assert name[1] == "py" or re.search(rf"\b{name[1]}\b", source), name
