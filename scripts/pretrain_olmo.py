#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ai2-olmo==0.6.0", "ai2-olmo-core==3.0.0", "matplotlib>=3.9", "numpy>=1.26", "pyyaml>=6", "tokenizers>=0.21", "torch>=2.6",
#     "torchmetrics>=1.4", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""Pretrain an OLMo from token memory maps with ai2-olmo or olmo-core; a stopped run goes on exactly.

Usage:
    python scripts/pretrain_olmo.py --config recipes/demo/pretrain.yaml --input TOKENS --tokenizer TOKENIZER --output /tmp/model
    make pretrain RECIPE=olmo2-1b
    python scripts/pretrain_olmo.py --config recipes/olmo2-1b/pretrain.yaml --input WEB BOOKS --weights 0.7 0.3 --dry-run …
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/pretrain_olmo.py …
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python scripts/pretrain_olmo.py …

Reads   folders of tokenize_corpus.py (tokens.json, *.npy, *.csv.gz) and the tokenizer that wrote them; several folders are a mixture.
Writes  checkpoints, the newest --keep of them: OUTPUT/stepN-unsharded (ai2-olmo) or OUTPUT/stepN (olmo-core); OUTPUT/metrics.jsonl: a
        row for each step and each evaluation, at the end metrics.csv and loss.png too; OUTPUT/samples.jsonl: continuations of held-out
        text; at a loss that jumps, suspects.jsonl: the documents of its batch; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or the loss became NaN or jumped; 2 bad usage; 3 refused, OUTPUT holds another run; 143 stopped
        by a signal, with a checkpoint.
Needs   CPU or CUDA GPUs, no network; ai2-olmo with the patches of patches/ai2-olmo. Memory: 16 bytes a parameter, and activations;
        --dry-run computes it. Several nodes share OUTPUT.

Started again with the same settings, a run goes on from its newest whole checkpoint; in one process its weights are then those of an
undisturbed run, bit for bit. The number of processes may change, within rounding. Both engines take the same sequences in each step.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

