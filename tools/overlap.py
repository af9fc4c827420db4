"""Which problems of TEST stand in TRAIN?

    python -m tools.overlap TRAIN TEST      files or data sets, see data.py

Prints a line for each, and last how many there are. It finds copies, long ones with a few
changes too, and no paraphrases.
"""

import argparse
import re
from collections import Counter, defaultdict

from tqdm import tqdm

from data import read_problems

WORDS, SHARE = 8, 0.8


def runs_of_words(text):
    """All runs of 8 words and signs of arithmetic; of a shorter text the one that it is."""
    words = re.findall(r"\w+|[-+*/=<>^]", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlap(train, test):
    """-> {id of a problem of `test` of which one of `train` has 80 % of the runs of words or more:
    (that share, the other's id)}"""
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
        train, test = (read_problems(name, graded=False) for name in (args.train, args.test))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = overlap(train, test)
    for name, (share, original) in found.items():
        print(f"{share:.0%} of {name!a} stands in {original!a}")
    print(f"{len(found)} of {len(test)} problems")


if __name__ == "__main__":
    main()
