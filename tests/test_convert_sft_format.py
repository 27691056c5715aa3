"""convert_sft_format.py: every record ends in data or in rejected, every field in the row or in the ledger."""

import contextlib
import csv
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from conftest import ROOT, clean_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPT = "convert_sft_format.py"
FORMATS = ("messages", "openai", "alpaca", "sharegpt", "chatml", "swift", "input_output", "trl")
SAMPLE = ROOT / "data" / "sample" / "sft"


@pytest.fixture(scope="module")
def module(load_script):
    return load_script(SCRIPT)


def rows(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def user(text, **more):
    return {"role": "user", "content": text} | more


def answer(text, **more):
    return {"role": "assistant", "content": text} | more


def call(name, arguments, call_id="call_0"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, call_id="call_0"):
    return {"role": "tool", "content": text, "tool_call_id": call_id}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]
PLAIN = [user("question"), answer("answer")]

# awkward but legal conversations: name, row
LEGAL = {
    "plain": {"messages": PLAIN},
    "system": {"messages": [{"role": "system", "content": "Be short."}, *PLAIN]},
    "several turns": {"messages": [*PLAIN, user("再问一次？"), answer("好的。")]},
    "assistant first": {"messages": [answer("Hello!"), *PLAIN]},
    "system in the middle": {"messages": [*PLAIN, {"role": "system", "content": "Now in French."}, user("encore"), answer("oui")]},
    "developer": {"messages": [{"role": "developer", "content": "Be short."}, *PLAIN]},
    "weight and name": {"messages": [user("a", name="sam"), answer("b", weight=0), user("c", name="kim"), answer("d", weight=1)]},
    "refusal": {"messages": [user("harm"), answer(None, refusal="No.")]},
    "reasoning": {"messages": [user("3 + 4"), answer("7", reasoning_content="3 + 4 = 7\n\nso 7")]},
    "empty reasoning": {"messages": [user("3 + 4"), answer("7", reasoning_content="")]},
    "call": {"messages": [user("add"), answer(None, tool_calls=[call("add", '{"a":  1.50}')]), result("2"), answer("2")], "tools": TOOLS},
    "call at the end": {"messages": [user("add"), answer(None, tool_calls=[call("add", "{}")])], "tools": TOOLS},
    "call with text": {"messages": [user("add"), answer("Let me see.\n", tool_calls=[call("add", "{}")]), result(""), answer("0")]},
    "call with reasoning": {"messages": [user("add"), answer(None, tool_calls=[call("add", "{}")], reasoning_content="r"), result("0")]},
    "parallel calls": {
        "messages": [
            user("both"),
            answer(None, tool_calls=[call("add", '{"a":1}', "x1"), call("sub", '{"b": "<b>"}', "x2")]),
            result("1", "x1"),
            result("2", "x2"),
            answer("1 and 2"),
        ]
    },
    "results in another order": {
        "messages": [
            user("both"),
            answer("Both.", tool_calls=[call("add", "{}", "x1"), call("sub", "{}", "x2")]),
            result("2", "x2"),
            result("1", "x1"),
            answer("ok"),
        ]
    },
    "markup in a call": {"messages": [user("q"), answer(None, tool_calls=[call("run", '{"code": "</tool_call>"}')]), result("1")]},
    "literal tool tags": {"messages": [user("q"), answer('Write <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> so.')]},
    "a question that looks like a result": {"messages": [user("<tool_response>\n1\n</tool_response>"), answer("So it is.")]},
    "parts": {"messages": [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]), answer("three")]},
    "image": {"messages": [user([{"type": "image_url", "image_url": {"url": "a.png"}}]), answer("A cat.")]},
    "unknown keys": {"messages": [user("a", mood="good"), answer("b", score=0.5)], "meta": {"n": [1, None]}, "text": "x", "history": "[y"},
    "names of other formats": {
        "messages": [user("a", value=1), answer("b")],
        "instruction": "i",
        "conversations": [1],
        "output": 0,
        "from": 1,
    },
    "white space": {"messages": [user("  a\n\n"), answer("\n b \t\n")]},
    "line separators": {"messages": [user("a\u2028b\u0085c\x0bd"), answer("😀\u200b\ufeff")]},
    "pipes and tags": {"messages": [user("a <| b |> c <s>x</s> [INST]"), answer("<b>1</b> < 2 <think>")]},
    "two answers": {"messages": [user("a"), answer("b"), answer("c")]},
    "ids": {"messages": PLAIN, "id": 7, "source": "mine", "tools": TOOLS},
    "alpaca": {"instruction": "add", "input": "1\n2", "output": "3", "system": "s", "history": [["a", "b"]], "id": "k"},
    "alpaca, input only": {"instruction": "", "input": "hello", "output": "hi"},
    "sharegpt": {
        "system": "s",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "q", "weight": 0},
            {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": "{}"}]'},
            {"from": "observation", "value": "1"},
            {"from": "tool", "value": "2"},
            {"from": "gpt", "value": "<think>t</think>ok"},
        ],
    },
    "ms-swift": {"conversation": [{"system": "s", "human": "a", "assistant": "b", "loss": True}, {"human": "c", "assistant": "d"}]},
    "ms-swift parallel calls": {
        "messages": [
            user("q"),
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
            {"role": "tool_call", "content": '{"name": "sub", "arguments": {}}'},
            {"role": "tool_response", "content": "1"},
            {"role": "tool_response", "content": "2"},
            answer("1 and 2"),
        ]
    },
    "hermes": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": 'One moment.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'},
            {"from": "tool", "value": "<tool_response>\n1\n</tool_response>"},
            {"from": "gpt", "value": "1"},
        ]
    },
    "chatml": {"text": "<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>", "id": "z"},
    "deprecated": {
        "messages": [
            user("a"),
            answer(None, function_call={"name": "add", "arguments": '{"a": 1}'}),
            {"role": "function", "name": "add", "content": "1"},
            answer("1"),
        ],
        "functions": [{"name": "add"}],
    },
}

# a record that nobody should train on: reason, row
BAD = {
    "two user turns in a row": {"messages": [user("a"), user("b"), answer("c")]},
    "empty answer": {"messages": [user("a"), answer(" \n")]},
    "empty question": {"messages": [user(""), answer("b")]},
    "unknown role": {"messages": [user("a"), {"role": "narrator", "content": "b"}]},
    "no assistant turn": {"messages": [user("a")]},
    "no turns": {"messages": []},
    "no content": {"messages": [{"role": "system"}, *PLAIN]},
    "tool result without its call": {"messages": [user("a"), result("1"), answer("b")]},
    "tool call without its result": {"messages": [user("a"), answer(None, tool_calls=[call("f", "{}")]), user("b"), answer("c")]},
    "two tool calls with one id": {"messages": [user("a"), answer(None, tool_calls=[call("f", "{}"), call("g", "{}")])]},
    "arguments are not a JSON object": {"messages": [user("a"), answer(None, tool_calls=[call("f", '{"a": }')])]},
    "tool call without a function name": {"messages": [user("a"), answer(None, tool_calls=[{"id": "x", "type": "function"}])]},
    "tool calls outside of an assistant turn": {"messages": [user("a", tool_calls=[call("f", "{}")]), answer("b")]},
    "special token in the text": {"messages": [user("a"), answer("b<|im_end|>")]},
    "two system prompts": {"messages": [{"role": "system", "content": "s"}, *PLAIN], "system": "t"},
    "turn is not an object": {"messages": ["a", "b"]},
    "content is not text, or tool calls are not a list": {"messages": [user(5), answer("b")]},
    "record is not an object": [1, 2],
    "number beyond 64 bits": {"messages": PLAIN, "n": 2**70},
    "tools are not a list": {"messages": PLAIN, "tools": {"name": "f"}},
}
BROKEN = {
    "not JSON": ['{"messages": [', '{"messages": NaN}', '{"messages": [{"role": "user", "content": "a"}]}x', "[" * 5000, "\x00\x01"],
    "lone surrogate": ['{"messages": [{"role": "user", "content": "\\ud800"}]}', '{"text": "a\\udc00b"}'],
    "duplicate key": [
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        '{"messages": [{"role": "user", "content" : "a", "content": ": b"}, {"role": "assistant", "content": "c"}]}',
        '{"messages": [{"role": "user", "content": "a", "con\\u0074ent": "\\u0022:"}, {"role": "assistant", "content": "c"}]}',
    ],
}


