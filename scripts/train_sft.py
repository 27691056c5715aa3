#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.10", "axolotl==0.19.0", "datasets>=4", "deepspeed>=0.18", "matplotlib>=3.9", "numpy>=1.26", "peft>=0.18",
#     "pyyaml>=6", "torch>=2.6", "tqdm>=4.66", "transformers>=5,<6", "trl>=1.9",
# ]
# ///
"""Fine-tune a chat model with Axolotl, and prove that the result stops where its training data stop.

Usage:
    python scripts/train_sft.py --config recipes/demo/sft.yaml --model data/out/demo/base-model \\
        --data data/out/demo/sft-data --output data/out/demo/sft
    make sft GPUS=6,7 RECIPE=qwen3-8b-lora
    python scripts/train_sft.py --config … --nnodes 2 --node-rank 0 --rdzv-endpoint gpu01:29500    # on each node, or by srun without them

--config is a native Axolotl file (`axolotl config-schema` lists its keys). What this script decides is left out of it: data, folders,
masking (only the assistant's turns and their end token are trained), resuming, and what happens to conversations over `sequence_len`:
the run is refused and they are named, unless the recipe says `excess_length_strategy: drop`. A `deepspeed:` path is relative to the recipe.
With `rl: dpo` a row of DATA is {"prompt" or "messages": context, "chosen", "rejected"}, each a list of messages, one message or a text.

The memory that each GPU will need is computed first, and a run that cannot fit is refused. One process runs for each visible GPU. A model
named by its hub name is downloaded; after that nothing asks the network for anything, unless HF_HUB_OFFLINE=0 allows it.

Reads   MODEL (Hugging Face folder or name) and DATA (data*.jsonl of {"messages": [...], "tools"?, "id"?}).
Writes  OUTPUT: the merged model as vLLM and transformers load it; certificate.json, metrics.jsonl, loss.png, rejected.jsonl; axolotl/ (the
        resolved recipe, adapter, checkpoints, and axolotl.log with every word of the libraries); then OUTPUT/manifest.json, last.
        A killed run goes on from its newest whole checkpoint when the same command is given again.
Exit    0 done or up to date; 1 failed, also when memory is short or the certificate does not hold; 2 bad usage; 3 refused, OUTPUT holds
        another run.
Needs   the GPUs that the recipe asks for, or a CPU (bf16, fp16 and tf32 false, `attn_implementation: sdpa`); several nodes share OUTPUT.
        With vLLM beside it, the certificate also covers the server's tokens.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

OURS = ("datasets", "test_datasets", "output_dir", "dataset_prepared_path", "resume_from_checkpoint")
CERTIFIED = 50  # conversations whose token ids the certificate keeps, and that the server's tokenize endpoint has to give
MASKED = -100
EVENT = "train_sft: "  # begins a line of the trainer's output that is meant for this script
CONTEXT = {"gpu": 3 << 29, "cpu": 9 << 27}  # bytes of a process beside its tensors: CUDA context, cuBLAS, NCCL (an allowance); imports
# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets
PEAK = {"B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "H20": 148e12}
PEAK |= {"A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L20": 119e12, "A40": 150e12, "4090": 165e12, "A10": 125e12}


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


def fail(message):
    raise SystemExit(f"train_sft: {message}")


class Quiet:
    """`with quiet:` keeps what libraries print, from Python or C, away from the user and for a log; say() goes through."""

    def __init__(self):
        self.words, self.terminal = tempfile.TemporaryFile(), sys.stderr

    def __enter__(self):
        self.flush()
        self.kept = [os.dup(1), os.dup(2)]
        self.terminal = open(self.kept[1], "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        for fd in (1, 2):
            os.dup2(self.words.fileno(), fd)

    def __exit__(self, *_):
        self.flush()
        self.terminal.flush()
        for fd, kept in zip((1, 2), self.kept, strict=True):
            os.dup2(kept, fd)
            os.close(kept)
        self.terminal = sys.stderr

    def flush(self):
        sys.stdout.flush()
        sys.stderr.flush()

    def say(self, sentence):
        print(f"sft: {sentence}", file=self.terminal, flush=True)

    def save(self, log):
        """Move the words kept so far to the end of a file."""
        self.words.seek(0)
        with open(log, "ab") as file:
            shutil.copyfileobj(self.words, file)
        self.words.seek(0)
        self.words.truncate()


QUIET = Quiet()


def read_yaml(path):
    """Return the keys of a recipe; ValueError when it has none."""
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"not an Axolotl recipe: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError("not an Axolotl recipe: no `key: value` lines")
    return recipe


def unknown_keys(value, schema, at=""):
    """Return the dotted keys of `value` that Axolotl's pydantic `schema` does not know: it accepts them without a word and does nothing."""
    fields, found = dict(schema.model_fields), []
    fields |= {field.alias: field for field in schema.model_fields.values() if field.alias}
    for key, inner in value.items():
        kinds = typing.get_args(fields[key].annotation) if key in fields else ()
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if key not in fields:
            found.append(f"{at}{key}")
        elif model and isinstance(inner, dict):
            found += unknown_keys(inner, model, f"{at}{key}.")
    return found


def read_recipe(path):
    """Return (the Axolotl recipe as a dict, its DeepSpeed JSON read in; Axolotl's pydantic schema). ValueError when it would do harm."""
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    recipe = read_yaml(path)
    if isinstance(recipe.get("deepspeed"), str):
        try:
            recipe["deepspeed"] = json.loads((path.parent / recipe["deepspeed"]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"deepspeed: {error}") from error
    for plugin in recipe.get("plugins") or []:
        PluginManager.get_instance().register(plugin)
        if plugin not in PluginManager.get_instance().plugins:
            raise ValueError(f"the plugin {plugin!r} cannot be imported; install it, or take it out")
    schema = merge_input_args()[1]
    if unknown := unknown_keys(recipe, schema):
        raise ValueError(f"Axolotl knows no key {unknown[0]!r} and would ignore it; `axolotl config-schema` lists the keys")
    if ours := sorted(set(recipe) & set(OURS)):
        raise ValueError(f"{ours[0]} is set by this script, from --data and --output; take it out")
    if recipe.get("rl") not in (None, "dpo"):
        raise ValueError(f"rl: {recipe['rl']} is not done here; say dpo, or use Axolotl itself")
    if recipe.get("excess_length_strategy") not in (None, "raise", "drop"):
        raise ValueError(f"excess_length_strategy {recipe['excess_length_strategy']!r} would cut off end tokens; say raise or drop")
    if not isinstance(recipe.get("sequence_len"), int):
        raise ValueError("no sequence_len; say how many tokens a conversation may have")
    return recipe, schema


def check_values(resolved, schema, gpus=(), processes=1):
    """ValueError, in a sentence, on the first value that Axolotl does not take: by its schema, and for `gpus` by its rules for them too."""
    import torch
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    try:
        if gpus:
            level = min(int(gpu["capability"].replace(".", "")) for gpu in gpus)
            able = {"bf16": level >= 80, "tf32": level >= 80, "fp8": level >= 89, "n_gpu": processes, "compute_capability": f"sm_{level}"}
            if level < 80 and resolved.get("bf16"):  # Axolotl warns, loads the model, and fails
                raise ValueError("bf16 needs an Ampere GPU or newer; say `bf16: false` and `fp16: true`")
            versions = {"torch_version": torch.__version__.partition("+")[0]}
            validate_config(DictDefault(copy.deepcopy(resolved)), capabilities=able, env_capabilities=versions)
        else:
            schema(**copy.deepcopy(resolved))  # it fills in values as it goes
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key + ': ' if key else ''}{first['msg']}; `axolotl config-schema` lists what a key takes") from error


