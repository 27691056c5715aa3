"""The patches for packages that users bring along, each on the real package: the failure shown, mended, mended again, taken back."""

import base64
import csv
import difflib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

UV = Path(sys.executable).with_name("uv")
PATCHES = ROOT / "patches"
pytestmark = pytest.mark.slow


class Env:
    """An environment of its own, without pip, with packages from the registry; uv links their files to its cache."""

    def __init__(self, prefix, *packages):
        self.prefix, self.python = prefix, prefix / "bin" / "python"
        self.uv("venv", "--quiet", "--python", sys.executable, prefix)
        self.site = next(prefix.glob("lib/python3.*/site-packages"))
        self.install(*packages)

    def uv(self, *words, env=None):
        environment = clean_environment() | {"UV_LINK_MODE": "hardlink", "VIRTUAL_ENV": str(self.prefix)} | (env or {})
        done = subprocess.run([UV, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    def install(self, *packages):
        if packages:
            self.uv("pip", "install", "--quiet", *packages)

    def files(self):
        """Return {path: (bytes, mode)} of the packages, bytecode left out."""
        files = (p for p in self.site.rglob("*") if p.is_file() and p.suffix != ".pyc")
        return {str(p.relative_to(self.site)): (p.read_bytes(), p.stat().st_mode) for p in files}

    def call(self, code, **kwargs):
        """Run Python code; return its last line, or the last line of its error."""
        words = [self.python, "-c", textwrap.dedent(code)]
        done = subprocess.run(words, capture_output=True, text=True, env=clean_environment(), timeout=600, **kwargs)
        return (done.stderr if done.returncode else done.stdout).strip().rpartition("\n")[2] or str(done.returncode)

    def unsound(self, package):
        """Return the files that differ from what the package's RECORD says of them."""
        rows = csv.reader(next(self.site.glob(f"{package}-*.dist-info/RECORD")).read_text().splitlines())
        hashed = {path: told for path, told, _ in rows if told and (self.site / path).exists()}
        return [
            path
            for path, told in hashed.items()
            if told != "sha256=" + base64.urlsafe_b64encode(hashlib.sha256((self.site / path).read_bytes()).digest()).decode().rstrip("=")
        ]


@pytest.fixture
def tool(run_script):
    """tool(command, env, package, code=…): run it with patches/; return (state, reason) of the package's patch, and stderr."""

    def run(command, env, package, code=0, patches=PATCHES, **variables):
        words = "patch_packages.py", command, package, "--json", "--python", env.python, "--patches", patches
        done = run_script(*words, env=variables)
        assert done.returncode == code, done.stderr + done.stdout
        return json.loads(done.stdout)["patches"][0] if done.stdout else done.stderr

    return run


def round_trip(tool, env, package, call, failure, **variables):
    """Prove a patch: `call` ends in `failure` before it and after it is taken back; return what it gives in between."""
    pristine = env.files()
    assert failure in env.call(call)
    found = tool("check", env, package, code=1)
    assert found["state"] == "applicable" and failure in found["reason"]
    assert env.files() == pristine, "check changed something"
    assert tool("apply", env, package, **variables)["state"] == "applied"
    mended, after = env.call(call), env.files()
    assert after != pristine and not env.unsound(package) and tool("verify", env, package)["state"] == "applied"
    stamps = {p: p.stat().st_mtime_ns for p in env.site.rglob("*") if p.is_file()}
    assert tool("apply", env, package, **variables)["state"] == "applied" and tool("check", env, package)["state"] == "applied"
    assert env.files() == after and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert tool("revert", env, package)["state"] == "applicable"
    assert env.files() == pristine and failure in env.call(call)
    return mended


class Ranged(io.RawIOBase):
    """A file behind an address, of which only what is read is fetched."""

    def __init__(self, url):
        self.url, self.at = url, 0
        with self.get(0, 0) as answer:
            self.size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def get(self, first, last):
        answer = urllib.request.urlopen(urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"}))
        assert answer.status == 206, "the registry does not serve parts of a file"
        return answer

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        wanted = min(len(buffer), self.size - self.at)
        if wanted > 0:
            with self.get(self.at, self.at + wanted - 1) as answer:
                buffer[:wanted] = answer.read()
            self.at += wanted
        return max(wanted, 0)


def address(package, version, ending):
    """Return where the registry has a release's file: by uv, which knows the registry that is set up here."""
    words = [UV, "pip", "compile", "-", "--no-deps", "--quiet", "--no-header", "--format", "pylock.toml"]
    lock = subprocess.run(words, input=f"{package}=={version}", capture_output=True, text=True, check=True, env=clean_environment()).stdout
    return next(url for url in re.findall(r'"(http[^"]*)"', lock) if url.endswith(ending))


def members(package, version, pattern):
    """Return {name: bytes} of the members of a release's wheel whose name matches; of hundreds of megabytes it fetches kilobytes."""
    with zipfile.ZipFile(io.BufferedReader(Ranged(address(package, version, "x86_64.whl")), 1 << 16)) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if re.fullmatch(pattern, name)}


@pytest.fixture(scope="module")
def vllm():
    """vllm(env, version): put the real file of that release, and what its wheel tells an installer, into an environment."""
    pattern = r"vllm/__init__\.py|vllm/transformers_utils/configs/ovis\.py|vllm-.*\.dist-info/.*[^/]"
    known = {}

    def put(env, version):
        for old in (env.site / "vllm", *env.site.glob("vllm-*.dist-info")):
            shutil.rmtree(old, ignore_errors=True)
        if version not in known:
            known[version] = members("vllm", version, pattern)
        for name, data in known[version].items():
            (env.site / name).parent.mkdir(parents=True, exist_ok=True)
            (env.site / name).write_bytes(data)

    return put


OVIS = """
    import importlib.util
    from transformers import AutoConfig
    path = importlib.util.find_spec("vllm").submodule_search_locations[0] + "/transformers_utils/configs/ovis.py"
    spec = importlib.util.spec_from_file_location("ovis", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    config = AutoConfig.for_model("aimv2")
    print([hasattr(config, name) for name in ("rms_norm_eps", "qkv_bias", "use_bias")])
"""
TAKEN = "ValueError: 'aimv2' is already used by a Transformers config"
WHOLE, LACKING = "[True, True, True]", "[False, False, False]"


def test_aimv2(tool, vllm, tmp_path):
    """vLLM 0.9 with transformers on both sides of 4.54; 0.9.0 holds another text than 0.9.2, one line higher."""
    env = Env(tmp_path / "env", "transformers==4.53.3")
    vllm(env, "0.9.2")
    assert env.call(OVIS) == WHOLE and tool("status", env, "vllm")["state"] == "not-affected"
    for version, transformers in (("0.9.2", "4.54.0"), ("0.9.0", "4.57.6")):
        env.install(f"transformers=={transformers}")
        vllm(env, version)
        assert round_trip(tool, env, "vllm", OVIS, TAKEN) == WHOLE, (version, transformers)
    for version, state in (("0.9.0.1", "applicable"), ("0.9.1", "applicable"), ("0.10.0", "not-affected")):
        vllm(env, version)
        assert tool("status", env, "vllm")["state"] == state, version


def variant(folder, package, *changes):
    """Copy a package's patch into a folder of patches, with some of its text changed: (old, new), and hashes that fit; return it."""
    name = next(line for line in (PATCHES / "series").read_text().splitlines() if line.startswith(f"{package}/"))
    text = (PATCHES / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    (folder / "series").write_text(name + "\n")
    return folder


def test_aimv2_commented_out(tool, vllm, tmp_path):
    """The remedy that the patch's description warns of: the import is mended, but Ovis models get a config that lacks what they read.
    The patch's probe does not take that for mended; without the probe it can be had."""
    env = Env(tmp_path / "env", "transformers==4.57.6")
    vllm(env, "0.9.2")
    text = (env.site / "vllm/transformers_utils/configs/ovis.py").read_text()
    line = 'AutoConfig.register("aimv2", AIMv2Config'
    out = hashlib.sha256(text.replace(line, "# " + line).encode()).hexdigest()
    ours = hashlib.sha256(text.replace(line, line + ", exist_ok=True").encode()).hexdigest()
    changes = [(f"+{line}, exist_ok=True)", f"+# {line})"), (ours, out)]
    pristine = env.files()
    told = tool("apply", env, "vllm", code=3, patches=variant(tmp_path / "out", "vllm", *changes))
    assert "its probe still fails" in told and "rms_norm_eps" in told and env.files() == pristine
    probe = re.search(r"X-Probe:.*?(?=X-Verified)", (PATCHES / "vllm/0001-aimv2-registered-twice.patch").read_text(), re.DOTALL)[0]
    assert tool("apply", env, "vllm", patches=variant(tmp_path / "bare", "vllm", *changes, (probe, "")))["state"] == "applied"
    assert env.call(OVIS) == LACKING


HASHES = """
    import mmh3, random
    chance = random.Random(7)
    texts = ["", "foo", "汉字"] + ["".join(map(chr, chance.choices(range(1, 3000), k=chance.randrange(300)))) for _ in range(200)]
    print([(mmh3.hash(t, 3), mmh3.hash64(t, 5), mmh3.hash128(t, 7), mmh3.hash_bytes(t, 9)) for t in texts])
"""
UNCLEAN = "SystemError: PY_SSIZE_T_CLEAN macro must be defined for '#' formats"


def test_mmh3(tool, tmp_path):
    """Without optimisation as well as with it, all values are those of a release that knows Python 3.11."""
    env, values = Env(tmp_path / "env", "mmh3==2.3.1"), Env(tmp_path / "new", "mmh3==5.1.0").call(HASHES)
    for level in ("-O0", "-O2"):
        shutil.rmtree(env.prefix / ".patches", ignore_errors=True)  # the wheel that is kept there was built at the other level
        assert round_trip(tool, env, "mmh3", HASHES, UNCLEAN, CFLAGS=level, CXXFLAGS=level) == values


def test_the_macro_alone_is_not_enough(tool, tmp_path):
    """Built so without optimisation mmh3 crashes: the probe sees it, and the package is as it was."""
    env = Env(tmp_path / "env", "mmh3==2.3.1")
    patch = (PATCHES / "mmh3/0001-py-ssize-t-clean.patch").read_text()
    after = re.search(r"mmh3module\.cpp \w+ (\w+)", patch)[1]
    with tarfile.open(fileobj=io.BytesIO(urllib.request.urlopen(address("mmh3", "2.3.1", "tar.gz")).read())) as tar:
        source = tar.extractfile("mmh3-2.3.1/mmh3module.cpp").read()
    source = source.replace(b"#include <stdio.h>", b"#define PY_SSIZE_T_CLEAN\n#include <stdio.h>")
    patches = variant(
        tmp_path / "macro", "mmh3", ("+    Py_ssize_t target", "+    int target"), (after, hashlib.sha256(source).hexdigest())
    )
    pristine = env.files()
    told = tool("apply", env, "mmh3", code=3, patches=patches, CFLAGS="-O0", CXXFLAGS="-O0")
    assert "its probe still fails, so all was put back: ended with -11" in told
    assert env.files() == pristine and UNCLEAN in env.call(HASHES) and tool("status", env, "mmh3")["state"] == "applicable"


LANGUAGES = """
    import pycld2
    texts = {
        "en": "The quick brown fox jumps over the lazy dog, and then it sleeps beside the river until the evening comes.",
        "fr": "Le chat dort sur le canapé pendant que la pluie tombe doucement sur les toits de la vieille ville.",
        "zh": "今天天气很好，我们去公园散步，然后在湖边的小饭馆吃午饭。",
    }
    answers = {code: pycld2.detect(text * 3, returnVectors=True) for code, text in texts.items()}
    lengths = {code: (answer[1], sum(part[1] for part in answer[3])) for code, answer in answers.items()}
    print([answer[0] and answer[2][0][1] == code for code, answer in answers.items()], lengths)
"""


COMPILER = """#!/bin/bash
# g++ that keeps the objects of the large tables, built without optimisation; what binds them to Python is built as LEVEL says
for word; do [[ $word != *.cc ]] || source=$word; [[ $last != -o ]] || out=$word; last=$word; done
[[ " $* " == *" -c "* ]] || exec g++ "$@"
[[ $source == *internal* ]] || exec g++ "$@" "$LEVEL"
kept=$(dirname "$0")/$(sha256sum < "$source" | cut -c1-64).o
[ -f "$kept" ] || g++ "$@" -O0 -o "$kept" || exit
cp "$kept" "$out"
"""


def test_pycld2(tool, tmp_path):
    """A large package; the lengths that it gives back are those of the texts. The release that mended it gives the same."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env, answer = Env(tmp_path / "env"), Env(tmp_path / "new", "pycld2==0.42").call(LANGUAGES)
    assert answer.startswith("[True, True, True]")
    for level in ("-O0", "-O2"):
        variables = {"CC": str(compiler), "CXX": str(compiler), "LEVEL": level}
        if level == "-O0":
            env.uv("pip", "install", "--quiet", "--no-cache", "pycld2==0.31", env=variables)
        shutil.rmtree(env.prefix / ".patches", ignore_errors=True)
        assert round_trip(tool, env, "pycld2", LANGUAGES, UNCLEAN, **variables) == answer


OBJECT = """
    #define PY_SSIZE_T_CLEAN
    #include <Python.h>
    static PyObject *load_binary(PyObject *self, PyObject *args) {
        const char *name, *data;
        Py_ssize_t size;
        int shared, device;
        if (!PyArg_ParseTuple(args, "ss#ii", &name, &data, &size, &shared, &device))
            return NULL;
        return PyLong_FromSsize_t(size);
    }
    static PyMethodDef methods[] = {{"load_binary", load_binary, METH_VARARGS, ""}, {NULL}};
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", NULL, -1, methods};
    PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&module); }
"""
LOAD = """
    import importlib.util, pathlib
    path, = pathlib.Path(PATH).rglob("cuda_utils.so")
    spec = importlib.util.spec_from_file_location("cuda_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(module.load_binary("kernel", b"cubin", 0, 0))
"""


HEADERS = f"-I{sysconfig.get_paths()['include']}"


def compiled(path, name="cuda_utils", source=OBJECT, *flags):
    """Compile an extension as Triton does: its file name tells nothing of Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ["gcc", "-O3", "-shared", "-fPIC", "-w", "-xc", "-", "-o", path, *(flags or [HEADERS])]
    subprocess.run(words, input=source.replace("NAME", name), text=True, check=True)
    return path


def newer_headers():
    """Yield the headers of each Python from 3.13 on that this machine has."""
    for python in {shutil.which("python3.13"), *Path.home().glob(".pyenv/versions/3.1[3-9]*/bin/python3")} - {None}:
        words = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"]
        include = Path(subprocess.run(words, capture_output=True, text=True).stdout.strip())
        if (include / "Python.h").exists():
            yield include


def test_stale_triton_cache(tool, tmp_path):
    """What a newer Python compiled is removed wherever Triton is told to keep it, and nothing else."""
    env, cache = Env(tmp_path / "env"), tmp_path / "cache"
    for name, data in members("triton", "3.3.1", r"triton-.*\.dist-info/.*[^/]|.*/nvidia/driver\.c|.*/cuda\.h").items():
        (env.site / name).parent.mkdir(parents=True, exist_ok=True)
        (env.site / name).write_bytes(data)
    driver = (env.site / "triton/backends/nvidia/driver.c").read_text()
    theirs = f"-I{env.site / 'triton/backends/nvidia/include'}"
    # Without the macro the headers of this Python give the object that those of 3.13 give with it
    unclean = OBJECT.replace("#define PY_SSIZE_T_CLEAN", "")
    stale = compiled(cache / "KEY1" / "cuda_utils.so", source=unclean)
    others = []
    for include in newer_headers():
        stale = compiled(cache / "KEY1" / "cuda_utils.so", "cuda_utils", OBJECT, f"-I{include}")
        others = [compiled(cache / "KEY5" / "cuda_utils.so", "cuda_utils", driver, f"-I{include}", theirs)]
    kept = [
        compiled(cache / "KEY6" / "cuda_utils.so", "cuda_utils", driver, HEADERS, theirs),
        compiled(cache / "KEY2" / "hip_utils.so", "hip_utils"),
        compiled(cache / "KEY3" / "__triton_launcher.so", "__triton_launcher", unclean.replace("ss#ii", "ssOii")),
        compiled(tmp_path / "elsewhere" / "cuda_utils.so", source=unclean),
    ]
    shutil.copy(stale, cache / "cuda_utils.so")
    shutil.copy(stale, cache / "KEY2" / "kernel.cubin")
    (cache / "KEY3" / "text.so").write_bytes(b"\0PyArg_ParseTuple\0s#\0")
    (cache / "KEY2" / "link.so").symlink_to(kept[-1])
    (cache / "KEY4").symlink_to(kept[-1].parent)

    def files():
        return {p: p.read_bytes() for folder in (cache, tmp_path / "elsewhere") for p in folder.rglob("*") if p.is_file()}

    load, before = LOAD.replace("PATH", repr(str(stale.parent))), files()
    assert UNCLEAN in env.call(load)
    places = {
        "TRITON_CACHE_DIR": cache,
        "TORCHINDUCTOR_CACHE_DIR": tmp_path / "inductor",
        "VLLM_CACHE_ROOT": tmp_path / "vllm",
        "TRITON_HOME": tmp_path / "home",
    }
    elsewhere = [
        tmp_path / "inductor/triton/0/KEY/cuda_utils.so",
        tmp_path / "vllm/torch_compile_cache/HASH/rank_0_0/triton_cache/KEY/cuda_utils.so",
        tmp_path / "home/.triton/cache/KEY/cuda_utils.so",
    ]
    for path in elsewhere:
        path.parent.mkdir(parents=True)
        shutil.copy(stale, path)
    gone = [stale, *others, *elsewhere]
    variables = {name: str(path) for name, path in places.items()}
    found = tool("check", env, "triton", code=1, **variables)
    assert found["state"] == "applicable" and found["reason"].count(".so") == len(gone), found
    assert all(str(path) in found["reason"] for path in gone) and files() == before
    assert tool("apply", env, "triton", **variables)["state"] == "not-affected"
    assert files() == {path: data for path, data in before.items() if path not in gone} and not any(path.exists() for path in gone)
    compiled(stale)  # as Triton does when it finds none
    assert env.call(load) == "5" and tool("apply", env, "triton", **variables)["state"] == "not-affected" and stale.exists()
    assert tool("revert", env, "triton", **variables)["state"] == "not-affected"


def test_faiss_is_a_pin(tool, tmp_path):
    """No edit can help: apply says what to install, and that helps."""
    env = Env(tmp_path / "env", "faiss-cpu==1.7.4", "numpy==1.26.4")
    assert env.call("import faiss") == "0" and tool("check", env, "faiss-cpu")["state"] == "not-affected"
    env.install("numpy==2.2.6")
    pristine, failure = env.files(), "ImportError: numpy.core.multiarray failed to import"
    assert failure in env.call("import faiss")
    found = tool("check", env, "faiss-cpu", code=1)
    assert found["state"] == "pin" and failure in found["reason"]
    wanted = re.search(r"install '(.*)'", tool("apply", env, "faiss-cpu", code=3)["reason"])[1]
    assert env.files() == pristine
    env.install(wanted)
    assert env.call("import faiss") == "0" and tool("apply", env, "faiss-cpu")["state"] == "not-affected"


def test_files_that_uv_shares_between_environments(run_script, tmp_path):
    """uv has a cache of its own here: a tool that wrote into files would spoil every environment of this machine."""
    env, other = (Env(tmp_path / name) for name in ("env", "other"))
    for one in (env, other):
        one.uv("pip", "install", "--quiet", "six==1.17.0", env={"UV_CACHE_DIR": str(tmp_path / "cache")})
    module, theirs = env.site / "six.py", other.site / "six.py"
    assert module.stat().st_ino == theirs.stat().st_ino
    text, before = module.read_text(), other.files()
    lines, new = text.splitlines(keepends=True), text.replace("import types\n", "import types  # patched\n")
    diff = "".join(difflib.unified_diff(lines, new.splitlines(keepends=True), "a/six.py", "b/six.py"))
    hashes = " ".join(hashlib.sha256(t.encode()).hexdigest() for t in (text, new))
    fields = "Description: x\nOrigin: vendor\nForwarded: no\nX-Package: six\nX-Versions: ==1.17.0\nX-Env: any\n"
    (tmp_path / "patches/six").mkdir(parents=True)
    (tmp_path / "patches/six/0001-x.patch").write_text(f"{fields}X-Sha256:\n six.py {hashes}\n{diff}")
    (tmp_path / "patches/series").write_text("six/0001-x.patch\n")
    for command, content in (("apply", new), ("revert", text)):
        done = run_script("patch_packages.py", command, "--python", env.python, "--patches", tmp_path / "patches")
        assert done.returncode == 0 and module.read_text() == content and other.files() == before, done.stderr
    env.uv("pip", "uninstall", "--quiet", "six")
    assert not module.exists() and other.files() == before
