"""TIE, Trajectory-based Iterative Ensembling of masked diffusion language models (arXiv:2606.16281), in one file.

Several models decode the same question side by side. Every n steps each model's partly denoised sequence is scored
by how stable and confident its answer tokens are; the best one is relayed to all models, and they go on from there.

Glossary: name here -> symbol, equation or section of the paper
    members, M             constituent models, m = 1..M
    Run, Reading           one model at work on its T_m; what is kept of one of its forwards
    interval, n            ensemble interval: steps that every model decodes alone between two relays (Sec. 4.1)
    step, t; T             one denoising step; their number over a whole decoding by one model
    Canvas                 T_m, a trajectory: the partly denoised sequence prompt | reasoning | suffix | answer
    relevant               A_m^(t), the answer-relevant positions of model m at step t (App. A.4)
    commit                 low-confidence remasking (Sec. 5.1); top_k and threshold: acceleration (Sec. 5.3)
    token_change_count     C(n), Eq. 5; normalised C~(n), Eq. 7; Run.score_round: its negative, Eq. 6
    LOGIT_SCORES           f(T_m; m'), the three scores read from the logits of one model m' (Sec. 4.2)
    assess                 the mean of f(T_m; m') over the models m', Eq. 8; cross_model off: m' = m (Table 9)
    lead, leader           m*, the argmax of the scores, Eq. 9
    relay                  every model's state becomes T_{m*}, Eq. 10
    select                 the final response (Sec. 4.4, App. D, Table 10)
    translate              relay between different vocabularies, ours

"Our decision" marks what the paper leaves open and we had to settle.
Shapes: B rows (questions), L positions, W of the block, A of the answer (the set A^(t) is of these), w of these in the
answer window, K = W + w that are read, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(tokens (B, L) int64, positions (B, K) int64, attention_mask (B, L) bool or None) -> logits (B, K, V), unshifted:
logits[b, k] is the distribution of the token AT positions[b, k]. Any float dtype, on the device of the tokens."""

UNSCORED = float("-inf")  # score of a trajectory without answer-relevant tokens, below all others (our decision)
SCORES = ("token_change_count", "top1_probability", "negative_entropy", "probability_margin")
SELECTIONS = ("lowest_tcc", "best_model", "most_selected")


def _require(good: Any, message: str) -> None:
    if not good:
        raise ValueError(message)


# --- members, settings, the sequence (Sec. 4.1, 5.1, App. A.4) ------------------------------------------


