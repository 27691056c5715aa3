"""serve_vllm.py: what stands in the way is said before vLLM loads; what is started ends, whoever dies. prove_serving.py: the right ids.

The model is built by hand: attention and MLP add nothing, and the output matrix is the embedding shifted by a permutation, so the token
after t is NEXT[t] whatever stands before it. Greedy ids are thus known without running anything.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, WORD = 2, 200  # the stop token; the only word that the model answers in a chat
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, LAYERS, HEADS = 64, 2, 2


def byte_tokenizer():
    """Return a tokenizer of bytes: three special tokens and the 256 letters of byte-level BPE, no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def next_token(tokenizer):
    """Return NEXT: a permutation of the ids, t + 1 but for the turn: after the new line comes WORD, after WORD the end."""
    following = [*range(1, 259), 0]
    newline = tokenizer.encode("\n").ids[0]
    for token, wanted in ((newline, WORD), (WORD, END)):
        other = following.index(wanted)
        following[token], following[other] = following[other], following[token]
    return following


def write_model(folder):
    """Write the hand-made model into `folder`, in two shards; returns (its tokenizer, NEXT)."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    following = next_token(tokenizer)
    embedding = np.random.default_rng(0).standard_normal((259, HIDDEN), dtype=np.float32)
    output = np.empty_like(embedding)
    output[following] = embedding
    body = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(HIDDEN, np.float32)}
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64)}
    shapes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    for layer in range(LAYERS):
        body |= {f"model.layers.{layer}.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        body |= {f"model.layers.{layer}.{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    shards = {"model-00001-of-00002.safetensors": body, "model-00002-of-00002.safetensors": {"lm_head.weight": output}}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": 1, "num_hidden_layers": LAYERS, "vocab_size": 259}
    config |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32"}
    config |= {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": END, "pad_token_id": 0},
        "model.safetensors.index.json": {
            "metadata": {},
            "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": TEMPLATE,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, following


def chain(following, ids, number):
    """Return the `number` tokens that the hand-made model gives after `ids`."""
    found = [*ids]
    for _ in range(number):
        found.append(following[found[-1]])
    return found[len(ids) :]


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def serve(load_script):
    return load_script("serve_vllm.py")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def group_members(leader):
    """Return the pids of the processes in the group or session of `leader` that are not zombies."""
    rows = subprocess.run(["ps", "-eo", "pid=,pgid=,sid=,stat="], capture_output=True, text=True).stdout.splitlines()
    rows = [row.split() for row in rows]
    return [int(pid) for pid, group, session, state in rows if str(leader) in (group, session) and state[0] != "Z"]


def wait_until(true, seconds):
    """Wait until true() is; returns whether it became so."""
    end = time.monotonic() + seconds
    while not (held := true()) and time.monotonic() < end:
        time.sleep(0.2)
    return held


GPUS = {0: (81559, 81000), 1: (81559, 81000), 2: (81559, 9000), 3: (81559, 20000)}  # MiB: total, free


@pytest.fixture
def nvidia_smi(tmp_path):
    """A fake nvidia-smi first on PATH: four GPUs, two of them in use by this very test process."""
    total = "".join(f"{i}, GPU-{i}, {total}, {free}\n" for i, (total, free) in GPUS.items())
    apps = f"GPU-2, {os.getpid()}, 72000\nGPU-3, {os.getpid()}, 61000\n"
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncase $1 in *compute-apps*) printf '{apps}';; *) printf '{total}';; esac\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}"}


def test_a_dry_run_on_a_cpu_prints_a_command_that_a_shell_understands(run_script, model):
    answer = run_script("serve_vllm.py", "--model", model, "--port", free_port(), "--dry-run", "--", "--seed", "7")
    assert answer.returncode == 0, answer.stderr
    words = shlex.split(answer.stdout)
    at = words.index(str(Path(sys.executable).with_name("vllm")))
    assert not any(word.startswith("HF_HUB_OFFLINE") for word in words[:at]), "it is set already"
    assert words[at + 1 : at + 5] == ["serve", str(model), "--served-model-name", "model"]
    assert words[-2:] == ["--seed", "7"]
    assert "--tensor-parallel-size" not in words
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(512 << 20)
    assert "-O0" in words


def test_a_cpu_takes_the_users_word_over_its_defaults(serve, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    config = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "max_position_embeddings": 9,
    }
    flags = ["--enforce-eager", "--kv_cache_memory_bytes=1G"]
    assert serve.cpu_flags(flags, "bfloat16", config, 2048) == []
    sized = serve.cpu_flags(["-cc.mode=0"], "auto", config, 8192)
    assert sized == ["--kv-cache-memory-bytes", str(2 * 2 * 4 * 32 * 8 * 128 * 8192)]  # two sequences, keys and values, four bytes


def test_a_dry_run_on_two_gpus(run_script, model, nvidia_smi, tmp_path):
    recipe = tmp_path / "serve.yaml"
    recipe.write_text(
        "served-model-name: tiny\nmax-model-len: 128\nport: 8099\nvllm-args: --enable-auto-tool-choice --tool-call-parser hermes\n"
    )
    harmful = {
        "VLLM_DISABLE_TORCH_COMPILE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64",
        "VLLM_PORT": "tcp://10.0.0.7:8000",
    }
    words = ["--config", recipe, "--model", model, "--gpus", "0,1", "--dry-run", "--", "--seed", "7"]
    answer = run_script("serve_vllm.py", *words, env=nvidia_smi | harmful)
    assert answer.returncode == 0, answer.stderr
    line = shlex.split(answer.stdout)
    assert line[:5] == ["env", "-u", "VLLM_DISABLE_TORCH_COMPILE", "-u", "VLLM_PORT"]
    assert f"PATH={Path(sys.executable).parent}:{nvidia_smi['PATH']}" in line or str(Path(sys.executable).parent) in nvidia_smi["PATH"]
    assert {"CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=0,1", "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"} <= set(line)
    text = " ".join(line)
    assert f"serve {model} --served-model-name tiny --host 127.0.0.1 --port 8099" in text
    assert "--max-model-len 128 --tensor-parallel-size 2 -cc.mode=0" in text
    assert text.endswith("--enable-auto-tool-choice --tool-call-parser hermes --seed 7")
    assert "kv-cache" not in text, "a GPU's memory is vLLM's to divide"
    for name in harmful:
        assert name in answer.stderr


def test_custom_all_reduce_given_up_keeps_the_allocator(serve):
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert "PYTORCH_ALLOC_CONF" not in serve.environment_changes(environment, ["--disable-custom-all-reduce"], 2, [0, 1], False)[0]
    assert "PYTORCH_ALLOC_CONF" not in serve.environment_changes(environment, [], 1, [0], False)[0]
    assert serve.environment_changes(environment, [], 2, [0, 1], False)[0]["PYTORCH_ALLOC_CONF"] is None


def gpu_problems(serve, monkeypatch, nvidia_smi, chosen, weights, flags=(), token=0, length=0):
    monkeypatch.setenv("PATH", nvidia_smi["PATH"])
    problems = []
    share = serve.check_gpus(serve.query_gpus(), chosen, weights, token, length, list(flags), problems)
    return share, problems


def test_free_gpus_are_taken_as_vllm_would(serve, monkeypatch, nvidia_smi):
    assert gpu_problems(serve, monkeypatch, nvidia_smi, [0, 1], 15e9) == (serve.UTILIZATION, [])


def test_a_gpu_that_others_use_is_shared_when_the_weights_fit(serve, monkeypatch, nvidia_smi):
    share, problems = gpu_problems(serve, monkeypatch, nvidia_smi, [0, 3], 15e9)
    assert problems == []
    assert share == 0.23  # (20000 - 1024) / 81559, downwards


def test_a_full_gpu_is_refused_and_its_holder_named(serve, monkeypatch, nvidia_smi):
    _, problems = gpu_problems(serve, monkeypatch, nvidia_smi, [0, 2], 15e9)
    assert len(problems) == 1
    for words in ("GPU 2 has 9.4 GB of 85.5 GB free", f"75.5 GB by pid {os.getpid()} (", "take 15.0 GB a GPU", "--gpus"):
        assert words in problems[0]
    _, problems = gpu_problems(serve, monkeypatch, nvidia_smi, [3], 1e9, ["--gpu-memory-utilization=0.9"])
    assert "--gpu-memory-utilization 0.9 asks for more: lower it to 0.23" in problems[0]


def test_weights_and_cache_decide_the_share_or_the_length(serve, monkeypatch, nvidia_smi):
    """Qwen3-14B as the user runs it: 29.5 GB on two GPUs, 40 layers with 8 heads of 128 for keys and values, 32,000 tokens."""
    qwen = {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 40}
    token = serve.kv_bytes(qwen, 2, 2) * serve.full_layers(qwen)
    assert token == 2 * 2 * 4 * 128 * 40
    fits = {"token": token, "length": 32000}
    assert gpu_problems(serve, monkeypatch, nvidia_smi, [0, 1], 14.75e9, **fits) == (serve.UTILIZATION, [])
    share, problems = gpu_problems(serve, monkeypatch, nvidia_smi, [1], 75e9, **fits)
    assert (share, problems) == (0.93, []), "75 + 2.6 + 1.6 GB of 85.5: more than vLLM's share, and free"
    _, problems = gpu_problems(serve, monkeypatch, nvidia_smi, [3], 17e9, **fits)
    assert len(problems) == 1
    assert "17.0 GB of weights a GPU, and 2.6 GB of KV cache for 32000 tokens do not fit: --max-model-len 12800 does" in problems[0]
    left = 0.23 * (81559 << 20) - 17e9 - serve.WORKSPACE
    assert 12800 * token <= left < (12800 + 256) * token


def test_only_layers_that_keep_all_of_a_sequence_count(serve):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "linear_attention"]
    assert serve.full_layers({"layer_types": kinds, "num_hidden_layers": 4}) == 1
    assert serve.full_layers({"sliding_window": 4096, "num_hidden_layers": 4}) == 0
    assert serve.full_layers({"sliding_window": 4096, "use_sliding_window": False, "num_hidden_layers": 4}) == 4
    assert serve.kv_bytes({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}, 2, 8) == 2 * 576
    assert serve.kv_bytes({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}, 1, 8) == 2 * 8, "heads are copied"


def test_an_orphaned_worker_is_named_and_not_killed(run_script, model, nvidia_smi, tmp_path):
    """Two workers of engines, with the names that vLLM gives to such processes: one whose server is gone, and one whose server lives."""
    (tmp_path / "engine").write_text("(exec -a VLLM::Worker sleep 300) & echo $!; wait")
    engine = f"(exec -a VLLM::EngineCore bash {tmp_path}/engine) &"
    servers = [subprocess.Popen(["bash", "-c", f"{engine} {end}"], stdout=subprocess.PIPE, text=True) for end in ("", "wait; : vllm serve")]
    pids = [int(server.stdout.readline()) for server in servers]
    try:
        assert servers[0].wait(10) == 0
        tool = Path(nvidia_smi["PATH"].partition(":")[0], "nvidia-smi")
        apps = "".join(f"GPU-{2 + n}, {pid}, 61000\\n" for n, pid in enumerate(pids))
        tool.write_text(re.sub(r"printf 'GPU-2.*?';;", lambda _: f"printf '{apps}';;", tool.read_text(), flags=re.S))
        words = ["--model", model, "--gpus", "2,3", "--port", free_port(), "--", "--gpu-memory-utilization", "0.9"]
        answer = run_script("serve_vllm.py", *words, env=nvidia_smi)
        assert answer.returncode == 1
        orphan, served = (next(line for line in answer.stderr.splitlines() if f"GPU {n} has" in line) for n in (2, 3))
        assert f"64.0 GB by pid {pids[0]} (" in orphan
        assert f"an orphaned vLLM worker, `kill -9 {pids[0]}` ends it: VLLM::Worker" in orphan
        assert f"by pid {pids[1]} (" in served
        assert "orphaned" not in served
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for server in servers:
            server.stdout.close()
            server.wait(10)


def test_cuda_visible_devices_by_number_and_by_uuid(serve, monkeypatch):
    gpus = {index: {"uuid": f"GPU-{index}a"} for index in range(4)}
    args = serve.build_parser().parse_args([])
    for visible, chosen in (("2,3", [2, 3]), ("GPU-3a,GPU-0a", [3, 0]), ("", []), ("-1", []), ("7", ["7"]), (None, [0, 1, 2, 3])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert serve.choose_gpus(args, gpus) == chosen
    args.gpus = [1]
    assert serve.choose_gpus(args, gpus) == [1]


def test_a_gpu_that_is_not_there(run_script, model, nvidia_smi):
    answer = run_script("serve_vllm.py", "--model", model, "--gpus", "1,9", "--port", free_port(), env=nvidia_smi)
    assert answer.returncode == 1
    assert "there is no GPU 9; nvidia-smi shows 0, 1, 2, 3" in answer.stderr


def test_tensor_parallel_that_does_not_divide_the_heads(run_script, model, nvidia_smi):
    answer = run_script("serve_vllm.py", "--model", model, "--gpus", "0,1,2", "--port", free_port(), env=nvidia_smi)
    assert answer.returncode == 1
    assert "tensor parallel 3 does not divide the 2 attention heads; --tensor-parallel-size 1, 2 does" in answer.stderr
    answer = run_script(
        "serve_vllm.py", "--model", model, "--gpus", "0", "--tensor-parallel-size", 2, "--port", free_port(), env=nvidia_smi
    )
    assert "2 GPUs are needed" in answer.stderr


def truncate(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def leave_empty(folder):
    save_file({"lm_head.weight": np.zeros((0, HIDDEN), np.float32)}, folder / "model-00002-of-00002.safetensors")


def rename_tensor(folder):
    save_file({"head": np.zeros((1, HIDDEN), np.float32)}, folder / "model-00002-of-00002.safetensors")


def edit(name, **changes):
    """Return a function that changes values of a JSON file in a model's folder; None takes one away."""

    def change(folder):
        old = json.loads((folder / name).read_text(encoding="utf-8"))
        new = {key: value for key, value in (old | changes).items() if value is not None}
        (folder / name).write_text(json.dumps(new), encoding="utf-8")

    return change


