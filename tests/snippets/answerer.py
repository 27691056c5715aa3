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
