"""What the clients of a served model meet: talk_model.py, the README's examples, Prometheus, and two hundred streams at a time.

One server for all of them, started as users start it: the small instruct model, greedy, answers of at most 48 tokens.
"""

import asyncio
import fcntl
import importlib.util
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import ROOT, clean_environment
from prometheus_client.parser import text_string_to_metric_families
from test_serve_vllm import free_port, wait_until

NAME = "smollm2-135m-sft"  # as the README's examples call it
GREEDY = json.dumps({"temperature": 0, "max_new_tokens": 48})
SCRIPT = ROOT / "scripts" / "talk_model.py"
LONG = "Write a long story about a river."
CLIENTS, SECONDS = 200, 60


@pytest.fixture(scope="module")
def server(tmp_path_factory, run_script):
    """A server of the small instruct model: its port, its process, its /metrics."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    model = folder / "model"
    exported = run_script("export_gguf_to_hf.py", "--config", ROOT / "recipes/demo/base-model.yaml", "--output", model, cwd=ROOT)
    assert exported.returncode == 0, exported.stderr
    words = ["--config", "recipes/demo/serve.yaml", "--model", model, "--served-model-name", NAME, "--port", port]
    words += ["--", "--override-generation-config", GREEDY]
    log = folder / "serve.log"
    with open(log, "w") as file:
        command = [sys.executable, "scripts/serve_vllm.py", *map(str, words)]
        # By default oneDNN keeps the kernels of 1,024 shapes of batches, hundreds of MB, which look like a leak until they are all there
        env = clean_environment() | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout.readline() == f"http://127.0.0.1:{port}/v1\n", log.read_text()

    def metrics():
        """Return [(name, labels, value)] of all samples."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def busy():
        """Return the number of requests that the engine holds."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(value for name, _, value in metrics() if name in names)

    yield SimpleNamespace(model=model, port=port, url=f"http://127.0.0.1:{port}/v1", process=process, metrics=metrics, busy=busy)
    process.terminate()
    assert process.wait(120) == 0, log.read_text()


def talk(*words, said="", env=None, cwd=None):
    """Run talk_model.py with `said` on its standard input."""
    command = [sys.executable, "-I", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=300, env=clean_environment() | (env or {}), cwd=cwd)


class Terminal:
    """talk_model.py in a terminal of its own."""

    def __init__(self, *words):
        def attach():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and hand that down

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), *map(str, words)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=clean_environment() | {"TERM": "xterm"},
            preexec_fn=attach,
        )  # fmt: skip
        os.close(slave)

    def until(self, pattern):
        """Return what is shown up to a match of `pattern`."""
        shown, end = b"", time.monotonic() + 120
        while not re.search(pattern, shown.decode(errors="replace"), re.S):
            assert select.select([self.master], [], [], max(0, end - time.monotonic()))[0], f"no {pattern!r} in {shown.decode()!r}"
            shown += os.read(self.master, 65536)
        return shown.decode(errors="replace")

    def type(self, text, pattern):
        os.write(self.master, text.encode())
        return self.until(pattern)

    def pause(self):
        """Wait as a person does before a control key: just before readline reads, Python notes it only at the next key."""
        time.sleep(1)


@pytest.mark.slow
def test_a_talk_in_a_terminal(server, tmp_path, run_script):
    output = tmp_path / "talks.jsonl"
    terminal = Terminal("--url", server.url, "--output", output)
    terminal.until("> ")
    terminal.type("/system Answer in one sentence.\r", "system message set")
    assert "Paris" in terminal.type("What is the capital of France?\r", r"\d+ tokens, [\d.]+ tokens/s, the first after [\d.]+ s\x1b")
    # Ctrl-C ends the answer, here and in the server, and the talk goes on; the deleted letter is two columns wide
    terminal.type("中文字\x7f是什么？ " + LONG + "\r", r"river\.\r\n.*\w+ \w+ ")
    terminal.type("\x03", "about .* interrupted")
    assert wait_until(lambda: not server.busy(), 30)
    terminal.type(LONG + "\r", "the first after .*> ")
    assert "; a space before it" in terminal.type("/sing\r", "no such command.*> ")
    terminal.type("/save\r", "holds 1 talks")
    terminal.type("/undo\r", "took back: Write")
    terminal.type("/undo\r", "took back: 中文是什么")
    terminal.type("What is the capital of Spain?\r", "the first after .*> ")
    terminal.type("/retry\r", "the first after .*> ")
    terminal.type("/save\r", "holds 1 talks.*> ")
    terminal.pause()
    terminal.type("\x03", "Ctrl-D ends the talk")
    terminal.type('/reset\r"""\rTwo\rlines\r"""\r', "the first after .*> ")
    terminal.type("/save\r", "holds 2 talks.*> ")
    terminal.pause()
    os.write(terminal.master, b"\x04")
    assert terminal.process.wait(30) == 0
    first, second = (json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in first["messages"]][:2] == ["Answer in one sentence.", "What is the capital of France?"]
    assert first["messages"][3]["content"] == "What is the capital of Spain?"
    assert [message["content"] for message in second["messages"] if message["role"] == "user"] == ["Two\nlines"]
    done = run_script("convert_sft_format.py", "--input", output, "--output", tmp_path / "sft", cwd=tmp_path)
    assert done.returncode == 0 and "kept 2 of 2" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_talk_from_a_file(server, tmp_path):
    """An answer that was cut off is saved, but not to be trained on; a question that the server refuses fails the run."""
    answer = talk("--url", server.url, said=f"What is the capital of France?\n{LONG}\n/save\n", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("The capital of France is Paris")
    assert "finish_reason length" in answer.stderr and "\x1b" not in answer.stdout + answer.stderr
    row = json.loads((tmp_path / "talks.jsonl").read_text(encoding="utf-8"))
    assert [message.get("weight") for message in row["messages"]] == [None, None, None, 0]
    assert answer.stdout.splitlines()[0] == row["messages"][1]["content"]
    answer = talk("--url", server.url, said="word " * 4000 + "\nWhat is the capital of France?\n")
    assert answer.returncode == 1
    assert "400" in answer.stderr and "context length" in answer.stderr and "/reset begins anew" in answer.stderr
    assert "Paris" in answer.stdout


@pytest.mark.slow
def test_a_model_that_is_not_served(server):
    answer = talk("--url", server.url, "--model", "gpt-x")
    assert answer.returncode == 1
    assert answer.stderr == f"talk_model: {server.url} serves {NAME}, not gpt-x; look at --model\n"
    answer = talk("--url", server.url.removesuffix("/v1"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("talk_model: the server refuses: 404 ") and answer.stderr.endswith("does the URL end in /v1?\n")


def test_no_server_or_another_is_one_sentence(tmp_path):
    port = free_port()
    answer = talk("--url", f"http://127.0.0.1:{port}/v1", env={"http_proxy": "http://192.0.2.1:9"})
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"talk_model: no answer from http://127.0.0.1:{port}/v1 ") and answer.stderr.count("\n") == 1
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/models").write_text("<html>A page.</html>")
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until(lambda: "lists no models" in talk("--url", f"http://127.0.0.1:{port}/v1").stderr, 30)
    finally:
        other.kill()
        other.wait()
    answer = talk("--url", "127.0.0.1:8051")
    assert answer.returncode == 1 and "--url names another" in answer.stderr and "Traceback" not in answer.stderr


def readme_blocks(word):
    """Return the README's code blocks that hold `word`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [block for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M) if word in block]
    assert found, f"no example with {word!r} in README.md"
    return found


