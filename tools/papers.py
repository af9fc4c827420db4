"""What the papers evaluate on, how, and what they found: benchmarks, protocols, results."""

import re
from pathlib import Path

import numpy as np

from data import INSTRUCTION, explained, parse_problem

# name: data set on the hub, split, columns of problem and answer, configuration if there are many
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024 train problem answer",
    "math500": "HuggingFaceH4/MATH-500 test problem answer",
    "amc22_23": "AI-MO/aimo-validation-amc train problem answer",  # the 83 problems of the papers
    "amc23": "math-ai/amc23 test question answer",  # 40 of them
    "minerva": "math-ai/minervamath test question answer",
    "olympiadbench": "Hothan/OlympiadBench train question final_answer OE_TO_maths_en_COMP",
}

# What --protocol sets: the evaluation scripts of the repositories DeepScaleR and FastCuRL.
FASTCURL = {
    "samples": 16,
    "temperature": 0.6,
    "top_p": 1.0,
    "max_new_tokens": 32768,
    "suffix": f" {INSTRUCTION}",
}
PROTOCOLS = {"deepscaler": FASTCURL | {"top_p": 0.95}, "fastcurl": FASTCURL}

# Model (protocol): per cent right as published, and the published mean.
PUBLISHED = """
                                        aime24  math500  amc22_23  minerva  olympiadbench  mean
R1-Distill-Qwen-1.5B (deepscaler)       28.8    82.8     62.9      26.5     43.3           48.9
Still-1.5B (deepscaler)                 32.5    84.4     66.7      29.0     45.4           51.6
DeepScaleR-1.5B (deepscaler)            43.1    87.8     73.6      30.2     50.0           57.0
FastCuRL-1.5B-Preview (fastcurl)        43.1    88.0     74.2      31.6     50.4           57.5
FastCuRL-1.5B-V2 (fastcurl)             47.5    89.3     77.0      32.8     53.3           60.0
FastCuRL-1.5B-V3 (fastcurl)             49.6    90.5     78.5      34.7     54.5           61.6
EPRLI (unstated, k = 1 by its digits)   50.0    89.2     77.1      35.3     51.9           60.7
"""
HEADER, *ROWS = [re.split(" {2,}", line) for line in PUBLISHED.strip("\n").splitlines()]
FIVE = HEADER[1:-1]


def read_hub(name):
    """The problems of a benchmark. Raises ValueError if the hub does not give them."""
    repository, split, problem, answer, *configuration = BENCHMARKS[name].split()
    problems = []
    with explained(
        f"{name}: cannot read {repository} from the hub; try `pip install datasets`, "
        "or give a JSONL file"
    ):
        from datasets import load_dataset

        for row in load_dataset(repository, *configuration, split=split):
            value = row[answer]
            if isinstance(value, list):  # ["$1$", "$2$"]
                value = ", ".join(text.strip().strip("$") for text in value)
            elif isinstance(value, float) and value.is_integer():  # 142.0
                value = int(value)
            record = {"problem": row[problem], "answer": value, "level": row.get("level")}
            problems.append(parse_problem(record, f"{name}-{len(problems)}"))
    return problems


def mean_of(intervals):
    """Mean of independent means: squared distances to the ends add up (Zou & Donner 2008)."""
    means, low, high = np.array(intervals).T
    mean, n = means.mean(), len(means)
    return mean, mean - np.linalg.norm(means - low) / n, mean + np.linalg.norm(high - means) / n


def print_table(summary):
    """Our row above the published ones, if some of the five benchmarks were evaluated.

    summary  what summary.json holds; a benchmark is known by the name of its file
    """
    measure = f"avg@{summary['samples']}"
    found = {Path(path).stem: levels["all"][measure] for path, levels in summary["files"].items()}
    ours = [found.get(name) for name in FIVE]
    if not any(ours):
        return
    ours.append(mean_of(ours) if all(ours) else None)
    title = f"{Path(summary['model']).name} ({summary['protocol'] or 'own settings'})"
    cells = ["{:.1f} % [{:.1f}, {:.1f}]".format(*100 * np.array(x)) if x else "-" for x in ours]
    for first, *others in [HEADER, [title, *cells], *ROWS]:
        print(f"{first:38}" + "".join(f"  {cell:19}" for cell in others))
