"""The arms of experiments that are still being run, as flags of train.py; those of older ones stand
with their results, see tables.commands. CONTRASTS says what is compared; elsewhere each arm is
compared with the first of its family, the words before the colon."""

import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import data
from experiments.problems import generate, terms
from policy.checkpoint import SHIPPED

VARIANTS = Path("runs/experiments/data")  # all paths are seen from the root of the project
MEASURED = (  # by every arm, on the shipped held-out problems
    "--max-new-tokens 128 --eval-quality 0.8 1.0 --save-every 0 --eval-data assets/heldout.jsonl"
)
# Of the policy that a run ends with, as flags of eval.py
GREEDY = "--data assets/heldout.jsonl --samples 1 --temperature 0 --max-new-tokens 128"
MIX, TWO = "--quality 1.0", "--quality 0.8 1.0"

# ------------------------------------------------------------------------------------- the map

# Bases by what a sample of a hard problem is right: more warm start from the shipped model, with
# these flags of warmstart.py. Levels are measured with 16 samples of each problem.
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
RATE = "2e-4"  # of mean rank 1.3 in `choose`; 3e-4 has 1.7, 1e-4 3, 5e-4 4
DECLARED = f"--data {VARIANTS}/declared.jsonl"


def folder(base):
    """Where a base is, and beside it, as a .jsonl, what it can do"""
    return VARIANTS.parent / re.sub(r"\W+", "-", f"base {base} {BASES[base]}").strip("-")


bases = {}
for base in BASES:
    own = f"--lr {RATE} --length-weight 0.3 {MEASURED}"
    if BASES[base]:
        own += f" --model {folder(base)}"
    constant = f"--lr-decay none --warmup 2 --eval-every {EVERY[base]}"
    measured = f"{own} --data {folder(base)}.jsonl {constant}"
    own += f" {constant}"
    first, hard = FIRST // 4, BUDGET - FIRST
    bases[f"{base}: mix"] = f"{MIX} --tokens {BUDGET} {measured}"
    bases[f"{base}: levels"] = f"{TWO} --tokens {FIRST} {hard} {measured}"
    ladder = f"--quality 0.5 0.7 0.9 1.0 --tokens {first} {first} {2 * first} {hard}"
    bases[f"{base}: ladder"] = f"{ladder} {measured}"
    bases[f"{base}: easy only"] = f"{TWO} --tokens {BUDGET} 0 {measured}"
    bases[f"{base}: hard only"] = f"{TWO} --tokens 0 {BUDGET} {measured}"
    if base in ("1 %", "8 %"):  # what the mix gains by leaving out what is always solved
        bases[f"{base}: all problems"] = f"--tokens {BUDGET} {DECLARED} {own}"

ARMS = {"map": bases}
# Pairs that are compared, "A, less B"; elsewhere each arm with the first of its family, see
# tables.with_first
CONTRASTS = {
    "confounds": """
mix, 3e-4, K = 0.3, less mix, 3e-4, K = 0
mix, 5e-4, K = 0.3, less mix, 5e-4, K = 0
levels, 3e-4, K = 0.3, less levels, 3e-4, K = 0
levels, 5e-4, K = 0.3, less levels, 5e-4, K = 0
hard only, 3e-4, K = 0.3, less hard only, 3e-4, K = 0
hard only, 5e-4, K = 0.3, less hard only, 5e-4, K = 0
levels, 3e-4, K = 0, less mix, 3e-4, K = 0
levels, 5e-4, K = 0, less mix, 5e-4, K = 0
levels, 3e-4, K = 0.3, less mix, 3e-4, K = 0.3
levels, 5e-4, K = 0.3, less mix, 5e-4, K = 0.3
mix, 3e-4, K = 0, 62 updates, less mix, 3e-4, K = 0
mix, 3e-4, K = 0.3, less mix, 3e-4, K = 0, 62 updates
""",
    "lost": """
levels, less mix
levels, warm-up 1, less mix, warm-up 1
mix, warm-up 1, less mix
mix, 8e-4, less mix
mix, 2x, less mix
""",
}


def base_commands():
    """What makes the bases: some more warm start from one checkpoint, and difficulty measured."""
    measure = "--samples 16 --max-new-tokens 128 --add-pass-rate"
    choose, new = (VARIANTS / f"{name}.jsonl" for name in ("choose", "new"))
    if not choose.exists():
        yield f"eval.py --model assets/tiny --data {new} {measure} {choose}"
    for base, made in BASES.items():
        if folder(base).with_suffix(".jsonl").exists():
            continue
        if made:
            more = f"-m experiments.warmstart --start assets/tiny --rare 0 {made}"
            yield f"{more} --out {folder(base)}"
        model = folder(base) if made else "assets/tiny"
        rates = folder(base).with_suffix(".jsonl")
        yield f"eval.py --model {model} --data assets/train.jsonl {measure} {rates}"


def ranked(problems, proxy):
    """The problems with the pass rates of all dealt out anew: the best to the lowest proxy. So that
    levels cut at the same Q have the same sizes."""
    rates = sorted((p.pass_rate for p in problems), reverse=True)
    return [replace(p, pass_rate=rate) for p, rate in zip(sorted(problems, key=proxy), rates)]


def prepare():
    """Write the files of problems that the arms name, unless they are there."""
    problems = data.read_problems(SHIPPED / "train.jsonl")
    held_out = data.read_problems(SHIPPED / "heldout.jsonl")
    known, rng, four = {p.problem for p in held_out}, random.Random(0), []
    for p in problems:
        samples = range(p.other["measured"]["samples"])
        right = sum(i < p.pass_rate * len(samples) for i in rng.sample(samples, 4))
        four.append(replace(p, pass_rate=right / 4))
    files = {
        "new": list(islice((p for p in generate("heldout", 1) if p.problem not in known), 400)),
        "four": four,
        "shuffled": ranked(problems, lambda p: rng.random()),
        "steps": ranked(problems, lambda p: (len(terms(p.problem)), rng.random())),
        "length": ranked(problems, lambda p: (len(p.problem), rng.random())),
        "declared": [replace(p, level=len(p.other["steps"]), pass_rate=None) for p in problems],
        "random": ranked([p for p in problems if p.pass_rate < 1], lambda p: rng.random()),
    }
    VARIANTS.mkdir(parents=True, exist_ok=True)
    for name, some in files.items():
        path = VARIANTS / f"{name}.jsonl"
        if not path.exists():
            data.write_problems(path, some)
