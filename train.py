"""EPRLI (arXiv 2508.01604): reinforcement learning of mathematics, level by level of difficulty.

    python train.py                       the shipped model and problems, minutes on a laptop
    python train.py --model DIR_OR_HUB_NAME --data F.jsonl --eval-data G.jsonl

`train` is the algorithm box of the README, `learn` its gradient steps, eprli.py the equations and
the curriculum. How a run is counted, logged and saved is in run/state.py, how it begins or is
resumed in run/start.py, how it ends in run/command.py. The way of a line of data is written down in
run/inputs.py, that of a flag in run/config.py.
"""

import gc
import math
import random
import time
from dataclasses import dataclass

import torch

from common.files import Stop, squash
from common.statistics import by_name
from eprli import (
    Fate,
    Group,
    clipped_objective,
    diagnostics,
    group_advantage,
    kl_penalty,
    learning_rate,
    length_term,
    loss_weight,
    next_level,
)
from eval import evaluate, result_of, summarise
from model import pad
from policy.attempt import Request, Sampling, evaluation_requests
from rewards import LATE
from rollout import TRAINING, Completion, stream_key
from run.command import run_command
from run.processes import leave
from run.update import NotFinite, Update

# Mean absolute difference of learner and sampler that is still rounding, nats a token. A Qwen2 of
# 0.5 B was measured at 0.011 in bfloat16 (bench/RESULTS.md).
MOST_GAP = {"float64": 1e-8, "float32": 1e-2, "bfloat16": 0.05}
# What `objective` logs: over micro-batches and processes, SUMS are added and PEAKS compared.
SUMS = ("objective", "tokens", "entropy", "kl_old", "clip_low", "clip_high", "gap", "fresh")
PEAKS = ("ratio_max", "gap_max")


def train(run):
    """The loop of the paper. The comments quote the algorithm box of the README.

    run is a run.state.Run, state an eprli.LevelState, update a run.update.Update.
    """
    cfg, ranks = run.cfg, run.ranks
    while True:
        # due at the start, at the end of a level, and as --eval-every says; 0: never
        if run.evaluation_due and cfg.eval_every != 0:
            evaluate_held_out(run)
        if run.save_due:
            run.save()
        ranks.raise_signals()  # one that came while learning takes effect here at the latest
        # for level l = 1 .. L: for update = 1 .. M_l:
        state = next_level(run.levels, cfg.schedule)
        if state is None:
            return
        schedule = cfg.lr, cfg.warmup, cfg.lr_decay
        lr = learning_rate(*schedule, state.num_trained, state.progress)
        update = Update(run.num_updates + 1, state, lr, cfg.max_draws)
        state = update.state  # a copy, which replaces the state of the level at the end
        level, buffer = state.level, state.buffer
        try:
            # drop groups that were sampled more than one update ago
            buffer.expire(run.policy_version, max_age=0 if cfg.surplus == "drop" else 1)
            # pi_old <- pi: completions keep the log-probs under which rollout.choose samples them
            # while the buffer holds less than N_l groups: draw P_l prompts, G_l completions of
            # each, r_i = R_l + K_l length_l, A_i (prompts_left begins at --max-draws x P_l)
            while buffer.pending < level.buffer_groups and update.prompts_left:
                groups = draw(run, state, update)
                # drop a group if its R_l are all equal
                buffer.add(groups)
                update.raise_if_not_finite()  # a reward or log-prob of what was drawn
            # never train on less than N_l groups: else the update is skipped
            if buffer.pending >= level.buffer_groups:
                groups = buffer.oldest(level.buffer_groups)
                # mu_l times, minibatch by minibatch: one step of ascent on J_l
                learn(run, state, groups, update)
                buffer.remove(groups, Fate.KEPT)
        except NotFinite as fault:  # a reward, log-prob, loss or gradient: the update is given up
            update.fault = fault
            # the groups that it was training on; none if it was still drawing
            buffer.remove(fault.groups, Fate.BROKEN)
        run.end_update(update)  # counted and logged; a policy that has changed is a new version
        # What ends the run, a signal (while drawing alone) or a Stop, comes to run/command.py.
        # There the state before the update is saved, if no optimizer step has been made.


# ------------------------------------------------------------------------------------ draw, score


