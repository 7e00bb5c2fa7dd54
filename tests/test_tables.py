"""The paper's tables and figures on the toy: slow oracles, and fake members that know some problems."""

import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import compress, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import eval as evaluation
import tie
import train_toy

PROBLEMS = 9
V, HALF = len(train_toy.VOCABULARY), train_toy.LAYOUT["products"] // 2


@cache
def targets(name, prompt):
    """What a fake member wants to say, (2, L): right where it knows the problem, and with help in any case. By chance
    each misses about a third of all problems."""
    right = torch.tensor(train_toy.Problem(*map(int, prompt.replace(" ", "")[:-1].split("*"))).sequence)  # (L,)
    known = zlib.crc32(f"{name}{prompt}".encode()) % 3 > 0
    return torch.stack([right if known else torch.where(right < 10, (right + 1) % 10, right), right])


def fake_denoiser(name):
    """Finding the first products right in the reasoning is help. Noise depends on the state, so that top-1 tokens
    change and members disagree; it matters less as decoding goes on."""
    weights = torch.randn(train_toy.LENGTH, V, generator=torch.Generator().manual_seed(sum(map(ord, name))))  # (L, V)

    def denoise(tokens, positions, attention_mask):
        own = torch.stack([targets(name, train_toy.decode(row[: train_toy.PROMPT_LENGTH])) for row in tokens.tolist()])
        start = train_toy.PROMPT_LENGTH
        helped = (tokens[:, start : start + HALF] == own[:, 1, start : start + HALF]).all(1)  # (B,)
        target = own[torch.arange(len(own)), helped.long()].gather(1, positions)  # (B, K)
        step = (tokens != train_toy.MASK).sum(1)[:, None, None]  # (B, 1, 1)
        noise = 3.2 * torch.sin(weights[positions] * step + tokens.sum(1)[:, None, None])  # (B, K, V)
        noise[..., train_toy.MASK] = -30  # no member says the mask itself
        return noise + (2.0 + step / 12) * torch.nn.functional.one_hot(target, V)

    return denoise


def fake_member(job, name, place=0):
    denoise = fake_denoiser(name)
    sampler = evaluation.sampling(denoise, job.temperature, place) if job.temperature else denoise
    return tie.Member(sampler, train_toy.MASK, train_toy.EOS, name)


@pytest.fixture
def fakes(monkeypatch):
    """Fake members that need no training, in this process; gives the jobs that were decoded."""
    jobs, original = [], evaluation.decode_job
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(evaluation.Job, "member", fake_member)
    monkeypatch.setattr(
        train_toy, "train_members",
        lambda plan, *_: [{"validation_accuracy": {"A": 0.6, "B": 0.7}.get(name, 0)} for name in plan],
    )  # fmt: skip
    monkeypatch.setattr(evaluation, "decode_job", lambda job: [jobs.append(job), original(job)][1])
    return jobs


def run(*arguments):
    settings = ["--problems", PROBLEMS, "--batch-size", 5, "--interval", 4, "--block-size", 8]
    return evaluation.main([*map(str, [*settings, *arguments])])


