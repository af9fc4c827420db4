"""Problems in, prompts out: one reader, one prompt template, levels of difficulty, their order.

Problems come from a JSON-lines file, a parquet file, or a data set of the hub,
OWNER/NAME[:CONFIGURATION]:SPLIT (OWNER/NAME@REVISION pins it). The last two need
`pip install datasets`. A slice may follow: F.jsonl[:512], OWNER/NAME:SPLIT[100:200].
"""

import json
import math
import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import answers
from common.files import (
    explained,
    is_text,
    read_records,
    source_of,
    squash,
    stem,
    write_records,
)
from common.flags import flag

# Of DeepScaleR and FastCuRL. Their evaluations put a blank before it (recipes/eval-*.args).
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
SUFFIX = f"\n{INSTRUCTION}"  # put behind every problem


# --------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: object  # for the verifier a text or a number, for one's own R_l anything
    pass_rate: float | None = None  # of the policy that measured it, in [0, 1]
    level: float | None = None  # difficulty declared by the source
    other: dict = field(default_factory=dict, compare=False)  # further fields, kept as they are

    @property
    def gold(self):
        """The answer as the verifier reads it, a text: 142.0 is 142."""
        whole = isinstance(self.answer, float) and self.answer.is_integer()
        return str(int(self.answer) if whole else self.answer)

    def record(self):
        """The JSON object that read_problems reads back."""
        known = {k: v for k, v in vars(self).items() if k != "other" and v is not None}
        return known | self.other


def parse_problem(record, default_id, graded=True):
    """One JSON object to a Problem; raises ValueError saying what is wrong with it."""
    other = dict(record)
    name, problem, answer, pass_rate, level = (
        other.pop(key, None) for key in ("id", "problem", "answer", "pass_rate", "level")
    )
    if not is_text(problem):
        raise ValueError('"problem" must be a text that is not blank')
    if graded:
        answer = "" if answer is None else answer  # see only_gradable
        if not isinstance(answer, str) and not is_number(answer):
            raise ValueError('"answer" must be a text or a number that is finite')
    with explained('"answer" must be something that JSON can hold'):
        json.dumps(answer)  # as the records of completions hold it
    if pass_rate is not None and not (is_number(pass_rate) and 0 <= pass_rate <= 1):
        raise ValueError('"pass_rate" must be a number in [0, 1]')
    if isinstance(level, str):
        digits = level.removeprefix("Level ")  # as MATH has it
        if digits.isdecimal():
            level = int(digits)
        else:  # "easy", or MATH's "Level ?": what only its data set knows
            other["level"], level = level, None
    if level is not None and not (is_number(level) and abs(level) < 1e308):
        raise ValueError('"level" must be a number')
    name = default_id if name is None else name
    return Problem(str(name), problem, answer, pass_rate, level, other)


def is_number(value):
    """A finite one. To Python True is an integer, and its JSON reader lets NaN pass."""
    return type(value) in (int, float) and abs(value) < math.inf


def read_problems(name, columns=(), must_fit=False, graded=True):
    """Problems of a file or data set (see above) with columns of problem and answer and, if known,
    id, pass_rate, level. A benchmark has a short name.

    columns   of --columns, e.g. ["problem=q", "answer=a"]; else by the known layouts
    must_fit  whether a file that lacks these columns is refused, known or not
    graded    whether answers are for the verifier: else they may be missing, or of any kind
    """
    source, rows = parse_name(str(name))
    columns, layouts = parse_columns(columns), Counter()
    if source in BENCHMARKS:
        columns = {}

    def parse(record, default_id):
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        record, layout = in_our_columns(record, columns, must_fit, graded)
        layouts[" and ".join(layout)] += 1
        return parse_problem(record, default_id, graded)

    where, local = BENCHMARKS.get(source, source), Path(source).exists()
    if where.endswith(".parquet") or (":" in where and not local):
        problems = []
        with explained(f"{name}: cannot be read as {where}"):
            chosen = islice(enumerate(load_rows(where)), rows.start, rows.stop)
        for number, row in chosen:
            with explained(f"{name}, row {number}"):
                problems.append(parse(row, f"{stem(source)}-{number}"))
    else:
        problems = read_records(source, parse, rows)
    if not problems:
        raise ValueError(f"{name}: nothing in it")
    twice, times = Counter(p.id for p in problems).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name}: the id {twice!r} stands twice")
    tqdm.write(f"{name}: {len(problems)} problems, columns {'; '.join(layouts)}")
    return problems


