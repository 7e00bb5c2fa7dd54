"""eval.py on toy members of a few training steps: tables, records, resuming, the trace, bad input."""

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
    T, M, rounds = 38, 2, 9
    expected = [T, T, M * T, M * T, M * T] + [M * T + rounds * M * (M - 1)] * 3
    assert [row["forwards"] for row in table["rows"]] == expected
    assert all(0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1 for row in table["rows"])
    assert {"name", "difference", "ci95"} == set(table["comparisons"][0])
    files = records(tmp_path)
    assert len(files) == 5
    for rows in files.values():
        assert len({row["id"] for row in rows}) == len(rows) == 6
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["config"]["interval"] == 4


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


def test_results_of_other_settings_are_not_mixed(checkpoints, tmp_path, here, capsys):
    assert run("--checkpoints", checkpoints, "--out", tmp_path) == 0
    before = records(tmp_path)
    capsys.readouterr()
    assert run("--checkpoints", checkpoints, "--out", tmp_path, "--interval", 5) == 2
    assert "another config" in capsys.readouterr().err
    assert records(tmp_path) == before


def test_the_table_names_every_method(checkpoints, here, capsys):
    assert run("--checkpoints", checkpoints) == 0
    out = capsys.readouterr().out
    for name in ("member A", "member B", "oracle", "post-generation", *tie.SCORES, "C~(T)"):
        assert name in out


def test_the_trace_shows_masks_leaders_and_the_outcome(checkpoints, here, capsys):
    assert run("--checkpoints", checkpoints, "--trace", 2) == 0
    out = capsys.readouterr().out
    assert out.count("round 1, step 4") == 2 and out.count("round 10, step 38") == 2
    assert out.count("relayed to all") == 18
    assert "_" * 28 in out and out.count("answer ") == 2


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


# --- bad input ------------------------------------------------------------------------------------------

BAD = [
    (["--problems", "0"], "--problems 0"),
    (["--problems", "1000000"], "--problems 1000000"),
    (["--trace", "-1"], "--trace"),
    (["--interval", "0"], "interval must be"),
    (["--top-k", "0"], "top_k must be"),
    (["--threshold", "1.5"], "threshold must lie"),
    (["--threshold", "0.9", "--top-k", "2"], "exclude each other"),
    (["--block-size", "0"], "block_size must be"),
    (["--batch-size", "0"], "--batch-size"),
    (["--steps", "0"], "steps"),
    (["--selection", "first"], "--selection"),
    (["--nonsense"], "--nonsense"),
    (["--json", "--trace", "1"], "--trace"),
]


@pytest.mark.parametrize("arguments, named", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_two(arguments, named, tmp_path, capsys):
    try:
        code = evaluation.main([*arguments, "--checkpoints", str(tmp_path / "none")])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and named in err and len(err.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_unwritable_out_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("--out", tmp_path / "file", "--checkpoints", tmp_path / "none")
    assert done.returncode == 2 and "--out" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_damaged_records_are_named(checkpoints, tmp_path, here, capsys):
    assert run("--checkpoints", checkpoints, "--out", tmp_path) == 0
    capsys.readouterr()
    file = next(tmp_path.glob("*.jsonl"))
    file.write_text("[]\n" + file.read_text())
    assert run("--checkpoints", checkpoints, "--out", tmp_path) == 2
    assert f"{file}, line 1" in capsys.readouterr().err


def test_help_has_a_line_for_every_option():
    text = command("--help").stdout
    for option in ("--problems", "--seed", "--interval", "--trace", "--json", "--out"):
        assert option in text
