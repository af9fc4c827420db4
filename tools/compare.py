"""How two evaluations of the same problems differ: python eval.py --compare A B"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from files import explained, read_records, stem
from run.statistics import SETTINGS, bootstrap, by_name, measure

LINE = (
    "  {:10}  A {A:.3f}  B {B:.3f}  difference {difference:.3f}  low {low:.3f}  high {high:.3f}  "
    "p {p:.3f}"
)


def read(path):
    """A results.jsonl, or the folder with it -> settings, {(name of the file, problem id): result}

    Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.jsonl"
    first, *rows = read_records(path)
    results = {}
    with explained(f"{path}: not what eval.py writes"):
        for row in rows:
            measure(row, 1)
            results[stem(row["file"]), row["problem_id"]] = row
        return dict(first["settings"]), results


def compare(*paths):
    """Print the differences, problem by problem, of every file and level; -> all of them"""
    (settings_a, a), (settings_b, b) = map(read, paths)
    parts = defaultdict(list)  # name of a file, or of its level -> (result of A, of B) by problem
    for key, result in a.items():
        if key in b:
            pair = result, b[key]
            file, level = key[0], result["level"]
            parts[file].append(pair)
            if level:
                parts[f"{file}, {level}"].append(pair)
    if not parts:
        raise ValueError(f"{paths[0]} and {paths[1]} have no problem in common")
    for name in (*SETTINGS.split(), "reward_identity"):
        if settings_a.get(name) != settings_b.get(name):
            print(f"{name} differs: A {settings_a.get(name)!r}, B {settings_b.get(name)!r}")
    if settings_a.get("prompts") != settings_b.get("prompts"):  # their hash
        print(
            "other prompts in A than in B: problems, answers, pass rates, templates, tokenizers..."
        )
    print(f"{len(a)} problems in A, {len(b)} in B, {len(a.keys() & b.keys())} in both")
    report = {}
    for name, pairs in parts.items():
        print(f"\n{name}: {len(pairs)} problems")
        report[name] = compare_part(pairs)
    return report


def compare_part(pairs):
    """Results of A and of B, problem by problem -> {measure: their difference}

    disagreement: the chance that a sample of A and one of B differ in being right, mean over
    problems
    """
    k = min(result["n"] for pair in pairs for result in pair)
    a, b = (by_name(alike(measure(result, k)) for result in side) for side in zip(*pairs))
    report = {"problems": len(pairs)}
    for name in a:
        if name in b:
            x, y = np.array(a[name], float), np.array(b[name], float)
            report[name] = difference(x, y)
            print(LINE.format(name, **report[name]))
    x, y = np.array(a["accuracy"]), np.array(b["accuracy"])
    report["disagreement"] = (x * (1 - y) + y * (1 - x)).mean()
    print(f"  disagreement {report['disagreement']:.3f}")
    return report


def alike(measures):
    """Measures under names that do not tell the number of samples, which may differ."""
    names = {"avg": "accuracy", "maj": "majority"}
    return {names.get(name.partition("@")[0], name): x for name, x in measures.items()}


def difference(x, y):
    """Values of A and B, one per problem -> both means, B - A with its 95 % interval, and p

    p is that of a two-sided permutation test: if A and B were alike, the difference of any problem
    could as well have the other sign. Where all values are 0 or 1, a bootstrap is too narrow: of
    none that differs, it is certain. So one more difference of each sign is added (Bonett and
    Price 2012).
    """
    from scipy.stats import permutation_test

    gain, p = y - x, 1.0
    if len(gain) > 1:
        rng = np.random.default_rng(0)
        p = permutation_test(
            (gain,), np.mean, permutation_type="samples", batch=1000, random_state=rng
        ).pvalue
    unseen = [-1, 1] if np.isin([x, y], (0, 1)).all() else []
    low, high = bootstrap([*gain, *unseen])
    return {
        "A": x.mean(),
        "B": y.mean(),
        "difference": gain.mean(),
        "low": low,
        "high": high,
        "p": p,
    }
