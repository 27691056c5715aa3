"""pretrain_olmo.py: a tiny model learns; killed and resumed it ends in the same bits; several processes give the losses of one."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, clean_environment

SCRIPT = "pretrain_olmo.py"
STEPS = 24  # over two epochs of 15 steps, so that a resumed run crosses the border as well
MODEL = {"d-model": 32, "n-layers": 2, "n-heads": 4, "n-kv-heads": 2, "mlp-hidden-size": 128, "sequence-length": 32}
RUN = {"steps": STEPS, "global-batch-size": 4, "micro-batch-size": 2, "warmup": 3, "learning-rate": 0.01, "precision": "fp32"}
EVERY = {"eval-every": 8, "eval-sequences": 8, "save-every": 6, "keep": 2}
FOLDER = {"olmo": "step{}-unsharded", "olmo-core": "step{}"}
every_engine = pytest.mark.parametrize("engine", sorted(FOLDER))


def flags(**changes):
    """Return the flags of the tiny model, `changes` (underscores for hyphens) put in."""
    settings = MODEL | RUN | EVERY | {name.replace("_", "-"): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in settings.items()]


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def losses(folder):
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def weights(folder, engine):
    """Return the tensors of the last checkpoint: weights and, of olmo-core, the optimizer's."""
    import torch

    path = folder / FOLDER[engine].format(STEPS)
    if engine == "olmo":
        return torch.load(path / "model.pt", weights_only=True)
    from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_keys

    kept = get_checkpoint_metadata(str(path / "model_and_optim")).state_dict_metadata
    names = [name for name in kept if hasattr(kept[name], "size")]
    return dict(zip(names, load_keys(str(path / "model_and_optim"), names), strict=True))


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(run_script, tmp_path_factory):
    """[--input TOKENS, --tokenizer TOKENIZER] of a repetitive corpus of about 15 batches."""
    folder = tmp_path_factory.mktemp("data")
    text = "the {} cats of the old house sat on the mat, {} times. 學而時習之，不亦說乎？"
    write_documents(folder / "documents.jsonl", [(str(i), text.format(i % 7, i) * 2) for i in range(60)])
    arguments = ("--input", folder / "documents.jsonl", "--held-out", 0.2)
    made = run_script("train_tokenizer.py", *arguments, "--output", folder / "tokenizer", "--vocab-size", 463)
    assert made.returncode == 0, made.stderr
    made = run_script("tokenize_corpus.py", *arguments, "--tokenizer", folder / "tokenizer", "--output", folder / "tokens")
    assert made.returncode == 0, made.stderr
    tokens = json.loads((folder / "tokens" / "tokens.json").read_text(encoding="utf-8"))
    assert 8 < tokens["train"]["tokens"] // 32 // 4 < STEPS - 4, "the run shall cross an epoch"
    return ["--input", folder / "tokens", "--tokenizer", folder / "tokenizer"]


@pytest.fixture(scope="module")
def noise(data, run_script, tmp_path_factory):
    """A second folder of tokens: one long document of random letters, and one that is held out."""
    folder = tmp_path_factory.mktemp("noise")
    letters = np.random.default_rng(0).choice(list("qxzjkvw*#%&"), 4000)
    texts = [("junk", "".join(letters)), *((f"more-{i}", "".join(letters[i * 99 : i * 99 + 99])) for i in range(20))]
    source = write_documents(folder / "noise.jsonl", texts)
    made = run_script("tokenize_corpus.py", "--input", source, "--held-out", 0.3, "--tokenizer", data[3], "--output", folder / "tokens")
    assert made.returncode == 0, made.stderr
    return folder / "tokens"


@pytest.fixture(scope="module")
def undisturbed(data, run_script, tmp_path_factory):
    """undisturbed(engine): the folder of a run of one process; made once."""
    made = {}

    def run(engine):
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp("undisturbed") / "run"
            answer = run_script(SCRIPT, *data, "--output", made[engine], *flags(engine=engine))
            assert answer.returncode == 0, answer.stderr
        return made[engine]

    return run


