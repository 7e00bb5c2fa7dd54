"""The paper's nine benchmarks: questions, prompts, settings, grading. Needs no torch, no model.

    questions = load("gsm8k", "test.jsonl")
    answer, right = grade("gsm8k", questions[0], text_of_the_answer_region)

Each benchmark is one class. It holds the published file's layout, the prompt, lengths, extraction,
grading and the paper's figures.
"""

from __future__ import annotations

import csv
import errno
import faulthandler
import functools
import gzip
import io
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

# --- the text of an answer: strip the formatting, then rewrite it into LaTeX ---------------------

INSIDE = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*"  # inside braces, with braces up to three deep
BOX = rf"\\?\b(?:boxed|fbox)\s*\{{{INSIDE}\}}"
FORMULA = r"\\\(.*?\\\)"
LINK = r"(?:[\s,;$]|\\[()\[\]]|\b(?:and|or)\b)*"  # between two boxes or formulas of one list
END = r"(?<!\\)[\s.,;:!]+(?=\s*\\\)|$)"  # of a sentence, also within a formula, but not \! and \,
WORDS = (
    "so|thus|hence|therefore|then|the|our|we|get|have|it|this|final|correct|answer|result|solution|"
    "value|expression|number|is|are|equals?|would|be"
)
LEAD = (  # "So the answer is", "Expression:", "The area is", "="
    r"(?i)^\s*(?:[\s*_:=,.>#-]*(?:\\text\{\s*)?(?<!\\)\b"
    rf"(?:(?:{WORDS})\b|[^\W\d_](?:[^\W\d_]| )*(?:\b(?:is|are)\b|(?=[:：]))))+[\s:：=,*_}}]*|^[\s:=#*]+"
)
UNIT = (  # or a remark, at the end: "5 cm^2", "5\text{ apples}", "5 (each)"
    r"(?:(?<=[\d})])|(?<=\\pi))(?:\s*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}|\s+\([a-z]{3,}[^()\\]*\)|"
    r"\s+(?!(?:and|or)\b)(?:[a-z]{3,}|ft|cm|mm|km|in|kg|lbs?|oz|hrs?|mi|yd|m|g|s|L|sq\.?)"
    r"(?:[\s/][a-z]+)*\.?)(?:\^\{?\d\}?)?[\s=]*$"
)
DRESSING = (
    (r"(?<![\\\d])\$\$(.*?)\$\$|(?<!\\)\\\[(.*?)\\\]", r"\\(\1\2\\)"),
    (r"(?<![\\$])\$(?=\S)((?:\\\$|[^$\n])*?(?<=\S))\$(?!\d)", r"\\(\1\\)"),  # not $5 and $6
    (rf"\\(?:text(?:bf|it)|mathbf|boldsymbol|underline)\s*\{{({INSIDE})\}}", r"\1"),
    (r"(?<![\w)}\]*])(\*\*?)(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w*])", r"\2"),  # not x**2
    (r"</\w+>|<\w{2,}>|<\|.*?\|>|[`\"“”]|^\s*['‘]|['’](?=[\s.]*$)", " "),  # tags and quotes
    (LEAD, ""),
)  # fmt: skip
NOTATION = (
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|°|º|\\degree)(?:\s*[CF]\b)?", ""),
    (r"[⁰¹²³⁴-⁹⁻ⁿ]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"[¼-¾⅐-⅞]", r" \g<0>"),
    (r"(?s).+", lambda text: unicodedata.normalize("NFKC", text[0])),  # ½ into 1⁄2, a thin space into a space
    (r"[−–—‐‑]", "-"),
    (r"[×·⋅∙•∗✕✖⨉]|\\\*|\\(?:times|cdot|ast)(?![a-z])", "*"),
    (r"\*\*", "^"),
    (r"\^\s*(-\d+)", r"^{\1}"),
    (r"[÷⁄]|\\div(?![a-z])", "/"),
    (r"\+/-|\+-(?=[\s\\])", r"\\pm "),
    (r"√", r"\\sqrt"),
    (r"(?<![\\A-Za-z])(sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log)(?![A-Za-z])", r"\\\1"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d+(?:\.\d+)?|[a-z])", r"\\sqrt{\1}"),
    (r"π|(?<![\\A-Za-z])(?i:pi)(?![A-Za-z])", r"\\pi "),
    (r"∞|(?<![\\A-Za-z])inf(?:ini)?ty(?![A-Za-z])", r"\\infty "),
    (r"∪|\\bigcup|(?<=[\])}])\s*(?:U|union)\s*(?=[\[(\\])", r"\\cup "),  # (0,9) U (9,36)
    (r"∈|(?<=[a-zA-Z]) in (?=[\[({\\])", r"\\in "),
    (r"(?<![\\a-z])exp\s*\(([^()]*)\)", r"e^{\1}"),
    (r"\\[bB]igg?[lr]?(?![a-z])|\\?[$€£₹]|(?<!\\)\\[()]|(?<=\\\\)\[\w*\]", " "),  # also the [2pt] of a matrix
    (r"\{,\}|,\\!\s*", ","),  # 10{,}080
    (r"(?<=\d)(?:(?<!\\)\\[,!;: ]|[~'’])(?=\d{3}(?!\d))", ""),  # 10\,080 and 10'080
    (r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![a-z])", " "),
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)", lambda number: number[0].replace(" ", "")),  # 10 080
    (r"\\[lc]dots|\.{3}", r"\\dots "),  # math-verify would leave \ldots out
    (r"\\[dtc]frac", r"\\frac"),
    (r"(?<![\d./}])(\d+)\s+(\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\\(?:mathrm|text|mathit|rm|operatorname)\s*\{\s*([ei])\s*\}", r" \1 "),
    (r"\\imath|(?<![A-Za-z\\])i(?![A-Za-z])", " i "),  # alone, for math-verify to see that it is imaginary
    (r"(?<=\d)\s*(?:\\text\{\s*)?thousand\}?", "*10^{3}"),
    (r"(?<=\d)\s*(?:\\text\{\s*)?million\}?", "*10^{6}"),
    (r"(?<=\d)\s*(?:\\text\{\s*)?billion\}?", "*10^{9}"),
    (UNIT, ""),
)  # fmt: skip


