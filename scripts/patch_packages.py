#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Mend installed packages by the patches of a folder, and undo it: by hash, all or nothing.

Usage:
    python scripts/patch_packages.py status
    python scripts/patch_packages.py apply --python .venv/bin/python
    python scripts/patch_packages.py revert --python .venv/bin/python

Reads   PATCHES/series: one `PACKAGE/NNNN-slug.patch` a line, in order of application. A patch is a unified diff, paths
        relative to site-packages, below a DEP-3 header with these fields of its own:
          X-Package   distribution that is patched
          X-Versions  its versions, as in requirements: >=0.6,<0.7
          X-Env       any; or conditions joined by `;`: cpu, cuda (torch's build), torch>=2.6
          X-Sha256    one line a file: PATH BEFORE AFTER; BEFORE is `-` for a file that the patch creates
Writes  The packages' files (new ones, put in place: what is hard-linked to an installer's cache stays as it was), their
        RECORD and bytecode; PREFIX/applied-patches.json, and PREFIX/.patches/ with the originals. The next run undoes
        what an interrupted one began. On stdout a line for each patch and its state:
          applicable, applied            the files are as the patch expects them, before or after
          not-installed, not-affected    nothing to mend here
          upstream-fixed                 the installed release holds the change already
          conflict, foreign-modified     the release, or somebody's edit, differs from what the patch was made for
Exit    0 done, or nothing to do; 1 a patch or the environment cannot be read; 2 usage; 3 refused, nothing was changed.
Needs   The standard library alone, since it runs while an environment is being built; packaging or pip in that environment.
"""

import argparse
import base64
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FIELDS = {"Description", "Origin", "Bug", "Forwarded", "Applied-Upstream", "X-Package", "X-Versions", "X-Env", "X-Sha256", "X-Verified-By"}
OPTIONAL = {"Bug", "Applied-Upstream", "X-Verified-By"}
NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/(\d{4}-[a-z0-9][a-z0-9.-]*)\.patch", re.ASCII)
TARGET = re.compile(r"(?!.*(?:^|/)\.)[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
HUNK = re.compile(rb"@@ -(\d{1,7})(?:,(\d{1,7}))? \+(\d{1,7})(?:,(\d{1,7}))? @@(?: .*)?\n?")
LARGEST = 1 << 20  # bytes of a patch file
PROBE = r"""
import importlib.metadata as metadata, json, re, sys
try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet

def version(name):
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
        "record": [str(f.locate()) for f in dist.files or () if f.match("*.dist-info/RECORD")],
        "editable": json.loads(dist.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable", False),
    })
print(json.dumps({"prefix": sys.prefix, "answers": answers}))
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
    """A patch's effect on one file: SHA-256 before and after ("-": no file), and hunks (first line, old lines, new lines)."""

    before: str
    after: str
    hunks: list


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
            fields[name] += "\n" + line.strip()
        else:
            raise ValueError(f"line {number}: neither a new field of the header nor the diff's first line (--- a/PATH)")
    for name in sorted(FIELDS - OPTIONAL):
        if not fields.get(name):
            raise ValueError(f"the header lacks {name}")
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
    if not mark:
        raise ValueError("no diff in it")
    fields = parse_fields(head.decode("utf-8"))
    hunks, hashes = parse_diff(b"--- " + diff, head.count(b"\n") + 2), {}
    for line in filter(None, fields["X-Sha256"].split("\n")):
        match = re.fullmatch(r"(\S+) (-|[0-9a-f]{64}) ([0-9a-f]{64})", line)
        if not match or match[1] in hashes or match[2] == match[3]:
            raise ValueError(f"X-Sha256 has a line that is not `PATH BEFORE AFTER`: {line!r}")
        hashes[match[1]] = match.groups()[1:]
    if hashes.keys() != hunks.keys():
        raise ValueError(f"X-Sha256 and the diff name different files: {', '.join(sorted(hashes.keys() ^ hunks.keys()))}")
    patch = Patch(name, digest(data), fields, {path: Change(*hashes[path], hunks[path]) for path in hunks})
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
        try:
            asked = subprocess.run([python, "-I", "-c", PROBE], input=json.dumps(questions), capture_output=True, text=True)
            answer = json.loads(asked.stdout.splitlines()[-1])
            self.python, self.prefix, answers = python, Path(answer["prefix"]), answer["answers"]
        except (OSError, ValueError, TypeError, LookupError) as error:
            why = getattr(error, "strerror", None) or (asked.stderr.strip().splitlines() or ["no answer"])[-1]
            raise SystemExit(f"patch_packages: {python}: {why}; --python must be Python 3.8 or newer that has packaging or pip") from None
        self.store, self.journal, self.state = (self.prefix / p for p in (".patches", ".patches/journal.json", "applied-patches.json"))
        self.about = dict(zip((patch.name for patch in patches), answers, strict=True))
        for name, about in self.about.items():
            if "error" in about:
                raise SystemExit(f"patch_packages: {name}.patch: X-Versions or X-Env: {about['error']}")

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


