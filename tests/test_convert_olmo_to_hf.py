"""Each OLMo variant is written by ai2-olmo's own class, converted, and read back by transformers; each wrong variant is caught."""

import base64
import copy
import functools
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import types
import venv
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, clean_environment

SCRIPT = "convert_olmo_to_hf.py"
EOS, PAD, VOCABULARY = 0, 1, 300
BASE = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "mlp_ratio": 4,
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "weight_tying": False,
    "max_sequence_length": 128,
    "vocab_size": VOCABULARY,
    "embedding_size": 384,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "init_device": "cpu",
    "init_std": 0.1,
}
OLMO2 = {"layer_norm_type": "rms", "layer_norm_with_affine": True, "attention_layer_norm": True, "norm_after": True, "layer_norm_eps": 1e-6}
FAMILIES = {
    "olmo1": {},
    "olmo1-clip-gqa": {"clip_qkv": 0.5, "n_kv_heads": 2},
    "olmo1-theta": {"rope_theta": 500_000, "max_sequence_length": 1024},
    "olmo1-mqa": {"multi_query_attention": True, "mlp_hidden_size": 192},
    "olmo2": OLMO2,
    "olmo2-gqa": OLMO2 | {"n_kv_heads": 2, "rope_theta": 500_000},
    "tied": {"weight_tying": True, "embedding_size": None},
    "olmo2-tied": OLMO2 | {"weight_tying": True},
}
CORE = {  # of olmo-core; the window is shorter than a row, so that it shows
    "core-olmo2": {"n_kv_heads": 2},
    "core-tied": {"tie_word_embeddings": True},
    "core-olmo3": {"rope_theta": 10_000, "sliding_window": {"pattern": [16, 16, -1], "force_full_attention_on_first_layer": False}},
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Evil:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def script(load_script):
    return load_script(SCRIPT)


@pytest.fixture
def variant(tmp_path):
    """variant(old, new): the script as a module, with a fault in it: that piece of its text is another one."""

    def load(old, new):
        text = (ROOT / "scripts" / SCRIPT).read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        (tmp_path / "variant.py").write_text(text.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("variant", tmp_path / "variant.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer.json of 300 tokens, <|endoftext|> 0 and <|pad|> 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the purpose of this document is to define the default behaviour of a function " * 9], trainer)
    assert made.get_vocab_size() == VOCABULARY
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def save(folder, settings, state=None):
    """Write a checkpoint as ai2-olmo does; return the model. The norms' weights are random: dropping them shows."""
    import torch
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    torch.manual_seed(1)
    model = OLMo(ModelConfig(**BASE | settings)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1, 0.3)
    folder.mkdir(parents=True)
    written = json.loads(json.dumps(model.config.asdict()))
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_name": "test", "model": written}), encoding="utf-8")
    torch.save(model.state_dict() if state is None else state, folder / "model.pt")
    return model


def save_core(folder, settings):
    """Write a checkpoint as olmo-core does: model and optimizer in .distcp files, its configuration as JSON; return the model."""
    import torch
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    torch.manual_seed(1)
    fixed = {"d_model": 64, "vocab_size": 384, "n_layers": 3, "n_heads": 4, "hidden_size_multiple_of": 32, "layer_norm_eps": 1e-6}
    fixed |= {"block_name": TransformerBlockType.reordered_norm, "qk_norm": True}
    if "sliding_window" in settings:
        settings = settings | {"sliding_window": SlidingWindowAttentionConfig(**settings["sliding_window"])}
    config = TransformerConfig.llama_like(**fixed | settings)
    model = config.build(init_device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 1 if weight.dim() == 1 else 0, 0.3 if weight.dim() == 1 else 0.1)
    folder.mkdir(parents=True)
    save_model_and_optim_state(folder / "model_and_optim", model, torch.optim.AdamW(model.parameters()))
    tokenizer = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": PAD}
    written = {"model": config.as_config_dict(), "dataset": {"tokenizer": tokenizer, "sequence_length": 128}}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints[family]: (folder, ai2-olmo's model)."""
    root = tmp_path_factory.mktemp("checkpoints")
    legacy = {family: (root / family, save(root / family, settings)) for family, settings in FAMILIES.items()}
    return legacy | {family: (root / family, save_core(root / family, settings)) for family, settings in CORE.items()}


@pytest.fixture
def reverse(convert):
    """reverse(folder, output=…): the same from a Hugging Face folder, whose tokenizer is taken."""
    return lambda folder, output: convert(folder, "--reverse", output=output, tokenizer=None)


@pytest.fixture
def convert(script, monkeypatch, tokenizer, tmp_path, capfd):
    """convert(checkpoint, *flags): main() in this process, which spares the imports; returns exit code, message and output folder."""

    def run(checkpoint, *flags, output=tmp_path / "hf", tokenizer=tokenizer, script=script):
        words = ["--input", checkpoint, *(["--tokenizer", tokenizer] if tokenizer else []), "--output", output, *flags]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        code = 0
        try:
            script.main()
        except SystemExit as leave:
            code = leave.code or 0
        said = capfd.readouterr().err
        message = code if isinstance(code, str) else said
        return types.SimpleNamespace(code=1 if isinstance(code, str) else code, message=message, said=said, output=output)

    return run


SHARDING = """
import logging, shutil, sys
from pathlib import Path
import torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

root, target, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
logging.disable()
init_process_group("gloo", init_method=f"file://{target}/rendezvous", rank=rank, world_size=2)

from olmo.checkpoint import save_fsdp_model_and_optim_state
from olmo.config import FSDPWrapStrategy, ModelConfig
from olmo.model import OLMo

model = OLMo(ModelConfig.load(root / "olmo2" / "config.yaml", key="model"))
model.load_state_dict(torch.load(root / "olmo2" / "model.pt"))
policy = model.get_fsdp_wrap_policy(FSDPWrapStrategy.by_block)
model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
save_fsdp_model_and_optim_state(target / "olmo2", model, torch.optim.AdamW(model.parameters()))

import json
from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig

settings = json.loads((root / "core-olmo2" / "config.json").read_text())["model"]
model = TransformerConfig.from_dict(settings).build(init_device="cpu")
model.apply_fsdp(dp_mesh=init_device_mesh("cpu", (2,)))
load_model_and_optim_state(root / "core-olmo2" / "model_and_optim", model)
save_model_and_optim_state(target / "core-olmo2" / "model_and_optim", model, torch.optim.AdamW(model.parameters()))
"""


@pytest.fixture(scope="module")
def sharded(checkpoints, tmp_path_factory):
    """A folder with the checkpoints olmo2 and core-olmo2 as two processes write them, half of each tensor each."""
    root, target = checkpoints["olmo2"][0].parent, tmp_path_factory.mktemp("sharded")
    for name, config in (("olmo2", "config.yaml"), ("core-olmo2", "config.json")):
        (target / name).mkdir()
        shutil.copy(root / name / config, target / name)
    command = [sys.executable, "-c", SHARDING, str(root), str(target)]
    ranks = [subprocess.Popen([*command, rank], env=clean_environment(), stderr=subprocess.PIPE, text=True) for rank in "01"]
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said
    return target


@pytest.mark.parametrize("name", ["olmo2", "core-olmo2"])
def test_a_sharded_checkpoint_gives_the_bytes_of_a_whole_one(name, sharded, convert, checkpoints, tmp_path):
    files = {path.name.split("_")[2] for path in (sharded / name / "model_and_optim").glob("*.distcp")}
    assert files == {"0", "1"}  # of both processes
    wanted = files_of(convert(checkpoints[name][0], "--skip-validation", output=tmp_path / "wanted").output)
    done = convert(sharded / name)
    assert done.code == 0, done.message
    assert manifest(done.output)["metrics"]["max_abs_logit_difference"] == 0
    assert files_of(done.output) == wanted


SERVING = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

for folder in sys.argv[1:]:
    proof = json.load(open(folder + "/manifest.json"))["metrics"]["greedy"]
    length = len(proof["text_ids"]) + 1
    sizes = dict(max_model_len=length, max_num_batched_tokens=length, max_num_seqs=1, kv_cache_memory_bytes=2**26)
    engine = LLM(folder, dtype="float32", enforce_eager=True, disable_log_stats=True, **sizes)
    settings = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, prompt_logprobs=0)
    made = engine.generate([{"prompt_token_ids": proof[name]} for name in ("prompt_ids", "text_ids")], settings, use_tqdm=False)
    scored = [next(iter(place.values())).logprob for place in made[1].prompt_logprobs[1:]]
    print("found", json.dumps([made[0].outputs[0].token_ids, scored]), flush=True)
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
"""


def test_native_transformers_and_vllm_give_the_same_32_greedy_tokens(convert, tmp_path):
    """For each family that vLLM serves; the engine also gives a text's tokens the log-probabilities that the manifest has."""
    from transformers import AutoModelForCausalLM

    heads = {"n_heads": 2}  # vLLM's kernels for CPUs take heads from 32 numbers on
    window = CORE["core-olmo3"] | {"n_kv_heads": 1}
    natives = {"olmo1": save(tmp_path / "olmo1", heads | {"clip_qkv": 0.5}), "olmo2": save(tmp_path / "olmo2", OLMO2 | heads)}
    natives |= {"olmo3": save_core(tmp_path / "olmo3", heads | window)}
    done = {family: convert(tmp_path / family, output=tmp_path / f"hf-{family}") for family in natives}
    for family in ("nanogpt", "llama"):
        path, weights, native = save_mapped(tmp_path / family, family)
        natives[family] = functools.partial(native, weights)
        rules = change_map(tmp_path / family, family, lambda rules: None)
        done[family] = convert(path, "--map", rules, output=tmp_path / f"hf-{family}")
    folders = [done[family].output for family in natives]
    environment = clean_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    served = subprocess.run([sys.executable, "-c", SERVING, *folders], env=environment, capture_output=True, text=True)
    assert served.returncode == 0, served.stderr[-3000:]
    found = [json.loads(line[6:]) for line in served.stdout.splitlines() if line.startswith("found ")]
    assert len(found) == len(natives) == 5
    for (family, native), (ids, logprobs) in zip(natives.items(), found, strict=True):
        proof = manifest(done[family].output)["metrics"]["greedy"]
        model = AutoModelForCausalLM.from_pretrained(done[family].output).eval()
        assert len(ids) == len(proof["ids"]) == 32, family
        assert ids == proof["ids"] == native_greedy(model, proof["prompt_ids"], 32), family
        assert ids == native_greedy(native, proof["prompt_ids"], 32), family
        assert max(abs(a - b) for a, b in zip(logprobs, proof["text_logprobs"], strict=True)) < 1e-4, family
        assert len(set(ids)) > 5, family  # no loop that any model would fall into


OLDER = """
import json, sys
sys.modules["kernels"] = None  # of a version that goes with the newer transformers
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__ == "4.57.6"
for folder, ids in json.load(sys.stdin):
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    proof = json.load(open(folder + "/manifest.json"))["metrics"]["greedy"]
    text = torch.tensor([proof["text_ids"]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(text).logits
    scored = logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
    equal = [tokenizer(words)["input_ids"] == wanted for words, wanted in ids]
    off = (scored - torch.tensor(proof["text_logprobs"])).abs().max().item()
    print("found", json.dumps([config.eos_token_id, tokenizer.eos_token_id, str(config.dtype), all(equal), off]), flush=True)
"""


def test_transformers_4_57_reads_the_folders(convert, checkpoints, script, tokenizer, tmp_path):
    """Its own configuration, tokenizer and model classes: the same ids, and the log-probabilities that the manifest has."""
    from tokenizers import Tokenizer

    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, tmp_path / "env"], check=True)
    subprocess.run([*uv, "pip", "install", "--python", tmp_path / "env/bin/python", "transformers==4.57.6"], check=True)
    site = next((tmp_path / "env").glob("lib/python3.*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # behind its own packages, for torch
    folders = [convert(checkpoints[family][0], output=tmp_path / family).output for family in FAMILIES | CORE]
    rules = change_map(tmp_path, "llama", lambda rules: None)
    folders += [convert(save_mapped(tmp_path / "pt", "llama")[0], "--map", rules, output=tmp_path / "llama").output]
    ids = [[words, Tokenizer.from_file(str(tokenizer)).encode(words).ids] for words in (*script.SAMPLES, script.PROMPT)]
    told = json.dumps([[str(folder), ids] for folder in folders])
    command = [tmp_path / "env/bin/python", "-c", OLDER]
    done = subprocess.run(command, env=clean_environment(), input=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]
    assert [row[:4] for row in found] == [[EOS, EOS, "torch.float32", True]] * len(folders)
    assert max(row[4] for row in found) < 1e-4


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def logits(model, ids):
    """Return what a model of either package, or of transformers, gives for `ids`."""
    return getattr(model(ids), "logits", model(ids))


def native_greedy(model, ids, number):
    import torch

    ids = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(number):
            ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -number:].tolist()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", "README.md")}


@pytest.mark.parametrize("family", FAMILIES | CORE)
def test_logits_are_equal(family, convert, checkpoints):
    """The gate's figures are exact, and so is a comparison of our own, for each variant of the architecture."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, native = checkpoints[family]
    done = convert(folder, "--max-shard-size", "200kB")
    assert done.code == 0, done.message
    metrics = manifest(done.output)["metrics"]
    length = (BASE | FAMILIES.get(family, {}))["max_sequence_length"]
    assert metrics["max_abs_logit_difference"] == 0
    assert metrics["argmax_agreement"] == 1
    assert metrics["longest_row"] == length
    assert metrics["positions"] >= 4 * min(512, length)
    ids = torch.randint(0, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(done.output)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, logits(native, ids))
    assert metrics["greedy"]["ids"] == native_greedy(native, metrics["greedy"]["prompt_ids"], 32)
    assert AutoTokenizer.from_pretrained(done.output)(metrics["greedy"]["prompt"])["input_ids"] == metrics["greedy"]["prompt_ids"]


def test_as_a_user_runs_it(run_script, checkpoints, tokenizer, tmp_path):
    """Standing alone: shards below the limit, all tensors in the index, digests true, a second run changes nothing, another is refused."""
    import hashlib

    from safetensors import safe_open

    folder, native = checkpoints["olmo1"]
    words = ["--input", folder, "--tokenizer", tokenizer, "--output", tmp_path / "hf", "--max-shard-size", "200kB"]
    done = run_script(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == f"convert: max |Δlogit| 0, 4 shards of olmo1; {tmp_path / 'hf'}\n"
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    shards = {f"model-0000{k}-of-00004.safetensors" for k in range(1, 5)}
    assert names - shards == {
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        with safe_open(tmp_path / "hf" / shard, "pt") as file:
            found |= {name: (shard, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert {name: shard for name, (shard, _) in found.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values()) == native.num_params() * 4
    record = manifest(tmp_path / "hf")
    assert record["counts"] == {"tensors": 23, "parameters": native.num_params(), "shards": 4, "bytes": native.num_params() * 4}
    for entry in record["outputs"] + record["inputs"]:
        assert hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest() == entry["sha256"]
    assert all(entry["bytes"] < 200_000 for entry in record["outputs"])
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"max |Δ| = 0 over {record['metrics']['positions']} positions in rows of up to 128 tokens" in card
    assert next(e["sha256"] for e in record["inputs"] if e["path"].endswith("model.pt")) in card
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir() if path.name != "manifest.json"}
    again = run_script(SCRIPT, *words)
    assert (again.returncode, again.stderr) == (0, f"convert: up to date, {tmp_path / 'hf'}\n")
    assert times == {path: path.stat().st_mtime_ns for path in times}
    other = run_script(SCRIPT, *words, "--dtype", "bfloat16")
    assert other.returncode == 3
    assert "dtype was 'keep'" in other.stderr


def test_config_says_what_the_checkpoint_says(convert, checkpoints):
    """Rope under both names, eos and pad as they were (0 is not rewritten), no sampling defaults."""
    config = json.loads((convert(checkpoints["olmo2-gqa"][0]).output / "config.json").read_text())
    expected = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 384, "num_key_value_heads": 2}
    expected |= {"intermediate_size": 128, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "tie_word_embeddings": False}
    expected |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "max_position_embeddings": 128}
    expected |= {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None, "dtype": "float32", "torch_dtype": "float32"}
    assert {key: config[key] for key in expected} == expected


def test_generation_config_has_stop_and_padding_only(convert, checkpoints):
    done = convert(checkpoints["olmo1"][0], "--skip-validation")
    assert json.loads((done.output / "generation_config.json").read_text()) == {"eos_token_id": EOS, "pad_token_id": PAD}
    assert "greedy" not in manifest(done.output)["metrics"]
    assert manifest(done.output)["summary"] == "logits not compared, 1 shard of olmo1"
    assert "not compared" in (done.output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["olmo1", "olmo2-tied"])
def test_bfloat16_and_trimmed_vocabulary(family, convert, checkpoints):
    """Rounded weights are compared with a native model of the same rounding: the bound stays that of float32."""
    import torch
    from safetensors.torch import load_file

    folder, native = checkpoints[family]
    done = convert(folder, "--dtype", "bfloat16", "--vocab", "trim")
    assert done.code == 0, done.message
    weights = load_file(done.output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.embed_tokens.weight"], native.transformer.wte.weight[:VOCABULARY].bfloat16())
    assert ("lm_head.weight" in weights) == (family == "olmo1")
    config = json.loads((done.output / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (VOCABULARY, "bfloat16")
    assert manifest(done.output)["metrics"]["max_abs_logit_difference"] == 0


@pytest.mark.parametrize(("family", "number", "rows"), [("olmo1", 64, 320), ("olmo1", 500, 500), ("core-tied", 512, 512)])
def test_padded_vocabulary(family, number, rows, convert, checkpoints):
    """Rows that the checkpoint lacks are the mean of its own: in no position can their logit be the largest."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, native = checkpoints[family]
    done = convert(folder, "--vocab", f"pad:{number}")
    assert done.code == 0, done.message
    weights, own = load_file(done.output / "model.safetensors"), native.state_dict()
    for name, source in (("model.embed_tokens.weight", 0), ("lm_head.weight", -1)):
        if name in weights:
            wanted = list(own.values())[source]
            assert weights[name].shape[0] == rows
            assert torch.equal(weights[name][:384], wanted[:rows])
            assert torch.allclose(weights[name][384:], wanted.double().mean(0).float())
    metrics = manifest(done.output)["metrics"]
    assert (metrics["max_abs_logit_difference"], metrics["argmax_agreement"]) == (0, 1)
    ids = torch.arange(300)[None, :100]
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(done.output)(ids).logits
    assert found.shape[-1] == rows
    assert found.argmax(-1).max() < 384


def streamed(script, checkpoint, folder, tokenizer):
    """Return the figures of the comparison layer by layer."""
    from tokenizers import Tokenizer

    source = script.olmo_source(types.SimpleNamespace(input=checkpoint, step="latest", vocab="keep"))
    _, _, parts, tensors = source.read()
    read = script.weights_by(tensors, script.dtypes_of(parts, tensors, "keep"))
    return script.prove(source.native, read, folder, True, parts, Tokenizer.from_file(str(tokenizer)))


@pytest.mark.parametrize("family", ["olmo2-tied", "core-tied", "core-olmo3"])
def test_the_comparison_layer_by_layer_gives_the_figures_of_whole_models(family, convert, checkpoints, script, tokenizer):
    done = convert(checkpoints[family][0])
    whole = manifest(done.output)["metrics"]
    found = streamed(script, checkpoints[family][0], done.output, tokenizer)
    assert found.pop("layer_by_layer") is True
    same = {"max_abs_logit_difference", "argmax_agreement", "largest_logit", "bound", "longest_row", "layers"}
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}
    assert set(found["layers"].values()) == {0} and "model.layers.2.mlp.down_proj" in found["layers"]
    assert found["greedy"]["text_logprobs"] == whole["greedy"]["text_logprobs"]
    assert found["greedy"]["ids"] == whole["greedy"]["ids"][:4]


