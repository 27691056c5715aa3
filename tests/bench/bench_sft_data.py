#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Time convert_sft_format.py against the loading of LLaMA-Factory and Axolotl, on the same made-up rows, in one run.

Usage:
    make bench-sft-data
    python tests/bench/bench_sft_data.py --megabytes 200 --rounds 5 --json figures.json
    python tests/bench/bench_sft_data.py --peers none                                       # ours alone
    python tests/bench/bench_sft_data.py --llamafactory-python /envs/lf/bin/python --axolotl-python .venv/bin/python
    python tests/bench/bench_sft_data.py --tokenizer data/out/demo/base-model

Rows are chats of two kinds, half English and half Chinese (seeded): `long`, four questions and answers, about 7 KB, as UltraChat
and ShareGPT have them; `short`, two and 3 KB. Ours is timed as a whole process: start, reading, hashing, converting, fsync,
manifest. Of a peer only its own loading counts, not its imports, with empty caches, in two lines: "turns", `load_dataset` and the
conversion of each row to its turns (LLaMA-Factory `_load_single_dataset`, Axolotl's chat_template strategy), which is what ours
does; and "tokens", the whole of its loading (LLaMA-Factory `get_dataset`, Axolotl `tokenize_prompt`), which ours leaves to it.
The programs take turns in each round, and the table has the medians: the machine's noise falls on all of them. "tokens" runs once.

Reads   scripts/convert_sft_format.py beside it. Rows are made in a temporary folder.
Writes  a table on stdout, one line a run on stderr, and the figures as JSON where --json names a file.
Exit    0 done; 1 a program failed; 2 bad usage.
Needs   CPU. A peer whose interpreter is not named and that this one cannot import is installed by uv into a temporary folder:
        network, about 6 GB, a minute.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_sft_format.py"
DIRECTIONS = [("openai", "messages"), ("sharegpt", "messages"), ("alpaca", "messages"), ("messages", "sharegpt")]
KINDS = {"long": (4, 250, 1500), "short": (2, 120, 1300)}  # questions, and mean characters of a question and of an answer
# torchaudio is built for one torch only, and the resolver does not know it
INSTALL = {"llamafactory": ["llamafactory==0.9.5", "torch==2.11.0", "torchaudio==2.11.0"], "axolotl": ["axolotl==0.19.0"]}
ENGLISH = """the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so some her would make
like him into time has look two more write go see number no way could people my than first water been call who find model token "batch size"
gradient loss learning rate `code` list: dictionary, function, return <b>value</b> x < y error, exception. Therefore, however"""
CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 3000))) + "，。！？：“”" * 40
LLAMAFACTORY = """
import json, os, sys, time
from pathlib import Path
form, folder, tokenizer, step = sys.argv[1:5]
from transformers import AutoTokenizer, Seq2SeqTrainingArguments
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams import DataArguments, ModelArguments
roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
info = {
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}},
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "openai": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": roles},
}[form]
Path(folder, "dataset_info.json").write_text(json.dumps({"rows": info | {"file_name": form + ".jsonl"}}))
model = ModelArguments(model_name_or_path=tokenizer)
data = DataArguments(dataset_dir=folder, dataset="rows", template="chatml", overwrite_cache=True, cutoff_len=4096)
training = Seq2SeqTrainingArguments(output_dir=folder + "/none", report_to=[], do_train=True)
kit = AutoTokenizer.from_pretrained(tokenizer)
template = get_template_and_fix_tokenizer(kit, data)
begun, cpu = time.perf_counter(), time.process_time()
if step == "tokens":
    rows = get_dataset(template, model, data, training, stage="sft", tokenizer=kit)["train_dataset"]
else:
    [attributes] = get_dataset_list(["rows"], folder)
    rows = _load_single_dataset(attributes, model, data, training)
"""
AXOLOTL = """
import os, sys, time
form, folder, tokenizer, step = sys.argv[1:5]
from datasets import load_dataset
from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer
kit = AutoTokenizer.from_pretrained(tokenizer)
rules = {"type": "chat_template"}
if form == "sharegpt":
    rules |= {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
rules = DictDefault({"train_on_inputs": False, "sequence_len": 4096, "chat_template": "tokenizer_default"}), rules
strategy = load(kit, rules[0], ds_cfg=rules[1])
begun, cpu = time.perf_counter(), time.process_time()
rows = load_dataset("json", data_files=f"{folder}/{form}.jsonl", split="train")
work = strategy.tokenize_prompt if step == "tokens" else lambda row: {"turns": strategy.get_conversation_thread(row)}
rows = rows.map(work, remove_columns=rows.column_names)
"""
TOKENIZER = """
import itertools, json, sys
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
rows, folder = sys.argv[1:3]
kit = ByteLevelBPETokenizer()
texts = (turn["content"] for line in itertools.islice(open(rows), 400) for turn in json.loads(line)["messages"])
kit.train_from_iterator(texts, vocab_size=16000, show_progress=False, special_tokens=["<|im_start|>", "<|im_end|>"])
template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
words = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}
PreTrainedTokenizerFast(tokenizer_object=kit._tokenizer, **words).save_pretrained(folder)
"""
TAIL = """
import json, resource
from importlib.metadata import version
figures = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "rows": len(rows)}
print(json.dumps(figures | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "version": version("NAME")}))
"""
PEERS = {"llamafactory": (LLAMAFACTORY, {"openai", "sharegpt", "alpaca"}), "axolotl": (AXOLOTL, {"openai", "sharegpt"})}


