"""The benchmarks of eval.py: the owners' layouts read, gold answers right, wrong ones wrong, code contained."""

import csv
import gzip
import json
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as benchmarks

ROOT = Path(__file__).parent.parent
relaxed = settings(deadline=None, max_examples=100)


def missing():
    """Why code cannot be confined here, or nothing."""
    try:
        benchmarks.check_sandbox(True)
    except ValueError as error:
        return str(error)
    return ""


needs_bwrap = pytest.mark.skipif(bool(missing()), reason=missing() or "bubblewrap is here")
CONFINED = [pytest.param(True, marks=needs_bwrap, id="confined"), pytest.param(False, id="unconfined")]

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(x: List[int]) -> int:\n    """ Sum. """\n',
    "entry_point": "total", "canonical_solution": "    return sum(x)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
MBPP = [{"source_file": "x", "task_id": k, "prompt": "Write a function to halve.", "test_imports": ["from math import floor"],
         "code": "def halve(x):\n  return floor(x / 2)", "test_list": ["assert halve(4) == 2", "assert halve(5) == 2"]}
        for k in (2, 11, 511)]  # fmt: skip
ARC = [{"id": key, "question": {"stem": "Which?", "choices": [{"text": t, "label": n} for t, n in zip(texts, labels)]},
        "answerKey": right} for key, texts, labels, right in (
            ("a", "pqrs", "ABCD", "D"), ("b", "pqr", "123", "2"), ("c", "pqrst", "ABCDE", "E"))]  # fmt: skip
SAMPLES = {  # task -> (file name, rows, right answers, a wrong answer)
    "mmlu": ("astronomy_test.csv", [["Q, one?", "a", "b", "id", "d", "B"], ['Say "x"\nor?', "1", "2", "3", "4", "D"]],
             ["B", "D"], "C"),
    "arc-challenge": ("arc.jsonl", ARC, ["D", "B", "E"], "A"),
    "winogrande": ("dev.jsonl", [{"qID": "w", "sentence": "Ann met Bo so _ ran.", "option1": "Ann", "option2": "Bo",
                                  "answer": "2"}], ["B"], "A"),
    "gsm8k": ("test.jsonl", [{"question": "Q\u2028?", "answer": "It is <<1=1>>.\n#### 2,125"},
                             {"question": "P?", "answer": "#### -10"}], ["$2,125.00", "-10."], "9"),
    "math500": ("test.jsonl", [{"problem": "P", "solution": "S", "answer": "\\frac{14}{3}", "level": 1, "unique_id": "u/1"}],
                ["\\boxed{\\dfrac{14}{3}}"], "4.67"),
    "humaneval": ("HumanEval.jsonl", [HUMANEVAL], ["def total(x):\n    return sum(x)"], "def total(x):\n    return 3"),
    "mbpp": ("sanitized-mbpp.json", MBPP, [MBPP[0]["code"]] * 3, "def halve(x):\n    return 2.5"),
    "countdown": ("cd3_test.jsonl", [{"input": "15,44,79,50", "output": "44-15=29,79-29=50"},
                                     {"input": "30,100,93", "output": "23"}, {"nums": [2, 2, 3], "target": 12}],
                  ["79-(44-15)", "30 - (100 - 93) = 23", "\\(2 \\times 2 \\times 3\\)"], "50"),
}  # fmt: skip


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
    run_code = "unconfined" if missing() else "confined"
    questions = benchmarks.read_questions(task, write(tmp_path, name, rows))
    assert len(questions) == len(rows)
    for question, answer in zip(questions, right):
        tail = "\n```\nDone." if task in ("humaneval", "mbpp") else ""
        assert benchmarks.grade(task, question, answer + tail, run_code)[1]
        assert not benchmarks.grade(task, question, wrong + tail, run_code)[1]
        assert not benchmarks.grade(task, question, "", run_code)[1]
        if isinstance(question.gold, str):
            assert benchmarks.grade(task, question, question.gold)[1]


