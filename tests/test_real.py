"""A benchmark's whole command on a tiny LLaDA and a tiny Dream with random weights."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from test_mdlm import edit, tensors
from tiny import arguments, in_process, records, untrained

import eval as evaluation
import mdlm
import train_toy

pytest_plugins = "tiny"
ROOT = Path(__file__).parent.parent


def run(folders, data, *more):
    assert evaluation.main(arguments(folders, data, *more)) == 0


def summary(out):
    return json.loads((out / "summary.json").read_text())


def cells(out):
    return {(c["row"], c["column"]): c["value"] for c in summary(out)["tables"]["gsm8k"]["cells"]}


@pytest.fixture(scope="module")
def whole(folders, data, tmp_path_factory):
    """The results of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    run(folders, data, "--out", out)
    return out


def test_records_and_summary_are_complete(whole, data):
    kept = [json.loads(line) for line in records(whole, "tie-token_change_count.0")]
    assert [record["id"] for record in kept] == [f"gsm8k/{i}" for i in range(6)]
    questions = [json.loads(line) for line in data.read_text().splitlines()]
    assert [record["gold"] for record in kept] == [q["answer"].split()[1] for q in questions]
    for record in kept:
        assert len(record["texts"]) == 2 and min(record["leaders"]) >= 0
        right = [answer == record["gold"] for answer in record["answers"]]
        assert record["correct"] == right and record["winner"] in (0, 1)
    found = summary(whole)
    assert found["problems"] == 6 and found["settings"]["config"]["interval"] == 4
    assert found["tables"]["gsm8k"]["paper"]["tie token_change_count"] == [83.47]
    share = sum(record["correct"][record["winner"]] for record in kept) / 6
    assert cells(whole)["tie token_change_count", "accuracy"] == share


