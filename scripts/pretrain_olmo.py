#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["ai2-olmo==0.6.0", "numpy>=1.26", "pyyaml>=6", "tokenizers>=0.21", "torch>=2.6", "torchmetrics>=1.4", "tqdm>=4.66"]
# ///
"""Pretrain an OLMo from token memory maps with ai2-olmo: one process, or several by DDP or FSDP; a stopped run goes on exactly.

Usage:
    python scripts/pretrain_olmo.py --config recipes/demo/pretrain.yaml --input TOKENS --tokenizer TOKENIZER --output /tmp/model
    make pretrain RECIPE=demo
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 scripts/pretrain_olmo.py …

Reads   the folder of tokenize_corpus.py (tokens.json, *.npy) and the tokenizer that wrote it.
Writes  OUTPUT/stepN-unsharded/{model,optim,train}.pt and config.yaml, the newest --keep of them; OUTPUT/metrics.jsonl: a row for each
        step and each evaluation; OUTPUT/samples.jsonl: continuations of held-out text; then OUTPUT/manifest.json, last.
Exit    0 done or up to date; 1 failed, or the loss became NaN; 2 bad usage; 3 refused, OUTPUT holds another run; 143 stopped by a
        signal, with a checkpoint.
Needs   CPU or CUDA GPUs, no network; ai2-olmo with the patches of patches/ai2-olmo. Memory: 16 bytes a parameter, and activations.

Started again with the same settings, a run goes on from its newest whole checkpoint; in one process its weights are then those of an
undisturbed run, bit for bit. The number of processes may change, within rounding.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
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
from tqdm import tqdm

STAGE = "pretrain_olmo"
CHECKPOINT = ("config.yaml", "model.pt", "optim.pt", "train.pt")
SCHEDULES = {"cosine": "cosine_with_warmup", "linear": "linear_with_warmup", "constant": "constant_with_warmup"}
# OLMo 1 and 2 as published: the order and kind of norms is all that differs in the block
ARCHITECTURES = {
    "olmo1": {"layer_norm_type": "default", "layer_norm_with_affine": False},
    "olmo2": {"layer_norm_type": "rms", "layer_norm_eps": 1e-6, "norm_after": True, "attention_layer_norm": True},
}
PROMPT, SAMPLE = 24, 48  # tokens of held-out text that are continued, and of the continuation


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


def train_config(args, tokens, world_size, cuda):
    """Return olmo's TrainConfig for the parsed flags, `tokens` of read_tokens() and the number of processes."""
    from olmo import config as olmo

    length = args.sequence_length
    enough = [name for name, part in tokens["held_out"].items() if part["tokens"] >= length * world_size]
    evaluation = olmo.DataConfig(
        datasets={name: [str(Path(args.input, tokens["held_out"][name]["file"]))] for name in enough},
        memmap_dtype=tokens["dtype"],
        drop_last=True,
    )
    return olmo.TrainConfig(
        run_name=Path(args.output).name,
        seed=args.seed,
        model=olmo.ModelConfig(
            d_model=args.d_model,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads or args.n_heads,
            mlp_hidden_size=args.mlp_hidden_size,
            max_sequence_length=length,
            rope=True,
            rope_theta=args.rope_theta,
            include_bias=False,
            bias_for_layer_norm=False,
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            weight_tying=args.tie_weights,
            flash_attention=args.flash_attention,
            vocab_size=tokens["vocab_size"],
            embedding_size=math.ceil(tokens["vocab_size"] / 128) * 128,  # the multiple that GPUs multiply fastest
            eos_token_id=tokens["eos_token_id"],
            pad_token_id=tokens["pad_token_id"],
            init_device="cpu",  # whole and from the seed in each process: the weights do not depend on how many there are
            init_cutoff_factor=3.0,
            precision=args.precision,
            **ARCHITECTURES[args.architecture],
        ),
        optimizer=olmo.OptimizerConfig(
            name="adamw", learning_rate=args.learning_rate, weight_decay=args.weight_decay, eps=1e-8, decay_norm_and_bias=True
        ),
        scheduler=olmo.SchedulerConfig(name=SCHEDULES[args.schedule], t_warmup=args.warmup, alpha_f=args.final_rate),
        data=olmo.DataConfig(
            paths=[str(Path(args.input, tokens["train"]["file"]))],
            memmap_dtype=tokens["dtype"],
            drop_last=True,
            pin_memory=cuda,
            num_workers=4 if cuda else 0,
            prefetch_factor=8 if cuda else None,
            persistent_workers=cuda,
        ),
        evaluators=[
            olmo.EvaluatorConfig(
                label="held-out", data=evaluation, subset_num_batches=math.ceil(args.eval_sequences / args.micro_batch_size / world_size)
            )
        ],
        tokenizer=olmo.TokenizerConfig(identifier=str(Path(args.tokenizer, "tokenizer.json"))),
        save_folder=args.output,
        save_overwrite=True,
        save_interval=None,
        save_interval_unsharded=args.save_every,
        save_num_unsharded_checkpoints_to_keep=args.keep,
        eval_interval=args.eval_every,
        max_duration=args.steps,
        stop_at=args.steps,
        canceled_check_interval=1,
        global_train_batch_size=args.global_batch_size,
        device_train_batch_size=args.global_batch_size // world_size,
        device_train_microbatch_size=args.micro_batch_size,
        device_train_grad_accum=args.global_batch_size // world_size // args.micro_batch_size,
        device_eval_batch_size=args.micro_batch_size,
        max_grad_norm=args.clip,
        precision=args.precision,
        softmax_auxiliary_loss=args.z_loss > 0,
        auxiliary_loss_multiplier=args.z_loss,
        compile=olmo.CompilerConfig() if args.compile else None,
        distributed_strategy=args.distributed,
        ddp=olmo.DDPConfig() if args.distributed == "ddp" else None,
        fsdp=olmo.FSDPConfig(wrapping_strategy="by_block", precision="mixed") if args.distributed == "fsdp" else None,
    )


