"""Problems, prompts and levels: what goes in is checked, what comes out is the same every time."""

import itertools
import json
import re
import sys
from datetime import date
from types import SimpleNamespace

import sympy
from conftest import table, write_lines
from pytest import approx, mark, raises
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import data
from common.files import source_of, stem
from data import Order, Problem, cut_levels, read_problems, render
from experiments.problems import generate
from experiments.warmstart import make_tokenizer
from policy.checkpoint import SHIPPED, end_of_turn, stop_token
from rewards import load_reward


def test_a_problem_survives_a_round_trip(tmp_path):
    """With fields that we do not know, and with U+2028, legal within a string, where str.splitlines
    would cut the line."""
    record = {"id": "x", "problem": "a\u2028b\u0085c", "answer": "inf", "pass_rate": 0.25}
    record |= {"level": 3, "source": "me", "tags": [1, {"a": None}]}
    data.write_problems(tmp_path / "p.jsonl", [data.parse_problem(record, "default")])
    (problem,) = read_problems(tmp_path / "p.jsonl")
    assert problem.record() == record
    assert problem.other == {"source": "me", "tags": [1, {"a": None}]}


def test_an_unanswered_problem_is_left_out_of_many(tmp_path, printed):
    """One null among 300 rows refused the file."""
    rows = [{"problem": f"{i}", "answer": f"{i}"} for i in range(300)]
    rows[7]["answer"], rows[8]["level"], rows[9]["level"] = None, "easy", "3"
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)))  # as some editors begin a file
    problems = data.only_gradable("p", read_problems(path))
    assert "1 of 300 gold answers cannot be graded ('p-8': '')" in printed()
    assert len(problems) == 299 and [p.level for p in problems[7:9]] == [None, 3]
    assert problems[7].record()["level"] == "easy"


def test_what_an_answer_may_be():
    """400 digits, more than a float holds, were refused; 142.0, of amc22_23, was no answer that
    anybody gives; a date of a data set ended the run at the first line of completions.jsonl."""
    for answer, gold in ((10**400, str(10**400)), (142.0, "142")):
        assert data.parse_problem({"problem": "1", "answer": answer}, "p").gold == gold
    with raises(ValueError, match='"answer" must be something that JSON can hold .TypeError'):
        data.parse_problem({"problem": "q", "answer": date(2026, 1, 1)}, "p", graded=False)


def test_repeats_are_equal_but_for_blanks():
    texts = "What is  2N+n?", "What is 2N+n?", "Other", "What is 2n+N?"
    train = [Problem(str(i), text, "4") for i, text in enumerate(texts)]
    assert [p.id for p in data.without_repeats(train)] == ["0", "2", "3"]


# What others publish, or one's own columns -> what is kept of it.
DAPO = (
    r"Solve the following math problem step by step. The last line of your response should be of "
    r"the form Answer: $Answer.\n\nq\n\nmore\n\n"
    r"Remember to put your answer on its own line after \"Answer:\"."
)
LAYOUTS = r"""
{"question": "q", "answer": "9-2=<<9-2=7>>7 #### so 1,007 left.\n#### 1,007"} | |
{"answer": "1,007",
"solution": "9-2=<<9-2=7>>7 #### so 1,007 left.\n#### 1,007"}

{"question": "q", "answer": "so\n#### 110\nThe answer is: 110"} | |
{"answer": "110"}

{"question": "q", "answer": "#### Step 2\nso \\boxed{7}"} | |
{"answer": "7"}

{"problem": "q", "level": "Level 5", "solution": "so \\boxed{1}, or \\boxed{\\frac{1}{2}}."} | |
{"answer": "\\frac{1}{2}", "level": 5, "solution": "so \\boxed{1}, or \\boxed{\\frac{1}{2}}."}

{"problem": "q", "level": "Level ?", "solution": "\\boxed{3}"} | |
{"answer": "3", "level": "Level ?"}

{"problem": "q", "solution": "\\boxed{x}", "answer": "(3, \\pi)", "level": 2} | |
{"answer": "(3, \\pi)",
"level": 2}

{"problem": "q", "answer": "-\\frac{2}{3}", "solution": ""} | |
{"answer": "-\\frac{2}{3}"}

{"prompt": [{"role": "user", "content": "$DAPO"}], "reward_model": {"ground_truth": "34"}} | |
{"problem": "q\n\nmore", "answer": "34"}

{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "[\"[1,2)\"]"}} | |
{"answer": "[1,2)"}

{"prompt": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "so"},
{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "2"}} | |
{"answer": "2"}

{"question": "q", "final_answer": ["$1$", "$-1$"]} | |
{"answer": "1, -1"}

{"a": {"b": "q"}, "c": "so\n#### 2", "answer": "none", "hard": 3}
| problem=a.b answer=c level=hard |
{"answer": "2", "level": 3, "a": {"b": "q"}, "solution": "so\n#### 2", "hard": null}

{"question": "q", "answer": "1"}
| problem=a.b answer=c |
{"answer": "1"}

{"problem": "q", "answer": "so\n#### 3"}
| problem=problem answer=answer |
{"answer": "3"}

{"problem": "q", "answer": "1", "id": "x7", "level": 2}
| problem=problem answer=answer id=uid level=l |
{"answer": "1", "id": "x7", "level": 2}

{"a.b": "q", "rate.7b": 0.25, "a": {"b": "no"}, "x": {"y.z": "1", "tests": ["t"]}}
| problem=a.b answer=x.y.z pass_rate=rate.7b |
{"answer": "1", "pass_rate": 0.25, "a": {"b": "no"},
"x": {"y.z": "1", "tests": ["t"]}}
"""