MOST_UNGRADABLE = 0.01  # share of a file's gold answers


def only_gradable(name, problems):
    """-> the problems whose gold answer other answers can be compared with; the others are listed.
    Raises ValueError where they are many: then a column of something else was read."""
    good, bad = [], []
    for p in problems:
        (good if answers.gradable(p.gold) else bad).append(p)
    seen = "; ".join(f"{p.id!r}: {squash(p.gold)[-60:]!r}" for p in bad[:5])
    words = f"{name}: {len(bad)} of {len(problems)} gold answers cannot be graded ({seen})"
    if len(bad) > MOST_UNGRADABLE * len(problems):
        raise ValueError(
            f"{words}: name the column of final answers, --columns problem=NAME answer=NAME (of "
            "named columns, the text in the last box or behind #### is taken)"
        )
    if bad:
        tqdm.write(words)
    return good


def write_problems(path, problems):
    """Write what read_problems reads. Raises FileExistsError: a file is never replaced."""
    write_records(path, (p.record() for p in problems), "x")


def without_repeats(problems):
    """The first of every set of problems that are equal but for blanks."""
    first = {}
    for p in problems:
        first.setdefault(squash(p.problem), p)
    return list(first.values())


# --------------------------------------------------------------------------------------- columns

# name: data set of the hub
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "amc22_23": "AI-MO/aimo-validation-amc:train",  # the 83 problems of the papers
    "amc23": "math-ai/amc23:test",  # 40 of them
    "minerva": "math-ai/minervamath:test",
    "olympiadbench": "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train",
}

# The columns of problem and answer; a.b is the field b within a. The first that fits is taken.
LAYOUTS = [
    dict(zip(("problem", "answer"), names.split()))
    for names in (
        "problem answer",  # ours, MATH-500, DeepScaleR, Big-Math
        "problem solution",  # MATH, the answer in the last box
        "question answer",  # GSM8K, the answer behind ####
        "question final_answer",  # OlympiadBench
        "prompt reward_model.ground_truth",  # DAPO, Skywork: chat turns
    )
]
# DAPO's prompts put this around a problem. It asks for another form of answer than our box.
DAPO_FRAME = re.compile(
    r"^Solve the following math problem step by step\..*?\n\n|\n\nRemember to put your answer.*",
    re.S,
)


def parse_name(name):
    """F.jsonl[100:200] -> F.jsonl, slice(100, 200).  Raises ValueError"""
    source = source_of(name)
    found = re.fullmatch(r"\[(\d*):(\d*)\]", name[len(source) :] or "[:]")
    if not found:
        raise ValueError(f"{name}: a slice is written [:512] or [100:200], rows counted from 0")
    return source, slice(*(int(number) if number else None for number in found.groups()))


def load_rows(name):
    """The records of a parquet file or of a data set of the hub."""
    from datasets import load_dataset

    if name.endswith(".parquet"):
        return load_dataset("parquet", data_files=name, split="train")
    repository, *configuration, split = name.split(":")
    repository, _, revision = repository.partition("@")
    return load_dataset(repository, *configuration, split=split, revision=revision or None)


def parse_columns(words):
    """["problem=q", "answer=a"] -> {"problem": "q", "answer": "a"}"""
    columns = dict(word.partition("=")[::2] for word in words)
    needed = columns.keys() - {"id", "level", "pass_rate"}
    if words and (needed | {"answer"} != {"problem", "answer"} or "" in columns.values()):
        raise ValueError(
            f"--columns {' '.join(words)}: expected problem=NAME answer=NAME, and level=NAME, "
            "pass_rate=NAME or id=NAME if there are such columns"
        )
    return columns


def column(record, name):
    """The field of that name, or else b within a for "a.b"; ... if there is none."""
    if not isinstance(record, dict):
        return ...
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    return column(record.get(outer), inner) if inner else ...


