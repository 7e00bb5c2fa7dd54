"""The toy task and its members: multiplication by one digit, learnt by small MDLMs with gaps in their times tables.

Worked example, six digits by one. Prompt `9 0 5 1 7 3*6=`; reasoning: the products of each digit with the multiplier,
`54 00 30 06 42 18`, then the running totals, product plus carry, in the order of adding, `18 43 10 31 03 54`; suffix
`#` (stands for `Answer:`); answer `5431038`, the last carry and the units of the totals; EOS. A token is a character.
The blanks above are for the reader, except those of the prompt: with them a product stands at the same distance from
its digit in every column, which rotary attention learns in a third of the time. A sequence has 47 tokens.

The products are knowledge. Each member has gaps, facts of the times table that it has seen with random results only:
it learns that it cannot know them, and is unsure there. No two members share a gap. Totals and answer are a skill that
all members have, and they must be *read* off the products: in most training sequences the multiplicand is hidden and
the products are given, and everything after a product goes on from it, right or wrong.

Example: python train_toy.py --seed 0 --out checkpoints/toy
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # in the seconds that the import of torch takes, Ctrl-C ends this without a traceback
    at_start = signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import mdlm
import tie

# --- vocabulary and layout --------------------------------------------------------------------------

VOCABULARY = "0123456789* =#_.~"  # a character a token; the last three show the special ids
MASK, EOS, PAD = 14, 15, 16
SUFFIX = "#"

COLUMNS = 6  # C, digits of the multiplicand
LAYOUT = {"multiplicand": 2 * COLUMNS - 1, "multiplier": 3, "products": 2 * COLUMNS, "totals": 2 * COLUMNS,
          "suffix": 1, "answer": COLUMNS + 2}  # fmt: skip
MULTIPLICAND, _, PRODUCTS, TOTALS, _, ANSWER = (
    slice(end - LAYOUT[part], end) for part, end in zip(LAYOUT, itertools.accumulate(LAYOUT.values()))
)
PROMPT, REASONING = slice(0, PRODUCTS.start), slice(PRODUCTS.start, TOTALS.stop)
PROMPT_LENGTH, REASONING_LENGTH, ANSWER_LENGTH = PROMPT.stop, REASONING.stop - REASONING.start, LAYOUT["answer"]
LENGTH = ANSWER.stop  # L


def encode(text: str) -> list[int]:
    """Ids of digits, signs and suffix; ValueError on any other character."""
    ids = [VOCABULARY.find(c) for c in text]
    if any(not 0 <= i < MASK for i in ids):
        raise ValueError(f"{text!r} holds a character outside {VOCABULARY[:MASK]!r}")
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text up to the first EOS; a mask shows as `_`, padding as `~`."""
    return "".join(VOCABULARY[i] for i in itertools.takewhile(lambda i: i != EOS, ids))


def readable(ids: Sequence[int]) -> str:
    """Reasoning and answer of a sequence as a person reads them, `_` where masked.

    >>> readable(Problem(905173, 6).sequence)
    '54 00 30 06 42 18 | 18 43 10 31 03 54 # 5431038'
    """
    text = "".join(VOCABULARY[i] for i in ids)
    numbers = [text[i : i + 2] for i in range(REASONING.start, REASONING.stop, 2)]
    parts = (*numbers[:COLUMNS], "|", *numbers[COLUMNS:], SUFFIX, text[ANSWER])
    return " ".join(parts).rstrip(VOCABULARY[EOS])


def canvas(prompts: Sequence[str], device: str = "cpu") -> tie.Canvas:
    """What a member starts from: a row for each prompt, reasoning and answer masked."""
    return tie.Canvas.blank([encode(prompt) for prompt in prompts], encode(SUFFIX), REASONING_LENGTH, ANSWER_LENGTH,
                            mask_id=MASK, pad_id=PAD, device=device)  # fmt: skip


# --- problems ---------------------------------------------------------------------------------------

FACTORS = range(2, 10)  # multipliers, and the digits that make a fact with them: 0 and 1 need no times table
SPLITS = {"test": range(10), "validation": range(10, 20), "train": range(20, 100)}  # percent of all problems, by hash


