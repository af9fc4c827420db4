"""Accuracies, and how sure one can be of them.

scipy.stats takes a second to import. It is imported where it is used.
"""

import math
from statistics import mode

import numpy as np

from answers import canonical

# All that a result depends on, beside the bytes of files. The purpose is that of random streams.
SETTINGS = (
    "model data columns purpose samples k temperature top_k top_p max_new_tokens examples "
    "system suffix template template_kwargs stop dtype seed quality reward reward_timeout"
)


def by_name(rows):
    """Dicts of numbers, one per problem or sample -> {name: its numbers}; 0 where missing."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, 0.0) for row in rows] for name in names}


def pass_at_k(n, c, k):
    """Unbiased P(at least one of k <= n is right) from c right of n samples (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers, right):
    """Whether the most frequent answer is right.

    Answers vote together if their canonical spelling is one. Ties go to the answer that was sampled
    first. None, no answer, casts no vote; without any vote the majority is wrong.
    """
    spelled = [None if answer is None else canonical(answer) for answer in answers]
    votes = [spelling for spelling in spelled if spelling is not None]
    return bool(votes) and right[spelled.index(mode(votes))]  # the first of equals


def wilson(successes, n):
    """95 % interval of a proportion (Wilson 1927) -> low, high"""
    from scipy.stats import binomtest

    return binomtest(int(successes), n).proportion_ci(method="wilson")


def bootstrap(values):
    """95 % interval of the mean over resamples of the values, one per problem -> low, high"""
    from scipy import stats

    if len(values) == 1:
        return values[0], values[0]
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, batch=100, method="percentile", random_state=0
    )
    return result.confidence_interval


def interval(values):
    """Mean of one value per problem, and its 95 % interval over problems -> mean, low, high

    Samples of one problem are not independent, so they are averaged before. If all values are 0 or
    1, the interval is Wilson's. Otherwise it is a bootstrap's. A bootstrap of few values is too
    narrow, so an interval of shares (values in [0, 1]) is widened: its top is at least Wilson's top
    for zeros alone, its bottom at most Wilson's bottom for ones alone.
    """
    values, n = np.asarray(values, float), len(values)
    if np.isin(values, (0, 1)).all():
        return values.mean(), *wilson(values.sum(), n)
    low, high = bootstrap(values)
    if values.min() >= 0 and values.max() <= 1:
        low, high = min(low, wilson(n, n).low), max(high, wilson(0, n).high)
    return values.mean(), low, high


def measure(result, k):
    """{measure: value} of one problem, from its line of results.jsonl"""
    n, right = result["n"], result["right"]
    values = {f"avg@{n}": right / n, f"pass@{k}": pass_at_k(n, right, k)}
    if "majority" in result:  # else no sample has an answer in a box
        values[f"maj@{n}"] = result["majority"]
    values |= result["means"]
    return values | {name: result[name] for name in ("length", "cut_off", "writes_steps")}


def shown(name, measure):
    """A measure with its interval as text: `length` in tokens, R_l and its parts as they are, all
    others in per cent."""
    if name.startswith(("R_l", "part_")):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*measure)
    scale, unit = (1, "") if name == "length" else (100, " %")
    mean, low, high = (scale * value for value in measure)
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"
