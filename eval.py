"""The experiments: TIE against its members and the post-generation ensemble, on toy models and on real checkpoints.

Examples:
    python eval.py                                   train toy members once, then the main table (paper: Tables 3 and 5)
    python eval.py --trace 3                         three decodings, round by round
    python eval.py --problems 300 --json             one JSON object on stdout
    python eval.py --seed 1 --out results/seed1      records on disk; the same command goes on after an interruption
    python eval.py --table 1 9 --overconfident B=4   tables of the paper on the toy, its own figures beside ours
    python eval.py --table all --seeds 3 --out results   all of them, over three trainings
    python eval.py --figure figures                  Fig. 1 and Fig. 3 as PNG
    python eval.py --members llada=LLaDA-1.5 dream=Dream-v0-Instruct-7B --task gsm8k --data test.jsonl --out gsm8k
"""

from __future__ import annotations

import argparse
import cmath
import csv
import functools
import gzip
import io
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import secrets
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import mdlm
import tie
import train_toy

Record = dict[str, Any]  # a question's: id, gold, answers, correct, texts, winner, leaders, scores, tcc, top1, forwards


# --- decoding questions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    prompt: str
    gold: Any  # letter, number or LaTeX as text; {"numbers", "target"}; for code what its tests need


DTYPES: dict[str | None, torch.dtype | None] = {
    None: None, "float32": torch.float32, "bfloat16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What it takes to decode and grade questions with M members."""

    members: list[tie.Member]
    canvases: Callable[[list], list[tie.Canvas]]  # questions -> one canvas a member
    text: Callable[[int, list[int]], str]  # member, ids of its answer region -> text of the answer
    grade: Callable[[Question, str], tuple[str, bool]]  # question, text of the answer region -> answer, right?


@torch.inference_mode()  # beside tie's own no_grad: a few per cent faster
def decode_questions(setup: Setup, config: tie.Config, questions: list) -> list[Record]:
    """Decode one batch and grade every candidate; one record a question."""
    result = tie.ensemble(setup.members, setup.canvases(questions), config)
    records = []
    for b, question in enumerate(questions):
        regions = [(c.tokens[b, c.reasoning].tolist(), c.tokens[b, c.answer].tolist()) for c in result.candidates]
        texts = [[setup.text(m, ids) for ids in region] for m, region in enumerate(regions)]
        answers, correct = zip(*[setup.grade(question, answer) for _, answer in texts])
        records.append({
            "id": question.id, "gold": question.gold, "answers": answers, "correct": correct, "texts": texts,
            "winner": int(result.winner[b]), "leaders": [m for m in result.leaders[:, b].tolist() if m >= 0],
            "tcc": result.tcc[:, b].tolist(), "forwards": result.forwards,
            "scores": [finite(relay) for relay in result.scores[:, :, b]], "top1": finite(result.top1[:, b]),
        })  # fmt: skip
    return records


def finite(values: torch.Tensor) -> list[float | None]:
    """JSON knows no infinity."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


FIELDS = {"id": str, "gold": object, "answers": list, "correct": list, "texts": list, "winner": int, "leaders": list,
          "tcc": list, "forwards": float, "scores": list, "top1": list}  # fmt: skip


class Records:
    """JSON lines, one a question, flushed as they come; what an interrupted run left is kept, less half a line.

    folder None: nothing is written. Each process writes a file of its own. ValueError if a line is no record."""

    def __init__(self, folder: Path | None, name: str, rank: int = 0):
        self.pattern = f"{name.replace(' ', '-')}.{{}}.jsonl"
        self.folder, self.path = folder, folder / self.pattern.format(rank) if folder else None
        if self.path and self.path.exists():
            data = self.path.read_bytes()
            os.truncate(self.path, data.rfind(b"\n") + 1)
        self.done = self.of_all_ranks() if folder else {}

    def of_all_ranks(self) -> dict[str, Record]:
        """The records of every process by question, as far as they are written."""
        records = dict(self.done) if self.folder is None else {}
        for path in sorted(self.folder.glob(self.pattern.format("*"))) if self.folder else []:
            data = path.read_bytes()
            for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
                try:
                    record = json.loads(line)
                    for key, kind in FIELDS.items():
                        _is(kind, record[key])
                    if record["winner"] not in range(len(record["correct"])):
                        raise ValueError("no such candidate")
                    for right in record["correct"]:
                        _is(bool, right)
                    records[record["id"]] = record
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise ValueError(f"{path}, line {number}, is no record: move the file away to start anew") from None
        return records

    def add(self, records: Iterable[Record]) -> None:
        new = [record for record in records if record["id"] not in self.done]
        self.done |= {record["id"]: record for record in new}
        if self.path and new:
            with writing(self.path), self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in new))


def open_results(folder: Path | None, settings: dict) -> None:
    """Make the folder and write settings.json beside the records; ValueError if it holds records of other settings."""
    if folder is None:
        return
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            earlier = earlier_settings(path)
            differing = [k for k in settings if earlier.get(k) != json.loads(json.dumps(settings[k]))]
            if differing:
                raise ValueError(f"{folder} holds results of another {', '.join(differing)}: give another --out")
        write_json(path, {"settings": settings, **environment()})
    except OSError as error:
        raise ValueError(f"cannot use --out {folder}: {error}; give a folder that can be written") from None


def earlier_settings(path: Path) -> dict:
    try:
        return dict(**json.loads(path.read_bytes())["settings"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path} is damaged: move it and the records beside it away to start anew") from None


def environment() -> dict:
    """Versions and hardware, for the record."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "gpus": gpus},
    }


def write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")  # each of several processes writes its own
    with writing(path):
        part.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(part, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the file system alone would not say which file, nor what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; mend that, and the same command goes on") from None


# --- figures of merit -------------------------------------------------------------------------------


def accuracy(correct: Iterable[bool]) -> dict:
    """Accuracy and its 95 % Wilson interval."""
    right = np.array(list(correct), dtype=float)
    n, p, z = len(right), right.mean(), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return {"accuracy": float(p), "ci95": [max(0.0, float(low)), min(1.0, float(high))]}  # rounding may step outside


def paired(name: str, correct: Iterable[bool], reference: Iterable[bool]) -> dict:
    """Mean difference over the same questions, with a 95 % bootstrap interval over questions."""
    difference = np.array(list(correct), dtype=int) - np.array(list(reference), dtype=int)  # (questions,) of -1, 0, 1
    shares = [np.mean(difference == d) for d in (-1, 0, 1)]
    draws = np.random.default_rng(0).multinomial(len(difference), shares, size=10_000) @ [-1, 0, 1] / len(difference)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"name": name, "difference": float(difference.mean()), "ci95": [float(low), float(high)]}


def change_rate(records: list[Record]) -> float | None:
    """Share of relays whose leader differs from the relay before (Table 5); None without such relays."""
    changes = [a != b for record in records for a, b in zip(record["leaders"], record["leaders"][1:])]
    return sum(changes) / len(changes) if changes else None


def won(record: Record) -> bool:
    return record["correct"][record["winner"]]


# --- the toy experiment -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyJob:
    """A decoding of toy problems, or a batch of it, for any process."""

    folder: str
    names: tuple[str, ...]
    config: tie.Config
    problems: tuple[train_toy.Problem, ...]
    factors: tuple[tuple[str, float], ...] = ()  # members and the factors on their logits
    dtype: str | None = None  # of the weights; None: as stored
    temperature: float = 0.0  # sample at this temperature instead of decoding greedily
    restart: tuple[str, int] | None = None  # start from what this member alone has after so many steps (Table 2)


def toy_setup(job: ToyJob) -> Setup:
    """Members from their folders below the job's, all of one vocabulary."""
    members = [toy_member(job, name, place) for place, name in enumerate(job.names)]

    def canvases(questions: list[Question]) -> list[tie.Canvas]:
        canvas = train_toy.canvas([q.prompt for q in questions])
        return [restarted(job, canvas) if job.restart else canvas] * len(members)

    return Setup(
        members, canvases, text=lambda m, ids: train_toy.decode(ids),
        grade=lambda question, answer: (answer, answer == question.gold),
    )  # fmt: skip


def toy_member(job: ToyJob, name: str, place: int = 0) -> tie.Member:
    """The member of this name; copies at other places among the members differ where they sample."""
    model, config = mdlm.load(Path(job.folder) / name, dtype=DTYPES.get(job.dtype))
    factor = dict(job.factors).get(name, 1.0)
    scaled = model if factor == 1 else (lambda *inputs: factor * model(*inputs))
    seed = zlib.crc32(f"{place} {job.problems[0].prompt}".encode()) if job.temperature else 0
    denoise = sampling(scaled, job.temperature, seed) if job.temperature else scaled
    return tie.Member(denoise, config.mask_id, config.eos_id, name)


