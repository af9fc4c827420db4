"""The flags of train.py: defaults, units, sources, ranges; and the levels that they describe.

The way of a flag, such as --lr: its field below (Optimizer.lr) -> `read_flags`, where the command
line, with the files of flags that it names (@recipes/dapo.args), and with --resume the run's
config.json set it -> `fill`, if it has no value yet -> Config, which is run.cfg in train.py. A flag
with a value per level becomes a field of eprli.Level instead (`resolve_levels`).
"""

import argparse
import json
import math
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from data import Prompting, flag
from eprli import Level
from files import source_of
from policy.checkpoint import SHIPPED, TINY, default_dtype, is_shipped

# Ours for the shipped model and problems, of 0.6 M parameters. Where there are two numbers, the
# first is for level 1 if there are several levels, the second for every other level, and for a
# single one. Level 1 is what is solved in 20 % of the attempts or more.
LR = 2e-4
DEFAULTS = {
    "quality": [0.8, 1.0],
    "max_new_tokens": [160],
    "length_weight": [0.3],
    "tokens": [250_000, 750_000],
}
PER_LEVEL = [f.name for f in fields(Level)]

# Rules of a flag's value, or of each of its values: a test, and its words
ABOVE_0 = lambda v: 0 < v < math.inf, "above 0"
AT_LEAST_0 = lambda v: 0 <= v < math.inf, "at least 0"
AT_LEAST_1 = lambda v: v >= 1, "at least 1"


@dataclass(frozen=True)
class Files:
    _argument_group_name = "files"

    model: str = flag(
        "checkpoint folder or hub name[@revision] (Llama, Qwen2 or Qwen3) [ours]", str(TINY)
    )
    data: str = flag(
        "training problems: a JSON-lines or parquet file, or a data set of the hub, "
        "OWNER/NAME[:CONFIGURATION]:SPLIT; [:512] behind it are its first 512 rows; layouts that "
        "are known: data.py [ours]",
        str(SHIPPED / "train.jsonl"),
    )
    eval_data: list[str] = flag(
        "files or data sets of held-out problems, each reported apart; default: the shipped ones "
        "for the shipped data, else none [ours]",
        [],
    )
    columns: list[str] = flag(
        "columns of another layout, problem=NAME answer=NAME, and pass_rate, level or id [ours]", []
    )
    out: str | None = flag("run directory to create; default runs/<date-time>-<process> [ours]")
    resume: str | None = flag(
        "run directory to go on with, whatever ended it, with the flags it was started with [ours]"
    )
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
        "send config, metrics and held-out accuracy to this tracker too [ours]", may_change=True
    )


@dataclass(frozen=True)
class Levels:
    _argument_group_name = (
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
        "M_l, updates of the level; 0: it is not trained; default: no bound, and any model but "
        "the shipped one needs this or --tokens [ours]",
        rule=AT_LEAST_0,
    )
    tokens: list[int] | None = flag(
        "budget of the level in sampled tokens, those of dropped groups too; 0: it is not trained; "
        "with --updates, whichever is used up first ends the level; default "
        f"{DEFAULTS['tokens']} for the shipped model without --updates [ours]",
        rule=AT_LEAST_0,
    )