class Codec(Protocol):
    """A vocabulary. `encode` adds nothing (no [CLS], no EOS) and loses nothing (no [UNK], no lower case, no stripped
    blank); `decode` gives the tokens' raw bytes, joined, since one token may hold part of a character."""

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
    """Settings of one decoding; the defaults are the paper's for mathematics. At most one of `top_k`, `threshold` and
    `commit` says which tokens a step commits. ValueError on values that make no sense."""

    interval: int = 16  # n; the paper takes 32 with token change count elsewhere; at n = 1 that compares nothing
    block_size: int = 16  # W, of semi-autoregressive decoding
    score: str = "token_change_count"  # one of SCORES
    cross_model: bool = True  # logit scores: mean over all models (Eq. 8), or the source model alone
    normalize: bool = True  # token change count by Eq. 7, or else Eq. 5; so in the final selection too (our decision)
    top_k: int = 1  # tokens committed a step,
    threshold: float | None = None  # or tau: every token of the block above it (Sec. 5.3),
    commit: CommitRule | None = None  # or a rule of the caller's own, called once a step of each member
    answer_window: int | None = None  # 8 for code: read only the first 8 masked answer positions
    selection: str = "lowest_tcc"  # one of SELECTIONS
    best_model: int = 0  # the member that selection "best_model" names

    def __post_init__(self):
        for name in ("interval", "block_size", "top_k", "answer_window"):
            value = getattr(self, name)
            good = (type(value) is int and 0 < value < 2**31) or (name == "answer_window" and value is None)
            _require(good, f"{name} must be a whole number of at least 1, below 2**31, not {value!r}")
        for name, choices in (("score", SCORES), ("selection", SELECTIONS)):
            value = getattr(self, name)
            good = type(value) is str and value in choices
            _require(good, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("cross_model", "normalize"):
            value = getattr(self, name)
            _require(type(value) is bool, f"{name} must be one of True, False, not {value!r}")
        tau = self.threshold
        good = tau is None or (type(tau) in (int, float) and 0 < tau <= 1)
        _require(good, f"threshold must be a number in (0, 1], not {tau!r}")
        good = self.commit is None or callable(self.commit)
        _require(good, f"commit must be a function of a Reading, not {self.commit!r}")
        given = (self.top_k != 1) + (tau is not None) + (self.commit is not None)
        _require(given <= 1, "top_k, threshold and commit exclude each other: give one of them")

    @property
    def rule(self) -> CommitRule | None:
        """What a step commits beside the most confident token; None: nothing. Threshold and top-k are of Sec. 5.3."""
        if (tau := self.threshold) is not None:
            return lambda reading: reading.confidence > tau
        if self.top_k > 1:  # equal confidences go to the lower position (our decision)
            return lambda reading: reading.confidence.argsort(descending=True, stable=True).argsort() < self.top_k
        return self.commit


@dataclass
class Canvas:
    """The state of B rows. `masked` says what is still to be decoded; `tokens == mask_id` is never asked."""

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool, True only inside `reasoning` and `answer`
    reasoning: slice
    answer: slice
    attention_mask: Tensor | None = None  # (B, L) bool, False on padding; None: there is none

    @classmethod
    def blank(
        cls, prompts: Sequence[Sequence[int]], suffix: Sequence[int], reasoning_length: int, answer_length: int,
        *, mask_id: int, pad_id: int, device: torch.device | str | None = None,
    ) -> Canvas:  # fmt: skip
        """Left-padded prompts, masked reasoning, suffix, masked answer. ValueError where there is nothing to decode."""
        good = len(prompts) > 0 and not any(isinstance(prompt, int) for prompt in prompts)
        _require(good, "prompts must be a list of at least one prompt, each a list of ids")
        lengths = (reasoning_length, answer_length)
        _require(min(lengths) >= 0 and any(lengths), f"nothing to decode: reasoning and answer have lengths {lengths}")
        width = max(map(len, prompts))
        region = [mask_id] * reasoning_length + list(suffix) + [mask_id] * answer_length
        pads = [width - len(prompt) for prompt in prompts]
        rows = [[pad_id] * pad + list(prompt) + region for pad, prompt in zip(pads, prompts)]
        tokens = torch.tensor(rows, dtype=torch.int64, device=device)  # (B, L)
        reasoning = slice(width, width + reasoning_length)
        answer = slice(reasoning.stop + len(suffix), tokens.shape[1])
        masked = torch.zeros_like(tokens, dtype=torch.bool)  # (B, L)
        masked[:, reasoning] = masked[:, answer] = True
        real = [[False] * pad + [True] * (tokens.shape[1] - pad) for pad in pads]
        return cls(tokens, masked, reasoning, answer, torch.tensor(real, device=device) if any(pads) else None)

    @property
    def complete(self) -> Tensor:
        return ~self.masked.any(1)  # (B,) bool, nothing is left to decode


@dataclass
class Result:
    """What `ensemble` gives. `leaders` and `scores` have one entry a relay; a row that ended earlier has leader -1.
    An ensemble of one reads no answer tokens and relays nothing: its tcc is nan, its top1 -inf."""

    candidates: list[Canvas]  # M, each in its member's vocabulary
    winner: Tensor  # (B,) int64, index of the selected candidate
    leaders: Tensor  # (relays, B) int64
    scores: Tensor  # (relays, M, B) float32, -inf without answer-relevant tokens, or where the row had ended
    tcc: Tensor  # (M, B) float32, C~ over the whole decoding; C without `normalize`
    top1: Tensor  # (M, B) float32, mean top-1 probability at each model's most recent step with a non-empty A
    forwards: float  # sequences forwarded per row by all members: M * T and the assessments', in one vocabulary
    not_relayed: int  # (row, receiver) pairs that kept their own state, since the leader's text did not fit


# --- the algorithm: rounds until a model completes, then the final response (Sec. 4) ---------------------


@torch.no_grad()
def ensemble(
    members: Iterable[Member], canvases: Iterable[Canvas], config: Config = Config(),
    on_round: Callable[[dict], None] | None = None,
) -> Result:  # fmt: skip
    """TIE: decode the same questions with all members, one canvas each on its member's device, relaying every n steps.

    Rows are independent: each has its own leader and its own end, and decodes as it would alone. Once any member has
    completed a row, or it has taken twice the steps that the slowest member needs alone, it is relayed no more: the
    others finish it, and all M stand for selection. n >= T: post-generation ensemble (Table 3). M = 1: plain decoding.

    `on_round` is called at the end of every round, before its relay, with copies: {"round", "step", "tokens" and
    "masked" (lists of M (B, L)), "scores" (M, B), "leader" (B,), -1 where nothing is relayed, as after the last round}.

    ValueError on what does not fit together, on NaN among the logits used, and on a codec that loses text.
    """
    members, canvases = list(members), list(canvases)
    _check(members, canvases, config)
    runs = [Run(m, *pair, config, alone=len(members) == 1) for m, pair in enumerate(zip(members, canvases))]
    device = canvases[0].tokens.device
    # A relay between vocabularies can give masks back, for ever without this limit (our decision).
    limit = 2 * stack_on(device, [steps_left(run.canvas, run.block_ends, config.top_k) for run in runs]).amax(0)
    ended = torch.full_like(limit, len(runs) == 1, dtype=torch.bool)  # (B,) no more relays, as at `limit` (B,) steps
    leaders, all_scores = limit.new_zeros(0, len(limit)), limit.new_zeros(0, len(runs), len(limit)).float()
    step = not_relayed = 0
    while not all(run.canvas.complete.all() for run in runs):
        step += generate(runs)  # Sec. 4.1
        scores, top1 = (stack_on(device, part) for part in zip(*[run.score_round() for run in runs]))  # (M, B), Eq. 6
        ended = ended | stack_on(device, [run.canvas.complete for run in runs]).any(0) | (limit <= step)
        received = [] if ended.all() else [[receive(run, sender) for sender in runs] for run in runs]
        readings: list[list[Reading]] = []
        if received and config.score in LOGIT_SCORES:
            scores, readings = assess(runs, received, ended)  # Sec. 4.2, Eq. 8
        leader = lead(scores, top1).masked_fill(ended, -1)  # Sec. 4.3, Eq. 9
        scores = scores.masked_fill(ended, UNSCORED)
        if on_round is not None:
            tokens, masked = ([getattr(run.canvas, x).clone() for run in runs] for x in ("tokens", "masked"))
            state = {"round": (step - 1) // config.interval, "step": step, "tokens": tokens, "masked": masked}
            on_round({**state, "scores": scores.clone(), "leader": leader.clone()})
        if received:
            leaders, all_scores = torch.cat([leaders, leader[None]]), torch.cat([all_scores, scores[None]])
            not_relayed += relay(runs, received, readings, leader)  # Eq. 10
    return respond(runs, leaders, all_scores, not_relayed)  # Sec. 4.4


def decode(member: Member, canvas: Canvas, config: Config = Config()) -> Canvas:
    """Plain semi-autoregressive decoding by one member, with the block size and the commit rule of `config`."""
    # best_model may name another member of the ensemble that this config is for.
    config = replace(config, best_model=0) if isinstance(config, Config) else config
    return ensemble([member], [canvas], config).candidates[0]


# --- trajectory generation (Sec. 4.1): blocks, low-confidence remasking, greedy (Sec. 5.1) ----------------


class Reading(NamedTuple):
    """One forward of one model on one canvas, reduced to what the algorithm keeps, and what a commit rule is given."""

    member: int  # index of the model, for rules that remember earlier steps
    mask_id: int
    positions: Tensor  # (B, W) int64, a window that holds the current block of each row
    masked: Tensor  # (B, W) bool, the masked positions of the block: only these may be committed
    token: Tensor  # (B, W) int64, their top-1
    confidence: Tensor  # (B, W) float32, its probability; -1 where nothing may be committed
    logits: Tensor  # (B, W, V) for a commit rule of the caller's own, while it is asked; (B, W, 0) otherwise
    answer_token: Tensor  # (B, A) int64, top-1 at the answer positions, or the token itself once committed
    relevant: Tensor  # (B, A) bool, A^(t)
    top1: Tensor  # (B,) float32, mean top-1 probability over A^(t)
    score: Tensor  # (B,) float32, the logit score of `config.score`; top1 where none was asked for
    nan: Tensor  # (B,) bool, NaN at a position that may be committed or belongs to the answer window

    @property
    def entropy(self) -> Tensor:  # (B, W) float32, of the whole distribution at each position, in nats
        return entropy(self.logits)

    @property
    def margin(self) -> Tensor:  # (B, W) float32, the best token's probability less that of the second best
        return margin(self.logits, self.mask_id)


CommitRule = Callable[[Reading], Tensor]
"""A step's reading -> (B, W) bool, which of its masked positions to commit, beside the most confident of each row."""
Received = tuple[Canvas, Tensor]  # a sender's state as the receiver would hold it; fits (B,): False where it cannot


class Run:
    """One member at work on its own trajectory, with the history that its scores are read from."""

    def __init__(self, index: int, member: Member, canvas: Canvas, config: Config, alone: bool = False):
        self.index, self.member, self.config = index, member, config
        self.canvas = replace(canvas, tokens=canvas.tokens.clone(), masked=canvas.masked.clone())
        self.block_ends = block_ends(canvas, config.block_size)  # (L,)
        self.window = 0 if alone else config.answer_window  # an ensemble of one has no use for scores
        zero = torch.zeros_like(canvas.tokens[:, 0])  # (B,)
        self.history: list[Reading] = []  # this round's, after the last of the one before; a relay empties that one's A
        self.next: Reading | None = None  # the next step's forward, where the assessment has made it
        # C~ over the whole decoding, of the model's own steps, not of the relayed sequence; whether any was compared
        self.tcc, self.compared = zero.double() + (torch.nan if alone else 0), zero.bool()  # (B,)
        self.top1 = zero.float() + UNSCORED  # (B,) mean top-1 probability at the most recent step with a non-empty A
        self.forwards = zero  # (B,)
        self.vocab_size = 0  # V, once the member has given logits

    def step(self) -> None:
        """One denoising step. A row without masks is forwarded for its neighbours' sake only, and not counted."""
        reading = self.next
        if reading is None:
            reading = self.read(self.canvas)
            self.forwards = self.forwards + reading.masked.any(1)
        self.canvas, self.next = commit(self.canvas, reading, self.config), None
        self.history.append(reading._replace(logits=reading.logits[:, :, :0].clone()))  # a view would keep all logits

    def read(self, canvas: Canvas, scored: bool = False) -> Reading:
        """Forward `canvas` through the member, with logits at the current block and the answer window only; `scored`:
        with f(T; member), the logit score that the config names. The model gets copies, to write into as it likes."""
        block, masked = current_block(canvas, self.block_ends, self.config.block_size)  # (B, W)
        answer, undecided = canvas.tokens[:, canvas.answer], canvas.masked[:, canvas.answer]  # (B, A)
        # Our decision: the window takes the first masked answer positions, and EOS is left out afterwards.
        window = (~undecided).int().argsort(dim=1, stable=True)[:, : self.window]  # (B, w), masked positions first
        positions = torch.cat([block, canvas.answer.start + window], 1)  # (B, K)
        state = canvas.tokens.masked_fill(canvas.masked, self.member.mask_id)  # (B, L)
        attention_mask = None if canvas.attention_mask is None else canvas.attention_mask.clone()
        logits = self.member.denoise(state, positions, attention_mask)  # (B, K, V)
        _check_logits(self.member, logits, (*block.shape[:1], positions.shape[1]), block.device)
        self.vocab_size, W, mask_id = logits.shape[2], block.shape[1], self.member.mask_id
        probability, token = predict(logits, mask_id)  # (B, K)
        relevant = undecided.gather(1, window)  # (B, w)
        nan = (probability.isnan() & torch.cat([masked, relevant], 1)).any(1)  # (B,)
        answer_token = torch.where(relevant, token[:, W:], answer.gather(1, window))  # (B, w)
        for eos in self.member.eos_ids:
            relevant = relevant & (answer_token != eos)
        top1 = score = mean_over(probability[:, W:], relevant)  # (B,)
        if scored:
            value = LOGIT_SCORES[self.config.score](probability[:, W:], logits[:, W:], mask_id)  # (B, w)
            score = mean_over(value, relevant)
        return Reading(
            member=self.index, mask_id=mask_id,
            positions=block, masked=masked, token=token[:, :W], confidence=probability[:, :W].masked_fill(~masked, -1),
            # Never a view: some models write the next logits into the same memory, and it would keep all of these.
            logits=logits[:, :W, : logits.shape[2] if self.config.commit else 0].clone(),
            answer_token=answer.scatter(1, window, answer_token),
            relevant=torch.zeros_like(undecided).scatter(1, window, relevant),
            top1=top1, score=score, nan=nan,
        )  # fmt: skip

    def check_nan(self, readings: list[Reading]) -> None:
        nan = torch.stack([reading.nan for reading in readings]).any()
        _require(not nan, f"{self.member} gave NaN logits: check its weights and its dtype")

    def score_round(self) -> tuple[Tensor, Tensor]:
        """-C(n) or -C~(n), Eq. 6, and what breaks ties: the top-1 probability of the round's most recent step with a
        non-empty A. Both (B,); the counts over the whole decoding go on."""
        if not self.history:
            return torch.full_like(self.top1, UNSCORED), torch.full_like(self.top1, UNSCORED)
        self.check_nan(self.history)
        tokens = torch.stack([reading.answer_token for reading in self.history])  # (n, B, A)
        relevant = torch.stack([reading.relevant for reading in self.history])  # (n, B, A)
        at_work = torch.stack([reading.masked.any(1) for reading in self.history])  # (n, B)
        relevant[:-1] &= at_work[1:, :, None]  # a comparison takes two forwards of the row itself
        count, compared = token_change_count(tokens, relevant, self.config.normalize), relevant[:-1].any(-1).any(0)
        top1 = torch.full_like(self.top1, UNSCORED)
        for reading in self.history:
            top1 = torch.where(reading.top1 > UNSCORED, reading.top1, top1)
        self.tcc, self.compared = self.tcc + count, self.compared | compared
        self.top1 = torch.where(top1 > UNSCORED, top1, self.top1)
        self.history = [self.history[-1]._replace(top1=torch.full_like(top1, UNSCORED))]
        return (-count.float()).masked_fill(~compared, UNSCORED), top1


def generate(runs: list[Run]) -> int:
    """Trajectory generation (Sec. 4.1): every model decodes alone for n steps, or to its end. Returns the steps made.
    With top_k the loop never waits for a device, so members on different devices overlap. Otherwise the number of steps
    depends on the data: each member is asked once a step whether it still has masks."""
    config = runs[0].config
    left = [int(steps_left(run.canvas, run.block_ends, config.top_k).max()) for run in runs]
    ask = config.threshold is not None or config.commit is not None  # then `left` is only the most that can be left
    for step in range(config.interval):
        stepped = False
        for run, most in zip(runs, left):
            if step < most and (not ask or run.canvas.masked.any()):  # asked one by one, so no model waits for another
                run.step()
                stepped = True
        if not stepped:
            return step
    return config.interval


def predict(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Top-1 probability (B, K) float32 and token (B, K) int64 of logits (B, K, V). Our decisions: the mask token is
    never predicted, so that decoding always ends; the probability is that of the whole softmax, mask included, as in
    LLaDA's own sampler."""
    probability, token, spans = [], [], ((0, mask_id), (mask_id + 1, logits.shape[-1]))
    for part in in_parts(logits):
        best = [part[:, i:j].argmax(-1, keepdim=True) + i for i, j in spans if i < j]  # (b, 1), no copy of logits
        higher = part.gather(1, best[-1]) > part.gather(1, best[0])  # by logits: probabilities may round to equal ones
        token.append(torch.where(higher, best[-1], best[0]))
        probability.append(part.softmax(-1, dtype=torch.float32).gather(1, token[-1]))
    return torch.cat(probability).view(logits.shape[:2]), torch.cat(token).view(logits.shape[:2])


def in_parts(logits: Tensor) -> Sequence[Tensor]:
    """Logits (B, K, V) a few positions at a time, (b, V). Small parts stay in a processor's cache, which halves the
    time; larger ones keep an accelerator's launches few, and still spare it a copy of all logits in float32."""
    at_once = 2**20 if logits.device.type == "cpu" else 2**24  # logits
    return logits.flatten(0, 1).split(max(1, at_once // logits.shape[-1]))


def commit(canvas: Canvas, reading: Reading, config: Config) -> Canvas:
    """Low-confidence remasking: unmask the most confident position of each row, and those that the rule adds. So every
    step commits a token whatever the rule says, and none outside the masked positions of the block."""
    first = reading.confidence.argmax(1, keepdim=True)  # (B, 1), of equal confidences the lower position
    chosen = torch.zeros_like(reading.masked).scatter(1, first, True)  # (B, W)
    if config.rule is not None:
        added, wanted = config.rule(reading), (tuple(chosen.shape), torch.bool)
        given = (tuple(added.shape), added.dtype) if isinstance(added, Tensor) else type(added).__name__
        _require(given == wanted, f"commit must give {wanted}, not {given}")
        chosen = chosen | added.to(chosen.device)
    chosen = chosen & reading.masked
    token = torch.where(chosen, reading.token, canvas.tokens.gather(1, reading.positions))
    masked = canvas.masked.gather(1, reading.positions) & ~chosen
    tokens = canvas.tokens.scatter(1, reading.positions, token)  # (B, L)
    return replace(canvas, tokens=tokens, masked=canvas.masked.scatter(1, reading.positions, masked))


def block_ends(canvas: Canvas, block_size: int) -> Tensor:
    """(L,) the end of each position's block; reasoning and answer blocks each count from the start of their region."""
    ends = torch.zeros_like(canvas.tokens[0])
    for region in (canvas.reasoning, canvas.answer):
        offset = torch.arange(region.stop - region.start, device=ends.device)
        ends[region] = (region.start + (offset // block_size + 1) * block_size).clamp(max=region.stop)
    return ends


def current_block(canvas: Canvas, ends: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """W positions (B, W) that hold each row's first block with a mask, so reasoning before the answer (Sec. 4.1), and
    which of them are its masks. The positions end where the block ends, or are the first W of the row."""
    end = ends[canvas.masked.int().argmax(1)][:, None]  # (B, 1)
    width = min(block_size, canvas.tokens.shape[1])
    positions = (end - width).clamp(min=0) + torch.arange(width, device=end.device)  # (B, W)
    return positions, canvas.masked.gather(1, positions) & (positions < end)


def steps_left(canvas: Canvas, ends: Tensor, top_k: int) -> Tensor:
    """(B,) steps until each row is complete, at `top_k` tokens a step; no step crosses a block."""
    masks = torch.zeros(len(canvas.tokens), len(ends) + 1, dtype=torch.int64, device=ends.device)
    masks = masks.scatter_add(1, ends.expand_as(canvas.tokens), canvas.masked.long())  # (B, L + 1), by block end
    return ((masks + top_k - 1) // top_k).sum(1)


# --- trajectory assessment: the four scores (Sec. 4.2) ----------------------------------------------------


def token_change_count(top1_tokens: Tensor, relevant: Tensor, normalize: bool = True) -> Tensor:
    """(B,) float64: how often the top-1 of an answer-relevant token changed between two steps. Eq. 5, or Eq. 7.

    top1_tokens (n, B, A) int64: top-1 at each step, or the token itself once committed, which is no change;
    relevant (n, B, A) bool: A^(t). n steps give n - 1 comparisons; a step with an empty A^(t) adds nothing. Summed in
    float64 and compared in float32, so that equal sums of fractions tie; ties are frequent and have their own rule."""
    changes = ((top1_tokens[1:] != top1_tokens[:-1]) & relevant[:-1]).sum(-1).double()  # (n - 1, B)
    return (changes / relevant[:-1].sum(-1).clamp(min=1) if normalize else changes).sum(0)


def entropy(logits: Tensor) -> Tensor:
    """(B, K) float32, in nats, of logits (B, K, V)."""
    values = [torch.special.entr(part.softmax(-1, dtype=torch.float32)).sum(-1) for part in in_parts(logits)]  # (b,)
    return torch.cat(values).view(logits.shape[:2])


def margin(logits: Tensor, mask_id: int) -> Tensor:
    """(B, K) float32, the probability of the best token less that of the second best, the mask token left out."""
    values = []
    for part in in_parts(logits):
        p = part.softmax(-1, dtype=torch.float32)
        p[:, mask_id] = 0
        first, second = p.topk(2).values.unbind(-1)  # (b,)
        values.append(first - second)
    return torch.cat(values).view(logits.shape[:2])


# (top-1 probability (B, K), logits (B, K, V), mask_id) -> f at each position (B, K); higher is surer
LOGIT_SCORES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "top1_probability": lambda probability, logits, mask_id: probability,
    "negative_entropy": lambda probability, logits, mask_id: -entropy(logits),
    "probability_margin": lambda probability, logits, mask_id: margin(logits, mask_id),
}


def mean_over(values: Tensor, where: Tensor, dim: int = -1) -> Tensor:
    """Mean of the values where `where` is True; UNSCORED where that is nowhere."""
    mean = values.masked_fill(~where, 0).sum(dim) / where.sum(dim)  # 0 / 0 where that is nowhere
    return mean.masked_fill(~where.any(dim), UNSCORED)


def assess(runs: list[Run], received: list[list[Received]], ended: Tensor) -> tuple[Tensor, list[list[Reading]]]:
    """Scores (M, B) of all trajectories by a logit score, Eq. 8, and readings[r][m], by model r of m's state.
    A round costs M * (M - 1) extra forwards: those of the leader's state are every model's first of the next round.
    Without cross_model it costs M, of which none is used again."""
    f, readings, cross_model = [], [], runs[0].config.cross_model
    for r, run in enumerate(runs):
        states = received[r] if cross_model else received[r][r : r + 1]
        readings.append([run.read(canvas, scored=True) for canvas, _ in states])
        scores = [reading.score.masked_fill(~fits, UNSCORED) for reading, (_, fits) in zip(readings[r], states)]
        f.append(torch.stack(scores))  # (M trajectories m, B), f(T_m; m')
        own = (~run.canvas.complete & cross_model).long()  # (B,) what a row that has ended needs: its own next step
        run.forwards = run.forwards + torch.where(ended.to(own.device), own, len(states))
    for run, theirs in zip(runs, readings):  # after all forwards, which members on different devices make at once
        run.check_nan(theirs)
    cross = stack_on(ended.device, f)  # (M models m', M trajectories m, B)
    if not cross_model:
        cross, readings = cross.transpose(0, 1), []  # (1, M, B), of each trajectory the source model alone
    return mean_over(cross, cross > UNSCORED, dim=0), readings  # our decision: over the models whose A is not empty


# --- trajectory relay (Sec. 4.3) and final response (Sec. 4.4, App. D) ------------------------------------


def lead(scores: Tensor, top1: Tensor) -> Tensor:
    """(B,) m* = argmax over members of scores (M, B), Eq. 9. Ties (our decision): the higher mean top-1 probability
    of the source model, top1 (M, B), at its most recent step with a non-empty A; then the lower index."""
    best = scores == scores.amax(0)  # (M, B)
    top1 = top1.masked_fill(~best, UNSCORED)
    return (best & (top1 == top1.amax(0))).int().argmax(0)


def receive(receiver: Run, sender: Run) -> Received:
    """The sender's state in the receiver's vocabulary. Where it does not fit, the receiver keeps its own."""
    own, sent = receiver.canvas, sender.canvas
    if sender.member.codec is not receiver.member.codec:
        return translate(sent, sender.member, own, receiver.member, receiver.vocab_size)
    names, sizes = f"{receiver.member} and {sender.member}", (receiver.vocab_size, sender.vocab_size)
    alike = sizes[0] == sizes[1]
    _require(alike, f"{names} give logits over {sizes[0]} and {sizes[1]} tokens: give each a codec of its own")
    tokens = own.tokens.clone()
    for region in (own.reasoning, own.answer):  # prompt and suffix stay the receiver's
        tokens[:, region] = sent.tokens[:, region].to(tokens.device)
    masked = sent.masked.to(tokens.device)
    return replace(own, tokens=tokens, masked=masked), torch.ones_like(masked[:, 0])


def relay(runs: list[Run], received: list[list[Received]], readings: list[list[Reading]], leader: Tensor) -> int:
    """Eq. 10: each model's state becomes that of the row's leader (B,), with its reading of it, if there is one; where
    the leader is -1 it stays. Returns the number of (row, receiver) pairs that kept their own, for want of room."""
    not_relayed = 0
    for r, run in enumerate(runs):
        source = torch.where(leader < 0, r, leader).to(run.forwards.device)  # (B,)
        states = [(canvas.tokens, canvas.masked, fits) for canvas, fits in received[r]]
        tokens, masked, fits = row_by_row(states, source)
        run.canvas = replace(run.canvas, tokens=tokens, masked=masked)
        if readings:
            rows = row_by_row([reading[2:] for reading in readings[r]], source)  # member and mask_id have no rows
            run.next = Reading(r, run.member.mask_id, *rows)
        kept = (leader < 0).to(source.device)[:, None]  # (B, 1), a relay ends the history
        run.history = [last._replace(relevant=last.relevant & kept) for last in run.history]
        not_relayed += int((~fits).sum())
    return not_relayed


def row_by_row(parts: Sequence[tuple[Tensor, ...]], source: Tensor) -> list[Tensor]:
    """Of tensors (B, ...) in M versions, each row in the version that source (B,) names."""
    rows = torch.arange(len(source), device=source.device)  # (B,)
    return [torch.stack(versions)[source, rows] for versions in zip(*parts)]


def select(config: Config, stability: Tensor, top1: Tensor, leaders: Tensor) -> Tensor:
    """(B,) index of the final response: lowest C~, by stability = -C~ (M, B) and ties as `lead`; or as in Table 10.
    most_selected with equal numbers of leads, or no relay at all, falls back to the lowest C~ (our decision)."""
    lowest = lead(stability, top1)
    leads = torch.stack([(leaders == m).sum(0) for m in range(len(stability))])  # (M, B)
    most = leads == leads.amax(0)
    most_selected = torch.where(most.sum(0) == 1, most.int().argmax(0), lowest)
    best_model = torch.full_like(lowest, config.best_model)
    return {"lowest_tcc": lowest, "best_model": best_model, "most_selected": most_selected}[config.selection]


def respond(runs: list[Run], leaders: Tensor, scores: Tensor, not_relayed: int) -> Result:
    """The final response (Sec. 4.4) and the record of how it came about, leaders (relays, B), scores (relays, M, B)."""
    tcc = stack_on(leaders.device, [run.tcc.float() for run in runs])  # (M, B)
    top1 = stack_on(leaders.device, [run.top1 for run in runs])  # (M, B)
    compared = stack_on(leaders.device, [run.compared for run in runs])  # (M, B)
    winner = select(runs[0].config, (-tcc).masked_fill(~compared, UNSCORED), top1, leaders)
    forwards = sum(float(run.forwards.sum()) for run in runs) / len(winner)
    return Result([run.canvas for run in runs], winner, leaders, scores, tcc, top1, forwards, not_relayed)


def stack_on(device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.to(device) for part in parts])


# --- relay between different vocabularies (our decision; the paper is silent) -------------------------------


def translate(sent: Canvas, sender: Member, own: Canvas, receiver: Member, vocab_size: int | None = None) -> Received:
    """The sender's state, text with holes, in the receiver's vocabulary and layout; and fits (B,) bool.
    The receiver's prompt, suffix and region lengths stay. Committed text is kept exactly, masks keep their number and
    place between its runs, EOS becomes EOS. The end of a region stretches or shrinks to the receiver's length: by masks
    where the sender's ends in masks, by EOS where it is complete. A row whose text does not fit is the receiver's own.
    ValueError where a codec is missing or loses text, or gives an id beyond the receiver's vocab_size V, if given.
    """
    _require(sender.codec and receiver.codec, f"{sender} and {receiver} need codecs: their vocabularies differ")
    regions = ((sent.reasoning, own.reasoning), (sent.answer, own.answer))
    tokens, masked, fits = own.tokens.tolist(), own.masked.tolist(), []
    for b, (ids, holes) in enumerate(zip(sent.tokens.tolist(), sent.masked.tolist())):
        state = [None if hole else i for i, hole in zip(ids, holes)]
        new = [translate_region(state[at], sender, receiver, to.stop - to.start, vocab_size) for at, to in regions]
        fits.append(None not in new)
        for (_, to), region in zip(regions, new):
            if fits[b] and region is not None:
                tokens[b][to] = [receiver.mask_id if i is None else i for i in region]
                masked[b][to] = [i is None for i in region]
    new_tokens, new_masked, fit = (torch.tensor(x, device=own.tokens.device) for x in (tokens, masked, fits))
    return replace(own, tokens=new_tokens, masked=new_masked), fit


def translate_region(
    ids: list[int | None], sender: Member, receiver: Member, length: int, vocab_size: int | None
) -> list[int | None] | None:
    """One region of one row in the receiver's ids, None where masked; None altogether if its text does not fit."""
    new: list[int | None] = []
    for kind, run in groupby(spell(ids, sender), key=type):
        if kind is bytes:
            new += encode_exactly(b"".join(run).decode(), receiver, vocab_size)  # type: ignore[arg-type]
        else:
            new += [None if unit is None else receiver.eos_ids[0] for unit in run]
    rest = None if not ids or ids[-1] is None else receiver.eos_ids[0]  # what the end of the region holds
    while new and new[-1] == rest:
        new.pop()
    return new + [rest] * (length - len(new)) if len(new) <= length else None


def spell(ids: list[int | None], member: Member) -> list[bytes | str | None]:
    """The bytes of each token; None for a mask and for what holds a byte of no whole character; "EOS" for an EOS."""
    codec: Any = member.codec
    text = [i for i in ids if i is not None and i not in member.eos_ids]
    pieces, whole = {i: codec.decode([i]) for i in set(text)}, codec.decode(text)
    good = all(isinstance(x, bytes) for x in (whole, *pieces.values())) and b"".join(pieces[i] for i in text) == whole
    for i, piece in pieces.items():  # U+FFFD: half a character that was lost, or a token of its own
        good = good and (b"\xef\xbf\xbd" not in piece or codec.encode(piece.decode(errors="replace")) == [i])
    _require(good, f"{member}: its codec's decode must give the raw bytes of each token in turn, not {whole!r:.40}")
    units = [None if i is None else "EOS" if i in member.eos_ids else pieces[i] for i in ids]
    while True:
        parted = [unit if isinstance(unit, bytes) else b" " for unit in units]  # a new hole may break its neighbours
        try:
            b"".join(parted).decode()
            return units
        except UnicodeDecodeError as error:
            owner = [k for k, part in enumerate(parted) for _ in part]  # the unit that each byte is of
            broken = set(owner[error.start : error.end])
            units = [None if k in broken else unit for k, unit in enumerate(units)]


def encode_exactly(text: str, member: Member, vocab_size: int | None) -> list[int]:
    """Ids of exactly this text; ValueError where the codec adds to it or loses of it."""
    codec: Any = member.codec
    ids, special = codec.encode(text), {member.mask_id, *member.eos_ids}
    good = isinstance(ids, list) and all(type(i) is int and 0 <= i < (vocab_size or i + 1) for i in ids)
    good = good and not special & set(ids)
    wanted = "a list of ids within the vocabulary, none of them mask or EOS"
    _require(good, f"{member}: its codec's encode must give {wanted}, not {ids!r:.40}")
    pieces = {i: codec.decode([i]) for i in set(ids)}
    good = all(pieces.values()) and b"".join(pieces[i] for i in ids) == text.encode()
    _require(good, f"{member}: its codec's encode must neither add to a text nor lose any, as of {text!r:.40}")
    return ids


# --- checks -------------------------------------------------------------------------------------------------


def _check(members: list[Member], canvases: list[Canvas], config: Config) -> None:
    """ValueError, before any forward, on what does not fit together."""
    M, C = len(members), len(canvases)
    _require(isinstance(config, Config), f"config must be a tie.Config, not {type(config).__name__}")
    _require(0 < M == C, f"{M} members, {C} canvases: give at least one member, and a canvas for each")
    best = config.best_model
    _require(type(best) is int and 0 <= best < M, f"best_model {best!r} names no member: give the index of one of {M}")
    for member, canvas in zip(members, canvases):
        good = isinstance(member, Member) and callable(member.denoise)
        _require(good, f"{member} must be a tie.Member whose denoise is a function")
        ids, given = (member.mask_id, *member.eos_ids), f"not {member.mask_id!r} and {member.eos_id!r}"
        good = len(ids) > 1 and all(hasattr(i, "__index__") for i in ids) and member.mask_id not in member.eos_ids
        _require(good, f"{member}: mask_id must be an id, eos_id another or a tuple of others, {given}")
        _check_canvas(member, canvas)
    for (a, x), (b, y) in combinations(zip(members, canvases), 2):
        _require(len(x.tokens) == len(y.tokens), f"{a} and {b} have canvases of different batch sizes: give equal ones")
        _require((a.codec is None) == (b.codec is None), f"only one of {a} and {b} has a codec: give all one, or none")
        if a.codec is b.codec:
            alike = (x.tokens.shape, x.reasoning, x.answer) == (y.tokens.shape, y.reasoning, y.answer)
            _require(alike, f"{a} and {b} share a vocabulary: give their canvases the same layout")
            alike = a.mask_id == b.mask_id and {*a.eos_ids} == {*b.eos_ids}
            _require(alike, f"{a} and {b} share a vocabulary, but not mask_id and eos_id: give each a codec of its own")


def _check_canvas(member: Member, canvas: Canvas) -> None:
    _require(isinstance(canvas, Canvas), f"{member}: its canvas must be a tie.Canvas, not {type(canvas).__name__}")
    tokens, shape, regions = canvas.tokens, tuple(canvas.tokens.shape), (canvas.reasoning, canvas.answer)
    good = len(shape) == 2 and shape[0] > 0 and tokens.dtype == torch.int64
    _require(good, f"{member}: canvas tokens must be (B, L) int64, not {shape} {tokens.dtype}")
    real = canvas.masked if canvas.attention_mask is None else canvas.attention_mask  # (B, L)
    good = all((x.shape, x.dtype, x.device) == (shape, torch.bool, tokens.device) for x in (canvas.masked, real))
    _require(good, f"{member}: canvas masked and attention_mask must be {shape} bool on {tokens.device}, as its tokens")
    bounds: list[Any] = [0, *(getattr(region, end, None) for region in regions for end in ("start", "stop")), shape[1]]
    good = all(type(bound) is int for bound in bounds) and bounds == sorted(bounds) and not any(r.step for r in regions)
    _require(good, f"{member}: reasoning, then answer, must be slices with start and stop, no step, within {shape[1]}")
    outside = canvas.masked.clone()
    outside[:, canvas.reasoning] = outside[:, canvas.answer] = False
    good = not (outside | canvas.masked & ~real).any()
    _require(good, f"{member}: the canvas has masks outside its reasoning and answer, or on padding")


def _check_logits(member: Member, logits: Any, shape: tuple[int, int], device: torch.device) -> None:
    good = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == shape and logits.is_floating_point()
    if not good or logits.device != device:
        given = (tuple(logits.shape), logits.dtype, str(logits.device)) if isinstance(logits, Tensor) else type(logits)
        raise ValueError(f"{member} must give float logits {(*shape, 'V')} on {device}, not {given}")
    for i in (member.mask_id, *member.eos_ids):
        _require(0 <= i < logits.shape[2], f"{member}: its id {i} lies outside its vocabulary of {logits.shape[2]}")
