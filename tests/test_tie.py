"""Properties of the algorithm in tie.py, and its agreement with the slow reference in everything."""

import math
import re
from collections import namedtuple
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from reference import LONG, NEAR, SHORT, Constant, Fake, Unclear, Watched, guess
from reference import ensemble as reference_ensemble
from torch.overrides import TorchFunctionMode

import tie
from tie import Canvas, Config, Member

SCORES = ["token_change_count", "top1_probability", "negative_entropy", "probability_margin"]
FIXED_QUOTA = [{"top_k": 1}, {"top_k": 2}, {"top_k": 3}]
QUOTAS = [*FIXED_QUOTA, {"threshold": 0.4}, {"threshold": 0.9}]


def entropy_bound(gamma):
    """EB-Sampler: the surest positions as long as their entropies, but for the largest, sum to at most gamma nats."""

    def rule(reading):
        entropy, order = reading.entropy.masked_fill(~reading.masked, math.inf).sort(dim=1, stable=True)  # (B, W)
        chosen = entropy.cumsum(1) - entropy <= gamma
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    return rule


def steady(tau, length=40):
    """What the member's step before predicted too, if sure enough: a rule that looks back."""
    before: dict[int, torch.Tensor] = {}

    def rule(reading):
        last = before.get(reading.member, torch.full((len(reading.token), length), -1))  # (B, length) top-1 tokens
        before[reading.member] = last.scatter(1, reading.positions, reading.token)
        return (last.gather(1, reading.positions) == reading.token) & (reading.confidence > tau)

    return rule


def clear_lead(gap):
    return lambda reading: reading.margin > gap


RULES = [{"commit": entropy_bound(0.7)}, {"commit": entropy_bound(2.0)}, {"commit": clear_lead(0.5)}]
ONE_TO_FOUR = st.sampled_from([1, 2, 2, 2, 3, 4])
SEED = st.integers(0, 10**6)
Problem = namedtuple("Problem", "members canvases config")
Seen = namedtuple("Seen", "result rounds calls")  # rounds: what on_round gave; calls: [round][member], a list each
near = partial(torch.allclose, rtol=1e-4, atol=NEAR, equal_nan=True)


def watch(problem) -> Seen:
    members = [replace(m, denoise=Watched(m.denoise)) for m in problem.members]
    rounds, calls = [], []

    def on_round(state):
        rounds.append(deepcopy(state))
        calls.append([member.denoise.calls for member in members])
        for member in members:
            member.denoise.calls = []
    return Seen(tie.ensemble(members, problem.canvases, problem.config, on_round), rounds, calls)


@st.composite
def settings_for(draw, M, quotas=QUOTAS, **fixed):
    choices = {
        "interval": st.sampled_from([1, 2, 3, 3, 4, 5, 6, 99]), "block_size": st.integers(1, 6),
        "score": st.sampled_from(SCORES), "cross_model": st.booleans(), "normalize": st.booleans(),
        "selection": st.sampled_from(["lowest_tcc", "lowest_tcc", "best_model", "most_selected"]),
        "best_model": st.integers(0, M - 1), "answer_window": st.none() | st.integers(1, 4),
    }  # fmt: skip
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in fixed}
    return Config(**drawn, **draw(st.sampled_from(quotas)), **fixed)


@st.composite
def shared(draw, codec, B):
    """What members of one vocabulary have in common: the mask id, two more special tokens, EOS, B prompts to answer."""
    tokens = st.integers(0, len(codec.pieces) - 1)
    mask_id, *ends = draw(st.permutations(codec.special))
    eos_id = draw(st.sampled_from([ends[0], tuple(ends)]))
    prompts = draw(st.lists(st.lists(tokens, max_size=4), min_size=B, max_size=B))
    lengths = draw(st.sampled_from([(9, 7), (8, 6), (7, 5), (6, 8), (4, 5), (3, 2), (1, 1), (5, 0), (0, 6)]))
    suffix, pad_id = draw(st.lists(tokens, max_size=2)), draw(tokens)
    return mask_id, ends, eos_id, Canvas.blank(prompts, suffix, *lengths, mask_id=mask_id, pad_id=pad_id)


