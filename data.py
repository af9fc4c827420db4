"""Problems in, prompts out: JSON lines, the one prompt template, levels of difficulty, the order of training.

python data.py --split train --count 4096 --seed 0 --out pool.jsonl     generated problems, answers computed
python data.py --overlap train.jsonl eval.jsonl [more.jsonl ...]        evaluation problems that training repeats
"""

import argparse
import gzip
import itertools
import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

INSTRUCTION = (
    "Let's think step by step and output the final answer within \\boxed{}."  # DeepScaleR, FastCuRL
)
SUFFIX = (
    f"\n{INSTRUCTION}"  # of every problem; the published protocols set a blank before it (eval.py)
)

QUALITY = [
    0.8,
    1.0,
]  # Q_l by default, for the shipped problems: level 1 is solved in 20 % of the attempts or more


# -------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    pass_rate: float | None = None  # of the policy that measured it, in [0, 1]
    level: float | None = None  # difficulty declared by the source
    other: dict = field(
        default_factory=dict, compare=False
    )  # further fields of the file, kept as they are

    def record(self):
        """The JSON object that read_problems reads back."""
        known = {k: v for k, v in asdict(self).items() if k != "other" and v is not None}
        return {**known, **self.other}


def parse_problem(record, default_id):
    """One JSON object to a Problem; raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    for name in ("problem", "answer"):
        if name not in record:
            raise ValueError(f'no "{name}" (has: {", ".join(map(str, record)) or "nothing"})')
    problem, answer = record["problem"], record["answer"]
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError('"problem" must be a text that is not blank')
    if (
        isinstance(answer, bool)
        or not isinstance(answer, (str, int, float))
        or not str(answer).strip()
    ):
        raise ValueError('"answer" must be a text or a number')
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError('"answer" must be a text or a number that is finite')
    for name, low, high in (("pass_rate", 0, 1), ("level", float("-inf"), float("inf"))):
        value = record.get(name)
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise ValueError(
                f'"{name}" must be a number'
                + (f" in [{low}, {high}]" if name == "pass_rate" else "")
            )
    other = {
        k: v
        for k, v in record.items()
        if k not in ("id", "problem", "answer", "pass_rate", "level")
    }
    name = record.get("id")
    return Problem(
        str(default_id if name is None else name),
        problem,
        str(answer),
        record.get("pass_rate"),
        record.get("level"),
        other,
    )


def read_records(path, parse):
    """JSON lines of one file, each through parse(record, default id); errors name file and line."""
    path, records = Path(path), []
    try:
        text = (
            gzip.decompress(path.read_bytes()).decode("utf-8")
            if path.suffix == ".gz"
            else path.read_text(encoding="utf-8")
        )
        lines = text.split("\n")  # splitlines would also cut at U+2028, legal within a string
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
                if any("\ud800" <= c <= "\udfff" for c in json.dumps(record, ensure_ascii=False)):
                    raise ValueError("half a character (a lone surrogate, \\ud800 to \\udfff)")
                records.append(parse(record, f"{path.stem}-{number}"))
            except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{path}: nothing in it")
    return records


def read_problems(path):
    """Problems of a JSONL file of {"problem", "answer"}; optional id, pass_rate, level; other fields are kept.

    A name in BENCHMARKS, where there is no such file, stands for its usual data set on the hub.
    """
    if str(path) in BENCHMARKS and not Path(path).exists():
        return read_hub(str(path))
    problems = read_records(path, parse_problem)
    seen = set()
    for p in problems:
        if p.id in seen:
            raise ValueError(f"{path}: the id {p.id!r} stands twice")
        seen.add(p.id)
    return problems


BENCHMARKS = {  # name -> title, hub data set, configuration, split, its columns of problem and answer
    "aime24": ("AIME24", "HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "math500": ("MATH500", "HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "amc22_23": (
        "AMC",
        "AI-MO/aimo-validation-amc",
        None,
        "train",
        "problem",
        "answer",
    ),  # the 83 problems of the papers
    "amc23": ("AMC23-40", "math-ai/amc23", None, "test", "question", "answer"),  # 40 of them
    "minerva": ("Minerva", "math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": (
        "Olympiad",
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        "question",
        "final_answer",
    ),
}


def read_hub(name):
    """The problems of a benchmark from the hub. Answers come as texts, numbers (142.0) or lists of texts (["$1$", "$2$"])."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name}: reading the hub needs `pip install datasets`; or give a JSONL file"
        ) from error
    _, repository, configuration, split, problem, answer = BENCHMARKS[name]
    try:
        rows = load_dataset(repository, configuration, split=split)
    except Exception as error:  # the many errors of the hub, the network and the formats
        raise ValueError(
            f"{name}: cannot read {repository} from the hub ({type(error).__name__}: {error})"
        ) from error
    problems = []
    for i, row in enumerate(rows):
        missing = [column for column in (problem, answer) if column not in row]
        if missing:
            raise ValueError(
                f"{name}: {repository} has no column {missing[0]!r} (has: {', '.join(row)})"
            )
        value = row[answer]
        value = (
            ", ".join(str(v).strip().strip("$") for v in value)
            if isinstance(value, list)
            else value
        )
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        try:
            problems.append(
                parse_problem(
                    {"problem": row[problem], "answer": value, "level": row.get("level")},
                    f"{name}-{i}",
                )
            )
        except ValueError as error:
            raise ValueError(f"{name}, row {i} of {repository}: {error}") from error
    return problems