BROKEN = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), ["is no folder", "hub id"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json does not exist"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read", "line 1"]),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json holds no JSON object"]),
    "missing shard": (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), ["00002-of-00002.safetensors is missing"]),
    "truncated shard": (truncate, ["00002-of-00002.safetensors has", "bytes where its header promises"]),
    "pointer": (lambda folder: (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs…"), ["Git LFS pointer"]),
    "empty shard": (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""), ["no whole safetensors file"]),
    "ZeRO-3": (leave_empty, ["lm_head.weight is empty", "zero_to_fp32.py"]),
    "other tensors": (rename_tensor, ["lacks the tensor lm_head.weight"]),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], ["holds no weights"]),
    "narrow heads": (edit("config.json", num_attention_heads=4), ["no CPU attention for heads of 16", "on a GPU"]),
    "no template": (edit("tokenizer_config.json", chat_template=None), ["has no chat template", "--chat-template FILE.jinja"]),
    "pad = eos": (edit("generation_config.json", pad_token_id=END), ["pads with its only stop token (2)", "pad_token_id in config.json"]),
    "unknown architecture": (edit("config.json", architectures=["LamaForCausalLM"]), ["LamaForCausalLM is no architecture", "config.json"]),
    "fewer layers": (edit("config.json", num_hidden_layers=3), ["weights of 2 layers where config.json says 3"]),
    "another embedding": (edit("config.json", vocab_size=260), ["embed_tokens.weight is [259, 64] where config.json says [260, 64]"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["holds no tokenizer", "--tokenizer"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_is_not_whole_is_refused_before_vllm_starts(case, run_script, model):
    damage, words = BROKEN[case]
    damage(model)
    answer = run_script("serve_vllm.py", "--model", model, "--port", free_port(), "--then", "true")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "starting" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in answer.stderr


def test_what_the_checks_accept(serve, model):
    """A pad token that is one of two stop tokens, one that a certificate cleared, code that the model brings, a layer more than counted."""
    problems = []
    for change in (
        edit("generation_config.json", eos_token_id=[END, 0], pad_token_id=END),
        edit("config.json", architectures=["MyOwn"], auto_map={"AutoModelForCausalLM": "mine.MyOwn"}, num_hidden_layers=1),
        edit("config.json", architectures=["Olmo2ForCausalLM"], auto_map=None),
    ):
        change(model)
        serve.check_model(model, [], problems)
    edit("generation_config.json", eos_token_id=END)(model)
    (model / "certificate.json").write_text("{}")
    (model / "certificate.json").write_text('{"stop_ids": [2]}')
    serve.check_model(model, [], problems)
    assert problems == []


def test_weights_are_counted_in_the_type_they_are_served_in(serve, model):
    sizes = serve.check_model(model, [], [])["sizes"]
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0.9 * stored < sizes["F32"] < stored
    assert serve.loaded({"BF16": 200, "F32": 400, "I32": 50, "F8_E4M3": 30}, 4) == 400 + 400 + 50 + 30
    assert serve.loaded({"BF16": 200, "F32": 400, "I32": 50, "F8_E4M3": 30}, 2) == 200 + 200 + 50 + 30


def write_adapter(folder, r=8, **config):
    """Write a LoRA adapter for the hand-made model that changes nothing."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": r, "lora_alpha": r, "target_modules": ["q_proj"], "bias": "none"} | config)
    )
    shapes = {"A": (r, HIDDEN), "B": (HIDDEN, r)}
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(layer, part): np.zeros(shape, np.float32) for layer in range(LAYERS) for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_bring_their_flags(run_script, serve, model, tmp_path):
    small, large = write_adapter(tmp_path / "small"), write_adapter(tmp_path / "large", r=40)
    problems = []
    assert serve.check_adapters(["--lora-modules", f"a={small}"], problems) == ["--enable-lora"]
    both = ["--enable-lora", "--lora-modules", json.dumps({"name": "a", "path": str(small)}), f"b={large}", "--seed", "7"]
    assert serve.check_adapters(both, problems) == ["--max-lora-rank", "64"]
    assert serve.check_adapters(["--lora-modules=hub=some/adapter"], problems) == []
    assert problems == []
    whole = write_adapter(tmp_path / "whole", modules_to_save=["embed_tokens"])
    (small / "adapter_model.safetensors").unlink()
    words = ["--lora-modules", f"a={small}", f"b={tmp_path}/gone", f"c={whole}"]
    answer = run_script("serve_vllm.py", "--model", model, "--port", free_port(), "--", *words)
    assert answer.returncode == 1
    for sentence in (
        "the LoRA adapter a has no adapter_model.safetensors",
        "the LoRA adapter b is not at",
        "c holds whole modules (embed_tokens)",
    ):
        assert sentence in answer.stderr


def venv(folder, with_vllm=True, torch="2.13.0", module=True):
    """Make a bare environment whose vLLM is metadata and an empty package; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    for name, needs, made in (("vllm", "torch==2.13.0", with_vllm), ("torch", "numpy", torch)):
        if made:
            (site / f"{name}-9.dist-info").mkdir()
            version = torch if name == "torch" else "0.32.0"
            (site / f"{name}-9.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\nRequires-Dist: {needs}\n")
            (site / name).mkdir()
            (site / name / "__init__.py").touch()
    if with_vllm:
        (folder / "bin/vllm").touch()
        if module:
            (site / "vllm/version.py").touch()
    return folder / "bin/python"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"with_vllm": False}, "vLLM is not installed beside"),
        ({"module": False}, "cannot run: its package is not there"),
        ({"torch": "2.14.1+cpu"}, "cannot run: it was compiled for torch 2.13.0, and torch is 2.14.1+cpu"),
        ({"torch": ""}, "cannot run: torch is not installed"),
    ],
)
def test_a_vllm_that_is_missing_or_broken(settings, words, model, tmp_path):
    """In the interpreter that runs the script, which is another one than that of these tests."""
    python = venv(tmp_path / "env", **settings)
    command = [python, "-I", ROOT / "scripts/serve_vllm.py", "--model", model, "--port", free_port()]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean_environment())
    assert answer.returncode == 1
    assert words in answer.stderr
    assert str(tmp_path / "env/bin") in answer.stderr
    assert "make setup" in answer.stderr