def tables(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def cell(table, row, column="accuracy"):
    [found] = [c for c in table["cells"] if c["row"] == row and c["column"] == column]
    return found


def job(**fields):
    problems = tuple(train_toy.problems("test", PROBLEMS))
    plain = evaluation.Job(Path(), ("A", "B"), tie.Config(interval=4, block_size=8), problems, "cpu", None)
    return replace(plain, **fields)


def oracle(names=("A", "B"), **config):
    """Result of the algorithm itself, and each candidate's correctness (problems, M)."""
    own = job(names=names)
    canvas = train_toy.canvas([p.prompt for p in own.problems])
    members = [fake_member(own, name) for name in names]
    result = tie.ensemble(members, [canvas] * len(members), replace(own.config, **config))
    right = [[train_toy.decode(c.tokens[b, c.answer].tolist()) == p.answer for c in result.candidates]
             for b, p in enumerate(own.problems)]  # fmt: skip
    return result, np.array(right)


def winners(**config):
    result, right = oracle(**config)
    return right[np.arange(PROBLEMS), result.winner.numpy()].mean()


# --- verdicts, estimates, the mean over seeds -------------------------------------------------------------

intervals = st.lists(
    st.none() | st.tuples(st.sampled_from([-2, -1, 0, 1, 2]), st.integers(0, 3)).map(lambda t: [t[0], t[0] + t[1]]),
    min_size=1, max_size=4,
)  # fmt: skip


@given(intervals)
def test_a_verdict_is_undecided_where_an_interval_holds_zero(cis):
    said = evaluation.verdict([{"ci95": ci} for ci in cis])
    signs = ["?" if ci is None or ci[0] <= 0 <= ci[1] else "+" if ci[0] > 0 else "-" for ci in cis]
    assert said == ("does not hold" if "-" in signs else "undecided" if "?" in signs else "holds")


def test_estimates_resample_each_group_by_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 1, 300), rng.normal(1, 2, 200)
    result = evaluation.estimate(lambda x, y: x.mean() - y.mean(), a, b)
    error = 1.96 * np.sqrt(a.var() / 300 + b.var() / 200)
    assert result["value"] == pytest.approx(a.mean() - b.mean())
    assert result["ci95"] == pytest.approx([result["value"] - error, result["value"] + error], abs=0.03)
    assert evaluation.estimate(np.mean, np.array([])) == {"value": None, "ci95": None, "n": 0}


def test_the_average_over_seeds_is_mean_spread_and_counts():
    def table(value, low):
        comparisons = {"x": {"difference": value, "ci95": [low, 9]}}
        rows = {"r": {"c": {"value": value, "ci95": None, "forwards": 2 * (value or 0)}}}
        return evaluation.Table("t", rows, {"k": comparisons}, {"p": (5.0,)})

    mean = evaluation.average([table(*own) for own in [(1.0, 1), (2.0, 0), (None, 1), (6.0, 1)]])
    [own], [claim], [paper] = mean.cells, mean.claims, mean.paper
    assert own["value"] == 3.0 and own["sd"] == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert own["values"] == [1.0, 2.0, None, 6.0] and own["forwards"] == 4.5
    assert claim["verdict"] == "holds with 3 of 4 seeds, undecided with 1 of 4 seeds"
    assert claim["comparisons"][0]["difference"] == 3.0
    assert paper == {"row": "paper, p", "column": "c", "value": 5.0}


# --- runs: restarts, samples, members ---------------------------------------------------------------------


def alone(name, prompt, steps):
    """Tokens (L,) and masks (L,) of a member after so many steps in blocks of 8, one token a step."""
    canvas, member = train_toy.canvas([prompt]), fake_member(job(), name)
    tokens, masked = canvas.tokens[0].clone(), canvas.masked[0].clone()
    for _ in range(steps):
        state, positions = tokens.masked_fill(masked, train_toy.MASK)[None], torch.arange(len(tokens))[None]
        probability = member.denoise(state, positions, None)[0].softmax(-1)  # (L, V)
        probability[:, train_toy.MASK] = -1
        first = int(masked.nonzero()[0])
        region = canvas.reasoning if first < canvas.reasoning.stop else canvas.answer
        start = first - (first - region.start) % 8
        open_ = [i for i in range(start, min(start + 8, region.stop)) if masked[i]]
        i = max(open_, key=lambda i: float(probability[i].max()))
        tokens[i], masked[i] = probability[i].argmax(), False
    return tokens, masked


@pytest.mark.parametrize("steps", [5, 24])
def test_a_restart_begins_at_the_others_state_and_keeps_its_tokens(fakes, steps):
    own = job(names=("A",), restart=("B", steps))
    [start] = own.setup().canvases(own.questions())
    assert (start.masked.sum(1) == evaluation.T - steps).all()
    for b, (problem, record) in enumerate(zip(own.problems, evaluation.decode_job(own))):
        tokens, masked = alone("B", problem.prompt, steps)
        assert torch.equal(start.masked[b], masked) and torch.equal(start.tokens[b][~masked], tokens[~masked])
        [[reasoning, _]] = record["texts"]  # up to the first EOS
        said = train_toy.decode(tokens[start.reasoning].tolist())
        assert all(masked[start.reasoning][i] or said[i] == reasoning[i] for i in range(min(len(said), len(reasoning))))