def make_rows(folder, kind, megabytes, seed=7):
    """Write openai, sharegpt, alpaca and messages files with the same conversations, about `megabytes` each; return their number."""
    draw, (rounds, asked, answered) = random.Random(seed), KINDS[kind]
    pools = [[" ".join(draw.choices(ENGLISH.split(), k=answered // 4)).capitalize() + ".\n" for _ in range(400)]]
    pools += [["".join(draw.choices(CHINESE, k=answered // 3)) + "。" for _ in range(400)]]  # three bytes a character
    files = {form: open(folder / f"{form}.jsonl", "w", encoding="utf-8") for form in ("openai", "sharegpt", "alpaca", "messages")}
    size, count = 0, 0
    while size < megabytes * 1e6:
        pool, scale = pools[count % 2], 1 + 2 * (count % 2)
        talk = [
            (
                draw.choice(pool)[: draw.randint(asked // 2, asked * 3 // 2) // scale],
                draw.choice(pool)[: draw.randint(answered // 2, answered * 3 // 2)],
            )
            for _ in range(rounds)
        ]
        turns = [turn for question, answer in talk for turn in (("user", question), ("assistant", answer))]
        names = {"user": "human", "assistant": "gpt"}
        rows = {
            "openai": {"messages": [{"role": role, "content": text} for role, text in turns]},
            "sharegpt": {"conversations": [{"from": names[role], "value": text} for role, text in turns]},
            "alpaca": {"instruction": talk[-1][0], "input": "", "output": talk[-1][1], "system": "You help.", "history": talk[:-1]},
        }
        rows["messages"] = rows["openai"] | {"id": f"row-{count}", "source": "bench"}
        for form, row in rows.items():
            line = json.dumps(row, ensure_ascii=False) + "\n"
            size += len(line.encode()) if form == "openai" else 0
            files[form].write(line)
        count += 1
    for file in files.values():
        file.close()
    return count


def interpreter(peer, given, folder):
    """Return the interpreter that has a peer: the one named, this one, or a new one that uv makes in `folder`."""
    if given:
        return given
    if importlib.util.find_spec(peer):
        return sys.executable
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not uv:
        sys.exit(f"bench_sft_data.py: {peer} is not installed and uv is not on PATH; name --{peer}-python, or --peers without it")
    print(f"installing {' '.join(INSTALL[peer])} …", file=sys.stderr)
    environment = folder / peer
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "-q", "-p", environment / "bin" / "python", *INSTALL[peer]], check=True)
    return str(environment / "bin" / "python")


def time_ours(rows, form, target, folder):
    """Run the converter as a process of its own; return its figures."""
    output = folder / "ours"
    command = [sys.executable, "-I", SCRIPT, "--input", rows / f"{form}.jsonl", "--from", form, "--to", target, "--output", output]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "rows": manifest["counts"]["kept"], "peak": manifest["peak_rss_bytes"], "version": ""}


def time_peer(peer, python, rows, form, folder, tokenizer, step):
    """Let a peer load the rows in a process of its own, with empty caches; return the figures of the loading alone."""
    cache = folder / "cache"
    quiet = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    code = PEERS[peer][0] + TAIL.replace("NAME", peer)
    done = subprocess.run(
        [python, "-c", code, form, rows, tokenizer, step], capture_output=True, text=True, env=os.environ | quiet, cwd=folder
    )
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode:
        sys.exit(f"bench_sft_data.py: {peer} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--megabytes", type=float, default=100, help="size of each file of rows (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS, help="kinds of rows")
    parser.add_argument("--peers", nargs="+", default=[*PEERS], choices=[*PEERS, "none"], help="programs to compare with")
    parser.add_argument("--llamafactory-python", metavar="PATH", help="interpreter that has llamafactory")
    parser.add_argument("--axolotl-python", metavar="PATH", help="interpreter that has axolotl")
    parser.add_argument(
        "--tokenizer", default="", metavar="DIR", help="tokenizer of the peers (default: a byte-level BPE trained on the rows)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser


def main():
    args = build_parser().parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-sft-data-") as name:
        folder = Path(name)
        pythons = {peer: interpreter(peer, vars(args)[f"{peer}_python"], folder) for peer in args.peers if peer != "none"}
        for kind in args.kinds:
            rows = folder / kind
            rows.mkdir()
            count = make_rows(rows, kind, args.megabytes)
            tokenizer = str(Path(args.tokenizer).resolve() if args.tokenizer else folder / "tokenizer")
            if pythons and not Path(tokenizer).exists():
                subprocess.run([next(iter(pythons.values())), "-c", TOKENIZER, rows / "openai.jsonl", tokenizer], check=True)
            for form, target in DIRECTIONS:
                size = (rows / f"{form}.jsonl").stat().st_size
                runs = {"ours": lambda form=form, target=target, rows=rows: time_ours(rows, form, target, folder)}
                for peer, python in pythons.items():
                    for step in ("turns", "tokens") if form == "openai" else ("turns",) if form in PEERS[peer][1] else ():
                        given = (peer, python, rows, form, folder, tokenizer, step)
                        runs[f"{peer} {step}"] = lambda given=given: time_peer(*given)
                taken = {program: [] for program in runs}
                for turn in range(args.rounds):
                    for program, run in runs.items():
                        if turn and program.endswith("tokens"):
                            continue  # half a minute each, and far from the border
                        taken[program].append(run())
                        figures = taken[program][-1]
                        print(f"{kind} {form} {program}: {figures['seconds']:.2f} s, {figures['cpu']:.2f} CPU-s", file=sys.stderr)
                        assert program.endswith("tokens") or figures["rows"] == count, f"{program} kept {figures['rows']} of {count} rows"
                for program, all_figures in taken.items():
                    median = {key: statistics.median(figures[key] for figures in all_figures) for key in ("seconds", "cpu", "peak")}
                    case = {
                        "rows": kind,
                        "row_bytes": size // count,
                        "from": form,
                        "to": target if program == "ours" else "its own",
                        "program": program,
                    }
                    results.append(case | median | {"bytes": size, "version": all_figures[0]["version"]})
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; medians of {args.rounds} runs")
    print(f"{'rows':6}{'bytes':>6}  {'from':9}{'to':9} {'program':30}{'MB/s':>7}{'MB/CPU-s':>10}{'peak MB':>9}{'ours is':>9}{'in CPU':>8}")
    for case in results:
        ours = next(c for c in results if c["program"] == "ours" and all(c[key] == case[key] for key in ("rows", "from")))
        ratio = f"{case['seconds'] / ours['seconds']:8.1f}x{case['cpu'] / ours['cpu']:7.1f}x" if case is not ours else ""
        program = f"{case['program']} {case['version']}".strip()
        speed = f"{case['bytes'] / 1e6 / case['seconds']:7.0f}{case['bytes'] / 1e6 / case['cpu']:10.0f}{case['peak'] / 1e6:9.0f}"
        print(f"{case['rows']:6}{case['row_bytes']:6}  {case['from']:9}{case['to']:9} {program:30}{speed}{ratio}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
