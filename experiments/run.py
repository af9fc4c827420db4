"""Experiments on the shipped task: arms that differ in flags, paired by seed.

    python experiments/run.py levels --choose             rates of the arms, on seeds 0-2
    python experiments/run.py levels --seeds 10-19        runs what is missing, then the report
    python experiments/run.py levels --report             the table and the picture alone

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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from arms import (  # noqa: E402
    BASE,
    CHOOSING_SEEDS,
    EXPERIMENTS,
    FEW,
    RATES,
    base_commands,
    prepare,
    slug,
)
from tables import report  # noqa: E402

COLUMNS = (
    "level tokens_sampled tokens_trained groups_drawn groups_kept groups_all_right "
    "groups_all_wrong groups_stale entropy length_mean carried_share reward_variance_within "
    "reward_variance_between sample_seconds learn_seconds"
)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        subprocess.run(words, env=ALONE, stdout=file, stderr=file, check=True)


def one_run(folder, flags, seed, passes):
    """Train, and write results/FOLDER/SEED.json; with pass@16 of a few problems, if `passes`.

    A run of another experiment with the very same flags is copied: arms that experiments share.
    """
    out = Path("runs/experiments", folder, str(seed))
    result = HERE / f"results/{folder}/{seed}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")
    command = f"train.py {BASE} {flags} --seed {seed}"
    for twin in (HERE / "results").glob(f"*/*/{seed}.json"):
        if json.loads(twin.read_text())["command"] == command:
            part.write_text(twin.read_text())
            part.rename(result)
            return
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    out.parent.mkdir(parents=True, exist_ok=True)
    shell(f"{command} --out {out}", log)
    metrics = read_lines(out / "metrics.jsonl")
    found = {"command": command, "evaluations": read_lines(out / "eval.jsonl")}
    found["updates"] = {key: [row[key] for row in metrics] for key in COLUMNS.split()}
    if passes:
        checkpoint = max((out / "checkpoints").iterdir())
        few = f"--data {FEW} --samples 16 --seed {seed} --max-new-tokens 128"
        shell(f"eval.py --model {checkpoint} {few} --out {out / 'few'}", log)
        summary = json.loads((out / "few/summary.json").read_text())["files"]
        found["few"] = next(iter(summary.values()))
    part.write_text(json.dumps(found))
    part.rename(result)
    shutil.rmtree(out)


def rate(name, arm):
    """The learning rate that was chosen for an arm; outside `levels`, that of its first arm."""
    try:
        chosen = json.loads((HERE / "results/rates.json").read_text())
        return chosen[arm if name == "levels" else "EPRLI"]
    except (FileNotFoundError, KeyError):
        sys.exit("no learning rate was chosen yet: python experiments/run.py levels --choose")


def parse_seeds(text):
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=parse_seeds, default=range(10, 20))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--choose", action="store_true", help="rates of the arms, on seeds 0-2")
    parser.add_argument("--report", action="store_true", help="no runs: table and picture alone")
    args = parser.parse_args()
    os.chdir(ROOT)
    prepare()
    if args.name == "base" and not args.report:
        for command in base_commands():
            shell(command, "runs/experiments/bases.log")
    tasks = []
    for arm, flags in EXPERIMENTS[args.name].items():
        if args.arms and arm not in args.arms:
            continue
        for seed in range(CHOOSING_SEEDS) if args.choose else args.seeds:
            for lr in RATES if args.choose else [rate(args.name, arm)]:
                folder = f"{args.name}/choose-{lr:g}" if args.choose else args.name
                folder = f"{folder}/{slug(arm)}"
                if not (HERE / f"results/{folder}/{seed}.json").exists():
                    more = f"--lr {lr:g}" + " --eval-every 1000" * args.choose  # the end alone
                    tasks.append((folder, f"{flags} {more}", seed, not args.choose))
    if not args.report:
        tasks.sort(key=lambda task: task[2])  # all arms of one seed first
        with ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(lambda task: one_run(*task), tasks), total=len(tasks), unit="run"))
    report(args.name, args.choose)


if __name__ == "__main__":
    main()
