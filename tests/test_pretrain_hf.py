"""scripts/pretrain_hf.py on a corpus made here: three families of models, two gloo processes under ZeRO against one process, runs that
are killed, stopped and resumed, and refusals."""

import csv
import gzip
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
        ends = np.flatnonzero(ids == 0) + 1
        with gzip.open(folder / "tokens" / f"{name}.csv.gz", "wt") as file:
            csv.writer(file).writerows(
                [[start, end, f"{name}-{n}", "made", n] for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
            )
        return {"file": f"{name}.npy", "documents": len(texts), "tokens": len(ids), "bytes": sum(len(t.encode()) for t in texts)}

    described["train"] = part("train", [text(language) for _ in range(100) for language in words])
    described["held_out"] = {language: part(f"held-out.{language}", [text(language) for _ in range(10)]) for language in words}
    (folder / "tokens" / "tokens.json").write_text(json.dumps(described))
    return folder


def words_of(corpus, output, *more):
    return ["--input", corpus / "tokens", "--tokenizer", corpus / "tokenizer", "--output", output, *SIZES, *RUN, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(output):
    """The rows of metrics.jsonl without what a clock has measured."""
    timed = {"tokens_per_second", "mfu", "eta_seconds"}
    return [{key: value for key, value in row.items() if key not in timed} for row in lines(output / "metrics.jsonl")]


def stop_at(step, how, command, output):
    """Start a run, send it a signal once metrics.jsonl has a row of `step`, and return its exit code and standard error."""
    with open(output.with_name(f"{output.name}.log"), "w+") as log:
        running = subprocess.Popen(list(map(str, command)), stderr=log, env=clean_environment())
        rows = output / "metrics.jsonl"
        while running.poll() is None and not (rows.exists() and f'"step": {step},' in rows.read_text()):
            time.sleep(0.005)
        running.send_signal(how)
        code = running.wait()
        log.seek(0)
        return code, log.read()


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
    rows = lines(one / "metrics.jsonl")
    table = list(csv.DictReader((one / "metrics.csv").open()))
    assert [float(row["loss"]) for row in table if row["loss"]] == [row["loss"] for row in rows if "loss" in row]
    assert float(table[0]["bits_per_byte"]) == first["bits_per_byte"]
    assert (one / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(0 < row["mfu"] < 1 and row["eta_seconds"] >= 0 for row in rows if "loss" in row)
    samples = lines(one / "samples.jsonl")
    assert [(sample["step"], sample["language"]) for sample in samples] == [(s, name) for s in (0, 6, 12) for name in ("latin", "cjk")]
    assert all(sample["prompt"] and sample["continuation"] for sample in samples)


@pytest.mark.slow
def test_killed_and_resumed_processes_under_zero_give_what_one_gives(one, two):
    from safetensors.numpy import load_file

    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in a.keys() - {"by_language", "by_source"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-9), (key, a, b)
    a, b = load_file(one / "model" / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert a.keys() == b.keys()
    assert max(np.abs(a[name] - b[name]).max() for name in a) < 2e-4, "weights, of a size of 0.02 and more"
    assert sorted(p.name for p in two.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_the_other_stages_of_zero_give_what_one_process_gives(corpus, one, run_script, tmp_path, stage):
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "out", "--deepspeed", stage, "--nproc-per-node", 2))
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows_of(one), rows_of(tmp_path / "out"), strict=True):
        for key in a.keys() - {"by_language", "by_source"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-9), (key, a, b)


@pytest.mark.slow
def test_weights_are_gone_on_from_by_their_own_tokenizer_only(corpus, one, run_script, tmp_path):
    last = lines(one / "metrics.jsonl")[-1]
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "out", *ONE, "--model", one / "model", "--steps", 2))
    assert done.returncode == 0, done.stderr
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["step"] == 0 and math.isclose(first["held_out_loss"], last["held_out_loss"], rel_tol=1e-5)
    assert (tmp_path / "out/model/tokenizer.json").read_bytes() == (corpus / "tokenizer/tokenizer.json").read_bytes()
    shutil.copytree(one / "model", tmp_path / "other")
    other = json.loads((tmp_path / "other/tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(other))
    for model, more, words in (
        (tmp_path / "other", [], "does not write the ids"),
        (one / "model", ["--objective", "masked"], "a olmo2 cannot learn by --objective masked; choose of: causal"),
        (corpus / "tokenizer", [], "no configuration"),
    ):
        done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "no", *ONE, "--overwrite", "--model", model, *more))
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


