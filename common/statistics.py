"""Statistics of evaluations: averages over problems, their intervals, and tests of differences.

Pure functions of numbers. scipy.stats takes a second to import, so it is imported where it is used.
"""

import math
from statistics import mode

import numpy as np


def by_name(rows):
    """Dicts of numbers, one per problem or sample -> {name: its numbers}; 0 where missing."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, 0.0) for row in rows] for name in names}


def pass_at_k(n, c, k):
    """Unbiased P(at least one of k <= n is right) from c right of n samples (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(spellings, right):
    """Return whether the most frequent answer is right.

    spellings  one per sample: equal ones vote together. None, no answer, casts no vote; without any
               vote the majority is wrong. Ties go to the answer that was sampled first
    """
    votes = [spelling for spelling in spellings if spelling is not None]
    return bool(votes) and right[spellings.index(mode(votes))]  # the first of equals


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


def difference(x, y):
    """Values of A and B, one per problem -> both means, B - A with its 95 % interval, and p

    p is that of a two-sided permutation test: if A and B were alike, the difference of any problem
    could as well have the other sign. Where all values are 0 or 1, a bootstrap is too narrow: of
    none that differs, it is certain. So one more difference of each sign is added (Bonett and
    Price 2012).
    """
    from scipy.stats import permutation_test

    x, y = np.array(x, float), np.array(y, float)
    gain, p = y - x, 1.0
    if len(gain) > 1:
        rng = np.random.default_rng(0)
        test = permutation_test(
            (gain,), np.mean, permutation_type="samples", batch=1000, random_state=rng
        )
        p = test.pvalue
    unseen = [-1, 1] if np.isin([x, y], (0, 1)).all() else []
    low, high = bootstrap([*gain, *unseen])
    numbers = x.mean(), y.mean(), gain.mean(), low, high, p
    return dict(zip(("A", "B", "difference", "low", "high", "p"), numbers))
