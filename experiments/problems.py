"""Problems for the shipped model, generated and understood.

    python -m experiments.problems --split train --count 4096 --seed 0 --out pool.jsonl

A problem is a chain of sums and differences, e.g. 52+38-(14-6). A solution writes every step, the
first with the number that it starts from: 52+38=90;-14=76;+6=82;\\boxed{82}. Long chains are hard
because every step can go wrong, and three kinds of step invite a mistake, the traps:

    carry   52+38   90, not 80    the units' ten is forgotten
    borrow  52-38   14, not 16    of the units, the smaller is taken from the larger
    sign    -(14-6) +6, not -6    the bracket's minus is not carried to its second number

A careful solver works out the units: 52+38(2+8=10)=90. It is longer, and helps against two traps.
"""

import argparse
import itertools
import random
import re
import zlib
from pathlib import Path

from data import Problem, write_problems

MOST = 150  # no right total is larger
CAREFUL_SLIPS = 0.3  # of the slips remain where the units are worked out


def chain(rng, left, brackets=0.3):
    """A number and `left` more, some of them in brackets of two; every total is in 0 .. MOST."""
    total = rng.randint(2, 99)
    text = str(total)
    while left:
        if left > 1 and rng.random() < brackets:
            a, b = rng.randint(2, 49), rng.choice((-1, 1)) * rng.randint(2, 49)
            sign, value, term, count = -1, a + abs(b), f"({a}{b:+d})", 2
            change = -a - b
        else:
            sign, value, count = rng.choice((-1, 1)), rng.randint(2, 99), 1
            term, change = str(value), sign * value
        if total - value * (sign < 0) < 0 or total + change > MOST:
            continue
        text += "-+"[sign > 0] + term
        total += change
        left -= count
    return text


def terms(text):
    """ "52+38-(14-6)" -> [(52, False), (38, False), (-14, False), (6, True)]

    Pairs: a number with the sign that counts, and whether a bracket has turned that sign.
    """
    found, outer = [], 1
    for sign, opening, digits, closing in re.findall(r"([+-]?)(\(?)(\d+)(\)?)", text):
        found.append((outer * int(sign + digits), outer < 0))
        if opening and sign == "-":
            outer = -1
        if closing:
            outer = 1
    return found


def trap(total, value):
    """The trap in adding `value` to `total`, and the sum of one who falls into it; or None twice"""
    units, right = (total % 10, abs(value) % 10), total + value
    if total >= 0 and value > 0 and sum(units) > 9:
        return "carry", right - 10
    missing = units[1] - units[0]
    if 0 < -value <= total and missing > 0 and missing != 5:  # 5: both ways agree
        return "borrow", right - 10 + 2 * missing
    return None, None


def work_units(total, value, result):
    """What a careful solver writes down before the result: the units, e.g. (2+8=10) or (12-8=4)"""
    a, b = total % 10, abs(value) % 10
    if value > 0:
        return f"({a}+{b}={a + b})"
    if (result - a + b) % 10:  # the smaller was taken from the larger
        a, b = b, a
    return f"({a + 10 * (a < b)}-{b}={(a - b) % 10})"


def solve(text, slips=None, careful=0.0, rng=random):
    """The worked solution of one who falls into a trap with the probability slips[trap]. With the
    probability `careful` a step has its units worked out, and slips of units are rare in it.

    -> steps, answer
    """
    slips = slips or {}
    (total, _), *rest = terms(text)
    steps = []
    for value, turned in rest:
        if turned and rng.random() < slips.get("sign", 0):
            value = -value
        kind, wrong = trap(total, value)
        works = rng.random() < careful and total >= 0 and total + value >= 0
        rate = slips.get(kind, 0) * (CAREFUL_SLIPS if works else 1)
        result = wrong if rng.random() < rate else total + value
        units = work_units(total, value, result) if works else ""
        steps.append(f"{'' if steps else total}{value:+d}{units}={result}")
        total = result
    return steps, total


def generate(split, seed, repeats=False, deepest=0):
    """Endless problems of one split, each with its worked solution in other["steps"], and the
    number of steps as its level.

    deepest  0: chains of 2 to 8 numbers; else of 1 to `deepest` operations, without brackets

    No problem comes twice, unless `repeats`. A problem's text decides its split (one in eight is
    held out), so the two splits never share a problem, whatever the seed.
    """
    rng, seen = random.Random(f"{split}/{seed}"), set()
    for number in itertools.count():
        if deepest:
            text = chain(rng, rng.randint(1, deepest), brackets=0)
        else:
            text = chain(rng, rng.randint(2, 8) - 1)
        held_out = zlib.crc32(text.encode()) % 8 == 0
        if held_out == (split == "heldout") and (repeats or text not in seen):
            seen.add(text)
            steps, answer = solve(text)
            other = {"steps": steps}
            yield Problem(f"{split}-{number}", text, str(answer), level=len(steps), other=other)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Generate problems.")
    add = parser.add_argument
    add("--split", choices=("train", "heldout"), default="train")
    add("--count", type=int, default=4096)
    add("--seed", type=int, default=0)
    add("--out", required=True, help="JSONL file to write")
    args = parser.parse_args(arguments)
    if Path(args.out).exists():
        parser.error(f"--out {args.out}: exists already")
    problems = generate(args.split, args.seed)
    try:
        write_problems(args.out, itertools.islice(problems, args.count))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
