#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Keep the log of a command, and when it fails look that log up: in the knowledge base, in our patches, in the README's table of errors.

Usage:
    python scripts/explain_failure.py run --log logs/sft.log -- python train.py     # as the command itself; a failure names `make why`
    python scripts/explain_failure.py why --logs logs --records records.jsonl --patches patches --readme README.md
    make why

Reads   run: nothing. why: the newest *.failed.log below --logs (or --file); the base of load_milvus.py by --ask, a command that answers
        a log as answer_errors.py does with --json; without one --records; patches and the README.
Writes  run: the log, which is called NAME.failed.log after a failure. why: the explanation, on standard output.
Exit    run: as the command, 128 + N when signal N ended it. why: 0, also when nothing has failed or nothing is known; 2 bad usage.
Needs   Linux and Python alone: the environment may be what failed.

The command meets a terminal where there is one, so progress bars are as without a log, and standard output is kept in the log only
where it goes to the same place as standard error. A log of more than 32 MB begins anew. Lines are looked up by their words, rare ones
weighing more, exceptions half as much again.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path

MOST = 32 << 20  # bytes of a log
TAIL = 400_000  # of them are looked up
LINES = 400  # at most
FITS = 0.6  # share of a known error's words, weighed by their rarity, that a line must have
SHOWN = 3
NOISE = re.compile(r"\b(TRACE|DEBUG|INFO)\b")
EXCEPTION = re.compile(r"\b\w*(?:Error|Exception|Failure)\b|\bKilled\b")
WORD = re.compile(r"[a-z]{2,}|\d{2,}|[\u3400-\u9fff]")


def keep_log(command, log):
    """Run a command with its words in the log as well; return its exit code, and the log's name after a failure."""
    log.parent.mkdir(parents=True, exist_ok=True)
    failed = log.with_suffix(".failed.log")
    terminal = os.isatty(2)
    together = (terminal and os.isatty(1)) or os.path.samestat(os.fstat(1), os.fstat(2))
    source, sink = pty.openpty() if terminal else os.pipe()
    if terminal:
        mode = termios.tcgetattr(sink)
        mode[1] &= ~termios.OPOST  # our own terminal turns line feeds into new lines
        termios.tcsetattr(sink, termios.TCSANOW, mode)

        def resize(*_):
            with contextlib.suppress(OSError):
                fcntl.ioctl(sink, termios.TIOCSWINSZ, fcntl.ioctl(2, termios.TIOCGWINSZ, b"\0" * 8))

        signal.signal(signal.SIGWINCH, resize)
        resize()
    child = subprocess.Popen(command, stdout=sink if together else None, stderr=sink)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command by itself, and we report how it ended
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: child.send_signal(number))
    if not terminal:
        os.close(sink)
    with open(log, "wb", buffering=0) as file:
        alive = True
        while alive or select.select([source], [], [], 0)[0]:  # what a daemon that it left behind says later is not waited for
            alive = child.poll() is None
            if select.select([source], [], [], 0.1)[0]:
                try:
                    data = os.read(source, 1 << 16)
                except OSError:  # a terminal without anybody at the other end
                    data = b""
                if not data:
                    break
                if file.tell() > MOST:
                    file.truncate(0)
                    file.seek(0)
                file.write(data)
                with contextlib.suppress(OSError):  # nobody reads us any more: the command goes on
                    write_all(2, data)
    code = child.wait()
    code = code if code >= 0 else 128 - code
    if code:
        os.replace(log, failed)
    else:
        failed.unlink(missing_ok=True)
    return code, failed


def write_all(number, data):
    while data:
        data = data[os.write(number, data) :]


def split(text):
    """Return the set of the words of a text: identifiers in their parts, CamelCase too, each Chinese character one."""
    return set(WORD.findall(re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()))


def read_records(paths):
    """Return the error records of JSONL files."""
    found = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            found += [json.loads(line) for line in file if line.strip()]
    return [{"label": r["id"], **{k: r.get(k) or "" for k in ("error", "cause", "fix", "source")}} for r in found]


def read_patches(folder):
    """Return what our patches mend: for each that names an exception, that as `error`, and the command that applies it."""
    found = []
    for path in sorted(folder.glob("*/*.patch")):
        head = dict(re.findall(r"^([A-Z][\w-]+): (.+)$", path.read_text(encoding="utf-8").partition("\n--- ")[0], re.M))
        if "X-Raises" in head:
            fix = f'make patch ARGS="apply {head["X-Package"]}" (for {head["X-Package"]}{head["X-Versions"]}: {head["Description"]})'
            found.append({"label": "patch", "error": head["X-Raises"], "fix": fix, "source": str(path)})
    return found


