#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.10", "deepspeed>=0.19", "matplotlib>=3.9", "numpy>=1.26", "pyyaml>=6", "tokenizers>=0.21", "torch>=2.6", "tqdm>=4.66",
#     "transformers>=5.16,<6",
# ]
# ///
"""Pretrain a decoder, an encoder or an encoder-decoder of transformers from token memory maps, new or from given weights: the Trainer
with DeepSpeed ZeRO, on CPU or GPUs.

Usage:
    python scripts/pretrain_hf.py --config recipes/demo/pretrain-hf.yaml --input TOKENS --tokenizer TOKENIZER --output /tmp/model
    make pretrain ENGINE=hf RECIPE=demo
    make pretrain-masked pretrain-span RECIPE=demo
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/pretrain_hf.py …

Reads   folders of tokenize_corpus.py (tokens.json, *.npy) and the tokenizer that wrote them.
Writes  OUTPUT/checkpoint-N, the newest --keep of them; OUTPUT/metrics.jsonl and .csv: a row for each step and each evaluation;
        OUTPUT/samples.jsonl: what the model makes of two held-out texts at each evaluation; OUTPUT/loss.png; OUTPUT/model: the Hugging
        Face folder, tokenizer included; then OUTPUT/manifest.json, last. OUTPUT/suspects.jsonl: documents of a batch whose loss leapt.
Exit    0 done or up to date; 1 failed, or the loss leapt or became NaN; 2 bad usage; 3 refused, OUTPUT holds another run; 143 stopped by
        a signal, with a checkpoint.
Needs   CPU or CUDA GPUs, no network, no compiler. Memory: --dry-run computes it; while the weights are drawn, the whole model in each
        process, so that they do not depend on how many there are.

An encoder learns the tokens that were masked (15 %: of these 80 % masked, 10 % exchanged, 10 % left), an encoder-decoder spans of 3 tokens
on average that a sentinel stands for (15 %, as T5). A tokenizer without a mask or sentinels gets them behind its other ids.
Started again with the same settings, a run goes on from its newest whole checkpoint, to the weights of an undisturbed run.
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
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

STAGE = "pretrain_hf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ZERO = ("zero1", "zero2", "zero3")
HEADS = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "span": "AutoModelForSeq2SeqLM"}
NOISE, SPAN = 0.15, 3  # share of the tokens that are hidden, and how many a span has on average (BERT, T5)
PROMPT, SAMPLE = 24, 48  # tokens of held-out text that are continued, and of the continuation
RECENT, ENOUGH = 64, 8  # losses that a jump is measured against, and how many there must be


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
def causal(ids, chance):
    return {"input_ids": ids, "labels": ids}


def masked(ids, chance, special, mask, vocabulary):
    """Hide NOISE of the tokens, the `special` ones last; always as many, so that the mean over batches is the one over tokens."""
    order = np.argsort(chance.random(len(ids)) + np.isin(ids, special))[: max(1, round(NOISE * len(ids)))]
    most, some = round(0.8 * len(order)), round(0.9 * len(order))
    inputs, labels = ids.copy(), np.full_like(ids, -100)
    labels[order] = ids[order]
    inputs[order[:most]] = mask
    inputs[order[most:some]] = chance.integers(vocabulary, size=some - most)
    return {"input_ids": inputs, "labels": labels}


def spans_of(length):
    """Return how many tokens of a sequence are hidden, and in how many spans."""
    noise = max(1, round(NOISE * length))
    return noise, max(1, round(noise / SPAN))


def span(ids, chance, sentinels, end):
    """Hide spans: each becomes a sentinel, and the labels are the sentinels with what they stand for. Lengths [always the same]."""
    noise, spans = spans_of(len(ids))
    hidden, kept = (
        np.diff(np.sort(chance.choice(np.arange(1, total), spans - 1, replace=False)), prepend=0, append=total)
        for total in (noise, len(ids) - noise)
    )
    at = np.repeat(np.arange(2 * spans) % 2 == 1, np.stack([kept, hidden], 1).ravel())
    marks = sentinels[:spans]
    inputs, labels = np.insert(ids[~at], np.cumsum(kept), marks), np.insert(ids[at], np.cumsum(hidden) - hidden, marks)
    return {"input_ids": np.append(inputs, end), "labels": np.append(labels, end)}


@functools.lru_cache(8)  # a batch's items are asked for one after the other
def rows_of(batches, step):
    return batches.rows(step)


def item_of(batches, index):
    """Return the ids of the sequence that is number `index` of a run."""
    which, rows = rows_of(batches, index // batches.size + 1)
    at = index % batches.size
    return batches.sources[which[at]].read(rows[at : at + 1])[0]


class Items:
    """A dataset of `count` items: what locate(i) returns, made into inputs and labels; whatever is drawn for that depends on seed and i."""

    def __init__(self, locate, count, make, seed):
        self.locate, self.count, self.make, self.seed = locate, count, make, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(self.locate(index), np.random.default_rng((self.seed, index)))


def collate(items):
    """Return {name: tensor [items, length]}."""
    import torch

    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


def marked(folder, objective, length):
    """Return (tokenizer, ids of the objective's marks, those that had to be added, what tokenizer_config.json must say of them). They are
    added behind all others: no id of a text changes."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    path, names, said = Path(folder, "tokenizer_config.json"), [], {}
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if objective == "masked":
        named = config.get("mask_token") or "<|mask|>"
        names = [named["content"] if isinstance(named, dict) else named]
        said = {} if config.get("mask_token") else {"mask_token": names[0]}
    elif objective == "span":
        names = [f"<extra_id_{i}>" for i in range(max(100, spans_of(length)[1]))]
    added = [name for name in names if tokenizer.token_to_id(name) is None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    if objective == "span" and added:
        said = {"additional_special_tokens": [*config.get("additional_special_tokens", []), *added]}
    return tokenizer, [tokenizer.token_to_id(name) for name in names], added, said


def same_ids(ours, theirs):
    """True if the tokenizer of a folder gives every text the ids of another; it may have more special tokens."""
    from tokenizers import Tokenizer

    ours, theirs = (json.loads(Tokenizer.from_file(str(Path(folder, "tokenizer.json"))).to_str()) for folder in (ours, theirs))
    alike = all(ours[key] == theirs[key] for key in ("model", "normalizer", "pre_tokenizer"))
    return alike and all(token in theirs["added_tokens"] for token in ours["added_tokens"])


def objective_of(config, asked, where):
    """Return the objective of a configuration: as asked, or by its architectures, or by its class; SystemExit if it is none of them."""
    from transformers.models.auto import modeling_auto as auto

    maps = {"span": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "masked": auto.MODEL_FOR_MASKED_LM_MAPPING}
    maps["causal"] = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    able = [name for name, classes in maps.items() if type(config) in classes and (name == "span") == config.is_encoder_decoder]
    named = " ".join(config.architectures or [])
    likely = [name for name, word in (("masked", "MaskedLM"), ("causal", "CausalLM"), ("causal", "LMHead")) if word in named]
    chosen = next((name for name in [*likely, *able] if name in able), None) if asked == "auto" else asked
    if chosen not in able:
        raise SystemExit(f"{STAGE}: {where}: a {config.model_type} cannot learn by --objective {asked}; choose of: {' '.join(able)}")
    return chosen


def model_config(args, tokens):
    """Return the configuration of the model: that of --model, --model-config with the ids of `tokens`, or an Olmo2 of the given sizes."""
    from transformers import AutoConfig, Olmo2Config

    ids = {"eos_token_id": tokens["eos_token_id"], "pad_token_id": tokens["pad_token_id"], "bos_token_id": None}
    ids["vocab_size"] = math.ceil(tokens["vocab_size"] / 128) * 128  # the multiple that GPUs multiply fastest
    where = args.model or args.model_config
    if not where:
        return Olmo2Config(
            hidden_size=args.d_model,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads or args.n_heads,
            intermediate_size=(args.mlp_hidden_size or 4 * args.d_model) // 2,
            max_position_embeddings=args.sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": float(args.rope_theta)},
            rms_norm_eps=1e-6,
            tie_word_embeddings=args.tie_weights,
            **ids,
        )
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, **({} if args.model else ids))
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise SystemExit(f"{STAGE}: {where}: no configuration ({why}); give a config.json with a model_type of transformers") from None
    if (getattr(config, "max_position_embeddings", None) or args.sequence_length) < args.sequence_length:
        raise SystemExit(f"{STAGE}: {where}: max_position_embeddings is below --sequence-length {args.sequence_length}")
    if not args.model:
        strange = [name for name in config.to_dict() if name.endswith("_token_id") and name not in ids]
        for name in strange:  # ids of the tokenizer that its class was made for
            setattr(config, name, None)
    return config


def prepare(args, tokens):
    """Resolve --objective; return (configuration, tokenizer of marked(), what makes ids into inputs and labels); SystemExit says what
    does not fit."""
    folder, length = args.model or args.tokenizer, args.sequence_length
    config = model_config(args, tokens)
    args.objective = objective_of(config, args.objective, args.model or args.model_config or "Olmo2")
    if args.model and not (Path(folder, "tokenizer.json").exists() and same_ids(args.tokenizer, folder)):
        raise SystemExit(f"{STAGE}: {folder}: its tokenizer.json does not write the ids of --input; run tokenize_corpus.py with that one")
    tokenizer, marks, added, said = marked(folder, args.objective, length)
    if args.model and added:
        raise SystemExit(f"{STAGE}: {folder}: its tokenizer lacks {added[0]} for --objective {args.objective}; take another model")
    size = tokenizer.get_vocab_size()
    if args.model and size > config.vocab_size:
        raise SystemExit(f"{STAGE}: {folder}: {size} tokens, but vocab_size is {config.vocab_size}; give the tokenizer of these weights")
    if not args.model:
        config.vocab_size = math.ceil(size / 128) * 128
    end, pad = tokens["eos_token_id"], tokens["pad_token_id"]
    if args.objective == "span" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = pad
    if args.objective == "masked" and not args.model and hasattr(config, "mask_token_id"):
        config.mask_token_id = marks[0]
    if args.objective == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True  # a class that is an encoder as well would see what follows
    make = {
        "causal": causal,
        "masked": functools.partial(masked, special=[end, pad], mask=marks and marks[0], vocabulary=tokens["vocab_size"]),
        "span": functools.partial(span, sentinels=np.array(marks), end=end),
    }[args.objective]
    return config, (folder, tokenizer, added, said), make


def build_model(args, config):
    """Return the model, its weights drawn or those of --model; SystemExit when that has not all of them."""
    import transformers

    head = getattr(transformers, HEADS[args.objective])
    attention = {"attn_implementation": "flash_attention_2"} if args.flash_attention else {}
    if not args.model:
        return head.from_config(config, **attention)
    words = {"config": config, "local_files_only": True, "dtype": "float32", "output_loading_info": True}
    try:
        model, found = head.from_pretrained(args.model, **words, **attention)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{STAGE}: {args.model}: no weights ({str(error).splitlines()[0]}); give a Hugging Face folder") from None
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise SystemExit(f"{STAGE}: {args.model}: {len(wrong)} weights are missing or misshapen, {wrong[0]} first; give a whole model")
    return model


def make_plan(args, config, item, processes, peak):
    """Return what a run will take: parameters, FLOP a token, bytes of memory a process, and hours at --mfu of `peak` FLOP/s a process.

    `item`: one of the dataset. A pass over tensors that hold no data counts the products and what is kept for the way back. Weights,
    gradients and moments, and in DeepSpeed float32 copies of the first two, are divided as the stage of ZeRO divides them.
    """
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.initialization import no_init_weights

    half, zero = args.precision == "amp_bf16", {"stage": ZERO.index(args.deepspeed) + 1 if args.deepspeed in ZERO else 0}
    if args.deepspeed not in (*ZERO, "none"):
        zero |= json.loads(Path(args.deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
    stage = zero["stage"]
    saved, found = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    for attention in ("eager", None):  # its products are counted in the first, which the second, that runs, does in one piece
        saved.clear()
        with FakeTensorMode(), no_init_weights(), warnings.catch_warnings(action="ignore"):
            model = getattr(transformers, HEADS[args.objective]).from_config(config, attn_implementation=attention)
            model.tie_weights()
            own = {weight.untyped_storage()._cdata for weight in model.parameters()}
            parameters = sum(weight.numel() for weight in model.parameters())
            batch = {name: torch.zeros(args.micro_batch_size, len(ids), dtype=torch.int64) for name, ids in item.items()}
            counter, hooks = FlopCounterMode(display=False), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with counter, hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
                model(**batch).loss.backward()
        found.append((counter.get_total_flops(), sum(storage.nbytes() for key, storage in saved.items() if key not in own)))
    weights, gradients, rest = (2, 2, 16) if half and stage else (4, 4, 16 if stage else 8)
    weights, rest = weights * ("offload_param" not in zero), rest * ("offload_optimizer" not in zero)
    weights, gradients = weights / (processes if stage == 3 else 1), gradients / (processes if stage >= 2 else 1)
    memory = {"states": round(parameters * (weights + gradients + rest / (processes if stage else 1))), "activations": found[1][1]}
    seen, flops = args.steps * args.global_batch_size * args.sequence_length, found[0][0] / args.micro_batch_size / args.sequence_length
    made = {"engine": "hf", "objective": args.objective, "parameters": parameters, "steps": args.steps, "tokens": seen}
    made |= {"flops_per_token": flops, "processes": processes, "memory_bytes": sum(memory.values()), "memory": memory}
    if peak:
        made |= {"peak_flops": peak, "hours": seen * flops / (peak * processes * args.mfu) / 3600, "mfu": args.mfu}
        if args.price is not None:
            made["cost"] = made["hours"] * processes * args.price
    return made


def check_memory(args, planned):
    """SystemExit when a process needs more memory than it has: on --machine, its GPU, or its share of this machine."""
    import torch

    if args.machine:
        room = GPUS[args.machine.partition("x")[2]][1] * 1e9
    elif torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc_per_node))
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here
    if planned["memory_bytes"] > room:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in planned["memory"].items())
        raise SystemExit(
            f"{STAGE}: each process needs about {planned['memory_bytes'] / 2**30:.1f} GiB ({parts}) and has {room / 2**30:.1f}; lower "
            f"--micro-batch-size, or take --deepspeed zero3 and more processes"
        )


