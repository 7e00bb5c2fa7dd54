"""Bad input to the two commands costs exit code 2 and one line on stderr that names the thing; it never costs files.

The table holds command lines and what was done to the folder in which they run. Every case starts from a folder with
toy members, a LLaDA and a Dream with their tokenizers, questions, and the records of an earlier run. All commands are
called in this process, except where processes or the size of files matter.
"""

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_benchmarks import needs_bwrap
from test_mdlm import cut, edit, remove, tensors, write
from test_real import QUESTIONS, folders  # noqa: F401, a fixture

import eval as evaluation
import mdlm
import train_toy

ROOT = Path(__file__).parent.parent
REAL = "eval --members llada=llada dream=dream --data gsm8k.jsonl --top-k 8 --interval 8 --out fresh --task gsm8k"
TOY = "eval --problems 3 --batch-size 3"
AGAIN = f"{TOY} --out results"  # the earlier run
SMALL = "--steps 1 --batch 4 --width 8 --layers 1 --members 1"
B = Path("checkpoints/toy-seed0/B")
TIE = "A-B.0.jsonl"
OTHER = TIE.replace(".0.", ".1.")  # of another process
AVAILABLE = len(train_toy.questions("test"))


# --- what may be wrong with a folder --------------------------------------------------------------------


def at(place: str | Path, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """A damage to a folder, below the one where the command runs."""
    return lambda folder: damage(folder / place)


def put(name: str, content: bytes = b"", make: type | None = None) -> Callable[[Path], object]:
    """A file with this content, or a folder, in place of what was there."""

    def damage(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.mkdir() if make is dir else path.write_bytes(content)

    return damage


def loop(name: str) -> Callable[[Path], object]:
    """A symbolic link to itself in place of the file."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return damage


reweighted = tensors(lambda state: state.update({"norm.weight": state["norm.weight"] + 1e-6}))


def poison(name: str) -> Callable[[Path], object]:
    return tensors(lambda state: state[name].view(-1)[:1].fill_(torch.nan))


def settings(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A change of the earlier run's settings.json."""

    def damage(folder):
        file = folder / "results" / "settings.json"
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return damage


def record(line: bytes, missing: int = 0) -> Callable[[Path], object]:
    """A line in front of the earlier run's records, of which the last `missing` are gone."""

    def damage(folder):
        file = folder / "results" / TIE
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(line + b"".join(lines[: len(lines) - missing]))

    return damage


def line(**changes) -> bytes:
    """A record whose fields have the right types, but for the changes."""
    fields = {"id": "1234*5=", "gold": "6170", "answers": ["6170"] * 2, "correct": [True] * 2, "texts": [[], []], "winner": 0,
              "leaders": [], "tcc": [0.0] * 2, "forwards": 64.0, "scores": [], "top1": [0.9] * 2}  # fmt: skip
    return json.dumps({**fields, **changes}).encode() + b"\n"


def full_disk(name: str, room: int, damage: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """No file can grow beyond `room` bytes more than what is in the file called `name`."""

    def limited(folder):
        damage(folder)
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, FREE[1]))

    return limited


def rows(*values: object) -> Callable[[Path], object]:
    """These rows as the file of questions."""
    return put("gsm8k.jsonl", b"".join(json.dumps(value).encode() + b"\n" for value in values))


FREE = resource.getrlimit(resource.RLIMIT_FSIZE)
NESTED = b"[" * 100_000

# --- the table: command line; what the line on stderr says, in this order; what was done before -------------

ARGUMENTS = [
    # unknown, abbreviated, incomplete
    ("eval --nonsense", "unrecognized arguments: --nonsense"),
    ("eval --problem 5", "--problem"),
    ("eval --interval", "--interval ... expected one argument"),
    ("eval gsm8k", "unrecognized arguments: gsm8k"),
    ("eval '--two\nlines'", "unrecognized arguments: --two lines"),
    ("eval --selection first", "--selection ... 'first' ... lowest_tcc"),
    ("eval --table 4", "--table ... '4' ... '10'"),
    ("eval --members a=x b=y --task gsm9k --data gsm8k.jsonl", "--task ... 'gsm9k' ... gsm8k"),
    *[(f"{REAL} --members {member} b=dream", f"'{member}' is not NAME=FOLDER")
      for member in ("llada", "=llada", "a=", "a/b=llada", "{x}=llada")],
    (f"{REAL} --members a=llada a=dream", "--members names a twice"),
    (f"{REAL} --run-code freely", "--run-code ... 'freely' ... unconfined"),
    # numbers, paths, devices
    ("eval --interval 0", "interval must be ... at least 1, ... not 0"),
    ("eval --interval 2.5", "--interval ... '2.5'"),
    ("eval --threshold nan", "threshold must be a number in (0, 1], not nan"),
    *[(f"eval --problems {count}", f"--problems {count}: give 1 to {AVAILABLE}") for count in (0, -1, AVAILABLE + 1)],
    (f"eval --trace {AVAILABLE + 1}", f"--trace {AVAILABLE + 1}: give 1 to {AVAILABLE}"),
    *[(f"eval --problem-seed {seed}", f"--problem-seed {seed}: give") for seed in (-1, 2**32)],
    ("eval --seed -1", "seed is -1: give 0 to 4294967295"),
    ("eval --seed 4294967295 --seeds 2 --table 3", "seed is 4294967296: give 0 to"),
    ("eval --steps 0", "steps is 0: give 1 to 1000000"),
    *[(f"eval --table 1 --seeds {n}", f"--seeds must be at {most}, not {n}")
      for n, most in ((0, "least 1"), (10**9, "most 1000"))],
    *[(f"{line} 0", f"{line.split()[-1]} must be at least 1, not 0")
      for line in ("eval --trace", "eval --batch-size", f"{REAL} --limit")],
    *[(f"eval {option} ''", f"{option} ... an empty path") for option in ("--out", "--checkpoints", "--data", "--figure")],
    ("eval --device cpu cpu", "--device has 2 values for 1 members: give one, or one each"),
    (f"{REAL} --device cpu cpu cpu", "--device has 3 values for 2 members: give one, or one each"),
    *[(f"{line} --device {device}", f"--device {device} cannot be used")
      for line in ("eval", REAL) for device in ("abacus", "meta")],
    # what excludes each other, or lacks its other half
    ("eval --threshold 0.9 --top-k 2", "threshold ... exclude each other"),
    ("eval --json --trace 1", "leave out one of --trace and --json"),
    ("eval --seeds 2", "--seeds is for --table: give it too"),
    ("eval --unsolved", "--unsolved is for --trace: give it too"),
    *[(f"eval --table 3 {option} {value}", f"their own {option}: leave it out")
      for option, value in (("--threshold", 0.9), ("--score", "negative_entropy"), ("--trace", 1))],
    *[(f"eval --figure figures {more}", "leave out --json, --trace and --seeds") for more in ("--json", "--seeds 2 --table 1")],
    *[(f"eval --members a=llada b=dream {option} {value}", f"{option} is for the toy: leave out --members")
      for option, value in (("--table", 1), ("--problems", 10), ("--seed", 1), ("--checkpoints", "other"))],
    *[(f"eval {option} {value}", f"{option} is for real checkpoints: give --members too")
      for option, value in (("--task", "gsm8k"), ("--limit", 5), ("--run-code", ""))],
    ("eval --members a=llada b=dream", "--members needs --task and --data"),
    ("eval --members a=llada b=dream --task gsm8k", "--members needs --task and --data"),
    (f"{REAL} --members a=llada", "one member is no ensemble: give ... or add --single"),
    # training
    ("train_toy --step 3", "--step"),
    ("train_toy --steps many", "--steps ... 'many'"),
    ("train_toy --lr nan", "lr is nan: give 1e-09 to 1"),
    *[(f"train_toy --members {count}", f"members is {count}: give 1 to 4") for count in (0, 5)],
    *[(f"train_toy --device {device} --out checkpoints/toy-seed0 --seed 1", f"--device {device} cannot be used: {why}")
      for device, why in (("abacus", "Expected one of cpu"), ("meta", "Tensor.item() ... meta tensors"))],
]  # fmt: skip

CONFIG = [  # of a toy member; more of them in test_mdlm
    ("missing or damaged ... write the file again", put("config.json", b'{"a": "\xff"}')),
    ("missing or damaged ... write the file again", put("config.json", NESTED)),
    ("unknown model_type 'gpt2'; give one of mdlm", edit(model_type="gpt2")),
    ("width must be ... not '64'", edit(width="64")),
    ("layers must be ... not True", edit(layers=True)),
    ("layers must be ... at most 1000, not 1000000000", edit(layers=10**9)),
    (f"width must be ... at most 16777216, not {2**63}", edit(width=2**63)),
    (f"vocab_size must be ... not {2**63}", edit(vocab_size=2**63)),
    ("shift must be true or false, not 'no'", edit(shift="no")),
    ("rope_theta must be ... not nan", edit(rope_theta=float("nan"))),
    ("eos_id must", edit(eos_id=[])),
]
REAL_FOLDERS = [
    ("dream/config.json: missing or damaged ... fetch", "dream", put("config.json", make=dir)),
    ("dream/config.json: eos_id ... lies outside", "dream", edit(eos_token_id=[[1]])),
    ("dream/config.json: width must be ... not [32]", "dream", edit(hidden_size=[32])),
    (f"llada/config.json: max_length must be ... not {2**63}", "llada", edit(max_sequence_length=2**63)),
    ("llada/config.json: rope_float32 must be true or false", "llada", edit(rope_full_precision="yes")),
    ("dream/model.safetensors: missing or damaged ... fetch", "dream", put("model.safetensors", make=dir)),
    ("member 'dream' gave NaN logits: check its weights", "dream", poison("lm_head.weight")),
    ("index.json: holds no JSON object", "llada", write("model.safetensors.index.json", "[]")),
    ("'weight_map' does not map", "llada", write("model.safetensors.index.json", '{"weight_map": {"a": 1}}')),
    *[("dream: tokenizer cannot be used", "dream", damage) for damage in (
        remove("tokenizer.json"), cut("tokenizer.json", 3_000), put("tokenizer.json", b"\xff\xfe{}"),
        put("tokenizer.json", make=dir))],
]  # fmt: skip
SETTINGS = [at("results", damage) for damage in (
    remove("settings.json"), cut("settings.json", 99), put("settings.json", NESTED), put("settings.json", make=dir),
    loop("settings.json"), write("settings.json", "[]"))] + [settings(change) for change in (
        lambda value: value.update(settings=[]), lambda value: value.pop("fingerprints"))]  # fmt: skip
NO_RECORDS = [b"[]\n", b"\n", b'{"id": "1234*5="}\n', b'{"id": "1234*5=", \n', b"\x00\xff\n", NESTED + b"\n", *(
    line(**changes) for changes in (
        {"correct": ["x", "y"]}, {"correct": [True]}, {"winner": 2}, {"winner": True}, {"winner": -1}, {"leaders": [2]},
        {"leaders": 5}, {"tcc": ["x", 0.0]}, {"tcc": []}, {"tcc": {"a": 0.0, "b": 0.0}}, {"tcc": [float("nan"), 0.0]},
        {"tcc": [float("inf"), 0.0]}, {"tcc": [None, 0.0]}, {"tcc": [10**400, 0.0]}, {"top1": [0.5]}, {"scores": [[0.5]]},
        {"scores": [["a", "b"]]}, {"scores": None}, {"forwards": float("nan")}, {"forwards": "64"}, {"answers": ["a"]},
        {"answers": [1, 2]}, {"texts": ["a", "b"]}, {"id": 5}, {"id": ["i"]}))]  # fmt: skip

DAMAGED = [
    # toy members
    *[(TOY, f"B/config.json: {told}", at(B, damage)) for told, damage in CONFIG],
    (TOY, "B/model.safetensors: missing or damaged", at(B, cut("model.safetensors", 9_000))),
    (TOY, "member 'B' gave NaN logits: check its weights", at(B, poison("head.weight"))),
    (f"{TOY} --checkpoints gsm8k.jsonl", "cannot write to folder gsm8k.jsonl/toy-seed0/A ... give"),
    # the second of two folders cannot be written: the record of the first must stay
    ("train_toy --seed 1 --out checkpoints/toy-seed0", "cannot write to folder checkpoints/toy-seed0/B ... give",
     lambda folder: (shutil.rmtree(folder / B), (folder / B).write_text("in the way"))),
    # LLaDA and Dream
    (f"{REAL} --members llada=llada dream=nowhere", "nowhere/config.json: missing"),
    (f"{REAL} --members llada=llada dream=gsm8k.jsonl", "gsm8k.jsonl/config.json: missing"),
    (f"{REAL} --members llada=llada dream=no/where", "--members no/where: no such folder here, and the Hub cannot be"),
    (f"{REAL} --members llada=llada dream=no--/where", "--members no--/where: no such folder here, and no such model"),
    (f"{REAL} --members llada=llada dream=checkpoints/toy-seed0/A", "toy-seed0/A: tokenizer cannot be used"),
    *[(REAL, told, at(family, damage)) for told, family, damage in REAL_FOLDERS],
    (f"{REAL} --single", "member 'llada' gave NaN logits", at("llada", poison("model.transformer.ln_f.weight"))),
    # questions; more of them in test_benchmarks
    (f"{REAL} --data nowhere", "nowhere, row 1: no question for gsm8k ... No such file ... give GSM8K's test.jsonl"),
    (f"{REAL} --data dream", "dream: no question for gsm8k; give GSM8K's test.jsonl"),
    (REAL, "gsm8k.jsonl, row 2: no question for gsm8k ... give GSM8K's test.jsonl", rows(QUESTIONS[0], {"problem": "P"})),
    (REAL, "question gsm8k/1 ... over 1024 of member 'llada': leave it out",
     rows(QUESTIONS[0], {**QUESTIONS[0], "question": "9" * 2000})),
    (f"{REAL} --task mbpp", "grading mbpp runs the model's code: pass --run-code to allow it",
     rows({"task_id": 2, "prompt": "P", "test_imports": [], "test_list": ["assert f()"]})),
    # --out and --figure
    *[(f"{line} --out {out}", f"cannot use {out}: ... mend that")
      for line, out in ((TOY, "gsm8k.jsonl"), (TOY, "gsm8k.jsonl/deeper"), (TOY, "x" * 300), (REAL, "gsm8k.jsonl"))],
    (f"{TOY} --figure gsm8k.jsonl", "cannot use --figure gsm8k.jsonl ... mend that"),
    (f"{AGAIN} --interval 5", "results holds results that differ in config: give another --out"),
    (f"{AGAIN} --problems 4 --seed 1", "holds results that differ in problems, training, questions: give another --out"),
    (f"{REAL} --out results", "results holds results that differ in task ... give another --out"),
    (AGAIN, "results holds results that differ in weights of B: give another --out", at(B, reweighted)),
    (AGAIN, "results holds results that differ in questions: give another --out",
     settings(lambda value: value["fingerprints"].update(questions="0"))),
    *[(AGAIN, "results/settings.json is missing or damaged: move", damage) for damage in SETTINGS],
    *[(AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(line)) for line in NO_RECORDS],
    (AGAIN, f"cannot use results/{TIE}: Is a directory; mend that", at("results", put(TIE, make=dir))),
    *[(AGAIN, f"cannot use results/{name}: Too many levels of symbolic links; mend that", at("results", loop(name)))
      for name in (TIE, OTHER)],
    (AGAIN, f"cannot write results/{TIE} ... same command goes on", full_disk(f"results/{TIE}", 900, record(b"", 2))),
    (f"{TOY} --out fresh", "cannot write fresh/settings.json: File too large", full_disk("fresh", 50)),
    (AGAIN, "cannot write results/summary.json ... same command goes on",
     full_disk("results/settings.json", 10, at("results", remove("summary.json")))),
]  # fmt: skip

CASES = [(*case, None)[:3] for case in ARGUMENTS + DAMAGED]


def untrained(folder):
    """Complete members of the toy with random weights."""
    for name in "AB":
        torch.manual_seed(ord(name))
        mdlm.save(train_toy.build(train_toy.Settings()), folder / name)
        trained = {"settings": asdict(train_toy.Settings()), "name": name, "layout": train_toy.LAYOUT,
                   "validation_accuracy": 0.5}  # fmt: skip
        (folder / name / train_toy.RECORD).write_text(json.dumps(trained))


@pytest.fixture(scope="module")
def template(tmp_path_factory, folders):  # noqa: F811
    """What every case starts from."""
    folder = tmp_path_factory.mktemp("template")
    untrained(folder / "checkpoints" / "toy-seed0")
    for family, made in folders.items():
        shutil.copytree(made, folder / family)
    rows(*QUESTIONS)(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "cpu_count", lambda: 1)
        assert evaluation.main([*shlex.split(AGAIN)[1:], "--json"]) == 0
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """A copy of the template, as working directory; no process is started, and no training begins."""
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(train_toy, "workers", lambda count: nullcontext(map))
    monkeypatch.setattr(train_toy, "_work", lambda job: pytest.fail("training began"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "place"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(code, out, err, line, told, before, after):
    program = shlex.split(line)[0]
    assert code == 2, err
    assert out == ""
    assert err.startswith(f"{program}.py: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) < 1000, err
    rest = err
    for part in told.split(" ... "):
        assert part in rest, err
        rest = rest.partition(part)[2]
    for name, content in before.items():  # records may have become more, but nothing is lost
        assert after[name].startswith(content) if name.endswith(".jsonl") else after[name] == content, name
    assert all(name.startswith(("fresh/", "results/")) for name in after.keys() - before.keys())


@pytest.mark.parametrize("line, told, damage", CASES, ids=[f"{i} {case[0]}"[:60] for i, case in enumerate(CASES)])
def test_bad_input_is_one_line_and_exit_code_two(line, told, damage, place, monkeypatch, capsys):
    if damage:
        damage(place)
    else:
        monkeypatch.setattr(evaluation, "decode_questions", lambda *_: pytest.fail("decoding began"))
    before = contents(place)
    program, *arguments = shlex.split(line)
    try:
        code = {"eval": evaluation.main, "train_toy": train_toy.main}[program](arguments)
    except SystemExit as stop:
        code = stop.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FREE)
    out, err = capsys.readouterr()
    check(code, out, err, line, told, before, contents(place))


def test_a_full_disk_while_a_member_is_trained(place):
    """In a process of its own, which inherits the limit on the size of files."""
    full_disk("fresh", 2_000)(place)
    before = contents(place)
    try:
        done = subprocess.run([sys.executable, ROOT / "train_toy.py", *SMALL.split(), "--out", "fresh"],
                              capture_output=True, text=True, check=False)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FREE)
    told = "cannot write to folder fresh/ ... make room"
    check(done.returncode, done.stdout, done.stderr, "train_toy", told, before, contents(place))


SHELL = [  # what follows the command, the exit code, and what stderr says
    ("--out results > /dev/full", 1, "eval.py: cannot write to stdout: No space left ... summary.json has the results"),
    ("--json | true", 1, "eval.py: cannot write to stdout: Broken pipe"),
    (">&-", 1, "eval.py: stdout is closed"),
    ("--json 2>&-", 0, ""),
    ("--out nowhere/results --steps 0 2>&-", 2, ""),
]


@pytest.mark.parametrize("rest, code, told", SHELL)
def test_output_that_goes_nowhere(rest, code, told, place):
    command = f"set -o pipefail; {sys.executable} {ROOT}/eval.py {shlex.join(TOY.split()[1:])} {rest}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=buffered)
    assert done.returncode == code, done.stderr
    for part in told.split(" ... "):
        assert part in done.stderr and done.stderr.count("\n") == bool(told)
    if "--json" in rest and code == 0:
        assert json.loads(done.stdout)["problems"] == 3


@pytest.mark.parametrize("error, told", [
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files; with --out the same command goes on"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     "CUDA out of memory: lower --batch-size, or give each member a --device of its own"),
])  # fmt: skip
def test_what_the_machine_lacks_is_told_on_stderr_and_stdout_stays_open(error, told, monkeypatch, capfd):
    monkeypatch.setattr(evaluation, "run_toy", Mock(side_effect=error))
    assert evaluation.main([]) == 1
    os.write(1, b"still open")
    assert capfd.readouterr() == ("still open", f"eval.py: {told}\n")


@pytest.mark.parametrize(
    "given", [{"RANK": "abc"}, {"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": "x"}]
)
def test_processes_that_torchrun_never_starts(given, place, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert evaluation.main(shlex.split(REAL)[1:]) == 2
    assert ": unset them, or use torchrun" in capsys.readouterr().err


def test_a_damaged_file_put_aside_is_not_read(place, capsys):
    assert evaluation.main(shlex.split(AGAIN)[1:] + ["--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["rows"]
    for name in (f"{TIE}.bak", TIE.replace(".jsonl", ".bak.jsonl"), TIE.replace(".0.", ".old.")):
        (place / "results" / name).write_bytes(b"damaged\n")
    assert evaluation.main(shlex.split(AGAIN)[1:] + ["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == expected


@needs_bwrap
def test_results_that_cannot_be_written_stay_as_they_are(place):
    """As with the results of another user."""
    before = contents(place)
    line = f"bwrap --dev-bind / / --ro-bind {place}/results {place}/results {sys.executable} {ROOT}/{AGAIN.replace('eval', 'eval.py', 1)}"
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    check(done.returncode, done.stdout, done.stderr, "eval", "cannot write results/settings.json", before, contents(place))


@pytest.mark.parametrize("damage", [
    lambda record: record.pop("validation_accuracy"), lambda record: record.pop("settings"), lambda record: record.pop("name"),
    lambda record: record["settings"].update(steps="x"), lambda record: record.update(validation_accuracy=float("nan")),
])  # fmt: skip
def test_a_member_whose_training_record_is_damaged_is_trained_again(damage, place):
    record = json.loads((place / B / train_toy.RECORD).read_text())
    damage(record)
    (place / B / train_toy.RECORD).write_text(json.dumps(record))
    with pytest.raises(pytest.fail.Exception, match="training began"):
        evaluation.main(shlex.split(TOY)[1:])
