"""The experiment on difficulty and content, as flags of train.py, and the files that they name.

PROTOCOLS.md says what it is for. The flags of experiments that are done stand with their results.
"""

import re
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

from data import difficulty, read_problems, write_problems
from experiments.problems import generate
from policy.checkpoint import SHIPPED

RUNS = Path("runs/experiments")  # seen from the root of the project, as all paths are
DEEPEST = 9  # operations; the hard third of depth has 7 to 9
# Bases by what a sample of a hard problem is right: more warm start from the shipped model, with
# these flags of warmstart.py
BASES = {
    "depth 1 %": "--steps 300 --deepest 9 --slips 1 1 1 --careful 0.03",
    "depth 5 %": "--steps 300 --deepest 9 --slips 1 1 1",
    "depth 15 %": "--steps 300 --deepest 9 --slips 0.7 0.75 0.8",
    "skill 1 %": "--steps 300 --slips 0.88 0.92 0.96",
    "skill 8 %": "",  # the shipped one
}
CHOSEN = {"depth": "depth 5 %", "skill": "skill 8 %"}  # settings are chosen on these
# Thresholds of depth (operations) and of skill (1 - pass rate), tokens of each level
CUTS = {
    "mix": ("9", "1.0", "800000"),
    "levels": ("6 9", "0.8 1.0", "260000 540000"),
    "ladder": ("2 4 6 9", "0.5 0.7 0.9 1.0", "60000 80000 120000 540000"),
    "easy only": ("6 9", "0.8 1.0", "800000 0"),
    "hard only": ("6 9", "0.8 1.0", "0 800000"),
}
DEFAULTS = {  # of skill 8 %, and of depth 5 % in its first column
    "A": ("", "0.8 1.0", "250000 750000"),
    "B": ("", "0.8 1.0", "150000 850000"),
    "C": ("3 6 9", "", "150000 250000 600000"),
    "mix, 1 M": ("9", "1.0", "1000000"),
    "hard only, 1 M": ("6 9", "0.8 1.0", "0 1000000"),
}
SHORT = {"short with": True, "short without": False}  # whether a minus stands before a bracket
BY_LEVEL = {  # settings that differ by level
    "levels, G": "--group-size 4 32",
    "levels, mu": "--inner-epochs 1 3",
    "levels, all": "--group-size 4 32 --inner-epochs 1 3 --max-new-tokens 112 160",
}
BEST = {  # of the mix, as chosen; and G alone
    "mix, best": "--group-size 4 --inner-epochs 3",
    "mix, G": "--group-size 4",
}


def path_of(name):
    """An arm's, a base's or a file's name, which may have blanks, as one of a path"""
    return RUNS / re.sub(r"\W+", "-", name).strip("-")


def jsonl(name):
    return path_of(name).with_suffix(".jsonl")


def flags_of(base, cuts, data="", more="--lr 2e-4"):
    """All but --seed and --out.  data  the file, by default the task's or the base's own"""
    task = base.split()[0]
    depth, skill, tokens = cuts
    files = {"depth": "depth", "skill": f"levels {base}"}
    model = f" --model {path_of(base)}" if BASES[base] else ""
    return (
        f"--data {jsonl(data or files[task])} --eval-data {jsonl(f'{task} held out')} "
        f"--difficulty level --quality {depth if task == 'depth' else skill} --tokens {tokens} "
        f"--eval-quality {'2 3' if task == 'depth' else '1 2'} --eval-every 5 --save-every 0 "
        f"--max-new-tokens 160 --length-weight 0.3 --lr-decay none --warmup 2{model} {more}"
    )


def chosen():
    """Rates of mix and levels; G and mu of the mix of depth."""
    arms = {}
    for base, arm, rate in product(CHOSEN.values(), ("mix", "levels"), ("1e-4", "2e-4", "4e-4")):
        arms[f"{base}: {arm} {rate}"] = flags_of(base, CUTS[arm], more=f"--lr {rate}")
    for more in ("--group-size 4", "--group-size 32", "--inner-epochs 3"):
        base = CHOSEN["depth"]
        arms[f"{base}: mix {more}"] = flags_of(base, CUTS["mix"], more=f"--lr 2e-4 {more}")
    return arms


