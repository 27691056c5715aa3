"""scripts/scan_packages.py on sources of every kind, on this environment, and on real packages that numpy broke: found, patched, run."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, clean_environment
from test_patch_packages import Toy

PATCHES = ROOT / "patches"
OLD = {
    "fasttext-wheel": ("fasttext-wheel==0.9.2", "numpy==2.2.6"),
    "gym": ("gym==0.26.2", "numpy==2.2.6"),
    "scikit-optimize": ("scikit-optimize==0.9.0", "numpy==1.26.4"),
    "faiss-cpu": ("faiss-cpu==1.7.4", "numpy==2.2.6"),
}


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    """old("gym"): a new environment with the package of OLD, from the registry: its python and site-packages."""
    made = {}

    def environment(package):
        if package not in made:
            prefix = tmp_path_factory.mktemp("old") / package
            uv = [sys.executable, "-m", "uv", "--quiet"]
            subprocess.run([*uv, "venv", "--python", sys.executable, prefix], check=True)
            subprocess.run([*uv, "pip", "install", "--python", prefix / "bin/python", "packaging", *OLD[package]], check=True)
            made[package] = SimpleNamespace(
                python=prefix / "bin/python", site=next(prefix.glob("lib/python3.*/site-packages")), prefix=prefix
            )
        return made[package]

    return environment


@pytest.fixture
def scan(run_script):
    """scan(*args): the findings, as {"findings": …} of --json."""

    def run(*args, **kwargs):
        done = run_script("scan_packages.py", *args, "--json", **kwargs)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def found(scan, tmp_path):
    """found(source, python): [(line, name, "certain" or the doubt)] in a source, under this environment's numpy or another's."""

    def run(source, python=sys.executable):
        path = tmp_path / "source.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        rows = scan(path, "--python", python)["findings"]
        return [(row["line"], row["symbol"].removeprefix("numpy."), row["doubt"] or "certain") for row in rows]

    return run


CERTAIN = """
import numpy
import numpy as np, os
import numpy.core.multiarray
from numpy import float_
from numpy import float as real, array
from numpy import random as r
import jax.numpy as jnp
a = numpy.bool8(1)
b = np.int0, np.product([1]), np.math.pi
c = [np.float for x in (1, 2)]
d = getattr(np, "NaN")
e = np.array([1, 2], copy=False)
f = lambda: np.Inf
g = jnp.float, r.rand, os.float
def h(value: np.float = np.object):
    import numpy as mine
    return mine.cast[value]
class K:
    np = None
    kind = np.float
    def method(self):
        return np.str
i = np.float_.fromhex, np.random.seed, np.bool, np.long, np.float64
j = f"{np.alltrue([1])}"
async def k():
    async with np.who() as x:
        pass
l = np.array([1], None, False)
m = np.array(k, copy=True), np.nan_to_num(k, copy=False), k.astype(int, copy=False)
n = np.ndarray.itemset, np.ndarray.__call__, np.ndarray.sum, np.c_.nothing, np.ma.MaskedArray.ptp
def o():
    global late
    import numpy as late
p = late.float
try:
    def q(pairs):
        x, y = zip(*pairs)
        return np.array(x, copy=False), np.float
except (AttributeError, ValueError):
    pass
