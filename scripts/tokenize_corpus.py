#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=1.26", "orjson>=3.10", "pyyaml>=6", "tokenizers>=0.21", "tqdm>=4.66", "zstandard>=0.22"]
# ///
"""Encode documents into token memory maps as OLMo reads them, with a document index and a held-out split by language.

Usage:
    python scripts/tokenize_corpus.py --input data/out/demo/dedup --tokenizer data/out/demo/tokenizer --output /tmp/tokens
    make tokens RECIPE=demo

Reads   documents {"id", "text"} as .jsonl (plain, .gz, .zst), files and folders; a folder with tokenizer.json and tokenizer_config.json.
Writes  OUTPUT/train.npy and one OUTPUT/held-out.LANGUAGE.npy for each language: token ids without a numpy header, an end-of-text id
        after each document; beside each a .csv.gz with the columns start,end,id,source,line (no heading; as dolma writes them);
        OUTPUT/tokens.json: dtype, ids, counts of tokens and bytes; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network; memory for one batch of documents.

A document is held out when the hash of its id falls into the share: the same one whatever else is in the corpus. Its language is
`meta.language`, or else the script of most of its first letters.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import zstandard
from tqdm import tqdm

STAGE = "tokenize_corpus"
BATCH = 4 << 20  # characters of text encoded at once, by all cores


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
def held_out(identity, share):
    """True for about `share` of all ids, always the same ones: by the hash of the id."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") < share * 2**64


def language(document):
    """Return the document's `meta.language`, or else the script of most of its first letters: "latin", "cjk", "cyrillic" …"""
    meta = document.get("meta")
    if isinstance(meta, dict) and meta.get("language"):
        return re.sub(r"\W", "-", str(meta["language"]))  # it becomes a part of a file's name
    scripts = Counter(unicodedata.name(c, "other").split()[0].lower() for c in document["text"][:300] if c.isalpha())
    return max(scripts, key=scripts.get, default="other")


class Hashed(io.RawIOBase):
    """A file whose SHA-256 is taken as it is read; `on_read(size)` is called after each piece."""

    def __init__(self, path, on_read):
        self.file, self.sha256, self.on_read = open(path, "rb", buffering=0), hashlib.sha256(), on_read

    def readable(self):
        return True

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:size])
        self.on_read(size)
        return size


def document_files(paths):
    """Return the .jsonl files (plain, .gz, .zst) of files and folders; of a stage's folder those named data*. SystemExit if none."""
    found = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*.jsonl*") if not f.name.startswith(".")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise SystemExit(f"{STAGE}: {path}: no .jsonl file there; name a file or folder of documents")
        found += [f for f in files if f.name.startswith("data")] or files
    return found


def read_documents(files, digests, limit=None):
    """Yield (path, line number, document) and note each file's SHA-256 in `digests`; SystemExit at the first line that is no document."""
    total = 0
    with tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for path in files:
            raw, number = Hashed(path, bar.update), 0
            opened = {".gz": gzip.open, ".zst": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)}
            try:
                for number, line in enumerate(io.BufferedReader(opened.get(path.suffix, lambda file: file)(raw), 1 << 20), 1):
                    document = orjson.loads(line)
                    if not all(isinstance(document[key], str) for key in ("id", "text")):
                        raise ValueError("`id` and `text` must be strings")
                    yield path, number, document
                    total += 1
                    if total == limit:
                        return
            except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
                raise SystemExit(f"{STAGE}: {path}: damaged after line {number} ({error}); write that file again") from None
            except (ValueError, TypeError, KeyError) as error:
                why = f"no field {error}" if isinstance(error, KeyError) else error
                raise SystemExit(f"{STAGE}: {path} line {number}: no document ({why}); mend or remove that line") from None
            digests[str(path)] = raw.sha256.hexdigest()
    if not total:
        raise SystemExit(f"{STAGE}: {files[0]}: no document in it; run the stage before this one, or correct --input")


