"""chat_errors.py: the page in a real browser, against a real base: it streams, cites, opens records, and takes nothing for HTML."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from test_answer_errors import LOG, MINILM, PASTE, RECORDS, Played
from test_serve_vllm import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


class Browser:
    """Chromium without a window, by its DevTools protocol."""

    def __init__(self, folder):
        from websockets.sync.client import connect

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--lang=en"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=900,1000", "--disable-dev-shm-usage"]
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        address = next(line for line in self.process.stderr if "DevTools listening on" in line).split()[-1]
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        host = address.split("/")[2]
        connection = http.client.HTTPConnection(host)
        connection.request("GET", "/json/list")
        page = next(target for target in json.loads(connection.getresponse().read()) if target["type"] == "page")
        self.socket, self.number, self.events = connect(page["webSocketDebuggerUrl"], max_size=None), 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv(timeout=120))).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def run(self, code):
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, code, seconds=60):
        """Wait until a JavaScript expression is true; return its value."""
        end = time.monotonic() + seconds
        while (value := self.run(code)) in (None, False, ""):
            assert time.monotonic() < end, f"{code}: never; the page: {self.run('document.body.innerText')[-1500:]}"
            time.sleep(0.05)
        return value

    def type(self, selector, text):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).value = ''")
        self.call("Input.insertText", text=text)

    def click(self, selector):
        x, y = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView({{block: 'center'}});"
            "const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key, code, modifiers=0):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def shot(self, name):
        """Write a screenshot into the folder CHAT_SHOTS, where that is set, for a person to look at."""
        if folder := os.environ.get("CHAT_SHOTS"):
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def complaints(self):
        """Return what the page or its security policy has complained of."""
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [event for event in self.events if event["method"] in kinds]


class Slow(Played):
    """A model that waits after four pieces until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        outer = self

        class Handler(self.RequestHandlerClass):
            def send(self, kind, data):
                if kind != "text/event-stream":
                    return super().send(kind, data)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                for at, chunk in enumerate(data.split(b"\n\n")):
                    self.wfile.write(chunk + b"\n\n")
                    if at == 3:
                        outer.go.wait(60)

        self.RequestHandlerClass = Handler


@pytest.fixture(scope="module")
def model():
    played = Slow()
    threading.Thread(target=played.serve_forever, daemon=True).start()
    yield played
    played.go.set()
    played.shutdown()


