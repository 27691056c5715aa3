#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "openai>=3", "pymilvus>=3", "pyyaml>=6", "sentence-transformers>=5", "tqdm>=4.66", "transformers>=5"]
# ///
"""Answer an error message, a traceback or a log from the knowledge base, in the question's language, with the records that prove it.

Usage:
    python scripts/answer_errors.py --uri kb/errors.db "No available memory for the cache blocks"
    python scripts/answer_errors.py --uri kb/errors.db --explain --file train.log "Why does it stop on four GPUs?"
    python scripts/answer_errors.py --uri kb/errors.db --no-llm < train.log
    python scripts/answer_errors.py --uri kb/errors.db --input questions.jsonl --output /tmp/answers
    make ask Q="…"

Reads   the collection of load_milvus.py; QUESTION, --file or standard input; with --output, --input of {"id", "question", "expect"?}.
Writes  the answer on standard output; with --output: OUTPUT/answers.jsonl, then OUTPUT/manifest.json, last; with --serve: a socket in
        ~/.local/state/answer_errors (XDG_STATE_HOME), whose path is printed.
Exit    0 answered, or not in the knowledge base; 1 failed; 2 bad usage; 3 refused: another embedding model, or OUTPUT holds another run.
Needs   CPU, 1 GB of memory; an OpenAI-compatible server (serve_vllm.py), or --no-llm.

Each line of a paste is searched by words (BM25), because an embedding of a whole log is one of its noise. A line's score for a record is
its BM25 score times the share of the record's words in it, half as much again when it names an exception; words of the record's package
and fix add to it, and the best line counts. The cosine of that line and the record is added. Chinese terms are searched as the English
words that the collection's list gives for them. A record's certainty is what a logistic regression makes of the share of its words, of the
cosine, and of how far the best record of another cause is behind.

Pasted text and records are data. Of a log the model sees the one line that found the records, and of that the sentences whose words
stand in them, so that an order in it is not read at all; only ids that were in the prompt are left in the answer; and an answer that cites
none, or of whose words less than a quarter stands in the records that it cites, is not shown: the fix of the best record takes its place,
which is said.

A Milvus Lite database belongs to one process. `--serve` is that process for others: while it runs, questions to the same --uri go through
it, by themselves. It answers a JSON line {"question", "log", "lang", …} by lines {"text"} or {"note"}, and {"result"} or {"error"} last.
"""

import argparse
import array
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

