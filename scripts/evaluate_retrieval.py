#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Measure how well answer_errors.py finds the right record: recall@1 and @5, MRR and latency, against plain BM25 and plain embeddings.

Usage:
    python scripts/evaluate_retrieval.py --queries data/sample/errors/queries.jsonl --uri data/out/demo/kb/errors.db
    python scripts/evaluate_retrieval.py --queries Q.jsonl --records R.jsonl --distractors X.jsonl --noise 50 --json
    make eval-kb

Reads   queries {"qid", "text", "group", "type"?}: right is a record whose id, tag or group is `group`; the base at --uri, or records (and
        distractors, which are never right) that load_milvus.py loads into a temporary Milvus Lite base first.
Writes  a table on standard output, or one JSON object with --json, which also has the figures by `type` and the queries missed.
Exit    0 done; 1 failed; 2 bad usage.
Needs   load_milvus.py and answer_errors.py, beside this file or in --scripts; CPU, 1 GB of memory; 30 s, and 1 s for 30 records.

--noise N puts N lines of a training or serving log around each query: half of them are no INFO lines, and name errors and packages too.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

METHODS = ("lines", "bm25", "dense")
NOISE = (  # # is a random digit
    "INFO 11-0# 12:0#:1# core.py:5#] Loading model weights took #.#3 GiB and #.#4 seconds",
    "INFO 11-0# 1#:3#:5# api_server.py:7#] Available routes are: /v1/chat/completions, Methods: POST",
    "2026-11-0# 12:0#:1#,#1# | INFO | trainer.py:2## | ***** Running training *****",
    'INFO:     127.0.0.1:5#1#2 - "GET /health HTTP/1.1" 200 OK',
    "[INFO] GPU KV cache usage: #.#%, Avg generation throughput: #1.# tokens/s, Running: # reqs, Waiting: 0 reqs",
    'DEBUG:urllib3.connectionpool:https://example.org:443 "HEAD /config.json HTTP/1.1" 200 ##',
    "[rank#]: NCCL INFO Channel 0#/0 : #[0] -> #[1] via P2P/IPC",
    "2026-11-0# 12:0#:1# INFO worker.py:1#4# -- Started a local Ray instance.",
    "{'loss': #.#1#, 'grad_norm': #.#2, 'learning_rate': #.#e-05, 'epoch': 0.#3}",
    " ##%|████      | ##/1##0 [0#:1#<0#:2#,  #.#3it/s]",
    "Loading checkpoint shards: 100%|██████████| #/# [00:0#<00:00,  #.#1s/it]",
    "/opt/env/lib/python3.10/site-packages/torch/utils/checkpoint.py:#1: UserWarning: pass the use_reentrant parameter explicitly.",
    "FutureWarning: `torch.cuda.amp.autocast(args...)` is deprecated. Please use `torch.amp.autocast('cuda', args...)` instead.",
    "WARNING 11-0# 1#:0#:1# config.py:4##] Possibly too large swap space. #.## GiB out of ##.## GiB CPU memory is allocated for it.",
    "Some weights of LlamaForCausalLM were not initialized from the model checkpoint and are newly initialized: ['lm_head.weight']",
    "trainable params: #,###,### || all params: 1,5##,###,### || trainable%: 0.##",
    "|   #  N/A  N/A      ####      C   python                          ####MiB |",
    '  File "/srv/app/trainer.py", line #1#, in step',
)


def fail(sentence):
    print(f"evaluate_retrieval: {sentence}", file=sys.stderr)
    sys.exit(1)


def read_queries(path):
    """Return the queries of a JSONL file: objects with texts in qid, text and group, each qid once."""
    queries = {}
    if not Path(path).is_file():
        fail(f"{path}: no such file; look at --queries")
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            query = json.loads(line.decode()) if line.strip() else None
            if query is not None and not all(query[key].strip() for key in ("qid", "text", "group")):
                raise ValueError("an empty text")
            if query and queries.setdefault(query["qid"], query) is not query:
                raise ValueError(f"qid {query['qid']!r} stands there twice")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fail(f"{path} line {number}: not a JSON object with texts in qid, text and group ({error}); mend the line")
    return queries or fail(f"{path}: empty; a query is a JSON object with texts in qid, text and group")


def surround(text, lines, rng):
    """Return text with `lines` lines of log noise around it, at a random place."""
    noise = ["".join(rng.choice("0123456789") if letter == "#" else letter for letter in rng.choice(NOISE)) for _ in range(lines)]
    at = rng.randint(0, lines)
    return "\n".join([*noise[:at], text, *noise[at:]])


