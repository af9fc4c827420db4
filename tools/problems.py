"""The command line of data.py: generates problems, finds those that two files share.

A generated problem takes 2 to 6 steps. A step is an equation that a small model can learn to do at
once. A family of problems is a function of a random generator -> problem, steps, answer.
"""

import argparse
import itertools
import random
import zlib

from data import Problem, overlap, read_problems, write_problems


def add_up(values):
    """The steps of a sum, from left to right: [3, 4, -2] -> ["3+4=7", "7-2=5"]"""
    totals = itertools.accumulate(values)
    return [f"{total}{value:+d}={total + value}" for total, value in zip(totals, values[1:])]


def expression(rng):
    """Numbers and one-digit products, added and subtracted: 12+6*7-9. Products come first."""
    num_steps = rng.randint(2, 6)
    num_products = rng.randint(0, min(2, num_steps - 1))
    kinds = [False] * (num_steps + 1 - 2 * num_products) + [True] * num_products
    rng.shuffle(kinds)
    text, steps, values = "", [], []
    for is_product in kinds:
        value = rng.randint(2, 9 if is_product else 99)
        term = str(value)
        if is_product:
            factor = rng.randint(2, 9)
            term = f"{value}*{factor}"
            value *= factor
            steps.append(f"{term}={value}")
        sign = "+"
        if sum(values) >= value and rng.random() < 0.5:
            sign = "-"
            value = -value
        text += sign + term
        values.append(value)
    return text.removeprefix("+"), steps + add_up(values), sum(values)


def product(rng):
    """A number times one digit, by parts, and one number more, e.g. 47*6-85:
    40*6=240;7*6=42;240+42=282;282-85=197."""
    n = rng.choice((rng.randint(11, 99), rng.randint(101, 999)))
    digit, last = rng.randint(2, 9), rng.randint(11, 99)
    parts = [part for part in (n - n % 100, n % 100 - n % 10, n % 10) if part]
    if len(parts) < 2:
        return product(rng)
    if n * digit >= last and rng.random() < 0.5:
        last = -last
    steps = [f"{part}*{digit}={part * digit}" for part in parts]
    sums = add_up([part * digit for part in parts] + [last])
    return f"{n}*{digit}{last:+d}", steps + sums, n * digit + last


def equation(rng):
    """A linear equation in x with a whole solution, e.g. 5x-8=2x+19: 3x-8=19;3x=27;x=9."""
    x, a, b = rng.randint(2, 20), rng.randint(2, 9), rng.randint(1, 30)
    if rng.random() < 0.5:
        b = -b
    shape, right = rng.randint(0, 2), a * x + b
    if right == 0:
        return equation(rng)
    lines = [f"x={x}", f"{a}x={a * x}", f"{a}x{b:+d}={right}"]  # the last step first
    if shape > 0 or right < 0:
        c = rng.randint(1, 5)
        other_side = f"{c}x{right:+d}".removeprefix("1")
        lines.append(f"{a + c}x{b:+d}={other_side}")
        if shape != 1 and b % (a + c) == 0:
            lines.append(f"{a + c}(x{b // (a + c):+d})={other_side}")
    text, *steps = reversed(lines)
    return text, steps, x


def generate(split, seed, repeats=False):
    """Endless problems of one split, each with its worked solution in other["steps"].

    No problem comes twice, unless `repeats`. A problem's text decides its split (one in eight is
    held out), so the two splits never share a problem, whatever the seed.
    """
    rng, seen = random.Random(f"{split}/{seed}"), set()
    for number in itertools.count():
        family = rng.choice((equation, expression, product))
        text, steps, answer = family(rng)
        held_out = zlib.crc32(text.encode()) % 8 == 0
        if held_out == (split == "heldout") and (repeats or text not in seen):
            seen.add(text)
            other = {"family": family.__name__, "steps": steps}
            yield Problem(f"{split}-{number}", text, str(answer), other=other)


def print_overlap(train_file, *evaluation_files):
    """One line a file, and one for every pair found."""
    train = read_problems(train_file)
    for path in evaluation_files:
        evaluation = read_problems(path)
        exact, near = overlap(train, evaluation)
        counts = f"{len(exact)} of {len(evaluation)} problems stand in {train_file}"
        print(f"{path}: {counts}, {len(near)} nearly")
        for kind, pairs in (("exact", exact), ("near", near)):
            for name, original in pairs:
                print(f"  {kind}: {name} = {original}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Generate problems, or look for overlap.")
    add = parser.add_argument
    add("--split", choices=("train", "heldout"), default="train")
    add("--count", type=int, default=4096)
    add("--seed", type=int, default=0)
    add("--out", help="JSONL file to write")
    files = "a training file, then evaluation files or benchmarks"
    add("--overlap", nargs="+", metavar="FILE", help=files)
    args = parser.parse_args(arguments)
    try:
        if args.overlap:
            if len(args.overlap) < 2:
                raise ValueError("--overlap needs a training file and an evaluation file or more")
            print_overlap(*args.overlap)
        else:
            if not args.out:
                raise ValueError("--out FILE: where to write the problems")
            problems = generate(args.split, args.seed)
            write_problems(args.out, itertools.islice(problems, args.count))
    except (ValueError, OSError) as error:
        parser.error(str(error))
