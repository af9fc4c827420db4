"""The arms of every experiment, as flags of train.py. The first arm is what the others are compared
with; TWO alone has the defaults by level: kimi with K_2 = 0.3, eps 0.2 and 0.28, sequence norm and
std. What is common to all stands in BASE; every arm spends BUDGET sampled tokens in all."""

import random
from dataclasses import replace
from pathlib import Path

import data
from eprli import QUALITY
from experiments.problems import terms
from parts.policy import SHIPPED

VARIANTS = Path("runs/experiments/data")  # all paths are seen from the root of the project
FEW = {"levels": f"--data {VARIANTS / 'few.jsonl'} --samples 16 --max-new-tokens 128"}  # pass@16
BUDGET, EASY = 400_000, 120_000  # sampled tokens of a run; of them in level 1
HARD = BUDGET - EASY
RATES = (3e-4, 5e-4, 8e-4)
EDGES = {"L = 1": 1.5e-4, "target 0.5": 1.5e-4, "L = 4": 1.2e-3}  # tried too: see PROTOCOL.md
BASE = (
    "--eval-quality 0.8 1.0 --max-new-tokens 128 --eval-max-new-tokens 128 --eval-every 10 "
    "--save-every 0 --eval-data assets/heldout.jsonl"
)
TWO = f"--quality 0.8 1.0 --tokens {EASY} {HARD}"
ONE = f"--quality 1.0 --tokens {BUDGET}"


def rates(arm):
    """The learning rates that are tried for an arm of `levels`."""
    return (*RATES, EDGES[arm]) if arm in EDGES else RATES


def two_levels(file):
    return f"{TWO} --data {VARIANTS / file}"


def length_weight(kind, weight):
    return f"{TWO} --length-kind {kind} --length-weight 0 {weight}"


def clip(low, high):
    return f"{TWO} --eps-low {low} --eps-high {high}"


EXPERIMENTS = {
    "levels": {
        "EPRLI": TWO,
        "L = 1": ONE,
        "hard only": f"--quality 0.8 1.0 --tokens 0 {BUDGET}",
        "L = 3": f"--quality 0.6 0.85 1.0 --tokens {EASY // 2} {EASY // 2} {HARD}",
        "L = 4": f"--quality 0.5 0.7 0.9 1.0 --tokens {EASY // 2} {EASY // 2} "
        f"{HARD // 2} {HARD // 2}",
        "hard first": f"--quality 1.0 0.8 --tokens {HARD} {EASY} --length-weight 0.3 0",
        "interleaved": f"{TWO} --schedule interleaved",
        "shuffled": two_levels("random.jsonl"),
        # Of a flag that is gone. It drew the problems whose running pass rate was nearest to 0.5.
        "target 0.5": None,
    },
    "controls": {  # of levels: what else differs between its arms
        "EPRLI": TWO,
        "EPRLI, K = 0.3": f"{TWO} --length-weight 0.3",
        "EPRLI, warmup 1": f"{TWO} --warmup 1",
        "L = 1": ONE,
        "L = 1, warmup 1": f"{ONE} --warmup 1",
        "hard only": f"--quality 0.8 1.0 --tokens 0 {BUDGET}",
        "interleaved": f"{TWO} --schedule interleaved",
        "interleaved, missing": f"{TWO} --schedule interleaved --surplus missing",
        "shuffled": two_levels("random.jsonl"),
        "shuffled, with solved": two_levels("shuffled.jsonl"),
    },
    "sharing": {
        "shared": TWO,
        "easy alone": f"--quality 0.8 1.0 --tokens {BUDGET // 2} 0",
        "hard alone": f"--quality 0.8 1.0 --tokens 0 {BUDGET // 2}",
    },
    "length": {
        "K = 0": length_weight("kimi", 0),
        "kimi 0.3": TWO,
        "kimi 0.6": length_weight("kimi", 0.6),
        "cosine 0.3": length_weight("cosine", 0.3),
        "cosine 0.6": length_weight("cosine", 0.6),
        "overlong 0.3": length_weight("overlong", 0.3) + " --overlong-cache 64",
        "overlong 0.6": length_weight("overlong", 0.6) + " --overlong-cache 64",
        "Len falling": f"{TWO} --max-new-tokens 128 64",
        "Len rising": f"{TWO} --max-new-tokens 48 128",
        "Len equal": TWO,
    },
    "buffer": {
        "keep": TWO,
        "drop": f"{TWO} --surplus drop",
        "missing": f"{TWO} --surplus missing",
        "no filter": f"{TWO} --filter all",
        "N = 8": f"{TWO} --buffer-groups 8",
        "N = 32": f"{TWO} --buffer-groups 32",
    },
    "clip": {
        "0.2 / 0.28": TWO,
        "0.1 / 0.1": clip(0.1, 0.1),
        "0.2 / 0.2": clip(0.2, 0.2),
        "0.1 / 0.4": clip(0.1, 0.4),
        "by level": clip("0.2 0.1", "0.28 0.4"),
    },
    "norm": {
        "sequence, std": TWO,
        "sequence": f"{TWO} --adv-std none",
        "token, std": f"{TWO} --loss-norm token",
        "token": f"{TWO} --loss-norm token --adv-std none",
        "constant, std": f"{TWO} --loss-norm constant",
        "constant": f"{TWO} --loss-norm constant --adv-std none",
    },
    "difficulty": {
        "64 samples": TWO,
        "4 samples": two_levels("four.jsonl"),
        "Q = 0.6": f"--quality 0.6 1.0 --tokens {EASY} {HARD}",
        "Q = 0.9": f"--quality 0.9 1.0 --tokens {EASY} {HARD}",
        "steps": two_levels("steps.jsonl"),
        "prompt length": two_levels("length.jsonl"),
        "random": two_levels("random.jsonl"),
        "L = 1, 2x": f"--quality 1.0 --tokens {2 * BUDGET}",  # what 4 samples of all problems cost
        "64 samples, 2x": f"--quality 0.8 1.0 --tokens {2 * EASY} {2 * HARD}",
    },
    # What the doubled budget of `difficulty` shows: levels, or the length reward of level 1?
    # Every arm differs from the one before in one thing.
    "weight": {
        "mix, K = 0.3": f"--quality 1.0 --tokens {2 * BUDGET} --length-weight 0.3 --lr 3e-4",
        "levels, K = 0.3": f"--quality 0.8 1.0 --tokens {2 * EASY} {2 * HARD} "
        "--length-weight 0.3 --lr 3e-4",
        "levels, K_1 = 0": f"--quality 0.8 1.0 --tokens {2 * EASY} {2 * HARD} "
        "--length-weight 0 0.3 --lr 3e-4",
    },
    "reward": {
        "outcome": TWO,
        "process": f"{TWO} --reward assets/process.py:right_steps",
        "process, outcome": f"{TWO} --reward assets/process.py:right_steps math",
    },
}

