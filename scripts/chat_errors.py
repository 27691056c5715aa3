#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "starlette>=1", "uvicorn>=0.30",
#     "openai>=3", "pymilvus>=3", "pyyaml>=6", "sentence-transformers>=5", "tqdm>=4.66", "transformers>=5", # of answer_errors.py
# ]
# ///
"""Serve a web page that answers errors from the knowledge base: paste a log, read the answer as it comes, open the records it cites.

Usage:
    python scripts/chat_errors.py -- --uri kb/errors.db --no-llm     # then open the printed address
    make chat

Reads   what is asked, and by answer_errors.py beside this file (--answers), with the flags after `--`, the collection of load_milvus.py.
Writes  nothing; the address of the page is printed.
Exit    0 ended by a signal; 1 failed, for instance a port in use; 2 bad usage.
Needs   CPU, 1 GB of memory; as answer_errors.py, which starts with the page, in about 12 seconds. Any browser of the last five years.

The page is one file without a build, a font or a script from elsewhere, and everything in it that somebody wrote is set as text. It listens
on this machine alone unless --host says otherwise, and then it asks nobody for a password: put a proxy before it.
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE
from pathlib import Path

MAX_REQUEST = 8_000_000  # bytes; answer_errors.py reads 4 MB of a log

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Errors</title>
<link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --link: #0b63ce; }
@media (prefers-color-scheme: dark) { :root { --link: #7db4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 52rem;
  font: 16px/1.55 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
header, form div { display: flex; gap: .75rem; align-items: center; justify-content: space-between; flex-wrap: wrap; }
h1 { font-size: 1.25rem; margin: 0; }
input, textarea, button { font: inherit; color: inherit; background: transparent;
  border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem; }
textarea { width: 100%; min-height: 7rem; font: 13px/1.45 ui-monospace, monospace; resize: vertical; }
input { width: 100%; }
form { display: grid; gap: .5rem; margin: 1rem 0; }
button { cursor: pointer; }
button.main { background: var(--link); color: Canvas; border-color: transparent; }
button.cite { border: 0; border-radius: .3rem; padding: 0 .25rem; background: var(--soft); color: var(--link); }
button:focus-visible, input:focus-visible, textarea:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
[hidden] { display: none; }
small, .hint { color: GrayText; font-size: .85rem; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
.asked, dd, .answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.asked { max-height: 6rem; overflow: auto; background: var(--soft); border-radius: .5rem; padding: .5rem .7rem;
  font: 13px/1.45 ui-monospace, monospace; }
.answer { margin: .75rem 0; }
.status { font-weight: 600; margin-top: .75rem; }
ul { padding-left: 1.2rem; margin: .3rem 0; }
dialog { max-width: 46rem; width: calc(100% - 2rem); border: 1px solid var(--line); border-radius: .75rem; }
dialog::backdrop { background: #0006; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; }
a { color: var(--link); }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
td, th { text-align: left; padding: .15rem .5rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
</style>
<header><h1 data-t="title"></h1><button id="lang" type="button"></button></header>
<form id="form">
<input id="question" autocomplete="off" data-p="question">
<textarea id="log" spellcheck="false" data-p="log"></textarea>
<div><small data-t="hint"></small><span><button id="stop" type="button" hidden data-t="stop"></button>
<button id="ask" class="main" data-t="ask"></button></span></div>
</form>
<main id="talk" aria-live="polite"></main>
<dialog id="record" aria-labelledby="name"><div><h1 id="name"></h1><dl id="fields"></dl>
<button id="copy" type="button" data-t="copy"></button> <button id="close" type="button" data-t="close"></button></div></dialog>
<script nonce="NONCE">
"use strict";
const WORDS = { // English, Chinese
  title: ["Paste an error, get the fix", "粘贴报错，得到解决办法"], other: ["中文", "English"],
  question: ["Your question (may be empty)", "您的问题（可以不填）"],
  log: ["Error, traceback or log. Paste it, or drop a file here.", "报错、traceback 或日志。可粘贴，也可把文件拖到这里。"],
  ask: ["Ask", "提问"], stop: ["Stop", "停止"], hint: ["Ctrl+Enter asks", "Ctrl+Enter 提问"],
  waiting: ["Searching… the first time takes some seconds", "正在检索……第一次需要几秒钟"], stopped: ["Stopped.", "已停止。"],
  failed: ["No answer: ", "没有得到回答："], answered: ["From the records", "依据记录回答"],
  fix: ["The fix of the best record", "最匹配记录的解决办法"], unknown: ["Not in the knowledge base", "知识库中没有"],
  fallback: ["The fix of the best record: the model gave no answer that a record supports", "最匹配记录的解决办法：模型的回答没有记录支持"],
  nearest: ["The nearest records", "最接近的记录"], sources: ["Records", "记录"], explain: ["How it was found", "检索过程"],
  line: ["Found by the line", "命中的行"], retrieved: ["retrieved", "检索到"], kept: ["kept", "保留"],
  prompted: ["prompted", "给模型看"], cited: ["cited", "被引用"], error: ["Error", "报错"], cause: ["Cause", "原因"],
  remedy: ["Fix", "解决办法"], package: ["Package", "软件包"], source: ["Source", "来源"], more: ["More", "其他"],
  copy: ["Copy the fix", "复制解决办法"], copied: ["Copied", "已复制"], close: ["Close", "关闭"],
};
const $ = (id) => document.getElementById(id);
let lang = localStorage.getItem("lang") || (navigator.language.startsWith("zh") ? "zh" : "en"), running = null;
const say = (key) => WORDS[key][lang === "zh" ? 1 : 0];

function make(tag, text, options = {}) {
  const node = Object.assign(document.createElement(tag), options);
  if (text !== undefined) node.textContent = text;
  return node;
}
function translate() {
  document.documentElement.lang = lang;
  document.title = say("title");
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = say(node.dataset.t);
  for (const node of document.querySelectorAll("[data-p]")) {
    node.placeholder = say(node.dataset.p);
    node.setAttribute("aria-label", node.placeholder);
  }
  $("lang").textContent = say("other");
}
function word(tag, key, options) {
  const node = make(tag, say(key), options);
  node.dataset.t = key;
  return node;
}
function source(text) {
  const thread = /^([\w.-]+\/[\w.-]+)#(\d+)$/.exec(text);
  const href = thread ? `https://github.com/${thread[1]}/issues/${thread[2]}` : /^https?:\/\//.test(text) ? text : "";
  return href ? make("a", text, { href, target: "_blank", rel: "noreferrer noopener" }) : make("span", text);
}
function open(record) {
  $("name").textContent = record.id;
  const more = Object.entries(record.meta || {}).map(([key, value]) => `${key}: ${[value].flat().join(", ")}`).join("\n");
  const rows = [["error", record.error], ["cause", record.cause], ["remedy", record.fix], ["package", record.package],
    ["source", record.source], ["more", more]];
  $("fields").replaceChildren(...rows.filter((row) => row[1]).flatMap(([key, value]) => {
    const dd = make("dd");
    dd.append(key === "source" ? source(value) : value);
    return [word("dt", key), dd];
  }));
  $("copy").onclick = () => navigator.clipboard.writeText(record.fix).then(() => { $("copy").textContent = say("copied"); });
  $("copy").textContent = say("copy");
  $("record").showModal();
}
function button(record) {
  return make("button", record.id, { type: "button", className: "cite", title: record.error.slice(0, 200), onclick: () => open(record) });
}
// Text with [E0012] or [E0012, E0013] in it: each id of a record becomes a button that opens it
function cite(text, records) {
  const known = new Map(records.map((record) => [record.id, record]));
  return text.split(/(\[[^\[\]\n]{1,120}\])/).flatMap((part) => {
    const names = part.startsWith("[") ? part.slice(1, -1).split(/[,;，；、\s]+/) : [];
    if (!names.length || !names.every((name) => known.has(name))) return [part];
    return names.flatMap((name, at) => [at ? " " : "", button(known.get(name))]);
  });
}
function show(article, result) {
  const status = word("div", result.status, { className: "status" });
  const lines = result.answer.split("\n"), unknown = result.status === "unknown";
  if (unknown) lines.splice(0, 1, say("nearest"));
  article.querySelector(".answer").replaceChildren(...cite(lines.join("\n"), result.records));
  article.querySelector(".answer").before(status);
  const cited = result.records.filter((record) => result.cited.includes(record.id));
  if (cited.length) {
    const list = make("ul");
    for (const record of cited) {
      const item = make("li");
      item.append(button(record), " ", source(record.source));
      list.append(item);
    }
    article.append(word("small", "sources"), list);
  }
  const details = make("details"), table = make("table");
  details.append(word("summary", "explain"), table);
  for (const record of result.records) {
    const row = table.insertRow(), name = row.insertCell();
    name.append(button(record));
    row.append(word("td", record.stage), make("td", record.certainty.toFixed(2)), make("td", record.error.split("\n")[0].slice(0, 100)));
  }
  const line = make("p", undefined, { className: "hint" });
  line.append(word("span", "line"), ": ", result.found_by.slice(0, 300));
  details.append(line);
  article.append(details);
}
async function ask() {
  const question = $("question").value.trim(), log = $("log").value;
  if (running || !(question + log).trim()) return;
  const article = make("article"), answer = make("div", undefined, { className: "answer" });
  const waiting = word("span", "waiting", { className: "hint" });
  article.append(make("div", [question, log.trim()].filter(Boolean).join("\n"), { className: "asked" }), answer);
  answer.append(waiting);
  $("talk").prepend(article);
  running = new AbortController();
  $("stop").hidden = false;
  $("ask").disabled = true;
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("ask", { method: "POST", headers, body: JSON.stringify({ question, log, lang }), signal: running.signal });
    if (!response.ok) throw new Error(await response.text());
    let left = "", told = false;
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (left + value).split("\n");
      left = lines.pop();
      for (const event of lines.map((line) => JSON.parse(line))) {
        if (event.error) throw new Error(event.error);
        if (event.note) article.append(make("p", event.note, { className: "hint" }));
        if (event.text) { waiting.remove(); answer.append(event.text); }
        if (event.result) { show(article, event.result); told = true; }
      }
    }
    if (!told) throw new Error("the connection ended");
  } catch (error) {
    waiting.remove();
    const stopped = error.name === "AbortError", end = word("p", stopped ? "stopped" : "failed", { className: "hint" });
    if (!stopped) end.append(error.message), delete end.dataset.t;
    article.append(end);
  } finally {
    running = null;
    $("stop").hidden = true;
    $("ask").disabled = false;
  }
}
$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("form").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); } };
$("stop").onclick = () => running && running.abort();
$("close").onclick = () => $("record").close();
$("record").onclick = (event) => { if (event.target === $("record")) $("record").close(); };
$("lang").onclick = () => { lang = lang === "en" ? "zh" : "en"; localStorage.setItem("lang", lang); translate(); };
$("log").ondragover = (event) => event.preventDefault();
$("log").ondrop = async (event) => {
  const file = event.dataTransfer.files[0];
  if (!file) return;
  event.preventDefault();
  $("log").value = await file.slice(-4000000).text();
};
translate();
$("log").focus();
</script>
"""


