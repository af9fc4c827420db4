"""Experiments on the shipped task: arms that differ in flags, paired by seed.

    python experiments/runs.py levels --seeds 10-19        runs what is missing, then the report
    python experiments/runs.py levels                      the report alone: tables (map: a picture)

Arms are in experiments/arms.py, those of older experiments with their results;
experiments/PROTOCOL.md says what is measured, and was written before the seeds that are reported.
Every run is a process of its own with one thread: `python train.py FLAGS`, then `python eval.py`
for greedy accuracy. What it leaves is one line of experiments/results/NAME.jsonl, and a
run that is there is not run again.
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
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import arms  # noqa: E402
from tables import RESULTS, commands, read_runs, report  # noqa: E402

from files import read_records, write_records  # noqa: E402

RUNS = Path("runs/experiments")
COLUMNS = (
    "level tokens_sampled tokens_trained groups_drawn groups_kept groups_all_right "
    "groups_all_wrong groups_stale entropy length_mean truncated_share carried_share "
    "clip_low_share clip_high_share reward_variance_within reward_variance_between "
    "sample_seconds learn_seconds"
)
COMMIT = subprocess.run(
    ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
).stdout.strip()
CPU = Path("/proc/cpuinfo")  # of Linux
NAMES = re.findall(r"model name\s*: (.+)", CPU.read_text() if CPU.exists() else "")
MACHINE = {"commit": COMMIT, "cpu": [*NAMES, platform.machine()][0]}
FILES = threading.Lock()  # of results: no thread reads while another one writes
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        if subprocess.run(words, env=ALONE, stdout=file, stderr=file).returncode:
            raise SystemExit(f"python {command}\nfailed: see {log}")


def folder(name, arm, seed):
    return RUNS / name / re.sub(r"\W+", "-", arm).strip("-") / str(seed)


def train(name, arm, seed, command):
    """Train, measure greedy accuracy, and delete the run's folder. -> what is kept of it"""
    out = folder(name, arm, seed) / str(os.getpid())  # a run that was killed may live on in another
    log = out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    shell(f"{command} --out {out}", log)
    metrics = read_records(out / "metrics.jsonl")
    config = json.loads((out / "config.json").read_text())
    found = {"arm": arm, "seed": seed, "command": command} | MACHINE | {"torch": config["torch"]}
    found["budget"] = sum(level["tokens"] for level in config["levels"])
    found["evaluations"] = read_records(out / "eval.jsonl")
    found["updates"] = {key: [row[key] for row in metrics] for key in COLUMNS.split()}
    found["problems"] = config["problems"]
    if name != "choose":  # which must not see the problems that report
        (checkpoint,) = (out / "checkpoints").iterdir()
        shell(f"eval.py --model {checkpoint} {arms.GREEDY} --out {out / 'greedy'}", log)
        (greedy,) = json.loads((out / "greedy/summary.json").read_text())["files"].values()
        found["greedy"] = [greedy[f"level {number}"]["avg@1"][0] for number in (1, 2)]
    shutil.rmtree(out)
    return found


def one_run(name, arm, seed, command):
    """Add a run to the file of its experiment."""
    try:
        found = train(name, arm, seed, command)
    except SystemExit as failure:
        return print(failure)  # the others go on
    with FILES:
        write_records(RESULTS / f"{name}.jsonl", [found], "a")


def missing(name, chosen, seeds):
    """-> the arguments of `one_run` for every run that is not there, all arms of one seed first"""
    there = {(run["arm"], run["seed"]): run["command"] for run in read_runs(name)}
    tasks = []
    for seed in seeds:
        for arm, flags in commands(name).items():
            command = f"train.py {flags} --seed {seed}"
            if there.get((arm, seed), command) != command:
                sys.exit(f"{name}, {arm}, seed {seed}: was another run, {there[arm, seed]}")
            wanted = (not chosen or arm in chosen) and (arm, seed) not in there
            gone = "--target-pass-rate", "--online"  # flags
            if wanted and not any(flag in flags for flag in gone):
                tasks.append((name, arm, seed, command))
    return tasks


def parse_seeds(text):
    """'3' or '10-19'"""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    there = [path.stem for path in RESULTS.glob("*.md")]
    parser.add_argument("name", choices=sorted({*arms.ARMS, *there}))
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=parse_seeds, default=(), help="default: the report alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    unknown = set(args.arms or ()) - commands(args.name).keys()
    if unknown:
        parser.error(f"--arms: {args.name} has no {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    arms.prepare()
    tasks = missing(args.name, args.arms, args.seeds)
    if args.name in ("lost", "choose", "map") and tasks:
        for command in arms.base_commands():
            shell(command, RUNS / "bases.log")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(lambda task: one_run(*task), tasks), total=len(tasks), unit="run"))
    report(args.name)
    if missing(args.name, args.arms, args.seeds):
        sys.exit("some runs failed, see above")


if __name__ == "__main__":
    main()
