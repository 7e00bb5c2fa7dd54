"""The experiments: TIE against its members and the post-generation ensemble, on toy models and on real checkpoints.

Examples:
    python eval.py                                   train toy members once, then the main table (paper: Tables 3 and 5)
    python eval.py --trace 3 --unsolved              three decodings, round by round, of what no member solves alone
    python eval.py --problems 300 --json             one JSON object on stdout
    python eval.py --seed 1 --out results/seed1      records on disk; the same command goes on after an interruption
    python eval.py --table 1 6 9                     tables of the paper on the toy, its own figures beside ours
    python eval.py --table all --seeds 3 --out results   all of them, over three trainings
    python eval.py --figure figures                  Fig. 1, Fig. 3 and the trace of one decoding as PNG
    python eval.py --members llada=GSAI-ML/LLaDA-1.5 dream=Dream-v0-Instruct-7B --task gsm8k --data test.jsonl
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # in the seconds that the import of torch takes, Ctrl-C ends this without a traceback
    at_start = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import copy
import csv
import errno
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections import defaultdict
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

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
Record = dict[str, Any]  # a question's: id, gold, answers, correct, texts, winner, leaders, scores, tcc, top1, forwards

# --- decoding questions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    prompt: str
    gold: Any  # letter, number or LaTeX as text; {"numbers", "target"}; for code what its tests need


@dataclass(frozen=True)
class Setup:
    """What it takes to decode and grade questions with M members."""

    members: list[tie.Member]
    canvases: Callable[[list[Question]], list[tie.Canvas]]  # questions -> one canvas a member
    text: Callable[[int, list[int]], str]  # member, ids of its answer region -> text of the answer
    grade: Callable[[Question, str], tuple[str, bool]]  # question, text of the answer region -> answer, right?


@torch.inference_mode()  # beside tie's own no_grad: a few per cent faster
def decode_questions(setup: Setup, config: tie.Config, questions: list[Question]) -> list[Record]:
    """Decode one batch and grade every candidate; one record a question."""

    def finite(values: torch.Tensor) -> list[float | None]:  # JSON knows no infinity, and NaN no better
        return [x if math.isfinite(x) else None for x in values.tolist()]

    result, records = tie.ensemble(setup.members, setup.canvases(questions), config), []
    for b, question in enumerate(questions):
        regions = [(c.tokens[b, c.reasoning].tolist(), c.tokens[b, c.answer].tolist()) for c in result.candidates]
        texts = [[setup.text(m, ids) for ids in region] for m, region in enumerate(regions)]
        answers, correct = zip(*[setup.grade(question, answer) for _, answer in texts])
        records.append({
            "id": question.id, "gold": question.gold, "answers": answers, "correct": correct, "texts": texts,
            "winner": int(result.winner[b]), "leaders": [m for m in result.leaders[:, b].tolist() if m >= 0],
            "tcc": finite(result.tcc[:, b]), "forwards": result.forwards,
            "scores": [finite(relay) for relay in result.scores[:, :, b]], "top1": finite(result.top1[:, b]),
        })  # fmt: skip
    return records


# --- records on disk ----------------------------------------------------------------------------------


def check_record(record: Record, members: int) -> None:
    """ValueError, TypeError or KeyError unless `decode_questions` could have written it for so many members."""
    json.dumps(record, allow_nan=False)  # ValueError for what is no JSON number
    maybe = (float, type(None))
    kinds = {"answers": (str,), "correct": (bool,), "texts": (list,), "top1": maybe,
             "tcc": maybe if members == 1 else (float,)}  # fmt: skip
    by_member = [(record[key], kind) for key, kind in kinds.items()] + [(relay, maybe) for relay in record["scores"]]
    if not (
        type(record["id"]) is str and type(record["forwards"]) is float and "gold" in record
        and all(type(m) is int and 0 <= m < members for m in [record["winner"], *record["leaders"]])
        and all(type(own) is list and len(own) == members for own, _ in by_member)
        and all(type(value) in kind for own, kind in by_member for value in own)
    ):  # fmt: skip
        raise ValueError("not what was written")


class Records:
    """JSON lines, one a question, appended batch by batch, one file per process; only in memory if folder is None. A
    line that an interruption cut short is dropped. ValueError if any other is no record."""

    def __init__(self, folder: Path | None, name: str, members: int, rank: int = 0):
        self.folder, self.name, self.members = folder, name.replace(" ", "-"), members
        self.path = folder / f"{self.name}.{rank}.jsonl" if folder else None
        self.done = dict[str, Record]()
        self.read()
        if self.path and self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> None:
        """Add what every process has written so far; a file put aside has another name."""
        for path in sorted(self.folder.iterdir()) if self.folder else []:
            if not re.fullmatch(rf"{re.escape(self.name)}\.\d+\.jsonl", path.name):
                continue
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
                try:
                    check_record(record := json.loads(line), self.members)
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise ValueError(f"{path}, line {number}, is no record: move the file away to start anew") from None
                self.done[record["id"]] = record

    def add(self, records: Iterable[Record]) -> None:
        new = {record["id"]: record for record in records if record["id"] not in self.done}
        self.done |= new
        if self.path and new:
            with file_errors("write", self.path), self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in new.values()))


@contextmanager
def file_errors(verb: str, path: Path) -> Iterator[None]:
    """An error while a file is written would not say which."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot {verb} {path}: {error.strerror}; mend that, and the same command goes on") from None


def write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")  # each of several processes writes its own
    with file_errors("write", path):
        part.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(part, path)


def open_results(folder: Path | None, settings: dict, prints: dict[str, str], free: Sequence[str] = ()) -> None:
    """Make the folder and write settings.json; ValueError if records of other settings, but for the free ones, are
    there, or of other fingerprints. Fingerprints of members that this call does not name stay."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, kept = folder / "settings.json", dict[str, str]()
    if any(folder.glob("*.jsonl")):
        try:
            read = json.loads(path.read_bytes())
            earlier, kept = {**read["settings"]}, {**read["fingerprints"]}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path} is missing or damaged: move the records beside it away to start anew") from None
        now = json.loads(json.dumps(settings))
        other = [key for key in now if key not in free and earlier.get(key) != now[key]]
        other += [key for key in prints if kept.get(key, prints[key]) != prints[key]]
        if other:
            told = ", ".join(dict.fromkeys(other))  # of other "questions" both number and fingerprint may differ
            raise ValueError(f"{folder} holds results that differ in {told}: give another --out")
    write_json(path, {"settings": settings, "fingerprints": kept | prints, **environment()})


def environment() -> dict:
    """Versions and hardware, for the record."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    hardware = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "gpus": gpus}
    return {"versions": versions, "hardware": hardware}


MEMBER_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json",
                "tokenizer_config.json", "vocab.json", "merges.txt"]  # fmt: skip


def fingerprint(source: list[Question] | Path) -> str:
    """Of questions, or of the files that a member is read from: their names, sizes, first and last MiB. A change in the
    midst of a larger file goes unseen; weights of another training differ everywhere."""
    if isinstance(source, list):
        return hashlib.sha256(json.dumps([(q.id, q.prompt, q.gold) for q in source]).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MEMBER_FILES for path in source.glob(pattern) if path.is_file()):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


# --- figures of merit ---------------------------------------------------------------------------------


@dataclass
class Method:
    """What a way to answer got right, and what it costs."""

    correct: np.ndarray  # (problems,) bool
    forwards: float | None  # sequences forwarded a problem
    change_rate: float | None = None  # share of relays whose leader differs from the relay before (Table 5)


class Run(Method):
    """The records of all problems, decoded by M members under one setting; as a method, its winners."""

    def __init__(self, records: list[Record], names: Sequence[str]):
        self.records, self.names = records, tuple(names)
        self.right = np.array([r["correct"] for r in records], dtype=bool).reshape(-1, len(names))  # (problems, M)
        self.correct = np.array([r["correct"][r["winner"]] for r in records], dtype=bool)
        self.forwards = float(np.mean([r["forwards"] for r in records])) if records else None
        changes = [a != b for r in records for a, b in itertools.pairwise(r["leaders"])]
        self.change_rate = sum(changes) / len(changes) if changes else None

    def pick(self, correct: Any, candidates: int) -> Method:
        """Other answers of this run, which need only so many of its M candidates."""
        forwards = self.forwards and self.forwards * candidates / len(self.names)
        return Method(np.array(correct, dtype=bool), forwards)

    def of(self, member: str) -> Method:
        return self.pick(self.right[:, self.names.index(member)], 1)

    @property
    def best(self) -> str:
        """The member that is best on these very problems: the hardest rival."""
        return self.names[self.right.sum(0).argmax()]

    @property
    def oracle(self) -> Method:
        return self.pick(self.right.any(1), len(self.names))

    def vote(self, count: int) -> Method:
        """The most frequent of the first answers; of equally frequent ones that of lowest C~."""
        right = []
        for r in self.records:
            answers = r["answers"][:count]
            first = min(range(count), key=lambda m: (-answers.count(answers[m]), r["tcc"][m]))
            right.append(r["correct"][first])
        return self.pick(right, count)

    def tcc(self, member: str) -> dict[str, np.ndarray]:
        """C~(T) of a member, where nothing is relayed, for its correct and its incorrect answers."""
        m = self.names.index(member)
        counts = np.array([r["tcc"][m] for r in self.records])  # (problems,)
        return {"correct": counts[self.right[:, m]], "incorrect": counts[~self.right[:, m]]}


def proportion(flags: Sequence[bool] | np.ndarray) -> dict:
    """The share of flags that are true, with its 95 % Wilson interval; None if there are no flags."""
    values = np.array(flags, dtype=float)
    if not (n := len(values)):
        return {"value": None, "ci95": None, "n": 0}
    p, z = values.mean(), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))  # rounding may step outside [0, 1]
    return {"value": float(p), "ci95": [max(0.0, float(low)), min(1.0, float(high))], "n": n}


def estimate(statistic: Callable, *groups: np.ndarray) -> dict:
    """A statistic of independent groups with its 95 % bootstrap interval over their rows; None if a group is empty."""
    if not all(len(group) for group in groups):
        return {"value": None, "ci95": None, "n": len(groups[0])}
    dice = np.random.default_rng(0)
    draws = [statistic(*(group[dice.integers(len(group), size=len(group))] for group in groups)) for _ in range(2000)]
    interval = [float(x) for x in np.percentile(draws, [2.5, 97.5])]
    return {"value": float(statistic(*groups)), "ci95": interval, "n": len(groups[0])}


def above(measured: dict, constant: float = 0.0) -> dict:
    """How far a measured value lies above a constant, as a comparison."""
    value, ci = measured["value"], measured["ci95"]
    return {"difference": value if value is None else value - constant, "ci95": ci and [x - constant for x in ci]}


def difference(ours: Method, theirs: Method) -> dict:
    """Mean difference over the same questions, with a 95 % bootstrap interval over questions."""
    return above(estimate(np.mean, ours.correct.astype(int) - theirs.correct))


def verdict(comparisons: Iterable[dict]) -> str:
    """On the claim that every difference is positive: "does not hold" if any interval lies below 0, "holds" if all lie
    above, else "undecided"."""
    intervals = [comparison["ci95"] for comparison in comparisons]
    if any(ci and ci[1] < 0 for ci in intervals):
        return "does not hold"
    return "holds" if all(ci and ci[0] > 0 for ci in intervals) else "undecided"


