"""mdlm.Cached against a slow cache that computes one position at a time, and in an ensemble."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mdlm import TOY, build, configs

import mdlm
import tie

V = TOY.vocab_size
MASK = TOY.mask_id


class SlowCache:
    """The cache of one row: keys and values by layer and position, as last computed."""

    def __init__(self, model, tokens, real):
        self.model = model
        self.tokens = tokens.clone()
        self.real = real
        self.calls = 0
        self.keys = [{} for _ in model.layers]
        self.values = [{} for _ in model.layers]

    def compute(self, at):
        """Logits by position from the outputs at `at`, whose keys and values are recomputed."""
        model = self.model
        c = model.config
        E = c.head_dim or c.width // c.heads
        numbers = self.real.long().cumsum(0) - 1
        seen = self.real.nonzero()[:, 0].tolist()
        x = {p: model.embed.weight[self.tokens[p]] for p in at}
        for block, keys, values in zip(model.layers, self.keys, self.values):
            y = {p: block.attn_norm(x[p]) for p in at}
            for p in at:
                keys[p] = turn(block.k_norm(block.k(y[p]).view(-1, E)), numbers[p], c.rope_theta)
                values[p] = block.v(y[p]).view(-1, E)
            k, v = (torch.stack([z[p] for p in seen]) for z in (keys, values))
            k, v = (z.repeat_interleave(c.heads // c.kv_heads, 1) for z in (k, v))
            for p in at:
                q = block.q_norm(block.q(y[p]).view(-1, E))  # (H, E)
                q = turn(q, numbers[p], c.rope_theta)
                weights = (torch.einsum("he,lhe->hl", q, k) / math.sqrt(E)).softmax(1)
                x[p] = x[p] + block.o(torch.einsum("hl,lhe->he", weights, v).flatten())
                z = block.mlp_norm(x[p])
                x[p] = x[p] + block.down(torch.nn.functional.silu(block.gate(z)) * block.up(z))
        return {p: model.head(model.norm(x[p])) for p in at}

    def call(self, tokens, positions, refresh):
        """Logits (K, V), and the positions that had to be computed for them."""
        shift = self.model.config.shift
        positions = positions.tolist()
        outputs = [p - 1 if shift and p and self.real[p - 1] else p for p in positions]
        at = {*outputs, *positions, *(tokens != self.tokens).nonzero()[:, 0].tolist()}
        if self.calls % refresh == 0:
            at = range(len(tokens))
        self.tokens = tokens.clone()
        self.calls += 1
        logits = self.compute([*at])
        return torch.stack([logits[p] for p in outputs]), [*at]


def turn(x, number, theta):
    """Components i and i + E/2 as a complex number, turned by its frequency."""
    first, second = x.double().chunk(2, -1)
    frequency = theta ** (-torch.arange(first.shape[-1]).double() / first.shape[-1])
    y = torch.complex(first, second) * torch.polar(torch.ones_like(frequency), number * frequency)
    return torch.cat([y.real, y.imag], -1).float()


def start(generator, B, L=9, fixed=4):
    """Tokens (B, L) that are masked after the first `fixed`, some of which are padding."""
    tokens = torch.randint(MASK, (B, L), generator=generator)
    tokens[:, fixed:] = MASK
    return tokens, torch.arange(L) >= torch.randint(fixed, (B, 1), generator=generator)


def changed(tokens, generator, fixed=4):
    """Some tokens after the fixed ones change, also to masks; each row has its own rate."""
    rate = torch.rand(len(tokens), 1, generator=generator) ** 2
    some = torch.rand(tokens.shape, generator=generator) < rate
    some[:, :fixed] = False
    new = torch.where(some, torch.randint(V, tokens.shape, generator=generator), tokens)
    new[0, -1] = 0  # never the tokens of the first call, which would start a new batch
    return new


@settings(max_examples=25)
@given(
    config=configs,
    seed=st.integers(0, 999),
    B=st.integers(1, 3),
    refresh=st.integers(1, 4),
    padded=st.booleans(),
)
@torch.no_grad()
def test_equals_the_slow_cache_row_by_row(config, seed, B, refresh, padded):
    model = build(config, seed)
    generator = torch.Generator().manual_seed(seed)
    cached = mdlm.Cached(model, refresh)
    work = []
    model.embed.register_forward_hook(lambda _, inputs, output: work.append(output.shape[1]))
    for _ in range(2):  # two batches of the same layout
        tokens, real = start(generator, B)
        real = real if padded else torch.ones_like(real)
        slow = [SlowCache(model, *row) for row in zip(tokens, real)]
        for _ in range(6):
            positions = torch.randint(4, 9, (B, 3), generator=generator)
            rows = zip(slow, tokens, positions)
            expected, computed = zip(*[row.call(*state, refresh) for row, *state in rows])
            logits = cached(tokens, positions, real if padded else None)
            torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
            # No more than the row with the most changes needs. Padding is computed but not counted.
            assert work.pop() == max(map(len, computed))
            counts = [int(row[at].sum()) for row, at in zip(real, computed)]
            assert cached.computed.tolist() == counts
            tokens = changed(tokens, generator)


@pytest.mark.parametrize("new", ["prompt", "start", "padding", "length", "rows"])
@torch.no_grad()
def test_another_batch_or_layout_recomputes_everything(new):
    model = build(TOY, 1)
    generator = torch.Generator().manual_seed(1)
    cached = mdlm.Cached(model, refresh=100)
    first, real = start(generator, 2)
    tokens = first.clone()
    for at in (8, 7):  # leaves keys in the cache that are outdated for all of the calls below
        cached(tokens, torch.tensor([[5, 6], [5, 6]]), real)
        tokens = tokens.clone()
        tokens[:, at] = 3
    cached(tokens, torch.tensor([[5, 6], [5, 6]]), real)
    positions = torch.tensor([[4], [4]])
    call = {
        "prompt": (tokens + (torch.arange(9) == 3), positions, real),
        "start": (first, positions, real),
        "padding": (tokens, positions, real ^ (torch.arange(9) == 0)),
        "length": (tokens[:, 1:], positions - 1, real[:, 1:]),
        "rows": (tokens[:1], positions[:1], real[:1]),
    }[new]
    torch.testing.assert_close(cached(*call), model(*call))


def dual_cache(model, canvas, block_size):
    """Fast-dLLM's cache: everything at the start of each block, then only the block."""
    tokens = canvas.tokens[0].clone()
    slow = SlowCache(model, tokens, torch.ones(len(tokens), dtype=torch.bool))
    for region in (canvas.reasoning, canvas.answer):
        for at in range(region.start, region.stop, block_size):
            block = list(range(at, min(at + block_size, region.stop)))
            masked = set(block)
            while masked:
                slow.tokens = tokens
                whole = len(masked) == len(block)
                logits = slow.compute(list(range(len(tokens))) if whole else block)
                best = {p: logits[p].softmax(0)[:MASK].max(0) for p in masked}
                p = max(masked, key=lambda p: best[p].values)
                tokens[p] = best[p].indices
                masked.remove(p)
    return tokens


