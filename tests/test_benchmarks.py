"""The benchmarks: files in their owners' layouts, right and wrong answers, code that stays confined."""

import csv
import gzip
import json
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks
from benchmarks import BENCHMARKS, Question, grade, load, math_equal, run_code

ROOT = Path(__file__).parent.parent


def missing():
    """Why code cannot be confined here; empty if it can."""
    try:
        benchmarks.check_sandbox(True)
    except ValueError as error:
        return str(error)
    return ""


needs_bwrap = pytest.mark.skipif(bool(missing()), reason=missing() or "bubblewrap works")
CONFINED = [pytest.param(True, marks=needs_bwrap, id="confined"), pytest.param(False, id="unconfined")]  # fmt: skip


def right(task, gold, text):
    return grade(task, Question("x", "", gold), text)[1]


# ---- files

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """ Sum. """\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
HALVE = {
    "prompt": "Write a function to halve.",
    "test_imports": ["from math import floor"],
    "test_list": ["assert halve(4) == 2", "assert halve(5) == 2"],
}
MBPP = [{**HALVE, "task_id": number} for number in (2, 11, 511)]
ARC = [
    {"id": key, "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in zip(texts, labels)]}, "answerKey": answer}
    for key, texts, labels, answer in (("a", "pqrs", "ABCD", "D"), ("b", "pqr", "123", "2"), ("c", "pqrst", "ABCDE", "E"))
]  # fmt: skip
WINO = {"qID": "w", "sentence": "Ann met Bo so _ ran.", "option1": "Ann", "option2": "Bo", "answer": "2"}  # fmt: skip
GSM = {"question": "Q\u2028?", "answer": "It is <<1=1>>.\n#### 2,125"}
MATH = {"problem": "P", "solution": "S", "answer": "\\frac{14}{3}", "unique_id": "u/1"}
CD3 = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
MMLU = [["Q, one?", "a", "b", "id", "d", "B"], ['Say "x"\nor?', "1", "2", "3", "4", "D"]]
SAMPLES = {  # task -> file name, rows, right answers, a wrong answer, a part of the first prompt
    "mmlu": ("astronomy_test.csv", MMLU, ["B", "D"], "C", "Q, one?\n\nA) a\nB) b\nC) id\nD) d"),
    "arc-challenge": ("arc.jsonl", ARC, ["D", "B", "E"], "A", "Which?\n\nA) p"),
    "winogrande": ("dev.jsonl", [WINO], ["B"], "A", "so _ ran.\n\nA) Ann\nB) Bo"),
    "gsm8k": ("t.jsonl", [GSM, {"question": "P?", "answer": "#### -10"}], ["$2,125.00", "-10."], "9", "Q\u2028?"),
    "math500": ("t.jsonl", [MATH], ["\\boxed{\\dfrac{14}{3}}"], "4.67", "P"),
    "humaneval": ("HumanEval.jsonl", [HUMANEVAL], ["def total(x):\n    return sum(x)"], "def total(x):\n    return 3", HUMANEVAL["prompt"]),
    "mbpp": ("mbpp.json", MBPP, [" def halve(x):\n  return floor(x / 2)\nx = 1", "  def halve(x):\n    return x // 2", "```python\ndef halve(x): return x // 2"], "def halve(x):\n    return 2.5", "assert halve(5) == 2"),
    "countdown": ("cd3.jsonl", [CD3, {"input": "30,100,93", "output": "23"}, {"nums": [2, 2, 3], "target": 12}],
                  ["79-(44-15)", "30 - (100 - 93) = 23", "\\(2 \\times 2 \\times 3\\)"], "50", "50 from the numbers 15, 44, 79."),
}  # fmt: skip


def write(folder, name, rows):
    path = folder / name
    if name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", SAMPLES)
def test_gold_answers_are_right_and_wrong_ones_wrong(task, tmp_path):
    name, rows, answers, wrong, shown = SAMPLES[task]
    run_code = "unconfined" if missing() else "confined"
    questions = load(task, write(tmp_path, name, rows))
    assert len(questions) == len(rows)
    code = task in ("humaneval", "mbpp")
    tail = "\n```\nDone." if code else ""
    for question, answer in zip(questions, answers):
        assert grade(task, question, answer + tail, run_code)[1]
        assert not grade(task, question, wrong + tail, run_code)[1]
        assert not grade(task, question, "", run_code)[1]
        assert ("Answer: " in question.prompt) != code == ("no explanation" in question.prompt)
    assert shown in questions[0].prompt


def test_mmlu_folder_and_the_35_subjects(tmp_path):
    for subject in ("astronomy_test", "abstract_algebra_test", "marketing_val"):
        write(tmp_path, f"{subject}.csv", MMLU)
    ids = [question.id for question in load("mmlu", tmp_path)]
    assert ids[::2] == ["abstract_algebra/0", "astronomy/0", "marketing/0"]
    assert [question.id for question in load("mmlu-star", tmp_path)] == ids[2:]
    assert len(set(BENCHMARKS["mmlu-star"].subjects.split())) == 35


def test_ids_are_the_owners_and_a_file_may_be_gzipped(tmp_path):
    assert [q.id for q in load("mbpp", write(tmp_path, "m.json", MBPP))] == ["2", "11", "511"]
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert [q.id for q in load("humaneval", packed)] == ["HumanEval/0"]
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "EOFError" in refusal("humaneval", packed, 1)


def refusal(task, path, row):
    with pytest.raises(ValueError) as caught:
        load(task, path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row {row}: expected {BENCHMARKS[task].data} (")
    return message


@pytest.mark.parametrize("task, good, bad", [
    *[("gsm8k", GSM, bad) for bad in (["text"], None, MATH, {"question": "Q"}, {**GSM, "answer": "no mark"})],
    ("math500", MATH, MATH),
    ("arc-challenge", ARC[0], {**ARC[1], "answerKey": "D"}),
    ("winogrande", WINO, {**WINO, "qID": "v", "answer": "0"}),
    ("humaneval", HUMANEVAL, {"task_id": "x"}),
    ("mbpp", MBPP[0], MBPP[0]), ("mbpp", MBPP[0], {**MBPP[1], "test_list": None}),
    ("countdown", CD3, {"input": "1,b,3", "output": "x"}),
])  # fmt: skip
def test_a_row_of_another_kind_is_one_clear_line(task, good, bad, tmp_path):
    refusal(task, write(tmp_path, "rows.jsonl", [good, bad]), 2)


@pytest.mark.parametrize("name, content, row", [
    ("gsm8k.jsonl", b"\x80\x04\xff\x00", 1), ("mbpp.json", b'[{"prompt', 1),
    ("gsm8k.jsonl", json.dumps(GSM).encode() + b"\n" + b'{"question": "Q', 2), ("mmlu.jsonl", json.dumps(GSM).encode(), 1),
    ("mmlu.csv", b'q,a,b,c,d,A\n"q,a,b,c', 2), ("mmlu.csv", b"q,a,b,c,d,", 1),
])  # fmt: skip
def test_a_malformed_file_is_one_clear_line(name, content, row, tmp_path):
    (tmp_path / name).write_bytes(content)
    refusal(name.split(".")[0], tmp_path / name, row)


def test_no_file_no_questions_no_task(tmp_path):
    refusal("mmlu", tmp_path / "nowhere", 1)
    (tmp_path / "law.csv").write_bytes(b"q,a,b,c,d,A\n")
    with pytest.raises(ValueError, match="got no questions for mmlu-star"):
        load("mmlu-star", tmp_path / "law.csv")
    with pytest.raises(ValueError, match="task must be one of mmlu, .*, got 'gsm9k'"):
        load("gsm9k", "nowhere.jsonl")


def test_settings_are_the_papers():
    lengths = {"gsm8k": 256, "countdown": 256, "math500": 512, "humaneval": 512, "mbpp": 512}
    for task, benchmark in BENCHMARKS.items():
        assert benchmark.length == lengths.get(task, 128) > benchmark.answer_length
        short = task in ("gsm8k", "math500")
        assert benchmark.interval("token_change_count") == (16 if short else 32)
        assert benchmark.interval("top1_probability") == 16
        assert len(benchmark.table_3) == 7 and len(benchmark.table_4) in (0, 4)
    assert BENCHMARKS["gsm8k"].table_3[3] == 83.47  # TIE with token change count


# ---- answers: the texts are separated by ¦

DRESSES = r"""@ ¦ @. ¦ @, ¦ @; ¦ @! ¦ = @ ¦ : @ ¦ $@$. ¦ $@.$ ¦ \(@\). ¦ \( @ \) ¦ \[@.\] ¦ \[@\]. ¦ $$@.$$ ¦ **@.** ¦ **@**. ¦ *@* ¦ `@` ¦
"@" ¦ '@'. ¦ The answer is @. ¦ So the final answer is: $@$. ¦ Answer: @ ¦ **Answer:** @ ¦ \boxed{@} ¦ $\boxed{@}$. ¦ \boxed{@.} ¦
boxed{@} ¦ \boxed{@ ¦ \boxed{}@ ¦ \boxed{} \boxed{@} ¦ \boxed{8} is wrong, so \boxed{@} ¦ Then \[ \boxed{@} \] ¦ \textbf{@} ¦
@. This is 1 + 1. ¦ @ </s> ¦ $$
@.
$$ ¦ @

We check: 1 + 1 = 2."""
MATRIX = r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}"
GOLDS = {
    "math500": [r"\frac{14}{3}", r"3\sqrt{13}", "(6,31,-1)", "(3,4]", "x^3+3x-6", "p - q", r"\text{Evelyn}", r"\$36", "-2", MATRIX],
    "gsm8k": ["1250", "-10", "3.5"],
    "mmlu": [*"ABCDE"],
}  # fmt: skip


@pytest.mark.parametrize("dress", DRESSES.split("¦"))
def test_an_answer_in_any_dress(dress):
    dress = dress.strip()
    for task, golds in GOLDS.items():
        for gold, other in zip(golds, golds[1:] + golds[:1]):
            text = dress.replace("@", gold)
            assert right(task, gold, text) and not right(task, other, text)
    numbers = {"numbers": [8, 3, 2], "target": 22}
    assert right("countdown", numbers, dress.replace("@", "8 * 3 - 2"))
    assert not right("countdown", numbers, dress.replace("@", "8 * 3"))


KINDS = [  # task, gold, texts that say it, texts that don't
    ("math500", r"\frac{14}{3}", r"14/3 ¦ 4\frac23 ¦ 4 2/3 ¦ 4⅔ ¦ 14÷3 ¦ \dfrac{14}3 cm ¦ x = \frac{14}{3} ¦ 4.666666666667 ¦ it is $14/3$",
     r"4.67 ¦ 14 ¦ 3/14 ¦ 14/3x ¦ 14:33 ¦ 4 1/3 ¦ \frac{14}{3"),
    ("math500", r"4\sqrt{2}", r"4√2 ¦ 4√(2) ¦ 4 \sqrt 2 ¦ 4*sqrt(2) ¦ 4\cdot\sqrt(2) ¦ √32 ¦ 4√2 ≈ 5.66", r"4 ¦ 4√3 ¦ 4√ ¦ 4 \sqrt( ¦ √2 ¦ 5.66"),
    ("math500", r"\sqrt{51}", r"\sqrt 51 ¦ √51 ¦ sqrt 51 ¦ \sqrt(51)", r"\sqrt{5} ¦ \sqrt{5}1 ¦ 51"),
    ("math500", r"12\pi", r"12π ¦ 12pi ¦ 12*pi ¦ 12 × π ¦ 12\pi\text{ cm}^2 ¦ 12\pi\,\mathrm{cm} ¦ 12π square feet", r"12 ¦ 12π² ¦ 37.7 ¦ 12\pi r"),
    ("math500", "6+9i", r"6 + 9*i ¦ 6+9\mathrm{i} ¦ 9i + 6 ¦ 6 + 9 i ¦ 6 + 9\imath", r"6 ¦ 6+9 ¦ 6-9i ¦ 9i"),
    ("math500", "5", r"5 cm ¦ 5\text{ inches} ¦ 5.0 ¦ 10/2 ¦ $5$ cm ¦ $5$ of them, as $2 + 4 - 1$ is ¦ x = 5 ¦ 5°",
     r"5c ¦ 5\mathrm{i} ¦ 5 + \mathrm{e} ¦ 5 # 2 ¦ 5\imath ¦ 5½ ¦ 5² ¦ 5^- ¦ 5*10^3 ¦ 5 million ¦ 5 \ldots ¦ 5 or 3 ¦ 5 + ¦ \boxed{5}, \boxed{6}"),
    ("math500", "x^3+3x-6", r"x³ + 3x − 6 ¦ x**3 + 3*x - 6 ¦ x^{3}+3\cdot x-6 ¦ f(x) = x^3+3x-6", r"x^3 ¦ x^3+3x+6 ¦ x^2+3x-6"),
    ("math500", "10,\\!080", "10080 ¦ 10,080 ¦ 10{,}080 ¦ 10\\,080 ¦ 10 080 ¦ 10\u202f080 ¦ 10'080", "10 ¦ 10, 80 ¦ 10.080 ¦ 10 80"),
    ("math500", "(3,4]", r"3 < x ≤ 4 ¦ 3 < x <= 4 ¦ x ∈ (3, 4] ¦ \left(3, 4\right]", r"3 \le x \le 4 ¦ [3,4] ¦ (3,4) ¦ x > 3"),
    ("math500", r"(-\infty, 2) \cup (3, \infty)", "(-∞, 2) ∪ (3, ∞) ¦ (-infinity,2) U (3,+infinity)", "(-∞, 2) ¦ (-∞, 2] ∪ (3, ∞)"),
    ("math500", "3, 5, 7", r"\boxed{3}, \boxed{5}, \boxed{7} ¦ 7, 3 and 5 ¦ $3$, $5$, and $7$ ¦ \{3, 5, 7\}", "3, 5 ¦ 3 ¦ 3, 5, 8"),
    ("math500", r"1 \pm \sqrt{19}", r"1 ± √19 ¦ 1 +/- √19 ¦ x = 1 ± \sqrt{19} ¦ 1 + \sqrt{19} \text{ or } 1 - \sqrt{19}", "1 + √19 ¦ ±√19"),
    ("math500", MATRIX, r"\left(\begin{array}{c} -\frac13 \\[2pt] 2 \end{array}\right) ¦ \begin{bmatrix} -1/3 \\ 2 \end{bmatrix}",
     r"\begin{pmatrix} 2 \\ -1/3 \end{pmatrix} ¦ \begin{pmatrix} -1/3 \\ -2 \end{pmatrix}"),
    ("math500", ".0000672", r"6.72 \times 10^{-5} ¦ 6.72*10^-5 ¦ 6.72 × 10⁻⁵", ".00007 ¦ .0000673"),
    ("math500", "52_8", "52_{8} ¦ 52₈ ¦ 52", "52_9 ¦ 25_8"),
    ("math500", r"28\%", r"28% ¦ 28 percent ¦ 28 ¦ 28\text{ percent}", "82% ¦ 2.8"),
    ("gsm8k", "18", r"""\$18.00 ¦ $18 ¦ - 18 apples ¦ 9 × 2 = $18 ¦ 18. (9 * 2) ¦ \frac{36}{2} ¦ She makes $18 a day. ¦ 18

Because 16 - 3 = 13. ¦ 9 x 2 ¦ Rs.18""",
     r"18/5 ¦ \frac{18}{5} ¦ 18 million ¦ 2^{18} ¦ 18½ ¦ -18 ¦ –18 ¦ 18 000 ¦ 18:2 ¦ 18 = 9 ¦ \sqrt{18} ¦ \boxed{}"),
    ("gsm8k", "1250", "1,250 ¦ 1 250 ¦ 1\u2009250 ¦ 1\\,250 ¦ 1{,}250 ¦ 1'250 ¦ 1.25 thousand ¦ 1.25 × 10^3", "1 ¦ 250 ¦ 125"),
    ("gsm8k", "1.5", r"3/2 ¦ 1½ ¦ 1 1/2 hours ¦ 1\frac12 ¦ \frac{3}{2} ¦ 1.50", "1 ¦ 3 ¦ 1/2 ¦ 11/2"),
    ("gsm8k", "1500000", r"1.5 million ¦ \$1.5 \text{ million} ¦ 1,500,000.00 ¦ 0.0015 billion", "1.5 ¦ 1.5 billion"),
    ("mmlu", "B", r"""b ¦ (B) ¦ B) iron ¦ b) iron ¦ (b) iron ¦ b. 4 ¦ B' ¦ <B> ¦ ‘B’ ¦ \text{(B)} ¦ B because A is not ¦ A car moves, so B ¦ A good choice is B. ¦
     ANSWER IS B. A is wrong. ¦ the answer is (b) ¦ Option B: iron ¦ Antwort: B ¦ \boxed{A = \pi r^2} Answer: B ¦ I think it's B""",
     "A car ¦ Don't know ¦ Vitamin B ¦ A = B + 1 ¦ A and B ¦ It's cold ¦ "),
    ("mmlu", "A", "A ¦ a) a car ¦ (A) Vitamin C ¦ A because B is not ¦ The answer is A.", "A car ¦ the answer is a car ¦ None of the above"),
    ("countdown", {"numbers": [6, 4, 3, 5], "target": 30},
     r"""(6 - 4) x 3 X 5 ¦ (6-4)∗3•5 ¦ (6 − 4) \* 3 \times 5 = 30. ¦ The expression (6-4)*3*5, which equals 30, is right ¦ [6-4]*3*5 -> 30 ¦
     EXPRESSION = '(6-4)*3*5' ¦ 30 = (6-4)\cdot3\cdot5 (each number once) ¦ Use \((6-4)*3*5\) here ¦ It is (3*5*(6-4) = 30) ¦ (6-4)*3*5 (so 30)""",
     r"(6-4)*15 ¦ sqrt(6-4)*3*5 ¦ (6-4)*3*5*x ¦ (6-4)*3*5.5 ¦ (6-4)*3*5% ¦ 2(6-4)*3*5 ¦ (6-4)*3*5^2 ¦ (6-4)3*5 ¦ (6-4)*3*5 - 2"),
    ("countdown", {"numbers": [36, 16, 5], "target": 4}, r"\frac{36-16}{5} ¦ \dfrac{(36 - 16)}{5} = 4 ¦ (36-16) ÷ 5", "36-16/5"),
    ("countdown", {"numbers": [1, 81, 1, 0], "target": 81}, "-1+81+1+0 ¦ 81 - (-1 + 1 + 0)", "1 + 80"),
]  # fmt: skip


@pytest.mark.parametrize("task, gold, same, others", KINDS)
def test_answers_as_people_write_them(task, gold, same, others):
    assert [text for text in same.split("¦") if not right(task, gold, text.strip())] == []
    assert [text for text in others.split("¦") if right(task, gold, text.strip())] == []


EQUAL = r"""\frac43 ¦ \dfrac{4}{3}
\frac{1}{2} ¦ 0.5
1\frac{4}{5} ¦ 9/5
\$32,\!348 ¦ $32,348
90^\circ ¦ 90
5.4 \text{ cents} ¦ 5.4
\text{east} ¦ East
\text{(C)} ¦ C
x=5 ¦ 5
x \in [-2,7] ¦ [-2, 7]
1 \pm \sqrt{19} ¦ 1 - \sqrt{19}, 1 + \sqrt{19}
\frac{\sqrt{3}}{3} ¦ \frac{1}{\sqrt{3}}
(a+5)(b+2) ¦ ab+2a+5b+10
(0,9) \cup (9,36) ¦ (9,36) \cup (0,9)
e^2 ¦ exp(2)
\tan^2(y)+1 ¦ \sec^2(y)
2x+4y-3=0 ¦ y = -\frac{1}{2}x + \frac{3}{4}
m \geq \sqrt{2} ¦ m \in [\sqrt{2}, +\infty)"""
UNEQUAL = r"""(1,2) ¦ (2,1)
\text{east} ¦ west
\text{(C)} ¦ B
x^2 ¦ 2x
\pi ¦ 3.14159
5 ¦
0 ¦ 1/0
10000000001 ¦ 10000000002
\frac{1}{2} ¦ \frac{1}{2}x
9 ¦ 9^9^9^9
\pm 2021 ¦ 2021
1:2:3:\ldots ¦ 1:4:9:\ldots
n=2, 3, 4 ¦ n=1, 2, 3
\frac{x^2}{4}+\frac{y^2}{3}=1 ¦ \frac{x^2}{16}+\frac{y^2}{12}=1
D = (0, 1) ¦ D = (0, 1.5)"""


@pytest.mark.parametrize("pair", EQUAL.split("\n"))
def test_answers_of_equal_value(pair):
    gold, answer = pair.split(" ¦ ")
    assert math_equal(answer, gold) and math_equal(gold, answer)


@pytest.mark.parametrize("pair", UNEQUAL.split("\n"))
def test_answers_of_unequal_value(pair):
    gold, answer = pair.split(" ¦")
    assert not math_equal(answer, gold)


PIECES = r"""\frac \sqrt { } ( ) [ ] ^ 9 99 * ** / - x i \pi , . = \cup \pm \begin{pmatrix} \end{pmatrix} \\ & \text{a} % 0 log \{ \} _ $
\boxed{ \( \) \[ \] A B answer is ½ √ ² : ' " and Option <"""
NINES = {"numbers": [9, 9], "target": 1}


@settings(max_examples=100)
@given(
    st.text(max_size=400)
    | st.lists(st.sampled_from([" ", *PIECES.split()]), max_size=20).map("".join)
)
def test_no_text_breaks_the_graders(text):
    for task, gold in (("mmlu", "A"), ("gsm8k", "5"), ("math500", "5"), ("countdown", NINES)):
        answer, correct = grade(task, Question("x", "", gold), text)
        assert isinstance(answer, str) and isinstance(correct, bool)
    assert math_equal("x", "x")  # the next answer is graded as usual


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9",
        "99999999!",
        "((9^99)^99)^99^99",
        "(" * 999,
        "9" * 10**6,
        "(" * 10**6 + ")" * 10**6,
    ],
)
def test_answers_that_hang_or_exhaust_memory_are_wrong(text):
    start = time.monotonic()
    assert not math_equal(text, "5")
    assert not right("countdown", NINES, text)
    assert math_equal("x + 1", "1 + x")
    assert time.monotonic() - start < 60  # far above the limit of 5 seconds