def begun(canvas, seed, vocab):
    """With some tokens given, others under the masks, where they are of no account, and a question in its own words."""
    given_ = torch.rand(canvas.masked.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    tokens = canvas.tokens.masked_fill(canvas.masked, 2 + seed % 5)  # text in both vocabularies
    tokens[:, : canvas.reasoning.start] += seed
    tokens[:, : canvas.reasoning.start] %= vocab
    return replace(canvas, tokens=tokens, masked=canvas.masked & ~given_)


@st.composite
def problems(draw, members=ONE_TO_FOUR, quotas=QUOTAS + RULES, mixed=False, blank=False, **fixed):
    """Members of one vocabulary, or `mixed`, prompts of unequal length, settings; canvases may be begun or all blank."""
    M, B = draw(members), draw(st.integers(1, 3))
    codecs = draw(st.lists(st.sampled_from([SHORT, LONG]), min_size=M, max_size=M))
    codecs = codecs if mixed else codecs[:1] * M
    common = {codec: draw(shared(codec, B)) for codec in dict.fromkeys(codecs)}
    bare, blank = len(common) == 1 and draw(st.booleans()), blank or draw(st.integers(0, 3)) > 0
    problem = Problem([], [], draw(settings_for(M, quotas, **fixed)))
    for codec in codecs:
        (mask_id, ends, eos_id, canvas), seed = common[codec], draw(SEED | st.integers(0, 2))  # members may be alike
        fake = Fake(seed, len(codec.pieces), mask_id, ends[seed % 2])
        problem.members.append(Member(fake, mask_id, eos_id, f"m{seed}", None if bare else codec))
        problem.canvases.append(canvas if blank else begun(canvas, seed, len(codec.pieces)))
    return problem


def small(seeds, **settings) -> Problem:
    """Of fixed size, mask id 0, EOS 1."""
    canvas = Canvas.blank([[3, 4, 5], [6]], [7], 8, 6, mask_id=0, pad_id=9)
    members = [Member(Fake(seed, 10, 0, 1), 0, 1, f"m{m}") for m, seed in enumerate(seeds)]
    return Problem(members, [canvas] * len(members), Config(**settings))


def steps_of(seen):
    """Each step of each row, where every forward is a step: (tokens before, positions, logits, tokens after)."""
    for state, by_member in zip(seen.rounds, seen.calls):
        for tokens, masked, calls in zip(state["tokens"], state["masked"], by_member):
            after = [call[0] for call in calls[1:]] + [tokens.masked_fill(masked, 0)]
            for call, then in zip(calls, after):
                yield from zip(*call, then)


def one_row(canvas: Canvas, b: int) -> Canvas:
    """Row b by itself, its padding cut off."""
    pad = 0 if canvas.attention_mask is None else int((~canvas.attention_mask[b]).sum())
    regions = [slice(region.start - pad, region.stop - pad) for region in (canvas.reasoning, canvas.answer)]
    return Canvas(canvas.tokens[b : b + 1, pad:], canvas.masked[b : b + 1, pad:], *regions)


@given(problems())
def test_ensemble_equals_the_slow_reference_in_everything(problem):
    try:
        rows = reference_ensemble(*problem)
    except Unclear:
        reject()
    result = tie.ensemble(*problem)
    M, rounds = len(problem.members), max(len(row.leaders) for row in rows)
    assert result.leaders.shape == (rounds, len(rows)) and result.scores.shape == (rounds, M, len(rows))
    for b, row in enumerate(rows):
        ended = rounds - len(row.leaders)
        assert [one_row(c, b).tokens[0].tolist() for c in result.candidates] == [state.tokens for state in row.states]
        assert result.leaders[:, b].tolist() == row.leaders + [-1] * ended
        assert near(result.scores[:, :, b], torch.tensor(row.scores + [[-math.inf] * M] * ended).view(rounds, M))
        assert near(result.tcc[:, b], torch.tensor(row.tcc))
        assert near(result.top1[:, b], torch.tensor(row.top1))
        assert result.winner[b] == row.winner
    assert result.forwards == pytest.approx(sum(row.forwards for row in rows) / len(rows))
    assert result.not_relayed == 0


@given(problems())
def test_a_batch_gives_row_by_row_what_single_rows_give(problem):
    whole = tie.ensemble(*problem)
    canvases = [[one_row(canvas, b) for canvas in problem.canvases] for b in range(len(whole.winner))]
    rows = [tie.ensemble(problem.members, row, problem.config) for row in canvases]
    for b, alone in enumerate(rows):
        rounds = len(alone.leaders)
        for mine, theirs in zip(alone.candidates, whole.candidates):
            assert torch.equal(mine.tokens, one_row(theirs, b).tokens)
        assert torch.equal(alone.leaders[:, 0], whole.leaders[:rounds, b])
        assert (whole.leaders[rounds:, b] == -1).all() and (whole.scores[rounds:, :, b] == -math.inf).all()
        assert near(alone.scores[:, :, 0], whole.scores[:rounds, :, b])
        assert near(alone.tcc[:, 0], whole.tcc[:, b]) and near(alone.top1[:, 0], whole.top1[:, b])
        assert alone.winner[0] == whole.winner[b]
    assert whole.forwards == pytest.approx(sum(alone.forwards for alone in rows) / len(rows))


@given(problems())
def test_fixed_positions_never_change_and_a_mask_id_in_the_prompt_survives(problem):
    canvas = problem.canvases[0]
    fixed = torch.ones(canvas.tokens.shape[1], dtype=torch.bool)
    fixed[canvas.reasoning] = fixed[canvas.answer] = False
    for c in problem.canvases:
        c.tokens[:, fixed.nonzero()[:2]] = problem.members[0].mask_id
    seen = watch(problem)
    for m, c in enumerate(problem.canvases):
        states = [state["tokens"][m] for state in seen.rounds] + [seen.result.candidates[m].tokens]
        states += [call[0] for by_member in seen.calls for call in by_member[m]]
        assert all(torch.equal(tokens[:, fixed], c.tokens[:, fixed]) for tokens in states)


@given(SEED, st.sampled_from(QUOTAS), st.integers(1, 5), st.integers(1, 6))
def test_committed_tokens_never_change_within_a_round(seed, quota, interval, block):
    for before, _, _, after in steps_of(watch(small([seed, seed + 1], interval=interval, block_size=block, **quota))):
        assert torch.equal(before[before != 0], after[before != 0])


def commits(problem, seen):
    """Of each step of each row: what it committed, the masks left in its block, and the probability of each."""
    regions = [range(s.start, s.stop) for s in (problem.canvases[0].reasoning, problem.canvases[0].answer)]
    size = problem.config.block_size
    blocks = [region[i : i + size] for region in regions for i in range(0, len(region), size)]
    for before, positions, logits, after in steps_of(seen):
        new = {i for region in regions for i in region if before[i] == 0 and after[i] != 0}
        left = next(([i for i in b if before[i] == 0] for b in blocks if (before[list(b)] == 0).any()), [])
        p = logits.softmax(-1, dtype=torch.float32)[:, 1:].amax(-1)  # the mask token is never predicted
        sure = {i: x for i, x in zip(positions.tolist(), p.tolist()) if i in left}
        tokens = dict(zip(positions.tolist(), (logits[:, 1:].argmax(-1) + 1).tolist()))
        assert set(sure) == set(left) and new <= set(left)
        yield new, left, sure, tokens


@given(SEED, st.sampled_from(QUOTAS), st.integers(1, 6))
def test_every_step_commits_its_quota_in_the_current_block_and_no_later_block_starts_early(seed, quota, block):
    problem = small([seed, seed + 1], interval=3, block_size=block, **quota)
    for new, left, sure, _ in commits(problem, watch(problem)):
        if "threshold" in quota:
            above = {i for i in left if sure[i] > quota["threshold"]}
            assert new == above or (not above and len(new) == min(1, len(left)))
        else:
            assert len(new) == min(quota["top_k"], len(left))
        assert all(sure[i] >= sure[j] for i in new for j in left if j not in new)


@given(SEED, st.integers(1, 6), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from([1, 3, 99]))
def test_a_commit_rule_may_look_back_and_never_stops_the_decoding(seed, block, tau, interval):
    problem = small([seed], interval=interval, block_size=block, commit=steady(tau))
    problem = problem._replace(canvases=[one_row(problem.canvases[0], 0)])
    before: dict[int, int] = {}
    for new, left, sure, tokens in commits(problem, watch(problem)):
        steady_ = {i for i in left if before.get(i) == tokens[i] and sure[i] > tau}
        assert new == steady_ | {min(left, key=lambda i: (-sure[i], i))}
        before |= tokens


def test_a_rule_that_wants_nothing_commits_one_token_a_step_and_one_that_wants_all_a_block():
    for wants, steps in ((False, 14), (True, 3)):  # 8 and 6 masks in blocks of 6
        problem = small([1, 2], block_size=6, interval=99, commit=lambda r, w=wants: torch.full_like(r.masked, w))
        assert tie.ensemble(*problem).forwards == 2 * steps
        plain = tie.decode(problem.members[0], problem.canvases[0], Config(block_size=6, top_k=6 if wants else 1))
        assert torch.equal(tie.ensemble(*problem).candidates[0].tokens, plain.tokens)


def test_confidences_are_those_of_the_whole_softmax():
    """Position 2 has p(mask) = 0.6 and 0.36 for its best, position 3 less mask and 0.4: of what is left 0.9 and 0.4."""
    p = torch.tensor([[0.6, 0.36, 0.02, 0.02], [0.0001, 0.4, 0.2999, 0.3]])  # (positions, V), mask id 0
    member = Member(lambda x, positions, _: p.log()[(positions - 2).clamp(0, 1)], 0, 3)
    canvas = Canvas.blank([[1, 2]], [], 2, 0, mask_id=0, pad_id=3)
    states = watch(Problem([member], [canvas], Config(interval=1))).rounds
    assert states[0]["masked"][0].tolist() == [[False, False, True, False]]  # 0.4 before 0.36


def test_a_threshold_is_exceeded_not_reached():
    half = Member(Constant([-1e4, 0.0, 0.0]), 0, 2)  # two tokens at exactly one half, the mask id without any
    canvas = Canvas.blank([[1]], [], 4, 0, mask_id=0, pad_id=1)
    forwards = [tie.ensemble([half], [canvas], Config(block_size=4, threshold=tau)).forwards for tau in (0.5, 0.49)]
    assert forwards == [4, 1]


def test_equal_confidences_go_to_the_lower_position():
    canvas = Canvas.blank([[1]], [], 6, 2, mask_id=0, pad_id=1)
    seen = watch(Problem([Member(Constant([0.0, 1.0, 3.0]), 0, 1)], [canvas], Config(block_size=4, interval=3)))
    assert [x["masked"][0][0].nonzero().flatten().tolist() for x in seen.rounds] == [[4, 5, 6, 7, 8], [7, 8], []]


@given(problems(blank=True))
def test_answers_stay_masked_until_reasoning_is_done(problem):
    canvas = problem.canvases[0]
    for masked in [masked for state in watch(problem).rounds for masked in state["masked"]]:
        assert masked[masked[:, canvas.reasoning].any(1)][:, canvas.answer].all()


def test_answers_wait_for_a_reasoning_that_is_shorter_than_its_block():
    problem = [Member(Constant([0.0, 1.0, 3.0]), 0, 1)], [Canvas.blank([[]], [], 2, 3, mask_id=0, pad_id=1)]
    seen = watch(Problem(*problem, Config(block_size=5, interval=1, threshold=0.5)))
    assert [x["masked"][0].tolist() for x in seen.rounds] == [[[False] * 2 + [True] * 3], [[False] * 5]]


def test_a_step_made_for_a_neighbours_sake_is_no_comparison():
    moods = torch.eye(10)[4] * torch.tensor([[1.0], [20.0]])
    sure = Member(lambda x, positions, _: moods[(x[:, 0] == 3).long()][:, None].expand(*positions.shape, -1), 0, 1)
    members = [sure, Member(Constant(moods[0].tolist()), 0, 1)]
    canvas = Canvas.blank([[3], [6]], [], 0, 3, mask_id=0, pad_id=1)
    assert tie.ensemble(members, [canvas] * 2, Config(threshold=0.9)).winner[0] == 1  # member 0 made one step of row 0


@st.composite
def histories(draw):
    n, B, A, random = draw(st.integers(1, 6)), 2, draw(st.integers(0, 5)), torch.Generator().manual_seed(draw(SEED))
    return torch.randint(0, 3, (n, B, A), generator=random), torch.rand((n, B, A), generator=random) < 0.7


@given(histories(), st.booleans())
def test_token_change_count_equals_a_loop_and_is_at_most_the_number_of_comparisons_when_normalised(history, normalize):
    tokens, counted = history
    got = tie.token_change_count(tokens, counted, normalize)
    for b in range(tokens.shape[1]):
        total = 0.0
        for t in range(len(tokens) - 1):
            A = [a for a in range(tokens.shape[2]) if counted[t, b, a]]
            changes = sum(1 for a in A if tokens[t, b, a] != tokens[t + 1, b, a])
            total += changes / max(len(A), 1) if normalize else changes
        assert got[b].item() == pytest.approx(total, abs=NEAR)
        assert not normalize or got[b] <= len(tokens) - 1 + NEAR


def test_equal_sums_of_fractions_are_equal():
    tokens = torch.zeros(11, 1, 10, dtype=torch.int64)
    tokens[torch.arange(11) % 2 == 1, 0, 0] = 1  # one of ten changes at each of ten comparisons
    assert tie.token_change_count(tokens, torch.ones_like(tokens, dtype=torch.bool)).float().tolist() == [1.0]


@given(histories(), st.permutations([5, 6, 7]), st.booleans())
def test_token_change_count_does_not_depend_on_the_names_of_tokens(history, names, normalize):
    renamed = torch.tensor(names)[history[0]]
    assert torch.equal(*(tie.token_change_count(x, history[1], normalize) for x in (history[0], renamed)))


def test_constant_predictions_have_no_changes():
    members, canvases, config = small([1, 2], interval=3)
    result = tie.ensemble([replace(m, denoise=Constant([0, 1, 3] + [0] * 7)) for m in members], canvases, config)
    assert (result.scores == 0).all() and (result.tcc == 0).all()


def test_token_change_count_of_the_papers_figure_2():
    """Changes 2 then 3 of 4; 1 then 1 of 4; 2 then 1 of 3."""
    steps = [["aaaa", "aaaa", "aaaa"], ["bbaa", "baaa", "bbaa"], ["ccba", "caaa", "cbab"]]
    tokens = torch.tensor([[[ord(letter) for letter in row] for row in step] for step in steps])
    counted = torch.ones(3, 3, 4, dtype=torch.bool)
    counted[:, 2, 3] = False
    assert tie.token_change_count(tokens, counted).tolist() == pytest.approx([1.25, 0.50, 1.00])
    assert tie.token_change_count(tokens, counted, normalize=False).tolist() == [5, 2, 3]


@given(SEED, st.integers(3, 30), st.integers(0, 5))
def test_logit_scores_keep_their_bounds_and_an_empty_set_says_nothing(seed, vocab, answer):
    random = torch.Generator().manual_seed(seed)
    mask_id, counted = seed % vocab, torch.rand(3, answer, generator=random) < 0.6
    logits = 5 * torch.randn(3, answer, vocab, generator=random)
    probability, token = tie.predict(logits, mask_id)
    got = {name: f(probability, logits, mask_id) for name, f in tie.LOGIT_SCORES.items()}  # (B, A)
    for b, row in enumerate(logits.tolist()):
        for name in SCORES[1:]:
            each = [getattr(guess(one, mask_id), name) for one in row]
            assert got[name][b].tolist() == pytest.approx(each, abs=1e-4)
            each = [x for x, yes in zip(each, counted[b]) if yes]
            mean = sum(each) / len(each) if each else -math.inf
            assert tie.mean_over(got[name], counted)[b].item() == pytest.approx(mean, abs=1e-4)
        assert token[b].tolist() == [guess(one, mask_id).token for one in row]
    top1, nats, margin = (sign * got[name] for sign, name in zip((1, -1, 1), SCORES[1:]))
    assert ((margin >= 0) & (margin <= top1 + NEAR) & (top1 <= 1 + NEAR)).all()
    assert ((nats >= -NEAR) & (nats <= math.log(vocab) + NEAR)).all()


@given(problems(members=st.integers(2, 3), quotas=FIXED_QUOTA, interval=1, score="token_change_count"))
def test_histories_start_again_after_a_relay(problem):
    result = tie.ensemble(*problem)  # one step a round has nothing to compare with but an earlier round's
    assert (result.scores == -math.inf).all()
    equal = torch.stack([canvas.masked.sum(1) for canvas in problem.canvases]).unique(dim=0).shape[0] == 1
    assert not equal or (result.tcc == 0).all()  # otherwise who is not done goes on without relays


@given(problems(members=st.integers(2, 3)), st.integers(1, 4))
def test_the_count_over_the_whole_decoding_does_not_hang_on_where_rounds_end_once_relays_have(problem, interval):
    """A member that is done from the start ends a row's relays; the others decode it alone, whatever other rows do."""
    last = problem.canvases[-1]
    masked = last.masked & (torch.arange(len(last.masked)) > 0)[:, None]
    problem.canvases[-1] = replace(last, masked=masked)
    whole, parts = (
        tie.ensemble(*problem[:2], replace(problem.config, interval=n, selection="lowest_tcc")) for n in (99, interval)
    )
    assert near(whole.tcc[:, 0], parts.tcc[:, 0]) and near(whole.top1[:, 0], parts.top1[:, 0])
    assert whole.winner[0] == parts.winner[0]


@pytest.mark.parametrize("score, cross_model", list(product(SCORES, (True, False))))
def test_empty_answer_relevant_sets_never_win(score, cross_model):
    canvases, config = small([1, 2], score=score, cross_model=cross_model, interval=3)[1:]
    silent = Member(Constant([0.0, 9.0] + [0.0] * 8), 0, 1)  # EOS everywhere, and sure of it
    moods = torch.eye(10)[2:4]  # the talker changes its mind at every step
    talking = Member(lambda x, positions, _: moods[(x == 0).sum(1) % 2][:, None].expand(*positions.shape, -1), 0, 1)
    deaf = score == "token_change_count" or not cross_model  # otherwise the talker reads both trajectories
    for members, talker in (([silent, talking], 1), ([talking, silent], 0)):
        result = tie.ensemble(members, canvases, config)
        assert result.winner.tolist() == [talker] * 2 and (result.tcc[talker] > 0).all()
        assert ((result.scores[:, 1 - talker] == -math.inf) == deaf).all()
        assert not deaf or (result.leaders == talker).all()
    assert (tie.ensemble([silent] * 2, canvases, config).scores == -math.inf).all()


@given(problems(score="token_change_count", quotas=FIXED_QUOTA))
def test_after_a_relay_all_members_hold_the_leaders_state(problem):
    seen = watch(problem)  # the first step of the next round shows the state
    for state, after in zip(seen.rounds, seen.calls[1:]):
        for b, m in enumerate(state["leader"].tolist()):
            sent = state["tokens"][m][b].masked_fill(state["masked"][m][b], problem.members[0].mask_id)
            for calls, canvas in zip(after, problem.canvases if m >= 0 else []):
                sent[: canvas.reasoning.start] = canvas.tokens[b, : canvas.reasoning.start]  # the prompt is its own
                assert torch.equal(calls[0][0][b], sent)


@given(problems())
def test_the_leader_is_an_argmax_of_the_scores(problem):
    result = tie.ensemble(*problem)
    scores = result.scores.gather(1, result.leaders.clamp(min=0)[:, None])  # (rounds, 1, B)
    assert ((scores == result.scores.amax(1, keepdim=True)) | (result.leaders == -1)[:, None]).all()


@given(problems(members=st.integers(2, 3), selection="lowest_tcc"), st.randoms(use_true_random=False))
def test_permuting_members_permutes_leaders_and_changes_no_output(problem, random):
    result = tie.ensemble(*problem)
    gaps, last = (x.sort(dim=-2).values.diff(dim=-2).amin(-2) for x in (result.scores, result.tcc))
    if not ((gaps > NEAR) | (result.leaders < 0)).all():
        reject()  # ties go by the order of members
    order = random.sample(range(len(problem.members)), len(problem.members))
    other = tie.ensemble(*[[part[m] for m in order] for part in problem[:2]], problem.config)
    names = torch.tensor([*order, -1])
    assert torch.equal(names[other.leaders], result.leaders)
    assert ((names[other.winner] == result.winner) | (last < NEAR)).all()
    assert near(other.scores, result.scores[:, order]) and near(other.tcc, result.tcc[order])
    assert all(torch.equal(mine.tokens, result.candidates[m].tokens) for mine, m in zip(other.candidates, order))


@given(problems(blank=True))
def test_identical_members_and_a_single_one_equal_plain_decoding(problem):
    member, canvas = problem.members[0], problem.canvases[0]
    plain = tie.decode(member, canvas, problem.config)
    for M in (1, 3):
        result = tie.ensemble([member] * M, [canvas] * M, replace(problem.config, best_model=M - 1))
        assert all(torch.equal(candidate.tokens, plain.tokens) for candidate in result.candidates)


@given(problems(interval=99))
def test_a_long_interval_equals_post_generation(problem):
    result = tie.ensemble(*problem)
    assert result.leaders.shape == (0, len(result.winner)) and result.scores.shape[0] == 0
    for member, canvas, candidate in zip(problem.members, problem.canvases, result.candidates):
        assert torch.equal(candidate.tokens, tie.decode(member, canvas, problem.config).tokens)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("logits", [[50, 1, 2, 0], [0, 5, 1, 1], [0, 0, 0, 0], [0, -1e9, -1e9, -1e9]])
def test_models_that_adore_the_mask_id_or_eos_or_nothing_end_too(logits, score):
    canvas = Canvas.blank([[1, 2], [3]], [2], 5, 4, mask_id=0, pad_id=3)
    members = [Member(Constant(logits), 0, 1), Member(Constant([0, 1, 4, 2]), 0, 1)]
    for M, quota in product((1, 2), QUOTAS):
        result = tie.ensemble(members[:M], [canvas] * M, Config(interval=2, block_size=3, score=score, **quota))
        assert all(c.complete.all() and (c.tokens[canvas.masked] != 0).all() for c in result.candidates)


@given(problems())
def test_decoding_ends_without_masks_and_a_row_has_no_more_relays_once_a_member_completed_it(problem):
    result, rounds, _ = watch(problem)
    assert all(canvas.complete.all() for canvas in result.candidates)
    assert [state["round"] for state in rounds] == list(range(len(rounds)))
    assert all((state["leader"] == -1).all() for state in rounds[-1:])
    relays = [state for state in rounds if (state["leader"] >= 0).any()]
    for state, leaders, scores in zip(relays, result.leaders, result.scores, strict=True):
        assert torch.equal(state["leader"], leaders) and torch.equal(state["scores"], scores)
        assert state["step"] == problem.config.interval * (state["round"] + 1)
    for i, state in enumerate(rounds):
        complete = torch.stack([~masked.any(1) for masked in state["masked"]]).any(0)
        assert all((later["leader"][complete] == -1).all() for later in rounds[i:])


@given(problems(blank=True))
def test_forwards_are_counted_as_the_denoisers_saw_them_and_cost_what_the_paper_says(problem):
    canvas, config, M = one_row(problem.canvases[0], 0), problem.config, len(problem.members)
    seen = watch(problem._replace(canvases=[canvas] * M))
    assert sum(len(calls) for by_member in seen.calls for calls in by_member) == seen.result.forwards
    if config.threshold is None and config.commit is None:
        sizes = [region.stop - region.start for region in (canvas.reasoning, canvas.answer)]
        blocks = [min(config.block_size, size - at) for size in sizes for at in range(0, size, config.block_size)]
        T, rounds = sum(-(-masks // config.top_k) for masks in blocks), len(seen.result.leaders)
        assert rounds == (T - 1) // config.interval * (M > 1) and seen.rounds[-1]["step"] == T
        extra = 0 if config.score == "token_change_count" else M - 1 if config.cross_model else 1
        assert seen.result.forwards == M * T + rounds * M * extra


@given(problems())
def test_positions_asked_are_the_block_and_the_answer_only_and_of_one_member_the_block(problem):
    config, answer = problem.config, problem.canvases[0].answer.stop - problem.canvases[0].answer.start
    read = min(answer, config.answer_window or answer) if len(problem.members) > 1 else 0
    for tokens, positions, _ in [call for by_member in watch(problem).calls for calls in by_member for call in calls]:
        assert positions.shape[1] == min(config.block_size, tokens.shape[1]) + read
        assert 0 <= positions.min() and positions.max() < tokens.shape[1]


@given(problems())
def test_inputs_are_not_changed(problem):
    kept = deepcopy(problem.canvases)
    constant = Constant([0.0, 1.0, 3.0] + [0.5] * 13)
    for members in (problem.members, [replace(member, denoise=constant) for member in problem.members]):
        tie.ensemble(members, problem.canvases, problem.config)
        tie.decode(members[0], problem.canvases[0], problem.config)
    assert constant.logits.tolist() == [0, 1, 3] + [0.5] * 13
    for canvas, before in zip(problem.canvases, kept):
        assert torch.equal(canvas.tokens, before.tokens) and torch.equal(canvas.masked, before.masked)


def test_a_model_that_writes_into_its_inputs_and_a_callback_that_edits_what_it_sees_change_nothing():
    def vandal(own, tokens, positions, attention_mask):
        logits = own(tokens, positions, attention_mask).clone()
        tokens[:], positions[:], attention_mask[:] = 9, 0, False
        return logits

    def edit(state):
        for part in (*state["tokens"], *state["masked"], state["scores"], state["leader"]):
            part.zero_()

    for score, commit in product(SCORES, (None, entropy_bound(0.7))):
        members, canvases, config = small([1, 2], score=score, interval=2, commit=commit)
        kept, expected = deepcopy(canvases), tie.ensemble(members, canvases, config)
        rude = [replace(member, denoise=partial(vandal, member.denoise)) for member in members]
        got = tie.ensemble(rude, canvases, config, edit)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got.candidates, expected.candidates))
        assert torch.equal(got.scores, expected.scores) and torch.equal(got.leaders, expected.leaders)
        assert torch.equal(canvases[0].attention_mask, kept[0].attention_mask)
        assert torch.equal(canvases[0].tokens, kept[0].tokens)


def test_a_model_may_write_its_next_logits_into_the_same_memory():
    def reusing(own, memory, *inputs):
        logits = own(*inputs)
        memory.setdefault(logits.shape, torch.empty_like(logits)).copy_(logits)
        return memory[logits.shape]

    for score, commit in product(SCORES, (None, entropy_bound(0.7), clear_lead(0.5))):
        members, canvases, config = small([1, 2], score=score, interval=2, commit=commit)
        expected = tie.ensemble(members, canvases, config)
        got = tie.ensemble([replace(m, denoise=partial(reusing, m.denoise, {})) for m in members], canvases, config)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got.candidates, expected.candidates))


