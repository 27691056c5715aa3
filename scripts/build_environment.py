#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Build the one environment of this toolkit from its lock, patch it, and mend it when it is damaged.

Usage:
    python scripts/build_environment.py --environment .venv --lock requirements-cpu.txt --patches patches
    make setup

Reads   the lock (one `name==version` a line), the folder of patches.
Writes  ENVIRONMENT, with ENVIRONMENT/stamp.json last: an environment without its stamp is never used, but built anew.
Exit    0 built, mended or whole already; 1 failed; 2 bad usage.
Needs   Python 3.11 and a C compiler; a package registry; 7 GB of disk and about two minutes for CPU, 25 GB for CUDA.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

DISK = {"cpu": 7 << 30, "cuda": 25 << 30}


def preflight(environment, backend):
    """Exit with one sentence when this machine cannot hold or build the environment."""
    if sys.version_info[:2] != (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(
            f"build_environment: the lock is for Python 3.11, this is {version}; install it and run `make setup PYTHON3=python3.11`"
        )
    if not shutil.which("cc") and not shutil.which("gcc"):
        raise SystemExit(
            "build_environment: no C compiler found, and torch, DeepSpeed and vLLM compile code; install one (apt install gcc g++)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit("build_environment: Python.h is missing, and compiled extensions need it; install it (apt install python3.11-dev)")
    free = shutil.disk_usage(environment.parent).free
    if free < DISK[backend]:
        raise SystemExit(
            f"build_environment: {environment} needs {DISK[backend] >> 30} GB of disk and {free / (1 << 30):.1f} GB are free; "
            "make room, or name another disk with `make setup VENV=/path`"
        )


def find_links():
    """Return the wheel folder that pip is configured with, which uv would not look at by itself; "" when there is none."""
    given = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if given:
        return given
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True)
    return ",".join(answer.stdout.split()) if answer.returncode == 0 else ""


def uv_install(environment, backend, *arguments):
    """Run `uv pip install --no-deps` for the environment. A lock needs no resolving; bytecode halves every later start."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "PYTHONPATH")}
    variables |= {"DS_BUILD_OPS": "0", "UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "300")}
    python, links = environment / "bin" / "python", find_links()
    command = [environment / "bin" / "uv", "pip", "install", "--python", python, "--no-deps", "--compile-bytecode", *arguments]
    if links:
        variables["UV_FIND_LINKS"] = links
    elif backend == "cpu":
        command += ["--torch-backend", "cpu"]
    if subprocess.run(command, env=variables).returncode:
        raise SystemExit("build_environment: uv could not install the lock (its reason stands above); `make setup` tries again")


def lock_lines(lock):
    """Return {package: version} of a lock."""
    return dict(line.strip().split("==") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)


def damaged(environment, wanted):
    """Return the requirements of `wanted` that are missing, of another version, or lack a file that their RECORD names."""
    site = next((environment / "lib").glob("python3.*/site-packages"))
    found = {}
    for record in site.glob("*.dist-info/RECORD"):
        name, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
        with open(record, encoding="utf-8", newline="") as file:
            whole = all((site / row[0]).exists() for row in csv.reader(file) if row and not row[0].endswith(".pyc"))
        found[re.sub(r"[-_.]+", "-", name).lower()] = version if whole else None
    return [f"{name}=={version}" for name, version in wanted.items() if found.get(name) != version]


def build_parser():
    parser = argparse.ArgumentParser(
        prog="build_environment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--environment", default=".venv", metavar="DIR", help="folder of the environment (default: .venv)")
    parser.add_argument("--lock", required=True, metavar="FILE", help="the lock to install")
    parser.add_argument("--patches", metavar="DIR", help="folder of patches, applied by the patch_packages.py beside this script")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    environment, lock, start = Path(args.environment).absolute(), Path(args.lock), time.time()
    if not lock.is_file():
        parser.error(f"{lock} does not exist; name requirements-cpu.txt or requirements.txt")
    backend = "cpu" if "+cpu" in lock.read_text(encoding="utf-8") else "cuda"
    stamp, state = environment / "stamp.json", {"lock": lock_lines(lock), "python": sys.version, "backend": backend}
    old = json.loads(stamp.read_text()) if stamp.exists() else {}

    if not isinstance(old.get("lock"), dict) or any(old[key] != state[key] for key in ("python", "backend")):
        preflight(environment, backend)
        if environment.exists() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").exists():
            parser.error(f"{environment} is not a virtual environment; name an empty folder")
        print(f"environment: {len(state['lock'])} packages for {backend} into {environment}, a few minutes the first time", file=sys.stderr)
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        if subprocess.run([environment / "bin" / "pip", "--disable-pip-version-check", "install", "--quiet", "uv"]).returncode:
            raise SystemExit(
                "build_environment: pip could not install uv (its reason stands above); check the network and `make setup` again"
            )
        uv_install(environment, backend, "-r", lock)
    elif gone := sorted(old["lock"].keys() - state["lock"].keys()):  # in place: a server may be running from here
        subprocess.run([environment / "bin" / "uv", "pip", "uninstall", "--python", environment / "bin" / "python", *gone], check=True)
    broken = damaged(environment, state["lock"])
    if broken:
        stamp.unlink(missing_ok=True)
        print(f"environment: mending {', '.join(broken)}", file=sys.stderr)
        uv_install(environment, backend, "--reinstall", *broken)
    if args.patches:
        patcher = Path(__file__).with_name("patch_packages.py")
        command = [environment / "bin" / "python", patcher, "apply", "--patches", args.patches]
        if code := subprocess.run(command).returncode:
            stamp.unlink(missing_ok=True)
            raise SystemExit(f"build_environment: a patch could not be applied (exit {code}, see above); `make setup` tries again")
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    os.replace(temporary, stamp)
    print(f"environment: {environment} is whole, {time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("build_environment: interrupted; `make setup` builds it anew")