def find_layout(record, columns, must_fit, graded):
    """{our name: the name of the column that the record has}. The first layout that fits is taken,
    of those with an answer that is not null, if there are any.

    columns   those that are given
    must_fit  raise ValueError if it lacks one of them; else a known layout serves too, and columns
              beside problem and answer may be missing
    graded    whether it needs an answer, if only null
    """
    if columns and must_fit:
        for name in columns.values():
            if column(record, name) is ...:
                raise ValueError(
                    f"no column {name} (has: {', '.join(record)}): mend --columns, or leave it out "
                    "if the layout is one of docs/data.md"
                )
        return columns
    fits = []
    for layout in filter(None, [columns, *LAYOUTS]):
        question, answer = (column(record, layout.get(name, "")) for name in ("problem", "answer"))
        if question not in (None, ...) and not (graded and answer is ...):
            fits.append((answer in (None, ...), layout))  # graded, null: see only_gradable
    if fits:
        _, layout = min(fits, key=lambda fit: fit[0])
        return {
            name: theirs for name, theirs in layout.items() if column(record, theirs) is not ...
        }
    raise ValueError(
        f"no problem and answer in columns that are known (has: {', '.join(record)}): name them "
        "with --columns problem=NAME answer=NAME"
    )


def in_our_columns(record, columns, must_fit, graded):
    """-> the record with our names for its columns, and the names that they had"""
    layout = find_layout(record, columns, must_fit, graded)
    # What stands inside another column stays there, too.
    ours = {name: value for name, value in record.items() if name not in layout.values()}
    ours |= {name: column(record, theirs) for name, theirs in layout.items()}
    if isinstance(ours["problem"], list):
        ours["problem"] = last_question(ours["problem"])
    worked = ours.get("answer")
    foreign = columns or not {"problem", "answer"} >= set(layout.values())
    if foreign and (graded or isinstance(worked, str)):
        ours["answer"] = final_answer(worked)
        if "####" in str(worked) or "\\boxed" in str(worked):
            ours.setdefault("solution", worked)
    return ours, layout.values()


def last_question(turns):
    """The text of a chat's last user turn, or what is there instead."""
    asked = turns
    for turn in turns:
        if column(turn, "role") == "user":
            asked = turn.get("content")
    return DAPO_FRAME.sub("", asked) if isinstance(asked, str) else asked


def final_answer(answer):
    """What a published answer comes down to: the text of the last box, the line behind ####, the
    items of a list."""
    if isinstance(answer, list) and all(map(is_text, answer)):
        return ", ".join(text.strip().strip("$") for text in answer)
    if not isinstance(answer, str):
        return answer
    if answer.startswith('["'):  # Skywork's
        return final_answer(json.loads(answer))
    if "\\boxed" in answer and (boxed := answers.extract_answer(answer)):
        return boxed
    if "####" in answer:
        return answer.rpartition("####")[2].strip().partition("\n")[0]
    return answer


# ---------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompting:
    """How a problem becomes a prompt, and what ends a completion: flags of train.py and eval.py."""

    title = "prompts"

    examples: str | None = flag(
        "JSONL of worked examples {problem, solution} to put in front of every problem; default: "
        "none [ours]"
    )
    suffix: str = flag(
        f"text behind every problem; default a new line and: {INSTRUCTION} [DeepScaleR]", SUFFIX
    )
    template: str | None = flag(
        "file of a Jinja chat template, by default the tokenizer's own or a plain one; "
        "checkpoints keep it [ours]"
    )
    template_kwargs: str = flag(
        "JSON object for the chat template, such as '{\"enable_thinking\": false}' [ours]", "{}"
    )
    stop: list[str] = flag(
        "further tokens that end a completion, as text, one token each [ours]", []
    )


def read_prompting(flags):
    """Prompting, or flags that hold it -> keyword arguments of `render`. Raises ValueError"""
    with explained(f"--template-kwargs {flags.template_kwargs}: not a JSON object"):
        template = dict(json.loads(flags.template_kwargs))
    examples = read_records(flags.examples, parse_example) if flags.examples else []
    if flags.template:
        with explained(f"--template {flags.template}: cannot be read as a chat template"):
            template["chat_template"] = Path(flags.template).read_text(encoding="utf-8")
    return {"examples": examples, "suffix": flags.suffix, "template": template}


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    tokens: list  # ids
    opening: str  # "<think>" if the template opened one that the completion has to close, else ""


# Of a base model whose tokenizer has no chat template: every turn ends its line.
PLAIN_TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"


def with_bos(tokenizer, template):
    """A template that is not the tokenizer's own. Where the tokenizer begins any text with its BOS,
    as that of a Llama base, so does the template: the model has seen no text without."""
    adds_bos = tokenizer.encode("1")[:1] == [tokenizer.bos_token_id]
    if adds_bos and "bos_token" not in template and tokenizer.bos_token not in template:
        return "{{ bos_token }}" + template
    return template


