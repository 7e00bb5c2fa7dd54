"""Bad input to the two commands costs exit code 2 and one line on stderr that names the thing; it never costs files.

The table holds command lines and what was done to the folder in which they run. Every case starts from a folder with
toy members, a LLaDA and a Dream with their tokenizers, questions, and the records of an earlier run. All commands are
called in this process, except where processes or the size of files matter.
"""

import gzip
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

import pytest
import torch
from test_benchmarks import needs_bwrap
from test_mdlm import cut, edit, remove, tensors, word_level, write
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


def cast(dtype: torch.dtype) -> Callable[[Path], object]:
    return tensors(lambda state: state.update({name: weight.to(dtype) for name, weight in state.items()}))


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


GOOD = QUESTIONS[0]
FREE = resource.getrlimit(resource.RLIMIT_FSIZE)
NESTED = b"[" * 100_000
LONG = "9" * 10_000_000

# --- the table: command line; what the line on stderr says, in this order; what was done before -------------

ARGUMENTS = [
    # unknown, misspelt, abbreviated, incomplete
    ("eval --nonsense", "unrecognized arguments: --nonsense"),
    ("eval --problem 5", "--problem"),
    ("eval --intervall 4", "--intervall"),
    ("eval --interval", "--interval ... expected one argument"),
    ("eval gsm8k", "unrecognized arguments: gsm8k"),
    ("eval '--two\nlines'", "unrecognized arguments: --two lines"),
    ("eval --score tcc", "--score ... 'tcc' ... token_change_count"),
    ("eval --selection first", "--selection ... 'first' ... lowest_tcc"),
    ("eval --table 4", "--table ... '4' ... '10'"),
    ("eval --table", "--table ... expected at least one argument"),
    ("eval --members a=x b=y --task gsm9k --data gsm8k.jsonl", "--task ... 'gsm9k' ... gsm8k"),
    ("eval --members a", "'a' is not NAME=FOLDER"),
    ("eval --members =llada b=dream", "'=llada' is not NAME=FOLDER"),
    ("eval --members a/b=llada c=dream --task gsm8k --data gsm8k.jsonl --single", "'a/b=llada' is not NAME=FOLDER"),
    ("eval --members {x}=llada c=dream --task gsm8k --data gsm8k.jsonl --single", "'{x}=llada' is not NAME=FOLDER"),
    ("eval --members a=llada a=dream --task gsm8k --data gsm8k.jsonl", "--members names a twice"),
    # numbers
    ("eval --interval 0", "interval must be ... at least 1, ... not 0"),
    ("eval --interval 2.5", "--interval ... '2.5'"),
    ("eval --top-k 0", "top_k must be ... at least 1, ... not 0"),
    ("eval --block-size 0", "block_size must be ... at least 1, ... not 0"),
    ("eval --batch-size 0", "--batch-size must be at least 1, not 0"),
    ("eval --threshold 0", "threshold must be a number in (0, 1], not 0.0"),
    ("eval --threshold 1.5", "threshold must be a number in (0, 1], not 1.5"),
    ("eval --threshold nan", "threshold must be a number in (0, 1], not nan"),
    ("eval --problems 0", f"--problems 0: give 1 to {AVAILABLE}"),
    ("eval --problems -1", f"--problems -1: give 1 to {AVAILABLE}"),
    ("eval --problems 1000000", f"--problems 1000000: give 1 to {AVAILABLE}"),
    ("eval --table 1 --problems 0", f"--problems 0: give 1 to {AVAILABLE}"),
    ("eval --problem-seed 99999999999999999999", "--problem-seed 99999999999999999999: give"),
    ("eval --problem-seed -1", "--problem-seed -1: give"),
    ("eval --seed -1", "seed is -1, but must be from 0"),
    ("eval --seed 4294967295 --seeds 2 --table 3", "seed is 4294967296, but must be from 0"),
    ("eval --table 1 --seeds 0", "--seeds must be at least 1 and at most 1000, not 0"),
    ("eval --trace -1", "--trace must be at least 1, not -1"),
    (f"eval --trace {AVAILABLE + 1}", f"--trace {AVAILABLE + 1}: give 1 to {AVAILABLE}"),
    ("eval --steps 0", "steps is 0, but must be from 1"),
    ("eval --table 1 --seeds 1000000000", "--seeds must be at least 1 and at most 1000, not 1000000000"),
    ("eval --out ''", "--out ... an empty path"),
    ("eval --checkpoints ''", "--checkpoints ... an empty path"),
    (f"{REAL} --data ''", "--data ... an empty path"),
    (f"{REAL} --run-code freely", "--run-code ... 'freely' ... unconfined"),
    ("eval --device cpu cpu", "--device has 2 values for 1 members: give one, or one each"),
    ("eval --device abacus", "--device abacus cannot be used"),
    ("eval --unsolved", "--unsolved is for --trace: give it too"),
    (f"{REAL} --limit 0", "--limit must be at least 1, not 0"),
    # what excludes each other, or lacks its other half
    ("eval --threshold 0.9 --top-k 2", "threshold ... exclude each other"),
    ("eval --json --trace 1", "leave out one of --trace and --json"),
    ("eval --seeds 2", "--seeds is for --table: give it too"),
    ("eval --table 7 --threshold 0.9", "their own --threshold: leave it out"),
    ("eval --table 3 --score negative_entropy", "their own --score: leave it out"),
    ("eval --table 3 --trace 1", "their own --trace: leave it out"),
    ("eval --figure figures --json", "leave out --json"),
    ("eval --figure figures --seeds 2 --table 1", "leave out --json, --trace and --seeds"),
    ("eval --members a=llada b=dream --table 1", "--table is for the toy: leave out --members"),
    (f"{REAL} --problems 10", "--problems is for the toy: leave out --members"),
    (f"{REAL} --seed 1", "--seed is for the toy: leave out --members"),
    (f"{REAL} --checkpoints other", "--checkpoints is for the toy: leave out --members"),
    ("eval --task gsm8k", "--task is for real checkpoints: give --members too"),
    ("eval --limit 5", "--limit is for real checkpoints: give --members too"),
    ("eval --run-code", "--run-code is for real checkpoints: give --members too"),
    ("eval --members a=llada b=dream", "--members needs --task and --data"),
    ("eval --members a=llada b=dream --task gsm8k", "--members needs --task and --data"),
    ("eval --members a=llada --task gsm8k --data gsm8k.jsonl", "one member is no ensemble: give ... or add --single"),
    (f"{REAL} --device cpu cpu cpu", "--device has 3 values for 2 members: give one, or one each"),
    (f"{REAL} --device abacus", "--device abacus cannot be used"),
    (f"{REAL} --device meta", "--device meta cannot be used"),
    # training
    ("train_toy --step 3", "--step"),
    ("train_toy --seeds 3", "--seeds"),
    ("train_toy --steps many", "--steps ... 'many'"),
    ("train_toy --steps 0", "steps is 0, but must be from 1"),
    ("train_toy --seed -1", "seed is -1, but must be from 0"),
    ("train_toy --lr inf", "lr is inf, but must be from"),
    ("train_toy --lr nan", "lr is nan, but must be from"),
    ("train_toy --gaps 17", "gaps is 17, but must be from 0 to 16"),
    ("train_toy --hidden 1", "hidden is 1.0, but must be from 0 to 0.99"),
    ("train_toy --width 12", "width is 12, but must be a multiple of 8"),
    ("train_toy --members 0", "members is 0"),
    ("train_toy --members 5", "members is 5"),
    ("train_toy --device abacus --out checkpoints/toy-seed0 --seed 1", "device 'abacus' ... try cpu"),
    ("train_toy --device meta --out checkpoints/toy-seed0 --seed 1", "device 'meta' ... try cpu"),
]

