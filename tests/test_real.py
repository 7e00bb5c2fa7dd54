"""The whole command on folders of real layouts: a LLaDA and a Dream, tiny, with random weights and own tokenizers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
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


def test_two_processes_share_the_questions(folders, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, ROOT / "eval.py", *arguments(folders, data, "--out", tmp_path, "--json")],
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.glob("*.jsonl")) == [
        "tie-token_change_count.0.jsonl", "tie-token_change_count.1.jsonl",
    ]  # fmt: skip
    assert len({json.loads(row)["id"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == 10
    assert json.loads((tmp_path / "summary.json").read_text())["problems"] == 10


def test_members_alone_and_post_generation(folders, data, capsys):
    assert evaluation.main(arguments(folders, data, "--limit", 2, "--single", "--json")) == 0
    alone = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["paper"]) for row in alone] == [("member llada", 78.77), ("member dream", 78.39)]
    assert evaluation.main(arguments(folders, data, "--limit", 2, "--interval", 256)) == 0
    out = capsys.readouterr().out
    assert "post-generation" in out and "oracle" in out and "80.29" in out


def test_models_of_one_vocabulary_share_a_codec(folders):
    members = {"a": folders["dream"], "b": folders["dream"], "c": folders["llada"]}
    twins = evaluation.real_members(members, ["cpu"] * 3, "bfloat16")
    assert all(member.denoise.embed.weight.dtype == torch.bfloat16 for member in twins)
    assert twins[0].codec is twins[1].codec is not twins[2].codec
