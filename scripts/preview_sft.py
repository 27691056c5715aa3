#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["axolotl==0.19.0", "pyyaml>=6", "tqdm>=4.66", "transformers>=5,<6"]
# ///
"""Show the exact tokens of a conversation as Axolotl will train on them: trained tokens marked, what sequence_len cuts, shares by role.

Usage:
    python scripts/preview_sft.py --data data/out/demo/sft-data --model data/out/demo/base-model --config recipes/demo/sft.yaml --row 3
    python scripts/preview_sft.py --data data.jsonl --config sft.yaml --id 7e5324c8947bfb1c --tokens --html /tmp/row.html
    make sft-preview RECIPE=demo ROW=3

Tokens and labels come from Axolotl's own chat_template strategy and tokenizer loader, with the dataset settings of train_sft.py. On a
terminal trained tokens are green, each second token in another shade; elsewhere a trained span stands in ⟦ ⟧. ↵ is a newline token's
sign, `template` the markup around the turns. After the conversation comes a summary of all rows: lengths, trained share by role, rows
over sequence_len, and rows that the chat template cannot show.

Reads   DATA (jsonl of {"messages": [...], "tools"?, "id"?}, or a folder with data*.jsonl), MODEL's tokenizer and config, the recipe.
Writes  standard output: the preview, or with --json one object with ids, labels (-100: not trained), roles, texts and the summary;
        --html FILE, a page that needs nothing else.
Exit    0 shown; 1 failed; 2 bad usage.
Needs   CPU, 1 GB of memory, 10 to 20 s for imports; no network for a local MODEL.
"""

import argparse
import collections
import contextlib
import html
import json
import logging
import os
import sys
import warnings
from pathlib import Path

