"""Speed, as ratios of interleaved runs: A, B, A, B, ... in one process, so that drift affects both.

A figure is the median of the ratios of consecutive runs, with the minimum and maximum. Weights are
random: with a fixed number of tokens per step, the time does not depend on them.

    a  TIE with token change count over its bare forwards: the work of the ensemble itself
    b  a step with logits at the whole sequence, as public samplers compute them, over one of TIE
    c  each score over plain decoding by each member, and the exact number of forwards
    d  M members over M times one member
    e  a relay between equal and between different vocabularies, in microseconds per row
    f  TIE with torch.compile over TIE without
    g  TIE with mdlm.Cached, refresh = n, over TIE without, and over a public sampler with one model

Shapes: "toy" is train_toy.py's model and layout, decoded to the end with n = 4. The others have 128
positions (prompt 32, reasoning 72, suffix 8, answer 16) and n = 16, and only the last 17 tokens are
masked: a round, a relay and a step. On a CPU, a, d and f decode only the last 2 tokens, with n = 1.
Part g decodes one round of 16 steps in the middle of 384 positions (prompt 80, reasoning 264,
suffix 8, answer 32). "small", in b and g, is a small LLaDA: as in LLaDA-8B, the head's matrix has
7 % of the weights that a forward pass multiplies by.
Not part of the test suite. On 2 cores, the default takes about twenty minutes and 6 GB.

Example: python tests/bench.py --only a c --repeats 7
"""

import argparse
import json
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mdlm
import tie
import train_toy

# Fields of mdlm.ModelConfig. LLaDA-8B's and Dream-7B's sizes are those of their config.json.
SHAPES = {
    "toy": {},
    "small": {"vocab_size": 4096, "width": 512, "layers": 8, "heads": 8, "kv_heads": 8,
              "hidden": 1536},
    "wide": {"vocab_size": 126_464, "width": 512, "layers": 12, "heads": 8, "kv_heads": 8,
             "hidden": 1536},
    "llada": {"vocab_size": 126_464, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 32,
              "hidden": 12_288},
    "dream": {"vocab_size": 152_064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4,
              "hidden": 18_944, "qkv_bias": True, "rope_float32": False, "shift": True},
}  # fmt: skip
# Lengths of prompt, reasoning, suffix and answer.
LAYOUT = (32, 72, 8, 16)
TOY_LAYOUT = (
    train_toy.PROMPT_LENGTH,
    train_toy.REASONING_LENGTH,
    len(train_toy.SUFFIX),
    train_toy.ANSWER_LENGTH,
)


# --- what is run ----------------------------------------------------------------------------------


def build(shape, device):
    """A member with random weights, in float32 on a CPU and bfloat16 on a GPU."""
    # Set as the default, so that 8B weights never exist in float32.
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        if shape == "toy":
            model = train_toy.build(train_toy.Settings())
        else:
            V = SHAPES[shape]["vocab_size"]
            ids = {"mask_id": V - 1, "eos_id": V - 2, "pad_id": V - 2}
            model = mdlm.MDLM(mdlm.ModelConfig(**SHAPES[shape], **ids, max_length=4096))
    torch.set_default_dtype(torch.float32)
    return tie.Member(model.eval(), model.config.mask_id, model.config.eos_id)


def blank(member, layout, batch, device, committed=0):
    """A canvas with random prompts, and random tokens for the first `committed` masks."""
    prompt, reasoning, suffix, answer = layout
    prompts = torch.randint(0, 10, (batch, prompt)).tolist()
    ids = {"mask_id": member.mask_id, "pad_id": member.eos_ids[0]}
    canvas = tie.Canvas.blank(prompts, [1] * suffix, reasoning, answer, **ids, device=device)
    positions = canvas.masked[0].nonzero()[:committed, 0]
    canvas.masked[:, positions] = False
    canvas.tokens[:, positions] = torch.randint(0, 10, (batch, committed), device=device)
    return canvas


def forwards(members, canvases, config):
    """All forwards of an ensemble as functions, and the number of relays."""
    calls = []

    def recorded(member):
        def denoise(*inputs):
            calls.append(partial(member.denoise, *inputs))
            return calls[-1]()

        return replace(member, denoise=denoise)

    result = tie.ensemble([recorded(member) for member in members], canvases, config)
    return calls, len(result.leaders)