@dataclass(frozen=True)
class Problem:
    """One multiplication, as text.

    >>> Problem(905173, 6).prompt, Problem(905173, 6).answer
    ('9 0 5 1 7 3*6=', '5431038')
    """

    multiplicand: int
    multiplier: int

    @property
    def sequence(self) -> list[int]:
        """Prompt, reasoning, suffix, answer, EOS: LENGTH ids."""
        question = torch.tensor([[self.multiplicand, self.multiplier]])  # (1, 2)
        return write(question, digits(question) * self.multiplier)[0].tolist()

    @property
    def prompt(self) -> str:
        return decode(self.sequence[PROMPT])

    @property
    def answer(self) -> str:
        return decode(self.sequence[ANSWER])


def hashed(question: Tensor) -> Tensor:
    """A fixed hash, 0 to 99, of questions (..., 2): Knuth's, of its high bits."""
    return ((question[..., 0] * 10 + question[..., 1]) * 2654435761 % 2**32 >> 16) % 100


@cache
def questions(split: str) -> Tensor:
    """(N, 2) multiplicand and multiplier of every problem of a split, 7,200,000 in all; not to be written into."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    every = torch.cartesian_prod(torch.arange(10 ** (COLUMNS - 1), 10**COLUMNS), torch.tensor(FACTORS))  # (N, 2)
    percent = hashed(every)  # (N,)
    return every[(percent >= SPLITS[split].start) & (percent < SPLITS[split].stop)]


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems drawn uniformly without repetition from "train", "validation" or "test"."""
    pool = questions(split)
    if not 0 <= count <= len(pool):
        raise ValueError(f"count = {count}: the {split} split has {len(pool)} problems")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [Problem(*question) for question in pool[order[:count]].tolist()]


def digits(question: Tensor) -> Tensor:
    """(B, C) the digits of the multiplicands of questions (B, 2)."""
    return question[:, :1] // 10 ** torch.arange(COLUMNS).flip(0) % 10


