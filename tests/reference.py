"""TIE once more, slowly: one row, one member, one position at a time, in lists and loops; and fake models and vocabularies.

Written from the paper and the decisions listed in tie.py's texts, not from its code: nothing but Member, Config and
Canvas is taken from there. Rows are stripped of their padding, and the denoiser is asked for every position at once.
A Row goes round by round, so that each of its steps can be compared.
"""

from __future__ import annotations

import math
import random
from collections import namedtuple
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import torch

import tie

NEVER = -math.inf
NEAR = 1e-5  # float32 decides nothing reliably below this


class Unclear(Exception):
    """Two different numbers lie too near to each other for float32 to tell: the example proves nothing."""


# what one member says about one masked position
Guess = namedtuple("Guess", "token top1_probability negative_entropy probability_margin logits")


# a mean over positions and what went into it: equal evidence is an exact tie, equal values alone are not
Mean = namedtuple("Mean", "value evidence")
NOTHING = Mean(NEVER, ())


@dataclass
class State:
    """What a member holds of one row."""

    tokens: list[int]
    masked: list[bool]
    reasoning: slice
    answer: slice


def guess(logits: list[float], mask_id: int) -> Guess:
    """The mask token takes its share of the probability, but is nobody's prediction."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    others = [v for v in range(len(p)) if v != mask_id]
    token = max(others, key=lambda v: logits[v])
    first, second = sorted((p[v] for v in others), reverse=True)[:2]
    return Guess(token, first, sum(x * math.log(x) for x in p if x > 0), first - second, tuple(logits))


def look(member: tie.Member, state: State) -> dict[int, Guess]:
    """One forward: a guess for each masked position."""
    seen = [member.mask_id if hole else token for token, hole in zip(state.tokens, state.masked)]
    logits = member.denoise(torch.tensor([seen]), torch.arange(len(seen))[None], None)[0].tolist()
    return {i: guess(logits[i], member.mask_id) for i, hole in enumerate(state.masked) if hole}


def eos_ids(member: tie.Member) -> tuple[int, ...]:
    return member.eos_id if isinstance(member.eos_id, tuple) else (member.eos_id,)


def relevant(member: tie.Member, state: State, guesses: dict[int, Guess], config: tie.Config) -> list[int]:
    """A^(t): the masked answer positions, the first few of them with a window, then less those that predict EOS."""
    masked = [i for i in range(state.answer.start, state.answer.stop) if state.masked[i]][: config.answer_window]
    return [i for i in masked if guesses[i].token not in eos_ids(member)]


def mean(positions: list[int], guesses: dict[int, Guess], name: str) -> Mean:
    if not positions:
        return NOTHING
    value = sum(getattr(guesses[i], name) for i in positions) / len(positions)
    return Mean(value, tuple((i, guesses[i].logits) for i in positions))


def average(means: list[Mean]) -> Mean:
    """The mean of those that say something."""
    said = [part.value for part in means if part != NOTHING]
    return Mean(sum(said) / len(said), tuple(means)) if said else NOTHING


def best(means: list[Mean]) -> list[int]:
    """All indices of the maximum."""
    highest = max(m.value for m in means)
    near = [i for i, m in enumerate(means) if m.value >= highest - NEAR]
    if any(means[i].evidence != means[near[0]].evidence for i in near):
        raise Unclear
    return near


def leader(scores: list[Mean], tops: list[Mean]) -> int:
    tied = best(scores)
    return tied[best([tops[m] for m in tied])[0]]


def blocks(reasoning: slice, answer: slice, size: int) -> list[range]:
    regions = [range(region.start, region.stop) for region in (reasoning, answer)]
    return [region[i : i + size] for region in regions for i in range(0, len(region), size)]


def masked_blocks(state: State, size: int) -> list[list[int]]:
    """The masked positions of each block that has any."""
    masked = [[i for i in block if state.masked[i]] for block in blocks(state.reasoning, state.answer, size)]
    return [block for block in masked if block]


def told(index: int, guesses: dict[int, Guess], block: list[int], shift: float = 0.0) -> SimpleNamespace:
    """What a commit rule may look at, one row of it, all its numbers shifted a little."""
    parts = zip(*[guesses[i][1:4] for i in block])
    probability, negative_entropy, margin = (torch.tensor([part]) + shift for part in parts)  # (1, masks of the block)
    tokens, masked = torch.tensor([[guesses[i].token for i in block]]), torch.ones(1, len(block), dtype=torch.bool)
    return SimpleNamespace(
        member=index, positions=torch.tensor([block]), masked=masked, token=tokens, confidence=probability,
        entropy=shift - negative_entropy, margin=margin,
    )  # fmt: skip


def chosen_by(rule, index: int, guesses: dict[int, Guess], block: list[int]) -> list[int]:
    answers = [rule(told(index, guesses, block, shift))[0].tolist() for shift in (-NEAR, 0.0, NEAR)]
    if answers[0] != answers[1] or answers[1] != answers[2]:
        raise Unclear
    return [i for i, yes in zip(block, answers[1]) if yes]


def commit(index: int, state: State, guesses: dict[int, Guess], block: list[int], config: tie.Config) -> None:
    ranked = sorted(block, key=lambda i: (-guesses[i].top1_probability, i))
    for i, j in pairwise(ranked):
        near = guesses[i].top1_probability - guesses[j].top1_probability < NEAR
        if near and guesses[i].logits != guesses[j].logits:
            raise Unclear
    chosen = ranked[: config.top_k]  # the first of them always
    if config.threshold is not None:
        if any(abs(guesses[i].top1_probability - config.threshold) < NEAR for i in block):
            raise Unclear
        chosen += [i for i in block if guesses[i].top1_probability > config.threshold]
    if config.commit is not None:
        chosen += chosen_by(config.commit, index, guesses, block)
    for i in chosen:
        state.tokens[i], state.masked[i] = guesses[i].token, False


class Trajectory:
    """One member at work on one row: its state, the counts of its round, and those of its whole decoding.

    `alone`: the member has no other to be compared with, and nobody reads its answers."""

    def __init__(self, index: int, member: tie.Member, state: State, config: tie.Config, alone: bool):
        self.index, self.member, self.state, self.config, self.alone = index, member, state, config, alone
        self.tcc, self.compared, self.top1, self.forwards = Fraction(0), False, NOTHING, 0
        self.before: dict[int, int] = {}  # A^(t) of the step before, each position with its top-1
        self.ahead = False  # has the assessment made the forward of the next step?
        self.begin_round()

    def begin_round(self) -> None:
        self.count, self.comparisons = Fraction(0), 0
        self.tops: list[Mean] = []  # the top-1 probabilities of the steps with an A^(t)

    def generate(self, n: int) -> int:
        """n steps alone, or to the end; the comparisons of Eq. 5 or 7 between each step and the next."""
        state, config, steps = self.state, self.config, 0
        while steps < n and any(state.masked):
            guesses = look(self.member, state)
            if self.before:
                changes = sum(state.masked[i] and guesses[i].token != token for i, token in self.before.items())
                self.count += Fraction(changes, len(self.before) if config.normalize else 1)
                self.comparisons += 1
            A = [] if self.alone else relevant(self.member, state, guesses, config)
            self.before = {i: guesses[i].token for i in A}
            self.tops += [mean(A, guesses, "top1_probability")] if A else []
            commit(self.index, state, guesses, masked_blocks(state, config.block_size)[0], config)
            self.forwards += not self.ahead
            steps, self.ahead = steps + 1, False
        return steps

    def score_round(self) -> tuple[Mean, Mean]:
        """The score of the member's own steps, and the top-1 probability that breaks ties. The step before the next
        one is still this round's last, unless a relay comes."""
        score, top1 = Mean(-self.count, ()) if self.comparisons else NOTHING, [NOTHING, *self.tops][-1]
        self.tcc += self.count
        self.compared = self.compared or self.comparisons > 0
        self.top1 = [self.top1, *self.tops][-1]
        self.begin_round()
        return score, top1


