#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Find in C and C++ sources the calls that Python 3.10 and later punish: `#` formats without PY_SSIZE_T_CLEAN, lengths that are int.

Usage:
    python scripts/scan_c_formats.py pycld2-0.41
    python scripts/scan_c_formats.py src/module.c --json

Reads   PATH…: files, or folders such as an unpacked source distribution. Looked at is every PyArg_Parse…, Py_BuildValue and
        PyObject_Call… whose format holds a `#`:
          macro    PY_SSIZE_T_CLEAN is not defined before Python.h: "SystemError: PY_SSIZE_T_CLEAN macro must be defined for
                   '#' formats". Define it, and make the lengths Py_ssize_t; either alone is not enough
          length   what the `#` takes as its length is no Py_ssize_t: eight bytes are written where there are four
        `certain` is what the source shows; where a type, a macro or an #include cannot be followed, or a platform decides, it is
        `possible`: a false alarm is preferred to silence.
Writes  On stdout a line, or with --json an object, for each finding.
Exit    0 done, whatever was found; 1 a source cannot be read; 2 usage.
Needs   The standard library alone. No compiler: sources are split into tokens; all branches of an #if are read.
"""

import argparse
import itertools
import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

CALLS = {  # a function that takes a format: (its place among the arguments, the place of the first that the format describes)
    "PyArg_Parse": (1, 2),
    "PyArg_ParseTuple": (1, 2),
    "PyArg_ParseTupleAndKeywords": (2, 4),
    "Py_BuildValue": (0, 1),
    "PyObject_CallFunction": (1, 2),
    "PyObject_CallMethod": (2, 3),
    "PyEval_CallFunction": (1, 2),
    "PyEval_CallMethod": (2, 3),
}
TOKEN = re.compile(
    r"""//(?:\\\n|[^\n])*|/\*.*?\*/|\\\n  # comments and spliced lines are no tokens
    |^[ \t]*(?P<directive>\#(?:/\*.*?\*/|\\\n|[^\n])*)
    |(?P<token>R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"|(?:L|u8?|U)?"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'
    |\.?\d(?:'?[\w.])*|[^\W\d]\w*|->|::|&&|\|\||[^\s\w])""",
    re.M | re.S | re.X,
)
BUILD_FILES = {"setup.py", "setup.cfg", "pyproject.toml", "meson.build", "CMakeLists.txt"}
SUFFIXES = {".c", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".hxx"}
WIDE = {"Py_ssize_t", "size_t", "ssize_t", "ptrdiff_t", "intptr_t", "Py_intptr_t", "npy_intp"}
LONG = {"long", "int64_t", "uint64_t", "npy_int64"}
NARROW = {"int", "unsigned", "short", "char", "int32_t", "uint32_t", "int16_t", "uint16_t", "uint8_t", "Py_UCS4"}
NO_TYPE = {"return", "else", "goto", "case", "delete", "new", "throw", "sizeof", "const", "static", "register", "volatile", "struct"}


@dataclass
class Finding:
    """What is reported of one place; `doubt`: why it may be none."""

    file: str
    line: int
    call: str
    note: str
    doubt: str = ""

    @property
    def level(self):
        return "possible" if self.doubt else "certain"


def tokens_of(text):
    """Return [(token, line)] of C or C++ without comments, a directive as "#name" and, but for #include, its tokens, then ";"."""
    found, line, at = [], 1, 0
    for match in TOKEN.finditer(text):
        line, at = line + text.count("\n", at, match.start()), match.start()
        if match["directive"]:
            word, rest = re.match(r"#\s*(\w*)(.*)", match["directive"], re.S).groups()
            words = [rest.strip()] if word == "include" else [token for token, _ in tokens_of(rest)]
            found += [(token, line) for token in (f"#{word}", *words, ";")]
        elif match["token"]:
            found.append((match["token"], line))
    return found


def arguments(tokens, at):
    """Return the arguments of the call whose "(" is tokens[at], as lists of tokens; of an #if in it, the first branch alone is read."""
    found, depth, skip, directive = [[]], 1, False, False
    for token, _ in tokens[at + 1 : at + 2000]:
        if token[0] == "#" and len(token) > 1:
            skip, directive = token in ("#else", "#elif") or (skip and token != "#endif"), True
        elif directive:
            directive = token != ";"
        elif not skip:
            depth += (token in "([{") - (token in ")]}")
            if not depth:
                return found
            if token == "," and depth == 1:
                found.append([])
            else:
                found[-1].append(token)
    return []


def lengths(text, parsing):
    """Return which of the arguments that a format describes are lengths: those of its `#` units."""
    found, count = [], 0
    for unit in re.findall(r"e[st]#?|[A-Za-z][#*!&]?", re.split("[:;]", text)[0] if parsing else text):
        count += len(unit.replace("*", ""))
        found += [count - 1] if unit.endswith("#") else []
    return found


def declared(tokens, at, name, anywhere=False):
    """Return the words of the type with which C code declares a name: the nearest declaration before tokens[at] that its block
    sees, or `anywhere`; None if there is none."""
    depth = 0
    for here in range(at - 1, 0, -1):
        token = tokens[here][0]
        depth += (token == "}") - (token == "{" and depth > 0)
        if token != name or (depth and not anywhere) or tokens[here + 1][0] not in "=;,)[":
            continue
        pieces, nested = [[]], 0
        for back in range(here - 1, -1, -1):
            before = tokens[back][0]
            nested += (before in ")]") - (before in "([")
            if before in ";{}" or nested < 0:
                break
            if before == "," and not nested:
                pieces.append([])
            else:
                pieces[-1].insert(0, before)
        mine = [word for word in pieces[0] if word != "*"]
        if not mine and len(pieces) > 1:  # int a = 1, *b, NAME
            mine = [word for word in pieces[-1] if word != "*"]
            mine = mine[: next((n for n, word in enumerate(mine) if word in "=[("), len(mine)) - 1]
        words = {word for word in mine if word[0].isalpha() or word[0] == "_"} - NO_TYPE
        if words and set(mine) <= words | NO_TYPE | {"::"} and (words & (WIDE | LONG | NARROW) or "*" not in pieces[0]):
            return words
    return None


def judge_length(tokens, at, argument, headers):
    """Return (what is wrong with an argument of the call at tokens[at] that a `#` takes as its length, doubt); ("", "") when it is as
    wide as a Py_ssize_t. `headers`: the tokens of the sources that are included."""
    text = re.sub(r"\( (?:\w+ )+\* \)|\[[^]]*\]", "", " ".join(argument)).strip()
    names, cast = re.findall(r"[^\W\d]\w*", text), re.match(r"\( ((?:\w+ )+)\) ?\S", text)
    member = "->" in argument or "." in argument
    if cast:
        words = set(cast[1].split())
    elif set(names) & {"sizeof", "strlen", *WIDE} or re.search(r"Py\w*(?:size|length)\b|\b(?:size|length) \( \)", text, re.I):
        return "", ""
    elif not names or (len(names) > 1 and not member):
        return f"{text} may be an int", "no variable"
    else:
        places = [(part, len(part) - 1) for part in (tokens, *headers)] if member else [(tokens, at)]
        words = next(filter(None, (declared(part, start, names[-1], member) for part, start in places)), set())
    if words & WIDE:
        return "", ""
    told = f"{text.removeprefix('& ')} is of {'type ' + ' '.join(sorted(words)) if words else 'an unknown type'}"
    if words & LONG:
        return told, "as wide on some platforms"
    return told, "" if words & NARROW and not member else "found by the member's name" if words & NARROW else "it may be as wide"


class Sources:
    """C sources that may include each other."""

    def __init__(self, paths, built):
        """`built`: whether the build's own files name the macro."""
        self.paths, self.tokens, self.firsts, self.built = {}, {}, {}, built
        for path in paths:
            self.paths.setdefault(path.name, []).append(path)

    def read(self, path):
        """Return the tokens of a source."""
        if path not in self.tokens:
            self.tokens[path] = tokens_of(path.read_bytes().decode("latin-1").replace("\r\n", "\n"))
        return self.tokens[path]

    def included(self, path, name):
        """Return the source that `#include "NAME"` stands for, of those whose paths end so the nearest; None when there is none."""
        ending = name.replace("../", "").removeprefix("./")
        found = [other for other in self.paths.get(ending.rpartition("/")[2], ()) if f"/{other}".endswith(f"/{ending}")]
        return max(found, key=lambda other: len(os.path.commonpath([path.absolute(), other.absolute()])), default=None)

    def directives(self, path):
        """Yield, in order, "macro" where PY_SSIZE_T_CLEAN is defined, "Python.h", and the path of each source that is included."""
        for (token, _), (after, _) in itertools.pairwise(self.read(path)):
            name = after.strip('"<> ').partition('"')[0].partition(">")[0]
            if token == "#define" and after == "PY_SSIZE_T_CLEAN":
                yield "macro"
            elif token == "#include" and name.rpartition("/")[2] == "Python.h":
                yield "Python.h"
            elif token == "#include" and (source := self.included(path, name)):
                yield source

    def closure(self, path):
        """Return a source and all that it includes, at any depth."""
        found = [path]
        for source in found:
            found += [what for what in dict.fromkeys(self.directives(source)) if isinstance(what, Path) and what not in found]
        return found

    def first(self, path):
        """Return which comes first, "macro" or "Python.h", with what is included; None when neither is seen."""
        if path not in self.firsts:
            self.firsts[path] = None  # an include that comes back here
            found = (self.first(what) if isinstance(what, Path) else what for what in self.directives(path))
            self.firsts[path] = next(filter(None, found), None)
        return self.firsts[path]

    def judge(self, path):
        """Return the Findings of a source's calls with a `#` format."""
        if not any(name in path.read_bytes().decode("latin-1") for name in CALLS):
            return []
        tokens, first, findings = self.read(path), self.first(path), []
        headers = [self.read(source) for source in self.closure(path)[1:]]
        macros = {part[n + 1][0]: part[n + 2][0] for part in (*headers, tokens) for n in range(len(part) - 2) if part[n][0] == "#define"}
        for at, (function, line) in enumerate(tokens):
            if function not in CALLS or [token for token, _ in tokens[at + 1 : at + 2]] != ["("]:
                continue
            given, (place, start) = arguments(tokens, at + 1), CALLS[function]
            strings = [macros.get(token, token) for token in given[place]] if place < len(given) else []
            text = "".join(token.partition('"')[2][:-1] for token in strings if token.endswith('"'))
            known = not any(token.isidentifier() for token in strings if token not in ("const_cast", "const", "char"))
            counts = lengths(text, function.startswith("PyArg"))
            if counts and first != "macro":
                doubt = "the build may define it" if self.built else "" if first else "how Python.h is included is not seen"
                note = "PY_SSIZE_T_CLEAN is not defined before Python.h; define it, and make all lengths Py_ssize_t"
                findings.append(Finding(str(path), line, f'{function} "{text}"', note, doubt))
            for count in counts:
                wrong, doubt = "which argument is the length is not understood", "see that it is a Py_ssize_t"
                if known and start + count < len(given):
                    wrong, doubt = judge_length(tokens, at, given[start + count], headers)
                if wrong:
                    note = f"{wrong}; `#` takes a Py_ssize_t"
                    findings.append(Finding(str(path), line, f'{function} "{text}"', note, doubt))
        return findings


def find_sources(names):
    """Return the paths of the sources that names, files or folders, stand for, and whether the build's own files define the macro;
    SystemExit names a path that is not there."""
    found, built = [], False
    for name in map(Path, names):
        if not name.exists():
            raise SystemExit(f"scan_c_formats: {name}: no such file or folder; unpack the source distribution and name its folder")
        paths = sorted(path for path in name.rglob("*") if path.is_file()) if name.is_dir() else [name]
        found += [path for path in paths if path.suffix in SUFFIXES or path == name]
        built |= any(b"PY_SSIZE_T_CLEAN" in path.read_bytes() for path in paths if path.name in BUILD_FILES)
    return found, built


def build_parser():
    parser = argparse.ArgumentParser(
        prog="scan_c_formats.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", nargs="+", metavar="PATH", help="C or C++ source, or a folder of them")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="findings as JSON")
    return parser


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    args = build_parser().parse_args()
    try:
        paths, built = find_sources(args.path)
        sources = Sources(paths, built)
        findings = [finding for path in paths for finding in sources.judge(path)]
    except OSError as error:
        raise SystemExit(f"scan_c_formats: {error.filename}: {error.strerror}; mend that and run it again") from None
    if args.json:
        print(json.dumps([asdict(f) | {"level": f.level} for f in findings], indent=1))
    else:
        for f in findings:
            print(f"{f.file}:{f.line}: {f.level}: {f.call}: {f.note}" + (f" ({f.doubt})" if f.doubt else ""))
    sure = sum(not f.doubt for f in findings)
    print(f"{len(paths)} sources: {sure} certain, {len(findings) - sure} possible", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
