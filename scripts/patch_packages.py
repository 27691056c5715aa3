#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Mend installed packages by the patches of a folder, prove it, and undo it: by hash, all or nothing.

Usage:
    python scripts/patch_packages.py status
    python scripts/patch_packages.py check --python ~/old-env/bin/python
    python scripts/patch_packages.py apply --python ~/old-env/bin/python vllm mmh3
    python scripts/patch_packages.py verify
    python scripts/patch_packages.py revert
    python scripts/patch_packages.py scan gym --write patches       # runs scan_packages.py, which lies beside this file

Reads   PATCHES/series: one `PACKAGE/NNNN-slug.patch` a line, in order of application. A patch is a unified diff, paths
        relative to site-packages, below a DEP-3 header with these fields of its own:
          X-Package   distribution that is patched
          X-Versions  its versions, as in requirements: >=0.6,<0.7
          X-Env       any; or conditions joined by `;`: cpu, cuda (torch's build), torch>=2.6, python>=3.10
          X-Kind      installed (without it): the diff is of installed files
                      sdist: it is of the source distribution, which is fetched, patched, built and put in place
                      cache, pin: no diff; a stale cache is cleared, or another release must be installed
          X-Sha256    one line a file: PATH BEFORE AFTER; BEFORE is `-` for a file that the patch creates. Further lines
                      of a PATH are for releases whose file differs: there a hunk goes where its text stands, if only once
          X-Probe     Python source that fails without the patch and passes with it; ` .` is an empty line
          X-Raises    how it fails: ExceptionName: regular expression
          X-Sdist     archive and its SHA-256: NAME-VERSION.tar.gz HASH
          X-Cache     whose cache: triton
          X-Pin       requirement to install in its place
Writes  The packages' files (new ones, put in place: what is hard-linked to an installer's cache stays as it was), their
        RECORD and bytecode; PREFIX/applied-patches.json, and PREFIX/.patches/ with the originals and built wheels. The next
        run undoes what an interrupted one began. On stdout a line for each patch and its state:
          applicable, applied            the files are as the patch expects them, before or after
          pin                            no patch can help: the line names the release that does
          not-installed, not-affected    nothing to mend here
          upstream-fixed                 the installed release holds the change already
          conflict, foreign-modified     the release, or somebody's edit, differs from what the patch was made for
Exit    0 done, or nothing to do; 1 a patch or the environment cannot be read, a build failed, check found something to mend,
        or verify a patch that is not as it was left; 2 usage; 3 refused and nothing changed, or a pin that remains.
Needs   The standard library alone, since it runs while an environment is being built; in the environment packaging, pip or
        ensurepip. For kind sdist the package registry, a compiler and Python's headers.
"""

import argparse
import ast
import base64
import contextlib
import csv
import fcntl
import getpass
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

REQUIRED = {"Description", "Origin", "Forwarded", "X-Package", "X-Versions", "X-Env"}
OPTIONAL = {"Bug", "Applied-Upstream", "X-Verified-By", "X-Kind"}
KINDS = {  # X-Kind: the fields that it must have
    "installed": {"X-Sha256"},
    "sdist": {"X-Sha256", "X-Sdist", "X-Probe", "X-Raises"},
    "cache": {"X-Cache"},
    "pin": {"X-Pin", "X-Probe", "X-Raises"},
}
FIELDS = REQUIRED | OPTIONAL | set().union(*KINDS.values())
CACHES = {  # X-Cache: (variable that names a folder, folder without it, compiled extensions below it)
    "triton": (
        ("TRITON_CACHE_DIR", "~/.triton/cache", "*/*.so"),
        ("TRITON_HOME", "~", ".triton/cache/*/*.so"),
        ("TORCHINDUCTOR_CACHE_DIR", "$TMPDIR/torchinductor_$USER", "triton/*/*/*.so"),
        ("VLLM_CACHE_ROOT", "~/.cache/vllm", "torch_compile_cache/**/triton_cache/*/*.so"),
    ),
}
NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/(\d{4}-[a-z0-9][a-z0-9.-]*)\.patch", re.ASCII)
TARGET = re.compile(r"(?!.*(?:^|/)\.)[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
HUNK = re.compile(rb"@@ -(\d{1,7})(?:,(\d{1,7}))? \+(\d{1,7})(?:,(\d{1,7}))? @@(?: .*)?\n?")
SDIST = re.compile(r"([A-Za-z0-9][\w.]*(?:-[A-Za-z][\w.]*)*-\d[\w.+!]*)\.tar\.gz ([0-9a-f]{64})", re.ASCII)
LARGEST = 1 << 20  # bytes of a patch file
PATIENCE = 600  # seconds that a probe may take
PROBE = r"""
import importlib.metadata as metadata, importlib.util, json, os, platform, re, site, sys, sysconfig
if not importlib.util.find_spec("packaging") and not importlib.util.find_spec("pip"):
    import ensurepip, glob
    sys.path += glob.glob(os.path.join(os.path.dirname(ensurepip.__file__), "_bundled", "pip-*.whl"))
try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet

def version(name):
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

def met(condition):
    if condition in ("any", "cpu", "cuda"):
        text = metadata.distribution("torch").read_text("../torch/version.py") if version("torch") else ""
        return condition in ("any", "cuda" if re.search(r"^cuda\b.*= *['\"]", text or "", re.M) else "cpu")
    wanted = Requirement(condition)
    return version(wanted.name) is not None and wanted.specifier.contains(version(wanted.name), prereleases=True)

