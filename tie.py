"""TIE, Trajectory-based Iterative Ensembling of masked diffusion language models, in one file.

Paper: arXiv:2606.16281. Several models decode the same question side by side. Every n steps, each
model's partly denoised sequence is scored by how stable or how confident its answer tokens are.
The best sequence is relayed to all models, and they continue from it. `ensemble` is the whole
algorithm; what it calls follows in the order of the paper.

Symbol, equation or section of the paper -> name here
    M, m                number of models, index of one: `members`
    n                   ensemble interval, steps between two relays (Sec. 4.1): `Config.interval`
    t                   a denoising step: `Run.step`
    T                   number of steps of a whole decoding
    T_m                 trajectory, a partly denoised sequence: `Canvas`, held by a `Run`
    A_m^(t)             answer-relevant positions (App. A.4): `Reading.relevant`
    Sec. 5.1, 5.3       low-confidence remasking; threshold and top-k: `commit`
    C(n), C~(n)         token change count, Eq. 5; normalised, Eq. 7: `token_change_count`; its
                        inner sum, which `Run.step` adds up: `count_changes`
    Score               -C(n) or -C~(n), Eq. 6: `Tally.score`
    f(T_m; m')          top-1 probability, negative entropy, margin (Sec. 4.2): `predict`
    mean of f over m'   cross-model score, Eq. 8: `assess`
    m*                  leader, the argmax of the scores, Eq. 9: `lead`
    T_m <- T_m*         trajectory relay, Eq. 10: `relay`
    Sec. 4.4, App. D    final response, the lowest C~ of the whole decoding: `Result.winner`

"Our decision" marks what the paper leaves open. Relaying between different vocabularies
(`translate`) isn't in the paper.

Shapes: B questions (rows), L positions, W positions of a block, A answer positions, w of them in
the answer window, K = W + w positions read in a step, V vocabulary size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from itertools import combinations, groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# (tokens (B, L) int64, positions (B, K) int64, attention_mask (B, L) bool or None)
# -> logits (B, K, V), where logits[b, k] is the distribution of the token AT positions[b, k]:
# a model that predicts the next token must shift its outputs.
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]

SCORES = ("token_change_count", "top1_probability", "negative_entropy", "probability_margin")
UNSCORED = float("-inf")  # a trajectory without answer-relevant tokens never wins (our decision)


def require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


# --- members, settings, sequences -----------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One model. Members share a vocabulary if they have the same codec object, or none."""

    denoise: Denoiser
    mask_id: int
    eos_id: int | tuple[int, ...]  # or all ids that end an answer; the first is used as padding
    name: str = ""
    codec: Codec | None = None  # needed only where vocabularies differ

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    def __str__(self) -> str:
        return f"member {self.name!r}" if self.name else "a member"


@dataclass(frozen=True)
class Config:
    """Settings of one decoding. The defaults are the paper's for mathematics.

    At most one of `top_k`, `threshold` and `commit` decides how many tokens a step commits.
    Raises ValueError on a value of the wrong type or out of range.
    """

    interval: int = 16  # n; with n >= T nothing is relayed: post-generation ensemble (Table 3)
    block_size: int = 16  # W, of semi-autoregressive decoding
    score: str = "token_change_count"  # one of SCORES
    cross_model: bool = True  # logit scores: mean over all models, Eq. 8, or source only (Table 9)
    # Eq. 7 if true, Eq. 5 if false. Our decision: also in the final selection.
    normalize: bool = True
    top_k: int = 1  # tokens committed per step
    threshold: float | int | None = None  # tau: also commit every token more probable than this
    commit: CommitRule | None = None  # a rule of your own, called at each step of each member
    answer_window: int | None = None  # read only the first masked answer positions; 8 for code
    # Not in the paper: end a row at the first EOS of its answer, once nothing before it is masked.
    # Plain decoding gives the same text. TIE may not, since relays of that row end earlier.
    stop_at_eos: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kind = "CommitRule" if callable(value) else type(value).__name__.removesuffix("Type")
            fits = kind in field.type.split(" | ")
            require(fits, f"{field.name} must be {field.type}, got {value!r}")
        for name in ("interval", "block_size", "top_k", "answer_window"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.score in SCORES, f"score must be one of {', '.join(SCORES)}, got {self.score!r}"
        )
        tau = self.threshold
        require(tau is None or 0 < tau <= 1, f"threshold must be in (0, 1], got {tau}")
        given = (self.top_k > 1) + (tau is not None) + (self.commit is not None)
        require(given <= 1, "top_k, threshold and commit exclude each other: give at most one")


