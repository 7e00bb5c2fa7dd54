"""The paper's nine benchmarks: their questions, prompts, settings and grading. Needs neither torch nor a model.

    questions = load("gsm8k", "test.jsonl")
    answer, right = grade("gsm8k", questions[0], text_of_the_answer_region)

Each benchmark is one class: the file it is published in, its prompt, lengths, extraction, grading and the paper's figures.
"""

from __future__ import annotations

import csv
import faulthandler
import functools
import gzip
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

# --- the text of an answer -----------------------------------------------------------------------

BRACES = (
    r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # with braces inside, three deep
)


def bare(text: str) -> str:
    """Return the answer without \\boxed{}, math delimiters, Markdown and "The answer is"."""
    boxed = re.search(r"\\boxed\s*" + BRACES, text)
    text = re.sub(r"(?<!\\)\\[()\[\]]|\$\$|\*\*|`", " ", boxed[1] if boxed else text).strip()
    words = r"(?i)^(?:\W*\b(?:so|thus|the|final|correct|answer|option|choice|is)\b[\s:,]*)+"
    return re.sub(words, "", text).strip()


def first_line(text: str) -> str:
    """Return the first line of the bare answer, or the first matrix even if it takes several."""
    text = bare(text)
    matrix = re.match(r"[^\n]*?\\begin\{(\w+)\}.*?\\end\{\1\}", text, re.DOTALL)
    return matrix[0] if matrix else text.split("\n")[0].strip()


# --- mathematics ---------------------------------------------------------------------------------


def math_equal(answer: str, gold: str) -> bool:
    """Return whether math-verify finds two answers, plain or LaTeX, equal.

    They can be values, tuples, intervals, matrices or sets. math-verify compares to 6 digits and ignores number bases:
    42_5 equals 42_6. An answer that is empty, longer than 1,000 characters, or takes over 5 seconds or 2 GiB is wrong.
    ValueError if math-verify doesn't start.
    """
    if not 0 < len(answer) <= 1000:
        return False
    grader = _grader()
    verdict = ""
    with suppress(BrokenPipeError):
        print(json.dumps([gold, answer]), file=grader.stdin, flush=True)
        verdict = grader.stdout.readline()
    if not verdict:  # this answer ended the grader, so the next answer starts another
        grader.wait()
        _grader.cache_clear()
    return verdict == "True\n"


@functools.cache
def _grader() -> Any:
    """Start this file as a process of its own: an answer like 9^{9^{9^9}} hangs or exhausts memory there, not here."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
    if process.stdout.readline() != "ready\n":
        error = process.stderr.read().strip().split("\n")[-1]
        raise ValueError(f"cannot grade mathematics ({error}): pip install math-verify")
    return process


def _grade_from_stdin() -> None:
    """Answer each line [gold, answer] with True or False, and end when the other process closes stdin or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    _limit_memory(2 << 30)
    from math_verify import parse, verify

    verdicts = sys.stdout
    print("ready", file=verdicts, flush=True)
    with open(os.devnull, "w") as sys.stderr:
        sys.stdout = sys.stderr
        for line in sys.stdin:
            faulthandler.dump_traceback_later(
                5, exit=True
            )  # also within one long power, unlike Python's signals
            gold, answer = (
                text if re.search(r"(?<!\\)\$.+(?<!\\)\$", text) else f"${text}$"
                for text in json.loads(line)
            )
            parsed = (parse(text, parsing_timeout=None) for text in (gold, answer))
            print(verify(*parsed, timeout_seconds=None), file=verdicts, flush=True)
            faulthandler.cancel_dump_traceback_later()


def _limit_memory(most: int) -> None:
    """Limit this process's memory, in bytes, where the system can: Windows and macOS cannot."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))


# --- running code: only on request, and confined -------------------------------------------------

PYTHON = str(Path(sys.executable).parent.resolve() / Path(sys.executable).name)
# Reads the job from stdin, limits itself, runs the sources one after the other as one module, whose files are in the
# working directory, and writes the token last. The token is only on the interpreter's stack: no name leads to it.
# As in HumanEval's own harness the module is not `__main__`: what a program does when run as a script is not run.
RUNNER = r"""
import functools, json, os, resource, sys, types
def prepare():
    sources, token, limits, user = json.load(sys.stdin)
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    if user:  # the limit on processes doesn't hold for root
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    module = sys.modules["program"] = types.ModuleType("program")
    actions = []
    for number, source in enumerate(sources):
        module.__file__ = f"program{number}.py"
        with open(module.__file__, "w") as file:
            file.write(source)
        actions.append(functools.partial(exec, compile(source, module.__file__, "exec"), module.__dict__))
    return [*actions, functools.partial(os.write, result, token.encode())]
