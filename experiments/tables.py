"""From the results of an experiment to its measures and tables.

    python -m experiments.tables tasks

Arms are paired by seed, and intervals are of 95 % over seeds. Level 2 stands for the last one: the
hard problems.
"""

import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

FIRST_GROUPS = 64
BUDGETS = 200, 400, 800  # thousands of sampled tokens
RESULTS = Path(__file__).resolve().parent / "results"
# Task or base, measure, arm, other arm
FINDINGS = (
    ("depth", "level 2 at 200", "levels", "mix"),
    ("depth", "level 2 at 800", "levels", "mix"),
    ("depth", "level 2 at 800", "hard only", "mix"),
    ("skill", "level 2 at 400", "hard only", "mix"),
    ("skill", "level 2 at 400", "short with", "short without"),
    ("depth 5 %", "level 2 at 400", "levels, all", "mix, best"),
)
COLUMNS = {  # measure: its decimals
    "accuracy": 1,  # held out, all levels, %
    "level 1": 1,  # held out, %
    "level 2": 1,
    "area": 1,  # mean accuracy over the sampled tokens, %
    "area 2": 1,  # the same of level 2
    **{f"level 2 at {budget}": 1 for budget in BUDGETS},
    **{f"all at {budget}": 1 for budget in BUDGETS},
    "chosen by": 1,  # mean of level 2 at these
    "greedy 1": 1,  # level 1, without sampling, %
    "greedy 2": 1,
    "to 50 %": 0,  # sampled tokens until level 2 is at 50 %, thousands
    "length 2": 1,  # of completions of level 2 at the end, tokens
    "updates": 1,  # that trained
    "trained": 0,  # tokens trained on, thousands
    "at first": 1,  # w, %: all wrong, of the not all right ones of the first 64 groups or more
}


def curve(run, level):
    """Accuracy, %, at every hundredth of the budget of sampled tokens, both ends included. Between
    two evaluations it is interpolated. Level 0: all problems. -> tokens, accuracies"""
    tokens, right, n = Counter(), Counter(), Counter()
    for row in run["evaluations"]:
        if level in (0, row["level"]):
            update = row["update"]
            tokens[update] = row["tokens_sampled"]
            right[update] += row["accuracy"] * row["n"]
            n[update] += row["n"]
    grid = np.linspace(0, run["budget"], 101)
    accuracy = [100 * right[update] / n[update] for update in tokens]  # they are in order
    return grid, np.interp(grid, list(tokens.values()), accuracy)


def measure(run):
    """-> {measure: value} of one run, at the budget of sampled tokens"""
    hard = max(row["level"] for row in run["evaluations"])
    (grid, both), (_, level_1), (_, level_2) = (curve(run, level) for level in (0, 1, hard))
    half = grid[level_2 >= 50]
    greedy = 100 * np.array(run.get("greedy", [np.nan] * 2))
    lengths = [row["length_mean"] for row in run["evaluations"] if row["level"] == hard]
    updates = run["updates"]
    drawn, right, wrong = (updates[f"groups_{s}"] for s in ("drawn", "all_right", "all_wrong"))
    first = 1 + np.searchsorted(np.cumsum(drawn), FIRST_GROUPS)
    at_budgets = {}
    for name, accuracies in (("level 2", level_2), ("all", both)):
        for budget in BUDGETS:
            reached = 1000 * budget <= grid[-1]
            value = np.interp(1000 * budget, grid, accuracies) if reached else np.nan
            at_budgets[f"{name} at {budget}"] = value
    return at_budgets | {
        "chosen by": np.mean([at_budgets[f"level 2 at {budget}"] for budget in BUDGETS]),
        "accuracy": both[-1],
        "level 1": level_1[-1],
        "level 2": level_2[-1],
        "area": both.mean(),
        "area 2": level_2.mean(),
        "greedy 1": greedy[0],
        "greedy 2": greedy[-1],
        "to 50 %": half[0] / 1000 if len(half) else np.nan,
        "ratio": np.log(half[0] if len(half) else run["budget"]),
        "length 2": lengths[-1],
        "updates": sum(groups > 0 for groups in updates["groups_kept"]),
        "trained": sum(updates.get("tokens_trained", [np.nan])) / 1000,
        "at first": 100 * sum(wrong[:first]) / (sum(drawn[:first]) - sum(right[:first])),
    }


def read_runs(name):
    """-> the runs of an experiment that are there. Twelve that are finished share earlier.jsonl,
    whose lines name their experiment."""
    path = RESULTS / f"{name}.jsonl"
    path = path if path.exists() else RESULTS / "earlier.jsonl"
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        sys.exit(f"{path}: a kill has torn its last line; delete that line")
    runs = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            sys.exit(f"{path}:{number}: not a line of JSON")
    return [run for run in runs if run.get("experiment", name) == name]