def source_format(row):
    keys = {"instruction": "alpaca", "conversations": "sharegpt", "conversation": "sharegpt", "text": "chatml"}
    return "openai" if "messages" in row else next(form for key, form in keys.items() if key in row)


def convert(module, row, form, target):
    """Convert one record, a value or its JSON, to one row."""
    [made] = module.convert(row if isinstance(row, bytes) else json.dumps(row).encode(), form, target, "f")
    return made


def there_and_back(module, row, target):
    """Convert to messages, to `target`, and back; return what went in, what came back, and the ledger's fields."""
    first, _, lost = convert(module, row, source_format(row), "messages")
    written, _, more = convert(module, first, "messages", target)
    back, _, rest = convert(module, written, target, "messages")
    return json.loads(first), json.loads(back), {field for field, _, _ in [*lost, *more, *rest]}


def differences(was, now, where=""):
    """Name the values that differ; an empty content is written "" or null, as the format has it."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = f"{where}." if where else ""
        return set().union(*(differences(was.get(key), now.get(key), inner + key) for key in was.keys() | now.keys()))
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return set().union(*(differences(*both, f"{where}[{n}]") for n, both in enumerate(zip(was, now, strict=True))))
    same = json.dumps(was) == json.dumps(now) or (where.endswith("content") and not was and not now)
    return set() if same else {where}


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", LEGAL)
def test_there_and_back_is_the_identity_or_the_ledger_names_the_difference(module, name, target):
    try:
        was, now, ledger = there_and_back(module, LEGAL[name], target)
    except module.Reject as reject:
        assert str(reject).startswith(f"{target} cannot hold it"), reject
        return
    assert differences(was, now) <= ledger
    assert [turn["content"] or None for turn in was["messages"]] == [turn["content"] or None for turn in now["messages"]] or name == "parts"


def test_which_conversations_a_format_cannot_hold(module):
    refused = {}
    for name, row in LEGAL.items():
        for target in FORMATS:
            try:
                there_and_back(module, row, target)
            except module.Reject:
                refused.setdefault(target, []).append(name)
    text = ["results in another order", "literal tool tags", "a question that looks like a result", "image"]
    in_order = [name for name in LEGAL if name in ("refusal", "markup in a call", *text)]
    tools = ["call", "call with text", "call with reasoning", "parallel calls", "markup in a call", "sharegpt", "ms-swift parallel calls"]
    order = ["assistant first", "system in the middle", "two answers", "hermes", "deprecated"]
    assert refused == {
        "alpaca": [name for name in LEGAL if name in (*in_order, *tools, *order)],
        "sharegpt": text,
        "chatml": in_order,
        "swift": ["refusal", "results in another order", "image"],
        "input_output": in_order,
    }


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_is_rejected_with_its_reason(module, reason):
    with pytest.raises(module.Reject) as caught:
        module.convert(json.dumps(BAD[reason]).encode(), "openai", "messages", "f")
    assert caught.value.reason == reason


@pytest.mark.parametrize(("reason", "line"), [(reason, line) for reason, lines in BROKEN.items() for line in lines])
def test_broken_json_is_rejected(module, reason, line):
    with pytest.raises(module.Reject) as caught:
        module.convert(line.encode(), "openai", "messages", "f")
    assert caught.value.reason == reason


def test_the_exact_rows(module):
    """What each format looks like, letter by letter."""
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            user("add"),
            answer("I add.", tool_calls=[call("add", '{"a":  1}', "abc")]),
            result("1", "abc"),
            answer("1", reasoning_content="easy"),
        ],
        "id": "k",
        "source": "f",
    }
    written = {target: json.loads(convert(module, row, "messages", target)[0]) for target in ("openai", "sharegpt", "chatml")}
    inline = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a":  1}}\n</tool_call>'
    thought = "<think>\neasy\n</think>\n\n1"
    assert written["openai"]["messages"] == [*row["messages"][:-1], answer(thought)]
    assert written["sharegpt"]["conversations"] == [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "add"},
        {"from": "gpt", "value": inline},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": thought},
    ]
    turns = [("system", "s"), ("user", "add"), ("assistant", inline), ("tool", "1"), ("assistant", thought)]
    assert written["chatml"]["text"] == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    alpaca = {"messages": [{"role": "system", "content": "s"}, user("a"), answer("b"), user("c"), answer("d")], "id": "k"}
    line, _, lost = convert(module, alpaca, "messages", "alpaca")
    expected = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]], "id": "k", "source": "f"}
    assert json.loads(line) == expected and not lost


def test_parallel_calls_of_ms_swift_get_their_results(module):
    messages = module.read(LEGAL["ms-swift parallel calls"], "openai")[0]["messages"]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["call_0", "call_1"]
    assert [turn["tool_call_id"] for turn in messages[2:4]] == ["call_0", "call_1"]


def test_the_ledger_names_field_and_value(module):
    row = {"messages": [user("a", name="sam"), answer("b", weight=0)], "text": "extra"}
    _, _, lost = convert(module, row, "openai", "chatml")
    assert {(field, value) for field, value, _ in lost} == {("text", "extra"), ("messages[0].name", "sam"), ("messages[1].weight", 0)}


def test_no_system_prompt_is_invented_and_none_is_lost(module):
    for name, row in LEGAL.items():
        had = json.dumps(row).count('"system"') - json.dumps(row).count('"system": ""')
        for target in FORMATS:
            try:
                line = convert(module, row, source_format(row), target)[0]
            except module.Reject:
                continue
            now = module.read(json.loads(line), target)[0]["messages"]
            was = module.read(json.loads(json.dumps(row)), source_format(row))[0]["messages"]
            prompts = [[turn["content"] for turn in turns if turn["role"] in ("system", "developer")] for turns in (was, now)]
            assert prompts[0] == prompts[1] and len(prompts[0]) <= had + 1, name


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "<b>", "\n\n", "<|", "a\n", '": "', "user: hi", "<think>\nx\n</think>\n\ny", "：」"]
).map(lambda text: text + ".")
VALUE = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT | st.lists(st.integers(0, 9), max_size=2)
ARGUMENTS = st.dictionaries(TEXT, VALUE, max_size=2).map(lambda value: json.dumps(value, ensure_ascii=len(value) > 1))


@st.composite
def conversations(draw):
    turns = [{"role": draw(st.sampled_from(["system", "developer"])), "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(user(draw(TEXT)) | draw(st.dictionaries(st.sampled_from(["name", "mood", "value"]), TEXT, max_size=1)))
        if draw(st.integers(0, 2)) == 0:
            ids = [f"id{len(turns)}_{n}" if draw(st.booleans()) else f"call_{n}" for n in range(draw(st.integers(1, 2)))]
            calls = [call(draw(st.sampled_from(["add", "求和"])), draw(ARGUMENTS), call_id) for call_id in ids]
            turns.append(answer(draw(st.none() | TEXT), tool_calls=calls))
            turns += [result(draw(st.just("") | TEXT), call_id) for call_id in draw(st.permutations(ids))]
        more = draw(st.fixed_dictionaries({}, optional={"weight": st.sampled_from([0, 1]), "reasoning_content": TEXT, "score": VALUE}))
        turns.append(answer(draw(TEXT)) | more)
    extras = draw(st.dictionaries(st.sampled_from(["meta", "text", "input", "history", "output", "lang"]), VALUE, max_size=2))
    kind = draw(st.sampled_from(["conversation", "conversation", "pair", "label"]))
    if kind == "pair":
        return {"messages": turns[:-1], "chosen": [turns[-1]], "rejected": [answer(draw(TEXT) + "!")]} | extras
    return {"messages": turns} | extras | ({"label": draw(st.booleans())} if kind == "label" else {})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(row=conversations(), form=st.sampled_from(FORMATS), target=st.sampled_from(FORMATS))
def test_any_conversation_in_any_format_there_and_back(module, row, form, target):
    """A -> B -> A is the identity, or the ledger names each difference: all three are compared as `messages`."""
    try:
        here = convert(module, row, "messages", form)[0]
        there, _, lost = convert(module, here, form, target)
        back, _, more = convert(module, there, target, form)
    except module.Reject:
        return
    was, now = (json.loads(convert(module, line, form, "messages")[0]) for line in (here, back))
    ledger = {field for field, _, _ in [*lost, *more]}
    assert differences(was, now) <= ledger
    assert json.loads(back) == json.loads(here) or ledger
    assert was["id"] == now["id"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        VALUE | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    )
)
def test_any_json_without_duplicate_keys_is_parsed(module, value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(" ,", " : "), indent=1)):
        assert module.parse(text) == value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(max_size=40).map(str.encode), form=st.sampled_from(FORMATS))
def test_no_bytes_end_in_a_traceback(module, raw, form):
    with pytest.raises(module.Reject):
        module.convert(raw, form, "messages", "f")


PLAIN_TEXT = st.sampled_from(["a", "b c", " ", "", "<b>", "你好"])
OPENAI_TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": PLAIN_TEXT})
SHAREGPT_TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "function_call"]), "value": PLAIN_TEXT})
EXTRAS = {
    "history": st.sampled_from([[], None, [["a", "b"]], ["ab"], {"ab": 1}, [["a", "b", "c"]], "ab", [["a", 1]]]),
    "id": st.sampled_from(["", "x", 1, None, True, 0.5]),
} | {
    key: st.sampled_from(["", "x", 1, None, []])
    for key in ("source", "system", "tools", "functions", "meta", "input", "label", "prompt", "kto_tag")
}
ROW = {
    "openai": {"messages": st.lists(OPENAI_TURN, max_size=4) | st.just([user("a"), answer("b"), user("c"), answer("d")])},
    "sharegpt": {
        "conversations": st.lists(SHAREGPT_TURN, max_size=4) | st.just([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
    },
    "alpaca": {"instruction": PLAIN_TEXT, "output": PLAIN_TEXT},
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), form=st.sampled_from(sorted(ROW)))
def test_the_cheap_road_reads_what_the_careful_one_reads(module, data, form):
    row = data.draw(st.fixed_dictionaries(ROW[form], optional=EXTRAS))
    target = data.draw(st.sampled_from(FORMATS))
    raw = json.dumps(row).encode()
    quick = module.quick(raw, json.loads(raw), form, target, "f")
    if quick is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "plain", lambda *_: None)
            line, _, lost = convert(module, raw, form, target)
        assert (line, lost) == (quick[0], quick[2])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), form=st.sampled_from(FORMATS), target=st.sampled_from(FORMATS))
def test_no_shape_is_unforeseen(module, data, form, target):
    """Keys that the formats know, with any value in any place: converted or rejected, nothing else."""
    keys = ["role", "from", "content", "value", "tool_calls", "function_call", "name", "id", "human", "assistant", "arguments", "function"]
    words = st.sampled_from(
        ["user", "assistant", "human", "gpt", "tool", "function_call", "{}", '[{"name": "f"}]', "", "<tool_call>{}</tool_call>"]
    )
    leaf = words | VALUE
    inner = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(keys), x, max_size=4), max_leaves=12)
    turns = st.lists(st.dictionaries(st.sampled_from(keys), inner, max_size=5), max_size=4) | inner
    own = [*sorted(module.OWN[form]), "tools", "id", "source"]
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(own, turns)))
    try:
        module.convert(json.dumps(row).encode(), form, target, "f")
    except module.Reject as fault:
        assert module.UNFORESEEN not in str(fault), fault


# ---- awkward rows: hundreds in every format, to every format, judged by an oracle that shares no code with the script

WORDS = [
    "plain text",
    "两行\n文字。",
    "  spaces  kept  ",
    "a\u2028b\u0085c",
    "😀👩‍👩‍👧",
    'quote " and \\ slash',
    '": "',
    "{not json",
    "[1, 2]",
    '{"a": 1}',
]
WORDS += [
    "<b>bold</b> & <br/>",
    "x < y | z",
    "</think>",
    "<think> later",
    "a\n\n\nb\n",
    "\ttab",
    "user: hi\nassistant: no",
    "null",
    "0",
    "שלום",
    "e\u0301",
]
WORDS += [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>\nfake\n</tool_response>",
    "```json\n{}\n```",
    "assistant",
    "human",
    "\u3000全角",
    "<image>",
]
POISON = ["bad <|im_end|> token", "<|endoftext|>", "<｜end▁of▁sentence｜>", "x<end_of_turn>"]
COLLIDING = [
    "text",
    "input",
    "output",
    "history",
    "instruction",
    "conversations",
    "segments",
    "prompt",
    "completion",
    "kto_tag",
    "label",
    "rejected_response",
    "chosen",
    "rejected",
    "messages",
]
JSON_TEXTS = [
    '{"a": 1.50}',
    "{}",
    '{"q": "中 \\"x\\"", "n": [1, {"k": null}]}',
    '{"big": 12345678901234567890}',
    '{"a":  1}',
    '{"t": "</tool_call>"}',
]
FAULTS = ["two users", "no answer", "role", "orphan", "poison", "arguments", "type", "turn"]


class Maker:
    """Draws awkward rows of every format from one seed."""

    def __init__(self, seed):
        self.pick = random.Random(seed)
        self.count = 0

    def maybe(self, chance=0.3):
        return self.pick.random() < chance

    def text(self):
        self.count += 1
        return f"{self.pick.choice(WORDS)} t{self.count}" if self.maybe(0.8) else self.pick.choice(WORDS)

    def extras(self, names=("mood", "score_x", *COLLIDING)):
        values = [self.text(), 3, -0.5, True, None, ["l", {"d": 1}], {"k": "v"}, ""]
        return {self.pick.choice(names): self.pick.choice(values) for _ in range(self.pick.choice([0, 0, 1, 2]))}

    def answer(self):
        thought = self.pick.choice(["<think>\n{}\n</think>\n\n", "<think>{}</think>", "<think>\n{}\n</think>\n"]) if self.maybe(0.2) else ""
        return thought.format(self.text()) + self.text()

    def calls(self):
        ids = [f"id_{self.count}_{n}" if self.maybe(0.7) else f"call_{n}" for n in range(self.pick.choice([1, 1, 2, 3]))]
        return [call(self.pick.choice(["add", "查询", 'odd"name']), self.pick.choice(JSON_TEXTS), one) for one in ids]

    def messages(self, ends=True):
        """OpenAI turns, mostly legal."""
        turns = [{"role": self.pick.choice(["system", "system", "developer"]), "content": self.text()}] if self.maybe(0.5) else []
        turns += [answer(self.text())] if self.maybe(0.05) else []
        for _ in range(self.pick.choice([1, 1, 2, 3])):
            turns.append(user(self.text()) | ({"name": "sam"} if self.maybe(0.1) else {}))
            if self.maybe(0.1):
                turns[-1]["content"] = [{"type": "text", "text": self.text()}, {"type": "text", "text": self.text()}]
            if self.maybe(0.05):
                turns[-1]["content"] = [{"type": "image_url", "image_url": {"url": f"{self.count}.png"}}]
            if self.maybe(0.3):
                calls = self.calls()
                more = {"reasoning_content": self.text()} if self.maybe(0.2) else {}
                turns.append(answer(self.text() if self.maybe() else self.pick.choice([None, ""]), tool_calls=calls) | more)
                order = calls if self.maybe(0.9) else calls[::-1]
                turns += [result(self.text() if self.maybe(0.9) else "", one["id"]) for one in order]
            elif self.maybe(0.05):
                turns.append(answer(None, function_call={"name": "add", "arguments": "{}"}))
                turns.append({"role": "function", "name": "add", "content": self.text()})
            turns.append(
                answer(self.answer())
                | ({"weight": self.pick.choice([0, 1])} if self.maybe(0.2) else {})
                | self.extras(["mood", "value", "loss"])
            )
            if self.maybe(0.05):
                turns[-1] = answer(None, refusal=self.text())
            if self.maybe(0.1):
                turns[-1]["reasoning_content"] = self.text()
        return turns if ends else turns[:-1]

    def row(self, form):
        make = getattr(self, form)
        row = make() | self.extras() | ({"id": self.pick.choice(["k1", 7, "", None])} if self.maybe() else {})
        return self.broken(row) if self.maybe(0.25) else row

    def broken(self, row):
        """Damage a row in one of the ways that data is damaged."""
        row, fault = json.loads(json.dumps(row)), self.pick.choice(FAULTS)
        turns = next(
            (
                v
                for k, v in row.items()
                if k in ("messages", "conversations", "prompt") and isinstance(v, list) and v and all(isinstance(t, dict) for t in v)
            ),
            None,
        )
        turn = self.pick.choice(turns) if turns else row
        key = next((key for key in ("content", "value", "output", "text", "human") if key in turn), "content")
        if fault == "two users" and turns:
            turns.insert(0, dict(turns[0]))
        elif fault == "no answer":
            turn[key] = self.pick.choice(["", " \n", None])
        elif fault == "role" and turns:
            turn.update({"role" if "role" in turn else "from": self.pick.choice(["narrator", 5, None])})
        elif fault == "orphan" and turns:
            turns.append(result("x", "nobody") if "role" in turn else {"from": "observation", "value": "x"})
        elif fault == "poison":
            turn[key] = self.pick.choice(POISON)
        elif fault == "arguments" and turns:
            bad = call("f", self.pick.choice(["{", "[]", '"x"', "", '{"a": 1, "a": 2}']))
            turns.append(
                answer(None, tool_calls=[bad]) if "role" in turn else {"from": "function_call", "value": '{"name": "f", "arguments": {'}
            )
        elif fault == "type":
            turn[key] = self.pick.choice([5, [], {}, [1], True, [{"type": "text"}]])
        elif turns:
            turns[0] = self.pick.choice([None, "text", 1, [], {}])
        return row

    def openai(self):
        if self.maybe(0.25):
            two = {"preferred_output": [answer(self.answer())], "non_preferred_output": [answer(self.text())]}
            return {
                "input": {"messages": self.messages(ends=False)} | ({"tools": TOOLS, "parallel_tool_calls": True} if self.maybe() else {})
            } | two
        row = {"messages": self.messages()}
        return row | ({"tools": TOOLS} if self.maybe() else {"functions": [{"name": "add"}]} if self.maybe(0.05) else {})

    def messages_row(self):
        if self.maybe(0.3):
            two = [[answer(self.answer())], answer(self.text()), self.text(), [answer(None, tool_calls=self.calls())]]
            return {"messages": self.messages(ends=False), "chosen": self.pick.choice(two), "rejected": [answer(self.text())]}
        return (
            {"messages": self.messages()} | ({"label": self.maybe()} if self.maybe() else {}) | ({"tools": TOOLS} if self.maybe() else {})
        )

    def alpaca(self):
        row = {"instruction": self.text() if self.maybe(0.9) else "", "input": self.text() if self.maybe(0.4) else ""}
        row |= {"system": self.text()} if self.maybe() else {}
        row |= {"history": [[self.text(), self.answer()] for _ in range(self.pick.choice([0, 1, 2]))]} if self.maybe(0.4) else {}
        if self.maybe(0.25):
            return row | {"chosen": self.answer(), "rejected": self.text()}
        return row | {"output": self.answer()} | ({"kto_tag": self.maybe()} if self.maybe(0.2) else {})

    def sharegpt(self):
        if self.maybe(0.1):
            return {"conversation": [{"human": self.text(), "assistant": self.answer()} | self.extras(["loss", "mood"]) for _ in range(2)]}
        turns = [{"from": "system", "value": self.text()}] if self.maybe() else []
        for _ in range(self.pick.choice([1, 2, 3])):
            turns.append({"from": "human", "value": self.text()})
            if self.maybe():
                calls = [
                    json.dumps({"name": "add", "arguments": json.loads(self.pick.choice(JSON_TEXTS))}, ensure_ascii=False)
                    for _ in range(self.pick.choice([1, 2]))
                ]
                turns.append({"from": "function_call", "value": calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"})
                turns += [{"from": self.pick.choice(["observation", "tool"]), "value": self.text()} for _ in calls]
            turns.append({"from": "gpt", "value": self.answer()} | self.extras(["weight", "mood", "loss"]))
        row = {"tools": json.dumps(TOOLS)} if self.maybe() else {}
        if self.maybe(0.25):
            return row | {"conversations": turns[:-1], "chosen": turns[-1], "rejected": {"from": "gpt", "value": self.text()}}
        return row | {"conversations": turns} | ({"kto_tag": self.maybe()} if self.maybe(0.2) else {})

    def chatml_turns(self):
        turns = [("system", self.text())] if self.maybe() else []
        for _ in range(self.pick.choice([1, 2])):
            turns += [("user", self.text()), ("assistant", self.answer())]
        return turns

    def chatml(self):
        between = self.pick.choice(["\n", "\n", "", "\n\n"])
        return {
            "text": between.join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in self.chatml_turns())
            + self.pick.choice(["\n", ""])
        }

    def swift(self):
        turns = [{"role": "system", "content": self.text()}] if self.maybe() else []
        for _ in range(self.pick.choice([1, 2])):
            turns.append(user(self.text()))
            if self.maybe():
                calls = self.pick.choice([1, 2])
                turns += [answer(self.text())] if self.maybe(0.2) else []
                turns += [
                    {"role": "tool_call", "content": f'{{"name": "add", "arguments": {self.pick.choice(JSON_TEXTS)}}}'}
                    for _ in range(calls)
                ]
                turns += [{"role": self.pick.choice(["tool_response", "tool"]), "content": self.text()} for _ in range(calls)]
            turns.append(
                answer(self.answer()) | ({"loss": self.maybe()} if self.maybe() else {}) | ({"loss_scale": 0.5} if self.maybe(0.1) else {})
            )
        row = {"messages": turns} | ({"tools": json.dumps(TOOLS)} if self.maybe() else {})
        worse = {"rejected_response": self.pick.choice([self.text(), [answer(self.text())]])} if self.maybe(0.25) else {}
        return row | worse | ({"label": self.maybe()} if not worse and self.maybe(0.2) else {})

    def input_output(self):
        if self.maybe(0.1):
            return {"segments": [{"label": True, "text": "<s>" + self.text()}, {"label": False, "text": self.text() + "</s>"}]}
        pieces = []
        for role, text in self.chatml_turns():
            trained = role == "assistant" if self.maybe(0.9) else self.maybe()
            whole = [(False, f"<|im_start|>{role}\n"), (trained, f"{text}<|im_end|>"), (False, "\n")]
            pieces += whole if self.maybe(0.9) else [(trained, "".join(text for _, text in whole))]
        return {"segments": [{"label": label, "text": text} for label, text in pieces]}

    def trl(self):
        prompt = self.text() if self.maybe() else self.messages(ends=False)
        answers = [self.text(), self.text()] if isinstance(prompt, str) else [[answer(self.answer())], [answer(self.text())]]
        kind = self.pick.choice(["messages", "pair", "whole", "label", "completion"])
        if kind == "messages":
            return {"messages": self.messages()}
        if kind == "whole" and isinstance(prompt, list):
            return {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
        if kind in ("pair", "whole"):
            return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        return {"prompt": prompt, "completion": answers[0]} | ({"label": self.maybe()} if kind == "label" else {})


MARKUP = re.compile(r"<\|im_start\|>\w*\n|<\|im_end\|>|</?think>|</?tool_call>|</?tool_response>")


def words_of(value, key=""):
    """Yield (key, scrap) for each scrap of text in a value: JSON inside of texts is opened, markup cut away; roles are left out."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from words_of(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from words_of(item, key)
    elif isinstance(value, str) and key not in ("role", "from", "type") and not re.fullmatch(r"call_\d", value):
        inner, scraps = None, [scrap.strip("\n") for scrap in MARKUP.split(value) if scrap.strip()]
        with contextlib.suppress(ValueError):
            inner = json.loads(value)
        if isinstance(inner, (dict, list)):
            yield from words_of(inner)
        elif scraps and scraps != [value]:
            yield from words_of(scraps, key)
        elif scraps:
            yield key, value
    elif (
        isinstance(value, (int, float))
        and key in ("mood", "score_x", "value", *COLLIDING)
        and not (key in ("label", "kto_tag") and value in (0, 1))
    ):
        yield key, f"{key} = {value}"


