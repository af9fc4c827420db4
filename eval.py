"""Sample completions of problems, score them, and print accuracies with their intervals.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K     accuracies with intervals
    python eval.py --model M --data F.jsonl --add-pass-rate G.jsonl       measures difficulty
    python eval.py @recipes/eval-deepscaler.args --model M --data aime24  as a paper evaluates
    python eval.py --model RUN --data F.jsonl              as a training run samples
    python eval.py --compare A B                           tests the difference of two --out folders

`torchrun --nproc_per_node=N eval.py ...` shares the work between N processes. To resume an
evaluation that was stopped, give the same flags with its folder as --out. Its completions.jsonl is
all the state that it has.

A completion becomes a row of completions.jsonl (`rows_of`), the rows of a problem become its result
(`result_of`), a result becomes measures, and `summarise` averages measures over problems. train.py
evaluates held-out problems by the same functions.
"""

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from itertools import islice
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
    """Sample completions of every problem and score them, spread over the processes.

    requests  see policy.attempt.evaluation_requests
    slots     number of completions that each process decodes together

    Returns one list for each request, with a row for each sample: a line of completions.jsonl, but
    for `file` and `level`.
    """

    def work(share):
        done = solver.attempt(share, sampling, slots)
        return [rows_of(r.prompt.problem.id, attempts) for r, attempts in zip(share, done)]

    return ranks.share_out(requests, work)


def rows_of(name, attempts):
    """Return one row for each attempt at the problem with this id.

    Raises Stop if a logit or an R_l is not finite: unlike training, an evaluation has no update
    that it could skip.
    """
    rows = []
    for number, a in enumerate(attempts):
        if not math.isfinite(sum(a.completion.logprobs)):
            raise Stop(f"problem {name!r}: the model's logits are not finite; try --dtype float32")
        if not math.isfinite(a.score.values.get("R_l", 0.0)):
            raise Stop(f"--reward returned, for problem {name!r}, {a.score.outcome}")
        rows.append(a.row(name, number) | {"answer": a.score.answer})
    return rows


def result_of(rows):
    """Return the result of one problem, a line of results.jsonl, from the rows of its samples."""
    columns = by_name(rows)
    right = [verdict == RIGHT for verdict in columns["verdict"]]
    values = by_name(columns.get("values", []))  # of one's own R_l
    result = {name: rows[0].get(name) for name in ("file", "problem_id", "level")} | {
        "n": len(rows),
        "right": sum(right),
        "length": np.mean(columns["tokens"]),
        "cut_off": 1 - np.mean(columns["stopped"]),
        "writes_steps": np.mean([writes_steps(text) for text in columns["text"]]),
        "verdicts": Counter(columns["verdict"]),
        "means": {name: np.mean(numbers) for name, numbers in values.items()},
    }
    if any(columns["answer"]) or not values:  # an R_l of one's own may ask for no box
        spellings = [None if answer is None else canonical(answer) for answer in columns["answer"]]
        result["majority"] = int(majority(spellings, right))
    return result


def measure(result, k):
    """Return {measure: its value} for one problem, from its result."""
    n, right = result["n"], result["right"]
    values = {"accuracy": right / n, f"pass@{k}": pass_at_k(n, right, k)}
    if "majority" in result:
        values["majority"] = result["majority"]
    values |= result["means"]
    return values | {name: result[name] for name in ("length", "cut_off", "writes_steps")}


def summarise(results, k):
    """Return {measure: (mean, low, high)} over problems, from their results."""
    values = by_name(measure(result, k) for result in results)
    return {name: interval(numbers) for name, numbers in values.items()}


# ----------------------------------------------------------------------------------- command line


def parse_flags(arguments):
    """Return the Flags of the command line. If --model is a training run, flags that are not given
    have its values. Raises ValueError."""
    description = "EPRLI: accuracy with intervals, difficulty of problems, comparison of results"
    parser = make_parser(description, Evaluation, data.Prompting)
    given = vars(parser.parse_args(arguments))
    run = Path(given.get("model", TINY))
    if (run / "checkpoints").is_dir():
        given = add_flags_of(run, given)
    flags = Flags(**given)
    return replace(
        flags,
        k=flags.k or flags.samples,
        dtype=flags.dtype or default_dtype(flags.model, flags.device),
        max_new_tokens=flags.max_new_tokens or MAX_NEW_TOKENS * is_shipped(flags.model),
    )


def add_flags_of(run, given):
    """Return the given flags, and for the others how a training run samples; `model` becomes its
    newest checkpoint. Raises ValueError."""
    with explained(f"--model {run}: not a training run with a checkpoint"):
        config = json.loads((run / "config.json").read_text())
        names = "temperature", "dtype", *(f.name for f in fields(data.Prompting))
        flags = {name: config[name] for name in names}
        flags["max_new_tokens"] = max(config["max_new_tokens"])
        if len(set(config["reward"])) == 1:
            flags["reward"] = config["reward"][0]
        return flags | given | {"model": str(checkpoints(run)[0])}


