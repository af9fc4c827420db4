"""EPRLI (arXiv 2508.01604): reinforcement learning of mathematics, level by level of difficulty.

    python train.py                                                     the shipped model and problems, minutes on a laptop
    python train.py --model DIR_OR_HUB_NAME --data F.jsonl --eval-data G.jsonl

`train` is the algorithm, `learn` its gradient step, eprli.py the equations in both. Per-level flags take one value for
all levels, or one per level.
"""

import copy
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import GenerationConfig, HfArgumentParser

import data
from data import QUALITY
from eprli import Buffer, Group, Level, clipped_objective, diagnostics, group_advantage, kl_penalty, length_reward, loss_weight
from eval import MAX_NEW_TOKENS, SHIPPED, SLOTS, TRAINING, Policy, attempt, evaluation_keys, interval
from model import micro_batches, pad, token_logprobs
from rewards import ERROR, TIMEOUT, Grader, load_reward, writes_steps
from rollout import stream

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # of AdamW: verl's defaults, which DeepScaleR and FastCuRL used
MOST_SKIPS = 3  # updates in a row that a level may fail to fill its buffer, before it ends (algorithm, reading 7)
MOST_FAILURES = 0.05  # share of an update's completions on which the grader may fail without a word
SHOW_EVERY = 25  # updates between two looks at full completions: eyes find reward hacking before plots do


# -------------------------------------------------------------------------------------------------------------- flags


def flag(default, help, source="ours"):
    keep = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**keep, metadata={"help": f"{help} [{source}]"})


@dataclass(frozen=True)
class Config:
    """Every flag: default, unit, source. Those of type list are per level."""

    model: str = flag(str(SHIPPED / "tiny"), "checkpoint folder or hub name (Llama, Qwen2 or Qwen3)")
    data: str = flag(str(SHIPPED / "train.jsonl"), 'training problems, JSONL of {"problem", "answer"}')
    eval_data: str | None = flag(None, "held-out problems; default: the shipped ones for the shipped data, else none")
    difficulty: Literal["pass_rate", "level"] = flag("pass_rate", "cuts the levels: 1 - pass rate, or the declared number", "paper")
    out: str | None = flag(None, "run directory to create; default runs/<date-time>")
    seed: int = flag(0, "seed of everything random")
    device: Literal["cpu", "cuda"] = flag("cuda" if torch.cuda.is_available() else "cpu", "where the model lives")
    dtype: Literal["float32", "bfloat16", "float64"] = flag("float32", "of the weights; bfloat16 has float32 masters")

    quality: list[float] | None = flag(
        None, f"Q_l, upper bound of difficulty; default {QUALITY}, or one level of everything if no problem has a pass rate",
        "paper: two levels; where they are cut: ours",
    )
    group_size: list[int] = flag([16], "G_l, completions per prompt", "paper")
    prompts: list[int] | None = flag(None, "P_l, prompts per draw; default N_l", "ours")
    buffer_groups: list[int] = flag([16], "N_l, groups that an update trains on", "ours; FastCuRL 64-128")
    max_new_tokens: list[int] = flag([MAX_NEW_TOKENS], "Len_l, longest completion, tokens", "ours; DeepScaleR 8192-24576")
    eps_low: list[float] = flag([0.2], "ratio's lower clip bound is 1 - eps_low", "DAPO")
    eps_high: list[float] = flag([0.28], "ratio's upper clip bound is 1 + eps_high", "DAPO")
    length_weight: list[float] = flag([0.0], "K_l, weight of the length reward", "paper: ablated at 0; DAPO: 0.5 on our scale")
    reward: list[str] = flag(["math"], "R_l: math, or path.py:function", "paper: verifiable outcome")
    inner_epochs: list[int] = flag([1], "mu_l, passes over an update's groups", "DeepScaleR, FastCuRL")
    updates: list[int] = flag([60], "M_l, updates of the level", "ours")

    lr: float = flag(1.5e-4, "peak learning rate of AdamW", "ours, for 0.8 M parameters; DeepScaleR 1e-6 for 1.5 B")
    warmup: int = flag(10, "updates of linear warm-up", "DAPO")
    lr_decay: Literal["none", "linear", "cosine"] = flag("linear", "from the peak to 0 at the last update", "ours; DeepScaleR none")
    minibatches: int = flag(2, "optimizer steps per pass over the update's groups", "FastCuRL: 128 / 64 prompts")
    micro_batch_tokens: int = flag(4096, "padded tokens per backward pass; memory only, never changes the result")
    slots: int = flag(SLOTS, "completions decoded together; memory and speed only")
    temperature: float = flag(1.0, "of the softmax, in sampling and learning alike", "DAPO; DeepScaleR 0.6")
    loss_norm: Literal["sequence", "token", "constant"] = flag("sequence", "how tokens are averaged: Eq. 1, DAPO, Dr. GRPO", "paper")
    adv_std: Literal["group", "none"] = flag("group", "divide advantages by the group's std, or not (Dr. GRPO)", "paper")
    filter: Literal["mixed", "all"] = flag("mixed", "groups to keep: those whose outcomes differ, or all", "paper, DAPO")
    length_kind: Literal["overlong", "kimi", "cosine"] = flag("overlong", "length reward", "DAPO; used where K_l > 0")
    overlong_cache: int | None = flag(None, "last tokens, over which `overlong` falls to -1; default Len_l / 5", "DAPO: 4096 of 20480")
    schedule: Literal["sequential", "interleaved"] = flag("sequential", "levels one after the other, or taking turns", "paper")
    kl_coef: float = flag(0.0, "weight of the k3 penalty towards the starting policy", "paper: none; DeepScaleR 0.001")
    max_draws: int = flag(10, "draws per update before it is skipped", "DAPO")
    max_grad_norm: float = flag(1.0, "gradient norm is clipped to this", "DAPO")
    eval_every: int | None = flag(None, "updates between evaluations; default: at ends of levels alone; 0: none at all")
    save_every: int = flag(0, "updates between checkpoints; 0: only at the end")
    examples: str | None = flag(None, "JSONL of worked examples {problem, solution} to put in front of every problem")
    allow_last_number: bool = flag(False, "without a box, grade the last number")
    explain: bool = flag(False, "print the resolved objective with its numbers, and stop")


