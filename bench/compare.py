"""Run bench/rollout.py and bench/step.py beside transformers and TRL, and print a table.

    python bench/compare.py --peer-python VENV/bin/python --model 11m --repeats 3

--model is a size of bench/common.py, with random weights, or the folder of a checkpoint.
VENV: python -m venv VENV && VENV/bin/pip install torch transformers trl. Nothing else should run on
the machine meanwhile. The sides take turns (A B A B ...). Every run is printed as a line of JSON on
standard error; the table has medians, and ours by the other. --what chooses: sampling of
heavy-tailed or of equal lengths, or a whole update.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import common

SAMPLE = "--repeats 1 --slots {slots} --workload {folder}/{what}"
UPDATE = "--prompts {prompts} --group {group} --new-tokens {new_tokens}"
SAMPLERS = {"ours": f"rollout.py {SAMPLE}", "generate": f"peer_generate.py {SAMPLE}"}
UPDATES = {"ours": f"step.py {UPDATE}", "TRL": f"peer_trl.py {UPDATE}"}
COMMANDS = {"heavy-tailed": SAMPLERS, "equal": SAMPLERS, "update": UPDATES}


def last_line(python, command):
    """The JSON that a script prints last."""
    script, *flags = command.split()
    command = [python, Path(__file__).with_name(script), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(flags)}: exit {done.returncode}")
    line = done.stdout.splitlines()[-1]
    print(script, line, file=sys.stderr)
    return json.loads(line)


def compare(args, what):
    """Measure, and print one row of the table."""
    found = {side: [] for side in COMMANDS[what]}
    for _ in range(args.repeats):
        for side, command in COMMANDS[what].items():
            python = sys.executable if side == "ours" else args.peer_python
            command = f"{command} --model {{model}} --dtype {{dtype}} --device {{device}}"
            found[side].append(last_line(python, command.format(**vars(args) | {"what": what})))
    speeds, memory = (
        [median(row[key] for row in rows) for rows in found.values()]
        for key in ("tokens_per_second", "peak_rss_mib")
    )
    sides, ratio = " and ".join(found), speeds[0] / speeds[1]
    print(f"| {what} | {sides} | {speeds} | {memory} | {ratio:.2f} x |", flush=True)


def main():
    args = common.parse(
        __doc__,
        **common.MODEL,
        **common.UPDATE,
        peer_python=sys.executable,
        what=list(COMMANDS),
        slots=32,
        repeats=3,
    )
    print("| what | sides | tokens a second | peak memory, MiB | ours by the other |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as args.folder:
        if args.model in common.SIZES:
            common.make_model(args.model, f"{args.folder}/model")
            args.model = f"{args.folder}/model"
        common.make_workload(f"{args.folder}/heavy-tailed", 12, 8, 192)
        common.make_workload(f"{args.folder}/equal", 12, 8, 96, uniform=True)
        for what in args.what:
            compare(args, what)


if __name__ == "__main__":
    main()
