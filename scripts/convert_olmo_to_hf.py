#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
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
Needs   CPU only, no network. Writing takes some 340 MB of memory whatever the model's size; --reverse 0.8 GB and two of its tensors,
        DeepSpeed's own tool the whole model. The comparison holds the model twice, in float32, or where that is more than is free,
        the embeddings and one layer of each model of the OLMo packages; --skip-validation leaves it out.
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
from pathlib import Path

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's word -> safetensors' word
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
STORAGES = {"Float": "float32", "BFloat16": "bfloat16", "Half": "float16", "Double": "float64", "Long": "int64", "Int": "int32"}
STORAGES |= {"Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}  # the word in torch's pickles -> torch's word
PIECE = 32 * 2**20  # bytes in memory at a time
BOUND = 1e-5  # of the largest |logit|; 0 was seen for every family, another machine's kernels may round otherwise
PADDING = 512  # a vocabulary may be larger than its tokenizer by less than this: padded for speed
ROW = 512  # tokens in a compared row
PROMPT = "The purpose of this document is to"
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159 (or so), isn't it?",
    "def add(a, b):\n    return a + b  # tabs\tand   spaces\n\n",
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。",
    "Ünïcödé: naïve café, Ελληνικά, русский, 日本語, 한국어, עברית, 🙂👩‍👩‍👧‍👦",
    "  leading, trailing and double  spaces  ",
    "https://example.org/a?b=c&d=e#f user@example.org 1,234,567.89 <b>html</b> {json: [1, 2]}",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The settings that decide the arithmetic, with the values that ai2-olmo 0.6.0 takes where an older config.yaml has no such key
MODEL_DEFAULTS = {
    "d_model": 768,
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": None,
    "multi_query_attention": None,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "alibi": False,
    "rope": False,
    "rope_theta": 10_000,
    "clip_qkv": None,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "embedding_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "norm_after": False,
    "include_bias": True,
    "bias_for_layer_norm": None,
    "scale_logits": False,
    "max_sequence_length": 1024,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "weight_tying": True,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
}

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


def hf_config(model, rows, dtype):
    """Return config.json. Rope and dtype stand under their old and new names: transformers 4 reads the one, 5 the other."""
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
        "dtype": dtype,
        "torch_dtype": dtype,
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
    """Yield the rows of a part in tensors of some 32 MB. Rows that the checkpoint lacks become the mean of those that it has.

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
        """Yield rows start:stop in tensors of some 32 MB."""
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


def read_tensors(path):
    """Return {name: Stored} of model.pt, model.safetensors or the .metadata of a sharded checkpoint; no code in the files is run."""
    try:
        reader = {".safetensors": read_safetensors, ".pt": read_torch}.get(path.suffix)
        tensors = reader(path) if reader else read_distributed(path.parent)
    except NO_WEIGHTS as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            fail(f"{path}: it asks for {code[1]} to be run; nothing was run, do not trust this file")
        fail(f"{path}: not a whole file of weights ({' '.join(str(error).split())[:200]}); copy it again or take another step")
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
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            fail(f"{weights}: it asks for {code[1]} to be run; nothing was run, do not trust this file")
        fail(f"{weights}: not what {path} describes ({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct the map")
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
            stored = Made(shape, next(iter(tensors.values())).dtype, lambda shape=shape: torch.zeros(shape))
        elif group == "transposed":
            stored = Made(stored.shape[::-1], stored.dtype, lambda stored=stored: stored.rows().t())
        elif group == "rotary":
            number = heads[re.search(r"([qk])_proj", name)[1]]
            stored = Made(
                stored.shape,
                stored.dtype,
                lambda stored=stored, number=number: stored.rows().unflatten(0, (number, -1, 2)).transpose(1, 2).flatten(0, 2),
            )
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
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            fail(f"{path}: it asks for {code[1]} to be run; nothing was run, do not trust this file")
        fail(f"{path}: not a whole DeepSpeed checkpoint ({' '.join(str(error).split())[:200]}); copy it again or take another step")
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
    """Write one safetensors file in pieces of 32 MB and return its SHA-256; NaN, infinity and overflow end in SystemExit."""
    import torch

    header, offset, digest = {"__metadata__": {"format": "pt"}}, 0, hashlib.sha256()
    for part in parts:
        end = offset + dtypes[part.source].itemsize * count(part)
        word, shape = DTYPES[dtype_name(dtypes[part.source])], [part.stop - part.start, *part.shape[1:]]
        header[part.target] = {"dtype": word, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomic(path) as file:

        def put(data):
            file.write(data)
            digest.update(data)
            bar.update(len(data))

        put(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for piece in pieces(part, tensors[part.source]):
                out = finite(piece, dtypes[part.source], part.source)
                put(out.view(torch.uint8).reshape(-1).numpy())
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
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    loaded, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    rope = getattr(loaded, "rope_parameters", None) if "rope_theta" in config else {"rope_theta": None}
    thetas = {value for name, value in flatten(rope) if name.rpartition(".")[2] == "rope_theta"}
    values = {key: getattr(loaded, key, None) for key in config}
    values |= {"rope_theta": thetas.pop() if len(thetas) == 1 else thetas} if "rope_theta" in config else {}
    values |= {key: dtype_name(values[key]) for key in ("dtype", "torch_dtype")}
    values |= {f"generation {key}": getattr(generation, key) for key in ("eos_token_id", "pad_token_id")}
    for key, value in values.items():
        wanted = config[key.removeprefix("generation ")]
        if value != wanted:
            fail(f"{folder} reads back with {key} {value!r} instead of {wanted!r}; this version of transformers cannot take the model")
    reloaded = AutoTokenizer.from_pretrained(folder)
    added = "".join(token.content for token in tokenizer.get_added_tokens_decoder().values())
    for text in (*SAMPLES, PROMPT, added, "".join(SAMPLES)):
        ids = tokenizer.encode(text).ids
        if reloaded(text)["input_ids"] != ids:
            fail(f"{folder} reloads with other token ids than tokenizer.json gives for {text[:40]!r}; please report this tokenizer")
    if reloaded.eos_token_id != config["eos_token_id"]:
        fail(f"{folder} reloads with eos id {reloaded.eos_token_id}, not {config['eos_token_id']}; correct special_tokens_map.json")


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


def check_packages(native):
    """Leave before anything is written when a package is missing that is needed only at the end; `native`: what trained the model."""
    packages = {"yaml": "pyyaml", "tqdm": "tqdm", "torch": "torch", "tokenizers": "tokenizers", "transformers": "transformers"}
    for module, package in (packages | native).items():
        if not importlib.util.find_spec(module):
            remedy = ", or compare nothing: --skip-validation" if module in native else ""
            fail(f"package {package} is missing in {sys.prefix}; install it{remedy}")


def check_memory(needed):
    """Leave before anything is written when the comparison needs more memory than is free."""
    if needed > free_memory():
        needed, free = (f"{number / 1e9:.1f} GB" for number in (needed, free_memory()))
        fail(f"the comparison of the logits needs {needed} of memory and {free} are free; --skip-validation leaves it out")


def free_memory():
    """Return the bytes that can be had without swapping; without limit where Linux does not say."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return math.inf


def must_stream(parts):
    """Return whether both models are too large for this machine in float32, and must be compared layer by layer."""
    layers = Counter()
    for part in parts:
        layers[".".join(part.target.split(".")[:3]) if part.target.startswith("model.layers.") else ""] += count(part)
    check_memory(8 * (layers.pop("") + max(layers.values())))
    return 8 * sum(map(count, parts)) > free_memory()


def fill(model, layers, read, streamed):
    """Give an empty model its weights by read(name). `streamed`: those of each of `layers`, a name with "{}", only while it computes."""
    import torch

    state = {name: weight for name, weight in model.state_dict().items() if isinstance(weight, torch.Tensor)}
    inner = {}
    if streamed:
        for name in state:
            if match := re.match(re.escape(layers).replace(r"\{\}", r"\d+"), name):
                inner.setdefault(match[0], []).append(name[match.end() + 1 :])
    late = {f"{layer}.{name}" for layer, names in inner.items() for name in names}
    model.load_state_dict({name: read(name) for name in state if name not in late}, strict=False, assign=True)
    for layer, names in inner.items():
        module = model.get_submodule(layer)
        empty = {name: state[f"{layer}.{name}"] for name in names}

        def take(module, inputs, layer=layer, names=names):
            module.load_state_dict({name: read(f"{layer}.{name}") for name in names}, assign=True)

        def drop(module, inputs, output, empty=empty):
            module.load_state_dict(empty, assign=True)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(drop)
    return model.eval()


def load_native(config_path, tensors, dtypes, streamed=False):
    """Return the training package's own model in float32, its weights rounded as they were written, and its call: ids -> logits.

    The call gives the last 512 positions, as transformers' logits_to_keep does.
    """

    def read(name):
        name = name if name in dtypes else {head: embedding for embedding, head in TIED.items()}[name]
        return tensors[name].rows().to(dtypes[name]).float()

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
        fill(model, "blocks.{}", read, streamed)
        return model, functools.partial(model, logits_to_keep=ROW)
    from olmo.config import ModelConfig
    from olmo.exceptions import OLMoError
    from olmo.model import OLMo

    try:
        config = ModelConfig.load(config_path, key="model")
    except OLMoError as error:
        fail(f"{config_path}: ai2-olmo does not take it: {' '.join(str(error).split())}")
    config.init_device, config.flash_attention = "meta", False
    model = fill(OLMo(config, init_params=False), "transformer.blocks.{}", read, streamed)
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: output[:, -ROW:])
    return model, lambda ids: model(ids).logits