def texts_of(value):
    """Return all that a value says, as it stands and with JSON and markup opened, in one text."""
    whole = [value] if isinstance(value, str) else value
    found, todo = [scrap for _, scrap in words_of(whole)], [whole]
    while todo:
        item = todo.pop()
        todo += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        found += [item] if isinstance(item, str) else []
    return "\0".join(found)


def unlisted(row, made, ledger):
    """Return the scraps of `row` that are neither in the written row nor in the ledger, and those that the written row adds."""
    kept, source = texts_of([made, [{re.split(r"[.\[]", field)[-1]: value} for field, value, _ in ledger]]), texts_of(row)
    lost = [scrap for _, scrap in words_of(row) if any(line not in kept for line in scrap.split("\n"))]
    written = [(key, scrap) for key, scrap in words_of({key: made[key] for key in made if key not in ("id", "source")})]
    added = [scrap for key, scrap in written if any(line not in source for line in scrap.split("\n")) and scrap != "function"]
    return lost, added


@pytest.mark.parametrize("form", FORMATS)
def test_no_awkward_row_is_damaged_in_silence(module, form):
    """Every row to every format: refused with a reason and a remedy, or nothing is lost, nothing added, and it can go back."""
    maker, outcomes = Maker(form), Counter()
    for _ in range(400):
        row = maker.messages_row() if form == "messages" else maker.row(form)
        raw = json.dumps(row, ensure_ascii=maker.maybe()).encode()
        for target in FORMATS:
            try:
                made, _, ledger = convert(module, raw, form, target)
            except module.Reject as fault:
                assert fault.reason and fault.remedy and module.UNFORESEEN not in str(fault), (str(fault), row)
                outcomes[target, "refused"] += 1
                continue
            outcomes[target, "made"] += 1
            cheap = module.quick(raw, module.loads(raw), form, target, "f")
            if cheap:
                outcomes[target, "cheap"] += 1
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(module, "plain", lambda *_: None)
                    careful = convert(module, raw, form, target)
                assert (cheap[0], cheap[2]) == (careful[0], careful[2])
            assert unlisted(row, json.loads(made), ledger) == ([], []), (target, row, json.loads(made), ledger)
            again, _, none = convert(module, made, target, target)
            assert (again, none) == (made, []), (target, row)
            back, _, more = convert(module, made, target, "messages")
            first = json.loads(convert(module, raw, form, "messages")[0])
            fields = {field for field, _, _ in [*ledger, *more]}
            assert differences(first, json.loads(back)) <= fields, (target, row, fields)
    assert all(outcomes[target, "made"] for target in FORMATS), outcomes


