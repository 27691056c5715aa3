"""The environment is built from its lock, mended when damaged, and never used half built. Real venvs, real wheels, a small lock."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, clean_environment

BUILD = [sys._base_executable, str(ROOT / "scripts/build_environment.py")]
LOCK = "hjson==3.1.0\npy-cpuinfo==9.0.0\n"


def build(environment, lock, **kwargs):
    command = [*BUILD, "--environment", str(environment), "--lock", str(lock)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), **kwargs)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    (folder / "lock.txt").write_text(LOCK)
    answer = build(folder / "env", folder / "lock.txt")
    assert answer.returncode == 0, answer.stderr
    return folder / "env", folder / "lock.txt"


@pytest.fixture
def copy(built, tmp_path):
    """A copy of the built environment: its files are not hard links to the first one's."""
    shutil.copytree(built[0], tmp_path / "env", symlinks=True)
    return tmp_path / "env", built[1]


def test_the_lock_is_installed_and_compiled(built):
    environment, _ = built
    code = "import hjson, cpuinfo, importlib.metadata as m; print(m.version('hjson'), m.version('py-cpuinfo'))"
    answer = subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True)
    assert answer.stdout.split() == ["3.1.0", "9.0.0"]
    assert list(environment.glob("lib/python3.11/site-packages/hjson/__pycache__/*.pyc"))
    assert json.loads((environment / "stamp.json").read_text())["backend"] == "cuda"


def test_a_whole_environment_is_left_as_it_is(copy):
    environment, lock = copy
    marker = environment / "lib/python3.11/site-packages/mine.txt"
    marker.touch()
    answer = build(environment, lock)
    assert answer.returncode == 0, answer.stderr
    assert marker.exists()


@pytest.mark.parametrize("victim", ["hjson/decoder.py", "hjson-3.1.0.dist-info/RECORD"])
def test_a_damaged_package_is_mended(copy, victim):
    environment, lock = copy
    site = environment / "lib/python3.11/site-packages"
    (site / victim).unlink()
    answer = build(environment, lock)
    assert answer.returncode == 0, answer.stderr
    assert "mending hjson==3.1.0" in answer.stderr
    assert (site / victim).exists()
    assert subprocess.run([environment / "bin/python", "-c", "import hjson; hjson.loads('{a: 1}')"]).returncode == 0


def test_an_environment_without_stamp_is_built_anew(copy):
    environment, lock = copy
    (environment / "stamp.json").unlink()
    (environment / "lib/python3.11/site-packages/half.txt").touch()
    answer = build(environment, lock)
    assert answer.returncode == 0, answer.stderr
    assert not (environment / "lib/python3.11/site-packages/half.txt").exists()


def test_a_killed_build_leaves_no_stamp_and_the_next_one_ends_well(built, tmp_path):
    process = subprocess.Popen(
        [*BUILD, "--environment", tmp_path / "env", "--lock", built[1]],
        env=clean_environment(), start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "env/bin").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "env/stamp.json").exists()
    assert build(tmp_path / "env", built[1]).returncode == 0
    assert (tmp_path / "env/stamp.json").exists()


def test_a_changed_lock_is_followed_in_place(copy, tmp_path):
    """A server may run from the environment: what the locks have in common stays, and so does what the user added."""
    environment, _ = copy
    site = environment / "lib/python3.11/site-packages"
    (site / "mine.txt").touch()
    (tmp_path / "other.txt").write_text("hjson==3.0.2\n")
    answer = build(environment, tmp_path / "other.txt")
    assert answer.returncode == 0, answer.stderr
    names = {path.name for path in site.glob("*.dist-info")}
    assert "hjson-3.0.2.dist-info" in names
    assert not any(name.startswith(("py_cpuinfo", "hjson-3.1")) for name in names)
    assert (site / "mine.txt").exists()
    assert json.loads((environment / "stamp.json").read_text())["lock"] == {"hjson": "3.0.2"}


@pytest.mark.parametrize(
    ("lock", "words"), [("hjson==0.0.0\n", ["could not install", "make setup"]), (None, ["does not exist", "requirements-cpu.txt"])]
)
def test_a_bad_lock_is_one_sentence(tmp_path, lock, words):
    path = tmp_path / "lock.txt"
    if lock:
        path.write_text(lock)
    answer = build(tmp_path / "env", path)
    assert answer.returncode == (1 if lock else 2)
    assert all(word in answer.stderr for word in words)
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "env/stamp.json").exists()


def test_a_folder_that_is_no_environment_is_not_deleted(tmp_path, built):
    (tmp_path / "thesis.txt").write_text("years of work")
    answer = build(tmp_path, built[1])
    assert answer.returncode == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_missing_compiler_is_one_sentence(tmp_path, built):
    command = [*BUILD, "--environment", tmp_path / "env", "--lock", built[1]]
    answer = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert answer.returncode == 1
    assert "C compiler" in answer.stderr
    assert "apt install gcc" in answer.stderr
    assert not (tmp_path / "env").exists()
