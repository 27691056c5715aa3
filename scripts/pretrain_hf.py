#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate>=1.10", "deepspeed>=0.19", "numpy>=1.26", "pyyaml>=6", "torch>=2.6", "tqdm>=4.66", "transformers>=5.16,<6"]
# ///
"""Pretrain any transformers model from token memory maps: the Trainer of transformers with DeepSpeed ZeRO, on CPU or GPUs.

Usage:
    python scripts/pretrain_hf.py --config recipes/demo/pretrain-hf.yaml --input TOKENS --tokenizer TOKENIZER --output /tmp/model
    make pretrain ENGINE=hf RECIPE=demo
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/pretrain_hf.py …

Reads   the folder of tokenize_corpus.py (tokens.json, *.npy) and the tokenizer that wrote it.
Writes  OUTPUT/checkpoint-N, the newest --keep of them; OUTPUT/metrics.jsonl: a row for each step and each evaluation;
        OUTPUT/model: the Hugging Face folder, tokenizer included, ready to be served; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or the loss became NaN; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   CPU or CUDA GPUs, no network, no compiler. Memory: 16 bytes a parameter, divided among the processes by ZeRO, and
        activations; while the weights are drawn, the whole model in each process, so that they do not depend on how many there are.

Started again with the same settings, a run goes on from its newest whole checkpoint, to the weights of an undisturbed run.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np

STAGE = "pretrain_hf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ZERO = ("zero1", "zero2", "zero3")


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
def read_tokens(folder, tokenizer):
    """Return tokens.json of a folder, its files checked for their size and its ids for having come from `tokenizer`; SystemExit if not."""
    path = Path(folder, "tokens.json")
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))
        parts = [tokens["train"], *tokens["held_out"].values()]
        expected = {path.with_name(part["file"]): part["tokens"] * np.dtype(tokens["dtype"]).itemsize for part in parts}
        with open(Path(tokenizer, "tokenizer.json"), "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == tokens["tokenizer_sha256"]
    except OSError as error:
        raise SystemExit(f"{STAGE}: {error.filename}: {error.strerror}; --input and --tokenizer want the folders of those stages") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{STAGE}: {path}: not written by tokenize_corpus.py ({error!r}); run that stage again") from None
    if not same:
        raise SystemExit(f"{STAGE}: {tokenizer}/tokenizer.json did not write the ids of {folder}; give the tokenizer that did")
    for file, size in expected.items():
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{STAGE}: {file} has {found} bytes, {path.name} says {size}; run tokenize_corpus.py again")
    return tokens


class Sequences:
    """A token memory map as a dataset of sequences [length] of int64 ids; what is left at the end of the file is not used."""

    def __init__(self, path, dtype, length, limit=None):
        ids = np.memmap(path, dtype, "r")
        self.rows = ids[: len(ids) // length * length].reshape(-1, length)[:limit]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        import torch

        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def model_config(args, tokens):
    """Return the configuration of the model: an Olmo2 of the given sizes, or --model-config with the tokenizer's ids."""
    from transformers import AutoConfig, Olmo2Config

    ids = {"eos_token_id": tokens["eos_token_id"], "pad_token_id": tokens["pad_token_id"], "bos_token_id": None}
    ids["vocab_size"] = math.ceil(tokens["vocab_size"] / 128) * 128  # the multiple that GPUs multiply fastest
    if not args.model_config:
        return Olmo2Config(
            hidden_size=args.d_model,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads or args.n_heads,
            intermediate_size=(args.mlp_hidden_size or 4 * args.d_model) // 2,
            max_position_embeddings=args.sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": float(args.rope_theta)},
            rms_norm_eps=1e-6,
            tie_word_embeddings=args.tie_weights,
            **ids,
        )
    try:
        config = AutoConfig.from_pretrained(args.model_config, local_files_only=True, **ids)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise SystemExit(
            f"{STAGE}: {args.model_config}: no configuration ({why}); give a config.json with a model_type of transformers"
        ) from None
    if (getattr(config, "max_position_embeddings", None) or args.sequence_length) < args.sequence_length:
        raise SystemExit(f"{STAGE}: {args.model_config}: max_position_embeddings is below --sequence-length {args.sequence_length}")
    return config


