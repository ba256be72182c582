#!/usr/bin/env bash
# Everything that still lacks a GPU figure, in short arms, on a machine with a CUDA device:
#   PYTHON=.venv/bin/python benchmarks/gpu_check.sh [--list] [--table] [--again] [--minutes 9] [ARM ...]
# A call runs the arms whose file is missing in runs/gpu_check/, stops by itself after --minutes, and
# the next one goes on; last comes a table of all that is there, with what benchmarks/gpu_model.md
# expects beside it. Nothing is downloaded. An arm that fails is recorded, with what it said last.
#   SGLANG_PYTHON=…     the interpreter that has SGLang, if it is another one; without it those arms are left out
#   CONFIG=configs/serve_qwen3_8b_eagle3.yaml    another model for SGLang than the tiny world
#   benchmarks/gpu_check.sh --dry-run    starts every arm on a CPU, with the tiny world
set -euo pipefail
python="${PYTHON:-python3}"
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" --python "$python" \
  --sglang-python "${SGLANG_PYTHON:-$python}" --config "${CONFIG:-configs/serve_tiny_gpu.yaml}" "$@"
