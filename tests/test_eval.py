"""The tables, the trace and the figures of the toy, against a slow recomputation on fake members."""

import io
import json
import re
import shutil
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import fake

import eval as evaluation
import tie
import train_toy

pytest_plugins = "tiny"
N = 16  # problems
T = 32
CONFIG = {"interval": 4, "block_size": 12}
TCC, *LOGIT = (f"tie {score}" for score in tie.SCORES)


def run(*arguments):
    """What the command prints."""
    options = ["--problems", N, "--interval", 4, "--block-size", 12, "--batch-size", 10]
    with redirect_stdout(io.StringIO()) as out:
        assert evaluation.main([*map(str, [*options, *arguments])]) == 0
    return out.getvalue()


def tables(*arguments):
    return json.loads(run(*arguments, "--json"))["tables"]


def check(tables, table, row, column, value, n=N):
    cells = tables[table]["cells"]
    [found] = [cell for cell in cells if (cell["row"], cell["column"]) == (row, column)]
    assert found["value"] == pytest.approx(float(value)) and found["n"] == n, (table, row, column)


# --- what the algorithm itself gives --------------------------------------------------------------

ASKED = train_toy.problems("test", N)
CANVAS = train_toy.canvas([problem.prompt for problem in ASKED])


def member(name):
    return tie.Member(fake(f"toy-seed0 {name}"), train_toy.MASK, train_toy.EOS, name)


def graded(canvas):
    """(N,) bool"""
    answers = [train_toy.decode(row.tolist()) for row in canvas.tokens[:, canvas.answer]]
    return np.array([answer == problem.answer for answer, problem in zip(answers, ASKED)])


def decoded(names="AB", **config):
    """The result, and whether each candidate (N, M) and the final response (N,) is right."""
    members = [member(name) for name in names]
    result = tie.ensemble(members, [CANVAS] * len(names), tie.Config(**CONFIG | config))
    right = np.stack([graded(candidate) for candidate in result.candidates], 1)
    return result, right, right[np.arange(N), result.winner]


def share(names="AB", **config):
    return decoded(names, **config)[2].mean()


@pytest.fixture(scope="module")
def everything(toys):
    return tables("main", "all", "members", "unequal", "cache", "speed")


@pytest.fixture
def expect(everything):
    return partial(check, everything)


def test_cells_are_what_the_algorithm_gives(expect):
    _, alone, after = decoded(interval=T)
    unsolved = ~alone.any(1)
    for name in (TCC, *LOGIT):
        result, _, right = decoded(score=name[4:])
        expect("main", name, "accuracy", right.mean())
        expect("main", name, "- best member", right.mean() - alone.mean(0).max())
        expect("main", name, "- post-generation", right.mean() - after.mean())
        expect("main", name, "of those unsolved alone", right[unsolved].mean(), unsolved.sum())
        expect("3", name, "forwards", result.forwards)
        changes = [a != b for leaders in result.leaders.T.tolist() for a, b in pairwise(leaders)]
        expect("5", name, "change rate", np.mean(changes))
    for name in LOGIT:
        expect("9", name, "cross-model", share(score=name[4:]))
        expect("9", name, "source-only", share(score=name[4:], cross_model=False))
    for m, name in enumerate("AB"):
        expect("3", f"member {name}", "accuracy", alone[:, m].mean())
    expect("3", "oracle", "accuracy", alone.any(1).mean())
    expect("3", "post-generation", "accuracy", after.mean())
    for n in (2, 4, 8):
        expect("6", f"n = {n}, paper {4 * n}", "accuracy", share(interval=n))
    expect("8", TCC, "without", share(normalize=False))
    expect("8", TCC, "with", share())
    for speed, config in (("threshold 0.9", {"threshold": 0.9}), ("top-k 2", {"top_k": 2})):
        expect("7", TCC, speed, share(**config, interval=2))
        result, alone, _ = decoded(**config, interval=T)
        expect("7", "member B", speed, alone[:, 1].mean())
        expect("7", "post-generation", f"forwards, {speed}", result.forwards)


def test_a_step_costs_a_forward_per_member_and_a_cross_model_relay_one_more(toys):
    cells = tables("3", "--interval", 2, "--problems", 2)["3"]["cells"]
    forwards = [cell["value"] for cell in cells if cell["column"] == "forwards"]
    assert forwards == [32, 32, 64, 64, 64, 94, 94, 94]


