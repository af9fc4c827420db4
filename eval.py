"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K     accuracies with intervals
    python eval.py --model M --data F.jsonl --add-pass-rate G.jsonl       measures difficulty
    python eval.py @recipes/eval-deepscaler.args --model M --data aime24  as a paper evaluates
    python eval.py --model RUN --data F.jsonl              as a training run samples
    python eval.py --compare A B                           tests the difference of two --out folders

`torchrun --nproc_per_node=N eval.py ...` shares the work. The same flags, with --out FOLDER of an
evaluation that was stopped, go on with it: FOLDER/completions.jsonl is all its state.
"""

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import flag
from eprli import QUALITY
from files import Stop, explained, stems, write_records
from policy.attempt import (
    DIFFICULTY,
    EVALUATION,
    Sampling,
    attempt,
    evaluation_requests,
    must_be_finite,
)
from policy.checkpoint import (
    MAX_NEW_TOKENS,
    SHIPPED,
    TINY,
    Policy,
    default_dtype,
    digest,
    is_shipped,
)
from rewards import LATE, MATH, RIGHT, Scorer, load_reward, writes_steps
from run.directory import checkpoints, create, lock
from run.fit import Fit
from run.flags import Machine, Scoring, check_ranges, make_parser
from run.processes import Ranks, refuse, set_up_output
from run.statistics import SETTINGS, by_name, interval, majority, measure, shown

# ----------------------------------------------------------------------------------- command line

# What a training run sets, beside its lengths and R_l
OF_RUN = "temperature examples system suffix template template_kwargs stop dtype"


@dataclass(frozen=True)
class Flags(Machine):
    """The flags of eval.py, beside data.Prompting."""

    _argument_group_name = "evaluation"

    model: str = flag(
        "checkpoint folder, hub name[@revision], or training run: its newest checkpoint, with how "
        "it samples as defaults",
        str(TINY),
    )
    data: list[str] = flag(
        "files of problems, data sets of the hub (sources.py), or names of benchmarks; with "
        "[:512] behind it, the first 512 rows",
        [str(SHIPPED / "heldout.jsonl")],
    )
    columns: list[str] = flag("of --data: problem=NAME answer=NAME, and pass_rate, level or id", [])
    samples: int = flag("completions per problem", 16)
    k: int = flag("k of pass@k; 0: as many as --samples", 0)
    max_new_tokens: int = flag(f"longest completion, tokens; shipped model: {MAX_NEW_TOKENS}", 0)
    temperature: float = flag("0 is greedy; 1 as in training", 1.0)
    top_p: float = flag("nucleus, above 0; 1 is off, as in training", 1.0)
    top_k: int = flag("likeliest tokens; 0 is off, as in training", 0)
    seed: int = flag("of the random streams", 0)
    quality: list[float] = flag("thresholds of levels", QUALITY)
    reward: str = flag("R_l: math, or path.py:function; 1 and more is right", MATH)
    out: Path | None = flag("new, or of a stopped evaluation; default runs/eval-<date-time>")
    add_pass_rate: Path | None = flag("file to write: the problems with their pass rates")
    compare: str | None = flag("test the difference of two results: A B", nargs=2)


SECTIONS = Flags, Scoring, data.Prompting
RULES = (
    ("samples slots reward_workers", lambda v: v >= 1, "at least 1"),
    ("reward_timeout", lambda v: 0 < v < math.inf, "above 0"),
    ("k max_new_tokens temperature top_k seed", lambda v: 0 <= v < math.inf, "at least 0"),
    ("top_p", lambda v: 0 < v <= 1, "in (0, 1]"),
)


def parse_args(parser, arguments):
    """-> flags. A training run sets those that are not given. Raises ValueError"""
    args = parser.parse_args(arguments)
    if (Path(args.model) / "checkpoints").is_dir():
        defaults = flags_of(args.model)
        parser.set_defaults(**defaults)
        args = parser.parse_args(arguments)
        args.model = defaults["model"]
    args.k = args.k or args.samples
    args.dtype = args.dtype or default_dtype(args.model, args.device)
    if is_shipped(args.model):
        args.max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    # What measures difficulty is sampled from other streams of random numbers.
    args.purpose = DIFFICULTY if args.add_pass_rate else EVALUATION
    return args


def flags_of(run):
    """{flag: value} with which a training run samples, and its newest checkpoint.
    Raises ValueError"""
    with explained(f"--model {run}: not a training run with a checkpoint"):
        config = json.loads((Path(run) / "config.json").read_text())
        flags = {name: config[name] for name in OF_RUN.split()}
        longest = max(level["max_new_tokens"] for level in config["levels"])
        flags["max_new_tokens"] = config["eval_max_new_tokens"] or longest
        if len(set(config["reward"])) == 1:
            flags["reward"] = config["reward"][0]
        flags["model"] = str(checkpoints(run)[0])
        return flags


def check(args):
    """Raise ValueError for flags that cannot be, or do not go together."""
    check_ranges(args, [*RULES, ("k", lambda v: v <= args.samples, "at most --samples")])
    if not args.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens: our default fits the shipped model alone; for {args.model} give it"
        )
    load_reward(args.reward)
    names, rates = stems("--data", args.data), args.add_pass_rate
    if rates and (len(names) > 1 or rates.exists() or not rates.parent.is_dir()):
        raise ValueError(f"--add-pass-rate {rates}: needs one file of --data and a new path")


def make_row(path, problem_id, level, sample, attempt):
    """A line of completions.jsonl"""
    score = attempt.score
    row = {
        "file": path,
        "problem_id": problem_id,
        "level": level,
        "sample": sample,
        "verdict": score.verdict,
        "answer": score.answer,
        "tokens": attempt.length,
        "stopped": attempt.completion.stopped,
        "text": attempt.text,
    }
    return row | {"values": score.values} if score.values else row


def read_data(args):
    """-> {file: problems}.  Raises ValueError"""
    check(args)
    files, graded = {}, args.reward == MATH
    for path in args.data:
        files[path] = data.read_problems(path, args.columns, must_fit=True, graded=graded)
        if graded:
            data.only_gradable(path, files[path])  # says which; they stay
        for p in files[path] if args.add_pass_rate else ():
            with explained(f"{path}, {p.id!r}: --add-pass-rate cannot write it as JSON"):
                json.dumps(p.record())
    return files


def load_inputs(args, device, files):
    """files  see read_data;  -> Policy, {file: prompts}.  Raises ValueError or OSError"""
    policy, prompts = Policy.load(args.model, args.dtype, device, args), {}
    for path, problems in files.items():
        prompts[path] = policy.render(problems)
        policy.show(path, prompts[path], args.max_new_tokens)
    return policy, prompts


def open_folder(args, policy, files):
    """Make --out with all that its completions depend on, or go on with one that has the same.

    -> its path.  Raises ValueError
    """
    out, settings = args.out, {name: getattr(args, name) for name in SETTINGS.split()}
    measured = policy.measuring(
        args.temperature, args.max_new_tokens, [args.reward], args.top_k, args.top_p
    )
    settings["weights"] = measured["weights"]
    settings["reward_identity"] = measured["reward"]
    settings["prompts"] = digest((list(files.values()), policy.stop_ids))
    if not (out and out.exists()):
        return create(out, settings | {"measured": measured}, "eval-")
    with explained(f"--out {out}: exists already, and is no evaluation to go on with"):
        began_with = json.loads((out / "config.json").read_text())
        differ = [name for name in settings if began_with[name] != settings[name]]
    if differ:
        raise ValueError(
            f"--out {out}: its evaluation began with other settings ({', '.join(differ)}); "
            "name a new folder, or go on with the same ones"
        )
    return out


def finished(log, samples):
    """How many problems stand in completions.jsonl. What a kill left half written is cut off."""
    with open(log, "a+b") as file:
        file.seek(0)
        # Where whole lines end, in bytes
        ends = [0, *accumulate(len(line) for line in file if line.endswith(b"\n"))]
        whole = (len(ends) - 1) // samples
        file.truncate(ends[whole * samples])
    return whole


def sample_rest(args, policy, files, log, ranks):
    """Sample and grade the problems that completions.jsonl lacks, and append them block by block.

    Each process takes a share of a block; the first one writes, in the order of problems.
    """
    scorer, reward = Scorer(args), load_reward(args.reward)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    fit, work = Fit(args, policy.model), []  # ((file, problem id, name of its level), request)
    for path, prompts in files.items():
        levels = data.level_names([p.problem for p in prompts], args.quality)
        for request in evaluation_requests(args.seed, prompts, args.samples, reward, args.purpose):
            name = request[0].problem.id
            work.append(((path, name, levels.get(name)), request))

    def sample_share(share):
        asked = [request for _, request in share]
        done = attempt(policy, scorer, asked, sampling, fit, show_progress=ranks.first)
        rows = []
        for (labels, _), attempts in zip(share, done):
            must_be_finite(labels[1], attempts)
            rows += [make_row(*labels, *each) for each in enumerate(attempts)]
        return rows

    done = ranks.from_first(lambda: finished(log, args.samples))
    print(f"{log}: {done} problems are done, {len(work) - done} are left")
    size = max(1, 2 * fit.most_slots // args.samples) * ranks.size  # problems between two writes
    for start in tqdm(range(done, len(work), size), disable=not ranks.first):
        rows = ranks.share_out(work[start : start + size], sample_share)
        ranks.from_first(lambda rows=rows: write_records(log, rows, "a"))
    scorer.close()


def result_of(rows):
    """A line of results.jsonl: what became of one problem, from the rows of its samples."""
    right = [row["verdict"] == RIGHT for row in rows]
    values = by_name(row["values"] for row in rows if "values" in row)  # of one's own R_l
    return {name: rows[0][name] for name in ("file", "problem_id", "level")} | {
        "n": len(rows),
        "right": sum(right),
        "majority": int(majority([row["answer"] for row in rows], right)),
        "length": np.mean([row["tokens"] for row in rows]),
        "cut_off": 1 - np.mean([row["stopped"] for row in rows]),
        "writes_steps": np.mean([writes_steps(row["text"]) for row in rows]),
        "verdicts": Counter(row["verdict"] for row in rows),
        "means": {name: np.mean(some) for name, some in values.items()},
    }


def summarise(results, k):
    """Print and return {level, or "all": {measure: (mean, low, high)}}."""
    print(f"{results[0]['n']} samples a problem, 95 % intervals over problems")
    levels = {result["level"] for result in results} - {None}
    summary = {}
    for level in [*sorted(levels, key=lambda name: float(name.split()[1])), "all"]:
        part = [measure(some, k) for some in results if level in (some["level"], "all")]
        summary[level] = {name: interval(values) for name, values in by_name(part).items()}
        cells = [f"{name} {shown(name, values)}" for name, values in summary[level].items()]
        print(f"  {level:10} {len(part):5} problems   {'   '.join(cells)}")
    return summary


def add_pass_rates(path, prompts, results, measured):
    """Write the problems back with the share of their samples that is right, and what measured."""
    problems = []
    for prompt, result in zip(prompts, results):
        late, other = result["verdicts"][LATE], prompt.problem.other | {"measured": measured}
        rate = None if late else result["right"] / result["n"]
        if late:
            print(f"{result['problem_id']!r}: not measured, {late} of its rewards came too late")
        problems.append(replace(prompt.problem, pass_rate=rate, other=other))
    data.write_problems(path, problems)


def write_results(args, files, out, locked):
    """Write results.jsonl and summary.json, print tables -> what summary.json holds

    locked  config.json, an open file
    """
    summary = json.load(locked)
    results, answered = [], False
    with open(out / "completions.jsonl", encoding="utf-8") as lines:
        while rows := [json.loads(line) for line in islice(lines, args.samples)]:
            results.append(result_of(rows))
            answered |= any(row["answer"] for row in rows)
    if not answered and args.reward != MATH:  # R_l that asks for no box
        for result in results:
            del result["majority"]
    write_records(out / "results.jsonl", [{"settings": summary}, *results])
    summary |= {"files": {}, "verdicts": sum((r["verdicts"] for r in results), Counter())}
    for path, prompts in files.items():
        some = [result for result in results if result["file"] == path]
        print(
            f"\n{path}: temperature {args.temperature:g}, top-p {args.top_p:g}, at most "
            f"{args.max_new_tokens} tokens a completion"
        )
        if any(p.problem.pass_rate is not None for p in prompts):
            print(f"levels by difficulty, up to --quality {' '.join(map(str, args.quality))}")
        summary["files"][path] = summarise(some, args.k)
        if args.add_pass_rate:
            measured = summary["measured"] | {
                "model": Path(args.model).name,
                "date": time.strftime("%Y-%m-%d"),
                "samples": args.samples,
            }
            add_pass_rates(args.add_pass_rate, prompts, some, measured)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main(arguments=None):
    set_up_output()
    parser = make_parser(SECTIONS)
    with contextlib.ExitStack() as stack:
        try:
            args = parse_args(parser, arguments)
            if args.compare:
                from tools.compare import compare

                return print(json.dumps(compare(*args.compare)))
            ranks = stack.enter_context(Ranks(args.device))
            files = ranks.from_first(lambda: read_data(args))
            policy, files = ranks.on_all(lambda: load_inputs(args, ranks.device, files))
            out = ranks.from_first(lambda: open_folder(args, policy, files))
            locked = ranks.on_all(lambda: ranks.first and lock(out / "config.json"))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            refuse(parser, error)
        try:
            sample_rest(args, policy, files, out / "completions.jsonl", ranks)
            if ranks.first:
                print(json.dumps(write_results(args, files, out, locked)))
        except OSError as error:
            refuse(parser, error)
        except Stop as stop:
            words = f"{parser.prog}: {stop}; the same flags with --out {out} go on\n"
            parser.exit(1, words if ranks.first else None)
        except KeyboardInterrupt:
            words = f"{parser.prog}: interrupted; the same flags with --out {out} go on\n"
            parser.exit(130, words if ranks.first else None)
        except torch.OutOfMemoryError:
            refuse(parser, f"out of memory; with --out {out} it goes on")


if __name__ == "__main__":
    main()