def newest_checkpoint(folder):
    """Return the newest whole stepN-unsharded folder, or None; one that lacks a file, or the end of one, is named and passed over."""
    steps = {int(p.name[4:-10]): p for p in Path(folder).glob("step*-unsharded") if p.name[4:-10].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        broken = [name for name in CHECKPOINT if not (path / name).is_file()]
        broken += [name for name in CHECKPOINT[1:] if name not in broken and not zipfile.is_zipfile(path / name)]  # torch.save writes zip
        if not broken:
            return path
        print(f"{STAGE}: {path} is not whole ({', '.join(broken)}); passed over", file=sys.stderr)
    return None


class Journal:
    """metrics.jsonl and the progress line; only the process of rank 0 writes."""

    def __init__(self, path, step, total, writes):
        """Rows after `step`, which a stopped run wrote and its checkpoint does not know, are dropped."""
        self.rows, self.file = [], None
        if path.exists():
            with contextlib.suppress(ValueError):  # a last line that was cut
                self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.rows = [row for row in self.rows if row["step"] <= step]
        if writes:
            with write_atomic(path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
            self.file = open(path, "a", encoding="utf-8", buffering=1)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not (writes and sys.stderr.isatty()))
        self.clock = time.perf_counter()

    def write(self, row):
        if self.file:
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")

    def close(self):
        self.bar.close()
        self.file.close()

    def evaluations(self):
        """Return the rows of the evaluations."""
        return [row for row in self.rows if "held_out_loss" in row]


def recording_trainer():
    """Return a subclass of olmo's Trainer with a journal, bits per byte, unsharded checkpoints only, and a stop at a signal."""
    from olmo.config import CheckpointType
    from olmo.torch_util import synchronize_flag
    from olmo.train import Trainer

    if not hasattr(Trainer, "autocast"):
        raise SystemExit(f"{STAGE}: ai2-olmo is not patched; run `make setup`, or patch_packages.py apply")

    class RecordingTrainer(Trainer):
        stopped = False

        def train_step(self, batch, reduce_global_loss=True):
            if self.launcher not in (None, os.getppid()):
                raise SystemExit(f"{STAGE}: the process that started this one is gone; the same command goes on from the newest checkpoint")
            metrics = super().train_step(batch, reduce_global_loss)
            journal, now = self.journal, time.perf_counter()
            row = {"step": self.global_step, "tokens": self.global_train_tokens_seen, "loss": metrics["train/CrossEntropyLoss"]}
            row |= {"grad_norm": metrics["optim/total_grad_norm"], "learning_rate": self.optim.param_groups[0]["lr"]}
            if "train/ZLoss" in metrics:
                row["z_loss"] = metrics["train/ZLoss"]
            row["tokens_per_second"] = round(self.tokens_per_batch / (now - journal.clock))
            journal.clock = now
            journal.write(row)
            journal.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,} tokens/s", refresh=False)
            journal.bar.update()
            return metrics

        def eval(self):
            found = super().eval()
            losses = {name: found[f"eval/{name}/CrossEntropyLoss"] for name in self.parts if f"eval/{name}/CrossEntropyLoss" in found}
            parts = {name: self.parts[name] for name in losses}
            nats = {name: loss * parts[name]["tokens"] for name, loss in losses.items()}
            loss = sum(nats.values()) / sum(part["tokens"] for part in parts.values())
            bits = {name: nats[name] / math.log(2) / part["bytes"] for name, part in parts.items()}
            mean = sum(nats.values()) / math.log(2) / sum(part["bytes"] for part in parts.values())
            row = {"step": self.global_step, "held_out_loss": loss, "bits_per_byte": mean, "by_language": {}}
            row["by_language"] = {name: {"loss": losses[name], "bits_per_byte": bits[name]} for name in losses}
            self.journal.write(row)
            if self.journal.file:
                tqdm.write(f"step {self.global_step}: held-out loss {loss:.3f}, {mean:.3f} bits/byte", file=sys.stderr)
            self.journal.clock = time.perf_counter()
            return found

        def save_checkpoint(self, checkpoint_type=CheckpointType.unsharded):
            saved = super().save_checkpoint(CheckpointType.unsharded)  # at a signal Trainer.fit would save FSDP's shards
            self.journal.clock = time.perf_counter()
            return saved

        def check_if_cancelled(self):
            return synchronize_flag(self.stopped, self.device), 0

        def stop(self, number, frame):
            """Signal handler: stop after this step; a second signal acts at once."""
            self.stopped = True
            signal.signal(number, signal.SIG_DFL)

    return RecordingTrainer


