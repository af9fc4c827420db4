"""How often the grader is right: `python bench/grader.py CASES.jsonl` prints the cases of a file
whose label it disagrees with, and counts.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from answers import extract_answer  # noqa: E402  (after the path)
from common.files import read_records  # noqa: E402
from rewards import ERROR, RIGHT, TIMEOUT, Grader  # noqa: E402

CASE = '{"gold": text, "prediction": text, "equivalent": bool, "kind": "answer" | "response"}'


def parse_case(record, _):
    match record:
        case {"gold": str(), "prediction": str()}:
            kind, label = record.get("kind", "response"), record.get("equivalent", True)
            if kind in ("answer", "response") and isinstance(label, bool):
                return record
    raise ValueError(f"not a case; expected {CASE}")


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


def main():
    start = time.perf_counter()
    result = agreement(sys.argv[1]) if sys.argv[1:] else sys.exit(__doc__)
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 3)}))


if __name__ == "__main__":
    main()