for action in prepare():
    action()
"""


def run_code(
    *sources: str, timeout: float = 10.0, memory: int = 1 << 30, confined: bool = True
) -> bool:
    """Return whether the Python `sources`, run one after the other as one module, all run through to their ends.

    They run in bubblewrap or, unconfined, in a temporary folder with the rights of the user: without environment or input,
    with their output discarded, and within limits of wall-clock and CPU time (seconds), memory (bytes), size of files and,
    except for root unconfined, processes. Success is a random token written last, so leaving early is failure; but a
    program made to cheat can find the token in its interpreter. ValueError without bubblewrap.
    """
    token = secrets.token_hex(16)
    limits = {"CPU": math.ceil(timeout), "AS": memory, "FSIZE": 1 << 20, "NPROC": 0, "NOFILE": 64, "CORE": 0}  # fmt: skip
    nobody = 65534 if confined and os.getuid() == 0 else None
    job = json.dumps([sources, token, limits, nobody]).encode()
    command = [*(_bubblewrap() if confined else []), PYTHON, "-I", "-B", "-c", RUNNER]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with (
        suppress(
            OSError, subprocess.TimeoutExpired, RecursionError
        ),  # nested folders are too deep to be removed
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            command, cwd=folder, env={"OPENBLAS_NUM_THREADS": "1"}, start_new_session=True, **pipes
        ) as process,
    ):
        os.set_blocking(process.stdout.fileno(), False)
        try:
            process.stdin.write(job)
            process.stdin.close()
            process.wait(timeout)
        finally:
            with suppress(OSError):  # none of its session is left
                os.killpg(process.pid, signal.SIGKILL)
        return os.read(process.stdout.fileno(), 64) == token.encode()
    return False


def _bubblewrap() -> list[str]:
    """Own processes, no network, the system and the interpreter read-only, a small empty /tmp, and nothing else."""
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise ValueError(
            "--run-code needs bwrap: apt-get install bubblewrap, or in a container --run-code unconfined"
        )
    rights = "--cap-add CAP_SETUID --cap-add CAP_SETGID" if os.getuid() == 0 else "--unshare-user"
    own = (
        "--unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --die-with-parent "
        "--chdir /tmp --proc /proc --dev /dev --perms 1777 --size 16777216 --tmpfs /tmp "
        "--perms 1777 --size 1048576 --tmpfs /dev/shm --remount-ro /dev"
    )
    system = []
    python = os.path.realpath(sys.base_prefix), os.path.realpath(sys.prefix)  # perhaps below /tmp
    for place in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", *python):
        for parent in reversed(Path(place).parents):
            system += ["--perms", "0755", "--dir", str(parent)]
        system += ["--ro-bind-try", place, place]
    return [bwrap, *rights.split(), *own.split(), *system, "--remount-ro", "/"]


@functools.cache
def check_sandbox(confined: bool) -> None:
    """Raise ValueError, with bubblewrap's own words, where code cannot be run."""
    command = [*(_bubblewrap() if confined else []), PYTHON, "-c", ""]
    tried = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    if tried.returncode or not run_code("import decimal", timeout=30, confined=confined):
        raise ValueError(
            f"--run-code cannot confine here ({tried.stderr.strip()[:200]}): allow user namespaces, "
            "update bubblewrap; in a container, --run-code unconfined"
        )


# --- the benchmarks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    prompt: str
    gold: Any  # a letter, number or LaTeX as text; {"numbers", "target"}; for code what its tests need


class Benchmark:
    """Settings of the paper (Sec. 5.1, App. A.4; lengths in tokens) and its figures in %."""

    data: str  # what `load` expects
    length: int  # generation length: reasoning + suffix + answer
    answer_length: int  # our decision, the paper is silent
    suffix = "\nAnswer:"
    answer_window: int | None = None
    tcc_interval = 32
    subjects = ""  # the files to read, of all that a folder has; empty for all
    runs_code = False
    table_3: tuple[float, ...]  # LLaDA, Dream, post-generation, TIE by each of the four scores
    table_4: tuple[float, ...] = ()  # DreamCoder, DiffuCoder, TIE by token change count and top-1

    def interval(self, score: str) -> int:
        """Return n, the steps between relays."""
        return self.tcc_interval if score == "token_change_count" else 16

    def parse(self, row: Any) -> tuple[str, Any]:
        """Return (prompt, gold) of one row in the owners' layout; any error says that it is laid out otherwise."""
        raise NotImplementedError

    def extract(self, text: str) -> str:
        """Return the answer in the text of an answer region."""
        raise NotImplementedError

    def correct(self, answer: str, gold: Any, confined: bool) -> bool:
        return answer == gold


