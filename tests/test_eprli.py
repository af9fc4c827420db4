"""The equations: hand-computed values, oracles, and enumeration of a whole language."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from conftest import norms
from pytest import approx, fixture, mark, raises
from scipy import stats

from eprli import (
    Buffer,
    Group,
    LevelState,
    clipped_objective,
    diagnostics,
    group_advantage,
    kl_penalty,
    length_term,
    loss_weight,
    next_level,
)

LOW, HIGH = 0.2, 0.28  # DAPO's clip bounds


def table(text):
    return torch.tensor(np.loadtxt(text.splitlines()))


# ------------------------------------------------------------------------------------------- clip

CLIP = """
# A    rho   slope
 +1   0.50    +1
 +1   1.00    +1
 +1   1.27    +1
 +1   1.29     0    # a good token: stop pushing once it is likely enough
 +1   1.50     0
 -1   0.50     0    # a bad token: stop pushing once it is rare enough
 -1   0.79     0
 -1   0.81    -1
 -1   1.00    -1
 -1   1.50    -1
"""


@mark.parametrize("A, rho, slope", table(CLIP).tolist())
def test_clip_gates_the_right_side(A, rho, slope):
    """`maximum` for bad tokens, bounds swapped, or one bound for both sides fail a row."""
    logprob = torch.tensor([[math.log(rho)]], requires_grad=True)
    zero, mask, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    clipped_objective(logprob, zero, A * one, one, mask, LOW, HIGH).backward()
    assert logprob.grad.item() == approx(slope * rho)  # d rho / d logprob = rho
    sums = diagnostics(logprob, zero, zero, A * one, mask, LOW, HIGH)
    gated = (slope == 0 and A < 0, slope == 0 and A > 0)
    assert (sums["clip_low"], sums["clip_high"]) == gated


def test_what_lies_under_the_mask_cannot_reach_the_gradient():
    """exp before the mask: inf * 0 = nan in the gradient of padding."""
    logprob = torch.tensor([[-1.0, 500.0]], requires_grad=True)
    old, reference = torch.tensor([[[-1.0, -500.0]], [[-1.0, 1500.0]]])
    one = torch.ones(1)
    mask = torch.tensor([[True, False]])
    J = clipped_objective(logprob, old, one, one, mask, LOW, HIGH)
    (J - kl_penalty(logprob, reference, one, mask)).backward()
    assert J.item() == 1.0
    assert logprob.grad.tolist() == [[1.0, 0.0]]


# ----------------------------------------------------------------------------------- numpy oracle


@fixture(params=range(3))
def ragged(request):
    """Random completions of unequal lengths, 7 rows of up to 9 tokens: log-probs (new, old,
    reference), entropy, advantages, mask. No function may change them: a label tensor edited
    through a view once changed a loss divisor from 3 to 12."""
    rng = np.random.default_rng(request.param)
    logprobs, entropy, A = rng.normal(-1, 0.5, (3, 7, 9)), rng.random((7, 9)), rng.normal(size=7)
    mask = np.arange(9) < rng.integers(1, 10, (7, 1))
    arrays = [*logprobs, entropy, A, mask]
    tensors = list(map(torch.tensor, arrays))
    yield tensors
    assert all(map(np.array_equal, tensors, arrays))


@norms
def test_objective_equals_an_oracle(ragged, norm):
    """Token by token in plain loops: a wrong axis, denominator, mask or sign fails."""
    new, old, reference, _, advantage, mask = ragged
    num_tokens, J, k3 = mask.sum().item(), 0.0, 0.0
    for b, t in mask.nonzero().tolist():
        T, A = mask[b].sum().item(), advantage[b].item()
        divisor = {"sequence": 7 * T, "token": num_tokens, "constant": 7 * 12}[norm]
        rho = math.exp(new[b, t] - old[b, t])
        J += min(rho * A, min(max(rho, 1 - LOW), 1 + HIGH) * A) / divisor
        x = (reference[b, t] - new[b, t]).item()
        k3 += (math.exp(x) - 1 - x) / divisor
    weight = loss_weight(norm, mask.sum(1).double(), 7, num_tokens, 12)
    found = clipped_objective(new, old, advantage, weight, mask, LOW, HIGH)
    assert found.item() == approx(J)
    assert kl_penalty(new, reference, weight, mask).item() == approx(k3)


def test_diagnostics_equal_a_numpy_oracle(ragged):
    """A share over padding too, or a kl_old of the wrong sign, fails."""
    new, old, _, entropy, advantage, mask = ragged
    log_rho = (new - old)[mask].numpy()
    rho, A = np.exp(log_rho), advantage.repeat_interleave(mask.sum(1)).numpy()
    expected = {
        "tokens": len(rho),
        "entropy": entropy[mask].sum().item(),
        "kl_old": (rho - 1 - log_rho).sum(),
        "clip_low": ((A < 0) & (rho < 0.8)).sum(),
        "clip_high": ((A > 0) & (rho > 1.28)).sum(),
        "ratio_max": rho.max(),
    }
    found = diagnostics(new, old, entropy, advantage, mask, LOW, HIGH)
    assert found == approx(expected)


# ------------------------------------------------------------------------------------- advantages


def test_advantage_is_the_z_score_of_its_group(ragged):
    """Bessel's std is 6 % off at G = 9. Statistics of the batch are not those of the group."""
    reward = ragged[0]
    centred = reward - reward.mean(1, keepdim=True)
    assert torch.allclose(group_advantage(reward, "none"), centred)
    z_score = torch.tensor(stats.zscore(reward, axis=1))
    assert torch.allclose(group_advantage(reward), z_score, rtol=1e-4)