DOCTOR = """import json, os, sys
assert sys.argv[-1] == "--json" and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
if sys.argv[1] == "compile":
    print(json.dumps({"verdict": "no-compile", "environment": {"TRITON_CACHE_DIR": "/fresh"}, "vllm_args": ["-cc.mode=0"],
                      "cause": "no C compiler", "remedy": "apt install gcc"}))
else:
    assert sys.argv[1:4] == ["check", "--gpus", "0,1"]
    mark = os.environ.get("MARK", "ok")
    port = {"id": "port", "mark": "bad", "text": "p", "remedy": "r"}
    text = {"text": "GPUs 0,1 do not exchange data", "remedy": "NCCL_P2P_DISABLE=1"}
    print(json.dumps({"findings": [port, {"id": "all-reduce", "mark": mark, **text}]}))
"""


def test_the_doctor_beside_the_script_is_asked_on_gpus(model, nvidia_smi, tmp_path):
    """vLLM's CUDA build, in name; the doctor's answers are written here, as doctor.py gives them."""
    python = venv(tmp_path / "env")
    script = tmp_path / "serve_vllm.py"
    script.write_bytes((ROOT / "scripts/serve_vllm.py").read_bytes())

    def run(*words, **variables):
        command = [python, "-I", script, "--model", model, "--gpus", "0,1", "--dry-run", "--port", free_port(), *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean_environment() | nvidia_smi | variables)

    alone = run()
    assert (alone.returncode, alone.stderr) == (0, ""), "without a doctor nothing is missed"
    (tmp_path / "doctor.py").write_text(DOCTOR)
    answer = run()
    assert "TRITON_CACHE_DIR=/fresh" in shlex.split(answer.stdout)
    assert "-cc.mode=0" in shlex.split(answer.stdout)
    assert "torch.compile: no C compiler: apt install gcc; until then -cc.mode=0" in answer.stderr
    eager = run("--", "--enforce-eager")
    assert "TRITON_CACHE_DIR" not in eager.stdout
    apart = run(MARK="bad")
    assert apart.stderr == "serve_vllm: GPUs 0,1 do not exchange data; NCCL_P2P_DISABLE=1\n"
    (tmp_path / "doctor.py").write_text("print('no JSON')")
    broken = run()
    assert broken.returncode == 0
    assert "doctor.py compile gave no answer" in broken.stderr


