"""A run as it begins: a new one, or one that is resumed from its directory.

The way of a line of --data, and what is left out on it:

    data.read_problems      it becomes a Problem
    data.without_repeats    left out: a problem that stands further up, but for blanks
    data.only_gradable      left out: an answer that the grader cannot compare with others
    data.cut_by_difficulty  it comes to a level (or to several with one Q_l); left out: what is
                            always solved, unmeasured, or harder than all Q_l
    Policy.render           it becomes a Prompt: tokens
    make_levels             left out: a prompt that leaves no room for a completion
    data.Order              train.draw takes its level's prompts in a random order

From there on train.py shows the way. The prompt is completed and scored (policy.attempt). It
becomes a Group with its advantages (train.make_group), which waits in its level's Buffer, and is
cut into Samples (train.learn), minibatches, and micro-batches, whose objective is train.objective.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import data
from common.files import explained, sha256, source_of, stem, stems
from eprli import Buffer, LevelState
from policy import lora, packed
from policy.attempt import Solver
from policy.checkpoint import Policy, digest, find_folder, weights_digest
from policy.learner import Learner
from policy.memory import slots_that_fit
from rewards import MATH, Scorer, identity, load_reward
from run.config import levels_of, resolve
from run.directory import RunDirectory, checkpoints, create
from run.state import Run


def start_run(flags, ranks):
    """A new run. It makes its directory once its inputs are read, and deletes it if the run cannot
    begin.

    flags  see run.config.parse
    Raises ValueError or OSError, on all processes.
    """
    if flags.out and ranks.from_first(lambda: os.path.lexists(flags.out)):
        raise ValueError(
            f"--out {flags.out}: exists already; name a new folder, or go on with --resume"
        )
    train_set, counts = ranks.on_all(lambda: read_train_set(flags))
    cfg = resolve(flags, measured=any(p.pass_rate is not None for p in train_set))
    held_out = ranks.on_all(lambda: read_held_out(cfg))
    policy = ranks.on_all(lambda: load_policy(cfg, cfg.model, ranks.device))
    ranks.on_all(lambda: check_measured(cfg, train_set, weights_digest(policy.folder)))
    levels, left_out = ranks.on_all(lambda: make_levels(cfg, train_set, policy))
    bins = ranks.on_all(lambda: cut_held_out(cfg, levels, held_out, policy))
    if not cfg.slots:
        own = default_slots(levels, bins, policy)
        cfg = replace(cfg, slots=list(map(min, zip(*ranks.gather(own)))))
    read = digests(cfg, train_set, held_out) | {"--model": start_digest(policy.folder)}
    config = {
        **with_full_paths(cfg),
        **computing(cfg),
        "began": f"{datetime.now():%Y-%m-%d %H:%M}",
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "problems": [len(state.order.prompts) for state in levels],
        **counts,
        "left_out": left_out,
        "read": read,
    }
    out = ranks.from_first(lambda: create(cfg.out, config))
    directory = ranks.on_all(lambda: RunDirectory(out, ranks))
    try:
        run = make_run(cfg, directory, ranks, levels, bins, policy)
        ranks.on_all(run.start_tracker)
        return run
    except BaseException:  # nothing has begun: an error of the tracker, a GPU without memory
        if ranks.first:
            shutil.rmtree(out, ignore_errors=True)
        raise


def resume_run(cfg, config, ranks):
    """The run of a directory, from its newest checkpoint.

     1. run.config.as_started has taken the flags from its config.json.
     2. Lock the directory. Nothing in it has been read but config.json.
     3. Find the newest checkpoint.
     4. Say what differs on this machine.
     5. Read data and policy as a new run does. Problems, prompts and rewards must be unchanged, and
        the starting model too, if it is still needed.
     6. Take up the state: counters, waiting groups, order of problems, optimizer.
     7. Cut the logs back to what they were at the checkpoint.

    What refuses to go on leaves the logs as they are: 7. checks all before it cuts one.

    config  its config.json
    Raises ValueError or OSError, on all processes.
    """
    directory = ranks.on_all(lambda: RunDirectory(cfg.out, ranks))  # locked before it is read
    checkpoint = ranks.from_first(lambda: next(iter(checkpoints(cfg.out)), None))
    for name, now in computing(cfg).items():
        if now != config.get(name):  # None: a run of earlier code
            tqdm.write(f"{name} {config.get(name)}, now {now}: the run is not bit for bit the same")
    train_set, _ = ranks.on_all(lambda: read_train_set(cfg))
    held_out = ranks.on_all(lambda: read_held_out(cfg))
    read = ranks.on_all(lambda: digests(cfg, train_set, held_out))
    if cfg.kl_coef or cfg.lora_rank or not checkpoint:
        read["--model"] = ranks.on_all(lambda: start_digest(find_folder(cfg.model)))
    for name, before in config["read"].items():
        if read.get(name, before) != before:
            raise ValueError(
                f"--resume {cfg.out}: {name} is not what it was when the run began: put it back, "
                f"or start a new run from a checkpoint (--model {cfg.out}/checkpoints/...)"
            )
    policy = ranks.on_all(lambda: load_policy(cfg, checkpoint or cfg.model, ranks.device))
    levels, _ = ranks.on_all(lambda: make_levels(cfg, train_set, policy))
    bins = ranks.on_all(lambda: cut_held_out(cfg, levels, held_out, policy))
    run = make_run(cfg, directory, ranks, levels, bins, policy)
    sizes = run.resume(checkpoint) if checkpoint else None
    ranks.from_first(lambda: directory.cut_logs(sizes))  # the last that may refuse
    ranks.on_all(run.start_tracker)
    tqdm.write(f"{cfg.out}: goes on after {checkpoint or 'nothing: there is no checkpoint'}")
    return run


def make_run(cfg, directory, ranks, levels, bins, policy):
    reference = None  # the starting policy's model, if the objective needs it
    if cfg.kl_coef:
        reference = Policy.load(cfg.model, cfg.dtype, ranks.device).model
    learner = Learner(policy.model, ranks)
    solver = Solver(policy, Scorer(cfg.reward_timeout), show_progress=ranks.first)
    return Run(cfg, directory, ranks, policy, reference, learner, solver, levels, bins)


def default_slots(states, bins, policy):
    """Return for each level the number of slots that fit, for the longest prompt and completion
    that it samples, or that an evaluation samples at its length."""
    evaluated, slots = sum((prompts for _, prompts, _ in bins), []), []
    for state in states:
        longest = max((len(p.tokens) for p in state.order.prompts + evaluated), default=0)
        slots.append(slots_that_fit(policy.model, longest + state.level.max_new_tokens))
    return slots


# -------------------------------------------------------------------------------------- config.json


def computing(cfg):
    """What decides the bits of a run, beside its flags and inputs."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "packed": packed.has_kernel(getattr(torch, cfg.dtype)),
    }