def test_restarts_are_of_problems_that_one_member_failed_and_the_other_solved(fakes, capsys):
    found = tables(capsys, "--table", 2)["tables"]["2"]
    _, right = oracle(interval=evaluation.T)
    for r, (receiver, sender) in enumerate(("AB", "BA")):
        failed = {p for p, row in zip(job().problems, right) if row[1 - r] and not row[r]}
        assert failed
        for start, steps in {"first 33 %": 11, "first 50 %": 16, "all reasoning": 24}.items():
            jobs = [own for own in fakes if (own.names, own.restart) == ((receiver,), (sender, steps))]
            assert {p for own in jobs for p in own.problems} == failed
            assert cell(found, f"member {receiver}", start)["n"] == len(failed)
            value = np.mean([r["correct"][0] for own in jobs for r in evaluation.decode_job(own)])
            assert cell(found, f"member {receiver}", start)["value"] == value
    wilson = [cell(found, f"member {name}", "first 50 %") for name in "AB"]
    for c, comparison in zip(wilson, found["claims"][0]["comparisons"]):
        assert comparison["difference"] == pytest.approx(c["value"] - 0.5)
        assert comparison["ci95"] == pytest.approx([x - 0.5 for x in c["ci95"]])


def test_a_cell_without_problems_has_no_value():
    none = evaluation.Run([], ["A"])
    own = evaluation.Table("t", {"r": none}, {"c": {"x": evaluation.above(evaluation.proportion(none.correct), 0.5)}})
    assert own.cells == [{"row": "r", "column": "accuracy", "value": None, "ci95": None, "n": 0, "forwards": None}]
    assert own.claims == [
        {"claim": "c", "verdict": "undecided", "comparisons": [{"name": "x", "difference": None, "ci95": None}]}
    ]


def test_samples_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    noisy, again, other = (
        evaluation.sampling(lambda tokens, positions, mask: logits.expand(*positions.shape, -1), 0.7, seed)
        for seed in (0, 0, 1)
    )
    drawn = noisy(None, torch.zeros(1, 40_000, dtype=torch.long), None).argmax(-1)
    shares = torch.bincount(drawn[0], minlength=4) / 40_000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.01)
    drawn = [sampler(None, torch.zeros(1, 50, dtype=torch.long), None) for sampler in (noisy, again, other)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])  # noisy has drawn before


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_members_are_of_the_dtype_asked_for(tmp_path, dtype):
    evaluation.mdlm.save(train_toy.build(train_toy.Settings(width=8, layers=1)), tmp_path / "A")
    own = job(folder=tmp_path, names=("A",), dtype=dtype)
    inputs = train_toy.canvas([p.prompt for p in own.problems]).tokens, torch.arange(5).expand(PROBLEMS, 5), None
    assert own.member("A").denoise(*inputs).dtype == getattr(torch, dtype or "float32")


def test_a_cache_is_put_around_each_member(tmp_path):
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        evaluation.mdlm.save(train_toy.build(train_toy.Settings(width=8, layers=2)), tmp_path / name)
    exact, whole, kept = (evaluation.decode_job(job(folder=tmp_path, cache=cache)) for cache in (None, 1, 16))
    assert whole == exact != kept
    assert job(folder=tmp_path, cache=3).member("A").denoise.refresh == 3


def test_a_share_is_of_what_differs():
    """Token by token, also behind a text that EOS in the reasoning cut short."""
    records = [{"texts": [["12", "345"], ["12", ""]]}, {"texts": [["1", "345678."], ["13", "3"]]}]
    texts = [evaluation.written(record) for record in records]
    assert len(texts[0]) == len(texts[1]) == 2 * evaluation.T
    assert evaluation.differing(texts[:1], texts[1:]) == [(1 + 4 + 1 + 1) / (2 * evaluation.T)]
    assert evaluation.differing([[0, 1], []], [[0, 0], []]).tolist() == [0.5]


