"""The toy task: multiplication, learnt by small MDLMs with gaps in their times tables.

A worked example, six digits by one:

    prompt      9 0 5 1 7 3*6=
    reasoning   54 00 30 06 42 18   the products of each digit with the multiplier
                18 43 10 31 03 54   the running totals, product plus carry, units first
    suffix      #                   stands for "Answer:"
    answer      5431038             the last carry and the last digits of the totals, then EOS

A token is a character. The spaces between the numbers are for the reader, but those of the prompt
are tokens: with them, a product is at the same distance from its digit in every column, which
rotary attention learns in a third of the time. A sequence has 47 tokens.

The products are knowledge. Each member has gaps: facts of the times table for which it only ever
saw random results, so it learns to be unsure about them. No two members share a gap. Totals and
answer are a skill that every member has, and they must be *read* off the products: training hides
half of the multiplicand's digits, gives their products, and lets everything after a product follow
from it, right or wrong.

Members also notice mistakes. Some products next to a visible digit are wrong in training, and in
half of these cases what follows is nevertheless right. So a member that knows a fact doubts the
answer that another member has derived from a wrong product.

Example: python train_toy.py --seed 0 --out checkpoints/toy
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import signal
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import mdlm
import tie

# --- vocabulary and layout ------------------------------------------------------------------------

VOCABULARY = "0123456789* =#_.~"  # one character per token; the last three show MASK, EOS and PAD
MASK, EOS, PAD = 14, 15, 16
SUFFIX = "#"

COLUMNS = 6  # C, digits of the multiplicand
LAYOUT = {
    "multiplicand": 2 * COLUMNS - 1,
    "multiplier": 3,
    "products": 2 * COLUMNS,
    "totals": 2 * COLUMNS,
    "suffix": 1,
    "answer": COLUMNS + 2,
}
MULTIPLICAND, _, PRODUCTS, TOTALS, _, ANSWER = (
    slice(end - length, end)
    for length, end in zip(LAYOUT.values(), itertools.accumulate(LAYOUT.values()))
)
PROMPT = slice(0, PRODUCTS.start)
PROMPT_LENGTH = PROMPT.stop
REASONING_LENGTH = TOTALS.stop - PRODUCTS.start
ANSWER_LENGTH = LAYOUT["answer"]
LENGTH = ANSWER.stop  # L


def encode(text: str) -> list[int]:
    """The ids of a text of digits, signs and suffix. ValueError for any other character."""
    return [VOCABULARY.index(character, 0, MASK) for character in text]


def decode(ids: list[int]) -> str:
    """The text up to the first EOS; a mask shows as `_`, padding as `~`."""
    return "".join(VOCABULARY[i] for i in ids).split(VOCABULARY[EOS])[0]


def readable(ids: list[int]) -> str:
    """Reasoning and answer of a sequence with spaces between the numbers, `_` where masked.

    >>> readable(Problem(905173, 6).sequence)
    '54 00 30 06 42 18 | 18 43 10 31 03 54 # 5431038'
    """
    text = "".join(VOCABULARY[i] for i in ids)
    numbers = [text[i : i + 2] for i in range(PRODUCTS.start, TOTALS.stop, 2)]
    parts = [*numbers[:COLUMNS], "|", *numbers[COLUMNS:], SUFFIX, text[ANSWER]]
    return " ".join(parts).rstrip(VOCABULARY[EOS])


def canvas(
    prompts: list[str], device: str = "cpu", answer_length: int = ANSWER_LENGTH
) -> tie.Canvas:
    """The canvas that a member starts from: one row per prompt, reasoning and answer masked."""
    return tie.Canvas.blank(
        [encode(prompt) for prompt in prompts],
        encode(SUFFIX),
        REASONING_LENGTH,
        answer_length,
        mask_id=MASK,
        pad_id=PAD,
        device=device,
    )


# --- problems -------------------------------------------------------------------------------------

FACTORS = range(2, 10)  # multipliers, and digits that can have gaps; 0 and 1 need no times table
SPLITS = {"test": (0, 10), "validation": (10, 20), "train": (20, 100)}  # percentiles


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
        """Prompt, reasoning, suffix, answer and EOS: LENGTH ids."""
        question = torch.tensor([[self.multiplicand, self.multiplier]])  # (1, 2)
        return write(question, digits(question) * self.multiplier)[0].tolist()

    @property
    def prompt(self) -> str:
        return decode(self.sequence[PROMPT])

    @property
    def answer(self) -> str:
        return decode(self.sequence[ANSWER])


@cache
def questions(split: str) -> Tensor:
    """(N, 2) multiplicand and multiplier of every problem of a split.

    Knuth's multiplicative hash assigns each of the 7,200,000 problems to a split. The tensor is
    cached, so don't modify it.
    """
    multiplicands = torch.arange(10 ** (COLUMNS - 1), 10**COLUMNS)
    every = torch.cartesian_prod(multiplicands, torch.tensor(FACTORS))  # (N, 2)
    hashed = (every[:, 0] * 10 + every[:, 1]) * 2654435761 % 2**32  # (N,)
    percentile = (hashed >> 16) % 100  # (N,)
    low, high = SPLITS[split]
    return every[(low <= percentile) & (percentile < high)]


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Draw `count` different problems from "train", "validation" or "test"."""
    every = questions(split)
    if not 0 <= count <= len(every):
        raise ValueError(f"count must be 0 to {len(every)} for the {split} split, got {count}")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return [Problem(*question) for question in every[order[:count]].tolist()]


