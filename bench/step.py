"""Time whole updates: sample, score, learn.

    python bench/step.py --model DIR --prompts 8 --group 8 --new-tokens 128 --dtype float32 --steps 3

Prompts of 64 tokens, exactly --new-tokens each, every group kept and trained on; one update before the clock starts. The
last line is JSON.
"""

import argparse
import json
import random
import statistics
import time

import torch
from common import ceilings, peak_rss_mb

from data import Problem, Prompt
from eprli import Buffer, Level
from eval import Policy, attempt
from infra.ranks import Ranks
from infra.run import Stats
from rewards import Grader
from rollout import stream
from train import Config, Learner, Progress, Stage, learn, score


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of float32 products",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    ranks = Ranks(args.device)
    policy = Policy.load(args.model, args.dtype, args.device)
    policy = Policy(
        policy.model, policy.tokenizer, (policy.model.config.vocab_size,), policy.folder, ()
    )  # a stop token that never comes
    cfg = Config(
        filter="all",
        dtype=args.dtype,
        minibatches=1,
        micro_batch_tokens=args.micro_batch_tokens,
        lr=1e-6,
    )
    level = Level(
        quality=1.0,
        prompts=args.prompts,
        group_size=args.group,
        max_new_tokens=args.new_tokens,
        reward="parity",
        length_weight=0.0,
        eps_low=0.2,
        eps_high=0.28,
        inner_epochs=1,
        buffer_groups=args.prompts,
        updates=args.steps,
    )
    rng = random.Random(0)
    prompts = [
        Prompt(Problem(str(i), "", "1"), [rng.randrange(4, 256) for _ in range(64)], "")
        for i in range(args.prompts)
    ]
    stage = Stage(
        1,
        level,
        None,
        [],
        lambda problem, text: sum(map(ord, text)) % 7 < 3,
        Buffer(keep_flat=True),
    )
    learner, grader, rows = Learner(policy.model, ranks, args.recompute), Grader(), []
    wait = torch.cuda.synchronize if args.device != "cpu" else lambda: None
    for update in range(args.steps + 1):
        stats = Stats(update + 1, 1, {}, cfg.lr)
        progress = Progress(trained=update, stats=stats)
        learner.adamw.param_groups[0]["lr"] = cfg.lr
        start = time.perf_counter()
        keys = [[stream(update, p, i) for i in range(args.group)] for p in range(args.prompts)]
        attempts = attempt(
            policy,
            grader,
            prompts,
            keys,
            max_new_tokens=args.new_tokens,
            temperature=1.0,
            slots=args.slots,
            clock=stats.seconds,
        )
        stage.buffer.add(
            [score(cfg, stage, p, group, update) for p, group in zip(prompts, attempts)]
        )
        wait()
        sampled = time.perf_counter()
        learn(cfg, level, learner, None, stage.buffer.oldest(args.prompts), ranks, progress)
        stage.buffer.take(args.prompts)
        wait()
        rows.append((time.perf_counter() - start, sampled - start, time.perf_counter() - sampled))
    assert stats.sums["tokens"] == args.prompts * args.group * args.new_tokens
    total, sampling, learning = (statistics.median(column) for column in zip(*rows[1:]))
    tokens = args.prompts * args.group * args.new_tokens
    weights = sum(p.numel() for p in policy.model.parameters())
    memory = peak_rss_mb()  # before the ceilings are measured
    gpu = (
        {"peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20)}
        if args.device != "cpu"
        else {}
    )
    flops, _ = ceilings(getattr(torch, args.dtype), args.device)
    read = tokens + args.prompts * 64  # prompts go through the learner once
    print(
        json.dumps(
            {
                "seconds_per_step": round(total, 3),
                "sample_seconds": round(sampling, 3),
                "learn_seconds": round(learning, 3),
                "tokens_per_step": tokens,
                "peak_rss_mb": memory,
                "learn_fraction_of_roofline": round(6 * weights * read / flops / learning, 3),
                **gpu,
            }
        )
    )


if __name__ == "__main__":
    main()
