"""scripts/patch_packages.py on small packages in environments of their own: applied and reverted, refused, damaged, killed, linked."""

import base64
import contextlib
import csv
import ctypes
import difflib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "patch_packages.py"
SOURCE = {
    "toy/__init__.py": "from toy.sums import add\n",
    "toy/sums.py": '"""Sums."""\n\n\ndef add(a, b):\n    return a - b\n\n\ndef double(a):\n    return add(a, a)\n',
    "toy/names.txt": "one\ntwo\nthree\nlast line has no end",
}
MINUS, PLUS = SOURCE["toy/sums.py"], SOURCE["toy/sums.py"].replace("a - b", "a + b")


class Toy:
    """An environment that holds the package toy, as an installer leaves it."""

    def __init__(self, prefix, source=SOURCE, make=None):
        self.prefix, self.python = prefix, prefix / "bin" / "python"
        if make:
            make(prefix)
        else:
            venv.create(prefix, symlinks=True, with_pip=False)
        self.site = next(prefix.glob("lib/python3.*/site-packages"))
        if not make:
            packaging = Path(importlib.util.find_spec("packaging").origin).parent.parent
            (self.site / "packaging.pth").write_text(f"{packaging}\n")
        self.install(source)

    def install(self, source=SOURCE, version="1.2"):
        for old in (self.site / "toy", *self.site.glob("toy-*.dist-info")):
            shutil.rmtree(old, ignore_errors=True)
        self.info = self.site / f"toy-{version}.dist-info"
        metadata = {f"{self.info.name}/METADATA": f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n"}
        rows = []
        for path, text in (source | metadata).items():
            (self.site / path).parent.mkdir(parents=True, exist_ok=True)
            (self.site / path).write_bytes(text.encode())
            rows.append(f"{path},{spelled(text.encode())},{len(text.encode())}\n")
        (self.info / "RECORD").write_text("".join(rows) + f"{self.info.name}/RECORD,,\n")

    def tree(self):
        """Return {path: (bytes, mode)} of all that the environment holds, but bytecode, the tool's own files and the probe's caches."""
        files = (p for p in self.prefix.rglob("*") if p.is_file() and not {"__pycache__", ".patches"} & {*p.parts})
        return {str(p.relative_to(self.prefix)): (p.read_bytes(), p.stat().st_mode) for p in files if p.name != "applied-patches.json"}

    def sum(self):
        """Return what toy.add(2, 1) gives in a fresh process of the environment."""
        return int(
            subprocess.run([self.python, "-c", "import toy; print(toy.add(2, 1))"], capture_output=True, text=True, check=True).stdout
        )

    def applied(self):
        return json.loads((self.prefix / "applied-patches.json").read_text())

    def unsound(self):
        """Return the files that differ from what RECORD says of them, as `pip check` and uninstall would meet them."""
        rows = list(csv.reader((self.info / "RECORD").read_text().splitlines()))
        assert len(rows) == len({row[0] for row in rows})
        hashed = [(path, told, int(size)) for path, told, size in rows if told]
        return [
            path for path, told, size in hashed if (data := (self.site / path).read_bytes()) and (spelled(data), len(data)) != (told, size)
        ]


def spelled(data):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def sha(text):
    return "-" if text is None else hashlib.sha256(text.encode()).hexdigest()


def diff(path, old, new):
    lines = difflib.unified_diff(
        (old or "").splitlines(True), new.splitlines(True), f"a/{path}" if old is not None else "/dev/null", f"b/{path}"
    )
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def patch_text(changes, **fields):
    """Return a patch file. `changes`: {path: (old text or None, new text)}; `fields` overrule the header's (X_Env=…)."""
    header = {"Description": "add adds", "Origin": "vendor", "Forwarded": "no", "X-Package": "toy", "X-Versions": ">=1,<2", "X-Env": "any"}
    header |= {name.replace("_", "-"): value for name, value in fields.items()}
    hashes = "".join(f" {path} {sha(old)} {sha(new)}\n" for path, (old, new) in changes.items())
    lines = "".join(f"{name}: {value}\n" for name, value in header.items() if value is not None)
    return f"{lines}X-Sha256:\n{hashes}" + "".join(diff(path, *pair) for path, pair in changes.items())


def folder_of(path, **patches):
    """Write a folder of patches of toy: {slug: text}, numbered in order; return it."""
    shutil.rmtree(path, ignore_errors=True)
    (path / "toy").mkdir(parents=True)
    names = [f"toy/{number:04}-{slug}.patch" for number, slug in enumerate(patches, 1)]
    for name, text in zip(names, patches.values(), strict=True):
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (path / "series").write_text("# in this order\n" + "".join(f"{name}\n" for name in names))
    return path


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path / "env")


@pytest.fixture
def tool(run_script):
    def run(command, toy, patches, *more, **kwargs):
        done = run_script("patch_packages.py", command, "--python", toy.python, "--patches", patches, *more, **kwargs)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def states(tool):
    def run(env, patches):
        return [row["state"] for row in json.loads(tool("status", env, patches, "--json").stdout)["patches"]]

    return run


TWO = {"toy/sums.py": (MINUS, PLUS), "toy/names.txt": (SOURCE["toy/names.txt"], "one\nTWO\nthree\nlast line has no end")}
NEW = {"toy/more.py": (None, "MORE = 1\n")}


def test_apply_again_and_revert(toy, tool, states, tmp_path):
    patches = folder_of(
        tmp_path / "patches",
        plus=patch_text(TWO),
        twice=patch_text({"toy/sums.py": (PLUS, PLUS.replace("add(a, a)", "2 * a"))}),
        new=patch_text(NEW),
    )
    (toy.site / "toy/names.txt").chmod(0o640)
    before, names = toy.tree(), ["toy/0001-plus", "toy/0002-twice", "toy/0003-new"]
    assert toy.sum() == 1 and states(toy, patches) == ["applicable"] * 3
    assert toy.tree() == before, "status changed something"
    done = tool("apply", toy, patches)
    assert done.returncode == 0 and [line.split()[:2] for line in done.stdout.splitlines()] == [["applied", name] for name in names]
    assert toy.sum() == 3 and (toy.site / "toy/more.py").read_text() == "MORE = 1\n" and toy.unsound() == []
    assert (toy.site / "toy/names.txt").read_text() == TWO["toy/names.txt"][1]
    assert sorted(toy.applied()) == names and states(toy, patches) == ["applied"] * 3
    after, stamps = toy.tree(), {p: p.stat().st_mtime_ns for p in toy.site.rglob("*") if p.is_file()}
    assert tool("apply", toy, patches).returncode == 0
    assert toy.tree() == after and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert tool("revert", toy, patches).returncode == 0
    assert toy.tree() == before and toy.sum() == 1 and toy.applied() == {} and states(toy, patches) == ["applicable"] * 3
    assert tool("revert", toy, patches).returncode == 0 and toy.tree() == before