# --- tables: data, one way to print them, one way to average them over training seeds -----------------


class Table:
    """As `--json` has it: shares are fractions, the paper's figures as it prints them."""

    def __init__(self, title: str, rows: dict[str, Any], claims: dict[str, dict[str, dict]], paper: dict | None = None,
                 unit: str = "%", forwards: bool = False):  # fmt: skip
        """Rows: a method or an estimate a column, or a method alone. Claims: the differences that decide, by name.
        For print: the unit of the values, and whether the forwards that they took stand beside them."""
        self.title, self.cells, self.claims = title, list[dict[str, Any]](), list[dict[str, Any]]()
        self.unit, self.forwards = unit, forwards
        for row, own in rows.items():
            for column, entry in (own if isinstance(own, dict) else {"accuracy": own}).items():
                if isinstance(entry, Method):
                    entry = {**proportion(entry.correct), "forwards": entry.forwards}
                self.cells.append({"row": row, "column": column, **entry})
        columns = dict.fromkeys(own["column"] for own in self.cells)
        self.paper = [{"row": f"paper, {row}", "column": column, "value": value}
                      for row, values in (paper or {}).items() for column, value in zip(columns, values)]  # fmt: skip
        for claim, own in claims.items():
            comparisons = [{"name": name, **own[name]} for name in own]
            self.claims.append({"claim": claim, "verdict": verdict(comparisons), "comparisons": comparisons})


def average(tables: list[Table]) -> Table:
    """Mean and standard deviation over training seeds in place of each value, a count in place of each verdict."""

    def spread(key: str, own: Sequence[dict]) -> dict:
        values = [entry[key] for entry in own if entry.get(key) is not None]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {key: float(np.mean(values)) if values else None, "sd": sd, "values": [entry.get(key) for entry in own]}

    mean = copy.copy(tables[0])
    mean.cells, mean.claims = [], []
    for first, *more in zip(*(table.cells for table in tables)):
        place = {"row": first["row"], "column": first["column"]}
        forwards = spread("forwards", [first, *more])["forwards"]
        mean.cells.append({**place, "forwards": forwards, **spread("value", [first, *more])})
    for own in zip(*(table.claims for table in tables)):
        each = [claim["verdict"] for claim in own]
        counted = ", ".join(f"{word} with {each.count(word)} of {len(each)} seeds" for word in dict.fromkeys(each))
        by_name = zip(*(claim["comparisons"] for claim in own))
        differences = [{"name": c[0]["name"], **spread("difference", c)} for c in by_name]
        mean.claims.append({"claim": own[0]["claim"], "verdict": counted, "comparisons": differences})
    return mean


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def figure(entry: dict[str, Any], key: str, unit: str = "%") -> str:
    """A value, with a sign if it is a difference, and its interval or its standard deviation over seeds."""

    def form(value: float, sign: str) -> str:
        return f"{100 * value:{sign}.1f}" if unit == "%" else f"{value:{sign}.2f}"

    if entry[key] is None:
        return "no sample"
    sign = "+" if key == "difference" else ""
    interval = f" [{', '.join(form(x, sign) for x in entry['ci95'])}]" if entry.get("ci95") else ""
    return form(entry[key], sign) + interval + (f" ± {form(entry['sd'], '')}" if entry.get("sd") is not None else "")


def show_grid(corner: str, rows: dict[str, dict[str, str]]) -> None:
    """Rows of texts by column."""
    columns = [*dict.fromkeys(column for texts in rows.values() for column in texts)]
    lines = [[corner, *columns]]
    lines += [[row, *(texts.get(column, "") for column in columns)] for row, texts in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def show_table(name: str, table: Table, problems: int) -> None:
    """Rows and columns as in the paper, its own figures below ours; then whether ours bear out its findings."""
    print(f"\n{f'Table {name}' if name.isdigit() else 'Beyond the paper'}: {table.title}")
    grid = defaultdict[str, dict[str, str]](dict)
    for own in table.cells:
        text = figure(own, "value", table.unit)
        text += f" / {own['forwards']:.1f}" if table.forwards and own["forwards"] is not None else ""
        text += f" n={own['n']}" if own.get("n", problems) != problems else ""
        grid[own["row"]][own["column"]] = text
    for own in table.paper:
        grid[own["row"]][own["column"]] = f"{own['value']:g}"
    show_grid("", grid)
    for claim in table.claims:
        said = "; ".join(f"{c['name']}: {figure(c, 'difference', table.unit)}" for c in claim["comparisons"])
        print(textwrap.fill(f"{claim['claim']}: {claim['verdict']} ({said})", 120, subsequent_indent="    "))


# --- the toy: members of one training seed, and all that is decoded with them -------------------------


@dataclass(frozen=True)
class Job:
    """Toy problems, and all that it takes to decode them in any process."""

    folder: Path
    names: tuple[str, ...]
    config: tie.Config
    problems: tuple[train_toy.Problem, ...]
    device: str
    dtype: str | None  # of the weights; None: as stored
    cache: int | None = None  # forwards between two that compute all keys and values anew; None: every one
    temperature: float = 0.0  # sample at this temperature instead of decoding greedily
    restart: tuple[str, int] | None = None  # start from what this member alone has after so many steps (Table 2)

    def questions(self) -> list[Question]:
        return [Question(p.prompt, p.prompt, p.answer) for p in self.problems]

    def member(self, name: str, place: int = 0) -> tie.Member:
        """The member of this name; copies at other places among the members differ where they sample."""
        model, config = mdlm.load(self.folder / name, self.device, DTYPES[self.dtype])
        denoise: tie.Denoiser = mdlm.Cached(model, self.cache) if self.cache else model
        if self.temperature:
            seed = zlib.crc32(f"{place} {self.problems[0].prompt}".encode())
            denoise = sampling(denoise, self.temperature, seed)
        return tie.Member(denoise, config.mask_id, config.eos_id, name)

    def canvas(self, questions: list[Question]) -> tie.Canvas:
        canvas = train_toy.canvas([q.prompt for q in questions], self.device)
        if self.restart is None:
            return canvas
        states: list[dict] = []
        alone = replace(self.config, interval=self.restart[1])
        tie.ensemble([self.member(self.restart[0])], [canvas], alone, states.append)
        return replace(canvas, tokens=states[0]["tokens"][0], masked=states[0]["masked"][0])

    def setup(self) -> Setup:
        members = [self.member(name, place) for place, name in enumerate(self.names)]
        return Setup(members, canvases=lambda questions: [self.canvas(questions)] * len(members),
                     text=lambda m, ids: train_toy.decode(ids),
                     grade=lambda question, answer: (answer, answer == question.gold))  # fmt: skip


def decode_job(job: Job) -> list[Record]:
    torch.set_num_threads(1)  # the jobs share the cores
    return decode_questions(job.setup(), job.config, job.questions())


def sampling(denoise: tie.Denoiser, temperature: float, seed: int) -> tie.Denoiser:
    """With Gumbel noise on the logits the greedy choice is a sample at the temperature. The noise reaches the order of
    unmasking too, since that follows the same logits."""
    dice = torch.Generator().manual_seed(seed)

    def noisy(tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits = denoise(tokens, positions, mask)  # (B, K, V)
        exponential = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=dice)  # (B, K, V)
        return logits / temperature - exponential.log().to(logits.device)

    return noisy


class Toy:
    """The members of one training seed; what they decode is kept, in memory and under --out."""

    def __init__(self, args: argparse.Namespace, training: train_toy.Settings, pool: Callable[..., Iterator]):
        self.args, self.training, self.pool, self.runs = args, training, pool, dict[Job, Run]()
        self.out = args.out / f"seed{training.seed}" if args.out and args.seeds > 1 else args.out
        self.names, folder = tuple(train_toy.NAMES[:2]), args.checkpoints / f"toy-seed{training.seed}"
        count = args.problems if args.unsolved or not args.trace else args.trace
        problems, config = train_toy.problems("test", count, args.problem_seed), config_of(args, TOY_INTERVAL)
        self.plain = Job(folder, self.names, config, tuple(problems), args.device[0], args.dtype, args.cache)
        self.settings = {"task": "toy", "members": self.names, "device": args.device[0]}
        kept = "problems", "problem_seed", "batch_size", "dtype", "cache"
        self.settings |= {name: getattr(args, name) for name in kept}
        self.settings |= {"config": asdict(config), "training": asdict(training)}
        self.prints = {"questions": fingerprint(self.plain.questions())}
        open_results(self.out, self.settings, self.prints)

    def train(self, plan: train_toy.Plan | None = None) -> list[dict]:
        """Those of the plan, by default the first two, that are not trained yet; the records of their training."""
        plan, folder = plan or train_toy.plan_members(self.training), self.plain.folder
        records = train_toy.train_members(plan, folder, self.plain.device)
        self.prints |= {f"weights of {name}": fingerprint(folder / name) for name in plan}
        open_results(self.out, self.settings, self.prints)
        return records

    @functools.cached_property
    def ranked(self) -> list[str]:
        """The two members, the one first that is better on the validation problems of their training."""
        accuracies = {name: record["validation_accuracy"] for name, record in zip(self.names, self.train())}
        return sorted(self.names, key=lambda name: -accuracies[name])

    def job(
        self, members: Sequence[str] | None = None, *, problems: Iterable[train_toy.Problem] | None = None,
        restart: tuple[str, int] | None = None, temperature: float = 0.0, cache: int | None = None, **config: Any,
    ) -> Job:  # fmt: skip
        """By default of the first two members, all problems, and the command's own settings."""
        names, settings = tuple(members or self.names), replace(self.plain.config, **config)
        chosen = self.plain.problems if problems is None else tuple(problems)
        return replace(self.plain, names=names, config=settings, problems=chosen, restart=restart,
                       temperature=temperature, cache=cache or self.plain.cache)  # fmt: skip

    def run(self, members: Sequence[str] | None = None, **changes: Any) -> Run:
        """What the `job` of these arguments gives, decoded on first use, over all cores: equal settings are one run."""
        job = self.job(members, **changes)
        if job not in self.runs:
            self.runs[job] = Run(self.decode(job), job.names)
        return self.runs[job]

    def decode(self, job: Job) -> list[Record]:
        """Records of the job's problems, in their order: what is under --out, and the rest."""
        title, size = self.title(job), self.args.batch_size
        file = Records(self.out, title, len(job.names))
        batches = [replace(job, problems=job.problems[i : i + size]) for i in range(0, len(job.problems), size)]
        todo = [batch for batch in batches if any(p.prompt not in file.done for p in batch.problems)]
        with tqdm(total=sum(len(batch.problems) for batch in todo), desc=title, unit="problem", disable=None) as bar:
            for records in self.pool(decode_job, todo) if todo else ():
                file.add(records)
                bar.update(len(records))
        return [file.done[p.prompt] for p in job.problems]

    def title(self, job: Job) -> str:
        """Members, and what differs from the command's own settings; the name of a file."""
        own = ("temperature", "restart", "cache")
        settings = [{**vars(x.config), **{key: getattr(x, key) for key in own}} for x in (job, self.plain)]
        parts = [f"{key}={value}" for key, value in settings[0].items() if value != settings[1][key]]
        return re.sub(r"[^\w.=-]+", "-", " ".join(["-".join(job.names), *parts]))

    def relay_solves(self) -> list[train_toy.Problem]:
        """The problems that no member solves alone and TIE does."""
        solved = self.run().correct & ~self.run(interval=T).oracle.correct
        return [*itertools.compress(self.plain.problems, solved)]


# --- the tables, in the paper's order, and those beyond it --------------------------------------------

T = train_toy.REASONING_LENGTH + train_toy.ANSWER_LENGTH  # steps at one token a step; with n >= T nothing is relayed
TOY_INTERVAL = 2  # n
METHODS: dict[str, dict] = {"post-generation": {"interval": T}, **{f"tie {s}": {"score": s} for s in tie.SCORES}}
TCC, *LOGIT = [name for name in METHODS if name != "post-generation"]
SIZES = range(1, 5)  # M
TEMPERATURE = 0.25  # of samples; the best of 0.25, 0.5, 1 on validation problems


def table_1(toy: Toy) -> Table:
    alone, rows, gaps = toy.run(interval=T, normalize=False), {}, {}
    for name in toy.names:
        counts = alone.tcc(name)
        rows[f"member {name}"] = {label: estimate(np.mean, own) for label, own in counts.items()}
        gap = estimate(lambda right, wrong: wrong.mean() - right.mean(), *counts.values())
        gaps[f"member {name}, incorrect - correct"] = above(gap)
    claims = {"The answer tokens change more often where the answer is incorrect": gaps}
    paper = {"LLaDA, MMLU": (1.81, 4.27), "Dream, MMLU": (2.32, 6.19)}
    paper |= {"LLaDA, GSM8K": (32.29, 51.48), "Dream, GSM8K": (40.88, 58.07)}
    return Table("token change count C(T) of correct and of incorrect answers", rows, claims, paper, unit="")


def table_2(toy: Toy) -> Table:
    """Each member on what it failed alone and the other solved, from the start of the other's trajectory."""
    starts = {"first 33 %": round(0.33 * T), "first 50 %": round(0.5 * T)}
    starts["all reasoning"] = train_toy.REASONING_LENGTH  # ours
    alone, rows, half = toy.run(interval=T), {}, {}
    for receiver, sender in itertools.permutations(toy.names, 2):
        failed = alone.of(sender).correct & ~alone.of(receiver).correct  # (problems,)
        problems, row = [*itertools.compress(toy.plain.problems, failed)], f"member {receiver}"
        rows[row] = {start: toy.run([receiver], problems=problems, restart=(sender, steps), interval=T)
                     for start, steps in starts.items()}  # fmt: skip
        half[f"{row} - half"] = above(proportion(rows[row]["first 50 %"].correct), 0.5)
    claims = {"Restarted from the first 50 %, a member corrects more than half of what it failed alone": half}
    paper = {"LLaDA, MMLU": (56.43, 65.22), "Dream, MMLU": (68.84, 76.57)}
    paper |= {"LLaDA, GSM8K": (74.66, 72.60), "Dream, GSM8K": (78.63, 80.92)}
    return Table("correction rate after a restart from another member's correct trajectory, %", rows, claims, paper)


def table_3(toy: Toy) -> Table:
    runs = {name: toy.run(**config) for name, config in METHODS.items()}
    after, claims = runs["post-generation"], {}
    for rival, own in {"the best member": after.of(after.best), "post-generation": after}.items():
        differences = {f"{name} - {rival}": difference(runs[name], own) for name in (TCC, *LOGIT)}
        claims[f"TIE is ahead of {rival} with every score"] = differences
    paper = {name: (x,) for name, x in zip(("LLaDA, GSM8K", "Dream, GSM8K", *METHODS), BENCHMARKS["gsm8k"].table_3)}
    rows = {f"member {name}": after.of(name) for name in toy.names} | runs
    return Table("main result, accuracy % / forwards", rows, claims, paper, forwards=True)


def table_5(toy: Toy) -> Table:
    """Intervals by bootstrap over problems, since the relays of one problem are not independent."""
    rows, rates = {}, {}
    for name in (TCC, *LOGIT):
        relays = [r["leaders"] for r in toy.run(**METHODS[name]).records if len(r["leaders"]) > 1]
        counts = np.array([(sum(a != b for a, b in itertools.pairwise(own)), len(own) - 1) for own in relays])
        rate = estimate(lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), counts)  # (problems, 2)
        rows[name] = {"change rate": {**rate, "n": int(counts[:, 1].sum()) if relays else 0}}
        rates[name] = above(rate)
    claims = {"The lead changes between relays with every score": rates}
    return Table("model change rate, % of relays whose leader differs from the relay before", rows, claims)


