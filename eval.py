"""The paper's experiments, on toy models that are trained on first use and on real checkpoints.

    python eval.py                      the main result on the toy (paper: Tables 3 and 5)
    python eval.py 1 6 9                tables of the paper: its figures and the toy's
    python eval.py all --seeds 3        all of them, mean and spread over three training seeds
    python eval.py members cost         beyond the paper; also: unequal, cache, speed
    python eval.py trace --unsolved     a decoding that only TIE gets right, round by round
    python eval.py figures              Fig. 1, Fig. 3 and one decoding as PNG
    python eval.py gsm8k --data test.jsonl \\
        --members llada=GSAI-ML/LLaDA-1.5 dream=Dream-org/Dream-v0-Instruct-7B
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import benchmarks
import mdlm
import tie
import train_toy
from benchmarks import BENCHMARKS, Question

T = train_toy.REASONING_LENGTH + train_toy.ANSWER_LENGTH  # steps at one token per step
TIE: dict[str, dict] = {f"tie {score}": {"score": score} for score in tie.SCORES}
# With n >= T nothing is relayed.
METHODS: dict[str, dict] = {"post-generation": {"interval": T}} | TIE
TCC, *LOGIT = TIE
# One token per step up to step T, whatever the options say.
PLAIN: dict[str, Any] = {"top_k": 1, "threshold": None, "stop_at_eos": False}
# Accelerated decoding takes fewer steps, so it relays sooner.
FAST = PLAIN | {"threshold": 0.9, "interval": 2}
TEMPERATURE = 0.25  # of samples; the best of 0.25, 0.5 and 1 on validation problems


# --- decoding -------------------------------------------------------------------------------------


@torch.inference_mode()  # a few per cent faster than tie's own no_grad
def decode(
    members: Sequence[tie.Member],
    canvases: Sequence[tie.Canvas],
    config: tie.Config,
    questions: Sequence[Question],
    text: Callable[[int, list[int]], str],
    grade: Callable[[Question, str], tuple[str, bool]],
) -> list[dict]:
    """Decode one batch and grade every candidate. Returns one record per question.

    `text` takes the index of a member and ids. `grade` takes a question and the text of the answer
    region, and returns the answer in it and whether that is right.
    """
    counts: list[torch.Tensor] = []
    result = tie.ensemble([counting(member, counts) for member in members], canvases, config)
    forwards, positions = torch.stack([count.cpu() for count in counts]).sum(0).tolist()
    records = []
    for b, question in enumerate(questions):
        rows = [(c.tokens[b, c.reasoning], c.tokens[b, c.answer]) for c in result.candidates]
        texts = [[text(m, part.tolist()) for part in row] for m, row in enumerate(rows)]
        grades = [grade(question, answer) for _, answer in texts]
        record = {
            "id": question.id,
            "gold": question.gold,
            "texts": texts,
            "answers": [answer for answer, _ in grades],
            "correct": [right for _, right in grades],
            "winner": int(result.winner[b]),
            "leaders": [m for m in result.leaders[:, b].tolist() if m >= 0],
            "scores": [finite(relay) for relay in result.scores[:, :, b]],
            "tcc": finite(result.tcc[:, b]),
            "top1": finite(result.top1[:, b]),
            "forwards": forwards[b],
            "positions": positions[b],
        }
        records.append(record)
    return records


def counting(member: tie.Member, counts: list[torch.Tensor]) -> tie.Member:
    """The member, but each forward pass appends its work (2, B) to `counts`: whether a row is
    computed, and how many of its positions. Completed rows and padding are left out.
    """

    def denoise(tokens, positions, attention_mask):
        logits = member.denoise(tokens, positions, attention_mask)  # (B, K, V)
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask  # (B, L)
        computed = getattr(member.denoise, "computed", real.sum(1))  # (B,), fewer with mdlm.Cached
        busy = (tokens == member.mask_id).any(1).long()  # (B,)
        counts.append(torch.stack([busy, busy * computed]))
        return logits

    return replace(member, denoise=denoise)


def finite(values: torch.Tensor) -> list[float | None]:
    """JSON has neither infinity nor NaN."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


class Run:
    """The records of N questions as arrays: of the final response, and of M candidates."""

    def __init__(self, records: list[dict]):
        self.records = records
        self.correct = self.choose(lambda record: record["winner"])  # (N,) of the final response
        self.right = np.array([r["correct"] for r in records], dtype=bool)  # (N, M) of each member
        self.tcc = np.array([r["tcc"] for r in records], dtype=float)  # (N, M)
        self.forwards = np.array([r["forwards"] for r in records], dtype=float)  # (N,)
        self.positions = np.array([r["positions"] for r in records], dtype=float)  # (N,)

    @property
    def best(self) -> np.ndarray:
        """(N,) bool: what the member with the highest accuracy on these problems solves."""
        return self.right[:, self.right.sum(0).argmax()]

    @property
    def changes(self) -> np.ndarray:
        """Share of relays whose leader differs from the relay before (Table 5), per question."""
        several = [r["leaders"] for r in self.records if len(r["leaders"]) > 1]
        return np.array([np.mean(np.diff(leaders) != 0) for leaders in several])

    def choose(self, member: Callable[[dict], int]) -> np.ndarray:
        """(N,) bool: whether the chosen member's candidate is correct."""
        return np.array([record["correct"][member(record)] for record in self.records], dtype=bool)


# --- the toy --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A batch of toy problems with everything that a worker process needs to decode it."""

    folder: Path
    members: tuple[str, ...]
    config: tie.Config
    problems: tuple[train_toy.Problem, ...]
    device: str
    dtype: str | None  # of the weights; None: as stored
    cache: int | None  # R of mdlm.Cached; None: no cache
    temperature: float = 0.0  # 0: greedy
    answer_length: int = train_toy.ANSWER_LENGTH  # positions; members are trained on this many
    restart: tuple[str, int] | None = None  # start from this member's state after this many steps
    versions: str = ""  # hash of weights, code and torch's version

    def member(self, name: str, place: int = 0) -> tie.Member:
        """`place` seeds the samples, so that copies of a member differ."""
        dtype = getattr(torch, self.dtype) if self.dtype else None
        model, config = mdlm.load(self.folder / name, self.device, dtype)
        denoise: tie.Denoiser = mdlm.Cached(model, self.cache) if self.cache else model
        if self.temperature:
            seed = zlib.crc32(f"{place} {self.problems[0].prompt}".encode())
            denoise = sampling(denoise, self.temperature, seed)
        return tie.Member(denoise, config.mask_id, config.eos_id, name)

    def canvas(self) -> tie.Canvas:
        prompts = [problem.prompt for problem in self.problems]
        canvas = train_toy.canvas(prompts, self.device, self.answer_length)
        if self.restart is None:
            return canvas
        name, steps = self.restart
        states: list[dict] = []
        config = replace(self.config, interval=steps)
        tie.ensemble([self.member(name)], [canvas], config, states.append)
        return replace(canvas, tokens=states[0]["tokens"][0], masked=states[0]["masked"][0])

    @property
    def path(self) -> Path:
        """Where the records are kept: named by a hash of everything that determines them."""
        digest = hashlib.sha256(repr(replace(self, folder=Path())).encode()).hexdigest()
        return self.folder / "decoded" / f"{digest[:32]}.json"


