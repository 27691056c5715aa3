#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["orjson>=3.10", "pyarrow>=16", "pyyaml>=6", "tqdm>=4.66", "xxhash>=3", "zstandard>=0.22"]
# ///
"""Convert conversations and preference data between the formats in use, any to any, and say what did not fit.

Usage:
    python scripts/convert_sft_format.py --input data/sample/sft --output /tmp/sft
    python scripts/convert_sft_format.py --input chats.parquet more.json.gz --from sharegpt --to openai --output /tmp/openai
    python scripts/convert_sft_format.py --input qa.csv --map instruction=question output=reply --explain 3
    zcat chats.jsonl.gz | python scripts/convert_sft_format.py --input - --to alpaca --output - > alpaca.jsonl
    make sft-data RECIPE=demo

messages      the OpenAI chat superset of this toolkit: thinking is in `reasoning_content`, tool arguments are JSON strings; a
              preference pair has the prompt in `messages`, and `chosen` and `rejected`, lists of messages (as Axolotl reads them);
              a labelled answer (KTO) is a conversation with `label`: true or false
openai        the same with thinking as <think> in the content; function_call and functions are read as well; DPO: input {messages,
              tools}, preferred_output, non_preferred_output
alpaca        instruction, input, output, system, history; tool calls as in chatml, but no tool results; chosen and rejected as
              texts, or kto_tag (LLaMA-Factory)
sharegpt      conversations [{from, value}] with function_call turns; chosen and rejected as turns, or kto_tag (LLaMA-Factory);
              ms-swift's conversation [{human, assistant}] is read as well
chatml        {"text": "<|im_start|>user\\n…<|im_end|>\\n…"}, a call is <tool_call> JSON in the answer; a text file has a blank line or
              <|endoftext|> between two conversations
swift         ms-swift's messages with tool_call and tool_response turns and `loss`; rejected_response, or label
input_output  Axolotl's segments [{label, text}] of ChatML text; weight 0 is label false. Other text does not tell its turns
trl           messages; prompt, chosen, rejected; or prompt, completion, label; arguments are objects, as chat templates want them

A row stays what it is: conversation, pair, or labelled answer. `--pairs chosen` makes a conversation of a pair, `--pairs label`
two labelled ones; chatml and input_output hold no pair.

Reads   .jsonl, .json (array), .csv, .parquet, .txt, each plain, .gz or .zst; folders; "-" (stdin).
Writes  OUTPUT/data.jsonl; rejected.jsonl {file, line, reason, remedy, raw}; losses.jsonl {file, line, id, field, value, reason}, found by
        reading each row back as it was written; manifest.json, last. `--output -`: data on stdout, both ledgers on stderr.
        Every record ends in data or in rejected. Unknown keys go along; null, [] and "" in an optional field count as absent.
        A table's dates and decimals are written as texts.
        `id` and `source` are kept, or else a hash of source and turns, and the file's name.
Exit    0 done or up to date; 1 failed, or --strict met a loss or reject; 2 bad usage; 3 refused: OUTPUT holds another run, or the
        format is in doubt.
Needs   CPU only, no network; memory does not grow with the input.
"""

import argparse
import codecs
import contextlib
import csv
import datetime
import decimal
import gc
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
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

import orjson
import xxhash
import zstandard
from tqdm import tqdm

# the formats, and the keys of a row with a meaning of their own there: an unknown key of such a name cannot go along into it
OWN = {
    "messages": {"messages", "system", "functions", "chosen", "rejected"},
    "openai": {"messages", "system", "functions", "chosen", "rejected", "input", "preferred_output", "non_preferred_output"},
    "alpaca": {"instruction", "input", "output", "system", "history", "chosen", "rejected", "kto_tag"},
    "sharegpt": {"conversations", "conversation", "system", "chosen", "rejected", "kto_tag"},
    "chatml": {"text"},
    "swift": {"messages", "system", "rejected_response"},
    "input_output": {"segments"},
    "trl": {"messages", "prompt", "completion", "chosen", "rejected"},
}
OPENAI, ROLED, PARTS = ("messages", "openai"), ("messages", "openai", "swift", "trl"), ("messages", "openai", "trl")
CONTRACT, ANSWERS = {"messages", "tools", "chosen", "rejected"}, ("chosen", "rejected")
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "tool_call": "assistant"}
ROLES |= {"observation": "tool", "tool_response": "tool", "function": "tool"}
INPUT = "alpaca input"  # key of a message that marks, inside this program, where Alpaca's input began
NOT_IN_SHAREGPT = {"role", "content", "from", "value", "reasoning_content", "tool_calls", "tool_call_id", INPUT}
SHAREGPT = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
TURNS = {name: role for role, name in SHAREGPT.items() if role != "developer"}
NAMES = {*ROLES, *itertools.chain.from_iterable(OWN.values()), "role", "content", "from", "value", "tools", "label", "id", "source"}
ALIASES = {"instruction": ("query", "question", "prompt", "problem"), "output": ("response", "answer")}  # as ms-swift knows them
OPTIONAL = {"name", "refusal", "function_call", "tool_calls", "tool_call_id", "weight", "reasoning_content", "audio"}
NESTED = {"messages", "conversations", "conversation", "history", "tools", "functions", "segments"}  # tables hold these as JSON texts
NESTED |= {"preferred_output", "non_preferred_output"}
SCALARS, NAMED = {str, int, bool}, ("id", "source")
ABSENT = (None, "", [])  # of an optional field; 0, false and {} are values, and are not dropped
IN_TURN = ("user", "assistant") * 500
AFTER_SYSTEM = ("system", *IN_TURN)
BARE = {"role", "content", "tool_calls", "weight"}  # keys of a message that is a call and nothing else
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt", ".chatml")
FILES = ("data.jsonl", "rejected.jsonl", "losses.jsonl")
HEAD = 20  # records from which --from auto knows the format

ESCAPED_QUOTE = re.compile(rb"\\u0022")
START, END, BETWEEN_RESULTS = "<|im_start|>", "<|im_end|>", "\n</tool_response>\n<tool_response>\n"  # the last as LLaMA-Factory joins them
SPECIAL = re.compile(r"<\|[^|<>\s]{1,64}\|>|<｜[^｜<>\s]{1,64}｜>|<(?:start|end)_of_turn>")
MARK = re.compile(rb"<(?:\||\xef\xbd\x9c|/?tool_|think>|start_of|end_of)")  # what may be special, thinking or a call, in JSON
THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n{0,2}(.*)", re.S)
TOOL_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.S)
TOOL_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.S)
CALL = re.compile(r'\{\s*"name":\s*"(?:[^"\\]|\\.)*",\s*"arguments":\s*(\{.*\})\s*\}', re.S)
TURN = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>\s*", re.S)
SPACE, SCAN = re.compile(r"\s*"), json.JSONDecoder().raw_decode