def test_a_result_shares_no_memory_with_the_canvases_given():
    members, (canvas, _), config = small([1, 2])
    done = replace(canvas, tokens=canvas.tokens.clone(), masked=torch.zeros_like(canvas.masked))  # nothing to decode
    for got in tie.ensemble(members, [done] * 2, config).candidates:
        got.tokens.fill_(3), got.masked.fill_(True)
    assert torch.equal(done.tokens, canvas.tokens) and not done.masked.any()


class HostWaits(TorchFunctionMode):
    """Notes every use of a tensor that would wait for an accelerator."""

    NAMES = """item tolist numpy cpu nonzero argwhere unique masked_select equal allclose is_nonzero bincount
        __bool__ __int__ __float__ __index__ __contains__ __repr__ __format__"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        keys = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(torch.is_tensor(k) and k.dtype == torch.bool for k in (keys if type(keys) is tuple else [keys]))
        if by_mask or name in self.NAMES.split():
            self.events.append("wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("score, cross_model, top_k", list(product(SCORES, (True, False), (1, 2))))
def test_nothing_waits_for_a_device_inside_a_round_with_a_fixed_quota(score, cross_model, top_k):
    settings = {"score": score, "cross_model": cross_model, "interval": 4, "block_size": 4, "top_k": top_k}
    members, canvases, config = small([1, 2, 3], **settings)
    events = []
    members = [replace(m, denoise=lambda *x, own=m.denoise: (events.append("call"), own(*x))[1]) for m in members]
    with HostWaits() as waits:
        waits.events = events
        tie.ensemble(members, canvases, config, lambda state: events.append("round"))
    assert "wait" in events  # between rounds: the watch does see
    rounds = " ".join(events).split("round")[:-1]
    for number, names in enumerate(map(str.split, rounds)):
        steps = min(4, {1: 14, 2: 7}[top_k] - 4 * number)  # blocks of 4, 4 and 4, 2; four steps a round
        served = number > 0 and cross_model and score != "token_change_count"  # the first step, by the assessment
        calls = [i for i, name in enumerate(names) if name == "call"]
        made = 3 * (steps - served)
        assert set(names[calls[0] : calls[made - 1]]) == {"call"}
        assert len(calls) == made or "wait" not in names[calls[made] : calls[-1]]  # the assessment


class Accelerator(TorchFunctionMode):
    """Notices what only a second device would punish: tensors that name no device land where nothing can meet them,
    every move says where to, and what has equal values is sorted stably."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.Tensor.to or args[1] is not None
        if func is torch.Tensor.argsort and not kwargs.get("stable"):
            assert args[0].sort().values.diff().all()
        with torch.device("meta"):
            return func(*args, **kwargs)


