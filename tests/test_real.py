"""The whole command on folders of real layouts: a LLaDA and a Dream, tiny, with random weights and own tokenizers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from test_mdlm import GOLDEN, MASK, SPECIAL, edit, train_bpe

import eval as evaluation

ROOT = Path(__file__).parent.parent
HEADS = {"llada": ("model.transformer.wte.weight", "model.transformer.ff_out.weight"),
         "dream": ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
QUESTIONS = [{"question": f"Tom has {n} apples and eats {n // 2}. How many are left?", "answer": f"#### {n - n // 2}"}
             for n in range(10, 20)]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Official layouts and names, small random weights; the vocabularies differ."""
    made = {}
    for seed, family in enumerate(HEADS):
        folder = tmp_path_factory.mktemp(family)
        shutil.copytree(GOLDEN / f"{family}-tiny", folder, dirs_exist_ok=True)
        tokenizer = train_bpe(family)
        if family == "dream":
            tokenizer.add_tokens(["apples", "left"])
        tokenizer.save(str(folder / "tokenizer.json"))
        size = tokenizer.get_vocab_size() + 3
        end, mask = map(tokenizer.token_to_id, (SPECIAL[family][family == "llada"], MASK[family]))
        length = "max_sequence_length" if family == "llada" else "max_position_embeddings"
        edit(vocab_size=size, mask_token_id=mask, eos_token_id=end, pad_token_id=end, **{length: 1024})(folder)
        weights = load_file(folder / "model.safetensors")
        torch.manual_seed(seed)
        weights |= {name: torch.randn(size, weights[name].shape[1]) for name in HEADS[family]}
        save_file(weights, folder / "model.safetensors")
        made[family] = folder
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return file


def arguments(folders, data, *more):
    members = [f"{name}={folder}" for name, folder in folders.items()]
    return ["--members", *members, "--task", "gsm8k", "--data", str(data), "--top-k", "8", "--interval", "8",
            "--batch-size", "2", *map(str, more)]  # fmt: skip


def rows(folder):
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: json.loads(line)["id"])


def test_a_cache_made_anew_at_every_forward_is_exact_and_one_that_is_kept_is_not(folders, data, tmp_path):
    kept = {}
    for name, options in {"exact": (), "1": ("--cache", "1"), "8": ("--cache", "8")}.items():
        assert evaluation.main(arguments(folders, data, "--limit", "4", *options, "--out", tmp_path / name, "--json")) == 0
        kept[name] = rows(tmp_path / name)
    assert kept["exact"] == kept["1"] != kept["8"]
    assert json.loads((tmp_path / "8" / "settings.json").read_text())["settings"]["cache"] == 8


