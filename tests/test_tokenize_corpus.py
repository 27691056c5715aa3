"""tokenize_corpus.py: the maps hold the documents, whole and in order; the split is stable; bad input leaves nothing half-written."""

import csv
import gzip
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, clean_environment

TEXT = ROOT / "data" / "sample" / "text"
DOCUMENTS = [TEXT / "peps.jsonl.gz", TEXT / "song.jsonl.zst"]
SPECIAL = 'He wrote "<|endoftext|>" and <|im_start|>user and <|pad|>.'


@pytest.fixture(scope="module")
def tokenizer(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "tokenizer"
    answer = run_script("train_tokenizer.py", "--input", DOCUMENTS[1], "--output", folder, "--vocab-size", 2000, "--held-out", 0.1)
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.fixture(scope="module")
def corpus(run_script, tokenizer, tmp_path_factory):
    """(folder of documents, folder of tokens): two shards, the second one compressed; one document is a trap, one has a language."""
    folder = tmp_path_factory.mktemp("corpus")
    with gzip.open(DOCUMENTS[0], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) | {"source": "peps"} for line in file][:40]
    rows += [{"id": f"zh-{i}", "text": f"第{i}章 學而時習之，不亦說乎？" * 5, "meta": {"language": "zh/tw"}} for i in range(120)]
    rows.append({"id": "trap", "text": SPECIAL, "source": 'a "quoted", source'})
    rows.append({"id": "empty", "text": ""})
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    (folder / "data-00000.jsonl").write_bytes(b"".join(lines[:70]))
    with gzip.open(folder / "data-00001.jsonl.gz", "wb") as file:
        file.writelines(lines[70:])
    (folder / "removed.jsonl").write_text('{"id": "not a document"}\n', encoding="utf-8")
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    answer = run_script("tokenize_corpus.py", "--input", folder, "--tokenizer", tokenizer, "--output", output, "--held-out", 0.1)
    assert answer.returncode == 0, answer.stderr
    return {row["id"]: row for row in rows}, folder, output


def described(output):
    return json.loads((output / "tokens.json").read_text(encoding="utf-8"))


def decoded(output, tokenizer):
    """Return {id: (split, text, source, line)} read back through the index, as a consumer of the maps would."""
    from tokenizers import Tokenizer

    reader, found, tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), {}, described(output)
    for split, part in {"train": tokens["train"], **tokens["held_out"]}.items():
        ids, end = np.fromfile(output / part["file"], tokens["dtype"]), 0
        with gzip.open(output / part["file"].replace(".npy", ".csv.gz"), "rt", encoding="utf-8", newline="") as file:
            for start, stop, identity, source, line in csv.reader(file):
                assert int(start) == end
                end = int(stop)
                assert ids[end - 1] == tokens["eos_token_id"]
                assert tokens["eos_token_id"] not in ids[int(start) : end - 1]
                found[identity] = (split, reader.decode(ids[int(start) : end - 1].tolist(), skip_special_tokens=False), source, int(line))
        assert end == len(ids) == part["tokens"]
    return found


def test_every_document_comes_back_from_the_maps(corpus, tokenizer):
    rows, folder, output = corpus
    found = decoded(output, tokenizer)
    assert {identity: text for identity, (_, text, _, _) in found.items()} == {identity: row["text"] for identity, row in rows.items()}
    assert found["trap"][1] == SPECIAL
    assert found["trap"][2] == 'a "quoted", source'
    assert found["zh-119"][2:] == (str(folder / "data-00001.jsonl.gz"), 90)
    tokens = described(output)
    held = [identity for identity, (split, *_) in found.items() if split != "train"]
    assert 5 <= len(held) <= 35
    assert set(tokens["held_out"]) == {"latin", "zh-tw"}
    for split, part in {"train": tokens["train"], **tokens["held_out"]}.items():
        texts = [rows[identity]["text"].encode() for identity, (where, *_) in found.items() if where == split]
        assert (part["documents"], part["bytes"]) == (len(texts), sum(map(len, texts)))


def test_olmo_reads_the_maps(corpus):
    """The engine's own dataset class takes the file as it is."""
    pytest.importorskip("olmo")
    from olmo.data.memmap_dataset import MemMapDataset

    _, _, output = corpus
    tokens = described(output)
    path = output / tokens["train"]["file"]
    dataset = MemMapDataset(str(path), chunk_size=64, memmap_dtype=getattr(np, tokens["dtype"]))
    assert len(dataset) == tokens["train"]["tokens"] // 64
    assert dataset[1]["input_ids"].tolist() == np.fromfile(path, tokens["dtype"])[64:128].tolist()


