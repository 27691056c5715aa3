"""explain_failure.py: a command with its log is the command itself, with and without a terminal; a failure's log finds its fix."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT, clean_environment
from test_makefile import make, tree  # noqa: F401

SCRIPT = ROOT / "scripts/explain_failure.py"


def command(tmp_path, code):
    return [sys.executable, "-I", str(SCRIPT), "run", "--log", str(tmp_path / "logs/x.log"), "--", sys.executable, "-c", code]


def keep(tmp_path, code, **kwargs):
    return subprocess.run(command(tmp_path, code), capture_output=True, env=clean_environment(), timeout=60, **kwargs)


def test_data_is_untouched_and_words_are_kept(tmp_path):
    code = (
        "import os, sys; sys.stdout.buffer.write(b'\\xff\\x00data' * 9000); os.write(2, b'a\\rb\\n' * 50000); print(input()); sys.exit(3)"
    )
    answer = keep(tmp_path, code, input=b"asked\n")
    assert answer.returncode == 3
    assert answer.stdout == b"\xff\x00data" * 9000 + b"asked\n"
    words, last = answer.stderr[:200000], answer.stderr[200000:].decode()
    assert words == b"a\rb\n" * 50000 == (tmp_path / "logs/x.failed.log").read_bytes()
    assert last == f"explain_failure: exit 3, the log is {tmp_path / 'logs/x.failed.log'}; for the fix: make why\n"
    assert not (tmp_path / "logs/x.log").exists()
    answer = keep(tmp_path, "import sys; print('fine', file=sys.stderr)")
    assert (answer.returncode, answer.stderr) == (0, b"fine\n")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["x.log"], "the failure is mended"


def test_both_streams_are_kept_where_they_go_to_one_place(tmp_path):
    both = subprocess.run(command(tmp_path, "print('told', flush=True); 1/0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert both.returncode == 1
    assert (tmp_path / "logs/x.failed.log").read_text() == both.stdout.partition("explain_failure:")[0]
    assert both.stdout.startswith("told\nTraceback") and "ZeroDivisionError" in both.stdout


def test_a_signal_is_an_exit_code_and_reaches_the_command(tmp_path):
    assert keep(tmp_path, "import os; os.kill(os.getpid(), 9)").returncode == 137
    assert keep(tmp_path, "import os; os.kill(os.getpid(), 2)").returncode == 130
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('up', file=sys.stderr, flush=True); time.sleep(60)"
    process = subprocess.Popen(command(tmp_path, code), stderr=subprocess.PIPE)
    assert process.stderr.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 5
    process.stderr.close()
    wrong = subprocess.run([sys.executable, "-I", SCRIPT, "run", "--log", tmp_path / "y.log", "--", "no-such-command"], capture_output=True)
    assert (wrong.returncode, wrong.stderr.count(b"\n")) == (127, 1)


def test_a_daemon_that_is_left_behind_is_not_waited_for(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '50'], stdout=subprocess.DEVNULL).pid, file=sys.stderr)"
    answer = keep(tmp_path, code)
    os.kill(int(answer.stderr), signal.SIGKILL)
    assert answer.returncode == 0


def test_a_log_does_not_grow_for_ever(tmp_path):
    code = "import os\nfor n in range(3500): os.write(2, b'%08d' % n + b'x' * 9991 + b'\\n')\nraise SystemExit(1)"
    assert len(keep(tmp_path, code).stderr) > 35_000_000
    kept = (tmp_path / "logs/x.failed.log").read_bytes()
    assert len(kept) < 33 << 20 and b"00003499" in kept[-10000:]


def in_terminal(words, typed=b""):
    """Run a command in a terminal of 101 columns of its own; return (exit code, what was shown)."""
    pid, master = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 101, 0, 0))
        os.execve(words[0], words, clean_environment())
    shown = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        shown += data
        if typed and b"ready" in shown:
            os.write(master, typed)
            typed = b""
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_the_command_meets_the_terminal_that_we_have(tmp_path):
    code = (
        "import os, sys; print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(2).columns, end='\\r\\n')"
    )
    shown = [in_terminal(words) for words in (command(tmp_path, code), [sys.executable, "-c", code])]
    assert shown[0] == shown[1] == (0, b"True True True 101\r\r\n")
    assert (tmp_path / "logs/x.log").read_bytes() == b"True True True 101\r\n"
    piped = ["/bin/sh", "-c", '"$@" | cat', "sh", *command(tmp_path, code)]
    assert in_terminal(piped)[1] == b"True False True 101\r\r\n"


def test_ctrl_c_ends_the_command_and_is_no_failure_to_look_up(tmp_path):
    code = (
        "import time\ntry:\n print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n print('saved'); raise SystemExit(130)"
    )
    ended, shown = in_terminal(command(tmp_path, code), b"\x03")
    assert ended == 130
    assert b"saved" in shown and b"make why" not in shown


def why(folder, *words):
    sources = ["--records", ROOT / "data/sample/errors/records.jsonl", "--patches", ROOT / "patches", "--readme", ROOT / "README.md"]
    answer = subprocess.run(
        [sys.executable, "-I", SCRIPT, "why", "--logs", folder, *sources, *words], capture_output=True, text=True, env=clean_environment()
    )
    assert answer.returncode == 0, answer.stderr
    return answer


def test_a_log_finds_patch_readme_and_record(tmp_path):
    assert why(tmp_path).stderr == f"nothing has failed: there is no log of a failure in {tmp_path}\n"
    log = tmp_path / "sft.failed.log"
    log.write_text("Downloading 1%\r2%\r\x1b[31mValueError: Unable to avoid copy while creating an array as requested.\x1b[0m\n")
    told = why(tmp_path).stdout
    assert told.startswith("sft failed, ") and f"  the log: {log}\n" in told
    assert 'make patch ARGS="apply fasttext-wheel"' in told and "patches/fasttext-wheel/0001-numpy-names.patch" in told
    assert "[README] Unable to avoid copy" in told and "\x1b" not in told and "2%" not in told
    log.write_text(
        "INFO 11-03 starting ValueError of nothing\n" * 500
        + "Traceback (most recent call last):\n  File x.py\n"
        + "ValueError: Total number of attention heads (40) must be divisible by tensor parallel size (16).\nExit 1\n"
    )
    told = why(tmp_path).stdout
    assert "[E0014]" in told and "THU-KEG/AdaptThink#1" in told and "  fix: " in told
    log.write_bytes(b"\xff\x00 the dog ate my homework\n")
    assert "nothing is known about it; read the end of" in why(tmp_path).stdout
    log.write_bytes(b"")
    assert "(it said nothing)" in why(tmp_path).stdout
    time.sleep(0.01)
    (tmp_path / "kb.failed.log").write_text("load_milvus: no C compiler found\n")
    assert why(tmp_path).stdout.startswith("kb failed"), "the newest"
    assert why(tmp_path, "--ask", "false").stdout == why(tmp_path, "--ask", "no-such-command").stdout == why(tmp_path).stdout


def test_every_exception_of_a_patch_finds_that_patch(tmp_path):
    """As the packages print it: with more words around those that the patch names."""
    seen = 0
    for patch in sorted((ROOT / "patches").glob("*/*.patch")):
        raises = [line.partition(": ")[2] for line in patch.read_text().splitlines() if line.startswith("X-Raises: ")]
        for error in raises:
            (tmp_path / "t.failed.log").write_text(
                f"Traceback (most recent call last):\n  File a.py, line 3\n{error}, did you mean this?\n"
            )
            assert patch.name in why(tmp_path).stdout, error
            seen += 1
    assert seen >= 6


def test_a_failed_target_names_make_why_and_that_finds_the_fix(tree):  # noqa: F811
    """A recipe that is wrong, and an exception that the base knows, from a stage's script."""
    (tree / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    stage = tree / "scripts/dedup_text.py"
    stage.write_text("raise RuntimeError(\"Cannot re-initialize CUDA in forked subprocess. You must use the 'spawn' start method\")\n")
    os.utime(tree / "recipes/demo/dedup.yaml")
    failed = make("dedup", f"PYTHON={sys.executable}", cwd=tree)
    assert failed.returncode == 2
    assert "Error 1" in failed.stderr and "RuntimeError: Cannot re-initialize CUDA" in failed.stderr
    hint = "explain_failure: exit 1, the log is data/out/demo/logs/dedup.failed.log; for the fix: make why\n"
    assert failed.stderr.count(hint) == 1
    told = make("why", f"PYTHON={sys.executable}", cwd=tree)
    assert told.returncode == 0, told.stderr
    records = [json.loads(line) for line in (ROOT / "data/sample/errors/records.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [record for record in records if "cuda-fork-spawn" in record["tags"]]
    assert any(record["fix"] in told.stdout and record["source"] in told.stdout for record in expected), told.stdout
    assert "dedup failed" in told.stdout
    stage.write_text("")
    assert make("dedup", f"PYTHON={sys.executable}", cwd=tree).returncode == 0
    assert "nothing has failed" in make("why", f"PYTHON={sys.executable}", cwd=tree).stderr


@pytest.mark.parametrize("words", [[], ["run"], ["run", "--log", "x"], ["why", "--no-such"]])
def test_bad_usage(words):
    assert subprocess.run([sys.executable, "-I", SCRIPT, *words], capture_output=True).returncode == 2
