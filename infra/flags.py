"""The flags of train.py: defaults, units, sources, checks, and the levels that they describe."""

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from transformers import HfArgumentParser

from data import QUALITY, Prompting
from eprli import Level
from eval import MAX_NEW_TOKENS, SHIPPED, SLOTS, TINY, default_dtype, is_shipped
from infra.optimizer import BETAS, WEIGHT_DECAY
from model import LOGITS_PER_CHUNK
from tools.papers import PRESETS

# What differs by level: a value for level 1 of several, and one for all others or a single level.
BY_LEVEL = {
    "quality": QUALITY,
    "max_new_tokens": [96, MAX_NEW_TOKENS],
    "length_weight": [0.0, 0.3],
    "updates": [20, 40],
}
LR = 3e-4
MEMORY_ONLY = "memory only, never changes the result"


def flag(default, help, source="ours"):
    metadata = {"help": f"{help} [{source}]"}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Files:
    _argument_group_name = "files"

    model: str = flag(str(TINY), "checkpoint folder or hub name[@revision] (Llama, Qwen2 or Qwen3)")
    data: str = flag(
        str(SHIPPED / "train.jsonl"),
        "training problems: a JSON-lines or parquet file, or a data set of the hub, "
        "OWNER/NAME[:CONFIGURATION]:SPLIT; layouts that are known: infra/sources.py",
    )
    eval_data: str | None = flag(
        None, "held-out problems; default: the shipped ones for the shipped data, else none"
    )
    columns: list[str] = flag([], "columns of another layout, problem=NAME answer=NAME")
    preset: Literal[tuple(PRESETS)] | None = flag(
        None, "fill in what a source states; flags that are given win; --explain tells them apart"
    )
    out: str | None = flag(None, "run directory to create; default runs/<date-time>")
    resume: str | None = flag(
        None,
        "run directory to go on with, whatever ended it, with the flags it was started with; "
        "--updates may give its last level more",
    )
    save_every: int = flag(10, "updates between checkpoints; 0: only at the end")
    keep_checkpoints: int = flag(2, "newest checkpoints to keep; older ones are deleted")
    keep_completions: int = flag(
        16, "groups of each update whose completions are written down; 0: all"
    )
    tracker: Literal["wandb", "trackio"] | None = flag(
        None, "send config, metrics and some completions to this tracker too"
    )
    explain: bool = flag(False, "print the resolved objective with its numbers, and stop")
    plan: bool = flag(False, "print the memory that one process of the run would take, and stop")


@dataclass(frozen=True)
class Levels:
    _argument_group_name = (
        "levels: a list has one value for all, or one per level; a default of two, one for level 1 "
        "and one for all others or for a single level"
    )

    quality: list[float] | None = flag(
        None,
        f"Q_l, upper bound of difficulty; default {BY_LEVEL['quality']}, or one level of "
        "everything if no problem has a pass rate",
        "paper: two levels; where they are cut: ours",
    )
    difficulty: Literal["pass_rate", "level"] = flag(
        "pass_rate", "what cuts the levels: 1 - pass rate, or the declared number", "paper"
    )
    schedule: Literal["sequential", "interleaved"] = flag(
        "sequential", "levels one after the other, or taking turns", "paper"
    )
    group_size: list[int] = flag([16], "G_l, completions per prompt", "paper")
    prompts: list[int] | None = flag(None, "P_l, prompts per draw; default N_l")
    buffer_groups: list[int] = flag(
        [16], "N_l, groups that an update trains on", "ours; FastCuRL 64-128"
    )
    max_new_tokens: list[int] | None = flag(
        None,
        f"Len_l, longest completion, tokens; default {BY_LEVEL['max_new_tokens']} for the shipped "
        "model, none for others",
        "ours; DeepScaleR 8192-24576",
    )
    reward: list[str] = flag(
        ["math"], "R_l: math, or path.py:function", "paper: verifiable outcome"
    )
    length_weight: list[float] | None = flag(
        None,
        f"K_l, weight of the length reward; default {BY_LEVEL['length_weight']}",
        "ours; paper: K_l > 0, without a number; DAPO: 0.5",
    )
    eps_low: list[float] = flag([0.2], "ratio's lower clip bound is 1 - eps_low", "DAPO")
    eps_high: list[float] = flag([0.28], "ratio's upper clip bound is 1 + eps_high", "DAPO")
    inner_epochs: list[int] = flag(
        [1], "mu_l, passes over an update's groups", "DeepScaleR, FastCuRL"
    )
    updates: list[int] | None = flag(
        None,
        f"M_l, updates of the level; 0: it is not trained; default {BY_LEVEL['updates']}, or no "
        "bound where --tokens is given",
    )
    tokens: list[int] | None = flag(
        None,
        "budget of the level in sampled tokens, those of dropped groups too; 0: it is not trained; "
        "with --updates, whichever is used up first ends the level",
    )


