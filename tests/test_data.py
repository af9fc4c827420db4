"""Problems, prompts and levels: what goes in is checked, what comes out is the same every time."""

import gzip
import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import sympy
from transformers import PreTrainedTokenizerFast

import data
from data import (
    INSTRUCTION,
    Problem,
    cut_levels,
    endless,
    generate,
    overlap,
    parse_example,
    read_problems,
    read_records,
    render,
    without_repeats,
)
from tools.warmstart import make_tokenizer

GOOD = '{"problem": "1+1", "answer": "2"}'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "nothing in it"),
        (GOOD + "\n{oops", "line 2"),
        (GOOD + "\n[1]", "line 2: expected a JSON object"),
        ('{"problem": "1+1"}', 'line 1: no "answer"'),
        ('{"problem": " ", "answer": "2"}', "line 1.*blank"),
        ('{"problem": "1+1", "answer": null}', "line 1.*answer"),
        ('{"problem": "1+1", "answer": "2", "pass_rate": 1.5}', r"line 1.*pass_rate.*\[0, 1\]"),
        ('{"problem": "1+1", "answer": "2", "pass_rate": NaN}', "line 1.*pass_rate"),
        ('{"problem": "1+1", "answer": "2", "level": "two"}', "line 1.*level"),
        (
            '{"id": "a", "problem": "1+1", "answer": "2"}\n{"id": "a", "problem": "1+2", "answer": "3"}',
            "'a' stands twice",
        ),
    ],
)
def test_errors_name_file_and_line(text, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"p.jsonl.*{message}"):
        read_problems(tmp_path / "p.jsonl")


def test_missing_files_and_encodings(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: cannot be read"):
        read_problems(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.replace("1+1", "caf\u00e9").encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_problems(tmp_path / "latin.jsonl")


def test_other_fields_survive_a_round_trip(tmp_path):
    record = {
        "id": "x",
        "problem": "p",
        "answer": "2",
        "pass_rate": 0.25,
        "level": 3,
        "source": "me",
        "tags": [1, {"a": None}],
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n\n")
    (problem,) = read_problems(tmp_path / "p.jsonl")
    assert problem.record() == record and problem.other == {
        "source": "me",
        "tags": [1, {"a": None}],
    }


def test_lines_end_at_newlines_alone(tmp_path):
    """U+2028 and its kin are legal within a JSON string, and str.splitlines would cut there."""
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"problem": "a\u2028b\u0085c", "answer": "2"}, ensure_ascii=False) + "\r\n",
        newline="",
    )
    assert read_problems(tmp_path / "p.jsonl")[0].problem == "a\u2028b\u0085c"


