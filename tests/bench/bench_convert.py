#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "accelerate>=1", "ai2-olmo==0.6.0", "ai2-olmo-core>=3", "pyyaml>=6", "tokenizers>=0.22", "torch>=2.6",
#   "torchmetrics>=1.4", "tqdm>=4.66", "transformers>=4.57",
# ]
# [tool.uv]
# override-dependencies = ["ai2-olmo-core==3.0.0"]
# ///
"""What convert_olmo_to_hf.py takes, beside `cp` and a checksum of the same checkpoint on the same disk and the packages' own converters.

Usage:
    python tests/bench/bench_convert.py --sizes 0.1B 1B --rounds 3
    make bench-convert

A checkpoint of ai2-olmo (model.pt) and one of olmo-core (model_and_optim/) of each size, float32, random weights, are written in pieces. In
each round every converter runs once, one after the other, each time with none of the checkpoint's pages in memory and with an output that
is new; the next round begins with another one. Shown are medians: seconds, beside those of `cp`, `sync` and `sha256sum` in the same round;
CPU seconds; the peaks of all memory, mapped pages included, and of anonymous memory alone; and the bytes that were written.
The rows "logits compared" hold both models; "layer by layer" is the same under a limit of memory (`prlimit --data`) that they exceed.

Reads   nothing.
Writes  a table on stdout, or one JSON object with --json; below FOLDER up to three times a checkpoint, deleted at the end.
Exit    0 done; 1 a run failed that should not; 2 bad usage.
Needs   the environment of convert_olmo_to_hf.py, 20 GB of disk for 1B; with --validate 10 GB of memory and, on two CPU cores, an hour.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_olmo_to_hf.py"
SIZES = {"0.1B": (768, 12, 12, 2048), "1B": (2048, 16, 16, 8192)}  # width, layers, heads, width of the feed-forward
VOCABULARY, LENGTH = 50_304, 2048
COPY = 'cp -r "$1" "$2"; find "$2" -type f -exec sync {} +; find "$2" -type f -exec sha256sum {} +'
OWN = {
    "model.pt": """
import sys
from hf_olmo.convert_olmo_to_hf import convert_checkpoint
convert_checkpoint(sys.argv[2])
""",
    "core": """
