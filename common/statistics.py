"""Statistics of evaluations: means over problems, their intervals, and tests of differences.

All functions are pure and take numbers. scipy.stats takes a second to import, so it is imported
where it is used.
"""

import math
from statistics import mode

import numpy as np


def by_name(rows):
    """Return {name: its value in each row}, from rows that are dicts. A value that is missing in a
    row is 0."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, 0.0) for row in rows] for name in names}


def pass_at_k(n, c, k):
    """Return the unbiased estimate (Chen et al. 2021) of the probability that at least one of k
    samples is right, if c of n samples are; k <= n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(spellings, right):
    """Return whether the most frequent answer is right; False if there is no answer.

    spellings  one for each sample: samples with equal spellings vote together, and None has no
               vote. Of answers with equally many votes, the one that was sampled first wins
    right      whether each sample is right
    """
    votes = [spelling for spelling in spellings if spelling is not None]
    return bool(votes) and right[spellings.index(mode(votes))]  # the first of equals


def wilson(successes, n):
    """Return the 95 % interval (low, high) of a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    return binomtest(int(successes), n).proportion_ci(method="wilson")


def bootstrap(values):
    """Return the 95 % interval (low, high) of the mean, by resampling the values."""
    from scipy import stats

    if len(values) == 1:
        return values[0], values[0]
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, batch=100, method="percentile", random_state=0
    )
    return result.confidence_interval


def interval(values):
    """Return the mean of the values, one for each problem, and its 95 % interval: mean, low, high.

    Samples of one problem are not independent, so they are averaged before. If all values are 0 or
    1, the interval is Wilson's, otherwise a bootstrap's. A bootstrap of few values is too narrow,
    so an interval of shares (values in [0, 1]) is widened: it reaches at least as high as Wilson's
    interval would if all values were 0, and at least as low as if all were 1.
    """
    values, n = np.asarray(values, float), len(values)
    if np.isin(values, (0, 1)).all():
        return values.mean(), *wilson(values.sum(), n)
    low, high = bootstrap(values)
    if values.min() >= 0 and values.max() <= 1:
        low, high = min(low, wilson(n, n).low), max(high, wilson(0, n).high)
    return values.mean(), low, high


def difference(a, b):
    """Return both means, the mean of b - a with its 95 % interval, and p, under their names.

    a, b  values of A and B, one for each problem, in the same order

    The interval is a bootstrap's. Where all values are 0 or 1, it would be too narrow: if no
    problem differs, it would have no width. So two more differences are added, -1 and 1 (Bonett and
    Price 2012). p is from a two-sided sign-flip permutation test: under the null hypothesis, the
    sign of each problem's difference is arbitrary.
    """
    from scipy.stats import permutation_test

    a, b = np.array(a, float), np.array(b, float)
    gain, p = b - a, 1.0
    if len(gain) > 1:
        rng = np.random.default_rng(0)
        p = permutation_test(
            (gain,), np.mean, permutation_type="samples", batch=1000, random_state=rng
        ).pvalue
    unseen = [-1, 1] if np.isin([a, b], (0, 1)).all() else []
    low, high = bootstrap([*gain, *unseen])
    means = {"A": a.mean(), "B": b.mean(), "difference": gain.mean()}
    return means | {"low": low, "high": high, "p": p}