@mark.parametrize("G", [1, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(G):
    """In float32 the mean of equal fractions can be off by one ulp; / 1e-6 makes that a signal."""
    reward = torch.tensor([0.0, 0.1, 0.35, 0.7, 1.0, -1.0])[:, None].expand(-1, G)
    assert torch.equal(group_advantage(reward), torch.zeros(6, G))


LENGTH_REWARDS = """
# tokens  right  stopped   overlong    kimi   cosine
    10      1       1         0       0.5     0.4267767   # (1 + cos(pi / 4)) / 4
    20      0       1         0       0      -0.25        # never rewarded for being short
    35      1       0        -0.375  -0.125  -0.5
    40      0       1        -1      -0.25    0
    50      1       1        -1      -0.5     0           # a cosine would turn back beyond Len

    20      1       1         0       0       0.25        # another group, of equal lengths
    20      1       0         0       0      -0.5
    20      0       1         0       0      -0.25
    20      0       0         0       0      -0.5
    20      1       1         0       0       0.25
"""


def test_length_rewards_by_hand():
    """Len = 40, its last fifth is 8. Two groups at once: kimi's extremes are those of a group."""
    length, right, stopped, *expected = table(LENGTH_REWARDS).T.reshape(6, 2, 5)
    for kind, values in zip(("overlong", "kimi", "cosine"), expected):
        found = length_term(kind, length, right.bool(), stopped.bool(), 40)
        assert torch.allclose(found, values, atol=1e-6), kind


# --------------------------------------------------- enumeration: a whole language of two tokens

LEN = 3  # tokens are 0 and the stop token 1. Completions: 1, 01, 001, and 000, which ran out
LANGUAGE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
THETA = torch.tensor([[0.3, -0.4], [-0.2, 0.5], [0.7, 0.1]], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.25, 2.0], dtype=torch.float64)
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def logprobs(theta):
    """A policy with one pair of logits per position -> log-probs (4 completions, LEN)."""
    return theta.log_softmax(-1)[torch.arange(LEN), LANGUAGE]


def probability(theta):
    """Of every completion: (4,), their sum is 1."""
    return (logprobs(theta) * MASK).sum(1).exp()


def gradient(function):
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def exact_gradient(reward):
    """Of the expected reward, divided by LEN as the norm `constant` does."""
    return gradient(lambda theta: (probability(theta) * reward).sum() / LEN)


def expected_gradient(reward, G, std):
    """The expectation of our gradient over all 4^G groups of G completions."""
    groups = torch.tensor(list(itertools.product(range(4), repeat=G)))
    chance = probability(THETA)[groups].prod(1, keepdim=True)
    advantage = group_advantage(reward[groups], std).flatten()
    weight = loss_weight("constant", chance, G, 1, LEN) * chance
    weight, rows = weight.expand_as(groups).flatten(), groups.flatten()
    old = logprobs(THETA)[rows]
    return gradient(
        lambda theta: clipped_objective(
            logprobs(theta)[rows], old, advantage, weight, MASK[rows], LOW, HIGH
        )
    )


@mark.parametrize("G", [2, 3, 4])
def test_group_mean_baseline_shrinks_the_policy_gradient_by_one_gth(G):
    """The mean includes the completion itself, so the gradient is (G - 1) / G of the exact one.

    Nothing else is lost: the direction is that of the policy gradient, exactly.
    """
    exact = exact_gradient(REWARD)
    assert exact.abs().max() > 0.01
    expected = exact * (G - 1) / G
    assert torch.allclose(expected_gradient(REWARD, G, "none"), expected, atol=1e-14)


@mark.parametrize("G", [2, 3, 4])
def test_std_biases_the_gradient_as_known(G):
    """For 0/1 rewards, dividing by std scales grad p by E_c sqrt(c (G - c)) / (G p (1 - p)).

    Prompts are reweighted by that.
    """
    p = (probability(THETA) * BINARY).sum().item()
    bias = 0.0
    for c in range(G + 1):
        bias += math.comb(G, c) * p**c * (1 - p) ** (G - c) * math.sqrt(c * (G - c))
    bias /= G * p * (1 - p)
    assert abs(bias - (G - 1) / G) > 0.2  # not the unbiased factor
    expected = exact_gradient(BINARY) * bias
    assert torch.allclose(expected_gradient(BINARY, G, "group"), expected, rtol=1e-5)


def test_k3_value_and_gradient_by_enumeration():
    """E k3 = KL(pi || ref), but its gradient at on-policy samples is that of KL(ref || pi)."""
    old, p, theta_ref = logprobs(THETA), probability(THETA), THETA.flip(1) * 0.5
    reference = logprobs(theta_ref)
    value = kl_penalty(old, reference, p, MASK)
    assert value.item() == approx((p * ((old - reference) * MASK).sum(1)).sum().item())
    ours = gradient(lambda theta: kl_penalty(logprobs(theta), reference, p, MASK))
    reach = p @ MASK.double()  # the probability that a position is reached
    ref = theta_ref.softmax(-1)
    exact = gradient(lambda theta: -(reach[:, None] * ref * theta.log_softmax(-1)).sum())
    assert torch.allclose(ours, exact, atol=1e-14)


# ----------------------------------------------------------------------------------------- buffer


def group(*outcome, policy_version=0, length=None, logprob=-1.0):
    outcome = torch.tensor(outcome, dtype=torch.float64)
    return Group(
        prompt=[1],
        completions=[SimpleNamespace(tokens=[1], logprobs=[logprob])] * len(outcome),
        outcome=outcome,
        length_reward=torch.zeros_like(outcome) if length is None else torch.tensor(length),
        advantage=group_advantage(outcome),
        policy_version=policy_version,
    )


def test_surplus_serves_the_next_update_and_no_other():
    """Surplus that expires at once is dropped before it can be used."""
    buffer, surplus = Buffer(), group(0, 1, policy_version=1)
    buffer.add([surplus])
    buffer.expire(2)
    assert buffer.oldest(1) == [surplus]
    with raises(AssertionError, match="never train on less"):
        buffer.oldest(2)
    buffer.expire(3)
    assert buffer.groups == []


@mark.parametrize("wrong", [0.0, -1.0, 0.2])
def test_flat_groups_are_told_apart_in_all_codings(wrong):
    """A hard-wired `== 0` for all wrong misses rewards of -1 and +1; 0.2 for the form alone is not
    right, and too hard a level would be called too easy. Shaping before filtering makes
    an all-right group look mixed, and trains on length alone."""
    flat = [group(1, 1, length=[-0.5, 0.0]), group(1.5, 1.5), group(wrong, wrong)]
    buffer, everything = Buffer(), Buffer(keep_flat=True)
    for some in (buffer, everything):
        some.add([*flat, group(1, wrong)])
    assert buffer.counts == {"drawn": 4, "all_right": 2, "all_wrong": 1}
    assert everything.pending == 4
    everything.add([group(math.nan, math.nan)])  # nan differs from nan, and teaches nothing
    assert everything.pending == 4 and everything.counts["broken"] == 1


def test_levels_take_turns_whatever_becomes_of_their_updates():
    """By updates that trained, a level whose updates are skipped was chosen again and again. An
    update that met bad numbers is no skip: it ended a level as if it were too hard."""
    level = SimpleNamespace(updates=9, tokens=None)
    states = [LevelState(n, level, None, None, Buffer()) for n in (1, 2)]
    turns = []
    for number, trained in enumerate([False, True, False, True], 1):
        state = next_level(states, "interleaved")
        state.count(number, 10, trained, given_up=False)
        turns.append(state.number)
    assert turns == [1, 2, 1, 2] and [state.skips for state in states] == [2, 0]
    states[0].count(5, 10, False, given_up=True)
    assert states[0].skips == 0