def test_the_grader_ends_with_its_parent_and_ignores_ctrl_c():
    """The program is read from stdin, which a process of multiprocessing couldn't import again."""
    code = """if True:
        import benchmarks, os, signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        assert benchmarks.math_equal("x", "x")
        try:
            os.killpg(0, signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            print(benchmarks.math_equal("x + 1", "1 + x"), flush=True)
        time.sleep(60)
    """
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen([sys.executable], cwd=ROOT, text=True, start_new_session=True, **pipes) as parent:  # fmt: skip
        parent.stdin.write(code)
        parent.stdin.close()
        assert parent.stdout.readline() == "True\n"
        left = children(parent.pid)
        assert left
        parent.kill()
        assert parent.stderr.read() == ""
    wait_for(lambda: not any(map(alive, left)))


def test_without_math_verify_it_says_why(tmp_path):
    shutil.copy(ROOT / "benchmarks.py", tmp_path)
    (tmp_path / "math_verify.py").write_text("raise ImportError('no sympy here')")
    code = "import benchmarks; benchmarks.math_equal('x', 'x')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ValueError: cannot grade mathematics (ImportError: no sympy here)" in done.stderr


@given(
    st.lists(st.integers(1, 99), min_size=2, max_size=5),
    st.text("+-*/", min_size=4, max_size=4),
    st.sampled_from(["{}", "{} = 7", "\\({}\\)", "7 = {}", "**{}**.", "$\\boxed{{{}}}$"]),
)
def test_countdown_takes_each_number_once_in_any_order(numbers, operators, dress):
    expression = str(numbers[0])
    value = Fraction(numbers[0])
    for operator, number in zip(operators, numbers[1:]):
        expression = (
            f"({number}{operator}{expression})"
            if operator in "+*"
            else f"({expression}{operator}{number})"
        )
        value = {
            "+": value + number,
            "-": value - number,
            "*": value * number,
            "/": value / number,
        }[operator]
    gold = {"numbers": sorted(numbers), "target": value}
    latex = expression.replace("*", " \\times ").replace("/", " \\div ")
    for form in (expression, expression[1:-1], latex, expression.replace("*", "×")):
        assert right("countdown", gold, dress.format(form))
    assert not right("countdown", {**gold, "target": value + 1}, expression)
    assert not right("countdown", {**gold, "numbers": numbers + [1]}, expression)
    assert not right("countdown", {**gold, "numbers": numbers[1:]}, expression)


