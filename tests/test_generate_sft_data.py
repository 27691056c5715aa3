"""generate_sft_data.py: no answer is asked for twice or lost, whatever the server does; a drop says why; batches give the same rows.

The counterpart of the fast tests is a small HTTP server that fails on demand; the slow ones run vLLM itself.
"""

import gzip
import json
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import test_serve_vllm
from conftest import ROOT, clean_environment

SCRIPT = "generate_sft_data.py"
TEXT = "A list can be changed after it is made. A tuple cannot be changed.\nTuples can be keys of a dictionary; 元组可以\n作为字典的键。"
QA = """{#
description: a document -> questions
needs: [text]
steps:
  qa: {response: json, sampling: {temperature: 0, max_tokens: 99}}
messages:
  - {role: user, content: "{{ text }} {{ question }}"}
  - {role: assistant, content: "{{ answer }}"}
filters:
  quote: {evidence: text}
  length: {answer: [5, 200]}
  language: [answer]
  unlike: {question: text}
  grounded: {answer: [text, 0.2]}
  reject: {answer: '(?i)as an ai'}
#}
{% block qa_system %}Be exact.{% endblock %}
{% block qa %}{{ text }} Ask in {{ language_name }}.{% endblock %}
"""
ECHO = """{#
needs: [word]
steps: {answer: {n: 1, sampling: {temperature: 0.5, max_tokens: 9}}}
messages: [{role: user, content: "{{ word }}"}, {role: assistant, content: "{{ answer }}"}]
#}
{% block answer %}{{ word }}{% endblock %}
"""


