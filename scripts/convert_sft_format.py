#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["orjson>=3.10", "pyarrow>=16", "pyyaml>=6", "tqdm>=4.66", "zstandard>=0.22"]
# ///
"""Convert conversations between OpenAI chat, Alpaca, ShareGPT, ChatML and `messages`, any to any, and say what did not fit.

Usage:
    python scripts/convert_sft_format.py --input data/sample/sft --output /tmp/sft
    python scripts/convert_sft_format.py --input chats.parquet more.json.gz --from sharegpt --to openai --output /tmp/openai
    zcat chats.jsonl.gz | python scripts/convert_sft_format.py --input - --to alpaca --output - > alpaca.jsonl
    make sft-data RECIPE=demo

messages  the OpenAI chat superset of this toolkit: thinking is in `reasoning_content`, tool arguments are JSON strings
openai    the same with thinking as <think> in the content; the deprecated `function_call` and `functions` are read as well
alpaca    instruction, input, output, system, history; tool calls as in chatml, but no tool results
sharegpt  conversations [{from, value}] with function_call turns; ms-swift's conversation [{human, assistant}] is read as well
chatml    {"text": "<|im_start|>user\\n…<|im_end|>\\n…"}, a call is <tool_call> JSON in the answer; a text file has a blank line or
          <|endoftext|> between two conversations

Reads   .jsonl, .json (array), .csv, .parquet, .txt, each plain, .gz or .zst; folders; "-" (stdin).
Writes  OUTPUT/data.jsonl; rejected.jsonl {file, line, reason, remedy, raw}; losses.jsonl {file, line, id, field, value, reason}, found by
        reading each row back as it was written; manifest.json, last. `--output -`: data on stdout, both ledgers on stderr.
        Every record ends in data or in rejected. Unknown keys go along; null, [] and "" in an optional field count as absent.
        `id` and `source` are kept, or else a hash of source and messages, and the file's name.
Exit    0 done or up to date; 1 failed, or --strict met a loss or reject; 2 bad usage; 3 refused: OUTPUT holds another run, or the
        format is in doubt.
Needs   CPU only, no network; memory does not grow with the input.
"""

import argparse
import codecs
import contextlib
import csv
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
import zlib
from collections import Counter
from pathlib import Path

import orjson
import zstandard
from tqdm import tqdm

FORMATS = ("messages", "openai", "alpaca", "sharegpt", "chatml")
OPENAI = ("messages", "openai")
SIGNS = ({"instruction", "output"}, "alpaca"), ({"conversations"}, "sharegpt"), ({"conversation"}, "sharegpt"), ({"messages"}, "openai")
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "tool_call": "assistant"}
ROLES |= {"observation": "tool", "tool_response": "tool", "function": "tool"}
INPUT = "alpaca input"  # key of a message that marks, inside this program, where Alpaca's input began
NOT_IN_SHAREGPT = {"role", "content", "from", "value", "reasoning_content", "tool_calls", "tool_call_id", INPUT}
SHAREGPT = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
TURNS = {name: role for role, name in SHAREGPT.items() if role != "developer"}
# row keys with a meaning of their own in a format: an unknown key of such a name cannot go along into it
OWN = {"alpaca": {"instruction", "input", "output", "system", "history"}, "sharegpt": {"conversations", "conversation", "system"}}
OWN |= {"chatml": {"text", "system"}} | {form: {"messages", "system", "functions"} for form in OPENAI}
OPTIONAL = {"name", "refusal", "function_call", "tool_calls", "tool_call_id", "weight", "reasoning_content", "audio"}
NESTED = {"messages", "conversations", "conversation", "history", "tools", "functions"}  # tables hold these as JSON texts
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt", ".chatml")
HEAD = 20  # records from which --from auto knows the format