def test_only_this_machine_is_served_without_a_key(run_script, model):
    words = ["--model", model, "--host", "0.0.0.0", "--port", free_port()]
    answer = run_script("serve_vllm.py", *words)
    assert answer.returncode == 1
    assert "--host 0.0.0.0 lets everybody who reaches this machine use the model; set VLLM_API_KEY" in answer.stderr
    for extra, key in ((["--no-api-key"], ""), ([], "secret"), (["--host", "localhost"], ""), (["--host", "127.0.0.2"], "")):
        answer = run_script("serve_vllm.py", *words, *extra, "--dry-run", env={"VLLM_API_KEY": key} if key else {})
        assert answer.stderr == "", extra
        assert "secret" not in answer.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/serve.yaml")), ids=lambda path: path.parent.name)
def test_every_recipe_makes_a_command(path, run_script, model, nvidia_smi):
    words = ["--config", path, "--model", model, "--port", free_port(), "--gpus", "0,1", "--dry-run"]
    answer = run_script("serve_vllm.py", *words, env=nvidia_smi)
    assert answer.returncode == 0, answer.stderr
    line = shlex.split(answer.stdout)
    assert line[line.index("--tensor-parallel-size") + 1] == "2"
    assert re.search(r"--max-model-len \d+", answer.stdout)
    assert [sentence for sentence in answer.stderr.splitlines() if "is a CPU build" not in sentence] == []


