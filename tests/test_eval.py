"""Numbers one can trust: pass@k by brute force, intervals, votes, and the command line."""

import itertools
import json
import math
import shutil
import signal
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from conftest import edit, files, lines, read, table, write_lines
from launch import ROOT, at, die, said, start, wait
from pytest import approx, fixture, mark, raises
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data
import eval as evaluation
import rollout
from common.files import Stop
from common.statistics import difference, interval, majority, pass_at_k, wilson
from data import Problem, level_names, read_problems
from eval import measure, result_of, rows_of
from policy import attempt as policies
from policy import checkpoint
from policy.attempt import Attempt, Request, Sampling, Solver, evaluation_requests
from policy.checkpoint import Policy
from rewards import NO_ANSWER, RIGHT, VERIFIER, WRONG, Score, Scorer
from rollout import Completion
from run.checkpoints import lock


@mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_brute_force(n):
    """1 - (1 - c/n)^k is biased low (0.810 for 0.900 at n 16, c 3, k 8)."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = [any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == approx(np.mean(draws))


def test_intervals():
    assert wilson(5, 10) == approx((0.2366, 0.7634), abs=1e-3)
    for n in (1, 10, 399):  # else error bars turn negative
        assert wilson(0, n)[0] == 0
        assert wilson(n, n)[1] == 1
    mean, low, high = interval(np.random.default_rng(1).uniform(size=400))
    half = 1.96 * math.sqrt(1 / 12 / 400)
    assert (low, high) == approx((mean - half, mean + half), abs=0.003)
    assert interval([7.0]) == (7, 7, 7)


def test_an_interval_knows_of_what_it_did_not_see():
    """One half among zeros tells less than zeros alone. A bare bootstrap says the opposite."""
    assert interval([0.5] + [0] * 29)[2] >= interval([0] * 30)[2] > 0.11
    assert interval([0.5] + [1] * 29)[1] <= interval([1] * 30)[1] < 0.89


def test_samples_of_one_problem_are_one_cluster():
    """Equal samples tell no more than one. Taken one by one, they would halve the interval."""
    row = dict.fromkeys(("file", "problem_id", "level", "text"), "")
    row |= {"answer": "1", "tokens": 1, "stopped": True}
    samples = [[row | {"verdict": RIGHT if i < 40 else WRONG}] for i in range(100)]
    one = [measure(result_of(rows), 1)["avg@1"] for rows in samples]
    four = [measure(result_of(rows * 4), 1)["avg@4"] for rows in samples]
    assert interval(one) == interval(four)


def test_measures_of_one_problem_by_hand():
    """A share of what stopped, under the name of what was cut off; pass@n under that of pass@k."""
    row = {"file": "f", "problem_id": "p", "level": None, "answer": None}
    rows = [row | {"tokens": n, "stopped": n < 4, "verdict": WRONG, "text": ""} for n in (2, 3, 4)]
    rows.append(row | {"tokens": 7, "stopped": True, "verdict": RIGHT, "text": "so \\boxed{3}"})
    assert measure(result_of(rows), 2) == {
        "avg@4": 0.25,
        "pass@2": 0.5,
        "maj@4": 0,
        "length": 4,
        "cut_off": 0.25,
        "writes_steps": 0.25,
    }


VOTES = """
3 2 2 | True
3 2 | False
2 3 | True
- - - 2 | True
- - | False
0.5 2 1/2 | False
3 2 2 3 | False
"""


@mark.parametrize("answers, is_right", table(VOTES))
def test_majority_rules(answers, is_right):
    """A tie goes to the answer that was sampled first; no answer (-) casts no vote; spellings of
    one answer vote together."""
    answers = [None if answer == "-" else answer for answer in answers.split()]
    assert str(majority(answers, [answer == "2" for answer in answers])) == is_right
    assert majority("22", [True, False])  # if one spelling has two verdicts, the first counts


def test_sign_flips_have_their_size_and_power():
    """Under no difference p < 0.05 about once in twenty. Pairing finds what two intervals side by
    side would not."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        found += difference(rng.normal(size=10), rng.normal(size=10))["p"] < 0.05
    assert 2 < found < 20
    assert (
        difference(np.zeros(5), np.zeros(5))["p"] == difference(np.zeros(1), np.ones(1))["p"] == 1
    )
    hard = rng.uniform(size=200)
    report = difference(hard, hard + rng.normal(0.03, 0.05, 200))
    assert report["p"] < 1e-3
    assert 0 < report["low"] < report["difference"] < report["high"]
    assert interval(hard)[2] - interval(hard)[1] > 0.06  # wider than the difference