def load_hf(folder, streamed=False):
    """Return the written model in float32, as transformers reads it; SystemExit when it misses weights or has too many."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if streamed:
        stored = {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in read_safetensors(path).items()}
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no file
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        wanted = model.state_dict().keys() - tied
        notes = {"missing_keys": wanted - stored.keys(), "unexpected_keys": stored.keys() - wanted}
    else:
        model, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key, names in notes.items():
        if names:
            fail(f"{folder} reads back with {key.replace('_', ' ')}: {sorted(map(str, names))[0]}; please report this checkpoint")
    if streamed:
        fill(model, "model.layers.{}", lambda name: stored["model.embed_tokens.weight" if name in tied else name].rows().float(), True)
    return model.eval()


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
    import torch

    start = ids.shape[1]
    for _ in range(number):
        ids = torch.cat([ids, model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, start:].tolist()


def departures(native, call, model, parts, ids):
    """Return [(name of a Hugging Face module, max |Δ| of its output, largest |output|)] in the order of computation."""
    import torch

    outputs = {}

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


def compare(native, call, model, parts, tokenizer, where):
    """Compare the logits of both models, in float32, and return the figures; SystemExit names the first layer that departs.

    Rows: text, random ids, the longest row that the model takes (its last 512 positions), and a prompt with 16 greedy tokens.
    `greedy` in the figures is what prove_serving.py asks the server for again: those tokens, and the log-probabilities of a text.
    """
    import torch
    from tqdm import tqdm

    vocabulary, length = min(parts[0].stop, parts[0].shape[0]), model.config.max_position_embeddings
    prompt = (tokenizer.encode(PROMPT).ids or [model.config.eos_token_id])[: max(1, length - 16)]
    with torch.inference_mode():
        ids = greedy(model, torch.tensor([prompt]), min(16, length - len(prompt)))
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


def prove(config_path, tensors, dtype, folder, streamed, parts, tokenizer):
    """Load both models, compare them, and return the figures."""
    native, call = load_native(config_path, tensors, dtypes_of(parts, tensors, dtype), streamed)
    return compare(native, call, load_hf(folder, streamed), parts, tokenizer, folder) | {"layer_by_layer": streamed}


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
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
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


def convert_named(args, inputs, read, source):
    """Write a Hugging Face folder from read() -> (config.json, tensors under Hugging Face's names), and give the manifest's figures.

    No package but transformers has a native model of them: its logits with the tensors as they were read are compared with the folder's.
    """
    import torch

    tokenizer_files = tokenizer_paths(Path(args.tokenizer))
    run = Run("convert", args, [*inputs, *tokenizer_files])
    with unverified(run.output) as folder:
        quiet()
        from transformers import AutoConfig, AutoModelForCausalLM

        config, tensors = read()
        parts = [Part(name, name, 0, tensor.shape[0], tensor.shape) for name, tensor in tensors.items()]
        dtypes = dtypes_of(parts, tensors, args.dtype)
        word = dtype_name(Counter(dtypes.values()).most_common(1)[0][0])
        eos = config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) else eos
        pad = eos if config.get("pad_token_id") is None else config["pad_token_id"]
        config |= {"dtype": word, "torch_dtype": word, "eos_token_id": eos, "pad_token_id": pad}
        length = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), ROW)
        tokenizer, own = read_tokenizer(tokenizer_files, config | {"max_sequence_length": length}, config["vocab_size"])
        if not args.skip_validation:
            check_memory(8 * sum(map(count, parts)))
        start = time.time()
        digests, counts = write_model(folder, parts, tensors, dtypes, args.max_shard_size)
        metrics = {"writing": {"seconds": round(time.time() - start, 3), "peak_rss_bytes": peak()}}
        write_settings(folder, config, own)
        check_loads(folder, config, tokenizer)
        figures = {}
        if not args.skip_validation:
            with torch.device("meta"):
                native = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
            native = native.to_empty(device="cpu")
            native.tie_weights()
            written = load_hf(folder)
            for name, buffer in written.named_buffers():
                native.get_buffer(name).copy_(buffer)
            with torch.no_grad():
                for name, weight in native.named_parameters():
                    weight.copy_(tensors[name].rows().to(dtypes[name]))
            modules = [part for part in parts if part.target.endswith(".weight")]
            call = functools.partial(native.eval(), logits_to_keep=ROW)
            figures = compare(native, lambda ids: call(ids).logits, written, modules, tokenizer, folder)
        settings = {"name": Path(args.output).resolve().name, "checkpoint": source, "dtype": args.dtype, "package": "transformers"}
        with write_atomic(folder / "README.md", "w") as file:
            digest = [run.sha256(path) for path in inputs if path.suffix in (".pt", ".pth")]
            file.write(model_card(config, settings | {"vocab": "keep"}, digest, counts, figures))
    run.digests |= {str(run.output / name): digest for name, digest in digests.items()}
    parity = f"max |Δlogit| {figures['max_abs_logit_difference']:g}" if figures else "logits not compared"
    run.finish(f"{parity}, {counts['shards']} shard{'s' if counts['shards'] > 1 else ''} of {source}", counts, metrics | figures)


def convert_mapped(args):
    """Convert a torch file by a map of names."""
    weights = Path(args.input)
    if not weights.is_file():
        fail(f"{weights}: no such file; with --map, --input is the torch file itself")
    check_packages({})
    beside = [path for path in (weights.parent / "params.json",) if path.is_file()]
    convert_named(args, [weights, *beside, Path(args.map)], lambda: read_map(Path(args.map), weights), weights.name)


def convert_deepspeed(args, folder):
    """Convert a checkpoint of DeepSpeed's ZeRO, with the config.json that the Trainer saves beside it."""
    check_packages({"deepspeed": "deepspeed"})
    files = sorted(folder.glob("*/*_states.pt"))
    if not files or not (folder / "config.json").is_file():
        fail(f"{folder}: {'config.json is' if files else 'the files *_states.pt of DeepSpeed are'} missing; copy the checkpoint again")
    convert_named(args, [folder / "config.json", *files], lambda: read_deepspeed(folder), folder.name)


def reverse(args):
    """Write an olmo-core checkpoint from a Hugging Face folder, prove the logits, and give the manifest's figures."""
    source = Path(args.input)
    files = sorted(source.glob("model*.safetensors"))
    if not files or not (source / "config.json").is_file():
        fail(f"{source}: no Hugging Face folder (config.json, model*.safetensors); without --reverse the script reads OLMo checkpoints")
    check_packages({"olmo_core": "ai2-olmo-core"})
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
            figures = prove(folder / "config.json", written, "keep", source, streamed, parts, tokenizer)
    parity = f"max |Δlogit| {figures['max_abs_logit_difference']:g}" if figures else "logits not compared"
    run.finish(f"{parity}, olmo-core checkpoint of {source.name}", counts, metrics | figures)


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
        return convert_mapped(args)
    if folder := find_deepspeed(Path(args.input), args.step):
        if args.vocab != "keep":
            parser.error("a DeepSpeed checkpoint takes no --vocab")
        return convert_deepspeed(args, folder)
    checkpoint = find_checkpoint(Path(args.input), args.step)
    weights, config_path, tokenizer_files = weights_of(checkpoint), config_of(checkpoint), tokenizer_paths(Path(args.tokenizer))
    module, package = ("olmo_core", "ai2-olmo-core") if config_path.suffix == ".json" else ("olmo", "ai2-olmo")
    check_packages({} if args.skip_validation else {module: package})
    tensors = read_tensors(weights)
    files = list(files_of(weights))
    run = Run("convert", args, [config_path, *files, *tokenizer_files])
    with unverified(run.output) as folder:
        quiet()
        start = time.time()
        model = read_settings(config_path)
        parts = plan_tensors(model, args.vocab)
        rows = parts[0].stop
        tokenizer, own = read_tokenizer(tokenizer_files, model, rows)
        hashing = threading.Thread(target=lambda: list(map(run.sha256, files)), daemon=True)  # beside the writing: the same pages
        check_tensors(parts, tensors, weights, config_path.name)
        streamed = not args.skip_validation and must_stream(parts)
        hashing.start()
        dtypes = dtypes_of(parts, tensors, args.dtype)
        digests, counts = write_model(folder, parts, tensors, dtypes, args.max_shard_size)
        hashing.join()
        metrics = {"writing": {"seconds": round(time.time() - start, 3), "peak_rss_bytes": peak()}}
        config = hf_config(model, rows, dtype_name(Counter(dtypes.values()).most_common(1)[0][0]))
        write_settings(folder, config, own)
        check_loads(folder, config, tokenizer)
        figures = {}
        if not args.skip_validation:
            figures = prove(config_path, tensors, args.dtype, folder, streamed, parts, tokenizer)
        settings = {"name": Path(args.output).resolve().name, "checkpoint": checkpoint.name, "dtype": args.dtype, "package": package}
        settings |= {"vocab": args.vocab if isinstance(args.vocab, str) else f"pad:{args.vocab}"}
        with write_atomic(folder / "README.md", "w") as file:
            file.write(model_card(config, settings, map(run.sha256, files), counts, figures))
    run.digests |= {str(run.output / name): digest for name, digest in digests.items()}
    parity = f"max |Δlogit| {figures['max_abs_logit_difference']:g}" if figures else "logits not compared"
    shards = f"{counts['shards']} shard{'s' if counts['shards'] > 1 else ''}"
    run.finish(f"{parity}, {shards} of {checkpoint.name}", counts, metrics | figures)


if __name__ == "__main__":
    run_main(main)