def test_pipeline_data_and_nodes(run_script, model, nvidia_smi):
    """Tensor parallel is what the other kinds of parallel leave of the GPUs named here, times the nodes."""
    cases = {
        "--pipeline-parallel-size 2": "1",
        "--data-parallel-size 2": "1",
        "-pp 2 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1": "2",
        "-dp 4 --data-parallel-size-local 2 --data-parallel-address 10.0.0.1": "1",
        "-pp 2 --distributed-executor-backend ray": "1",
    }
    for flags, expected in cases.items():
        words = ["--model", model, "--gpus", "0,1", "--dry-run", "--port", free_port(), "--", *flags.split()]
        answer = run_script("serve_vllm.py", *words, env=nvidia_smi)
        line = shlex.split(answer.stdout)
        assert line[line.index("--tensor-parallel-size") + 1] == expected, flags
        assert "GPUs are needed" not in answer.stderr
    answer = run_script("serve_vllm.py", "--model", model, "--gpus", "0", "--dry-run", "--", "-pp", "2", env=nvidia_smi)
    assert "2 GPUs are needed" in answer.stderr


def test_a_hub_name_offline(run_script, tmp_path):
    answer = run_script("serve_vllm.py", "--model", "nobody/nothing", "--port", free_port(), env={"HF_HOME": str(tmp_path)})
    assert answer.returncode == 1
    assert "hf download nobody/nothing" in answer.stderr


