"""Which problems of TEST stand in TRAIN?

    python -m tools.overlap TRAIN TEST      files or data sets, see data.py

Prints a line for each, and last the counts as JSON. It finds copies with other figures, and no
paraphrases.
"""

import argparse
import json
import re
from collections import defaultdict

from tqdm import tqdm

from data import read_problems
from run.processes import set_up_output

WORDS, JACCARD, SHARE = 8, 0.7, 0.9
# A run of words that more test problems hold is a phrase of their source. It finds no candidates.
COMMON, LEAST_COMMON = 0.01, 10  # share of them; but as many in any case


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
    others, holders = [e for e in test if bare(e.problem) not in originals], defaultdict(list)
    grams = [ngrams(e.problem) for e in others]
    for number, some in enumerate(grams):
        for gram in some:
            holders[gram].append(number)
    most = max(LEAST_COMMON, COMMON * len(others))
    common = {gram for gram, numbers in holders.items() if len(numbers) > most}
    if common:
        only = sum(bool(some) and len(some - common) <= len(some) * (1 - JACCARD) for some in grams)
        tqdm.write(
            f"{len(common)} runs of {WORDS} words stand in more than {most:g} test problems, such "
            f"as {' '.join(min(common))!r}: they find no copies, and those of {only} problems that "
            "have few others may be missed"
        )
    near = {}
    for t in tqdm(train, unit=" problems"):
        own = ngrams(t.problem)
        for number in {n for gram in own - common for n in holders.get(gram, ())}:
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
