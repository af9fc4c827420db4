"""Problems that a Python function solves, for examples/run_tests.py: one to four steps, in order.

    python -m examples.programs > assets/programs.jsonl

The level of a problem is the number of its steps. Each step matters: without it a test fails. No
two problems have the same steps in any order. Training and held-out problems are slices of it.
"""

import functools
import json
import random
from collections import Counter

from examples.run_tests import reward

COUNTS = 45, 95, 90, 70  # problems of one step, of two, ...
GIVEN = {"numbers": "a list of integers", "words": "a list of words", "text": "a string"}
WORDS = "a apple bee book door ear egg hello ice idea kiwi letter moon of oak pepper rain see up"
# What a step takes, what it gives, what it does. The line below: how, from x and a small number k
STEPS = """
numbers numbers Keep only the even numbers.
[n for n in x if n % 2 == 0]
numbers numbers Keep only the odd numbers.
[n for n in x if n % 2]
numbers numbers Keep only the numbers that are greater than {k}.
[n for n in x if n > {k}]
numbers numbers Replace each negative number by 0.
[max(n, 0) for n in x]
numbers numbers Multiply each number by {k}.
[n * {k} for n in x]
numbers numbers Square each number.
[n * n for n in x]
numbers numbers Reverse the order of the list.
x[::-1]
numbers numbers Sort the numbers, the smallest first.
sorted(x)
numbers numbers Sort the numbers, the largest first.
sorted(x, reverse=True)
numbers numbers Of equal numbers keep only the first; the order stays.
list(dict.fromkeys(x))
numbers numbers Remove the first {k} numbers, or all if there are fewer.
x[{k}:]
numbers numbers Keep only the last {k} numbers, or all if there are fewer.
x[-{k}:]
numbers numbers Keep every second number, beginning with the first.
x[::2]
numbers numbers Move the first number to the end, if there is one.
x[1:] + x[:1]
numbers numbers Replace each number by the sum of all numbers up to it, itself included.
[sum(x[:i + 1]) for i in range(len(x))]
numbers numbers Take the differences of neighbours: each number but the first, minus the one before.
[b - a for a, b in zip(x, x[1:])]
numbers numbers Keep only the numbers that are greater than the one just before (not the first).
[b for a, b in zip(x, x[1:]) if b > a]
numbers number Take the sum (0 for an empty list).
sum(x)
numbers number Take the largest number (0 for an empty list).
max(x, default=0)
numbers number Take the largest minus the smallest number (0 for an empty list).
max(x, default=0) - min(x, default=0)
numbers number Take the most frequent number; of several, the smallest; 0 for an empty list.
min(x, key=lambda n: (-x.count(n), n), default=0)
numbers number Take the first minus the second plus the third, and so on (0 for an empty list).
sum(x[::2]) - sum(x[1::2])
numbers text Write the numbers as one string, with a comma and no blank between them.
','.join(map(str, x))
words words Keep only the words with more than {k} characters.
[w for w in x if len(w) > {k}]
words words Reverse each word.
[w[::-1] for w in x]
words words Write each word in capital letters.
[w.upper() for w in x]
words words Sort the words by length, the shortest first; equally long ones stay in order.
sorted(x, key=len)
words words Reverse the order of the list.
x[::-1]
words words Remove the first character of each word.
[w[1:] for w in x]
words words Keep every second word, beginning with the second.
x[1::2]
words numbers Replace each word by its length.
[len(w) for w in x]
words numbers Replace each word by how many of its letters are vowels (aeiou, AEIOU).
[sum(c in 'aeiouAEIOU' for c in w) for w in x]
words text Join the words with a hyphen between them.
'-'.join(x)
words text Take the longest word; of several, the first; an empty string for an empty list.
max(x, key=len, default='')
words text Join the first characters of the words that are not empty into one string.
''.join(w[:1] for w in x)
text text Remove all vowels (aeiou, AEIOU).
''.join(c for c in x if c not in 'aeiouAEIOU')
text text Reverse the string.
x[::-1]
text text Replace each run of equal characters by one of them.
''.join(c for i, c in enumerate(x) if i == 0 or c != x[i - 1])
text text Write every second character as a capital letter, beginning with the first.
''.join((c.upper(), c)[i % 2] for i, c in enumerate(x))
text text Write each character twice.
''.join(c * 2 for c in x)
text text Move the first {k} characters to the end.
x[{k}:] + x[:{k}]
text text Sort the characters by their code points.
''.join(sorted(x))
text words Split the string at blanks; no word is empty.
x.split()
text words Cut the string into pieces of {k} characters; the last may be shorter.
[x[i:i + {k}] for i in range(0, len(x), {k})]
text number Count the different characters.
len(set(x))
text pairs List each different character, in order of first appearance, as [character, its count].
[[c, x.count(c)] for c in dict.fromkeys(x)]
"""


def value(kind, size, rng):
    if kind == "numbers":
        return [rng.randint(-9, 12) for _ in range(size)]
    words = rng.choices(WORDS.split(), k=size)
    return words if kind == "words" else " ".join(words[:3])


def outputs(code, inputs):
    """What the steps make of each input, one step after the other."""
    return [functools.reduce(lambda x, step: eval(step, {"x": x}), code, each) for each in inputs]


def is_good(steps, code, inputs):
    """Whether each step matters, and no constant is right in more than half of the tests."""
    results = outputs(code, inputs)
    for i, (takes, gives, *_) in enumerate(steps):
        if takes == gives and outputs(code[:i] + code[i + 1 :], inputs) == results:
            return False
    return max(Counter(map(str, results)).values()) <= len(results) / 2


def make(steps, rng):
    """A problem, or None if it is not good."""
    kind, k = steps[0][0], str(rng.randint(2, 4))
    words, code = ([step[i].replace("{k}", k) for step in steps] for i in (2, 3))
    example, *inputs = (value(kind, size, rng) for size in (4, 0, 1, 2, 3, 4, 5))
    result, *results = outputs(code, [example, *inputs])
    if not is_good(steps, code, inputs):
        return None
    what = "\n".join(f"{i}. {each}" for i, each in enumerate(words, 1))
    return {
        "problem": f"Write a Python function f({kind}) that does this to {GIVEN[kind]}:\n{what}\n"
        f"Example: f({example!r}) returns {result!r}.",
        "answer": "\n ".join(["def f(x):", *(f"x = {each}" for each in code), "return x"]),
        "level": len(steps),
        "function": "f",
        "tests": [[[each], result] for each, result in zip(inputs, results)],
    }


def generate(seed=0):
    """All problems, levels mixed."""
    rng, found = random.Random(seed), {}
    lines = STEPS.strip().splitlines()
    rows = [(*row.split(" ", 2), code) for row, code in zip(lines[::2], lines[1::2])]
    for level, count in enumerate(COUNTS, 1):
        end = len(found) + count
        while len(found) < end:
            steps = rng.choices(rows, k=level)
            fits = all(before[1] == after[0] for before, after in zip(steps, steps[1:]))
            same = frozenset(steps)
            if fits and same not in found and (problem := make(steps, rng)):
                found[same] = problem
    problems = list(found.values())
    rng.shuffle(problems)
    return problems


if __name__ == "__main__":
    for problem in generate():
        assert reward(problem, problem["answer"]) == 1
        print(json.dumps(problem, separators=(",", ":")))