def unboxed(text: str) -> str:
    """Return the content of the last box, or of the last boxes in a row as a list. Without a box,
    return the text."""
    text = re.sub(r"\\?\b(?:boxed|fbox)\s*\{\s*(?:\}|$)", " ", text[:2000])  # empty ones
    cut_off = "}" * (text.count("{") - text.count("}"))  # a box that the region's end cuts off
    rows = re.findall(f"{BOX}(?:{LINK}{BOX})*", text + cut_off)
    if not rows:
        return text
    return ", ".join(box[box.index("{") + 1 : -1] for box in re.findall(BOX, rows[-1]))


def sentences(text: str) -> list[str]:
    """Return an answer's sentences and lines without boxes, Markdown and "The answer is", and with
    formulas in \\( \\)."""
    text = unboxed(text)
    for pattern, new in DRESSING:
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    in_one_line = FORMULA + r"|\\begin\{(\w+)\}.*?\\end\{\1\}"
    text = re.sub(in_one_line, lambda part: " ".join(part[0].split()), text, flags=re.DOTALL)
    parts = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z(])", text)
    return [re.sub(END, "", part).strip() for part in parts if part.strip()]


def latex(text: str) -> str:
    """Rewrite what people write, like 3½, √(2) and 2*pi cm, into LaTeX."""
    for pattern, new in NOTATION:
        text = re.sub(pattern, new, text)
    return text.strip(" =")


