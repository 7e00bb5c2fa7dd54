"""TIE, Trajectory-based Iterative Ensembling of masked diffusion language models (arXiv:2606.16281), in one file.

Several models decode the same question side by side. Every n steps each model's partly denoised sequence is
scored by how stable and confident its answer tokens are; the best sequence is relayed to all models, and they
go on from there. The file follows the paper's Section 4 and needs torch and einops only.

Glossary: name here -> symbol, equation or section of the paper
    members, M                  constituent models m = 1..M
    interval, n                 ensemble interval: steps decoded alone between two relays (Sec. 4.1)
    Canvas                      T_m, the trajectory: a partly denoised sequence, prompt | reasoning | suffix | answer
    counted                     A_m^(t), the answer-relevant positions of one step (App. A.4)
    token_change_count          C(n), Eq. 5; divided by |A| at each step C~(n), Eq. 7; its negative is the score, Eq. 6
    confidence                  f(T_m; m'), the three scores read from the logits of one model m'
    cross_model                 the mean of f(T_m; m') over all models m', Eq. 8; off: m' = m (Table 9)
    lead, leader                m*, the argmax of the scores, Eq. 9
    relay                       every model's state becomes T_{m*}, Eq. 10
    select                      the final response (Sec. 4.4, App. D, Table 10)
    translate                   relay between different vocabularies: ours, the paper is silent

Where the paper leaves something open, "Our decision" in the text below says what we did.
Shapes: B rows (questions), L positions, W block size, A answer positions, K = positions read, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(tokens (B, L) int64, positions (B, K) int64, attention_mask (B, L) bool or None) -> logits (B, K, V), unshifted:
logits[b, k] is the distribution of the token AT positions[b, k]. Any float dtype, any device."""

LOGIT_SCORES = ("top1_probability", "negative_entropy", "probability_margin")
SCORES = ("token_change_count", *LOGIT_SCORES)
SELECTIONS = ("lowest_tcc", "best_model", "most_selected")
NEVER = float("-inf")  # the score of a trajectory that says nothing about its answer: silence never wins


# --- members, settings, the sequence (Sec. 4.1, App. A.4) -----------------------------------------


class Codec(Protocol):
    """A vocabulary. `decode` gives bytes, since one token may hold part of a character."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One constituent model. Members with the same codec (or none) share a vocabulary."""

    denoise: Denoiser
    mask_id: int
    eos_id: int | tuple[int, ...]  # several where a family ends and pads with different tokens; the first one pads
    name: str = ""
    codec: Codec | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)


