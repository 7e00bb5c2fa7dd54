"""The toy task (tokenizer, problems, splits, mixtures) and the training command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mdlm
import train_toy as toy

ROOT = Path(__file__).parent.parent
TINY = {"steps": 3, "batch": 4, "width": 8, "layers": 1}
POOL = toy.all_problems("train")
anything = st.builds(toy.Problem, st.integers(1000, 9999), st.integers(2, 9))
ids = st.lists(st.integers(0, toy.MASK - 1))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "train_toy.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120, check=False)


# --- tokenizer and problems ---------------------------------------------------------------------------


@given(ids)
def test_tokenizer_round_trip(tokens):
    assert toy.encode(toy.decode(tokens)) == tokens


@given(ids, st.lists(st.integers(0, toy.PAD)))
def test_decode_ends_at_the_first_eos(tokens, rest):
    assert toy.decode([*tokens, toy.EOS, *rest]) == toy.decode(tokens)


@pytest.mark.parametrize("text", ["_", ".", " ", "x", "12a", "²"])
def test_encode_refuses_what_is_no_text_of_the_task(text):
    with pytest.raises(ValueError, match="character outside"):
        toy.encode(text)


def test_worked_example():
    problem = toy.Problem(3472, 6)
    assert problem.prompt == "3472*6="
    assert problem.reasoning == "2*6+0=12" + "7*6+1=43" + "4*6+4=28" + "3*6+2=20"
    assert problem.answer == "20832"
    assert toy.decode(toy.sequence(problem)) == "3472*6=2*6+0=127*6+1=434*6+4=283*6+2=20#20832"
    assert toy.sequence(toy.Problem(1234, 2))[-6:] == [2, 4, 6, 8, toy.EOS, toy.EOS]


@given(anything)
def test_reasoning_leads_to_the_answer(problem):
    columns = [problem.reasoning[i : i + 8] for i in range(0, toy.REASONING_LENGTH, 8)]
    carry = 0
    for column, (digit, multiplier) in zip(columns, problem.facts):
        left, result = column.split("=")
        product, plus = left.split("+")
        assert product == f"{digit}*{multiplier}" and int(plus) == carry
        assert int(result) == digit * multiplier + carry
        carry = int(result) // 10
    digits = str(carry) + "".join(column[-1] for column in reversed(columns))
    assert int(digits) == int(problem.answer) == problem.multiplicand * problem.multiplier
    assert len(toy.sequence(problem)) == toy.LENGTH == 46


def test_splits_are_disjoint_complete_and_fixed():
    splits = {name: toy.all_problems(name) for name in toy.SPLITS}
    assert len(set().union(*splits.values())) == sum(map(len, splits.values())) == 72_000
    assert {name: len(problems) for name, problems in splits.items()} == {
        "test": 7212, "validation": 7382, "train": 57406}  # fmt: skip
    assert [toy.Problem(n, 6).split for n in (3472, 3473, 9876)] == ["train", "train", "validation"]


@given(st.sampled_from(["train", "validation", "test"]), st.integers(0, 300), st.integers(0, 99))
def test_problems_are_distinct_repeatable_and_of_their_split(split, count, seed):
    drawn = toy.problems(split, count, seed)
    assert len(set(drawn)) == len(drawn) == count
    assert all(problem.split == split for problem in drawn)
    assert drawn == toy.problems(split, count, seed)
    assert drawn == toy.problems(split, count + 50, seed)[:count]


def test_problems_refuses_unknown_split_and_too_many():
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        toy.problems("tests", 1)
    with pytest.raises(ValueError, match="count = 72001"):
        toy.problems("test", 72_001)


# --- mixtures -----------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, 16))
def test_rare_facts_are_disjoint_between_members_and_even_over_digits_and_multipliers(seed, count):
    rare = [toy.rare_facts(toy.Settings(seed=seed, rare_facts=count), member) for member in range(4)]
    assert all(len(facts) == count for facts in rare)
    assert len(set().union(*rare)) == 4 * count
    for facts in rare:
        for side in (0, 1):
            often = [sum(fact[side] == factor for fact in facts) for factor in toy.FACTORS]
            assert max(often) - min(often) <= 2 - side


@settings(max_examples=20)
@given(st.floats(0.01, 1))
def test_a_rare_fact_is_drawn_at_its_weight(weight):
    """Of two problems that differ in one digit, the one with the rare fact weighs `weight` times the other."""
    pool = [toy.Problem(1111, 2), toy.Problem(1131, 2), toy.Problem(3131, 2), toy.Problem(3131, 4)]
    drawn = toy.draw_weights(pool, [(3, 2)], weight)
    torch.testing.assert_close(drawn, torch.tensor([1, weight, weight**2, 1]))


def test_misprints_have_their_rate_and_spare_all_but_results():
    tokens = torch.tensor([toy.sequence(problem) for problem in POOL[:4000]])
    before = tokens.clone()
    changed = toy.misprint(tokens, 0.3, torch.Generator().manual_seed(0)) != tokens
    assert torch.equal(tokens, before)
    results = torch.zeros(toy.LENGTH, dtype=torch.bool)
    for column in range(4):
        results[7 + 8 * column + 6 : 7 + 8 * column + 8] = True
    assert not changed[:, ~results].any()
    assert abs(changed[:, results].float().mean() - 0.3) < 0.01  # 32,000 draws: standard error 0.0026
    assert torch.equal(toy.misprint(tokens, 0, torch.Generator()), tokens)
    assert toy.misprint(tokens, 0.9, torch.Generator()).max() <= toy.EOS


@given(st.integers(0, 999))
def test_prompt_and_suffix_are_never_masked(seed):
    masked = toy.mask(64, torch.Generator().manual_seed(seed))
    fixed = torch.zeros(toy.LENGTH, dtype=torch.bool)
    fixed[:7] = fixed[7 + 32] = True
    assert not masked[:, fixed].any()
    assert masked.any()


# --- training -----------------------------------------------------------------------------------------


def weights(model: mdlm.MDLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_decided_by_settings_and_member_alone():
    one = weights(toy.train(toy.Settings(**TINY), 0))
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(one, weights(toy.train(toy.Settings(**TINY), 0)))
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(one, weights(toy.train(toy.Settings(**TINY), 1)))
    assert not torch.equal(one, weights(toy.train(toy.Settings(**TINY, seed=1), 0)))


def test_training_lowers_the_loss():
    losses = []
    small = toy.Settings(steps=80, batch=16, width=32, layers=1, lr=0.02)
    toy.train(small, 0, report=lambda step, loss: losses.append(loss))
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("weight", 0.0), ("weight", 1.5), ("misprints", 1.0), ("misprints", -0.1), ("rare_facts", 65),
     ("seed", -1), ("lr", 0.0), ("batch", 0), ("width", 12), ("layers", 0), ("weight", float("nan"))],
)  # fmt: skip
def test_settings_refuse_impossible_values(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .* but must be [^\n]*$"):
        toy.Settings(**{name: value})


# --- command line -------------------------------------------------------------------------------------

SMALL = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def test_command_trains_once_and_leaves_loadable_members(tmp_path):
    first = command(*SMALL, "--out", tmp_path, "--device", "cpu")
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "member A:" in first.stdout and "member B:" in first.stdout and ", not " in first.stdout
    for member, name in enumerate("AB"):
        model, config = mdlm.load(tmp_path / name)
        assert config.mask_id == toy.MASK
        assert torch.equal(weights(model), weights(toy.train(toy.Settings(**TINY), member)))
        record = json.loads((tmp_path / name / "training.json").read_text())
        assert record["settings"]["steps"] == 3 and record["versions"]["torch"] == torch.__version__
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = command(*SMALL, "--out", tmp_path, "--device", "cpu")
    assert again.stdout == first.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A")
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY, seed=1), "A") is None
    (tmp_path / "A" / "model.safetensors").unlink()
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_training_process_is_named_and_leaves_nothing_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "_work", _die)
    with pytest.raises(RuntimeError, match="training of member A ended with exit code -9"):
        toy.train_members(toy.plan_members(toy.Settings(**TINY), 1), tmp_path, device="cpu")
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def folder_with(tmp_path, **changes) -> dict:
    """The record of a complete folder "A", but for the changes."""
    record = {"settings": toy.asdict(toy.Settings(**TINY)), "name": "A", "validation_accuracy": 0.5}
    record |= changes
    (tmp_path / "A").mkdir()
    for file, text in (("training.json", json.dumps(record)), ("model.safetensors", ""), ("config.json", "")):
        (tmp_path / "A" / file).write_text(text)
    return record


@pytest.mark.parametrize("accuracy, complete", [(0, True), (1.0, True), (None, False), ("x", False), (1.5, False)])
def test_a_folder_whose_record_makes_no_sense_is_not_complete(tmp_path, accuracy, complete):
    record = folder_with(tmp_path, validation_accuracy=accuracy)
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") == (record if complete else None)


def test_retraining_takes_the_old_record_away_first(tmp_path, monkeypatch):
    """A training that is killed half-way must not leave the old record beside weights of other settings."""
    record = folder_with(tmp_path)
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") == record
    monkeypatch.setattr(toy, "_work", _die)
    with pytest.raises(RuntimeError):
        toy.train_members(toy.plan_members(toy.Settings(**TINY, seed=1), 1), tmp_path, device="cpu")
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def test_help_has_a_line_for_each_option(capsys):
    with pytest.raises(SystemExit):
        toy.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in toy.Settings.__dataclass_fields__)
    assert "example: python train_toy.py" in text