def test_gzip_is_read_and_half_characters_are_refused(tmp_path):
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b'{"problem": "1+1", "answer": "2"}\n'))
    assert read_problems(tmp_path / "p.jsonl.gz")[0].answer == "2"
    (tmp_path / "p.jsonl").write_text('{"problem": "2 \\ud800", "answer": "2"}')
    with pytest.raises(ValueError, match="line 1.*half a character"):
        read_problems(tmp_path / "p.jsonl")
    (tmp_path / "q.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="q.jsonl.gz: cannot be read"):
        read_problems(tmp_path / "q.jsonl.gz")


def test_a_text_may_say_infinity_and_a_number_may_not():
    assert data.parse_problem({"problem": "1", "answer": "inf"}, "a").answer == "inf"
    with pytest.raises(ValueError, match="finite"):
        data.parse_problem({"problem": "1", "answer": float("inf")}, "a")


def test_repeats_and_overlap_are_found():
    train = [
        Problem("1", "What is  2N+n?", "4"),
        Problem("2", "What is 2N+n?", "4"),
        Problem("3", "Other", "1"),
        Problem("4", "What is 2n+N?", "5"),
    ]
    assert [p.id for p in without_repeats(train)] == ["1", "3", "4"]
    assert overlap(
        train,
        [Problem("e", "OTHER!", "1"), Problem("f", "new", "2"), Problem("g", "What is 2N-n?", "2")],
    ) == ([("e", "3")], [])


def test_near_overlap_is_found_by_its_words(tmp_path, capsys):
    """The template with other figures, a sentence more, and neither; one problem is counted once, exact before near."""
    story = "A baker packs {} rolls into bags of {}. How many bags does he need, if every bag has to be full?"
    train = [
        Problem("t1", story.format(36, 4), "9"),
        Problem("t2", "Long ago, in a town by the sea: " + story.format(1, 2), "0"),
    ]
    held_out = [
        Problem("same", story.format(36, 4).upper(), "9"),
        Problem("figures", story.format(1, 2), "9"),
        Problem("more", story.format(36, 4) + " Tell me.", "9"),
        Problem(
            "other",
            "A baker needs flour for bread and sells the rest of it to a friend, so how much?",
            "1",
        ),
    ]
    exact, near = overlap(train, held_out)
    assert exact == [("same", "t1")] and near == [("more", "t1"), ("figures", "t2")]
    for name, problems in (("t", train), ("h", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(p.record()) for p in problems))
    data.main(["--overlap", str(tmp_path / "t.jsonl"), str(tmp_path / "h.jsonl")])
    printed = capsys.readouterr().out
    assert "1 of 4 problems stand in" in printed and "near: figures = t2" in printed


@pytest.mark.parametrize(
    "kept, evaluated, trained, is_near",
    [
        (7, 7, 60, False),  # a run of seven words may be chance
        (8, 8, 60, True),
        (24, 27, 27, True),  # 17 of 23 grams
        (17, 20, 20, False),  # 10 of 16
        (26, 27, 60, True),  # 19 of the evaluation problem's 20
        (23, 27, 60, False),  # 16 of them
    ],
)
def test_what_counts_as_near(kept, evaluated, trained, is_near):
    """The three thresholds: looser ones would cry at every template, stricter ones miss copies."""
    words = [f"w{i}" for i in range(evaluated)]
    training = words[:kept] + [f"v{i}" for i in range(trained - kept)]
    assert overlap(
        [Problem("t", " ".join(training), "1")], [Problem("e", " ".join(words), "1")]
    ) == ([], [("e", "t")] if is_near else [])


def test_a_benchmark_comes_from_the_hub_by_name(monkeypatch, tmp_path):
    """Columns by one table; answers that are numbers or lists; without `datasets`, a sentence that says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_problems("minerva")
    rows = {
        "AI-MO/aimo-validation-amc": [{"problem": "1+1", "answer": 2.0, "url": "u"}],
        "Hothan/OlympiadBench": [{"question": "roots?", "final_answer": ["$1$", "$-1$"]}],
        "math-ai/amc23": [{"q": "1"}],
    }
    asked = []
    fake = SimpleNamespace(
        load_dataset=lambda name, configuration, split: (
            asked.append((name, configuration, split)) or rows[name]
        )
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [(p.id, p.problem, p.answer) for p in read_problems("amc22_23")] == [
        ("amc22_23-0", "1+1", "2")
    ]
    assert read_problems("olympiadbench")[0].answer == "1, -1"
    assert asked == [
        ("AI-MO/aimo-validation-amc", None, "train"),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ]
    with pytest.raises(ValueError, match="no column 'question'"):
        read_problems("amc23")
    with pytest.raises(ValueError, match="cannot read math-ai/minervamath"):
        read_problems("minerva")


# ----------------------------------------------------------------------------------------------------------- levels


def pool(*rates):
    return [Problem(str(i), str(i), "0", pass_rate=r) for i, r in enumerate(rates)]


def ids(levels):
    return [[p.id for p in level] for level in levels]


def test_quality_is_an_upper_bound_of_difficulty():
    """Including Q, excluding the bound below; always solved (0) belongs to no level; the order of Q is the order of levels."""
    problems = pool(1.0, 0.9, 0.2, 0.19, 0.0)  # difficulty 0, 0.1, 0.8, 0.81, 1
    levels, left = cut_levels(problems, [0.8, 1.0], "pass_rate")
    assert ids(levels) == [["1", "2"], ["3", "4"]] and left["always solved"] == 1
    assert ids(cut_levels(problems, [1.0, 0.8], "pass_rate")[0]) == [["3", "4"], ["1", "2"]]
    levels, left = cut_levels(problems, [0.5], "pass_rate")
    assert ids(levels) == [["1"]] and left["too hard"] == 3


def test_equal_thresholds_share_a_bin_and_unmeasured_problems_are_counted():
    problems = [*pool(0.5), Problem("u", "u", "0")]
    levels, left = cut_levels(problems, [1.0, 1.0], "pass_rate")
    assert ids(levels) == [["0"], ["0"]] and left["unmeasured"] == 1


def test_declared_levels():
    problems = [Problem(str(n), str(n), "0", level=n) for n in (0, 1, 2, 3)] + [
        Problem("u", "u", "0")
    ]
    levels, left = cut_levels(problems, [1, 3], "level")
    assert ids(levels) == [["0", "1"], ["2", "3"]] and left["unmeasured"] == 1


def test_endless_order_is_seeded_covers_every_epoch_and_resumes():
    items = list(range(10))
    first = list(itertools.islice(endless(items, 0, 1), 35))
    assert (
        first
        == list(itertools.islice(endless(items, 0, 1), 35))
        != list(itertools.islice(endless(items, 0, 2), 35))
    )
    assert (
        all(sorted(first[i : i + 10]) == items for i in (0, 10, 20)) and first[:10] != first[10:20]
    )
    assert list(itertools.islice(endless(items, 0, 1), 17, 35)) == first[17:]


# ---------------------------------------------------------------------------------------------------------- prompts


def chat(template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_one_template_with_worked_examples_in_front():
    prompt = render(
        chat(PLAIN), Problem("i", "1+1", "2"), [{"problem": "2+2", "solution": "\\boxed{4}"}]
    )
    text = chat(PLAIN).decode(prompt.tokens)
    assert (
        text
        == f"<user>2+2\n{INSTRUCTION}<assistant>\\boxed{{4}}<user>1+1\n{INSTRUCTION}<assistant>"
        and prompt.opening == ""
    )


def test_a_think_that_the_template_opens_must_be_closed():
    """Graded with the opening put back: an answer inside thoughts that never close is none."""
    assert render(chat(PLAIN + "<think>\n"), Problem("i", "1+1", "2")).opening == "<think>"
    assert render(chat(PLAIN + "<think>\n\n</think>"), Problem("i", "1+1", "2")).opening == ""


def test_shipped_tokenizer_round_trips_any_text(tokenizer):
    for text in (
        "1+1=2;\\boxed{2}",
        "é ü 漢字 🙂 \x00\x7f",
        " leading\n\nlines\t",
        "\\boxed{\\boxed{1}}",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text
    assert len(tokenizer("\\boxed{")["input_ids"]) == 1


def test_examples_need_both_texts(tmp_path):
    (tmp_path / "e.jsonl").write_text('{"problem": "1"}')
    with pytest.raises(ValueError, match="line 1.*solution"):
        read_records(tmp_path / "e.jsonl", parse_example)


# -------------------------------------------------------------------------------------------------------- generator


def test_generated_answers_and_steps_are_right():
    """Every answer against sympy, every step an identity or the same equation: 2 to 6 of them."""
    families = set()
    for p in itertools.islice(generate("train", 7), 600):
        families.add(p.other["family"])
        steps = p.other["steps"]
        assert 2 <= len(steps) <= 6, p
        spelled = re.sub(r"(\d)([x(])", r"\1*\2", p.problem)
        if p.other["family"] == "equation":
            left, right = map(sympy.sympify, spelled.split("="))
            assert sympy.solve(left - right) == [int(p.answer)], p
            for step in steps:
                a, b = (sympy.sympify(re.sub(r"(\d)x", r"\1*x", side)) for side in step.split("="))
                assert sympy.solve(a - b) == [int(p.answer)], (p, step)
        else:
            assert sympy.sympify(spelled) == int(p.answer), p
            for step in steps:
                a, b = map(sympy.sympify, step.split("="))
                assert a == b, (p, step)
            assert steps[-1].endswith(f"={p.answer}")
    assert families == {"expression", "product", "equation"}


def test_splits_are_disjoint_whatever_the_seed_and_reproducible():
    train = {p.problem for seed in (0, 1) for p in itertools.islice(generate("train", seed), 4000)}
    held = {p.problem for seed in (0, 2) for p in itertools.islice(generate("heldout", seed), 1000)}
    assert not train & held
    first = [p.problem for p in itertools.islice(generate("train", 0), 4000)]
    assert (
        first == [p.problem for p in itertools.islice(generate("train", 0), 4000)]
        and len(set(first)) == 4000
    )
