"""Ctrl-C and SIGKILL: no process stays, and the same command then resumes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import in_process, untrained

import eval as evaluation
import train_toy

# One worker: another could still be importing torch, where Ctrl-C prints a traceback.
CODE = """
import os, signal, sys
os.cpu_count = lambda: 1
signal.signal(signal.SIGINT, signal.default_int_handler)  # even if this suite ignores it
import eval
sys.exit(eval.main())
"""
COMMAND = ["--problems", "20", "--batch-size", "2", "--top-k", "8", "--json"]


@pytest.mark.skipif(os.name != "posix", reason="there are no process groups")
def test_interrupted_or_killed_it_ends_at_once_and_resumes(tmp_path, monkeypatch, capfd):
    untrained(tmp_path / "checkpoints" / "toy-seed0")
    decoded = tmp_path / "checkpoints" / "toy-seed0" / "decoded"
    monkeypatch.chdir(tmp_path)
    before: dict = {}
    for sent in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, *COMMAND],
            env=os.environ | {"PYTHONPATH": str(Path(evaluation.__file__).parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group of its own, as a shell gives it
        )
        while process.poll() is None and len([*decoded.glob("*.json")]) == len(before):
            time.sleep(0.01)
        # A terminal sends Ctrl-C to all processes of a command.
        os.kill(-process.pid if sent == signal.SIGINT else process.pid, sent)
        out, err = process.communicate(timeout=120)  # until the last process has closed the pipes
        assert out == ""
        if sent == signal.SIGINT:
            assert process.returncode == 130
            assert err == "eval.py: interrupted; run the same command again to resume\n"
        now = {path: path.stat().st_mtime_ns for path in decoded.glob("*.json")}
        assert before.items() < now.items()
        before = now

    monkeypatch.setattr(train_toy, "pool", in_process)
    assert evaluation.main(COMMAND) == 0
    resumed = capfd.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert len(before) < len([*decoded.glob("*.json")]) == 5 * 10
    shutil.rmtree(decoded)
    assert evaluation.main(COMMAND) == 0
    assert capfd.readouterr().out == resumed
