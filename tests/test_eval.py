"""eval.py on toy members of a few training steps: tables, records, resuming, the trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import tie

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
    T, M, relays = 32, 2, 15
    expected = [T, T, M * T, M * T, M * T] + [M * T + relays * M * (M - 1)] * 3
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
    assert out.count("round 1, step 2\n") == 2 and out.count("round 16, step 32\n") == 2
    assert out.count("relayed to all") == 30
    assert "__ __ | __ __ __ __ __ __ # ________" in out and out.count("answer ") == 2


def test_problems_that_no_member_solves_alone_have_a_line_of_their_own(capsys):
    alone = [{"correct": c, "winner": 0, "forwards": 2.0, "leaders": [], "tcc": [0, 0]}
             for c in ([True, False], [False, False], [False, False], [False, True])]  # fmt: skip
    ours = [{**r, "correct": [c, c]} for r, c in zip(alone, (True, True, False, False))]
    table = evaluation.main_table({"post-generation": alone, "tie token_change_count": ours}, "AB")
    *others, row = table["rows"]
    assert row["none_alone"] == {"value": 0.5, "n": 2}
    assert not any("none_alone" in other for other in others)
    evaluation.show_table(table)
    assert "token_change_count solves 50.0 % of the 2 problems that no member solves alone" in capsys.readouterr().out


# --- figures of merit -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_wilson_interval_holds_the_accuracies_not_rejected_at_five_percent(correct):
    low, high = evaluation.accuracy(correct)["ci95"]
    n, p = len(correct), sum(correct) / len(correct)
    for q in np.linspace(0.001, 0.999, 200):
        inside = abs(p - q) <= 1.96 * np.sqrt(q * (1 - q) / n)
        assert inside == (low <= q <= high) or min(abs(q - low), abs(q - high)) < 1e-6


def test_paired_difference_and_its_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.8, rng.random(400) < 0.7
    result = evaluation.paired("a - b", a, b)
    difference = a.astype(float) - b
    resampled = [rng.choice(difference, 400).mean() for _ in range(4000)]
    assert result["difference"] == pytest.approx(a.mean() - b.mean())
    assert result["ci95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.006)


def test_change_rate_counts_relays_that_follow_a_relay():
    rows = [{"leaders": [0, 0, 1]}, {"leaders": [1, 1]}, {"leaders": [0]}, {"leaders": []}]
    assert evaluation.change_rate(rows) == pytest.approx(1 / 3)
    assert evaluation.change_rate(rows[2:]) is None


def test_help_has_a_line_for_every_option():
    text = command("--help").stdout
    for option in ("--problems", "--seed", "--interval", "--trace", "--json", "--out"):
        assert option in text
