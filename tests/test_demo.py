"""`make demo` as a user meets it: a copy of the tracked files, interrupted three times, gone on with, and looked at afterwards."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, clean_environment

pytestmark = pytest.mark.slow
STAGES = ["clean-text", "dedup", "tokenizer", "tokens", "pretrain", "convert", "serve-pretrained"]
STAGES += ["base-model", "sft-data", "sft", "kb", "ask"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Checkout:
    """A copy of what git tracks, in which `make` runs with the interpreter of this test run."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, tracked.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def start(self, *words):
        command = ["make", *words, f"PYTHON={sys.executable}", f"PORT={self.port}"]
        environment = {k: v for k, v in clean_environment().items() if k not in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
        log = open(self.folder / "log.txt", "ab")
        return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True, env=environment)

    def manifest(self, stage):
        path = self.folder / f"data/out/demo/{stage}/manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def processes(self):
        """Return the living processes that were started in this checkout: by working folder, or by command line."""
        mine = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in process.cwd() or str(self.folder) in " ".join(process.cmdline()):
                    mine.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [p for p in mine if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def interrupt(self, process, how, until):
        """Wait until `until()` holds, then end the whole session as a terminal or the kernel would; no process may outlive it."""
        deadline = time.monotonic() + 900
        while not until():
            assert process.poll() is None, self.log()[-3000:]
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.1)
        os.killpg(process.pid, how)
        process.wait(timeout=120)
        deadline = time.monotonic() + 120
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not self.processes(), "a process outlived the interrupted run"

    def log(self):
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, after kill -9 while text is deduplicated, Ctrl-C while the model trains, and kill -9 while the server answers."""
    checkout = Checkout(tmp_path_factory.mktemp("demo"))
    out = checkout.folder / "data/out/demo"
    checkout.interrupt(checkout.start("demo"), signal.SIGKILL, lambda: (out / "dedup/.begun.json").exists())
    assert checkout.manifest("dedup") is None
    metrics = out / "pretrain/metrics.jsonl"
    checkout.interrupt(checkout.start("demo"), signal.SIGINT, lambda: metrics.exists() and metrics.stat().st_size > 2000)
    assert checkout.manifest("pretrain") is None
    checkout.interrupt(checkout.start("demo"), signal.SIGKILL, lambda: (out / "ask/.begun.json").exists())
    assert checkout.manifest("ask") is None
    last = checkout.start("demo")
    assert last.wait(timeout=1500) == 0, checkout.log()[-5000:]
    return checkout


def test_every_stage_is_whole_and_in_the_table(demo):
    table = demo.log().split("stage ")[-1]
    for stage in STAGES:
        assert demo.manifest(stage)["summary"] in table
        for file in demo.manifest(stage)["outputs"]:
            assert (demo.folder / file["path"]).stat().st_size == file["bytes"] or stage == "kb", file["path"]


def test_nothing_is_left_running(demo):
    assert not demo.processes()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", demo.port)) != 0


def test_the_language_model_has_learnt(demo):
    metrics = demo.manifest("pretrain")["metrics"]
    assert metrics["last"]["held_out_loss"] < 0.8 * metrics["first"]["held_out_loss"], metrics


def test_logits_are_equal_and_vllm_decodes_the_same_tokens(demo):
    assert demo.manifest("convert")["metrics"]["max_abs_logit_difference"] == 0
    assert len(list((demo.folder / "data/out/demo/convert").glob("model-*-of-*.safetensors"))) >= 2
    assert demo.manifest("serve-pretrained")["metrics"]["greedy_equal"] is True


def test_the_answers_cite_what_was_asked(demo):
    answers = [json.loads(line) for line in (demo.folder / "data/out/demo/ask/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 3
    assert any(re.search("[\u4e00-\u9fff]", answer["question"]) for answer in answers)
    for answer in answers:
        assert answer["cited"], answer
        assert set(answer["cited"]) <= {record["id"] for record in answer["records"]}
        assert all(f"[{name}" in answer["answer"] or f" {name}" in answer["answer"] for name in answer["cited"])
    assert demo.manifest("ask")["metrics"]["right_cited"] == 3


def test_a_second_run_only_prints_the_table(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.folder.glob("data/out/demo/*/*")}
    answer = subprocess.run(
        ["make", "demo", f"PYTHON={sys.executable}"], cwd=demo.folder, capture_output=True, text=True, env=clean_environment()
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert len(answer.stdout.splitlines()) == len(STAGES) + 2
    assert {path: path.stat().st_mtime_ns for path in demo.folder.glob("data/out/demo/*/*")} == before


def test_an_edited_recipe_reruns_its_stage_and_puts_the_old_run_aside(demo):
    recipe = demo.folder / "recipes/demo/sft-data.yaml"
    recipe.write_text(recipe.read_text() + "limit: 100000\n")
    answer = subprocess.run(
        ["make", "sft-data", f"PYTHON={sys.executable}"], cwd=demo.folder, capture_output=True, text=True, env=clean_environment()
    )
    assert answer.returncode == 0, answer.stderr
    assert "limit was None, is 100000" in answer.stderr
    assert len(list(demo.folder.glob("data/out/demo/sft-data.old-*/manifest.json"))) == 1


def test_a_question_on_the_command_line_needs_no_server(demo):
    question = 'ValueError: No available memory for the cache blocks. "$HOME" `x`'
    answer = subprocess.run(
        ["make", "ask", f"PYTHON={sys.executable}", f"PORT={demo.port}"],
        input=question, cwd=demo.folder, capture_output=True, text=True, env=clean_environment(),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"\[E\d{4}\]", answer.stdout)


def test_manifests_name_what_made_them(demo):
    for stage in STAGES:
        manifest = demo.manifest(stage)
        assert {
            "schema_version",
            "argv",
            "settings",
            "inputs",
            "outputs",
            "counts",
            "metrics",
            "packages",
            "patches",
            "git",
            "hardware",
        } <= set(manifest)
        assert manifest["stage"] == stage
        assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in manifest["inputs"] + manifest["outputs"])
    assert "ai2-olmo/0001-autocast-by-device" in demo.manifest("pretrain")["patches"]
    assert Path(demo.manifest("convert")["inputs"][0]["path"]).is_relative_to("data/out/demo/pretrain")