def table_6(toy: Toy) -> Table:
    after, rows, gained = toy.run(interval=T), {}, {}
    for n, theirs in ((2, 8), (4, 16), (8, 32)):  # n where T = 32, as here, and where T = 256, as in the paper
        rows[f"n = {n}, paper {theirs}"] = run = toy.run(interval=n)
        gained[f"n = {n}"] = difference(run, after)
    claims = {"TIE is ahead of post-generation at every n": gained}
    return Table("ensemble interval n, accuracy %", {**rows, "post-generation": after}, claims)


def table_7(toy: Toy) -> Table:
    speeds: dict[str, dict] = {"one token a step": {}, "threshold 0.9": {"threshold": 0.9}, "top-k 2": {"top_k": 2}}
    rows: dict[str, dict] = {f"member {name}": {} for name in toy.names} | {"post-generation": {}, TCC: {}}
    claims = {}
    for speed, settings in speeds.items():
        run, after = toy.run(**settings), toy.run(interval=T, **settings)
        for name in toy.names:
            rows[f"member {name}"][speed] = after.of(name)
        rows["post-generation"][speed], rows[TCC][speed] = after, run
        rivals = {"the best member": after.of(after.best), "post-generation": after}
        claims[f"TIE is ahead with {speed}"] = {f"TIE - {name}": difference(run, own) for name, own in rivals.items()}
    return Table("accelerated decoding, accuracy % / forwards", rows, claims, forwards=True)


def table_8(toy: Toy) -> Table:
    runs = {"without": toy.run(normalize=False), "with": toy.run()}
    claims = {"Normalisation helps": {"with - without": difference(runs["with"], runs["without"])}}
    paper = {"GSM8K": (82.64, 83.47), "MATH500": (47.8, 48.6)}
    return Table("normalisation of the token change count, accuracy %", {TCC: runs}, claims, paper)


def table_9(toy: Toy) -> Table:
    rows, claims = {}, {}
    for name in LOGIT:
        source, cross = toy.run(cross_model=False, **METHODS[name]), toy.run(**METHODS[name])
        rows[name] = {"source-only": source, "cross-model": cross}
        claims[f"Cross-model scoring helps {name}"] = {"cross-model - source-only": difference(cross, source)}
    paper = {"top-1, GSM8K": (81.35, 82.71), "top-1, MATH500": (42.4, 47.0)}
    return Table("source-only and cross-model scoring, accuracy %", rows, claims, paper)


def table_10(toy: Toy) -> Table:
    run, most = toy.run(), toy.run(selection="most_selected")
    best = toy.run(selection="best_model", best_model=toy.names.index(toy.ranked[0]))
    ahead = {"lowest C~ - best model": difference(run, best), "lowest C~ - most selected": difference(run, most)}
    rows = {TCC: {"lowest C~": run, "best model": best, "most selected": most}}
    title = "final selection, accuracy %; the best model is the best on validation problems"
    return Table(title, rows, {"The lowest C~ selects best": ahead}, {"GSM8K": (83.47, 81.65, 83.17)})


def table_members(toy: Toy) -> Table:
    toy.train(train_toy.plan_members(toy.training, max(SIZES)))
    rows, further, gained = {}, {}, {}
    for m in SIZES:
        after, run = toy.run(train_toy.NAMES[:m], interval=T), toy.run(train_toy.NAMES[:m])
        best = after.of(after.best)
        rows[f"M = {m}"] = {"best member": best, "oracle": after.oracle, "post-generation": after, "TIE": run}
        if m > 1:
            further[f"M = {m} - M = {m - 1}"] = difference(run, rows[f"M = {m - 1}"]["TIE"])
            gained[f"M = {m}"] = difference(run, after)
    claims = {"TIE gains with every further member": further, "TIE is ahead of post-generation": gained}
    return Table("one to four members, their gaps disjoint, accuracy % / forwards", rows, claims, forwards=True)


def table_cost(toy: Toy) -> Table:
    (best, other), twice = toy.ranked, replace(toy.training, steps=2 * toy.training.steps)
    plan = {f"{best}-long": (twice, best), "union": (twice, best + other)}
    toy.train(train_toy.plan_members(toy.training, max(SIZES)) | plan)
    longer = toy.run([f"{best}-long"], interval=T)
    union = toy.run(["union"] * 2, interval=T, temperature=TEMPERATURE).vote(2)
    samples = toy.run([best] * max(SIZES), interval=T, temperature=TEMPERATURE)
    rows = {"best member, greedy": toy.run(interval=T).of(best), "best member, trained twice as long": longer,
            "one member, training and forwards of both": union}  # fmt: skip
    rows |= {f"best member, vote of {m} samples": samples.vote(m) for m in SIZES[1:]}
    runs = {m: toy.run(train_toy.NAMES[:m]) for m in SIZES[1:]}
    votes = {f"M = {m}": difference(run, samples.vote(m)) for m, run in runs.items()}
    two, one = "TIE of two is ahead of", {"TIE - one member": difference(runs[2], union)}
    claims = {
        "TIE is ahead of as many samples of its best member": votes,
        f"{two} the best member trained twice as long": {"TIE - best member": difference(runs[2], longer)},
        f"{two} one member with the training and the forwards of both": one,
    }
    title = "equal cost, TIE against votes over samples of one member, accuracy % / forwards"
    rows |= {f"TIE of {m} members": run for m, run in runs.items()}
    return Table(title, rows, claims, forwards=True)


def table_unequal(toy: Toy) -> Table:
    best, other = toy.ranked
    weak, gaps = f"{other}-weak", min(2 * toy.training.gaps, train_toy.GAPS)
    toy.train({weak: (replace(toy.training, gaps=gaps), other)})
    runs = {name: toy.run([best, weak], **config) for name, config in METHODS.items()}
    better = runs["post-generation"].of(best)
    rows = {"the better member": better, "the weaker one": runs["post-generation"].of(weak)} | runs
    claims = {"TIE is ahead of the better member": {name: difference(runs[name], better) for name in (TCC, *LOGIT)}}
    return Table("a member far weaker than the other, accuracy %", rows, claims)


def with_members(runs: dict[str, Run]) -> dict[str, Method]:
    """The runs, and before them the members alone and their oracle."""
    after = runs["post-generation"]
    return {f"member {name}": after.of(name) for name in after.names} | {"oracle": after.oracle} | runs


