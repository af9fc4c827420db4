"""What a run reads: problems, the policy, and the levels that they make.

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
from dataclasses import dataclass

from tqdm import tqdm

import data
from common.files import explained, sha256, stem, stems
from eprli import Buffer, LevelState
from policy import lora
from policy.checkpoint import Policy, digest, weights_digest
from policy.memory import slots_that_fit
from rewards import MATH, identity, load_reward
from run.config import levels_of


@dataclass(frozen=True)
class Inputs:
    """What a run works with.

    levels    [LevelState, ...]
    held_out  see `cut_held_out`
    left_out  {why: number of training problems that belong to no level}
    read      {flag: digest of what it named}: a resumed run must find the same
    """

    policy: Policy
    levels: list
    held_out: list
    left_out: dict
    read: dict


def read_inputs(cfg, train_set, model, device):
    """Return the Inputs of a run. Raises ValueError or OSError.

    train_set  see `read_train_set`
    model      cfg.model, or the checkpoint that a resumed run continues from
    """
    problems = read_held_out(cfg)
    policy = load_policy(cfg, model, device)
    levels, left_out = make_levels(cfg, train_set, policy)
    held_out = cut_held_out(cfg, levels, problems, policy)
    read = {
        "--data": digest(train_set),
        **{f"--eval-data {stem(path)}": digest(problems[path]) for path in problems},
        "--reward": list(map(identity, cfg.reward)),
        "--examples or --template": digest(data.read_prompting(cfg)),
    }
    return Inputs(policy, levels, held_out, left_out, read)


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


def start_digest(folder):
    """Return a digest of the starting model, which is read again without a checkpoint, for the KL
    term, or as the frozen weights of LoRA."""
    return weights_digest(folder) + sha256(folder / "config.json")[:12]


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


def default_slots(inputs):
    """Return for each level the number of slots that fit, for the longest prompt and completion
    that it samples, or that an evaluation samples at its length."""
    evaluated, slots = sum((prompts for _, prompts, _ in inputs.held_out), []), []
    for state in inputs.levels:
        longest = max((len(p.tokens) for p in state.order.prompts + evaluated), default=0)
        slots.append(slots_that_fit(inputs.policy.model, longest + state.level.max_new_tokens))
    return slots