STAGE = "pretrain_olmo"
# OLMo 1 and 2 as published: the order and kind of norms is all that differs in the block
ARCHITECTURES = {
    "olmo1": {"layer_norm_type": "default", "layer_norm_with_affine": False},
    "olmo2": {"layer_norm_type": "rms", "layer_norm_eps": 1e-6, "norm_after": True, "attention_layer_norm": True},
}
CHECKPOINTS = {"olmo": "-unsharded", "olmo-core": ""}  # what follows stepN
PROMPT, SAMPLE = 24, 48  # tokens of held-out text that are continued, and of the continuation
RECENT = 8  # steps; a loss is compared with the lowest mean of so many


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
# >>> snippet: token_batches
PATTERN = 10_000  # places of a mixture in which each source has its share
COLUMNS = ("step", "tokens", "loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "held_out_loss", "bits_per_byte")
# Dense bf16 TFLOP/s and GB of the makers' data sheets; the first name that is part of the device's counts
GPUS = {"B200": (2250, 180), "H200": (989, 141), "H100": (989, 80), "H800": (989, 80), "H20": (148, 96), "GH200": (989, 96)}
GPUS |= {"A100-SXM4-40GB": (312, 40), "A100": (312, 80), "A800": (312, 80), "L40S": (362, 48), "A40": (150, 48), "L4": (121, 24)}
GPUS |= {"RTX 5090": (210, 32), "RTX 4090": (165, 24), "RTX 3090": (71, 24), "A10": (125, 24)}


def read_tokens(folder, tokenizer):
    """Return tokens.json of a folder, its files checked for their size and its ids for having come from `tokenizer`; SystemExit if not."""
    path = Path(folder, "tokens.json")
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))
        parts = [tokens["train"], *tokens["held_out"].values()]
        expected = {path.with_name(part["file"]): part["tokens"] * np.dtype(tokens["dtype"]).itemsize for part in parts}
        with open(Path(tokenizer, "tokenizer.json"), "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == tokens["tokenizer_sha256"]
    except OSError as error:
        raise SystemExit(f"{STAGE}: {error.filename}: {error.strerror}; --input and --tokenizer want the folders of those stages") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{STAGE}: {path}: not written by tokenize_corpus.py ({error!r}); run that stage again") from None
    if not same:
        raise SystemExit(f"{STAGE}: {tokenizer}/tokenizer.json did not write the ids of {folder}; give the tokenizer that did")
    for file, size in expected.items():
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{STAGE}: {file} has {found} bytes, {path.name} says {size}; run tokenize_corpus.py again")
    return tokens


class Sequences:
    """A map of tokens as rows of `length`. They are read, not mapped: a read lets other threads run while it waits for the disk."""

    def __init__(self, path, dtype, length):
        self.path, self.dtype, self.length = Path(path), np.dtype(dtype), length
        self.file = os.open(path, os.O_RDONLY)
        self.rows = self.path.stat().st_size // self.dtype.itemsize // length

    def read(self, rows):
        """Return the ids of `rows`, int64 [rows, length]."""
        ids = np.empty((len(rows), self.length), self.dtype)
        for row, place in zip(rows, ids, strict=True):
            os.preadv(self.file, [place], int(row) * place.nbytes)
        return ids.astype(np.int64)


def shuffled(numbers, size, key):
    """Return where the permutation `key` (a list of ints) of range(size) takes `numbers`.

    It is computed, not stored: a Feistel network on an even number of bits, walked on where it leads outside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    turns = np.random.SeedSequence(key).generate_state(6, np.uint64)
    found, outside = np.asarray(numbers, np.uint64).copy(), np.arange(len(numbers))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for turn in turns:
            mixed = (right + turn) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, (left ^ mixed >> np.uint64(40)) & mask
        found[outside] = left << half | right
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


class Batches:
    """Which sequences a step takes, computed from the seed and its number alone: nothing has to be restored when a run goes on, and any
    number of processes takes the same ones. Each source is gone through in a new order each time, and has its share of every stretch."""

    def __init__(self, sources, weights, size, seed, skip=()):
        """`sources`: Sequences; `weights`: their shares, or None for their sizes; `size`: sequences a step; `skip`: batches left out."""
        self.sources, self.size, self.seed, self.skip = sources, size, seed, sorted(skip)
        shares = np.cumsum(weights or [source.rows for source in sources], dtype=float)
        places = np.searchsorted(shares / shares[-1], (np.arange(PATTERN) + 0.5) / PATTERN)
        self.pattern = np.random.default_rng(seed).permutation(places)
        counts = np.cumsum(self.pattern[:, None] == np.arange(len(sources)), axis=0)
        self.quota, self.before = counts[-1], counts[np.arange(PATTERN), self.pattern] - 1

    def number(self, step):
        """Return the number of the batch that `step` takes; both count from 1."""
        for left_out in self.skip:
            step += left_out <= step
        return step

    def rows(self, step):
        """Return (source, row) of each sequence of a step: two arrays."""
        places = np.arange(self.size) + (self.number(step) - 1) * self.size
        which = self.pattern[places % PATTERN]
        taken = places // PATTERN * self.quota[which] + self.before[places % PATTERN]
        rows = np.empty_like(taken)
        for index in np.unique(which):
            size = self.sources[index].rows
            for epoch in np.unique(taken[which == index] // size):
                here = (which == index) & (taken // size == epoch)
                rows[here] = shuffled(taken[here] % size, size, [self.seed, int(index), int(epoch)])
        return which, rows

    def read(self, step, rank=0, processes=1):
        """Return the ids of the part that process `rank` has of a step, int64 [sequences, length]."""
        share = self.size // processes
        which, rows = (found[rank * share : (rank + 1) * share] for found in self.rows(step))
        ids = np.empty((share, self.sources[0].length), np.int64)
        for index in np.unique(which):
            ids[which == index] = self.sources[index].read(rows[which == index])
        return ids

    def stream(self, first, last, rank=0, processes=1):
        """Yield read() of the steps first … last; the next one is read while the one before is at work."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.read, first, rank, processes)
            for step in range(first, last + 1):
                ids, ahead = ahead.result(), reader.submit(self.read, min(step + 1, last), rank, processes)
                yield ids


def documents(sequences, rows):
    """Yield (row, the document's entry in the index of a map) for each document that has tokens in one of `rows`."""
    index, wanted = sequences.path.with_suffix(".csv.gz"), set(map(int, rows))
    if index.exists():
        with gzip.open(index, "rt", encoding="utf-8", newline="") as file:
            for start, end, identity, source, line in csv.reader(file):
                touched = range(int(start) // sequences.length, (int(end) - 1) // sequences.length + 1)
                entry = {"start": int(start), "end": int(end), "id": identity, "source": source, "line": int(line)}
                yield from ((row, entry) for row in touched if row in wanted)


def learning_rate(args, step):
    """Return the learning rate of a step, the same for both engines: a rise from 0, then what --schedule says, down to --final-rate."""
    if step < args.warmup:
        return args.learning_rate * step / args.warmup
    left = (args.steps - step) / max(1, args.steps - args.warmup)
    tail = min(1, (args.steps - step) / max(1, round(args.decay * args.steps)))
    share = {"constant": 1, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2, "wsd": tail}[args.schedule]
    return args.learning_rate * (args.final_rate + (1 - args.final_rate) * share)


def peak_flops(device, precision):
    """Return the FLOP/s at which a process can multiply at most: of a known GPU by its data sheet, of a CPU measured; None if unknown."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((figures for gpu, figures in GPUS.items() if gpu in name), None)
        return known[0] * 1e12 if known and precision == "amp_bf16" else None
    one = torch.randn(1024, 1024, dtype=torch.bfloat16 if precision == "amp_bf16" else torch.float32)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


def pooled(losses, counts, place=0, kind=None):
    """Return {"loss", "bits_per_byte"} of those (source, language) in `losses` that have `kind` at `place`, or of all: nats a token by
    tokens, and bits a byte of text."""
    names = [name for name in losses if kind in (None, name[place])]
    nats = sum(losses[name] * counts[name]["tokens"] for name in names)
    tokens, size = (sum(counts[name][unit] for name in names) for unit in ("tokens", "bytes"))
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}


def plot(steps, held_out, path):
    """Draw [(step, loss, learning rate)] and [(step, held-out loss)]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers, losses, rates = zip(*steps, strict=True)
    axes.plot(numbers, losses, linewidth=1, label="training")
    axes.plot(*zip(*held_out, strict=True), marker=".", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    rate = axes.twinx()
    rate.plot(numbers, rates, color="gray", linestyle=":", linewidth=1)
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    with write_atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


# <<<


def make_plan(args, vocabulary, processes, local, peak=None):
    """Return what a run will take: parameters, FLOP a token, bytes of memory a process, and hours at --mfu of `peak` FLOP/s a process.

    Memory: weights, gradients and Adam's two moments in fp32, what DDP and FSDP hold beside them, the activations that a block saves
    (about 12 vectors of the width and 4 of the MLP's a token) and, last, the logits with their gradient.
    """
    width, rows = args.d_model, math.ceil(vocabulary / 128) * 128
    kv = width // args.n_heads * (args.n_kv_heads or args.n_heads)
    half = (args.mlp_hidden_size or 4 * width) // 2
    block = 2 * width * (width + kv) + 3 * width * half
    norms = 3 * width + kv if args.architecture == "olmo2" else 0
    embedding = rows * width
    parameters = args.n_layers * (block + norms) + (width if norms else 0) + embedding * (1 if args.tie_weights else 2)
    flops = 6 * (args.n_layers * block + embedding) + 6 * args.n_layers * width * args.sequence_length  # attention: causal, so the half
    half_precision, sharded = args.precision == "amp_bf16", {"ddp": 1, "fsdp": processes, "hsdp": local}[args.distributed]
    states = 16 * parameters / sharded
    if sharded > 1:
        states += (2 if half_precision else 4) * 2 * (block + embedding)  # gathered: a block and the next one, the embedding and the head
    elif processes > 1:
        states += 4 * parameters  # DDP's buckets of gradients
    states += 2 * parameters if half_precision and sharded == 1 else 0  # autocast's copy of the weights
    tokens = args.micro_batch_size * args.sequence_length
    saved = tokens * args.n_layers * (12 * width + 4 * half) * (2 if half_precision else 4)
    logits = tokens * rows * (4 if args.compile else 10 if half_precision else 12)  # compiled, the loss is fused
    seen = args.steps * args.global_batch_size * args.sequence_length
    plan = {"engine": args.engine, "parameters": parameters, "steps": args.steps, "tokens": seen, "flops_per_token": flops}
    plan |= {"processes": processes, "memory_bytes": round(states + saved + logits)}
    plan["memory"] = {name: round(size) for name, size in (("states", states), ("activations", saved), ("logits", logits))}
    if peak:
        plan |= {"peak_flops": peak, "hours": seen * flops / (peak * processes * args.mfu) / 3600, "mfu": args.mfu}
        if args.price is not None:
            plan["cost"] = plan["hours"] * processes * args.price
    return plan


def check_memory(plan, capacity):
    """SystemExit when a plan needs more than the `capacity` bytes that a process has."""
    if plan["memory_bytes"] > capacity:
        need, parts = plan["memory_bytes"] / 2**30, ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan["memory"].items())
        raise SystemExit(
            f"{STAGE}: each process needs about {need:.1f} GiB ({parts}) and has {capacity / 2**30:.1f}; lower --micro-batch-size, or take "
            f"--distributed fsdp and more processes"
        )


def train_config(args, tokens, processes):
    """Return ai2-olmo's TrainConfig for the parsed flags, the sources' tokens.json and the number of processes."""
    from olmo import config as olmo

    first = tokens[0]
    return olmo.TrainConfig(
        run_name=Path(args.output).name,
        seed=args.seed,
        model=olmo.ModelConfig(
            d_model=args.d_model,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads or args.n_heads,
            mlp_hidden_size=args.mlp_hidden_size,
            max_sequence_length=args.sequence_length,
            rope=True,
            rope_theta=args.rope_theta,
            include_bias=False,
            bias_for_layer_norm=False,
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            weight_tying=args.tie_weights,
            flash_attention=args.flash_attention,
            vocab_size=first["vocab_size"],
            embedding_size=math.ceil(first["vocab_size"] / 128) * 128,  # the multiple that GPUs multiply fastest
            eos_token_id=first["eos_token_id"],
            pad_token_id=first["pad_token_id"],
            init_device="cpu",  # whole and from the seed in each process: the weights do not depend on how many there are
            init_cutoff_factor=3.0,
            precision=args.precision,
            **ARCHITECTURES[args.architecture],
        ),
        optimizer=olmo.OptimizerConfig(
            name="adamw", learning_rate=args.learning_rate, weight_decay=args.weight_decay, eps=1e-8, decay_norm_and_bias=True
        ),
        data=olmo.DataConfig(
            paths=[str(Path(folder, part["train"]["file"])) for folder, part in zip(args.input, tokens, strict=True)],
            memmap_dtype=first["dtype"],
        ),
        tokenizer=olmo.TokenizerConfig(identifier=str(Path(args.tokenizer, "tokenizer.json"))),
        save_folder=args.output,
        save_overwrite=True,
        save_interval=None,
        save_interval_unsharded=args.save_every,
        save_num_unsharded_checkpoints_to_keep=args.keep,
        eval_interval=args.eval_every,
        max_duration=args.steps,
        stop_at=args.steps,
        canceled_check_interval=1,
        global_train_batch_size=args.global_batch_size,
        device_train_batch_size=args.global_batch_size // processes,
        device_train_microbatch_size=args.micro_batch_size,
        device_train_grad_accum=args.global_batch_size // processes // args.micro_batch_size,
        device_eval_batch_size=args.micro_batch_size,
        max_grad_norm=args.clip,
        precision=args.precision,
        softmax_auxiliary_loss=args.z_loss > 0,
        auxiliary_loss_multiplier=args.z_loss,
        compile=olmo.CompilerConfig() if args.compile else None,
        distributed_strategy=args.distributed,
        ddp=olmo.DDPConfig() if args.distributed == "ddp" else None,
        fsdp=olmo.FSDPConfig(wrapping_strategy="by_block", precision="mixed") if args.distributed == "fsdp" else None,
    )


def core_config(args, tokens):
    """Return (olmo-core's TransformerConfig, what config.json of a checkpoint says) for the parsed flags and the first tokens.json."""
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    model = TransformerConfig.llama_like(
        d_model=args.d_model,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        vocab_size=math.ceil(tokens["vocab_size"] / 128) * 128,
        feed_forward=FeedForwardConfig(hidden_size=(args.mlp_hidden_size or 4 * args.d_model) // 2, bias=False),
        block_name=TransformerBlockType.reordered_norm,
        qk_norm=True,
        layer_norm_eps=1e-6,
        rope_theta=args.rope_theta,
        attn_backend=AttentionBackendName.flash_2 if args.flash_attention else AttentionBackendName.torch,
        tie_word_embeddings=args.tie_weights,
        init_seed=args.seed,
    )
    ids = {name: tokens[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    return model, {"model": model.as_config_dict(), "dataset": {"tokenizer": ids, "sequence_length": args.sequence_length}}


def missing(path, engine):
    """Return the names of a checkpoint's files that are not there, or not to their end."""
    names = ("config.yaml", "model.pt", "optim.pt", "train.pt")
    if engine == "olmo":
        absent = [name for name in names if not (path / name).is_file()]
        return absent + [name for name in names[1:] if name not in absent and not zipfile.is_zipfile(path / name)]  # torch.save writes zip
    from olmo_core.distributed.checkpoint import get_checkpoint_metadata

    names = ("config.json", ".metadata.json", "train/rank0.pt", "model_and_optim/.metadata")
    absent = [name for name in names if not (path / name).is_file()]
    if not absent:
        blocks = get_checkpoint_metadata(str(path / "model_and_optim")).storage_data.values()
        ends = {block.relative_path: 0 for block in blocks}
        for block in blocks:
            ends[block.relative_path] = max(ends[block.relative_path], block.offset + block.length)
        files = {name: path / "model_and_optim" / name for name in ends}
        absent = [name for name, file in files.items() if not file.is_file() or file.stat().st_size < ends[name]]
    return absent


def saved_checkpoints(folder, engine):
    """Return {step: folder} of the checkpoints of a run, the newest first."""
    end = CHECKPOINTS[engine]
    found = {re.fullmatch(rf"step(\d+){end}", path.name): path for path in Path(folder).glob("step*")}
    return dict(sorted(((int(match[1]), path) for match, path in found.items() if match), reverse=True))


def newest_checkpoint(folder, engine):
    """Return the newest whole checkpoint, or None; one that lacks a file, or the end of one, is named and passed over."""
    for path in saved_checkpoints(folder, engine).values():
        absent = missing(path, engine)
        if not absent:
            return path
        print(f"{STAGE}: {path} is not whole ({', '.join(absent)}); passed over", file=sys.stderr)
    return None


class Recorder:
    """What both engines tell of: each step, each evaluation. Rank 0 writes it; all know the last losses, to stop at a jump together.

    `forward`, given by the engine, makes logits of ids [sequences, length], in evaluation mode.
    """

    def __init__(self, args, tokens, device, peak):
        import torch.distributed as dist

        self.args, self.device, self.rank, self.processes = args, device, dist.get_rank(), dist.get_world_size()
        self.folder, self.forward, self.tokens = Path(args.output), None, tokens[0]
        named = list(zip(args.input, tokens, strict=True))
        sources = [Sequences(Path(folder, one["train"]["file"]), one["dtype"], args.sequence_length) for folder, one in named]
        self.batches = Batches(sources, args.weights, args.global_batch_size, args.seed, args.skip_batches)
        self.counts, self.parts = {}, {}
        for folder, one in named:
            for language, part in one["held_out"].items():
                self.counts[folder, language] = part
                self.parts[folder, language] = Sequences(Path(folder, part["file"]), one["dtype"], args.sequence_length)
        self.parts = {name: part for name, part in self.parts.items() if part.rows}
        self.flops = make_plan(args, self.tokens["vocab_size"], 1, 1)["flops_per_token"]
        self.peak, self.batch_tokens = peak and peak * self.processes, args.global_batch_size * args.sequence_length
        self.evaluations, self.rates, self.files, self.wandb = [], [], {}, None
        self.recent, self.lowest, self.clock = collections.deque(maxlen=RECENT), math.inf, time.perf_counter()

    def begin(self, step):
        """Start after `step`: rows after it, which a stopped run wrote and its checkpoint does not know, are dropped."""
        import torch.distributed as dist

        if self.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                path = self.folder / name
                with write_atomic(path, "w") as file:
                    for line in open(path, encoding="utf-8") if path.exists() else ():
                        row = json.loads(line) if line.endswith("}\n") else {"step": math.inf}  # the last one may have been cut
                        if row["step"] <= step and ("prompt" not in row or any(row["step"] == one["step"] for one in self.evaluations)):
                            file.write(line)
                            self.note(row)
                self.files[name] = open(path, "a", encoding="utf-8", buffering=1)
            if self.args.wandb:
                import wandb

                (self.folder / ".wandb").mkdir(exist_ok=True)
                identity = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
                settings = {"project": self.args.wandb, "dir": self.folder / ".wandb", "config": vars(self.args)}
                self.wandb = wandb.init(name=self.folder.name, id=identity, resume="allow", **settings)
        known = [list(self.recent), self.lowest, [row["step"] for row in self.evaluations]]
        dist.broadcast_object_list(known)
        self.recent, self.lowest = collections.deque(known[0], RECENT), known[1]
        self.bar = tqdm(total=self.args.steps, initial=step, unit="step", disable=self.rank > 0 or not sys.stderr.isatty())
        if (step % self.args.eval_every == 0 or step >= self.args.steps) and step not in known[2]:
            self.evaluate(step)
        self.clock = time.perf_counter()

    def note(self, row):
        if "held_out_loss" in row:
            self.evaluations.append(row)
        elif "loss" in row:
            self.recent.append(row["loss"])
            if len(self.recent) == RECENT:
                self.lowest = min(self.lowest, sum(self.recent) / RECENT)
            self.rates.append(row["tokens_per_second"])

    def write(self, row):
        self.note(row)
        if self.rank == 0:
            self.files["metrics.jsonl"].write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log({name: row[name] for name in COLUMNS if name in row}, step=row["step"])

    def check(self, step, loss, z_loss=None):
        """Take this process's losses of a batch, before its update; in all processes alike, stop where they have jumped."""
        import torch
        import torch.distributed as dist

        sums = torch.stack([loss.detach().double(), torch.zeros_like(loss, dtype=torch.double) if z_loss is None else z_loss.double()])
        dist.all_reduce(sums)
        self.loss, z = (sums / self.processes).tolist()
        self.z_loss = None if z_loss is None else z
        if not self.loss < 700:  # the engines raise e to it, for the perplexity
            self.stop(step, f"the loss is no number to go on with ({self.loss:.3g})")
        if self.args.spike and self.loss > self.lowest + self.args.spike:
            self.stop(step, f"the loss jumped to {self.loss:.2f}, from {self.lowest:.2f} in the best {RECENT} steps,")

    def stop(self, step, what):
        """Write suspects.jsonl, the documents of the batch, the sequence of the highest loss first, and leave, in every process."""
        import torch.distributed as dist

        share, number = self.args.micro_batch_size, self.batches.number(step)
        ids = self.batches.read(step, self.rank, self.processes)
        found = [self.losses(ids[first : first + share]).tolist() for first in range(0, len(ids), share)]
        gathered = [None] * self.processes
        dist.all_gather_object(gathered, [loss for losses in found for loss in losses])
        worst = []
        if self.rank == 0:
            which, rows = self.batches.rows(step)
            losses = np.array([loss for losses in gathered for loss in losses])
            for index in np.unique(which):
                source = self.batches.sources[index]
                by_row = dict(zip(rows[which == index].tolist(), losses[which == index].tolist(), strict=True))
                worst += [
                    {"loss": by_row[row], "file": str(source.path), "sequence": row} | entry for row, entry in documents(source, by_row)
                ]
            worst.sort(key=lambda entry: -entry["loss"] if math.isfinite(entry["loss"]) else -math.inf)
            with write_atomic(self.folder / "suspects.jsonl", "w") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in worst)
        dist.barrier()
        names = ", ".join(dict.fromkeys(f"{entry['source']} line {entry['line']} ({entry['id']})" for entry in worst[:3])) or "no document"
        leave_out = " ".join(map(str, [*self.batches.skip, number]))
        message = (
            f"{STAGE}: {self.folder}: {what} at step {step}; batch {number} begins with {names}, suspects.jsonl has all of it: start again "
            f"with --skip-batches {leave_out}, or lower --learning-rate, or raise --warmup (metrics.jsonl has the steps before)"
        )
        raise SystemExit(1 if self.rank else message)

    def step(self, step, grad_norm, rate):
        """Write the row of a step that was taken; check() has had its losses."""
        now = time.perf_counter()
        speed = self.batch_tokens / (now - self.clock)
        self.clock = now
        row = {"step": step, "tokens": step * self.batch_tokens, "loss": self.loss, "grad_norm": float(grad_norm), "learning_rate": rate}
        row |= {} if self.z_loss is None else {"z_loss": self.z_loss}
        row |= {"tokens_per_second": round(speed), "eta_seconds": round((self.args.steps - step) * self.batch_tokens / speed)}
        row |= {"mfu": round(speed * self.flops / self.peak, 4)} if self.peak else {}
        self.write(row)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,} tokens/s", refresh=False)
        self.bar.update()

    def losses(self, ids):
        """Return the loss of each sequence of int64 [sequences, length], in nats a token."""
        import torch

        ids = torch.from_numpy(ids).to(self.device)
        with torch.no_grad():
            logits = self.forward(ids)[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return nats.view(len(ids), -1).double().mean(1)

    def evaluate(self, step):
        """Write the losses of the same held-out sequences as ever, by language and by source, and two continuations."""
        import torch
        import torch.distributed as dist

        share, found = math.ceil(self.args.eval_sequences / len(self.parts)), {}
        micro = self.args.micro_batch_size
        for name, part in self.parts.items():
            count, total = min(part.rows, share), torch.zeros(1, dtype=torch.double)
            for first in range(
                self.rank * micro, math.ceil(count / micro / self.processes) * micro * self.processes, micro * self.processes
            ):
                rows = range(first, min(first + micro, count))  # may be empty in the last round, in which all take part
                losses = self.losses(part.read(rows or [0]))
                total += losses.sum().cpu() if rows else 0
            dist.all_reduce(total)
            found[name] = total.item() / count
        every = pooled(found, self.counts)
        row = {"step": step, "held_out_loss": every["loss"], "bits_per_byte": every["bits_per_byte"]}
        for place, key in ((1, "by_language"), (0, "by_source")):
            row[key] = {kind: pooled(found, self.counts, place, kind) for kind in dict.fromkeys(name[place] for name in found)}
        samples = list(self.continuations(step))
        if self.rank == 0:
            self.files["samples.jsonl"].writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.write(row)  # last: begin() keeps the samples of evaluations that have their row
        if self.rank == 0:
            speed = f", {self.rates[-1]:,} tokens/s" if self.rates else ""
            tqdm.write(
                f"step {step}: held-out loss {row['held_out_loss']:.3f}, {row['bits_per_byte']:.3f} bits/byte{speed}", file=sys.stderr
            )
        self.clock = time.perf_counter()

    def continuations(self, step):
        """Yield two samples (temperature 0.8): the first held-out texts of two parts, or of the only one, continued."""
        import torch
        import torch.distributed as dist
        from tokenizers import Tokenizer

        tokenizer, end = Tokenizer.from_file(str(Path(self.args.tokenizer, "tokenizer.json"))), self.tokens["eos_token_id"]
        generator = torch.Generator().manual_seed(self.args.seed + step)
        for (source, language), part in [*self.parts.items(), *self.parts.items()][:2]:
            text = part.read([0])[0, :PROMPT]
            ids = text[: next(iter(np.flatnonzero(text == end)), None)].tolist() or [end]
            start = len(ids)
            while len(ids) < start + SAMPLE and (len(ids) == start or ids[-1] != end):
                with torch.no_grad():
                    logits = self.forward(torch.tensor([ids[-self.args.sequence_length :]], device=self.device))
                chances = torch.softmax(logits[0, -1, : self.tokens["vocab_size"]].float().cpu() / 0.8, -1)
                chosen = torch.multinomial(torch.nan_to_num(chances, nan=1.0), 1, generator=generator)
                dist.broadcast(chosen, 0)  # rounding may differ, and all must take part in each forward pass
                ids.append(chosen.item())
            words = [tokenizer.decode(part) for part in (ids[:start], ids[start:])]
            yield {"step": step, "source": source, "language": language, "prompt": words[0], "continuation": words[1]}

    def close(self):
        """Write metrics.csv and loss.png."""
        self.bar.close()
        for file in self.files.values():
            file.close()
        if self.wandb:
            self.wandb.finish()
        with open(self.folder / "metrics.jsonl", encoding="utf-8") as rows, write_atomic(self.folder / "metrics.csv", "w") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            steps = []
            for row in map(json.loads, rows):
                table.writerow(row)
                if "loss" in row:
                    steps.append((row["step"], row["loss"], row["learning_rate"]))
        plot(steps, [(row["step"], row["held_out_loss"]) for row in self.evaluations], self.folder / "loss.png")


def train_olmo(args, tokens, recorder):
    """Train with ai2-olmo; return (the last step, parameters)."""
    import torch
    from olmo.config import CheckpointType
    from olmo.data import IterableDataset
    from olmo.model import OLMo
    from olmo.optim import ConstantScheduler, build_optimizer
    from olmo.torch_util import seed_all, synchronize_flag
    from olmo.train import Trainer, cross_entropy_loss
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if not hasattr(Trainer, "autocast"):
        raise SystemExit(f"{STAGE}: ai2-olmo is not patched; run `make setup`, or patch_packages.py apply")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.fsdp")  # olmo saves by its older interface
    device, processes = recorder.device, recorder.processes

    class Steps(IterableDataset):
        start_index, epoch, total_size = 0, 0, args.steps * args.global_batch_size

        def __init__(self):
            pass

        def __iter__(self):
            first = self.start_index // args.global_batch_size + 1
            for ids in recorder.batches.stream(first, args.steps, recorder.rank, processes):
                yield {"input_ids": torch.from_numpy(ids)}

    class Schedule(ConstantScheduler):
        def get_lr(self, initial_lr, step, max_steps):
            return learning_rate(args, step)

    class RecordingTrainer(Trainer):
        stopped = False

        def train_batch(self, batch):
            losses = super().train_batch(batch)
            share = args.sequence_length / (args.sequence_length - 1)  # Trainer divides by all tokens, and the first has no loss
            recorder.check(self.global_step, *(None if loss is None else loss * share for loss in losses))
            return losses

        def train_step(self, batch, reduce_global_loss=True):
            metrics = super().train_step(batch, reduce_global_loss=False)
            recorder.step(self.global_step, metrics["optim/total_grad_norm"], self.optim.param_groups[0]["lr"])
            return metrics

        def eval(self):
            self.optim.zero_grad(set_to_none=True)
            recorder.evaluate(self.global_step)
            return {}

        def save_checkpoint(self, checkpoint_type=CheckpointType.unsharded):
            saved = super().save_checkpoint(CheckpointType.unsharded)  # at a signal Trainer.fit would save FSDP's shards
            recorder.clock = time.perf_counter()
            return saved

        def check_if_cancelled(self):
            return synchronize_flag(self.stopped, self.device), 0

        def stop(self, number, frame):
            """Signal handler: stop after this step; a second signal acts at once."""
            self.stopped = True
            signal.signal(number, signal.SIG_DFL)

        def forward(self, ids):
            training = self.dist_model.training
            self.dist_model.eval()
            with self.autocast():
                logits = self.dist_model(input_ids=ids).logits
            self.dist_model.train(training)
            return logits

    config = train_config(args, tokens, processes)
    seed_all(config.seed)
    model = OLMo(config.model)
    if config.compile:
        for block in model.transformer.blocks:
            block.compile(**config.compile.asdict())
    if args.distributed == "ddp":
        wrapped = DistributedDataParallel(model.to(device))
    else:
        wrapped = FullyShardedDataParallel(
            model,
            sharding_strategy=config.fsdp.sharding_strategy,
            mixed_precision=config.fsdp_precision,
            auto_wrap_policy=model.get_fsdp_wrap_policy(config.fsdp.wrapping_strategy),
            use_orig_params=config.fsdp.use_orig_params,
            limit_all_gathers=True,
            device_id=device,
        )
    trainer = RecordingTrainer(
        cfg=config,
        model=model,
        dist_model=wrapped,
        optim=build_optimizer(config, wrapped),
        scheduler=Schedule(None, None, None),
        train_loader=torch.utils.data.DataLoader(Steps(), batch_size=None, pin_memory=device.type == "cuda"),
        device=device,
        evaluators=[],
        loss_fn=functools.partial(cross_entropy_loss, z_loss_multiplier=args.z_loss),  # Trainer leaves the multiplier at 1e-4
    )
    newest = newest_checkpoint(args.output, args.engine)
    if newest:
        trainer.restore_checkpoint(str(newest), checkpoint_type=CheckpointType.unsharded)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    recorder.forward = trainer.forward
    recorder.begin(trainer.global_step)
    if trainer.global_step < args.steps:
        trainer.fit()
    return trainer.global_step, model.num_params()


def train_core(args, tokens, recorder):
    """Train with olmo-core; return (the last step, parameters)."""
    logging.disable(logging.WARNING)  # kernels of GPUs that are not here, which the packages look for as they are imported
    import torch
    from olmo_core.config import DType
    from olmo_core.data import DataLoaderBase
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.optim import AdamWConfig, OptimGroupOverride
    from olmo_core.optim.scheduler import Scheduler
    from olmo_core.train import Duration, LoadStrategy, TrainerConfig
    from olmo_core.train.callbacks import Callback, CheckpointerCallback
    from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModule
    from olmo_core.utils import seed_all
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    logging.disable(logging.NOTSET)
    logging.getLogger("olmo_core").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="called a synchronizing CUDA operation")  # the Trainer has CUDA warn of what check() must do
    warnings.filterwarnings("ignore", message="DTensor random operators")  # the weights that it draws are replaced
    device, processes = recorder.device, recorder.processes
    half_precision, cuda = args.precision == "amp_bf16", device.type == "cuda"
    tokens_of = {"micro": args.micro_batch_size * args.sequence_length, "step": recorder.batch_tokens}

    class Steps(DataLoaderBase):
        total_batches = args.steps

        def state_dict(self):
            return {"batches_processed": self.batches_processed}

        def load_state_dict(self, state_dict):
            self.batches_processed = state_dict["batches_processed"]

        def reshuffle(self, epoch=None, **kwargs):
            self._epoch = epoch

        def _iter_batches(self):
            for ids in recorder.batches.stream(self.batches_processed + 1, args.steps, recorder.rank, processes):
                yield {"input_ids": torch.from_numpy(ids)}

        def get_mock_batch(self):
            raise NotImplementedError  # no step is tried before the first

        def global_num_tokens_in_batch(self, batch):
            return tokens_of["step"]

    class Schedule(Scheduler):
        def get_lr(self, initial_lr, current, t_max):
            return learning_rate(args, current)

    class Module(TransformerTrainModule):
        def record_ce_loss(self, value, reduce_type=None):
            self.local_loss = value
            super().record_ce_loss(value, reduce_type)

        def train_batch(self, batch, dry_run=False):
            super().train_batch(batch, dry_run)
            recorder.check(self.trainer.global_step, self.local_loss, self.trainer.get_metric("Z loss", "train"))

        def optim_step(self):
            super().optim_step()
            norm = self.trainer.get_metric("total grad norm", "optim")
            recorder.step(self.trainer.global_step, norm, self.optim.param_groups[0]["lr"])

        def forward(self, ids):
            mode = self._model_mode
            self._set_model_mode("eval")
            logits = self.model_forward(ids)
            self._set_model_mode(mode or "train")
            return logits

    class Report(Callback):
        def post_checkpoint_saved(self, path):
            if recorder.rank == 0:
                with write_atomic(Path(path, "config.json"), "w") as file:
                    json.dump(described, file)
                for old in list(saved_checkpoints(args.output, args.engine).values())[args.keep :]:
                    shutil.rmtree(old)
            recorder.clock = time.perf_counter()

        def post_step(self):
            if self.step % args.eval_every == 0 or self.step >= args.steps:
                recorder.evaluate(self.step)

    config, described = core_config(args, tokens[0])
    parallel = None
    if processes > 1:
        gathered = None if args.distributed == "ddp" else DType.bfloat16 if half_precision else DType.float32
        parallel = TransformerDataParallelConfig(name=DataParallelType(args.distributed), param_dtype=gathered, reduce_dtype=DType.float32)
    seed_all(args.seed)
    module = Module(
        config.build(init_device="meta"),
        AdamWConfig(
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=args.weight_decay,
            fused=cuda,
            group_overrides=[OptimGroupOverride(["embeddings.weight"], {"weight_decay": 0.0})],
        ),
        rank_microbatch_size=tokens_of["micro"],
        max_sequence_length=args.sequence_length,
        compile_model=args.compile,
        dp_config=parallel,
        z_loss_multiplier=args.z_loss or None,
        autocast_precision=torch.bfloat16 if half_precision and (parallel is None or args.distributed == "ddp") else None,
        max_grad_norm=args.clip,
        scheduler=Schedule(),
        device=device,
    )
    newest = newest_checkpoint(args.output, args.engine)
    if not newest and (processes > 1 or cuda):  # the weights that one process on a CPU draws, however many there are
        drawn = {}
        if recorder.rank == 0:
            model = config.build(init_device="cpu")
            model.init_weights(max_seq_len=args.sequence_length, device=torch.device("cpu"))
            drawn = model.state_dict()
        set_model_state_dict(module.model, drawn, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    loader = Steps(work_dir=args.output, global_batch_size=tokens_of["step"], dp_world_size=processes, dp_rank=recorder.rank)
    trainer = TrainerConfig(
        save_folder=args.output,
        save_overwrite=True,
        max_duration=Duration.steps(args.steps),
        load_strategy=LoadStrategy.never,
        metrics_collect_interval=100,
        cancel_check_interval=1,
        async_bookkeeping=False,
        callbacks={
            "checkpointer": CheckpointerCallback(
                save_interval=args.save_every, save_async=False, pre_train_checkpoint=False, max_checkpoints=None
            )
        },
    ).build(module, loader)
    trainer.add_callback("report", Report())
    if newest:
        trainer.load_checkpoint(str(newest), load_trainer_state=True, load_optim_state=True)
    recorder.forward = module.forward
    recorder.begin(trainer.global_step)
    if trainer.global_step < args.steps:
        trainer.fit()
    return trainer.global_step, module.model.num_params


def train(args, tokens, recorder):
    """Train to the last step; return the number of parameters. SystemExit at what a user can mend, and at a signal (after a checkpoint)."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        step, parameters = {"olmo": train_olmo, "olmo-core": train_core}[args.engine](args, tokens, recorder)
    except (RuntimeError, OSError, CheckpointException) as error:
        words = str(error)
        if re.search("PytorchStreamWriter|unexpected pos|File too large|No space left|quota", words):
            why = "a checkpoint could not be written; make room on the disk and run it again: it goes on from the last one"
        elif "out of memory" in words:
            why = "out of memory; lower --micro-batch-size, or take --distributed fsdp and more processes"
        else:
            raise
        raise SystemExit(f"{STAGE}: {args.output}: {why}") from None
    if step < args.steps:
        if recorder.rank == 0:
            print(f"{STAGE}: stopped after step {step}, checkpoint saved; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    return parameters


def launch(processes):
    """Run this command in several processes under torchrun's agent; leave with the exit code of the first that fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    settings = LaunchConfig(1, 1, processes, run_id=STAGE, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(settings, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        sys.exit(abs(error.get_first_failure()[1].exitcode))
    except SignalException as error:  # passed on to the processes, which have saved a checkpoint
        sys.exit(128 + error.sigval)


def slurm(environment):
    """Return torchrun's variables for a task of srun, {} where this is none: a batch script has no step of its own."""
    if "SLURM_STEP_ID" not in environment or "RANK" in environment or environment.get("SLURM_NTASKS", "1") == "1":
        return {}
    host, number = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"]).groups("")
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
    found = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": environment["SLURM_LOCALID"]}
    found |= {"LOCAL_WORLD_SIZE": tasks // nodes, "MASTER_ADDR": host + number, "MASTER_PORT": port}
    return {name: environment.get(name, str(value)) for name, value in found.items()}


def join(args):
    """Enter the process group; return (device, Run). Run is None but in the process of rank 0, whose verdict holds for all."""

    def begin():
        run = Run("pretrain", args, [*args.input, Path(args.tokenizer, "tokenizer.json")], ignore=IGNORED)
        for folder in args.input:
            with contextlib.suppress(OSError, ValueError, KeyError):  # the maps were hashed as they were written, and may be terabytes
                for part in json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))["outputs"]:
                    run.digests[str(Path(folder, Path(part["path"]).name))] = part["sha256"]
        return run

    alone, verdict = "RANK" not in os.environ, [None]
    run = begin() if alone else None
    if not alone:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the launcher is killed, this process is as well
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"), ("OLMO_SHARED_FS", "1")):
        os.environ.setdefault(name, value)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {})
    )
    if not alone:
        if dist.get_rank() == 0:
            try:
                run = begin()
            except SystemExit as leave:
                verdict = [leave.code or 0]
        dist.broadcast_object_list(verdict)
        if verdict[0] is not None:
            sys.exit(verdict[0])
    return device, run


IGNORED = ("nproc_per_node", "skip_batches", "wandb", "dry_run", "machine", "mfu", "price")  # settings that change no result, or mend one


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--input", nargs="+", required=True, metavar="DIR", help="folders of tokenize_corpus.py, each a source")
    add("--weights", nargs="+", type=float, metavar="X", help="the sources' shares of all sequences (default: by their sizes)")
    add("--tokenizer", required=True, metavar="DIR", help="the tokenizer that wrote the ids")
    add("--output", required=True, metavar="DIR", help="folder for checkpoints and metrics")
    add("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    add("--dry-run", action="store_true", help="print the plan as JSON: parameters, steps, memory, hours, cost")
    add("--machine", metavar="8xH100", help=f"machine of that plan (default: this one): {', '.join(GPUS)}")
    add("--mfu", type=float, default=0.4, metavar="SHARE", help="of the GPUs' peak, assumed in the plan (default: 0.4)")
    add("--price", type=float, metavar="X", help="of an hour of one GPU, for the plan's cost")
    add("--engine", choices=sorted(CHECKPOINTS), default="olmo", help="olmo: ai2-olmo (default); olmo-core: its successor")
    add(
        "--architecture", choices=sorted(ARCHITECTURES), default="olmo2", help="olmo2 (default): RMS norms after, norms of queries and keys"
    )
    add("--d-model", type=int, default=768, metavar="N", help="width (default: 768)")
    add("--n-layers", type=int, default=12, metavar="N", help="default: 12")
    add("--n-heads", type=int, default=12, metavar="N", help="default: 12")
    add("--n-kv-heads", type=int, metavar="N", help="heads of keys and values (default: as n-heads)")
    add("--mlp-hidden-size", type=int, metavar="N", help="both halves of the SwiGLU, as OLMo counts (default: 4 × d-model)")
    add("--sequence-length", type=int, default=2048, metavar="N", help="tokens (default: 2048)")
    add("--rope-theta", type=int, default=500_000, metavar="N", help="default: 500000")
    add("--tie-weights", action=switch, default=False, help="one matrix for embedding and output")
    add("--steps", type=int, metavar="N", help="length of the run (or --tokens)")
    add("--tokens", type=float, metavar="N", help="length of the run in tokens, rounded up to a step")
    add("--global-batch-size", type=int, default=512, metavar="N", help="sequences a step, over all processes (default: 512)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="sequences a process takes at once (default: 8)")
    add("--learning-rate", type=float, default=4e-4, metavar="X", help="peak (default: 4e-4)")
    add("--warmup", type=int, default=2000, metavar="N", help="steps of linear warm-up from 0 (default: 2000)")
    add("--schedule", choices=("constant", "cosine", "linear", "wsd"), default="cosine", help="after the warm-up (default: cosine)")
    add("--decay", type=float, default=0.1, metavar="SHARE", help="of the steps: the fall at the end of wsd (default: 0.1)")
    add("--final-rate", type=float, default=0.1, metavar="SHARE", help="of the peak, at the last step (default: 0.1)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="default: 0.1; embeddings have none")
    add("--z-loss", type=float, default=1e-5, metavar="X", help="weight of the squared log of the softmax's sum (default: 1e-5)")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (default: 1.0)")
    add("--spike", type=float, default=1.0, metavar="X", help=f"nats above the best {RECENT} steps that stop the run; 0: none (default: 1)")
    add("--skip-batches", nargs="+", type=int, default=[], metavar="N", help="leave these out: a run stopped by its loss goes on without")
    add("--precision", choices=("fp32", "amp_bf16"), default="amp_bf16", help="of the forward and backward pass (default: amp_bf16)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--eval-sequences", type=int, default=1024, metavar="N", help="of the held-out text, always the same (default: 1024)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints (default: 2)")
    add("--seed", type=int, default=1, metavar="N", help="of weights, data order and samples (default: 1)")
    add(
        "--distributed", choices=("ddp", "fsdp", "hsdp"), default="ddp", help="fsdp shards the model over all processes, hsdp over a node's"
    )
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes started here; several nodes: torchrun or srun (default: 1)")
    add("--compile", action=switch, default=False, help="torch.compile each block")
    add("--flash-attention", action=switch, default=False, help="the package flash-attn; a GPU is needed")
    add("--wandb", metavar="PROJECT", help="send the metrics there too (WANDB_MODE=online)")
    return parser


def checked(parser, argv):
    """Parse argv; return the arguments with `steps` resolved. Usage errors are named with their remedy."""
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", args.nproc_per_node))
    if args.machine:
        match = re.fullmatch(rf"(\d+)x({'|'.join(GPUS)})", args.machine)
        if not match or not int(match[1]):
            parser.error(f"--machine {args.machine}: a number, x and one of {', '.join(GPUS)}")
        processes = int(match[1]) if args.dry_run else processes
    if (args.steps is None) == (args.tokens is None):
        parser.error("give --steps or --tokens, one of them")
    args.steps = args.steps or math.ceil(args.tokens / args.global_batch_size / args.sequence_length)
    if args.weights and (len(args.weights) != len(args.input) or min(args.weights) <= 0):
        parser.error(f"--weights: one above 0 for each of the {len(args.input)} folders of --input")
    if (args.engine == "olmo" and args.distributed == "hsdp") or (args.engine == "olmo-core" and args.architecture == "olmo1"):
        parser.error("--distributed hsdp needs --engine olmo-core, --architecture olmo1 --engine olmo")
    if args.d_model % args.n_heads or args.n_heads % (args.n_kv_heads or args.n_heads) or (args.d_model // args.n_heads) % 2:
        parser.error("--n-heads must divide --d-model into even parts, --n-kv-heads must divide --n-heads")
    if args.global_batch_size % (processes * args.micro_batch_size):
        parser.error(f"--global-batch-size must be a multiple of {processes} processes × --micro-batch-size {args.micro_batch_size}")
    if args.flash_attention and not args.dry_run and not importlib.util.find_spec("flash_attn"):
        parser.error("--flash-attention: the package flash-attn is not installed; install it on the GPU machine, or leave the flag out")
    return args


def capacity_of(device, local):
    """Return the bytes of memory that each of `local` processes has on this machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local


def dry_run(args):
    """Print the plan of a run, for which the tokenizer is enough; SystemExit where it cannot fit."""
    from tokenizers import Tokenizer

    path = Path(args.tokenizer, "tokenizer.json")
    if not path.exists():
        raise SystemExit(f"{STAGE}: {path} does not exist; the plan needs its number of ids: name the tokenizer's folder, or make it first")
    vocabulary = Tokenizer.from_file(str(path)).get_vocab_size()
    if args.machine:
        count, gpu = args.machine.split("x", 1)
        (tflops, gigabytes), count = GPUS[gpu], int(count)
        plan, capacity = make_plan(args, vocabulary, count, min(count, 8), tflops * 1e12), gigabytes * 1e9
    else:
        import torch

        device, local = torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.nproc_per_node
        plan = make_plan(args, vocabulary, local, local, peak_flops(device, args.precision))
        capacity = capacity_of(device, local)
    print(json.dumps(plan | {"capacity_bytes": round(capacity), "settings": vars(args)}, indent=1))
    check_memory(plan, capacity)


def main():
    os.environ.update(slurm(os.environ))
    parser = build_parser()
    args = checked(parser, config_argv(parser, sys.argv[1:]))
    if args.dry_run:
        return dry_run(args)
    tokens = [read_tokens(folder, args.tokenizer) for folder in args.input]
    sequences = [one["train"]["tokens"] // args.sequence_length for one in tokens]
    held_out = [part["tokens"] for one in tokens for part in one["held_out"].values()]
    if sum(sequences) < args.global_batch_size or not min(sequences) or max(held_out) < args.sequence_length:
        raise SystemExit(
            f"{STAGE}: {', '.join(args.input)}: {sum(sequences)} training sequences of {args.sequence_length} tokens do not fill a batch, "
            f"or no held-out file holds one; take more text, or a shorter --sequence-length, or a smaller --global-batch-size"
        )
    package = {"olmo": "olmo", "olmo-core": "olmo_core"}[args.engine]
    if not importlib.util.find_spec(package):
        raise SystemExit(f"{STAGE}: the package ai2-{args.engine} is not installed; run `make setup`, or install what the header names")
    if args.nproc_per_node > 1 and "RANK" not in os.environ:
        return launch(args.nproc_per_node)
    device, run = join(args)
    import torch.distributed as dist

    processes, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    peak = peak_flops(device, args.precision)
    plan = make_plan(args, tokens[0]["vocab_size"], processes, local, peak)
    check_memory(plan, capacity_of(device, local))
    if run:
        hours = f", {plan['hours']:.1f} hours at {args.mfu:.0%} of the peak" if peak else ""
        print(
            f"{STAGE}: {plan['parameters']:,} parameters, {plan['tokens']:,} tokens, about {plan['memory_bytes'] / 2**30:.1f} GiB a process"
            f"{hours}",
            file=sys.stderr,
        )
    recorder = Recorder(args, tokens, device, peak)
    parameters = train(args, tokens, recorder)
    if run:
        recorder.close()
        first, last = recorder.evaluations[0], recorder.evaluations[-1]
        speed = sorted(recorder.rates)[len(recorder.rates) // 2]
        metrics = {"first": first, "last": last, "tokens_per_second": speed, "processes": processes, "engine": args.engine}
        metrics |= {"mfu": round(speed * recorder.flops / recorder.peak, 4)} if peak else {}
        metrics |= {"skipped_batches": args.skip_batches} if args.skip_batches else {}
        run.finish(
            f"held-out loss {first['held_out_loss']:.2f} -> {last['held_out_loss']:.2f}, {last['bits_per_byte']:.2f} bits/byte",
            counts={"parameters": parameters, "steps": args.steps, "tokens": plan["tokens"]},
            metrics=metrics,
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
