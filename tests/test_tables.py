"""The paper's tables and figures on the toy: slow oracles, and fake members that know some problems."""

import json
import os
import zlib
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import tie
import train_toy

PROBLEMS = 9
REASONING = slice(train_toy.PROMPT_LENGTH, train_toy.PROMPT_LENGTH + train_toy.REASONING_LENGTH)


@cache
def targets(name, prompt):
    """What a fake member wants to say, (2, L): right where it knows the problem, and with help in any case. By chance
    each misses about a third of all problems."""
    right = torch.tensor(train_toy.Problem(int(prompt[:11:2]), int(prompt[12])).sequence)  # (L,)
    known = zlib.crc32(f"{prompt}{name}".encode()) % 3 > 0
    return torch.stack([right if known else torch.where(right < 10, (right + 1) % 10, right), right])


def fake_denoiser(name):
    """Finding the first column right in the reasoning is help. Noise depends on the state, so that top-1 tokens change
    and members disagree; it matters less as decoding goes on."""
    weights = torch.randn(train_toy.LENGTH, 17, generator=torch.Generator().manual_seed(sum(map(ord, name))))  # (L, V)

    def denoise(tokens, positions, attention_mask):
        own = torch.stack([targets(name, train_toy.decode(row[: train_toy.PROMPT_LENGTH])) for row in tokens.tolist()])
        start = REASONING.start
        helped = (tokens[:, start : start + 8] == own[:, 1, start : start + 8]).all(1)  # (B,)
        target = own[torch.arange(len(own)), helped.long()].gather(1, positions)  # (B, K)
        step = (tokens != train_toy.MASK).sum(1)[:, None, None]  # (B, 1, 1)
        noise = 3.2 * torch.sin(weights[positions] * step + tokens.sum(1)[:, None, None])  # (B, K, V)
        return noise + (2.0 + step / 12) * torch.nn.functional.one_hot(target, 17)

    return denoise


def fake_member(job, name, place=0):
    factor, denoise = dict(job.factors).get(name, 1), fake_denoiser(name)
    scaled = evaluation.sampling(denoise, job.temperature, place) if job.temperature else denoise
    return tie.Member(lambda *inputs: factor * scaled(*inputs), train_toy.MASK, train_toy.EOS, name)


@pytest.fixture
def fakes(monkeypatch):
    """Fake members that need no training, in this process; gives the jobs that were decoded."""
    jobs = []
    original = evaluation.decode_job
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(evaluation, "toy_member", fake_member)
    monkeypatch.setattr(train_toy, "train_members", lambda *_, **__: [{"validation_accuracy": x} for x in (0.6, 0.7)])
    monkeypatch.setattr(evaluation, "decode_job", lambda job: [jobs.append(job), original(job)][1])
    return jobs


def run(*arguments):
    settings = ["--problems", PROBLEMS, "--batch-size", 5, "--interval", 8, "--block-size", 8]
    return evaluation.main([*map(str, [*settings, *arguments])])