def table_cache(toy: Toy) -> Table:
    """Cached decoding, which is an approximation, against the exact one of the same members."""
    exact = {name: toy.run(**config) for name, config in METHODS.items()}
    rows: dict[str, dict] = {name: {"exact": method} for name, method in with_members(exact).items()}
    claims: dict[str, dict[str, dict]] = {}
    for refresh in (2, 4, 8):
        runs, column = {name: toy.run(cache=refresh, **config) for name, config in METHODS.items()}, f"R = {refresh}"
        for name, method in with_members(runs).items():
            rows[name][column] = method
        for name in (TCC, *LOGIT):
            leaders = [[record["leaders"] for record in run[name].records] for run in (exact, runs)]
            rows.setdefault(f"other leaders, {name}", {})[column] = estimate(np.mean, differing(*leaders))
        for name in ("post-generation", TCC):
            texts = [[written(record) for record in run[name].records] for run in (exact, runs)]
            rows.setdefault(f"other tokens, {name}", {})[column] = estimate(np.mean, differing(*texts))
        lost = {name: difference(exact[name], run) for name, run in runs.items()}
        claims[f"Exact decoding is ahead of R = {refresh}"] = lost
        gained = {name: difference(runs[name], runs["post-generation"]) for name in (TCC, *LOGIT)}
        claims[f"TIE is ahead of post-generation with R = {refresh}"] = gained
    return Table("keys and values made anew at every R-th forward, accuracy %", rows, claims)


def differing(ours: Sequence[Sequence], theirs: Sequence[Sequence]) -> np.ndarray:
    """(problems,) share of the entries of each sequence, where it has any, that differ."""
    return np.array([np.mean([a != b for a, b in zip(x, y)]) for x, y in zip(ours, theirs) if x])


def written(record: Record) -> str:
    """The members' candidates, a character a token; EOS, in the reasoning too, and what follows it are blank."""
    return "".join(f"{r:{train_toy.REASONING_LENGTH}}{a:{train_toy.ANSWER_LENGTH}}" for r, a in record["texts"])


PAPER = {"1": table_1, "2": table_2, "3": table_3, "5": table_5, "6": table_6, "7": table_7, "8": table_8, "9": table_9,
         "10": table_10}  # fmt: skip
BEYOND = {"members": table_members, "cost": table_cost, "unequal": table_unequal, "cache": table_cache}


def main_table(runs: dict[str, Run]) -> dict:
    """Rows and comparisons as `--json` has them; also of members alone, where post-generation is among the runs."""
    after, methods = runs.get("post-generation"), dict[str, Method](runs)
    if after:
        methods = with_members(runs)
    rows, comparisons = [], []
    for name, method in methods.items():
        kind, score = ("tie", name[4:]) if name.startswith("tie ") else (name, None)
        own = proportion(method.correct)
        row = {"method": kind, "score": score, "accuracy": own["value"], "ci95": own["ci95"]}
        rows.append({**row, "forwards": method.forwards, "change_rate": method.change_rate})
        if after and score:
            solved = proportion(method.correct[~after.right.any(1)])
            rows[-1]["none_alone"] = {"value": solved["value"], "n": solved["n"]}
    if not after:
        return {"rows": rows, "comparisons": []}
    for name, run in runs.items():
        for rival, theirs in {"best member": after.of(after.best), "post-generation": after}.items():
            if run is not theirs:
                comparisons.append({"name": f"{name} - {rival}", **difference(run, theirs)})
    tcc = []
    for name in after.names:
        means = {label: float(own.mean()) if len(own) else None for label, own in after.tcc(name).items()}
        tcc.append({"member": name, **means})
    return {"rows": rows, "comparisons": comparisons, "best_member": f"member {after.best}", "tcc": tcc}


def show_main(table: dict) -> None:
    """Accuracies in percent, differences in percentage points."""
    said = {c["name"]: figure(c, "difference") for c in table["comparisons"]}
    grid = {}
    for row in table["rows"]:
        name = " ".join(filter(None, (row["method"], row["score"])))
        low, high = map(percent, row["ci95"])
        grid[name] = {"accuracy": percent(row["accuracy"]), "95 % interval": f"[{low}, {high}]"}
        grid[name] |= {f"- {rival}": said.get(f"{name} - {rival}", "") for rival in ("best member", "post-generation")}
        grid[name] |= {"changes": percent(row["change_rate"]), "forwards": f"{row['forwards']:.1f}"}
        if row.get("paper"):
            grid[name]["paper, own setting"] = str(row["paper"])
        if (none := row.get("none_alone")) and none["n"]:
            grid[name][f"of {none['n']} unsolved alone"] = percent(none["value"])
    show_grid("method", grid)
    for t in table.get("tcc", []):
        means = ", ".join(f"{t[label]:.2f} {label}" for label in ("correct", "incorrect") if t[label] is not None)
        print(f"C~(T) of member {t['member']} alone, mean over its answers: {means}")


# --- figures, and the trace of one decoding -----------------------------------------------------------

BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"  # of Okabe and Ito, for the colour-blind


def draw_figure_1(toy: Toy, path: Path) -> None:
    """The three confidences of each member alone after every step, correct and incorrect answers apart."""
    from matplotlib.figure import Figure  # outside pyplot, drawn by Agg

    sheet = Figure(figsize=(7.2, 7.2), layout="constrained")
    panels = sheet.subplots(3, len(toy.names), sharex=True, sharey="row")
    labels = ("mean top-1 probability", "mean entropy (nats)", "mean probability margin")
    for (i, score), (m, name) in itertools.product(enumerate(tie.SCORES[1:]), enumerate(toy.names)):
        # Two copies decode as one would, and are scored at each step; an ensemble of one reads no answer tokens.
        run = toy.run([name, name], score=score, interval=1, cross_model=False)
        scores = np.array([r["scores"] for r in run.records], dtype=float)[..., 0]  # (problems, T - 1)
        curves = np.ma.masked_invalid(-scores if score == "negative_entropy" else scores)  # NaN: no answer token left
        steps = np.arange(1, curves.shape[1] + 1)
        for label, colour, line in (("correct", BLUE, "-"), ("incorrect", RED, "--")):
            own = curves[run.correct == (label == "correct")]
            mean, half = own.mean(0), 1.96 * own.std(0) / np.sqrt(np.maximum(own.count(0), 1))
            panels[i][m].plot(steps, mean, line, color=colour, label=label)
            panels[i][m].fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        right = run.correct.sum()
        panels[0][m].set_title(f"{name} alone: {right} correct, {len(curves) - right} incorrect", fontsize=10)
        panels[-1][m].set_xlabel("decoding step")
        panels[i][0].set_ylabel(labels[i])
    sheet.suptitle("Confidence over the masked answer positions; mean and 95 % band", fontsize=11)
    sheet.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    sheet.savefig(path, dpi=200)


