"""TIE, Trajectory-based Iterative Ensembling of masked diffusion language models (arXiv:2606.16281), in one file.

Several models decode the same question side by side. Every n steps each model's partly denoised sequence is scored
by how stable and confident its answer tokens are; the best one is relayed to all models, and they go on from there.

Glossary: name here -> symbol, equation or section of the paper
    members, M             constituent models, m = 1..M
    interval, n            ensemble interval: steps that every model decodes alone between two relays (Sec. 4.1)
    Canvas                 T_m, a trajectory: the partly denoised sequence prompt | reasoning | suffix | answer
    counted, in read       A_m^(t), the answer-relevant positions of model m at step t (App. A.4)
    token_change_count     C(n), Eq. 5; normalised C~(n), Eq. 7; their inner sums in step_changes
    Run.close_round        the negative of C(n) or C~(n), the score of Eq. 6
    confidence             f(T_m; m'), the three scores read from the logits of one model m' (Sec. 4.2)
    assess, cross_model    the mean of f(T_m; m') over the models m', Eq. 8; off: m' = m (Table 9)
    lead, leader           m*, the argmax of the scores, Eq. 9
    relay                  every model's state becomes T_{m*}, Eq. 10
    select                 the final response (Sec. 4.4, App. D, Table 10)
    top1_history           a fifth score, ours: the source model's top-1 probability over the steps of the round
    translate              relay between different vocabularies, ours

"Our decision" marks what the paper leaves open and we had to settle.
Shapes: B rows (questions), L positions, W block size, A answer positions, K positions read, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(tokens (B, L) int64, positions (B, K) int64, attention_mask (B, L) bool or None) -> logits (B, K, V), unshifted:
logits[b, k] is the distribution of the token AT positions[b, k]. Any float dtype, on the device of the tokens."""

SCORES = ("token_change_count", "top1_probability", "negative_entropy", "probability_margin")
OWN_SCORES = ("top1_history",)  # not in the paper
SELECTIONS = ("lowest_tcc", "best_model", "most_selected")
SILENT = float("-inf")  # score of a trajectory that says nothing about its answer, below all others (our decision)


# --- members, settings, the sequence (Sec. 4.1, 5.1, App. A.4) ------------------------------------------


class Codec(Protocol):
    """A vocabulary. `decode` gives bytes, since one token may hold part of a character, and of several tokens the
    bytes of each in turn."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One constituent model. Members with the same codec (one object), or all with none, share a vocabulary."""

    denoise: Denoiser
    mask_id: int
    eos_id: int | tuple[int, ...]  # a tuple where a family ends and pads with different tokens; the first one pads
    name: str = ""
    codec: Codec | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    def __str__(self) -> str:
        return f"member {self.name!r}" if self.name else "a member"