FAMILIES = {
    "masked": {"model_type": "modernbert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    "span": {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.1},
}
FAMILIES["masked"] |= {"local_attention": 16, "mlp_dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("objective", FAMILIES)
def test_a_family_learns_is_stopped_goes_on_and_loads(corpus, run_script, load_script, tmp_path, objective):
    """The encoder on a mixture, killed twice; the encoder-decoder stopped by SIGTERM: metrics and weights of an undisturbed run, to the
    bit, with dropout. The exported folder has the held-out loss of the last evaluation, and every text the ids it had."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[objective]))
    shutil.copytree(corpus / "tokens", tmp_path / "more")
    mixture = ["--input", corpus / "tokens", tmp_path / "more", "--weights", 3, 1] if objective == "masked" else []
    more = [*ONE, "--model-config", tmp_path / "config.json", "--steps", 60, "--eval-every", 30, "--save-every", 7, *mixture]
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "whole", *more))
    assert done.returncode == 0, done.stderr
    command = [sys.executable, ROOT / "scripts" / "pretrain_hf.py", *words_of(corpus, tmp_path / "cut", *more)]
    if objective == "masked":
        for step in sorted(random.sample(range(8, 56), 2)):
            code, words = stop_at(step, signal.SIGKILL, command, tmp_path / "cut")
            assert code == -signal.SIGKILL, words
    else:
        code, words = stop_at(random.randrange(8, 50), signal.SIGTERM, command, tmp_path / "cut")
        assert code == 143 and "checkpoint saved; the same command goes on from here" in words, words
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "cut", *more))
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    assert lines(tmp_path / "whole/samples.jsonl") == lines(tmp_path / "cut/samples.jsonl")
    weights, others = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert weights.keys() == others.keys() and all(np.array_equal(weights[name], others[name]) for name in weights)

    manifest = json.loads((tmp_path / "whole/manifest.json").read_text())
    first, last = manifest["metrics"]["first"], manifest["metrics"]["last"]
    assert last["held_out_loss"] < first["held_out_loss"] - 0.5 and "bits_per_byte" not in last
    assert len(last["by_source"]) == (2 if mixture else 1)
    script, ours = load_script("pretrain_hf.py"), transformers.AutoTokenizer.from_pretrained(tmp_path / "whole/model")
    model = getattr(transformers, script.HEADS[objective]).from_pretrained(tmp_path / "whole/model")
    assert manifest["counts"]["parameters"] == model.num_parameters()
    text = "the red house 猫"
    assert ours(text)["input_ids"] == transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")(text)["input_ids"]
    if objective == "masked":
        assert ours.mask_token == "<|mask|>" and ours.mask_token_id == ours("<|mask|>")["input_ids"][0]
        make = script.functools.partial(script.masked, special=[0, 1], mask=ours.mask_token_id, vocabulary=ours.mask_token_id)
    else:
        sentinels = np.array(ours.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]))
        assert sentinels[99] - sentinels[0] == 99 and model.config.decoder_start_token_id == 1
        make = script.functools.partial(script.span, sentinels=sentinels, end=0)
    described = json.loads((corpus / "tokens/tokens.json").read_text())
    for language, part in described["held_out"].items():
        rows = script.Sequences(corpus / "tokens" / part["file"], "uint16", 32).read(range(4 if mixture else 8))
        batch = script.collate([make(ids, np.random.default_rng((1, place))) for place, ids in enumerate(rows)])
        with torch.no_grad():
            assert math.isclose(model(**batch).loss.item(), last["by_language"][language]["loss"], rel_tol=1e-4)


@pytest.mark.slow
def test_a_leap_of_the_loss_names_its_documents_and_can_be_skipped(corpus, run_script, load_script, tmp_path):
    """The sequences of batch 40, within the first epoch, are noise: the run stops there, names its documents, and goes on without it."""
    shutil.copytree(corpus, tmp_path / "corpus")
    script, path = load_script("pretrain_hf.py"), tmp_path / "corpus/tokens/train.npy"
    bad = script.Batches([script.Sequences(path, "uint16", 32)], None, 8, 1).rows(40)[1]
    ids = np.fromfile(path, np.uint16)
    ids[: len(ids) // 32 * 32].reshape(-1, 32)[bad] = np.random.default_rng(1).integers(2, 250, (8, 32))
    ids.tofile(path)
    words = words_of(
        tmp_path / "corpus", tmp_path / "out", *ONE, "--steps", 42, "--eval-every", 42, "--save-every", 30, "--schedule", "wsd"
    )
    done = run_script("pretrain_hf.py", *words)
    assert done.returncode == 1 and "at step 40; batch 40" in done.stderr and "--skip-batches 40," in done.stderr, done.stderr
    named = lines(tmp_path / "out/suspects.jsonl")
    assert {entry["sequence"] for entry in named} == set(bad.tolist())
    for entry in named:
        assert entry["start"] < (entry["sequence"] + 1) * 32 and entry["end"] > entry["sequence"] * 32 and entry["id"].startswith("train-")
        assert entry["file"] == str(path)
    done = run_script("pretrain_hf.py", *words, "--skip-batches", 40)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "out") if "loss" in row] == list(range(1, 43))


@pytest.mark.slow
def test_the_plan_is_computed_beforehand_and_what_cannot_fit_is_refused(corpus, run_script, tmp_path):
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "out", "--dry-run", "--machine", "2xH100", "--price", 2))
    assert done.returncode == 0, done.stderr
    planned, layer = json.loads(done.stdout), 4 * 32 * 32 + 3 * 32 * 32
    assert planned["parameters"] == 2 * 384 * 32 + 2 * (layer + 4 * 32) + 32
    attention = 2 * 2 * 2 * 32 * 32  # for a token: two products with 32 others, of width 32, in two layers
    assert math.isclose(planned["flops_per_token"], 6 * (384 * 32 + 2 * layer) + 3 * attention, rel_tol=0.05), planned
    assert planned["memory"]["states"] == planned["parameters"] * (4 + 4 / 2 + 16 / 2) and planned["cost"] == 4 * planned["hours"] > 0
    assert not (tmp_path / "out").exists()
    big = ["--d-model", 16384, "--n-heads", 128, "--mlp-hidden-size", 65536, "--n-layers", 40]
    done = run_script("pretrain_hf.py", *words_of(corpus, tmp_path / "out", *ONE, *big))
    assert done.returncode == 1 and "each process needs about" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_masks_are_exact_and_a_matter_of_seed_and_place(load_script):
    script = load_script("pretrain_hf.py")
    ids = np.random.default_rng(1).integers(2, 90, 1000)
    ids[::10] = 0
    made = [script.masked(ids, np.random.default_rng((1, place)), [0, 1], 99, 90) for place in (5, 5, 6)]
    assert np.array_equal(made[0]["input_ids"], made[1]["input_ids"]) and not np.array_equal(made[0]["labels"], made[2]["labels"])
    inputs, labels = made[0]["input_ids"], made[0]["labels"]
    learnt = labels != -100
    assert learnt.sum() == 150 and np.array_equal(labels[learnt], ids[learnt]) and not (labels == 0).any()
    assert np.array_equal(inputs[~learnt], ids[~learnt]) and (inputs == 99).sum() == 120
    assert 15 <= (inputs == ids)[learnt].sum() <= 18, "a tenth is left, and one or two are exchanged for themselves"


def test_spans_and_what_stands_for_them_are_the_text(load_script):
    script = load_script("pretrain_hf.py")
    sentinels = np.arange(500, 600)
    for place, length in enumerate([8, 33, 128, 512, 513] * 20):
        ids = np.random.default_rng(place).integers(2, 400, length)
        made = script.span(ids, np.random.default_rng((1, place)), sentinels, 0)
        noise, spans = script.spans_of(length)
        assert len(made["input_ids"]) == length - noise + spans + 1 and len(made["labels"]) == noise + spans + 1
        assert made["input_ids"][-1] == made["labels"][-1] == 0
        hidden = np.split(made["labels"][:-1], np.flatnonzero(made["labels"] >= 500))[1:]
        assert all(len(part) > 1 for part in hidden)
        stands = {part[0]: part[1:] for part in hidden}
        assert np.array_equal(np.concatenate([stands.get(i, [i]) for i in made["input_ids"][:-1]]), ids)


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
    "each of the 1 folders": (2, ["--weights", 1, 2], None),
    "--model or --model-config": (2, ["--model", "a", "--model-config", "b"], None),
    "x and one of": (2, ["--machine", "8xH99"], None),
    "flash-attn is not installed": (2, ["--flash-attention"], None),
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


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*/pretrain-[hms]*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipe_is_accepted(corpus, run_script, tmp_path, recipe):
    done = run_script("pretrain_hf.py", "--config", recipe, *words_of(corpus, tmp_path / "out")[:6], "--tokens", 5, "--steps", 5)
    assert done.returncode == 2 and "--steps or --tokens" in done.stderr
