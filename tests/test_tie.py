"""Properties of the algorithm in tie.py, and mistakes that people make."""

import math
import re
from collections import namedtuple
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import combinations, product, takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    LONG,
    NEAR,
    NEVER,
    SHORT,
    Constant,
    Fake,
    Watched,
    blank,
    member,
    padding,
    units_of,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mdlm
import tie
from tie import Canvas, Config, Member

SCORES = tie.SCORES


def entropy_bound(gamma):
    """Takes positions in order of entropy while those before them sum to at most gamma nats."""

    def rule(reading):
        entropy, order = reading.entropy.masked_fill(~reading.masked, math.inf).sort(stable=True)
        chosen = entropy.cumsum(1) - entropy <= gamma  # (B, W)
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    return rule


def even_tokens(reading):
    return (reading.token % 2 == 0) & (reading.confidence > 0.4)


QUOTAS = [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"threshold": 0.4}, {"threshold": 0.9},
    {"commit": entropy_bound(0.7)}, {"commit": entropy_bound(2.0)}, {"commit": even_tokens},
    {"commit": lambda reading: reading.margin > 0.5},
]  # fmt: skip
SEED = st.integers(0, 2) | st.integers(0, 10**6)  # members may be alike
Problem = namedtuple("Problem", "members canvases config")
near = partial(torch.allclose, rtol=1e-4, atol=NEAR, equal_nan=True)


def configs(**fixed):
    choices = {
        "interval": st.sampled_from([1, 2, 3, 3, 4, 5, 99]),
        "block_size": st.integers(1, 6),
        "score": st.sampled_from(SCORES),
        "cross_model": st.booleans(),
        "normalize": st.booleans(),
        "answer_window": st.none() | st.integers(1, 4),
        "stop_at_eos": st.booleans(),
        "quota": st.sampled_from(QUOTAS),
    }
    return st.builds(lambda quota, **others: Config(**others | quota | fixed), **choices)


@st.composite
def problems(draw, members=(1, 2, 2, 3), mixed=True, **fixed):
    """Members of one vocabulary, or perhaps of two if `mixed`. Some canvases are not blank."""
    M = draw(st.sampled_from(members))
    B = draw(st.integers(1, 2))
    codecs = draw(st.lists(st.sampled_from([SHORT, LONG]), min_size=M, max_size=M))
    codecs = codecs if mixed else codecs[:1] * M
    common = {}
    for codec in dict.fromkeys(codecs):
        tokens = st.integers(0, len(codec.pieces) - 1)  # mask and EOS too
        mask_id, *ends = draw(st.permutations(codec.special))
        prompts = draw(st.lists(st.lists(tokens, max_size=4), min_size=B, max_size=B))
        suffix = draw(st.lists(tokens, max_size=2))
        lengths = draw(st.sampled_from([(8, 6), (6, 5), (5, 7), (3, 2), (1, 1), (5, 0), (0, 6)]))
        ids = {"mask_id": mask_id, "pad_id": draw(tokens)}
        eos_id = draw(st.sampled_from([ends[0], tuple(ends)]))
        common[codec] = mask_id, eos_id, ends, Canvas.blank(prompts, suffix, *lengths, **ids)
    begun = draw(st.integers(0, 3)) == 0
    problem = Problem([], [], draw(configs(**fixed)))
    for codec in codecs:
        mask_id, eos_id, ends, canvas = common[codec]
        seed = draw(SEED)
        fake = Fake(seed, len(codec.pieces), mask_id, ends[seed % 2])
        problem.members.append(Member(fake, mask_id, eos_id, f"m{seed}", codec))
        problem.canvases.append(begin(canvas, seed) if begun else canvas)
    return problem


def begin(canvas, seed):
    """The canvas with some tokens committed, text under masks, and a prompt of the member's own."""
    committed = torch.rand(canvas.masked.shape, generator=torch.manual_seed(seed)) < 0.3
    tokens = canvas.tokens.masked_fill(canvas.masked, 2 + seed % 5)
    tokens[:, : canvas.reasoning.start] = seed % 9
    return replace(canvas, tokens=tokens, masked=canvas.masked & ~committed)