def test_table_1_is_of_plain_counts(everything, expect):
    result, right, _ = decoded(interval=T, normalize=False)
    for m, difference in enumerate(everything["1"]["claims"][0]["differences"]):
        counts = result.tcc[m].numpy()
        wrong = counts[~right[:, m]]
        correct = counts[right[:, m]]
        expect("1", f"member {'AB'[m]}", "incorrect", wrong.mean(), len(wrong))
        expect("1", f"member {'AB'[m]}", "correct", correct.mean(), len(correct))
        assert difference["value"] == pytest.approx(wrong.mean() - correct.mean())
        # A slow bootstrap, which draws from each group by itself.
        draw = np.random.default_rng(7).choice
        gaps = [
            draw(wrong, len(wrong)).mean() - draw(correct, len(correct)).mean() for _ in range(3000)
        ]
        interval = np.percentile(gaps, [2.5, 97.5])
        assert np.abs(interval - difference["ci95"]).max() < 0.2 * np.std(gaps)


@pytest.mark.parametrize(("receiver", "sender"), ["AB", "BA"])
def test_a_restart_continues_from_what_the_other_member_had(receiver, sender, expect):
    inputs = []
    other = member(sender)

    def denoise(tokens, *given):
        inputs.append(tokens.clone())
        return other.denoise(tokens, *given)

    solved = graded(tie.decode(replace(other, denoise=denoise), CANVAS, tie.Config(**CONFIG)))
    failed = solved & ~decoded(receiver)[2]
    for start, steps in {"first 33 %": 11, "first 50 %": 16, "all reasoning": 24}.items():
        state = replace(CANVAS, tokens=inputs[steps], masked=inputs[steps] == train_toy.MASK)
        right = graded(tie.decode(member(receiver), state, tie.Config(**CONFIG)))
        expect("2", f"member {receiver}", start, right[failed].mean(), failed.sum())


def test_table_10_chooses_among_the_same_candidates(toys):
    found = tables("10", "--interval", 13, "--block-size", 4)  # two relays, so leads can be equal
    result, right, chosen = decoded(interval=13, block_size=4)
    most = []
    for b, leaders in enumerate(result.leaders.T.tolist()):
        lead = leaders.count(1) - leaders.count(0)
        most.append(right[b, int(lead > 0) if lead else result.winner[b]])
    values = [chosen.mean(), right[:, 1].mean(), np.mean(most)]  # B is best in validation
    assert len({*values}) == 3
    for column, value in zip(("lowest C~", "best model", "most selected"), values):
        check(found, "10", TCC, column, value)


def test_tables_beyond_the_paper(expect):
    for m in range(1, 5):
        names = "ABCD"[:m]
        _, alone, after = decoded(names, interval=T)
        row = {"best member": alone.mean(0).max(), "oracle": alone.any(1).mean()}
        row |= {"post-generation": after.mean(), "TIE": share(names), "forwards": m * T}
        for column, value in row.items():
            expect("members", f"M = {m}", column, value)
    expect("unequal", "the better member", "accuracy", share("B"))
    expect("unequal", TCC, "accuracy", share(["B", "A-weak"]))
    exact = decoded()[0]
    expect("cache", TCC, "exact", share())
    for R in (2, 4, 8):
        cached = decoded([f"A {R}", f"B {R}"])[0]
        expect("cache", TCC, f"R = {R}", share([f"A {R}", f"B {R}"]))
        pairs = zip(cached.candidates, exact.candidates)
        tokens = [(ours.tokens != theirs.tokens)[:, CANVAS.masked[0]] for ours, theirs in pairs]
        expect("cache", f"other tokens, {TCC}", f"R = {R}", torch.stack(tokens).double().mean())
        leaders = (cached.leaders != exact.leaders).double().mean()
        expect("cache", f"other leaders, {TCC}", f"R = {R}", leaders)