@settings(max_examples=15)
@given(seed=st.integers(0, 999), W=st.integers(2, 4), layers=st.integers(1, 3))
@torch.no_grad()
def test_refreshed_at_each_block_it_is_the_dual_cache(seed, W, layers):
    model = build(replace(TOY, layers=layers), seed)
    prompt = torch.randint(MASK, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    canvas = tie.Canvas.blank([prompt], [1, 2], 2 * W, W, mask_id=MASK, pad_id=8)
    member = tie.Member(mdlm.Cached(model, refresh=W), MASK, 8)
    decoded = tie.decode(member, canvas, tie.Config(block_size=W))
    assert decoded.tokens[0].tolist() == dual_cache(model, canvas, W).tolist()


def ensemble(models, prompts, refresh, **settings):
    """Candidates without padding, by row and member."""
    denoisers = [mdlm.Cached(model, refresh) if refresh else model for model in models]
    members = [tie.Member(denoise, MASK, (8, 9)) for denoise in denoisers]
    canvas = tie.Canvas.blank(prompts, [1], 8, 4, mask_id=MASK, pad_id=8)
    config = tie.Config(block_size=4, interval=3, **settings)
    candidates = tie.ensemble(members, [canvas, canvas], config).candidates
    starts = [canvas.reasoning.start - len(prompt) for prompt in prompts]
    return [[c.tokens[b, at:].tolist() for c in candidates] for b, at in enumerate(starts)]


@settings(max_examples=6)
@given(
    seed=st.integers(0, 999),
    score=st.sampled_from(tie.SCORES),
    shift=st.booleans(),
    stop_at_eos=st.booleans(),
)
def test_in_an_ensemble(seed, score, shift, stop_at_eos):
    models = [build(replace(TOY, shift=shift), s) for s in (seed, seed + 1)]
    prompts = [[3, 4, 5], [6], [7, 2]]
    run = partial(ensemble, models, stop_at_eos=stop_at_eos)
    assert run(prompts, 1, score=score) == run(prompts, None, score=score)
    alone = [run([prompt], 3)[0] for prompt in prompts]
    assert run(prompts, 3) == alone


@torch.no_grad()
def test_it_outlives_inference_mode_and_shares_no_memory_with_its_inputs():
    model = build(TOY, 2)
    generator = torch.Generator().manual_seed(2)
    tokens, real = start(generator, 2)
    later = changed(tokens, generator)
    positions = torch.tensor([[4], [5]])
    results = []
    for overwrite in (False, True):
        cached = mdlm.Cached(model, refresh=9)
        mine = tokens.clone()
        mask = real.clone()
        with torch.inference_mode():
            cached(mine, positions, mask)
        assert torch.equal(mine, tokens)
        if overwrite:
            mine.zero_()
            mask.zero_()
        results.append(cached(later, positions, real))
    assert not results[0].requires_grad
    assert torch.equal(*results)


@pytest.mark.parametrize("refresh", [0, 2.0, True, None])
def test_refresh_is_a_number_of_calls(refresh):
    with pytest.raises(ValueError, match="refresh must be a whole number of at least 1, got"):
        mdlm.Cached(build(TOY), refresh)


def test_needs_an_mdlm():
    with pytest.raises(ValueError, match="model must be an MDLM, got function"):
        mdlm.Cached(lambda *inputs: None, 2)