def test_sampling_copies_of_a_member_differ(tmp_path):
    evaluation.mdlm.save(train_toy.build(train_toy.Settings(width=8, layers=1)), tmp_path / "A")
    own = job(folder=tmp_path, names=("A", "A"), temperature=0.5, config=tie.Config(interval=evaluation.T))
    texts = [record["texts"] for record in evaluation.decode_job(own)]
    assert all(first != second for first, second in texts)
    assert [record["texts"] for record in evaluation.decode_job(own)] == texts


# --- the command on fake members -----------------------------------------------------------------------------


def check_relays(result, score, none):
    """A score's cell of Table 5 and its row of the main table, against the algorithm's own leaders and winners."""
    own, right = oracle(score=score)
    pairs = [(a != b) for row in own.leaders.T.tolist() for a, b in pairwise(row)]
    rate = cell(result["tables"]["5"], f"tie {score}", "change rate")
    assert rate["value"] == pytest.approx(np.mean(pairs)) and rate["n"] == len(pairs)
    assert rate["ci95"][0] < rate["value"] < rate["ci95"][1]
    [row] = [row for row in result["rows"] if row["score"] == score]
    assert row["change_rate"] == pytest.approx(np.mean(pairs)) and row["forwards"] == pytest.approx(own.forwards)
    assert row["none_alone"] == {"value": right[np.arange(PROBLEMS), own.winner][none].mean(), "n": none.sum()}


def test_every_cell_is_what_the_algorithm_gives(fakes, capsys):
    result = tables(capsys, "--table", "all")
    found, T, TCC = result["tables"], evaluation.T, evaluation.TCC
    assert list(found) == ["1", "2", "3", "5", "6", "7", "8", "9", "10"]
    after, alone = oracle(interval=T)
    none = ~alone.any(1)
    cells = [("6", f"n = {n}, paper {4 * n}", "accuracy", {"interval": n}) for n in (2, 4, 8)]
    cells += [("8", TCC, column, {"normalize": column == "with"}) for column in ("without", "with")]
    cells += [("9", f"tie {score}", column, {"score": score, "cross_model": column == "cross-model"})
              for score in tie.SCORES[1:] for column in ("source-only", "cross-model")]  # fmt: skip
    cells += [("10", TCC, "lowest C~", {}), ("10", TCC, "most selected", {"selection": "most_selected"}),
              ("10", TCC, "best model", {"selection": "best_model", "best_model": 1})]  # fmt: skip
    for score in tie.SCORES:
        cells.append(("3", f"tie {score}", "accuracy", {"score": score}))
        check_relays(result, score, none)
    for speed, config in (("threshold 0.9", {"threshold": 0.9}), ("top-k 2", {"top_k": 2})):
        cells.append(("7", TCC, speed, config))
        own, right = oracle(interval=T, **config)
        member, both = cell(found["7"], "member B", speed), cell(found["7"], "post-generation", speed)
        assert member["value"] == right[:, 1].mean() and member["forwards"] == pytest.approx(own.forwards / 2)
        assert both["forwards"] == pytest.approx(own.forwards)
    for table, row, column, config in cells:
        assert cell(found[table], row, column)["value"] == winners(**config), (table, row, column)
    counts = oracle(interval=T, normalize=False)[0].tcc.numpy()
    for m, name in enumerate("AB"):
        means = [counts[m][alone[:, m] == right].mean() for right in (True, False)]
        assert [c["value"] for c in found["1"]["cells"][2 * m : 2 * m + 2]] == pytest.approx(means)
        assert found["1"]["claims"][0]["comparisons"][m]["difference"] == pytest.approx(means[1] - means[0])
        means = [after.tcc[m][torch.tensor(alone[:, m] == right)].mean() for right in (True, False)]
        assert list(result["tcc"][m].values()) == [name, *(pytest.approx(float(mean)) for mean in means)]
    assert {"name": f"tie {tie.SCORES[0]} - best member", "difference": pytest.approx(
        winners() - alone.mean(0).max())}.items() <= result["comparisons"][1].items()  # fmt: skip
    values = {c["value"] for number in ("6", "7", "8", "9", "10") for c in found[number]["cells"]}
    assert len(values) > 2 and none.any()  # the fakes tell methods apart
    assert {own.config.selection for own in fakes} == {*tie.SELECTIONS}
    assert max(Counter(fakes).values()) == 1  # equal settings are one run