def write(path, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def test_rejects_and_losses_name_file_and_line(run_script, tmp_path):
    source = write(tmp_path / "chats.jsonl", [{"messages": PLAIN}, "", BAD["empty answer"], LEGAL["weight and name"], "{broken"])
    done = run_script(SCRIPT, "--input", source, "--to", "chatml", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rejected, losses, manifest = (tmp_path / "out" / name for name in ("rejected.jsonl", "losses.jsonl", "manifest.json"))
    assert [(row["file"], row["line"], row["reason"]) for row in rows(rejected)] == [
        (str(source), 3, "empty answer (messages[1])"),
        (str(source), 5, rows(rejected)[1]["reason"]),
    ]
    assert rows(rejected)[1]["reason"].startswith("not JSON") and rows(rejected)[1]["raw"] == "{broken"
    assert json.loads(rows(rejected)[0]["raw"]) == BAD["empty answer"]
    assert {(row["line"], row["field"], row["value"]) for row in rows(losses)} == {
        (4, "messages[0].name", "sam"),
        (4, "messages[1].weight", 0),
        (4, "messages[2].name", "kim"),
        (4, "messages[3].weight", 1),
    }
    record = json.loads(manifest.read_text())
    assert record["counts"] == {"records": 4, "kept": 2, "rejected": 2, "losses": 4}
    assert record["metrics"]["rejected"] == {"empty answer": 1, "not JSON": 1}
    assert record["metrics"]["losses"] == {"messages.name": 2, "messages.weight": 2}
    assert record["metrics"]["turns"] == {"user": 3, "assistant": 3} and record["metrics"]["from"] == {"openai": 2}
    assert record["inputs"][0]["sha256"] == __import__("hashlib").sha256(source.read_bytes()).hexdigest()
    again = run_script(SCRIPT, "--input", source, "--to", "chatml", "--output", tmp_path / "out")
    assert again.returncode == 0 and "up to date" in again.stderr
    other = run_script(SCRIPT, "--input", source, "--to", "alpaca", "--output", tmp_path / "out")
    assert other.returncode == 3 and "to was 'chatml'" in other.stderr


@pytest.mark.parametrize(("rows_in", "word"), [([LEGAL["weight and name"]], "name is lost"), ([BAD["empty answer"]], "empty answer")])
def test_strict_fails_on_the_first(run_script, tmp_path, rows_in, word):
    source = write(tmp_path / "chats.jsonl", [{"messages": PLAIN}, *rows_in])
    done = run_script(SCRIPT, "--input", source, "--to", "chatml", "--strict", "--output", tmp_path / "out")
    assert done.returncode == 1 and word in done.stderr and f"{source} line 2" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".begun.json"]


def containers(folder, table):
    """Write the same rows in every kind of file."""
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()
    array = json.dumps(table, indent=2).encode()
    cells = "messages,id\r\n" + "".join(f'"{json.dumps(row["messages"]).replace(chr(34), chr(34) * 2)}",{row["id"]}\r\n' for row in table)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[:40]) + gzip.compress(lines[40:]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:40]) + zstandard.compress(lines[40:]))
    (folder / "d.json").write_bytes(b"\xef\xbb\xbf" + array)
    (folder / "e.json.zst").write_bytes(zstandard.compress(array))
    (folder / "f.csv").write_text(cells, encoding="utf-8-sig", newline="")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "g.parquet")
    (folder / "notes.md").write_text("no records")