def tables(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def cell(table, row, column):
    [found] = [c for c in table["cells"] if c["row"] == row and c["column"] == column]
    return found


def job(**fields):
    problems = tuple(train_toy.problems("test", PROBLEMS, seed=0))
    return replace(evaluation.ToyJob("", ("A", "B"), tie.Config(interval=8, block_size=8), problems), **fields)


def oracle(**config):
    """Result of the algorithm itself, and each candidate's correctness (problems, M)."""
    own = job(factors=config.pop("factors", ()), names=config.pop("names", ("A", "B")))
    problems = own.problems
    canvas = train_toy.canvas([p.prompt for p in problems])
    members = [fake_member(own, name) for name in own.names]
    result = tie.ensemble(members, [canvas] * len(members), tie.Config(**{"interval": 8, "block_size": 8, **config}))
    right = [[train_toy.decode(c.tokens[b, c.answer].tolist()) == p.answer for c in result.candidates]
             for b, p in enumerate(problems)]  # fmt: skip
    return result, np.array(right)


def winners(**config):
    result, right = oracle(**config)
    return right[np.arange(PROBLEMS), result.winner.numpy()].mean()


# --- verdicts and estimates -------------------------------------------------------------------------------

intervals = st.lists(
    st.none() | st.tuples(st.sampled_from([-2, -1, 0, 1, 2]), st.integers(0, 3)).map(lambda t: [t[0], t[0] + t[1]]),
    min_size=1, max_size=4,
)  # fmt: skip


@given(intervals)
def test_a_verdict_is_undecided_where_an_interval_holds_zero(cis):
    said = evaluation.verdict([{"ci95": ci} for ci in cis])
    signs = ["?" if ci is None or ci[0] <= 0 <= ci[1] else "+" if ci[0] > 0 else "-" for ci in cis]
    expected = "does not hold" if "-" in signs else "undecided" if "?" in signs else "holds"
    assert said == expected


def test_estimates_resample_each_group_by_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2, 1, 300), rng.normal(1, 2, 200)
    result = evaluation.estimate(lambda x, y: x.mean() - y.mean(), a, b)
    error = 1.96 * np.sqrt(a.var() / 300 + b.var() / 200)
    assert result["value"] == pytest.approx(a.mean() - b.mean())
    assert result["ci95"] == pytest.approx([result["value"] - error, result["value"] + error], abs=0.03)
    assert evaluation.estimate(np.mean, np.array([])) == {"value": None, "ci95": None}


# --- tables of hand-made records ---------------------------------------------------------------------------


def toy(records, best=0):
    return evaluation.Toy(("A", "B"), best, {"9": (("B", 4.0),)}, records)


def test_table_1_separates_correct_from_incorrect_answers_of_each_member():
    records = [{"correct": [c, not c], "tcc": [t, 10 * t]} for c, t in ((True, 1), (True, 3), (False, 8), (False, 6))]
    table = evaluation.paper_table("1", toy({evaluation.PLAIN: records}))
    values = {(c["row"], c["column"]): (c["value"], c["n"]) for c in table["cells"]}
    assert values == {("member A", "correct"): (2, 2), ("member A", "incorrect"): (7, 2),
                      ("member B", "correct"): (70, 2), ("member B", "incorrect"): (20, 2)}  # fmt: skip
    [claim] = table["claims"]
    assert [c["difference"] for c in claim["comparisons"]] == [5, -50]
    assert claim["verdict"] == "does not hold"


def test_table_2_compares_correction_rates_with_one_half():
    right = {"member A restarted from first 33": 40 * [True], "member A restarted from first 50": 30 * [True] + 10 * [False],
             "member B restarted from first 33": 35 * [True], "member B restarted from first 50": [],
             "member A restarted from all reasoning": [True], "member B restarted from all reasoning": [True]}  # fmt: skip
    records = {name: [{"correct": [r], "winner": 0, "forwards": 32.0} for r in own] for name, own in right.items()}
    table = evaluation.paper_table("2", toy(records))
    assert cell(table, "member A", "first 50 %")["value"] == 0.75
    wilson = evaluation.accuracy(right["member A restarted from first 50"])["ci95"]
    second = table["claims"][0]["comparisons"][0]
    assert second["difference"] == 0.25 and second["ci95"] == pytest.approx([x - 0.5 for x in wilson])
    assert cell(table, "member B", "first 50 %")["value"] is None and table["claims"][0]["verdict"] == "undecided"


def test_table_5_counts_relays_that_follow_a_relay():
    leaders = [[0, 0, 1], [1, 1], [0], []]
    table = evaluation.paper_table("5", toy({name: [{"leaders": x} for x in leaders] for name in evaluation.METHODS}))
    assert [(c["value"], c["n"]) for c in table["cells"]] == [(pytest.approx(1 / 3), 3)] * 4
    assert all(c["ci95"] == [0, 0.5] for c in table["cells"])  # of the two problems with such relays