def worked(names, R=None, answer_length=train_toy.ANSWER_LENGTH, **config):
    """The mean work of decoding each problem by itself, where every call counts, by column."""
    rows = []
    for problem in ASKED:
        spent = []

        def spy(denoise, spent=spent):
            def call(tokens, *given):
                spent.append(int(tokens.sum()) if R else tokens.shape[1])  # see tiny.cached
                return denoise(tokens, *given)

            return call

        canvas = train_toy.canvas([problem.prompt], answer_length=answer_length)
        members = [member(f"{name} {R}" if R else name) for name in names]
        members = [replace(m, denoise=spy(m.denoise)) for m in members]
        result = tie.ensemble(members, [canvas] * len(names), tie.Config(**CONFIG | config))
        chosen = result.candidates[result.winner].tokens[0, canvas.answer]
        right = train_toy.decode(chosen.tolist()) == problem.answer
        rows.append([right, len(spent), sum(spent)])
    return dict(zip(("accuracy", "forwards", "positions"), np.mean(rows, 0)))


def test_the_work_is_what_rows_with_masks_left_take(expect):
    plain = worked("B")["positions"]
    assert plain == T * train_toy.LENGTH
    speeds = {
        "threshold": {"threshold": 0.9, "interval": 2},
        "both": {"threshold": 0.9, "interval": 2, "R": 4},
        "16, stop at EOS": {"answer_length": 16, "answer_window": 8, "stop_at_eos": True},
    }
    for method, names in (("best member", "B"), ("TIE", "AB")):
        for speed, settings in speeds.items():
            row = worked(names, **settings)
            row["relative"] = row["positions"] / plain
            for column, value in row.items():
                expect("speed", f"{method}, {speed}", column, value)
    for method, count in (("best member", 1), ("post-generation", 2), ("TIE", 2)):
        expect("speed", f"{method}, plain", "relative", count)
        expect("speed", f"{method}, 16 answer positions", "positions", count * (T + 8) * (47 + 8))


def test_stopping_at_eos_saves_forwards_and_changes_no_answer_of_a_member(everything):
    cells = everything["speed"]["cells"]
    value = {(cell["row"], cell["column"]): cell["value"] for cell in cells}
    rows = [f"best member, 16{end}" for end in (" answer positions", ", stop at EOS")]
    whole, stopped = ([value[row, column] for column in ("accuracy", "forwards")] for row in rows)
    assert whole[0] == stopped[0] and whole[1] > stopped[1]


def test_a_vote_takes_the_most_frequent_answer_or_else_the_lowest_count(toys, tmp_path):
    expect = partial(check, tables("cost", "--checkpoints", tmp_path), "cost")
    kept = [json.loads(file.read_text()) for file in tmp_path.glob("*/decoded/*")]
    rows = {f"best member, vote of {count} samples": (4, count) for count in (2, 3, 4)}
    rows["one member, training and forwards of both"] = (2, 2)
    copies = []
    for row, (samples, count) in rows.items():
        right = []
        for record in chain(*kept):
            if len(record["tcc"]) == samples and not record["leaders"]:
                votes = Counter(record["answers"][:count])
                ranked = [(-votes[record["answers"][m]], record["tcc"][m], m) for m in range(count)]
                right.append(record["correct"][min(ranked)[2]])
                copies.append(record["texts"][0] != record["texts"][1])
        assert len(right) == N
        expect(row, "accuracy", np.mean(right))
    assert np.mean(copies) > 0.5  # each copy draws its own samples
    expect("best member, greedy", "accuracy", share("B"))
    expect("best member, trained twice as long", "accuracy", share(["B-long"]))


def test_samples_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    noisy = evaluation.sampling(lambda tokens, at, mask: logits.expand(*at.shape, -1), 0.7, 0)
    drawn = noisy(None, torch.zeros(1, 40_000, dtype=torch.long), None).argmax(-1)
    shares = torch.bincount(drawn[0], minlength=4) / 40_000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.01)


def test_only_tables_that_need_them_train_more_members(toys):
    toys.clear()
    run("1")
    assert [*toys] == ["A", "B"]
    run("members", "cost", "unequal")
    settings = train_toy.Settings()
    twice = replace(settings, steps=2 * settings.steps)
    plan = {name: (settings, name) for name in "ABCD"}
    plan |= {"B-long": (twice, "B"), "union": (twice, "BA")}
    assert toys == plan | {"A-weak": (replace(settings, gaps=2 * settings.gaps), "A")}


