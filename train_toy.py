"""The toy task and its members: column multiplication, learnt by small MDLMs with gaps in their times tables.

Worked example, four digits by one. Prompt `3472*6=`; reasoning, one column of eight tokens each, units first,
`2*6+0=12` `7*6+1=43` `4*6+4=28` `3*6+2=20` (digit * multiplier + carry = result); suffix `#` (stands for
`Answer:`); answer `20832`, then EOS. A token is a character, a sequence has 46 of them.

Each digit times multiplier is a fact. A member meets some facts only rarely while it trains, other facts than the
other members do, so that members err about equally often, and on different problems. Every problem belongs to
training, validation or test by a fixed hash.

Example: python train_toy.py --seed 0 --out checkpoints/toy
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import mdlm
import tie

# --- vocabulary -----------------------------------------------------------------------------------

VOCABULARY = "0123456789*+=#_. "  # a character a token; the last three show the special ids
MASK, EOS, PAD = 14, 15, 16
SUFFIX = "#"


def encode(text: str) -> list[int]:
    """Ids of digits, signs and suffix; ValueError on any other character."""
    ids = [VOCABULARY.find(c) for c in text]
    if any(not 0 <= i < MASK for i in ids):
        raise ValueError(f"{text!r} holds a character outside {VOCABULARY[:MASK]!r}")
    return ids


def decode(ids: list[int]) -> str:
    """The text up to the first EOS; a mask shows as `_`, padding as a blank."""
    return "".join(VOCABULARY[i] for i in itertools.takewhile(lambda i: i != EOS, ids))


# --- problems -------------------------------------------------------------------------------------

COLUMNS = 4  # digits of the multiplicand
REASONING_LENGTH = 8 * COLUMNS
ANSWER_LENGTH = COLUMNS + 2  # five digits and EOS; a shorter answer is filled with EOS
PROMPT_LENGTH = COLUMNS + 3
LENGTH = PROMPT_LENGTH + REASONING_LENGTH + len(SUFFIX) + ANSWER_LENGTH  # 46
FACTORS = range(2, 10)  # multipliers, and the digits that make a fact with them: 0 and 1 need no times table
SPLITS = {"test": range(10), "validation": range(10, 20), "train": range(20, 100)}  # percent of all problems, by hash


@dataclass(frozen=True)
class Problem:
    """One multiplication, as text.

    >>> Problem(3472, 6).prompt, Problem(3472, 6).reasoning, Problem(3472, 6).answer
    ('3472*6=', '2*6+0=127*6+1=434*6+4=283*6+2=20', '20832')
    """

    multiplicand: int
    multiplier: int

    @property
    def prompt(self) -> str:
        return f"{self.multiplicand}*{self.multiplier}="

    @property
    def answer(self) -> str:
        return str(self.multiplicand * self.multiplier)

    @property
    def reasoning(self) -> str:
        columns, carry = [], 0
        for digit, _ in self.facts:
            result = digit * self.multiplier + carry
            columns.append(f"{digit}*{self.multiplier}+{carry}={result:02d}")
            carry = result // 10
        return "".join(columns)

    @property
    def facts(self) -> list[tuple[int, int]]:
        """(digit, multiplier) of each column, units first."""
        return [(int(digit), self.multiplier) for digit in reversed(str(self.multiplicand))]

    @property
    def split(self) -> str:
        percent = zlib.crc32(self.prompt.encode()) % 100
        return next(name for name, percents in SPLITS.items() if percent in percents)


@cache
def all_problems(split: str) -> tuple[Problem, ...]:
    """Every problem of a split, in order: 72,000 in all, a tenth each in "test" and "validation"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    numbers = range(10 ** (COLUMNS - 1), 10**COLUMNS)
    return tuple(p for p in itertools.starmap(Problem, itertools.product(numbers, FACTORS)) if p.split == split)


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems drawn uniformly without repetition from "train", "validation" or "test"."""
    pool = all_problems(split)
    if not 0 <= count <= len(pool):
        raise ValueError(f"count = {count}: the {split} split has {len(pool)} problems")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[i] for i in order[:count].tolist()]


# --- settings -------------------------------------------------------------------------------------

NAMES = "ABCD"  # of members, in order
FACTS = len(FACTORS) ** 2


def option(default: float, text: str, good: Callable[[Any], bool], rule: str) -> Any:
    """A field of Settings: its line in --help, and what its value must be."""
    return field(default=default, metadata={"help": f"{text}; {rule}", "good": good, "rule": rule})


@dataclass(frozen=True)
class Settings:
    """All that decides a member's weights, beside its place among the members. ValueError on impossible values."""

    seed: int = option(0, "seed of weights, batches, rare facts", lambda x: 0 <= x < 2**32, "in [0, 2**32)")
    steps: int = option(1500, "training steps", lambda x: x >= 1, "at least 1")
    rare_facts: int = option(
        16, "facts that a member meets rarely", lambda x: 0 <= x <= FACTS, f"at most {FACTS} with all members together"
    )
    weight: float = option(0.05, "how often a rare fact is drawn, others 1", lambda x: 0 < x <= 1, "in (0, 1]")
    misprints: float = option(0.0, "share of false result digits in training", lambda x: 0 <= x < 1, "in [0, 1)")
    lr: float = option(6e-3, "peak learning rate of AdamW", lambda x: 0 < x < 1, "in (0, 1)")
    batch: int = option(64, "sequences a step", lambda x: x >= 1, "at least 1")
    width: int = option(64, "width of the model", lambda x: x >= 8 and x % 8 == 0, "a multiple of 8")
    layers: int = option(3, "layers of the model", lambda x: x >= 1, "at least 1")

    def __post_init__(self):
        for f in fields(self):
            if not f.metadata["good"](getattr(self, f.name)):
                raise ValueError(f"{f.name} is {getattr(self, f.name)}, but must be {f.metadata['rule']}")


