"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K     accuracies with intervals
    python eval.py --model M --data F.jsonl --add-pass-rate G.jsonl       measures difficulty
    python eval.py --model M --protocol deepscaler --data aime24 math500  benchmarks of the papers
    python eval.py --compare A B                           tests the difference of two --out folders

Training, evaluation and the measurement of difficulty share `attempt`: the same template, sampler
and grader.
"""

import argparse
import json
import math
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from tokenizers.decoders import DecodeStream
from tqdm import tqdm
from transformers import AutoTokenizer

import data
from infra.answers import canonical
from model import Transformer
from rewards import RIGHT, Grader, writes_steps
from rollout import Completion, sample, stream

SHIPPED = Path(__file__).parent / "assets"  # a tiny checkpoint, and its problems with pass rates
MAX_NEW_TOKENS, SLOTS = 128, 256  # defaults that fit the shipped model
TRAINING, DIFFICULTY, EVALUATION = 1, 2, 3  # purposes of random streams: see rollout.stream


# ----------------------------------------------------------------------------------------- policy


@dataclass(frozen=True)
class Policy:
    """A model with what turns problems into its tokens and its tokens into text."""

    model: Transformer
    tokenizer: object
    stop_ids: tuple
    folder: Path  # where it was read
    examples: list  # worked examples in front of every problem
    suffix: str  # behind every problem

    @classmethod
    def load(cls, name, dtype="float32", device="cpu", examples_file=None, suffix=data.SUFFIX):
        """From a checkpoint folder or a hub name. Raises ValueError saying what is wrong."""
        folder = find_folder(name, device)
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
        examples = data.read_records(examples_file, data.parse_example) if examples_file else []
        model = Transformer.from_pretrained(folder, getattr(torch, dtype), device)
        with data.explained(f"{folder}: its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{folder}: its tokenizer has no chat template, which turns a problem into a prompt"
            )
        stop_ids = read_stop_ids(folder, tokenizer, model.config)
        return cls(model, tokenizer, stop_ids, folder, examples, suffix)

    def render(self, problems):
        """[Problem, ...] -> [Prompt, ...]. Raises ValueError if a prompt does not fit the model."""
        with data.explained("the tokenizer's chat template fails"):
            prompts = [data.render(self.tokenizer, p, self.examples, self.suffix) for p in problems]
        vocab_size = self.model.config.vocab_size
        for prompt in prompts:
            if not prompt.tokens:
                raise ValueError(
                    f"{prompt.problem.id}: the tokenizer's chat template makes an empty prompt"
                )
            if max(prompt.tokens) >= vocab_size:
                raise ValueError(
                    f"{prompt.problem.id}: token {max(prompt.tokens)} is not in the model's "
                    f"vocabulary of {vocab_size}: model and tokenizer do not belong together"
                )
        return prompts

    def room(self, prompt):
        """Tokens that the context leaves for a completion; 0: the prompt is too long."""
        return max(0, self.model.context - len(prompt.tokens))

    def text(self, completion):
        tokens = completion.tokens[: len(completion.tokens) - completion.stopped]
        return self.tokenizer.decode(tokens)

    def pieces(self, completion):
        """The text of each token, the stop token included. A character of several tokens is the
        last one's, and the others have none."""
        stream, found = DecodeStream(skip_special_tokens=False), []
        for token in completion.tokens:
            try:
                piece = stream.step(self.tokenizer.backend_tokenizer, token)
            except Exception:  # bytes that spell nothing, or a tokenizer of plain Python
                piece = self.tokenizer.decode([token])
            found.append(piece or "")
        return found


def find_folder(name, device):
    """A folder as it is; a name of the hub is downloaded, for the meta device without weights."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.jinja", "tokenizer*"]
    if device != "meta":
        patterns.append("*.safetensors")
    with data.explained(f"model {name!r} is neither a folder nor to be had from the hub"):
        return Path(snapshot_download(name, allow_patterns=patterns))


def read_stop_ids(folder, tokenizer, config):
    """Tokens that end a completion: eos_token_id of tokenizer, config and generation config."""
    named = [tokenizer.eos_token_id, config.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        with data.explained(f"{path}: not a JSON object"):
            named.append(json.loads(path.read_text()).get("eos_token_id"))
    stop_ids = set()
    for ids in named:
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i not in range(config.vocab_size):
                raise ValueError(
                    f"{folder}: the stop token {i!r} is not in the model's vocabulary of "
                    f"{config.vocab_size} (eos_token_id in config.json, generation_config.json or "
                    "the tokenizer), so no completion would stop"
                )
            stop_ids.add(i)
    stop_ids.discard(None)
    if not stop_ids:
        raise ValueError(f"{folder}: neither tokenizer nor config names a stop token")
    return tuple(sorted(stop_ids))


# --------------------------------------------------------------------------------------- attempts


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: the settings of rollout.sample by their names."""

    max_new_tokens: int  # of each completion, the stop token included
    temperature: float  # 0 is greedy
    slots: int  # completions decoded at once (memory and speed only)
    top_k: int = 0  # 0 is off, as in training
    top_p: float = 1.0  # 1 is off, as in training


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


