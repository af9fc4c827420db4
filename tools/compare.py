"""How two evaluations of the same problems differ: python eval.py --compare A B"""

import json
from pathlib import Path

import numpy as np

from data import read_records
from eval import COLUMNS, SETTINGS, bootstrap, measure


def read(folder):
    """{(name of the file, problem id): its rows of completions.jsonl, in the order of sampling}"""
    result = {}
    for row in read_records(Path(folder) / "completions.jsonl", parse_row):
        result.setdefault((Path(row["file"]).stem, row["problem_id"]), []).append(row)
    return result


def parse_row(row, _):
    if not isinstance(row, dict) or not set(COLUMNS.split()) <= set(row):
        raise ValueError("not a row that eval.py writes")
    return row


def compare(*folders):
    """Print the differences, problem by problem, of every file and level; -> all of them"""
    a, b = map(read, folders)
    parts = {}
    for key in a:
        if key in b:
            parts.setdefault(key[0], []).append(key)
            level = a[key][0]["level"]
            if level:
                parts.setdefault(f"{key[0]}, {level}", []).append(key)
    if not parts:
        raise ValueError(f"{folders[0]} and {folders[1]} have no problem in common")
    print_settings(*folders)
    print(f"{len(a)} problems in A, {len(b)} in B, {len(a.keys() & b.keys())} in both")
    report = {}
    for name, keys in parts.items():
        print(f"\n{name}: {len(keys)} problems")
        report[name] = compare_part([a[key] for key in keys], [b[key] for key in keys])
    return report


def print_settings(*folders):
    try:
        a, b = (json.loads((Path(folder) / "summary.json").read_text()) for folder in folders)
    except OSError:  # an evaluation was interrupted
        print("no summary.json beside both results: whether they were sampled alike is unknown")
        return
    for name in SETTINGS.split():
        if a.get(name) != b.get(name):
            print(f"{name} differs: A {a.get(name)!r}, B {b.get(name)!r}")


def compare_part(a, b):
    """Two results of the same problems -> {measure: their difference}

    disagreement: the chance that a sample of A and one of B differ in being right, mean over
    problems
    """
    k = min(map(len, a + b))
    measures = zip(measure(a, k).values(), measure(b, k).values())
    report = {"problems": len(a)}
    for name, (x, y) in zip(("accuracy", f"pass@{k}", "majority"), measures):
        report[name] = difference(x, y)
        print(
            f"  {name:10}" + "".join(f"  {key} {value:.3f}" for key, value in report[name].items())
        )
        if name == "accuracy":
            report["disagreement"] = (x * (1 - y) + y * (1 - x)).mean()
    print(f"  disagreement {report['disagreement']:.3f}")
    return report


def difference(x, y):
    """Values of A and B, one per problem -> both means, B - A with its 95 % interval, and p

    p is that of a two-sided permutation test: if A and B were alike, the difference of any problem
    could as well have the other sign.
    """
    from scipy.stats import permutation_test

    gain, p = y - x, 1.0
    if len(gain) > 1:
        settings = {"permutation_type": "samples", "batch": 1000}
        rng = np.random.default_rng(0)
        p = permutation_test((gain,), np.mean, random_state=rng, **settings).pvalue
    low, high = bootstrap(gain)
    report = {"A": x.mean(), "B": y.mean(), "difference": gain.mean()}
    return report | {"low": low, "high": high, "p": p}
