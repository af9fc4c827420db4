"""What the default run gains, over seeds, with 95 % t-intervals; beside it, runs with other flags.

    for i in 0 1 2 3 4; do
        python train.py --seed $i --out runs/seeds/default/$i
        python train.py --seed $i --length-weight 0 --out runs/seeds/K=0/$i
        python train.py --seed $i --tokens 0 1000000 --out "runs/seeds/level 2 alone/$i"
    done
    python bench/seeds.py --runs runs/seeds        writes bench/SEEDS.md

Models are evaluated afresh: 16 samples a problem at temperature 1, and greedily, on the shipped
held-out problems, with random streams that neither training nor the measurement of difficulty used.
"""

import functools
from itertools import pairwise
from pathlib import Path

import common
import numpy as np
from scipy import stats

import data
from parts.files import read_records
from parts.policy import MAX_NEW_TOKENS, SHIPPED, SLOTS, Policy, Sampling, attempt, requests
from rewards import Grader, writes_steps

SAMPLES = 16
HEAD = """\
# The default run over seeds

`python bench/seeds.py`. Held out, 16 samples a problem at temperature 1, and greedy. "While a level
is trained": one sample a problem, before and after the level's own updates. Means over seeds, and
the gain with its 95 % t-interval. Per cent, but for lengths (tokens), entropy (nats per token, mean
of a run's first and last five updates) and sampled tokens (thousands, of each level).
"""


@functools.cache
def measure(model):
    """{name: value} of one model"""
    found, policy, grader = {}, Policy.load(str(model)), Grader()
    problems = data.read_problems(SHIPPED / "heldout.jsonl")
    levels = data.cut_levels(problems, data.QUALITY, "pass_rate")[0]
    for number, some in enumerate(levels, 1):
        prompts = policy.render(some)
        work = requests(10_000, prompts, SAMPLES)
        sampled = attempt(policy, grader, work, Sampling(MAX_NEW_TOKENS, 1.0, SLOTS))
        work = requests(0, prompts, 1)
        greedy = attempt(policy, grader, work, Sampling(MAX_NEW_TOKENS, 0.0, SLOTS))
        right = np.array([[a.right for a in group] for group in sampled])
        found |= {
            f"level {number}: sampled": 100 * right.mean(),
            f"level {number}: greedy": 100 * np.mean([a.right for (a,) in greedy]),
            f"level {number}: pass@16": 100 * right.any(1).mean(),
            f"level {number}: length": np.mean([a.length for group in sampled for a in group]),
            f"level {number}: write steps": 100
            * np.mean([writes_steps(a.text) for group in sampled for a in group]),
        }
    grader.close()
    return found


def one_run(folder):
    """-> {name: (before, after)}"""
    before, after = measure(SHIPPED / "tiny"), measure(max((folder / "checkpoints").iterdir()))
    found = {name: (before[name], after[name]) for name in before}
    log = read_records(folder / "eval.jsonl")
    metrics = read_records(folder / "metrics.jsonl")
    levels = list(dict.fromkeys(row["level"] for row in metrics))
    for number in (1, 2):
        accuracies = [100 * row["accuracy"] for row in log if row["level"] == number]
        for trained, pair in zip(levels, pairwise(accuracies)):
            found[f"level {number}, while level {trained} is trained"] = pair
    entropy = [row["entropy"] for row in metrics if row["entropy"] is not None]
    found["entropy"] = np.mean(entropy[:5]), np.mean(entropy[-5:])
    tokens = [
        sum(row["tokens_sampled"] for row in metrics if row["level"] == number) / 1000
        for number in (1, 2)
    ]
    found["sampled tokens, level 1 and level 2"] = tuple(tokens)
    return found


def table(runs):
    lines = ["| | before | after | gain | after, by seed |", "| --- | --- | --- | --- | --- |"]
    for name in runs[0]:
        before, after = np.array([run[name] for run in runs]).T
        gain = after - before
        half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
        digits = 3 if name == "entropy" else 1
        cells = [f"{before.mean():.{digits}f}", f"{after.mean():.{digits}f}"]
        cells.append(f"{gain.mean():+.{digits}f} ± {half:.{digits}f}")
        cells.append(" ".join(f"{value:.{digits}f}" for value in after))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main():
    args = common.parse(__doc__, runs="runs/seeds")
    text = HEAD
    for folder in sorted(Path(args.runs).iterdir(), key=lambda f: (f.name != "default", f.name)):
        runs = [one_run(run) for run in sorted(folder.iterdir())]
        text += "\n".join(["", f"## {folder.name}", "", *table(runs), ""])
        print(f"{folder.name}: {len(runs)} runs")
    (common.ROOT / "bench/SEEDS.md").write_text(text)


if __name__ == "__main__":
    main()