def with_full_paths(cfg):
    """The flags, with paths that mean the same from any folder."""
    flags = asdict(cfg)
    for name in ("model", "data", "examples", "template"):
        flags[name] = full_path(flags[name])
    flags["eval_data"] = list(map(full_path, cfg.eval_data))
    flags["reward"] = [str(Path(r).resolve()) if ":" in r else r for r in cfg.reward]
    return flags


def full_path(name):
    """With the slice behind it. A name of the hub stays as it is."""
    source = source_of(name)
    if not (source and Path(source).exists()):
        return name
    return str(Path(source).absolute()) + name[len(source) :]  # ids hold a link's own name


def start_digest(folder):
    """Of the starting model, which is read again without a checkpoint, for the KL term, or as the
    frozen weights beside LoRA's factors."""
    return weights_digest(folder) + sha256(folder / "config.json")[:12]


# ------------------------------------------------------------------------------------------ inputs


def read_train_set(flags):
    """Return the problems to train on, and counts of those that are not used. Raises ValueError."""
    for name in flags.reward:
        load_reward(name)  # what is wrong with it comes first
    graded = MATH in flags.reward
    problems = data.read_problems(flags.data, flags.columns, must_fit=True, graded=graded)
    different = data.without_repeats(problems)
    train_set = data.only_gradable(flags.data, different) if graded else different
    return train_set, {
        "repeats_removed": len(problems) - len(different),
        "ungradable_left_out": len(different) - len(train_set),
    }


def read_held_out(cfg):
    """Return the problems of every held-out file: {file: [Problem, ...]}. Raises ValueError."""
    stems("--eval-data", cfg.eval_data)
    held_out, graded = {}, MATH in cfg.reward
    for path in cfg.eval_data:
        held_out[path] = data.read_problems(path, cfg.columns, graded=graded)
        if graded:
            data.only_gradable(path, held_out[path])  # says which; in evaluation they stay
    return held_out


def digests(cfg, train_set, held_out):
    """Return {flag: digest of what it named}: what a resumed run must find unchanged."""
    return {
        "--data": digest(train_set),
        **{f"--eval-data {stem(path)}": digest(held_out[path]) for path in held_out},
        "--reward": list(map(identity, cfg.reward)),
        "--examples or --template": digest(data.read_prompting(cfg)),
    }


