#!/usr/bin/env bash
# One GPU, ten minutes, one table:
#     MODEL=Qwen/Qwen2.5-1.5B-Instruct bash bench/gpu.sh [PYTHON]
# PYTHON ($PYTHON) has what requirements.txt names. Without it: .venv, python or python3 if one of them has it; else .venv is made.
# MODEL      a folder or a hub name; one that cannot be had is replaced by random weights of its shape. Without it: those of SIZE.
# SIZE       1.5b, 7b, ... (bench/common.py);   NEW  tokens of a completion (1024);   DTYPE  bfloat16
# LIMIT      seconds of a row (150);   TOTAL  of all (600);   OUT  a new folder for logs, table.md and rows.jsonl
# DEVICE=cpu SIZE=2m NEW=8 DTYPE=float32 tries the script without a GPU: there is no capture and no full card.
set -euo pipefail
cd "$(dirname "$0")/.."
has_torch() { "$1" -c "import torch, transformers, safetensors, scipy, math_verify" 2> /dev/null; }

python=${1:-${PYTHON:-}}
if [ -z "$python" ]; then
  for python in .venv/bin/python python python3 ""; do
    if [ -n "$python" ] && has_torch "$python"; then break; fi
  done
fi
if [ -z "$python" ]; then
  echo "No Python here has torch: .venv is made, which takes minutes."
  python=.venv/bin/python
  python3 -m venv .venv && "$python" -m pip install -q -r requirements.txt || {
    echo "No environment: python3 -m venv or pip failed. Name an interpreter that has torch: bash bench/gpu.sh PYTHON"
    exit 2
  }
elif ! has_torch "$python"; then
  echo "$python lacks a package of requirements.txt."
  exit 2
fi
exec "$python" bench/gpu.py --model "${MODEL:-}" --size "${SIZE:-1.5b}" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" \
  --new-tokens "${NEW:-1024}" --limit "${LIMIT:-150}" --total "${TOTAL:-600}" --out "${OUT:-}"