def sampling(denoise: tie.Denoiser, temperature: float, seed: int) -> tie.Denoiser:
    """With Gumbel noise on the logits the greedy choice is a sample at the temperature. The noise reaches the order of
    unmasking too, since that follows the same logits."""
    dice = torch.Generator().manual_seed(seed)

    def noisy(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits = denoise(tokens, positions, mask)  # (B, K, V)
        exponential = torch.empty_like(logits).exponential_(generator=dice)  # (B, K, V)
        return logits / temperature - exponential.log()

    return noisy


def restarted(job: ToyJob, canvas: tie.Canvas) -> tie.Canvas:
    """The canvas as the member that `restart` names, decoding alone, has it after the steps given there."""
    name, steps = job.restart or ("", 0)
    states: list[dict] = []
    tie.ensemble([toy_member(job, name)], [canvas], replace(job.config, interval=steps), states.append)
    return replace(canvas, tokens=states[0]["tokens"][0], masked=states[0]["masked"][0])


def decode_job(job: ToyJob) -> list[Record]:
    torch.set_num_threads(1)  # the jobs share the cores
    questions = [Question(p.prompt, p.prompt, p.answer) for p in job.problems]
    return decode_questions(toy_setup(job), job.config, questions)


def decode_toy(args: argparse.Namespace, runs: dict[str, ToyJob]) -> dict[str, list[Record]]:
    """Records of every run, in the order of its problems."""
    files = {name: Records(args.out, name) for name in runs}
    batches = [(name, replace(job, problems=job.problems[i : i + args.batch_size]))
               for name, job in runs.items() for i in range(0, len(job.problems), args.batch_size)]  # fmt: skip
    todo = [(name, job) for name, job in batches if any(p.prompt not in files[name].done for p in job.problems)]
    total = sum(len(job.problems) for _, job in todo)
    count = min(len(todo), os.cpu_count() or 1)
    with tqdm(total=total, unit="problem", disable=None) as bar, train_toy.workers(count) as pool:
        for (name, job), records in zip(todo, pool(decode_job, [job for _, job in todo])):
            bar.set_description(name)
            files[name].add(records)
            bar.update(len(records))
    return {name: [files[name].done[p.prompt] for p in job.problems] for name, job in runs.items()}


METHODS = ("post-generation", *(f"tie {score}" for score in tie.SCORES))  # of the main table
TOY_STEPS = train_toy.REASONING_LENGTH + train_toy.ANSWER_LENGTH  # T, at one token a step


def toy_methods(job: ToyJob) -> dict[str, ToyJob]:
    """The rows of the main table. With n >= T no relay takes place: members alone, and post-generation (Table 3)."""
    fields: list[dict] = [{"interval": TOY_STEPS}, *({"score": score} for score in tie.SCORES)]
    return {name: replace(job, config=replace(job.config, **own)) for name, own in zip(METHODS, fields)}


def row(name: str, correct: list[bool], records: list[Record], share: float = 1) -> dict:
    """One line of a table; `share` is the part of the records' forwards that the method needs."""
    method, _, score = name.partition(" ") if name.startswith("tie ") else (name, "", "")
    forwards = share * float(np.mean([record["forwards"] for record in records]))
    return {"method": method, "score": score or None, **accuracy(correct), "forwards": forwards,
            "change_rate": change_rate(records)}  # fmt: skip


def main_table(records: dict[str, list[Record]], names: Sequence[str]) -> dict:
    """Rows and comparisons of the main table, as `--json` prints them, from the records of its methods."""
    alone = records["post-generation"]
    members = member_answers(alone, names)
    best = max(members, key=lambda name: sum(members[name]))
    rows = [row(name, correct, alone, 1 / len(names)) for name, correct in members.items()]
    rows.append(row("oracle", [any(r["correct"]) for r in alone], alone))
    comparisons, right = [], {name: [won(r) for r in own] for name, own in records.items()}
    none = [i for i, r in enumerate(alone) if not any(r["correct"])]
    for name, own in records.items():
        rows.append(row(name, right[name], own))
        if name != "post-generation":
            solved = float(np.mean([right[name][i] for i in none])) if none else None
            rows[-1]["none_alone"] = {"value": solved, "n": len(none)}
        comparisons.append(paired(f"{name} - best member", right[name], members[best]))
        if name != "post-generation":
            comparisons.append(paired(f"{name} - post-generation", right[name], right["post-generation"]))
    tcc = [{"member": name, **split_tcc(alone, m)} for m, name in enumerate(names)]
    return {"rows": rows, "comparisons": comparisons, "best_member": best, "tcc": tcc}


def member_answers(alone: list[Record], names: Sequence[str]) -> dict[str, list[bool]]:
    return {f"member {name}": [r["correct"][m] for r in alone] for m, name in enumerate(names)}


def split_tcc(records: list[Record], m: int) -> dict:
    """Mean C~(T) of member m decoding alone, over its correct and its incorrect answers (Table 1)."""
    groups = {name: [r["tcc"][m] for r in records if r["correct"][m] == right]
              for name, right in (("correct", True), ("incorrect", False))}  # fmt: skip
    return {name: float(np.mean(values)) if values else None for name, values in groups.items()}


def percent(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def show_table(table: dict) -> None:
    """A table for a terminal: accuracies in percent, differences in percentage points."""
    differences = {c["name"]: f"{percent(c['difference'], True)} [{', '.join(percent(x, True) for x in c['ci95'])}]"
                   for c in table["comparisons"]}  # fmt: skip
    line = "{:<26}{:>9}  {:<14}{:<21}{:<21}{:>8}{:>10}{:>8}"
    paper = "paper" if any("paper" in row for row in table["rows"]) else ""
    heads = ("method", "accuracy", "95 % interval", "- best member", "- post-generation", "changes", "forwards", paper)
    print(line.format(*heads).rstrip())
    for entry in table["rows"]:
        name = " ".join(filter(None, (entry["method"], entry["score"])))
        print(line.format(
            name, percent(entry["accuracy"]), f"[{', '.join(map(percent, entry['ci95']))}]",
            differences.get(f"{name} - best member", ""), differences.get(f"{name} - post-generation", ""),
            percent(entry["change_rate"]), f"{entry['forwards']:.1f}", entry.get("paper") or "",
        ).rstrip())  # fmt: skip
    for entry in table["rows"]:
        none = entry.get("none_alone") or {"n": 0}
        if none["n"]:
            print(f"{entry['score']} solves {percent(none['value'])} % of the {none['n']} problems that no member solves alone")
    for t in table.get("tcc", []):
        means = [f"{t[x]:.2f} {x}" for x in ("correct", "incorrect") if t[x] is not None]
        print(f"C~(T) of member {t['member']} alone, mean over its answers: {', '.join(means)}")


# --- the paper's tables on the toy --------------------------------------------------------------------

TITLES = {
    "1": "token change count C(T) of correct and of incorrect answers",
    "2": "correction rate after a restart from another member's correct trajectory, %",
    "3": "main result, accuracy % / forwards",
    "5": "model change rate, % of relays whose leader differs from the relay before",
    "6": "ensemble interval n, accuracy %",
    "7": "accelerated decoding, accuracy % / forwards",  # a member's forwards: the mean over members
    "8": "normalisation of the token change count, accuracy %",
    "9": "source-only and cross-model scoring, accuracy %",
    "10": "final selection, accuracy %; the best model is the best on validation problems",
}
PAPER: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {  # columns; rows
    "1": (("correct", "incorrect"), {"LLaDA, MMLU": (1.81, 4.27), "Dream, MMLU": (2.32, 6.19),
                                     "LLaDA, GSM8K": (32.29, 51.48), "Dream, GSM8K": (40.88, 58.07)}),
    "2": (("first 33 %", "first 50 %"), {"LLaDA, MMLU": (56.43, 65.22), "Dream, MMLU": (68.84, 76.57),
                                         "LLaDA, GSM8K": (74.66, 72.60), "Dream, GSM8K": (78.63, 80.92)}),
    "8": (("without", "with"), {"GSM8K": (82.64, 83.47), "MATH500": (47.8, 48.6)}),
    "9": (("source-only", "cross-model"), {"top-1, GSM8K": (81.35, 82.71), "top-1, MATH500": (42.4, 47.0)}),
    "10": (("lowest C~", "best model", "most selected"), {"GSM8K": (83.47, 81.65, 83.17)}),
}  # fmt: skip
TCC, *LOGIT = METHODS[1:]
PLAIN = "post-generation plain count"
SHARES = {"first 33 %": round(0.33 * TOY_STEPS), "first 50 %": round(0.50 * TOY_STEPS),
          "all reasoning": train_toy.REASONING_LENGTH}  # Table 2: steps of the other's trajectory; the last is ours
INTERVALS = {2: 8, 4: 16, 8: 32}  # Table 6: n on the toy, T = 32, and in the paper, T = 256
SPEEDS: dict[str, dict] = {"one token a step": {}, "threshold 0.9": {"threshold": 0.9}, "top-k 2": {"top_k": 2}}


@dataclass(frozen=True)
class Toy:
    """What tables and figures are made from."""

    names: tuple[str, ...]
    best: int  # the member best on the validation problems of its training
    factors: dict[str, tuple[tuple[str, float], ...]]  # of a table: members and the factors on their logits in it
    records: dict[str, list[Record]]  # of each run


def toy_runs(job: ToyJob, factors: tuple[tuple[str, float], ...]) -> dict[str, ToyJob]:
    """Every run that the paper's tables and figures read, but for `restarts`."""
    alone = {"interval": TOY_STEPS}
    fields: dict[str, dict] = {PLAIN: alone | {"normalize": False}, "tie plain count": {"normalize": False}}
    fields |= {f"tie n={n}": {"interval": n} for n in INTERVALS}
    for name, speed in SPEEDS.items():
        fields |= {f"post-generation {name}": alone | speed, f"tie {name}": speed}
    fields |= {f"{name} source-only": {"score": name[4:], "cross_model": False} for name in LOGIT}
    runs = toy_methods(job) | {name: replace(job, config=replace(job.config, **own)) for name, own in fields.items()}
    for name in [f"{name}{scoring}" for name in LOGIT for scoring in ("", " source-only")]:
        runs[f"{name} overconfident"] = replace(runs[name], factors=factors)
    for member, score in itertools.product(job.names, tie.SCORES[1:]):  # Fig. 1: a relay to itself, scored, each step
        config = replace(job.config, score=score, interval=1)
        runs[f"member {member} {score}"] = replace(job, names=(member,), config=config)
    return runs


def restarts(job: ToyJob, alone: list[Record]) -> dict[str, ToyJob]:
    """Table 2: each member on what it failed alone and the other solved, from the start of the other's trajectory."""
    runs = {}
    for (r, receiver), (s, sender) in itertools.permutations(enumerate(job.names), 2):
        failed = [p for p, record in zip(job.problems, alone) if record["correct"][s] and not record["correct"][r]]
        for part, steps in SHARES.items():
            own = replace(job, names=(receiver,), problems=tuple(failed), restart=(sender, steps))
            runs[restart_name(receiver, part)] = own
    return runs


def restart_name(member: str, part: str) -> str:
    return f"member {member} restarted from {part.replace(' %', '')}"


def decode_once(args: argparse.Namespace, runs: dict[str, ToyJob], needed: Iterable[str]) -> dict[str, list[Record]]:
    """Records of the runs needed; a run shares those of the first in `runs` that equals it."""
    first: dict[ToyJob, str] = {}
    for name, job in runs.items():
        first.setdefault(job, name)
    own = {name: first[runs[name]] for name in needed}
    records = decode_toy(args, {name: runs[name] for name in dict.fromkeys(own.values())})
    return {name: records[own[name]] for name in own}


Grid = tuple[dict[str, dict[str, str]], dict[str, list]]


def grids(names: tuple[str, ...]) -> dict[str, Grid]:
    """The tables of accuracies. Rows and columns: the run of each cell, and after ": " which candidate, if not its
    winner. Claims: the differences that decide, each its name and two runs like a cell's; None for one half."""
    after, members = "post-generation", {f"member {name}": f": {name}" for name in names}
    restarted = {f"member {name}": {part: restart_name(name, part) for part in SHARES} for name in names}
    fast = {row: {speed: f"{after} {speed}{pick}" for speed in SPEEDS} for row, pick in {**members, after: ""}.items()}
    main = {row: {"accuracy": after + pick} for row, pick in members.items()} | {m: {"accuracy": m} for m in METHODS}
    rivals = (("the best member", ": best member"), ("post-generation", ""))
    scoring = {name + group: {"source-only": f"{name} source-only{group}", "cross-model": name + group}
               for group in ("", " overconfident") for name in LOGIT}  # fmt: skip
    return {
        "2": (restarted, {"Restarted from the first 50 %, a member corrects more than half of what it failed alone":
                          [(f"{row} - half", runs["first 50 %"], None) for row, runs in restarted.items()]}),
        "3": (main, {f"TIE is ahead of {rival} with every score":
                     [(f"{name} - {rival}", name, after + pick) for name in METHODS[1:]] for rival, pick in rivals}),
        "6": ({f"n = {n}, paper {m}": {"accuracy": f"tie n={n}"} for n, m in INTERVALS.items()} |
              {after: {"accuracy": after}},
              {"TIE is ahead of post-generation at every n": [(f"n = {n}", f"tie n={n}", after) for n in INTERVALS]}),
        "7": (fast | {TCC: {speed: f"tie {speed}" for speed in SPEEDS}},
              {f"TIE is ahead with {speed}": [(f"TIE - {rival}", f"tie {speed}", f"{after} {speed}{pick}")
                                              for rival, pick in rivals] for speed in SPEEDS}),
        "8": ({TCC: {"without": "tie plain count", "with": TCC}},
              {"Normalisation helps": [("with - without", TCC, "tie plain count")]}),
        "9": (scoring, {f"Cross-model scoring helps {row}":
                        [("cross-model - source-only", runs["cross-model"], runs["source-only"])]
                        for row, runs in scoring.items()}),
        "10": ({TCC: {"lowest C~": TCC, **{pick: f"{TCC}: {pick}" for pick in ("best model", "most selected")}}},
               {"The lowest C~ selects best": [(f"lowest C~ - {pick}", TCC, f"{TCC}: {pick}")
                                               for pick in ("best model", "most selected")]}),
        **own_grids(),
    }  # fmt: skip


def runs_of(number: str, names: tuple[str, ...]) -> list[str]:
    """The runs that a table reads."""
    if number in ("1", "5"):
        return [PLAIN] if number == "1" else list(METHODS[1:])
    rows, _ = grids(names)[number]  # a claim's runs are among the cells', or "post-generation"
    return [source.partition(": ")[0] for row in rows.values() for source in row.values()]


def answers_right(toy: Toy, source: str) -> list[bool]:
    """Of a run's candidates those that `source` names, or the winners."""
    run, _, pick = source.partition(": ")
    records = toy.records[run]
    fixed = {name: m for m, name in enumerate(toy.names)} | {"best model": toy.best, "first": 0, "second": 1}
    if pick == "oracle":
        return [any(r["correct"]) for r in records]
    if pick.startswith("vote"):
        return [vote(r, int(pick.split()[1])) for r in records]
    if pick == "best member":  # on the test problems themselves: the hardest rival
        fixed[pick] = max(range(len(records[0]["correct"])), key=lambda m: sum(r["correct"][m] for r in records))
    if pick == "most selected":
        return [r["correct"][most_selected(r)] for r in records]
    return [r["correct"][fixed.get(pick, r["winner"])] for r in records]


def most_selected(record: Record) -> int:
    """The member that led most often; with equal numbers the one of lowest C~, as in `tie.select`."""
    leads = [record["leaders"].count(m) for m in range(len(record["correct"]))]
    return leads.index(max(leads)) if leads.count(max(leads)) == 1 else record["winner"]


def candidates_used(pick: str, members: int) -> float:
    """The part of a run's forwards that the pick needs."""
    if pick.startswith("vote"):
        return int(pick.split()[1]) / members
    return 1 if pick in ("", "oracle", "most selected") else 1 / members


def share(row: str, column: str, right: Sequence[bool]) -> dict:
    merit = accuracy(right) if right else {"accuracy": None, "ci95": None}
    return {"row": row, "column": column, "value": merit["accuracy"], "ci95": merit["ci95"], "n": len(right)}


def grid_table(number: str, toy: Toy) -> tuple[list[dict], dict[str, list[dict]]]:
    """Cells, and what decides each claim, of a table of accuracies."""
    rows, claims = grids(toy.names)[number]
    cells = []
    for row, sources in rows.items():
        for column, source in sources.items():
            run, _, pick = source.partition(": ")
            forwards = [r["forwards"] * candidates_used(pick, len(r["correct"])) for r in toy.records[run]]
            cell = share(row, column, answers_right(toy, source))
            cells.append({**cell, "forwards": float(np.mean(forwards)) if forwards else None})
    return cells, {claim: [compared(toy, *pair) for pair in pairs] for claim, pairs in claims.items()}


def compared(toy: Toy, name: str, source: str, reference: str | None) -> dict:
    right = answers_right(toy, source)
    if reference is not None:
        return paired(name, right, answers_right(toy, reference))
    rate = share("", "", right)
    return {"name": name, "difference": rate["value"] - 0.5 if right else None,
            "ci95": [x - 0.5 for x in rate["ci95"]] if right else None}  # fmt: skip


def estimate(statistic: Callable, *groups: np.ndarray) -> dict:
    """A statistic of independent groups with its 95 % bootstrap interval over their rows; None if a group is empty."""
    if not all(len(group) for group in groups):
        return {"value": None, "ci95": None}
    dice = np.random.default_rng(0)
    draws = [statistic(*(group[dice.integers(len(group), size=len(group))] for group in groups)) for _ in range(2000)]
    return {"value": float(statistic(*groups)), "ci95": [float(x) for x in np.percentile(draws, [2.5, 97.5])]}


def table_1(toy: Toy) -> tuple[list[dict], dict[str, list[dict]]]:
    cells, gaps = [], []
    for m, name in enumerate(toy.names):
        counts = {label: np.array([r["tcc"][m] for r in toy.records[PLAIN] if r["correct"][m] == right])
                  for label, right in (("correct", True), ("incorrect", False))}  # fmt: skip
        for label, own in counts.items():
            cells.append({"row": f"member {name}", "column": label, **estimate(np.mean, own), "n": len(own)})
        gap = estimate(lambda right, wrong: wrong.mean() - right.mean(), *counts.values())
        gaps.append({"name": f"member {name}, incorrect - correct", "difference": gap["value"], "ci95": gap["ci95"]})
    return cells, {"The answer tokens change more often where the answer is incorrect": gaps}


def table_5(toy: Toy) -> tuple[list[dict], dict[str, list[dict]]]:
    """Intervals by bootstrap over problems, since the relays of one problem are not independent."""
    cells = []
    for name in METHODS[1:]:
        pairs = [list(zip(r["leaders"], r["leaders"][1:])) for r in toy.records[name]]
        counts = np.array([(sum(a != b for a, b in own), len(own)) for own in pairs if own])  # (problems, 2)
        rate = estimate(lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), counts)
        cells.append({"row": name, "column": "change rate", **rate, "n": sum(map(len, pairs))})
    rates = [{"name": cell["row"], "difference": cell["value"], "ci95": cell["ci95"]} for cell in cells]
    return cells, {"The lead changes between relays with every score": rates}


def verdict(comparisons: list[dict]) -> str:
    """On the claim that every difference is positive: undecided where an interval holds 0, and none lies below."""
    intervals = [comparison["ci95"] for comparison in comparisons]
    if any(ci and ci[1] < 0 for ci in intervals):
        return "does not hold"
    return "holds" if all(ci and ci[0] > 0 for ci in intervals) else "undecided"


def paper_table(number: str, toy: Toy) -> dict:
    """A table as `--json` has it: shares are fractions, the paper's figures as it prints them."""
    cells, claims = {"1": table_1, "5": table_5}.get(number, functools.partial(grid_table, number))(toy)
    gsm8k = zip(("LLaDA, GSM8K", "Dream, GSM8K", *METHODS), ((x,) for x in BENCHMARKS["gsm8k"].table_3))
    columns, rows = PAPER.get(number, (("accuracy",), dict(gsm8k) if number == "3" else {}))
    paper = [{"row": f"paper, {row}", "column": column, "value": figure}
             for row, figures in rows.items() for column, figure in zip(columns, figures)]  # fmt: skip
    judged = [{"claim": claim, "verdict": verdict(own), "comparisons": own} for claim, own in claims.items()]
    factors = dict(toy.factors.get(number, ()))
    return {"title": (TITLES | OWN_TITLES)[number], "factors": factors, "cells": cells, "paper": paper, "claims": judged}


def over_seeds(tables: list[dict]) -> dict:
    """Mean and standard deviation over training seeds in place of each value, a count in place of each verdict."""

    def spread(key: str, own: Sequence[dict]) -> dict:
        values = [entry[key] for entry in own if entry.get(key) is not None]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {key: float(np.mean(values)) if values else None, "sd": sd, "values": [entry.get(key) for entry in own]}

    cells = [{"row": own[0]["row"], "column": own[0]["column"], "forwards": spread("forwards", own)["forwards"],
              **spread("value", own)}
             for own in zip(*(table["cells"] for table in tables))]  # fmt: skip
    claims = []
    for own in zip(*(table["claims"] for table in tables)):
        each = [claim["verdict"] for claim in own]
        counted = ", ".join(f"{word} with {each.count(word)} of {len(each)} seeds" for word in dict.fromkeys(each))
        differences = [{"name": c[0]["name"], **spread("difference", c)} for c in zip(*(x["comparisons"] for x in own))]
        claims.append({"claim": own[0]["claim"], "verdict": counted, "comparisons": differences})
    factors = {name: [table["factors"].get(name) for table in tables] for table in tables for name in table["factors"]}
    return {**tables[0], "factors": factors, "cells": cells, "claims": claims}


def figure_text(entry: dict, value: float | None, unit: str, signed: bool = False) -> str:
    """A value with its interval or its standard deviation over seeds."""
    if value is None:
        return "no sample"
    form = functools.partial(percent, signed=signed) if unit == "%" else ("{:+.2f}" if signed else "{:.2f}").format
    interval = f" [{', '.join(map(form, entry['ci95']))}]" if entry.get("ci95") else ""
    return form(value) + interval + (f" ± {form(entry['sd']).lstrip('+')}" if entry.get("sd") is not None else "")


def show_paper_table(number: str, table: dict, problems: int) -> None:
    """Rows and columns as in the paper, its own figures below ours; then what our figures say of its finding."""
    print(f"\n{f'Table {number}' if number in TITLES else 'Beyond the paper'}: {table['title']}")
    for name, factors in table["factors"].items():
        each = factors if isinstance(factors, list) else [factors]
        print(f"(logits of {name} times {', '.join('-' if factor is None else f'{factor:.3g}' for factor in each)})")
    unit = "%" if "%" in table["title"] else ""
    grid: dict[str, dict[str, str]] = {}
    for cell in table["cells"]:
        text = figure_text(cell, cell["value"], unit)
        text += f" / {cell['forwards']:.1f}" if "forwards" in table["title"] else ""
        text += f" n={cell['n']}" if cell.get("n", problems) != problems else ""
        grid.setdefault(cell["row"], {})[cell["column"]] = text
    for cell in table["paper"]:
        grid.setdefault(cell["row"], {})[cell["column"]] = f"{cell['value']:g}"
    columns = list(dict.fromkeys(cell["column"] for cell in table["cells"]))
    lines = [["", *columns], *([row, *(texts.get(column, "") for column in columns)] for row, texts in grid.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for claim in table["claims"]:
        differences = [f"{c['name']}: {figure_text(c, c['difference'], unit, True)}" for c in claim["comparisons"]]
        text = f"{claim['claim']}: {claim['verdict']} ({'; '.join(differences)})"
        print(textwrap.fill(text, 120, subsequent_indent="    "))


# --- questions beyond the paper ---------------------------------------------------------------------------

OWN_TITLES = {
    "members": "one to four members, their rare facts disjoint, accuracy % / forwards",
    "cost": "equal cost, TIE against votes over samples of one member, accuracy % / forwards",
    "unequal": "a member far weaker than the other; logit scores also calibrated, accuracy %",
}
SIZES = range(1, 5)  # M
AFTER = {m: METHODS[0] if m == 2 else f"{METHODS[0]} M={m}" for m in SIZES}
TIED = {m: TCC if m == 2 else f"tie M={m}" for m in SIZES}
TEMPERATURE = 0.25  # of the samples; the best of 0.25, 0.5, 1 on validation problems


def own_grids() -> dict[str, Grid]:
    """As `grids`."""
    voted = {m: f"samples: vote {m}" for m in SIZES[1:]}
    rival = "unequal post-generation: first"
    unequal = {"the better member": {"as trained": rival}, "the weaker one": {"as trained": rival[:-5] + "second"}}
    unequal |= {name: {"as trained": f"unequal {name}"} for name in METHODS}
    for name in LOGIT:
        unequal[name]["calibrated"] = f"unequal {name} calibrated"
    return {
        "members": ({f"M = {m}": {"best member": f"{AFTER[m]}: best member", "oracle": f"{AFTER[m]}: oracle",
                                  "post-generation": AFTER[m], "TIE": TIED[m]} for m in SIZES},
                    {"TIE gains with every further member":
                     [(f"M = {m + 1} - M = {m}", TIED[m + 1], TIED[m]) for m in SIZES[:-1]],
                     "TIE is ahead of post-generation": [(f"M = {m}", TIED[m], AFTER[m]) for m in SIZES[1:]]}),
        "cost": ({"best member, greedy": {"accuracy": "post-generation: best model"},
                  "best member, trained twice as long": {"accuracy": "trained longer"},
                  "one member, training and forwards of both": {"accuracy": "union: vote 2"},
                  **{f"best member, vote of {m} samples": {"accuracy": voted[m]} for m in voted},
                  **{f"TIE of {m} members": {"accuracy": TIED[m]} for m in voted}},
                 {"TIE is ahead of as many samples of its best member":
                  [(f"M = {m}", TIED[m], voted[m]) for m in voted],
                  "TIE of two is ahead of the best member trained twice as long":
                  [("TIE - best member", TCC, "trained longer")],
                  "TIE of two is ahead of one member with the training and the forwards of both":
                  [("TIE - one member", TCC, "union: vote 2")]}),
        "unequal": (unequal, {"TIE is ahead of the better member": [(name, f"unequal {name}", rival)
                                                                    for name in METHODS[1:]],
                              "Calibration helps": [(name, f"unequal {name} calibrated", f"unequal {name}")
                                                    for name in LOGIT]}),
    }  # fmt: skip


def own_plan(tables: Sequence[str], settings: train_toy.Settings, best: str, other: str) -> train_toy.Plan:
    """The members that these tables need beside A and B."""
    plan: train_toy.Plan = {}
    if {"members", "cost"} & set(tables):
        plan |= train_toy.plan_members(settings, max(SIZES))
    if "cost" in tables:
        plan[f"{best}-long"] = (replace(settings, steps=2 * settings.steps), best)
        plan["union"] = (replace(settings, steps=2 * settings.steps), best + other)
    if "unequal" in tables:
        plan[f"{other}-weak"] = (replace(settings, gaps=min(2 * settings.gaps, train_toy.GAPS)), other)
    return plan


def own_runs(job: ToyJob, best: str, other: str, calibration: tuple[tuple[str, float], ...]) -> dict[str, ToyJob]:
    """Every run that the tables beyond the paper read, beside those of `toy_runs`."""
    alone, runs = replace(job.config, interval=TOY_STEPS), {}
    for m in (1, 3, 4):
        runs[TIED[m]] = replace(job, names=tuple(train_toy.NAMES[:m]))
        runs[AFTER[m]] = replace(runs[TIED[m]], config=alone)
    runs["samples"] = replace(job, names=(best,) * max(SIZES), config=alone, temperature=TEMPERATURE)
    runs["trained longer"] = replace(job, names=(f"{best}-long",), config=alone)
    runs["union"] = replace(runs["samples"], names=("union",) * 2)
    unequal = replace(job, names=(best, f"{other}-weak"))
    runs |= {f"unequal {name}": own for name, own in toy_methods(unequal).items()}
    for name in LOGIT:
        runs[f"unequal {name} calibrated"] = replace(runs[f"unequal {name}"], factors=calibration)
    return runs


def vote(record: Record, count: int) -> bool:
    """Is the most frequent of the first `count` answers right? Of equally frequent ones the answer of lowest C~."""
    answers = record["answers"][:count]
    most = max(map(answers.count, answers))
    leading = [m for m, answer in enumerate(answers) if answers.count(answer) == most]
    return record["correct"][min(leading, key=lambda m: record["tcc"][m])]


def calibrated(job: ToyJob, name: str) -> tuple[str, float]:
    """The factor on a member's logits, an inverse temperature, under which the right answers of validation problems
    are likeliest, token by token, over the states of its own decoding."""
    problems = train_toy.problems("validation", 200)
    member, canvas = toy_member(job, name), train_toy.canvas([p.prompt for p in problems])
    right = torch.tensor([p.sequence for p in problems])[:, canvas.answer]  # (B, A)
    positions = torch.arange(canvas.answer.start, canvas.answer.stop).expand_as(right)  # (B, A)
    states: list[dict] = []
    tie.ensemble([member], [canvas], replace(job.config, interval=2), states.append)
    logits, gold = [], []
    for state in states:
        tokens, masked = state["tokens"][0], state["masked"][0]  # (B, L)
        open_ = masked[:, canvas.answer]  # (B, A)
        with torch.no_grad():
            read = member.denoise(tokens.masked_fill(masked, member.mask_id), positions, None)  # (B, A, V)
        logits.append(read[open_])
        gold.append(right[open_])
    said, meant = torch.cat(logits), torch.cat(gold)  # (N, V), (N,)
    factors = torch.logspace(-1, 1, 81)
    return name, float(min(factors, key=lambda factor: torch.nn.functional.cross_entropy(factor * said, meant)))


# --- the paper's figures on the toy ---------------------------------------------------------------------


def draw_figure_1(toy: Toy, path: Path) -> None:
    """The three confidences of each member alone after every step, correct and incorrect answers apart."""
    from matplotlib.figure import Figure  # outside pyplot, drawn by Agg

    figure = Figure(figsize=(4.2 * len(toy.names), 8.4), layout="constrained")
    panels = figure.subplots(3, len(toy.names), sharex=True, sharey="row", squeeze=False)
    labels = ("mean top-1 probability", "mean entropy (nats)", "mean probability margin")
    for (i, score), (m, name) in itertools.product(enumerate(tie.SCORES[1:]), enumerate(toy.names)):
        panel, records, sizes = panels[i][m], toy.records[f"member {name} {score}"], []
        for label, right, colour, style in (("correct", True, "C0", "-"), ("incorrect", False, "C3", "--")):
            own = np.array([r["scores"] for r in records if won(r) == right], dtype=float)  # (problems, T - 1, 1)
            sizes.append(f"{len(own)} {label}")
            if len(own):
                draw_mean(panel, -own[..., 0] if score == "negative_entropy" else own[..., 0], colour, style, label)
        panel.set(ylabel=labels[i] if m == 0 else "", xlabel="decoding step" if i == 2 else "",
                  title=f"member {name} alone: {', '.join(sizes)}" if i == 0 else "")  # fmt: skip
        if panel.lines:
            panel.legend()
    figure.suptitle("Confidence over the masked answer positions; mean and 95 % band")
    figure.savefig(path, dpi=150)


def draw_mean(panel: Any, values: np.ndarray, colour: str, style: str, label: str) -> None:
    """The mean of curves (problems, steps) with its 95 % band; NaN where a problem has no answer token left."""
    curves = np.ma.masked_invalid(values)
    mean, half = curves.mean(0), 1.96 * curves.std(0) / np.sqrt(np.maximum(curves.count(0), 1))
    steps = np.arange(1, len(mean) + 1)
    panel.plot(steps, mean, color=colour, linestyle=style, label=label)
    panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)


def draw_figure_3(toy: Toy, path: Path, interval: int) -> None:
    """When the leader changes: of the relays at each place, those whose leader differs from the relay before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for k, (name, style) in enumerate(zip(METHODS[1:], ("o-", "s--", "^-.", "D:"))):
        leaders = [r["leaders"] for r in toy.records[name]]
        places = range(1, max(map(len, leaders)))
        rates = [accuracy(own[i] != own[i - 1] for own in leaders if len(own) > i) for i in places]
        values = np.array([100 * rate["accuracy"] for rate in rates])  # (places,)
        bars = np.abs(100 * np.array([rate["ci95"] for rate in rates]).reshape(-1, 2).T - values)  # (2, places)
        steps = [interval * (i + 1) / TOY_STEPS + 0.012 * (k - 1.5) for i in places]  # apart, so that bars can be told
        panel.errorbar(steps, values, bars, fmt=style, capsize=3, label=name[4:].replace("_", " "))
    panel.set(xlabel="relative decoding step", ylabel="relays that change the leader (%)", xlim=(0, 1))
    panel.set_ylim(bottom=-1)
    panel.set_title(f"{len(toy.records[TCC])} problems, n = {interval}, T = {TOY_STEPS}; bars: 95 % intervals")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


FIGURES = ("figure1.png", "figure3.png")


def prepare_figures(folder: Path) -> None:
    """ValueError, before anything is trained, where no figure can be drawn or saved."""
    try:
        import matplotlib  # noqa: F401

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figure.part").touch()
        (folder / "figure.part").unlink()
    except ImportError:
        raise ValueError("--figure needs matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise ValueError(f"cannot use --figure {folder}: {error.strerror}; give a folder that can be written") from None


# --- the trace ----------------------------------------------------------------------------------------


def show_trace(job: ToyJob) -> None:
    """Decodings round by round: each member's canvas, `_` where masked, its score, who leads, what is relayed."""
    setup, names, config = toy_setup(job), job.names, job.config
    for problem in job.problems:
        print(f"\n{problem.prompt}   right: {train_toy.readable(problem.sequence)}")
        result = tie.ensemble(setup.members, setup.canvases([problem]), config, lambda state: show_round(state, names))
        winner = int(result.winner[0])
        canvas = result.candidates[winner]
        answer = setup.text(winner, canvas.tokens[0, canvas.answer].tolist())
        verdict = "right" if answer == problem.answer else f"wrong, {problem.answer} is right"
        tcc = ", ".join(f"{name} {x:.3f}" for name, x in zip(names, result.tcc[:, 0].tolist()))
        print(f"answer {answer} of {names[winner]}: {verdict}   (C~ over the whole decoding: {tcc})")


def show_round(state: dict, names: Sequence[str]) -> None:
    """The first row of what `tie.ensemble` tells its `on_round`."""
    print(f"round {state['round'] + 1}, step {state['step']}")
    for m, name in enumerate(names):
        ids = torch.where(state["masked"][m][0], train_toy.MASK, state["tokens"][m][0])  # (L,)
        score, leads = float(state["scores"][m, 0]) + 0.0, int(state["leader"][0]) == m  # -0.0 reads as 0
        said = f" {score:8.3f}" if math.isfinite(score) else ""
        print(f"  {name} {train_toy.readable(ids.tolist())}{said}{'  leads, relayed to all' if leads else ''}")


# --- real checkpoints on the paper's benchmarks -----------------------------------------------------


def real_members(folders: dict[str, Path], devices: list[str], dtype: str | None = None) -> list[tie.Member]:
    """LLaDA and Dream from local folders; all tokenizers are read and checked before the first weight is."""
    codecs: list[mdlm.TextCodec] = []
    for folder in folders.values():
        codec = mdlm.load_codec(folder)
        ids = (codec.vocabulary, codec.mask_id, codec.eos_id)
        alike = [c for c in codecs if (c.vocabulary, c.mask_id, c.eos_id) == ids]
        codecs.append([*alike, codec][0])  # equal vocabularies share a codec, and relay ids as they are
    return [tie.Member(mdlm.load(folder, device, DTYPES.get(dtype))[0], codec.mask_id, codec.eos_id, name, codec)
            for (name, folder), codec, device in zip(folders.items(), codecs, devices)]  # fmt: skip


def real_setup(members: list[tie.Member], task: str, run_code: bool) -> Setup:
    """Each member gets the question in its own chat template and vocabulary, and the task's lengths."""
    benchmark = BENCHMARKS[task]

    def canvas(member: Any, questions: list[Question]) -> tie.Canvas:
        codec, model = member.codec, member.denoise
        prompts, suffix = [codec.encode_prompt(q.prompt) for q in questions], codec.encode(benchmark.suffix)
        reasoning_length = benchmark.length - len(suffix) - benchmark.answer_length
        ids = {"mask_id": codec.mask_id, "pad_id": codec.pad_id, "device": model.embed.weight.device}
        return tie.Canvas.blank(prompts, suffix, reasoning_length, benchmark.answer_length, **ids)

    def text(m: int, ids: list[int]) -> str:
        codec: Any = members[m].codec
        return codec.decode([*itertools.takewhile(lambda i: i not in members[m].eos_ids, ids)]).decode(errors="replace")

    return Setup(
        members,
        canvases=lambda questions: [canvas(member, questions) for member in members],
        text=text,
        grade=lambda question, answer: grade(task, question, answer, run_code),
    )


def check_lengths(members: list[Any], task: str, questions: list[Question]) -> None:
    """ValueError, before anything is decoded, for a question that a member has no positions for."""
    for member, question in itertools.product(members, questions):
        length = len(member.codec.encode_prompt(question.prompt)) + BENCHMARKS[task].length
        if length > (most := member.denoise.config.max_length):
            raise ValueError(f"question {question.id} with its answer takes {length} tokens, over {most} of {member}: "
                             "leave it out of --data")  # fmt: skip


def decode_share(setup: Setup, config: tie.Config, questions: list[Question], file: Records, batch_size: int) -> None:
    """Decode the questions that have no record yet, in batches that are the same after an interruption."""
    done = [q for q in questions if q.id in file.done]
    with tqdm(total=len(questions), initial=len(done), unit="question", disable=None) as bar:
        for i in range(0, len(questions), batch_size):
            batch = questions[i : i + batch_size]
            if new := [q for q in batch if q.id not in file.done]:
                file.add(decode_questions(setup, config, batch))
                bar.update(len(new))
            right = [won(file.done[q.id]) for q in questions if q.id in file.done]
            bar.set_postfix(accuracy=percent(sum(right) / len(right)))


def run_real(args: argparse.Namespace) -> None:
    """One benchmark with the members given: one method, or with --single each member alone. Processes that torchrun
    starts share the questions, a file each; the last one to finish finds all records, and writes the summary."""
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    if args.task is None or args.data is None:
        raise ValueError("--members needs --task and --data: the benchmark, and its owner's file")
    if world > 1 and args.out is None:
        raise ValueError("several processes need --out: a folder where their records meet")
    benchmark, questions = BENCHMARKS[args.task], read_questions(args.task, args.data)[: args.limit]
    grade(args.task, questions[0], "", args.run_code)  # is code to run, and may it, and can it?
    config = config_of(args, benchmark.interval(args.score), 16, benchmark.answer_window)
    if len(args.members) < 2 and not args.single:
        raise ValueError("one member is no ensemble: give --members two names or more, or add --single")
    effective = {"task": args.task, "members": {name: str(path) for name, path in args.members.items()},
                 "data": str(args.data), "questions": len(questions), "single": args.single,
                 "batch_size": args.batch_size, "dtype": args.dtype, "config": asdict(config)}  # fmt: skip
    open_results(args.out, effective)
    members = real_members(args.members, devices(args, local), args.dtype)
    check_lengths(members, args.task, questions)
    label = "post-generation" if config.interval >= benchmark.length else f"tie {config.score}"
    runs = {f"member {m.name}": [m] for m in members} if args.single else {label: members}
    records = {}
    for name, group in runs.items():
        file = Records(args.out, name, rank)
        decode_share(real_setup(group, args.task, args.run_code), config, questions[rank::world], file, args.batch_size)
        everything = file.of_all_ranks()
        if len(everything) < len(questions):
            return  # another process is still at work
        records[name] = [everything[q.id] for q in questions]
    finish(args, effective, real_table(records, list(args.members), benchmark))


def devices(args: argparse.Namespace, local: int) -> list[str]:
    """A device a member: as given, for all or for each, or GPU `local` of the host, or the CPU."""
    default = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    given = args.device or [default]
    if len(given) not in (1, len(args.members)):
        raise ValueError(f"--device has {len(given)} values for {len(args.members)} members: give one, or one each")
    for device in given:
        try:
            torch.zeros(1, device=device).item()  # "meta" holds no value
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return given * len(args.members) if len(given) == 1 else given


def real_table(records: dict[str, list[Record]], names: list[str], benchmark: Benchmark) -> dict:
    """Rows as in the main table, the paper's figure for the same setting beside ours where it has one."""
    if "post-generation" in records:
        table = main_table(records, names)
    else:
        table = {"rows": [row(name, [won(r) for r in own], own) for name, own in records.items()], "comparisons": []}
    for entry in table["rows"]:
        label = " ".join(filter(None, (entry["method"], entry["score"])))
        entry["paper"] = paper_figure(label, names, benchmark)
    return table


def paper_figure(label: str, names: list[str], benchmark: Benchmark) -> float | None:
    """The paper's accuracy in % for a row, if it has one: Table 4 where a member is called a coder, else Table 3."""
    coders = any("coder" in name.lower() for name in names)
    figures = zip(TABLE_4, benchmark.table_4) if coders else zip(TABLE_3, benchmark.table_3)
    return next((figure for column, figure in figures if column.lower() in label.lower()), None)


# --- answers: what the decoded answer region says, and whether it is right -------------------------------


def _power(base, exponent):
    """Bounded in size, so that 9^9^9^9 overflows instead of hanging."""
    exact = isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
    if exact and abs(exponent) * (base.numerator.bit_length() + base.denominator.bit_length()) <= 4096:
        return base ** int(exponent)
    return complex(base) ** complex(exponent)


_OPERATORS: dict[str, tuple[int, Callable]] = {
    "\\cup": (0, lambda a, b: ("union", [a, b])), "=": (0, lambda a, b: ("equation", [(a - b) ** 2])), "^": (4, _power),
    "+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv)}
_FUNCTIONS: dict[str, Callable] = {name: getattr(cmath, name) for name in ("sin", "cos", "tan", "exp", "sqrt")} | {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z)}
_CONSTANTS = {"\\pi": math.pi, "\\infty": math.inf, "i": 1j, "e": math.e}
_POINTS = [{letter: dice.uniform(-3, 3) for letter in string.ascii_letters} | _CONSTANTS
           for dice in map(random.Random, range(3))]  # values of the letters where two answers are compared
_CLOSING = {"(": ")]", "[": ")]", "{": "}", "\\{": "\\}"}


def _prefix(tokens: list[str], values: dict):
    """One operand: number, letter, sign, function, fraction, or a bracket, which may hold several values."""
    token = tokens.pop()
    if token in ("+", "-"):
        return _climb(tokens, values, 3) * (1 if token == "+" else -1)
    if token in _CLOSING:
        items = _items(tokens, values)
        if (closing := tokens.pop()) not in _CLOSING[token]:
            raise ValueError("brackets do not match")
        return items[0] if len(items) == 1 else (token + closing, items)
    if token == "\\frac":
        return _prefix(tokens, values) / _prefix(tokens, values)
    if token[1:] in _FUNCTIONS:
        return _FUNCTIONS[token[1:]](_climb(tokens, values, 3))
    return Fraction(token) if token[0] in "0123456789." else values[token]


def _climb(tokens: list[str], values: dict, least: int = 0):
    """Precedence climbing over reversed tokens; juxtaposition multiplies, though never two numbers."""
    value = _prefix(tokens, values)
    while tokens:
        level, apply = _OPERATORS.get(tokens[-1], (2, operator.mul))
        if level < least or tokens[-1] not in _OPERATORS and not re.match(r"[A-Za-z(\[{]|\\[A-Za-z]", tokens[-1]):
            break
        if tokens[-1] in _OPERATORS:
            tokens.pop()
        value = apply(value, _climb(tokens, values, level + (apply is not _power)))
    return value


def _items(tokens: list[str], values: dict) -> list:
    items = [_climb(tokens, values)]
    while tokens and tokens[-1] == ",":
        tokens.pop()
        items.append(_climb(tokens, values))
    return items


def evaluate(text: str, values: dict[str, complex]) -> list:
    """Values of comma-separated arithmetic in plain form or LaTeX, `values` giving the letters theirs.

    A value is a Fraction while only + - * / and small powers occur, else complex; a tuple, interval, matrix, union or
    equation is a pair (kind, values). Raises ValueError, and nothing else, for what cannot be read or has no value.
    """
    try:
        tokens = re.findall(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[A-Za-z]+|\\\S|\S", text[:300].replace("**", "^"))[::-1]
        items = _items(tokens, values)
        if tokens or len(text) > 300:
            raise ValueError("more follows")
        return items
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"no value: {text[:80]!r} ({error})") from error


_BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # with braces inside, three deep
_NAMES = "|".join([*_FUNCTIONS, "infty", "pi", "cup"])
_UNIT = r"(?:\s+[A-Za-z]{3,}|\s*(?:cm|mm|km|ft|in|kg))\b\.?(?:\s*\^\s*\{?\d\}?)?"
_REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r",\s*\\!\s*", ""), (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),     # 10,\!080; \text{east}
    (r"(?<!\\)\\(?:left|right|displaystyle|quad|degree|[Bb]ig)(?![a-z])|(?<!\\)\\[,;:!% ]", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\?\$|[~%°]", " "), (r"\\[dtc]frac", r"\\frac"), (r"[−–]", "-"), (r"π", r"\\pi "),
    (r"\\(?:cdot|times)(?![a-z])|[×·⋅]", "*"), (r"\\div(?![a-z])|÷", "/"), (r"√", r"\\sqrt "), (r"±|\+/-", r"\\pm "),
    (r"∞|(?<![\\A-Za-z])infinity", r"\\infty "), (r"∪|(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"\b(?:and|or)\b", ","),
    (rf"(?<![\\A-Za-z])({_NAMES})(?=[\d\W]|$)", r"\\\1"), (rf"(?:(?<=[\d)}}])|(?<=\\pi))(?:{_UNIT})+", ""),  # 5 cm^2
    (r"(?:^|(?<=,))\s*[A-Za-z]\s*(?:=|∈|\\?in\b)", ""), (r"_\{(\w+)\}", r"_\1"),                # x = 5; 52_{8}
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (rf"(\\frac\s*{_BRACES})\s*(\d)", r"\1{\3}"),            # \frac43
    (r"(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)"),                                 # 1\frac{4}{5}
    (r"(?<![\d.])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"), (r"\.?\s*$", ""),                        # 1 4/5
    (r"\\begin\{[bp]matrix\}", "[["), (r"\\end\{[bp]matrix\}", "]]"), (r"&", ","), (r"\\\\", "],[")]]


def _clean(text: str) -> str:
    """One spelling for what LaTeX and plain text spell in many ways; units, currency and a leading `x =` go."""
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = " ".join(text.split()).removeprefix("\\{").removesuffix("\\}").strip()  # a set is a list
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _same(a, b) -> bool:
    """Exact for rational numbers, else to 9 digits; in unions the order does not count."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        pairs_up = _same_set if a[0] == "union" else lambda ours, theirs: all(map(_same, ours, theirs))
        return a[0] == b[0] and len(a[1]) == len(b[1]) and pairs_up(a[1], b[1])
    if isinstance(a, tuple) or isinstance(b, tuple):
        return False
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return a == b if exact else cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _same_set(ours: list, theirs: list) -> bool:
    return all(any(_same(a, b) for b in theirs) for a in ours) and all(any(_same(a, b) for a in ours) for b in theirs)


def math_equal(answer: str, gold: str) -> bool:
    """Whether two plain or LaTeX answers mean the same value, tuple, interval, matrix, or list in any order."""
    if not 0 < len(answer) <= 1000:
        return False
    answer, gold = _clean(answer), _clean(gold)
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    if re.fullmatch(r"\(?([A-Za-z]|[A-Za-z]{3,})\)?", gold):  # a word, a name, the letter of a choice
        return answer.strip("()").casefold() == gold.strip("()").casefold()
    try:
        return all(_same_set(*([value for sign in "+-" for value in evaluate(text.replace("\\pm", sign), point)]
                               for text in (answer, gold))) for point in _POINTS)
    except (ValueError, OverflowError):
        return False


def countdown_correct(answer: str, gold: dict) -> bool:
    """One side of the answer is an expression in + - * / with each number exactly once, and exactly the target."""
    for side in map(_clean, answer.split("=")):
        plain = not re.sub(r"\\frac|[0-9]|[-+*/(){} ]", "", side)
        plain = plain and not re.search(r"\*\*|[0-9)] *[({]|\) *[0-9]|[0-9] +[0-9]", side)  # no power, nothing joined
        with suppress(ValueError):
            if plain and sorted(map(int, re.findall("[0-9]+", side))) == sorted(gold["numbers"]):
                return evaluate(side, {}) == [gold["target"]]
    return False


def _bare(text: str) -> str:
    """The answer without its dressing: \\boxed{}, math delimiters, Markdown, "The answer is"."""
    boxed = re.search(r"\\boxed\s*" + _BRACES, text)
    text = re.sub(r"(?<!\\)\\[()\[\]]|\$\$|\*\*|`", " ", boxed[1] if boxed else text).strip()
    return re.sub(r"(?i)^(?:\W*\b(?:so|thus|the|final|correct|answer|option|choice|is)\b[\s:,]*)+", "", text).strip()


def extract_letter(text: str) -> str:
    """The first letter A to E that stands alone; "" if there is none."""
    text = re.sub(r"\\(?:text|mathbf|mathrm|textbf)\b", " ", _bare(text))
    found = re.fullmatch(r"\W*([a-e])\W*", text) or re.search(r"(?<![A-Za-z'’])([A-E])(?![A-Za-z'’])", text)
    return found[1].upper() if found else ""


def extract_number(text: str) -> str:
    """The first number of the first line that has one, after its last "=": "$1,250.00 a year." gives 1250.00."""
    line = next((line for line in _bare(text).splitlines() if re.search("[0-9]", line)), "").split("=")[-1]
    line = re.sub(r"(?<=[0-9]),(?:\\!)?\s?(?=[0-9]{3}(?![0-9]))|\\?\$", "", line.replace("−", "-"))
    found = re.search(r"-?\s?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", line)
    return found[0].replace(" ", "") if found else ""


def extract_math(text: str) -> str:
    """The first line with anything in it, or the first matrix, as it stands."""
    text = _bare(text)
    matrix = re.match(r"[^\n]*?\\begin\{(\w+)\}.*?\\end\{\1\}", text, re.DOTALL)
    return matrix[0] if matrix else text.split("\n")[0].strip()


def extract_code(text: str) -> str:
    """The code up to the closing fence; its indentation stays, since it may continue the prompt's function."""
    return re.sub(r"^\s*```(?:python|py)?[ \t]*\n", "", text).split("```")[0].strip("\n")


# --- sandbox: code runs only on request, in a process of its own -----------------------------------------


_NOBODY = 65534
# Reads the job from stdin, limits itself, gives up root, runs the sources in one namespace and writes the token last.
# The token is only on the interpreter's stack: no name and no frame leads to it.
_RUNNER = r"""
import functools, json, os, sys
def steps():
    import resource
    sources, token, pipe, seconds, memory, nobody = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    if os.getuid() == 0:  # no limit on processes binds root; and nobody may not walk to the library: hold it open
        packages = (getattr(module, "__path__", None) for module in sys.modules.values())
        for places in [sys.path, *(path for path in packages if isinstance(path, list))] * (sys.platform == "linux"):
            places[:] = [f"/proc/self/fd/{os.open(place, os.O_RDONLY)}" for place in places if os.path.isdir(place)]
        os.chown(".", nobody, nobody)
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    for name, most in dict(CPU=seconds, AS=memory, FSIZE=1 << 20, NPROC=0, NOFILE=64, CORE=0).items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        except (AttributeError, ValueError, OSError):
            pass  # a limit that this system does not have
    space, writing = {"__name__": "program"}, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    actions = [functools.partial(exec, compile(source, "<program>", "exec"), space) for source in sources]
    families = ("os", "socket", "subprocess", "shutil")
    harmless = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
    def guard(event, args):  # the program of a user has all the user's rights: no writing, killing, network
        if event == "open" and args[2] & writing or event.split(".")[0] in families and event not in harmless:
            raise PermissionError(event)
    sys.addaudithook(guard)
    return [*actions, functools.partial(os.write, pipe, token.encode())]
for action in steps():
    action()
"""


def run_code(*sources: str, timeout: float = 10.0, memory: int = 1 << 30) -> bool:
    """Whether the Python `sources`, run one after the other in one namespace, all run through to their ends.

    Isolated interpreter, fresh environment, temporary folder, no input, output discarded; limits on wall-clock and CPU
    time (seconds), memory (bytes), files and processes; Linux and macOS. Success is a random token written after the
    last source, so leaving early is failure. It contains accidents and casual mischief, not a determined attacker.
    """
    token, (reading, writing) = secrets.token_hex(16), os.pipe()
    os.set_blocking(reading, False)
    job = json.dumps([sources, token, writing, math.ceil(timeout), memory, _NOBODY]).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(reading, "rb", buffering=0) as result:
        with subprocess.Popen([sys.executable, "-I", "-B", "-c", _RUNNER], cwd=folder, stdin=subprocess.PIPE,
                              env={"OPENBLAS_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              pass_fds=(writing,), start_new_session=True) as process:
            os.close(writing)
            try:
                process.communicate(job, timeout)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with suppress(ProcessLookupError, PermissionError):  # whoever is left of the session
                    os.killpg(process.pid, signal.SIGKILL)
        return result.read(64) == token.encode()


@functools.lru_cache(maxsize=1)
def check_sandbox() -> None:
    if not run_code("import decimal", timeout=30):
        raise ValueError("--run-code starts no isolated Python here: use Linux or macOS, root able to become nobody")


def humaneval_correct(answer: str, gold: dict) -> bool:
    """The prompt's imports and helpers, the answer, the tests; an answer without the function continues the prompt."""
    name, head = gold["entry_point"], gold["prompt"][:gold["prompt"].index("def " + gold["entry_point"])]
    if not re.search(rf"^(?:async +)?def +{name}\b|^{name} *=", answer, re.MULTILINE):
        answer = gold["prompt"] + (answer if answer[:1].isspace() else textwrap.indent(answer, "    "))
    return run_code(head, answer, gold["test"], f"check({name})")


def mbpp_correct(answer: str, gold: dict) -> bool:
    return run_code(answer, *gold["test_imports"], *gold["test_list"])


# --- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its file, its settings (Sec. 5.1, App. A.4; lengths in tokens) and the paper's figures in %."""
    name: str                             # as in Table 3
    file: str                             # what the data must be, for error messages
    template: str
    extract: Callable[[str], str]         # decoded answer region up to EOS -> answer
    correct: Callable[[Any, Any], bool]   # (answer, gold)
    length: int                           # generation length: reasoning + suffix + answer
    answer_length: int                    # our decision, the paper is silent
    tcc_interval: int                     # n with token change count; the other scores have 16
    table_3: tuple[float, ...] = ()       # columns as in TABLE_3 and TABLE_4; empty where the paper has no such run
    table_4: tuple[float, ...] = ()
    suffix: str = "\nAnswer:"
    answer_window: int | None = None
    subset: Sequence[str] = ()            # subjects to keep; empty keeps all

    def interval(self, score: str) -> int:
        return self.tcc_interval if score == "token_change_count" else 16


# Our own words after simple-evals and, for Countdown, Wang et al. 2026; the two for code as App. A.3 prints them.
_LAST = ("Think step by step first, then give your final answer on a last line of the form 'Answer: {form}, "
         "and nothing after it.")
_CHOICE = f"Answer the multiple choice question below. {_LAST}\n\n{{question}}\n\n{{choices}}"
_MATHS = f"Solve the mathematics problem below. {_LAST}\n\n{{question}}"
_COUNTDOWN = ("Make an arithmetic expression with the value {target} from the numbers {numbers}. Use every number "
              f"exactly once; the operations are + - * / and brackets are allowed. {_LAST}")
_HUMANEVAL = ("Read the following function signature and docstring, and fully implement the function described. "
              "Return only the Python function, no explanation.\n\n{prompt}")
_MBPP = "{prompt} Your code should satisfy these tests:\n{tests}\nReturn only the Python function, no explanation."


def _choice(question: str, choices: list[str], right: int) -> tuple[dict, str]:
    letters = "ABCDE"[:len(choices)]
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices))
    form = f"LETTER', where LETTER is one of {', '.join(letters)}"
    return {"question": question.strip(), "choices": listed, "form": form}, letters[right]


def _parse(task: str, row: Any) -> tuple[dict, Any]:
    """(fields of the template, gold) of one row in the owners' layout."""
    if task in ("mmlu", "mmlu-star"):
        question, a, b, c, d, letter = row
        return _choice(question, [a, b, c, d], ("A", "B", "C", "D").index(letter))
    if task == "arc-challenge":  # 3 to 5 choices, labelled by letters or by numbers; the prompt has letters
        labels, texts = zip(*((choice["label"], choice["text"]) for choice in row["question"]["choices"]))
        return _choice(row["question"]["stem"], list(texts), labels.index(row["answerKey"]))
    if task == "winogrande":
        question = "Which choice belongs in the place of the _ in this sentence?\n" + row["sentence"]
        return _choice(question, [row["option1"], row["option2"]], ("1", "2").index(row["answer"]))
    if task == "gsm8k":
        gold = str(Fraction(row["answer"].split("####")[1].strip().replace(",", "")))
        return {"question": row["question"], "form": "NUMBER', where NUMBER is the number alone"}, gold
    if task == "math500":
        gold = _is(str, row["answer"])
        return {"question": row["problem"], "form": "ANSWER', where ANSWER is the value alone, in LaTeX"}, gold
    if task == "humaneval":
        row["prompt"].index("def " + row["entry_point"])  # ValueError if it is not there
        return {"prompt": row["prompt"]}, {key: _is(str, row[key]) for key in ("prompt", "entry_point", "test")}
    if task == "countdown":
        return _parse_countdown(row)
    tests = {key: [_is(str, line) for line in _is(list, row[key])] for key in ("test_imports", "test_list")}
    return {"prompt": row["prompt"], "tests": "\n".join(row["test_list"])}, tests


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _parse_countdown(row: dict) -> tuple[dict, dict]:
    """The paper's set {"nums", "target"}; Dream's input "15,44,79,50", target last; d1's input, target as output."""
    numbers = list(row["nums"]) if "nums" in row else row["input"].split(",")
    target = row["target"] if "nums" in row else row["output"] if row["output"].isdigit() else numbers.pop()
    gold: dict[str, Any] = {"numbers": [int(number) for number in numbers], "target": int(target)}
    form = "EXPRESSION', where EXPRESSION is the expression alone without an equals sign"
    return {"numbers": ", ".join(map(str, gold["numbers"])), "target": gold["target"], "form": form}, gold


MMLU_STAR = (  # App. A.1, the subjects on which both LLaDA and Dream are over 60 %
    "astronomy business_ethics clinical_knowledge college_biology college_medicine computer_security "
    "conceptual_physics elementary_mathematics high_school_biology high_school_computer_science "
    "high_school_european_history high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology high_school_us_history "
    "high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies "
    "management marketing medical_genetics miscellaneous nutrition philosophy prehistory public_relations "
    "security_studies sociology us_foreign_policy world_religions")

_general = functools.partial(Benchmark, template=_CHOICE, extract=extract_letter, correct=operator.eq, length=128,
                             answer_length=16, tcc_interval=32)
_maths = functools.partial(Benchmark, template=_MATHS, correct=math_equal, tcc_interval=16)
_code = functools.partial(Benchmark, extract=extract_code, length=512, answer_length=480, tcc_interval=32,
                          suffix="```python\n", answer_window=8)
_MMLU = "MMLU's test csv (question, four choices, letter), or a folder of them"

TABLE_3 = ("LLaDA", "Dream", "post-generation", "tie token_change_count", "tie top1_probability",
           "tie negative_entropy", "tie probability_margin")
TABLE_4 = ("DreamCoder", "DiffuCoder", "tie token_change_count", "tie top1_probability")
BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": _general("MMLU", _MMLU, table_3=(61.23, 67.46, 67.26, 67.55, 67.25, 67.53, 67.34)),
    "mmlu-star": _general("MMLU*", _MMLU, subset=MMLU_STAR.split(),
                          table_3=(71.45, 77.37, 77.92, 78.12, 77.69, 78.12, 77.61)),
    "arc-challenge": _general("ARC-C", "ARC-Challenge-Test.jsonl (question: stem and choices, answerKey)",
                              table_3=(85.15, 86.69, 88.57, 89.16, 88.82, 88.57, 88.74)),
    "winogrande": _general("WinoGrande", "WinoGrande's dev.jsonl (sentence, option1, option2, answer)",
                           table_3=(71.59, 72.22, 73.72, 72.85, 73.95, 71.90, 73.88)),
    "gsm8k": _maths("GSM8K", "GSM8K's test.jsonl (question, answer with ####)", extract=extract_number, length=256,
                    answer_length=16, table_3=(78.77, 78.39, 80.29, 83.47, 82.71, 83.62, 82.56)),
    "math500": _maths("MATH500", "MATH500's test.jsonl (problem, answer)", extract=extract_math, length=512,
                      answer_length=64, table_3=(37.4, 48.0, 43.0, 48.6, 47.0, 45.2, 48.4)),
    "humaneval": _code("HumanEval", "HumanEval.jsonl, gzipped or not", template=_HUMANEVAL, correct=humaneval_correct,
                       table_3=(45.73, 61.59, 55.49, 54.27, 57.32, 57.93, 57.32), table_4=(72.56, 70.12, 72.56, 72.56)),
    # The paper's figures are multiples of 1/427: it runs all of sanitized MBPP, not the test split alone.
    "mbpp": _code("MBPP", "sanitized-mbpp.json", template=_MBPP, correct=mbpp_correct,
                  table_3=(53.16, 63.23, 62.53, 64.17, 62.06, 62.76, 62.06), table_4=(75.88, 72.60, 76.11, 76.58)),
    "countdown": Benchmark("Countdown", "a Countdown jsonl (input and output, or nums and target)", template=_COUNTDOWN,
                           extract=extract_math, correct=countdown_correct, length=256, answer_length=32,
                           tcc_interval=32, table_3=(13.4, 16.4, 19.2, 18.8, 18.8, 19.4, 18.6))}