def test_a_port_that_is_taken(run_script, model):
    """By a server of models, which is named, and by something that does not speak HTTP; both by this very process."""

    class Models(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "qwen3-14b"}]}).encode())

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = run_script("serve_vllm.py", "--model", model, "--port", server.server_port)
        server.shutdown()
    assert answer.returncode == 1
    assert f"port {server.server_port} is taken by a server of qwen3-14b (" in answer.stderr
    assert f", pid {os.getpid()}, since " in answer.stderr
    assert "; stop it, or choose another with --port" in answer.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = run_script("serve_vllm.py", "--model", model, "--port", server.getsockname()[1])
    assert answer.returncode == 1
    assert "is taken by another process (" in answer.stderr
    assert f", pid {os.getpid()}, since " in answer.stderr


def test_nothing_runs(run_script):
    port = free_port()
    status, logs, down = (run_script("serve_vllm.py", action, "--port", port) for action in ("status", "logs", "down"))
    assert (status.returncode, logs.returncode, down.returncode) == (1, 1, 0)
    for answer in (status, logs, down):
        assert f"nothing that serve_vllm.py started runs on port {port}" in answer.stderr


def test_an_address_of_another_machine(run_script, model):
    answer = run_script("serve_vllm.py", "--model", model, "--host", "192.0.2.7", "--port", free_port())
    assert answer.returncode == 1
    assert "cannot listen on 192.0.2.7" in answer.stderr


def test_usage_errors(run_script, model):
    for words in (
        ["--model", model, "--gpus", "six"],
        ["up"],
        ["--model", model, "--tensor-parallel-size", "0"],
        ["--model", model, "--", "--port", "9"],
        ["--model", model, "--", "--pipeline-parallel-size", "two"],
        [],
    ):
        answer = run_script("serve_vllm.py", *words)
        assert answer.returncode == 2, (words, answer.stderr)
        assert "Traceback" not in answer.stderr


def test_stop_ends_the_whole_group_and_the_watcher(serve):
    """The leader ignores TERM and has a child: both are killed after the grace."""
    group = serve.Group(["sh", "-c", "trap '' TERM; sleep 300 & wait; wait"], 1)
    assert wait_until(lambda: len(group_members(group.process.pid)) == 2, 5)
    group.stop(1)
    assert group_members(group.process.pid) == []
    assert group.watcher.returncode == 0


def test_the_watcher_ends_the_group_when_its_owner_is_killed(serve):
    """A process with a Group is killed by -9: what the group's leader started goes as well, within the grace."""
    code = f"import importlib.util as u, sys, time; s = u.spec_from_file_location('serve', {str(ROOT / 'scripts/serve_vllm.py')!r})\n"
    code += "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
    code += "g = m.Group(['sh', '-c', \"trap '' TERM; sleep 300 & wait; wait\"], 1); print(g.process.pid, flush=True); time.sleep(300)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    leader = int(owner.stdout.readline())
    assert wait_until(lambda: len(group_members(leader)) == 2, 5)
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not group_members(leader), 10)


