"""Measure the grader: how fast it is on ordinary completions, and what hostile ones do to it.

python bench/grader.py                    4,096 completions of about 500 tokens, two workers
python bench/grader.py --fuzz 100000      mutated completions; exits with 1 if a promise is broken
"""

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm  # noqa: E402

from rewards import ERROR, NO_ANSWER, RIGHT, TIMEOUT, WRONG, Grader  # noqa: E402

# ------------------------------------------------------------------------------------------------------- throughput


def ordinary(rng):
    """A gold answer as benchmarks have them, and answers as a policy gives them: other spellings, and wrong ones."""
    n, m = rng.randint(2, 99), rng.randint(2, 99)
    return rng.choice(
        (
            (f"{n}", (f"{n}", f"{n}.0", f"x={n}", f"{m}")),
            (f"{n * 1000}", (f"{n},000", f"{n}{{,}}000", f"{n}000 \\text{{ cm}}", f"{m}00")),
            (
                f"\\frac{{{n}}}{{{m}}}",
                (
                    f"\\dfrac{{{n}}}{{{m}}}",
                    f"{n}/{m}",
                    f"\\frac{{{2 * n}}}{{{2 * m}}}",
                    f"{n / m:.3f}",
                ),
            ),
            (
                f"{n}\\sqrt{{{m}}}",
                (f"{n} \\sqrt{{{m}}}", f"\\sqrt{{{n * n * m}}}", f"{m}\\sqrt{{{n}}}"),
            ),
            (f"({n},{m})", (f"({n}, {m})", f"(x,y)=({n},{m})", f"({m}, {n})")),
            (f"[{n},\\infty)", (f"[{n}, \\infty)", f"x \\ge {n}", f"({n},\\infty)")),
            (f"{n}x^2-{m}", (f"{n}x^2 - {m}", f"-{m} + {n} x^{{2}}", f"{n}x^2+{m}")),
            (f"{n},{m}", (f"{n}, {m}", f"\\{{{m}, {n}\\}}", f"x={n} \\text{{ or }} x={m}", f"{n}")),
        )
    )


def completion(rng, answer):
    """About 500 tokens of working in front of a box."""
    words = [
        "so",
        "the",
        "sum",
        "of",
        "both",
        "is",
        "then",
        "we",
        "have",
        "that",
        "which",
        "gives",
        "and",
        "therefore",
        "since",
        "by",
        "symmetry",
        "it",
        "follows",
    ]
    work = " ".join(
        rng.choice(words) if rng.random() < 0.7 else f"${rng.randint(1, 99)}x+{rng.randint(1, 9)}$"
        for _ in range(330)
    )
    return f"{work}. Thus the answer is $\\boxed{{{answer}}}$."