class Row:
    """The rounds of all members on one row."""

    def __init__(self, members: list[tie.Member], states: list[State], config: tie.Config, alone: bool):
        pairs = enumerate(zip(members, states))
        self.trajectories = [Trajectory(m, member, state, config, alone) for m, (member, state) in pairs]
        self.config, self.ended, self.not_relayed = config, alone, 0
        self.leaders: list[int] = []
        self.scores: list[list[float]] = []

    @property
    def states(self) -> list[State]:
        return [trajectory.state for trajectory in self.trajectories]

    @property
    def complete(self) -> list[bool]:
        return [not any(state.masked) for state in self.states]

    @property
    def tcc(self) -> list[float]:
        return [math.nan if trajectory.alone else float(trajectory.tcc) for trajectory in self.trajectories]

    @property
    def top1(self) -> list[float]:
        return [float(trajectory.top1.value) for trajectory in self.trajectories]

    @property
    def forwards(self) -> int:
        return sum(trajectory.forwards for trajectory in self.trajectories)

    def generate(self, n: int) -> int:
        return max([trajectory.generate(n) for trajectory in self.trajectories])

    def score_round(self) -> tuple[list[Mean], list[Mean]]:
        scores, tops = zip(*[trajectory.score_round() for trajectory in self.trajectories])
        self.ended = self.ended or any(self.complete)
        return list(scores), list(tops)

    def assess(self, name: str, cross_model: bool) -> list[Mean]:
        """A logit score of each trajectory: its mean over the readers who have something to say."""
        scores = []
        for trajectory in self.trajectories:
            means = []
            for reader in self.trajectories if cross_model else [trajectory]:
                state = received(trajectory, reader)
                if state is not None:
                    guesses = look(reader.member, state)
                    means.append(mean(relevant(reader.member, state, guesses, self.config), guesses, name))
            scores.append(average(means))
        for trajectory in self.trajectories:  # of M * M forwards the leader's M serve the next step too
            trajectory.forwards += len(self.trajectories) if cross_model else 1
            trajectory.ahead = cross_model
        return scores

    def relay(self, leader: int, scores: list[Mean]) -> None:
        """Every member's state becomes the leader's; with leader -1 each keeps its own."""
        self.leaders.append(leader)
        self.scores.append([float(score.value) for score in scores])
        if leader >= 0:
            states = [received(self.trajectories[leader], receiver) for receiver in self.trajectories]
            self.not_relayed += states.count(None)
            for receiver, state in zip(self.trajectories, states):
                receiver.state, receiver.before = receiver.state if state is None else state, {}

    def select(self) -> int:
        config, leads = self.config, [self.leaders.count(m) for m in range(len(self.trajectories))]
        if config.selection == "best_model":
            return config.best_model
        if config.selection == "most_selected" and self.leaders and leads.count(max(leads)) == 1:
            return leads.index(max(leads))
        scores = [Mean(-t.tcc, ()) if t.compared else NOTHING for t in self.trajectories]
        return leader(scores, [t.top1 for t in self.trajectories])

    def decode(self) -> None:
        """Rounds until all members are complete; no more relays once one is, or after twice the steps of one alone."""
        masks = [masked_blocks(state, self.config.block_size) for state in self.states]
        limit = 2 * max(sum(math.ceil(len(block) / self.config.top_k) for block in row) for row in masks)
        steps = 0
        while not all(self.complete):
            steps += self.generate(self.config.interval)
            scores, tops = self.score_round()
            self.ended = self.ended or steps >= limit
            if not self.ended:
                if self.config.score != "token_change_count":
                    scores = self.assess(self.config.score, self.config.cross_model)
                self.relay(leader(scores, tops), scores)
        self.winner = self.select()


