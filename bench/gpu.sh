#!/usr/bin/env bash
# Sampling and whole updates of a Qwen2-1.5B shape (random weights, bfloat16) on one GPU of 80 GB; one command, under ten minutes:
#     bash bench/gpu.sh [PYTHON]
# Prints the card, then the lines of bench/rollout.py (128 slots, heavy-tailed lengths of at most 4,096 tokens) and bench/step.py.
# SIZE=2m NEW=64 DEVICE=cpu DTYPE=float32 tries the script itself without a GPU. If $OUT is given, model, workload and results stay there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python} size=${SIZE:-1.5b} new=${NEW:-4096} device=${DEVICE:-cuda} dtype=${DTYPE:-bfloat16}
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
"$python" -c "import torch; print('torch', torch.__version__, torch.cuda.get_device_name() if '$device' == 'cuda' else '$device')"
"$python" bench/rollout.py --make-model "$size" "$out/model" --make-workload "$out/workload.jsonl" \
  --prompts 32 --group 8 --max-new "$new"
status=0  # one that fails or takes too long must not cost the other
timeout 300 "$python" bench/rollout.py --model "$out/model" --workload "$out/workload.jsonl" --slots 128 --dtype "$dtype" --repeats 1 \
  --device "$device" | tee "$out/rollout.json" || status=$?
timeout 200 "$python" bench/step.py --model "$out/model" --prompts 8 --group 16 --new-tokens "$((new / 8))" --slots 128 \
  --micro-batch-tokens 8192 --dtype "$dtype" --steps 2 --device "$device" | tee "$out/step.json" || status=$?
exit $status