def training_arguments(args, cuda, fresh):
    """Return TrainingArguments; a fresh run begins with an evaluation. DeepSpeed gets no optimizer and no schedule of its own: those of
    transformers are the same with and without it, and none of its operators has to be compiled."""
    from transformers import TrainingArguments

    if args.deepspeed != "none" and not cuda:
        import deepspeed

        # an operator that would be compiled for minutes, and the lock of a build that was killed hangs all later runs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage = {"stage": ZERO.index(args.deepspeed) + 1, "stage3_gather_16bit_weights_on_model_save": True} if args.deepspeed in ZERO else {}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    zero = {"zero_optimization": stage, "bf16": {"enabled": "auto"}, "steps_per_print": sys.maxsize, **auto}
    return TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch_size,
        per_device_eval_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // args.micro_batch_size // int(os.environ.get("WORLD_SIZE", 1)),
        optim="adamw_torch",
        learning_rate=args.learning_rate,
        adam_beta2=0.95,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip,
        warmup_steps=args.warmup,
        bf16=args.precision == "amp_bf16",
        seed=args.seed,
        eval_strategy="steps",
        eval_on_start=fresh,
        eval_steps=args.eval_every,
        prediction_loss_only=True,
        save_steps=args.save_every,
        save_total_limit=args.keep,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="wandb" if args.wandb else "none",
        run_name=Path(args.output).name,
        train_sampling_strategy="sequential",  # draw() has mixed them
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=4 if cuda else 0,
        dataloader_pin_memory=cuda,
        torch_compile=args.compile,
        deepspeed=None if args.deepspeed == "none" else zero if stage else args.deepspeed,
    )


