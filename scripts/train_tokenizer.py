#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["orjson>=3.10", "pyyaml>=6", "tiktoken>=0.9", "tokenizers>=0.21", "tqdm>=4.66", "zstandard>=0.22"]
# ///
"""Train a tokenizer on documents: byte-level BPE, or Unigram with byte fallback, for transformers, vLLM and OLMo.

Usage:
    python scripts/train_tokenizer.py --input data/out/demo/dedup --output /tmp/tokenizer --vocab-size 8192
    make tokenizer RECIPE=demo

Reads   documents {"id", "text"} as .jsonl (plain, .gz, .zst); files and folders.
Writes  OUTPUT/tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja; tokenizer.tiktoken and
        tiktoken.json when asked for; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or a text is not itself after encode and decode; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU only, no network; memory for the distinct words of the corpus, where a clause of Chinese is a word.

Documents whose id hashes into the held-out share are not trained on: bytes per token are measured there.
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import importlib.metadata
import io
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
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import orjson
import zstandard
from tqdm import tqdm

STAGE = "train_tokenizer"
EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
# ChatML's marks and those of OLMo-2-Instruct: a later fine-tuning needs no new rows in the embedding
SPECIAL = [EOS, PAD, "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# GPT-4's pattern with two changes: a run of Chinese is not joined with the Latin letters or the mark beside it, and each digit stands
# alone. The syntax is common to Oniguruma (tokenizers) and Rust (tiktoken).
WORDS = (
    r"'(?i:s|t|re|ve|m|ll|d)|\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^\p{Han}]]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST = 18  # bytes of a BPE token (six Chinese characters), characters of a piece: else clauses that a corpus repeats become tokens
COVERAGE = 0.9995  # share of the corpus's characters that have a Unigram piece, the rest is bytes; SentencePiece's default
SAMPLE = 16 << 20  # bytes of held-out text that are measured


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
def held_out(identity, share):
    """True for about `share` of all ids, always the same ones: by the hash of the id."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") < share * 2**64


def language(document):
    """Return the document's `meta.language`, or else the script of most of its first letters: "latin", "cjk", "cyrillic" …"""
    meta = document.get("meta")
    if isinstance(meta, dict) and meta.get("language"):
        return re.sub(r"\W", "-", str(meta["language"]))
    scripts = Counter(unicodedata.name(c, "other").split()[0].lower() for c in document["text"][:300] if c.isalpha())
    return max(scripts, key=scripts.get, default="other")


class Hashed(io.RawIOBase):
    """A file whose SHA-256 is taken as it is read; `on_read(size)` is called after each piece."""

    def __init__(self, path, on_read):
        self.file, self.sha256, self.on_read = open(path, "rb", buffering=0), hashlib.sha256(), on_read

    def readable(self):
        return True

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:size])
        self.on_read(size)
        return size


def document_files(paths):
    """Return the .jsonl files (plain, .gz, .zst) of files and folders; of a stage's folder those named data*. SystemExit if none."""
    found = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*.jsonl*") if not f.name.startswith(".")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise SystemExit(f"{STAGE}: {path}: no .jsonl file there; name a file or folder of documents")
        found += [f for f in files if f.name.startswith("data")] or files
    return found


def read_documents(files, digests, limit=None):
    """Yield (path, line number, document) and note each file's SHA-256 in `digests`; SystemExit at the first line that is no document."""
    total = 0
    with tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for path in files:
            raw, number = Hashed(path, bar.update), 0
            opened = {".gz": gzip.open, ".zst": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)}
            try:
                for number, line in enumerate(io.BufferedReader(opened.get(path.suffix, lambda file: file)(raw), 1 << 20), 1):
                    document = orjson.loads(line)
                    if not all(isinstance(document[key], str) for key in ("id", "text")):
                        raise ValueError("`id` and `text` must be strings")
                    yield path, number, document
                    total += 1
                    if total == limit:
                        return
            except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
                raise SystemExit(f"{STAGE}: {path}: damaged after line {number} ({error}); write that file again") from None
            except (ValueError, TypeError, KeyError) as error:
                why = f"no field {error}" if isinstance(error, KeyError) else error
                raise SystemExit(f"{STAGE}: {path} line {number}: no document ({why}); mend or remove that line") from None
            digests[str(path)] = raw.sha256.hexdigest()
    if not total:
        raise SystemExit(f"{STAGE}: {files[0]}: no document in it; run the stage before this one, or correct --input")


def train_bpe(texts, vocab_size):
    """Return a byte-level BPE `tokenizers.Tokenizer` trained on an iterator of texts; it may be smaller than `vocab_size`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=byte_level.alphabet(),
        max_token_length=LONGEST,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rare_characters(texts):
    """Return the characters beyond the most frequent ones that make up COVERAGE of all text."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    left = (1 - COVERAGE) * counts.total()
    rare = []
    for character, count in reversed(counts.most_common()):
        left -= count
        if left < 0:
            break
        rare.append(character)
    return rare