LAYOUT_ROWS = [
    re.split(r"\s*\|\s+", row) for row in LAYOUTS.replace("$DAPO", DAPO).strip().split("\n\n")
]


def read_rows(tmp_path, *rows, columns=(), **more):
    write_lines(tmp_path / "p.jsonl", rows)
    return read_problems(tmp_path / "p.jsonl", columns, **more)


@mark.parametrize("row, columns, kept", LAYOUT_ROWS)
def test_layouts_as_they_are_published(row, columns, kept, tmp_path):
    """A rationale taken for the gold answer makes every right answer wrong. Worked solutions stay:
    a hint, or a reward, may want them. Held-out problems may come in another layout than the
    columns that are named, and keep their ids, and so their random numbers. A name with a dot is
    that of a column first, as flattened tables have them."""
    (p,) = read_rows(tmp_path, json.loads(row), columns=columns.split())
    kept = {"problem": "q"} | json.loads(kept)
    assert {name: p.record().get(name) for name in kept} == kept
    assert data.only_gradable("p", [p]) == [p]


def test_without_a_grader_answers_are_of_any_kind_and_may_be_missing(tmp_path):
    rows = {"problem": "q", "answer": ["$1$"]}, {"question": "r"}, {"problem": "s", "answer": None}
    problems = read_rows(tmp_path, *rows, graded=False)
    assert [(p.problem, p.answer) for p in problems] == [("q", ["$1$"]), ("r", None), ("s", None)]


@mark.parametrize(
    "columns, message",
    [
        ("problem=question answer=anwser", "line 1: no column anwser .has: question, answer"),
        ("problem=q answer=a", "line 1: no column q .* mend --columns"),
        ("problem=question answer=answer pass_rate=rate", "line 2: no column rate"),
    ],
)
def test_columns_that_training_problems_lack_are_refused(tmp_path, columns, message):
    """A known layout in their place trains on another column than the one that was named. A pass
    rate may be null: its problem was not measured."""
    rows = {"question": "q", "answer": "1", "rate": 0.5}, {"question": "r", "answer": "2"}
    words = columns.split()
    with raises(ValueError, match=message):
        read_rows(tmp_path, *rows, columns=words, must_fit=True)
    if "rate" in message:
        nulls = [{"rate": None} | row for row in rows]
        for problems in (
            read_rows(tmp_path, *rows, columns=words),
            read_rows(tmp_path, *nulls, columns=words, must_fit=True),
        ):
            assert [p.pass_rate for p in problems] == [0.5, None]


def test_a_slice_has_the_name_of_the_whole():
    """Else a slice of a benchmark has no problem in common with it."""
    for name in ("math500", "math500[:100]", "a/math500.jsonl[3:4]"):
        assert stem(name) == "math500"
    for split in ("train", "test"):  # of the hub: they were one
        assert stem(f"AI-MO/NuminaMath-1.5:{split}[:9]") == f"NuminaMath-1.5:{split}"
    assert stem("a/b:v0.1") != stem("a/b:v0.2")


@mark.parametrize(
    "answer", ["He has 42.\n#### 42", "so $\\boxed 14$", "(1, 2", " . ", "many words " * 9]
)
def test_golds_that_cannot_be_graded(answer, capsys):
    """Few are left out, aloud; many stop the run: a column of something else was read."""
    good = [Problem(str(i), "q", a) for i, a in enumerate(["1", "x+1", "two apples"] * 50)]
    bad = Problem("bad", "q", answer)
    assert data.only_gradable("f", [*good, bad]) == good
    assert "f: 1 of 151 gold answers cannot be graded ('bad': " in capsys.readouterr().out
    with raises(ValueError, match="f: 2 of 152 gold answers .* --columns"):
        data.only_gradable("f", [*good, bad, bad])


