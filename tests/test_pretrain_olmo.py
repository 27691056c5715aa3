"""pretrain_olmo.py: a tiny model learns; killed and resumed it ends in the same bits; two processes give the losses of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, clean_environment

SCRIPT = "pretrain_olmo.py"
STEPS = 24  # over two epochs of 15 steps, so that a resumed run crosses the border as well
MODEL = {"d-model": 32, "n-layers": 2, "n-heads": 4, "n-kv-heads": 2, "mlp-hidden-size": 128, "sequence-length": 32}
RUN = {"steps": STEPS, "global-batch-size": 4, "micro-batch-size": 2, "warmup": 3, "learning-rate": 0.01, "precision": "fp32"}
EVERY = {"eval-every": 8, "eval-sequences": 8, "save-every": 6, "keep": 2}


def flags(**changes):
    """Return the flags of the tiny model, `changes` (underscores for hyphens) put in."""
    settings = MODEL | RUN | EVERY | {name.replace("_", "-"): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in settings.items()]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder):
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def weights(folder):
    import torch

    return torch.load(folder / f"step{STEPS}-unsharded" / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def data(run_script, tmp_path_factory):
    """[--input TOKENS, --tokenizer TOKENIZER] of a repetitive corpus of about 15 batches."""
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for i in range(60):
            text = f"the {i % 7} cats of the old house sat on the mat, {i} times. 學而時習之，不亦說乎？" * 2
            file.write(json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n")
    arguments = ("--input", folder / "documents.jsonl", "--held-out", 0.2)
    made = run_script("train_tokenizer.py", *arguments, "--output", folder / "tokenizer", "--vocab-size", 463)
    assert made.returncode == 0, made.stderr
    made = run_script("tokenize_corpus.py", *arguments, "--tokenizer", folder / "tokenizer", "--output", folder / "tokens")
    assert made.returncode == 0, made.stderr
    tokens = json.loads((folder / "tokens" / "tokens.json").read_text(encoding="utf-8"))
    assert 8 < tokens["train"]["tokens"] // 32 // 4 < STEPS - 4, "the run shall cross an epoch"
    return ["--input", folder / "tokens", "--tokenizer", folder / "tokenizer"]


@pytest.fixture(scope="module")
def undisturbed(data, run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    answer = run_script(SCRIPT, *data, "--output", folder, *flags())
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.mark.slow
def test_it_learns_and_says_so(undisturbed, data):
    """The held-out loss falls far; config.yaml has the tokenizer's ids; only the newest checkpoints are kept; samples are text."""
    import yaml

    tokens = json.loads((data[1] / "tokens.json").read_text(encoding="utf-8"))
    recorded = json.loads((undisturbed / "manifest.json").read_text(encoding="utf-8"))
    first, last = recorded["metrics"]["first"], recorded["metrics"]["last"]
    assert first["step"] == 0
    assert last["step"] == STEPS
    rows_of_embedding = -(-tokens["vocab_size"] // 128) * 128
    assert abs(first["held_out_loss"] - np.log(rows_of_embedding)) < 0.5  # untrained: near the uniform distribution
    assert last["held_out_loss"] < first["held_out_loss"] - 1
    assert f"{first['held_out_loss']:.2f} -> {last['held_out_loss']:.2f}" in recorded["summary"]
    assert [row["step"] for row in rows(undisturbed) if "held_out_loss" in row] == [0, 8, 16, 24]
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))
    assert sorted(path.name for path in undisturbed.glob("step*")) == ["step18-unsharded", "step24-unsharded"]
    assert not (undisturbed / "train_data").exists()
    model = yaml.safe_load((undisturbed / f"step{STEPS}-unsharded" / "config.yaml").read_text(encoding="utf-8"))["model"]
    assert {name: model[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")} == {
        name: tokens[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")
    }
    assert model["embedding_size"] == rows_of_embedding
    part = next(iter(tokens["held_out"]))
    bits = first["by_language"][part]["loss"] / np.log(2) * tokens["held_out"][part]["tokens"] / tokens["held_out"][part]["bytes"]
    assert first["by_language"][part]["bits_per_byte"] == pytest.approx(bits)
    samples = [json.loads(line) for line in (undisturbed / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples[0]["prompt"].startswith("the ")
    assert samples[0]["continuation"]


@pytest.mark.slow
def test_killed_stopped_and_resumed_is_bitwise_undisturbed(undisturbed, data, run_script, tmp_path):
    """SIGTERM, then kill -9, then a checkpoint that was cut: the weights and the losses are those of the undisturbed run."""
    import torch

    script, output = shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path), tmp_path / "run"
    command = [sys.executable, "-I", script, *map(str, data), "--output", str(output), *flags()]

    def interrupt(number, step):
        """Start the run and send it a signal once metrics.jsonl has a row of `step`."""
        with open(tmp_path / "stderr", "w", encoding="utf-8") as log:
            child = subprocess.Popen(command, env=clean_environment(), stderr=log)
        while child.poll() is None and not (output / "metrics.jsonl").exists():
            time.sleep(0.01)
        while child.poll() is None and max([*losses_so_far(output), 0]) < step:
            time.sleep(0.001)
        child.send_signal(number)
        return child.wait(), (tmp_path / "stderr").read_text(encoding="utf-8")

    def losses_so_far(folder):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [row["step"] for row in map(json.loads, lines) if "loss" in row]

    code, words = interrupt(signal.SIGTERM, 2)
    assert code == 143, words
    assert "the same command goes on from here" in words
    saved = max(int(path.name[4:-10]) for path in output.glob("step*-unsharded"))
    assert 2 <= saved < STEPS
    code, _ = interrupt(signal.SIGKILL, saved + 4)
    assert code == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    newest = max(output.glob("step*-unsharded"), key=lambda path: int(path.name[4:-10]))
    cut = shutil.copytree(newest, output / "step23-unsharded")  # looks newer, and lacks the end of its weights
    os.truncate(cut / "model.pt", (cut / "model.pt").stat().st_size - 4096)
    (output / "step22-unsharded-tmp").mkdir()
    answer = run_script(SCRIPT, *data, "--output", output, *flags())
    assert answer.returncode == 0, answer.stderr
    assert "step23-unsharded is not whole (model.pt); passed over" in answer.stderr
    expected, found = weights(undisturbed), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(output) == losses(undisturbed)
    assert [row for row in rows(output) if "held_out_loss" in row] == [row for row in rows(undisturbed) if "held_out_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(distributed, undisturbed, data, run_script, tmp_path):
    """A run of two gloo processes, begun from the middle of the one-process run for DDP, from the start for FSDP."""
    output = tmp_path / "run"
    if distributed == "ddp":  # as if the one-process run had been stopped after step 18
        shutil.copytree(undisturbed, output, symlinks=True, ignore=shutil.ignore_patterns(f"step{STEPS}*", "latest*", "samples*"))
        manifest = output / "manifest.json"
        manifest.rename(output / ".begun.json")
    answer = run_script(SCRIPT, *data, "--output", output, *flags(distributed=distributed), "--nproc-per-node=2")
    assert answer.returncode == 0, answer.stderr
    one, two = losses(undisturbed), losses(output)
    assert two.keys() == one.keys()
    np.testing.assert_allclose([two[step] for step in one], [*one.values()], rtol=0, atol=2e-4)
    assert json.loads((output / "manifest.json").read_text(encoding="utf-8"))["metrics"]["processes"] == 2
    expected, found = weights(undisturbed), weights(output)
    assert all((expected[name] - found[name]).abs().max() < 5e-3 for name in expected)


@pytest.mark.slow
def test_a_diverging_run_stops_with_a_sentence(data, run_script, tmp_path):
    answer = run_script(SCRIPT, *data, "--output", tmp_path / "run", *flags(learning_rate=1e30, warmup=0, clip=1e30))
    assert answer.returncode == 1
    assert "no number at step" in answer.stderr
    assert "--learning-rate" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
def test_second_run_and_changed_settings(undisturbed, data, run_script):
    answer = run_script(SCRIPT, *data, "--output", undisturbed, *flags())
    assert answer.returncode == 0
    assert "up to date" in answer.stderr
    answer = run_script(SCRIPT, *data, "--output", undisturbed, *flags(seed=2))
    assert answer.returncode == 3
    assert "seed was 1, is 2" in answer.stderr


def test_tokens_that_do_not_fit_are_refused(data, run_script, tmp_path):
    """Before anything heavy is loaded: a cut map, ids of another tokenizer, no tokens.json, too little text."""
    cut = shutil.copytree(data[1], tmp_path / "cut")
    os.truncate(cut / "train.npy", 1000)
    other = shutil.copytree(data[3], tmp_path / "other")
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    none, broken = tmp_path / "none", tmp_path / "broken"
    broken.mkdir()
    (broken / "tokens.json").write_text('{"dtype": "uint16"}', encoding="utf-8")
    cases = [
        (cut, data[3], "train.npy has 1000 bytes", []),
        (data[1], other, "did not write the ids", []),
        (none, data[3], "tokens.json: No such file", []),
        (broken, data[3], "not written by tokenize_corpus.py", []),
        (data[1], data[3], "do not fill a batch", ["--global-batch-size=4000"]),
    ]
    for tokens, tokenizer, words, more in cases:
        answer = run_script(SCRIPT, "--input", tokens, "--tokenizer", tokenizer, "--output", tmp_path / "out", *flags(), *more)
        assert answer.returncode == 1
        assert words in answer.stderr
        assert "Traceback" not in answer.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [["--n-heads=5"], ["--n-kv-heads=3"], ["--micro-batch-size=3"], ["--tokens=1000"], ["--flash-attention"], ["--nproc-per-node=3"]],
)
def test_settings_that_cannot_work_are_usage_errors(wrong, data, run_script, tmp_path):
    answer = run_script(SCRIPT, *data, "--output", tmp_path / "out", *flags(), *wrong)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_engine(load_script, data):
    """The recipe's keys become olmo's: the GPU settings are resolved here though no GPU is there."""
    pytest.importorskip("olmo")
    script = load_script(SCRIPT)
    arguments = [*map(str, data), "--output=o", *flags(tokens=10_000, n_kv_heads=2, z_loss=1e-4)]
    arguments = [word for word in arguments if not word.startswith("--steps")] + ["--compile", "--distributed=fsdp", "--precision=amp_bf16"]
    args = script.checked(script.build_parser(), arguments)
    assert args.steps == 79  # 10,000 / (4 × 32), rounded up
    config = script.train_config(args, script.read_tokens(args.input, args.tokenizer), 2, cuda=True)
    assert (config.model.n_kv_heads, config.model.norm_after, str(config.model.layer_norm_type)) == (2, True, "rms")
    assert (config.device_train_batch_size, config.device_train_grad_accum) == (2, 1)
    assert (str(config.distributed_strategy), str(config.fsdp.wrapping_strategy), config.ddp) == ("fsdp", "by_block", None)
    assert (config.compile.backend, config.precision, config.data.num_workers) == ("inductor", "amp_bf16", 4)
    assert config.softmax_auxiliary_loss
    assert config.stop_at == 79