def tasks():
    arms = {}
    for base in BASES:
        for arm in CUTS:
            arms[f"{base}: {arm}"] = flags_of(base, CUTS[arm])
        for kind in SHORT if base.startswith("skill") else ():
            arms[f"{base}: {kind}"] = flags_of(base, CUTS["levels"], f"{kind} {base}")
    base = CHOSEN["depth"]
    arms[f"{base}: levels, measured"] = flags_of(base, CUTS["levels"], f"levels {base}")
    for arm, more in BY_LEVEL.items():
        arms[f"{base}: {arm}"] = flags_of(base, CUTS["levels"], more=f"--lr 2e-4 {more}")
    for arm, more in BEST.items():
        arms[f"{base}: {arm}"] = flags_of(base, CUTS["mix"], more=f"--lr 2e-4 {more}")
    return arms


def default():
    """Candidates for the default run, and what is simpler."""
    arms = {}
    for task, more in (("depth", "--lr 2e-4 --eval-quality 1 2 3"), ("skill", "--lr 2e-4")):
        for arm, cuts in DEFAULTS.items():
            if cuts[task == "skill"]:
                arms[f"{CHOSEN[task]}: {arm}"] = flags_of(CHOSEN[task], cuts, more=more)
    return arms


ARMS = {"chosen": chosen(), "tasks": tasks(), "default": default()}

# ------------------------------------------------------------------------------------------- files


def write(name, problems):
    if not jsonl(name).exists():
        jsonl(name).parent.mkdir(parents=True, exist_ok=True)
        write_problems(jsonl(name), problems)


def write_tasks():
    """Problems of depth, and what is held out: level 3 of depth is hard, and level 2 of skill."""
    write("depth", islice(generate("train", 0, deepest=DEEPEST), 2304))
    deep = islice(generate("heldout", 0, deepest=DEEPEST), 720)
    write("depth held out", [replace(p, level=(p.level + 2) // 3) for p in deep])
    write(
        "skill held out",
        [
            replace(p, level=1 + (difficulty(p, "pass_rate") > 0.8), pass_rate=None)
            for p in read_problems(SHIPPED / "heldout.jsonl")
            if p.pass_rate < 1
        ],
    )


def base_commands(base):
    """What makes a base if it is missing: some more warm start, and difficulty measured."""
    model, rates = path_of(base), jsonl(f"rated {base}")
    if BASES[base] and not model.exists():
        yield f"-m experiments.warmstart --start assets/tiny --rare 0 {BASES[base]} --out {model}"
    data = jsonl("depth") if base.startswith("depth") else "assets/train.jsonl"
    if not rates.exists():
        model = model if BASES[base] else "assets/tiny"
        settings = f"--samples 16 --max-new-tokens 160 --add-pass-rate {rates}"
        yield f"eval.py --model {model} --data {data} {settings}"


def write_levels(base):
    """Declare what was measured: of depth as many operations as the problem of the same rank by
    difficulty has, so that levels keep their sizes; of skill 1 - pass rate, and short problems as
    easy ones before the hard ones."""
    rated = read_problems(jsonl(f"rated {base}"))
    rated.sort(key=lambda p: difficulty(p, "pass_rate"))
    if base.startswith("depth"):
        numbers = sorted(p.level for p in rated)
        write(
            f"levels {base}", [replace(p, level=n, pass_rate=None) for p, n in zip(rated, numbers)]
        )
        return
    levels = [replace(p, level=1 - p.pass_rate, pass_rate=None) for p in rated if p.pass_rate < 1]
    write(f"levels {base}", levels)
    hard = [p for p in levels if p.level > 0.8]
    for kind, minus in SHORT.items():
        every = (
            p for p in generate("train", 1) if p.level in (2, 3) and ("-(" in p.problem) == minus
        )
        short = [replace(p, id=f"short {p.id}", level=0.5) for p in islice(every, 1024)]
        write(f"{kind} {base}", short + hard)