def training_arguments(args, cuda, fresh):
    """Return TrainingArguments; a fresh run begins with an evaluation. DeepSpeed gets no optimizer and no schedule of its own: those of
    transformers are the same with and without it, and none of its operators has to be compiled."""
    from transformers import TrainingArguments

    if args.deepspeed != "none" and not cuda:
        import deepspeed

        # an operator that would be compiled for minutes, and the lock of a build that was killed hangs all later runs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage = {"stage": ZERO.index(args.deepspeed) + 1, "stage3_gather_16bit_weights_on_model_save": True} if args.deepspeed in ZERO else {}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    zero = {"zero_optimization": stage, "bf16": {"enabled": "auto"}, "steps_per_print": sys.maxsize, **auto}
    schedules = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": args.final_rate}),
        "linear": ("polynomial", {"lr_end": args.final_rate * args.learning_rate, "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
    }
    return TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch_size,
        per_device_eval_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // args.micro_batch_size // int(os.environ.get("WORLD_SIZE", 1)),
        optim="adamw_torch",
        learning_rate=args.learning_rate,
        adam_beta2=0.95,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip,
        warmup_steps=args.warmup,
        lr_scheduler_type=schedules[args.schedule][0],
        lr_scheduler_kwargs=schedules[args.schedule][1],
        bf16=args.precision == "amp_bf16",
        seed=args.seed,
        eval_strategy="steps",
        eval_on_start=fresh,
        eval_steps=args.eval_every,
        prediction_loss_only=True,
        save_steps=args.save_every,
        save_total_limit=args.keep,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=4 if cuda else 0,
        dataloader_pin_memory=cuda,
        torch_compile=args.compile,
        deepspeed=None if args.deepspeed == "none" else zero if stage else args.deepspeed,
    )


