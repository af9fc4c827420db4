"""What a run on the shipped problems learned, by kind of step: which mistakes went when.

    python bench/kinds.py --run runs/NAME [--picture kinds.png]

Every completion in completions.jsonl is followed step by step. Of each kind of step, the share that
is right is shown over the updates, and as a table for the ends of the levels.
"""

import re
from collections import defaultdict
from pathlib import Path

import common
import numpy as np
from matplotlib.figure import Figure

from experiments.problems import terms, trap
from parts.files import read_records

KINDS = ("plain", "carry", "borrow", "sign")
MEANING = {
    "plain": "a step without a trap",
    "carry": "the units add up to ten or more",
    "borrow": "the units have to borrow a ten",
    "sign": "a bracket turns the sign",
}


def decisions(text, response):
    """What a response to a chain did, step by step: pairs (kind, right). It ends where the response
    leaves the chain."""
    (total, _), *rest = terms(text)
    written = re.findall(r"([+-]\d+)=(-?\d+)", re.sub(r"\(.*?\)", "", response))
    found = []
    for (value, turned), (own_value, own_total) in zip(rest, written):
        own_value, own_total = int(own_value), int(own_total)
        if turned:
            found.append(("sign", own_value == value))
        if abs(own_value) != abs(value):
            break
        kind, _ = trap(total, own_value)
        found.append((kind or "plain", own_total == total + own_value))
        total = own_total
    return found


def count(folder):
    """-> {kind: {update: [right, all]}}, {update: level}"""
    counts, levels = {kind: defaultdict(lambda: [0, 0]) for kind in KINDS}, {}
    for row in read_records(folder / "completions.jsonl"):
        levels[row["update"]] = row["level"]
        for kind, right in decisions(row["problem"], row["text"]):
            counts[kind][row["update"]][0] += right
            counts[kind][row["update"]][1] += 1
    return counts, levels


def share(counts, updates):
    right, drawn = np.sum([counts[u] for u in updates if u in counts] or [[0, 0]], axis=0)
    return right / drawn if drawn else np.nan


def table(counts, levels):
    """Shares of right steps in the first three and the last five updates of each level."""
    lines = ["| kind of step |", "| --- |"]
    spans = {}
    for level in sorted(set(levels.values())):
        updates = sorted(u for u in levels if levels[u] == level)
        spans[f"level {level}, first 3 updates"] = updates[:3]
        spans[f"level {level}, last 5 updates"] = updates[-5:]
    for name in spans:
        lines[0] += f" {name} |"
        lines[1] += " --- |"
    for kind in KINDS:
        shares = [share(counts[kind], updates) for updates in spans.values()]
        cells = " | ".join("-" if np.isnan(x) else f"{x:.0%}" for x in shares)
        lines.append(f"| {kind}: {MEANING[kind]} | {cells} |")
    return "\n".join(lines)


def draw(counts, levels, path):
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    updates = sorted(levels)
    for kind in KINDS:
        near = [[u + d for d in (-1, 0, 1)] for u in updates]
        ax.plot(updates, [share(counts[kind], some) for some in near], label=kind)
    for before, after in zip(updates, updates[1:]):
        if levels[before] != levels[after]:
            ax.axvline(after - 0.5, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlabel="update", ylabel="share of right steps", ylim=(0, 1.02))
    ax.legend(frameon=False, ncols=4, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    args = common.parse(__doc__, run="runs/default", picture="kinds.png")
    counts, levels = count(Path(args.run))
    print(table(counts, levels))
    draw(counts, levels, args.picture)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