def formula(text: str) -> str:
    """Return the value that an answer gives, in LaTeX. In prose, that is its formula."""
    text = "".join(sentences(text)[:1])
    text = re.sub(r"(?<=[^\s,])[\s,(]+(?:because|since|which|where|as|so)\b.*", "", text)
    rows = re.findall(f"{FORMULA}(?:{LINK}{FORMULA})*", text)
    if rows and re.search("[A-Za-z]{2}", re.sub(FORMULA, " ", text)):
        row = rows[0] if text.startswith(r"\(") else rows[-1]
        text = re.sub(rf"\\\){LINK}\\\(", ", ", row)
    text = latex(text)
    words = re.fullmatch(r"[A-Za-z]{3,}|[A-Za-z]{2,}(?: [A-Za-z]+)+", text)
    return rf"\text{{{text}}}" if words else text


# --- mathematics ---------------------------------------------------------------------------------


def math_equal(answer: str, gold: str) -> bool:
    """Return whether two answers, plain or LaTeX, are equal: exactly as decimals, otherwise by
    math-verify.

    math-verify takes values, tuples, intervals, matrices and sets, and compares to 6 digits. An
    answer that is empty, longer than 1,000 characters, or takes over 5 seconds or 2 GiB is wrong.
    ValueError if math-verify doesn't start.
    """
    pair = [formula(gold), formula(answer)]
    if not 0 < len(pair[1]) <= 1000:
        return False
    if all(re.fullmatch(r"-?\d*\.?\d+", text) for text in pair):
        return Fraction(pair[0]) == Fraction(pair[1])
    bases = re.findall(r"\d_\{?(\d+)", " ".join(pair))
    if len(set(bases)) > 1:  # math-verify ignores number bases
        return False
    grader = _grader()
    verdict = ""
    with suppress(BrokenPipeError):
        print(json.dumps(pair), file=grader.stdin, flush=True)
        verdict = grader.stdout.readline()
    if not verdict:  # this answer ended the grader, so the next answer starts another
        grader.wait()
        _grader.cache_clear()
    return verdict == "True\n"


@functools.cache
def _grader() -> Any:
    """Start this file as a process of its own: an answer like 9^{9^{9^9}} hangs or exhausts memory
    there, not here."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
    if process.stdout.readline() != "ready\n":
        error = process.stderr.read().strip().split("\n")[-1]
        raise ValueError(f"cannot grade mathematics ({error}): pip install math-verify")
    return process


def _grade_from_stdin() -> None:
    """Answer each line [gold, answer] with True or False. Exits when the parent closes stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with suppress(ImportError, ValueError, OSError):  # Windows and macOS cannot limit memory
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    from math_verify import LatexExtractionConfig, parse, verify

    config = LatexExtractionConfig()
    as_it_is = replace(config.normalization_config, units=False)
    configs = [replace(config, normalization_config=as_it_is)]
    verdicts = sys.stdout
    print("ready", file=verdicts, flush=True)
    with open(os.devnull, "w") as sys.stderr:
        sys.stdout = sys.stderr
        for line in sys.stdin:
            # Also ends this process during one long operation, where Python's signals would wait.
            faulthandler.dump_traceback_later(5, exit=True)
            pair = json.loads(line)
            parsed = [parse(f"${text}$", configs, parsing_timeout=None) for text in pair]
            equal = verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None)
            print(equal, file=verdicts, flush=True)
            faulthandler.cancel_dump_traceback_later()


# --- running code: only on request, and confined -------------------------------------------------

