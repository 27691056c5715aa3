# shellcheck shell=bash
# Machine facts for every recipe line of the Makefile: `BASH_ENV` points here, or `source env.sh` by hand.
# It fills only what is unset, and holds nothing that changes a result.

# GPUS=6,7 means what nvidia-smi shows
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"
if [ -n "${GPUS:-}" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi

# Without bytecode each start compiles every import anew: vLLM takes 88 s instead of 49
unset PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# A thread spins shortly and then sleeps: by default it spins on, and beside a busy neighbour every stage is many times slower
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"

# Nothing phones home
export AXOLOTL_DO_NOT_TRACK="${AXOLOTL_DO_NOT_TRACK:-1}"
export DO_NOT_TRACK="${DO_NOT_TRACK:-1}"
export GRADIO_ANALYTICS_ENABLED="${GRADIO_ANALYTICS_ENABLED:-False}"
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
export WANDB_MODE="${WANDB_MODE:-disabled}"
