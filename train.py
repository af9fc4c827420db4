"""EPRLI (arXiv 2508.01604): reinforcement learning of mathematics, level by level of difficulty.

    python train.py                                                     the shipped model and problems, minutes on a laptop
    python train.py --model DIR_OR_HUB_NAME --data F.jsonl --eval-data G.jsonl

`train` is the algorithm, `learn` its gradient step, eprli.py the equations in both. Per-level flags take one value for
all levels, or one per level.
"""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import data
from data import QUALITY
from eprli import (
    Buffer,
    Group,
    Level,
    clipped_objective,
    diagnostics,
    group_advantage,
    kl_penalty,
    length_reward,
    loss_weight,
)
from eval import (
    MAX_NEW_TOKENS,
    SHIPPED,
    SLOTS,
    TRAINING,
    Policy,
    attempt,
    evaluation_keys,
    interval,
)
from infra.ranks import Ranks, Stop, like, whole
from infra.run import Run, Stats, newest_whole, sha256
from model import LOGITS_PER_CHUNK, micro_batches, pad
from rewards import ERROR, TIMEOUT, Grader, load_reward, writes_steps
from rollout import stream
from tools import plan

BETAS, WEIGHT_DECAY = (
    (0.9, 0.999),
    0.01,
)  # of AdamW: verl's defaults, which DeepScaleR and FastCuRL used
MOST_SKIPS = 3  # updates in a row that a level may fail to fill its buffer, before it ends (algorithm, reading 7)
MOST_BROKEN = 3  # updates in a row that may meet a number that is not finite, before the run ends
MOST_GAP = {
    "float64": 1e-8,
    "float32": 1e-2,
    "bfloat16": 0.2,
}  # mean difference of learner and sampler that is still rounding, nats
SHOW_EVERY = (
    25  # updates between two looks at full completions: eyes find reward hacking before plots do
)


# -------------------------------------------------------------------------------------------------------------- flags


def flag(default, help, source="ours"):
    keep = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return field(**keep, metadata={"help": f"{help} [{source}]"})


@dataclass(frozen=True)
class Config:
    """Every flag: default, unit, source. Those of type list are per level."""

    model: str = flag(
        str(SHIPPED / "tiny"), "checkpoint folder or hub name (Llama, Qwen2 or Qwen3)"
    )
    data: str = flag(
        str(SHIPPED / "train.jsonl"), 'training problems, JSONL of {"problem", "answer"}'
    )
    eval_data: str | None = flag(
        None, "held-out problems; default: the shipped ones for the shipped data, else none"
    )
    difficulty: Literal["pass_rate", "level"] = flag(
        "pass_rate", "cuts the levels: 1 - pass rate, or the declared number", "paper"
    )
    out: str | None = flag(None, "run directory to create; default runs/<date-time>")
    seed: int = flag(0, "seed of everything random")
    device: Literal["cpu", "cuda"] = flag(
        "cuda" if torch.cuda.is_available() else "cpu", "where the model lives"
    )
    dtype: Literal["float32", "bfloat16", "float64"] = flag(
        "float32", "of the weights; bfloat16 has float32 masters"
    )

    quality: list[float] | None = flag(
        None,
        f"Q_l, upper bound of difficulty; default {QUALITY}, or one level of everything if no problem has a pass rate",
        "paper: two levels; where they are cut: ours",
    )
    group_size: list[int] = flag([16], "G_l, completions per prompt", "paper")
    prompts: list[int] | None = flag(None, "P_l, prompts per draw; default N_l", "ours")
    buffer_groups: list[int] = flag(
        [16], "N_l, groups that an update trains on", "ours; FastCuRL 64-128"
    )
    max_new_tokens: list[int] = flag(
        [MAX_NEW_TOKENS], "Len_l, longest completion, tokens", "ours; DeepScaleR 8192-24576"
    )
    eps_low: list[float] = flag([0.2], "ratio's lower clip bound is 1 - eps_low", "DAPO")
    eps_high: list[float] = flag([0.28], "ratio's upper clip bound is 1 + eps_high", "DAPO")
    length_weight: list[float] = flag(
        [0.0], "K_l, weight of the length reward", "paper: ablated at 0; DAPO: 0.5 on our scale"
    )
    reward: list[str] = flag(
        ["math"], "R_l: math, or path.py:function", "paper: verifiable outcome"
    )
    inner_epochs: list[int] = flag(
        [1], "mu_l, passes over an update's groups", "DeepScaleR, FastCuRL"
    )
    updates: list[int] = flag([60], "M_l, updates of the level", "ours")

    lr: float = flag(
        1.5e-4,
        "peak learning rate of AdamW",
        "ours, for 0.8 M parameters; DeepScaleR 1e-6 for 1.5 B",
    )
    warmup: int = flag(10, "updates of linear warm-up", "DAPO")
    lr_decay: Literal["none", "linear", "cosine"] = flag(
        "linear", "from the peak to 0 at the last update", "ours; DeepScaleR none"
    )
    minibatches: int = flag(
        2, "optimizer steps per pass over the update's groups", "FastCuRL: 128 / 64 prompts"
    )
    micro_batch_tokens: int = flag(
        2048, "padded tokens per backward pass; memory only, never changes the result"
    )
    logits_per_chunk: int = flag(
        LOGITS_PER_CHUNK, "logits that the learner holds at once, tokens x vocabulary; memory only"
    )
    recompute: bool = flag(
        False, "activation checkpointing: compute a layer again in the backward pass; memory only"
    )
    fsdp: bool = flag(
        False, "cut weights, gradients and optimizer over torchrun's processes (FSDP2); memory only"
    )
    slots: int = flag(SLOTS, "completions decoded together, on each process; memory and speed only")
    temperature: float = flag(
        1.0, "of the softmax, in sampling and learning alike", "DAPO; DeepScaleR 0.6"
    )
    loss_norm: Literal["sequence", "token", "constant"] = flag(
        "sequence", "how tokens are averaged: Eq. 1, DAPO, Dr. GRPO", "paper"
    )
    adv_std: Literal["group", "none"] = flag(
        "group", "divide advantages by the group's std, or not (Dr. GRPO)", "paper"
    )
    filter: Literal["mixed", "all"] = flag(
        "mixed", "groups to keep: those whose outcomes differ, or all", "paper, DAPO"
    )
    length_kind: Literal["overlong", "kimi", "cosine"] = flag(
        "overlong", "length reward", "DAPO; used where K_l > 0"
    )
    overlong_cache: int | None = flag(
        None,
        "last tokens, over which `overlong` falls to -1; default Len_l / 5",
        "DAPO: 4096 of 20480",
    )
    schedule: Literal["sequential", "interleaved"] = flag(
        "sequential", "levels one after the other, or taking turns", "paper"
    )
    kl_coef: float = flag(
        0.0, "weight of the k3 penalty towards the starting policy", "paper: none; DeepScaleR 0.001"
    )
    max_draws: int = flag(10, "draws per update before it is skipped", "DAPO")
    max_grad_norm: float = flag(1.0, "gradient norm is clipped to this", "DAPO")
    eval_every: int | None = flag(
        None, "updates between evaluations; default: at ends of levels alone; 0: none at all"
    )
    save_every: int = flag(10, "updates between checkpoints; 0: only at the end")
    keep_checkpoints: int = flag(2, "newest checkpoints to keep; older ones are deleted")
    resume: str | None = flag(
        None,
        "run directory to go on with, whatever ended it, with the flags that it was started with",
    )
    examples: str | None = flag(
        None, "JSONL of worked examples {problem, solution} to put in front of every problem"
    )
    allow_last_number: bool = flag(False, "without a box, grade the last number")
    explain: bool = flag(False, "print the resolved objective with its numbers, and stop")
    plan: bool = flag(
        False,
        "print the memory that one process of the run would take, by what takes it, and stop; no weights are read",
    )


