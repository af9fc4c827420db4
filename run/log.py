"""The one writer of a run: log files, lines for a person, the table, the tracker, the bar."""

import importlib
from collections import defaultdict
from contextlib import contextmanager

from tqdm import tqdm

from common.files import explained
from data import name_level
from eprli import MOST_SKIPS
from run.checkpoints import append

ENTROPY_COLLAPSE = 0.05  # of the entropy of the run's first update
BAR = "{percentage:3.0f} % of all levels |{bar}| {elapsed}<{remaining}"
LINE = (
    "reward {reward_mean:.3f} = right {outcome_mean:.3f} + length {length_reward_mean:.3f} | "
    "{length_mean:.0f} tok, {truncated_share:.0%} cut off | groups {groups_kept} of {groups_drawn} "
    "drawn, {groups_all_right} all right, {groups_all_wrong} all wrong | clipped "
    "{clip_low_share:.1%} + {clip_high_share:.1%} | kl {kl_old:.0e} | entropy {entropy:.2f} | grad "
    "{grad_norm:.2f} | {tokens_per_second:,.0f} tok/s"
)


class Log:
    """Told once per update and once per evaluation. The first process writes; if it cannot, all
    processes raise Stop. Every process must call."""

    def __init__(self, cfg, out, ranks):
        """Raises ValueError if the tracker cannot begin."""
        self.out, self.ranks, name = out, ranks, cfg.tracker
        self.tracker = self.bar = None
        if name and ranks.first:
            with explained(f"--tracker {name}: cannot begin; is `pip install {name}` done?"):
                self.tracker = importlib.import_module(name)
                self.tracker.init(project="eprli", name=out.name, config=vars(cfg), resume="allow")

    def append(self, name, rows):
        self.ranks.from_first(lambda: append(self.out / name, rows), interruptible=False)

    def update(self, update, first_entropy):
        """Write an update down, print it, and return its line of metrics.jsonl.

        first_entropy  of the run's first update that has one
        """
        row, written = update.row(), update.rows_to_write()
        row["completions_left_out"] = len(update.rows) - len(written)
        self.append("completions.jsonl", written)
        self.append("metrics.jsonl", [row])
        self.track(row, row["update"])
        tqdm.write(lines_of(update, row))
        if row["entropy"] < ENTROPY_COLLAPSE * (first_entropy or 0):
            tqdm.write(
                f"  entropy has collapsed from {first_entropy:.3f} to {row['entropy']:.3f} nats a "
                "token: groups will become uniform and learning stop; lower --lr, or raise "
                "--temperature or --eps-high"
            )
        return row

    def evaluation(self, rows, number):
        """Write down and print the held-out accuracy of every bin after update `number`."""
        self.append("eval.jsonl", rows)
        self.track({f"held out, {name_level(row)}": row["accuracy"] for row in rows}, number)
        for row in rows:
            text = "; ".join(f"{name} {value}" for name, value in results_of(row).items())
            tqdm.write(f"  held out, {text} of {row['n']} right after {number} updates")

    def show(self, progress):
        """Draw the bar.  progress: share of the run's budget that is used up"""
        if self.bar is None:
            silent = not self.ranks.first
            self.bar = tqdm(initial=progress, total=1, bar_format=BAR, smoothing=0, disable=silent)
        self.bar.update(progress - self.bar.n)

    def track(self, values, step):
        """Send values to the tracker, without those that are nan. Its errors are printed and never
        stop the run."""
        if self.tracker:
            with printed_errors():
                self.tracker.log({k: v for k, v in values.items() if v == v}, step=step)

    def close(self):
        self.bar.close()
        if self.tracker:
            with printed_errors():
                self.tracker.finish()


@contextmanager
def printed_errors():
    try:
        yield
    except Exception as error:  # of all kinds, from libraries and networks
        tqdm.write(f"--tracker: {type(error).__name__}: {error}")


def lines_of(update, row):
    """Return what is printed of an update: its line, and what a person should hear of.

    row  its line of metrics.jsonl
    """
    state, number = update.state, row["update"]
    where = f"level {state.number} ({state.progress:.0%}) update {number}"
    lines = [f"{where} | {LINE.format(**row).replace('nan%', '-').replace('nan', '-')}"]
    failures = {name: row[f"{name}s"] for name in ("grader_timeout", "grader_error")}
    if any(failures.values()):
        lines.append(f"counted as wrong: {failures}; see their verdicts in completions.jsonl")
    if late := row["reward_timeouts"]:
        lines.append(f"{late} groups broken: --reward took longer than --reward-timeout")
    if update.fault:
        lines.append(f"update {number} given up: {update.fault}")
    elif update.steps and not update.changed_policy:
        lines.append(f"update {number} changed nothing: all its groups are flat")
    elif not update.steps:
        lines.append(f"update {number} skipped: {unfilled(row, state.level)}")
    if state.skips == MOST_SKIPS:
        lines.append(f"level {state.number} ends early after {MOST_SKIPS} skipped updates")
    return "\n  ".join(lines)


def unfilled(row, level):
    """Return what was seen in draws that did not fill the buffer, and what to change."""
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


# ----------------------------------------------------------------------------------- held out


def table(evaluations, levels):
    """Return the held-out accuracy of every bin (rows) before and after every level (columns)."""
    columns = {"before": 0}
    for state in levels:
        if state.last_update:
            columns[f"after level {state.number}"] = state.last_update
    rows = defaultdict(dict)  # name of a result -> {update: its text}
    for row in evaluations:
        for name, value in results_of(row).items():
            rows[name][row["update"]] = value
    width = max(map(len, ["held-out accuracy", *rows])) + 2
    lines = ["held-out accuracy".ljust(width) + "".join(f"{name:^24}" for name in columns)]
    for name, cells in rows.items():
        row = "".join(f"{cells.get(end, '-'):^24}" for end in columns.values())
        lines.append(name.ljust(width) + row)
    return "\n".join(lines)


def results_of(row):
    """Return {what: its mean and interval as text} of a row of eval.jsonl: accuracy; then R_l, its
    parts, and `late` if any was, where R_l is a function of the user's."""
    bin_name = name_level(row)
    results = {bin_name: "{accuracy:.1%} [{low:.1%}, {high:.1%}]".format(**row)}
    for name, values in row.get("means", {}).items():
        if name != "late" or values[0]:
            results[f"{bin_name}, {name}"] = shown(name, values)
    return results


def shown(name, measure):
    """Return a measure (mean, low, high) as text: `length` in tokens, R_l and its parts as they
    are, all others in per cent."""
    if name.startswith(("R_l", "part_")):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*measure)
    scale, unit = (1, "") if name == "length" else (100, " %")
    mean, low, high = (scale * value for value in measure)
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"