def run_all(jobs):
    for job in jobs:
        job()


# --- how it is timed ------------------------------------------------------------------------------


class Bench:
    """The options of a run, the members built so far, and the figures."""

    def __init__(self, options):
        self.options = options
        self.device = options.device
        self.members = {}
        self.figures = []

    def case(self, shape, batch, M=2, short=False):
        """Arguments of tie.ensemble. `short`: on a CPU, only the last 2 steps of a big shape."""
        built = self.members.setdefault(shape, [])
        while len(built) < M:
            built.append(build(shape, self.device))
        layout, masks, n = LAYOUT, 17, 16
        if shape == "toy":
            layout, masks, n = TOY_LAYOUT, TOY_LAYOUT[1] + TOY_LAYOUT[3], 4
        elif short and self.device == "cpu":
            masks, n = 2, 1
        committed = layout[1] + layout[3] - masks
        canvas = blank(built[0], layout, batch, self.device, committed)
        return built[:M], [canvas] * M, tie.Config(interval=n, block_size=16)

    def now(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, job):
        start = self.now()
        job()
        return self.now() - start

    def interleave(self, jobs):
        """Seconds of each job (repeats,), after a first round that isn't timed."""
        run_all(jobs.values())
        rounds = [[self.seconds(job) for job in jobs.values()] for _ in range(self.options.repeats)]
        return dict(zip(jobs, torch.tensor(rounds).T))

    def show(self, what, values, at_most=None, at_least=None, note=""):
        """Keep and print the median of `values`, and whether it meets its bar, if it has one."""
        low, median, high = values.quantile(torch.tensor([0, 0.5, 1])).tolist()
        bar = ""
        if at_most is not None:
            bar = f"at most {at_most}: {'met' if median <= at_most else 'missed'}"
        if at_least is not None:
            bar = f"at least {at_least}: {'met' if median >= at_least else 'missed'}"
        figure = {"figure": what, "median": median, "lowest": low, "highest": high}
        self.figures.append({**figure, "bar": bar, "note": note})
        if not self.options.json:
            numbers = f"{median:8.3f}  {low:8.3f} to {high:8.3f}"
            print(f"{what:<66} {numbers}  {bar:<20}  {note}".rstrip(), flush=True)


# --- the parts ------------------------------------------------------------------------------------


def own_work(bench):
    """a. Two members."""
    bars = {("toy", 1): 1.3, ("wide", 1): 1.05}
    for shape in bench.options.shapes:
        batches = [1, 8]
        if bench.device == "cpu":
            batches = [1, 16, 64] if shape == "toy" else [1, 16]  # at 64, minutes per run
        for batch in bench.options.batches or batches:
            case = bench.case(shape, batch, short=True)
            calls, _ = forwards(*case)
            jobs = {"TIE": partial(tie.ensemble, *case), "bare": partial(run_all, calls)}
            times = bench.interleave(jobs)
            what = f"a  {shape}, batch {batch}: TIE / its {len(calls)} bare forwards"
            bench.show(what, times["TIE"] / times["bare"], at_most=bars.get((shape, batch)))


def one_step(member, device, batch, length):
    """A step of two copies of a member by TIE, and by public samplers, which take logits and
    probabilities of the whole sequence."""
    layout = (length - sum(LAYOUT[1:]), *LAYOUT[1:])
    canvas = blank(member, layout, batch, device, committed=LAYOUT[1] + LAYOUT[3] - 1)

    def everywhere(dtype):
        for _ in range(2):
            logits = member.denoise(canvas.tokens, None, None)  # (B, L, V)
            logits.softmax(-1, dtype=dtype).gather(-1, logits.argmax(-1, keepdim=True))

    return {
        "needed": partial(tie.ensemble, [member] * 2, [canvas] * 2, tie.Config(block_size=16)),
        "float32": partial(everywhere, torch.float32),
        "float64": partial(everywhere, torch.float64),
    }


