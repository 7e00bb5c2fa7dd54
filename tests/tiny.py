"""Small members for the tests of the command lines: toys that need no training, and real layouts."""

import json
import shutil
import zlib
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mdlm import GOLDEN, MASK, edit, train_bpe

import mdlm
import train_toy

# --- toys: fakes for the tables, and untrained models ---------------------------------------------


def fake(name):
    """A denoiser with the toy's skill: totals and answer follow from the products that are written.
    It guesses wrongly at some products, and wavers there and in what depends on them."""
    V = len(train_toy.VOCABULARY)
    seed = zlib.crc32(name.encode())
    weights = torch.randn(train_toy.LENGTH, V, generator=torch.Generator().manual_seed(seed))
    weights = weights.repeat(2, 1)  # the answer may be longer than the toy's

    def denoise(tokens, positions, attention_mask):
        digits = tokens[:, train_toy.MULTIPLICAND][:, ::2]  # (B, C)
        number = (digits * 10 ** torch.arange(train_toy.COLUMNS).flip(0)).sum(1)  # (B,)
        factor = tokens[:, [train_toy.MULTIPLICAND.stop + 1]]  # (B, 1)
        tens, units = tokens[:, train_toy.PRODUCTS].unflatten(1, (-1, 2)).unbind(2)  # (B, C)
        guessed = (tens > 9) | (units > 9)  # (B, C)
        gap = guessed & ((10 * digits + factor) * seed % 101 % 8 == 0)  # (B, C)
        products = torch.where(guessed, digits * factor + gap.int(), 10 * tens + units)  # (B, C)
        target = train_toy.write(torch.cat([number[:, None], factor], 1), products)  # (B, L)
        target = torch.nn.functional.pad(target, (0, train_toy.LENGTH))  # zeros after the answer
        unsure = gap.any(1, keepdim=True).repeat(1, target.shape[1])  # (B, 2 L)
        unsure[:, train_toy.PRODUCTS] = gap.repeat_interleave(2, 1)
        step = (tokens != train_toy.MASK).sum(1)[:, None, None]  # (B, 1, 1)
        logits = torch.sin(weights[positions] * step + tokens.sum(1)[:, None, None])  # (B, K, V)
        logits *= 2.2 + 1.5 * unsure.gather(1, positions)[..., None]
        logits[..., train_toy.MASK] = -10
        return logits + 4 * torch.nn.functional.one_hot(target.gather(1, positions), V)

    denoise.name = name
    return denoise


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Fake members that are "trained" and decode in this process, in a working directory of their
    own. Gives the plan of all training."""
    trained = {}

    def train_members(plan, out, device):
        trained.update(plan)
        for name in plan:
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / "model.safetensors").touch()
        return [{"name": name, "validation_accuracy": float(name == "B")} for name in plan]

    def load(folder, device, dtype):
        config = SimpleNamespace(mask_id=train_toy.MASK, eos_id=train_toy.EOS)
        return fake(f"{folder.parent.name} {folder.name}"), config

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toys"))
        patch.setattr(train_toy, "train_members", train_members)
        patch.setattr(train_toy, "pool", in_process)
        patch.setattr(mdlm, "load", load)
        patch.setattr(mdlm, "Cached", cached)
        yield trained


def cached(model, refresh):
    """In place of mdlm.Cached: another fake. The work that it reports depends on the tokens."""
    denoise = fake(f"{model.name} {refresh}")

    def call(tokens, positions, attention_mask):
        call.computed = tokens.sum(1)
        return denoise(tokens, positions, attention_mask)

    return call


def in_process(workers):
    """In place of a pool of processes."""

    def submit(job, *given):
        future = Future()
        future.set_result(job(*given))
        return future

    return nullcontext(SimpleNamespace(map=map, submit=submit, shutdown=lambda **how: None))


def untrained(folder):
    """Complete folders of members A and B with random weights."""
    settings = train_toy.Settings()
    for name in "AB":
        torch.manual_seed(ord(name))
        mdlm.save(train_toy.build(settings), folder / name)
        shares = dict.fromkeys(("validation_accuracy", "validation_problems", "products_right"), 0)
        record = {"name": name, "settings": asdict(settings), "layout": train_toy.LAYOUT, **shares}
        record |= {"seconds": 0, "curve": [], "mistakes": []}
        (folder / name / train_toy.RECORD).write_text(json.dumps(record))


# --- a LLaDA and a Dream --------------------------------------------------------------------------

HEADS = {
    "llada": ("model.transformer.wte.weight", "model.transformer.ff_out.weight"),
    "dream": ("model.embed_tokens.weight", "lm_head.weight"),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Official layouts and names, small random weights; the vocabularies differ."""
    made = {}
    for seed, family in enumerate(HEADS):
        folder = tmp_path_factory.mktemp("real") / family
        shutil.copytree(GOLDEN / f"{family}-tiny", folder)
        tokenizer = train_bpe(family)
        if family == "dream":
            tokenizer.add_tokens(["apples", "left"])
        tokenizer.save(str(folder / "tokenizer.json"))
        size = tokenizer.get_vocab_size() + 3
        end = tokenizer.token_to_id("<|endoftext|>")
        ids = {"mask_token_id": tokenizer.token_to_id(MASK[family]), "eos_token_id": end}
        length = "max_sequence_length" if family == "llada" else "max_position_embeddings"
        edit(vocab_size=size, pad_token_id=end, **ids, **{length: 1024})(folder)
        weights = load_file(folder / "model.safetensors")
        torch.manual_seed(seed)
        weights |= {name: torch.randn(size, weights[name].shape[1]) for name in HEADS[family]}
        save_file(weights, folder / "model.safetensors")
        made[family] = folder
    return made


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    row = '{"question": "Tom has %d apples and eats one. How many?", "answer": "#### %d"}\n'
    file.write_text("".join(row % (n + 1, n) for n in range(10, 16)))
    return file


def arguments(folders, data, *more):
    members = [f"{name}={folder}" for name, folder in folders.items()]
    quick = ["--top-k", "16", "--interval", "4", "--batch-size", "2"]
    return ["gsm8k", "--members", *members, "--data", str(data), *quick, *map(str, more)]


def records(out, method="*"):
    """The lines of a benchmark's records, sorted by id."""
    lines = [line for file in out.glob(f"{method}.jsonl") for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: json.loads(line)["id"])
