"""TIE again, slowly: one row, one member and one position at a time, in plain lists and loops.

It is written from the paper and from the decisions that tie.py's comments state, not from its code:
only the fields of Member, Config and Canvas are read. Padding is cut off, and every forward asks
for all positions. The fake models and vocabularies of the tests follow at the end.
"""

from __future__ import annotations

import math
import random
from collections import namedtuple
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import torch

from tie import Canvas, Config, Member

NEVER = -math.inf
NEAR = 1e-5  # float32 can't be trusted to tell smaller differences


class Unclear(Exception):
    """Two numbers differ by so little that float32 may order them either way: skip the example."""


# What a member predicts at one masked position.
Guess = namedtuple("Guess", "token top1_probability negative_entropy probability_margin logits")

# A score with all that went into it: equal evidence is an exact tie, equal values alone are not.
Mean = namedtuple("Mean", "value evidence")
NOTHING = Mean(NEVER, ())


def guess(logits: list[float], mask_id: int) -> Guess:
    """The mask token has its share of the probability but is never predicted."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    others = [v for v in range(len(p)) if v != mask_id]
    token = max(others, key=lambda v: logits[v])
    first, second = sorted((p[v] for v in others), reverse=True)[:2]
    return Guess(token, first, sum(x * math.log(x) for x in p if x > 0), first - second, logits)


def mean(positions: list[int], guesses: dict[int, Guess], name: str) -> Mean:
    if not positions:
        return NOTHING
    value = sum(getattr(guesses[i], name) for i in positions) / len(positions)
    return Mean(value, tuple((i, *guesses[i].logits) for i in positions))


def average(means: list[Mean]) -> Mean:
    """The mean of those that aren't NOTHING."""
    values = [each.value for each in means if each != NOTHING]
    return Mean(sum(values) / len(values), tuple(means)) if values else NOTHING


def best(means: list[Mean]) -> list[int]:
    """All indices of the maximum."""
    highest = max(each.value for each in means)
    near = [i for i, each in enumerate(means) if each.value >= highest - NEAR]
    if any(means[i].evidence != means[near[0]].evidence for i in near):
        raise Unclear
    return near


def leader(scores: list[Mean], tops: list[Mean]) -> int:
    tied = best(scores)
    return tied[best([tops[m] for m in tied])[0]]


def eos_ids(member: Member) -> tuple[int, ...]:
    return member.eos_id if isinstance(member.eos_id, tuple) else (member.eos_id,)


def units_of(canvas: Canvas, b: int) -> list[int | None]:
    """Row b without its padding, None where masked."""
    pairs = zip(canvas.tokens[b].tolist(), canvas.masked[b].tolist())
    return [None if hole else token for token, hole in pairs][padding(canvas, b) :]


def padding(canvas: Canvas, b: int) -> int:
    return 0 if canvas.attention_mask is None else int((~canvas.attention_mask[b]).sum())


def blocks_of(regions: list[slice], size: int) -> list[range]:
    ranges = [range(region.start, region.stop) for region in regions]
    return [part[i : i + size] for part in ranges for i in range(0, len(part), size)]


