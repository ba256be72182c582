#!/usr/bin/env bash
# Everything that still lacks a GPU figure, in one command, on a machine with a CUDA device:
#   PYTHON=.venv/bin/python benchmarks/gpu_check.sh
# The experiments choose the device by themselves (engine.device: auto). Tables come last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'
"$python" -m pytest -m gpu -q
"$python" benchmarks/bench_overhead.py
"$python" benchmarks/bench_micro_step.py
"$python" benchmarks/bench_drafters.py --device cuda
"$python" benchmarks/bench_cost_ratio.py
"$python" benchmarks/bench_speed.py --work runs/gpu_speed
