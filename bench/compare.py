"""Run bench/rollout.py and bench/step.py beside transformers and TRL, and print a table.

    python bench/compare.py --peer-python VENV/bin/python --sizes CHECKPOINT 11m --repeats 3

A size is one of bench/common.py, with random weights, or the folder of a checkpoint.
VENV: python -m venv VENV && VENV/bin/pip install torch transformers trl. Nothing else should run on
the machine meanwhile. The sides take turns (A B C A B C ...). Every run is appended to --log as a
line of JSON; the table has medians, and ours by the best of the others. --what chooses: sampling of
heavy-tailed or of equal lengths, or a whole update.
"""

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

import common

SAMPLE = "--repeats 1 --slots {slots} --workload {folder}/{what}"
SAMPLERS = {
    "ours": f"rollout.py {SAMPLE}",
    "generate": f"peer_generate.py {SAMPLE}",
    "generate_batch": f"peer_generate.py --continuous {SAMPLE}",
}
UPDATES = {"ours": "step.py {shape}", "TRL": "peer_trl.py {shape}"}
COMMANDS = {"heavy-tailed": SAMPLERS, "equal": SAMPLERS, "update": UPDATES}
# Of an update; of other sizes and of a checkpoint the last one.
SHAPES = {
    "2m": "--prompts 8 --group 8 --new-tokens 128",
    "11m": "--prompts 8 --group 8 --new-tokens 128",
    "135m": "--prompts 4 --group 4 --new-tokens 64",
    "": "--prompts 2 --group 8 --new-tokens 128",
}


def last_line(command, peer_python):
    """The JSON that a script prints last. If a peer fails, its error is printed: None."""
    script, *flags = command.split()
    is_peer = script.startswith("peer_")
    python = peer_python if is_peer else sys.executable
    command = [python, Path(__file__).with_name(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    failure = f"{script} {' '.join(flags)}: exit {done.returncode}\n{done.stderr[-800:]}"
    if not is_peer:
        sys.exit(failure)
    print(failure, file=sys.stderr)
    return None


def compare(args, what, values):
    """Measure, and print one row of the table."""
    found = {side: [] for side in COMMANDS[what]}
    for _ in range(args.repeats):
        for side, command in COMMANDS[what].items():
            command += " --model {model} --dtype {dtype}"
            result = last_line(command.format(what=what, **values), args.peer_python)
            if result:
                found[side].append(result)
                with open(args.log, "a") as log:
                    print(json.dumps({"what": what, "side": side, **values, **result}), file=log)
    cells = []
    for key in ("tokens_per_second", "peak_rss_mib"):
        cells.append({s: median(r[key] for r in rows) for s, rows in found.items() if rows})
    ours, *others = cells[0].values()
    ratio = ours / max(others, default=float("nan"))
    model = f"{values['size']} {values['dtype']}"
    print(f"| {model} | {what} | {cells[0]} | {cells[1]} | {ratio:.2f} x |", flush=True)


def main():
    args = common.parse(
        __doc__,
        peer_python=sys.executable,
        sizes=["11m"],
        dtypes=["float32", "bfloat16"],
        what=list(COMMANDS),
        slots=32,
        repeats=3,
        log="compare.jsonl",
    )
    print("| model | what | tokens a second | peak memory, MiB | ours by the best other |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        common.make_workload(Path(folder, "heavy-tailed"), 12, 8, 192)
        common.make_workload(Path(folder, "equal"), 12, 8, 96, uniform=True)
        for size, dtype, what in product(args.sizes, args.dtypes, args.what):
            model = Path(size)
            if size in common.SIZES:
                model = Path(folder, size)
                if not model.exists():
                    common.make_model(size, model)
            shape = SHAPES.get(size, SHAPES[""])
            values = {"size": model.name, "model": str(model), "dtype": dtype, "shape": shape}
            compare(args, what, values | {"folder": folder, "slots": args.slots})


if __name__ == "__main__":
    main()