def decode_job(job: Job) -> None:
    members = [job.member(name, place) for place, name in enumerate(job.members)]
    questions = [Question(p.prompt, p.prompt, p.answer) for p in job.problems]
    end = train_toy.VOCABULARY[train_toy.EOS]

    def text(m: int, ids: list[int]) -> str:
        return "".join(train_toy.VOCABULARY[i] for i in ids)

    def grade(question: Question, text: str) -> tuple[str, bool]:
        answer = text.split(end)[0]
        return answer, answer == question.gold

    canvases = [job.canvas()] * len(members)
    records = decode(members, canvases, job.config, questions, text, grade)
    job.path.parent.mkdir(exist_ok=True)
    write(job.path, json.dumps(records))


def write(path: Path, text: str) -> None:
    """Replace the file atomically, even if another process writes it at the same time."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def sampling(denoise: tie.Denoiser, temperature: float, seed: int) -> tie.Denoiser:
    """Gumbel noise turns the greedy choice into a sample. It also affects the unmasking order."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(tokens: torch.Tensor, positions: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        logits = denoise(tokens, positions, attention_mask)  # (B, K, V)
        noise = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator)
        return logits / temperature - noise.log().to(logits.device)

    return noisy


class Toy:
    """The toy members of one training seed."""

    def __init__(self, args: argparse.Namespace, seed: int, pool: ProcessPoolExecutor):
        self.args = args
        self.pool = pool
        self.settings = train_toy.Settings(seed=seed, steps=args.steps)
        self.problems = train_toy.problems("test", args.problems, args.problem_seed)
        self.names = tuple(train_toy.NAMES[:2])
        device = args.device[0] if args.device else "cpu"
        folder = args.checkpoints / f"toy-seed{seed}"
        config = config_of(args, interval=4)
        self.job = Job(folder, self.names, config, (), device, args.dtype, args.cache)
        records = self.train(train_toy.plan_members(self.settings))
        accuracy = {record["name"]: record["validation_accuracy"] for record in records}
        self.ranked = sorted(self.names, key=lambda name: -accuracy[name])  # better one first

    def train(self, plan: train_toy.Plan) -> list[dict]:
        return train_toy.train_members(plan, self.job.folder, self.job.device)

    def run(
        self,
        members: Sequence[str] = (),
        problems: Sequence[train_toy.Problem] | None = None,
        job: dict | None = None,
        **config: Any,
    ) -> Run:
        """Decode what isn't stored yet. By default the first two members decode all problems.
        `job` and `config` override fields of Job and tie.Config."""
        names = tuple(members) or self.names
        problems = self.problems if problems is None else problems
        settings = replace(self.job.config, **config)
        whole = replace(self.job, members=names, config=settings, **(job or {}))
        whole = replace(whole, versions=self.versions(whole))
        size = self.args.batch_size or 32
        batches = [tuple(problems[i : i + size]) for i in range(0, len(problems), size)]
        jobs = [replace(whole, problems=batch) for batch in batches]
        todo = [part for part in jobs if not part.path.exists()]
        title = f"{'-'.join(names)} {config}"
        futures = [self.pool.submit(decode_job, part) for part in todo]
        with tqdm(total=len(todo), desc=title, unit="batch", disable=None, leave=False) as bar:
            try:
                for future in futures:
                    future.result()
                    bar.update()
            except BaseException:  # on Ctrl-C too. Not `pool.map`: it fails if workers were killed
                self.pool.shutdown(cancel_futures=True)
                raise
        return Run([record for part in jobs for record in json.loads(part.path.read_text())])

    def methods(self, **given: Any) -> dict[str, Run]:
        """Decode with each of METHODS."""
        return {name: self.run(**given, **settings) for name, settings in METHODS.items()}

    def versions(self, job: Job) -> str:
        names = [*job.members, *(job.restart or ())[:1]]
        files = [job.folder / name / "model.safetensors" for name in names]
        files += [Path(module.__file__) for module in (tie, mdlm, train_toy)]
        digest = hashlib.sha256(torch.__version__.encode())
        for file in files:
            digest.update(file.read_bytes())
        for part in (decode, counting, finite, Job.member, Job.canvas, decode_job, sampling):
            digest.update(inspect.getsource(part).encode())
        return digest.hexdigest()

    def only_tie_solves(self, score: str) -> list[train_toy.Problem]:
        """The problems that TIE solves and no member solves alone."""
        solved = self.run(score=score).correct & ~self.run(interval=T).right.any(1)
        return [problem for problem, yes in zip(self.problems, solved) if yes]


# --- tables are data: cells with a value per problem, and claims ----------------------------------


@dataclass
class Cell:
    """The mean of values, one per problem, or the difference between the means of two groups."""

    groups: tuple[np.ndarray, ...]
    percent: bool = True
    signed: bool = False  # a difference

    def estimate(self) -> tuple[float, float, float]:
        """(value, low, high) with a 95 % interval, Wilson's for a share, otherwise by bootstrap."""
        if not all(len(group) for group in self.groups):
            return math.nan, math.nan, math.nan
        first, *second = self.groups
        if first.dtype == bool:
            return wilson(first)
        generator = np.random.default_rng(0)
        draws = [generator.choice(group, (2000, len(group))).mean(1) for group in self.groups]
        low, high = np.percentile(draws[0] - sum(draws[1:]), [2.5, 97.5])
        return float(first.mean() - sum(group.mean() for group in second)), float(low), float(high)

    def show(self, value: float, sign: str) -> str:
        if self.percent:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.2f}"


def wilson(flags: np.ndarray) -> tuple[float, float, float]:
    p = float(flags.mean())
    n = len(flags)
    z = 1.96
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return p, max(0.0, low), min(1.0, high)