@mark.parametrize("name", ["p.jsonl", "set/p.parquet", "set:train"])
def test_a_slice_of_a_file(tmp_path, monkeypatch, name):
    """A problem keeps the id, and so the random streams, that it has in the whole file. A folder of
    parquet files is a data set, as `datasets` gives it, which is imported only then."""
    path = tmp_path / name
    rows = [{"question": str(i), "answer": "#### 1"} for i in range(6)]
    if name == "p.jsonl":
        lines = list(map(json.dumps, rows))
        path.write_text("\n".join([lines[0], "", *lines[1:5], "torn"]))
    else:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "set/p.parquet"))
    whole = read_problems(f"{path}[:5]")
    assert [(p.problem, p.answer) for p in whole] == [(i, "1") for i in "01234"]
    for text, part in (("[2:4]", whole[2:4]), ("[3:5]", whole[3:]), ("[:1]", whole[:1])):
        assert read_problems(f"{path}{text}") == part


NO_SLICES = """
[a:3] [:10%] [::2] [-2:] [:-1] | a slice is written
[1:1] [2:1] [9:] | nothing in it
"""


@mark.parametrize("texts, message", table(NO_SLICES))
def test_a_slice_that_is_none_is_refused(tmp_path, texts, message):
    """A data set of the hub has no end to count from."""
    write_lines(tmp_path / "p.jsonl", [{"problem": "1+1", "answer": "2"}])
    for text in texts.split():
        with raises(ValueError) as refusal:
            read_problems(f"{tmp_path}/p.jsonl{text}")
        assert f"p.jsonl{text}: {message}" in str(refusal.value)


def test_a_path_that_exists_is_no_slice(tmp_path):
    path = tmp_path / "p.jsonl[:1]"
    write_lines(path, [{"problem": text, "answer": "2"} for text in "ab"])
    assert [p.problem for p in read_problems(path)] == ["a", "b"]
    assert source_of(str(path)) == str(path)
    assert [p.problem for p in read_problems(f"{path}[1:]")] == ["b"]


def test_a_data_set_comes_from_the_hub_by_name(monkeypatch, tmp_path):
    """Repository, revision, configuration and split; benchmarks have short names; without
    `datasets`, an error that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises(ValueError, match="minerva.*datasets"):
        read_problems("minerva")
    rows = {
        ("AI-MO/aimo-validation-amc", None, "train", None): {"problem": "1+1", "answer": 2.0},
        ("o/gsm8k", "main", "test", "v2"): {"question": "1+1", "answer": "#### 2"},
        ("o/d-1.5", None, "train", None): {"question": "1+1", "answer": "#### 2"},
        ("math-ai/amc23", None, "test", None): {"q": "1"},
    }

    def load_dataset(name, configuration=None, *, split, revision):
        return [rows[name, configuration, split, revision]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_problems("amc22_23[:9]") == [Problem("amc22_23-0", "1+1", 2.0)]
    for name in ("o/gsm8k@v2:main:test", "o/d-1.5:train[:5]"):
        assert read_problems(name)[0].answer == "2"
    for name, message in (
        ("o/d-1.5:train[1:]", r"o/d-1.5:train\[1:\]: nothing in it"),
        ("amc23", "amc23, row 0.*has: q"),
        ("minerva", "math-ai/minervamath"),
    ):
        with raises(ValueError, match=message):
            read_problems(name)


# ----------------------------------------------------------------------------------------- levels


RATES = """
1.0 0.9 0.2 0.19 0.0 | 0.8 1.0 | 12,34 | always solved
1.0 0.9 0.2 0.19 0.0 | 1.0 0.8 | 34,12 | always solved
0.9 0.2 | 0.5 | 0 | too hard
0.5 nan | 1.0 1.0 | 0,0 | unmeasured
0.7 | 0.3 1.0 | 0, |
"""


@mark.parametrize("rates, qualities, expected, left_out", table(RATES))
def test_quality_is_an_upper_bound_of_difficulty(rates, qualities, expected, left_out):
    """Including Q, excluding the bound below; 1 - 0.7 is a little above 0.3. What is always solved
    belongs to no level. The order of Q is the order of levels, and equal thresholds share a bin."""
    rates = [None if rate == "nan" else float(rate) for rate in rates.split()]
    problems = [Problem(str(i), "", "0", pass_rate=rate) for i, rate in enumerate(rates)]
    levels, counts = cut_levels(problems, list(map(float, qualities.split())), "pass_rate")
    assert ",".join("".join(p.id for p in level) for level in levels.values()) == expected
    assert [name for name, count in counts.items() if count] == [left_out] * bool(left_out)


def test_declared_levels():
    problems = [Problem(str(n), "", "0", level=n) for n in (0, 1, 2, 3, None)]
    levels, counts = cut_levels(problems, [1, 3], "level")
    assert [[p.level for p in level] for level in levels.values()] == [[0, 1], [2, 3]]
    assert counts["unmeasured"] == 1


@mark.parametrize("sizes", [[35], [4] * 8 + [3], [13, 22]])
def test_the_order_is_seeded_and_covers_every_epoch(sizes):
    order, other, drawn = Order(range(10), "0/1"), Order(range(10), "0/2"), []
    for size in sizes:
        drawn += order.draw(size)
    assert all(sorted(drawn[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert drawn[:10] != drawn[10:20] and drawn != other.draw(35)
    assert drawn[:10] == [3, 6, 0, 5, 1, 2, 7, 8, 9, 4]  # what runs of earlier versions drew


# ---------------------------------------------------------------------------------------- prompts

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def template_tokenizer(template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def rendered(template, *examples):
    tokenizer = template_tokenizer(template)
    prompt = render(tokenizer, Problem("i", "1+1", "2"), examples)
    return tokenizer.decode(prompt.tokens), prompt.opening


def test_one_template_with_worked_examples_in_front():
    suffix = "\nLet's think step by step and output the final answer within \\boxed{}."
    example = {"problem": "2+2", "solution": "\\boxed{4}"}
    expected = f"<user>2+2{suffix}<assistant>\\boxed{{4}}<user>1+1{suffix}<assistant>"
    assert rendered(PLAIN, example) == (expected, "")


def test_a_tokenizer_that_begins_all_text_with_a_token_adds_none(tokenizer):
    """Llama's puts a BOS in front of any text, and its template has one: two of them are other
    prompts than those of its training. A stop of one token would be two."""
    many = template_tokenizer(PLAIN + "{{ '<|end|>' }}")
    before = render(many, Problem("i", "1", "1")).tokens
    bos = ("<|pad|>", tokenizer.pad_token_id)
    many.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[bos]
    )
    assert many.encode("1")[0] == tokenizer.pad_token_id
    assert render(many, Problem("i", "1", "1")).tokens == before
    assert stop_token(many, "\n") == stop_token(tokenizer, "\n")
    assert end_of_turn(many) == tokenizer.eos_token_id


def test_a_prompt_does_not_depend_on_the_day():
    """Llama 3.2 writes the day into it: a run that was resumed tomorrow had other prompts."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    dated += "{% endif %}{{ date_string }} {{ messages[-1].content }}"
    assert rendered(dated)[0].startswith("26 Jul 2024 1+1")