# >>> snippet: answerer
class Answerer:
    """The process that has the knowledge base open: an `answer_errors.py --serve`, started when a question finds none."""

    def __init__(self, script, flags):
        self.command, self.lock = [sys.executable, str(script), *flags, "--serve"], asyncio.Lock()
        self.path, self.child = "", None

    async def connect(self):
        """Return (reader, writer) of a new connection; ValueError says why there is none."""
        async with self.lock:
            with contextlib.suppress(OSError):
                return await asyncio.open_unix_connection(self.path, limit=1 << 26)
            with tempfile.TemporaryFile() as words:  # it ends with this process, because its standard input does
                self.child = await asyncio.create_subprocess_exec(*self.command, stdin=PIPE, stdout=PIPE, stderr=words)
                self.path = (await self.child.stdout.readline()).decode().strip()
                if not self.path:
                    words.seek(0)
                    raise ValueError(" ".join(words.read().decode(errors="replace").split()[-80:]) or "answer_errors.py ended at once")
            return await asyncio.open_unix_connection(self.path, limit=1 << 26)

    async def events(self, **request):
        """Yield what is answered, as answer_errors.py describes it: {"text"} or {"note"}, and {"result"} last; ValueError: why not."""
        reader, writer = await self.connect()
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            async for line in reader:
                event = json.loads(line)
                if "error" in event:
                    raise ValueError(event["error"])
                yield event
                if "result" in event:
                    return
            raise ValueError("the process that answers went away; ask again")
        finally:
            writer.close()