@torch.no_grad()
def peak_memory(shape, device, way, batch, length):
    """MiB that one step adds to the peak memory of this process: one process per call."""
    member = build(shape, device)
    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
    member.denoise(first, first, None)  # libraries and their workspaces don't count
    job = one_step(member, device, batch, length)[way]
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        job()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return growth / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on a Mac, else KiB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def needed_logits(bench, length=512):
    """b. The bars are for the wide model on a CPU, which spends more than half of its time in its
    head, and for softmax in float32, as in LLaDA's public sampler (Fast-dLLM's uses float64)."""
    for shape in dict.fromkeys(["small", *bench.options.shapes]):
        for batch in [1, 8] if shape != "toy" else []:
            jobs = one_step(bench.case(shape, 1, M=1)[0][0], bench.device, batch, length)
            if batch > 1:
                del jobs["float64"]  # 10 GB at batch 8
            times = bench.interleave(jobs)
            if bench.device != "cpu":
                torch.cuda.empty_cache()  # the other process needs the memory
            peak = {}
            for way in jobs:
                with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
                    run = pool.submit(peak_memory, shape, bench.device, way, batch, length)
                    peak[way] = torch.tensor([run.result()])
            for way in list(jobs)[1:]:
                has_bar = (shape, way, bench.device) == ("wide", "float32", "cpu")
                what = f"b  {shape}, length {length}, batch {batch}: {way} everywhere / needed"
                for name, figures, bar in (("time", times, 3), ("memory", peak, 5)):
                    values = figures[way] / figures["needed"]
                    bench.show(f"{what}, {name}", values, at_least=bar if has_bar else None)


def decode_each(members, canvases, config):
    for member, canvas in zip(members, canvases):
        tie.decode(member, canvas, config)


def scores(bench):
    """c. Two members; the toy at batch 16 with two intervals, the others at batch 1."""
    for shape in bench.options.shapes:
        for n in [4, 16] if shape == "toy" else [16]:
            batch = 16 if shape == "toy" else 1
            members, canvases, config = bench.case(shape, batch)
            jobs = {"plain": partial(decode_each, members, canvases, config)}
            notes = {}
            # On a CPU a big shape takes a minute per score: only the two that the bar compares.
            few = shape != "toy" and bench.device == "cpu"
            for score in tie.SCORES[:2] if few else tie.SCORES:
                case = (members, canvases, replace(config, interval=n, score=score))
                jobs[score] = partial(tie.ensemble, *case)
                calls, relays = forwards(*case)
                expected = 2 * int(canvases[0].masked[0].sum())
                if score != "token_change_count":
                    expected += 2 * relays
                verdict = "met" if len(calls) == expected else "missed"
                notes[score] = f"{len(calls)} forwards, expected {expected}: {verdict}"
            times = bench.interleave(jobs)
            where = f"c  {shape}, batch {batch}, n = {n}"
            for score, note in notes.items():
                bench.show(f"{where}: {score} / plain", times[score] / times["plain"], note=note)
            values = times["top1_probability"] / times["token_change_count"]
            bar = 1.1 if n == 16 else None
            bench.show(f"{where}: top-1 / token change count", values, at_most=bar)


def more_members(bench):
    """d. The first shape at batch 16."""
    shape = bench.options.shapes[0]
    cases = {M: bench.case(shape, 16, M, short=True) for M in range(1, 5)}
    times = bench.interleave({M: partial(tie.ensemble, *case) for M, case in cases.items()})
    for M in range(2, 5):
        values = times[M] / times[1] / M
        bench.show(f"d  {shape}, batch 16: {M} members / {M} times one", values, at_most=1.1)