# The prompts are our own words after simple-evals and, for Countdown, Wang et al. 2026; those for code are of App. A.3.
def _step_by_step(instruction: str, name: str, meaning: str) -> str:
    return (
        f"{instruction} Think step by step first, then give your final answer on a last line of the form "
        f"'Answer: {name}', where {name} {meaning}, and nothing after it."
    )


class MultipleChoice(Benchmark):
    length = 128
    answer_length = 16

    def ask(self, question: str, choices: list[str], right: int) -> tuple[str, str]:
        letters = "ABCDE"[: len(choices)]
        listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices))
        instruction = _step_by_step(
            "Answer the multiple choice question below.",
            "LETTER",
            f"is one of {', '.join(letters)}",
        )
        return f"{instruction}\n\n{question.strip()}\n\n{listed}", letters[right]

    def extract(self, text: str) -> str:
        """Return the first letter A to E that stands alone, "" if there is none."""
        text = re.sub(r"\\(?:text|mathbf|mathrm|textbf)\b", " ", bare(text))
        alone = r"(?<![A-Za-z'’])([A-E])(?![A-Za-z'’])"
        found = re.fullmatch(r"\W*([a-e])\W*", text) or re.search(alone, text)
        return found[1].upper() if found else ""


class MMLU(MultipleChoice):
    data = "MMLU's test csv (question, four choices, letter), or a folder of them"
    table_3 = (61.23, 67.46, 67.26, 67.55, 67.25, 67.53, 67.34)

    def parse(self, row: Any) -> tuple[str, str]:
        question, *choices, letter = row
        if len(choices) != 4:
            raise ValueError(f"expected 6 columns, got {len(row)}")
        return self.ask(question, choices, [*"ABCD"].index(letter))


class MMLUStar(MMLU):
    table_3 = (71.45, 77.37, 77.92, 78.12, 77.69, 78.12, 77.61)
    subjects = (  # App. A.1, the subjects on which both LLaDA and Dream are over 60 %
        "astronomy business_ethics clinical_knowledge college_biology college_medicine computer_security "
        "conceptual_physics elementary_mathematics high_school_biology high_school_computer_science "
        "high_school_european_history high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology high_school_us_history "
        "high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies "
        "management marketing medical_genetics miscellaneous nutrition philosophy prehistory public_relations "
        "security_studies sociology us_foreign_policy world_religions"
    )


class ARCChallenge(MultipleChoice):
    data = "ARC-Challenge-Test.jsonl (question: stem and choices, answerKey)"
    table_3 = (85.15, 86.69, 88.57, 89.16, 88.82, 88.57, 88.74)

    def parse(self, row: Any) -> tuple[str, str]:
        choices = row["question"]["choices"]
        labels = [
            choice["label"] for choice in choices
        ]  # letters or numbers; the prompt has letters
        texts = [choice["text"] for choice in choices]
        return self.ask(row["question"]["stem"], texts, labels.index(row["answerKey"]))


class WinoGrande(MultipleChoice):
    data = "WinoGrande's dev.jsonl (sentence, option1, option2, answer)"
    table_3 = (71.59, 72.22, 73.72, 72.85, 73.95, 71.90, 73.88)

    def parse(self, row: Any) -> tuple[str, str]:
        question = (
            f"Which choice belongs in the place of the _ in this sentence?\n{row['sentence']}"
        )
        return self.ask(question, [row["option1"], row["option2"]], [*"12"].index(row["answer"]))


class GSM8K(Benchmark):
    data = "GSM8K's test.jsonl (question, answer with ####)"
    length = 256
    answer_length = 16
    tcc_interval = 16
    table_3 = (78.77, 78.39, 80.29, 83.47, 82.71, 83.62, 82.56)

    def parse(self, row: Any) -> tuple[str, str]:
        instruction = _step_by_step(
            "Solve the mathematics problem below.", "NUMBER", "is the number alone"
        )
        number = Fraction(row["answer"].split("####")[1].strip().replace(",", ""))
        return f"{instruction}\n\n{row['question']}", str(number)

    def extract(self, text: str) -> str:
        """Return the first number of the first line that has one, after its last "="."""
        lines = [line for line in bare(text).splitlines() if re.search("[0-9]", line)]
        line = "".join(lines[:1]).split("=")[-1].replace("−", "-")
        line = re.sub(r"(?<=[0-9]),(?:\\!)?\s?(?=[0-9]{3}(?![0-9]))|\\?\$", "", line)
        found = re.search(r"-?\s?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", line)
        return found[0].replace(" ", "") if found else ""

    def correct(self, answer: str, gold: str, confined: bool) -> bool:
        return math_equal(answer, gold)