def test_over_seeds_gives_mean_spread_and_counts():
    def table(value, verdict):
        comparison = {"name": "x", "difference": value, "ci95": [0, 1]}
        own = {"row": "r", "column": "c", "value": value, "forwards": 2 * (value or 0)}
        return {"title": "t", "factors": {"A": value}, "paper": [], "cells": [own],
                "claims": [{"claim": "k", "verdict": verdict, "comparisons": [comparison]}]}  # fmt: skip

    of_seeds = [(1.0, "holds"), (2.0, "undecided"), (None, "holds"), (6.0, "holds")]
    joined = evaluation.over_seeds([table(*own) for own in of_seeds])
    [own] = joined["cells"]
    assert own["value"] == 3.0 and own["sd"] == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert own["values"] == [1.0, 2.0, None, 6.0] == joined["factors"]["A"]
    [claim] = joined["claims"]
    assert claim["verdict"] == "holds with 3 of 4 seeds, undecided with 1 of 4 seeds"
    assert claim["comparisons"][0]["difference"] == 3.0 and own["forwards"] == 4.5


# --- runs: sharpened logits, restarts ------------------------------------------------------------------------


def test_overconfident_multiplies_the_logits_of_that_member_alone(tmp_path):
    for member, name in enumerate("AB"):
        torch.manual_seed(member)
        evaluation.mdlm.save(train_toy.build(train_toy.Settings(width=8, layers=1)), tmp_path / name)
    own = job(folder=str(tmp_path))
    inputs = train_toy.canvas([p.prompt for p in own.problems]).tokens, torch.arange(5).expand(PROBLEMS, 5), None
    plain = [member.denoise(*inputs) for member in evaluation.toy_setup(own).members]
    sharp = [member.denoise(*inputs) for member in evaluation.toy_setup(replace(own, factors=(("B", 3.0),))).members]
    assert torch.equal(sharp[0], plain[0]) and torch.allclose(sharp[1], 3 * plain[1])
    assert not torch.allclose(plain[0], plain[1])


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_members_are_of_the_dtype_asked_for(tmp_path, dtype):
    evaluation.mdlm.save(train_toy.build(train_toy.Settings(width=8, layers=1)), tmp_path / "A")
    own = job(folder=str(tmp_path), names=("A",), dtype=dtype)
    inputs = train_toy.canvas([p.prompt for p in own.problems]).tokens, torch.arange(5).expand(PROBLEMS, 5), None
    assert evaluation.toy_setup(own).members[0].denoise(*inputs).dtype == getattr(torch, dtype or "float32")


@pytest.mark.parametrize("steps", [11, 16, 24])
def test_a_restart_begins_at_the_others_state_and_keeps_its_tokens(fakes, steps):
    own = job(names=("A",), restart=("B", steps))
    [start] = evaluation.toy_setup(own).canvases([evaluation.Question("", p.prompt, "") for p in own.problems])
    member, state = fake_member(own, "B"), train_toy.canvas([p.prompt for p in own.problems])
    for _ in range(steps):
        state = tie.commit(state, tie.read(member, state, tie.block_ends(state, 8), own.config), own.config)
    assert torch.equal(start.masked, state.masked)
    assert torch.equal(start.tokens[~start.masked], state.tokens[~state.masked])
    assert (start.masked.sum(1) == 32 - steps).all()
    kept = "".join(train_toy.VOCABULARY[i] for i in state.tokens[0, REASONING][:8].tolist())
    assert evaluation.decode_questions(
        evaluation.toy_setup(own), own.config, [evaluation.Question("", own.problems[0].prompt, "")]
    )[0]["texts"][0][0].startswith(kept)  # fmt: skip


def test_restarts_are_of_problems_that_one_member_failed_and_the_other_solved(fakes):
    _, right = oracle(interval=32)
    alone = [{"correct": row.tolist()} for row in right]
    runs = evaluation.restarts(job(), alone)
    assert len(runs) == 6
    for name, own in runs.items():
        receiver, share = name.split()[1], name.split()[-1]
        r = "AB".index(receiver)
        assert own.names == (receiver,) and own.restart == ("BA"[r], {"33": 11, "50": 16, "reasoning": 24}[share])
        assert list(own.problems) == [p for p, row in zip(job().problems, right) if row[1 - r] and not row[r]] != []


# --- the command on fake members -----------------------------------------------------------------------------


