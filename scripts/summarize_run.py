#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Print what the stages of a recipe did: seconds, peak memory, each stage's own figure, and where its output lies.

Usage:
    python scripts/summarize_run.py --input data/out/demo
    make table RECIPE=demo

Reads   INPUT/*/manifest.json.
Writes  the table to standard output.
Exit    0 printed; 1 no finished stage; 2 bad usage.
Needs   the standard library.
"""

import argparse
import json
import sys
import unicodedata
from pathlib import Path


def width(text):
    """Return the columns that `text` takes in a terminal: two for a wide character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def table(rows):
    """Return `rows` (lists of strings; the first is the head) as lines in columns."""
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (size - width(cell)) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("─" * size for size in widths), *lines[1:]]


def rows_of(folder, stages):
    """Return one row for each finished stage below `folder`: those of `stages` in that order, then the others by name."""
    manifests = {path.parent.name: path for path in folder.glob("*/manifest.json") if ".old-" not in path.parent.name}
    rows = []
    for name in [*(s for s in stages if s in manifests), *sorted(manifests.keys() - set(stages))]:
        try:
            run = json.loads(manifests[name].read_text(encoding="utf-8"))
            row = [name, f"{run['seconds']:.0f}", f"{run['peak_rss_bytes'] / 1e6:.0f}", str(run["summary"]), str(manifests[name].parent)]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"summarize_run: {manifests[name]}: not a manifest ({error!r}); delete it and run `make {name}` again"
            ) from None
        rows.append(row)
    return rows


def build_parser():
    parser = argparse.ArgumentParser(
        prog="summarize_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of a recipe's outputs, e.g. data/out/demo")
    parser.add_argument("--stages", nargs="*", default=[], metavar="STAGE", help="the order of the rows")
    return parser


def main():
    args = build_parser().parse_args()
    rows = rows_of(Path(args.input), args.stages)
    if not rows:
        raise SystemExit(f"summarize_run: {args.input} holds no finished stage; run one, for example `make clean-text`")
    print("\n".join(table([["stage", "seconds", "peak MB", "figure", "output"], *rows])))


if __name__ == "__main__":
    sys.exit(main())