def attempt(policy, grader, work, sampling, *, show_progress=False, clock=None):
    """Complete every prompt once per key, and grade: one list of Attempt per prompt.

    A completion ends where the context ends; a prompt that fills the context gets empty ones.
    work   pairs of a prompt and the keys of its completions, see rollout.stream
    clock  a Counter to which the seconds `sample` and `grade` are added
    """
    start = time.perf_counter()
    prompts, keys = [prompt for prompt, _ in work], [own for _, own in work]
    limits = [min(sampling.max_new_tokens, policy.room(p)) for p in prompts]
    with tqdm(
        desc="sampling", unit=" tokens", leave=False, disable=not show_progress, delay=2
    ) as bar:
        groups = sample(
            policy.model,
            [p.tokens for p in prompts],
            keys,
            **vars(replace(sampling, max_new_tokens=limits)),
            stop_ids=policy.stop_ids,
            on_finished=bar.update,
        )
    sampled = time.perf_counter()
    parts, pairs = [], []
    for prompt, group in zip(prompts, groups):
        for completion in group:
            text = policy.text(completion)
            answer = grader.extract(prompt.opening + text)
            parts.append((completion, text, answer))
            pairs.append((prompt.problem.answer, answer))
    verdicts = grader.compare(pairs)
    if clock is not None:
        clock.update(sample=sampled - start, grade=time.perf_counter() - sampled)
    attempts = (Attempt(*part, verdict) for part, verdict in zip(parts, verdicts))
    return [[next(attempts) for _ in own] for own in keys]


def requests(seed, prompts, samples, purpose=EVALUATION):
    """Every prompt with a random stream for each of its samples, a function of the problem's id.

    Every evaluation uses the same streams, so two evaluations differ less by chance. Training and
    the measurement of difficulty use others: problems that were called hard after unlucky samples
    look easier with new samples, even without any training.
    """
    found = []
    for prompt in prompts:
        number = zlib.crc32(prompt.problem.id.encode())
        found.append((prompt, [stream(seed, purpose, number, k) for k in range(samples)]))
    return found


# ---------------------------------------------------------------------------------------- numbers
# scipy.stats takes a second to import. It is imported where it is used.


