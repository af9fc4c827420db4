"""From the results of an experiment to its measures, tables and verdict; of the map, a picture."""

import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from arms import ARMS, BASES, BUDGET, CONTRASTS
from matplotlib.figure import Figure
from scipy import stats

FIRST_GROUPS = 64
EASY = "levels", "ladder", "easy only"  # arms of the map that begin with easy problems
READ, TESTED = ("0.6 %", "1 %", "6 %", "20 %"), ("2.5 %", "8 %")  # bases of the rule
BUDGETS = 400_000, 800_000, 1_000_000, BUDGET  # of the map
RESULTS = Path(__file__).resolve().parent / "results"
OUTCOME = {  # the columns of the first table: decimals, what it is, its unit
    "accuracy": (1, "held out, all levels, %"),
    "level 1": (1, "held out, %"),
    "level 2": (1, "held out, %"),
    "area": (1, "mean accuracy over the sampled tokens, %"),
    "area 2": (1, "the same of level 2"),
    "at 1 M": (1, "accuracy at 1,000,000 sampled tokens; -: the budget is smaller"),
    "to 50 %": (0, "sampled tokens until level 2 is at 50 %, thousands; -: it never is"),
    "forgotten": (1, "level 1, from its best to its end, points"),
    "pass@16": (1, "level 2, 64 problems, %"),
    "greedy 1": (1, "level 1, without sampling, %; -: not measured"),
    "greedy 2": (1, "level 2, the same"),
}
COURSE = {  # of the second
    "sampled": (0, "tokens, thousands"),
    "trained": (0, "tokens trained on, thousands; -: not kept"),
    "updates": (1, "updates that trained"),
    "length 1": (1, "completions of level 1 at the end, tokens"),
    "length 2": (1, "completions of level 2 at the end, tokens"),
    "drawn": (2, "groups drawn for one that was trained on"),
    "all right": (1, "of the groups drawn, %: dropped"),
    "all wrong": (1, "of the groups drawn, %: dropped"),
    "at first": (1, f"all wrong, of the not all right ones of the first {FIRST_GROUPS} or more, %"),
    "clipped": (2, "of the tokens trained on, %: without gradient; -: not kept"),
    "entropy": (3, "last five updates, nats a token"),
}
COMPARED = "accuracy", "level 1", "level 2", "area", "area 2", "at 1 M"
COMPARED += "greedy 1", "greedy 2", "length 2"
OF_BUDGET = ("area", "area 2", "ratio")  # not to be compared where budgets differ
CHOOSING = range(20, 30)  # seeds, which are not reported


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
    groups_drawn = updates["groups_drawn"]
    right, wrong = updates["groups_all_right"], updates["groups_all_wrong"]
    drawn, first = sum(groups_drawn), 1 + np.searchsorted(np.cumsum(groups_drawn), FIRST_GROUPS)
    clipped = 0
    for key in ("clip_low_share", "clip_high_share"):
        clipped += average(updates.get(key, [np.nan]))
    # On hard problems, for the picture of the map
    at_budgets = {budget: np.interp(budget, grid, level_2) for budget in BUDGETS}
    return at_budgets | {
        "accuracy": both[-1],
        "level 1": level_1[-1],
        "level 2": level_2[-1],
        "area": both.mean(),
        "area 2": level_2.mean(),
        "at 1 M": np.interp(1e6, grid, both) if run["budget"] >= 1e6 else np.nan,
        "to 50 %": reached[0] / 1000 if len(reached) else np.nan,
        "forgotten": level_1.max() - level_1[-1],
        "pass@16": 100 * run.get("pass@16", np.nan),
        "greedy 1": 100 * run.get("greedy", [np.nan] * 2)[0],
        "greedy 2": 100 * run.get("greedy", [np.nan] * 2)[1],
        "ratio": np.log(reached[0] if len(reached) else run["budget"]),
        "budget": run["budget"],
        "length 1": length[1],
        "length 2": length[2],
        "sampled": run["evaluations"][-1]["tokens_sampled"] / 1000,
        "trained": sum(updates.get("tokens_trained", [np.nan])) / 1000,
        "updates": sum(groups > 0 for groups in kept),
        "drawn": drawn / max(1, sum(kept)),
        "all right": 100 * sum(right) / drawn,
        "all wrong": 100 * sum(wrong) / drawn,
        "at first": 100 * sum(wrong[:first]) / (sum(groups_drawn[:first]) - sum(right[:first])),
        "clipped": 100 * clipped,
        "entropy": average(updates["entropy"], last=5),
    }


