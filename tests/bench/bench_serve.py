#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["psutil>=5.9", "pyyaml>=6", "vllm>=0.32"]
# ///
"""What a client of serve_vllm.py gets beside one of a bare `vllm serve`, by vLLM's own benchmark, and what compilation and exports do.

Usage:
    python tests/bench/bench_serve.py --model data/out/demo/base-model --recipe recipes/demo/serve.yaml
    python tests/bench/bench_serve.py --model Qwen/Qwen3-14B --recipe recipes/qwen3-14b/serve.yaml --gpus 6,7 --pairs 3
    make bench-serve RECIPE=demo

The bare server's command is what `serve_vllm.py --dry-run` prints. A pair is `vllm bench serve` through both, the same prompts for both and
others in the next pair; which of them leads alternates. On a CPU both stay up for half of the pairs and are then started anew in the other
order, since two instances of one command can differ; GPUs hold one of them, so there each is started for its run. Then each mode of MODES
is served alone and measured three times; one that fails is a row that says why. Beside busy neighbours a server's CPU seconds tell more
than the clock.

Reads   MODEL and RECIPE as serve_vllm.py does.
Writes  two tables on stdout, or one JSON object with --json; nothing else: logs go to a temporary folder.
Exit    0 done; 1 a server of a pair or a benchmark failed; 2 bad usage.
Needs   the environment of serve_vllm.py, PORT and the one after it; on two CPU cores 40 minutes, most of them compilation.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "serve_vllm.py"
NAME = "bench"  # that the model is served under
RUNS = 3  # of each mode
FIGURES = {"TTFT ms": "median_ttft_ms", "TPOT ms": "median_tpot_ms", "output tokens/s": "output_throughput", "server's CPU s": ""}
EXPORTS = ["VLLM_DISABLE_TORCH_COMPILE=1", "TORCHDYNAMO_DISABLE=1", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
# name: (variables, flags after `--`, by serve_vllm.py rather than bare)
MODES = {"eager": ([], ["--enforce-eager"], False), "compiled": ([], ["-O2"], False)}
MODES |= {f"compiled, {export}": ([export], ["-O2"], False) for export in EXPORTS}
MODES |= {"compiled, all three": (EXPORTS, ["-O2"], False), "all three, by serve_vllm.py": (EXPORTS, [], True)}


class Failed(Exception):
    """A server did not start, or did not answer; the message says why."""


@contextlib.contextmanager
def served(command, port, log):
    """Run a server in a session of its own; yield (its pid, the seconds until it was healthy); leave no process of it."""
    begun, opener = time.monotonic(), urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        while True:
            if server.poll() is not None:
                errors = re.findall(r"((?:\w+(?:Error|Exception)|serve_vllm): .*)", log.read_text(errors="replace"))
                errors = [line for line in errors if "nitialization failed" not in line] or [f"exit code {server.returncode}"]
                raise Failed(errors[-1][:200])
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        yield server.pid, time.monotonic() - begun
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(90)
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def cpu_seconds(pid):
    """Return the CPU seconds that a process and all below it have taken."""
    import psutil

    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in tree))


class Bench:
    """The servers and the benchmark of one run of this script."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder

    def words(self, port, flags=()):
        """Return the command of serve_vllm.py."""
        args = self.args
        words = [sys.executable, str(SCRIPT), "--model", args.model, "--served-model-name", NAME, "--port", str(port)]
        words += ["--config", args.recipe] if args.recipe else []
        words += ["--gpus", args.gpus] if args.gpus else []
        return words + (["--", *flags] if flags else [])

    def bare(self, port, flags=()):
        """Return the command of vLLM that serve_vllm.py would run."""
        words = self.words(port, flags)
        at = words.index("--") if flags else len(words)
        answer = subprocess.run([*words[:at], "--dry-run", *words[at:]], capture_output=True, text=True)
        if answer.returncode:
            raise SystemExit(f"bench_serve: no server to compare with: {answer.stderr.strip()}")
        return shlex.split(answer.stdout)

    def measure(self, pid, port, seed):
        """Return the figures of one `vllm bench serve` with the server `pid`; raises Failed when a request failed."""
        args, result = self.args, self.folder / "result.json"
        words = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "openai", "--base-url", f"http://127.0.0.1:{port}"]
        words += ["--model", NAME, "--tokenizer", args.model, "--dataset-name", "random", "--seed", seed, "--temperature", 0]
        words += ["--random-input-len", args.input_tokens, "--random-output-len", args.output_tokens, "--num-prompts", args.requests]
        words += ["--max-concurrency", args.concurrency, "--num-warmups", args.concurrency, "--disable-tqdm"]
        words += ["--save-result", "--result-dir", self.folder, "--result-filename", result.name]
        result.unlink(missing_ok=True)
        begun = cpu_seconds(pid)
        answer = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        spent = cpu_seconds(pid) - begun
        figures = json.loads(result.read_text()) if result.exists() else {"failed": "all"}
        if answer.returncode or figures["failed"]:
            raise Failed(
                f"{figures['failed']} requests of `vllm bench serve` failed: {answer.stderr.strip().rpartition(chr(10))[2][-200:]}"
            )
        return {name: figures.get(key, spent) for name, key in FIGURES.items()}

    def pairs(self):
        """Return [{"bare": figures, "ours": figures}, …], one for each pair."""
        ports, pairs, half = {"bare": self.args.port, "ours": self.args.port + 1}, [], (self.args.pairs + 1) // 2
        bare = self.bare(ports["bare"])
        on_gpus = "--tensor-parallel-size" in bare
        with contextlib.ExitStack() as stack:
            up = {}
            for seed in range(self.args.pairs):
                pairs.append({})
                for name in ("bare", "ours") if (seed + (seed >= half)) % 2 else ("ours", "bare"):
                    if name not in up:
                        command = bare if name == "bare" else self.words(ports[name])
                        up[name], _ = stack.enter_context(served(command, ports[name], self.folder / f"{name}.log"))
                    pairs[-1][name] = self.measure(up[name], ports[name], seed)
                    if on_gpus or (seed == half - 1 and len(pairs[-1]) == 2):
                        stack.close()
                        up.clear()
                print(f"bench_serve: pair {seed + 1} of {self.args.pairs}: {pairs[-1]}", file=sys.stderr)
        return pairs

    def mode(self, name):
        """Return {"start s", …} with the median figures of a mode, or {"failed": why}."""
        variables, flags, ours = MODES[name]
        command = self.words(self.args.port, flags) if ours else self.bare(self.args.port, flags)
        try:
            with served(["env", *variables, *command], self.args.port, self.folder / "mode.log") as (pid, seconds):
                runs = [self.measure(pid, self.args.port, seed) for seed in range(RUNS)]
        except Failed as error:
            return {"failed": str(error)}
        return {"start s": seconds} | {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}


