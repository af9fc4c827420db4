"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K     accuracies with intervals
    python eval.py --model M --data F.jsonl --add-pass-rate G.jsonl       measures difficulty
    python eval.py @recipes/eval-deepscaler.args --model M --data aime24  as a paper evaluates
    python eval.py --model RUN --data F.jsonl              as a training run samples
    python eval.py --compare A B                           tests the difference of two --out folders

`torchrun --nproc_per_node=N eval.py ...` shares the work. The same flags, with --out FOLDER of an
evaluation that was stopped, go on with it: FOLDER/completions.jsonl is all its state.
"""

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from answers import canonical
from common.files import Stop, explained, read_records, stem, stems, write_records
from common.flags import ABOVE_0, AT_LEAST_0, AT_LEAST_1, check_rules, flag, make_parser
from common.statistics import by_name, difference, interval, majority, pass_at_k
from policy.attempt import Sampling, Solver, evaluation_requests
from policy.checkpoint import (
    SHIPPED,
    TINY,
    Policy,
    default_dtype,
    digest,
    is_shipped,
    weights_digest,
)
from policy.memory import slots_that_fit
from rewards import LATE, MATH, RIGHT, Scorer, identity, load_reward, writes_steps
from rollout import DIFFICULTY, EVALUATION
from run.checkpoints import checkpoints, create, lock
from run.config import AT_LEAST_MIN_ROWS, DEFAULTS, SLOTS_HELP, Machine
from run.log import shown
from run.processes import Ranks, keep_freed_memory, leave, refuse, set_up_output

MAX_NEW_TOKENS = DEFAULTS["max_new_tokens"][-1]  # fits the shipped model


@dataclass(frozen=True)
class Evaluation(Machine):
    """The flags of eval.py, beside data.Prompting."""

    title = "evaluation"

    model: str = flag(
        "checkpoint folder, hub name[@revision], or training run: its newest checkpoint, sampled "
        "as in the run unless a flag says otherwise",
        str(TINY),
    )
    data: list[str] = flag(
        "files of problems, data sets of the hub, or names of benchmarks (data.py); with [:512] "
        "behind it, the first 512 rows",
        [str(SHIPPED / "heldout.jsonl")],
    )
    columns: list[str] = flag("of --data: problem=NAME answer=NAME, and pass_rate, level or id", [])
    samples: int = flag("completions per problem", 16, rule=AT_LEAST_1)
    k: int = flag("k of pass@k; default 0: as many as --samples", 0, rule=AT_LEAST_0)
    max_new_tokens: int = flag(
        f"longest completion, tokens; default {MAX_NEW_TOKENS} for the shipped model; any other "
        "needs it given",
        0,
        rule=AT_LEAST_0,
    )
    temperature: float = flag("0 is greedy; 1 as in training", 1.0, rule=AT_LEAST_0)
    top_p: float = flag("nucleus; 1 is off, as in training", 1.0, rule=ABOVE_0)
    top_k: int = flag("likeliest tokens; 0 is off, as in training", 0, rule=AT_LEAST_0)
    seed: int = flag("of the random streams", 0, rule=AT_LEAST_0)
    quality: list[float] = flag("thresholds of levels", DEFAULTS["quality"])
    reward: str = flag("R_l: math, or path.py:function; 1 and more is right", MATH)
    slots: int | None = flag(
        f"completions decoded together, on each process; {SLOTS_HELP}",
        rule=AT_LEAST_MIN_ROWS,
        may_change=True,
    )
    out: Path | None = flag(
        "new, or of a stopped evaluation; default runs/eval-<date-time>-<process>", may_change=True
    )
    add_pass_rate: Path | None = flag(
        "file to write: the problems with their pass rates; default: none", may_change=True
    )
    compare: list[str] = flag("A B: test the difference of two results", [], may_change=True)


@dataclass(frozen=True)
class Flags(data.Prompting, Evaluation):
    """All flags of eval.py."""


# --------------------------------------------------------------------------------------- evaluate


def evaluate(ranks, solver, requests, sampling, slots):
    """Sample and score, spread over the processes.

    requests  see policy.attempt.evaluation_requests
    slots     completions that each process decodes together
    -> for each of them the rows of its samples: a line of completions.jsonl but for file and level
    """

    def work(share):
        done = solver.attempt(share, sampling, slots)
        return [rows_of(r.prompt.problem.id, attempts) for r, attempts in zip(share, done)]

    return ranks.share_out(requests, work)


def rows_of(name, attempts):
    """Raises Stop where no update can be given up for an R_l, or a logit, that is not finite.

    name  the id of their problem
    """
    rows = []
    for number, a in enumerate(attempts):
        if not all(map(math.isfinite, a.completion.logprobs)):
            raise Stop(f"problem {name!r}: the model's logits are not finite; try --dtype float32")
        if not math.isfinite(a.score.values.get("R_l", 0.0)):
            raise Stop(f"--reward returned, for problem {name!r}, {a.score.outcome}")
        rows.append(a.row(name, number) | {"answer": a.score.answer})
    return rows


def result_of(rows):
    """What became of one problem, from the rows of its samples: a line of results.jsonl."""
    right = [row["verdict"] == RIGHT for row in rows]
    values = by_name(row["values"] for row in rows if "values" in row)  # of one's own R_l
    answers = [row["answer"] for row in rows]
    spellings = [None if answer is None else canonical(answer) for answer in answers]
    result = {name: rows[0].get(name) for name in ("file", "problem_id", "level")} | {
        "n": len(rows),
        "right": sum(right),
        "length": np.mean([row["tokens"] for row in rows]),
        "cut_off": 1 - np.mean([row["stopped"] for row in rows]),
        "writes_steps": np.mean([writes_steps(row["text"]) for row in rows]),
        "verdicts": Counter(row["verdict"] for row in rows),
        "means": {name: np.mean(some) for name, some in values.items()},
    }
    if any(answers) or not values:  # an R_l of one's own may ask for no box
        result["majority"] = int(majority(spellings, right))
    return result


def measure(result, k):
    """{measure: value} of one problem, from its result"""
    n, right = result["n"], result["right"]
    values = {f"avg@{n}": right / n, f"pass@{k}": pass_at_k(n, right, k)}
    if "majority" in result:
        values[f"maj@{n}"] = result["majority"]
    values |= result["means"]
    return values | {name: result[name] for name in ("length", "cut_off", "writes_steps")}


# ---------------------------------------------------------------------------------------- compare


def compare(*paths):
    """Print and return how two evaluations of the same problems differ, problem by problem:
    {file, or file and level: {measure: its difference}}.

    paths  two --out folders.  Raises ValueError
    """
    pairs, (a, b) = defaultdict(list), map(read_results, paths)
    for name in sorted((a[0].keys() | b[0].keys()) - {"out", "slots"}):
        first, second = a[0].get(name), b[0].get(name)
        if first != second:
            print(f"{name} differs: A {first!r}, B {second!r}")
    for key, result in a[1].items():
        if key in b[1]:
            pairs[key[0]].append((result, b[1][key]))
            if result["level"]:
                pairs[f"{key[0]}, {result['level']}"].append((result, b[1][key]))
    if not pairs:
        raise ValueError(f"{paths[0]} and {paths[1]} have no problem in common")
    report = {}
    for name, some in pairs.items():
        print(f"\n{name}: {len(some)} problems in both, {len(a[1])} in A, {len(b[1])} in B")
        report[name] = {"problems": len(some)}
        k = min(result["n"] for pair in some for result in pair)
        x, y = (by_name(alike(measure(result, k)) for result in side) for side in zip(*some))
        for what in filter(y.get, x):
            numbers = report[name][what] = difference(x[what], y[what])
            cells = "  ".join(f"{part} {number:.3f}" for part, number in numbers.items())
            print(f"  {what:10}  {cells}")
    return report


def read_results(path):
    """An --out folder or its results.jsonl -> settings, {(its file, problem id): result}. Raises
    ValueError"""
    path = Path(path)
    path = path / "results.jsonl" if path.is_dir() else path
    first, *rows = read_records(path)
    with explained(f"{path}: not what eval.py writes"):
        for row in rows:
            measure(row, 1)
        return dict(first["settings"]), {(stem(r["file"]), r["problem_id"]): r for r in rows}


def alike(measures):
    """Measures under names that do not tell the number of samples, which may differ."""
    names = {"avg": "accuracy", "maj": "majority"}
    return {names.get(name.partition("@")[0], name): x for name, x in measures.items()}


# ----------------------------------------------------------------------------------- command line


def parse_flags(arguments):
    """Return the Flags of the command line. A training run sets those that are not given. Raises
    ValueError."""
    description = "EPRLI: accuracy with intervals, difficulty of problems, comparison of results"
    parser = make_parser(description, Evaluation, data.Prompting)
    given = vars(parser.parse_args(arguments))
    flags = Flags(**given)
    if (Path(flags.model) / "checkpoints").is_dir():
        run = flags_of(flags.model)
        flags = Flags(**run | given | {"model": run["model"]})
    return replace(
        flags,
        k=flags.k or flags.samples,
        dtype=flags.dtype or default_dtype(flags.model, flags.device),
        max_new_tokens=flags.max_new_tokens or MAX_NEW_TOKENS * is_shipped(flags.model),
    )


def flags_of(run):
    """{flag: value} with which a training run samples, and its newest checkpoint.
    Raises ValueError"""
    with explained(f"--model {run}: not a training run with a checkpoint"):
        config = json.loads((Path(run) / "config.json").read_text())
        names = "temperature", "dtype", *(f.name for f in fields(data.Prompting))
        flags = {name: config[name] for name in names}
        flags["max_new_tokens"] = max(config["max_new_tokens"])
        if len(set(config["reward"])) == 1:
            flags["reward"] = config["reward"][0]
        return flags | {"model": str(checkpoints(run)[0])}


def load_inputs(args, device):
    """-> Policy, {file: prompts}.  Raises ValueError or OSError"""
    check_rules(args)
    if args.k > args.samples or args.top_p > 1:
        raise ValueError("--k must be at most --samples, and --top-p at most 1")
    if not args.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens: our default fits the shipped model alone; for {args.model} give it"
        )
    load_reward(args.reward)
    names, rates = stems("--data", args.data), args.add_pass_rate
    if rates and (len(names) > 1 or rates.exists() or not rates.parent.is_dir()):
        raise ValueError(f"--add-pass-rate {rates}: needs one file of --data and a new path")
    files, graded = {}, args.reward == MATH
    for path in args.data:
        files[path] = data.read_problems(path, args.columns, must_fit=True, graded=graded)
        if graded:
            data.only_gradable(path, files[path])  # says which; they stay
        for p in files[path] if rates else ():
            with explained(f"{path}, {p.id!r}: --add-pass-rate cannot write it as JSON"):
                json.dumps(p.record())
    policy = Policy.load(args.model, args.dtype, device, args)
    for path, problems in files.items():
        files[path] = policy.render(problems)
        policy.show(path, files[path], args.max_new_tokens)
    return policy, files


def open_folder(args, policy, files, fitting):
    """Make --out with all that its completions depend on, or go on with one that has the same.

    fitting  slots that fit now
    -> its path, the slots to use: those that it began with, unless others are given
    Raises ValueError
    """
    settings = {f.name: getattr(args, f.name) for f in fields(args) if not f.metadata["may_change"]}
    settings["purpose"] = purpose(args)
    settings["reward_identity"] = identity(args.reward)
    settings["weights"] = weights_digest(policy.folder)
    settings["prompts"] = digest((list(files.values()), policy.stop_ids))
    out, slots = args.out, args.slots or fitting
    if not (out and out.exists()):
        return create(out, settings | {"slots": slots}, "eval-"), slots
    with explained(f"--out {out}: exists already, and is no evaluation to go on with"):
        began_with = json.loads((out / "config.json").read_text())
        differ = [name for name in settings if began_with[name] != settings[name]]
        before = began_with["slots"]
    if differ:
        raise ValueError(
            f"--out {out}: its evaluation began with other settings ({', '.join(differ)}); "
            "name a new folder, or go on with the same ones"
        )
    if args.slots not in (None, before):
        print(f"--slots {args.slots}: not {before} as before, so the last bits may differ")
    return out, args.slots or before


def purpose(args):
    """What measures difficulty is sampled from other streams of random numbers."""
    return DIFFICULTY if args.add_pass_rate else EVALUATION


def finished(log, samples):
    """How many problems stand in completions.jsonl. What a kill left half written is cut off."""
    with open(log, "a+b") as file:
        file.seek(0)
        # Where whole lines end, in bytes
        ends = [0, *accumulate(len(line) for line in file if line.endswith(b"\n"))]
        whole = (len(ends) - 1) // samples
        file.truncate(ends[whole * samples])
    return whole


def sample_rest(args, policy, files, log, ranks, slots):
    """Sample and grade the problems that completions.jsonl lacks, and append them block by block.

    Each process takes a share of a block; the first one writes, in the order of problems.
    """
    solver = Solver(policy, Scorer(args.reward_timeout), show_progress=ranks.first)
    reward = load_reward(args.reward)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    work, labels = [], []
    for path, prompts in files.items():
        work += evaluation_requests(
            policy, prompts, args.samples, args.max_new_tokens, args.seed, reward, purpose(args)
        )
        levels = data.level_names([p.problem for p in prompts], args.quality)
        labels += [{"file": path, "level": levels.get(p.problem.id)} for p in prompts]
    done = ranks.from_first(lambda: finished(log, args.samples))
    print(f"{log}: {done} problems are done, {len(work) - done} are left")
    size = max(1, 2 * slots // args.samples) * ranks.size  # problems between two writes
    for start in tqdm(range(done, len(work), size), disable=not ranks.first):
        block = slice(start, start + size)
        scored = evaluate(ranks, solver, work[block], sampling, slots)
        rows = [label | row for label, some in zip(labels[block], scored) for row in some]
        ranks.from_first(lambda rows=rows: write_records(log, rows, "a"))
    solver.scorer.close()


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


def write_results(args, files, out, settings):
    """Write results.jsonl and summary.json, print tables -> what summary.json holds

    settings  see open_folder
    """
    with open(out / "completions.jsonl", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        results = [result_of(some) for some in iter(lambda: list(islice(rows, args.samples)), [])]
    write_records(out / "results.jsonl", [{"settings": settings}, *results])
    verdicts = sum((result["verdicts"] for result in results), Counter())
    summary = settings | {"files": {}, "verdicts": verdicts}
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
            names = ("weights", "temperature", "max_new_tokens", "samples")
            measured = {name: settings[name] for name in names} | {
                "model": Path(args.model).name,
            }
            add_pass_rates(args.add_pass_rate, prompts, some, measured)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main(arguments=None):
    keep_freed_memory()
    set_up_output()
    try:
        args = parse_flags(arguments)
        if args.compare:
            return print(json.dumps(compare(*args.compare)))
        ranks = Ranks(args.device)
        policy, files = ranks.on_all(lambda: load_inputs(args, ranks.device))
        longest = max(len(p.tokens) for prompts in files.values() for p in prompts)
        fitting = min(ranks.gather(slots_that_fit(policy.model, longest + args.max_new_tokens)))
        out, slots = ranks.from_first(lambda: open_folder(args, policy, files, fitting))
        locked = ranks.on_all(lambda: ranks.first and lock(out / "config.json"))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        refuse(error)
    try:
        sample_rest(args, policy, files, out / "completions.jsonl", ranks, slots)
        if ranks.first:
            print(json.dumps(write_results(args, files, out, json.load(locked))))
    except (Stop, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 1
        refuse(f"{str(stop) or 'interrupted'}; the same flags with --out {out} go on", code)


if __name__ == "__main__":
    leave(main)