"""
CERTAINLY = [
    (5, "float_"),
    (6, "float"),
    (9, "bool8"),
    (10, "int0"),
    (10, "product"),
    (10, "math"),
    (11, "float"),
    (12, "NaN"),
    (13, "array(copy=False)"),
    (14, "Inf"),
    (16, "object"),
    (16, "float"),
    (18, "cast"),
    (23, "str"),
    (24, "float_"),
    (25, "alltrue"),
    (27, "who"),
    (29, "array(copy=False)"),
    (31, "ndarray.itemset"),
    (35, "float"),
    (39, "array(copy=False)"),
    (39, "float"),
]


def test_each_spelling_is_certain(found):
    assert found(CERTAIN) == [(line, name, "certain") for line, name in CERTAINLY]


CHECKED = "under a check of versions"
POSSIBLE = {
    "if hasattr(np, 'float'):\n    x = np.float\nelse:\n    x = np.Inf": [CHECKED] * 2,
    "x = np.float if hasattr(np, 'float') else float": [CHECKED],
    "x = hasattr(np, 'float') and np.float": [CHECKED],
    "if np.__version__ < '1.24':\n    x = np.float": [CHECKED],
    "if numpy_lt_2():\n    x = np.float": [CHECKED],
    "def f():\n    if NUMPY_VERSION >= (2,):\n        return np.prod\n    return np.product": [CHECKED],
    "try:\n    x = np.float\nexcept AttributeError:\n    x = float": ["in a try that catches it"],
    "try:\n    x = np.float\nexcept Exception:\n    x = float": ["in a try that catches it"],
    "try:\n    x = np.prod\nexcept AttributeError:\n    x = np.product": ["in place of what is missing"],
    "try:\n    from numpy.lib.array_utils import byte_bounds\nexcept ImportError:\n    from numpy import byte_bounds": [
        "in place of what is missing"
    ],
    "with contextlib.suppress(AttributeError):\n    x = np.float": ["in a block that catches it"],
    "np.float = float\nx = np.float": ["the package sets it itself"],
    "setattr(np, 'float', float)\nx = np.float": ["the package sets it itself"],
    "def f():\n    x: np.float = 1": ["an annotation that is not evaluated"],
    "if TYPE_CHECKING:\n    X = np.float": [CHECKED],
    "try:\n    import numpy as xp\nexcept ImportError:\n    import other as xp\nx = xp.float": ["also bound to something else"],
    "from numpy import *\nx = product([1])": ["by import *"],
    "x = np.array(y, copy=False)": ["if a copy is needed"],
    "def f(y):\n    x = [1]\n    x = y\n    return np.array(x, copy=False)": ["if a copy is needed"],
    "def f(y, copy=False):\n    return np.array(y, copy=copy)": ["if it is false, and a copy is needed"],
    "def f(y):\n    y.itemset(0, 1)": ["if this is an array"],
    "@skipif(np_version < '2')\ndef f():\n    return np.float": [CHECKED],
}
NOTHING = {
    "from . import numpy\nx = numpy.float",
    "def f(np):\n    return np.float",
    "import jax.numpy as np\nx = np.float",
    "x = getattr(np, 'float', float)",
    "x = hasattr(np, 'float')",
    "x = 'np.float'  # np.float",
    "np.float = float",
    "x = [np.float for np in y]",
    "x = np.array(y, copy=None)",
    "from numpy import *\nproduct = 1\nx = product",
    "np = None\nx = os.float",
}


def test_what_is_guarded_shadowed_or_unknown_is_possible(scan, tmp_path):
    sources = [*POSSIBLE, *NOTHING]
    for number, source in enumerate(sources):
        alias = "" if "numpy as np" in source else "import os, contextlib, numpy as np\n"
        (tmp_path / f"{number}.py").write_text(f"{alias}{source}\n")
    rows = scan(*(tmp_path / f"{number}.py" for number in range(len(sources))))["findings"]
    for number, source in enumerate(sources):
        assert [row["doubt"] for row in rows if Path(row["file"]).stem == str(number)] == POSSIBLE.get(source, []), source


def test_a_try_that_has_nothing_to_do_with_numpy_guards_no_handler(found):
    """Only what stands in for something missing is in doubt; a handler that merely goes on is not."""
    source = (
        "import numpy as np\ntry:\n    score()\nexcept Exception:\n    x = np.NaN\ntry:\n    score()\nexcept KeyError:\n    y = np.NaN\n"
    )
    assert found(source) == [(5, "NaN", "certain"), (9, "NaN", "certain")]


def test_lazy_annotations_are_possible(found):
    source = "from __future__ import annotations\nimport numpy as np\ndef f(x: np.float) -> np.float: ...\nclass K:\n    x: np.float\n"
    assert [doubt for _, _, doubt in found(source)] == ["an annotation that is not evaluated"] * 3


CHANGES = {
    "x = np.float(1), np.float": "x = float(1), float",
    "x = 2 ** np.NINF": "x = 2 ** (-np.inf)",
    "x = np.bool8 | np . int0  # np.int0": "x = np.bool_ | np . intp  # np.int0",
    "x = np.in1d([[1]], np.product([1]))": "x = np.in1d([[1]], np.prod([1]))",
    "x = (np\n     .product([1]))": "x = (np\n     .prod([1]))",
    "x = '中文é', np.NaN, 'é'": "x = '中文é', np.nan, 'é'",
    "from numpy import float": "from builtins import float",
    "from numpy import float as real, int": "from builtins import float as real, int",
    "from numpy import array, float, ones, int": "from builtins import float, int\nfrom numpy import array, ones",
    "from numpy import (\n    float,  # a\n    e as a,\n)": None,
    "from numpy import (\n  e as a,\n  int,\n  NaN,\n)": "from builtins import int\nfrom numpy import (\n  e as a,\n  nan as NaN,\n)",
    "from numpy import e, float, int": "from builtins import float, int\nfrom numpy import e",
    "from numpy import float, bool, long": "from builtins import float\nfrom numpy import bool, long",
    "if 1: from numpy import array, object": "if 1: from builtins import object; from numpy import array",
    "x = np.array([1], copy=False)": "x = np.asarray([1])",
    "x = np.array(([1]), copy=False, dtype=int)": "x = np.asarray(([1]), dtype=int)",
    "x = np.array([1], 'f', ndmin=2,\n  copy=False)": "x = np.array([1], 'f', ndmin=2,\n  copy=None)",
    "x = np.array([1],\n  copy=False,\n)": "x = np.asarray([1],\n)",
    "x = np.array([1],  # why\n  copy=False)": None,
    "x = getattr(np, 'float')": None,
    "x = f'{np.NaN}'": None,
    "def f(float):\n    return np.float": None,
    "x = np.cast[int]": None,
}


@pytest.fixture
def toy(tmp_path):
    """toy(source): an environment with this one's numpy and a package toy of one module, toy/sums.py."""

    def make(source, name="env"):
        data = source if isinstance(source, bytes) else source.encode()
        return Toy(tmp_path / name, {"toy/__init__.py": "", "toy/sums.py": data.decode("utf-8", "surrogateescape")})

    return make