PYTHON = str(Path(sys.executable).parent.resolve() / Path(sys.executable).name)
# Reads the job from stdin, limits itself, runs the sources one after the other as one module, whose
# files are in the working directory, and writes the token last. No variable that the sources can
# reach by name holds the token. As in HumanEval's own harness, the module isn't `__main__`, so what
# a program does under `if __name__ == "__main__"` isn't run.
RUNNER = r"""
import contextlib, ctypes, functools, json, os, resource, struct, sys, types
def prepare():
    sources, token, limits, rules, user = json.load(sys.stdin)
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    if user:  # the limit on processes doesn't hold for root
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS refuses AS
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    if rules:
        instructions = ctypes.create_string_buffer(bytes.fromhex(rules))
        program = struct.pack("HP", len(rules) // 16, ctypes.addressof(instructions))
        for option in ((38, 1, 0, 0, 0), (22, 2, program)):  # no new privileges, and the filter
            assert ctypes.CDLL(None).prctl(*option) == 0
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

# What bubblewrap leaves open: keys of the caller's session, memory that RLIMIT_AS doesn't count,
# other parts of the kernel, and new processes (but not threads). The numbers are those of x86-64
# and of 64-bit ARM, which has no fork.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
SYSTEM_CALLS = """
    add_key 248 217, request_key 249 218, keyctl 250 219, shmget 29 194, msgget 68 186, semget 64 190, unshare 272 97,
    setns 308 268, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, userfaultfd 323 282,
    bpf 321 280, perf_event_open 298 241, ptrace 101 117, fork 57 -1, vfork 58 -1, clone3 435 435, clone 56 220, socket 41 198
"""


def _seccomp() -> bytes:
    """Return a filter, as classic BPF, that refuses SYSTEM_CALLS except for threads and for sockets
    of UNIX and INET.

    It is empty on systems other than Linux on x86-64 and 64-bit ARM.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return b""
    column, architecture = MACHINES[platform.machine()]
    names = [entry.split() for entry in SYSTEM_CALLS.split(",")]
    *refused, clone3, clone, socket = [int(numbers[column]) for _, *numbers in names]
    load, equal, least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse = (give, 0, 0, 0x50000 | errno.EPERM)
    allow = (give, 0, 0, 0x7FFF0000)
    rows = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), refuse,
        (load, 0, 0, 0), (least, 0, 1, 1 << 30), refuse,  # x86-64's second numbering
        *[row for number in refused if number >= 0 for row in ((equal, 0, 1, number), refuse)],
        (equal, 0, 1, clone3), (give, 0, 0, 0x50000 | errno.ENOSYS),  # libc then uses clone, whose flags can be read
        (equal, 0, 4, clone), (load, 0, 0, 16), (bits, 1, 0, 0x10000), refuse, allow,  # CLONE_THREAD
        (equal, 0, 3, socket), (load, 0, 0, 16), (least, 0, 1, 3), refuse,  # families above INET
        allow,
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *row) for row in rows)


