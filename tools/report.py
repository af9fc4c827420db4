"""Draw what training runs logged.

    python -m tools.report RUN [RUN ...]    report.png and report.html of the first; several runs
                                            share their panels

Legends name the keys of metrics.jsonl. report.html is tools/report.html with the logs in it: one
file that needs no network.
"""

import argparse
import json
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data import name_level
from files import explained

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
# The page shows groups of so many updates, spread over the run, and at most so many bytes of them.
# What is longer than LONGEST (characters) loses its middle.
TIMES, GROUPS_PER_TIME, MOST_BYTES = 13, 3, 4_200_000
LONGEST = {"problem": 2000, "answer": 400, "text": 3000}
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.edgecolor": "none",  # a white box: what lies under it stays to be seen faintly
    "legend.framealpha": 0.75,
}


def read_log(path):
    """The rows of a log, one by one: it may be larger than the memory. The last line of a run that
    was killed may be torn; it is left out, aloud. No file: no rows."""
    if not path.exists():
        return
    with explained(f"{path}: cannot be read"), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
            else:
                tqdm.write(f"{path}: its last line is torn, and left out")


def held_out_set(folder):
    """-> a function of a row of eval.jsonl: what it is an accuracy of"""
    with explained(f"{folder}: not the folder of a run"):
        read = json.loads((folder / "config.json").read_text()).get("read", {})
    hashes = {name: read[name] for name in read if name.startswith("--eval-data")}
    only = list(hashes.values())[:1]  # a row names its file where there are several

    def of(row):
        hashed = hashes.get(f"--eval-data {row['file']}") if "file" in row else only
        return name_level(row), row["n"], str(hashed)

    return of


def read_runs(folders):
    """-> [(name, rows of metrics.jsonl, rows of eval.jsonl), ...].  Raises ValueError

    Held-out sets that are none of the first run that has some (name, number and hash of the
    problems) are left out, with a message.
    """
    runs, wanted = [], {}
    for folder in map(Path, folders):
        metrics = list(read_log(folder / "metrics.jsonl"))
        if not metrics:
            raise ValueError(f"{folder}: no metrics.jsonl with an update in it")
        evaluations, of = list(read_log(folder / "eval.jsonl")), held_out_set(folder)
        sets = dict.fromkeys(map(of, evaluations))
        wanted = wanted or sets  # of the first run that has some
        for name, n, _ in sorted(sets.keys() - wanted.keys()):
            tqdm.write(f"{folder.name}: {name} ({n} problems) is no set of the first run, left out")
        evaluations = [row for row in evaluations if of(row) in wanted]
        runs.append((folder.name, metrics, evaluations))
    return runs


# ------------------------------------------------------------------------------------ the picture


def column(rows, key):
    """(rows,) float: null becomes nan, and so does a part of R_l that an update lacks."""
    return np.array([row.get(key) for row in rows], float)