def test_every_container_gives_the_same_rows(run_script, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    table = [{"messages": LEGAL["weight and name"]["messages"], "id": "一"}, {"messages": LEGAL["call"]["messages"], "id": "二"}]
    containers(folder, table)
    done = run_script(SCRIPT, "--input", folder, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "notes.md: left out" in done.stderr
    written = rows(tmp_path / "out" / "data.jsonl")
    assert len(written) == 2 * 7 and not (tmp_path / "out" / "rejected.jsonl").read_text()
    for file in sorted(folder.glob("[a-g].*")):
        mine = [row for row in written if row["source"] == file.name]
        assert [row["id"] for row in mine] == ["一", "二"]
        assert [row["messages"] for row in mine] == [row["messages"] for row in table]
    chained = run_script(SCRIPT, "--input", tmp_path / "out", "--from", "messages", "--to", "openai", "--output", tmp_path / "next")
    assert chained.returncode == 0 and rows(tmp_path / "next" / "data.jsonl") == written, "a stage's folder is read, without its ledgers"


def test_text_file_of_chatml(run_script, tmp_path):
    one = "<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    (tmp_path / "chats.txt").write_text(f"\n{one}\n{one}<|endoftext|>\n{one}\n\n<|im_start|>user\nnot closed\n", encoding="utf-8")
    done = run_script(SCRIPT, "--input", tmp_path / "chats.txt", "--output", "-")
    assert done.returncode == 0
    assert [json.loads(line)["messages"] for line in done.stdout.splitlines()] == [[user("a\n\nb"), answer("c")]] * 3
    reject = next(json.loads(line) for line in done.stderr.splitlines() if line.startswith("{"))
    assert reject["line"] == 24 and reject["reason"].startswith("text outside of a turn")


PAIR = {"messages": [user("q")], "chosen": [answer("good")], "rejected": [answer("bad")], "id": "p", "source": "f"}


def test_the_exact_rows_of_preference_data(module):
    """A pair and a labelled answer as each tool's own reader wants them."""
    turns, good, bad = [user("q")], answer("good"), answer("bad")
    marks = {"id": "p", "source": "f"}
    expected = {
        "openai": {"input": {"messages": turns}, "preferred_output": [good], "non_preferred_output": [bad]},
        "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "swift": {"messages": [*turns, good], "rejected_response": [bad]},
        "trl": {"prompt": turns, "chosen": [good], "rejected": [bad]},
    }
    for target, row in expected.items():
        line, _, lost = convert(module, PAIR, "messages", target)
        assert json.loads(line) == row | marks and not lost
        for back in FORMATS:
            if back in ("chatml", "input_output"):
                with pytest.raises(module.Reject, match="a pair of answers"):
                    convert(module, line, target, back)
            else:
                there, _, lost = convert(module, line, target, back)
                assert json.loads(there) == expected.get(back, PAIR) | marks and not lost
    labelled = {"messages": [user("q"), bad], "label": False} | marks
    tags = {
        "openai": labelled,
        "alpaca": {"instruction": "q", "input": "", "output": "bad", "kto_tag": False} | marks,
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}], "kto_tag": False} | marks,
        "swift": labelled,
        "trl": {"prompt": turns, "completion": [bad], "label": False} | marks,
        "chatml": {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n", "label": False} | marks,
    }
    for target, row in tags.items():
        line, _, lost = convert(module, labelled, "messages", target)
        assert json.loads(line) == row and not lost
        assert json.loads(convert(module, line, target, "messages")[0]) == labelled