def squash(text):
    return " ".join(text.split())


def without_repeats(problems):
    """The first of every set of problems that are equal but for blanks."""
    return list({squash(p.problem): p for p in reversed(problems)}.values())[::-1]


NEAR_WORDS, NEAR_JACCARD, NEAR_SHARE = 8, 0.7, 0.9


def overlap(train, evaluation):
    """Evaluation problems that training problems repeat: (exact, near), lists of pairs of ids (evaluation, training).

    exact: equal in their letters, digits and signs of arithmetic; case, dots and blanks aside.
    near: of the 8-grams of words, a Jaccard index of 0.7, or 90 % of the evaluation problem's in the training problem.
    Copies with other figures are found, paraphrases are not.
    """
    squeezed, grams = {}, {}
    for e in evaluation:
        squeezed.setdefault(bare(e.problem), []).append(e)
        for gram in ngrams(e.problem):
            grams.setdefault(gram, []).append(e.id)
    sizes = {e.id: len(ngrams(e.problem)) for e in evaluation}
    exact, near = {}, {}
    for t in train:
        for e in squeezed.get(bare(t.problem), ()):
            exact.setdefault(e.id, t.id)
        own = ngrams(t.problem) if grams else set()
        for name, shared in Counter(name for gram in own for name in grams.get(gram, ())).items():
            if (
                shared >= NEAR_JACCARD * (len(own) + sizes[name] - shared)
                or shared >= NEAR_SHARE * sizes[name]
            ):
                near.setdefault(name, t.id)
    return list(exact.items()), [pair for pair in near.items() if pair[0] not in exact]


def bare(text):
    return re.sub(r"[^\w+\-*/=<>^]", "", text).lower()


def ngrams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NEAR_WORDS]) for i in range(len(words) - NEAR_WORDS + 1)}


# ---------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    tokens: list  # ids
    opening: str  # "<think>" if the template opened one that the completion has to close, else ""


def render(tokenizer, problem, examples=(), suffix=SUFFIX):
    """A problem as the policy sees it, in training and evaluation alike: worked examples, then the problem.

    examples  records {"problem", "solution"}, shown as earlier turns of the chat
    suffix    what is put behind every problem
    """
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": example["problem"] + suffix})
        turns.append({"role": "assistant", "content": example["solution"]})
    turns.append({"role": "user", "content": problem.problem + suffix})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(
        problem, tokens, "<think>" if text.rfind("<think>") > text.rfind("</think>") else ""
    )


def parse_example(record, _):
    if not isinstance(record, dict) or not all(
        isinstance(record.get(k), str) for k in ("problem", "solution")
    ):
        raise ValueError('a worked example needs the texts "problem" and "solution"')
    return record


# ----------------------------------------------------------------------------------------------------------- levels


def difficulty(problem, kind):
    """pass_rate: 1 - pass rate of the policy that measured it, in [0, 1]; level: the declared number. None: unknown."""
    if kind == "level":
        return problem.level
    return None if problem.pass_rate is None else 1 - problem.pass_rate


def cut_levels(problems, qualities, kind):
    """Cut problems at the thresholds Q_l: level l takes difficulty in (the next lower threshold, Q_l].

    The lowest bin of a measured difficulty starts just above 0: what is always solved teaches nothing.
    Returns one list per level, in the order of `qualities`, and the counts of what belongs to none.
    """
    floor = 0.0 if kind == "pass_rate" else float("-inf")
    bounds = sorted({floor, *qualities})
    lower = {high: low for low, high in zip(bounds, bounds[1:])}
    levels = [[] for _ in qualities]
    left_out = {"unmeasured": 0, "always solved": 0, "too hard": 0}
    for p in problems:
        d = difficulty(p, kind)
        if d is None:
            left_out["unmeasured"] += 1
        elif d <= floor:
            left_out["always solved"] += 1
        elif d > bounds[-1] + 1e-9:
            left_out["too hard"] += 1
        for level, q in zip(levels, qualities):
            if (
                d is not None and q > floor and lower[q] + 1e-9 < d <= q + 1e-9
            ):  # 1 - 0.2 is not quite 0.8
                level.append(p)
    return levels, left_out


def endless(items, *seed):
    """Every item once per epoch, each epoch in a new order; to resume: same seed, skip what was drawn."""
    assert items, "no problem to draw from: cut_levels' caller must refuse an empty level"
    for epoch in itertools.count():
        order = list(items)
        random.Random("/".join(map(str, (*seed, epoch)))).shuffle(order)
        yield from order


# -------------------------------------------------------------------------------------------------------- generator
# Problems whose solutions take 2 to 6 steps. A step is an equation that a small model can learn to do at once.


