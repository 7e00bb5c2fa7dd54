"""mdlm.Cached against a slow cache that computes one position of one row at a time, and as a member of an ensemble."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mdlm import TOY, build, configs

import mdlm
import tie

V, MASK = TOY.vocab_size, TOY.mask_id


class SlowCache:
    """One row: keys and values (L, G, E) of each layer, and the tokens and padding that they were made of."""

    def __init__(self, model, tokens, real):
        self.model, self.tokens, self.real, self.calls = model, tokens.clone(), real, 0
        self.kept = [([None] * len(tokens), [None] * len(tokens)) for _ in model.layers]

    def compute(self, at):
        """Logits by position, of the outputs at `at`, whose keys and values are made anew."""
        model, c = self.model, self.model.config
        E, numbers = c.width // c.heads, self.real.long().cumsum(0) - 1
        x = {p: model.embed.weight[self.tokens[p]] for p in at}
        for block, (keys, values) in zip(model.layers, self.kept):
            y = {p: block.attn_norm(x[p]) for p in at}
            for p in at:
                keys[p] = turn(block.k(y[p]).view(-1, E), numbers[p], c.rope_theta)
                values[p] = block.v(y[p]).view(-1, E)
            seen = [p for p in range(len(self.tokens)) if self.real[p]]
            k, v = (torch.stack([z[p] for p in seen]) for z in (keys, values))
            k, v = (z.repeat_interleave(c.heads // c.kv_heads, 1) for z in (k, v))
            for p in at:
                q = turn(block.q(y[p]).view(-1, E), numbers[p], c.rope_theta)  # (H, E)
                weights = (torch.einsum("he,lhe->hl", q, k) / math.sqrt(E)).softmax(1)
                x[p] = x[p] + block.o(torch.einsum("hl,lhe->he", weights, v).flatten())
                z = block.mlp_norm(x[p])
                x[p] = x[p] + block.down(torch.nn.functional.silu(block.gate(z)) * block.up(z))
        return {p: model.head(model.norm(x[p])) for p in at}

    def call(self, tokens, positions, refresh):
        outputs = [p - 1 if self.model.config.shift and p and self.real[p - 1] else p for p in positions.tolist()]
        at = {*outputs, *positions.tolist(), *(tokens != self.tokens).nonzero()[:, 0].tolist()}
        if self.calls % refresh == 0:
            at = range(len(tokens))
        self.tokens, self.calls = tokens.clone(), self.calls + 1
        logits = self.compute([*at])
        return torch.stack([logits[p] for p in outputs]), len(at)


def turn(x, number, theta):
    """Component i as a complex number with i + E/2, turned by its frequency."""
    first, second = x.double().chunk(2, -1)
    frequency = theta ** (-torch.arange(first.shape[-1]).double() / first.shape[-1])
    y = torch.complex(first, second) * torch.polar(torch.ones_like(frequency), number * frequency)
    return torch.cat([y.real, y.imag], -1).float()


def start(generator, B, L=9, fixed=4):
    """Tokens (B, L), of which the first `fixed` never change, the others are masked; padding of any number of these."""
    tokens = torch.randint(MASK, (B, L), generator=generator)
    tokens[:, fixed:] = MASK
    return tokens, torch.arange(L) >= torch.randint(fixed, (B, 1), generator=generator)


def changed(tokens, generator, fixed=4):
    """Each other token is replaced by any, the mask among them, with a probability of the row's own."""
    some = torch.rand(tokens.shape, generator=generator) < torch.rand(len(tokens), 1, generator=generator) ** 2
    some[:, :fixed] = False
    new = torch.where(some, torch.randint(V, tokens.shape, generator=generator), tokens)
    new[0, -1] = 0  # never as at the first call, which begins a new batch
    return new


@settings(max_examples=25)
@given(config=configs, seed=st.integers(0, 999), B=st.integers(1, 3), refresh=st.integers(1, 4), padded=st.booleans())
@torch.no_grad()
def test_equals_the_slow_cache_row_by_row(config, seed, B, refresh, padded):
    model, generator = build(config, seed), torch.Generator().manual_seed(seed)
    cached, embedded = mdlm.Cached(model, refresh), []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output.shape[1]))
    for _ in range(2):  # a second batch of the same layout, after the first
        tokens, real = start(generator, B)
        real = real if padded else torch.ones_like(real)
        slow = [SlowCache(model, *row) for row in zip(tokens, real)]
        for _ in range(6):
            positions = torch.randint(4, 9, (B, 3), generator=generator)
            expected, computed = zip(*[row.call(*state, refresh) for row, state in zip(slow, zip(tokens, positions))])
            logits = cached(tokens, positions, real if padded else None)
            torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
            assert embedded.pop() == max(computed)  # nothing more than the row that changed most asks for
            tokens = changed(tokens, generator)


@given(config=configs, seed=st.integers(0, 99))
@torch.no_grad()
def test_refreshed_at_every_call_it_is_the_model(config, seed):
    model, generator = build(config, seed), torch.Generator().manual_seed(seed)
    cached = mdlm.Cached(model, refresh=1)
    tokens, real = start(generator, 2)
    for _ in range(3):
        positions = torch.randint(9, (2, 4), generator=generator)
        torch.testing.assert_close(cached(tokens, positions, real), model(tokens, positions, real), atol=1e-6, rtol=0)
        tokens = changed(tokens, generator)