def load_inputs(args, device):
    """Return the Policy and {file: its prompts}. Raises ValueError or OSError."""
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
            data.only_gradable(path, files[path])  # prints which are not; they stay
        for p in files[path] if rates else ():
            with explained(f"{path}, {p.id!r}: --add-pass-rate cannot write it as JSON"):
                json.dumps(p.record())
    policy = Policy.load(args.model, args.dtype, device, args)
    for path, problems in files.items():
        files[path] = policy.render(problems)
        policy.show(path, files[path], args.max_new_tokens)
    return policy, files


def open_folder(args, policy, files, fitting):
    """Create --out, where config.json holds all that its completions depend on, or resume an
    evaluation whose completions depend on the same.

    fitting  number of slots that fit now, for an evaluation that starts without --slots

    Returns the path of the folder. Raises ValueError.
    """
    settings = {f.name: getattr(args, f.name) for f in fields(args) if not f.metadata["may_change"]}
    settings |= {
        "purpose": DIFFICULTY if args.add_pass_rate else EVALUATION,  # see evaluation_requests
        "reward_identity": identity(args.reward),
        "weights": weights_digest(policy.folder),
        "prompts": digest((list(files.values()), policy.stop_ids)),
    }
    out = args.out
    if not (out and out.exists()):
        return create(out, settings | {"slots": args.slots or fitting}, "eval-")
    with explained(f"--out {out}: exists already, and is no evaluation to go on with"):
        began_with = json.loads((out / "config.json").read_text())
        differ = [name for name in settings if began_with[name] != settings[name]]
        slots = began_with["slots"]
    if differ:
        raise ValueError(
            f"--out {out}: its evaluation began with other settings ({', '.join(differ)}); "
            "name a new folder, or go on with the same ones"
        )
    if args.slots not in (None, slots):
        print(f"--slots {args.slots}: not {slots} as before, so the last bits may differ")
    return out


def read_completions(log, samples):
    """Return the results of the problems in completions.jsonl.

    A problem that a killed process has written only in part is removed from the file.
    """
    results, end = [], 0
    with open(log, "a+b") as file:
        file.seek(0)
        while True:
            lines = list(islice(file, samples))
            if len(lines) < samples or not lines[-1].endswith(b"\n"):
                break
            results.append(result_of([json.loads(line) for line in lines]))
            end = file.tell()
        file.truncate(end)
    return results