def expression(rng):
    """A sum of numbers and one-digit products, e.g. 12+6*7-9: the products first, then from left to right."""
    num_steps, terms, steps = rng.randint(2, 6), [], []
    num_products = rng.randint(0, min(2, num_steps - 1))
    products = [False] * (num_steps - num_products + 1 - num_products) + [True] * num_products
    rng.shuffle(products)
    total, text = 0, ""
    for i, product in enumerate(products):
        a, b = (rng.randint(2, 9), rng.randint(2, 9)) if product else (rng.randint(2, 99), 1)
        sign = "-" if i and total >= a * b and rng.random() < 0.5 else "+" if i else ""
        name = f"{a}*{b}" if product else str(a)
        text += sign + name
        if product:
            steps.append(f"{name}={a * b}")
        if i:
            after = total - a * b if sign == "-" else total + a * b
            terms.append(f"{total}{sign}{a * b}={after}")
            total = after
        else:
            total = a * b
    return text, steps + terms, total


def product(rng):
    """A number times one digit, by parts, and one number more, e.g. 47*6-85: 40*6=240;7*6=42;240+42=282;282-85=197."""
    n, b, c = (
        rng.choice((rng.randint(11, 99), rng.randint(101, 999))),
        rng.randint(2, 9),
        rng.randint(11, 99),
    )
    parts = [
        int(digit) * 10**i
        for i, digit in reversed(list(enumerate(reversed(str(n)))))
        if digit != "0"
    ]
    if len(parts) < 2:
        return product(rng)
    steps, total = [f"{part}*{b}={part * b}" for part in parts], parts[0] * b
    for part in parts[1:]:
        steps.append(f"{total}+{part * b}={total + part * b}")
        total += part * b
    c = -c if total >= c and rng.random() < 0.5 else c
    return f"{n}*{b}{c:+d}", [*steps, f"{total}{c:+d}={total + c}"], total + c


def equation(rng):
    """A linear equation in x with a whole solution, e.g. 5x-8=2x+19: 3x-8=19;3x=27;x=9."""
    x, a, b = rng.randint(2, 20), rng.randint(2, 9), rng.randint(1, 30)
    b = -b if rng.random() < 0.5 else b
    shape = rng.randint(0, 2)
    steps, right = [f"{a}x={a * x}", f"x={x}"], a * x + b
    if right == 0:
        return equation(rng)
    line = f"{a}x{b:+d}={right}"
    if shape == 0 and right > 0:
        return line, steps, x
    c = rng.randint(1, 5)
    steps = [line] + steps
    both = f"{a + c}x{b:+d}={c if c > 1 else ''}x{right:+d}"
    if shape == 1 or b % (a + c):
        return both, steps, x
    return f"{a + c}(x{b // (a + c):+d})={c if c > 1 else ''}x{right:+d}", [both] + steps, x


FAMILIES = {"expression": expression, "product": product, "equation": equation}


def generate(split, seed, repeats=False):
    """Endless problems of one split, each with its worked solution in other["steps"]; different ones, unless repeats.

    A problem's text decides its split (one in eight is held out), so the two never share a problem, whatever the seed.
    """
    assert split in ("train", "heldout"), split
    rng, seen = random.Random(f"{split}/{seed}"), set()
    for number in itertools.count():
        family = rng.choice(sorted(FAMILIES))
        text, steps, answer = FAMILIES[family](rng)
        held_out = zlib.crc32(text.encode()) % 8 == 0
        if held_out == (split == "heldout") and (repeats or text not in seen):
            seen.add(text)
            yield Problem(
                f"{split}-{number}", text, str(answer), other={"family": family, "steps": steps}
            )


def print_overlap(train_file, evaluation_files):
    """One line a file, and one for every pair found."""
    train = read_problems(train_file)
    for path in evaluation_files:
        evaluation = read_problems(path)
        exact, near = overlap(train, evaluation)
        print(
            f"{path}: {len(exact)} of {len(evaluation)} problems stand in {train_file}, {len(near)} nearly ({NEAR_WORDS}-grams)"
        )
        for kind, pairs in (("exact", exact), ("near", near)):
            for ours, theirs in pairs:
                print(f"  {kind}: {ours} = {theirs}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Generate problems, one JSON object a line; or look for overlap."
    )
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSONL file to write")
    parser.add_argument(
        "--overlap",
        nargs="+",
        metavar="FILE",
        help="a training file, then evaluation files or benchmark names",
    )
    args = parser.parse_args(arguments)
    if args.overlap:
        if len(args.overlap) < 2:
            parser.error("--overlap needs a training file and at least one evaluation file")
        try:
            return print_overlap(args.overlap[0], args.overlap[1:])
        except ValueError as error:
            parser.error(str(error))
    if not args.out:
        parser.error("--out FILE: where to write the problems")
    if Path(args.out).exists():
        parser.error(f"--out {args.out}: exists already; name another file")
    with open(args.out, "x", encoding="utf-8") as file:
        for p in itertools.islice(generate(args.split, args.seed), args.count):
            file.write(json.dumps(p.record(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