def batches(stream):
    """Yield lists of (path, line number, document) with about BATCH characters of text."""
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[2]["text"])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Split:
    """A memory map of tokens and its index, both under temporary names until `files` closes."""

    def __init__(self, output, name, files):
        self.name, self.path = name, output / f"{name}.npy"
        self.tokens, self.sha256, self.counts = files.enter_context(write_atomic(self.path)), hashlib.sha256(), Counter()
        packed = files.enter_context(write_atomic(output / f"{name}.csv.gz"))
        # without a name and a time inside, equal runs give equal files
        self.index = io.TextIOWrapper(files.enter_context(gzip.GzipFile("", "wb", fileobj=packed, mtime=0)), encoding="utf-8", newline="")
        files.callback(self.index.flush)
        self.rows = csv.writer(self.index, lineterminator="\n")

    def write(self, ids, path, number, document):
        """Append one document: its ids, an array of the map's dtype that ends with the end-of-text id, and its row."""
        data, start = ids.tobytes(), self.counts["tokens"]
        self.tokens.write(data)
        self.sha256.update(data)
        self.rows.writerow([start, start + len(ids), document["id"], document.get("source") or path, number])
        self.counts.update(documents=1, tokens=len(ids), bytes=len(document["text"].encode()))


def load_tokenizer(folder):
    """Return (tokenizer, {"eos_token_id", "pad_token_id"}) of a folder that train_tokenizer.py or transformers wrote."""
    from tokenizers import Tokenizer

    path = Path(folder, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        config = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
        named = {role: config.get(f"{role}_token") for role in ("eos", "pad")}
        named = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
        ids = {f"{role}_token_id": tokenizer.token_to_id(token or "") for role, token in named.items()}
    except OSError as error:
        raise SystemExit(f"{STAGE}: {error.filename}: {error.strerror}; give --tokenizer a folder of train_tokenizer.py") from None
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise SystemExit(f"{STAGE}: {folder}: no tokenizer ({error}); write it anew with train_tokenizer.py") from None
    if ids["eos_token_id"] is None or ids["pad_token_id"] in (None, ids["eos_token_id"]):
        raise SystemExit(f"{STAGE}: {folder}: eos and pad must be two tokens of it, not {named}; name them in tokenizer_config.json")
    return tokenizer, ids


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files and folders of documents")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the memory maps")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    parser.add_argument("--limit", type=int, metavar="N", help="read N documents only")
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE", help="share of documents not trained on (default: 0.02)")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: a share between 0 and 1")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here, and shells often switch it off
    files = document_files(args.input)
    tokenizer, ids = load_tokenizer(args.tokenizer)
    tokenizer_files = [Path(args.tokenizer, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    run = Run("tokens", args, files + tokenizer_files)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" that somebody wrote in a text is text, and ends no document
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary, end = tokenizer.get_vocab_size(), ids["eos_token_id"]
    dtype = np.dtype("uint16" if vocabulary <= 1 << 16 else "uint32")
    splits, start = {}, time.perf_counter()
    with contextlib.ExitStack() as opened:
        splits["train"] = Split(run.output, "train", opened)
        for batch in batches(read_documents(files, run.digests, args.limit)):
            encodings = tokenizer.encode_batch_fast([document["text"] for _, _, document in batch], add_special_tokens=False)
            for (path, number, document), encoding in zip(batch, encodings, strict=True):
                name = f"held-out.{language(document)}" if held_out(document["id"], args.held_out) else "train"
                if name not in splits:
                    splits[name] = Split(run.output, name, opened)
                splits[name].write(np.array([*encoding.ids, end], dtype), path, number, document)
        seen = sum(split.counts["documents"] for split in splits.values())
        if len(splits) == 1 or not splits["train"].counts:
            raise SystemExit(
                f"{STAGE}: {files[0]}: of {seen} documents {seen - splits['train'].counts['documents']} are in the held-out "
                f"{args.held_out:.2%}; change --held-out so that both parts have some"
            )
    seconds = time.perf_counter() - start
    counts = {name: {"file": split.path.name, **split.counts} for name, split in sorted(splits.items())}
    described = {"dtype": dtype.name, "vocab_size": vocabulary, **ids, "tokenizer_sha256": run.sha256(tokenizer_files[0])}
    described |= {"train": counts.pop("train"), "held_out": {name.removeprefix("held-out."): count for name, count in counts.items()}}
    with write_atomic(run.output / "tokens.json", "w") as file:
        json.dump(described, file, ensure_ascii=False, indent=1)
    run.digests |= {str(split.path): split.sha256.hexdigest() for split in splits.values()}
    kept = sum(split.counts["tokens"] for split in splits.values())
    rate = kept / seconds
    run.finish(
        f"{kept:,} tokens, {kept - splits['train'].counts['tokens']:,} of them held out, {rate:,.0f} tokens/s",
        counts={"documents": seen, "tokens": kept, "held_out_tokens": kept - splits["train"].counts["tokens"]},
        metrics={"tokens_per_second": round(rate), "held_out": described["held_out"]},
        records={split.path.name: split.counts["documents"] for split in splits.values()},
    )


if __name__ == "__main__":
    run_main(main)