DAMAGED = [
    # toy members
    (TOY, "B/config.json: missing or damaged ... write the file again", at(B, write("config.json", ""))),
    (TOY, "B/config.json: missing or damaged ... write the file again", at(B, write("config.json", "{"))),
    (TOY, "B/config.json: missing or damaged ... write the file again", at(B, cut("config.json", 90))),
    (TOY, "B/config.json: missing or damaged ... write the file again", at(B, put("config.json", b'{"a": "\xff"}'))),
    (TOY, "B/config.json: missing or damaged ... write the file again", at(B, put("config.json", NESTED))),
    (TOY, "B/config.json: holds no JSON object ... write the file again", at(B, write("config.json", "[]"))),
    (TOY, "B/config.json: unknown model_type 'gpt2'; give one of mdlm", at(B, edit(model_type="gpt2"))),
    (TOY, "B/config.json: 'heads' is missing", at(B, edit(heads=...))),
    (TOY, "B/config.json: width must be ... not '64'", at(B, edit(width="64"))),
    (TOY, "B/config.json: layers must be ... not True", at(B, edit(layers=True))),
    (TOY, "B/config.json: layers must be ... at most 1000, not 1000000000", at(B, edit(layers=10**9))),
    (TOY, f"B/config.json: width must be ... at most 16777216, not {2**63}", at(B, edit(width=2**63))),
    (TOY, f"B/config.json: vocab_size must be ... not {2**63}", at(B, edit(vocab_size=2**63))),
    (TOY, "B/config.json: shift must be true or false, not 'no'", at(B, edit(shift="no"))),
    (TOY, "B/config.json: rope_theta must be ... not nan", at(B, edit(rope_theta=float("nan")))),
    (TOY, "B/config.json: eos_id must", at(B, edit(eos_id=[]))),
    (TOY, "B/config.json: mask_id 17 lies outside the vocabulary of 17", at(B, edit(mask_id=17))),
    (TOY, "B/model.safetensors: missing or damaged ... write the file again", at(B, write("model.safetensors", ""))),
    (TOY, "B/model.safetensors: missing or damaged ... write the file again", at(B, cut("model.safetensors", 9_000))),
    (TOY, "B/model.safetensors: missing or damaged", at(B, put("model.safetensors", b"\xff" * 9_000))),
    (TOY, "B/model.safetensors: head.weight has shape [16, 64]",
     at(B, tensors(lambda s: s.update({"head.weight": s["head.weight"][:16].clone()})))),
    (TOY, "B: tensor norm.weight is in none of its files", at(B, tensors(lambda s: s.pop("norm.weight")))),
    (TOY, "B/model.safetensors: unexpected tensor more", at(B, tensors(lambda s: s.update(more=torch.ones(1))))),
    (TOY, "B/model.safetensors: embed.weight holds I32", at(B, cast(torch.int32))),
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
    (REAL, "dream/config.json: missing or damaged ... fetch", at("dream", put("config.json", make=dir))),
    (REAL, "dream/config.json: missing or damaged ... fetch", at("dream", put("config.json", NESTED))),
    (REAL, "llada/config.json: missing or damaged ... fetch", at("llada", cut("config.json", 200))),
    (REAL, "llada/config.json: holds no JSON object", at("llada", write("config.json", '"llada"'))),
    (REAL, "llada/config.json: rope_float32 must be true or false", at("llada", edit(rope_full_precision="yes"))),
    (REAL, "llada/config.json: rope_theta must be ... inf", at("llada", edit(rope_theta=float("inf")))),
    (REAL, "dream/config.json: eos_id ... lies outside", at("dream", edit(eos_token_id=[[1]]))),
    (REAL, "dream/config.json: width must be ... not [32]", at("dream", edit(hidden_size=[32]))),
    (REAL, f"llada/config.json: max_length must be ... not {2**63}", at("llada", edit(max_sequence_length=2**63))),
    (REAL, "dream/model.safetensors: missing or damaged", at("dream", write("model.safetensors", ""))),
    (REAL, "dream/model.safetensors: missing or damaged", at("dream", put("model.safetensors", make=dir))),
    (REAL, "dream/model.safetensors: missing or damaged", at("dream", cut("model.safetensors", 40_000))),
    (REAL, "dream/model.safetensors: lm_head.weight has shape",
     at("dream", tensors(lambda s: s.update({"lm_head.weight": s["lm_head.weight"][1:].clone()})))),
    (REAL, "dream/model.safetensors: lm_head.weight holds I32", at("dream", cast(torch.int32))),
    (REAL, "member 'dream' gave NaN logits: check its weights", at("dream", poison("lm_head.weight"))),
    (f"{REAL} --single", "member 'llada' gave NaN logits", at("llada", poison("model.transformer.ln_f.weight"))),
    (REAL, "llada/model.safetensors.index.json: holds no JSON object",
     at("llada", write("model.safetensors.index.json", "[]"))),
    (REAL, "'weight_map' does not map", at("llada", write("model.safetensors.index.json", '{"weight_map": {"a": 1}}'))),
    (REAL, "'weight_map' does not map",
     at("llada", write("model.safetensors.index.json", '{"weight_map": {"a": "../dream/model.safetensors"}}'))),
    (REAL, "llada/model-2.safetensors: missing or damaged",
     at("llada", write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'))),
    # tokenizers
    (REAL, "dream: tokenizer cannot be used", at("dream", remove("tokenizer.json"))),
    (REAL, "dream: tokenizer cannot be used", at("dream", write("tokenizer.json", ""))),
    (REAL, "dream: tokenizer cannot be used", at("dream", cut("tokenizer.json", 3_000))),
    (REAL, "dream: tokenizer cannot be used", at("dream", put("tokenizer.json", b"\xff\xfe{}"))),
    (REAL, "dream: tokenizer cannot be used", at("dream", put("tokenizer.json", make=dir))),
    (REAL, "dream: tokenizer cannot be used ... no token ... is it of another model?",
     lambda folder: shutil.copy(folder / "llada" / "tokenizer.json", folder / "dream")),
    (REAL, "dream: tokenizer cannot be used ... no byte-level BPE", at("dream", word_level)),
    (REAL, "dream: tokenizer cannot be used ... beyond the model's vocabulary", at("dream", edit(vocab_size=355))),
    # questions
    (f"{REAL} --data nowhere", "nowhere: cannot be read"),
    (f"{REAL} --data /dev/zero", "/dev/zero: cannot be read ... over 67108864 bytes"),
    (f"{REAL} --data dream", "dream: no question for gsm8k; give GSM8K's test.jsonl"),
    (REAL, "gsm8k.jsonl: no question for gsm8k; give GSM8K's test.jsonl", rows()),
    (REAL, "gsm8k.jsonl, line 1: cannot be read, fetch", put("gsm8k.jsonl", b"PK\x03\x04\x00\x00")),
    (REAL, "gsm8k.jsonl: cannot be read, fetch", put("gsm8k.jsonl", b"\x89PNG\r\n\x1a\n\x00\x00")),
    (REAL, "gsm8k.jsonl: cannot be read, fetch", put("gsm8k.jsonl", json.dumps(GOOD).encode("utf-16"))),
    (REAL, "gsm8k.jsonl: cannot be read, fetch",
     put("gsm8k.jsonl", json.dumps(GOOD).encode() + b'\n{"question": "\xe9"}')),
    (REAL, "gsm8k.jsonl, line 2: cannot be read, fetch",
     put("gsm8k.jsonl", json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()[:30])),
    (REAL, "gsm8k.jsonl: cannot be read, fetch", put("gsm8k.jsonl", gzip.compress(json.dumps(GOOD).encode())[:-9])),
    (REAL, "gsm8k.jsonl, line 1: cannot be read, fetch", put("gsm8k.jsonl", b'{"question": ' + NESTED)),
    (REAL, "gsm8k.jsonl, line 1: cannot be read, fetch", put("gsm8k.jsonl", b"x" * 10_000_000)),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {"problem": "P", "answer": "1"})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {**GOOD, "question": ["Q"]})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {**GOOD, "question": None})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {**GOOD, "answer": 5})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {**GOOD, "answer": f"#### {LONG}"})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, {**GOOD, "question": "\ud800"})),
    (REAL, "line 2: not a row for gsm8k ... give GSM8K's test.jsonl", rows(GOOD, None)),
    (REAL, "line 2: 7 was there before; give every question once", rows({**GOOD, "id": 7}, {**GOOD, "id": 7})),
    (REAL, "question gsm8k/1 ... over 1024 of member 'llada': leave it out",
     rows(GOOD, {**GOOD, "question": "9" * 2000})),
    (f"{REAL} --task math500", "line 1: not a row for math500", rows({"problem": "P", "answer": 5})),
    (f"{REAL} --task humaneval --run-code", "line 1: not a row for humaneval",
     rows({"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": None})),
    (f"{REAL} --task mbpp --run-code", "line 1: not a row for mbpp ... give sanitized-mbpp.json",
     rows({"task_id": 2, "prompt": "P", "test_imports": None, "test_list": ["assert f()"]})),
    (f"{REAL} --task mbpp --run-code", "line 1: not a row for mbpp ... give sanitized-mbpp.json",
     rows({"task_id": 2, "prompt": "P", "test_imports": [], "test_list": "assert f()"})),
    (f"{REAL} --task mbpp", "grading mbpp runs the model's code: pass --run-code to allow it",
     rows({"task_id": 2, "prompt": "P", "test_imports": [], "test_list": ["assert f()"]})),
    (f"{REAL} --task countdown", "line 1: not a row for countdown", rows({"nums": None, "target": 5})),
    # --out and --figure
    (f"{TOY} --out gsm8k.jsonl", "cannot use --out gsm8k.jsonl ... give a folder that can be written"),
    (f"{TOY} --out gsm8k.jsonl/deeper", "cannot use --out gsm8k.jsonl/deeper ... give a folder"),
    (f"{TOY} --out {'x' * 300}", "cannot use --out xxx ... give a folder that can be written"),
    (f"{REAL} --out gsm8k.jsonl", "cannot use --out gsm8k.jsonl ... give a folder that can be written"),
    (f"{TOY} --figure gsm8k.jsonl", "cannot use --figure gsm8k.jsonl ... mend that"),
    (f"{AGAIN} --interval 5", "results holds results of another config: give another --out"),
    (f"{AGAIN} --problems 4 --seed 1", "results holds results of another problems, training, questions: give another --out"),
    (f"{REAL} --out results", "results holds results of another task ... give another --out"),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", write("settings.json", ""))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", cut("settings.json", 99))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", put("settings.json", b"\xff"))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", put("settings.json", NESTED))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", write("settings.json", "[]"))),
    (AGAIN, "results/settings.json is missing or damaged: move", settings(dict.clear)),
    (AGAIN, "results/settings.json is missing or damaged: move", settings(lambda value: value.update(settings=[]))),
    (AGAIN, "results/settings.json is missing or damaged: move", settings(lambda value: value.pop("fingerprints"))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", put("settings.json", make=dir))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", remove("settings.json"))),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b"[]\n")),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b'{"id": "1234*5="}\n')),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b'{"id": ["1234*5="]}\n')),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b'{"id": "1234*5=", \n')),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b"\x00\xff\n")),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(line(winner=7))),
    *[(AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(line(**changes))) for changes in (
        {"correct": ["x", "y"]}, {"correct": [True]}, {"winner": 2}, {"winner": True}, {"winner": -1}, {"leaders": [2]},
        {"leaders": 5}, {"tcc": ["x", 0.0]}, {"tcc": []}, {"tcc": {"a": 0.0, "b": 0.0}}, {"tcc": [float("nan"), 0.0]},
        {"tcc": [float("inf"), 0.0]}, {"tcc": [10**400, 0.0]}, {"top1": [0.5]}, {"scores": [[0.5]]}, {"scores": [["a", "b"]]},
        {"scores": None}, {"forwards": float("nan")}, {"forwards": "64"}, {"answers": ["a"]}, {"answers": [1, 2]},
        {"texts": ["a", "b"]}, {"id": 5}, {"id": ["i"]},
    )],
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(b'{"tcc": [1e999, 0.0]}\n')),
    (AGAIN, f"cannot read results/{TIE}: Too many levels of symbolic links; mend that", at("results", loop(TIE))),
    (AGAIN, f"cannot read results/{OTHER}: Too many levels", at("results", loop(OTHER))),
    (AGAIN, "results/settings.json is missing or damaged: move", at("results", loop("settings.json"))),
    (AGAIN, "results holds results of another weights of B: give another --out", at(B, reweighted)),
    (AGAIN, "results holds results of another questions: give another --out",
     settings(lambda value: value["fingerprints"].update(questions="0"))),
    (AGAIN, f"results/{TIE}, line 1, is no record: move the file away", record(NESTED + b"\n")),
    (AGAIN, f"results/{TIE}", at("results", put(TIE, make=dir))),
    (AGAIN, f"cannot write results/{TIE} ... same command goes on", full_disk(f"results/{TIE}", 900, record(b"", 2))),
    (f"{TOY} --out fresh", "cannot use --out fresh ... File too large", full_disk("fresh", 50)),
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


