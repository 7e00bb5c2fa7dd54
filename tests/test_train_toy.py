"""The toy task (tokens, problems, splits, lessons), training, members' folders and the command."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mdlm
import train_toy as toy

TINY = toy.Settings(steps=3, batch=4, width=8, layers=1)
OPTIONS = ["--steps=3", "--batch=4", "--width=8", "--layers=1"]
ids = st.lists(st.integers(0, toy.MASK - 1))
numbers = st.integers(100_000, 999_999)
factors = st.integers(2, 9)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, toy.__file__, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


# --- tokens and problems --------------------------------------------------------------------------


@given(ids, st.lists(st.integers(0, toy.PAD)))
def test_decode_reverses_encode_and_stops_at_the_first_eos(tokens, rest):
    assert toy.encode(toy.decode([*tokens, toy.EOS, *rest])) == tokens


@pytest.mark.parametrize("text", ["_", ".", "~", "x", "12a", "²"])
def test_encode_refuses_other_characters(text):
    with pytest.raises(ValueError):
        toy.encode(text)


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(toy)
    assert found.attempted >= 2 and found.failed == 0


def test_worked_example():
    problem = toy.Problem(905173, 6)
    assert toy.decode(problem.sequence) == "9 0 5 1 7 3*6=540030064218184310310354#5431038"
    assert len(problem.sequence) == toy.LENGTH == 47
    [row] = torch.where(toy.canvas([problem.prompt]).masked, toy.MASK, 0).tolist()
    assert toy.readable(row) == "__ __ __ __ __ __ | __ __ __ __ __ __ # ________"


def written(number: int, factor: int, products: list[int]) -> str:
    """Slow oracle: the text of a problem with these products, units last."""
    carry = 0
    totals = []
    for product in reversed(products):
        totals.append(product + carry)
        carry = totals[-1] // 10
    pairs = "".join(f"{n:02d}" for n in products + totals)
    units = "".join(str(total % 10) for total in reversed(totals))
    return f"{' '.join(str(number))}*{factor}={pairs}#{carry}{units}"


products_of_a_row = st.lists(st.integers(0, 81), min_size=6, max_size=6)


@given(st.lists(st.tuples(numbers, factors, products_of_a_row), min_size=1, max_size=4))
def test_totals_and_answer_follow_from_the_products(rows):
    question = torch.tensor([row[:2] for row in rows])
    tokens = toy.write(question, torch.tensor([row[2] for row in rows]))
    assert tokens.shape == (len(rows), toy.LENGTH) and (tokens[:, -1] == toy.EOS).all()
    assert [toy.decode(row) for row in tokens.tolist()] == [written(*row) for row in rows]


@given(numbers, factors)
def test_the_answer_is_the_product(number, factor):
    problem = toy.Problem(number, factor)
    assert int(problem.answer) == number * factor and len(problem.answer) == 7
    products = [int(digit) * factor for digit in str(number)]
    assert toy.decode(problem.sequence) == written(number, factor, products)


def test_splits_are_disjoint_complete_and_fixed():
    splits = [toy.questions(name) for name in ("test", "validation", "train")]
    assert [len(split) for split in splits] == [720_724, 720_711, 5_758_565]
    every = torch.cat(splits)
    assert len((every[:, 0] * 10 + every[:, 1]).unique()) == len(every) == 900_000 * 8


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_problems_are_distinct_repeatable_and_from_their_split(split):
    drawn = toy.problems(split, 1000, seed=3)
    assert len(set(drawn)) == 1000 and drawn[:50] == toy.problems(split, 50, seed=3)
    assert drawn != toy.problems(split, 1000, seed=4)
    for problem in drawn[:5]:
        question = torch.tensor([problem.multiplicand, problem.multiplier])
        assert (toy.questions(split) == question).all(1).any()


def test_problems_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="count must be 0 to 720724 .* got 7200001"):
        toy.problems("test", 7_200_001)


# --- training data --------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, toy.GAPS))
def test_gaps_are_disjoint_and_spread_over_digits_and_multipliers(seed, count):
    own = toy.Settings(seed=seed, gaps=count)
    tables = torch.stack([toy.gaps(own, name) for name in toy.NAMES]).long()
    assert (tables.sum((1, 2)) == count).all() and tables.sum(0).max() <= 1
    assert tables[:, :2].sum() == tables[:, :, :2].sum() == 0  # 0 and 1 need no times table
    for per_line in (tables.sum(1)[:, 2:], tables.sum(2)[:, 2:]):
        assert (per_line.amax(1) - per_line.amin(1)).max() <= 1


def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits (B, 6), multiplier (B, 1) and products (B, 6)."""
    return tokens[:, 0:11:2], tokens[:, 12:13], tokens[:, 14:26:2] * 10 + tokens[:, 15:26:2]


