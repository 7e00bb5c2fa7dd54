"""TIE once more, slowly: one row, one member, one position at a time, in lists and loops; and fake models.

Written from the paper and the decisions listed in tie.py's texts, not from its code: nothing but Member, Config and
Canvas is taken from there. Rows are stripped of their padding, and the denoiser is asked for every position at once.
"""

from __future__ import annotations

import math
import random
from collections import namedtuple
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

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
# what the ensemble gives for one row
Row = namedtuple("Row", "states leaders scores tcc top1 winner forwards")


@dataclass
class State:
    tokens: list[int]
    masked: list[bool]


# n steps of one member on one row, or fewer if it completes
class Stretch(namedtuple("Stretch", "count comparisons history steps")):
    @property
    def top1(self) -> Mean:
        return self.history[-1] if self.history else NOTHING


def guess(logits: list[float], mask_id: int) -> Guess:
    kept = [NEVER if v == mask_id else logit for v, logit in enumerate(logits)]
    weights = [math.exp(logit - max(kept)) for logit in kept]
    p = [weight / sum(weights) for weight in weights]
    first, second = sorted(p, reverse=True)[:2]
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return Guess(p.index(first), first, -entropy, first - second, tuple(logits))


def look(member: tie.Member, state: State) -> dict[int, Guess]:
    """One forward: a guess for each masked position."""
    seen = [member.mask_id if hole else token for token, hole in zip(state.tokens, state.masked)]
    logits = member.denoise(torch.tensor([seen]), torch.arange(len(seen))[None], None)[0].tolist()
    return {i: guess(logits[i], member.mask_id) for i, hole in enumerate(state.masked) if hole}


def relevant(member: tie.Member, state: State, guesses: dict, answer: slice, config: tie.Config) -> list[int]:
    """A^(t): the masked answer positions, the first few of them with a window, then less those that predict EOS."""
    eos = member.eos_id if isinstance(member.eos_id, tuple) else (member.eos_id,)
    masked = [i for i in range(answer.start, answer.stop) if state.masked[i]][: config.answer_window]
    return [i for i in masked if guesses[i].token not in eos]


def mean(positions: list[int], guesses: dict[int, Guess], name: str) -> Mean:
    if not positions:
        return NOTHING
    value = sum(getattr(guesses[i], name) for i in positions) / len(positions)
    return Mean(value, tuple((i, guesses[i].logits) for i in positions))


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


def open_positions(state: State, reasoning: slice, answer: slice, size: int) -> list[int]:
    """The masked positions of the first block that has any."""
    for region in (reasoning, answer):
        for start in range(region.start, region.stop, size):
            masked = [i for i in range(start, min(start + size, region.stop)) if state.masked[i]]
            if masked:
                return masked
    return []


def commit(state: State, guesses: dict[int, Guess], block: list[int], config: tie.Config) -> None:
    ranked = sorted(block, key=lambda i: (-guesses[i].top1_probability, i))
    for i, j in pairwise(ranked):
        near = guesses[i].top1_probability - guesses[j].top1_probability < NEAR
        if near and guesses[i].logits != guesses[j].logits:
            raise Unclear
    chosen = ranked[: config.top_k]
    if config.threshold is not None:
        if any(abs(guesses[i].top1_probability - config.threshold) < NEAR for i in block):
            raise Unclear
        chosen = [i for i in block if guesses[i].top1_probability > config.threshold] or ranked[:1]
    for i in chosen:
        state.tokens[i], state.masked[i] = guesses[i].token, False