import json, sys
from pathlib import Path
from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf
source, target, tokenizer, validate = sys.argv[1:]
config = json.loads(Path(source, "config.json").read_text())
settings = {"tokenizer_id": tokenizer, "max_sequence_length": config["dataset"]["sequence_length"], "validate": validate == "yes"}
convert_checkpoint_to_hf(source, target, config["model"], config["dataset"]["tokenizer"], **settings)
""",
}


def noise(shape):
    """Return a tensor of that shape, of normal numbers that repeat after eight million."""
    import torch

    if not hasattr(noise, "numbers"):
        noise.numbers = torch.randn(2**23, generator=torch.Generator().manual_seed(1)) * 0.02
    count = torch.Size(shape).numel()
    return noise.numbers.repeat(-(-count // 2**23))[:count].view(shape)


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "<|pad|>", "<unk>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def make_legacy(folder, size, tokenizer):
    """Write model.pt and config.yaml of an OLMo-1 with tied embeddings, the tensors' bytes after the rest."""
    import torch
    import yaml
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    width, layers, heads, inner = size
    config = ModelConfig(d_model=width, n_layers=layers, n_heads=heads, mlp_hidden_size=2 * inner, rope=True, include_bias=False)
    config.layer_norm_with_affine, config.weight_tying, config.max_sequence_length, config.init_device = False, True, LENGTH, "meta"
    config.vocab_size, config.embedding_size, config.eos_token_id, config.pad_token_id = VOCABULARY, VOCABULARY, 0, 1
    folder.mkdir()
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(weight.shape) for name, weight in OLMo(config).state_dict().items()}, folder / "model.pt")
    with open(folder / "model.pt", "r+b") as file:
        for record in zipfile.ZipFile(folder / "model.pt").infolist():
            if "/data/" in record.filename:
                file.seek(record.header_offset + 26)
                file.seek(record.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2)))
                file.write(noise([record.file_size // 4]).numpy())
    settings = {"model": json.loads(json.dumps(config.asdict())), "tokenizer": {"identifier": str(tokenizer / "tokenizer.json")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def make_core(folder, size, tokenizer):
    """Write model_and_optim/ and config.json of an OLMo-2 with tied embeddings, by olmo-core's own writer."""
    from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
    from torch.distributed import checkpoint

    width, layers, heads, inner = size
    sizes = {"d_model": width, "n_layers": layers, "n_heads": heads, "vocab_size": VOCABULARY, "layer_norm_eps": 1e-6}
    kind = {"block_name": TransformerBlockType.reordered_norm, "qk_norm": True, "tie_word_embeddings": True}
    config = TransformerConfig.llama_like(feed_forward=FeedForwardConfig(hidden_size=inner, bias=False), **sizes, **kind)
    empty = {f"model.{name}": weight for name, weight in config.build(init_device="meta").state_dict().items()}

    class Planner(checkpoint.DefaultSavePlanner):
        def lookup_object(self, index):
            shape = empty[index.fqn].shape
            return noise(shape) + (len(shape) == 1)  # a norm's weights are around 1

    folder.mkdir()
    writer = RemoteFileSystemWriter(folder / "model_and_optim", thread_count=1)
    checkpoint.state_dict_saver.save(empty, storage_writer=writer, planner=Planner(), no_dist=True)
    words = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1, "identifier": str(tokenizer)}
    written = {"model": config.as_config_dict(), "dataset": {"tokenizer": words, "sequence_length": LENGTH}}
    (folder / "config.json").write_text(json.dumps(written))


def forget(folder):
    """Put a folder's files on disk and their pages out of memory."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command, log):
    """Run a command; return its figures, or {"failed": its last line}. Memory is looked at every hundredth of a second."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    peaks, start = {"VmHWM": 0, "RssAnon": 0}, time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
    while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], 1024 * int(value.split()[0]))
        time.sleep(0.01)
    seconds, (_, status, usage) = time.monotonic() - start, waited
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return {"failed": (log.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1][:150]}
    figures = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": peaks["VmHWM"]}
    return figures | {"anonymous_bytes": peaks["RssAnon"], "written_bytes": 512 * usage.ru_oublock}


def commands(kind, source, target, tokenizer, validate, parameters):
    """Return {row: command} of a checkpoint: cp first, then ours, then the package's own converter."""
    python, package = sys.executable, {"model.pt": "hf_olmo (ai2-olmo)", "core": "olmo_core's"}[kind]
    ours = [python, "-I", SCRIPT, "--input", source, "--tokenizer", tokenizer, "--output", target]
    limited = ["prlimit", f"--data={8 * parameters + 24 * 512 * VOCABULARY}", *ours]
    own = [python, "-c", OWN[kind], source, target, tokenizer]
    rows = {"cp, sync, sha256sum": ["sh", "-ec", COPY, "sh", source, target], "ours": [*ours, "--skip-validation"], package: [*own, "no"]}
    if validate:
        rows |= {"ours, logits compared": ours, "ours, compared layer by layer": limited}
        rows |= {f"{package}, 60 tokens compared": [*own, "yes"]} if kind == "core" else {}
    return rows


def measure(args, root, size, kind):
    """Return {row: [figures of each round]} of one checkpoint."""
    source, target, tokenizer = root / kind, root / "out", root / "tokenizer"
    {"model.pt": make_legacy, "core": make_core}[kind](source, SIZES[size], tokenizer)
    width, layers, _, inner = SIZES[size]
    parameters = VOCABULARY * width + layers * (4 * width * width + 3 * width * inner)
    rows, found = list(commands(kind, source, target, tokenizer, args.validate, parameters).items()), {}
    for number in range(args.rounds):
        for row, command in rows[number % len(rows) :] + rows[: number % len(rows)]:
            forget(source)
            if row.startswith("hf_olmo"):  # it converts in place
                shutil.copytree(source, target, copy_function=os.link)
            figures = measured(command, root / "log")
            print(f"bench_convert: {size} {kind}, round {number + 1}, {row}: {figures}", file=sys.stderr)
            if "failed" in figures and (row.startswith("ours") or row.startswith("cp")):
                raise SystemExit(f"bench_convert: {row}: {figures['failed']}")
            found.setdefault(row, []).append(figures)
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(source)
    return found


def table(results):
    """Print the medians."""
    print("| model | checkpoint | run | seconds | × cp | CPU s | peak MB | anonymous MB | written MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (size, kind), rows in results.items():
        base = next(iter(rows.values()))
        for row, rounds in rows.items():
            cells = [size, kind, row]
            if failed := next((figures["failed"] for figures in rounds if "failed" in figures), ""):
                cells += [f"failed: {failed}", *[""] * 5]
            else:
                middle = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
                ratio = statistics.median(ours["seconds"] / cp["seconds"] for ours, cp in zip(rounds, base, strict=True))
                cells += [f"{middle['seconds']:.1f}", f"{ratio:.2f}", f"{middle['cpu_seconds']:.1f}"]
                cells += [f"{middle[key] / 1e6:,.0f}" for key in ("peak_bytes", "anonymous_bytes", "written_bytes")]
            print(f"| {' | '.join(cells)} |")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="parameters (default: both)")
    add("--kinds", nargs="+", choices=OWN, default=list(OWN), help="kinds of checkpoint (default: both)")
    add("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--validate", action=argparse.BooleanOptionalAction, default=False, help="also with the logits compared")
    add("--folder", type=Path, default=Path("data/out"), metavar="DIR", help="a folder on the disk that is measured (default: data/out)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main():
    args = build_parser().parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.folder.resolve()) as folder:
        make_tokenizer(Path(folder, "tokenizer"))
        for size in args.sizes:
            for kind in args.kinds:
                results[size, kind] = measure(args, Path(folder), size, kind)
    names = ("ai2-olmo", "ai2-olmo-core", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    if args.json:
        print(json.dumps({"versions": versions, "results": [[*key, rows] for key, rows in results.items()]}))
        return
    table(results)
    print(f"\n{os.cpu_count()} CPU cores; {', '.join(map(' '.join, versions.items()))}; medians of {args.rounds}")


if __name__ == "__main__":
    main()
