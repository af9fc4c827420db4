"""Draw what training runs logged.

    python -m tools.report RUN [RUN ...]    report.png of the first; several runs share its panels

Legends name the keys of metrics.jsonl.
"""

import argparse
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from data import name_level, read_records

LINES = ("-", "--", ":", "-.")  # one per run
PANELS = """\
accuracy in training, held out (dots) | share right, 95 % intervals | accuracy
groups drawn, by their fate           | groups per update       | groups_kept groups_all_right \
groups_all_wrong groups_stale groups_broken
reward, and the length reward in it   | mean, variance          | reward_mean length_reward_mean \
reward_variance_within reward_variance_between
shares of completions                 | share                   | writes_steps_share truncated_share
completion length                     | tokens                  | length_mean
entropy of the policy                 | nats per token          | entropy
tokens whose gradient is clipped away | share                   | clip_high_share clip_low_share
divergence from the sampling policy   | rho - 1 - log rho, nats | kl_old
gradient norm before clipping         | norm                    | grad_norm
largest gap of learner from sampler   | nats, log scale         | logprob_gap_max
throughput of whole updates           | tokens sampled / s      | tokens_per_second
learning rate                         |                         | lr"""
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.frameon": False,
}


def read_log(path):
    """The rows of a log. No file, or an empty one: no rows."""
    if not path.is_file() or not path.stat().st_size:
        return []
    return read_records(path)


def column(rows, key):
    """(rows,) float: null becomes nan, a missing key 0."""
    return np.array([row.get(key, 0) for row in rows], float)


def smooth(values, window):
    """Mean of the neighbours up to window // 2 away. Missing values (nan) do not count."""
    means = []
    for i in range(len(values)):
        near = values[max(0, i - window // 2) : i + window // 2 + 1]
        near = near[np.isfinite(near)]
        means.append(near.mean() if len(near) else np.nan)
    return means


def draw_panel(ax, metrics, panel, line):
    """Raw values are faint, their running means strong."""
    title, unit, keys = map(str.strip, panel.split("|"))
    ax.set_title(title)
    ax.set_ylabel(unit)
    if "log scale" in unit:
        ax.set_yscale("log")
    updates = column(metrics, "update")
    for i, key in enumerate(keys.split()):
        values = column(metrics, key)
        ax.plot(updates, values, color=f"C{i}", alpha=0.2)
        ax.plot(updates, smooth(values, len(metrics) // 20), line, color=f"C{i}", label=key)


def draw_held_out(ax, evaluations, line):
    for level in dict.fromkeys(row["level"] for row in evaluations):
        colour = f"C{level or 1}"
        rows = [row for row in evaluations if row["level"] == level]
        updates = column(rows, "update")
        ax.plot(
            updates, column(rows, "accuracy"), "o" + line, color=colour, label=name_level(level)
        )
        ax.vlines(updates, column(rows, "low"), column(rows, "high"), color=colour)


def finish(axes, metrics):
    """The legends, of the first run alone, and a line wherever its level changes."""
    starts = [b["update"] for a, b in pairwise(metrics) if a["level"] != b["level"]]
    if len(starts) > 8:  # interleaved levels change all the time
        starts = []
    for ax in axes:
        ax.set_xlabel("update")
        ax.legend()
        for update in starts:
            ax.axvline(update - 0.5, color="black", linewidth=0.8, linestyle="--")


@matplotlib.style.context(["tableau-colorblind10", STYLE])
def draw(folders):
    """Draw these run directories into report.png of the first; returns the picture's path."""
    folders = [Path(folder) for folder in folders]
    figure = Figure(figsize=(17, 10), layout="constrained")
    axes = figure.subplots(3, 4).flatten()
    names = []
    for folder, line in zip(folders, cycle(LINES)):
        metrics = read_log(folder / "metrics.jsonl")
        if not metrics:
            raise ValueError(f"{folder}: no metrics.jsonl with an update in it")
        for ax, panel in zip(axes, PANELS.splitlines()):
            draw_panel(ax, metrics, panel, line)
        draw_held_out(axes[0], read_log(folder / "eval.jsonl"), line)
        if not names:
            finish(axes, metrics)
        names.append(f"{line} {folder.name}")
    figure.suptitle("   ".join(names))
    path = folders[0] / "report.png"
    figure.savefig(path, dpi=110)
    return path


def main():
    parser = argparse.ArgumentParser(description="Draw training runs into report.png of the first.")
    parser.add_argument("runs", nargs="+", help="run directories")
    args = parser.parse_args()
    try:
        print(draw(args.runs))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
