"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K         accuracies with 95 % intervals
    python eval.py --model M --data F.jsonl --samples K --add-pass-rate G.jsonl   measures difficulty

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
from rewards import NO_ANSWER, RIGHT, Grader, canonical, extract_answer, writes_steps
from rollout import Completion, Request, sample, stream

SHIPPED = Path(__file__).parent / "assets"  # the embedded default: a tiny checkpoint, its problems with pass rates
MAX_NEW_TOKENS, SLOTS = 96, 256  # defaults, fit for the shipped model: longest completion, completions decoded together
TRAINING, DIFFICULTY, EVALUATION = 1, 2, 3  # purposes of random streams: see rollout.stream


@dataclass(frozen=True)
class Policy:
    """A model with what turns problems into its tokens and its tokens into text."""

    model: Transformer
    tokenizer: object
    stop_ids: tuple
    examples: tuple  # worked examples in front of every problem

    @classmethod
    def load(cls, name, dtype="float32", device="cpu", examples_file=None):
        """From a checkpoint folder or a hub name. Raises ValueError saying what is wrong with it."""
        path = Path(name)
        if not path.is_dir():
            try:
                path = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
            except (ValueError, OSError) as error:  # the hub's errors are of these kinds
                reason = (str(error) or repr(error)).splitlines()[0]
                raise ValueError(f"model {name!r} is neither a folder nor to be had from the hub ({reason})") from error
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
        examples = data.read_records(examples_file, data.parse_example) if examples_file else ()
        model = Transformer.from_pretrained(path, getattr(torch, dtype), device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # tokenizers raises bare Exception for a broken file, transformers many others
            raise ValueError(f"{path}: its tokenizer cannot be loaded ({error})") from error
        if tokenizer.chat_template is None:
            raise ValueError(f"{path}: its tokenizer has no chat template, which turns a problem into a prompt")
        stop_ids = {tokenizer.eos_token_id, *as_list(model.config.eos_token_id)} - {None}
        generation = path / "generation_config.json"
        if generation.is_file():
            try:
                stop_ids |= set(as_list(json.loads(generation.read_text()).get("eos_token_id")))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{generation}: not a JSON object ({error})") from error
        if not stop_ids:
            raise ValueError(f"{path}: neither tokenizer nor config names a stop token (eos_token_id)")
        return cls(model, tokenizer, tuple(sorted(stop_ids)), tuple(examples))

    def render(self, problems):
        """[Problem, ...] -> [Prompt, ...]"""
        return [data.render(self.tokenizer, p, self.examples) for p in problems]

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
    verdict: str  # rewards.RIGHT, ...

    @property
    def right(self):
        return self.verdict == RIGHT

    @property
    def length(self):
        return len(self.completion.tokens)


def attempt(policy, grader, prompts, keys, *, max_new_tokens, temperature, slots, top_k=0, top_p=1.0, progress=False, clock=None):
    """Complete prompts[i] once per key in keys[i], and grade: one list of Attempt per prompt.

    A completion has at most max_new_tokens, less if the context ends before; a prompt that fills the context gets
    empty ones. clock: a Counter to which `sample` and `grade` seconds are added.
    """
    clock, start = Counter() if clock is None else clock, time.perf_counter()
    limits = [min(max_new_tokens, policy.room(p)) for p in prompts]
    requests = [Request(p.tokens, k if limit else [], limit) for p, k, limit in zip(prompts, keys, limits)]
    with tqdm(desc="sampling", unit=" tokens", leave=False, disable=not progress, delay=2) as bar:
        done = sample(
            policy.model, requests, slots=slots, stop_ids=policy.stop_ids, temperature=temperature, top_k=top_k, top_p=top_p,
            progress=bar.update,
        )
    done = [c or [Completion([], [], False)] * len(k) for c, k in zip(done, keys)]
    sampled = time.perf_counter()
    texts = [[policy.text(c) for c in cs] for cs in done]
    verdicts = iter(grader.grade([(p.problem.answer, p.opening + t) for p, ts in zip(prompts, texts) for t in ts]))
    clock.update(sample=sampled - start, grade=time.perf_counter() - sampled)
    return [[Attempt(c, t, next(verdicts)) for c, t in zip(cs, ts)] for cs, ts in zip(done, texts)]


def evaluation_keys(seed, prompts, samples, purpose=EVALUATION):
    """Streams that neither training nor the measurement of difficulty uses: samples that chose the hard problems would
    show a gain on them by chance alone. The same at every evaluation, which makes differences sharper."""
    return [[stream(seed, purpose, i, k) for k in range(samples)] for i in range(len(prompts))]


# ---------------------------------------------------------------------------------------------------------- numbers


def pass_at_k(n, c, k):
    """Unbiased P(at least one of k is right) from c right among n >= k samples (Chen et al. 2021)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs at least {k} samples and 0 <= right <= samples, found {c} right of {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(attempts, opening=""):
    """Whether the most frequent answer is right. Ties go to the answer sampled first; no answer casts no vote."""
    votes, verdict = Counter(), {}
    for a in attempts:
        if a.verdict != NO_ANSWER:
            answer = canonical(extract_answer(opening + a.text, allow_last_number=True))
            votes[answer] += 1  # Counter keeps the order of first votes, and most_common is stable
            verdict.setdefault(answer, a.right)
    return verdict[votes.most_common(1)[0][0]] if votes else False


def wilson(successes, n):
    """95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # rounding must not leave p outside


def interval(values):
    """Mean of one value per problem and its 95 % interval over problems: Wilson's for 0/1 values, else a bootstrap."""
    values = np.asarray(values, float)
    if not len(values):
        return math.nan, math.nan, math.nan
    if np.isin(values, (0, 1)).all():
        return values.mean(), *wilson(values.sum(), len(values))
    rng = np.random.default_rng(0)
    resampled = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    return values.mean(), *np.quantile(resampled, (0.025, 0.975))


def summarise(prompts, attempts, k):
    """{measure: (mean, low, high)} over problems."""
    right = [[a.right for a in group] for group in attempts]
    n = len(right[0])
    return {
        f"avg@{n}": interval([np.mean(r) for r in right]),
        f"pass@{k}": interval([pass_at_k(n, sum(r), k) for r in right]),
        f"maj@{n}": interval([majority(group, p.opening) for p, group in zip(prompts, attempts)]),
        "length": interval([np.mean([a.length for a in group]) for group in attempts]),
        "cut_off": interval([np.mean([not a.completion.stopped for a in group]) for group in attempts]),
        "writes_steps": interval([np.mean([writes_steps(a.text) for a in group]) for group in attempts]),
    }


def print_difficulty(attempts, qualities):
    """A histogram of pass rates, and how well they place the problems."""
    n = len(attempts[0])
    right = np.array([sum(a.right for a in group) for group in attempts])
    bins = np.minimum(right * 10 // n, 9) if n >= 10 else right
    print(f"\npass rate of {len(right)} problems, {n} samples each (95 % Wilson interval of the share)")
    for b in range(10 if n >= 10 else n + 1):
        low, high = wilson((bins == b).sum(), len(bins))
        label = f"{b / 10:.1f} - {(b + 1) / 10:.1f}" if n >= 10 else f"{b}/{n}"
        print(f"  {label:>9}  {(bins == b).mean():6.1%} [{low:.1%}, {high:.1%}]  {'#' * round(60 * (bins == b).mean())}")
    bounds = [q for q in qualities if q < 1]
    uncertain = np.mean([any(low < 1 - q < high for q in bounds) for low, high in (wilson(r, n) for r in right)])
    print(f"  {uncertain:.1%} of the problems may belong to another level: their interval contains a threshold of Q = {qualities}")


# ------------------------------------------------------------------------------------------------------ command line


def parse_args(arguments):
    usage = "%(prog)s [--flag value ...]   (--help lists the flags)"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], usage=usage, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=str(SHIPPED / "tiny"), help="checkpoint folder or hub name")
    parser.add_argument("--data", nargs="+", default=[str(SHIPPED / "heldout.jsonl")], help="JSONL files of problems")
    parser.add_argument("--samples", type=int, default=16, help="completions per problem")
    parser.add_argument("--k", type=int, help="k of pass@k; default: --samples")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest completion, tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; 1 as in training")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 is off, as in training")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest tokens to choose from; 0 is off, as in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to write; default runs/eval-<date-time>")
    parser.add_argument("--add-pass-rate", metavar="FILE", help="write the problems of --data back with their pass rates")
    parser.add_argument("--quality", type=float, nargs="+", default=data.QUALITY, help="thresholds that cut the levels")
    parser.add_argument("--examples", help="JSONL of worked examples {problem, solution} to put in front")
    parser.add_argument("--allow-last-number", action="store_true", help="without a box, grade the last number")
    parser.add_argument("--slots", type=int, default=SLOTS, help="completions decoded together (memory and speed only)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    args = parser.parse_args(arguments)
    args.k = args.samples if args.k is None else args.k
    for name in ("samples", "max_new_tokens", "slots"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    if not 1 <= args.k <= args.samples:
        parser.error(f"--k must be in 1..{args.samples} (--samples), found {args.k}")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or args.seed < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature, --top-k and --seed must be at least 0, and --top-p in (0, 1]")
    if args.add_pass_rate and len(args.data) > 1:
        parser.error("--add-pass-rate measures one file at a time")
    args.out = Path(args.out or f"runs/eval-{datetime.now():%Y%m%d-%H%M%S}")
    for name, path in (("--out", args.out), ("--add-pass-rate", Path(args.add_pass_rate or args.out))):
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


def evaluate_file(args, policy, grader, path, prompts, completions_file):
    """Sample and score one file, writing completions as they come: one list of Attempt per prompt."""
    purpose = DIFFICULTY if args.add_pass_rate else EVALUATION
    keys, attempts = evaluation_keys(args.seed, prompts, args.samples, purpose), []
    size = max(1, 8 * args.slots // args.samples)  # problems between two writes; each write drains the slots once
    for i in tqdm(range(0, len(prompts), size), desc=Path(path).name, unit="batch", disable=len(prompts) <= size):
        part = attempt(
            policy, grader, prompts[i : i + size], keys[i : i + size], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, slots=args.slots, progress=True,
        )
        for prompt, group in zip(prompts[i:], part):
            for k, a in enumerate(group):
                row = {"file": str(path), "problem_id": prompt.problem.id, "sample": k, "verdict": a.verdict,
                       "tokens": a.length, "stopped": a.completion.stopped, "text": a.text}
                completions_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        completions_file.flush()
        attempts += part
    return attempts


def main(arguments=None):
    parser, args = parse_args(arguments)
    try:
        files = {path: data.read_problems(path) for path in args.data}
        policy = Policy.load(args.model, args.dtype, args.device, args.examples)
        prompts = {path: policy.render(problems) for path, problems in files.items()}
        for path in files:
            too_long = sum(not policy.room(p) for p in prompts[path])
            if too_long == len(prompts[path]):
                raise ValueError(f"{path}: every prompt is longer than the context of {policy.model.context} tokens")
            if too_long:
                print(f"{path}: {too_long} prompt(s) longer than the context of {policy.model.context} tokens count as wrong")
        if args.add_pass_rate and not Path(args.add_pass_rate).parent.is_dir():
            raise ValueError(f"--add-pass-rate {args.add_pass_rate}: there is no folder to write it into")
        args.out.mkdir(parents=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    grader = Grader(allow_last_number=args.allow_last_number)
    summary = {name: getattr(args, name) for name in ("model", "samples", "temperature", "top_k", "top_p", "max_new_tokens", "seed")}
    summary["files"] = {}
    with open(args.out / "completions.jsonl", "w", encoding="utf-8") as completions_file:
        for path, problems in files.items():
            attempts = evaluate_file(args, policy, grader, path, prompts[path], completions_file)
            print(f"\n{path}: {args.samples} sample(s) a problem, temperature {args.temperature:g}, top-p {args.top_p:g}, "
                  f"at most {args.max_new_tokens} tokens; 95 % intervals over problems")
            measures = {}
            for name, rows in split_by_level(problems, args.quality).items():
                if rows:
                    measures[name] = summarise([prompts[path][i] for i in rows], [attempts[i] for i in rows], args.k)
                    cells = (f"{key} " + (f"{m:.1f} [{lo:.1f}, {hi:.1f}]" if key == "length" else f"{m:.1%} [{lo:.1%}, {hi:.1%}]")
                             for key, (m, lo, hi) in measures[name].items())
                    print(f"  {name:8} {len(rows):5} problems   " + "   ".join(cells))
            summary["files"][str(path)] = measures
            if args.add_pass_rate:
                print_difficulty(attempts, args.quality)
                with open(args.add_pass_rate, "x", encoding="utf-8") as file:
                    for p, group in zip(problems, attempts):
                        rate = sum(a.right for a in group) / args.samples
                        measured = replace(p, pass_rate=rate, other={**p.other, "pass_rate_samples": args.samples})
                        file.write(json.dumps(measured.record(), ensure_ascii=False) + "\n")
    summary["verdicts"] = dict(grader.counts)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\nevery completion with its verdict: {args.out / 'completions.jsonl'}")
    print(json.dumps(summary))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: batches of completions that were finished are in the completions.jsonl of --out")