def one_row(canvas, b):
    """Row b alone, without its padding."""
    pad = padding(canvas, b)
    regions = [slice(x.start - pad, x.stop - pad) for x in (canvas.reasoning, canvas.answer)]
    return Canvas(canvas.tokens[b : b + 1, pad:], canvas.masked[b : b + 1, pad:], *regions)


def small(codecs=(SHORT, SHORT), lengths=(8, 6), **settings):
    """One member per codec and two questions of 14 masks."""
    pairs = [(member(codec, seed), blank(codec, *lengths)) for seed, codec in enumerate(codecs, 1)]
    return Problem(*map(list, zip(*pairs)), Config(**settings))


def saying(logits):
    return Member(Constant(logits), 0, 1)


def fixed(canvas):
    """(L,) the positions of prompt and suffix."""
    outside = torch.ones(canvas.tokens.shape[1], dtype=torch.bool)
    outside[canvas.reasoning] = False
    outside[canvas.answer] = False
    return outside


def same(one, other):
    for a, b in zip(one.candidates, other.candidates, strict=True):
        assert torch.equal(a.tokens, b.tokens)
    for name in ("winner", "leaders", "scores", "top1"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.forwards, one.not_relayed) == (other.forwards, other.not_relayed)


# --- the whole ------------------------------------------------------------------------------------


@given(problems())
def test_a_batch_gives_each_row_what_it_gets_alone_without_padding(problem):
    whole = tie.ensemble(*problem)
    for b in range(len(whole.winner)):
        canvases = [one_row(canvas, b) for canvas in problem.canvases]
        alone = tie.ensemble(problem.members, canvases, problem.config)
        relays = len(alone.leaders)
        for mine, theirs in zip(alone.candidates, whole.candidates):
            assert units_of(mine, 0) == units_of(theirs, b)
        assert torch.equal(alone.leaders[:, 0], whole.leaders[:relays, b])
        assert (whole.leaders[relays:, b] == -1).all()
        assert near(alone.scores[:, :, 0], whole.scores[:relays, :, b])
        assert near(alone.tcc[:, 0], whole.tcc[:, b]) and near(alone.top1[:, 0], whole.top1[:, b])
        assert alone.winner[0] == whole.winner[b]


@given(problems(), st.booleans())
def test_prompts_of_mask_ids_and_the_canvases_given_stay_as_they_are(problem, complete):
    for canvas, m in zip(problem.canvases, problem.members):
        canvas.masked &= not complete
        canvas.tokens[:, fixed(canvas)] = m.mask_id
    before = deepcopy(problem.canvases)
    for canvas, got in zip(before, tie.ensemble(*problem).candidates):
        assert got.complete.all()
        assert torch.equal(got.tokens[:, fixed(canvas)], canvas.tokens[:, fixed(canvas)])
        got.tokens.fill_(3)
        got.masked.fill_(True)
    for canvas, kept in zip(problem.canvases, before):
        assert torch.equal(canvas.tokens, kept.tokens) and torch.equal(canvas.masked, kept.masked)


@given(problems(interval=99))
def test_without_a_relay_each_member_decodes_as_it_does_alone(problem):
    result = tie.ensemble(*problem)
    assert len(result.leaders) == len(result.scores) == 0
    for one, canvas, got in zip(problem.members, problem.canvases, result.candidates):
        assert torch.equal(got.tokens, tie.decode(one, canvas, problem.config).tokens)