def draw_figure_3(toy: Toy, path: Path) -> None:
    """When the leader changes: of the relays at each place, those whose leader differs from the relay before."""
    from matplotlib.figure import Figure

    sheet, n = Figure(figsize=(7.2, 4.4), layout="constrained"), toy.plain.config.interval
    panel = sheet.subplots()
    looks = (BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (RED, "D:")
    for k, (name, (colour, style)) in enumerate(zip((TCC, *LOGIT), looks)):
        leaders = [r["leaders"] for r in toy.run(**METHODS[name]).records]
        places = range(1, max(map(len, leaders)))
        rates = [proportion([own[i] != own[i - 1] for own in leaders if len(own) > i]) for i in places]
        values = np.array([100 * rate["value"] for rate in rates])  # (places,)
        bars = np.abs(100 * np.array([rate["ci95"] for rate in rates]).reshape(-1, 2).T - values)  # (2, places)
        steps = [n * (i + 1) / T + 0.012 * (k - 1.5) for i in places]  # apart, so that bars can be told
        label = name[4:].replace("_", " ").replace("top1", "top-1")
        panel.errorbar(steps, values, bars, fmt=style, color=colour, markersize=5, elinewidth=0.8, label=label)
    panel.set(xlabel="relative decoding step", ylabel="relays that change the leader (%)", xlim=(0, 1))
    panel.set_ylim(bottom=-1)
    panel.set_title(f"{len(toy.plain.problems)} problems, n = {n}, T = {T}; bars: 95 % intervals", fontsize=11)
    sheet.legend(loc="outside lower center", ncols=2)
    sheet.savefig(path, dpi=200)


@dataclass
class Frame:
    """What one member holds after one of its steps, at the T positions that are decoded."""

    tokens: list[int]  # (T,) the mask id where masked
    authors: list[int]  # (T,) the member whose step committed the token, which travels with a relay; -1 where masked
    answer: list[int]  # (A,) top-1 at the answer positions, or the token itself once committed
    changed: list[bool]  # (A,) whether that changed with this step, as C counts it: a relay begins anew


class Trace:
    """One problem, decoded by each member alone and by TIE step by step: what the terminal and the picture show."""

    def __init__(self, toy: Toy, problem: train_toy.Problem):
        setup, self.config = toy.plain.setup(), toy.plain.config
        canvases = setup.canvases([Question("", problem.prompt, "")])
        self.problem, self.names = problem, toy.names
        alone = [tie.decode(*own, self.config) for own in zip(setup.members, canvases)]
        self.alone = [canvas.tokens[0].tolist() for canvas in alone]  # (M, L)
        self.frames: list[list[Frame]] = [[] for _ in canvases]  # by member and step
        self.rounds: list[tuple[int, list[float], int]] = []  # last step, scores (M), leader: -1 where none is relayed
        self.states: list[tuple] = [(canvas, torch.full_like(canvas.tokens, -1), None) for canvas in canvases]
        noted = replace(self.config, top_k=1, threshold=None, commit=self.commit)
        result = tie.ensemble(setup.members, canvases, noted, self.relay)
        self.tcc, self.final = result.tcc[:, 0].tolist(), self.frames[int(result.winner[0])][-1]
        self.answer = train_toy.decode(self.final.tokens[train_toy.REASONING_LENGTH :])

    def commit(self, reading: tie.Reading) -> torch.Tensor:
        """As `config` has it; what it commits is noted on the way."""
        m = reading.member
        canvas, authors, last = self.states[m]
        after = tie.commit(canvas, reading, self.config)
        new = canvas.masked & ~after.masked  # (1, L)
        authors = authors.masked_fill(new, m)  # (1, L)
        changed = torch.zeros_like(reading.relevant)  # (1, A)
        if last is not None:
            changed = (reading.answer_token != last.answer_token) & last.relevant
        self.states[m] = after, authors, reading
        tokens = after.tokens.masked_fill(after.masked, train_toy.MASK)  # (1, L)
        held, by = (torch.cat([x[0, canvas.reasoning], x[0, canvas.answer]]).tolist() for x in (tokens, authors))
        self.frames[m].append(Frame(held, by, reading.answer_token[0].tolist(), changed[0].tolist()))
        return new.gather(1, reading.positions)

    def relay(self, state: dict) -> None:
        leader = int(state["leader"][0])
        self.rounds.append((state["step"], state["scores"][:, 0].tolist(), leader))
        if leader >= 0:
            canvas, authors, _ = self.states[leader]
            self.states = [(canvas, authors, None) for _ in self.states]


# Of members A and B: a cell in the picture, its token, and the terminal's colour. So that no colour is needed, light on
# dark and dark on light, plain and underlined.
INK = ((BLUE, "white", "38;5;32"), (ORANGE, "black", "4;38;5;172"))


def laid_out(signs: Iterable[str], frame: Frame) -> str:
    """A sign a token, in the layout that people read, and in its author's colour where the terminal has colours."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        pairs = zip(signs, frame.authors)
        signs = [f"\033[{INK[m][2]}m{sign}\033[0m" if m >= 0 else sign for sign, m in pairs]
    rest, layout = iter(signs), train_toy.readable([train_toy.MASK] * train_toy.LENGTH)
    return "".join(next(rest) if place == "_" else place for place in layout)


def show_trace(trace: Trace) -> None:
    """The members alone, `^` where they are wrong; then what each holds after each round, `_` where masked, the answer
    that it would give next, `'` where that changed within the round, its score, and who leads, so is relayed to all."""
    right, signs = train_toy.readable(trace.problem.sequence), train_toy.VOCABULARY
    print(f"\n{trace.problem.prompt:60}next              score\n{'right':>9} {right}")
    for name, ids in zip(trace.names, trace.alone):
        alone = train_toy.readable(ids)
        print(f"{name + ' alone':>9} {alone}")
        print(" " * 10 + "".join(" ^"[a != b] for a, b in zip(alone, right)).rstrip())
    begin = 0
    for step, scores, leader in trace.rounds:
        for m, name in enumerate(trace.names):
            frame, own = trace.frames[m][:step][-1], trace.frames[m][begin:step]
            changed = [any(f.changed[a] for f in own) for a in range(len(frame.answer))]
            answer = "".join(signs[i] + " '"[changed[a]] for a, i in enumerate(frame.answer))
            score = f"{scores[m] + 0.0:6.3f}" if math.isfinite(scores[m]) else ""  # -0.0 reads as 0
            label, leads = name if m else f"step {step:2} {name}", "leads" if m == leader else ""
            print(f"{label:>9} {laid_out((signs[i] for i in frame.tokens), frame)}  {answer} {score}  {leads}".rstrip())
        begin = step
    tcc = ", ".join(f"{name} {count:.3f}" for name, count in zip(trace.names, trace.tcc))
    outcome = "right" if trace.answer == trace.problem.answer else "wrong"
    print(f"      TIE {laid_out((signs[i] for i in trace.final.tokens), trace.final)}  {outcome}; C~(T): {tcc}")
    print(f"       by {laid_out((trace.names[m] for m in trace.final.authors), trace.final)}")


def show_traces(toy: Toy) -> None:
    problems = toy.relay_solves() if toy.args.unsolved else toy.plain.problems
    if not problems:
        raise ValueError("--unsolved: TIE solves none of these problems that no member solves alone; raise --problems")
    for problem in problems[: toy.args.trace]:
        show_trace(Trace(toy, problem))


def draw_trace(toy: Toy, path: Path) -> None:
    """A panel a member, step against position, for the first test problem that no member solves alone and TIE does."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = toy.relay_solves()
    trace = Trace(toy, (found or toy.plain.problems)[0])
    sheet = Figure(figsize=(7.2, 6.4), layout="constrained")
    panels = sheet.subplots(1, len(trace.names), sharey=True)
    for panel, name, frames in zip(panels, trace.names, trace.frames):
        panel.set_title(f"member {name}", fontsize=9)
        draw_frames(panel, frames)
    panels[0].set_ylabel("decoding step", fontsize=8)
    arrow = {"arrowstyle": "-|>", "facecolor": "black", "shrinkA": 0, "shrinkB": 0}
    for step, _, leader in trace.rounds:
        if leader >= 0:  # from the leader's panel to the other
            for panel in panels:
                panel.axhline(step + 0.5, color="black", linewidth=0.7)
            start, end = (1 - leader, step + 0.5), (leader, step + 0.5)
            here, there = (panels[m].get_yaxis_transform() for m in (leader, 1 - leader))
            panels[leader].annotate("", end, start, there, here, {**arrow})
    handles = [Patch(color=INK[m][0], label=f"committed by {name}") for m, name in enumerate(trace.names)]
    handles.append(Patch(facecolor="white", edgecolor=RED, label="top-1 of the answer; framed: it changed"))
    sheet.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    which = "that no member solves alone and TIE does" if found else "(TIE solves none that no member solves alone)"
    said = [train_toy.decode(ids[train_toy.ANSWER]) for ids in trace.alone]
    alone = ", ".join(f"{name} alone {answer}" for name, answer in zip(trace.names, said))
    title = f"{trace.problem.prompt.replace(' ', '')}{trace.problem.answer}, the first test problem {which}"
    sheet.suptitle(f"{title}\n({alone}, TIE {trace.answer}); arrows: relay of the leader's sequence", fontsize=9)
    sheet.savefig(path, dpi=200)


def draw_frames(panel: Any, frames: list[Frame]) -> None:
    """Each step's tokens in their authors' colours; top-1 at masked answer positions, framed where it changed."""
    from matplotlib.patches import Rectangle

    numbers = train_toy.REASONING_LENGTH  # (T,) from here on the answer
    for y, frame in enumerate(frames, 1):
        top1, changed = [train_toy.MASK] * numbers + frame.answer, [False] * numbers + frame.changed  # (T,)
        for x, m in enumerate(frame.authors):
            cell, ink = INK[m][:2] if m >= 0 else ("#f2f2f2", "#444444")
            edge = {"edgecolor": RED, "linewidth": 1.3, "zorder": 3} if changed[x] else {"zorder": 2}
            panel.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, facecolor=cell, **edge))
            token = frame.tokens[x] if m >= 0 else top1[x]
            if token != train_toy.MASK:
                look = {"color": ink, "zorder": 4, "family": "monospace", "fontsize": 6.5}
                panel.text(x, y, train_toy.VOCABULARY[token], ha="center", va="center_baseline", **look)
    middle = numbers / 2
    for begin in (middle, numbers):
        panel.axvline(begin - 0.5, color="black", linewidth=0.7)
    panel.set(xlim=(-0.5, T - 0.5), ylim=(len(frames) + 0.5, 0.5), yticks=range(2, len(frames) + 1, 2))
    panel.tick_params(labelsize=7)
    places = [middle / 2 - 0.5, 1.5 * middle - 0.5, (numbers + T - 1) / 2]
    panel.set_xticks(places, ["products", "running totals", "answer"], fontsize=8)


FIGURES = {"figure1.png": draw_figure_1, "figure3.png": draw_figure_3, "trace.png": draw_trace}


def prepare_figures(folder: Path) -> None:
    """ValueError or OSError, before anything is trained, where no figure can be drawn or saved."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib")
    with file_errors("use --figure", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figure.part").touch()
        (folder / "figure.part").unlink()


# --- real checkpoints on the paper's benchmarks -------------------------------------------------------


def member_folder(given: str) -> Path:
    """A local folder as it is; else the files that a member is read from, fetched from the Hub by its name there."""
    if Path(given).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return Path(given)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(given, allow_patterns=MEMBER_FILES))
    except errors.GatedRepoError:
        mend = f"its owners ask you to accept their terms: at https://huggingface.co/{given}, then `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        mend = "no such folder here, and no such model on the Hub: check the name"
    except Exception as error:  # noqa: BLE001, the client's HTTP library has errors of its own, and changes
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        mend = f"no such folder here, and the Hub cannot be reached ({told}): check network and proxy"
    raise ValueError(f"--members {given}: {mend}")


def real_members(folders: dict[str, Path], places: Sequence[str], dtype: str | None = None) -> list[Any]:
    """LLaDA and Dream as `tie.Member`s, each on a device; on "meta" no weight is read, but all is checked."""
    codecs, shared = [mdlm.load_codec(folder) for folder in folders.values()], dict[Any, mdlm.TextCodec]()
    codecs = [shared.setdefault((*c.vocabulary, c.mask_id, c.eos_id), c) for c in codecs]  # equal ones relay plain ids
    return [tie.Member(mdlm.load(folder, device, DTYPES[dtype])[0], codec.mask_id, codec.eos_id, name, codec)
            for (name, folder), codec, device in zip(folders.items(), codecs, places)]  # fmt: skip


def real_setup(members: list[Any], task: str, run_code: str | None, cache: int | None) -> Setup:
    """Each member gets the question in its own chat template and vocabulary, and the task's lengths."""
    benchmark = BENCHMARKS[task]

    def canvas(member: Any, questions: list[Question]) -> tie.Canvas:
        codec, device = member.codec, member.denoise.embed.weight.device
        prompts, suffix = [codec.encode_prompt(q.prompt) for q in questions], codec.encode(benchmark.suffix)
        lengths = benchmark.length - len(suffix) - benchmark.answer_length, benchmark.answer_length
        return tie.Canvas.blank(prompts, suffix, *lengths, mask_id=codec.mask_id, pad_id=codec.pad_id, device=device)

    def text(m: int, ids: list[int]) -> str:
        said = [*itertools.takewhile(lambda i: i not in members[m].eos_ids, ids)]
        return members[m].codec.decode(said).decode(errors="replace")

    cached = [replace(m, denoise=mdlm.Cached(m.denoise, cache)) for m in members] if cache else members
    return Setup(cached, lambda questions: [canvas(member, questions) for member in members], text,
                 lambda question, answer: grade(task, question, answer, run_code))  # fmt: skip


def check_lengths(members: list[Any], task: str, questions: list[Question]) -> None:
    """ValueError, before anything is decoded, for a question that a member has no positions for."""
    for member, question in itertools.product(members, questions):
        length = len(member.codec.encode_prompt(question.prompt)) + BENCHMARKS[task].length
        if length > (most := member.denoise.config.max_length):
            told = f"question {question.id} with its answer takes {length} tokens, over {most} of {member}"
            raise ValueError(f"{told}: leave it out of --data")


def decode_share(setup: Setup, config: tie.Config, questions: list[Question], file: Records, batch_size: int) -> bool:
    """Decode the questions that have no record yet, in batches that are the same after an interruption, with as many
    processes; whether there were any."""
    batches = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]
    todo = [batch for batch in batches if any(q.id not in file.done for q in batch)]
    done = len(questions) - sum(map(len, todo))
    with tqdm(total=len(questions), initial=done, unit="question", disable=None) as bar:
        for batch in todo:
            file.add(decode_questions(setup, config, batch))
            bar.update(len(batch))
            bar.set_postfix(accuracy=percent(np.mean([r["correct"][r["winner"]] for r in file.done.values()])))
    return bool(todo)