def test_every_cell_is_what_the_algorithm_gives(fakes, capsys):
    found = tables(capsys, "--table", "all", "--overconfident", "A=5")["tables"]
    assert list(found) == ["1", "2", "3", "5", "6", "7", "8", "9", "10"]
    names = evaluation.METHODS[2:]
    for n in (2, 4, 8):
        assert cell(found["6"], f"n = {n}, paper {4 * n}", "accuracy")["value"] == winners(interval=n)
    for column, normalize in (("without", False), ("with", True)):
        assert cell(found["8"], evaluation.TCC, column)["value"] == winners(normalize=normalize)
    for suffix, sharp in (("", ()), (" overconfident", (("A", 5.0),))):
        for name, (column, cross) in [(n, c) for n in names for c in (("source-only", False), ("cross-model", True))]:
            expected = winners(score=name[4:], cross_model=cross, factors=sharp)
            assert cell(found["9"], name + suffix, column)["value"] == expected
    for speed, config in (("threshold 0.9", {"threshold": 0.9}), ("top-k 2", {"top_k": 2})):
        result, right = oracle(interval=32, **config)
        assert cell(found["7"], "member B", speed)["value"] == right[:, 1].mean()
        assert cell(found["7"], "member B", speed)["forwards"] == pytest.approx(result.forwards / 2)
        assert cell(found["7"], evaluation.TCC, speed)["value"] == winners(**config)
        assert cell(found["7"], "post-generation", speed)["forwards"] == pytest.approx(result.forwards)
    chosen = {"lowest C~": {}, "most selected": {"selection": "most_selected"},
              "best model": {"selection": "best_model", "best_model": 1}}  # fmt: skip
    for column, config in chosen.items():
        assert cell(found["10"], evaluation.TCC, column)["value"] == winners(**config)
    _, alone = oracle(interval=32)
    counts = oracle(interval=32, normalize=False)[0].tcc.numpy()
    assert cell(found["1"], "member A", "correct")["value"] == pytest.approx(counts[0][alone[:, 0]].mean())
    values = {c["value"] for number in ("6", "7", "8", "9", "10") for c in found[number]["cells"]}
    assert len(values) > 2  # the fakes tell methods apart


def test_cells_beyond_the_paper_are_what_the_algorithm_gives(fakes, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "calibrated", lambda job, name: (name, {"B": 0.5, "A-weak": 3.0}[name]))
    found = tables(capsys, "--table", "own")["tables"]
    assert list(found) == ["members", "cost", "unequal"]
    for m in range(1, 5):
        names = ("A", "B", "C", "D")[:m]
        result, right = oracle(names=names, interval=32)
        for column, value in (("best member", right.mean(0).max()), ("oracle", right.any(1).mean()),
                              ("post-generation", winners(names=names, interval=32)), ("TIE", winners(names=names))):
            assert cell(found["members"], f"M = {m}", column)["value"] == value
        for column, share in (("best member", 1 / m), ("oracle", 1), ("TIE", 1)):
            assert cell(found["members"], f"M = {m}", column)["forwards"] == pytest.approx(result.forwards * share)
    assert cell(found["cost"], "best member, greedy", "accuracy")["value"] == winners(names=("B",), interval=32)
    longer = cell(found["cost"], "best member, trained twice as long", "accuracy")
    assert longer["value"] == winners(names=("B-long",)) and longer["forwards"] == 32
    assert cell(found["cost"], "one member, training and forwards of both", "accuracy")["forwards"] == 64
    votes = [cell(found["cost"], f"best member, vote of {m} samples", "accuracy") for m in (2, 3, 4)]
    assert [entry["forwards"] for entry in votes] == pytest.approx([32 * m for m in (2, 3, 4)])
    pair, factors = ("B", "A-weak"), (("B", 0.5), ("A-weak", 3.0))
    for place, row in enumerate(("the better member", "the weaker one")):
        assert cell(found["unequal"], row, "as trained")["value"] == winners(names=pair[place : place + 1])
    for name in evaluation.LOGIT:
        assert cell(found["unequal"], name, "as trained")["value"] == winners(names=pair, score=name[4:])
        expected = winners(names=pair, score=name[4:], factors=factors)
        assert cell(found["unequal"], name, "calibrated")["value"] == expected
    assert found["unequal"]["factors"] == dict(factors)


