"""Run bench/rollout.py and bench/step.py beside transformers and TRL, in turns (A B C A B C ...), and print the tables.

    python bench/compare.py --peer-python VENV/bin/python --sizes 11m 135m --dtypes float32 bfloat16 --repeats 3

VENV: python -m venv VENV && VENV/bin/pip install torch transformers trl. Nothing else should run on the machine meanwhile.
Every run is appended to --log as a line of JSON; medians and ratios are printed as Markdown. What is compared: sampling with
32 slots on heavy-tailed lengths and on equal ones, an update; and of ours alone, how sampling slows down with length
(growth) and how much of a step the kernels take (kernels). `--what batch` samples at several numbers of slots and draws
bench/batch.png.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
WHAT = ("heavy-tailed", "equal", "update", "growth", "kernels", "batch")
BATCHES = (8, 16, 32, 64)  # slots
STEPS = {
    "2m": (8, 8, 128),
    "11m": (8, 8, 128),
    "135m": (4, 4, 64),
}  # prompts, group, new tokens of one update


def last_line(python, script, *arguments):
    """The JSON that a script prints last. A peer's failure ends no comparison: it is None, with its error on stderr."""
    done = subprocess.run(
        [python, str(HERE / script), *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        failure = f"{script} {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr[-800:]}"
        if not script.startswith("peer_"):
            sys.exit(failure)
        print(failure, file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--sizes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT[:3])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log", default="compare.jsonl")
    args = parser.parse_args()
    print(
        f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| model | what | tokens a second; seconds an update | ours by the better | ours |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        workload(folder / "heavy-tailed", 12, "--max-new", 192)
        workload(folder / "equal", 12, "--max-new", 96, "--uniform")
        for size in args.sizes:
            subprocess.run(
                [sys.executable, str(HERE / "rollout.py"), "--make-model", size, folder / size],
                check=True,
            )
        for size in args.sizes:
            for dtype in args.dtypes:
                for what in args.what:
                    {"growth": growth, "kernels": kernels, "batch": batch}.get(what, compare)(
                        args, folder, size, dtype, what
                    )


def processor():
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def workload(path, prompts, *more):
    subprocess.run(
        [
            sys.executable,
            str(HERE / "rollout.py"),
            "--make-workload",
            path,
            "--prompts",
            str(prompts),
            *map(str, more),
        ],
        check=True,
    )


def ours(folder, size, dtype, name, slots, *more):
    return (
        sys.executable,
        "rollout.py",
        "--model",
        folder / size,
        "--workload",
        folder / name,
        "--dtype",
        dtype,
        "--slots",
        slots,
        "--repeats",
        1,
        *more,
    )


def growth(args, folder, size, dtype, what):
    """Tokens a second at 512 new tokens over those at 128, 16 slots."""
    for new in (128, 512):
        workload(folder / f"{new}", 2, "--max-new", new, "--uniform")
    speeds = {new: [] for new in (128, 512)}
    for _ in range(args.repeats):
        for new, values in speeds.items():
            values.append(last_line(*ours(folder, size, dtype, f"{new}", 16))["tokens_per_second"])
    short, long = (statistics.median(values) for values in speeds.values())
    print(
        f"| {size} {dtype} | {what}: 512 new tokens by 128 | 128: {short:,.0f}, 512: {long:,.0f} | **{long / short:.2f}** | |",
        flush=True,
    )


def kernels(args, folder, size, dtype, what):
    shares = [
        last_line(*ours(folder, size, dtype, "equal", 64, "--kernels"))["kernel_share"]
        for _ in range(args.repeats)
    ]
    print(
        f"| {size} {dtype} | {what}: share of a step of 64 slots | | **{statistics.median(shares):.2f}** | |",
        flush=True,
    )


def batch(args, folder, size, dtype, what):
    """Tokens a second over slots, equal lengths; two rounds of completions for every number of slots."""
    speeds = {"roofline": []}
    for slots in BATCHES:
        workload(folder / f"batch{slots}", 2, "--group", slots, "--max-new", 96, "--uniform")
        shape = (
            "--model",
            folder / size,
            "--workload",
            folder / f"batch{slots}",
            "--dtype",
            dtype,
            "--slots",
            slots,
            "--repeats",
            1,
        )
        runs = {
            "ours": ours(folder, size, dtype, f"batch{slots}", slots),
            "transformers generate": (args.peer_python, "peer_generate.py", *shape),
            "transformers generate_batch": (
                args.peer_python,
                "peer_generate.py",
                *shape,
                "--continuous",
            ),
        }
        for who, command in runs.items():
            result = last_line(*command) or {"tokens_per_second": float("nan")}
            speeds.setdefault(who, []).append(result["tokens_per_second"])
            if who == "ours":
                speeds["roofline"].append(
                    result["tokens_per_second"] / result["fraction_of_roofline"]
                )
    found = "; ".join(
        f"{who} {', '.join(f'{v:,.0f}' for v in values)}" for who, values in speeds.items()
    )
    print(
        f"| {size} {dtype} | {what}: {', '.join(map(str, BATCHES))} slots | {found} | | |",
        flush=True,
    )
    draw(f"sampling, {size} {dtype}, 96 new tokens each, {os.cpu_count()} CPU cores", speeds)


def draw(title, speeds):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    styles = zip(("#000000", "#0072b2", "#d55e00", "#009e73"), ("--", "o-", "s-", "^-"))
    for (who, values), (colour, style) in zip(speeds.items(), styles):
        ax.loglog(BATCHES, values, style, color=colour, label=who)
    ax.set_xticks(BATCHES, list(map(str, BATCHES)))
    ax.set_xticks([], minor=True)
    ax.set_xlabel("slots")
    ax.set_ylabel("tokens a second")
    ax.set_title(title, loc="left")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "batch.png", dpi=120)


def compare(args, folder, size, dtype, what):
    if what == "update":
        prompts, group, new = STEPS[size]
        shape = (
            "--model",
            folder / size,
            "--prompts",
            prompts,
            "--group",
            group,
            "--new-tokens",
            new,
            "--dtype",
            dtype,
            "--steps",
            3,
        )
        runs = {
            "ours": (sys.executable, "step.py", *shape),
            "TRL": (
                args.peer_python,
                "peer_trl.py",
                *shape,
                "--micro-batch",
                min(8, prompts * group // 4),
            ),
        }
        unit, better = "seconds_per_step", min
    else:
        shape = (
            "--model",
            folder / size,
            "--workload",
            folder / what,
            "--dtype",
            dtype,
            "--slots",
            args.slots,
            "--repeats",
            1,
        )
        runs = {
            "ours": ours(folder, size, dtype, what, args.slots),
            "generate": (args.peer_python, "peer_generate.py", *shape),
            "generate_batch": (args.peer_python, "peer_generate.py", *shape, "--continuous"),
        }
        unit, better = "tokens_per_second", max
    found = {who: [] for who in runs}
    for repeat in range(args.repeats):
        for who, command in runs.items():
            result = last_line(*command)
            if result:
                found[who].append(result)
                with open(args.log, "a") as file:
                    file.write(
                        json.dumps(
                            {
                                "size": size,
                                "dtype": dtype,
                                "what": what,
                                "who": who,
                                "repeat": repeat,
                                **result,
                            }
                        )
                        + "\n"
                    )
    medians = {
        who: statistics.median(r[unit] for r in results)
        for who, results in found.items()
        if results
    }
    if len(medians) < 2:
        print(f"| {size} {dtype} | {what} | the peers failed, see above | | |", flush=True)
        return
    anchor = better(value for who, value in medians.items() if who != "ours")
    ratio = medians["ours"] / anchor if better is max else anchor / medians["ours"]
    extra = {
        key: round(statistics.median(r[key] for r in found["ours"]), 3)
        for key in (
            "slot_occupancy",
            "fraction_of_roofline",
            "cache_over_filled",
            "learn_fraction_of_roofline",
            "peak_rss_mb",
        )
        if key in found["ours"][0]
    }
    if "TRL" in found and found["TRL"]:
        extra["TRL's peak_rss_mb"] = statistics.median(r["peak_rss_mb"] for r in found["TRL"])
        extra["memory by TRL's"] = round(extra["peak_rss_mb"] / extra["TRL's peak_rss_mb"], 2)
    print(
        f"| {size} {dtype} | {what} | "
        + ", ".join(f"{who} {value:,.1f}" for who, value in medians.items())
        + f" | **{ratio:.2f} x** | {', '.join(f'{k} {v}' for k, v in extra.items() if v is not None)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
