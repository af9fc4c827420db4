"""What the default run shows, over seeds: held-out accuracy of every level before and after, with t-intervals.

    python bench/seeds.py --seeds 5 --jobs 2 --runs runs/seeds        writes bench/SEEDS.md

Each run is evaluated afresh: 16 samples a problem at temperature 1, and greedily, on the shipped held-out problems,
with random streams that neither training nor the measurement of difficulty used.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from eval import MAX_NEW_TOKENS, SHIPPED, SLOTS, Policy, attempt, evaluation_keys, pass_at_k  # noqa: E402
from rewards import Grader, writes_steps  # noqa: E402

T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # by number of seeds
SAMPLES = 16


def t_interval(values):
    """Mean and half width of the 95 % t-interval."""
    return np.mean(values), T_975[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values))


def held_out_levels():
    return data.cut_levels(
        data.read_problems(SHIPPED / "heldout.jsonl"), data.QUALITY, "pass_rate"
    )[0]


def one_seed(seed, folder, threads):
    """Train with one seed and measure: [{"before": accuracies, "after": ...} per level]. What is done is not done again."""
    if (folder / "measured.json").exists():
        return json.loads((folder / "measured.json").read_text())
    if not (folder / "report.png").exists():  # the last thing that a run writes
        command = [sys.executable, ROOT / "train.py", "--seed", str(seed), "--out", str(folder)]
        with open(f"{folder}.log", "w") as log:
            subprocess.run(
                command,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
            )
    torch.set_num_threads(threads)
    end = sorted((folder / "checkpoints").iterdir())[-1]
    measured = [
        {"before": measure(SHIPPED / "tiny", p, seed), "after": measure(end, p, seed)}
        for p in held_out_levels()
    ]
    (folder / "measured.json").write_text(json.dumps(measured))
    return measured


def measure(model, problems, seed):
    """Accuracies of one model on the problems of one level."""
    policy, grader = Policy.load(model), Grader()
    prompts = policy.render(problems)
    common = {"max_new_tokens": MAX_NEW_TOKENS, "slots": SLOTS}
    sampled = attempt(
        policy,
        grader,
        prompts,
        evaluation_keys(10_000 + seed, prompts, SAMPLES),
        temperature=1.0,
        **common,
    )
    greedy = attempt(
        policy, grader, prompts, evaluation_keys(0, prompts, 1), temperature=0.0, **common
    )
    worked = np.array([[writes_steps(a.text) for a in group] for group in sampled])
    right = np.array([[a.right for a in group] for group in sampled])
    return {
        "sampled": float(right.mean()),
        "greedy": float(np.mean([group[0].right for group in greedy])),
        f"pass@{SAMPLES}": float(
            np.mean([pass_at_k(SAMPLES, int(c), SAMPLES) for c in right.sum(1)])
        ),
        "write steps": float(worked.mean()),
        "right, if steps": float(right[worked].mean()),
        "right, if bare": float(right[~worked].mean()) if not worked.all() else None,
    }


def meanwhile(folder, number, other):
    """Held-out accuracy of level `other` in the run's own log (one sample a problem): when training of level `number` begins,
    and when it ends."""
    rows, updates = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("eval.jsonl", "metrics.jsonl")
    )
    found = {row["update"]: row["accuracy"] for row in rows if row["level"] == other}
    return [
        found[max((u["update"] for u in updates if u["level"] <= level), default=0)]
        for level in (number - 1, number)
    ]


def main():
    parser = argparse.ArgumentParser(
        description="Train the default with several seeds and tabulate what it gains."
    )
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T_975))
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time; more than one: one thread each"
    )
    parser.add_argument(
        "--runs",
        default="runs/seeds",
        help="folder of the run directories; finished ones in it are used as they are",
    )
    args = parser.parse_args()
    folders = [Path(args.runs) / f"seed-{seed}" for seed in range(args.seeds)]
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        seeds = list(
            pool.map(one_seed, range(args.seeds), folders, [1 if args.jobs > 1 else 2] * args.seeds)
        )

    sizes = " and ".join(
        f"{len(level)} problems of level {number}"
        for number, level in enumerate(held_out_levels(), 1)
    )
    lines = [
        "# The default run over seeds",
        "",
        f"`python bench/seeds.py --seeds {args.seeds}`",
        "",
        f"Held out: {sizes}; {SAMPLES} samples a problem at temperature 1, and greedy. Percent; before and after are means over seeds, "
        "the gain has its 95 % t-interval.",
        "",
    ]
    for number in range(len(seeds[0])):
        rows = [seed[number] for seed in seeds]
        lines += [
            f"## Level {number + 1}",
            "",
            "| | before | after | gain | after, by seed |",
            "| --- | --- | --- | --- | --- |",
        ]
        for key in rows[0]["before"]:
            before, after = ([row[when][key] for row in rows] for when in ("before", "after"))
            if None in before + after:  # a policy that never answers bare
                continue
            gain, half = t_interval(100 * np.subtract(after, before))
            by_seed = " ".join(f"{100 * a:.1f}" for a in after)
            lines.append(
                f"| {key} | {100 * np.mean(before):.1f} | {100 * np.mean(after):.1f} | {gain:+.1f} ± {half:.1f} | {by_seed} |"
            )
        total = np.mean(
            [100 * (row["after"]["sampled"] - row["before"]["sampled"]) for row in rows]
        )
        choosing = np.mean(
            [
                100
                * (row["after"]["write steps"] - row["before"]["write steps"])
                * (row["before"]["right, if steps"] - row["before"]["right, if bare"])
                for row in rows
            ]
        )
        lines += [
            "",
            f"Of the {total:.1f} points gained in sampled accuracy, {choosing:.1f} are what writing steps more often would give at the "
            f"accuracies of the start; the remaining {total - choosing:+.1f} are steps that became better or worse.",
            "",
        ]
    lines += [
        "## While a level is trained",
        "",
        "Held out, one sample a problem.",
        "",
        "| trained | of level | at its start | at its end | gain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number in range(1, len(seeds[0]) + 1):
        for other in range(1, len(seeds[0]) + 1):
            start, end = 100 * np.transpose(
                [meanwhile(folder, number, other) for folder in folders]
            )
            gain, half = t_interval(end - start)
            lines.append(
                f"| {number} | {other} | {start.mean():.1f} | {end.mean():.1f} | {gain:+.1f} ± {half:.1f} |"
            )
    lines.append("")
    (ROOT / "bench" / "SEEDS.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
