#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.10", "axolotl==0.19.0", "datasets>=4", "deepspeed>=0.18",
#     "pyyaml>=6", "torch>=2.6", "tqdm>=4.66", "transformers>=5,<6",
# ]
# ///
"""Fine-tune a chat model with Axolotl, and prove that the result stops where its training data stop.

Usage:
    python scripts/train_sft.py --config recipes/demo/sft.yaml --model data/out/demo/base-model \\
        --data data/out/demo/sft-data --output data/out/demo/sft
    make sft RECIPE=demo

--config is a native Axolotl file (`axolotl config-schema` lists its keys). What this script decides is left out of it: data, folders,
masking (only the assistant's turns and their end token are trained), resuming, and what happens to conversations over `sequence_len`:
the run is refused and they are named, unless the recipe says `excess_length_strategy: drop`. A `deepspeed:` path is relative to the recipe.

Reads   MODEL (Hugging Face folder or name) and DATA (data*.jsonl of {"messages": [...], "tools"?, "id"?}).
Writes  OUTPUT: the merged model as vLLM and transformers load it; certificate.json, metrics.jsonl, rejected.jsonl; axolotl/ (the resolved
        recipe, adapter, checkpoints, log); then OUTPUT/manifest.json, last.
        A killed run goes on from its newest whole checkpoint when the same command is given again.
Exit    0 done or up to date; 1 failed, also when the certificate does not hold; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   the GPUs that the recipe asks for, or a CPU (bf16, fp16 and tf32 false, `attn_implementation: sdpa`); no network for a local MODEL.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

OURS = ("datasets", "test_datasets", "output_dir", "dataset_prepared_path", "resume_from_checkpoint", "rl")
CERTIFIED = 50  # conversations whose token ids the certificate keeps, for comparison with a server's tokenize endpoint
MASKED = -100


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
    import yaml
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(recipe, dict):
            raise ValueError("no `key: value` lines")
        if isinstance(recipe.get("deepspeed"), str):
            recipe["deepspeed"] = json.loads((path.parent / recipe["deepspeed"]).read_text(encoding="utf-8"))
        for plugin in recipe.get("plugins") or []:
            PluginManager.get_instance().register(plugin)
            if plugin not in PluginManager.get_instance().plugins:
                raise ValueError(f"the plugin {plugin!r} cannot be imported; install it, or take it out")
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"not an Axolotl recipe: {' '.join(str(error).split())}") from error
    schema = merge_input_args()[1]
    if unknown := unknown_keys(recipe, schema):
        raise ValueError(f"Axolotl knows no key {unknown[0]!r} and would ignore it; `axolotl config-schema` lists the keys")
    if ours := sorted(set(recipe) & set(OURS)):
        raise ValueError(f"{ours[0]} is set by this script, from --data and --output; take it out")
    if recipe.get("excess_length_strategy") not in (None, "raise", "drop"):
        raise ValueError(f"excess_length_strategy {recipe['excess_length_strategy']!r} would cut off end tokens; say raise or drop")
    if not isinstance(recipe.get("sequence_len"), int):
        raise ValueError("no sequence_len; say how many tokens a conversation may have")
    return recipe, schema


def check_values(resolved, schema):
    """ValueError on the first value that Axolotl's schema does not take, in a sentence."""
    try:
        schema(**copy.deepcopy(resolved))  # it fills in values as it goes
    except ValueError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; `axolotl config-schema` lists what a key takes") from error


def read_conversations(data):
    """Yield (file, line, row) of each conversation in a file, or in the data*.jsonl of a folder; SystemExit names a line that is none."""
    for path in sorted(data.glob("data*.jsonl")) if data.is_dir() else [data]:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw)
                    messages = row["messages"]
                    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and m.get("role") for m in messages)):
                        raise ValueError("messages is not a list of {role, content}")
                    if not all(isinstance(message.get("content") or "", str) for message in messages):
                        raise ValueError("content is not text")
                    if not all(m.get("content") or m.get("tool_calls") for m in messages if m["role"] == "assistant"):
                        raise ValueError("an assistant's turn is empty")
                    json.dumps(messages, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
                except (ValueError, KeyError, TypeError) as error:
                    why = f"no field {error}" if isinstance(error, KeyError) else error
                    fail(f"{path} line {line}: not a conversation ({why}); convert the data by convert_sft_format.py")
                yield path, line, row


def name(path, line, row):
    return f"{path} line {line} (id {row.get('id')})"


def as_trained(row, template):
    """Return (messages, tools) as templates see them in training and serving: tool arguments parsed, only assistants' weights kept.

    A developer's turn is the system's where the template does not know developers: vLLM serves it so (vllm/renderers/hf.py, 0.32).
    """
    messages = json.loads(json.dumps(row["messages"]))
    developers = "'developer'" in template or '"developer"' in template
    for message in messages:
        if message["role"] == "developer" and not developers:
            message["role"] = "system"
        if message["role"] != "assistant":
            message.pop("weight", None)
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"].get("arguments"), str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages, row.get("tools") or None


def token_ids(tokenizer, messages, tools, recipe):
    """Return the token ids of a whole conversation under the tokenizer's own chat template."""
    settings = recipe.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **settings)