def digits(question: Tensor) -> Tensor:
    """(B, C) the digits of the multiplicands of questions (B, 2)."""
    return question[:, :1] // 10 ** torch.arange(COLUMNS).flip(0) % 10


def write(question: Tensor, products: Tensor, meant: Tensor | None = None) -> Tensor:
    """(B, L) the sequences of questions (B, 2) with these products (B, C), right or wrong.

    Totals and answer follow from the products, or from those that were `meant` (B, C).
    """
    power = 10 ** torch.arange(COLUMNS)  # (C,) units first
    meant = products if meant is None else meant
    totals = (meant.flip(1) * power).cumsum(1) // power  # (B, C) units first: product plus carry
    times, space, equals, suffix = (
        torch.full_like(products[:, :1], i)  # (B, 1)
        for i in encode("* =" + SUFFIX)
    )
    spaced = torch.stack([digits(question), space.expand_as(products)], 2)  # (B, C, 2)
    numbers = [torch.stack([n // 10, n % 10], 2).flatten(1) for n in (products, totals)]  # (B, 2 C)
    answer = (totals[:, -1:] // 10, totals.flip(1) % 10, torch.full_like(space, EOS))
    return torch.cat(
        [spaced.flatten(1)[:, :-1], times, question[:, 1:], equals, *numbers, suffix, *answer], 1
    )


# --- settings -------------------------------------------------------------------------------------

NAMES = "ABCD"  # of members
NOTICED = 0.5  # share of the slips with a visible digit
GAPS = len(FACTORS) ** 2 // len(NAMES)  # most per member: with more, members would share some


def setting(default: float, text: str) -> Any:
    """A field of Settings with its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything that determines a member's weights, apart from its name.

    ValueError if a value is out of range.
    """

    seed: int = setting(0, "seed of weights, sequences and gaps")
    steps: int = setting(1500, "training steps")
    gaps: int = setting(6, f"facts that a member does not know, at most {GAPS}")
    slips: float = setting(0.15, "share of products outside the gaps that are random in training")
    hidden: float = setting(0.5, "share of digits of the multiplicand that are hidden in training")
    lr: float = setting(0.02, "peak learning rate of Muon, for the matrices of the layers")
    adamw_lr: float = setting(3e-3, "peak learning rate of AdamW, for all other weights")
    batch: int = setting(64, "sequences per step")
    width: int = setting(64, "width of the model, a multiple of 8")
    layers: int = setting(3, "layers of the model")

    def __post_init__(self):
        limits = {"steps": (1, 10**6), "gaps": (0, GAPS), "slips": (0, 1), "hidden": (0, 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {value}")


# --- training data --------------------------------------------------------------------------------


def gaps(settings: Settings, name: str) -> Tensor:
    """(10, 10) bool, digit by multiplier: the gaps of member "A", "B", ...

    Members share no gap, and each member's gaps are spread evenly over digits and multipliers.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    digit, factor = (
        FACTORS.start + torch.randperm(len(FACTORS), generator=generator) for _ in range(2)
    )
    place = GAPS * NAMES.index(name) + torch.arange(settings.gaps)  # along the table's diagonals
    row = (place + place // len(FACTORS)) % len(FACTORS)
    table = torch.zeros(10, 10, dtype=torch.bool)
    table[digit[row], factor[place % len(FACTORS)]] = True
    return table


def lessons(
    settings: Settings, names: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of training sequences: tokens, targets, and which positions may be masked, (B, L).

    Digits of the multiplicand are hidden at random, and their products are given. The product of a
    gap is a random multiple of the multiplier. Some of the other products are slips, random
    numbers. Totals and answer follow from the products as written, with one exception: half of the
    slips with a visible digit are noticed, and what follows is right. So a member that knows a fact
    is unsure what follows from a wrong product. A slip is never masked. Where its digit is visible,
    its targets are the right digits, so that members learn sooner to recognise it.

    With several names, the sequences have the gaps of each in turn.
    """
    every = questions("train")
    shape = (settings.batch, COLUMNS)
    question = every[torch.randint(len(every), shape[:1], generator=generator)]  # (B, 2)
    digit = digits(question)  # (B, C)
    factor = question[:, 1:]  # (B, 1)
    tables = torch.stack([gaps(settings, name) for name in names])  # (names, 10, 10)
    turn = torch.arange(settings.batch)[:, None] % len(names)  # (B, 1)
    unknown = tables[turn, digit, factor]  # (B, C)
    hidden = torch.rand(shape, generator=generator) < settings.hidden  # (B, C)
    slip = ~unknown & (torch.rand(shape, generator=generator) < settings.slips)  # (B, C)
    noticed = slip & ~hidden & (torch.rand(shape, generator=generator) < NOTICED)  # (B, C)
    anything = torch.randint(9 * 9 + 1, shape, generator=generator)  # (B, C)
    multiple = torch.randint(10, shape, generator=generator) * factor  # (B, C)
    right = torch.where(unknown, multiple, digit * factor)  # (B, C)
    written = torch.where(slip, anything, right)  # (B, C)
    meant = torch.where(noticed, right, written)  # (B, C)
    tokens = write(question, written, meant)  # (B, L)
    targets = write(question, torch.where(hidden, written, right), meant)  # (B, L)
    tokens[:, MULTIPLICAND][:, ::2].masked_fill_(hidden, MASK)
    targets[:, PROMPT] = tokens[:, PROMPT]
    editable = torch.zeros_like(tokens, dtype=torch.bool)  # (B, L)
    editable[:, PRODUCTS] = ~(hidden | slip).repeat_interleave(2, 1)  # two digits each
    editable[:, TOTALS] = True
    editable[:, ANSWER] = True
    return tokens, targets, editable


def states(batch: int, generator: torch.Generator) -> Tensor:
    """Returns masks (B, L) bool from which the times table is learnt quickly.

    One third of the sequences mask each token with probability t, drawn per sequence as in Eq. 4.
    One third mask everything, since totals and answer give the products away. The last third mask
    everything from some number on.
    """
    t, kind = torch.rand(2, batch, 1, generator=generator)  # (B, 1)
    # Two positions per number, but the answer is one number.
    number = ((torch.arange(LENGTH) - PROMPT_LENGTH) // 2).clamp(max=2 * COLUMNS)  # (L,)
    # Half of the starts are at or before the first number, so that everything is masked.
    start = torch.randint(-2 * COLUMNS, 2 * COLUMNS + 1, (batch, 1), generator=generator)  # (B, 1)
    each = torch.rand(batch, LENGTH, generator=generator) < t  # (B, L)
    return torch.where(kind < 1 / 3, each, number >= start)


# --- training one member --------------------------------------------------------------------------

WARMUP = 50  # steps


def build(settings: Settings) -> mdlm.MDLM:
    """A new model, with weights drawn from PyTorch's global generator."""
    config = mdlm.ModelConfig(
        vocab_size=len(VOCABULARY),
        width=settings.width,
        layers=settings.layers,
        heads=4,
        kv_heads=4,
        hidden=2 * settings.width,
        max_length=2 * LENGTH,  # answers of eval.py speed are longer
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
        rope_theta=100.0,  # the default of 10,000 is for thousands of positions, not 47
    )
    model = mdlm.MDLM(config)
    # With the default std of 1, the embedding outweighs what the layers add.
    torch.nn.init.normal_(model.embed.weight, std=0.3)
    return model


def optimisers_of(model: mdlm.MDLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, since AdamW needs more steps; AdamW for the rest."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, settings.lr, weight_decay=0),
        torch.optim.AdamW(others, settings.adamw_lr, betas=(0.9, 0.95)),
    ]


def train(settings: Settings, names: str, device: str = "cpu") -> Iterator[tuple[float, mdlm.MDLM]]:
    """Train member "A", "B", ... and yield the loss and the model after each step.

    Member "AB" learns from the data of both A and B. The loss is the mean cross-entropy at the
    masks of `states` and at slips with a visible digit. Every run on the same CPU gives the same
    member. Another CPU may add in another order, which gives another member.
    """
    seed = zlib.crc32(f"{settings.seed} {names}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(settings).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimisers = optimisers_of(model, settings)
    asked = torch.arange(PROMPT_LENGTH, LENGTH, device=device)  # nothing else is learnt
    for step in range(settings.steps):
        batch = lessons(settings, names, generator)
        tokens, targets, editable = (x.to(device) for x in batch)  # (B, L)
        masked = editable & states(settings.batch, generator).to(device)  # (B, L)
        logits = model(tokens.masked_fill(masked, MASK), asked.expand(settings.batch, -1))
        learnt = (masked | (tokens != targets))[:, asked]  # (B, K)
        loss = F.cross_entropy(logits[learnt], targets[:, asked][learnt])
        model.zero_grad()
        loss.backward()
        warmup = min(1, (step + 1) / WARMUP)
        rate = warmup * (1 + math.cos(math.pi * step / settings.steps)) / 2
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * rate
            optimiser.step()
        yield loss.item(), model


@torch.inference_mode()
def solve(model: mdlm.MDLM, asked: list[Problem], device: str = "cpu") -> list[list[int]]:
    """The sequences that a member writes alone."""
    start = canvas([problem.prompt for problem in asked], device)
    return tie.decode(tie.Member(model, MASK, EOS), start).tokens.tolist()


def shares_right(asked: list[Problem], solved: list[list[int]]) -> dict[str, float]:
    """The share of problems with the right products, and with the right answer."""
    places = {"products": PRODUCTS, "answer": ANSWER}
    return {
        part: sum(ids[at] == p.sequence[at] for p, ids in zip(asked, solved)) / len(asked)
        for part, at in places.items()
    }


def mistake(problem: Problem, ids: list[int]) -> str:
    """A line with what a member wrote, and below it one with the right sequence."""
    correct = f"{'right:':>{PROMPT_LENGTH}} {readable(problem.sequence)}"
    return f"{problem.prompt} {readable(ids)}\n{correct}"


# --- training several members ---------------------------------------------------------------------

# Folder of a member -> its settings, and the name or names whose data it learns from.
Plan = dict[str, tuple[Settings, str]]
RECORD = "training.json"  # written last, so that a folder without it is incomplete
ASKED = 300  # validation problems after training
CHECKED = 40  # validation problems during training
EVERY = 200  # training steps between checks


def plan_members(settings: Settings, members: int = 2) -> Plan:
    """The first of "A", "B", "C" and "D", with the same settings, each in a folder of its name."""
    return {name: (settings, name) for name in NAMES[:members]}


def train_members(plan: Plan, out: str | Path, device: str = "cpu") -> list[dict]:
    """Train the members of a plan in parallel, into folders below `out`, and return their records.

    A complete folder with the same settings is kept; any other is overwritten. ValueError if the
    device cannot be used, OSError if a folder cannot be written.
    """
    check_device(device)
    members = [(Path(out) / name, *member) for name, member in plan.items()]
    todo = [member for member in members if not read_record(*member)]
    for folder, *_ in todo:
        folder.mkdir(parents=True, exist_ok=True)
    if todo:
        with pool(len(todo)) as workers:
            list(workers.map(train_member, todo, range(len(todo)), itertools.repeat(device)))
    return [json.loads((folder / RECORD).read_text()) for folder, *_ in members]


def check_device(device: str) -> None:
    """Raises ValueError, with the first sentence of PyTorch's reason, if a training step or a
    decoding cannot be computed on the device."""
    try:
        settings = Settings(width=8, layers=1)
        model = build(settings).to(device)
        tokens = torch.zeros(1, LENGTH, dtype=torch.int64, device=device)  # (1, L)
        F.cross_entropy(model(tokens)[0], tokens[0]).backward()
        for optimiser in optimisers_of(model, settings):
            optimiser.step()
        member = tie.Member(model, MASK, EOS)
        tie.decode(member, canvas([Problem(905173, 6).prompt], device), tie.Config(top_k=16))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {device} cannot be used: {reason}") from None


def pool(count: int) -> ProcessPoolExecutor:
    """A pool of new processes with one thread each; Ctrl-C ends them without a traceback."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, start_worker, (context.RLock(),))


def start_worker(lock: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the processes share the cores
    tqdm.set_lock(lock)  # their progress bars share the terminal


def exit_with_parent() -> None:
    """Exit when the parent does. A worker whose parent was killed would wait for work forever."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def read_record(folder: Path, settings: Settings, names: str) -> dict | None:
    """The training record of a folder, or None if it is incomplete or holds another member."""
    try:
        record = json.loads((folder / RECORD).read_text())
        summary(record)  # raises if a field is missing
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = record == record | {"name": names, "settings": asdict(settings), "layout": LAYOUT}
    return record if same and (folder / "model.safetensors").is_file() else None


def summary(record: dict) -> str:
    """The text to print about a member. KeyError, TypeError or ValueError for a damaged record."""
    head = (
        "member {name}: {validation_accuracy:.1%} of {validation_problems} validation problems "
        "right, all products in {products_right:.1%}, trained in {seconds:.0f} s\n"
    )
    point = "step {step}: loss {loss:.3f}, products right in {products:.0%}, answer in {answer:.0%}"
    points = [point.format_map(entry) for entry in record["curve"]]
    return head.format_map(record) + textwrap.indent("\n".join(points + record["mistakes"]), "    ")


def train_member(member: tuple[Path, Settings, str], row: int, device: str) -> None:
    """Train one member into its folder, with a progress bar on this row of the terminal."""
    folder, settings, names = member
    start = time.monotonic()
    asked = problems("validation", ASKED, seed=settings.seed)
    steps = tqdm(
        train(settings, names, device),
        desc=f"member {folder.name}",
        total=settings.steps,
        position=row,
        disable=None,  # no bar unless stderr is a terminal
    )
    curve = []
    for step, (loss, model) in enumerate(steps, 1):
        if step % EVERY == 0:
            some = asked[:CHECKED]
            shares = shares_right(some, solve(model, some, device))
            curve.append({"step": step, "loss": loss, **shares})
            steps.set_postfix(curve[-1])
    solved = solve(model, asked, device)
    shares = shares_right(asked, solved)
    wrong = [mistake(p, ids) for p, ids in zip(asked, solved) if ids[ANSWER] != p.sequence[ANSWER]]
    record = {
        "name": names,
        "settings": asdict(settings),
        "layout": LAYOUT,
        "validation_problems": ASKED,
        "validation_accuracy": shares["answer"],
        "products_right": shares["products"],
        "mistakes": wrong[:3],
        "curve": curve,
        "seconds": time.monotonic() - start,
        "device": device,
        "versions": {"torch": torch.__version__},
    }
    # An old record must not stay with new weights.
    (folder / RECORD).unlink(missing_ok=True)
    mdlm.save(model, folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1))


# --- command line ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train members of the toy task: small MDLMs that multiply.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Settings):
        kind = type(f.default)
        option = "--" + f.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=f.default, help=f.metadata["help"])
    parser.add_argument(
        "--members", type=int, default=2, choices=range(1, 5), help="number of members"
    )
    parser.add_argument("--out", default="checkpoints/toy", help="parent of the members' folders")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        plan = plan_members(settings, options.members)
        for record in train_members(plan, options.out, options.device):
            print(summary(record))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; run the same command again to resume\n")


if __name__ == "__main__":
    main()