@pytest.mark.parametrize("score, quota", list(product(SCORES, ({"top_k": 2}, {"threshold": 0.4}))))
def test_every_tensor_is_made_on_the_device_of_a_canvas(score, quota):
    members, canvases, config = small([1, 2], score=score, interval=3, selection="most_selected", **quota)
    expected = tie.ensemble(members, canvases, config)
    with Accelerator():
        canvas = Canvas.blank([[3, 4, 5], [6]], [7], 8, 6, mask_id=0, pad_id=9, device="cpu")
        result = tie.ensemble(members, [canvas] * 2, config)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(result.candidates, expected.candidates))
    assert torch.equal(result.winner, expected.winner) and torch.equal(result.scores, expected.scores)


class Softmaxes(TorchFunctionMode):
    """Keeps how many rows each softmax was given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.rows += [len(args[0])] if func is torch.Tensor.softmax else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("commit, softmaxes", [(None, 1), (clear_lead(2.0), 2), (entropy_bound(0.0), 2)])
def test_nothing_is_computed_or_kept_that_the_rule_does_not_ask_for(commit, softmaxes):
    problem = small([1, 2], interval=99, commit=commit)
    with Softmaxes() as seen:
        calls = [call for by_member in watch(problem).calls for calls in by_member for call in calls]
    assert len(seen.rows) == softmaxes * len(calls)
    run = tie.Run(0, problem.members[0], problem.canvases[0], problem.config)
    reading = run.read(run.canvas)
    assert reading.logits.shape == (2, 16, 10 if commit else 0) and reading.nan.shape == (2,)
    assert reading.logits.untyped_storage().nbytes() == reading.logits.nbytes  # no view: it would keep all
    assert (reading.confidence[~reading.masked] == -1).all()
    run.step()
    assert run.history[0].logits.shape == (2, 16, 0)
    assert run.history[0].logits.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("vocab, rows", [(50, [6]), (2**18, [4, 2]), (2**20, [1] * 6), (2**21, [1] * 6)])
def test_a_large_vocabulary_is_read_a_million_logits_at_a_time(vocab, rows):
    logits = torch.zeros(3, 1, vocab)
    logits[torch.arange(3), 0, torch.tensor([9, 7, 8])] = 30
    with Softmaxes() as elsewhere:
        tie.predict(torch.zeros(3, 3, vocab, device="meta"), 7)  # another device takes more at once
    assert elsewhere.rows == ([9] if vocab < 2**21 else [8, 1])
    with Softmaxes() as seen:
        probability, token = tie.predict(logits.expand(3, 2, vocab), 7)
        assert seen.rows == rows
    assert token.tolist() == [[9, 9], [0, 0], [8, 8]]
    assert probability[:, 0].tolist() == pytest.approx([1, math.exp(-30), 1], rel=1e-3)


@given(SEED)
def test_probabilities_are_float32_whatever_the_model_gives(seed):
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed)).bfloat16()
    mine, exact = (tie.predict(x, 0) for x in (logits, logits.float()))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, exact))
    for f in tie.LOGIT_SCORES.values():
        a, b = (f(mine[0], x, 0) for x in (logits, logits.float()))
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_ties_go_to_the_surer_member_and_then_to_the_lower_index():
    scores = torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 2.0], [0.0, 1.0, 1.0]])
    top1 = torch.tensor([[0.2, 0.5, 0.1], [0.4, 0.5, 0.9], [0.9, 0.3, 0.9]])
    assert tie.lead(scores, top1).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "selection, winner", [("lowest_tcc", [1] * 4), ("best_model", [2] * 4), ("most_selected", [0, 1, 1, 2])]
)
def test_each_selection_and_what_most_selected_falls_back_on(selection, winner):
    scores = torch.tensor([[-2.0] * 4, [-1.0] * 4, [-3.0] * 4])
    leaders = torch.tensor([[0, 0, -1, 2], [0, 2, -1, -1], [1, -1, -1, -1]])  # two against one; one each; none; one
    assert tie.select(Config(selection=selection, best_model=2), scores, scores, leaders).tolist() == winner


def test_rows_are_complete_one_by_one():
    canvas = deepcopy(small([1]).canvases[0])
    canvas.masked[1] = False
    assert canvas.complete.tolist() == [False, True]


def test_the_defaults_are_the_papers():
    assert Config() == Config(16, 16, "token_change_count", True, True, 1, None, None, None, "lowest_tcc", 0)
    assert Member(None, 0, 1) == Member(None, 0, 1, "", None) and str(Member(None, 0, 1)) == "a member"


def nan_at(where: slice, tokens, positions, attention_mask):
    """Logits that are NaN at some positions, as public code's often are on padding, and otherwise say 5."""
    logits = torch.eye(10)[5].expand(*positions.shape, -1)  # (B, K, V)
    return logits.masked_fill(((positions >= where.start) & (positions < where.stop))[..., None], math.nan)