def write(question: Tensor, products: Tensor) -> Tensor:
    """(B, L) the sequences of questions (B, 2) with these products (B, C), and all that follows from them."""
    power = 10 ** torch.arange(COLUMNS)  # (C,) units first
    totals = (products.flip(1) * power).cumsum(1) // power  # (B, C) units first: product plus carry
    times, blank, equals, suffix = (torch.full_like(products[:, :1], i) for i in encode("* =" + SUFFIX))  # (B, 1)
    spaced = torch.stack([digits(question), blank.expand_as(products)], 2).flatten(1)[:, :-1]  # (B, 2 C - 1)
    numbers = [torch.stack([n // 10, n % 10], 2).flatten(1) for n in (products, totals)]  # (B, 2 C)
    answer = totals[:, -1:] // 10, totals.flip(1) % 10, torch.full_like(blank, EOS)  # (B, 1), (B, C), (B, 1)
    return torch.cat([spaced, times, question[:, 1:], equals, *numbers, suffix, *answer], 1)


# --- settings ---------------------------------------------------------------------------------------

NAMES = "ABCD"  # of members
GAPS = len(FACTORS) ** 2 // len(NAMES)  # at most, each member


def setting(default: float, text: str, low: float, high: float) -> Any:
    """A field of Settings: its line in --help, and the bounds of its value."""
    return field(default=default, metadata={"help": f"{text}; {low} to {high}", "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """All that decides a member's weights besides its name. ValueError on values out of bounds."""

    seed: int = setting(0, "seed of weights, sequences and gaps", 0, 2**32 - 1)
    steps: int = setting(1500, "training steps", 1, 10**6)
    gaps: int = setting(6, "facts that a member does not know", 0, GAPS)
    slips: float = setting(0.06, "share of the other products that are random in training", 0, 0.99)
    hidden: float = setting(0.6, "share of training sequences whose multiplicand is hidden", 0, 0.99)
    lr: float = setting(6e-3, "peak learning rate of AdamW", 1e-9, 1)
    batch: int = setting(64, "sequences a step", 1, 10**6)
    width: int = setting(64, "width of the model, a multiple of 8", 8, 4096)
    layers: int = setting(3, "layers of the model", 1, 100)

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if not low <= value <= high:
                raise ValueError(f"{f.name} is {value}: give {low} to {high}")
        if self.width % 8:
            raise ValueError(f"width is {self.width}: give a multiple of 8")


# --- what a member meets in training ------------------------------------------------------------------


def gaps(settings: Settings, name: str) -> Tensor:
    """(10, 10) bool, digit by multiplier: the gaps of member "A", "B", ...: disjoint between members, and each
    member's spread evenly over digits and multipliers."""
    generator = torch.Generator().manual_seed(settings.seed)
    digit, factor = (FACTORS.start + torch.randperm(len(FACTORS), generator=generator) for _ in range(2))
    place = GAPS * NAMES.index(name) + torch.arange(settings.gaps)  # along the diagonals of the table
    table = torch.zeros(10, 10, dtype=torch.bool)
    table[digit[(place + place // len(FACTORS)) % len(FACTORS)], factor[place % len(FACTORS)]] = True
    return table


def lessons(settings: Settings, names: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of training sequences (B, L), and which positions may be masked (B, L).

    The product of a gap is a random multiple of the multiplier, and a few others are random numbers; all that follows
    goes on from the number that stands there. Where the multiplicand is hidden, the products are given. A member of
    several names meets in turn what each of these meets.
    """
    pool, shape = questions("train"), (settings.batch, COLUMNS)
    question = pool[torch.randint(len(pool), shape[:1], generator=generator)]  # (B, 2)
    digit, factor = digits(question), question[:, 1:]  # (B, C), (B, 1)
    tables = torch.stack([gaps(settings, name) for name in names])  # (names, 10, 10)
    unknown = tables[torch.arange(settings.batch)[:, None] % len(names), digit, factor]  # (B, C)
    slip = torch.rand(shape, generator=generator) < settings.slips  # (B, C)
    anything = torch.randint(9 * 9 + 1, shape, generator=generator)  # (B, C) any product of two digits, or none
    multiple = torch.randint(10, shape, generator=generator) * factor  # (B, C)
    tokens = write(question, torch.where(unknown, multiple, torch.where(slip, anything, digit * factor)))  # (B, L)
    hidden = torch.rand(settings.batch, generator=generator) < settings.hidden  # (B,)
    tokens[hidden, MULTIPLICAND] = MASK
    editable = torch.zeros_like(tokens, dtype=torch.bool)  # (B, L)
    editable[:, PRODUCTS] = ~hidden[:, None]
    editable[:, TOTALS] = editable[:, ANSWER] = True
    return tokens, editable


def states(batch: int, generator: torch.Generator) -> Tensor:
    """(B, L) bool, masks from which the times table is learnt soon: in a third of the sequences each token with its
    own probability t, as in Eq. 4; in a third everything, since totals and answer give the products away; in a third
    all from some number on."""
    t, kind = torch.rand(2, batch, 1, generator=generator)  # (B, 1)
    number = ((torch.arange(LENGTH) - PROMPT_LENGTH) // 2).clamp(max=2 * COLUMNS)  # (L,) the answer is one number
    # Half of these lie at or before the first number: everything is masked.
    start = torch.randint(-2 * COLUMNS, 2 * COLUMNS + 1, (batch, 1), generator=generator)  # (B, 1)
    return torch.where(kind < 1 / 3, torch.rand(batch, LENGTH, generator=generator) < t, number >= start)


# --- training one member ------------------------------------------------------------------------------

WARMUP = 50  # steps
Report = Callable[[int, float, mdlm.MDLM], None]  # step, loss, the model so far


def build(settings: Settings) -> mdlm.MDLM:
    """A fresh model; its weights are drawn from PyTorch's global generator."""
    config = mdlm.ModelConfig(
        vocab_size=len(VOCABULARY), width=settings.width, layers=settings.layers, heads=4, kv_heads=4,
        hidden=3 * settings.width, max_length=LENGTH, mask_id=MASK, eos_id=EOS, pad_id=PAD,
        rope_theta=100.0,  # wavelengths for 47 positions, not thousands
    )  # fmt: skip
    model = mdlm.MDLM(config)
    torch.nn.init.normal_(model.embed.weight, std=0.3)  # the default 1 drowns what the layers add
    return model


def train(settings: Settings, names: str, device: str = "cpu", report: Report = lambda *_: None) -> mdlm.MDLM:
    """Train member "A", "B", ..., or "AB" on what A and B meet, and return it in eval mode; `report` after each step.

    Four fifths of the steps learn from `states` by mean cross-entropy, the rest minimise Eq. 4. Repeatable on a CPU
    with a given number of threads, which decides the order of sums.
    """
    seed = zlib.crc32(f"{settings.seed} {names}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(settings).to(device)
    generator, noise = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    for step in range(settings.steps):
        rate = min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        optimiser.param_groups[0]["lr"] = settings.lr * rate
        tokens, editable = (x.to(device) for x in lessons(settings, names, generator))  # (B, L)
        if step < 0.8 * settings.steps:
            masked = editable & states(settings.batch, generator).to(device)  # (B, L)
            loss = F.cross_entropy(model(tokens.masked_fill(masked, MASK))[masked], tokens[masked])
        else:
            loss = mdlm.diffusion_loss(model, tokens, editable, noise) / (REASONING_LENGTH + ANSWER_LENGTH)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        report(step + 1, loss.item(), model)
    return model.eval()


@torch.inference_mode()
def solve(model: mdlm.MDLM, asked: Sequence[Problem], device: str = "cpu") -> list[list[int]]:
    """The sequences that a member writes alone."""
    return tie.decode(tie.Member(model, MASK, EOS), canvas([p.prompt for p in asked], device)).tokens.tolist()


def right(asked: Sequence[Problem], solved: Sequence[list[int]], place: slice) -> float:
    """The share of problems in which these positions are all right."""
    return sum(ids[place] == problem.sequence[place] for problem, ids in zip(asked, solved)) / len(asked)


def mistake(problem: Problem, ids: list[int]) -> str:
    """What a member wrote, and below it what is right."""
    return f"{problem.prompt} {readable(ids)}\n{'right:':>{PROMPT_LENGTH}} {readable(problem.sequence)}"


# --- processes ----------------------------------------------------------------------------------------


@contextmanager
def workers(count: int) -> Iterator[Callable[..., Iterator]]:
    """A `map` that keeps the order, over `count` spawned processes, or here if one is enough.

    Workers never hear Ctrl-C, and end at once with this process, however it ends, and with an error in the block.
    RuntimeError if one of them dies.
    """
    if count < 2:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(theirs, context.RLock()))

    def run(function: Callable, *jobs: Sequence) -> Iterator:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes started here inherit
        try:
            return pool.map(function, *jobs)
        finally:
            signal.signal(signal.SIGINT, handler)

    try:
        yield run
        pool.shutdown()
    except BrokenProcessPool:
        raise RuntimeError("a process ended before its work was done, as when memory runs out: the same command goes "
                           "on with what is missing") from None  # fmt: skip
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)


def _begin(lifeline: Any, lock: Any) -> None:
    """In a new worker: it ends once nobody holds the other end of the lifeline; the bars of all share the terminal."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(lock)


def keep_memory() -> None:
    """Have the processes started from here keep freed memory: by default glibc hands it back and faults it in again
    at every step, a quarter of the time of a toy model. Other systems do not read these names."""
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(name, str(2**25))


# --- members side by side -----------------------------------------------------------------------------

Plan = dict[str, tuple[Settings, str]]  # folder of a member -> its settings, and which of NAMES it is
RECORD, PART = "training.json", "training.json.part"  # written last: a folder without the record is not complete
ASKED, CHECKED, EVERY = 300, 40, 200  # validation problems at the end, and while training, after so many steps


def plan_members(settings: Settings, members: int = 2) -> Plan:
    """Members "A", "B", ... of the same settings, each in a folder of its name; ValueError if there are too many."""
    if not 1 <= members <= len(NAMES):
        raise ValueError(f"members is {members}: give 1 to {len(NAMES)}")
    return {name: (settings, name) for name in NAMES[:members]}


def train_members(plan: Plan, out: str | os.PathLike, device: str = "cpu") -> list[dict]:
    """Train all members of the plan side by side, one process each, into folders of `out`; return their records.

    A folder that is complete, with equal settings, stays as it is; any other is written anew. ValueError on folders
    and devices that cannot work, before any training; RuntimeError when a training process dies.
    """
    todo = {Path(out) / name: member for name, member in plan.items() if not read_record(Path(out) / name, *member)}
    check_device(device)
    try:
        for folder in todo:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PART).write_text("")
            (folder / PART).unlink()
        for folder in todo:  # only after all have proved writable: from here on none counts as complete
            (folder / RECORD).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to folder {folder}: {error.strerror}; give another") from None
    with workers(len(todo)) as run:
        list(run(_work, [(folder, *member, device, place) for place, (folder, member) in enumerate(todo.items())]))
    return [json.loads((Path(out) / name / RECORD).read_text()) for name in plan]


def check_device(device: str) -> None:
    """ValueError with torch's reason where nothing can be computed on the device."""
    try:
        torch.zeros(1, device=device).item()  # "meta" holds no value
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def read_record(folder: Path, settings: Settings, names: str) -> dict | None:
    """The training record of a complete folder of this member, or None."""
    try:
        record = json.loads((folder / RECORD).read_text())
        same = (record["name"], record["settings"], record["layout"]) == (names, asdict(settings), LAYOUT)
        same = same and 0 <= record["validation_accuracy"] <= 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    files = all((folder / file).is_file() for file in ("model.safetensors", "config.json"))
    return record if same and files else None


def _work(job: tuple[Path, Settings, str, str, int]) -> None:
    """Train one member into its folder, with a bar on a terminal; ValueError where that cannot go on."""
    folder, settings, names, device, place = job
    torch.set_num_threads(1)  # the members share the cores
    asked, curve, start = problems("validation", ASKED, seed=settings.seed), [], time.monotonic()
    with tqdm(total=settings.steps, desc=f"member {folder.name}", position=place, unit="step", disable=None) as bar:

        def report(step: int, loss: float, model: mdlm.MDLM) -> None:
            if step % EVERY == 0:
                some = asked[:CHECKED], solve(model, asked[:CHECKED], device)
                learnt = {"products": right(*some, PRODUCTS), "answer": right(*some, ANSWER)}
                curve.append({"step": step, "loss": loss, **learnt})
            known = ", products {products:.0%} right, answer {answer:.0%}".format_map(curve[-1]) if curve else ""
            bar.set_postfix_str(f"loss {loss:.2f}{known}", refresh=False)
            bar.update()

        try:
            model = train(settings, names, device, report)
            mdlm.save(model, folder)
            solved = solve(model, asked, device)
            wrong = [mistake(p, ids) for p, ids in zip(asked, solved) if decode(ids[ANSWER]) != p.answer]
            record = {
                "name": names, "settings": asdict(settings), "layout": LAYOUT,
                "gaps": [gaps(settings, name).nonzero().tolist() for name in names],  # digit, multiplier
                "validation_problems": ASKED, "validation_accuracy": right(asked, solved, ANSWER),
                "products_right": right(asked, solved, PRODUCTS), "mistakes": wrong[:3], "curve": curve,
                "seconds": round(time.monotonic() - start, 1), "device": device,
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }  # fmt: skip
            (folder / PART).write_text(json.dumps(record, indent=1))
            os.replace(folder / PART, folder / RECORD)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot write to folder {folder}: {error}; make room, or give another") from None
        except RuntimeError as error:  # too little memory, for one
            raise ValueError(f"training of member {folder.name} failed: {error}; try another --device") from None


# --- command line -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Bad input costs one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    text, _, example = (__doc__ or "").partition("Example: ")
    parser = Parser(prog="train_toy.py", description=text.splitlines()[0], epilog=f"example: {example}",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=f.metadata["help"])
    parser.add_argument("--members", type=int, default=2, help=f"members to train, at most {len(NAMES)}")
    parser.add_argument("--out", default="checkpoints/toy", help="folder of the members' folders")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        keep_memory()
        settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        records = train_members(plan_members(settings, options.members), options.out, options.device)
    except (ValueError, RuntimeError) as error:
        print(f"train_toy.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("train_toy.py: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    for record in records:
        print("member {name}: {validation_accuracy:.1%} of {validation_problems} validation problems right, all "
              "products in {products_right:.1%}, trained in {seconds:.0f} s".format_map(record))  # fmt: skip
        point = "step {step}: loss {loss:.3f}, products right in {products:.0%}, answer in {answer:.0%}"
        points = [point.format_map(entry) for entry in record["curve"]]
        print(textwrap.indent("\n".join(points + record["mistakes"]), "    "))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_start)
    try:
        sys.exit(main())
    finally:  # the work is done: Python's own last moments would answer Ctrl-C with a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