def rows(
    members: list[tie.Member], canvases: list[tie.Canvas], config: tie.Config, alone: bool = False
) -> list[Row]:
    """Each row by itself, its padding cut off."""
    found = []
    for b in range(len(canvases[0].tokens)):
        states = []
        for c in canvases:
            pad = 0 if c.attention_mask is None else int((~c.attention_mask[b]).sum())
            regions = [slice(region.start - pad, region.stop - pad) for region in (c.reasoning, c.answer)]
            states.append(State(c.tokens[b, pad:].tolist(), c.masked[b, pad:].tolist(), *regions))
        found.append(Row(members, states, config, alone))
    return found


def ensemble(members: list[tie.Member], canvases: list[tie.Canvas], config: tie.Config) -> list[Row]:
    """Raises Unclear where float32 cannot be expected to agree."""
    decoded = rows(members, canvases, config, alone=len(members) == 1)
    for row in decoded:
        row.decode()
    return decoded


# --- relay between vocabularies -----------------------------------------------------------------------


def received(sender: Trajectory, receiver: Trajectory) -> State | None:
    """The sender's state as the receiver would hold it, behind its own prompt; None if its text does not fit."""
    state = deepcopy(receiver.state)
    for own, theirs in ((state.reasoning, sender.state.reasoning), (state.answer, sender.state.answer)):
        if sender.member.codec is receiver.member.codec:
            state.tokens[own], state.masked[own] = sender.state.tokens[theirs], sender.state.masked[theirs]
            continue
        pairs = zip(sender.state.tokens[theirs], sender.state.masked[theirs])
        ids = translate_region([None if hole else token for token, hole in pairs], sender.member, receiver.member, own)
        if ids is None:
            return None
        state.tokens[own] = [receiver.member.mask_id if i is None else i for i in ids]
        state.masked[own] = [i is None for i in ids]
    return state


