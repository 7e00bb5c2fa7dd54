"""On one GPU or two, decoding gives what it gives on a CPU, and only a cache waits for a GPU."""

import warnings
from dataclasses import replace

import pytest
import torch
from test_mdlm import TOY, build
from tiny import arguments

import eval as evaluation
import mdlm
import tie

pytest_plugins = "tiny"
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
GPU = "cuda"
LAST = f"cuda:{torch.cuda.device_count() - 1}"  # another GPU if there are two
SETTINGS = [
    *({"score": score} for score in tie.SCORES),
    {"score": "top1_probability", "cross_model": False},
    {"top_k": 2},
    {"threshold": 0.3},
    {"answer_window": 2},
    {"commit": lambda reading: reading.entropy < 1.5},
]


def members_on(devices, refresh=None):
    """A small LLaDA and a small Dream, in float64 so that no comparison depends on rounding."""
    for seed, device in enumerate(devices):
        dream = seed == 1
        model = build(replace(TOY, shift=dream, qkv_bias=dream), seed).double().to(device)
        denoise = mdlm.Cached(model, refresh) if refresh else model
        yield tie.Member(denoise, TOY.mask_id, TOY.eos_id, f"member {seed}")


def canvas_on(device):
    prompts = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompt[b % 4 :] for b, prompt in enumerate(prompts)]
    ids = {"mask_id": TOY.mask_id, "pad_id": TOY.pad_id}
    return tie.Canvas.blank(prompts, [1, 2], 9, 6, **ids, device=device)


def decoded(devices, settings, refresh):
    config = tie.Config(**{"interval": 3, "block_size": 4} | settings)
    canvases = [canvas_on(device) for device in devices]
    return tie.ensemble([*members_on(devices, refresh)], canvases, config)


def assert_same(result, expected):
    for ours, theirs in zip(result.candidates, expected.candidates):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
    for name in ("winner", "leaders", "forwards", "not_relayed", "scores", "tcc", "top1"):
        ours, theirs = (torch.as_tensor(getattr(x, name)).cpu() for x in (result, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("devices", [(GPU, GPU), (GPU, LAST), ("cpu", GPU), (GPU, "cpu")])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_decodes_as_on_a_cpu(devices, settings, refresh):
    on_cpu = decoded(("cpu", "cpu"), settings, refresh)
    assert_same(decoded(devices, settings, refresh), on_cpu)


@pytest.mark.parametrize("devices", [(GPU, GPU), ("cpu", GPU), (GPU, "cpu")])
@pytest.mark.parametrize("score", ["token_change_count", "negative_entropy"])
def test_relays_between_vocabularies_as_on_a_cpu(folders, devices, score):

    def ensemble(devices):
        members = []
        canvases = []
        for folder, device in zip(folders.values(), devices):
            model, _ = mdlm.load(folder, device, torch.float64)
            codec = mdlm.load_codec(folder)
            members.append(tie.Member(model, codec.mask_id, codec.eos_id, folder.name, codec))
            prompts = [codec.encode_prompt(text) for text in ("How many apples?", "What is left?")]
            ids = {"mask_id": codec.mask_id, "pad_id": codec.pad_id}
            suffix = codec.encode("Answer: ")
            canvases.append(tie.Canvas.blank(prompts, suffix, 24, 8, **ids, device=device))
        config = tie.Config(interval=4, block_size=8, score=score)
        return tie.ensemble(members, canvases, config)

    assert_same(ensemble(devices), ensemble(("cpu", "cpu")))


@pytest.mark.parametrize(
    ("settings", "refresh", "waits"),
    [
        ({}, None, 0),
        ({"top_k": 2}, None, 0),
        ({"score": "probability_margin"}, None, 0),
        ({}, 100, 1),  # the number of positions to recompute
    ],
)
def test_only_a_cache_waits_for_the_gpu_and_once_per_step(settings, refresh, waits):
    """From the second forward of each member to the last of the first round: 3 steps each."""
    calls = []

    def watched(member):
        def denoise(*inputs):
            calls.append(member)
            torch.cuda.set_sync_debug_mode("warn" if 2 < len(calls) <= 8 else "default")
            return member.denoise(*inputs)

        return replace(member, denoise=denoise)

    members = [watched(member) for member in members_on([GPU, GPU], refresh)]
    config = tie.Config(interval=5, block_size=4, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tie.ensemble(members, [canvas_on(GPU)] * 2, config)
    assert len(calls) > 8
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 6 * waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [False, True])
def test_logits_are_those_of_the_cpu(dtype, shift):
    model = build(replace(TOY, shift=shift), 3)
    tokens = torch.randint(10, (3, 12), generator=torch.Generator().manual_seed(1))
    real = torch.arange(12) >= torch.tensor([[0], [3], [5]])
    expected = model(tokens, None, real)[real]
    logits = model.to(GPU, dtype)(tokens.to(GPU), None, real.to(GPU)).float().cpu()[real]
    rtol, atol = (0.02, 0.1) if dtype == torch.bfloat16 else (1e-4, 1e-4)
    torch.testing.assert_close(logits, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cpu"]])
def test_the_whole_command(folders, data, tmp_path, devices):
    options = ["--limit", 4, "--device", *devices, "--cache", 4, "--out", tmp_path, "--json"]
    assert evaluation.main(arguments(folders, data, *options)) == 0
    records = [line for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(records) == 4
