"""Experiments on the shipped task: arms that differ in flags, paired by seed.

    python experiments/run.py rates --seeds 0-2           learning rates of the arms of `levels`
    python experiments/run.py levels --seeds 10-19        runs what is missing, then the report
    python experiments/run.py levels --seeds none         the report alone: tables and picture
    python experiments/run.py levels --seeds 20-22        fresh seeds: do they agree with it?

Arms are the tables in experiments/arms.py; experiments/PROTOCOL.md says what is measured, and was
written before the seeds that are reported. Every run is a process of its own with one thread:
`python train.py FLAGS`, then `python eval.py` for pass@16. What it leaves is one line of
experiments/results/NAME.jsonl, and a run that is there is not run again.
"""

import argparse
import json
import os
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
from tables import FRESH, RESULTS, agreement, best_rate, read_runs, report  # noqa: E402

from parts.files import read_records, write_records  # noqa: E402

RUNS = Path("runs/experiments")
COLUMNS = (
    "level tokens_sampled tokens_trained groups_drawn groups_kept groups_all_right "
    "groups_all_wrong groups_stale entropy length_mean truncated_share carried_share "
    "clip_low_share clip_high_share reward_variance_within reward_variance_between "
    "sample_seconds learn_seconds"
)
FILES = threading.Lock()  # of results: no thread reads while another one writes
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        if subprocess.run(words, env=ALONE, stdout=file, stderr=file).returncode:
            raise SystemExit(f"python {command}\nfailed: see {log}")


def find_twin(command):
    """A run of any experiment with the very same command, seed included; None: there is none"""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for run in read_runs(path.stem):
            if run["command"] == command:
                return run


def folder(name, arm, seed):
    return RUNS / name / re.sub(r"\W+", "-", arm).strip("-") / str(seed)


def train(name, arm, seed, command):
    """Train, measure pass@16, and delete the run's folder. -> what is kept of it"""
    out = folder(name, arm, seed)
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    out.parent.mkdir(parents=True, exist_ok=True)
    shell(f"{command} --out {out}", log)
    metrics = read_records(out / "metrics.jsonl")
    levels = json.loads((out / "config.json").read_text())["levels"]
    found = {"arm": arm, "seed": seed, "command": command}
    found["budget"] = sum(level["tokens"] for level in levels)
    found["evaluations"] = read_records(out / "eval.jsonl")
    found["updates"] = {key: [row[key] for row in metrics] for key in COLUMNS.split()}
    if name != "rates":
        (checkpoint,) = (out / "checkpoints").iterdir()
        few = arms.FEW.get(name, arms.FEW["levels"])
        shell(f"eval.py --model {checkpoint} {few} --seed {seed} --out {out / 'few'}", log)
        (files,) = json.loads((out / "few/summary.json").read_text())["files"].values()
        found["pass@16"] = files["all"]["pass@16"][0]
    shutil.rmtree(out)
    return found


def one_run(name, arm, seed, command):
    """Add a run to the file of its experiment. One with the very same command that is there
    already, of whatever experiment or arm, is taken over: what arms share is run once."""
    with FILES:
        found = find_twin(command)
    found = found or train(name, arm, seed, command)
    with FILES:
        write_records(RESULTS / f"{name}.jsonl", [found | {"arm": arm}], "a")


def missing(name, chosen, seeds):
    """-> the arguments of `one_run` for every run that is not there, all arms of one seed first"""
    there = {(run["arm"], run["seed"]) for run in read_runs(name)}
    tasks = []
    for seed in seeds:
        for arm in chosen or arms.EXPERIMENTS[name]:
            flags = arms.EXPERIMENTS[name][arm]
            if flags and (arm, seed) not in there:  # without flags it can be run no more
                if "--lr" not in flags:
                    flags += f" --lr {best_rate(arm):g}"
                tasks.append((name, arm, seed, f"train.py {arms.BASE} {flags} --seed {seed}"))
    return tasks


def parse_seeds(text):
    """'3' or '10-19' or 'none'"""
    first, _, last = text.partition("-")
    return [] if text == "none" else range(int(first), int(last or first) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=arms.EXPERIMENTS)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=parse_seeds, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    unknown = set(args.arms or ()) - arms.EXPERIMENTS[args.name].keys()
    if unknown:
        parser.error(f"--arms: {args.name} has no {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    arms.prepare()
    tasks = missing(args.name, args.arms, args.seeds)
    if args.name == "base" and tasks:
        for command in arms.base_commands():
            shell(command, RUNS / "bases.log")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(lambda task: one_run(*task), tasks), total=len(tasks), unit="run"))
    if any(seed in FRESH for seed in args.seeds):
        agreement(args.name)
    else:
        report(args.name)


if __name__ == "__main__":
    main()
