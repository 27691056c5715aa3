#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["ai2-olmo==0.6.0", "ai2-olmo-core==3.0.0", "numpy>=1.26", "pyyaml>=6", "torch>=2.6", "transformers>=5.16,<6"]
# ///
"""What pretrain_olmo.py and pretrain_hf.py cost beside the bare trainers of ai2-olmo, olmo-core and transformers, and what data cost.

Usage:
    python tests/bench/bench_pretrain.py --input data/out/demo/tokens --tokenizer data/out/demo/tokenizer
    make bench-pretrain RECIPE=demo ARGS="--pairs 5"
    make bench-pretrain RECIPE=olmo2-1b ARGS="--recipe recipes/olmo2-1b/pretrain.yaml --steps 100"

A pair is a run of the script and one of the engine's own trainer with its own loading of the same file, on the same model and batch,
each in a process of its own; which of them leads alternates. A run's speed is that of its median step, the first steps left out, so
evaluations and checkpoints do not count. MFU: FLOPs of the products, attention's among them, against what the maker states of the GPU or
a product of float32 matrices reaches on this CPU. Then one core reads and prepares batches for two seconds, for each objective.

Reads   INPUT and TOKENIZER as the scripts do; the sizes of a recipe of pretrain_olmo.py, or those of a small model.
Writes  two tables on stdout, or one JSON object with --json; nothing else: runs go to a temporary folder.
Exit    0 done; 1 a bare trainer failed; 2 bad usage.
Needs   the environment of the scripts; one process, on a GPU where there is one. On two CPU cores about ten minutes for three pairs.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ENGINES = {"olmo": "pretrain_olmo.py", "olmo-core": "pretrain_olmo.py", "hf": "pretrain_hf.py"}
WARM = 5  # steps that are left out
# What the scripts have in common: a recipe's other keys are about an engine
SIZES = {"d-model": 192, "n-layers": 4, "n-heads": 6, "n-kv-heads": None, "mlp-hidden-size": 1024, "sequence-length": 256}
SIZES |= {"global-batch-size": 8, "micro-batch-size": 4, "precision": "fp32", "rope-theta": 10000, "tie-weights": False, "compile": False}


def load(name):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, SCRIPTS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_of(engine, sizes, args, output):
    """Return the flags of an engine's script for a run that only trains."""
    words = ["--input", args.input, "--tokenizer", args.tokenizer, "--output", output, "--steps", args.steps, "--warmup", WARM]
    words += ["--eval-every", args.steps, "--eval-sequences", 8, "--save-every", args.steps, "--learning-rate", 1e-3]
    for key, value in sizes.items():
        words += [f"--{key}" if value else f"--no-{key}"] if isinstance(value, bool) else [f"--{key}", value] if value is not None else []
    return list(map(str, words + (["--deepspeed", "none"] if engine == "hf" else ["--engine", engine, "--spike", 0])))


def bare_hf(script, args, tokens, clock):
    """Train by transformers' Trainer, which is given the sequences as tensors."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock()

    set_seed(args.seed)
    cuda, share = torch.cuda.is_available(), args.global_batch_size // args.micro_batch_size
    source = script.Sequences(Path(args.input[0], tokens["train"]["file"]), tokens["dtype"], args.sequence_length)
    rows = torch.from_numpy(source.read(range(min(source.rows, args.steps * args.global_batch_size))))
    settings = TrainingArguments(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.micro_batch_size, gradient_accumulation_steps=share,
        optim="adamw_torch", learning_rate=args.learning_rate, adam_beta2=0.95, weight_decay=args.weight_decay, max_grad_norm=args.clip,
        warmup_steps=args.warmup, lr_scheduler_type="cosine", bf16=args.precision == "amp_bf16", logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=not cuda, dataloader_num_workers=4 if cuda else 0, dataloader_pin_memory=cuda, disable_tqdm=True,
        torch_compile=args.compile,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(script.model_config(args, tokens))
    Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=[Clock()]).train()


def bare_olmo(script, args, tokens, clock):
    """Train by ai2-olmo's Trainer and data loader."""
    import torch
    import torch.distributed as dist
    from olmo import config as olmo
    from olmo.data import build_train_dataloader
    from olmo.model import OLMo
    from olmo.optim import build_optimizer, build_scheduler
    from olmo.torch_util import seed_all
    from olmo.train import Trainer

    class Clocked(Trainer):
        def train_step(self, *words, **named):
            metrics = super().train_step(*words, **named)
            clock()
            return metrics

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = script.train_config(args, [tokens], 1)
    config.scheduler = olmo.SchedulerConfig(name="cosine_with_warmup", t_warmup=args.warmup)
    config.data = olmo.DataConfig(
        paths=[str(Path(args.input[0], tokens["train"]["file"]))], memmap_dtype=tokens["dtype"], drop_last=True, pin_memory=cuda,
        num_workers=4 if cuda else 0, prefetch_factor=8 if cuda else None, persistent_workers=cuda,
    )  # fmt: skip
    config.save_interval_unsharded = None
    seed_all(config.seed)
    loader, model = build_train_dataloader(config), OLMo(config.model)
    for block in model.transformer.blocks if config.compile else ():
        block.compile(**config.compile.asdict())
    wrapped = torch.nn.parallel.DistributedDataParallel(model.to(device))
    Clocked(
        cfg=config, model=model, dist_model=wrapped, optim=build_optimizer(config, wrapped), scheduler=build_scheduler(config),
        train_loader=loader, device=device, evaluators=[],
    ).fit()  # fmt: skip