@pytest.mark.parametrize("new", ["prompt", "start", "padding", "length", "rows"])
@torch.no_grad()
def test_another_batch_or_layout_begins_anew(new):
    model, generator = build(TOY, 1), torch.Generator().manual_seed(1)
    cached, positions = mdlm.Cached(model, refresh=100), torch.tensor([[4, 6], [5, 8]])
    tokens, real = first, _ = start(generator, 2)
    for _ in range(3):
        cached(tokens, positions, real)
        tokens = changed(tokens, generator)
    if new == "prompt":
        tokens[1, 3] = (tokens[1, 3] + 1) % MASK
    elif new == "start":
        tokens = first
    elif new == "padding":
        real = real ^ (torch.arange(9) == 0)
    elif new == "length":
        tokens, real = tokens[:, 1:], real[:, 1:]
        positions = positions - 1
    else:
        tokens, real, positions = tokens[:1], real[:1], positions[:1]
    torch.testing.assert_close(cached(tokens, positions, real), model(tokens, positions, real))
    assert cached.calls == 1  # and the count of calls too


def dual_cache(model, canvas, block_size):
    """Fast-dLLM's: whole at each block's start, then its block alone, over keys and values as they stood there."""
    tokens = canvas.tokens[0].clone()
    slow = SlowCache(model, tokens, torch.ones(len(tokens), dtype=torch.bool))
    for region in (canvas.reasoning, canvas.answer):
        for at in range(region.start, region.stop, block_size):
            block = list(range(at, min(at + block_size, region.stop)))
            masked, every = set(block), list(range(len(tokens)))
            while masked:
                slow.tokens = tokens
                logits = slow.compute(every if len(masked) == len(block) else block)
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


def ensemble(models, prompts, refresh, inference=False, **config):
    wrapped = [model if refresh is None else mdlm.Cached(model, refresh) for model in models]
    members = [tie.Member(model, MASK, (8, 9)) for model in wrapped]
    canvas = tie.Canvas.blank(prompts, [1], 8, 4, mask_id=MASK, pad_id=8)
    with torch.inference_mode(inference):
        result = tie.ensemble(members, [canvas, canvas], tie.Config(block_size=4, **config))
    lengths = [canvas.tokens.shape[1] - len(prompt) - 13 for prompt in prompts]  # of the padding
    rows = [[c.tokens[b, n:].tolist() for c in result.candidates] for b, n in enumerate(lengths)]
    return rows, result.leaders.tolist()


@settings(max_examples=6)
@given(seed=st.integers(0, 999), score=st.sampled_from(tie.SCORES), shift=st.booleans())
def test_in_an_ensemble(seed, score, shift):
    models = [build(replace(TOY, shift=shift), s) for s in (seed, seed + 1)]
    prompts = [[3, 4, 5], [6], [7, 2]]
    exact = ensemble(models, prompts, None, interval=3, score=score)
    assert ensemble(models, prompts, 1, interval=3, score=score) == exact
    cached = ensemble(models, prompts, 3, interval=3, score="token_change_count")
    assert cached == ensemble(models, prompts, 3, inference=True, interval=3, score="token_change_count")
    alone = [ensemble(models, [prompt], 3, interval=3, score="token_change_count") for prompt in prompts]
    assert cached[0] == [rows[0] for rows, _ in alone]


@torch.no_grad()
def test_what_is_kept_outlives_an_inference_mode_and_inputs_stay_as_they_are():
    model, generator = build(TOY, 2), torch.Generator().manual_seed(2)
    cached, (tokens, real) = mdlm.Cached(model, refresh=9), start(generator, 2)
    positions = torch.tensor([[4], [5]])
    with torch.inference_mode():
        cached(tokens, positions, real)
    before, later = (tokens.clone(), real.clone()), changed(tokens, generator)
    logits = cached(later, positions, real)
    assert not logits.requires_grad
    assert torch.equal(tokens, before[0])
    assert torch.equal(real, before[1])
    tokens[:] = later[:] = real[:] = 0  # the caller's, to write into: nothing kept is an alias
    assert torch.equal(cached.first, before[0])
    assert torch.equal(cached.real, before[1])
    assert not torch.equal(cached.tokens, later)


@torch.no_grad()
def test_under_autocast_it_keeps_what_a_later_call_can_write_to():
    model, (tokens, real) = build(TOY, 3), start(torch.Generator().manual_seed(3), 2)
    positions = torch.tensor([[4], [5]])
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = mdlm.Cached(model, refresh=9)(tokens, positions, real), model(tokens, positions, real)
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_another_batch_frees_the_last_one_first(monkeypatch):
    cached, (tokens, real) = mdlm.Cached(build(TOY, 4), refresh=9), start(torch.Generator().manual_seed(4), 2)
    cached(tokens, tokens[:, :1] * 0 + 5, real)
    kept, new_zeros = weakref.ref(cached.kept[0][0]), torch.Tensor.new_zeros
    alive = []
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda *x: alive.append(kept() is not None) or new_zeros(*x))
    cached(tokens[:1], tokens[:1, :1] * 0 + 5, real[:1])
    assert alive[0] is False


@pytest.mark.parametrize("refresh", [0, -1, 2.0, True, None, "4"])
def test_refresh_is_a_number_of_calls(refresh):
    with pytest.raises(ValueError, match="refresh must be a whole number of at least 1"):
        mdlm.Cached(build(TOY), refresh)


def test_needs_an_mdlm():
    with pytest.raises(ValueError, match="needs an MDLM, whose layers it knows, not function"):
        mdlm.Cached(lambda *inputs: None, 2)