@dataclass
class Canvas:
    """A batch of partly denoised sequences: prompt | reasoning | suffix | answer.

    `masked` marks the positions to decode. It is never inferred from `tokens == mask_id`, so a mask
    id in a prompt is part of the prompt.
    """

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool, true only inside `reasoning` and `answer`
    reasoning: slice
    answer: slice
    attention_mask: Tensor | None = None  # (B, L) bool, false on padding

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
        """Left-padded prompts, masked reasoning, the suffix ("Answer:"), a masked answer."""
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        region = [mask_id] * reasoning_length + [*suffix] + [mask_id] * answer_length
        rows = [[pad_id] * pad + [*prompt] + region for pad, prompt in zip(pads, prompts)]
        real = [[False] * pad + [True] * (len(rows[0]) - pad) for pad in pads]
        tokens = torch.tensor(rows, dtype=torch.int64, device=device)  # (B, L)
        attention_mask = torch.tensor(real, device=device) if any(pads) else None  # (B, L)
        reasoning = slice(width, width + reasoning_length)
        answer = slice(len(rows[0]) - answer_length, len(rows[0]))
        masked = torch.zeros_like(tokens, dtype=torch.bool)  # (B, L)
        masked[:, reasoning] = True
        masked[:, answer] = True
        return cls(tokens, masked, reasoning, answer, attention_mask)

    @property
    def complete(self) -> Tensor:
        return ~self.masked.any(1)  # (B,) bool, nothing is left to decode


@dataclass
class Result:
    """What `ensemble` returns. A single member is not scored: its tcc is nan, its top1 -inf."""

    candidates: list[Canvas]  # M, each in its member's vocabulary
    winner: Tensor  # (B,) int64, the member whose candidate is the final response
    leaders: Tensor  # (relays, B) int64, -1 in rows that had finished earlier
    scores: Tensor  # (relays, M, B) float32, -inf if there was nothing to score
    tcc: Tensor  # (M, B) float32, C~ over the whole decoding (C without `normalize`)
    top1: Tensor  # (M, B) float32, mean top-1 probability over A at its last non-empty step
    forwards: float  # sequences forwarded per row, summed over all members
    not_relayed: int  # (row, member) pairs that kept their own state because the text didn't fit


# --- the algorithm (Sec. 4) -----------------------------------------------------------------------


@torch.no_grad()
def ensemble(
    members: Sequence[Member],
    canvases: Sequence[Canvas],
    config: Config = Config(),
    on_round: Callable[[dict], None] | None = None,
) -> Result:
    """Decode the same questions with all members, relaying the leader's sequence every n steps.

    Takes one canvas per member, on that member's device. Rows are independent: each has its own
    leader and decodes as it would alone. Once any member has completed a row, the row is no longer
    relayed. The other members finish it, and the winner is chosen among all M candidates. M = 1 is
    plain decoding.

    `on_round` is called at the end of every round, before its relay, with copies: {"round", "step",
    "tokens" and "masked" (lists of M (B, L)), "scores" (M, B), "leader" (B,), -1 if nothing is
    relayed}.

    Raises ValueError if members, canvases or logits don't fit together, on NaN logits, and on a
    codec that loses text.
    """
    check(members, canvases)
    M = len(members)
    device = canvases[0].tokens.device
    runs = [Run(m, members[m], canvases[m], config, alone=M == 1) for m in range(M)]
    # Our decision: no relay after `limit` steps. Between vocabularies a relay can bring masks back.
    limit = 2 * stack_on(device, [run.steps_left() for run in runs]).amax(0)  # (B,)
    ended = torch.full_like(limit, M == 1, dtype=torch.bool)  # (B,) rows without further relays
    leaders = limit.new_empty(0, len(limit))  # (relays, B)
    all_scores = torch.empty(0, M, len(limit), dtype=torch.float32, device=device)  # (relays, M, B)
    step = 0
    not_relayed = 0
    while not all(run.canvas.complete.all() for run in runs):
        step += generate(runs)  # Sec. 4.1
        scores, _, top1 = gather(device, [run.round for run in runs])  # (M, B), Eq. 6
        complete = stack_on(device, [run.canvas.complete for run in runs]).any(0)  # (B,)
        ended = ended | complete | (step >= limit)
        received: list = []
        readings: list = []
        if not ended.all():
            received = [[receive(run, sender) for sender in runs] for run in runs]
            if config.score != "token_change_count":
                scores, readings = assess(runs, received, ended)  # Sec. 4.2, Eq. 8
        for run in runs:
            require(not run.nan, f"{run.member} gave NaN logits: check its weights and dtype")
        leader = lead(scores, top1).masked_fill(ended, -1)  # (B,), Sec. 4.3, Eq. 9
        scores = scores.masked_fill(ended, UNSCORED)
        if on_round is not None:
            state = {
                "round": (step - 1) // config.interval,
                "step": step,
                "tokens": [run.canvas.tokens for run in runs],
                "masked": [run.canvas.masked for run in runs],
                "scores": scores,
                "leader": leader,
            }
            on_round(deepcopy(state))
        if received:
            leaders = torch.cat([leaders, leader[None]])
            all_scores = torch.cat([all_scores, scores[None]])
            not_relayed += relay(runs, received, readings, leader)  # Eq. 10
    scores, tcc, top1 = gather(device, [run.total for run in runs])  # (M, B)
    return Result(
        candidates=[run.canvas for run in runs],
        winner=lead(scores, top1),  # Sec. 4.4, App. D
        leaders=leaders,
        scores=all_scores,
        tcc=tcc if M > 1 else torch.full_like(tcc, torch.nan),
        top1=top1,
        forwards=sum(int(run.forwards.sum()) for run in runs) / len(limit),
        not_relayed=not_relayed,
    )