SYSTEM = (
    "Answer from the records below. Cite the id of each record you use in square brackets, for example [E0012]. "
    "If no record fits, say that it is not in the knowledge base."
)
PROMPT_RECORDS, PROMPT_CHARS, MAX_TOKENS = 3, 900, 200  # a small model with a window of 2,048 tokens copes with these
NEAR = 0.75  # of the best record's certainty: one further off would only tempt a small model
CANDIDATES = 20  # records a search brings back
K1, B = 1.5, 0.75  # of BM25
ASIDE, MEANING = 0.8, 0.4  # weights of the words of a record's package, cause and fix, and of the cosine
# Of the certainty: share of words, distance to the next cause, cosine, a Chinese question (whose words are translated), constant
SHARE, BEHIND, COSINE, TRANSLATED, BIAS = 3.2, 3.0, 3.4, 2.5, -5.6
MARKED, WARNED = 1.5, 0.7  # weight of a line that names an exception or that a person wrote in Chinese, and of a warning
MAX_LINES, MAX_LINE = 256, 2000  # lines of a paste that are searched, and characters of each; a longer one counts as several
TAIL = 4_000_000  # bytes of a file that are read, from its end
EVIDENCE = 0.5  # of a sentence's words stand in one record, or the model does not see the sentence
GROUNDED = 0.25  # of an answer's words stand in the records that it cites, or it is not shown
LEVEL = re.compile(r"\b(TRACE|DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL)\b")
EXCEPTION = re.compile(r"\b\w*(?:Error|Exception|Interrupt|Exit|Failure)\b")
CHINESE, KANA = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[\u3041-\u30ff]")
WORD = re.compile(r"[^\W_\u3400-\u9fff]{4,}|[\u3400-\u9fff]")
NO_LETTERS = re.compile(r"[^A-Za-z\u3400-\u9fff]*")
SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")
BRACKETS = re.compile(r"\[([^\[\]\n]{1,120})\]")
UNKNOWN = re.compile(r"not (?:\w+ )?in the knowledge base|知识库(?:中|里)?没有|不在知识库", re.I)
# What we say ourselves, in the question's language: unknown, not grounded, no fix, records
WORDS = {
    "en": (
        "This is not in the knowledge base. The nearest records:",
        "The model gives no answer that a record supports; the best match says:",
        "(no fix)",
        "Records:",
    ),
    "zh": (
        "知识库中没有这个错误。最接近的记录：",
        "模型没有给出有记录支持的回答；最匹配的记录给出的办法：",
        "（没有记录解决办法）",
        "记录：",
    ),
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
    print(f"answer_errors: {sentence}", file=sys.stderr)
    sys.exit(code)


def search_lines(text):
    """Return the lines of a paste worth searching, in order: none that is logged as INFO or DEBUG, each once whatever its digits,
    and of a long log the exceptions first, then the latest."""
    lines = {}
    for whole in text.splitlines():
        level = LEVEL.search(whole[:MAX_LINE])
        for line in (whole[at : at + MAX_LINE].strip() for at in range(0, len(whole), MAX_LINE)):
            if line and (EXCEPTION.search(line) or not level or level[1] not in ("TRACE", "DEBUG", "INFO")):
                lines[re.sub(r"\d+", "0", line)] = line
    lines = list(lines.values()) or [text.strip()[:MAX_LINE]]
    latest = sorted(range(len(lines)), key=lambda at: (bool(EXCEPTION.search(lines[at])), at))[-MAX_LINES:]
    return [lines[at] for at in sorted(latest)]


def ids_in(bracket, known):
    """Return the names in a bracket when one of them looks like a record's id, that is like one of `known` but for its digits; else []."""
    names, shapes = re.split(r"[,;，；、\s]+", bracket.strip()), {re.sub(r"\d+", "0", name) for name in known}
    return names if any(re.sub(r"\d+", "0", name) in shapes for name in names) else []


def quote(text, known):
    """Return text for the prompt with round brackets around what looks like a citation: it is data, and may not cite."""
    return BRACKETS.sub(lambda match: f"({match[1]})" if ids_in(match[1], known) else match[0], text)


def language(text, otherwise):
    """Return "zh" when a text has Chinese in it and no kana, which would make it Japanese; else `otherwise`: a log has no language."""
    return "zh" if CHINESE.search(text) and not KANA.search(text) else otherwise


def words_of(text):
    """Return the words of four letters or more, and the Chinese characters, of a text; five letters of each: divide and divides are one."""
    return [word[:5].lower() for word in WORD.findall(text)]


def share(words, told):
    """Return the share of words that are in the set `told`; 0 of none."""
    return sum(word in told for word in words) / max(len(words), 1)


def told_by(records):
    """Return the set of the words of records."""
    return {word for record in records for name in ("error", "cause", "fix") for word in words_of(record.get(name) or "")}


def trim(part, told):
    """Return a sentence from its first word that is in `told` to its last; all of it when none is."""
    hits = [match.span() for match in WORD.finditer(part) if match[0][:5].lower() in told]
    return part[hits[0][0] : NO_LETTERS.match(part, hits[-1][1]).end()].strip() if hits else part


def asked_for(question, best, records):
    """Return what the model is told of a question: the person's own words, that is its first line, and of the line that found the records
    the sentences of which half stands in one of them, or the closest, trimmed to those words."""
    own, told = question.strip().partition("\n")[0], [told_by([record]) for record in records]
    shares = {part: max(share(words_of(part), words) for words in told) for part in SENTENCE.split(best)} if best not in own else {}
    least = min(EVIDENCE, max(shares.values(), default=0))
    found = " ".join(trim(part, told_by(records)) for part in shares if shares[part] >= least)
    return "\n".join(text[:PROMPT_CHARS] for text in (own, found) if text)


def prompt(asked, records, lang):
    """Return the messages for the model: the records, a line each, and what is asked."""
    ids, told = [record["id"] for record in records], []
    for record in records:
        error, fix = (quote(" ".join(record[name].split()), ids) for name in ("error", "fix"))
        told.append(f"[{record['id']}] error: {error[:300]} | fix: {fix[:600]}\n")
    user = f"Records:\n{''.join(told)}\nQuestion:\n{quote(asked, ids)}"
    foreign = any(letter.isalpha() and not letter.isascii() for letter in asked)
    tongue = " Answer in Chinese." if lang == "zh" else " Answer in the language of the question." if foreign else ""
    return [{"role": "system", "content": SYSTEM + tongue}, {"role": "user", "content": user}]


def grounded(said, records):
    """Tell whether an answer is taken from the records; one in another script than theirs, whether its names and commands are."""
    words, told = words_of(BRACKETS.sub(" ", said)), told_by(records)
    latin = [word for word in words if word.isascii()]
    if len(latin) < len(words) and all(word.isascii() for word in told):
        return not latin or share(latin, told) >= GROUNDED
    return share(words, told) >= GROUNDED


def keep_known(pieces, known, cited):
    """Yield a stream of text without citations of records that are not in `known`; append those that are to `cited`, each once."""

    def check(match):
        names = ids_in(match[1], known)
        kept = [name for name in names if name in known]
        cited.extend(name for name in dict.fromkeys(kept) if name not in cited)
        return f"[{', '.join(kept)}]" if kept else "" if names else match[0]

    held = ""
    for piece in itertools.chain(pieces, [None]):
        held += piece or ""
        start = held.rfind("[")
        whole = piece is None or start < 0 or "]" in held[start:] or len(held) - start > 120
        end = len(held) if whole else start
        yield BRACKETS.sub(check, held[:end])
        held = held[end:]


class Words:
    """An inverted index of texts: BM25 scores, and the share of a text's words that a query has. Neighbouring words count as one word more.

    It is kept here, not in Milvus, because refusing takes shares, because Milvus Lite weighs words a segment at a time and searches
    for one line after the other, and so that all servers give one result. A million words take 40 MB."""

    def __init__(self, texts):
        """`texts`: words, separated by spaces."""
        self.vocabulary, flat, sizes = {}, array.array("q"), []
        for text in texts:
            words = text.split()
            flat.extend(self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words)
            sizes.append(len(words))
        self.size, sizes, owners = len(sizes), np.array(sizes), np.repeat(np.arange(len(sizes)), sizes)
        words, together = np.array(flat, dtype=np.int64), owners[1:] == owners[:-1]
        terms = np.concatenate([words, self.pairs(words)[together]])
        owners = np.concatenate([owners, owners[1:][together]])
        self.terms, number = np.unique(terms, return_inverse=True)
        postings, count = np.unique(number * self.size + owners, return_counts=True)
        number, self.owners = np.divmod(postings, self.size)
        self.starts = np.searchsorted(number, np.arange(len(self.terms) + 1))
        held = np.diff(self.starts)
        rarity = np.log((self.size - held + 0.5) / (held + 0.5) + 1)[number]
        length = np.bincount(owners, minlength=self.size)
        damping = K1 * (1 - B + B * length / max(length.sum() / max(self.size, 1), 1))
        self.weights = rarity * count * (K1 + 1) / (count + damping[self.owners])
        self.shares = rarity**2  # a rare word says more than several common ones
        self.shares /= np.bincount(self.owners, self.shares, self.size)[self.owners]

    def pairs(self, words):
        return (words[:-1] + 1) * len(self.vocabulary) + words[1:]

    def match(self, text):
        """Return for all texts their BM25 scores and the shares of their words that `text` has, 0 to 1; both [texts]."""
        words = np.array([self.vocabulary.get(word, -1) for word in text.split()], dtype=np.int64)
        pairs = self.pairs(words)[(words[:-1] >= 0) & (words[1:] >= 0)]
        terms = np.unique(np.concatenate([words[words >= 0], pairs]))
        at = np.searchsorted(self.terms, terms)
        at = at[self.terms[np.minimum(at, len(self.terms) - 1)] == terms] if len(self.terms) else at[:0]
        spans = [slice(self.starts[n], self.starts[n + 1]) for n in at]
        if not spans:
            return np.zeros(self.size), np.zeros(self.size)
        owners = np.concatenate([self.owners[span] for span in spans])
        return tuple(np.bincount(owners, np.concatenate([of[span] for span in spans]), self.size) for of in (self.weights, self.shares))


class KnowledgeBase:
    """The collection of load_milvus.py, with the embedding model that it was made with."""

    def __init__(self, uri, token, collection, embed_model):
        """`embed_model`: in place of the collection's own, if that has moved; SystemExit 3 when its vectors are others."""
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException

        lite = "://" not in uri
        if lite and not Path(uri).is_dir():
            fail(f"{uri}: no such Milvus Lite database; load_milvus.py makes one (`make kb`)")
        try:
            self.client, self.collection = MilvusClient(uri, token=token), collection
        except MilvusException as error:
            if lite:
                ways = f"`milvus-lite server --data-dir {uri} --host 127.0.0.1 --port 19530` and --uri http://127.0.0.1:19530"
                fail(f"cannot open {uri}: another process has it open, or it is damaged; end that process, or let one serve it ({ways})")
            fail(f"no Milvus answers at {uri} ({error.message}); start it, or look at the address and at --token")
        made = self.client.describe_collection(collection)["properties"] if self.client.has_collection(collection) else {}
        if "kb.embedder" not in made:
            fail(f"{uri} has no collection {collection!r} of load_milvus.py but {self.client.list_collections()}; look at --collection")
        name, prompts = embed_model or made["kb.embedder"], [made.get("kb.query_prompt", ""), made.get("kb.record_prompt", "")]
        self.pattern, self.embed = re.compile(made["kb.tokens"]), load_embedder(name, prompts[0], made.get("kb.pooling"))
        theirs, ours = [float(x) for x in made["kb.fingerprint"].split()], self.embed([made["kb.probe"]], prompts[1])[0]
        if str(len(ours)) != made["kb.dimension"] or any(abs(a - b) > 0.01 for a, b in zip(theirs, ours, strict=False)):
            fail(f"{collection} holds vectors of {made['kb.embedder']}, and {name} gives others; leave --embed-model out", 3)
        self.terms = dict(line.split("\t") for line in filter(None, made.get("kb.terms", "").split("\n")))
        self.term = re.compile("|".join(map(re.escape, sorted(self.terms, key=len, reverse=True))) or "(?!)")
        self.client.load_collection(collection)
        self.read()

    def read(self):
        """Read the words and labels of all records: for each a line about it and a line for each wording of its error."""
        asides, wordings, counts, self.ids, self.causes = [], [], [], [], []
        pages = self.client.query_iterator(self.collection, batch_size=2000, output_fields=["id", "search_text", "meta"])
        while page := pages.next():
            for row in page:
                aside, *texts = row["search_text"].split("\n")
                texts = texts or [""]
                asides.append(aside)
                wordings += texts
                counts.append(len(texts))
                self.ids.append(row["id"])
                self.causes.append({texts[0], *labels(row)})
        self.asides, self.wordings = Words(asides), Words(wordings)
        self.firsts, self.owners = np.cumsum([0, *counts[:-1]]), np.repeat(np.arange(len(counts)), counts)
        self.numbers = {name: number for number, name in enumerate(self.ids)}

    def digest(self):
        """Return a hash of all records' ids and contents."""
        rows, digest = self.client.query_iterator(self.collection, batch_size=1000, output_fields=["id", "hash"]), hashlib.sha256()
        while batch := rows.next():
            digest.update(json.dumps([[row["id"], row["hash"]] for row in batch]).encode())
        return digest.hexdigest()

    def english(self, text):
        """Return text with the English words of the Chinese terms that the collection's list has."""
        return self.term.sub(lambda match: f" {self.terms[match[0]]} ", text)

    def words(self, text):
        return " ".join("".join(groups) for groups in self.pattern.findall(text) if any(groups)).lower()

    def match(self, lines):
        """Return for all records their score, the share of their words that was found, and the line of the best score; each [records]."""
        records = len(self.ids)
        scores, shares, best = np.zeros(records), np.zeros(records), np.full(records, -1)
        for number, line in enumerate(lines):
            words, level = self.words(self.english(line)), LEVEL.search(line)
            marked = EXCEPTION.search(line) or CHINESE.search(line)
            weight = MARKED if marked else WARNED if level and level[1].startswith("WARN") else 1.0
            score, share = self.wordings.match(words)
            score *= share
            if len(self.owners) > records:  # the best wording of each record
                most = np.maximum.reduceat(score, self.firsts)
                score, share = most, np.maximum.reduceat(np.where(score == most[self.owners], share, 0), self.firsts)
            score = weight * (score + ASIDE * self.asides.match(words)[0])
            better = score > scores
            scores[better], shares[better], best[better] = score[better], share[better], number
        return scores, shares, best

    def search(self, text, limit, hidden=None):
        """Return (records, best first, with `score` and `certainty` from 0 to 1; the line that found them; seconds of embedding).

        `hidden`: a label whose records are left out, as if the base did not have them."""
        lines = search_lines(text.encode(errors="replace").decode())
        scores, shares, best = self.match(lines)
        if hidden:
            scores[[hidden in causes for causes in self.causes]] = 0
        first = int(scores.argmax()) if len(scores) else 0
        line = best[first] if len(scores) and best[first] >= 0 else len(lines) - 1
        start = time.perf_counter()
        vector = self.embed([self.english(lines[line])])[0]
        seconds = time.perf_counter() - start
        near = self.client.search(self.collection, data=[vector.tolist()], anns_field="vector", limit=CANDIDATES)[0]
        names = {hit["id"] for hit in near} | {self.ids[n] for n in largest(scores, 2 * CANDIDATES)}
        fields = ["id", "error", "cause", "fix", "package", "source", "meta", "vector"]
        records = self.client.get(self.collection, ids=sorted(names), output_fields=fields) if names else []
        most = scores.max(initial=0) or 1.0
        records = [record for record in records if hidden not in labels(record)]
        for record in records:
            number = self.numbers.get(record["id"])
            record["cosine"] = float(vector @ np.array(record.pop("vector"), dtype=np.float32))
            record["lexical"] = 0.0 if number is None else float(scores[number])
            record["share"] = 0.0 if number is None else float(shares[number])
            record["score"] = record["lexical"] / most + MEANING * record["cosine"]
        records.sort(key=lambda record: (-record["score"], record["id"]))
        translated = bool(CHINESE.search(lines[line]) and not EXCEPTION.search(lines[line]))
        causes = {record["id"]: self.causes[self.numbers[record["id"]]] if record["id"] in self.numbers else set() for record in records}
        for record in records[:limit]:
            rivals = [rival["lexical"] for rival in records if not causes[rival["id"]] & causes[record["id"]]]
            record["certainty"] = certainty(record, max(rivals, default=0.0), translated)
        return records[:limit], lines[line], seconds

    def ranking(self, method, text, limit):
        """Return ([id, labels, certainty or score] of the records that `method` finds, seconds of embedding): lines (ours), bm25 or dense
        (the whole text)."""
        seconds = 0.0
        if method == "lines":
            records, _, seconds = self.search(text, limit)
            return [[record["id"], labels(record), record["certainty"]] for record in records], seconds
        if method == "bm25":
            scores = np.maximum.reduceat(self.wordings.match(self.words(text))[0], self.firsts) if self.ids else np.zeros(0)
            sure = dict(sorted(((self.ids[n], float(scores[n])) for n in largest(scores, limit)), key=lambda item: -item[1]))
        else:
            start = time.perf_counter()
            vector = self.embed([text])[0].tolist()
            seconds = time.perf_counter() - start
            hits = self.client.search(self.collection, data=[vector], anns_field="vector", limit=limit)[0]
            sure = {hit["id"]: float(hit["distance"]) for hit in hits}
        found = self.client.get(self.collection, ids=list(sure), output_fields=["id", "meta"]) if sure else []
        names = {record["id"]: labels(record) for record in found}
        return [[name, names[name], value] for name, value in sure.items() if name in names], seconds


def largest(scores, count):
    """Return the places of the `count` largest of the scores above 0, in no order."""
    places = np.argpartition(-scores, count)[:count] if len(scores) > count else np.arange(len(scores))
    return places[scores[places] > 0]


def certainty(record, rival, translated):
    """Return how sure it is, 0 to 1, that a record tells of the error asked for; `rival`: the best lexical score of another cause.

    The weights are a logistic regression's: known errors against the same with their records hidden (evaluate_retrieval.py)."""
    behind = max(0.0, 1 - rival / record["lexical"]) if record["lexical"] else 0.0
    return 1 / (1 + math.exp(-(BIAS + SHARE * record["share"] + BEHIND * behind + COSINE * record["cosine"] + TRANSLATED * translated)))


def labels(record):
    """Return what a right answer may be named by: the record's id, its tags, its group."""
    tags = record["meta"].get("tags", [])
    return [record["id"], *([tags] if isinstance(tags, str) else tags), *filter(None, [record["meta"].get("group")])]


def load_embedder(name, prompt, pooling):
    """Return a function from texts, and a prompt before each, to unit vectors, [texts, dimension].

    `name`: a folder, a hub name, or package:NAME; `prompt`: the one before queries; `pooling`: in place of the model's own, or empty."""
    path = name
    if name.startswith("package:"):
        package = importlib.util.find_spec(name.removeprefix("package:"))
        roots = package.submodule_search_locations or [] if package else []
        path = next((str(file.parent) for root in roots for file in sorted(Path(root).rglob("modules.json"))), name)
    if Path(path).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to fetch, and some imports would ask the hub for kernels
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = SentenceTransformer(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"no embedding model {name!r} ({reason}); give --embed-model the folder or package where the collection's model is now")
    if pooling:
        model[1].pooling_mode = pooling
    return lambda texts, prompt=prompt: model.encode(texts, prompt=prompt, normalize_embeddings=True, show_progress_bar=False)


class NoModel(Exception):
    """The model did not answer; the message says why, for a reader."""


class Model:
    """A chat model behind an OpenAI-compatible server."""

    def __init__(self, url, name):
        """`name`: None for the first that the server lists."""
        import openai

        self.error = openai.OpenAIError
        timeout = openai.Timeout(600, connect=5)
        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0, timeout=timeout)
        try:
            listed = self.client.models.list().data
        except openai.OpenAIError as error:
            raise NoModel(f"no model answers at {url} ({error}); `make serve` starts one, --no-llm does without") from error
        self.card = next((card for card in listed if card.id == name), None if name else next(iter(listed), None))
        if self.card is None:
            raise NoModel(f"{url} serves {[card.id for card in listed]}, not {name!r}; look at --model")

    def identity(self):
        """Return what tells this model from a later one of the same name: its weights' time of change, where they are on this machine."""
        root = Path(getattr(self.card, "root", None) or "")
        return [self.card.id, max((file.stat().st_mtime_ns for file in root.glob("*.safetensors")), default=0) if root.name else 0]

    def stream(self, messages):
        """Yield the answer in pieces."""
        try:
            options = {"model": self.card.id, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
            with self.client.chat.completions.create(messages=messages, **options) as chunks:
                for chunk in chunks:
                    if chunk.choices and chunk.choices[0].delta.content:
                        yield chunk.choices[0].delta.content
        except (self.error, OSError) as error:
            raise NoModel(f"the model broke off ({' '.join(str(error).split())}); look at the server's log") from error


REQUEST = ("uri", "collection", "llm_url", "model", "llm", "lang", "top_k", "threshold")  # flags that a request carries
SEARCHING = threading.Lock()  # the embedder and Milvus Lite take one question at a time; models answer several


def respond(base, model, say, question, log="", lang="en", top_k=5, threshold=0.9):
    """Answer one question about a log; pass each piece of text to `say` as soon as it is there. Return the answer as a dictionary:
    `status` is answered, fallback (what the model said is not shown), fix (no model was asked) or unknown (not in the knowledge base);
    `stage` of each record how far it came: retrieved, kept (it is near enough), prompted (the model saw it), cited."""
    question, log = (text.encode(errors="replace").decode() for text in (question, log))  # no lone surrogates
    lang = language(question or log, lang)
    unknown, ungrounded, no_fix, heading = WORDS[lang]
    with SEARCHING:
        records, line, _ = base.search(f"{question}\n{log}" if log else question, top_k)
    near = NEAR * records[0]["certainty"] if records else 0
    known = bool(records) and records[0]["certainty"] >= threshold
    kept = [record for record in records if known and record["certainty"] >= near]
    shown = kept[:PROMPT_RECORDS] if model else []
    said, held, cited = "", "", []
    if shown:
        asked = asked_for(question, line, shown)
        for piece in keep_known(model.stream(prompt(asked, shown, lang)), {record["id"] for record in shown}, cited):
            said, held = said + piece, held + piece
            if grounded(said, shown):
                say(held)
                held = ""
        status = "answered" if cited and grounded(said, [record for record in shown if record["id"] in cited]) else "fallback"
        status = "unknown" if not cited and UNKNOWN.search(said) else status
        say(held if status == "answered" else "\n\n" if held != said else "")
    else:
        status = "fix" if kept else "unknown"
    answer = said.strip()
    if status != "answered":
        answer, cited = unknown + "".join(f"\n- [{record['id']}] {record['error'].splitlines()[0][:160]}" for record in records), []
        if status != "unknown":
            cited = [records[0]["id"]]
            answer = f"{ungrounded + ' ' if model else ''}{records[0]['fix'] or no_fix} [{records[0]['id']}]"
        say(answer)
    for record in records:
        among = {"cited": record["id"] in cited, "prompted": record in shown, "kept": record in kept, "retrieved": True}
        record["stage"] = next(stage for stage, holds in among.items() if holds)
    sources = [f"\n[{record['id']}] {record['source']}" for record in records if record["id"] in cited]
    say("".join(["\n\n", heading, *sources, "\n"] if sources else "\n"))
    result = {"question": question, "status": status, "answer": answer, "cited": cited, "model_said": said.strip(), "records": records}
    return result | {"found_by": line, "threshold": threshold, "near": round(near, 4)}


def read_objects(paths, field):
    """Return the objects of JSONL files, each with a text in `field`."""
    entries = []
    for path in paths:
        if not Path(path).is_file():
            fail(f"{path}: no such file; look at --input")
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line.decode()) if line.strip() else None
                if entry is not None and not entry[field].strip():
                    raise ValueError(f"{field!r} is empty")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                fail(f"{path} line {number}: not a JSON object with a text in {field!r} ({error}); mend the line")
            entries += [entry] if entry else []
    return entries or fail(f"{', '.join(paths)}: empty; a line is a JSON object with a text in {field!r}")