def test_stale_bytecode_is_not_run(toy, tool, tmp_path):
    """Python takes a .pyc for good when the source's time and size are those noted in it; the patch changes neither here."""
    target = toy.site / "toy/sums.py"
    subprocess.run([toy.python, "-m", "compileall", "-q", toy.site / "toy"], check=True)
    times = target.stat().st_atime_ns, target.stat().st_mtime_ns
    for command, result in (("apply", 3), ("revert", 1)):
        assert tool(command, toy, folder_of(tmp_path / "patches", plus=patch_text(TWO))).returncode == 0
        os.utime(target, ns=times)
        assert toy.sum() == result, command
        assert list((toy.site / "toy/__pycache__").glob("sums.*.pyc")), "not compiled anew"


def test_hard_links_keep_their_content(toy, tool, tmp_path):
    """uv links the files of an environment to its cache, and so to every other environment."""
    other, patches = tmp_path / "other", folder_of(tmp_path / "patches", plus=patch_text(TWO), new=patch_text(NEW))
    shutil.copytree(toy.site, other, copy_function=os.link)
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    assert (toy.site / "toy/sums.py").stat().st_nlink == 2
    for command in ("apply", "revert"):
        assert tool(command, toy, patches).returncode == 0
        assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before


def test_states_of_what_needs_nothing(toy, tool, states, tmp_path):
    rows = {
        "any": patch_text(TWO),
        "range": patch_text(TWO, X_Versions="<1.2"),
        "other": patch_text(TWO, X_Env="torch>=99"),
        "cuda": patch_text(TWO, X_Env="cuda"),
        "cpu": patch_text(NEW, X_Env="cpu; packaging>=20"),
    }
    patches = folder_of(tmp_path / "patches", **rows)
    assert states(toy, patches) == ["applicable", "not-affected", "not-affected", "not-affected", "applicable"]
    later = {
        "toy/sums.py": PLUS + "# a later release\n",
        "toy/names.txt": "zero\n" + TWO["toy/names.txt"][1],
        "toy/more.py": "MORE = 1\n# 2\n",
    }
    toy.install(SOURCE | later, "1.9")
    assert states(toy, patches) == ["upstream-fixed", "not-affected", "not-affected", "not-affected", "upstream-fixed"]
    before = toy.tree()
    assert tool("apply", toy, patches).returncode == 0 and toy.tree() == before
    shutil.rmtree(toy.info)
    assert states(toy, patches) == ["not-installed"] * 5 and tool("apply", toy, patches).returncode == 0


@pytest.mark.parametrize("state, text", [("conflict", "a * b"), ("foreign-modified", "a - b  # mine")])
def test_another_text_is_left_alone(toy, tool, states, tmp_path, state, text):
    """The second patch does not fit: the first is not applied either."""
    if state == "conflict":
        toy.install(SOURCE | {"toy/sums.py": MINUS.replace("a - b", text)})
    else:
        (toy.site / "toy/sums.py").write_text(MINUS.replace("a - b", text))
    patches = folder_of(tmp_path / "patches", new=patch_text(NEW), plus=patch_text(TWO))
    before = toy.tree()
    assert states(toy, patches) == ["applicable", state]
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and "toy/0002-plus" in done.stderr and "toy/sums.py" in done.stderr and len(done.stderr.splitlines()) == 1
    assert toy.tree() == before


def test_a_changed_series_replaces_the_old_one(toy, tool, states, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO), new=patch_text(NEW))
    before = toy.tree()
    assert tool("apply", toy, patches).returncode == 0
    abs_sum = MINUS.replace("a - b", "abs(a + b)")
    folder_of(patches, abs=patch_text({"toy/sums.py": (MINUS, abs_sum)}))
    assert states(toy, patches) == ["applicable"] and tool("apply", toy, patches).returncode == 0
    assert (toy.site / "toy/sums.py").read_text() == abs_sum and list(toy.applied()) == ["toy/0001-abs"]
    assert not (toy.site / "toy/more.py").exists() and toy.unsound() == []
    assert tool("revert", toy, patches).returncode == 0 and toy.tree() == before