@dataclass(frozen=True)
class Config:
    """Settings of one decoding; the defaults are the paper's (Sec. 5.1). Raises ValueError on values that make no sense."""

    interval: int = 16  # n
    block_size: int = 16  # W, semi-autoregressive blocks
    score: str = "token_change_count"  # one of SCORES
    cross_model: bool = True  # logit scores: average over all models (Eq. 8), or the source model alone
    normalize: bool = True  # token change count: Eq. 7, or Eq. 5
    top_k: int = 1  # tokens committed a step,
    threshold: float | None = None  # or tau: all of the block above it, at least one (Sec. 5.3)
    answer_window: int | None = None  # 8 for code: read only the first 8 masked answer positions (App. A.4)
    selection: str = "lowest_tcc"  # one of SELECTIONS (Table 10)
    best_model: int = 0  # the member that selection="best_model" names

    def __post_init__(self):
        for name in ("interval", "block_size", "top_k", "answer_window"):
            value = getattr(self, name)
            if value is None and name == "answer_window":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name, choices in (("score", SCORES), ("selection", SELECTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], not {self.threshold!r}")
        if self.threshold is not None and self.top_k != 1:
            raise ValueError("threshold and top_k exclude each other: give one of them")


@dataclass
class Canvas:
    """The state of B rows: `masked` says what is still to be decoded; `tokens == mask_id` is never asked."""

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool, True only inside `reasoning` and `answer`
    reasoning: slice
    answer: slice
    attention_mask: Tensor | None = None  # (B, L) bool, False on left padding; None: no padding

    @classmethod
    def blank(
        cls,
        prompts: Sequence[Sequence[int]],
        suffix: Sequence[int],
        reasoning_length: int,
        answer_length: int,
        *,
        mask_id: int,
        pad_id: int,
        device: torch.device | str | None = None,
    ) -> Canvas:
        """Left-padded prompts, masked reasoning, the suffix in place, masked answer. ValueError on impossible lengths."""
        if len(prompts) == 0:
            raise ValueError("no prompts: give at least one")
        if reasoning_length < 0 or answer_length < 0 or reasoning_length + answer_length == 0:
            raise ValueError(f"nothing to decode: reasoning_length {reasoning_length}, answer_length {answer_length}")
        width = max(len(prompt) for prompt in prompts)
        region = [mask_id] * reasoning_length + list(suffix) + [mask_id] * answer_length
        tokens = [[pad_id] * (width - len(prompt)) + list(prompt) + region for prompt in prompts]
        reasoning = slice(width, width + reasoning_length)
        answer = slice(reasoning.stop + len(suffix), width + len(region))
        masked = torch.zeros(len(prompts), answer.stop, dtype=torch.bool, device=device)  # (B, L)
        masked[:, reasoning] = masked[:, answer] = True
        real = torch.tensor([[i >= width - len(p) for i in range(answer.stop)] for p in prompts], device=device)  # (B, L)
        padded = any(len(prompt) < width for prompt in prompts)
        return cls(torch.tensor(tokens, device=device), masked, reasoning, answer, real if padded else None)

    @property
    def complete(self) -> Tensor:
        """(B,) bool: nothing left to decode."""
        return ~self.masked.any(1)


# --- one denoising step: semi-autoregressive, low-confidence remasking, greedy (Sec. 5.1) -----------


class Reading(NamedTuple):
    """One forward of one model on one canvas, reduced to what the algorithm keeps."""

    positions: Tensor  # (B, W) int64, a window that holds the current block of each row
    open: Tensor  # (B, W) bool, its positions that may be committed
    token: Tensor  # (B, W) int64, their top-1
    probability: Tensor  # (B, W) float32, its probability
    answer_top1: Tensor  # (B, A) int64, top-1 at answer positions; the token itself where committed
    counted: Tensor  # (B, A) bool, A^(t)
    top1: Tensor  # (B,) float32, mean top-1 probability over A^(t)
    score: Tensor  # (B,) float32, the logit score that was asked for, or top1


def block_ends(canvas: Canvas, block_size: int) -> Tensor:
    """(L,) for each position the end of its block: reasoning blocks count from the start of the region, answer
    blocks start anew at the first answer position. Outside both regions the value is of no account."""
    ends = torch.zeros(canvas.tokens.shape[1], dtype=torch.int64)
    for region in (canvas.reasoning, canvas.answer):
        offset = torch.arange(region.stop - region.start)
        ends[region] = (region.start + (offset // block_size + 1) * block_size).clamp(max=region.stop)
    return ends.to(canvas.tokens.device)


def current_block(canvas: Canvas, ends: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Positions (B, W) up to the end of each row's first block with a mask, and which of them may be committed.

    Answer positions follow the reasoning in the sequence, so the first mask of a row is an answer position only
    once its reasoning is done (Sec. 4.1). Whatever the window holds before the block is committed already.
    """
    width = min(block_size, canvas.tokens.shape[1])
    end = ends[canvas.masked.int().argmax(1)][:, None]  # (B, 1)
    start = (end - width).clamp(min=0)
    positions = start + torch.arange(width, device=end.device)  # (B, W)
    return positions, canvas.masked.gather(1, positions) & (positions < end)


def steps_left(canvas: Canvas, ends: Tensor, top_k: int) -> Tensor:
    """(B,) steps to completion at `top_k` tokens a step, a step never crossing a block."""
    masks = torch.zeros(canvas.masked.shape[0], ends.numel() + 1, dtype=torch.int64, device=ends.device)
    masks = masks.scatter_add(1, ends.expand_as(canvas.tokens), canvas.masked.long())  # (B, L + 1), by block end
    return ((masks + top_k - 1) // top_k).sum(1)


def probabilities(logits: Tensor, mask_id: int) -> Tensor:
    """softmax in float32 (B, K, V). The mask token is never predicted (our decision), so decoding always ends."""
    logits = logits.clone()  # the denoiser may keep its own
    logits[..., mask_id] = NEVER
    return logits.softmax(-1, dtype=torch.float32)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """(B,) mean of values (B, A) over A^(t); -inf where A^(t) is empty."""
    mean = (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    return mean.masked_fill(~counted.any(-1), NEVER)


def read(member: Member, canvas: Canvas, ends: Tensor, config: Config, scored: bool = False) -> Reading:
    """Forward `canvas` through `member`; logits are computed at the current block and the answer positions only.

    With `scored` the reading also holds the logit score f(T; member) of Sec. 4.2 that `config.score` names.
    """
    block, open_ = current_block(canvas, ends, config.block_size)  # (B, W)
    tokens, masked = canvas.tokens[:, canvas.answer], canvas.masked[:, canvas.answer]  # (B, A)
    # Our decision: the window takes the first masked answer positions and leaves out EOS afterwards.
    window = (~masked).int().argsort(dim=1, stable=True)[:, : config.answer_window]  # (B, w), masked positions first
    positions = torch.cat([block, canvas.answer.start + window], dim=1)  # (B, K)
    state = canvas.tokens.masked_fill(canvas.masked, member.mask_id)  # (B, L)
    p = probabilities(_checked(member, member.denoise(state, positions, canvas.attention_mask), positions), member.mask_id)
    probability, token = p.max(-1)  # (B, K)

    W = block.shape[1]
    counted = masked.gather(1, window)  # (B, w)
    top1 = torch.where(counted, token[:, W:], tokens.gather(1, window))  # (B, w)
    for eos in member.eos_ids:
        counted = counted & (top1 != eos)
    mean_top1 = mean_over(probability[:, W:], counted)
    return Reading(
        block, open_, token[:, :W], probability[:, :W],
        answer_top1=tokens.scatter(1, window, top1),
        counted=torch.zeros_like(masked).scatter(1, window, counted),
        top1=mean_top1,
        score=_logit_scores(p[:, W:], counted)[config.score] if scored else mean_top1,
    )  # fmt: skip


def commit(canvas: Canvas, reading: Reading, config: Config) -> Canvas:
    """Unmask the most confident open positions: `top_k` of them, or all above `threshold` and at least one.

    Equal confidences go to the lower position; a row without masks stays as it is."""
    confidence = reading.probability.masked_fill(~reading.open, NEVER)  # (B, W)
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, W), 0 is the most confident
    chosen = rank < config.top_k
    if config.threshold is not None:
        chosen = chosen | (confidence > config.threshold)
    chosen = chosen & reading.open
    token = torch.where(chosen, reading.token, canvas.tokens.gather(1, reading.positions))
    masked = canvas.masked.gather(1, reading.positions) & ~chosen
    return replace(
        canvas,
        tokens=canvas.tokens.scatter(1, reading.positions, token),
        masked=canvas.masked.scatter(1, reading.positions, masked),
    )


# --- trajectory assessment (Sec. 4.2) ---------------------------------------------------------------


def step_changes(top1_tokens: Tensor, counted: Tensor, normalize: bool = True) -> Tensor:
    """(n - 1, B) float64: the inner sum of Eq. 5, or of Eq. 7 when normalised. Arguments as `token_change_count`.

    float64, so that equal sums of fractions compare as equal: ties are frequent, and are broken by a rule.
    """
    changed = (top1_tokens[1:] != top1_tokens[:-1]) & counted[:-1]  # (n - 1, B, A)
    changes = changed.sum(-1).double()  # (n - 1, B)
    return changes / counted[:-1].sum(-1).clamp(min=1) if normalize else changes


def token_change_count(top1_tokens: Tensor, counted: Tensor, normalize: bool = True) -> Tensor:
    """(B,) float32: how often the top-1 of an answer-relevant token changed from a step to the next. Eq. 5; Eq. 7 normalised.

    top1_tokens (n, B, A) int64, the top-1 at each answer position and step (the token itself once committed);
    counted (n, B, A) bool, A^(t). n steps give n - 1 comparisons; a step with an empty A^(t) adds nothing.
    """
    return step_changes(top1_tokens, counted, normalize).sum(0).float()


def _logit_scores(p: Tensor, counted: Tensor) -> dict[str, Tensor]:
    top2 = p.topk(2, dim=-1).values  # (B, A, 2)
    return {
        "top1_probability": mean_over(top2[..., 0], counted),
        "negative_entropy": mean_over(-torch.special.entr(p).sum(-1), counted),
        "probability_margin": mean_over(top2[..., 0] - top2[..., 1], counted),
    }


def confidence(logits: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """The three logit scores of Sec. 4.2, each (B,): mean over A^(t); higher is more reliable; -inf where A^(t) is empty.

    logits (B, A, V) at the answer positions, counted (B, A) bool. Entropy in nats.
    """
    return _logit_scores(logits.softmax(-1, dtype=torch.float32), counted)


def lead(scores: Tensor, top1: Tensor) -> Tensor:
    """(B,) m* of Eq. 9: argmax over members of scores (M, B). Our decision on ties: the higher mean top-1 probability
    of the source model, top1 (M, B), at its most recent step with a non-empty A; then the lower index."""
    best = scores == scores.amax(0)  # (M, B)
    top1 = top1.masked_fill(~best, NEVER)
    return (best & (top1 == top1.amax(0))).int().argmax(0)


# --- trajectory relay (Sec. 4.3) --------------------------------------------------------------------


@dataclass
class Run:
    """One member at work: its state T_m, and what the scores need of its own steps."""

    member: Member
    canvas: Canvas
    ends: Tensor  # (L,), of `block_ends`
    tcc: Tensor  # (B,) float64, C~ over the whole decoding: the sum of the model's own rounds
    top1: Tensor  # (B,) float32, at the model's most recent step with a non-empty A
    compared: Tensor  # (B,) bool: some comparison stands behind tcc
    forwards: Tensor  # (B,) int64
    history: list[Reading] = field(default_factory=list)  # the forwards of this round
    reading: Reading | None = None  # a forward of the current state, made already by the assessment

    @classmethod
    def start(cls, member: Member, canvas: Canvas, config: Config) -> Run:
        zero = torch.zeros(canvas.tokens.shape[0], dtype=torch.int64, device=canvas.tokens.device)  # (B,)
        ends = block_ends(canvas, config.block_size)
        return cls(member, canvas, ends, zero.double(), zero.float() + NEVER, zero.bool(), zero)

    def step(self, config: Config) -> None:
        """One denoising step of every row; a row without masks stays as it is, and its forward is not counted."""
        reading = self.reading or read(self.member, self.canvas, self.ends, config)
        self.reading = None
        self.history.append(reading)
        self.forwards = self.forwards + reading.open.any(1)
        self.canvas = commit(self.canvas, reading, config)

    def close_round(self, config: Config) -> tuple[Tensor, Tensor]:
        """The score of Eq. 6 and the tie-breaking top-1 probability of this round, each (B,). Histories start again."""
        top1 = torch.full_like(self.top1, NEVER)
        count, compared = torch.zeros_like(self.tcc), torch.zeros_like(self.compared)
        if self.history:
            if torch.stack([r.probability for r in self.history]).isnan().any():
                raise ValueError(f"{_name(self.member)} gave NaN logits: check its weights and dtype")
            for reading in self.history:
                top1 = torch.where(reading.top1 > NEVER, reading.top1, top1)
            tokens = torch.stack([r.answer_top1 for r in self.history])  # (n, B, A)
            counted = torch.stack([r.counted for r in self.history])  # (n, B, A)
            alive = torch.stack([r.open.any(1) for r in self.history])  # (n, B)
            counted[:-1] &= alive[1:, :, None]  # a row that is done is forwarded for its neighbours only
            count = step_changes(tokens, counted, config.normalize).sum(0)
            compared = counted[:-1].any(-1).any(0)
        self.history = []
        self.tcc = self.tcc + count
        self.compared = self.compared | compared
        self.top1 = torch.where(top1 > NEVER, top1, self.top1)
        return -count.float().masked_fill(~compared, -NEVER), top1


def generate(runs: list[Run], config: Config) -> None:
    """Trajectory generation (Sec. 4.1): every model decodes alone for n steps, fewer if it completes.

    With a fixed quota nothing here waits for a device, so members on different devices overlap. With a threshold
    the number of steps depends on the data: the host asks once a step which members still have masks.
    """
    left = [int(steps_left(run.canvas, run.ends, config.top_k).max()) for run in runs]
    for step in range(config.interval):
        if config.threshold is not None:
            left = [step + int(run.canvas.masked.any()) for run in runs]
        working = [run for run, steps in zip(runs, left) if step < steps]
        if not working:
            break
        for run in working:
            run.step(config)


View = tuple[Canvas, Tensor]
"""A trajectory in a receiver's vocabulary, and (B,) bool: which rows of it could be handed over."""


def view(receiver: Run, sender: Run, rows: Tensor) -> View:
    """The sender's T_m as the receiver would hold it, at least for `rows` (B,). Equal vocabularies: a plain copy of ids."""
    own, theirs = receiver.canvas, sender.canvas
    if receiver.member.codec is not sender.member.codec:
        parts = (theirs.tokens, theirs.masked, theirs.reasoning, theirs.answer, sender.member, receiver.member)
        return translate(*parts, own, rows)
    device = own.tokens.device
    copy = replace(own, tokens=theirs.tokens.to(device), masked=theirs.masked.to(device))
    return copy, torch.ones_like(own.complete)


def assess(runs: list[Run], config: Config, ended: Tensor) -> tuple[Tensor, list[list[View]], list[list[Reading]]]:
    """Trajectory assessment by a logit score (Sec. 4.2): scores (M, B), and when cross-model the views and readings
    [receiver][sender] behind them, which the relay uses again. Rows that ended (B,) are not scored."""
    seen = [[view(receiver, sender, ~ended) for sender in runs] for receiver in runs] if config.cross_model else []
    readings: list[list[Reading]] = []
    for r, run in enumerate(runs):
        canvases = [canvas for canvas, _ in seen[r]] if config.cross_model else [run.canvas]
        readings.append([read(run.member, canvas, run.ends, config, scored=True) for canvas in canvases])
        extra = len(runs) - 1 if config.cross_model else 1  # the leader's forward is the next round's first step
        run.forwards = run.forwards + extra * (~ended).to(run.forwards.device)
        if torch.stack([reading.probability for reading in readings[r]]).isnan().any():
            raise ValueError(f"{_name(run.member)} gave NaN logits: check its weights and dtype")
    home = ended.device
    if not config.cross_model:
        return torch.stack([row[0].score.to(home) for row in readings]), [], []
    fits = torch.stack([torch.stack([fit.to(home) for _, fit in row]) for row in seen])  # (M receivers, M senders, B)
    scores = torch.stack([torch.stack([reading.score.to(home) for reading in row]) for row in readings])  # likewise
    said = fits & (scores > NEVER)  # Our decision: average over the models whose A is not empty on the trajectory
    mean = scores.masked_fill(~said, 0).sum(0) / said.sum(0).clamp(min=1)  # Eq. 8
    return mean.masked_fill(~said.any(0), NEVER), seen, readings


def relay(runs: list[Run], leader: Tensor, seen: list[list[View]], readings: list[list[Reading]]) -> int:
    """Eq. 10: every model's state becomes that of the row's leader (B,), in place; -1 keeps the model's own.

    A model that the leader's text does not fit keeps its own state; returns how many (row, receiver) pairs did."""
    seen = seen or [[view(receiver, sender, leader == s) for s, sender in enumerate(runs)] for receiver in runs]
    missed = 0
    for r, (run, views) in enumerate(zip(runs, seen)):
        device = run.canvas.tokens.device
        rows = torch.arange(leader.numel(), device=device)
        source = leader.to(device).where(leader.to(device) >= 0, r)  # (B,)
        fits = torch.stack([fit.to(device) for _, fit in views])[source, rows]  # (B,)
        missed += int((~fits).sum())
        source = source.where(fits, r)
        tokens = torch.stack([canvas.tokens for canvas, _ in views])[source, rows]  # (B, L)
        masked = torch.stack([canvas.masked for canvas, _ in views])[source, rows]  # (B, L)
        run.canvas = replace(run.canvas, tokens=tokens, masked=masked)
        if readings:
            run.reading = Reading(*(torch.stack(parts)[source, rows] for parts in zip(*readings[r])))
    return missed


# --- the ensemble: rounds until any model completes, then the final response (Sec. 4.4, App. D) -------


@dataclass
class Result:
    """What `ensemble` gives. `leaders` and `scores` have one entry a relay; a row that ended earlier has leader -1."""

    candidates: list[Canvas]  # M, each in its member's vocabulary
    winner: Tensor  # (B,) int64, index of the selected candidate
    leaders: Tensor  # (rounds, B) int64
    scores: Tensor  # (rounds, M, B) float32, -inf where a trajectory (or an ended row) had none
    tcc: Tensor  # (M, B) float32, C~ over the whole decoding
    top1: Tensor  # (M, B) float32, at each model's most recent step with a non-empty A
    forwards: float  # sequences forwarded per row, all members together
    not_relayed: int  # (row, receiver) pairs that kept their own state since the leader's text did not fit


def select(config: Config, tcc: Tensor, compared: Tensor, top1: Tensor, leaders: Tensor) -> Tensor:
    """(B,) index of the final response among M candidates (App. D); tcc, compared and top1 are (M, B).

    Our decision: equal numbers of leads, or no relay at all, fall back to the lowest C~."""
    lowest = lead((-tcc).masked_fill(~compared, NEVER), top1)
    if config.selection == "best_model":
        return torch.full_like(lowest, config.best_model)
    if config.selection == "most_selected" and len(leaders):
        leads = torch.stack([(leaders == m).sum(0) for m in range(len(tcc))])  # (M, B)
        most = leads == leads.amax(0)
        return torch.where(most.sum(0) == 1, most.int().argmax(0), lowest)
    return lowest


@torch.no_grad()
def ensemble(
    members: Sequence[Member],
    canvases: Sequence[Canvas],
    config: Config = Config(),
    on_round: Callable[[dict], None] | None = None,
) -> Result:
    """TIE: decode the same questions with all members, one canvas each (on the member's own device), relaying every n steps.

    Rows are independent: each has its own leader and its own end, and decodes as it would alone. A row has no more
    relays once any member has completed it; the other members finish it alone, and all stand for selection.
    n >= T is the post-generation ensemble, M = 1 plain decoding. The canvases given are not changed.

    `on_round`, called after every stretch of n steps and before its relay, gets {"round", "step", "tokens" and
    "masked" (lists of M tensors (B, L)), "scores" (M, B), "leader" (B,), -1 where nothing is relayed}.

    Raises ValueError on settings, members or canvases that do not fit together, and on NaN logits.
    """
    _check(members, canvases, config)
    runs = [Run.start(member, canvas, config) for member, canvas in zip(members, canvases)]
    home = canvases[0].tokens.device
    # Between different vocabularies a relay can give masks back: bound the relays, so that decoding always ends.
    limit = torch.stack([canvas.masked.sum(1).to(home) for canvas in canvases]).amax(0)  # (B,)
    ended = torch.zeros_like(limit, dtype=torch.bool)  # (B,)
    leaders: list[Tensor] = []
    scores: list[Tensor] = []
    rounds = steps = not_relayed = 0
    while True:
        generate(runs, config)
        steps += max(len(run.history) for run in runs)
        own, top1 = (torch.stack([x.to(home) for x in part]) for part in zip(*(run.close_round(config) for run in runs)))
        complete = torch.stack([run.canvas.complete.to(home) for run in runs])  # (M, B)
        ended = ended | complete.any(0) | (limit <= len(leaders))
        relaying = not ended.all()  # no relay follows the last stretch
        score, seen, readings = own, [], []
        if relaying and config.score != "token_change_count":
            score, seen, readings = assess(runs, config, ended)
        score = score.masked_fill(ended, NEVER)
        leader = lead(score, top1).masked_fill(ended, -1)  # Eq. 9
        if on_round is not None:
            state = {"tokens": [run.canvas.tokens for run in runs], "masked": [run.canvas.masked for run in runs]}
            on_round({"round": rounds, "step": steps, **state, "scores": score, "leader": leader})
        if complete.all():
            break
        rounds += 1
        if relaying:
            leaders.append(leader)
            scores.append(score)
            not_relayed += relay(runs, leader, seen, readings)
    return _result(config, runs, leaders, scores, not_relayed)


def _result(config: Config, runs: list[Run], leaders: list[Tensor], scores: list[Tensor], not_relayed: int) -> Result:
    home = runs[0].canvas.tokens.device
    M, B = len(runs), len(runs[0].tcc)
    led = torch.stack(leaders) if leaders else torch.zeros(0, B, dtype=torch.int64, device=home)  # (rounds, B)
    scored = torch.stack(scores) if scores else torch.zeros(0, M, B, device=home)  # (rounds, M, B)
    tcc, top1, compared = (
        torch.stack([getattr(run, name).to(home) for run in runs]) for name in ("tcc", "top1", "compared")
    )
    winner = select(config, tcc.float(), compared, top1, led)
    forwards = sum(float(run.forwards.sum()) for run in runs) / B
    return Result([run.canvas for run in runs], winner, led, scored, tcc.float(), top1, forwards, not_relayed)


@torch.no_grad()
def decode(member: Member, canvas: Canvas, config: Config = Config()) -> Canvas:
    """Plain semi-autoregressive decoding of one member, by the block size and quota (or threshold) of `config`."""
    _check([member], [canvas], replace(config, best_model=0))
    run = Run.start(member, canvas, config)
    while run.canvas.masked.any():
        generate([run], config)
        run.close_round(config)
    return run.canvas


# --- relay between different vocabularies (ours; the paper is silent) ---------------------------------

Told = list["int | None"]  # token ids of one region of one row, None where masked


def translate(
    tokens: Tensor,
    masked: Tensor,
    reasoning: slice,
    answer: slice,
    sender: Member,
    receiver: Member,
    canvas: Canvas,
    rows: Tensor | None = None,
) -> View:
    """The sender's state in the receiver's vocabulary: text with holes, told again by the receiver's tokenizer.

    tokens and masked (B, L) and the two regions are the sender's; `canvas` is the receiver's own, whose prompt,
    suffix and region lengths stay. Committed text is kept exactly, masked positions keep their number and place
    between its runs, EOS becomes EOS. The end of a region stretches or shrinks to the receiver's length: by masks
    where the sender's region ends in masks, by EOS where it is complete. Returns the canvas and (B,) bool: rows
    whose text does not fit (or that `rows` (B,) leaves out) keep the receiver's state.
    """
    new, open_ = canvas.tokens.cpu().clone(), canvas.masked.cpu().clone()  # (B, L)
    fits = torch.ones(len(new), dtype=torch.bool) if rows is None else rows.cpu().clone()  # (B,)
    for b in fits.nonzero().flatten().tolist():
        state = [None if hole else token for token, hole in zip(tokens[b].tolist(), masked[b].tolist())]
        for theirs, ours in ((reasoning, canvas.reasoning), (answer, canvas.answer)):
            told = retell(state[theirs], sender, receiver, ours.stop - ours.start)
            if told is None:
                fits[b], new[b], open_[b] = False, canvas.tokens[b].cpu(), canvas.masked[b].cpu()
                break
            new[b, ours] = torch.tensor([receiver.mask_id if i is None else i for i in told])
            open_[b, ours] = torch.tensor([i is None for i in told])
    device = canvas.tokens.device
    return replace(canvas, tokens=new.to(device), masked=open_.to(device)), fits.to(device)


def retell(ids: Told, sender: Member, receiver: Member, length: int) -> Told | None:
    """One region of one row in the receiver's vocabulary, `length` positions; None if its text does not fit."""
    kinds = ["mask" if i is None else "eos" if i in sender.eos_ids else "text" for i in ids]
    end = receiver.eos_ids[0] if ids and ids[-1] is not None else None  # what fills the rest
    told: Told = []
    for kind, run in _runs(ids, kinds):
        if kind == "text":
            for text in _texts(run, sender.codec):
                told += [None] if text is None else receiver.codec.encode(text)
        else:
            told += [None if kind == "mask" else receiver.eos_ids[0]] * len(run)
    while told and told[-1] == end:
        told.pop()
    return told + [end] * (length - len(told)) if len(told) <= length else None


def _runs(items: list, kinds: list) -> list[tuple]:
    """Maximal runs of equal kind, [(kind, items)], in order."""
    starts = [i for i in range(len(items)) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(kinds[i], items[i:j]) for i, j in zip(starts, [*starts[1:], len(items)])]


def _texts(ids: list[int], codec: Codec) -> list[str | None]:
    """The text of committed tokens, with None for each token that holds a byte of a broken character."""
    try:
        return [codec.decode(ids).decode()]
    except UnicodeDecodeError:
        pieces = [codec.decode([i]) for i in ids]
    broken = _broken_bytes(b"".join(pieces))
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    holes = [any(j in broken for j in range(end - len(piece), end)) for end, piece in zip(ends, pieces)]
    texts: list[str | None] = []
    for hole, run in _runs(ids, holes):  # without its holes a run is shorter, but may have lost half a character
        texts += [None] * len(run) if hole else _texts(run, codec)
    return texts


def _broken_bytes(data: bytes) -> set[int]:
    """Offsets of the bytes that belong to no valid UTF-8 character."""
    broken: set[int] = set()
    start = 0
    while True:
        try:
            data[start:].decode()
            return broken
        except UnicodeDecodeError as error:
            broken |= set(range(start + error.start, start + error.end))
            start += error.end


# --- checks -------------------------------------------------------------------------------------------


def _name(member: Member) -> str:
    return f"member {member.name!r}" if member.name else "a member"


def _checked(member: Member, logits: Tensor, positions: Tensor) -> Tensor:
    """The logits, if they have the shape that the interface promises and a place for the mask id."""
    if logits.dim() != 3 or logits.shape[:2] != positions.shape or not logits.is_floating_point():
        raise ValueError(
            f"{_name(member)} must give float logits {(*positions.shape, 'V')}, not {logits.dtype} {tuple(logits.shape)}"
        )
    if not 0 <= member.mask_id < logits.shape[2]:
        raise ValueError(f"{_name(member)}: mask_id {member.mask_id} lies outside its vocabulary of {logits.shape[2]}")
    return logits


def _check(members: Sequence[Member], canvases: Sequence[Canvas], config: Config) -> None:
    """ValueError, before any forward, on members and canvases that do not fit together."""
    if len(members) == 0:
        raise ValueError("no members: give at least one")
    if len(canvases) != len(members):
        raise ValueError(f"{len(members)} members but {len(canvases)} canvases: give one canvas a member")
    if not 0 <= config.best_model < len(members):
        raise ValueError(f"best_model {config.best_model} names no member: there are {len(members)}")
    for member, canvas in zip(members, canvases):
        _check_canvas(member, canvas)
        if len(canvas.tokens) != len(canvases[0].tokens):
            raise ValueError(
                f"{_name(member)} has a canvas of {len(canvas.tokens)} rows, "
                f"{_name(members[0])} of {len(canvases[0].tokens)}: give the same questions to all"
            )
        for other, theirs in zip(members, canvases):
            if (member.codec is None) != (other.codec is None):
                raise ValueError(f"{_name(member)} and {_name(other)}: give a codec to all members or to none")
            same = (canvas.reasoning, canvas.answer, canvas.tokens.shape) == (
                theirs.reasoning, theirs.answer, theirs.tokens.shape,
            )  # fmt: skip
            if member.codec is other.codec and not same:
                raise ValueError(f"{_name(member)} and {_name(other)} share a vocabulary, so their canvases need one layout")


def _check_canvas(member: Member, canvas: Canvas) -> None:
    shape = canvas.tokens.shape
    if len(shape) != 2 or shape[0] == 0 or canvas.tokens.dtype != torch.int64:
        raise ValueError(f"{_name(member)}: canvas tokens must be int64 (B, L), not {canvas.tokens.dtype} {tuple(shape)}")
    for name, mask in (("masked", canvas.masked), ("attention_mask", canvas.attention_mask)):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"{_name(member)}: canvas {name} must be bool {tuple(shape)}, as its tokens")
    bounds = [canvas.reasoning.start, canvas.reasoning.stop, canvas.answer.start, canvas.answer.stop]
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[3] > shape[1]:
        raise ValueError(f"{_name(member)}: reasoning and answer must follow each other within the {shape[1]} positions")
    outside = canvas.masked.clone()
    outside[:, canvas.reasoning] = outside[:, canvas.answer] = False
    if outside.any():
        raise ValueError(f"{_name(member)}: the canvas has masks outside reasoning and answer")
