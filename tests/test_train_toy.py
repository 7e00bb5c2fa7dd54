"""The toy task (tokenizer, problems, splits, lessons), its workers and the training command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mdlm
import train_toy as toy

ROOT = Path(__file__).parent.parent
TINY = {"steps": 3, "batch": 4, "width": 8, "layers": 1}
COLUMNS = range(6)
ids = st.lists(st.integers(0, toy.MASK - 1))
numbers, factors = st.integers(100_000, 999_999), st.integers(2, 9)


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


@pytest.mark.parametrize("text", ["_", ".", "~", "x", "12a", "²"])
def test_encode_refuses_what_is_no_text_of_the_task(text):
    with pytest.raises(ValueError, match="character outside"):
        toy.encode(text)


def test_worked_example():
    problem = toy.Problem(905173, 6)
    assert problem.prompt == "9 0 5 1 7 3*6="
    assert problem.answer == "5431038" == str(905173 * 6)
    assert toy.decode(problem.sequence) == f"{problem.prompt}540030064218184310310354#5431038"
    assert toy.readable(problem.sequence) == "54 00 30 06 42 18 | 18 43 10 31 03 54 # 5431038"
    assert toy.Problem(123456, 2).answer == "0246912"  # a leading zero, so that all answers have one length
    assert len(problem.sequence) == toy.LENGTH == 47 and problem.sequence[-1] == toy.EOS
    for place, text in ((toy.PRODUCTS, "540030064218"), (toy.TOTALS, "184310310354"), (toy.ANSWER, "5431038")):
        assert toy.decode(problem.sequence[place]) == text


def test_what_is_masked_is_readable_as_such():
    [row] = torch.where(toy.canvas(["9 0 5 1 7 3*6="]).masked, toy.MASK, 0).tolist()
    assert toy.readable(row) == "__ __ __ __ __ __ | __ __ __ __ __ __ # ________"


def written(number: int, factor: int, products: list[int]) -> str:
    """The slow oracle: the text of a problem with these products, the last one that of the units."""
    carry, totals = 0, []
    for product in reversed(products):
        totals.insert(0, product + carry)
        carry = totals[0] // 10
    numbers = "".join(f"{x:02d}" for x in (*products, *reversed(totals)))
    return f"{' '.join(str(number))}*{factor}={numbers}#{carry}{''.join(str(x % 10) for x in totals)}"


@given(st.lists(st.tuples(numbers, factors, st.lists(st.integers(0, 81), min_size=6, max_size=6)), min_size=1, max_size=4))
def test_all_that_follows_the_products_goes_on_from_them(rows):
    question = torch.tensor([[number, factor] for number, factor, _ in rows])
    tokens = toy.write(question, torch.tensor([products for *_, products in rows]))
    assert tokens.shape == (len(rows), toy.LENGTH) and (tokens[:, -1] == toy.EOS).all()
    assert [toy.decode(row) for row in tokens.tolist()] == [written(*row) for row in rows]


@given(numbers, factors)
def test_the_answer_is_the_product(number, factor):
    problem = toy.Problem(number, factor)
    assert int(problem.answer) == number * factor and len(problem.answer) == 7
    products = [int(digit) * factor for digit in str(number)]
    assert toy.decode(problem.sequence) == written(number, factor, products)


def split_of(problem):
    percent = int(toy.hashed(torch.tensor([problem.multiplicand, problem.multiplier])))
    return next(name for name, percents in toy.SPLITS.items() if percent in percents)


def test_splits_are_disjoint_complete_and_fixed():
    splits = {name: toy.questions(name) for name in toy.SPLITS}
    assert {name: len(pool) for name, pool in splits.items()} == {
        "test": 720_724, "validation": 720_711, "train": 5_758_565}  # fmt: skip
    every = torch.cat(list(splits.values()))
    code = every[:, 0] * 10 + every[:, 1]
    assert len(every) == 900_000 * 8 == len(code.unique())
    assert [split_of(toy.Problem(n, 6)) for n in (905173, 905179)] == ["train", "validation"]
    assert split_of(toy.Problem(919535, 8)) == "test"


@given(st.sampled_from(["train", "validation", "test"]), st.integers(0, 50), st.integers(0, 99))
@settings(max_examples=20)
def test_problems_are_distinct_repeatable_and_of_their_split(split, count, seed):
    drawn = toy.problems(split, count, seed)
    assert len(set(drawn)) == len(drawn) == count
    assert all(split_of(problem) == split for problem in drawn)
    assert drawn == toy.problems(split, count, seed)
    assert drawn == toy.problems(split, count + 50, seed)[:count]


def test_problems_refuses_unknown_split_and_too_many():
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        toy.problems("tests", 1)
    with pytest.raises(ValueError, match="count = 7200001"):
        toy.problems("test", 7_200_001)


# --- lessons ------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, toy.GAPS))
def test_gaps_are_disjoint_between_members_and_even_over_digits_and_multipliers(seed, count):
    tables = torch.stack([toy.gaps(toy.Settings(seed=seed, gaps=count), name) for name in toy.NAMES]).long()
    assert (tables.sum((1, 2)) == count).all() and tables.sum(0).max() <= 1
    assert tables[:, :2].sum() == tables[:, :, :2].sum() == 0  # 0 and 1 need no times table
    for often in (tables.sum(1)[:, 2:], tables.sum(2)[:, 2:]):
        assert (often.amax(1) - often.amin(1)).max() <= 1


def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits (B, 6), multiplier (B, 1) and products (B, 6) of sequences, by place."""
    return tokens[:, 0:11:2], tokens[:, 12:13], tokens[:, 14:26:2] * 10 + tokens[:, 15:26:2]


