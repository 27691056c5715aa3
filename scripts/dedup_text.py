#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["numba>=0.60", "numpy>=1.26", "orjson>=3.10", "pyarrow>=17", "pyyaml>=6", "tqdm>=4.66"]
# ///
"""Remove exact and near duplicates from documents; each removal is verified by exact Jaccard against a document that is kept.

Usage:
    python scripts/dedup_text.py --input data/out/demo/clean-text --output /tmp/dedup --threshold 0.8
    make dedup RECIPE=demo

Reads   documents {"id", "text", "source"} as .jsonl (plain, .gz, .zst) or .parquet; files, folders and globs.
Writes  OUTPUT/data.jsonl: the kept lines, unchanged and in order; OUTPUT/removed.jsonl of {"id", "kept_id", "jaccard", "source"};
        OUTPUT/rejected.jsonl: lines that are no documents; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or a source lost too much; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network; memory for all text and about 900 bytes a document; once 5 s to compile, then cached.

Similarity is the Jaccard index of the sets of 5-grams of lower-cased words, where each Chinese, Japanese, Korean or Thai
character is a word. MinHash signatures in bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3) propose
pairs. Documents are taken in order, and one goes only if it is similar enough to one that stays: nothing is chained.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
from tqdm import tqdm

SUFFIXES = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".parquet": None}
STAGE_FILES = {"rejected.jsonl", "removed.jsonl", "losses.jsonl"}  # what another stage's folder holds beside its data
NGRAM = 5
SIGNATURE = 128  # hash functions; an estimate's standard error is 0.035 at Jaccard 0.8
SLACK = 0.15  # an estimate this far (4 standard errors) below the threshold is not verified
CHAIN = 256  # kept documents looked at in one bucket, the latest first
SINGLE = np.uint32(1 << 31)  # marks a character that is a word by itself
CODES = 0x20000  # characters from here on are rare ideographs, each a word by itself


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


def character_table():
    """Return uint32 [CODES]: for each character 0 (parts words), its lower case (part of a word), or that with SINGLE set."""
    table = np.zeros(CODES, np.uint32)
    for code in range(CODES):
        if unicodedata.category(char := chr(code))[0] in "LMN" or char == "_":
            table[code] = ord(char.lower()) if len(char.lower()) == 1 else code
    for first, last in ((0x0E00, 0x0EFF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF)):
        table[first : last + 1] |= np.where(table[first : last + 1], SINGLE, np.uint32(0))
    return table


# The functions up to compile_kernels are numba kernels: typed loops, unsigned constants (uint64 with int64 would make a float64).


def mix(x):
    """Return the uint64 `x` scrambled (splitmix64's finaliser)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words(text, at, end, table, out):
    """Put a hash of each word of the UTF-8 bytes text[at:end] into `out`; return their number."""
    count, word, inside = 0, np.uint64(0), False
    while at < end:
        byte = np.uint32(text[at])
        size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        code = byte if size == 1 else byte & np.uint32(0x7F >> size)
        for i in range(1, size):
            code = (code << np.uint32(6)) | np.uint32(text[at + i] & 0x3F)
        at += size
        char = table[code] if code < CODES else code | SINGLE
        if char and not char & SINGLE:
            word = (word ^ np.uint64(char)) * np.uint64(0x100000001B3)
            word ^= word >> np.uint64(29)
            inside = True
            continue
        if inside:
            out[count] = word
            count, word, inside = count + 1, np.uint64(0), False
        if char:
            out[count] = mix(np.uint64(char))
            count += 1
    if inside:
        out[count] = word
        count += 1
    return count


def shingles(text, at, end, table, out):
    """Put the 64-bit shingles of text[at:end] into `out` (end - at + 1 places); return their number, at least 1.

    A document of fewer than NGRAM words is one shingle of all of them; one without a word is a shingle of its bytes.
    """
    count = words(text, at, end, table, out)
    if not count:
        out[0] = np.uint64(0x9E3779B97F4A7C15)
        for i in range(at, end):
            out[0] = mix(out[0] ^ np.uint64(text[i]))
        return 1
    width = min(count, NGRAM)
    for i in range(count - width + 1):
        shingle = np.uint64(width)
        for j in range(width):
            shingle = (shingle ^ out[i + j]) * np.uint64(0x9E3779B97F4A7C15)
            shingle ^= shingle >> np.uint64(32)
        out[i] = mix(shingle)
    return count - width + 1


def sign(text, offsets, first, last, table, factors, terms, signatures, whole, keys):
    """Fill, for documents first … last - 1, `signatures` uint32 [documents, SIGNATURE], `whole` uint64 [documents] (a hash
    of all shingles in order) and `keys` uint32 [bands, documents]."""
    longest = 0
    for i in range(first, last):
        longest = max(longest, offsets[i + 1] - offsets[i])
    found = np.empty(longest + 1, np.uint64)
    bands, rows = len(keys), SIGNATURE // len(keys)
    for i in range(first, last):
        signature = signatures[i]
        signature[:] = np.uint32(0xFFFFFFFF)
        total = np.uint64(0)
        for s in range(shingles(text, offsets[i], offsets[i + 1], table, found)):
            total = mix(total ^ found[s])
            value = np.uint32(found[s] >> np.uint64(32))
            for p in range(SIGNATURE):
                signature[p] = min(signature[p], np.uint32(factors[p] * value + terms[p]))
        whole[i] = total
        for band in range(bands):
            key = np.uint64(band)
            for p in range(band * rows, band * rows + rows):
                key = mix(key ^ np.uint64(signature[p]))
            keys[band, i] = np.uint32(key >> np.uint64(32))


def jaccard(a, b):
    """Return |A ∩ B| / |A ∪ B| of two arrays of shingles, which may hold one twice."""
    places = 4
    while places < 2 * (len(a) + len(b)):
        places *= 2
    slots, owner = np.zeros(places, np.uint64), np.zeros(places, np.uint8)  # owner: 0 free, 1 only a, 2 only b, 3 both
    sizes = np.zeros(4, np.int64)
    for side in range(1, 3):
        for value in a if side == 1 else b:
            at = np.int64(value & np.uint64(places - 1))
            while owner[at] and slots[at] != value:
                at = (at + 1) & (places - 1)
            slots[at] = value
            sizes[owner[at]] -= 1
            owner[at] |= side
            sizes[owner[at]] += 1
    return sizes[3] / (sizes[1] + sizes[2] + sizes[3])


def lead(text, offsets, table, signatures, whole, buckets, threshold, kept_by, score):
    """Take the documents in order and remove each whose exact Jaccard with a kept one is at least `threshold`.

    `buckets` int32 [bands, documents], -1 for a document alone in its bucket. Fills `kept_by` (the kept document's number,
    -1 for a kept document) and `score` (the Jaccard index); returns the number of exact comparisons.
    """
    latest = np.full(buckets.max() + 1, -1, np.int32)  # each bucket's latest kept document …
    before = np.empty(buckets.shape, np.int32)  # … and from each to the one before it
    seen = np.full(len(whole), -1, np.int64)
    compared = 0
    for i in range(len(whole)):
        own = np.empty(0, np.uint64)
        for band in range(len(buckets)):
            if kept_by[i] >= 0 or buckets[band, i] < 0:
                continue
            j, steps = latest[buckets[band, i]], 0
            while j >= 0 and steps < CHAIN and kept_by[i] < 0:
                if seen[j] != i:
                    seen[j] = i
                    if whole[i] == whole[j]:
                        kept_by[i], score[i] = j, 1
                    elif np.sum(signatures[i] == signatures[j]) >= (threshold - SLACK) * SIGNATURE:
                        if not len(own):
                            own = np.empty(offsets[i + 1] - offsets[i] + 1, np.uint64)
                            own = own[: shingles(text, offsets[i], offsets[i + 1], table, own)]
                        other = np.empty(offsets[j + 1] - offsets[j] + 1, np.uint64)
                        similar = jaccard(own, other[: shingles(text, offsets[j], offsets[j + 1], table, other)])
                        compared += 1
                        if similar >= threshold:
                            kept_by[i], score[i] = j, similar
                j, steps = before[band, j], steps + 1
        if kept_by[i] < 0:
            for band in range(len(buckets)):
                if buckets[band, i] >= 0:
                    before[band, i] = latest[buckets[band, i]]
                    latest[buckets[band, i]] = i
    return compared


def compile_kernels():
    """Replace the kernels above by compiled ones, cached in the script's folder or else in the user's cache."""
    import numba

    for kernel in (mix, words, shingles, sign, jaccard, lead):
        try:
            compiled = numba.njit(cache=True, nogil=True)(kernel)
        except RuntimeError:  # neither place can be written: compiled for this run only
            compiled = numba.njit(nogil=True)(kernel)
        globals()[kernel.__name__] = compiled


def band_count(threshold):
    """Return the smallest number of bands, of SIGNATURE // bands rows each, that find a pair at `threshold` with probability 0.998."""
    found = (bands for bands in range(1, SIGNATURE) if (1 - threshold ** (SIGNATURE // bands)) ** bands <= 0.002)
    return next(found, SIGNATURE)


def number_buckets(keys):
    """Return int32 [bands, documents]: bucket numbers, the bands' one after another; -1 for a document alone in its bucket."""
    buckets, count = np.full(keys.shape, -1, np.int32), 0
    documents = np.arange(keys.shape[1], dtype=np.uint64)
    for band, key in enumerate(keys):
        order = np.sort(key.astype(np.uint64) << np.uint64(32) | documents)  # six times faster than argsort
        key, document = order >> np.uint64(32), order & np.uint64(0xFFFFFFFF)
        first = np.append(True, key[1:] != key[:-1])
        shared = ~(first & np.append(first[1:], True))
        number = np.cumsum(first & shared) + count - 1
        buckets[band, document[shared]] = number[shared]
        count = number[-1] + 1
    return buckets


def find_duplicates(text, lengths, threshold):
    """Return (kept_by, score, comparisons) for documents that stand one after another in `text`, UTF-8 bytes.

    kept_by int64 [documents]: the number of the kept document that each removed one resembles, -1 for a kept one;
    score float64 [documents]: their exact Jaccard index.
    """
    compile_kernels()
    count, workers = len(lengths), os.cpu_count()
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    text, table, random = np.frombuffer(text or b"\0", np.uint8), character_table(), np.random.default_rng(1)
    factors, terms = random.integers(0, 1 << 32, (2, SIGNATURE), dtype=np.uint32)
    factors |= np.uint32(1)  # odd: a permutation of the 32-bit values
    signatures, whole = np.empty((count, SIGNATURE), np.uint32), np.empty(count, np.uint64)
    keys = np.empty((band_count(threshold), count), np.uint32)
    cuts = np.unique(np.append(np.searchsorted(offsets, np.linspace(0, offsets[-1], 16 * workers, endpoint=False)), count))
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda a, b: sign(text, offsets, a, b, table, factors, terms, signatures, whole, keys), cuts, cuts[1:])
        list(tqdm(parts, total=len(cuts) - 1, unit=" parts", disable=not sys.stderr.isatty()))
    kept_by, score = np.full(count, -1), np.zeros(count)
    return kept_by, score, lead(text, offsets, table, signatures, whole, number_buckets(keys), threshold, kept_by, score)


def input_files(paths):
    """Return (path, suffix) of each document file in `paths` (files, folders, globs), sorted; SystemExit where there is none."""
    found = []
    for word in paths:
        tops = [Path(word)] if Path(word).exists() else [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        files = [f for top in tops for f in (sorted(top.rglob("*")) if top.is_dir() else [top]) if f.name not in STAGE_FILES]
        files = [(f, suffix) for f in files for suffix in SUFFIXES if f.name.endswith(suffix) and not f.name.startswith(".")]
        if not files:
            raise SystemExit(f"dedup_text: {word}: no {', '.join(SUFFIXES)} file there; correct --input, or run clean_text.py on raw text")
        found += files
    return found


class Hashed(io.RawIOBase):
    """A file whose SHA-256 grows with what is read of it, so that no second pass is needed; `whole` once all is read."""

    def __init__(self, path):
        self.file, self.sha256, self.whole = open(path, "rb", buffering=0), hashlib.sha256(), False

    def readable(self):
        return True

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:size])
        self.whole = not size
        return size

    def close(self):
        self.file.close()
        super().close()


def read_lines(files, digests):
    """Yield (path, number, line) for each line of the files, as bytes, and for each row, as JSON; note their SHA-256 in `digests`."""
    for path, suffix in files:
        number = 0
        try:
            if suffix == ".parquet":
                import pyarrow.parquet

                rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield path, number, orjson.dumps(row, default=str)
                continue
            raw = file = Hashed(path)
            if SUFFIXES[suffix]:
                import pyarrow

                raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), SUFFIXES[suffix])
            with io.BufferedReader(raw, 1 << 20) as stream:
                for number, line in enumerate(stream, 1):
                    yield path, number, line
            if file.whole:
                digests[str(path)] = file.sha256.hexdigest()
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):
                raise
            raise SystemExit(f"dedup_text: {path} line {number + 1}: damaged ({error}); replace the file") from None


