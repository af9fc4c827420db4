"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K         accuracies with 95 % intervals
    python eval.py --model M --data F.jsonl --samples K --add-pass-rate G.jsonl   measures difficulty
    python eval.py --model M --protocol deepscaler --data aime24 math500 ...      benchmarks, as the papers quote them
    python eval.py --compare A B                                                  tests the difference of two --out folders

`attempt` is what training, evaluation and difficulty share: the same template, sampler and grader.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoTokenizer

import data
from model import Transformer
from rewards import RIGHT, Grader, canonical, writes_steps
from rollout import Completion, sample, stream

SHIPPED = (
    Path(__file__).parent / "assets"
)  # the embedded default: a tiny checkpoint, its problems with pass rates
MAX_NEW_TOKENS, SLOTS = (
    96,
    256,
)  # defaults, fit for the shipped model: longest completion, completions decoded together
TRAINING, DIFFICULTY, EVALUATION = 1, 2, 3  # purposes of random streams: see rollout.stream

DEFAULTS = {
    "samples": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": MAX_NEW_TOKENS,
    "suffix": data.SUFFIX,
}
PROTOCOLS = {  # what --protocol puts in their place: the evaluation scripts of these repositories
    "deepscaler": {
        "samples": 16,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 32768,
        "suffix": f" {data.INSTRUCTION}",
    },
    "fastcurl": {
        "samples": 16,
        "temperature": 0.6,
        "top_p": 1.0,
        "max_new_tokens": 32768,
        "suffix": f" {data.INSTRUCTION}",
    },
}
SETTINGS = ["model", "protocol", "samples", "k", "temperature", "top_k", "top_p", "max_new_tokens", "suffix", "examples", "allow_last_number", "dtype", "seed"]  # of a result
COLUMNS = (
    "aime24",
    "math500",
    "amc22_23",
    "minerva",
    "olympiadbench",
)  # of the papers' table; AMC is the version of 83 problems
PUBLISHED = {  # model (protocol): per cent, in the order of COLUMNS, then their mean as it was published
    "R1-Distill-Qwen-1.5B (deepscaler)": (28.8, 82.8, 62.9, 26.5, 43.3, 48.9),
    "Still-1.5B (deepscaler)": (32.5, 84.4, 66.7, 29.0, 45.4, 51.6),
    "DeepScaleR-1.5B (deepscaler)": (43.1, 87.8, 73.6, 30.2, 50.0, 57.0),
    "FastCuRL-1.5B-Preview (fastcurl)": (43.1, 88.0, 74.2, 31.6, 50.4, 57.5),
    "FastCuRL-1.5B-V2 (fastcurl)": (47.5, 89.3, 77.0, 32.8, 53.3, 60.0),
    "FastCuRL-1.5B-V3 (fastcurl)": (49.6, 90.5, 78.5, 34.7, 54.5, 61.6),
    "EPRLI (unstated, k = 1 by its digits)": (50.0, 89.2, 77.1, 35.3, 51.9, 60.7),
}