# A real model, with data that `runs/experiments/smollm2` must hold: see RESULTS.md
real = VARIANTS.parent / "smollm2"
prompting = (
    "--examples assets/word_examples.jsonl --temperature 0.6 --max-new-tokens 64 --dtype bfloat16"
)
REAL = (
    f"--model {real / 'model'} --data {real / 'pool.jsonl'} --eval-data {real / 'heldout.jsonl'} "
    f"{prompting} --eval-max-new-tokens 64 --eval-quality 0.95 1.0 --eval-every 10 --prompts 8 "
    "--group-size 8 --buffer-groups 4 --slots 64 --length-weight 0 --lr 3e-5 --warmup 2"
)
FEW["smollm2"] = f"--data {real / 'few.jsonl'} --samples 16 {prompting}"
EXPERIMENTS["smollm2"] = {
    "EPRLI": f"{REAL} --quality 0.95 1.0 --tokens 30000 60000",
    "L = 1": f"{REAL} --quality 1.0 --tokens 90000",
    "hard only": f"{REAL} --quality 0.95 1.0 --tokens 0 90000",
}

EXPERIMENTS["rates"] = {}
for arm, flags in EXPERIMENTS["levels"].items():
    for lr in rates(arm):
        EXPERIMENTS["rates"][f"{arm}, {lr:g}"] = flags and f"{flags} --lr {lr:g} --eval-every 1000"


# What the student of another base does differently: --slips carry borrow sign of warmstart.py
BASES = {"good at level 1": "0.05 0.05 0.75", "lost at level 2": "1 1 1"}
EXPERIMENTS["base"] = {}
for base in BASES:
    folder = VARIANTS.parent / base.replace(" ", "-")
    own = f"--model {folder} --data {folder}.jsonl"
    for arm in ("EPRLI", "L = 1", "hard only"):
        EXPERIMENTS["base"][f"{base}: {arm}"] = f"{EXPERIMENTS['levels'][arm]} {own}"
    EXPERIMENTS["base"][f"{base}: L = 1, 5e-4"] = f"{ONE} {own} --lr 5e-4"  # EPRLI's rate
    if base == "lost at level 2":
        easy = f"--quality 0.8 1.0 --tokens {BUDGET} 0 {own}"
        EXPERIMENTS["base"][f"{base}: easy only"] = easy
        twice = f"--quality 1.0 --tokens {2 * BUDGET} {own} --lr 5e-4"
        EXPERIMENTS["base"][f"{base}: L = 1, 5e-4, 2x"] = twice


def base_commands():
    """What makes the other bases: some more warm start, and difficulty measured anew."""
    for base, slips in BASES.items():
        folder = VARIANTS.parent / base.replace(" ", "-")
        if not folder.with_suffix(".jsonl").exists():
            yield (
                f"-m experiments.warmstart --start assets/tiny --rare 0 --steps 300 "
                f"--slips {slips} --out {folder}"
            )
            yield (
                f"eval.py --model {folder} --data assets/train.jsonl --samples 16 "
                f"--max-new-tokens 128 --add-pass-rate {folder}.jsonl"
            )


def ranked(problems, proxy):
    """The problems with the pass rates of all dealt out anew: the best to the lowest proxy. So that
    levels cut at the same Q have the same sizes."""
    rates = sorted((p.pass_rate for p in problems), reverse=True)
    return [replace(p, pass_rate=rate) for p, rate in zip(sorted(problems, key=proxy), rates)]


def prepare():
    """Write the files of problems that the arms name, unless they are there."""
    problems = data.read_problems(SHIPPED / "train.jsonl")
    held_out = data.read_problems(SHIPPED / "heldout.jsonl")
    rng, four = random.Random(0), []
    for p in problems:
        samples = range(p.other["measured"]["samples"])
        right = sum(i < p.pass_rate * len(samples) for i in rng.sample(samples, 4))
        four.append(replace(p, pass_rate=right / 4))
    files = {
        "few": data.cut_levels(held_out, QUALITY, "pass_rate")[0][1][:64],
        "four": four,
        "shuffled": ranked(problems, lambda p: rng.random()),
        "steps": ranked(problems, lambda p: (len(terms(p.problem)), rng.random())),
        "length": ranked(problems, lambda p: (len(p.problem), rng.random())),
        "random": ranked([p for p in problems if p.pass_rate < 1], lambda p: rng.random()),
    }
    VARIANTS.mkdir(parents=True, exist_ok=True)
    for name, some in files.items():
        path = VARIANTS / f"{name}.jsonl"
        if not path.exists():
            data.write_problems(path, some)