@pytest.fixture(scope="module")
def page(run_script, model, tmp_path_factory):
    """The page's address, at a base of the sample records and one whose text is HTML."""
    folder, port = tmp_path_factory.mktemp("chat"), free_port()
    for name in ("chat_errors.py", "answer_errors.py"):
        shutil.copy(ROOT / "scripts" / name, folder)
    evil = {"id": "E0900", "error": f"HtmlError: {EVIL}", "fix": f"Escape {EVIL} it.", "source": "javascript:alert(1)", "tags": [EVIL]}
    (folder / "evil.jsonl").write_text(json.dumps(evil) + "\n")
    loaded = run_script("load_milvus.py", "--input", RECORDS, folder / "evil.jsonl", "--output", folder / "kb", "--embed-model", MINILM)
    assert loaded.returncode == 0, loaded.stderr
    command = [sys.executable, "-I", folder / "chat_errors.py", "--port", str(port), "--", "--uri", folder / "kb/errors.db"]
    process = subprocess.Popen(
        [*map(str, command), "--llm-url", model.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n"
    for _ in range(300):
        try:
            request(port, "GET", "/")
            break
        except OSError:
            time.sleep(0.1)
    yield port
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


def request(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


@pytest.mark.slow
def test_requests_of_programs(page, model):
    status, text, headers = request(page, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert re.search(r"nonce-([\w-]+)'", headers["Content-Security-Policy"])[1] in text and "NONCE" not in text
    assert not re.findall(r"(?:src|href)=\"?https?:", text), "nothing comes from elsewhere"
    kind = {"Content_Type": "application/json"}
    for body, headers, code, reason in (
        ('{"question": "x"}', {"Content_Type": "text/plain"}, 415, "send JSON"),
        ('{"question": "x"}', {**kind, "Host": "evil.example"}, 400, "Invalid host"),
        ("no json", kind, 400, "not a JSON object"),
        ("[1]", kind, 400, "not a JSON object"),
        ("\udcff".encode(errors="surrogateescape"), kind, 400, "not a JSON object"),
        ('{"question": "  "}', kind, 400, "the question is empty"),
        (b'{"log": "' + b"x" * 8_100_000 + b'"}', kind, 413, "paste the end"),
    ):
        status, text, _ = request(page, "POST", "/ask", body, **headers)
        assert (status, reason in text) == (code, True), text
    model.reply = "Take a divisor of 40 [E0014]."
    status, text, _ = request(page, "POST", "/ask", json.dumps({"log": LOG, "question": None}), **kind)
    events = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and events[-1]["result"]["cited"] == ["E0014"]
    assert "".join(event.get("text", "") for event in events).startswith(model.reply) and len(events) > 5


@pytest.mark.slow
def test_a_taken_port_is_a_sentence(page, run_script):
    taken = run_script("chat_errors.py", "--port", page)
    assert taken.returncode == 1 and taken.stderr.startswith(f"chat_errors: 127.0.0.1:{page}: Address already in use"), taken.stderr
    assert taken.stderr.endswith("; give another --port\n") and taken.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: `apt install chromium`")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.call("Page.navigate", url=f"http://127.0.0.1:{page}/")
    browser.until("document.readyState === 'complete' && document.title")
    yield browser
    browser.process.terminate()
    browser.process.wait(30)


LAST = "document.querySelector('article').innerText"


@pytest.mark.slow
def test_an_answer_streams_and_its_citation_opens_the_record(browser, model):
    model.reply = "The heads must be divisible by the tensor parallel size: take a divisor of 40 [E0014], says [E9999]."
    model.go.clear()
    browser.type("#question", "Why?")
    browser.type("#log", LOG)
    browser.shot("1-pasted")
    browser.click("#ask")
    part = browser.until(
        "document.querySelector('.answer').innerText.startsWith('The heads mu') && document.querySelector('.answer').innerText"
    )
    assert "divisor" not in part and browser.run("!document.querySelector('#stop').hidden"), "in the middle"
    model.go.set()
    browser.until("document.querySelector('article:first-child ul')")
    text = browser.run(LAST)
    assert "take a divisor of 40 E0014, says ." in text and "From the records" in text and "E9999" not in text
    assert browser.run("document.querySelector('article:first-child ul a').href") == "https://github.com/THU-KEG/AdaptThink/issues/1"
    browser.shot("2-answered")
    browser.click("article:first-child .answer button.cite")
    assert browser.until("document.querySelector('dialog').open")
    record = browser.run("document.querySelector('dialog').innerText")
    assert record.startswith("E0014") and "divisible by tensor parallel size" in record and "THU-KEG/AdaptThink#1" in record
    browser.shot("3-record")
    browser.key("Escape", 27)
    assert browser.until("!document.querySelector('dialog').open")
    browser.click("article:first-child summary")
    assert re.search(r"cited\s+[\d.]+\s", browser.run(LAST))
    assert not browser.complaints()


@pytest.mark.slow
def test_chinese_by_the_switch(browser, model):
    model.reply = "张量并行数要能整除注意力头数 [E0014]。"
    browser.click("#lang")
    assert browser.run("document.documentElement.lang + document.title") == "zh粘贴报错，得到解决办法"
    browser.type("#question", "")
    browser.type("#log", PASTE)
    browser.key("Enter", 13, modifiers=2)
    browser.until("document.querySelector('article:first-child ul')")
    assert "依据记录回答" in browser.run(LAST) and "能整除注意力头数 E0014。" in browser.run(LAST)
    assert model.asked[-1]["messages"][0]["content"].endswith("Answer in Chinese."), "a paste has no language of its own"
    browser.shot("4-chinese")
    browser.call("Page.reload")
    browser.until("document.readyState === 'complete' && document.title === '粘贴报错，得到解决办法'")
    browser.click("#lang")
    assert browser.run("document.title") == "Paste an error, get the fix"


@pytest.mark.slow
def test_what_is_not_known_and_what_is_not_supported(browser, model):
    browser.type("#log", "How do I bake bread with a sourdough starter?")
    browser.click("#ask")
    browser.until("document.querySelector('article:first-child details')")
    assert "Not in the knowledge base" in browser.run(LAST) and "The nearest records" in browser.run(LAST)
    assert browser.run("document.querySelectorAll('article:first-child .answer button.cite').length") == 5
    browser.shot("5-unknown")
    model.reply = "PWNED, nothing else [E0014]."
    browser.type("#log", PASTE)
    browser.click("#ask")
    browser.until("document.querySelector('article').innerText.includes('no answer that a record supports')")
    browser.until("document.querySelector('article:first-child ul')")
    assert "PWNED" not in browser.run(LAST)


@pytest.mark.slow
def test_html_in_records_logs_and_answers_is_text(browser, model):
    model.reply = f"Escape {EVIL} it [E0900]."
    browser.type("#log", f"HtmlError: {EVIL}")
    browser.click("#ask")
    browser.until("document.querySelector('article:first-child ul')")
    assert "<img src=x" in browser.run("document.querySelector('article:first-child .answer').innerText")
    browser.click("article:first-child .answer button.cite")
    assert "<script>" in browser.until("document.querySelector('dialog').open && document.querySelector('dialog').innerText")
    assert browser.run("document.querySelectorAll('article img, article script, dialog img, dialog a').length") == 0
    browser.click("#close")
    assert browser.run("document.title") == "Paste an error, get the fix"
    assert not browser.complaints()


@pytest.mark.slow
def test_stop_ends_the_answer_here_and_at_the_model(browser, model):
    model.reply = "The heads must be divisible by the tensor parallel size. " * 40
    model.go.clear()
    browser.type("#log", PASTE)
    browser.click("#ask")
    browser.until("document.querySelector('.answer').innerText.startsWith('The heads mu')")
    browser.click("#stop")
    assert browser.until("document.querySelector('article').innerText.includes('Stopped.')")
    model.go.set()
    model.reply = "Take a divisor of 40 [E0014]."
    browser.click("#ask")
    browser.until("document.querySelector('article:first-child ul')")


@pytest.mark.slow
def test_a_narrow_screen_does_not_scroll_sideways(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.run("document.documentElement.scrollWidth <= 360")
    browser.shot("6-narrow")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.shot("7-dark")
    browser.call("Emulation.clearDeviceMetricsOverride")