def newest_checkpoint(folder):
    """Return the newest whole checkpoint-N folder, or None; transformers writes trainer_state.json last, torch.save writes zip files."""
    steps = {int(p.name[11:]): p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if all(map(zipfile.is_zipfile, [*path.rglob("*.pt"), *path.rglob("*.pth")])):
                return path
        print(f"{STAGE}: {path} is not whole; passed over", file=sys.stderr)
    return None


class Journal:
    """metrics.jsonl, samples.jsonl and, at the end, metrics.csv and loss.png. Rows after `step`, which a stopped run wrote and the
    checkpoint that it goes on from does not know, are dropped. Each process knows the last losses, one `writes`."""

    def __init__(self, folder, step, writes):
        self.folder, self.writes = Path(folder), writes
        self.recent, self.evaluations, self.speeds = collections.deque(maxlen=RECENT), [], {"tokens_per_second": [], "mfu": []}
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [line for line, row in self.read(name) if row["step"] <= step]
            if writes:
                with write_atomic(self.folder / name, "w") as file:
                    file.writelines(kept)
            for row in map(json.loads, kept if name == "metrics.jsonl" else ()):
                self.note(row)

    def read(self, name):
        """Yield (line, row) of a file; the last line may have been cut."""
        if (self.folder / name).exists():
            for line in open(self.folder / name, encoding="utf-8"):
                if line.endswith("}\n"):
                    yield line, json.loads(line)

    def note(self, row):
        if "held_out_loss" in row:
            self.evaluations.append(row)
        else:
            self.recent.append(row["loss"])
            for key in self.speeds.keys() & row.keys():
                self.speeds[key].append(row[key])

    def write(self, name, *rows):
        if self.writes:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for row in rows if name == "metrics.jsonl" else ():
            self.note(row)

    def finish(self):
        """Write metrics.csv and loss.png."""
        steps = []
        with write_atomic(self.folder / "metrics.csv", "w") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            for _, row in self.read("metrics.jsonl"):
                table.writerow(row)
                steps += [(row["step"], row["loss"], row["learning_rate"])] if "loss" in row else []
        plot(steps, [(row["step"], row["held_out_loss"]) for row in self.evaluations], self.folder / "loss.png")


def recording_trainer():
    """Return a subclass of transformers' Trainer that keeps a journal, evaluates by source and language, and stops at a signal or leap."""
    import torch
    import torch.distributed as dist
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Stop(TrainerCallback):
        """After the step in which a signal came to any process, all save and stop; a second signal acts at once."""

        asked = False

        def __init__(self):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.ask)

        def ask(self, number, frame):
            self.asked = True
            if "RANK" not in os.environ:  # torchrun passes on what a terminal has sent to all
                signal.signal(number, signal.SIG_DFL)

        def on_step_end(self, args, state, control, **_):
            asked = torch.tensor(self.asked, dtype=torch.int32)
            if args.world_size > 1:
                dist.all_reduce(asked, dist.ReduceOp.MAX)
            if asked and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    class RecordingTrainer(Trainer):
        def begin(self, stage, journal, planned):
            """`stage`: the Stage of this run; `planned`: what make_plan() returned."""
            self.remove_callback(PrinterCallback)
            self.add_callback(Stop())
            # every batch has as many labels as any other, so the mean of the batches' means is the mean
            self.model_accepts_loss_kwargs = False
            self.stage, self.journal, self.planned = stage, journal, planned
            self.peak, self.clock = self.args.world_size * planned.get("peak_flops", 0), time.perf_counter()

        def create_scheduler(self, num_training_steps, optimizer=None):
            if self.lr_scheduler is None:
                args = self.stage.args
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: learning_rate(args, step) / args.learning_rate
                )
                self._created_lr_scheduler = True
            return self.lr_scheduler

        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "loss" not in logs:
                return
            step, own, now = self.state.global_step, self.stage.args, time.perf_counter()
            tokens, seconds = own.global_batch_size * own.sequence_length, now - self.clock
            recent = self.journal.recent
            usual = statistics.fmean(recent) if len(recent) >= ENOUGH else math.inf
            row = {"step": step, "tokens": step * tokens} | {key: logs[key] for key in ("loss", "grad_norm", "learning_rate")}
            row["tokens_per_second"] = round(tokens / seconds)
            if self.peak:
                row["mfu"] = round(tokens * self.planned["flops_per_token"] / seconds / self.peak, 4)
            row["eta_seconds"] = round(seconds * (own.steps - step))
            if not math.isfinite(row["loss"]):
                self.stage.suspect(step, "the loss is no number", self.is_world_process_zero())
            if own.spike and row["loss"] > usual + own.spike:
                words = f"the loss jumped to {row['loss']:.2f} from {usual:.2f}, the mean of the {len(recent)} steps before,"
                self.stage.suspect(step, words, self.is_world_process_zero())
            self.journal.write("metrics.jsonl", row)
            self.clock = time.perf_counter()

        def evaluate(self, *args, **kwargs):
            losses = {}
            for name, data in self.eval_dataset.items():
                losses[name] = super().evaluate(data, metric_key_prefix="part")["part_loss"]
            known = ("loss", "bits_per_byte") if self.stage.args.objective == "causal" else ("loss",)  # other losses are no code's length

            def mean(*which):
                found = pooled(losses, self.stage.held_out, *which)
                return {key: found[key] for key in known}

            whole, step = mean(), self.state.global_step
            row = {"step": step, "held_out_loss": whole.pop("loss"), **whole}
            for place, key in ((1, "by_language"), (0, "by_source")):
                row[key] = {kind: mean(place, kind) for kind in dict.fromkeys(name[place] for name in losses)}
            self.journal.write("metrics.jsonl", row)
            self.journal.write("samples.jsonl", *({"step": step, **sample} for sample in self.stage.samples(self.model)))
            if self.is_world_process_zero():
                bits = f", {row['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in row else ""
                speeds = {key: rates[-1] for key, rates in self.journal.speeds.items() if rates}
                fast = f", {speeds['tokens_per_second']:,} tokens/s" if speeds else ""
                share = f", MFU {speeds['mfu']:.0%}" if "mfu" in speeds else ""
                print(f"step {step}: held-out loss {row['held_out_loss']:.3f}{bits}{fast}{share}", file=sys.stderr)
            self.clock = time.perf_counter()
            return row

        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            self.clock = time.perf_counter()

    return RecordingTrainer


