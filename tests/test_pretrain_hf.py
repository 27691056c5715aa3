"""scripts/pretrain_hf.py on a corpus made here: two gloo processes under ZeRO-2 against one process, killed and resumed, and refusals."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clean_environment

SIZES = ["--d-model", 32, "--n-layers", 2, "--n-heads", 2, "--mlp-hidden-size", 64, "--sequence-length", 32, "--rope-theta", 10000]
RUN = ["--steps", 12, "--global-batch-size", 8, "--micro-batch-size", 4, "--learning-rate", 0.01, "--warmup", 2, "--precision", "fp32"]
RUN += ["--eval-every", 6, "--eval-sequences", 16, "--save-every", 4]
ONE, TWO = ["--deepspeed", "none"], ["--deepspeed", "zero2", "--nproc-per-node", 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with tokenizer/ and tokens/ as those stages write them: sentences of a small grammar, two languages held out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(1)
    words = {"latin": ["the", "cat", "dog", "sees", "a", "red", "house"], "cjk": ["猫", "狗", "看", "见", "红", "房", "子"]}

    def text(language):
        at, out = 0, []
        for _ in range(40):
            out.append(words[language][at])
            at = (at + chance.choice((1, 1, 1, 2))) % len(words[language])
        return " ".join(out)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text(language) for language in words for _ in range(20)], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(named))
    described = {"dtype": "uint16", "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0, "pad_token_id": 1}
    described["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "tokens").mkdir()

    def part(name, texts):
        ids = np.array([i for t in texts for i in (*tokenizer.encode(t).ids, 0)], np.uint16)
        ids.tofile(folder / "tokens" / f"{name}.npy")
        return {"file": f"{name}.npy", "documents": len(texts), "tokens": len(ids), "bytes": sum(len(t.encode()) for t in texts)}

    described["train"] = part("train", [text(language) for _ in range(100) for language in words])
    described["held_out"] = {language: part(f"held-out.{language}", [text(language) for _ in range(10)]) for language in words}
    (folder / "tokens" / "tokens.json").write_text(json.dumps(described))
    return folder


def words_of(corpus, output, *more):
    return ["--input", corpus / "tokens", "--tokenizer", corpus / "tokenizer", "--output", output, *SIZES, *RUN, *more]


def rows_of(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def one(corpus, run_script, tmp_path_factory):
    """OUTPUT of an undisturbed run in one process, without DeepSpeed."""
    output = tmp_path_factory.mktemp("one") / "out"
    done = run_script("pretrain_hf.py", *words_of(corpus, output, *ONE))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def two(corpus, run_script, tmp_path_factory):
    """OUTPUT of two processes under ZeRO-2 whose launcher was killed after step 6, and which was then told to go on."""
    output = tmp_path_factory.mktemp("two") / "out"
    command = [sys.executable, ROOT / "scripts" / "pretrain_hf.py", *words_of(corpus, output, *TWO)]
    running = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, env=clean_environment())
    while running.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.05)
    while running.poll() is None and '"step": 6,' not in (output / "metrics.jsonl").read_text():
        time.sleep(0.005)
    children = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    running.kill()
    assert running.wait() == -signal.SIGKILL and len(children) >= 2
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not alive, "processes outlive their launcher"
    assert not (output / "manifest.json").exists() and (output / "checkpoint-4").is_dir() and not (output / "checkpoint-12").exists()
    (output / "checkpoint-8").mkdir(exist_ok=True)  # one that was cut short: it must be passed over
    (output / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8')
    done = run_script("pretrain_hf.py", *words_of(corpus, output, *TWO))
    assert done.returncode == 0 and "checkpoint-8 is not whole" in done.stderr, done.stderr
    return output


@pytest.mark.slow
def test_the_loss_falls_and_the_model_is_what_was_trained(corpus, one):
    """OUTPUT/model, loaded by itself, has the held-out loss that the last evaluation gave, and the ids of the tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads((one / "manifest.json").read_text())
    first, last = manifest["metrics"]["first"], manifest["metrics"]["last"]
    assert first["step"] == 0 and last["step"] == 12
    assert abs(first["held_out_loss"] - math.log(384)) < 0.1 and last["held_out_loss"] < first["held_out_loss"] - 0.5
    assert manifest["counts"] == {
        "parameters": 2 * 384 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 32 + 4 * 32) + 32,
        "steps": 12,
        "tokens": 12 * 8 * 32,
    }
    model, loaded = AutoModelForCausalLM.from_pretrained(one / "model", output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, nats, bits = json.loads((corpus / "tokens" / "tokens.json").read_text()), 0.0, 0
    for name, part in tokens["held_out"].items():
        ids = torch.from_numpy(np.fromfile(corpus / "tokens" / part["file"], np.uint16)[: 8 * 32].astype(np.int64)).reshape(8, 32)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert math.isclose(loss, last["by_language"][name]["loss"], rel_tol=1e-4)
        nats, bits = nats + loss * part["tokens"], bits + math.log(2) * part["bytes"]
    assert math.isclose(nats / bits, last["bits_per_byte"], rel_tol=1e-4)
    assert model.config.use_cache and model.generation_config.eos_token_id == 0 and model.generation_config.pad_token_id == 1
    text = "the red house 猫 <|endoftext|>"
    assert (
        AutoTokenizer.from_pretrained(one / "model")(text)["input_ids"]
        == Tokenizer.from_file(str(one / "model" / "tokenizer.json")).encode(text).ids
    )
    assert {p.suffix for p in (one / "model").iterdir()} <= {".json", ".safetensors"}, "nothing in it that runs code when it is loaded"


@pytest.mark.slow
def test_killed_and_resumed_processes_under_zero_give_what_one_gives(one, two):
    from safetensors.numpy import load_file

    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in a.keys() - {"by_language"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-9), (key, a, b)
    a, b = load_file(one / "model" / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    assert max(np.abs(a[name] - b[name]).max() for name in a) < 2e-4, "weights, of a size of 0.02 and more"
    assert sorted(p.name for p in two.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.slow
def test_again_and_with_other_settings(corpus, one, run_script):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in one.rglob("*") if p.is_file() and p.name != "manifest.json"}
    done = run_script("pretrain_hf.py", *words_of(corpus, one, *ONE))
    assert done.returncode == 0 and "up to date" in done.stderr
    done = run_script("pretrain_hf.py", *words_of(corpus, one, *ONE, "--learning-rate", 0.02))
    assert done.returncode == 3 and "learning_rate was 0.01, is 0.02" in done.stderr
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}


@pytest.mark.slow
def test_any_model_and_a_run_that_diverges(corpus, run_script, tmp_path):
    """A Llama of a config.json; at a learning rate far too high the loss is no number, and that is said before anything counts as whole."""
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_script(
        "pretrain_hf.py", *words_of(corpus, tmp_path / "out", *ONE, "--model-config", tmp_path / "config.json", "--learning-rate", 1e30)
    )
    assert done.returncode == 1 and "the loss is no number at step" in done.stderr and "--learning-rate" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "manifest.json").exists()
    saved = rows_of(tmp_path / "out")
    assert saved[0]["step"] == 0 and abs(saved[0]["held_out_loss"] - math.log(384)) < 0.1


