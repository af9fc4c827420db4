"""Sample problems, score the completions, and say how sure one can be of the result.

    python eval.py --model M --data F.jsonl [G.jsonl ...] --samples K     accuracies with intervals
    python eval.py --model M --data F.jsonl --add-pass-rate G.jsonl       measures difficulty
    python eval.py --model M --protocol deepscaler --data aime24 math500  benchmarks of the papers
    python eval.py --like RUN                              as a training run samples
    python eval.py --compare A B                           tests the difference of two --out folders

`torchrun --nproc_per_node=N eval.py ...` shares the work. The same flags, with --out FOLDER of an
evaluation that was stopped, go on with it: FOLDER/completions.jsonl is all its state.

Training, evaluation and the measurement of difficulty share `attempt`: the same template, sampler
and grader.
"""

import argparse
import contextlib
import hashlib
import json
import math
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from statistics import mode

import numpy as np
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, HfArgumentParser

import data
from infra import lora
from infra.answers import canonical
from infra.directory import checkpoints, create, damage, lock, sha256
from infra.ranks import Ranks, one_speaks, refuse
from model import Transformer
from rewards import RIGHT, Grader, writes_steps
from rollout import Completion, sample, stream
from tools import papers

SHIPPED = Path(__file__).parent / "assets"  # a tiny checkpoint, and its problems with pass rates
TINY = SHIPPED / "tiny"
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
    prompting: dict  # keyword arguments of data.render

    @classmethod
    def load(cls, name, dtype="float32", device="cpu", flags=data.Prompting()):  # noqa: B008 frozen
        """From a checkpoint folder or a hub name. An adapter is put on the base that it names.

        Raises ValueError saying what is wrong.
        """
        folder = base = find_folder(name, device)
        adapter = lora.read_config(folder)
        if adapter:
            base = find_folder(adapter["base_model_name_or_path"], device, adapter.get("revision"))
        if "cuda" in str(device) and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
        prompting = data.Prompting.read(flags)
        model = Transformer.from_pretrained(base, getattr(torch, dtype), device)
        if adapter:
            lora.load(model, adapter, folder, base)
        with data.explained(f"{folder}: its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.chat_template = tokenizer.chat_template or data.PLAIN_TEMPLATE
        stop_ids = read_stop_ids(folder, tokenizer, model.config)
        stop_ids |= {end_of_turn(tokenizer), *(stop_token(tokenizer, text) for text in flags.stop)}
        return cls(model, tokenizer, tuple(sorted(stop_ids - {None})), folder, prompting)

    def save(self, folder):
        """Write what stands beside the weights in a folder that `load` reads."""
        self.tokenizer.save_pretrained(folder)
        stops, padding = list(self.stop_ids), self.tokenizer.pad_token_id
        GenerationConfig(eos_token_id=stops, pad_token_id=padding).save_pretrained(folder)

    def render(self, problems):
        """[Problem, ...] -> [Prompt, ...]. Raises ValueError if a prompt does not fit the model."""
        with data.explained("the tokenizer's chat template fails"):
            prompts = [data.render(self.tokenizer, p, **self.prompting) for p in problems]
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

    def show(self, prompts):
        """Print two examples as the model sees them, and how many leave no room to answer."""
        for prompt in prompts[:2]:
            text = self.tokenizer.decode(prompt.tokens)
            tqdm.write(f"{prompt.problem.id}, gold {prompt.problem.answer!r}: {text!r}")
        if too_long := sum(not self.room(p) for p in prompts):
            tqdm.write(f"{too_long} of these prompts fill the context and count as wrong")

    def room(self, prompt):
        """Tokens that the context leaves for a completion; 0: the prompt is too long."""
        return max(0, self.model.context - len(prompt.tokens))

    def measuring(self, temperature, max_new_tokens):
        """What pass rates depend on, beside the problem; JSON."""
        files = sorted(self.folder.glob("*model*.safetensors"))
        return {
            "weights": digest("".join(map(sha256, files)))[:12],
            "prompt": digest(json.dumps(self.prompting))[:12],
            "examples": len(self.prompting["examples"]),
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
        }

    def text(self, completion):
        tokens = completion.tokens[: len(completion.tokens) - completion.stopped]
        return self.tokenizer.decode(tokens)

    def pieces(self, completion):
        """The text of each token, the stop token included."""
        return [self.tokenizer.decode([token]) for token in completion.tokens]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def is_shipped(model):
    """Whether defaults that were chosen for the shipped model fit."""
    return Path(model).resolve() == TINY.resolve()


def default_dtype(model, device):
    return "bfloat16" if device == "cuda" and not is_shipped(model) else "float32"


def find_folder(name, device, revision=None):
    """A folder as it is; NAME[@REVISION] of the hub is downloaded, for the meta device without
    weights."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.jinja", "tokenizer*"]
    if device != "meta":
        patterns.append("*.safetensors")
    name, _, given = name.partition("@")
    pin = revision or given or None
    with data.explained(f"model {name!r} is neither a folder nor to be had from the hub"):
        return Path(snapshot_download(name, revision=pin, allow_patterns=patterns))


def read_stop_ids(folder, tokenizer, config):
    """-> {id} of the tokens that end a completion: eos_token_id of tokenizer, config and generation
    config."""
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
    if stop_ids == {None}:
        raise ValueError(f"{folder}: neither tokenizer nor config names a stop token")
    return stop_ids


def end_of_turn(tokenizer):
    """The token that the chat template puts behind an assistant's turn, if it is a special one. A
    base model may name another end, and would run on into a question that it invents."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2 3"}]
    with data.explained("the tokenizer's chat template fails"):
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("2 3")[2]
    tokens = tokenizer.encode(behind, add_special_tokens=False)
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def stop_token(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(f"--stop {text!r}: is {len(tokens)} tokens of this tokenizer, not one")
    return tokens[0]


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
            **vars(sampling) | {"max_new_tokens": limits},
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
    spelled = [None if answer is None else canonical(answer) for answer in answers]
    votes = [spelling for spelling in spelled if spelling is not None]
    return bool(votes) and right[spelled.index(mode(votes))]  # the first of equals


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


def result_of(rows):
    """A line of results.jsonl: what became of one problem, from the rows of its samples."""
    right = [row["verdict"] == RIGHT for row in rows]
    return {name: rows[0][name] for name in ("file", "problem_id", "level")} | {
        "n": len(rows),
        "right": sum(right),
        "majority": int(majority([row["answer"] for row in rows], right)),
        "length": np.mean([row["tokens"] for row in rows]),
        "cut_off": 1 - np.mean([row["stopped"] for row in rows]),
        "writes_steps": np.mean([writes_steps(row["text"]) for row in rows]),
        "verdicts": Counter(row["verdict"] for row in rows),
    }


def measure(result, k):
    """{measure: value} of one problem, from its line of results.jsonl"""
    n, right = result["n"], result["right"]
    return {
        f"avg@{n}": right / n,
        f"pass@{k}": pass_at_k(n, right, k),
        f"maj@{n}": result["majority"],
        **{name: result[name] for name in ("length", "cut_off", "writes_steps")},
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
--max-new-tokens  0       0      longest completion, tokens; shipped model: {MAX_NEW_TOKENS}
--temperature     1.0      0      0 is greedy; 1 as in training
--top-p           1.0      0      nucleus, above 0; 1 is off, as in training
--top-k           0        0      likeliest tokens; 0 is off, as in training
--seed            0        0      of the random streams
--slots           {SLOTS}      1      completions decoded at once (memory and speed only)
"""
# All that a result depends on, beside the bytes of files. The purpose is that of random streams.
SETTINGS = (
    "model data columns purpose protocol samples k temperature top_k top_p max_new_tokens examples "
    "system suffix template_kwargs stop allow_last_number dtype seed quality"
)
# What --like takes of a training run, beside its lengths, held-out data and newest checkpoint.
LIKE = "temperature examples system suffix template_kwargs stop allow_last_number dtype columns"


def at_least(least, kind):
    """A type of argparse: a finite number that is not below `least`"""

    def number(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, found {value}")
        return value

    return number


def make_parser():
    parser = HfArgumentParser(
        data.Prompting,
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=str(TINY), help="checkpoint folder or hub name[@revision]")
    add("--columns", nargs="+", default=[], help="of --data: problem=NAME answer=NAME")
    add(
        "--like", metavar="RUN", help="training run: its settings and newest checkpoint as defaults"
    )
    problems = "files of problems, data sets of the hub (infra/sources.py), or names of benchmarks"
    add("--data", nargs="+", default=[str(SHIPPED / "heldout.jsonl")], help=problems)
    add("--protocol", choices=papers.PROTOCOLS, help="published defaults of flags and suffix")
    for line in NUMBERS.strip().splitlines():
        name, default, least, meaning = line.split(maxsplit=3)
        kind = float if "." in default else int
        add(name, type=at_least(int(least), kind), default=kind(default), help=meaning)
    add("--compare", nargs=2, metavar="DIR", help="test the difference of two results")
    add("--out", type=Path, help="new, or of a stopped evaluation; default runs/eval-<date-time>")
    add("--add-pass-rate", type=Path, metavar="FILE", help="write the problems with pass rates")
    add(
        "--merge", type=Path, metavar="FOLDER", help="merge adapter --model into its base, and stop"
    )
    add("--quality", type=float, nargs="+", default=data.QUALITY, help="thresholds of levels")
    add("--allow-last-number", action="store_true", help="without a box, grade the last number")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    dtype = "default float32, on a GPU bfloat16 for any model but the shipped one"
    add("--dtype", choices=("float32", "bfloat16", "float64"), help=dtype)
    return parser


def parse_args(parser, arguments):
    """-> flags. A training run, then a protocol, set those that are not given. Raises ValueError"""
    args = parser.parse_args(arguments)
    if args.like:
        parser.set_defaults(**flags_of(args.like))
    if args.protocol:
        parser.set_defaults(**papers.PROTOCOLS[args.protocol])
    args = parser.parse_args(arguments)
    args.k = args.k or args.samples
    args.dtype = args.dtype or default_dtype(args.model, args.device)
    if is_shipped(args.model):
        args.max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    args.purpose = DIFFICULTY if args.add_pass_rate else EVALUATION
    return args


def flags_of(run):
    """{flag: value} with which a training run evaluates its newest checkpoint. Raises ValueError"""
    with data.explained(f"--like {run}: it is not the folder of a training run"):
        config = json.loads((Path(run) / "config.json").read_text())
        longest = max(level["max_new_tokens"] for level in config["levels"])
        flags = {name: config[name] for name in LIKE.split() if name in config}
        flags["max_new_tokens"] = config["eval_max_new_tokens"] or longest
        if config.get("eval_data"):
            flags["data"] = [config["eval_data"]]
        return flags | {"model": str(newest_whole(run))}


def newest_whole(run):
    """The newest checkpoint of a run whose files are what was written. Damaged ones are skipped,
    aloud, and left as they are: the run may be at work."""
    for path in checkpoints(run):
        reason = damage(path)
        if not reason:
            return path
        tqdm.write(f"{path}: skipped, it is damaged ({reason})")
    return Path(run) / "checkpoints"  # which is refused as a model


def check(args):
    """Raise ValueError for flags that do not go together."""
    if args.k > args.samples or not 0 < args.top_p <= 1:
        raise ValueError("--k must be at most --samples, and --top-p in (0, 1]")
    if not args.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens: our default fits the shipped model alone; for {args.model} give "
            "it, or a --protocol"
        )
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


def load(args, device):
    """Read and check everything. -> Policy, {file: prompts}.  Raises ValueError or OSError"""
    check(args)
    policy, files = Policy.load(args.model, args.dtype, device, args), {}
    for path in args.data:
        problems = data.read_problems(path, args.columns)
        data.gradable(path, problems)  # as others count them: those that fail it stay
        prompts = files[path] = policy.render(problems)
        policy.show(prompts)
    return policy, files


def open_folder(args, policy, files):
    """Make --out with all that its completions depend on, or go on with one that has the same.

    -> its path.  Raises ValueError
    """
    out, settings = args.out, {name: getattr(args, name) for name in SETTINGS.split()}
    measured = policy.measuring(args.temperature, args.max_new_tokens)
    settings["weights"] = measured["weights"]
    settings["prompts"] = digest(repr((files, policy.stop_ids)))
    if not (out and out.exists()):
        return create(out, settings | {"measured": measured}, "eval-")
    with data.explained(f"--out {out}: exists already, and is no evaluation to go on with"):
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
    grader = Grader(allow_last_number=args.allow_last_number)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.slots, args.top_k, args.top_p)
    work = []  # ((file, problem id, name of its level), request)
    for path, prompts in files.items():
        levels = data.level_names([p.problem for p in prompts], args.quality)
        for request in requests(args.seed, prompts, args.samples, args.purpose):
            name = request[0].problem.id
            work.append(((path, name, levels.get(name)), request))

    def sample_share(share):
        asked = [request for _, request in share]
        done = attempt(policy, grader, asked, sampling, show_progress=ranks.first)
        rows = []
        for (labels, _), attempts in zip(share, done):
            rows += [make_row(*labels, *each) for each in enumerate(attempts)]
        return rows

    done = ranks.from_first(lambda: finished(log, args.samples))
    print(f"{log}: {done} problems are done, {len(work) - done} are left")
    size = max(1, 2 * args.slots // args.samples) * ranks.size  # problems between two writes
    for start in tqdm(range(done, len(work), size), disable=not ranks.first):
        rows = ranks.spread(work[start : start + size], sample_share)
        ranks.from_first(lambda rows=rows: data.write_records(log, rows, "a"))
    grader.close()


def summarise(results, k):
    """Print and return {level, or "all": {measure: (mean, low, high)}}."""
    print(f"{results[0]['n']} samples a problem, 95 % intervals over problems")
    levels = {result["level"] for result in results} - {None}
    summary = {}
    for level in [*sorted(levels), "all"]:
        part = [measure(some, k) for some in results if level in (some["level"], "all")]
        summary[level] = {name: interval([values[name] for values in part]) for name in part[0]}
        cells = [f"{name} {shown(name, values)}" for name, values in summary[level].items()]
        print(f"  {level:8} {len(part):5} problems   {'   '.join(cells)}")
    return summary


def add_pass_rates(path, prompts, results, measured):
    """Write the problems back with the share of their samples that is right, and what measured."""
    problems = []
    for prompt, result in zip(prompts, results):
        other = prompt.problem.other | {"measured": measured}
        rate = result["right"] / result["n"]
        problems.append(replace(prompt.problem, pass_rate=rate, other=other))
    data.write_problems(path, problems)


def conclude(args, files, out, config):
    """Write results.jsonl and summary.json, print tables -> what summary.json holds

    config  config.json, an open file
    """
    summary = json.load(config)
    results = []
    with open(out / "completions.jsonl", encoding="utf-8") as lines:
        while rows := [json.loads(line) for line in islice(lines, args.samples)]:
            results.append(result_of(rows))
    data.write_records(out / "results.jsonl", [{"settings": summary}, *results])
    summary |= {"files": {}, "verdicts": Counter()}
    for path, prompts in files.items():
        some = [result for result in results if result["file"] == path]
        print(
            f"\n{path}: temperature {args.temperature:g}, top-p {args.top_p:g}, at most "
            f"{args.max_new_tokens} tokens a completion"
        )
        summary["files"][path] = summarise(some, args.k)
        for result in some:
            summary["verdicts"] += result["verdicts"]
        if args.add_pass_rate:
            measured = summary["measured"] | {
                "model": Path(args.model).name,
                "date": time.strftime("%Y-%m-%d"),
                "samples": args.samples,
            }
            add_pass_rates(args.add_pass_rate, prompts, some, measured)
    papers.print_table(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main(arguments=None):
    one_speaks()
    parser = make_parser()
    with contextlib.ExitStack() as stack:
        try:
            args = parse_args(parser, arguments)
            if args.compare:
                from tools.compare import compare

                return print(json.dumps(compare(*args.compare)))
            if args.merge:
                policy = Policy.load(args.model, "float32", args.device, args)
                if not lora.read_config(policy.folder):
                    raise ValueError(f"--merge: {args.model} is no adapter")
                return print(json.dumps(lora.merge(policy, args.merge)))
            ranks = stack.enter_context(Ranks(args.device))
            policy, files = ranks.together(lambda: load(args, ranks.device))
            out = ranks.from_first(lambda: open_folder(args, policy, files))
            config = ranks.together(lambda: ranks.first and lock(out / "config.json"))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            refuse(parser, error)
        try:
            sample_rest(args, policy, files, out / "completions.jsonl", ranks)
        except KeyboardInterrupt:
            words = f"{parser.prog}: interrupted; the same flags with --out {out} go on\n"
            parser.exit(130, words if ranks.first else None)
        except torch.OutOfMemoryError:
            refuse(
                parser, f"out of memory: lower --slots {args.slots}; with --out {out} it goes on"
            )
        if ranks.first:
            print(json.dumps(conclude(args, files, out, config)))


if __name__ == "__main__":
    main()