def test_only_the_names_are_rewritten(toy, run_script, tmp_path):
    """One package with a module for each change: its patch is applied, gives exactly these texts, and is taken back."""
    head = "import numpy as np\n"
    source = {f"toy/m{number}.py": head + text + "\n" for number, text in enumerate(CHANGES)}
    env = Toy(tmp_path / "env", {"toy/__init__.py": ""} | source)
    before, patches = env.tree(), tmp_path / "patches"
    done = run_script("scan_packages.py", "toy", "--python", env.python, "--write", patches)
    assert done.returncode == 0, done.stderr
    assert (patches / "series").read_text() == "toy/0001-numpy-names.patch\n"
    again = run_script("scan_packages.py", "toy", "--python", env.python, "--write", patches)
    assert again.returncode == 0 and len(list(patches.rglob("*.patch"))) == 1
    tool = ["--python", env.python, "--patches", patches]
    assert run_script("patch_packages.py", "apply", *tool).returncode == 0
    for number, (text, new) in enumerate(CHANGES.items()):
        got = (env.site / f"toy/m{number}.py").read_text()
        assert got == head + (new or text) + "\n", text
        compile(got, "", "exec")
    left = json.loads(run_script("scan_packages.py", "toy", "--python", env.python, "--json").stdout)["findings"]
    assert left and not any(row["mended"] for row in left)
    assert run_script("patch_packages.py", "revert", *tool).returncode == 0
    assert env.tree() == before


def test_np_float_is_float_or_float64(toy, run_script, tmp_path):
    env = toy("import numpy as np\nKIND = np.float\n")
    for word, value in (("float", "float"), ("float64", "np.float64")):
        patch = tmp_path / f"{word}.patch"
        assert run_script("scan_packages.py", "toy", "--python", env.python, "--np-float", word, "--write", patch).returncode == 0
        assert f"\n+KIND = {value}\n" in patch.read_text() and "X-Env: numpy>=1.24\n" in patch.read_text()