@pytest.mark.slow
@every_engine
def test_it_learns_and_says_so(engine, undisturbed, data):
    """The held-out loss falls far; the checkpoint has the tokenizer's ids; only the newest are kept; samples are text; there is a plot."""
    import yaml

    undisturbed = undisturbed(engine)
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
    assert sorted(path.name for path in undisturbed.glob("step*")) == [FOLDER[engine].format(step) for step in (18, 24)]
    checkpoint = undisturbed / FOLDER[engine].format(STEPS)
    ids = {name: tokens[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    if engine == "olmo":
        model = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))["model"]
        assert {name: model[name] for name in ids} == ids
        assert model["embedding_size"] == rows_of_embedding
    else:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        assert config["dataset"]["tokenizer"] == ids
        assert config["model"]["vocab_size"] == rows_of_embedding
    part = next(iter(tokens["held_out"]))
    bits = first["by_language"][part]["loss"] / np.log(2) * tokens["held_out"][part]["tokens"] / tokens["held_out"][part]["bytes"]
    assert first["by_language"][part]["bits_per_byte"] == pytest.approx(bits)
    assert first["by_source"] == {str(data[1]): {"loss": first["held_out_loss"], "bits_per_byte": first["bits_per_byte"]}}
    samples = rows(undisturbed, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 8, 8, 16, 16, 24, 24]
    assert samples[0]["prompt"].startswith("the ")
    assert samples[0]["continuation"]
    with open(undisturbed / "metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {int(row["step"]): float(row["loss"]) for row in table if row["loss"]} == losses(undisturbed)
    assert [row["bits_per_byte"] for row in table if row["step"] == "24" and not row["loss"]] == [str(last["bits_per_byte"])]
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < recorded["metrics"]["mfu"] < 1
    assert rows(undisturbed)[-2]["eta_seconds"] == 0


@pytest.mark.slow
@every_engine
def test_killed_stopped_and_resumed_is_bitwise_undisturbed(engine, undisturbed, data, run_script, tmp_path):
    """SIGTERM, then kill -9, then a checkpoint that was cut: the weights and the losses are those of the undisturbed run."""
    import torch

    undisturbed = undisturbed(engine)
    script, output = shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path), tmp_path / "run"
    command = [sys.executable, "-I", script, *map(str, data), "--output", str(output), *flags(engine=engine)]

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

    def steps_saved():
        return [step for step in range(STEPS) if (output / FOLDER[engine].format(step)).exists()]

    code, words = interrupt(signal.SIGTERM, 2)
    assert code == 143, words
    assert "the same command goes on from here" in words
    saved = max(steps_saved())
    assert 2 <= saved < STEPS
    code, _ = interrupt(signal.SIGKILL, saved + 4)
    assert code == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    cut = shutil.copytree(output / FOLDER[engine].format(max(steps_saved())), output / FOLDER[engine].format(23))  # looks newer
    damaged = next(path for path in (cut / "model.pt", *cut.glob("model_and_optim/*.distcp")) if path.exists())
    os.truncate(damaged, damaged.stat().st_size - 4096)  # the end of its weights
    (output / (FOLDER[engine].format(22) + "-tmp")).mkdir()
    answer = run_script(SCRIPT, *data, "--output", output, *flags(engine=engine))
    assert answer.returncode == 0, answer.stderr
    assert f"{cut.name} is not whole ({damaged.name}); passed over" in answer.stderr
    expected, found = weights(undisturbed, engine), weights(output, engine)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(output) == losses(undisturbed)
    assert [row for row in rows(output) if "held_out_loss" in row] == [row for row in rows(undisturbed) if "held_out_loss" in row]
    assert rows(output, "samples.jsonl") == rows(undisturbed, "samples.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "distributed"), [("olmo", "ddp"), ("olmo", "fsdp"), ("olmo-core", "ddp"), ("olmo-core", "fsdp")])
def test_one_process_and_two_give_the_same_losses(engine, distributed, undisturbed, data, run_script, tmp_path):
    """DDP: a run of one process goes on with two. FSDP: two from the start, and the last six steps with one."""
    output, undisturbed = tmp_path / "run", undisturbed(engine)

    def stopped_after_18(source):
        last = FOLDER[engine].format(STEPS)
        shutil.copytree(source, output, symlinks=True, ignore=shutil.ignore_patterns(f"{last}*", "latest*"))
        (output / "manifest.json").rename(output / ".begun.json")

    def run(processes):
        words = flags(engine=engine, distributed=distributed, nproc_per_node=processes)
        answer = run_script(SCRIPT, *data, "--output", output, *words)
        assert answer.returncode == 0, answer.stderr
        one, other = losses(undisturbed), losses(output)
        assert other.keys() == one.keys()
        np.testing.assert_allclose([other[step] for step in one], [*one.values()], rtol=0, atol=1e-5)
        assert json.loads((output / "manifest.json").read_text(encoding="utf-8"))["metrics"]["processes"] == processes

    if distributed == "ddp":
        stopped_after_18(undisturbed)
        run(2)
    else:
        run(2)
        stopped_after_18(output.rename(tmp_path / "two"))
        run(1)


@pytest.mark.slow
def test_a_diverging_run_stops_with_a_sentence(data, run_script, tmp_path):
    settings = flags(engine="olmo-core", learning_rate=1e30, warmup=0, clip=1e30, spike=0)
    answer = run_script(SCRIPT, *data, "--output", tmp_path / "run", *settings)
    assert answer.returncode == 1
    assert "the loss is no number to go on with" in answer.stderr
    assert "--learning-rate" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert not list((tmp_path / "run").glob("step*"))
    assert len({entry["id"] for entry in rows(tmp_path / "run", "suspects.jsonl")}) >= 4  # a batch has four sequences


@pytest.mark.slow
@every_engine
def test_a_jump_of_the_loss_names_its_documents_and_the_run_goes_on_without_them(engine, data, noise, run_script, tmp_path):
    """A mixture with one sequence of noise in fifty: with this seed, two of them stand in batch 21."""
    command = [SCRIPT, "--input", data[1], noise, "--weights", "0.98", "0.02", *data[2:], "--output", tmp_path / "run"]
    command += flags(engine=engine, seed=11)
    answer = run_script(*command)
    assert answer.returncode == 1
    assert "the loss jumped to" in answer.stderr, answer.stderr
    assert "at step 21; batch 21 begins with" in answer.stderr
    assert "Traceback" not in answer.stderr
    suspects = rows(tmp_path / "run", "suspects.jsonl")
    files = [entry["file"] for entry in suspects]
    assert set(files) == {str(noise / "train.npy"), str(data[1] / "train.npy")}
    assert files == sorted(files, key=str(data[1] / "train.npy").__eq__)  # the noise first
    assert f"line {suspects[0]['line']} ({suspects[0]['id']})" in answer.stderr
    assert max(losses(tmp_path / "run")) == 20
    answer = run_script(*command, "--skip-batches", "21", "--wandb", "tests", env={"WANDB_MODE": "offline"})
    assert answer.returncode == 0, answer.stderr
    assert list((tmp_path / "run").glob(".wandb/wandb/offline-run-*/*.wandb"))
    recorded = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    assert recorded["skipped_batches"] == [21]
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert recorded["last"]["by_source"].keys() == {str(data[1]), str(noise)}
    assert recorded["last"]["by_source"][str(noise)]["bits_per_byte"] > recorded["last"]["by_source"][str(data[1])]["bits_per_byte"]


@pytest.mark.slow
def test_two_nodes_and_slurm_tasks_give_the_losses_of_one(undisturbed, data, tmp_path):
    """Two torchrun agents that meet on this machine; then two tasks with the variables that srun would give them."""
    script = shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path)
    arguments = [script, *map(str, data), *flags(engine="olmo-core", distributed="hsdp")]

    def together(name, commands, environments):
        output = tmp_path / name
        children = [
            subprocess.Popen([*command, "--output", str(output)], env=clean_environment() | env, stderr=subprocess.PIPE, text=True)
            for command, env in zip(commands, environments, strict=True)
        ]
        words = [child.communicate()[1] for child in children]
        assert [child.returncode for child in children] == [0, 0], words
        one, two = losses(undisturbed("olmo-core")), losses(output)
        np.testing.assert_allclose([two[step] for step in one], [*one.values()], rtol=0, atol=1e-5)
        assert json.loads((output / "manifest.json").read_text(encoding="utf-8"))["metrics"]["processes"] == 2

    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    together("nodes", 2 * [[*agent, "--rdzv-endpoint=localhost:29511", *arguments]], 2 * [{}])
    tasks = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "9517"}
    own = [tasks | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    together("tasks", 2 * [[sys.executable, *arguments]], own)


@pytest.mark.slow
def test_second_run_and_changed_settings(undisturbed, data, run_script):
    answer = run_script(SCRIPT, *data, "--output", undisturbed("olmo"), *flags(engine="olmo"))
    assert answer.returncode == 0
    assert "up to date" in answer.stderr
    answer = run_script(SCRIPT, *data, "--output", undisturbed("olmo"), *flags(engine="olmo", seed=2))
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
    [
        ["--n-heads=5"],
        ["--n-kv-heads=3"],
        ["--micro-batch-size=3"],
        ["--tokens=1000"],
        ["--flash-attention"],
        ["--nproc-per-node=3"],
        ["--weights", "1", "2"],
        ["--distributed=hsdp"],
        ["--engine=olmo-core", "--architecture=olmo1"],
        ["--machine=8xK80"],
    ],
)
def test_settings_that_cannot_work_are_usage_errors(wrong, data, run_script, tmp_path):
    answer = run_script(SCRIPT, *data, "--output", tmp_path / "out", *flags(), *wrong)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_engines(load_script, data):
    """The recipe's keys become the engines': the GPU settings are resolved here though no GPU is there."""
    pytest.importorskip("olmo")
    script = load_script(SCRIPT)
    arguments = [*map(str, data), "--output=o", *flags(tokens=10_000, n_kv_heads=2, z_loss=1e-4)]
    arguments = [word for word in arguments if not word.startswith("--steps")] + ["--compile", "--distributed=fsdp", "--precision=amp_bf16"]
    args = script.checked(script.build_parser(), arguments)
    assert args.steps == 79  # 10,000 / (4 × 32), rounded up
    tokens = [script.read_tokens(args.input[0], args.tokenizer)]
    config = script.train_config(args, tokens, 2)
    assert (config.model.n_kv_heads, config.model.norm_after, str(config.model.layer_norm_type)) == (2, True, "rms")
    assert (config.device_train_batch_size, config.device_train_grad_accum) == (2, 1)
    assert (str(config.distributed_strategy), str(config.fsdp.wrapping_strategy), config.ddp) == ("fsdp", "by_block", None)
    assert (config.compile.backend, config.precision) == ("inductor", "amp_bf16")
    assert config.softmax_auxiliary_loss
    assert config.stop_at == 79
    model, _ = script.core_config(args, tokens[0])
    mixer = model.block.sequence_mixer
    assert (mixer.n_kv_heads, mixer.rope.theta, mixer.qk_norm.eps, model.block.feed_forward.hidden_size) == (2, 500_000, 1e-6, 64)
    plan = script.make_plan(args, tokens[0]["vocab_size"], 1, 1)
    assert model.num_params == plan["parameters"]
    assert model.build(init_device="meta").num_flops_per_token(args.sequence_length) == pytest.approx(plan["flops_per_token"], rel=0.02)


