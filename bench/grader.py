"""Measure the grader: how often it is right, how fast, and what hostile completions do to it.

python bench/grader.py CASES.jsonl        prints the cases whose label it disagrees with
python bench/grader.py                    4,096 completions of about 500 tokens, two workers
python bench/grader.py --fuzz 100000      mutated completions; exits with 1 if a promise is broken
"""

import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from answers import extract_answer  # noqa: E402  (after the path)
from files import read_records  # noqa: E402
from rewards import ERROR, RIGHT, TIMEOUT, Grader  # noqa: E402

# ------------------------------------------------------------------------------------------ cases

CASE = '{"gold": text, "prediction": text, "equivalent": bool, "kind": "answer" | "response"}'


def parse_case(record, _):
    match record:
        case {"gold": str(), "prediction": str()}:
            kind, label = record.get("kind", "response"), record.get("equivalent", True)
            if kind in ("answer", "response") and isinstance(label, bool):
                return record
    raise ValueError(f"not a case; expected {CASE}")


def answers_of(pairs):
    """[(gold answer, response), ...] -> [(gold answer, what stands in the box, or None), ...]"""
    return [(gold, extract_answer(text)) for gold, text in pairs]


def agreement(path):
    """Print the cases of a file that are graded otherwise than labelled.  -> how many are not"""
    cases, grader, pairs = read_records(path, parse_case), Grader(), []
    for case in cases:
        answer = case["prediction"].strip() or None
        if case.get("kind") != "answer":
            answer = extract_answer(case["prediction"])
        pairs.append((case["gold"], answer))
    result = {"cases": len(cases), "agree": 0, "false_right": 0, "false_wrong": 0}
    verdicts = grader.compare(pairs)
    for case, verdict in zip(cases, verdicts):
        right = verdict == RIGHT
        if case.get("equivalent", right) != right:
            result["false_right" if right else "false_wrong"] += 1
            print(f"{verdict}, not as labelled: {case}")
        elif "equivalent" in case:
            result["agree"] += 1
    grader.close()
    return result | {"timeouts": verdicts.count(TIMEOUT), "errors": verdicts.count(ERROR)}


# ------------------------------------------------------------------------------------- throughput

# A gold answer as benchmarks have them, then answers as a policy gives them: other spellings, and
# wrong ones. N and M stand for two numbers.
ORDINARY = r"""
N | N | N.0 | x=N | M
N000 | N,000 | N{,}000 | N000 \text{ cm} | M00
\frac{N}{M} | \dfrac{N}{M} | N/M | \frac{N0}{M0} | 0.N
N\sqrt{M} | N \sqrt{M} | \sqrt{N^2*M} | M\sqrt{N}
(N,M) | (N, M) | (x,y)=(N,M) | (M, N)
[N,\infty) | [N, \infty) | x \ge N | (N,\infty)
Nx^2-M | Nx^2 - M | -M + N x^{2} | Nx^2+M
N,M | N, M | \{M, N\} | x=N \text{ or } x=M | N
"""
WORDS = "so the sum of both is then we have that which gives and therefore by symmetry "


def ordinary(rng):
    """(gold answer, possible answers of a policy)."""
    row = rng.choice(ORDINARY.strip().split("\n"))
    for name in "NM":
        row = row.replace(name, str(rng.randint(2, 99)))
    gold, *answers = row.split(" | ")
    return gold, answers


def completion(rng, answer):
    """About 500 tokens of working in front of a box."""
    work = [f"{WORDS}${rng.randint(1, 99)}x+{rng.randint(1, 9)}$" for _ in range(20)]
    return f"{' '.join(work)}. Thus the answer is $\\boxed{{{answer}}}$."


def throughput():
    """Completions per second for updates whose problems are all new, once the workers are started.

    The median and the slowest of five updates of 256 problems with 16 completions each.
    """
    rng, rates = random.Random(0), []
    grader = Grader(workers=2)
    for _ in range(6):
        pairs = []
        for _ in range(256):
            gold, answers = ordinary(rng)
            pairs += [(gold, completion(rng, rng.choice(answers))) for _ in range(16)]
        start = time.perf_counter()
        verdicts = Counter(grader.compare(answers_of(pairs)))
        rates.append(len(pairs) / (time.perf_counter() - start))
    grader.close()
    slowest, _, middle, *_ = sorted(rates[1:])  # the first update starts the workers
    result = {"completions": len(pairs), "per_second": round(middle), "slowest": round(slowest)}
    return result | {"verdicts": verdicts}


# ------------------------------------------------------------------------------------------- fuzz

BITS = r"""
\boxed{ \boxed{\boxed{ } { \{ \} <think> </think> $ \( \] \frac \frac{1}{ \sqrt \text{
\begin{pmatrix} \end{pmatrix} \\ & % # ^ _ ^{ ! !! = < \le \in \cup \pm \infty , ; or and ( ) [ ]
∞ ½ ⁵ ₂ − π √ ° é ０ 9^{9^{9}} 10^{10^{10}} (10^{9})! \binom{10^9}{5} \sum_{n=1}^{10^9} \int_0^1
\lim_{x\to 0} ((((((((((( __import__('os') lambda nan inf 1e999 1e-999 0/0 None x e i
99999999999999999999999999999999999999 ----------------------------------------
"""
BITS = [*BITS.split(), "\ud800", " "]
KNOWN = r"""
7 | \boxed{7.0} | right
7 | \boxed{8.0} | wrong
7 | no box | no answer
\frac{1}{2} | \boxed{0.5} | right
"""
FRAMES = r"Thus $\boxed{@}$.", r"\boxed{@}", r"<think>x</think>\boxed{@}"
BATCH = 1000  # completions graded at once


def mutate(rng, text):
    """Insert, delete, repeat, reverse or replace a few times."""
    for _ in range(rng.randint(1, 5)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        part = text[i:j]
        other = rng.choice(BITS), chr(rng.randint(0, 0x2FFF))
        part = rng.choice((*other, "", part * 5, part[::-1]))
        text = (text[:i] + part + text[rng.choice((i, j)) :])[:5000]
    return text


def hostile(rng):
    """(gold answer, mutated completion)."""
    gold, answers = ordinary(rng)
    answer = mutate(rng, rng.choice(answers))
    return gold, rng.choice(FRAMES).replace("@", answer)


def fuzz(count):
    """Grade at least `count` mutated completions. Every tenth is a known one instead.

    AssertionError if the known ones do not get their verdicts, in their places.
    """
    rng, grader, counts = random.Random(0), Grader(), Counter()
    known = [row.split(" | ") for row in KNOWN.strip().split("\n")] * (BATCH // 40)
    for _ in range(0, count, BATCH):
        cases = [hostile(rng) for _ in range(BATCH)]
        cases[::10] = [(gold, text) for gold, text, _ in known]
        verdicts = grader.compare(answers_of(cases))
        assert verdicts[::10] == [verdict for _, _, verdict in known]
        counts.update(verdicts)
    grader.close()
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10  # of KiB, on Linux
    return {"completions": counts.total(), "verdicts": counts, "largest_worker_mib": memory}


def main():
    start = time.perf_counter()
    match sys.argv[1:]:
        case []:
            result = throughput()
        case ["--fuzz", count]:
            result = fuzz(int(count))
        case [path]:
            result = agreement(path)
        case _:
            sys.exit(__doc__)
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 3)}))


if __name__ == "__main__":
    main()