class MATH500(Benchmark):
    data = "MATH500's test.jsonl (problem, answer)"
    length = 512
    answer_length = 64
    tcc_interval = 16
    table_3 = (37.4, 48.0, 43.0, 48.6, 47.0, 45.2, 48.4)

    def parse(self, row: Any) -> tuple[str, str]:
        instruction = _step_by_step(
            "Solve the mathematics problem below.", "ANSWER", "is the value alone, in LaTeX"
        )
        if not isinstance(row["answer"], str):
            raise TypeError(f"answer must be a text, got {row['answer']!r:.80}")
        return f"{instruction}\n\n{row['problem']}", row["answer"]

    def extract(self, text: str) -> str:
        return first_line(text)

    def correct(self, answer: str, gold: str, confined: bool) -> bool:
        return math_equal(answer, gold)


class Code(Benchmark):
    length = 512
    answer_length = 480
    suffix = "```python\n"
    answer_window = 8
    runs_code = True

    def extract(self, text: str) -> str:
        """Return the code up to the closing fence; its indentation stays, since it may continue the prompt's function."""
        return re.sub(r"^\s*```(?:python|py)?[ \t]*\n", "", text).split("```")[0].strip("\n")


class HumanEval(Code):
    data = "HumanEval.jsonl, gzipped or not"
    table_3 = (45.73, 61.59, 55.49, 54.27, 57.32, 57.93, 57.32)
    table_4 = (72.56, 70.12, 72.56, 72.56)

    def parse(self, row: Any) -> tuple[str, dict]:
        gold = {key: row[key] for key in ("prompt", "entry_point", "test")}
        if f"def {gold['entry_point']}" not in gold["prompt"]:
            raise ValueError("the prompt doesn't define the entry point")
        prompt = (
            "Read the following function signature and docstring, and fully implement the function described. "
            f"Return only the Python function, no explanation.\n\n{gold['prompt']}"
        )
        return prompt, gold

    def correct(self, answer: str, gold: dict, confined: bool) -> bool:
        """Run the prompt's imports and helpers, the answer, the tests."""
        name = gold["entry_point"]
        helpers = gold["prompt"].split(f"def {name}")[0]
        if not re.search(
            rf"^(?:async +)?def +{name}\b|^{name} *=", answer, re.MULTILINE
        ):  # it continues the prompt
            answer = gold["prompt"] + (
                answer if answer[:1].isspace() else textwrap.indent(answer, "    ")
            )
        return run_code(helpers, answer, gold["test"], f"check({name})", confined=confined)


class MBPP(Code):
    # The paper's figures are multiples of 1/427: it runs all of sanitized MBPP, not the test split alone.
    data = "sanitized-mbpp.json"
    table_3 = (53.16, 63.23, 62.53, 64.17, 62.06, 62.76, 62.06)
    table_4 = (75.88, 72.60, 76.11, 76.58)

    def parse(self, row: Any) -> tuple[str, dict]:
        gold = {key: row[key] for key in ("test_imports", "test_list")}
        tests = "\n".join(gold["test_list"])
        prompt = (
            f"{row['prompt']} Your code should satisfy these tests:\n{tests}\n"
            "Return only the Python function, no explanation."
        )
        return prompt, gold

    def correct(self, answer: str, gold: dict, confined: bool) -> bool:
        return run_code(answer, *gold["test_imports"], *gold["test_list"], confined=confined)


