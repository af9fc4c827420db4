"""The flags of train.py: defaults, units, sources, checks.

The way of a flag, such as --lr: its field below (Optimizer.lr) -> `read_flags`, where the command
line, with the files of flags that it names (@recipes/dapo.args), and with --resume the run's
config.json set it -> `fill`, if it has no value yet -> Config, which is run.cfg in train.py, where
it is read (eprli.learning_rate(cfg, ...)). A flag with a value per level becomes a field of Level
instead (eprli.resolve_levels).
"""

import argparse
import json
import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from data import Prompting, flag
from eprli import LEVEL_DEFAULTS as DEFAULTS
from files import source_of
from policy.checkpoint import SHIPPED, TINY, default_dtype, is_shipped

LR = 3e-4


@dataclass(frozen=True)
class Files:
    _argument_group_name = "files"

    model: str = flag(
        "checkpoint folder or hub name[@revision] (Llama, Qwen2 or Qwen3) [ours]", str(TINY)
    )
    data: str = flag(
        "training problems: a JSON-lines or parquet file, or a data set of the hub, "
        "OWNER/NAME[:CONFIGURATION]:SPLIT; [:512] behind it are its first 512 rows; layouts that "
        "are known: sources.py [ours]",
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
    out: str | None = flag("run directory to create; default runs/<date-time> [ours]")
    resume: str | None = flag(
        "run directory to go on with, whatever ended it, with the flags it was started with [ours]"
    )
    save_every: int = flag("updates between checkpoints; 0: only at the end [ours]", 10)
    keep_checkpoints: int = flag("newest checkpoints to keep; older ones are deleted [ours]", 2)
    tracker: Literal["wandb", "trackio"] | None = flag(
        "send config, metrics and some completions to this tracker too [ours]"
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
        "parameters]"
    )
    difficulty: Literal["pass_rate", "level"] = flag(
        "what cuts the levels: 1 - pass rate, or the declared number [paper]", "pass_rate"
    )
    schedule: Literal["sequential", "interleaved"] = flag(
        "levels one after the other, or taking turns [paper]", "sequential"
    )
    group_size: list[int] = flag("G_l, completions per prompt [paper]", [16])
    prompts: list[int] | None = flag("P_l, prompts per draw; default N_l [ours]")
    buffer_groups: list[int] = flag(
        "N_l, groups that an update trains on [ours, for 0.6 M parameters; FastCuRL 64-128]", [16]
    )
    max_new_tokens: list[int] | None = flag(
        f"Len_l, longest completion, tokens; default {DEFAULTS['max_new_tokens']} for the shipped "
        "model; any other needs it given [ours; DeepScaleR 8192-24576]"
    )
    reward: list[str] = flag("R_l: math, or path.py:function [paper: verifiable outcome]", ["math"])
    length_weight: list[float] | None = flag(
        f"K_l, weight of the length reward; default {DEFAULTS['length_weight']} for the shipped "
        "model, 0 for any other [ours; paper: K_l > 0, without a number; DAPO: 0.5]"
    )
    eps_low: list[float] = flag("ratio's lower clip bound is 1 - eps_low [DAPO]", [0.2])
    eps_high: list[float] = flag("ratio's upper clip bound is 1 + eps_high [DAPO]", [0.28])
    inner_epochs: list[int] = flag(
        "mu_l, passes over an update's groups [DeepScaleR, FastCuRL]", [1]
    )
    updates: list[int] | None = flag(
        f"M_l, updates of the level; 0: it is not trained; default {DEFAULTS['updates']}, or no "
        "bound where --tokens is given [ours, for 0.6 M parameters]"
    )
    tokens: list[int] | None = flag(
        "budget of the level in sampled tokens, those of dropped groups too; 0: it is not trained; "
        "with --updates, whichever is used up first ends the level [ours]"
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
    overlong_cache: int | None = flag(
        "last tokens, over which `overlong` falls to -1; default Len_l / 5 [DAPO: 4096 of 20480]"
    )
    kl_coef: float = flag(
        "weight of the k3 penalty towards the starting policy [paper: none; DeepScaleR 0.001]", 0.0
    )
    max_draws: int = flag("draws (of P_l prompts) per update before it is skipped [DAPO]", 10)
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
        "full training. With --lora-rank give ten times as much or more, as the best rates of the "
        "two differ (Schulman et al. 2025): 3e-3 for the shipped model; 2e-4 taught a Qwen2 of "
        "0.5 B (docs/lora.md) [ours, for 0.6 M parameters; DeepScaleR 1e-6 for 1.5 B]"
    )
    warmup: int = flag(
        "updates of linear warm-up, in each level [ours, for 0.6 M parameters; DAPO 10 steps]", 5
    )
    lr_decay: Literal["none", "linear", "cosine"] = flag(
        "from 1 at a level's start to 0 at its end [ours, for 0.6 M parameters; DeepScaleR none]",
        "linear",
    )
    minibatches: int = flag(
        "optimizer steps per pass over the update's groups [FastCuRL: 128 / 64 prompts]", 2
    )
    max_grad_norm: float = flag("gradient norm is clipped to this [DAPO]", 1.0)
    lora_rank: int = flag(
        "LoRA: freeze the weights and learn factors B A of this rank; 0: learn the weights. In RL "
        "small ranks, even 1, do as well as full training: an episode teaches few bits "
        "[arXiv 2106.09685; Schulman et al. 2025, LoRA Without Regret]",
        0,
    )
    lora_alpha: float = flag(
        "B A is scaled by alpha / rank, and the best --lr hardly depends on the rank; for rsLoRA "
        "(arXiv 2312.03732) give its alpha times the root of the rank [Schulman et al. 2025]",
        32.0,
    )
    lora_targets: list[str] | None = flag(
        "linear layers with factors, such as q_proj v_proj; default all of the decoder's blocks, "
        "which does better than attention alone at equal numbers of parameters "
        "[Schulman et al. 2025]"
    )


@dataclass(frozen=True)
class SamplingFlags:
    _argument_group_name = "sampling and evaluation"

    temperature: float = flag(
        "of the softmax, in sampling and learning alike [DAPO; DeepScaleR 0.6]", 1.0
    )
    seed: int = flag("seed of everything random [ours]", 0)
    eval_every: int | None = flag(
        "updates between evaluations; default: at ends of levels alone; 0: none at all [ours]"
    )
    eval_quality: list[float] | None = flag(
        "thresholds that cut the held-out problems, reported apart; default Q_l [ours]"
    )
    eval_samples: int = flag(
        "samples of each held-out problem; intervals are over problems [ours; DeepScaleR 16]", 1
    )
    eval_max_new_tokens: int | None = flag(
        "longest completion of a held-out problem, tokens; default the largest Len_l [ours]"
    )


@dataclass(frozen=True)
class Scoring:
    """Flags of eval.py too."""

    _argument_group_name = "rewards"

    reward_timeout: float = flag(
        "seconds that a call of your own --reward may take; a later one breaks its group [ours]",
        60.0,
    )
    reward_workers: int = flag(
        "calls of your own --reward at the same time, on each process; 1 if it cannot be called "
        "by several threads (one that is over its time still goes on beside the next) [ours]",
        16,
    )


@dataclass(frozen=True)
class Machine:
    """Flags of eval.py too."""

    device: Literal["cpu", "cuda"] = flag(
        "where the model lives [ours]", "cuda" if torch.cuda.is_available() else "cpu"
    )
    dtype: Literal["float32", "bfloat16", "float64"] | None = flag(
        "of the weights; bfloat16 has float32 masters; default float32, on a GPU bfloat16 for any "
        "model but the shipped one [ours]"
    )
    slots: int | None = flag(
        "completions decoded together, on each process; memory and speed only; default: what half "
        "of the free memory holds, at most 256 [ours]"
    )


@dataclass(frozen=True)
class Memory(Machine):
    _argument_group_name = "memory and speed"

    micro_batch_tokens: int | None = flag(
        "padded tokens per backward pass; memory only, never changes the result; default 2048, on "
        "a GPU 32768, and less where its memory is full [ours]"
    )
    recompute: bool | None = flag(
        "activation checkpointing: compute a layer again in the backward pass; memory only; on a "
        "GPU the default, which --recompute False switches off [ours]",
        nargs="?",
        const=True,
    )
    fsdp: bool = flag(
        "cut weights, gradients, optimizer over torchrun's processes (FSDP2); memory only; with "
        "--lora-rank nothing is cut [ours]",
        False,
    )


@dataclass(frozen=True)
class Config(Files, Memory, Prompting, SamplingFlags, Scoring, Optimizer, Objective, Levels):
    """Every flag: default, unit, source. Those of type list take one value, or one per level."""

    @property
    def sharded(self):
        """With LoRA there is nothing to cut: frozen weights are whole on every process, to sample
        from, and factors are small."""
        return self.fsdp and not self.lora_rank


# As --help shows them
SECTIONS = Levels, Objective, Optimizer, Scoring, SamplingFlags, Prompting, Memory, Files
# With --resume. No result depends on them.
MAY_CHANGE = (
    "device slots micro_batch_tokens recompute fsdp save_every keep_checkpoints tracker "
    "reward_workers"
)
RULES = (
    (
        "lr temperature max_grad_norm lora_alpha reward_timeout",
        lambda v: 0 < v < math.inf,
        "above 0",
    ),
    (
        "eps_low eps_high length_weight warmup kl_coef eval_every save_every seed updates tokens "
        "lora_rank",
        lambda v: 0 <= v < math.inf,
        "at least 0",
    ),
    (
        "prompts max_new_tokens inner_epochs minibatches micro_batch_tokens slots "
        "overlong_cache max_draws keep_checkpoints eval_max_new_tokens eval_samples reward_workers",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("group_size", lambda v: v >= 2, "at least 2"),  # a group of one has no advantage
    ("eps_low", lambda v: v < 1, "below 1"),
    ("lora_alpha", lambda v: v < 1e6, "below 1000000"),
    ("quality eval_quality", math.isfinite, "a finite number"),
)


# What any model but the shipped one needs given.
REQUIRED = "lr", "max_new_tokens"
LORA_RATE = "give ten times a rate of full training or more: docs/lora.md"


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


def read_flags(parser, arguments):
    """-> Config, config.json of the run to resume or None.  Raises ValueError"""
    parser.parse_args(arguments)  # --help ends here
    given, flags, config = given_flags(parser, arguments), {}, None
    if "resume" in given:
        flags, config = as_started(given)
    cfg = Config(**{**flags, **given})
    check(cfg)
    return fill(cfg), config


def as_started(given):
    """-> {name: value} of all flags of the run that is to be resumed, its config.json"""
    run = given.pop("resume")
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {name: config[name] for name in vars(Config())}
        check(Config(**flags))
        if not all(config[name] for name in ("read", "kernels", "threads", "torch")):
            raise KeyError("read")
        flags["max_new_tokens"] = [level["max_new_tokens"] for level in config["levels"]]
        if config["revision"]:
            flags["model"] = f"{flags['model'].partition('@')[0]}@{config['revision']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {run}: {path} is not that of a run ({type(error).__name__}: {error}); one "
            "that another version of EPRLI began goes on with that version alone"
        ) from error
    may_change = MAY_CHANGE.split()
    for name in given:
        if name not in may_change:
            raise ValueError(
                f"--resume goes on with the flags of {run}, and {option(name)} is not one that may "
                f"differ ({' '.join(map(option, may_change))}): leave it out, or start a new run "
                f"from a checkpoint (--model {run}/checkpoints/...)"
            )
    return flags | {"out": run}, config


def given_flags(parser, arguments):
    """{name: value} of the flags that stand on the command line."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def fill(cfg):
    """The Config with defaults that depend on the model or the data. Raises ValueError where there
    is none."""
    missing = [name for name in REQUIRED if getattr(cfg, name) is None]
    if missing and not is_shipped(cfg.model):
        raise ValueError(
            f"{' and '.join(map(option, missing))}: our defaults fit the shipped model alone; for "
            f"{cfg.model} give your own, or a file that states them, such as @recipes/dapo.args"
            + (". With --lora-rank " + LORA_RATE if "lr" in missing else "")
        )
    dtype, held_out = cfg.dtype or default_dtype(cfg.model, cfg.device), cfg.eval_data
    source = Path(source_of(cfg.data)).resolve()
    if not held_out and source == (SHIPPED / "train.jsonl").resolve():
        held_out = [str(SHIPPED / "heldout.jsonl")]
    recompute = cfg.device == "cuda" if cfg.recompute is None else cfg.recompute
    cfg = replace(cfg, dtype=dtype, lr=cfg.lr or LR, eval_data=held_out, recompute=recompute)
    if is_shipped(cfg.model) or cfg.length_weight:
        return cfg
    return replace(cfg, length_weight=[0.0])


def check(cfg):
    """Raise ValueError for what no data can make right."""
    enough = f"at least --minibatches ({cfg.minibatches})"
    rules = [
        *RULES,
        ("buffer_groups", lambda v: v >= cfg.minibatches, enough),
    ]
    if cfg.difficulty == "pass_rate":
        rate = "in (0, 1]: a difficulty is 1 - pass rate"
        rules.insert(0, ("quality eval_quality", lambda v: 0 < v <= 1, rate))
    check_ranges(cfg, rules)
    if not cfg.lora_rank and (cfg.lora_targets or cfg.lora_alpha != Config.lora_alpha):
        raise ValueError(
            "--lora-targets and --lora-alpha need --lora-rank: without it all weights learn"
        )


def check_ranges(flags, rules):
    """Raise ValueError where a flag breaks one of the rules (names, test of a value, words)."""
    for names, good, words in rules:
        for name in names.split():
            values = getattr(flags, name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not good(value):
                    raise ValueError(f"{option(name)} must be {words}, found {value}")


def objective_line(cfg, levels):
    """The objective with its numbers; what differs by level, level by level."""
    low, high, weight = (
        ", ".join(f"{getattr(level, name):g}" for level in levels)
        for name in ("eps_low", "eps_high", "length_weight")
    )
    return (
        f"maximise J_l: loss norm {cfg.loss_norm}, rho clipped to [1 - ({low}), 1 + ({high})], "
        f"advantage std {cfg.adv_std}, r = R_l + K_l length_l({cfg.length_kind}), K_l = {weight}, "
        f"minus {cfg.kl_coef:g} k3"
    )