@pytest.mark.parametrize("score", SCORES)
def test_on_round_sees_copies_of_what_the_result_says(score):
    seen = []

    def on_round(state):
        seen.append(deepcopy(state))
        for part in (*state["tokens"], *state["masked"], state["scores"], state["leader"]):
            part.zero_()

    problem = small(score=score, interval=4)
    result = tie.ensemble(*problem, on_round)
    same(result, tie.ensemble(*problem))
    assert [(state["round"], state["step"]) for state in seen] == [(0, 4), (1, 8), (2, 12), (3, 14)]
    assert torch.equal(torch.stack([state["leader"] for state in seen[:-1]]), result.leaders)
    assert torch.equal(torch.stack([state["scores"] for state in seen[:-1]]), result.scores)
    assert (seen[-1]["leader"] == -1).all() and (seen[-1]["scores"] == NEVER).all()
    for m, got in enumerate(result.candidates):
        assert torch.equal(seen[-1]["tokens"][m], got.tokens)
        assert [state["masked"][m].sum() for state in seen] == [20, 12, 4, 0]


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants, steps", [(False, 14), (True, 3)])
def test_a_rule_sees_every_step_and_decoding_ends_whatever_it_wants(wants, steps):
    seen = []
    blocks = []

    def rule(reading):
        seen.append(reading.member)
        blocks.append(reading.positions[0, reading.masked[0]].tolist())
        return torch.full_like(reading.masked, wants)

    members, canvases, config = small(block_size=6, interval=99, commit=rule)
    result = tie.ensemble(members, canvases, config)
    assert seen == [0, 1] * steps and result.forwards == 2 * steps
    plain = tie.decode(members[0], canvases[0], Config(block_size=6, top_k=6 if wants else 1))
    assert torch.equal(result.candidates[0].tokens, plain.tokens)
    start = canvases[0].reasoning.start
    answer = canvases[0].answer
    expected = [
        range(start, start + 6),
        range(start + 6, start + 8),
        range(answer.start, answer.stop),
    ]
    assert not wants or blocks[::2] == [list(block) for block in expected]


def test_confidences_are_those_of_the_whole_softmax():
    """Without the mask token they would be 0.9 and 0.4, in the other order."""
    p = torch.tensor([[0.6, 0.36, 0.02, 0.02], [0.0001, 0.4, 0.2999, 0.3]])  # two positions, mask 0
    one = Member(lambda x, positions, _: p.log()[(positions - 2).clamp(0, 1)], 0, 3)
    canvas = Canvas.blank([[1, 2]], [], 2, 0, mask_id=0, pad_id=3)
    states = []
    tie.ensemble([one], [canvas], Config(interval=1), states.append)
    assert states[0]["masked"][0].tolist() == [[False, False, True, False]]


def test_a_threshold_must_be_exceeded_and_equal_confidences_go_to_the_lower_position():
    canvas = Canvas.blank([[1]], [], 4, 0, mask_id=0, pad_id=1)
    half = saying([-1e4, 0, 0])  # two tokens of probability one half
    left = []
    for tau in (0.5, 0.49):
        config = Config(threshold=tau, interval=1)
        tie.ensemble([half], [canvas], config, left.append)
    assert [state["round"] for state in left] == [0, 1, 2, 3, 0]
    assert [state["masked"][0].tolist() for state in left] == [
        [[False] * (5 - n) + [True] * n] for n in (3, 2, 1, 0, 0)
    ]


