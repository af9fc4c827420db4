"""One update: what happens in it, its line of metrics.jsonl, and what a person should hear."""

import math
import resource
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from rewards import ERROR, RIGHT, TIMEOUT, writes_steps
from run.statistics import by_name

KEEP = 16  # groups of each update whose completions are written down
SHOW_EVERY = 25  # updates between two looks at full completions: eyes find reward hacking first
MOST_FAILURES = 0.05  # share of completions; more grader failures than that are said
# Of groups, see Buffer. `kept` groups were trained on; those that wait are not counted yet.
FATES = ("drawn", "kept", "all_right", "all_wrong", "broken", "stale")
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

    rows    one per completion drawn
    groups  all that were drawn
    steps  one per optimizer step: what train.accumulate_gradient says, and the gradient's norm
    """

    def __init__(self, number, state, lr, max_draws):
        self.number, self.state, self.lr = number, state, lr
        self.prompts_left = max_draws * state.level.prompts  # that may still be drawn
        self.num_carried = 0  # groups trained on that an older policy sampled
        self.before = state.order.drawn, list(state.buffer.groups), Counter(state.buffer.counts)
        self.rows = []
        self.scored = []  # those of groups whose R_l came in time
        self.num_late = 0  # the other groups
        self.groups = []
        self.steps = []
        self.seconds = Counter()
        self.fault = None  # the NotFinite that ended it
        self.start = time.perf_counter()

    def add_draw(self, prompts, attempts, groups):
        """A draw was made: prompts, attempts (a list per prompt) and groups belong together."""
        if not self.groups and self.number % SHOW_EVERY == 1:
            for prompt, (a, *_) in list(zip(prompts, attempts))[:2]:
                tqdm.write(
                    f"  {prompt.problem.problem!r}  ->  {a.text!r}  "
                    f"({a.score.verdict}; answer {prompt.problem.answer!r})"
                )
        self.groups += groups
        for prompt, some, group in zip(prompts, attempts, groups):
            self.num_late += group.late
            scored = zip(some, group.outcome.tolist(), group.length_reward.tolist())
            for i, (a, outcome, length_reward) in enumerate(scored):
                row = {
                    "update": self.number,
                    "level": self.state.number,
                    "problem_id": prompt.problem.id,
                    "problem": prompt.problem.problem,
                    "answer": prompt.problem.answer,
                    "sample": i,
                    "verdict": a.score.verdict,
                    "outcome": outcome,
                    "length_reward": length_reward,
                    "tokens": a.length,
                    "stopped": a.completion.stopped,
                    "text": a.text,
                }
                if a.score.values:
                    row["values"] = a.score.values
                self.rows.append(row)
                if not group.late:
                    self.scored.append(row)

    @property
    def changed_policy(self):
        """A gradient of exactly 0 moves nothing."""
        return any(step["grad_norm"] for step in self.steps)

    def take_back(self):
        """Order and buffer as they were before the update."""
        state = self.state
        state.order.drawn, state.buffer.groups, state.buffer.counts = self.before

    def rows_to_write(self):
        """Rows of completions.jsonl: of the first KEEP groups drawn, all of a group. The first of
        them is the first drawn whose outcomes differ, if there is one."""
        teaching = [i for i, group in enumerate(self.groups) if group.mixed]
        order = dict.fromkeys([*teaching[:1], *range(len(self.groups))])
        rows = []
        for i in list(order)[:KEEP]:
            advantages = self.groups[i].advantage.tolist()
            for row, advantage in zip(self.rows[i * len(advantages) :], advantages):
                rows.append(row | {"group": i, "advantage": advantage})
        return rows

    def raise_if_not_finite(self):
        """Raise NotFinite if a group was drawn that holds a number that is not finite."""
        for row in self.scored:
            reward = row["outcome"] + row["length_reward"]
            if not math.isfinite(reward):
                raise NotFinite(
                    f"--reward {self.state.level.reward} returned, "
                    f"for problem {row['problem_id']!r}, {reward}"
                )
        if self.count("broken") > self.num_late:
            raise NotFinite("log-probs sampled from the policy are not finite")

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
        rows, scored, steps = self.rows, self.scored, self.steps
        seconds = time.perf_counter() - self.start
        gap = Counter(*steps[:1])  # later the learner is not the sampler any more
        tokens = [row["tokens"] for row in rows]
        verdicts = Counter(row["verdict"] for row in rows)
        rewards = [group.reward for group in self.groups if not group.late]
        row = {
            "update": self.number,
            "level": self.state.number,
            "accuracy": ratio(verdicts[RIGHT], len(rows)),
            "reward_mean": mean([x for r in rewards for x in r.tolist()]),
            "reward_variance_within": mean([r.var(correction=0).item() for r in rewards]),
            "reward_variance_between": variance([r.mean().item() for r in rewards]),
            "outcome_mean": mean_of("outcome", scored),
            "length_reward_mean": mean_of("length_reward", scored),
            "length_mean": mean(tokens),
            "truncated_share": mean([not row["stopped"] for row in rows]),
            "writes_steps_share": mean([writes_steps(row["text"]) for row in rows]),
            "grader_timeouts": verdicts[TIMEOUT],
            "grader_errors": verdicts[ERROR],
            "reward_timeouts": self.num_late,
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
            "tokens_sampled": sum(tokens),
            "tokens_trained": int(self.total("tokens")),
            "tokens_per_second": sum(tokens) / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        values = by_name(r.get("values", {}) for r in scored)
        row |= {f"{k}_mean": mean(v) for k, v in values.items() if k.startswith("part_")}
        row |= {f"groups_{fate}": self.count(fate) for fate in FATES}
        row |= {f"{phase}_seconds": self.seconds[phase] for phase in PHASES}
        return row

    def tell(self, row, folder):
        """Print its line, and what a person should hear of.  row: see `row`"""
        where = f"level {self.state.number} ({self.state.progress:.0%}) update {self.number}"
        tqdm.write(f"{where} | {LINE.format(**row).replace('nan%', '-').replace('nan', '-')}")
        failures = row["grader_timeouts"] + row["grader_errors"]
        if failures > MOST_FAILURES * len(self.rows):
            tqdm.write(
                f"  the grader gave up on {failures} of {len(self.rows)} completions, which count "
                f'as wrong: look for the verdicts "{TIMEOUT}" and "{ERROR}" in '
                f"{folder / 'completions.jsonl'}"
            )
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
    seen = (
        f"{drawn} groups did not fill the buffer of {level.buffer_groups}: {right} were all right "
        f"and {wrong} all wrong; {cut_off:.0%} of the completions were cut off. "
    )
    if row["reward_timeouts"] > drawn / 2:
        return seen + "Most rewards came too late: raise --reward-timeout"
    if right + wrong < drawn / 2:
        return seen + "Most groups would serve: raise --max-draws or --prompts"
    if right > wrong:
        return seen + "The level is too easy: raise --quality, or measure the pass rates anew"
    if cut_off > 0.5:
        end = f"raise --max-new-tokens (now {level.max_new_tokens}), if the context leaves more"
        return seen + f"Completions do not come to an end: {end}"
    return seen + "The level is too hard: lower --quality, show --examples, or raise --group-size"
