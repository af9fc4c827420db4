"""Numbers one can trust: pass@k by brute force, intervals, votes, and the command line."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

import eval as evaluation
from data import Problem, read_problems
from eval import (
    attempt,
    evaluation_keys,
    interval,
    majority,
    mean_of,
    paired_test,
    pass_at_k,
    wilson,
)
from rewards import NO_ANSWER, RIGHT, WRONG, Grader
from rollout import sample


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_brute_force(n):
    """1 - (1 - c/n)^k is biased low (0.810 for 0.900 at n 16, c 3, k 8)."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = [any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(np.mean(draws))
    assert pass_at_k(16, 3, 8) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="at least 7 samples"):
        pass_at_k(6, 1, 7)


def test_intervals():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3) and wilson(5, 10) == pytest.approx(
        (0.2366, 0.7634), abs=1e-3
    )
    assert all(
        wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 400)
    )  # or error bars turn negative
    mean, low, high = interval(np.random.default_rng(1).uniform(size=400))
    half = 1.96 * math.sqrt(1 / 12 / 400)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.003)


def test_an_interval_knows_of_what_it_did_not_see():
    """One half among zeros tells less than zeros alone, and five means of zeros are not certain: a bare bootstrap says so of both."""
    assert interval([0.5] + [0] * 29)[2] >= interval([0] * 30)[2] > 0.11
    assert interval([0.5] + [1] * 29)[1] <= interval([1] * 30)[1] < 0.89
    assert mean_of([interval([0] * 30)] * 5) == pytest.approx(
        (0, 0, 0.1135 / math.sqrt(5)), abs=1e-3
    )
    rng = np.random.default_rng(2)  # it covers the truth about as often as it says
    truths, covered = np.array([0.02, 0.1, 0.3, 0.5, 0.8]), []
    for _ in range(100):
        mean, low, high = mean_of([interval(rng.random(60) < truth) for truth in truths])
        covered.append(low <= truths.mean() <= high)
    assert np.mean(covered) >= 0.88


def answers(*boxes):
    return boxes, [box == "2" for box in boxes]


def test_majority_rules():
    """Ties go to the answer sampled first; no answer casts no vote; spellings of one answer vote together."""
    assert (
        majority(*answers("3", "2", "2"))
        and not majority(*answers("3", "2"))
        and majority(*answers("2", "3"))
    )
    assert majority(*answers(None, None, None, "2")) and not majority(*answers(None, None))
    assert not majority(*answers("\\frac{1}{2}", "2", "\\dfrac{1}{2}"))


def test_prompts_beyond_the_context_count_as_wrong(toy_policy):
    prompts = toy_policy.render([Problem("a", "1" * 300, "1"), Problem("b", "1+1", "2")])
    assert [toy_policy.room(p) for p in prompts] == [0, 128 - len(prompts[1].tokens)]
    done = attempt(
        toy_policy,
        Grader(),
        prompts,
        evaluation_keys(0, prompts, 2),
        max_new_tokens=500,
        temperature=1.0,
        slots=8,
    )
    assert [(a.length, a.verdict) for a in done[0]] == [(0, NO_ANSWER)] * 2
    assert all(1 <= a.length <= 128 - len(prompts[1].tokens) for a in done[1])
    (alone,) = attempt(
        toy_policy, Grader(), prompts[:1], [[1]], max_new_tokens=9, temperature=1.0, slots=8
    )
    assert alone[0].verdict == NO_ANSWER


def test_command_line_writes_what_it_prints(tmp_path, toy_folder, capsys):
    rows = [
        {"problem": f"{i}+1", "answer": str(i + 1), "level": i % 2 + 1, "source": "s"}
        for i in range(5)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation.main(
        [
            "--model",
            str(toy_folder),
            "--data",
            str(tmp_path / "p.jsonl"),
            "--samples",
            "3",
            "--k",
            "2",
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path / "out"),
            "--add-pass-rate",
            str(tmp_path / "g.jsonl"),
        ]
    )
    printed = capsys.readouterr().out.splitlines()
    summary = json.loads(printed[-1])
    measures = summary["files"][str(tmp_path / "p.jsonl")]
    assert set(measures) == {"level 1", "level 2", "all"}
    assert set(measures["all"]) == {"avg@3", "pass@2", "maj@3", "length", "cut_off", "writes_steps"}
    rows = [
        json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 15 and {row["verdict"] for row in rows} <= {RIGHT, WRONG, NO_ANSWER}
    assert sum(row["verdict"] == RIGHT for row in rows) / 15 == pytest.approx(
        measures["all"]["avg@3"][0]
    )
    measured = read_problems(tmp_path / "g.jsonl")
    assert all(
        p.other == {"source": "s", "pass_rate_samples": 3} and p.pass_rate is not None
        for p in measured
    )


def write_results(folder, right, answers=None, level=None):
    """completions.jsonl of one file: right[i][k], whether sample k of problem i is."""
    folder.mkdir()
    rows = [
        {
            "file": f"{folder}/p.jsonl",
            "problem_id": str(i),
            "level": level,
            "sample": k,
            "verdict": RIGHT if r else WRONG,
            "answer": answers[i][k] if answers else str(int(r)),
        }
        for i, many in enumerate(right)
        for k, r in enumerate(many)
    ]
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_compare_pairs_problems(tmp_path, capsys):
    """By hand: accuracies 1/2 and 3/4 over two problems; disagreement (1/2 + 1/2) / 2; a third problem has no partner."""
    a = write_results(tmp_path / "a", [[1, 0], [1, 0], [1, 1]])
    b = write_results(tmp_path / "b", [[1, 1], [0, 1]])
    evaluation.main(["--compare", a, b])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])["p"]
    assert report["problems"] == 2 and "only in A: 1 problems" in printed
    assert (
        report["accuracy"]["A"] == 0.5
        and report["accuracy"]["B"] == 0.75
        and report["accuracy"]["difference"] == 0.25
    )
    assert report["disagreement"] == 0.5 and report["pass@2"]["A"] == 1.0
    assert report["majority"]["A"] == 1.0 and report["majority"]["B"] == 0.5  # ties go to the first