def test_the_split_depends_on_the_id_alone(corpus, tokenizer, run_script, tmp_path):
    """Half of the documents, in another order: each falls on the side where it was."""
    rows, _, output = corpus
    half = [json.dumps(row) + "\n" for row in [*rows.values()][::-2]]
    (tmp_path / "half.jsonl").write_text("".join(half), encoding="utf-8")
    arguments = ("--tokenizer", tokenizer, "--output", tmp_path / "out", "--held-out", 0.1)
    assert run_script("tokenize_corpus.py", "--input", tmp_path / "half.jsonl", *arguments).returncode == 0
    before, after = decoded(output, tokenizer), decoded(tmp_path / "out", tokenizer)
    assert {identity: where for identity, (where, *_) in after.items()} == {i: before[i][0] for i in after}


def test_second_run_and_changed_settings(corpus, tokenizer, run_script):
    _, folder, output = corpus
    arguments = ("--input", folder, "--tokenizer", tokenizer, "--output", output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.npy")}
    answer = run_script("tokenize_corpus.py", *arguments, "--held-out", 0.1)
    assert answer.returncode == 0
    assert "up to date" in answer.stderr
    assert run_script("tokenize_corpus.py", *arguments, "--held-out", 0.2).returncode == 3
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.npy")} == before


def test_killed_and_run_again(tokenizer, run_script, tmp_path):
    """kill -9 while the maps are written: no map is there; the same command then writes what an undisturbed run writes."""
    with gzip.open(DOCUMENTS[0], "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(tmp_path / "big.jsonl", "w", encoding="utf-8") as file:
        for i in range(3):
            file.writelines(json.dumps(row | {"id": f"{i}-{row['id']}"}) + "\n" for row in rows)
    arguments = ["--input", str(tmp_path / "big.jsonl"), "--tokenizer", str(tokenizer), "--output"]
    script = shutil.copy(ROOT / "scripts" / "tokenize_corpus.py", tmp_path)
    child = subprocess.Popen([sys.executable, "-I", script, *arguments, str(tmp_path / "a")], env=clean_environment())
    while not (list((tmp_path / "a").glob(".train.npy.tmp")) or child.poll() is not None):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in (tmp_path / "a").iterdir())
    for name in "ab":
        assert run_script("tokenize_corpus.py", *arguments, tmp_path / name).returncode == 0
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names if n != "manifest.json")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["a.jsonl", "no document"]),
        ("a.jsonl", b'{"id": "1", "text": "x"}\n' * 6 + b"{broken\n", ["a.jsonl line 7"]),
        ("a.jsonl", b'{"text": "x"}\n', ["a.jsonl line 1", "no field 'id'"]),
        ("a.jsonl", b'["a list"]\n', ["a.jsonl line 1"]),
        ("a.jsonl.zst", b"(\xb5/\xfd\x00\x00\x00 broken", ["a.jsonl.zst", "damaged"]),
        ("a.jsonl", b'{"id": "1", "text": "x"}\n', ["a.jsonl", "--held-out"]),
    ],
    ids=["empty", "line 7", "no id", "a list", "damaged zstd", "nothing held out"],
)
def test_bad_input_ends_in_one_sentence(name, content, words, tokenizer, run_script, tmp_path):
    (tmp_path / name).write_bytes(content)
    answer = run_script("tokenize_corpus.py", "--input", tmp_path / name, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert answer.returncode == 1
    assert all(word in answer.stderr for word in words), answer.stderr
    assert "Traceback" not in answer.stderr
    assert {p.name for p in (tmp_path / "out").glob("*")} <= {".begun.json"}


def test_a_full_disk_leaves_nothing_half_written(corpus, tokenizer, run_script, tmp_path):
    """A limit on the size of files stands in for the disk."""
    _, folder, _ = corpus
    arguments = ("--input", folder, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--held-out", 0.1)
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))}
    answer = run_script("tokenize_corpus.py", *arguments, **full)
    assert answer.returncode == 1
    assert "File too large" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".begun.json"}
    assert run_script("tokenize_corpus.py", *arguments).returncode == 0


def test_a_folder_that_is_no_tokenizer(corpus, tokenizer, run_script, tmp_path):
    _, folder, _ = corpus
    broken = shutil.copytree(tokenizer, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}", encoding="utf-8")
    same = shutil.copytree(tokenizer, tmp_path / "same")
    config = json.loads((same / "tokenizer_config.json").read_text(encoding="utf-8"))
    (same / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": config["eos_token"]}), encoding="utf-8")
    for bad, word in ((tmp_path / "none", "tokenizer.json"), (broken, "no tokenizer"), (same, "eos and pad")):
        answer = run_script("tokenize_corpus.py", "--input", folder, "--tokenizer", bad, "--output", tmp_path / "out")
        assert answer.returncode == 1
        assert word in answer.stderr
        assert "Traceback" not in answer.stderr
        assert not (tmp_path / "out").exists()
