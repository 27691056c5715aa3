"""clean_text.py: every format and encoding in, clean documents out, nothing lost without a line that says why."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, clean_environment

POEM = "靜夜思\n床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"
ENGLISH = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade."


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dump(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(path, data):
    """Write bytes to `path`, packed as its suffix says."""
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=packing) as stream:
        stream.write(data)


@pytest.fixture
def clean_text(run_script, tmp_path):
    """clean_text(*arguments, code=0): run on tmp_path/in into tmp_path/out; returns (documents, rejected, stderr)."""
    (tmp_path / "in").mkdir()

    def run(*arguments, code=0):
        result = run_script("clean_text.py", "--input", "in", "--output", "out", *arguments, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        documents = [row for path in sorted((tmp_path / "out").glob("data-*.jsonl")) for row in rows(path)]
        rejected = tmp_path / "out" / "rejected.jsonl"
        return documents, rows(rejected) if rejected.exists() else [], result.stderr

    return run


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_format_gives_the_same_documents(clean_text, tmp_path, packing):
    """The same two records as txt, jsonl, json (array and lines), csv and parquet: equal texts, ids and metadata."""
    records = [{"id": "a", "text": POEM, "title": "靜夜思"}, {"id": "b", "text": ENGLISH + ' "quoted", twice', "title": "fox"}]
    folder = tmp_path / "in"
    for record in records:
        write(folder / f"{record['id']}.txt{packing}", record["text"].encode())
    write(folder / f"1.jsonl{packing}", dump(*records))
    write(folder / f"2.json{packing}", json.dumps(records, indent=1).encode())
    write(folder / f"3.json{packing}", dump(*records))
    with open(tmp_path / "table.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    write(folder / f"4.csv{packing}", (tmp_path / "table.csv").read_bytes())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    write(folder / f"5.parquet{packing}", (tmp_path / "table.parquet").read_bytes())
    documents, rejected, _ = clean_text()
    assert rejected == []
    for name in ("1.jsonl", "2.json", "3.json", "4.csv", "5.parquet"):
        found = [document for document in documents if document["source"] == name + packing]
        expected = [{"id": r["id"], "text": r["text"], "source": name + packing, "meta": {"title": r["title"]}} for r in records]
        assert found == expected, name
    texts = [document for document in documents if document["source"] == "in"]
    assert [(d["text"], d["meta"]["file"]) for d in texts] == [(r["text"], f"{r['id']}.txt{packing}") for r in records]
    assert len({document["id"] for document in texts}) == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"]["kept"] == len(documents) == 12
    for entry in manifest["inputs"]:
        assert entry["sha256"] == hashlib.sha256((tmp_path / entry["path"]).read_bytes()).hexdigest(), entry["path"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "gb18030"])
def test_encodings(clean_text, tmp_path, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "in" / "poem.txt").write_bytes(mark + POEM.encode(encoding))
    (tmp_path / "in" / "rows.jsonl").write_bytes(mark + dump({"text": POEM}, {"text": ENGLISH}).decode().encode(encoding))
    (tmp_path / "in" / "rows.csv").write_bytes(mark + f'text\r\n"{POEM}"\r\n'.encode(encoding))
    documents, rejected, stderr = clean_text()
    assert rejected == []
    assert sorted(document["text"] for document in documents) == sorted([POEM, POEM, POEM, ENGLISH])
    assert ("GB18030" in stderr) == (encoding == "gb18030")


def test_western_bytes_are_not_taken_for_chinese(clean_text, tmp_path):
    """Latin-1 text decodes as GB18030 without an error: it must be refused, not turned into Chinese."""
    (tmp_path / "in" / "fr.txt").write_bytes("Le naïfvete démodée, l'élève à l'été: voilà où ça mène.".encode("latin-1"))
    (tmp_path / "in" / "ok.txt").write_text(ENGLISH)
    documents, rejected, stderr = clean_text()
    assert [document["text"] for document in documents] == [ENGLISH]
    assert rejected[0]["file"].endswith("fr.txt")
    assert "neither UTF-8 nor" in rejected[0]["reason"]
    assert "fr.txt" in stderr


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("  indented \t\nnext　 \n\n\n\n\nlast\n\n", "  indented\nnext\n\nlast"),
        ("\ufeffbell\x07 and \x1b[1;31mred\x1b[0m, \x00tab\tstays", "bell and red, tab\tstays"),
        ("cafe\u0301", "café"),
        ("，！（）“引号”……①ﬁ", "，！（）“引号”……①ﬁ"),
        (POEM.encode().decode("latin-1"), POEM),
        ("Itâ€™s naÃ¯ve", "It’s naïve"),
        ("«déjà» — “naïve”…", "«déjà» — “naïve”…"),
        ("a &lt;b&gt; &amp; c Ã©", "a &lt;b&gt; &amp; c é"),
        ("👩‍👩‍👧 👍🏽", "👩‍👩‍👧 👍🏽"),
    ],
)
def test_clean(load_script, dirty, expected):
    clean = load_script("clean_text.py").clean
    assert clean(dirty) == expected
    assert clean(expected) == expected


def test_bad_records_are_listed_with_line_and_reason(clean_text, tmp_path):
    lines = [
        dump({"text": ENGLISH}),
        b"\n",
        b'{"text": "cut\n',
        dump({"title": "no text", "id": 7}),
        dump({"text": None}),
        b'["a", "list"]\n',
        b'{"text": "\\ud800 half a pair"}\n',
        b'{"text": "\xff\xfe\xfa"}\n',
        dump({"text": " \n\t"}),
        *[dump({"text": f"{ENGLISH} {i}", "id": i}) for i in range(9)],
    ]
    (tmp_path / "in" / "rows.jsonl").write_bytes(b"".join(lines))
    documents, rejected, _ = clean_text()
    assert [document["id"] for document in documents][1:] == [str(i) for i in range(9)]
    reasons = {3: "not JSON", 4: "no text in field 'text' (there are title, id)", 5: "no text", 6: "object is wanted", 7: "not JSON"}
    reasons |= {8: "neither UTF-8", 9: "empty"}
    assert [row["line"] for row in rejected] == list(reasons)
    for row in rejected:
        assert row["file"] == "in/rows.jsonl"
        assert reasons[row["line"]] in row["reason"]
        assert row["raw"].encode() == lines[row["line"] - 1] or row["line"] == 8


def test_files_that_cannot_be_read_do_not_stop_the_others(clean_text, tmp_path):
    folder = tmp_path / "in"
    (folder / "good.txt").write_text(ENGLISH)
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "bad.parquet").write_bytes(b"PAR1 no table")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n")
    (folder / "array.json").write_text('[{"text": "a"},\n {"text": ]')
    (folder / "empty.jsonl").touch()
    (folder / "ragged.csv").write_text(f"id,text\n1,{ENGLISH.replace(',', ';')}\n2,a,b\n")
    write(folder / "cut.jsonl.gz", dump(*[{"text": f"{os.urandom(9999).hex()} {i}"} for i in range(150)]))
    (folder / "cut.jsonl.gz").write_bytes((folder / "cut.jsonl.gz").read_bytes()[:-20])
    documents, rejected, stderr = clean_text()
    reasons = {row["file"].removeprefix("in/"): row["reason"] for row in rejected}
    assert set(reasons) == {"binary.txt", "binary.jsonl", "bad.parquet", "image.png", "array.json", "ragged.csv", "cut.jsonl.gz"}
    assert "binary" in reasons["binary.txt"]
    assert ".png" in reasons["image.png"]
    assert "3 fields where the header has 2" in reasons["ragged.csv"]
    assert "Truncated" in reasons["cut.jsonl.gz"]
    assert ENGLISH in [document["text"] for document in documents]
    assert sum(document["source"] == "cut.jsonl.gz" for document in documents) >= 100, "what stands before the cut is kept"
    assert all(name in stderr for name in set(reasons) - {"ragged.csv"})


@pytest.mark.parametrize("name", ["none.txt", "empty.txt", "binary.txt"])
def test_nothing_usable_is_one_sentence(run_script, tmp_path, name):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    result = run_script("clean_text.py", "--input", name, "--output", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert name in result.stderr or "no usable document" in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_rules_count_characters_and_name_themselves(clean_text, tmp_path):
    texts = ["春眠不覺曉", "春眠不覺曉，處處聞啼鳥。", "short", "long enough", "x" * 60]
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump(*[{"text": text, "id": text} for text in texts]))
    documents, rejected, _ = clean_text("--min-chars", "10", "--max-chars", "50", "--max-loss", "0.7")
    assert [document["id"] for document in documents] == ["春眠不覺曉，處處聞啼鳥。", "long enough"]
    assert [row["reason"].partition(":")[0] for row in rejected] == ["short", "short", "long"]
    assert "5 characters, --min-chars is 10" in rejected[0]["reason"]


def test_languages(clean_text, tmp_path):
    texts = {
        "en": ENGLISH,
        "zh": POEM,
        "zh-code": "安装：`pip install transformers tokenizers` 即可使用，然后运行 `python train.py --config a.yaml`。",
        "fr": "Le renard brun saute par-dessus le chien paresseux, puis il se repose à l'ombre.",
        "ja": "これは日本語の文章です。漢字も含まれています。",
        "ko": "이것은 한국어 문장입니다. 여우가 개를 뛰어넘습니다.",
    }
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump(*[{"text": text, "id": name} for name, text in texts.items()]))
    documents, rejected, _ = clean_text("--languages", "en", "zh", "--max-loss", "0.6")
    assert [document["id"] for document in documents] == ["en", "zh", "zh-code"]
    assert [row["reason"].split(",")[0] for row in rejected] == ["language fr", "language ja", "language ko"]


def test_mask_pii(clean_text, tmp_path):
    text = "电话13812345678，邮箱a.b@mail.example.com。身份证11010519491231002X；call +86 138 1234 5678 or (212) 555-0100, SSN 078-05-1120"
    kept = "order 20231231, 3.14159, v1.2.3, 1381234567890, 2024-01-15, 192.168.0.1"
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump({"text": text, "id": 1}, {"text": kept, "id": 2}))
    documents, _, _ = clean_text("--mask-pii", "email", "phone", "id")
    assert documents[0]["text"] == "电话<PHONE>，邮箱<EMAIL>。身份证<ID>；call <PHONE> or <PHONE>, SSN <ID>"
    assert documents[1]["text"] == kept
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["counts"]["masked"] == 1


def test_fields_are_mapped_and_ids_are_stable(clean_text, tmp_path):
    records = [{"content": POEM, "key": 5, "author": "李白", "source": "唐詩", "meta": {"volume": 3}}, {"content": ENGLISH}]
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump(*records))
    documents, _, _ = clean_text("--text-field", "content", "--id-field", "key")
    assert documents[0] == {"id": "5", "text": POEM, "source": "唐詩", "meta": {"volume": 3, "author": "李白"}}
    assert documents[1]["id"] == hashlib.sha256(f"rows.jsonl\0{ENGLISH}".encode()).hexdigest()[:16]


def test_shards_hold_the_same_documents(clean_text, tmp_path):
    records = [{"id": str(i), "text": f"{ENGLISH * 400} {i}"} for i in range(90)]  # 36 kB each
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump(*records))
    documents, _, _ = clean_text("--shard-size", "1")
    assert [document["id"] for document in documents] == [record["id"] for record in records]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    shards = [entry for entry in manifest["outputs"] if "data-" in entry["path"]]
    assert len(shards) == 4
    assert sum(entry["records"] for entry in shards) == 90
    clean_text("--shard-size", "1", "--compress", "zst", "--overwrite")
    with pyarrow.input_stream(str(tmp_path / "out" / "data-00003.jsonl.zst")) as stream:
        assert json.loads(stream.read().splitlines()[-1])["id"] == "89"


def test_wipe_out_alarm_names_the_source(clean_text, tmp_path):
    good = [{"text": f"{ENGLISH} {i}"} for i in range(100)]
    (tmp_path / "in" / "good.jsonl").write_bytes(dump(*good))
    (tmp_path / "in" / "bad.jsonl").write_bytes(dump(*good[:4], *[{"text": "short"}] * 6))
    _, rejected, stderr = clean_text("--min-chars", "20", code=1)
    assert "bad.jsonl lost 6 of 10" in stderr
    assert "--max-loss" in stderr
    assert len(rejected) == 6
    assert not (tmp_path / "out" / "manifest.json").exists()
    documents, _, _ = clean_text("--min-chars", "20", "--max-loss", "0.65", "--overwrite")
    assert len(documents) == 104


def test_second_run_is_a_no_op_and_other_settings_are_refused(clean_text, tmp_path):
    (tmp_path / "in" / "a.txt").write_text(ENGLISH)
    clean_text()
    before = (tmp_path / "out" / "data-00000.jsonl").stat().st_mtime_ns
    assert "up to date" in clean_text()[2]
    assert (tmp_path / "out" / "data-00000.jsonl").stat().st_mtime_ns == before
    assert "min_chars" in clean_text("--min-chars", "5", code=3)[2]


def test_killed_run_goes_on_to_the_same_result(clean_text, tmp_path):
    """kill -9 while shards are written: no manifest, no half shard; the same command again gives what an undisturbed run gives."""
    records = [{"id": str(i), "text": f"{ENGLISH * 40} café {i}"} for i in range(8000)]
    (tmp_path / "in" / "rows.jsonl").write_bytes(dump(*records))
    command = [sys.executable, "-I", ROOT / "scripts" / "clean_text.py", "--input", "in", "--output", "out", "--shard-size", "5"]
    process = subprocess.Popen(command, cwd=tmp_path, env=clean_environment())
    while not list((tmp_path / "out").glob("data-00001*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    for shard in (tmp_path / "out").glob("data-*.jsonl"):
        assert shard.stat().st_size > 5_000_000, "a shard with its final name is whole"
    documents, _, _ = clean_text("--shard-size", "5")
    assert documents == [{"id": r["id"], "text": r["text"], "source": "rows.jsonl", "meta": {}} for r in records]
    assert not list((tmp_path / "out").glob(".*"))


def test_full_disk_is_one_sentence(run_script, tmp_path):
    """/dev/full stands for the disk: the shard's temporary name leads there."""
    (tmp_path / "a.jsonl").write_bytes(dump({"text": ENGLISH}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".begun.json").write_text("{}")
    (tmp_path / "out" / ".data-00000.jsonl.tmp").symlink_to("/dev/full")
    first = run_script("clean_text.py", "--input", "a.jsonl", "--output", "fresh", cwd=tmp_path)
    assert first.returncode == 0
    begun = json.loads((tmp_path / "fresh" / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / ".begun.json").write_text(json.dumps(begun))
    result = run_script("clean_text.py", "--input", "a.jsonl", "--output", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("data-*"))


def test_demo_recipe(run_script, tmp_path):
    """The committed sample: what is dirty in it comes out as it should."""
    result = run_script("clean_text.py", "--config", "recipes/demo/clean-text.yaml", "--output", tmp_path / "out", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = {row["id"]: row["text"] for row in rows(tmp_path / "out" / "data-00000.jsonl")}
    assert found["dirty-03"].startswith("昨暮侍玉霄亭坐")
    assert found["dirty-04"].startswith("It’s “explicit” – café, naïve, €5: ")
    assert found["dirty-10"].startswith("Python has no numeric type")
    assert [row["line"] for row in rows(tmp_path / "out" / "rejected.jsonl") if "mixed" in row["file"]] == [7, 8, 9]
    assert not any("\r" in text or "\0" in text or "\ufeff" in text for text in found.values())
