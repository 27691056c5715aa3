"""Fixtures: each script is run as a user runs it, copied alone into an empty folder, and its functions are loaded from the file."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def clean_environment():
    """Return the environment of a user's shell on a small machine: offline, no telemetry, one thread a process."""
    keep = {
        k: v
        for k, v in os.environ.items()
        if k != "PYTHONDONTWRITEBYTECODE" and not k.startswith(("CUDA_VISIBLE", "MAKE", "MFLAGS", "VLLM_"))
    }
    quiet = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    return keep | quiet | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """What serve_vllm.py notes about running servers, and their logs, stay out of the home folder."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """run_script("name.py", *args, cwd=…, input=…, env=…): run a copy that stands alone in a folder; returns CompletedProcess (text)."""
    alone = tmp_path_factory.mktemp("alone")

    def run(name, *args, env=None, timeout=600, **kwargs):
        script = alone / name
        if not script.exists():
            shutil.copy(ROOT / "scripts" / name, script)
        command = [sys.executable, "-I", str(script), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=clean_environment() | (env or {}), **kwargs)

    return run


@pytest.fixture(scope="session")
def load_script():
    """load_script("name.py"): the script as a module, for tests of its pure functions."""

    def load(name):
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "scripts" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model("bge-m3"): a folder of that name with a BERT of random weights, 32 dimensions, as the hub gives one without pooling."""

    def make(name):
        folder = tmp_path_factory.getbasetemp() / "models" / name
        if not folder.exists():
            import torch
            from transformers import BertConfig, BertModel, BertTokenizerFast

            folder.mkdir(parents=True)
            letters = [chr(n) for n in range(33, 127)] + list("显存不足查询句子生成表示以用于检索相关文章：这个为")
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
            (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.5}
            BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
            BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
        return folder

    return make