def draw(run, state, update):
    """Draw at most P_l prompts, sample G_l completions of each from the policy as it is, score.

    -> one Group per prompt
    """
    cfg, level, order = run.cfg, state.level, state.order
    count = level.prompts
    # after the first draw only as many prompts as groups are missing
    if cfg.surplus == "missing" and update.groups:
        count = min(count, level.buffer_groups - state.buffer.pending)
    first = state.buffer.counts["drawn"]  # groups of this level so far
    prompts, requests = order.draw(min(count, update.prompts_left)), []
    update.prompts_left -= len(prompts)
    for group_number, prompt in enumerate(prompts, first):
        keys = [
            stream_key(cfg.seed, TRAINING, state.number, group_number, g)
            for g in range(level.group_size)
        ]
        limit = run.policy.limit(prompt, level.max_new_tokens)
        requests.append(Request(prompt, keys, state.reward, limit))
    slots = cfg.slots[state.number - 1]

    def sample_and_score(share):
        # -> a list of Attempt for each prompt; a group is scored once it is sampled
        done = run.solver.attempt(share, Sampling(cfg.temperature), slots, update.seconds)
        return [
            (attempts, make_group(run, level, request, attempts))
            for request, attempts in zip(share, done)
        ]

    # the results of all processes, in order, on each; if one process fails, all raise
    scored = run.ranks.share_out(requests, sample_and_score)
    attempts, groups = zip(*scored)
    update.add_draw(prompts, attempts, groups)
    return groups


def make_group(run, level, request, attempts):
    """r_i = R_l(q, o_i) + K_l length_l(o_i), the two parts kept apart, and A_i, as a Group."""
    outcome = torch.tensor([a.score.outcome for a in attempts], dtype=torch.float64)
    length_reward = level.length_weight * length_term(
        run.cfg.length_kind,
        outcome.new_tensor([a.length for a in attempts]),
        outcome >= 1,
        torch.tensor([a.completion.stopped for a in attempts]),
        request.limit,
    )
    return Group(
        prompt=request.prompt.tokens,
        completions=[a.completion for a in attempts],
        outcome=outcome,
        length_reward=length_reward,
        advantage=group_advantage(outcome + length_reward, run.cfg.adv_std),
        policy_version=run.policy_version,
        late=attempts[0].score.verdict == LATE,  # then all are
    )


# ------------------------------------------------------------------------------------------ learn


@dataclass(frozen=True)
class Sample:
    """One completion to train on, with its group."""

    group: Group
    completion: Completion
    advantage: float
    fresh: bool  # sampled by the policy that this update begins with


def learn(run, state, groups, update):
    """mu_l passes over the groups, minibatch by minibatch: each is one step of ascent on J_l.

    learner.step sums the gradient over processes and changes the weights of run.policy.
    """
    cfg, learner, start = run.cfg, run.learner, time.perf_counter()
    samples = []  # one list for each group
    for group in groups:
        fresh = group.policy_version == run.policy_version
        update.num_carried += not fresh
        pairs = zip(group.completions, group.advantage.tolist())
        samples.append([Sample(group, completion, A, fresh) for completion, A in pairs])
    for minibatch in minibatches(cfg, state.level.inner_epochs, samples, update.number):
        sums, peaks = accumulate_gradient(run, state.level, minibatch)
        step_number = len(update.steps) + 1
        if step_number == 1:
            check_gap(cfg.dtype, sums)
        if not math.isfinite(sums["objective"]):
            learner.drop_gradient()
            raise NotFinite(f"the loss of step {step_number} is {-sums['objective']}", groups)
        # the norm before the clip; there is no step if it is not finite
        norm = learner.step(update.lr)
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient's norm in step {step_number} is {norm}", groups)
        update.steps.append({"grad_norm": norm, **sums, **peaks})
    update.seconds["learn"] += time.perf_counter() - start