REFUSALS = {
    "--steps or --tokens": (2, ["--tokens", 1e6], None),
    "multiple of 1 processes": (2, ["--global-batch-size", 6], None),
    "--n-heads must divide": (2, ["--n-heads", 3], None),
    "neither zero1": (2, ["--deepspeed", "zero4"], None),
    "do not fill a batch": (1, ["--sequence-length", 100_000], None),
    "did not write the ids": (1, [], lambda c: (c / "tokenizer/tokenizer.json").write_text("{}")),
    "tokenizer.json: No such file": (1, [], lambda c: shutil.rmtree(c / "tokenizer")),
    "tokens.json: No such file": (1, [], lambda c: (c / "tokens/tokens.json").unlink()),
    "not written by tokenize_corpus.py": (1, [], lambda c: (c / "tokens/tokens.json").write_bytes(b"\x93NUMPY\x01")),
    "train.npy has 100 bytes": (1, [], lambda c: os.truncate(c / "tokens/train.npy", 100)),
    "held-out.cjk.npy has 0 bytes": (1, [], lambda c: (c / "tokens/held-out.cjk.npy").unlink()),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_be_trained_is_said_at_once(corpus, run_script, tmp_path, words):
    code, more, damage = REFUSALS[words]
    shutil.copytree(corpus, tmp_path / "corpus")
    if damage:
        damage(tmp_path / "corpus")
    done = run_script("pretrain_hf.py", *words_of(tmp_path / "corpus", tmp_path / "out", *ONE, *more))
    assert done.returncode == code and words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_config_that_is_none(corpus, run_script, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "out", *ONE, "--model-config", tmp_path / "config.json"))
    assert done.returncode == 1 and "config.json: no configuration" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_recipe_is_accepted(corpus, run_script, tmp_path):
    done = run_script(
        "pretrain_hf.py", "--config", ROOT / "recipes/demo/pretrain-hf.yaml", *words_of(corpus, tmp_path / "out")[:6], "--tokens", 5
    )
    assert done.returncode == 2 and "--steps or --tokens" in done.stderr
