"""What the README shows must run, and what it names must exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_every_python_snippet_runs(code, tmp_path):
    """Each snippet in a process of its own, beside a copy of tie.py and nothing else."""
    shutil.copy(ROOT / "tie.py", tmp_path)
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_is_a_snippet():
    assert "```python" in README


def test_every_file_and_test_option_it_names_exists():
    programs = ("eval.py", "train_toy.py", "tests/bench.py")
    commands = "".join((ROOT / name).read_text(encoding="utf-8") for name in programs)
    for option in sorted(set(re.findall(r"`[^`\n]*?(--[a-z-]+)", README)) - {"--help", "--nproc-per-node"}):
        assert f'"{option}"' in commands or option.lstrip("-").replace("-", "_") in commands, option
    for name in re.findall(r"`(tie|mdlm|train_toy)\.([A-Za-z_]+)`", README):
        source = (ROOT / f"{name[0]}.py").read_text(encoding="utf-8")
        assert name[1] == "py" or re.search(rf"\b{name[1]}\b", source), name