SET_OFF, ESCAPED = re.compile(rb'"[ \t\r\n]+:'), re.compile(rb"\\u00[23]")
SPECIAL = re.compile(r"<\|[^|<>\s]{1,64}\|>|<｜[^｜<>\s]{1,64}｜>|<(?:start|end)_of_turn>")
THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n{0,2}(.*)", re.S)
TOOL_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.S)
TOOL_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.S)
CALL = re.compile(r'\{\s*"name":\s*"(?:[^"\\]|\\.)*",\s*"arguments":\s*(\{.*\})\s*\}', re.S)
TURN = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>\s*", re.S)
SPACE = re.compile(r"\s*")

REMEDIES = {
    "not JSON": "mend the line: strict JSON in UTF-8",
    "duplicate key": "keep one of the two",
    "number beyond 64 bits": "write it as a string",
    "special token in the text": "a tokenizer would take it for a control token: rewrite or remove it",
    "no turns": "mend the record, or name its format with --from",
    "unknown role": f"use one of {', '.join(ROLES)}",
    "two system prompts": "keep the system text of the row or the system turn",
    "two user turns in a row": "join them, or add the answer between them",
    "empty answer": "write the answer or remove the record",
    "empty question": "write the question or remove the record",
    "tool call is not JSON": 'write {"name": …, "arguments": {…}}',
    "tool call without a function name": 'write {"name": …, "arguments": {…}}',
    "arguments are not a JSON object": "mend them; no arguments are written {}",
    "tool result without its call": "put it after the assistant turn with the call, under the call's id",
    "tool call without its result": "add the tool turn, or remove the call",
    "two tool calls with one id": "give each call its own id",
    "text outside of a turn": "a turn is <|im_start|>role, a line break, text, <|im_end|>",
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


def parse(raw):
    """Return the value of JSON (bytes or str); Reject for broken JSON, NaN, lone surrogates and duplicate keys.

    orjson lets the last of two equal keys win. Written again, such a value has fewer `":` than before: a cheap test that
    holds unless a colon is set off, or a quote or colon escaped; there the slow parser of the standard library decides.
    """
    try:
        raw = raw.encode() if isinstance(raw, str) else raw
        value = orjson.loads(raw)
    except ValueError as error:
        raise Reject("not JSON", str(error)) from None
    doubt = SET_OFF.search(raw) or (b"\\u00" in raw and ESCAPED.search(raw))
    if doubt or raw.count(b'":') != orjson.dumps(value).count(b'":'):
        json.loads(raw, object_pairs_hook=unique)
    return value


def leaves(value):
    """Yield every scalar inside a JSON value."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def read_calls(texts, where):
    """Return the tool calls in JSON texts, each one call or a list; an arguments object of a single call keeps its exact characters."""
    calls = []
    for text in texts:
        try:
            call, exact = parse(text), CALL.fullmatch(text)
        except Reject as error:
            raise Reject("tool call is not JSON", f"{where}: {error}") from None
        if exact and set(call) == {"name", "arguments"}:
            call["arguments"] = exact[1]
        calls += call if isinstance(call, list) else [call]
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
    parts = isinstance(content, list) and content and all(isinstance(part, dict) for part in content)
    if not (content is None or isinstance(content, str) or parts) or not isinstance(calls, list):
        raise Reject("content is not text, or tool calls are not a list", where)
    if "function_call" in fields:
        calls = [*calls, fields.pop("function_call")]
        notes.append((f"{where}.function_call", calls[-1], "deprecated, written as tool_calls"))
    if word == "function":
        notes.append((f"{where}.role", word, "deprecated, written as tool"))
    if word in ("function_call", "tool_call"):
        calls, content = calls + read_calls([content or ""], where), None
    if role == "assistant" and isinstance(content, str) and "reasoning_content" not in fields and (thought := THINK.fullmatch(content)):
        fields["reasoning_content"], text = thought.groups()
        if with_thinking(fields["reasoning_content"], text) != content:
            notes.append((f"{where}.content", content, "white space at <think> is written the usual way"))
        content = text
    if form not in OPENAI and isinstance(content, str) and "<tool_" in content:
        head, tag, tail = content.partition("<tool_call>")
        if role == "assistant" and tag:
            if TOOL_CALL.sub("", tag + tail):
                raise Reject("tool call is not JSON", f"{where}: text after it")
            calls, content = calls + read_calls(TOOL_CALL.findall(tag + tail), where), head.removesuffix("\n") or None
        elif role != "assistant" and not TOOL_RESPONSE.sub("", content):
            return [{"role": "tool", "content": result} | fields for result in TOOL_RESPONSE.findall(content)]
    if calls and role != "assistant":
        raise Reject("tool calls outside of an assistant turn", where)
    calls = [openai_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    return [{"role": role, "content": content} | fields | ({"tool_calls": calls} if calls else {})]


def alpaca_turns(row):
    """Return the turns of an Alpaca row: history first; the input follows the instruction on a new line."""
    texts, history = [row.get(key) or "" for key in ("instruction", "input", "output")], row.get("history") or []
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Reject("content is not text", "instruction, input, output, or history: [[question, answer], …]")
    question = {"role": "user", "content": "\n".join(text for text in texts[:2] if text)} | ({INPUT: texts[1]} if texts[1] else {})
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*turns, question, {"role": "assistant", "content": texts[2]}]


def sharegpt_turns(row):
    """Return the turns of a ShareGPT row; each item of ms-swift's dialect is split into its turns."""
    if "conversations" in row and "conversation" in row:
        raise Reject("duplicate key", "conversations and conversation")
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in turns):
        return turns
    flat = []
    for turn in turns:
        rest = {key: value for key, value in turn.items() if key not in ("system", "human", "assistant")}
        flat += [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
        flat += [{"role": "user", "content": turn.get("human")}, {"role": "assistant", "content": turn.get("assistant")} | rest]
    return flat


def chatml_turns(row):
    """Return the turns of ChatML text; nothing but white space may stand between them."""
    text, turns, at = row.get("text"), [], 0
    text = text.strip().removesuffix("<|endoftext|>") if isinstance(text, str) else ""
    while turn := TURN.match(text, at):
        turns.append({"role": turn[1].strip(), "content": turn[2]})
        at = turn.end()
    if text[at:]:
        raise Reject("text outside of a turn", text[at : at + 40])
    return turns


def read(row, form):
    """Return (conversation of the contract, notes) for a row; a note is (field, value, reason) for what is written in another way."""
    if not isinstance(row, dict) or None in row:
        raise Reject("record is not an object" if None not in row else "more cells than columns")
    nested = NESTED & (OWN[form] | {"tools"})
    row = row | {key: parse(row[key]) for key in nested if isinstance(row.get(key), str) and row[key][:1] in ("[", "{")}
    readers = {"alpaca": alpaca_turns, "sharegpt": sharegpt_turns, "chatml": chatml_turns}
    turns, system, tools = readers[form](row) if form in readers else row.get("messages"), row.get("system"), row.get("tools") or []
    functions = (row.get("functions") or []) if form in OPENAI else []
    if not isinstance(turns, list) or not turns:
        raise Reject("no turns")
    if not isinstance(tools, list) or not isinstance(functions, list):
        raise Reject("tools are not a list")
    notes = [("functions", functions, "deprecated, written as tools")] if functions else []
    messages = [message for n, turn in enumerate(turns) for message in read_turn(turn, form, f"messages[{n}]", notes)]
    if system:
        if not isinstance(system, str) or messages[0]["role"] == "system":
            raise Reject("two system prompts" if isinstance(system, str) else "content is not text", "system")
        messages.insert(0, {"role": "system", "content": system})
    number_calls(messages)
    tools = [*tools, *({"type": "function", "function": function} for function in functions)]
    rest = {key: value for key, value in row.items() if key not in OWN[form] and key != "tools"}
    rest = {key: value for key, value in rest.items() if key not in ("id", "source") or value not in (None, "")}
    return {"messages": messages} | ({"tools": tools} if tools else {}) | rest, notes


def number_calls(messages):
    """Give each tool call without an id `call_0`, `call_1`, …; a result without one answers the first call that still waits."""
    numbers, waiting = itertools.count(), []
    for message in messages:
        for call, number in zip(message.get("tool_calls", ()), numbers, strict=False):
            call["id"] = call["id"] or f"call_{number}"
        if message["role"] == "tool":
            message["tool_call_id"] = message.get("tool_call_id") or (waiting[0] if waiting else None)
        waiting = [call for call in waiting if call != message.get("tool_call_id")] + [call["id"] for call in message.get("tool_calls", ())]


def check(messages):
    """Raise Reject where a conversation would teach something that nobody meant."""
    before, waiting = None, []
    for n, message in enumerate([*messages, {"role": None, "content": ""}]):
        role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
        empty = not (content.strip() if isinstance(content, str) else content)
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
            raise Reject(fault, f"messages[{n}]")
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
    calls = [call["function"]["arguments"] for message in conversation["messages"] for call in message.get("tool_calls", ())]
    for leaf in leaves([conversation["messages"], conversation.get("tools"), *map(orjson.loads, calls)]):
        if isinstance(leaf, str) and (mark := SPECIAL.search(leaf)):
            raise Reject("special token in the text", mark[0])


def plain(row, form):
    """Return the conversation of a row that holds only questions and answers without markup, else None.

    Every format holds such a row whole, so it needs neither check nor reading back: the cheap road, which most rows take.
    """
    try:
        if form in OPENAI:
            messages, own = row["messages"], {"messages"}
        elif form == "sharegpt":
            messages, own = [{"role": TURNS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]], {"conversations"}
            if sum(map(len, row["conversations"])) > 2 * len(messages):
                return None
        elif form == "alpaca" and not (row.get("input") or row.get("system") or row.get("history")):
            messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            own = OWN["alpaca"]
        else:
            return None
        named = {key: row[key] for key in ("id", "source") if key in row}
        if row.keys() - own - {"id", "source"} or any(type(name) is not str or not name for name in named.values()):
            return None
        turn = 0
        for message in messages:
            role, content = message["role"], message["content"]
            if role != ("user", "assistant")[turn % 2] and not (role == "system" and message is messages[0]):
                return None
            if len(message) > 2 or type(content) is not str or "<" in content or not content.strip():
                return None
            turn += role != "system"
        return {"messages": messages} | named if turn and turn % 2 == 0 else None
    except (KeyError, TypeError, AttributeError):
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
            raise Reject("content parts that are not text", "", "only messages and openai hold images and sound")
        content = "\n".join(part["text"] for part in content)
    text = with_thinking(message.get("reasoning_content"), content)
    calls = [f"<tool_call>\n{call}\n</tool_call>" for call in call_texts(message)]
    return "\n".join([text, *calls] if text else calls)


def write_openai(messages, target):
    """Return the OpenAI turns; only our own `messages` keeps the reasoning apart."""
    turns = [{key: value for key, value in message.items() if key != INPUT} for message in messages]
    for turn in turns if target == "openai" else ():
        if "reasoning_content" in turn:
            turn["content"] = with_thinking(turn.pop("reasoning_content"), turn["content"] or "")
    return {"messages": turns}


def write_alpaca(messages, _):
    """Return the Alpaca fields: an optional system prompt, then questions and answers in turn."""
    system = {"system": messages[0]["content"]} if messages[0]["role"] == "system" else {}
    turns = messages[1:] if system else messages
    if len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Reject("only questions and answers in turn")
    *texts, question, answer = [flat_text(turn) for turn in turns]
    more = turns[-2].get(INPUT, "")
    history = {"history": [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]} if texts else {}
    return {"instruction": question[: -len(more) - 1] if more else question, "input": more, "output": answer} | system | history


def write_sharegpt(messages, _):
    """Return the ShareGPT turns; calls with nothing beside them are a function_call turn, as LLaMA-Factory has it."""
    turns = []
    for message in messages:
        calls = [] if message["content"] or "reasoning_content" in message else call_texts(message)
        value = flat_text(message) if not calls else calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
        rest = {key: value for key, value in message.items() if key not in NOT_IN_SHAREGPT}
        turns.append({"from": "function_call" if calls else SHAREGPT[message["role"]], "value": value} | rest)
    return {"conversations": turns}


def write_chatml(messages, _):
    """Return the ChatML text."""
    return {"text": "".join(f"<|im_start|>{message['role']}\n{flat_text(message)}<|im_end|>\n" for message in messages)}


def write(conversation, target):
    """Return a conversation as a row of `target`; what the format has no place for is left out."""
    writer = {"alpaca": write_alpaca, "sharegpt": write_sharegpt, "chatml": write_chatml}.get(target, write_openai)
    rest = {key: value for key, value in conversation.items() if key not in OWN[target] and key != "messages"}
    if "tools" in rest and target not in OPENAI:
        rest["tools"] = json.dumps(rest["tools"], ensure_ascii=False)
    return writer(conversation["messages"], target) | rest


def skeleton(messages, target):
    """Return what no conversion may change: roles, texts, reasoning, calls, and which call each tool result answers."""
    bones, ids = [], []
    for message in messages:
        role, content, calls = message["role"], message["content"] or None, message.get("tool_calls", [])
        role = "system" if role == "developer" and target == "sharegpt" else role
        content = flat_text({"content": content}) if isinstance(content, list) and target not in OPENAI else content
        ids = [call["id"] for call in calls] + ids
        answers = len(ids) - ids.index(message["tool_call_id"]) if role == "tool" else None
        functions = [(call["function"]["name"], parse(call["function"]["arguments"])) for call in calls]
        bones.append((role, content, message.get("reasoning_content"), functions, answers))
    return bones


def losses(conversation, row, target):
    """Return (field, value, reason) for each thing in `conversation` that `row`, read back, does not hold.

    Raises Reject when the row would be read as another conversation: turns, texts and calls are never changed.
    """
    back, notes = read(row, target)
    check(back["messages"])
    if notes or skeleton(back["messages"], target) != skeleton(conversation["messages"], target):
        raise Reject("it would be read as something else")
    pairs = [("", conversation | {"messages": 0}, back | {"messages": 0})]
    pairs += [(f"messages[{n}].", *pair) for n, pair in enumerate(zip(conversation["messages"], back["messages"], strict=True))]
    found = [(where, key, value) for where, was, now in pairs for key, value in was.items() if value != now.get(key)]
    found = [(where + key, value) for where, key, value in found if (key, value) not in (("content", ""), ("content", None))]
    return [(field.replace(INPUT, "input"), value, f"{target} has no place for it") for field, value in found]


def convert(raw, form, target, source):
    """Return (JSON line of `target`, conversation, losses) for one record, JSON bytes or a row of a table; raises Reject."""
    try:
        row = parse(raw) if isinstance(raw, bytes) else raw
        conversation, lost = plain(row, form), None
        if not conversation:
            conversation, lost = read(row, form)
            check(conversation["messages"])
            check_values(conversation)
        source = conversation.get("source", source)
        digest = hashlib.blake2b(orjson.dumps([source, conversation["messages"]]), digest_size=8)
        head = {key: conversation[key] for key in ("messages", "tools") if key in conversation}
        conversation = head | {"id": digest.hexdigest(), "source": source} | conversation
        try:
            row = conversation if lost is None and target in OPENAI else write(conversation, target)
            lost = [] if lost is None else lost + losses(conversation, row, target)
        except Reject as error:
            raise Reject(f"{target} cannot hold it", str(error), "choose another --to, such as messages") from None
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE), conversation, lost
    except RecursionError:
        raise Reject("nested too deeply") from None
    except orjson.JSONEncodeError as error:
        raise Reject("value without a JSON form", str(error)) from None