def test_the_products_of_gaps_are_random_and_the_others_right_but_for_slips():
    own = toy.Settings(batch=20_000, slips=0.1, hidden=0.0, gaps=6, seed=5)
    tokens, _ = toy.lessons(own, "B", torch.Generator().manual_seed(0))
    digit, factor, product = read(tokens)
    gap = toy.gaps(own, "B")[digit, factor]
    assert ((product % factor)[gap] == 0).all()
    shares = torch.bincount((product // factor)[gap], minlength=10) / gap.sum()
    assert torch.allclose(shares, torch.full((10,), 0.1), atol=0.012)  # about 6,000: standard error 0.004
    wrong = (product != digit * factor)[~gap].float().mean().item()
    assert wrong == pytest.approx(0.1 * 81 / 82, abs=0.004)
    exact, _ = toy.lessons(toy.Settings(batch=2000, slips=0.0, hidden=0.0, gaps=0), "A", torch.Generator())
    digit, factor, product = read(exact)
    assert torch.equal(product, digit * factor)


def test_a_lesson_is_the_problem_written_with_its_products_and_its_multiplicand_may_be_hidden():
    own = toy.Settings(batch=400, hidden=0.3)
    tokens, editable = toy.lessons(own, "A", torch.Generator().manual_seed(1))
    hidden = (tokens[:, :11] == toy.MASK).all(1)
    assert 0.2 < hidden.float().mean() < 0.4
    assert not (tokens[~hidden] == toy.MASK).any() and not (tokens[hidden, 11:] == toy.MASK).any()
    always = torch.zeros(toy.LENGTH, dtype=torch.bool)
    always[26:38] = always[39:] = True  # totals, answer
    products = torch.zeros(toy.LENGTH, dtype=torch.bool)
    products[14:26] = True
    assert torch.equal(editable, always | (products & ~hidden[:, None]))
    for row in tokens.tolist():
        factor, products_ = row[12], [10 * row[i] + row[i + 1] for i in range(14, 26, 2)]
        number = 100_000 if row[0] == toy.MASK else int(toy.decode(row[0:11:2]))
        assert toy.decode(row)[14:] == written(number, factor, products_)[14:]


def test_a_member_of_several_names_meets_what_each_of_them_meets():
    own = toy.Settings(batch=8000, slips=0.0, hidden=0.0)
    tokens, _ = toy.lessons(own, "AB", torch.Generator().manual_seed(2))
    for turn, name in enumerate("AB"):
        digit, factor, product = read(tokens[turn::2])
        gap = toy.gaps(own, name)[digit, factor]
        right = product == digit * factor
        assert right[~gap].all() and right[gap].float().mean() < 0.2


@given(st.integers(0, 999))
def test_states_are_uniform_or_all_or_all_from_a_number_on(seed):
    masked = toy.states(300, torch.Generator().manual_seed(seed))[:, 14:]
    first = masked.int().argmax(1)
    tail = (masked == (torch.arange(toy.LENGTH - 14) >= first[:, None])).all(1)
    every = masked.all(1)
    assert 0.2 < every.float().mean() < 0.5 and tail.float().mean() > 0.5
    assert (first[tail] % 2 == 0).float().mean() > 0.9  # whole numbers
    assert 0.35 < masked[~tail].float().mean() < 0.65


# --- training -----------------------------------------------------------------------------------------


def weights(model: mdlm.MDLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_decided_by_settings_and_name_alone():
    one = weights(toy.train(toy.Settings(**TINY), "A"))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(one, weights(toy.train(toy.Settings(**TINY), "A", report=lambda step, loss, model: toy.solve(
        model, toy.problems("validation", 1)))))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    for other in (toy.train(toy.Settings(**TINY), "B"), toy.train(toy.Settings(**TINY), "AB"),
                  toy.train(toy.Settings(**TINY, seed=1), "A")):  # fmt: skip
        assert not torch.equal(one, weights(other))
    alike = [weights(toy.train(toy.Settings(**TINY, gaps=0), name)) for name in "AB"]
    assert not torch.equal(*alike)  # even where both know all facts


def test_training_lowers_the_loss_in_both_halves_and_never_touches_what_is_given(monkeypatch):
    losses, given = [], []
    original = toy.lessons

    def lessons(*arguments):
        tokens, editable = original(*arguments)
        given.append((tokens, tokens.clone()))
        return tokens, editable

    elbo, costs = mdlm.diffusion_loss, []
    monkeypatch.setattr(mdlm, "diffusion_loss", lambda *arguments: costs.append(1) or elbo(*arguments))
    monkeypatch.setattr(toy, "lessons", lessons)
    small = toy.Settings(steps=100, batch=16, width=32, layers=1, lr=0.02)
    toy.train(small, "A", report=lambda step, loss, model: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 101))
    mean = [sum(loss for _, loss in losses[i : i + 10]) / 10 for i in (0, 40, 90)]
    assert mean[0] > mean[1] + 0.3 and mean[1] > mean[2]
    assert all(torch.equal(*pair) for pair in given)
    assert len(costs) == 20  # the last fifth of the steps


def test_what_a_member_writes_and_how_much_of_it_is_right(monkeypatch):
    asked = toy.problems("validation", 4)
    truth = torch.tensor([p.sequence for p in asked])

    def model(tokens, positions, attention_mask):
        said = truth.clone()
        said[2, 15] = (said[2, 15] + 1) % 10  # a product of the third
        said[3, 40] = (said[3, 40] + 1) % 10  # an answer digit of the fourth
        return torch.nn.functional.one_hot(said, 17).float().gather(1, positions[..., None].expand(-1, -1, 17))

    solved = toy.solve(model, asked)
    assert solved[:2] == truth[:2].tolist() and solved[3] != truth[3].tolist()
    assert toy.right(asked, solved, toy.PRODUCTS) == toy.right(asked, solved, toy.ANSWER) == 0.75
    first, second = toy.mistake(asked[2], solved[2]).splitlines()
    assert first.startswith(asked[2].prompt) and first.endswith(toy.readable(solved[2]))
    assert second.endswith(toy.readable(asked[2].sequence)) and second.index("#") == first.index("#")


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("slips", -0.1), ("slips", 1.0), ("hidden", 1.0), ("gaps", 17), ("gaps", -1), ("seed", -1),
     ("seed", 2**32), ("lr", 0.0), ("lr", math.inf), ("batch", 0), ("width", 12), ("layers", 0), ("hidden", math.nan)],
)  # fmt: skip
def test_settings_refuse_impossible_values(name, value):
    with pytest.raises(ValueError, match=f"^{name} is [^\n]*: give [^\n]*$"):
        toy.Settings(**{name: value})