def test_killed_and_resumed_it_leaves_the_same_records(folders, data, whole, tmp_path):
    command = [sys.executable, ROOT / "eval.py", *arguments(folders, data, "--out", tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not records(tmp_path):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records(tmp_path)
    assert 0 < len(before) < 6 and not (tmp_path / "summary.json").exists()
    [file] = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + before[0][:50])  # a line that was cut short
    run(folders, data, "--out", tmp_path)
    assert {*before} < {*records(tmp_path)} and records(tmp_path) == records(whole)
    assert cells(tmp_path) == cells(whole)


def test_a_second_command_does_not_write_to_the_same_file(folders, data, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    [file] = out.glob("*.jsonl")
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = file.read_bytes()
        assert evaluation.main(arguments(folders, data, "--out", out)) == 2
        assert "is in use by another command" in capsys.readouterr().err
    run(folders, data, "--out", out)
    assert file.read_bytes() == before


def test_a_complete_run_decodes_nothing_wherever_its_files_are(
    folders, data, whole, tmp_path, monkeypatch, capsys
):
    moved = {
        name: shutil.copytree(folder, tmp_path / f"moved {name}")
        for name, folder in folders.items()
    }
    (moved["llada"] / "README.md").write_text("not read")
    renamed = shutil.copy(data, tmp_path)
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(evaluation, "decode", Mock(side_effect=AssertionError("decoded again")))
    run(moved, renamed, "--out", out, "--json")
    assert json.loads(capsys.readouterr().out) == summary(whole)


def questions(old, new):
    return lambda members, file: file.write_text(file.read_text().replace(old, new)) * ""


nudge = tensors(lambda state: state["lm_head.weight"].add_(1e-6))
OTHERS = [  # a change of the files, options, the settings that differ
    (lambda members, file: dict(reversed(members.items())), [], "members"),
    (lambda members, file: edit(rope_theta=9.0)(members["llada"]), [], "members"),
    (lambda members, file: nudge(members["dream"]), [], "members"),
    (questions("Tom", "Tim"), [], "questions"),
    (questions("#### ", "#### 1"), [], "questions"),
    (questions("", ""), ["--limit", 5], "questions"),
    (questions("", ""), ["--interval", 3, "--batch-size", 1], "config, batch_size"),
    (questions("", ""), ["--stop-at-eos"], "config"),
    (questions("", ""), ["--single", "--cache", 4, "--dtype", "bfloat16"], "single, dtype, cache"),
]


@pytest.mark.parametrize(("change", "options", "differ"), OTHERS)
def test_results_of_others_are_refused(
    change, options, differ, folders, data, whole, tmp_path, capsys
):
    members = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    file = Path(shutil.copy(data, tmp_path))
    members = change(members, file) or members
    assert evaluation.main(arguments(members, file, "--out", whole, *options)) == 2
    message = f"{whole} contains results with different {differ}: choose another --out"
    assert capsys.readouterr().err == f"eval.py: {message}\n"


def test_a_run_that_failed_before_its_first_record_leaves_the_folder_free(folders, data, tmp_path):
    broken = shutil.copytree(folders["dream"], tmp_path / "dream")
    (broken / "model.safetensors").write_bytes(b"")
    line = arguments({**folders, "dream": broken}, data, "--limit", 1, "--out", tmp_path / "out")
    assert evaluation.main(line) == 2
    shutil.copy(folders["dream"] / "model.safetensors", broken)
    assert evaluation.main(line) == 0


def test_a_change_at_either_end_of_large_weights_is_seen(tmp_path):
    size = 3 * 2**20
    prints = set()
    for place in (0, 2**20 - 1, size - 2**20, size - 1, size):
        content = bytearray(size + 1)
        content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        prints.add(evaluation.fingerprint(tmp_path))
    assert len(prints) == 5


def test_a_cache_that_is_always_refreshed_is_exact(folders, data, whole, tmp_path):
    for R in (1, 8):
        run(folders, data, "--limit", 4, "--cache", R, "--out", tmp_path / str(R))
    assert records(tmp_path / "1") == records(whole)[:4] != records(tmp_path / "8")


def test_members_alone_and_post_generation(folders, data, tmp_path, monkeypatch):
    def grade(task, question, text, run_code):
        return text, len(question.prompt + text) % 3 == 0

    monkeypatch.setattr(evaluation.benchmarks, "grade", grade)
    run(folders, data, "--single", "--out", tmp_path / "single")
    run(folders, data, "--interval", 256, "--out", tmp_path / "post")
    alone = cells(tmp_path / "single")
    post = cells(tmp_path / "post")
    assert alone.items() <= post.items()
    kept = [json.loads(line) for line in records(tmp_path / "post")]
    for m, name in enumerate(folders):
        assert all(record["texts"][m][1] == record["answers"][m] for record in kept)
        right = sum(record["correct"][m] for record in kept)
        assert post[f"member {name}", "accuracy"] == pytest.approx(right / 6)
    assert {row for row, _ in post} == {"member llada", "member dream", "oracle", "post-generation"}
    assert 0 < post["oracle", "accuracy"] < 1


def test_processes_of_torchrun_share_the_questions(folders, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert not (tmp_path / "summary.json").exists()
        run(folders, data, "--out", tmp_path)
        kept = [json.loads(line)["id"] for line in records(tmp_path, f"*.{rank}")]
        assert kept == [f"gsm8k/{i}" for i in range(rank, 6, 2)]
    assert summary(tmp_path)["problems"] == 6


@pytest.mark.parametrize(
    ("gpus", "local", "places"),
    [(0, 1, "cpu cpu"), (1, 1, "cuda:0 cuda:0"), (2, 0, "cuda:0 cuda:1"), (4, 1, "cuda:2 cuda:3")],
)
def test_processes_and_members_take_the_gpus_in_turn(
    gpus, local, places, folders, data, tmp_path, monkeypatch
):
    asked = []
    load = mdlm.load
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(train_toy, "check_device", str)
    monkeypatch.setattr(
        mdlm, "load", lambda folder, to, dtype: asked.append(to) or load(folder, "cpu")
    )
    run(folders, data, "--limit", 1, "--out", tmp_path)
    assert asked == places.split()
    asked.clear()
    run(folders, data, "--limit", 1, "--out", tmp_path, "--device", "cpu")
    assert asked == ["cpu", "cpu"]


def test_equal_vocabularies_share_a_codec(folders, data, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluation, "decode", lambda *args: given.extend(args) or 1 / 0)
    members = {"a": folders["dream"], "b": folders["dream"], "c": folders["llada"]}
    with pytest.raises(ZeroDivisionError):
        run(members, data, "--dtype", "bfloat16", "--out", tmp_path)
    members, canvases, _, _, text, _ = given
    codec = members[0].codec
    assert codec is members[1].codec is not members[2].codec
    assert {member.denoise.embed.weight.dtype for member in members} == {torch.bfloat16}
    suffix = slice(canvases[0].reasoning.stop, canvases[0].answer.start)
    assert codec.decode(canvases[0].tokens[1, suffix].tolist()) == b"\nAnswer:"
    assert text(0, codec.encode("ab") + [codec.eos_id[0]] + codec.encode("c")) == "ab"


# --- the Hub --------------------------------------------------------------------------------------


def test_a_member_by_its_name_on_the_hub(folders, data, whole, tmp_path, monkeypatch):
    """From a cache as huggingface_hub keeps it, without network."""
    cached = tmp_path / "hub" / "models--TIE-org--tiny-dream"
    commit = "0" * 40
    shutil.copytree(folders["dream"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    members = {**folders, "dream": "TIE-org/tiny-dream"}
    run(members, data, "--limit", 2, "--out", tmp_path / "out")
    assert records(tmp_path / "out") == records(whole)[:2]


def test_only_what_is_read_is_fetched(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more) or name
    )
    address = "https://huggingface.co/org/name@v1"
    assert evaluation.member_folder(address) == Path("org/name") and asked.pop("revision") == "v1"
    read = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    read += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
    code = ["modeling_llada.py", "pytorch_model.bin", "original/model.safetensors"]
    assert [*huggingface_hub.utils.filter_repo_objects(read + code, **asked)] == read


HUB_ERRORS = [
    errors.LocalEntryNotFoundError("first line\nsecond"),
    Exception("407 Proxy Authentication Required"),  # of its HTTP library
]


@pytest.mark.parametrize("error", HUB_ERRORS)
def test_what_the_hub_does_not_give_is_one_line(error, folders, data, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    assert evaluation.main(arguments({**folders, "dream": "org/name"}, data)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "org/name" in err and " ".join(str(error).split()) in err


# --- the toy's real members -----------------------------------------------------------------------


def test_cache_and_dtype_reach_the_toys_members(tmp_path, monkeypatch, capsys):
    untrained(tmp_path / "toy-seed0")
    monkeypatch.setattr(train_toy, "pool", in_process)
    shown = []
    for options in ((), ("--cache", "1"), ("--cache", "16"), ("--dtype", "bfloat16")):
        assert evaluation.main(["trace", "--checkpoints", str(tmp_path), *options]) == 0
        shown.append(capsys.readouterr().out)
    exact, whole, kept, rounded = shown
    assert exact == whole and len({exact, kept, rounded}) == 3