def test_what_becomes_of_a_pair(module):
    [(line, _, lost)] = module.convert(json.dumps(PAIR).encode(), "messages", "chatml", "f", pairs="chosen")
    assert "good" in json.loads(line)["text"] and "bad" not in line.decode()
    assert lost == [("rejected", [answer("bad")], "--pairs chosen keeps one answer")]
    two = module.convert(json.dumps(PAIR).encode(), "messages", "sharegpt", "f", pairs="label")
    tags = [(row["id"], row["conversations"][-1]["value"], row["kto_tag"]) for row in (json.loads(line) for line, _, _ in two)]
    assert tags == [("p-chosen", "good", True), ("p-rejected", "bad", False)] and not any(lost for _, _, lost in two)


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("a pair lacks an answer", {"messages": [user("q")], "chosen": [answer("a")]}),
        ("chosen and rejected are the same", {"messages": [user("q")], "chosen": [answer("a")], "rejected": "a"}),
        ("an answer before chosen and rejected", {"messages": PLAIN, "chosen": [answer("a")], "rejected": [answer("b")]}),
        ("a question inside of an answer", {"messages": [user("q")], "chosen": [answer("a"), user("r"), answer("s")], "rejected": "b"}),
        ("empty answer", {"messages": [user("q")], "chosen": [answer("a")], "rejected": [answer(" ")]}),
        ("special token in the text", {"messages": [user("q")], "chosen": [answer("a<|im_end|>")], "rejected": "b"}),
    ],
)
def test_a_bad_pair_is_rejected(module, reason, row):
    with pytest.raises(module.Reject) as caught:
        convert(module, row, "messages", "trl")
    assert caught.value.reason == reason and caught.value.remedy


def test_a_text_prompt_of_trl_is_a_user_turn_and_the_ledger_says_so(module):
    line, _, lost = convert(module, {"prompt": "q", "chosen": "good", "rejected": "bad", "id": "p"}, "trl", "messages")
    assert json.loads(line) == PAIR and lost == [("prompt", "q", "a text, written as a user turn")]
    more = {"prompt": [*PLAIN, user("q")], "completion": [answer("a")]}
    weights = [turn.get("weight") for turn in json.loads(convert(module, more, "trl", "messages")[0])["messages"]]
    assert weights == [None, 0, None, None], "TRL trains on the completion only"


