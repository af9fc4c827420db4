"""From files to levels: what a run trains on, and what it is evaluated on.

The way of a line of --data, and what is left out on it:

    data.read_problems      it becomes a Problem
    data.without_repeats    left out: a problem that stands further up, but for blanks
    data.only_gradable      left out: an answer that the grader cannot compare with others
    cut_by_difficulty       it comes to a level (or to several with one Q_l); left out: what is
                            always solved, unmeasured, or harder than all Q_l
    Policy.render           it becomes a Prompt: tokens
    fitting                 left out: a prompt that leaves no room for a completion
    data.Order              train.draw takes its level's prompts in a random order

From there on train.py shows the way. The prompt is completed and scored (Policy, `attempt`). It
becomes a Group with its advantages (train.make_group), which waits in its level's Buffer, and is
cut into Samples (train.learn), minibatches, and micro-batches (Learner.add_gradients), whose
objective is train.objective.
"""

import json

from tqdm import tqdm

import data
from eprli import Buffer, LevelState, resolve_levels
from files import explained, stem, stems
from policy import lora
from policy.checkpoint import Policy, digest
from rewards import MATH, identity, load_reward


def load_inputs(cfg, model, device, read):
    """Load the policy and make its prompts, by the functions below, in their order.

    model  cfg.model, or the checkpoint that a resumed run goes on from
    read   what `read_data` returns
    -> [LevelState, ...], held-out prompts (see cut_held_out), Policy,
       {fact: what config.json says of the data}
    """
    levels, train_set, held_out, facts = read
    policy = load_policy(cfg, model, device)
    if model == cfg.model:
        with explained(f'{cfg.data}: "measured" is not what eval.py writes'):
            check_measured(cfg, levels, train_set, policy)
    states, cut_facts = make_levels(cfg, levels, train_set, policy)
    longest = max(level.max_new_tokens for level in levels)
    policy.show(cfg.data, sum((state.order.prompts for state in states), []), longest)
    prompts, eval_facts = cut_held_out(cfg, states, held_out, policy)
    return states, prompts, policy, facts | cut_facts | eval_facts


def read_data(cfg):
    """What a run trains on and is evaluated on, before any model is loaded.

    -> the levels, training problems, {file: held-out problems}, {fact: what config.json says of
       them}
    """
    for name in cfg.reward:
        load_reward(name)  # what is wrong with it is said first
    graded = MATH in cfg.reward
    problems = data.read_problems(cfg.data, cfg.columns, must_fit=True, graded=graded)
    different = data.without_repeats(problems)
    train_set = data.only_gradable(cfg.data, different) if graded else different
    held_out, read = {}, {"--data": digest(problems)}
    for path, name in zip(cfg.eval_data, stems("--eval-data", cfg.eval_data)):
        some = held_out[path] = data.read_problems(path, cfg.columns, graded=graded)
        if graded:
            data.only_gradable(path, some)  # says which; in evaluation they stay
        read[f"--eval-data {name}"] = digest(some)
    read["--reward"] = [identity(name) for name in cfg.reward]
    read["--examples or --template"] = digest(data.read_prompting(cfg))
    levels = resolve_levels(cfg, any(p.pass_rate is not None for p in train_set))
    if cfg.difficulty == "level" and all(p.level is None for p in train_set):
        raise ValueError(
            f"--difficulty level: no problem of {cfg.data} has a level that is a number: "
            "name its column (--columns problem=NAME answer=NAME level=NAME), or leave the flag out"
        )
    facts = {
        "ungradable_left_out": len(different) - len(train_set),
        "repeats_removed": len(problems) - len(different),
        "read": read,
    }
    return levels, train_set, held_out, facts