class Trajectory:
    """One member at work on one row."""

    def __init__(self, index: int, member: Member, canvas: Canvas, b: int, config: Config):
        self.index = index
        self.member = member
        self.config = config
        self.units = units_of(canvas, b)
        pad = padding(canvas, b)
        regions = (canvas.reasoning, canvas.answer)
        self.regions = [slice(region.start - pad, region.stop - pad) for region in regions]
        self.answer = range(len(self.units))[self.regions[1]]
        self.read = True  # a single member's answers are not read
        self.before: dict[int, int] = {}  # A^(t) of the step before: position -> its top-1
        self.steps: list[tuple[Fraction | None, Mean]] = []  # changes, top-1 probability over A^(t)
        self.round_start = 0
        self.extra_forwards = 0
        self.stop_at_eos()

    def look(self, units: list[int | None]) -> dict[int, Guess]:
        """One forward: a guess for each masked position."""
        seen = [self.member.mask_id if unit is None else unit for unit in units]
        positions = torch.arange(len(seen))[None]
        logits = self.member.denoise(torch.tensor([seen]), positions, None)[0].tolist()
        masked = [i for i, unit in enumerate(units) if unit is None]
        return {i: guess(logits[i], self.member.mask_id) for i in masked}

    def relevant(self, units: list[int | None], guesses: dict[int, Guess]) -> list[int]:
        """A^(t): the masked answer positions, the first few if there is a window, without EOS."""
        window = [i for i in self.answer if units[i] is None][: self.config.answer_window]
        return [i for i in window if guesses[i].token not in eos_ids(self.member)]

    def masked_blocks(self) -> list[list[int]]:
        """The masked positions of each block that has any."""
        blocks = blocks_of(self.regions, self.config.block_size)
        masked = [[i for i in block if self.units[i] is None] for block in blocks]
        return [block for block in masked if block]

    def generate(self, n: int) -> int:
        """At most n steps. Returns the number made."""
        self.round_start = len(self.steps)
        while len(self.steps) < self.round_start + n and None in self.units:
            guesses = self.look(self.units)
            count = None
            if self.before:  # Eq. 5 or 7
                still = [i for i in self.before if self.units[i] is None]
                changes = sum(guesses[i].token != self.before[i] for i in still)
                count = Fraction(changes, len(self.before) if self.config.normalize else 1)
            A = self.relevant(self.units, guesses) if self.read else []
            self.before = {i: guesses[i].token for i in A}
            self.steps.append((count, mean(A, guesses, "top1_probability")))
            for i in self.chosen(guesses, self.masked_blocks()[0]):
                self.units[i] = guesses[i].token
            self.stop_at_eos()
        return len(self.steps) - self.round_start

    def stop_at_eos(self) -> None:
        """Completes the row if the answer has an EOS and no mask before. Committed tokens stay."""
        ends = eos_ids(self.member) if self.config.stop_at_eos else ()
        for i in self.answer:
            if self.units[i] in ends and None not in self.units[:i]:
                self.units = [ends[0] if unit is None else unit for unit in self.units]

    def chosen(self, guesses: dict[int, Guess], block: list[int]) -> list[int]:
        """The positions to commit."""
        ranked = sorted(block, key=lambda i: (-guesses[i].top1_probability, i))
        for i, j in pairwise(ranked):
            near = guesses[i].top1_probability - guesses[j].top1_probability < NEAR
            if near and guesses[i].logits != guesses[j].logits:
                raise Unclear
        chosen = ranked[: self.config.top_k]  # always the first of them
        rules = [] if self.config.commit is None else [self.config.commit]
        if self.config.threshold is not None:
            rules.append(lambda reading: reading.confidence > self.config.threshold)
        for rule in rules:
            low, exact, high = [
                rule(self.reading(guesses, block, shift)).tolist() for shift in (-NEAR, 0, NEAR)
            ]
            if not low == exact == high:
                raise Unclear
            chosen += [i for i, yes in zip(block, exact[0]) if yes]
        return chosen

    def reading(self, guesses: dict[int, Guess], block: list[int], shift: float) -> SimpleNamespace:
        """What a commit rule gets: tensors (1, masks of the block), numbers shifted a little."""
        parts = zip(*[guesses[i][:4] for i in block])
        token, probability, negative_entropy, margin = [torch.tensor([part]) for part in parts]
        return SimpleNamespace(
            member=self.index,
            positions=torch.tensor([block]),
            masked=torch.ones_like(token, dtype=torch.bool),
            token=token,
            confidence=probability + shift,
            entropy=shift - negative_entropy,
            margin=margin + shift,
        )

    def score(self, start: int = 0) -> tuple[Mean, Mean]:
        """Minus the token change count since the step `start`, and the last top-1 probability."""
        counts = [count for count, _ in self.steps[start:] if count is not None]
        tops = [top for _, top in self.steps[start:] if top != NOTHING]
        return Mean(-sum(counts), ()) if counts else NOTHING, [NOTHING, *tops][-1]