def processes() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this host, as torchrun gives them; ValueError unless it could have."""
    given = [os.environ.get(*pair) for pair in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    rank, world, local = (int(text) if re.fullmatch(r"\d{1,6}", text) else -1 for text in given)
    if not 0 <= rank < world or local < 0:
        raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK are {', '.join(given)}: unset them, or use torchrun")
    return rank, world, local


def devices(given: list[str], count: int) -> list[str]:
    """One device per member, from one value for all or one for each; ValueError where one cannot be used."""
    if len(given) not in (1, count):
        raise ValueError(f"--device has {len(given)} values for {count} members: give one, or one each")
    for device in given:
        train_toy.check_device(device)
    return given * count if len(given) == 1 else given


def places_of(count: int, given: list[str] | None) -> list[str]:
    """A device per member: as given, else the GPUs in turn, the members of one process on neighbouring ones."""
    _, world, local = processes()
    if world > 1 and any(device != "cpu" for device in given or []):
        raise ValueError("--device would put every process on the same GPUs: leave it out, and they are shared out")
    gpus = torch.cuda.device_count()
    return devices(given or [f"cuda:{(local * count + m) % gpus}" if gpus else "cpu" for m in range(count)], count)


def run_real(args: argparse.Namespace) -> None:
    """One benchmark with the members given: one method, or with --single each member alone. Processes that torchrun
    starts share the questions, a file each; the last one to finish finds all records, and writes the summary."""
    _, world, _ = processes()
    if world > 1 and args.out is None:
        raise ValueError("several processes need --out: a folder where their records meet")
    benchmark, questions = BENCHMARKS[args.task], read_questions(args.task, args.data)[: args.limit]
    config = config_of(args, benchmark.interval(args.score), benchmark.answer_window)
    places = places_of(len(args.members), args.device)
    grade(args.task, questions[0], "1", args.run_code)  # before a weight is read: is there a grader, may code run?
    effective = {"task": args.task, "members": args.members, "data": str(args.data), "questions": len(questions),
                 "single": args.single, "batch_size": args.batch_size, "dtype": args.dtype, "cache": args.cache,
                 "config": asdict(config)}
    folders = {name: member_folder(given) for name, given in args.members.items()}
    check_lengths(real_members(folders, ["meta"] * len(folders)), args.task, questions)
    prints = {f"weights of {name}": fingerprint(folder) for name, folder in folders.items()}
    prints |= {"questions": fingerprint(questions), "order of members": ", ".join(folders)}
    open_results(args.out, effective, prints, free=("members", "data", "batch_size"))
    members = real_members(folders, places, args.dtype)
    label = "post-generation" if config.interval >= benchmark.length else f"tie {config.score}"
    groups = {f"member {m.name}": [m] for m in members} if args.single else {label: members}
    if runs := runs_of(args, config, groups, questions):
        table, coders = main_table(runs), any("coder" in name.lower() for name in args.members)
        paper = dict(zip(TABLE_4, benchmark.table_4) if coders else zip(TABLE_3, benchmark.table_3))
        for row in table["rows"]:  # the paper's own setting of this method, whatever this command sets
            name = f"{row['method']} {row['score'] or ''}".lower()
            row["paper"] = next((paper[column] for column in paper if column.lower() in name), None)
        finish(args, effective, table)


def runs_of(args: argparse.Namespace, config: tie.Config, groups: dict[str, list], questions: list) -> dict[str, Run]:
    """Decode what is missing of this process's share; what each group answers, if this process is to report it."""
    rank, world, _ = processes()
    files, worked = {name: Records(args.out, name, len(group), rank) for name, group in groups.items()}, rank == 0
    for name, group in groups.items():
        setup = real_setup(group, args.task, args.run_code, args.cache)
        worked |= decode_share(setup, config, questions[rank::world], files[name], args.batch_size)
    for file in files.values():
        file.read()
    if not worked or any(len(file.done) < len(questions) for file in files.values()):
        return {}  # the first process finds all records too; another one is still at work
    return {name: Run([files[name].done[q.id] for q in questions], [m.name for m in group])
            for name, group in groups.items()}  # fmt: skip


# --- answers: what the decoded answer region says, and whether it is right ----------------------------

_BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # with braces inside, three deep


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


# math-verify in a process of its own: an answer that makes it hang or swell ends that process, by the alarm's signal,
# which has its default action there, or by the limit on memory. It ends with its parent, whose end closes its input.
_GRADER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    signal.alarm(5)
    gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
    print(verify(gold, answer, timeout_seconds=None), flush=True)
    signal.alarm(0)
"""


@functools.cache
def _grader() -> Any:
    process: Any = subprocess.Popen([sys.executable, "-c", _GRADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, text=True, start_new_session=True)  # deaf to Ctrl-C
    if process.stdout.readline() != "ready\n":
        raise ValueError("mathematics is graded by math-verify: pip install math-verify")
    return process


def math_equal(answer: str, gold: str) -> bool:
    """Whether math-verify finds two plain or LaTeX answers equal, as values, tuples, intervals, matrices or sets. It
    compares to 6 digits and ignores number bases (42_5 equals 42_6). An answer that is empty, longer than 1,000
    characters, or takes over 5 seconds is wrong."""
    if not 0 < len(answer) <= 1000:
        return False
    dressed = [text if re.search(r"(?<!\\)\$.+(?<!\\)\$", text) else f"${text}$" for text in (gold, answer)]
    grader, said = _grader(), ""
    with suppress(BrokenPipeError):
        print(json.dumps(dressed), file=grader.stdin, flush=True)
        said = grader.stdout.readline()
    if not said:  # it has ended over this answer; the next has a new one
        grader.wait()
        _grader.cache_clear()
    return said == "True\n"


_OPERATORS: dict[type, Callable] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                                    ast.Div: operator.truediv, ast.USub: operator.neg, ast.UAdd: operator.pos}
_PLAIN = [*[(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))")] * 3,  # fractions within fractions
          (r"\\(?:cdot|times)(?![a-z])|[×·⋅]", "*"), (r"\\div(?![a-z])|÷", "/"),
          (r"\\(?:left|right)(?![a-z])|\\?\$|\\[,;:! ]|\.\s*$", ""), (r"[−–]", "-"),
          (r"[\[{]", "("), (r"[\]}]", ")")]  # fmt: skip


def _value(node: ast.expr) -> Fraction:
    """Exact; LookupError for anything but + - * / and whole numbers."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise LookupError(node)


def countdown_correct(answer: str, gold: dict) -> bool:
    """One side of the answer is an expression in + - * / with each number exactly once, and exactly the target."""
    for side in answer[:1000].split("="):
        for pattern, new in _PLAIN:
            side = re.sub(pattern, new, side)
        with suppress(SyntaxError, ArithmeticError, LookupError, RecursionError, MemoryError, ValueError):
            used = sorted(map(int, re.findall("[0-9]+", side)))
            if re.fullmatch(r"[-+*/() 0-9]*", side) and used == sorted(gold["numbers"]):
                return _value(ast.parse(side.strip(), mode="eval").body) == gold["target"]
    return False


# --- running code: only on request, and confined ------------------------------------------------------

_PYTHON = str(Path(sys.executable).parent.resolve() / Path(sys.executable).name)  # in its environment, without ..
# Reads the job from stdin, limits itself, runs the sources one after the other as one module, whose files are in the
# working directory, and writes the token last. The token is only on the interpreter's stack: no name leads to it.
# As in HumanEval's own harness the module is not `__main__`: what a program does when run as a script is not run.
_RUNNER = r"""
import functools, json, os, sys, types
def steps():
    import resource
    sources, token, pipe, limits, nobody = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    if nobody:  # no limit on processes binds root
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    module = sys.modules["program"] = types.ModuleType("program")
    for number, source in enumerate(sources):
        module.__file__ = f"program{number}.py"
        with open(module.__file__, "w") as file:
            file.write(source)
        yield functools.partial(exec, compile(source, module.__file__, "exec"), module.__dict__)
    yield functools.partial(os.write, pipe, token.encode())
for action in [*steps()]:
    action()
"""


def _bubblewrap() -> list[str]:
    """Own processes, no network, system and interpreter read-only, a small empty /tmp, and nothing else."""
    if not (bwrap := shutil.which("bwrap")):
        raise ValueError("--run-code needs bwrap: apt-get install bubblewrap, or in a container --run-code unconfined")
    rights = "--cap-add CAP_SETUID --cap-add CAP_SETGID" if os.getuid() == 0 else "--unshare-user"
    own = "--unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --die-with-parent --chdir /tmp"
    memory = (f"--proc /proc --dev /dev --perms 1777 --size {16 << 20} --tmpfs /tmp --perms 1777 --size {1 << 20} "
              "--tmpfs /dev/shm --remount-ro /dev")  # fmt: skip
    system = list[str]()
    python = os.path.realpath(sys.base_prefix), os.path.realpath(sys.prefix)  # perhaps below /tmp
    for place in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", *python):
        for parent in reversed(Path(place).parents):
            system += ["--perms", "0755", "--dir", str(parent)]
        system += ["--ro-bind-try", place, place]
    return [bwrap, *rights.split(), *own.split(), *memory.split(), *system, "--remount-ro", "/"]