@dataclass(frozen=True)
class Objective:
    _argument_group_name = "objective"

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
        "kimi", "length reward, used where K_l > 0", "Kimi k1.5; `overlong`: DAPO"
    )
    overlong_cache: int | None = flag(
        None,
        "last tokens, over which `overlong` falls to -1; default Len_l / 5",
        "DAPO: 4096 of 20480",
    )
    kl_coef: float = flag(
        0.0,
        "weight of the k3 penalty towards the starting policy",
        "paper: none; DeepScaleR 0.001",
    )
    max_draws: int = flag(10, "draws (of P_l prompts) per update before it is skipped", "DAPO")
    surplus: Literal["keep", "drop", "missing"] = flag(
        "keep",
        "groups that an update drew beyond N_l: keep them for the next one; drop them; or draw, "
        "after the first time, only as many prompts as are missing (--max-draws x P_l in all), "
        "and keep the rest",
        "ours; DAPO and verl drop",
    )


@dataclass(frozen=True)
class Optimizer:
    _argument_group_name = "optimizer"

    lr: float | None = flag(
        None,
        "learning rate of AdamW; within each level times warm-up and decay; default "
        f"{LR:g} for the shipped model, none for others; with --lora-rank the best one is about "
        "ten times that of full training (Schulman et al. 2025)",
        "ours, for 0.6 M parameters; DeepScaleR 1e-6 for 1.5 B",
    )
    warmup: int = flag(5, "updates of linear warm-up, in each level", "ours; DAPO 10 steps")
    lr_decay: Literal["none", "linear", "cosine"] = flag(
        "linear", "from 1 at a level's start to 0 at its end", "ours; DeepScaleR none"
    )
    minibatches: int = flag(
        2, "optimizer steps per pass over the update's groups", "FastCuRL: 128 / 64 prompts"
    )
    max_grad_norm: float = flag(1.0, "gradient norm is clipped to this", "DAPO")
    lora_rank: int = flag(
        0,
        "LoRA: freeze the weights and learn factors B A of this rank; 0: learn the weights. In RL "
        "small ranks, even 1, do as well as full training: an episode teaches few bits",
        "arXiv 2106.09685; Schulman et al. 2025, LoRA Without Regret",
    )
    lora_alpha: float = flag(
        32.0,
        "B A is scaled by alpha / rank, and the best --lr hardly depends on the rank; for rsLoRA "
        "(arXiv 2312.03732) give its alpha times the root of the rank",
        "Schulman et al. 2025",
    )
    lora_targets: list[str] | None = flag(
        None,
        "linear layers with factors, such as q_proj v_proj; default all of the decoder's blocks, "
        "which does better than attention alone at equal numbers of parameters",
        "Schulman et al. 2025",
    )


@dataclass(frozen=True)
class SamplingFlags:
    _argument_group_name = "sampling and evaluation"

    temperature: float = flag(
        1.0, "of the softmax, in sampling and learning alike", "DAPO; DeepScaleR 0.6"
    )
    seed: int = flag(0, "seed of everything random")
    eval_every: int | None = flag(
        None, "updates between evaluations; default: at ends of levels alone; 0: none at all"
    )
    eval_quality: list[float] | None = flag(
        None, "thresholds that cut the held-out problems, reported apart; default Q_l"
    )
    eval_max_new_tokens: int | None = flag(
        None, "longest completion of a held-out problem, tokens; default the largest Len_l"
    )
    target_pass_rate: float | None = flag(
        None,
        "within a level, the next problems are those whose running pass rate is nearest to this; "
        "default: random order",
        "a control, not the method: AdaRFT 0.5",
    )
    allow_last_number: bool = flag(False, "without a box, grade the last number")
    reward_timeout: float = flag(
        60.0, "seconds that a call of your own --reward may take; a later one breaks its group"
    )


