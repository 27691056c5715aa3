"""A real Milvus server, PyPI's milvus 2.3.5 with a token, gives what Milvus Lite gives; fuzzed input is loaded or told of."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings

import pytest
from conftest import clean_environment

pytestmark = pytest.mark.slow
TOKEN = "root:Milvus"
QUERIES = int(os.environ.get("FUZZ_QUERIES", "300"))  # 10,000 take minutes
KINDS = ("CUDA out of memory in step", "cannot import name", "unexpected keyword argument", "no such file", "size mismatch for layer")


def records(count):
    """Return `count` records with errors of their own."""
    letters = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "npqrstvwxz"]
    names = [letters[n % 500].title() + letters[n * 7 % 500].title() for n in range(count)]
    return [{"id": f"S{n}", "error": f"{KINDS[n % 5]} {name}", "fix": f"fix {n}", "tags": [str(n)]} for n, name in enumerate(names)]


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_main(script, *arguments):
    """Run a script's main() in this process, which imports the model's packages once; return the exit code."""
    from milvus_lite.server_manager import server_manager_instance

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        try:
            script.main()
        except SystemExit as stop:
            return stop.code or 0
        finally:
            logging.disable(logging.NOTSET)
            server_manager_instance.release_all()
    return 0


@pytest.fixture(scope="module")
def loader(load_script):
    return load_script("load_milvus.py")


@pytest.fixture(scope="module")
def answers(load_script):
    return load_script("answer_errors.py")


class Server:
    """A Milvus server process of our own, with its data in a folder."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        packages = folder / "packages"
        install = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", "--target", packages, "milvus==2.3.5"]
        subprocess.run([sys.executable, "-m", *map(str, install)], check=True, capture_output=True, text=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        """Start it and wait until it answers."""
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException

        words = ["--data", self.folder / "data", "--proxy-port", self.port, "--extra-config", "common.security.authorizationEnabled=true"]
        code = "import sys; sys.argv[0] = 'milvus-server'; from milvus import main; main()"
        environment = clean_environment() | {"PYTHONPATH": str(self.folder / "packages")}
        with open(self.folder / "server.log", "ab") as log:
            command = [sys.executable, "-c", code, *map(str, words)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.time() + 300
        while True:
            try:
                client = MilvusClient(self.uri, token=TOKEN, timeout=5)
                client.has_collection("none")
                return client.close()
            except MilvusException:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                assert time.time() < deadline, "the server does not answer"
                time.sleep(0.5)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("milvus"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


def search_all(answers, uri, token, questions):
    """Return for each question [(id, certainty)] of the five best records."""
    from milvus_lite.server_manager import server_manager_instance

    base = answers.KnowledgeBase(str(uri), token, "mcp_errors", None)
    found = [[(record["id"], round(record["certainty"], 3)) for record in base.search(question, 5)[0]] for question in questions]
    base.client.close()
    server_manager_instance.release_all()
    return found


def test_load_search_and_sync_as_with_lite(server, loader, answers, tiny_model, tmp_path, capsys):
    rows = records(300)
    arguments = ["--input", dump(tmp_path / "r.jsonl", rows), "--embed-model", tiny_model("bge-m3")]
    token = ["--uri", server.uri, "--token", TOKEN]
    assert run_main(loader, *arguments, "--output", tmp_path / "lite") == 0
    assert run_main(loader, *arguments, *token, "--output", tmp_path / "1") == 0, capsys.readouterr().err
    questions = [row["error"] for row in rows[:40]] + ["cannot import name", "显存 CUDA out of memory"]
    assert search_all(answers, server.uri, TOKEN, questions) == search_all(answers, tmp_path / "lite/errors.db", "", questions)

    dump(tmp_path / "r.jsonl", [rows[0] | {"fix": "another"}, *rows[1:290]])
    assert run_main(loader, *arguments, *token, "--output", tmp_path / "2", "--sync") == 0
    counts = json.loads((tmp_path / "2/manifest.json").read_text())["counts"]
    assert counts.items() >= {"inserted": 0, "changed": 1, "deleted": 10, "unchanged": 289, "in_collection": 290}.items()
    assert "hunter2" not in (tmp_path / "2/manifest.json").read_text()
    gone = search_all(answers, server.uri, TOKEN, [rows[295]["error"]])[0]
    assert "S295" not in dict(gone)


def test_a_wrong_token_is_one_sentence(server, run_script, tmp_path):
    dump(tmp_path / "r.jsonl", records(3))
    words = ["--uri", server.uri, "--token", "root:hunter2"]
    for name, more in (("load_milvus.py", ["--input", "r.jsonl", "--output", "kb"]), ("answer_errors.py", ["--no-llm", "x"])):
        result = run_script(name, *words, *more, cwd=tmp_path)
        assert result.returncode == 1
        assert f"no Milvus answers at {server.uri}" in result.stderr
        assert "--token" in result.stderr
        assert (result.stderr.count("\n"), "hunter2" in result.stderr) == (1, False)
    assert not (tmp_path / "kb/manifest.json").exists()


# fmt: off
PIECES = (
    "", " ", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x07\x08", "\x7f\x85\u2028", "\ufeff", "\u202eerror\u202c",
    "שגיאה", "خطأ", "👩‍👩‍👧", "e\u0301" * 20, "显存不足",
    "CUDA out of memory", "ValueError: x", "Traceback (most recent call last):", "[E0001]",
    "'\"\\", "{}[]()",
    "(" * 300, "a" * 5000, "1 " * 900, "INFO 11-03 19:15:02 x.py:1] ", "ERROR", "/a/b/c/", "%s %d", "null", "=" * 80, "汉" * 700,
)
NO_RECORDS = (7, None, [], "x", {}, {"fix": "f"}, {"error": None}, {"error": [1]}, [[[]]], {"error": "x", "id": "a b"})
# fmt: on


def fuzzed_text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12))) + (
        rng.choice(["\ud800", "\udfff"]) if rng.random() < 0.02 else ""
    )