def sample_rest(args, settings, policy, files, log, ranks):
    """Sample and score the problems that completions.jsonl lacks, and append them block by block.

    settings  what config.json holds

    Each process works on its share of a block. The first one writes, in the order of problems.
    """
    solver = Solver(policy, Scorer(args.reward_timeout), show_progress=ranks.first)
    reward = load_reward(args.reward)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    slots = args.slots or settings["slots"]
    work, labels = [], []
    for path, prompts in files.items():
        work += evaluation_requests(
            policy,
            prompts,
            args.samples,
            args.max_new_tokens,
            args.seed,
            reward,
            settings["purpose"],
        )
        levels = data.level_names([p.problem for p in prompts], args.quality)
        labels += [{"file": path, "level": levels.get(p.problem.id)} for p in prompts]
    done = ranks.from_first(lambda: len(read_completions(log, args.samples)))
    print(f"{log}: {done} problems are done, {len(work) - done} are left")
    size = max(1, 2 * slots // args.samples) * ranks.size  # problems between two writes
    for start in tqdm(range(done, len(work), size), disable=not ranks.first):
        block = slice(start, start + size)
        scored = evaluate(ranks, solver, work[block], sampling, slots)
        rows = [label | row for label, some in zip(labels[block], scored) for row in some]
        ranks.from_first(lambda rows=rows: write_records(log, rows, "a"))
    solver.scorer.close()


def write_results(args, settings, files, out):
    """Write results.jsonl, summary.json and the file of --add-pass-rate, and print the tables.

    settings  what config.json holds

    Returns what summary.json holds.
    """
    results = read_completions(out / "completions.jsonl", args.samples)
    write_records(out / "results.jsonl", [{"settings": settings}, *results])
    verdicts = sum((result["verdicts"] for result in results), Counter())
    summary = settings | {"files": {}, "verdicts": verdicts}
    for path, prompts in files.items():
        of_file = [result for result in results if result["file"] == path]
        print(
            f"\n{path}: temperature {args.temperature:g}, top-p {args.top_p:g}, at most "
            f"{args.max_new_tokens} tokens a completion"
        )
        if any(p.problem.pass_rate is not None for p in prompts):
            print(f"levels by difficulty, up to --quality {' '.join(map(str, args.quality))}")
        summary["files"][path] = print_levels(of_file, args.k)
        if args.add_pass_rate:  # of the only file
            names = "weights", "temperature", "max_new_tokens", "samples"
            measured = {name: settings[name] for name in names} | {"model": Path(args.model).name}
            add_pass_rates(args.add_pass_rate, prompts, of_file, measured)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def print_levels(results, k):
    """Print and return {level, or "all": {measure: (mean, low, high)}} for the results of a
    file."""
    n = results[0]["n"]
    print(f"{n} samples a problem, 95 % intervals over problems")
    names = {"accuracy": f"avg@{n}", "majority": f"maj@{n}"}
    levels = {result["level"] for result in results} - {None}
    table = {}
    for level in [*sorted(levels, key=lambda name: float(name.split()[1])), "all"]:
        chosen = [result for result in results if level in (result["level"], "all")]
        summary = summarise(chosen, k)
        table[level] = {names.get(name, name): values for name, values in summary.items()}
        cells = [f"{name} {shown(name, values)}" for name, values in table[level].items()]
        print(f"  {level:10} {len(chosen):5} problems   {'   '.join(cells)}")
    return table


def add_pass_rates(path, prompts, results, measured):
    """Write the problems with the share of their samples that is right as their pass rates.

    measured  how: goes into the record of each problem
    """
    problems = []
    for prompt, result in zip(prompts, results):
        late, other = result["verdicts"][LATE], prompt.problem.other | {"measured": measured}
        rate = None if late else result["right"] / result["n"]
        if late:
            print(f"{result['problem_id']!r}: not measured, {late} of its rewards came too late")
        problems.append(replace(prompt.problem, pass_rate=rate, other=other))
    data.write_problems(path, problems)


# ---------------------------------------------------------------------------------------- compare


def compare(paths):
    """Print and return how two evaluations differ on the problems that both have.

    paths  A and B: --out folders, or files of results

    Returns {file, or "file, level": {"problems": how many, measure: its difference}}. Raises
    ValueError.
    """
    (settings_a, a), (settings_b, b) = map(read_results, paths)
    for name in sorted((settings_a.keys() | settings_b.keys()) - {"out", "slots"}):
        first, second = settings_a.get(name), settings_b.get(name)
        if first != second:
            print(f"{name} differs: A {first!r}, B {second!r}")
    report = {}
    for name, keys in pair(a, b).items():
        measures = differences(a, b, keys)
        print(f"\n{name}: {len(keys)} problems in both, {len(a)} in A, {len(b)} in B")
        for what, numbers in measures.items():
            cells = [f"{part} {number:.3f}" for part, number in numbers.items()]
            print(f"  {what:10}  {'  '.join(cells)}")
        report[name] = {"problems": len(keys)} | measures
    if not report:
        raise ValueError(f"{paths[0]} and {paths[1]} have no problem in common")
    return report


def read_results(path):
    """Read an --out folder or its results.jsonl.

    Returns its settings, and {(stem of the file, problem id): result}. Raises ValueError.
    """
    path = Path(path)
    path = path / "results.jsonl" if path.is_dir() else path
    first, *rows = read_records(path)
    with explained(f"{path}: not what eval.py writes"):
        for row in rows:
            measure(row, 1)
        return dict(first["settings"]), {(stem(r["file"]), r["problem_id"]): r for r in rows}


def pair(a, b):
    """Return {file, or "file, level": keys of the problems that both have}. The levels are A's.

    a, b  {(file, problem id): result}
    """
    groups = defaultdict(list)
    for key, result in a.items():
        if key in b:
            file, _ = key
            groups[file].append(key)
            if result["level"]:
                groups[f"{file}, {result['level']}"].append(key)
    return groups


def differences(a, b, keys):
    """Return {measure: its difference}, over these problems, for the measures that both have."""
    k = min(results[key]["n"] for results in (a, b) for key in keys)
    first = by_name(measure(a[key], k) for key in keys)
    second = by_name(measure(b[key], k) for key in keys)
    return {name: difference(first[name], second[name]) for name in first if name in second}


# ------------------------------------------------------------------------------------------- main


def main(arguments=None):
    keep_freed_memory()
    set_up_output()
    try:
        args = parse_flags(arguments)
        if args.compare:
            return print(json.dumps(compare(args.compare)))
        ranks = Ranks(args.device)
        policy, files = ranks.on_all(lambda: load_inputs(args, ranks.device))
        longest = max(len(p.tokens) for prompts in files.values() for p in prompts)
        fitting = min(ranks.gather(slots_that_fit(policy.model, longest + args.max_new_tokens)))
        out = ranks.from_first(lambda: open_folder(args, policy, files, fitting))
        locked = ranks.on_all(lambda: ranks.first and lock(out / "config.json"))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        refuse(error)
    try:
        settings = ranks.from_first(lambda: json.load(locked))
        sample_rest(args, settings, policy, files, out / "completions.jsonl", ranks)
        if ranks.first:
            print(json.dumps(write_results(args, settings, files, out)))
    except (Stop, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 1
        refuse(f"{str(stop) or 'interrupted'}; the same flags with --out {out} go on", code)


if __name__ == "__main__":
    leave(main)