def load_policy(cfg, model, device):
    """The policy of a checkpoint of this run, or the one that the run starts from (cfg.model)."""
    policy = Policy.load(str(model), cfg.dtype, device, cfg)
    if model == cfg.model and lora.read_config(policy.folder):
        raise ValueError(
            f"--model {model} is an adapter: merge it into its base with PEFT first "
            "(docs/scaling.md)"
        )
    if model == cfg.model and cfg.lora_rank:
        lora.add(policy.model, cfg.lora_rank, seed=cfg.seed)
    return policy


def check_measured(cfg, train_set, weights):
    """Print in what the measurement of the pass rates differs from this run.

    weights  digest of the starting policy's
    """
    if cfg.difficulty != "pass_rate":
        return
    with explained(f'{cfg.data}: "measured" is not what eval.py writes'):
        longest = max(cfg.max_new_tokens)
        now = {"weights": weights, "temperature": cfg.temperature, "max_new_tokens": longest}
        kinds = {json.dumps(p.other.get("measured")) for p in train_set if p.pass_rate is not None}
        for measured in map(json.loads, sorted(kinds)):
            if not measured:
                tqdm.write(f"{cfg.data}: nothing says what measured the pass rates")
                continue
            differ = [
                f"{name} {measured.get(name)}, now {value}"
                for name, value in now.items()
                if measured.get(name) != value
            ]
            if measured.get("samples", 0) < 16:
                differ.append(f"{measured.get('samples')} samples a problem, fewer than 16")
            if differ:
                tqdm.write(
                    f"{cfg.data}: the pass rates were measured otherwise, with "
                    f"{measured.get('model')}: {'; '.join(differ)}"
                )


def make_levels(cfg, train_set, policy):
    """Cut the levels and render everything before minutes are spent.

    -> [LevelState, ...], {why: number of problems that belong to no level}
    """
    parts, left_out = data.cut_by_difficulty(cfg.data, train_set, cfg.quality, cfg.difficulty)
    if None in parts and cfg.difficulty == "level":
        raise ValueError(
            f"--difficulty level: no problem of {cfg.data} has a level that is a number: name its "
            "column (--columns problem=NAME answer=NAME level=NAME), or leave the flag out"
        )
    states, left_out["prompt too long"] = [], 0
    for number, level in enumerate(levels_of(cfg), 1):
        problems = parts.get(None) or parts[number]  # None: one set for every level
        prompts = []
        if level.trains:
            prompts = [prompt for prompt in policy.render(problems) if policy.room(prompt)]
            left_out["prompt too long"] += len(problems) - len(prompts)
            if not prompts:
                raise ValueError(
                    f"level {number} (Q = {level.quality:g}) has no problem: choose another "
                    f"--quality, or look at what {cfg.data} left out: {left_out}"
                )
        order = data.Order(prompts, f"{cfg.seed}/{number}")
        buffer = Buffer(keep_flat=cfg.filter == "all")
        states.append(LevelState(number, level, order, load_reward(level.reward), buffer))
        tqdm.write(
            f"level {number}: difficulty up to {level.quality:g}, {len(problems)} problems"
            f"{'' if level.trains else ', not trained'}"
        )
    tqdm.write(f"{cfg.data} left out: {left_out}")
    prompts = sum((state.order.prompts for state in states), [])
    policy.show(cfg.data, prompts, max(cfg.max_new_tokens))
    return states, left_out


def cut_held_out(cfg, states, held_out, policy):
    """Cut every held-out file into bins of difficulty, at --eval-quality.

    A bin has the R_l of the level with its threshold, else of the last level.
    -> [({what names the bin in eval.jsonl: ...}, its prompts, its R_l), ...]
    """
    rewards = {state.level.quality: state.reward for state in reversed(states)}
    bins = []
    for path, problems in held_out.items():
        file = {"file": stem(path)} if len(held_out) > 1 else {}
        bounds = cfg.eval_quality
        parts, left_out = data.cut_by_difficulty(path, problems, bounds, cfg.difficulty)
        if bounds != cfg.quality and None in parts:
            raise ValueError(f"--eval-quality: no problem of {path} has a {cfg.difficulty}")
        seen, shown = [], []
        for number, some in parts.items():
            if some and some not in seen:  # levels may share their problems
                seen.append(some)
                labels, prompts = file | {"level": number}, policy.render(some)
                quality = None if number is None else bounds[number - 1]
                bins.append((labels, prompts, rewards.get(quality, states[-1].reward)))
                shown += prompts
                tqdm.write(f"held out, {data.name_level(labels)}: {len(some)} problems")
        if not shown:
            raise ValueError(
                f"{path}: no problem falls into any level ({left_out}); see --eval-quality"
            )
        policy.show(path, shown, max(cfg.max_new_tokens))
    return bins