def figures(found, queries):
    """Return recall@1, recall@5, MRR (within the ids found) and the queries that the first record does not answer.

    `found`: by qid the labels of each record, best first; right is a record one of whose labels is the query's group."""
    ranks = {qid: next((at for at, names in enumerate(records, 1) if queries[qid]["group"] in names), 0) for qid, records in found.items()}
    share = {f"recall_at_{k}": round(statistics.mean(0 < rank <= k for rank in ranks.values()), 4) for k in (1, 5)}
    mrr = round(statistics.mean(1 / rank if rank else 0 for rank in ranks.values()), 4)
    return {"queries": len(ranks)} | share | {"mrr": mrr, "missed": [qid for qid, rank in ranks.items() if rank != 1]}


def percentiles(values):
    """Return p50 and p99, in the values' unit, by the nearest rank."""
    ordered = sorted(values)
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 99)}


def run(script, *arguments):
    """Run a script of this toolkit and return its standard output; its own words go to standard error."""
    child = subprocess.run([sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    return child.stdout if child.returncode == 0 else fail(f"{script.name} ended with code {child.returncode}; its message is above")


def evaluate(args, folder):
    """Return {method: figures with latency and figures by type}; `folder` takes the temporary base and the queries with noise."""
    queries, rng = read_queries(args.queries), random.Random(args.seed)
    uri = args.uri or str(folder / "kb" / "errors.db")
    if not args.uri:
        model = ["--embed-model", args.embed_model] if args.embed_model else []
        inputs = [*args.records, *args.distractors]
        run(args.scripts / "load_milvus.py", "--input", *inputs, "--output", folder / "kb", *model)
    noisy = [{"qid": qid, "text": surround(query["text"], args.noise, rng)} for qid, query in queries.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in noisy), encoding="utf-8")
    search = ["--uri", uri, "--collection", args.collection, "--input", folder / "queries.jsonl", "--top-k", 20, "--rank", *METHODS]
    ranked = [json.loads(line) for line in run(args.scripts / "answer_errors.py", *search).splitlines()]
    report = {}
    for method in METHODS:
        found = {row["qid"]: [names for _, names in row[method]["found"]] for row in ranked}
        by_type = defaultdict(dict)
        for qid, records in found.items():
            by_type[queries[qid].get("type", "")][qid] = records
        report[method] = figures(found, queries) | {
            "search_ms": percentiles([row[method]["search_ms"] for row in ranked]),
            "embed_ms": percentiles([row[method]["embed_ms"] for row in ranked]),
            "by_type": {name: figures(part, queries) for name, part in sorted(by_type.items())},
        }
    return report


def table(report):
    rows = [("method", "queries", "recall@1", "recall@5", "MRR", "search p50 / p99 ms", "embed p50 / p99 ms")]
    for method, of in report.items():
        times = (f"{of[name]['p50']:.1f} / {of[name]['p99']:.1f}" for name in ("search_ms", "embed_ms"))
        rows.append((method, of["queries"], *(f"{of[name]:.3f}" for name in ("recall_at_1", "recall_at_5", "mrr")), *times))
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="evaluate_retrieval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--queries", required=True, metavar="PATH", help="JSONL of queries")
    add("--uri", help="a base that load_milvus.py made; or give --records")
    add("--collection", default="mcp_errors", metavar="NAME", help="default: mcp_errors")
    add("--records", nargs="+", default=[], metavar="PATH", help="records for a temporary base")
    add("--distractors", nargs="+", default=[], metavar="PATH", help="more records, none of them right for any query")
    add("--embed-model", metavar="MODEL", help="for the temporary base (default: that of load_milvus.py)")
    add("--noise", type=int, default=0, metavar="N", help="lines of log around each query (default: 0)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--scripts", type=Path, default=Path(__file__).resolve().parent, metavar="DIR", help="default: the folder of this file")
    add("--json", action=argparse.BooleanOptionalAction, default=False, help="print one JSON object in place of the table")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if bool(args.uri) == bool(args.records):
        parser.error("give either --uri of a base or --records for a temporary one")
    for name in ("load_milvus.py", "answer_errors.py"):
        if not (args.scripts / name).is_file():
            parser.error(f"{name} is not in {args.scripts}; --scripts names its folder")
    with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
        report = evaluate(args, Path(folder))
    print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else table(report))


if __name__ == "__main__":
    main()
