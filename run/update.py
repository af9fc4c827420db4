"""One update: what happens in it, and its line of metrics.jsonl."""

import math
import resource
import sys
import time
from collections import Counter

import torch

from eprli import Fate
from rewards import ERROR, LATE, RIGHT, TIMEOUT, writes_steps

KEEP = 16  # groups of each update whose completions are written down
PHASES = ("sample", "score", "learn")


class NotFinite(Exception):
    """A reward, log-prob, loss or gradient is not finite: the update is given up.

    groups  of the buffer that were being trained on
    """

    def __init__(self, what, groups=()):
        super().__init__(what)
        self.groups = groups


class Update:
    """What happens in one update of a level.

    before  the LevelState that it begins with, which stays as it is
    state   a copy of it, which the update works on, and which replaces it at the end
    groups  all that were drawn
    rows    one for each of their completions; the first are written, see `rows_to_write`
    steps   one for each optimizer step: what train.accumulate_gradient returns, and the norm of
            the gradient
    """

    def __init__(self, number, before, lr, max_draws):
        self.number, self.before, self.state, self.lr = number, before, before.copy(), lr
        self.prompts_left = max_draws * before.level.prompts  # that may still be drawn
        self.num_carried = 0  # groups trained on that an older policy sampled
        self.groups, self.rows, self.steps = [], [], []
        self.seconds = Counter()
        self.fault = None  # the NotFinite that ended it
        self.start = time.perf_counter()

    def add_draw(self, prompts, attempts, groups):
        """A draw was made: prompts, attempts (a list per prompt) and groups belong together."""
        for prompt, some, group in zip(prompts, attempts, groups):
            problem = prompt.problem
            same = {
                "update": self.number,
                "level": self.state.number,
                "group": len(self.groups),
                "problem": problem.problem,
                "answer": problem.answer,
            }
            for i, a in enumerate(some):
                names = ("outcome", "length_reward", "advantage")
                numbers = {name: getattr(group, name)[i].item() for name in names}
                self.rows.append(same | a.row(problem.id, i) | numbers)
            self.groups.append(group)

    def raise_if_not_finite(self):
        """Raise NotFinite if a group was drawn that holds a number that is not finite."""
        for number, group in enumerate(self.groups):
            if not (group.finite or group.late):
                name = next(row["problem_id"] for row in self.rows if row["group"] == number)
                raise NotFinite(
                    f"problem {name!r}: its rewards {group.reward.tolist()} by "
                    f"--reward {self.state.level.reward}, or log-probs sampled from the policy, "
                    "are not finite"
                )

    def rows_to_write(self):
        """Rows of completions.jsonl: of the first KEEP groups drawn, all of a group."""
        return [row for row in self.rows if row["group"] < KEEP]

    @property
    def changed_policy(self):
        """A gradient of exactly 0 moves nothing."""
        return any(step["grad_norm"] for step in self.steps)

    def count(self, fate):
        """How many groups had this fate in this update."""
        return self.state.buffer.counts[fate] - self.before.buffer.counts[fate]

    def row(self):
        """Return its line of metrics.jsonl. A value that does not exist is nan."""
        tokens = sum(row["tokens"] for row in self.rows)
        row = {
            "update": self.number,
            "level": self.state.number,
            **self.sampled(),
            "groups_drawn": self.count("drawn"),
            "groups_pending": self.state.buffer.pending,
            "carried_share": ratio(self.num_carried, self.count(Fate.KEPT)),
            **{f"groups_{fate.value}": self.count(fate) for fate in Fate},
            **self.learned(),
            "tokens_sampled": tokens,
            "tokens_per_second": tokens / (time.perf_counter() - self.start),
            "peak_memory_mb": peak_memory_mb(),
        }
        return row | {f"{phase}_seconds": self.seconds[phase] for phase in PHASES}

    def sampled(self):
        """What is logged of its completions: {name: value}."""
        rows = self.rows
        scored = [row for row in rows if row["verdict"] != LATE]
        rewards = [group.reward for group in self.groups if not group.late]
        verdicts = Counter(row["verdict"] for row in rows)
        values = {
            "accuracy": ratio(verdicts[RIGHT], len(rows)),
            "reward_mean": mean([x for r in rewards for x in r.tolist()]),
            "reward_variance_within": mean([r.var(correction=0).item() for r in rewards]),
            "reward_variance_between": variance([r.mean().item() for r in rewards]),
            "outcome_mean": mean_of("outcome", scored),
            "length_reward_mean": mean_of("length_reward", scored),
            "length_mean": mean_of("tokens", rows),
            "truncated_share": mean([not row["stopped"] for row in rows]),
            "writes_steps_share": mean([writes_steps(row["text"]) for row in rows]),
            "grader_timeouts": verdicts[TIMEOUT],
            "grader_errors": verdicts[ERROR],
            "reward_timeouts": sum(group.late for group in self.groups),
        }
        for part in scored[0].get("values", {}) if scored else ():
            if part.startswith("part_"):
                values[f"{part}_mean"] = mean([row["values"][part] for row in scored])
        return values

    def learned(self):
        """What is logged of its optimizer steps: {name: value}."""
        steps = self.steps
        tokens = sum(step["tokens"] for step in steps)
        gap = Counter(*steps[:1])  # later the learner is not the sampler any more
        values = {"objective": mean_of("objective", steps), "lr": self.lr}
        for name in ("entropy", "clip_low", "clip_high", "kl_old"):
            share = "_share" * name.startswith("clip")
            values[name + share] = ratio(sum(step[name] for step in steps), tokens)
        return values | {
            "ratio_max": max((step["ratio_max"] for step in steps), default=math.nan),
            "logprob_gap_mean": ratio(gap["gap"], gap["fresh"]),
            "logprob_gap_max": gap["gap_max"] if gap["fresh"] else math.nan,
            "grad_norm": mean_of("grad_norm", steps),
            "tokens_trained": int(tokens),
        }


def ratio(part, whole):
    """nan if there is nothing to divide by."""
    return part / whole if whole else math.nan


def mean(values):
    return ratio(sum(values), len(values))


def mean_of(name, rows):
    return mean([row[name] for row in rows])


def variance(values):
    """Of a population; nan if there is none."""
    centre = mean(values)
    return mean([(value - centre) ** 2 for value in values])


def peak_memory_mb():
    """Of the GPU where there is one, else of this process (Linux counts in KiB, macOS in bytes).
    In units of a million bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
