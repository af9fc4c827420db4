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
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from arms import BASE, EXPERIMENTS, FEW, RATES, base_commands, prepare, slug  # noqa: E402
from tables import report  # noqa: E402

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shell(command, log):
    """Run a command of this project with one thread; its output goes to a file."""
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)]
        subprocess.run(words, env=ALONE, stdout=file, stderr=file, check=True)


def one_run(name, arm, flags, seed, result):
    """Train, measure pass@16 on few problems, and write the result."""
    out = Path("runs/experiments", name, arm, str(seed))
    log = out.with_suffix(".log")
    if out.exists():  # of a run that was interrupted
        subprocess.run(["rm", "-r", out], check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"train.py {BASE} {flags} --seed {seed}"
    shell(f"{command} --out {out}", log)
    checkpoint = max((out / "checkpoints").iterdir())
    few = f"--data {FEW} --samples 16 --seed {seed} --max-new-tokens 128"
    shell(f"eval.py --model {checkpoint} {few} --out {out / 'few'}", log)
    metrics = read_lines(out / "metrics.jsonl")
    summary = json.loads((out / "few/summary.json").read_text())["files"]
    found = {"command": command, "evaluations": read_lines(out / "eval.jsonl")}
    found["few"] = next(iter(summary.values()))
    names = [key for key in metrics[0] if key.startswith(("groups_", "tokens_sampled"))]
    names += ["tokens_trained", "sample_seconds", "learn_seconds"]
    found["totals"] = {key: sum(row[key] for row in metrics) for key in names}
    columns = ("level", "tokens_sampled", "entropy", "length_mean", "carried_share")
    columns += ("reward_variance_within", "reward_variance_between")
    found["updates"] = {key: [row[key] for row in metrics] for key in columns}
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(result)
    subprocess.run(["rm", "-r", out], check=True)


def rate(name, arm):
    """The learning rate that was chosen for an arm; outside `levels`, that of its first arm."""
    chosen = json.loads((HERE / "results/rates.json").read_text())
    return chosen[arm if name == "levels" else "EPRLI"]


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
    results, tasks = HERE / "results" / args.name, []
    for arm, flags in EXPERIMENTS[args.name].items():
        if args.arms and arm not in args.arms:
            continue
        for seed in range(3) if args.choose else args.seeds:
            for lr in RATES if args.choose else [rate(args.name, arm)]:
                folder = f"choose-{lr:g}/{slug(arm)}" if args.choose else slug(arm)
                result = results / folder / f"{seed}.json"
                if not result.exists():
                    tasks.append((args.name, folder, f"{flags} --lr {lr:g}", seed, result))
    if not args.report:
        tasks.sort(key=lambda task: task[3])  # all arms of one seed first
        with ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(lambda task: one_run(*task), tasks), total=len(tasks), unit="run"))
    report(args.name, args.choose)


if __name__ == "__main__":
    main()