def test_compare_says_which_settings_differ(tmp_path, capsys):
    """Else greedy answers beside sampled ones, or pass@1 beside pass@16, would pass for a better model."""
    a, b = write_results(tmp_path / "a", [[1, 0]]), write_results(tmp_path / "b", [[1, 1]])
    settings = dict.fromkeys(evaluation.SETTINGS) | {"temperature": 1.0, "k": 2}
    (tmp_path / "a/summary.json").write_text(json.dumps(settings))
    evaluation.main(["--compare", a, b])
    assert "no summary.json beside both" in capsys.readouterr().out
    (tmp_path / "b/summary.json").write_text(
        json.dumps(settings | {"temperature": 0.6, "protocol": "deepscaler"})
    )
    evaluation.main(["--compare", a, b])
    printed = capsys.readouterr().out
    assert (
        "temperature differs: A 1.0, B 0.6" in printed
        and "protocol differs: A None, B 'deepscaler'" in printed
    )
    assert printed.count("differs") == 2 and "pass@2" in printed


def test_compare_needs_two_results_of_the_same_problems(tmp_path, capsys):
    a, b = write_results(tmp_path / "a", [[1]]), write_results(tmp_path / "b", [[1]])
    (tmp_path / "b/completions.jsonl").write_text(
        (tmp_path / "b/completions.jsonl").read_text().replace("p.jsonl", "q.jsonl")
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c/completions.jsonl").write_text('{"text": "1"}')
    for folders, message in (
        ((a, b), "no problem in common"),
        ((a, "none"), "cannot be read"),
        ((a, str(tmp_path / "c")), "not a row that eval.py"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["--compare", *folders])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_paired_test_has_its_size_and_its_power():
    """Under no difference p < 0.05 about once in twenty; pairing finds what two intervals side by side would not."""
    rng = np.random.default_rng(0)
    p_values = [paired_test(rng.normal(size=40), times=500)[3] for _ in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.1
    assert paired_test([0.0] * 5)[3] == 1.0
    hard = rng.uniform(size=200)
    mean, low, high, p = paired_test((hard + rng.normal(0.03, 0.05, 200)) - hard)
    assert p < 1e-3 and 0 < low < mean < high
    assert interval(hard)[2] - interval(hard)[1] > 0.06  # wider than the difference


def test_samples_of_one_problem_are_one_cluster():
    """Four equal samples of each problem tell no more than one: an interval over all samples would be half as wide."""
    rng = np.random.default_rng(1)
    right = rng.random(100) < 0.4
    one, four = interval([np.mean([r]) for r in right]), interval([np.mean([r] * 4) for r in right])
    assert one == four
    spread = interval(rng.binomial(4, 0.4, 100) / 4)
    assert spread[2] - spread[1] < 0.7 * (one[2] - one[1])  # samples that differ do tell more


def test_a_protocol_sets_the_flags_that_are_not_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, args = evaluation.parse_args(["--protocol", "deepscaler", "--samples", "2"])
    assert (args.samples, args.temperature, args.top_p, args.max_new_tokens) == (
        2,
        0.6,
        0.95,
        32768,
    )
    assert args.suffix == " Let's think step by step and output the final answer within \\boxed{}."
    assert (
        evaluation.parse_args(["--protocol", "fastcurl"])[1].top_p == 1.0
        and evaluation.parse_args([])[1].temperature == 1.0
    )


def test_benchmarks_end_in_the_papers_table(tmp_path, toy_folder, capsys):
    for name in ("aime24", "math500", "amc22_23", "minerva", "olympiadbench"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"problem": f"{i}+1", "answer": str(i + 1)}) for i in range(3))
        )
    files = [
        str(tmp_path / f"{name}.jsonl")
        for name in ("aime24", "math500", "amc22_23", "minerva", "olympiadbench")
    ]
    evaluation.main(
        [
            "--model",
            str(toy_folder),
            "--data",
            *files,
            "--samples",
            "2",
            "--max-new-tokens",
            "4",
            "--protocol",
            "fastcurl",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    printed = capsys.readouterr().out
    (ours,) = [line for line in printed.splitlines() if "(fastcurl)" in line and "toy" in line]
    assert (
        ours.count("0.0 % [0.0, ") == 6 and "0.0]" not in ours
    )  # five benchmarks and their mean; no interval is empty
    (header,) = [line for line in printed.splitlines() if "mean of the five" in line]
    assert header.split() == [
        "AIME24",
        "MATH500",
        "AMC",
        "Minerva",
        "Olympiad",
        "mean",
        "of",
        "the",
        "five",
    ]
    assert "DeepScaleR-1.5B (deepscaler)" in printed and "57.0" in printed


def test_published_means_are_those_of_their_rows():
    """A digit that was copied wrongly shows."""
    for values in evaluation.PUBLISHED.values():
        assert np.mean(values[:5]) == pytest.approx(values[5], abs=0.1)


def test_samples_that_measure_difficulty_are_not_those_that_evaluate(toy_policy):
    """Else a problem that is hard by bad luck is hard by the same luck before training, and easier by better luck after."""
    prompts = toy_policy.render([Problem("a", "1+1", "2")])
    streams = [
        evaluation_keys(0, prompts, 4, purpose)[0]
        for purpose in (evaluation.TRAINING, evaluation.DIFFICULTY, evaluation.EVALUATION)
    ]
    assert len({key for keys in streams for key in keys}) == 12


def test_evaluation_is_reproducible_and_samples_differ(toy_policy):
    prompts = toy_policy.render([Problem("a", "1+1", "2")])
    settings = {"max_new_tokens": 20, "temperature": 1.0, "slots": 8}
    runs = [
        attempt(toy_policy, Grader(), prompts, evaluation_keys(seed, prompts, 2), **settings)
        for seed in (0, 0, 1)
    ]
    texts = [[a.text for a in run[0]] for run in runs]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/such/folder/anywhere"], "neither a folder nor"),
        (["--data", "none.jsonl"], "cannot be read"),
        (["--data", "p.jsonl", "sub/p.jsonl"], "stands twice"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--samples", "2", "--k", "3"], "--k must be in"),
        (["--top-p", "0"], "--top-p"),
        (["--colour", "red"], "unrecognized"),
        (["--add-pass-rate", "no/such/folder/g.jsonl"], "g.jsonl"),
        (["--data", "long.jsonl"], "every prompt is longer"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, message, capsys, monkeypatch, toy_folder, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1", "answer": "2"}')
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "1" * 300, "answer": "2"}))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--model", str(toy_folder), "--data", "p.jsonl", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.rglob("completions.jsonl"))


def test_stop_tokens_come_from_all_three_places(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    policy = evaluation.Policy.load(str(folder))
    assert policy.tokenizer.eos_token_id not in (7, 8, 9)
    assert {7, 8, 9, policy.tokenizer.eos_token_id} == set(policy.stop_ids)


def test_a_protocol_reaches_prompts_and_sampler(monkeypatch, tmp_path, toy_folder, capsys):
    """Flags that are parsed and printed, and change nothing, would make a benchmark that nobody can compare."""
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1", "answer": "2"}')
    seen = {}
    monkeypatch.setattr(
        evaluation,
        "sample",
        lambda model, requests, **settings: (
            seen.update(settings, requests=requests) or sample(model, requests, **settings)
        ),
    )
    evaluation.main(
        [
            "--model",
            str(toy_folder),
            "--data",
            str(tmp_path / "p.jsonl"),
            "--protocol",
            "deepscaler",
            "--samples",
            "2",
            "--max-new-tokens",
            "4",
            "--top-k",
            "9",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert (seen["temperature"], seen["top_p"], seen["top_k"]) == (0.6, 0.95, 9)
    (request,) = seen["requests"]
    text = evaluation.Policy.load(str(toy_folder)).tokenizer.decode(request.prompt)
    assert "1+1 Let's think" in text  # a blank, where training has a new line


def test_thoughts_that_the_template_opened_are_no_answer(monkeypatch, toy_policy):
    """Without the opening put back, a box within thoughts that never close would pay."""
    (prompt,) = toy_policy.render([Problem("a", "1+1", "2")])
    for text, opening, verdict in (
        ("\\boxed{2}", "<think>", NO_ANSWER),
        ("hm</think>\\boxed{2}", "<think>", RIGHT),
        ("\\boxed{2}", "", RIGHT),
    ):
        monkeypatch.setattr(evaluation.Policy, "text", lambda *_, text=text: text)
        ((done,),) = attempt(
            toy_policy,
            Grader(),
            [replace(prompt, opening=opening)],
            [[1]],
            max_new_tokens=2,
            temperature=1.0,
            slots=1,
        )
        assert done.verdict == verdict