def test_products_of_gaps_are_random_and_the_others_right_except_for_slips():
    own = toy.Settings(batch=40_000, slips=0.1, hidden=0.0, seed=5)
    tokens, targets, _ = toy.lessons(own, "AB", torch.Generator().manual_seed(0))
    for turn, name in enumerate("AB"):
        digit, factor, product = read(tokens[turn::2])
        target = read(targets[turn::2])[2]
        gap = toy.gaps(own, name)[digit, factor]
        assert ((product % factor)[gap] == 0).all()
        assert torch.equal(target, torch.where(gap, product, digit * factor))
        wrong = (product != digit * factor).float()
        assert wrong[gap].mean().item() == pytest.approx(0.9, abs=0.02)  # ten multiples
        assert wrong[~gap].mean().item() == pytest.approx(0.1 * 81 / 82, abs=0.005)


def test_hidden_digits_slips_and_editable_positions():
    own = toy.Settings(batch=4000, hidden=0.3, slips=0.2)
    tokens, targets, editable = toy.lessons(own, "A", torch.Generator().manual_seed(1))
    digit, factor, product = read(tokens)
    hidden = digit == toy.MASK
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.02)
    unknown = toy.gaps(own, "A")[digit.masked_fill(hidden, 0), factor]
    slip = ~hidden & ~unknown & (product != digit * factor)
    differ = torch.zeros_like(editable)
    differ[:, 14:26] = slip.repeat_interleave(2, 1)
    assert not (tokens != targets)[~differ].any() and not editable[differ].any()
    assert torch.equal(read(targets)[2][slip], (digit * factor)[slip])
    assert editable[:, 26:38].all() and editable[:, 39:].all()  # totals and answer
    given = editable[:, 14:26:2]  # products
    assert torch.equal(given, editable[:, 15:26:2]) and not given[hidden].any()
    # A slip may happen to be right.
    assert (~given & ~hidden & ~slip).float().mean() < 0.01
    assert not editable[:, :14].any() and not editable[:, 38].any()


def test_what_follows_from_the_products_of_a_lesson():
    own = toy.Settings(batch=3000, hidden=0.3, slips=0.1)
    tokens, targets, _ = toy.lessons(own, "A", torch.Generator().manual_seed(1))
    noticed = []
    rows = zip(tokens.tolist(), *(read(x)[2].tolist() for x in (tokens, targets)))
    for row, wrote, right in rows:
        follows = [written(100_000, row[12], p)[26:] for p in (wrote, right)]
        tail = toy.decode(row)[26:]
        slips = sum(a != b for a, b in zip(wrote, right))
        assert slips > 1 or tail in follows
        if slips == 1 and follows[0] != follows[1]:
            noticed.append(tail == follows[1])
    assert sum(noticed) / len(noticed) == pytest.approx(0.5, abs=0.06)


@given(st.integers(0, 999))
def test_states_mask_at_random_or_everything_or_from_some_number_on(seed):
    masked = toy.states(300, torch.Generator().manual_seed(seed))[:, 14:]
    first = masked.int().argmax(1)
    tail = (masked == (torch.arange(toy.LENGTH - 14) >= first[:, None])).all(1)
    assert 0.2 < masked.all(1).float().mean() < 0.5 and tail.float().mean() > 0.5
    assert (first[tail] % 2 == 0).float().mean() > 0.9  # numbers are not cut in half
    assert 0.35 < masked[~tail].float().mean() < 0.65


# --- training -------------------------------------------------------------------------------------