def bare_olmo_core(script, args, tokens, clock):
    """Train by olmo-core's Trainer and data loader."""
    import torch
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.data.types import NumpyDatasetDType
    from olmo_core.optim import AdamWConfig, CosWithWarmup, OptimGroupOverride
    from olmo_core.train import Duration, LoadStrategy, TrainerConfig
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.train_module import TransformerTrainModule
    from olmo_core.utils import seed_all

    class Clock(Callback):
        def post_step(self):
            clock()

    seed_all(args.seed)
    cuda, length = torch.cuda.is_available(), args.sequence_length
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    module = TransformerTrainModule(
        script.core_config(args, tokens)[0].build(init_device="meta"),
        AdamWConfig(
            lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=cuda,
            group_overrides=[OptimGroupOverride(["embeddings.weight"], {"weight_decay": 0.0})],
        ),
        rank_microbatch_size=args.micro_batch_size * length, max_sequence_length=length, compile_model=args.compile,
        z_loss_multiplier=args.z_loss or None, autocast_precision=torch.bfloat16 if args.precision == "amp_bf16" else None,
        max_grad_norm=args.clip, scheduler=CosWithWarmup(warmup_steps=args.warmup), device=device,
    )  # fmt: skip
    named = TokenizerConfig(vocab_size=tokens["vocab_size"], eos_token_id=tokens["eos_token_id"], pad_token_id=tokens["pad_token_id"])
    data = NumpyFSLDatasetConfig(
        paths=[str(Path(args.input[0], tokens["train"]["file"]))], sequence_length=length, tokenizer=named, work_dir=args.output,
        dtype=NumpyDatasetDType(tokens["dtype"]),
    )  # fmt: skip
    loader = NumpyDataLoaderConfig(global_batch_size=args.global_batch_size * length, seed=args.seed, num_workers=4 if cuda else 0)
    trainer = TrainerConfig(
        save_folder=args.output, save_overwrite=True, max_duration=Duration.steps(args.steps), load_strategy=LoadStrategy.never
    )
    trainer = trainer.build(module, loader.build(data.build()))
    trainer.add_callback("clock", Clock())
    trainer.fit()


def run_bare(engine, words):
    """Train by the bare trainer with a script's flags; print the seconds of the steps."""
    script, times = load(ENGINES[engine]), []
    args = script.checked(script.build_parser(), words)
    tokens = script.read_tokens(args.input[0], args.tokenizer)
    {"olmo": bare_olmo, "olmo-core": bare_olmo_core, "hf": bare_hf}[engine](script, args, tokens, lambda: times.append(time.perf_counter()))
    print(json.dumps([after - before for before, after in itertools.pairwise(times)]))


def speed(seconds, tokens):
    """Return the tokens/s of the median step; `seconds` of all steps but the first."""
    return tokens / statistics.median(seconds[WARM - 1 :])