class Hashed(io.FileIO):
    """A file that is hashed while it is read, so that no second pass is needed."""

    def __init__(self, path):
        super().__init__(path)
        self.sha = hashlib.sha256()

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.sha.update(memoryview(buffer)[:count])
        return count


@contextlib.contextmanager
def open_input(path, digests):
    """Yield the unpacked bytes of a file or of stdin; notes a file's SHA-256 in `digests` when it was read to its end."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with Hashed(path) as raw:
        file = packed = io.BufferedReader(raw, 1 << 20)
        if path.suffix == ".gz":
            file = io.BufferedReader(gzip.GzipFile(fileobj=packed), 1 << 20)
        elif path.suffix == ".zst":
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True), 1 << 20)
        yield file
        while packed.read(1 << 20):
            pass
        digests[str(path)] = raw.sha.hexdigest()


def array_items(file):
    """Yield (line, JSON bytes) of each element of an array; one element and a piece of the file are in memory."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape"), json.JSONDecoder().raw_decode
    text, at, line, ended, due = "", 0, 1, False, "["
    while due:
        start = SPACE.match(text, at).end()
        line, at, end = line + text.count("\n", at, start), start, start
        try:
            if due == "value" and text[at : at + 1] != "]":
                _, end = scan(text, at)
            if end == len(text):
                raise json.JSONDecodeError("it ends early", text, at)
        except json.JSONDecodeError as error:
            if ended or (error.pos < len(text) - 64 and not error.msg.startswith("Unterminated")):
                raise ValueError(f"line {line}: {error.msg}; one object a line would let the other records pass") from None
            piece = file.read(max(1 << 20, 2 * (len(text) - at)))
            text, at, ended = text[at:] + decoder.decode(piece, not piece), 0, not piece
            continue
        if end > at:
            yield line, text[at:end].encode("utf-8", "surrogateescape")
            line, at, due = line + text.count("\n", at, end), end, ","
        elif text[at] in (due, "]") or (due == "value" and text[at] == "]"):
            at, due = at + 1, "" if text[at] == "]" else "value"
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

    def prune(value):
        if isinstance(value, dict):
            return {key: prune(item) for key, item in value.items() if item not in absent}
        return [prune(item) for item in value] if isinstance(value, list) else value

    if file:
        csv.field_size_limit(1 << 30)
        text, line = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""), 2
        table = csv.DictReader(text)
        for row in table:
            yield line, prune(row)
            line = table.line_num + 1
        text.detach()  # or it would close the file, which is still to be hashed to its end
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
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
                lines = enumerate((line.removeprefix(codecs.BOM_UTF8).strip() for line in file), 1)
                yield from ((number, line) for number, line in lines if line)
    except (ValueError, EOFError, csv.Error, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise SystemExit(f"convert_sft_format.py: {path}: {error}; mend the file or leave it out") from None


def sniff(path, head):
    """Return the format that the first records agree on, and say so on stderr; exit 3 when they do not."""
    votes, rows = Counter(), []
    for _, raw in head:
        with contextlib.suppress(Reject):
            rows.append(parse(raw) if isinstance(raw, bytes) else raw)
            keys = rows[-1].keys() if isinstance(rows[-1], dict) else set()
            found = {form for signs, form in SIGNS if signs <= keys}
            found |= {"chatml"} if "text" in keys and "<|im_start|>" in str(rows[-1]["text"]) else set()
            votes.update(found if len(found) == 1 else ())
    form, count = (votes.most_common(1) or [("", 0)])[0]
    if not count or count < 0.75 * len(rows):
        seen = f"the first has {', '.join(map(repr, [*rows[0]][:9]))}" if rows and isinstance(rows[0], dict) else "none is a JSON object"
        votes = ", ".join(f"{n} look like {name}" for name, n in votes.most_common()) or "none is known"
        print(
            f"convert_sft_format.py: {path}: of its first {len(head)} records {votes}, {seen}; name the format with --from", file=sys.stderr
        )
        sys.exit(3)
    print(f"sft-data: {path}: {form}, as {count} of its first {len(head)} records show", file=sys.stderr)
    return form


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


def build_parser():
    parser = argparse.ArgumentParser(
        prog="convert_sft_format.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help='files, folders, or "-" for stdin')
    parser.add_argument("--output", required=True, metavar="DIR", help='folder for data.jsonl and the ledgers, or "-" for stdout')
    parser.add_argument("--from", default="auto", choices=["auto", *FORMATS], help="format of the input (default: seen from each file)")
    parser.add_argument("--to", default="messages", choices=FORMATS, help="format of the output (default: %(default)s)")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, default=False, help="fail on the first loss or reject")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N records")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put another run's OUTPUT aside")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    target, stdout, plan = args.to, args.output == "-", []
    for path in find_inputs(args.input):
        rows = records(path, {})
        head = list(itertools.islice(rows, HEAD))
        if not head:
            raise SystemExit(f"convert_sft_format.py: {path}: holds no records; remove it or name another file")
        form = getattr(args, "from") if getattr(args, "from") != "auto" else sniff(path, head)
        plan.append((path, form, itertools.chain(head, rows) if str(path) == "-" else None))
    if "-" in args.input:
        args.stdin = time.time()  # what came by stdin cannot be compared with another run's
    run = None if stdout else Run("sft-data", args, args.input)
    total, kept, formats, roles, reasons, fields = 0, 0, Counter(), Counter(), Counter(), Counter()

    def note(file, why, entry):
        file.write(json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        if args.strict:
            raise SystemExit(f"convert_sft_format.py: {entry['file']} line {entry['line']}: {why}; mend it or run without --strict")

    with contextlib.ExitStack() as stack:
        names = ("data.jsonl", "rejected.jsonl", "losses.jsonl")
        sinks = [stack.enter_context(write_atomic(run.output / name)) for name in names] if run else []
        data, rejected, losses = sinks or (sys.stdout.buffer, sys.stderr.buffer, sys.stderr.buffer)
        for path, form, rows in plan:
            rows = tqdm(rows or records(path, run.digests if run else {}), path.name, unit=" records", disable=not sys.stderr.isatty())
            for line, raw in itertools.islice(rows, None if args.limit is None else max(0, args.limit - total)):
                total += 1
                try:
                    row, conversation, lost = convert(raw, form, target, "stdin" if str(path) == "-" else path.name)
                except Reject as error:
                    reasons[error.reason] += 1
                    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else json.dumps(raw, default=str)
                    entry = {"file": str(path), "line": line, "reason": str(error), "remedy": error.remedy, "raw": text}
                    note(rejected, str(error), {key: value for key, value in entry.items() if value != ""})
                    continue
                data.write(row)
                kept += 1
                formats[form] += 1
                roles.update([message["role"] for message in conversation["messages"]])
                for field, value, reason in lost:
                    fields[re.sub(r"\[\d+\]", "", field)] += 1
                    entry = {"file": str(path), "line": line, "id": conversation["id"], "field": field, "value": value, "reason": reason}
                    note(losses, f"{field} is lost ({reason})", entry)
        if stdout:
            sys.stdout.buffer.flush()
    summary = f"kept {kept} of {total} conversations, {fields.total()} losses"
    if stdout:
        print(f"sft-data: {summary}", file=sys.stderr)
        return
    counts = {"records": total, "kept": kept, "rejected": total - kept, "losses": fields.total()}
    metrics = {"from": formats, "turns": roles, "rejected": reasons, "losses": fields}
    run.finish(summary, counts, metrics, dict(zip(names, (kept, total - kept, fields.total()), strict=True)))


if __name__ == "__main__":
    run_main(main)
