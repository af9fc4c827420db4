"""One update: what happens in it, its line of metrics.jsonl, and what a person should hear."""

import math
import resource
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from eprli import MOST_SKIPS
from rewards import ERROR, LATE, RIGHT, TIMEOUT, writes_steps

KEEP = 16  # groups of each update whose completions are written down
# Of groups, see eprli.Buffer. Those that wait have none yet.
FATES = ("kept", "all_right", "all_wrong", "broken", "stale")
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

    groups  all that were drawn
    rows    one for each of their completions; the first are written, see `rows_to_write`
    steps   one for each optimizer step: what train.accumulate_gradient returns, and the norm of
            the gradient
    """

    def __init__(self, number, state, lr, max_draws):
        self.number, self.state, self.lr = number, state, lr
        self.prompts_left = max_draws * state.level.prompts  # that may still be drawn
        self.num_carried = 0  # groups trained on that an older policy sampled
        self.before = state.order.drawn, list(state.buffer.groups), Counter(state.buffer.counts)
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
    def num_late(self):
        """Groups whose R_l came too late."""
        return sum(group.late for group in self.groups)

    @property
    def changed_policy(self):
        """A gradient of exactly 0 moves nothing."""
        return any(step["grad_norm"] for step in self.steps)

    def take_back(self):
        """Order and buffer as they were before the update."""
        state = self.state
        state.order.drawn, state.buffer.groups, state.buffer.counts = self.before

    def count(self, fate):
        """How many groups had this fate in this update."""
        return self.state.buffer.counts[fate] - self.before[2][fate]

    def total(self, name):
        """Summed over the steps."""
        return sum(step[name] for step in self.steps)

    def per_token(self, name):
        """nan if nothing was trained on."""
        return ratio(self.total(name), self.total("tokens"))

    def row(self):
        """Its line of metrics.jsonl. A value that does not exist is nan."""
        rows, steps = self.rows, self.steps
        seconds = time.perf_counter() - self.start
        scored = [row for row in rows if row["verdict"] != LATE]
        rewards = [group.reward for group in self.groups if not group.late]
        gap = Counter(*steps[:1])  # later the learner is not the sampler any more
        verdicts = Counter(row["verdict"] for row in rows)
        tokens = sum(row["tokens"] for row in rows)
        row = {
            "update": self.number,
            "level": self.state.number,
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
            "reward_timeouts": self.num_late,
            "groups_drawn": self.count("drawn"),
            "groups_pending": self.state.buffer.pending,
            "carried_share": ratio(self.num_carried, self.count("kept")),
            "objective": mean_of("objective", steps),
            "entropy": self.per_token("entropy"),
            "clip_low_share": self.per_token("clip_low"),
            "clip_high_share": self.per_token("clip_high"),
            "kl_old": self.per_token("kl_old"),
            "ratio_max": max((step["ratio_max"] for step in steps), default=math.nan),
            "logprob_gap_mean": ratio(gap["gap"], gap["fresh"]),
            "logprob_gap_max": gap["gap_max"] if gap["fresh"] else math.nan,
            "grad_norm": mean_of("grad_norm", steps),
            "lr": self.lr,
            "tokens_sampled": tokens,
            "tokens_trained": int(self.total("tokens")),
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        for part in scored[0].get("values", {}) if scored else ():
            if part.startswith("part_"):
                row[f"{part}_mean"] = mean([r["values"][part] for r in scored])
        row |= {f"groups_{fate}": self.count(fate) for fate in FATES}
        return row | {f"{phase}_seconds": self.seconds[phase] for phase in PHASES}

    def tell(self, row):
        """Print its line, and what a person should hear of.  row: see `row`"""
        where = f"level {self.state.number} ({self.state.progress:.0%}) update {self.number}"
        tqdm.write(f"{where} | {LINE.format(**row).replace('nan%', '-').replace('nan', '-')}")
        failures = {name: row[f"{name}s"] for name in ("grader_timeout", "grader_error")}
        if any(failures.values()):
            tqdm.write(f"  counted as wrong: {failures}; see their verdicts in completions.jsonl")
        if self.num_late:
            tqdm.write(
                f"  {self.num_late} groups broken: --reward took longer than --reward-timeout"
            )
        if self.fault:
            tqdm.write(f"  update {self.number} given up: {self.fault}")
        elif self.steps and not self.changed_policy:
            tqdm.write(f"  update {self.number} changed nothing: all its groups are flat")
        elif not self.steps:
            tqdm.write(f"  update {self.number} skipped: {unfilled(row, self.state.level)}")
        if self.state.skips == MOST_SKIPS:
            tqdm.write(f"  level {self.state.number} ends early after {MOST_SKIPS} skipped updates")


LINE = (
    "reward {reward_mean:.3f} = right {outcome_mean:.3f} + length {length_reward_mean:.3f} | "
    "{length_mean:.0f} tok, {truncated_share:.0%} cut off | groups {groups_kept} of {groups_drawn} "
    "drawn, {groups_all_right} all right, {groups_all_wrong} all wrong | clipped "
    "{clip_low_share:.1%} + {clip_high_share:.1%} | kl {kl_old:.0e} | entropy {entropy:.2f} | grad "
    "{grad_norm:.2f} | {tokens_per_second:,.0f} tok/s"
)


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


def unfilled(row, level):
    """What was seen in draws that did not fill the buffer, and what to change."""
    drawn, right, wrong = row["groups_drawn"], row["groups_all_right"], row["groups_all_wrong"]
    cut_off = row["truncated_share"]
    if row["reward_timeouts"] > drawn / 2:
        advice = "Most rewards came too late: raise --reward-timeout"
    elif right + wrong < drawn / 2:
        advice = "Most groups would serve: raise --max-draws or --prompts"
    elif right > wrong:
        advice = "The level is too easy: raise --quality, or measure the pass rates anew"
    elif cut_off > 0.5:
        advice = f"Completions do not end: raise --max-new-tokens (now {level.max_new_tokens})"
    else:
        advice = "The level is too hard: lower --quality, show --examples, or raise --group-size"
    return (
        f"{drawn} groups did not fill the buffer of {level.buffer_groups}: {right} were all right "
        f"and {wrong} all wrong; {cut_off:.0%} of the completions were cut off. {advice}"
    )