def timed(engine, bare, sizes, args, folder):
    """Return the tokens/s of a run; SystemExit when a bare one fails, RuntimeError when a script does."""
    words, tokens = words_of(engine, sizes, args, folder / "out"), sizes["global-batch-size"] * sizes["sequence-length"]
    command = [sys.executable, __file__, "--bare", engine] if bare else [sys.executable, SCRIPTS / ENGINES[engine]]
    done = subprocess.run([*map(str, command), *words], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:]
    if done.returncode and bare:
        raise SystemExit(f"bench_pretrain: the bare {engine} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    if done.returncode:
        raise RuntimeError(*last)
    if bare:
        return speed(json.loads(done.stdout.splitlines()[-1]), tokens)
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return speed([tokens / row["tokens_per_second"] for row in rows if "loss" in row][1:], tokens)


def flops_of(sizes, vocabulary):
    """Return the FLOPs of a token, forward and back: 6 for each weight of a product, and half of attention's two, as it is causal."""
    width, heads = sizes["d-model"], sizes["n-heads"]
    keys = 2 * width * (sizes["n-kv-heads"] or heads) // heads
    block = width * (2 * width + keys) + 3 * width * (sizes["mlp-hidden-size"] or 4 * width) // 2
    layers, head = sizes["n-layers"], width * -(-vocabulary // 128) * 128
    return 6 * (layers * block + head) + 6 * layers * width * sizes["sequence-length"]


def data_rates(sizes, args):
    """Return {objective: tokens/s} that one core reads and makes into batches, and the reading alone."""
    import functools

    import numpy as np

    script = load("pretrain_hf.py")
    tokens, length = script.read_tokens(args.input, args.tokenizer), sizes["sequence-length"]
    source, micro = script.Sequences(Path(args.input, tokens["train"]["file"]), tokens["dtype"], length), sizes["micro-batch-size"]
    batches, rates = script.Batches([source], None, sizes["global-batch-size"], 1), {}

    def rate(step):
        step(1)  # imports
        count, start = 1, time.process_time()  # a core's seconds, whatever its neighbours do
        while time.process_time() < start + 2:
            count += 1
            step(count)
        return (count - 1) / (time.process_time() - start)

    rates["reading"] = rate(batches.read) * batches.size * length
    special, size = [tokens["eos_token_id"], tokens["pad_token_id"]], tokens["vocab_size"]
    makes = {"causal": script.causal, "masked": functools.partial(script.masked, special=special, mask=size, vocabulary=size)}
    makes["span"] = functools.partial(script.span, sentinels=np.arange(size, size + script.spans_of(length)[1]), end=special[0])
    for name, make in makes.items():
        items = script.Items(functools.partial(script.item_of, batches), sys.maxsize, make, 1)
        rates[name] = rate(lambda n, items=items: script.collate([items[n * micro + i] for i in range(micro)])) * micro * length
    return rates


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench_pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of tokenize_corpus.py")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the tokenizer that wrote the ids")
    parser.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="of pretrain_olmo.py: its sizes in place of the small model's")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all of them")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="of runs, for each engine (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main():
    if sys.argv[1:2] == ["--bare"]:  # a child of this script
        return run_bare(sys.argv[2], sys.argv[3:])
    parser = build_parser()
    args, sizes = parser.parse_args(), dict(SIZES)
    if args.steps < 2 * WARM:
        parser.error(f"--steps {args.steps}: at least {2 * WARM}")
    if args.recipe:
        import yaml

        recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
        sizes = {key: recipe.get(key, value if key in ("n-kv-heads", "tie-weights", "compile") else None) for key, value in SIZES.items()}
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch

    script = load("pretrain_hf.py")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peak = script.peak_flops(device, sizes["precision"])
    flops = flops_of(sizes, script.read_tokens(args.input, args.tokenizer)["vocab_size"])
    pairs, failed = {engine: [] for engine in args.engine}, {}
    for number in range(args.pairs):
        for engine in args.engine:
            pair = {}
            for bare in (False, True) if number % 2 else (True, False):
                with tempfile.TemporaryDirectory(prefix="bench-pretrain-") as folder:
                    try:
                        pair["bare" if bare else "ours"] = timed(engine, bare, sizes, args, Path(folder))
                    except RuntimeError as error:
                        failed[engine] = str(error)
            pairs[engine] += [pair] if len(pair) == 2 else []
            print(f"bench_pretrain: pair {number + 1} of {args.pairs}, {engine}: {pair}", file=sys.stderr)
    rates = data_rates(sizes, args)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    if args.json:
        made = {"pairs": pairs, "failed": failed, "device": name, "peak_flops": peak, "flops_per_token": flops, "data": rates}
        return print(json.dumps(made | {"sizes": sizes}))
    print(f"| engine, on {name} | bare, tokens/s | MFU | script, tokens/s | MFU | script costs |\n|---|---|---|---|---|---|")
    for engine, found in pairs.items():
        if engine in failed:
            print(f"| {engine} | {failed[engine]} | | | | |")
            continue
        cells = []
        for kind in ("bare", "ours"):
            middle = statistics.median(pair[kind] for pair in found)
            cells += [f"{middle:,.0f}", f"{middle * flops / peak:.1%}" if peak else ""]
        print(f"| {engine} | {' | '.join(cells)} | {statistics.median(pair['bare'] / pair['ours'] - 1 for pair in found):+.1%} |")
    print("\n| one core | tokens/s |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} |")


if __name__ == "__main__":
    main()