def test_cells_beyond_the_paper_are_what_the_algorithm_gives(fakes, capsys):
    found, T = tables(capsys, "--table", "own")["tables"], evaluation.T
    assert list(found) == ["members", "cost", "unequal", "cache"]
    for m in range(1, 5):
        names = tuple("ABCD"[:m])
        result, right = oracle(names, interval=T)
        for column, value, share in (("best member", right.mean(0).max(), 1 / m), ("oracle", right.any(1).mean(), 1),
                                     ("post-generation", winners(names=names, interval=T), 1),
                                     ("TIE", winners(names=names), 1)):  # fmt: skip
            own = cell(found["members"], f"M = {m}", column)
            assert own["value"] == value and own["forwards"] == pytest.approx(result.forwards * share)
    greedy, longer, union, *votes = found["cost"]["cells"][:6]
    assert greedy["value"] == winners(names=("B",), interval=T)
    assert longer["value"] == winners(names=("B-long",))
    forwards = [own["forwards"] / T for own in (greedy, longer, union, *votes)]
    assert forwards == pytest.approx([1, 1, 2, 2, 3, 4])
    assert {own.names for own in fakes if own.temperature} == {("B",) * 4, ("union",) * 2}
    pair = ("B", "A-weak")
    for place, row in enumerate(("the better member", "the weaker one")):
        assert cell(found["unequal"], row)["value"] == winners(names=pair[place : place + 1])
    for score in tie.SCORES:
        assert cell(found["unequal"], f"tie {score}")["value"] == winners(names=pair, score=score)
        for column in ("exact", "R = 2", "R = 8"):  # these members have no keys and values that could be kept
            assert cell(found["cache"], f"tie {score}", column)["value"] == winners(score=score)
        assert cell(found["cache"], f"other leaders, tie {score}", "R = 4")["value"] == 0
    assert {own.cache for own in fakes} == {None, 2, 4, 8}


def test_members_beyond_a_and_b_are_trained_only_for_the_tables_that_need_them(fakes, capsys, monkeypatch):
    trained, original = {}, train_toy.train_members
    monkeypatch.setattr(train_toy, "train_members", lambda plan, *rest: trained.update(plan) or original(plan, *rest))
    assert run("--table", 1) == 0 and [*trained] == ["A", "B"]
    assert run("--table", "own") == 0
    settings = train_toy.Settings()
    twice = replace(settings, steps=2 * settings.steps)
    assert trained == {
        **{name: (settings, name) for name in "ABCD"}, "B-long": (twice, "B"), "union": (twice, "BA"),
        "A-weak": (replace(settings, gaps=2 * settings.gaps), "A"),
    }  # fmt: skip


def test_each_run_is_decoded_once_and_resumed(fakes, capsys, tmp_path):
    first = tables(capsys, "--table", 6, 8, "--out", tmp_path)["tables"]
    whole = tables(capsys, "--table", "all", "--out", tmp_path)["tables"]
    assert {number: whole[number] for number in first} == first
    assert max(Counter(fakes).values()) == 1
    runs = {(own.config, own.names, own.restart) for own in fakes}
    assert len(runs) == 18 + 6 == len(list(tmp_path.glob("*.jsonl")))
    before = len(fakes)
    assert tables(capsys, "--table", "all", "--out", tmp_path)["tables"] == whole
    assert len(fakes) == before


