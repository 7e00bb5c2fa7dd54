"""Where there is a GPU: decoding gives what it gives on a CPU, on one device or two, and no step waits for the host."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from test_mdlm import TOY, build
from test_real import arguments, data, folders  # noqa: F401, fixtures

import eval as evaluation
import mdlm
import tie

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
GPU = "cuda"
LAST = f"cuda:{torch.cuda.device_count() - 1}"  # another GPU, where there are two
SETTINGS = [*({"score": score} for score in tie.SCORES), {"score": "top1_probability", "cross_model": False},
            {"top_k": 2}, {"threshold": 0.3}, {"answer_window": 2},
            {"commit": lambda reading: reading.entropy < 1.5}]  # fmt: skip


def members_on(devices, refresh=None):
    """A LLaDA and a Dream in small; in float64, so that rounding decides no comparison."""
    for seed, device in enumerate(devices):
        model = build(replace(TOY, shift=seed == 1, qkv_bias=seed == 1), seed).double().to(device)
        yield tie.Member(mdlm.Cached(model, refresh) if refresh else model, TOY.mask_id, TOY.eos_id, f"member {seed}")


def canvases_on(devices):
    prompts = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompt[b % 4 :] for b, prompt in enumerate(prompts)]
    return [tie.Canvas.blank(prompts, [1, 2], 9, 6, mask_id=TOY.mask_id, pad_id=TOY.pad_id, device=d) for d in devices]


def decoded(devices, settings, refresh=None):
    config = tie.Config(**{"interval": 3, "block_size": 4} | settings)
    return tie.ensemble(members_on(devices, refresh), canvases_on(devices), config)


def same(result, expected):
    for ours, theirs in zip(result.candidates, expected.candidates):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
    for name in ("winner", "leaders", "forwards", "not_relayed"):
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert torch.as_tensor(ours).tolist() == torch.as_tensor(theirs).tolist(), name
    for name in ("scores", "tcc", "top1"):
        torch.testing.assert_close(getattr(result, name).cpu(), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("devices", [(GPU, GPU), (GPU, LAST), ("cpu", GPU), (GPU, "cpu")])
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_decodes_as_on_a_cpu(devices, settings, refresh):
    same(decoded(devices, settings, refresh), decoded(("cpu", "cpu"), settings, refresh))


@pytest.mark.parametrize("devices", [(GPU, GPU), ("cpu", GPU), (GPU, "cpu")])
@pytest.mark.parametrize("score", ["token_change_count", "negative_entropy"])
def test_relays_between_vocabularies_as_on_a_cpu(folders, devices, score):  # noqa: F811

    def ensemble(devices):
        members, canvases = [], []
        for folder, device in zip(folders.values(), devices):
            model, codec = mdlm.load(folder, device, torch.float64)[0], mdlm.load_codec(folder)
            members.append(tie.Member(model, codec.mask_id, codec.eos_id, folder.name, codec))
            prompts = [codec.encode_prompt(text) for text in ("How many apples?", "What is left?")]
            ids = {"mask_id": codec.mask_id, "pad_id": codec.pad_id}
            canvases.append(tie.Canvas.blank(prompts, codec.encode("Answer: "), 24, 8, **ids, device=device))
        return tie.ensemble(members, canvases, tie.Config(interval=4, block_size=8, score=score))

    same(ensemble(devices), ensemble(("cpu", "cpu")))


@pytest.mark.parametrize(("settings", "refresh", "waits"), [({}, None, 0), ({"top_k": 2}, None, 0), ({}, 100, 1),
                                                            ({"score": "probability_margin"}, None, 0)])  # fmt: skip
def test_a_step_waits_for_the_host_with_a_cache_alone_and_once(settings, refresh, waits):
    config = tie.Config(interval=3, block_size=4, **settings)
    pairs = zip(members_on([GPU] * 2, refresh), canvases_on([GPU] * 2))
    runs = [tie.Run(m, *pair, config) for m, pair in enumerate(pairs)]
    for run in runs:
        run.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for run in runs * 2:
                run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 4 * waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [False, True])
def test_logits_are_those_of_the_cpu(dtype, shift):
    model = build(replace(TOY, shift=shift), 3)
    tokens = torch.randint(10, (3, 12), generator=torch.Generator().manual_seed(1))
    real = torch.arange(12) >= torch.tensor([[0], [3], [5]])
    expected, (first, second) = model(tokens, None, real), (0.02, 0.1) if dtype == torch.bfloat16 else (1e-4, 1e-4)
    logits = model.to(GPU, dtype)(tokens.to(GPU), None, real.to(GPU)).float().cpu()
    torch.testing.assert_close(logits[real], expected[real], rtol=first, atol=second)


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cpu"]])
def test_the_whole_command(folders, data, tmp_path, devices):  # noqa: F811
    line = arguments(folders, data, "--limit", 4, "--device", *devices, "--cache", 4, "--out", tmp_path, "--json")
    assert evaluation.main(line) == 0
    assert len(json.loads((tmp_path / "settings.json").read_text())["settings"]["members"]) == 2
    assert len([row for file in tmp_path.glob("*.jsonl") for row in file.read_text().splitlines()]) == 4