@dataclass(frozen=True)
class Memory:
    _argument_group_name = "memory and speed"

    device: Literal["cpu", "cuda"] = flag(
        "cuda" if torch.cuda.is_available() else "cpu", "where the model lives"
    )
    dtype: Literal["float32", "bfloat16", "float64"] | None = flag(
        None,
        "of the weights; bfloat16 has float32 masters; default float32, on a GPU bfloat16 for any "
        "model but the shipped one",
    )
    slots: int = flag(SLOTS, "completions decoded together, on each process; memory and speed only")
    micro_batch_tokens: int = flag(2048, f"padded tokens per backward pass; {MEMORY_ONLY}")
    logits_per_chunk: int = flag(
        LOGITS_PER_CHUNK, "logits that the learner holds at once, tokens x vocabulary; memory only"
    )
    recompute: bool = flag(
        False, "activation checkpointing: compute a layer again in the backward pass; memory only"
    )
    fsdp: bool = flag(
        False,
        "cut weights, gradients, optimizer over torchrun's processes (FSDP2); memory only; with "
        "--lora-rank nothing is cut",
    )


@dataclass(frozen=True)
class Config(Memory, SamplingFlags, Optimizer, Objective, Levels, Prompting, Files):
    """Every flag: default, unit, source. Those of type list take one value, or one per level."""

    @property
    def sharded(self):
        """With LoRA there is nothing to cut: frozen weights are whole on every process, to sample
        from, and factors are small."""
        return self.fsdp and not self.lora_rank