def test_members_beyond_a_and_b_are_trained_only_for_the_tables_that_need_them():
    settings = train_toy.Settings()
    assert evaluation.own_plan(["1"], settings, "B", "A") == {}
    plan = evaluation.own_plan(["members", "cost", "unequal"], settings, "B", "A")
    assert plan == {
        **{name: (settings, name) for name in "ABCD"},
        "B-long": (replace(settings, steps=2 * settings.steps), "B"),
        "union": (replace(settings, steps=2 * settings.steps), "BA"),
        "A-weak": (replace(settings, gaps=2 * settings.gaps), "A"),
    }


def test_one_member_with_the_forwards_of_both_votes_over_two_samples():
    union = evaluation.own_runs(job(), "B", "A", ())["union"]
    assert union.names == ("union", "union") and union.temperature > 0


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 2)), min_size=1, max_size=5), st.data())
def test_a_vote_goes_to_the_most_frequent_answer_and_among_equals_to_the_lowest_count(samples, data):
    count = data.draw(st.integers(1, len(samples)))
    record = {"answers": [a for a, _ in samples], "tcc": [t for _, t in samples], "correct": [a == "x" for a, _ in samples]}
    tally = Counter(a for a, _ in samples[:count])
    ranked = sorted((-tally[a], t, m) for m, (a, t) in enumerate(samples[:count]))
    assert evaluation.vote(record, count) == (samples[ranked[0][2]][0] == "x")


def test_samples_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    noisy = evaluation.sampling(lambda tokens, positions, mask: logits.expand(*positions.shape, -1), 0.7, seed=0)
    drawn = noisy(None, torch.zeros(1, 40_000, dtype=torch.long), None).argmax(-1)
    shares = torch.bincount(drawn[0], minlength=4) / 40_000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.01)
    again = evaluation.sampling(lambda tokens, positions, mask: logits.expand(*positions.shape, -1), 0.7, seed=0)
    other = evaluation.sampling(lambda tokens, positions, mask: logits.expand(*positions.shape, -1), 0.7, seed=1)
    drawn = [sampler(None, torch.zeros(1, 50, dtype=torch.long), None) for sampler in (noisy, again, other)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])  # noisy has drawn before


def test_calibration_undoes_a_factor_on_the_logits(fakes):
    plain = evaluation.calibrated(job(), "A")
    sharp = evaluation.calibrated(job(factors=(("A", 4.0),)), "A")
    assert plain[0] == "A" and sharp[1] * 4 == pytest.approx(plain[1], rel=0.06)  # the grid's step


def test_most_selected_is_that_of_the_algorithm(fakes):
    result, right = oracle(interval=5)  # six relays, so that members can lead equally often
    expected, _ = oracle(interval=5, selection="most_selected")
    for b in range(PROBLEMS):
        record = {"correct": right[b], "leaders": result.leaders[:, b].tolist(), "winner": int(result.winner[b])}
        assert evaluation.most_selected(record) == int(expected.winner[b])
    for leaders, chosen in (([0, 1], 1), ([], 1), ([0, 0, 1], 0), ([1, 0, 1], 1)):
        assert evaluation.most_selected({"correct": [True, False], "leaders": leaders, "winner": 1}) == chosen


def test_each_run_is_decoded_once_and_resumed(fakes, capsys, tmp_path):
    first = tables(capsys, "--table", 6, 8, "--out", tmp_path)["tables"]
    whole = tables(capsys, "--table", "all", "--out", tmp_path)["tables"]
    assert {number: whole[number] for number in first} == first
    assert max(Counter(fakes).values()) == 1
    configurations = {(own.config, own.names, own.factors, own.restart) for own in fakes}
    assert len(configurations) == 22 + 6 == len(list(tmp_path.glob("*.jsonl")))
    before = len(fakes)
    assert tables(capsys, "--table", "all", "--out", tmp_path)["tables"] == whole
    assert len(fakes) == before