def newest_checkpoint(folder):
    """Return the newest whole checkpoint-N folder, or None; transformers writes trainer_state.json last, torch.save writes zip files."""
    steps = {int(p.name[11:]): p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if all(map(zipfile.is_zipfile, [*path.rglob("*.pt"), *path.rglob("*.pth")])):
                return path
        print(f"{STAGE}: {path} is not whole; passed over", file=sys.stderr)
    return None


def recording_trainer():
    """Return a subclass of transformers' Trainer that keeps metrics.jsonl and evaluates each language."""
    from transformers import PrinterCallback, Trainer

    class RecordingTrainer(Trainer):
        def prepare(self, args, tokens, step):
            """Keep the rows up to `step`: those after it a stopped run wrote, and its checkpoint does not know them."""
            self.remove_callback(PrinterCallback)
            self.parameters = self.model.num_parameters()
            self.parts, self.path = tokens["held_out"], Path(args.output, "metrics.jsonl")
            self.batch_tokens, self.clock = args.global_batch_size * args.sequence_length, time.perf_counter()
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may have been cut
            self.rows = [row for row in rows if row["step"] <= step]
            if self.is_world_process_zero():
                with write_atomic(self.path, "w") as file:
                    file.writelines(json.dumps(row) + "\n" for row in self.rows)

        def write(self, row):
            self.rows.append(row)
            if self.is_world_process_zero():
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self.clock = time.perf_counter()

        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise SystemExit(f"{STAGE}: {self.path}: the loss is no number at step {self.state.global_step}; lower --learning-rate")
            row = {"step": self.state.global_step, "tokens": self.state.global_step * self.batch_tokens, "loss": logs["loss"]}
            row |= {"grad_norm": logs["grad_norm"], "learning_rate": logs["learning_rate"]}
            self.write(row | {"tokens_per_second": round(self.batch_tokens / (time.perf_counter() - self.clock))})

        def evaluate(self, *args, **kwargs):
            evaluate = super().evaluate
            losses = {name: evaluate(data, metric_key_prefix=name)[f"{name}_loss"] for name, data in self.eval_dataset.items()}
            row = {"step": self.state.global_step} | pooled(losses, self.parts)
            self.write(row)
            if self.is_world_process_zero():
                print(
                    f"step {row['step']}: held-out loss {row['held_out_loss']:.3f}, {row['bits_per_byte']:.3f} bits/byte", file=sys.stderr
                )
            return row

        def evaluations(self):
            """Return the rows of the evaluations."""
            return [row for row in self.rows if "held_out_loss" in row]

    return RecordingTrainer


def pooled(losses, parts):
    """Return a row of metrics.jsonl: the mean of the languages' losses (nats a token) by tokens, and bits a byte of text."""
    nats = {name: loss * parts[name]["tokens"] for name, loss in losses.items()}
    size = {name: math.log(2) * parts[name]["bytes"] for name in losses}
    each = {name: {"loss": loss, "bits_per_byte": nats[name] / size[name]} for name, loss in losses.items()}
    loss = sum(nats.values()) / sum(parts[name]["tokens"] for name in losses)
    return {"held_out_loss": loss, "bits_per_byte": sum(nats.values()) / sum(size.values()), "by_language": each}


def train(args, tokens, cuda):
    """Train to the last step, write OUTPUT/model, and return the trainer."""
    from transformers import AutoModelForCausalLM, logging, set_seed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls it by older names
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    def sequences(part, limit=None):
        return Sequences(Path(args.input, part["file"]), tokens["dtype"], args.sequence_length, limit)

    parts = {name: part for name, part in tokens["held_out"].items() if part["tokens"] >= args.sequence_length}
    held_out = {name: sequences(part, math.ceil(args.eval_sequences / len(parts))) for name, part in parts.items()}
    set_seed(args.seed)
    # before TrainingArguments: once these know of ZeRO-3, a new model is cut up before its weights are drawn
    model = AutoModelForCausalLM.from_config(model_config(args, tokens))
    newest = newest_checkpoint(args.output)
    step = int(newest.name[11:]) if newest else 0
    settings = training_arguments(args, cuda, fresh=newest is None)
    trainer = recording_trainer()(model, settings, train_dataset=sequences(tokens["train"]), eval_dataset=held_out)
    trainer.prepare(args, tokens, step)
    if step < args.steps:  # asked to go on from its last step, the Trainer would take one more
        trainer.train(resume_from_checkpoint=newest and str(newest))
    return trainer


def export(args):
    """Write OUTPUT/model: the weights of the last checkpoint, the configuration with the cache on that whoever generates needs (the
    Trainer switches it off), and the tokenizer, to the byte."""
    checkpoint, model = Path(args.output, f"checkpoint-{args.steps}"), Path(args.output, "model")
    weights = list(checkpoint.glob("model*.safetensors*"))
    if not weights:
        raise SystemExit(
            f"{STAGE}: {checkpoint} has sharded weights only: run its zero_to_fp32.py, or set stage3_gather_16bit_weights_on_model_save in "
            f"{args.deepspeed} and train again"
        )
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    tokenizer = [path for name in TOKENIZER_FILES if (path := Path(args.tokenizer, name)).exists()]
    for path in [*weights, checkpoint / "generation_config.json", *tokenizer]:
        shutil.copy(path, model)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | {"use_cache": True}
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def launch(processes):
    """Run this command in so many processes under torchrun's agent; leave with the exit code of the first that fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    settings = LaunchConfig(1, 1, processes, run_id=STAGE, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(settings, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        sys.exit(abs(error.get_first_failure()[1].exitcode))
    except SignalException as stop:
        print(f"{STAGE}: stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(128 + stop.sigval)


def begin(args):
    """Return the Run of this stage, or leave as it says."""
    inputs = [args.input, Path(args.tokenizer, "tokenizer.json"), *filter(os.path.exists, [args.model_config or "", args.deepspeed])]
    return Run("pretrain", args, inputs)


def begin_together(args):
    """Return the Run in the process of rank 0 and None in the others; if it says to leave, all leave."""
    import torch.distributed as dist

    run, verdict = None, [None]
    if dist.get_rank() == 0:
        try:
            run = begin(args)
        except SystemExit as leave:
            verdict = [leave.code or 0]
    dist.broadcast_object_list(verdict)
    if verdict[0] is not None:
        sys.exit(verdict[0])
    return run


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--input", required=True, metavar="DIR", help="folder of tokenize_corpus.py")
    add("--tokenizer", required=True, metavar="DIR", help="the tokenizer that wrote the ids")
    add("--output", required=True, metavar="DIR", help="folder for checkpoints, metrics and the model")
    add("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    add("--model-config", metavar="FILE", help="config.json of any causal model of transformers, in place of the sizes of an Olmo2 below")
    add("--d-model", type=int, default=768, metavar="N", help="width (default: 768)")
    add("--n-layers", type=int, default=12, metavar="N", help="default: 12")
    add("--n-heads", type=int, default=12, metavar="N", help="default: 12")
    add("--n-kv-heads", type=int, metavar="N", help="heads of keys and values (default: as n-heads)")
    add("--mlp-hidden-size", type=int, metavar="N", help="both halves of the SwiGLU, as OLMo counts (default: 4 × d-model)")
    add("--rope-theta", type=int, default=500_000, metavar="N", help="default: 500000")
    add("--tie-weights", action=switch, default=False, help="one matrix for embedding and output")
    add("--sequence-length", type=int, default=2048, metavar="N", help="tokens (default: 2048)")
    add("--steps", type=int, metavar="N", help="length of the run (or --tokens)")
    add("--tokens", type=float, metavar="N", help="length of the run in tokens, rounded up to a step")
    add("--global-batch-size", type=int, default=512, metavar="N", help="sequences a step, over all processes (default: 512)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="sequences a process takes at once (default: 8)")
    add("--learning-rate", type=float, default=4e-4, metavar="X", help="peak (default: 4e-4)")
    add("--warmup", type=int, default=2000, metavar="N", help="steps of linear warm-up (default: 2000)")
    add("--schedule", choices=("constant", "cosine", "linear"), default="cosine", help="after the warm-up (default: cosine)")
    add("--final-rate", type=float, default=0.1, metavar="SHARE", help="of the peak, at the last step (default: 0.1)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="default: 0.1; norms have none")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (default: 1.0)")
    add("--precision", choices=("fp32", "amp_bf16"), default="amp_bf16", help="of the forward and backward pass (default: amp_bf16)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--eval-sequences", type=int, default=1024, metavar="N", help="of the held-out text, always the same (default: 1024)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints (default: 2)")
    add("--seed", type=int, default=1, metavar="N", help="of weights and data order (default: 1)")
    add("--deepspeed", default="zero2", metavar="HOW", help="zero1, zero2, zero3, none, or a DeepSpeed JSON file (default: zero2)")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes started here; several nodes: torchrun (default: 1)")
    add("--compile", action=switch, default=False, help="torch.compile the model")
    return parser


def checked(parser, argv):
    """Parse argv; return the arguments with `steps` resolved. Usage errors are named with their remedy."""
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", args.nproc_per_node))
    if (args.steps is None) == (args.tokens is None):
        parser.error("give --steps or --tokens, one of them")
    args.steps = args.steps or math.ceil(args.tokens / args.global_batch_size / args.sequence_length)
    if args.d_model % args.n_heads or args.n_heads % (args.n_kv_heads or args.n_heads) or (args.d_model // args.n_heads) % 2:
        parser.error("--n-heads must divide --d-model into even parts, --n-kv-heads must divide --n-heads")
    if args.global_batch_size % (processes * args.micro_batch_size):
        parser.error(f"--global-batch-size must be a multiple of {processes} processes × --micro-batch-size {args.micro_batch_size}")
    if args.deepspeed not in (*ZERO, "none") and not Path(args.deepspeed).is_file():
        parser.error(f"--deepspeed {args.deepspeed}: neither zero1, zero2, zero3 or none, nor a file")
    return args


def main():
    parser = build_parser()
    args = checked(parser, config_argv(parser, sys.argv[1:]))
    tokens = read_tokens(args.input, args.tokenizer)
    sequences = tokens["train"]["tokens"] // args.sequence_length
    if sequences < args.global_batch_size or all(part["tokens"] < args.sequence_length for part in tokens["held_out"].values()):
        raise SystemExit(
            f"{STAGE}: {args.input}: {sequences} training sequences of {args.sequence_length} tokens do not fill a batch, or no held-out "
            f"file holds one; take more text, or a shorter --sequence-length, or a smaller --global-batch-size"
        )
    alone = "RANK" not in os.environ
    run = begin(args) if alone else None  # before the imports, which take many seconds
    if alone and (args.nproc_per_node > 1 or args.deepspeed != "none"):
        return launch(args.nproc_per_node)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, and packages that are imported along would ask the hub
    if not alone:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the launcher is killed, this process is as well
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not alone:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        run = begin_together(args)
    trainer = train(args, tokens, cuda)
    if run:
        export(args)
        first, last = trainer.evaluations()[0], trainer.evaluations()[-1]
        rates = sorted(row["tokens_per_second"] for row in trainer.rows if "tokens_per_second" in row)
        run.finish(
            f"held-out loss {first['held_out_loss']:.2f} -> {last['held_out_loss']:.2f}, {last['bits_per_byte']:.2f} bits/byte",
            counts={"parameters": trainer.parameters, "steps": args.steps, "tokens": args.steps * trainer.batch_tokens},
            metrics={"first": first, "last": last, "tokens_per_second": rates[len(rates) // 2], "processes": trainer.args.world_size},
        )
    if not alone:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