# <<<


def build_app(answerer, hosts):
    """Return the web application: the page at /, and at /ask one question, answered by a JSON line for each event."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    async def page(request):
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        headers = {"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        headers |= {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE.replace("NONCE", nonce), headers=headers)

    async def ask(request):
        if request.headers.get("content-type") != "application/json":  # another site's page may not send that
            return PlainTextResponse("send JSON", status_code=415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST:
                return PlainTextResponse(f"more than {MAX_REQUEST // 1_000_000} MB; paste the end of the log", status_code=413)
        try:
            asked = json.loads(body)
            asked = {name: str(asked.get(name) or "") for name in ("question", "log")} | {
                "lang": "zh" if asked.get("lang") == "zh" else "en"
            }
        except (ValueError, AttributeError):
            return PlainTextResponse("not a JSON object", status_code=400)
        if not (asked["question"] + asked["log"]).strip():
            return PlainTextResponse("the question is empty", status_code=400)

        async def lines():
            try:
                async with contextlib.aclosing(answerer.events(**asked)) as events:
                    async for event in events:
                        yield json.dumps(event) + "\n"
            except (ValueError, OSError) as error:
                yield json.dumps({"error": str(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    @contextlib.asynccontextmanager
    async def warm(app):
        async def connect():
            with contextlib.suppress(ValueError, OSError):  # the first question says why
                _, writer = await answerer.connect()
                writer.close()

        task = asyncio.create_task(connect())
        yield
        task.cancel()

    routes = [Route("/", page), Route("/ask", ask, methods=["POST"])]
    # a name that somebody else's DNS points here is refused
    return Starlette(routes=routes, lifespan=warm, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)])


def build_parser():
    parser = argparse.ArgumentParser(
        prog="chat_errors.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--port", type=int, default=8052, help="default: 8052")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--answers", type=Path, default=Path(__file__).with_name("answer_errors.py"), metavar="SCRIPT", help="default: beside this file")
    add("flags", nargs="*", metavar="-- FLAGS", help="of answer_errors.py: --uri, --collection, --llm-url, --no-llm, …")
    return parser


def main():
    args = build_parser().parse_args()
    import uvicorn

    hosts = ["127.0.0.1", "localhost", "[::1]"] if args.host in ("127.0.0.1", "localhost", "::1") else ["*"]
    config = uvicorn.Config(
        build_app(Answerer(args.answers, args.flags), hosts),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        sys.exit(f"chat_errors: {args.host}:{args.port}: {error.strerror}; give another --port")
    print(f"http://{args.host}:{args.port}/", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