@pytest.mark.parametrize("task", SAMPLES)
def test_prompt_holds_the_question_and_asks_for_what_the_suffix_announces(task, tmp_path):
    name, rows, _, _ = SAMPLES[task]
    prompt = benchmarks.read_questions(task, write(tmp_path, name, rows))[0].prompt
    shown = {
        "mmlu": "Q, one?\n\nA) a\nB) b\nC) id\nD) d", "arc-challenge": "Which?\n\nA) p",
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


def test_ids_are_the_owners_and_a_file_may_be_gzipped(tmp_path):
    assert [q.id for q in benchmarks.read_questions("mbpp", write(tmp_path, "m.json", MBPP))] == ["2", "11", "511"]
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert [q.id for q in benchmarks.read_questions("humaneval", packed)] == ["HumanEval/0"]


GSM, PACKED = {"question": "Q", "answer": "#### 1"}, gzip.compress(json.dumps(HUMANEVAL).encode())
MATH = {"problem": "P", "answer": "1", "unique_id": "u"}
NO_ROWS = {  # rows that are none of the task's, each after a good one
    "gsm8k": (GSM, ["text", None, [], {}, MATH, {"question": "Q"}, {**GSM, "answer": "no mark"}, {**GSM, "answer": 5},
                    {**GSM, "answer": f"#### {'9' * 10**7}"}, *({**GSM, "question": text} for text in ("", None, ["Q"], "\ud800")),
                    {**GSM, "id": ""}, {**GSM, "id": ["i"]}]),
    "math500": (MATH, [GSM, MATH, {"problem": "P", "answer": 5}]),
    "arc-challenge": (ARC[0], [GSM, {**ARC[1], "answerKey": "D"}]),
    "winogrande": (SAMPLES["winogrande"][1][0], [GSM, *(
        {"sentence": "_", "option1": "a", "option2": "b", "answer": right} for right in ("0", "3", 1))]),
    "mmlu": (["q", "a", "b", "c", "d", "A"], [["q", "a", "b"], ["q", "a", "b", "c", "d", "E"], ["", "a", "b", "c", "d", "A"]]),
    "humaneval": (HUMANEVAL, [GSM, HUMANEVAL, *(
        {**HUMANEVAL, "task_id": "x", **change} for change in ({"entry_point": "other"}, {"test": None}))]),
    "mbpp": (MBPP[0], [MBPP[0], {**MBPP[1], "test_imports": None}, {**MBPP[1], "test_imports": [5]},
                       {**MBPP[1], "test_list": "assert f()"}, {**MBPP[1], "test_list": []}]),
    "countdown": ({"nums": [1, 2], "target": 3}, [GSM, {"input": "1,b,3", "output": "x"}, {"nums": None, "target": 5}]),
}  # fmt: skip


@pytest.mark.parametrize("task, good, bad", [(task, good, bad) for task, (good, rows) in NO_ROWS.items() for bad in rows])
def test_a_row_that_is_none_of_the_task_s_is_one_clear_line(task, good, bad, tmp_path):
    file = tmp_path / SAMPLES[task][0]
    lines = [json.dumps(row) for row in (good, bad)]
    write(tmp_path, file.name, [good, bad]) if file.suffix == ".csv" else file.write_text("\n".join(lines))
    assert refusal(task, file).startswith(f"{file}, row 2: no question for {task} (")


def refusal(task, file):
    with pytest.raises(ValueError) as caught:
        benchmarks.read_questions(task, file)
    message = str(caught.value)
    assert message.endswith(f"; give {benchmarks.BENCHMARKS[task].file}") and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("name, content, row", [
    ("gsm8k.jsonl", b"", None), ("gsm8k.jsonl", b"\n \n", None), ("mmlu-star.csv", b"q,a,b,c,d,A\n", None),
    ("gsm8k.jsonl", b"\x80\x04\xff\x00", 1), ("gsm8k.jsonl", b"PK\x03\x04\x00\x00", 1), ("gsm8k.csv", b"a,b,c\n", 1),
    ("gsm8k.jsonl", json.dumps(GSM).encode("utf-16"), 1), ("gsm8k.jsonl", b'{"question": "\xe9"}', 1),
    ("gsm8k.jsonl", json.dumps(GSM).encode() + b"\n" + b'{"question": "Q', 2), ("gsm8k.jsonl", b"x" * 10**7, 1),
    ("gsm8k.jsonl", b"[" * 100000, 1), ("gsm8k.jsonl", b'{"question": ' + b"[" * 100000, 1),
    ("mmlu.csv", b'q,a,b,c,d,A\n"q,a,b,c', 2), ("mmlu.jsonl", json.dumps(GSM).encode(), 1),
    ("humaneval.gz", PACKED[: len(PACKED) // 2], 1), ("humaneval.gz", PACKED[:-9], 1),
    ("mbpp.json", json.dumps(MBPP).encode()[:-9], 1), ("mmlu.nowhere", None, 1),
])  # fmt: skip
def test_a_malformed_file_is_one_clear_line(name, content, row, tmp_path):
    task, file = name.split(".")[0], tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert refusal(task, file).startswith(f"{file}, row {row}: no question" if row else f"{file}: no question")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_without_end_is_no_benchmark(packed, tmp_path):
    """Under a limit on memory: what is read of it is bounded."""
    source = tmp_path / "zeros.gz" if packed else "/dev/zero"
    if packed:
        source.write_bytes(gzip.compress(bytes(1 << 26)) * 32)  # 2 GiB in 2 MiB
    code = f"import eval, resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30,) * 2); eval.read_questions('gsm8k', '{source}')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"ValueError: {source}, row 1: no question for gsm8k (ValueError: over 67108864 bytes)" in done.stderr


def test_unknown_tasks():
    with pytest.raises(ValueError, match="no task 'gsm9k': choose one of mmlu, "):
        benchmarks.read_questions("gsm9k", "nowhere.jsonl")


def test_settings_are_the_papers():
    table = benchmarks.BENCHMARKS
    lengths = {128: ["mmlu", "mmlu-star", "arc-challenge", "winogrande"], 256: ["gsm8k", "countdown"],
               512: ["math500", "humaneval", "mbpp"]}  # fmt: skip
    assert {task: b.length for task, b in table.items()} == {task: n for n, tasks in lengths.items() for task in tasks}
    assert [task for task, b in table.items() if b.interval("token_change_count") == 16] == ["gsm8k", "math500"]
    assert [task for task, b in table.items() if b.answer_window] == ["humaneval", "mbpp"]
    for b in table.values():
        assert b.interval("top1_probability") == b.interval("negative_entropy") == 16 and b.answer_length < b.length
        assert len(b.table_3) == len(benchmarks.TABLE_3) and len(b.table_4) in (0, len(benchmarks.TABLE_4))
    assert dict(zip(benchmarks.TABLE_3, table["gsm8k"].table_3))["tie token_change_count"] == 83.47


# ---- answers


@given(st.sampled_from("ABCDE"), st.sampled_from([
    "{}", " {}.", "({})", "**{}**", "{}) because A is not", "$\\boxed{{{}}}$", "\\boxed{{\\text{{{}}}}}", "The answer is {}.",
    "Option {}: iron", "\n{}\n", "\\text{{({})}}", "the correct answer is **({})**", "`{}`", "{}. Dogs bark",
    "\\(\\mathbf{{{}}}\\)",
]))  # fmt: skip
def test_a_dressed_letter_is_found(letter, dress):
    assert benchmarks.extract_letter(dress.format(letter)) == letter
    if dress in ("{}", "({})", "**{}**"):
        assert benchmarks.extract_letter(dress.format(letter.lower())) == letter


@settings(max_examples=25)
@given(st.integers(-(10**7), 10**7), st.sampled_from([
    "{:,}", "${:,}.00", "{} dollars", "**{}**", "{}.", "\\boxed{{{:,}}}", "The answer is {}", "3 + 4 = {}", "\\(x = {}\\)",
    "{:,} cm^2", "\\${:,}\n99",
]))  # fmt: skip
def test_a_dressed_number_is_found(number, dress):
    text = dress.format(number)
    assert benchmarks.math_equal(benchmarks.extract_number(text), str(number))
    assert not benchmarks.math_equal(benchmarks.extract_number(text), str(number + 1))


EQUAL = [
    ("\\frac{14}{3}", "14/3"), ("\\frac43", "\\dfrac{4}{3}"), ("\\frac{1}{2}", "0.5"), ("1\\frac{4}{5}", "9/5"),
    ("10,\\!080", "10080"), ("\\$32,\\!348", "$32,348"), ("90^\\circ", "90"), ("50\\%", "50"), ("5.4 \\text{ cents}", "5.4"),
    ("\\text{east}", "East"), ("\\text{(C)}", "C"), ("x=5", "5"), ("x \\in [-2,7]", "[-2, 7]"), ("3, 5, 7", "7,3,5"),
    ("1 \\pm \\sqrt{19}", "1 - \\sqrt{19}, 1 + \\sqrt{19}"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("6 - 5i", "-5i+6"), ("(a+5)(b+2)", "ab+2a+5b+10"), ("(0,9) \\cup (9,36)", "(9,36) \\cup (0,9)"), ("5", "so it is $5$"),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\end{bmatrix}"),
]
UNEQUAL = [
    ("\\frac{14}{3}", "4.67"), ("\\frac43", "3/4"), ("10080", "10,81"), ("(3,4]", "[3,4]"), ("(1,2)", "(2,1)"), ("1,-2", "1"),
    ("6 - 5i", "6 + 5i"), ("\\text{east}", "west"), ("\\text{(C)}", "B"), ("x^2", "2x"), ("\\pi", "3.14159"), ("5", ""),
    ("5", "\\boxed{}"), ("0", "1/0"), ("10000000001", "10000000002"), ("\\frac{1}{2}", "\\frac{1}{2}x"), ("9", "9^9^9^9"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_math_answers_of_equal_value(gold, answer):
    assert benchmarks.math_equal(answer, gold) and benchmarks.math_equal(gold, answer)


@pytest.mark.parametrize("gold, answer", UNEQUAL)
def test_math_answers_of_unequal_value(gold, answer):
    assert not benchmarks.math_equal(answer, gold)


@pytest.mark.parametrize("kind, text, answer", [
    *[("letter", text, "") for text in ("", "Dogs", "42", "FALSE", "It's cold")],
    ("math", "\\boxed{\\frac{\\sqrt{3}}{2}} so", "\\frac{\\sqrt{3}}{2}"), ("math", "$$\n\\frac{1}{2}\n$$", "\\frac{1}{2}"),
    ("math", " \\(2x\\)\nDone", "2x"), ("math", "**7**", "7"), ("math", "The final answer is: $12$.", "$12$."),
    ("math", "\\[\n\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}\n\\]", "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"),
    ("code", "\n    return 1\n```\nThis returns 1.\n```", "    return 1"),  # its indentation stays
    ("code", "```python\ndef f():\n    return 1\n", "def f():\n    return 1"),
])  # fmt: skip
def test_extraction(kind, text, answer):
    assert getattr(benchmarks, f"extract_{kind}")(text) == answer


PIECES = [
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "9", "99", "*", "**", "/", "-", "x", "i", "\\pi", ",", " ", ".",
    "=", "\\cup", "\\pm", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\\text{a}", "%", "0", "log", "\\{", "\\}", "_", "$",
]


@settings(deadline=60_000, max_examples=100)
@given(st.text(max_size=400) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_no_text_breaks_or_hangs_the_graders(text):
    assert all(isinstance(benchmark.extract(text), str) for benchmark in benchmarks.BENCHMARKS.values())
    assert benchmarks.math_equal(text, "5") in (True, False)
    assert benchmarks.countdown_correct(text, {"numbers": [9, 9], "target": 1}) in (True, False)
    assert benchmarks.math_equal("5", "5")  # the next answer is graded as if nothing had been


@pytest.mark.parametrize(
    "text",
    ["9^9^9^9", "9" * 300 + "^" + "9" * 300, "99999999!", "(" * 999, "((9^99)^99)^99^99", "1" + "^9" * 140, "-" * 299 + "1",
     "9" * 10**6, "(" * 10**6 + ")" * 10**6, "10^{10^{10^{10}}}", "9**9**9**9"],
)  # fmt: skip
def test_answers_that_hang_or_swell_are_wrong_in_bounded_time_and_memory(text, monkeypatch):
    monkeypatch.setattr(benchmarks, "_GRADER", benchmarks._GRADER.replace("alarm(5)", "alarm(1)"))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not benchmarks.math_equal(text, "5")
    assert not benchmarks.countdown_correct(text, {"numbers": [9, 9], "target": 1})
    assert benchmarks.math_equal("5", "5.0")
    assert time.monotonic() - start < 60  # a bound on hanging, far above the grader's own, of which it takes one here
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_the_grader_of_mathematics_ends_with_its_parent():
    code = "import eval, time; eval.math_equal('1', '1'); print(eval._grader().pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: not alive(pid))


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
@given(countdowns(), st.randoms(use_true_random=False),
       st.sampled_from(["{}", "{} = 7", "\\({}\\)", "7 = {}", "**{}**.", "$\\boxed{{{}}}$"]))  # fmt: skip
def test_countdown_takes_each_number_once_in_any_order(case, dice, dress):
    numbers, (value, expression) = case
    gold = {"numbers": dice.sample(numbers, len(numbers)), "target": value}
    latex = expression.replace("*", " \\times ").replace("/", " \\div ")
    for form in (expression, expression[1:-1], latex, expression.replace("*", "×")):
        assert benchmarks.countdown_correct(benchmarks.extract_math(dress.format(form)), gold)
    assert not benchmarks.countdown_correct(expression, {**gold, "target": value + 1})
    assert not benchmarks.countdown_correct(expression, {**gold, "numbers": numbers + [1]})
    assert not benchmarks.countdown_correct(expression, {**gold, "numbers": numbers[1:]})


@pytest.mark.parametrize("answer, target", [
    *[(answer, 24) for answer in (
        "24", "2*3*4+1-1", "23+1", "(2*3)4", "2 3*4", "2**3*4", "4!", "6*4", "2*3*(4/0)", "__import__('os')", "2*3*x", "2*12",
        "", "2*3*4//1", "2_*3*4", "0x2*3*4", "2()*3*4", "(2)(3)*4", "2*3*4+()")],
    ("2**3*4", 32), ("2* *3*4", 32), ("3*4//2", 6), ("4%3+2", 3), ("2<<3+4", 256), ("(2,3*4)", 12),
])  # fmt: skip
def test_countdown_has_four_operations_and_its_numbers_alone(answer, target):
    assert not benchmarks.countdown_correct(answer, {"numbers": [2, 3, 4], "target": target})


# ---- running code


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def run(*sources, timeout=1.5, **more):
    return benchmarks.run_code(*sources, timeout=timeout, memory=1 << 28, **more)


def test_code_is_not_run_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "run_code", lambda *sources, **_: pytest.fail("code was run"))
    question = benchmarks.read_questions("humaneval", write(tmp_path, "h.jsonl", [HUMANEVAL]))[0]
    with pytest.raises(ValueError, match="--run-code"):
        benchmarks.grade("humaneval", question, "def total(x): return sum(x)")


def test_without_bubblewrap_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install bubblewrap.*--run-code unconfined"):
        benchmarks.run_code("pass")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: no new namespace >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    benchmarks.check_sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"cannot confine here \(bwrap: no new namespace\): allow user namespaces"):
        benchmarks.check_sandbox(True)
    benchmarks.check_sandbox.cache_clear()


@pytest.mark.parametrize("answer", [
    "    return sum(x)", "return sum(x)", "total = sum",
    "def helper(x):\n    return sum(x)\ndef total(x: List[int]):\n    return helper(x)",
    "from __future__ import annotations\ndef total(x: Later) -> int:\n    return sum(x)\nclass Later: pass",
])  # fmt: skip
@pytest.mark.parametrize("confined", CONFINED)
def test_humaneval_takes_whole_functions_and_continuations(answer, confined, tmp_path):
    question = benchmarks.read_questions("humaneval", write(tmp_path, "h.jsonl", [HUMANEVAL]))[0]
    run_code = "confined" if confined else "unconfined"
    assert benchmarks.grade("humaneval", question, answer + "\n```", run_code)[1]


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
}


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_run(name, confined):
    assert benchmarks.run_code(ORDINARY[name], "assert True", timeout=20, confined=confined)
    assert not benchmarks.run_code(ORDINARY[name], "assert False", timeout=20, confined=confined)


FAILURES = {
    "endless loop": "while True: pass", "sleep": "import time; time.sleep(60)", "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)", "SystemExit": "raise SystemExit", "stdin": "input()", "syntax": "def f(",
    "kill itself": "import os; os.kill(os.getpid(), 9)", "memory bomb": "x = bytearray(10 ** 10)",
    "growing memory": "x = []\nwhile True: x.append(bytearray(10 ** 7))", "NUL": "\0", "surrogate": "x = '\ud800'",
    "huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(10 ** 6)); f.flush()",
    "flood": "while True: print('x' * 10 ** 5)", "flood of errors": "import os\nwhile True: os.write(2, b'x' * 10 ** 5)",
    "recursion": "def f(): f()\nf()", "closed": "import os; os.closerange(0, 64)", "unclosed string": "x = '''",
    "swallowed": "import sys\nsys.settrace(None)\nraise KeyboardInterrupt",
    "nested folders": "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')\nassert False",
    "junk on every pipe": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
}


@pytest.mark.parametrize("confined", CONFINED)
@pytest.mark.parametrize("name", FAILURES)
def test_mischief_fails_and_harms_nothing(name, confined, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.tempfile, "tempdir", str(tmp_path))
    before, start = os.listdir("/proc/self/fd"), time.monotonic()
    try:
        assert not run(FAILURES[name], "pass", confined=confined)
        assert time.monotonic() - start < 30  # the limit of 1.5 s ended it
        assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert os.listdir(tmp_path) == [] or name == "nested folders" and not confined
    finally:
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


REFUSED = {  # each is an assertion about what a confined program sees, or what it cannot do
    "network": "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: pass\nelse: assert False",
    "interfaces": "import socket\nassert [name for _, name in socket.if_nameindex()] in (['lo'], [])",
    "files outside": "import os\nassert not os.path.exists({file!r}) and not os.path.exists({root!r} + '/eval.py')\n"
    "assert not os.path.exists('/etc/passwd') and not os.path.exists('/home')",
    "its environment": "import os\nassert {{*os.environ}} <= {{'PWD', 'LC_CTYPE', 'OPENBLAS_NUM_THREADS'}}",
    "environments of others": "import glob\nfor path in glob.glob('/proc/*/environ'):\n"
    "    try: assert b'TIE_SECRET' not in open(path, 'rb').read()\n    except PermissionError: pass",
    "other processes": "import os\nassert all(int(pid) < 10 for pid in os.listdir('/proc') if pid.isdigit())",
    "kill the parent": "import os\nfor pid in ({pid}, os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: pass\n"
    "    else: assert False",
    "system": "import os, sys\nfor folder in ('/', '/usr', '/dev', '/etc', sys.prefix, os.path.dirname(os.__file__)):\n"
    "    try: open(folder + '/x', 'w')\n    except OSError: pass\n    else: assert False, folder",
    "root": "import os\nassert os.getuid() != 0 or open('/proc/self/uid_map').read().split()[:2] != ['0', '0']",
    "full /tmp": "import errno\ntry:\n    for i in range(100): open(f'/tmp/{{i}}', 'wb').write(bytes(10 ** 6))\n"
    "except OSError as e: assert e.errno == errno.ENOSPC\nelse: assert False",
    "full /dev/shm": "import errno\ntry:\n    for i in range(99): open(f'/dev/shm/{{i}}', 'wb').write(bytes(10 ** 6))\n"
    "except OSError as e: assert e.errno == errno.ENOSPC\nelse: assert False",
    "fork": "import os\ntry: os.fork()\nexcept OSError: pass\nelse: assert False",
    "fork below Python": "import ctypes\nassert ctypes.CDLL(None).fork() == -1",
    "threads": "import threading\ntry: threading.Thread(target=print).start()\nexcept RuntimeError: pass\nelse: assert False",
    "subprocess": "import subprocess\ntry: subprocess.run(['true'])\nexcept OSError: pass\nelse: assert False",
    "memory": "try: bytearray(1 << 29)\nexcept MemoryError: pass\nelse: assert False",
    "the token": "import sys, re, gc\nframe, seen = sys._getframe(), ''\n"
    "while frame: seen += repr((frame.f_locals, frame.f_globals)); frame = frame.f_back\n"
    "assert not re.search('[0-9a-f]{{32}}', seen)",
}


@needs_bwrap
@pytest.mark.parametrize("name", REFUSED)
def test_a_confined_program_reaches_nothing(name, tmp_path, monkeypatch):
    """Through to the end: what each program asserts of its place is so."""
    import socket

    monkeypatch.setenv("TIE_SECRET", "x")
    (tmp_path / "file").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = REFUSED[name].format(port=server.getsockname()[1], file=str(tmp_path / "file"), root=str(ROOT), pid=os.getpid())
        assert run(source, "pass", timeout=20)


@pytest.mark.parametrize("confined", CONFINED)
def test_memory_is_limited(confined):
    assert benchmarks.run_code("x = bytearray(1 << 28)", timeout=20, memory=1 << 30, confined=confined)
    assert not benchmarks.run_code("x = bytearray(1 << 28)", timeout=20, memory=1 << 28, confined=confined)


@needs_bwrap
def test_no_process_survives_the_evaluation(tmp_path):
    """The evaluation is killed while a program runs: nothing of its sandbox is left."""
    mark = f"{time.time()}"
    code = f"import eval; eval.run_code('import time; time.sleep(300) # {mark}', timeout=300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        wait_for(lambda: len(children(parent.pid)) >= 2)
        left = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, left)))


def children(pid):
    """Processes below this one."""
    below = [int(name) for name in os.listdir("/proc") if name.isdigit() and parent_of(name) == pid]
    return below + [deeper for child in below for deeper in children(child)]


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


@needs_bwrap
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_than_root_is_confined_too(tmp_path):
    """With the system's interpreter, which every user can read."""
    if not (python := shutil.which("python3", path="/usr/bin:/bin")):
        pytest.skip("no interpreter in /usr/bin")
    nobody = pwd.getpwnam("nobody")
    script = tmp_path / "script.py"
    source = (ROOT / "eval.py").read_text()
    start, end = source.index("_PYTHON ="), source.index("@functools.cache\ndef check_sandbox")
    script.write_text(
        "import sys, os, shutil, math, json, tempfile, subprocess, signal\nfrom pathlib import Path\n"
        f"from contextlib import suppress\n{source[start:end]}\n"
        "assert run_code('import os; assert os.getuid() != 0', timeout=20) and not run_code('import os; os.fork()', timeout=20)\n"
        "for file in ('/x', '/dev/x'): assert not run_code(f'open({file!r}, \"w\")', timeout=20)\n"
        "assert run_code('open(\"/tmp/x\", \"w\")', timeout=20)"
    )
    os.chmod(tmp_path, 0o755)
    for folder in tmp_path.parents:
        if folder != Path("/") and folder != Path("/tmp"):
            os.chmod(folder, folder.stat().st_mode | 0o055)
    done = subprocess.run([python, str(script)], user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/",
                          capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})  # fmt: skip
    if "No permissions to create" in done.stderr or "user namespace" in done.stderr:
        pytest.skip(done.stderr[-200:])
    assert done.returncode == 0, done.stderr
