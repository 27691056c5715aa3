"""mcp_errors.py: the official client over both transports, against a real base; proposals for review are whole lines, each once."""

import asyncio
import json
import multiprocessing
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, clean_environment
from mcp import Client, StdioServerParameters
from test_answer_errors import HEADS, LOG, MINILM, PASTE, RECORDS, Played
from test_serve_vllm import free_port


@pytest.fixture(scope="module")
def folder(run_script, tmp_path_factory):
    """Both scripts and a base of the sample records."""
    folder = tmp_path_factory.mktemp("mcp")
    for name in ("mcp_errors.py", "answer_errors.py"):
        shutil.copy(ROOT / "scripts" / name, folder)
    loaded = run_script("load_milvus.py", "--input", RECORDS, "--output", folder / "kb", "--embed-model", MINILM)
    assert loaded.returncode == 0, loaded.stderr
    return folder


@pytest.fixture(scope="module")
def model():
    played = Played()
    threading.Thread(target=played.serve_forever, daemon=True).start()
    yield played
    played.shutdown()


def words(folder, model, *flags):
    asked = ["--uri", str(folder / "kb/errors.db"), "--llm-url", model.url]
    return ["-I", str(folder / "mcp_errors.py"), "--proposals", str(folder / "proposals.jsonl"), *flags, "--", *asked]


async def meet(target, model):
    """What a client does, whatever the transport."""
    async with Client(target) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search_errors", "answer_error", "add_fix"}
        assert all(tool.description and tool.output_schema for tool in tools.values())
        assert tools["search_errors"].annotations.read_only_hint and not tools["add_fix"].annotations.read_only_hint

        found = (await client.call_tool("search_errors", {"query": LOG, "limit": 4})).structured_content
        assert found["known"] and {record["id"] for record in found["records"]} == HEADS
        assert all(record["fix"] and record["source"] and record["certainty"] > 0 for record in found["records"])
        assert not model.asked, "a search asks no model"
        nothing = (await client.call_tool("search_errors", {"query": "How do I bake bread?"})).structured_content
        assert not nothing["known"] and len(nothing["records"]) == 5

        pieces = []

        async def progress(done, total, message):
            pieces.append(message)

        model.reply = "Take a divisor of 40 [E0014], not [E9999]."
        asked = await client.call_tool("answer_error", {"log": LOG, "question": "Why?"}, progress_callback=progress)
        answer = asked.structured_content
        assert (answer["status"], answer["answer"]) == ("answered", "Take a divisor of 40 [E0014], not .")
        assert [record["source"] for record in answer["cited"]] == ["THU-KEG/AdaptThink#1"]
        assert "E0014" not in {record["id"] for record in answer["nearest"]} and len(answer["nearest"]) == 4
        assert "".join(pieces).startswith("Take a divisor") and len(pieces) > 3, "it streams"
        model.reply = "张量并行数要能整除注意力头数 [E0014]。"
        chinese = (await client.call_tool("answer_error", {"question": f"怎么解决？\n{PASTE}"})).structured_content
        assert chinese["answer"] == model.reply
        unknown = (await client.call_tool("answer_error", {"log": "How do I bake bread?", "lang": "zh"})).structured_content
        assert unknown["status"] == "unknown" and unknown["answer"].startswith("知识库中没有这个错误") and not unknown["cited"]

        for name, arguments, reason in (
            ("answer_error", {}, "the question is empty"),
            ("search_errors", {"query": "x", "limit": 0}, "greater than or equal to 1"),
            ("answer_error", {"log": "x", "lang": "fr"}, "pattern"),
            ("add_fix", {"error": "OwnError: x", "fix": " "}, "needs a text in 'fix'"),
            ("add_fix", {"error": "OwnError: x", "fix": "汉" * 6000}, "'fix' has 18000 bytes in UTF-8"),
        ):
            refused = await client.call_tool(name, arguments)
            assert refused.is_error and reason in refused.content[0].text, refused

        fix = {"error": "OwnError: flux capacitor is cold", "fix": "Warm it up.", "package": "own", "source": "me"}
        noted = await client.call_tool("add_fix", fix)
        again = await client.call_tool("add_fix", fix)
        assert "it is not in the knowledge base" in noted.content[0].text and "proposed before" in again.content[0].text
        searched = (await client.call_tool("search_errors", {"query": fix["error"]})).structured_content
        assert not any(record["fix"] == "Warm it up." for record in searched["records"]), "it waits for review"