def build_trainer(args, tokens, device):
    """Return the trainer, its model wrapped by DDP or FSDP, at its newest checkpoint if there is one."""
    from olmo.config import CheckpointType
    from olmo.data import build_train_dataloader
    from olmo.eval import build_evaluators
    from olmo.model import OLMo
    from olmo.optim import build_optimizer, build_scheduler
    from olmo.torch_util import get_global_rank, get_world_size, seed_all
    from olmo.train import cross_entropy_loss
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.fsdp")  # olmo saves by its older interface
    config = train_config(args, tokens, get_world_size(), device.type == "cuda")
    loader = build_train_dataloader(config)
    seed_all(config.seed)
    model = OLMo(config.model)
    if config.compile:
        for block in model.transformer.blocks:
            block.compile(**config.compile.asdict())
    if args.distributed == "ddp":
        wrapped = DistributedDataParallel(model.to(device))
    else:
        wrapped = FullyShardedDataParallel(
            model,
            sharding_strategy=config.fsdp.sharding_strategy,
            mixed_precision=config.fsdp_precision,
            auto_wrap_policy=model.get_fsdp_wrap_policy(config.fsdp.wrapping_strategy),
            use_orig_params=config.fsdp.use_orig_params,
            limit_all_gathers=True,
            device_id=device,
        )
    trainer = recording_trainer()(
        cfg=config,
        model=model,
        dist_model=wrapped,
        optim=build_optimizer(config, wrapped),
        scheduler=build_scheduler(config),
        train_loader=loader,
        device=device,
        evaluators=build_evaluators(config, device),
        loss_fn=functools.partial(cross_entropy_loss, z_loss_multiplier=args.z_loss),  # Trainer leaves the multiplier at 1e-4
    )
    newest = newest_checkpoint(args.output)
    if newest:
        trainer.restore_checkpoint(str(newest), checkpoint_type=CheckpointType.unsharded)
    trainer.parts = tokens["held_out"]
    trainer.journal = Journal(Path(args.output, "metrics.jsonl"), trainer.global_step, args.steps, get_global_rank() == 0)
    trainer.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return trainer


