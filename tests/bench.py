"""Speed as ratios, each from one interleaved run: A, B, A, B, ... in one process, so that drift hits both alike.

A figure is the median of the ratios of neighbouring runs, with the lowest and the highest. Weights are random: with
a fixed number of tokens a step, the time does not depend on them.

    a  TIE with token change count, over the bare forwards of the same inputs: the ensemble's own work
    b  one step with logits at the whole sequence, as public samplers make it, over one with logits where TIE reads
    c  each score over plain decoding by each member, and the count of forwards, which must be exact
    d  M members over M times one member
    e  relay between equal and between different vocabularies, microseconds a row
    f  TIE with the members' forwards through torch.compile, over the same without
    g  TIE with mdlm.Cached, refresh = n, over TIE without, and over a public sampler's steps by one of the models

Shapes: "toy" is train_toy.py's model and layout, decoded whole, n = 2. The others have 128 positions (prompt 32,
reasoning 72, suffix 8, answer 16), n = 16, and all is committed already but the last 17 tokens: a round, a relay, a
step. On a CPU, a and d make only their last 2 steps, with n = 1: a relay at every second step, not every 16th.
Part g makes one round, 16 steps and a relay, in the midst of 384 positions (prompt 80, reasoning 264, suffix 8,
answer 32). "small", in b and g, is LLaDA in small: its head has the same share, 7 %.
Not part of the test suite. On 2 cores the default takes about twenty minutes and 6 GB.

Example: python tests/bench.py --only a c --repeats 7
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mdlm
import tie
import train_toy

SHAPES: dict[str, dict] = {  # of mdlm.ModelConfig; LLaDA-8B's and Dream-7B's sizes are those of their config.json
    "toy": {},
    "small": {"vocab_size": 4096, "width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "hidden": 1536},
    "wide": {"vocab_size": 126_464, "width": 512, "layers": 12, "heads": 8, "kv_heads": 8, "hidden": 1536},
    "llada": {"vocab_size": 126_464, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "hidden": 12_288},
    "dream": {"vocab_size": 152_064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "hidden": 18_944,
              "qkv_bias": True, "rope_float32": False, "shift": True},
}  # fmt: skip
TOY_LAYOUT = (train_toy.PROMPT_LENGTH, train_toy.REASONING_LENGTH, len(train_toy.SUFFIX), train_toy.ANSWER_LENGTH)
BIG_LAYOUT = (32, 72, 8, 16)  # prompt, reasoning, suffix, answer
Job = Callable[[], Any]


# --- what is run ------------------------------------------------------------------------------------------


def build(shape: str, device: str) -> tie.Member:
    """A member with random weights; float32 on a CPU, bfloat16 on CUDA."""
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)  # no copy of 8B weights in float32
    with torch.device(device):
        if shape == "toy":
            model = train_toy.build(train_toy.Settings())
        else:
            V = SHAPES[shape]["vocab_size"]
            ids = {"mask_id": V - 1, "eos_id": V - 2, "pad_id": V - 2}
            model = mdlm.MDLM(mdlm.ModelConfig(**SHAPES[shape], **ids, max_length=4096))
    torch.set_default_dtype(torch.float32)
    return tie.Member(model.eval(), model.config.mask_id, model.config.eos_id)


def blank(member: tie.Member, layout: tuple[int, ...], batch: int, device: str, steps: int = 0) -> tie.Canvas:
    """A canvas with random prompts; with `steps` all but so many of its last tokens are committed, to random ones."""
    prompt, reasoning, suffix, answer = layout
    prompts = torch.randint(0, 10, (batch, prompt)).tolist()
    ids = {"mask_id": member.mask_id, "pad_id": member.eos_ids[0]}
    canvas = tie.Canvas.blank(prompts, [1] * suffix, reasoning, answer, **ids, device=device)
    editable = [i for region in (canvas.reasoning, canvas.answer) for i in range(region.start, region.stop)]
    committed = editable[:-steps] if steps else []
    canvas.masked[:, committed] = False
    canvas.tokens[:, committed] = torch.randint(0, 10, (batch, len(committed)), device=device)
    return canvas


def forwards(members: list[tie.Member], canvases: list[tie.Canvas], config: tie.Config) -> tuple[list[Job], int]:
    """Every forward that the ensemble makes, in its order, to be made again; and the number of relays."""
    calls: list[Job] = []

    def recorded(model: tie.Denoiser) -> tie.Denoiser:
        def denoise(*inputs: Tensor | None) -> Tensor:
            calls.append(partial(model, *inputs))  # type: ignore[arg-type]
            return calls[-1]()

        return denoise

    watched = [replace(member, denoise=recorded(member.denoise)) for member in members]
    return calls, len(tie.ensemble(watched, canvases, config).leaders)


def replay(calls: list[Job]) -> None:
    for call in calls:
        call()


def decode_each(members: list[tie.Member], canvases: list[tie.Canvas], config: tie.Config) -> None:
    for member, canvas in zip(members, canvases):
        tie.decode(member, canvas, config)


# --- how it is timed --------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The settings of a run, the members built so far, and the figures."""

    device: str
    repeats: int
    batches: list[int] | None  # of parts a and g; None: the usual ones
    shapes: list[str]
    quiet: bool
    members: dict[str, list[tie.Member]] = field(default_factory=dict)
    figures: list[dict] = field(default_factory=list)

    def case(self, shape: str, batch: int, M: int = 2, short: bool = False):
        """Members, a canvas each, and settings. `short`: on a CPU, only the last 2 steps of a big shape."""
        made = self.members.setdefault(shape, [])
        made += [build(shape, self.device) for _ in range(len(made), M)]
        layout, steps, config = BIG_LAYOUT, 17, tie.Config(interval=16, block_size=16)
        if shape == "toy":
            layout, steps, config = TOY_LAYOUT, 0, tie.Config(interval=2, block_size=16)
        elif short and self.device == "cpu":
            steps, config = 2, replace(config, interval=1)
        return made[:M], [blank(made[0], layout, batch, self.device, steps)] * M, config

    def cases(self, *batches: int) -> list[tuple[str, int]]:
        """Of parts b and g: "small", and the shapes asked for but the toy, at each batch size."""
        shapes = dict.fromkeys(["small", *self.shapes])
        return [(shape, batch) for shape in shapes if shape != "toy" for batch in batches]

    def seconds(self, job: Job) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def interleave(self, jobs: dict[str, Job]) -> dict[str, list[float]]:
        """Seconds of each job, `repeats` times in turns. The caller has done each kind of work once already."""
        rounds = [{name: self.seconds(job) for name, job in jobs.items()} for _ in range(self.repeats)]
        return {name: [times[name] for times in rounds] for name in jobs}

    def show(self, what: str, values: list[float], bar: tuple[float, float] | None = None, note: str = "") -> None:
        """Keep and print a figure, the median of `values`, and whether it lies within its bar, both ends included."""
        figure, low, high = statistics.median(values), min(values), max(values)
        met = None if bar is None else bar[0] <= figure <= bar[1]
        wanted = "" if bar is None else in_words(*bar)
        self.figures.append({"figure": what, "median": figure, "lowest": low, "highest": high,
                             "bar": wanted, "met": met, "note": note})  # fmt: skip
        if not self.quiet:
            verdict = "" if met is None else f"{wanted}: {'met' if met else 'missed'}"
            print(f"{what:<66} {figure:8.3f}  {low:8.3f} to {high:8.3f}  {verdict:<20}  {note}".rstrip(), flush=True)

    def note(self, times: list[float]) -> str:
        """Seconds are told for a GPU only: elsewhere they say more of the machine than of the program."""
        return "" if self.device == "cpu" else f"{statistics.median(times):.3f} s"