def weights(model: mdlm.MDLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(own: toy.Settings, names: str) -> torch.Tensor:
    *_, (_, model) = toy.train(own, names)
    return weights(model)


def test_training_depends_on_settings_and_name_alone():
    own = replace(TINY, gaps=0)  # so that lessons depend on nothing but the generator
    one = trained(own, "A")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for _, model in toy.train(own, "A"):
        toy.solve(model, toy.problems("validation", 1))
    assert torch.equal(one, weights(model)) and torch.equal(state, torch.get_rng_state())
    others = [trained(own, "B"), trained(own, "AB"), trained(replace(own, seed=1), "A")]
    assert not any(torch.equal(one, other) for other in others)


def test_training_lowers_the_loss():
    small = toy.Settings(steps=100, batch=16, width=32, layers=1)
    losses = [loss for loss, _ in toy.train(small, "A")]
    start, middle, end = (sum(losses[i : i + 10]) / 10 for i in (0, 40, 90))
    assert start > middle + 0.3 and middle > end


def test_training_also_corrects_visible_slips(monkeypatch):
    unmasked = torch.zeros(16, toy.LENGTH, dtype=torch.bool)
    monkeypatch.setattr(toy, "states", lambda batch, generator: unmasked)
    losses = [loss for loss, _ in toy.train(replace(TINY, batch=16, steps=40), "A")]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1


def test_what_a_member_writes_and_how_much_of_it_is_right():
    asked = toy.problems("validation", 4)
    said = torch.tensor([p.sequence for p in asked])
    said[2, 15] = (said[2, 15] + 1) % 10  # a product
    said[3, 40] = (said[3, 40] + 1) % 10  # a digit of the answer

    def model(tokens, positions, attention_mask):
        return torch.nn.functional.one_hot(said.gather(1, positions), 17).float()

    solved = toy.solve(model, asked)
    assert solved == said.tolist()
    assert toy.shares_right(asked, solved) == {"products": 0.75, "answer": 0.75}
    assert toy.mistake(asked[2], solved[2]).count(asked[2].answer) == 2


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("slips", -0.1), ("hidden", 1.5), ("gaps", 17), ("gaps", -1)]
)
def test_settings_refuse_impossible_values(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .* got {value}$"):
        toy.Settings(**{name: value})


# --- folders and the command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Members trained by the command, and what it printed."""
    out = tmp_path_factory.mktemp("toy")
    done = command(*OPTIONS, "--out", out)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out, done.stdout


def test_the_command_trains_loadable_members_and_keeps_complete_ones(folder):
    out, text = folder
    assert "member A: 0" in text and " right: " in text
    for name in "AB":
        assert torch.equal(weights(mdlm.load(out / name)[0]), trained(TINY, name))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert command(*OPTIONS, "--out", out).stdout == text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_complete_folder_is_that_of_one_member_with_one_setting(folder):
    path = folder[0] / "A"
    assert toy.read_record(path, TINY, "A") == json.loads((path / toy.RECORD).read_text())
    assert toy.read_record(path, TINY, "AB") is None
    assert toy.read_record(path, toy.Settings(), "A") is None


DAMAGE = [
    {"products_right": None},
    {"validation_accuracy": "x"},
    {"mistakes": [1]},
    {"curve": [{"step": 200}]},
    {"layout": None},
]


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_record_counts_as_incomplete(folder, tmp_path, change):
    shutil.copytree(folder[0] / "A", tmp_path, dirs_exist_ok=True)
    path = tmp_path / toy.RECORD
    record = json.loads(path.read_text())
    for text in (json.dumps(record | change), path.read_text()[:-9], "[]", '{"name": "A"}'):
        path.write_text(text)
        assert toy.read_record(tmp_path, TINY, "A") is None


def test_an_incomplete_folder_is_trained_again(tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / toy.RECORD).write_text('{"name": "A", "curve": 1}')
    [record] = toy.train_members(toy.plan_members(TINY, 1), tmp_path)
    assert record == toy.read_record(tmp_path / "A", TINY, "A")
    assert torch.equal(weights(mdlm.load(tmp_path / "A")[0]), trained(TINY, "A"))


def test_an_old_record_never_stays_with_new_weights(folder, tmp_path, monkeypatch):
    """A training that is killed while it saves must not look complete."""
    shutil.copytree(folder[0] / "A", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(mdlm, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.train_member((tmp_path, TINY, "B"), 0, "cpu")
    assert toy.read_record(tmp_path, TINY, "A") is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--gaps 17", "gaps must be 0 to 16, got 17"),
        ("--device nowhere", "device nowhere cannot be used: Expected one of"),
        (f"--out {__file__}", "test_train_toy.py/A"),
    ],
)
def test_bad_input_is_one_line_on_stderr(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        toy.main(arguments.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1 and message in err


def test_an_unusable_device_costs_one_sentence():
    with pytest.raises(ValueError, match=r"^device \S+ cannot be used: [^\n]*$") as error:
        toy.check_device("mps" if not torch.backends.mps.is_available() else "cuda")
    assert ". " not in str(error.value)