def read_readme(path):
    """Return the rows of the README's tables of errors: each text in the first column is one, the second has cause and remedy."""
    found = []
    for row in re.findall(r"^\| (.+?) \| (.+?→.+?) \|", path.read_text(encoding="utf-8").replace("\\|", "¦"), re.M):
        errors = [a or b for a, b in re.findall(r"``(.+?)``|`([^`]+)`", row[0])] or [row[0]]
        found += [{"label": "README", "error": error, "fix": row[1].replace("¦", "|"), "source": path.name} for error in errors]
    return found


def search(lines, known):
    """Return [(fit, line, entry)] of the entries that a line of the log fits, best first: `fit` is the share of the entry's words in it."""
    words = [split(entry["error"]) for entry in known]
    frequency = Counter(word for entry in words for word in entry)
    rarity = {word: math.log(1 + len(known) / count) for word, count in frequency.items()}
    found = []
    for entry, told in zip(known, words, strict=True):
        whole = sum(rarity[word] for word in told) or 1
        best = max(((sum(rarity[word] for word in told & said) * weight / whole, line) for line, said, weight in lines), default=(0, ""))
        if len(told) > 1 and best[0] >= FITS:
            found.append((*best, entry))
    return sorted(found, key=lambda hit: -hit[0])


def read_lines(log):
    """Return [(line, words, weight)] of the end of a log, each line once."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.read().decode(errors="replace"))
    lines = list(dict.fromkeys(line.strip()[:2000] for line in re.split(r"[\r\n]+", text) if line.strip()))[-LINES:]
    return [
        (line, split(line), 1.5 if EXCEPTION.search(line) else 1.0) for line in lines if EXCEPTION.search(line) or not NOISE.search(line)
    ]


def ask_base(command, log):
    """Return what `command` finds for a log, as search() does; None when it gives no answer."""
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        answer = subprocess.run([*command, "--no-llm", "--json", "--file", str(log)], capture_output=True, text=True, timeout=300)
        result = json.loads(answer.stdout)
        records = [{"label": r["id"], **{k: r.get(k) or "" for k in ("error", "cause", "fix", "source")}} for r in result["records"]]
        return [(1.0, result.get("found_by", ""), record) for record in records[:SHOWN]] if result["status"] != "unknown" else []
    return None


def explain(args):
    """Print what is known about the newest failure."""
    logs = [args.file] if args.file else sorted(args.logs.glob("**/*.failed.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return print(f"nothing has failed: there is no log of a failure in {args.logs}", file=sys.stderr)
    log = logs[-1]
    lines = read_lines(log)
    last = next((line for line, _, weight in reversed(lines) if weight > 1), lines[-1][0] if lines else "(it said nothing)")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(log.stat().st_mtime))
    print(f"{log.name.removesuffix('.failed.log')} failed, {when}: {last[:300]}\n  the log: {log}")
    own = read_patches(args.patches) if args.patches else []
    own += read_readme(args.readme) if args.readme else []
    hits = search(lines, own)[:SHOWN]
    answered = ask_base(args.ask, log) if args.ask else None
    hits += search(lines, read_records(args.records))[:SHOWN] if answered is None else answered
    for _, line, entry in hits:
        print(f"\n[{entry['label']}] {' '.join(entry['error'].split())[:300]}\n  found by: {line[:160]}")
        print(*(f"  {name}: {entry[name]}" for name in ("cause", "fix", "source") if entry.get(name)), sep="\n")
    if not hits:
        print(f"\nnothing is known about it; read the end of {log}, and `make doctor` looks at the machine")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="explain_failure.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="run | why")
    run = parts.add_parser("run", help="run a command and keep its log", allow_abbrev=False)
    run.add_argument("--log", type=Path, required=True, metavar="FILE.log")
    run.add_argument("command", nargs="+", metavar="-- COMMAND")
    why = parts.add_parser("why", help="explain the newest failure", allow_abbrev=False)
    why.add_argument("--logs", type=Path, default=Path("logs"), metavar="DIR", help="where run keeps logs (default: logs)")
    why.add_argument("--file", type=Path, metavar="LOG", help="this log, in place of the newest")
    why.add_argument("--records", nargs="*", type=Path, default=[], metavar="FILE.jsonl", help="error records, where no base answers")
    why.add_argument("--patches", type=Path, metavar="DIR")
    why.add_argument("--readme", type=Path, metavar="FILE.md")
    why.add_argument(
        "--ask", nargs=argparse.REMAINDER, metavar="COMMAND", help="last: how the base is asked; --no-llm --json --file are added"
    )
    return parser


def main():
    args = build_parser().parse_args()
    if args.part == "why":
        return explain(args)
    try:
        code, failed = keep_log(args.command, args.log)
    except OSError as error:
        print(f"explain_failure: {error.filename or args.command[0]}: {error.strerror}; look at the command", file=sys.stderr)
        return 127
    if code not in (0, 130):
        print(f"explain_failure: exit {code}, the log is {failed}; for the fix: make why", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