@pytest.mark.parametrize("answer, target", [
    *[(answer, 24) for answer in (
        "24", "2*3*4+1-1", "23+1", "(2*3)4", "2 3*4", "2**3*4", "4!", "6*4", "2*3*(4/0)", "__import__('os')", "2*3*x", "2*12",
        "", "2*3*4//1", "2_*3*4", "0x2*3*4", "2()*3*4", "(2)(3)*4", "2*3*4+()")],
    ("2**3*4", 32), ("2* *3*4", 32), ("3*4//2", 6), ("4%3+2", 3), ("2<<3+4", 256), ("(2,3*4)", 12),
])  # fmt: skip
def test_countdown_has_four_operations_and_its_numbers_alone(answer, target):
    assert not right("countdown", {"numbers": [2, 3, 4], "target": target}, answer)


# ---- running code


def status(pid):
    """Return a process's state and its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return "Z", None


def alive(pid):
    return status(pid)[0] != "Z"


def children(pid):
    """Return all processes below this one."""
    below = [name for name in os.listdir("/proc") if name.isdigit() and status(name)[1] == str(pid)]
    return below + [deeper for child in below for deeper in children(child)]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("asked", [None, True])
def test_code_runs_only_where_it_is_asked_for(asked, monkeypatch):
    monkeypatch.setattr(benchmarks, "run_code", lambda *sources, **_: pytest.fail("code was run"))
    with pytest.raises(ValueError, match="--run-code"):
        grade("humaneval", Question("x", "", HUMANEVAL), "def total(x): return sum(x)", asked)


def test_without_bubblewrap_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="bubblewrap; on a Mac .*--run-code unconfined"):
        run_code("pass")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: no new namespace >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    benchmarks.check_sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"bwrap: no new namespace.*: allow user namespaces"):
        benchmarks.check_sandbox(True)
    benchmarks.check_sandbox.cache_clear()


BODY = "result = 0\n    for value in x:\n        result += value\n    return result"
WHOLE = f"def total(x):\n    {BODY}\n\ndef other(): pass"


@pytest.mark.parametrize("answer", [
    "    return sum(x)", "return sum(x)", "\n\n  return sum(x)", "total = sum", BODY, "    " + BODY, textwrap.dedent("    " + BODY),
    "    return helper(x)\n\ndef helper(x):\n    return sum(x)", WHOLE, " " + WHOLE, textwrap.indent(WHOLE, "    "),
    "from math import fsum\n" + textwrap.indent(WHOLE, "  "), "if not x:\n        return 0\n    return sum(x)",
    "def helper(x):\n    return sum(x)\ndef total(x: List[int]):\n    return helper(x)",
    "from __future__ import annotations\ndef total(x: Later) -> int:\n    return sum(x)\nclass Later: pass",
])  # fmt: skip
@pytest.mark.parametrize("how", [pytest.param("confined", marks=needs_bwrap), "unconfined"])
def test_humaneval_takes_whole_functions_and_continuations(answer, how):
    assert grade("humaneval", Question("x", "", HUMANEVAL), answer + "\n```", how)[1]


ORDINARY = {
    "dataclass with a quoted annotation": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\nassert P(1).x == 1",
    "a late annotation": "from __future__ import annotations\ndef f(x: Later): return x\nclass Later: pass\nassert f(1)",
    "pickle": "import pickle\nclass P: pass\nassert isinstance(pickle.loads(pickle.dumps(P())), P)",
    "its own source": "import inspect\ndef f(): return 1\nassert 'return 1' in inspect.getsource(f)",
    "a temporary file": "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
    "type hints": "from typing import get_type_hints\nclass A:\n    b: 'A'\nassert get_type_hints(A) == {'b': A}",
    "a script's part": "if __name__ == '__main__': raise SystemExit",
    "standard library": "import decimal, collections.abc, heapq, json, math, random, re, string, hashlib, statistics",
    "numpy": "import numpy\nassert numpy.ones(3).sum() == 3",
    "output": "print('x' * 10 ** 5)",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nassert sum(ThreadPoolExecutor(8).map(abs, [-1] * 99)) == 99",
}  # fmt: skip


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_run(name, confined):
    assert run_code(ORDINARY[name], "assert True", timeout=20, confined=confined)
    assert not run_code(ORDINARY[name], "assert False", timeout=20, confined=confined)


FAILURES = {
    "endless loop": "while True: pass", "sleep": "import time; time.sleep(60)", "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit", "stdin": "input()", "syntax": "def f(",
    "kill itself": "import os; os.kill(os.getpid(), 9)", "memory bomb": "x = bytearray(10 ** 10)",
    "growing memory": "x = []\nwhile True: x.append(bytearray(10 ** 7))", "NUL": "\0", "surrogate": "x = '\ud800'",
    "huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(10 ** 6)); f.flush()",
    "flood": "while True: print('x' * 10 ** 5)", "flood of errors": "import os\nwhile True: os.write(2, b'x' * 10 ** 5)",
    "recursion": "def f(): f()\nf()", "closed": "import os; os.closerange(0, 64)",
    "nested folders": "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')\nassert False",
    "junk on every pipe": "import os\nfor fd in range(1, 64):\n"
    "    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
    "flood on every pipe": "import os\nfor fd in range(3, 64):\n"
    "    try:\n        while True: os.write(fd, b'0' * 10 ** 6)\n    except OSError: pass",
}  # fmt: skip


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize("name", FAILURES)
def test_mischief_fails_and_harms_nothing(name, confined, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    start = time.monotonic()
    try:
        assert not run_code(FAILURES[name], "pass", timeout=1.5, memory=1 << 28, confined=confined)
        assert time.monotonic() - start < 30  # the limit of 1.5 s ended it
        assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert os.listdir(tmp_path) == [] or (name == "nested folders" and not confined)
    finally:
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


REFUSED = {  # what a confined program asserts about its surroundings; {names} are filled in by the test
    "network": "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: pass\nelse: assert False",
    "interfaces": "import os\nassert set(os.listdir('/sys/class/net') if os.path.exists('/sys') else []) <= {{'lo'}}",
    "files outside": "import os\nassert not os.path.exists({file!r}) and not os.path.exists({root!r} + '/eval.py')\n"
    "assert not os.path.exists('/etc/passwd') and not os.path.exists('/home')",
    "its environment": "import os\nassert {{*os.environ}} <= {{'PWD', 'LC_CTYPE', 'OPENBLAS_NUM_THREADS'}}",
    "environments of others": "import glob\nfor path in glob.glob('/proc/*/environ'):\n"
    "    try: assert b'TIE_SECRET' not in open(path, 'rb').read()\n    except PermissionError: pass",
    "other processes": "import os\nassert all(int(pid) < 10 for pid in os.listdir('/proc') if pid.isdigit())",
    "kill the parent": "import os\nfor pid in ({pid}, os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: pass\n"
    "    else: assert False",
    "system": "import os, sys\nfor folder in ('/', '/usr', '/dev', '/etc', sys.prefix, os.path.dirname(os.__file__)):\n"
    "    assert os.statvfs(folder).f_flag & os.ST_RDONLY, folder\n"
    "    try: open(folder + '/x', 'w')\n    except OSError: pass\n    else: assert False, folder",
    "root": "import os\nassert os.getuid() != 0 or open('/proc/self/uid_map').read().split()[:2] != ['0', '0']",
    "full /tmp": "import errno\ntry:\n    for i in range(100): open(f'/tmp/{{i}}', 'wb').write(bytes(10 ** 6))\n"
    "except OSError as e: assert e.errno == errno.ENOSPC\nelse: assert False",
    "full /dev/shm": "import errno\ntry:\n    for i in range(99): open(f'/dev/shm/{{i}}', 'wb').write(bytes(10 ** 6))\n"
    "except OSError as e: assert e.errno == errno.ENOSPC\nelse: assert False",
    "fork": "import os\ntry: os.fork()\nexcept OSError: pass\nelse: assert False",
    "fork below Python": "import ctypes\nassert ctypes.CDLL(None).fork() == -1",
    "subprocess": "import subprocess\ntry: subprocess.run(['true'])\nexcept OSError: pass\nelse: assert False",
    "kernel": "import ctypes, errno, platform\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "keyctl = 250 if platform.machine() == 'x86_64' else 219\n"
    "for call in (('shmget', 0, 9, 896), ('msgget', 0, 896), ('semget', 0, 1, 896), ('unshare', 1 << 28), ('setns', 0, 0),\n"
    "             ('ptrace', 0), ('syscall', keyctl, 0, -3, 0), ('syscall', 425, 1, 0)):\n"
    "    assert (getattr(libc, call[0])(*call[1:]), ctypes.get_errno()) == (-1, errno.EPERM), call",
    "sockets": "import socket\nsocket.socket(), socket.socketpair()\nfor family in (10, 16, 17, 38, 40):\n"
    "    try: socket.socket(family, socket.SOCK_DGRAM)\n    except PermissionError: pass\n    else: assert False",
    "memory": "try: bytearray(1 << 29)\nexcept MemoryError: pass\nelse: assert False",
    "the token": "import sys, re, gc\nframe, seen = sys._getframe(), ''\n"
    "while frame: seen += repr((frame.f_locals, frame.f_globals)); frame = frame.f_back\n"
    "assert not re.search('[0-9a-f]{{32}}', seen)",
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", REFUSED)
def test_a_confined_program_reaches_nothing(name, tmp_path, monkeypatch):
    """The program runs to its end only if everything that it asserts is true."""
    monkeypatch.setenv("TIE_SECRET", "x")
    file = tmp_path / "file"
    file.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = REFUSED[name].format(pid=os.getpid(), port=port, file=str(file), root=str(ROOT))
        assert run_code(source, "pass", timeout=20, memory=1 << 28)


@pytest.mark.skipif(platform.machine() not in benchmarks.MACHINES, reason="no filter here")
@pytest.mark.parametrize("name", ["fork", "fork below Python", "kernel", "sockets", "the token"])
def test_what_an_unconfined_program_cannot_do_either(name):
    assert run_code(REFUSED[name].format(), timeout=20, confined=False)


@needs_bwrap
def test_no_process_survives_the_evaluation():
    """If the evaluation is killed while a program runs, no process of the sandbox stays."""
    code = "import benchmarks; benchmarks.run_code('import time; time.sleep(300)', timeout=300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        wait_for(lambda: len(children(parent.pid)) >= 2)
        left = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, left)))


@needs_bwrap
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_than_root_is_confined_too(tmp_path):
    """With the system's interpreter, which every user can read."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if not python:
        pytest.skip("no interpreter in /usr/bin")
    nobody = pwd.getpwnam("nobody")
    shutil.copy(ROOT / "benchmarks.py", tmp_path)
    code = """if True:
        from benchmarks import run_code
        assert run_code("import os; assert os.getuid() != 0", timeout=20)
        assert not run_code("import os; os.fork()", timeout=20)
        for file in ("/x", "/dev/x"):
            assert not run_code(f"open({file!r}, 'w')", timeout=20)
        assert run_code("open('/tmp/x', 'w')", timeout=20)
    """
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(folder, folder.stat().st_mode | 0o055)
    done = subprocess.run([python, "-c", code], user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd=tmp_path,
                          capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})  # fmt: skip
    if "No permissions to create" in done.stderr or "user namespace" in done.stderr:
        pytest.skip(done.stderr[-200:])
    assert done.returncode == 0, done.stderr
