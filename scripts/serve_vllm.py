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
    python scripts/serve_vllm.py --model DIR --check --output OUT           # serve, prove, stop
    make serve RECIPE=qwen3-14b GPUS=6,7

What follows `--` goes to vLLM unchanged. Before vLLM is imported, the model folder, the port, the GPUs and their memory are
looked at, and what is in the way is said in one sentence. A server counts as ready when it has given a real answer; a model
with certificate.json (train_sft.py) must also turn its conversations into the token ids it was trained on. An API key is
taken from VLLM_API_KEY. A CPU gets float32 where it has no bf16 instructions, no compilation, and a bounded KV cache, each
unless given. The command of --then finds OPENAI_BASE_URL, OPENAI_API_KEY and LLM_MODEL in its environment.

Reads   MODEL: a folder, or a hub id; with --check also what convert_olmo_to_hf.py noted in MODEL/manifest.json.
Writes  a log, whose path is printed; with --check OUTPUT/answers.jsonl, OUTPUT/vllm.log, then OUTPUT/manifest.json, last.
Exit    0 stopped by Ctrl-C or SIGTERM, checked, or up to date; 1 failed; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   vLLM beside this interpreter; its CUDA build and GPUs, or its CPU build; no network when MODEL is a folder.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
    "KV cache size": "warming up",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "Starting vLLM server": "opening the port",
}
OURS = ("--served-model-name", "--host", "--port", "--tensor-parallel-size", "--max-model-len", "--dtype", "--shutdown-timeout", "--model")
EAGER = ("--enforce-eager", "-O", "-cc", "--compilation-config", "--optimization-level")  # any of them says whether to compile
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # head sizes of vLLM's CPU attention: with others the first request ends it
LOGPROB_BOUND = 0.01  # nats, between two implementations in float32; bfloat16 is off by more
UTILIZATION = 0.92  # vLLM's default: it refuses to start unless this share of a GPU's memory is free


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