def read_conversations(data, pairs=False):
    """Yield (file, line, row) of each conversation in a file, or in the data*.jsonl of a folder; SystemExit names a line that is none.

    A row of preference `pairs` comes with "messages" (the context), "chosen" and "rejected" (the messages that follow it).
    """
    for path in sorted(data.glob("data*.jsonl")) if data.is_dir() else [data]:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw)
                    if "chosen" in row and not pairs:
                        raise ValueError("a preference pair, and the recipe does not say `rl: dpo`")
                    if pairs:
                        row["messages"] = as_messages(row["messages"] if "messages" in row else row["prompt"], "user")
                        row |= {side: as_messages(row[side], "assistant") for side in ("chosen", "rejected")}
                    for messages in [row[key] for key in (("messages", "chosen", "rejected") if pairs else ("messages",))]:
                        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and m.get("role") for m in messages)):
                            raise ValueError("messages is not a list of {role, content}")
                        if not all(isinstance(message.get("content") or "", str) for message in messages):
                            raise ValueError("content is not text")
                        if not all(m.get("content") or m.get("tool_calls") for m in messages if m["role"] == "assistant"):
                            raise ValueError("an assistant's turn is empty")
                        json.dumps(messages, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
                except (ValueError, KeyError, TypeError) as error:
                    why = f"no field {error}" if isinstance(error, KeyError) else error
                    fail(f"{path} line {line}: not a {'pair' if pairs else 'conversation'} ({why}); convert it by convert_sft_format.py")
                yield path, line, row


def as_messages(value, role):
    """Return a list of messages given as one: a text, or a single message."""
    return [{"role": role, "content": value}] if isinstance(value, str) else [value] if isinstance(value, dict) else value


def name(path, line, row):
    return f"{path} line {line} (id {row.get('id')})"


def as_trained(messages, template):
    """Return messages as templates see them in training and serving: tool arguments parsed, only assistants' weights kept.

    A developer's turn is the system's where the template does not know developers: vLLM serves it so (vllm/renderers/hf.py, 0.32).
    """
    messages = json.loads(json.dumps(messages))
    developers = "'developer'" in template or '"developer"' in template
    for message in messages:
        if message["role"] == "developer" and not developers:
            message["role"] = "system"
        if message["role"] != "assistant":
            message.pop("weight", None)
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"].get("arguments"), str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def render(tokenizer, messages, tools, recipe, **settings):
    """Return a conversation's token ids, or its text with tokenize=False, under the tokenizer's own chat template."""
    settings = {"tokenize": True, "return_dict": False} | (recipe.get("chat_template_kwargs") or {}) | settings
    return tokenizer.apply_chat_template(messages, tools=tools or None, **settings)


def digest(ids):
    import numpy

    return hashlib.blake2b(numpy.asarray(ids, "<u4").tobytes(), digest_size=16).digest()


def load_tokenizer(model, recipe):
    """Return (tokenizer as Axolotl will have it, stop ids of the model to be written); SystemExit when training would do harm."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(f"{model}: no model that can be loaded ({' '.join(str(error).split())[:200]}); name a folder, or a hub name with a network")
    special = recipe.get("special_tokens") or {}
    tokenizer.add_special_tokens(special)
    if recipe.get("chat_template", "tokenizer_default") != "tokenizer_default":
        from axolotl.utils.chat_templates import get_chat_template

        tokenizer.chat_template = get_chat_template(recipe["chat_template"], recipe.get("chat_template_jinja"), tokenizer)
    stop = set()
    with contextlib.suppress(OSError):
        eos = GenerationConfig.from_pretrained(model).eos_token_id
        stop |= {eos} if isinstance(eos, int) else set(eos or ())
    if not stop or "eos_token" in special:
        stop.add(tokenizer.eos_token_id)
    if not tokenizer.chat_template:
        fail(f"{model}: its tokenizer has no chat template; name one in the recipe, such as `chat_template: chatml`")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        remedy = "give a spare token of the vocabulary in the recipe, `special_tokens: {pad_token: ...}`"
        fail(f"{model}: it pads with the end token {tokenizer.eos_token!r}, so the end of a turn can be taken for padding; {remedy}")
    return tokenizer, stop


def prepare(data, tokenizer, stop, recipe, output):
    """Write axolotl/data.jsonl and rejected.jsonl; return {digest of token ids: (place, trained turns)} and counts.

    Messages and tools are written as JSON strings, which Axolotl parses: as columns, Arrow would give each row every other row's fields.
    Preference pairs are written as the texts that TRL tokenizes: Axolotl's own template strategy drops tools and tool calls, and cuts an
    answer at the first place where its text is found. A conversation that the chat template does not show in full is rejected. SystemExit
    names those that are too long, unless the recipe drops them, and one that does not end with a stop token.
    """
    from tqdm import tqdm

    known, rejected, too_long, pairs, count = {}, [], [], bool(recipe.get("rl")), 0
    hidden_reasoning = 0
    limit, terminal = recipe["sequence_len"], QUIET.terminal
    rows = tqdm(read_conversations(data, pairs), desc="conversations", file=terminal, disable=not terminal.isatty())
    with write_atomic(output / "axolotl" / "data.jsonl", "w") as file:
        for path, line, row in rows:
            place, reason, tools = name(path, line, row), "", row.get("tools") or None
            sides = [row["messages"] + row[side] for side in ("chosen", "rejected")] if pairs else [row["messages"]]
            sides = [as_trained(messages, tokenizer.chat_template) for messages in sides]
            shown = {"tools": tools, "tool_calls": any(message.get("tool_calls") for messages in sides for message in messages)}
            hidden = [key for key, present in shown.items() if present and key not in tokenizer.chat_template]
            trained = [[m["role"] == "assistant" and m.get("weight", 1) != 0 for m in messages] for messages in sides]
            ids, texts = [], {}
            try:
                if pairs:
                    texts = pair_texts(tokenizer, row, sides, stop, recipe)
                    ids = [tokenizer(texts["prompt"] + texts[side], add_special_tokens=False).input_ids for side in ("chosen", "rejected")]
                else:
                    ids = [render(tokenizer, sides[0], tools, recipe)]
            except Exception as error:  # templates raise whatever they like
                reason = f"the chat template cannot show it: {' '.join(str(error).split())[:200]}"
            system = [message["role"] for message in sides[0]].count("system")
            if hidden:
                reason = f"the chat template does not show {hidden[0]}"
            elif system > 1 and any(message["role"] == "developer" for message in row["messages"]):
                reason = "the chat template knows no developer, and the server would merge its turn into the system's"
            elif not all(map(any, trained)):
                reason = "no assistant's turn to learn from"
            elif max(map(len, ids), default=0) > limit:
                length = max(map(len, ids))
                reason = f"{length} tokens, sequence_len is {limit}"
                too_long.append(f"{place}: {length} tokens")
            for one, turns in zip(ids, trained, strict=False):
                if not reason and turns[-1] and not stop & set(one[-3:]):
                    end, names = tokenizer.decode(one[-3:]), " ".join(tokenizer.convert_ids_to_tokens(sorted(stop)))
                    remedy = "mend the template, or name its end token in the recipe, `special_tokens: {eos_token: ...}`"
                    fail(f"{place}: the template ends it with {end!r}, without a stop token of generation_config ({names}); {remedy}")
            if reason:
                rejected.append({"file": str(path), "line": line, "reason": reason, "raw": json.dumps(row, ensure_ascii=False)})
                continue
            hidden_reasoning += sum(
                hides_reasoning(tokenizer, messages, turns, tools, recipe) for messages, turns in zip(sides, trained, strict=True)
            )
            known |= {digest(one): (place, sum(turns)) for one, turns in zip(ids, trained, strict=True)}
            packed = texts or {"messages": json.dumps(sides[0], ensure_ascii=False)} | ({"tools": json.dumps(tools)} if tools else {})
            file.write(json.dumps(packed, ensure_ascii=False) + "\n")
            count += 1
    if too_long and recipe.get("excess_length_strategy") != "drop":
        remedy = "raise sequence_len, shorten them, or say `excess_length_strategy: drop` in the recipe"
        fail(f"{len(too_long)} conversations are longer than sequence_len {limit}: {'; '.join(too_long[:3])}; {remedy}")
    if not known:
        why = f", {len(rejected)} rejected: {rejected[0]['reason']}" if rejected else ""
        fail(f"{data}: no conversation to train on{why}; mend --data")
    if rejected:
        with write_atomic(output / "rejected.jsonl", "w") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
        QUIET.say(f"{len(rejected)} conversations rejected ({rejected[0]['reason']}, ...): {output / 'rejected.jsonl'}")
    if hidden_reasoning:
        QUIET.say(f"the chat template leaves out the reasoning of {hidden_reasoning} turns before the last: they are trained without it")
    return known, {"conversations": count, "rejected": len(rejected), "too_long": len(too_long), "reasoning_left_out": hidden_reasoning}


def hides_reasoning(tokenizer, messages, trained, tools, recipe):
    """Return how many trained turns have reasoning that the template does not show, as Qwen3's does with all before the last question."""
    thoughts = [
        m["reasoning_content"].strip() for m, learnt in zip(messages, trained, strict=True) if learnt and m.get("reasoning_content")
    ]
    text = render(tokenizer, messages, tools, recipe, tokenize=False) if thoughts else ""
    return sum(thought not in text for thought in thoughts)


def pair_texts(tokenizer, row, sides, stop, recipe):
    """Return {"prompt", "chosen", "rejected"} as texts under the chat template; ValueError when an answer changes what stands before it."""
    context = sides[0][: len(row["messages"])]
    texts = {"prompt": render(tokenizer, context, row.get("tools"), recipe, tokenize=False, add_generation_prompt=True)}
    for side, messages in zip(("chosen", "rejected"), sides, strict=True):
        whole = render(tokenizer, messages, row.get("tools"), recipe, tokenize=False)
        if not whole.startswith(texts["prompt"]):
            raise ValueError(f"with the {side} answer it shows other text before the answer than the server's prompt has")
        texts[side] = whole[len(texts["prompt"]) :]
        if (bare := texts[side].rstrip()).endswith(tuple(tokenizer.convert_ids_to_tokens(sorted(stop)))):
            texts[side] = bare  # TRL adds another end token after anything else
    return texts


def resolve(recipe, model, output):
    """Return the whole Axolotl configuration of this run."""
    work = output.resolve() / "axolotl"
    dataset = {"path": str(work / "data.jsonl"), "ds_type": "json"}
    if recipe.get("rl"):
        dataset |= {"type": "passthrough.default", "split": "train"}
    else:
        dataset |= {"type": "chat_template", "field_messages": "messages", "message_field_training": "weight"}
        dataset |= {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
    ours = {"base_model": model, "datasets": [dataset], "output_dir": str(work / "run"), "dataset_prepared_path": str(work / "prepared")}
    ours |= {"excess_length_strategy": "raise", "auto_resume_from_checkpoints": True, "tokenizer_save_jinja_files": False}
    ours |= {"plugins": [*(recipe.get("plugins") or []), f"{Path(__file__).stem}.TrainingPlugin"]}
    # By itself Axolotl starts loader processes that read 256 batches ahead; after a kill they block on a full pipe for ever
    defaults = {"chat_template": "tokenizer_default", "dataloader_num_workers": 0}
    return defaults | recipe | ours


def query_gpus():
    """Return [{index, uuid, name, capability, free}] (free: bytes) of the GPUs that CUDA_VISIBLE_DEVICES lets through, by nvidia-smi."""
    fields, gpus = ("index", "uuid", "name", "compute_cap", "memory.free"), []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines():
            index, uuid, name, capability, free = (cell.strip() for cell in line.split(","))
            free = int(free) << 20 if free.isdigit() else None  # memory shared with the CPU is not counted
            gpus.append({"index": index, "uuid": uuid, "name": name, "capability": capability, "free": free})
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = [gpu for word in chosen.split(",") for gpu in gpus if word and (gpu["index"] == word or gpu["uuid"].startswith(word))]
    return gpus


def trace_model(config, layers, recipe):
    """Return facts of a model with so many layers, built on torch's meta device, where tensors have shapes and no memory.

    parameters, trainable; linear: those that QLoRA stores in 4 bits; kept: bytes that autograd keeps between forward and backward, for one
    micro-batch of full length, with FlashAttention's kernel (q, k, v, output and one float a row) in place of the attention.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            ctx.save_for_backward(query, key, value, torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32))
            return torch.empty_like(query)

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    ALL_ATTENTION_FUNCTIONS.register("traced", lambda module, q, k, v, *_, **__: (Flash.apply(q, k, v).transpose(1, 2), None))
    small, storages = copy.deepcopy(config), {}
    small.num_hidden_layers, small.use_cache = layers, False
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    with torch.device("meta"):
        dtype = torch.float32 if width(recipe) == 4 else torch.bfloat16
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation="traced").train()
        facts = {"parameters": sum(p.numel() for p in model.parameters())}
        head = model.get_output_embeddings()
        facts["linear"] = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        body = getattr(model, model.base_model_prefix)
        if recipe.get("adapter"):
            from peft import LoraConfig, get_peft_model

            targets = "all-linear" if recipe.get("lora_target_linear") else recipe.get("lora_target_modules")
            model = get_peft_model(model, LoraConfig(r=recipe["lora_r"], target_modules=targets))
        facts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        rows = (2 if recipe.get("rl") else 1) * recipe.get("micro_batch_size", 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            try:
                body(input_ids=torch.zeros(rows, recipe["sequence_len"], dtype=torch.long))
                facts["kept"] = sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
            except Exception:  # experts that are chosen by value: 34 bytes a token and channel in bf16 (arXiv 2205.05198, eq. 2)
                facts["kept"] = layers * 17 * width(recipe) * rows * recipe["sequence_len"] * config.hidden_size
    return facts


def width(recipe):
    """Return the bytes of a number in the recipe's compute dtype."""
    return 4 if recipe.get("bf16") is False and not recipe.get("fp16") else 2


def estimate_memory(config, recipe, world, device):
    """Return {part: bytes that one of `world` processes needs at its peak}, "total" last, and the model's (parameters, trainable).

    Weights, gradients and optimizer states by sharding as in ZeRO (arXiv 1910.02054, section 3: with AdamW and mixed precision 2 + 2 + 12
    bytes a parameter); Axolotl without DeepSpeed or FSDP trains in the compute dtype alone, FSDP2 keeps float32 shards, and adapters are
    float32. NF4 with double quantization takes 4.127 bits (arXiv 2305.14314). Activations are what autograd keeps on traced layers: all, or
    with gradient checkpointing one layer and the others' inputs. Logits: themselves, float32 log-probabilities and gradients.
    Gradients grow as activations go, so without accumulation over micro-batches the total counts the larger of both.
    """
    one, two = (trace_model(config, layers, recipe) for layers in (1, 2))
    layers, byte, adapter = config.num_hidden_layers, width(recipe), recipe.get("adapter")
    whole = {key: one[key] + (two[key] - one[key]) * (layers - 1) for key in one}
    total, trainable, layer = whole["parameters"], whole["trainable"], two["parameters"] - one["parameters"]
    frozen = byte * (total if adapter else 0)
    if recipe.get("load_in_4bit"):
        frozen += whole["linear"] * (4.127 / 8 - byte)
    if recipe.get("rl") and not adapter:
        frozen += byte * total  # the reference model
    optimizer = str(recipe.get("optimizer", "adamw_torch"))
    moments = 2 if "8bit" in optimizer else 1 if "4bit" in optimizer else 0 if "adafactor" in optimizer else 8
    deepspeed, fsdp, sent = recipe.get("deepspeed"), recipe.get("fsdp_config"), 0
    if deepspeed:
        zero = deepspeed["zero_optimization"]
        stage, reduce = zero.get("stage", 0), zero.get("reduce_bucket_size", 5e8)
        weights = (frozen + byte * trainable) / (world if stage == 3 else 1)
        gradients = byte * trainable / (world if stage >= 2 else 1)
        states = (moments + (4 if byte == 2 else 0)) * trainable / (world if stage >= 1 else 1)
        if stage == 3:
            live = min(total, zero.get("stage3_max_live_parameters", 1e9))
            sent = byte * (live + 2 * (config.hidden_size**2 if reduce == "auto" else reduce))
        elif world > 1:
            sent = byte * (reduce * (2 if zero.get("overlap_comm") else 1) + min(trainable, zero.get("allgather_bucket_size", 5e8)))
        weights = 0 if zero.get("offload_param") else weights
        states = 0 if zero.get("offload_optimizer") else states
    elif fsdp:
        away = fsdp.get("offload_params")
        weights, gradients, states = (0 if away else size / world for size in (frozen + 4 * trainable, 4 * trainable, moments * trainable))
        sent = byte * (2 * layer + one["parameters"] - layer)  # two layers and the root unit, gathered
    else:
        own = 4 if adapter else byte
        weights, gradients = frozen + own * trainable, own * trainable * (2 if world > 1 else 1)  # DDP copies gradients into buckets
        states = trainable * (moments * own / 4 if moments == 8 else moments)
    tokens = (2 if recipe.get("rl") else 1) * recipe.get("micro_batch_size", 1) * recipe["sequence_len"]
    again = recipe.get("gradient_checkpointing") or (fsdp or {}).get("activation_checkpointing")
    kept, away = two["kept"] - one["kept"], again == "offload" or recipe.get("activation_offloading")
    inputs = 0 if away else tokens * config.hidden_size * byte
    activations = one["kept"] + (inputs if again else kept) * (layers - 1)
    fused = any(recipe.get(key) for key in ("liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy"))
    logits = 0 if fused else tokens * config.vocab_size * (byte + 8 + (4 if byte == 2 else 0))
    parts = {"weights": weights, "gradients": gradients, "optimizer": states, "communication": sent, "activations": activations}
    parts = {part: round(size) for part, size in (parts | {"logits": logits, "context": CONTEXT[device]}).items()}
    shared = min(parts["gradients"], parts["activations"] + parts["logits"]) if recipe.get("gradient_accumulation_steps", 1) == 1 else 0
    return parts | {"total": sum(parts.values()) - shared}, total, trainable


def memory_remedy(recipe, world):
    """Return what to change first in a recipe that does not fit."""
    sharded = (recipe.get("deepspeed") or {}).get("zero_optimization", {}).get("stage") == 3 or recipe.get("fsdp_config")
    if not (recipe.get("gradient_checkpointing") or (recipe.get("fsdp_config") or {}).get("activation_checkpointing")):
        return "set `gradient_checkpointing: true`"
    if recipe.get("micro_batch_size", 1) > 1:
        return "set `micro_batch_size: 1` and more gradient_accumulation_steps"
    if world > 1 and not sharded:
        return "shard the model by `deepspeed: ../deepspeed/zero3.json`"
    return "name more GPUs and shard over them" + ("" if recipe.get("adapter") == "qlora" else ", or train an adapter (lora, qlora)")


def check_memory(model, recipe, world, gpus, processes, force):
    """Say what a process will need and return (parts in bytes, parameters, trainable); SystemExit when it is not free, unless `force`."""
    from transformers import AutoConfig

    device = "cpu" if not gpus and width(recipe) == 4 else "gpu"
    try:
        parts, total, trainable = estimate_memory(AutoConfig.from_pretrained(model), recipe, world, device)
    except Exception as error:  # a model of any make
        QUIET.say(f"memory is not computed: {' '.join(str(error).split())[:200]}")
        return {}, 0, 0
    shares = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items() if part != "total" and size > 5e7)
    need = f"{parts['total'] / 1e9:.1f} GB {'a GPU' if device == 'gpu' else 'a process'}"
    batch = f"{recipe.get('micro_batch_size', 1)} x {recipe['sequence_len']} tokens"
    QUIET.say(f"{total / 1e6:,.0f} M parameters, {trainable / 1e6:,.1f} M trained, {batch}; expects {need}: {shares}")
    where, free = "", None
    if gpus and all(gpu["free"] for gpu in gpus):
        least = min(gpus, key=lambda gpu: gpu["free"])
        where, free = f"GPU {least['index']} ({least['name']})", least["free"]
    elif device == "cpu" and (available := re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())):
        where, free = f"each of {processes} processes" if processes > 1 else "this machine", (int(available[1]) << 10) // processes
    if free and parts["total"] > free and not force:
        remedy = f"{memory_remedy(recipe, world)}, free the memory, or go on with --force"
        fail(f"{model} needs about {need} and {where} has {free / 1e9:.1f} GB free; {remedy}")
    return parts, total, trainable