def translate_region(ids: list, sender: tie.Member, receiver: tie.Member, region: slice) -> list | None:
    """One region in the receiver's ids, None where masked."""
    eos, new = eos_ids(receiver)[0], []
    text: list[int] = []
    for i in with_holes(ids, sender) + [None]:  # one mask more, to end the last text
        if i is None or i in eos_ids(sender):
            new += receiver.codec.encode(sender.codec.decode(text).decode()) + [None if i is None else eos]
            text = []
        else:
            text.append(i)
    new.pop()
    rest = None if not ids or ids[-1] is None else eos
    while new and new[-1] == rest:
        new.pop()
    missing = region.stop - region.start - len(new)
    return None if missing < 0 else new + [rest] * missing


def with_holes(ids: list, member: tie.Member) -> list:
    """A hole for each token with a byte that belongs to no character; again, as long as that breaks others."""
    new, run = [], []
    for i in ids + [None]:
        if i is not None and i not in eos_ids(member):
            run.append(i)
            continue
        owner = [k for k, token in enumerate(run) for _ in member.codec.decode([token])]
        bad = {owner[byte] for byte in broken(member.codec.decode(run))}
        new += [None if k in bad else token for k, token in enumerate(run)] + [i]
        run = []
    new.pop()
    return ids if new == ids else with_holes(new, member)


def broken(data: bytes) -> set[int]:
    """The bytes of no character, which has four at most."""
    bad = set(range(len(data)))
    for i in range(len(data)):
        for j in range(i + 1, i + 5):
            if data[i:j].decode(errors="ignore").encode() == data[i:j]:
                bad -= set(range(i, j))
    return bad


# --- fake models and vocabularies ---------------------------------------------------------------------


class Fake:
    """A deterministic table for a model: each position hears two others and says one of a few logit rows.

    Rows are independent of each other and of left padding. Equal confidences are bit for bit equal (the same logit
    row) and others clearly differ. One row in four favours EOS, one in eight the mask token.
    """

    def __init__(self, seed: int, vocab: int, mask_id: int, eos_id: int, patterns: int = 8):
        rng = random.Random(seed)
        rows = []
        for _ in range(patterns):
            row = [value / 100 for value in rng.sample(range(-300, 300), vocab)]  # all different: one argmax
            favourite = rng.choice([eos_id, eos_id, mask_id] + [rng.randrange(vocab)] * 5)
            row[favourite] = rng.choice([3.5, 5.0, 7.0])
            rows.append(row)
        self.table = torch.tensor(rows, dtype=torch.float64)  # (patterns, V)
        self.ears = [(rng.randrange(9), rng.randrange(9), rng.randrange(1, 9)) for _ in range(2)]
        self.place = rng.randrange(9)

    def __call__(self, tokens, positions, attention_mask):
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask  # (B, L)
        start, size = (~real).sum(1, keepdim=True), real.sum(1, keepdim=True)  # (B, 1)
        place = positions - start  # (B, K)
        key = place * self.place
        for step, shift, weight in self.ears:
            key = key + weight * tokens.gather(1, (place * step + shift) % size + start)
        return self.table[key % len(self.table)]  # (B, K, V)


class Constant:
    """The same logits at every position, whatever it is shown; always the same storage."""

    def __init__(self, logits: list[float]):
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def __call__(self, tokens, positions, attention_mask):
        return self.logits.expand(*positions.shape, -1)


class Watched:
    """A denoiser that keeps what it was asked and what it answered."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, []

    def __call__(self, tokens, positions, attention_mask):
        logits = self.denoise(tokens, positions, attention_mask)
        self.calls.append((tokens.clone(), positions.clone(), logits.clone()))
        return logits


class Pieces:
    """A vocabulary of byte strings; the longest that fits goes first. Special tokens are those without bytes."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces
        self.special = [i for i, piece in enumerate(pieces) if not piece]

    def encode(self, text: str) -> list[int]:
        ids, data = [], text.encode()
        while data:
            fits = [i for i, piece in enumerate(self.pieces) if piece and data.startswith(piece)]
            ids.append(max(fits, key=lambda i: len(self.pieces[i])))
            data = data[len(self.pieces[ids[-1]]) :]
        return ids

    def decode(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


ALPHABET = "aA \u00d0\u2410\U00010410"  # the last three have two, three and four bytes, all but the first of them 0x90
BYTES = [bytes([byte]) for byte in sorted(set(ALPHABET.encode()))]
SHORT = Pieces(b"", b"", *BYTES, b"")
LONG = Pieces(b"AaA", *BYTES, b"", b"aA", b"\xc3\x90", b"a\xc3", b"\x90\xe2", b"\x90\x90", b"", b"")