@pytest.mark.parametrize("score", SCORES[:2])
@pytest.mark.parametrize("logits", [[50, 1, 2, 0], [0, 5, 1, 1], [0] * 4, [0, -1e9, -1e9, -1e9]])
def test_models_that_adore_the_mask_or_eos_end_too(logits, score):
    canvas = Canvas.blank([[1, 2], [3]], [2], 5, 4, mask_id=0, pad_id=3)
    members = [saying(logits), saying([0, 1, 4, 2])]
    for M, quota in product((1, 2), QUOTAS[::2]):
        config = Config(interval=2, block_size=3, score=score, **quota)
        for got in tie.ensemble(members[:M], [canvas] * M, config).candidates:
            assert got.complete.all() and (got.tokens[canvas.masked] != 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_nan_where_nothing_is_read_does_no_harm(score):
    members, (canvas, _), config = small(score=score, interval=2, block_size=12)

    def nan_in_prompt(tokens, positions, _):  # the first block's window covers it
        logits = torch.eye(10)[5].expand(*positions.shape, -1)
        return logits.masked_fill((positions < canvas.reasoning.start)[..., None], math.nan)

    canvas.masked[1, canvas.answer] = False  # the second row is done earlier
    members[1] = replace(members[1], denoise=nan_in_prompt)
    result = tie.ensemble(members, [canvas] * 2, config)
    assert all(got.complete.all() for got in result.candidates)


def test_probabilities_are_float32_and_large_vocabularies_read_in_parts_give_the_same():
    logits = torch.randn(3, 1, 2**21, generator=torch.manual_seed(0)).bfloat16()
    logits = logits.expand(3, 5, 2**21)
    token, f = tie.predict(logits, 7, ["negative_entropy"])
    assert set(f) == {"top1_probability", "negative_entropy"}
    for b in range(3):
        one, g = tie.predict(logits[b : b + 1].float(), 7, SCORES)
        assert torch.equal(one[0], token[b])
        assert all(torch.equal(g[name][0], f[name][b]) for name in f)


def over(canvas, b, eos_ids):
    """Whether row b is complete or has an EOS in its answer and no mask before it."""
    first_mask = [*canvas.masked[b].tolist(), True].index(True)
    settled = canvas.tokens[b, canvas.answer.start : first_mask].tolist()
    return not canvas.masked[b].any() or not {*eos_ids}.isdisjoint(settled)


@given(problems(members=[1], stop_at_eos=True))
def test_stopping_at_eos_keeps_the_text_and_cuts_plain_decoding_short(problem):
    (one,), (canvas,), config = problem
    states = [canvas]

    def on_round(state):
        states.append(replace(canvas, tokens=state["tokens"][0], masked=state["masked"][0]))

    tie.ensemble([one], [canvas], replace(config, interval=1, stop_at_eos=False), on_round)
    stopped = tie.ensemble(*problem)
    steps = []
    for b, got in enumerate(stopped.candidates[0].tokens):
        steps.append([over(state, b, one.eos_ids) for state in states].index(True))
        last = states[steps[b]]
        assert torch.equal(got, last.tokens[b].masked_fill(last.masked[b], one.eos_ids[0]))
        texts = [
            [*takewhile(lambda i: i not in one.eos_ids, tokens[canvas.answer].tolist())]
            for tokens in (got, states[-1].tokens[b])
        ]
        assert texts[0] == texts[1]
    assert stopped.forwards == sum(steps) / len(steps) and stopped.candidates[0].complete.all()


@pytest.mark.parametrize("M", [1, 2])
def test_only_an_eos_in_the_answer_stops_and_what_is_committed_stays(M):
    one = replace(saying([0, 1, 2, 9]), eos_id=(1, 3))
    config = Config(interval=2, stop_at_eos=True)
    canvas = Canvas.blank([[1, 3]], [3], 4, 5, mask_id=0, pad_id=1)
    canvas.masked[0, -2] = False
    canvas.tokens[0, -2] = 2
    result = tie.ensemble([one] * M, [canvas] * M, config)
    assert result.forwards == 5 * M
    for got in result.candidates:
        assert got.tokens.tolist() == [[1, 3, 3, 3, 3, 3, 3, 3, 1, 1, 2, 1]]
        again = replace(canvas, tokens=got.tokens, masked=got.tokens == 1)
        again.masked[0, 0] = False
        done = tie.ensemble([one] * M, [again] * M, config)
        assert done.forwards == 0 and torch.equal(done.candidates[0].tokens, got.tokens)


# --- scores ---------------------------------------------------------------------------------------


def test_token_change_count_of_the_papers_figure_2():
    """Changes 2 then 3 of 4; 1 then 1 of 4; 2 then 1 of 3."""
    steps = [["aaaa", "aaaa", "aaaa"], ["bbaa", "baaa", "bbaa"], ["ccba", "caaa", "cbab"]]
    tokens = torch.tensor([[[ord(letter) for letter in row] for row in step] for step in steps])
    relevant = torch.ones(3, 3, 4, dtype=torch.bool)
    relevant[:, 2, 3] = False
    assert tie.token_change_count(tokens, relevant).tolist() == [1.25, 0.5, 1]
    assert tie.token_change_count(tokens, relevant, normalize=False).tolist() == [5, 2, 3]


def counted(steps):
    """C~ of comparisons, given the changes and the positions of each."""
    tokens = torch.zeros(len(steps) + 1, 1, 40, dtype=torch.int64)
    relevant = torch.zeros_like(tokens, dtype=torch.bool)
    for t, (changes, size) in enumerate(steps):
        tokens[t + 1, 0, :changes] = 1 - tokens[t, 0, :changes]
        tokens[t + 1, 0, changes:] = tokens[t, 0, changes:]
        relevant[t, 0, :size] = True
    return tie.token_change_count(tokens, relevant).item()


def comparisons(largest):
    pairs = st.tuples(st.integers(0, largest), st.integers(1, largest)).map(sorted)
    return st.lists(pairs.filter(all) | st.just((0, 3)) | st.just((0, 0)), max_size=9)


@given(comparisons(40))
def test_token_change_count_is_the_sum_of_its_fractions(steps):
    total = sum(changes / max(size, 1) for changes, size in steps)
    assert counted(steps) == pytest.approx(total, rel=1e-6)


@given(comparisons(28))
def test_equal_sums_of_fractions_are_equal(steps):
    reduced = [Fraction(changes, max(size, 1)).as_integer_ratio() for changes, size in steps]
    single = [(1, size) for changes, size in steps for _ in range(changes)]
    assert counted(steps) == counted(reduced) == counted(single)


def test_wholes_are_exact_whatever_they_are_made_of():
    for size in range(1, 29):
        assert counted([(1, size)] * 3 * size) == 3
    halves = [(1, 2)] * 2
    assert counted(halves) == counted([(2, 4)] * 2) == counted([(1, 3), (2, 3)]) == 1
    assert counted([(1, 2), (1, 3), (1, 6)]) == counted([(13, 14), (2, 28)]) == 1


def test_ties_go_to_the_surer_member_and_then_to_the_lower_index():
    scores = torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 2.0], [0.0, 1.0, 1.0]])
    top1 = torch.tensor([[0.2, 0.5, 0.1], [0.4, 0.5, 0.9], [0.9, 0.3, 0.9]])
    assert tie.lead(scores, top1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("score", SCORES)
def test_a_member_that_says_only_eos_never_wins(score):
    canvas = Canvas.blank([[4]], [], 8, 6, mask_id=0, pad_id=1)
    silent = saying([0, 9] + [0] * 8)
    moods = torch.eye(10)[2:4]  # the other member changes its mind at every step

    def talk(tokens, positions, _):
        return moods[(tokens == 0).sum(1) % 2][:, None].expand(*positions.shape, -1)

    for talker in (0, 1):
        members = [silent, silent]
        members[talker] = Member(talk, 0, 1)
        config = Config(score=score, cross_model=False, interval=3)
        result = tie.ensemble(members, [canvas] * 2, config)
        assert result.winner == talker and result.tcc[talker] > 0
        assert (result.leaders == talker).all() and (result.scores[:, 1 - talker] == NEVER).all()


# --- cost and devices -----------------------------------------------------------------------------


@given(problems(mixed=False))
def test_forwards_are_counted_as_the_denoisers_see_them(problem):
    """Between vocabularies a relay may complete a row whose next step has been forwarded."""
    members = [replace(m, denoise=Watched(m.denoise)) for m in problem.members]
    canvases = [one_row(canvas, 0) for canvas in problem.canvases]
    result = tie.ensemble(members, canvases, problem.config)
    assert result.forwards == sum(len(m.denoise.calls) for m in members)
    for one, canvas in zip(members, canvases):
        answer = canvas.answer.stop - canvas.answer.start
        read = min(answer, problem.config.answer_window or answer) if len(members) > 1 else 0
        for tokens, positions, _ in one.denoise.calls:  # the block and the answer window only
            assert positions.shape[1] == min(problem.config.block_size, tokens.shape[1]) + read


class Accelerator(TorchFunctionMode):
    """Records what would wait for an accelerator. Refuses sorts whose ties depend on the device."""

    WAITS = """item tolist numpy cpu nonzero argwhere unique masked_select equal allclose is_nonzero
        bincount __bool__ __int__ __float__ __index__ __contains__ __repr__ __format__"""

    def __init__(self):
        super().__init__()
        self.events = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name != "argsort" or kwargs.get("stable")
        keys = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [key for key in tree_leaves(keys) if torch.is_tensor(key)]
        if name in self.WAITS.split() or any(key.dtype == torch.bool for key in masks):
            self.events += "w"
        return func(*args, **kwargs)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    "score, cross_model, asked",
    [("token_change_count", True, 0)]
    + [(s, c, 9 if c else 3) for s in SCORES[1:] for c in (True, False)],
)
def test_forwards_cost_what_the_paper_says_and_wait_for_no_device(score, cross_model, asked, top_k):
    """Three members, blocks of 4, 4, 4 and 2 masks, `asked` forwards in each assessment."""
    settings = {"score": score, "cross_model": cross_model, "interval": 4, "block_size": 4}
    members, canvases, config = small([SHORT] * 3, **settings, top_k=top_k)
    watch = Accelerator()

    def watched(denoise):
        def call(*inputs):
            assert not torch.is_grad_enabled()
            watch.events += "c"
            return denoise(*inputs)

        return call

    def on_round(state):
        watch.events += "r"

    members = [replace(m, denoise=watched(m.denoise)) for m in members]
    with watch:
        result = tie.ensemble(members, canvases, config, on_round)
    steps = {1: [4, 4, 4, 2], 2: [4, 3]}[top_k]
    saved = 3 if cross_model and asked else 0  # first steps, made by the assessment before
    relays = len(steps) - 1
    assert result.forwards == 3 * sum(steps) + relays * (asked - saved)
    for number, events in enumerate(watch.events.split("r")[:-1]):
        own = 3 * steps[number] - saved * (number > 0)
        others = asked * (number < relays)
        assert re.fullmatch(f"w*c{{{own}}}w*c{{{others}}}w*", events)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not torch.is_tensor(x) or x.dtype != torch.float64, func
        return result