# >>> snippet: write_atomic
@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Yield a file that takes the place of `path`, fsynced, when the block ends well; else `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# <<<


# >>> snippet: stage_run
class Run:
    """One run of a stage: exits 0 when OUTPUT holds it already, 3 when it holds something else; the manifest comes last."""

    output = "output"  # what an error is about that names no file

    def __init__(self, stage, args, inputs, ignore=()):
        """`inputs`: files and folders that decide the result; `ignore`: names of settings that do not."""
        self.output = Run.output = Path(args.output)
        self.start, self.digests = time.time(), {}
        skip = {"config", "output", "overwrite", *ignore}
        found = [f for p in map(Path, inputs) for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
        files = [(str(f), f.stat()) for f in found if f.name != "manifest.json" and not f.name.startswith(".")]
        self.record = {"schema_version": 1, "stage": stage, "argv": sys.argv}
        self.record["settings"] = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in skip}, default=str))
        self.record["inputs"] = [{"path": p, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for p, s in files]
        done, begun = self.output / "manifest.json", self.output / ".begun.json"
        held = next((p for p in (done, begun) if p.exists()), None)
        kept = any(f.is_file() and not f.name.startswith(".") for f in self.output.rglob("*"))
        difference = held and kept and self.difference(json.loads(held.read_text(encoding="utf-8")))
        if held == done and not difference:
            os.utime(done)
            sys.exit(print(f"{stage}: up to date, {self.output}", file=sys.stderr))
        foreign = held is None and self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))
        if foreign or (difference and not args.overwrite):
            why = f"another run ({difference}); --overwrite puts it aside" if difference else "something that no stage wrote"
            print(f"{stage}: {self.output} holds {why}, or name another folder", file=sys.stderr)
            sys.exit(3)
        if difference:
            aside = f"{self.output}.old-{time.strftime('%Y%m%d-%H%M%S', time.localtime(held.stat().st_mtime))}"
            os.replace(self.output, aside)
            print(f"{stage}: {difference}; the old run is now {aside}", file=sys.stderr)
        with write_atomic(begun, "w") as file:
            json.dump(self.record, file, ensure_ascii=False)

    def sha256(self, path):
        """Return a file's SHA-256: the one noted in `digests` while the file was streamed, or else read now."""
        if str(path) not in self.digests:
            with open(path, "rb") as file:
                self.digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[str(path)]

    def difference(self, old):
        """Name the first difference between a recorded run and this one; "" when there is none."""
        for key in sorted(old["settings"].keys() | self.record["settings"].keys()):
            was, now = (record["settings"].get(key) for record in (old, self.record))
            if was != now:
                return f"{key} was {was!r}, is {now!r}"
        was, now = ({entry["path"]: entry for entry in record["inputs"]} for record in (old, self.record))
        for path in sorted(was.keys() | now.keys()):
            a, b = was.get(path), now.get(path)
            if not (a and b and a["bytes"] == b["bytes"] and (a["mtime_ns"] == b["mtime_ns"] or a.get("sha256") == self.sha256(path))):
                return f"input {path} changed"
        return ""

    def finish(self, summary, counts, metrics=None, records=None, packages=()):
        """Write the manifest. `summary`: the stage's figure in a few words; `records`: counts, of outputs by name, of inputs by path;
        `packages`: those used by child processes; those imported here are found."""

        def entry(path, key):
            return {"path": str(path), "bytes": path.stat().st_size, "sha256": self.sha256(path), "records": (records or {}).get(key)}

        git = [
            subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
            if shutil.which("git")
        ]
        versions, torch, patches = {}, sys.modules.get("torch"), Path(sys.prefix, "applied-patches.json")
        for name in {*packages, *(module.partition(".")[0] for module in sys.modules)} - sys.stdlib_module_names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        written = [f for f in sorted(self.output.rglob("*")) if f.is_file() and f.name != "manifest.json"]
        written = [f for f in written if not any(part.startswith(".") for part in f.relative_to(self.output).parts)]
        own = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]  # ru_maxrss would begin at the parent's peak
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "memory_bytes": memory}
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
        self.record["inputs"] = [old | entry(Path(old["path"]), old["path"]) for old in self.record["inputs"]]
        self.record |= {"outputs": [entry(f, f.name) for f in written], "summary": summary, "counts": counts, "metrics": metrics or {}}
        self.record |= {"packages": versions, "patches": sorted(json.loads(patches.read_text())) if patches.exists() else []}
        self.record |= {"git": {"commit": git[0] if git else "", "dirty": bool(git and git[1])}, "hardware": hardware}
        self.record["seconds"] = round(time.time() - self.start, 3)
        self.record["peak_rss_bytes"] = 1024 * max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        with write_atomic(self.output / "manifest.json", "w") as file:
            json.dump(self.record, file, ensure_ascii=False, indent=1)
        (self.output / ".begun.json").unlink()
        print(f"{self.record['stage']}: {summary}; {self.output}", file=sys.stderr)


def run_main(main):
    """Leave with main()'s exit code; an interrupt or a failing disk ends in one sentence, not in a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        words = ("No space left on device", "File too large", "Disk quota exceeded")  # packages raise these as errors of their own
        full = next((word for word in words if word in str(error)), "")
        if not isinstance(error, OSError) and not full:
            raise
        place, why = getattr(error, "filename", None) or Run.output, full or error.strerror or error
        sys.exit(f"{Path(sys.argv[0]).name}: {place}: {why}; mend that and run it again")


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


def check_shard(path, expected, problems):
    """Return the bytes of a safetensors file; `problems` gets a sentence when it is missing, truncated, or lacks `expected` tensors."""
    again = "copy or convert the model again"
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        problems.append(f"{path} is missing, though the index names it; {again}")
        return 0
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        problems.append(f"{path} is no whole safetensors file (a Git LFS pointer, or cut off in its header); {again}")
        return 0
    if size != promised:
        problems.append(f"{path} has {size} bytes where its header promises {promised}; {again}")
    if lost := sorted(expected - tensors.keys()):
        problems.append(f"{path} lacks the tensor {lost[0]}, which the index names; {again}")
    if empty := [name for name, entry in tensors.items() if 0 in entry["shape"]]:
        problems.append(f"{path}: tensor {empty[0]} is empty, as ZeRO-3 leaves it when it saves ungathered; save it with zero_to_fp32.py")
    return size


def check_model(folder, flags, problems):
    """Return what plan() calls the model facts of a whole folder; sentences about what it lacks go to `problems`."""
    config, index = read_json(folder / "config.json", problems), folder / "model.safetensors.index.json"
    if index.exists():
        named = read_json(index, problems).get("weight_map")
        named = {tensor: str(file) for tensor, file in named.items()} if isinstance(named, dict) else {}
        shards = {folder / name: {tensor for tensor, file in named.items() if file == name} for name in sorted(set(named.values()))}
    else:
        shards = dict.fromkeys(sorted(folder.glob("*.safetensors")), frozenset())
    size = sum(check_shard(path, tensors, problems) for path, tensors in shards.items())
    other = [path for pattern in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)]
    if not shards and not other:
        problems.append(f"{folder} holds no weights (*.safetensors, or an index that names them); name the folder of a whole model")
    elif not shards:
        size = sum(path.stat().st_size for path in other)
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
    if given(flags, "--tokenizer") is None and not any(any(folder.glob(kind)) for kind in kinds):
        problems.append(f"{folder} holds no tokenizer (tokenizer.json); copy it there, or name one with `-- --tokenizer DIR`")
    tokenizer, certificate = (
        read_json(folder / name, problems) if (folder / name).exists() else {} for name in ("tokenizer_config.json", "certificate.json")
    )
    chat = tokenizer.get("chat_template") or given(flags, "--chat-template") is not None or any(folder.glob("chat_template.j*"))
    greedy = (read_json(folder / "manifest.json", []).get("metrics") or {}).get("greedy") or {}  # no other stage's manifest has them
    greedy = greedy if "text_ids" in greedy else {}  # noted by a version before this one
    return {"config": config, "bytes": size, "chat": bool(chat), "certificate": certificate, "greedy": greedy}


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
    """Return {index: {total, free, users: [(pid, bytes)]}} as nvidia-smi shows the GPUs; {} when there is no driver."""

    def rows(query):
        answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
        return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()] if answer.returncode == 0 else []

    def number(cell):
        return int(cell) << 20 if cell.isdigit() else 0  # MiB; "[N/A]" in containers

    gpus = {}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        users = rows("--query-compute-apps=gpu_uuid,pid,used_memory")
        for index, uuid, total, free in rows("--query-gpu=index,uuid,memory.total,memory.free"):
            held = [(int(pid), number(used)) for owner, pid, used in users if owner == uuid and pid.isdigit()]
            gpus[int(index)] = {"total": number(total), "free": number(free), "users": held}
    return gpus


def describe_process(pid, size):
    """Return `12.0 GB by pid 4242 (alice, python train.py)`; a vLLM worker without a parent is called orphaned."""
    answer = subprocess.run(["ps", "-o", "ppid=,user=,args=", "-p", str(pid)], capture_output=True, text=True).stdout.split(None, 2)
    parent, user, words = answer if len(answer) == 3 else ("", "another container", "not visible from here")
    orphan = "orphaned " if parent == "1" and words.startswith("VLLM::") else ""
    return f"{gigabytes(size)} by pid {pid} ({user}, {orphan}{' '.join(words.split())[:60]})"


def check_gpus(gpus, chosen, weights, flags, problems):
    """Return the share of its memory that vLLM may use on each of the `chosen` GPUs; sentences go to `problems`.

    weights: bytes that each GPU has to hold. The share is vLLM's default where that is free, else what is, less 1 GiB for CUDA's context.
    """
    asked, share = given(flags, "--gpu-memory-utilization"), UTILIZATION
    for index in chosen:
        if index not in gpus:
            shown = f"nvidia-smi shows {', '.join(map(str, gpus))}" if gpus else "nvidia-smi shows none: is the NVIDIA driver installed?"
            problems.append(f"there is no GPU {index}; {shown}")
            continue
        gpu = gpus[index]
        if not gpu["total"]:  # memory shared with the CPU: nvidia-smi does not count it
            continue
        free = math.floor(100 * (gpu["free"] - (1 << 30)) / gpu["total"]) / 100
        holders = ", ".join(describe_process(*user) for user in sorted(gpu["users"], key=lambda user: -user[1])) or "unknown processes"
        state = f"GPU {index} has {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free, the rest is held: {holders}"
        if free * gpu["total"] < weights:
            problems.append(f"{state}; the weights take {gigabytes(weights)} a GPU: end that, wait for it, or name other GPUs with --gpus")
        elif asked and free < float(asked):
            problems.append(f"{state}; --gpu-memory-utilization {asked} asks for more: lower it to {free}, or name other GPUs with --gpus")
        share = min(share, free)
    return share


def head_size(config):
    """Return the width of one attention head; 0 when the config does not say."""
    return whole(config, "head_dim") or whole(config, "hidden_size") // (whole(config, "num_attention_heads") or 1)


def check_port(host, port, problems):
    """A sentence goes to `problems` when vLLM could not listen on host:port; it names the models of a server that answers there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            problems.append(
                f"cannot listen on {host}:{port} ({error}); name an address of this machine with --host, a free port with --port"
            )
            return
    holder = f"another process (`ss -ltnp 'sport = :{port}'` names it)"
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        holder = f"a server of {', '.join(model['id'] for model in Api(host, port).call('/v1/models', timeout=2)['data'])}"
    problems.append(f"port {port} is taken by {holder}; stop it, or choose another with --port")


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
    eager = given(flags, "--enforce-eager") is not None
    if "VLLM_DISABLE_TORCH_COMPILE" in environment:
        changes["VLLM_DISABLE_TORCH_COMPILE"] = None
        said.append("VLLM_DISABLE_TORCH_COMPILE is read by no vLLM and was dropped; to serve without compilation use `-- --enforce-eager`")
    if environment.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0") and not eager:
        added.append("--enforce-eager")
        said.append("TORCHDYNAMO_DISABLE=1 makes vLLM fail to start unless it is eager: --enforce-eager was added; unset it to compile")
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
        width = (whole(config, "num_key_value_heads") or whole(config, "num_attention_heads")) * head_size(config)
        sequence = 2 * 4 * whole(config, "num_hidden_layers") * width * (length or whole(config, "max_position_embeddings"))
        added += ["--kv-cache-memory-bytes", str(max(512 << 20, 2 * sequence))]
    return added


def vllm_build():
    """Return "cpu" or "cuda", whichever vLLM is installed beside this interpreter; "" when there is none."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" if "cpu" in f"{name} {importlib.metadata.version(name)}" else "cuda"
    return ""


def choose_gpus(args, gpus):
    """Return the GPU ids to serve on: those of --gpus, of CUDA_VISIBLE_DEVICES when it holds such ids, or all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return args.gpus or ([int(word) for word in visible.split(",")] if re.fullmatch(r"\d+(,\d+)*", visible) else list(gpus))


def plan(args):
    """Look at everything that decides a start. Returns (command, changes to the environment, model facts, problems); starts nothing.

    Model facts: {"config": {}, "bytes": of the weights, "chat": whether there is a template (None: unknown), "certificate": train_sft.py's,
    "greedy": the {prompt, prompt_ids, ids, text_ids, text_logprobs} of convert_olmo_to_hf.py}; empty for a hub id that vLLM fetches itself.
    """
    problems, flags, build, executable = [], list(args.vllm_args), vllm_build(), Path(sys.executable).with_name("vllm")
    if not executable.exists() or not build:
        problems.append(f"vLLM is not installed beside {sys.executable}; run `make setup`, or use an interpreter that has it")
    folder = locate(args.model, problems)
    model = check_model(folder, flags, problems) if folder else {"config": {}, "bytes": 0, "chat": None, "certificate": {}, "greedy": {}}
    config = model["config"].get("text_config") or model["config"]

    gpus = {} if build == "cpu" and not args.gpus else query_gpus()
    chosen = [] if build == "cpu" and not args.gpus else choose_gpus(args, gpus)
    pipeline, data = (int(given(flags, *names) or 1) for names in (("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp")))
    tensor_parallel = args.tensor_parallel_size or max(1, len(chosen) // (pipeline * data or 1))
    heads, needed = whole(config, "num_attention_heads"), tensor_parallel * pipeline * data
    if heads % tensor_parallel:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and n <= max(len(chosen), tensor_parallel))
        problems.append(
            f"tensor parallel {tensor_parallel} does not divide the {heads} attention heads; --tensor-parallel-size {fits} does"
        )
    if build == "cpu" and args.gpus:
        problems.append(f"--gpus {','.join(map(str, chosen))}: the vLLM beside {sys.executable} is a CPU build; `make setup BACKEND=cuda`")
    if chosen and needed > len(chosen):
        problems.append(f"{needed} GPUs are needed (tensor x pipeline x data parallel), {len(chosen)} named; name more with --gpus")
    if build == "cuda" and not chosen:
        problems.append("no GPU: nvidia-smi shows none, and this vLLM is a CUDA build; install the driver, or `make setup BACKEND=cpu`")

    command = [str(executable), "serve", args.model, "--served-model-name", args.served_model_name or Path(args.model).resolve().name]
    command += ["--host", args.host, "--port", str(args.port), "--shutdown-timeout", str(args.shutdown_timeout)]
    command += ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []
    command += ["--dtype", args.dtype] if args.dtype else []
    changes, added, said = environment_changes(os.environ, flags, tensor_parallel, chosen, bool(folder))
    if chosen:
        command += ["--tensor-parallel-size", str(tensor_parallel)]
        share = check_gpus(gpus, chosen, model["bytes"] / (tensor_parallel * pipeline or 1), flags, problems)
        if share < UTILIZATION and given(flags, "--gpu-memory-utilization", "--kv-cache-memory-bytes") is None:
            added += ["--gpu-memory-utilization", str(share)]
            said.append(f"a chosen GPU is in use by others: --gpu-memory-utilization {share} was added")
    elif build == "cpu":
        added += cpu_flags(flags + added, args.dtype, config, args.max_model_len)
        if heads and head_size(config) not in CPU_HEADS:
            sizes = ", ".join(map(str, CPU_HEADS))
            problems.append(f"vLLM has no CPU attention for heads of {head_size(config)} (it has {sizes}); serve {args.model} on a GPU")
        free = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()) if Path("/proc/meminfo").exists() else None
        if free and int(free[1]) << 10 < model["bytes"]:
            size = f"{gigabytes(model['bytes'])} and {gigabytes(int(free[1]) << 10)} of memory are free"
            problems.append(f"the weights of {args.model} take {size}; end what holds the rest, or serve a smaller model")
    check_port(args.host, args.port, problems)
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

    def complete(self, prompt, tokens, **settings):
        """Return the first choice of a completion of `prompt` (text or token ids), with its token ids; greedy unless `settings` differ."""
        greedy = {"temperature": 0, "repetition_penalty": 1, "max_tokens": tokens, "return_token_ids": True}
        return self.call("/v1/completions", {"prompt": prompt} | greedy | settings)["choices"][0]

    def chat(self, messages, tokens):
        """Return the first choice of a greedy chat answer to `messages`."""
        return self.call("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": tokens})["choices"][0]


class Group:
    """A command in a session of its own, whose whole process group ends with it: by stop(), or by a watcher if this process dies."""

    def __init__(self, command, grace, **settings):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(command, start_new_session=True, **settings)
        self.watcher = subprocess.Popen(["sh", "-c", WATCHER, str(self.process.pid), str(grace)], stdin=subprocess.PIPE, **quiet)

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


def ended(server, log):
    """Return the exit sentence for a server that has ended by itself."""
    code = server.process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"serve_vllm: vLLM {how}: {cause(log)}; the whole log: {log}"


def wait_ready(server, api, log, chat, limit):
    """Return the seconds until the server gave its first real answer; SystemExit says why there is none."""
    begun, phase, told, terminal = time.monotonic(), "importing vLLM", "", sys.stderr.isatty()
    with open(log, encoding="utf-8", errors="replace") as lines, contextlib.ExitStack() as end:
        end.callback(print, end="\r\033[K" if terminal else "", file=sys.stderr, flush=True)
        while True:
            if server.process.poll() is not None:
                raise SystemExit(ended(server, log))
            text, seconds = lines.read(), time.monotonic() - begun
            phase = next((name for words, name in reversed(PHASES.items()) if words in text), phase)
            if terminal:
                print(f"\r\033[Kserve_vllm: {seconds:4.0f} s  {phase}", end="", file=sys.stderr, flush=True)
            elif phase != told:
                note(f"{seconds:.0f} s {phase}")
            told = phase
            if seconds > limit:
                raise SystemExit(f"serve_vllm: not ready after {limit} s ({phase}); raise --ready-timeout, or look into the log: {log}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                api.call("/health", timeout=5)
                break
            time.sleep(0.5)
    api.chat([{"role": "user", "content": "Hello"}], 8) if chat else api.complete("Hello", 8)
    return time.monotonic() - begun


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


def prove(api, args, model):
    """Return (rows of answers.jsonl, metrics): completions, the converter's greedy ids and log-probabilities again, a chat that ends by a
    stop token."""
    rows, greedy, conversations, begun = [], model["greedy"], model["certificate"].get("conversations", []), time.monotonic()
    for seed, prompt in enumerate(args.prompt):
        choice = api.complete(prompt, args.max_tokens, min_tokens=1, temperature=args.temperature, seed=seed)
        rows.append({"prompt": prompt, "text": choice["text"], "ids": choice["token_ids"], "finish_reason": choice["finish_reason"]})
    tokens, seconds = sum(len(row["ids"]) for row in rows), time.monotonic() - begun
    metrics = {"tokens_per_second": round(tokens / seconds, 1), "greedy_equal": bool(greedy)}
    if greedy:
        choice = api.complete(greedy["prompt_ids"], len(greedy["ids"]), ignore_eos=True)
        if choice["token_ids"] != greedy["ids"]:
            raise SystemExit(
                f"serve_vllm: vLLM continues {greedy['prompt']!r} with the token ids {choice['token_ids']}, the converter with "
                f"{greedy['ids']}; convert the model again, and serve it with --dtype float32 to compare"
            )
        rows.append(
            {"prompt": greedy["prompt"], "text": choice["text"], "ids": choice["token_ids"], "finish_reason": choice["finish_reason"]}
        )
        scored = api.complete(greedy["text_ids"], 1, prompt_logprobs=0)["prompt_logprobs"][1:]
        served = [position[str(token)]["logprob"] for position, token in zip(scored, greedy["text_ids"][1:], strict=True)]
        difference = max(abs(a - b) for a, b in zip(served, greedy["text_logprobs"], strict=True))
        metrics["max_abs_logprob_difference"] = difference
        if not difference <= LOGPROB_BOUND:
            raise SystemExit(
                f"serve_vllm: vLLM gives a token of the converter's text a log-probability that is {difference:.3g} off (bound "
                f"{LOGPROB_BOUND}); convert the model again, and serve it with --dtype float32 to compare"
            )
    for entry in conversations[:3]:  # a small model may fail to end an answer; one of three shows that it can
        question = list(itertools.takewhile(lambda message: message["role"] != "assistant", entry["messages"]))
        choice = api.chat(question, 256)
        rows.append({"prompt": question, "text": choice["message"]["content"], "ids": None, "finish_reason": choice["finish_reason"]})
        if choice["finish_reason"] == "stop":
            break
    else:
        if conversations:
            raise SystemExit(
                "serve_vllm: no answer to the certificate's first questions ends by a stop token within 256 tokens; train longer, or see "
                "eos_token_id in generation_config.json"
            )
    return rows, metrics


def run_beside(command, server, api, log):
    """Run a shell command while the server lives; return its exit code. SystemExit when the server ends first."""
    reach = {"NO_PROXY": ",".join(filter(None, ("127.0.0.1", os.environ.get("NO_PROXY"))))}
    settings = {"OPENAI_BASE_URL": f"{api.root}/v1", "OPENAI_API_KEY": api.key or "none", "LLM_MODEL": api.model}
    client = Group(["sh", "-c", command], 5, env=os.environ | reach | settings)
    try:
        while client.process.poll() is None:
            if server.process.poll() is not None:
                raise SystemExit(ended(server, log))
            time.sleep(0.1)
    finally:
        client.stop(5)
    code = client.process.returncode
    return code if code >= 0 else 128 - code


def serve(server, api, log, chat):
    """Say where the server is and wait for Ctrl-C or SIGTERM; return 0. SystemExit when it ends by itself."""
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    path, ask = ("completions", {"prompt": "Hello"}) if chat is False else ("chat/completions", message)
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api.key else ""
    print(f"{api.root}/v1", flush=True)
    note(f"try: curl {api.root}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps({'model': api.model} | ask)}'")
    note("Ctrl-C stops it")
    try:
        server.process.wait()
    except (KeyboardInterrupt, SystemExit):  # the latter from SIGTERM
        note("stopping; running requests may finish, a second Ctrl-C ends them")
        return 0
    raise SystemExit(ended(server, log))


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
    add("--model", required=True, help="folder, or hub id")
    add("--served-model-name", metavar="NAME", help="name that clients ask for (default: the last part of MODEL)")
    add("--gpus", type=gpu_ids, metavar="IDS", help="ids as nvidia-smi shows them, e.g. 6,7 (default: CUDA_VISIBLE_DEVICES, or all)")
    add("--tensor-parallel-size", type=positive, metavar="N", help="GPUs that share each layer (default: the number of GPUs)")
    add("--max-model-len", type=positive, metavar="TOKENS", help="longest prompt and answer together (default: the model's)")
    add("--dtype", help="auto, float32, bfloat16, … (default: the model's; float32 on a CPU without bf16 instructions)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8051, help="default: 8051")
    add("--vllm-args", default="", metavar="FLAGS", help="further flags for vLLM in one string, for recipes; those after `--` follow them")
    add("--ready-timeout", type=positive, default=1800, metavar="SECONDS", help="give up a start after this long (default: 1800)")
    add("--shutdown-timeout", type=int, default=60, metavar="SECONDS", help="running requests may finish this long (default: 60)")
    add("--then", metavar="COMMAND", help="run this shell command once the server is ready, stop the server, exit with its code")
    add("--check", action=argparse.BooleanOptionalAction, default=False, help="prove that MODEL is served rightly, into --output, and stop")
    add("--prompt", nargs="+", default=["Hello"], help="with --check: texts to complete")
    add("--max-tokens", type=positive, default=32, metavar="N", help="with --check: tokens of each completion (default: 32)")
    add("--temperature", type=float, default=0.0, metavar="X", help="with --check: of the completions, seeded (default: 0, greedy)")
    add("--output", metavar="DIR", help="with --check: folder for answers.jsonl and manifest.json")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--force", action="store_true", help="start whatever the checks say")
    add("--dry-run", action="store_true", help="print vLLM's command and environment, start nothing")
    add("--overwrite", action="store_true", help="with --check: put another run in OUTPUT aside")
    return parser


def main():
    parser, words = build_parser(), sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(config_argv(parser, words[:at]))
    args.vllm_args = shlex.split(args.vllm_args) + words[at + 1 :]
    if twice := [name for name in OURS if given(args.vllm_args, name) is not None]:
        parser.error(f"{twice[0]} is a flag of this script; give it before `--`")
    if args.check != bool(args.output):
        parser.error("--check writes what it proved into --output DIR; give both or neither")
    run = None
    if args.check and not args.dry_run:
        machine = ("host", "port", "gpus", "ready_timeout", "shutdown_timeout", "force", "dry_run", "then")
        run = Run("serve-pretrained", args, [args.model] if Path(args.model).exists() else [], machine)

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
    if model["chat"] is False:
        note("the model has no chat template: /v1/completions works, chat returns 400; `-- --chat-template FILE.jinja` gives it one")

    if args.output:
        log = str(Path(args.output, "vllm.log"))
    else:
        handle, log = tempfile.mkstemp(prefix=f"vllm-{args.port}-", suffix=".log")
        os.close(handle)
    environment = {name: value for name, value in (os.environ | changes).items() if value is not None}
    key = given(args.vllm_args, "--api-key") or os.environ.get("VLLM_API_KEY", "")
    api, grace = Api(args.host, args.port, command[command.index("--served-model-name") + 1], key), 5
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    note(f"starting {args.model}; log: {log}")
    with open(log, "w", encoding="utf-8") as file:
        server = Group(command, args.shutdown_timeout, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        seconds = wait_ready(server, api, log, model["chat"], args.ready_timeout)
        grace = args.shutdown_timeout + 10
        certified = len(model["certificate"].get("conversations", ()))
        if sentence := compare_certificate(api, model["certificate"]):
            note(sentence)
            if not args.force:
                return 1
        note(
            f"ready after {seconds:.0f} s"
            + (f", {certified} conversations have their trained token ids" if certified and not sentence else "")
        )
        if not run:
            return run_beside(args.then, server, api, log) if args.then else serve(server, api, log, model["chat"])
        rows, metrics = prove(api, args, model)
    except (OSError, http.client.HTTPException) as error:
        reason = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else error
        raise SystemExit(f"serve_vllm: a request to the server failed: {reason}: {cause(log)}; the whole log: {log}") from None
    finally:
        server.stop(grace)

    with write_atomic(Path(args.output, "answers.jsonl"), "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    metrics |= {"ready_seconds": round(seconds, 1), "certified_ids_equal": 0 if sentence else certified}
    equal = f", greedy ids equal, max |Δlogprob| {metrics['max_abs_logprob_difference']:.1g}" if metrics["greedy_equal"] else ""
    summary = f"{len(rows)} answers{equal}, {metrics['tokens_per_second']} tokens/s"
    run.finish(summary, {"answers": len(rows)}, metrics, {"answers.jsonl": len(rows)}, ("vllm", "vllm-cpu", "torch", "transformers"))


if __name__ == "__main__":
    run_main(main)