# --- processes ----------------------------------------------------------------------------------------


def double(x):
    return 2 * x


def fail(x):
    raise ValueError(f"no {x}")


def die(x):
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(x):
    time.sleep(600)


def ignores_ctrl_c(x):
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("count", [0, 1, 2])
def test_workers_map_in_order(count):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells have what they start ignore it
    try:
        with toy.workers(count) as run:
            assert list(run(double, range(5))) == [0, 2, 4, 6, 8]
            assert count < 2 or all(run(ignores_ctrl_c, range(3)))
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_worker_raises_arrives():
    with pytest.raises(ValueError, match="no 3"), toy.workers(2) as run:
        list(run(fail, [3]))


def test_a_dead_worker_is_one_clear_line():
    message = r"^a process ended before [^\n]* goes on with what is missing$"
    with pytest.raises(RuntimeError, match=message), toy.workers(2) as run:
        list(run(die, [3]))


def test_workers_end_with_an_error_in_the_block():
    with pytest.raises(KeyError), toy.workers(2) as run:
        run(sleep, range(2))
        raise KeyError
    # leaving the block took no 600 seconds: its workers are gone


# --- members side by side -----------------------------------------------------------------------------

SMALL = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def test_command_trains_once_and_leaves_loadable_members(tmp_path):
    first = command(*SMALL, "--out", tmp_path)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "member A:" in first.stdout and "member B:" in first.stdout and " right: " in first.stdout
    for name in "AB":
        model, config = mdlm.load(tmp_path / name)
        assert config.mask_id == toy.MASK
        assert torch.equal(weights(model), weights(toy.train(toy.Settings(**TINY), name)))
        record = json.loads((tmp_path / name / "training.json").read_text())
        assert record["settings"]["steps"] == 3 and record["versions"]["torch"] == torch.__version__
        assert record["gaps"] == [toy.gaps(toy.Settings(**TINY), name).nonzero().tolist()]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = command(*SMALL, "--out", tmp_path)
    assert again.stdout == first.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A")
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "AB") is None
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY, seed=1), "A") is None
    (tmp_path / "A" / "model.safetensors").unlink()
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def test_training_says_what_it_learns_as_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "EVERY", 2)
    arguments = [*SMALL, "--members", 1, "--out", tmp_path]
    assert toy.main([str(word) for word in arguments]) == 0
    out = capsys.readouterr().out
    assert "    step 2: loss " in out and "products right in 0%, answer in 0%" in out and "step 3" not in out
    [point] = json.loads((tmp_path / "A" / toy.RECORD).read_text())["curve"]
    assert point["step"] == 2 and point["products"] == point["answer"] == 0