def one_column(name: str, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a table with one column."""
    return {row: {name: value} for row, value in values.items()}


def fraction(values: np.ndarray) -> Cell:
    return Cell((values,))


def gain(ours: np.ndarray, theirs: np.ndarray) -> Cell:
    """The paired difference between two methods on the same problems."""
    return Cell((ours - theirs.astype(float),), signed=True)


def apart(tcc: np.ndarray, right: np.ndarray) -> Cell:
    """The mean count of incorrect answers minus that of correct ones."""
    return Cell((tcc[~right], tcc[right]), percent=False, signed=True)


@dataclass
class Table:
    """A cell may be given as an array of bool, shown in %, or of numbers, shown as they are."""

    title: str
    cells: dict[str, dict[str, Any]]  # row -> column -> cell
    claims: dict[str, dict[str, Cell]] = field(default_factory=dict)  # claim -> name -> difference
    paper: dict[str, tuple] = field(default_factory=dict)  # row -> the paper's own figures

    def __post_init__(self):
        for row in self.cells.values():
            for column, values in row.items():
                if not isinstance(values, Cell):
                    row[column] = Cell((values,), percent=values.dtype == bool)

    def verdict(self, claim: str) -> str:
        """A claim holds if the intervals of all its differences lie above 0. It doesn't hold if one
        lies below 0."""
        _, lows, highs = zip(*[cell.estimate() for cell in self.claims[claim].values()])
        if any(high < 0 for high in highs):
            return "does not hold"
        return "holds" if all(low > 0 for low in lows) else "undecided"


def merge(cells: list[Cell]) -> dict[str, Any]:
    """A cell of one training seed or of several: value and interval, or mean and deviation."""
    first = cells[0]
    sign = "+" if first.signed else ""
    estimates = [cell.estimate() for cell in cells]
    # JSON has no NaN.
    values = [value if math.isfinite(value) else None for value, _, _ in estimates]
    known = [value for value in values if value is not None]
    merged: dict[str, Any] = {
        "value": None,
        "ci95": None,
        "text": "no sample",
        "n": len(first.groups[0]),
        "values": values,
    }
    if len(cells) > 1 and len(known) > 1:
        value = float(np.mean(known))
        deviation = first.show(float(np.std(known, ddof=1)), "")
        merged |= {"value": value, "text": f"{first.show(value, sign)} ± {deviation}"}
    elif len(cells) == 1 and known:
        value, low, high = estimates[0]
        interval = f" [{first.show(low, sign)}, {first.show(high, sign)}]" if low < high else ""
        text = first.show(value, sign) + interval
        merged |= {"value": value, "ci95": [low, high], "text": text}
    return merged


def as_data(tables: list[Table]) -> dict[str, Any]:
    """Merge the same table of one or several training seeds into what `--json` prints."""
    first = tables[0]
    cells = []
    for row, columns in first.cells.items():
        for column in columns:
            merged = merge([table.cells[row][column] for table in tables])
            cells.append({"row": row, "column": column, **merged})
    claims = []
    for claim, names in first.claims.items():
        differences = [
            {"name": name, **merge([t.claims[claim][name] for t in tables])} for name in names
        ]
        verdicts = Counter(table.verdict(claim) for table in tables)
        shares = [f"{word} with {k} of {len(tables)} seeds" for word, k in verdicts.items()]
        verdict = ", ".join(shares) if len(tables) > 1 else first.verdict(claim)
        claims.append({"claim": claim, "verdict": verdict, "differences": differences})
    return {"title": first.title, "cells": cells, "claims": claims, "paper": first.paper}


def show_table(name: str, table: dict[str, Any], problems: int) -> None:
    """Print rows and columns, the paper's own figures below ours, and whether the claims hold."""
    grid: dict[str, dict[str, str]] = defaultdict(dict)
    for cell in table["cells"]:
        n = "" if cell["n"] == problems else f" n={cell['n']}"
        grid[cell["row"]][cell["column"]] = cell["text"] + n
    columns = list(dict.fromkeys(column for texts in grid.values() for column in texts))
    for row, figures in table["paper"].items():
        grid[f"paper, {row}"] = dict(zip(columns, map(str, figures)))
    lines = [["", *columns]]
    lines += [[row, *(texts.get(c, "") for c in columns)] for row, texts in grid.items()]
    widths = [max(map(len, texts)) for texts in zip(*lines)]
    print(f"\n{f'Table {name}' if name.isdigit() else name}: {table['title']}")
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for claim in table["claims"]:
        texts = "; ".join(f"{d['name']}: {d['text']}" for d in claim["differences"])
        text = f"{claim['claim']}: {claim['verdict']} ({texts})"
        print(textwrap.fill(text, 120, subsequent_indent="    "))


# --- the tables, in the paper's order -------------------------------------------------------------


def result_rows(runs: dict[str, Run], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row per method, after those of the members alone if post-generation is a method."""
    rows: dict[str, dict[str, Any]] = {}
    after = runs.get("post-generation")
    if after:
        for m, name in enumerate(names):
            forwards = after.forwards / len(names)
            rows[f"member {name}"] = {"accuracy": after.right[:, m], "forwards": forwards}
        rows["oracle"] = {"accuracy": after.right.any(1), "forwards": after.forwards}
    for name, run in runs.items():
        rows[name] = {"accuracy": run.correct, "forwards": run.forwards}
        if after:
            for rival, difference in ahead(run, after).items():
                rows[name][f"- {rival.removeprefix('the ')}"] = difference
        if after and run is not after:
            rows[name]["of those unsolved alone"] = run.correct[~after.right.any(1)]
        if len(run.changes):
            rows[name]["changes"] = fraction(run.changes)
    return rows


def ahead(run: Run, after: Run) -> dict[str, Cell]:
    """How far a run is ahead of the best member and of the post-generation ensemble."""
    return {
        "the best member": gain(run.correct, after.best),
        "post-generation": gain(run.correct, after.correct),
    }


def table_main(toy: Toy) -> Table:
    runs = toy.methods()
    after = runs["post-generation"]
    columns = zip(toy.names, after.tcc.T, after.right.T)
    gaps = {f"member {name}": apart(counts, right) for name, counts, right in columns}
    config = toy.job.config
    title = f"the toy, n = {config.interval}, blocks of {config.block_size}, accuracy %"
    claims = {"C~(T) of a member alone is higher where its answer is incorrect": gaps}
    return Table(title, result_rows(runs, toy.names), claims)


def table_1(toy: Toy) -> Table:
    alone = toy.run(interval=T, normalize=False)
    rows = {}
    gaps = {}
    for name, counts, right in zip(toy.names, alone.tcc.T, alone.right.T):
        rows[f"member {name}"] = {"correct": counts[right], "incorrect": counts[~right]}
        gaps[f"member {name}, incorrect - correct"] = apart(counts, right)
    claims = {"The answer tokens change more often where the answer is incorrect": gaps}
    paper = {
        "LLaDA, MMLU": (1.81, 4.27),
        "Dream, MMLU": (2.32, 6.19),
        "LLaDA, GSM8K": (32.29, 51.48),
        "Dream, GSM8K": (40.88, 58.07),
    }
    return Table("token change count C(T) of correct and incorrect answers", rows, claims, paper)


def table_2(toy: Toy) -> Table:
    """Each member restarts from the other's partial trajectory, on the problems that it failed
    alone and the other solved."""
    starts = {"first 33 %": round(0.33 * T), "first 50 %": round(0.5 * T)}
    starts["all reasoning"] = train_toy.REASONING_LENGTH  # ours
    right = toy.run(interval=T).right
    rows: dict[str, dict[str, Any]] = {}
    half = {}
    for receiver, sender in permutations(range(2)):
        name = toy.names[receiver]
        failed = right[:, sender] & ~right[:, receiver]
        problems = [problem for problem, yes in zip(toy.problems, failed) if yes]
        rows[f"member {name}"] = row = {}
        for start, steps in starts.items():
            job = {"restart": (toy.names[sender], steps)}
            row[start] = toy.run([name], problems, job, interval=T).correct
        half[f"member {name} - half"] = Cell((row["first 50 %"] - 0.5,), signed=True)
    claim = (
        "Restarted from the first 50 %, a member corrects more than half of what it failed alone"
    )
    paper = {
        "LLaDA, MMLU": (56.43, 65.22),
        "Dream, MMLU": (68.84, 76.57),
        "LLaDA, GSM8K": (74.66, 72.60),
        "Dream, GSM8K": (78.63, 80.92),
    }
    title = "correction rate after a restart from another member's correct trajectory, %"
    return Table(title, rows, {claim: half}, paper)


def table_3(toy: Toy) -> Table:
    runs = toy.methods()
    after = runs["post-generation"]
    rows = {}
    for name, row in result_rows(runs, toy.names).items():
        rows[name] = {column: row[column] for column in ("accuracy", "forwards")}
    claims = {}
    for rival in ("the best member", "post-generation"):
        gains = {f"{name} - {rival}": ahead(runs[name], after)[rival] for name in TIE}
        claims[f"TIE is ahead of {rival} with every score"] = gains
    names = ("LLaDA, GSM8K", "Dream, GSM8K", *METHODS)
    paper = {name: (x,) for name, x in zip(names, BENCHMARKS["gsm8k"].table_3)}
    return Table("main result, accuracy %", rows, claims, paper)


def table_5(toy: Toy) -> Table:
    rates = {name: fraction(toy.run(**settings).changes) for name, settings in TIE.items()}
    claims = {"The lead changes between relays with every score": rates}
    title = "model change rate, % of relays whose leader differs from the relay before"
    return Table(title, one_column("change rate", rates), claims)


def table_6(toy: Toy) -> Table:
    after = toy.run(interval=T).correct
    rows = {}
    gains = {}
    for n, theirs in ((2, 8), (4, 16), (8, 32)):  # of T = 32 here and T = 256 in the paper
        correct = toy.run(interval=n).correct
        rows[f"n = {n}, paper {theirs}"] = correct
        gains[f"n = {n}"] = gain(correct, after)
    rows["post-generation"] = after
    claims = {"TIE is ahead of post-generation at every n": gains}
    return Table("ensemble interval n, accuracy %", one_column("accuracy", rows), claims)


def table_7(toy: Toy) -> Table:
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    claims = {}
    speeds = {
        "one token per step": PLAIN,
        "threshold 0.9": FAST,
        "top-k 2": PLAIN | {"top_k": 2, "interval": 2},
    }
    for speed, settings in speeds.items():
        after = toy.run(**settings | {"interval": T})
        runs = {"post-generation": after, TCC: toy.run(**settings)}
        for name, row in result_rows(runs, toy.names).items():
            rows[name][speed] = row["accuracy"]
            rows[name][f"forwards, {speed}"] = row["forwards"]
        gains = ahead(runs[TCC], after)
        claims[f"TIE is ahead with {speed}"] = {f"TIE - {name}": x for name, x in gains.items()}
    return Table("accelerated decoding (threshold and top-k with n = 2), accuracy %", rows, claims)


def table_8(toy: Toy) -> Table:
    rows = {TCC: {"without": toy.run(normalize=False).correct, "with": toy.run().correct}}
    claims = {
        "Normalisation helps": {"with - without": gain(rows[TCC]["with"], rows[TCC]["without"])}
    }
    paper = {"GSM8K": (82.64, 83.47), "MATH500": (47.8, 48.6)}
    return Table("normalisation of the token change count, accuracy %", rows, claims, paper)


def table_9(toy: Toy) -> Table:
    rows = {}
    claims = {}
    for name in LOGIT:
        source = toy.run(cross_model=False, **TIE[name]).correct
        cross = toy.run(**TIE[name]).correct
        rows[name] = {"source-only": source, "cross-model": cross}
        gains = {"cross-model - source-only": gain(cross, source)}
        claims[f"Cross-model scoring helps {name}"] = gains
    paper = {"top-1, GSM8K": (81.35, 82.71), "top-1, MATH500": (42.4, 47.0)}
    return Table("source-only and cross-model scoring, accuracy %", rows, claims, paper)


def table_10(toy: Toy) -> Table:
    """The same decodings with other final responses."""
    run = toy.run()
    best = toy.names.index(toy.ranked[0])

    def most_selected(record: dict) -> int:
        """Our decision: the lowest C~ if several members led most often, or nobody led."""
        (leader, leads), *others = Counter(record["leaders"]).most_common() or [(-1, 0)]
        tied = leads == 0 or leads in [count for _, count in others]
        return record["winner"] if tied else leader

    row = {
        "lowest C~": run.correct,
        "best model": run.right[:, best],
        "most selected": run.choose(most_selected),
    }
    gains = {
        f"lowest C~ - {name}": gain(run.correct, row[name])
        for name in ("best model", "most selected")
    }
    title = "final selection, accuracy %; the best model is the best on validation problems"
    claims = {"The lowest C~ selects best": gains}
    return Table(title, {TCC: row}, claims, {"GSM8K": (83.47, 81.65, 83.17)})


# --- beyond the paper -----------------------------------------------------------------------------


def table_members(toy: Toy) -> Table:
    names = train_toy.NAMES
    toy.train(train_toy.plan_members(toy.settings, len(names)))
    rows = {}
    further = {}
    gains = {}
    for m in range(1, len(names) + 1):
        after = toy.run(names[:m], interval=T)
        run = toy.run(names[:m])
        rows[f"M = {m}"] = {
            "best member": after.best,
            "oracle": after.right.any(1),
            "post-generation": after.correct,
            "TIE": run.correct,
            "forwards": run.forwards,
        }
        if m > 1:
            fewer = toy.run(names[: m - 1]).correct
            further[f"M = {m} - M = {m - 1}"] = gain(run.correct, fewer)
            gains[f"M = {m}"] = gain(run.correct, after.correct)
    claims = {"TIE gains with every further member": further}
    claims["TIE is ahead of post-generation"] = gains
    return Table("one to four members, their gaps disjoint, accuracy %", rows, claims)


def vote(samples: Run, count: int) -> np.ndarray:
    """(N,) bool: whether the most frequent of the first `count` answers is correct. Ties go to the
    lowest C~."""

    def winner(record: dict) -> int:
        answers = record["answers"][:count]
        return min(range(count), key=lambda m: (-answers.count(answers[m]), record["tcc"][m]))

    return samples.choose(winner)


def table_cost(toy: Toy) -> Table:
    best, other = toy.ranked
    twice = replace(toy.settings, steps=2 * toy.settings.steps)
    plan = train_toy.plan_members(toy.settings, len(train_toy.NAMES))
    toy.train(plan | {f"{best}-long": (twice, best), "union": (twice, best + other)})
    sampled = {"temperature": TEMPERATURE}
    samples = toy.run([best] * 4, None, sampled, interval=T)
    union = vote(toy.run(["union"] * 2, None, sampled, interval=T), 2)
    longer = toy.run([f"{best}-long"], interval=T).correct
    runs = {m: toy.run(train_toy.NAMES[:m]).correct for m in (2, 3, 4)}
    votes = {m: vote(samples, m) for m in runs}
    rows = {
        "best member, greedy": toy.run([best], interval=T).correct,
        "best member, trained twice as long": longer,
        "one member, training and forwards of both": union,
    }
    rows |= {f"best member, vote of {m} samples": votes[m] for m in votes}
    rows |= {f"TIE of {m} members": runs[m] for m in runs}
    two = "TIE of two is ahead of"
    claims = {
        "TIE is ahead of as many samples of its best member": {
            f"M = {m}": gain(runs[m], votes[m]) for m in runs
        },
        f"{two} the best member trained twice as long": {
            "TIE - best member": gain(runs[2], longer)
        },
        f"{two} one member with the training and the forwards of both": {
            "TIE - one member": gain(runs[2], union)
        },
    }
    title = "equal cost, TIE against votes over samples of one member, accuracy %"
    return Table(title, one_column("accuracy", rows), claims)


def table_unequal(toy: Toy) -> Table:
    best, other = toy.ranked
    weak = f"{other}-weak"
    gaps = min(2 * toy.settings.gaps, train_toy.GAPS)
    toy.train({weak: (replace(toy.settings, gaps=gaps), other)})
    runs = toy.methods(members=[best, weak])
    better, weaker = runs["post-generation"].right.T
    rows = {"the better member": better, "the weaker one": weaker}
    rows |= {name: run.correct for name, run in runs.items()}
    claims = {"TIE is ahead of the better member": {name: gain(rows[name], better) for name in TIE}}
    title = "a member far weaker than the other, accuracy %"
    return Table(title, one_column("accuracy", rows), claims)


def table_cache(toy: Toy) -> Table:
    """Cached decoding, which is approximate, against the exact decoding of the same members."""
    exact = toy.methods()
    columns = {"exact": exact} | {f"R = {R}": toy.methods(job={"cache": R}) for R in (2, 4, 8)}
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    claims = {}
    for column, runs in columns.items():
        for name, row in result_rows(runs, toy.names).items():
            rows[name][column] = row["accuracy"]
        if column == "exact":
            continue
        after = runs["post-generation"].correct
        for name, run in runs.items():
            pairs = list(zip(run.records, exact[name].records))
            tokens = [differing(written(ours), written(theirs)) for ours, theirs in pairs]
            rows[f"other tokens, {name}"][column] = fraction(np.array(tokens))
            if name in TIE:
                leaders = [differing(ours["leaders"], theirs["leaders"]) for ours, theirs in pairs]
                rows[f"other leaders, {name}"][column] = fraction(np.array(leaders))
        lost = {name: gain(exact[name].correct, run.correct) for name, run in runs.items()}
        claims[f"Exact decoding is ahead of {column}"] = lost
        gains = {name: gain(runs[name].correct, after) for name in TIE}
        claims[f"TIE is ahead of post-generation with {column}"] = gains
    return Table("keys and values recomputed every R forward passes, accuracy %", rows, claims)


def written(record: dict) -> str:
    return "".join(text for member in record["texts"] for text in member)


def differing(ours: Sequence, theirs: Sequence) -> float:
    return float(np.mean([a != b for a, b in zip(ours, theirs)]))


def table_speed(toy: Toy) -> Table:
    """Work per problem, plain and accelerated, and with 16 answer positions instead of 8.

    The members were trained with 8 and fill the others arbitrarily, so TIE reads only the first 8
    that are masked, as the paper does for code.
    """
    exact = {"job": {"cache": None}}
    cached = {"job": {"cache": 4}}
    longer = PLAIN | {"job": {"cache": None, "answer_length": 16}, "answer_window": 8}
    speeds = {
        "plain": PLAIN | exact,
        "threshold": FAST | exact,
        "cache": PLAIN | cached,
        "both": FAST | cached,
        "16 answer positions": longer,
        "16, stop at EOS": longer | {"stop_at_eos": True},
    }
    after = {"interval": 2 * T}  # more than the steps with 16 answer positions
    methods: dict[str, tuple[Sequence[str], dict]] = {
        "best member": (toy.ranked[:1], {}),
        "post-generation": (toy.names, after),
        "TIE": (toy.names, {}),
    }
    runs = {}
    rows = {}
    for method, (names, interval) in methods.items():
        for speed, settings in speeds.items():
            name = f"{method}, {speed}"
            runs[name] = run = toy.run(names, **settings | interval)
            rows[name] = {
                "accuracy": run.correct,
                "forwards": run.forwards,
                "positions": run.positions,
                "relative": run.positions / runs["best member, plain"].positions,
            }
    one = runs["best member, plain"]
    both = runs["TIE, both"]
    gains = {
        "accuracy": gain(both.correct, one.correct),
        "positions saved": Cell((one.positions - both.positions,), percent=False, signed=True),
    }
    claims = {"TIE with both is more accurate and cheaper than the best member, plain": gains}
    title = "computed positions per problem, accuracy %; threshold 0.9 with n = 2, cache R = 4"
    return Table(title, rows, claims)


PAPER = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "5": table_5,
    "6": table_6,
    "7": table_7,
    "8": table_8,
    "9": table_9,
    "10": table_10,
}
BEYOND = {
    "members": table_members,
    "cost": table_cost,
    "unequal": table_unequal,
    "cache": table_cache,
    "speed": table_speed,
}
TABLES = {"main": table_main} | PAPER | BEYOND


# --- the trace of one decoding --------------------------------------------------------------------

BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"  # of Okabe and Ito
COLOURS = (BLUE, ORANGE)  # of the members in pictures
STYLES = ("38;5;32", "4;38;5;172")  # in a terminal; the second is also underlined


class Frame(NamedTuple):
    """What one member holds after one of its steps, at the T positions that are decoded."""

    tokens: list[int]  # (T,) the mask id where masked
    authors: list[int]  # (T,) the member that committed the token (even if relayed since), or -1
    answer: list[int]  # (A,) top-1 at the answer positions, or the token itself once committed
    changed: list[bool]  # (A,) whether C counts this top-1 as a change


class Trace:
    """One problem, decoded by each member alone and by TIE, step by step."""

    def __init__(self, toy: Toy, problem: train_toy.Problem, score: str):
        job = replace(toy.job, problems=(problem,))
        members = [job.member(name) for name in toy.names]
        canvas = job.canvas()
        self.problem = problem
        self.names = toy.names
        self.config = replace(job.config, score=score)
        self.alone = [tie.decode(m, canvas, self.config).tokens[0].tolist() for m in members]
        self.frames: list[list[Frame]] = [[] for _ in members]  # by member and step
        self.rounds: list[tuple[int, list[float], int]] = []  # last step, scores, leader
        nobody = torch.full_like(canvas.tokens, -1)
        self.states: list[tuple] = [(canvas, nobody, None) for _ in members]
        watched = replace(self.config, top_k=1, threshold=None, commit=self.commit)
        result = tie.ensemble(members, [canvas] * len(members), watched, self.end_round)
        self.tcc = result.tcc[:, 0].tolist()
        self.final = self.frames[int(result.winner)][-1]
        self.answer = train_toy.decode(self.final.tokens[train_toy.REASONING_LENGTH :])

    def commit(self, reading: tie.Reading) -> torch.Tensor:
        """A commit rule that does what the settings say and keeps a frame."""
        m = reading.member
        canvas, authors, last = self.states[m]
        after = tie.commit(canvas, reading, self.config)
        new = canvas.masked & ~after.masked  # (1, L)
        authors = authors.masked_fill(new, m)  # (1, L)
        changed = torch.zeros_like(reading.relevant)  # (1, A)
        if last is not None:
            changed = (reading.answer_token != last.answer_token) & last.relevant
        self.states[m] = (after, authors, reading)
        tokens = after.tokens.masked_fill(after.masked, train_toy.MASK)  # (1, L)
        held = [torch.cat([x[0, canvas.reasoning], x[0, canvas.answer]]) for x in (tokens, authors)]
        frame = (*held, reading.answer_token[0], changed[0])
        self.frames[m].append(Frame(*[part.tolist() for part in frame]))
        return new.gather(1, reading.positions)

    def end_round(self, state: dict) -> None:
        leader = int(state["leader"])
        self.rounds.append((state["step"], state["scores"][:, 0].tolist(), leader))
        if leader >= 0:
            canvas, authors, _ = self.states[leader]
            self.states = [(canvas, authors, None) for _ in self.states]


def laid_out(signs: Sequence[str], authors: list[int]) -> str:
    """Lay out one sign per token as `readable` does. On a terminal, colour it by author."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    layout = train_toy.readable([train_toy.MASK] * train_toy.LENGTH)
    pairs = iter(zip(signs, authors))
    text = ""
    for place in layout:
        sign, m = next(pairs) if place == "_" else (place, -1)
        text += f"\033[{STYLES[m]}m{sign}\033[0m" if colours and m >= 0 else sign
    return text


def show_trace(trace: Trace) -> None:
    """Print the members alone, `^` where they are wrong. Then, for each round, what each member
    holds, its guess for the answer (`'`: changed in this round), its score, and the leader."""
    letters = train_toy.VOCABULARY
    right = train_toy.readable(trace.problem.sequence)
    print(f"\n{trace.problem.prompt:60}next              score\n{'right':>9} {right}")
    for name, ids in zip(trace.names, trace.alone):
        alone = train_toy.readable(ids)
        print(f"{name + ' alone':>9} {alone}")
        print(" " * 10 + "".join(" ^"[a != b] for a, b in zip(alone, right)).rstrip())
    begin = 0
    for step, scores, leader in trace.rounds:
        for m, name in enumerate(trace.names):
            frame = trace.frames[m][:step][-1]  # an earlier one if this member was done sooner
            flags = [f.changed for f in trace.frames[m][begin:step]]  # one list per step
            changed = [any(own) for own in zip(*flags)] or [False] * len(frame.answer)
            answer = "".join(letters[i] + " '"[c] for i, c in zip(frame.answer, changed))
            score = f"{scores[m] + 0.0:6.3f}" if math.isfinite(scores[m]) else ""  # no -0.000
            label = name if m else f"step {step:2} {name}"
            held = laid_out([letters[i] for i in frame.tokens], frame.authors)
            leads = "leads" if m == leader else ""
            print(f"{label:>9} {held}  {answer} {score}  {leads}".rstrip())
        begin = step
    tcc = ", ".join(f"{name} {count:.3f}" for name, count in zip(trace.names, trace.tcc))
    outcome = "right" if trace.answer == trace.problem.answer else "wrong"
    authors = trace.final.authors
    final = laid_out([letters[i] for i in trace.final.tokens], authors)
    print(f"      TIE {final}  {outcome}; C~(T): {tcc}")
    print(f"       by {laid_out([trace.names[m] for m in authors], authors)}")


def show_traces(toy: Toy) -> None:
    problems = toy.only_tie_solves(toy.args.score) if toy.args.unsolved else toy.problems
    if not problems:
        raise ValueError("--unsolved: there is no problem that only TIE solves: raise --problems")
    for problem in problems[: toy.args.count]:
        show_trace(Trace(toy, problem, toy.args.score))


# --- figures --------------------------------------------------------------------------------------


def new_figure(width: float, height: float, *panels: int, **shared: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    sheet = Figure(figsize=(width, height), layout="constrained")
    return sheet, sheet.subplots(*panels, **shared)


def draw_figure_1(toy: Toy) -> Any:
    """The confidences of each member alone after each step, correct and incorrect answers apart."""
    sheet, panels = new_figure(7.2, 7.2, 3, 2, sharex=True, sharey="row")
    labels = ("mean top-1 probability", "mean entropy (nats)", "mean probability margin")
    steps = np.arange(1, T)
    for i, (score, label) in enumerate(zip(tie.SCORES[1:], labels)):
        panels[i][0].set_ylabel(label)
        for panel, name in zip(panels[i], toy.names):
            # A single member isn't scored, so decode with two copies of it.
            run = toy.run([name, name], score=score, interval=1, cross_model=False, **PLAIN)
            scores = np.array([r["scores"] for r in run.records], dtype=float)  # (N, T - 1, 2)
            curves = np.ma.masked_invalid(scores[:, :, 0])
            curves = -curves if score == "negative_entropy" else curves
            for outcome, colour, line in (("correct", BLUE, "-"), ("incorrect", RED, "--")):
                own = curves[run.correct == (outcome == "correct")]
                mean = own.mean(0)
                half = 1.96 * own.std(0) / np.sqrt(np.maximum(own.count(0), 1))
                panel.plot(steps, mean, line, color=colour, label=f"{outcome} answers")
                panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2)
            panel.set_title(f"{name} alone: {100 * run.correct.mean():.0f} % correct", fontsize=10)
            panel.set_xlabel("decoding step")
    sheet.suptitle("Confidence over the masked answer positions; mean and 95 % band", fontsize=11)
    sheet.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return sheet


def draw_figure_3(toy: Toy) -> Any:
    """When the leader changes: the share of relays that change it, against the decoding step."""
    sheet, panel = new_figure(7.2, 4.4)
    n = toy.job.config.interval
    looks = ((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (RED, "D:"))
    for k, ((name, settings), (colour, style)) in enumerate(zip(TIE.items(), looks)):
        leaders = [record["leaders"] for record in toy.run(**settings, **PLAIN).records]
        relays = range(1, max(map(len, leaders)))
        changed = [np.array([x[i] != x[i - 1] for x in leaders if len(x) > i]) for i in relays]
        rates = np.array([fraction(flags).estimate() for flags in changed]).reshape(-1, 3)
        value, low, high = 100 * rates.T
        # Shifted, so that the bars don't overlap.
        steps = [n * (i + 1) / T + 0.012 * (k - 1.5) for i in relays]
        label = name.removeprefix("tie ").replace("_", " ").replace("top1", "top-1")
        bars = (value - low, high - value)
        panel.errorbar(steps, value, bars, fmt=style, color=colour, elinewidth=0.8, label=label)
    panel.set(xlabel="relative decoding step", ylabel="relays that change the leader (%)")
    panel.set(xlim=(0, 1), ylim=(-1, None))
    panel.set_title(f"{len(toy.problems)} problems, n = {n}, T = {T}; bars: 95 % intervals")
    sheet.legend(loc="outside lower center", ncols=2)
    return sheet


def draw_trace(toy: Toy) -> Any:
    """Draws the first problem that only TIE solves, with a panel per member, step against position.
    Tokens have their authors' colours. Masked answer positions show top-1, in red if it changed."""
    trace = Trace(toy, (toy.only_tie_solves(toy.args.score) or toy.problems)[0], toy.args.score)
    sheet, panels = new_figure(7.2, 6.4, 1, 2, sharey=True)
    reasoning = train_toy.REASONING_LENGTH
    for m, panel in enumerate(panels):
        for y, frame in enumerate(trace.frames[m], 1):
            guesses = [train_toy.MASK] * reasoning + frame.answer
            changed = [False] * reasoning + frame.changed
            for x, author in enumerate(frame.authors):
                token = frame.tokens[x] if author >= 0 else guesses[x]
                colour = COLOURS[author] if author >= 0 else "#f2f2f2"
                ink = "white" if author == 0 else RED if changed[x] else "black"
                letter = "" if token == train_toy.MASK else train_toy.VOCABULARY[token]
                panel.bar(x, 0.9, 0.9, y - 0.45, color=colour)
                panel.text(x, y, letter, color=ink, fontsize=6.5, ha="center", va="center_baseline")
        for step, _, leader in trace.rounds:
            if leader >= 0:
                panel.axhline(step + 0.5, color="black", linewidth=0.7)
            if leader == m:
                panel.text(T, step + 0.4, "leads", fontsize=6, va="bottom")
        panel.set(title=f"member {trace.names[m]}", xlim=(-0.5, T + 3), ylim=(T + 0.5, 0.5))
        panel.set_xticks([5.5, 17.5, 27.5], ["products", "running totals", "answer"], fontsize=8)
    panels[0].set_ylabel("decoding step")
    question = trace.problem.prompt.replace(" ", "")
    sheet.suptitle(f"{question} TIE writes {trace.answer}; right is {trace.problem.answer}")
    return sheet


FIGURES = {"figure1.png": draw_figure_1, "figure3.png": draw_figure_3, "trace.png": draw_trace}


# --- real checkpoints on the paper's benchmarks ---------------------------------------------------

PAPER_METHODS = ("LLaDA", "Dream", *METHODS, "DreamCoder", "DiffuCoder")
PAPER_METHODS += ("tie token_change_count, of these two", "tie top1_probability, of these two")
MEMBER_FILES = [
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
]


def member_folder(given: str) -> Path:
    """A local folder, or the files of a model on the Hugging Face Hub, given as org/name,
    org/name@revision or its address there."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub

    name, _, revision = given.removeprefix("https://huggingface.co/").strip("/").partition("@")
    if name.count("/") != 1 or name.startswith((".", "~")):
        raise ValueError(f"--members: {given} is neither a folder nor a Hub name like org/name")
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=MEMBER_FILES,
            ignore_patterns=["*/*"],  # of subfolders
        )
        return Path(path)
    except Exception as error:  # noqa: BLE001, the Hub's HTTP library has errors of its own
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"--members: cannot download {given} from the Hub: {reason}") from None


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes, first and last MiB of a member's files. A change in the middle of
    a larger file is not detected; weights of another training differ everywhere."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MEMBER_FILES for path in folder.glob(pattern)):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} ".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def devices_of(count: int, args: argparse.Namespace) -> list[str]:
    """The devices of --device, or the GPUs in turn. Processes of torchrun take different ones."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{(local * count + m) % gpus}" if gpus else "cpu" for m in range(count)]
    if args.device:
        devices = args.device * count if len(args.device) == 1 else args.device
    if len(devices) != count:
        raise ValueError(f"--device must name one device or one per member, got {len(devices)}")
    for device in devices:
        train_toy.check_device(device)
    return devices


@dataclass(frozen=True)
class Setup:
    """Everything needed to decode a benchmark."""

    task: str
    members: list[Any]
    codecs: dict[str, Any]  # each member's own, with its chat template
    config: tie.Config
    args: argparse.Namespace

    @classmethod
    def load(cls, task: str, folders: dict[str, Path], config: tie.Config, args: Any) -> Setup:
        devices = devices_of(len(folders), args)
        codecs = {name: mdlm.load_codec(folder) for name, folder in folders.items()}
        shared: dict[tuple, Any] = {}  # one codec per vocabulary: its ids are relayed as they are
        dtype = getattr(torch, args.dtype) if args.dtype else None
        members = []
        for (name, folder), device in zip(folders.items(), devices):
            codec = shared.setdefault(codecs[name].key, codecs[name])
            model, _ = mdlm.load(folder, device, dtype)
            members.append(tie.Member(model, codec.mask_id, codec.eos_id, name, codec))
        return cls(task, members, codecs, config, args)

    def canvas(self, member: Any, questions: list[Question]) -> tie.Canvas:
        """Questions in the member's own chat template, with the benchmark's lengths."""
        benchmark = BENCHMARKS[self.task]
        codec = self.codecs[member.name]
        suffix = codec.encode(benchmark.suffix)
        return tie.Canvas.blank(
            [codec.encode_prompt(question.prompt) for question in questions],
            suffix,
            benchmark.length - len(suffix) - benchmark.answer_length,
            benchmark.answer_length,
            mask_id=codec.mask_id,
            pad_id=codec.pad_id,
            device=member.denoise.embed.weight.device,
        )

    def decode(self, questions: list[Question]) -> list[dict]:
        """The records of one batch."""
        members = self.members
        canvases = [self.canvas(member, questions) for member in members]
        if self.args.cache:
            members = [replace(m, denoise=mdlm.Cached(m.denoise, self.args.cache)) for m in members]

        def text(m: int, ids: list[int]) -> str:
            until_eos = list(takewhile(lambda i: i not in members[m].eos_ids, ids))
            return members[m].codec.decode(until_eos).decode(errors="replace")

        def grade(question: Question, answer: str) -> tuple[str, bool]:
            return benchmarks.grade(self.task, question, answer, self.args.run_code)

        return decode(members, canvases, self.config, questions, text, grade)


class Records:
    """Records of one method as JSON lines. Processes started by torchrun write a file each."""

    def __init__(self, out: Path, method: str):
        self.rank = int(os.environ.get("RANK", "0"))
        self.out = out
        self.method = method.replace(" ", "-")
        self.file = (out / f"{self.method}.{self.rank}.jsonl").open("a+b")
        lock(self.file)
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # drop a line that was cut short

    def read(self) -> dict[str, dict]:
        lines = []
        for path in self.out.glob(f"{self.method}.*.jsonl"):
            lines += path.read_text().split("\n")[:-1]
        return {record["id"]: record for record in map(json.loads, lines)}

    def add(self, records: list[dict]) -> None:
        self.file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self.file.flush()


def lock(file: Any) -> None:
    """Lock a file of records: two commands that write to it would decode everything twice."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{file.name} is in use by another command: wait, or choose another --out"
        raise ValueError(message) from None


def keep_settings(out: Path, settings: dict) -> None:
    """Write settings.json, or refuse a folder that holds results of other settings."""
    path = out / "settings.json"
    if any(file.stat().st_size for file in out.glob("*.jsonl")):
        kept = json.loads(path.read_text())["settings"]
        differ = ", ".join(name for name in settings if settings[name] != kept.get(name))
        if differ:
            raise ValueError(
                f"{out} contains results with different {differ}: choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps({"settings": settings, "versions": versions()}, indent=1))


def run_benchmark(task: str, args: argparse.Namespace) -> None:
    """Decode and grade a benchmark, and report the result."""
    benchmark = BENCHMARKS[task]
    questions = benchmarks.load(task, args.data)[: args.limit]
    # If grading doesn't work here, fail before decoding.
    benchmarks.grade(task, questions[0], "1", args.run_code)
    interval = benchmark.interval(args.score)
    config = config_of(args, interval, answer_window=benchmark.answer_window, score=args.score)
    folders = {name: member_folder(given) for name, given in args.members}
    asked = json.dumps([asdict(question) for question in questions])
    settings = {
        "task": task,
        "members": [[name, fingerprint(folder)] for name, folder in folders.items()],
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "single": args.single,
        "config": asdict(config),
        "dtype": args.dtype,
        "cache": args.cache,
        "batch_size": args.batch_size or 8,  # the tokens can depend on it in bfloat16
    }
    out = args.out or Path("results", task)
    keep_settings(out, settings)
    ensemble = "post-generation" if config.interval >= benchmark.length else f"tie {config.score}"
    methods = [f"member {name}" for name in folders] if args.single else [ensemble]
    records = {method: Records(out, method) for method in methods}
    setup = Setup.load(task, folders, config, args)
    found = {}
    for m, method in enumerate(methods):
        members = [setup.members[m]] if args.single else setup.members
        share = replace(setup, members=members)
        found[method] = decode_share(share, questions, records[method])
    missing = sum(question.id not in own for question in questions for own in found.values())
    if missing:
        print(f"{missing} records are missing: other processes are still at work", file=sys.stderr)
        return
    runs = {method: Run([own[q.id] for q in questions]) for method, own in found.items()}
    title = f"{len(questions)} questions, n = {config.interval}, accuracy %"
    figures = zip(PAPER_METHODS, benchmark.table_3 + benchmark.table_4)
    paper = {name: (figure,) for name, figure in figures}
    table = Table(title, result_rows(runs, list(folders)), {}, paper)
    summary = report(args, settings, {task: [table]}, len(questions))
    write(out / "summary.json", json.dumps(summary, indent=1))


def decode_share(setup: Setup, questions: list[Question], records: Records) -> dict[str, dict]:
    """Decode this process's share of the questions without a record. Returns the records of all
    processes by question id. They are complete for the last process to finish."""
    done = records.read()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = questions[records.rank :: world]
    todo = [question for question in share if question.id not in done]
    size = setup.args.batch_size or 8
    with tqdm(total=len(todo), desc=records.method, unit="question", disable=None) as bar:
        for i in range(0, len(todo), size):
            batch = todo[i : i + size]
            records.add(setup.decode(batch))
            bar.update(len(batch))
    return records.read()


# --- command line ---------------------------------------------------------------------------------


def config_of(args: argparse.Namespace, interval: int, **settings: Any) -> tie.Config:
    names = ("block_size", "top_k", "threshold", "stop_at_eos")
    given = {name: getattr(args, name) for name in names}
    given["interval"] = interval if args.interval is None else args.interval
    return tie.Config(**given, **settings)


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def report(
    args: argparse.Namespace, settings: dict, tables: dict[str, list[Table]], problems: int
) -> dict:
    """Print tables of one or several training seeds, as text or as one JSON object; return the
    object."""
    data = {name: as_data(own) for name, own in tables.items()}
    found = {"settings": settings, "versions": versions(), "problems": problems, "tables": data}
    if args.json:
        print(json.dumps(found))
    else:
        for name, table in data.items():
            show_table(name, table, problems)
    return found


def run_toy(args: argparse.Namespace) -> None:
    workers = (os.cpu_count() or 1) if args.device in (None, ["cpu"]) else 1
    with train_toy.pool(workers) as pool:
        toys = [Toy(args, seed, pool) for seed in range(args.seed, args.seed + args.seeds)]
        if "trace" in args.what:
            show_traces(toys[0])
        if "figures" in args.what:
            folder = args.out or Path("figures")
            folder.mkdir(parents=True, exist_ok=True)
            for name, draw in FIGURES.items():
                draw(toys[0]).savefig(folder / name, dpi=200)
                print(f"drawn: {folder / name}")
        names = [name for name in args.what if name in TABLES]
        tables = {name: [TABLES[name](toy) for toy in toys] for name in names}
    if tables:
        settings: dict[str, Any] = {name: str(value) for name, value in vars(args).items()}
        settings |= {"config": asdict(toys[0].job.config), "training": asdict(toys[0].settings)}
        report(args, settings, tables, args.problems)


def named(text: str) -> tuple[str, str]:
    name, _, folder = text.rpartition("=")
    return name or Path(folder).name, folder


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def make_parser() -> argparse.ArgumentParser:
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="python eval.py [what ...] [option ...]",
        description=about,
        epilog=f"examples:\n{examples}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = f"any of {' '.join(WHAT)}; all: every table of the paper (default: main)"
    parser.add_argument("what", nargs="*", default=["main"], metavar="what", help=what)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--out", type=Path, help="folder for figures or a benchmark's records")

    add = parser.add_argument_group("decoding").add_argument
    add("--interval", type=int, help="steps between relays (default: 4 on the toy, or the paper's)")
    score = "score that chooses the leader, for traces and benchmarks"
    add("--score", default=tie.SCORES[0], choices=tie.SCORES, help=score)
    add("--block-size", type=int, default=16, help="block size of semi-autoregressive decoding")
    add("--top-k", type=int, default=1, help="tokens committed per step")
    add("--threshold", type=float, help="commit every token above this probability, at least one")
    stop = "end a row at its answer's first EOS, once nothing before it is masked"
    add("--stop-at-eos", action="store_true", help=stop)
    cache = "cache keys and values, recomputing them every R forward passes (approximate)"
    add("--cache", type=count, metavar="R", help=cache)
    add("--batch-size", type=count, help="questions per batch (default: 32 on the toy, else 8)")
    device = "one device, or one per member (default: CPU for the toy, else the GPUs in turn)"
    add("--device", nargs="+", help=device)
    dtype = "type of the weights (default: the toy's own, else bfloat16 on CUDA, float32 on CPU)"
    add("--dtype", choices=("float32", "bfloat16"), help=dtype)

    add = parser.add_argument_group("the toy").add_argument
    add("--problems", type=count, help="test problems (default: 400 for main and trace, else 1000)")
    add("--problem-seed", type=int, default=0, help="seed that draws the test problems")
    add("--seed", type=int, default=0, help="first training seed")
    add("--seeds", type=count, default=1, help="average tables over this many training seeds")
    add("--steps", type=int, default=train_toy.Settings.steps, help="training steps")
    add("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of the members")
    add("--count", type=count, default=1, help="show this many traces")
    unsolved = "trace only problems that TIE solves and no member solves alone"
    add("--unsolved", action="store_true", help=unsolved)

    add = parser.add_argument_group("benchmarks").add_argument
    members = "LLaDA, Dream and relatives: folders, or names on the Hugging Face Hub"
    add("--members", nargs="+", type=named, default=[], metavar="NAME=FOLDER", help=members)
    add("--data", type=Path, help="the benchmark's file, as its owners publish it")
    limit = "use only the first N questions (must not change for a given --out)"
    add("--limit", type=count, metavar="N", help=limit)
    add("--single", action="store_true", help="evaluate each member alone, not the ensemble")
    run_code = "run the code that models write, in bubblewrap ('unconfined': without it)"
    modes = ("confined", "unconfined")
    add("--run-code", nargs="?", const="confined", choices=modes, help=run_code)
    return parser


WHAT = [*TABLES, "all", "trace", "figures", *BENCHMARKS]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Options that don't apply are ignored, unless that would mislead."""
    parser = make_parser()
    args = parser.parse_args(argv)
    unknown = [name for name in args.what if name not in WHAT]
    args.what = [name for given in args.what for name in (PAPER if given == "all" else [given])]
    tasks = [name for name in args.what if name in BENCHMARKS]
    tables = [name for name in args.what if name in TABLES]
    names = [name for name, _ in args.members]
    for wrong, message in (
        (unknown, f"what must be any of {' '.join(WHAT)}, got {' '.join(unknown)}"),
        (tasks and len(args.what) > 1, "a benchmark must be run alone"),
        (tasks and not (names and args.data), "a benchmark needs --members and --data"),
        (names and not tasks, "--members is for benchmarks: name one"),
        (len({*names}) < len(names), f"--members must have different names, got {names}"),
        (len(names) == 1 and not args.single, "an ensemble needs two members: add one or --single"),
        (tables and args.score != tie.SCORES[0], "tables show every score: leave out --score"),
        (args.json and {"trace", "figures"} & {*args.what}, "--json is for tables and benchmarks"),
    ):
        if wrong:
            parser.error(message)
    if args.problems is None:
        args.problems = 400 if {*args.what} <= {"main", "trace"} else 1000
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.what[0] in BENCHMARKS:
            run_benchmark(args.what[0], args)
        else:
            run_toy(args)
    except (ValueError, OSError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