def read_question(args):
    """Return (question, log): QUESTION, and the end of --file or, without QUESTION, of standard input; a single line is a question."""
    question, log = "" if args.question in (None, "-") else args.question, ""
    if args.file:
        with open(args.file, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            log = file.read().decode(errors="replace")
    elif not question:
        if sys.stdin.isatty():
            print("Paste the error or log, then Ctrl-D:", file=sys.stderr)
        log = sys.stdin.buffer.read().decode(errors="replace")[-TAIL:]
        question, log = (log, "") if "\n" not in log.strip() else ("", log)
    if not (question + log).strip():
        fail("the question is empty; give QUESTION, --file LOG, or a log on standard input", 2)
    return question.strip(), log


def note(sentence):
    print(f"answer_errors: {sentence}", file=sys.stderr)


def answer_by(base, request, say, note):
    """Answer a request; without the model where that does not answer, which is noted."""
    asked = [request[name] for name in ("question", "log", "lang", "top_k", "threshold")]
    try:
        return respond(base, Model(request["llm_url"], request["model"]) if request["llm"] else None, say, *asked)
    except NoModel as error:
        note(str(error))
        return respond(base, None, say, *asked)


def owner_socket(uri):
    """Return where the process that has a Milvus Lite database open answers others; for a Milvus server, which has no owner, a new one."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    name = f"server-{os.getpid()}" if "://" in uri else hashlib.sha256(str(Path(uri).resolve()).encode()).hexdigest()[:16]
    return state / "answer_errors" / f"{name}.sock"


@contextlib.contextmanager
def connected(path):
    """Yield a connection to the owner at `path`, as a file, or None when nobody is there."""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(path))
        except OSError:
            yield None
        else:
            with line.makefile("rwb") as stream:
                yield stream


def answer_through(stream, request, say):
    """Return the answer of the owner at the other end."""
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    for line in stream:
        event = json.loads(line)
        if "error" in event:
            fail(event["error"])
        if "result" in event:
            return event["result"]
        say(event["text"]) if "text" in event else note(event["note"])
    return fail(f"the process that has {request['uri']} open went away before its answer was whole; ask again")


def show_evidence(result):
    """Print which records were retrieved, kept, prompted and cited, with their scores, and the line of the question that found them."""
    print(f"\n{'stage':<10}{'score':>6}{'certainty':>11}  record")
    for record in result["records"]:
        error = record["error"].splitlines()[0][:80]
        print(f"{record['stage']:<10}{record['score']:>6.3f}{record['certainty']:>11.3f}  [{record['id']}] {error}")
    print(f"known: the first has a certainty of {result['threshold']:g} (--threshold) or more; kept: {result['near']:.3f}, {NEAR:g} of its")
    print(f"found by: {result['found_by'][:160]}")


def answer_one(args, question, log, answer):
    """Print the answer as it comes, or as one JSON object. `answer` takes the request and a function that is given the pieces of text."""
    request = {name: getattr(args, name) for name in REQUEST} | {"question": question, "log": log}
    result = answer(request, lambda text: args.json or print(text, end="", flush=True))
    if args.json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    elif args.explain:
        show_evidence(result)


def serve(args, base):
    """Answer requests at the socket of --uri, several at a time, until standard input ends; each connection is one request."""
    from pymilvus.exceptions import MilvusException

    class Handler(socketserver.StreamRequestHandler):
        def send(self, **event):
            self.wfile.write(json.dumps(event).encode() + b"\n")

        def handle(self):
            try:
                request = {"log": ""} | {name: getattr(args, name) for name in REQUEST} | json.loads(self.rfile.readline())
                if not (request["question"] + request["log"]).strip():
                    raise ValueError("the question is empty")
                if request["collection"] != args.collection:
                    raise ValueError(f"the process that has {args.uri} open serves the collection {args.collection}; end it, or ask that")
                result = answer_by(base, request, lambda text: text and self.send(text=text), lambda text: self.send(note=text))
                self.send(result=result)
            except MilvusException as error:
                self.send(error=f"Milvus at {args.uri} refused or went away ({error.message}); mend that and ask again")
            except (ValueError, TypeError, KeyError) as error:
                self.send(error=f"this cannot be answered: {error}")
            except ConnectionError:
                pass  # who asked has left

    path = owner_socket(args.uri)
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a process that was killed: who has the database open is the only one to come here
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(path, flush=True)
        sys.stdin.buffer.read()
        path.unlink(missing_ok=True)
        server.shutdown()


def answer_file(args, base, model):
    """Answer the questions of --input into OUTPUT; a question's `expect` lists ids or tags of right records."""
    questions = read_objects(args.input, "question")
    args.model, args.base = model and model.identity(), base.digest()  # other answers may follow from another model or base
    run = Run("ask", args, args.input, ignore=("uri", "llm_url", "token", "question", "file", "json", "explain", "serve", "rank"))
    rows, first, right, expected = [], 0, 0, 0
    for entry in tqdm(questions, unit="question", disable=not sys.stderr.isatty()):
        row = respond(base, model, lambda text: None, entry["question"], "", args.lang, args.top_k, args.threshold)
        if entry.get("expect"):
            expected += 1
            first += bool(row["records"] and set(labels(row["records"][0])) & set(entry["expect"]))
            right += any(set(labels(record)) & set(entry["expect"]) for record in row["records"] if record["id"] in row["cited"])
        rows.append({"id": entry.get("id")} | row)
    with write_atomic(run.output / "answers.jsonl", "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    counts = {"questions": len(rows)} | {s: sum(row["status"] == s for row in rows) for s in ("answered", "fallback", "fix", "unknown")}
    metrics = {"cited": sum(bool(row["cited"]) for row in rows), "recall_at_1": round(first / expected, 4) if expected else None}
    summary = f"{metrics['cited']} of {len(rows)} answers cite a record, {counts['answered']} of them by the model"
    metrics["right_cited"] = right if expected else None
    summary += f"; a right record found first {first}, cited {right} of {expected} times" if expected else ""
    run.finish(summary, counts, metrics, {"answers.jsonl": len(rows)})


def rank_file(args, base):
    """Print for each query of --input one line with the ids that each method finds, labelled, and its milliseconds; for a query with a
    `group` also how certain the best record would be without those of the group."""
    for entry in tqdm(read_objects(args.input, "text"), disable=not sys.stderr.isatty()):
        result = {"qid": entry.get("qid")}
        for method in args.rank:
            start = time.perf_counter()
            found, embedding = base.ranking(method, entry["text"], args.top_k)
            total = time.perf_counter() - start
            result[method] = {"found": found, "search_ms": 1000 * (total - embedding), "embed_ms": 1000 * embedding}
            if method == "lines" and entry.get("group"):
                nearest = base.search(entry["text"], 1, entry["group"])[0]
                result[method]["without"] = nearest[0]["certainty"] if nearest else 0.0
        print(json.dumps(result, ensure_ascii=False))


def build_parser():
    parser = argparse.ArgumentParser(
        prog="answer_errors.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("question", nargs="?", metavar="QUESTION", help="an error or question; - or nothing: standard input")
    add("--file", metavar="LOG", help="a log to explain, with or without QUESTION")
    add("--uri", default="errors.db", help="path of a Milvus Lite database, or http(s)://HOST:PORT (default: errors.db)")
    add("--token", default=os.environ.get("MILVUS_TOKEN", ""), help="of a Milvus server (default: MILVUS_TOKEN)")
    add("--collection", type=lambda name: name.replace("-", "_"), default="mcp_errors", metavar="NAME", help="default: mcp_errors")
    add("--embed-model", metavar="MODEL", help="folder, hub name or package:NAME (default: the collection's)")
    add("--llm-url", default=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8051/v1"), metavar="URL", help="default: OPENAI_BASE_URL")
    add("--model", default=os.environ.get("LLM_MODEL"), help="default: LLM_MODEL, or the first that the server lists")
    add("--llm", action=argparse.BooleanOptionalAction, default=True, help="--no-llm: ask no model, give the best record's fix itself")
    add("--lang", choices=tuple(WORDS), default="en", help="of the answer to a paste without Chinese (default: en)")
    add("--top-k", type=int, default=5, metavar="N", help="records to retrieve (default: 5)")
    add("--threshold", type=float, default=0.5, help="certainty, 0 to 1, below which it is not known (default: 0.5)")
    add("--json", action=argparse.BooleanOptionalAction, default=False, help="print one JSON object")
    add("--explain", action=argparse.BooleanOptionalAction, default=False, help="show what was retrieved, kept, prompted, cited; scores")
    add("--serve", action="store_true", help="answer for others, until standard input ends; see above")
    add("--input", nargs="+", metavar="PATH", help="JSONL of questions, for --output; of queries {qid, text}, for --rank")
    add("--output", metavar="DIR", help="answer the questions of --input into this folder")
    add("--rank", nargs="+", choices=("lines", "bm25", "dense"), help="print what these ways of searching find for --input")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run's OUTPUT aside")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if args.token:  # the manifest records the command
        sys.argv[:] = [word.replace(args.token, "…") for word in sys.argv]
    batch = args.output or args.rank
    if batch and not args.input:
        parser.error("--output and --rank need --input")
    question, log = (None, None) if batch or args.serve else read_question(args)
    path = owner_socket(args.uri)
    if not batch and "://" not in args.uri:
        with connected(path) as owner:
            if owner and args.serve:
                sys.exit(print(path))
            if owner:
                return answer_one(args, question, log, lambda request, say: answer_through(owner, request, say))
    logging.disable()  # the libraries log a traceback for every refused call; our sentence says it
    warnings.simplefilter("ignore")
    os.environ["GRPC_VERBOSITY"] = "NONE"
    from pymilvus.exceptions import MilvusException

    try:
        base = KnowledgeBase(args.uri, args.token, args.collection, args.embed_model)
        if args.rank:
            rank_file(args, base)
        elif args.output:
            answer_file(args, base, Model(args.llm_url, args.model) if args.llm else None)
        elif args.serve:
            serve(args, base)
        else:
            answer_one(args, question, log, lambda request, say: answer_by(base, request, say, note))
    except NoModel as error:
        fail(error)
    except MilvusException as error:
        fail(f"Milvus at {args.uri} refused or went away ({error.message}); mend that and ask again")


if __name__ == "__main__":
    run_main(main)