@dataclass(frozen=True)
class Policy:
    """A model with what turns problems into its tokens and its tokens into text."""

    model: Transformer
    tokenizer: object
    stop_ids: tuple
    folder: Path  # where it was read
    examples: tuple  # worked examples in front of every problem
    suffix: str = data.SUFFIX  # behind every problem

    @classmethod
    def load(cls, name, dtype="float32", device="cpu", examples_file=None, suffix=data.SUFFIX):
        """From a checkpoint folder or a hub name. Raises ValueError saying what is wrong with it."""
        path = Path(name)
        if not path.is_dir():
            try:
                path = Path(
                    snapshot_download(
                        name,
                        allow_patterns=["*.json", "*.jinja", "tokenizer*"]
                        + ["*.safetensors"] * (device != "meta"),
                    )
                )
            except (ValueError, OSError) as error:  # the hub's errors are of these kinds
                reason = (str(error) or repr(error)).splitlines()[0]
                raise ValueError(
                    f"model {name!r} is neither a folder nor to be had from the hub ({reason})"
                ) from error
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
        examples = data.read_records(examples_file, data.parse_example) if examples_file else ()
        model = Transformer.from_pretrained(path, getattr(torch, dtype), device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (
            Exception
        ) as error:  # tokenizers raises bare Exception for a broken file, transformers many others
            raise ValueError(f"{path}: its tokenizer cannot be loaded ({error})") from error
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{path}: its tokenizer has no chat template, which turns a problem into a prompt"
            )
        stop_ids = {tokenizer.eos_token_id, *as_list(model.config.eos_token_id)} - {None}
        generation = path / "generation_config.json"
        if generation.is_file():
            try:
                stop_ids |= set(as_list(json.loads(generation.read_text()).get("eos_token_id")))
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{generation}: not a JSON object ({error})") from error
        if not stop_ids:
            raise ValueError(
                f"{path}: neither tokenizer nor config names a stop token (eos_token_id)"
            )
        for i in stop_ids:
            if type(i) is not int or not 0 <= i < model.config.vocab_size:
                raise ValueError(
                    f"{path}: the stop token {i!r} is not in the model's vocabulary of {model.config.vocab_size} (eos_token_id in "
                    "config.json, generation_config.json or the tokenizer), so no completion would stop"
                )
        return cls(model, tokenizer, tuple(sorted(stop_ids)), path, tuple(examples), suffix)

    def render(self, problems):
        """[Problem, ...] -> [Prompt, ...]"""
        try:
            prompts = [data.render(self.tokenizer, p, self.examples, self.suffix) for p in problems]
        except Exception as error:  # a template is a program of its own
            raise ValueError(
                f"the tokenizer's chat template fails ({type(error).__name__}: {error})"
            ) from error
        for prompt in prompts:
            if not prompt.tokens:
                raise ValueError(
                    f"problem {prompt.problem.id}: the tokenizer's chat template makes an empty prompt of it"
                )
            if max(prompt.tokens) >= self.model.config.vocab_size:
                raise ValueError(
                    f"problem {prompt.problem.id}: its token {max(prompt.tokens)} is not in the model's vocabulary of "
                    f"{self.model.config.vocab_size}: model and tokenizer do not belong together"
                )
        return prompts

    def room(self, prompt):
        """Tokens that the context leaves for a completion; 0: the prompt is too long."""
        return max(0, self.model.context - len(prompt.tokens))

    def text(self, completion):
        tokens = completion.tokens[: len(completion.tokens) - completion.stopped]
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def as_list(ids):
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


@dataclass(frozen=True)
class Attempt:
    """One completion of a problem, scored."""

    completion: Completion
    text: str
    answer: str | None  # what stands in its box
    verdict: str  # rewards.RIGHT, ...

    @property
    def right(self):
        return self.verdict == RIGHT

    @property
    def length(self):
        return len(self.completion.tokens)


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int
    temperature: float
    slots: int
    top_k: int = 0
    top_p: float = 1.0


def attempt(policy, grader, prompts, keys, sampling, *, show_progress=False, clock=None):
    """Complete prompts[i] once per key in keys[i], and grade: one list of Attempt per prompt.

    A completion has at most max_new_tokens, less if the context ends before; a prompt that fills the context gets
    empty ones. clock: a Counter to which `sample` and `grade` seconds are added.
    """
    max_new_tokens, temperature, slots = sampling.max_new_tokens, sampling.temperature, sampling.slots
    top_k, top_p, progress = sampling.top_k, sampling.top_p, show_progress
    clock, start = Counter() if clock is None else clock, time.perf_counter()
    limits = [min(max_new_tokens, policy.room(p)) for p in prompts]
    streams = [k if limit else [] for k, limit in zip(keys, limits)]
    with tqdm(desc="sampling", unit=" tokens", leave=False, disable=not progress, delay=2) as bar:
        done = sample(
            policy.model,
            [p.tokens for p in prompts],
            streams,
            limits,
            slots=slots,
            stop_ids=policy.stop_ids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            on_finished=bar.update,
        )
    done = [c or [Completion([], [], False)] * len(k) for c, k in zip(done, keys)]
    sampled = time.perf_counter()
    texts = [[policy.text(c) for c in cs] for cs in done]
    answers = [[grader.extract(p.opening + t) for t in ts] for p, ts in zip(prompts, texts)]
    verdicts = iter(
        grader.compare([(p.problem.answer, a) for p, many in zip(prompts, answers) for a in many])
    )
    clock.update(sample=sampled - start, grade=time.perf_counter() - sampled)
    return [
        [Attempt(c, t, a, next(verdicts)) for c, t, a in zip(*group)]
        for group in zip(done, texts, answers)
    ]


