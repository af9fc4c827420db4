"""One update: what happens in it, its line of metrics.jsonl, and what a person should hear."""

import math
import resource
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from rewards import ERROR, RIGHT, TIMEOUT, writes_steps

SHOW_EVERY = 25  # updates between two looks at full completions: eyes find reward hacking first
MOST_FAILURES = 0.05  # share of completions on which the grader may fail without a word
FATES = ("drawn", "kept", "all_right", "all_wrong", "broken", "stale")  # of groups, see Buffer


class NotFinite(Exception):
    """A reward, log-prob, loss or gradient is not finite: the update is given up.

    groups  of the buffer that were being trained on
    """

    def __init__(self, what, groups=()):
        super().__init__(what)
        self.groups = groups


class Update:
    """What happens in one update of a level."""

    def __init__(self, number, stage, lr):
        self.number, self.stage, self.lr = number, stage, lr
        self.counts_before = Counter(stage.buffer.counts)
        self.draws = 0
        self.groups = []  # drawn
        self.rows = []  # of completions.jsonl, one per completion drawn
        self.seconds = Counter()
        self.sums = Counter()  # over the tokens trained on; and over steps: the objective
        self.grad_norms = []  # one per optimizer step
        self.ratio_max = self.gap_max = self.fault = None
        self.start = time.perf_counter()

    @property
    def step(self):
        """Number of the optimizer step that is under way, from 1."""
        return len(self.grad_norms) + 1

    def drew(self, prompts, attempts, groups):
        """A draw was made: prompts, attempts (a list per prompt) and groups belong together."""
        self.draws += 1
        self.groups += groups
        for prompt, some, group in zip(prompts, attempts, groups):
            outcomes, lengths = group.outcome.tolist(), group.length_reward.tolist()
            for i, a in enumerate(some):
                row = {"update": self.number, "level": self.stage.number}
                row |= {"problem_id": prompt.problem.id, "sample": i, "verdict": a.verdict}
                row |= {"outcome": finite(outcomes[i]), "length_reward": finite(lengths[i])}
                row |= {"tokens": a.length, "stopped": a.completion.stopped, "text": a.text}
                self.rows.append(row)
        if self.draws == 1 and self.number % SHOW_EVERY == 1:
            for i in range(len(prompts))[:: max(1, len(prompts) // 2)][:2]:
                problem, a = prompts[i].problem, attempts[i][0]
                verdict = f"({a.verdict}; answer {problem.answer})"
                tqdm.write(f"  {problem.problem}  ->  {a.text}  {verdict}")

    def check_drawn(self):
        """Raise NotFinite if a group holds a number that is not finite."""
        for i, group in enumerate(self.groups):
            if group.finite:
                continue
            problem = self.rows[i * self.stage.level.group_size]["problem_id"]
            for reward in group.reward.tolist():
                if not math.isfinite(reward):
                    name = f"--reward {self.stage.level.reward}"
                    raise NotFinite(f"{name} returned, for problem {problem}, {reward}")
            raise NotFinite(f"log-probs sampled from the policy for problem {problem}")

    def stepped(self, grad_norm, sums, peaks):
        """One optimizer step was taken."""
        self.grad_norms.append(grad_norm)
        self.sums.update(sums)
        self.ratio_max = max(self.ratio_max or 0.0, peaks["ratio_max"])
        if sums["fresh"]:
            self.gap_max = max(self.gap_max or 0.0, peaks["gap_max"])

    def mean(self, values):
        """Over the completions drawn; None if there are none."""
        return sum(values) / len(self.rows) if self.rows else None

    def per(self, name, unit):
        return self.sums[name] / self.sums[unit] if self.sums[unit] else None

    def row(self):
        """Its line of metrics.jsonl."""
        rows, sums, steps = self.rows, self.sums, len(self.grad_norms)
        outcome = [x for g in self.groups for x in g.outcome.tolist()]
        length = [x for g in self.groups for x in g.length_reward.tolist()]
        reward = [x for g in self.groups for x in g.reward.tolist()]
        sampled = sum(r["tokens"] for r in rows)
        row = {
            "update": self.number,
            "level": self.stage.number,
            "accuracy": self.mean([r["verdict"] == RIGHT for r in rows]),
            "reward_mean": self.mean(reward),
            "reward_std": population_std(reward),
            "outcome_mean": self.mean(outcome),
            "length_reward_mean": self.mean(length),
            "length_mean": self.mean([r["tokens"] for r in rows]),
            "truncated_share": self.mean([not r["stopped"] for r in rows]),
            "writes_steps_share": self.mean([writes_steps(r["text"]) for r in rows]),
            "grader_timeouts": sum(r["verdict"] == TIMEOUT for r in rows),
            "grader_errors": sum(r["verdict"] == ERROR for r in rows),
        }
        for fate in FATES:
            row[f"groups_{fate}"] = self.stage.buffer.counts[fate] - self.counts_before[fate]
        row |= {
            "groups_pending": self.stage.buffer.pending,
            "objective": sums["objective"] / steps if steps else None,
            "entropy": self.per("entropy", "tokens"),
            "clip_low_share": self.per("clip_low", "tokens"),
            "clip_high_share": self.per("clip_high", "tokens"),
            "ratio_max": self.ratio_max,
            "kl_old": self.per("kl_old", "tokens"),
            "logprob_gap_max": self.gap_max,
            "logprob_gap_mean": self.per("gap", "fresh"),
            "grad_norm": sum(self.grad_norms) / steps if steps else None,
            "lr": self.lr,
            "tokens_sampled": sampled,
            "tokens_trained": int(sums["tokens"]),
        }
        for phase in ("sample", "grade", "learn"):
            row[f"{phase}_seconds"] = self.seconds[phase]
        row["tokens_per_second"] = sampled / (time.perf_counter() - self.start)
        row["peak_memory_mb"] = peak_memory_mb()
        return {name: finite(value) for name, value in row.items()}

    def tell(self, row, folder):
        """Print its line, and what a person should hear of.  row: see `row`"""
        stage, text = self.stage, {}
        for name, value in row.items():
            text[name] = math.nan if value is None else value
        tqdm.write(
            f"level {stage.number} update {stage.turns}/{stage.level.updates} | "
            + LINE.format(**text)
        )
        failures = row["grader_timeouts"] + row["grader_errors"]
        if failures > MOST_FAILURES * len(self.rows):
            tqdm.write(
                f"  the grader gave up on {failures} of {len(self.rows)} completions, which count "
                f'as wrong: look for the verdicts "{TIMEOUT}" and "{ERROR}" in '
                f"{folder / 'completions.jsonl'}"
            )
        if self.fault:
            tqdm.write(f"  update {self.number} given up: {self.fault}")
        elif not self.grad_norms:
            tqdm.write(f"  update {self.number} skipped: {unfilled(row, stage.level, self.draws)}")


LINE = (
    "reward {reward_mean:.3f} = right {outcome_mean:.3f} + length {length_reward_mean:.3f} | "
    "{length_mean:.0f} tok, {truncated_share:.0%} cut off | groups {groups_kept} of {groups_drawn} "
    "drawn, {groups_all_right} all right, {groups_all_wrong} all wrong | clipped "
    "{clip_low_share:.1%} + {clip_high_share:.1%} | kl {kl_old:.0e} | entropy {entropy:.2f} | grad "
    "{grad_norm:.2f} | {tokens_per_second:,.0f} tok/s"
)


def population_std(values):
    """None if there are none."""
    if not values:
        return None
    return torch.tensor(values, dtype=torch.float64).std(correction=0).item()


def finite(value):
    """JSON has neither nan nor infinity: None stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_mb():
    """Of the GPU where there is one, else of this process (Linux counts in KiB, macOS in bytes)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def unfilled(row, level, draws):
    """What was seen in draws that did not fill the buffer, and what to change."""
    drawn, right, wrong = row["groups_drawn"], row["groups_all_right"], row["groups_all_wrong"]
    cut_off = row["truncated_share"] or 0.0
    seen = (
        f"{draws} draws of {level.prompts} prompts did not fill the buffer of "
        f"{level.buffer_groups}: of {drawn} groups {right} were all right and {wrong} all wrong; "
        f"{cut_off:.0%} of the completions were cut off. "
    )
    if right + wrong < drawn / 2:
        return seen + "Most groups would serve: raise --max-draws or --prompts"
    if right > wrong:
        return seen + "The level is too easy: raise --quality, or measure the pass rates anew"
    if cut_off > 0.5:
        now = f"(now {level.max_new_tokens})"
        return seen + f"Completions do not come to an end: raise --max-new-tokens {now}"
    return seen + "The level is too hard: lower --quality, show --examples, or raise --group-size"