def read_runs(name):
    """-> the runs of an experiment that are there, one of each line of its file"""
    path = RESULTS / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        sys.exit(f"{path}: a kill has torn its last line; delete that line")
    return [json.loads(line) for line in text.splitlines()]


def commands(name):
    """-> {arm: its flags of train.py}, as they stand in arms.py, or with the arm's results"""
    found = dict(ARMS.get(name, {}))
    for run in read_runs(name):
        flags = run["command"].removeprefix("train.py ").rpartition(" --seed ")[0]
        found.setdefault(run["arm"], flags)
    return found


def measures(name, arm):
    """-> {seed: {measure: value}} of an arm, without runs whose seeds chose a setting"""
    found = {}
    for run in read_runs(name):
        if run["arm"] == arm and (run["seed"] not in CHOOSING or name == "choose"):
            found[run["seed"]] = measure(run)
    return dict(sorted(found.items()))


def interval(values, sureness=0.95):
    """Mean and half of the t-interval; of a single value: nan"""
    if len(values) < 2:
        return np.mean(values), np.nan
    quantile = stats.t.ppf((1 + sureness) / 2, len(values) - 1)
    return np.mean(values), quantile * stats.sem(values)


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


def difference(by_seed, reference, name="accuracy", sureness=0.95):
    """Paired by seed -> mean, half of its interval"""
    seeds = by_seed.keys() & reference.keys()
    if not seeds:
        return np.nan, np.nan
    return interval([by_seed[s][name] - reference[s][name] for s in seeds], sureness)


def with_first(arms):
    """-> pairs (arm, the first arm of its family)"""
    firsts = {}
    for arm in arms:
        first = firsts.setdefault(arm.rpartition(": ")[0], arm)
        if arm != first:
            yield arm, first


def compare(measured, pairs):
    """Differences of pairs of arms, paired by seed, and the ratio of the tokens until level 2 is at
    50 %, with its interval. Where that is never, the budget stands for it. Bold: without 0, or 1.
    """
    yield f"| difference | {' | '.join(COMPARED)} | tokens to 50 %, ratio |"
    yield "| --- " * (len(COMPARED) + 2) + "|"
    for arm, first in pairs:
        if not (arm in measured and first in measured):
            continue
        cells = [f"{arm}, less {first}"]
        budgets = {m["budget"] for a in (arm, first) for m in measured[a].values()}
        for name in (*COMPARED, "ratio"):
            mean, half = difference(measured[arm], measured[first], name)
            text = f"{mean:+.1f} ± {half:.1f}"
            if name == "ratio":
                text = "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp([mean, mean - half, mean + half]))
            if np.isnan(mean) or (len(budgets) > 1 and name in OF_BUDGET):
                mean, text = 0, "-"
            mark = "**" if abs(mean) > half else ""
            cells.append(f"{mark}{text}{mark}".replace(" ± nan", ""))
        yield f"| {' | '.join(cells)} |"


def of_base(by_arm, base):
    """Of {"base: arm": {seed: anything}} the arms of a base, with the seeds that all have"""
    own = {}
    for name, by_seed in by_arm.items():
        if name.startswith(f"{base}: "):
            own[name.partition(": ")[2]] = by_seed
    seeds = sorted(set.intersection(*map(set, own.values()))) if own else ()
    return {arm: {seed: by_seed[seed] for seed in seeds} for arm, by_seed in own.items()}


def outcome(arm, mix):
    """The measure that decides between an arm and the mix by MAP.md, its good side, and the least
    lead that is of use. Both: {seed: {measure: value}}"""
    if any(np.isnan(m["to 50 %"]) for m in (*arm.values(), *mix.values())):
        return "area 2", 1, 3.7
    return "ratio", -1, -np.log(0.8)


def lead(arm, other, by, sureness=0.95):
    """By how much an arm is ahead of another, and whether it is *ahead* by MAP.md; by: `outcome`"""
    name, sign, least = by
    mean, half = difference(arm, other, name, sureness)
    mean *= sign
    return mean, bool(mean > half and mean >= least)


def easy_first(measured):
    """measured: {arm: {seed: {measure: value}}} of a base -> whether it is *easy first*; None:
    undecided"""
    if max(np.mean([m["level 2"] for m in by_seed.values()]) for by_seed in measured.values()) < 10:
        return None
    for name in EASY:
        by = outcome(measured[name], measured["mix"])
        _, ahead = lead(measured[name], measured["mix"], by, sureness=0.983)
        if ahead and lead(measured["hard only"], measured[name], by)[0] <= 0:
            return True
    return False


