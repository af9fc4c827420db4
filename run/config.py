"""The flags of train.py: defaults, units, sources, ranges; and the Config that they resolve to.

The way of a flag, such as --lr: its field below (Optimizer.lr) -> `parse`, which reads the command
line, and the files of flags that it names (@recipes/dapo.args) -> `resolve`, which fills in the
defaults that depend on the model or the data, and gives every level its value -> Config, which is
config.json, and cfg in train.py. A resumed run takes the Config from its config.json instead.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.files import source_of
from common.flags import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    check_rules,
    flag,
    make_parser,
    option,
)
from data import Prompting
from eprli import Level
from policy.checkpoint import SHIPPED, TINY, default_dtype, is_shipped
from rollout import MIN_ROWS

# Ours for the shipped model and problems, of 0.6 M parameters. Where there are two numbers, the
# first is for level 1 if there are several levels, the second for every other level, and for a
# single one. Level 1 is what is solved in 20 % of the attempts or more.
DEFAULTS = {
    "quality": [0.8, 1.0],
    "max_new_tokens": [160],
    "length_weight": [0.3],
    "tokens": [250_000, 750_000],
    "lr": 2e-4,
}
PER_LEVEL = [f.name for f in fields(Level)]

AT_LEAST_MIN_ROWS = lambda v: v >= MIN_ROWS, f"at least {MIN_ROWS}"
SLOTS_HELP = (
    "it changes memory and speed, and no result but rounding; default: what half of the free "
    "memory holds when it starts, at most 256 [ours]"
)


@dataclass(frozen=True)
class Files:
    title = "files"

    model: str = flag(
        "checkpoint folder or hub name[@revision] (Llama, Qwen2 or Qwen3) [ours]", str(TINY)
    )
    data: str = flag(
        "training problems: a JSON-lines or parquet file, or a data set of the hub, "
        "OWNER/NAME[:CONFIGURATION]:SPLIT; [:512] behind it are its first 512 rows; layouts that "
        "are known: data.py [ours]",
        str(SHIPPED / "train.jsonl"),
    )
    eval_data: list[str] | None = flag(
        "files or data sets of held-out problems, each reported apart; default: the shipped ones "
        "for the shipped data, otherwise none [ours]"
    )
    columns: list[str] = flag(
        "columns of another layout, problem=NAME answer=NAME, and pass_rate, level or id [ours]", []
    )
    out: str | None = flag("run directory to create; default runs/<date-time>-<process> [ours]")
    save_every: int = flag(
        "updates between checkpoints; 0: only at the end [ours]",
        10,
        rule=AT_LEAST_0,
        may_change=True,
    )
    keep_checkpoints: int = flag(
        "newest checkpoints to keep; older ones are deleted [ours]",
        2,
        rule=AT_LEAST_1,
        may_change=True,
    )
    tracker: Literal["wandb", "trackio"] | None = flag(
        "send config, metrics and held-out accuracy to this tracker too; default: none [ours]",
        may_change=True,
    )


@dataclass(frozen=True)
class Levels:
    title = (
        "levels: a list has one value for all, or one per level; a default of two, one for level 1 "
        "and one for all others or for a single level"
    )

    quality: list[float] | None = flag(
        f"Q_l, upper bound of difficulty; default {DEFAULTS['quality']}, or one level of "
        "everything if no problem has a pass rate [paper: two levels; where: ours, for 0.6 M "
        "parameters]",
        rule=(math.isfinite, "a finite number"),
    )
    difficulty: Literal["pass_rate", "level"] = flag(
        "what cuts the levels: 1 - pass rate, or the declared number [paper]", "pass_rate"
    )
    schedule: Literal["sequential", "interleaved"] = flag(
        "levels one after the other, or taking turns [paper]", "sequential"
    )
    group_size: list[int] = flag(
        "G_l, completions per prompt [paper]", [16], rule=(lambda v: v >= 2, "at least 2")
    )
    prompts: list[int] | None = flag("P_l, prompts per draw; default N_l [ours]", rule=AT_LEAST_1)
    buffer_groups: list[int] = flag(
        "N_l, groups that an update trains on [ours, for 0.6 M parameters; FastCuRL 64-128]", [16]
    )
    max_new_tokens: list[int] | None = flag(
        f"Len_l, longest completion, tokens; default {DEFAULTS['max_new_tokens']} for the shipped "
        "model; any other needs it given [ours; DeepScaleR 8192-24576]",
        rule=AT_LEAST_1,
    )
    reward: list[str] = flag("R_l: math, or path.py:function [paper: verifiable outcome]", ["math"])
    length_weight: list[float] | None = flag(
        f"K_l, weight of the length reward; default {DEFAULTS['length_weight']} for the shipped "
        "model, 0 for any other [ours; paper: K_l > 0, without a number; DAPO: 0.5]",
        rule=AT_LEAST_0,
    )
    eps_low: list[float] = flag(
        "ratio's lower clip bound is 1 - eps_low [DAPO]",
        [0.2],
        rule=(lambda v: 0 <= v < 1, "in [0, 1)"),
    )
    eps_high: list[float] = flag(
        "ratio's upper clip bound is 1 + eps_high [DAPO]", [0.28], rule=AT_LEAST_0
    )
    inner_epochs: list[int] = flag(
        "mu_l, passes over an update's groups [DeepScaleR, FastCuRL]", [1], rule=AT_LEAST_1
    )
    updates: list[int] | None = flag(
        "M_l, updates of the level; 0: it is not trained; default: no bound (null in "
        "config.json), and any model but the shipped one needs this or --tokens [ours]",
        rule=AT_LEAST_0,
    )
    tokens: list[int] | None = flag(
        "budget of the level in sampled tokens, those of dropped groups too; 0: it is not trained; "
        "with --updates, whichever is used up first ends the level; default "
        f"{DEFAULTS['tokens']} for the shipped model without --updates, otherwise no bound (null "
        "in config.json) [ours]",
        rule=AT_LEAST_0,
    )


@dataclass(frozen=True)
class Objective:
    title = "objective"

    loss_norm: Literal["sequence", "token", "constant"] = flag(
        "how tokens are averaged: Eq. 1, DAPO, Dr. GRPO [paper]", "sequence"
    )
    adv_std: Literal["group", "none"] = flag(
        "divide advantages by the group's std, or not (Dr. GRPO) [paper]", "group"
    )
    filter: Literal["mixed", "all"] = flag(
        "groups to keep: those whose outcomes differ, or all [paper, DAPO]", "mixed"
    )
    length_kind: Literal["overlong", "kimi", "cosine"] = flag(
        "length reward, used where K_l > 0 [Kimi k1.5; `overlong`: DAPO]", "kimi"
    )
    kl_coef: float = flag(
        "weight of the k3 penalty towards the starting policy [paper: none; DeepScaleR 0.001]",
        0.0,
        rule=AT_LEAST_0,
    )
    max_draws: int = flag(
        "draws (of P_l prompts) per update before it is skipped [DAPO]", 10, rule=AT_LEAST_1
    )
    surplus: Literal["keep", "drop", "missing"] = flag(
        "groups that an update drew beyond N_l: keep them for the next one; drop them; or draw, "
        "after the first time, only as many prompts as are missing (--max-draws x P_l in all), and "
        "keep the rest [ours; DAPO and verl drop]",
        "keep",
    )


@dataclass(frozen=True)
class Optimizer:
    title = "optimizer"

    lr: float | None = flag(
        "learning rate of AdamW; within each level times warm-up and decay; default "
        f"{DEFAULTS['lr']:g} for the shipped model; any other needs it given. That, and what "
        "recipes/ state, is a rate of full training. With --lora-rank the best rate is higher "
        "(Schulman et al. 2025): 2e-4 taught a Qwen2 of 0.5 B, 3e-3 the shipped model "
        "(docs/scaling.md) [ours, for 0.6 M parameters; DeepScaleR 1e-6 for 1.5 B]",
        rule=ABOVE_0,
    )
    warmup: int = flag(
        "updates of linear warm-up, in each level [ours, for 0.6 M parameters; DAPO 10 steps]",
        2,
        rule=AT_LEAST_0,
    )
    lr_decay: Literal["none", "linear", "cosine"] = flag(
        "from 1 at a level's start to 0 at its end [DeepScaleR, DAPO]", "none"
    )
    minibatches: int = flag(
        "optimizer steps per pass over the update's groups [FastCuRL: 128 / 64 prompts]",
        2,
        rule=AT_LEAST_1,
    )
    lora_rank: int = flag(
        "LoRA: freeze the weights and learn factors B A of this rank; 0: learn the weights. In RL "
        "small ranks, even 1, do as well as full training: an episode teaches few bits "
        "[arXiv 2106.09685; Schulman et al. 2025, LoRA Without Regret]",
        0,
        rule=AT_LEAST_0,
    )
    fsdp: bool = flag(
        "cut weights, gradients, optimizer over torchrun's processes (FSDP2); memory only; with "
        "--lora-rank nothing is cut [ours]",
        False,
        may_change=True,
    )


@dataclass(frozen=True)
class SamplingFlags:
    title = "sampling and evaluation"

    temperature: float = flag(
        "of the softmax, in sampling and learning alike [DAPO; DeepScaleR 0.6]", 1.0, rule=ABOVE_0
    )
    seed: int = flag("seed of everything random [ours]", 0, rule=AT_LEAST_0)
    eval_every: int | None = flag(
        "updates between evaluations; default (null in config.json): only at the start and at ends "
        "of levels; 0: none [ours]",
        rule=AT_LEAST_0,
    )
    eval_quality: list[float] | None = flag(
        "thresholds that cut the held-out problems, reported apart; default Q_l [ours]",
        rule=(math.isfinite, "a finite number"),
    )
    eval_samples: int = flag(
        "samples of each held-out problem; intervals are over problems [ours; DeepScaleR 16]",
        1,
        rule=AT_LEAST_1,
    )
    slots: list[int] | None = flag(
        f"completions of a level decoded together, on each process; {SLOTS_HELP}",
        rule=AT_LEAST_MIN_ROWS,
        may_change=True,
    )


@dataclass(frozen=True)
class Machine:
    """Flags of eval.py too."""

    title = "machine, and time of rewards"

    device: Literal["cpu", "cuda"] = flag(
        "where the model lives [ours]",
        "cuda" if torch.cuda.is_available() else "cpu",
        may_change=True,
    )
    dtype: Literal["float32", "bfloat16", "float64"] | None = flag(
        "of the weights; bfloat16 has float32 masters; default float32, on a GPU bfloat16 for any "
        "model but the shipped one [ours]"
    )
    reward_timeout: float = flag(
        "seconds that a call of your own --reward may take; a later one breaks its group [ours]",
        60.0,
        rule=ABOVE_0,
    )


@dataclass(frozen=True)
class Config(Files, Machine, Prompting, SamplingFlags, Optimizer, Objective, Levels):
    """Every flag: default, unit, source. Those of type list take one value, or one per level."""

    @property
    def sharded(self):
        """With LoRA there is nothing to cut: frozen weights are whole on every process, to sample
        from, and factors are small."""
        return self.fsdp and not self.lora_rank


@dataclass(frozen=True)
class Resume:
    title = "or, to go on with a run"

    resume: str | None = flag(
        "run directory to go on with, whatever ended it, with the flags it was started with [ours]"
    )


# As --help shows them
SECTIONS = Levels, Objective, Optimizer, SamplingFlags, Prompting, Machine, Files, Resume


# --------------------------------------------------------------------------------------- parsing


def parse(arguments):
    """Return the flags of the command line, a Config that is yet to be resolved, and None; or, with
    --resume, the Config of that run and its config.json. Raises ValueError."""
    parser = make_parser("EPRLI: reinforcement learning, level by level", *SECTIONS)
    given = vars(parser.parse_args(arguments))  # --help ends here
    if "resume" in given:
        return as_started(given.pop("resume"), given)
    flags = Config(**given)
    check(flags)
    return flags, None


def as_started(run, given):
    """Return the Config of the run that is to be resumed, and its config.json.

    given  {name: value} of the other flags on the command line
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run}: not a run directory (no config.json)")
    try:
        config = json.loads(path.read_text())
        started = Config(**{f.name: config[f.name] for f in fields(Config)})
        check(started)
        levels = levels_of(started)
        if not (config["read"] and len(started.slots) == len(levels) and started.eval_quality):
            raise ValueError("not all of it is there")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {run}: the run was started by another version of EPRLI; resume it with that "
            f"version (config.json: {type(error).__name__}: {error})"
        ) from error
    free = [option(f.name) for f in fields(Config) if f.metadata["may_change"]]
    for name in map(option, given):
        if name not in free:
            raise ValueError(
                f"--resume goes on with the flags of {run}, and {name} is not one that may differ "
                f"({' '.join(free)}): leave it out, or start a new run from a checkpoint "
                f"(--model {run}/checkpoints/...)"
            )
    if "slots" in given:
        given["slots"] = for_levels("slots", given["slots"], len(started.slots))
        if given["slots"] != started.slots:
            tqdm.write(f"--slots: not {started.slots} as before, so the last bits may differ")
    cfg = replace(started, **given, out=run)
    check(cfg)
    return cfg, config


