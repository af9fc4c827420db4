"""Run bench/rollout.py and bench/step.py beside transformers and TRL, and print a table.

    python bench/compare.py --peer-python VENV/bin/python --model 11m --repeats 3

--model is a size of bench/shared.py, with random weights, or the folder of a checkpoint.
VENV: python -m venv VENV && VENV/bin/pip install torch transformers trl. Nothing else should run on
the machine meanwhile. The sides take turns (A B A B ...). Every run is printed as a line of JSON on
standard error; the table has medians, and ours by the other. --what chooses: sampling of
heavy-tailed lengths, or a whole update.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import shared

COMMANDS = {
    "heavy-tailed": ("rollout.py", "peer_generate.py", "--repeats 1 --prompts 12 --new-tokens 192"),
    "update": ("step.py", "peer_trl.py", ""),
}


def last_line(python, command):
    """The JSON that a script prints last."""
    script, *flags = command.split()
    command = [python, Path(__file__).with_name(script), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = done.stdout.splitlines()[-1]
    print(script, line, file=sys.stderr)
    return json.loads(line)


def compare(args, what):
    """Measure, and print one row of the table."""
    *scripts, flags = COMMANDS[what]
    flags += f" --model {args.model} --dtype {args.dtype} --device {args.device}"
    found = [], []
    for _ in range(args.repeats):
        for rows, python, script in zip(found, (sys.executable, args.peer_python), scripts):
            rows.append(last_line(python, f"{script} {flags}"))
    speeds, memory = (
        [median(row[key] for row in rows) for rows in found]
        for key in ("tokens_per_second", "peak_rss_mib")
    )
    ratio = speeds[0] / speeds[1]
    print(f"| {what} | {scripts[1]} | {speeds} | {memory} | {ratio:.2f} x |", flush=True)


def main():
    args = shared.parse(
        __doc__,
        **shared.MODEL,
        peer_python=sys.executable,
        what=list(COMMANDS),
        repeats=3,
    )
    print("| what | beside | tokens a second | peak memory, MiB | ours by the other |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.model in shared.SIZES:
            shared.make_model(args.model, f"{folder}/model")
            args.model = f"{folder}/model"
        for what in args.what:
            compare(args, what)


if __name__ == "__main__":
    main()