def whole_checkpoints(folder):
    """Return Axolotl's checkpoint folders, oldest first, after removing what a kill left half-written: trainer_state.json comes last."""
    whole = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return whole


def die_with_parent():
    """Linux: have the kernel end this process with its parent, so that after a kill no trainer writes beside the next run's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def find_nodes(args):
    """Return (nodes, rank of this one, host:port of the first), from the flags, or from the variables of Slurm's srun."""
    environment = os.environ
    nodes = args.nnodes or int(environment.get("SLURM_STEP_NUM_NODES", 1))
    rank = args.node_rank if args.node_rank is not None else int(environment.get("SLURM_NODEID", 0))
    endpoint = args.rdzv_endpoint
    if nodes > 1 and not endpoint and (listed := re.match(r"([^\[,]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))):
        endpoint = f"{listed[1]}{listed[2] or ''}:{20000 + int(environment.get('SLURM_JOB_ID', 0)) % 10000}"
    if nodes > 1 and not re.fullmatch(r".+:\d+", endpoint or ""):
        raise ValueError("--nnodes wants --node-rank and --rdzv-endpoint HOST:PORT, the same address on each node")
    return nodes, rank, endpoint


def launch_command(config, processes, nodes, rank, endpoint):
    """Return the command that trains: python for one process, torchrun for several, the same on each of several nodes."""
    command = ["axolotl", "train", str(config), "--launcher"]
    if nodes > 1:
        command += ["torchrun", "--", "--nnodes", str(nodes), "--node_rank", str(rank), "--nproc_per_node", str(processes)]
        # without an id Axolotl draws one, another on each node, and the nodes wait for each other for ever
        return [*command, "--rdzv_backend", "static", "--rdzv_endpoint", endpoint, "--rdzv_id", "sft"]
    return [*command, *(["torchrun", "--", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"])]


def wait_for_first_node(endpoint, patience=7200):
    """Wait until the first node listens at `endpoint`: it does when its data are prepared and its trainer starts."""
    host, _, port = endpoint.rpartition(":")
    for _ in range(patience):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(1)
    fail(f"{endpoint} does not answer after {patience} s; start this command with --node-rank 0 there, and open the port")


class Progress:
    """Shows the trainer's events: a bar on a terminal, elsewhere a line each. `flops`: FLOPs a token, `peak`: FLOP/s of all GPUs."""

    def __init__(self, flops=0, peak=0):
        from tqdm import tqdm

        self.flops, self.peak, self.first, self.last, self.metrics = flops, peak, None, None, {}
        self.bar = tqdm(desc="steps", file=QUIET.terminal, disable=not QUIET.terminal.isatty())

    def rates(self, since, event):
        """Return {"tokens_per_second", "mfu"} between two events, as far as they are known."""
        seconds = event["time"] - since["time"]
        if not seconds or since["tokens"] is None or event["tokens"] is None:
            return {}
        rate = (event["tokens"] - since["tokens"]) / seconds
        return {"tokens_per_second": round(rate, 1)} | ({"mfu": round(rate * self.flops / self.peak, 4)} if self.peak else {})

    def show(self, event):
        if event["loss"] is None:
            self.first = self.last = event
            self.bar.total, self.bar.initial, self.bar.n = event["steps"], event["step"], event["step"]
            return
        now, done = self.rates(self.last, event), event["step"] - self.first["step"]
        left = (event["time"] - self.first["time"]) / max(done, 1) * (event["steps"] - event["step"])
        words = [f"loss {event['loss']:.4g}"] + ([f"{now['tokens_per_second']:,.0f} tokens/s"] if now else [])
        words += [f"MFU {now['mfu']:.1%}"] if "mfu" in now else []
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(event["step"] - self.bar.n)
        if self.bar.disable:
            left = f"{left / 60:.0f} min left" if left > 120 else f"{left:.0f} s left"
            QUIET.say(f"step {event['step']}/{event['steps']}, {', '.join(words)}, {left}")
        if self.first["tokens"] is None:  # resumed: the counter's value is known from here on
            self.first = event
        self.last = event
        self.metrics = self.rates(self.first, event)


def train(command, log, progress, begun):
    """Run Axolotl with its words in `log` and its progress on stderr; call begun() before the first step. SystemExit when it fails.

    Leaves no process behind.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    error = ""
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(command, text=True, errors="replace", preexec_fn=die_with_parent, **options)
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                if EVENT in line:
                    event = json.loads(line.partition(EVENT)[2])
                    if event["loss"] is None:
                        begun()
                    progress.show(event)
                error = line.strip() if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit|Interrupt)\b", line) and not error else error
            child.wait()
        finally:
            progress.bar.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        fail(f"Axolotl ended with exit code {child.returncode} ({error or 'no exception in its log'}); all of its words are in {log}")


def cpu_seconds():
    """Return the CPU time of this process and of its children that have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def write_json(path, value):
    with write_atomic(path, "w") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


def write_configs(output, model, recipe, stop):
    """Write everything but the weights, in the form that vLLM and transformers 4.57 and 5 load.

    Rope settings and dtype stand under the keys of transformers 5 and of older versions; generation_config is the base model's with this
    tokenizer's special ids; the chat template is inside tokenizer_config.json, which every server reads.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import cached_file

    made = output / "axolotl" / "run"
    tokenizer = AutoTokenizer.from_pretrained(made)
    source = cached_file(model, "config.json") if recipe.get("adapter") else made / "config.json"
    config = json.loads(Path(source).read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling.get("rope_type") == "default" else scaling}
    generation = {}
    with contextlib.suppress(OSError):
        generation = GenerationConfig.from_pretrained(model).to_diff_dict()
    ends = sorted(stop) if len(stop) > 1 else min(stop)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    write_json(output / "config.json", config | special | {"eos_token_id": tokenizer.eos_token_id, "use_cache": True})
    write_json(output / "generation_config.json", generation | special)
    tokenizer.save_pretrained(output, save_jinja_files=False)
    settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that only transformers 5 knows
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    write_json(output / "tokenizer_config.json", settings)


def write_weights(output, model, recipe):
    """Put the weights into `output`; an adapter is merged shard by shard by Axolotl, in the base model's dtype."""
    import torch

    made = output / "axolotl" / "run"
    if recipe.get("adapter"):
        from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

        device, merged = "cuda" if torch.cuda.is_available() else "cpu", output / "axolotl" / "merged"
        merge_lora_sharded_efficient(model, made, merged, device=device, simulate_nf4=recipe["adapter"] == "qlora")
        made = merged
    for file in [*made.glob("model*.safetensors"), *made.glob("model*.safetensors.index.json")]:
        os.replace(file, output / file.name)
    shutil.rmtree(output / "axolotl" / "merged", ignore_errors=True)


def certify_labels(output, tokenizer, stop, known, pairs=False):
    """Return counts of what Axolotl prepared; SystemExit names the first conversation whose labels would teach something else.

    Each row has the token ids of a known conversation, and the last trained label of each of its trained turns is a stop id. Preference
    pairs are prepared as text, which TRL tokenizes in one piece, as here.
    """
    from datasets import load_from_disk

    seen, turns, trained = set(), 0, 0

    def check(ids, ends):
        key = digest(ids)
        if key not in known:
            text = tokenizer.decode(ids)[:200]
            fail(f"certificate: Axolotl trained on {text!r}, which the chat template gives for no conversation")
        place, expected = known[key]
        if not pairs and len(ends) != expected:
            fail(f"certificate: {place}: {expected} turns to train, {len(ends)} found in the labels; look at the chat template")
        for end in ends:
            if int(end) not in stop:
                named = " ".join(tokenizer.convert_ids_to_tokens(sorted(stop)))
                end = tokenizer.decode([int(end)])
                fail(f"certificate: {place}: a trained turn ends with {end!r}, no stop token of generation_config ({named})")
        seen.add(key)

    for folder in sorted(path.parent for path in (output / "axolotl" / "prepared").glob("*/state.json")):
        dataset = load_from_disk(str(folder))
        if pairs:
            for row in dataset.select_columns(["prompt", "chosen", "rejected"]):
                for side in ("chosen", "rejected"):
                    ids = tokenizer(row["prompt"] + row[side], add_special_tokens=False).input_ids
                    check(ids, ids[-1:])
                    turns, trained = turns + 1, trained + len(ids) - len(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
            continue
        for row in dataset.select_columns(["input_ids", "labels"]).with_format("numpy"):
            labels = row["labels"]
            learnt = labels != MASKED
            last = learnt.copy()
            last[:-1] &= ~learnt[1:]
            check(row["input_ids"], labels[last])
            turns, trained = turns + int(last.sum()), trained + int(learnt.sum())
    if missing := known.keys() - seen:
        place, _ = known[next(iter(missing))]
        fail(f"certificate: {place}: not in Axolotl's prepared data; {len(missing)} conversations were dropped or changed")
    return {"turns": turns, "trained_tokens": trained}


def certify_folder(output, data, known, recipe):
    """Return the facts of a written model, with conversations and their ids; SystemExit when they are not those that were trained.

    A pad token distinct from the end token exists, every token has an embedding, and the chat template in the tokenizer gives for each of
    `CERTIFIED` conversations the ids that Axolotl trained on.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, vocabulary = AutoTokenizer.from_pretrained(output), AutoConfig.from_pretrained(output).vocab_size
    eos = json.loads((output / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    stop = {eos} if isinstance(eos, int) else set(eos or ())
    if not tokenizer.chat_template:
        fail(f"certificate: {output} has no chat template in its tokenizer; put the base model's there")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        fail(f"certificate: {output} pads with the end token {tokenizer.eos_token!r}; give it a pad token of its own")
    if len(tokenizer) > vocabulary:
        fail(f"certificate: {output} has {len(tokenizer)} tokens but {vocabulary} embeddings; train the new tokens (lora_modules_to_save)")
    pairs, places = bool(recipe.get("rl")), {place: key for key, (place, _) in known.items()}
    conversations = []
    rows = (entry for entry in read_conversations(data, pairs) if name(*entry) in places)
    for path, line, row in itertools.islice(rows, 0, None, -(-len(places) // CERTIFIED)):
        messages = as_trained(row["messages"] + (row["rejected"] if pairs else []), tokenizer.chat_template)
        ids = render(tokenizer, messages, row.get("tools"), recipe)
        length = max((i + 1 for i, token in enumerate(ids) if token in stop), default=0) if pairs else None  # trained up to its end token
        if digest(ids[:length]) != places[name(path, line, row)]:
            fail(f"certificate: {name(path, line, row)}: apply_chat_template of {output} gives other token ids than Axolotl trained on")
        for message in messages:  # as a client sends them
            message.pop("weight", None)
            if message.get("reasoning_content"):
                message["reasoning"] = message["reasoning_content"]
        conversations.append({"id": row.get("id"), "messages": messages, "tools": row.get("tools") or None, "ids": ids})
    facts = {"stop_ids": sorted(stop), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return facts | {"conversations": conversations}


class Server:
    """vLLM's own front end without an engine (`vllm launch render`) on a Unix socket: it answers /tokenize as `vllm serve` does."""

    def __init__(self, output, log):
        self.folder, self.log, self.output = tempfile.mkdtemp(), log, output
        quiet = {"stdout": log, "stderr": log, "preexec_fn": die_with_parent, "start_new_session": True}
        command = ["vllm", "launch", "render", str(output), "--served-model-name", "sft", "--uds", f"{self.folder}/socket"]
        self.process = subprocess.Popen(command, env=os.environ | {"VLLM_NO_USAGE_STATS": "1"}, **quiet)

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.connect(f"{self.folder}/socket")
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read() or b"{}")

    def compare(self, conversations, recipe):
        """SystemExit names the first conversation that the server does not turn into its trained token ids."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.call("GET", "/health")
                break
            time.sleep(0.2)
        else:
            fail(f"certificate: vLLM cannot load {self.output}; its words are in {self.log.name}; --no-vllm leaves it out")
        for entry in conversations:
            messages = json.loads(json.dumps(entry["messages"]))
            for call in (call for message in messages for call in message.get("tool_calls") or ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            body = {"model": "sft", "messages": messages, "add_generation_prompt": False}
            body |= {"tools": entry["tools"]} if entry["tools"] else {}
            body |= {"chat_template_kwargs": recipe["chat_template_kwargs"]} if recipe.get("chat_template_kwargs") else {}
            answer = self.call("POST", "/tokenize", body)
            ids = answer.get("tokens")
            if ids != entry["ids"]:
                why = f"gives other token ids than were trained ({ids})" if ids is not None else f"refuses it ({answer})"
                fail(f"certificate: conversation {entry['id']!r}: vLLM's tokenize endpoint {why[:300]}")

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def answer(output, conversation, stop):
    """Load the written folder as a server does and answer a conversation's first question greedily; return {question, answer, stopped}."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto", device_map="auto" if torch.cuda.is_available() else None)
    first = next(i for i, message in enumerate(conversation["messages"]) if message["role"] == "assistant")
    asked, tools = conversation["messages"][:first], conversation["tools"]
    prompt = tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    prompt = prompt.to(model.device)
    reply = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=96, do_sample=False)
    reply = reply[0, prompt.shape[1] :].tolist()
    text = tokenizer.decode(reply, skip_special_tokens=True)
    return {"question": asked[-1]["content"] if asked else "", "answer": text, "stopped": reply[-1] in stop}


def export(output, model, recipe, data, known, stop, vllm):
    """Write the model and return its certificate: its facts, one answer, and vLLM's version when `vllm` was to agree on the token ids."""
    with contextlib.ExitStack() as end:
        write_configs(output, model, recipe, stop)
        if vllm:  # it starts while the weights are written
            server = Server(output, end.enter_context(open(output / "axolotl" / "axolotl.log", "a", encoding="utf-8")))
            end.callback(server.stop)
        write_weights(output, model, recipe)
        certificate = certify_folder(output, data, known, recipe)
        certificate |= {"sample": answer(output, certificate["conversations"][0], stop), "vllm": None}
        if vllm:
            server.compare(certificate["conversations"], recipe)
            certificate["vllm"] = server.call("GET", "/version")["version"]
    return certificate


def read_steps(checkpoint):
    """Return (logged steps, losses) of a run from the trainer state of its last checkpoint."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return steps, [float(entry["loss"]) for entry in steps]


def plot_losses(steps, path):
    """Draw the loss and the learning rate by step, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return QUIET.say("no loss.png: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = [entry["step"] for entry in steps]
    axes.plot(numbers, [float(entry["loss"]) for entry in steps], marker="." if len(steps) < 100 else "")
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(numbers, [float(entry["learning_rate"]) for entry in steps], color="gray", linestyle=":", linewidth=1)
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    with write_atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def training_plugin():
    """Return the Axolotl plugin of every run: it reports progress, ends with its launcher, and lets several processes train on a CPU.

    The last because Axolotl 0.19 places the model on device LOCAL_RANK, which transformers takes for a GPU; accelerate takes a machine
    without a GPU for one process; both ask for nccl; DeepSpeed compiles C++ for minutes for what gloo does as well.
    """
    import torch
    from axolotl.integrations.base import BasePlugin
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.report(state, None, 0 if state.global_step == 0 else None)

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                self.report(state, float(logs["loss"]), logs.get("tokens/total"))

        def report(self, state, loss, tokens):
            if state.is_world_process_zero:
                event = {"step": state.global_step, "steps": state.max_steps, "loss": loss, "tokens": tokens, "time": time.time()}
                print(EVENT + json.dumps(event), flush=True)

    class TrainingPlugin(BasePlugin):
        def register(self, cfg):
            die_with_parent()
            if cfg.get("rl"):  # TRL 1.9 asks trackio for an address as it saves, and that cannot be imported beside huggingface_hub 1.33
                import trl.trainer.base_trainer

                trl.trainer.base_trainer.get_trackio_space_url = lambda: None
            if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available():
                train_on_cpu()

        def add_callbacks_pre_trainer(self, cfg, model):
            return [Report()]

    def train_on_cpu():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        import deepspeed.comm.torch
        from accelerate.state import DistributedType, PartialState
        from axolotl.loaders.model import ModelLoader

        set_device_map, init_distributed = ModelLoader._set_device_map_config, deepspeed.comm.init_distributed

        def on_cpu(loader, *args, **kwargs):
            loader.cfg.device_map = {"": "cpu"}
            return set_device_map(loader, *args, **kwargs)

        def over_gloo(dist_backend=None, *args, **kwargs):
            return init_distributed("gloo", *args, **kwargs)

        ModelLoader._set_device_map_config = on_cpu
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
        deepspeed.comm.init_distributed = over_gloo
        deepspeed.comm.torch.build_shm_op = lambda: None

    return TrainingPlugin


def __getattr__(attribute):
    """Let Axolotl's processes import this file and find the plugin in it, without importing Axolotl for `--help`."""
    if attribute == "TrainingPlugin":
        return training_plugin()
    raise AttributeError(attribute)


# FlashAttention may be missing where there is no GPU to use it
HAS_FLASH = """import torch, transformers.utils as utils
raise SystemExit(torch.cuda.is_available() and not utils.is_flash_attn_2_available(kernels_fallback_ok=True))"""


def fetch(model, recipe):
    """Download a model that is named by its hub name, and FlashAttention's kernel; leave the network alone from here on."""
    if not Path(model).is_dir() and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        left_out = [word for pattern in ("original/*", "*.gguf", "*.pth", "onnx/*") for word in ("--exclude", pattern)]
        if subprocess.run(["hf", "download", model, *left_out], stdout=subprocess.DEVNULL).returncode:
            fail(f"{model}: neither a folder nor a model that can be downloaded; name a folder, or set HF_TOKEN where the model wants one")
    looked = recipe.get("attn_implementation") == "flash_attention_2" and not importlib.util.find_spec("flash_attn")
    if looked and subprocess.run([sys.executable, "-c", HAS_FLASH], capture_output=True).returncode:
        ways = "pip install flash-attn --no-build-isolation, or set attn_implementation: sdpa without sample_packing"
        fail(f"flash_attention_2 is not installed, and its kernel is not to be had from the hub; {ways}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="train_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="model to start from (default: base_model of the recipe)")
    parser.add_argument("--data", required=True, metavar="PATH", help="conversations: a jsonl file, or a folder with data*.jsonl")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the fine-tuned model")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="recipe: a native Axolotl configuration")
    parser.add_argument("--gpus", metavar="6,7", help="as nvidia-smi numbers them (default: CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="training processes (default: one a visible GPU, else 1)")
    nodes = {"nnodes": int, "node_rank": int, "rdzv_endpoint": str}
    texts = ("nodes that train together (default: srun's, else 1)", "number of this node, from 0", "address of node 0, free port")
    for (key, kind), metavar, text in zip(nodes.items(), ("N", "K", "HOST:PORT"), texts, strict=True):
        default = os.environ.get(f"PET_{key.upper()}")  # as torchrun itself reads them
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=text)
    parser.add_argument("--force", action="store_true", help="train though the memory computed is not free")
    parser.add_argument("--no-vllm", action="store_true", help="leave the server's tokens out of the certificate, where vLLM is installed")
    parser.add_argument("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved Axolotl configuration and command, and stop")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    path, data, output = Path(args.config), Path(args.data), Path(args.output)
    work = output / "axolotl"
    if args.gpus:
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": args.gpus}
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # it makes every start compile all imports anew
    try:
        nodes, rank, endpoint = find_nodes(args)
        words = read_yaml(path)
        model = args.model = args.model or words.get("base_model")
        if not model:
            raise ValueError("no base_model; name the model there, or by --model")
        if not args.dry_run:
            if not data.exists():
                fail(f"{data}: no such file or folder; convert conversations by convert_sft_format.py first")
            fetch(model, words)
        os.environ["TQDM_DISABLE"] = "1"  # in libraries and Axolotl's processes, whose progress is shown here
        with QUIET:
            import torch
            import yaml

            recipe, schema = read_recipe(path)
            gpus = query_gpus()
            processes = args.nproc_per_node or torch.cuda.device_count() or 1
            resolved = resolve(recipe, model, output)
            check_values(resolved, schema, gpus, nodes * processes)
    except ValueError as error:
        parser.error(f"{path}: {error}")
    command = launch_command(work / "axolotl.yaml", processes, nodes, rank, endpoint)
    log = work / "axolotl.log"
    resolved = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    if not (rank or args.dry_run):
        vars(args).update({f"recipe {key}": value for key, value in recipe.items()})
        machine = ("gpus", "dry_run", "force", "no_vllm", "node_rank", "rdzv_endpoint")
        run = Run("sft", args, [place for place in (model, data) if Path(place).exists()], ignore=machine)
    with QUIET:
        memory, total, trainable = check_memory(model, recipe, nodes * processes, gpus, processes, args.force or args.dry_run)
    if args.dry_run:
        print(f"{resolved}# {shlex.join(command)}")
        return
    # Forward and backward take 2 + 4 FLOPs a parameter and token (arXiv 2001.08361), for frozen weights 2 + 2; attention is not counted
    peak = nodes * sum(next((flops for key, flops in PEAK.items() if key in gpu["name"]), 0) for gpu in gpus[:processes])
    progress = Progress(4 * total + 2 * trainable, peak)
    if rank:
        wait_for_first_node(endpoint)
        if not (work / "axolotl.yaml").exists():
            fail(f"{work / 'axolotl.yaml'} is not there, though node 0 has begun; name an --output that all nodes share")
        train(command, log.with_suffix(f".{rank}.log"), progress, lambda: None)
        return QUIET.say(f"node {rank} is done; node 0 writes {output}")
    checkpoints = whole_checkpoints(work / "run")
    if work.exists() and not checkpoints:
        shutil.rmtree(work)
    labels = {}
    with QUIET:
        tokenizer, stop = load_tokenizer(model, recipe)
        known, counts = prepare(data, tokenizer, stop, recipe, output)
    QUIET.save(log)
    with write_atomic(work / "axolotl.yaml", "w") as file:
        file.write(resolved)
    if checkpoints:
        QUIET.say(f"going on from {checkpoints[-1]}")
    begin = time.time(), cpu_seconds()
    check = (output, tokenizer, stop, known, bool(recipe.get("rl")))
    train(command, log, progress, lambda: labels.update(certify_labels(*check)))
    seconds = {"train_seconds": round(time.time() - begin[0], 1), "train_cpu_seconds": round(cpu_seconds() - begin[1], 1)}
    steps, losses = read_steps(whole_checkpoints(work / "run")[-1])
    with QUIET:
        certificate = labels | export(output, model, recipe, data, known, stop, shutil.which("vllm") and not args.no_vllm)
        plot_losses(steps, output / "loss.png")
    QUIET.save(log)
    write_json(output / "certificate.json", certificate)
    with write_atomic(output / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(step) + "\n" for step in steps)
    edge = max(1, len(losses) // 4)  # single steps say little where batches are small
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    metrics = {key: value for key, value in certificate.items() if key != "conversations"}
    metrics |= {"loss_first": first, "loss_last": last, "certified_ids": len(certificate["conversations"])}
    metrics |= {"processes": nodes * processes, "expected_memory_bytes": memory, "parameters": total, "trainable": trainable}
    if used := max((float(step.get("memory/max_allocated (GiB)", 0)) for step in steps), default=0):
        metrics["allocated_memory_bytes"] = round(used * (1 << 30))
    counts |= {"steps": steps[-1]["step"], "turns": certificate["turns"], "trained_tokens": certificate["trained_tokens"]}
    records = {"metrics.jsonl": len(steps), "rejected.jsonl": counts["rejected"], "data.jsonl": counts["conversations"]}
    metrics |= progress.metrics | seconds
    run.finish(f"loss {first:.2f} -> {last:.2f}, certificate holds", counts, metrics, records, ("axolotl", "deepspeed", "peft"))


if __name__ == "__main__":
    run_main(main)