SECTIONS = (
    Levels,
    Objective,
    Optimizer,
    SamplingFlags,
    Prompting,
    Memory,
    Files,
)  # as --help shows them
PER_LEVEL = [f.name for f in fields(Level) if f.name != "overlong_cache"]
# With --resume: no result depends on them.
MAY_CHANGE = (
    "device slots micro_batch_tokens logits_per_chunk recompute fsdp save_every keep_checkpoints "
    "keep_completions tracker"
)
RULES = (
    (
        "lr temperature max_grad_norm lora_alpha reward_timeout",
        lambda v: 0 < v < math.inf,
        "above 0",
    ),
    ("target_pass_rate", lambda v: 0 < v < 1, "in (0, 1)"),
    (
        "eps_low eps_high length_weight warmup kl_coef eval_every save_every seed updates tokens "
        "lora_rank keep_completions",
        lambda v: 0 <= v < math.inf,
        "at least 0",
    ),
    (
        "prompts max_new_tokens inner_epochs minibatches micro_batch_tokens slots "
        "overlong_cache max_draws logits_per_chunk keep_checkpoints eval_max_new_tokens",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("group_size", lambda v: v >= 2, "at least 2"),  # a group of one has no advantage
    ("eps_low", lambda v: v < 1, "below 1"),
    ("quality eval_quality", math.isfinite, "a finite number"),
)


def option(name):
    """A flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


def make_parser():
    """One option for every flag. HfArgumentParser also reads --group_size for --group-size; --help
    shows the latter alone."""
    parser = HfArgumentParser(
        SECTIONS,
        description="EPRLI: reinforcement learning level by level (arXiv 2508.01604).",
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        allow_abbrev=False,
    )
    for action in parser._actions:
        action.option_strings = [name for name in action.option_strings if "_" not in name]
    return parser


def given_flags(parser, arguments):
    """{name: value} of the flags that stand on the command line."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def parse(parser, arguments):
    """-> Config of the command line. A preset stands in front of it, so that what is given wins."""
    cfg = Config(**vars(parser.parse_args(arguments)))
    if cfg.preset:
        words = [*PRESETS[cfg.preset][0].split(), *arguments]
        cfg = Config(**vars(parser.parse_args(words)))
    return cfg


def fill(cfg):
    """The Config with defaults that depend on the model. Raises ValueError where there is none."""
    own = {"lr": LR, "max_new_tokens": BY_LEVEL["max_new_tokens"]}
    missing = [name for name in own if getattr(cfg, name) is None]
    if missing and not is_shipped(cfg.model):
        names = " and ".join(map(option, missing))
        raise ValueError(
            f"{names}: our defaults fit the shipped model alone; give them for {cfg.model}, or a "
            f"--preset that states them ({', '.join(PRESETS)})"
        )
    dtype = cfg.dtype or default_dtype(cfg.model, cfg.device)
    return replace(cfg, dtype=dtype, lr=cfg.lr or LR)


def check(cfg):
    """Raise ValueError for what no data can make right."""
    enough = f"at least --minibatches ({cfg.minibatches})"
    rules = [*RULES, ("buffer_groups", lambda v: v >= cfg.minibatches, enough)]
    if cfg.difficulty == "pass_rate":
        rate = "in (0, 1]: a difficulty is 1 - pass rate"
        rules.insert(0, ("quality eval_quality", lambda v: 0 < v <= 1, rate))
    for names, good, words in rules:
        for name in names.split():
            values = getattr(cfg, name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not good(value):
                    raise ValueError(f"{option(name)} must be {words}, found {value}")


def level_values(cfg, measured):
    """{name: its values} of the per-level flags, with all defaults."""
    values = {name: getattr(cfg, name) or BY_LEVEL.get(name) for name in PER_LEVEL}
    values["prompts"] = cfg.prompts or cfg.buffer_groups
    values["tokens"] = cfg.tokens or [None]
    if cfg.tokens and not cfg.updates:
        values["updates"] = [None]
    if not cfg.quality:
        values["quality"] = default_quality(cfg, measured)
    elif cfg.difficulty == "pass_rate" and not measured and set(cfg.quality) != {1.0}:
        raise ValueError(
            f"--quality cuts measured difficulty, but no problem of {cfg.data} has a pass_rate: "
            f"measure it with `python eval.py --model {cfg.model} --data {cfg.data} --samples 16 "
            "--add-pass-rate FILE`, or use --difficulty level"
        )
    return values


def resolve_levels(cfg, measured):
    """The levels that the per-level flags describe. Each flag has one value, or one per level.

    measured  whether some training problem has a pass rate
    """
    values = level_values(cfg, measured)
    binding = ["quality", *(name for name in PER_LEVEL if getattr(cfg, name))]
    num_levels = max(len(values[name]) for name in binding)
    for name in binding:
        if len(values[name]) not in (1, num_levels):
            raise ValueError(
                f"there are {num_levels} levels, and {option(name)} needs 1 or {num_levels} "
                f"values, not {len(values[name])}{'' if getattr(cfg, name) else ' as by default'}"
            )
    levels = []
    for i in range(num_levels):
        own = {}
        for name, some in values.items():
            own[name] = some[-1 if num_levels == 1 else min(i, len(some) - 1)]
        cache = cfg.overlong_cache or max(1, own["max_new_tokens"] // 5)
        if cache > own["max_new_tokens"]:
            raise ValueError(
                f"--overlong-cache {cache} exceeds --max-new-tokens: all would be punished"
            )
        levels.append(Level(**own, overlong_cache=cache))
    return levels


def default_quality(cfg, measured):
    if cfg.difficulty == "level":
        raise ValueError(
            "--difficulty level needs --quality: the highest declared number of each level, "
            "e.g. --quality 1 2"
        )
    return QUALITY if measured else [1.0]


def explain(cfg, levels):
    """The resolved objective with its numbers, each with its source ("given": a flag set it)."""
    std = " / (std_G r + 1e-6)" if cfg.adv_std == "group" else ""
    lines = [
        f"maximise  J_l = mean over tokens ({cfg.loss_norm}, see eprli.loss_weight) of "
        f"min(rho A, clip(rho, 1 - eps_low_l, 1 + eps_high_l) A) - {cfg.kl_coef:g} k3",
        f"  A = (r - mean_G r){std}; r = R_l + K_l length_l({cfg.length_kind})",
        f"  rho = pi / pi_old, both at temperature {cfg.temperature:g}",
        f"  AdamW, betas {BETAS}, weight decay {WEIGHT_DECAY} [verl]",
        f"with {len(levels)} level(s), values level by level:",
    ]
    default, stated = fill(Config()), {}
    if cfg.preset:
        words, missing = PRESETS[cfg.preset]
        stated = given_flags(make_parser(), words.split())
        lines.append(f"  --preset {cfg.preset}: {missing}")
    for section in (Levels, Objective, Optimizer, SamplingFlags):
        for f in fields(section):
            value = getattr(cfg, f.name)
            source = f.metadata["help"].rpartition("[")[2]
            if value != getattr(default, f.name) or f.name in stated:
                source = f"{cfg.preset}]" if stated.get(f.name) == value else "given]"
            if f.name in PER_LEVEL:
                value = " ".join(str(getattr(level, f.name)) for level in levels)
            lines.append(f"  {option(f.name)} {value} [{source}")
    return "\n".join(lines)