def train_unigram(texts, vocab_size):
    """Return a Unigram `tokenizers.Tokenizer` with byte fallback. `texts()` gives the texts anew: they are read twice.

    The trainer knows no byte fallback and keeps every character that it sees, so the rare ones are hidden from it, and the 256
    bytes take their places in the vocabulary afterwards.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*SPECIAL, UNK]
    hidden = dict.fromkeys(map(ord, rare_characters(texts())), " ")
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(special) - 256,
        initial_alphabet=["\n", "\t", *map(chr, range(32, 127))],
        max_piece_length=LONGEST,
        show_progress=sys.stderr.isatty(),
    )
    learner.train_from_iterator((text.translate(hidden) for text in texts()), trainer)
    pieces = sorted(json.loads(learner.to_str())["model"]["vocab"], key=lambda piece: (-round(piece[1], 3), piece[0]))
    byte_score = pieces[-1][1] - 10
    vocabulary = [(token, 0.0) for token in special] + [(f"<0x{byte:02X}>", byte_score) for byte in range(256)] + [*map(tuple, pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index(UNK), byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def tiktoken_ranks(tokenizer):
    """Return {bytes: id} of a byte-level BPE tokenizer; tiktoken merges by these ids, which are in the order of learning."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: these bytes stand for themselves
    table = {chr(byte): byte for byte in visible}
    table |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in visible)}
    special = tokenizer.get_added_tokens_decoder()
    return {
        bytes(table[c] for c in token): i
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if i not in special
    }


def configuration(chat_template, unigram):
    """Return tokenizer_config.json. With another class than this one, transformers 5 reloads a tokenizer with other ids."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        **({"unk_token": UNK} if unigram else {}),
        "additional_special_tokens": SPECIAL[2:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' word for "no limit": the model's config has the limit
        "chat_template": chat_template,
    }


def measure(tokenizer, sample, others):
    """Return {language: {"documents", "bytes", "tokens"}} of a sample, having compared each text with its decoded ids.

    `others`: {name: encode function} of exports, which must give equal ids. SystemExit names the first document that differs.
    """
    figures = defaultdict(Counter)
    encodings = tokenizer.encode_batch_fast([document["text"] for _, _, document in sample], add_special_tokens=False)
    for (path, number, document), encoding in zip(sample, encodings, strict=True):
        where = f"{STAGE}: {path} line {number}: document {document['id']!r}"
        if tokenizer.decode(encoding.ids, skip_special_tokens=False) != document["text"]:
            raise SystemExit(f"{where} is not itself after encode and decode; train on text that has its characters, or use --model bpe")
        for name, encode in others.items():
            if encode(document["text"]) != encoding.ids:
                raise SystemExit(f"{where} has other ids in {name}; leave out --export, or change --vocab-size")
        figures[language(document)].update(documents=1, bytes=len(document["text"].encode()), tokens=len(encoding.ids))
    return figures


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files and folders of documents")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    parser.add_argument("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    parser.add_argument("--limit", type=int, metavar="N", help="read N documents only")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="default: bpe, byte-level")
    parser.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="special tokens included (default: 32768)")
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE", help="share of documents to measure on (default: 0.02)")
    parser.add_argument("--chat-template", metavar="FILE.jinja", help="default: ChatML")
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=False, help="write the BPE for tiktoken too")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    if args.vocab_size < (smallest := 256 + len(SPECIAL) + 200):
        parser.error(f"--vocab-size {args.vocab_size}: at least {smallest}, for the 256 bytes and the special tokens")
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: a share between 0 and 1")
    if args.export and args.model != "bpe":
        parser.error("--export: tiktoken knows byte-level BPE only; use --model bpe")
    files = document_files(args.input)
    run = Run("tokenizer", args, files + [Path(f) for f in [args.chat_template] if f])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here, and shells often switch it off
    chat_template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else CHATML
    sample, size, seen = [], 0, 0

    def texts():
        nonlocal size, seen
        sample.clear()
        size = seen = 0
        for path, number, document in read_documents(files, run.digests, args.limit):
            seen += 1
            if not held_out(document["id"], args.held_out):
                yield document["text"]
            elif size < SAMPLE:
                sample.append((path, number, document))
                size += len(document["text"].encode())

    tokenizer = train_bpe(texts(), args.vocab_size) if args.model == "bpe" else train_unigram(texts, args.vocab_size)
    if not sample:
        raise SystemExit(f"{STAGE}: {files[0]}: none of {seen} documents is in the held-out {args.held_out:.2%}; raise --held-out")
    tokenizer.encode_special_tokens = True  # "<|im_end|>" that somebody wrote in a text is text; not kept in tokenizer.json
    others = {}
    if args.export:
        import tiktoken

        ranks = tiktoken_ranks(tokenizer)
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        exported = tiktoken.Encoding(args.output, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
        others["tokenizer.tiktoken"] = exported.encode_ordinary
    figures = measure(tokenizer, sample, others)
    names = {"eos_token": EOS, "pad_token": PAD, "additional_special_tokens": SPECIAL[2:]}
    written = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(configuration(chat_template, args.model == "unigram"), ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(names | ({"unk_token": UNK} if args.model == "unigram" else {}), indent=2),
        "chat_template.jinja": chat_template,
    }
    if args.export:
        written["tokenizer.tiktoken"] = "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())
        written["tiktoken.json"] = json.dumps({"pat_str": WORDS, "special_tokens": special}, indent=2)
    for name, text in written.items():
        with write_atomic(run.output / name, "w") as file:
            file.write(text)
    vocabulary = tokenizer.get_vocab_size()
    if vocabulary < args.vocab_size:
        print(f"{STAGE}: the corpus yields {vocabulary} tokens, not {args.vocab_size}", file=sys.stderr)
    ratios = {name: round(figure["bytes"] / figure["tokens"], 3) for name, figure in sorted(figures.items())}
    run.finish(
        ", ".join([f"{vocabulary} tokens", *(f"{name} {ratio:.2f} bytes/token" for name, ratio in ratios.items())]),
        counts={"documents": seen, "held_out_documents": len(sample), "vocabulary": vocabulary},
        metrics={"bytes_per_token": ratios, "held_out": figures},
    )


if __name__ == "__main__":
    run_main(main)
