"""A process reward for the shipped problems, beside the outcome that is the default:

python train.py --reward examples/process.py:right_steps
"""

import re


def right_steps(problem, response):
    """The share of the problem's steps that are right before the first mistake; the answer is the
    last step. It is 1 for a solution that is right throughout."""
    steps = [*problem["steps"], f"\\boxed{{{problem['answer']}}}"]
    written = re.sub(r"\(.*?\)", "", response).split(";")  # units aside
    right = 0
    while right < min(len(steps), len(written)) and steps[right] == written[right]:
        right += 1
    return right / len(steps)
