"""The benchmarks of eval.py: the owners' layouts read, gold answers right, wrong ones wrong, code contained."""

import csv
import gzip
import json
import os
import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as benchmarks

relaxed = settings(deadline=None, max_examples=150)

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """ Sum. """\n',
    "entry_point": "total", "canonical_solution": "    return sum(x)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
MBPP = [
    {
        "source_file": "x", "task_id": k, "prompt": "Write a function to halve.",
        "code": "def halve(x):\n  return floor(x / 2)", "test_imports": ["from math import floor"],
        "test_list": ["assert halve(4) == 2", "assert halve(5) == 2"],
    }
    for k in (2, 11, 511)
]
ARC = [
    {
        "id": "a", "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in zip("pqrs", "ABCD")]},
        "answerKey": "D",
    },
    {
        "id": "b", "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in zip("pqr", "123")]},
        "answerKey": "2",
    },
    {
        "id": "c",
        "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in zip("pqrst", "ABCDE")]},
        "answerKey": "E",
    },
]
SAMPLES = {  # task -> (file name, rows, right answers, a wrong answer)
    "mmlu": (
        "astronomy_test.csv", [["Q, one?", "a", "b", "c", "d", "B"], ['Say "x"\nor?', "1", "2", "3", "4", "D"]],
        ["B", "D"], "C",
    ),
    "arc-challenge": ("arc.jsonl", ARC, ["D", "B", "E"], "A"),
    "winogrande": (
        "dev.jsonl",
        [{"qID": "w", "sentence": "Ann met Bo so _ ran.", "option1": "Ann", "option2": "Bo", "answer": "2"}], ["B"],
        "A",
    ),
    "gsm8k": (
        "test.jsonl",
        [{"question": "Q\u2028?", "answer": "It is <<1=1>>.\n#### 2,125"}, {"question": "P?", "answer": "#### -10"}],
        ["$2,125.00", "-10."], "9",
    ),
    "math500": (
        "test.jsonl",
        [{"problem": "P", "solution": "S", "answer": "\\frac{14}{3}", "subject": "A", "level": 1, "unique_id": "u/1"}],
        ["\\boxed{\\dfrac{14}{3}}"], "4.67",
    ),
    "humaneval": ("HumanEval.jsonl", [HUMANEVAL], ["def total(x):\n    return sum(x)"], "def total(x):\n    return 3"),
    "mbpp": ("sanitized-mbpp.json", MBPP, [MBPP[0]["code"]] * 3, "def halve(x):\n    return 2.5"),
    "countdown": (
        "cd3_test.jsonl",
        [
            {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}, {"input": "30,100,93", "output": "23"},
            {"nums": [2, 2, 3], "target": 12},
        ],
        ["79-(44-15)", "30 - (100 - 93) = 23", "\\(2 \\times 2 \\times 3\\)"],
        "50",
    ),
}


def write(folder, name, rows):
    path = folder / name
    if name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- files


@pytest.mark.parametrize("task", SAMPLES)
def test_gold_answers_are_right_and_wrong_ones_wrong(task, tmp_path):
    name, rows, right, wrong = SAMPLES[task]
    questions = benchmarks.read_questions(task, write(tmp_path, name, rows))
    assert len(questions) == len(rows)
    for question, answer in zip(questions, right):
        tail = "\n```\nDone." if task in ("humaneval", "mbpp") else ""
        assert benchmarks.grade(task, question, answer + tail, run_code=True)[1]
        assert not benchmarks.grade(task, question, wrong + tail, run_code=True)[1]
        assert not benchmarks.grade(task, question, "", run_code=True)[1]
        if isinstance(question.gold, str):
            assert benchmarks.grade(task, question, question.gold)[1]


@pytest.mark.parametrize("task", SAMPLES)
def test_prompt_holds_the_question_and_asks_for_what_the_suffix_announces(task, tmp_path):
    name, rows, _, _ = SAMPLES[task]
    prompt = benchmarks.read_questions(task, write(tmp_path, name, rows))[0].prompt
    shown = {
        "mmlu": "Q, one?\n\nA) a\nB) b\nC) c\nD) d", "arc-challenge": "Which?\n\nA) p",
        "winogrande": "so _ ran.\n\nA) Ann\nB) Bo", "gsm8k": "Q\u2028?", "math500": "P",
        "humaneval": HUMANEVAL["prompt"], "mbpp": "assert halve(5) == 2", "countdown": "15, 44, 79",
    }
    assert shown[task] in prompt
    assert "{" not in prompt
    code = benchmarks.BENCHMARKS[task].suffix == "```python\n"
    assert ("Answer: " in prompt) != code and ("no explanation" in prompt) == code