def in_words(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}" if low > 0 else f"at most {high:g}"


def over(times: list[float], base: list[float], M: int = 1) -> list[float]:
    return [t / (M * b) for t, b in zip(times, base)]


# --- the parts --------------------------------------------------------------------------------------------


def own_work(bench: Bench) -> None:
    """a. Two members."""
    for shape in bench.shapes:
        usual = [1, 8] if bench.device != "cpu" else [1, 16, 64]
        if bench.device == "cpu" and shape != "toy":
            usual = [1, 16]  # at 64, minutes a run
        for batch in bench.batches or usual:
            case = bench.case(shape, batch, short=True)
            calls, _ = forwards(*case)
            times = bench.interleave({"TIE": partial(tie.ensemble, *case), "bare": partial(replay, calls)})
            bar = {("toy", 1): (0, 1.3), ("wide", 1): (0, 1.05)}.get((shape, batch))
            what = f"a  {shape}, batch {batch}: TIE / its {len(calls)} bare forwards"
            bench.show(what, over(times["TIE"], times["bare"]), bar, bench.note(times["TIE"]))
        if bench.device != "cpu":
            waited = first_wait(*bench.case(shape, 1))
            bench.show(f"a  {shape}: the steps of a round wait for the host", [len(waited[:1])], (0, 0), waited)