# Llama 3.2 writes the day into every prompt, and tomorrow's prompts would be others. This is the
# day that its template takes where there is no clock.
TODAY = {"date_string": "26 Jul 2024"}


def render(tokenizer, problem, examples=(), suffix=SUFFIX, template={}):  # noqa: B006
    """A problem as the policy sees it, in training and evaluation alike.

    examples  records {"problem", "solution"}, shown before it as earlier turns of the chat
    suffix    what is put behind every problem
    template  what the chat template takes, by name
    """
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": example["problem"] + suffix})
        turns.append({"role": "assistant", "content": example["solution"]})
    question = problem.problem + suffix
    turns.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, **TODAY | template
    )
    tokens = tokenizer.encode(text, add_special_tokens=False)
    # Only what the template put behind the problem: that may speak of <think> itself.
    behind = text.rpartition(question.strip())[2]
    opening = "<think>" if behind.rfind("<think>") > behind.rfind("</think>") else ""
    return Prompt(problem, tokens, opening)


def parse_example(record, _):
    match record:
        case {"problem": str(), "solution": str()}:
            return record
    raise ValueError('a worked example needs the texts "problem" and "solution"')


# ----------------------------------------------------------------------------------------- levels


def difficulty(problem, kind):
    """By kind: "pass_rate": 1 - pass rate, in [0, 1]; "level": as declared. None: unknown."""
    if kind == "level":
        return problem.level
    return None if problem.pass_rate is None else 1 - problem.pass_rate


def cut_levels(problems, qualities, kind):
    """Cut problems at the thresholds Q_l: level l takes difficulty in (next lower threshold, Q_l].

    The lowest bin of a measured difficulty starts just above 0: what is always solved teaches
    nothing.

    -> {number of a level from 1, in the order of `qualities`: problems}, counts of those that
    belong to none
    """
    floor = 0.0 if kind == "pass_rate" else -math.inf
    bounds = sorted({floor, *qualities, math.inf})
    bins = defaultdict(list)  # by upper bound; None: unknown
    for p in problems:
        bound = difficulty(p, kind)
        if bound is not None:
            bound = bounds[bisect_left(bounds, bound - 1e-9)]  # 1 - 0.2 is not quite 0.8
        bins[bound].append(p)
    left_out = {
        "unmeasured": len(bins[None]),
        "always solved": len(bins[floor]),
        "too hard": len(bins[math.inf]),
    }
    return {number: bins[q] for number, q in enumerate(qualities, 1)}, left_out


def cut_by_difficulty(name, problems, qualities, kind):
    """Return what `cut_levels` does, or {None: all problems} where nothing is known of their
    difficulty.  name  of their file
    """
    if all(difficulty(p, kind) is None for p in problems):
        tqdm.write(f"{name}: no problem has a {kind}, so they are one set")
        return {None: problems}, {}
    return cut_levels(problems, qualities, kind)


def name_level(row):
    """Of a line of eval.jsonl: its level. If there are several held-out files, the file stands
    before it."""
    name = "all problems" if row["level"] is None else f"level {row['level']}"
    return f"{row['file']}, {name}" if "file" in row else name


def level_names(problems, qualities):
    """{problem id: "level 1"}. Levels that are declared, without qualities or without pass rates,
    are called "declared 1", since one level of a run may hold several of them."""
    if not qualities or all(p.pass_rate is None for p in problems):
        return {p.id: f"declared {p.level:g}" for p in problems if p.level is not None}
    levels, _ = cut_levels(problems, qualities, "pass_rate")
    names = {}
    for number, level in levels.items():
        for p in level:
            names.setdefault(p.id, f"level {number}")  # levels may share their problems
    return names


@dataclass
class Order:
    """In which order a level's prompts are drawn: every prompt once per epoch, in a new random
    order each time. `drawn` is all its state."""

    prompts: list
    seed: str
    drawn: int = 0

    def shuffled(self, epoch):
        prompts = list(self.prompts)
        random.Random(f"{self.seed}/{epoch}").shuffle(prompts)
        return prompts

    def draw(self, count):
        """-> the next prompts"""
        epoch, first = divmod(self.drawn, len(self.prompts))
        chosen = self.shuffled(epoch)[first:]
        while len(chosen) < count:
            epoch += 1
            chosen += self.shuffled(epoch)
        self.drawn += count
        return chosen[:count]