def continuations(trainer, args, tokens):
    """Return [{language, prompt, continuation}], one sampled (temperature 0.8) for the first held-out text of each language."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.tokenizer, "tokenizer.json")))
    generator, samples = torch.Generator().manual_seed(args.seed), []
    trainer.dist_model.eval()
    for language, part in tokens["held_out"].items():
        text = np.memmap(Path(args.input, part["file"]), tokens["dtype"], "r")[:PROMPT]
        ids = text[: next(iter(np.flatnonzero(text == tokens["eos_token_id"])), None)].tolist() or [tokens["eos_token_id"]]
        start = len(ids)
        for _ in range(SAMPLE):
            window = torch.tensor([ids[-args.sequence_length :]], device=trainer.device)
            with torch.no_grad(), trainer.autocast():
                logits = trainer.dist_model(input_ids=window).logits[0, -1, : tokens["vocab_size"]]
            ids.append(torch.multinomial(torch.softmax(logits.float().cpu() / 0.8, -1), 1, generator=generator).item())
            if ids[-1] == tokens["eos_token_id"]:
                break
        samples.append({"language": language, "prompt": tokenizer.decode(ids[:start]), "continuation": tokenizer.decode(ids[start:])})
    return samples


def train(args, tokens, device):
    """Train to the last step and return the trainer; SystemExit when the loss is no number, or at a signal (after a checkpoint)."""
    from olmo.torch_util import synchronize_flag

    trainer = build_trainer(args, tokens, device)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    try:
        due = trainer.global_step % args.eval_every == 0 or trainer.global_step >= args.steps
        evaluated = any(row["step"] == trainer.global_step for row in trainer.journal.evaluations())
        if synchronize_flag(due and not evaluated, device):
            trainer.eval()
        if trainer.global_step < args.steps:
            trainer.fit()
    except (ValueError, RuntimeError, OverflowError) as error:
        words, step = str(error), trainer.global_step
        if isinstance(error, OverflowError) or re.search(r"\bnan\b", words, re.I):
            why = f"the loss is no number at step {step}; lower --learning-rate, or raise --warmup (metrics.jsonl has the steps before)"
        elif re.search("PytorchStreamWriter|unexpected pos", words):
            why = (
                f"the checkpoint of step {step} could not be written; make room on the disk and run it again: it goes on from the last one"
            )
        elif "out of memory" in words:
            why = f"out of memory at step {step}; lower --micro-batch-size, or take --distributed fsdp and more processes"
        else:
            raise
        raise SystemExit(f"{STAGE}: {args.output}: {why}") from None
    if trainer.global_step < args.steps:
        if trainer.journal.file:
            print(
                f"{STAGE}: stopped after step {trainer.global_step}, checkpoint saved; the same command goes on from here", file=sys.stderr
            )
        sys.exit(128 + signal.SIGTERM)
    return trainer


def launch(processes):
    """Run this command in several processes under torchrun's agent; leave with the exit code of the first that fails."""
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
    except SignalException as error:  # passed on to the processes, which have saved a checkpoint
        sys.exit(128 + error.sigval)


def join(args):
    """Enter the process group; return (device, Run). Run is None but in the process of rank 0, whose verdict holds for all."""

    def begin():
        run = Run("pretrain", args, [args.input, Path(args.tokenizer, "tokenizer.json")], ignore=("nproc_per_node",))
        with contextlib.suppress(OSError, ValueError, KeyError):  # the maps were hashed as they were written, and may be terabytes
            for part in json.loads(Path(args.input, "manifest.json").read_text(encoding="utf-8"))["outputs"]:
                run.digests[str(Path(args.input, Path(part["path"]).name))] = part["sha256"]
        return run

    alone, verdict = "RANK" not in os.environ, [None]
    run = begin() if alone else None
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {})
    )
    if not alone:
        if dist.get_rank() == 0:
            try:
                run = begin()
            except SystemExit as leave:
                verdict = [leave.code or 0]
        dist.broadcast_object_list(verdict)
        if verdict[0] is not None:
            sys.exit(verdict[0])
    return device, run