def minibatches(cfg, epochs, samples, number):
    """The samples of every optimizer step of an update: a nearly equal part of the groups, in an
    order that is new for every pass.

    samples  a list for each group;  number  of the update  -> yields lists of Sample
    """
    parts = cfg.minibatches
    for epoch in range(epochs):
        order = list(samples)
        random.Random(f"{cfg.seed}/minibatches/{number}/{epoch}").shuffle(order)
        for part in range(parts):
            groups = order[len(order) * part // parts : len(order) * (part + 1) // parts]
            yield [sample for group in groups for sample in group]


def check_gap(dtype, sums):
    """Before an update's first step the learner is the sampler: what differs is rounding."""
    if sums["gap"] > MOST_GAP[dtype] * sums["fresh"]:
        raise Stop(
            f"the learner's log-probs of completions just sampled differ from the sampler's by "
            f"{sums['gap'] / sums['fresh']:.2g} nats a token, and rounding in {dtype} explains "
            f"{MOST_GAP[dtype]:g}: the two no longer compute one policy, so the ratio of Eq. 1 is "
            "wrong. Look for a change of forward, cache, temperature or weights on one side alone"
        )


def accumulate_gradient(run, level, minibatch):
    """Add the gradient of -J_l over the samples of one optimizer step.

    The step's sum is divided once, by counts of the whole step. So how the learner cuts it into
    micro-batches, and over processes, changes nothing but rounding.

    -> {name: of SUMS, over the step}, {name: of PEAKS}; of all processes, on each
    """
    counts = len(minibatch), sum(len(s.completion.tokens) for s in minibatch)
    try:
        logs = []  # of this process
        for micro, weight in run.learner.micro_batches(minibatch):
            J, logged = objective(run, level, run.learner.model, micro, counts)
            (-weight * J).backward()
            if weight:  # else it was there for FSDP alone
                logs.append(logged)
    except torch.OutOfMemoryError as error:
        J = logs = None
        run.learner.use_less_memory(error)
    if logs is None:  # out here only cycles still hold what the step had
        gc.collect()
        return accumulate_gradient(run, level, minibatch)
    # Summed in the order of processes, so that every run has the same bits.
    logs = sum(run.ranks.gather(logs), [])
    sums = {name: sum(logged[name] for logged in logs) for name in SUMS}
    peaks = {name: max(logged[name] for logged in logs) for name in PEAKS}
    return sums, peaks


def objective(run, level, model, micro, counts):
    """J_l of one micro-batch, and what is logged of it: diagnostics, `gap` between learner and
    sampler summed over `fresh` tokens.

    micro   samples of one prompt

    counts  (completions, tokens) of the whole step, by which its sum is divided once
    """
    cfg = run.cfg
    prompt = torch.tensor(micro[0].group.prompt, device=model.device)  # of all
    ids, mask = pad([s.completion.tokens for s in micro], model.device)
    # (B, T), 0 outside the mask; the entropy has no gradient
    logprob, entropy = model.token_logprobs(prompt, ids, mask, cfg.temperature)
    sampled = logprob.new_tensor([x for s in micro for x in s.completion.logprobs])
    logprob_old = torch.zeros_like(logprob).masked_scatter(mask, sampled)
    advantage = logprob.new_tensor([s.advantage for s in micro])
    length = mask.sum(1).to(logprob)
    weight = loss_weight(cfg.loss_norm, length, *counts, level.max_new_tokens)
    bounds = level.eps_low, level.eps_high
    J = clipped_objective(logprob, logprob_old, advantage, weight, mask, *bounds)  # Eq. 1
    if run.reference is not None:
        with torch.no_grad():
            logprob_ref, _ = run.reference.token_logprobs(prompt, ids, mask, cfg.temperature)
        J = J - cfg.kl_coef * kl_penalty(logprob, logprob_ref, weight, mask)
    logged = diagnostics(logprob, logprob_old, entropy, advantage, mask, *bounds)
    fresh = mask.new_tensor([[s.fresh] for s in micro])
    gap = (logprob - logprob_old).detach().abs()[mask & fresh]
    logged |= {"objective": J.item(), "gap": gap.sum().item(), "fresh": gap.numel()}
    logged["gap_max"] = gap.max().item() if gap.numel() else 0.0
    return J, logged


# --------------------------------------------------------------------------------------- evaluate


def evaluate_held_out(run):
    """Measure the held-out accuracy, by R_l, of every file and bin of difficulty.

    Each problem gets --eval-samples completions at the training temperature, of at most the largest
    Len_l, whatever level is being trained.
    """
    cfg, requests, rows = run.cfg, [], []
    longest = max(state.level.max_new_tokens for state in run.levels)
    sampling = Sampling(cfg.temperature)
    for _, prompts, reward in run.held_out:
        requests += evaluation_requests(
            run.policy, prompts, cfg.eval_samples, longest, cfg.seed, reward
        )
    scored = evaluate(run.ranks, run.solver, requests, sampling, min(cfg.slots))
    results = [result_of(samples) for samples in scored]
    for labels, prompts, _ in run.held_out:
        of_bin, results = results[: len(prompts)], results[len(prompts) :]
        summary = summarise(of_bin, cfg.eval_samples)
        accuracy, low, high = summary["accuracy"]
        row = {**labels, "accuracy": accuracy, "low": low, "high": high, "n": len(prompts)}
        row["length_mean"] = summary["length"][0]
        row["writes_steps_share"] = summary["writes_steps"][0]
        # of an R_l that is not the verifier's
        if own := by_name(result["means"] for result in of_bin):
            row["means"] = {name: summary[name] for name in own}
        rows.append(row)
    run.add_evaluation(rows)


def write_report(out):
    """The picture and the page of a run directory."""
    try:
        from tools import report  # matplotlib takes a second to import

        print(f"picture: {report.draw([out])}")
        print(f"page:    {report.write_page([out])}")
    except Exception as error:  # of a library, a disk: the run itself went well
        print(f"no picture or page of {out} ({type(error).__name__}: {squash(str(error))})")


def main(arguments=None):
    """Set a run up, train, and leave with an exit code that says how it ended."""
    run_command(train, write_report, arguments)


if __name__ == "__main__":
    leave(main)