def test_a_difference_of_nothing_is_not_certain():
    """Thirty problems that two models answer alike say little of the next thirty. A bare bootstrap
    has no width here. By hand (Bonett and Price 2012): a deviation of sqrt(2 / 32), 32 values."""
    for low, high in ((0, 0), (0, 1), (1, 0)):
        found = difference(np.full(30, low), np.full(30, high))
        assert found["high"] - found["low"] > 0.1
    found = difference(np.zeros(30), np.zeros(30))
    half = 1.96 * math.sqrt(2 / 32 / 32)
    assert (found["low"], found["high"]) == approx((-half, half), abs=0.02)
    assert (found["difference"], found["p"]) == (0, 1)


# --------------------------------------------------------------------------------------- attempts

ONE = Sampling(temperature=1.0)
ADD = [Problem("a", "1+1", "2")]


def load(folder, **flags):
    return Policy.load(str(folder), flags=data.Prompting(**flags))


@fixture
def own_folder(toy_folder, tmp_path):
    """A checkpoint of which a test changes files."""
    return shutil.copytree(toy_folder, tmp_path / "m")


def try_one(policy, prompt, seed=0):
    work = evaluation_requests(policy, [prompt], 2, 10, seed)
    (attempts,) = Solver(policy, Scorer(9)).attempt(work, ONE, 8)
    return attempts


def test_prompts_beyond_the_context_count_as_wrong(toy_policy, printed):
    prompts = toy_policy.render([Problem("long", "1" * 300, "1"), *ADD])
    toy_policy.show("p.jsonl", prompts, toy_policy.room(prompts[1]))
    assert "leave less" not in printed()
    toy_policy.show("p.jsonl", prompts, 128)
    said = printed()
    assert "p.jsonl: 1 of 2 prompts fill the context" in said
    assert "1 of 2 prompts leave less than the 128 tokens of" in said
    room = 128 - len(prompts[1].tokens)
    assert [toy_policy.room(p) for p in prompts] == [0, room]
    work = evaluation_requests(toy_policy, prompts, 2, 500, 0)
    long, short = Solver(toy_policy, Scorer(9)).attempt(work, ONE, 8)
    assert [(a.length, a.score.verdict) for a in long] == [(0, NO_ANSWER)] * 2
    assert all(1 <= a.length <= room for a in short)
    assert try_one(toy_policy, prompts[0])[0].score.verdict == NO_ANSWER


def test_an_infinite_reward_names_its_held_out_problem():
    endless = Score(math.inf, RIGHT, None, {"R_l": math.inf})
    with raises(Stop, match="for problem 'p-7', inf"):
        rows_of("p-7", [Attempt(Completion([1], [0.0], True), "", endless)])


@mark.parametrize("temperature", [0, 1])
def test_a_model_that_overflows_is_no_wrong_answer(own_folder, temperature):
    """Its tokens are arbitrary. They were measured as a pass rate of 0."""
    policy = load(own_folder)
    policy.model.model.norm.weight.data.fill_(math.inf)
    work = evaluation_requests(policy, policy.render(ADD), 2, 10, 0)
    (attempts,) = Solver(policy, Scorer(9)).attempt(work, Sampling(temperature), 8)
    with raises(Stop, match="problem 'a': the model's logits are not finite"):
        rows_of("a", attempts)


def test_levels_stand_in_their_order(printed):
    """Texts would put level 10 before level 2."""
    result = {"n": 1, "right": 1, "length": 3.0, "cut_off": 0.0, "writes_steps": 0.0, "means": {}}
    rows = [result | {"level": f"level {number}"} for number in (10, 2, 1.5)]
    assert [*evaluation.summarise(rows, 1)] == ["level 1.5", "level 2", "level 10", "all"]