@pytest.mark.slow
def test_the_readmes_examples_of_clients_run(server):
    programs = [[sys.executable, "-c", block] for block in readme_blocks("from openai import")]
    curls = [["bash", "-euc", block] for block in readme_blocks("curl http://127.0.0.1:8051/v1")]
    for program in programs + (curls if shutil.which("curl") else []):
        program[-1] = program[-1].replace("8051", str(server.port))
        answer = subprocess.run(program, capture_output=True, text=True, timeout=300, env=clean_environment())
        assert answer.returncode == 0, answer.stderr
        assert "Paris" in answer.stdout, answer.stdout


def metrics_of(expression):
    """Return [(metric, labels that are selected or grouped by)] of a PromQL expression."""
    grouped = {label.strip() for labels in re.findall(r"\bby \((.*?)\)", expression) for label in labels.split(",")}
    used = re.findall(r"([a-z][\w:]*)\{(.*?)\}", expression)
    return [(name, set(re.findall(r"(\w+)=~", selector)) | grouped) for name, selector in used]


@pytest.mark.slow
def test_the_dashboard_asks_for_what_the_server_exports(server):
    board = json.loads((ROOT / "recipes/serve/grafana.json").read_text(encoding="utf-8"))
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    panels, exported = board["panels"], {}
    for name, labels, _ in server.metrics():
        exported.setdefault(name, {"job", "instance"}).update(labels)  # these two are Prometheus's own
    exported["up"] = {"job", "instance"}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels) > 10
    places = [SimpleNamespace(**panel["gridPos"]) for panel in panels]
    cells = {(place.x + x, place.y + y) for place in places for x in range(place.w) for y in range(place.h)}
    assert len(cells) == sum(place.w * place.h for place in places) and max(cells)[0] < 24, "panels overlap, or leave the screen"
    for panel in panels:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}
            assert metrics_of(target["expr"])
            for metric, labels in metrics_of(target["expr"]):
                assert labels <= exported.get(metric, set()), f"{panel['title']}: {metric} with {labels - exported.get(metric, set())}"
    assert {"Tokens a second", "Time to first token", "KV cache used"} <= {panel["title"] for panel in panels}


