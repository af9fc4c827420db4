#!/usr/bin/env bash
# An acceptance test of one GPU; one command, at most eight minutes, one table:
#     MODEL=Qwen/Qwen2.5-1.5B-Instruct bash bench/gpu.sh [PYTHON]
# MODEL is a folder or a hub name. Without it, a model of SIZE (1.5b) with random weights stands in, whose gap between learner and
# sampler says less. Completions have NEW tokens (1024). A small model (SMALL, 135m) is killed and resumed, and meets a full memory.
# Without a GPU: SIZE=2m SMALL=2m NEW=16 DEVICE=cpu DTYPE=float32. Then the captured step is the step itself, and no memory is full.
# If $OUT is given, models, runs and their log stay there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python} size=${SIZE:-1.5b} device=${DEVICE:-cuda} dtype=${DTYPE:-bfloat16}
small=${SMALL:-$([ "$size" = 2m ] && echo 2m || echo 135m)}
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
"$python" -c "import torch; print('torch', torch.__version__, torch.cuda.get_device_name() if '$device' == 'cuda' else '$device')"
"$python" bench/rollout.py --make-model "$small" "$out/small"
if [ -z "${MODEL:-}" ]; then
  "$python" bench/rollout.py --make-model "$size" "$out/model"
fi
timeout 450 "$python" bench/gpu.py --model "${MODEL:-$out/model}" --out "$out" --device "$device" --dtype "$dtype" \
  --new-tokens "${NEW:-1024}" || { code=$?; [ "$code" != 124 ] || echo "| all | 450 s are over | what is missing above | NO |"; exit "$code"; }