# --- intervals, claims, several seeds, what is printed --------------------------------------------


@pytest.mark.parametrize("reasoning", [0, 28])
def test_an_answer_stops_in_the_block_of_its_eos(reasoning):
    """As for code: 484 or 512 answer positions, with an EOS at the one numbered 120."""
    first = reasoning + 1
    confident = torch.rand(first + 512, generator=torch.Generator().manual_seed(0))

    def denoise(tokens, positions, attention_mask):
        token = torch.where(positions == first + 120, 1, 2)
        return torch.nn.functional.one_hot(token, 3) * (5 + confident[positions])[..., None]

    canvas = tie.Canvas.blank([[2]], [], reasoning, 512 - reasoning, mask_id=0, pad_id=1)
    forwards = {}
    for stop in (False, True):
        config = tie.Config(stop_at_eos=stop)
        forwards[stop] = tie.ensemble([tie.Member(denoise, 0, 1)], [canvas], config).forwards
    assert forwards[False] == 512 and reasoning + 121 <= forwards[True] <= reasoning + 128


def test_the_interval_of_a_share_is_wilsons(everything):
    """The interval contains the shares that a test at 5 % does not reject."""
    for number in ("2", "6", "8", "9", "10"):
        for cell in everything[number]["cells"]:
            for q in cell["ci95"]:
                error = 1.96 * np.sqrt(q * (1 - q) / cell["n"])
                assert abs(cell["value"] - q) == pytest.approx(error, abs=1e-9)


def test_a_claim_holds_if_the_intervals_of_all_its_differences_are_above_zero(everything):
    claims = [claim for table in everything.values() for claim in table["claims"]]
    for claim in claims:
        lows, highs = zip(*(difference["ci95"] for difference in claim["differences"]))
        expected = "holds" if min(lows) > 0 else "does not hold" if min(highs) < 0 else "undecided"
        assert claim["verdict"] == expected
    assert {claim["verdict"] for claim in claims} == {"holds", "does not hold", "undecided"}
    [same] = [
        c
        for c in everything["main"]["cells"]
        if (c["row"], c["column"]) == ("post-generation", "- post-generation")
    ]
    assert same["ci95"] == [0, 0]  # differences are paired


def test_json_of_several_seeds_has_their_mean_and_values(toys):
    found = json.loads(run("1", "8", "--seeds", 2, "--seed", 3, "--json"))
    assert {*found} == {"settings", "versions", "problems", "tables"} and found["problems"] == N
    alone = [tables("1", "8", "--seed", seed) for seed in (3, 4)]
    for name, table in found["tables"].items():
        assert {*table} == {"title", "cells", "claims", "paper"}
        for both, *single in zip(table["cells"], *(own[name]["cells"] for own in alone)):
            assert {*both} == {"row", "column", "value", "ci95", "n", "values", "text"}
            assert both["values"] == [own["value"] for own in single]
            assert both["value"] == pytest.approx(np.mean(both["values"]))
            deviation = np.std(both["values"], ddof=1) * (100 if name == "8" else 1)
            assert float(both["text"].split("±")[1]) == pytest.approx(deviation, abs=0.051)
        for both, *single in zip(table["claims"], *(own[name]["claims"] for own in alone)):
            for verdict, count in Counter(own["verdict"] for own in single).items():
                assert f"{verdict} with {count} of 2 seeds" in both["verdict"]


def test_a_printed_table_has_title_cells_paper_and_claims(toys):
    assert "no sample" in run("1", "--problems", 1)
    out = run("1", "10")
    assert re.search(r"(?m)^Table 1: .*\n +correct +incorrect\nmember A +\d+\.\d+ \[", out)
    assert re.search(r"(?m)^paper, GSM8K +83.47 +81.65 +83.17$", out)
    out = out.replace("\n    ", " ")
    assert re.search(r"(?m)^The lowest C~ .*: undecided \(.*: \+\d+\.\d \[", out)


# --- decodings that are kept ----------------------------------------------------------------------


