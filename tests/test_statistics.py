"""Statistics of evaluations, against brute force, scipy's t intervals, and values by hand."""

import itertools
import math

import numpy as np
from conftest import table
from pytest import approx, mark
from scipy.stats import t

from common.statistics import by_name, difference, interval, majority, pass_at_k


def test_a_missing_number_is_0():
    assert by_name([{"a": 1}, {"a": 2, "b": 3}]) == {"a": [1, 2], "b": [0, 3]}


@mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_brute_force(n):
    """1 - (1 - c/n)^k would be biased low (0.810 instead of 0.900 at n 16, c 3, k 8)."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = [any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == approx(np.mean(draws))


VOTES = """
3 2 2 | True
3 2 | False
2 3 | True
- - - 2 | True
- - | False
3 2 2 3 | False
"""


@mark.parametrize("answers, is_right", table(VOTES))
def test_majority_rules(answers, is_right):
    """The answer that was sampled first wins a tie, and no answer (-) has no vote."""
    spellings = [None if answer == "-" else answer for answer in answers.split()]
    assert str(majority(spellings, [spelling == "2" for spelling in spellings])) == is_right
    assert majority("22", [True, False])  # if one spelling has two verdicts, the first counts


@mark.parametrize("right, low, high", [(0, 0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1)])
def test_the_interval_of_ten_zeros_and_ones_is_wilsons(right, low, high):
    found = interval([1] * right + [0] * (10 - right))
    assert found == approx((right / 10, low, high), abs=1e-4)


def test_the_interval_of_other_values_is_that_of_their_mean():
    values = np.random.default_rng(1).uniform(size=400)
    low, high = t.interval(0.95, 399, values.mean(), values.std() / 20)
    assert interval(values) == approx((values.mean(), low, high), abs=0.003)
    assert interval([7.0]) == (7, 7, 7)


def test_an_interval_includes_values_that_were_not_seen():
    """One half among zeros tells less than zeros alone. A bare bootstrap says the opposite."""
    assert interval([0.5] + [0] * 29)[2] >= interval([0] * 30)[2] > 0.11
    assert interval([0.5] + [1] * 29)[1] <= interval([1] * 30)[1] < 0.89


FLIPS = [([1, 2, 3], 2 / 8), ([1, -2, 4], 6 / 8), ([1, 2, -3], 1), ([0, 0], 1), ([1], 1)]


@mark.parametrize("gain, p", FLIPS)
def test_p_counts_sign_flips(gain, p):
    """By hand: the share of all choices of signs with a sum that is at least as far from 0."""
    assert difference(np.zeros(len(gain)), gain)["p"] == approx(p)


def test_a_difference_is_paired():
    """Problems differ much more from each other than A and B differ on one of them."""
    gain = np.random.default_rng(0).normal(0.03, 0.05, 200)
    a = 5.0 * np.arange(200)
    low, high = t.interval(0.95, 199, gain.mean(), gain.std() / math.sqrt(200))
    expected = [a.mean(), (a + gain).mean(), gain.mean(), low, high, 0]
    assert [*difference(a, a + gain).values()] == approx(expected, abs=1e-3)


@mark.parametrize("a, b", [(0, 0), (0, 1), (1, 0)])
def test_a_difference_of_nothing_is_not_certain(a, b):
    """Thirty problems that two models answer alike say little of the next thirty, but a bare
    bootstrap would have no width. By hand (Bonett and Price 2012): for equal answers a deviation of
    sqrt(2 / 32), 32 values."""
    found = difference([a] * 30, [b] * 30)
    half = 1.96 * math.sqrt(2 / 32 / 32)
    assert found["high"] - found["low"] == approx(2 * half, abs=0.04)
    assert found["difference"] == b - a
