"""What a run on the shipped problems learned, by kind of step: which mistakes went when.

    python experiments/kinds.py runs/NAME

Every completion in completions.jsonl is followed step by step. Of each kind of step, a table has
the share that is right at the ends of each level. experiments/problems.py explains the traps; a
plain step has none.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.problems import terms, trap  # noqa: E402  (after the path)
from parts.files import read_records  # noqa: E402

KINDS = "plain", "carry", "borrow", "sign"


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


def table(rows):
    """Lines of completions.jsonl -> lines of markdown: shares of right steps, in the first three
    and the last five updates of each level"""
    columns = {}  # {heading: {kind: [whether a step is right, ...]}}
    for level in sorted({row["level"] for row in rows}):
        own = [row for row in rows if row["level"] == level]
        updates = sorted({row["update"] for row in own})
        for when, some in (("first 3", updates[:3]), ("last 5", updates[-5:])):
            steps = columns[f"level {level}, {when} updates"] = defaultdict(list)
            for row in own:
                if row["update"] in some:
                    for kind, right in decisions(row["problem"], row["text"]):
                        steps[kind].append(right)
    yield f"| kind of step | {' | '.join(columns)} |"
    yield "| --- " * (len(columns) + 1) + "|"
    for kind in KINDS:
        found = [steps[kind] for steps in columns.values()]
        cells = [f"{np.mean(right):.0%}" if right else "-" for right in found]
        yield f"| {kind} | {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    args = parser.parse_args()
    print("\n".join(table(read_records(f"{args.run}/completions.jsonl"))))