def test_other_factors_are_other_records(fakes, capsys, tmp_path):
    assert run("--table", 9, "--out", tmp_path) == 0
    assert run("--table", 9, "--overconfident", "B=8", "--out", tmp_path) == 2
    assert "another overconfident" in capsys.readouterr().err


def test_the_main_table_takes_an_overconfident_member(fakes, capsys):
    found = tables(capsys, "--overconfident", "A=5")
    row = {(r["method"], r["score"]): r["accuracy"] for r in found["rows"]}
    for score in tie.SCORES:
        assert row["tie", score] == winners(score=score, factors=(("A", 5.0),))
    assert all(own.factors == (("A", 5.0),) for own in fakes) and found["settings"]["overconfident"] == {"A": 5.0}


def test_seeds_have_a_folder_each(fakes, capsys, tmp_path):
    found = tables(capsys, "--table", 8, 10, "--seeds", 2, "--seed", 3, "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed3", "seed4", "summary.json"]
    assert found["settings"]["seeds"] == [3, 4] and {row["seed"] for row in found["rows"]} == {3, 4}
    assert cell(found["tables"]["8"], evaluation.TCC, "with")["values"] == 2 * [winners()]
    assert {Path(own.folder).name for own in fakes} == {"toy-seed3", "toy-seed4"}
    assert len(found["tables_by_seed"]) == 2
    run("--table", 8, 10, "--seeds", 2, "--seed", 3, "--out", tmp_path)
    out = capsys.readouterr().out
    assert "training seeds 3, 4" in out and "±" in out and "of 2 seeds" in out


def test_tables_name_title_paper_and_verdict(fakes, capsys):
    assert run("--table", "1", "2", "10", "1") == 0
    out = capsys.readouterr().out
    assert out.count("\nTable ") == 3 and "40.88" in out and "83.17" in out
    assert all(any(word in line for word in ("holds", "hold (", "undecided")) for line in out.split("\n")
               if line.startswith(("The lowest C~", "The answer tokens", "Restarted from the")))  # fmt: skip


# --- figures ---------------------------------------------------------------------------------------------------


def test_figures_are_drawn(fakes, capsys, tmp_path):
    assert run("--figure", tmp_path / "new" / "folder") == 0
    assert capsys.readouterr().out.count("drawn: ") == 2
    for name in evaluation.FIGURES:
        assert (tmp_path / "new" / "folder" / name).read_bytes()[:4] == b"\x89PNG"


def test_figure_1_shows_the_scores_after_every_step(fakes):
    own = evaluation.toy_runs(job(), (("B", 4.0),))["member A probability_margin"]
    records = evaluation.decode_job(own)
    member, canvas = fake_member(own, "A"), train_toy.canvas([p.prompt for p in own.problems])
    for step in range(31):
        canvas = tie.commit(canvas, tie.read(member, canvas, tie.block_ends(canvas, 8), own.config), own.config)
        places = torch.arange(canvas.answer.start, canvas.answer.stop).expand(PROBLEMS, -1)
        logits = member.denoise(canvas.tokens.masked_fill(canvas.masked, train_toy.MASK), places, None)
        logits[..., train_toy.MASK] = -torch.inf
        counted = canvas.masked[:, canvas.answer] & (logits.argmax(-1) != train_toy.EOS)
        expected = tie.confidence(logits, counted)["probability_margin"].tolist()
        for record, value in zip(records, expected):
            [said] = record["scores"][step]
            assert said == pytest.approx(value) if said is not None else value == -torch.inf


def test_members_from_their_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    settings = train_toy.Settings()
    for name in "AB":  # complete folders, so that nothing is trained
        evaluation.mdlm.save(train_toy.build(settings), tmp_path / "toy-seed0" / name)
        record = {"settings": asdict(settings), "name": name, "layout": train_toy.LAYOUT, "validation_accuracy": 0.5}
        (tmp_path / "toy-seed0" / name / train_toy.RECORD).write_text(json.dumps(record))
    found = tables(capsys, "--table", 2, 9, "--checkpoints", tmp_path, "--problems", 2)
    assert set(found["tables"]) == {"2", "9"} and {"settings", "problems", "rows", "comparisons"} <= set(found)
    assert found["tables"]["9"]["factors"] == {"B": 4}