# The dataset settings of train_sft.py
DATASET = {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}
DATASET |= {"train_on_eos": "turn", "message_field_training": "weight"}
MASKED = -100  # the label of a token that is not trained
NAMED = 5  # rows of each kind that the summary names
SHADES = {True: ("\033[30;42m", "\033[30;102m"), False: ("", "\033[2m")}  # by trained: every second token in the other
CUT = "\033[9;31m"
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color-scheme: light dark }}
pre {{ font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span {{ border-bottom: 1px solid #8888 }} pre span:nth-child(odd) {{ border-color: #8883 }}
.trained {{ background: #2e9e4f55 }} .cut {{ text-decoration: line-through; opacity: .55 }} th, td {{ text-align: right; padding: 0 .8em }}
th:first-child, td:first-child {{ text-align: left }}</style><h1>{title}</h1><p>Green tokens are trained; hover for position and id.</p>
<pre>{tokens}</pre>{table}{notes}"""


# >>> snippet: write_atomic
@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Yield a file that takes the place of `path`, fsynced, when the block ends well; else `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# <<<


def fail(message):
    raise SystemExit(f"preview_sft: {message}")


def read_recipe(path):
    """Return the Axolotl recipe as a dict; ValueError when it is none, or does not say how long a conversation may be."""
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"not an Axolotl recipe: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError("not an Axolotl recipe: no `key: value` lines")
    if not isinstance(recipe.get("sequence_len"), int):
        raise ValueError("no sequence_len; say how many tokens a conversation may have")
    return recipe


def load_strategy(model, recipe):
    """Return Axolotl's chat_template strategy with the tokenizer that its trainer would load for `recipe`."""
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1"} | ({"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {})
    logging.disable(logging.ERROR)  # importing Axolotl logs a dozen lines about kernels that a preview does not use
    warnings.simplefilter("ignore")
    from axolotl.loaders.tokenizer import load_tokenizer
    from axolotl.prompt_strategies import load
    from axolotl.utils.dict import DictDefault

    settings = DictDefault({"chat_template": "tokenizer_default"} | recipe | {"base_model": model, "tokenizer_config": model})
    try:
        return load("chat_template", load_tokenizer(settings), settings, DictDefault(DATASET))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "chat_template" in reason:
            fail(f"{model}: its tokenizer has no chat template; name one in the recipe, such as `chat_template: chatml`")
        fail(f"{model}: no model whose tokenizer can be loaded ({reason}); name a folder, or a hub name with a network")


def read_conversations(data):
    """Yield (number from 1, place, row) of each conversation in a file, or in the data*.jsonl of a folder."""
    number, files = 0, sorted(data.glob("data*.jsonl")) if data.is_dir() else [data]
    if not files or not data.exists():
        fail(f"{data}: no such file, or a folder without data*.jsonl; convert conversations by convert_sft_format.py first")
    for path in files:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    row = json.loads(raw)
                    if not all(isinstance(message["role"], str) for message in row["messages"]) or not row["messages"]:
                        raise ValueError("no message with a role")
                except (ValueError, KeyError, TypeError) as error:
                    why = f"no field {error}" if isinstance(error, KeyError) else error
                    fail(f"{path} line {line}: not a conversation ({why}); convert the data by convert_sft_format.py")
                number += 1
                yield number, f"{path} line {line} (id {row.get('id')})", row


def as_trained(row, template):
    """Return (messages, tools) as train_sft.py gives them to Axolotl: tool arguments parsed, only assistants' weights kept, a developer's
    turn the system's where the template knows no developer."""
    messages = json.loads(json.dumps(row["messages"]))
    developers = "'developer'" in template or '"developer"' in template
    for message in messages:
        if message["role"] == "developer" and not developers:
            message["role"] = "system"
        if message["role"] != "assistant":
            message.pop("weight", None)
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"].get("arguments"), str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages, row.get("tools") or None


def label(strategy, row):
    """Return (ids, labels, roles, texts), one of each a token, as Axolotl prepares a conversation; ValueError when the template cannot
    show it. A role is that of the turn whose content the token is or, for a trained token after it, ends; else `template`."""
    template = strategy.prompter.chat_template
    messages, tools = as_trained(row, template)
    shown = {"tools": tools, "tool_calls": any(message.get("tool_calls") for message in messages)}
    if hidden := [key for key, present in shown.items() if present and key not in template]:
        raise ValueError(f"the chat template does not show {hidden[0]}")
    # as strings and in a batch of one, as Axolotl's dataset has them
    prompt = {"messages": json.dumps(messages)} | ({"tools": json.dumps(tools)} if tools else {})
    try:
        prepared = strategy.tokenize_prompt({key: [value] for key, value in prompt.items()})
        ids, labels = prepared["input_ids"][0], prepared["labels"][0]
        turns = strategy.get_conversation_thread(prompt)
        located = strategy._build_turn_locator(turns, tools, ids)
        spans = [strategy.find_turn(turns=turns, turn_idx=at, tools=tools, locator=located) for at in range(len(turns))]
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the chat template cannot show it: {' '.join(str(error).split())[:200]}") from error
    roles, last = ["template"] * len(ids), "template"
    for turn, (start, end) in zip(turns, spans, strict=True):
        roles[start:end] = [turn["role"]] * max(0, end - start)
    for at, trained in enumerate(labels):
        last = roles[at] if roles[at] != "template" else last
        roles[at] = last if trained != MASKED else roles[at]
    if not located:
        return ids, labels, roles, [strategy.tokenizer.decode([token]) for token in ids]
    text, _, ends = located
    starts = [0, *ends[:-1]]  # a gap before a token is shown with it; of tokens that share one character, the first shows it
    return ids, labels, roles, [text[start:end] for start, end in zip(starts, ends, strict=True)]


def count_roles(labels, roles):
    """Return {role: [tokens, trained tokens]}."""
    counts = collections.defaultdict(lambda: [0, 0])
    for role, trained in zip(roles, labels, strict=True):
        counts[role][0] += 1
        counts[role][1] += trained != MASKED
    return dict(counts)


def visible(text):
    """Return `text` with a sign before each newline, and control characters escaped so that no data can command a terminal."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() or (c.isspace() and c not in "\r\v\f") else repr(c)[1:-1] for c in text)


def cut_line(labels, limit):
    """Return the sentence about what a conversation has beyond `limit` tokens."""
    lost = sum(trained != MASKED for trained in labels[limit:])
    return f"✂ sequence_len {limit} ends here: {len(labels) - limit} more tokens, {lost} of them trained"


def paint(texts, labels, limit, colour):
    """Return a conversation as text: trained tokens in colour, or trained spans in ⟦ ⟧."""
    out, inside = [], False
    for at, (text, trained) in enumerate(zip(texts, labels, strict=True)):
        trained = trained != MASKED
        if inside and (not trained or at == limit):
            out.append("⟧")
        if at == limit:
            out.append(f"\n{cut_line(labels, limit)}\n")
        if colour:
            style = (CUT if at >= limit else "") + SHADES[trained][at % 2]
            out.append("\n".join(style + part + "\033[0m" * bool(style) for part in visible(text).split("\n")))
            continue
        if trained and (not inside or at == limit):
            out.append("⟦")
        inside = trained
        out.append(visible(text))
    return "".join([*out, "⟧" * inside])


def columns(rows):
    """Return rows of cells as aligned lines, the first column to the left."""
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{c!s:<{w}}" if not at else f"{c!s:>{w}}" for at, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    )


def role_table(counts):
    """Return the table rows of count_roles()'s figures, the template last, the sum below."""
    ordered = sorted(counts.items(), key=lambda item: item[0] == "template")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    body = [(role, n, trained, f"{trained / n:.1%}" if n else "") for role, (n, trained) in [*ordered, ("all", total)]]
    return [("role", "tokens", "trained", "share"), *body]


def page(place, texts, ids, labels, roles, limit, notes):
    """Return a standalone HTML page of one conversation."""
    spans = []
    for at, (text, token, trained, role) in enumerate(zip(texts, ids, labels, roles, strict=True)):
        kinds = " ".join(["trained"] * (trained != MASKED) + ["cut"] * (at >= limit))
        spans.append(f'<span class="{kinds}" title="{at}: id {token}, {html.escape(role)}">{html.escape(visible(text))}</span>')
    if len(ids) > limit:
        spans.insert(limit, f"\n<b>{cut_line(labels, limit)}</b>\n")
    rows = role_table(count_roles(labels, roles))
    cells = [
        "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    table = "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return PAGE.format(title=html.escape(place), tokens="".join(spans), table=table, notes=notes)


class Summary:
    """Figures of all rows."""

    def __init__(self, limit):
        self.limit, self.lengths, self.roles, self.over, self.unshown, self.untrained = limit, [], {}, [], [], []

    def add(self, place, labels, roles):
        self.lengths.append(len(labels))
        for role, (tokens, trained) in count_roles(labels, roles).items():
            old = self.roles.get(role, [0, 0])
            self.roles[role] = [old[0] + tokens, old[1] + trained]
        if len(labels) > self.limit:
            self.over.append(f"{place}: {len(labels)} tokens")
        if all(trained == MASKED for trained in labels):
            self.untrained.append(place)

    def figures(self):
        lengths = sorted(self.lengths) or [0]
        quantiles = {f"p{p}": lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (50, 95, 99)}
        figures = {"rows": len(self.lengths) + len(self.unshown), "sequence_len": self.limit, **quantiles, "longest": lengths[-1]}
        figures |= {"tokens": sum(lengths), "roles": {role: {"tokens": n, "trained": t} for role, (n, t) in self.roles.items()}}
        return figures | {"over_sequence_len": self.over, "not_shown_by_template": self.unshown, "nothing_trained": self.untrained}

    def text(self, strategy):
        """Return the summary for a reader; `strategy`: what the recipe says about rows over sequence_len."""
        of = self.figures()
        lines = [
            f"{of['rows']} conversations; the {len(self.lengths)} that are shown have {of['tokens']} tokens: "
            f"p50 {of['p50']}, p95 {of['p95']}, p99 {of['p99']}, longest {of['longest']}"
        ]
        kinds = (
            (f"over sequence_len {self.limit} (excess_length_strategy: {strategy})", self.over),
            ("not shown by the template", self.unshown),
        )
        for kind, found in (*kinds, ("with nothing to train", self.untrained)):
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            lines.append(f"{len(found)} {kind}{': ' if found else ''}{'; '.join(found[:NAMED])}{more}")
        return "\n".join([*lines, "", *([columns(role_table(self.roles))] if self.roles else [])])


def build_parser():
    parser = argparse.ArgumentParser(
        prog="preview_sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="conversations: a jsonl file, or a folder with data*.jsonl")
    add("--config", required=True, metavar="FILE.yaml", help="recipe: a native Axolotl configuration")
    add("--model", metavar="DIR_OR_NAME", help="whose tokenizer and template (default: base_model of the recipe)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, default=1, metavar="N", help="the conversation to show, counted from 1 (default: 1)")
    which.add_argument("--id", metavar="ID", help="show the conversation with this id")
    add("--tokens", action="store_true", help="also list each token: position, id, role, whether it is trained, vocabulary entry")
    add("--limit", type=int, metavar="N", help="sum up the first N conversations only; 0: no summary (default: all)")
    add("--color", action=argparse.BooleanOptionalAction, help="default: on a terminal, unless NO_COLOR is set")
    add("--html", metavar="FILE", help="write the conversation as a page, too")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    path, data = Path(args.config), Path(args.data)
    try:
        recipe = read_recipe(path)
        model = args.model or recipe.get("base_model")
        if not model:
            raise ValueError("no base_model; name the model there, or by --model")
    except ValueError as error:
        parser.error(f"{path}: {error}")
    if args.row < 1:
        parser.error("--row counts from 1")
    next(read_conversations(data), None) or fail(f'{data}: empty; a line is a conversation {{"messages": [...]}}')
    strategy, limit = load_strategy(model, recipe), recipe["sequence_len"]
    from tqdm import tqdm

    chosen, summary = None, Summary(limit)
    for number, place, row in tqdm(read_conversations(data), unit="row", disable=not sys.stderr.isatty()):
        wanted = row.get("id") == args.id if args.id is not None else number == args.row
        counted = args.limit is None or number <= args.limit
        if (wanted and not chosen) or counted:
            try:
                labelled = label(strategy, row)
            except ValueError as error:
                if wanted and not chosen:
                    fail(f"{place}: {error}; train_sft.py would reject it, name another with --row")
                summary.unshown.append(f"{place}: {error}")
                continue
            chosen = chosen or ((place, *labelled) if wanted else None)
            if counted:
                summary.add(place, labelled[1], labelled[2])
        elif chosen and not counted:
            break
    if not chosen:
        fail(
            f"{data}: no conversation has the id {args.id!r}"
            if args.id is not None
            else f"{data}: row {args.row} is beyond its {number} conversations"
        )
    place, ids, labels, roles, texts = chosen
    excess = recipe.get("excess_length_strategy", "raise")
    notes = [f"{len(ids)} tokens of {limit}, {sum(trained != MASKED for trained in labels)} trained"]
    if len(ids) > limit:
        notes.append(
            f"train_sft.py {'leaves this conversation out' if excess == 'drop' else 'refuses to train on data with this conversation'}"
        )
    if args.html:
        with write_atomic(args.html, "w") as file:
            file.write(page(place, texts, ids, labels, roles, limit, notes))
        print(f"preview_sft: {args.html}", file=sys.stderr)
    if args.json:
        shown = {"place": place, "ids": ids, "labels": labels, "roles": roles, "texts": texts}
        return print(json.dumps({"row": shown, "summary": summary.figures()}, ensure_ascii=False))
    colour = args.color if args.color is not None else sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(place, *notes, "", paint(texts, labels, limit, colour), "", columns(role_table(count_roles(labels, roles))), sep="\n")
    if args.tokens:
        entries = strategy.tokenizer.convert_ids_to_tokens(ids)
        print("", f"{'at':>6} {'id':>7}  {'role':<9}  {'':<7}  token", sep="\n")
        for at, (token, role, trained, entry) in enumerate(zip(ids, roles, labels, entries, strict=True)):
            print(f"{at:>6} {token:>7}  {role:<9}  {'trained' * (trained != MASKED):<7}  {visible(entry)}")
    if args.limit != 0:
        print("", summary.text(excess), sep="\n")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