def check_targets(patch, about, prefix):
    """Return the package's RECORD; RefusedError unless every target is a regular file that it owns, inside the environment."""
    package, root = patch.package, os.path.realpath(about["root"])
    if about["editable"]:
        raise RefusedError(f"{package} is installed editable: its files are a source tree; patch that with git")
    if len(about["record"]) != 1:
        raise RefusedError(f"{package} has no RECORD: no wheel installer put it there; reinstall it with pip or uv")
    if not root.startswith(os.path.realpath(prefix) + os.sep):
        raise RefusedError(f"{package} lies in {root}, outside {prefix}; name its own environment's interpreter by --python")
    try:
        recorded = dict(record_rows(Path(about["record"][0])))
    except (ValueError, csv.Error) as error:
        raise RefusedError(f"{about['record'][0]}: {error}; reinstall {package}") from None
    folders = {name.rpartition("/")[0] for name in recorded}
    for path, change in patch.changes.items():
        target = Path(root, path)
        linked = os.path.realpath(target) != str(target) or (target.parent / "__pycache__").is_symlink()
        if linked or (target.exists() and not target.is_file()):
            raise RefusedError(f"{path} is a link, behind a link, or no regular file")
        if path not in recorded if change.before != "-" else path.rpartition("/")[0] not in folders:
            raise RefusedError(f"{path} is not {package}'s: its RECORD does not name it")
    return recorded


def judge(patch, files, installed, recorded, later):
    """Return (state, reason) of a patch. `files`: its targets' bytes as the patches before it leave them; `installed`: those on
    the disk; `later`: (path, before, after) of the patches behind it, which may have been applied on top of it."""
    now, reached = {path: digest(data) for path, data in files.items()}, {(path, change.after) for path, change in patch.changes.items()}
    for path, before, after in later:
        reached |= {(path, after)} if (path, before) in reached else set()
    if all(now[path] == change.before for path, change in patch.changes.items()):
        return "applicable", ""
    if all((path, now[path]) in reached for path in patch.changes):
        return "applied", ""
    for path, data in installed.items():
        if path in recorded and (data is None or record_hash(digest(data)) not in recorded[path]):
            return "foreign-modified", f"{path} is not as it was installed"
    if all(b"".join(after) in (files[path] or b"") for path, change in patch.changes.items() for _, _, after in change.hunks):
        return "upstream-fixed", "this release holds the change"
    different = next(path for path, change in patch.changes.items() if now[path] != change.before)
    return "conflict", f"{different} is another text than the patch was made for"


def survey(patches, env):
    """Return ([(patch, state, reason)], {patch name: {path: new bytes}} to apply, [(name, entry)] to undo before: an older series)."""
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
        elif about["version"]:
            try:
                recorded = check_targets(patch, about, env.prefix)
                installed = {path: read(Path(about["root"], path)) for path in patch.changes}
                later = [(path, change.before, change.after) for p in patches[number:] for path, change in p.changes.items()]
                state, reason = judge(patch, {p: files.get(p, data) for p, data in installed.items()}, installed, recorded, later)
            except RefusedError as error:
                state, reason = "conflict", str(error)
        if state == "applicable":
            new = {p: apply_hunks(files.get(p, installed[p]) or b"", change.hunks) for p, change in patch.changes.items()}
            if any(digest(data) != patch.changes[path].after for path, data in new.items()):
                raise SystemExit(f"patch_packages: {patch.name}.patch: its hunks do not lead to what X-Sha256 says; mend it")
            files |= new
            contents[patch.name] = new
        rows.append((patch, state, reason))
    return rows, contents, undo


def apply(patches, env):
    """Bring the packages to the end of the series; RefusedError, and nothing changed, when one patch fits not."""
    rows, contents, undo = survey(patches, env)
    for patch, state, reason in rows:
        if state in ("conflict", "foreign-modified"):
            raise RefusedError(f"{patch.name}: {state}: {reason}; reinstall {patch.package}, or take the patch out of the series")
    for name, entry in undo:
        env.undo(name, entry)
    for patch in patches:
        if patch.name in contents:
            env.do(patch, contents[patch.name])


def revert(patches, env):
    """Undo what is applied to the series' packages, newest first; RefusedError, and nothing changed, when one cannot be undone."""
    undo = {name: entry for package in {patch.package for patch in patches} for name, entry in env.standing(package).items()}
    for patch, state, _ in survey(patches, env)[0]:
        if state == "applied" and patch.name not in undo:
            raise RefusedError(f"{patch.name} is applied, but its originals were not kept; reinstall {patch.package}")
    for name, entry in undo.items():
        env.undo(name, entry)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="patch_packages.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    folder = Path(__file__).resolve().parent.parent / "patches"
    where = {"default": folder} if folder.is_dir() else {"required": True}
    parser.add_argument("command", choices=["status", "apply", "revert"], help="show each patch's state; apply what fits; undo all")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter of the environment (default: this one)")
    parser.add_argument("--patches", **where, metavar="DIR", help="folder with the file `series` (default: ../patches, where that is)")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="states as JSON")
    return parser


def main():
    args = build_parser().parse_args()
    try:
        patches = read_patches(Path(args.patches))
        env = Environment(args.python, patches)
        if args.command != "status" or env.journal.exists():
            with env.lock():
                {"status": lambda *_: None, "apply": apply, "revert": revert}[args.command](patches, env)
        rows = survey(patches, env)[0]
    except RefusedError as error:
        print(f"patch_packages: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        raise SystemExit(f"patch_packages: {error.filename}: {error.strerror}; mend that and run it again") from None
    except KeyboardInterrupt:
        print("patch_packages: interrupted; the step at hand was undone, run it again", file=sys.stderr)
        return 130
    if args.json:
        names = ("name", "package", "version", "state", "reason")
        states = [(patch.name, patch.package, env.about[patch.name]["version"], state, reason) for patch, state, reason in rows]
        print(json.dumps({"prefix": str(env.prefix), "patches": [dict(zip(names, row, strict=True)) for row in states]}, indent=1))
    else:
        for patch, state, reason in rows:
            print(f"{state:17}{patch.name:40} {reason or patch.fields['Description'].splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