@pytest.mark.slow
def test_standard_input_and_output(folder, model, run_script):
    """The client's own process; afterwards the proposals are records that load_milvus.py takes."""
    model.asked.clear()
    asyncio.run(meet(StdioServerParameters(command=sys.executable, args=words(folder, model), env=clean_environment()), model))
    (proposal,) = [json.loads(line) for line in (folder / "proposals.jsonl").read_text(encoding="utf-8").splitlines()]
    assert proposal["error"] == "OwnError: flux capacitor is cold" and proposal["id"].startswith("P") and proposal["proposed"]
    loaded = run_script(
        "load_milvus.py", "--input", RECORDS, folder / "proposals.jsonl", "--output", folder / "both", "--embed-model", MINILM
    )
    assert loaded.returncode == 0 and "326 records" in loaded.stderr, loaded.stderr


@pytest.mark.slow
def test_streamable_http_and_two_servers_of_one_base(folder, model):
    """The second server goes through the first one's process; both end at a signal, and nothing is left of them."""
    (folder / "proposals.jsonl").unlink(missing_ok=True)
    ports = [free_port(), free_port()]
    servers = []
    for port in ports:
        command = [sys.executable, *words(folder, model, "--http", str(port))]
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()))
        assert servers[-1].stdout.readline() == f"http://127.0.0.1:{port}/mcp\n"
    try:
        wait_for(ports)
        for port in ports:
            model.asked.clear()
            (folder / "proposals.jsonl").unlink(missing_ok=True)
            asyncio.run(meet(f"http://127.0.0.1:{port}/mcp", model))
        taken = subprocess.run([sys.executable, *words(folder, model, "--http", str(ports[0]))], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 1 and taken.stderr.endswith("give --http another port\n") and "Address already in use" in taken.stderr
    finally:
        for server in servers:
            server.send_signal(signal.SIGINT)
        ends = [(server.wait(30), server.stderr.read()) for server in servers]
    assert all(code == 0 and "Traceback" not in error for code, error in ends), ends


def wait_for(ports):
    for port in ports:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)


@pytest.mark.slow
def test_a_base_that_cannot_be_asked_is_a_sentence(folder, model, tmp_path):
    async def ask(*args):
        async with Client(StdioServerParameters(command=sys.executable, args=list(args), env=clean_environment())) as client:
            return await client.call_tool("search_errors", {"query": "x"})

    none = asyncio.run(ask("-I", str(folder / "mcp_errors.py"), "--", "--uri", str(tmp_path / "none.db")))
    assert none.is_error and "none.db: no such Milvus Lite database" in none.content[0].text
    alone = shutil.copy(ROOT / "scripts/mcp_errors.py", tmp_path)
    gone = asyncio.run(ask("-I", str(alone), "--", "--uri", str(folder / "kb/errors.db")))
    assert gone.is_error and "answer_errors.py" in gone.content[0].text
    flag = asyncio.run(ask("-I", str(folder / "mcp_errors.py"), "--", "--no-such-flag"))
    assert flag.is_error and "--no-such-flag" in flag.content[0].text


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("mcp_errors.py")


def many(path, number):
    sys.path.insert(0, str(ROOT / "scripts"))
    import mcp_errors

    for n in range(50):
        mcp_errors.propose(path, {"error": f"E {n % 25} {number if n % 2 else ''}", "fix": "汉" * 3000})


def test_proposals_of_several_servers_are_whole_lines_each_once(script, tmp_path):
    path = tmp_path / "new/proposals.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=many, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    proposals = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    contents = {(proposal["error"], proposal["fix"]) for proposal in proposals}
    assert len(proposals) == len(contents) == len({proposal["id"] for proposal in proposals})
    expected = {(f"E {n % 25} {number if n % 2 else ''}".strip(), "汉" * 3000) for n in range(50) for number in range(4)}
    assert contents == expected


def test_half_a_line_of_a_killed_writer_goes(script, tmp_path):
    path = tmp_path / "p.jsonl"
    name, fresh = script.propose(path, {"error": " A ", "fix": "b", "cause": "", "source": None})
    assert fresh and script.propose(path, {"error": "A", "fix": "b"}) == (name, False)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "P0000')
    other, fresh = script.propose(path, {"error": "C", "fix": "d"})
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert fresh and [line["id"] for line in lines] == [name, other] and path.read_bytes().startswith(whole)
    assert set(lines[0]) == {"id", "error", "fix", "proposed"}
    with pytest.raises(ValueError, match="lone surrogate"):
        script.propose(path, {"error": "\ud800", "fix": "d"})
