"""EPRLI: the equations as pure functions; the buffer and the levels as records.

Early Preview Reinforcement Learning with Integrated difficulty-aware intervention is the algorithm
of "Enhancing Math Reasoning in Small-sized LLMs via Preview Difficulty-Aware Intervention" (arXiv
2508.01604).

    A_i = (r_i - mean_G r) / (std_G r + 1e-6)                      group_advantage
    r_i = R_l(q, o_i) + K_l length_l(o_i)                          Group.reward, length_term
    J_l = 1/B sum_i 1/T_i sum_t min(rho A, clip(rho, 1 - eps_low_l, 1 + eps_high_l) A)  (Eq. 1)
                                                                   clipped_objective, loss_weight
    fill a buffer with N_l groups whose R_l differ (DAPO)          Buffer
    for level l = 1 .. L: for update = 1 .. M_l                    LevelState, next_level
    the learning rate over a level                                 learning_rate

In one sentence: DAPO's loop in which the hyper-parameters are indexed by a level of difficulty, run
level after level on one shared policy. Where the paper's description is silent or contradicts
itself, this is how we read it. Every departure from the text is in this list:

 1. The text says "Q1 < Q2" and "Q_{l-1} > Q_l". Q_l is an upper bound of difficulty here, so
    Q1 < Q2 and easy levels come first. A decreasing order is allowed: it trains the harder level
    first.
 2. The text calls "Len2 < Len1" an increasing order. Len_l are free values here, in any order.
 3. Levels are trained one after the other (--schedule interleaved takes turns).
 4. K_l weighs a length term of the reward, added before the group is normalised. A constant in J
    would have no gradient.
 5. Eq. 1 leaves out its inner sum. We take the mean over a completion's tokens, then over
    completions (--loss-norm sequence).
 6. The buffer drops a group whose R_l are all equal. R_l alone decides: a group whose completions
    are all right is dropped even if their lengths differ.
 7. "Skip the update if the buffer is short": groups stay in the buffer from draw to draw. Surplus
    groups serve the next update, with the log-probs under which they were sampled: for them rho is
    not 1 in an update's first step (carried_share; --surplus drop is on-policy). A group that was
    sampled more than one update ago is stale: it is dropped and counted. (When levels take turns,
    the update of another level makes a level's surplus stale.) A skipped update does not change
    the policy, and counts neither in M_l nor in the schedule of the learning rate. Under --tokens,
    what it sampled counts in the level's budget, and in the decay of its learning rate.
 8. All tokens of a completion share its advantage. A group of equal rewards gets exactly 0. A
    completion that ran out of tokens is graded like any other.
 9. mu_l counts passes over an update's groups. Each pass takes --minibatches optimizer steps. With
    a single step per update rho of fresh groups would be 1, and the clip would never act on them.
10. What the text does not give is taken from elsewhere (see `python train.py --help`): clip bounds
    and temperature from DAPO, batch from FastCuRL, learning rate and lengths measured for the
    shipped model.
11. There is no KL term, as in the paper. --kl-coef adds the k3 penalty of the recipes it builds on.
12. "1/(P G)": the paper's P is the number of groups that were kept. B counts their completions.
13. Learning rate: warm-up and decay run within each level, and Adam's moments go on. One schedule
    over all levels would give the last one the smallest steps.
14. R_l is a verifier, 1 for a right answer. A user's own R_l calls a completion right from 1 on, as
    the length rewards need to know.
15. Difficulty is 1 - pass rate of the starting policy, measured once with k samples (eval.py
    --add-pass-rate) that serve neither training nor evaluation. It is not measured anew while the
    policy learns. What is always solved belongs to no level.
16. "Every hyper-parameter" of a level is every field of Level. One value serves all levels for
    everything else, such as learning rate, temperature and kind of length reward.
17. K_l = 0 is an ablation of the paper. Its own K_l has no number.

Shapes: P groups, G completions per group, B completions, T tokens.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

# Updates in a row that may leave the policy as it is, before the level ends: see 7 above
MOST_SKIPS = 3


@dataclass(frozen=True, kw_only=True)
class Level:
    """One rung of the curriculum: what may differ from level to level.

    Len_l limits a completion (or what is left of the context does, if that is less). It is used
    - by the sampler, and by the length rewards `overlong` and `cosine`;
    - in evaluation: the largest Len_l limits held-out completions, here and in eval.py --model RUN.
      Pass rates should be measured with it too;
    - by the default --slots;
    - as the divisor of the loss norm `constant`.
    """

    quality: float  # Q_l    upper bound of difficulty
    prompts: int  # P_l    prompts per draw
    group_size: int  # G_l    completions per prompt
    max_new_tokens: int  # Len_l  longest completion, tokens
    reward: str  # R_l    its name, "math" or "path.py:function"; loaded: LevelState.reward
    length_weight: float  # K_l    0 switches the length reward off
    eps_low: float  # clip bounds, asymmetric: rho in [1 - eps_low, 1 + eps_high]
    eps_high: float
    inner_epochs: int  # mu_l   passes over an update's groups
    buffer_groups: int  # N_l    groups needed before an update
    updates: int | None  # M_l    updates that change the policy; None: no bound of updates
    tokens: int | None  # budget of sampled tokens; the level ends where the first bound is reached

    @property
    def trains(self):
        """Whether it has a budget at all."""
        return 0 not in (self.updates, self.tokens)


# ---------------------------------------------------------------------------------------- rewards


def overlong_penalty(length, max_new_tokens):
    """DAPO's soft overlong punishment: 0 at first, over the last fifth linearly down to -1 (its
    numbers: 4,096 of 20,480 tokens).

    length  any shape, tokens with the stop token -> its shape, in [-1, 0]
    """
    cache = max(1, max_new_tokens // 5)
    return -((length - (max_new_tokens - cache)) / cache).clamp(0, 1)


def kimi_length_term(length, correct):
    """Kimi k1.5, per group: lambda = 1/2 - (T - Tmin) / (Tmax - Tmin); wrong: min(0, lambda).

    length, correct (bool)  (..., G) -> (..., G), in [-1/2, 1/2]; a group of equal lengths gets 0
    """
    shortest, longest = length.amin(-1, keepdim=True), length.amax(-1, keepdim=True)
    lam = 0.5 - (length - shortest) / (longest - shortest)  # 0 / 0 is replaced below
    lam = torch.where(correct, lam, lam.clamp(max=0))
    return lam.masked_fill(shortest == longest, 0.0)


def cosine_length_term(length, correct, stopped, max_new_tokens):
    """After arXiv 2502.03373, as a term added to the outcome.

    A right completion gets 1/2, falling to 0 with its length; a wrong one -1/2, rising to 0; one
    that ran out of tokens -1/2.

    length, correct, stopped  one shape, tokens / bool / bool -> that shape, in [-1/2, 1/2]
    """
    angle = math.pi * length.clamp(max=max_new_tokens) / max_new_tokens
    shape = (1 + torch.cos(angle)) / 4  # 1/2 -> 0
    return torch.where(stopped, torch.where(correct, shape, -shape), torch.full_like(shape, -0.5))


def length_term(kind, length, correct, stopped, max_new_tokens):
    """The unweighted length term of one group or of many: (..., G) each -> (..., G) float."""
    if kind == "overlong":
        return overlong_penalty(length, max_new_tokens)
    if kind == "kimi":
        return kimi_length_term(length, correct)
    if kind == "cosine":
        return cosine_length_term(length, correct, stopped, max_new_tokens)
    raise ValueError(f"length kind {kind!r}: expected overlong, kimi or cosine")


def group_advantage(reward, std="group"):
    """The A of Eq. 1: A = (r - mean_G r) / (std_G r + 1e-6), population std.  (..., G) -> (..., G)

    std="none" leaves the division out (Dr. GRPO). A group of equal rewards is set to exactly 0:
    the float mean of equal fractions can be off by one ulp, and the small epsilon below it would
    blow that up into signal.
    """
    centred = reward - reward.mean(-1, keepdim=True)
    if std == "group":
        centred = centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6)
    elif std != "none":
        raise ValueError(f"adv std {std!r}: expected group or none")
    equal = reward.amax(-1, keepdim=True) == reward.amin(-1, keepdim=True)
    return centred.masked_fill(equal, 0.0)


# -------------------------------------------------------------------------------------- objective


def loss_weight(norm, length, num_completions, num_tokens, max_new_tokens):
    """The weight of each token of a completion in the objective.  length (B,) tokens, float -> (B,)

    num_completions and num_tokens are counted over the whole optimizer step, all its micro-batches
    and processes: the step's loss is a sum divided once.
    sequence: Eq. 1 (GRPO); token: DAPO; constant: Dr. GRPO, max_new_tokens being Len_l.
    """
    if norm == "sequence":
        return 1 / (num_completions * length)
    if norm == "token":
        return torch.full_like(length, 1 / num_tokens)
    if norm == "constant":
        return torch.full_like(length, 1 / (num_completions * max_new_tokens))
    raise ValueError(f"loss norm {norm!r}: expected sequence, token or constant")


def log_ratio(logprob, logprob_old, mask):
    """log rho_it = log pi - log pi_old of each token, 0 outside the mask.  (B, T) each -> (B, T)

    logprob      nats, of the learner now (model.token_logprobs)
    logprob_old  nats, of the policy that sampled, as it sampled (rollout.choose)
    mask         bool, True on completion tokens, the stop token included
    """
    return (logprob - logprob_old).masked_fill(~mask, 0.0)  # before exp: inf * 0 would be nan


def clipped_objective(logprob, logprob_old, advantage, weight, mask, eps_low, eps_high):
    """Eq. 1, to be maximised:  sum_b w_b sum_t min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)

    logprob, logprob_old, mask  (B, T)  see log_ratio
    advantage, weight           (B,)    one per completion; see loss_weight

    Returns a sum, (): micro-batches and processes add up, so the gradient does not depend on how a
    step is cut.
    """
    rho, A = log_ratio(logprob, logprob_old, mask).exp(), advantage[:, None]
    surrogate = torch.minimum(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)
    return (weight[:, None] * surrogate * mask).sum()


def kl_penalty(logprob, logprob_ref, weight, mask):
    """k3: sum_b w_b sum_t (e^x - 1 - x), x = log pi_ref - log pi.  Arguments as above -> ()

    Its mean is KL(pi || pi_ref); its gradient on samples of pi is that of KL(pi_ref || pi).
    """
    x = (logprob_ref - logprob).masked_fill(~mask, 0.0)
    return (weight[:, None] * (x.exp() - 1 - x) * mask).sum()


@torch.no_grad()
def diagnostics(logprob, logprob_old, entropy, advantage, mask, eps_low, eps_high):
    """Sums over the tokens of a micro-batch, to be added up and divided by `tokens` once.

    The arguments are as above. The sums: tokens; entropy (nats); kl_old: rho - 1 - log rho >= 0;
    clip_low, clip_high: tokens whose gradient the clip removed (A < 0 and rho < 1 - eps_low; A > 0
    and rho > 1 + eps_high). And one maximum: ratio_max.
    """
    log_rho = log_ratio(logprob, logprob_old, mask)[mask]
    A = advantage[:, None].expand_as(mask)[mask]
    rho = log_rho.exp()
    return {
        "tokens": mask.sum().item(),
        "entropy": entropy[mask].sum().item(),
        "kl_old": (rho - 1 - log_rho).sum().item(),
        "clip_low": ((A < 0) & (rho < 1 - eps_low)).sum().item(),
        "clip_high": ((A > 0) & (rho > 1 + eps_high)).sum().item(),
        "ratio_max": rho.max().item(),
    }


# ----------------------------------------------------------------------------------------- buffer


@dataclass(frozen=True, kw_only=True, eq=False)  # a group equals itself alone
class Group:
    """One prompt and its G completions, scored."""

    prompt: list  # token ids
    completions: list  # each with .tokens (ids) and .logprobs (nats, under the policy that sampled)
    outcome: torch.Tensor  # (G,)  R_l of each completion
    length_reward: torch.Tensor  # (G,)  K_l x length term
    advantage: torch.Tensor  # (G,)  A of each completion
    policy_version: int  # of the policy that sampled it: updates that it had been trained on
    late: bool = False  # R_l took too long: its outcomes are nan, and no fault of the policy's

    @property
    def reward(self):
        return self.outcome + self.length_reward

    @property
    def flat(self):
        """All outcomes equal: nothing to learn from. Length does not count."""
        return bool((self.outcome == self.outcome[0]).all())

    @property
    def finite(self):
        logprobs = (x for c in self.completions for x in c.logprobs)
        return bool(self.reward.isfinite().all()) and all(map(math.isfinite, logprobs))


class Fate(str, Enum):
    """What becomes of a group that was drawn, once it no longer waits in the buffer."""

    KEPT = "kept"  # trained on
    ALL_RIGHT = "all_right"  # dropped: its R_l are all equal, and 1 or more
    ALL_WRONG = "all_wrong"  # dropped: its R_l are all equal, and less than 1
    BROKEN = "broken"  # R_l came too late, a number is not finite, or its update was given up
    STALE = "stale"  # sampled too many updates ago, or left over at the level's end


@dataclass
class Buffer:
    """The dynamic buffer of one level: groups that wait for their update.

    counts has what was drawn, and what became of it. Nothing is lost: at any time "drawn" is the
    sum of the counts of all fates and of the groups that are pending.
    """

    keep_flat: bool = False  # --filter all
    groups: list = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def pending(self):
        """How many groups wait."""
        return len(self.groups)

    def add(self, groups):
        """Take in groups in the order of their drawing.

        Flat groups are dropped (all right: their common outcome is 1 or more), and so are broken
        ones, which hold a number that is not finite.
        """
        for group in groups:
            self.counts["drawn"] += 1
            if not group.finite:
                self.counts[Fate.BROKEN] += 1
            elif group.flat and not self.keep_flat:
                right = group.outcome[0] >= 1
                self.counts[Fate.ALL_RIGHT if right else Fate.ALL_WRONG] += 1
            else:
                self.groups.append(group)

    def expire(self, policy_version, max_age=1):
        """Drop what was sampled more than max_age updates ago.

        policy_version  that of now
        """
        old = [g for g in self.groups if policy_version - g.policy_version > max_age]
        self.remove(old, Fate.STALE)

    def oldest(self, num_groups):
        """The groups to train on now. They stay until they are removed."""
        assert num_groups <= self.pending, (
            f"{self.pending} groups wait, {num_groups} asked for: never train on less"
        )
        return self.groups[:num_groups]

    def remove(self, groups, fate):
        """Waiting groups leave, by this Fate."""
        leaving = set(groups)
        self.counts[fate] += len(leaving)
        self.groups = [g for g in self.groups if g not in leaving]


# ------------------------------------------------------------------------------------- curriculum


@dataclass
class LevelState:
    """A level at work: what it carries from update to update."""

    number: int  # from 1
    level: Level
    order: object  # data.Order of its prompts
    reward: object  # R_l, see rewards.Reward
    buffer: Buffer
    num_trained: int = 0  # updates of this level that changed the policy
    tokens_sampled: int = 0  # in this level's updates, whatever became of them
    skips: int = 0  # in a row
    last_update: int = 0  # number of its newest update; 0: none yet

    def copy(self):
        """For an update to work on, while this one stays as it is."""
        buffer = replace(
            self.buffer, groups=[*self.buffer.groups], counts=Counter(self.buffer.counts)
        )
        return replace(self, order=replace(self.order), buffer=buffer)

    @property
    def progress(self):
        """Share of the level's budget that is used up: of updates or of tokens, the larger."""
        budgets = (self.num_trained, self.level.updates), (self.tokens_sampled, self.level.tokens)
        shares = []
        for used, budget in budgets:
            if budget is not None:
                shares.append(min(1, used / budget) if budget else 1)
        return max(shares)

    @property
    def over(self):
        return self.progress == 1 or self.skips == MOST_SKIPS

    def count(self, number, tokens_sampled, changed_policy, given_up):
        """Count an update of this level. What waits when the level ends is stale.

        number    of the update in the run
        given_up  it met a number that is not finite, so it is no skip
        """
        self.last_update = number
        self.tokens_sampled += tokens_sampled
        self.num_trained += changed_policy
        self.skips = 0 if changed_policy or given_up else self.skips + 1
        if self.over:
            self.buffer.remove(self.buffer.groups, Fate.STALE)


def next_level(states, schedule):
    """The level of the next update: one level after the other, or each in turn. None: all are over.

    states  [LevelState, ...];  schedule  "sequential" or "interleaved"
    """
    left = [state for state in states if not state.over]
    if schedule == "interleaved":
        return min(left, key=lambda state: state.last_update, default=None)
    return left[0] if left else None


def learning_rate(lr, warmup, decay, num_trained, progress):
    """lr, times a linear warm-up, times a decay from 1 at a level's start to 0 at its end.

    warmup       updates
    decay        none, linear or cosine
    num_trained  updates of the level that changed the policy so far
    progress     share of the level's budget that is used up, in [0, 1)
    """
    rate = lr * min(1.0, (num_trained + 1) / max(warmup, 1))
    if decay == "none":
        return rate
    if decay == "linear":
        return rate * (1 - progress)
    return rate * (1 + math.cos(math.pi * progress)) / 2