def check(cfg):
    """Raise ValueError for what no data can make right."""
    check_rules(cfg)
    for quality in (cfg.quality or []) + (cfg.eval_quality or []):
        if cfg.difficulty == "pass_rate" and not 0 < quality <= 1:
            raise ValueError(
                "--quality and --eval-quality must be in (0, 1]: a difficulty is 1 - pass rate, "
                f"found {quality}"
            )
    if min(cfg.buffer_groups) < cfg.minibatches:
        raise ValueError(
            f"--buffer-groups must be at least --minibatches ({cfg.minibatches}), found "
            f"{min(cfg.buffer_groups)}"
        )
    missing = [name for name in ("lr", "max_new_tokens") if getattr(cfg, name) is None]
    missing = [option(name) for name in missing]
    if cfg.updates is None and cfg.tokens is None:
        missing.append("--updates or --tokens")
    if missing and not is_shipped(cfg.model):
        raise ValueError(
            f"{', '.join(missing)}: our defaults fit the shipped model alone; for {cfg.model} give "
            "your own, or a file that states them, such as @recipes/gsm8k-one-card.args (rates for "
            "--lora-rank: docs/scaling.md)"
        )
    if cfg.difficulty == "level" and not cfg.quality:
        raise ValueError(
            "--difficulty level needs --quality: the highest declared number of each level, "
            "e.g. --quality 1 2"
        )