def rule(w, first):
    """The threshold that MAP.md reads from four bases, and whether it is right for the two others;
    None: there is none.

    w  {base: share of all-wrong groups, %};  first  {base: see easy_first}
    """
    easy = [w[base] for base in READ if first[base]]
    others = [w[base] for base in READ if first[base] is False]
    if not easy or not others or min(easy) <= max(others):
        return None
    threshold = (min(easy) + max(others)) / 2
    right = all(first[base] in (None, w[base] > threshold) for base in TESTED)
    return threshold, right and first["2.5 %"] is not None


def best_at(own, budget):
    """On hard problems, of the arms of a base -> the best, its lead over the mix, whether it is
    told apart from the mix, or the mix from the second"""
    means = {arm: np.mean([m[budget] for m in by_seed.values()]) for arm, by_seed in own.items()}
    best, second = sorted(means, key=means.get, reverse=True)[:2]
    lead, half = difference(own[best], own[second if best == "mix" else "mix"], budget)
    return best, means[best] - means["mix"], lead > half


def draw_map(measured):
    """Start rate across, budget up, the best arm in color with its lead over the mix in points;
    hatched: it is not told apart."""
    figure, colors = Figure(figsize=(11, 5), layout="constrained"), {}
    ax = figure.subplots()
    for x, base in enumerate(BASES):
        for y, budget in enumerate(BUDGETS):
            best, lead, apart = best_at(of_base(measured, base), budget)
            color = colors.setdefault(best, f"C{len(colors)}")
            ax.bar(x, 1, 0.95, y, color=color, alpha=0.5, ec="w", hatch="" if apart else "//")
            ax.text(x, y + 0.4, f"{best}\n{lead:+.0f}", ha="center")
    ax.set_xticks(range(len(BASES)), BASES)
    ax.set_yticks(np.arange(len(BUDGETS)) + 0.5, [f"{budget / 1e6:g} M" for budget in BUDGETS])
    ax.set(xlabel="hard problems solved at the start", ylabel="sampled tokens")
    ax.set_title("the best arm, its lead over the mix in points; hatched: not told apart")
    figure.savefig(RESULTS / "map.png")


def decisions(measured):
    """What follows for each base from its whole seeds, and the rule."""
    w, first = {}, {}
    for base in BASES:
        own = of_base(measured, base)
        if not {"mix", "hard only", *EASY} <= own.keys():
            continue  # runs are missing
        mix = own["mix"]
        each = [m["at first"] for m in mix.values()]
        w[base], first[base] = float(np.mean(each)), easy_first(own)
        yield f"- {base}: w = {w[base]:.1f} %, by seed {np.round(each)}; easy first: {first[base]}"
        for arm, by_seed in list(own.items())[1:]:
            by = outcome(by_seed, mix)
            ahead = lead(by_seed, mix, by)[1] - lead(mix, by_seed, by)[1]
            verdict = ("neither ahead of nor behind", "ahead of", "behind")[ahead]
            yield f"  - {arm}: {verdict} the mix, by {by[0]}"
    if len(w) == len(BASES):
        yield f"- threshold of w, and whether it holds: {rule(w, first)}"


def report(name):
    """Write the table, verdict and picture of an experiment, as far as its runs are there."""
    measured = {}
    for arm in commands(name):
        if by_seed := measures(name, arm):
            measured[arm] = by_seed
    if not measured:
        sys.exit(f"{name}: there is no result yet")
    pairs = [line.split(", less ") for line in CONTRASTS.get(name, "").strip().splitlines()]
    for base in BASES if name == "map" else ():
        own = {f"{base}: {arm}": by_seed for arm, by_seed in of_base(measured, base).items()}
        measured |= own
        pairs += [(arm, other) for other, arm in combinations(own, 2)]
    lines = [*table(measured, OUTCOME), *table(measured, COURSE)]
    if name != "rates":
        lines += compare(measured, pairs or with_first(measured))
    lines += ["", "The flags of each arm, for `python train.py`:", ""]
    lines += [f"- {arm}: `{flags}`" for arm, flags in commands(name).items()]
    if name == "map":
        lines += ["", *decisions(measured)]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if measured.keys() == ARMS["map"].keys():
        draw_map(measured)