def fuzzed_line(number, rng):
    """Return one line of a JSONL file as bytes: a record whose fields are anything, or no record at all."""
    kind = rng.random()
    if kind < 0.04:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 60))).replace(b"\n", b" ")
    if kind < 0.06:
        return json.dumps(rng.choice(NO_RECORDS)).encode()
    record = {"id": f"F{number}", "error": fuzzed_text(rng), "fix": fuzzed_text(rng), "package": rng.choice(["", "vllm", fuzzed_text(rng)])}
    more = [*[{}] * 9, {"also": [fuzzed_text(rng)]}, {"tags": fuzzed_text(rng)}, {"meta": {"deep": [[{}]] * 9}}, {"source": "汉" * 30000}]
    record |= rng.choice(more)
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def test_fuzzed_records_are_loaded_or_rejected_with_a_reason(loader, answers, tiny_model, tmp_path):
    """10,000 lines, one of 10 MB: each is in the base as it was, or in rejected.jsonl; then queries of the same kind."""
    rng = random.Random(7)
    lines = [fuzzed_line(number, rng) for number in range(9998)] + [json.dumps({"id": "LONG", "error": "x" * 10_000_000}).encode(), b""]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    arguments = ["--input", tmp_path / "f.jsonl", "--output", tmp_path / "kb", "--embed-model", tiny_model("bge-m3")]
    assert run_main(loader, *arguments) == 0
    rejected = {}
    for row in map(json.loads, (tmp_path / "kb/rejected.jsonl").read_bytes().splitlines()):
        assert row["reason"]
        rejected[row["line"]] = row
    assert "9999" in str(rejected[9999]["line"])
    assert "10000000 bytes" in rejected[9999]["reason"]
    base = answers.KnowledgeBase(str(tmp_path / "kb/errors.db"), "", "mcp_errors", None)
    stored, pages = {}, base.client.query_iterator("mcp_errors", batch_size=5000, output_fields=["id", "error", "fix"])
    while page := pages.next():
        stored |= {row["id"]: (row["error"], row["fix"]) for row in page}
    lost = []
    for number, line in enumerate(lines, 1):
        if line.strip() and number not in rejected:
            record = json.loads(line)
            lost += [number] if stored.get(record["id"]) != (record["error"].strip(), record["fix"].strip()) else []
    assert lost == []
    assert 5000 < len(stored) == json.loads((tmp_path / "kb/manifest.json").read_text())["counts"]["in_collection"]
    queries = ["", "\0", "x" * 10_000_000, "\ud800", "\n" * 1000, *(fuzzed_text(rng) for _ in range(QUERIES - 5))]
    for query in queries:
        found, line, _ = base.search(query, 5)
        assert len(found) == 5
        assert all(0 <= record["certainty"] <= 1 for record in found)
    base.client.close()
