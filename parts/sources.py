"""Problems as others publish them: where they are read from, and the columns that they come in.

A name is a JSON-lines file, a parquet file, or a data set of the hub,
OWNER/NAME[:CONFIGURATION]:SPLIT (OWNER/NAME@REVISION pins it). The last two need
`pip install datasets`.
"""

import json
import re

from answers import extract_answer
from parts.files import is_text

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
    columns = dict(word.partition("=")[::2] for word in words if word.partition("=")[2])
    if words and not {"problem", "answer"} <= columns.keys() <= {
        "id",
        "problem",
        "answer",
        "level",
    }:
        raise ValueError(
            f"--columns {' '.join(words)}: expected problem=NAME answer=NAME, and level=NAME or "
            "id=NAME if there are such columns"
        )
    return columns


def column(record, name):
    """The field b within a for "a.b"; None if there is none."""
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def find_layout(record, columns):
    """{our name: the name of the column}, those that are given if the record has them."""
    layouts = [dict(zip(("problem", "answer"), names.split())) for names in LAYOUTS]
    for layout in [columns, *layouts]:
        if layout and all(column(record, name) is not None for name in layout.values()):
            return layout
    raise ValueError(
        f"no problem and answer in columns that are known (has: {', '.join(record)}): name them "
        "with --columns problem=NAME answer=NAME"
    )


def in_our_columns(record, columns):
    """-> the record with our names for its columns, and the names that they had"""
    layout = find_layout(record, columns)
    ours = dict(record)
    for theirs in layout.values():
        ours.pop(theirs.partition(".")[0], None)
    ours |= {name: column(record, theirs) for name, theirs in layout.items()}
    if isinstance(ours["problem"], list):
        ours["problem"] = last_question(ours["problem"])
    if columns or list(layout.values()) != ["problem", "answer"]:
        ours["answer"] = final_answer(ours["answer"])
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
    """What a published answer comes down to: the text behind ####, that of the last box, the items
    of a list."""
    if isinstance(answer, list) and all(map(is_text, answer)):
        return ", ".join(text.strip().strip("$") for text in answer)
    if not isinstance(answer, str):
        return answer
    if answer.startswith('["'):  # Skywork's
        return final_answer(json.loads(answer))
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    boxed = extract_answer(answer) if "\\boxed" in answer else None
    return boxed or answer