def evaluation_keys(seed, prompts, samples, purpose=EVALUATION):
    """Streams that neither training nor the measurement of difficulty uses: samples that chose the hard problems would
    show a gain on them by chance alone. The same at every evaluation, which makes differences sharper."""
    return [[stream(seed, purpose, i, k) for k in range(samples)] for i in range(len(prompts))]


# ---------------------------------------------------------------------------------------------------------- numbers


def pass_at_k(n, c, k):
    """Unbiased P(at least one of k is right) from c right among n >= k samples (Chen et al. 2021)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} needs at least {k} samples and 0 <= right <= samples, found {c} right of {n}"
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers, right):
    """Whether the most frequent answer is right. Answers vote together if their canonical spelling is one; ties go to the
    answer that was sampled first; None, no answer, casts no vote, and without any vote the majority is wrong."""
    votes, verdict = Counter(), {}
    for answer, is_right in zip(answers, right):
        if answer is not None:
            votes[canonical(answer)] += (
                1  # Counter keeps the order of first votes, and most_common is stable
            )
            verdict.setdefault(canonical(answer), is_right)
    return verdict[votes.most_common(1)[0][0]] if votes else False


def wilson(successes, n):
    """95 % interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # rounding must not leave p outside


def interval(values):
    """Mean of one value per problem and its 95 % interval over problems: Wilson's for 0/1 values, else a bootstrap.

    A problem's samples are averaged first, so the bootstrap is clustered: samples of one problem are not independent. It
    knows no values but those that were seen; shares reach at least as high as if all were 0, as low as if all were 1.
    """
    values = np.asarray(values, float)
    if not len(values):
        return math.nan, math.nan, math.nan
    if np.isin(values, (0, 1)).all():
        return values.mean(), *wilson(values.sum(), len(values))
    low, high = bootstrap(values)
    if values.min() >= 0 and values.max() <= 1:
        low, high = (
            min(low, wilson(len(values), len(values))[0]),
            max(high, wilson(0, len(values))[1]),
        )
    return values.mean(), low, high


def bootstrap(values, times=2000):
    """95 % interval of the mean over resamples of the values, one per problem."""
    rng = np.random.default_rng(0)
    return np.quantile(
        [rng.choice(values, len(values)).mean() for _ in range(times)], (0.025, 0.975)
    )


def mean_of(intervals):
    """Mean of independent means and its interval: the distances to their ends add up as standard errors do (Zou & Donner 2008)."""
    means, low, high = np.array(intervals).T
    return means.mean(), *(
        means.mean() + sign * np.linalg.norm(end - means) / len(means)
        for sign, end in ((-1, low), (1, high))
    )


def shown(measure, signed=False):
    """(m, low, high) as per cent."""
    return ("{:+.1f} % [{:+.1f}, {:+.1f}]" if signed else "{:.1f} % [{:.1f}, {:.1f}]").format(
        *(100 * x for x in measure)
    )


def paired_test(difference, times=10_000):
    """Mean of one difference per problem, its bootstrap interval, and p of a two-sided sign-flip permutation test."""
    difference, rng = np.asarray(difference, float), np.random.default_rng(0)
    observed = abs(difference.mean())
    flipped = (
        abs((rng.choice((-1.0, 1.0), len(difference)) * difference).mean()) for _ in range(times)
    )
    p = (1 + sum(value >= observed - 1e-12 for value in flipped)) / (times + 1)
    return difference.mean(), *bootstrap(difference), p


def summarise(attempts, k):
    """{measure: (mean, low, high)} over problems."""
    right = [[a.right for a in group] for group in attempts]
    n = len(right[0])
    return {
        f"avg@{n}": interval([np.mean(r) for r in right]),
        f"pass@{k}": interval([pass_at_k(n, sum(r), k) for r in right]),
        f"maj@{n}": interval(
            [majority([a.answer for a in group], r) for group, r in zip(attempts, right)]
        ),
        "length": interval([np.mean([a.length for a in group]) for group in attempts]),
        "cut_off": interval(
            [np.mean([not a.completion.stopped for a in group]) for group in attempts]
        ),
        "writes_steps": interval(
            [np.mean([writes_steps(a.text) for a in group]) for group in attempts]
        ),
    }