def test_the_order_of_sequences_is_a_function_of_the_step(load_script):
    """A permutation for every size; each source has its share and is seen whole before it is seen again; processes divide a step."""
    script = load_script(SCRIPT)
    for size in (1, 2, 3, 7, 64, 65, 1000):
        order = script.shuffled(np.arange(size), size, [1, 0, 0])
        assert sorted(order) == list(range(size))
    assert (order != script.shuffled(np.arange(1000), 1000, [1, 0, 1])).mean() > 0.99
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1

    class Source:
        length = 4

        def __init__(self, rows, first):
            self.rows, self.first = rows, first

        def read(self, rows):
            return self.first + np.repeat(np.asarray(rows)[:, None], 4, axis=1)

    sources = [Source(30, 0), Source(70, 1000)]
    for chosen, share in ((None, 0.3), ([3.0, 1.0], 0.75)):
        batches = script.Batches(sources, chosen, 20, seed=5)
        which, rows = (np.concatenate(found) for found in zip(*(batches.rows(step) for step in range(1, 1001)), strict=True))
        assert abs((which == 0).mean() - share) < 1e-9  # 20,000 places are two whole patterns
        assert abs((which[:2000] == 0).mean() - share) < 0.03
        for index, source in enumerate(sources):
            mine = rows[which == index]
            assert sorted(mine[: source.rows]) == sorted(mine[source.rows : 2 * source.rows]) == list(range(source.rows))
            assert list(mine[: source.rows]) != list(mine[source.rows : 2 * source.rows])
    whole = batches.read(7)
    np.testing.assert_array_equal(whole, np.concatenate([batches.read(7, rank, 4) for rank in range(4)]))
    np.testing.assert_array_equal(whole, list(batches.stream(5, 9))[2])
    left_out = script.Batches(sources, [3.0, 1.0], 20, 5, skip=[9, 7, 8])
    assert [left_out.number(step) for step in (5, 6, 7, 8)] == [5, 6, 10, 11]
    np.testing.assert_array_equal(left_out.read(7), batches.read(10))
    assert Counter(batches.rows(1)[0]) != Counter(script.Batches(sources, [1.0, 3.0], 20, 5).rows(1)[0])