def test_segments_of_axolotl(module):
    """Which answers are trained is kept; text that is not ChatML does not tell its turns."""
    row = {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d")]}
    segments = json.loads(convert(module, row, "openai", "input_output")[0])["segments"]
    assert [piece["text"] for piece in segments if piece["label"]] == ["d<|im_end|>"]
    assert json.loads(convert(module, {"segments": segments}, "input_output", "openai")[0])["messages"] == row["messages"]
    for reason, pieces in {
        "segments without ChatML turns": [(True, "<s>Hello")],
        "an answer is trained in part": [(False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nx"), (True, "y<|im_end|>\n")],
    }.items():
        with pytest.raises(module.Reject) as caught:
            convert(module, {"segments": [{"label": label, "text": text} for label, text in pieces]}, "input_output", "messages")
        assert caught.value.reason == reason


def test_fields_of_other_names(run_script, tmp_path):
    """--map in a recipe and on the command line; names that others use are known, and shown."""
    source = write(tmp_path / "a.jsonl", [{"talk": [{"who": "Q", "said": "a"}, {"who": "A", "said": "b"}]}])
    recipe = write(tmp_path / "r.yaml", [f"input: [{source}]", "map: [conversations=talk, from=who, value=said, human=Q, gpt=A]"])
    done = run_script(SCRIPT, "--config", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0 and "sharegpt (conversations=talk), as 1 of its first 1 records show" in done.stderr, done.stderr
    [row] = rows(tmp_path / "out" / "data.jsonl")
    assert row["messages"] == [user("a"), answer("b")]
    names = {"talk": "conversations", "who": "from", "said": "value", "Q": "human", "A": "gpt"}
    mapping = json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["mapping"]
    assert mapping == {str(source): {"format": "sharegpt", "names": names}}
    for known in ({"query": "a", "response": "b"}, {"question": "a", "chosen": "b", "rejected": "c", "system": "s"}):
        done = run_script(SCRIPT, "--input", "-", "--output", "-", input=json.dumps(known) + "\n")
        assert json.loads(done.stdout)["messages"][-1 if "system" in known else 0] == user("a")
        assert f"instruction={next(iter(known))}" in done.stderr, done.stderr
    wrong = run_script(SCRIPT, "--input", source, "--map", "colour=who", "--output", tmp_path / "no")
    assert wrong.returncode == 2 and "colour=who" in wrong.stderr and not (tmp_path / "no").exists()
    words = ["--from", "alpaca", "--map", "output=reply", "--output", "-"]
    both = run_script(SCRIPT, "--input", "-", *words, input='{"output":"a","reply":"b"}\n')
    assert "duplicate key" in both.stderr and not both.stdout


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": PLAIN}, "openai"),
        ({"messages": PLAIN, "prompt": "question", "prompt_id": "1"}, "openai"),
        (PAIR, "messages"),
        ({"messages": PLAIN, "rejected_response": "b"}, "swift"),
        (LEGAL["ms-swift parallel calls"], "swift"),
        ({"input": {"messages": [user("q")]}, "preferred_output": [answer("a")], "non_preferred_output": [answer("b")]}, "openai"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "alpaca"),
        (LEGAL["sharegpt"], "sharegpt"),
        (LEGAL["ms-swift"], "sharegpt"),
        (LEGAL["chatml"], "chatml"),
        ({"segments": [{"label": True, "text": "a"}]}, "input_output"),
        ({"prompt": "a", "completion": "b", "label": True}, "trl"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "trl"),
        ({"chosen": [*PLAIN], "rejected": [user("question"), answer("b")]}, "trl"),
    ],
)
def test_the_format_is_seen(module, row, form):
    assert module.shapes(row) == [(form, {})]


def test_explain_shows_a_record_before_and_after_and_writes_nothing(run_script, tmp_path):
    lines = [{"messages": PLAIN}, {"messages": [user("长" * 90, name="sam"), answer("b")]}, BAD["empty answer"]]
    source = write(tmp_path / "chats.jsonl", lines)
    for number, words in {
        1: ["nothing is lost", '"from": "human"'],
        2: ["lost: messages[0].name", '"sam"'],
        3: ["rejected: empty answer"],
    }.items():
        target = "chatml" if number == 2 else "sharegpt"
        done = run_script(SCRIPT, "--input", source, "--to", target, "--explain", number, cwd=tmp_path, env={"COLUMNS": "100"})
        assert done.returncode == 0 and f"chats.jsonl line {number}: openai -> {target}" in done.stdout, done.stderr
        assert all(word in done.stdout for word in words)
        columns = [line.split(" │ ")[0] for line in done.stdout.splitlines() if " │ " in line]
        assert {len(left) + sum("\u4e00" <= letter <= "\u9fff" for letter in left) for left in columns} == {48}, "Chinese takes two columns"
    done = run_script(SCRIPT, "--input", source, "--explain", 9, cwd=tmp_path)
    assert done.returncode == 1 and "fewer records" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]
    assert run_script(SCRIPT, "--input", source, cwd=tmp_path).returncode == 2


def test_preference_data_in_tables(run_script, tmp_path):
    """A table holds turns as JSON texts, and a label as a word."""
    cells = '"question","reply","kto_tag"\r\n"a","b","True"\r\n"c","d","false"\r\n'
    (tmp_path / "a.csv").write_text(cells, encoding="utf-8", newline="")
    done = run_script(
        SCRIPT, "--input", tmp_path / "a.csv", "--map", "instruction=question", "output=reply", "--to", "trl", "--output", "-"
    )
    assert [row["label"] for row in map(json.loads, done.stdout.splitlines())] == [True, False], done.stderr
    two = {key: json.dumps(value) if isinstance(value, list) else value for key, value in PAIR.items()}
    with open(tmp_path / "b.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([two, two.values()])
    done = run_script(SCRIPT, "--input", tmp_path / "b.csv", "--output", "-")
    assert json.loads(done.stdout) == PAIR, done.stderr


@pytest.mark.slow
def test_trl_reads_what_is_written(module):
    """TRL itself tells the prompt of whole conversations, and what is conversational."""
    data_utils = pytest.importorskip("trl.data_utils")
    made = [
        json.loads(convert(module, row, "messages", "trl")[0]) for row in (PAIR, {"messages": PLAIN, "label": True}, {"messages": PLAIN})
    ]
    assert all(map(data_utils.is_conversational, made))
    whole = {"chosen": PAIR["messages"] + PAIR["chosen"], "rejected": PAIR["messages"] + PAIR["rejected"]}
    ours = json.loads(convert(module, whole, "trl", "trl")[0])
    assert data_utils.maybe_extract_prompt(whole) == {key: ours[key] for key in ("prompt", "chosen", "rejected")}


@pytest.mark.slow
def test_axolotl_reads_what_is_written(module):
    """Axolotl's own DPO strategy takes a pair of `messages` as it is, and its segments a row of `input_output`."""
    strategy = pytest.importorskip("axolotl.prompt_strategies.dpo.chat_template")
    from axolotl.prompt_strategies.input_output import RawInputOutputPrompter
    from axolotl.utils.dict import DictDefault

    class Tokenizer:
        def apply_chat_template(self, messages, add_generation_prompt=False, **_):
            text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
            return text + "<|im_start|>assistant\n" * add_generation_prompt

    transform, _ = strategy.default(DictDefault({"chat_template": "chatml", "datasets": [{"type": "chat_template.default"}]}))
    row = json.loads(convert(module, PAIR, "openai", "messages")[0])
    made = transform(row, Tokenizer())
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert (made["prompt"], made["chosen"], made["rejected"]) == (asked, "good<|im_end|>", "bad<|im_end|>")
    segments = json.loads(convert(module, {"messages": PLAIN}, "openai", "input_output")[0])["segments"]
    pieces = [*RawInputOutputPrompter().build_prompt(segments)]
    assert "".join(text for _, text in pieces) == Tokenizer().apply_chat_template(PLAIN)
    assert [text for label, text in pieces if label] == ["answer<|im_end|>"]


def test_the_benchmark_runs():
    bench = ROOT / "tests" / "bench" / "bench_sft_data.py"
    done = subprocess.run([sys.executable, bench, "--megabytes", "0.3", "--rounds", "1", "--peers", "none"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    directions = [["openai", "messages"], ["sharegpt", "messages"], ["alpaca", "messages"], ["messages", "sharegpt"]]
    assert [line.split()[2:4] for line in done.stdout.splitlines()[2:]] == directions * 2


def test_stdin_to_stdout(run_script, tmp_path):
    lines = "\n".join(json.dumps(row) for row in ({"messages": PLAIN}, BAD["no assistant turn"])) + "\n"
    done = run_script(SCRIPT, "--input", "-", "--to", "alpaca", "--output", "-", input=lines, cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert [json.loads(line)["output"] for line in done.stdout.splitlines()] == ["answer"]
    assert json.loads(done.stdout)["source"] == "stdin"
    assert any(line.startswith('{"file": "-", "line": 2, "reason": "no assistant turn"') for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("empty.jsonl", b"", 1, "holds no records"),
        ("binary.jsonl", b"\x7fELF\x00\x01", 1, "it is binary"),
        ("cut.jsonl.gz", gzip.compress(b'{"messages": []}\n' * 500)[:40], 1, "cut.jsonl.gz"),
        ("noise.jsonl.zst", b"no zstd at all", 1, "noise.jsonl.zst"),
        ("noise.parquet", b"no parquet at all", 1, "noise.parquet"),
        ("array.json", b'[{"instruction": "a", "output": "b"},\n{"instruction": "a" "output": "b"}]', 1, "line 2"),
        ("cut.json", b'[{"instruction": "a", "output": "b"},\n{"instruction": "a', 1, "line 2"),
        ("foreign.jsonl", b'{"said": "a", "heard": "b"}\n', 3, "'said', 'heard'; name the format with --from"),
        ("mixed.jsonl", b'{"messages": []}\n{"instruction": "a", "output": "b"}\n', 3, "1 look like"),
        ("both.jsonl", b'{"messages": [], "instruction": "a", "output": "b"}\n', 3, "none is known"),
    ],
)
def test_a_bad_file_ends_in_one_sentence(run_script, tmp_path, name, content, code, words):
    (tmp_path / name).write_bytes(content)
    done = run_script(SCRIPT, "--input", tmp_path / name, "--output", tmp_path / "out")
    assert done.returncode == code and words in done.stderr and name in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not list((tmp_path / "out").glob("[!.]*")) if (tmp_path / "out").exists() else True


def test_missing_file_and_folder_without_records(run_script, tmp_path):
    (tmp_path / "void").mkdir()
    for path in ("void", "missing.jsonl"):
        done = run_script(SCRIPT, "--input", tmp_path / path, "--output", tmp_path / "out")
        assert done.returncode == 1 and path in done.stderr and not (tmp_path / "out").exists()


def test_ragged_csv_is_rejected_line_by_line(run_script, tmp_path):
    (tmp_path / "a.csv").write_text('instruction,input,output\r\n"a\r\nb",,c\r\nd,e,f,g\r\nh,,\r\n', newline="")
    done = run_script(SCRIPT, "--input", tmp_path / "a.csv", "--from", "alpaca", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [row["messages"][0]["content"] for row in rows(tmp_path / "out" / "data.jsonl")] == ["a\r\nb"]
    rejected = [(row["line"], row["reason"]) for row in rows(tmp_path / "out" / "rejected.jsonl")]
    assert rejected == [(4, "more cells than columns"), (5, "empty answer (messages[1])")]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MB of rows as one JSON array: many times the memory that the program may take for it."""
    path = tmp_path_factory.mktemp("large") / "large.json"
    text = json.dumps({"messages": [user("x" * 1500), answer("答" * 500)]}, ensure_ascii=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join([text] * 19_000) + "\n]\n")
    return path


def test_memory_does_not_grow_with_the_input(large, tmp_path):
    command = [
        sys.executable,
        "-I",
        str(ROOT / "scripts" / SCRIPT),
        "--input",
        str(large),
        "--to",
        "sharegpt",
        "--output",
        str(tmp_path / "out"),
    ]
    # the shell between: a process forked from this one would count pytest's own memory as its peak
    subprocess.run(["sh", "-c", '"$@"; exit $?', "-", *command], check=True, capture_output=True, env=clean_environment())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["kept"] == 19_000 and large.stat().st_size > 55e6
    assert manifest["peak_rss_bytes"] < 80 * 2**20


def test_kill_and_run_again(large, tmp_path):
    command = [sys.executable, "-I", str(ROOT / "scripts" / SCRIPT), "--input", str(large), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=clean_environment())
    part = tmp_path / "out" / ".data.jsonl.tmp"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 2**20):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "data.jsonl").exists()
    subprocess.run(command, check=True, capture_output=True, env=clean_environment())
    with open(tmp_path / "out" / "data.jsonl", encoding="utf-8") as file:
        assert sum(1 for _ in file) == 19_000
    assert not part.exists() and (tmp_path / "out" / "manifest.json").exists()


def test_the_committed_sample(run_script, tmp_path):
    """The demo's input: four formats, five bad rows on purpose, and only the border of Alpaca's input is lost."""
    done = run_script(SCRIPT, "--config", ROOT / "recipes" / "demo" / "sft-data.yaml", "--output", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["metrics"]["from"]) == {"alpaca", "openai", "sharegpt", "chatml"}
    assert sum(manifest["metrics"]["rejected"].values()) == 5 == len(manifest["metrics"]["rejected"])
    assert set(manifest["metrics"]["losses"]) == {"messages.input"}
    data = rows(tmp_path / "out" / "data.jsonl")
    assert len({row["id"] for row in data}) == len(data) > 300
    for row in data:
        question = next(turn["content"] for turn in row["messages"] if turn["role"] == "user")
        if not question.startswith("Records:\n"):
            continue
        records, _, asked = question.partition("\n\nQuestion:\n")
        given = [line[1 : line.index("]")] for line in records.splitlines()[1:]]
        cited = [word.split("]")[0] for word in row["messages"][2]["content"].split("[")[1:] if word[:1] == "E"]
        assert asked and set(cited) <= set(given), row["id"]
        absent = "not in the knowledge base" in row["messages"][2]["content"] or "知识库中没有" in row["messages"][2]["content"]
        assert bool(cited) != absent
        chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in (asked, row["messages"][2]["content"])]
        assert chinese[0] == chinese[1], row["id"]


WHOLE = b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}'
FAULTY_FILES = {
    "two arrays.json": (b"[" + WHOLE + b"]\n[" + WHOLE + b"]\n", "line 2: '[' after the end of the array"),
    "an array a line.jsonl": (b'[{"instruction":"q","output":"a"}]\n{"instruction":"q","output":"b"}\n', "line 2: '{' after the end"),
    "deep.json": (b"[" + WHOLE[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "nested too deeply"),
    "cut.jsonl.zst": (zstandard.compress(b"\n".join([WHOLE] * 20_000))[:-40], "ended before the end of its last frame"),
    "twice.csv": (b"instruction,output,output\nq,a,b\n", "two columns are named 'output'"),
}


@pytest.mark.parametrize("name", FAULTY_FILES)
def test_a_file_that_is_not_whole_fails_in_one_sentence(run_script, tmp_path, name):
    content, words = FAULTY_FILES[name]
    (tmp_path / name).write_bytes(content)
    done = run_script(SCRIPT, "--input", tmp_path / name, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "data.jsonl").exists()


@pytest.mark.parametrize("value", [0, False, {}])
@pytest.mark.parametrize("target", FORMATS)
def test_a_value_that_is_only_false_is_not_taken_for_absent(module, value, target):
    alpaca = {"instruction": "q", "input": "i", "output": "a"}
    shapes = [("alpaca", alpaca | {key: value}) for key in ("instruction", "input", "output", "system", "history", "tools")]
    shapes += [("openai", {"messages": PLAIN, key: value}) for key in ("system", "tools", "functions")]
    shapes += [("trl", {"messages": PLAIN, "completion": value})]
    shapes += [("sharegpt", {"conversation": [{"system": value, "human": "q", "assistant": "a"}]})]
    for form, row in shapes:
        with pytest.raises(module.Reject) as caught:
            module.convert(json.dumps(row).encode(), form, target, "f")
        assert caught.value.remedy and caught.value.reason != module.UNFORESEEN


def test_a_text_of_a_table_that_is_json_stays_a_text(module):
    row = {"instruction": "q", "input": '{"a": 1}', "output": "a"}
    assert json.loads(module.convert(row, "alpaca", "alpaca", "f")[0][0])["input"] == '{"a": 1}'
    made = module.convert({"prompt": "q", "chosen": '{"a": 1}', "rejected": '[{"b": 2}]'}, "trl", "messages", "f")
    assert [made[0][1][key][0]["content"] for key in ("chosen", "rejected")] == ['{"a": 1}', '[{"b": 2}]']


def test_odd_rows_end_in_no_traceback_before_the_first_is_converted(run_script, tmp_path):
    deep = b'{"messages":' + b"[" * 1015 + b"]" * 1015 + b"}"
    (tmp_path / "odd.jsonl").write_bytes(b"\n".join([b'{"messages":[{"role":["user"]}]}', deep, *[WHOLE] * 9]))
    done = run_script(SCRIPT, "--input", tmp_path / "odd.jsonl", "--map", "user=human", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [row["reason"] for row in rows(tmp_path / "out" / "rejected.jsonl")] == [
        "unknown role (messages[0]: ['user'])",
        "nested too deeply",
    ]
    twice = run_script(SCRIPT, "--input", tmp_path / "odd.jsonl", "--map", "user=human", "assistant=human", "--output", tmp_path / "no")
    assert twice.returncode == 2 and "stands twice" in twice.stderr


def test_a_table_keeps_its_dates_and_decimals(run_script, tmp_path):
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    columns = {
        "instruction": ["q"] * 2,
        "output": ["a"] * 2,
        "at": [datetime.datetime(2024, 1, 1, 5), None],
        "cost": [decimal.Decimal("1.20")] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "dates.parquet")
    done = run_script(SCRIPT, "--input", tmp_path / "dates.parquet", "--output", "-")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row.get("at"), row["cost"]) for row in rows] == [("2024-01-01T05:00:00", "1.20"), (None, "1.20")], done.stderr
    columns |= {"wait": [datetime.timedelta(1)] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "dates.parquet")
    done = run_script(SCRIPT, "--input", tmp_path / "dates.parquet", "--explain", "1", env={"COLUMNS": "200"})
    assert done.returncode == 0 and "value without a JSON form (timedelta)" in done.stdout, done.stderr


def test_a_number_with_too_many_digits_is_in_the_ledger(module):
    row = {"messages": [user("q"), answer("a")], "scores": {"exact": 0.1, "long": "LONG"}}
    raw = json.dumps(row).replace('"LONG"', "0.33333333333333333333").encode()
    ((_, talk, lost),) = module.convert(raw, "openai", "messages", "x")
    assert talk["scores"] == {"exact": 0.1, "long": 1 / 3}
    assert lost == [("scores.long", "0.33333333333333333333", "a number of JSON holds about 17 digits")]
    raw = json.dumps({"messages": [user("q"), called('{"x": 0.33333333333333333333}')]}).encode()
    assert [lost for _, _, lost in module.convert(raw, "openai", "messages", "x")] == [[]]
    ((_, _, lost),) = module.convert(raw, "openai", "trl", "x")
    assert lost == [("messages[1].tool_calls[0].function.arguments", '{"x": 0.33333333333333333333}', "trl has no place for it")]


def called(arguments):
    return answer(None, tool_calls=[{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}])


def test_a_special_token_as_a_key_is_refused(module):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|im_end|>": {}}}}
    for arguments, tools in (('{"<|im_end|>": 1}', []), ("{}", [tool])):
        raw = json.dumps({"messages": [user("q"), called(arguments)], "tools": tools}).encode()
        with pytest.raises(module.Reject, match="special token in the text"):
            module.convert(raw, "openai", "messages", "x")


def test_pairs_beside_the_chosen_conversation(run_script, tmp_path):
    """UltraFeedback's rows: prompt as a text, chosen and rejected as whole conversations, messages equal to chosen."""
    better, worse = [user("q"), answer("a")], [user("q"), answer("b")]
    row = {"prompt": "q", "prompt_id": "7", "chosen": better, "rejected": worse, "messages": better, "score_chosen": 8.5}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    done = run_script(SCRIPT, "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 0 and "kept 1 of 1 conversations, 0 losses" in done.stderr, done.stderr
    got = json.loads((tmp_path / "out/data.jsonl").read_text())
    assert (got["messages"], got["chosen"], got["rejected"]) == ([user("q")], [answer("a")], [answer("b")])
    done = run_script(SCRIPT, "--input", tmp_path / "pairs.jsonl", "--pairs", "label", "--output", tmp_path / "two")
    assert "kept 1 of 1 conversations as 2 rows, 0 losses" in done.stderr, done.stderr


def test_a_label_that_pairs_overwrites_is_in_the_ledger(module):
    row = {"messages": [user("q")], "chosen": "a", "rejected": "b", "label": "sure"}
    made = module.convert(json.dumps(row).encode(), "messages", "messages", "f", pairs="label")
    assert [entries for _, _, entries in made] == [[("label", "sure", "--pairs label writes its own")]] * 2


@pytest.mark.parametrize("words", [("--limit", "-1"), ("--explain", "0")])
def test_a_count_below_the_first_record_is_bad_usage(run_script, tmp_path, words):
    done = run_script(SCRIPT, "--input", SAMPLE, "--output", tmp_path / "out", *words)
    assert done.returncode == 2 and "--explain N is 1 or more" in done.stderr
