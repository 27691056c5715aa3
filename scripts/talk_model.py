#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Talk to a served model in the terminal: answers stream in, and a talk that went well is saved as training data.

Usage:
    python scripts/talk_model.py --url http://127.0.0.1:8051/v1 --system "Answer in one sentence."
    python scripts/talk_model.py < questions.txt > answers.txt      # one talk, a question a line
    make talk PORT=8051

Commands, beside which every line is a question:
    /system TEXT   how to answer from now on; without TEXT the system message is dropped
    /undo          take back the last question and its answer
    /retry         ask the last question again
    /reset         forget the talk, keep the system message
    /save          put the talk into OUTPUT, in the place of what was saved of it before
    /quit          end; Ctrl-D does too
A line of three quotes begins and ends a question of several lines. Ctrl-C ends an answer, not the talk. An answer that was cut off, by
Ctrl-C or by its length, stays in the talk; it is saved with weight 0, so that no model is trained to break off. Sampling is the server's.

Reads   standard input; an API key from OPENAI_API_KEY, or else VLLM_API_KEY.
Writes  answers on standard output, all else on standard error; at /save a row {"id", "source", "messages"} of OUTPUT.
Exit    0 done; 1 no model, or a question of a file got no answer; 2 bad usage; 130 interrupted while reading a file.
Needs   the standard library, and an OpenAI-compatible server such as that of serve_vllm.py.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path


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


class Unanswered(Exception):
    """The server gave no whole answer; the message says why, in one sentence."""


class Server:
    """A chat model behind an OpenAI-compatible server."""

    def __init__(self, url, name, key):
        """`name`: None for the first model that the server lists."""
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        local = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)  # a proxy knows nothing of this machine
        listed = b"".join(self.lines("/models", timeout=10))
        try:
            names = [card["id"] for card in json.loads(listed)["data"]]
            self.name = name or names[0]
        except (LookupError, TypeError, ValueError):
            raise Unanswered(f"{self.url} lists no models; is it the URL of an OpenAI-compatible server, which ends in /v1?") from None
        if name and name not in names:
            raise Unanswered(f"{self.url} serves {', '.join(names)}, not {name}; look at --model")

    def lines(self, path, body=None, timeout=600):
        """Yield the lines of an answer to a GET, or to a POST of `body`, that are not empty; raises Unanswered."""
        try:
            request = urllib.request.Request(self.url + path, body and json.dumps(body).encode(), self.headers)
            with self.opener.open(request, timeout=timeout) as answer:
                yield from filter(None, map(bytes.strip, answer))
        except urllib.error.HTTPError as error:
            raise Unanswered(f"the server refuses: {refusal(error)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise Unanswered(f"no answer from {self.url} ({why}); `make serve` starts a server, --url names another") from None

    def stream(self, messages):
        """Yield the chunks of an answer; raises Unanswered when it does not come to its end."""
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        for line in self.lines("/chat/completions", body):
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data:"):
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    raise Unanswered(f"the server broke off: {chunk['error'].get('message')}; its log says more")
                yield chunk
        raise Unanswered("the server broke off; its log says why")


def refusal(error):
    """Return the reason in an HTTP error's body, with the remedy where there is one."""
    text = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]
        text = text["message"] if isinstance(text, dict) else text
    remedy = {401: "; put the key into OPENAI_API_KEY", 404: "; does the URL end in /v1?"}.get(error.code, "")
    if "context length" in text:
        remedy = "; /reset begins anew"
    return f"{error.code} {' '.join(text.split())[:300]}{remedy}"