class Row:
    """The rounds of all members on one row."""

    def __init__(self, members: list[Member], canvases: list[Canvas], b: int, config: Config):
        pairs = enumerate(zip(members, canvases))
        self.trajectories = [Trajectory(m, *pair, b, config) for m, pair in pairs]
        self.config = config
        self.not_relayed = 0
        self.leaders: list[int] = []
        self.scores: list[list[float]] = []

    def generate(self, n: int) -> int:
        return max([trajectory.generate(n) for trajectory in self.trajectories])

    def score(self, whole: bool = False) -> tuple[list[Mean], list[Mean]]:
        """The scores of the members' own steps in this round, or in all, and what breaks ties."""
        starts = [0 if whole else trajectory.round_start for trajectory in self.trajectories]
        scores, tops = zip(*[t.score(start) for t, start in zip(self.trajectories, starts)])
        return list(scores), list(tops)

    def assess(self, name: str, cross_model: bool) -> list[Mean]:
        """Logit scores of the trajectories: each a mean over the readers whose A is not empty."""
        scores = []
        for trajectory in self.trajectories:
            means = []
            for reader in self.trajectories if cross_model else [trajectory]:
                units = received(trajectory, reader)
                if units is not None:
                    guesses = reader.look(units)
                    means.append(mean(reader.relevant(units, guesses), guesses, name))
            scores.append(average(means))
        for trajectory in self.trajectories:  # M of the M * M forwards are the next steps' own
            trajectory.extra_forwards += len(self.trajectories) - 1 if cross_model else 1
        return scores

    def relay(self, leader: int, scores: list[Mean]) -> None:
        """All members continue from the leader's state; with leader -1 each keeps its own."""
        self.leaders.append(leader)
        self.scores.append([float(score.value) for score in scores])
        if leader >= 0:
            sent = [received(self.trajectories[leader], own) for own in self.trajectories]
            self.not_relayed += sent.count(None)
            for own, units in zip(self.trajectories, sent):
                own.units = own.units if units is None else units
                own.before = {}

    def decode(self) -> Row:
        """Rounds until all are complete. No relay once one is, or after twice the steps needed."""
        alone = len(self.trajectories) == 1
        limit = 0
        for trajectory in self.trajectories:
            trajectory.read = not alone
            masks = [len(block) for block in trajectory.masked_blocks()]
            limit = max(limit, 2 * sum(math.ceil(n / self.config.top_k) for n in masks))
        steps = 0
        while any(None in trajectory.units for trajectory in self.trajectories):
            steps += self.generate(self.config.interval)
            complete = any(None not in trajectory.units for trajectory in self.trajectories)
            if not (alone or complete or steps >= limit):
                scores, tops = self.score()
                if self.config.score != "token_change_count":
                    scores = self.assess(self.config.score, self.config.cross_model)
                self.relay(leader(scores, tops), scores)
        self.winner = leader(*self.score(whole=True))
        return self


def ensemble(members: list[Member], canvases: list[Canvas], config: Config) -> list[Row]:
    """Decodes each row. Raises Unclear where float32 may disagree."""
    return [Row(members, canvases, b, config).decode() for b in range(len(canvases[0].tokens))]


# --- relay between vocabularies -------------------------------------------------------------------


def received(sender: Trajectory, receiver: Trajectory) -> list[int | None] | None:
    """The sender's row behind the receiver's prompt and suffix, or None if its text doesn't fit."""
    units = list(receiver.units)
    for own, theirs in zip(receiver.regions, sender.regions):
        new = sender.units[theirs]
        if sender.member.codec is not receiver.member.codec:
            new = translate_region(new, sender.member, receiver.member, own.stop - own.start)
        if new is None:
            return None
        units[own] = new
    return units


def translate_region(
    ids: list[int | None], sender: Member, receiver: Member, length: int
) -> list[int | None] | None:
    eos = eos_ids(receiver)[0]
    new: list[int | None] = []
    text: list[int] = []
    for i in with_holes(ids, sender) + [None]:  # one more mask, to end the last text
        if i is None or i in eos_ids(sender):
            new += receiver.codec.encode(sender.codec.decode(text).decode())
            new.append(None if i is None else eos)
            text = []
        else:
            text.append(i)
    new.pop()
    rest = None if not ids or ids[-1] is None else eos
    while new and new[-1] == rest:
        new.pop()
    return None if len(new) > length else new + [rest] * (length - len(new))


def with_holes(ids: list[int | None], member: Member) -> list[int | None]:
    """Masks each token with a byte that belongs to no character, until no such byte is left."""
    new: list[int | None] = []
    text: list[int] = []
    for i in ids + [None]:
        if i is not None and i not in eos_ids(member):
            text.append(i)
            continue
        owner = [k for k, token in enumerate(text) for _ in member.codec.decode([token])]
        bad = {owner[byte] for byte in broken(member.codec.decode(text))}
        new += [None if k in bad else token for k, token in enumerate(text)] + [i]
        text = []
    new.pop()
    return ids if new == ids else with_holes(new, member)