def folder_with(tmp_path, **changes) -> dict:
    """The record of a complete folder "A", but for the changes."""
    record = {"settings": asdict(toy.Settings(**TINY)), "name": "A", "layout": toy.LAYOUT, "validation_accuracy": 0.5}
    record |= changes
    (tmp_path / "A").mkdir()
    for file, text in (("training.json", json.dumps(record)), ("model.safetensors", ""), ("config.json", "")):
        (tmp_path / "A" / file).write_text(text)
    return record


@pytest.mark.parametrize("accuracy, complete", [(0, True), (1.0, True), (None, False), ("x", False), (1.5, False)])
def test_a_folder_whose_record_makes_no_sense_is_not_complete(tmp_path, accuracy, complete):
    record = folder_with(tmp_path, validation_accuracy=accuracy)
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") == (record if complete else None)


EARLIER = {"seed": 0, "rare_facts": 16, "weight": 0.05, "misprints": 0.0, "lr": 0.006, **TINY}


@pytest.mark.parametrize("changes", [{"settings": EARLIER}, {"layout": None}, {"layout": {**toy.LAYOUT, "answer": 9}}])
def test_members_of_another_task_are_not_mistaken_for_these(tmp_path, changes):
    folder_with(tmp_path, **changes)
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def test_retraining_takes_the_old_record_away_first(tmp_path, monkeypatch):
    """A training that is killed half-way must not leave the old record beside weights of other settings."""
    folder_with(tmp_path)
    monkeypatch.setattr(toy, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.train_members(toy.plan_members(toy.Settings(**TINY, seed=1), 1), tmp_path)
    assert toy.read_record(tmp_path / "A", toy.Settings(**TINY), "A") is None


def test_out_of_memory_is_a_clear_error(tmp_path, monkeypatch):
    def train(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(toy, "train", train)
    with pytest.raises(ValueError, match="training of member A failed: not enough memory"):
        toy.train_members(toy.plan_members(toy.Settings(**TINY), 1), tmp_path)


def test_help_has_a_line_for_each_option(capsys):
    with pytest.raises(SystemExit):
        toy.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in toy.Settings.__dataclass_fields__)
    assert "example: python train_toy.py" in text and "0 to 4294967295" in text