UNFORESEEN = "a shape that this program does not foresee"
REMEDIES = {
    UNFORESEEN: "report the row: it shows a fault of the program",
    "not JSON": "mend the line: one object of strict JSON a line, in UTF-8",
    "lone surrogate": "half of a character was cut off, or the file is not UTF-8 (iconv -f GB18030 -t UTF-8): mend the text",
    "duplicate key": "keep one of the two",
    "number beyond 64 bits": "write it as a string",
    "value without a JSON form": "text must be UTF-8; write bytes and durations as texts, or leave the column out",
    "nested too deeply": "flatten the record",
    "record is not an object": "write one JSON object a record",
    "more cells than columns": "quote the cell that holds a comma",
    "special token in the text": "a tokenizer would take it for a control token: rewrite or remove it",
    "no turns": "mend the record, or name its format with --from",
    "turn is not an object": "mend the turn, or name the record's format with --from",
    "content is not text": "write texts, or name the record's format with --from",
    "content is not text, or tool calls are not a list": "write a text, or a list of parts; tool_calls is a list",
    "unknown role": f"use one of {', '.join(ROLES)}, or --map user=NAME",
    "two system prompts": "keep the system text of the row or the system turn",
    "two user turns in a row": "join them, or add the answer between them",
    "empty answer": "write the answer or remove the record",
    "empty question": "write the question or remove the record",
    "no content": "write the text or remove the turn",
    "no assistant turn": "add the answer or remove the record",
    "tool call is not JSON": 'write {"name": …, "arguments": {…}}',
    "tool call without a function name": 'write {"name": …, "arguments": {…}}',
    "arguments are not a JSON object": "mend them; no arguments are written {}",
    "tool calls outside of an assistant turn": "move them to the assistant turn",
    "tool result without its call": "put it after the assistant turn with the call, under the call's id",
    "tool call without its result": "add the tool turn, or remove the call",
    "two tool calls with one id": "give each call its own id",
    "tools are not a list": "write a list of tools",
    "text outside of a turn": "a turn is <|im_start|>role, a line break, text, <|im_end|>; <|endoftext|> has a line of its own",
    "segments without ChatML turns": "only ChatML text tells where its turns are: give these rows to Axolotl as they are",
    "an answer is trained in part": "let one segment hold the answer with its <|im_end|>",
    "a pair lacks an answer": "add it, or remove the other one",
    "output beside chosen and rejected": "remove output, or both answers of the pair",
    "completion beside chosen and rejected": "remove completion, or both answers of the pair",
    "an answer before chosen and rejected": "end the prompt with a question or a tool result, or name the format with --from trl",
    "a question inside of an answer": "let chosen and rejected hold the answer only, or name the format with --from trl",
    "chosen and rejected are the same": "remove the record: it shows no preference",
    "kto_tag is not true or false": "write true or false",
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


class Reject(Exception):
    """A record that cannot be taken: `reason` has the same words for the same fault; `where` and `remedy` help to mend it."""

    def __init__(self, reason, where="", remedy=""):
        super().__init__(f"{reason} ({where})" if where else reason)
        self.reason, self.remedy = reason, remedy or REMEDIES.get(reason, "")


def unique(pairs):
    """Build a JSON object; Reject when a key comes twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise Reject("duplicate key", Counter(key for key, _ in pairs).most_common(1)[0][0])
    return row


def loads(raw):
    """Return the value of JSON bytes; Reject for broken JSON, NaN and lone surrogates, but not for a key that comes twice."""
    try:
        return orjson.loads(raw)
    except ValueError as error:
        raise Reject("lone surrogate" if "surrogate" in str(error) else "not JSON", str(error)) from None


def parse(raw):
    """Return the value of JSON (bytes or str) as `loads` does; Reject also for a key that comes twice.

    orjson lets the last of two equal keys win. Written again, such a value has fewer quotation marks than before: a cheap test
    that holds unless a mark is written \\u0022; there the slow parser of the standard library decides.
    """
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    value = loads(raw)
    if raw.count(b'"') != orjson.dumps(value).count(b'"') or ESCAPED_QUOTE.search(raw):
        json.loads(raw, object_pairs_hook=unique)
    return value


def rename(row, names):
    """Return a row with the keys, turn keys and role words of `--map` put in place of the file's own."""

    def keyed(item):
        if any(new in item and old in item for old, new in names.items()):
            raise Reject("duplicate key", "a name of --map and the name that it stands for")
        return {names.get(key, key): value for key, value in item.items()}

    def turn(item):
        item = keyed(item) if isinstance(item, dict) else item
        spoken = {key: item[key] for key in ("role", "from") if isinstance(item, dict) and isinstance(item.get(key), str)}
        words = {key: names[word] for key, word in spoken.items() if word in names}
        return item | words if words else item

    if not isinstance(row, dict):
        return row
    row = keyed(row)
    lists = {key: nested(value) for key, value in row.items() if key in NESTED}
    return row | {key: [*map(turn, value)] for key, value in lists.items() if isinstance(value, list)}


def nested(value):
    """Return the value of a JSON text that holds a list or an object, as tables have them; any other value as it is."""
    return parse(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def leaves(value):
    """Yield every scalar inside a JSON value, and every key."""
    if isinstance(value, (dict, list)):
        yield from value if isinstance(value, dict) else ()
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def rounded(text, value):
    """Return a note for each number of a JSON text that its value, as it was read, holds only rounded."""
    if not any(isinstance(leaf, float) for leaf in leaves(value)):
        return []
    exact = json.loads(text, parse_float=decimal.Decimal)
    found = [item for item in differences(exact, value) if isinstance(item[1], decimal.Decimal)]
    found = [(field, number) for field, number in found if number != decimal.Decimal(repr(float(number)))]
    return [(field, str(number), "a number of JSON holds about 17 digits") for field, number in found]


def elements(text):
    """Return the JSON texts of the elements of a valid JSON list, or the text itself where it is none."""
    if not text.lstrip().startswith("["):
        return [text]
    items, at = [], SPACE.match(text, text.index("[") + 1).end()
    while text[at] != "]":
        end = SCAN(text, at)[1]
        items.append(text[at:end])
        at = SPACE.match(text, end).end()
        at = SPACE.match(text, at + (text[at] == ",")).end()
    return items


def read_calls(texts, where):
    """Return the tool calls in JSON texts, each one call or a list; an object of arguments keeps its exact characters."""
    calls = []
    try:
        for text in itertools.chain.from_iterable(elements(text) for text in texts if parse(text) is not None):
            calls.append(parse(text))
            exact = CALL.fullmatch(text.strip())
            if exact and set(calls[-1]) == {"name", "arguments"}:
                calls[-1]["arguments"] = exact[1]
    except Reject as error:
        raise Reject("tool call is not JSON", f"{where}: {error}") from None
    return calls


def openai_call(call, where):
    """Return a tool call of any dialect as OpenAI writes it, arguments as a JSON string; `id` is None where none was given."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Reject("tool call without a function name", where)
    if not isinstance(call.get("id"), (str, type(None))) or call.get("type") not in (None, "function"):
        raise Reject("tool call of another type", where, "id is a text and type is function")
    text = function.get("arguments", {})
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    try:
        if not isinstance(parse(text), dict):
            raise Reject(text[:60])
    except Reject as error:
        raise Reject("arguments are not a JSON object", f"{where}: {error}") from None
    flat = ("id", "type") if function is call else ()
    inner = {key: value for key, value in function.items() if key not in ("name", "arguments", *flat)}
    outer = {} if function is call else {key: value for key, value in call.items() if key not in ("id", "type", "function")}
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": text} | inner} | outer


def read_turn(turn, form, where, notes):
    """Return one turn of any dialect as messages of the contract; several where one turn holds several tool results."""
    if not isinstance(turn, dict):
        raise Reject("turn is not an object", where)
    names = {} if "role" in turn else {"from": "role", "value": "content"}
    given = {key: value for key, value in turn.items() if key not in OPTIONAL or value not in (None, [])}
    fields = {names.get(key, key): value for key, value in given.items()}
    word, content, calls = fields.pop("role", None), fields.pop("content", None), fields.pop("tool_calls", [])
    role = ROLES.get(word) if isinstance(word, str) else None
    if not role:
        raise Reject("unknown role", f"{where}: {word!r:.60}")
    if "from" in names and {"value", "content"} <= given.keys():
        raise Reject("duplicate key", f"{where}: value and content")
    if form == "swift" and isinstance(fields.get("loss"), bool) and role == "assistant" and "weight" not in fields:
        fields["weight"] = int(fields.pop("loss"))
    parts = isinstance(content, list) and content and all(isinstance(part, dict) for part in content)
    called = word in ("function_call", "tool_call")
    if not (content is None or isinstance(content, str) or parts or called) or not isinstance(calls, list):
        raise Reject("content is not text, or tool calls are not a list", where)
    if "function_call" in fields:
        calls = [*calls, fields.pop("function_call")]
        notes.append((f"{where}.function_call", calls[-1], "deprecated, written as tool_calls"))
    if word == "function":
        notes.append((f"{where}.role", word, "deprecated, written as tool"))
    if called:
        texts = [content] if isinstance(content, str) else [json.dumps(content, ensure_ascii=False)]
        calls, content = calls + read_calls(texts, where), None
        if not calls:
            raise Reject("tool call is not JSON", f"{where}: there is none")
    if role == "assistant" and isinstance(content, str) and "reasoning_content" not in fields and (thought := THINK.fullmatch(content)):
        fields["reasoning_content"], text = thought.groups()
        if with_thinking(fields["reasoning_content"], text) != content:
            notes.append((f"{where}.content", content, "white space at <think> is written the usual way"))
        content = text
    if form not in ROLED and isinstance(content, str) and "<tool_" in content:
        head, tag, tail = content.partition("<tool_call>")
        if role == "assistant" and tag:
            if TOOL_CALL.sub("", tag + tail):
                raise Reject("tool call is not JSON", f"{where}: text after it")
            calls, content = calls + read_calls(TOOL_CALL.findall(tag + tail), where), head.removesuffix("\n") or None
        elif role != "assistant" and not TOOL_RESPONSE.sub("", content):
            return [{"role": "tool", "content": result} | fields for result in TOOL_RESPONSE.findall(content)]
        elif role == "tool" and form == "sharegpt":
            return [{"role": "tool", "content": result} | fields for result in content.split(BETWEEN_RESULTS)]
    if calls and role != "assistant":
        raise Reject("tool calls outside of an assistant turn", where)
    calls = [openai_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    return [{"role": role, "content": content} | fields | ({"tool_calls": calls} if calls else {})]


def answers(value):
    """Return an answer of a pair, which is a text, a turn or a list of turns, as a list of turns."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else [value] if isinstance(value, dict) else value


def pair(row, chosen="chosen", rejected="rejected"):
    """Take the two answers of a preference row out of it; {} where it has none."""
    found = {"chosen": answers(row.pop(chosen, None)), "rejected": answers(row.pop(rejected, None))}
    found = {key: turns for key, turns in found.items() if turns not in (None, []) and turns != answers("")}
    if len(found) == 1:
        raise Reject("a pair lacks an answer", rejected if "chosen" in found else chosen)
    return found


def given(row, key, default=None):
    """Take an optional field out of a row."""
    value = row.pop(key, None)
    return default if value in ABSENT else value


def read_messages(row, _):
    """Take the turns out of a row of the contract, or of OpenAI's chat."""
    return {"messages": row.pop("messages", None)} | pair(row)


def read_openai(row, notes):
    """Take the turns out of an OpenAI row; one for DPO holds the prompt in `input`."""
    if not isinstance(row.get("input"), dict):
        return read_messages(row, notes)
    asked = row.pop("input")
    if asked.keys() & row.keys():
        raise Reject("duplicate key", f"{min(asked.keys() & row.keys())}, in input and beside it")
    known = ("messages", "tools", "parallel_tool_calls")
    notes += [(f"input.{key}", value, "it stands beside the turns") for key, value in asked.items() if key not in known]
    row.update(asked)
    return {"messages": row.pop("messages", None)} | pair(row, "preferred_output", "non_preferred_output")


def read_alpaca(row, _):
    """Take the turns out of an Alpaca row: history first; the input follows the instruction on a new line."""
    texts, history = [given(row, key, "") for key in ("instruction", "input", "output")], given(row, "history", [])
    pairs = isinstance(history, list) and all(isinstance(item, list) and len(item) == 2 for item in history)
    if not pairs or not all(isinstance(text, str) for text in texts):
        raise Reject("content is not text", "instruction, input, output, or history: [[question, answer], …]")
    question = {"role": "user", "content": "\n".join(text for text in texts[:2] if text)} | ({INPUT: texts[1]} if texts[1] else {})
    turns = [{"role": role, "content": text} for item in history for role, text in zip(("user", "assistant"), item, strict=True)]
    two = pair(row)
    if two and texts[2]:
        raise Reject("output beside chosen and rejected")
    return {"messages": [*turns, question, *([] if two else answers(texts[2]))]} | two


def read_sharegpt(row, _):
    """Take the turns out of a ShareGPT row; each item of ms-swift's dialect is split into its turns."""
    if "conversations" in row and "conversation" in row:
        raise Reject("duplicate key", "conversations and conversation")
    turns = row.pop("conversations", row.pop("conversation", None))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in turns):
        return {"messages": turns} | pair(row)
    flat = []
    for turn in turns:
        rest = {key: value for key, value in turn.items() if key not in ("system", "human", "assistant")}
        flat += [{"role": "system", "content": turn["system"]}] if turn.get("system") not in ABSENT else []
        flat += [{"role": "user", "content": turn.get("human")}, {"role": "assistant", "content": turn.get("assistant")} | rest]
    return {"messages": flat} | pair(row)


def read_chatml(row, notes):
    """Take the turns out of ChatML text; nothing but white space may stand between them."""
    whole, turns, at = row.pop("text", None), [], 0
    text = whole.removesuffix("\n").removesuffix("<|endoftext|>") if isinstance(whole, str) else ""
    start = len(text) - len(text.lstrip())
    while turn := TURN.match(text, at or start):
        turns.append({"role": turn[1].strip(), "content": turn[2]})
        at = turn.end()
    if text[at:].strip():
        raise Reject("text outside of a turn", text[at : at + 40])
    if turns and "".join(f"{START}{turn['role']}\n{turn['content']}{END}\n" for turn in turns) != whole:
        notes.append(("text", whole, "white space around its turns is written the usual way"))
    return {"messages": turns}


def read_swift(row, _):
    """Take the turns out of an ms-swift row; the chosen answer is what follows the last question."""
    turns, worse = row.pop("messages", None), answers(row.pop("rejected_response", None))
    if worse in (None, []) or worse == answers("") or not isinstance(turns, list):
        return {"messages": turns}
    border = max((n + 1 for n, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"), default=0)
    return {"messages": turns[:border], "chosen": turns[border:], "rejected": worse}


def read_segments(row, notes):
    """Take the turns out of Axolotl's `input_output`: ChatML text in pieces; an answer that is not trained gets weight 0."""
    segments = row.pop("segments", None)
    good = isinstance(segments, list) and all(isinstance(item, dict) and item.keys() == {"label", "text"} for item in segments)
    if not good or not all(isinstance(item["label"], bool) and isinstance(item["text"], str) for item in segments):
        raise Reject("no turns", 'segments are [{"label": true or false, "text": …}]')
    text = "".join(item["text"] for item in segments)
    trained, more = [item["label"] for item in segments for _ in item["text"]], []
    if not text.lstrip().startswith(START):
        raise Reject("segments without ChatML turns")
    turns, at = read_chatml({"text": text}, more)["messages"], 0
    for turn in turns:
        at = text.index("\n", text.index(START, at)) + 1
        labels = {*trained[at : at + len(turn["content"]) + len(END)]}
        at += len(turn["content"]) + len(END)
        if len(labels) > 1:
            raise Reject("an answer is trained in part")
        if labels != {turn["role"] == "assistant"}:
            turn["weight"] = int(True in labels)
    joined = [[label, "".join(item["text"] for item in items)] for label, items in itertools.groupby(segments, lambda item: item["label"])]
    if joined != [[item["label"], item["text"]] for item in segments_of([(t["role"], t["content"], t.get("weight")) for t in turns])]:
        notes.append(("segments", segments, "the borders of its pieces, and white space, are written the usual way"))
    return {"messages": turns}


def read_trl(row, notes):
    """Take the turns out of a TRL row: messages; prompt and completion; or prompt, chosen and rejected, each a text or turns."""
    prompt, done, two = row.pop("prompt", None), answers(row.pop("completion", None)), pair(row)
    if two and row.get("messages") == two["chosen"]:  # as UltraFeedback has them: the chosen conversation, for training without pairs
        del row["messages"]
    if two and done not in (None, []):
        raise Reject("completion beside chosen and rejected")
    if not two and done in (None, []):
        row |= {"prompt": prompt} if prompt not in ABSENT else {}
        return {"messages": row.pop("messages", None)}
    if not all(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) for turns in two.values() or [done]):
        raise Reject("turn is not an object")
    if two and two["chosen"][0].get("role") != "assistant":  # whole conversations: what both begin with is the prompt
        same = [a for a, b in itertools.takewhile(lambda both: both[0] == both[1], zip(two["chosen"], two["rejected"], strict=False))]
        if prompt not in (*ABSENT, same, [same and same[0].get("content")][0]):
            notes.append(("prompt", prompt, "chosen and rejected begin with another one"))
        return {"messages": same} | {key: turns[len(same) :] for key, turns in two.items()}
    if isinstance(prompt, str):
        notes.append(("prompt", prompt, "a text, written as a user turn"))
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise Reject("no turns", "prompt")
    if two:
        return {"messages": prompt} | two
    if isinstance(row.get("label"), bool):
        if len(done) > 1:
            notes.append(("completion", done, "the answer that is judged is its last turn"))
    else:  # TRL trains on the completion only
        prompt = [{"weight": 0} | turn if turn.get("role") == "assistant" else turn for turn in prompt]
    return {"messages": [*prompt, *done]}


def unpack(row, form):
    """Return a table's row with its JSON texts as values: turns, tools, and labels, which a table may hold as texts."""
    for key in {"chosen", "rejected", "prompt", "completion", "rejected_response", *(("input",) if form == "openai" else ())} & OWN[form]:
        text = row.get(key)
        if isinstance(text, str) and text.startswith(('{"', '[{"')):
            with contextlib.suppress(Reject):
                value = parse(text)
                turns = value if isinstance(value, list) else [value]
                if all(isinstance(turn, dict) and turn.keys() & {"role", "from", "messages"} for turn in turns):  # or it is a text in JSON
                    row = row | {key: value}
    words = {"true": True, "false": False}
    return row | {key: words[str(row[key]).lower()] for key in ("label", "kto_tag") if str(row.get(key)).lower() in words}


def read(row, form):
    """Return (conversation of the contract, notes) for a row; a note is (field, value, reason) for what is written in another way."""
    if not isinstance(row, dict) or None in row:
        raise Reject("record is not an object" if None not in row else "more cells than columns")
    row, notes = row | {key: nested(row[key]) for key in NESTED & (OWN[form] | {"tools"}) & row.keys()}, []
    lists = READERS[form](row, notes)
    system, tools = given(row, "system") if "system" in OWN[form] else None, given(row, "tools", [])
    functions = given(row, "functions", []) if form in OPENAI else []
    if not isinstance(tools, list) or not isinstance(functions, list):
        raise Reject("tools are not a list")
    notes += [("functions", functions, "deprecated, written as tools")] if functions else []
    for name, turns in lists.items():
        if not isinstance(turns, list) or not turns:
            raise Reject("no turns", name if len(lists) > 1 else "")
        lists[name] = read_turns(turns, form, name, notes)
    if system is not None:
        if not isinstance(system, str) or lists["messages"][0]["role"] == "system":
            raise Reject("two system prompts" if isinstance(system, str) else "content is not text", "system")
        lists["messages"].insert(0, {"role": "system", "content": system})
    for messages in threads(lists):
        number_calls(messages)
    tag = row.pop("kto_tag", None) if "kto_tag" in OWN[form] else None
    if tag is not None and not isinstance(tag, bool):
        raise Reject("kto_tag is not true or false", f"{tag!r:.40}")
    if "label" in row and (tag is not None or ("kto_tag" in OWN[form] and isinstance(row["label"], bool))):
        reason = f"{form} writes it as kto_tag" if tag is None else "kto_tag takes its place"
        notes.append(("label", row["label"] if tag is None else row.pop("label"), reason))
    notes += [(key, row[key], "the name has another meaning in messages") for key in row if key in CONTRACT]
    rest = {key: value for key, value in row.items() if key not in CONTRACT}
    rest = {key: value for key, value in rest.items() if key not in ("id", "source") or value not in (None, "")}
    tools = [*tools, *({"type": "function", "function": function} for function in functions)]
    return lists | ({"tools": tools} if tools else {}) | rest | ({} if tag is None else {"label": tag}), notes


def read_turns(turns, form, name, notes):
    """Return the messages of a list of turns; ms-swift's tool_call turns join the answer before them, as parallel calls do."""
    messages = []
    for n, turn in enumerate(turns):
        made = read_turn(turn, form, f"{name}[{n}]", notes)
        before = messages[-1] if messages and messages[-1]["role"] == "assistant" and turn.get("role") == "tool_call" else {}
        if before and made[0].keys() <= BARE and made[0].get("weight", before.get("weight")) == before.get("weight"):
            before["tool_calls"] = before.get("tool_calls", []) + made[0]["tool_calls"]
        else:
            messages += made
    return messages


def threads(conversation):
    """Return the lists of messages that a model would see: one, or those with the chosen and with the rejected answer."""
    return [conversation["messages"] + conversation[key] for key in ANSWERS if key in conversation] or [conversation["messages"]]


def number_calls(messages):
    """Give each tool call without an id `call_0`, `call_1`, …; a result without one answers the first call that still waits."""
    numbers, waiting = itertools.count(), []
    for message in messages:
        for call, number in zip(message.get("tool_calls", ()), numbers, strict=False):
            call["id"] = call["id"] or f"call_{number}"
        if message["role"] == "tool":
            named = message.get("tool_call_id")
            message["tool_call_id"] = named if named not in ABSENT else waiting[0] if waiting else None
        waiting = [call for call in waiting if call != message.get("tool_call_id")] + [call["id"] for call in message.get("tool_calls", ())]


def blank(content):
    """Return whether a content says nothing: no text, or parts of text that are all white space."""
    texts = [part.get("text") if part.get("type") == "text" else "…" for part in content] if isinstance(content, list) else [content]
    return not any(text if not isinstance(text, str) else text.strip() for text in texts)


def check(conversation):
    """Raise Reject where a conversation would teach something that nobody meant."""
    for key, messages in zip(ANSWERS, threads(conversation), strict=False):
        check_thread(messages, len(conversation["messages"]), key)
    if "chosen" in conversation:
        if conversation["messages"][-1]["role"] == "assistant":
            raise Reject("an answer before chosen and rejected")
        if any(message["role"] == "user" for key in ANSWERS for message in conversation[key]):
            raise Reject("a question inside of an answer")
        if conversation["chosen"] == conversation["rejected"]:
            raise Reject("chosen and rejected are the same")


def check_thread(messages, prompt, answer):
    """Raise Reject for a fault in the order of the turns, or an empty one; the first `prompt` are no part of the answer."""
    before, waiting = None, []
    for n, message in enumerate([*messages, {"role": None, "content": ""}]):
        role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
        empty = blank(content)
        ids = [call["id"] for call in calls]
        faults = {
            "tool result without its call": role == "tool" and message.get("tool_call_id") not in waiting,
            # a conversation may end in a call, and ms-swift writes parallel calls as turns in a row
            "tool call without its result": waiting and role != "tool" and (role or before == "tool") and not (calls and before == role),
            "two tool calls with one id": len({*waiting, *ids}) < len(waiting) + len(ids),
            "two user turns in a row": role == before == "user",
            "empty answer": role == "assistant" and empty and not calls and not message.get("refusal"),
            "empty question": role == "user" and empty,
            "no content": content is None and role in ("system", "developer", "tool"),
        }
        for fault in (name for name, found in faults.items() if found):
            raise Reject(fault, f"messages[{n}]" if n < prompt else f"{answer}[{n - prompt}]" if n < len(messages) else "at the end")
        waiting = [call for call in waiting if call != message.get("tool_call_id")] + ids
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise Reject("no assistant turn")


def check_values(conversation):
    """Raise Reject for numbers and types that JSON does not hold, and for special tokens where a model would read them."""
    for leaf in leaves(conversation):
        if isinstance(leaf, float) and not (math.isfinite(leaf) and abs(leaf) < 2**63):
            raise Reject("number beyond 64 bits", str(leaf))
        if not isinstance(leaf, (str, int, float, type(None))):
            raise Reject("value without a JSON form", type(leaf).__name__)
    said = [conversation[key] for key in ("messages", *ANSWERS, "tools") if key in conversation]
    calls = [
        call["function"]["arguments"] for thread in threads(conversation) for message in thread for call in message.get("tool_calls", ())
    ]
    for leaf in leaves([said, *map(orjson.loads, calls)]):
        if isinstance(leaf, str) and (mark := SPECIAL.search(leaf)):
            raise Reject("special token in the text", mark[0])


def plain(row, form, target):
    """Return (conversation, Alpaca's input) of a row with only questions and answers, else None.

    Every format holds such a row whole, so it needs neither check nor reading back: the cheap road, which most rows take.
    """
    try:
        extra, used = "", {"messages"}
        if form in ROLED:
            messages = row["messages"]
        elif form == "sharegpt":
            used = {"conversations"}
            messages = [{"role": TURNS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
            if sum(map(len, row["conversations"])) > 2 * len(messages):
                return None
        elif form == "alpaca":
            used = {"instruction", "input", "output", "system", "history"}
            asked, extra, history = row["instruction"], row.get("input"), row.get("history")
            extra, history = "" if extra is None else extra, () if history is None else history
            if type(asked) is not str or type(extra) is not str or (extra and target == form):
                return None
            if type(history) not in (list, tuple) or any(type(item) is not list or len(item) != 2 for item in history):
                return None
            texts = [*itertools.chain.from_iterable(history), f"{asked}\n{extra}" if asked and extra else asked or extra, row["output"]]
            messages = [{"role": "system", "content": row["system"]}] if row.get("system") not in (None, "") else []
            messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        else:
            return None
        rest = {}
        for key, value in row.items():
            if key not in used:
                taken = key in OWN[form] or key in OWN[target] or key in CONTRACT or key == "label" or (key in NAMED and not value)
                if taken or type(value) not in SCALARS:
                    return None
                rest[key] = value
        first = messages[0]["role"] == "system"
        if not first < len(messages) <= len(IN_TURN) or (len(messages) - first) % 2 or sum(map(len, messages)) != 2 * len(messages):
            return None
        for message, role in zip(messages, AFTER_SYSTEM if first else IN_TURN, strict=False):
            content = message["content"]
            if message["role"] != role or type(content) is not str or not content or content.isspace():
                return None
        return {"messages": messages} | rest, extra
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def with_thinking(reasoning, text):
    """Return an answer with its reasoning in front, as Qwen3 and DeepSeek-R1 write it."""
    return text if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{text}"


def call_texts(message):
    """Return each tool call as JSON with the arguments as they stand."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [f'{{"name": {json.dumps(f["name"], ensure_ascii=False)}, "arguments": {f["arguments"]}}}' for f in functions]


def flat_text(message):
    """Return a message as one text: reasoning, content, then tool calls in <tool_call> tags, as Hermes and Qwen write them."""
    content = message["content"] or ""
    if isinstance(content, list):
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise Reject("content parts that are not text", "", "only messages, openai and trl hold images and sound")
        content = "\n".join(part["text"] for part in content)
    text = with_thinking(message.get("reasoning_content"), content)
    calls = [f"<tool_call>\n{call}\n</tool_call>" for call in call_texts(message)]
    return "\n".join([text, *calls] if text else calls)


def contract_turns(messages):
    """Return the messages without this program's own mark."""
    return [{key: value for key, value in message.items() if key != INPUT} for message in messages]


def openai_turns(messages):
    """Return the messages with the reasoning in the content."""
    turns = contract_turns(messages)
    for turn in turns:
        if "reasoning_content" in turn:
            turn["content"] = with_thinking(turn.pop("reasoning_content"), turn["content"] or "")
    return turns


def trl_turns(messages):
    """Return the messages with tool arguments as objects: chat templates write them as JSON, and would write a text twice."""
    turns = contract_turns(messages)
    for turn in turns:
        calls = [(call, call["function"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())]
        calls = [call | {"function": function | {"arguments": orjson.loads(arguments)}} for call, function, arguments in calls]
        turn |= {"tool_calls": calls} if calls else {}
    return turns


def swift_turns(messages):
    """Return ms-swift's turns: each tool call a turn of its own, and nothing but role, content and loss."""
    turns = []
    for message in messages:
        role, calls, weight = message["role"], call_texts(message), message.get("weight")
        rest = {key: message[key] for key in ("loss_scale", *(("name",) if role == "tool" else ())) if key in message}
        rest |= {"loss": bool(weight)} if role == "assistant" and type(weight) is int and weight in (0, 1) else {}
        text = flat_text({key: value for key, value in message.items() if key != "tool_calls"})
        name = {"tool": "tool_response", "developer": "system"}.get(role, role)
        turns += [{"role": name, "content": text} | rest] if text or not calls else []
        turns += [{"role": "tool_call", "content": call} | rest for call in calls]
    return turns


def sharegpt_turns(messages):
    """Return the ShareGPT turns as LLaMA-Factory has them: bare calls are one function_call turn, their results one observation."""
    turns, joins = [], False
    for message in messages:
        calls = [] if message["content"] or "reasoning_content" in message else call_texts(message)
        value = flat_text(message) if not calls else calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
        rest = {key: value for key, value in message.items() if key not in NOT_IN_SHAREGPT}
        bare = message["role"] == "tool" and not rest
        if bare and joins:
            turns[-1]["value"] += BETWEEN_RESULTS + value
        else:
            turns.append({"from": "function_call" if calls else SHAREGPT[message["role"]], "value": value} | rest)
        joins = bare
    return turns


def segments_of(turns):
    """Return Axolotl's pieces of ChatML text for each (role, text, weight): an answer is trained, with its end, unless its weight is 0."""
    pieces = []
    for role, text, weight in turns:
        trained = role == "assistant" if weight is None else bool(weight)
        pieces += [(False, f"{START}{role}\n"), (trained, f"{text}{END}"), (False, "\n")]
    groups = itertools.groupby(pieces, lambda piece: piece[0])
    return [{"label": label, "text": "".join(text for _, text in group)} for label, group in groups]


def one_text(turns):
    """Return the one answer of a format that holds a single turn."""
    if len(turns) != 1:
        raise Reject("an answer of several turns", "", "choose --to messages, openai, swift or trl")
    return flat_text(turns[0])


def write_alpaca(talk):
    """Return the Alpaca fields: an optional system prompt, then questions and answers in turn."""
    turns, two = talk["messages"], {key: one_text(talk[key]) for key in ANSWERS if key in talk}
    system = {"system": flat_text(turns[0])} if turns[0]["role"] in ("system", "developer") else {}
    turns = turns[len(system) :] + ([] if not two else talk["chosen"])
    if len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Reject("only questions and answers in turn")
    *texts, question, answer = [flat_text(turn) for turn in turns]
    more = turns[-2].get(INPUT, "")
    history = {"history": [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]} if texts else {}
    row = {"instruction": question[: -len(more) - 1] if more else question, "input": more} | (two or {"output": answer}) | system | history
    return row | ({"kto_tag": talk["label"]} if isinstance(talk.get("label"), bool) else {})


def write_sharegpt(talk):
    """Return the ShareGPT fields; an answer of a pair is one turn."""
    two = {key: sharegpt_turns(talk[key])[0] for key in ANSWERS if key in talk and [one_text(talk[key])]}
    row = {"conversations": sharegpt_turns(talk["messages"])} | two
    return row | ({"kto_tag": talk["label"]} if isinstance(talk.get("label"), bool) else {})


def write_openai(talk):
    """Return OpenAI's chat row, or its row for DPO."""
    if "chosen" not in talk:
        return {"messages": openai_turns(talk["messages"])}
    given = {key: talk[key] for key in ("tools", "parallel_tool_calls") if key in talk}
    two = {"preferred_output": openai_turns(talk["chosen"]), "non_preferred_output": openai_turns(talk["rejected"])}
    return {"input": {"messages": openai_turns(talk["messages"])} | given} | two


def write_swift(talk):
    """Return ms-swift's row: the chosen answer in the messages, the other as rejected_response."""
    whole = talk["messages"] + talk.get("chosen", [])
    return {"messages": swift_turns(whole)} | ({"rejected_response": swift_turns(talk["rejected"])} if "rejected" in talk else {})


def write_trl(talk):
    """Return TRL's row: messages, or a prompt with chosen and rejected, or with a completion that is labelled."""
    turns = trl_turns(talk["messages"])
    if "chosen" in talk:
        return {"prompt": turns} | {key: trl_turns(talk[key]) for key in ANSWERS}
    labelled = isinstance(talk.get("label"), bool) and len(turns) > 1
    return {"prompt": turns[:-1], "completion": turns[-1:]} if labelled else {"messages": turns}


def write_text(talk, segments=False):
    """Return ChatML text, or Axolotl's pieces of it."""
    if "chosen" in talk:
        raise Reject("a pair of answers", "", "--pairs chosen keeps the better answer, --pairs label makes two labelled rows")
    turns = [(message["role"], flat_text(message), message.get("weight")) for message in talk["messages"]]
    return {"segments": segments_of(turns)} if segments else {"text": "".join(f"{START}{role}\n{text}{END}\n" for role, text, _ in turns)}


READERS = {"messages": read_messages, "openai": read_openai, "alpaca": read_alpaca, "sharegpt": read_sharegpt}
READERS |= {"chatml": read_chatml, "swift": read_swift, "input_output": read_segments, "trl": read_trl}
WRITERS = {"messages": lambda talk: {key: contract_turns(talk[key]) for key in ("messages", *ANSWERS) if key in talk}}
WRITERS |= {"openai": write_openai, "alpaca": write_alpaca, "sharegpt": write_sharegpt, "chatml": write_text}
WRITERS |= {"swift": write_swift, "input_output": lambda talk: write_text(talk, segments=True), "trl": write_trl}


def write(talk, target):
    """Return a conversation as a row of `target`; what the format has no place for is left out."""
    row = WRITERS[target](talk)
    taken = OWN[target] | {"messages", *ANSWERS} | ({"label"} if "kto_tag" in row else set())
    taken |= {"tools", "parallel_tool_calls"} if "preferred_output" in row else set()
    rest = {key: value for key, value in talk.items() if key not in taken}
    if "tools" in rest and target not in ("messages", "openai", "trl"):
        rest["tools"] = json.dumps(rest["tools"], ensure_ascii=False)
    return row | rest


def skeleton(talk, target):
    """Return what no conversion may change: roles, texts, reasoning, calls, which call each tool result answers, where answers begin."""
    bones = [[len(talk[key]) for key in ("messages", *ANSWERS) if key in talk]]
    for messages in threads(talk):
        ids = []
        for message in messages:
            role, content, calls = message["role"], message["content"] or None, message.get("tool_calls", [])
            role = "system" if role == "developer" and target in ("alpaca", "sharegpt", "swift") else role
            content = flat_text({"content": content}) or None if isinstance(content, list) and target not in PARTS else content
            ids = [call["id"] for call in calls] + ids
            answers = len(ids) - ids.index(message["tool_call_id"]) if role == "tool" else None
            functions = [(call["function"]["name"], parse(call["function"]["arguments"])) for call in calls]
            bones.append((role, content, message.get("reasoning_content"), functions, answers))
    return bones


def differences(was, now, where=""):
    """Yield (field, value) for each value of `was` that `now` does not hold; Reject where `now` has one that nobody wrote."""
    if isinstance(was, dict) and isinstance(now, dict):
        if now.keys() - was.keys():
            raise Reject("it would be read with one more field", f"{where}{min(now.keys() - was.keys())}")
        for key, value in was.items():
            inner = f"{where}.{key}" if where else key
            yield from differences(value, now[key], inner) if key in now else [(inner, value)]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for n, both in enumerate(zip(was, now, strict=True)):
            yield from differences(*both, f"{where}[{n}]")
    elif (was != now or type(was) is not type(now)) and not (where.endswith("content") and not was and not now):
        yield where, was


def losses(talk, row, target):
    """Return (field, value, reason) for each thing in a conversation that `row`, read back, does not hold.

    Raises Reject when the row would be read as another conversation: turns, texts and calls are never changed.
    """
    back, notes = read(row, target)
    check(back)
    if notes or skeleton(back, target) != skeleton(talk, target):
        raise Reject("it would be read as something else")
    return [(field.replace(INPUT, "input"), value, f"{target} has no place for it") for field, value in differences(talk, back)]


def recast(talk, pairs):
    """Return [(conversation, losses)]: a pair as it is, as the chosen conversation, or as two conversations with a label each."""
    if "chosen" not in talk or pairs == "keep":
        return [(talk, [])]
    rest = {key: value for key, value in talk.items() if key not in ANSWERS}
    two = [rest | {"messages": thread} for thread in threads(talk)]
    if pairs == "chosen":
        return [(two[0], [("rejected", talk["rejected"], "--pairs chosen keeps one answer")])]
    lost = [("label", talk["label"], "--pairs label writes its own")] if "label" in talk else []
    return [(one | {"id": f"{talk['id']}-{key}", "label": key == "chosen"}, lost) for key, one in zip(ANSWERS, two, strict=True)]


def quick(raw, row, form, target, source):
    """Return (JSON line, conversation, losses) of a plain row by the cheap road, or None where the careful one must decide.

    `raw`: the JSON of the row, where nobody has looked yet whether a key comes twice.
    """
    found = plain(row, form, target)
    if not found:
        return None
    talk, extra = found
    turns = talk["messages"]
    if target == "sharegpt":
        turns = [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in turns]
    body = orjson.dumps(turns)
    if b"<" in body and MARK.search(body):
        return None
    if raw:  # a key that comes twice shows in the number of quotation marks, as in `parse`
        rest = {key: value for key, value in row.items() if form == "alpaca" or key not in ("messages", "conversations")}
        marks = orjson.dumps(rest).count(b'"') + (form != "alpaca" and body.count(b'"') + 2)
        if marks != raw.count(b'"') or ESCAPED_QUOTE.search(raw):
            return None
    talk = identified(talk, source, None if target == "sharegpt" else body)
    if target in PARTS or target == "sharegpt":
        rest = orjson.dumps({key: value for key, value in talk.items() if key != "messages"}, option=orjson.OPT_APPEND_NEWLINE)
        line = (b'{"conversations":' if target == "sharegpt" else b'{"messages":') + body + b"," + rest[1:]
    else:
        line = orjson.dumps(write(talk, target), option=orjson.OPT_APPEND_NEWLINE)
    asked = len(talk["messages"]) - 2
    return line, talk, [(f"messages[{asked}].input", extra, f"{target} has no place for it")] if extra else []


def identified(talk, source, body=None):
    """Return a conversation with an id and a source: its own, or a hash of source and turns, and the file's name."""
    head = {key: talk[key] for key in ("messages", *ANSWERS, "tools") if key in talk}
    source = talk.get("source", source)
    if "id" in talk:
        return head | {"id": talk["id"], "source": source} | talk
    turns = [body] if body else [orjson.dumps(contract_turns(talk[key])) for key in ("messages", *ANSWERS) if key in talk]
    return head | {"id": xxhash.xxh3_64_hexdigest(b"".join([orjson.dumps(source), *turns])), "source": source} | talk


def convert(raw, form, target, source, names=None, pairs="keep"):
    """Return [(JSON line of `target`, conversation, losses)] for one record, JSON bytes or a row of a table; raises Reject.

    It is one, but for a pair of answers that becomes two labelled rows. `names`: of --map, the file's names to the format's.
    """
    try:
        table = not isinstance(raw, bytes)
        value = raw if table else parse(raw) if names else loads(raw)
        row = rename(value, names) if names else value
        row = unpack(row, form) if table else row
        if made := quick(None if names or table else raw, row, form, target, source):
            return [made]
        talk, notes = read(row if names or table else parse(raw), form)
        notes += [] if table else rounded(raw, value)
        check(talk)
        check_values(talk)
        made = []
        for one, lost in recast(identified(talk, source), pairs):
            try:
                row = write(one, target)
                made.append((orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE), one, [*notes, *lost, *losses(one, row, target)]))
            except Reject as error:
                raise Reject(f"{target} cannot hold it", str(error), error.remedy or "choose another --to, such as messages") from None
        return made
    except RecursionError:
        raise Reject("nested too deeply") from None
    except orjson.JSONEncodeError as error:
        if "Recursion limit" in str(error):
            raise Reject("nested too deeply") from None
        raise Reject("value without a JSON form", str(error)) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # one odd row must not end a run of hours
        raise Reject(UNFORESEEN, f"{type(error).__name__}: {error}") from None


class Hashed(io.FileIO):
    """A file that is hashed while it is read, so that no second pass is needed."""

    def __init__(self, path):
        super().__init__(path)
        self.sha = hashlib.sha256()

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.sha.update(memoryview(buffer)[:count])
        return count


class Unzstd(io.RawIOBase):
    """The unpacked bytes of zstd frames; unlike zstandard's own reader it tells when the file was cut off in a frame."""

    def __init__(self, file):
        self.file, self.frame, self.inside, self.text = file, zstandard.ZstdDecompressor().decompressobj(), False, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.text and (piece := self.frame.unused_data or self.file.read(1 << 12)):  # small: a piece may unpack to very much
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.text = memoryview(self.frame.decompress(piece))
            self.inside = not self.frame.eof
        if not self.text and self.inside:
            raise EOFError("compressed file ended before the end of its last frame")
        count = min(len(buffer), len(self.text))
        buffer[:count], self.text = self.text[:count], self.text[count:]
        return count


class Sink:
    """A file of lines, written in large pieces and hashed on the way."""

    def __init__(self, file):
        self.file, self.sha, self.lines, self.bytes = file, hashlib.sha256(), [], 0

    def write(self, line):
        self.lines.append(line)
        self.bytes += len(line)
        if self.bytes > 1 << 18:
            self.flush()

    def flush(self):
        piece, self.lines, self.bytes = b"".join(self.lines), [], 0
        self.sha.update(piece)
        self.file.write(piece)
        self.file.flush()


@contextlib.contextmanager
def open_input(path, digests):
    """Yield the unpacked bytes of a file or of stdin; notes a file's SHA-256 in `digests` when it was read to its end."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with Hashed(path) as raw:
        file = packed = io.BufferedReader(raw, 1 << 18)
        if path.suffix == ".gz":
            file = io.BufferedReader(gzip.GzipFile(fileobj=packed), 1 << 18)
        elif path.suffix == ".zst":
            file = io.BufferedReader(Unzstd(packed), 1 << 18)
        yield file
        while packed.read(1 << 20):
            pass
        digests[str(path)] = raw.sha.hexdigest()


def array_items(file):
    """Yield (line, JSON bytes) of each element of an array; one element and a piece of the file are in memory."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, at, line, ended, due = "", 0, 1, False, "["
    while True:
        start = SPACE.match(text, at).end()
        line, at, end = line + text.count("\n", at, start), start, start
        try:
            if due == "value" and text[at : at + 1] != "]":
                _, end = SCAN(text, at)
            if end == len(text):
                raise json.JSONDecodeError("it ends early", text, at)
        except json.JSONDecodeError as error:
            if ended and due == "end":
                return
            if ended or (error.pos < len(text) - 64 and not error.msg.startswith("Unterminated")):
                raise ValueError(f"line {line}: {error.msg}; one object a line would let the other records pass") from None
            piece = file.read(max(1 << 20, 2 * (len(text) - at)))
            text, at, ended = text[at:] + decoder.decode(piece, not piece), 0, not piece
            continue
        if end > at:
            yield line, text[at:end].encode("utf-8", "surrogateescape")
            line, at, due = line + text.count("\n", at, end), end, ","
        elif due == "end":
            raise ValueError(f"line {line}: {text[at]!r} after the end of the array; write one array, or one object a line")
        elif text[at] in (due, "]"):
            at, due = at + 1, "end" if text[at] == "]" else "value"
        else:
            raise ValueError(f"line {line}: {text[at]!r} where a comma or ] is due")


def text_items(file):
    """Yield (line, row) of each conversation in ChatML text: a blank line or <|endoftext|> after a closed turn ends it."""
    start, block, closed = 1, b"", True
    for number, line in enumerate(itertools.chain(file, [b""]), 1):
        ends = closed and line.strip() in (b"", b"<|endoftext|>")
        if block and (ends or not line):
            yield start, {"text": block.decode("utf-8-sig", "surrogateescape")}
            block = b""
        elif not ends:
            start, block = start if block else number, block + line
        closed = line.rstrip().endswith(b"<|im_end|>") or (closed and ends)


def table_items(path, file):
    """Yield (line or row number, row) of CSV or parquet; an empty cell, or a null inside a struct, is absent."""

    absent = (None, "") if file else (None,)

    def once(columns):
        if twice := [name for name, count in Counter(columns).items() if count > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}")

    def prune(value):
        if isinstance(value, dict):
            return {key: prune(item) for key, item in value.items() if item not in absent}
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        return [prune(item) for item in value] if isinstance(value, list) else str(value) if isinstance(value, decimal.Decimal) else value

    if file:
        csv.field_size_limit(1 << 30)
        text, line = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""), 2
        table = csv.DictReader(text)
        once(table.fieldnames or [])
        for row in table:
            yield line, prune(row)
            line = table.line_num + 1
        text.detach()  # or it would close the file, which is still to be hashed to its end
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        once(table.schema_arrow.names)
        batches = table.iter_batches(batch_size=256)
        yield from enumerate((prune(row) for batch in batches for row in batch.to_pylist()), 1)


def records(path, digests):
    """Yield (line, JSON bytes or row) of each record in a file of any kind; a fault of the file itself ends in one sentence."""
    kind = next((suffix for suffix in reversed(path.suffixes) if suffix in SUFFIXES), "")
    try:
        if kind == ".parquet":
            yield from table_items(path, None)
            return
        with open_input(path, digests) as file:
            first = file.peek(1 << 16)
            start = first.removeprefix(codecs.BOM_UTF8).lstrip()
            if b"\0" in first:
                raise ValueError("it is binary")
            if kind == ".csv":
                yield from table_items(path, file)
            elif start.startswith(b"["):
                yield from array_items(file)
            elif start.startswith(b"<|im_start|>"):
                yield from text_items(file)
            else:
                file.read(len(codecs.BOM_UTF8) * first.startswith(codecs.BOM_UTF8))
                yield from (item for item in enumerate(file, 1) if not item[1].isspace())
    except RecursionError:
        raise SystemExit(f"convert_sft_format.py: {path}: a record is nested too deeply; flatten it, or write one object a line") from None
    except (ValueError, EOFError, csv.Error, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise SystemExit(f"convert_sft_format.py: {path}: {error}; mend the file or leave it out") from None


def shapes(row):
    """Return (format, names) for each format whose fields a row has; `names` maps the file's names to those of the format."""
    keys = row.keys() if isinstance(row, dict) else set()
    two, found = {"chosen", "rejected"} <= keys, []
    if two and "prompt" in keys and isinstance(row["chosen"], list):
        return [("trl", {})]
    if "messages" in keys:
        swift = "rejected_response" in keys or re.search(r"\W(tool_call|tool_response)\W", str(row["messages"]))
        found = ["swift" if swift else "messages" if two else "openai"]
    found += ["openai"] * ("preferred_output" in keys) + ["sharegpt"] * bool({"conversations", "conversation"} & keys)
    found += ["alpaca"] * ("instruction" in keys and ("output" in keys or two)) + ["input_output"] * ("segments" in keys)
    found += ["chatml"] * (START in str(row.get("text", "")) if keys else False)
    found += ["trl"] * (("prompt" in keys and ("completion" in keys or two)) or (not found and two and not isinstance(row["chosen"], str)))
    names = {} if found else {theirs: ours for ours, known in ALIASES.items() for theirs in known if theirs in keys}
    if names and len(names) == len(set(names.values())) and "instruction" in names.values() and ("output" in names.values() or two):
        return [("alpaca", names)]
    return [(form, {}) for form in found]


def sniff(path, head, names):
    """Return (format, names) that the first records agree on, and say so on stderr; exit 3 when they do not."""
    votes, rows = Counter(), []
    for _, raw in head:
        with contextlib.suppress(Reject, RecursionError):
            rows.append(rename(loads(raw) if isinstance(raw, bytes) else raw, names))
            found = shapes(rows[-1])
            votes.update([(found[0][0], tuple(found[0][1].items()))] if len(found) == 1 else ())
    if {form for form, _ in votes} <= {"openai", "messages", "swift"}:  # one reads what the other does: the file is of the richest
        votes = Counter({(max(form for form, _ in votes), ()): votes.total()}) if votes else votes
    (form, mapped), count = (votes.most_common(1) or [(("", ()), 0)])[0]
    if not count or count < 0.75 * len(rows):
        seen = (
            f"the first has {', '.join(map(repr, [*rows[0]][:9]))}"
            if rows and isinstance(rows[0], dict)
            else "none is a JSON object on a line of its own"
        )
        seen_as = ", ".join(f"{n} look like {name}" for (name, _), n in votes.most_common()) or "none is known"
        print(
            f"convert_sft_format.py: {path}: of its first {len(head)} records {seen_as}, {seen}; name the format with --from, "
            "and fields of other names with --map",
            file=sys.stderr,
        )
        sys.exit(3)
    names = names | dict(mapped)
    theirs = {ours: name for name, ours in names.items()}
    keys = {dict(mapped).get(key, key) for row in rows if isinstance(row, dict) for key in row} & (OWN[form] | {"tools", "label"})
    shown = ", ".join(f"{key}={theirs[key]}" if key in theirs else key for key in sorted(keys))
    print(f"sft-data: {path}: {form} ({shown}), as {count} of its first {len(head)} records show", file=sys.stderr)
    return form, names


def find_inputs(paths):
    """Return the files to read: of a folder those of a known kind, of a stage's output folder its data only."""
    files = []
    for path in map(Path, paths):
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        known = [file for file in inside if set(file.suffixes) & set(SUFFIXES)]
        known = [file for file in known if file.name.startswith("data") or not (file.parent / "manifest.json").exists()]
        for file in inside if path.is_dir() else ():
            if file not in known:
                print(f"sft-data: {file}: left out, not a file of records", file=sys.stderr)
        if not known and (path.is_dir() or not path.exists()) and str(path) != "-":
            raise SystemExit(f"convert_sft_format.py: {path}: no {', '.join(SUFFIXES)} there; name a file, a folder or -")
        files += known or [path]
    return files


def explain(raw, made, fault, title):
    """Print a record before and after, side by side, and what was lost or why it was refused."""

    def lines(value, width):
        """Cut JSON, or text, into lines of at most `width` columns; a Chinese character takes two."""
        for line in (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2, default=str)).splitlines():
            cut, used = "", 0
            for letter in line:
                size = 1 + (unicodedata.east_asian_width(letter) in "WF")
                if used + size > width:
                    yield cut + " " * (width - used)
                    cut, used = "", 0
                cut, used = cut + letter, used + size
            yield cut + " " * (width - used)

    width = max(20, (shutil.get_terminal_size((140, 50)).columns - 3) // 2)
    try:
        before = loads(raw) if isinstance(raw, bytes) else raw
    except Reject:
        before = raw.decode("utf-8", "backslashreplace")
    after = (
        f"rejected: {fault}\n{fault.remedy}"
        if fault
        else "\n".join(json.dumps(orjson.loads(one[0]), ensure_ascii=False, indent=2) for one in made)
    )
    columns = itertools.zip_longest(lines(before, width), lines(after, width), fillvalue=" " * width)
    text = "\n".join([title, *(f"{left} │ {right}".rstrip() for left, right in columns)])
    lost = [
        f"lost: {field} = {json.dumps(value, ensure_ascii=False)} ({reason})" for _, _, entries in made for field, value, reason in entries
    ]
    sys.stdout.buffer.write("\n".join([text, *lost, "" if fault or lost else "nothing is lost\n"]).encode("utf-8", "backslashreplace"))


def build_parser():
    parser = argparse.ArgumentParser(
        prog="convert_sft_format.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help='files, folders, or "-" for stdin')
    parser.add_argument("--output", metavar="DIR", help='folder for data.jsonl and the ledgers, or "-" for stdout')
    parser.add_argument("--from", default="auto", choices=["auto", *OWN], help="format of the input (default: seen from each file)")
    parser.add_argument("--to", default="messages", choices=OWN, help="format of the output (default: %(default)s)")
    parser.add_argument(
        "--map", nargs="+", default=[], metavar="FIELD=NAME", help="the file's NAME for a field, turn key or role of the format"
    )
    parser.add_argument("--pairs", default="keep", choices=["keep", "chosen", "label"], help="what becomes of chosen and rejected")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, default=False, help="fail on the first loss or reject")
    parser.add_argument("--explain", type=int, metavar="N", help="show record N before and after, and what is lost; write nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N records")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put another run's OUTPUT aside")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    given, stdout, plan = dict(word.partition("=")[::2] for word in args.map), args.output == "-", []
    for field, name in given.items():
        if not name or field not in NAMES:
            parser.error(f"--map {field}={name}: write FIELD=NAME, FIELD one of {', '.join(sorted(NAMES))}")
    if (args.limit or 0) < 0 or (args.explain is not None and args.explain < 1):
        parser.error("--limit N is 0 or more, --explain N is 1 or more")
    if len({*given.values()}) < len(args.map):
        parser.error("--map: a field or a NAME stands twice; give each field a NAME of its own")
    if not args.output and args.explain is None:
        parser.error("the following arguments are required: --output (or --explain N)")
    for path in find_inputs(args.input):
        rows, names = records(path, {}), {name: field for field, name in given.items()}
        head = list(itertools.islice(rows, HEAD))
        if not head:
            raise SystemExit(f"convert_sft_format.py: {path}: holds no records; remove it or name another file")
        form, names = (getattr(args, "from"), names) if getattr(args, "from") != "auto" else sniff(path, head, names)
        plan.append((path, form, names, itertools.chain(head, rows) if str(path) == "-" else None))
    if args.explain is not None:
        return explain_record(args, plan)
    gc.set_threshold(100_000, 50, 100)  # rows make no cycles; looking for them as often as by default costs a fifth of the time
    if "-" in args.input:
        args.stdin = time.time()  # what came by stdin cannot be compared with another run's
    run = None if stdout else Run("sft-data", args, args.input, ignore=["explain"])
    total, kept, formats, roles, reasons, fields, refused = 0, 0, Counter(), Counter(), Counter(), Counter(), 0

    def note(file, why, entry):
        file.write(json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        if args.strict:
            raise SystemExit(f"convert_sft_format.py: {entry['file']} line {entry['line']}: {why}; mend it or run without --strict")

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(write_atomic(run.output / name)) for name in FILES] if run else [sys.stdout.buffer, sys.stderr.buffer]
        sinks = [Sink(file) for file in files]
        data, rejected, lossy = sinks if run else (*sinks, sinks[1])
        for path, form, names, rows in plan:
            rows = tqdm(rows or records(path, run.digests if run else {}), path.name, unit=" records", disable=not sys.stderr.isatty())
            source = "stdin" if str(path) == "-" else path.name
            for line, raw in itertools.islice(rows, None if args.limit is None else max(0, args.limit - total)):
                total += 1
                try:
                    made = convert(raw, form, args.to, source, names, args.pairs)
                except Reject as error:
                    reasons[error.reason] += 1
                    refused += 1
                    text = raw.strip().decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
                    entry = {"file": str(path), "line": line, "reason": str(error), "remedy": error.remedy, "raw": text}
                    note(rejected, str(error), {key: value for key, value in entry.items() if value != ""})
                    continue
                for row, talk, lost in made:
                    data.write(row)
                    kept += 1
                    formats[form] += 1
                    for message in talk["messages"]:
                        roles[message["role"]] += 1
                    for field, value, reason in lost:
                        fields[re.sub(r"\[\d+\]", "", field)] += 1
                        entry = {"file": str(path), "line": line, "id": talk["id"], "field": field, "value": value, "reason": reason}
                        note(lossy, f"{field} is lost ({reason})", entry)
        for sink in sinks:
            sink.flush()
    rows = f" as {kept} rows" if kept != total - refused else ""
    summary = f"kept {total - refused} of {total} conversations{rows}, {fields.total()} losses"
    if stdout:
        print(f"sft-data: {summary}", file=sys.stderr)
        return
    run.digests |= {str(run.output / name): sink.sha.hexdigest() for name, sink in zip(FILES, sinks, strict=True)}
    counts = {"records": total, "kept": total - refused, "rejected": refused, "losses": fields.total()}
    mapped = {str(path): {"format": form, "names": names} for path, form, names, _ in plan}
    metrics = {"from": formats, "mapping": mapped, "turns": roles, "rejected": reasons, "losses": fields}
    run.finish(summary, counts, metrics, dict(zip(FILES, (kept, refused, fields.total()), strict=True)))


def explain_record(args, plan):
    """Show record `--explain N`, counted over all inputs."""
    every = ((path, form, names, *item) for path, form, names, rows in plan for item in rows or records(path, {}))
    found = next(itertools.islice(every, max(0, args.explain - 1), None), None)
    if not found:
        raise SystemExit(f"convert_sft_format.py: --explain {args.explain}: the input has fewer records; name a smaller number")
    path, form, names, line, raw = found
    made, fault = [], None
    try:
        made = convert(raw, form, args.to, "stdin" if str(path) == "-" else path.name, names, args.pairs)
    except Reject as error:
        fault = error
    explain(raw, made, fault, f"{path} line {line}: {form} -> {args.to}")


if __name__ == "__main__":
    run_main(main)
