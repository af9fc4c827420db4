"""Make the runs of an experiment that are not there, seed by seed; then print its tables.

    python -m experiments.runs tasks --seeds 60 61 62 63

Arms are in experiments/arms.py. Every run is a process of its own with one thread: `python train.py
FLAGS`, then `python eval.py` for greedy accuracy. What it leaves is one line of
experiments/results/NAME.jsonl. A kill costs the runs that are under way.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from common.files import read_records, write_records
from experiments.arms import ARMS, BASES, base_commands, path_of, write_levels, write_tasks
from experiments.tables import RESULTS, read_runs, report

COLUMNS = (  # of metrics.jsonl
    "level tokens_sampled tokens_trained groups_drawn groups_kept groups_all_right "
    "groups_all_wrong groups_stale entropy length_mean truncated_share carried_share "
    "clip_low_share clip_high_share sample_seconds learn_seconds"
)
GREEDY = "--samples 1 --temperature 0 --max-new-tokens 160"


def machine():
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    cpu = Path("/proc/cpuinfo")  # of Linux
    names = re.findall(r"model name\s*: (.+)", cpu.read_text() if cpu.exists() else "")
    return {"commit": commit, "cpu": [*names, platform.machine()][0]}


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.run(words, env=alone, stdout=file, stderr=file).returncode:
            raise RuntimeError(f"python {command}\nfailed: see {log}")


def train(arm, seed, command):
    """Train, measure greedy accuracy, and delete the run's folder. -> what is kept of it

    Raises RuntimeError if a command fails.
    """
    out = path_of(f"{arm} {seed} {os.getpid()}")  # a run that was killed may live on in another
    log = out.with_suffix(".log")
    shell(f"{command} --out {out}", log)
    (checkpoint,) = (out / "checkpoints").iterdir()
    (held_out,) = re.findall(r"--eval-data (\S+)", command)
    shell(f"eval.py --model {checkpoint} --data {held_out} {GREEDY} --out {out / 'greedy'}", log)
    (greedy,) = json.loads((out / "greedy/summary.json").read_text())["files"].values()
    metrics = read_records(out / "metrics.jsonl")
    config = json.loads((out / "config.json").read_text())
    found = {"arm": arm, "seed": seed, "command": command} | machine() | {"torch": config["torch"]}
    found["budget"] = sum(config["tokens"])
    found["evaluations"] = read_records(out / "eval.jsonl")
    found["updates"] = {key: [row[key] for row in metrics] for key in COLUMNS.split()}
    found["problems"] = config["problems"]
    found["greedy"] = [row["avg@1"][0] for name, row in greedy.items() if name != "all"]
    shutil.rmtree(out)
    return found


def make_base(base):
    for command in base_commands(base):
        shell(command, path_of(base).with_suffix(".log"))
    write_levels(base)


def missing(name, seeds):
    """-> the arguments of `train` for every run that is not there, all arms of one seed first"""
    there = {}
    for run in read_runs(name):
        there[run["arm"], run["seed"]] = run["command"]
    tasks = []
    for seed in seeds:
        for arm, flags in ARMS[name].items():
            command = f"train.py {flags} --seed {seed}"
            if there.get((arm, seed), command) != command:
                sys.exit(f"{name}, {arm}, seed {seed}: was another run, {there[arm, seed]}")
            if (arm, seed) not in there:
                tasks.append((arm, seed, command))
    return tasks


def make(name, seeds, jobs):
    """Add a line to the results for every missing run that does not fail."""
    tasks = missing(name, seeds)
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(train, *task) for task in tasks]
        for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
            if run.exception():
                print(run.exception())  # the others go on
            else:
                write_records(RESULTS / f"{name}.jsonl", [run.result()], "a")
    if missing(name, seeds):
        sys.exit("some runs failed, see above")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    write_tasks()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(make_base, BASES))
    make(args.name, args.seeds, args.jobs)
    report(args.name)


if __name__ == "__main__":
    main()
