"""Time whole updates: sample, score, learn.

    python bench/step.py --model DIR --prompts 8 --group 8 --new-tokens 128 --steps 3

Prompts have about 64 tokens, completions exactly --new-tokens. All of them are trained on. One
update runs before the clock starts. With --recompute, layers are computed again in the backward
pass from the start; without it, once a GPU is full. The last line is JSON;
in it, learn_share_of_product_speed is the FLOP/s of learning by those of a large matrix product.
Layers that are computed again do not count.
"""

from dataclasses import replace
from statistics import median

import shared

import train
from data import Order, Problem
from eprli import Buffer, LevelState
from policy import lora
from policy.attempt import Solver
from policy.checkpoint import Policy
from policy.learner import Learner
from rewards import Reward, Scorer
from run.config import Config, levels_of, resolve
from run.processes import Ranks, keep_freed_memory
from run.state import Run
from run.update import Update


def make_run(args):
    """A run that has no directory, with one level, whose completions never stop."""
    flags = Config(
        dtype=args.dtype,
        minibatches=1,
        slots=[args.slots],
        group_size=[args.group],
        buffer_groups=[args.prompts],
        max_new_tokens=[args.new_tokens],
    )
    cfg = resolve(flags, measured=False)
    level = levels_of(cfg)[0]
    policy = Policy.load(args.model, args.dtype, args.device)
    policy = replace(policy, stop_ids=())
    if args.lora_rank:
        lora.add(policy.model, args.lora_rank)
    prompts = policy.render([Problem(str(i), f"{i:?<64}", "1") for i in range(args.prompts)])
    reward = Reward("shared.py:reward", shared.reward)
    state = LevelState(1, level, Order(prompts, "bench"), reward, Buffer())
    ranks = Ranks(args.device)
    learner, solver = Learner(policy.model, ranks), Solver(policy, Scorer(cfg.reward_timeout))
    learner.model.model.recompute = args.recompute
    return Run(cfg, None, ranks, policy, None, learner, solver, [state], [], None, None)


def one_update(run):
    """-> the Update, and its seconds"""
    state = run.levels[0]
    update = Update(1, state, 1e-6, run.cfg.max_draws)

    def work():
        train.learn(run, state, train.draw(run, state, update), update)

    return update, shared.seconds(work)


def main():
    keep_freed_memory()
    args = shared.parse(
        __doc__, **shared.MODEL, **shared.WORK, steps=3, slots=64, lora_rank=0, recompute=False
    )
    run = make_run(args)
    first, _ = one_update(run)  # a warm-up
    updates, times = zip(*(one_update(run) for _ in range(args.steps)))
    seconds, learning = median(times), median(u.seconds["learn"] for u in updates)
    tokens = args.prompts * args.group * args.new_tokens
    assert all(update.row()["tokens_trained"] == tokens for update in updates)
    weights = sum(p.numel() for p in run.policy.model.parameters())
    learned = tokens + 64 * args.prompts  # a prompt goes through the learner once
    factor = 4 if args.lora_rank else 6  # frozen weights have no gradient
    speed, product = factor * weights * learned / learning, shared.product_speed(args)
    gap = first.steps[0]["gap"] / first.steps[0]["fresh"]
    shared.report(
        args,
        tokens,
        seconds,
        gap_nats_a_token=gap,
        sample_seconds=seconds - learning,
        learn_seconds=learning,
        recompute=run.policy.model.model.recompute,
        product_flops_per_second=product,
        learn_share_of_product_speed=speed / product,
    )


if __name__ == "__main__":
    main()
