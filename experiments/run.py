"""Experiments on the shipped task: arms that differ in flags, paired by seed.

    python experiments/run.py rates --seeds 0-2           learning rates of the arms of `levels`
    python experiments/run.py levels --seeds 10-19        runs what is missing, then the report
    python experiments/run.py levels --seeds none         the report alone: tables and picture
    python experiments/run.py levels --seeds 20-22        fresh seeds: do they agree with it?

Arms are the tables in experiments/arms.py; experiments/PROTOCOL.md says what is measured, and was
written before the seeds that are reported. Every run is a process of its own with one thread:
`python train.py FLAGS`, then `python eval.py` for pass@16. What it leaves is one small file,
experiments/results/NAME/ARM/SEED.json, and a run whose file is there is not run again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import arms  # noqa: E402
from tables import FRESH, RESULTS, agreement, best_rate, report, result_file  # noqa: E402

from parts.files import read_records  # noqa: E402

RUNS = Path("runs/experiments")
COLUMNS = (
    "level tokens_sampled tokens_trained groups_drawn groups_kept groups_all_right "
    "groups_all_wrong groups_stale entropy length_mean truncated_share carried_share "
    "clip_low_share clip_high_share reward_variance_within reward_variance_between "
    "sample_seconds learn_seconds"
)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        if subprocess.run(words, env=ALONE, stdout=file, stderr=file).returncode:
            raise SystemExit(f"python {command}\nfailed: see {log}")


def one_run(name, command, seed, result):
    """Train, measure pass@16, and write the result. A run with the very same command that another
    experiment has made is taken over: arms that experiments share are run once."""
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")
    for twin in RESULTS.glob(f"*/*/{seed}.json"):
        if json.loads(twin.read_text())["command"] == command:
            shutil.copy(twin, part)
            part.rename(result)
            return
    out = RUNS / result.relative_to(RESULTS).with_suffix("")
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    out.parent.mkdir(parents=True, exist_ok=True)
    shell(f"{command} --out {out}", log)
    metrics = read_records(out / "metrics.jsonl")
    levels = json.loads((out / "config.json").read_text())["levels"]
    found = {"command": command, "budget": sum(level["tokens"] for level in levels)}
    found["evaluations"] = read_records(out / "eval.jsonl")
    found["updates"] = {key: [row[key] for row in metrics] for key in COLUMNS.split()}
    if name != "rates":
        (checkpoint,) = (out / "checkpoints").iterdir()
        few = arms.FEW.get(name, arms.FEW["levels"])
        shell(f"eval.py --model {checkpoint} {few} --seed {seed} --out {out / 'few'}", log)
        (files,) = json.loads((out / "few/summary.json").read_text())["files"].values()
        found["pass@16"] = files["all"]["pass@16"][0]
    part.write_text(json.dumps(found))
    part.rename(result)
    shutil.rmtree(out)


def missing(name, chosen, seeds):
    """-> the arguments of `one_run` for every run without a result, all arms of one seed first"""
    tasks = []
    for seed in seeds:
        for arm in chosen or arms.EXPERIMENTS[name]:
            result, flags = result_file(name, arm, seed), arms.EXPERIMENTS[name][arm]
            if flags and not result.exists():  # without flags it can be run no more
                if "--lr" not in flags:
                    flags += f" --lr {best_rate(arm):g}"
                command = f"train.py {arms.BASE} {flags} --seed {seed}"
                tasks.append((name, command, seed, result))
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