class Bytes:
    """A vocabulary of bytes; two of these count as different. A real tokenizer takes longer."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids)


def relays(bench, batch=64):
    """e. Two members without computation relay 160 reasoning tokens and up to 24 answer tokens
    after each of 24 steps but the last. The time of the same steps without relays is subtracted."""

    def denoise(tokens, positions, attention_mask):
        return torch.zeros(*positions.shape, 258, device=positions.device)  # (B, K, V)

    jobs = {}
    for kind, interval, codecs in (
        ("no", 24, [None, None]),
        ("equal", 1, [None, None]),
        ("different", 1, [Bytes(), Bytes()]),
    ):
        pair = [tie.Member(denoise, mask_id=256, eos_id=257, codec=codec) for codec in codecs]
        canvas = blank(pair[0], (64, 160, 8, 24), batch, bench.device, committed=160)
        jobs[kind] = partial(tie.ensemble, pair, [canvas] * 2, tie.Config(interval=interval))
    times = bench.interleave(jobs)
    for kind in ("equal", "different"):
        values = (times[kind] - times["no"]) / 23 / batch * 1e6
        bench.show(f"e  batch {batch}: relay between {kind} vocabularies, us per row", values)


def compiled(bench):
    """f. Two members, the toy at batch 16, the others at batch 1; compiled before the timing."""
    for shape in bench.options.shapes:
        batch = 16 if shape == "toy" else 1
        members, *rest = bench.case(shape, batch, short=True)
        graph = partial(torch.compile, fullgraph=True, dynamic=True)
        graphs = [replace(member, denoise=graph(member.denoise)) for member in members]
        jobs = {
            "plain": partial(tie.ensemble, members, *rest),
            "compiled": partial(tie.ensemble, graphs, *rest),
        }
        times = bench.interleave(jobs)
        what = f"f  {shape}, batch {batch}: with torch.compile / without"
        bench.show(what, times["compiled"] / times["plain"])


class RoundEnded(Exception):
    pass


def one_round(members, canvas, config, refresh=0):
    """A round of the ensemble up to its relay, with new caches if `refresh` is given."""

    def stop(state):
        raise RoundEnded

    if refresh:
        members = [replace(m, denoise=mdlm.Cached(m.denoise, refresh)) for m in members]
    try:
        tie.ensemble(members, [canvas] * len(members), config, on_round=stop)
    except RoundEnded:
        pass


def public_steps(member, canvas, steps, block_size):
    """Steps of a public sampler: logits and probabilities of the whole sequence, then the most
    confident masked position of the block."""
    tokens = canvas.tokens.clone()
    masked = canvas.masked.clone()
    block = torch.zeros_like(masked)
    block[:, masked[0].int().argmax() :][:, :block_size] = True
    for _ in range(steps):
        logits = member.denoise(tokens, None, None)  # (B, L, V)
        confidence, best = logits.softmax(-1).max(-1)  # (B, L)
        chosen = confidence.masked_fill(~(masked & block), -1).topk(1).indices  # (B, 1)
        tokens = tokens.scatter(1, chosen, best.gather(1, chosen))
        masked = masked.scatter(1, chosen, False)


def cache(bench):
    """g. Two members, against the same without cache, and against one of them alone."""
    for shape in dict.fromkeys(["small", *bench.options.shapes]):
        for batch in (bench.options.batches or [1, 4]) if shape != "toy" else []:
            members, _, config = bench.case(shape, batch)
            canvas = blank(members[0], (80, 264, 8, 32), batch, bench.device, committed=224)
            n = config.interval
            jobs = {
                "TIE": partial(one_round, members, canvas, config),
                "TIE, cached": partial(one_round, members, canvas, config, refresh=n),
                "public sampler, one model": partial(public_steps, members[0], canvas, n, 16),
            }
            times = bench.interleave(jobs)
            exact, cached, public = jobs
            for a, b in ((cached, exact), (cached, public), (exact, public)):
                bar = 0.45 if (shape, a, b) == ("small", cached, public) else None
                bench.show(
                    f"g  {shape}, batch {batch}: {a} / {b}", times[a] / times[b], at_most=bar
                )


# --- command line ---------------------------------------------------------------------------------

PARTS = {
    "a": own_work,
    "b": needed_logits,
    "c": scores,
    "d": more_members,
    "e": relays,
    "f": compiled,
    "g": cache,
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    add("--shapes", nargs="+", choices=SHAPES, default=["toy", "wide"], help="models (toy wide)")
    add("--batches", nargs="+", type=int, help="of a (1 16 64, wide 1 16; GPU 1 8) and g (1 4)")
    add("--repeats", type=int, default=5, help="timed runs of each job (5)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="float32 on cpu, bfloat16 on cuda")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


@torch.no_grad()
def main():
    options = parse()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    settings = {
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in settings.items()))
    bench = Bench(options)
    for part in options.only:
        PARTS[part](bench)
    if options.json:
        print(json.dumps({"settings": settings, "figures": bench.figures}))


if __name__ == "__main__":
    main()
