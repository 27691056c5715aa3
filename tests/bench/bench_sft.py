#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["axolotl==0.19.0", "pyyaml>=6"]
# ///
"""What train_sft.py adds to the time of `axolotl train` on the same recipe: pairs of runs, one after the other.

Usage:
    python tests/bench/bench_sft.py --model data/out/demo/base-model --data data/out/demo/sft-data --recipe recipes/demo/sft.yaml
    make bench-sft RECIPE=demo

Of each pair the first run is train_sft.py's; the second is `axolotl train` on the configuration and data that the first has written,
without this repository's plugin. Shown are wall and CPU seconds (of all processes) of both, what the training itself costs more, and the
seconds before and after it that Axolotl does not spend: checks, token ids of all conversations, merge, certificate, answer, plot.

Reads   MODEL, DATA and RECIPE as train_sft.py does.
Writes  a table on stdout, or one JSON object with --json; nothing else: both runs go to a temporary folder.
Exit    0 done; 1 a run failed; 2 bad usage.
Needs   the environment of train_sft.py; minutes for each pair.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_sft.py"


def timed(command, log):
    """Run a command with its words in `log`; return its (wall, CPU) seconds, SystemExit when it fails."""

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    wall, cpu = time.monotonic(), spent()
    with open(log, "w") as file:
        code = subprocess.run(list(map(str, command)), stdout=file, stderr=file).returncode
    if code:
        raise SystemExit(f"bench_sft: {command[0]} ended with exit code {code}: {log.read_text()[-2000:]}")
    return time.monotonic() - wall, spent() - cpu


def measure(args, folder):
    """Return one pair: {"ours", "axolotl": (wall, cpu)}, and train_sft.py's own clock around its training."""
    import yaml

    recipe, output = folder / "recipe.yaml", folder / "ours"
    keys = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    if isinstance(keys.get("deepspeed"), str):
        keys["deepspeed"] = str((args.recipe.parent / keys["deepspeed"]).resolve())
    recipe.write_text(yaml.safe_dump(keys | ({"max_steps": args.max_steps} if args.max_steps else {})), encoding="utf-8")
    words = [sys.executable, SCRIPT, "--config", recipe, "--model", args.model, "--data", args.data, "--output", output]
    pair = {"ours": timed(words, folder / "ours.log")}
    resolved = yaml.safe_load((output / "axolotl" / "axolotl.yaml").read_text(encoding="utf-8"))
    resolved["plugins"] = [plugin for plugin in resolved["plugins"] if not plugin.startswith(SCRIPT.stem)] or None
    resolved |= {"output_dir": str(folder / "run"), "dataset_prepared_path": str(folder / "prepared")}
    (folder / "axolotl.yaml").write_text(yaml.safe_dump({k: v for k, v in resolved.items() if v is not None}), encoding="utf-8")
    pair["axolotl"] = timed(["axolotl", "train", folder / "axolotl.yaml", "--launcher", "python"], folder / "axolotl.log")
    metrics = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    pair["training"] = metrics["train_seconds"], metrics["train_cpu_seconds"]
    return pair


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for flag, text in {"--model": "model to start from", "--data": "conversations", "--recipe": "native Axolotl file"}.items():
        parser.add_argument(flag, required=True, type=Path, metavar="PATH", help=text)
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="in place of the recipe's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main():
    args = build_parser().parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    pairs = []
    for number in range(1, args.pairs + 1):
        with tempfile.TemporaryDirectory(prefix="bench-sft-") as folder:
            pairs.append(measure(args, Path(folder)))
        print(f"bench_sft: pair {number} of {args.pairs}: {pairs[-1]}", file=sys.stderr)
    middle = {key: [statistics.median(pair[key][i] for pair in pairs) for i in (0, 1)] for key in ("ours", "axolotl", "training")}
    added = [statistics.median(pair["training"][i] / pair["axolotl"][i] - 1 for pair in pairs) for i in (0, 1)]
    if args.json:
        print(json.dumps({"pairs": pairs, "median": middle, "added_share": added}))
        return
    rest = [ours - training for ours, training in zip(middle["ours"], middle["training"], strict=True)]
    print("| | wall s | CPU s |\n|---|---|---|")
    print("| axolotl train | {:.1f} | {:.1f} |".format(*middle["axolotl"]))
    cells = [f"{seconds:.1f} ({share:+.1%})" for seconds, share in zip(middle["training"], added, strict=True)]
    print(f"| train_sft.py, its training alone | {' | '.join(cells)} |")
    print("| train_sft.py, checks, merge and certificate | {:.1f} | {:.1f} |".format(*rest))
    print("| train_sft.py, all of it | {:.1f} | {:.1f} |".format(*middle["ours"]))


if __name__ == "__main__":
    main()
