"""evaluate_model.py: graders, intervals and pairing on known cases; against a real vLLM the losses that the weights give, and lm_eval."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import test_serve_vllm
from conftest import ROOT, clean_environment
from safetensors.numpy import load_file

SCRIPT, SAMPLE = "evaluate_model.py", ROOT / "data/sample/eval"
USER = {"role": "user", "content": "Records:\n[E1] error: a | fix: b\n[E2] error: c | fix: d\n\nQuestion:\n[pid 7] a?"}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script(SCRIPT)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sample_rows():
    return {path.stem: read_jsonl(path) for path in sorted(SAMPLE.glob("*.jsonl"))}


# Graders


@pytest.mark.parametrize(
    ("answer", "known", "unknown"),
    [
        ("Use b. [E1]", {"format": 1, "right": 1, "false_refusal": 0}, 0),
        ("Use b [E1, E2].", {"format": 1, "right": 1, "false_refusal": 0}, 0),
        ("用 b。[E1；E2]", {"format": 1, "right": 1, "false_refusal": 0}, 0),
        ("Use d. [E2]", {"format": 1, "right": 0, "false_refusal": 0}, 0),
        ("Use b. [E1] [E9]", {"format": 0, "right": 0, "false_refusal": 0}, 0),
        ("Use b. [pid 7]", {"format": 0, "right": 0, "false_refusal": 0}, 0),
        ("Use b.", {"format": 0, "right": 0, "false_refusal": 0}, 0),
        ("It is not in the knowledge base: none of these records fits.", {"format": 0, "right": 0, "false_refusal": 1}, 1),
        ("知识库中没有这个问题：以上记录都不符合。", {"format": 0, "right": 0, "false_refusal": 1}, 1),
        ("I don't know, but [E1] says b.", {"format": 1, "right": 1, "false_refusal": 0}, 0),
        ("<think>not in the records? [E9]</think>Use b. [E1]", {"format": 1, "right": 1, "false_refusal": 0}, 0),
    ],
)
def test_grounded_answers(script, answer, known, unknown):
    row = {"messages": [{"role": "system", "content": "[E9] is an example"}, USER]}
    assert script.grade(row | {"cite": ["E1"]}, answer, "stop") == {"stopped": 1} | known
    assert script.grade(row | {"cite": []}, answer, "stop") == {"stopped": 1, "refusal": unknown}


def test_json_answers(script):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    row = {"messages": [USER], "schema": schema, "expect": {"a": 1}}
    for answer, scores in (
        ('{"a": 1}', (1, 1, 1)),
        (' {"a":1}\n', (1, 1, 1)),
        ('{"a": 2}', (1, 1, 0)),
        ('{"a": "1"}', (1, 0, 0)),
        ('{"a": 1, "b": 2}', (1, 0, 0)),
        ('```json\n{"a": 1}\n```', (0, 0, 0)),
        ('{"a": 1', (0, 0, 0)),
        ("", (0, 0, 0)),
    ):
        graded = script.grade(row, answer, "length")
        assert (graded["json"], graded["schema"], graded["expected"]) == scores, answer
        assert graded["stopped"] == 0


def test_exact_answers(script):
    copy, add = {"messages": [USER], "answer": "ba ke"}, {"messages": [USER], "number": 1042}
    assert [script.grade(copy, a, "stop")["exact"] for a in ("ba ke", " ba ke\n", "ba  ke", "Sure: ba ke", "")] == [1, 1, 0, 0, 0]
    assert [script.grade(add, a, "stop")["exact"] for a in ("1042", "It is 1,042.", "519 + 523 = 1042", "-1042", "1042 or 7", "")] == [
        1, 1, 1, 0, 0, 0,
    ]  # fmt: skip


def test_generated_tasks_are_graded_repeatable_and_right(script):
    rows = script.generate(30, 0)
    assert rows == script.generate(30, 0) != script.generate(30, 1)
    assert len({(row["task"], row["id"]) for row in rows}) == len(rows) == 180
    for row in rows:
        question = row["messages"][0]["content"]
        if row["task"].startswith("copy"):
            assert f"copy {len(row['answer'].split())} words" == row["task"] and question.endswith(f"\n{row['answer']}")
        else:
            a, b = map(int, re.findall(r"\d+", question))
            assert row["number"] == a + b and row["task"] == f"add {len(str(a))} digits" and len(str(a)) == len(str(b))


# The sample


def test_the_references_of_the_sample_pass_their_own_graders(script):
    for task, rows in sample_rows().items():
        for row in rows:
            script.check_row(row)
            if script.asks(row):
                scores = script.grade(row, row["messages"][-1]["content"], "stop")
                scores["false_refusal"] = 1 - scores.get("false_refusal", 0)
                assert all(scores.values()), (task, row["id"], scores)
    known = [bool(row["cite"]) for row in sample_rows()["grounded"]]
    assert (len(known), sum(known)) == (40, 20)
    assert {row["id"].partition("-")[0] for rows in sample_rows().values() for row in rows} == {"en", "zh"}


def texts_of(value):
    if isinstance(value, str):
        return [value]
    return [
        text
        for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        for text in texts_of(inner)
    ]


def test_the_sample_does_not_overlap_with_the_training_data():
    """No 24 characters within a line of a question, record or answer stand in data/sample/sft or /errors; fixed sentences aside."""
    trained = []
    for path in [*(ROOT / "data/sample/sft").iterdir(), *(ROOT / "data/sample/errors").glob("records.jsonl")]:
        for line in [path.read_text(encoding="utf-8")] if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines():
            try:
                trained += texts_of(json.loads(line))
            except ValueError:
                trained.append(line)
    trained = "\n".join(trained)
    fixed = ("It is not in the knowledge base: none of these records fits.", "知识库中没有这个问题：以上记录都不符合。")
    assert all(text in trained for text in (*fixed, "No available memory for the cache blocks"))
    fixed, windows = {*fixed, "Traceback (most recent call last):"}, 0
    for rows in sample_rows().values():
        for row in rows:
            texts = [row["text"]] if "text" in row else [m["content"] for m in row["messages"] if m["role"] != "system"]
            for line in {line for text in texts for line in text.splitlines()} - fixed:
                for at in range(max(1, len(line) - 23)):
                    windows += 1
                    assert line[at : at + 24] not in trained or line in ("Records:", "Question:", ""), (row["id"], line[at : at + 24])
    assert windows > 10_000
    base = {record["id"] for record in read_jsonl(ROOT / "data/sample/errors/records.jsonl")}
    ours = {name for row in sample_rows()["grounded"] for name in row["cite"]}
    assert ours and not ours & base, "an id means one record"


# Intervals


def test_newcombe_has_the_coverage_it_claims(script):
    """Pairs drawn with known rates: the 95 % interval holds the true difference in about 95 % of the draws, n = 30."""
    rng = np.random.default_rng(0)
    for chances in ([0.5, 0.1, 0.3, 0.1], [0.8, 0.05, 0.1, 0.05], [0.3, 0.05, 0.3, 0.35]):
        truth, draws = chances[2] - chances[1], rng.multinomial(30, chances, size=1500)
        counts, times = np.unique(draws, axis=0, return_counts=True)
        held = 0
        for pairs, number in zip(counts, times, strict=True):
            low, high = script.newcombe(*map(int, pairs))
            assert -1 <= low <= (pairs[2] - pairs[1]) / 30 <= high <= 1
            held += number * (low <= truth <= high)
        assert 0.92 <= held / 1500 <= 0.995, chances


def test_newcombe_turns_round_with_its_sides(script):
    low, high = script.newcombe(20, 12, 2, 16)
    turned = script.newcombe(20, 2, 12, 16)
    assert (-high, -low) == pytest.approx(turned)
    assert script.newcombe(0, 0, 10, 0)[0] > 0.5 and script.newcombe(10, 0, 0, 0) == pytest.approx((-0.2775, 0.2775), abs=1e-3)


def test_paired_rates(script):
    before, after = [(0, 1)] * 9 + [(1, 1)] * 11, [(1, 1)] * 19 + [(0, 1)]
    delta, low, high, p = script.difference(before, after)
    assert delta == pytest.approx(0.4) and 0 < low < 0.4 < high
    assert p == pytest.approx(22 / 1024), "9 won, 1 lost of 10: two tails of the binomial"
    assert script.difference(before, before)[3] == 1.0


def test_paired_losses_are_narrower_than_unpaired_ones(script):
    rng = np.random.default_rng(1)
    tokens, level = rng.integers(5, 50, 40), rng.uniform(1, 4, 40)
    before, after = (
        [(n * x, n) for n, x in zip(tokens, level, strict=True)],
        [(n * (x - 0.1), n) for n, x in zip(tokens, level, strict=True)],
    )
    delta, low, high, p = script.difference(before, after)
    assert (delta, low, high) == pytest.approx((-0.1, -0.1, -0.1)) and p is None
    value, alone_low, alone_high = script.interval(before)
    assert value == pytest.approx(sum(t for t, _ in before) / sum(n for _, n in before)), "per token, not per conversation"
    assert alone_high - alone_low > 0.3
    one = script.interval(before[:1])
    assert one[0] == pytest.approx(level[0]) and np.isnan(one[1:]).all(), "one row has no interval"


def test_mean_intervals_hold_what_they_claim(script):
    """Skewed losses of few conversations of unequal length: the interval of the ratio holds the truth in about 95 % of the draws."""
    rng, held = np.random.default_rng(0), {20: 0, 60: 0}
    for n in held:
        for _ in range(400):
            tokens, level = rng.integers(5, 60, n), rng.lognormal(0.7, 0.5, n)
            _, low, high = script.interval(list(zip(tokens * level, tokens, strict=True)))
            held[n] += low <= np.exp(0.7 + 0.5**2 / 2) <= high
    assert held[20] / 400 >= 0.89 and held[60] / 400 >= 0.93


def test_equal_lengths_give_the_textbook_interval(script):
    """Ten values of mean 5.5 and deviation 3.0277: 5.5 ± 2.2622 · 3.0277 / √10."""
    assert script.interval([(value, 1) for value in range(1, 11)]) == pytest.approx((5.5, 3.3341, 7.6659), abs=1e-4)


def test_a_text_is_scored_whole_whether_or_not_the_tokenizer_has_a_begin_token(script):
    """A stand-in of ids only: each token costs its own id."""

    class Ids:
        begin = ()

        def encode(self, text):
            return [*self.begin, *text.encode()]

        def log_probabilities(self, ids):
            self.asked = ids
            return [None, *ids[1:]], [""] * len(ids)

    for begin in ((), (300,)):
        endpoint = Ids()
        endpoint.begin = begin
        found = script.score_text(endpoint, "\n明a")
        assert endpoint.asked == [*begin, 10, *"明a".encode()]
        assert found == {"nats": sum("明a".encode()), "tokens": 4, "bytes": 4, "prompt_tokens": 5 + len(begin)}


def rates(task, values, key="k", metric="exact", **more):
    return [
        {"kind": "answer", "task": task, "id": str(at), "key": f"{key}{at}", "scores": {metric: v}} | more for at, v in enumerate(values)
    ]


def test_comparison_pairs_only_equal_questions(script, run_script, tmp_path):
    loss = {"kind": "loss", "task": "t", "id": "0", "key": "k", "nats": 30.0, "tokens": 10, "bytes": 20, "prompt_tokens": 40}
    before = [*rates("t", [0] * 12 + [1] * 8, prompt_tokens=9), *rates("gone", [1]), loss, loss | {"id": "1"}]
    after = [*rates("t", [1] * 19 + [0], prompt_tokens=9), *rates("gone", [1], key="other"), loss | {"nats": 20.0, "prompt_tokens": 41}]
    after += [loss | {"id": "1", "nats": 10.0}, *rates("t", [0], key="x", metric="stopped")[:0]]
    write_jsonl(tmp_path / "a.jsonl", before), write_jsonl(tmp_path / "b.jsonl", after)
    words = ["--before", "a.jsonl", "--after", "b.jsonl"]
    result = run_script(SCRIPT, *words, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    of = {(figure["task"], figure["metric"]): figure for figure in report["figures"]}
    assert set(of) == {("t", "exact"), ("t", "loss"), ("t", "bits")}
    exact, nats = of["t", "exact"], of["t", "loss"]
    assert (exact["n"], exact["before"]["value"], exact["after"]["value"], exact["verdict"]) == (20, 0.4, 0.95, "better")
    assert (nats["n"], nats["before"]["value"], nats["after"]["value"], nats["verdict"]) == (2, 3.0, 1.5, "not shown")
    assert of["t", "bits"]["before"]["value"] == pytest.approx(30 / 20 / np.log(2))
    assert report["counts"] == {"pairs": 22, "unpaired_before": 1, "unpaired_after": 1, "other_prompt_tokens": 1}
    assert "2 measurements have no partner" in result.stderr
    assert "1 of 22 prompts have another number of tokens" in result.stderr
    table = run_script(SCRIPT, *words, cwd=tmp_path).stdout
    assert re.search(r"^t +exact +20 +0\.400 \[.*\] +0\.950 \[.*\] +0\.550 \[.*\] +0?\.?\S* +better$", table, re.M), table


def test_comparison_is_kept_and_printed_again(run_script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rates("t", [0, 1, 1])), write_jsonl(tmp_path / "b.jsonl", rates("t", [1, 1, 1]))
    words = ["--before", "a.jsonl", "--after", "b.jsonl", "--output", "out"]
    first, second = (run_script(SCRIPT, *words, cwd=tmp_path) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and "up to date" in second.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["summary"] == "1 measures: 0 better, 0 worse, 1 not shown"
    write_jsonl(tmp_path / "b.jsonl", rates("t", [1, 0, 1]))
    assert run_script(SCRIPT, *words, cwd=tmp_path).returncode == 3


def test_four_of_four_show_nothing(script):
    """Newcombe's interval leaves out 0 for 4 lost of 10, McNemar's p is 2 / 2⁴: not enough to call it worse."""
    (figure,), _ = script.compare(rates("t", [1] * 4 + [0] * 6), rates("t", [0] * 10))
    assert figure["difference"]["high"] < 0 and figure["p"] == 0.125 and figure["verdict"] == "not shown"


def test_lower_can_be_better(script):
    rows = [rates("t", values, metric="false_refusal") for values in ([1] * 10, [0] * 10)]
    assert [script.compare(*sides)[0][0]["verdict"] for sides in (rows, rows[::-1])] == ["better", "worse"]


# What a user may do wrong


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 2"),
        ("[1]", "no JSON object"),
        ('{"messages": []}', "neither a `text` nor `messages`"),
        ('{"id": "b"}', "neither a `text` nor `messages`"),
        ('{"id": "b", "text": " "}', "`text` is empty"),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}]}', "no assistant's turn to score"),
        ('{"id": "b", "messages": [{"role": "assistant", "content": "x"}], "answer": "x"}', "nothing is asked"),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}], "schema": {"type": "map"}}', "is no JSON schema"),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}], "cite": "E1"}', "`cite` is not a list"),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}], "answer": 1}', "`answer` is not a text"),
        ('{"id": "b", "messages": [{"role": "user", "content": "x"}], "number": "1"}', "`number` is not a whole"),
        ('{"id": "b", "messages": [{"role": "user", "content": [1]}], "number": 1}', "content is not text"),
        ('{"id": "a", "text": "x"}', "the id 'a' stands twice in the task 'rows'"),
    ],
)
def test_a_bad_row_is_named_before_a_server_is_asked(run_script, tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "x"}\n' + line + "\n")
    result = run_script(SCRIPT, "--input", "rows.jsonl", "--output", "out", "--llm-url", "http://127.0.0.1:1/v1", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "rows.jsonl line 2: " in result.stderr and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_rows_come_from_a_folder_as_the_stages_write_it(script, tmp_path):
    """data*.jsonl only, where there are such; a row without an id gets a stable one, one with a number keeps it as text."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    write_jsonl(tmp_path / "data-00000.jsonl", [{"messages": messages}, {"id": 7, "messages": messages}])
    write_jsonl(tmp_path / "rejected.jsonl", [{"reason": "none"}])
    rows = script.read_rows([tmp_path], None)
    assert [row["task"] for row in rows] == ["data-00000"] * 2 and rows[1]["id"] == "7"
    assert rows == script.read_rows([tmp_path], None) and len(rows[0]["id"]) == 16
    assert len(script.read_rows([tmp_path], 1)) == 1