@pytest.mark.parametrize("family", ["olmo2-tied", "core-tied"])
def test_one_layer_at_a_time_is_in_memory(family, convert, checkpoints, script):
    """Seen from within: while a layer computes its own weights are there and no other layer's."""
    import torch

    model = script.load_hf(convert(checkpoints[family][0], "--skip-validation").output, streamed=True)
    held = []

    def look(*_):
        layers = [name.split(".")[2] for name, weight in model.named_parameters() if ".layers." in name and not weight.is_meta]
        held.append(set(layers))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    model(torch.arange(9)[None])
    assert held == [{"0"}, {"1"}, {"2"}]
    assert not model.get_input_embeddings().weight.is_meta


@pytest.mark.parametrize(("family", "spoil"), [("olmo1-theta", "theta"), ("olmo2", "final-norm"), ("olmo2", "missing")])
def test_a_wrong_folder_does_not_pass_layer_by_layer(family, spoil, convert, checkpoints, script, tokenizer):
    folder = convert(checkpoints[family][0], "--skip-validation").output
    spoil, word = {"theta": (wrong_theta, ATTENTION)}.get(spoil) or SPOILT[spoil][1:]
    spoil(folder)
    with pytest.raises(SystemExit, match=word):
        streamed(script, checkpoints[family][0], folder, tokenizer)