answers = []
for package, versions, conditions in json.load(sys.stdin):
    try:
        wanted, unmet = SpecifierSet(versions), [c for c in map(str.strip, conditions.split(";")) if not met(c)]
    except ValueError as error:
        answers.append({"error": str(error).splitlines()[0]})
        continue
    if version(package) is None:
        answers.append({"version": None})
        continue
    dist = metadata.distribution(package)
    answers.append({
        "version": dist.version,
        "affected": wanted.contains(dist.version, prereleases=True) and not unmet,
        "reason": f"needs {unmet[0]}" if unmet else f"{dist.version} is not in {versions}",
        "root": str(dist.locate_file("")),
        "user": os.path.realpath(str(dist.locate_file(""))) == os.path.realpath(site.getusersitepackages()),
        "record": [str(f.locate()) for f in dist.files or () if f.match("*.dist-info/RECORD")],
        "editable": json.loads(dist.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable", False),
    })
print(json.dumps({"prefix": sys.prefix, "abi": sysconfig.get_config_var("EXT_SUFFIX"), "answers": answers}))
"""


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


class RefusedError(Exception):
    """The request would damage an environment; nothing was changed (exit code 3)."""


@dataclass
class Change:
    """A patch's effect on one file: {SHA-256 before: after} ("-": no file), and hunks (first line, old lines, new lines)."""

    hashes: dict
    hunks: list

    @property
    def creates(self):
        return "-" in self.hashes


@dataclass
class Patch:
    """A patch file: its name PACKAGE/NNNN-slug, SHA-256, header fields, and a Change for each path below site-packages."""

    name: str
    sha256: str
    fields: dict
    changes: dict

    @property
    def package(self):
        return normal(self.fields["X-Package"])

    @property
    def kind(self):
        return self.fields.get("X-Kind", "installed")


def normal(name):
    """Return a distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def digest(data):
    """Return the SHA-256 of bytes, or "-" for None, a file that does not exist."""
    return "-" if data is None else hashlib.sha256(data).hexdigest()


def lines_of(data):
    """Return the lines of bytes, each with its LF; unlike splitlines() it breaks at nothing else."""
    return re.findall(rb"[^\n]*\n|[^\n]+$", data)


def parse_fields(text):
    """Return the fields of a DEP-3 header; a line that begins with a space continues the field above. ValueError on anything else."""
    fields, name = {}, None
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"([A-Z][\w-]*): ?(.*)", line, re.ASCII)
        if match and match[1] in FIELDS and match[1] not in fields:
            name = match[1]
            fields[name] = match[2].strip()
        elif line[:1] == " " and name:
            fields[name] += "\n" + ("" if line == " ." else line[1:].rstrip())
        else:
            raise ValueError(f"line {number}: neither a new field of the header nor the diff's first line (--- a/PATH)")
    kind = fields.get("X-Kind", "installed")
    if kind not in KINDS:
        raise ValueError(f"X-Kind {kind!r} is none of {', '.join(KINDS)}")
    for name in sorted(REQUIRED | KINDS[kind]):
        if not fields.get(name):
            raise ValueError(f"the header lacks {name}")
    if alien := fields.keys() - REQUIRED - OPTIONAL - KINDS[kind] - ({"X-Probe", "X-Raises"} if kind == "installed" else set()):
        raise ValueError(f"a patch of kind {kind} has no {min(alien)}")
    if ("X-Probe" in fields) != ("X-Raises" in fields):
        raise ValueError("X-Probe and X-Raises come together")
    if "X-Probe" in fields:
        if not re.fullmatch(r"[A-Za-z_][\w.]*: \S.*", fields["X-Raises"]):
            raise ValueError("X-Raises is not `ExceptionName: regular expression`, on one line")
        try:
            with warnings.catch_warnings(action="ignore"):
                re.compile(fields["X-Raises"].partition(": ")[2])
                ast.parse(fields["X-Probe"])
        except (re.error, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(f"X-Probe or X-Raises: {''.join(str(error).splitlines()[:1])}") from None
    if kind == "sdist" and not SDIST.fullmatch(fields["X-Sdist"]):
        raise ValueError("X-Sdist is not `NAME-VERSION.tar.gz SHA256`")
    if kind == "cache" and fields["X-Cache"] not in CACHES:
        raise ValueError(f"X-Cache is none of {', '.join(CACHES)}")
    if kind == "pin" and "\n" in fields["X-Pin"]:
        raise ValueError("X-Pin is more than one line")
    return fields


def parse_diff(data, number):
    """Return {path: hunks} of a unified diff that begins at line `number`; ValueError unless every line of it has its meaning."""
    lines, found, at = [*lines_of(data), b"", b""], {}, 0
    while lines[at]:
        path = lines[at + 1][6:-1].decode("utf-8", "replace")
        if not lines[at + 1].startswith(b"+++ b/") or lines[at] not in (b"--- /dev/null\n", b"--- a/" + lines[at + 1][6:]):
            raise ValueError(f"line {number + at}: no `--- a/PATH`, or /dev/null, with `+++ b/PATH` below it")
        if path in found or not TARGET.fullmatch(path) or ".dist-info/" in path:
            raise ValueError(f"line {number + at + 1}: {path!r} is not a plain relative path of a package's file, or occurs twice")
        found[path], at = [], at + 2
        while match := HUNK.fullmatch(lines[at]):
            old_count, new_count, before, after = int(match[2] or 1), int(match[4] or 1), [], []
            at += 1
            while len(before) < old_count or len(after) < new_count or lines[at][:1] == b"\\":
                sign, text = lines[at][:1], lines[at][1:]
                if lines[at] == b"\\ No newline at end of file\n" and (before or after):
                    for side in {b" ": (before, after), b"-": (before,), b"+": (after,)}.get(lines[at - 1][:1], ()):
                        side[-1] = side[-1].removesuffix(b"\n")
                elif sign in (b" ", b"-", b"+") and text.endswith(b"\n"):
                    before += [text] if sign != b"+" else []
                    after += [text] if sign != b"-" else []
                else:
                    raise ValueError(f"line {number + at}: the hunk is cut short or damaged")
                at += 1
            if (len(before), len(after)) != (old_count, new_count):
                raise ValueError(f"line {number + at}: the hunk is not as long as its head says")
            found[path].append((int(match[1]), before, after))
        if not found[path]:
            raise ValueError(f"line {number + at}: no hunk for {path}")
    return found


def parse_patch(name, data):
    """Return the Patch that a file's bytes hold; ValueError says in a clause what is wrong with it."""
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes")
    if b"\r" in data or b"\0" in data:
        raise ValueError("carriage returns or NUL bytes in it; a patch has plain LF line ends")
    head, mark, diff = data.partition(b"\n--- ")
    fields, hunks, hashes = parse_fields(head.decode("utf-8").removesuffix("\n")), {}, {}
    if mark or "X-Sha256" in fields:
        if not mark or "X-Sha256" not in fields:
            raise ValueError("no diff in it" if not mark else f"a patch of kind {fields['X-Kind']} has no diff")
        hunks = parse_diff(b"--- " + diff, head.count(b"\n") + 2)
    for line in filter(None, fields.get("X-Sha256", "").split("\n")):
        match = re.fullmatch(r"(\S+) (-|[0-9a-f]{64}) ([0-9a-f]{64})", line)
        if not match or match[2] == match[3] or match[2] in hashes.get(match[1], ()):
            raise ValueError(f"X-Sha256 has a line that is not `PATH BEFORE AFTER`: {line!r}")
        hashes.setdefault(match[1], {})[match[2]] = match[3]
    if both := [path for path, known in hashes.items() if "-" in known and len(known) > 1]:
        raise ValueError(f"X-Sha256 has {both[0]} both as a new file and as one that is there")
    if hashes.keys() != hunks.keys():
        raise ValueError(f"X-Sha256 and the diff name different files: {', '.join(sorted(hashes.keys() ^ hunks.keys()))}")
    patch = Patch(name, digest(data), fields, {path: Change(hashes[path], hunks[path]) for path in hunks})
    if patch.package != normal(name.partition("/")[0]):
        raise ValueError(f"X-Package {fields['X-Package']!r} is not the folder's name")
    return patch


def apply_hunks(data, hunks):
    """Return `data` with the hunks applied at exactly their lines, no offset and no fuzz; None where the text differs."""
    lines, out, at = lines_of(data), [], 0
    for start, before, after in hunks:
        begin = start - 1 if before else start
        if begin < at or lines[begin : begin + len(before)] != before:
            return None
        out += lines[at:begin] + after
        at = begin + len(before)
    return b"".join(out + lines[at:])


def moved(data, hunks):
    """Return the hunks, each at the only place where its old lines stand in `data`; none where there is no such place, or a second."""
    lines, found = lines_of(data), []
    for _, before, after in hunks:
        places = [at for at in range(len(lines)) if before and lines[at : at + len(before)] == before]
        found += [(at + 1, before, after) for at in places if len(places) == 1]
    return found if len(found) == len(hunks) else []


def changed(data, change):
    """Return a file's bytes (None: no file) as the change leaves them; None unless they come out as its hashes say. The hunks' lines
    are those of the release that the first hash is of."""
    before, text = digest(data), data or b""
    for hunks in [change.hunks] if before == next(iter(change.hashes)) else [change.hunks, moved(text, change.hunks)]:
        new = apply_hunks(text, hunks)
        if digest(new) == change.hashes.get(before):
            return new
    return None


def read_patches(folder):
    """Return the patches of folder/series, in its order; SystemExit names the file that cannot be taken."""
    at, patches = folder / "series", []
    try:
        names = [line.strip() for line in at.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
        stray = {p.relative_to(folder).as_posix() for p in folder.rglob("*.patch")} ^ set(names)
        if stray or len(names) != len(set(names)):
            raise ValueError(f"{min(stray, default='a patch')} is not exactly once in both the series and the folder")
        for name in names:
            at = folder / name
            if not NAME.fullmatch(name) or at.is_symlink() or not at.is_file():
                raise ValueError("not a regular file named PACKAGE/NNNN-slug.patch")
            patches.append(parse_patch(name.removesuffix(".patch"), at.read_bytes()))
            others = [patch for patch in patches if patch.package == patches[-1].package and patch.changes]
            if len(others) > 1 and "sdist" in [patch.kind for patch in others]:
                raise ValueError("a package that is built anew has one patch with a diff; put them into one")
    except (OSError, ValueError) as error:
        raise SystemExit(f"patch_packages: {at}: {getattr(error, 'strerror', None) or error}; mend it, or name another --patches") from None
    return patches


def read(path):
    """Return a file's bytes, or None when there is no such file."""
    return path.read_bytes() if path.exists() else None


def record_rows(path):
    """Return a distribution's RECORD as a list of (path below site-packages, line)."""
    lines = [line.decode("utf-8") for line in lines_of(path.read_bytes())]
    return [(next(csv.reader([line]), [""])[0], line) for line in lines]


def edit_record(path, lines):
    """Return RECORD's bytes with other lines for some paths; None leaves a path out, and a path that is new comes first."""
    rows = record_rows(path)
    added = [line for name, line in lines.items() if line and name not in dict(rows)]
    return "".join(added + [lines.get(name, line) or "" for name, line in rows]).encode()


def record_hash(sha256):
    """Return a hexadecimal SHA-256 as RECORD spells it: URL-safe base64 without padding."""
    return "sha256=" + base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode().rstrip("=")


def check_writable(folders):
    """Raise RefusedError, with the alternatives, unless all folders can be written."""
    for folder in folders:
        if not os.access(folder, os.W_OK):
            ways = "run this as its owner, make it writable, or patch an environment of your own"
            raise RefusedError(f"{folder} is read-only for this user; {ways}")


class Environment:
    """A Python environment: what the patches' packages are in it, and what was applied to it before."""

    def __init__(self, python, patches):
        """Ask the environment's own interpreter; SystemExit when it does not answer."""
        questions = [(patch.package, patch.fields["X-Versions"], patch.fields["X-Env"]) for patch in patches]
        self.python, self.probed = Path(shutil.which(python) or python).absolute(), {}
        asked = None
        try:
            asked = self.run(PROBE, json.dumps(questions))
            answer = json.loads(asked.stdout.splitlines()[-1])
            self.prefix, self.abi, answers = Path(answer["prefix"]), answer["abi"], answer["answers"]
        except (OSError, ValueError, TypeError, LookupError, subprocess.TimeoutExpired) as error:
            why = getattr(error, "strerror", None) or (asked.stderr.strip().splitlines() if asked else ["no answer"])[-1:]
            ways = "--python must be Python 3.8 or newer that has packaging, pip or ensurepip"
            raise SystemExit(f"patch_packages: {python}: {''.join(why) or 'no answer'}; {ways}") from None
        self.store, self.journal, self.state = (self.prefix / p for p in (".patches", ".patches/journal.json", "applied-patches.json"))
        self.about = dict(zip((patch.name for patch in patches), answers, strict=True))
        for name, about in self.about.items():
            if "error" in about:
                raise SystemExit(f"patch_packages: {name}.patch: X-Versions or X-Env: {about['error']}")

    def run(self, code, text=None):
        """Run code in the environment, in an empty folder and without PYTHON… settings; return CompletedProcess. TimeoutExpired
        after PATIENCE, with no process left."""
        with tempfile.TemporaryDirectory(prefix="probe-") as empty:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            child = subprocess.Popen(
                [self.python, "-B", "-E", "-c", code], **pipes, cwd=empty, start_new_session=True, encoding="utf-8", errors="replace"
            )
            try:
                out, err = child.communicate(text, PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def failure(self, patch):
        """Return (how the patch's probe fails, in a line: "" when it passes or there is none; whether that is as X-Raises says)."""
        if "X-Probe" not in patch.fields:
            return "", False
        try:
            done = self.run(patch.fields["X-Probe"])
        except subprocess.TimeoutExpired:
            return f"no end within {PATIENCE} s", False
        lines = [line for line in done.stderr.rpartition("Traceback (most recent call last):")[2].splitlines() if line[:1].strip()]
        line = next(iter(lines), f"ended with {done.returncode} and no word")
        name, _, expected = patch.fields["X-Raises"].partition(": ")
        raised, _, text = line.partition(": ")
        return (line, raised == name and bool(re.search(expected, text))) if done.returncode else ("", False)

    def examine(self, patch, state):
        """Run the probe of a patch that waits, and note what it tells: survey() shows that from then on."""
        if "X-Probe" not in patch.fields:
            return
        line, expected = self.failure(patch)
        if not line:
            state, line = "not-affected", "its probe passes without it"
        elif not expected:
            state = "pin" if state == "pin" else "conflict"
            line = f"its probe ends otherwise than by {patch.fields['X-Raises']!r}: {line}"
        self.probed[patch.name] = (state, f"{line}; {pinned(patch)}" if state == "pin" else line)

    @property
    def applied(self):
        """Return what was applied, oldest first: {patch name: {package, sha256, root, record, files: {path: {before, after, line}}}}."""
        try:
            return json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else {}
        except ValueError:
            raise SystemExit(f"patch_packages: {self.state}: not JSON; delete it and reinstall the patched packages") from None

    @contextlib.contextmanager
    def lock(self):
        """Hold the environment's lock: one run at a time. What a run that died left half done is undone first, and what an
        installer has replaced since is forgotten."""
        check_writable([self.prefix])
        self.store.mkdir(exist_ok=True)
        with open(self.store / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.recover()
            shutil.rmtree(self.store / "build", ignore_errors=True)
            for package in {entry["package"] for entry in self.applied.values()}:
                with contextlib.suppress(RefusedError):
                    if not self.standing(package):
                        self.end({name: entry for name, entry in self.applied.items() if entry["package"] != package})
            yield

    def standing(self, package):
        """Return a package's applied patches, newest first: {name: entry}; {} when an installer has replaced its files since.
        RefusedError when somebody has changed them: there is nothing sound to go back to."""
        entries = {name: entry for name, entry in reversed(self.applied.items()) if entry["package"] == package}
        seen = set()
        for entry in entries.values():
            root, record = self.prefix / entry["root"], self.prefix / entry["record"]
            recorded = dict(record_rows(record)) if record.exists() else {}
            for path, file in entry["files"].items():
                if path not in seen and record_hash(file["after"]) not in recorded.get(path, ""):
                    return {}
                if path not in seen and digest(read(root / path)) != file["after"]:
                    raise RefusedError(f"{root / path} was changed after it was patched; reinstall {package}")
                if file["before"] != "-" and digest(read(self.store / file["before"])) != file["before"]:
                    raise RefusedError(f"{self.store / file['before']}, the original of {path}, is lost or damaged; reinstall {package}")
                seen.add(path)
        return entries

    def do(self, patch, contents):
        """Apply a patch, all of it or nothing: write {path: bytes}, and keep the originals."""
        root, record = Path(self.about[patch.name]["root"]), Path(self.about[patch.name]["record"][0])
        recorded, lines, files = dict(record_rows(record)), {}, {}
        for path, data in contents.items():
            original, line = read(root / path), recorded.get(path)
            files[path] = {"before": digest(original), "after": digest(data), "line": line}
            lines[path] = f"{path},{record_hash(digest(data))},{len(data)}" + ("\r\n" if (line or "").endswith("\r\n") else "\n")
            if original is not None:
                with write_atomic(self.store / digest(original)) as file:
                    file.write(original)
        entry = {"package": patch.package, "sha256": patch.sha256, "files": files}
        entry |= {"root": os.path.relpath(root, self.prefix), "record": os.path.relpath(record, self.prefix)}
        try:
            self.begin(patch.name, entry)
            self.write(entry, contents, lines)
            if line := self.failure(patch)[0]:
                raise RefusedError(f"{patch.name}: its probe still fails, so all was put back: {line}")
            self.end(self.applied | {patch.name: entry})
        except BaseException:
            with contextlib.suppress(OSError):
                self.recover()
            raise

    def undo(self, name, entry):
        """Put back the originals of a patch that was applied, wholly or in part; as often as begun, it ends the same."""
        root, files = self.prefix / entry["root"], entry["files"]
        # else an installer has been at work since, and the files are no longer this patch's
        if all(digest(read(root / path)) in (file["before"], file["after"]) for path, file in files.items()):
            originals = {path: None if file["before"] == "-" else read(self.store / file["before"]) for path, file in files.items()}
            self.begin(name, entry)
            self.write(entry, originals, {path: file["line"] for path, file in files.items()})
        self.end({key: value for key, value in self.applied.items() if key != name})

    def build(self, patch):
        """Return {path: bytes} of what a source distribution's wheel holds, built with the patch by this Python, or kept from then."""
        archive, sha256 = SDIST.fullmatch(patch.fields["X-Sdist"]).groups()
        about = self.about[patch.name]
        check_writable([Path(about["root"]), Path(about["record"][0]).parent])
        kept = self.store / "wheels" / digest(f"{patch.sha256}{self.abi}".encode())[:16]
        work, log = self.store / "build", self.store / "build.log"

        def run(*command):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
            with open(log, "ab") as file:
                streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                code = subprocess.run([*map(str, command)], **streams, cwd=work, env=environment).returncode
            if code:
                why = re.search(r"(?i)\w*error: (?!subprocess-exited).*", log.read_text("utf-8", "replace"))
                what = f"{patch.name}: {' '.join(map(str, command[2:4]))} ended with {code}"
                raise SystemExit(f"patch_packages: {what}: {why[0] if why else 'no word'}; {log} has the whole of it")

        if not kept.exists():
            print(f"patch_packages: building {archive} from source; this can take minutes", file=sys.stderr, flush=True)
            log.unlink(missing_ok=True)
            work.mkdir()
            pip = work / "venv" / "bin" / "python", "-m", "pip"
            run(self.python, "-m", "venv", "venv")
            name, _, version = archive.rpartition("-")
            (work / "hash.txt").write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
            run(*pip, "download", "--no-deps", "--no-binary", name, "--require-hashes", "-r", "hash.txt", "-d", "archive")
            try:
                with tarfile.open(work / "archive" / f"{archive}.tar.gz") as tar:
                    tar.extractall(work, filter="data")
                for path, change in patch.changes.items():
                    new = changed(read(work / archive / path), change)
                    if new is None:
                        raise SystemExit(f"patch_packages: {patch.name}.patch: X-Sha256 is not what {path} of {archive} is; mend it")
                    (work / archive / path).write_bytes(new)
            except (TypeError, tarfile.TarError) as error:
                raise SystemExit(f"patch_packages: {archive}.tar.gz: {error}; run this script by Python 3.11.4 or newer") from None
            run(*pip, "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", "wheel", work / archive)
            kept.parent.mkdir(exist_ok=True)
            os.replace(work / "wheel", kept)
            shutil.rmtree(work)
        wheel = next(kept.glob("*.whl"))
        try:
            with zipfile.ZipFile(wheel) as file:
                files = {name: file.read(name) for name in file.namelist() if not name.endswith("/") and ".dist-info/" not in name}
        except zipfile.BadZipFile as error:
            raise SystemExit(f"patch_packages: {wheel}: {error}; delete it and run this again") from None
        parts = [normal(part) for part in wheel.name.split("-")[:2]]
        if parts != [patch.package, normal(about["version"])] or any(".data/" in name for name in files):
            raise RefusedError(f"{wheel} is not {patch.package} {about['version']}, or holds more than its modules; install it by hand")
        check_targets(patch.package, about, self.prefix, {name: read(Path(about["root"], name)) is None for name in files})
        return {name: data for name, data in files.items() if data != read(Path(about["root"], name))}

    def recover(self):
        """Undo the step that the journal says was begun, if any."""
        if self.journal.exists():
            self.undo(*json.loads(self.journal.read_text(encoding="utf-8")))

    def begin(self, name, entry):
        """Note in the journal that a step begins: until its end, recover() undoes it."""
        paths = [self.prefix / entry["record"], *(self.prefix / entry["root"] / path for path in entry["files"])]
        check_writable({path.parent for path in paths})
        with write_atomic(self.journal, "w") as file:
            json.dump([name, entry], file)

    def end(self, applied):
        """Note what is applied now, and that the step is over."""
        with write_atomic(self.state, "w") as file:
            json.dump(applied, file, indent=1)
        self.journal.unlink(missing_ok=True)

    def write(self, entry, contents, lines):
        """Give files their contents (None: no file) and their lines in RECORD, and compile them anew."""
        root, record = self.prefix / entry["root"], self.prefix / entry["record"]
        for path, data in contents.items():
            self.put(root / path, data)
        self.put(record, edit_record(record, lines))
        modules = [str(root / path) for path, data in contents.items() if data is not None and path.endswith(".py")]
        if modules:
            subprocess.run([self.python, "-I", "-m", "compileall", "-q", *modules], capture_output=True)

    def put(self, path, data):
        """Write a new file and let it take the old one's place and mode, so that other hard links to the old one keep their
        content. Stale bytecode goes first: Python trusts it when size and time happen to match."""
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            stale.unlink()
        if data is None:
            path.unlink(missing_ok=True)
            return
        fresh = self.store / "incoming"
        with write_atomic(fresh) as file:
            file.write(data)
        fresh.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o644)
        os.replace(fresh, path)


def check_targets(package, about, prefix, targets):
    """Return the package's RECORD; RefusedError unless every target {path: whether it is new} is a regular file that it owns,
    inside the environment."""
    root = os.path.realpath(about["root"])
    if about["editable"]:
        raise RefusedError(f"{package} is installed editable: its files are a source tree; patch that with git")
    if about["user"]:
        raise RefusedError(f"{package} is installed for the user, in {root}; install it in an environment, and name that by --python")
    if len(about["record"]) != 1:
        raise RefusedError(f"{package} has no RECORD: no wheel installer put it there; reinstall it with pip or uv")
    if not root.startswith(os.path.realpath(prefix) + os.sep):
        raise RefusedError(f"{package} lies in {root}, outside {prefix}; name its own environment's interpreter by --python")
    try:
        recorded = dict(record_rows(Path(about["record"][0])))
    except (ValueError, csv.Error) as error:
        raise RefusedError(f"{about['record'][0]}: {error}; reinstall {package}") from None
    folders = {name.rpartition("/")[0] for name in recorded}
    for path, new in targets.items():
        target = Path(root, path)
        linked = os.path.realpath(target) != str(target) or (target.parent / "__pycache__").is_symlink()
        if not TARGET.fullmatch(path) or linked or (target.exists() and not target.is_file()):
            raise RefusedError(f"{path} is a link, behind a link, or no regular file")
        if path.rpartition("/")[0] not in folders if new else path not in recorded:
            raise RefusedError(f"{path} is not {package}'s: its RECORD does not name it")
    return recorded


def judge(patch, files, installed, recorded, later):
    """Return (state, reason) of a patch. `files`: its targets' bytes as the patches before it leave them; `installed`: those on
    the disk; `later`: (path, hashes) of the patches behind it, which may have been applied on top of it."""
    now = {path: digest(data) for path, data in files.items()}
    reached = {(path, after) for path, change in patch.changes.items() for after in change.hashes.values()}
    for path, hashes in later:
        reached |= {(path, after) for before, after in hashes.items() if (path, before) in reached}
    if all(now[path] in change.hashes for path, change in patch.changes.items()):
        return "applicable", ""
    if all((path, now[path]) in reached for path in patch.changes):
        return "applied", ""
    if spoiled := foreign(installed, recorded):
        return "foreign-modified", f"{spoiled} is not as it was installed"
    if all(b"".join(after) in (files[path] or b"") for path, change in patch.changes.items() for _, _, after in change.hunks):
        return "upstream-fixed", "this release holds the change"
    different = next(path for path, change in patch.changes.items() if now[path] not in change.hashes)
    return "conflict", f"{different} is another text than the patch was made for"


def foreign(installed, recorded):
    """Return the first of {path: bytes} that is not what RECORD says of it, or None."""
    rows = ((path, data, recorded.get(path, "").split(",")[-2:]) for path, data in installed.items())
    return next((path for path, data, row in rows if row[0] and (data is None or record_hash(digest(data)) != row[0])), None)


def judge_built(patch, env, recorded):
    """Return (state, reason) of a patch whose package is built from source: applied when it was built and put there by this tool."""
    try:
        if env.standing(patch.package).get(patch.name, {}).get("sha256") == patch.sha256:
            return "applied", ""
    except RefusedError as error:
        return "foreign-modified", str(error)
    root = Path(env.about[patch.name]["root"])
    spoiled = foreign({path: read(root / path) for path in recorded if TARGET.fullmatch(path)}, recorded)
    return ("foreign-modified", f"{spoiled} is not as it was installed") if spoiled else ("applicable", "")


def pinned(patch):
    return f"no patch can help: install {patch.fields['X-Pin']!r}"


def stale_objects(cache):
    """Return the cached extensions that parse `#` formats as Python 3.13 and later do, which Pythons before it refuse.

    There, the headers turn PyArg_ParseTuple into _PyArg_ParseTuple_SizeT where PY_SSIZE_T_CLEAN is defined: the names that an object
    imports tell what its headers were.
    """
    found, places = {}, {"$TMPDIR": tempfile.gettempdir(), "$USER": str(os.getuid()), "~": str(Path.home())}
    with contextlib.suppress(KeyError, OSError):  # no name for this user's number
        places["$USER"] = getpass.getuser()
    for variable, default, pattern in CACHES[cache]:
        root = os.environ.get(variable) or re.sub(r"\$\w+|^~", lambda name: places[name[0]], default)
        for path in Path(root).glob(pattern):
            if path.is_file() and os.path.realpath(path).startswith(os.path.realpath(root) + os.sep):
                data = path.read_bytes()
                plain = b"\0PyArg_ParseTuple\0" in data and b"_PyArg_ParseTuple_SizeT\0" not in data
                if data.startswith(b"\x7fELF") and plain and re.search(rb"[szy]#[\w#|$:*!()&]*\0", data):
                    found[os.path.realpath(path)] = path
    return sorted(found.values())


def survey(patches, env):
    """Return ([(patch, state, reason)], {patch name: {path: new bytes}, or None} to apply, [(name, entry)] to undo before: an older
    series)."""
    rows, contents, undo, files = [], {}, [], {}
    current = {patch.name: patch.sha256 for patch in patches}
    for package in dict.fromkeys(patch.package for patch in patches):
        with contextlib.suppress(RefusedError):  # judge() will say foreign-modified
            entries = env.standing(package)
            undo += entries.items() if any(current.get(name) != entry["sha256"] for name, entry in entries.items()) else []
    for _, entry in undo:
        for path, file in entry["files"].items():
            files[path] = None if file["before"] == "-" else read(env.store / file["before"])
    for number, patch in enumerate(patches, 1):
        about, state, reason = env.about[patch.name], "not-installed", ""
        if about["version"] and not about["affected"]:
            state, reason = "not-affected", about["reason"]
        elif about["version"] and patch.kind == "pin":
            state, reason = "pin", pinned(patch)
        elif about["version"] and patch.kind == "cache":
            stale = stale_objects(patch.fields["X-Cache"])
            state = "applicable" if stale else "not-affected"
            reason = f"stale: {', '.join(map(str, stale))}" if stale else "nothing stale in its caches"
        elif about["version"]:
            targets = patch.changes if patch.kind == "installed" else {}
            try:
                recorded = check_targets(patch.package, about, env.prefix, {path: change.creates for path, change in targets.items()})
                installed = {path: read(Path(about["root"], path)) for path in targets}
                later = [(path, change.hashes) for p in patches[number:] for path, change in p.changes.items()]
                now = {path: files.get(path, data) for path, data in installed.items()}
                state, reason = judge(patch, now, installed, recorded, later) if targets else judge_built(patch, env, recorded)
            except RefusedError as error:
                state, reason = "conflict", str(error)
        if state in ("applicable", "pin"):
            state, reason = env.probed.get(patch.name, (state, reason))
        if state == "applicable":
            contents[patch.name] = None
            if patch.kind == "installed":
                new = {path: changed(now[path], change) for path, change in patch.changes.items()}
                if None in new.values():
                    raise SystemExit(f"patch_packages: {patch.name}.patch: its hunks do not lead to what X-Sha256 says; mend it")
                files |= new
                contents[patch.name] = new
        rows.append((patch, state, reason))
    return rows, contents, undo


def check_states(rows):
    """Raise RefusedError when a patch does not fit what is installed."""
    for patch, state, reason in rows:
        if state in ("conflict", "foreign-modified"):
            raise RefusedError(f"{patch.name}: {state}: {reason}; reinstall {patch.package}, or name the other packages alone")


def apply(patches, env):
    """Bring the packages to the end of the series; RefusedError, and nothing changed, when one patch fits not. Return (3 when a pin
    remains, else 0; rows)."""
    rows, _, undo = survey(patches, env)
    check_states(rows)
    for name, entry in undo:
        env.undo(name, entry)
    done = []
    try:
        for patch, state, _ in rows:
            if state in ("applicable", "pin"):
                env.examine(patch, state)
                rows, contents, _ = survey(patches, env)
                check_states(rows)
                if patch.kind == "cache":
                    for path in stale_objects(patch.fields["X-Cache"]):
                        path.unlink()
                elif patch.name in contents:
                    env.do(patch, contents[patch.name] or env.build(patch))
                    done.append(patch.name)
    except BaseException:
        for name in reversed(done):
            env.undo(name, env.applied[name])
        raise
    rows = survey(patches, env)[0]
    return (3 if "pin" in [state for _, state, _ in rows] else 0), rows


def revert(patches, env):
    """Undo what is applied to the series' packages, newest first; RefusedError, and nothing changed, when one cannot be undone.
    Return (0, rows)."""
    undo = {name: entry for package in {patch.package for patch in patches} for name, entry in env.standing(package).items()}
    for patch, state, _ in survey(patches, env)[0]:
        if state == "applied" and patch.name not in undo:
            raise RefusedError(f"{patch.name} is applied, but its originals were not kept; reinstall {patch.package}")
    for name, entry in undo.items():
        env.undo(name, entry)
    return status(patches, env)


def status(patches, env):
    """Return (0, rows)."""
    return 0, survey(patches, env)[0]


def check(patches, env):
    """Run the probes of the patches that wait: does the bug show here? Return (1 when there is something to mend, rows)."""
    waiting = set()
    for patch, state, _ in survey(patches, env)[0]:
        if state in ("applicable", "pin") and patch.package not in waiting:  # a later patch's probe may need the earlier patch
            env.examine(patch, state)
            waiting.add(patch.package)
    rows = survey(patches, env)[0]
    return int(any(state in ("applicable", "pin", "conflict", "foreign-modified") for _, state, _ in rows)), rows


def verify(patches, env):
    """Look whether what was applied is as it was left, and its probe passes. Return (1 if not, rows)."""
    rows, wrong = [], False
    for patch, state, reason in survey(patches, env)[0]:
        if state == "applied" or patch.name in env.applied:
            try:
                entry = env.standing(patch.package).get(patch.name)
                if not entry or entry["sha256"] != patch.sha256:
                    state, reason = "conflict", "applied no longer, or by another patch file, or not by this tool; apply again"
                elif line := env.failure(patch)[0]:
                    state, reason = "conflict", f"its probe fails: {line}"
            except RefusedError as error:
                state, reason = "foreign-modified", str(error)
            wrong |= state != "applied"
        rows.append((patch, state, reason))
    return int(wrong), rows


COMMANDS = {"status": status, "check": check, "apply": apply, "revert": revert, "verify": verify}


def build_parser():
    parser = argparse.ArgumentParser(
        prog="patch_packages.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    folder = Path(__file__).resolve().parent.parent / "patches"
    where = {"default": folder} if folder.is_dir() else {"required": True}
    words = "show each patch's state; see by probes whether its bug shows here; apply what fits; undo all; prove what is applied"
    parser.add_argument("command", choices=COMMANDS, help=words)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="only these packages' patches (default: all)")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter of the environment (default: this one)")
    parser.add_argument("--patches", **where, metavar="DIR", help="folder with the file `series` (default: ../patches, where that is)")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="states as JSON")
    return parser


def main():
    parser = build_parser()
    if sys.argv[1:2] == ["scan"]:
        scan = Path(__file__).resolve().with_name("scan_packages.py")
        if not scan.exists():
            parser.error(f"scan is the work of {scan.name}, which is not beside this file; copy it there")
        os.execv(sys.executable, [sys.executable, str(scan), *sys.argv[2:]])
    args = parser.parse_intermixed_args()
    try:
        patches = read_patches(Path(args.patches))
        wanted = {normal(name) for name in args.packages} or {patch.package for patch in patches}
        if unknown := wanted - {patch.package for patch in patches}:
            parser.error(f"{args.patches}/series has no patch for {min(unknown)}")
        patches = [patch for patch in patches if patch.package in wanted]
        env = Environment(args.python, patches)
        with env.lock() if args.command in ("apply", "revert") or env.journal.exists() else contextlib.nullcontext():
            code, rows = COMMANDS[args.command](patches, env)
    except RefusedError as error:
        print(f"patch_packages: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        raise SystemExit(f"patch_packages: {error.filename}: {error.strerror}; mend that and run it again") from None
    except KeyboardInterrupt:
        print("patch_packages: interrupted; what it had begun was undone, run it again", file=sys.stderr)
        return 130
    if args.json:
        names = ("name", "package", "version", "kind", "state", "reason")
        states = [(patch.name, patch.package, env.about[patch.name]["version"], patch.kind, state, reason) for patch, state, reason in rows]
        print(json.dumps({"prefix": str(env.prefix), "patches": [dict(zip(names, row, strict=True)) for row in states]}, indent=1))
    else:
        for patch, state, reason in rows:
            print(f"{state:17}{patch.name:40} {reason or patch.fields['Description'].splitlines()[0]}")
    for patch, state, reason in rows if code == 3 else []:
        if state == "pin":
            print(f"patch_packages: {patch.name}: {reason}; all else is done", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