@pytest.mark.parametrize("score", SCORES)
def test_nan_where_nothing_is_read_does_no_harm(score):
    members, (canvas, _), config = small([1, 2], score=score, interval=2, block_size=12)  # the window holds the prompt
    canvas.masked[1, canvas.answer] = False  # one row is done before the other
    members[1] = replace(members[1], denoise=partial(nan_at, slice(0, canvas.reasoning.start)))
    assert tie.ensemble(members, [canvas] * 2, config).candidates[1].complete.all()
    assert tie.ensemble(members[1:], [canvas], config).candidates[0].tokens[0, canvas.answer].tolist() == [5] * 6


def bad_inputs():
    (m0, m1), (canvas, _), config = small([1, 2])
    longer = replace(canvas, reasoning=slice(canvas.reasoning.start, canvas.answer.start))
    swapped = replace(canvas, reasoning=canvas.answer, answer=canvas.reasoning)
    ramp, nan, nowhere = torch.arange(10.0), Constant([math.nan] * 10), lambda x, *_: torch.zeros(*x.shape, 10)
    late = Config(interval=2, score="negative_entropy")  # after two steps 24 of 28 masks are left, for the assessment

    def nan_later(x, positions, mask):
        return ramp.expand(*positions.shape, -1) * (math.nan if (x == 0).sum() == 24 else 1)

    def nan_once(x, positions, mask, calls=[]):  # noqa: B006, in its third forward, which no step is going to use
        calls.append(1)
        return ramp.expand(*positions.shape, -1) * (math.nan if len(calls) == 3 else 1)

    def nan_at_first(x, *inputs):  # of the answer, while there is reasoning to come
        return nan_at(canvas.answer if (x[:, canvas.reasoning] == 0).any() else slice(0, 0), x, *inputs)

    def other(**changes):
        return [m0, replace(m1, **changes)]

    wrong_rule = {"commit": lambda reading: reading.confidence}
    settings = [{"score": "tcc"}, {"selection": "best"}, {"interval": 2.5}, {"commit": 3}, {"normalize": "false"}]
    settings += [{"cross_model": "no"}, {"normalize": 1}, {"interval": True}, {"score": ["x"]}]
    settings += [{"threshold": True}]
    settings += [{"threshold": value} for value in (0.0, 1.01, math.nan, "0.9")]
    settings += [{name: value} for name in ("interval", "block_size", "top_k", "answer_window") for value in (0, 2**31)]
    yield from ((f"{name} must be .*not {re.escape(repr(value))}", partial(Config, **one))
                for one in settings for name, value in one.items())  # fmt: skip
    pairs = combinations([{"top_k": 2}, {"threshold": 0.9}, {"commit": print}], 2)
    yield from (("exclude each other", partial(Config, **a, **b)) for a, b in pairs)
    for message, prompts, lengths in (
        ("decode", [[1]], (0, 0)), ("decode", [[1]], (-1, 2)),
        ("at least one prompt", [], (2, 2)), ("each a list of ids", [4, 5], (2, 2)),
    ):  # fmt: skip
        yield message, partial(Canvas.blank, prompts, [], *lengths, mask_id=0, pad_id=1)
    yield "config.*not dict", partial(tie.decode, m0, canvas, {})
    for message, members, canvases, chosen in (
        ("members", [], [], config),
        ("2 members.* 1 canvas", [m0, m1], [canvas], config),
        ("m1.*batch size", [m0, m1], [canvas, one_row(canvas, 0)], config),
        ("m1.*layout", [m0, m1], [canvas, longer], config),
        ("m1.*reasoning, then answer", [m1], [swapped], config),
        ("m1.*masks outside", [m0, m1], [canvas, replace(canvas, masked=canvas.tokens != 9)], config),  # 9 pads
        ("m1.*int64", [m0, m1], [canvas, replace(canvas, tokens=canvas.tokens.int())], config),
        ("m1.*B, L", [m1], [replace(canvas, tokens=canvas.tokens[0])], config),
        ("m1.*B, L", [m1], [replace(canvas, tokens=canvas.tokens[:0], masked=canvas.masked[:0])], config),
        ("m1.*masked and", [m1], [replace(canvas, masked=canvas.masked.int())], config),
        ("m1.*masked and", [m1], [replace(canvas, attention_mask=canvas.masked[:, 1:])], config),
        ("best_model 2 names", [m0, m1], [canvas] * 2, replace(config, best_model=2)),
        ("best_model -1", [m0, m1], [canvas] * 2, replace(config, best_model=-1)),
        ("best_model 1.0", [m0, m1], [canvas] * 2, replace(config, best_model=1.0)),
        ("m1.*codec", other(codec=object()), [canvas] * 2, config),
        ("m1.*share a vocabulary, but not mask_id", other(mask_id=2), [canvas] * 2, config),
        ("m1.*share a vocabulary, but not mask_id and eos_id", other(eos_id=(1, 2)), [canvas] * 2, config),
        ("m1.*10 and 12 tokens", other(denoise=Fake(1, 12, 0, 1)), [canvas] * 2, Config(interval=2)),
        ("m1.*id 10", [replace(m1, mask_id=10)], [canvas], config),
        ("m1.*id -1", [replace(m1, mask_id=-1)], [canvas], config),
        ("m1.*id 10", [replace(m1, eos_id=10)], [canvas], config),
        ("m1.*must be a tie.Member", other(denoise=3), [canvas] * 2, config),
        ("must be a tie.Member", [m0, m1.denoise], [canvas] * 2, config),
        ("m1.*tie.Canvas, not Tensor", [m0, m1], [canvas, canvas.tokens], config),
        ("config.*not dict", [m0, m1], [canvas] * 2, {"interval": 2}),
        ("commit must give ..2, 14., .*float32", [m0, m1], [canvas] * 2, Config(block_size=14, **wrong_rule)),
        ("commit must give ..2, 14., .*bool., not ..2, 1.,", [m0, m1], [canvas] * 2,
         Config(block_size=14, commit=lambda reading: reading.masked[:, :1])),
        ("commit must give .* not None", [m0, m1], [canvas] * 2, Config(commit=lambda reading: None)),
        ("m1.*on cpu, not .*meta", other(denoise=lambda x, p, _: torch.zeros(*p.shape, 10, device="meta")),
         [canvas] * 2, config),
        ("m1.*start and stop", [m1], [replace(canvas, answer=slice(canvas.answer.start, None))], config),
        ("m1.*start and stop", [m1], [replace(canvas, answer=slice(-6, -1))], config),
        ("m1.*slices with start", [m1], [replace(canvas, reasoning=3)], config),
        ("m1.*no step", [m1], [replace(canvas, answer=slice(canvas.answer.start, canvas.answer.stop, 2))], config),
        ("m1.*padding", [m1], [replace(canvas, attention_mask=~canvas.masked)], config),
        ("m1.*on cpu", [m1], [replace(canvas, masked=canvas.masked.to("meta"))], config),
        ("m1.*NaN", other(denoise=nan), [canvas] * 2, config),
        ("m1.*NaN", other(denoise=nan_later), [canvas] * 2, late),
        ("m1.*NaN", other(denoise=nan_once), [canvas] * 2, replace(late, cross_model=False)),
        ("m1.*NaN", other(denoise=nan_at_first), [canvas] * 2, config),
        ("m1.*eos_id.*None", other(eos_id=None), [canvas] * 2, config),
        (r"m1.*eos_id.*\[1, 2\]", other(eos_id=[1, 2]), [canvas] * 2, config),
        (r"m1.*eos_id.*\(\)", other(eos_id=()), [canvas] * 2, config),
        ("m1.*eos_id.*0 and 0", other(eos_id=0), [canvas] * 2, config),
        ("m1.*logits", other(denoise=nowhere), [canvas] * 2, config),
        ("m1.*float logits.*None", other(denoise=lambda *inputs: None), [canvas] * 2, config),
        ("m1.*float logits.*not ..2, 22.,", other(denoise=lambda x, p, _: torch.zeros(p.shape)), [canvas] * 2, config),
        ("m1.*float logits.*int64", other(denoise=lambda x, p, _: torch.eye(10).long()[p % 10]), [canvas] * 2, config),
    ):
        yield message, partial(tie.ensemble, members, canvases, chosen)