PER_LEVEL = [f.name for f in fields(Level)]


def check_flags(cfg):
    """Raise ValueError for what no data can make right."""
    positive, natural = (lambda v: 0 < v < math.inf, "above 0"), (lambda v: v >= 1, "at least 1")
    not_negative = (lambda v: 0 <= v < math.inf, "at least 0")
    wanted = {
        "group_size": (lambda v: v >= 2, "at least 2: a group of one has no advantage"),
        "buffer_groups": (lambda v: v >= cfg.minibatches, f"at least --minibatches ({cfg.minibatches})"),
        "quality": (lambda v: 0 < v <= 1 or (math.isfinite(v) and cfg.difficulty == "level"), "in (0, 1]: a difficulty is 1 - pass rate"),
        "eps_low": (lambda v: 0 <= v < 1, "in [0, 1)"),
        **dict.fromkeys(("lr", "temperature", "max_grad_norm"), positive),
        **dict.fromkeys(("eps_high", "length_weight", "warmup", "kl_coef", "eval_every", "save_every", "seed"), not_negative),
        **dict.fromkeys(("prompts", "max_new_tokens", "inner_epochs", "updates", "minibatches", "micro_batch_tokens", "slots",
                         "overlong_cache", "max_draws"), natural),
    }
    for name, (good, words) in wanted.items():
        value = getattr(cfg, name)
        for v in [] if value is None else value if isinstance(value, list) else [value]:
            if not good(v):
                raise ValueError(f"--{name.replace('_', '-')} must be {words}, found {v}")