def load_policy(cfg, model, device):
    """The policy of a checkpoint of this run, or the one that the run starts from (cfg.model)."""
    policy = Policy.load(str(model), cfg.dtype, device, cfg)
    if model == cfg.model and lora.read_config(policy.folder):
        raise ValueError(
            f"--model {model} is an adapter: merge it into its base with PEFT first (docs/lora.md)"
        )
    if model == cfg.model and cfg.lora_rank:
        lora.add(policy.model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    return policy


def check_measured(cfg, levels, train_set, policy):
    """Print in what the measurement of the pass rates differs from this run."""
    if cfg.difficulty != "pass_rate":
        return
    longest = max(level.max_new_tokens for level in levels)
    now = policy.measuring(cfg.temperature, longest, cfg.reward)
    kinds = {json.dumps(p.other.get("measured")) for p in train_set if p.pass_rate is not None}
    for measured in map(json.loads, sorted(kinds)):
        if not measured:
            tqdm.write(f"{cfg.data}: nothing says what measured the pass rates")
            continue
        older = {"reward": MATH, "top_k": 0, "top_p": 1.0, "stop_ids": now["stop_ids"]}
        measured = older | measured
        other = [f"{k} {measured.get(k)}, now {v}" for k, v in now.items() if measured.get(k) != v]
        if other:
            tqdm.write(
                f"{cfg.data}: measured with {measured.get('model')} otherwise: {'; '.join(other)}"
            )
        if measured.get("samples", 0) < 16:
            tqdm.write(
                f"{cfg.data}: measured with {measured.get('samples')} samples a problem: "
                "fewer than 16 tell little"
            )


def make_levels(cfg, levels, train_set, policy):
    """Cut the levels and render everything before minutes are spent. -> [LevelState, ...], facts"""
    qualities = [level.quality for level in levels]
    parts, left_out = cut_by_difficulty(cfg, cfg.data, train_set, qualities)
    states, too_long = [], 0
    for number, level in enumerate(levels, 1):
        problems = parts.get(None) or parts[number]  # None: one set for every level
        prompts = []
        if level.trains:
            if not problems:
                raise ValueError(
                    f"level {number} (Q = {level.quality:g}) has no problem: choose another "
                    f"--quality ({cfg.data} left out: {left_out})"
                )
            prompts = fitting(policy, problems)
            too_long += len(problems) - len(prompts)
        order = data.Order(prompts, f"{cfg.seed}/{number}")
        buffer = Buffer(keep_flat=cfg.filter == "all")
        states.append(LevelState(number, level, order, load_reward(level.reward), buffer))
        tqdm.write(
            f"level {number}: difficulty up to {level.quality:g}, {len(problems)} problems"
            f"{'' if level.trains else ', not trained'}"
        )
    if qualities != sorted(qualities):
        tqdm.write(
            'Q decreases: the harder level trains first. The paper says both "Q1 < Q2" and '
            '"Q_{l-1} > Q_l"; see eprli.py'
        )
    return states, {"prompts_too_long": too_long, "left_out": left_out}


def cut_by_difficulty(cfg, name, problems, qualities):
    """-> {number from 1: problems}, counts of those that belong to no level

    Where nothing is known of the difficulty: {None: all problems}.
    """
    if all(data.difficulty(p, cfg.difficulty) is None for p in problems):
        tqdm.write(f"{name}: no problem has a {cfg.difficulty}, so they are one set")
        return {None: problems}, {}
    parts, left_out = data.cut_levels(problems, qualities, cfg.difficulty)
    return dict(enumerate(parts, 1)), left_out


def fitting(policy, problems):
    """Prompts that leave room for a completion. Raises ValueError if there are none."""
    prompts = [p for p in policy.render(problems) if policy.room(p)]
    if not prompts:
        raise ValueError(
            f"every prompt is longer than the context of {policy.model.context} tokens"
        )
    return prompts


def cut_held_out(cfg, states, held_out, policy):
    """Cut every held-out file into bins of difficulty, by default as the levels are cut.

    A bin has the R_l of the level with its threshold, else of the last level.
    -> [({what names the bin in eval.jsonl: ...}, its prompts, its R_l), ...], facts
    """
    qualities = cfg.eval_quality or [state.level.quality for state in states]
    rewards = {state.level.quality: state.reward for state in reversed(states)}
    bins, facts = [], {}
    for path, problems in held_out.items():
        file = {"file": stem(path)} if len(held_out) > 1 else {}
        parts, left_out = cut_by_difficulty(cfg, path, problems, qualities)
        facts[", ".join(["eval_left_out", *file.values()])] = left_out
        if cfg.eval_quality and None in parts:
            raise ValueError(f"--eval-quality: no problem of {path} has a {cfg.difficulty}")
        seen, shown = [], []
        for number, some in parts.items():
            if some and some not in seen:  # levels may share their problems
                seen.append(some)
                labels, prompts = file | {"level": number}, policy.render(some)
                quality = None if number is None else qualities[number - 1]
                bins.append((labels, prompts, rewards.get(quality, states[-1].reward)))
                shown += prompts
                tqdm.write(f"held out, {data.name_level(labels)}: {len(some)} problems")
        if not shown:
            raise ValueError(f"{path}: no problem falls into any level; see --eval-quality")
        longest = max(state.level.max_new_tokens for state in states)
        policy.show(path, shown, cfg.eval_max_new_tokens or longest)
    return bins, facts