def test_seeds_have_a_folder_each(fakes, capsys, tmp_path):
    arguments = ("--table", 8, 10, "--seeds", 2, "--seed", 3, "--out", tmp_path)
    found = tables(capsys, *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed3", "seed4", "summary.json"]
    assert found["settings"]["seeds"] == [3, 4] and {row["seed"] for row in found["rows"]} == {3, 4}
    assert cell(found["tables"]["8"], evaluation.TCC, "with")["values"] == 2 * [winners()]
    assert {own.folder.name for own in fakes} == {"toy-seed3", "toy-seed4"} and len(found["tables_by_seed"]) == 2
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "training seeds 3, 4" in out and "±" in out and "of 2 seeds" in out


def test_tables_name_title_paper_and_verdict(fakes, capsys):
    assert run("--table", "1", "2", "10", "1") == 0
    out = capsys.readouterr().out.replace("\n    ", " ")
    assert out.count("\nTable ") == 3 and "40.88" in out and "83.17" in out
    claims = r"^(The lowest C~|The answer tokens|Restarted from).*: (does not hold|holds|undecided) \(.+?: [-+][0-9]"
    assert len(re.findall(claims, out, re.MULTILINE)) == 3
    assert evaluation.figure({"difference": 0.125, "ci95": [-0.25, 1]}, "difference") == "+12.5 [-25.0, +100.0]"


# --- the trace -------------------------------------------------------------------------------------------------


def toy_of(**config):
    own = job(config=replace(job().config, **config))
    return SimpleNamespace(plain=own, names=own.names)


@pytest.mark.parametrize("config", [
    {}, {"normalize": False}, {"top_k": 2}, {"threshold": 0.7}, {"score": "negative_entropy"}, {"interval": 7}
])  # fmt: skip
def test_the_trace_is_the_decoding_and_the_author_whoever_committed(fakes, config):
    toy = toy_of(**config)
    canvas, states = train_toy.canvas([toy.plain.problems[0].prompt]), []
    members = [fake_member(toy.plain, name) for name in "AB"]
    trace = evaluation.Trace(toy, toy.plain.problems[0])
    result = tie.ensemble(members, [canvas] * 2, toy.plain.config, states.append)
    assert trace.tcc == result.tcc[:, 0].tolist()
    winner = result.candidates[int(result.winner[0])]
    assert trace.answer == train_toy.decode(winner.tokens[0, winner.answer].tolist())
    begin, held = 0, [[-1] * evaluation.T] * 2  # authors of what each member holds
    for state, (step, scores, leader) in zip(states, trace.rounds, strict=True):
        assert (step, scores, leader) == (state["step"], state["scores"][:, 0].tolist(), int(state["leader"][0]))
        for m, frames in enumerate(trace.frames):
            for frame in frames[begin:step]:
                new = {place for place, author in enumerate(frame.authors) if held[m][place] == -1 != author}
                assert 0 < len(new) and ("threshold" in config or len(new) == config.get("top_k", 1))
                held[m] = [m if place in new else author for place, author in enumerate(held[m])]
                assert held[m] == frame.authors
            whole = state["tokens"][m].masked_fill(state["masked"][m], train_toy.MASK)[0]
            assert frames[:step][-1].tokens == torch.cat([whole[canvas.reasoning], whole[canvas.answer]]).tolist()
        held, begin = [held[leader]] * 2 if leader >= 0 else held, step
    assert any({0, 1} <= {*frame.authors} for frames in trace.frames for frame in frames)
    if config == {"normalize": False}:
        assert [sum(sum(frame.changed) for frame in frames) for frames in trace.frames] == trace.tcc != [0, 0]


@pytest.mark.parametrize("terminal, environment, coloured", [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)
])  # fmt: skip
def test_only_a_terminal_that_can_gets_colours(fakes, monkeypatch, capsys, terminal, environment, coloured):
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    trace = evaluation.Trace(toy_of(), job().problems[0])
    evaluation.show_trace(trace)
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    evaluation.show_trace(trace)
    out = capsys.readouterr().out
    assert "\033" not in plain and re.sub(r"\033\[[0-9;]*m", "", out) == plain
    assert ("\033" in out) == coloured
    if coloured:  # the last line names the author of each token
        signs = re.findall(r"\033\[([0-9;]+)m(\w)\033\[0m", out.splitlines()[-1])
        assert signs == [(evaluation.INK[m][2], "AB"[m]) for m in trace.final.authors]