def first_wait(members: list[tie.Member], canvases: list[tie.Canvas], config: tie.Config) -> str:
    """What synchronises in the steps of a round, as `tie.generate` makes them once it has read their number, or ""."""
    runs = [tie.Run(m, member, canvas, config) for m, (member, canvas) in enumerate(zip(members, canvases))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(config.interval):
            for run in runs:
                run.step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def one_step(member: tie.Member, device: str, batch: int, length: int) -> dict[str, Job]:
    """One forward and its reading: TIE's own, or logits and softmax at the whole sequence, in two precisions."""
    canvas = blank(member, (length - sum(BIG_LAYOUT[1:]), *BIG_LAYOUT[1:]), batch, device)
    run = tie.Run(0, member, canvas, tie.Config())

    def everywhere(dtype: torch.dtype) -> Tensor:
        logits = member.denoise(canvas.tokens, None, None)  # type: ignore[arg-type]  # (B, L, V)
        return logits.softmax(-1, dtype=dtype).gather(-1, logits.argmax(-1, keepdim=True))  # (B, L, 1)

    return {
        "needed": lambda: run.read(canvas),
        "float32": lambda: everywhere(torch.float32),
        "float64": lambda: everywhere(torch.float64),
    }


@torch.no_grad()
def peak_memory(shape: str, device: str, way: str, batch: int, length: int) -> float:
    """MiB of one step beside the loaded model: how much it raises the peak of this process, so one call a process."""
    member = build(shape, device)
    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
    member.denoise(first, first, None)  # libraries and their workspaces belong to the base
    job = one_step(member, device, batch, length)[way]
    if device == "cpu":
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        job()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        return growth / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def needed_logits(bench: Bench, length: int = 512) -> None:
    """b. The bars hold for softmax in float32, as LLaDA's public sampler makes it; Fast-dLLM's makes it in float64.
    They are the wide model's on a CPU, more than half of which is its head; "small" has LLaDA-8B's share, 7 %."""
    for shape, batch in bench.cases(1, 8):
        jobs = one_step(bench.case(shape, 1, M=1)[0][0], bench.device, batch, length)
        if batch > 1:
            del jobs["float64"]  # of 8 sequences, 10 GB
        for job in jobs.values():
            job()
        times, peak = bench.interleave(jobs), {}
        if bench.device != "cpu":
            torch.cuda.empty_cache()  # the other process needs the room
        for way in jobs:
            with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
                peak[way] = pool.submit(peak_memory, shape, bench.device, way, batch, length).result()
        for way in list(jobs)[1:]:
            judged = way == "float32" and shape == "wide" and bench.device == "cpu"
            what = f"b  {shape}, length {length}, batch {batch}: {way} everywhere / needed"
            bench.show(f"{what}, time", over(times[way], times["needed"]), (3, math.inf) if judged else None,
                       bench.note(times["needed"]))  # fmt: skip
            note = f"{peak[way]:.0f} / {peak['needed']:.0f} MiB"
            bench.show(f"{what}, memory", [peak[way] / peak["needed"]], (5, math.inf) if judged else None, note)


def scores(bench: Bench) -> None:
    """c. Two members; the toy at batch 16 and two intervals, the others at batch 1."""
    cases = [(shape, n) for shape in bench.shapes for n in ([4, 16] if shape == "toy" else [16])]
    for shape, n in cases:
        members, canvases, config = bench.case(shape, 16 if shape == "toy" else 1)
        settings = {score: replace(config, interval=n, score=score) for score in tie.SCORES}
        if shape != "toy" and bench.device == "cpu":  # a minute each: only the two that the bar compares
            settings = {score: settings[score] for score in ("token_change_count", "top1_probability")}
        jobs: dict[str, Job] = {"plain": partial(decode_each, members, canvases, config)}
        M, T, made = len(members), int(canvases[0].masked[0].sum()), {}
        for name, setting in settings.items():
            calls, rounds = forwards(members, canvases, setting)
            made[name] = len(calls), M * T + (0 if name == "token_change_count" else rounds * M * (M - 1))
            jobs[name] = partial(tie.ensemble, members, canvases, setting)
        times, where = bench.interleave(jobs), f"c  {shape}, batch {len(canvases[0].tokens)}, n = {n}"
        for name, (count, stated) in made.items():
            note = f"{count} forwards, stated {stated}: {'met' if count == stated else 'missed'}"
            bench.show(f"{where}: {name} / plain", over(times[name], times["plain"]), note=note)
        logit, changes = times["top1_probability"], times["token_change_count"]
        bench.show(f"{where}: top-1 / token change count", over(logit, changes), (0, 1.1) if n == 16 else None)


def more_members(bench: Bench) -> None:
    """d. At batch 16, of the first shape."""
    shape = bench.shapes[0]
    jobs: dict[str, Job] = {}
    for M in range(1, 5):
        case = bench.case(shape, 16, M, short=True)
        tie.ensemble(*case)
        jobs[str(M)] = partial(tie.ensemble, *case)
    times = bench.interleave(jobs)
    for M in range(2, 5):
        ratios = over(times[str(M)], times["1"], M)
        bench.show(f"d  {shape}, batch 16: {M} members / {M} times one", ratios, (0.9, 1.1))


class Bytes:
    """A vocabulary of bytes; two of them count as two vocabularies. A real tokenizer's own time comes on top."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> bytes:
        return bytes(ids)


def relay_first(runs: list[tie.Run]) -> None:
    """A relay as `tie.ensemble` makes it, the first member leading every row."""
    received = [[tie.receive(run, sender) for sender in runs] for run in runs]
    tie.relay(runs, received, [], torch.zeros_like(runs[0].forwards))


def relays(bench: Bench, batch: int = 64) -> None:
    """e. From one member to one other, 256 positions, half of them committed to text."""
    jobs: dict[str, Job] = {}
    for kind, codecs in (("equal", (None, None)), ("different", (Bytes(), Bytes()))):
        pair = [tie.Member(lambda *inputs: inputs[0], mask_id=256, eos_id=257, codec=codec) for codec in codecs]
        canvas = blank(pair[0], (64, 160, 8, 24), batch, bench.device, steps=92)
        canvas.tokens[~canvas.masked] += 48  # digits
        runs = [tie.Run(m, member, canvas, tie.Config()) for m, member in enumerate(pair)]
        jobs[kind] = partial(relay_first, runs)
        jobs[kind]()
    for kind, times in bench.interleave(jobs).items():
        row = [seconds / batch * 1e6 for seconds in times]
        bench.show(f"e  batch {batch}: relay between {kind} vocabularies, us a row", row)


def compiled(bench: Bench) -> None:
    """f. Two members, the toy at batch 16, the others at batch 1; one graph for all lengths, made before the clock."""
    for shape in bench.shapes:
        members, *rest = bench.case(shape, 16 if shape == "toy" else 1, short=True)
        try:
            graphs = [replace(m, denoise=torch.compile(m.denoise, fullgraph=True, dynamic=True)) for m in members]
            for kind in (members, graphs):
                tie.ensemble(kind, *rest)
        except RuntimeError as error:
            print(f"f  left out, torch.compile fails here: {str(error).splitlines()[0]}", file=sys.stderr)
            return
        times = bench.interleave({"as is": partial(tie.ensemble, members, *rest),
                                  "compiled": partial(tie.ensemble, graphs, *rest)})  # fmt: skip
        what = f"f  {shape}, batch {len(rest[0][0].tokens)}: with torch.compile / without"
        bench.show(what, over(times["compiled"], times["as is"]), note=bench.note(times["compiled"]))


def one_round(members: list[tie.Member], canvas: tie.Canvas, config: tie.Config, refresh: int = 0) -> None:
    """A round of the ensemble up to its relay, the first member leading; with `refresh` over new caches."""
    wrapped = [replace(m, denoise=mdlm.Cached(m.denoise, refresh)) if refresh else m for m in members]  # type: ignore
    runs = [tie.Run(m, member, canvas, config) for m, member in enumerate(wrapped)]
    tie.generate(runs)
    for run in runs:
        run.score_round()
    relay_first(runs)


def public_steps(member: tie.Member, canvas: tie.Canvas, steps: int, block_size: int) -> None:
    """Decoding as public samplers do it: logits and probabilities of the whole sequence at every step, then the
    most confident masked position of the block."""
    tokens, masked = canvas.tokens.clone(), canvas.masked.clone()
    block = torch.zeros_like(masked)
    block[:, masked[0].int().argmax() :][:, :block_size] = True
    for _ in range(steps):
        logits = member.denoise(tokens, None, None)  # type: ignore[arg-type]  # (B, L, V)
        confidence, best = logits.softmax(-1).max(-1)  # (B, L)
        chosen = confidence.masked_fill(~(masked & block), -1).topk(1).indices  # (B, 1)
        tokens = tokens.scatter(1, chosen, best.gather(1, chosen))
        masked = masked.scatter(1, chosen, False)


def cache(bench: Bench, n: int = 16) -> None:
    """g. Two members against themselves, and against one of them under a public sampler."""
    for shape, batch in bench.cases(*bench.batches or (1, 4)):
        members, _, config = bench.case(shape, batch)
        canvas = blank(members[0], (80, 264, 8, 32), batch, bench.device)
        begun = slice(canvas.reasoning.start, canvas.reasoning.stop - 40)  # so that a block of 16 comes next
        canvas.masked[:, begun], canvas.tokens[:, begun] = False, 1
        jobs: dict[str, Job] = {
            "exact": partial(one_round, members, canvas, config),
            "cached": partial(one_round, members, canvas, config, refresh=n),
            "public": partial(public_steps, members[0], canvas, n, config.block_size),
        }
        times, where = bench.interleave(jobs), f"g  {shape}, batch {batch}"
        note = bench.note(times["cached"])
        bench.show(f"{where}: TIE, cached / TIE", over(times["cached"], times["exact"]), note=note)
        bar = (0, 0.45) if shape == "small" else None
        bench.show(f"{where}: TIE, cached / public sampler, one model", over(times["cached"], times["public"]), bar)
        bench.show(f"{where}: TIE, exact / public sampler, one model", over(times["exact"], times["public"]))


# --- command line -----------------------------------------------------------------------------------------

PARTS = {"a": own_work, "b": needed_logits, "c": scores, "d": more_members, "e": relays, "f": compiled, "g": cache}


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse() -> argparse.Namespace:
    text, _, example = (__doc__ or "").partition("Example: ")
    parser = argparse.ArgumentParser(
        prog="bench.py", description=text, epilog=f"example: {example}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["toy", "wide"], help="models (toy wide)")
    parser.add_argument("--batches", nargs="+", type=natural, help="of a (1 16 64, wide 1 16; CUDA 1 8) and g (1 4)")
    parser.add_argument("--repeats", type=natural, default=5, help="runs of each (5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device cuda is not to be had here; try cpu")
    return options


def hardware(device: str) -> str:
    """The name of the GPU or of the processor, as far as the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu) + f" with {os.cpu_count()} cores"


@torch.no_grad()
def main() -> None:
    options = parse()
    torch.manual_seed(0)
    setting = {"device": hardware(options.device), "threads": torch.get_num_threads(), "repeats": options.repeats,
               "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in setting.items()))
    bench = Bench(options.device, options.repeats, options.batches, options.shapes, options.json)
    for part in options.only:
        PARTS[part](bench)
    if options.json:
        print(json.dumps({"settings": setting, "figures": bench.figures}))


if __name__ == "__main__":
    main()
