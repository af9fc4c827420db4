"""List the problems of TEST that are also in TRAIN, and count them.

    python -m tools.overlap TRAIN TEST      files or data sets, see data.py

Copies are found, and so are long copies with a few changes. Paraphrases are not found.
"""

import argparse
import re
from collections import Counter, defaultdict

from tqdm import tqdm

from data import read_problems

WORDS, SHARE = 8, 0.8


def runs_of_words(text):
    """Return all runs of 8 words and signs of arithmetic. A shorter text is one run."""
    words = re.findall(r"\w+|[-+*/=<>^]", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlap(train, test):
    """Return {id of a problem of `test`: (share, id of a problem of `train`)}.

    A problem is listed if one problem of `train` has at least 80 % of its runs of words. The share
    is that of the problem that has most of them.
    """
    holders, sizes, found = defaultdict(list), {}, {}
    for problem in test:
        runs = runs_of_words(problem.problem)
        sizes[problem.id] = len(runs)
        for run in runs:
            holders[run].append(problem.id)
    for problem in tqdm(train, unit=" problems"):
        runs = runs_of_words(problem.problem)
        for name, count in Counter(name for run in runs for name in holders.get(run, ())).items():
            share = count / sizes[name]
            if share >= SHARE and share > found.get(name, (0,))[0]:
                found[name] = share, problem.id
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train")
    parser.add_argument("test")
    args = parser.parse_args(arguments)
    try:
        train = read_problems(args.train, graded=False)
        test = read_problems(args.test, graded=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = overlap(train, test)
    for name, (share, original) in found.items():
        print(f"{share:.0%} of {name!a} stands in {original!a}")
    print(f"{len(found)} of {len(test)} problems")


if __name__ == "__main__":
    main()