def test_another_patch_is_not_overwritten(toy, run_script, tmp_path):
    env, patch = toy("import numpy as np\nKIND = np.float\n"), tmp_path / "some.patch"
    patch.write_text("another\n")
    command = ["scan_packages.py", "toy", "--python", env.python, "--write", patch]
    assert run_script(*command).returncode == 3 and patch.read_text() == "another\n"
    assert run_script(*command, "--overwrite").returncode == 0 and "X-Package: toy\n" in patch.read_text()


def test_usage(toy, run_script, tmp_path):
    env, module = toy("import numpy as np\nx = np.float\n"), tmp_path / "module.py"
    module.write_text("import numpy\n")
    assert run_script("scan_packages.py", module, "--write", tmp_path / "p").returncode == 2
    assert run_script("scan_packages.py", "toy", "packaging", "--python", env.python, "--write", tmp_path / "p.patch").returncode == 2
    unknown = run_script("scan_packages.py", "no-such-thing", "--python", env.python)
    assert unknown.returncode == 1 and "no-such-thing" in unknown.stderr and "Traceback" not in unknown.stderr
    (env.site / "packaging.pth").unlink()
    without = run_script("scan_packages.py", "toy", "--python", env.python)
    assert without.returncode == 1 and "No module named 'numpy'" in without.stderr and "Traceback" not in without.stderr


HOSTILE = {
    "python2": b"import numpy\nprint 'x'\n",
    "nul": b"import numpy\n\0",
    "no_utf8": b"import numpy # \xff\n",
    "no_codec": b"# coding: klingon\nimport numpy\n",
    "deep": b"import numpy\nx = " + b"(" * 500 + b")" * 500,
    "long_chain": b"import numpy as np\nx = np" + b".float" * 3000,
    "many": b"import numpy as np\nx = " + b"+".join([b"1"] * 20000),
    "directory.py/x": b"import numpy\n",
}


