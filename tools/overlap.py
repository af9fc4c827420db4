"""Which problems of TEST stand in TRAIN?

    python -m tools.overlap TRAIN TEST      files or data sets, see data.py

Prints a line for each, and last the counts as JSON. It finds copies with other figures. It finds no
paraphrases, and no copy all of whose runs of words stand in more than ten problems of TEST.
"""

import argparse
import json
import re
from collections import defaultdict

from tqdm import tqdm

from data import read_problems
from run.processes import set_up_output

WORDS, JACCARD, SHARE = 8, 0.7, 0.9
COMMON = 10  # a run of words in more test problems is a phrase of their source, and finds no copies


def bare(text):
    return re.sub(r"[^\w+\-*/=<>^]", "", text).lower()


def ngrams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def overlap(train, test):
    """-> exact, near: lists of pairs of problems (test, train)

    exact  equal in their letters, digits and signs of arithmetic; case, dots and blanks aside
    near   their word 8-grams have a Jaccard index of 0.7, or 90 % of the test problem's stand in
           the training problem
    """
    originals = {bare(t.problem): t for t in reversed(train)}  # the first of equals stays
    exact = [(e, originals[bare(e.problem)]) for e in test if bare(e.problem) in originals]
    others = [e for e in test if bare(e.problem) not in originals]
    grams, holders, near = [ngrams(e.problem) for e in others], defaultdict(list), {}
    for number, some in enumerate(grams):
        for gram in some:
            holders[gram].append(number)
    for t in tqdm(train, unit=" problems"):
        own = ngrams(t.problem)
        found = [holders[gram] for gram in own & holders.keys()]
        for number in {n for numbers in found if len(numbers) <= COMMON for n in numbers}:
            shared, size = len(own & grams[number]), len(grams[number])
            if shared >= min(JACCARD * (len(own) + size - shared), SHARE * size):
                near.setdefault(number, t)
    return exact, [(others[number], t) for number, t in near.items()]


def main(arguments=None):
    set_up_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train")
    parser.add_argument("test")
    args = parser.parse_args(arguments)
    try:
        train, test = (read_problems(name, graded=False) for name in (args.train, args.test))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = dict(zip(("exact", "near"), overlap(train, test)))
    for kind, pairs in found.items():
        for ours, theirs in pairs:
            print(f"{kind}: {ours.id!r} is {theirs.id!r}")
    print(json.dumps({kind: len(pairs) for kind, pairs in found.items()}))


if __name__ == "__main__":
    main()