def run_code(*sources: str, timeout: float = 10.0, memory: int = 1 << 30, confined: bool = True) -> bool:
    """Whether the Python `sources`, run one after the other as one module, all run through to their ends.

    In bubblewrap, or, unconfined, in a temporary folder with the rights of the user. No environment, no input, output
    discarded; limits on wall-clock and CPU time (seconds), memory (bytes), size of files and, but for root unconfined,
    processes. Success is a random token written last: leaving early is failure, but a program made to cheat could find
    the token in its interpreter. ValueError without bubblewrap."""
    command, token, (reading, writing) = _bubblewrap() if confined else [], os.urandom(16).hex(), os.pipe()
    os.set_blocking(reading, False)
    limits = {"CPU": math.ceil(timeout), "AS": memory, "FSIZE": 1 << 20, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    job = json.dumps([sources, token, writing, limits, 65534 if confined and os.getuid() == 0 else None]).encode()
    with suppress(RecursionError), open(reading, "rb", buffering=0) as result, \
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # of a thousand nested folders
        with subprocess.Popen(
            [*command, _PYTHON, "-I", "-B", "-c", _RUNNER], cwd=folder, env={"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writing,),
            start_new_session=True,
        ) as process:  # fmt: skip
            os.close(writing)
            try:
                process.communicate(job, timeout)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with suppress(ProcessLookupError, PermissionError):  # whoever is left of the session
                    os.killpg(process.pid, signal.SIGKILL)
        return result.read(64) == token.encode()
    return False


@functools.cache
def check_sandbox(confined: bool) -> None:
    """ValueError with bubblewrap's own words where it cannot work."""
    command = [*(_bubblewrap() if confined else []), _PYTHON, "-c", ""]
    tried = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    if tried.returncode or not run_code("import decimal", timeout=30, confined=confined):
        told = f"--run-code cannot confine here ({tried.stderr.strip()[:200]})"
        raise ValueError(f"{told}: allow user namespaces, update bubblewrap; in a container, --run-code unconfined")


def humaneval_correct(answer: str, gold: dict, confined: bool) -> bool:
    """The prompt's imports and helpers, the answer, the tests; an answer without the function continues the prompt."""
    name, head = gold["entry_point"], gold["prompt"][: gold["prompt"].index("def " + gold["entry_point"])]
    if not re.search(rf"^(?:async +)?def +{name}\b|^{name} *=", answer, re.MULTILINE):
        answer = gold["prompt"] + (answer if answer[:1].isspace() else textwrap.indent(answer, "    "))
    return run_code(head, answer, gold["test"], f"check({name})", confined=confined)


def mbpp_correct(answer: str, gold: dict, confined: bool) -> bool:
    return run_code(answer, *gold["test_imports"], *gold["test_list"], confined=confined)


# --- the benchmarks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its settings (Sec. 5.1, App. A.4; lengths in tokens) and the paper's figures in %."""

    file: str  # what the data must be, for error messages
    template: str
    extract: Callable[[str], str]  # decoded answer region up to EOS -> answer
    correct: Callable[..., bool]  # (answer, gold), and for code whether it is confined
    length: int  # generation length: reasoning + suffix + answer
    answer_length: int  # our decision, the paper is silent
    tcc_interval: int  # n with token change count; the other scores have 16
    table_3: tuple[float, ...]  # columns as in TABLE_3 and TABLE_4
    table_4: tuple[float, ...] = ()  # empty where the paper has no such run
    suffix: str = "\nAnswer:"
    answer_window: int | None = None
    subset: str = ""  # subjects to keep; empty keeps all

    def interval(self, score: str) -> int:
        return self.tcc_interval if score == "token_change_count" else 16


# Our own words after simple-evals and, for Countdown, Wang et al. 2026; the two for code as App. A.3 prints them.
_LAST = ("Think step by step first, then give your final answer on a last line of the form 'Answer: {form}, "
         "and nothing after it.")  # fmt: skip
_CHOICE = f"Answer the multiple choice question below. {_LAST}\n\n{{question}}\n\n{{choices}}"
_MATHS = f"Solve the mathematics problem below. {_LAST}\n\n{{question}}"
_COUNTDOWN = ("Make an arithmetic expression with the value {target} from the numbers {numbers}. Use every number "
              f"exactly once; the operations are + - * / and brackets are allowed. {_LAST}")  # fmt: skip
_HUMANEVAL = ("Read the following function signature and docstring, and fully implement the function described. "
              "Return only the Python function, no explanation.\n\n{prompt}")  # fmt: skip
_MBPP = "{prompt} Your code should satisfy these tests:\n{tests}\nReturn only the Python function, no explanation."

MMLU_STAR = (  # App. A.1, the subjects on which both LLaDA and Dream are over 60 %
    "astronomy business_ethics clinical_knowledge college_biology college_medicine computer_security "
    "conceptual_physics elementary_mathematics high_school_biology high_school_computer_science "
    "high_school_european_history high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology high_school_us_history "
    "high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies "
    "management marketing medical_genetics miscellaneous nutrition philosophy prehistory public_relations "
    "security_studies sociology us_foreign_policy world_religions"
)
TABLE_3 = ("LLaDA", "Dream", "post-generation", *(f"tie {score}" for score in tie.SCORES))
TABLE_4 = ("DreamCoder", "DiffuCoder", "tie token_change_count", "tie top1_probability")
_general = functools.partial(Benchmark, template=_CHOICE, extract=extract_letter, correct=operator.eq, length=128,
                             answer_length=16, tcc_interval=32)  # fmt: skip
_maths = functools.partial(Benchmark, template=_MATHS, correct=math_equal, tcc_interval=16)
_code = functools.partial(Benchmark, extract=extract_code, length=512, answer_length=480, tcc_interval=32,
                          suffix="```python\n", answer_window=8)  # fmt: skip
_MMLU = "MMLU's test csv (question, four choices, letter), or a folder of them"
BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": _general(_MMLU, table_3=(61.23, 67.46, 67.26, 67.55, 67.25, 67.53, 67.34)),
    "mmlu-star": _general(_MMLU, table_3=(71.45, 77.37, 77.92, 78.12, 77.69, 78.12, 77.61), subset=MMLU_STAR),
    "arc-challenge": _general("ARC-Challenge-Test.jsonl (question: stem and choices, answerKey)",
                              table_3=(85.15, 86.69, 88.57, 89.16, 88.82, 88.57, 88.74)),
    "winogrande": _general("WinoGrande's dev.jsonl (sentence, option1, option2, answer)",
                           table_3=(71.59, 72.22, 73.72, 72.85, 73.95, 71.90, 73.88)),
    "gsm8k": _maths("GSM8K's test.jsonl (question, answer with ####)", extract=extract_number, length=256,
                    answer_length=16, table_3=(78.77, 78.39, 80.29, 83.47, 82.71, 83.62, 82.56)),
    "math500": _maths("MATH500's test.jsonl (problem, answer)", extract=extract_math, length=512,
                      answer_length=64, table_3=(37.4, 48.0, 43.0, 48.6, 47.0, 45.2, 48.4)),
    "humaneval": _code("HumanEval.jsonl, gzipped or not", template=_HUMANEVAL, correct=humaneval_correct,
                       table_3=(45.73, 61.59, 55.49, 54.27, 57.32, 57.93, 57.32), table_4=(72.56, 70.12, 72.56, 72.56)),
    # The paper's figures are multiples of 1/427: it runs all of sanitized MBPP, not the test split alone.
    "mbpp": _code("sanitized-mbpp.json", template=_MBPP, correct=mbpp_correct,
                  table_3=(53.16, 63.23, 62.53, 64.17, 62.06, 62.76, 62.06), table_4=(75.88, 72.60, 76.11, 76.58)),
    "countdown": Benchmark("a Countdown jsonl (input and output, or nums and target)", _COUNTDOWN, extract_math,
                           countdown_correct, 256, 32, 32, table_3=(13.4, 16.4, 19.2, 18.8, 18.8, 19.4, 18.6)),
}  # fmt: skip
LARGEST = 64 << 20  # bytes of a file of questions, unpacked; the owners' have less than one


def _rows(path: Path) -> Iterable[Any]:
    """Of a csv, JSON or JSON lines file, gzipped or not."""
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        data = (gzip.GzipFile(fileobj=file) if packed else file).read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"over {LARGEST} bytes")
    text = data.decode("utf-8-sig")
    if path.suffix == ".csv":
        return csv.reader(io.StringIO(text, newline=""), strict=True)
    if text.lstrip().startswith("["):
        return json.loads(text)
    return (json.loads(line) for line in text.split("\n") if line.strip())


def _choice(question: str, choices: list[str], right: int) -> tuple[dict, str]:
    letters = "ABCDE"[: len(choices)]
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices))
    form = f"LETTER', where LETTER is one of {', '.join(letters)}"
    return {"question": question.strip(), "choices": listed, "form": form}, letters[right]


def _parse(task: str, row: Any) -> tuple[dict, Any]:
    """(fields of the template, gold) of one row in the owners' layout."""
    match task, row:
        case "mmlu" | "mmlu-star", [str(question), a, b, c, d, "A" | "B" | "C" | "D" as letter]:
            return _choice(question, [a, b, c, d], "ABCD".index(letter))
        case "arc-challenge", {"question": {"stem": str(question), "choices": choices}, "answerKey": right}:
            labels = [choice["label"] for choice in choices]  # 3 to 5 letters or numbers; the prompt has letters
            return _choice(question, [choice["text"] for choice in choices], labels.index(right))
        case "winogrande", {"sentence": str(sentence), "option1": a, "option2": b, "answer": "1" | "2" as right}:
            question = "Which choice belongs in the place of the _ in this sentence?\n" + sentence
            return _choice(question, [a, b], int(right) - 1)
        case "gsm8k", {"question": str(question), "answer": str(answer)}:
            number = Fraction(answer.split("####")[1].strip().replace(",", ""))
            return {"question": question, "form": "NUMBER', where NUMBER is the number alone"}, str(number)
        case "math500", {"problem": str(question), "answer": str(answer)}:
            return {"question": question, "form": "ANSWER', where ANSWER is the value alone, in LaTeX"}, answer
        case "humaneval", {"prompt": str(prompt), "entry_point": str(name), "test": str(test)}:
            prompt.index(f"def {name}")  # ValueError if it is not there
            return {"prompt": prompt}, {"prompt": prompt, "entry_point": name, "test": test}
        case "mbpp", {"prompt": str(prompt), "test_imports": [*imports], "test_list": [*tests]}:
            "\n".join(imports)  # TypeError if one is no text
            return {"prompt": prompt, "tests": "\n".join(tests)}, {"test_imports": imports, "test_list": tests}
        case "countdown", {"nums": [*numbers], "target": target} | {"input": numbers, "output": str(target)}:
            if isinstance(numbers, str):  # "15,44,79,50" of Dream ends in the target, which d1 has as its output
                numbers = numbers.split(",")
                target = target if target.isdigit() else numbers.pop()
            numbers, target = [int(number) for number in numbers], int(target)
            form = "EXPRESSION', where EXPRESSION is the expression alone without an equals sign"
            gold = {"numbers": numbers, "target": target}
            return {"numbers": str(numbers)[1:-1], "target": target, "form": form}, gold
    raise ValueError("another layout")


def read_questions(task: str, path: str | Path) -> list[Question]:
    """The questions of a task (a key of BENCHMARKS) from the owners' file; ValueError names file, row and the mend."""
    if task not in BENCHMARKS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join(BENCHMARKS)}")
    benchmark, path, questions = BENCHMARKS[task], Path(path), dict[str, Question]()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        subject, count = re.sub(r"_(test|val|dev)$", "", file.stem), 0
        if benchmark.subset and subject not in benchmark.subset.split():
            continue
        try:
            for row in _rows(file):
                fields, gold = _parse(task, row)
                names = ("task_id", "unique_id", "id", "qID") if isinstance(row, dict) else ()
                counted = f"{subject if path.is_dir() else task}/{count}"  # a file may be renamed
                key = next((row[name] for name in names if name in row), counted)
                if "" in [*fields.values(), key] or not isinstance(key, str | int):
                    raise ValueError("an empty or wrong value")
                if str(key) in questions:
                    raise ValueError(f"{key!r:.80} was there before")
                questions[str(key)] = Question(str(key), benchmark.template.format(**fields), gold)
                questions[str(key)].prompt.encode()  # ValueError for half a character, which JSON can hold
                count += 1
        except (OSError, EOFError, zlib.error, csv.Error, ValueError, TypeError, ArithmeticError, LookupError,
                RecursionError) as error:  # fmt: skip
            told = f"{file}, row {count + 1}: no question for {task} ({type(error).__name__}: {error!s:.200})"
            raise ValueError(f"{told}; give {benchmark.file}") from error
    if not questions:
        raise ValueError(f"{path}: no question for {task}; give {benchmark.file}")
    return list(questions.values())


def grade(task: str, question: Question, text: str, run_code: bool | str | None = None) -> tuple[str, bool]:
    """(answer, whether it is right) from the decoded answer region up to EOS. Code is run only where run_code asks for
    it: "unconfined", or anything else that is true for bubblewrap."""
    benchmark = BENCHMARKS[task]
    answer, confined = benchmark.extract(text), run_code != "unconfined"
    if benchmark.extract is not extract_code:
        return answer, benchmark.correct(answer, question.gold)
    if not run_code:
        raise ValueError(f"grading {task} runs the model's code: pass --run-code to allow it")
    check_sandbox(confined)
    return answer, benchmark.correct(answer, question.gold, confined)


# --- command line -------------------------------------------------------------------------------------


def config_of(args: argparse.Namespace, interval: int, answer_window: int | None = None) -> tie.Config:
    """The algorithm's settings: as given, else the defaults of the task."""
    interval = interval if args.interval is None else args.interval
    given = {name: getattr(args, name) for name in ("score", "top_k", "block_size", "threshold", "selection")}
    return tie.Config(interval=interval, answer_window=answer_window, **given)