# --------------------------------------------------------------------------------------- resolving


def resolve(flags, measured):
    """Return the Config of a new run: the flags, with every default that depends on the model or
    the data, and one value per level in every list of a level. Only the default of --slots is set
    later, when the prompts are known (see run/start.py). Raises ValueError.

    measured  whether some training problem has a pass rate
    """
    if flags.difficulty == "pass_rate" and not measured and set(flags.quality or [1.0]) != {1.0}:
        raise ValueError(
            f"--quality cuts measured difficulty, but no problem of {flags.data} has a "
            f"pass_rate: measure it with `python eval.py --model {flags.model} --data "
            f"{flags.data} --samples 16 --add-pass-rate FILE`, or use --difficulty level"
        )
    values, defaults = dict(vars(flags)), defaults_of(flags, measured)
    for name in values:
        if values[name] is None:
            values[name] = defaults.get(name)
    # The longest of these lists is the number of levels; the other defaults fit any number.
    binding = ["quality", *(name for name in PER_LEVEL if getattr(flags, name))]
    num_levels = max(len(values[name]) for name in binding)
    for name in filter(values.get, [*PER_LEVEL, "slots"]):
        if name in binding or name == "slots":
            by_default = getattr(flags, name) is None
            values[name] = for_levels(name, values[name], num_levels, by_default)
        else:
            first, last = values[name][0], values[name][-1]
            values[name] = [first] * (num_levels > 1) + [last] * max(1, num_levels - 1)
    values["prompts"] = values["prompts"] or values["buffer_groups"]
    values["eval_quality"] = values["eval_quality"] or values["quality"]
    return Config(**values)


