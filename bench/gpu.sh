#!/usr/bin/env bash
# One GPU, ten minutes, one table:
#     MODEL=Qwen/Qwen2.5-1.5B-Instruct bash bench/gpu.sh [PYTHON]
# PYTHON ($PYTHON) has what requirements.txt names. Without it: .venv, python or python3 if one of them has it; else .venv is made.
# MODEL      a folder or a hub name; one that cannot be had is replaced by random weights of its shape. Without it: those of SIZE.
# Paths are seen from the project's root, or absolute.
# SIZE       1.5b, 7b, ... (bench/shared.py);   NEW  tokens of a completion (1024);   DTYPE  bfloat16
# ROWS       which, in their order (all): card and model come first
# LIMIT      seconds of a row (150);   TOTAL  of all (600);   OUT  a new folder for logs, table.md and rows.jsonl
# DEVICE=cpu SIZE=2m NEW=8 DTYPE=float32 tries the script without a GPU: there is no capture and no full card.
# Every row is a process of its own. One that fails or takes too long keeps what it has printed, and its log's last line.
set -uo pipefail
cd "$(dirname "$0")/.."
has_torch() { "$1" -c "import train" 2> /dev/null; } # and all that it imports

python=${1:-${PYTHON:-}}
if [ -z "$python" ]; then
  for python in .venv/bin/python python python3 ""; do
    if [ -n "$python" ] && has_torch "$python"; then break; fi
  done
fi
if [ -z "$python" ]; then
  echo "No Python here has torch: .venv is made, which takes minutes."
  python=.venv/bin/python
  python3 -m venv .venv || python=python3 # a machine without venv may still have pip
  "$python" -m pip install -q -r requirements.txt || {
    echo "No environment: python3 -m venv or pip failed. Name an interpreter that has torch: bash bench/gpu.sh PYTHON"
    exit 2
  }
elif ! has_torch "$python"; then
  echo "$python lacks a package of requirements.txt."
  exit 2
fi

out=${OUT:-$(mktemp -d)}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
if [[ "$out" == *[[:space:]]* || -n "$(ls -A "$out")" ]]; then
  echo "OUT=$out: must be a new or an empty folder, without a blank in its path."
  exit 2
fi
said() { tr '\r' '\n' < "$out/$1.log"; } # a progress bar ends no line
table() { echo "$1" | tee -a "$out/table.md"; }

sweep() { pkill -KILL -f -- "--out $out/"; } # workers of torchrun, which have a group of their own

measure() { # ROW REASON (why the model cannot be had): its exit code; what it has started ends with it
  local left=$((${TOTAL:-600} - SECONDS)) limit=${LIMIT:-150} log=$out/$1.log
  local common=(--device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" --new-tokens "${NEW:-1024}")
  local model=("${common[@]}" --model "$out/model")
  case $1 in
    learning) set -- step.py "${model[@]}" --steps 1 ;;
    recompute) set -- step.py "${model[@]}" --steps 1 --recompute ;;
    lora) set -- step.py "${model[@]}" --steps 1 --lora-rank 16 ;;
    float32) set -- step.py "${model[@]}" --steps 1 --dtype float32 ;;
    draw) set -- rollout.py "${model[@]}" --prompts 16 --group 16 --slots 64 --repeats 1 ;;
    *) set -- gpu.py "${common[@]}" --row "$1" --because "$2" --model "${MODEL:-}" --size "${SIZE:-1.5b}" --out "$out" ;;
  esac
  timeout -s KILL $((left < 1 ? 1 : left < limit ? left : limit)) "$python" "bench/$1" "${@:2}" > "$log" 2>&1 &
  job=$!
  trap 'kill -KILL -- -"$job"; sweep; exit 130' INT TERM # the process group that `timeout` makes
  wait "$job"
  local code=$?
  sweep
  return $code
}

echo "logs, table.md and rows.jsonl: $out"
table "| what | measured | seconds | good |"
table "| --- | --- | --- | --- |"
failed=0 SECONDS=0
for row in ${ROWS:-card model learning decoding draw recompute lora float32 fsdp resume full}; do
  begun=$SECONDS
  measure "$row" "$([ -n "${MODEL:-}" ] || echo "no MODEL is given")"
  code=$?
  if [ "$row" = model ] && [ "$code" != 0 ]; then
    rm -f "$out/model" # a link to it
    measure model "to download it failed or took too long"
    code=$?
  fi
  said "$row" | grep '^{' | sed "s/^{/{\"row\": \"$row\", /" >> "$out/rows.jsonl"
  found=$(said "$row" | grep '^{' | tr -d '{}"' | sed 's/$/<br>/' | tr -d '\n')
  good=yes
  if [ "$code" != 0 ] || [ -z "$found" ]; then # 137: killed
    good=NO failed=1
    last=$(said "$row" | grep . | tail -n 1)
    found="${found}exit code $code after $((SECONDS - begun)) s: ${last:-it has said nothing}"
  fi
  table "| $row | ${found//|/\/} | $((SECONDS - begun)) | $good |"
  if [ "$row" = card ] && [ "$good" = NO ]; then exit 1; fi
done 2> /dev/null # of bash, about killed jobs
exit $failed