def throughput(problems=256, samples=16, repeats=5):
    """Completions a second of updates whose problems are all new, once the workers are warm: the median of `repeats`."""
    rng, rates = random.Random(0), []
    grader = Grader(workers=2)
    for repeat in range(repeats + 1):
        pairs = []
        for _ in range(problems):
            gold, answers = ordinary(rng)
            pairs += [(gold, completion(rng, rng.choice(answers))) for _ in range(samples)]
        grader.known.clear()
        start = time.perf_counter()
        verdicts = Counter(grader.grade(pairs))
        if repeat:  # the first one starts the workers
            rates.append(len(pairs) / (time.perf_counter() - start))
    grader.close()
    return {
        "completions": len(pairs),
        "per_second": round(sorted(rates)[repeats // 2]),
        "slowest": round(min(rates)),
        "verdicts": verdicts,
    }


# ------------------------------------------------------------------------------------------------------------- fuzz

BITS = [
    r"\boxed{",
    r"\boxed{\boxed{",
    "}",
    "{",
    r"\{",
    r"\}",
    "<think>",
    "</think>",
    "$",
    r"\(",
    r"\]",
    r"\frac",
    r"\frac{1}{",
    r"\sqrt",
    r"\text{",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\\",
    "&",
    "%",
    "#",
    "^",
    "_",
    "^{",
    "!",
    "!!",
    "=",
    "<",
    r"\le",
    r"\in",
    r"\cup",
    r"\pm",
    r"\infty",
    ",",
    ";",
    " or ",
    " and ",
    "(",
    ")",
    "[",
    "]",
    "∞",
    "½",
    "⁵",
    "₂",
    "−",
    "π",
    "√",
    "°",
    "\u200b",
    "\u202e",
    "\x00",
    "\ud800",
    "\U0001f600",
    "é",
    "０",
    "9" * 50,
    "9^{9^{9}}",
    "10^{10^{10}}",
    r"(10^{9})!",
    r"\binom{10^9}{5}",
    r"\sum_{n=1}^{10^9}",
    r"\int_0^1",
    r"\lim_{x\to 0}",
    "((((((((((",
    "-" * 40,
    "__import__('os')",
    "lambda: 0",
    "nan",
    "inf",
    "1e999",
    "1e-999",
    "0/0",
    "None",
    "x",
    "e",
    "i",
    "\n",
    "\t",
    " ",
]


def mutate(rng, text):
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        text = rng.choice(
            (
                lambda: text[:i] + rng.choice(BITS) + text[i:],  # insert
                lambda: text[:i] + text[i + rng.randint(1, 3) :],  # delete
                lambda: text[:i] + text[i:j] * rng.choice((2, 2, 3, 20)) + text[j:],  # repeat
                lambda: text[:i] + text[i:j][::-1] + text[j:],  # reverse
                lambda: (
                    text[:i]
                    + chr(rng.choice((rng.randint(32, 126), rng.randint(0, 0x2FFF))))
                    + text[i + 1 :]
                ),  # replace
            )
        )()[:5000]
    return text


def fuzz(count, seed=0, workers=2, batch=2000, progress=False):
    """Grade mutated completions among which known ones are hidden; raises AssertionError when a promise is broken:
    a verdict for each in order, workers replaced, their memory bounded."""
    rng, grader, failures = random.Random(seed), Grader(workers=workers), Counter()
    known = [
        ("7", r"\boxed{7.0}", RIGHT),
        ("7", r"\boxed{8.0}", WRONG),
        ("7", "no box", NO_ANSWER),
        (r"\frac{1}{2}", r"\boxed{0.5}", RIGHT),
    ]
    verdicts = Counter()
    for start in tqdm(
        range(0, count, batch), unit_scale=batch, unit=" completions", disable=not progress
    ):
        cases = []
        for i in range(start, min(start + batch, count)):
            gold, answers = ordinary(rng)
            if i % 10 == 0:
                cases.append(known[i // 10 % len(known)])
            else:
                answer, around = (
                    rng.choice(answers),
                    rng.choice(
                        (r"Thus $\boxed{%s}$.", r"\boxed{%s}", r"<think>x</think>\boxed{%s}")
                    ),
                )
                cases.append(
                    (
                        gold,
                        around % mutate(rng, answer)
                        if rng.random() < 0.7
                        else mutate(rng, around % answer),
                        None,
                    )
                )
        grader.known.clear()
        found = grader.grade([(gold, text) for gold, text, _ in cases])
        assert len(found) == len(cases) and set(found) <= {RIGHT, WRONG, NO_ANSWER, TIMEOUT, ERROR}
        for (gold, text, expected), verdict in zip(cases, found):
            assert expected in (None, verdict), (
                f"{gold!r} <- {text!r}: {verdict}, expected {expected}"
            )
            failures.update([(verdict, gold, text)] if verdict in (TIMEOUT, ERROR) else [])
        verdicts.update(found)
        assert len(grader.workers) == workers
    grader.close()
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    return {
        "completions": count,
        "verdicts": verdicts,
        "largest_worker_mb": round(memory),
    }, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fuzz", type=int, metavar="N", help="grade N mutated completions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--show", action="store_true", help="print the completions that took too long or failed"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    result, failures = (
        fuzz(args.fuzz, args.seed, progress=True) if args.fuzz else (throughput(), {})
    )
    if args.show:
        for kind, gold, text in failures:
            print(kind, repr(gold), repr(text[:200]))
    print(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