class Talk:
    """A system message and the turns after it."""

    def __init__(self, server, system, output):
        self.server, self.system, self.output = server, system, output
        self.reset()

    def reset(self):
        self.turns, self.id = [], uuid.uuid4().hex[:16]

    def messages(self):
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def undo(self):
        """Take back the last question and its answer; return the question, "" when there is none."""
        asked = self.turns[-2]["content"] if self.turns else ""
        del self.turns[-2:]
        return asked

    def ask(self, question, style):
        """Show the answer to `question` as it comes; return a line about it. `style`: what begins and ends dimmed text."""
        sent = [{"role": turn["role"], "content": turn["content"]} for turn in [*self.messages(), {"role": "user", "content": question}]]
        said, finish, usage, begun, times = {"reasoning_content": "", "content": ""}, "interrupted", None, time.monotonic(), []
        try:
            for chunk in self.server.stream(sent):
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    finish, delta = choice.get("finish_reason") or finish, choice["delta"]
                    thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
                    if text := thought or delta.get("content"):
                        times.append(time.monotonic())
                        if said["reasoning_content"] and not thought and not said["content"]:
                            print("\n", file=sys.stderr, flush=True)
                        said["reasoning_content" if thought else "content"] += text
                        print(text.join(style) if thought else text, end="", file=sys.stderr if thought else sys.stdout, flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            print(flush=True)
        answer = {"role": "assistant"} | {key: text for key, text in said.items() if text or key == "content"}
        if said["content"]:
            self.turns += [{"role": "user", "content": question}, answer | ({} if finish == "stop" else {"weight": 0})]
        count = usage["completion_tokens"] if usage else len(times)  # without its end no count: about a token a chunk
        words = [f"{count} tokens" if usage else f"about {count} tokens"]
        if count > 1 and times[-1] > times[0]:
            words.append(f"{(count - 1) / (times[-1] - times[0]):.1f} tokens/s")
        if times:
            words.append(f"the first after {times[0] - begun:.2f} s")
        notes = {"stop": "", "length": "; cut off at the greatest length (finish_reason length)", "interrupted": "; interrupted"}
        forgotten = "" if said["content"] else "; nothing was said, so the question is forgotten"
        return f"{', '.join(words)}{notes.get(finish, f'; finish_reason {finish}')}{forgotten}"

    def save(self):
        """Put the talk into the output as one row; return a line about it."""
        if not self.turns:
            return "there is nothing to save yet"
        kept = self.output.read_text(encoding="utf-8").splitlines() if self.output.exists() else []
        kept = [line for line in kept if self.id not in line]
        row = {"id": self.id, "source": f"talk with {self.server.name}", "messages": self.messages()}
        with write_atomic(self.output, "w") as file:
            file.writelines(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)])
        return f"saved; {self.output} holds {len(kept) + 1} talks"


def read_question(prompt):
    """Return the next line, or the lines between two of three quotes; EOFError at the end."""
    line = input(prompt)
    if line.strip() == '"""':
        lines = iter(lambda: input(prompt and "… "), '"""')
        line = "\n".join(lines)
    return line.encode(errors="surrogateescape").decode(errors="replace").strip()  # a broken letter would be no JSON


def build_parser():
    parser = argparse.ArgumentParser(
        prog="talk_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", default="http://127.0.0.1:8051/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="as the server names it (default: the first that it lists)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message to begin with")
    parser.add_argument("--output", type=Path, default="talks.jsonl", metavar="FILE", help="for /save (default: %(default)s)")
    return parser


def main():
    args = build_parser().parse_args()
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    style, prompt, code = ("\033[2m", "\033[0m") if terminal else ("", ""), "> " if terminal else "", 0
    if terminal:
        import readline  # noqa: F401  lends input() its line editing, in letters of any width, and its history

    def note(words):
        print(words.join(style), file=sys.stderr, flush=True)

    try:
        server = Server(args.url, args.model, os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY"))
    except Unanswered as error:
        raise SystemExit(f"talk_model: {error}") from None
    except KeyboardInterrupt:
        return 130
    talk = Talk(server, args.system, args.output)
    note(f"{server.name} at {server.url}; /system TEXT, /undo, /retry, /reset, /save, /quit; Ctrl-C ends an answer")
    while True:
        before = [*talk.turns]
        try:
            question = read_question(prompt)
            command = re.match(r"/([a-z]+)(?: +(.*))?$", question, re.S)
            match command and command[1]:
                case None:
                    pass
                case "system":
                    talk.system = command[2] or ""
                    note("system message set" if talk.system else "no system message")
                case "undo":
                    note(f"took back: {talk.undo()}" if talk.turns else "there is nothing to take back")
                case "reset":
                    talk.reset()
                    note("the talk is forgotten")
                case "save":
                    note(talk.save())
                case "quit":
                    break
                case "retry" if talk.turns:
                    question, command = talk.undo(), None
                case _:
                    note(f"no such command now: {question}; a space before it sends it as a question")
            if question and not command:
                note(talk.ask(question, style))
        except Unanswered as error:
            talk.turns, code = before, int(not terminal)
            note(f"talk_model: {error}")
        except OSError as error:
            note(f"talk_model: {args.output}: {error.strerror}; name another file with --output")
        except EOFError:
            note("")
            break
        except KeyboardInterrupt:
            if not terminal:
                return 130
            note("\nCtrl-D ends the talk")
    return code


if __name__ == "__main__":
    sys.exit(main())
