"""What the default run gains, over seeds: held-out accuracy before and after, with t-intervals.

    for i in 0 1 2 3 4; do python train.py --seed $i --out runs/seeds/$i; done
    python bench/seeds.py --runs runs/seeds        writes bench/SEEDS.md

Models are evaluated afresh: 16 samples a problem at temperature 1, and greedily, on the shipped
held-out problems, with random streams that neither training nor the measurement of difficulty used.
"""

from itertools import pairwise
from pathlib import Path

import common
import numpy as np
from scipy import stats

import data
from eval import MAX_NEW_TOKENS, SHIPPED, SLOTS, Policy, Sampling, attempt, evaluation_keys
from rewards import Grader, writes_steps

SAMPLES = 16
HEAD = """\
# The default run over seeds

`python bench/seeds.py`. Held out, 16 samples a problem at temperature 1, and greedy; while a level
is trained, one sample a problem. Percent: means over seeds, and the gain with its 95 % t-interval.
The last row of a level says what writing steps more often would give at the accuracies of the
start.

| | before | after | gain | after, by seed |
| --- | --- | --- | --- | --- |
"""


def measure(model, problems, seed):
    """{name: share} of one model on the problems of one level"""
    policy, grader = Policy.load(str(model)), Grader()
    prompts = policy.render(problems)
    keys = evaluation_keys(10_000 + seed, prompts, SAMPLES)
    sampled = attempt(policy, grader, prompts, keys, Sampling(MAX_NEW_TOKENS, 1.0, SLOTS))
    keys = evaluation_keys(0, prompts, 1)
    greedy = attempt(policy, grader, prompts, keys, Sampling(MAX_NEW_TOKENS, 0.0, SLOTS))
    right = np.array([[a.right for a in group] for group in sampled])
    steps = np.array([[writes_steps(a.text) for a in group] for group in sampled])
    return {
        "sampled": right.mean(),
        "greedy": np.mean([a.right for (a,) in greedy]),
        "pass@16": right.any(1).mean(),
        "write steps": steps.mean(),
        "right, if steps": right[steps].mean(),
        "right, if bare": right[~steps].mean(),
    }


def one_run(folder):
    """-> {name: (before, after)}"""
    seed = int(folder.name)
    problems = data.read_problems(SHIPPED / "heldout.jsonl")
    levels = data.cut_levels(problems, data.QUALITY, "pass_rate")[0]
    log = data.read_records(folder / "eval.jsonl", lambda row, _: row)
    found = {}
    for number, problems in enumerate(levels, 1):
        before = measure(SHIPPED / "tiny", problems, seed)
        after = measure(max((folder / "checkpoints").iterdir()), problems, seed)
        name = f"level {number}"
        for key in before:
            found[f"{name}: {key}"] = before[key], after[key]
        choice = after["write steps"] - before["write steps"]
        choice *= before["right, if steps"] - before["right, if bare"]
        found[f"{name}: by writing steps"] = before["sampled"], before["sampled"] + choice
        accuracies = [row["accuracy"] for row in log if row["level"] == number]
        for trained, pair in enumerate(pairwise(accuracies), 1):
            found[f"{name}, while level {trained} is trained"] = pair
    return found


def main():
    args = common.parse(__doc__, runs="runs/seeds")
    runs = [one_run(folder) for folder in sorted(Path(args.runs).iterdir())]
    text = HEAD
    for name in runs[0]:
        before, after = 100 * np.array([run[name] for run in runs]).T
        gain = after - before
        half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
        means = f"{before.mean():.1f} | {after.mean():.1f} | {gain.mean():+.1f} ± {half:.1f}"
        text += f"| {name} | {means} | {' '.join(f'{share:.1f}' for share in after)} |\n"
    (common.ROOT / "bench/SEEDS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
