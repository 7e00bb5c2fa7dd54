"""eval.py on toy members of a few training steps: tables, records, resuming, the trace."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import tie
import train_toy

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "3", "--problems", "6", "--batch-size", "4"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder where the first run of the module trains its members."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def here(monkeypatch):
    """Decode in this process: quicker than starting others for a handful of problems."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def run(*arguments):
    return evaluation.main([*TINY, *map(str, arguments)])


def command(*arguments):
    line = [sys.executable, ROOT / "eval.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def records(folder):
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}


# --- the main table -----------------------------------------------------------------------------------


def test_json_is_one_object_and_records_are_complete(checkpoints, tmp_path):
    done = command(*TINY, "--checkpoints", checkpoints, "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert {"settings", "problems", "rows", "comparisons", "versions", "hardware"} <= table.keys()
    methods = [(row["method"], row["score"]) for row in table["rows"]]
    assert methods[:4] == [("member A", None), ("member B", None), ("oracle", None), ("post-generation", None)]
    assert methods[4:] == [("tie", score) for score in tie.SCORES]
    T, M, rounds = 32, 2, 15
    expected = [T, T, M * T, M * T, M * T] + [M * T + rounds * M * (M - 1)] * 3
    assert [row["forwards"] for row in table["rows"]] == expected
    assert all(0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1 for row in table["rows"])
    assert {"name", "difference", "ci95"} == set(table["comparisons"][0])
    files = records(tmp_path)
    assert len(files) == 5
    for rows in files.values():
        assert len({row["id"] for row in rows}) == len(rows) == 6
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["config"]["interval"] == 2


def test_an_interrupted_run_goes_on(checkpoints, tmp_path, here, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("--checkpoints", checkpoints, "--json", "--out", whole) == 0
    first = json.loads(capsys.readouterr().out)
    assert run("--checkpoints", checkpoints, "--json", "--out", broken) == 0
    capsys.readouterr()
    for number, file in enumerate(sorted(broken.glob("*.jsonl"))):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[: number + 1]) + lines[number + 1][:20])  # half a line at the end
    assert run("--checkpoints", checkpoints, "--json", "--out", broken) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
    by_id = {name: sorted(rows, key=lambda r: r["id"]) for name, rows in records(whole).items()}
    assert by_id == {name: sorted(rows, key=lambda r: r["id"]) for name, rows in records(broken).items()}


def test_the_table_names_every_method(checkpoints, here, capsys):
    assert run("--checkpoints", checkpoints) == 0
    out = capsys.readouterr().out
    for name in ("member A", "member B", "oracle", "post-generation", *tie.SCORES, "C~(T)"):
        assert name in out


def test_the_trace_shows_masks_leaders_and_the_outcome(checkpoints, here, capsys):
    assert run("--checkpoints", checkpoints, "--trace", 2) == 0
    out = capsys.readouterr().out
    assert out.count("step  2 A") == out.count("step 32 A") == out.count("C~(T)") == 2
    assert out.count("  leads\n") == 30 and " __ __ __ " in out


# --- figures of merit -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_wilson_interval_holds_the_accuracies_not_rejected_at_five_percent(correct):
    low, high = evaluation.proportion(correct)["ci95"]
    n, p = len(correct), sum(correct) / len(correct)
    for q in np.linspace(0.001, 0.999, 200):
        inside = abs(p - q) <= 1.96 * np.sqrt(q * (1 - q) / n)
        assert inside == (low <= q <= high) or min(abs(q - low), abs(q - high)) < 1e-6


def method(correct):
    return evaluation.Method(np.array(correct), 1.0)


def test_a_difference_and_its_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.8, rng.random(400) < 0.7
    result = evaluation.difference(method(a), method(b))
    each = a.astype(float) - b
    resampled = [rng.choice(each, 400).mean() for _ in range(4000)]
    assert result["difference"] == pytest.approx(a.mean() - b.mean())
    assert result["ci95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.006)


def record(leaders=(), correct=(True, False), answers=("x", "y"), tcc=(0.0, 1.0), winner=0, **more):
    return {"id": "i", "gold": "x", "answers": [*answers], "correct": [*correct], "texts": [["", ""]] * len(correct),
            "winner": winner, "leaders": [*leaders], "tcc": [*tcc], "forwards": 64.0, "scores": [],
            "top1": [0.5] * len(correct), **more}  # fmt: skip


def test_change_rate_counts_relays_that_follow_a_relay():
    rows = [record([0, 0, 1]), record([1, 1]), record([0]), record()]
    assert evaluation.Run(rows, "AB").change_rate == pytest.approx(1 / 3)
    assert evaluation.Run(rows[2:], "AB").change_rate is None


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 2)), min_size=1, max_size=5), st.data())
def test_a_vote_goes_to_the_most_frequent_answer_and_among_equals_to_the_lowest_count(samples, data):
    count = data.draw(st.integers(1, len(samples)))
    answers, tcc = zip(*samples)
    tally = Counter(answers[:count])
    ranked = sorted((-tally[a], t, m) for m, (a, t) in enumerate(samples[:count]))
    voted = evaluation.Run([record((), [a == "x" for a in answers], answers, tcc)], "ABCDE"[: len(samples)]).vote(count)
    assert voted.correct.tolist() == [answers[ranked[0][2]] == "x"]
    assert voted.forwards == pytest.approx(64 * count / len(samples))


@pytest.mark.parametrize("program, options", [(evaluation, 29), (train_toy, 13)])
def test_help_fits_two_screens_and_has_a_line_for_every_option(program, options, monkeypatch, capsys):
    parsers, original = [], train_toy.Parser.parse_args
    monkeypatch.setattr(train_toy.Parser, "parse_args", lambda *given: parsers.append(given[0]) or original(*given))
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        program.parse(["--help"])
    text = capsys.readouterr().out
    names = [action.option_strings[-1] for action in parsers[0]._actions]
    assert len(names) == options and text.count("\n") <= 100
    for name in names:
        assert re.search(rf"^  (?:-h, )?{name}(?: .*?)?(?: {{2,}}|\n {{10,}})\w", text, re.MULTILINE), name