def run_code(
    *sources: str, timeout: float = 10.0, memory: int = 1 << 30, confined: bool = True
) -> bool:
    """Return whether the Python `sources`, run one after the other as one module, all run to their
    ends.

    They run in bubblewrap or, unconfined, in a temporary folder with the rights of the user:
    without environment or input, with their output discarded, and within limits of wall-clock and
    CPU time (seconds), memory (bytes; not on macOS) and size of files. They can start threads, but
    no processes. On Linux with x86-64 or 64-bit ARM, a seccomp filter refuses SYSTEM_CALLS.
    Elsewhere only the limit on processes stops new processes, and threads with them. It doesn't
    hold for root unconfined. Success is a random token written last, so exiting early is failure. A
    program made to cheat can still find the token in its interpreter. Raises ValueError if
    `confined` and bubblewrap is missing.
    """
    token = secrets.token_hex(16)
    rules = _seccomp().hex()
    tasks = 1024 if rules else 0  # without rules, room for threads would be room for processes
    limits = {
        "CPU": math.ceil(timeout),
        "AS": memory,
        "FSIZE": 1 << 20,
        "NPROC": tasks,
        "NOFILE": 64,
        "CORE": 0,
    }
    nobody = 65534 if confined and os.getuid() == 0 else None
    job = json.dumps([sources, token, limits, rules, nobody]).encode()
    command = [*(_bubblewrap() if confined else []), PYTHON, "-I", "-B", "-c", RUNNER]
    # Folders that are nested a thousand deep can't be removed.
    ignored = suppress(subprocess.TimeoutExpired, RecursionError)
    place = nullcontext() if confined else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with (
        ignored,
        place as folder,
        tempfile.TemporaryFile() as result,  # limited in size, unlike a pipe's reader
        subprocess.Popen(
            command,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=result,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            process.communicate(job, timeout)
        finally:
            with suppress(OSError):  # if no process of its session is left
                os.killpg(process.pid, signal.SIGKILL)
        result.seek(0)
        return result.read(64) == token.encode()
    return False


def _bubblewrap() -> list[str]:
    """Return the command that confines a program: its own processes, no network, a small empty
    /tmp, and read-only access to the system and the interpreter only."""
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise ValueError(
            "--run-code needs bwrap, which is for Linux: apt-get install bubblewrap; on a Mac or in a "
            "container: --run-code unconfined, which runs the code with your rights"
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
    """Raise ValueError, with the system's error message, if code cannot be run."""
    if not hasattr(os, "killpg"):
        raise ValueError("--run-code needs Linux, or macOS with 'unconfined'")
    command = [*(_bubblewrap() if confined else []), PYTHON, "-c", ""]
    tried = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    if tried.returncode or not run_code("import decimal", timeout=30, confined=confined):
        how = "confined" if confined else "unconfined"
        advice = ": allow user namespaces or update bwrap; in a container, --run-code unconfined"
        raise ValueError(
            f"--run-code cannot run code {how} here ({tried.stderr.strip()[:200]}){confined * advice}"
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
    subjects = ""  # names of the files to read in a folder; empty for all
    runs_code = False
    table_3: tuple[float, ...]  # LLaDA, Dream, post-generation, TIE by each of the four scores
    table_4: tuple[float, ...] = ()  # DreamCoder, DiffuCoder, TIE by token change count and top-1

    def interval(self, score: str) -> int:
        """Return n, the steps between relays."""
        return self.tcc_interval if score == "token_change_count" else 16

    def parse(self, row: Any) -> tuple[str, Any]:
        """Return (prompt, gold) of one row in the owners' layout. `load` reports any error as a
        wrong layout."""
        raise NotImplementedError

    def extract(self, text: str) -> str:
        """Return the answer in the text of an answer region."""
        raise NotImplementedError

    def correct(self, answer: str, gold: Any, confined: bool) -> bool:
        return answer == gold


# The prompts are in our own words, modelled on simple-evals and, for Countdown, on Wang et al.
# 2026. Those for code are from App. A.3.
def _step_by_step(instruction: str, name: str, meaning: str, *question: str) -> str:
    instruction += (
        " Think step by step first, then give your final answer on a last line of the form "
        f"'Answer: {name}', where {name} {meaning}, and nothing after it."
    )
    return "\n\n".join((instruction, *question))


class MultipleChoice(Benchmark):
    length = 128
    answer_length = 16
    CAPITAL = (  # neither the article A nor a letter of a word or formula
        r"([A-E])(?!\w|['’-]\w|\s*[=+*/^<>\\]|\s+(?:and|or)\b)"
        r"(?!(?<=A)\s+(?!is\b|was\b|because\b|since\b|as\b)[a-z])"
    )
    AFTER = (  # the word "answer" or "option"
        r"(?:[^\w.?!]+(?i:is|be|would|should|must|the|option|choice|letter|most|likely|correct|therefore|clearly))*"
        rf"[^\w.?!]*?(?:{CAPITAL}|([a-e])(?=[)\]]|\W*$))"
    )
    PATTERNS = (
        r"^\W*([A-Ea-e])[^\w+]*$",
        r"^[^\w\\]*([A-Ea-e])(?:[)\]}>:]|[.,]?['’](?!\w)|\.(?=\s|$))",  # marked at the start
        r"(?i:\b(?:answer|letter))" + AFTER,
        r"(?i:\b(?:choice|option))" + AFTER,
        r"(?:^|(?<!\w)[(\[{]\s*|[^\w\s'’=+/^\\|(\[{-]\s*|\n\s*|"
        r"(?i:\b(?:is|be|so|thus|hence|therefore|choose|pick|select|say|think|guess|with)|['’]s)\s+)" + CAPITAL,
    )  # fmt: skip

    def ask(self, question: str, choices: list[str], right: int) -> tuple[str, str]:
        letters = "ABCDE"[: len(choices)]
        listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices))
        instruction = "Answer the multiple choice question below."
        meaning = f"is one of {', '.join(letters)}"
        prompt = _step_by_step(instruction, "LETTER", meaning, question.strip(), listed)
        return prompt, letters[right]

    def extract(self, text):
        """Return the letter in a box, or else in the whole text, or "" if there is none."""
        for part in (unboxed(text), text[:2000]):
            part = re.sub(
                r"\\(?:text|math)\w*|\\[()\[\]]|</\w+>|<\w{2,}>|<\|.*?\|>|[*_`\"“”]", " ", part
            ).strip()
            for pattern in self.PATTERNS:
                found = re.search(pattern, part)
                if found:
                    return "".join(letter or "" for letter in found.groups()).upper()
        return ""


class MMLU(MultipleChoice):
    data = "MMLU's test csv (question, four choices, letter), or a folder of them"
    table_3 = (61.23, 67.46, 67.26, 67.55, 67.25, 67.53, 67.34)

    def parse(self, row):
        question, a, b, c, d, letter = row
        return self.ask(question, [a, b, c, d], [*"ABCD"].index(letter))


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

    def parse(self, row):
        choices = row["question"]["choices"]
        labels = [choice["label"] for choice in choices]  # letters or numbers
        texts = [choice["text"] for choice in choices]
        return self.ask(row["question"]["stem"], texts, labels.index(row["answerKey"]))


class WinoGrande(MultipleChoice):
    data = "WinoGrande's dev.jsonl (sentence, option1, option2, answer)"
    table_3 = (71.59, 72.22, 73.72, 72.85, 73.95, 71.90, 73.88)

    def parse(self, row):
        question = (
            f"Which choice belongs in the place of the _ in this sentence?\n{row['sentence']}"
        )
        return self.ask(question, [row["option1"], row["option2"]], [*"12"].index(row["answer"]))


class Mathematics(Benchmark):
    tcc_interval = 16
    instruction = "Solve the mathematics problem below."

    def correct(self, answer, gold, confined):
        return math_equal(answer, gold)


class GSM8K(Mathematics):
    data = "GSM8K's test.jsonl (question, answer with ####)"
    length = 256
    answer_length = 16
    table_3 = (78.77, 78.39, 80.29, 83.47, 82.71, 83.62, 82.56)
    FRACTION = r"\\frac\s*(?:\d|\{\d+\})\s*(?:\d|\{\d+\})"
    TERM = rf"(?:{FRACTION}|\\sqrt\{{\d+\}}|(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:\s*{FRACTION})?)"
    CALCULATION = rf"(?<![\^_])(?:(?<!\w)-\s*)?{TERM}(?:(?:\s*[-+*/^:]\s*|,)(?:{TERM}|\{{\d+\}}))*"

    def parse(self, row):
        number = Fraction(row["answer"].split("####")[1].strip().replace(",", ""))
        meaning = "is the number alone"
        return _step_by_step(self.instruction, "NUMBER", meaning, row["question"]), str(number)

    def extract(self, text):
        """Return the first number or calculation of the first sentence that has one, after its last
        "="."""
        lines = [line for line in sentences(text) if re.search(r"[\d¼-¾⅐-⅞]", line)]
        line = re.sub(r"^\s*[-*•]\s+", "", "".join(lines[:1]))  # the mark of a list
        line = latex(re.split(r"=|≈|\\approx", line)[-1])
        line = re.sub(r"(?<=\d)\s*[xX]\s*(?=\d)", "*", line)
        line = re.sub(r"(?<=\d),\s?(?=\d{3}(?!\d))", "", line)
        found = re.search(self.CALCULATION, line)
        return found[0] if found else ""


class MATH500(Mathematics):
    data = "MATH500's test.jsonl (problem, answer)"
    length = 512
    answer_length = 64
    table_3 = (37.4, 48.0, 43.0, 48.6, 47.0, 45.2, 48.4)

    def parse(self, row):
        meaning = "is the value alone, in LaTeX"
        prompt = _step_by_step(self.instruction, "ANSWER", meaning, row["problem"])
        return prompt, str(row["answer"])

    extract = staticmethod(formula)


class Code(Benchmark):
    length = 512
    answer_length = 480
    suffix = "```python\n"
    answer_window = 8
    runs_code = True

    def extract(self, text):
        """Return the code up to the closing fence; its indentation stays, since it may continue the
        prompt's function."""
        return re.sub(r"^\s*```(?:python|py)?[ \t]*\n", "", text).split("```")[0].strip("\n")

    def shapes(self, code: str) -> list[str]:
        """Return the code as it is, and without the indentation that models add to all of it or to
        all but the first line."""
        first, _, rest = code.partition("\n")
        flush = first.lstrip()
        return [
            code,
            textwrap.dedent(code),
            f"{flush}\n{rest}",
            f"{flush}\n{textwrap.dedent(rest)}",
        ]


def first_valid(programs: list[str]) -> str:
    """Return the first program that compiles, or else the first."""
    for program in programs:
        with (
            warnings.catch_warnings(),
            suppress(SyntaxError, ValueError, RecursionError, MemoryError),
        ):
            warnings.simplefilter("ignore")
            compile(program, "answer", "exec")
            return program
    return programs[0]


class HumanEval(Code):
    data = "HumanEval.jsonl, gzipped or not"
    table_3 = (45.73, 61.59, 55.49, 54.27, 57.32, 57.93, 57.32)
    table_4 = (72.56, 70.12, 72.56, 72.56)

    def parse(self, row):
        gold = {key: row[key] for key in ("prompt", "entry_point", "test")}
        prompt = (
            "Read the following function signature and docstring, and fully implement the function described. "
            f"Return only the Python function, no explanation.\n\n{gold['prompt']}"
        )
        return prompt, gold

    def correct(self, answer, gold, confined):
        """Run the prompt's imports and helpers, then the answer, then the tests."""
        name = gold["entry_point"]
        helpers = gold["prompt"].split(f"def {name}")[0]
        shapes = self.shapes(answer)
        if not re.search(rf"^[ \t]*(?:async +)?def +{name}\b|^{name} *=", answer, re.MULTILINE):
            continued = [textwrap.indent(shape, "    ") for shape in shapes]
            shapes = [gold["prompt"] + shape for shape in (answer, *continued)]
        return run_code(
            helpers, first_valid(shapes), gold["test"], f"check({name})", confined=confined
        )


class MBPP(Code):
    # The paper's figures are multiples of 1/427: it runs all of sanitized MBPP, not the test split
    # alone.
    data = "sanitized-mbpp.json"
    table_3 = (53.16, 63.23, 62.53, 64.17, 62.06, 62.76, 62.06)
    table_4 = (75.88, 72.60, 76.11, 76.58)

    def parse(self, row):
        gold = {key: row[key] for key in ("test_imports", "test_list")}
        tests = "\n".join(gold["test_list"])
        prompt = (
            f"{row['prompt']} Your code should satisfy these tests:\n{tests}\n"
            "Return only the Python function, no explanation."
        )
        return prompt, gold

    def correct(self, answer, gold, confined):
        answer = first_valid(self.shapes(answer))
        return run_code(answer, *gold["test_imports"], *gold["test_list"], confined=confined)


class Countdown(Benchmark):
    data = "a Countdown jsonl (input and output, or nums and target)"
    length = 256
    answer_length = 32
    table_3 = (13.4, 16.4, 19.2, 18.8, 18.8, 19.4, 18.6)
    PLAIN = (
        *[(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))")] * 3,  # fractions within fractions
        (r"\\(?:left|right)(?![a-z])", ""),
        (r"[\[{]", "("),
        (r"[\]}]", ")"),
        (r"->|→", "="),
        (r"(?<=[\d)])\s*[xX]\s*(?=[\d(])", "*"),
        (r"[A-Za-z]+\(|\d[A-Za-z]|[A-Za-z]\d|\\%", "!"),  # functions and variables
    )  # fmt: skip

    def parse(self, row):
        if "nums" in row:
            numbers, target = row["nums"], row["target"]
        else:  # Dream's input "15,44,79,50" ends in the target; d1's files have it as the output
            numbers, target = row["input"].split(","), row["output"]
            target = target if target.isdigit() else numbers.pop()
        gold = {"numbers": [int(number) for number in numbers], "target": int(target)}
        instruction = (
            f"Make an arithmetic expression with the value {target} from the numbers {str(gold['numbers'])[1:-1]}. Use "
            "every number exactly once; the operations are + - * / and brackets are allowed."
        )
        meaning = "is the expression alone without an equals sign"
        return _step_by_step(instruction, "EXPRESSION", meaning), gold

    def extract(self, text):
        return "\n".join(sentences(text))

    def correct(self, answer, gold, confined):
        """Return whether an expression in the answer has each number once, + - * / only, and the
        target as its value."""
        answer = latex(answer)
        for pattern, new in self.PLAIN:
            answer = re.sub(pattern, new, answer)
        for part in re.split(r"[^-+*/() \d.!^%]+", answer):
            text = re.sub(r"^[\s).]*(?:-\s)?|[\s(.]*$", "", part)
            for closed in (text, f"{text})", f"({text}"):
                if self.value(closed, gold["numbers"]) == gold["target"]:
                    return True
        return False

    def value(self, text: str, numbers: list[int]) -> Fraction | None:
        """Return the exact value of an expression in + - * / with each number once, or None for any
        other text."""
        used = map(int, re.findall(r"\d+", text))
        allowed = r"(?:(?!\*\s*\*|/\s*/|\(\s*\))[-+*/() \d])*"
        if sorted(used) != sorted(numbers) or not re.fullmatch(allowed, text):
            return None
        exact = re.sub(r"\d+", lambda number: f"Fraction({int(number[0])})", text)
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
    """Return the questions of a task, a key of BENCHMARKS, from the owners' file. ValueError names
    file and row."""
    if task not in BENCHMARKS:
        raise ValueError(f"task must be one of {', '.join(BENCHMARKS)}, got {task!r}")
    benchmark = BENCHMARKS[task]
    path = Path(path)
    questions = dict[str, Question]()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        subject = re.sub(r"_(test|val|dev)$", "", file.stem)
        if benchmark.subjects and subject not in benchmark.subjects.split():
            continue
        count = 0
        try:
            for row in _rows(file):
                prompt, gold = benchmark.parse(row)
                names = ("task_id", "unique_id", "id", "qID") if isinstance(row, dict) else ()
                counted = f"{subject if path.is_dir() else task}/{count}"  # a file may be renamed
                key = next((str(row[name]) for name in names if name in row), counted)
                if key in questions:
                    raise ValueError(f"the id must be unique, got {key} twice")
                questions[key] = Question(key, prompt, gold)
                count += 1
        except Exception as error:  # any error means that the file has another layout
            found = f"{type(error).__name__}: {error!s:.200}"
            raise ValueError(
                f"{file}, row {count + 1}: expected {benchmark.data} ({found})"
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
    """Return (answer, whether it is right) for the text of an answer region up to EOS.

    Code is run only if `run_code` is "confined" (in bubblewrap) or "unconfined". Raises ValueError
    if the task runs code and `run_code` doesn't allow it.
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
