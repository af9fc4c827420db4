"""From the results of an experiment to its measures, table, picture and verdict."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from arms import EXPERIMENTS, rates
from matplotlib.figure import Figure
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"
OUTCOME = {  # the columns of the first table: decimals, what it is, its unit
    "accuracy": (1, "held out, all levels, %"),
    "level 1": (1, "held out, %"),
    "level 2": (1, "held out, %"),
    "area": (1, "mean accuracy over the sampled tokens, %"),
    "to 50 %": (0, "sampled tokens until level 2 is at 50 %, thousands; -: it never is"),
    "forgotten": (1, "level 1, from its best to its end, points"),
    "pass@16": (1, "level 2, 64 problems, %"),
}
COURSE = {  # of the second
    "updates": (1, "updates that trained"),
    "length 1": (1, "completions of level 1 at the end, tokens"),
    "length 2": (1, "completions of level 2 at the end, tokens"),
    "drawn": (2, "groups drawn for one that was trained on"),
    "all right": (1, "of the groups drawn, %: dropped"),
    "all wrong": (1, "of the groups drawn, %: dropped"),
    "carried": (1, "of the groups trained on, %: sampled by the update before"),
    "clipped": (2, "of the tokens trained on, %: without gradient; -: not kept"),
    "entropy": (3, "last five updates, nats a token"),
    "within": (3, "variance of reward within groups drawn, mean over updates"),
    "between": (3, "variance of a group's mean reward between groups, mean over updates"),
}
COMPARED = ("accuracy", "level 1", "level 2", "area", "pass@16", "length 2")
FRESH = range(20, 30)  # seeds that check what is reported; those from 30 on are reported too


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


def average(values, last=0):
    """Over updates, or the last of them; None: the update drew nothing, or was skipped."""
    return np.mean([x for x in values if x is not None][-last:])


def measure(run):
    """-> {measure: value} of one run, at the budget of sampled tokens"""
    (grid, both), (_, level_1), (_, level_2) = (curve(run, level) for level in (0, 1, 2))
    reached = grid[level_2 >= 50]
    length = {row["level"]: row["length_mean"] for row in run["evaluations"]}  # the last of each
    updates = run["updates"]
    kept = updates["groups_kept"]
    drawn = sum(updates["groups_drawn"])
    clipped = 0
    for key in ("clip_low_share", "clip_high_share"):
        clipped += average(updates.get(key, [np.nan]))
    return {
        "accuracy": both[-1],
        "level 1": level_1[-1],
        "level 2": level_2[-1],
        "area": both.mean(),
        "to 50 %": reached[0] / 1000 if len(reached) else np.nan,
        "forgotten": level_1.max() - level_1[-1],
        "pass@16": 100 * run.get("pass@16", np.nan),
        "length 1": length[1],
        "length 2": length[2],
        "updates": sum(groups > 0 for groups in kept),
        "drawn": drawn / sum(kept),
        "all right": 100 * sum(updates["groups_all_right"]) / drawn,
        "all wrong": 100 * sum(updates["groups_all_wrong"]) / drawn,
        "carried": 100 * average(updates["carried_share"]),
        "clipped": 100 * clipped,
        "entropy": average(updates["entropy"], last=5),
        "within": average(updates["reward_variance_within"]),
        "between": average(updates["reward_variance_between"]),
    }


def read_runs(name):
    """-> the runs of an experiment that are there, one of each line of its file"""
    path = RESULTS / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        sys.exit(f"{path}: a kill has torn its last line; delete that line")
    return [json.loads(line) for line in text.splitlines()]


def read(name, arm, fresh=False):
    """-> {seed: run} of an arm: those that are reported, or the fresh ones"""
    runs = [run for run in read_runs(name) if run["arm"] == arm]
    found = {run["seed"]: run for run in runs if (run["seed"] in FRESH) == fresh}
    return dict(sorted(found.items()))


def measures(name, arm, fresh=False):
    """-> {seed: {measure: value}}"""
    return {seed: measure(run) for seed, run in read(name, arm, fresh).items()}


def one_per_level(measured):
    """Of `sharing`: each level's accuracy is that of the policy trained on this level alone.

    measured  see `table`  -> {seed: {measure: value}} of the seeds that both policies have
    """
    easy, hard = measured.get("easy alone", {}), measured.get("hard alone", {})
    joined = {}
    for seed, run in read("sharing", "easy alone").items():
        if seed not in hard:
            continue
        sizes = {row["level"]: row["n"] for row in run["evaluations"]}
        own = {"level 1": easy[seed]["level 1"], "level 2": hard[seed]["level 2"]}
        own["accuracy"] = np.average(list(own.values()), weights=[sizes[1], sizes[2]])
        joined[seed] = dict.fromkeys((*OUTCOME, *COURSE), np.nan) | own
    return joined


def best_rate(arm):
    """The learning rate of an arm of `levels`, by mean accuracy over its choosing seeds. Other
    arms, "BASE: ARM" and "ARM, VARIANT", take that of ARM, or else of EPRLI."""
    arm = arm.rpartition(": ")[2].partition(", ")[0]
    if arm not in EXPERIMENTS["levels"]:
        arm = "EPRLI"
    means = {}
    for lr in rates(arm):
        by_seed = measures("rates", f"{arm}, {lr:g}")
        if len(by_seed) < 3:
            sys.exit(f"{arm}: first choose its rate, python experiments/run.py rates --seeds 0-2")
        means[lr] = np.mean([m["accuracy"] for m in by_seed.values()])
    return max(means, key=means.get)


def interval(values):
    """Mean and half of the 95 % t-interval; of a single value: nan"""
    if len(values) < 2:
        return np.mean(values), np.nan
    return np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def cell(values, decimals):
    """Mean and half of its interval, over the seeds that have the measure."""
    there = [value for value in values if not np.isnan(value)]
    if not there:
        return "-"
    mean, half = interval(there)
    text = f"{mean:.{decimals}f}"
    if not np.isnan(half):
        text += f" ± {half:.{decimals}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def table(measured, columns):
    """measured  {arm: {seed: {measure: value}}} -> lines of markdown, a line for each arm"""
    yield f"| arm | seeds | {' | '.join(columns)} |"
    yield "| --- " * (len(columns) + 2) + "|"
    for arm, by_seed in measured.items():
        cells = [arm, str(len(by_seed))]
        for name, (decimals, _) in columns.items():
            cells.append(cell([m[name] for m in by_seed.values()], decimals))
        yield f"| {' | '.join(cells)} |"
    yield ""
    for name, (_, meaning) in columns.items():
        yield f"- {name}: {meaning}"
    yield ""


def difference(by_seed, reference, name="accuracy"):
    """Paired by seed -> mean, half of its 95 % interval"""
    seeds = by_seed.keys() & reference.keys()
    if not seeds:
        return np.nan, np.nan
    return interval([by_seed[s][name] - reference[s][name] for s in seeds])


def compare(measured):
    """Paired differences and the verdict on accuracy, beside the first arm; in `base` beside the
    first arm with the same base."""
    yield f"| difference | {' | '.join(COMPARED)} |"
    yield "| --- " * (len(COMPARED) + 1) + "|"
    firsts, told = {}, {"better": [], "worse": [], "not told apart": []}
    for arm, by_seed in measured.items():
        first = firsts.setdefault(arm.rpartition(": ")[0], arm)
        if arm == first:
            continue
        found = [difference(by_seed, measured[first], name) for name in COMPARED]
        cells = [f"{mean:+.1f} ± {half:.1f}" for mean, half in found]
        cells = [text.replace(" ± nan", "").replace("+nan", "-") for text in cells]
        yield f"| {arm}, less {first} | {' | '.join(cells)} |"
        mean, half = found[0]
        word = "not told apart" if not abs(mean) > half else "better" if mean > 0 else "worse"
        told[word].append(f"{arm} ({cells[0]})")
    yield f"\nIn {COMPARED[0]}, beside {', '.join(firsts.values())}:\n"
    for word, arms in told.items():
        yield f"- {word}: {', '.join(arms) or 'none'}"


def draw(name):
    """Accuracy over sampled tokens, means over seeds; a point is the end of a seed."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for ax, level in zip(figure.subplots(1, 3), (0, 1, 2)):
        ax.set_title(f"level {level}" if level else "all held-out problems", loc="left")
        for i, arm in enumerate(EXPERIMENTS[name]):
            found = [curve(run, level) for run in read(name, arm).values()]
            if not found:
                continue
            grids, curves = zip(*found)
            grid, color = grids[0] / 1000, f"C{i % 10}"
            ax.plot(grid, np.mean(curves, 0), color=color, label=arm)
            ends = [values[-1] for values in curves]
            ax.plot([grid[-1] * (1 + 0.012 * i)] * len(ends), ends, ".", color=color, alpha=0.6)
        ax.set(xlabel="sampled tokens, thousands", ylabel="accuracy, %")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    figure.savefig(RESULTS / f"{name}.png", dpi=100)


def report(name):
    """Write the table, verdict and picture of an experiment, as far as its runs are there."""
    measured = {}
    for arm in EXPERIMENTS[name]:
        if by_seed := measures(name, arm):
            measured[arm] = by_seed
    if not measured:
        sys.exit(f"{name}: there is no result yet")
    if joined := one_per_level(measured):
        measured["one per level"] = joined
    lines = [*table(measured, OUTCOME), *table(measured, COURSE)]
    if name != "rates":
        lines += compare(measured)
        draw(name)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def agreement(name):
    """Is the mean over fresh seeds in the 95 % prediction interval that the reported ones give?"""
    for arm in EXPERIMENTS[name]:
        both = measures(name, arm), measures(name, arm, fresh=True)
        reported, fresh = ([m["accuracy"] for m in some.values()] for some in both)
        if reported and fresh:
            mean, half = interval(reported)
            half *= np.sqrt(1 + len(reported) / len(fresh))  # of a mean over that many new seeds
            where = "inside" if abs(np.mean(fresh) - mean) <= half else "OUTSIDE"
            print(
                f"{arm}: {np.mean(fresh):.1f} % over {len(fresh)} fresh seeds, expected "
                f"{mean - half:.1f} to {mean + half:.1f}: {where}"
            )
