"""Draw what training runs logged.

    python report.py RUN [RUN ...]        one picture; several runs are drawn over each other
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = ("-", "--", ":", "-.")
LEVEL_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito, safe for the colour-blind
FATES = {  # what becomes of a group
    "groups_kept": ("kept", "#0072b2"), "groups_all_right": ("all right", "#9ecae1"),
    "groups_all_wrong": ("all wrong", "#bdbdbd"), "groups_stale": ("stale", "#636363"),
}


def read_lines(path):
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def smooth(values, window):
    """Mean of up to `window` neighbours, gaps (None) left out."""
    parts = ([v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None] for i in range(len(values)))
    return [sum(part) / len(part) if part else None for part in parts]


def lines(ax, runs, series, title, unit, log=False, legend=True):
    """series: {label: (key, colour)}; raw values faint, their running mean strong."""
    for run, style in zip(runs, STYLES * len(runs)):
        updates = [row["update"] for row in run["metrics"]]
        window = max(1, len(updates) // 20)
        for label, (key, colour) in series.items():
            values = [float("nan") if row[key] is None else row[key] for row in run["metrics"]]
            if window > 1:
                ax.plot(updates, values, color=colour, alpha=0.2, linewidth=0.7)
            mean = [float("nan") if v is None else v for v in smooth([row[key] for row in run["metrics"]], window)]
            ax.plot(updates, mean, style, color=colour, linewidth=1.5, label=label if run is runs[0] else None)
    ax.set_title(title, loc="left")
    ax.set_ylabel(unit)
    if log:
        ax.set_yscale("log")
    if legend and len(series) > 1:
        ax.legend(frameon=False, fontsize=8)


def draw_accuracy(ax, runs):
    for run, style in zip(runs, STYLES * len(runs)):
        levels = sorted({row["level"] for row in run["eval"]})
        for level in levels:
            colour = LEVEL_COLOURS[(level - 1) % len(LEVEL_COLOURS)]
            training = [row for row in run["metrics"] if row["level"] == level]
            share = smooth([row["accuracy"] for row in training], max(1, len(training) // 10))
            ax.plot([row["update"] for row in training], [float("nan") if s is None else s for s in share], style, color=colour, alpha=0.35, linewidth=1)
            rows = [row for row in run["eval"] if row["level"] == level]
            error = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
            label = f"level {level}, held out" if run is runs[0] else None
            ax.errorbar([row["update"] for row in rows], [row["accuracy"] for row in rows], error, fmt="o" + style, color=colour, capsize=3, markersize=5, label=label)
    ax.set_ylim(0, 1)
    ax.set_title("accuracy (points: held out, 95 % intervals; thin: training)", loc="left")
    if any(run["eval"] for run in runs):
        ax.legend(frameon=False, fontsize=8)


def draw_buffer(ax, run):
    """Shares of the drawn groups, per update, stacked; the first run alone."""
    rows, bottom = run["metrics"], [0.0] * len(run["metrics"])
    window = max(1, len(rows) // 20)
    for key, (label, colour) in FATES.items():
        values = smooth([row[key] for row in rows], window)
        ax.fill_between([row["update"] for row in rows], bottom, [b + v for b, v in zip(bottom, values)], color=colour, label=label, linewidth=0)
        bottom = [b + v for b, v in zip(bottom, values)]
    ax.set_title("buffer: what became of the groups drawn", loc="left")
    ax.set_ylabel("groups per update")
    ax.legend(frameon=False, fontsize=8, ncols=2)


def draw(folders):
    """Draw these run directories into report.png of the first; returns the picture's path."""
    runs = []
    for folder in map(Path, folders):
        metrics = read_lines(folder / "metrics.jsonl")
        if not metrics:
            raise ValueError(f"{folder}: no metrics.jsonl with an update in it")
        runs.append({"name": folder.name, "metrics": metrics, "eval": read_lines(folder / "eval.jsonl")})
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(3, 4, figsize=(17, 10), layout="constrained")
    axes = axes.flat
    blue, orange, green = LEVEL_COLOURS[:3]
    draw_accuracy(axes[0], runs)
    lines(axes[1], runs, {"reward": ("reward_mean", blue), "outcome R": ("outcome_mean", orange), "length K": ("length_reward_mean", green)}, "reward and its parts", "mean over completions")
    lines(axes[2], runs, {"": ("length_mean", blue)}, "completion length", "tokens")
    lines(axes[3], runs, {"cut off": ("truncated_share", orange), "write steps": ("writes_steps_share", blue)}, "share of completions", "share")
    axes[3].set_ylim(-0.02, 1.02)
    draw_buffer(axes[4], runs[0])
    lines(axes[5], runs, {"": ("entropy", blue)}, "entropy of the policy", "nats per token")
    lines(axes[6], runs, {"low (A < 0)": ("clip_low_share", orange), "high (A > 0)": ("clip_high_share", blue)}, "tokens whose gradient the clip removed", "share")
    lines(axes[7], runs, {"": ("kl_old", blue)}, "divergence from the sampling policy", "kl_old, nats")
    lines(axes[8], runs, {"": ("grad_norm", blue)}, "gradient norm before clipping", "norm")
    lines(axes[9], runs, {"": ("logprob_gap_max", blue)}, "sampler-learner gap (largest)", "nats", log=True)
    lines(axes[10], runs, {"": ("tokens_per_second", blue)}, "throughput of whole updates", "sampled tokens per second")
    lines(axes[11], runs, {"": ("lr", blue)}, "learning rate", "")
    for ax in axes:
        ax.set_xlabel("update")
        for level, rows in groupby(runs[0]["metrics"], key=lambda row: row["level"]):
            first = next(rows)["update"]
            if first > 1 and len({row["level"] for row in runs[0]["metrics"]}) > 1:
                ax.axvline(first - 0.5, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    figure.suptitle("   ".join(f"{run['name']} ({style})" for run, style in zip(runs, STYLES * len(runs))), fontsize=10)
    path = Path(folders[0]) / "report.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
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
