"""Experiments that are run again, as flags of train.py: the map, its bases, and what they read."""

import re
from dataclasses import replace
from pathlib import Path

from data import read_problems, write_problems
from policy.checkpoint import SHIPPED

RUNS = Path("runs/experiments")  # seen from the root of the project, as all paths are
DECLARED = RUNS / "data/declared.jsonl"
EVALUATED = (
    "--max-new-tokens 128 --eval-quality 0.8 1.0 --save-every 0 --eval-data assets/heldout.jsonl"
)
# Bases by what a sample of a hard problem is right: more warm start from the shipped model, with
# these flags of warmstart.py
BASES = {
    "0.6 %": "--steps 300 --slips 1 1 1",
    "1 %": "--steps 300 --slips 0.88 0.92 0.96",
    "2.5 %": "--steps 300 --slips 0.7 0.8 0.9",
    "6 %": "--steps 300 --slips 0.55 0.7 0.8",
    "8 %": "",  # the shipped one
    "20 %": "--steps 300 --slips 0.25 0.4 0.6",
}
EVERY = dict.fromkeys(BASES, 8) | {"0.6 %": 3, "1 %": 3, "2.5 %": 4}  # updates: they draw the most
BUDGET = 1_600_000
FIRST = 260_000  # of it below the hard level: as many as a default run spends there
RATE = "2e-4"  # of mean rank 1.3 in results/choose.jsonl; 3e-4 has 1.7, 1e-4 3, 5e-4 4


def path_of(name):
    """An arm's or a base's name, which may have blanks and slashes, as one of a file"""
    return RUNS / re.sub(r"\W+", "-", name).strip("-")


def folder(base):
    """Where a base is, and beside it, as a .jsonl, what it can do"""
    return path_of(f"base {base} {BASES[base]}")


def arms_of(base):
    """-> {arm: flags}"""
    model = f" --model {folder(base)}" if BASES[base] else ""
    shared = f"--lr {RATE} --length-weight 0.3 {EVALUATED}{model}"
    constant = f"--lr-decay none --warmup 2 --eval-every {EVERY[base]}"
    measured = f"{shared} --data {folder(base)}.jsonl {constant}"
    first, hard = FIRST // 4, BUDGET - FIRST
    ladder = f"--quality 0.5 0.7 0.9 1.0 --tokens {first} {first} {2 * first} {hard}"
    arms = {
        "mix": f"--quality 1.0 --tokens {BUDGET} {measured}",
        "levels": f"--quality 0.8 1.0 --tokens {FIRST} {hard} {measured}",
        "ladder": f"{ladder} {measured}",
        "easy only": f"--quality 0.8 1.0 --tokens {BUDGET} 0 {measured}",
        "hard only": f"--quality 0.8 1.0 --tokens 0 {BUDGET} {measured}",
    }
    if base in ("1 %", "8 %"):  # what the mix gains by leaving out what is always solved
        arms["all problems"] = f"--tokens {BUDGET} --data {DECLARED} {shared} {constant}"
    return arms


ARMS = {"map": {f"{base}: {arm}": flags for base in BASES for arm, flags in arms_of(base).items()}}


def base_commands():
    """What makes the bases that are missing: some more warm start, and difficulty measured."""
    for base, made in BASES.items():
        rates = folder(base).with_suffix(".jsonl")
        if rates.exists():
            continue
        model = folder(base) if made else "assets/tiny"
        if made:
            start = "-m experiments.warmstart --start assets/tiny --rare 0"
            yield f"{start} {made} --out {model}"
        measure = f"--samples 16 --max-new-tokens 128 --add-pass-rate {rates}"
        yield f"eval.py --model {model} --data assets/train.jsonl {measure}"


def declare_levels():
    """Write the training problems with the number of their steps in place of a measured rate."""
    if not DECLARED.exists():
        DECLARED.parent.mkdir(parents=True, exist_ok=True)
        problems = read_problems(SHIPPED / "train.jsonl")
        declared = (replace(p, level=len(p.other["steps"]), pass_rate=None) for p in problems)
        write_problems(DECLARED, declared)