@pytest.mark.parametrize("score", SCORES)
def test_results_are_float32_whatever_the_default_is(score):
    torch.set_default_dtype(torch.float64)
    try:
        result = tie.ensemble(*small([1, 2], interval=3, score=score))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {result.scores.dtype, result.tcc.dtype, result.top1.dtype} == {torch.float32}


def test_by_threshold_a_member_is_asked_for_its_masks_only_when_its_turn_comes():
    """So that a fast member's step is under way while a slow one's is waited for."""
    members, canvases, config = small([1, 2], interval=3, threshold=0.99)
    runs, events = [tie.Run(m, *pair, config) for m, pair in enumerate(zip(members, canvases))], []
    for run in runs:
        run.step = lambda step=run.step, m=run.index: (events.append(f"step {m}"), step())
    with HostWaits() as waits:
        waits.events = events
        tie.generate(runs)
    steps = " ".join(events).split("step 0")[1:]
    assert [part.split()[:3] for part in steps] == [["wait", "step", "1"]] * 3


def test_members_may_come_from_a_generator():
    members, canvases, config = small([1, 2], interval=2)
    got, expected = tie.ensemble(iter(members), iter(canvases), config), tie.ensemble(members, canvases, config)
    assert torch.equal(got.winner, expected.winner) and got.forwards == expected.forwards


def test_prompts_are_padded_on_the_left_and_a_threshold_may_be_one():
    canvas = Canvas.blank([(3, 4, 5), [6]], (7,), 2, 1, mask_id=0, pad_id=9)
    assert canvas.tokens.tolist() == [[3, 4, 5, 0, 0, 7, 0], [9, 9, 6, 0, 0, 7, 0]]
    assert Config(threshold=1).threshold == 1
    assert canvas.attention_mask.tolist() == [[True] * 7, [False] * 2 + [True] * 5]
    assert Canvas.blank([[3], [4]], [], 2, 1, mask_id=0, pad_id=9).attention_mask is None


@pytest.mark.parametrize("message, refused", list(bad_inputs()))
def test_bad_input_gives_one_line_that_names_the_member_or_the_setting(message, refused):
    with pytest.raises(ValueError, match=message) as error:
        refused()
    assert "\n" not in str(error.value)