class Stage:
    """What a run is made of: its arguments, the tokens of each source, the model's configuration and tokenizer, and the data."""

    def __init__(self, args, sources):
        """`sources`: {folder: tokens of read_tokens()}."""
        self.args, self.tokens = args, next(iter(sources.values()))
        self.config, self.tokenizer, self.make = prepare(args, self.tokens)
        named = list(sources.items())
        train = [Sequences(Path(folder, one["train"]["file"]), one["dtype"], args.sequence_length) for folder, one in named]
        self.batches = Batches(train, args.weights, args.global_batch_size, args.seed, args.skip_batches)
        self.train = Items(functools.partial(item_of, self.batches), args.steps * args.global_batch_size, self.make, args.seed)
        self.held_out = {(folder, name): part for folder, one in named for name, part in one["held_out"].items()}
        parts = {
            name: Sequences(Path(name[0], part["file"]), self.tokens["dtype"], args.sequence_length) for name, part in self.held_out.items()
        }
        parts = {name: part for name, part in parts.items() if part.rows}
        share = math.ceil(args.eval_sequences / len(parts))
        self.evaluation = {
            name: Items(lambda index, part=part: part.read([index])[0], min(share, part.rows), self.make, args.seed)
            for name, part in parts.items()
        }

    def suspect(self, step, what, writes):
        """Write the documents of a step's batch to suspects.jsonl, in the process that `writes`; always SystemExit, which names them."""
        if not writes:
            sys.exit(1)
        batches, found = self.batches, []
        which, rows = batches.rows(step)
        for index in np.unique(which):
            source = batches.sources[index]
            entries = documents(source, rows[which == index])
            found += [{"file": str(source.path), "sequence": row} | entry for row, entry in entries]
        with write_atomic(Path(self.args.output, "suspects.jsonl"), "w") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in found)
        names = ", ".join(dict.fromkeys(f"{entry['source']} line {entry['line']} ({entry['id']})" for entry in found[:3]))
        number = batches.number(step)
        raise SystemExit(
            f"{STAGE}: {self.args.output}: {what} at step {step}; batch {number} has {names} …, suspects.jsonl all: start again with "
            f"--skip-batches {' '.join(map(str, [*batches.skip, number]))}, or lower --learning-rate, or raise --warmup"
        )

    def samples(self, model):
        """Return [{source, language, prompt, continuation}] of two held-out texts: a decoder goes on (temperature 0.8), an encoder fills in
        what is masked, an encoder-decoder writes what the sentinels stand for. All processes must call it."""
        import torch

        kind, end, size = self.args.objective, self.tokens["eos_token_id"], self.tokens["vocab_size"]
        chance, names, samples = torch.Generator().manual_seed(self.args.seed), list(self.evaluation)[:2], []

        def logits_of(**ids):
            with torch.no_grad():
                logits = model(**{name: torch.tensor([row], device=model.device) for name, row in ids.items()}).logits
            return logits[0].float().cpu()

        model.eval()
        for name, row in [(name, row) for name in names for row in range(2)][:: len(names)]:
            item = self.evaluation[name][row % len(self.evaluation[name])]
            given = item["input_ids"].tolist()
            if kind == "masked":
                guessed = np.where(item["labels"] == -100, given, logits_of(input_ids=given).argmax(-1))
                given, written = given[: PROMPT + SAMPLE], guessed[: PROMPT + SAMPLE].tolist()
            else:
                given = given if kind == "span" else given[: min(PROMPT, len(given) // 2)]
                start, written = [self.config.decoder_start_token_id] if kind == "span" else given, []
                for _ in range(SAMPLE):  # always as many: under ZeRO-3 the processes go through the model together
                    ids = (start + written)[-self.args.sequence_length :]
                    fed = {"input_ids": given, "decoder_input_ids": ids} if kind == "span" else {"input_ids": ids}
                    logits = logits_of(**fed)[-1]
                    if kind == "causal":
                        logits = logits[:size]  # what is behind only fills the matrix up
                    written.append(torch.multinomial(torch.softmax(logits / 0.8, -1), 1, generator=chance).item())
                written = written[: written.index(end)] if end in written else written
            texts = {
                key: self.tokenizer[1].decode(ids, skip_special_tokens=False) for key, ids in (("prompt", given), ("continuation", written))
            }
            samples.append({"source": name[0], "language": name[1], **texts})
        return samples


def train(stage, planned):
    """Train to the last step and return the trainer; SystemExit at a signal, after a checkpoint, or when the loss leaps."""
    import torch
    import torch.distributed as dist
    from transformers import logging, set_seed

    args = stage.args
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls it by older names
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    newest = newest_checkpoint(args.output)
    step = int(newest.name[11:]) if newest else 0
    set_seed(args.seed)
    # before TrainingArguments: once these know of ZeRO-3, a new model is cut up before its weights are drawn
    model = build_model(args, stage.config)
    settings = training_arguments(args, torch.cuda.is_available(), fresh=newest is None)
    trainer = recording_trainer()(model, settings, train_dataset=stage.train, eval_dataset=stage.evaluation, data_collator=collate)
    trainer.begin(stage, Journal(args.output, step, trainer.is_world_process_zero()), planned)
    if step < args.steps:  # asked to go on from its last step, the Trainer would take one more
        trainer.train(resume_from_checkpoint=newest and str(newest))
    if step < args.steps and trainer.state.global_step < args.steps:
        if trainer.is_world_process_zero():
            words = "checkpoint saved; the same command goes on from here"
            print(f"{STAGE}: stopped after step {trainer.state.global_step}, {words}", file=sys.stderr)
        if dist.is_initialized():
            dist.barrier()  # the first process to leave ends the others
        sys.exit(128 + signal.SIGTERM)
    return trainer


def export(args, tokenizer):
    """Write OUTPUT/model: the weights of the last checkpoint, the configuration with the cache on that whoever generates needs (the
    Trainer switches it off), and the tokenizer of marked(): to the byte, where it had the objective's marks."""
    checkpoint, model = Path(args.output, f"checkpoint-{args.steps}"), Path(args.output, "model")
    weights = list(checkpoint.glob("model*.safetensors*"))
    if not weights:
        raise SystemExit(
            f"{STAGE}: {checkpoint} has sharded weights only: run its zero_to_fp32.py, or set stage3_gather_16bit_weights_on_model_save in "
            f"{args.deepspeed} and train again"
        )
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    folder, extended, added, said = tokenizer
    files = [path for name in TOKENIZER_FILES if (path := Path(folder, name)).exists()]
    for path in [*weights, *checkpoint.glob("generation_config.json"), *files]:
        shutil.copy(path, model)
    if added:
        (model / "tokenizer.json").write_text(extended.to_str(pretty=True), encoding="utf-8")
    for path in (model / name for name in TOKENIZER_FILES[1:3] if said):
        if path.exists() or path.name == TOKENIZER_FILES[1]:
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
            path.write_text(json.dumps(old | said, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if "use_cache" in config:
        config["use_cache"] = True
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def launch(processes):
    """Run this command in so many processes under torchrun's agent; leave with the exit code of the first that fails."""
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
    except SignalException as stop:
        print(f"{STAGE}: stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(128 + stop.sigval)


def begin(args):
    """Return the Run of this stage, or leave as it says."""
    inputs = [*args.input, Path(args.tokenizer, "tokenizer.json")]
    inputs += [path for path in (args.model, args.model_config, args.deepspeed) if path and Path(path).exists()]
    run = Run("pretrain", args, inputs, ignore=("skip_batches", "spike", "wandb", "machine", "mfu", "price", "dry_run"))
    for folder in args.input:  # the maps were hashed as they were written, and may be terabytes
        with contextlib.suppress(OSError, ValueError, KeyError):
            for part in json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))["outputs"]:
                run.digests[str(Path(folder, Path(part["path"]).name))] = part["sha256"]
    return run


def begin_together(args):
    """Return the Run in the process of rank 0 and None in the others; if it says to leave, all leave."""
    import torch.distributed as dist

    run, verdict = None, [None]
    if dist.get_rank() == 0:
        try:
            run = begin(args)
        except SystemExit as leave:
            verdict = [leave.code or 0]
    dist.broadcast_object_list(verdict)
    if verdict[0] is not None:
        sys.exit(verdict[0])
    return run


def dry_run(args, stage):
    """Print the plan of a run; SystemExit where it cannot fit."""
    import torch

    if args.machine:
        count, gpu = args.machine.split("x", 1)
        peak, count = GPUS[gpu][0] * 1e12, int(count)
    else:
        peak, count = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.precision), args.nproc_per_node
    planned = make_plan(args, stage.config, stage.train[0], count, peak)
    print(json.dumps(planned | {"settings": vars(args)}, indent=1))
    check_memory(args, planned)


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--input", nargs="+", required=True, metavar="DIR", help="folders of tokenize_corpus.py: several are a mixture")
    add("--weights", nargs="+", type=float, metavar="X", help="shares of the folders (default: by their tokens)")
    add("--tokenizer", required=True, metavar="DIR", help="the tokenizer that wrote the ids")
    add("--output", required=True, metavar="DIR", help="folder for checkpoints, metrics and the model")
    add("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    add("--dry-run", action="store_true", help="print the plan as JSON: parameters, steps, memory, hours, cost")
    add("--machine", metavar="8xH100", help=f"machine of that plan (default: this one): {', '.join(GPUS)}")
    add("--mfu", type=float, default=0.4, metavar="SHARE", help="of the GPUs' peak, assumed in the plan (default: 0.4)")
    add("--price", type=float, metavar="X", help="of an hour of one GPU, for the plan's cost")
    add("--model", metavar="DIR", help="go on from these weights; its tokenizer must give the same ids")
    add("--model-config", metavar="FILE", help="config.json of any model of transformers, in place of the sizes of an Olmo2 below")
    add("--objective", choices=("auto", *HEADS), default="auto", help="auto (default): by the configuration's class")
    add("--d-model", type=int, default=768, metavar="N", help="width (default: 768)")
    add("--n-layers", type=int, default=12, metavar="N", help="default: 12")
    add("--n-heads", type=int, default=12, metavar="N", help="default: 12")
    add("--n-kv-heads", type=int, metavar="N", help="heads of keys and values (default: as n-heads)")
    add("--mlp-hidden-size", type=int, metavar="N", help="both halves of the SwiGLU, as OLMo counts (default: 4 × d-model)")
    add("--rope-theta", type=int, default=500_000, metavar="N", help="default: 500000")
    add("--tie-weights", action=switch, default=False, help="one matrix for embedding and output")
    add("--sequence-length", type=int, default=2048, metavar="N", help="tokens (default: 2048)")
    add("--steps", type=int, metavar="N", help="length of the run (or --tokens)")
    add("--tokens", type=float, metavar="N", help="length of the run in tokens, rounded up to a step")
    add("--global-batch-size", type=int, default=512, metavar="N", help="sequences a step, over all processes (default: 512)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="sequences a process takes at once (default: 8)")
    add("--learning-rate", type=float, default=4e-4, metavar="X", help="peak (default: 4e-4)")
    add("--warmup", type=int, default=2000, metavar="N", help="steps of linear warm-up (default: 2000)")
    add("--schedule", choices=("constant", "cosine", "linear", "wsd"), default="cosine", help="after the warm-up (default: cosine)")
    add("--decay", type=float, default=0.1, metavar="SHARE", help="of the run in which wsd goes down linearly (default: 0.1)")
    add("--final-rate", type=float, default=0.1, metavar="SHARE", help="of the peak, at the last step (default: 0.1)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="default: 0.1; norms have none")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (default: 1.0)")
    add("--precision", choices=("fp32", "amp_bf16"), default="amp_bf16", help="of the forward and backward pass (default: amp_bf16)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--eval-sequences", type=int, default=1024, metavar="N", help="of the held-out text, always the same (default: 1024)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints (default: 2)")
    add("--seed", type=int, default=1, metavar="N", help="of weights and data order (default: 1)")
    add(
        "--spike",
        type=float,
        default=1.0,
        metavar="X",
        help=f"nats above the mean of {RECENT} steps that stop the run; 0: none (default: 1)",
    )
    add("--skip-batches", nargs="+", type=int, default=[], metavar="N", help="leave these out: a run stopped by its loss goes on without")
    add("--deepspeed", default="zero2", metavar="HOW", help="zero1, zero2, zero3, none, or a DeepSpeed JSON file (default: zero2)")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes started here; several nodes: torchrun (default: 1)")
    add("--compile", action=switch, default=False, help="torch.compile the model")
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
    if args.d_model % args.n_heads or args.n_heads % (args.n_kv_heads or args.n_heads) or (args.d_model // args.n_heads) % 2:
        parser.error("--n-heads must divide --d-model into even parts, --n-kv-heads must divide --n-heads")
    if args.global_batch_size % (processes * args.micro_batch_size):
        parser.error(f"--global-batch-size must be a multiple of {processes} processes × --micro-batch-size {args.micro_batch_size}")
    if args.deepspeed not in (*ZERO, "none") and not Path(args.deepspeed).is_file():
        parser.error(f"--deepspeed {args.deepspeed}: neither zero1, zero2, zero3 or none, nor a file")
    if args.weights and (len(args.weights) != len(args.input) or min(args.weights) <= 0):
        parser.error(f"--weights: one above 0 for each of the {len(args.input)} folders of --input")
    if args.model and args.model_config:
        parser.error("give --model or --model-config, one of them: weights come with their configuration")
    if args.flash_attention and not args.dry_run and not importlib.util.find_spec("flash_attn"):
        parser.error("--flash-attention: the package flash-attn is not installed; install it on the GPU machine, or leave the flag out")
    if args.flash_attention and args.precision == "fp32":
        parser.error("--flash-attention: it knows no fp32; take --precision amp_bf16")
    return args


def main():
    parser = build_parser()
    args = checked(parser, config_argv(parser, sys.argv[1:]))
    sources = {folder: read_tokens(folder, args.tokenizer) for folder in args.input}
    for folder, tokens in sources.items():
        count = tokens["train"]["tokens"] // args.sequence_length
        if count < args.global_batch_size or all(part["tokens"] < args.sequence_length for part in tokens["held_out"].values()):
            raise SystemExit(
                f"{STAGE}: {folder}: {count} training sequences of {args.sequence_length} tokens do not fill a batch, or no held-out "
                f"file holds one; take more text, or a shorter --sequence-length, or a smaller --global-batch-size"
            )
    alone = "RANK" not in os.environ
    # before the imports, which take many seconds
    run = begin(args) if alone and not args.dry_run else None
    for noisy in ("torchao", "torch.utils._pytree"):  # imported along: kernels that are not used, and how they are written
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, and packages that are imported along would ask the hub
    if args.dry_run:
        return dry_run(args, Stage(args, sources))
    if alone and (args.nproc_per_node > 1 or args.deepspeed != "none"):
        return launch(args.nproc_per_node)
    if args.wandb:
        os.environ["WANDB_PROJECT"] = args.wandb
    if not alone:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the launcher is killed, this process is as well
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not alone:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        run = begin_together(args)
    try:
        stage = Stage(args, sources)
        peak = peak_flops(torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), args.precision)
        planned = make_plan(args, stage.config, stage.train[0], int(os.environ.get("WORLD_SIZE", 1)), peak)
        check_memory(args, planned)
    except SystemExit as leave:
        raise SystemExit(leave.code if run else 1) from None  # one of the processes says it
    trainer = train(stage, planned)
    if run:
        export(args, stage.tokenizer)
        journal = trainer.journal
        journal.finish()
        first, last = journal.evaluations[0], journal.evaluations[-1]
        metrics = {"first": first, "last": last, "processes": trainer.args.world_size, "engine": "hf"}
        metrics |= {key: statistics.median_low(rates) for key, rates in journal.speeds.items() if rates}
        bits = f", {last['bits_per_byte']:.2f} bits/byte" if "bits_per_byte" in last else ""
        tokens = args.steps * args.global_batch_size * args.sequence_length
        run.finish(
            f"held-out loss {first['held_out_loss']:.2f} -> {last['held_out_loss']:.2f}{bits}",
            counts={"parameters": planned["parameters"], "steps": args.steps, "tokens": tokens},
            metrics=metrics,
        )
    if not alone:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
