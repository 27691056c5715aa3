"""train_tokenizer.py: both models give back every text, special tokens stay text, exports and other readers give equal ids."""

import base64
import gzip
import json
import re

import pytest
from conftest import ROOT

TEXT = ROOT / "data" / "sample" / "text"
DOCUMENTS = [TEXT / "peps.jsonl.gz", TEXT / "song.jsonl.zst"]
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
HARD = "Tabs\tand\r\n  spaces, it's 1234567 <|im_end|> <|endoftext|> <0x0A> ▁x 學而時習之，不亦說乎？abc學 e\u0301é \u200b\x00\x7f\ufeff"
EVERY_BMP = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def load(folder):
    """Return the tokenizer as the stages use it: special tokens in a text are text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def bpe(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    answer = run_script(
        "train_tokenizer.py", "--input", *DOCUMENTS, "--output", folder, "--vocab-size", 4096, "--held-out", 0.05, "--export"
    )
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.fixture(scope="module")
def unigram(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "unigram"
    arguments = ("--output", folder, "--model", "unigram", "--vocab-size", 4096, "--limit", 150, "--held-out", 0.05)
    answer = run_script("train_tokenizer.py", "--input", *DOCUMENTS[1:], *arguments)
    assert answer.returncode == 0, answer.stderr
    return folder


def test_manifest_and_files(bpe):
    recorded = manifest(bpe)
    assert recorded["counts"]["vocabulary"] == load(bpe).get_vocab_size() == 4096
    ratios = recorded["metrics"]["bytes_per_token"]
    assert ratios["cjk"] > 2.5  # a character is three bytes
    assert ratios["latin"] > 2.8
    assert recorded["counts"]["documents"] > recorded["counts"]["held_out_documents"] > 10
    template = (bpe / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((bpe / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"] == template


def test_equal_runs_give_equal_files(bpe, run_script, tmp_path):
    arguments = ("--output", tmp_path / "t", "--vocab-size", 4096, "--held-out", 0.05, "--export")
    assert run_script("train_tokenizer.py", "--input", *DOCUMENTS, *arguments).returncode == 0
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        assert (tmp_path / "t" / name).read_bytes() == (bpe / name).read_bytes()
    again = run_script("train_tokenizer.py", "--input", *DOCUMENTS, *arguments)
    assert again.returncode == 0
    assert "up to date" in again.stderr
    other = run_script("train_tokenizer.py", "--input", *DOCUMENTS, *arguments, "--vocab-size", 4000)
    assert other.returncode == 3
    assert "vocab_size was 4096, is 4000" in other.stderr


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("text", [HARD, EVERY_BMP, "", "\U0001f409\U00020bb7" * 50], ids=["hard", "every BMP character", "empty", "astral"])
def test_every_text_comes_back_and_no_text_makes_a_special_token(model, text, request):
    tokenizer = load(request.getfixturevalue(model))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert min(ids, default=99) >= len(SPECIAL)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_tokens_do_not_glue(model, request):
    """No token joins Chinese with anything else, or two digits; none is a whole clause."""
    tokenizer = load(request.getfixturevalue(model))
    han = 0
    for i in range(len(SPECIAL) + 1, tokenizer.get_vocab_size()):
        text = tokenizer.decode([i], skip_special_tokens=False)
        if tokenizer.id_to_token(i).startswith("<0x") or "\ufffd" in text:
            continue  # a byte, or a part of a character
        if re.search("[一-鿿]", text):
            han += 1
            assert re.fullmatch("[㐀-鿿々〇豈-\ufaff\U00020000-\U0003ffff]{1,18}", text), text
        assert len(re.findall(r"\d", text)) <= 1, text
    assert han > 500


def test_transformers_loads_the_same_tokenizer(bpe):
    """The class that the server loads: equal ids, pad distinct from eos, special tokens where a chat needs them, ChatML rendered."""
    from transformers import AutoTokenizer

    loaded, tokenizer = AutoTokenizer.from_pretrained(bpe), load(bpe)
    plain = HARD.replace("<|im_end|> <|endoftext|>", "")
    assert loaded(plain, add_special_tokens=False).input_ids == tokenizer.encode(plain).ids
    assert loaded.decode(loaded(plain).input_ids) == plain
    assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token, loaded.pad_token_id) == ("<|endoftext|>", 0, "<|pad|>", 1)
    assert loaded.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]
    rendered = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    assert loaded.apply_chat_template(messages, tokenize=False) == rendered
    assert loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert loaded(rendered).input_ids.count(SPECIAL.index("<|im_end|>")) == 2


def test_tiktoken_export_gives_equal_ids(bpe):
    import tiktoken

    described = json.loads((bpe / "tiktoken.json").read_text(encoding="utf-8"))
    lines = [line.split() for line in (bpe / "tokenizer.tiktoken").read_text(encoding="utf-8").splitlines()]
    exported = tiktoken.Encoding("ours", mergeable_ranks={base64.b64decode(token): int(i) for token, i in lines}, **described)
    tokenizer = load(bpe)
    with gzip.open(DOCUMENTS[0], "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    for text in [HARD, *texts]:
        assert exported.encode_ordinary(text) == tokenizer.encode(text).ids


def test_a_text_that_does_not_come_back_is_named(load_script, bpe):
    """A tokenizer that loses something: the gate names the document; and an export with other ids is caught as well."""
    from tokenizers import normalizers

    script, lossy = load_script("train_tokenizer.py"), load(bpe)
    sample = [("f.jsonl", 3, {"id": "good", "text": "plain"}), ("f.jsonl", 4, {"id": "bad", "text": "Ｆｕｌｌ width"})]
    assert script.measure(load(bpe), sample, {})["latin"]["documents"] == 2
    lossy.normalizer = normalizers.NFKC()
    with pytest.raises(SystemExit, match=r"f.jsonl line 4: document 'bad' is not itself"):
        script.measure(lossy, sample, {})
    with pytest.raises(SystemExit, match=r"f.jsonl line 3: document 'good' has other ids in tiktoken"):
        script.measure(load(bpe), sample, {"tiktoken": lambda text: [0]})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["a.jsonl", "no document"]),
        ("a.jsonl", b"\x00\xff\xfe binary", ["a.jsonl line 1"]),
        ("a.jsonl", b'{"id": "1", "text": "x"}\n' * 6 + b"{broken\n", ["a.jsonl line 7"]),
        ("a.jsonl", b'{"id": "1"}\n', ["a.jsonl line 1", "no field 'text'"]),
        ("a.jsonl", b'{"id": "1", "text": null}\n', ["a.jsonl line 1", "strings"]),
        ("a.jsonl", b'{"id": "1", "text": "\\ud800"}\n', ["a.jsonl line 1"]),
        ("a.jsonl.gz", gzip.compress(b'{"id": "1", "text": "x"}\n' * 9)[:-12], ["a.jsonl.gz", "damaged"]),
        ("a.jsonl.zst", b"not zstd", ["a.jsonl.zst", "damaged"]),
        ("a.jsonl", b'{"id": "1", "text": "x"}\n', ["a.jsonl", "--held-out"]),
    ],
    ids=["empty", "binary", "line 7", "no text", "null", "lone surrogate", "cut gzip", "no zstd", "nothing held out"],
)
def test_bad_input_ends_in_one_sentence(name, content, words, run_script, tmp_path):
    (tmp_path / name).write_bytes(content)
    answer = run_script("train_tokenizer.py", "--input", tmp_path / name, "--output", tmp_path / "out")
    assert answer.returncode == 1
    assert all(word in answer.stderr for word in words), answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.strip().count("\n") == 0
    assert {p.name for p in (tmp_path / "out").glob("*")} <= {".begun.json"}


def test_a_missing_input_and_wrong_flags(run_script, tmp_path):
    answer = run_script("train_tokenizer.py", "--input", tmp_path / "none", "--output", tmp_path / "out")
    assert answer.returncode == 1
    assert "none" in answer.stderr
    for flags in (["--vocab-size", 100], ["--held-out", 0], ["--model", "unigram", "--export"]):
        assert run_script("train_tokenizer.py", "--input", *DOCUMENTS, "--output", tmp_path / "out", *flags).returncode == 2
    assert not (tmp_path / "out").exists()