@dataclass(frozen=True)
class Config:
    """Settings of one decoding; the defaults are the paper's. ValueError on values that make no sense."""

    interval: int = 16  # n
    block_size: int = 16  # W, of semi-autoregressive decoding
    score: str = "token_change_count"  # one of SCORES or OWN_SCORES
    cross_model: bool = True  # logit scores: mean over all models (Eq. 8), or the source model alone
    normalize: bool = True  # token change count: Eq. 7, or Eq. 5, in the final selection too (our decision)
    top_k: int = 1  # tokens committed a step,
    threshold: float | None = None  # or tau: every token of the block above it, at least one (Sec. 5.3)
    answer_window: int | None = None  # 8 for code: read only the first 8 masked answer positions
    selection: str = "lowest_tcc"  # one of SELECTIONS
    best_model: int = 0  # the member that selection "best_model" names

    def __post_init__(self):
        for name in ("interval", "block_size", "top_k", "answer_window"):
            value = getattr(self, name)
            unset = name == "answer_window" and value is None
            if not unset and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
            if not unset and value >= 2**31:
                raise ValueError(f"{name} must be below 2**31, not {value!r}")
        for name, choices in (("score", SCORES + OWN_SCORES), ("selection", SELECTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.threshold is not None and not (isinstance(self.threshold, (int, float)) and 0 < self.threshold <= 1):
            raise ValueError(f"threshold must lie in (0, 1], not {self.threshold!r}")
        if self.threshold is not None and self.top_k != 1:
            raise ValueError("threshold and top_k exclude each other: give one of them")


@dataclass
class Canvas:
    """The state of B rows. `masked` says what is still to be decoded; `tokens == mask_id` is never asked."""

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool, True only inside `reasoning` and `answer`
    reasoning: slice
    answer: slice
    attention_mask: Tensor | None = None  # (B, L) bool, False on left padding; None: there is none

    @classmethod
    def blank(
        cls, prompts: Sequence[Sequence[int]], suffix: Sequence[int], reasoning_length: int, answer_length: int,
        *, mask_id: int, pad_id: int, device: torch.device | str | None = None,
    ) -> Canvas:  # fmt: skip
        """Left-padded prompts, masked reasoning, suffix, masked answer. ValueError where there is nothing to decode."""
        if len(prompts) == 0:
            raise ValueError("no prompts: give at least one")
        if min(reasoning_length, answer_length) < 0 or reasoning_length + answer_length == 0:
            raise ValueError(f"nothing to decode: reasoning_length {reasoning_length}, answer_length {answer_length}")
        width = max(map(len, prompts))
        region = [mask_id] * reasoning_length + list(suffix) + [mask_id] * answer_length
        rows = [[pad_id] * (width - len(prompt)) + list(prompt) + region for prompt in prompts]
        tokens = torch.tensor(rows, dtype=torch.int64, device=device)  # (B, L)
        reasoning = slice(width, width + reasoning_length)
        answer = slice(reasoning.stop + len(suffix), tokens.shape[1])
        masked = torch.zeros_like(tokens, dtype=torch.bool)  # (B, L)
        masked[:, reasoning] = masked[:, answer] = True
        pads = torch.tensor([[width - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
        real = torch.arange(tokens.shape[1], device=device) >= pads  # (B, L)
        return cls(tokens, masked, reasoning, answer, None if min(map(len, prompts)) == width else real)

    @property
    def complete(self) -> Tensor:
        """(B,) bool: nothing is left to decode."""
        return ~self.masked.any(1)


# --- one denoising step: semi-autoregressive blocks, low-confidence remasking, greedy (Sec. 5.1) ---------


class Reading(NamedTuple):
    """One forward of one model on one canvas, reduced to what the algorithm keeps."""

    positions: Tensor  # (B, W) int64, a window around the current block of each row
    open: Tensor  # (B, W) bool, its positions that may be committed
    token: Tensor  # (B, W) int64, their top-1
    probability: Tensor  # (B, W) float32, its probability
    answer_top1: Tensor  # (B, A) int64, top-1 at the answer positions, or the token itself once committed
    counted: Tensor  # (B, A) bool, A^(t)
    top1: Tensor  # (B,) float32, mean top-1 probability over A^(t)
    score: Tensor  # (B,) float32, the logit score of `config.score`; top1 where none was asked for
    nan: Tensor  # (B,) bool, NaN at a position that may be committed or belongs to the answer window


def block_ends(canvas: Canvas, block_size: int) -> Tensor:
    """(L,) the end of each position's block; reasoning and answer blocks each count from the start of their region."""
    ends = torch.zeros_like(canvas.tokens[0])
    for region in (canvas.reasoning, canvas.answer):
        offset = torch.arange(region.stop - region.start, device=ends.device)
        ends[region] = (region.start + (offset // block_size + 1) * block_size).clamp(max=region.stop)
    return ends


def current_block(canvas: Canvas, ends: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """W positions (B, W) that hold each row's first block with a mask, and which of them may be committed.

    Reasoning stands before the answer, so answers stay masked until the reasoning is done (Sec. 4.1). The window ends
    with the block, or begins the row where there is no room for that; in a row without masks nothing is open.
    """
    end = ends[canvas.masked.int().argmax(1)][:, None]  # (B, 1)
    width = min(block_size, canvas.tokens.shape[1])
    positions = (end - width).clamp(min=0) + torch.arange(width, device=end.device)  # (B, W)
    return positions, canvas.masked.gather(1, positions) & (positions < end)


def steps_left(canvas: Canvas, ends: Tensor, top_k: int) -> Tensor:
    """(B,) steps until each row is complete, at `top_k` tokens a step; no step crosses a block."""
    masks = torch.zeros(len(canvas.tokens), len(ends) + 1, dtype=torch.int64, device=ends.device)
    masks = masks.scatter_add(1, ends.expand_as(canvas.tokens), canvas.masked.long())  # (B, L + 1), by block end
    return ((masks + top_k - 1) // top_k).sum(1)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """(B,) mean of values (B, A) over A^(t); SILENT where A^(t) is empty."""
    mean = values.masked_fill(~counted, 0).sum(-1) / counted.sum(-1).clamp(min=1)
    return mean.masked_fill(~counted.any(-1), SILENT)


def read(member: Member, canvas: Canvas, ends: Tensor, config: Config, scored: bool = False) -> Reading:
    """Forward `canvas` through `member`, with logits at the current block and the answer window only.

    With `scored` the reading also holds f(T; member), the logit score that `config.score` names.
    """
    block, open_ = current_block(canvas, ends, config.block_size)  # (B, W)
    tokens, masked = canvas.tokens[:, canvas.answer], canvas.masked[:, canvas.answer]  # (B, A)
    # Our decision: the window takes the first masked answer positions, and EOS is left out afterwards.
    window = (~masked).int().argsort(dim=1, stable=True)[:, : config.answer_window]  # (B, w), masked positions first
    positions = torch.cat([block, canvas.answer.start + window], 1)  # (B, K), K = W + w
    state = canvas.tokens.masked_fill(canvas.masked, member.mask_id)  # (B, L)
    logits = member.denoise(state, positions, canvas.attention_mask)  # (B, K, V)
    _check_logits(member, logits, positions)
    W = block.shape[1]
    value_of = LOGIT_SCORES[config.score] if scored else None
    probability, token, value = predict(logits, member.mask_id, value_of)  # (B, K)
    counted = masked.gather(1, window)  # (B, w)
    nan = (probability.isnan() & torch.cat([open_, counted], 1)).any(1)  # (B,)
    answer_top1 = torch.where(counted, token[:, W:], tokens.gather(1, window))  # (B, w)
    for eos in member.eos_ids:
        counted = counted & (answer_top1 != eos)
    top1 = mean_over(probability[:, W:], counted)
    return Reading(
        positions=block, open=open_, token=token[:, :W], probability=probability[:, :W],
        answer_top1=tokens.scatter(1, window, answer_top1),
        counted=torch.zeros_like(masked).scatter(1, window, counted),
        top1=top1, score=mean_over(value[:, W:], counted), nan=nan,
    )  # fmt: skip


def predict(
    logits: Tensor, mask_id: int, value_of: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 probability and token (B, K) of logits (B, K, V), and what `value_of` makes of the probabilities of each
    position (B, K), by default the top-1 probability again.

    The mask token is never predicted, so that decoding always ends (our decision). All is done for a few positions at
    a time: what fits a processor's cache takes half as long as a copy of all logits, and an accelerator's memory is
    spared a copy in float32.
    """
    at_once = 2**20 if logits.device.type == "cpu" else 2**24  # numbers; an accelerator wants few launches
    parts = []
    for part in logits.flatten(0, 1).split(max(1, at_once // logits.shape[-1])):
        part = part.clone()  # (b, V), b of the B * K positions; the denoiser keeps its own
        part[:, mask_id] = float("-inf")
        p = part.softmax(-1, dtype=torch.float32)  # (b, V)
        probability, token = p.max(-1)  # (b,)
        parts.append((probability, token, value_of(p) if value_of else probability))
    probability, token, value = (torch.cat(part).view(logits.shape[:2]) for part in zip(*parts))
    return probability, token, value


def commit(canvas: Canvas, reading: Reading, config: Config) -> Canvas:
    """Unmask the most confident open positions of each row: `top_k`, or all above `threshold` and at least one.

    Equal confidences go to the lower position (our decision)."""
    confident = reading.probability.masked_fill(~reading.open, -1)  # (B, W)
    rank = confident.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, W)
    chosen = rank < config.top_k
    if config.threshold is not None:
        chosen = chosen | (confident > config.threshold)
    chosen = chosen & reading.open
    token = torch.where(chosen, reading.token, canvas.tokens.gather(1, reading.positions))
    tokens = canvas.tokens.scatter(1, reading.positions, token)  # (B, L)
    masked = canvas.masked.scatter(1, reading.positions, canvas.masked.gather(1, reading.positions) & ~chosen)
    return replace(canvas, tokens=tokens, masked=masked)


# --- trajectory assessment: the four scores (Sec. 4.2) ----------------------------------------------------


def step_changes(top1_tokens: Tensor, counted: Tensor, normalize: bool) -> Tensor:
    """(n - 1, B) the inner sum of Eq. 5, or of Eq. 7 when normalised; arguments as `token_change_count`.

    In float64, so that equal sums of fractions compare as equal: ties are frequent, and have a rule of their own.
    """
    changed = (top1_tokens[1:] != top1_tokens[:-1]) & counted[:-1]  # (n - 1, B, A)
    changes = changed.sum(-1).double()  # (n - 1, B)
    return changes / counted[:-1].sum(-1).clamp(min=1) if normalize else changes


def token_change_count(top1_tokens: Tensor, counted: Tensor, normalize: bool = True) -> Tensor:
    """(B,) float32: how often the top-1 of an answer-relevant token changed between two steps. Eq. 5, or Eq. 7.

    top1_tokens (n, B, A) int64: top-1 at each step, or the token itself once committed, which is no change;
    counted (n, B, A) bool: A^(t). n steps give n - 1 comparisons; a step with an empty A^(t) adds nothing.
    """
    return step_changes(top1_tokens, counted, normalize).sum(0).float()


def top1_history(top1: Tensor) -> Tensor:
    """(B,) mean of top1 (n, B), the mean top-1 probabilities of a round's steps, over the steps with a non-empty A^(t).

    Not in the paper: like the token change count it is read from the source model's own steps, without a forward more.
    """
    return mean_over(top1.T, top1.T > SILENT)


def confidence(logits: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """The three logit scores, each (B,): means over A^(t), entropy in nats; -inf where A^(t) is empty.

    logits (B, A, V) at the answer positions, with -inf for the mask token where it is not to count; counted (B, A)
    bool, A^(t). Higher is more reliable.
    """
    p = logits.softmax(-1, dtype=torch.float32)  # (B, A, V)
    return {name: mean_over(value_of(p), counted) for name, value_of in LOGIT_SCORES.items()}


def margin(p: Tensor) -> Tensor:
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return first - second


LOGIT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # of probabilities (..., V), for each position
    "top1_probability": lambda p: p.amax(-1),
    "negative_entropy": lambda p: -torch.special.entr(p).sum(-1),
    "probability_margin": margin,
}


def lead(scores: Tensor, top1: Tensor) -> Tensor:
    """(B,) m* = argmax over members of scores (M, B), Eq. 9. Ties (our decision): the higher mean top-1 probability
    of the source model, top1 (M, B), at its most recent step with a non-empty A; then the lower index."""
    best = scores == scores.amax(0)  # (M, B)
    top1 = top1.masked_fill(~best, SILENT)
    return (best & (top1 == top1.amax(0))).int().argmax(0)


# --- one round: generation, assessment, relay (Sec. 4.1 to 4.3) -------------------------------------------


class Run:
    """One member at work on its own state, with what the scores need of its steps."""

    def __init__(self, member: Member, canvas: Canvas, config: Config):
        zero = torch.zeros(len(canvas.tokens), dtype=torch.int64, device=canvas.tokens.device)  # (B,)
        self.member, self.canvas, self.config = member, canvas, config
        self.ends = block_ends(canvas, config.block_size)  # (L,)
        self.history: list[Reading] = []  # the forwards of this round
        self.ahead: Reading | None = None  # the next step's forward, where the assessment has made it
        self.tcc = zero.double()  # (B,) C~ over the whole decoding: of the model's own rounds, not the relayed sequence
        self.compared = zero.bool()  # (B,) some comparison stands behind tcc
        self.top1 = zero + SILENT  # (B,) mean top-1 probability at the most recent step with a non-empty A
        self.forwards = zero  # (B,)

    def step(self) -> None:
        """One denoising step. A row without masks is forwarded for its neighbours' sake only, and not counted."""
        reading = self.ahead or read(self.member, self.canvas, self.ends, self.config)
        self.ahead = None
        self.history.append(reading)
        self.forwards = self.forwards + reading.open.any(1)
        self.canvas = commit(self.canvas, reading, self.config)

    def close_round(self) -> tuple[Tensor, Tensor]:
        """Score of the round, -C~(n) (Eq. 6) or `top1_history`, and tie-breaking top-1 probability of its most recent
        step with a non-empty A, each (B,); the history starts again."""
        top1 = history = torch.full_like(self.top1, SILENT)
        count, compared = torch.zeros_like(self.tcc), torch.zeros_like(self.compared)
        if self.history:
            _check_nan(self.member, self.history)
            tokens = torch.stack([reading.answer_top1 for reading in self.history])  # (n, B, A)
            counted = torch.stack([reading.counted for reading in self.history])  # (n, B, A)
            alive = torch.stack([reading.open.any(1) for reading in self.history])  # (n, B)
            counted[:-1] &= alive[1:, :, None]  # a comparison takes two forwards of the row itself
            count = step_changes(tokens, counted, self.config.normalize).sum(0)
            compared = counted[:-1].any(-1).any(0)
            history = top1_history(torch.stack([reading.top1 for reading in self.history]))
        for reading in self.history:
            top1 = torch.where(reading.top1 > SILENT, reading.top1, top1)
        self.history = []
        self.tcc, self.compared = self.tcc + count, self.compared | compared
        self.top1 = torch.where(top1 > SILENT, top1, self.top1)
        stability = (-count.float()).masked_fill(~compared, SILENT)
        return history if self.config.score in OWN_SCORES else stability, top1


def generate(runs: list[Run], config: Config) -> int:
    """Trajectory generation (Sec. 4.1): every model decodes alone for n steps, or to its end. Returns the steps made.

    With a fixed quota nothing in here waits for a device, so members on different devices overlap. With a threshold
    the number of steps depends on the data: the host asks once a step which members still have masks.
    """
    left = [int(steps_left(run.canvas, run.ends, config.top_k).max()) for run in runs]
    for step in range(config.interval):
        if config.threshold is not None:
            left = [step + int(run.canvas.masked.any()) for run in runs]
        if step >= max(left):
            return step
        for run, steps in zip(runs, left):
            if step < steps:
                run.step()
    return config.interval


Views = tuple[Tensor, Tensor, Tensor]  # of S senders: tokens (S, B, L), masked (S, B, L), fits (S, B)


def views(receiver: Run, senders: list[Run], rows: Tensor) -> Views:
    """The senders' states as the receiver would hold them, wanted for `rows` (S, B); where a text does not fit, the
    receiver's own state. In one vocabulary a state is a plain copy of ids; prompt and suffix are the receiver's own."""
    parts = []
    for sender, wanted in zip(senders, rows):
        seen, fits = sender.canvas, torch.ones_like(wanted)
        if sender.member.codec is not receiver.member.codec:
            state = (seen.tokens, seen.masked, seen.reasoning, seen.answer)
            seen, fits = translate(*state, sender.member, receiver.member, receiver.canvas, wanted)
        parts.append((seen.tokens, seen.masked, fits))
    tokens, masked, fits = (stack_on(receiver.canvas.tokens.device, part) for part in zip(*parts))
    return torch.where(receiver.ends > 0, tokens, receiver.canvas.tokens), masked, fits


def assess(runs: list[Run], config: Config, ended: Tensor) -> tuple[Tensor, list[tuple[Views, list[Reading]]]]:
    """Trajectory assessment by a logit score: scores (M, B) of the rows that have not ended, and what each model read.

    The forwards of the leader's state are every model's first of the next round, so that a round costs M * (M - 1)
    more; M more when each model reads its own state alone, since the others' next forward is then still to be made.
    """
    sources = [runs if config.cross_model else [run] for run in runs]
    received = [views(run, senders, ~ended.expand(len(senders), -1)) for run, senders in zip(runs, sources)]
    heard, f = [], []
    for run, seen in zip(runs, received):
        states = [replace(run.canvas, tokens=tokens, masked=masked) for tokens, masked, _ in zip(*seen)]
        readings = [read(run.member, state, run.ends, config, scored=True) for state in states]
        run.forwards = run.forwards + (~ended).to(run.forwards) * (len(runs) - 1 if config.cross_model else 1)
        heard.append((seen, readings))
        f.append(torch.stack([reading.score for reading in readings]).masked_fill(~seen[2], SILENT))  # f(T_m; m')
    for run, (_, readings) in zip(runs, heard):  # after all forwards, which members on different devices make at once
        _check_nan(run.member, readings)
    scores = stack_on(ended.device, f)  # (M models m', M trajectories, B)
    if not config.cross_model:
        return scores.squeeze(1), []
    said = scores > SILENT  # Our decision: Eq. 8 averages over the models whose A is not empty on the trajectory.
    mean = scores.masked_fill(~said, 0).sum(0) / said.sum(0).clamp(min=1)  # (M, B)
    return mean.masked_fill(~said.any(0), SILENT), heard


def relay(runs: list[Run], leader: Tensor, heard: list[tuple[Views, list[Reading]]]) -> int:
    """Eq. 10: each model's state becomes that of the row's leader (B,); where that is -1 it stays.

    Returns the number of (row, receiver) pairs whose receiver kept its own state, since the text did not fit it."""
    members = torch.arange(len(runs), device=leader.device)[:, None]  # (M, 1)
    received = [heard[r][0] if heard else views(run, runs, leader == members) for r, run in enumerate(runs)]
    missed = 0
    for r, (run, (tokens, masked, fits)) in enumerate(zip(runs, received)):
        source = torch.where(leader < 0, r, leader).to(tokens.device)  # (B,)
        rows = torch.arange(len(source), device=tokens.device)  # (B,)
        run.canvas = replace(run.canvas, tokens=tokens[source, rows], masked=masked[source, rows])
        missed += int((~fits[source, rows]).sum())
        if heard:
            run.ahead = Reading(*(torch.stack(part)[source, rows] for part in zip(*heard[r][1])))
            # A text that leaves the receiver no masks has cost its forward, which no step is going to count.
            run.forwards = run.forwards + ((leader.to(rows) >= 0) & ~run.ahead.open.any(1))
    return missed


# --- the ensemble: rounds until a model completes, then the final response (Sec. 4.4, App. D) --------------


@dataclass
class Result:
    """What `ensemble` gives. `leaders` and `scores` have one entry a relay; a row that ended earlier has leader -1."""

    candidates: list[Canvas]  # M, each in its member's vocabulary
    winner: Tensor  # (B,) int64, index of the selected candidate
    leaders: Tensor  # (rounds, B) int64
    scores: Tensor  # (rounds, M, B) float32, -inf where a trajectory said nothing, or the row had ended
    tcc: Tensor  # (M, B) float32, C~ over the whole decoding; C without `normalize`
    top1: Tensor  # (M, B) float32, mean top-1 probability at each model's most recent step with a non-empty A
    forwards: float  # sequences forwarded per row, all members together
    not_relayed: int  # (row, receiver) pairs that kept their own state


def select(config: Config, scores: Tensor, top1: Tensor, leaders: Tensor) -> Tensor:
    """(B,) index of the final response: lowest C~ by scores = -C~ (M, B) and ties as `lead`; or as in Table 10.

    most_selected with equal numbers of leads, or no relay at all, falls back to the lowest C~ (our decision)."""
    lowest = lead(scores, top1)
    if config.selection == "best_model":
        return torch.full_like(lowest, config.best_model)
    if config.selection == "lowest_tcc":
        return lowest
    leads = torch.stack([(leaders == m).sum(0) for m in range(len(scores))])  # (M, B)
    most = leads == leads.amax(0)
    return torch.where(most.sum(0) == 1, most.int().argmax(0), lowest)


def respond(runs: list[Run], config: Config, relays: list[tuple[Tensor, Tensor]], not_relayed: int) -> Result:
    """The final response (Sec. 4.4) and the record of how it came about."""
    home = runs[0].canvas.tokens.device
    tcc, top1 = (stack_on(home, [getattr(run, name).float() for run in runs]) for name in ("tcc", "top1"))  # (M, B)
    compared = stack_on(home, [run.compared for run in runs])  # (M, B)
    leaders = torch.stack([leader for leader, _ in relays]) if relays else top1.new_zeros(0, len(top1[0])).long()
    scores = torch.stack([score for _, score in relays]) if relays else top1.new_zeros(0, *top1.shape)
    winner = select(config, (-tcc).masked_fill(~compared, SILENT), top1, leaders)
    forwards = sum(float(run.forwards.sum()) for run in runs) / len(winner)
    return Result([run.canvas for run in runs], winner, leaders, scores, tcc, top1, forwards, not_relayed)


@torch.no_grad()
def ensemble(
    members: Sequence[Member], canvases: Sequence[Canvas], config: Config = Config(),
    on_round: Callable[[dict], None] | None = None,
) -> Result:  # fmt: skip
    """TIE: decode the same questions with all members, one canvas each on its member's device, relaying every n steps.

    Rows are independent: each has its own leader and its own end, and decodes as it would alone. Once any member has
    completed a row, or the row has taken twice the steps of a member alone, it is relayed no more: the others finish
    it alone, and all M stand for selection. n >= T is the post-generation ensemble (Table 3), M = 1 plain decoding.
    The canvases given are not changed.

    `on_round` is called after every n steps, before the relay, with {"round", "step", "tokens" and "masked" (lists of
    M (B, L)), "scores" (M, B), "leader" (B,), -1 where nothing is relayed}.

    Raises ValueError on members, canvases and settings that do not fit together, and on NaN among the logits it uses.
    """
    _check(members, canvases, config)
    runs = [Run(member, canvas, config) for member, canvas in zip(members, canvases)]
    home = canvases[0].tokens.device
    # A relay between vocabularies can give masks back, for ever without this limit (our decision).
    limit = 2 * stack_on(home, [steps_left(run.canvas, run.ends, config.top_k) for run in runs]).amax(0)  # (B,)
    ended = torch.zeros_like(limit, dtype=torch.bool)  # (B,) no more relays
    relays: list[tuple[Tensor, Tensor]] = []  # leader (B,), scores (M, B)
    step = rounds = not_relayed = 0
    while not all(bool(run.canvas.complete.all()) for run in runs):
        step += generate(runs, config)
        scores, top1 = (stack_on(home, part) for part in zip(*[run.close_round() for run in runs]))  # (M, B)
        ended = ended | stack_on(home, [run.canvas.complete for run in runs]).any(0) | (limit <= step)
        last = bool(ended.all())  # no relay follows the last stretch
        heard: list = []
        if config.score in SCORES[1:] and not last:
            scores, heard = assess(runs, config, ended)
        leader = lead(scores, top1).masked_fill(ended, -1)
        scores = scores.masked_fill(ended, SILENT)
        if on_round is not None:
            state = {name: [getattr(run.canvas, name) for run in runs] for name in ("tokens", "masked")}
            on_round({"round": rounds, "step": step, **state, "scores": scores, "leader": leader})
        rounds += 1
        if not last:
            relays.append((leader, scores))
            not_relayed += relay(runs, leader, heard)
    return respond(runs, config, relays, not_relayed)


@torch.no_grad()
def decode(member: Member, canvas: Canvas, config: Config = Config()) -> Canvas:
    """Plain semi-autoregressive decoding by one member, with the block size and the quota or threshold of `config`."""
    _check([member], [canvas], replace(config, best_model=0))
    run = Run(member, canvas, config)
    while run.canvas.masked.any():
        generate([run], config)
        run.close_round()
    return run.canvas


# --- relay between different vocabularies (our decision; the paper is silent) -------------------------------


def translate(
    tokens: Tensor, masked: Tensor, reasoning: slice, answer: slice, sender: Member, receiver: Member,
    canvas: Canvas, rows: Tensor | None = None,
) -> tuple[Canvas, Tensor]:  # fmt: skip
    """The sender's state, text with holes, in the receiver's vocabulary and layout.

    tokens and masked (B, L) and the two regions are the sender's; `canvas` is the receiver's own, whose prompt, suffix
    and region lengths stay. Committed text is kept exactly, masks keep their number and place between its runs, EOS
    becomes EOS. The end of a region stretches or shrinks to the receiver's length: by masks where the sender's ends in
    masks, by EOS where it is complete. Returns the canvas, and fits (B,) bool: the other rows, whose text does not fit
    or which `rows` (B,) leaves out, keep the receiver's state.
    """
    if rows is not None and not rows.any():
        return canvas, torch.zeros_like(rows, device=canvas.tokens.device)
    new, open_ = canvas.tokens.tolist(), canvas.masked.tolist()
    fits = []
    for b, want in enumerate([True] * len(new) if rows is None else rows.tolist()):
        state = [None if hole else token for token, hole in zip(tokens[b].tolist(), masked[b].tolist())] if want else []
        pairs = [(canvas.reasoning, reasoning), (canvas.answer, answer)]
        told = [retell(state[theirs], sender, receiver, own.stop - own.start) for own, theirs in pairs]
        fits.append(want and None not in told)
        for (own, _), ids in zip(pairs, told):
            if fits[b] and ids is not None:
                new[b][own] = [receiver.mask_id if i is None else i for i in ids]
                open_[b][own] = [i is None for i in ids]
    device = canvas.tokens.device
    seen = replace(canvas, tokens=torch.tensor(new, device=device), masked=torch.tensor(open_, device=device))
    return seen, torch.tensor(fits, device=device)


def retell(ids: list[int | None], sender: Member, receiver: Member, length: int) -> list[int | None] | None:
    """One region of one row in the receiver's ids, None where masked; None altogether if its text does not fit."""
    if sender.codec is None or receiver.codec is None:
        raise ValueError(f"{sender} and {receiver} need codecs to tell one's text to the other")
    eos, ends = receiver.eos_ids[0], sender.eos_ids
    told: list[int | None] = []
    for kind, run in groupby(ids, key=lambda i: "mask" if i is None else "eos" if i in ends else "text"):
        if kind == "text":
            for text in texts([i for i in run if i is not None], sender.codec):
                told += [None] if text is None else receiver.codec.encode(text)
        else:
            told += [None if kind == "mask" else eos for _ in run]
    end = eos if ids and ids[-1] is not None else None  # what the rest of the region holds
    while told and told[-1] == end:
        told.pop()
    return told + [end] * (length - len(told)) if len(told) <= length else None


def texts(ids: list[int], codec: Codec) -> list[str | None]:
    """The text of committed tokens in pieces, with None for each token that holds a byte of a broken character."""
    pieces = [codec.decode([i]) for i in ids]
    if not all(isinstance(piece, bytes) for piece in pieces):
        raise ValueError(f"a codec's decode must give bytes, not {type(pieces[0]).__name__}")
    text = b"".join(pieces).decode(errors="surrogateescape")  # a broken byte becomes a lone surrogate
    flags: list[bool] = []  # of each byte: is it broken?
    for character in text:
        lone = "\ud800" <= character <= "\udfff"
        flags += [True] if lone else [False] * len(character.encode())
    ends = list(accumulate(map(len, pieces)))
    holes = [any(flags[end - len(piece) : end]) for piece, end in zip(pieces, ends)]
    if not any(holes):
        return [text]
    told: list[str | None] = []
    for hole, run in groupby(zip(holes, ids), key=lambda pair: pair[0]):
        rest = [i for _, i in run]  # without its neighbours it may begin or end in half a character
        told += [None] * len(rest) if hole else texts(rest, codec)
    return told


# --- checks -------------------------------------------------------------------------------------------------


def stack_on(device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.to(device) for part in parts])


def _check(members: Sequence[Member], canvases: Sequence[Canvas], config: Config) -> None:
    """ValueError, before any forward, on members and canvases that do not fit together."""
    if len(members) == 0 or len(canvases) != len(members):
        raise ValueError(f"{len(members)} members, {len(canvases)} canvases: give at least one member, a canvas each")
    if config.best_model not in range(len(members)):
        raise ValueError(f"best_model {config.best_model} names no member: there are {len(members)}")
    for member, canvas in zip(members, canvases):
        _check_ids(member)
        _check_canvas(member, canvas)
        for other, theirs in zip(members, canvases):
            alike = str(canvas.reasoning) == str(theirs.reasoning) and str(canvas.answer) == str(theirs.answer)
            if len(canvas.tokens) != len(theirs.tokens):
                raise ValueError(f"{member} and {other} have canvases of different batch sizes: give equal ones")
            if (member.codec is None) != (other.codec is None):
                raise ValueError(f"only one of {member} and {other} has a codec: give one to all members, or to none")
            if member.codec is other.codec and not (alike and canvas.tokens.shape == theirs.tokens.shape):
                raise ValueError(f"{member} and {other} share a vocabulary: give their canvases the same layout")


def _check_ids(member: Member) -> None:
    ids = (member.mask_id, *member.eos_ids)
    if len(ids) < 2 or not all(hasattr(i, "__index__") for i in ids) or member.mask_id in member.eos_ids:
        given = f"not {member.mask_id!r} and {member.eos_id!r}"
        raise ValueError(f"{member}: mask_id must be an id, eos_id another or a tuple of others, {given}")


def _check_canvas(member: Member, canvas: Canvas) -> None:
    shape, outside = tuple(canvas.tokens.shape), canvas.masked.clone()
    masks = [mask for mask in (canvas.masked, canvas.attention_mask) if mask is not None]
    if len(shape) != 2 or shape[0] == 0 or canvas.tokens.dtype != torch.int64:
        raise ValueError(f"{member}: canvas tokens must be (B, L) int64, not {shape} {canvas.tokens.dtype}")
    if any(tuple(mask.shape) != shape or mask.dtype != torch.bool for mask in masks):
        raise ValueError(f"{member}: canvas masked and attention_mask must be {shape} bool, as its tokens")
    bounds = [0, canvas.reasoning.start, canvas.reasoning.stop, canvas.answer.start, canvas.answer.stop, shape[1]]
    if bounds != sorted(bounds):
        raise ValueError(f"{member}: the canvas needs reasoning, then answer, within its {shape[1]} positions")
    outside[:, canvas.reasoning] = outside[:, canvas.answer] = False
    if outside.any():
        raise ValueError(f"{member}: the canvas has masks outside its reasoning and answer")


def _check_logits(member: Member, logits: Tensor, positions: Tensor) -> None:
    shape = tuple(positions.shape)
    right = isinstance(logits, Tensor) and logits.dim() == 3 and tuple(logits.shape[:2]) == shape
    if not (right and logits.is_floating_point()):
        given = f"{tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{member} must give float logits {(*shape, 'V')}, not {given}")
    if not 0 <= member.mask_id < logits.shape[2]:
        raise ValueError(f"{member}: mask_id {member.mask_id} lies outside its vocabulary of {logits.shape[2]}")


def _check_nan(member: Member, readings: list[Reading]) -> None:
    if torch.stack([reading.nan for reading in readings]).any():
        raise ValueError(f"{member} gave NaN logits: check its weights and its dtype")
