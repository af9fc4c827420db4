"""What the default run shows, over seeds: held-out accuracy of every level before and after, with t-intervals.

    python bench/seeds.py --seeds 5 --jobs 2 --runs runs/seeds        writes bench/SEEDS.md

Each run is evaluated afresh: 16 samples a problem at temperature 1, and greedily, on the shipped held-out problems,
with random streams that neither training nor the measurement of difficulty used.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from eval import SHIPPED, Policy, attempt, evaluation_keys, pass_at_k  # noqa: E402
from rewards import Grader, writes_steps  # noqa: E402
from train import DEFAULT_QUALITY, Config  # noqa: E402

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by number of seeds
SAMPLES = 16


def t_interval(values):
    """Mean and half width of the 95 % t-interval."""
    return np.mean(values), T_975[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values))


def train(seed, folder, threads):
    if (folder / "config.json").exists():
        planned = sum(level["updates"] for level in json.loads((folder / "config.json").read_text())["levels"])
        if (folder / "report.png").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == planned:
            return
        sys.exit(f"{folder} holds an unfinished run: remove it first")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, ROOT / "train.py", "--seed", str(seed), "--out", str(folder)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def measure(model, problems, seed, max_new_tokens):
    """Accuracies of one model on one level."""
    policy, grader = Policy.load(model), Grader()
    prompts = policy.render(problems)
    common = dict(max_new_tokens=max_new_tokens, slots=256)
    sampled = attempt(policy, grader, prompts, evaluation_keys(10_000 + seed, prompts, SAMPLES), temperature=1.0, **common)
    greedy = attempt(policy, grader, prompts, evaluation_keys(0, prompts, 1), temperature=0.0, **common)
    worked = np.array([[writes_steps(a.text) for a in group] for group in sampled])
    right = np.array([[a.right for a in group] for group in sampled])
    return {
        "sampled": right.mean(),
        "greedy": np.mean([group[0].right for group in greedy]),
        f"pass@{SAMPLES}": np.mean([pass_at_k(SAMPLES, int(c), SAMPLES) for c in right.sum(1)]),
        "write steps": worked.mean(),
        "right if steps": right[worked].mean() if worked.any() else math.nan,
        "right if bare": right[~worked].mean() if (~worked).any() else math.nan,
    }


def main():
    parser = argparse.ArgumentParser(description="Train the default with several seeds and tabulate what it gains.")
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_975))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one: one thread each")
    parser.add_argument("--runs", default="runs/seeds", help="folder of the run directories; finished runs in it are used as they are")
    args = parser.parse_args()
    folders = [Path(args.runs) / f"seed-{seed}" for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job, 1 if args.jobs > 1 else 2), enumerate(folders)))

    held_out = data.read_problems(SHIPPED / "heldout.jsonl")
    levels, _ = data.cut_levels(held_out, DEFAULT_QUALITY, "pass_rate")
    length = Config().max_new_tokens[0]
    lines = ["# The default run over seeds", "", f"`python bench/seeds.py --seeds {args.seeds}`: {SAMPLES} samples a problem at temperature 1, and greedy, on "
             f"{' and '.join(f'{len(level)} problems of level {n}' for n, level in enumerate(levels, 1))}. Percent; mean over seeds, and 95 % t-interval of the gain.", ""]
    for number, problems in enumerate(levels, 1):
        before = [measure(SHIPPED / "tiny", problems, seed, length) for seed in range(args.seeds)]
        after = [measure(sorted((folder / "checkpoints").iterdir())[-1], problems, seed, length) for seed, folder in enumerate(folders)]
        lines += [f"## Level {number}", "", "| | before | after | gain | by seed |", "| --- | --- | --- | --- | --- |"]
        for key in before[0]:
            b, a = ([100 * row[key] for row in rows] for rows in (before, after))
            gain, half = t_interval(np.subtract(a, b))
            lines.append(f"| {key} | {np.mean(b):.1f} | {np.mean(a):.1f} | {gain:+.1f} ± {half:.1f} | {' '.join(f'{x:.1f}' for x in a)} |")
        choosing = [100 * (a["write steps"] - b["write steps"]) * (b["right if steps"] - b["right if bare"]) for b, a in zip(before, after)]
        total = [100 * (a["sampled"] - b["sampled"]) for b, a in zip(before, after)]
        lines += ["", f"Of the gain of {np.mean(total):.1f} points in sampled accuracy, {np.mean(choosing):.1f} come from writing steps more often "
                  "(at the accuracies of the start), the rest from better steps.", ""]
    seconds = [sum(json.loads(line)[key] for line in (folder / "metrics.jsonl").open() for key in ("sample_seconds", "grade_seconds", "learn_seconds")) for folder in folders]
    lines.append(f"Seconds of sampling, grading and learning a run: {np.median(seconds):.0f} (median{', one thread each' if args.jobs > 1 else ''}).")
    (ROOT / "bench" / "SEEDS.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