def test_an_end_of_turn_is_no_blank():
    """A tokenizer may have a new line among its added tokens: no answer would pass its first."""
    lines = template_tokenizer("{{ messages[-1].content }}{{ '\n' }}")
    lines.add_tokens("\n")
    assert end_of_turn(lines) is None
    lines.chat_template += "<|end|>"
    assert end_of_turn(lines) == lines.convert_tokens_to_ids("<|end|>")


def test_a_think_that_the_template_opens_must_be_closed():
    """Graded with the opening put back: an answer inside thoughts that never close is none."""
    assert rendered(PLAIN + "<think>\n")[1] == "<think>"
    assert rendered(PLAIN + "<think>\n\n</think>")[1] == ""
    about = Problem("i", "What does <think> mean?", "2")
    assert render(template_tokenizer(PLAIN), about).opening == ""  # else its box is never found
    assert render(template_tokenizer(PLAIN + "<think>"), about).opening == "<think>"


# -------------------------------------------------------------------------------------- generator


def test_generated_answers_and_steps_are_right():
    """Every answer and every step against sympy: a step adds the next number to the last total."""
    lengths = set()
    for p in itertools.islice(generate("train", 7), 300):
        total, steps = "", p.other["steps"]
        lengths.add(len(steps) + 1)
        for step in steps:
            left, _, right = step.partition("=")
            assert sympy.sympify(total + left) == int(right) and 0 <= int(right) <= 150
            total = right
        assert total == p.answer == str(sympy.sympify(p.problem))
    assert lengths == set(range(2, 9))


SHARES = r"""
52+38=90;-14=76;\boxed{76} | 3
52+38(2+8=10)=90;-14=76;\boxed{76} | 3
52+38=80;-14=76;\boxed{76} | 0
52+38=90;-14=84;\boxed{84} | 1
52+38=90;-14=76;\boxed{77} | 2
\boxed{76} | 0
 | 0
"""


@mark.parametrize("response, right", table(SHARES))
def test_the_process_reward_counts_the_steps_before_the_first_mistake(response, right):
    """Of two steps and the answer. Units are no step."""
    reward = load_reward(str(SHIPPED.parent / "examples/process.py:right_steps"))
    found = reward.function({"steps": ["52+38=90", "-14=76"], "answer": "76"}, response)
    assert found == approx(int(right) / 3)
