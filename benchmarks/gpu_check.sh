#!/usr/bin/env bash
# Everything that still lacks a GPU figure, in one command, on a machine with a CUDA device:
#   PYTHON=.venv/bin/python benchmarks/gpu_check.sh
# With SGLang installed (pip install '.[sglang]') its arms follow: CUDA graphs on and off,
# overlapped scheduling on and off, updates inline and in the background, the same text or not,
# throughput, the gaps between tokens, how much of the update time was hidden, and the KV capacity.
#   CONFIG=configs/serve_qwen3_8b_eagle3.yaml    another model than the tiny world
# The experiments choose the device by themselves (engine.device: auto). Tables come last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
config="${CONFIG:-configs/serve_tiny_gpu.yaml}"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'
"$python" -m pytest -m gpu -q
"$python" benchmarks/bench_overhead.py
"$python" benchmarks/bench_micro_step.py
"$python" benchmarks/bench_drafters.py --device cuda
"$python" benchmarks/bench_cost_ratio.py
"$python" benchmarks/bench_speed.py --work runs/gpu_speed
"$python" benchmarks/bench_never_worse.py --domains translated --texts documents --max-prompts 1 \
  --work runs/gpu_never_worse || echo "a cell of bench_never_worse.py does not hold"
if ! "$python" -c 'import sglang' 2>/dev/null; then
  echo "SGLang is not installed: its arms were not measured"
  exit
fi
no_graphs=engine.arguments.disable_cuda_graph=true
no_overlap=engine.arguments.disable_overlap_schedule=true
background=adapt.trainer.background=true
for batch in 1 8; do
  echo "== $config, $batch requests at once"
  "$python" benchmarks/bench_sglang.py -c "$config" --in-turn --batch "$batch" --pairs 8 --tokens 512 \
    --arm stock --arm "stock/$no_graphs" --arm "stock/$no_overlap" \
    --arm never --arm watching --arm adapted --arm "adapted/$background" \
    --arm "adapted/$background/$no_graphs" --arm "adapted/$background/$no_overlap" \
    --arm "adapted/$background/adapt.scope.kind=tail"
done