def papers_table(name, rates):
    """The papers' table, in per cent, with the published rows beside ours.  rates: {benchmark: right share per problem}"""
    columns = [c for c in data.BENCHMARKS if c in rates or c in COLUMNS]
    ours = {c: interval(rates[c]) for c in rates}
    average = shown(mean_of([ours[c] for c in COLUMNS])) if set(COLUMNS) <= set(rates) else "-"
    rows = [
        ("", *(data.BENCHMARKS[c][0] for c in columns), "mean of the five"),
        (name, *(shown(ours[c]) if c in ours else "-" for c in columns), average),
    ]
    for model, values in PUBLISHED.items():
        published = dict(zip(COLUMNS, values))
        rows.append((model, *(str(published.get(c, "-")) for c in columns), str(values[-1])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


# ------------------------------------------------------------------------------------------------------ comparison


def read_results(folder):
    """{(file, problem id): its rows of completions.jsonl, in the order of sampling}; files are known by their names."""
    path, results = Path(folder) / "completions.jsonl", {}

    def parse(row, _):
        lacking = {"file", "problem_id", "sample", "verdict", "answer", "level"} - set(
            row if isinstance(row, dict) else ()
        )
        if lacking:
            raise ValueError(f"not a row that eval.py writes (no {', '.join(sorted(lacking))})")
        if not isinstance(row["file"], str) or not isinstance(row["answer"], str | None):
            raise ValueError('"file" must be a text, and "answer" a text or null')
        return row

    for row in data.read_records(path, parse):
        results.setdefault((Path(row["file"]).stem, row["problem_id"]), []).append(row)
    return results


def compare(folders):
    """Print how two results differ, problem by problem, for every file and level, and return it as a dictionary.

    disagreement: the chance that a sample of A and one of B differ in being right, mean over problems
    """
    a, b = map(read_results, folders)
    pairs = [key for key in a if key in b]
    if not pairs:
        raise ValueError(f"{folders[0]} and {folders[1]} have no problem in common")
    if len(pairs) < len(a) or len(pairs) < len(b):
        print(
            f"only in A: {len(a) - len(pairs)} problems, only in B: {len(b) - len(pairs)}; both are left out"
        )
    summaries, rows = [Path(folder) / "summary.json" for folder in folders], {}
    if all(path.is_file() for path in summaries):
        one, other = (json.loads(path.read_text()) for path in summaries)
        for name in (name for name in SETTINGS if one.get(name) != other.get(name)):
            print(f"{name} differs: A {one.get(name)!r}, B {other.get(name)!r}")
    else:  # an evaluation was interrupted
        print("no summary.json beside both results: whether they were sampled alike is unknown")
    for key in pairs:
        level = a[key][0]["level"]
        for name in (key[0], f"{key[0]}, {level}") if level else (key[0],):
            rows.setdefault(name, []).append(key)
    report = {}
    for name, keys in rows.items():
        right = [
            [[row["verdict"] == RIGHT for row in side[key]] for key in keys] for side in (a, b)
        ]
        answers = [[[row["answer"] for row in side[key]] for key in keys] for side in (a, b)]
        k = min(len(r) for side in right for r in side)
        measures = {
            "accuracy": [[np.mean(r) for r in side] for side in right],
            f"pass@{k}": [[pass_at_k(len(r), sum(r), k) for r in side] for side in right],
            "majority": [[majority(*both) for both in zip(*side)] for side in zip(answers, right)],
        }
        report[name] = {"problems": len(keys)}
        print(f"\n{name}: {len(keys)} problems")
        for measure, (x, y) in measures.items():
            difference, low, high, p = paired_test(np.subtract(y, x, dtype=float))
            report[name][measure] = {
                "A": np.mean(x),
                "B": np.mean(y),
                "difference": difference,
                "low": low,
                "high": high,
                "p": float(p),
            }
            print(
                f"  {measure:9} A {np.mean(x):.1%}   B {np.mean(y):.1%}   B - A {shown((difference, low, high), signed=True)}, p = {p:.2g}"
            )
        p, q = map(np.array, measures["accuracy"])
        report[name]["disagreement"] = (p * (1 - q) + q * (1 - p)).mean()
        print(f"  disagreement {report[name]['disagreement']:.1%}")
    return report


# ------------------------------------------------------------------------------------------------------ difficulty


def print_difficulty(attempts):
    """A histogram of pass rates."""
    n = len(attempts[0])
    right = np.array([sum(a.right for a in group) for group in attempts])
    bins = np.minimum(right * 10 // n, 9) if n >= 10 else right
    print(
        f"\npass rate of {len(right)} problems, {n} samples each (95 % Wilson interval of the share)"
    )
    for b in range(10 if n >= 10 else n + 1):
        low, high = wilson((bins == b).sum(), len(bins))
        label = f"{b / 10:.1f} - {(b + 1) / 10:.1f}" if n >= 10 else f"{b}/{n}"
        print(
            f"  {label:>9}  {(bins == b).mean():6.1%} [{low:.1%}, {high:.1%}]  {'#' * round(60 * (bins == b).mean())}"
        )


# ------------------------------------------------------------------------------------------------------ command line


def parse_args(arguments):
    usage = "%(prog)s [--flag value ...]   (--help lists the flags)"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage=usage,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default=str(SHIPPED / "tiny"), help="checkpoint folder or hub name"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[str(SHIPPED / "heldout.jsonl")],
        help=f"JSONL files of problems, or benchmarks from the hub: {', '.join(data.BENCHMARKS)}",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="published defaults of the next four flags and of the prompt's suffix",
    )
    parser.add_argument("--samples", type=int, help="completions per problem")
    parser.add_argument("--k", type=int, help="k of pass@k; default: --samples")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion, tokens")
    parser.add_argument("--temperature", type=float, help="0 is greedy; 1 as in training")
    parser.add_argument("--top-p", type=float, help="nucleus; 1 is off, as in training")
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="likeliest tokens to choose from; 0 is off, as in training",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two --out folders: test their difference, sample nothing",
    )
    parser.add_argument("--out", help="folder to write; default runs/eval-<date-time>")
    parser.add_argument(
        "--add-pass-rate",
        metavar="FILE",
        help="write the problems of --data back with their pass rates",
    )
    parser.add_argument(
        "--quality",
        type=float,
        nargs="+",
        default=data.QUALITY,
        help="thresholds that cut the levels",
    )
    parser.add_argument(
        "--examples", help="JSONL of worked examples {problem, solution} to put in front"
    )
    parser.add_argument(
        "--allow-last-number", action="store_true", help="without a box, grade the last number"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=SLOTS,
        help="completions decoded together (memory and speed only)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    chosen = parser.parse_known_args(arguments)[0].protocol
    parser.set_defaults(**(PROTOCOLS[chosen] if chosen else DEFAULTS))
    args = parser.parse_args(arguments)
    args.k = args.samples if args.k is None else args.k
    for name in ("samples", "max_new_tokens", "slots"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}"
            )
    if not 1 <= args.k <= args.samples:
        parser.error(f"--k must be in 1..{args.samples} (--samples), found {args.k}")
    if (
        not 0 <= args.temperature < math.inf
        or args.top_k < 0
        or args.seed < 0
        or not 0 < args.top_p <= 1
    ):
        parser.error("--temperature, --top-k and --seed must be at least 0, and --top-p in (0, 1]")
    if args.add_pass_rate and len(args.data) > 1:
        parser.error("--add-pass-rate measures one file at a time")
    args.out = Path(args.out or f"runs/eval-{datetime.now():%Y%m%d-%H%M%S}")
    if args.compare:
        return parser, args
    names = [Path(path).stem for path in args.data]
    if len(set(names)) < len(names):
        parser.error(
            f"--data: results are known by the names of their files, and one stands twice: {', '.join(names)}"
        )
    for name, path in (
        ("--out", args.out),
        ("--add-pass-rate", Path(args.add_pass_rate or args.out)),
    ):
        if path.exists():
            parser.error(f"{name} {path}: exists already; name another")
    return parser, args


def split_by_level(problems, qualities):
    """{name: indices}: the levels that the file knows (measured first, else declared), then all."""
    rows = {}
    if any(p.pass_rate is not None for p in problems):
        index = {p.id: i for i, p in enumerate(problems)}
        for number, level in enumerate(data.cut_levels(problems, qualities, "pass_rate")[0], 1):
            rows[f"level {number}"] = [index[p.id] for p in level]
    else:
        for declared in sorted({p.level for p in problems if p.level is not None}):
            rows[f"level {declared:g}"] = [i for i, p in enumerate(problems) if p.level == declared]
    return {**rows, "all": list(range(len(problems)))}


def evaluate_file(args, policy, grader, path, prompts, levels, completions_file):
    """Sample and score one file, writing completions as they come: one list of Attempt per prompt."""
    purpose = DIFFICULTY if args.add_pass_rate else EVALUATION
    keys, attempts = evaluation_keys(args.seed, prompts, args.samples, purpose), []
    size = max(
        1, 8 * args.slots // args.samples
    )  # problems between two writes; each write drains the slots once
    for i in tqdm(
        range(0, len(prompts), size),
        desc=Path(path).name,
        unit="batch",
        disable=len(prompts) <= size,
    ):
        sampling = Sampling(args.max_new_tokens, args.temperature, args.slots, args.top_k, args.top_p)
        part = attempt(policy, grader, prompts[i : i + size], keys[i : i + size], sampling, show_progress=True)
        for number, group in enumerate(part, i):
            for k, a in enumerate(group):
                row = {
                    "file": str(path),
                    "problem_id": prompts[number].problem.id,
                    "level": levels.get(number),
                    "sample": k,
                    "verdict": a.verdict,
                    "answer": a.answer,
                    "tokens": a.length,
                    "stopped": a.completion.stopped,
                    "text": a.text,
                }
                completions_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        completions_file.flush()
        attempts += part
    return attempts


def main(arguments=None):
    parser, args = parse_args(arguments)
    if args.compare:
        try:
            return print(json.dumps(compare(args.compare)))
        except ValueError as error:
            parser.error(str(error))
    try:
        files = {path: data.read_problems(path) for path in args.data}
        policy = Policy.load(args.model, args.dtype, args.device, args.examples, args.suffix)
        prompts = {path: policy.render(problems) for path, problems in files.items()}
        for path in files:
            too_long = sum(not policy.room(p) for p in prompts[path])
            if too_long == len(prompts[path]):
                raise ValueError(
                    f"{path}: every prompt is longer than the context of {policy.model.context} tokens"
                )
            if too_long:
                print(
                    f"{path}: {too_long} prompt(s) longer than the context of {policy.model.context} tokens count as wrong"
                )
        if args.add_pass_rate and not Path(args.add_pass_rate).parent.is_dir():
            raise ValueError(
                f"--add-pass-rate {args.add_pass_rate}: there is no folder to write it into"
            )
        args.out.mkdir(parents=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {data.squash(str(error))}\n")
    grader = Grader(allow_last_number=args.allow_last_number)
    summary = {name: getattr(args, name) for name in SETTINGS}
    summary["files"], rates = {}, {}
    with open(args.out / "completions.jsonl", "w", encoding="utf-8") as completions_file:
        for path, problems in files.items():
            rows_of = split_by_level(problems, args.quality)
            levels = {i: name for name, rows in rows_of.items() if name != "all" for i in rows}
            attempts = evaluate_file(
                args, policy, grader, path, prompts[path], levels, completions_file
            )
            print(
                f"\n{path}: {args.samples} sample(s) a problem, temperature {args.temperature:g}, top-p {args.top_p:g}, "
                f"at most {args.max_new_tokens} tokens; 95 % intervals over problems"
            )
            measures = {}
            for name, rows in rows_of.items():
                if rows:
                    measures[name] = summarise([attempts[i] for i in rows], args.k)
                    cells = (
                        f"{key} "
                        + ("{:.1f} [{:.1f}, {:.1f}]".format(*m) if key == "length" else shown(m))
                        for key, m in measures[name].items()
                    )
                    print(f"  {name:8} {len(rows):5} problems   " + "   ".join(cells))
            summary["files"][str(path)] = measures
            if Path(path).stem in data.BENCHMARKS:
                rates[Path(path).stem] = [np.mean([a.right for a in group]) for group in attempts]
            if args.add_pass_rate:
                print_difficulty(attempts)
                with open(args.add_pass_rate, "x", encoding="utf-8") as file:
                    for p, group in zip(problems, attempts):
                        rate = sum(a.right for a in group) / args.samples
                        measured = replace(
                            p, pass_rate=rate, other={**p.other, "pass_rate_samples": args.samples}
                        )
                        file.write(json.dumps(measured.record(), ensure_ascii=False) + "\n")
    summary["verdicts"] = dict(grader.counts)
    if rates:
        print(
            f"\nper cent right, mean of {args.samples} sample(s), 95 % intervals over problems; published rows with k = 16 where stated"
        )
        print(papers_table(f"{Path(args.model).name} ({args.protocol or 'own settings'})", rates))
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\nevery completion with its verdict: {args.out / 'completions.jsonl'}")
    print(json.dumps(summary))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(
            "interrupted: batches of completions that were finished are in the completions.jsonl of --out"
        )
