"""Run bench/rollout.py and bench/step.py beside transformers and TRL, in turns (A B C A B C ...), and print the tables.

    python bench/compare.py --peer-python VENV/bin/python --sizes 11m 135m --dtypes float32 bfloat16 --repeats 3

VENV: python -m venv VENV && VENV/bin/pip install torch transformers trl. Nothing else should run on the machine meanwhile.
Every run is appended to --log as a line of JSON; medians and ratios are printed as Markdown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
STEPS = {"2m": (8, 8, 128), "11m": (8, 8, 128), "135m": (4, 4, 64)}  # prompts, group, new tokens of one update


def last_line(python, script, *arguments):
    """The JSON that a script prints last, or None with its error on stderr: one peer's failure ends no comparison."""
    done = subprocess.run([python, str(HERE / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        print(f"{script} {arguments}: exit {done.returncode}\n{done.stderr[-800:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--sizes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--what", nargs="+", choices=("heavy-tailed", "equal", "update"), default=["heavy-tailed", "equal", "update"])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log", default="compare.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, more in (("heavy-tailed", ("--max-new", 192)), ("equal", ("--max-new", 96, "--uniform"))):
            subprocess.run([sys.executable, str(HERE / "rollout.py"), "--make-workload", folder / name, *map(str, more)], check=True)
        for size in args.sizes:
            subprocess.run([sys.executable, str(HERE / "rollout.py"), "--make-model", size, folder / size], check=True)
        for size in args.sizes:
            for dtype in args.dtypes:
                for what in args.what:
                    compare(args, folder, size, dtype, what)


def compare(args, folder, size, dtype, what):
    if what == "update":
        prompts, group, new = STEPS[size]
        shape = ("--model", folder / size, "--prompts", prompts, "--group", group, "--new-tokens", new, "--dtype", dtype, "--steps", 1)
        runs = {"ours": (sys.executable, "step.py", *shape, "--micro-batch-tokens", 2048),
                "TRL": (args.peer_python, "peer_trl.py", *shape, "--micro-batch", min(8, prompts * group // 4))}
        unit, better = "seconds_per_step", min
    else:
        shape = ("--model", folder / size, "--workload", folder / what, "--dtype", dtype, "--slots", args.slots, "--repeats", 1)
        runs = {"ours": (sys.executable, "rollout.py", *shape), "generate": (args.peer_python, "peer_generate.py", *shape),
                "generate_batch": (args.peer_python, "peer_generate.py", *shape, "--continuous")}
        unit, better = "tokens_per_second", max
    found = {who: [] for who in runs}
    for repeat in range(args.repeats):
        for who, command in runs.items():
            result = last_line(*command)
            if result:
                found[who].append(result)
                with open(args.log, "a") as file:
                    file.write(json.dumps({"size": size, "dtype": dtype, "what": what, "who": who, "repeat": repeat, **result}) + "\n")
    medians = {who: statistics.median(r[unit] for r in results) for who, results in found.items() if results}
    anchor = better(value for who, value in medians.items() if who != "ours")
    ratio = medians["ours"] / anchor if better is max else anchor / medians["ours"]
    extra = {key: found["ours"][-1].get(key) for key in ("slot_occupancy", "fraction_of_roofline", "learn_fraction_of_roofline", "peak_rss_mb")}
    if "TRL" in found and found["TRL"]:
        extra["TRL's peak_rss_mb"] = found["TRL"][-1]["peak_rss_mb"]
    print(f"| {size} {dtype} | {what} | " + " | ".join(f"{who} {value:,.1f}" for who, value in medians.items())
          + f" | **{ratio:.2f} x** | {', '.join(f'{k} {v}' for k, v in extra.items() if v is not None)} |", flush=True)


if __name__ == "__main__":
    main()