def load(lines, text_field, rejected):
    """Read documents and return (text, lengths, ids, sources, kinds); a line that is none goes to the file `rejected`.

    text: their UTF-8 bytes, one after another; lengths, ids, sources: a list each; kinds: a byte a line, 0 blank, 1 document, 2 rejected.
    """
    text, lengths, ids, sources, kinds = bytearray(), [], [], [], bytearray()
    for path, number, line in tqdm(lines, unit=" documents", disable=not sys.stderr.isatty()):
        if line.isspace():
            kinds.append(0)
            continue
        try:
            record = orjson.loads(line)
            encoded = record[text_field].encode()
        except orjson.JSONDecodeError as error:
            reason = f"not JSON: {error}"
        except (LookupError, TypeError, AttributeError):
            reason = f"no text in field {text_field!r}; --text-field names another"
        else:
            text += encoded
            lengths.append(len(encoded))
            ids.append(str(record.get("id") or f"{path.name}:{number}"))
            sources.append(sys.intern(str(record.get("source") or path.name)))
            kinds.append(1)
            continue
        row = {"file": str(path), "line": number, "reason": reason, "raw": line.decode("utf-8", "backslashreplace")}
        rejected.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        kinds.append(2)
    return text, lengths, ids, sources, kinds


def check_loss(read, gone, max_loss, where):
    """Stop when a source of two or more documents lost more than the share `max_loss` of them."""
    for source, count in read.items():
        if gone[source] > max(1, max_loss * count):
            share = min(1, gone[source] / count + 0.005)
            raise SystemExit(
                f"dedup_text: {source} lost {gone[source]:,} of {count:,} documents, more than --max-loss {max_loss}; {where} shows"
                f" what each repeats; mend the input, or allow it with --max-loss {share:.2f} --overwrite"
            )