def test_the_trace_can_show_problems_that_no_member_solves_alone_and_tie_does(fakes, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROBLEMS", 24)
    prompts, alone = [p.prompt for p in job().problems], oracle(interval=evaluation.T)[1]
    result, right = oracle()
    chosen = [*compress(prompts, right[np.arange(24), result.winner.numpy()] & ~alone.any(1))]
    assert len(chosen) > 1 and chosen[0] != prompts[0]
    for more, expected in (((), prompts[:2]), (("--unsolved",), chosen[:2])):
        assert run("--trace", 2, *more) == 0
        assert re.findall(r"^([0-9].*\*.=) ", capsys.readouterr().out, re.MULTILINE) == expected
    assert run("--trace", 1, "--unsolved", "--problems", prompts.index(chosen[0])) == 2
    assert "--unsolved: TIE solves none of these" in capsys.readouterr().err


def test_the_picture_shows_what_the_trace_holds(fakes, monkeypatch, tmp_path):
    sheets, traces, original = [], [], evaluation.Trace
    monkeypatch.setattr(Figure, "savefig", lambda sheet, *_, **__: sheets.append(sheet))
    monkeypatch.setattr(evaluation, "Trace", lambda *given: traces.append(original(*given)) or traces[-1])
    toy = toy_of()
    toy.relay_solves = lambda: [toy.plain.problems[2]]
    evaluation.draw_trace(toy, tmp_path)
    [trace], [sheet] = traces, sheets
    assert "that no member solves alone and TIE does" in sheet.get_suptitle() and trace.problem == toy.plain.problems[2]
    relays = [leader for _, _, leader in trace.rounds if leader >= 0]
    for m, (panel, frames) in enumerate(zip(sheet.axes, trace.frames, strict=True)):
        shown = {text.get_position(): (text.get_text(), text.get_color()) for text in panel.texts if text.get_text()}
        for y, frame in enumerate(frames, 1):
            for x, (token, author) in enumerate(zip(frame.tokens, frame.authors)):
                if author >= 0:
                    assert shown.pop((x, y)) == (train_toy.VOCABULARY[token], evaluation.INK[author][1])
                elif x >= train_toy.REASONING_LENGTH:
                    assert shown.pop((x, y))[0] == train_toy.VOCABULARY[frame.answer[x - train_toy.REASONING_LENGTH]]
        edges = [patch.get_edgecolor() for patch in panel.patches]
        assert not shown and edges.count(to_rgba(evaluation.RED)) == sum(sum(f.changed) for f in frames) > 0
        arrows = [text for text in panel.texts if not text.get_text()]  # from the leader's panel to the other
        assert len(arrows) == relays.count(m) > 0
        assert all((arrow.get_position()[0], arrow.xy[0]) == (1 - m, m) for arrow in arrows)


# --- figures ---------------------------------------------------------------------------------------------------


def test_figures_are_drawn(fakes, capsys, tmp_path):
    assert run("--figure", tmp_path / "new" / "folder") == 0
    assert capsys.readouterr().out.count("drawn: ") == 3
    for name in evaluation.FIGURES:
        assert (tmp_path / "new" / "folder" / name).read_bytes()[:4] == b"\x89PNG"


def test_figure_1_shows_the_scores_after_every_step_of_a_member_alone(fakes):
    own = job(names=("A", "A"), problems=job().problems[:2],
              config=tie.Config(interval=1, block_size=8, score="probability_margin", cross_model=False))  # fmt: skip
    for problem, record in zip(own.problems, evaluation.decode_job(own)):
        assert len(record["scores"]) == evaluation.T - 1
        for steps, (said, _) in enumerate(record["scores"], 1):
            tokens, masked = alone("A", problem.prompt, steps)
            places = train_toy.canvas([problem.prompt]).answer
            positions = torch.arange(len(tokens))[None]
            logits = fake_member(own, "A").denoise(tokens.masked_fill(masked, train_toy.MASK)[None], positions, None)[0]
            best = logits[places].softmax(-1).topk(2)  # (A, 2)
            counted = masked[places] & (best.indices[:, 0] != train_toy.EOS)
            margins = (best.values[:, 0] - best.values[:, 1])[counted]
            assert said == (pytest.approx(float(margins.mean()), abs=1e-5) if len(margins) else None)