def digest(ids):
    return hashlib.blake2b(b"".join(i.to_bytes(4, "little") for i in ids), digest_size=16).digest()


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
    A conversation that the chat template does not show in full is rejected. SystemExit names those that are too long, unless the recipe
    drops them, and one that does not end with a stop token.
    """
    from tqdm import tqdm

    known, rejected, too_long = {}, [], []
    limit = recipe["sequence_len"]
    with write_atomic(output / "axolotl" / "data.jsonl", "w") as file:
        for path, line, row in tqdm(read_conversations(data), desc="conversations", disable=not sys.stderr.isatty()):
            place, reason, ids = name(path, line, row), "", []
            messages, tools = as_trained(row, tokenizer.chat_template)
            shown = {"tools": tools, "tool_calls": any(message.get("tool_calls") for message in messages)}
            hidden = [key for key, present in shown.items() if present and key not in tokenizer.chat_template]
            trained = [message["role"] == "assistant" and message.get("weight", 1) != 0 for message in messages]
            try:
                ids = token_ids(tokenizer, messages, tools, recipe)
            except Exception as error:  # templates raise whatever they like
                reason = f"the chat template cannot show it: {' '.join(str(error).split())[:200]}"
            roles = [message["role"] for message in messages]
            if hidden:
                reason = f"the chat template does not show {hidden[0]}"
            elif roles != [message["role"] for message in row["messages"]] and roles.count("system") > 1:
                reason = "the chat template knows no developer, and the server would merge its turn into the system's"
            elif not any(trained):
                reason = "no assistant's turn to learn from"
            elif len(ids) > limit:
                reason = f"{len(ids)} tokens, sequence_len is {limit}"
                too_long.append(f"{place}: {len(ids)} tokens")
            elif not reason and trained[-1] and not stop & set(ids[-3:]):
                end, names = tokenizer.decode(ids[-3:]), " ".join(tokenizer.convert_ids_to_tokens(sorted(stop)))
                remedy = "mend the template, or name its end token in the recipe, `special_tokens: {eos_token: ...}`"
                fail(f"{place}: the template ends it with {end!r}, without a stop token of generation_config ({names}); {remedy}")
            if reason:
                rejected.append({"file": str(path), "line": line, "reason": reason, "raw": json.dumps(row, ensure_ascii=False)})
                continue
            known[digest(ids)] = (place, sum(trained))
            packed = {"messages": json.dumps(messages, ensure_ascii=False)} | ({"tools": json.dumps(tools)} if tools else {})
            file.write(json.dumps(packed, ensure_ascii=False) + "\n")
    if too_long and recipe.get("excess_length_strategy") != "drop":
        remedy = "raise sequence_len, shorten them, or say `excess_length_strategy: drop` in the recipe"
        fail(f"{len(too_long)} conversations are longer than sequence_len {limit}: {'; '.join(too_long[:3])}; {remedy}")
    if not known:
        fail(
            f"{data}: no conversation to train on{f', {len(rejected)} rejected: ' + rejected[0]['reason'] if rejected else ''}; mend --data"
        )
    if rejected:
        with write_atomic(output / "rejected.jsonl", "w") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
        print(f"sft: {len(rejected)} conversations rejected ({rejected[0]['reason']}, ...): {output / 'rejected.jsonl'}", file=sys.stderr)
    return known, {"conversations": len(known), "rejected": len(rejected), "too_long": len(too_long)}


def resolve(recipe, model, output, plugins):
    """Return the whole Axolotl configuration of this run."""
    work = output.resolve() / "axolotl"
    dataset = {"path": str(work / "data.jsonl"), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
    dataset |= {"roles_to_train": ["assistant"], "train_on_eos": "turn", "message_field_training": "weight"}
    ours = {"base_model": model, "datasets": [dataset], "output_dir": str(work / "run"), "dataset_prepared_path": str(work / "prepared")}
    ours |= {"excess_length_strategy": "raise", "auto_resume_from_checkpoints": True, "tokenizer_save_jinja_files": False}
    ours |= {"plugins": plugins} if plugins else {}
    # By itself Axolotl starts loader processes that read 256 batches ahead; after a kill they block on a full pipe for ever
    defaults = {"chat_template": "tokenizer_default", "dataloader_num_workers": 0}
    return defaults | recipe | ours


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


def train(command, environment, log):
    """Run Axolotl with its words in `log` and its loss lines on stderr; SystemExit when it fails. Leaves no process behind."""
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    error = ""
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(command, text=True, errors="replace", preexec_fn=die_with_parent, **options)
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                if logged := re.match(r"\s*\{'loss': '?([\d.e+-]+).*'epoch': '?([\d.]+)", line):
                    print(f"sft: epoch {logged[2]}, loss {logged[1]}", file=sys.stderr)
                error = line.strip() if re.match(r"(\[rank0\]: )?[\w.]*(Error|Exception|Exit|Interrupt)\b", line) and not error else error
            child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        fail(f"Axolotl ended with exit code {child.returncode} ({error or 'no exception in its log'}); all of its words are in {log}")


def write_json(path, value):
    with write_atomic(path, "w") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


def write_model(output, model, recipe, stop):
    """Put the merged model into `output` in the form that servers load.

    LoRA is merged by Axolotl's shard-wise merge, in the base model's dtype; rope settings are written under the keys of transformers 5
    and of older versions; generation_config is the base model's with this tokenizer's special ids; the chat template is inside
    tokenizer_config.json, which every server reads.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    made = output / "axolotl" / "run"
    tokenizer = AutoTokenizer.from_pretrained(made)
    if recipe.get("adapter"):
        from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

        device, merged = "cuda" if torch.cuda.is_available() else "cpu", output / "axolotl" / "merged"
        merge_lora_sharded_efficient(model, made, merged, device=device, simulate_nf4=recipe["adapter"] == "qlora")
        made = merged
    for file in [*made.glob("model*.safetensors"), *made.glob("model*.safetensors.index.json")]:
        os.replace(file, output / file.name)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
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
    shutil.rmtree(output / "axolotl" / "merged", ignore_errors=True)