def test_a_decoding_is_kept_until_something_that_decides_it_changes(toys, tmp_path, monkeypatch):
    calls = []
    ensemble = tie.ensemble
    monkeypatch.setattr(tie, "ensemble", lambda *given: calls.append(given) or ensemble(*given))

    def count(*options):
        calls.clear()
        return run("8", *options, "--checkpoints", tmp_path), len(calls)

    first, decodings = count()
    assert decodings == 4  # two runs of two batches
    assert count() == (first, 0)
    options = [("--interval", 5), ("--problem-seed", 1), ("--cache", 4), ("--dtype", "bfloat16")]
    options.append(("--stop-at-eos",))
    assert [count(*option)[1] for option in options] == [4] * 5
    (tmp_path / "toy-seed0" / "A" / "model.safetensors").write_text("other weights")
    assert count() == (first, 4)
    monkeypatch.setattr(torch, "__version__", "another")
    assert count() == (first, 4)
    code = Path(shutil.copy(tie.__file__, tmp_path))
    code.write_text(code.read_text() + "# changed")
    monkeypatch.setattr(tie, "__file__", str(code))
    assert count() == (first, 4) and count() == (first, 0)


# --- the trace and the figures --------------------------------------------------------------------


def shown(canvas):
    return train_toy.readable(canvas.tokens.masked_fill(canvas.masked, train_toy.MASK)[0].tolist())


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"threshold": 0.7}, {"score": tie.SCORES[2]}]
)
def test_the_trace_shows_the_decoding(toys, options):
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    lines = run("trace", *sum(pairs, ())).strip().splitlines()
    canvas = train_toy.canvas([ASKED[0].prompt])
    config = tie.Config(**CONFIG | options)
    states = []
    members = [member(name) for name in "AB"]
    result = tie.ensemble(members, [canvas] * 2, config, states.append)
    assert lines[1].split("right ")[1] == train_toy.readable(ASKED[0].sequence)
    for m, line in enumerate(lines[2:6:2]):
        assert f"{'AB'[m]} alone {shown(tie.decode(members[m], canvas, config))}" in line
    rounds = iter(lines[6:])
    holds = [(canvas.masked[0], [-1] * train_toy.LENGTH)] * 2  # masks, and who wrote each token
    for state in states:
        for m in range(2):
            line = next(rounds)
            now = replace(canvas, tokens=state["tokens"][m], masked=state["masked"][m])
            assert f"{'AB'[m]} {shown(now)}" in line
            assert line.endswith("leads") == (m == state["leader"])
            score = float(state["scores"][m])
            if np.isfinite(score):
                assert f"{score + 0.0:.3f}" in line
                assert config.score != tie.SCORES[0] or ("'" in line) == (score < 0)
            before, authors = holds[m]
            new = before & ~now.masked[0]
            holds[m] = now.masked[0], [m if fresh else by for fresh, by in zip(new, authors)]
        if state["leader"] >= 0:
            holds = [holds[state["leader"]]] * 2
    winner = int(result.winner)
    outcome = "right" if graded(result.candidates[winner])[0] else "wrong"
    last, authors = rounds
    assert f"TIE {shown(result.candidates[winner])}" in last and f"{outcome}; C~(T): A" in last
    wrote = "".join("AB"[m] for m in holds[winner][1] if m >= 0)
    assert re.sub("[^AB]", "", authors) == wrote
    assert options or {*wrote} == {*"AB"}


def test_unsolved_traces_are_of_problems_that_only_tie_solves(toys):
    only = decoded()[2] & ~decoded(interval=T)[1].any(1)
    chosen = [problem.prompt for problem, yes in zip(ASKED, only) if yes]
    out = run("trace", "--count", N, "--unsolved")
    assert re.findall(r"(?m)^([0-9].*\*.=) ", out) == chosen != []


def test_colours_are_for_terminals_only(toys, monkeypatch):
    plain = run("trace")
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})
    monkeypatch.setattr(io, "StringIO", terminal)
    coloured = run("trace")
    assert plain == re.sub(r"\033\[[0-9;]*m", "", coloured) != coloured


def test_figures_are_drawn(toys, tmp_path):
    pytest.importorskip("matplotlib")
    run("figures", "--problems", 4, "--out", tmp_path / "new")
    heads = [file.read_bytes()[:4] for file in (tmp_path / "new").iterdir()]
    assert heads == [b"\x89PNG"] * 3