@dataclass(frozen=True)
class Objective:
    _argument_group_name = "objective"

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
    _argument_group_name = "optimizer"

    lr: float | None = flag(
        f"learning rate of AdamW; within each level times warm-up and decay; default {LR:g} for "
        "the shipped model; any other needs it given. That, and what recipes/ state, is a rate of "
        "full training. With --lora-rank the best rate is higher (Schulman et al. 2025): 2e-4 "
        "taught a Qwen2 of 0.5 B, 3e-3 the shipped model (docs/scaling.md) [ours, for 0.6 M "
        "parameters; DeepScaleR 1e-6 for 1.5 B]",
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
    _argument_group_name = "sampling and evaluation"

    temperature: float = flag(
        "of the softmax, in sampling and learning alike [DAPO; DeepScaleR 0.6]", 1.0, rule=ABOVE_0
    )
    seed: int = flag("seed of everything random [ours]", 0, rule=AT_LEAST_0)
    eval_every: int | None = flag(
        "updates between evaluations; default: at the start and at ends of levels; 0: none [ours]",
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


@dataclass(frozen=True)
class Machine:
    """Flags of eval.py too."""

    _argument_group_name = "machine, and time of rewards"

    device: Literal["cpu", "cuda"] = flag(
        "where the model lives [ours]",
        "cuda" if torch.cuda.is_available() else "cpu",
        may_change=True,
    )
    dtype: Literal["float32", "bfloat16", "float64"] | None = flag(
        "of the weights; bfloat16 has float32 masters; default float32, on a GPU bfloat16 for any "
        "model but the shipped one [ours]"
    )
    slots: int | None = flag(
        "completions decoded together, on each process; memory and speed only; default: what half "
        "of the free memory holds, at most 256 [ours]",
        rule=AT_LEAST_1,
        may_change=True,
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


# As --help shows them
SECTIONS = Levels, Objective, Optimizer, SamplingFlags, Prompting, Machine, Files


# --------------------------------------------------------------------------------------- reading


def option(name):
    """A flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


def make_parser(sections=SECTIONS):
    """One option for every flag. HfArgumentParser also reads --group_size for --group-size; --help
    shows the latter alone. @FILE stands for the flags in a file; of two values the last wins."""
    parser = HfArgumentParser(
        sections,
        description="EPRLI: reinforcement learning level by level (arXiv 2508.01604).",
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        allow_abbrev=False,
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for action in parser._actions:
        action.option_strings = [name for name in action.option_strings if "_" not in name]
    return parser


def given_flags(parser, arguments):
    """{name: value} of the flags that stand on the command line."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def about(*sections):
    """{name of a flag: its data.Help}"""
    return {f.name: f.metadata["help"] for section in sections for f in fields(section)}


def check_rules(flags, *sections):
    """Raise ValueError where a flag's value, or one of its values, breaks its rule."""
    for name, help in about(*sections).items():
        values = getattr(flags, name)
        for value in values if isinstance(values, list) else [values]:
            if help.rule and value is not None and not help.rule[0](value):
                raise ValueError(f"{option(name)} must be {help.rule[1]}, found {value}")


def read_flags(parser, arguments):
    """-> Config, config.json of the run to resume or None.  Raises ValueError"""
    parser.parse_args(arguments)  # --help ends here
    given, flags, config = given_flags(parser, arguments), {}, None
    if "resume" in given:
        flags, config = as_started(given.pop("resume"), given)
    cfg = Config(**{**flags, **given})
    check(cfg)
    return fill(cfg), config


def as_started(run, given):
    """-> {name: value} of all flags of the run that is to be resumed, its config.json

    given  what else stands on the command line
    """
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {name: config[name] for name in about(Config)}
        check(Config(**flags))
        if not config["read"]:
            raise KeyError("read")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {run}: {path} is not that of a run ({type(error).__name__}: {error}); one "
            "that another version of EPRLI began goes on with that version alone"
        ) from error
    free = [option(name) for name, help in about(Config).items() if help.may_change]
    for name in map(option, given):
        if name not in free:
            raise ValueError(
                f"--resume goes on with the flags of {run}, and {name} is not one that may differ "
                f"({' '.join(free)}): leave it out, or start a new run from a checkpoint "
                f"(--model {run}/checkpoints/...)"
            )
    return flags | {"out": run}, config


def check(cfg):
    """Raise ValueError for what no data can make right."""
    check_rules(cfg, Config)
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


def fill(cfg):
    """The Config with defaults that depend on the model or the data. Raises ValueError where there
    is none."""
    shipped = is_shipped(cfg.model)
    needed = {
        "lr": cfg.lr,
        "max_new_tokens": cfg.max_new_tokens,
        "updates": cfg.updates or cfg.tokens,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing and not shipped:
        raise ValueError(
            f"{', '.join(map(option, missing))}: our defaults fit the shipped model alone; for "
            f"{cfg.model} give your own, or a file that states them, such as "
            "@recipes/gsm8k-one-card.args (rates for --lora-rank: docs/scaling.md)"
        )
    held_out, source = cfg.eval_data, Path(source_of(cfg.data)).resolve()
    if not held_out and source == (SHIPPED / "train.jsonl").resolve():
        held_out = [str(SHIPPED / "heldout.jsonl")]
    return replace(
        cfg,
        dtype=cfg.dtype or default_dtype(cfg.model, cfg.device),
        lr=cfg.lr or LR,
        eval_data=held_out,
        length_weight=cfg.length_weight or (None if shipped else [0.0]),
    )


# ---------------------------------------------------------------------------------------- levels


def resolve_levels(cfg, measured):
    """The levels that the flags describe: [Level, ...]. Raises ValueError

    measured  whether some training problem has a pass rate
    """
    values = level_values(cfg, measured)
    # The longest of these lists is the number of levels; the other defaults fit any number.
    binding = ["quality", *(name for name in PER_LEVEL if getattr(cfg, name))]
    num_levels = max(len(values[name]) for name in binding)
    for name in binding:
        if len(values[name]) not in (1, num_levels):
            said = "" if getattr(cfg, name) else " as by default"
            raise ValueError(
                f"there are {num_levels} levels, and {option(name)} needs 1 or {num_levels} "
                f"values, not {len(values[name])}{said}"
            )
    levels = []
    for i in range(num_levels):
        number = i if num_levels > 1 else -1
        levels.append(
            Level(**{name: some[min(number, len(some) - 1)] for name, some in values.items()})
        )
    return levels


def level_values(cfg, measured):
    """{name: its values} of the per-level flags, with all defaults."""
    values = {name: getattr(cfg, name) or DEFAULTS.get(name, [None]) for name in PER_LEVEL}
    values["prompts"] = cfg.prompts or cfg.buffer_groups
    if cfg.updates and not cfg.tokens:
        values["tokens"] = [None]
    if cfg.difficulty == "level" and not cfg.quality:
        raise ValueError(
            "--difficulty level needs --quality: the highest declared number of each level, "
            "e.g. --quality 1 2"
        )
    if cfg.difficulty == "pass_rate" and not measured:
        values["quality"] = cfg.quality or [1.0]
        if set(values["quality"]) != {1.0}:
            raise ValueError(
                f"--quality cuts measured difficulty, but no problem of {cfg.data} has a "
                f"pass_rate: measure it with `python eval.py --model {cfg.model} --data "
                f"{cfg.data} --samples 16 --add-pass-rate FILE`, or use --difficulty level"
            )
    return values