def build_parser():
    parser = argparse.ArgumentParser(
        prog="dedup_text.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs; of two alike the first one stays"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the kept documents")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put a different earlier run aside")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column with the text (default: text)")
    parser.add_argument("--threshold", type=float, default=0.8, metavar="J", help="Jaccard index from which two are alike (default: 0.8)")
    parser.add_argument("--max-loss", type=float, default=0.5, metavar="SHARE", help="stop when a source loses more (default: 0.5)")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: a Jaccard index lies above 0 and is at most 1")
    files = input_files(args.input)
    run = Run("dedup", args, [path for path, _ in files])
    with write_atomic(run.output / "rejected.jsonl") as file:
        text, lengths, ids, sources, kinds = load(read_lines(files, run.digests), args.text_field, file)
    if not ids:
        raise SystemExit(f"dedup_text: {args.input[0]}: no usable document; {run.output / 'rejected.jsonl'} says why of each line")
    kept_by, score, compared = find_duplicates(text, lengths, args.threshold)
    removed = np.flatnonzero(kept_by >= 0)
    with write_atomic(run.output / "removed.jsonl") as file:
        for i in removed:
            row = {"id": ids[i], "kept_id": ids[kept_by[i]], "jaccard": round(float(score[i]), 4), "source": sources[i]}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    read, gone, clusters = Counter(sources), Counter(sources[i] for i in removed), Counter(kept_by[removed].tolist())
    check_loss(read, gone, args.max_loss, run.output / "removed.jsonl")
    keeps = np.frombuffer(kinds, np.uint8) == 1
    keeps[keeps] = kept_by < 0
    with write_atomic(run.output / "data.jsonl") as file:
        for keep, (_, _, line) in zip(keeps, read_lines(files, {}), strict=True):
            if keep:
                file.write(line if line.endswith(b"\n") else line + b"\n")
    rejects, kept = kinds.count(2), len(ids) - len(removed)
    counts = {"read": len(ids), "kept": kept, "removed": len(removed), "rejected": rejects, "clusters": len(clusters)}
    run.finish(
        f"removed {len(removed):,} of {len(ids):,} documents" + (f", {rejects:,} lines are none" if rejects else ""),
        counts=counts | {"sources": {source: {"read": count, "removed": gone[source]} for source, count in read.items()}},
        metrics={"compared": compared, "largest_cluster": 1 + max(clusters.values(), default=0)},
        records={"data.jsonl": kept, "removed.jsonl": len(removed), "rejected.jsonl": rejects},
    )


if __name__ == "__main__":
    run_main(main)