def test_killed_in_the_middle_it_goes_on_with_the_same_records(folders, data, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert evaluation.main(arguments(folders, data, "--out", whole, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["problems"] == 10 and summary["rows"][0]["method"] == "tie" and summary["rows"][0]["paper"] == 83.47

    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *arguments(folders, data, "--out", killed)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not (killed.exists() and rows(killed)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows(killed)
    assert before and not (killed / "summary.json").exists()
    assert evaluation.main(arguments(folders, data, "--out", killed)) == 0
    assert set(before) <= set(rows(killed)) and rows(killed) == rows(whole)


def test_two_processes_share_the_questions(folders, data, tmp_path, monkeypatch, capsys):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = arguments(folders, data, "--out", tmp_path, "--single")
    done = subprocess.run([*torchrun, ROOT / "eval.py", *line], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = {f"member-{name}": [tmp_path / f"member-{name}.{rank}.jsonl" for rank in (0, 1)] for name in folders}
    for name, (first, second) in files.items():
        ids = [json.loads(row)["id"] for file in (first, second) for row in file.read_text().splitlines()]
        assert len(set(ids)) == len(ids) == 10, name
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["member llada", "member dream"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":  # where nothing is left to do, the first process alone prints the results
        monkeypatch.setenv("RANK", rank)
        assert evaluation.main(line) == 0
        assert ("gsm8k: 10 problems" in capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize("gpus, local, places", [(0, 1, "cpu cpu"), (1, 1, "cuda:0 cuda:0"), (2, 0, "cuda:0 cuda:1"),
                                                 (4, 1, "cuda:2 cuda:3"), (4, 2, "cuda:0 cuda:1")])  # fmt: skip
def test_processes_and_their_members_take_the_gpus_in_turn(gpus, local, places, monkeypatch):
    for name, value in {"RANK": local, "WORLD_SIZE": 3, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(evaluation.train_toy, "check_device", lambda device: None)
    assert evaluation.places_of(2, None) == places.split()
    assert evaluation.places_of(2, ["cpu"]) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="--device would put every process on the same GPUs: leave it out"):
        evaluation.places_of(2, ["cuda:0", "cuda:1"])


def test_graders_and_lengths_are_checked_before_a_weight_is_read(folders, data, tmp_path, monkeypatch, capsys):
    asked, load = [], evaluation.mdlm.load
    monkeypatch.setattr(evaluation.mdlm, "load", lambda folder, to, *rest: asked.append(to) or load(folder, "meta"))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "9" * 2000, "answer": "#### 1"}))
    assert evaluation.main(arguments(folders, long)) == 2
    assert "over 1024 of member 'llada'" in capsys.readouterr().err and {*asked} == {"meta"}
    evaluation._grader.cache_clear()
    monkeypatch.setattr(evaluation, "_GRADER", "raise ImportError")
    assert evaluation.main(arguments(folders, data)) == 2
    assert "pip install math-verify" in capsys.readouterr().err and {*asked} == {"meta"}


def test_members_alone_and_post_generation(folders, data, capsys):
    assert evaluation.main(arguments(folders, data, "--limit", 2, "--single", "--json")) == 0
    alone = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["paper"]) for row in alone] == [("member llada", 78.77), ("member dream", 78.39)]
    assert evaluation.main(arguments(folders, data, "--limit", 2, "--interval", 256)) == 0
    out = capsys.readouterr().out
    assert "post-generation" in out and "oracle" in out and "80.29" in out and "paper, own setting" in out


def test_other_questions_or_weights_are_other_results(folders, data, tmp_path, monkeypatch, capsys):
    """Under the same names and paths; also in the last bytes of a large file. The same ones may be moved."""
    copies = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    own = shutil.copy(data, tmp_path / "own.jsonl")
    line = arguments(copies, own, "--limit", 2, "--out", tmp_path / "out")
    assert evaluation.main(line) == 0
    text = Path(own).read_text()
    for changed in (text.replace("Tom", "Tim"), text.replace("#### ", "#### 1")):
        Path(own).write_text(changed)
        assert evaluation.main(line) == 2 and "differ in questions: give another --out" in capsys.readouterr().err
    Path(own).write_text(text)
    moved = {name: shutil.copytree(folder, tmp_path / f"moved-{name}") for name, folder in copies.items()}
    renamed = shutil.copy(own, tmp_path / "renamed.jsonl")
    line = arguments(moved, renamed, "--limit", 2, "--out", tmp_path / "out", "--batch-size", 1)
    with monkeypatch.context() as patch:  # their contents are what counts, and batches do not
        patch.setattr(evaluation, "decode_questions", lambda *_: pytest.fail("decoded anew"))
        assert evaluation.main(line) == 0
    assert evaluation.main(arguments(dict(reversed(copies.items())), own, "--limit", 2, "--out", tmp_path / "out")) == 2
    assert "differ in order of members: give another --out" in capsys.readouterr().err
    line = arguments(copies, own, "--limit", 2, "--out", tmp_path / "out")
    assert evaluation.main([*line, "--limit", "3"]) == 2
    assert "differ in questions: give another --out" in capsys.readouterr().err
    file = copies["dream"] / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {HEADS["dream"][1]: weights[HEADS["dream"][1]] + 1e-6}, file)
    assert evaluation.main(line) == 2 and "differ in weights of dream: give another --out" in capsys.readouterr().err
    save_file(weights, file)
    (copies["dream"] / "README.md").write_text("not read")
    assert evaluation.main(line) == 0


def test_a_fingerprint_is_of_names_sizes_heads_and_tails(tmp_path):
    size, part, file = 3 * 2**20, 2**20, tmp_path / "a.safetensors"

    def fingerprint(content):
        file.write_bytes(content)
        return evaluation.fingerprint(tmp_path)

    first = fingerprint(bytes(size))
    for place, seen in ((0, 1), (part - 1, 1), (part, 0), (size - part - 1, 0), (size - part, 1), (size - 1, 1)):
        assert (fingerprint(bytes(place) + b"x" + bytes(size - place - 1)) != first) == bool(seen)
    assert fingerprint(bytes(size + 1)) != first == fingerprint(bytes(size))
    (tmp_path / "generation_config.json").write_text("not read")
    assert evaluation.fingerprint(tmp_path) == first
    file.rename(tmp_path / "b.safetensors")
    assert evaluation.fingerprint(tmp_path) != first


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A cache of the Hub, as huggingface_hub keeps it, that holds TIE-org/tiny-dream; and no network."""
    cached, commit = tmp_path / "hub" / "models--TIE-org--tiny-dream", "0" * 40
    shutil.copytree(folders["dream"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cached / "snapshots" / commit


def test_a_member_by_its_name_on_the_hub(hub, folders, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluation.member_folder("TIE-org/tiny-dream") == hub
    line = arguments({**folders, "dream": "TIE-org/tiny-dream"}, data, "--limit", 2, "--json")
    assert evaluation.main(line) == 0
    by_name = json.loads(capsys.readouterr().out)
    assert by_name["settings"]["members"]["dream"] == "TIE-org/tiny-dream"
    assert evaluation.main(arguments(folders, data, "--limit", 2, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == by_name["rows"]
    Path("TIE-org").mkdir()
    shutil.copytree(folders["llada"], "TIE-org/tiny-dream")  # a folder here comes first
    assert evaluation.member_folder("TIE-org/tiny-dream") == Path("TIE-org/tiny-dream")


def test_only_what_is_read_is_fetched(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **more: asked.append((args, more)) or "there")
    assert evaluation.member_folder("org/name") == Path("there")
    [(args, more)] = asked
    assert args == ("org/name",) and {*more} == {"allow_patterns"}
    read = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer_config.json", "vocab.json", "merges.txt"]  # fmt: skip
    code = ["modeling_llada.py", "pytorch_model.bin"]
    assert [*huggingface_hub.utils.filter_repo_objects(read + code, **more)] == read


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize("error, words", [
    (errors.GatedRepoError("x", response=RESPONSE), "accept their terms"),
    (errors.RepositoryNotFoundError("x", response=RESPONSE), "no such model"),
    (errors.LocalEntryNotFoundError("first line\nsecond"), "cannot be reached"),
    (OSError("first line\nsecond"), "cannot be reached"),
    (OSError(), r"cannot be reached \(OSError: \)"),
    (Exception("407 Proxy Authentication Required"), "cannot be reached .*407"),  # of its HTTP library, no OSError
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_line(error, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(ValueError, match=f"^--members org/name: .*{words}.*\\Z"):
        evaluation.member_folder("org/name")


def test_models_of_one_vocabulary_share_a_codec(folders):
    members = {"a": folders["dream"], "b": folders["dream"], "c": folders["llada"]}
    twins = evaluation.real_members(members, ["cpu"] * 3, "bfloat16")
    assert all(member.denoise.embed.weight.dtype == torch.bfloat16 for member in twins)
    assert twins[0].codec is twins[1].codec is not twins[2].codec