def broken(data: bytes) -> set[int]:
    """The bytes that belong to no character of one to four bytes."""
    bad = set(range(len(data)))
    for i in range(len(data)):
        for j in range(i + 1, i + 5):
            if data[i:j].decode(errors="ignore").encode() == data[i:j]:
                bad -= set(range(i, j))
    return bad


# --- fake models and vocabularies -----------------------------------------------------------------


class Fake:
    """A deterministic table that acts as a model: two other tokens decide what each position gets.

    Rows don't depend on each other or on left padding. Positions get one of eight rows of logits,
    so that confidences are either equal to the last bit or clearly different. One row in four
    favours EOS, one in eight the mask token.
    """

    def __init__(self, seed: int, vocab: int, mask_id: int, eos_id: int):
        rng = random.Random(seed)
        rows = []
        for _ in range(8):
            row = [value / 100 for value in rng.sample(range(-300, 300), vocab)]  # no two are equal
            favourite = rng.choice([eos_id, eos_id, mask_id] + [rng.randrange(vocab)] * 5)
            row[favourite] = rng.choice([3.5, 5.0, 7.0])
            rows.append(row)
        self.table = torch.tensor(rows)  # (8, V)
        self.ears = [(rng.randrange(9), rng.randrange(9), rng.randrange(1, 9)) for _ in range(2)]
        self.place = rng.randrange(9)

    def __call__(self, tokens, positions, attention_mask):
        real = torch.ones_like(tokens, dtype=torch.bool)  # (B, L)
        real = real if attention_mask is None else attention_mask
        start = (~real).sum(1, keepdim=True)  # (B, 1)
        size = real.sum(1, keepdim=True)  # (B, 1)
        place = positions - start  # (B, K)
        key = place * self.place
        for step, shift, weight in self.ears:
            key = key + weight * tokens.gather(1, (place * step + shift) % size + start)
        return self.table[key % 8]  # (B, K, V)


class Constant:
    """The same logits at every position, whatever the tokens. They always share one storage."""

    def __init__(self, logits: list[float]):
        self.logits = torch.tensor(logits, dtype=torch.float32)

    def __call__(self, tokens, positions, attention_mask):
        return self.logits.expand(*positions.shape, -1)


class Watched:
    """A denoiser that records its inputs and outputs."""

    def __init__(self, denoise):
        self.denoise = denoise
        self.calls = []

    def __call__(self, tokens, positions, attention_mask):
        logits = self.denoise(tokens, positions, attention_mask)
        self.calls.append((tokens.clone(), positions.clone(), logits.clone()))
        return logits


class Pieces:
    """A vocabulary of byte strings that prefers long ones. Special tokens have no bytes."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces
        self.special = [i for i, piece in enumerate(pieces) if not piece]

    def encode(self, text: str) -> list[int]:
        ids = []
        data = text.encode()
        while data:
            fits = [i for i, piece in enumerate(self.pieces) if piece and data.startswith(piece)]
            ids.append(max(fits, key=lambda i: len(self.pieces[i])))
            data = data[len(self.pieces[ids[-1]]) :]
        return ids

    def decode(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


ALPHABET = "aA \u00d0\u2410\U00010410"  # of two, three and four bytes, all but the first are 0x90
BYTES = [bytes([byte]) for byte in sorted(set(ALPHABET.encode()))]
SHORT = Pieces(b"", b"", *BYTES, b"")
LONG = Pieces(b"AaA", *BYTES, b"", b"aA", b"\xc3\x90", b"a\xc3", b"\x90\xe2", b"\x90\x90", b"", b"")


def member(codec: Pieces, seed: int = 0) -> Member:
    mask_id, *ends = codec.special
    fake = Fake(seed, len(codec.pieces), mask_id, ends[0])
    return Member(fake, mask_id, tuple(ends), f"m{seed}", codec)


def blank(codec: Pieces, reasoning: int = 8, answer: int = 6) -> Canvas:
    """Two questions, of which the second is shorter."""
    first, second, suffix = [codec.encode(text) for text in ("a A a", "A", "AaA")]
    ids = {"mask_id": codec.special[0], "pad_id": codec.special[1]}
    return Canvas.blank([first, second], suffix, reasoning, answer, **ids)