# --- what a member meets in training ----------------------------------------------------------------


def rare_facts(settings: Settings, member: int) -> list[tuple[int, int]]:
    """The rare facts of member 0, 1, ...: disjoint between members, spread evenly over digits and multipliers."""
    generator = torch.Generator().manual_seed(settings.seed)
    digits, factors = ([FACTORS[i] for i in torch.randperm(len(FACTORS), generator=generator)] for _ in "dm")
    deck = [(digits[(row + i) % len(digits)], factor) for row in range(len(digits)) for i, factor in enumerate(factors)]
    return sorted(deck[member * settings.rare_facts : (member + 1) * settings.rare_facts])


def draw_weights(pool: Sequence[Problem], rare: list[tuple[int, int]], weight: float) -> Tensor:
    """(N,) weight of each problem in the draw: a factor `weight` for each column that needs a rare fact."""
    return torch.tensor([weight ** sum(fact in rare for fact in problem.facts) for problem in pool])  # (N,)


def sequence(problem: Problem) -> list[int]:
    """Prompt, reasoning, suffix, answer, EOS to the end: LENGTH ids."""
    ids = encode(problem.prompt + problem.reasoning + SUFFIX + problem.answer)
    return ids + [EOS] * (LENGTH - len(ids))


@cache
def training_table() -> Tensor:
    """(N, L) every training problem; not to be written into."""
    return torch.tensor([sequence(problem) for problem in all_problems("train")])  # (N, L)


def regions() -> tuple[Tensor, Tensor, Tensor]:
    """For each position (L,): its column in the reasoning, -1 in the prompt, COLUMNS in suffix and answer; whether it
    is a result digit of a column; whether it may be masked (prompt and suffix are not)."""
    place = torch.arange(LENGTH) - PROMPT_LENGTH  # (L,)
    column = place.div(8, rounding_mode="floor").clamp(-1, COLUMNS)  # (L,)
    result = (column >= 0) & (column < COLUMNS) & (place % 8 >= 6)  # (L,) the last two of a column's eight tokens
    return column, result, (column >= 0) & (place != REASONING_LENGTH)


