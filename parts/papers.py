"""What the papers train with, what they evaluate on and how, and what they found."""

import re
from pathlib import Path

import numpy as np

from data import INSTRUCTION
from parts.files import source_of
from parts.statistics import shown

# --preset: the flags that a source states, as on the command line; and what it leaves unsaid, or
# uses and we do not have. Stages on the same problems are levels that share them (--quality 1).
STAGES = (
    "--quality 1 --lr 1e-6 --lr-decay none --warmup 0 --eps-low 0.2 --eps-high 0.2 --kl-coef 0.001 "
    "--temperature 0.6 --loss-norm token --filter all --length-weight 0 --inner-epochs 1 "
    "--surplus drop"
)
PRESETS = {
    "paper": (
        "--group-size 16 --loss-norm sequence --adv-std group --filter mixed --kl-coef 0",
        "unsaid: base model, lr, warm-up, batch, temperature, Len_l, K_l, Q_l, clip bounds, budget",
    ),
    "deepscaler": (
        f"{STAGES} --buffer-groups 128 --minibatches 2 --group-size 8 16 16 --updates 1040 480 270 "
        "--max-new-tokens 8192 16384 24576",
        "not here: entropy bonus 0.001; its token mean is taken per micro-batch",
    ),
    "fastcurl": (
        f"{STAGES} --buffer-groups 128 64 64 64 --minibatches 1 --group-size 8 8 8 16 "
        "--updates 160 590 230 580 --max-new-tokens 8192 16384 24576 16384",
        "not here: entropy bonus 0.001; problems cut by the length of their prompts (stages short, "
        "all, long, all); two minibatches in its first stage",
    ),
    "dapo": (
        "--buffer-groups 512 --prompts 1536 --group-size 16 --minibatches 16 --inner-epochs 1 "
        "--lr 1e-6 --lr-decay none --warmup 10 --max-grad-norm 1 --eps-low 0.2 --eps-high 0.28 "
        "--kl-coef 0 --temperature 1 --loss-norm token --filter mixed --max-draws 10 "
        "--surplus drop --max-new-tokens 20480 --length-kind overlong --overlong-cache 4096 "
        "--length-weight 0.5",
        "not here: dual clip 10; weight decay 0.1 (ours 0.01). Unsaid: the number of updates",
    ),
    "dr-grpo": (
        "--buffer-groups 128 --group-size 8 --minibatches 1 --inner-epochs 1 --lr 1e-6 "
        "--lr-decay none --warmup 0 --kl-coef 0 --temperature 1 --adv-std none "
        "--loss-norm constant --filter all --length-weight 0 --max-new-tokens 3000",
        "unsaid: clip bounds (PPO's default), the number of updates",
    ),
}

# What --protocol sets: the evaluation scripts of the repositories DeepScaleR and FastCuRL.
FASTCURL = {
    "samples": 16,
    "temperature": 0.6,
    "top_p": 1.0,
    "max_new_tokens": 32768,
    "suffix": f" {INSTRUCTION}",
}
PROTOCOLS = {"deepscaler": FASTCURL | {"top_p": 0.95}, "fastcurl": FASTCURL}
# Both need these too, which a training run (--like) may have set otherwise.
PLAIN = {"top_k": 0, "system": None, "examples": None, "template": None, "template_kwargs": "{}"}
PLAIN |= {"stop": [], "reward": "math"}

# Model (protocol): per cent right as published, and the published mean.
PUBLISHED = """
                                        aime24  math500  amc22_23  minerva  olympiadbench  mean
R1-Distill-Qwen-1.5B (deepscaler)       28.8    82.8     62.9      26.5     43.3           48.9
Still-1.5B (deepscaler)                 32.5    84.4     66.7      29.0     45.4           51.6
DeepScaleR-1.5B (deepscaler)            43.1    87.8     73.6      30.2     50.0           57.0
FastCuRL-1.5B-Preview (fastcurl)        43.1    88.0     74.2      31.6     50.4           57.5
FastCuRL-1.5B-V2 (fastcurl)             47.5    89.3     77.0      32.8     53.3           60.0
FastCuRL-1.5B-V3 (fastcurl)             49.6    90.5     78.5      34.7     54.5           61.6
EPRLI (unstated, k = 1 by its digits)   50.0    89.2     77.1      35.3     51.9           60.7
"""
HEADER, *ROWS = [re.split(" {2,}", line) for line in PUBLISHED.strip("\n").splitlines()]
FIVE = HEADER[1:-1]


def mean_of(intervals):
    """Mean of independent means: squared distances to the ends add up (Zou & Donner 2008)."""
    means, low, high = np.array(intervals).T
    mean, n = means.mean(), len(means)
    return mean, mean - np.linalg.norm(means - low) / n, mean + np.linalg.norm(high - means) / n


def print_table(summary):
    """Our row above the published ones, if some of the five benchmarks were evaluated.

    summary  what summary.json holds; a benchmark is known by the name of its file
    """
    measure = f"avg@{summary['samples']}"
    results = {}  # by the name of a file, without its folder and ending
    for path, levels in summary["files"].items():
        if source_of(path) == path:  # a part of a benchmark stands beside no published number
            results[Path(path).stem] = levels["all"][measure]
    ours = [results.get(name) for name in FIVE]
    if not any(ours):
        return
    ours.append(mean_of(ours) if all(ours) else None)
    protocol = summary["protocol"] or "own settings"
    for name, value in (PLAIN | PROTOCOLS.get(protocol, {})).items():
        if summary[name] != value:
            protocol = "own settings"
    title = f"{Path(summary['model']).name} ({protocol})"
    cells = [shown(measure, x) if x else "-" for x in ours]
    for first, *others in [HEADER, [title, *cells], *ROWS]:
        print(f"{first:38}" + "".join(f"  {cell:19}" for cell in others))