def run_toy(args: argparse.Namespace) -> None:
    """The main table, the trace, or the paper's tables and figures, on toy members trained where there are none yet."""
    available, args.device = len(train_toy.questions("test")), devices(args.device or ["cpu"], 1)
    for name, count in (("--problems", args.problems), ("--trace", args.trace or 1)):
        if not 1 <= count <= available:
            raise ValueError(f"{name} {count}: give 1 to {available}, the size of the toy's test split")
    if args.figure:
        prepare_figures(args.figure)
    seeds, results = range(args.seed, args.seed + args.seeds), []
    with train_toy.workers((os.cpu_count() or 1) if args.device == ["cpu"] else 1) as pool:
        toys = [Toy(args, train_toy.Settings(seed=seed, steps=args.steps), pool) for seed in seeds]
        for toy in toys:
            toy.train()
            if args.trace:
                show_traces(toy)
                return
            for name, draw in FIGURES.items() if args.figure else ():
                draw(toy, args.figure / name)
                print(f"drawn: {args.figure / name}")
            if args.table or not args.figure:
                results.append(toy_result(toy, args.table))
    if len(results) == 1:
        finish(args, toys[0].settings, results[0])
    elif results:
        finish(args, {**toys[0].settings, "seeds": [*seeds]}, joined(results, seeds))


def toy_result(toy: Toy, names: list[str]) -> dict:
    """The main table; or the tables asked for, with those rows of the main one that they decode."""
    toy.run(**METHODS["post-generation"])
    tables = {name: (PAPER | BEYOND)[name](toy) for name in names}
    wanted = {name: config for name, config in METHODS.items() if not names or toy.job(**config) in toy.runs}
    result = main_table({name: toy.run(**config) for name, config in wanted.items()})
    return {**result, "tables": tables} if names else result


def joined(results: list[dict], seeds: Iterable[int]) -> dict:
    """Of several training seeds: rows and comparisons of all, the tables' means, and each seed's own tables."""
    by_seed = dict(zip(seeds, results))
    flat = {key: [{**entry, "seed": seed} for seed, result in by_seed.items() for entry in result[key]]
            for key in ("rows", "comparisons")}  # fmt: skip
    means = {name: average([result["tables"][name] for result in results]) for name in results[0]["tables"]}
    return {**flat, "tables": means, "tables_by_seed": {seed: result["tables"] for seed, result in by_seed.items()}}


def finish(args: argparse.Namespace, effective: dict, table: dict) -> None:
    """Print the table, for a person or as JSON, and write it beside the records."""
    count, config = effective.get("problems") or effective["questions"], effective["config"]
    summary = json.dumps({"settings": effective, "problems": count, **environment(), **table}, default=vars)
    if args.out:
        write_json(args.out / "summary.json", json.loads(summary))
    if args.json:
        print(summary)
        return
    seeds = ", ".join(map(str, effective.get("seeds", [])))
    over = f"; training seeds {seeds}: mean ± standard deviation" if seeds else ""
    print(f"{effective['task']}: {count} problems, n = {config['interval']}, blocks of {config['block_size']}{over}")
    if "tables" not in table:
        show_main(table)
    for name, own in table.get("tables", {}).items():
        show_table(name, own, count)


def member_named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (re.fullmatch(r"[\w.-]+", name) and equals and folder):  # the name becomes part of a file's name
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, the name of letters, digits and _ . -")
    return name, folder


def path_given(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path: name a file or folder, . for this one")
    return Path(text)


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {  # by what a person wants to do, in argparse's words
    "how to decode": {
        "--interval": {"type": int, "help": "n, steps between relays; one step gives token change count nothing to "
                                            "compare (default: 2, or the paper's)"},
        "--score": {"default": tie.SCORES[0], "choices": tie.SCORES,
                    "help": "of a trace or a benchmark; the toy's tables show all (default: %(default)s)"},
        "--selection": {"default": tie.SELECTIONS[0], "choices": tie.SELECTIONS,
                        "help": "final response; best_model takes the first member (default: %(default)s)"},
        "--block-size": {"type": int, "default": 16, "help": "of semi-autoregressive decoding (default: %(default)s)"},
        "--top-k": {"type": int, "default": 1, "help": "tokens committed a step (default: %(default)s)"},
        "--threshold": {"type": float, "help": "instead commit all tokens above this probability, at least one a step"},
        "--cache": {"type": int, "metavar": "R",
                    "help": "keep keys and values, made anew at every R-th forward: approximate"},
    },
    "what to do on the toy (default: the main table)": {
        "--table": {"nargs": "+", "choices": [*PAPER, "all", *BEYOND, "own"], "default": [], "metavar": "NAME",
                    "help": f"tables of the paper, its own figures beside ours: {' '.join(PAPER)}, or all; and beyond "
                            f"the paper: {' '.join(BEYOND)}, or own for all of these"},
        "--seeds": {"type": int, "default": 1, "help": "with --table: mean and spread over so many seeds (default: 1)"},
        "--figure": {"type": path_given, "help": "folder for Fig. 1, Fig. 3 and the trace of one decoding as PNG"},
        "--trace": {"type": int, "help": "show so many decodings round by round"},
        "--unsolved": {"action": "store_true", "help": "with --trace: of what no member solves alone and TIE does"},
    },
    "the toy's problems and members": {
        "--problems": {"type": int, "help": "test problems (default: 400; 1000 for tables and figures)"},
        "--problem-seed": {"type": int, "default": 0, "help": "which of them are drawn (default: %(default)s)"},
        "--seed": {"type": int, "default": 0, "help": "training seed, the first of --seeds (default: %(default)s)"},
        "--steps": {"type": int, "default": train_toy.Settings.steps, "help": "of training (default: %(default)s)"},
        "--checkpoints": {"type": path_given, "default": Path("checkpoints"),
                          "help": "folder of members (default: %(default)s)"},
    },
    "real checkpoints on a benchmark": {
        "--members": {"nargs": "+", "type": member_named, "default": [], "metavar": "NAME=FOLDER",
                      "help": "LLaDA and Dream: local folders, or names on the Hugging Face Hub"},
        "--task": {"choices": BENCHMARKS, "help": "the benchmark"},
        "--data": {"type": path_given, "help": "file of its questions, as their owners publish them"},
        "--limit": {"type": int, "help": "only so many questions; not to be changed under the same --out"},
        "--single": {"action": "store_true", "help": "every member alone, instead of the ensemble"},
        "--run-code": {"nargs": "?", "const": "confined", "choices": ("confined", "unconfined"),
                       "help": "run the code that the models write, in bubblewrap; unconfined: in a container that "
                               "confines it already"},
    },
    "output and hardware": {
        "--out": {"type": path_given, "help": "folder for records and summary; an interrupted run goes on from there"},
        "--json": {"action": "store_true", "help": "print one JSON object and nothing else on stdout"},
        "--batch-size": {"type": int, "help": "questions decoded together (default: 32 on the toy; 8)"},
        "--device": {"nargs": "+", "help": "one, or one a real member (default: cpu for the toy; the GPUs in turn)"},
        "--dtype": {"choices": [*DTYPES][1:],
                    "help": "of the weights (default: as stored on the toy; bfloat16 on CUDA, else float32)"},
    },
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    about, _, examples = (__doc__ or "").partition("Examples:\n")
    parser = train_toy.Parser(
        prog="eval.py", usage="python eval.py [option ...]", description=about.splitlines()[0], allow_abbrev=False,
        epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    check_arguments(args, {f"--{name.replace('_', '-')}" for name in given}, parser.error)
    groups = {"all": list(PAPER), "own": list(BEYOND)}
    args.table = list(dict.fromkeys(name for asked in args.table for name in groups.get(asked, [asked])))
    args.problems = (1000 if args.table or args.figure else 400) if args.problems is None else args.problems
    args.members, args.batch_size = dict(args.members), args.batch_size or (8 if args.members else 32)
    return args


def check_arguments(args: argparse.Namespace, given: set[str], error: Callable[[str], Any]) -> None:
    """Refuse values out of range, and options that do not go together."""
    toy = OPTIONS["what to do on the toy (default: the main table)"] | OPTIONS["the toy's problems and members"]
    real = OPTIONS["real checkpoints on a benchmark"]

    def refuse(wrong: Any, message: str) -> None:
        if wrong:
            error(message)

    for name in ("batch_size", "cache", "limit", "trace", "seeds"):
        value = getattr(args, name)
        refuse(value is not None and value < 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")
    refuse(args.seeds > 1000, f"--seeds must be at most 1000, not {args.seeds}")
    refuse(not 0 <= args.problem_seed < 2**32, f"--problem-seed {args.problem_seed}: give a number in [0, 2**32)")
    refuse(args.json and args.trace, "--trace prints no JSON: leave out one of --trace and --json")
    several = args.json or args.trace or args.seeds > 1
    refuse(args.figure and several, "--figure draws one training seed: leave out --json, --trace and --seeds")
    refuse(args.unsolved and not args.trace, "--unsolved is for --trace: give it too")
    refuse(args.seeds > 1 and not args.table, "--seeds is for --table: give it too")
    for name in given & {"--trace", "--threshold", "--top-k", "--score", "--selection", "--cache"}:
        refuse(args.table or args.figure, f"--table and --figure set their own {name}: leave it out")
    for name in given & toy.keys():
        refuse(args.members, f"{name} is for the toy: leave out --members")
    for name in given & real.keys():
        refuse(not args.members, f"{name} is for real checkpoints: give --members too")
    without = args.task is None or args.data is None
    refuse(args.members and without, "--members needs --task and --data: the benchmark, and its owner's file")
    names = [name for name, _ in args.members]
    refuse(len(names) == 1 and not args.single, "one member is no ensemble: give two or more, or add --single")
    twice = {name for name in names if names.count(name) > 1}
    refuse(twice, f"--members names {', '.join(twice)} twice: give each a name of its own")


def main(argv: list[str] | None = None) -> int:
    """0; 2 for what the user can mend, 1 for what failed on the machine, 130 after Ctrl-C: one line on stderr."""
    try:
        args = parse(argv)
        if sys.stdout is None:
            raise RuntimeError("stdout is closed: give the results somewhere to go")
        train_toy.keep_memory()
        (run_real if args.members else run_toy)(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        told, code = "interrupted; with --out the same command goes on from here", 130
    except OSError as error:
        told, code = f"cannot use {error.filename}: {error.strerror}; mend that, and the same command goes on", 2
        if error.filename is None:  # files are named where they are opened: this is the system, or stdout
            told, code = f"{error.strerror or error}; with --out the same command goes on", 1
            if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
                told = f"cannot write to stdout: {error.strerror}; with --out, summary.json has the results"
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python's own last flush then goes
    except torch.cuda.OutOfMemoryError as error:
        told, code = f"{str(error).split('. ')[0]}: lower --batch-size, or give each member a --device of its own", 1
    except (ValueError, RuntimeError, MemoryError) as error:
        told, code = str(error) or "not enough memory", 2 if isinstance(error, ValueError) else 1
    print(f"eval.py: {' '.join(told.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_start)
    if sys.stderr is None:  # closed: without a stand-in, files and other processes would take its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.set_inheritable(2, True)
        sys.stderr = os.fdopen(2, "w")
    try:
        sys.exit(main())
    finally:  # the work is done: Python's own last moments would answer Ctrl-C with a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
