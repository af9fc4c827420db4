"""The equations, against hand-computed values, a numpy oracle, and enumeration of a whole language."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from eprli import (
    Buffer,
    Group,
    clipped_objective,
    cosine_length_reward,
    diagnostics,
    group_advantage,
    kimi_length_reward,
    kl_penalty,
    length_reward,
    loss_weight,
    overlong_penalty,
)

double = torch.float64


# ------------------------------------------------------------------------------------------------------------- clip


@pytest.mark.parametrize(
    "A, rho, slope",
    [
        (+1, 0.5, +1),
        (+1, 1.0, +1),
        (+1, 1.5, 0),  # good token: stop pushing once it is likely enough
        (-1, 0.5, 0),
        (-1, 1.0, -1),
        (-1, 1.5, -1),  # bad token: stop pushing once it is rare enough
    ],
)
def test_clip_gates_the_right_side(A, rho, slope):
    """A clip with `maximum` for bad tokens, or with bounds swapped, fails a row."""
    logprob = torch.tensor([[math.log(rho)]], requires_grad=True)
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    clipped_objective(logprob, torch.zeros(1, 1), A * one, one, mask, 0.2, 0.28).backward()
    assert logprob.grad.item() == pytest.approx(slope * rho)  # d rho / d logprob = rho


@pytest.mark.parametrize(
    "rho, A, gated", [(1.27, 1, False), (1.29, 1, True), (0.81, -1, False), (0.79, -1, True)]
)
def test_bounds_are_asymmetric(rho, A, gated):
    """0.2 below and 0.28 above: using one bound for both sides fails."""
    logprob = torch.tensor([[math.log(rho)]], requires_grad=True)
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    clipped_objective(logprob, torch.zeros(1, 1), A * one, one, mask, 0.2, 0.28).backward()
    assert (logprob.grad.item() == 0) == gated
    sums = diagnostics(logprob, torch.zeros(1, 1), torch.zeros(1, 1), A * one, mask, 0.2, 0.28)
    assert (sums["clip_high"], sums["clip_low"]) == (int(gated and A > 0), int(gated and A < 0))


# ----------------------------------------------------------------------------------------------------- numpy oracle


def ragged(seed, rows=7, width=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    mask = np.arange(width)[None] < lengths[:, None]
    new, old = rng.normal(-1, 0.5, (2, rows, width))
    return lengths, mask, new, old, rng.normal(size=rows), rng.uniform(0, 3, (rows, width))


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_objective_equals_a_numpy_oracle(norm, seed):
    """Token by token in plain loops: a wrong axis, denominator or mask fails."""
    lengths, mask, new, old, A, _ = ragged(seed)
    low, high, cap = 0.2, 0.28, 12
    total = 0.0
    for b in range(len(A)):
        row = 0.0
        for t in range(lengths[b]):
            rho = math.exp(new[b, t] - old[b, t])
            row += min(rho * A[b], min(max(rho, 1 - low), 1 + high) * A[b])
        total += {
            "sequence": row / lengths[b] / len(A),
            "token": row / lengths.sum(),
            "constant": row / cap / len(A),
        }[norm]
    weight = loss_weight(norm, torch.tensor(lengths, dtype=double), len(A), lengths.sum(), cap)
    ours = clipped_objective(
        *map(torch.tensor, (new, old, A)), weight, torch.tensor(mask), low, high
    )
    assert ours.item() == pytest.approx(total, rel=1e-12)


def test_diagnostics_equal_a_numpy_oracle():
    """A share over padding too, or a kl_old of the wrong sign, fails."""
    lengths, mask, new, old, A, entropy = ragged(1)
    sums = diagnostics(*map(torch.tensor, (new, old, entropy, A, mask)), 0.2, 0.28)
    rho = np.exp(new - old)
    wide = np.broadcast_to(A[:, None], mask.shape)
    assert sums["tokens"] == lengths.sum()
    assert sums["entropy"] == pytest.approx(entropy[mask].sum())
    assert (
        sums["kl_old"] == pytest.approx((rho - 1 - (new - old))[mask].sum()) and sums["kl_old"] > 0
    )
    assert sums["clip_low"] == (mask & (wide < 0) & (rho < 0.8)).sum() > 0
    assert sums["clip_high"] == (mask & (wide > 0) & (rho > 1.28)).sum() > 0
    assert sums["ratio_max"] == pytest.approx(rho[mask].max())


def test_what_lies_under_the_mask_cannot_reach_the_gradient():
    """exp before the mask: inf * 0 = nan in the gradient of padding."""
    logprob = torch.tensor([[-1.0, 500.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    J = clipped_objective(
        logprob, torch.tensor([[-1.0, -500.0]]), torch.ones(1), torch.ones(1), mask, 0.2, 0.28
    )
    J.backward()
    assert J.item() == 1.0 and logprob.grad.tolist() == [[1.0, 0.0]]


def test_arguments_are_left_unchanged():
    """A label tensor edited through a view once changed a loss divisor from 3 to 12."""
    lengths, mask, new, old, A, entropy = ragged(1)
    arguments = [torch.tensor(x) for x in (new, old, A, entropy, mask, lengths.astype(float))]
    before = [x.clone() for x in arguments]
    logprob, logprob_old, advantage, _, m, length = arguments
    weight = loss_weight("sequence", length, 7, lengths.sum(), 9)
    clipped_objective(logprob, logprob_old, advantage, weight, m, 0.2, 0.28)
    kl_penalty(logprob, logprob_old, weight, m)
    group_advantage(advantage)
    for kind in ("overlong", "kimi", "cosine"):
        length_reward(kind, length, advantage > 0, advantage > 0, 9, 3)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


# ------------------------------------------------------------------------------------------------------- advantages


def test_advantage_by_hand():
    """Population std, not Bessel's: 3.3 % apart at G = 16."""
    c, G = 3, 16
    p = c / G
    A = group_advantage(torch.tensor([[1.0] * c + [0.0] * (G - c)], dtype=double))[0]
    assert A[0].item() == pytest.approx(math.sqrt((1 - p) / p), rel=1e-5)
    assert A[-1].item() == pytest.approx(-math.sqrt(p / (1 - p)), rel=1e-5)
    assert A.sum().item() == pytest.approx(0, abs=1e-12)
    plain = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), std="none")
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.35, 0.7, 1.0, -1.0])
@pytest.mark.parametrize("G", [1, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(value, G):
    """In float32 the mean of equal fractions can be off by an ulp; / 1e-6 makes that a signal. A group of one gets 0 too."""
    assert torch.equal(group_advantage(torch.full((2, G), value)), torch.zeros(2, G))


@pytest.mark.parametrize("seed", range(3))
def test_advantages_and_length_rewards_equal_a_numpy_oracle(seed):
    """On random groups, completion by completion in plain loops."""
    rng = np.random.default_rng(seed)
    P, G, L, C = 6, 5, 40, 9
    T, right, stopped = (
        rng.integers(1, L + 1, (P, G)),
        rng.random((P, G)) < 0.5,
        rng.random((P, G)) < 0.7,
    )
    reward = rng.normal(size=(P, G))
    overlong, kimi, cosine, A = np.zeros((4, P, G))
    for p in range(P):
        for i in range(G):
            A[p, i] = (reward[p, i] - reward[p].mean()) / (reward[p].std() + 1e-6)
            overlong[p, i] = 0 if T[p, i] <= L - C else (L - C - T[p, i]) / C
            lam = 0.5 - (T[p, i] - T[p].min()) / (T[p].max() - T[p].min())
            kimi[p, i] = lam if right[p, i] else min(0, lam)
            fall = 0.25 * (1 + math.cos(math.pi * T[p, i] / L))
            cosine[p, i] = -0.5 if not stopped[p, i] else fall if right[p, i] else -fall
    assert np.allclose(group_advantage(torch.tensor(reward)), A, atol=1e-12)
    arguments = torch.tensor(T, dtype=double), torch.tensor(right), torch.tensor(stopped), L, C
    for kind, expected in (("overlong", overlong), ("kimi", kimi), ("cosine", cosine)):
        assert np.allclose(length_reward(kind, *arguments), expected, atol=1e-12), kind


def test_groups_are_normalised_one_by_one():
    """Batch statistics instead of group statistics."""
    reward = torch.tensor([[1.0, 0.0], [10.0, 30.0]])
    assert torch.allclose(
        group_advantage(reward), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), atol=1e-4
    )


# --------------------------------------------------------------------------------------------------- length rewards


def test_overlong_equals_the_three_cases_of_dapo():
    L, C = 100, 20
    for T in range(1, 130):
        expected = 0 if T <= L - C else (L - C - T) / C if T <= L else -1
        assert overlong_penalty(torch.tensor(float(T)), L, C).item() == pytest.approx(
            expected, abs=1e-6
        ), T


def test_kimi_is_per_group_and_never_rewards_the_wrong():
    """Minimum and maximum over the whole batch instead of the group; counting characters is not possible here."""
    length = torch.tensor([[10.0, 20.0, 30.0], [100.0, 100.0, 100.0], [5.0, 6.0, 5.0]])
    correct = torch.tensor([[True, False, True], [True, True, False], [False, False, True]])
    assert torch.equal(
        kimi_length_reward(length, correct),
        torch.tensor([[0.5, 0.0, -0.5], [0, 0, 0], [0.0, -0.5, 0.5]]),
    )


def test_cosine_by_hand_monotone_and_bounded():
    """Without the clamp the cosine turns back beyond Len: f(2 Len) = f(0)."""
    L, T = 64, torch.arange(0.0, 129.0)
    yes, no = torch.ones_like(T, dtype=torch.bool), torch.zeros_like(T, dtype=torch.bool)
    right, wrong = cosine_length_reward(T, yes, yes, L), cosine_length_reward(T, no, yes, L)
    f = lambda t, a, b: a + (b - a) / 2 * (1 + math.cos(math.pi * min(t, L) / L))  # noqa: E731  maths of the source
    assert right.tolist() == pytest.approx([f(t, 0, 0.5) for t in T.tolist()], abs=1e-6)
    assert wrong.tolist() == pytest.approx([f(t, 0, -0.5) for t in T.tolist()], abs=1e-6)
    assert (right.diff() <= 1e-7).all() and (wrong.diff() >= -1e-7).all()
    assert (cosine_length_reward(T, yes, no, L) == -0.5).all()


# --------------------------------------------------------------------------- enumeration: a whole language of 2 tokens

LEN = 3  # tokens are 0 and the stop token 1; completions: 1, 01, 001, 000 (ran out)
LANGUAGE = [[1], [0, 1], [0, 0, 1], [0, 0, 0]]


def tabular(theta):
    """Policy with one logit pair per position: (4 completions, LEN) log-probs and mask."""
    logp = theta.log_softmax(-1)
    table = torch.zeros(len(LANGUAGE), LEN, dtype=double)
    mask = torch.zeros(len(LANGUAGE), LEN, dtype=torch.bool)
    rows = []
    for b, y in enumerate(LANGUAGE):
        mask[b, : len(y)] = True
        rows.append(torch.stack([logp[t, y[t]] if t < len(y) else table[b, t] for t in range(LEN)]))
    return torch.stack(rows), mask


def gradient(function, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


THETA = torch.tensor([[0.3, -0.4], [-0.2, 0.5], [0.7, 0.1]], dtype=double)
REWARD = torch.tensor([0.0, 1.0, 0.25, 2.0], dtype=double)
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=double)


def expected_reward(theta, reward):
    logprob, mask = tabular(theta)
    return ((logprob * mask).sum(1).exp() * reward).sum()


def probabilities():
    logprob, mask = tabular(THETA)
    p = (logprob * mask).sum(1).exp()
    assert p.sum().item() == pytest.approx(1)
    return logprob, mask, p


def test_gradient_is_the_exact_policy_gradient():
    """A = r - E[r], norm `constant`: the expectation of our gradient is grad E[r] / Len, exactly."""
    old, mask, p = probabilities()
    A = REWARD - (p * REWARD).sum()
    length = mask.sum(1).to(double)
    weight = (
        loss_weight("constant", length, 1, length.sum(), LEN) * p
    )  # in expectation, one completion at a time
    ours = gradient(
        lambda th: clipped_objective(tabular(th)[0], old, A, weight, mask, 0.2, 0.28), THETA
    )
    exact = gradient(lambda th: expected_reward(th, REWARD), THETA)
    assert torch.allclose(ours, exact / LEN, atol=1e-14) and exact.abs().max() > 0.05


def group_gradient(reward, G, std):
    """The expectation of our gradient over all groups of G completions."""
    old, mask, p = probabilities()
    groups = torch.tensor(list(itertools.product(range(4), repeat=G)))  # (4^G, G)
    chance = p[groups].prod(1)
    advantage = group_advantage(reward[groups], std)
    weight = loss_weight("constant", torch.ones(len(LANGUAGE), dtype=double), G, 1, LEN)[0]
    flat = groups.flatten()
    w = (chance[:, None] * weight).expand_as(groups).reshape(-1)
    return gradient(
        lambda th: clipped_objective(
            tabular(th)[0][flat], old[flat], advantage.flatten(), w, mask[flat], 0.2, 0.28
        ),
        THETA,
    )


@pytest.mark.parametrize("G", [2, 3, 4])
def test_group_mean_baseline_shrinks_by_one_gth(G):
    """The mean includes the completion itself, so the gradient is (G - 1) / G of the exact one. Nothing else is lost."""
    exact = gradient(lambda th: expected_reward(th, REWARD), THETA) / LEN
    assert torch.allclose(group_gradient(REWARD, G, "none"), exact * (G - 1) / G, atol=1e-14)


@pytest.mark.parametrize("G", [2, 3, 4])
def test_std_biases_the_gradient_as_known(G):
    """For 0/1 rewards dividing by std scales grad p by E_c sqrt(c (G - c)) / (G p (1 - p)): prompts are reweighted."""
    _, _, probs = probabilities()
    p = (probs * BINARY).sum().item()
    bias = sum(
        math.comb(G, c) * p**c * (1 - p) ** (G - c) * math.sqrt(c * (G - c)) for c in range(G + 1)
    ) / (G * p * (1 - p))
    exact = gradient(lambda th: expected_reward(th, BINARY), THETA) / LEN
    assert torch.allclose(group_gradient(BINARY, G, "group"), exact * bias, rtol=1e-5)
    assert abs(bias - (G - 1) / G) > 0.2  # not the unbiased factor


def test_k3_value_and_gradient_by_enumeration():
    """E k3 = KL(pi || ref), but its gradient at on-policy samples is that of KL(ref || pi)."""
    old, mask, p = probabilities()
    reference, _ = tabular(THETA.flip(1) * 0.5)
    pr = (reference * mask).sum(1).exp()
    weight = p  # expectation over completions, tokens summed
    value = kl_penalty(old, reference, weight, mask)
    forward = (p * ((old - reference) * mask).sum(1)).sum()
    # the token-level sum of k3 has the same expectation as the sequence KL, position by position
    assert value.item() == pytest.approx(forward.item(), rel=1e-12)
    ours = gradient(lambda th: kl_penalty(tabular(th)[0], reference, weight, mask), THETA)
    # by position: prefixes are reached with pi's probability, and there the gradient is that of KL(ref || pi)
    reach = torch.stack(
        [p[[i for i, y in enumerate(LANGUAGE) if len(y) > t]].sum() for t in range(LEN)]
    )
    ref = (THETA.flip(1) * 0.5).softmax(-1)
    exact = gradient(lambda th: -(reach[:, None] * ref * th.log_softmax(-1)).sum(), THETA)
    assert torch.allclose(ours, exact, atol=1e-14) and pr.sum().item() == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------- buffer


@dataclass
class Scripted:
    tokens: list
    logprobs: list


def group(outcome, update=1, length=None):
    outcome = torch.tensor(outcome, dtype=double)
    return Group(
        prompt=[1],
        completions=[Scripted([1], [0.0])] * len(outcome),
        outcome=outcome,
        length_reward=torch.tensor(length or [0.0] * len(outcome), dtype=double),
        update=update,
    )


def conserved(buffer):
    c = buffer.counts
    return c["drawn"] == c["kept"] + c["all_right"] + c["all_wrong"] + c["stale"] + buffer.pending


def test_buffer_conserves_groups_under_a_random_script():
    rng, buffer = np.random.default_rng(0), Buffer()
    for update in range(1, 60):
        buffer.expire(update)
        for _ in range(rng.integers(0, 3)):
            buffer.add([group(rng.integers(0, 2, 3).tolist(), update) for _ in range(4)])
            assert conserved(buffer)
        if buffer.pending >= 4:
            assert len(buffer.take(4)) == 4
        assert conserved(buffer) and all(g.update >= update - 1 for g in buffer.groups)
    buffer.close()
    assert (
        conserved(buffer)
        and buffer.pending == 0
        and all(buffer.counts[k] for k in ("kept", "all_right", "all_wrong", "stale"))
    )


@pytest.mark.parametrize("right, wrong", [(1.0, 0.0), (1.0, -1.0)])
def test_flat_groups_are_told_apart_in_both_codings(right, wrong):
    """A hard-wired `== 0` for all-wrong misses rewards of -1 / +1."""
    buffer = Buffer()
    buffer.add([group([right] * 3), group([wrong] * 3), group([right, wrong, wrong])])
    assert (buffer.counts["all_right"], buffer.counts["all_wrong"], buffer.pending) == (1, 1, 1)


def test_length_never_revives_a_flat_group():
    """Shaping before filtering makes an all-right group look mixed, and trains on length alone."""
    buffer = Buffer()
    buffer.add([group([1.0, 1.0], length=[-0.5, 0.0])])
    assert buffer.pending == 0 and buffer.counts["all_right"] == 1


def test_surplus_carries_over_one_update_in_order_then_is_stale():
    buffer = Buffer()
    old = [group([0, 1], update=1) for _ in range(3)]
    buffer.add(old)
    assert buffer.take(1)[0] is old[0]
    buffer.expire(2)
    assert buffer.pending == 2
    assert buffer.take(1)[0] is old[1]  # the oldest first
    buffer.expire(3)
    assert buffer.pending == 0 and buffer.counts["stale"] == 1


def test_never_train_on_less():
    buffer = Buffer()
    buffer.add([group([0, 1])])
    with pytest.raises(AssertionError, match="never train on less"):
        buffer.take(2)


def test_filter_all_keeps_flat_groups():
    buffer = Buffer(keep_flat=True)
    buffer.add([group([1, 1]), group([0, 0])])
    assert buffer.pending == 2 and torch.equal(
        group_advantage(buffer.groups[0].reward), torch.zeros(2, dtype=double)
    )