def test_streams_of_random_numbers(toy_policy):
    """Same seed, same samples. Samples that measured difficulty are not those that evaluate: else a
    problem that is hard by bad luck would be easier after training by better luck."""
    (prompt,) = toy_policy.render(ADD)
    texts = [[a.text for a in try_one(toy_policy, prompt, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    work = toy_policy, [prompt], 4, 10, 0
    purposes = rollout.TRAINING, rollout.DIFFICULTY, rollout.EVALUATION
    streams = [evaluation_requests(*work, purpose=purpose)[0].keys for purpose in purposes]
    assert len(set(sum(streams, []))) == 12
    assert evaluation_requests(*work) == [Request(prompt, streams[2], VERIFIER, 10)]


def test_a_problem_keeps_its_stream_however_problems_are_cut(toy_policy):
    """Else two arms whose levels differ would be compared on different samples."""
    prompts = toy_policy.render([Problem(name, "1+1", "2") for name in "abc"])
    a, b, c = evaluation_requests(toy_policy, prompts, 2, 10, 0)
    other = evaluation_requests(toy_policy, [prompts[2], prompts[0]], 2, 10, 0)
    assert other == [c, a] and a.keys != b.keys


@mark.parametrize(
    "text, opening, verdict",
    [
        ("\\boxed{2}", "<think>", NO_ANSWER),
        ("hm</think>\\boxed{2}", "<think>", RIGHT),
        ("\\boxed{2}", "", RIGHT),
    ],
)
def test_thoughts_that_the_template_opened(monkeypatch, toy_policy, text, opening, verdict):
    """Without the opening put back, a box within thoughts that never close would pay."""
    (prompt,) = toy_policy.render(ADD)
    monkeypatch.setattr(Policy, "text", lambda *_: text)
    (first, _) = try_one(toy_policy, replace(prompt, opening=opening))
    assert first.score.verdict == verdict


def test_a_model_comes_from_the_hub_by_name_and_revision(toy_folder, monkeypatch):
    def download(name, revision, allow_patterns):
        assert (name, revision) == ("o/m", "v2") and "*.safetensors" in allow_patterns
        return toy_folder

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert load("o/m@v2").model.context == 128


def test_stop_tokens_come_from_all_four_places(own_folder):
    """Both configs, the tokenizer, and the token by which its template ends a turn."""
    (own_folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    edit(own_folder / "config.json", {"eos_token_id": 9})
    turns = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    (own_folder / "chat_template.jinja").write_text(turns)
    policy = load(own_folder)
    own = {policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id}
    assert set(policy.stop_ids) == own | {7, 8, 9}


def test_a_saved_policy_stops_where_it_stopped(toy_folder, tmp_path):
    """Else a checkpoint that was trained with --stop would run on in evaluation."""
    policy = load(toy_folder, stop=["\n"])
    tokenizer = policy.tokenizer
    assert set(policy.stop_ids) == {tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]}
    policy.model.save_pretrained(tmp_path)
    policy.save(tmp_path)
    assert load(tmp_path).stop_ids == policy.stop_ids


def test_the_stop_token_is_no_text(toy_policy):
    tokens = toy_policy.tokenizer("1+1")["input_ids"]
    for stopped in (False, True):
        completion = Completion([*tokens, 7][: 3 + stopped], [], stopped)
        assert toy_policy.text(completion) == "1+1"


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_the_end_of_an_assistants_turn_stops(toy_policy):
    """Qwen2.5's base models name <|endoftext|> alone, run on past <|im_end|> into a question that
    they invent, and the box of its answer is graded."""
    tokenizer = toy_policy.tokenizer
    assert checkpoint.end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(checkpoint.end_of_turn(tokenizer)) == "<|im_end|>"
    tokenizer.chat_template = data.PLAIN_TEMPLATE  # a new line is no end: solutions have several
    assert checkpoint.end_of_turn(tokenizer) is None


def test_a_tokenizer_without_a_chat_template_gets_the_plain_one(own_folder, tmp_path):
    """Base models have none. Their prompt is the problem, the suffix and a new line."""
    (own_folder / "chat_template.jinja").unlink()
    policy = load(own_folder, suffix=" =")
    (prompt,) = policy.render(ADD)
    assert policy.tokenizer.decode(prompt.tokens) == "1+1 =\n"
    policy.tokenizer.save_pretrained(tmp_path / "saved")  # a checkpoint has the same prompt
    assert (tmp_path / "saved/chat_template.jinja").read_text() == data.PLAIN_TEMPLATE


def llama_base(toy_folder, folder):
    """A checkpoint whose tokenizer has no template, and begins all text with its BOS."""
    shutil.copytree(toy_folder, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@mark.parametrize(
    "template, prompt",
    [
        (None, "<|pad|>1+1 =\n"),
        ("Q: {{ messages[0]['content'] }} A:", "<|pad|>Q: 1+1 = A:"),
        ("{{ bos_token }}Q: {{ messages[0]['content'] }}", "<|pad|>Q: 1+1 ="),
        ("<|pad|>Q: {{ messages[0]['content'] }}", "<|pad|>Q: 1+1 ="),
        ("{# bos_token #}{{ messages[0]['content'] }}", "1+1 ="),  # it decides
    ],
)
def test_a_base_model_gets_its_bos_once(toy_folder, tmp_path, template, prompt):
    """A Llama base has seen no text without. A checkpoint has the same prompt, by itself."""
    folder, flags = llama_base(toy_folder, tmp_path / "m"), data.Prompting(suffix=" =")
    if template:
        (tmp_path / "t.jinja").write_text(template)
        flags = replace(flags, template=str(tmp_path / "t.jinja"))
    policy = Policy.load(folder, flags=flags)
    policy.model.save_pretrained(tmp_path / "saved")
    policy.save(tmp_path / "saved")
    for again in (
        policy,
        Policy.load(str(tmp_path / "saved"), flags=replace(flags, template=None)),
    ):
        (made,) = again.render([Problem("a", "1+1", "2")])
        assert again.tokenizer.decode(made.tokens) == prompt
        assert again.stop_ids == policy.stop_ids


def test_a_text_is_graded_as_it_was_written(toy_folder, tmp_path):
    """Some tokenizers remove blanks before punctuation when they decode: another program."""
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.save_pretrained(folder)
    assert Policy.load(str(folder)).tokenizer.clean_up_tokenization_spaces is False


def test_a_config_that_names_no_end_has_none(toy_folder, tmp_path):
    """transformers gives such a Llama token 2, and its completions would end at any "#"."""
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    policy, own = Policy.load(str(folder)), Policy.load(str(toy_folder)).stop_ids
    assert policy.stop_ids == own
    policy.model.save_pretrained(tmp_path / "saved")
    policy.save(tmp_path / "saved")
    assert Policy.load(str(tmp_path / "saved")).stop_ids == own


def no_blank(tokenizer):
    """As transformers 5 encodes for R1-Distill-Llama."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), "")


def one_blank(tokenizer):
    """It joins blanks, which harms nothing."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")


def unknown(tokenizer):
    """A toy that fails where it meets another character."""
    words = Tokenizer(models.WordLevel({"1": 0, "<|end|>": 1}, unk_token="none"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer._tokenizer = words


@mark.parametrize(
    "change, refused",
    [(no_blank, True), (one_blank, False), (unknown, False)],
)
def test_a_tokenizer_that_does_not_give_a_text_back(toy_folder, tmp_path, capsys, change, refused):
    """Words that run together cost a model most of what it can, and every figure looks real. What
    a tokenizer changes on purpose is said, in one line, and goes on."""
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    if refused:
        with raises(ValueError, match="blanks are lost.*PreTrainedTokenizerFast"):
            Policy.load(str(folder))
    else:
        Policy.load(str(folder))
        (line,) = capsys.readouterr().out.splitlines()
        assert "its tokenizer makes" in line


def test_a_template_takes_arguments(toy_folder):
    """Qwen3 thinks unless the template hears enable_thinking=False."""
    policy = load(toy_folder, template_kwargs='{"enable_thinking": false}')
    policy.tokenizer.chat_template = "{{ 'no' if enable_thinking is false else 'yes' }}"
    (prompt,) = policy.render(ADD)
    assert policy.tokenizer.decode(prompt.tokens) == "no"


# ----------------------------------------------------------------------------------- command line


@fixture
def run(toy_folder, tmp_path, monkeypatch, printed):
    """Run eval.py in a folder of its own, with a problem in p.jsonl -> the lines that it printed"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_problems("p.jsonl", 1)

    def run(flags):
        evaluation.main(f"--model {toy_folder} {flags}".split())
        return printed().splitlines()

    return run


@fixture
def ended(run, capsys):
    """It says one line with this message, and ends with this exit code."""

    def ended(message, flags, code):
        with raises(SystemExit, match=f"^{code}$"):
            run(flags)
        said = capsys.readouterr().err
        assert len([line for line in said.splitlines() if message in line]) == 1
        assert "Traceback" not in said

    return ended


@fixture
def refused(ended):
    return lambda message, flags: ended(message, flags, 2)


def parsed(flags=""):
    return evaluation.parse_flags(flags.split())


def write_problems(path, n):
    rows = []
    for i in range(n):
        rows.append({"problem": f"{i}+1", "answer": str(i + 1), "level": i % 2, "source": "s"})
    write_lines(path, rows)


def test_command_line_writes_what_it_prints(run):
    write_problems("p.jsonl", 5)
    flags = "--data p.jsonl --samples 3 --k 2 --max-new-tokens 8"
    printed = run(f"{flags} --out out --add-pass-rate g.jsonl")
    summary = json.loads(printed[-1])
    assert summary == read("out/summary.json")
    measures = summary["files"]["p.jsonl"]
    assert list(measures) == ["declared 0", "declared 1", "all"]
    assert " ".join(measures["all"]) == "avg@3 pass@2 maj@3 length cut_off writes_steps"
    rows = lines("out/completions.jsonl")
    right = [row["verdict"] == RIGHT for row in rows]
    assert len(right) == 15 and "values" not in rows[0]
    assert np.mean(right) == approx(measures["all"]["avg@3"][0])
    run(f"{flags} --out again")  # no longer measures difficulty
    assert lines("again/completions.jsonl") != rows
    said = "levels by difficulty, up to --quality"
    cut = run("--data g.jsonl --quality 0.5 1 --samples 1 --max-new-tokens 8 --out cut")
    assert f"{said} 0.5 1.0" in cut and not any(said in line for line in printed)  # declared ones
    graded = read_problems("g.jsonl")
    assert np.mean([p.pass_rate for p in graded]) == approx(np.mean(right))
    for p in graded:
        assert p.other["source"] == "s" and p.pass_rate is not None
        measured = p.other["measured"]
        assert (measured["samples"], measured["temperature"]) == (3, 1.0)
        assert measured["max_new_tokens"] == 8


OWN = """
def first(problem, response):
    assert "answer" not in problem and problem["kind"] == {"of": "its own"}
    return (ord(response[:1] or "0") % 4) / 3
def always(problem, response):
    return 1
"""


def test_a_reward_of_ones_own_measures_and_compares(run, tmp_path):
    """Problems without an answer; no vote where nothing stands in a box. Its mean is not the share
    of right ones, which is what measures difficulty."""
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"problem": f"{i}+1", "kind": {"of": "its own"}} for i in range(6)]
    write_lines("q.jsonl", rows)
    flags = "--data q.jsonl --samples 4 --max-new-tokens 4 --reward own.py:first"
    printed = run(f"{flags} --out a --add-pass-rate g.jsonl")
    measures = json.loads(printed[-1])["files"]["q.jsonl"]["all"]
    assert " ".join(measures) == "avg@4 pass@4 R_l late length cut_off writes_steps"
    rows = lines("a/completions.jsonl")
    outcomes = np.array([row["values"]["R_l"] for row in rows])
    assert measures["R_l"][0] == approx(outcomes.mean())
    right = (outcomes >= 1).mean()
    assert measures["avg@4"][0] == approx(right) and 0 < right < outcomes.mean()
    graded = read_problems("g.jsonl", graded=False)
    assert np.mean([p.pass_rate for p in graded]) == approx(right)
    assert graded[0].answer is None
    run(f"{flags} --seed 1 --out b")
    report = json.loads(run("--compare a b")[-1])["q"]
    assert report["R_l"]["A"] == approx(outcomes.mean()) and "majority" not in report
    (tmp_path / "own.py").write_text(OWN.replace("/ 3", "/ 2"))
    with raises(SystemExit, match="2"):  # half of its results would be by another R_l
        run(f"{flags} --seed 1 --out b")


LATE_OR_BAD = """
import time
def first_late(problem, response):
    time.sleep(1 if problem["problem"] == "0+1" else 0)
    return 1
def infinite(problem, response):
    return float("inf")
"""


def test_a_late_reward_measures_nothing_and_a_bad_one_ends_it(run, tmp_path, capsys):
    """A slow judge made a problem the hardest of all; an infinite reward was right."""
    (tmp_path / "own.py").write_text(LATE_OR_BAD)
    write_problems("p.jsonl", 3)
    flags = f"{SHORT} --data p.jsonl --reward-timeout 0.5 --reward own.py"
    printed = run(f"{flags}:first_late --out a --add-pass-rate g.jsonl")
    assert json.loads(printed[-1])["files"]["p.jsonl"]["all"]["late"][0] == approx(1 / 3)
    assert [p.pass_rate for p in read_problems("g.jsonl")] == [None, 1, 1]
    assert any("not measured, 2 of its rewards came too late" in line for line in printed)
    with raises(SystemExit, match="1"):
        run(f"{flags}:infinite --out b")
    assert "--reward returned, for problem 'p-1', inf" in capsys.readouterr().err


def test_a_recipe_reaches_prompts_and_sampler(monkeypatch, run):
    """Flags that are parsed and printed, and change nothing, would make a benchmark that nobody can
    compare. A flag that is given wins."""
    seen, original = {}, policies.sample

    def sample(model, prompts, *rest, **settings):
        seen.update(settings, prompts=prompts)
        return original(model, prompts, *rest, **settings)

    monkeypatch.setattr(policies, "sample", sample)
    summary = json.loads(run(f"@{RECIPES}/eval-deepscaler.args {SHORT} --top-k 9 --out o")[-1])
    assert (seen["temperature"], seen["top_p"], seen["top_k"]) == (0.6, 0.95, 9)
    assert (summary["samples"], summary["max_new_tokens"]) == (2, 4)
    tokenizer = load(summary["model"]).tokenizer
    # A blank, where training has a new line.
    assert "0+1 Let's think step by step and output" in tokenizer.decode(seen["prompts"][0])
    assert parsed(f"@{RECIPES}/eval-fastcurl.args").top_p == parsed().temperature == 1.0


BAD = """
--model no/such/folder/anywhere | neither a folder nor
--data none.jsonl | cannot be read
--data p.jsonl sub/p.jsonl | stands twice
--max-new-tokens 0 | --max-new-tokens: our default fits the shipped model alone
--template-kwargs { | --template-kwargs {: not a JSON object
--stop ab | --stop 'ab': is 2 tokens of this tokenizer, not one
--columns answer=q | expected problem=NAME answer=NAME
--reward p.py:f | importing p.py failed
--samples 0 | --samples must be at least 1, found 0
--samples 2 --k 3 | --k must be
--top-p 0 | --top-p
--temperature nan | --temperature must be at least 0, found nan
--colour red | unrecognized
--add-pass-rate no/such/folder/g.jsonl | g.jsonl
--add-pass-rate p.jsonl | p.jsonl: needs
--out taken | --out taken: exists already, and is no evaluation to go on with
--out run | --out run: exists already, and is no evaluation to go on with
--model begun | --model begun: not a training run with a checkpoint (FileNotFound
--compare a q | no problem in common
--compare a none | cannot be read
--compare a taken | cannot be read
--compare a strange | not what eval.py writes
--compare a stranger | not what eval.py writes
--compare a p.jsonl | not what eval.py writes
--compare a odd | not what eval.py writes
"""


@mark.parametrize("flags, message", table(BAD))
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, tmp_path, refused):
    write_result("a", [[1]])
    write_result("q", [[1]], "q.jsonl")
    write_lines("strange/results.jsonl", [{"settings": {}}, {"text": "1"}])
    wrong = {"file": "p", "problem_id": "0", "level": None, "n": 0, "right": 1}
    write_lines("stranger/results.jsonl", [{"settings": {}}, wrong])
    write_lines("odd/results.jsonl", [{"settings": 5}])
    for name in ("run", "a"):
        write_lines(f"{name}/config.json", [{"levels": []}])
    Path("taken").mkdir()
    Path("begun/checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    refused(message, f"--data p.jsonl --max-new-tokens 4 {flags}")
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_keeps_what_is_written(run, monkeypatch, capsys):
    """One line and the exit code of an interrupt, no traceback. The first batch stays on disk."""
    write_problems("p.jsonl", 9)
    batches, attempt = [], Solver.attempt

    def interrupted(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return attempt(*args)

    monkeypatch.setattr(Solver, "attempt", interrupted)
    with raises(SystemExit, match="^130$"):
        run(f"{SHORT} --slots 8 --out o")
    assert "interrupted" in capsys.readouterr().err
    assert len(lines("o/completions.jsonl")) == 16


@mark.parametrize(
    "where, said",
    [
        ("policy.attempt.sample", "the same flags with --out o go on"),
        ("eval.data.only_gradable", "2.00 GiB"),
    ],
)
def test_a_gpu_without_memory_is_one_sentence(ended, monkeypatch, where, said):
    """Not a traceback of forty lines, and what is done is kept."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0")

    monkeypatch.setattr(where, full)
    ended(said, f"{SHORT} --out o", "[12]")


# --------------------------------------------------------------------------- processes and crashes

FILES = "o/config.json o/completions.jsonl o/results.jsonl o/summary.json g.jsonl"


@fixture(scope="module")
def evaluated(toy_folder, tmp_path_factory):
    """evaluated(name, world, sabotage): measure the difficulty of 19 problems in a folder of that
    name, or go on with it -> the folder, exit codes. A process writes 4 problems at a time."""
    root = tmp_path_factory.mktemp("evaluated")

    def evaluated(name, world=1, sabotage=None):
        write_problems(root / name / "p.jsonl", 19)
        flags = f"--model {toy_folder} --data p.jsonl --samples 4 --slots 8 --out o"
        flags += " --max-new-tokens 6 --dtype float64 --add-pass-rate g.jsonl"
        return root / name, wait(start(root / name, flags, world, sabotage, "eval"))

    return evaluated


@fixture(scope="module")
def whole(evaluated):
    """Of one process that nothing disturbed."""
    folder, codes = evaluated("whole")
    assert codes == [0], said(folder)
    return folder


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES.split()]


@mark.slow
@mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_files(evaluated, whole, world):
    """A share that is left out, counted twice, or written in the order of processes. The last
    block leaves a process without problems."""
    many, codes = evaluated(f"many{world}", world)
    assert codes == [0] * world, said(many)
    assert contents(many) == contents(whole)
    last = said(many).splitlines()[-1]
    assert json.loads(last) == read(whole / "o/summary.json")
    # torch 2.10 itself announces the connection.
    assert all(line.startswith("[Gloo]") for line in said(many, rank=1).splitlines())


@mark.slow
@mark.parametrize("before, after, done", [(1, 1, 8), (2, 1, 16), (1, 2, 8)])
def test_a_killed_evaluation_goes_on_in_any_number_of_processes(
    evaluated, whole, before, after, done
):
    """What was graded is lost or done twice; a half-written line is believed, or a problem with
    some of its samples."""
    name = f"killed{before}{after}"
    folder, codes = evaluated(name, before, at("policy.attempt.Solver.attempt", 3, die))
    assert -signal.SIGKILL in codes and not (folder / "o/results.jsonl").exists()
    log = folder / "o/completions.jsonl"
    assert len(lines(log)) == 4 * done
    torn = (whole / "o/completions.jsonl").read_text().splitlines(keepends=True)[4 * done :]
    with open(log, "a") as file:  # of the next problem, 2.5 of 4 samples or 3.5
        file.write("".join(torn[: before + 1]) + torn[before + 1][:30])
    _, codes = evaluated(name, after)
    assert codes == [0] * after, said(folder)
    assert f"{done} problems are done, {19 - done} are left" in said(folder)
    assert contents(folder) == contents(whole)


RECIPES = ROOT / "recipes"
SHORT = "--data p.jsonl --samples 2 --max-new-tokens 4"


def changed_settings(folder, name):
    """-> flags; something is different now, in a folder with an evaluation."""
    if name == "prompts":
        write_lines(folder / "p.jsonl", [{"problem": "2+1", "answer": "2"}])
    if name == "stop tokens":
        (folder / "m/generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    if name == "weights":
        path = folder / "m/model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] += 1
        save_file(tensors, path)
    return {"temperature": "--temperature 0.5", "purpose": "--add-pass-rate g.jsonl"}.get(name, "")


@mark.parametrize("name", ["temperature", "prompts", "stop tokens", "weights", "purpose"])
def test_it_goes_on_with_the_same_settings_alone(own_folder, tmp_path, run, refused, name):
    """Half of a result at another temperature, or of another model, would be a number of nothing.
    With the same settings nothing is sampled again, and the tables are printed once more."""
    flags = f"--model m {SHORT} --out o"
    before = run(flags)
    (i,) = (i for i, line in enumerate(before) if "0 problems are done, 1 are left" in line)
    again = run(f"{flags} --slots 8")
    again.remove("--slots 8: not 256 as before, so the last bits may differ")
    assert "1 problems are done, 0 are left" in again[i] and again[i + 1 :] == before[i + 1 :]
    more = changed_settings(tmp_path, name)
    written = files(tmp_path)
    said = "prompts" if name == "stop tokens" else name
    refused(f"began with other settings ({said})", f"{flags} {more}")
    assert files(tmp_path) == written


def test_no_setting_is_forgotten():
    """A new flag that changes completions must be one of those with which an evaluation goes on,
    and one that changes prompts must be taken from a training run."""
    free = {f.name for f in fields(evaluation.Flags) if f.metadata["may_change"]}
    assert free == {"compare", "out", "add_pass_rate", "slots", "device"}


def test_two_processes_do_not_write_to_one_evaluation(run, refused):
    """Each would append what the other appends."""
    run(f"{SHORT} --out o")
    with lock(Path("o/config.json")):
        refused("another process is writing", f"{SHORT} --out o")


# --------------------------------------------------------------------------------- as in training


TRAINED = """{"temperature": 0.7, "examples": "e.jsonl", "dtype": "bfloat16", "seed": 5,
"slots": [8, 8], "reward": ["a.py:f", "a.py:f"], "max_new_tokens": [300, 200],
"suffix": "", "template": null, "template_kwargs": "{}", "stop": []}"""


def test_a_run_is_evaluated_as_it_samples_by_its_newest_checkpoint(tmp_path):
    """Another temperature, length or dtype than in training measures another policy. A flag that
    is given wins."""
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (run / "config.json").write_text(TRAINED)
    with raises(ValueError, match="not a training run with a checkpoint"):
        parsed(f"--model {run}")
    for name in ("000099", "000100", "000101", "000102", "000200.part"):
        write_checkpoint(folder / name)
    args = parsed(f"--model {run}")
    assert len(list(folder.iterdir())) == 5  # the run may be at work
    assert args.model == str(folder / "000102")
    assert (args.temperature, args.max_new_tokens, args.dtype) == (0.7, 300, "bfloat16")
    assert (args.examples, args.suffix, args.reward) == ("e.jsonl", "", "a.py:f")
    assert (args.seed, args.slots) == (0, None)
    args = parsed(f"--model {run} --temperature 0.9 --dtype float32")
    assert (args.temperature, args.dtype, args.model) == (0.9, "float32", str(folder / "000102"))
    edit(run / "config.json", {"reward": ["a.py:f", "math"]})
    assert parsed(f"--model {run}").reward == "math"


def test_a_level_of_a_run_is_called_as_in_the_run():
    """Levels that share their problems are one bin, called by the first; declared ones are not the
    levels of a run."""
    problems = [Problem("a", "1", "1", 0.5), Problem("b", "1", "1", 0.1)]
    assert level_names(problems, [1, 1]) == {"a": "level 1", "b": "level 1"}
    assert level_names(problems, [0.5, 1]) == {"a": "level 1", "b": "level 2"}
    assert level_names([Problem("a", "1", "1", level=3)], [1]) == {"a": "declared 3"}
    both = [Problem("a", "1", "1", 0.5, level=3)]  # as in a run with --difficulty level
    assert level_names(both, []) == {"a": "declared 3"}


def test_what_json_cannot_hold_is_refused_before_sampling(tmp_path, monkeypatch, refused):
    """A date of a data set ended the evaluation after all sampling, and again when repeated."""
    some = [Problem("p1", "1+1", "2", other={"when": date(2026, 1, 1)})]
    monkeypatch.setattr(data, "read_problems", lambda *_, **__: some)
    words = "p.jsonl, 'p1': --add-pass-rate cannot write it as JSON (TypeError"
    refused(words, f"{SHORT} --data p.jsonl --add-pass-rate {tmp_path / 'g.jsonl'}")


def write_checkpoint(folder):
    folder.mkdir(parents=True)


# ------------------------------------------------------------------------------------- comparison


def write_result(folder, right, file="p.jsonl", **settings):
    """results.jsonl of one file: right[i][k], whether sample k of problem i is right."""
    results = [{"settings": settings}]
    for i, many in enumerate(right):
        rows = []
        for k, r in enumerate(many):
            score = Score(float(r), RIGHT if r else WRONG, str(r))
            done = Attempt(Completion([5], [0.0], True), "", score)
            labels = {"file": f"{folder}/{file}", "level": None, "sample": k}
            rows.append(rows_of(str(i), [done])[0] | labels)
        results.append(result_of(rows))
    write_lines(f"{folder}/results.jsonl", results)


def test_compare_pairs_problems(run):
    """By hand. Each side is better at one problem: paired by their order, which differs, they
    would not differ at all. A third problem has no partner."""
    write_result("a", [[1, 0], [1, 1], [1, 1]])
    write_result("b", [[1, 1], [0, 1]])
    first, *results = lines("b/results.jsonl")
    write_lines("published.jsonl", [first, *reversed(results)])
    printed = run("--compare a published.jsonl")
    report = json.loads(printed[-1])["p"]
    assert "p: 2 problems in both, 3 in A, 2 in B" in printed
    expected = {"A": 0.75, "B": 0.75, "difference": 0, "low": -0.5, "high": 0.5, "p": 1}
    assert report["accuracy"] == expected
    assert report["problems"] == 2
    assert report["pass@2"]["A"] == 1.0
    assert (report["majority"]["A"], report["majority"]["B"]) == (1.0, 0.5)


def test_compare_says_which_settings_differ(run):
    """Else greedy answers beside sampled ones, or pass@1 beside pass@16, would pass for a better
    model."""
    write_result("a", [[1, 0]], temperature=1.0, k=2)
    write_result("b", [[1, 1]], temperature=0.6, k=2, top_p=0.95)
    said = [line for line in run("--compare a b") if "differs" in line]
    assert said == ["temperature differs: A 1.0, B 0.6", "top_p differs: A None, B 0.95"]