def test_a_reinstalled_package_is_patched_anew(toy, tool, states, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    assert tool("apply", toy, patches).returncode == 0
    toy.install()
    assert toy.sum() == 1 and states(toy, patches) == ["applicable"]
    assert tool("apply", toy, patches).returncode == 0 and toy.sum() == 3
    toy.install(version="1.3")
    assert tool("revert", toy, patches).returncode == 0 and toy.applied() == {} and toy.sum() == 1


def test_an_edit_on_top_of_a_patch_is_not_lost(toy, tool, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    assert tool("apply", toy, patches).returncode == 0
    (toy.site / "toy/sums.py").write_text(PLUS + "# mine\n")
    before = toy.tree()
    for command in ("apply", "revert"):
        done = tool(command, toy, patches)
        assert done.returncode == 3 and "toy/sums.py" in done.stderr and toy.tree() == before


def test_originals_that_were_lost(toy, tool, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    assert tool("apply", toy, patches).returncode == 0
    before = toy.tree()
    (toy.prefix / ".patches" / sha(MINUS)).write_text("damaged")
    done = tool("revert", toy, patches)
    assert done.returncode == 3 and "reinstall toy" in done.stderr and toy.tree() == before
    (toy.prefix / "applied-patches.json").unlink()
    done = tool("revert", toy, patches)
    assert done.returncode == 3 and "reinstall toy" in done.stderr and toy.tree() == before
    (toy.prefix / "applied-patches.json").write_text("{")
    done = tool("revert", toy, patches)
    assert done.returncode == 1 and "applied-patches.json" in done.stderr and toy.tree() == before


def link_away(path, outside):
    shutil.move(path, outside)
    path.symlink_to(outside)


def editable(toy, outside):
    (toy.info / "direct_url.json").write_text(json.dumps({"url": "file:///src", "dir_info": {"editable": True}}))


def borrowed(toy, outside):
    shutil.copytree(toy.site, outside, ignore=shutil.ignore_patterns("*.pth"))
    shutil.rmtree(toy.site / "toy")
    shutil.rmtree(toy.info)
    (toy.site / "outside.pth").write_text(f"{outside}\n")


def without(row):
    def change(toy, outside):
        lines = (toy.info / "RECORD").read_text().splitlines(keepends=True)
        (toy.info / "RECORD").write_text("".join(line for line in lines if not line.startswith(row)))

    return change


REFUSALS = {
    "editable": editable,
    "outside": borrowed,
    "RECORD does not name": without("toy/sums.py"),
    "no RECORD": lambda toy, outside: (toy.info / "RECORD").unlink(),
    "a link": lambda toy, outside: link_away(toy.site / "toy/sums.py", outside),
    "behind a link": lambda toy, outside: link_away(toy.site / "toy", outside),
    "no regular file": lambda toy, outside: ((toy.site / "toy/sums.py").unlink(), os.mkfifo(toy.site / "toy/sums.py")),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_refused_targets(toy, tool, states, tmp_path, why):
    outside, patches = tmp_path / "outside", folder_of(tmp_path / "patches", plus=patch_text(TWO))
    REFUSALS[why](toy, outside)
    kept = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} or (outside.read_bytes() if outside.is_file() else None)
    before = toy.tree()
    assert states(toy, patches) == ["conflict"]
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and why in done.stderr and len(done.stderr.splitlines()) == 1
    assert toy.tree() == before
    assert kept == ({p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} or (outside.read_bytes() if outside.is_file() else None))


def test_crlf_is_not_touched(toy, tool, states, tmp_path):
    """A file with CRLF ends is another text than the patch was made for, and a patch with them is damaged."""
    toy.install(SOURCE | {"toy/sums.py": MINUS.replace("\n", "\r\n")})
    before, patches = toy.tree(), folder_of(tmp_path / "patches", plus=patch_text(TWO))
    assert states(toy, patches) == ["conflict"] and tool("apply", toy, patches).returncode == 3
    done = tool("apply", toy, folder_of(patches, plus=patch_text(TWO).replace("\n", "\r\n")))
    assert done.returncode == 1 and "LF line ends" in done.stderr and toy.tree() == before


def test_a_record_with_crlf_ends_and_without_a_last_end_comes_back(toy, tool, tmp_path):
    record = toy.info / "RECORD"
    record.write_bytes(record.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    before, patches = toy.tree(), folder_of(tmp_path / "patches", plus=patch_text(TWO), new=patch_text(NEW))
    assert tool("apply", toy, patches).returncode == 0 and toy.unsound() == []
    assert tool("revert", toy, patches).returncode == 0 and toy.tree() == before


def pythons():
    """Return {version: interpreter} of the Pythons from 3.8 on that this machine has, one of each minor version."""
    found = {}
    for python in [sys.executable, *Path.home().glob(".pyenv/versions/3.*/bin/python3"), *Path("/usr/bin").glob("python3.*[0-9]")]:
        words = [python, "-c", "import ensurepip, sys; print('%d.%02d' % sys.version_info[:2])"]
        version = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        if version >= "3.08":
            found.setdefault(version, str(python))
    return found


@pytest.mark.parametrize("python", pythons().values(), ids=pythons())
def test_an_environment_of_another_python_without_pip(tool, tmp_path, python):
    toy = Toy(tmp_path / "env", make=lambda prefix: subprocess.run([python, "-m", "venv", "--without-pip", prefix], check=True))
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO, X_Env="python>=3.8; python<4", **PROBE))
    before = toy.tree()
    for command, code, result in (("check", 1, 1), ("apply", 0, 3), ("verify", 0, 3), ("revert", 0, 1)):
        done = tool(command, toy, patches)
        assert done.returncode == code and toy.sum() == result and toy.unsound() == [], done.stderr
    assert toy.tree() == before


def conda(prefix):
    """Make a prefix of the kind that conda makes: an interpreter with its library, not a virtual environment."""
    library = Path(sysconfig.get_paths()["stdlib"])
    (prefix / "bin").mkdir(parents=True)
    (prefix / "conda-meta").mkdir()
    shutil.copy(Path(sys.executable).resolve(), prefix / "bin" / "python")
    (prefix / "lib" / library.name / "site-packages").mkdir(parents=True)
    for path in library.iterdir():
        if path.name not in ("site-packages", "dist-packages", "__pycache__"):
            (prefix / "lib" / library.name / path.name).symlink_to(path)


def test_a_prefix_of_conda(tool, tmp_path):
    """Its files are hard links to a cache of packages, as with uv."""
    toy = Toy(tmp_path / "env", make=conda)
    if subprocess.run([toy.python, "-c", "import toy"], capture_output=True).returncode:
        pytest.skip("this Python does not run from a copy")
    shutil.copytree(toy.site, tmp_path / "pkgs", copy_function=os.link)
    kept = {p: p.read_bytes() for p in (tmp_path / "pkgs").rglob("*") if p.is_file()}
    patches, before = folder_of(tmp_path / "patches", plus=patch_text(TWO, **PROBE)), toy.tree()
    for command, result in (("apply", 3), ("verify", 3), ("revert", 1)):
        assert tool(command, toy, patches).returncode == 0 and toy.sum() == result and toy.unsound() == []
    assert toy.tree() == before and {p: p.read_bytes() for p in kept} == kept


def test_a_package_that_is_installed_for_the_user(toy, tool, tmp_path):
    """It would be patched for every program of this user."""
    base = Toy(tmp_path / "base", make=conda)
    if subprocess.run([base.python, "-c", "import toy"], capture_output=True).returncode:
        pytest.skip("this Python does not run from a copy")
    home = tmp_path / "home/.local/lib" / base.site.parent.name / "site-packages"
    home.parent.mkdir(parents=True)
    shutil.move(base.site, home)
    base.site.mkdir()
    patches, before = folder_of(tmp_path / "patches", plus=patch_text(TWO)), {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    done = tool("apply", base, patches, env={"HOME": str(tmp_path / "home")})
    assert done.returncode == 3 and "installed for the user" in done.stderr and str(home) in done.stderr
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def no_longer_above_permissions():
    """Take from root, in a child process, the right to write where the mode forbids it (CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP


def test_read_only_packages(toy, tmp_path):
    """The sentence names the folder and the ways out."""
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    before, command = toy.tree(), [sys.executable, SCRIPT, "apply", "--python", toy.python, "--patches", patches]
    for folder in (toy.site / "toy", toy.info, toy.prefix):
        folder.chmod(0o555)
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_longer_above_permissions)
        folder.chmod(0o755)
        assert done.returncode == 3 and f"{folder} is read-only" in done.stderr and "environment of your own" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and toy.tree() == before
    toy.prefix.chmod(0o555)
    command[2] = "check"
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_longer_above_permissions)
    toy.prefix.chmod(0o755)
    assert done.returncode == 1 and "applicable" in done.stdout and toy.tree() == before


def test_two_at_once(toy, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO), new=patch_text(NEW))
    command = [sys.executable, SCRIPT, "apply", "--python", toy.python, "--patches", patches]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(p.communicate()[1], p.returncode) for p in running] == [("", 0)] * 4
    assert toy.sum() == 3 and toy.unsound() == [] and len(toy.applied()) == 2


PROBE = {
    "X_Probe": "\n import toy\n if toy.add(2, 1) != 3:\n .\n     raise ValueError(f'sum is\\n {toy.add(2, 1)}')",
    "X_Raises": "ValueError: ^sum is$",
}


def test_check_and_verify(toy, tool, states, tmp_path):
    """check shows that the bug is here, verify that it is gone, and what has happened since to what was applied."""
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO, **PROBE), new=patch_text(NEW))
    before = toy.tree()

    def run(command, code, *expected):
        done = tool(command, toy, patches)
        assert done.returncode == code and all(word in done.stdout for word in expected), done.stdout + done.stderr

    run("check", 1, "applicable", "ValueError: sum is")
    run("verify", 0, "applicable")
    assert toy.tree() == before
    assert tool("apply", toy, patches).returncode == 0
    after = toy.tree()
    run("check", 0, "applied")
    run("verify", 0, "applied")
    assert toy.tree() == after
    for path, text in (
        (toy.site / "toy/sums.py", PLUS + "# mine\n"),
        (toy.site / "toy/names.txt", ""),
        (toy.info / "RECORD", ""),
        (toy.prefix / ".patches" / sha(MINUS), "damaged"),
    ):
        kept = path.read_bytes()
        path.write_text(text)
        run("verify", 1, "reinstall toy" if text != "" or path.name != "RECORD" else "apply again")
        path.write_bytes(kept)
        run("verify", 0)
    (toy.site / "toy/__init__.py").write_text("from toy.sums import double as add\n")  # no patch's file, but its probe fails
    run("verify", 1, "conflict", "its probe fails: TypeError")
    toy.install()
    run("verify", 1, "conflict", "applied no longer")
    assert tool("apply", toy, patches).returncode == 0
    run("verify", 0)


@pytest.mark.parametrize(
    "probe, raises, word",
    [
        ("import toy; assert toy.add(2, 1) == 3, 'no'", "AssertionError: yes", "AssertionError: no"),
        ("import toy; assert toy.add(2, 1) == 3, 'no'", "ValueError: no", "AssertionError: no"),
        ("import toy, missing; assert toy.add(2, 1) == 3", "AssertionError: .*", "No module named 'missing'"),
        ("import os, toy; toy.add(2, 1) == 3 or os.abort()", "AssertionError: .*", "-6"),
        ("import sys, toy; toy.add(2, 1) == 3 or sys.exit('bye')", "SystemExit: bye", "bye"),
        ("import toy; assert toy.add(2, 1) == 5, 'other'", "AssertionError: other", "its probe still fails, so all was put back"),
    ],
)
def test_a_probe_that_does_not_show_the_bug_or_its_end(toy, tool, states, tmp_path, probe, raises, word):
    """Nothing is changed, the patches before it included."""
    patches = folder_of(tmp_path / "patches", new=patch_text(NEW), plus=patch_text(TWO, X_Probe=probe, X_Raises=raises))
    before = toy.tree()
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and word in done.stderr and "toy/0002-plus" in done.stderr and len(done.stderr.splitlines()) == 1
    assert toy.tree() == before and toy.applied() == {} and states(toy, patches) == ["applicable"] * 2


def test_a_probe_that_passes_before(toy, tool, tmp_path):
    """Where the bug does not show, the patch is left out, and what stands behind it is not."""
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO, X_Probe="import toy", X_Raises="ImportError: x"), new=patch_text(NEW))
    for command, last in (("check", "applicable"), ("apply", "applied")):
        rows = tool(command, toy, patches).stdout.splitlines()
        assert (
            rows[0].startswith("not-affected")
            and "its probe passes without it" in rows[0]
            and (command == "check" or rows[1].startswith(last))
        )
    assert toy.sum() == 1 and list(toy.applied()) == ["toy/0002-new"]


def test_a_probe_without_an_end_leaves_no_process(toy, load_script, tmp_path, monkeypatch, capsys):
    probe = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(987)', '{tmp_path}/marker'])"
    module = load_script("patch_packages.py")
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO, X_Probe=probe, X_Raises="E: x"))
    monkeypatch.setattr(module, "PATIENCE", 3)
    monkeypatch.setattr(sys, "argv", ["", "apply", "--python", str(toy.python), "--patches", str(patches)])
    before = toy.tree()
    assert module.main() == 3 and "no end within 3 s" in capsys.readouterr().err and toy.tree() == before

    def left():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"{tmp_path}/marker".encode() in path.read_bytes().split(b"\0"):
                    yield path

    for _ in range(50):  # what was killed may take a moment to go
        if not list(left()):
            return
        time.sleep(0.1)
    raise AssertionError(list(left()))


def test_other_releases(toy, tool, states, tmp_path):
    """Another release's text is told by its hash; a hunk then goes where its lines stand, if that is one place, and nowhere else."""
    later = "# one line more\n" + MINUS
    changes = {"toy/sums.py": (MINUS, PLUS)}
    text = patch_text(changes).replace("--- a/toy", f" toy/sums.py {sha(later)} {sha(later.replace('a - b', 'a + b'))}\n--- a/toy", 1)
    patches = folder_of(tmp_path / "patches", plus=text)
    for source in (MINUS, later):
        toy.install(SOURCE | {"toy/sums.py": source})
        before = toy.tree()
        assert states(toy, patches) == ["applicable"] and tool("apply", toy, patches).returncode == 0 and toy.sum() == 3
        assert tool("verify", toy, patches).returncode == 0 and toy.unsound() == []
        assert tool("revert", toy, patches).returncode == 0 and toy.tree() == before
    toy.install(SOURCE | {"toy/sums.py": later + "# unknown\n"})
    assert states(toy, patches) == ["conflict"]
    twice = "# one line more\n" + MINUS + MINUS
    toy.install(SOURCE | {"toy/sums.py": twice})
    for wanted in (
        twice.replace("a - b", "a + b", 1),
        "# one line more\n" + MINUS + PLUS,
    ):  # which of the two is not for this tool to choose
        text = patch_text(changes).replace("--- a/toy", f" toy/sums.py {sha(twice)} {sha(wanted)}\n--- a/toy", 1)
        assert tool("status", toy, folder_of(patches, plus=text)).returncode == 1


def test_a_pin_does_not_hold_up_the_rest(toy, tool, tmp_path):
    pin = patch_text(
        {}, X_Kind="pin", X_Pin="toy>=2", X_Probe="import toy; assert toy.add(0, 1) == 2, 'never'", X_Raises="AssertionError: never"
    )
    pin = pin.replace("X-Sha256:\n", "")
    patches = folder_of(tmp_path / "patches", pin=pin, plus=patch_text(TWO))
    before = toy.tree()
    done = tool("check", toy, patches)
    assert done.returncode == 1 and "AssertionError: never; no patch can help: install 'toy>=2'" in done.stdout and toy.tree() == before
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and "install 'toy>=2'" in done.stderr and len(done.stderr.splitlines()) == 1 and toy.sum() == 3
    assert tool("verify", toy, patches).returncode == 0 and tool("revert", toy, patches).returncode == 0 and toy.tree() == before
    folder_of(patches, pin=pin.replace("import toy", "import toy, missing"), plus=patch_text(TWO))
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and "No module named 'missing'" in done.stderr and toy.sum() == 3
    folder_of(patches, pin=pin.replace("assert toy.add(0, 1) == 2", "assert True"))
    assert tool("apply", toy, patches).returncode == 0


def test_only_the_packages_that_are_named(toy, tool, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    (patches / "other").mkdir()
    (patches / "other/0001-x.patch").write_text(patch_text(NEW, X_Package="other"))
    (patches / "series").write_text("toy/0001-plus.patch\nother/0001-x.patch\n")
    assert tool("apply", toy, patches, "Other").stdout.split()[:2] == ["not-installed", "other/0001-x"] and toy.sum() == 1
    assert len(tool("apply", toy, patches, "other", "TOY").stdout.splitlines()) == 2 and toy.sum() == 3
    assert tool("revert", toy, patches, "other").returncode == 0 and toy.sum() == 3
    done = tool("revert", toy, patches, "nothing")
    assert done.returncode == 2 and "no patch for nothing" in done.stderr and toy.sum() == 3


def killed(load_script, steps, *words):
    """Run the tool in a child process that is killed (-9) before its call number `steps` that moves or removes a file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = itertools.count()

    def dying(call):
        return lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == steps else call(*args, **more)

    try:
        sys.argv = ["patch_packages.py", *map(str, words)]
        os.replace, os.unlink, sys.stdout = dying(os.replace), dying(os.unlink), open(os.devnull, "w")
        os._exit(load_script("patch_packages.py").main())
    finally:
        os._exit(99)


BACKEND = """
import base64, hashlib, pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = "toy-1.2.dist-info"
    files = {str(p): p.read_bytes() for p in pathlib.Path("toy").iterdir() if p.suffix != ".pyc" and p.is_file()}
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\\nName: toy\\nVersion: 1.2\\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\\nGenerator: toy\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in files).encode()
    with zipfile.ZipFile(pathlib.Path(folder, "toy-1.2-py3-none-any.whl"), "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return "toy-1.2-py3-none-any.whl"
"""


def source_distribution(folder, backend=BACKEND, more=()):
    """Write toy-1.2.tar.gz, which a backend of its own builds; return what X-Sdist says of it."""
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "toy"\nversion = "1.2"\n'
    files = SOURCE | {"pyproject.toml": build, "backend.py": backend, "PKG-INFO": "Metadata-Version: 2.1\nName: toy\nVersion: 1.2\n"}
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "toy-1.2.tar.gz", "w:gz") as tar:
        for name, text in [*((f"toy-1.2/{path}", text) for path, text in files.items()), *more]:
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return f"toy-1.2.tar.gz {hashlib.sha256((folder / 'toy-1.2.tar.gz').read_bytes()).hexdigest()}"


def built(archive, changes=TWO, **fields):
    return patch_text(changes, **({"X_Kind": "sdist", "X_Sdist": archive} | PROBE | fields))


def registry(folder):
    """Return settings by which pip knows this folder alone."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_EXTRA_INDEX_URL": ""}


def test_a_package_that_is_built_from_its_patched_source(toy, tool, tmp_path):
    folder = tmp_path / "registry"
    patches = folder_of(tmp_path / "patches", plus=built(source_distribution(folder)))
    (toy.site / "toy/names.txt").chmod(0o640)
    before = toy.tree()
    done = tool("check", toy, patches)
    assert done.returncode == 1 and "ValueError: sum is" in done.stdout and toy.tree() == before
    assert tool("apply", toy, patches, env=registry(folder)).returncode == 0
    after = toy.tree()
    assert toy.sum() == 3 and toy.unsound() == [] and (toy.site / "toy/names.txt").read_text() == TWO["toy/names.txt"][1]
    shutil.rmtree(folder)  # the wheel was kept
    for command, tree, result in (
        ("apply", after, 3),
        ("revert", before, 1),
        ("apply", after, 3),
        ("verify", after, 3),
        ("revert", before, 1),
    ):
        done = tool(command, toy, patches, env=registry(folder))
        assert done.returncode == 0 and toy.tree() == tree and toy.sum() == result, done.stderr
    (toy.site / "toy/names.txt").write_text("mine")
    done = tool("apply", toy, patches)
    assert done.returncode == 3 and "names.txt is not as it was installed" in done.stderr


SCRIPTS = 'files["toy-1.2.data/scripts/toy"] = b"#!python"\n    files[f"{info}/WHEEL"]'
UNBUILT = {  # what is wrong: (backend, further members of the archive, fields of the patch, exit code, word of the error)
    "a build that fails": ("raise SystemExit('error: no compiler here')", (), {}, 1, "no compiler here"),
    "another archive": (BACKEND, (), {"X_Sdist": f"toy-1.2.tar.gz {'0' * 64}"}, 1, "download ended with 1"),
    "a member outside": (BACKEND, (("../evil.py", "EVIL = 1\n"),), {}, 1, ""),
    "a module in a new folder": (BACKEND.replace('Path("toy")', 'Path("new")'), (("toy-1.2/new/x.py", ""),), {}, 3, "new/x.py"),
    "a wheel with scripts": (BACKEND.replace('files[f"{info}/WHEEL"]', SCRIPTS), (), {}, 3, "by hand"),
    "a mend that mends not": (
        BACKEND,
        (),
        {"X_Probe": "import toy; assert toy.add(2, 1) == 5, 'x'", "X_Raises": "AssertionError: x"},
        3,
        "still",
    ),
    "another text": (BACKEND, (("toy-1.2/toy/sums.py", MINUS + "# other\n"),), {}, 1, "X-Sha256 is not what toy/sums.py"),
}


@pytest.mark.parametrize("why", UNBUILT)
def test_a_source_that_is_not_built(toy, tool, tmp_path, why):
    """One sentence, and the package as it was."""
    backend, more, fields, code, word = UNBUILT[why]
    archive, before = source_distribution(tmp_path / "registry", backend, more), toy.tree()
    patches = folder_of(tmp_path / "patches", plus=built(archive, **fields))
    done = tool("apply", toy, patches, env=registry(tmp_path / "registry"))
    assert done.returncode == code and word in done.stderr and toy.tree() == before and not list(tmp_path.rglob("evil.py")), done.stderr
    assert len(done.stderr.splitlines()) == 2 and done.stderr.startswith("patch_packages: building toy-1.2 from source")


def test_killed_while_it_builds(toy, tool, states, tmp_path):
    """The compiler that it leaves behind goes on for a while; the next run does the work anew."""
    waiting, folder = tmp_path / "waiting", tmp_path / "registry"
    waiting.touch()
    wait = f"    import time\n    while pathlib.Path({str(waiting)!r}).exists(): time.sleep(0.1)\n    info ="
    patches, before = (
        folder_of(tmp_path / "patches", plus=built(source_distribution(folder, BACKEND.replace("    info =", wait)))),
        toy.tree(),
    )
    command = [sys.executable, SCRIPT, "apply", "--python", toy.python, "--patches", patches]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | registry(folder)) as running:
        while not (toy.prefix / ".patches/build/venv/bin/pip").exists():
            time.sleep(0.1)
            assert running.poll() is None, running.stderr.read()
        running.kill()
        waiting.unlink()
    assert states(toy, patches) == ["applicable"] and toy.tree() == before and toy.sum() == 1
    assert tool("apply", toy, patches, env=registry(folder)).returncode == 0 and toy.sum() == 3 and toy.unsound() == []
    assert tool("revert", toy, patches).returncode == 0 and toy.tree() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["installed", "sdist"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_killed_at_every_step(toy, tool, load_script, tmp_path, command, kind):
    """After kill -9 at any step `status` finds the package wholly old or wholly new, and the command then ends its work."""
    patches = folder_of(tmp_path / "patches", both=patch_text(TWO | NEW))
    if kind == "sdist":
        archive = source_distribution(tmp_path / "registry")
        folder_of(
            patches, both=built(archive, TWO | NEW, X_Probe="import toy; assert toy.add(2, 1) == 3, 'x'", X_Raises="AssertionError: x")
        )
        assert tool("apply", toy, patches, env=registry(tmp_path / "registry")).returncode == 0
        assert tool("revert", toy, patches).returncode == 0
    subprocess.run([toy.python, "-m", "compileall", "-q", toy.site / "toy"], check=True)
    trees = {"applicable": toy.tree()}
    if command == "revert":
        tool("apply", toy, patches)
    start, seen = tmp_path / "start", []
    shutil.copytree(toy.prefix, start, symlinks=True)
    tool(command, toy, patches)
    trees |= {"applied": toy.tree() if command == "apply" else Toy.tree(SimpleNamespace(prefix=start))}
    end = {"apply": trees["applied"], "revert": trees["applicable"]}[command]
    for steps in itertools.count():
        shutil.rmtree(toy.prefix)
        shutil.copytree(start, toy.prefix, symlinks=True)
        code = killed(load_script, steps, command, "--python", toy.python, "--patches", patches)
        seen.append(tool("status", toy, patches).stdout.split()[0])
        assert toy.tree() == trees[seen[-1]], f"half-done after {steps} steps"
        noted = toy.applied() if (toy.prefix / "applied-patches.json").exists() else {}
        assert list(noted) == ["toy/0001-both"] * (seen[-1] == "applied")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert tool(command, toy, patches).returncode == 0 and toy.tree() == end
    print(f"{command}: killed at each of {steps} steps")
    assert steps > 12 and set(seen) == {"applied", "applicable"}


def test_a_dead_run_does_not_spoil_a_package_that_was_reinstalled(toy, tool, load_script, tmp_path):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    assert killed(load_script, 6, "apply", "--python", toy.python, "--patches", patches) == -signal.SIGKILL
    assert (toy.prefix / ".patches/journal.json").exists()
    toy.install({path: text + "\n# 3\n" for path, text in SOURCE.items()}, "3.0")
    before = toy.tree()
    assert tool("status", toy, patches).returncode == 0 and toy.tree() == before
    assert not (toy.prefix / ".patches/journal.json").exists()


def hostile_patches():
    """Yield (what is wrong, patch file) of everything that must be refused."""
    good = patch_text(TWO)
    paths = [
        "../toy/sums.py",
        "toy/../../evil.py",
        "/etc/evil",
        "toy//sums.py",
        "./toy/sums.py",
        "toy/.hidden",
        "toy\\sums.py",
        "C:/evil.py",
    ]
    paths += [
        "toy/sums.py/",
        "",
        " ",
        "toy/su ms.py",
        "toy/\x1b[31m.py",
        "toy/sums.py\t2024-01-01",
        "~/evil.py",
        "toy/söms.py",
        "nottoy/evil.py",
    ]
    paths += [
        "toy-1.2.dist-info/RECORD",
        "toy-1.2.dist-info/METADATA",
        "evil/evil.py",
        "bin/python",
        "toy/sub/new.py",
        "packaging.pth/x.py",
    ]
    for path in paths:
        yield f"a new file {path!r}", patch_text({path: (None, "EVIL = 1\n")})
        yield f"a change of {path!r}", patch_text({path: (MINUS, PLUS)})
    for name in ("Description", "Origin", "Forwarded", "X_Package", "X_Versions", "X_Env"):
        yield f"no {name}", patch_text(TWO, **{name: None})
        yield f"an empty {name}", patch_text(TWO, **{name: ""})
    yield "the header twice", good.partition("X-Sha256")[0] + good
    for name, value in (
        ("X_Package", "other"),
        ("X_Package", "../toy"),
        ("X_Versions", "new"),
        ("X_Versions", ">=1;import os"),
        ("X_Env", "gpu >"),
        ("X_Env", "any;;"),
    ):
        yield f"{name}: {value}", patch_text(TWO, **{name: value})
    yield "an unknown field", patch_text(TWO, X_Run="rm -rf /")
    yield "an empty file", ""
    yield "a binary file", bytes(range(256)) * 64
    yield "UTF-16", good.encode("utf-16")
    yield "Latin-1", good.replace("add adds", "addé").encode("latin-1")
    yield "a lone surrogate", good.encode().replace(b"add adds", b"\xed\xa0\x80")
    yield "a NUL", good.replace("a + b", "a +\0b")
    yield "CRLF", good.replace("\n", "\r\n")
    yield "CR in one hunk line", good.replace("a + b\n", "a + b\r\n")
    yield "two megabytes", good + "\n" * (2 << 20)
    yield "only a header", good.partition("--- a/")[0]
    yield "only a diff", "--- a/" + good.partition("--- a/")[2]
    yield "mail around it", "From 1234 Mon Sep 17 00:00:00 2001\n" + good
    yield "git's lines", good.replace("--- a/toy/sums.py", "diff --git a/toy/sums.py b/toy/sums.py\n--- a/toy/sums.py")
    yield "a signature", good + "-- \n2.39.0\n"
    yield "a removed file", good.replace("+++ b/toy/sums.py", "+++ /dev/null")
    yield "a rename", good.replace("+++ b/toy/sums.py", "+++ b/toy/other.py")
    yield "a file twice", good + diff("toy/sums.py", MINUS, PLUS)
    yield "a file without a hunk", good + "--- a/toy/__init__.py\n+++ b/toy/__init__.py\n"
    yield "a file that X-Sha256 does not name", good + diff("toy/__init__.py", SOURCE["toy/__init__.py"], "EVIL = 1\n")
    yield (
        "a hash for a file that the diff does not have",
        good.replace("--- a/toy", f" toy/__init__.py {'0' * 64} {'1' * 64}\n--- a/toy", 1),
    )
    yield "another hash after", good.replace(sha(PLUS), "0" * 64)
    yield "another hash before", good.replace(sha(MINUS), "0" * 64)
    yield "a hash in capitals", good.replace(sha(PLUS), sha(PLUS).upper())
    yield "hashes cut", good.replace(sha(PLUS), sha(PLUS)[:32])
    yield "a hash for no file", good.replace(sha(MINUS), "-")
    yield "one that changes nothing", patch_text({"toy/sums.py": (MINUS, MINUS)}) + diff("toy/sums.py", MINUS, PLUS)
    yield "other context", good.replace(" def add(a, b):", " def odd(a, b):")
    yield "context without its blank", good.replace(" def add(a, b):", "def add(a, b):")
    yield "hunks two lines lower", good.replace("@@ -2,", "@@ -4,")
    yield "a hunk at line 9999999", good.replace("@@ -2,", "@@ -9999999,")
    yield "a line number of 400 digits", good.replace("@@ -2,", f"@@ -{'9' * 400},")
    yield "a negative line number", good.replace("@@ -2,", "@@ --2,")
    yield "a longer count", good.replace("@@ -2,7 +2,7 @@", "@@ -2,8 +2,8 @@")
    yield "a shorter count", good.replace("@@ -2,7 +2,7 @@", "@@ -2,6 +2,6 @@")
    yield "uneven counts", good.replace("@@ -2,7 +2,7 @@", "@@ -2,7 +2,2 @@")
    yield "counts of nothing", good.replace("@@ -2,7 +2,7 @@", "@@ -2,0 +2,0 @@")
    yield "no end of line on the last line", good.rstrip("\n")
    yield "another word for a missing end", good.replace("\\ No newline at end of file", "\\ rm")


def hostile_kinds():
    """Yield (what is wrong, patch file) of headers that ask for something else than a patch of their kind may."""
    some, archive = "0" * 64, f"toy-1.2.tar.gz {'0' * 64}"
    probe = {"X_Probe": "import toy", "X_Raises": "ValueError: x"}
    for kind, fields in (
        ("", {}),
        ("patch", {}),
        ("Installed", {}),
        ("sdist", {}),
        ("sdist", {"X_Sdist": archive}),
        ("sdist", {"X_Probe": "import toy", "X_Raises": "ValueError: x"}),
        *(("sdist", {"X_Sdist": text} | probe) for text in ("toy-1.2.tar.gz", f"toy-1.2.zip {some}", f"../toy-1.2.tar.gz {some}")),
        *(
            ("sdist", {"X_Sdist": text} | probe)
            for text in (f"toy.tar.gz {some}", f"--index-url=x-1.tar.gz {some}", f"toy-1.2;x.tar.gz {some}")
        ),
        ("sdist", {"X_Sdist": f"toy-1.2.tar.gz {some}\n -r evil.txt"} | probe),
        ("installed", {"X_Sdist": archive}),
        ("installed", {"X_Cache": "triton"}),
        ("installed", {"X_Pin": "toy>=2"}),
        ("installed", {"X_Probe": "import toy"}),
        ("installed", {"X_Raises": "ValueError: x"}),
        *(
            ("installed", {"X_Probe": text, "X_Raises": "ValueError: x"})
            for text in ("import", "x = (", "a\n b", "(" * 9999, "é = '\\N{x}'")
        ),
        *(
            ("installed", {"X_Probe": "import toy", "X_Raises": text})
            for text in ("ValueError", "ValueError: ", "x y: z", "E: (", "E: a\n b", ": x")
        ),
        ("cache", {"X_Cache": "triton"}),
        ("pin", {"X_Pin": "toy>=2"} | probe),
    ):
        yield f"kind {kind} with {fields}", patch_text(TWO, X_Kind=kind, **fields)
    for fields in (
        {"X_Kind": "cache"},
        *({"X_Kind": "cache", "X_Cache": text} for text in ("", "/", "~", "../..", "HOME ~ **/*.so", "triton\n triton", "Triton")),
        {"X_Kind": "cache", "X_Cache": "triton"} | probe,
        {"X_Kind": "pin"},
        {"X_Kind": "pin", "X_Pin": "toy>=2"},
        {"X_Kind": "pin", "X_Pin": "toy>=2\n toy"} | probe,
        {"X_Kind": "sdist", "X_Sdist": archive} | probe,
    ):
        yield f"no diff, and {fields}", patch_text({}, **fields).replace("X-Sha256:\n", "")
    yield "a probe at the margin", patch_text(TWO, X_Probe="\nimport os", X_Raises="E: x")
    good, line = patch_text(TWO), f" toy/sums.py {sha(MINUS)} {sha(PLUS)}\n"
    yield "the same hash twice", good.replace(line, line * 2)
    yield "another end for the same hash", good.replace(line, line + line.replace(sha(PLUS), some))
    yield "a file that is new and is not", good.replace(line, line + line.replace(sha(MINUS), "-"))
    yield "a new file with a second hash", patch_text(NEW).replace("--- /dev", f" toy/more.py {some} {sha(PLUS)}\n--- /dev", 1)


OTHER_KINDS = (
    patch_text(TWO | NEW, **PROBE),
    patch_text(TWO, X_Kind="sdist", X_Sdist=f"toy-1.2.tar.gz {'0' * 64}", **(PROBE | {"X_Versions": "<1"})),
    patch_text({}, X_Kind="pin", X_Pin="toy>=2", X_Probe="import toy; toy.add(1)", X_Raises="TypeError: add").replace("X-Sha256:\n", ""),
    patch_text({}, X_Kind="cache", X_Cache="triton").replace("X-Sha256:\n", ""),
)


def damaged_patches(good, rounds):
    """Yield (damage, patch file): five times as many cut, flipped, doubled or shuffled copies of a good patch, the same in each run."""
    chance, good = random.Random(5), good.encode()
    lines = good.splitlines(keepends=True)
    for _ in range(rounds):
        cut, at = chance.randrange(len(good)), chance.randrange(len(good))
        one, other = sorted(chance.sample(range(len(lines)), 2))
        yield f"cut at {cut}", good[:cut]
        yield f"bit of byte {at}", good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :]
        yield f"without line {one}", b"".join(lines[:one] + lines[one + 1 :])
        yield f"line {one} twice", b"".join(lines[: one + 1] + lines[one:])
        yield (
            f"lines {one}, {other} swapped",
            b"".join([*lines[:one], lines[other], *lines[one + 1 : other], lines[one], *lines[other + 1 :]]),
        )


def test_hostile_and_damaged_patches(toy, load_script, tmp_path, monkeypatch, capsys):
    """One sentence and exit code 1 or 3; nothing written in the environment or beside it, half or whole. A damage that hits only the
    words of a header may leave a sound patch: then that is applied, to the byte."""
    module, patches, outcomes = load_script("patch_packages.py"), tmp_path / "patches", []
    (tmp_path / "outside").mkdir()
    before, aside = toy.tree(), sorted(tmp_path.iterdir())
    subprocess.run(
        [sys.executable, SCRIPT, "apply", "--python", toy.python, "--patches", folder_of(patches, good=patch_text(TWO | NEW))], check=True
    )
    whole = toy.tree()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, str(tmp_path / "outside"))
    others = itertools.chain.from_iterable(damaged_patches(text, 10) for text in OTHER_KINDS)
    for kind, cases in (
        ("hostile", itertools.chain(hostile_patches(), hostile_kinds())),
        ("damaged", itertools.chain(damaged_patches(patch_text(TWO | NEW), 30), others)),
    ):
        for what, text in cases:
            folder_of(patches, good=patch_text(TWO))
            monkeypatch.setattr(sys, "argv", ["", "revert", "--python", str(toy.python), "--patches", str(patches)])
            if toy.tree() != before:
                assert module.main() == 0 and toy.tree() == before
            folder_of(patches, case=text)
            monkeypatch.setattr(sys, "argv", ["", "apply", "--python", str(toy.python), "--patches", str(patches)])
            capsys.readouterr()
            try:
                code = module.main()
            except SystemExit as end:
                code, message = 1, end.code
            else:
                message = capsys.readouterr().err.rstrip("\n")
            assert toy.tree() == (before if code else whole) or (code == 0 and toy.tree() == before), what
            assert code in (1, 3) or (kind == "damaged" and code == 0), f"{what}: accepted"
            if code:
                assert message.startswith("patch_packages: ") and "\n" not in message and len(message) < 600, f"{what}: {message!r}"
            outcomes.append((kind, code))
    assert sorted(p for p in tmp_path.iterdir() if p != patches) == aside and not list((tmp_path / "outside").iterdir())
    counted = {key: outcomes.count(key) for key in sorted(set(outcomes))}
    with capsys.disabled():
        print(f"\ntried {len(outcomes)} hostile or damaged patches: {counted}")
    assert sum(kind == "hostile" for kind, _ in outcomes) > 60 and len(outcomes) > 450


@pytest.mark.parametrize(
    "series, word",
    [
        ("toy/0001-a.patch\n", "toy/0001-a.patch"),
        ("", "toy/0001-plus.patch"),
        ("../x.patch\n", "patch"),
        (None, "series"),
        ("\xff", "series"),
    ],
)
def test_a_series_that_does_not_fit_its_folder(toy, tool, tmp_path, series, word):
    patches = folder_of(tmp_path / "patches", plus=patch_text(TWO))
    (patches / "series").unlink() if series is None else (patches / "series").write_bytes(series.encode("latin-1"))
    done = tool("apply", toy, patches)
    assert done.returncode == 1 and word in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/true", "/bin/cat", "/etc/passwd"])
def test_an_interpreter_that_is_none(run_script, tmp_path, python):
    done = run_script("patch_packages.py", "status", "--python", python, "--patches", folder_of(tmp_path / "patches", plus=patch_text(TWO)))
    assert done.returncode == 1 and python in done.stderr and "--python" in done.stderr and len(done.stderr.splitlines()) == 1
