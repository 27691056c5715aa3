"""dedup_text.py: near-duplicates go, each verified against one that stays; kept lines are untouched; nothing else is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, clean_environment

SAMPLE = ROOT / "data" / "sample" / "text"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dump(*texts, **fields):
    return "".join(json.dumps({"id": f"d{i}", "text": text} | fields, ensure_ascii=False) + "\n" for i, text in enumerate(texts))


def shingles(text):
    """An independent reference: 5-grams of lower-cased words, a Chinese character being a word."""
    words = re.findall(r"[\u2e80-\u9fff]|[^\W\u2e80-\u9fff]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else {text}


def similarity(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def sentences(seed, count, vocabulary=4000):
    random_words = random.Random(seed)
    return [f"w{random_words.randrange(vocabulary)}" for _ in range(count)]


def edited(words, share, seed):
    """Return the words with a share of them replaced."""
    dice = random.Random(seed)
    return [f"x{dice.random()}".replace(".", "") if dice.random() < share else word for word in words]


@pytest.fixture
def dedup(run_script, tmp_path):
    """dedup(text or None, *arguments, code=0): run on tmp_path/in.jsonl; returns (kept ids, removed rows, stderr)."""

    def run(text, *arguments, code=0, name="in.jsonl"):
        if text is not None:
            (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        result = run_script("dedup_text.py", "--input", name, "--output", "out", *arguments, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        whole = (tmp_path / "out" / "manifest.json").exists()
        kept = [row.get("id") for row in rows(tmp_path / "out" / "data.jsonl")] if whole else None
        return kept, rows(tmp_path / "out" / "removed.jsonl") if whole else None, result.stderr

    return run


def test_every_removal_is_verified_and_no_pair_is_left(dedup, tmp_path):
    """English with 0 to 10 % of the words replaced, Chinese cut by 0 to 26 %: an exact reference finds no false removal and no miss."""
    texts = []
    for i in range(100):
        words, characters = sentences(i, 150), [chr(0x4E00 + code) for code in random.Random(i).sample(range(3000), 150)]
        texts += [" ".join(words), " ".join(edited(words, i / 1000, i))]
        texts += ["".join(characters), "".join(characters[: 150 - 2 * i // 5])]
    kept, removed, _ = dedup(dump(*texts), "--max-loss", "1")
    for row in removed:
        assert row["kept_id"] in kept
        exact = similarity(texts[int(row["id"][1:])], texts[int(row["kept_id"][1:])])
        assert exact >= 0.8
        assert row["jaccard"] == pytest.approx(exact, abs=1e-4)
    pairs = {i: similarity(texts[i], texts[i + 1]) for i in range(0, 400, 2)}
    assert {row["id"] for row in removed} == {f"d{i + 1}" for i, exact in pairs.items() if exact >= 0.8}
    assert 50 < len(removed) < 190
    assert sorted(kept + [row["id"] for row in removed]) == sorted(f"d{i}" for i in range(400))


def test_nothing_is_chained(dedup):
    """Each document resembles the one before it, the last not the first: a connected component would leave one of them."""
    words = sentences(1, 400)
    texts = [" ".join([f"new{j}" for j in range(i * 25)] + words[i * 25 :]) for i in range(6)]
    assert similarity(texts[0], texts[1]) >= 0.8 > similarity(texts[0], texts[2])
    kept, removed, _ = dedup(dump(*texts), "--max-loss", "1")
    assert kept == ["d0", "d2", "d4"]
    assert [(row["id"], row["kept_id"]) for row in removed] == [("d1", "d0"), ("d3", "d2"), ("d5", "d4")]


def test_short_documents_and_documents_without_words(dedup):
    texts = [
        "Yes.",
        "No.",
        "yes",
        "。",
        "！",
        "。",
        "",
        "",
        "好",
        "好的",
        "好。",
        "one two three four",
        "one two three",
        "🙂",
        "🙃",
        "١٢٣",
        "Ünï",
    ]
    kept, removed, _ = dedup(dump(*texts), "--max-loss", "1")
    gone = [(texts[int(row["id"][1:])], texts[int(row["kept_id"][1:])], row["jaccard"]) for row in removed]
    assert gone == [("yes", "Yes.", 1.0), ("。", "。", 1.0), ("", "", 1.0), ("好。", "好", 1.0)]
    assert len(kept) == len(texts) - 4


def test_case_and_punctuation_do_not_hide_a_duplicate_and_word_order_does(dedup):
    text = "Four score and seven years ago our fathers brought forth on this continent a new nation conceived in liberty"
    same, other = text.upper().replace(" ", ",\n"), " ".join(reversed(text.split()))
    kept, removed, _ = dedup(
        dump(text, same, other, "春眠不覺曉，處處聞啼鳥。夜來風雨聲", "春眠 不覺曉 處處聞啼鳥 夜來風雨聲！"), "--max-loss", "1"
    )
    assert kept == ["d0", "d2", "d3"]
    assert [row["jaccard"] for row in removed] == [1.0, 1.0]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.95, 1.0])
def test_threshold(dedup, threshold):
    """The bands follow the threshold: pairs just above it are found, pairs just below it stay."""
    texts = []
    for i in range(100):
        words = sentences(i, 300, 10**6)
        texts += [" ".join(words), " ".join(words[: 300 - 2 * i])]
    _, removed, _ = dedup(dump(*texts), "--threshold", threshold, "--max-loss", "1")
    expected = {f"d{i + 1}" for i in range(0, 200, 2) if similarity(texts[i], texts[i + 1]) >= threshold}
    assert {row["id"] for row in removed} == expected


def test_kept_lines_are_copied_raw_and_in_order(dedup, tmp_path):
    lines = [
        b'{ "id":3,"text" : "caf\\u00e9 one",  "extra": [1.0, 2e5] }\n',
        b"\n",
        b'{"text":"two","meta":{"b":1,"a":2}}\r\n',
        b'{"text": "three"}',
    ]
    dedup(b"".join(lines))
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == lines[0] + lines[2] + lines[3] + b"\n"


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet", "in"])
def test_inputs(dedup, tmp_path, name):
    """Packed files, parquet, and the folder of another stage, whose rejected.jsonl and manifest.json are no documents."""
    texts = ["the same text in two documents of this file, word for word", "another text altogether, which nothing else resembles at all"]
    lines = dump(texts[0], texts[1], texts[0])
    if name == "in":
        (tmp_path / name).mkdir()
        (tmp_path / name / "data-00000.jsonl").write_text(lines)
        (tmp_path / name / "rejected.jsonl").write_text(dump("rejected"))
        (tmp_path / name / "manifest.json").write_text("{}")
    elif name == "in.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines.splitlines()]), tmp_path / name)
    else:
        with pyarrow.output_stream(str(tmp_path / name), compression="gzip" if name.endswith("gz") else "zstd") as stream:
            stream.write(lines.encode())
    kept, removed, _ = dedup(None, "--max-loss", "1", name=name)
    assert kept == ["d0", "d1"]
    assert [(row["id"], row["kept_id"]) for row in removed] == [("d2", "d0")]


def test_lines_that_are_no_documents_are_listed(dedup, tmp_path):
    good = dump(*[f"document number {i} stands alone here" for i in range(6)]).splitlines(keepends=True)
    bad = ['{"text": "cut\n', '{"body": "x"}\n', '{"text": 5}\n', '["text"]\n']
    kept, _, stderr = dedup("".join([*good, *bad]))
    assert len(kept) == 6
    assert "4 lines are none" in stderr
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert [(row["file"], row["line"], row["raw"]) for row in rejected] == [("in.jsonl", 7 + i, line) for i, line in enumerate(bad)]
    assert "not JSON" in rejected[0]["reason"]
    assert all("--text-field" in row["reason"] for row in rejected[1:])


@pytest.mark.parametrize(
    ("data", "words"),
    [("", ["in.jsonl", "no usable document"]), (bytes(range(256)), ["no usable document"]), ('{"body": "x"}\n', ["no usable document"])],
)
def test_nothing_usable_is_one_sentence(dedup, tmp_path, data, words):
    _, _, stderr = dedup(data, code=1)
    assert all(word in stderr for word in words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_unknown_and_damaged_files(dedup, tmp_path):
    assert "none.jsonl" in dedup(None, code=1, name="none.jsonl")[2]
    assert "clean_text.py" in dedup("text", code=1, name="a.txt")[2]
    with pyarrow.output_stream(str(tmp_path / "cut.jsonl.gz"), compression="gzip") as stream:
        stream.write(dump(*[os.urandom(500).hex() for _ in range(20)]).encode())
    stderr = dedup((tmp_path / "cut.jsonl.gz").read_bytes()[:-30], code=1, name="cut.jsonl.gz")[2]
    assert "cut.jsonl.gz line" in stderr
    assert "damaged" in stderr
    assert "Jaccard" in dedup(dump("a"), "--threshold", "1.5", code=2)[2]


def test_wipe_out_alarm_names_the_source(dedup, tmp_path):
    alone = "".join(json.dumps({"text": f"{i} " * 8, "source": "fine"}) + "\n" for i in range(20))
    copies = "".join(json.dumps({"text": f"{i} " * 8, "source": "mirror"}) + "\n" for i in range(12))
    copies += "".join(json.dumps({"text": f"own {i} " * 8, "source": "mirror"}) + "\n" for i in range(4))
    _, _, stderr = dedup(alone + copies, code=1)
    assert "mirror lost 12 of 16" in stderr
    assert not (tmp_path / "out" / "data.jsonl").exists()
    _, removed, _ = dedup(None, "--max-loss", "0.8", "--overwrite")
    assert len(removed) == 12
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"]["sources"] == {"fine": {"read": 20, "removed": 0}, "mirror": {"read": 16, "removed": 12}}
    assert manifest["counts"]["clusters"] == 12


def test_second_run_is_a_no_op_and_a_killed_run_starts_again(dedup, tmp_path):
    texts = [" ".join(sentences(i % 15000, 40)) for i in range(20000)]
    (tmp_path / "in.jsonl").write_text(dump(*texts))
    command = [sys.executable, "-I", ROOT / "scripts" / "dedup_text.py", "--input", "in.jsonl", "--output", "out", "--max-loss", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=clean_environment())
    while not (tmp_path / "out" / ".removed.jsonl.tmp").exists() and not (tmp_path / "out" / "removed.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept, removed, _ = dedup(None, "--max-loss", "1")
    assert kept == [f"d{i}" for i in range(15000)]
    assert [row["kept_id"] for row in removed] == [f"d{i}" for i in range(5000)]
    assert "up to date" in dedup(None, "--max-loss", "1")[2]
    assert "threshold" in dedup(None, "--max-loss", "1", "--threshold", "0.9", code=3)[2]


def test_runs_where_no_cache_can_be_written(tmp_path):
    """A script in a read-only folder and a home that cannot be written: it compiles for itself and says nothing."""
    script = tmp_path / "dedup_text.py"
    script.write_bytes((ROOT / "scripts" / "dedup_text.py").read_bytes())
    (tmp_path / "__pycache__").touch()  # root may write everywhere: a file in the folder's place stops it too
    (tmp_path / "in.jsonl").write_text(dump("one text", "another text", "one text"))
    environment = clean_environment() | {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    command = [sys.executable, "-I", str(script), "--input", "in.jsonl", "--output", "out"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "removed 1 of 3" in result.stderr


def test_demo_sample(run_script, tmp_path):
    """The perturbed PEPs of the sample carry their Jaccard index: those at 0.8 or more go, the others stay."""
    clean = run_script("clean_text.py", "--config", "recipes/demo/clean-text.yaml", "--output", tmp_path / "clean", cwd=ROOT)
    assert clean.returncode == 0, clean.stderr
    result = run_script(
        "dedup_text.py", "--config", "recipes/demo/dedup.yaml", "--input", tmp_path / "clean", "--output", tmp_path / "out", cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    removed = {row["id"]: row["jaccard"] for row in rows(tmp_path / "out" / "removed.jsonl")}
    drafts = {row["id"]: row["meta"]["jaccard"] for row in rows(tmp_path / "clean" / "data-00000.jsonl") if "draft" in row["id"]}
    assert {name for name in removed if "draft" in name} == {name for name, known in drafts.items() if known >= 0.8}
    assert all(removed[name] == pytest.approx(drafts[name], abs=2e-4) for name in removed if "draft" in name)
    assert {"dirty-02", "dirty-15"} <= set(removed)
    assert len(removed) < 40