def test_schedules(load_script, data):
    script = load_script(SCRIPT)

    def rates(schedule, *steps):
        changes = {"steps": 1000, "warmup": 100, "learning_rate": 1, "decay": 0.2, "final_rate": 0.1}
        args = script.checked(script.build_parser(), [*map(str, data), "--output=o", *flags(schedule=schedule, **changes)])
        return [round(script.learning_rate(args, step), 6) for step in steps]

    assert rates("wsd", 0, 50, 100, 800, 900, 1000) == [0, 0.5, 1, 1, 0.55, 0.1]
    assert rates("cosine", 50, 100, 550, 1000) == [0.5, 1, 0.55, 0.1]
    assert rates("linear", 100, 550, 1000) == [1, 0.55, 0.1]
    assert rates("constant", 50, 100, 1000) == [0.5, 1, 1]


@pytest.mark.parametrize(("size", "parameters"), [("190m", 267_424_512), ("1b", 1_484_916_736), ("7b", 7_298_617_344)])
def test_plans_of_the_published_recipes(size, parameters, load_script):
    """The parameters that OLMo 2 was published with, memory that fits the GPUs named, and a refusal where it does not."""
    script = load_script(SCRIPT)
    parser = script.build_parser()
    words = ["--config", str(ROOT / f"recipes/olmo2-{size}/pretrain.yaml"), "--input=i", "--tokenizer=t", "--output=o", "--dry-run"]
    args = script.checked(parser, script.config_argv(parser, words))
    count, gpu = args.machine.split("x")
    plan = script.make_plan(args, 100_278, int(count), 8, script.GPUS[gpu][0] * 1e12)
    assert plan["parameters"] == parameters
    script.check_memory(plan, script.GPUS[gpu][1] * 1e9)
    comment = (ROOT / f"recipes/olmo2-{size}/pretrain.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert f"{plan['memory_bytes'] / 1e9:.0f} GB" in comment
    assert f"{plan['hours']:,.1f} hours" in comment
    with pytest.raises(SystemExit, match="lower --micro-batch-size"):
        script.check_memory(plan, 8e9)


def test_a_dry_run_says_what_a_run_will_take(data, run_script, tmp_path):
    """On GPUs that are not here; needs no tokens yet, writes nothing, and refuses what cannot fit."""
    command = [SCRIPT, "--input", tmp_path / "none", *data[2:], "--output", tmp_path / "out", "--dry-run", "--machine", "8xH100"]
    answer = run_script(*command, *flags(global_batch_size=16, price=2, precision="amp_bf16"))
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert (plan["processes"], plan["steps"], plan["tokens"]) == (8, STEPS, STEPS * 16 * 32)
    assert plan["hours"] == pytest.approx(plan["tokens"] * plan["flops_per_token"] / (8 * 989e12 * 0.4) / 3600)
    assert plan["cost"] == pytest.approx(plan["hours"] * 8 * 2)
    answer = run_script(*command, *flags(global_batch_size=4096, micro_batch_size=512, d_model=32768, n_layers=64))
    assert answer.returncode == 1
    assert "each process needs about" in answer.stderr
    assert not (tmp_path / "out").exists()


def test_slurm_tasks_become_ranks(load_script):
    slurm = load_script(SCRIPT).slurm
    task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    task |= {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456"}
    assert slurm(task) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "23456",
    }  # fmt: skip
    assert slurm(task | {"SLURM_STEP_NODELIST": "a-1,a-2"})["MASTER_ADDR"] == "a-1"
    assert slurm(task | {"RANK": "0"}) == slurm(task | {"SLURM_NTASKS": "1"}) == slurm({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == {}