def certify(output, data, known, recipe):
    """Return the certificate of a written model; SystemExit names the first conversation that disproves it.

    Stop token: in Axolotl's own prepared data the last trained label of each trained turn is a stop id of generation_config, a pad token
    distinct from the end token exists, and the chat template is in the tokenizer. Same ids: what Axolotl trained on is what
    apply_chat_template of the written folder gives.
    """
    from datasets import load_from_disk
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
    seen, turns, trained = set(), 0, 0
    for folder in sorted(path.parent for path in (output / "axolotl" / "prepared").glob("*/state.json")):
        for row in load_from_disk(str(folder)).select_columns(["input_ids", "labels"]):
            key, labels = digest(row["input_ids"]), row["labels"]
            if key not in known:
                text = tokenizer.decode(row["input_ids"])[:200]
                fail(f"certificate: Axolotl trained on {text!r}, which the chat template gives for no conversation")
            place, expected = known[key]
            ends = [label for label, after in zip(labels, [*labels[1:], MASKED], strict=True) if label != MASKED and after == MASKED]
            if len(ends) != expected:
                fail(f"certificate: {place}: {expected} turns to train, {len(ends)} found in the labels; look at the chat template")
            for end in ends:
                if end not in stop:
                    named = " ".join(tokenizer.convert_ids_to_tokens(sorted(stop)))
                    end = tokenizer.decode([end])
                    fail(f"certificate: {place}: a trained turn ends with {end!r}, no stop token of generation_config ({named})")
            seen.add(key)
            turns, trained = turns + len(ends), trained + sum(label != MASKED for label in labels)
    if missing := known.keys() - seen:
        place, _ = known[next(iter(missing))]
        fail(f"certificate: {place}: not in Axolotl's prepared data; {len(missing)} conversations were dropped or changed")
    conversations, digests = [], {place: key for key, (place, _) in known.items()}
    rows = (entry for entry in read_conversations(data) if name(*entry) in digests)
    for path, line, row in itertools.islice(rows, 0, None, -(-len(digests) // CERTIFIED)):
        messages, tools = as_trained(row, tokenizer.chat_template)
        ids = token_ids(tokenizer, messages, tools, recipe)
        if digest(ids) != digests[name(path, line, row)]:
            fail(f"certificate: {name(path, line, row)}: apply_chat_template of {output} gives other token ids than Axolotl trained on")
        conversations.append({"id": row.get("id"), "messages": messages, "tools": tools, "ids": ids})
    facts = {"stop_ids": sorted(stop), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return facts | {"turns": turns, "trained_tokens": trained, "conversations": conversations}


def answer(output, conversation, stop):
    """Load the written folder as a server does and answer a conversation's first question greedily; return {question, answer, stopped}."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, device = AutoTokenizer.from_pretrained(output), "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto").to(device)
    first = next(i for i, message in enumerate(conversation["messages"]) if message["role"] == "assistant")
    asked, tools = conversation["messages"][:first], conversation["tools"]
    prompt = tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, return_dict=False, return_tensors="pt").to(
        device
    )
    reply = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=96, do_sample=False)[
        0, prompt.shape[1] :
    ].tolist()
    text = tokenizer.decode(reply, skip_special_tokens=True)
    return {"question": asked[-1]["content"] if asked else "", "answer": text, "stopped": reply[-1] in stop}


def read_steps(checkpoint):
    """Return (logged steps, losses) of a run from the trainer state of its last checkpoint."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return steps, [float(entry["loss"]) for entry in steps]


def rank_plugin():
    """Return the Axolotl plugin class of runs with several processes: each ends with its launcher, and DeepSpeed works on a CPU.

    Axolotl 0.19 places the model on device LOCAL_RANK, which transformers takes for a GPU; accelerate takes a machine without a GPU for
    one process; both ask for nccl; DeepSpeed compiles C++ for minutes for what gloo does as well.
    """
    import torch
    from axolotl.integrations.base import BasePlugin

    class RankPlugin(BasePlugin):
        def register(self, cfg):
            die_with_parent()
            if not torch.cuda.is_available():
                train_on_cpu()

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

    return RankPlugin


def __getattr__(attribute):
    """Let Axolotl's processes import this file and find the plugin in it, without importing Axolotl for `--help`."""
    if attribute == "RankPlugin":
        return rank_plugin()
    raise AttributeError(attribute)


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
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # it makes every start compile all imports anew
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"

    import torch
    import yaml

    processes = args.nproc_per_node or torch.cuda.device_count() or 1
    command = ["axolotl", "train", str(work / "axolotl.yaml"), "--launcher", "python"]
    try:
        recipe, schema = read_recipe(path)
        model = args.model = args.model or recipe.get("base_model")
        if not model:
            raise ValueError("no base_model; name the model there, or by --model")
        plugins = recipe.get("plugins") or []
        if processes > 1:
            command[4:] = ["torchrun", "--", "--standalone", "--nproc_per_node", str(processes)]
            plugins = [*plugins, f"{Path(__file__).stem}.RankPlugin"]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
        resolved = resolve(recipe, model, output, plugins)
        check_values(resolved, schema)
    except ValueError as error:
        parser.error(f"{path}: {error}")
    if not data.exists():
        fail(f"{data}: no such file or folder; convert conversations by convert_sft_format.py first")
    if Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    vars(args).update({f"recipe {key}": value for key, value in recipe.items()})
    resolved = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    if args.dry_run:
        print(f"{resolved}# {shlex.join(command)}")
        return
    run = Run("sft", args, [place for place in (model, data) if Path(place).exists()], ignore=("gpus", "dry_run"))
    tokenizer, stop = load_tokenizer(model, recipe)
    checkpoints = whole_checkpoints(work / "run")
    if work.exists() and not checkpoints:
        shutil.rmtree(work)
    known, counts = prepare(data, tokenizer, stop, recipe, output)
    with write_atomic(work / "axolotl.yaml", "w") as file:
        file.write(resolved)
    if checkpoints:
        print(f"sft: going on from {checkpoints[-1]}", file=sys.stderr)
    train(command, os.environ, work / "axolotl.log")
    steps, losses = read_steps(whole_checkpoints(work / "run")[-1])
    write_model(output, model, recipe, stop)
    certificate = certify(output, data, known, recipe)
    certificate["sample"] = answer(output, certificate["conversations"][0], stop)
    write_json(output / "certificate.json", certificate)
    with write_atomic(output / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(step) + "\n" for step in steps)
    edge = max(1, len(losses) // 4)  # single steps say little where batches are small
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    metrics = {key: value for key, value in certificate.items() if key != "conversations"}
    metrics |= {"loss_first": first, "loss_last": last, "certified_ids": len(certificate["conversations"]), "processes": processes}
    counts |= {"steps": steps[-1]["step"], "turns": certificate["turns"], "trained_tokens": certificate["trained_tokens"]}
    records = {"metrics.jsonl": len(steps), "rejected.jsonl": counts["rejected"], "data.jsonl": counts["conversations"]}
    run.finish(f"loss {first:.2f} -> {last:.2f}, certificate holds", counts, metrics, records, ("axolotl", "deepspeed", "peft"))


if __name__ == "__main__":
    run_main(main)