PER_LEVEL = [f.name for f in fields(Level)]
FREE = (
    "device",
    "micro_batch_tokens",
    "logits_per_chunk",
    "recompute",
    "fsdp",
    "slots",
    "save_every",
    "keep_checkpoints",
)  # of a --resume


def option(name):
    """A flag as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_flags(cfg):
    """Raise ValueError for what no data can make right."""
    positive, natural = (lambda v: 0 < v < math.inf, "above 0"), (lambda v: v >= 1, "at least 1")
    not_negative = (lambda v: 0 <= v < math.inf, "at least 0")
    wanted = {
        "group_size": (lambda v: v >= 2, "at least 2: a group of one has no advantage"),
        "buffer_groups": (
            lambda v: v >= cfg.minibatches,
            f"at least --minibatches ({cfg.minibatches})",
        ),
        "quality": (
            lambda v: 0 < v <= 1 or (math.isfinite(v) and cfg.difficulty == "level"),
            "in (0, 1]: a difficulty is 1 - pass rate",
        ),
        "eps_low": (lambda v: 0 <= v < 1, "in [0, 1)"),
        **dict.fromkeys(("lr", "temperature", "max_grad_norm"), positive),
        **dict.fromkeys(
            ("eps_high", "length_weight", "warmup", "kl_coef", "eval_every", "save_every", "seed"),
            not_negative,
        ),
        **dict.fromkeys(
            (
                "prompts",
                "max_new_tokens",
                "inner_epochs",
                "updates",
                "minibatches",
                "micro_batch_tokens",
                "slots",
                "overlong_cache",
                "max_draws",
                "logits_per_chunk",
                "keep_checkpoints",
            ),
            natural,
        ),
    }
    for name, (good, words) in wanted.items():
        value = getattr(cfg, name)
        for v in [] if value is None else value if isinstance(value, list) else [value]:
            if not good(v):
                raise ValueError(f"{option(name)} must be {words}, found {v}")


def resolve_levels(cfg, measured):
    """The levels that the per-level flags describe: each flag one value, or L; L is the longest."""
    given = {name: getattr(cfg, name) for name in PER_LEVEL}
    given["prompts"] = given["prompts"] or given["buffer_groups"]
    if given["quality"] is None:
        if cfg.difficulty == "level":
            raise ValueError(
                "--difficulty level needs --quality: the highest declared number of each level, e.g. --quality 1 2"
            )
        given["quality"] = QUALITY if measured else [1.0]
    elif cfg.difficulty == "pass_rate" and not measured:
        raise ValueError(
            f"--quality cuts measured difficulty, but no problem of {cfg.data} has a pass_rate: measure it with "
            f"`python eval.py --model {cfg.model} --data {cfg.data} --samples 16 --add-pass-rate FILE`, or use --difficulty level"
        )
    longest = max(given, key=lambda name: len(given[name]))
    num_levels = len(given[longest])
    for name, values in given.items():
        if len(values) not in (1, num_levels):
            raise ValueError(
                f"{option(longest)} has {num_levels} values, so there are {num_levels} levels, and "
                f"{option(name)} needs 1 or {num_levels} values, not {len(values)}{'' if getattr(cfg, name) else ' as by default'}"
            )
    levels = [
        Level(**{name: v[min(i, len(v) - 1)] for name, v in given.items()})
        for i in range(num_levels)
    ]
    if cfg.overlong_cache and cfg.overlong_cache > min(level.max_new_tokens for level in levels):
        raise ValueError(
            f"--overlong-cache {cfg.overlong_cache} exceeds --max-new-tokens: every completion would be punished"
        )
    return tuple(levels)


def overlong_cache(cfg, level):
    return cfg.overlong_cache or max(1, level.max_new_tokens // 5)


def explain(cfg, levels):
    """The resolved objective as a formula with its numbers, each with its source ("given": a flag changed it)."""
    default = Config()
    source = {f.name: f.metadata["help"].rpartition("[")[2].rstrip("]") for f in fields(Config)}
    source |= {
        f.name: "given" for f in fields(Config) if getattr(cfg, f.name) != getattr(default, f.name)
    }

    def show(name, value=None):
        value = getattr(cfg, name) if value is None else value
        return (
            f"{value:g} [{source[name]}]"
            if isinstance(value, float)
            else f"{value} [{source[name]}]"
        )

    mean = {
        "sequence": "1/B sum_i 1/T_i sum_t",
        "token": "1/(sum_i T_i) sum_i sum_t",
        "constant": "1/B sum_i 1/Len sum_t",
    }
    lines = [
        f"maximise  J = {mean[cfg.loss_norm]} min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - {cfg.kl_coef:g} k3",
        f"  average over a step: {show('loss_norm')}; k3: {show('kl_coef')}",
        f"  A = (r - mean_G r){' / (std_G r + 1e-6)' if cfg.adv_std == 'group' else ''}: std {show('adv_std')}",
        f"  rho = pi / pi_old, both at temperature {show('temperature')}",
        f"  groups kept: {show('filter')}; draws per update: at most {show('max_draws')}; levels: {show('schedule')}",
        f"  AdamW, betas {BETAS}, weight decay {WEIGHT_DECAY} [verl]; gradient norm at most {show('max_grad_norm')}",
        f"  lr {show('lr')}, warm-up {show('warmup')} updates, decay {show('lr_decay')}",
    ]
    for number, level in enumerate(levels, 1):
        length = f"{show('length_weight', level.length_weight)} x {show('length_kind')}"
        if cfg.length_kind == "overlong":
            length += f" over the last {overlong_cache(cfg, level)} tokens [{'given' if cfg.overlong_cache else 'Len / 5, as DAPO'}]"
        lines += [
            f"level {number}: difficulty up to Q = {show('quality', level.quality)}",
            f"  r = {show('reward', level.reward)} + {length}",
            f"  eps_low = {show('eps_low', level.eps_low)}, eps_high = {show('eps_high', level.eps_high)}",
            f"  G = {show('group_size', level.group_size)} completions a prompt",
            f"  Len = {show('max_new_tokens', level.max_new_tokens)} tokens at most",
            f"  P = {level.prompts} [{'given' if cfg.prompts else 'N'}] prompts a draw",
            f"  N = {show('buffer_groups', level.buffer_groups)} groups an update",
            f"  M = {show('updates', level.updates)} updates of mu = {show('inner_epochs', level.inner_epochs)} pass(es) "
            f"x {show('minibatches')} optimizer steps",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- algorithm


@dataclass
class Stage:
    """A level at work: what it carries from update to update."""

    number: int  # from 1
    level: Level
    problems: object  # endless iterator of Prompt
    evaluation: list  # held-out Prompts
    reward: object  # a user's function, or None: the grader's outcome
    buffer: Buffer
    drawn: int = 0  # prompts so far: the draw index of the next one
    updates: int = 0
    skipped: int = 0  # in a row

    @property
    def over(self):
        return self.updates == self.level.updates or self.skipped == MOST_SKIPS

    def skip(self, drawn):
        """Go on behind the draws of an earlier process."""
        self.problems, self.drawn = itertools.islice(self.problems, drawn, None), drawn


@dataclass
class Progress:
    """Where a run stands, beside its stages, weights and optimizer."""

    update: int = 0  # turns that were taken, skipped ones included
    trained: int = 0  # updates that changed the policy
    broken: int = 0  # updates in a row that met a number that is not finite
    evaluate: bool = True  # held-out accuracy is due
    stats: Stats | None = None  # of the update in progress


def turn(stages, schedule):
    """The stage of the next update: one after the other, or each in turn; None when all are over."""
    key = (lambda s: s.updates) if schedule == "interleaved" else (lambda s: s.number)
    return min((s for s in stages if not s.over), key=key, default=None)


def train(cfg, stages, policy, reference, learner, grader, ranks, run, progress):
    """The loop of the paper; the comments quote the algorithm box of the README. Any line of it may be the first after a
    resume, so what is done is remembered in `progress`, the stages and their buffers alone."""
    total = sum(stage.level.updates for stage in stages)
    while True:
        if progress.evaluate:
            evaluate(cfg, stages, policy, grader, ranks, run, progress)
        if (
            cfg.save_every
            and progress.update
            and progress.update % cfg.save_every == 0
            and not progress.broken
        ):
            run.save(progress, stages, policy, learner)
        stage = turn(stages, cfg.schedule)  # for level l = 1 .. L: for update = 1 .. M_l:
        if stage is None:
            return
        level, buffer = stage.level, stage.buffer
        lr = learner.set_lr(cfg, progress.update + 1, total)
        stats = progress.stats = progress.stats or Stats(
            progress.update + 1, stage.number, dict(buffer.counts), lr
        )

        buffer.expire(progress.trained)  # pi_old <- pi, remembered as log-probs
        while (
            buffer.pending < level.buffer_groups
            and stats.draws < cfg.max_draws
            and not stats.trouble
        ):  # repeat
            draw(
                cfg, stage, policy, grader, ranks, run, progress
            )  # P_l prompts, G_l completions each, their rewards;
        if stats.trouble:  # keep a group iff its R_l are not all equal
            progress.broken += 1
        elif buffer.pending >= level.buffer_groups:  # until the buffer holds N_l groups
            groups = buffer.oldest(level.buffer_groups)
            learn(cfg, level, learner, reference, groups, ranks, progress)
            buffer.take(level.buffer_groups, "broken" if stats.trouble else "kept")
            progress.trained += bool(stats.grad_norms)
            progress.broken, stage.skipped = progress.broken + 1 if stats.trouble else 0, 0
            if stats.trouble:
                run.keep_broken(stats, groups)
        else:
            stage.skipped += 1  # never train on less
        stage.updates, progress.update, progress.stats = (
            stage.updates + 1,
            progress.update + 1,
            None,
        )
        if stage.over:
            buffer.close()
        progress.evaluate = bool(
            stage.over or (cfg.eval_every and progress.update % cfg.eval_every == 0)
        )
        run.log(stats, stage)
        if stage.skipped == MOST_SKIPS:
            tqdm.write(f"  level {stage.number} ends early after {MOST_SKIPS} skipped updates")
        if progress.broken == MOST_BROKEN:
            raise Stop(
                f"{MOST_BROKEN} updates in a row met numbers that are not finite, the last time: {stats.trouble}. Their completions "
                f"are in {run.out / 'broken'}, and {run.last_good()}; lower --lr, or look at --reward"
            )


def draw(cfg, stage, policy, grader, ranks, run, progress):
    """Draw P_l prompts, sample G_l completions each from the policy as it is, score them, and put the groups into the buffer."""
    level, stats = stage.level, progress.stats
    prompts = list(itertools.islice(stage.problems, level.prompts))
    keys = [
        [stream(cfg.seed, TRAINING, stage.number, d, i) for i in range(level.group_size)]
        for d in range(stage.drawn, stage.drawn + len(prompts))
    ]

    def work(share):
        attempts = attempt(
            policy,
            grader,
            [p for p, _ in share],
            [k for _, k in share],
            max_new_tokens=level.max_new_tokens,
            temperature=cfg.temperature,
            slots=cfg.slots,
            progress=ranks.first,
            clock=stats.seconds,
        )
        return [
            (group, score(cfg, stage, p, group, progress.trained))
            for (p, _), group in zip(share, attempts)
        ]

    done = ranks.spread(
        list(zip(prompts, keys)), work
    )  # whole, or not at all: an interrupt leaves the state as it was
    stage.drawn += len(prompts)
    stats.draws += 1
    groups = [group for _, group in done]
    stage.buffer.add(groups)
    finite = lambda x: x if math.isfinite(x) else None  # noqa: E731  JSON knows no nan
    stats.rows += [
        {
            "update": stats.update,
            "level": stage.number,
            "problem_id": p.problem.id,
            "sample": i,
            "verdict": a.verdict,
            "outcome": finite(group.outcome[i].item()),
            "length_reward": finite(group.length_reward[i].item()),
            "tokens": a.length,
            "stopped": a.completion.stopped,
            "text": a.text,
        }
        for p, (attempts, group) in zip(prompts, done)
        for i, a in enumerate(attempts)
    ]
    if stats.draws == 1 and stats.update % SHOW_EVERY == 1:
        for p, (attempts, _) in list(zip(prompts, done))[:: max(1, len(done) // 2)][:2]:
            tqdm.write(
                f"  {p.problem.problem}  ->  {attempts[0].text}  ({attempts[0].verdict}; answer {p.problem.answer})"
            )
    broken = [(p.problem.id, group) for p, group in zip(prompts, groups) if not group.finite]
    if broken:
        name, group = broken[0]
        what = (
            f"log-probs sampled from the policy for problem {name}"
            if group.reward.isfinite().all()
            else (
                f"--reward {level.reward} returned, for problem {name}, {[x for x in group.reward.tolist() if not math.isfinite(x)][0]}"
            )
        )
        stats.trouble = f"{what} ({len(broken)} of {len(groups)} groups)"
        run.keep_broken(stats, [group for _, group in broken])


def score(cfg, stage, prompt, attempts, trained):
    """r_i = R_l(q, o_i) + K_l length_l(o_i), the two parts kept apart."""
    level = stage.level
    if stage.reward:
        outcome = [own_reward(stage, prompt.problem, a.text) for a in attempts]
    else:
        outcome = [a.right for a in attempts]
    length = length_reward(
        cfg.length_kind,
        torch.tensor([a.length for a in attempts], dtype=torch.float64),
        torch.tensor([a.right for a in attempts]),
        torch.tensor([a.completion.stopped for a in attempts]),
        level.max_new_tokens,
        overlong_cache(cfg, level),
    )
    return Group(
        prompt=prompt.tokens,
        completions=[a.completion for a in attempts],
        outcome=torch.tensor(outcome, dtype=torch.float64),
        length_reward=level.length_weight * length,
        update=trained,
    )


def own_reward(stage, problem, response):
    """The user's R_l of one completion; an error in it ends the run, and is said with its name and the problem."""
    try:
        return float(stage.reward(problem.record(), response))
    except (Exception, SystemExit) as error:
        raise Stop(
            f"--reward {stage.level.reward}, problem {problem.id}: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Sample:
    """One completion to train on."""

    prompt: list
    completion: object
    advantage: float
    fresh: bool  # sampled from the policy as it is before this update's first step


def learn(cfg, level, learner, reference, groups, ranks, progress):
    """mu_l passes over the groups, minibatch by minibatch: each is one step of ascent on J_l."""
    stats, start = progress.stats, time.perf_counter()
    for number in range(
        len(stats.grad_norms), level.inner_epochs * cfg.minibatches
    ):  # mu_l times, minibatch by minibatch
        step = minibatch(cfg, groups, number, progress)
        sums, peaks = backward(cfg, level, learner.model, reference, step, number == 0, ranks)
        if number == 0 and sums["gap"] > MOST_GAP[cfg.dtype] * sums["fresh"]:
            raise Stop(
                f"the learner's log-probs of completions just sampled differ from the sampler's by {sums['gap'] / sums['fresh']:.2g} nats a "
                f"token, and rounding in {cfg.dtype} explains {MOST_GAP[cfg.dtype]:g}: the two no longer compute one policy, so the ratio "
                "of Eq. 1 is wrong. Look for a change of forward, cache, temperature or weights on one side alone"
            )
        if not math.isfinite(sums["objective"]):
            stats.trouble = f"the loss of step {number + 1} is {-sums['objective']}"
            return learner.forget()
        norm = learner.step(cfg.max_grad_norm)
        if not math.isfinite(norm):
            stats.trouble = f"the gradient's norm in step {number + 1} is {norm}"
            return
        stats.learned(norm, sums, peaks)
    stats.seconds["learn"] += time.perf_counter() - start


def minibatch(cfg, groups, number, progress):
    """The samples of one optimizer step of an update, group by group: an equal part of the groups, shuffled for every pass."""
    epoch, part = divmod(number, cfg.minibatches)
    order = list(range(len(groups)))
    random.Random(f"{cfg.seed}/minibatches/{progress.stats.update}/{epoch}").shuffle(order)
    samples = []
    for group in (
        groups[i]
        for i in order[
            len(order) * part // cfg.minibatches : len(order) * (part + 1) // cfg.minibatches
        ]
    ):
        advantage = group_advantage(group.reward, cfg.adv_std).tolist()  # A_i
        samples += [
            Sample(group.prompt, c, A, group.update == progress.trained)
            for c, A in zip(group.completions, advantage)
        ]
    return samples


def split(step, parts):
    """Contiguous parts of about equal numbers of tokens, so that most groups stay together."""
    result, total, before = (
        [[] for _ in range(parts)],
        sum(len(s.completion.tokens) for s in step),
        0,
    )
    for s in step:
        result[before * parts // total].append(s)
        before += len(s.completion.tokens)
    return result


def backward(cfg, level, model, reference, step, before_first, ranks):
    """Add the gradient of -J_l over the samples of one optimizer step; how it is cut into micro-batches and over the
    processes changes nothing. -> sums over the step's tokens and the objective, maxima: of all processes, on each.

    before_first  no step was taken in this update yet: the learner is the sampler, and what differs is rounding
    """
    num_tokens = sum(
        len(s.completion.tokens) for s in step
    )  # of the whole step, counted before its first backward
    parts = [
        [
            [part[i] for i in rows]
            for rows in micro_batches(
                [s.prompt for s in part],
                [s.completion.tokens for s in part],
                cfg.micro_batch_tokens,
            )
        ]
        for part in split(step, ranks.size)
    ]
    sums = dict.fromkeys(
        ("objective", "tokens", "entropy", "kl_old", "clip_low", "clip_high", "gap", "fresh"), 0.0
    )
    peaks = dict.fromkeys(("ratio_max", "gap_max"), 0.0)
    for i in range(max(map(len, parts))):  # as often on every process: shards are gathered by all
        ranks.check()
        mine = parts[ranks.rank]
        idle = i >= len(mine)
        if idle and not ranks.sharded:
            continue
        micro = [step[0]] if idle else mine[i]
        ids, mask = pad(
            [s.prompt for s in micro], [s.completion.tokens for s in micro], model.device
        )
        logprob, entropy = model.token_logprobs(ids, mask, cfg.temperature, cfg.logits_per_chunk)
        sampled = torch.tensor(
            [x for s in micro for x in s.completion.logprobs],
            dtype=logprob.dtype,
            device=mask.device,
        )
        logprob_old = torch.zeros_like(logprob).masked_scatter(mask, sampled)
        advantage = torch.tensor(
            [s.advantage for s in micro], dtype=logprob.dtype, device=mask.device
        )
        weight = loss_weight(
            cfg.loss_norm, mask.sum(1).to(logprob), len(step), num_tokens, level.max_new_tokens
        ) * (not idle)
        J = clipped_objective(
            logprob, logprob_old, advantage, weight, mask, level.eps_low, level.eps_high
        )  # Eq. 1
        if reference is not None:
            with torch.no_grad():
                logprob_ref, _ = reference.token_logprobs(
                    ids, mask, cfg.temperature, cfg.logits_per_chunk
                )
            J = J - cfg.kl_coef * kl_penalty(logprob, logprob_ref, weight, mask)
        (
            -J * (ranks.size if ranks.sharded else 1)
        ).backward()  # FSDP takes the mean over processes, the step is a sum
        if idle:
            continue
        found = diagnostics(
            logprob, logprob_old, entropy, advantage, mask, level.eps_low, level.eps_high
        )
        peaks["ratio_max"] = max(peaks["ratio_max"], found.pop("ratio_max"))
        gap = (
            (logprob - logprob_old)
            .detach()
            .abs()[
                mask & torch.tensor([[s.fresh and before_first] for s in micro], device=mask.device)
            ]
        )
        found |= {"objective": J.item(), "gap": gap.sum().item(), "fresh": gap.numel()}
        peaks["gap_max"] = max(peaks["gap_max"], gap.max().item() if gap.numel() else 0.0)
        sums = {name: sums[name] + found[name] for name in sums}
    return ranks.sum(sums), ranks.max(peaks)


class Learner:
    """AdamW on the weights of a policy. Weights of less than float32 are copies of float32 masters, which own gradients
    and moments: an update of 1e-6 of a weight would vanish in bfloat16.

    model    what the gradient goes through: the policy's own, or under FSDP a sharded copy whose shards are the masters.
             The policy's own weights stay whole on every process, to sample from without gathering them token by token
    """

    def __init__(self, policy_model, ranks, recompute=False):
        self.ranks, self.weights, self.torn = ranks, list(policy_model.parameters()), False
        self.names = [name for name, _ in policy_model.named_parameters()]
        self.model = ranks.shard(policy_model) if ranks.sharded else policy_model
        self.model.model.recompute = recompute
        self.masters = list(self.model.parameters())
        self.copied = not ranks.sharded and self.weights[0].dtype.itemsize < 4
        if self.copied:
            self.masters = [w.detach().float() for w in self.weights]
            for weight, master in zip(self.weights, self.masters):
                master.grad = torch.zeros_like(master)
                weight.register_post_accumulate_grad_hook(
                    lambda w, master=master: self.collect(w, master)
                )
        self.adamw = torch.optim.AdamW(
            self.masters, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    @staticmethod
    def collect(weight, master):
        master.grad += weight.grad
        weight.grad = None

    def set_lr(self, cfg, update, total):
        """Linear warm-up, then decay from the peak at the end of the warm-up to 0 behind the last update."""
        rate = cfg.lr * min(1.0, update / max(cfg.warmup, 1))
        if cfg.lr_decay != "none" and update > cfg.warmup:
            done = (update - cfg.warmup) / (total - cfg.warmup + 1)
            rate *= 1 - done if cfg.lr_decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        self.adamw.param_groups[0]["lr"] = rate
        return rate

    def step(self, max_norm):
        """One step; returns the gradient's norm before it was clipped. A gradient that is not finite, or exactly 0 (flat
        groups alone), moves nothing: neither by Adam's momentum nor by weight decay."""
        self.ranks.sum_gradients(self.masters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters, max_norm)).item()
        if norm and math.isfinite(norm):
            self.torn = True
            self.adamw.step()
            self.publish()
            self.torn = False
        self.forget()
        return norm

    def forget(self):
        """Drop the gradient."""
        self.adamw.zero_grad(set_to_none=not self.copied)

    @torch.no_grad()
    def publish(self):
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.copy_(whole(master))

    def tensors(self):
        """(name, whole tensor) of all that the optimizer holds. Shards are gathered: every process must iterate."""
        for name, weight, master in zip(self.names, self.weights, self.masters):
            if weight.dtype != master.dtype:
                yield f"master.{name}", whole(master.detach())
            for kind, value in self.adamw.state.get(master, {}).items():
                yield f"{kind}.{name}", whole(value)

    @torch.no_grad()
    def load(self, tensors):
        """The inverse of `tensors`, whatever number of processes wrote them."""
        for name, master in zip(self.names, self.masters):
            if f"master.{name}" in tensors:
                master.copy_(like(master, tensors[f"master.{name}"]))
            if f"exp_avg.{name}" in tensors:
                self.adamw.state[master] = {
                    "step": tensors[f"step.{name}"].to(master.device),
                    **{
                        kind: like(master, tensors[f"{kind}.{name}"])
                        for kind in ("exp_avg", "exp_avg_sq")
                    },
                }


def evaluate(cfg, stages, policy, grader, ranks, run, progress):
    """Held-out accuracy of every level: one sample a problem at the training temperature. What is done already is not
    done again."""
    done = {row["level"] for row in run.evaluations if row["update"] == progress.update}
    for stage in stages if cfg.eval_every != 0 else ():
        if not stage.evaluation or stage.number in done:
            continue
        keys = evaluation_keys(cfg.seed, stage.evaluation, 1)

        def work(share, stage=stage):
            attempts = attempt(
                policy,
                grader,
                [p for p, _ in share],
                [k for _, k in share],
                max_new_tokens=stage.level.max_new_tokens,
                temperature=cfg.temperature,
                slots=cfg.slots,
                progress=ranks.first,
            )
            return [(a.right, a.length, writes_steps(a.text)) for (a,) in attempts]

        right, lengths, steps = zip(*ranks.spread(list(zip(stage.evaluation, keys)), work))
        accuracy, low, high = interval(right)
        n = len(right)
        run.evaluated(
            {
                "update": progress.update,
                "level": stage.number,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "n": n,
                "length_mean": sum(lengths) / n,
                "writes_steps_share": sum(steps) / n,
            }
        )
    progress.evaluate = False


# --------------------------------------------------------------------------------------------------------------- main


def read_data(cfg):
    """-> cfg with its files resolved, training problems without repeats, held-out problems, number of repeats"""
    shipped = Path(cfg.data).resolve() == (SHIPPED / "train.jsonl").resolve()
    if shipped and not cfg.eval_data:
        cfg = replace(cfg, eval_data=str(SHIPPED / "heldout.jsonl"))
    read = data.read_problems(cfg.data)
    problems = data.without_repeats(read)
    return (
        cfg,
        problems,
        data.read_problems(cfg.eval_data) if cfg.eval_data else [],
        len(read) - len(problems),
    )


def prepare(cfg, levels, problems, held_out, policy):
    """Cut the levels and render everything before minutes are spent. -> stages, facts for config.json"""
    qualities = [level.quality for level in levels]

    def cut(name, problems):
        if problems and all(data.difficulty(p, cfg.difficulty) is None for p in problems):
            tqdm.write(
                f"{name}: no problem has a {cfg.difficulty}, so all of them stand for every level"
            )
            return [problems] * len(levels), {}
        return data.cut_levels(problems, qualities, cfg.difficulty)

    train_sets, left_out = cut(cfg.data, problems)
    held_out_sets, held_out_left_out = cut(cfg.eval_data, held_out)
    if held_out and not any(held_out_sets):
        raise ValueError(
            f"{cfg.eval_data}: no problem falls into any level (left out: {held_out_left_out}); see --quality"
        )
    rewards = [load_reward(level.reward) for level in levels]
    stages, too_long = [], 0
    for number, (level, train_set, held_out_set, reward) in enumerate(
        zip(levels, train_sets, held_out_sets, rewards), 1
    ):
        if not train_set:
            raise ValueError(
                f"level {number} (Q = {level.quality:g}) has no problem: choose another --quality ({cfg.data} left out: {left_out})"
            )
        rendered = policy.render(train_set)
        prompts = [p for p in rendered if policy.room(p)]
        too_long += len(rendered) - len(prompts)
        if not prompts:
            raise ValueError(
                f"level {number}: every prompt is longer than the context of {policy.model.context} tokens"
            )
        order = data.endless(prompts, cfg.seed, number)
        buffer = Buffer(keep_flat=cfg.filter == "all")
        stages.append(Stage(number, level, order, policy.render(held_out_set), reward, buffer))
        tqdm.write(
            f"level {number}: difficulty up to {level.quality:g}, {len(prompts)} problems, {len(held_out_set)} held out"
        )
    if qualities != sorted(qualities):
        tqdm.write(
            'Q decreases: the harder level trains first. The paper says both "Q1 < Q2" and "Q_{l-1} > Q_l"; see eprli.py'
        )
    exact, near = data.overlap(problems, held_out)
    facts = {
        "overlap_with_eval": len(exact),
        "near_overlap_with_eval": len(near),
        "prompts_too_long": too_long,
        "left_out": left_out,
        "eval_left_out": held_out_left_out,
    }
    return stages, facts


def as_started(parser, given):
    """The flags of the run that is to be resumed, with those `given` now. -> Config, config.json"""
    run = given["resume"]
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {
            f.name: config[f.name]
            for f in fields(Config)
            if f.name not in ("resume", "explain", "plan") and config[f.name] is not None
        }
        if not all(isinstance(config[name], dict) for name in ("inputs", "model_files")):
            raise TypeError("its inputs are not listed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {run}: {path} is not that of a run ({type(error).__name__}: {error})"
        ) from error
    changed = [option(name) for name in given if name not in (*FREE, "resume")]
    if changed:
        raise ValueError(
            f"--resume goes on with the flags of {run}, and {changed[0]} is not one that may differ ({' '.join(map(option, FREE))}): leave it "
            f"out, or start a new run from a checkpoint (--model {run}/checkpoints/...)"
        )
    flags |= {name: given[name] for name in FREE if name in given} | {"out": run, "resume": run}
    words = [
        [option(name), *map(str, value if isinstance(value, list) else [value])]
        for name, value in flags.items()
    ]
    return Config(
        **vars(parser.parse_args(list(itertools.chain(*words))))
    ), config  # checked like those of a command line


def inputs(cfg):
    """The files that a run reads beside its model, with their SHA-256: a resumed run must read the same."""
    names = [cfg.data, cfg.eval_data, cfg.examples, *(r.rpartition(":")[0] for r in cfg.reward)]
    return {
        str(Path(name).resolve()): sha256(name) for name in names if name and Path(name).is_file()
    }


def model_files(folder):
    return {
        str(p.resolve()): sha256(p)
        for p in sorted(folder.iterdir())
        if p.suffix in (".safetensors", ".json", ".jinja")
    }


def must_be_as_before(run, files):
    changed = [
        name for name, digest in files.items() if not Path(name).is_file() or sha256(name) != digest
    ]
    if changed:
        raise ValueError(
            f"--resume {run}: {changed[0]} is gone, or is not what it was when the run began: put it back, or start a new run "
            f"from a checkpoint (--model {run}/checkpoints/...)"
        )


def absolute(cfg):
    """With paths that mean the same from any folder, for config.json."""
    paths = {name: getattr(cfg, name) for name in ("model", "data", "eval_data", "examples")}
    paths = {
        name: str(Path(path).resolve())
        for name, path in paths.items()
        if path and Path(path).exists()
    }
    rewards = [r.rpartition(":") for r in cfg.reward]
    return replace(
        cfg,
        **paths,
        reward=[
            f"{Path(path).resolve()}:{function}" if path else function
            for path, _, function in rewards
        ],
    )


def set_up(cfg, config, ranks):
    """Read, check and load everything, make or take up the run directory. -> what `train` needs; raises ValueError

    config  config.json of the run that is to be resumed, or None
    """

    def read(cfg):
        if config:
            must_be_as_before(cfg.resume, config["inputs"])
        cfg, problems, held_out, repeats = read_data(cfg)
        measured = cfg.difficulty == "pass_rate" and any(p.pass_rate is not None for p in problems)
        return cfg, problems, held_out, repeats, resolve_levels(cfg, measured)

    def load():
        if config and (cfg.kl_coef or not checkpoint):
            must_be_as_before(cfg.resume, config["model_files"])
        policy = Policy.load(str(checkpoint or cfg.model), cfg.dtype, ranks.device, cfg.examples)
        reference = (
            Policy.load(cfg.model, cfg.dtype, ranks.device).model if cfg.kl_coef else None
        )  # the starting policy
        return policy, reference, *prepare(cfg, levels, problems, held_out, policy)

    def create():
        resolved = [
            {**asdict(level), "overlong_cache": overlong_cache(cfg, level)} for level in levels
        ]
        Run.create(
            out,
            {
                **asdict(absolute(cfg)),
                "out": str(out),
                "levels": resolved,
                **facts,
                "inputs": inputs(cfg),
                "model_files": model_files(policy.folder),
            },
        )

    cfg, problems, held_out, repeats, levels = ranks.together(lambda: read(cfg))
    if cfg.explain:
        print(explain(cfg, levels))
        return None
    out = Path(
        ranks.from_first(lambda: f"runs/{datetime.now():%Y%m%d-%H%M%S}")
        if cfg.out is None
        else cfg.out
    )
    if not config and ranks.from_first(lambda: os.path.lexists(out)):
        raise ValueError(
            f"--out {out}: exists already; name a new folder, or go on with --resume {out}"
        )
    run = (
        ranks.together(lambda: Run(out, ranks, cfg.keep_checkpoints)) if config else None
    )  # in our hands before it is looked into
    checkpoint = ranks.from_first(lambda: newest_whole(out)) if config else None
    policy, reference, stages, facts = ranks.together(load)
    facts = {"repeats_removed": repeats, **facts, "torch": torch.__version__}
    tqdm.write("; ".join(f"{name} {value}" for name, value in facts.items()))
    if not config:
        ranks.from_first(create)
        run = ranks.together(lambda: Run(out, ranks, cfg.keep_checkpoints))
    learner, progress = Learner(policy.model, ranks, cfg.recompute), Progress()
    if config:
        run.resume(checkpoint, progress, stages, learner)
        tqdm.write(
            f"{out}: "
            + (
                f"goes on after {checkpoint}"
                if checkpoint
                else "there is no checkpoint, so it starts over"
            )
        )
        if config.get("torch") != torch.__version__:
            tqdm.write(
                f"the run began with torch {config.get('torch')}, this is {torch.__version__}: it goes on, but not bit for bit"
            )
    run.begin(progress.update, sum(level.updates for level in levels))
    return cfg, stages, policy, reference, learner, run, progress


def memory(cfg):
    """The table of --plan: nothing is loaded but the data, the tokenizer and the model's config."""
    cfg, problems, held_out, _ = read_data(cfg)
    held_out = held_out if cfg.eval_every != 0 else []
    levels = resolve_levels(
        cfg, cfg.difficulty == "pass_rate" and any(p.pass_rate is not None for p in problems)
    )
    policy = Policy.load(cfg.model, cfg.dtype, "meta", cfg.examples)
    lengths = [len(p.tokens) for p in policy.render(problems + held_out) if policy.room(p)]
    if not lengths:
        raise ValueError(
            f"every prompt is longer than the context of {policy.model.context} tokens"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return plan.table(plan.plan(cfg, levels, policy.model, max(lengths), len(held_out), processes))


def main(arguments=None):
    usage = "%(prog)s [--flag value ...]   (--help lists the flags)"
    parser = HfArgumentParser(
        Config, description=__doc__.split("\n")[0], usage=usage, allow_abbrev=False
    )
    cfg, config = Config(**vars(parser.parse_args(arguments))), None
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        if not first:  # one voice
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w")))
            )
        try:
            if cfg.resume is not None:
                cfg, config = as_started(parser, given_flags(arguments))
            check_flags(cfg)
            if cfg.plan:
                return print(memory(cfg))
            ranks = stack.enter_context(Ranks(cfg.device, cfg.fsdp))
            ready = set_up(cfg, config, ranks)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: error: {data.squash(str(error))}\n" if first else None)
        except KeyboardInterrupt:
            parser.exit(
                128 + signal.SIGINT,
                f"{parser.prog}: interrupted before the run began\n" if first else None,
            )
        code = carry_out(ranks, *ready) if ready else None
        if code:
            sys.exit(code)


def given_flags(arguments):
    """{name: value} of the flags that stand on the command line."""
    parser = HfArgumentParser(Config, allow_abbrev=False)
    parser.set_defaults(**dict.fromkeys((f.name for f in fields(Config)), MISSING))
    return {
        name: value
        for name, value in vars(parser.parse_args(arguments)).items()
        if value is not MISSING
    }


def carry_out(ranks, cfg, stages, policy, reference, learner, run, progress):
    """Train, save whatever ends it, and say what there is to see. -> the exit code, or None"""
    grader = Grader(allow_last_number=cfg.allow_last_number)
    ended = code = None
    with ranks.signals():
        try:
            train(cfg, stages, policy, reference, learner, grader, ranks, run, progress)
        except KeyboardInterrupt:
            ended, code = (
                f"interrupted: the state is saved, --resume {run.out} goes on",
                128 + (ranks.signal or signal.SIGINT),
            )
        except Stop as stop:
            ended, code = str(stop), 1
            if stop.__cause__ and ranks.first:
                traceback.print_exception(stop.__cause__)
        except Exception:  # of the code itself, and perhaps of this process alone, so that none must wait for another
            if ranks.size == 1 and not learner.torn:
                run.save(progress, stages, policy, learner)
            raise
        finally:
            run.bar.close()
        try:
            if code != 1 or not progress.broken:  # else the last good checkpoint is better
                run.save(progress, stages, policy, learner)
        except Stop as stop:
            ended, code = f"{ended}; {stop}" if ended and ended != str(stop) else str(stop), 1
    grader.close()
    if not ranks.first:
        return code
    failures = {kind: grader.counts[kind] for kind in (TIMEOUT, ERROR) if grader.counts[kind]}
    if failures:
        print(f"grader failures, counted as wrong: {failures}")
    if run.evaluations:
        print(run.table(stages, cfg.schedule))
    if run.saved:
        print(f"model:   {run.out / 'checkpoints' / run.saved}")
    if ended:
        print(f"{Path(sys.argv[0]).name}: {ended}", file=sys.stderr)
    elif progress.update:
        from tools import report  # matplotlib takes a second to import

        print(f"picture: {report.draw([run.out])}")
    return code


if __name__ == "__main__":
    main()