def measures(name):
    """Measures of an experiment. Only those seeds of a base count that all its arms have.

    -> {base: {arm: {seed: {measure: value}}}}; the base is what stands before a colon
    """
    found = {}
    for run in read_runs(name):
        base, _, arm = run["arm"].rpartition(": ")
        found.setdefault(base, {}).setdefault(arm, {})[run["seed"]] = measure(run)
    for arms in found.values():
        whole = sorted(set.intersection(*map(set, arms.values())))
        for arm, by_seed in arms.items():
            arms[arm] = {seed: by_seed[seed] for seed in whole}
    return found


def interval(values):
    """Mean and half of the t-interval; of a single value: nan"""
    if len(values) < 2:
        return np.mean(values), np.nan
    return np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def difference(arm, other, name):
    """Of a measure, paired by seed -> mean, half of its interval"""
    return interval([m[name] - other[seed][name] for seed, m in arm.items()])


def cell(values, decimals):
    """Mean and half of its interval, over the seeds that have the measure"""
    there = [value for value in values if not np.isnan(value)]
    if not there:
        return "-"
    mean, half = interval(there)
    text = f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def compared(arm, other, name):
    """The difference of two arms as text; bold: without 0. Of the tokens until level 2 is at 50 %
    the ratio; bold: without 1. Where that is never, the budget stands for it."""
    mean, half = difference(arm, other, name)
    if np.isnan(mean):
        return "-"
    text = f"{mean:+.1f} ± {half:.1f}"
    if name == "ratio":
        text = "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp([mean, mean - half, mean + half]))
    return f"**{text}**" if abs(mean) > half else text


def tables(found):
    """Lines of markdown: each arm, then each pair of arms of one base"""
    yield f"| base | arm | seeds | {' | '.join(COLUMNS)} |"
    yield "| --- " * (len(COLUMNS) + 3) + "|"
    for base, arms in found.items():
        for arm, by_seed in arms.items():
            cells = [base, arm, str(len(by_seed))]
            for name, decimals in COLUMNS.items():
                cells.append(cell([m[name] for m in by_seed.values()], decimals))
            yield f"| {' | '.join(cells)} |"
    names = [*COLUMNS, "ratio"]
    names.remove("to 50 %")
    yield f"\n| base | difference | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 2) + "|"
    for base, arms in found.items():
        for other, arm in combinations(arms, 2):
            cells = [compared(arms[arm], arms[other], name) for name in names]
            yield f"| {base} | {arm}, less {other} | {' | '.join(cells)} |"


def findings(found):
    """Lines of markdown: the comparisons of FINDINGS. A seed is one number, the mean over the bases
    of a task; p values are Holm's."""
    rows = []
    for task, measure_of, arm, other in FINDINGS:
        bases = [arms for base, arms in found.items() if base.startswith(task)]
        by_seed = [
            np.mean([arms[arm][seed][measure_of] - arms[other][seed][measure_of] for arms in bases])
            for seed in set.intersection(*(set(arms[arm]) for arms in bases))
        ]
        name = f"{task}: {arm} less {other}, {measure_of}"
        rows.append((stats.ttest_1samp(by_seed, 0).pvalue, name, *interval(by_seed)))
    yield "\n| comparison | points | p | p by Holm |\n| --- | --- | --- | --- |"
    corrected = 0
    for number, (p, name, mean, half) in enumerate(sorted(rows)):
        corrected = min(1, max(corrected, p * (len(rows) - number)))
        yield f"| {name} | {mean:+.1f} ± {half:.1f} | {p:.4f} | {corrected:.4f} |"


def gains(runs):
    """Lines of markdown: the points that each level gains on its own held-out problems while it is
    trained, a run each"""
    yield "\n| arm | seed | points, level by level |\n| --- | --- | --- |"
    for run in runs:
        accuracy = {(row["update"], row["level"]): row["accuracy"] for row in run["evaluations"]}
        trained = run["updates"]["level"]
        points = []
        for level in sorted(set(trained)):
            before = trained.index(level)
            after = before + trained.count(level)
            gain = accuracy[after, level] - accuracy[before, level]
            points.append(f"{level}: {100 * gain:+.1f}")
        yield f"| {run['arm']} | {run['seed']} | {', '.join(points)} |"


def report(name):
    """Print the tables of an experiment."""
    found = measures(name)
    if not any(arm for arms in found.values() for arm in arms.values()):
        sys.exit(f"{RESULTS}: no whole seed of the experiment {name}")
    print(*tables(found), sep="\n")
    if name == "default":
        print(*gains(read_runs(name)), sep="\n")
    if name == "tasks":
        print(*findings(found), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m experiments.tables NAME, as in experiments/results/NAME.jsonl")
    report(sys.argv[1])
