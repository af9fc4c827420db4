"""Draw the logs of training runs.

    python -m tools.report RUN [RUN ...]    writes report.png and report.html into the first RUN;
                                            several runs share their panels

Legends have the keys of metrics.jsonl. report.html is a copy of tools/report.html that contains the
logs: one file that needs no network.
"""

import argparse
import json
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from common.files import explained
from data import name_level

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
# The fields of config.json that the page shows.
FACTS = """model parameters dtype data eval_data problems began torch device seed quality updates
tokens buffer_groups group_size max_new_tokens reward length_weight"""
# The page shows completions of TIMES updates, spread over the run: of GROUPS groups of each update,
# SAMPLES completions. A text of more than LONGEST characters loses its middle.
TIMES, GROUPS, SAMPLES, LONGEST = 5, 2, 16, 1500
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.size": 9,
    "legend.edgecolor": "none",  # a white box, through which curves are faintly visible
    "legend.framealpha": 0.75,
}


def read_log(path):
    """Yield the rows of a log, or nothing if there is no such file.

    They come one by one, since a log may be larger than the memory. If a run was killed, its last
    line may be torn. It is skipped with a message.
    """
    if not path.exists():
        return
    with explained(f"{path}: cannot be read"), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
            else:
                tqdm.write(f"{path}: its last line is torn, and left out")


def read_config(folder):
    """Return a run's config.json. Paths in the working directory become relative, so that a page
    does not show whose folder it is."""
    here = json.dumps(f"{Path.cwd()}/")
    with explained(f"{folder}: not the folder of a run"):
        return json.loads((folder / "config.json").read_text().replace(here[:-1], '"'))


def read_runs(folders):
    """Return [(name, rows of metrics.jsonl, rows of eval.jsonl), ...], one for each run.

    Each row of eval.jsonl gets a name. If the held-out files of a run are not those of the first
    run that has any, its rows of eval.jsonl are skipped with a message. Raises ValueError.
    """
    runs, wanted = [], None
    for folder in map(Path, folders):
        metrics, evaluations = (list(read_log(folder / f"{n}.jsonl")) for n in ("metrics", "eval"))
        if not metrics:
            raise ValueError(f"{folder}: no metrics.jsonl with an update in it")
        read = read_config(folder).get("read", {})
        hashes = [read[name] for name in read if name.startswith("--eval-data")]
        if evaluations and hashes != (wanted := wanted or hashes):
            tqdm.write(f"{folder.name}: its held-out files are not the first run's, left out")
            evaluations = []
        for row in evaluations:
            row["name"] = f"held out, {name_level(row)} ({row['n']} problems)"
        runs.append((folder.name, metrics, evaluations))
    return runs


def panels(runs):
    """Return [(title, unit, keys of metrics.jsonl), ...]. Parts of R_l are in the panel of R_l."""
    keys = {key for _, metrics, _ in runs for row in metrics for key in row}
    parts = sorted(key for key in keys if key.startswith("part_"))
    table = []
    for line in PANELS.splitlines():
        title, unit, keys = map(str.strip, line.split("|"))
        table.append((title, unit, keys.split() + parts * title.startswith("reward")))
    return table


# ------------------------------------------------------------------------------------ the picture


def column(rows, key):
    """Return the values of a key, (rows,) float. null becomes nan, and so does a missing value: an
    update may lack a part of R_l."""
    return np.array([row.get(key) for row in rows], float)


def smooth(values):
    """Return running means over a twentieth of the run. Missing values (nan) do not count."""
    half = len(values) // 40
    padded = np.pad(values, half, constant_values=np.nan)
    return np.ma.masked_invalid(sliding_window_view(padded, 2 * half + 1)).mean(1)


def plain(name):
    """Return a name as a label. Text between two dollar signs would become a formula."""
    return name.replace("$", r"\$")


def draw_run(axes, table, run, line, held_out):
    """Draw one run: raw values are faint, and their running means are strong. Held-out accuracy is
    in the first panel.

    table, held_out  panels and names of all runs: a name has one color
    """
    _, metrics, evaluations = run
    updates = column(metrics, "update")
    for ax, (title, unit, keys) in zip(axes, table):
        ax.set(title=title, xlabel="update", ylabel=unit)
        if "log scale" in unit:
            ax.set_yscale("log")
        for i, key in enumerate(keys):
            values = column(metrics, key)
            ax.plot(updates, values, color=f"C{i}", alpha=0.2)
            ax.plot(updates, smooth(values), line, color=f"C{i}", label=key)
    for i, name in enumerate(held_out, 1):
        rows = [row for row in evaluations if row["name"] == name]
        at, accuracy, low, high = (column(rows, k) for k in ("update", "accuracy", "low", "high"))
        axes[0].plot(at, accuracy, f"o{line}", color=f"C{i}", label=plain(name))
        axes[0].vlines(at, low, high, color=f"C{i}")


def finish(axes, metrics):
    """Add legends, with each name once, and a line wherever the level of the first run changes."""
    starts = [b["update"] for a, b in pairwise(metrics) if a["level"] != b["level"]]
    for ax in axes:
        handles, names = ax.get_legend_handles_labels()
        by_name = dict(zip(names, handles))
        ax.legend(by_name.values(), by_name.keys())
        if len(starts) <= 8:  # interleaved levels change all the time
            for update in starts:
                ax.axvline(update - 0.5, color="black", linewidth=0.8, linestyle="--")


@matplotlib.style.context(["tableau-colorblind10", STYLE])
def draw(folders):
    """Draw these run directories into report.png of the first one. Return its path."""
    figure, runs = Figure(figsize=(17, 10), layout="constrained"), read_runs(folders)
    axes = figure.subplots(3, 4).flatten()
    held_out = dict.fromkeys(row["name"] for _, _, evaluations in runs for row in evaluations)
    lines = list(zip(cycle(LINES), runs))
    for line, run in lines:
        draw_run(axes, panels(runs), run, line, held_out)
    finish(axes, runs[0][1])
    figure.suptitle("   ".join(f"{line} {plain(name)}" for line, (name, *_) in lines))
    path = Path(folders[0]) / "report.png"
    figure.savefig(path, dpi=110)
    return path


# --------------------------------------------------------------------------------------- the page


def write_page(folders):
    """Write the logs of these run directories into report.html of the first one. Return its
    path."""
    folder, runs = Path(folders[0]), read_runs(folders)
    config = read_config(folder)
    content = {
        "config": {name: config.get(name) for name in FACTS.split()},
        "runs": runs,
        "panels": panels(runs),
        "rows": read_completions(folder / "completions.jsonl", len(runs[0][1])),
    }
    page, path = Path(__file__).with_suffix(".html").read_text(), folder / "report.html"
    # HTML reads a script on to the next "</script", which no text may write.
    path.write_text(page.replace("CONTENT", json.dumps(content).replace("<", "\\u003c")))
    return path


def read_completions(path, updates):
    """Return a few rows of completions.jsonl, from the first update to the last."""
    times, rows = np.linspace(1, updates, TIMES).round(), []
    for row in read_log(path):
        if row["update"] in times and row["group"] < GROUPS and row["sample"] < SAMPLES:
            rows.append(row | {name: cut(row[name]) for name in ("problem", "answer", "text")})
    return rows


def cut(value):
    """Return the beginning of a value as text, the number of characters that are left out, and its
    end."""
    text = value if isinstance(value, str) else json.dumps(value)  # an answer of one's own kind
    half, left_out = LONGEST // 2, max(0, len(text) - LONGEST)
    return text[:half], left_out, text[half + left_out :]


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