def defaults_of(flags, measured):
    """Return the defaults that depend on the model or the data: {name: value}."""
    defaults = {"length_weight": [0.0], "updates": [None], "tokens": [None], "eval_data": []}
    if is_shipped(flags.model):
        defaults |= DEFAULTS
    if flags.updates is not None:
        defaults["tokens"] = [None]
    defaults["quality"] = DEFAULTS["quality"] if measured else [1.0]
    if flags.dtype is None:
        defaults["dtype"] = default_dtype(flags.model, flags.device)
    if Path(source_of(flags.data)).resolve() == (SHIPPED / "train.jsonl").resolve():
        defaults["eval_data"] = [str(SHIPPED / "heldout.jsonl")]
    return defaults


def with_full_paths(cfg):
    """Return the Config with paths that mean the same from any folder."""
    return replace(
        cfg,
        **{
            name: full_path(getattr(cfg, name))
            for name in ("model", "data", "examples", "template")
        },
        eval_data=list(map(full_path, cfg.eval_data)),
        reward=[str(Path(r).resolve()) if ":" in r else r for r in cfg.reward],
    )


def full_path(name):
    """Return a full path, with the slice behind it. A name of the hub stays as it is."""
    source = source_of(name)
    if not (source and Path(source).exists()):
        return name
    return str(Path(source).absolute()) + name[len(source) :]  # ids hold a link's own name


def for_levels(name, values, num_levels, by_default=False):
    """Return one value for each level.  values: one for all, or one for each. Raises ValueError"""
    if len(values) not in (1, num_levels):
        raise ValueError(
            f"there are {num_levels} levels, and {option(name)} needs 1 or {num_levels} "
            f"values, not {len(values)}{' as by default' * by_default}"
        )
    return values * (num_levels // len(values))


def levels_of(cfg):
    """Return the levels that a resolved Config describes: [Level, ...]"""
    columns = [getattr(cfg, name) for name in PER_LEVEL]
    return [Level(**dict(zip(PER_LEVEL, values))) for values in zip(*columns, strict=True)]