@pytest.mark.parametrize("codecs", [(SHORT, SHORT), (SHORT, LONG)])
@pytest.mark.parametrize(
    "quota", [{"stop_at_eos": True}, {"threshold": 0.4}, {"commit": entropy_bound(1.0)}]
)
@pytest.mark.parametrize("score", SCORES)
def test_tensors_are_made_on_the_device_of_a_canvas_and_never_in_float64(score, quota, codecs):
    problem = small(codecs, (3, 4), score=score, interval=2, **quota)
    expected = tie.ensemble(*problem)
    with NoFloat64(), torch.device("meta"):  # where tensors that name no device land
        same(tie.ensemble(*problem), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_the_model_its_cache_and_the_loss_use_no_float64(cached):
    sizes = {"width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 8, "max_length": 22}
    config = mdlm.ModelConfig(vocab_size=10, mask_id=0, eos_id=1, pad_id=1, **sizes)
    with NoFloat64():
        model = mdlm.MDLM(config)
        denoise = mdlm.Cached(model, 3) if cached else model
        tie.decode(Member(denoise, 0, 1), blank(SHORT))
        tokens = blank(SHORT).tokens
        mdlm.diffusion_loss(model, tokens, tokens == 0, torch.manual_seed(0)).backward()


# --- mistakes that people make --------------------------------------------------------------------


def test_the_defaults_are_the_papers_and_a_canvas_is_padded_on_the_left():
    assert Config() == Config(16, 16, "token_change_count", True, True, 1)
    assert Config(threshold=1).threshold == 1
    assert str(Member(None, 0, 1)) == "a member"
    with torch.device("meta"):
        canvas = Canvas.blank([(3, 4, 5), [6]], (7,), 2, 1, mask_id=0, pad_id=9, device="cpu")
    assert canvas.tokens.tolist() == [[3, 4, 5, 0, 0, 7, 0], [9, 9, 6, 0, 0, 7, 0]]
    assert canvas.attention_mask.tolist() == [[True] * 7, [False] * 2 + [True] * 5]
    assert Canvas.blank([[3], [4]], [], 2, 1, mask_id=0, pad_id=9).attention_mask is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("score", "tcc"), ("score", ["x"]), ("interval", 2.5), ("interval", True), ("interval", 0),
        ("block_size", 0), ("top_k", 0), ("answer_window", 0), ("commit", 3),
        ("normalize", "false"), ("normalize", 1), ("cross_model", "no"), ("stop_at_eos", 1),
        ("threshold", True), ("threshold", "0.9"),
        ("threshold", 0.0), ("threshold", 1.01), ("threshold", math.nan),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_or_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got {re.escape(repr(value))}$"):
        Config(**{name: value})


def test_only_one_setting_decides_what_a_step_commits():
    for one, other in combinations([{"top_k": 2}, {"threshold": 0.9}, {"commit": print}], 2):
        with pytest.raises(ValueError, match="exclude each other"):
            Config(**one, **other)


def misfits():
    """The second of two members or canvases doesn't fit. No forward happens, so None denoises."""
    canvas = small().canvases[0]
    one = Member(None, 0, (1, 9), "m0")
    reasoning, answer = canvas.reasoning, canvas.answer
    for message, changes, canvas_changes in (
        ("batch size", {}, vars(one_row(canvas, 0))),
        ("same layout", {}, {"reasoning": slice(reasoning.start, answer.start)}),
        ("both have a codec, or neither", {"codec": SHORT}, {}),
        ("mask_id", {"mask_id": 2}, {}),
        ("eos_id", {"eos_id": 1}, {}),
        ("different token ids, got 0 and 0", {"eos_id": 0}, {}),
        ("different token ids, got 0 and None", {"eos_id": None}, {}),
        (r"different token ids, got 0 and \[1, 2\]", {"eos_id": [1, 2]}, {}),
        ("tokens must be", {}, {"tokens": canvas.tokens.int()}),
        ("tokens must be", {}, {"tokens": canvas.tokens[0]}),
        ("masked must be", {}, {"masked": canvas.masked.int()}),
        ("masked must be", {}, {"masked": canvas.masked[:, 1:]}),
        ("attention_mask must be", {}, {"attention_mask": canvas.masked[:, 1:]}),
        ("in this order", {}, {"reasoning": answer, "answer": reasoning}),
        ("in this order.*None", {}, {"answer": slice(answer.start, None)}),
        ("in this order.*-6", {}, {"answer": slice(-6, -1)}),
        ("in this order.*99", {}, {"answer": slice(answer.start, 99)}),
        ("outside", {}, {"masked": ~canvas.masked}),
    ):
        members = [one, replace(one, name="m1", **changes)]
        yield f"'m1'.*{message}", members, [canvas, replace(canvas, **canvas_changes)], Config()
    yield "both have a codec, or neither", [replace(one, codec=SHORT), one], [canvas] * 2, Config()
    yield "one canvas per member, got 0 for 0", [], [], Config()
    yield "one canvas per member, got 1 for 2", [one, one], [canvas], Config()


def failures():
    """Mistakes that only show during decoding."""
    members, canvases, config = small(interval=2, block_size=4)
    scored = replace(config, score="negative_entropy")
    nan = torch.full((10,), math.nan)

    def nan_later(tokens, positions, _):
        """After two steps, in the assessment."""
        logits = torch.eye(10).expand(*positions.shape, -1, -1)[..., 5, :]
        return nan.expand_as(logits) if (tokens == 0).sum() == 24 else logits

    def shaped(*shape, **options):
        return lambda tokens, positions, _: torch.zeros(2, positions.shape[1], *shape, **options)

    def everywhere(tokens, *_):
        return torch.zeros(*tokens.shape, 10)

    for message, denoise, settings in (
        ("id 9 is outside its vocabulary of 9", shaped(9), config),
        ("give logits over 10 and 12 tokens: give each a codec", shaped(12), config),
        ("must give float logits .*10. torch.float32", everywhere, config),
        ("must give float logits .*got .2, 10. torch.float32", shaped(), config),
        ("must give float logits .*int64", shaped(10, dtype=torch.int64), config),
        ("must give float logits .*on cpu, got .*meta", shaped(10, device="meta"), config),
        ("NaN", Constant([math.nan] * 10), config),
        ("NaN", nan_later, scored),
        ("NaN", nan_later, replace(scored, cross_model=False)),
    ):
        other = replace(members[1], denoise=denoise)
        yield f"'m2'.*{message}", [members[0], other], canvases, settings
    negative = replace(members[1], mask_id=-1)
    yield "'m2': id -1 is outside its vocabulary of 10", [negative], canvases[:1], config
    for rule in (lambda reading: reading.confidence, lambda reading: reading.masked[:, :1]):
        yield "commit must return.*bool, got", members, canvases, Config(commit=rule)


@pytest.mark.parametrize("message, members, canvases, config", [*misfits(), *failures()])
def test_what_does_not_fit_gives_one_line_that_names_it(message, members, canvases, config):
    with pytest.raises(ValueError, match=message) as error:
        tie.ensemble(members, canvases, config)
    assert "\n" not in str(error.value)
