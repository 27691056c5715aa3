"""Rewrite the fenced snippets of scripts/*.py from tests/snippets/ (`make snippets`); tests/test_contract.py compares them."""

import re
from pathlib import Path

HERE = Path(__file__).parent
FENCE = re.compile(r"^# >>> snippet: (\w+)\n.*?^# <<<\n", re.S | re.M)


def synced(text):
    """Return `text` with each fenced block replaced by the snippet of its name; KeyError-free: an unknown name is an error."""
    return FENCE.sub(lambda match: (HERE / "snippets" / f"{match[1]}.py").read_text(encoding="utf-8"), text)


if __name__ == "__main__":
    for script in sorted((HERE.parent / "scripts").glob("*.py")):
        old = script.read_text(encoding="utf-8")
        if synced(old) != old:
            script.write_text(synced(old), encoding="utf-8")
            print(f"rewrote the snippets of {script}")
