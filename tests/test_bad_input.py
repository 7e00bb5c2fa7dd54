"""A mistake on the command line ends in exit code 2 and one line on stderr that names it."""

import json
import shlex
import shutil

import pytest
import torch
from test_mdlm import cut, edit, remove, tensors, write
from tiny import in_process, untrained

import eval as evaluation
import train_toy

pytest_plugins = "tiny"
REAL = "eval gsm8k --data test.jsonl --out fresh --members llada=llada dream=dream"


def poisoned(name):
    return tensors(lambda state: state[name].view(-1)[:1].fill_(torch.nan))


# A command line, words of the message, and perhaps a folder and how it is damaged before.
CASES = [
    # what to do
    ("eval nonsense", "what must be any of main 1 2 ..., got nonsense"),
    ("eval main gsm8k --members a=llada b=dream --data test.jsonl", "a benchmark must be run alone"),
    ("eval gsm8k", "needs --members and --data"),
    ("eval gsm8k --members a=llada b=dream", "needs --members and --data"),
    ("eval --members a=llada b=dream", "--members is for benchmarks"),
    ("eval 3 --score negative_entropy", "tables show every score: leave out --score"),
    ("eval trace --json", "--json is for tables and benchmarks"),
    # options that are gone, abbreviated or incomplete
    *[(f"eval {old}", old.split()[0]) for old in ("--table 1", "--trace 3", "--figure x", "--task gsm8k")],
    ("eval --problem 5", "--problem"),
    ("eval --interval", "--interval: expected one argument"),
    # numbers
    ("eval --interval 0", "interval must be at least 1, got 0"),
    ("eval --interval 2.5", "--interval: invalid int value: '2.5'"),
    ("eval --threshold 2", "threshold must be in (0, 1], got 2.0"),
    ("eval --threshold 0.9 --top-k 2", "top_k, threshold and commit exclude each other"),
    *[
        (f"eval --{name} 0", f"--{name}: must be at least 1, got 0")
        for name in ("problems", "seeds", "batch-size", "cache", "count", "limit")
    ],
    ("eval --problems 9999999", "count must be 0 to"),
    ("eval --steps 0", "steps must be 1 to"),
    # devices and folders
    ("eval --device abacus", "device abacus cannot be used"),
    (f"{REAL} --device abacus", "device abacus cannot be used"),
    (f"{REAL} --device cpu cpu cpu", "--device must name one device or one per member, got 3"),
    ("eval --checkpoints test.jsonl", "test.jsonl"),
    ("eval figures --out test.jsonl", "test.jsonl"),
    (f"{REAL} --out test.jsonl/deeper", "test.jsonl/deeper"),
    ("eval", "B/model.safetensors: missing or", "checkpoints/toy-seed0/B", cut("model.safetensors", 9000)),
    ("eval", "member 'B' gave NaN logits", "checkpoints/toy-seed0/B", poisoned("head.weight")),
    # members
    (f"{REAL} --members a=llada", "an ensemble needs two members: add one or --single"),
    (f"{REAL} --members a=llada a=dream", "--members must have different names, got ['a', 'a']"),
    (f"{REAL} --members a=llada b=nowhere", "nowhere is neither a folder nor a Hub name"),
    (f"{REAL} --members a=llada b=checkpoints", "checkpoints/config.json: missing"),
    (f"{REAL} --members a=llada b=checkpoints/toy-seed0/A", "toy-seed0/A: tokenizer"),
    (REAL, "dream/config.json: missing", "dream", remove("config.json")),
    (REAL, "dream/config.json: missing or", "dream", write("config.json", "{")),
    (REAL, "config.json: ...model_type...gpt2", "dream", edit(model_type="gpt2")),
    (REAL, "llada/model.safetensors: missing or", "llada", remove("model.safetensors")),
    (REAL, "dream: tokenizer", "dream", remove("tokenizer.json")),
    (REAL, "dream: tokenizer", "dream", cut("tokenizer.json", 3000)),
    (REAL, "member 'dream' gave NaN logits", "dream", poisoned("lm_head.weight")),
    # questions
    (f"{REAL} --data nowhere", "nowhere, row 1: expected GSM8K's test.jsonl"),
    (REAL, "test.jsonl, row 1: expected GSM8K's", ".", write("test.jsonl", '{"problem": "P"}')),
    (REAL, "1024", ".", write("test.jsonl", json.dumps({"question": "9" * 2000, "answer": "#### 1"}))),
    (
        f"{REAL} --data code.json".replace("gsm8k", "mbpp"),
        "grading mbpp runs the model's code: pass --run-code",
        ".",
        write("code.json", '[{"task_id": 2, "prompt": "P", "test_imports": [], "test_list": ["f()"]}]'),
    ),
    # training
    ("train_toy --steps many", "--steps: invalid int value: 'many'"),
    ("train_toy --gaps 40", "gaps must be 0 to 16, got 40"),
    ("train_toy --members 5", "--members: invalid choice: 5"),
    ("train_toy --device abacus", "device abacus cannot be used"),
    ("train_toy --out test.jsonl", "test.jsonl"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, folders, data, monkeypatch):
    """A working directory with toy members, a LLaDA, a Dream and questions; nothing is trained."""
    untrained(tmp_path / "checkpoints" / "toy-seed0")
    for family, folder in folders.items():
        shutil.copytree(folder, tmp_path / family)
    shutil.copy(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_toy, "pool", in_process)
    monkeypatch.setattr(train_toy, "train_member", lambda *given: pytest.fail("training began"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0][:40]} {case[1]}"[:80] for case in CASES])
def test_a_mistake_is_one_line_and_exit_code_two(case, place, capsys):
    line, message, *damage = case
    if damage:
        damage[1](place / damage[0])
    before = contents(place)
    program, *arguments = shlex.split(line)
    try:
        code = {"eval": evaluation.main, "train_toy": train_toy.main}[program](arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    *usage, said = err.splitlines()
    assert code == 2 and out == ""
    for part in message.split("..."):
        assert part in said
    assert not usage or usage[0].startswith("usage: ")
    assert before.items() <= contents(place).items()