def test_no_source_stops_the_scan(scan, tmp_path):
    """What cannot be read is named, and the next file is read; encodings, marks and line ends are taken as Python takes them."""
    for name, data in HOSTILE.items():
        path = tmp_path / "many" / (name if "/" in name else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    fine = {
        "latin": "# coding: latin-1\nimport numpy as np\nx = 'é', np.float\n".encode("latin-1"),
        "mark": b"\xef\xbb\xbfimport numpy as np\nx = np.float\n",
        "dos": b"import numpy as np\r\nx = np.float\r\n",
        "feed": b"import numpy as np\n\x0cx = np.float",
    }
    for name, data in fine.items():
        (tmp_path / "many" / f"{name}.py").write_bytes(data)
    answer = scan(tmp_path / "many")
    files = {Path(row["file"]).stem for row in answer["findings"] if row["symbol"] == "numpy.float"}
    assert files >= set(fine)
    assert {Path(row["file"]).stem for row in answer["unread"]} >= {"python2", "nul", "no_utf8", "no_codec", "deep"}


def test_encodings_and_line_ends_in_patches(tmp_path, run_script):
    """A patch holds no carriage return, so a DOS file is left to a hand; marks and other encodings are kept to the byte."""
    latin = "# coding: latin-1\nimport numpy as np\nx = 'é', np.float\n"
    sources = {"toy/mark.py": "\ufeffimport numpy as np\nx = np.float", "toy/dos.py": "import numpy as np\r\nx = np.float\r\n"}
    env = Toy(tmp_path / "env", {"toy/__init__.py": ""} | sources)
    (env.site / "toy/latin.py").write_bytes(latin.encode("latin-1"))
    with (env.info / "RECORD").open("a") as record:
        record.write("toy/latin.py,,\n")
    patches = tmp_path / "patches"
    assert run_script("scan_packages.py", "toy", "--python", env.python, "--write", patches).returncode == 0
    done = run_script("patch_packages.py", "apply", "--python", env.python, "--patches", patches)
    assert done.returncode == 0, done.stderr
    assert (env.site / "toy/latin.py").read_bytes() == latin.replace("np.float", "float").encode("latin-1")
    assert (env.site / "toy/mark.py").read_bytes() == b"\xef\xbb\xbfimport numpy as np\nx = float"
    assert (env.site / "toy/dos.py").read_bytes() == sources["toy/dos.py"].encode()


def test_random_sources_stay_sound(load_script):
    """Random mixtures of all changes: what edited() gives compiles, and its strings and comments are the same."""
    module, draw = load_script("scan_packages.py"), random.Random(5)
    table, texts = module.removed_names("float"), [text for text in CHANGES if not text.startswith(("def", "if"))]
    facts = {"version": "2.9", "missing": {f"numpy.{name}": [2, ""] for name in table}}

    def mended(source):
        text, _, reader = module.read_python(source.encode())
        every = [edit for finding in module.judge("x.py", text, reader, set(), facts, table) for edit in finding.edits]
        return text, module.edited(text, every), len(every)

    flat = "import numpy as np\nx = np.in1d([[1]], np.product([1]))[0], np.in1d(ar1=1, ar2=2), map(np.in1d, y)\n"
    assert mended(flat)[1] == flat.replace("in1d([[1]], np.product([1]))", "isin([[1]], np.prod([1])).ravel()")
    edits = 0
    for _ in range(200):
        lines = ["import numpy as np", *(draw.choice(texts) for _ in range(8))]
        source = "\n".join(line if draw.random() < 0.7 or "\n" in line else f"if 1:\n\t{line} # np.float 'é'" for line in lines)
        text, new, count = mended(source)
        assert module.words_of(new) == module.words_of(text)
        edits += count
    assert edits > 1000


def test_guarded_code_of_this_environment_is_not_certain(scan):
    """Released packages that support numpy 1 and 2 with one source: what they guard is seen, and never called certain."""
    rows = scan("joblib", "gradio")["findings"]
    assert not [row for row in rows if row["level"] == "certain"]
    assert len({row["symbol"] for row in rows}) >= 4


def proven(old, run_script, tmp_path, package, call):
    """Scan the real package and compare with its patch; return what the call ends with before, after, and when it is taken back."""
    env, patches = old(package), tmp_path / "patches"
    shutil.copytree(PATCHES / package, patches / package)
    (patches / "series").write_text("".join(f"{p.relative_to(PATCHES)}\n" for p in sorted((PATCHES / package).glob("*.patch"))))
    done = run_script("scan_packages.py", package, "--python", env.python, "--write", tmp_path / "made.patch")
    assert done.returncode == 0, done.stderr
    made, kept = (
        path.read_text().partition("X-Sha256:")[2] for path in (tmp_path / "made.patch", PATCHES / package / "0001-numpy-names.patch")
    )
    assert made == kept, "the patch is not what --write makes"

    def files():
        return {p: p.read_bytes() for p in env.site.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    def run():
        done = subprocess.run([env.python, "-c", call], capture_output=True, text=True, env=clean_environment(), cwd=tmp_path)
        return done.stdout.strip() if not done.returncode else re.findall(r"^\w+Error: .*", done.stderr, re.M)[-1]

    def tool(command):
        done = run_script("patch_packages.py", command, "--python", env.python, "--patches", patches, "--json")
        assert done.returncode == 0, done.stderr
        return [row["state"] for row in json.loads(done.stdout)["patches"]]

    pristine, before = files(), run()
    assert tool("apply") == ["applied"]
    patched, after = files(), run()
    assert tool("apply") == ["applied"] and files() == patched != pristine
    rows = json.loads(run_script("scan_packages.py", package, "--python", env.python, "--json").stdout)["findings"]
    assert not [row for row in rows if row["level"] == "certain"]
    assert sound(env.site)
    assert tool("revert") == ["applicable"] and files() == pristine and run() == before
    return before, after


def sound(site):
    """Tell whether all files have the sizes that their RECORDs say."""
    rows = [row for record in site.glob("*.dist-info/RECORD") for row in csv.reader(record.read_text().splitlines()) if row[2]]
    return all((site / path).stat().st_size == int(size) for path, _, size in rows)


@pytest.mark.slow
def test_fasttext_predicts_under_numpy_2(old, run_script, tmp_path):
    (tmp_path / "text").write_text("__label__a one two\n__label__b three four\n" * 20)
    call = "import fasttext; m = fasttext.train_supervised('text', epoch=25, verbose=0); print(m.predict('one')[0], m.get_meter('text')"
    before, after = proven(old, run_script, tmp_path, "fasttext-wheel", call + ".precision_recall_curve()[0].ndim)")
    assert before.startswith("ValueError: Unable to avoid copy") and after == "('__label__a',) 1"


@pytest.mark.slow
def test_gym_steps_under_numpy_2(old, run_script, tmp_path):
    call = "import gym; made = map(gym.make, ('CartPole-v1', 'Acrobot-v1')); print(*(e.reset(seed=0) and len(e.step(0)) for e in made))"
    before, after = proven(old, run_script, tmp_path, "gym", call)
    assert before.startswith("AttributeError: module 'numpy' has no attribute 'bool8'") and after == "5 5"


@pytest.mark.slow
def test_skopt_asks_under_numpy_1_24(old, run_script, tmp_path):
    call = "from skopt import Optimizer; from skopt.space import Integer; print(1 <= Optimizer([Integer(1, 9)]).ask()[0] <= 9)"
    before, after = proven(old, run_script, tmp_path, "scikit-optimize", call)
    assert before.startswith("AttributeError: module 'numpy' has no attribute 'int'") and after == "True"


@pytest.mark.slow
def test_a_module_of_numpy_1_is_named_and_not_patched(old, scan, run_script, tmp_path):
    env = old("faiss-cpu")
    rows = scan("faiss-cpu", "--python", env.python)["findings"]
    modules = {row["file"].partition(".")[0] for row in rows if row["symbol"] == "numpy 1 ABI" and row["level"] == "certain"}
    assert modules == {"faiss/_swigfaiss", "faiss/_swigfaiss_avx2"} and "pin numpy<2" in rows[0]["note"]
    died = subprocess.run([env.python, "-c", "import faiss"], capture_output=True, text=True)
    assert died.returncode and "_ARRAY_API not found" in died.stderr
    assert run_script("scan_packages.py", "faiss-cpu", "--python", env.python, "--write", tmp_path / "p").returncode == 0
    assert not list(tmp_path.rglob("*.patch"))
    new = [path for path in (Path(np.__file__).parent / "random").glob("*.so") if b"_ARRAY_API" in path.read_bytes()]
    assert new and not scan(*new)["findings"] and scan(next(env.site.glob("faiss/_swigfaiss.*.so")))["findings"]


@pytest.mark.slow
def test_each_equivalent_is_one(old, load_script):
    """Under numpy 1.26, which has the old names of 2.0 and 2.4 as well as the new ones, both give the same."""
    module = load_script("scan_packages.py")
    pairs = {
        name: new for name, (_, new, since) in module.removed_names("float").items() if new and since in ("", "1.25") and "()" not in new
    }
    code = """
    import json, sys, warnings
    import numpy as np
    warnings.simplefilter("ignore")
    table, same, calls = json.load(sys.stdin), [], dict.fromkeys(("alltrue", "sometrue", "product", "cumproduct"), [[2.0, 0.5], [3, 0]])
    for name, new in table.items():
        if hasattr(np, name):
            one, other = getattr(np, name), eval(new)
            args = [calls[name]] if name in calls else [1.256, 1] if name == "round_" else None
            equal = repr(one(*args)) == repr(other(*args)) if args else one is other or repr(one) == repr(other)
            same.append((name, bool(equal)))
    print(json.dumps(same))
    """
    done = subprocess.run(
        [old("scikit-optimize").python, "-c", textwrap.dedent(code)], input=json.dumps(pairs), capture_output=True, text=True
    )
    same = json.loads(done.stdout)
    assert len(same) > 40 and not [name for name, equal in same if not equal]