def test_bad_usage(run_script, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rates("t", [1])), write_jsonl(tmp_path / "b.jsonl", rates("t", [1], key="other"))
    (tmp_path / "half").mkdir()
    write_jsonl(tmp_path / "half/answers.jsonl", rates("t", [1]))
    for words, code, sentence in (
        (["--before", "a.jsonl"], 2, "come together"),
        ([], 2, "give --output"),
        (["--output", "out", "--refusal", "("], 2, "no regular expression"),
        (["--output", "out", "--generated", 0], 1, "nothing to measure"),
        (["--output", "out", "--input", "none.jsonl"], 1, "none.jsonl: no such file"),
        (["--output", "out", "--llm-url", "http://127.0.0.1:1/v1"], 1, "no model answers at http://127.0.0.1:1/v1"),
        (["--before", "a.jsonl", "--after", "none"], 1, "none: no finished evaluation"),
        (["--before", "half", "--after", "a.jsonl"], 1, "half: no finished evaluation"),
        (["--before", "a.jsonl", "--after", "b.jsonl"], 1, "no question in common"),
    ):
        result = run_script(SCRIPT, *words, cwd=tmp_path)
        assert (result.returncode, sentence in result.stderr) == (code, True), result.stderr
        assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


class Stalled(ThreadingHTTPServer):
    """An endpoint that lists its model and never answers; `asked` is set by the first question, `end` lets it go."""

    daemon_threads = True

    def __init__(self):
        self.asked, self.end = threading.Event(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = b'{"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}'
                self.send_response(200 if self.path == "/v1/models" else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                self.server.asked.set()
                self.server.end.wait()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_an_interrupt_does_not_wait_for_answers_in_flight(tmp_path):
    server = Stalled()
    words = ["--output", "out", "--llm-url", f"http://127.0.0.1:{server.server_port}/v1", "--generated", "1"]
    command = [sys.executable, "-I", str(ROOT / "scripts" / SCRIPT), *words]
    options = {"stderr": subprocess.PIPE, "text": True, "env": clean_environment()}
    # a test run in the background has the interrupt ignored, and its children inherit that
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    try:
        assert server.asked.wait(60)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and error.endswith("interrupted; the same command goes on from here\n"), error
    finally:
        process.kill()
        server.end.set()
        server.shutdown()


# From here on vLLM serves the hand-made model of test_serve_vllm.py: it answers every question with one byte and ends.

CONVERSATIONS = [
    {"id": "turns", "messages": [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi, there"},
        {"role": "user", "content": "再见"}, {"role": "assistant", "content": "再见！\n"},
    ]},
    {"id": "unweighted", "messages": [
        {"role": "user", "content": "A"}, {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "B"}, {"role": "assistant", "content": "b"},
    ]},
    {"id": "too long", "messages": [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]},
    {"id": "text", "text": "明月 and the moon"},
    {"id": "json", "messages": [{"role": "user", "content": "JSON?"}], "schema": {"type": "object"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a vLLM, and the folder of its model."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    test_serve_vllm.write_model(folder)
    words = ["--port", test_serve_vllm.free_port(), "--served-model-name", "tiny", "--max-model-len", "512", "--dtype", "float32"]
    process = test_serve_vllm.start(folder, *words)
    try:
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield url, folder
    finally:
        process.terminate()
        process.wait(60)


class Proxy(ThreadingHTTPServer):
    """An endpoint that has only what `paths` names of the server behind it, and never echoes a prompt when `echo` is false."""

    def __init__(self, url, paths, echo):
        behind = url.removesuffix("/v1")

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body=None):
                code, text = 404, b'{"error": "not here"}'
                if self.path in paths:
                    if body and not echo:
                        body = json.dumps(json.loads(body) | {"echo": False}).encode()
                    code, text = 200, urllib.request.urlopen(
                        urllib.request.Request(behind + self.path, body, {"Content-Type": "application/json"})
                    ).read()  # fmt: skip
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def expected_nats(folder, row):
    """Return (nats, tokens) of a row's trained turns, or of its text, from the weights and the template written out here.

    Attention and MLP add nothing, so the logits after a token are the RMS norm of its embedding times the output matrix.
    """
    weights = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    states = weights["model.embed_tokens.weight"].astype(np.float64)
    logits = states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-6) @ weights["lm_head.weight"].astype(np.float64).T
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tokenizer = test_serve_vllm.byte_tokenizer()

    def nats(before, whole):
        start, ids = len(tokenizer.encode(before).ids), tokenizer.encode(whole).ids
        return [-log_probabilities[ids[at - 1], ids[at]] for at in range(start, len(ids))]

    if "text" in row:
        found = nats("\n", "\n" + row["text"])
        return sum(found), len(found)
    found, text = [], ""
    for message in row["messages"]:
        head, body = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
        if message["role"] == "assistant" and message.get("weight") != 0:
            found += nats(text + head, text + head + body)
        text += head + body + "\n"
    return sum(found), len(found)


@pytest.mark.slow
def test_losses_are_those_of_the_weights(script, server, run_script, tmp_path):
    url, folder = server
    write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS)
    words = ["--input", "rows.jsonl", "--output", "out", "--llm-url", url, "--generated", 2, "--max-tokens", 8]
    result = run_script(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {(row["kind"], row["task"], row["id"]): row for row in read_jsonl(tmp_path / "out/answers.jsonl")}
    assert len(rows) == 4 + 1 + 12
    for row in CONVERSATIONS[:2] + CONVERSATIONS[3:4]:
        found = rows["loss", "rows", row["id"]]
        nats, tokens = expected_nats(folder, row)
        assert found["tokens"] == tokens and found["nats"] == pytest.approx(nats, rel=1e-4), row["id"]
    content = "Hi, there" + "再见！\n"
    assert rows["loss", "rows", "turns"]["bytes"] == len(content.encode()) == rows["loss", "rows", "turns"]["tokens"] - 2
    assert rows["loss", "rows", "text"]["bytes"] == rows["loss", "rows", "text"]["tokens"] == len(CONVERSATIONS[3]["text"].encode())
    assert "error" in rows["loss", "rows", "too long"] and "1 of 17 could not be measured" in result.stderr
    answer = rows["answer", "rows", "json"]
    assert (answer["finish_reason"], answer["completion_tokens"], answer["scores"]) == ("stop", 2, {"stopped": 1, "json": 0, "schema": 0})
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["metrics"]["all answers: stopped"]["value"] == 1.0 and manifest["metrics"]["all answers: stopped"]["n"] == 13
    assert manifest["settings"]["model"][0] == "tiny" and manifest["counts"] == {"measurements": 17, "errors": 1}
    assert re.search(r"^all answers +stop rate +13 +1\.000 \[0\.772, 1\.000\]$", result.stdout, re.M)
    assert "up to date" in run_script(SCRIPT, *words, cwd=tmp_path).stderr
    assert run_script(SCRIPT, *words, "--seed", 1, cwd=tmp_path).returncode == 3


@pytest.mark.slow
def test_kill_9_loses_no_answer(server, run_script, tmp_path):
    url, _ = server
    words = ["--output", "out", "--llm-url", url, "--generated", "60", "--max-tokens", "4", "--concurrency", "1"]
    command = [sys.executable, "-I", ROOT / "scripts" / SCRIPT, *words]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env=clean_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    path = tmp_path / "out/answers.jsonl"
    assert test_serve_vllm.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 10, 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out/manifest.json").exists()
    held = path.read_bytes().split(b"\n")[:-1]
    with open(path, "ab") as file:
        file.write(b'{"kind": "answer", "task": "copy 2 w')  # what a kill within a write leaves
    result = run_script(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"going on: {len(held)} of 360 measurements" in result.stderr
    lines = path.read_bytes().splitlines()
    assert len(lines) == 360 and set(held) <= set(lines)


@pytest.mark.slow
def test_an_endpoint_that_scores_no_prompts(script, server, run_script, tmp_path):
    """Another server than vLLM: without /tokenize, then with a local tokenizer, with and without echo."""
    url, folder = server
    paths = ["/v1/models", "/v1/chat/completions"]
    write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS)
    result = run_script(
        SCRIPT, "--input", "rows.jsonl", "--output", "out", "--llm-url", Proxy(url, paths, True).url, "--generated", 1, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "cannot give them, it has no /tokenize; give --tokenizer (HTTP 404); the rest is measured" in result.stderr
    metrics = json.loads((tmp_path / "out/manifest.json").read_text())["metrics"]
    assert metrics["all answers: stopped"]["n"] == 7 and metrics["no_loss"] and not any("loss" in name for name in metrics if ":" in name)
    silent = script.Endpoint(Proxy(url, [*paths, "/v1/completions"], False).url, None, folder)
    assert silent.probe() == "its /completions does not echo the log-probabilities of the prompt"
    none = script.Endpoint(Proxy(url, paths, True).url, None, folder)
    assert none.probe() == "it does not score prompts (HTTP 404)"
    whole, own = script.Endpoint(Proxy(url, [*paths, "/v1/completions"], True).url, None, folder), script.Endpoint(url, "tiny", None)
    assert whole.probe() == own.probe() == ""
    assert (whole.extra, own.extra) == ({}, {"repetition_penalty": 1})
    for row in CONVERSATIONS[:2]:
        assert script.score_conversation(whole, row) == pytest.approx(script.score_conversation(own, row), rel=1e-5)


@pytest.mark.slow
def test_lm_eval_runs_a_local_task_and_says_when_data_is_missing(server, run_script, tmp_path):
    url, _ = server
    # what the model thinks of a choice does not depend on the question, so it is right in every second one
    data = write_jsonl(tmp_path / "facts.jsonl", [{"q": f"Say {at}", "choices": ["z", "b"], "answer": at % 2} for at in range(6)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/facts.yaml").write_text(
        f"task: facts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["--llm-url", url, "--generated", 0, "--include-path", "tasks", "--json"]
    cache = {"HF_HOME": str(tmp_path / "hf")}
    result = run_script(SCRIPT, *words, "--output", "out", "--lm-eval", "facts", cwd=tmp_path, env=cache)
    assert result.returncode == 0, result.stderr
    (figure,) = json.loads(result.stdout)["figures"]
    assert (figure["task"], figure["metric"], figure["n"], figure["value"]) == ("lm-eval facts", "acc", 6, 0.5)
    report = json.loads(next((tmp_path / "out/lm-eval").rglob("results_*.json")).read_text())
    assert report["results"]["facts"]["acc,none"] == 0.5
    sample = read_jsonl(next((tmp_path / "out/lm-eval").rglob("samples_*.jsonl")))[0]
    assert "<|im_start|>assistant" in json.dumps(sample["arguments"]), "the chat template is applied"
    (tmp_path / "tasks/say.yaml").write_text(
        f"task: say\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["<|im_end|>"], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    chat = Proxy(url, ["/v1/models", "/v1/chat/completions"], True).url
    result = run_script(SCRIPT, *words, "--llm-url", chat, "--output", "chat", "--lm-eval", "say", cwd=tmp_path, env=cache)
    assert result.returncode == 0, result.stderr
    (figure,) = json.loads(result.stdout)["figures"]
    assert (figure["task"], figure["metric"], figure["n"], figure["value"]) == ("lm-eval say", "exact_match", 6, 0.0)
    assert "by local-chat-completions" in result.stderr
    result = run_script(SCRIPT, *words, "--output", "out2", "--lm-eval", "hellaswag", cwd=tmp_path, env=cache)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the data of hellaswag is not at hand (ConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub" in result.stderr