def decode(member: Member, canvas: Canvas, config: Config = Config()) -> Canvas:
    """Plain semi-autoregressive decoding by one member; takes and returns B rows."""
    return ensemble([member], [canvas], config).candidates[0]


def stack_on(device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    """One tensor per member -> (M, ...), on one device."""
    return torch.stack([part.to(device) for part in parts])


def gather(device: torch.device, tallies: Sequence[Tally]) -> list[Tensor]:
    """Scores, counts and top-1 probabilities of all members, each (M, B)."""
    parts = zip(*[(tally.score, in_tokens(tally.changes), tally.top1) for tally in tallies])
    return [stack_on(device, part) for part in parts]


# --- trajectory generation (Sec. 4.1): blocks, low-confidence remasking, greedy (Sec. 5.1) --------


class Reading(NamedTuple):
    """What is kept of one forward pass of a model on a canvas. Commit rules get it too."""

    member: int  # index of the model, for rules that remember earlier steps
    positions: Tensor  # (B, W) int64, a window that holds each row's current block
    masked: Tensor  # (B, W) bool, the masked positions of that block: the only ones to commit
    token: Tensor  # (B, W) int64, top-1 token
    confidence: Tensor  # (B, W) float32, its probability; -1 where nothing may be committed
    # The next two are None unless the config has a commit rule.
    entropy: Tensor | None  # (B, W) float32, of the whole distribution, in nats
    margin: Tensor | None  # (B, W) float32, top-1 minus top-2 probability
    answer_token: Tensor  # (B, A) int64, top-1 at the answer positions, or the token once committed
    relevant: Tensor  # (B, A) bool, A^(t)
    top1: Tensor  # (B,) float32, mean top-1 probability over A^(t)
    score: Tensor | None  # (B,) float32, f(T; m), the logit score of the config if it names one


# A reading -> (B, W) bool, the positions to commit in addition to each row's most confident one.
CommitRule = Callable[[Reading], Tensor]
# Another member's state as the receiver would hold it, and (B,) bool, whether it fits.
Received = tuple[Canvas, Tensor]


class Run:
    """One model at work on its own trajectory."""

    def __init__(self, index: int, member: Member, canvas: Canvas, config: Config, alone: bool):
        self.index = index
        self.member = member
        self.config = config
        self.canvas = replace(canvas, tokens=canvas.tokens.clone(), masked=canvas.masked.clone())
        self.stop_at_eos()
        self.block_ends = block_ends(canvas, config.block_size)  # (L,)
        self.window = 0 if alone else config.answer_window  # nobody scores a single member
        self.answer_token = canvas.tokens[:, canvas.answer]  # (B, A), of the last step
        self.relevant = torch.zeros_like(self.answer_token, dtype=torch.bool)  # (B, A), its A^(t)
        zeros = torch.zeros_like(canvas.tokens[:, 0])  # (B,)
        self.forwards = zeros
        self.nothing = Tally(zeros, zeros.bool(), zeros + UNSCORED)
        self.round = self.nothing
        self.earlier = self.nothing  # the tally of all earlier rounds
        self.next: Reading | None = None  # the next step's, if the assessment already computed it
        self.nan = zeros.any()  # () bool, whether a position that counts had NaN logits
        self.vocab_size: int | None = None  # V, once the member has given logits

    @property
    def total(self) -> Tally:
        """The tally of all the model's own steps, whatever was relayed (our decision)."""
        return self.earlier + self.round

    def step(self) -> None:
        """One denoising step. Completed rows stay in the batch but are not counted."""
        reading = self.read(self.canvas) if self.next is None else self.next
        busy = reading.masked.any(1)  # (B,)
        compared = self.relevant & busy[:, None]  # (B, A)
        normalize = self.config.normalize
        changes = count_changes(self.answer_token, reading.answer_token, compared, normalize)
        self.round += Tally(changes, compared.any(1), reading.top1)
        self.forwards = self.forwards + busy
        self.answer_token = reading.answer_token
        self.relevant = reading.relevant
        self.canvas = commit(self.canvas, reading, self.config)
        self.stop_at_eos()
        self.next = None

    def read(self, canvas: Canvas) -> Reading:
        """One forward pass, asking for logits at the current block and the answer window only."""
        block, masked = current_block(canvas, self.block_ends, self.config.block_size)  # (B, W)
        answer = canvas.tokens[:, canvas.answer]  # (B, A)
        undecided = canvas.masked[:, canvas.answer]  # (B, A)
        # Our decision: the window takes the first masked answer positions and then leaves out EOS.
        order = (~undecided).int().argsort(dim=1, stable=True)  # (B, A), masked positions first
        window = order[:, : self.window]  # (B, w)
        positions = torch.cat([block, canvas.answer.start + window], 1)  # (B, K)
        tokens = canvas.tokens.masked_fill(canvas.masked, self.member.mask_id)  # (B, L)
        logits = self.member.denoise(tokens, positions, canvas.attention_mask)  # (B, K, V)
        check_logits(self.member, logits, positions)
        self.vocab_size = logits.shape[2]

        # A custom commit rule may need any score.
        asked = SCORES if self.config.commit else (self.config.score,)
        token, f = predict(logits, self.member.mask_id, asked)  # (B, K)
        top1 = f["top1_probability"]
        W = block.shape[1]
        relevant = undecided.gather(1, window)  # (B, w)
        self.nan = self.nan | (top1.isnan() & torch.cat([masked, relevant], 1)).any()
        answer_token = torch.where(relevant, token[:, W:], answer.gather(1, window))  # (B, w)
        for eos in self.member.eos_ids:
            relevant = relevant & (answer_token != eos)
        means = {name: mean_over(each[:, W:], relevant) for name, each in f.items()}  # (B,)
        return Reading(
            member=self.index,
            positions=block,
            masked=masked,
            token=token[:, :W],
            confidence=top1[:, :W].masked_fill(~masked, -1),
            entropy=-f["negative_entropy"][:, :W] if self.config.commit else None,
            margin=f["probability_margin"][:, :W] if self.config.commit else None,
            answer_token=answer.scatter(1, window, answer_token),
            relevant=torch.zeros_like(undecided).scatter(1, window, relevant),
            top1=means["top1_probability"],
            score=means.get(self.config.score),
        )

    def stop_at_eos(self) -> None:
        """Completes the rows whose answer has an EOS with no mask before it: masks become EOS.

        Our decision: tokens after that EOS that are already committed stay.
        """
        if not self.config.stop_at_eos:
            return
        canvas = self.canvas  # safe to modify: nobody else holds its tensors
        settled = canvas.masked.cumsum(1) == 0  # (B, L), no mask up to here
        for eos in self.member.eos_ids:
            found = (settled & (canvas.tokens == eos))[:, canvas.answer]  # (B, A)
            rest = canvas.masked & found.any(1, keepdim=True)  # (B, L)
            canvas.tokens.masked_fill_(rest, self.member.eos_ids[0])
            canvas.masked &= ~rest

    def steps_left(self) -> Tensor:
        """(B,) steps until each row is complete if each commits up to top_k tokens of one block."""
        masked = self.canvas.masked.long()  # (B, L)
        block = (self.block_ends - 1).clamp(min=0).expand_as(masked)  # (B, L), its last position
        masks = torch.zeros_like(masked).scatter_add(1, block, masked)  # (B, L), per block
        return ((masks + self.config.top_k - 1) // self.config.top_k).sum(1)


def generate(runs: list[Run]) -> int:
    """Every model decodes alone for n steps, or to its end. Returns the number of steps made.

    With top_k and without stop_at_eos, the number of steps is known beforehand: nothing waits for a
    device, so members on different devices overlap. Otherwise it depends on the data, and each
    member is asked before each step whether it has masks left.
    """
    config = runs[0].config
    known = config.threshold is None and config.commit is None and not config.stop_at_eos
    most = [int(run.steps_left().max()) for run in runs]  # an upper bound unless known
    for run in runs:
        run.earlier = run.total
        run.round = run.nothing
    for step in range(config.interval):
        stepped = False
        for run, left in zip(runs, most):
            if step < left and (known or run.canvas.masked.any()):
                run.step()
                stepped = True
        if not stepped:
            return step
    return config.interval


def predict(
    logits: Tensor, mask_id: int, scores: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the top-1 tokens (B, K) int64 of logits (B, K, V), and a dict of (B, K) float32: the
    top-1 probability and any other logit score in `scores`. Higher is more confident.

    Our decision: the mask token is never predicted, so decoding always ends. Probabilities are
    those of the whole softmax, mask included, as in LLaDA's own sampler.
    """
    found = defaultdict(list)
    # Chunks of about 8 million logits avoid a float32 copy of all of them, and are faster.
    questions = max(1, 2**23 // logits[0].numel())
    for part in logits.split(questions):
        p = part.softmax(-1, dtype=torch.float32)  # (b, K, V)
        if "negative_entropy" in scores:
            found["negative_entropy"].append(-torch.special.entr(p).sum(-1))
        p[..., mask_id] = -1
        if "probability_margin" in scores:
            first, second = p.topk(2).values.unbind(-1)  # (b, K)
            found["probability_margin"].append(first - second)
        top1, token = p.max(-1)  # (b, K)
        found["top1_probability"].append(top1)
        found["token"].append(token)
    f = {name: torch.cat(parts) for name, parts in found.items()}  # (B, K)
    return f.pop("token"), f


def commit(canvas: Canvas, reading: Reading, config: Config) -> Canvas:
    """Low-confidence remasking: unmask the most confident positions of each row's block.

    Every step commits at least one token of a row that has masks left, so decoding always ends.
    """
    order = reading.confidence.argsort(dim=1, descending=True, stable=True)  # (B, W)
    # Equal confidences go to the lower position (our decision).
    chosen = torch.zeros_like(reading.masked).scatter(1, order[:, : config.top_k], True)  # (B, W)
    if config.threshold is not None:
        chosen |= reading.confidence > config.threshold
    if config.commit is not None:
        added = config.commit(reading)  # (B, W)
        fits = added.shape == chosen.shape and added.dtype == torch.bool
        given = f"{tuple(added.shape)} {added.dtype}"
        require(fits, f"commit must return {tuple(chosen.shape)} torch.bool, got {given}")
        chosen |= added
    chosen &= reading.masked
    token = torch.where(chosen, reading.token, canvas.tokens.gather(1, reading.positions))
    masked = canvas.masked.gather(1, reading.positions) & ~chosen
    return replace(
        canvas,
        tokens=canvas.tokens.scatter(1, reading.positions, token),
        masked=canvas.masked.scatter(1, reading.positions, masked),
    )


def block_ends(canvas: Canvas, block_size: int) -> Tensor:
    """(L,) the end of each position's block. Our decision: blocks count from the start of the
    reasoning, and again from the start of the answer."""
    ends = torch.zeros_like(canvas.tokens[0])
    for region in (canvas.reasoning, canvas.answer):
        offset = torch.arange(region.stop - region.start, device=ends.device)
        end = region.start + (offset // block_size + 1) * block_size
        ends[region] = end.clamp(max=region.stop)
    return ends


def current_block(canvas: Canvas, ends: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Each row's first block with a mask, so that the answer waits for the reasoning (Sec. 4.1).

    Returns W positions (B, W), and which of them are masks of that block (B, W). The positions end
    where the block ends, or are the first W of the row if fewer precede the block's end.
    """
    end = ends[canvas.masked.int().argmax(1)][:, None]  # (B, 1)
    width = min(block_size, canvas.tokens.shape[1])
    start = (end - width).clamp(min=0)  # (B, 1)
    positions = start + torch.arange(width, device=end.device)  # (B, W)
    return positions, canvas.masked.gather(1, positions) & (positions < end)


# --- trajectory assessment (Sec. 4.2) -------------------------------------------------------------

# C~ is summed in integers, in units of 1/UNIT: ties are common, and equal sums must be equal.
UNIT = math.lcm(*range(1, 29))  # a multiple of every |A| up to 28; larger ones are rounded down


def token_change_count(top1_tokens: Tensor, relevant: Tensor, normalize: bool = True) -> Tensor:
    """C(n), Eq. 5, or C~(n), Eq. 7: how often the top-1 of an answer-relevant token changed between
    successive steps. Returns (B,) float32.

    top1_tokens (n, B, A) int64: top-1 at each step, or the token itself once committed, which is no
    change. relevant (n, B, A) bool: A^(t). n steps give n - 1 comparisons; an empty A^(t) adds
    nothing.
    """
    # (n - 1, B)
    changes = count_changes(top1_tokens[:-1], top1_tokens[1:], relevant[:-1], normalize)
    return in_tokens(changes.sum(0))


def count_changes(before: Tensor, after: Tensor, relevant: Tensor, normalize: bool) -> Tensor:
    """The inner sum of Eq. 5 or 7, (..., A) -> (...) int64 in units of 1/UNIT."""
    changes = ((before != after) & relevant).sum(-1)
    return changes * (UNIT // relevant.sum(-1).clamp(min=1) if normalize else UNIT)


def in_tokens(changes: Tensor) -> Tensor:
    """Converts counts in units of 1/UNIT to float32. Whole numbers stay exact, as they would not if
    the int64 were rounded to float32 before the division."""
    return changes // UNIT + (changes % UNIT).float() / UNIT


@dataclass
class Tally:
    """What a model's steps say about its trajectory, for one step or the sum over several."""

    changes: Tensor  # (B,) int64, C or C~ in units of 1/UNIT
    compared: Tensor  # (B,) bool, whether any step with a non-empty A was compared with the next
    top1: Tensor  # (B,) float32, mean top-1 probability at the last step with a non-empty A

    def __add__(self, later: Tally) -> Tally:
        top1 = torch.where(later.top1 > UNSCORED, later.top1, self.top1)
        return Tally(self.changes + later.changes, self.compared | later.compared, top1)

    @property
    def score(self) -> Tensor:
        """(B,) float32, Eq. 6."""
        return (-in_tokens(self.changes)).masked_fill(~self.compared, UNSCORED)


def mean_over(values: Tensor, where: Tensor, dim: int = -1) -> Tensor:
    """Mean of the values where `where` is true; UNSCORED if it is nowhere true."""
    mean = values.masked_fill(~where, 0).sum(dim) / where.sum(dim)
    return mean.masked_fill(~where.any(dim), UNSCORED)


def assess(
    runs: list[Run], received: list[list[Received]], ended: Tensor
) -> tuple[Tensor, list[list[Reading]]]:
    """Logit scores (M, B) of the trajectories, Eq. 8; readings[r][m], model r's of trajectory m.

    The M readings of the leader's trajectory are every model's first step of the next round, so a
    round costs M * (M - 1) extra forwards. Without cross_model it costs M extra forwards.
    """
    cross_model = runs[0].config.cross_model
    f = []
    readings = []
    for r, run in enumerate(runs):
        states = received[r] if cross_model else received[r][r : r + 1]
        readings.append([run.read(canvas) for canvas, _ in states])
        pairs = zip(readings[r], states)
        f.append(torch.stack([x.score.masked_fill(~fits, UNSCORED) for x, (_, fits) in pairs]))
        extra = len(runs) - 1 if cross_model else 1
        run.forwards = run.forwards + extra * ~ended.to(run.forwards.device)
    scores = stack_on(ended.device, f)  # (M readers m', M trajectories m, B), f(T_m; m')
    if not cross_model:
        return scores[:, 0], []  # each trajectory by its source model
    # Our decision: a reader with an empty A abstains.
    return mean_over(scores, scores > UNSCORED, dim=0), readings


# --- trajectory relay (Sec. 4.3) ------------------------------------------------------------------


def lead(scores: Tensor, top1: Tensor) -> Tensor:
    """Returns m* (B,), the argmax over members of scores (M, B), Eq. 9.

    Our decision: ties go to the higher top1 (M, B), the source model's mean top-1 probability at
    its last step with a non-empty A, then to the lower index.
    """
    best = scores == scores.amax(0)  # (M, B)
    top1 = top1.masked_fill(~best, UNSCORED)
    return (best & (top1 == top1.amax(0))).int().argmax(0)


def relay(
    runs: list[Run], received: list[list[Received]], readings: list[list[Reading]], leader: Tensor
) -> int:
    """Eq. 10: each model takes over the state of each row's leader (B,), and keeps its own where
    leader is -1. If it has read that state already, the reading becomes its next step. Returns the
    number of (row, member) pairs that kept their own state because the leader's text didn't fit."""
    not_relayed = 0
    for r, run in enumerate(runs):
        source = torch.where(leader < 0, r, leader).to(run.forwards.device)  # (B,)
        states = [(canvas.tokens, canvas.masked, fits) for canvas, fits in received[r]]
        tokens, masked, fits = pick(states, source)
        run.canvas = replace(run.canvas, tokens=tokens, masked=masked)
        if readings:
            run.next = Reading(*pick(readings[r], source))
        kept = (leader < 0).to(source.device)  # (B,)
        run.relevant = run.relevant & kept[:, None]  # nothing is compared across a relay
        not_relayed += int((~fits).sum())
    return not_relayed


def pick(versions: Sequence[tuple], source: Tensor) -> list:
    """Row b of each tensor (B, ...), from version source[b]. Other values are equal in all."""
    rows = torch.arange(len(source), device=source.device)
    return [
        torch.stack(each)[source, rows] if isinstance(each[0], Tensor) else each[0]
        for each in zip(*versions)
    ]


def receive(receiver: Run, sender: Run) -> Received:
    """The sender's state as the receiver would hold it, behind its own prompt and suffix."""
    own = receiver.canvas
    sent = sender.canvas
    if sender.member.codec is not receiver.member.codec:
        return translate(sent, sender.member, own, receiver.member)
    same = receiver.vocab_size == sender.vocab_size
    sizes = f"{receiver.vocab_size} and {sender.vocab_size} tokens: give each a codec"
    require(same, f"{receiver.member} and {sender.member} give logits over {sizes}")
    tokens = own.tokens.clone()  # (B, L)
    for region in (own.reasoning, own.answer):
        tokens[:, region] = sent.tokens[:, region].to(tokens.device)
    masked = sent.masked.to(tokens.device)  # (B, L)
    return replace(own, tokens=tokens, masked=masked), torch.ones_like(masked[:, 0])


# --- relay between different vocabularies (our decision; the paper is silent) ---------------------


class Codec(Protocol):
    """A vocabulary. `encode` must round-trip any text: no [CLS], EOS or [UNK], no lower-casing.
    `decode` must return the tokens' raw bytes, since one token may hold part of a character."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> bytes: ...


def translate(sent: Canvas, sender: Member, own: Canvas, receiver: Member) -> Received:
    """Returns the sender's state, text with holes, in the receiver's vocabulary and layout.

    Committed text is kept exactly, EOS becomes EOS, and masks keep their number and place between
    runs of text. Only the end of a region stretches or shrinks to the receiver's length: by masks
    if the sender's region ends in masks, by EOS if it is complete. A row whose text doesn't fit
    stays the receiver's own. Also returns fits (B,) bool. Raises ValueError on a lossy codec.
    """
    tokens = own.tokens.tolist()
    masked = own.masked.tolist()
    fits = []
    for b, (ids, holes) in enumerate(zip(sent.tokens.tolist(), sent.masked.tolist())):
        units = [None if hole else i for i, hole in zip(ids, holes)]
        regions = []
        for theirs, ours in ((sent.reasoning, own.reasoning), (sent.answer, own.answer)):
            new = translate_region(units[theirs], sender, receiver, ours.stop - ours.start)
            regions.append((ours, new))
        fits.append(all(new is not None for _, new in regions))
        for ours, new in regions if fits[b] else []:
            tokens[b][ours] = [receiver.mask_id if i is None else i for i in new]
            masked[b][ours] = [i is None for i in new]
    device = own.tokens.device
    state = replace(
        own,
        tokens=torch.tensor(tokens, device=device),
        masked=torch.tensor(masked, device=device),
    )
    return state, torch.tensor(fits, device=device)


def translate_region(
    ids: list[int | None], sender: Member, receiver: Member, length: int
) -> list[int | None] | None:
    """A region of a row in the receiver's ids, None where masked; or None if it doesn't fit."""
    new: list[int | None] = []
    for kind, run in groupby(spell(ids, sender), key=type):  # runs of text, of EOS, of masks
        if kind is bytes:
            new += encode_exactly(b"".join(run).decode(), receiver)  # type: ignore[arg-type]
        else:
            new += [None if unit is None else receiver.eos_ids[0] for unit in run]
    filler = None if not ids or ids[-1] is None else receiver.eos_ids[0]
    while new and new[-1] == filler:
        new.pop()
    return new + [filler] * (length - len(new)) if len(new) <= length else None


BROKEN = "\ufffd".encode()


def spell(ids: list[int | None], member: Member) -> list[bytes | str | None]:
    """The bytes of each token, "EOS" for an EOS, None for a mask. A token that holds part of a
    character whose rest is masked becomes None too: the receiver decodes it again."""
    codec = member.codec
    text = [i for i in ids if i is not None and i not in member.eos_ids]
    pieces = {i: codec.decode([i]) for i in text}
    whole = codec.decode(text)
    raw = isinstance(whole, bytes) and whole == b"".join(pieces[i] for i in text)
    for i, piece in pieces.items():  # U+FFFD stands for a broken character, unless it is a token
        raw = raw and (BROKEN not in piece or codec.encode(piece.decode(errors="replace")) == [i])
    require(raw, f"{member}: codec.decode must return each token's raw bytes, got {whole!r:.40}")
    units = [None if i is None else "EOS" if i in member.eos_ids else pieces[i] for i in ids]
    while True:
        parts = [unit if isinstance(unit, bytes) else b" " for unit in units]
        try:
            b"".join(parts).decode()
            return units
        except UnicodeDecodeError as error:
            # Drop the tokens that hold the broken bytes. That may break their neighbours.
            owner = [k for k, part in enumerate(parts) for _ in part]
            broken = set(owner[error.start : error.end])
            units = [None if k in broken else unit for k, unit in enumerate(units)]


def encode_exactly(text: str, member: Member) -> list[int]:
    """The ids of exactly this text. Raises ValueError if they decode to any other text."""
    ids = member.codec.encode(text)
    back = member.codec.decode(ids)
    good = back == text.encode() and not {member.mask_id, *member.eos_ids} & {*ids}
    wanted = f"codec.encode must round-trip text and add no mask or EOS: {text!r:.40}"
    require(good, f"{member}: {wanted} becomes {ids!r:.40}, {back!r:.40}")
    return ids


# --- checks of the caller's input -----------------------------------------------------------------


def check(members: Sequence[Member], canvases: Sequence[Canvas]) -> None:
    M = len(members)
    require(0 < M == len(canvases), f"expected one canvas per member, got {len(canvases)} for {M}")
    for member, canvas in zip(members, canvases):
        ids = (member.mask_id, *member.eos_ids)
        good = len(ids) > 1 and all(isinstance(i, int) for i in ids)
        good = good and member.mask_id not in member.eos_ids
        given = f"{member.mask_id!r} and {member.eos_id!r}"
        require(good, f"{member}: mask_id and eos_id must be different token ids, got {given}")
        check_canvas(member, canvas)
    for (a, x), (b, y) in combinations(zip(members, canvases), 2):
        require(len(x.tokens) == len(y.tokens), f"{a} and {b} must have the same batch size")
        if a.codec is not b.codec:
            require(a.codec and b.codec, f"{a} and {b} must both have a codec, or neither")
            continue
        same = (a.mask_id, {*a.eos_ids}) == (b.mask_id, {*b.eos_ids})
        require(same, f"{a} and {b} differ in mask_id or eos_id: give each a codec")
        same = (x.tokens.shape, x.reasoning, x.answer) == (y.tokens.shape, y.reasoning, y.answer)
        require(same, f"{a} and {b} share a vocabulary: their canvases need the same layout")


def check_canvas(member: Member, canvas: Canvas) -> None:
    tokens = canvas.tokens
    given = f"{tuple(tokens.shape)} {tokens.dtype}"
    good = tokens.dim() == 2 and tokens.dtype == torch.int64
    require(good, f"{member}: canvas.tokens must be (B, L) torch.int64, got {given}")
    for name in ("masked", "attention_mask"):
        flags = getattr(canvas, name)
        good = flags is None or (flags.shape == tokens.shape and flags.dtype == torch.bool)
        require(good, f"{member}: canvas.{name} must be torch.bool with the shape of its tokens")
    regions = (canvas.reasoning, canvas.answer)
    bounds = [bound for region in regions for bound in (region.start, region.stop)]
    edges = [0, *bounds, tokens.shape[1]]
    good = None not in bounds and edges == sorted(edges)
    wanted = f"slices within {tokens.shape[1]} positions, in this order"
    require(good, f"{member}: reasoning and answer must be {wanted}, got bounds {bounds}")
    outside = canvas.masked.clone()
    outside[:, canvas.reasoning] = False
    outside[:, canvas.answer] = False
    require(
        not outside.any(), f"{member}: canvas.masked must be false outside reasoning and answer"
    )


def check_logits(member: Member, logits: Tensor, positions: Tensor) -> None:
    good = logits.dim() == 3 and logits.shape[:2] == positions.shape and logits.is_floating_point()
    good = good and logits.device == positions.device
    wanted = f"float logits {(*positions.shape, 'V')} on {positions.device}"
    given = f"{tuple(logits.shape)} {logits.dtype} on {logits.device}"
    require(good, f"{member} must give {wanted}, got {given}")
    for i in (member.mask_id, *member.eos_ids):
        require(
            0 <= i < logits.shape[2],
            f"{member}: id {i} is outside its vocabulary of {logits.shape[2]}",
        )