def pass_at_k(n, c, k):
    """Unbiased P(at least one of k is right) from c right of n samples (Chen et al. 2021)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, found {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers, right):
    """Whether the most frequent answer is right.

    Answers vote together if their canonical spelling is one. Ties go to the answer that was sampled
    first. None, no answer, casts no vote; without any vote the majority is wrong.
    """
    votes = [(canonical(a), is_right) for a, is_right in zip(answers, right) if a is not None]
    if not votes:
        return False
    winner, _ = Counter(spelling for spelling, _ in votes).most_common(1)[0]  # the first of equals
    return dict(reversed(votes))[winner]


def wilson(successes, n):
    """95 % interval of a proportion (Wilson 1927) -> low, high"""
    from scipy.stats import binomtest

    return binomtest(int(successes), n).proportion_ci(method="wilson")


def bootstrap(values):
    """95 % interval of the mean over resamples of the values, one per problem -> low, high"""
    from scipy import stats

    if len(values) == 1:
        return values[0], values[0]
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, batch=100, method="percentile", random_state=0
    )
    return result.confidence_interval


def interval(values):
    """Mean of one value per problem, and its 95 % interval over problems -> mean, low, high

    Samples of one problem are not independent, so they are averaged before. If all values are 0 or
    1, the interval is Wilson's. Otherwise it is a bootstrap's. A bootstrap of few values is too
    narrow, so an interval of shares (values in [0, 1]) is widened: its top is at least Wilson's top
    for zeros alone, its bottom at most Wilson's bottom for ones alone.
    """
    values, n = np.asarray(values, float), len(values)
    if np.isin(values, (0, 1)).all():
        return values.mean(), *wilson(values.sum(), n)
    low, high = bootstrap(values)
    if values.min() >= 0 and values.max() <= 1:
        low, high = min(low, wilson(n, n).low), max(high, wilson(0, n).high)
    return values.mean(), low, high


def measure(rows, k):
    """{measure: value} of one problem, from the rows of its samples"""
    n = len(rows)
    right = [row["verdict"] == RIGHT for row in rows]
    return {
        f"avg@{n}": np.mean(right),
        f"pass@{k}": pass_at_k(n, sum(right), k),
        f"maj@{n}": majority([row["answer"] for row in rows], right),
        "length": np.mean([row["tokens"] for row in rows]),
        "cut_off": 1 - np.mean([row["stopped"] for row in rows]),
        "writes_steps": np.mean([writes_steps(row["text"]) for row in rows]),
    }


def shown(name, measure):
    """A measure with its interval as text: `length` in tokens, all others in per cent."""
    scale, unit = (1, "") if name == "length" else (100, " %")
    mean, low, high = (scale * value for value in measure)
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"


# ----------------------------------------------------------------------------------- command line

# flag            default  least  meaning
NUMBERS = f"""
--samples         16       1      completions per problem
--k               0        0      k of pass@k; 0: as many as --samples
--max-new-tokens  {MAX_NEW_TOKENS}       1      longest completion, tokens
--temperature     1.0      0      0 is greedy; 1 as in training
--top-p           1.0      0      nucleus, above 0; 1 is off, as in training
--top-k           0        0      likeliest tokens; 0 is off, as in training
--seed            0        0      of the random streams
--slots           {SLOTS}      1      completions decoded at once (memory and speed only)
"""
# What summary.json says of how a result was sampled.
SETTINGS = (
    "model protocol samples k temperature top_k top_p max_new_tokens suffix examples "
    "allow_last_number dtype seed"
)


def at_least(least, kind):
    """A type of argparse: a finite number that is not below `least`"""

    def number(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, found {value}")
        return value

    return number


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=str(SHIPPED / "tiny"), help="checkpoint folder or hub name")
    problems = "JSONL files of problems, or names of benchmarks"
    add("--data", nargs="+", default=[str(SHIPPED / "heldout.jsonl")], help=problems)
    published = "published defaults of flags and suffix"
    add("--protocol", choices=("deepscaler", "fastcurl"), help=published)
    for line in NUMBERS.strip().splitlines():
        name, default, least, meaning = line.split(maxsplit=3)
        kind = float if "." in default else int
        add(name, type=at_least(int(least), kind), default=kind(default), help=meaning)
    add("--compare", nargs=2, metavar="DIR", help="test the difference of two results")
    by_time = time.strftime("runs/eval-%Y%m%d-%H%M%S")
    add("--out", type=Path, default=by_time, help="folder to write; default runs/eval-<date-time>")
    add("--add-pass-rate", type=Path, metavar="FILE", help="write the problems with pass rates")
    add("--quality", type=float, nargs="+", default=data.QUALITY, help="thresholds of levels")
    add("--examples", help="JSONL of worked examples {problem, solution} to put in front")
    add("--allow-last-number", action="store_true", help="without a box, grade the last number")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.set_defaults(suffix=data.SUFFIX)
    return parser


def parse_args(arguments):
    """-> parser, flags. A protocol sets those that are not given."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.protocol:
        from tools.papers import PROTOCOLS

        parser.set_defaults(**PROTOCOLS[args.protocol])
        args = parser.parse_args(arguments)
    args.k = args.k or args.samples
    return parser, args


def check(args):
    """Raise ValueError for flags that do not go together."""
    if args.k > args.samples or not 0 < args.top_p <= 1:
        raise ValueError("--k must be at most --samples, and --top-p in (0, 1]")
    names = {Path(path).stem for path in args.data}
    if len(names) < len(args.data):
        raise ValueError("--data: results are known by the names of files, and one stands twice")
    rates = args.add_pass_rate
    if rates and (len(names) > 1 or rates.exists() or not rates.parent.is_dir()):
        raise ValueError(f"--add-pass-rate {rates}: needs one file of --data and a new path")


