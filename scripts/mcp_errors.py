#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "mcp>=2", "mcp-types>=2", "pydantic>=2",
#     "openai>=3", "pymilvus>=3", "pyyaml>=6", "sentence-transformers>=5", "tqdm>=4.66", "transformers>=5", # of answer_errors.py
# ]
# ///
"""Offer the error knowledge base to assistants and editors by the Model Context Protocol: search it, answer from it, propose a fix.

Usage:
    python scripts/mcp_errors.py -- --uri kb/errors.db --no-llm                    # over standard input and output
    python scripts/mcp_errors.py --http 8053 -- --uri kb/errors.db                 # at http://127.0.0.1:8053/mcp
    make mcp

Reads   what is asked, and by answer_errors.py beside this file (--answers), with the flags after `--`, the collection of load_milvus.py.
Writes  proposals (--proposals): a line for each fix that is proposed. Nobody's proposal goes into the base by itself: read them, and
        give those that are right to load_milvus.py as records.
Exit    0 ended by its client or by a signal; 1 failed; 2 bad usage.
Needs   CPU, 1 GB of memory; as answer_errors.py, which starts at the first question, in about 12 seconds.

`--http` listens on this machine alone unless --host says otherwise, and then it asks nobody for a password: put a proxy before it.
"""

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

MAX_BYTES = 16_000  # of a field of a proposal in UTF-8; load_milvus.py takes more


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


def propose(path, record):
    """Append a record to the file of proposals, whole or not at all, on the disk when this returns; return (id, whether it is new)."""
    content = {name: text.strip() for name, text in record.items() if text and text.strip()}
    for name in ("error", "fix"):
        if name not in content:
            raise ValueError(f"a proposal needs a text in {name!r}")
    try:
        size, name = max((len(text.encode()), name) for name, text in content.items())
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate, {error.object[error.start]!r}, is no character; send the text as UTF-8") from error
    if size > MAX_BYTES:
        raise ValueError(f"{name!r} has {size} bytes in UTF-8, and may have {MAX_BYTES}; shorten it to the lines that matter")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    proposal = {"id": f"P{int(digest[:10], 16):013d}", **content, "proposed": datetime.now(UTC).isoformat(timespec="seconds")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of several servers one writes at a time
        file.seek(0)
        held = file.read()
        whole = held[: held.rfind(b"\n") + 1]
        if len(whole) < len(held):  # the beginning of a line whose writer was killed
            file.truncate(len(whole))
        if f'"{proposal["id"]}"'.encode() in whole:
            return proposal["id"], False
        file.write(json.dumps(proposal, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return proposal["id"], True


def build_server(answerer, proposals, name="errors"):
    """Return the MCP server with its three tools."""
    from mcp.server.mcpserver import Context, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ToolAnnotations
    from pydantic import BaseModel, Field

    class Record(BaseModel):
        id: str
        error: str
        cause: str = ""
        fix: str
        package: str = ""
        source: str = Field("", description="where the fix comes from, for example owner/repo#number")
        certainty: float = Field(description="how sure it is that the record fits")
        stage: str = Field(description="how far the record came: retrieved, kept, prompted, cited")

    class Found(BaseModel):
        known: bool = Field(description="whether the first record fits; if not, the error is not in the knowledge base")
        records: list[Record]

    class Answer(BaseModel):
        status: str = Field(description="answered; fix or fallback: the fix of the best record itself; unknown: not in the knowledge base")
        answer: str
        cited: list[Record]
        nearest: list[Record] = Field(description="the other records that were found, best first")
        note: str = ""

    server = MCPServer(
        name,
        instructions="Fixes of errors in machine-learning software, each with its public source. Paste the traceback or log as it is.",
        log_level="WARNING",
    )
    Paste = Annotated[str, Field(description="error message, traceback or log; long ones may be pasted whole")]
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    async def asked(context=None, **request):
        notes, said = [], ""
        try:
            async for event in answerer.events(**request):
                said += event.get("text", "")
                notes += [event["note"]] if "note" in event else []
                if context and event.get("text"):
                    await context.report_progress(len(said), message=event["text"])
                if "result" in event:
                    return event["result"], " ".join(notes)
        except (ValueError, OSError) as error:
            raise ToolError(str(error)) from error

    def records(result, stages=()):
        return [Record(**record) for record in result["records"] if not stages or record["stage"] in stages]

    @server.tool(annotations=reads)
    async def search_errors(query: Paste, limit: Annotated[int, Field(ge=1, le=20)] = 5) -> Found:
        """Find the records of the knowledge base that are nearest to an error, with fix and source; no language model is asked."""
        result, _ = await asked(question="", log=query, llm=False, top_k=limit)
        return Found(known=result["status"] != "unknown", records=records(result))

    @server.tool(annotations=reads)
    async def answer_error(
        context: Context,
        log: Paste = "",
        question: Annotated[str, Field(description="what to know about it, in a sentence; this, or log, or both")] = "",
        lang: Annotated[str, Field(pattern="^(en|zh)$", description="of the answer, where the texts have no Chinese")] = "en",
    ) -> Answer:
        """Answer an error from the knowledge base, with the records that prove the answer, or say that it is not there."""
        result, note = await asked(context, question=question, log=log, lang=lang)
        others = records(result, ("retrieved", "kept", "prompted"))
        return Answer(status=result["status"], answer=result["answer"], cited=records(result, ("cited",)), nearest=others, note=note)

    @server.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False))
    def add_fix(error: str, fix: str, cause: str = "", package: str = "", versions: str = "", source: str = "") -> str:
        """Propose a fix that worked for an error the base does not know. A person reviews it before it becomes a record."""
        fields = {"error": error, "cause": cause, "fix": fix, "package": package, "versions": versions, "source": source}
        try:
            name, fresh = propose(proposals, fields)
        except ValueError as problem:
            raise ToolError(str(problem)) from problem
        return f"{name} {'is noted for review' if fresh else 'has been proposed before'}; it is not in the knowledge base"

    return server


def build_parser():
    parser = argparse.ArgumentParser(
        prog="mcp_errors.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--http", type=int, metavar="PORT", help="streamable HTTP at this port, path /mcp (default: standard input and output)")
    add("--host", default="127.0.0.1", help="address for --http (default: 127.0.0.1)")
    add("--proposals", type=Path, default=Path("proposals.jsonl"), metavar="FILE.jsonl", help="default: proposals.jsonl")
    add("--answers", type=Path, default=Path(__file__).with_name("answer_errors.py"), metavar="SCRIPT", help="default: beside this file")
    add("flags", nargs="*", metavar="-- FLAGS", help="of answer_errors.py: --uri, --collection, --llm-url, --no-llm, …")
    return parser


def main():
    args = build_parser().parse_args()
    server = build_server(Answerer(args.answers, args.flags), args.proposals)
    with contextlib.suppress(KeyboardInterrupt):
        if not args.http:
            return server.run("stdio")
        try:
            socket.create_server((args.host, args.http)).close()
        except OSError as error:
            sys.exit(f"mcp_errors: {args.host}:{args.http}: {error.strerror}; give --http another port")
        print(f"http://{args.host}:{args.http}/mcp", flush=True)
        server.run("streamable-http", host=args.host, port=args.http, stateless_http=True)


if __name__ == "__main__":
    main()
