"""Ctrl-C and SIGKILL at random moments: no process stays, and the same command then leaves what an undisturbed run
leaves.

A moment is a fixed random share of the time that an undisturbed run takes from its first sign of work on disk to its
end. For each command and each signal one moment is tried, and 25 in about a quarter of an hour with

    INTERRUPTIONS=25 python -m pytest tests/test_interrupt.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_bad_input import untrained
from test_benchmarks import children

import eval as evaluation
import train_toy

ROOT = Path(__file__).parent.parent
COUNT = int(os.environ.get("INTERRUPTIONS", "1"))
COMMANDS = {  # arguments, and what is on disk as soon as the work begins
    "eval": ("--problems 24 --batch-size 4 --top-k 4 --checkpoints checkpoints", "settings.json"),
    "train_toy": ("--steps 200 --batch 4 --width 8 --layers 1 --device cpu", "A"),
}
PATIENCE = 120  # seconds, for a command that was told to end


def start(program, *arguments):
    """The command in a process group of its own, as a shell starts it; Ctrl-C interrupts it even if not this suite."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([sys.executable, ROOT / f"{program}.py", *arguments], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)


def begin(program, folder, *more):
    """The command, at work."""
    arguments, sign = COMMANDS[program]
    process = start(program, *arguments.split(), *more, "--out", folder)
    while process.poll() is None and not (folder / sign).exists():
        time.sleep(0.005)
    return process


def end(process, patience=None):
    """Exit code and stderr. All processes that the command started hold its stderr: the pipe ends with the last."""
    try:
        _, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


def interrupt(program, sent, seconds, folder):
    process = begin(program, folder)
    time.sleep(seconds)
    if sent == signal.SIGINT:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)  # a terminal sends it to all processes of the command
    else:
        process.send_signal(sent)
    return end(process, PATIENCE)


def contents(folder):
    """Every file but unfinished ones, which nobody reads; records in any order; without timings and hardware."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [*found]:
        if name.endswith(".jsonl"):
            found[name] = sorted(found[name].splitlines())
        elif name.endswith(".json"):
            found[name] = {k: v for k, v in json.loads(found[name]).items() if k not in ("hardware", "seconds")}
        elif name.endswith(".part"):
            del found[name]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For each command: the seconds that it works, and what it leaves."""
    home, runs = tmp_path_factory.mktemp("home"), {}
    untrained(home / "checkpoints" / "toy-seed0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("OMP_NUM_THREADS", "1")
        for program in COMMANDS:
            process = begin(program, home / program)
            start = time.monotonic()
            assert end(process) == (0, "")
            runs[program] = (time.monotonic() - start, contents(home / program))
        yield runs


def test_an_undisturbed_run_is_complete(undisturbed):
    records = {name: own for name, own in undisturbed["eval"][1].items() if name.endswith(".jsonl")}
    assert len(records) == 5
    assert all(len({json.loads(line)["id"] for line in own}) == len(own) == 24 for own in records.values())
    assert "summary.json" in undisturbed["eval"][1]
    files = {f"{name}/{file}" for name in "AB" for file in ("config.json", "model.safetensors", "training.json")}
    assert undisturbed["train_toy"][1].keys() == files


@pytest.mark.parametrize("moment", range(COUNT))
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
@pytest.mark.parametrize("program", COMMANDS)
def test_interrupted_it_goes_on_to_the_same_end(program, sent, moment, undisturbed, tmp_path, monkeypatch, capsys):
    seconds, expected = undisturbed[program]
    seconds *= random.Random(f"{program} {sent.name} {moment}").random()
    while (ended := interrupt(program, sent, seconds, tmp_path / "out"))[0] == 0:  # done before the moment
        seconds /= 2
        shutil.rmtree(tmp_path / "out")
    code, err = ended
    assert code == (130 if sent == signal.SIGINT else -sent)
    if sent == signal.SIGINT:  # after SIGKILL Python's own resource tracker may have something to say
        assert err.count("\n") == 1, err

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    main = {"eval": evaluation.main, "train_toy": train_toy.main}[program]
    assert main([*COMMANDS[program][0].split(), "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
@pytest.mark.parametrize("program", COMMANDS)
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(program, share):
    begun = time.monotonic()
    assert end(start(program, "--help"))[0] == 0
    whole, process = time.monotonic() - begun, start(program, "--help")
    time.sleep(0.1 + share * max(0, whole - 0.3))  # Python itself is there after the first tenth
    os.killpg(process.pid, signal.SIGINT)
    code, err = end(process, PATIENCE)
    assert err == "" and code in (-signal.SIGINT, 130, 0)


@pytest.mark.parametrize("program", COMMANDS)
def test_ctrl_c_while_python_ends_shows_no_traceback(program):
    interrupted = "import atexit, os, runpy, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    code = f"{interrupted}; runpy.run_path({str(ROOT / program) + '.py'!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr == "" and ended.returncode == 0 and "--help" in ended.stdout


def test_a_killed_worker_ends_the_command_with_one_line(undisturbed, tmp_path):
    """As when memory ran out: exit code 1, no process is left, and nothing that was written is lost."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core: no worker")
    process = begin("eval", tmp_path / "out", "--problems", "500")
    while process.poll() is None and not any((tmp_path / "out").glob("*.jsonl")):
        time.sleep(0.005)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, err = end(process, PATIENCE)
    assert code == 1 and err.count("\n") == 1 and "a process ended before its work was done" in err
    for file in (tmp_path / "out").glob("*.jsonl"):
        assert all(json.loads(line)["id"] for line in file.read_text().splitlines())