def test_a_model_larger_than_memory_is_compared_in_the_memory_of_a_layer(checkpoints, tokenizer, tmp_path):
    """By a limit on the process's data that both whole models, 470 MB, exceed."""
    save(tmp_path / "large", OLMO2 | {"d_model": 512, "n_heads": 8, "n_layers": 14, "mlp_hidden_size": 4096})
    shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path)
    words = ["-I", tmp_path / SCRIPT, "--input", tmp_path / "large", "--tokenizer", tokenizer, "--output", tmp_path / "hf"]
    command = ["sh", "-c", 'ulimit -d 900000; "$@"; exit $?', "sh", sys.executable, *words]
    done = subprocess.run(list(map(str, command)), env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = manifest(tmp_path / "hf")["metrics"]
    assert (metrics["layer_by_layer"], metrics["max_abs_logit_difference"]) == (True, 0)


def test_half_precision_is_kept(convert, checkpoints, tmp_path):
    native = checkpoints["olmo2"][1]
    save(tmp_path / "half", OLMO2, {name: weight.half() for name, weight in native.state_dict().items()})
    done = convert(tmp_path / "half")
    assert json.loads((done.output / "config.json").read_text())["dtype"] == "float16"
    assert manifest(done.output)["metrics"]["max_abs_logit_difference"] == 0


def test_safetensors_of_ai2_olmo_give_the_same_bytes(convert, checkpoints, tmp_path):
    """Its keys are pickles in base64; plain keys are read too."""
    from olmo.safetensors_util import state_dict_to_safetensors_file
    from safetensors.torch import save_file

    folder, native = checkpoints["olmo2"]
    wanted = files_of(convert(folder, "--skip-validation", output=tmp_path / "wanted").output)
    for name, write in {"pickled": state_dict_to_safetensors_file, "plain": save_file}.items():
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.yaml", tmp_path / name)
        write(native.state_dict(), tmp_path / name / "model.safetensors")
        done = convert(tmp_path / name, "--skip-validation", output=tmp_path / f"hf-{name}")
        assert files_of(done.output) == wanted


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def shuffle(name):
    def change(folder):
        change_weights(folder, lambda weights: weights.update({name: weights[name].flip(0)}))

    return change


def wrong_theta(folder):
    change_config(folder, rope_theta=10_000.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


ATTENTION, QUERY = "first departure at model.layers.0.self_attn.o_proj", "first departure at model.layers.0.self_attn.q_norm"
THETA = 'theta = float(model["rope_theta"])'
WRONG = {  # faults of a converter, those of others' among them: (family, a piece of the script, what stands there instead, what is said)
    "theta": ("olmo1-theta", THETA, "theta = 10_000.0", ATTENTION),
    "eps": ("olmo2", 'float(model["layer_norm_eps"])}', "1e-5}", QUERY),
    "clip": ("olmo1-clip-gqa", '{"clip_qkv": model["clip_qkv"]}', '{"clip_qkv": None}', ATTENTION),
    "clip-wider": ("olmo1-clip-gqa", '{"clip_qkv": model["clip_qkv"]}', '{"clip_qkv": 0.51}', ATTENTION),
    "gate-up": ("olmo1", '"mlp.up_proj": inner, "mlp.gate_proj": inner', '"mlp.gate_proj": inner, "mlp.up_proj": inner', "layers.0.mlp."),
    "gate-up-core": (
        "core-olmo2",
        '{"mlp.up_proj": inner})}\n        block |= {"feed_forward.w1": ([width], {"mlp.gate_proj": inner}),',
        '{"mlp.gate_proj": inner})}\n        block |= {"feed_forward.w1": ([width], {"mlp.up_proj": inner}),',
        "first departure at model.layers.0.mlp.",
    ),
    "q-k": (
        "olmo2",
        '"self_attn.q_proj": width, "self_attn.k_proj": kv',
        '"self_attn.k_proj": kv, "self_attn.q_proj": width',
        "first departure at model.layers.0.self_attn.",
    ),
    "norms": ("olmo2", '"q": "q_norm", "k": "k_norm"', '"q": "k_norm", "k": "q_norm"', QUERY),
    "layers": ("olmo1", '(f"model.layers.{layer}.{target}.weight"', '(f"model.layers.{2 - layer}.{target}.weight"', "first departure at"),
    "unscaled": ("scaled", '"scale_logits: true": model["scale_logits"],', "", "first departure at lm_head"),
    "window": ("core-olmo3", '"sliding_window": sliding}', '"sliding_window": sliding + 1}', ATTENTION),
    "untied": (
        "tied",
        '"tie_word_embeddings": bool(model["weight_tying"]),',
        '"tie_word_embeddings": False,',
        "missing keys: lm_head.weight",
    ),
    "norm-dropped": (
        "olmo2",
        '    if model["norm_after"]:\n        parts',
        "    if False:\n        parts",
        "unknown tensor transformer.ln_f",
    ),
    "eos": ("olmo1", '"eos_token_id": model["eos_token_id"],', '"eos_token_id": 50279,', "reloads with eos id 0, not 50279"),
    "rope-unsaid": (
        "olmo1-theta",
        '"rope_parameters": rope,',
        '"rope_parameters": rope | {"rope_theta": 1e4},',
        "rope_theta 10000.0 instead of",
    ),
    "generation": (
        "olmo1",
        '"generation_config.json", {key: config[key]',
        '"generation_config.json", {key: 7',
        "generation eos_token_id 7 instead of 0",
    ),
    "tokenizer": (
        "olmo1",
        "            file.write(data)\n\n\ndef tokenizer_paths",
        """            file.write(data.replace(b'"add_prefix_space": false', b'"add_prefix_space": true'))\n\n\ndef tokenizer_paths""",
        "other token ids",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_converter_does_not_pass_the_gate(name, convert, checkpoints, variant, tmp_path):
    """Exit 1, the first departing module named, nothing left."""
    family, old, new, word = WRONG[name]
    if family == "scaled":
        save(tmp_path / "scaled", {"scale_logits": True})
    done = convert(tmp_path / "scaled" if family == "scaled" else checkpoints[family][0], script=variant(old, new))
    assert done.code == 1
    assert word in done.message
    assert not done.output.exists()


def interrupt(done):
    """Make of a finished folder what kill -9 leaves before the comparison; return the folder with the model."""
    record, hidden = manifest(done.output), done.output / ".unverified"
    paths = list(done.output.iterdir())
    hidden.mkdir()
    for path in paths:
        path.rename(hidden / path.name)
    (hidden / "manifest.json").unlink()
    begun = {key: record[key] for key in ("schema_version", "stage", "argv", "settings", "inputs")}
    (done.output / ".begun.json").write_text(json.dumps(begun))
    return hidden


SPOILT = {
    "embeddings": ("olmo1", shuffle("model.embed_tokens.weight"), "first departure at model.embed_tokens"),
    "head": ("olmo1", shuffle("lm_head.weight"), "first departure at lm_head"),
    "final-norm": ("olmo2", shuffle("model.norm.weight"), "first departure at model.norm"),
    "scaled": (
        "olmo1",
        lambda f: change_weights(f, lambda w: w["model.layers.2.mlp.down_proj.weight"].mul_(1.001)),
        "layers.2.mlp.down_proj",
    ),
    "missing": ("olmo2", lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")), "missing keys: model.norm.weight"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_weights_that_changed_on_the_disk_do_not_pass_the_gate(name, convert, checkpoints):
    """A run that was killed before the comparison has left its shard; it is spoilt, and the next run takes it up."""
    family, spoil, word = SPOILT[name]
    spoil(interrupt(convert(checkpoints[family][0])))
    done = convert(checkpoints[family][0])
    assert done.code == 1
    assert word in done.message
    assert not done.output.exists()


def test_an_interrupted_run_is_finished(convert, checkpoints):
    """What the test above builds is a run that goes on, when nothing is spoilt."""
    shard = interrupt(convert(checkpoints["olmo1"][0])) / "model.safetensors"
    before = shard.stat().st_mtime_ns
    done = convert(checkpoints["olmo1"][0])
    assert done.code == 0, done.message
    assert (done.output / "model.safetensors").stat().st_mtime_ns == before


def settings_of(folder, **changes):
    """Change a copied checkpoint's config.yaml."""
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"] |= changes
    path.write_text(yaml.safe_dump(content))


def state_of(folder, change):
    import torch

    state = torch.load(folder / "model.pt")
    torch.save(change(state) or state, folder / "model.pt")


def cut(folder):
    with open(folder / "model.pt", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def hostile_pickle(folder):
    import torch

    torch.save({"transformer.wte.weight": Evil(folder / "was-run")}, folder / "model.pt")


def hostile_key(folder):
    import torch
    from safetensors.torch import save_file

    (folder / "model.pt").unlink()
    key = base64.urlsafe_b64encode(pickle.dumps(Evil(folder / "was-run"))).decode()
    save_file({key: torch.zeros(2)}, folder / "model.safetensors")


def only(folder, *names):
    """Leave nothing but new files of these names."""
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def larger_vocabulary(folder):
    """Of another tokenizer's model, settings and weights alike."""
    settings_of(folder, vocab_size=900, embedding_size=900)
    heads = ("transformer.wte.weight", "transformer.ff_out.weight")
    state_of(folder, lambda state: state.update({name: state[name].repeat(3, 1)[:900] for name in heads}))


W = "transformer.blocks.1.ff_out.weight"
BAD = {
    "no-folder": (lambda f: shutil.rmtree(f), ["no such folder"]),
    "empty": (lambda f: only(f), ["config.yaml is missing", "it is empty"]),
    "hf": (lambda f: only(f, "config.json", "model.safetensors"), ["Hugging Face folder already"]),
    "empty-metadata": (lambda f: only(f, "config.yaml", "model_and_optim/.metadata"), [".metadata: not a whole file of weights"]),
    "older-shards": (lambda f: only(f, "config.yaml", "rank0.pt"), ["a sharded checkpoint of an older kind"]),
    "below": (lambda f: only(f, ".metadata", "__0_0.distcp"), ["name the folder above it"]),
    "sharded-run": (lambda f: only(f, "step10/config.yaml"), ["no whole checkpoint; steps there: [10]"]),
    "tokens": (lambda f: only(f, "part-0.npy"), ["token memory maps"]),
    "no-config": (lambda f: (f / "config.yaml").unlink(), ["config.yaml is missing"]),
    "no-weights": (lambda f: (f / "model.pt").unlink(), ["neither model.pt nor model.safetensors nor model_and_optim"]),
    "cut": (cut, ["model.pt is cut short"]),
    "binary-config": (lambda f: (f / "config.yaml").write_bytes(b"\x00\xff\x80"), ["config.yaml", "no settings"]),
    "list-config": (lambda f: (f / "config.yaml").write_text("- 1"), ["config.yaml", "no settings"]),
    "word": (lambda f: settings_of(f, d_model="wide"), ["config.yaml", "model.d_model is 'wide', not a number"]),
    "heads": (lambda f: settings_of(f, n_kv_heads="two"), ["model.n_kv_heads is 'two', not a number"]),
    "uneven": (lambda f: settings_of(f, n_heads=5), ["5 heads", "do not divide evenly"]),
    "bias": (lambda f: settings_of(f, include_bias=True), ["include_bias: true"]),
    "gelu": (lambda f: settings_of(f, activation_type="gelu"), ["activation_type: gelu"]),
    "alibi": (lambda f: settings_of(f, alibi=True, rope=False), ["alibi: true"]),
    "eps": (lambda f: settings_of(f, layer_norm_eps=1e-6), ["layer_norm_eps: 1e-06"]),
    "pre-norm-rms": (lambda f: settings_of(f, layer_norm_type="rms", layer_norm_with_affine=True), ["without norm_after"]),
    "scaled": (lambda f: settings_of(f, scale_logits=True), ["scale_logits"]),
    "block": (lambda f: settings_of(f, block_type="llama"), ["block_type: llama"]),
    "unknown": (lambda f: settings_of(f, no_such_setting=1), ["config.yaml", "ai2-olmo does not take it", "no_such_setting"]),
    "wider": (lambda f: settings_of(f, d_model=128), ["is (384, 64), but config.yaml makes it (384, 128)"]),
    "eos": (lambda f: settings_of(f, eos_token_id=50279), ["eos_token_id 50279 is none of its 300 tokens"]),
    "pad": (lambda f: settings_of(f, pad_token_id=-1), ["pad_token_id -1 is none of"]),
    "vocabulary": (lambda f: settings_of(f, vocab_size=299), ["300 tokens", "vocab_size is 299"]),
    "other-tokenizer": (larger_vocabulary, ["300 tokens", "vocab_size is 900"]),
    "missing": (lambda f: state_of(f, lambda s: {name: s[name] for name in s if name != W}), [f"lacks tensor {W}"]),
    "left-over": (lambda f: state_of(f, lambda s: s.update(wpe=s[W])), ["unknown tensor wpe"]),
    "nan": (lambda f: state_of(f, lambda s: s[W][3, 5:6].fill_(float("nan")) and None), [f"{W} holds NaN or infinity"]),
    "inf": (lambda f: state_of(f, lambda s: s[W][3, 5:6].fill_(float("-inf")) and None), [f"{W} holds NaN or infinity"]),
    "double": (lambda f: state_of(f, lambda s: s.update({W: s[W].double()})), [f"{W} is float64; only float32"]),
    "transposed": (lambda f: state_of(f, lambda s: s.update({W: s[W].t().contiguous().t()})), [f"{W} is transposed"]),
    "nested": (lambda f: state_of(f, lambda s: {"model": dict(s)}), ["model is not a tensor"]),
    "hostile": (hostile_pickle, ["mkdir to be run", "nothing was run"]),
    "hostile-key": (hostile_key, ["mkdir to be run", "nothing was run"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_by_name(name, convert, checkpoints, tmp_path):
    """One sentence, exit 1, nothing written and no code of the file run."""
    spoil, words = BAD[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["olmo1"][0], folder)
    spoil(folder)
    done = convert(folder)
    assert done.code == 1
    for word in words:
        assert word in done.message
    assert str(folder) in done.message or "transformer.blocks" in done.message or "tokenizer.json" in done.message
    assert "\n" not in done.message.strip()
    assert not done.output.exists()
    assert not (folder / "was-run").exists()


def core_settings(change):
    """Return a function that changes a copied core checkpoint's config.json."""

    def spoil(folder):
        content = json.loads((folder / "config.json").read_text())
        change(content, content["model"]["block"], content["model"]["block"]["sequence_mixer"])
        (folder / "config.json").write_text(json.dumps(content))

    return spoil


def shard(folder):
    return sorted((folder / "model_and_optim").glob("*.distcp"))[0]


def cut_shard(folder, size=0):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[: size or path.stat().st_size // 2])


def hostile_metadata(folder):
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Evil(folder / "was-run")))


def rewrite_shards(folder, spoil):
    """Save the checkpoint anew with `spoil` applied to the state of its model."""
    import torch
    from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    model = TransformerConfig.from_dict(json.loads((folder / "config.json").read_text())["model"]).build(init_device="cpu")
    load_model_and_optim_state(folder / "model_and_optim", model)
    with torch.no_grad():
        spoil(model)
    save_model_and_optim_state(folder / "model_and_optim", model, save_overwrite=True)


def hostile_shard(folder):
    """A tensor's archive within a .distcp file is replaced by one of the same length whose pickle makes a folder."""
    import zipfile

    places = pickle.loads((folder / "model_and_optim" / ".metadata").read_bytes()).storage_data
    place = next(info for index, info in places.items() if index.fqn == f"model.{CW}")
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(folder / "was-run")))
    evil = (folder / "evil.zip").read_bytes()
    with open(folder / "model_and_optim" / place.relative_path, "r+b") as file:
        file.seek(place.offset)
        file.write(b"\0" * (place.length - len(evil)) + evil)


CW = "blocks.1.feed_forward.w2.weight"
BAD_CORE = {
    "missing-distcp": (lambda f: shard(f).unlink(), ["__0_0.distcp is missing"]),
    "cut-distcp": (cut_shard, ["__0_0.distcp is cut short"]),
    "hostile-metadata": (hostile_metadata, ["mkdir to be run", "nothing was run"]),
    "hostile-distcp": (hostile_shard, ["mkdir to be run", "nothing was run"]),
    "no-config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "list-config": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "no settings"]),
    "no-tokenizer": (core_settings(lambda c, b, m: c["dataset"].pop("tokenizer")), ["config.json", "model.vocab_size is None"]),
    "no-length": (core_settings(lambda c, b, m: c["dataset"].pop("sequence_length")), ["model.max_sequence_length is None"]),
    "gelu": (core_settings(lambda c, b, m: b["feed_forward"].update(activation="gelu_tanh")), ["block.feed_forward.activation: gelu_tanh"]),
    "pre-norm": (core_settings(lambda c, b, m: b.update(name="default")), ["model.block.name: default"]),
    "norm": (core_settings(lambda c, b, m: b["layer_norm"].update(name="default")), ["model.block.layer_norm.name: default"]),
    "head-norm": (core_settings(lambda c, b, m: m.update(use_head_qk_norm=True)), ["sequence_mixer.use_head_qk_norm: True"]),
    "no-qk-norm": (core_settings(lambda c, b, m: m.pop("qk_norm")), ["sequence_mixer.qk_norm."]),
    "eps": (core_settings(lambda c, b, m: b["layer_norm"].update(eps=1e-5)), ["eps of the norms: ['1e-05', '1e-06']"]),
    "scaled-rope": (core_settings(lambda c, b, m: m["rope"].update(scaling={"factor": 8})), ["rope.scaling.factor: 8"]),
    "clip": (core_settings(lambda c, b, m: m.update(clip_qkv=8)), ["sequence_mixer.clip_qkv: 8"]),
    "windows": (
        core_settings(lambda c, b, m: m.update(sliding_window={"pattern": [8, 16, -1], "force_full_attention_on_first_layer": False})),
        ["sliding_window.pattern: [8, 16, -1]"],
    ),
    "experts": (core_settings(lambda c, b, m: b.update(feed_forward_moe={"num_experts": 4})), ["feed_forward_moe.num_experts: 4"]),
    "overrides": (core_settings(lambda c, b, m: c["model"].update(block_overrides={"1": {"name": "default"}})), ["block_overrides.1.name"]),
    "wider": (core_settings(lambda c, b, m: c["model"].update(d_model=128)), ["but config.json makes it (384, 128)"]),
    "shallower": (core_settings(lambda c, b, m: c["model"].update(n_layers=2)), ["holds the unknown tensor blocks.2."]),
    "deeper": (core_settings(lambda c, b, m: c["model"].update(n_layers=4)), ["lacks tensor blocks.3."]),
    "tied": (core_settings(lambda c, b, m: c["model"].update(tie_word_embeddings=True)), ["lm_head.w_out.weight differs from embeddings"]),
    "vocabulary": (core_settings(lambda c, b, m: c["dataset"]["tokenizer"].update(vocab_size=299)), ["vocab_size is 299"]),
    "nan": (lambda f: rewrite_shards(f, lambda m: m.get_parameter(CW)[3, 5:6].fill_(float("nan"))), [f"{CW} holds NaN or infinity"]),
}


@pytest.mark.parametrize("name", BAD_CORE)
def test_a_bad_core_checkpoint_is_refused_by_name(name, convert, checkpoints, tmp_path):
    spoil, words = BAD_CORE[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["core-olmo2"][0], folder)
    spoil(folder)
    done = convert(folder)
    assert done.code == 1
    for word in words:
        assert word in done.message
    assert str(folder) in done.message or CW in done.message or "tokenizer.json" in done.message
    assert "\n" not in done.message.strip()
    assert not done.output.exists()
    assert not (folder / "was-run").exists()


def test_the_latest_core_step_is_taken(convert, checkpoints, tmp_path):
    """A step whose .distcp files are not whole is passed over, with a word."""
    for number in (5, 10, 20):
        shutil.copytree(checkpoints["core-olmo2"][0], tmp_path / "run" / f"step{number}")
    cut_shard(tmp_path / "run" / "step20", 100)
    done = convert(tmp_path / "run", "--skip-validation")
    assert done.code == 0
    assert "step20 is not whole: __0_0.distcp is cut short" in done.said
    assert manifest(done.output)["summary"] == "logits not compared, 1 shard of step10"


@pytest.mark.parametrize(("family", "dtype"), [("olmo2-gqa", "bfloat16"), ("core-tied", "float32"), ("core-olmo3", "float32")])
def test_reverse_and_back_gives_the_same_bytes(family, dtype, convert, reverse, checkpoints, tmp_path):
    """HF folder -> olmo-core, which loads it with its own reader, -> HF folder: byte for byte."""
    import torch
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    folder, native = checkpoints[family]
    hf = convert(folder, "--dtype", dtype, "--skip-validation", output=tmp_path / "hf").output
    done = reverse(hf, output=tmp_path / "core")
    assert done.code == 0, done.message
    assert manifest(done.output)["metrics"]["max_abs_logit_difference"] == 0
    back = convert(done.output, "--skip-validation", output=tmp_path / "back")
    assert back.code == 0, back.message
    assert files_of(back.output) == files_of(hf)
    settings = json.loads((done.output / "config.json").read_text())["model"]
    model = TransformerConfig.from_dict(settings).build(init_device="cpu").eval()
    load_model_and_optim_state(done.output / "model_and_optim", model)
    if dtype == "bfloat16":
        native = copy.deepcopy(native).bfloat16().float()
    ids = torch.randint(0, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.allclose(logits(model, ids), logits(native, ids), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "spoil", "word"),
    [
        ("olmo1", lambda folder: None, "model_type olmo: only olmo2 and olmo3"),
        ("olmo2", lambda folder: change_config(folder, hidden_act="gelu"), "`hidden_act: gelu`"),
        ("olmo2", lambda folder: change_config(folder, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters"),
        ("olmo2", lambda folder: change_weights(folder, lambda w: w.pop("model.norm.weight")), "lacks tensor model.norm.weight"),
        (
            "olmo2",
            lambda folder: change_weights(folder, lambda w: w["model.norm.weight"][:1].fill_(float("nan"))),
            "model.norm.weight holds NaN",
        ),
        ("olmo2", lambda folder: (folder / "model.safetensors").unlink(), "no Hugging Face folder"),
        ("olmo2", lambda folder: change_config(folder, eos_token_id=7777), "eos_token_id 7777 is none of its 300 tokens"),
    ],
)
def test_reverse_refuses_by_name(family, spoil, word, convert, reverse, checkpoints, tmp_path):
    folder = convert(checkpoints[family][0], "--skip-validation").output
    spoil(folder)
    done = reverse(folder, output=tmp_path / "core")
    assert done.code == 1
    assert word in done.message
    assert not done.output.exists()


def test_reverse_passes_the_gate_or_keeps_nothing(convert, checkpoints, variant, tmp_path):
    """A checkpoint that is written with another theta is caught."""
    folder = convert(checkpoints["olmo2"][0], "--skip-validation").output
    wrong = variant("rope_theta=int(thetas.pop())", "rope_theta=20_000")
    done = convert(folder, "--reverse", output=tmp_path / "core", tokenizer=None, script=wrong)
    assert done.code == 1
    assert ATTENTION in done.message
    assert not done.output.exists()


def test_overflow_of_the_written_type_is_named(convert, checkpoints, tmp_path):
    shutil.copytree(checkpoints["olmo1"][0], tmp_path / "large")
    state_of(tmp_path / "large", lambda state: state[W][0, 0:1].fill_(3.4e38) and None)  # rounds up to infinity in bfloat16
    done = convert(tmp_path / "large", "--dtype", "bfloat16")
    assert done.code == 1
    assert f"{W} has numbers too large for bfloat16; use --dtype keep" in done.message


def test_a_cut_safetensors_file_is_named(convert, checkpoints, tmp_path):
    from safetensors.torch import save_file

    folder, native = checkpoints["olmo1"]
    (tmp_path / "cut").mkdir()
    shutil.copy(folder / "config.yaml", tmp_path / "cut")
    save_file(native.state_dict(), tmp_path / "cut" / "model.safetensors")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    for size in (3, 1000, len(whole) - 1):
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:size])
        done = convert(tmp_path / "cut")
        assert done.code == 1
        assert "model.safetensors: not a whole file of weights" in done.message
        assert not done.output.exists()


def test_the_latest_whole_step_is_taken(convert, checkpoints, tmp_path):
    """By number, not by spelling; a step that is not whole is passed over, with a word, unless it is asked for."""
    run = tmp_path / "run"
    for number in (2, 9, 10, 30):
        shutil.copytree(checkpoints["olmo1"][0], run / f"step{number}-unsharded")
    (run / "config.yaml").write_text("model: {}")
    (run / "latest-unsharded").symlink_to("step30-unsharded")
    cut(run / "step30-unsharded")
    done = convert(run, "--skip-validation", output=tmp_path / "latest")
    assert done.code == 0
    assert "step30-unsharded is not whole: model.pt is cut short" in done.said
    assert "step2" not in done.said
    assert manifest(tmp_path / "latest")["inputs"][0]["path"] == str(run / "step10-unsharded" / "config.yaml")
    assert convert(run, "--skip-validation", "--step", "9", output=tmp_path / "nine").code == 0
    assert "step9-unsharded" in (tmp_path / "nine" / "README.md").read_text(encoding="utf-8")
    for number in (30, 11):
        done = convert(run, "--step", number)
        assert done.code == 1
        assert f"no whole checkpoint of step {number}; steps there: [2, 9, 10, 30]" in done.message


def test_tokenizer_files_keep_their_bytes(convert, checkpoints, tokenizer, tmp_path):
    """Only a class that reloads with other ids is changed, and the checkpoint's stop token is named where none was."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tokenizer, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "kept": {"é": 1}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = convert(checkpoints["olmo1"][0], "--skip-validation", "--tokenizer", folder, output=tmp_path / "one")
    assert done.code == 0, done.message
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert (tmp_path / "one" / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    written = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert written.items() >= (config | {"tokenizer_class": "PreTrainedTokenizerFast"}).items()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=7))
    convert(checkpoints["olmo1"][0], "--skip-validation", "--tokenizer", folder, output=tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", ["tokenizer.json: not a tokenizer"]),
        ("tokenizer.json", b"\xff\x00", ["tokenizer.json: not a tokenizer"]),
        ("tokenizer.json", None, ["no tokenizer.json there"]),
        ("tokenizer_config.json", "[1]", ["tokenizer_config.json is no JSON object"]),
        ("tokenizer_config.json", '{"eos_token": "<|pad|>"}', ["stops at id 0, '<|endoftext|>'", "eos_token is '<|pad|>'"]),
        ("special_tokens_map.json", '{"eos_token": "<|pad|>"}', ["reloads with eos id"]),
    ],
)
def test_a_bad_tokenizer_is_refused(name, content, words, convert, checkpoints, tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tokenizer, folder)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = convert(checkpoints["olmo1"][0], "--skip-validation", "--tokenizer", folder)
    assert done.code == 1
    for word in words:
        assert word in done.message
    assert not done.output.exists()


def test_too_little_memory_is_said_before_anything_is_written(convert, checkpoints, tmp_path):
    """The embeddings alone are more than the machine's memory, in a file that is a hole but for its header."""
    rows = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 2  # 1 KB of memory a row, twice over
    folder, header, offset = tmp_path / "vast", {}, 0
    shutil.copytree(checkpoints["olmo1"][0], folder)
    (folder / "model.pt").unlink()
    settings_of(folder, embedding_size=rows)
    for name, weight in checkpoints["olmo1"][1].state_dict().items():
        shape = [rows if height == 384 else height for height in weight.shape]
        end = offset + 4 * shape[0] * shape[1]
        header[name], offset = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    done = convert(folder)
    assert done.code == 1
    assert "--skip-validation leaves it out" in done.message
    assert not done.output.exists()


def test_a_full_disk_is_one_sentence(checkpoints, tokenizer, tmp_path):
    """A limit on the size of a file stands for the disk: exit 1, whole shards wait for the next run, nothing passes for a model."""
    shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path)
    words = ["-I", tmp_path / SCRIPT, "--input", checkpoints["olmo1"][0], "--tokenizer", tokenizer, "--output", tmp_path / "hf"]
    command = ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh", sys.executable, *words, "--skip-validation"]
    environment = clean_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"{SCRIPT}: {tmp_path / 'hf'}: File too large; mend that and run it again\n")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {".begun.json", ".unverified"}
    assert not any((tmp_path / "hf" / ".unverified").iterdir())


def test_a_missing_package_is_named(checkpoints, tokenizer, tmp_path):
    """In an environment that has links to all packages of this one but olmo."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env").glob("lib/python3.*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name != "olmo" and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    words = ["--input", checkpoints["olmo1"][0], "--tokenizer", tokenizer, "--output", tmp_path / "hf"]
    command = [tmp_path / "env/bin/python", "-I", ROOT / "scripts" / SCRIPT, *words]
    done = subprocess.run(list(map(str, command)), env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "package ai2-olmo is missing" in done.stderr and "compare nothing: --skip-validation" in done.stderr
    assert not (tmp_path / "hf").exists()
    assert subprocess.run([*map(str, command), "--skip-validation"], env=clean_environment()).returncode == 0


@pytest.mark.parametrize("moment", ["shards", "comparison"])
def test_killed_and_run_again(moment, run_script, convert, checkpoints, tokenizer, tmp_path):
    """kill -9 leaves the old folder, which --overwrite has put aside, whole, and of the new one nothing that could pass for a model.

    The next run takes whole shards up and gives the undisturbed run's bytes.
    """
    words = ["--input", checkpoints["olmo1"][0], "--tokenizer", tokenizer, "--max-shard-size", "100kB", "--output"]
    old = convert(checkpoints["olmo1"][0], "--dtype", "bfloat16", "--skip-validation", output=tmp_path / "killed")
    before, output = files_of(old.output), old.output
    shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path)
    command = [sys.executable, "-I", tmp_path / SCRIPT, *words, output, "--overwrite"]
    process = subprocess.Popen(list(map(str, command)), env=clean_environment(), stderr=subprocess.DEVNULL)
    hidden = output / ".unverified"
    while process.poll() is None:
        shards = sorted(hidden.glob("model-*.safetensors"))
        if (hidden / "config.json").exists() if moment == "comparison" else len(shards) >= 2:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {".begun.json", ".unverified"}
    aside = next(tmp_path.glob("killed.old-*"))
    assert files_of(aside) == before and (aside / "manifest.json").exists()
    first, written = shards[0], shards[0].stat().st_mtime_ns
    shards[1].unlink()
    done = run_script(SCRIPT, *words, output)
    assert done.returncode == 0, done.stderr
    calm = convert(checkpoints["olmo1"][0], "--max-shard-size", "100kB", output=tmp_path / "calm")
    assert files_of(output) == files_of(calm.output)
    assert (output / first.name).stat().st_mtime_ns == written


def test_stopped_while_moving_up(convert, checkpoints, tmp_path):
    """When a file cannot be moved the folder has no config.json, so nothing loads it; the next run mends it."""
    flags = ["--max-shard-size", "200kB", "--skip-validation"]
    wanted = files_of(convert(checkpoints["olmo1"][0], *flags, output=tmp_path / "calm").output)
    output = tmp_path / "hf"
    obstacle = output / "model-00003-of-00004.safetensors"

    def obstruct():
        while not (output / ".unverified" / "model-00001-of-00004.safetensors").exists():
            time.sleep(0.001)
        (obstacle / "folder").mkdir(parents=True)

    thread = threading.Thread(target=obstruct, daemon=True)
    thread.start()
    with pytest.raises(OSError):
        convert(checkpoints["olmo1"][0], *flags)
    thread.join(60)
    assert (output / "model-00001-of-00004.safetensors").exists()
    assert not (output / "manifest.json").exists() and not (output / "config.json").exists()
    shutil.rmtree(obstacle)
    assert convert(checkpoints["olmo1"][0], *flags).code == 0
    assert files_of(output) == wanted


def test_memory_is_that_of_a_piece(run_script, tokenizer, tmp_path):
    """A checkpoint of 480 MB, one tensor of it 200 MB, takes at most 400 MB, all checks but the logits and mapped pages included."""
    import torch

    settings = {"d_model": 512, "n_heads": 8, "n_layers": 12, "embedding_size": 100_352, "vocab_size": VOCABULARY, "init_device": "meta"}
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    empty = OLMo(ModelConfig(**BASE | settings))
    state = {name: torch.full(weight.shape, 0.01) for name, weight in empty.state_dict().items()}
    (tmp_path / "large").mkdir()
    written = {"model": json.loads(json.dumps(empty.config.asdict()))}
    (tmp_path / "large" / "config.yaml").write_text(yaml.safe_dump(written))
    torch.save(state, tmp_path / "large" / "model.pt")
    size = (tmp_path / "large" / "model.pt").stat().st_size
    del state
    shutil.copy(ROOT / "scripts" / SCRIPT, tmp_path)
    words = [
        "-I",
        tmp_path / SCRIPT,
        "--input",
        tmp_path / "large",
        "--tokenizer",
        tokenizer,
        "--output",
        tmp_path / "hf",
        "--skip-validation",
    ]
    # A shell between: the kernel counts the memory of the process that starts a program into the program's own peak
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, *words]
    done = subprocess.run(list(map(str, command)), env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 450e6
    assert manifest(tmp_path / "hf")["peak_rss_bytes"] < 400e6


def test_defaults_are_those_of_ai2_olmo(script):
    from olmo.config import ModelConfig

    known = ModelConfig()
    assert {key: getattr(known, key) for key in script.MODEL_DEFAULTS} == script.MODEL_DEFAULTS


def test_sizes(script):
    import argparse

    cases = {"4GB": 4 * 10**9, "500MB": 5 * 10**8, "1.5k": 1500, "2GiB": 2 * 2**30, "1000": 1000, "7B": 7}
    assert {text: script.size(text) for text in cases} == cases
    for text in ("", "GB", "-1GB", "0", "4 giga"):
        with pytest.raises(argparse.ArgumentTypeError):
            script.size(text)


def test_rows_are_put_together_from_blocks(script, tmp_path):
    """A tensor that was cut in both dimensions, its blocks at odd places of two files, is read in any range of rows."""
    import torch

    whole = torch.arange(5 * 7, dtype=torch.float32).view(5, 7)
    chunks = []
    for number, (rows, columns) in enumerate([((0, 3), (0, 4)), ((0, 3), (4, 7)), ((3, 5), (0, 4)), ((3, 5), (4, 7))]):
        path, block = tmp_path / f"{number % 2}.distcp", whole[slice(*rows), slice(*columns)]
        with open(path, "ab") as file:
            file.write(b"odd")
            chunks.append(script.Chunk(path, file.tell(), (rows[0], columns[0]), tuple(block.shape)))
            file.write(block.contiguous().numpy().tobytes())
    stored = script.Stored(whole.shape, "float32", chunks)
    for start in range(5):
        for stop in range(start + 1, 6):
            assert torch.equal(stored.rows(start, stop), whole[start:stop])
    assert torch.equal(torch.cat(list(stored.pieces(1, 5))), whole[1:])


def test_shards_are_filled_in_order(script):
    parts = [script.Part(f"t{k}", f"s{k}", 0, rows, (rows, 10)) for k, rows in enumerate([3, 3, 4, 9, 1, 1])]
    sizes = {part.target: 4 * script.count(part) for part in parts}
    shards = script.plan_shards(parts, sizes, 280)
    assert [[part.target for part in shard] for shard in shards] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    assert script.shard_names(1) == ["model.safetensors"]
    assert script.shard_names(2)[1] == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "words", [["--dtype", "int8"], ["--max-shard-size", "big"], ["--step", "last"], ["--vocab", "pad"], ["--vocab", "pad:0"]]
)
def test_bad_flags_are_usage_errors(words, convert, checkpoints):
    done = convert(checkpoints["olmo1"][0], *words)
    assert done.code == 2
    assert words[1] in done.said
    assert not done.output.exists()


def test_reverse_takes_no_flags_of_the_other_direction(convert, checkpoints):
    done = convert(checkpoints["olmo1"][0], "--reverse", "--dtype", "bfloat16")
    assert done.code == 2
    assert "--reverse takes no --map, --dtype" in done.said
    assert convert(checkpoints["olmo1"][0], tokenizer=None).code == 2


def norm(x, weights, name):
    """RMSNorm with the weight of that name."""
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]


def attend(q, k, v):
    """Causal attention of (batch, tokens, heads, width); fewer heads of keys are repeated."""
    import torch

    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def llama_logits(w, ids, heads=4, kv=2, layers=2, theta=10_000):
    """A Llama whose rotary pairs are neighbouring numbers, taken as complex ones, from its parts' definitions."""
    import torch

    x = w["tok_embeddings.weight"][ids]
    width = x.shape[-1] // heads
    angles = torch.outer(torch.arange(ids.shape[1]).float(), theta ** (-torch.arange(0, width, 2).float() / width))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def turned(y):
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for n in range(layers):
        h = norm(x, w, f"layers.{n}.attention_norm")
        q, k, v = (
            (h @ w[f"layers.{n}.attention.w{p}.weight"].T).unflatten(-1, (number, width))
            for p, number in (("q", heads), ("k", kv), ("v", kv))
        )
        x = x + attend(turned(q), turned(k), v) @ w[f"layers.{n}.attention.wo.weight"].T
        h = norm(x, w, f"layers.{n}.ffn_norm")
        gate, up = (h @ w[f"layers.{n}.feed_forward.w{p}.weight"].T for p in (1, 3))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"layers.{n}.feed_forward.w2.weight"].T
    return norm(x, w, "norm") @ w["output.weight"].T


def gpt_logits(w, ids, heads=4, layers=2):
    """GPT-2 with the exact GELU; a missing bias is none."""
    from torch.nn.functional import gelu, layer_norm

    def apply(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    for n in range(layers):
        h = f"transformer.h.{n}"
        parts = apply(normed(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, -1)
        x = x + apply(attend(*(part.unflatten(-1, (heads, -1)) for part in parts)), f"{h}.attn.c_proj")
        x = x + apply(gelu(apply(normed(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return normed(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def save_mapped(folder, family):
    """Write a random torch file of another family; return (path, weights, the family's logits)."""
    import torch

    torch.manual_seed(1)
    folder.mkdir()
    if family == "llama":
        shapes = {"tok_embeddings": (384, 128), "norm": (128,), "output": (384, 128)}
        for n in range(2):
            shapes |= {f"layers.{n}.attention.w{p}": (rows, 128) for p, rows in (("q", 128), ("k", 64), ("v", 64), ("o", 128))}
            shapes |= {f"layers.{n}.feed_forward.w{p}": shape for p, shape in ((1, (96, 128)), (2, (128, 96)), (3, (96, 128)))}
            shapes |= {f"layers.{n}.attention_norm": (128,), f"layers.{n}.ffn_norm": (128,)}
        weights = {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
        (folder / "params.json").write_text(
            '{"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}'
        )
        torch.save(weights | {"rope.freqs": torch.ones(16)}, folder / "consolidated.00.pth")
        return folder / "consolidated.00.pth", weights, llama_logits
    shapes = {"wte.weight": (384, 128), "wpe.weight": (128, 128), "ln_f.weight": (128,)}
    for n in range(2):
        matrices = {"attn.c_attn": (384, 128), "attn.c_proj": (128, 128), "mlp.c_fc": (512, 128), "mlp.c_proj": (128, 512)}
        shapes |= {f"h.{n}.{name}.weight": shape for name, shape in (matrices | {"ln_1": (128,), "ln_2": (128,)}).items()}
    if family == "nanogpt-biased":
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if "h." in name or "ln_f" in name}
    weights = {f"transformer.{name}": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    state = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    settings = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 384, "bias": "biased" in family}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"model": state, "model_args": settings, "optimizer": moments, "iter_num": 9, "best_val_loss": torch.tensor(2.5)}
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt", weights, gpt_logits


def change_map(folder, family, change):
    """Return a copy of the family's map, its stop token that of the tests' tokenizer."""
    rules = yaml.safe_load((ROOT / "recipes" / "maps" / f"{family.partition('-')[0]}.yaml").read_text())
    rules["config"] |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": rules["config"]["vocab_size"]}
    change(rules)
    (folder / "map.yaml").write_text(yaml.safe_dump(rules))
    return folder / "map.yaml"


@pytest.mark.parametrize("family", ["nanogpt", "nanogpt-biased", "llama"])
def test_other_families_by_a_map_of_names(family, convert, tmp_path):
    """The written model computes what the family's own definition gives for the file's tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    path, weights, native = save_mapped(tmp_path / "checkpoint", family)
    done = convert(path, "--map", change_map(tmp_path, family, lambda rules: None), "--max-shard-size", "200kB")
    assert done.code == 0, done.message
    model = AutoModelForCausalLM.from_pretrained(done.output)
    ids = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, wanted = model(ids).logits, native(weights, ids)
    assert wanted.std() > 0.3
    assert torch.allclose(found, wanted, atol=2e-4 * wanted.abs().max())
    assert manifest(done.output)["metrics"]["max_abs_logit_difference"] == 0


MAP_FAULTS = {
    "missing": ("llama", lambda w, r: w.pop("norm.weight"), "nothing becomes model.norm.weight: norm.weight is missing"),
    "unnamed": ("llama", lambda w, r: r["tensors"].pop("model.norm.weight"), "nothing becomes model.norm.weight"),
    "left-over": ("llama", lambda w, r: w.update(extra=w["norm.weight"]), "nothing takes extra"),
    "shape": ("nanogpt", lambda w, r: r["config"].update(n_embd=32), "transformers wants"),
    "layers": ("llama", lambda w, r: r["config"].update(num_hidden_layers=1), "nothing takes layers.1."),
    "untied": (
        "nanogpt",
        lambda w, r: w.update({"lm_head.weight": w["lm_head.weight"] + 1}),
        "lm_head.weight differs from transformer.wte",
    ),
    "no-setting": ("llama", lambda w, r: r["config"].update(hidden_size="$width"), "correct the map"),
    "no-such-type": ("llama", lambda w, r: r["config"].update(model_type="nothing"), "correct the map"),
}


@pytest.mark.parametrize("name", MAP_FAULTS)
def test_a_map_that_does_not_fit_is_refused_by_name(name, convert, tmp_path):
    import torch

    family, spoil, word = MAP_FAULTS[name]
    path, weights, _ = save_mapped(tmp_path / "checkpoint", family)

    def change(rules):
        spoil(weights, rules)
        rules.pop("strip", None)

    rules = change_map(tmp_path, family, change)
    torch.save({"model": weights, "model_args": torch.load(path)["model_args"]} if family == "nanogpt" else weights, path)
    done = convert(path, "--map", rules)
    assert done.code == 1
    assert word in done.message
    assert "\n" not in done.message.strip()
    assert not done.output.exists()


def test_a_hostile_torch_file_is_not_run_by_a_map(convert, tmp_path):
    import torch

    (tmp_path / "params.json").write_text("{}")
    torch.save({"norm.weight": Evil(tmp_path / "was-run")}, tmp_path / "consolidated.00.pth")
    done = convert(tmp_path / "consolidated.00.pth", "--map", ROOT / "recipes" / "maps" / "llama.yaml")
    assert done.code == 1
    assert "mkdir to be run" in done.message
    assert not (tmp_path / "was-run").exists()
    assert not done.output.exists()


@pytest.mark.parametrize(("spoil", "word"), [("cut", "correct the map"), ("nan", "norm.weight holds NaN")])
def test_a_bad_torch_file_is_refused_by_name(spoil, word, convert, tmp_path):
    import torch

    path, weights, _ = save_mapped(tmp_path / "checkpoint", "llama")
    rules = change_map(tmp_path, "llama", lambda rules: None)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        weights["norm.weight"][3] = float("nan")
        torch.save(weights, path)
    done = convert(path, "--map", rules)
    assert done.code == 1
    assert word in done.message and ("norm.weight" in done.message or str(path) in done.message)
    assert "\n" not in done.message.strip()
    assert not done.output.exists()


ZERO = """
import os, sys
from pathlib import Path

target, rank = Path(sys.argv[1]), sys.argv[2]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
import deepspeed, torch
from transformers import AutoConfig, AutoModelForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
sizes = dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True)
config = AutoConfig.for_model("olmo2", **sizes)
for stage in (2, 3):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    settings["zero_force_ds_cpu_optimizer"] = False
    engine = deepspeed.initialize(model=model, config=settings, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))[0]
    ids = torch.arange(32)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(target / f"zero{stage}" / "checkpoint-1"), tag="global_step1")
    config.save_pretrained(target / f"zero{stage}" / "checkpoint-1")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        if rank == "0":
            torch.save({name: weight.detach().clone() for name, weight in model.named_parameters()}, target / f"trained{stage}.pt")
"""


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """A folder with a checkpoint of ZeRO-2 and one of ZeRO-3, of two processes, and the weights that both had then."""
    import socket

    target = tmp_path_factory.mktemp("zero")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", ZERO, str(target)]
    ranks = [
        subprocess.Popen([*command, rank, port], env=clean_environment(), stderr=subprocess.PIPE, stdout=2, text=True) for rank in "01"
    ]
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said
    return target


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_checkpoints(stage, zero, convert):
    """The pieces of two processes are the model that they trained, and the written folder computes what it computes."""
    import torch
    from transformers import AutoModelForCausalLM

    done = convert(zero / f"zero{stage}", "--max-shard-size", "100kB")
    assert done.code == 0, done.message
    state = torch.load(zero / f"trained{stage}.pt")
    model = AutoModelForCausalLM.from_pretrained(done.output)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state[name]), name
    record = manifest(done.output)
    assert record["metrics"]["max_abs_logit_difference"] == 0
    assert record["metrics"]["argmax_agreement"] == 1
    assert record["summary"].endswith("shards of checkpoint-1")


def zero_file(folder, kind="optim"):
    return sorted(folder.glob(f"global_step1/*rank_1*{kind}_states.pt"))[0]


def hostile_zero(folder):
    import torch

    torch.save({"module": Evil(folder / "was-run")}, zero_file(folder))


def empty_piece(folder):
    """The shape of a weight in the model states becomes that of ZeRO-3's placeholder."""
    import torch

    for path in folder.glob("global_step1/*model_states.pt"):
        content = torch.load(path, weights_only=False)
        shapes = content["param_shapes"][0]
        first, second = list(shapes)[:2]
        shapes[second] = torch.Size([shapes[second].numel() + shapes[first].numel()])
        shapes[first] = torch.Size([0])
        torch.save(content, path)


BAD_ZERO = {
    "missing": (lambda f: zero_file(f).unlink(), ["global_step1: not a whole DeepSpeed checkpoint", "Expected 2"]),
    "cut": (lambda f: zero_file(f).write_bytes(zero_file(f).read_bytes()[:5000]), ["optim_states.pt: not a whole DeepSpeed checkpoint"]),
    "hostile": (hostile_zero, ["mkdir to be run", "nothing was run"]),
    "no-config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "no-states": (lambda f: shutil.rmtree(f / "global_step1"), ["*_states.pt of DeepSpeed are missing"]),
    "wider": (lambda f: change_config(f, intermediate_size=128), ["mlp.gate_proj.weight is (96, 64)"]),
    "deeper": (lambda f: change_config(f, num_hidden_layers=3), ["model.layers.2.", "is missing"]),
    "shallower": (lambda f: change_config(f, num_hidden_layers=1), ["nothing takes model.layers.1."]),
    "empty": (empty_piece, ["is an empty piece of ZeRO-3"]),
}


@pytest.mark.parametrize("name", BAD_ZERO)
def test_a_bad_deepspeed_checkpoint_is_refused_by_name(name, zero, convert, tmp_path):
    spoil, words = BAD_ZERO[name]
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(zero / "zero3" / "checkpoint-1", folder)
    spoil(folder)
    done = convert(folder)
    assert done.code == 1
    for word in words:
        assert word in done.message
    assert "\n" not in done.message.strip()
    assert not done.output.exists()
    assert not (folder / "was-run").exists()