def reply(content, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class Server:
    """An OpenAI-compatible server: `answer(body, attempt)` gives a body, (status, headers), "drop" or seconds to hang."""

    def __init__(self, answer, delay=0.0):
        self.asked, self.flying, self.most, lock = Counter(), 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def send(self, status, body, headers=()):
                data = json.dumps(body).encode()
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]} if self.path == "/v1/models" else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = body["messages"][-1]["content"]
                with lock:
                    outer.asked[key] += 1
                    outer.flying += 1
                    outer.most, attempt = max(outer.most, outer.flying), outer.asked[key]
                time.sleep(delay)
                what = answer(body, attempt)
                with lock:
                    outer.flying -= 1
                if what == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif isinstance(what, float):
                    time.sleep(what)
                    self.close_connection = True
                elif isinstance(what, tuple):
                    self.send(what[0], {"error": {"message": f"status {what[0]}"}}, what[1])
                else:
                    self.send(200, what)

            def log_message(self, *words):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    """serve(answer): a Server that ends with the test."""
    servers = []

    def start(*words, **more):
        servers.append(Server(*words, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def script(load_script):
    return load_script(SCRIPT)


@pytest.fixture
def work(tmp_path):
    """A folder with seeds.jsonl of 30 words and the template echo."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/echo.jinja").write_text(ECHO)
    write_rows(tmp_path / "seeds.jsonl", [{"id": f"s{i}", "word": f"word{i}"} for i in range(30)])
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def flags(work, *more, out="out"):
    return ["--input", work / "seeds.jsonl", "--templates", work / "templates", "--output", work / out, *more]


def echo(body, attempt):
    return reply(f"answer to {body['messages'][-1]['content']}")


def test_rows_and_what_is_dropped_with_its_reason(run_script, serve, work):
    """Each answer below meets another filter; two are good, in two languages."""
    good = {"question": "May a tuple be changed?", "evidence": "A tuple cannot be changed.", "answer": "No, a tuple cannot be changed."}
    chinese = {"question": "元组能当键吗？", "evidence": "元组可以作为字典的键。", "answer": "可以，元组可以作为字典的键。"}
    bad = {
        "evidence is not in the text": good | {"evidence": "A tuple can be changed."},
        "evidence too short": good | {"evidence": "A list"},
        "too short": good | {"answer": "No."},
        "has what is refused": good | {"answer": "As an AI, a tuple cannot be changed."},
        "not in the language en": good | {"answer": "元组不能改变，列表可以改变。"},
        "a copy of text": good | {"question": TEXT},
        "too few words of answer are in text": good | {"answer": "Bananas ripen fastest beside other yellow fruit."},
        "special token in the text": good | {"answer": "No, a tuple cannot be changed.<|im_end|>"},
        "repeats itself": good | {"answer": "a tuple cannot " * 13},
        "a field is missing": {"question": "What?", "answer": "A tuple cannot be changed."},
        "near-duplicate": good | {"answer": "No, a tuple cannot be changed!"},
    }
    raw = {
        "finish_reason length": reply(json.dumps(good)[:30], "length"),
        "not the JSON that was asked for": reply("I would rather not."),
        "no answer": reply("<think>What could it be"),
        "answers what is given": reply(json.dumps(good | {"text": "Anything at all.", "evidence": "Anything at all."})),
    }

    def answer(body, attempt):
        text = body["messages"][-1]["content"]
        assert body["messages"][0] == {"role": "system", "content": "Be exact."}
        if "Chinese" in text:
            return reply(json.dumps(chinese, ensure_ascii=False)) if "0" in text else raw["no answer"]
        number = int(re.search(r"^(\d+)", text)[1])
        if number == 0:
            return reply(f"<think>hm</think>Here it is:\n```json\n{json.dumps([good, *bad.values()])}\n```")
        return list(raw.values())[number - 1]

    (work / "templates/echo.jinja").write_text(QA)
    write_rows(work / "seeds.jsonl", [{"id": f"d{i}", "text": f"{i} {TEXT}", "source": "book"} for i in range(5)])
    server = serve(answer)
    run = run_script(SCRIPT, *flags(work, "--language", "en", "zh", "--llm-url", server.url))
    assert run.returncode == 0, run.stderr
    rows = read_rows(work / "out/data.jsonl")
    assert [row["messages"][1]["content"] for row in rows] == [good["answer"], chinese["answer"]]
    assert rows[0]["source"] == "echo:book"
    assert rows[0]["messages"][0]["content"] == f"0 {TEXT} {good['question']}"
    assert rows[1]["meta"] | {"requests": None} == {
        "template": "echo", "seed": "d0", "language": "zh", "model": "m", "requests": None, "evidence": {"evidence": chinese["evidence"]},
    }  # fmt: skip
    rejected = read_rows(work / "out/rejected.jsonl")
    reasons = Counter(row["reason"] for row in rejected)
    assert reasons == Counter([*bad, *raw] + ["no answer"] * 4)
    assert all(row["file"].endswith("seeds.jsonl") and row["line"] and row["requests"] for row in rejected)
    assert next(row for row in rejected if row["reason"] == "finish_reason length")["raw"] == json.dumps(good)[:30]
    manifest = json.loads((work / "out/manifest.json").read_text())
    assert manifest["counts"]["templates"]["echo"] | {} == {
        "seeds": 10, "requests": 10, "rows": 2, "rejected": 19, "refused": 0, "prompt_tokens": 70, "completion_tokens": 50,
    }  # fmt: skip
    assert sum(manifest["metrics"]["dropped"].values()) == 19
    again = run_script(SCRIPT, *flags(work, "--language", "en", "zh", "--llm-url", server.url))
    assert "up to date" in again.stderr
    assert sum(server.asked.values()) == 10


def test_a_bad_server_costs_no_answer_and_no_second_request(run_script, serve, work):
    """429 with Retry-After, 503, a dropped connection, a hang, HTML for JSON: tried again. 400: an error row. 500 for ever: one as well."""
    trouble = {3: (429, {"Retry-After": "0.3"}), 5: (503, {}), 7: "drop", 9: 6.0, 11: {"no": "choices"}}

    def answer(body, attempt):
        number = int(body["messages"][-1]["content"].removeprefix("word")) if "word" in body["messages"][-1]["content"] else None
        if number in trouble and attempt < 3:
            return trouble[number]
        return {13: (400, {}), 15: (500, {})}.get(number) or echo(body, attempt)

    server = serve(answer)
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--timeout", 2.5))
    assert run.returncode == 0, run.stderr
    assert {row["messages"][0]["content"] for row in read_rows(work / "out/data.jsonl")} == {f"word{i}" for i in range(30)} - {
        "word13",
        "word15",
    }
    errors = read_rows(work / "out/errors.jsonl")
    assert sorted((row["seed"], row["status"]) for row in errors) == [("s13", 400), ("s15", 500)]
    assert all(row["remedy"] and row["body"]["messages"] for row in errors)
    assert {key: count for key, count in server.asked.items() if count > 1} == {f"word{i}": 3 for i in trouble} | {"word15": 4}
    manifest = json.loads((work / "out/manifest.json").read_text())
    assert manifest["counts"]["refused"] == 2
    assert manifest["metrics"]["retried"] >= 10

    words = flags(work, "--llm-url", serve(echo).url, "--retry-failed", "--overwrite")
    run = run_script(SCRIPT, *words)
    assert run.returncode == 0, run.stderr
    assert len(read_rows(work / "out/data.jsonl")) == 30
    assert json.loads((work / "out/manifest.json").read_text())["metrics"]["asked"] == 2


def test_a_killed_run_goes_on(serve, work, run_script):
    """kill -9 in mid-run, and a torn last line: what was answered is not asked again, what was in flight is. Ctrl-C is one sentence."""
    server = serve(echo, delay=0.3)
    command = [sys.executable, ROOT / "scripts" / SCRIPT, *flags(work, "--llm-url", server.url, "--concurrency", "2")]
    process = subprocess.Popen(list(map(str, command)), env=clean_environment(), stderr=subprocess.PIPE, text=True)
    answers, deadline = work / "out/answers.jsonl", time.monotonic() + 60
    while not answers.exists() or len(answers.read_bytes().splitlines()) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second = run_script(SCRIPT, *flags(work, "--llm-url", server.url))
    assert second.returncode == 3
    assert "another process writes" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell in the background has it ignored
    process = subprocess.Popen(list(map(str, command)), env=clean_environment(), stderr=subprocess.PIPE, text=True, **default)
    process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == "generate_sft_data.py: interrupted; the same command goes on from here\n"
    assert not (work / "out/manifest.json").exists()
    time.sleep(0.3)
    done = {row["custom_id"] for row in read_rows(answers)}
    before = Counter(server.asked)
    with open(answers, "a") as file:
        file.write('{"id": "batch-x", "custom_id": "x", "respo')
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url))
    assert run.returncode == 0, run.stderr
    assert f"{len(done)} answers are there" in run.stderr
    assert len(read_rows(work / "out/data.jsonl")) == 30
    asked_again = {key for key, count in server.asked.items() if count > 1}
    assert len(asked_again) <= 4, "at most what was in flight, twice"
    assert sum(server.asked.values()) - sum(before.values()) == 30 - len(done)
    assert len({row["custom_id"] for row in read_rows(answers)}) == len(read_rows(answers)) == 30


def test_other_filters_ask_nothing_and_more_seeds_only_the_new_ones(run_script, serve, work):
    server = serve(echo)
    assert run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--limit", 10)).returncode == 0
    assert sum(server.asked.values()) == 10
    template = (work / "templates/echo.jinja").read_text()
    (work / "templates/echo.jinja").write_text(template.replace("\n#}", "\nfilters: {reject: {answer: '1'}}\n#}"))
    refused = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--limit", 10))
    assert refused.returncode == 3
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--limit", 10, "--overwrite"))
    assert run.returncode == 0, run.stderr
    assert sum(server.asked.values()) == 10
    assert read_rows(work / "out/rejected.jsonl")
    assert run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--limit", 20, "--overwrite")).returncode == 0
    assert sum(server.asked.values()) == len(server.asked) == 20


def test_a_server_that_goes_away_or_refuses_ends_in_one_sentence(run_script, serve, work):
    answered = []

    def stops(body, attempt):
        if len(answered) >= 12:
            return "drop"
        answered.append(body)
        return echo(body, attempt)

    server = serve(stops)
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--patience", 2))
    assert run.returncode == 1
    assert re.search(r"no answer from \S+ for 2(\.0)? s .* the same command goes on", run.stderr)
    assert "Traceback" not in run.stderr
    assert len(read_rows(work / "out/answers.jsonl")) == len(answered) >= 12
    for status, words in ((401, "OPENAI_API_KEY"), (400, "refuses every request")):
        server = serve(lambda body, attempt, status=status: (status, {}))
        run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, out=f"out{status}"))
        assert run.returncode == 1
        assert words in run.stderr.splitlines()[-1]
    run = run_script(SCRIPT, *flags(work, "--llm-url", "http://127.0.0.1:9/v1", out="none"))
    assert run.returncode == 1
    assert "no model answers at http://127.0.0.1:9/v1" in run.stderr
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--model", "other", out="none"))
    assert "serves m, not 'other'" in run.stderr


def test_requests_that_run_out_of_attempts_leave_the_run_open(run_script, serve, work):
    server = serve(lambda body, attempt: (503, {}) if body["messages"][-1]["content"] == "word4" else echo(body, attempt))
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--retries", 1))
    assert run.returncode == 1
    assert "1 requests got no answer (the last: 503" in run.stderr
    assert not (work / "out/manifest.json").exists()
    fine = serve(echo)
    assert run_script(SCRIPT, *flags(work, "--llm-url", fine.url)).returncode == 0
    assert fine.asked == {"word4": 1}


PREFERENCE = """{#
needs: [word]
steps:
  answer: {n: 3, sampling: {temperature: 1, max_tokens: 9}}
  judge: {pattern: '(?P<score>\\d+)', sampling: {temperature: 0, max_tokens: 9}}
preference:
  prompt: [{role: user, content: "{{ word }}"}]
  answer: answer
  score: "{{ score | int + (0 if 'never' in answer else 0.5) }}"
  margin: 2
#}
{% block answer %}{{ word }}{% endblock %}
{% block judge %}Judge: {{ answer }}{% endblock %}
"""


def results_of(requests, answer):
    """Return what `vllm run-batch` would write for a file of requests, in reverse order."""
    rows = [
        {
            "id": "v",
            "custom_id": r["custom_id"],
            "error": None,
            "response": {"status_code": 200, "request_id": "v", "body": answer(r["body"])},
        }
        for r in requests
    ]
    return rows[::-1]


def test_batches_give_the_rows_of_the_api_and_preferences_need_a_margin(run_script, serve, work):
    """Two steps, hence two batches; answers are scored 1 to 9 by their length, so that online and batch must agree."""

    def answer(body, attempt=1, numbers=None):
        text = body["messages"][-1]["content"]
        if text.startswith("Judge"):
            return reply(f"I give {len(text) % 10}")
        return reply(
            f"The answer to {text} is {'long ' * (int(text.removeprefix('word')) % 3)}. {numbers if numbers is not None else attempt}"
        )

    (work / "templates/echo.jinja").write_text(PREFERENCE)
    words = flags(work, "--limit", 6, "--model", "m", out="batch")
    run = run_script(SCRIPT, *words, "--batch-out", work / "one.jsonl", cwd=work)
    assert run.returncode == 0, run.stderr
    requests = read_rows(work / "one.jsonl")
    assert len({r["custom_id"] for r in requests}) == len(requests) == 18
    assert requests[0] | {"custom_id": 0, "body": 0} == {"custom_id": 0, "method": "POST", "url": "/v1/chat/completions", "body": 0}
    assert not (work / "batch/manifest.json").exists()

    lengths = iter(range(18))
    rows = results_of(requests, lambda body: reply(f"The answer to {body['messages'][-1]['content']} is{' long' * (next(lengths) % 4)}."))
    failed = rows[0] | {"response": {"status_code": 503, "request_id": "v", "body": None}, "error": "busy"}
    write_rows(work / "one.results", [*rows[1:], failed])
    run = run_script(SCRIPT, *words, "--batch-in", work / "one.results", "--batch-out", work / "two.jsonl")
    assert "17 taken, 1 unanswered" in run.stderr
    requests = read_rows(work / "two.jsonl")
    assert len(requests) == len({json.dumps(r["body"]) for r in requests})
    assert sum(r["body"]["messages"][-1]["content"].startswith("Judge") for r in requests) == len(requests) - 1
    write_rows(work / "two.results", [rows[0], *results_of([r for r in requests if "Judge" in json.dumps(r)], answer)])
    run = run_script(SCRIPT, *words, "--batch-in", work / "two.results", "--batch-out", work / "three.jsonl")
    if requests := read_rows(work / "three.jsonl"):  # the judge's question about the answer that came late
        write_rows(work / "three.results", results_of(requests, answer))
        run = run_script(SCRIPT, *words, "--batch-in", work / "three.results", "--batch-out", work / "four.jsonl")
    assert run.returncode == 0, run.stderr
    pairs = read_rows(work / "batch/preferences.jsonl")
    assert pairs
    for pair in pairs:
        assert [turn["role"] for turn in pair["prompt"] + pair["chosen"] + pair["rejected"]] == ["user", "assistant", "assistant"]
        assert pair["meta"]["scores"][0] - pair["meta"]["scores"][1] >= 2
        best, worst = (int(json.dumps(len(f"Judge: {pair[key][0]['content']}") % 10)) for key in ("chosen", "rejected"))
        assert pair["meta"]["scores"] == [best + 0.5, worst + 0.5]
    assert {row["reason"] for row in read_rows(work / "batch/rejected.jsonl")} <= {"no margin between the answers", "near-duplicate"}
    assert read_rows(work / "batch/data.jsonl") == []

    # the same answers, given by a server: the same rows
    stored = {
        row["custom_id"]: row["response"]["body"]
        for row in read_rows(work / "batch/answers.jsonl")
        if row["response"]["status_code"] == 200
    }
    by_text = {}
    for row in [*read_rows(work / "one.jsonl"), *read_rows(work / "two.jsonl"), *(read_rows(work / "three.jsonl"))]:
        by_text.setdefault(row["body"]["messages"][-1]["content"], []).append(stored[row["custom_id"]])
    server = serve(
        lambda body, attempt: by_text[body["messages"][-1]["content"]][(attempt - 1) % len(by_text[body["messages"][-1]["content"]])]
    )
    run = run_script(SCRIPT, *flags(work, "--limit", 6, "--llm-url", server.url, "--concurrency", 1, out="online"))
    assert run.returncode == 0, run.stderr
    chosen = [
        {(p["prompt"][0]["content"], p["chosen"][0]["content"]) for p in read_rows(work / out / "preferences.jsonl")}
        for out in ("batch", "online")
    ]
    assert chosen[0] == chosen[1]


def test_a_damaged_batch_file_is_named_by_line(run_script, work):
    (work / "results.jsonl").write_text('{"custom_id": "a", "response": null, "error": "x"}\nnot json\n')
    run = run_script(SCRIPT, *flags(work, "--model", "m", "--batch-in", work / "results.jsonl"))
    assert run.returncode == 1
    assert "results.jsonl line 2" in run.stderr
    assert "Traceback" not in run.stderr


def test_texts_of_an_evaluation_set_are_kept_out(run_script, serve, work):
    exam = "Which of the two kinds of sequence in Python may be changed after it has been made, and why?"
    write_rows(work / "eval.jsonl", [{"id": "e1", "question": exam, "answer": "A list."}])

    def answer(body, attempt):
        leak = {"word1": f"Well: {exam.lower()} A list.", "word2": "Which of the two kinds of sequence may be changed?"}
        return reply(leak.get(body["messages"][-1]["content"], f"{body['messages'][-1]['content']} is a word of its own"))

    run = run_script(SCRIPT, *flags(work, "--llm-url", serve(answer).url, "--eval-set", work / "eval.jsonl"))
    assert run.returncode == 0, run.stderr
    dropped = [row for row in read_rows(work / "out/rejected.jsonl") if row["reason"] == "overlaps the evaluation set"]
    assert [(row["seed"], row["where"].rpartition("/")[2]) for row in dropped] == [("s1", "eval.jsonl:1")]
    metrics = json.loads((work / "out/manifest.json").read_text())["metrics"]
    assert metrics["eval_set"] == {"texts": 2, "too_short": 1}


def test_no_row_at_all_fails_and_says_why(run_script, serve, work):
    run = run_script(SCRIPT, *flags(work, "--llm-url", serve(lambda body, attempt: reply("x", "length")).url))
    assert run.returncode == 1
    assert "no answer became a row (30 finish_reason length)" in run.stderr
    assert not (work / "out/manifest.json").exists()
    assert len(read_rows(work / "out/rejected.jsonl")) == 30


def test_seeds_of_every_format(run_script, serve, work):
    """Records in five formats and text files; a broken line is rejected with its number."""
    seeds = work / "many"
    seeds.mkdir()
    (seeds / "a.json").write_text(json.dumps([{"word": "one"}, {"other": 1}]))
    (seeds / "b.csv").write_text('word,x\n"two, and\nmore",1\n')
    with gzip.open(seeds / "c.jsonl.gz", "wt") as file:
        file.write(
            '{"word": "three"}\n{broken\n[1]\n{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        )
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"word": ["four", None]}), seeds / "d.parquet")
    (seeds / "e.txt").write_text("five")
    (seeds / "f.txt").write_bytes("六".encode("gb18030"))
    (work / "templates/exchange.jinja").write_text(
        ECHO.replace("needs: [word]", "needs: [instruction, response]").replace("{{ word }}", "{{ instruction }}")
    )
    (work / "templates/text.jinja").write_text(ECHO.replace("needs: [word]", "needs: [text]").replace("{{ word }}", "{{ text }}"))
    server = serve(lambda body, attempt: reply(f"{body['messages'][-1]['content']} it is"))
    run = run_script(SCRIPT, "--input", seeds, "--templates", work / "templates", "--output", work / "out", "--llm-url", server.url)
    assert run.returncode == 0, run.stderr
    assert set(server.asked) == {"one", "two, and\nmore", "three", "four", "five", "hi"}
    bad = [(Path(row["file"]).name, row["line"], row["raw"]) for row in read_rows(work / "out/rejected.jsonl")]
    assert bad == [("c.jsonl.gz", 2, "{broken"), ("c.jsonl.gz", 3, "[1]"), ("f.txt", 1, "")]


def test_a_template_may_keep_to_the_language_of_its_seed(run_script, serve, work):
    (work / "templates/echo.jinja").write_text(ECHO.replace("needs: [word]", "needs: [word]\nsame_language: word"))
    texts = ["Which of the two kinds of sequence may be changed?", "两种序列里哪一种可以修改？"]
    write_rows(work / "seeds.jsonl", [{"word": text} for text in texts])
    server = serve(lambda body, attempt: reply("It is so."))
    assert run_script(SCRIPT, *flags(work, "--language", "en", "zh", "--llm-url", server.url, "--limit", 2)).returncode == 0
    assert server.asked == dict.fromkeys(texts, 1)
    assert [row["meta"]["language"] for row in read_rows(work / "out/data.jsonl")] == ["en"], "the other answer is a duplicate"


WRONG = {
    "no comment": ("{% block a %}{% endblock %}", "does not begin with a comment"),
    "unknown key": (ECHO.replace("needs:", "need:"), "unknown key 'need'"),
    "unknown step key": (ECHO.replace("n: 1", "m: 1"), "unknown key 'm'"),
    "unknown filter": (ECHO.replace("\n#}", "\nfilters: {size: 1}\n#}"), "unknown filter 'size'"),
    "a step of a given name": (ECHO.replace("{answer: {n", "{word: {n"), "rename it"),
    "no block": (ECHO.replace("block answer", "block other"), "has no {% block answer %}"),
    "no messages": (re.sub("messages:.*", "", ECHO), "either messages or preference"),
    "not YAML": (ECHO.replace("needs: [word]", "needs: [word"), "mend the template"),
    "not Jinja": (ECHO + "{% if %}", "line 7"),
    "the same n times": (ECHO.replace("n: 1", "n: 2").replace("0.5", "0"), "2 times the same"),
    "a bad pattern": (ECHO.replace("n: 1", "pattern: '(?P<a'"), "mend the template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_template_is_one_sentence(case, run_script, work):
    text, words = WRONG[case]
    (work / "templates/echo.jinja").write_text(text)
    run = run_script(SCRIPT, *flags(work, "--dry-run"))
    assert run.returncode == 1
    assert words in run.stderr
    assert "echo.jinja" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_dry_run_counts_and_shows_prompts(run_script, work):
    (work / "templates/echo.jinja").write_text(PREFERENCE)
    (work / "templates/doc.jinja").write_text(QA.replace("needs: [text]", "needs: [text]\nchunk: {text: 40}"))
    with open(work / "seeds.jsonl", "a") as file:
        file.write(json.dumps({"text": TEXT}) + "\n")
    run = run_script(SCRIPT, *flags(work, "--dry-run", "--limit", 5), env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    assert run.returncode == 0, run.stderr
    assert "## echo: 5 jobs, answer x 3 -> judge x 1: 30 requests" in run.stdout
    assert "asked in step 1, at most 270 answered" in run.stdout
    assert re.search(r"## doc: [34] jobs, qa x 1", run.stdout)
    assert "[system]\nBe exact.\n\n[user]\nA list can be changed" in run.stdout
    assert "estimated; --tokenizer" in run.stdout
    assert not (work / "out").exists()


def test_usage(run_script, work):
    for words in (["--output", work / "out"], flags(work, "--threshold", "2"), flags(work, "--limit", "0"), [*flags(work)[:4]]):
        assert run_script(SCRIPT, *words).returncode == 2
    run = run_script(SCRIPT, *flags(work, "--batch-out", work / "r.jsonl"))
    assert run.returncode == 1
    assert "need --model" in run.stderr
    run = run_script(SCRIPT, "--input", work / "nothing", "--templates", work / "templates", "--output", work / "out")
    assert run.returncode == 1
    assert "correct --input" in run.stderr


@pytest.mark.parametrize("recipe", ["demo", "qwen3-14b"])
def test_the_recipes_render_for_every_seed_and_language(recipe, run_script):
    words = ["--config", f"recipes/{recipe}/sft-gen.yaml", "--input", "data/sample", "--eval-set", "data/sample/errors/queries.jsonl"]
    run = run_script(SCRIPT, *words, "--limit", 40, "--dry-run", cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "cannot be rendered" not in run.stdout
    templates = {path.stem for path in (ROOT / f"recipes/{recipe}/templates").glob("[!_]*.jinja")}
    assert set(re.findall(r"^## (\w+): [1-9]\d* jobs", run.stdout, re.M)) == templates
    assert {"qa", "paraphrase", "self_instruct", "evol", "error_fix", "preference"} <= templates


def test_duplicates_are_found_exactly(script):
    """The prefix filter against every pair compared, over random sets that often overlap."""
    chance = random.Random(1)
    for threshold in (0.5, 0.7, 0.8, 1.0):
        found, kept = script.Duplicates(threshold), []
        for _ in range(400):
            base = chance.choice(kept) if kept and chance.random() < 0.6 else {chance.getrandbits(60) for _ in range(chance.randint(1, 40))}
            new = {x for x in base if chance.random() < 0.9} | {chance.getrandbits(60) for _ in range(chance.randint(0, 4))} or {1}
            alike = [i for i, old in enumerate(kept) if len(new & old) >= threshold * len(new | old)]
            assert (found.find(new) is not None) == bool(alike)
            if not alike:
                kept.append(new)


def test_the_limiter_grows_halves_once_and_holds(script, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    limiter = script.Limiter(64)
    for _ in range(100):
        limiter.flying = int(limiter.limit)
        limiter.good(clock[0], 0.01)
    assert limiter.limit == 64, "doubles a round trip until something goes wrong, up to the ceiling"
    sent, clock[0] = clock[0], 101.0
    for _ in range(20):
        limiter.bad(sent)
    assert limiter.limit == 32, "twenty requests of one moment are one sign"
    clock[0] = 102.0
    limiter.bad(101.5, pause=3)
    assert (limiter.limit, limiter.resume) == (16, 105.0)
    for _ in range(16):
        limiter.flying = int(limiter.limit)
        limiter.good(clock[0], 0.01)
    assert 16.9 < limiter.limit < 17.1, "then one a round trip"
    limiter.queued(1, 16)
    for _ in range(50):
        limiter.flying = int(limiter.limit)
        limiter.good(clock[0], 0.01)
    assert limiter.limit < 17.1, "a queue at the server holds"
    clock[0] = 103.0
    limiter.queued(20, 16)
    assert limiter.limit < 15.5, "a long one cuts"
    slow = script.Limiter(64)
    for seconds in [0.01] * 20 + [0.1] * 40:
        slow.flying = int(slow.limit)
        clock[0] += 1
        slow.good(clock[0], seconds)
    assert slow.limit < 10, "without /metrics latency cuts"


def test_concurrency_follows_a_server_that_takes_six(run_script, serve, work):
    """A server that refuses the seventh request at a time: everything is answered, and its limit is approached from below."""
    write_rows(work / "seeds.jsonl", [{"id": f"s{i}", "word": f"word{i}"} for i in range(150)])
    server = serve(lambda body, attempt: (429, {}) if server.flying > 6 else echo(body, attempt), delay=0.02)
    run = run_script(SCRIPT, *flags(work, "--llm-url", server.url, "--concurrency", 64))
    assert run.returncode == 0, run.stderr
    assert len(read_rows(work / "out/data.jsonl")) == 150
    assert sum(server.asked.values()) < 150 + 100, "fewer refusals than a storm would have"
    assert 6 < server.most <= 24


def test_small_functions(script):
    assert script.cut("aaa bbb.\n\nccc ddd", 12) == ["aaa bbb.", "ccc ddd"]
    assert all(len(piece) <= 50 for piece in script.cut("春眠不觉晓，处处闻啼鸟。" * 40, 50))
    assert "".join(script.cut("春眠不觉晓，处处闻啼鸟。" * 40, 50)) == "春眠不觉晓，处处闻啼鸟。" * 40
    assert script.squeeze("元组可以\n作为 key 的值") == "元组可以作为key的值"
    assert script.squeeze(" two\n  words ") == "two words"
    assert script.parse_json('Sure: {"a": "x"} and more') == [{"a": "x"}]
    assert script.parse_json('```json\n{"items": [{"a": 1}, {"a": 2}]}\n```') == [{"a": 1}, {"a": 2}]
    assert script.parse_json('[1] then {"a": "line\nbreak"}') == [{"a": "line\nbreak"}]
    for text in ("", "[]", '{"a": ', "[" * 5000):
        with pytest.raises(script.Drop):
            script.parse_json(text)
    metrics = '# TYPE x gauge\nvllm:num_requests_running{engine="0",model_name="m"} 3.0\nvllm:num_requests_running{engine="1"} 4.0\n'
    metrics += 'vllm:num_requests_waiting{engine="0"} 1.2e+01\nvllm:num_requests_waiting_by_reason{reason="capacity"} 9.0\n'
    assert script.queue_of(metrics) == (12, 7)
    assert script.queue_of("<html>") is None
    detect = script.language_detector()
    texts = {
        "en": "How do I read a file line by line?",
        "zh": "用 pip install torch 安装之后仍然报错怎么办？",
        "ja": "これは日本語です",
        "ko": "한국어 문장입니다",
    }
    assert {code: script.language_of(text, detect) for code, text in texts.items()} == {code: code for code in texts}
    assert script.language_of("Das ist ein deutscher Satz, und er ist lang genug.", detect) == "de"
    assert script.language_of("OK.", detect) == script.language_of("123", detect) == ""
    assert script.sentences("One two three four five. 春眠不觉晓。 Short. Six seven eight nine ten!") == [
        "One two three four five.", "春眠不觉晓。", "Six seven eight nine ten!",
    ]  # fmt: skip


# From here on vLLM itself runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The hand-made model of test_serve_vllm.py: to everything it answers A, and stops."""
    folder = tmp_path_factory.mktemp("generator") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_serve_vllm, "WORD", test_serve_vllm.byte_tokenizer().encode("A").ids[0])
        test_serve_vllm.write_model(folder)
    return folder


@pytest.mark.slow
def test_vllm_by_its_api_and_by_run_batch_are_interchangeable(model, work, run_script):
    """Half of the requests go through `vllm run-batch`, one of which vLLM refuses; then the served model is asked for the others."""
    flag = flags(work, "--model", "tiny", "--threshold", 1)
    requests, results = work / "requests.jsonl", work / "results.jsonl"
    assert run_script(SCRIPT, *flag, "--batch-out", requests).returncode == 0
    rows = read_rows(requests)
    assert len(rows) == 30
    write_rows(requests, [*rows[:15], rows[15] | {"body": rows[15]["body"] | {"temperature": -1.0}}])
    words = [Path(sys.executable).with_name("vllm"), "run-batch", "-i", requests, "-o", results, "--model", model]
    words += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", 256, "--kv-cache-memory-bytes", "128M", "-O0"]
    batch = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=clean_environment(), timeout=600)
    assert batch.returncode == 0, batch.stderr[-2000:]
    assert len(read_rows(results)) == 16

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    inner = shlex.join(list(map(str, [sys.executable, ROOT / "scripts" / SCRIPT, *flag, "--batch-in", results])))
    serve = [sys.executable, ROOT / "scripts/serve_vllm.py", "--model", model, "--max-model-len", 256, "--port", port, "--then", inner]
    run = subprocess.run(list(map(str, serve)), capture_output=True, text=True, env=clean_environment(), timeout=600)
    assert run.returncode == 0, run.stderr
    assert "15 taken, 1 refused" in run.stderr
    rows = read_rows(work / "out/answers.jsonl")
    assert len({row["custom_id"] for row in rows}) == len(rows) == 30
    assert Counter(row["id"].partition("-")[0] for row in rows) == {"vllm": 16, "batch": 14}
    good = [row["response"]["body"]["choices"][0] for row in rows if row["response"]["status_code"] == 200]
    assert {(choice["message"]["content"], choice["finish_reason"]) for choice in good} == {("A", "stop")}
    assert [row["messages"][1]["content"] for row in read_rows(work / "out/data.jsonl")] == ["A"]
    assert [row["reason"] for row in read_rows(work / "out/rejected.jsonl")] == ["near-duplicate"] * 28
    assert [(row["status"], "temperature" in json.dumps(row["error"])) for row in read_rows(work / "out/errors.jsonl")] == [(400, True)]
    metrics = json.loads((work / "out/manifest.json").read_text())["metrics"]
    assert metrics["asked"] == 14
    assert metrics["completion_tokens"] == 58, "a letter and the stop token, 29 times"