class Countdown(Benchmark):
    data = "a Countdown jsonl (input and output, or nums and target)"
    length = 256
    answer_length = 32
    table_3 = (13.4, 16.4, 19.2, 18.8, 18.8, 19.4, 18.6)

    def parse(self, row: Any) -> tuple[str, dict]:
        if "nums" in row:
            numbers, target = row["nums"], row["target"]
        else:  # "15,44,79,50" of Dream ends in the target, which d1 has as its output
            numbers, target = row["input"].split(","), row["output"]
            target = target if target.isdigit() else numbers.pop()
        numbers = [int(number) for number in numbers]
        instruction = (
            f"Make an arithmetic expression with the value {int(target)} from the numbers {str(numbers)[1:-1]}. Use every "
            "number exactly once; the operations are + - * / and brackets are allowed."
        )
        prompt = _step_by_step(
            instruction, "EXPRESSION", "is the expression alone without an equals sign"
        )
        return prompt, {"numbers": numbers, "target": int(target)}

    def extract(self, text: str) -> str:
        return first_line(text)

    def correct(self, answer: str, gold: dict, confined: bool) -> bool:
        """Return whether one side of the answer uses each number exactly once, with + - * / only, and is the target."""
        for pattern, new in self.NOTATION:
            answer = re.sub(pattern, new, answer[:1000])
        return any(
            self.value(side, gold["numbers"]) == gold["target"] for side in answer.split("=")
        )

    NOTATION = (
        *[(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))")]
        * 3,  # fractions within fractions
        (r"\\(?:cdot|times)(?![a-z])|[×·⋅]", "*"),
        (r"\\div(?![a-z])|÷", "/"),
        (r"\\(?:left|right)(?![a-z])|\\?\$|\\[,;:! ]|\.\s*$", ""),
        (r"[−–]", "-"),
        (r"[\[{]", "("),
        (r"[\]}]", ")"),
    )

    def value(self, expression: str, numbers: list[int]) -> Fraction | None:
        """Return the exact value, None if it isn't an expression in + - * / with each number once."""
        used = sorted(map(int, re.findall("[0-9]+", expression)))
        allowed = r"(?:(?!\*\s*\*|/\s*/|\(\s*\)|,)[-+*/() 0-9])*"
        if used != sorted(numbers) or not re.fullmatch(allowed, expression):
            return None
        exact = re.sub("[0-9]+", lambda number: f"Fraction({int(number[0])})", expression.strip())
        with suppress(SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError):
            return eval(exact, {"Fraction": Fraction, "__builtins__": {}})
        return None


BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": MMLU(),
    "mmlu-star": MMLUStar(),
    "arc-challenge": ARCChallenge(),
    "winogrande": WinoGrande(),
    "gsm8k": GSM8K(),
    "math500": MATH500(),
    "humaneval": HumanEval(),
    "mbpp": MBPP(),
    "countdown": Countdown(),
}


def load(task: str, path: str | Path) -> list[Question]:
    """Return the questions of a task, a key of BENCHMARKS, from the owners' file. ValueError names file and row."""
    if task not in BENCHMARKS:
        raise ValueError(f"task must be one of {', '.join(BENCHMARKS)}, got {task!r}")
    benchmark = BENCHMARKS[task]
    path = Path(path)
    questions = dict[str, Question]()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        subject = re.sub(r"_(test|val|dev)$", "", file.stem)
        if benchmark.subjects and subject not in benchmark.subjects.split():
            continue
        before = len(questions)
        try:
            for count, row in enumerate(_rows(file)):
                prompt, gold = benchmark.parse(row)
                names = ("task_id", "unique_id", "id", "qID") if isinstance(row, dict) else ()
                counted = f"{subject if path.is_dir() else task}/{count}"  # a file may be renamed
                key = next((str(row[name]) for name in names if name in row), counted)
                if key in questions:
                    raise ValueError(f"{key} occurs twice")
                questions[key] = Question(key, prompt, gold)
        except Exception as error:  # of any kind: the file is laid out otherwise
            row_number = len(questions) - before + 1
            found = f"{type(error).__name__}: {error!s:.200}"
            raise ValueError(
                f"{file}, row {row_number}: expected {benchmark.data} ({found})"
            ) from error
    if not questions:
        raise ValueError(f"{path} must be {benchmark.data}, got no questions for {task}")
    return list(questions.values())


def _rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a csv, JSON or JSON lines file, gzipped or not."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    text = data.decode("utf-8-sig")
    if path.suffix == ".csv":
        yield from csv.reader(io.StringIO(text, newline=""), strict=True)
    elif text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())


def grade(
    task: str, question: Question, text: str, run_code: str | None = None
) -> tuple[str, bool]:
    """Return (answer, whether it is right) of the text of an answer region up to EOS.

    Code is run only where `run_code` is "confined" (in bubblewrap) or "unconfined". ValueError if a task needs it.
    """
    benchmark = BENCHMARKS[task]
    if benchmark.runs_code:
        if run_code not in ("confined", "unconfined"):
            raise ValueError(f"grading {task} runs the model's code: pass --run-code to allow it")
        check_sandbox(run_code == "confined")
    answer = benchmark.extract(text)
    return answer, benchmark.correct(answer, question.gold, run_code == "confined")


if __name__ == "__main__":
    _grade_from_stdin()