def misprint(tokens: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """A copy of tokens (B, L): each result digit of the reasoning becomes another digit with probability `rate`.

    Carries and answer stay true, so that a member cannot merely copy its reasoning into the answer."""
    _, result, _ = regions()
    wrong = result & (torch.rand(tokens.shape, generator=generator) < rate)  # (B, L)
    shift = torch.randint(1, 10, tokens.shape, generator=generator)  # (B, L)
    return torch.where(wrong, (tokens + shift) % 10, tokens)  # the id of a digit is the digit


def mask(batch: int, generator: torch.Generator) -> Tensor:
    """(B, L) bool, the masked positions of a batch, each sequence in one of three kinds of state:

    uniform     each token with probability t, the times of Eq. 4
    left        left to right, as decoding goes: one column (or the answer) in work, all behind it masked
    results     every result and the answer, and some of the rest: each column asks for its fact at once

    Uniform states alone teach the times table slowly, since the answer and the next carry give most results away.
    """
    column, result, editable = regions()
    t, kind = torch.rand(2, batch, 1, generator=generator)  # (B, 1)
    some = torch.rand(batch, LENGTH, generator=generator)  # (B, L)
    current = torch.randint(0, COLUMNS + 1, (batch, 1), generator=generator)  # (B, 1)
    left = (column > current) | (column == current) & (result | (some < t))  # (B, L)
    results = result | (column == COLUMNS) | (some < t**2)  # (B, L)
    return editable & torch.where(kind < 1 / 3, some < t, torch.where(kind < 2 / 3, left, results))


# --- training one member ----------------------------------------------------------------------------


def build(settings: Settings) -> mdlm.MDLM:
    """A fresh model; its weights are drawn from PyTorch's global generator."""
    model = mdlm.MDLM(
        mdlm.ModelConfig(
            vocab_size=len(VOCABULARY), width=settings.width, layers=settings.layers, heads=4, kv_heads=4,
            hidden=3 * settings.width, max_length=LENGTH, mask_id=MASK, eos_id=EOS, pad_id=PAD,
            rope_theta=100.0,  # wavelengths for 46 positions, not thousands
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.embed.weight, std=0.3)  # the default 1 drowns what the layers add
    return model


def train(
    settings: Settings, member: int, device: str = "cpu", report: Callable[[int, float], None] | None = None
) -> mdlm.MDLM:
    """Train member 0, 1, ... and return it in eval mode. `report(step, loss)` is called every 20 steps.

    The first part of the steps learns the times table from the states of `mask`, by mean cross-entropy; the rest
    minimises Eq. 4. On a CPU one thread does all, so that the number of cores does not change a sum.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed * len(NAMES) + member)
            model = build(settings).to(device)
        _optimise(model, settings, member, report or (lambda step, loss: None))
    finally:
        torch.set_num_threads(threads)
    return model.eval()


TABLE_SHARE = 0.55  # of the steps, for the times table before Eq. 4


def _optimise(model: mdlm.MDLM, settings: Settings, member: int, report: Callable[[int, float], None]) -> None:
    generator = torch.Generator().manual_seed(settings.seed * len(NAMES) + member)
    table = training_table()  # (N, L)
    weights = draw_weights(all_problems("train"), rare_facts(settings, member), settings.weight)  # (N,)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    editable = regions()[2].to(model.embed.weight.device)  # (L,)
    noise = torch.Generator(editable.device).manual_seed(generator.initial_seed())
    warmup = 50
    for step in range(settings.steps):
        rate = min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        optimiser.param_groups[0]["lr"] = settings.lr * rate
        drawn = torch.multinomial(weights, settings.batch, replacement=True, generator=generator)  # (B,)
        tokens = misprint(table[drawn], settings.misprints, generator)  # (B, L)
        tokens = tokens.to(noise.device)
        if step < TABLE_SHARE * settings.steps:
            masked = mask(settings.batch, generator).to(noise.device)  # (B, L)
            loss = F.cross_entropy(model(tokens.masked_fill(masked, MASK))[masked], tokens[masked])
        else:
            loss = mdlm.diffusion_loss(model, tokens, editable.expand_as(tokens), noise) / editable.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 20 == 0 or step + 1 == settings.steps:
            report(step + 1, loss.item())


def answers(model: mdlm.MDLM, asked: Sequence[Problem], device: str = "cpu") -> list[str]:
    """The answers that a member gives alone, decoding in blocks of one column."""
    canvas = tie.Canvas.blank(
        [encode(p.prompt) for p in asked], encode(SUFFIX), REASONING_LENGTH, ANSWER_LENGTH,
        mask_id=MASK, pad_id=PAD, device=device,
    )  # fmt: skip
    done = tie.decode(tie.Member(model, MASK, EOS), canvas, tie.Config(block_size=8))
    return [decode(ids) for ids in done.tokens[:, done.answer].tolist()]


# --- members side by side ---------------------------------------------------------------------------


Plan = dict[str, tuple[Settings, str]]  # folder of a member -> its settings, and which of NAMES it is


def plan_members(settings: Settings, members: int = 2) -> Plan:
    """Members "A", "B", ... of the same settings, each in a folder of its own name; ValueError if there are too many."""
    if not 1 <= members <= len(NAMES) or members * settings.rare_facts > FACTS:
        raise ValueError(f"members is {members} with {settings.rare_facts} rare facts each: "
                         f"at most {len(NAMES)} members, and {FACTS} facts for all of them")  # fmt: skip
    return {name: (settings, name) for name in NAMES[:members]}


def train_members(plan: Plan, out: str | os.PathLike, device: str = "") -> list[dict]:
    """Train all members of the plan side by side, one process each, into folders of `out`; return their records.

    A folder that is complete, with equal settings, stays as it is; any other is written anew. device "" takes CUDA
    where there is one. ValueError on folders and devices that cannot work, before any training; RuntimeError when a
    training process ends early.
    """
    folders = {name: Path(out) / name for name in plan}
    todo = [name for name in plan if read_record(folders[name], *plan[name]) is None]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # "meta" holds no value
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not to be had here; try cpu") from None
    _prepare([folders[name] for name in todo])
    _run_workers({name: (*plan[name], str(folders[name]), device) for name in todo})
    return [json.loads((folder / RECORD).read_text()) for folder in folders.values()]


RECORD = "training.json"  # written last: a folder without it is not complete


def read_record(folder: Path, settings: Settings, name: str) -> dict | None:
    """The training record of a complete folder with these settings, or None."""
    try:
        record = json.loads((folder / RECORD).read_text())
        same = record["settings"] == asdict(settings) and record["name"] == name
        same = same and 0 <= record["validation_accuracy"] <= 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    files = all((folder / file).is_file() for file in ("model.safetensors", "config.json"))
    return record if same and files else None


def _prepare(folders: list[Path]) -> None:
    """Make the folders and check that all can be written; only then take old records away: none is complete now."""
    folder = Path()
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{RECORD}.part").write_text("")
            (folder / f"{RECORD}.part").unlink()
        for folder in folders:
            (folder / RECORD).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to folder {folder}: {error.strerror}; give another") from None


def _work(pipe: Connection, settings: Settings, name: str, folder: str, device: str) -> None:
    """One training process: sends (step, loss) as it goes, or a ValueError where it cannot go on."""
    end_with_parent()
    try:
        start = time.monotonic()
        model = train(settings, NAMES.index(name), device, lambda step, loss: pipe.send((step, loss)))
        seconds = time.monotonic() - start
        asked = problems("validation", 300, seed=settings.seed)
        wrong = [(p, answer) for p, answer in zip(asked, answers(model, asked, device)) if answer != p.answer]
        mdlm.save(model, folder)
        record = {
            "name": name, "settings": asdict(settings), "rare_facts": rare_facts(settings, NAMES.index(name)),
            "validation_problems": len(asked), "validation_accuracy": 1 - len(wrong) / len(asked),
            "mistakes": [f"{p.prompt}{p.answer}, not {answer}" for p, answer in wrong[:3]],
            "seconds": round(seconds, 1), "device": device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }  # fmt: skip
        part = Path(folder) / f"{RECORD}.part"
        part.write_text(json.dumps(record, indent=1))
        os.replace(part, Path(folder) / RECORD)
    except BrokenPipeError:  # nobody waits for this member any more
        sys.exit(1)
    except (OSError, SafetensorError) as error:
        pipe.send(ValueError(f"cannot write to folder {folder}: {error}; make room, or give another"))
    except RuntimeError as error:  # too little memory, for one
        pipe.send(ValueError(f"training of member {name} failed: {error}"))


def end_with_parent() -> None:
    """For a process of a pool or of training: it ends when its parent was killed, instead of waiting for ever."""

    def watch() -> None:
        cast(Any, multiprocessing.parent_process()).join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def deaf_processes() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C, which reaches all at once: this one does, and ends them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _run_workers(jobs: dict[str, tuple[Settings, str, str, str]]) -> None:
    """Run `_work` for each job, a spawned process each. RuntimeError as soon as one fails; none outlives the call."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for name, job in jobs.items():
            pipe, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(theirs, *job), daemon=True)
            with deaf_processes():
                worker.start()
            theirs.close()  # so that the end of the process reads as the end of the pipe
            workers[pipe] = (name, worker)
        _watch(workers, sum(job[0].steps for job in jobs.values()))
    finally:
        for _, worker in workers.values():
            worker.terminate()
            worker.join()


def _watch(workers: dict[Any, tuple[str, Any]], total: int) -> None:
    """Show the progress of all members, `total` steps, in one line until every process has ended."""
    seen = {name: (0, math.nan) for name, _ in workers.values()}  # step, loss
    at_work = dict(workers)
    with tqdm(total=total, unit="step", disable=None if seen else True) as bar:  # None: on a terminal only
        while at_work:
            pipe = cast(Connection, wait(list(at_work))[0])
            name, worker = at_work[pipe]
            try:
                progress = pipe.recv()
            except EOFError:
                del at_work[pipe]
                worker.join()
                if worker.exitcode != 0:
                    raise RuntimeError(f"training of member {name} ended with exit code {worker.exitcode}") from None
                continue
            if isinstance(progress, ValueError):
                raise progress
            bar.update(progress[0] - seen[name][0])
            seen[name] = progress
            bar.set_postfix_str(", ".join(f"{n} loss {loss:.2f}" for n, (_, loss) in seen.items()))


# --- command line -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Bad input costs one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def keep_memory() -> None:
    """Have the processes started from here keep freed memory: by default glibc hands it back and faults it in again
    at every step, a quarter of the time of a toy model. Other systems do not read these names."""
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(name, str(2**25))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    text, _, example = (__doc__ or "").partition("Example: ")
    parser = Parser(
        prog="train_toy.py", description=text.splitlines()[0], epilog=f"example: {example}", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    for f in fields(Settings):
        kind = type(f.default)
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=kind, default=f.default, help=f.metadata["help"])
    parser.add_argument("--members", type=int, default=2, help=f"members to train, at most {len(NAMES)}")
    parser.add_argument("--out", default="checkpoints/toy", help="folder of the members' folders")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; empty: cuda where there is one")
    options = parser.parse_args(arguments)
    try:
        options.settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    keep_memory()
    try:
        records = train_members(plan_members(options.settings, options.members), options.out, options.device)
    except (ValueError, RuntimeError) as error:
        print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("train_toy.py: interrupted; the same command goes on with the members that are not complete",
              file=sys.stderr)  # fmt: skip
        return 130
    for record in records:
        print(f"member {record['name']}: {record['validation_accuracy']:.1%} of {record['validation_problems']} "
              f"validation problems right, trained in {record['seconds']:.0f} s")  # fmt: skip
        for mistake in record["mistakes"]:
            print(f"    {mistake}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