def resolve_levels(cfg, measured):
    """The levels that the per-level flags describe: each flag one value, or L; L is the longest."""
    given = {name: getattr(cfg, name) for name in PER_LEVEL}
    given["prompts"] = given["prompts"] or given["buffer_groups"]
    if given["quality"] is None:
        if cfg.difficulty == "level":
            raise ValueError("--difficulty level needs --quality: the highest declared number of each level, e.g. --quality 1 2")
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
                f"--{longest.replace('_', '-')} has {num_levels} values, so there are {num_levels} levels, and "
                f"--{name.replace('_', '-')} needs 1 or {num_levels} values, not {len(values)}{'' if getattr(cfg, name) else ' as by default'}"
            )
    levels = [Level(**{name: v[min(i, len(v) - 1)] for name, v in given.items()}) for i in range(num_levels)]
    if cfg.overlong_cache and cfg.overlong_cache > min(level.max_new_tokens for level in levels):
        raise ValueError(f"--overlong-cache {cfg.overlong_cache} exceeds --max-new-tokens: every completion would be punished")
    return tuple(levels)


def overlong_cache(cfg, level):
    return cfg.overlong_cache or max(1, level.max_new_tokens // 5)


def explain(cfg, levels):
    """The resolved objective as a formula with its numbers, each with its source ("given": a flag changed it)."""
    default = Config()
    source = {f.name: f.metadata["help"].rpartition("[")[2].rstrip("]") for f in fields(Config)}
    source |= {f.name: "given" for f in fields(Config) if getattr(cfg, f.name) != getattr(default, f.name)}

    def show(name, value=None):
        value = getattr(cfg, name) if value is None else value
        return f"{value:g} [{source[name]}]" if isinstance(value, float) else f"{value} [{source[name]}]"

    mean = {"sequence": "1/B sum_i 1/T_i sum_t", "token": "1/(sum_i T_i) sum_i sum_t", "constant": "1/B sum_i 1/Len sum_t"}
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


def turns(stages, schedule):
    """The stage of every update: one after the other, or each in turn, until all are over."""
    if schedule == "interleaved":
        while any(not stage.over for stage in stages):
            yield from (stage for stage in stages if not stage.over)
    else:
        for stage in stages:
            while not stage.over:
                yield stage


def train(cfg, stages, policy, grader, run):
    """The loop of the paper; the comments quote the algorithm box of the README."""
    optimizer = Optimizer(policy.model)
    reference = copy.deepcopy(policy.model).requires_grad_(False) if cfg.kl_coef else None  # the starting policy
    trained = 0  # updates that changed the policy; a skipped one does not
    run.evaluate(0, stages, policy, grader)
    for update, stage in enumerate(turns(stages, cfg.schedule), 1):     # for level l = 1 .. L: for update = 1 .. M_l:
        level, buffer, stats = stage.level, stage.buffer, Stats(update, stage)
        stats.lr = optimizer.set_lr(cfg, update, sum(s.level.updates for s in stages))

        buffer.expire(trained)                                          # pi_old <- pi, remembered as log-probs
        while buffer.pending < level.buffer_groups and stats.draws < cfg.max_draws:                     # repeat
            groups = draw(cfg, stage, policy, grader, trained, stats)   # P_l prompts, G_l completions each, their rewards
            buffer.add(groups)                                          # keep a group iff its R_l are not all equal
        with uninterrupted():                                           # until the buffer holds N_l groups
            if buffer.pending >= level.buffer_groups:
                learn(cfg, level, policy.model, reference, optimizer, buffer.take(level.buffer_groups), trained, stats)
                trained, stage.skipped = trained + 1, 0
            else:
                stage.skipped += 1                                      # never train on less
            stage.updates += 1
            if stage.over:
                buffer.close()
            run.log(stats, stage)

        if stage.over or (cfg.eval_every and update % cfg.eval_every == 0):
            run.evaluate(update, stages, policy, grader)
        if cfg.save_every and update % cfg.save_every == 0:
            run.save(update, policy)


@contextmanager
def uninterrupted():
    """Hold Ctrl-C back until the block is done: the weights on disk are those of whole updates."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def draw(cfg, stage, policy, grader, trained, stats):
    """Draw P_l prompts, sample G_l completions each from the policy as it is, and score them: a list of Group."""
    level = stage.level
    prompts = list(itertools.islice(stage.problems, level.prompts))
    index = range(stage.drawn, stage.drawn + len(prompts))
    stage.drawn += len(prompts)
    keys = [[stream(cfg.seed, TRAINING, stage.number, d, i) for i in range(level.group_size)] for d in index]
    attempts = attempt(
        policy, grader, prompts, keys, max_new_tokens=level.max_new_tokens, temperature=cfg.temperature,
        slots=cfg.slots, progress=True, clock=stats.seconds,
    )
    groups = [score(cfg, stage, prompt, group, trained) for prompt, group in zip(prompts, attempts)]
    stats.drew(prompts, attempts, groups)
    return groups


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
        prompt=prompt.tokens, completions=[a.completion for a in attempts], outcome=torch.tensor(outcome, dtype=torch.float64),
        length_reward=level.length_weight * length, update=trained,
    )


def own_reward(stage, problem, response):
    """The user's R_l of one completion; whatever is wrong with it is said with its name and the problem."""
    where = f"--reward {stage.level.reward}, problem {problem.id}"
    try:
        value = float(stage.reward(problem.record(), response))
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"{where}: returned {value}, expected a finite number")
    return value


