#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate>=1",
#   "ai2-olmo==0.6.0",
#   "ai2-olmo-core>=3",
#   "deepspeed>=0.19",
#   "pyyaml>=6",
#   "tokenizers>=0.22",
#   "torch>=2.6",
#   "torchmetrics>=1.4",
#   "tqdm>=4.66",
#   "transformers>=4.57",
# ]
# [tool.uv]
# override-dependencies = ["ai2-olmo-core==3.0.0"]
# ///
"""Convert a training checkpoint to a Hugging Face folder, and prove that both give the same logits.

Usage:
    python scripts/convert_olmo_to_hf.py --input runs/step1000-unsharded --tokenizer tokenizer.json --output models/mine
    make convert RECIPE=demo
    python scripts/convert_olmo_to_hf.py --reverse --input models/mine --output runs/mine/step0
    python scripts/convert_olmo_to_hf.py --map recipes/maps/nanogpt.yaml --input out/ckpt.pt --tokenizer tokenizer.json --output models/gpt

Reads   a checkpoint of ai2-olmo (config.yaml with model.pt, model.safetensors or, sharded, model_and_optim/*.distcp; OLMo-1 or OLMo-2
        style), of olmo-core (config.json with model_and_optim/; OLMo-2 or OLMo-3 style) or of DeepSpeed's ZeRO (checkpoint-N with
        `latest` and config.json), or a run's folder of stepN, stepN-unsharded or checkpoint-N; tokenizer.json or a folder that holds
        one. With --map, a torch file. With --reverse, a Hugging Face folder of an OLMo-2 or OLMo-3.
Writes  OUTPUT/model-0000k-of-0000n.safetensors and index, config.json, generation_config.json, the tokenizer's files, README.md
        (model card), then OUTPUT/manifest.json, last. Until the comparison is passed all of it stands in OUTPUT/.unverified/.
        With --reverse, OUTPUT/model_and_optim/ and config.json as olmo-core reads them: weights to go on from, without an optimizer.
Exit    0 done or up to date; 1 failed: OUTPUT holds nothing new; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network. Without the comparison some 370 MB of memory whatever the size of model.pt, 600 for olmo-core's; --reverse
        0.8 GB and two of its tensors, DeepSpeed's own tool the whole model. The comparison holds the model twice, in float32, or
        where that is more than is free, the embeddings and one layer of each; --skip-validation leaves it out.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import mmap
import os
import pickle
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's word -> safetensors' word
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
STORAGES = {"Float": "float32", "BFloat16": "bfloat16", "Half": "float16", "Double": "float64", "Long": "int64", "Int": "int32"}
STORAGES |= {"Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}  # the word in torch's pickles -> torch's word
PIECE = 8 * 2**20  # bytes in memory at a time
BOUND = 1e-5  # of the largest |logit|; 0 was seen for every family, another machine's kernels may round otherwise
PADDING = 512  # a vocabulary may be larger than its tokenizer by less than this: padded for speed
ROW = 512  # tokens in a compared row
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the part of a weight's name that is its layer's
PROMPT = "The purpose of this document is to"
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159 (or so), isn't it?",
    "def add(a, b):\n    return a + b  # tabs\tand   spaces\n\n",
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。",
    "Ünïcödé: naïve café, Ελληνικά, русский, 日本語, 한국어, עברית, 🙂👩‍👩‍👧‍👦",
    "  leading, trailing and double  spaces  ",
    "https://example.org/a?b=c&d=e#f user@example.org 1,234,567.89 <b>html</b> {json: [1, 2]}",
)
RELOAD = """
import json, sys
sys.modules["torch"] = None  # beside torch, AutoConfig and AutoTokenizer import the code of all models: 300 MB
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
keys, texts = json.load(sys.stdin)
config, generation, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoConfig, GenerationConfig, AutoTokenizer))
found = {key: getattr(config, key, None) for key in keys}
found |= {"generation " + key: getattr(generation, key) for key in ("eos_token_id", "pad_token_id")}
json.dump([found, tokenizer.eos_token_id, [tokenizer(text)["input_ids"] for text in texts]], sys.stdout)
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The settings that decide the arithmetic, with the values that ai2-olmo 0.6.0 takes where an older config.yaml has no such key
MODEL_DEFAULTS = {"d_model": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": None, "multi_query_attention": None, "mlp_ratio": 4}
MODEL_DEFAULTS |= {"mlp_hidden_size": None, "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1}
MODEL_DEFAULTS |= {"alibi": False, "rope": False, "rope_theta": 10_000, "clip_qkv": None, "attention_layer_norm": False}
MODEL_DEFAULTS |= {"attention_layer_norm_with_affine": True, "embedding_layer_norm": False, "layer_norm_type": "default"}
MODEL_DEFAULTS |= {"layer_norm_with_affine": True, "layer_norm_eps": 1e-5, "norm_after": False, "include_bias": True}
MODEL_DEFAULTS |= {"bias_for_layer_norm": None, "scale_logits": False, "max_sequence_length": 1024, "vocab_size": 50257}
MODEL_DEFAULTS |= {"embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256, "pad_token_id": 50256}

# What a config.json of olmo-core says where a Hugging Face class can compute nothing else (None: no such key). Of its other settings
# those below change no forward pass; any other one that is not false is refused.
CORE = {
    "name": (None, "default"),
    "embed_scale": (None, 1),
    "block.name": ("reordered_norm",),
    "block.feed_forward.name": (None, "default"),
    "block.feed_forward.activation": (None, "silu"),
    "block.feed_forward.bias": (False,),
    "block.sequence_mixer.type": (None, "attention"),
    "block.sequence_mixer.name": (None, "default"),
    "block.sequence_mixer.bias": (False,),
    "block.sequence_mixer.rope.name": (None, "default"),
    "block.sequence_mixer.rope.partial_rotary_factor": (None, 1),
    "lm_head.name": (None, "default"),
    "lm_head.bias": (False,),
}
NORM = {"name": ("rms", "fused_rms"), "bias": (False,), "elementwise_affine": (None, True)}
NORMS = ("block.layer_norm", "block.sequence_mixer.qk_norm", "lm_head.layer_norm")
CORE |= {f"{norm}.{key}": values for norm in NORMS for key, values in NORM.items()}
CORE_NUMBERS = {"d_model", "n_layers", "vocab_size", "block.feed_forward.hidden_size", "tie_word_embeddings"}
CORE_NUMBERS |= {f"block.sequence_mixer.{key}" for key in ("n_heads", "n_kv_heads", "rope.theta")} | {f"{norm}.eps" for norm in NORMS}
CORE_IDLE = {"dtype", "_CLASS_", "full_precision", "backend", "use_flash", "loss_implementation", "init_method", "init_seed", "init_std"}
CORE_IDLE |= {"embedding_init_std", "freeze_params", "dropout", "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward"}

NO_WEIGHTS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, ImportError, struct.error)
NO_WEIGHTS += (pickle.UnpicklingError, zipfile.BadZipFile)  # what a file that holds something else can make its reader raise
# What DeepSpeed's checkpoints hold beside tensors and plain values
DEEPSPEED = {("torch", "Tensor"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "device"), ("torch", "dtype")}
DEEPSPEED |= {("deepspeed.runtime.fp16.loss_scaler", name) for name in ("LossScaler", "DynamicLossScaler")}
DEEPSPEED |= {("deepspeed.runtime.zero.config", "ZeroStageEnum"), ("deepspeed.utils.tensor_fragment", "fragment_address")}
TIED = {"transformer.wte.weight": "transformer.ff_out.weight", "embeddings.weight": "lm_head.w_out.weight"}

Part = namedtuple("Part", "target source start stop shape")  # rows start:stop of tensor `source` of `shape` become tensor `target`
Chunk = namedtuple("Chunk", "path offset corner shape")  # a block of a tensor: bytes from `offset`; `corner`: its first index in the whole
# A checkpoint: its name; the package whose model it is; the files that decide the result, and of them those with the weights;
# read() -> (config.json, settings for read_tokenizer(), Parts, tensors by name); native(folder, weights by name, streamed) -> (model, call)
Source = namedtuple("Source", "name package inputs weights read native")


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


def fail(message):
    """Leave with exit code 1 and one sentence."""
    raise SystemExit(f"convert_olmo_to_hf: {message}")


def size(text):
    """Return the bytes that "4GB", "500MB", "2GiB" or "1000000" mean (decimal units, as transformers has them, and binary ones)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?))?B?", text.strip(), re.I)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 4GB, 500MB or a number of bytes")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kmgt".index(unit.lower()) if unit else 0))


def step(text):
    """Return "latest" or the number of a step."""
    if text != "latest" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'latest' nor the number of a step")
    return text if text == "latest" else int(text)


def refuse_setting(where, name):
    fail(f"{where}: `{name}`: no Hugging Face class computes that; such a model needs the package that trained it to run")


def flatten(value, path=""):
    """Yield (path, value) of what a nested mapping holds, "block.layer_norm.eps" for one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def check_core_settings(config, where):
    """Return the settings of an olmo-core config.json under ai2-olmo's names; SystemExit names one that no Hugging Face class can express.

    Olmo2 is what olmo-core calls reordered norm, with RMS norms and QK norm; with a sliding window in any layer it is Olmo3.
    """
    model = json.loads(json.dumps(config["model"]))
    if "attention" in model["block"]:  # the older name
        model["block"]["sequence_mixer"] = model["block"].pop("attention")
    mixer = model["block"]["sequence_mixer"]
    sliding = mixer.pop("sliding_window", None)
    flat = dict(flatten(model))
    for name in CORE.keys() | flat.keys():
        value = flat.get(name)
        idle = name in CORE_NUMBERS or name.rpartition(".")[2] in CORE_IDLE or value in (None, False, [], {})
        if value not in CORE[name] if name in CORE else not idle:
            refuse_setting(where, f"model.{name}: {value}")
    eps = {flat.get(f"{norm}.eps") for norm in NORMS}
    if len(eps) > 1 or None in eps:
        refuse_setting(where, f"eps of the norms: {sorted(map(str, eps))}")
    every = dict(flatten(config))
    tokenizer = next((name.rpartition(".")[0] for name in every if name.endswith("tokenizer.eos_token_id")), "")
    words = {key: every.get(f"{tokenizer}.{key}") for key in ("vocab_size", "eos_token_id", "pad_token_id")}
    lengths = [every[name] for key in ("max_sequence_length", "sequence_length") for name in every if name.rpartition(".")[2] == key]
    filled = MODEL_DEFAULTS | {"d_model": flat["d_model"], "n_layers": flat["n_layers"], "embedding_size": flat["vocab_size"]} | words
    filled |= {"n_heads": mixer["n_heads"], "n_kv_heads": mixer.get("n_kv_heads"), "rope_theta": mixer["rope"].get("theta", 500_000)}
    filled |= {"mlp_hidden_size": 2 * model["block"]["feed_forward"]["hidden_size"], "layer_norm_eps": eps.pop(), "rope": True}
    filled |= {"weight_tying": bool(model.get("tie_word_embeddings")), "max_sequence_length": (*lengths, None)[0], "include_bias": False}
    filled |= {"norm_after": True, "layer_norm_type": "rms", "attention_layer_norm": True}
    filled = check_settings(filled, where) | {"windows": [-1] * filled["n_layers"], "core": True}
    if sliding:
        first, last = (bool(sliding.get(f"force_full_attention_on_{end}_layer", True)) for end in ("first", "last"))
        whole = {0: first, filled["n_layers"] - 1: last}
        pattern = sliding["pattern"]
        filled["windows"] = [-1 if whole.get(n) else pattern[(n - first) % len(pattern)] for n in range(filled["n_layers"])]
        if len({*filled["windows"]} - {-1}) > 1:
            refuse_setting(where, f"model.block.sequence_mixer.sliding_window.pattern: {pattern}")
    return filled


def check_settings(model, where):
    """Return the settings that matter, defaults filled in; SystemExit names one that no Hugging Face class can express.

    Olmo is pre-norm without norm parameters and with eps 1e-5; Olmo2 is post-norm, RMS, with affine weights and QK-norm.
    """
    model = MODEL_DEFAULTS | {key: value for key, value in model.items() if key in MODEL_DEFAULTS}
    for key, default in MODEL_DEFAULTS.items():
        optional = (bool, type(None)) if default is None or key == "embedding_size" else ()
        if (optional or type(default) in (int, float)) and type(model[key]) not in (int, float, *optional):
            fail(f"{where}: model.{key} is {model[key]!r}, not a number; mend the file or take the one that was saved with the weights")
    for key in ("d_model", "n_layers", "n_heads", "max_sequence_length", "vocab_size"):
        if model[key] < 1:
            fail(f"{where}: model.{key} is {model[key]!r}; it must be at least 1")
    kv_heads = model["n_kv_heads"] or (1 if model["multi_query_attention"] else model["n_heads"])
    if model["d_model"] % model["n_heads"] or model["n_heads"] % kv_heads:
        fail(f"{where}: {model['d_model']} dimensions, {model['n_heads']} heads and {kv_heads} key-value heads do not divide evenly")
    olmo2, rms = model["norm_after"], model["layer_norm_type"] == "rms"
    affine, qk_norm, qk_affine = (
        model[key] for key in ("layer_norm_with_affine", "attention_layer_norm", "attention_layer_norm_with_affine")
    )
    norm_bias = model["include_bias"] if model["bias_for_layer_norm"] is None else model["bias_for_layer_norm"]
    unsupported = {
        "alibi: true": model["alibi"],
        "rope: false": not model["rope"],
        "include_bias: true": model["include_bias"],
        "bias_for_layer_norm: true": norm_bias and (affine or qk_norm),
        f"activation_type: {model['activation_type']}": model["activation_type"] != "swiglu",
        f"block_type: {model['block_type']}": model["block_type"] != "sequential",
        f"block_group_size: {model['block_group_size']}": model["block_group_size"] != 1,
        "embedding_layer_norm: true": model["embedding_layer_norm"],
        "scale_logits: true": model["scale_logits"],
        "norm_after without RMS norms with weights and attention_layer_norm": olmo2 and not (rms and affine and qk_norm and qk_affine),
        "norm_after with clip_qkv": olmo2 and model["clip_qkv"],
        "RMS, affine or QK norms without norm_after": not olmo2 and (rms or affine or qk_norm),
        f"layer_norm_eps: {model['layer_norm_eps']} without norm_after": not olmo2 and float(model["layer_norm_eps"]) != 1e-5,
    }
    for name, found in unsupported.items():
        if found:
            refuse_setting(where, name)
    filled = {"n_kv_heads": kv_heads, "embedding_size": model["embedding_size"] or model["vocab_size"]}
    filled |= {"mlp_hidden_size": model["mlp_hidden_size"] or model["mlp_ratio"] * model["d_model"], "core": False, "windows": []}
    return model | filled


def vocab(text):
    """Return "keep", "trim", or the number of "pad:N"."""
    if text in ("keep", "trim"):
        return text
    if not (match := re.fullmatch(r"pad:([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of keep, trim and pad:N, for a vocabulary that is a multiple of N")
    return int(match[1])


def plan_tensors(model, vocab="keep"):
    """Return the Parts of all Hugging Face tensors, in the order of the layers, for `model` as check_settings() returns it.

    The maps are those of both packages' own converters, checked against the logits; `vocab`: "trim" drops the rows that pad the vocabulary,
    a number makes it that number's next multiple, which may be more rows than the checkpoint has.
    """
    width, rows, number = model["d_model"], model["embedding_size"], model["vocab_size"]
    kept = {"keep": rows, "trim": number}.get(vocab) or -(-number // vocab) * vocab
    kv = width // model["n_heads"] * model["n_kv_heads"]
    inner = model["mlp_hidden_size"] // 2  # of which one half is the gate
    if model["core"]:
        names = {"embed": "embeddings", "norm": "lm_head.norm", "head": "lm_head.w_out", "layer": "blocks"}
        block = {f"attention.w_{word}": ([width], {f"self_attn.{word}_proj": rows}) for word, rows in (("q", width), ("k", kv), ("v", kv))}
        block |= {"attention.w_out": ([width], {"self_attn.o_proj": width}), "feed_forward.w3": ([width], {"mlp.up_proj": inner})}
        block |= {"feed_forward.w1": ([width], {"mlp.gate_proj": inner}), "feed_forward.w2": ([inner], {"mlp.down_proj": width})}
        norms = {"q": "attention.q_norm", "k": "attention.k_norm", "attention": "attention_norm", "feedforward": "feed_forward_norm"}
    else:
        names = {"embed": "wte", "norm": "ln_f", "head": "ff_out", "layer": "blocks"}
        names = {key: f"transformer.{name}" for key, name in names.items()}
        block = {  # source: (columns, its rows in order)
            "att_proj": ([width], {"self_attn.q_proj": width, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
            "attn_out": ([width], {"self_attn.o_proj": width}),
            "ff_proj": ([width], {"mlp.up_proj": inner, "mlp.gate_proj": inner}),  # SwiGLU takes the second half as the gate
            "ff_out": ([inner], {"mlp.down_proj": width}),
        }
        norms = {"q": "q_norm", "k": "k_norm", "attention": "attn_norm", "feedforward": "ff_norm"}
    if model["norm_after"]:
        block |= {norms["q"]: ([], {"self_attn.q_norm": width}), norms["k"]: ([], {"self_attn.k_norm": kv})}
        block |= {norms[word]: ([], {f"post_{word}_layernorm": width}) for word in ("attention", "feedforward")}
    parts = [Part("model.embed_tokens.weight", f"{names['embed']}.weight", 0, kept, (rows, width))]
    for layer in range(model["n_layers"]):
        for source, (columns, targets) in block.items():
            start = 0
            for target, height in targets.items():
                name, shape = f"{names['layer']}.{layer}.{source}.weight", (sum(targets.values()), *columns)
                parts.append(Part(f"model.layers.{layer}.{target}.weight", name, start, start + height, shape))
                start += height
    if model["norm_after"]:
        parts.append(Part("model.norm.weight", f"{names['norm']}.weight", 0, width, (width,)))
    if not model["weight_tying"]:
        parts.append(Part("lm_head.weight", f"{names['head']}.weight", 0, kept, (rows, width)))
    return parts


def hf_config(model, rows):
    """Return config.json but for the dtype. Rope stands under its old and new name: transformers 4 reads the one, 5 the other."""
    theta = float(model["rope_theta"])
    rope = {"rope_type": "default", "rope_theta": theta}
    own = {"rms_norm_eps": float(model["layer_norm_eps"])} if model["norm_after"] else {"clip_qkv": model["clip_qkv"]}
    sliding = max(model["windows"], default=-1)
    if sliding > 0:
        own |= {"layer_types": ["full_attention" if window < 0 else "sliding_attention" for window in model["windows"]]}
        own |= {"sliding_window": sliding}
        rope = dict.fromkeys(("full_attention", "sliding_attention"), rope)
    family = 3 if sliding > 0 else 2 if model["norm_after"] else ""
    return {
        "architectures": [f"Olmo{family}ForCausalLM"],
        "model_type": f"olmo{family}",
        "vocab_size": rows,
        "hidden_size": model["d_model"],
        "intermediate_size": model["mlp_hidden_size"] // 2,
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": model["n_kv_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": model["max_sequence_length"],
        "rope_theta": theta,
        "rope_parameters": rope,
        "tie_word_embeddings": bool(model["weight_tying"]),
        "bos_token_id": None,
        "eos_token_id": model["eos_token_id"],
        "pad_token_id": model["pad_token_id"],
    } | own


def check_tensors(parts, tensors, where, config):
    """Compare the checkpoint's tensors with the plan; SystemExit names those missing, left over, or of another shape or type."""
    wanted = {part.source: part.shape for part in parts}
    twins = {TIED[part.source]: part for part in parts if part.target == "model.embed_tokens.weight"}
    twins = {name: part for name, part in twins.items() if name in tensors.keys() - wanted.keys()}  # olmo-core saves tied weights twice
    for names, what in ((wanted.keys() - tensors.keys(), "lacks"), (tensors.keys() - wanted.keys() - twins.keys(), "holds the unknown")):
        if names:
            first, more = sorted(names)[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
            fail(f"{where} {what} tensor {first}{more}; {config} and the weights are not of the same model")
    for name, shape in (wanted | {name: part.shape for name, part in twins.items()}).items():
        if tensors[name].shape != shape:
            fail(f"{where}: {name} is {tensors[name].shape}, but {config} makes it {shape}; they are not of the same model")
        if tensors[name].dtype not in DTYPES:
            fail(f"{where}: {name} is {tensors[name].dtype}; only {', '.join(DTYPES)} can be converted")
    for name, part in twins.items():
        for one, other in zip(tensors[name].pieces(), tensors[part.source].pieces(), strict=True):
            if not one.equal(other):
                fail(f"{where}: {name} differs from {part.source}, but {config} ties them; they are not of the same model")


def plan_shards(parts, sizes, limit):
    """Split `parts` into lists of at most `limit` bytes each (a larger tensor stands alone); `sizes`: bytes by target."""
    shards, filled = [[]], 0
    for part in parts:
        if shards[-1] and filled + sizes[part.target] > limit:
            shards, filled = [*shards, []], 0
        shards[-1].append(part)
        filled += sizes[part.target]
    return shards


def dtype_name(dtype):
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def count(part):
    """Return the numbers in a part."""
    return math.prod((part.stop - part.start, *part.shape[1:]))


def pieces(part, stored):
    """Yield the rows of a part in tensors of some 8 MB. Rows that the checkpoint lacks become the mean of those that it has.

    Their logit is then the mean of the other logits, and so never the largest; that of a row of zeros can be.
    """
    rows = stored.shape[0]
    piece = None
    for piece in stored.pieces(part.start, min(part.stop, rows)):
        yield piece
    if part.stop > rows:
        mean = sum(piece.double().sum(0) for piece in stored.pieces()) / rows
        yield mean.to(piece.dtype).repeat(part.stop - rows, 1)


def shard_names(number):
    """Return the file names that transformers gives to `number` shards."""
    return ["model.safetensors"] if number == 1 else [f"model-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)]


def weights_of(folder):
    """Return the path of a checkpoint's weights, or where they should be: model.pt, model.safetensors or, sharded, .metadata."""
    paths = [folder / name for name in ("model.pt", "model.safetensors", "model_and_optim/.metadata")]
    return next((path for path in paths if path.exists()), paths[0])


def config_of(folder):
    """Return the path of a checkpoint's settings: config.yaml is ai2-olmo's, config.json olmo-core's."""
    core = (folder / "model_and_optim").is_dir() and not (folder / "config.yaml").exists()
    return folder / ("config.json" if core else "config.yaml")


def files_of(weights):
    """Return the files that hold the weights, and for each of a sharded checkpoint the bytes that it must have."""
    if weights.name != ".metadata":
        return {weights: 0}
    chunks = [chunk for *_, chunks in read_metadata(weights.parent).values() for chunk in chunks.values()]
    sizes = {}
    for path, offset, length, _ in chunks:
        sizes[path] = max(offset + length, sizes.get(path, 0))
    return dict(sorted(sizes.items()))


def fault(folder):
    """Return what keeps a folder from being a whole checkpoint, or "" ."""
    weights, config = weights_of(folder), config_of(folder)
    if not config.is_file():
        return f"{config.name} is missing"
    if not weights.is_file():
        return "neither model.pt nor model.safetensors nor model_and_optim/.metadata is there"
    if weights.suffix == ".pt" and not zipfile.is_zipfile(weights):
        return f"{weights.name} is cut short or no torch file"
    with contextlib.suppress(*NO_WEIGHTS):  # read_tensors() says what is wrong with it
        for path, size in files_of(weights).items():
            if not path.is_file() or path.stat().st_size < size:
                return f"{path.name} is {'cut short' if path.is_file() else 'missing'}"
    return ""


def find_checkpoint(root, wanted):
    """Return the checkpoint folder: `root` itself, or step `wanted` ("latest" or a number) of the run whose folder it is.

    Of a run, steps that are not whole are passed over with a word. SystemExit says what a folder of another shape looks like.
    """
    if not root.is_dir():
        fail(f"{root}: {'a file' if root.exists() else 'no such folder'}; name the folder that holds config.yaml and model.pt")
    names = {path.name for path in root.iterdir()}
    steps = {int(match[1]): root / name for name in sorted(names) if (match := re.fullmatch(r"step(\d+)(-unsharded)?", name))}
    if steps and not names & {"model.pt", "model.safetensors", "model_and_optim"}:
        faults = {number: fault(folder) for number, folder in sorted(steps.items(), reverse=True) if wanted in ("latest", number)}
        whole = next((number for number, why in faults.items() if not why), None)
        for number, why in faults.items():
            if why and (whole is None or number > whole):
                print(f"convert_olmo_to_hf: {steps[number]} is not whole: {why}", file=sys.stderr)
        if whole is None:
            fail(f"{root}: no whole checkpoint{'' if wanted == 'latest' else f' of step {wanted}'}; steps there: {sorted(steps)}")
        return steps[whole]
    if not (why := fault(root)):
        return root
    shapes = {
        "it is a Hugging Face folder already, and needs no conversion": "config.json" in names and any("safetensors" in n for n in names),
        "name the folder above it": ".metadata" in names,
        "it is a sharded checkpoint of an older kind; save it unsharded (stepN-unsharded)": names & {"model", "rank0.pt"},
        "it holds token memory maps, not a checkpoint": any(name.endswith(".npy") for name in names),
        "it is empty": not names,
    }
    remedy = "name a folder with config.yaml or config.json and the weights, or one with folders stepN or stepN-unsharded"
    looks = next((what for what, so in shapes.items() if so), remedy)
    fail(f"{root}: not an OLMo checkpoint: {why}; {looks}")


def read_settings(path):
    """Return the settings of the model in a checkpoint's config.yaml or config.json, checked, under ai2-olmo's names."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return check_core_settings(json.loads(text), path)
        model = yaml.safe_load(text)["model"]
        if not isinstance(model, dict):
            raise TypeError("`model` is not a block of settings")
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        fail(f"{path}: no settings of an OLMo model ({' '.join(str(error).split())}); take the file that was saved with the weights")
    return check_settings(model, path)


class Plain(pickle.Unpickler):
    """Reads plain values and what `known` gives for a global's (module, name); any other global, which could run code, is an error."""

    def __init__(self, file, known=None):
        super().__init__(file)
        self.known = known or {}

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise ImportError(f"GLOBAL {module}.{name}")
        return self.known[module, name]

    def persistent_load(self, storage):
        return storage


class Record:
    """Stands for an object of a pickle whose class is not loaded: its fields are attributes, or `state` when it has no names for them."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class Stored:
    """A tensor that lies in files, in one or several `chunks`, until rows() reads some of it; `dtype` is torch's word for it."""

    def __init__(self, shape, dtype, chunks):
        self.shape, self.dtype, self.chunks = tuple(shape), dtype, chunks

    def rows(self, start=0, stop=None):
        """Return rows start:stop as a new tensor: read, not mapped, so that no page of the file stays in this process."""
        import torch

        stop = self.shape[0] if stop is None else stop
        out = None
        for chunk in self.chunks:
            first, last = max(start, chunk.corner[0]), min(stop, chunk.corner[0] + chunk.shape[0])
            if first >= last:
                continue
            width = math.prod(chunk.shape[1:]) * BYTES[self.dtype]
            data = torch.empty((last - first) * width, dtype=torch.uint8)
            with open(chunk.path, "rb") as file:
                file.seek(chunk.offset + (first - chunk.corner[0]) * width)
                if file.readinto(data.numpy()) < len(data):
                    fail(f"{chunk.path} was cut short meanwhile; copy it again or take another step")
            piece = data.view(getattr(torch, self.dtype)).view(last - first, *chunk.shape[1:])
            if piece.shape == (stop - start, *self.shape[1:]):
                return piece
            out = torch.empty(stop - start, *self.shape[1:], dtype=piece.dtype) if out is None else out
            place = [slice(at, at + length) for at, length in zip(chunk.corner[1:], chunk.shape[1:], strict=True)]
            out[(slice(first - start, last - start), *place)] = piece
        return out

    def pieces(self, start=0, stop=None):
        """Yield rows start:stop in tensors of some 8 MB."""
        stop = self.shape[0] if stop is None else stop
        height = max(1, PIECE // (math.prod(self.shape[1:]) * BYTES[self.dtype]))
        for row in range(start, stop, height):
            yield self.rows(row, min(row + height, stop))


class Made(Stored):
    """A tensor that is made from stored ones, as a whole, when it is asked for."""

    def __init__(self, shape, dtype, make):
        super().__init__(shape, dtype, [])
        self.make = make

    def rows(self, start=0, stop=None):
        return self.make()[start:stop].contiguous()

    def pieces(self, start=0, stop=None):
        yield self.rows(start, stop)


def decode_key(key):
    """Return a tensor's name from a key of ai2-olmo's model.safetensors: base64 of a pickled ((name,), False), or the plain name."""
    try:
        names, pickled = Plain(io.BytesIO(base64.b64decode(key, altchars=b"-_", validate=True))).load()
    except (ValueError, TypeError, EOFError, IndexError, KeyError, AttributeError, pickle.UnpicklingError):
        return key
    return f"{'.'.join(map(str, names))} (pickled)" if pickled else ".".join(map(str, names))


def read_safetensors(path):
    """Return {name: Stored} of a safetensors file. Format: length of header, header in JSON, bytes."""
    words, total = {word: name for name, word in DTYPES.items()}, path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, total)))
    header.pop("__metadata__", None)
    if 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) > total:
        raise ValueError("it is cut short")
    stored = {}
    for key, entry in header.items():
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        chunk = Chunk(path, start, (0,) * len(shape), shape)
        stored[decode_key(key)] = Stored(shape, words.get(entry["dtype"], entry["dtype"]), [chunk])
    return stored


class View(mmap.mmap):
    def seekable(self):  # zipfile asks; mmap itself answers from Python 3.13 on
        return True


def read_torch(path, offset=0, length=None, more=()):
    """Return what torch.save() wrote to bytes offset:offset+length of a file, a Stored in place of each tensor; no code of it is run.

    `more`: (module, name) of classes whose objects become Records.
    Format: a zip archive that holds data.pkl and, uncompressed, one record for each storage that the pickle names.
    """
    length = path.stat().st_size - offset if length is None else length
    before = offset % mmap.ALLOCATIONGRANULARITY  # zipfile passes over what stands before an archive
    with open(path, "rb") as file, View(file.fileno(), before + length, offset=offset - before, access=mmap.ACCESS_READ) as view:
        archive = zipfile.ZipFile(view)
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}

        def tensor(storage, start, shape, stride, *rest):
            _, dtype, key, _, _ = storage
            record, numbers = entries[f"data/{key}"], math.prod(shape)
            at = record.header_offset
            at += 30 + sum(struct.unpack_from("<HH", view, at + 26))  # behind the record's own header
            dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            if any(a != b for a, b, n in zip(stride, dense, shape, strict=True) if n > 1) and numbers:
                dtype = "transposed"
            elif record.compress_type != zipfile.ZIP_STORED or record.file_size < (start + numbers) * BYTES[dtype]:
                raise ValueError("a tensor is larger than its storage, or compressed")
            start *= BYTES.get(dtype, 0)
            return Stored(shape, dtype, [Chunk(path, offset - before + at + start, (0,) * len(shape), tuple(shape))])

        known = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): tensor, ("torch", "Size"): tuple}
        known |= {("torch._utils", "_rebuild_parameter"): lambda data, *rest: data}
        known |= {("torch", f"{word}Storage"): name for word, name in STORAGES.items()}
        known |= dict.fromkeys(more, Record)
        return Plain(io.BytesIO(archive.read(entries["data.pkl"])), known).load()


def read_metadata(folder):
    """Return {name: [shape, dtype, {corner: (file, offset, length)}]} of a torch distributed checkpoint's .metadata; no code is run."""
    known = {("torch", "Size"): tuple, ("torch.serialization", "_get_layout"): str}
    known |= {("torch", name): name for name in BYTES}
    classes = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
    classes += ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
    known |= {("torch.distributed.checkpoint.metadata", name): Record for name in classes}
    known |= {(f"{module}.distributed.checkpoint.filesystem", "_StorageInfo"): Record for module in ("torch", "olmo_core")}
    known |= {("pathlib", "PosixPath"): Record}
    with open(folder / ".metadata", "rb") as file:
        metadata = Plain(file, known).load()
    places = {(index.fqn, getattr(index, "offset", ())): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for key, value in metadata.state_dict_metadata.items():
        if key.startswith("model.") and hasattr(value, "chunks"):
            found = {chunk.offsets: (places[key, chunk.offsets], chunk.sizes) for chunk in value.chunks}
            chunks = {at: (folder / info.relative_path, info.offset, info.length, sizes) for at, (info, sizes) in found.items()}
            if sum(math.prod(sizes) for *_, sizes in chunks.values()) != math.prod(value.size):
                raise ValueError(f"it lists parts of {key} only")
            tensors[key.removeprefix("model.")] = (value.size, value.properties.state[0], chunks)
    return tensors


def read_distributed(folder):
    """Return {name: Stored} of the model in a torch distributed checkpoint: each chunk of a tensor is an archive within a .distcp file."""
    tensors = {}
    for name, (shape, dtype, chunks) in read_metadata(folder).items():
        found = []
        for corner, (path, offset, length, sizes) in chunks.items():
            held = read_torch(path, offset, length)
            if (held.shape, held.dtype) != (sizes, dtype):
                raise ValueError(f"{name} in {path.name} is not what .metadata says")
            found.append(held.chunks[0]._replace(corner=corner))
        tensors[name] = Stored(shape, dtype, found)
    return tensors


def fail_reading(path, error, what):
    """Leave with the word for a file that could not be read: what it is not, or that it would have run code."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        fail(f"{path}: it asks for {code[1]} to be run; nothing was run, do not trust this file")
    fail(f"{path}: not {what.format(' '.join(str(error).split())[:200])}")


def read_tensors(path):
    """Return {name: Stored} of model.pt, model.safetensors or the .metadata of a sharded checkpoint; no code in the files is run."""
    try:
        reader = {".safetensors": read_safetensors, ".pt": read_torch}.get(path.suffix)
        tensors = reader(path) if reader else read_distributed(path.parent)
    except NO_WEIGHTS as error:
        fail_reading(path, error, "a whole file of weights ({}); copy it again or take another step")
    odd = [name for name, value in tensors.items() if not isinstance(value, Stored)] if isinstance(tensors, dict) else ["all of it"]
    if odd:
        fail(f"{path}: {odd[0]} is not a tensor: this is not the state of an OLMo model (optim.pt and train.pt are other things)")
    return tensors


def finite(tensor, dtype, name):
    """Return a tensor as `dtype`; SystemExit when it holds NaN or infinity, or would then."""
    out = tensor.to(dtype)
    if not all(map(math.isfinite, out.aminmax())):
        if all(map(math.isfinite, tensor.aminmax())):
            fail(f"{name} has numbers too large for {dtype_name(dtype)}; use --dtype keep")
        fail(f"{name} holds NaN or infinity: training had diverged; take an earlier step")
    return out


def read_map(path, weights):
    """Return (config.json, {Hugging Face's name: Stored}) of a torch file, by a YAML map of names; recipes/maps/ has examples.

    Each tensor of the file must be used, named as a twin, or ignored, and each that transformers wants must have the shape that it wants.
    """
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    def resolve(value):
        if isinstance(value, dict):
            return {key: resolve(inner) for key, inner in value.items()}
        if isinstance(value, str) and value.startswith("#"):
            return tensors[value[1:]].shape[0]
        if isinstance(value, str) and value.startswith("$"):
            name, _, other = value[1:].partition("|")
            if settings.get(name) is None and not other:
                raise LookupError(f"there is no setting {name}")
            return resolve(other if other.startswith("$") else yaml.safe_load(other)) if settings.get(name) is None else settings[name]
        return value

    try:
        rules = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = read_torch(weights)
        state = content[rules["state"]] if rules.get("state") else content
        tensors = {name.removeprefix(rules.get("strip") or ""): tensor for name, tensor in state.items() if isinstance(tensor, Stored)}
        beside = weights.parent / rules["settings"] if rules.get("settings") else None
        settings = json.loads(beside.read_text(encoding="utf-8")) if beside else content
        settings = dict(flatten(settings))
        config = resolve(rules["config"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; --map takes a YAML map of names, --input the torch file")
    except Exception as error:  # also of a configuration's own kinds
        fail_reading(weights, error, f"what {path} describes ({type(error).__name__}: {{}}); correct the map")
    heads = {"q": getattr(model.config, "num_attention_heads", 0), "k": getattr(model.config, "num_key_value_heads", 0)}
    groups = {group: rules.get(group) or {} for group in ("tensors", "transposed", "rotary", "zeros")}
    found, used = {}, set()
    for name, weight in model.named_parameters():
        layer = next(iter(re.findall(r"\.(\d+)\.", name)), "")
        general = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        group = next((group for group, names in groups.items() if general in names), None)
        source = groups[group][general].replace("{}", layer) if group else ""
        if source not in tensors and group != "zeros":
            fail(f"{weights}: nothing becomes {name}: {source + ' is missing' if group else f'{path} does not name it'}")
        used.add(source)
        stored, shape = tensors.get(source), tuple(weight.shape)
        if stored is None:
            stored = Made(shape, next(iter(tensors.values())).dtype, functools.partial(torch.zeros, shape))
        elif group == "transposed":
            stored = Made(stored.shape[::-1], stored.dtype, lambda read=stored.rows: read().t())
        elif group == "rotary":
            pairs = (heads[re.search(r"([qk])_proj", name)[1]], -1, 2)
            make = lambda read=stored.rows, pairs=pairs: read().unflatten(0, pairs).transpose(1, 2).flatten(0, 2)  # noqa: E731
            stored = Made(stored.shape, stored.dtype, make)
        if stored.shape != shape or stored.dtype not in DTYPES:
            fail(f"{weights}: {source} is {stored.shape}, {stored.dtype}; transformers wants {name} as {shape}, of {', '.join(DTYPES)}")
        found[name] = stored
    for name, twin in (rules.get("same") or {}).items():
        if name in tensors and not all(a.equal(b) for a, b in zip(tensors[name].pieces(), tensors[twin].pieces(), strict=True)):
            fail(f"{weights}: {name} differs from {twin}; {path} calls them the same")
    known = [*(rules.get("ignore") or []), *(rules.get("same") or {})]
    left = [name for name in tensors if name not in used and re.sub(r"\.\d+\.", ".{}.", name, count=1) not in known]
    if left:
        fail(f"{weights}: nothing takes {sorted(left)[0]}; add it to {path}, or to its `ignore`")
    return config, found


def find_deepspeed(root, wanted):
    """Return the folder of a DeepSpeed checkpoint (its file `latest` names a folder of states): `root`, or the checkpoint-N in it."""
    if (root / "latest").is_file() or not root.is_dir():
        return root if (root / "latest").is_file() else None
    steps = {int(path.parent.name[11:]): path.parent for path in root.glob("checkpoint-*/latest") if path.parent.name[11:].isdigit()}
    if steps and wanted != "latest" and wanted not in steps:
        fail(f"{root}: no checkpoint of step {wanted}; steps there: {sorted(steps)}")
    return steps.get(max(steps, default=None) if wanted == "latest" else wanted)


def read_deepspeed(folder):
    """Return (config.json, {Hugging Face's name: Stored}) of a ZeRO checkpoint, put together by DeepSpeed's own tool, in float32.

    That tool runs the code of pickles, so each file is read without it first, and refused where it asks for any but DeepSpeed's own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    try:
        path = states
        for path in sorted(states.glob("*_states.pt")):
            read_torch(path, more=DEEPSPEED)
        path = states
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it speaks on both
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
        path = folder / "config.json"
        config = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "transformers_version"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # of DeepSpeed, of transformers
        fail_reading(path, error, "a whole DeepSpeed checkpoint ({}); copy it again or take another step")
    config = {"architectures": [type(model).__name__]} | {key: value for key, value in config.items() if not key.startswith("_")}
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name, shape in wanted.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            what = "is missing" if found is None else "is an empty piece of ZeRO-3" if 0 in found else f"is {found}"
            fail(f"{states}: {name} {what}; config.json makes it {shape}: save the checkpoint anew, or take its own config.json")
    if left := state.keys() - wanted.keys() - model.state_dict().keys():
        fail(f"{states}: nothing takes {sorted(left)[0]}; config.json is not this model's")
    return config, {name: Made(shape, "float32", lambda name=name: state[name].contiguous().float()) for name, shape in wanted.items()}


def write_shard(path, parts, tensors, dtypes, bar):
    """Write one safetensors file in pieces of 8 MB and return its SHA-256; NaN, infinity and overflow end in SystemExit."""
    import torch

    header, offset, digest = {"__metadata__": {"format": "pt"}}, 0, hashlib.sha256()
    for part in parts:
        end = offset + dtypes[part.source].itemsize * count(part)
        word, shape = DTYPES[dtype_name(dtypes[part.source])], [part.stop - part.start, *part.shape[1:]]
        header[part.target] = {"dtype": word, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomic(path) as file, ThreadPoolExecutor(1) as beside:  # one piece is written while the next is read and looked at

        def put(data):
            file.write(data)
            if hasattr(os, "posix_fadvise"):  # begin with what fsync will wait for
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            digest.update(data)
            bar.update(len(data))

        written = beside.submit(put, struct.pack("<Q", len(text)) + text)
        for part in parts:
            for piece in pieces(part, tensors[part.source]):
                out = finite(piece, dtypes[part.source], part.source)
                written.result()
                written = beside.submit(put, out.view(torch.uint8).reshape(-1).numpy())
        written.result()
    return digest.hexdigest()


def write_model(folder, parts, tensors, dtypes, limit):
    """Write the shards that are not there yet, and the index; return ({file name: sha256} of those written, counts)."""
    from tqdm import tqdm

    sizes = {part.target: dtypes[part.source].itemsize * count(part) for part in parts}
    shards, digests, total = plan_shards(parts, sizes, limit), {}, sum(sizes.values())
    names = shard_names(len(shards))
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not sys.stderr.isatty()) as bar:
        for name, shard in zip(names, shards, strict=True):
            if not (folder / name).exists():  # each appears whole: a killed run goes on behind the last one
                digests[name] = write_shard(folder / name, shard, tensors, dtypes, bar)
    if len(names) > 1:
        weight_map = {part.target: name for name, shard in zip(names, shards, strict=True) for part in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests, {"tensors": len(parts), "parameters": sum(map(count, parts)), "shards": len(shards), "bytes": total}


def write_json(path, value):
    with write_atomic(path, "w") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def core_config(path, tokens):
    """Return olmo-core's config.json for a Hugging Face folder's; SystemExit names a setting that olmo-core's block does not compute.

    `tokens`: how many ids the tokenizer has. max_position_embeddings becomes the sequence length.
    """
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] not in ("olmo2", "olmo3"):
            fail(f"{path}: model_type {config['model_type']}: only olmo2 and olmo3 have a twin in olmo-core")
        layers, rope = config["num_hidden_layers"], config.get("rope_parameters") or config.get("rope_scaling") or {}
        ropes = dict(flatten(rope))
        thetas = {value for name, value in ropes.items() if name.rpartition(".")[2] == "rope_theta"} or {config.get("rope_theta", 10_000)}
        others = {
            name: value for name, value in ropes.items() if name.rpartition(".")[2] != "rope_theta" and value not in (None, "default")
        }
        ratio = config["hidden_size"] // config["num_attention_heads"]
        unlike = {"hidden_act": config.get("hidden_act", "silu") != "silu", "attention_bias": config.get("attention_bias")}
        unlike |= {"rope_parameters": len(thetas) > 1 or others, "head_dim": config.get("head_dim", ratio) not in (None, ratio)}
        for name, found in unlike.items():
            if found:
                fail(f"{path}: `{name}: {config.get(name)}`: olmo-core's {config['model_type']} does not compute that")
        sliding, width = None, config.get("sliding_window")
        if config["model_type"] == "olmo3" and width:
            kinds = config.get("layer_types") or ["full_attention" if n % 4 == 3 else "sliding_attention" for n in range(layers)]
            pattern = [width if kind == "sliding_attention" else -1 for kind in kinds]
            whole = {f"force_full_attention_on_{end}_layer": False for end in ("first", "last")}
            sliding = SlidingWindowAttentionConfig(pattern=pattern, **whole)
        model = TransformerConfig.llama_like(
            d_model=config["hidden_size"],
            vocab_size=config["vocab_size"],
            n_layers=layers,
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            qk_norm=True,
            layer_norm_eps=config["rms_norm_eps"],
            rope_theta=int(thetas.pop()),
            block_name=TransformerBlockType.reordered_norm,
            feed_forward=FeedForwardConfig(hidden_size=config["intermediate_size"], bias=False),
            sliding_window=sliding,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        )
        eos = config["eos_token_id"]
        tokenizer = {"vocab_size": tokens, "eos_token_id": eos[0] if isinstance(eos, list) else eos, "pad_token_id": config["pad_token_id"]}
        length = config["max_position_embeddings"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path}: no settings of an OLMo model ({' '.join(str(error).split())}); name a Hugging Face folder of an OLMo-2 or OLMo-3")
    return {"model": model.as_config_dict(), "dataset": {"tokenizer": tokenizer, "sequence_length": length}}


def write_core(folder, parts, tensors):
    """Write model_and_optim/ with olmo-core's own writer, which is handed each tensor when it comes to it."""
    import torch
    from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter
    from torch.distributed import checkpoint
    from tqdm import tqdm

    sources = {f"model.{part.source}": part.target for part in parts}
    for embedding, head in TIED.items():  # olmo-core saves tied weights twice
        if f"model.{embedding}" in sources:
            sources.setdefault(f"model.{head}", sources[f"model.{embedding}"])
    bar = tqdm(total=len(sources), unit=" tensors", desc="writing", disable=not sys.stderr.isatty())
    refused = []

    class Planner(checkpoint.DefaultSavePlanner):
        def lookup_object(self, index):
            bar.update()
            tensor = tensors[sources[index.fqn]].rows()
            try:
                return finite(tensor, tensor.dtype, sources[index.fqn])
            except SystemExit as leave:  # the writer would make a traceback of it
                refused.append(leave)
                raise

    found = {name: tensors[source] for name, source in sources.items()}
    empty = {name: torch.empty(one.shape, dtype=getattr(torch, one.dtype), device="meta") for name, one in found.items()}
    shutil.rmtree(folder / "model_and_optim", ignore_errors=True)  # of a killed run
    with bar:
        writer = RemoteFileSystemWriter(folder / "model_and_optim", thread_count=1)
        try:
            checkpoint.state_dict_saver.save(empty, storage_writer=writer, planner=Planner(), no_dist=True)
        except checkpoint.CheckpointException as error:
            raise refused[0] if refused else OSError(str(error).strip().splitlines()[-1]) from None
    return {"tensors": len(sources), "parameters": sum(map(count, parts)), "bytes": sum(t.nbytes for t in empty.values())}


def write_settings(folder, config, files):
    """Write config.json, generation_config.json and the tokenizer's `files` ({name: bytes})."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {key: config[key] for key in ("eos_token_id", "pad_token_id")})
    for name, data in files.items():
        with write_atomic(folder / name) as file:
            file.write(data)


def tokenizer_paths(path):
    """Return the tokenizer's files: tokenizer.json itself, or those of a folder."""
    paths = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not paths or (path.is_dir() and paths[0].name != "tokenizer.json"):
        fail(f"{path}: no tokenizer.json there; --tokenizer takes that file or the folder that holds it")
    return paths


def read_tokenizer(paths, model, rows):
    """Return (tokenizers.Tokenizer, {file name: bytes for the output folder}), or leave when the tokenizer is not the model's.

    Files keep their bytes. tokenizer_config.json changes only where its class would reload with other ids, or where it does not
    name the checkpoint's stop and padding tokens.
    """
    from tokenizers import Tokenizer

    files = {"tokenizer.json" if path == paths[0] else path.name: path.read_bytes() for path in paths}
    where = paths[0]
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        text = files.get("tokenizer_config.json", b"{}").decode("utf-8")
        config = json.loads(text)
        if not isinstance(config, dict):
            raise TypeError("tokenizer_config.json is no JSON object")
    except Exception as error:  # tokenizers raises bare Exception
        fail(f"{where}: not a tokenizer ({' '.join(str(error).split())[:200]}); name a tokenizer.json of the tokenizers library")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not model["vocab_size"] - PADDING < ids <= model["vocab_size"]:
        fail(f"{where} has {ids} tokens, but the model's vocab_size is {model['vocab_size']}; name the tokenizer that it learnt with")
    wanted = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("eos_token", "pad_token"):
        number = model[f"{name}_id"]
        token = tokenizer.id_to_token(number) if 0 <= number < rows else None
        if token is None:
            fail(f"{where}: the checkpoint's {name}_id {number} is none of its {ids} tokens; config.yaml or the tokenizer is wrong")
        named = config.get(name)
        named = named.get("content") if isinstance(named, dict) else named
        if name == "eos_token" and named not in (None, token):
            fail(f"{where}: the checkpoint stops at id {number}, {token!r}, but the tokenizer's eos_token is {named!r}; make them agree")
        if named is None:
            wanted[name] = token
    if config | wanted != config:
        config = {"model_max_length": model["max_sequence_length"], "clean_up_tokenization_spaces": False} | config | wanted
        files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return tokenizer, files


def check_loads(folder, config, tokenizer):
    """Load config and tokenizer as a server does; SystemExit when a setting or a token id is not what was written or given."""
    added = "".join(token.content for token in tokenizer.get_added_tokens_decoder().values())
    texts = (*SAMPLES, PROMPT, added, "".join(SAMPLES))
    told = json.dumps([list(config), texts])
    done = subprocess.run([sys.executable, "-c", RELOAD, folder], input=told, capture_output=True, text=True)
    if done.returncode:
        fail(f"{folder} does not load: {done.stderr.strip().splitlines()[-1]}; this version of transformers cannot take the model")
    values, eos, reloaded = json.loads(done.stdout)
    if "rope_theta" in config:
        thetas = {value for name, value in flatten(values["rope_parameters"]) if name.rpartition(".")[2] == "rope_theta"}
        values["rope_theta"] = thetas.pop() if len(thetas) == 1 else thetas
    for key, value in values.items():
        wanted = config[key.removeprefix("generation ")]
        if value != wanted:
            fail(f"{folder} reads back with {key} {value!r} instead of {wanted!r}; this version of transformers cannot take the model")
    for text, ids in zip(texts, reloaded, strict=True):
        if ids != tokenizer.encode(text).ids:
            fail(f"{folder} reloads with other token ids than tokenizer.json gives for {text[:40]!r}; please report this tokenizer")
    if eos != config["eos_token_id"]:
        fail(f"{folder} reloads with eos id {eos}, not {config['eos_token_id']}; correct special_tokens_map.json")


def dtypes_of(parts, tensors, wanted):
    """Return {tensor of the checkpoint: torch dtype in which it is written}; `wanted`: "keep", or torch's word for one."""
    import torch

    return {part.source: getattr(torch, tensors[part.source].dtype if wanted == "keep" else wanted) for part in parts}


def quiet():
    """Keep libraries offline, on the CPU, and from speaking about themselves."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # all that is loaded lies in the folder; all sums are the CPU's
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def peak():
    """Return the largest memory that this process has held, mapped pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_packages(needed, compared=()):
    """Leave before anything is written when a package is missing that is used only at the end; `compared`: only in the comparison."""
    modules = {"pyyaml": "yaml", "ai2-olmo": "olmo", "ai2-olmo-core": "olmo_core"}
    for package in ("pyyaml", "tqdm", "torch", "tokenizers", "transformers", "accelerate", *needed, *compared):
        if not importlib.util.find_spec(modules.get(package, package)):
            remedy = ", or compare nothing: --skip-validation" if package in compared else ""
            fail(f"package {package} is missing in {sys.prefix}; install it{remedy}")


def free_memory():
    """Return the bytes that can be had without swapping, and below the limit of `ulimit -d`; no limit where Linux does not say."""
    kilobytes = {}
    for path in ("/proc/meminfo", "/proc/self/status"):
        with contextlib.suppress(OSError):
            kilobytes |= re.findall(r"(\w+):\s+(\d+) kB", Path(path).read_text())
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    own = math.inf if limit == resource.RLIM_INFINITY else limit - 1024 * int(kilobytes.get("VmData", 0))
    return min(own, 1024 * int(kilobytes.get("MemAvailable", 2**60)))


def must_stream(parts):
    """Return whether both models, in float32, are more than is free and must be compared layer by layer; SystemExit if that is as well."""
    layers, free = Counter(), free_memory()
    for part in parts:
        layers[layer[0] if (layer := LAYER.match(part.target)) else ""] += count(part)
    more = 400_000_000 + 24 * ROW * max(part.stop for part in parts)  # the packages' code, and the logits of a row several times
    needed = more + 8 * (layers.pop("", 0) + max(layers.values(), default=0))
    if needed > free:
        words = f"needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        fail(f"the comparison of the logits {words}; --skip-validation leaves it out")
    return more + 8 * sum(map(count, parts)) > free


def fill(model, read, streamed):
    """Give an empty model its weights by read(name), tied ones by their first name. `streamed`: those of a layer only while it computes."""
    weights, firsts, layers = dict(model.named_parameters(remove_duplicate=False)), {}, {}
    for name, weight in weights.items():
        firsts.setdefault(weight, name)
        layer = LAYER.match(name) if streamed else None
        layers.setdefault(layer[0] if layer else "", []).append(name)
    early = layers.pop("", [])
    found = {weight: read(name) for weight, name in firsts.items() if name in early}
    model.load_state_dict({name: found[weights[name]] for name in early}, strict=False, assign=True)
    for layer, names in layers.items():
        module = model.get_submodule(layer)
        inner = {name.removeprefix(f"{layer}."): name for name in names}

        def take(module, inputs, inner=inner):
            module.load_state_dict({short: read(name) for short, name in inner.items()}, strict=False, assign=True)

        def drop(module, inputs, output, inner=inner):
            module.load_state_dict({short: weights[name] for short, name in inner.items()}, strict=False, assign=True)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(drop)
    return model.eval()


def load_native(config_path, folder, read, streamed=False):
    """Return the training package's own model in float32, with the weights that read(name) gives, and its call: ids -> logits.

    The call gives the last 512 positions, as transformers' logits_to_keep does. `folder`: what load_named() takes, unused here.
    """
    if config_path.suffix == ".json":
        from olmo_core.nn.transformer import TransformerConfig

        def plain(node):  # the arithmetic, without the kernels of GPUs
            if not isinstance(node, dict):
                return {"fused_rms": "rms"}.get(node, node) if isinstance(node, str) else node
            node = {key: plain(value) for key, value in node.items() if key not in ("backend", "use_flash")}
            return node | ({"backend": "torch"} if "n_heads" in node else {})

        try:
            settings = plain(json.loads(config_path.read_text(encoding="utf-8"))["model"])
            model = TransformerConfig.from_dict(settings).build(init_device="meta")
        except Exception as error:
            fail(f"{config_path}: olmo-core does not take it: {' '.join(str(error).split())}")
        return fill(model, read, streamed), functools.partial(model, logits_to_keep=ROW)
    from olmo.config import ModelConfig
    from olmo.exceptions import OLMoError
    from olmo.model import OLMo

    try:
        config = ModelConfig.load(config_path, key="model")
    except OLMoError as error:
        fail(f"{config_path}: ai2-olmo does not take it: {' '.join(str(error).split())}")
    config.init_device, config.flash_attention = "meta", False
    model = fill(OLMo(config, init_params=False), read, streamed)
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: output[:, -ROW:])
    return model, lambda ids: model(ids).logits


def load_hf(folder, streamed=False, read=None):
    """Return a folder's model in float32, as transformers reads it, or with the weights that read(name) gives; the files are checked."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if streamed or read:
        with init_empty_weights(include_buffers=False):  # the frequencies of rotary embeddings are in no file
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        model.tie_weights()
        stored = {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in read_safetensors(path).items()}
        wanted = dict(model.named_parameters()).keys()
        notes = {"missing_keys": wanted - stored.keys(), "unexpected_keys": stored.keys() - wanted}
        fill(model, read or (lambda name: stored[name].rows().float()), streamed) if not any(notes.values()) else None
    else:
        model, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key, names in notes.items():
        if names:
            fail(f"{folder} reads back with {key.replace('_', ' ')}: {sorted(map(str, names))[0]}; please report this checkpoint")
    return model.eval()


def load_named(folder, read, streamed=False):
    """Return transformers' own model with the checkpoint's weights, and its call: for families of which no other package has a model."""
    model = load_hf(folder, streamed, read)
    return model, lambda ids: model(ids, logits_to_keep=ROW).logits


def rows_to_compare(tokenizer, rows, length):
    """Return tensors (1, tokens) of ids: two of text, two random, and one of `length`, the longest that the model takes."""
    import torch

    short = min(ROW, length)
    text = torch.tensor(tokenizer.encode("\n".join(SAMPLES)).ids)
    text = text.repeat(2 * short // len(text) + 1)[: 2 * short]
    wanted, generator = 2 * short + length, torch.Generator().manual_seed(0)
    orders = [torch.randperm(rows, generator=generator) for _ in range(wanted // rows + 1)]  # each id comes before any comes twice
    random = torch.cat(orders)[:wanted]
    return [*text.view(2, 1, short), *random[: 2 * short].view(2, 1, short), random[2 * short :].view(1, length)]


def greedy(model, ids, number):
    """Return the `number` ids that follow `ids` (1, tokens) greedily, stop tokens included."""
    found, cache = [], None
    for _ in range(number):
        answer = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = answer.logits[:, -1].argmax(-1, keepdim=True), answer.past_key_values
        found.append(ids.item())
    return found


def departures(native, call, model, parts, ids):
    """Return [(name of a Hugging Face module, max |Δ| of its output, largest |output|)] in the order of computation."""
    import torch

    outputs, parts = {}, [part for part in parts if part.target.endswith(".weight")]

    def record(module, name):
        def hook(module, inputs, output):
            outputs[name] = output.clone()  # clip_qkv changes it in place

        return module.register_forward_hook(hook)

    hooks = [record(model.get_submodule(part.target.removesuffix(".weight")), part.target) for part in parts]
    hooks += [record(native.get_submodule(part.source.removesuffix(".weight")), part.source) for part in parts]
    model(ids, logits_to_keep=ROW)
    call(ids)
    for hook in hooks:
        hook.remove()
    by_name, found = {part.target: part for part in parts}, []
    for part in (by_name[name] for name in outputs if name in by_name):
        wanted = outputs[part.source]
        ours = outputs[part.target][:, -wanted.shape[1] :]
        if not isinstance(model.get_submodule(part.target.removesuffix(".weight")), torch.nn.Embedding):
            wanted, ours = wanted[..., part.start : part.stop], ours[..., : part.shape[0] - part.start]
        found.append((part.target.removesuffix(".weight"), (wanted - ours).abs().max().item(), wanted.abs().max().item()))
    return found


def compare(native, call, model, parts, tokenizer, where, number=32):
    """Compare the logits of both models, in float32, and return the figures; SystemExit names the first layer that departs.

    Rows: text, random ids, the longest row that the model takes (its last 512 positions), and a prompt with `number` greedy tokens.
    `greedy` in the figures is what prove_serving.py asks the server for again: those tokens, and the log-probabilities of a text.
    """
    import torch
    from tqdm import tqdm

    vocabulary, length = min(parts[0].stop, parts[0].shape[0]), model.config.max_position_embeddings
    prompt = (tokenizer.encode(PROMPT).ids or [model.config.eos_token_id])[: max(1, length - number)]
    with torch.inference_mode():
        ids = greedy(model, torch.tensor([prompt]), min(number, length - len(prompt)))
        rows = [*rows_to_compare(tokenizer, vocabulary, length), torch.tensor([prompt + ids])]
        text = rows[0][:, : min(256, length - 1)]  # a server wants room for one token more
        logprobs = model(text).logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
        differences, largest, agreed, positions = [], 0.0, 0, 0
        for row in tqdm(rows, desc="comparing", disable=not sys.stderr.isatty()):
            wanted, found = call(row)[..., :vocabulary], model(row, logits_to_keep=ROW).logits
            differences.append((wanted - found[..., :vocabulary]).abs().max())
            largest = max(largest, wanted.abs().max().item())
            agreed += (wanted.argmax(-1) == found.argmax(-1)).sum().item()  # no row that pads the vocabulary may win
            positions += wanted.shape[1]
        ours, theirs = model.get_input_embeddings().weight, native.get_parameter(parts[0].source)
        embeddings = torch.equal(ours[:vocabulary], theirs[:vocabulary])
        difference, bound = torch.stack(differences).max().item(), BOUND * largest
        passed = difference <= bound and embeddings
        row = rows[-1] if passed else rows[torch.stack(differences).argmax()]
        layers = {name: delta for name, delta, size in departures(native, call, model, parts, row) if passed or not delta <= BOUND * size}
        if not passed:
            first = next(iter(layers), "lm_head") if embeddings else "model.embed_tokens"
            fail(
                f"{where}: its logits are not the checkpoint's: max |Δ| {difference:.3g} (bound {bound:.3g}), argmax equal at "
                f"{agreed / positions:.1%} of {positions} positions, first departure at {first}; nothing is kept, please report it"
            )
    figures = {"max_abs_logit_difference": difference, "bound": bound, "largest_logit": largest, "argmax_agreement": agreed / positions}
    proof = {"prompt": PROMPT, "prompt_ids": prompt, "ids": ids, "text_ids": text[0].tolist(), "text_logprobs": logprobs.tolist()}
    figures |= {"positions": positions, "longest_row": length, "greedy": proof, "layers": layers}
    return figures


def prove(load, read, folder, streamed, parts, tokenizer):
    """Load the native model by load(folder, read, streamed), and the folder's; compare them, and return the figures."""
    native, call = load(folder, read, streamed)
    number = 4 if streamed else 32  # each token is one more reading of a streamed model
    return compare(native, call, load_hf(folder, streamed), parts, tokenizer, folder, number) | {"layer_by_layer": streamed}


def model_card(config, settings, digests, counts, figures):
    """Return README.md: where the model comes from, its shape, and how far it agrees with the checkpoint."""
    parity = "The logits were not compared with those of the package that trained the model."
    if figures:
        parity = (
            f"Logits of this folder, read back by transformers, against those of {settings['package']}'s own model with the same "
            f"weights, both in float32 on a CPU: max |Δ| = {figures['max_abs_logit_difference']:g} over {figures['positions']} positions "
            f"in rows of up to {figures['longest_row']} tokens; argmax equal at {figures['argmax_agreement']:.2%}."
        )
    shape = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    shape += ("max_position_embeddings", "rope_theta", "tie_word_embeddings", "eos_token_id", "pad_token_id", "dtype")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {settings['name']}", ""]
    lines += [f"{config['architectures'][0]}, {counts['parameters']:,} parameters, converted from the {settings['package']} checkpoint"]
    lines += [f"`{settings['checkpoint']}` (weights: SHA-256 {', '.join(f'`{digest}`' for digest in digests)})"]
    lines += [f"with `--dtype {settings['dtype']} --vocab {settings['vocab']}`."]
    lines += ["", parity, "", "| setting | value |", "|---|---|", *(f"| {key} | {config[key]} |" for key in shape if key in config)]
    return "\n".join([*lines, ""])


@contextlib.contextmanager
def unverified(output):
    """Yield the hidden folder in which the model is built; its files move up when the block ends well, config.json last.

    A refusal deletes it. A killed run leaves it, with whole shards, to the next run of the same settings.
    """
    folder = output / ".unverified"
    folder.mkdir(exist_ok=True)
    for path in [path for path in output.iterdir() if not path.name.startswith(".")]:
        os.replace(path, folder / path.name)  # killed while moving up
    try:
        yield folder
    except SystemExit:
        shutil.rmtree(folder)
        (output / ".begun.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else
            output.rmdir()
        raise
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        os.replace(path, output / path.name)
    folder.rmdir()


def build_parser():
    parser = argparse.ArgumentParser(
        prog="convert_olmo_to_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="checkpoint folder, or a run's folder of such folders (stepN…)")
    parser.add_argument("--tokenizer", metavar="DIR_OR_FILE", help="tokenizer.json, or the folder that holds it (with --reverse: INPUT)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the Hugging Face model")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    parser.add_argument("--step", type=step, default="latest", help="step to take of a run's folder (default: latest)")
    parser.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="keep", help="of the written weights (default: keep)")
    parser.add_argument("--max-shard-size", type=size, default="4GB", metavar="SIZE", help="largest file of weights (default: 4GB)")
    words = "trim: drop the rows that only pad the vocabulary; pad:N: make it a multiple of N (default: keep)"
    parser.add_argument("--vocab", type=vocab, default="keep", metavar="keep|trim|pad:N", help=words)
    parser.add_argument("--map", metavar="FILE.yaml", help="INPUT is a torch file whose tensors this map names (recipes/maps/)")
    words = "from a Hugging Face folder (olmo2, olmo3) to an olmo-core checkpoint"
    parser.add_argument("--reverse", action=argparse.BooleanOptionalAction, default=False, help=words)
    parser.add_argument("--skip-validation", action=argparse.BooleanOptionalAction, default=False, help="do not compare the logits")
    parser.add_argument("--overwrite", action="store_true", help="put another run's output aside and convert anew")
    return parser


def named(config, tensors):
    """Return what a Source's read() does, for tensors that have Hugging Face's names."""
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    config |= {"eos_token_id": eos, "pad_token_id": eos if config.get("pad_token_id") is None else config["pad_token_id"]}
    length = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), ROW)
    parts = [Part(name, name, 0, tensor.shape[0], tensor.shape) for name, tensor in tensors.items()]
    return config, config | {"max_sequence_length": length}, parts, tensors


def mapped_source(args):
    """Return the Source of a torch file and a map of names."""
    weights, rules = Path(args.input), Path(args.map)
    if not weights.is_file():
        fail(f"{weights}: no such file; with --map, --input is the torch file itself")
    beside = [path for path in (weights.parent / "params.json",) if path.is_file()]
    inputs = [weights, *beside, rules]
    return Source(weights.name, "transformers", inputs, [weights], lambda: named(*read_map(rules, weights)), load_named)


def deepspeed_source(folder):
    """Return the Source of a checkpoint of DeepSpeed's ZeRO, with the config.json that the Trainer saves beside it."""
    files = sorted(folder.glob("*/*_states.pt"))
    if not files or not (folder / "config.json").is_file():
        fail(f"{folder}: {'config.json is' if files else 'the files *_states.pt of DeepSpeed are'} missing; copy the checkpoint again")
    check_packages(["deepspeed"])
    inputs = [folder / "config.json", *files]
    return Source(folder.name, "transformers", inputs, files, lambda: named(*read_deepspeed(folder)), load_named)


def olmo_source(args):
    """Return the Source of a checkpoint of ai2-olmo or olmo-core."""
    checkpoint = find_checkpoint(Path(args.input), args.step)
    weights, config_path = weights_of(checkpoint), config_of(checkpoint)
    tensors, files = read_tensors(weights), list(files_of(weights))

    def read():
        model = read_settings(config_path)
        parts = plan_tensors(model, args.vocab)
        check_tensors(parts, tensors, weights, config_path.name)
        return hf_config(model, parts[0].stop), model, parts, tensors

    package = "ai2-olmo-core" if config_path.suffix == ".json" else "ai2-olmo"
    return Source(checkpoint.name, package, [config_path, *files], files, read, functools.partial(load_native, config_path))


def weights_by(tensors, dtypes):
    """Return name -> that tensor in float32, rounded as it is written."""
    return lambda name: tensors[name].rows().to(dtypes[name]).float()


def verdict(figures):
    return f"max |Δlogit| {figures['max_abs_logit_difference']:g}" if figures else "logits not compared"


def convert(args, source):
    """Write the Hugging Face folder of a Source, prove the logits, and give the manifest's figures."""
    tokenizer_files = tokenizer_paths(Path(args.tokenizer))
    check_packages([], [] if args.skip_validation else [source.package])
    run = Run("convert", args, [*source.inputs, *tokenizer_files])
    with unverified(run.output) as folder:
        quiet()
        start, figures = time.time(), {}
        config, settings, parts, tensors = source.read()
        tokenizer, own = read_tokenizer(tokenizer_files, settings, config["vocab_size"])
        streamed = not args.skip_validation and must_stream(parts)
        hashing = threading.Thread(target=lambda: list(map(run.sha256, source.weights)), daemon=True)  # beside the writing: the same pages
        hashing.start()
        dtypes = dtypes_of(parts, tensors, args.dtype)
        digests, counts = write_model(folder, parts, tensors, dtypes, args.max_shard_size)
        hashing.join()
        metrics = {"writing": {"seconds": round(time.time() - start, 3), "peak_rss_bytes": peak()}}
        word = dtype_name(Counter(dtypes.values()).most_common(1)[0][0])
        config |= {"dtype": word, "torch_dtype": word}
        write_settings(folder, config, own)
        check_loads(folder, config, tokenizer)
        if not args.skip_validation:
            figures = prove(source.native, weights_by(tensors, dtypes), folder, streamed, parts, tokenizer)
        words = {"name": Path(args.output).resolve().name, "checkpoint": source.name, "dtype": args.dtype, "package": source.package}
        words |= {"vocab": args.vocab if isinstance(args.vocab, str) else f"pad:{args.vocab}"}
        with write_atomic(folder / "README.md", "w") as file:
            file.write(model_card(config, words, map(run.sha256, source.weights), counts, figures))
    run.digests |= {str(run.output / name): digest for name, digest in digests.items()}
    shards = f"{counts['shards']} shard{'s' if counts['shards'] > 1 else ''}"
    run.finish(f"{verdict(figures)}, {shards} of {source.name}", counts, metrics | figures)


def reverse(args):
    """Write an olmo-core checkpoint from a Hugging Face folder, prove the logits, and give the manifest's figures."""
    source = Path(args.input)
    files = sorted(source.glob("model*.safetensors"))
    if not files or not (source / "config.json").is_file():
        fail(f"{source}: no Hugging Face folder (config.json, model*.safetensors); without --reverse the script reads OLMo checkpoints")
    check_packages(["ai2-olmo-core"])
    tensors = {name: tensor for path in files for name, tensor in read_tensors(path).items()}
    tokenizer_files = tokenizer_paths(Path(args.tokenizer or args.input))
    run = Run("convert", args, [source / "config.json", *files, *tokenizer_files])
    with unverified(run.output) as folder:
        quiet()
        from tokenizers import Tokenizer

        tokens = len(Tokenizer.from_file(str(tokenizer_files[0])).get_vocab())
        config = core_config(source / "config.json", tokens)
        model = check_core_settings(config, source / "config.json")
        tokenizer, _ = read_tokenizer(tokenizer_files, model, model["embedding_size"])
        parts = plan_tensors(model)
        check_tensors([Part(part.source, part.target, 0, part.stop, part.shape) for part in parts], tensors, source, "config.json")
        streamed = not args.skip_validation and must_stream(parts)
        start = time.time()
        counts = write_core(folder, parts, tensors)
        metrics = {"writing": {"seconds": round(time.time() - start, 3), "peak_rss_bytes": peak()}}
        write_json(folder / "config.json", config)
        figures = {}
        if not args.skip_validation:
            written = read_tensors(folder / "model_and_optim" / ".metadata")
            native = functools.partial(load_native, folder / "config.json")
            read = weights_by(written, dtypes_of(parts, written, "keep"))
            figures = prove(native, read, source, streamed, parts, tokenizer)
    run.finish(f"{verdict(figures)}, olmo-core checkpoint of {source.name}", counts, metrics | figures)


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if args.reverse:
        if args.map or (args.dtype, args.vocab, args.step, args.max_shard_size) != ("keep", "keep", "latest", size("4GB")):
            parser.error("--reverse takes no --map, --dtype, --vocab, --step or --max-shard-size")
        return reverse(args)
    if not args.tokenizer:
        parser.error("the following arguments are required: --tokenizer")
    if args.map:
        if (args.vocab, args.step) != ("keep", "latest"):
            parser.error("--map takes no --vocab or --step")
        return convert(args, mapped_source(args))
    if folder := find_deepspeed(Path(args.input), args.step):
        if args.vocab != "keep":
            parser.error("a DeepSpeed checkpoint takes no --vocab")
        return convert(args, deepspeed_source(folder))
    convert(args, olmo_source(args))


if __name__ == "__main__":
    run_main(main)
