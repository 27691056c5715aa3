#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8"]
# ///
"""Measure how well answer_errors.py finds the right record and refuses when there is none, against plain BM25 and plain embeddings.

Usage:
    python scripts/evaluate_retrieval.py --queries data/sample/errors/queries.jsonl --uri data/out/demo/kb/errors.db
    python scripts/evaluate_retrieval.py --queries Q.jsonl --records R.jsonl --distractors X.jsonl --noise 50 --plot retrieval.png
    make eval-kb

Reads   queries {"qid", "text", "group", "type"?}: right is a record whose id, tag or group is `group`; the base at --uri, or records (and
        distractors, which are never right) that load_milvus.py loads into a temporary Milvus Lite base first.
Writes  a table on standard output, or one JSON object with --json, which also has the figures by `type` and the queries missed; --plot.
Exit    0 done; 1 failed; 2 bad usage.
Needs   load_milvus.py and answer_errors.py, beside this file or in --scripts; CPU, 1 GB of memory; 30 s, and 1 s for 30 records.

Refusal: each query is asked once more with its right records hidden, as an error that the base does not know; what is similar stays in
it. AUC is the chance that a known error gets a higher certainty than an unknown one (for the plain methods: a higher score); at the
threshold, the shares of known errors that are answered and of unknown ones that are refused.
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


def refusal(known, unknown, threshold):
    """Return the AUC of telling known from unknown by these numbers, and with a threshold the shares answered and refused rightly."""
    pairs = [(a > b) + (a == b) / 2 for a in known for b in unknown]
    shares = {"answered": [a >= threshold for a in known], "refused": [b < threshold for b in unknown]} if threshold is not None else {}
    return {"auc": round(statistics.mean(pairs), 4)} | {name: round(statistics.mean(rights), 4) for name, rights in shares.items()}


def percentiles(values):
    """Return p50 and p99, in the values' unit, by the nearest rank."""
    ordered = sorted(values)
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 99)}


def run(script, *arguments):
    """Run a script of this toolkit and return its standard output; its own words go to standard error."""
    child = subprocess.run([sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    return child.stdout if child.returncode == 0 else fail(f"{script.name} ended with code {child.returncode}; its message is above")


def evaluate(args, folder):
    """Return {method: figures with latency, refusal and figures by type}; `folder` takes the temporary base and the noisy queries."""
    queries, rng = read_queries(args.queries), random.Random(args.seed)
    uri = args.uri or str(folder / "kb" / "errors.db")
    if not args.uri:
        options = ["--embed-model", args.embed_model] if args.embed_model else []
        options += ["--terms", args.terms] if args.terms else []
        run(args.scripts / "load_milvus.py", "--input", *args.records, *args.distractors, "--output", folder / "kb", *options)
    noisy = [query | {"text": surround(query["text"], args.noise, rng)} for query in queries.values()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in noisy), encoding="utf-8")
    search = ["--uri", uri, "--collection", args.collection, "--input", folder / "queries.jsonl", "--top-k", 20, "--rank", *METHODS]
    ranked = [json.loads(line) for line in run(args.scripts / "answer_errors.py", *search).splitlines()]
    report = {}
    for method in METHODS:
        found = {row["qid"]: [names for _, names, _ in row[method]["found"]] for row in ranked}
        by_type, known, unknown = defaultdict(dict), [], []
        for row in ranked:
            qid, records = row["qid"], row[method]["found"]
            by_type[queries[qid].get("type", "")][qid] = found[qid]
            others = [sure for _, names, sure in records if queries[qid]["group"] not in names]
            known.append(records[0][2] if records else 0.0)
            unknown.append(row[method].get("without", others[0] if others else 0.0))
        report[method] = figures(found, queries) | {
            "refusal": refusal(known, unknown, args.threshold if method == "lines" else None),
            "certainty": {"known": known, "unknown": unknown},
            "search_ms": percentiles([row[method]["search_ms"] for row in ranked]),
            "embed_ms": percentiles([row[method]["embed_ms"] for row in ranked]),
            "by_type": {name: figures(part, queries) for name, part in sorted(by_type.items())},
        }
    return report


def table(report):
    times = ("search p50 / p99 ms", "embed p50 / p99 ms")
    rows = [("method", "queries", "recall@1", "recall@5", "MRR", "refusal AUC", "answered / refused", *times)]
    for method, of in report.items():
        times = (f"{of[name]['p50']:.1f} / {of[name]['p99']:.1f}" for name in ("search_ms", "embed_ms"))
        refused = "{answered:.3f} / {refused:.3f}".format(**of["refusal"]) if "answered" in of["refusal"] else ""
        shares = (f"{of[name]:.3f}" for name in ("recall_at_1", "recall_at_5", "mrr"))
        rows.append((method, of["queries"], *shares, f"{of['refusal']['auc']:.3f}", refused, *times))
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def plot(report, threshold, path):
    """Draw recall@1 by type of query for each method, and the certainty of known and of unknown errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    types = list(report["lines"]["by_type"])
    for at, (method, of) in enumerate(report.items()):
        shares = [of["by_type"][name]["recall_at_1"] for name in types] + [of["recall_at_1"]]
        bars = left.bar([n + 0.27 * (at - 1) for n in range(len(shares))], shares, 0.25, label=method)
        left.bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=7)
    counts = [report["lines"]["by_type"][name]["queries"] for name in types] + [report["lines"]["queries"]]
    left.set_xticks(range(len(counts)), [f"{name or 'query'}\n{count}" for name, count in zip([*types, "all"], counts, strict=True)])
    left.set(ylabel="recall@1", ylim=(0, 1.12))
    left.legend(loc="lower right")
    for name, values in report["lines"]["certainty"].items():
        right.hist(values, bins=20, range=(0, 1), alpha=0.6, label=f"{name} errors")
    right.axvline(threshold, color="black", linestyle=":", label=f"threshold {threshold}")
    right.set(xlabel="certainty of the best record", ylabel="queries", title=f"refusal AUC {report['lines']['refusal']['auc']:.3f}")
    right.legend()
    figure.savefig(path, dpi=120)


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
    add("--terms", metavar="FILE.tsv", help="Chinese terms for the temporary base")
    add("--threshold", type=float, default=0.5, help="certainty below which answer_errors.py refuses (default: 0.5, as there)")
    add("--plot", metavar="FILE.png", help="draw recall@1 by type and the certainties")
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
    if args.plot:
        plot(report, args.threshold, args.plot)
    print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else table(report))


if __name__ == "__main__":
    main()