def make_row(path, problem_id, level, sample, attempt):
    """A line of completions.jsonl"""
    return {
        "file": path,
        "problem_id": problem_id,
        "level": level,
        "sample": sample,
        "verdict": attempt.verdict,
        "answer": attempt.answer,
        "tokens": attempt.length,
        "stopped": attempt.completion.stopped,
        "text": attempt.text,
    }


def sample_file(args, policy, grader, path, prompts):
    """Sample, grade and append to completions.jsonl -> for each problem, its rows there"""
    levels = data.level_names([p.problem for p in prompts], args.quality)
    purpose = DIFFICULTY if args.add_pass_rate else EVALUATION
    work = requests(args.seed, prompts, args.samples, purpose)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.slots, args.top_k, args.top_p)
    size = max(1, 8 * args.slots // args.samples)  # problems between two writes
    result = []
    with open(args.out / "completions.jsonl", "a", buffering=1, encoding="utf-8") as log:
        for start in tqdm(range(0, len(prompts), size), desc=path):
            some = work[start : start + size]
            done = attempt(policy, grader, some, sampling, show_progress=True)
            for (prompt, _), attempts in zip(some, done):
                name = prompt.problem.id
                level = levels.get(name)
                rows = [make_row(path, name, level, i, a) for i, a in enumerate(attempts)]
                result.append(rows)
                for row in rows:
                    print(json.dumps(row, ensure_ascii=False), file=log)
    return result


def summarise(result, k):
    """Print and return {level, or "all": {measure: (mean, low, high)}}."""
    print(f"{len(result[0])} samples a problem, 95 % intervals over problems")
    levels = {rows[0]["level"] for rows in result} - {None}
    summary = {}
    for level in [*sorted(levels), "all"]:
        part = [measure(rows, k) for rows in result if level in (rows[0]["level"], "all")]
        summary[level] = {name: interval([values[name] for values in part]) for name in part[0]}
        cells = [f"{name} {shown(name, some)}" for name, some in summary[level].items()]
        print(f"  {level:8} {len(part):5} problems   " + "   ".join(cells))
    return summary


def add_pass_rates(path, prompts, result):
    """Write the problems back with the share of their samples that is right."""
    problems = []
    for prompt, rows in zip(prompts, result):
        rate = np.mean([row["verdict"] == RIGHT for row in rows])
        other = prompt.problem.other | {"pass_rate_samples": len(rows)}
        problems.append(replace(prompt.problem, pass_rate=rate, other=other))
    data.write_problems(path, problems)


def evaluate(args, policy, files):
    """Fill the folder --out and print tables -> what summary.json holds"""
    from tools import papers

    print(f"every completion with its verdict: {args.out / 'completions.jsonl'}")
    grader = Grader(allow_last_number=args.allow_last_number)
    summary = {name: getattr(args, name) for name in SETTINGS.split()} | {"files": {}}
    for path, prompts in files.items():
        result = sample_file(args, policy, grader, path, prompts)
        how = f"temperature {args.temperature:g}, top-p {args.top_p:g}"
        print(f"\n{path}: {how}, at most {args.max_new_tokens} tokens a completion")
        summary["files"][path] = summarise(result, args.k)
        if args.add_pass_rate:
            add_pass_rates(args.add_pass_rate, prompts, result)
    summary["verdicts"] = dict(grader.counts)
    papers.print_table(summary)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def run(parser, args):
    """-> what the last line prints"""
    try:
        if args.compare:
            from tools.compare import compare

            return compare(*args.compare)
        check(args)
        policy = Policy.load(args.model, args.dtype, args.device, args.examples, args.suffix)
        files = {path: policy.render(data.read_problems(path)) for path in args.data}
        args.out.mkdir(parents=True)
    except (ValueError, OSError) as error:
        parser.error(data.squash(str(error)))
    for path, prompts in files.items():
        too_long = sum(not policy.room(p) for p in prompts)
        if too_long:
            print(f"{path}: {too_long} prompts fill the context and count as wrong")
    return evaluate(args, policy, files)


def main(arguments=None):
    parser, args = parse_args(arguments)
    try:
        print(json.dumps(run(parser, args)))
    except KeyboardInterrupt:
        parser.exit(130, "eval.py: interrupted; completions.jsonl keeps what was graded before\n")


if __name__ == "__main__":
    main()