def test_the_scrape_job_is_one_of_the_port_that_we_serve_on():
    config = yaml.safe_load((ROOT / "recipes/serve/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    port = re.search(r"^PORT \?= (\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert set(job) <= {"job_name", "scrape_interval", "static_configs"}  # metrics_path and scheme are as vLLM has them


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_serve", ROOT / "tests/bench/bench_serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_measures_and_a_mode_that_does_not_start_is_a_row(server, bench, tmp_path, monkeypatch, capsys):
    """The user's TORCHDYNAMO_DISABLE=1 stops a bare `vllm serve`; figures come from the running server, under the name that it has."""
    words = ["--model", str(server.model), "--recipe", str(ROOT / "recipes/demo/serve.yaml"), "--port", str(free_port())]
    args = bench.build_parser().parse_args([*words, "--requests", "4", "--concurrency", "2", "--output-tokens", "8"])
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)  # trl sets it where a test before this one has imported it
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench, "NAME", NAME)
    figures = bench.Bench(args, tmp_path).measure(server.process.pid, server.port, 0)
    assert set(figures) == set(bench.FIGURES) and all(value > 0 for value in figures.values())
    row = bench.Bench(args, tmp_path).mode("compiled, TORCHDYNAMO_DISABLE=1")
    assert re.search(r"\w+Error: .*aot_compile", row["failed"])
    bench.report([{"bare": figures, "ours": {name: 2 * value for name, value in figures.items()}}], {"compiled": row})
    shown = capsys.readouterr().out
    assert "| mean ratio within a pair | 2.000 | 2.000 | 2.000 | 2.000 |" in shown
    assert f"| compiled | fails: {row['failed']} |" in shown


async def stream(port, chance, tally):
    """One request of a client who may leave: before the answer, in its middle, or not at all."""
    tokens = chance.randint(1, 12)
    patience = chance.choice([0, chance.randint(1, tokens), *[tokens + 9] * 3])  # lines of data that it waits for
    message = {"role": "user", "content": f"{chance.random()} {LONG}"}
    asked = {"model": NAME, "messages": [message], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        await writer.drain()
        lines = []
        while patience and (line := await reader.readline()):
            if line.startswith(b"data: "):
                lines.append(line[6:].strip())
                patience -= 1
        if not patience:
            tally["left"] += 1
            writer.transport.abort()
        elif not lines or lines[-1] != b"[DONE]" or json.loads(lines[-2])["usage"]["completion_tokens"] != tokens:
            tally["broken"].append(lines[-3:])
        else:
            tally["finished"] += 1
    finally:
        writer.close()


def load(port, seconds, seed):
    """Keep CLIENTS streams open for `seconds`; return {"finished", "left", "broken"}."""
    tally = {"finished": 0, "left": 0, "broken": []}

    async def client(number):
        chance, end = random.Random(f"{seed} {number}"), time.monotonic() + seconds
        while time.monotonic() < end:
            await stream(port, chance, tally)

    async def clients():
        await asyncio.gather(*map(client, range(CLIENTS)))

    asyncio.run(clients())
    return tally


def holdings(process):
    """Return ({pid: (open files, threads)}, {name: resident bytes}) of a process and all below it."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    memory = {}
    for each in tree:
        memory[each.name()] = memory.get(each.name(), 0) + each.memory_info().rss
    return {each.pid: (each.num_fds(), each.num_threads()) for each in tree}, memory


@pytest.mark.slow
def test_two_hundred_streams_and_clients_who_leave(server):
    """Afterwards the server holds what it held before: processes, threads, files, memory; no request is left in it."""
    load(server.port, 20, "warm up")
    assert wait_until(lambda: not server.busy(), 60)
    before, memory = holdings(server.process)
    tally = load(server.port, SECONDS, "load")
    assert tally["broken"] == []
    assert tally["finished"] > CLIENTS and tally["left"] > CLIENTS / 2, tally
    assert wait_until(lambda: not server.busy(), 60)
    assert wait_until(lambda: holdings(server.process)[0] == before, 30), (before, holdings(server.process)[0])
    grown = {name: size - memory[name] for name, size in holdings(server.process)[1].items()}
    assert sum(grown.values()) < 160 << 20, grown
