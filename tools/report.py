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
LEVEL_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe & Ito, safe for the colour-blind
FATES = {  # what becomes of a group
    "groups_kept": ("kept", "#0072b2"),
    "groups_all_right": ("all right", "#9ecae1"),
    "groups_all_wrong": ("all wrong", "#bdbdbd"),
    "groups_stale": ("stale", "#636363"),
    "groups_broken": ("not finite", "#d55e00"),
}


def read_lines(path):
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def smooth(values, window):
    """Mean of up to `window` neighbours, gaps (None) left out; nan where there is nothing."""
    parts = (
        [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        for i in range(len(values))
    )
    return [sum(part) / len(part) if part else float("nan") for part in parts]


def draw_lines(ax, runs, title, unit, series):
    """series: {label: (key of metrics.jsonl, colour)}; raw values faint, their running mean strong."""
    for run, style in zip(runs, STYLES * len(runs)):
        updates = [row["update"] for row in run["metrics"]]
        window = 1 if title == "learning rate" else max(1, len(updates) // 20)
        for label, (key, colour) in series.items():
            values = [row[key] for row in run["metrics"]]
            ax.plot(updates, smooth(values, 1), color=colour, alpha=0.2, linewidth=0.7)
            ax.plot(
                updates,
                smooth(values, window),
                style,
                color=colour,
                linewidth=1.5,
                label=label if run is runs[0] else None,
            )
    ax.set_title(title, loc="left")
    ax.set_ylabel(unit)
    if "gap" in title:
        ax.set_yscale("log")
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8)


def draw_accuracy(ax, runs):
    for run, style in zip(runs, STYLES * len(runs)):
        for level in sorted({row["level"] for row in run["metrics"] + run["eval"]}):
            colour = LEVEL_COLOURS[(level - 1) % len(LEVEL_COLOURS)]
            training = [row for row in run["metrics"] if row["level"] == level]
            share = smooth([row["accuracy"] for row in training], max(1, len(training) // 10))
            ax.plot(
                [row["update"] for row in training],
                share,
                style,
                color=colour,
                alpha=0.35,
                linewidth=1,
            )
            rows = [row for row in run["eval"] if row["level"] == level]
            middle = [row["accuracy"] for row in rows]
            error = [
                [row["accuracy"] - row["low"] for row in rows],
                [row["high"] - row["accuracy"] for row in rows],
            ]
            label = f"level {level}, held out" if rows and run is runs[0] else None
            ax.errorbar(
                [row["update"] for row in rows],
                middle,
                error,
                fmt="o" + style,
                color=colour,
                capsize=3,
                markersize=5,
                label=label,
            )
    ax.set_ylim(0, 1)
    ax.set_title("accuracy (thin: training)", loc="left")
    ax.set_ylabel("share right, 95 % intervals")
    if any(run["eval"] for run in runs):
        ax.legend(frameon=False, fontsize=8)


def draw_buffer(ax, run, many):
    """What became of the groups, stacked, per update; the first run alone."""
    updates, bottom = [row["update"] for row in run["metrics"]], [0.0] * len(run["metrics"])
    for key, (label, colour) in FATES.items():
        if key == "groups_broken" and not any(row.get(key) for row in run["metrics"]):
            continue
        top = [
            b + v
            for b, v in zip(
                bottom, smooth([row[key] for row in run["metrics"]], max(1, len(updates) // 20))
            )
        ]
        ax.fill_between(updates, bottom, top, color=colour, label=label, linewidth=0)
        bottom = top
    ax.set_title(
        "fate of the groups drawn (first run)" if many else "fate of the groups drawn", loc="left"
    )
    ax.set_ylabel("groups per update")
    ax.legend(frameon=False, fontsize=8, ncols=2)


def draw(folders):
    """Draw these run directories into report.png of the first; returns the picture's path."""
    runs = []
    for folder in map(Path, folders):
        metrics = read_lines(folder / "metrics.jsonl")
        if not metrics:
            raise ValueError(f"{folder}: no metrics.jsonl with an update in it")
        runs.append(
            {"name": folder.name, "metrics": metrics, "eval": read_lines(folder / "eval.jsonl")}
        )
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
        }
    )
    figure, axes = plt.subplots(3, 4, figsize=(17, 10), layout="constrained")
    blue, orange, green = LEVEL_COLOURS[:3]
    draw_accuracy(axes.flat[0], runs)
    draw_buffer(axes.flat[1], runs[0], len(runs) > 1)
    parts = {
        "reward": ("reward_mean", blue),
        "outcome R": ("outcome_mean", orange),
        "length K": ("length_reward_mean", green),
    }
    if not any(
        row["length_reward_mean"] for run in runs for row in run["metrics"]
    ):  # K = 0: reward and outcome are one
        parts = {"": ("reward_mean", blue)}
    sides = {
        "low side (A < 0)": ("clip_low_share", orange),
        "high side (A > 0)": ("clip_high_share", blue),
    }
    shares = {"write steps": ("writes_steps_share", blue), "cut off": ("truncated_share", orange)}
    panels = [
        ("reward and its parts", "mean over completions", parts),
        ("shares of completions", "share", shares),
        ("completion length", "tokens", {"": ("length_mean", blue)}),
        ("entropy of the policy", "nats per token", {"": ("entropy", blue)}),
        ("tokens whose gradient the clip removed", "share", sides),
        ("divergence from the sampling policy", "rho - 1 - log rho, nats", {"": ("kl_old", blue)}),
        ("gradient norm before clipping", "norm", {"": ("grad_norm", blue)}),
        ("largest gap between sampler and learner", "nats", {"": ("logprob_gap_max", blue)}),
        (
            "throughput of whole updates",
            "sampled tokens per second",
            {"": ("tokens_per_second", blue)},
        ),
        ("learning rate", "", {"": ("lr", blue)}),
    ]
    for ax, (title, unit, series) in zip(axes.flat[2:], panels):
        draw_lines(ax, runs, title, unit, series)
    boundaries = [
        next(rows)["update"]
        for _, rows in groupby(runs[0]["metrics"], key=lambda row: row["level"])
    ][1:]
    for ax in axes.flat:
        ax.set_xlabel("update")
        for first in (
            boundaries if len(boundaries) < 8 else []
        ):  # interleaved levels have no boundaries to show
            ax.axvline(first - 0.5, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    figure.suptitle(
        "   ".join(
            f"{run['name']} ({style})" if len(runs) > 1 else run["name"]
            for run, style in zip(runs, STYLES * len(runs))
        ),
        fontsize=10,
    )
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