def test_the_command_beside_the_server_gives_the_exit_code(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    server = serve.Group(["sleep", "300"], 1)
    try:
        api = serve.Api("0.0.0.0", 8123, "tiny", "secret")
        command = f'echo "$OPENAI_BASE_URL $OPENAI_API_KEY $LLM_MODEL $NO_PROXY" > {tmp_path}/seen; exit 7'
        assert serve.run_beside(command, server, api, "log") == 7
        assert (tmp_path / "seen").read_text() == "http://127.0.0.1:8123/v1 secret tiny 127.0.0.1,example.org\n"
    finally:
        server.stop(5)
    with pytest.raises(SystemExit, match="vLLM was killed by signal 15: its log names no error"):
        (tmp_path / "log").write_text("INFO all is well\n")
        serve.run_beside("sleep 300", server, api, tmp_path / "log")


def test_the_cause_of_a_failure_is_the_root_one(serve, tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=7) ERROR 11-24 02:30:18 [core.py:1301] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    assert serve.cause(log) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    log.write_text(
        "(APIServer pid=5) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "(APIServer pid=5)   Value error, User-specified max_model_len (2048) is greater than the derived max_model_len\n"
    )
    assert serve.cause(log).endswith(
        "for ModelConfig: Value error, User-specified max_model_len (2048) is greater than the derived max_model_len"
    )
    log.write_text("usage: vllm serve [model_tag] [options]\nvllm serve: error: argument --dtype: invalid choice: 'x'\n")
    assert serve.cause(log) == "vllm serve: error: argument --dtype: invalid choice: 'x'"


def test_the_phases_are_what_vllm_writes(serve):
    """Each phrase stands in the source of the installed vLLM."""
    folder = serve.folder_of("vllm")
    text = "".join(path.read_text(encoding="utf-8") for part in ("v1", "entrypoints", "model_executor/model_loader", "compilation")
                   for path in (folder / part).rglob("*.py"))  # fmt: skip
    assert [words for words in serve.PHASES if words not in text] == []


# From here on vLLM itself runs.


def certificate(tokenizer):
    """Return what train_sft.py certifies: conversations with the ids of the template's text, written out here."""
    conversations = []
    for number, (question, answer) in enumerate([("What is a PEP?", "A design document."), ("春眠不觉晓", "处处闻啼鸟")]):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append({"id": f"row-{number}", "messages": messages, "tools": None, "ids": tokenizer.encode(text).ids})
    return {"stop_ids": [END], "conversations": conversations}


def logprobs(folder, ids):
    """Return the log-probability that transformers gives each of `ids` but the first."""
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    return [logits[n].log_softmax(-1)[token].item() for n, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """A model folder as the converter and the trainer leave it: greedy ids in manifest.json, certificate.json."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer, following = write_model(folder)
    prompt, text = tokenizer.encode("This PEP").ids, tokenizer.encode("This PEP proposes 春眠不觉晓 nothing.").ids
    greedy = {"prompt": "This PEP", "prompt_ids": prompt, "ids": chain(following, prompt, 16)}
    greedy |= {"text_ids": text, "text_logprobs": logprobs(folder, text)}
    (folder / "manifest.json").write_text(json.dumps({"metrics": {"greedy": greedy}}))
    (folder / "certificate.json").write_text(json.dumps(certificate(tokenizer)), encoding="utf-8")
    return folder, tokenizer, following


def start(folder, *words, **variables):
    """Start serve_vllm.py as a user does; its standard error is read line by line."""
    command = [sys.executable, "-I", ROOT / "scripts" / "serve_vllm.py", "--model", folder, "--max-model-len", "256"]
    command += ["--dtype", "float32", *words]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment() | variables
    )


def leader_of(pid):
    """Return the pid of the vLLM that process `pid` has started."""
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return next((int(line.split()[0]) for line in children.splitlines() if "vllm serve" in line), None)


def read_until(stream, words):
    """Read lines of `stream` up to the one that has `words`, or that says that the server is ready; returns what was read."""
    text = ""
    while words not in text and "ready after" not in text and (line := stream.readline()):
        text += line
    return text


def manage(action, port, run=subprocess.run):
    """Run `serve_vllm.py status|logs|down --port PORT` as a shell of its own would."""
    command = [sys.executable, "-I", ROOT / "scripts" / "serve_vllm.py", action, "--port", port]
    return run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())


@pytest.mark.slow
def test_a_model_is_proven_beside_its_server_and_kill_9_leaves_neither(run_script, proven, tmp_path):
    """One start: prove_serving.py runs beside the server, another command goes on, and then serve_vllm.py itself is killed."""
    folder, tokenizer, following = proven
    out, done = tmp_path / "out", tmp_path / "done"
    prove = [sys.executable, ROOT / "scripts/prove_serving.py", "--model", folder, "--output", out]
    prove += ["--prompt", "The", "天地", "--max-tokens", 12]
    then = f"{shlex.join(map(str, prove))}; echo $? > {done}; sleep 300"
    process = start(folder, "--port", free_port(), "--then", then)
    try:
        assert wait_until(lambda: (done.exists() and done.read_text()) or process.poll() is not None, 500)
        assert process.poll() is None, process.stderr.read()
        assert done.read_text() == "0\n"
        leader = leader_of(process.pid)
        client = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "sleep 300"], capture_output=True, text=True).stdout.split()
        assert len(client) == 1
        process.kill()
        assert wait_until(lambda: not group_members(leader) and not group_members(client[0]), 75)
        assert "2 conversations have their trained token ids, answers end by [2]" in process.stderr.read()
    finally:
        process.kill()
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, prompt in zip(rows, ("The", "天地"), strict=False):
        assert row["prompt"] == prompt
        assert row["ids"] == chain(following, tokenizer.encode(prompt).ids, 12)
    assert rows[2]["ids"] == chain(following, tokenizer.encode("This PEP").ids, 16)
    assert rows[3] == {
        "prompt": [{"role": "user", "content": "What is a PEP?"}],
        "text": rows[3]["text"],
        "ids": None,
        "finish_reason": "stop",
    }
    run = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert run["stage"] == "serve-pretrained"
    assert run["metrics"]["greedy_equal"] is True
    assert run["metrics"]["tokens_per_second"] > 1
    assert run["summary"].startswith("4 answers, greedy ids equal, max |Δlogprob| ")
    assert 0 <= run["metrics"]["max_abs_logprob_difference"] < 1e-4
    assert run["packages"].keys() >= {"torch", "transformers"}
    assert [entry["path"].rpartition("/")[2] for entry in run["outputs"]] == ["answers.jsonl"]
    again = run_script("prove_serving.py", *prove[2:])
    assert again.returncode == 0
    assert "up to date" in again.stderr


@pytest.mark.slow
def test_a_server_in_the_background_from_start_to_end(proven, tmp_path, run_script, load_script, serve):
    """One start: what a second start says, the certificate, the proof's refusals, a killed API process and its restart, a drained end."""
    folder, tokenizer, _ = proven
    port = free_port()
    edit("generation_config.json", temperature=0.7, top_k=20)(folder)
    words = ["--model", folder, "--port", port, "--served-model-name", "tiny", "--max-model-len", 512, "--dtype", "float32"]
    adapter = write_adapter(tmp_path / "adapter", r=32)
    started = run_script("serve_vllm.py", "up", *words, "--restarts", 1, "--", "--lora-modules", f"sql={adapter}")
    try:
        assert started.returncode == 0, started.stderr
        assert started.stdout == f"http://127.0.0.1:{port}/v1\n"
        assert "generation_config.json says temperature 0.7, top_k 20; `-- --generation-config vllm`" in started.stderr
        status = manage("status", port)
        assert status.returncode == 0
        assert re.fullmatch(rf"tiny: ready since .*, port {port}, pid (\d+), model {folder}, log .*\.log\n", status.stdout)
        pid = int(re.search(r"pid (\d+)", status.stdout)[1])
        leader = leader_of(pid)
        assert len(group_members(leader)) >= 3, "API, engine, worker"
        second = run_script("serve_vllm.py", "--model", folder, "--port", port)
        assert second.returncode == 1
        assert f"port {port} is taken by tiny (ready, pid {pid}, since " in second.stderr
        assert f"`serve_vllm.py down --port {port}`" in second.stderr

        api = serve.Api("127.0.0.1", port, "tiny")
        assert [entry["id"] for entry in api.call("/v1/models")["data"]] == ["tiny", "sql"]
        assert serve.compare_certificate(api, certificate(tokenizer)) == ""
        other = certificate(tokenizer)
        other["conversations"][1]["ids"][5] += 1
        assert re.search(r"conversation 'row-1': token 5 is \d+ here and \d+ in training", serve.compare_certificate(api, other))
        assert serve.first_answer(api, {"certificate": other}) == ""

        class Short(serve.Api):
            def chat(self, messages, tokens):
                return super().chat(messages, 1)

        sentence = serve.first_answer(Short("127.0.0.1", port, "tiny"), {"certificate": other})
        assert "none of 4 answers ended by a stop token within 256 tokens" in sentence

        prove = load_script("prove_serving.py")
        args, asked = prove.build_parser().parse_args(["--model", "x", "--output", "y"]), prove.Api(f"{api.root}/v1", "tiny", "none")
        wrong = {"prompt": "A", "prompt_ids": tokenizer.encode("A").ids, "ids": [5, 5]}
        with pytest.raises(SystemExit, match="the converter with"):
            prove.prove(asked, args, wrong, [])
        off = json.loads((folder / "manifest.json").read_text())["metrics"]["greedy"]
        off["text_logprobs"][3] += 0.02
        with pytest.raises(SystemExit, match=r"log-probability that is 0\.02 off"):
            prove.prove(asked, args, off, [])
        choice = api.chat([{"role": "user", "content": "Hello"}], 8)
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == tokenizer.decode([WORD])

        os.kill(leader, signal.SIGKILL)
        assert wait_until(lambda: not group_members(leader), 30)
        assert wait_until(lambda: serve.running(port)["phase"] != "ready", 30)
        assert wait_until(lambda: serve.running(port)["phase"] == "ready", 120), "it starts again"
        assert serve.running(port)["pid"] == pid

        stream = {"model": "tiny", "prompt": "A", "max_tokens": 500, "ignore_eos": True, "temperature": 0, "stream": True}
        stream["stream_options"] = {"include_usage": True}
        request = urllib.request.Request(f"{api.root}/v1/completions", json.dumps(stream).encode(), {"Content-Type": "application/json"})
        with api.opener.open(request, timeout=120) as answer:
            assert answer.readline().startswith(b"data: {"), "it runs"
            down = manage("down", port, subprocess.Popen)
            lines = answer.read().decode().split()
        assert lines[-1] == "[DONE]"
        assert '"completion_tokens":500' in lines[-3], "it is finished"
        assert down.wait(90) == 0
        assert f"port {port} is free" in down.stderr.read()
        assert manage("status", port).returncode == 1
        assert group_members(pid) == []
        assert "Application shutdown complete" in manage("logs", port).stdout
    finally:
        if other := serve.running(port):
            os.kill(other["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["importing vLLM", "starting the engine", "compiling", "warming up"])
def test_term_in_each_phase_of_a_start_ends_it(proven, phase, tmp_path):
    compiling = ["--", "-cc.mode=3"] if phase == "compiling" else []
    process = start(proven[0], "--port", free_port(), *compiling, VLLM_CACHE_ROOT=str(tmp_path))
    try:
        assert phase in read_until(process.stderr, phase), "the phase is told"
        leader = leader_of(process.pid)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert group_members(leader) == []
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.slow
def test_a_start_that_fails_says_why_and_where_the_log_is(run_script, proven):
    answer = run_script("serve_vllm.py", "--model", proven[0], "--port", free_port(), "--", "--no-such-flag-of-vllm")
    assert answer.returncode == 1
    last = answer.stderr.strip().splitlines()[-1]
    assert "unrecognized arguments: --no-such-flag-of-vllm" in last
    assert "--no-such-flag-of-vllm" in Path(last.rpartition(" ")[2]).read_text()