@dataclass(frozen=True)
class Sample:
    """One completion to train on."""

    prompt: list
    completion: object
    advantage: float
    fresh: bool  # sampled from the policy as it is before this update's first step


def learn(cfg, level, model, reference, optimizer, groups, trained, stats):
    """mu_l passes over the groups, minibatch by minibatch: each is one step of ascent on J_l."""
    start = time.perf_counter()
    samples = []  # one list per group
    for group in groups:
        advantage = group_advantage(group.reward, cfg.adv_std).tolist()                                 # A_i
        fresh = group.update == trained
        samples.append([Sample(group.prompt, c, A, fresh) for c, A in zip(group.completions, advantage)])
    for epoch in range(level.inner_epochs):                                                             # mu_l times
        random.Random(f"{cfg.seed}/minibatches/{stats.update}/{epoch}").shuffle(samples)
        bounds = [len(samples) * i // cfg.minibatches for i in range(cfg.minibatches + 1)]
        for low, high in zip(bounds, bounds[1:]):                                                       # minibatch by minibatch
            backward(cfg, level, model, reference, list(itertools.chain(*samples[low:high])), stats)
            stats.grad_norms.append(optimizer.step(cfg.max_grad_norm))
    stats.seconds["learn"] += time.perf_counter() - start


def backward(cfg, level, model, reference, step, stats):
    """Add the gradient of -J_l over the samples of one optimizer step; how it is cut into micro-batches changes nothing."""
    num_tokens = sum(len(s.completion.tokens) for s in step)  # of the whole step, counted before its first backward
    for rows in micro_batches([s.prompt for s in step], [s.completion.tokens for s in step], cfg.micro_batch_tokens):
        micro = [step[i] for i in rows]
        ids, mask = pad([s.prompt for s in micro], [s.completion.tokens for s in micro], model.device)
        logprob, entropy = token_logprobs(model, ids, mask, cfg.temperature)
        sampled = torch.tensor([x for s in micro for x in s.completion.logprobs], dtype=logprob.dtype, device=model.device)
        logprob_old = torch.zeros_like(logprob).masked_scatter(mask, sampled)
        advantage = torch.tensor([s.advantage for s in micro], dtype=logprob.dtype, device=model.device)
        weight = loss_weight(cfg.loss_norm, mask.sum(1).to(logprob), len(step), num_tokens, level.max_new_tokens)
        J = clipped_objective(logprob, logprob_old, advantage, weight, mask, level.eps_low, level.eps_high)  # Eq. 1
        if reference is not None:
            with torch.no_grad():
                logprob_ref, _ = token_logprobs(reference, ids, mask, cfg.temperature)
            J = J - cfg.kl_coef * kl_penalty(logprob, logprob_ref, weight, mask)
        (-J).backward()
        stats.learned(J, diagnostics(logprob, logprob_old, entropy, advantage, mask, level.eps_low, level.eps_high))
        if not stats.grad_norms:  # before the first step the learner is the sampler: what differs is rounding
            fresh = torch.tensor([s.fresh for s in micro], device=mask.device)
            stats.compare(logprob, logprob_old, mask & fresh[:, None])


class Optimizer:
    """AdamW. Weights of less than float32 are copies of float32 masters, which own gradients and moments: an update of
    1e-6 of a weight would vanish in bfloat16."""

    def __init__(self, model):
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype.itemsize >= 4 else w.detach().float() for w in self.weights]
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                master.grad = torch.zeros_like(master)
                weight.register_post_accumulate_grad_hook(lambda w, master=master: self.collect(w, master))
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY)

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
        """One step; returns the gradient's norm before it was clipped. A norm that is not finite is an error.

        A gradient of exactly 0 (flat groups alone) moves nothing: neither by Adam's momentum nor by weight decay.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm, error_if_nonfinite=True).item()
        if norm:
            self.adamw.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters):
                if master is not weight:
                    weight.copy_(master)
        self.adamw.zero_grad(set_to_none=self.masters[0] is self.weights[0])
        return norm


# ---------------------------------------------------------------------------------------------------------------- log


class Stats:
    """What happens in one update, and its line of metrics.jsonl (defined in README.md)."""

    def __init__(self, update, stage):
        self.update, self.level, self.counts_before = update, stage.number, Counter(stage.buffer.counts)
        self.start, self.seconds, self.draws, self.drawn = time.perf_counter(), Counter(), 0, []
        self.sums, self.objectives, self.grad_norms, self.ratio_max, self.gap, self.lr = Counter(), [], [], None, None, 0.0

    def drew(self, prompts, attempts, groups):
        self.draws += 1
        self.drawn += [(p, a, group, i) for p, many, group in zip(prompts, attempts, groups) for i, a in enumerate(many)]

    def learned(self, J, sums):
        self.objectives.append(J.item())
        self.ratio_max = max(self.ratio_max or 0.0, sums["ratio_max"])
        self.sums.update(sums)

    def compare(self, logprob, logprob_old, mask):
        if mask.any():
            self.gap = max(self.gap or 0.0, (logprob - logprob_old).detach()[mask].abs().max().item())

    def row(self, buffer):
        seconds = time.perf_counter() - self.start
        reward = torch.tensor([group.reward[i] for _, _, group, i in self.drawn], dtype=torch.float64)
        sampled = sum(a.length for _, a, _, _ in self.drawn)
        mean = lambda values: sum(values) / len(self.drawn) if self.drawn else None  # noqa: E731  over completions drawn
        per_token = lambda name: self.sums[name] / self.sums["tokens"] if self.sums["tokens"] else None  # noqa: E731
        fates = ("drawn", "kept", "all_right", "all_wrong", "stale")
        row = {
            "update": self.update, "level": self.level,
            "accuracy": mean(a.right for _, a, _, _ in self.drawn),
            "reward_mean": mean(reward.tolist()),
            "reward_std": reward.std(correction=0).item() if self.drawn else None,
            "outcome_mean": mean(group.outcome[i].item() for _, _, group, i in self.drawn),
            "length_reward_mean": mean(group.length_reward[i].item() for _, _, group, i in self.drawn),
            "length_mean": mean(a.length for _, a, _, _ in self.drawn),
            "truncated_share": mean(not a.completion.stopped for _, a, _, _ in self.drawn),
            "writes_steps_share": mean(writes_steps(a.text) for _, a, _, _ in self.drawn),
            **{f"grader_{kind}s": sum(a.verdict == kind for _, a, _, _ in self.drawn) for kind in (TIMEOUT, ERROR)},
            **{f"groups_{fate}": buffer.counts[fate] - self.counts_before[fate] for fate in fates},
            "groups_pending": buffer.pending,
            "objective": sum(self.objectives) / len(self.grad_norms) if self.grad_norms else None,
            "entropy": per_token("entropy"),
            "clip_low_share": per_token("clip_low"), "clip_high_share": per_token("clip_high"),
            "ratio_max": self.ratio_max, "kl_old": per_token("kl_old"), "logprob_gap_max": self.gap,
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms) if self.grad_norms else None,
            "lr": self.lr, "tokens_sampled": sampled, "tokens_trained": self.sums["tokens"],
            **{f"{phase}_seconds": self.seconds[phase] for phase in ("sample", "grade", "learn")},
            "tokens_per_second": sampled / seconds, "peak_memory_mb": peak_memory_mb(),
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON knows no nan


def peak_memory_mb():
    """Of the GPU where there is one, else of this process (Linux counts in KiB, macOS in bytes)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Run:
    """The run directory: the program's memory. Lines are written whole and at once, so an interrupt loses none."""

    def __init__(self, cfg, levels, out, facts):
        self.cfg, self.out, self.evaluations, self.saved = cfg, out, [], None
        (out / "checkpoints").mkdir(parents=True)
        resolved = [{**asdict(level), "overlong_cache": overlong_cache(cfg, level)} for level in levels]
        flags = {k: v for k, v in asdict(cfg).items() if k not in (*resolved[0], "explain")}
        (out / "config.json").write_text(json.dumps({**flags, "out": str(out), "levels": resolved, **facts}, indent=1))
        self.bar = tqdm(total=sum(level.updates for level in levels), unit="update", smoothing=0.1)

    def append(self, name, rows):
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def log(self, stats, stage):
        row = stats.row(stage.buffer)
        self.append("metrics.jsonl", [row])
        self.append("completions.jsonl", (
            {"update": stats.update, "level": stats.level, "problem_id": p.problem.id, "sample": i, "verdict": a.verdict,
             "outcome": group.outcome[i].item(), "length_reward": group.length_reward[i].item(), "tokens": a.length,
             "stopped": a.completion.stopped, "text": a.text}
            for p, a, group, i in stats.drawn
        ))
        self.bar.update()
        number = lambda name, spec: "-" if row[name] is None else format(row[name], spec)  # noqa: E731
        tqdm.write(
            f"level {stage.number} update {stage.updates}/{stage.level.updates} | reward {number('reward_mean', '.3f')} = "
            f"right {number('outcome_mean', '.3f')} + length {number('length_reward_mean', '.3f')} | "
            f"{number('length_mean', '.0f')} tok, {number('truncated_share', '.0%')} cut off | groups {row['groups_kept']} of "
            f"{row['groups_drawn']} drawn, {row['groups_all_right']} all right, {row['groups_all_wrong']} all wrong | "
            f"clipped {number('clip_low_share', '.1%')} + {number('clip_high_share', '.1%')} | kl {number('kl_old', '.0e')} | "
            f"entropy {number('entropy', '.2f')} | grad {number('grad_norm', '.2f')} | {row['tokens_per_second']:,.0f} tok/s"
        )
        failures = row["grader_timeouts"] + row["grader_errors"]
        if failures > MOST_FAILURES * len(stats.drawn):
            tqdm.write(f"  the grader gave up on {failures} of {len(stats.drawn)} completions, which count as wrong: look for the verdicts "
                       f"{TIMEOUT!r} and {ERROR!r} in {self.out / 'completions.jsonl'}")
        if stage.skipped:
            tqdm.write(f"  update {stats.update} skipped: {stats.draws} draws of {stage.level.prompts} prompts did not fill the buffer")
        if stage.skipped == MOST_SKIPS:
            tqdm.write(
                f"  level {stage.number} ends early after {MOST_SKIPS} skipped updates: raise --max-draws or --prompts, or choose another "
                "--quality if most groups were all right or all wrong"
            )
        if stats.drawn and stats.update % SHOW_EVERY == 1:
            for p, a, _, _ in stats.drawn[:: max(1, len(stats.drawn) // 2)][:2]:
                tqdm.write(f"  {p.problem.problem}  ->  {a.text}  ({a.verdict}; answer {p.problem.answer})")

    def evaluate(self, update, stages, policy, grader):
        """Held-out accuracy of every level: one sample a problem at the training temperature."""
        if self.cfg.eval_every == 0:
            return
        for stage in stages:
            if stage.evaluation:
                keys = evaluation_keys(self.cfg.seed, stage.evaluation, 1)
                attempts = attempt(
                    policy, grader, stage.evaluation, keys, max_new_tokens=stage.level.max_new_tokens,
                    temperature=self.cfg.temperature, slots=self.cfg.slots, progress=True,
                )
                attempts, n = [a for (a,) in attempts], len(attempts)
                accuracy, low, high = interval([a.right for a in attempts])
                self.evaluations.append({
                    "update": update, "level": stage.number, "accuracy": accuracy, "low": low, "high": high, "n": n,
                    "length_mean": sum(a.length for a in attempts) / n,
                    "writes_steps_share": sum(writes_steps(a.text) for a in attempts) / n,
                })
                self.append("eval.jsonl", self.evaluations[-1:])
                tqdm.write(f"  held out, level {stage.number}: {accuracy:.1%} [{low:.1%}, {high:.1%}] of {n} right after {update} updates")

    def save(self, update, policy):
        """checkpoints/000123, a Hugging Face folder; written elsewhere and renamed, so that it is whole or absent."""
        if update == self.saved:
            return
        part = self.out / "checkpoint.part"
        with uninterrupted():
            policy.model.save_pretrained(part)
            policy.tokenizer.save_pretrained(part)
            GenerationConfig(eos_token_id=list(policy.stop_ids), pad_token_id=policy.tokenizer.pad_token_id).save_pretrained(part)
            part.rename(self.out / "checkpoints" / f"{update:06d}")
            self.saved = update

    def table(self, stages):
        """Held-out accuracy of every level (rows) before and after every level (columns), with 95 % intervals."""
        ends = list(itertools.accumulate((stage.updates for stage in stages), initial=0))
        names = ["before", *(f"after level {stage.number}" for stage in stages)]
        if self.cfg.schedule == "interleaved":
            ends, names = [0, ends[-1]], ["before", "after"]
        show = "{accuracy:.1%} [{low:.1%}, {high:.1%}]"
        cells = {(row["update"], row["level"]): show.format(**row) for row in self.evaluations}
        lines = ["held-out accuracy  " + "".join(f"{name:^24}" for name in names)]
        for stage in stages:
            lines.append(f"level {stage.number:<13}" + "".join(f"{cells.get((end, stage.number), '-'):^24}" for end in ends))
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- main


def read_data(cfg):
    """-> cfg with its files resolved, training problems without repeats, held-out problems, number of repeats"""
    shipped = Path(cfg.data).resolve() == (SHIPPED / "train.jsonl").resolve()
    if shipped and not cfg.eval_data:
        cfg = replace(cfg, eval_data=str(SHIPPED / "heldout.jsonl"))
    read = data.read_problems(cfg.data)
    problems = data.without_repeats(read)
    return cfg, problems, data.read_problems(cfg.eval_data) if cfg.eval_data else [], len(read) - len(problems)


def prepare(cfg, levels, problems, held_out):
    """Cut the levels, load and render everything before minutes are spent. -> policy, stages, facts for config.json"""
    qualities = [level.quality for level in levels]

    def cut(name, problems):
        if problems and all(data.difficulty(p, cfg.difficulty) is None for p in problems):
            tqdm.write(f"{name}: no problem has a {cfg.difficulty}, so all of them stand for every level")
            return [problems] * len(levels), {}
        return data.cut_levels(problems, qualities, cfg.difficulty)

    train_sets, left_out = cut(cfg.data, problems)
    held_out_sets, held_out_left_out = cut(cfg.eval_data, held_out)
    if held_out and not any(held_out_sets):
        raise ValueError(f"{cfg.eval_data}: no problem falls into any level (left out: {held_out_left_out}); see --quality")
    rewards = [load_reward(level.reward) for level in levels]
    policy = Policy.load(cfg.model, cfg.dtype, cfg.device, cfg.examples)
    stages, too_long = [], 0
    for number, (level, train_set, held_out_set, reward) in enumerate(zip(levels, train_sets, held_out_sets, rewards), 1):
        if not train_set:
            raise ValueError(f"level {number} (Q = {level.quality:g}) has no problem: choose another --quality ({cfg.data} left out: {left_out})")
        rendered = policy.render(train_set)
        prompts = [p for p in rendered if policy.room(p)]
        too_long += len(rendered) - len(prompts)
        if not prompts:
            raise ValueError(f"level {number}: every prompt is longer than the context of {policy.model.context} tokens")
        order = data.endless(prompts, cfg.seed, number)
        buffer = Buffer(keep_flat=cfg.filter == "all")
        stages.append(Stage(number, level, order, policy.render(held_out_set), reward, buffer))
        tqdm.write(f"level {number}: difficulty up to {level.quality:g}, {len(prompts)} problems, {len(held_out_set)} held out")
    if qualities != sorted(qualities):
        tqdm.write('Q decreases: the harder level trains first. The paper says both "Q1 < Q2" and "Q_{l-1} > Q_l"; see eprli.py')
    exact, near = data.overlap(problems, held_out)
    facts = {"overlap_with_eval": len(exact), "near_overlap_with_eval": len(near), "prompts_too_long": too_long,
             "left_out": left_out, "eval_left_out": held_out_left_out}
    return policy, stages, facts


def main(arguments=None):
    usage = "%(prog)s [--flag value ...]   (--help lists the flags)"
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], usage=usage, allow_abbrev=False)
    cfg = Config(**vars(parser.parse_args(arguments)))
    try:
        check_flags(cfg)
        cfg, problems, held_out, repeats = read_data(cfg)
        measured = cfg.difficulty == "pass_rate" and any(p.pass_rate is not None for p in problems)
        levels = resolve_levels(cfg, measured)
        if cfg.explain:
            return print(explain(cfg, levels))
        out = Path(cfg.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}")
        if out.exists():
            raise ValueError(f"--out {out}: exists already; name a new folder")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("training runs in one process: use torchrun --nproc_per_node=1, or plain python")
        policy, stages, facts = prepare(cfg, levels, problems, held_out)
        facts = {"repeats_removed": repeats, **facts, "torch": torch.__version__}
        tqdm.write("; ".join(f"{name} {value}" for name, value in facts.items()))
        run = Run(cfg, levels, out, facts)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    grader = Grader(allow_last_number=cfg.allow_last_number)
    interrupted = False
    try:
        train(cfg, stages, policy, grader, run)
    except KeyboardInterrupt:
        interrupted = True
    finally:  # whatever ended the run, its state is not lost
        run.save(sum(stage.updates for stage in stages), policy)
        run.bar.close()
    failures = {kind: grader.counts[kind] for kind in (TIMEOUT, ERROR) if grader.counts[kind]}
    if failures:
        print(f"grader failures, counted as wrong: {failures}")
    if run.evaluations:
        print(run.table(stages))
    if run.bar.n:
        import report  # matplotlib takes a second to import

        print(f"picture: {report.draw([out])}")
    print(f"model:   {out / 'checkpoints' / f'{run.saved:06d}'}")
    if interrupted:
        sys.exit("interrupted: the state after the last whole update was saved")


if __name__ == "__main__":
    main()
