"""Problems as others publish them: where they are read from, and the columns that they come in.

A name is a JSON-lines file, a parquet file, or a data set of the hub,
OWNER/NAME[:CONFIGURATION]:SPLIT (OWNER/NAME@REVISION pins it). The last two need
`pip install datasets`. A slice may follow: F.jsonl[:512], OWNER/NAME:SPLIT[100:200].
"""

import json
import re

from answers import extract_answer
from files import explained, is_text, source_of

# name: data set on the hub, see above
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "amc22_23": "AI-MO/aimo-validation-amc:train",  # the 83 problems of the papers
    "amc23": "math-ai/amc23:test",  # 40 of them
    "minerva": "math-ai/minervamath:test",
    "olympiadbench": "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train",
}

# The columns of problem and answer; a.b is the field b within a. The first that fits is taken.
LAYOUTS = (
    "problem answer",  # ours, MATH-500, DeepScaleR, Big-Math
    "problem solution",  # MATH, the answer in the last box
    "question answer",  # GSM8K, the answer behind ####
    "question final_answer",  # OlympiadBench
    "prompt reward_model.ground_truth",  # DAPO, Skywork: chat turns
)
# DAPO's prompts put this around a problem. It asks for another form of answer than our box.
DAPO_FRAME = re.compile(
    r"^Solve the following math problem step by step\..*?\n\n|\n\nRemember to put your answer.*",
    re.S,
)


def parse_name(name):
    """F.jsonl[100:200] -> F.jsonl, slice(100, 200).  Raises ValueError"""
    source = source_of(name)
    text = name[len(source) :] or "[:]"
    with explained(f"{name}: a slice is written [:512] or [100:200], rows counted from 0"):
        first, end = (int(number) if number else None for number in text[1:-1].split(":"))
        if min(first or 0, end or 0) < 0:
            raise ValueError("a data set of the hub has no end to count from")
        return source, slice(first, end)


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


def column(record, name, missing=None):
    """The field of that name, or else b within a for "a.b"; `missing` if there is none."""
    if not isinstance(record, dict):
        return missing
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    return column(record.get(outer), inner, missing) if inner else missing


def find_layout(record, columns, must_fit, graded):
    """{our name: the name of the column}, those that are given if the record has them.

    must_fit  raise ValueError if it lacks one of them; else a known layout serves too, and columns
              beside problem and answer may be missing
    graded    whether it needs an answer
    """
    needed = "problem", "answer"
    if columns and must_fit:
        for name in columns.values():
            if column(record, name, ...) is ...:
                raise ValueError(
                    f"no column {name} (has: {', '.join(record)}): mend --columns, or leave it out "
                    "if the layout is one of docs/data.md"
                )
        return columns
    known = [dict(zip(needed, names.split())) for names in LAYOUTS]
    for layout in [columns, *known]:
        if layout and all(column(record, layout.get(name, "")) is not None for name in needed):
            return layout
    for layout in [columns, *known]:  # an answer that is null cannot be graded: see only_gradable
        question, answer = (column(record, layout.get(name, ""), ...) for name in needed)
        if question not in (None, ...) and answer is None:
            return layout
    if not graded and column(record, columns.get("problem", "problem")) is not None:
        return {"problem": "problem"} | columns
    raise ValueError(
        f"no problem and answer in columns that are known (has: {', '.join(record)}): name them "
        "with --columns problem=NAME answer=NAME"
    )


def in_our_columns(record, columns, must_fit, graded):
    """-> the record with our names for its columns, and the names that they had"""
    layout = find_layout(record, columns, must_fit, graded)
    ours = dict(record)
    for theirs in layout.values():  # what stands inside another column stays there, too
        ours.pop(theirs, None)
    for name, theirs in layout.items():
        value = column(record, theirs, ...)
        if value is not ...:  # --columns may name columns of --data that --eval-data lacks
            ours[name] = value
    if isinstance(ours["problem"], list):
        ours["problem"] = last_question(ours["problem"])
    foreign = columns or not {"problem", "answer"} >= set(layout.values())
    if foreign and (graded or isinstance(ours.get("answer"), str)):
        worked = ours.get("answer")
        ours["answer"] = final_answer(worked)
        if "####" in str(worked) or "\\boxed" in str(worked):
            ours.setdefault("solution", worked)
    level = str(ours.get("level"))
    if level.startswith("Level "):  # of MATH, a few are "Level ?"
        ours["level"] = int(level[6:]) if level[6:].isdecimal() else None
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
    boxed = extract_answer(answer) if "\\boxed" in answer else None
    if boxed or "####" not in answer:
        return boxed or answer
    return answer.rpartition("####")[2].strip().partition("\n")[0]