def build_parser():
    parser = argparse.ArgumentParser(
        prog=f"{STAGE}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--input", required=True, metavar="DIR", help="folder of tokenize_corpus.py")
    add("--tokenizer", required=True, metavar="DIR", help="the tokenizer that wrote the ids")
    add("--output", required=True, metavar="DIR", help="folder for checkpoints and metrics")
    add("--config", metavar="FILE.yaml", help="recipe: these flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    add("--engine", choices=("olmo",), default="olmo", help="olmo: ai2-olmo")
    add(
        "--architecture", choices=sorted(ARCHITECTURES), default="olmo2", help="olmo2 (default): RMS norms after, norms of queries and keys"
    )
    add("--d-model", type=int, default=768, metavar="N", help="width (default: 768)")
    add("--n-layers", type=int, default=12, metavar="N", help="default: 12")
    add("--n-heads", type=int, default=12, metavar="N", help="default: 12")
    add("--n-kv-heads", type=int, metavar="N", help="heads of keys and values (default: as n-heads)")
    add("--mlp-hidden-size", type=int, metavar="N", help="both halves of the SwiGLU, as OLMo counts (default: 4 × d-model)")
    add("--sequence-length", type=int, default=2048, metavar="N", help="tokens (default: 2048)")
    add("--rope-theta", type=int, default=500_000, metavar="N", help="default: 500000")
    add("--tie-weights", action=switch, default=False, help="one matrix for embedding and output")
    add("--steps", type=int, metavar="N", help="length of the run (or --tokens)")
    add("--tokens", type=float, metavar="N", help="length of the run in tokens, rounded up to a step")
    add("--global-batch-size", type=int, default=512, metavar="N", help="sequences a step, over all processes (default: 512)")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="sequences a process takes at once (default: 8)")
    add("--learning-rate", type=float, default=4e-4, metavar="X", help="peak (default: 4e-4)")
    add("--warmup", type=int, default=2000, metavar="N", help="steps of linear warm-up (default: 2000)")
    add("--schedule", choices=sorted(SCHEDULES), default="cosine", help="after the warm-up (default: cosine)")
    add("--final-rate", type=float, default=0.1, metavar="SHARE", help="of the peak, at the last step (default: 0.1)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="default: 0.1; embeddings have none")
    add("--z-loss", type=float, default=1e-5, metavar="X", help="weight of the squared log of the softmax's sum (default: 1e-5)")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient (default: 1.0)")
    add("--precision", choices=("fp32", "amp_bf16"), default="amp_bf16", help="of the forward and backward pass (default: amp_bf16)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--eval-sequences", type=int, default=1024, metavar="N", help="of the held-out text, always the same (default: 1024)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps (default: 1000)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints (default: 2)")
    add("--seed", type=int, default=1, metavar="N", help="of weights, data order and samples (default: 1)")
    add("--distributed", choices=("ddp", "fsdp"), default="ddp", help="fsdp shards the model over the processes (default: ddp)")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="processes started here; several nodes: torchrun (default: 1)")
    add("--compile", action=switch, default=False, help="torch.compile each block")
    add("--flash-attention", action=switch, default=False, help="the package flash-attn; a GPU is needed")
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
    if args.flash_attention and not importlib.util.find_spec("flash_attn"):
        parser.error("--flash-attention: the package flash-attn is not installed; install it on the GPU machine, or leave the flag out")
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
    if not importlib.util.find_spec("olmo"):
        raise SystemExit(f"{STAGE}: the package ai2-olmo is not installed; run `make setup`, or install what the script's header names")
    if args.nproc_per_node > 1 and "RANK" not in os.environ:
        return launch(args.nproc_per_node)
    device, run = join(args)
    import torch.distributed as dist

    trainer = train(args, tokens, device)
    samples = continuations(trainer, args, tokens)
    if run:
        with write_atomic(run.output / "samples.jsonl", "w") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        trainer.journal.close()
        shutil.rmtree(run.output / "train_data")  # the engine's order of the sequences, which the seed gives again
        first, last = trainer.journal.evaluations()[0], trainer.journal.evaluations()[-1]
        rates = [row["tokens_per_second"] for row in trainer.journal.rows if "tokens_per_second" in row]
        run.finish(
            f"held-out loss {first['held_out_loss']:.2f} -> {last['held_out_loss']:.2f}, {last['bits_per_byte']:.2f} bits/byte",
            counts={"parameters": trainer.model.num_params(), "steps": args.steps, "tokens": trainer.global_train_tokens_seen},
            metrics={"first": first, "last": last, "tokens_per_second": sorted(rates)[len(rates) // 2], "processes": dist.get_world_size()},
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