# --- reading and grading ---------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a csv, JSON or JSON lines file, gzipped or not."""
    place = str(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                yield place, row
        elif text.lstrip().startswith("["):
            yield from ((f"{path}, item {k}", row) for k, row in enumerate(json.loads(text), 1))
        else:
            for k, line in enumerate(text.split("\n"), 1):
                place = f"{path}, line {k}"
                if line.strip():
                    yield place, json.loads(line)
    except (OSError, EOFError, zlib.error, csv.Error, RecursionError, ValueError) as error:
        raise ValueError(f"{place}: cannot be read, fetch the file from its owners again ({error})") from error


def read_questions(task: str, path: str | Path) -> list[Question]:
    """The questions of a task (a key of BENCHMARKS) from the owners' file; ValueError names file, line and the mend."""
    if task not in BENCHMARKS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join(BENCHMARKS)}")
    benchmark, path, questions = BENCHMARKS[task], Path(path), dict[str, Question]()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        subject = re.sub(r"_(test|val|dev)$", "", file.stem)
        for k, (place, row) in enumerate(_rows(file)):
            try:
                fields, gold = _parse(task, row)
                key = next((row[key] for key in ("task_id", "unique_id", "id", "qID") if key in row), f"{subject}/{k}")
                if any(value == "" or not isinstance(value, (str, int)) for value in [*fields.values(), key]):
                    raise ValueError("an empty or wrong value")
                prompt = benchmark.template.format(**fields)
                prompt.encode()  # ValueError for half a character, which JSON can hold
            except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{place}: not a row for {task} ({error!r:.200}); give {benchmark.file}") from error
            if benchmark.subset and subject not in benchmark.subset:
                continue
            if str(key) in questions:
                raise ValueError(f"{place}: {key!r:.80} was there before; give every question once")
            questions[str(key)] = Question(str(key), prompt, gold)
    if not questions:
        raise ValueError(f"{path}: no question for {task}; give {benchmark.file}")
    return list(questions.values())