PROCESSES = [
    (f"{TOY} --out fresh", "B/model.safetensors: missing or damaged", at(B, cut("model.safetensors", 9_000))),
    (f"train_toy {SMALL} --out fresh", "cannot write to folder fresh/ ... make room", full_disk("fresh", 2_000)),
]


@pytest.mark.parametrize("line, told, damage", PROCESSES, ids=[case[0] for case in PROCESSES])
def test_bad_input_as_a_command(line, told, damage, place):
    """With processes of their own for members; they inherit the limit on the size of files."""
    damage(place)
    before = contents(place)
    program, *arguments = shlex.split(line)
    try:
        done = subprocess.run([sys.executable, ROOT / f"{program}.py", *arguments], capture_output=True, text=True,
                              check=False)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FREE)
    check(done.returncode, done.stdout, done.stderr, line, told, before, contents(place))


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


@pytest.mark.parametrize(
    "given", [{"RANK": "abc"}, {"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": "x"}]
)
def test_processes_that_torchrun_never_starts(given, place, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert evaluation.main(shlex.split(REAL)[1:]) == 2
    assert "in the environment: unset them, or use torchrun" in capsys.readouterr().err


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
    check(done.returncode, done.stdout, done.stderr, "eval", "cannot use --out results ... give a folder", before, contents(place))


@pytest.mark.parametrize("change", [
    lambda record: record.pop("validation_accuracy"), lambda record: record.update(validation_accuracy="0.5"),
    lambda record: record.pop("settings"), lambda record: record.update(settings=[]), lambda record: record.pop("name"),
    lambda record: record["settings"].update(steps="x"), lambda record: record.update(validation_accuracy=float("nan")),
])  # fmt: skip
def test_a_training_record_that_is_damaged_is_none(change, place):
    """Its member is trained again, as one that was not completed."""
    file = place / B / train_toy.RECORD
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(pytest.fail.Exception, match="training began"):
        evaluation.main(shlex.split(TOY)[1:])