def mean_ratio(pairs, figure):
    """Return the geometric mean of ours to bare."""
    return statistics.geometric_mean(pair["ours"][figure] / pair["bare"][figure] for pair in pairs)


def report(pairs, modes):
    """Print both tables."""
    if pairs:
        half = (len(pairs) + 1) // 2
        print(f"| median of {len(pairs)} pairs | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
        for name, label in {"bare": "bare `vllm serve`", "ours": "`serve_vllm.py`"}.items():
            middle = [f"{statistics.median(pair[name][figure] for pair in pairs):.1f}" for figure in FIGURES]
            print(f"| {label} | {' | '.join(middle)} |")
        means = [[mean_ratio(part, figure) for part in (pairs[:half], pairs[half:] or pairs)] for figure in FIGURES]
        print(f"| mean ratio within a pair | {' | '.join(f'{math.sqrt(first * second):.3f}' for first, second in means)} |")
        print(f"| of each half of the pairs | {' | '.join(f'{first:.3f}, {second:.3f}' for first, second in means)} |\n")
    if modes:
        print(f"| mode | start s | {' | '.join(FIGURES)} |\n|---|---|{'---|' * len(FIGURES)}")
        for name, row in modes.items():
            cells = [f"fails: {row['failed']}", *[""] * len(FIGURES)] if "failed" in row else [f"{x:.1f}" for x in row.values()]
            print(f"| {name} | {' | '.join(cells)} |")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench_serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, or hub id")
    add("--recipe", metavar="FILE.yaml", help="of serve_vllm.py")
    add("--gpus", metavar="IDS", help="as nvidia-smi shows them, e.g. 6,7")
    add("--port", type=int, default=8051, help="this one and the next are used (default: 8051)")
    add("--pairs", type=int, default=8, metavar="N", help="pairs of runs (default: %(default)s)")
    add("--modes", nargs="*", choices=MODES, default=list(MODES), metavar="MODE", help=f"of: {'; '.join(MODES)} (default: all)")
    add("--requests", type=int, default=32, metavar="N", help="of each run (default: %(default)s)")
    add("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    add("--input-tokens", type=int, default=128, metavar="N", help="of each request (default: %(default)s)")
    add("--output-tokens", type=int, default=64, metavar="N", help="of each answer (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main():
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for name in ("VLLM_API_KEY", *(export.partition("=")[0] for export in EXPORTS)):
        os.environ.pop(name, None)
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        bench = Bench(args, Path(folder))
        try:
            pairs = bench.pairs()
        except Failed as error:
            raise SystemExit(f"bench_serve: a server of a pair failed: {error}") from None
        modes = {}
        for name in args.modes:
            modes[name] = bench.mode(name)
            print(f"bench_serve: {name}: {modes[name]}", file=sys.stderr)
    print(json.dumps({"pairs": pairs, "modes": modes})) if args.json else report(pairs, modes)


if __name__ == "__main__":
    main()
