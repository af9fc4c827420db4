"""Which problems of TEST stand in TRAIN?

    python -m tools.overlap TRAIN TEST      files or data sets, see data.py

Prints a line for each, and last the counts as JSON. It finds copies with other figures. It finds no
paraphrases, and no copy all of whose runs of words stand in more than ten problems of TEST.
"""

import argparse
import json
import re
from collections import Counter, defaultdict

from tqdm import tqdm

from data import read_problems

WORDS, JACCARD, SHARE = 8, 0.7, 0.9


def bare(text):
    return re.sub(r"[^\w+\-*/=<>^]", "", text).lower()


def ngrams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def overlap(train, test):
    """-> {id of a problem of `test`: ("exact" or "near", id of one of `train`)}

    exact  equal in their letters, digits and signs of arithmetic; case, dots and blanks aside
    near   their word 8-grams have a Jaccard index of 0.7, or 90 % of the test problem's stand in
           the training problem
    """
    originals = {bare(t.problem): t.id for t in reversed(train)}  # the first of equals stays
    found, grams, holders = {}, {}, defaultdict(list)
    for e in test:
        if bare(e.problem) in originals:
            found[e.id] = "exact", originals[bare(e.problem)]
            continue
        grams[e.id] = ngrams(e.problem)
        for gram in grams[e.id]:
            holders[gram].append(e.id)
    for t in tqdm(train, unit=" problems"):
        own = ngrams(t.problem)
        shared = Counter(name for gram in own for name in holders.get(gram, ()))
        for name, count in shared.items():
            size = len(grams[name])
            if count >= min(JACCARD * (len(own) + size - count), SHARE * size):
                found.setdefault(name, ("near", t.id))
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
    for name, (kind, original) in found.items():
        print(f"{kind}: {name!a} is {original!a}")
    print(json.dumps({"exact": 0, "near": 0} | Counter(kind for kind, _ in found.values())))


if __name__ == "__main__":
    main()