def test_mmlu_folder_and_the_35_subjects(tmp_path):
    assert len(set(benchmarks.MMLU_STAR.split())) == 35
    for subject in ("astronomy_test", "abstract_algebra_test", "marketing_val"):
        write(tmp_path, f"{subject}.csv", SAMPLES["mmlu"][1])
    assert [q.id for q in benchmarks.read_questions("mmlu", tmp_path)][::2] == [
        "abstract_algebra/0", "astronomy/0", "marketing/0",
    ]
    assert {q.id.split("/")[0] for q in benchmarks.read_questions("mmlu-star", tmp_path)} == {"astronomy", "marketing"}


def test_mbpp_reads_all_of_its_file_and_humaneval_gzip(tmp_path):
    assert [q.id for q in benchmarks.read_questions("mbpp", write(tmp_path, "m.json", MBPP))] == ["2", "11", "511"]
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert [q.id for q in benchmarks.read_questions("humaneval", packed)] == ["HumanEval/0"]


GSM = json.dumps({"question": "Q", "answer": "#### 1"}).encode()
PACKED = gzip.compress(json.dumps(HUMANEVAL).encode())


@pytest.mark.parametrize(
    "task, name, content, words",
    [
        ("gsm8k", "e.jsonl", b"", "no question for gsm8k"), ("gsm8k", "e.jsonl", b"\n \n", "no question for gsm8k"),
        ("gsm8k", "e.jsonl", b"\x80\x04\xff\x00", "fetch the file"),
        ("gsm8k", "e.jsonl", GSM + b"\n" + GSM[:20], "line 2: cannot be read"),
        ("gsm8k", "e.jsonl", GSM + b"\n" + b'{"question": "Q"}', "line 2: not a row for gsm8k"),
        ("gsm8k", "e.jsonl", b'{"question": "Q", "answer": "no mark"}', "line 1: not a row"),
        ("gsm8k", "e.jsonl", b'{"question": "", "answer": "#### 1"}', "line 1: not a row"),
        ("gsm8k", "e.jsonl", b'"text"', "line 1: not a row"), ("gsm8k", "e.jsonl", b"[" * 100000, "fetch the file"),
        ("gsm8k", "e.csv", b"a,b,c\n", "line 1: not a row for gsm8k"),
        ("math500", "e.jsonl", GSM, "line 1: not a row for math500"),
        (
            "math500", "e.jsonl", b'{"problem": "P", "answer": "1", "unique_id": "u"}\n' * 2,
            "line 2: 'u' was there before",
        ),
        ("arc-challenge", "e.jsonl", GSM, "line 1: not a row for arc-challenge"),
        (
            "winogrande", "e.jsonl", b'{"sentence": "_", "option1": "a", "option2": "b", "answer": "3"}',
            "line 1: not a row",
        ),
        ("mmlu", "e.csv", b"q,a,b,c,d,A\nq,a,b\n", "line 2: not a row for mmlu"),
        ("mmlu", "e.csv", b'q,a,b,c,d,A\n"q,a,b,c', "cannot be read"),
        ("mmlu", "e.csv", b"q,a,b,c,d,E\n", "line 1: not a row"),
        ("mmlu-star", "anatomy_test.csv", b"q,a,b,c,d,A\n", "no question for mmlu-star"),
        ("mmlu", "e.jsonl", GSM, "line 1: not a row for mmlu"),
        ("humaneval", "e.jsonl.gz", PACKED[: len(PACKED) // 2], "fetch the file"),
        ("humaneval", "e.jsonl", json.dumps({**HUMANEVAL, "entry_point": "other"}).encode(), "line 1: not a row"),
        ("mbpp", "e.json", json.dumps(MBPP).encode()[:-9], "fetch the file"),
        ("mbpp", "e.json", json.dumps(MBPP[1:2] * 2).encode(), "item 2: 11 was there before"),
        ("countdown", "e.jsonl", b'{"input": "1,b,3", "output": "x"}', "line 1: not a row"),
        ("countdown", "e.jsonl", GSM, "line 1: not a row for countdown"),
    ],
)
def test_malformed_files_give_one_clear_line(task, name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        benchmarks.read_questions(task, tmp_path / name)
    message = str(caught.value)
    assert words in message and str(tmp_path / name) in message and "\n" not in message


def test_missing_files_and_unknown_tasks():
    with pytest.raises(ValueError, match="nowhere.jsonl: cannot be read"):
        benchmarks.read_questions("gsm8k", "nowhere.jsonl")
    with pytest.raises(ValueError, match="no task 'gsm9k': choose one of mmlu, "):
        benchmarks.read_questions("gsm9k", "nowhere.jsonl")


def test_settings_are_the_papers():
    table = benchmarks.BENCHMARKS
    assert {task: b.length for task, b in table.items()} == {
        "mmlu": 128, "mmlu-star": 128, "arc-challenge": 128, "winogrande": 128, "gsm8k": 256, "countdown": 256,
        "math500": 512, "humaneval": 512, "mbpp": 512,
    }
    assert [task for task, b in table.items() if b.interval("token_change_count") == 16] == ["gsm8k", "math500"]
    assert all(b.interval(score) == 16 for b in table.values() for score in ("top1_probability", "negative_entropy"))
    assert [task for task, b in table.items() if b.answer_window] == ["humaneval", "mbpp"]
    assert all(
        len(b.table_3) in (0, len(benchmarks.TABLE_3)) and len(b.table_4) in (0, len(benchmarks.TABLE_4))
        for b in table.values()
    )
    assert all(b.answer_length < b.length for b in table.values())
    assert dict(zip(benchmarks.TABLE_3, table["gsm8k"].table_3))["tie token_change_count"] == 83.47


# ---- answers


@given(
    st.sampled_from("ABCDE"),
    st.sampled_from(
        [
            "{}", " {}.", "({})", "**{}**", "{}) because A is not", "$\\boxed{{{}}}$", "\\boxed{{\\text{{{}}}}}",
            "The answer is {}.", "Option {}: iron", "\n{}\n", "\\text{{({})}}", "the correct answer is **({})**",
            "`{}`", "{}. Dogs bark", "\\(\\mathbf{{{}}}\\)",
        ]
    ),
)
def test_a_dressed_letter_is_found(letter, dress):
    assert benchmarks.extract_letter(dress.format(letter)) == letter
    if dress in ("{}", "({})", "**{}**"):
        assert benchmarks.extract_letter(dress.format(letter.lower())) == letter


@pytest.mark.parametrize("text", ["", "Dogs", "42", "FALSE", "It's cold"])
def test_no_letter(text):
    assert benchmarks.extract_letter(text) == ""


@given(
    st.integers(-(10**7), 10**7),
    st.sampled_from(
        [
            "{:,}", "${:,}.00", "{} dollars", "**{}**", "{}.", "\\boxed{{{:,}}}", "The answer is {}", "3 + 4 = {}",
            "\\(x = {}\\)", "{:,} cm^2", "\\${:,}\n99",
        ]
    ),
)
def test_a_dressed_number_is_found(number, dress):
    text = dress.format(number)
    assert benchmarks.math_equal(benchmarks.extract_number(text), str(number))
    assert not benchmarks.math_equal(benchmarks.extract_number(text), str(number + 1))


EQUAL = [
    ("\\frac{14}{3}", "14/3"), ("\\frac43", "\\dfrac{4}{3}"), ("\\frac 59", "\\tfrac{5}{9}"), ("\\frac9{19}", "9/19"),
    ("\\frac{1}{2}", "0.5"), ("1\\frac{4}{5}", "9/5"), ("137 \\frac{1}{2}", "137.5"), ("137 1/2", "\\frac{275}{2}"),
    (".35625", "0.35625"), ("\\frac{2}{-3}", "-2/3"), ("10,\\!080", "10080"), ("58,500", "58500"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("\\$32,\\!348", "$32,348"), ("\\$18.90", "18.9"),
    ("90^\\circ", "90"), ("90^{\\circ}", "90 degrees"), ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
    ("50\\%", "50"), ("50\\%", "50%"), ("5.4 \\text{ cents}", "5.4"), ("864 \\mbox{ inches}^2", "864"),
    ("15\\mbox{ cm}^2", "15 cm^2"), ("8 \\pi", "8\\pi \\text{ square units}"), ("\\text{east}", "East"),
    ("\\text{(C)}", "C"), ("\\text{Evelyn}", "\\text{ Evelyn}"), ("x=5", "5"), ("5", "x = 5"), ("y = 2x + 3", "2x+3"),
    ("5x - 7y + 11z + 4 = 0", "0 = 4 + 11z - 7y + 5x"), ("x \\in [-2,7]", "[-2, 7]"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, pi/2)"), ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]"),
    ("(-\\infty, 0]", "(-infinity, 0]"), ("(0,9) \\cup (9,36)", "(9,36) U (0,9)"), ("3, 5, 7", "7,3,5"),
    ("1,-2", "\\{-2, 1\\}"), ("-2,1", "x = 1 and x = -2"), ("1 \\pm \\sqrt{19}", "1 - \\sqrt{19}, 1 + \\sqrt{19}"),
    ("\\{1\\pm\\sqrt{5},-2\\}", "-2, 1+\\sqrt5, 1-\\sqrt5"), ("3\\sqrt{13}", "3*sqrt(13)"),
    ("3\\sqrt{13}", "\\sqrt{117}"), ("11\\sqrt2", "11√2"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("\\frac{20000}{\\pi}", "20000/π"), ("6 - 5i", "-5i+6"), ("2x+3", "3+2x"), ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("x^3+3x-6", "x(x^2+3)-6"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"), ("2^{10}", "1024"), ("2^{-1}", "1/2"),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\end{bmatrix}"),
    ("4210_{5}", "4210_5"),
    ("\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}", "\\begin{pmatrix}-1&0\\\\0&-1\\end{pmatrix}"),
    ("3R^2", "3 R^{2}"), ("2 \\cdot 3", "6."),
]
UNEQUAL = [
    ("\\frac{14}{3}", "4.67"), ("\\frac43", "3/4"), ("1\\frac{4}{5}", "4/5"), ("10080", "10,81"), ("(3,4]", "[3,4]"),
    ("(3,4]", "(3,4)"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("1,-2", "1"), ("1,-2", "1,2"), ("3, 5, 7", "3, 5"),
    ("6 - 5i", "6 + 5i"), ("\\sqrt{51}", "7.14"), ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"), ("52_8", "52"),
    ("4210_5", "4210_6"), ("\\text{east}", "west"), ("\\text{(C)}", "B"), ("\\text{even}", "neev"), ("2x+3", "3x+2"),
    ("y = 2x + 3", "y = 3x + 2"), ("x^2", "2x"), ("\\pi", "3.14159"), ("90^\\circ", "9"),
    ("5x - 7y = 4", "5x + 7y = 4"), ("(0,9) \\cup (9,36)", "(0,36)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}"),
    ("800", "10 80"), ("9", "9^9^9^9"), ("5", ""), ("5", "\\boxed{}"), ("0", "1/0"), ("(-\\infty, 0]", "(\\infty, 0]"),
    ("2", "\\frac{}{}"), ("10000000001", "10000000002"), ("\\frac13", "0.33333333333"),
    ("\\frac{1}{2}", "\\frac{1}{2}x"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_math_answers_of_equal_value(gold, answer):
    assert benchmarks.math_equal(answer, gold) and benchmarks.math_equal(gold, answer)


@pytest.mark.parametrize("gold, answer", UNEQUAL)
def test_math_answers_of_unequal_value(gold, answer):
    assert not benchmarks.math_equal(answer, gold)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("\\boxed{\\frac{\\sqrt{3}}{2}} so", "\\frac{\\sqrt{3}}{2}"), ("$$\n\\frac{1}{2}\n$$", "\\frac{1}{2}"),
        (" \\(2x\\)\nDone", "2x"), ("**7**", "7"), ("The final answer is: $12$.", "$12$."),
        ("\\[\n\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}\n\\]", "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"),
    ],
)
def test_math_extraction(text, answer):
    assert benchmarks.extract_math(text) == answer


@relaxed
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(1, 9))
def test_fractions_equal_their_other_forms(top, bottom, factor):
    gold, value = f"\\frac{{{top}}}{{{bottom}}}", Fraction(top, bottom)
    for answer in (
        str(value), f"\\dfrac{{{top * factor}}}{{{bottom * factor}}}", f"{-top}/{-bottom}", f"({top} / {bottom})",
    ):
        assert benchmarks.math_equal(answer, gold)
    assert not benchmarks.math_equal(str(value + 1), gold)
    decimal = str(top / 8)
    assert benchmarks.math_equal(decimal, f"\\frac{{{top}}}{{8}}") and not benchmarks.math_equal(
        decimal + "1", f"\\frac{{{top}}}{{8}}"
    )


@relaxed
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_lists_have_no_order_and_tuples_have_one(values, dice):
    shuffled = dice.sample(values, len(values))
    gold, answer = ", ".join(map(str, values)), ",".join(map(str, shuffled))
    assert benchmarks.math_equal(answer, gold)
    assert benchmarks.math_equal(f"({answer})", f"({gold})") == (values == shuffled)
    assert not benchmarks.math_equal(",".join(map(str, shuffled[1:])), gold)


PIECES = [
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "9", "99999", "*", "**", "/", "-", "x", "e", "i", "\\pi",
    "\\infty", ",", " ", ".", "=", "\\cup", "\\pm", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\\text{a}", "%",
    "0", "log", "\\{", "\\}", "_",
]


@settings(deadline=2000, max_examples=400)
@given(st.text(max_size=400) | st.lists(st.sampled_from(PIECES), max_size=80).map("".join))
def test_no_text_breaks_or_hangs_the_graders(text):
    for extract in (
        benchmarks.extract_letter, benchmarks.extract_number, benchmarks.extract_math, benchmarks.extract_code,
    ):
        assert isinstance(extract(text), str)
    assert benchmarks.math_equal(text, "5") in (True, False) and benchmarks.math_equal("5", text) in (True, False)
    assert benchmarks.countdown_correct(text, {"numbers": [9, 9], "target": 1}) in (True, False)
    with suppress(ValueError):
        benchmarks.evaluate(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9", "9" * 300 + "^" + "9" * 300, "(" * 299, "((9^99)^99)^99^99", "1" + "^9" * 140, "\\sqrt" * 50 + "9",
        "-" * 299 + "1",
    ],
)
def test_huge_expressions_end_at_once(text):
    start = time.monotonic()
    assert not benchmarks.math_equal(text, "5")
    assert time.monotonic() - start < 5  # a bound on hanging, far above what it takes


@st.composite
def countdowns(draw):
    """Numbers and an expression that uses each of them once, with its exact value."""
    numbers = draw(st.lists(st.integers(1, 99), min_size=2, max_size=5))
    parts = [(Fraction(n), str(n)) for n in numbers]
    while len(parts) > 1:
        (x, a), (y, b) = (parts.pop(draw(st.integers(0, len(parts) - 1))) for _ in "ab")
        sign = draw(st.sampled_from("+-*/" if y else "+-*"))
        parts.append(({"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[sign], f"({a}{sign}{b})"))
    return numbers, parts[0]


@relaxed
@given(
    countdowns(), st.randoms(use_true_random=False),
    st.sampled_from(["{}", "{} = 7", "\\({}\\)", "7 = {}", "**{}**.", "$\\boxed{{{}}}$"]),
)
def test_countdown_takes_each_number_once_in_any_order(case, dice, dress):
    numbers, (value, expression) = case
    gold = {"numbers": dice.sample(numbers, len(numbers)), "target": value}
    for form in (
        expression, expression[1:-1], expression.replace("*", " \\times ").replace("/", " \\div "),
        expression.replace("*", "×"),
    ):
        assert benchmarks.countdown_correct(benchmarks.extract_math(dress.format(form)), gold)
    assert not benchmarks.countdown_correct(expression, {**gold, "target": value + 1})
    assert not benchmarks.countdown_correct(expression, {**gold, "numbers": numbers + [1]})
    assert not benchmarks.countdown_correct(expression, {**gold, "numbers": numbers[1:]})


@pytest.mark.parametrize(
    "answer",
    [
        "24", "2*3*4+1-1", "23+1", "(2*3)4", "2 3*4", "2**3*4", "4!", "6*4", "2*3*(4/0)", "__import__('os')", "2*3*x",
        "2*12", "",
    ],
)
def test_countdown_refuses(answer):
    assert not benchmarks.countdown_correct(answer, {"numbers": [2, 3, 4], "target": 24})


def test_code_extraction_keeps_indentation_and_stops_at_the_fence():
    assert benchmarks.extract_code("\n    return 1\n```\nThis returns 1.\n```") == "    return 1"
    assert benchmarks.extract_code("```python\ndef f():\n    return 1\n") == "def f():\n    return 1"


# ---- sandbox


def run(*sources, timeout=1.5):
    return benchmarks.run_code(*sources, timeout=timeout, memory=1 << 28)


def test_code_is_not_run_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "run_code", lambda *sources: pytest.fail("code was run"))
    question = benchmarks.read_questions("humaneval", write(tmp_path, "h.jsonl", [HUMANEVAL]))[0]
    with pytest.raises(ValueError, match="--run-code"):
        benchmarks.grade("humaneval", question, "def total(x): return sum(x)")


@pytest.mark.parametrize(
    "answer",
    [
        "    return sum(x)", "return sum(x)",
        "def helper(x):\n    return sum(x)\ndef total(x: List[int]):\n    return helper(x)", "total = sum",
    ],
)
def test_humaneval_takes_whole_functions_and_continuations(answer, tmp_path):
    question = benchmarks.read_questions("humaneval", write(tmp_path, "h.jsonl", [HUMANEVAL]))[0]
    assert benchmarks.grade("humaneval", question, answer + "\n```", run_code=True)[1]


def test_right_code_passes_and_sees_no_environment(monkeypatch):
    monkeypatch.setenv("TIE_SECRET", "x")
    assert run(
        "import os, json, decimal, collections.abc, dataclasses\nassert 'TIE_SECRET' not in os.environ",
        "assert os.listdir() == []",
    )
    assert not run("assert 1 == 2")


FAILURES = {
    "endless loop": "while True: pass", "sleep": "import time; time.sleep(60)", "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)", "SystemExit": "raise SystemExit",
    "kill itself": "import os; os.kill(os.getpid(), 9)", "memory bomb": "x = bytearray(10 ** 10)",
    "growing memory": "x = []\nwhile True: x.append(bytearray(10 ** 7))", "fork": "import os\nif os.fork(): pass",
    "raw fork bomb": "import ctypes\nfork = ctypes.CDLL(None).fork\nfor _ in range(50):\n    assert fork() > 0",
    "threads": "import threading\nfor _ in range(9): threading.Thread(target=print).start()",
    "subprocess": "import subprocess; subprocess.run(['true'])", "network": "import socket; socket.socket()",
    "stdin": "input()", "huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(10 ** 6))",
    "truncate": "import os; os.open('x', os.O_CREAT | os.O_TRUNC)", "flood": "while True: print('x' * 10 ** 5)",
    "delete": "import shutil, os; shutil.rmtree(os.getcwd())", "syntax": "def f(", "NUL": "\0",
    "recursion": "def f(): f()\nf()", "surrogate": "x = '\ud800'",
    "kill the parent": "import os; os.kill(os.getppid(), 9)", "closed": "import os; os.closerange(0, 64)",
    "unclosed string": "x = '''", "swallowed": "import sys\nsys.settrace(None)\nraise KeyboardInterrupt",
    "junk on every pipe": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
}


@pytest.mark.parametrize("name", FAILURES)
def test_mischief_fails_and_harms_nothing(name):
    before, start = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set(), time.monotonic()
    assert not run(FAILURES[name], "pass")
    assert time.monotonic() - start < 15  # the limit of 1.5 s ended it
    assert not before or len(set(os.listdir("/proc/self/fd"))) <= len(before)


def test_memory_is_limited():
    assert benchmarks.run_code("x = bytearray(1 << 28)", timeout=10, memory=1 << 30)
    assert not benchmarks.run_code("x = bytearray(1 << 28)", timeout=10, memory=1 << 28)


def test_no_process_survives_and_the_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.tempfile, "tempdir", str(tmp_path))
    assert run("x = 1") and not run("while True: pass")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_token_is_on_no_frame_that_the_program_sees():
    assert run(
        "import sys\nframe, seen = sys._getframe(), ''",
        "while frame:\n    seen += repr((frame.f_locals, frame.f_globals))\n    frame = frame.f_back",
        "import re\nassert not re.search('[0-9a-f]{32}', seen)",
    )