def generate(member: tie.Member, state: State, reasoning: slice, answer: slice, config: tie.Config) -> Stretch:
    """n steps alone; the comparisons of Eq. 5 or 7 between each step and the next."""
    count, comparisons, steps = Fraction(0), 0, 0
    history: list[Mean] = []
    before: dict[int, int] = {}  # A^(t) of the step before, each position with its top-1
    while steps < config.interval and any(state.masked):
        guesses = look(member, state)
        if before:
            changes = sum(state.masked[i] and guesses[i].token != token for i, token in before.items())
            count += Fraction(changes, len(before) if config.normalize else 1)
            comparisons += 1
        A = relevant(member, state, guesses, answer, config)
        before = {i: guesses[i].token for i in A}
        history += [mean(A, guesses, "top1_probability")] if A else []
        commit(state, guesses, open_positions(state, reasoning, answer, config.block_size), config)
        steps += 1
    return Stretch(count, comparisons, history, steps)


def assess(members: list, m: int, state: State, stretch: Stretch, answer: slice, config: tie.Config) -> Mean:
    """The score of trajectory m."""
    if config.score == "token_change_count":
        return Mean(-stretch.count, ()) if stretch.comparisons else NOTHING
    if config.score == "top1_history":
        return average(stretch.history)
    readers = members if config.cross_model else [members[m]]
    readings = [(reader, look(reader, state)) for reader in readers]
    means = [mean(relevant(r, state, g, answer, config), g, config.score) for r, g in readings]
    return average(means)


def average(means: list[Mean]) -> Mean:
    """The mean of those that say something."""
    said = [part.value for part in means if part.value > NEVER]
    return Mean(sum(said) / len(said), tuple(means)) if said else NOTHING


def select(config: tie.Config, tcc: list[Fraction], compared: list[bool], tops: list[Mean], leaders: list[int]) -> int:
    if config.selection == "best_model":
        return config.best_model
    leads = [leaders.count(m) for m in range(len(tcc))]
    if config.selection == "most_selected" and leaders and leads.count(max(leads)) == 1:
        return leads.index(max(leads))
    return leader([Mean(-count, ()) if some else NOTHING for count, some in zip(tcc, compared)], tops)


def ensemble_row(members: list, states: list[State], reasoning: slice, answer: slice, config: tie.Config) -> Row:
    M = len(members)
    leaders: list[int] = []
    scores: list[list[float]] = []
    forwards, ended = 0, False
    tcc, compared, tops = [Fraction(0)] * M, [False] * M, [NOTHING] * M
    while True:
        stretches = [generate(member, state, reasoning, answer, config) for member, state in zip(members, states)]
        for m, stretch in enumerate(stretches):
            tcc[m] += stretch.count
            compared[m] = compared[m] or stretch.comparisons > 0
            tops[m] = stretch.top1 if stretch.top1.value > NEVER else tops[m]
            forwards += stretch.steps
        complete = [not any(state.masked) for state in states]
        ended = ended or any(complete)
        if all(complete):
            winner = select(config, tcc, compared, tops, leaders)
            return Row(states, leaders, scores, tcc, [float(top.value) for top in tops], winner, forwards)
        if not ended:
            f = [assess(members, m, states[m], stretches[m], answer, config) for m in range(M)]
            scores.append([float(score.value) for score in f])
            leaders.append(leader(f, [stretch.top1 for stretch in stretches]))
            states = [deepcopy(states[leaders[-1]]) for _ in members]
            if config.score in tie.SCORES[1:]:  # of M * M forwards the leader's M serve the next step too
                forwards += M * (M - 1) if config.cross_model else M


def ensemble(members: list, canvases: list[tie.Canvas], config: tie.Config) -> list[Row]:
    """Each row by itself, its padding cut off. Raises Unclear where float32 cannot be expected to agree."""
    rows = []
    for b in range(len(canvases[0].tokens)):
        mask = canvases[0].attention_mask
        pad = 0 if mask is None else int((~mask[b]).sum())
        states = [State(c.tokens[b, pad:].tolist(), c.masked[b, pad:].tolist()) for c in canvases]
        reasoning, answer = (slice(s.start - pad, s.stop - pad) for s in (canvases[0].reasoning, canvases[0].answer))
        rows.append(ensemble_row(members, states, reasoning, answer, config))
    return rows


# --- fake models --------------------------------------------------------------------------------------


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