def grade(task: str, question: Question, text: str, run_code: bool = False) -> tuple[str, bool]:
    """(answer, whether it is right) from the decoded answer region up to EOS; code is run, and only where asked for."""
    benchmark = BENCHMARKS[task]
    if benchmark.extract is extract_code and not run_code:
        raise ValueError(f"grading {task} runs the model's code: pass --run-code to allow it")
    if run_code:
        check_sandbox()
    answer = benchmark.extract(text)
    return answer, benchmark.correct(answer, question.gold)


# --- command line ---------------------------------------------------------------------------------------


def toy_folder(args: argparse.Namespace) -> Path:
    return args.checkpoints / f"toy-seed{args.seed}"


def config_of(args: argparse.Namespace, interval: int, block_size: int, answer_window: int | None = None) -> tie.Config:
    """The algorithm's settings: as given, else the defaults of the task."""
    return tie.Config(
        interval=interval if args.interval is None else args.interval, score=args.score, top_k=args.top_k,
        block_size=block_size if args.block_size is None else args.block_size, threshold=args.threshold,
        selection=args.selection, answer_window=answer_window,
    )  # fmt: skip


def per_seed(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments for each training seed, with a folder of its own where there are several."""
    for seed in range(args.seed, args.seed + args.seeds):
        out = args.out / f"seed{seed}" if args.out and args.seeds > 1 else args.out
        yield argparse.Namespace(**{**vars(args), "seed": seed, "out": out})


def run_toy(args: argparse.Namespace) -> None:
    """The main table, the trace, or the paper's tables and figures, on toy members trained where there are none yet."""
    config, names = config_of(args, interval=2, block_size=16), tuple(train_toy.NAMES[:2])
    available = len(train_toy.questions("test"))
    for name, count in (("--problems", args.problems), ("--trace", args.trace or 1)):
        if not 1 <= count <= available:
            raise ValueError(f"{name} {count}: give 1 to {available}, the size of the toy's test split")
    runs = list(per_seed(args))
    trainings = [train_toy.Settings(seed=own.seed, steps=args.steps) for own in runs]
    effective = [{"task": "toy", "members": names, "problems": args.problems, "problem_seed": args.problem_seed,
                  "batch_size": args.batch_size, "dtype": args.dtype, "config": asdict(config),
                  "overconfident": dict(args.overconfident), "training": asdict(training)} for training in trainings]  # fmt: skip
    if args.figure:
        prepare_figures(args.figure)
    for own, settings in zip(runs, effective):
        open_results(own.out, settings)
    problems = tuple(train_toy.problems("test", args.trace or args.problems, seed=args.problem_seed))
    tables = []
    for own, training in zip(runs, trainings):
        trained = train_toy.train_members(train_toy.plan_members(training, len(names)), toy_folder(own), "cpu")
        job = ToyJob(str(toy_folder(own)), names, config, problems, dtype=args.dtype)
        if args.trace:
            show_trace(replace(job, factors=args.overconfident))
        elif args.table or args.figure:
            tables.append(paper_run(own, job, training, [record["validation_accuracy"] for record in trained]))
        else:
            job = replace(job, factors=args.overconfident)
            finish(own, effective[0], main_table(decode_toy(own, toy_methods(job)), names))
    if args.table:
        seeds = [own.seed for own in runs]
        finish(args, {**effective[0], "seeds": seeds}, tables[0] if len(seeds) == 1 else joined(tables, seeds))


def paper_run(args: argparse.Namespace, job: ToyJob, settings: train_toy.Settings, validation: list[float]) -> dict:
    """The tables that were asked for, with the rows of the main table that they decode; draws the figures."""
    best = validation.index(max(validation))
    pair = job.names[best], job.names[1 - best]
    train_toy.train_members(own_plan(args.table, settings, *pair), job.folder, "cpu")
    factors = {"9": args.overconfident or ((job.names[-1], 4.0),)}
    if "unequal" in args.table:
        factors["unequal"] = tuple(calibrated(job, name) for name in (pair[0], f"{pair[1]}-weak"))
    needed = [run for number in args.table for run in ("post-generation", *runs_of(number, job.names))]
    needed += [f"member {name} {score}" for name in job.names for score in tie.SCORES[1:] if args.figure]
    needed += METHODS[1:] if args.figure else ()
    runs = toy_runs(job, factors["9"]) | own_runs(job, *pair, factors.get("unequal", ()))
    records = decode_once(args, runs, [name for name in dict.fromkeys(needed) if name in runs])
    if "2" in args.table:
        records |= decode_toy(args, restarts(runs["post-generation"], records["post-generation"]))
    toy = Toy(job.names, best, factors, records)
    if args.figure:
        draw_figure_1(toy, args.figure / FIGURES[0])
        draw_figure_3(toy, args.figure / FIGURES[1], job.config.interval)
        print(*(f"drawn: {args.figure / name}" for name in FIGURES), sep="\n")
    if not args.table:
        return {}
    table = main_table({name: records[name] for name in METHODS if name in records}, job.names)
    return {**table, "tables": {number: paper_table(number, toy) for number in args.table}}


def joined(tables: list[dict], seeds: list[int]) -> dict:
    """Results of several training seeds: rows and comparisons of all, the tables over seeds, and each seed's own."""
    flat = {key: [{**entry, "seed": seed} for seed, table in zip(seeds, tables) for entry in table[key]]
            for key in ("rows", "comparisons")}  # fmt: skip
    means = {number: over_seeds([table["tables"][number] for table in tables]) for number in tables[0]["tables"]}
    return {**flat, "tables": means, "tables_by_seed": {seed: t["tables"] for seed, t in zip(seeds, tables)}}


def finish(args: argparse.Namespace, effective: dict, table: dict) -> None:
    """Print the table, for a person or as JSON, and write it beside the records."""
    count = effective.get("problems") or effective["questions"]
    summary = {"settings": effective, "problems": count, **environment(), **table}
    if args.out:
        write_json(args.out / "summary.json", summary)
    if args.json:
        print(json.dumps(summary))
        return
    config, seeds = effective["config"], effective.get("seeds", [])
    over = f"; training seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else ""
    print(f"{effective['task']}: {count} problems, n = {config['interval']}, blocks of {config['block_size']}{over}")
    if "tables" not in table:
        show_table(table)
    for number, own in table.get("tables", {}).items():
        show_paper_table(number, own, count)


def overconfident(text: str) -> tuple[tuple[str, float], ...]:
    name, _, factor = text.partition("=")
    try:
        if name in tuple(train_toy.NAMES[:2]) and 0 < float(factor) < math.inf:
            return ((name, float(factor)),)
    except ValueError:
        pass
    choices = " or ".join(train_toy.NAMES[:2])
    raise argparse.ArgumentTypeError(f"{text!r} is not MEMBER=FACTOR with member {choices} and a factor above 0")


def member_folder(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (re.fullmatch(r"[\w.-]+", name) and equals and path):  # the name becomes part of a file's name
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, the name of letters, digits and _ . -")
    return name, Path(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    text, _, examples = (__doc__ or "").partition("Examples:\n")
    parser = train_toy.Parser(prog="eval.py", description=text.splitlines()[0], epilog=f"examples:\n{examples}",
                              allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--interval", type=int, help="n, steps between two relays (default: 2 on the toy; the paper's for a benchmark)")
    add("--block-size", type=int, help="block of semi-autoregressive decoding (default: 16)")
    add("--top-k", type=int, default=1, help="tokens committed a step (default: %(default)s)")
    add("--threshold", type=float, help="commit every token above this probability instead, at least one a step")
    add("--selection", default="lowest_tcc", choices=tie.SELECTIONS,
        help="final response; best_model takes the first member, Table 10 the best (default: %(default)s)")  # fmt: skip
    add("--score", default="token_change_count", choices=tie.SCORES,
        help="score of a benchmark run; the toy's table shows all (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, help="questions decoded together (default: 32 on the toy; 8)")
    add("--dtype", choices=list(DTYPES)[1:],
        help="of the weights (default: as stored on the toy; bfloat16 on CUDA, else float32)")  # fmt: skip
    add("--out", type=Path, help="folder for records and summary; an interrupted run goes on where it stopped")
    add("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    toy = parser.add_argument_group("toy").add_argument
    toy("--problems", type=int, default=1000, help="test problems (default: %(default)s)")
    toy("--problem-seed", type=int, default=0, help="which test problems are drawn (default: %(default)s)")
    toy("--seed", type=int, default=0, help="training seed of the members (default: %(default)s)")
    toy("--steps", type=int, default=train_toy.Settings.steps, help="training steps a member (default: %(default)s)")
    toy("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of members (default: %(default)s)")
    toy("--trace", type=int, metavar="N", help="show N decodings round by round instead of the table")
    toy("--table", nargs="+", choices=[*TITLES, "all", *OWN_TITLES, "own"], default=[], metavar="N",
        help=f"tables of the paper on the toy, the paper's figures beside ours: {' '.join(TITLES)}, or all of them; "
             f"and questions beyond the paper: {' '.join(OWN_TITLES)}, or own for all of these")  # fmt: skip
    toy("--seeds", type=int, default=1, metavar="N",
        help="with --table: mean and spread over N training seeds from --seed on (default: %(default)s)")  # fmt: skip
    toy("--figure", type=Path, metavar="DIR", help="draw Fig. 1 and Fig. 3 of the paper on the toy as PNG in DIR")
    toy("--overconfident", type=overconfident, default=(), metavar="MEMBER=FACTOR",
        help="multiply a member's logits; in Table 9 beside the members as trained (default there: B=4)")  # fmt: skip
    real = parser.add_argument_group("real checkpoints").add_argument
    real("--members", nargs="+", type=member_folder, metavar="NAME=FOLDER", help="LLaDA and Dream folders")
    real("--task", choices=BENCHMARKS, help="benchmark")
    real("--data", type=Path, metavar="FILE", help="the benchmark's questions, as their owners publish them")
    real("--limit", type=int, help="only the first questions")
    real("--device", nargs="+", help="a device for all members, or one each (default: a GPU where there is one)")
    real("--single", action="store_true", help="every member alone, instead of the ensemble")
    real("--run-code", action="store_true", help="allow to run the code that the models write")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    groups = {"all": list(TITLES), "own": list(OWN_TITLES)}
    args.table = list(dict.fromkeys(number for asked in args.table for number in groups.get(asked, [asked])))
    for name in ("batch_size", "limit", "trace", "seeds"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.json and args.trace:
        parser.error("--trace prints no JSON: leave out one of --trace and --json")
    if args.figure and (args.json or args.trace or args.seeds > 1):
        parser.error("--figure draws one training seed and prints where: leave out --json, --trace and --seeds")
    if args.seeds > 1 and not args.table:
        parser.error("--seeds is for --table: give it too")
    if args.table or args.figure:
        for name in ("trace", "threshold", "top_k", "score", "selection"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--table and --figure set their own --{name.replace('_', '-')}: leave it out")
        if args.overconfident and "9" not in args.table:
            parser.error("--overconfident goes with --table 9, the main table or the trace: leave it or the others out")
    if not 0 <= args.problem_seed < 2**32:
        parser.error(f"--problem-seed {args.problem_seed}: give a number in [0, 2**32)")
    for name in ("trace", "table", "figure", "overconfident", "problems", "problem_seed", "seed", "steps", "checkpoints"):
        if getattr(args, name) != parser.get_default(name) and args.members:
            parser.error(f"--{name.replace('_', '-')} is for the toy: leave out --members")
    for name in ("task", "data", "limit", "device", "single", "run_code"):
        if getattr(args, name) and not args.members:
            parser.error(f"--{name.replace('_', '-')} is for real checkpoints: give --members too")
    names = [name for name, _ in args.members or []]
    if len(set(names)) < len(names):
        parser.error(f"--members names {max(names, key=names.count)} twice: give each a name of its own")
    args.members = dict(args.members or [])
    args.batch_size = args.batch_size or (8 if args.members else 32)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        train_toy.keep_memory()
        run_real(args) if args.members else run_toy(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: interrupted; with --out the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