def smooth(values, window):
    """Mean of the neighbours up to window // 2 away. Missing values (nan) do not count."""
    known, near = np.isfinite(values), np.ones(window // 2 * 2 + 1)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is near
        return np.convolve(np.nan_to_num(values), near, "same") / np.convolve(known, near, "same")


def parts(metrics):
    """The keys of the parts of R_l, where it has some."""
    keys = dict.fromkeys(key for row in metrics for key in row)
    return [key for key in keys if key.startswith("part_")]


def plain(name):
    """As a label. Between two dollar signs there would be a formula."""
    return name.replace("$", r"\$")


def draw_run(axes, metrics, evaluations, line, part_names, held_out):
    """Raw values are faint, their running means strong; held-out accuracy goes into the first.

    part_names, held_out  of all runs: a name has one color
    """
    updates = column(metrics, "update")
    for ax, panel in zip(axes, PANELS.splitlines()):
        title, unit, keys = map(str.strip, panel.split("|"))
        keys = keys.split() + (part_names if title.startswith("reward") else [])
        ax.set(title=title, xlabel="update", ylabel=unit)
        if "log scale" in unit:
            ax.set_yscale("log")
        for i, key in enumerate(keys):
            values = column(metrics, key)
            ax.plot(updates, values, color=f"C{i}", alpha=0.2)
            ax.plot(
                updates, smooth(values, len(metrics) // 20), line, color=f"C{i}", label=plain(key)
            )
    for i, name in enumerate(held_out, 1):
        rows, colour = [row for row in evaluations if name_level(row) == name], f"C{i}"
        updates, accuracy = column(rows, "update"), column(rows, "accuracy")
        axes[0].plot(updates, accuracy, f"o{line}", color=colour, label=plain(f"held out, {name}"))
        axes[0].vlines(updates, column(rows, "low"), column(rows, "high"), color=colour)


def finish(axes, metrics):
    """The legends, a name once, and a line wherever the level of the first run changes."""
    starts = [b["update"] for a, b in pairwise(metrics) if a["level"] != b["level"]]
    if len(starts) > 8:  # interleaved levels change all the time
        starts = []
    for ax in axes:
        names = {}
        for line, name in zip(*ax.get_legend_handles_labels()):
            names.setdefault(name, line)
        ax.legend(names.values(), names.keys())
        for update in starts:
            ax.axvline(update - 0.5, color="black", linewidth=0.8, linestyle="--")


@matplotlib.style.context(["tableau-colorblind10", STYLE])
def draw(folders):
    """Draw these run directories into report.png of the first; returns the picture's path."""
    figure = Figure(figsize=(17, 10), layout="constrained")
    axes = figure.subplots(3, 4).flatten()
    names, runs, rows, held_out = [], read_runs(folders), [], {}
    for _, metrics, evaluations in runs:
        rows += metrics
        held_out |= dict.fromkeys(map(name_level, evaluations))
    part_names = parts(rows)
    for (name, metrics, evaluations), line in zip(runs, cycle(LINES)):
        draw_run(axes, metrics, evaluations, line, part_names, held_out)
        names.append(plain(f"{line} {name}"))
    finish(axes, runs[0][1])
    figure.suptitle("   ".join(names))
    path = Path(folders[0]) / "report.png"
    figure.savefig(path, dpi=110)
    return path


# --------------------------------------------------------------------------------------- the page


def write_page(folders):
    """Write these run directories as report.html of the first; returns its path."""
    folder, runs = Path(folders[0]), read_runs(folders)
    _, metrics, _ = runs[0]
    # A page that is published need not tell whose folder it was.
    here = f"{Path.cwd()}/"
    config = json.loads((folder / "config.json").read_text())
    for name in ("model", "data", "eval_data", "examples", "template", "out"):
        paths = config.get(name) or []
        paths = [paths] if isinstance(paths, str) else paths  # --eval-data takes several
        config[name] = ", ".join(path.removeprefix(here) for path in paths)
    for level in config["levels"]:
        level["reward"] = level["reward"].removeprefix(here)
    for name in ("read", "reward"):  # by paths of this machine
        config.pop(name, None)
    panels = PANELS.splitlines()  # the second one is drawn otherwise
    panels[1] = f"R_l, share right | mean | outcome_mean accuracy {' '.join(parts(metrics))}"
    content = {
        "config": config,
        "runs": runs,
        "panels": "\n".join(panels),
        "rows": read_completions(folder / "completions.jsonl", len(metrics)),
    }
    page = Path(__file__).with_suffix(".html").read_text()
    path = folder / "report.html"
    path.write_text(page.replace("CONTENT", encode(content)))
    return path


def encode(value):
    """JSON that no text in it can end: HTML reads a script on to the next "</script"."""
    return json.dumps(value).replace("<", "\\u003c")


def read_completions(path, updates):
    """Rows of completions.jsonl from the first update to the last."""
    times, rows = np.linspace(1, updates, TIMES).round(), []
    for row in read_log(path):
        if row["group"] < GROUPS_PER_TIME and row["update"] in times:
            rows.append(shorten(row))
    while len(encode(rows)) > MOST_BYTES:
        times = times[::2] if len(times) > 1 else []
        rows = [row for row in rows if row["update"] in times]
    return rows


def shorten(row):
    """Its long values as (beginning, number of characters left out, end)."""
    for name in LONGEST.keys() & row.keys():
        value, half = row[name], LONGEST[name] // 2
        if not isinstance(value, str):  # a gold answer of one's own kind
            value = json.dumps(value)
        left_out = max(0, len(value) - 2 * half)
        row[name] = value[:half], left_out, value[half + left_out :]
    return row


def main():
    parser = argparse.ArgumentParser(description="Draw training runs.")
    parser.add_argument("runs", nargs="+", help="run directories")
    args = parser.parse_args()
    try:
        print(draw(args.runs), write_page(args.runs))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
