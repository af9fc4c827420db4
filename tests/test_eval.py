"""Evaluation: results and measures, what becomes a prompt or a text, and the command line."""

import itertools
import json
import math
import shutil
import signal
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import edit, files, lines, read, table, write_lines
from launch import ROOT, at, die, said, start, wait
from pytest import approx, fixture, mark, raises
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data
import eval as evaluation
from common.files import Stop
from data import Problem, Prompt, level_names, read_problems
from eval import differences, measure, print_levels, result_of, rows_of, summarise
from experiments.warmstart import make_tokenizer
from policy import attempt as policies
from policy import checkpoint
from policy.attempt import Sampling, Solver, evaluation_requests
from policy.checkpoint import Policy
from rewards import NO_ANSWER, RIGHT, VERIFIER, WRONG, Scorer
from rollout import DIFFICULTY, EVALUATION, TRAINING, Completion
from run.checkpoints import lock

ROW = {"tokens": 1, "stopped": True, "text": "", "answer": "1", "verdict": RIGHT}


def result(right, **labels):
    """The result of one problem, of whose samples these are right."""
    return result_of([ROW | labels | {"verdict": RIGHT if r else WRONG} for r in right])


def test_samples_of_one_problem_are_one_cluster():
    """Equal samples tell no more than one. Taken one by one, they would halve the interval."""
    one, four = ([result(n * [i < 40]) for i in range(100)] for n in (1, 4))
    assert summarise(one, 1) == summarise(four, 1)


def test_measures_of_one_problem_by_hand():
    """A share of what stopped, under the name of what was cut off; pass@n under that of pass@k."""
    rows = [ROW | {"tokens": n, "stopped": n < 4, "verdict": WRONG} for n in (2, 3, 4)]
    rows.append(ROW | {"tokens": 7, "text": "so \\boxed{3}", "answer": "3"})
    assert measure(result_of(rows), 2) == {
        "accuracy": 0.25,
        "pass@2": 0.5,
        "majority": 0,
        "length": 4,
        "cut_off": 0.25,
        "writes_steps": 0.25,
    }


def test_spellings_of_one_answer_vote_together():
    """Half of these samples have the right answer, in two spellings."""
    answers = [("3", WRONG), ("0.5", RIGHT), (None, WRONG), ("\\frac12", RIGHT)]
    rows = [ROW | {"answer": answer, "verdict": verdict} for answer, verdict in answers]
    assert result_of(rows)["majority"] == 1
    # An R_l of one's own may ask for no answer. Then there is no majority.
    own = [row | {"values": {"R_l": 0.5}} for row in rows]
    assert result_of(own)["majority"] == 1
    boxless = result_of([own[2]])
    assert "majority" not in boxless | differences({0: result([1])}, {0: boxless}, [0])


def test_levels_stand_in_their_order():
    """Texts would put level 10 before level 2."""
    table = print_levels([result([i == 10], level=f"level {i}") for i in (10, 2, 1.5)], 1)
    accuracies = [(level, table[level]["avg@1"][0]) for level in table]
    assert accuracies[:3] == [("level 1.5", 0), ("level 2", 0), ("level 10", 1)]
    assert accuracies[3:] == [("all", approx(1 / 3))]


# --------------------------------------------------------------------------------------- attempts

ADD = [Problem("a", "1+1", "2")]


def load(folder, **flags):
    return Policy.load(str(folder), flags=data.Prompting(**flags))


@fixture
def own_folder(toy_folder, tmp_path):
    """A checkpoint of which a test changes files."""
    return shutil.copytree(toy_folder, tmp_path / "m")


def attempt(policy, prompts, max_new_tokens=10, temperature=1.0):
    """The policy's attempts at each prompt, two each."""
    work = evaluation_requests(policy, prompts, 2, max_new_tokens, 0)
    return Solver(policy, Scorer(9)).attempt(work, Sampling(temperature), 8)


def test_prompts_beyond_the_context_count_as_wrong(toy_policy, printed):
    prompts = toy_policy.render([Problem("long", "1" * 300, "1"), *ADD])
    room = 128 - len(prompts[1].tokens)
    assert [toy_policy.room(p) for p in prompts] == [0, room]
    toy_policy.show("p.jsonl", prompts, room)
    assert "leave less" not in printed()
    toy_policy.show("p.jsonl", prompts, 128)
    said = printed()
    assert "p.jsonl: 1 of 2 prompts fill the context" in said
    assert "1 of 2 prompts leave less than the 128 tokens of" in said
    long, short = attempt(toy_policy, prompts, max_new_tokens=500)
    assert [(a.length, a.score.verdict) for a in long] == [(0, NO_ANSWER)] * 2
    assert all(1 <= a.length <= room for a in short)


@mark.parametrize("temperature", [0, 1])
def test_a_model_that_overflows_is_no_wrong_answer(own_folder, temperature):
    """Its tokens are arbitrary. They were measured as a pass rate of 0."""
    policy = load(own_folder)
    policy.model.model.norm.weight.data.fill_(math.inf)
    (attempts,) = attempt(policy, policy.render(ADD), temperature=temperature)
    with raises(Stop, match="problem 'a': the model's logits are not finite"):
        rows_of("a", attempts)


PROMPTS = [Prompt(Problem(name, "1+1", "2"), [1], "") for name in "abc"]


def test_streams_of_random_numbers(toy_policy):
    """Samples that measured difficulty are not those that evaluate: otherwise a problem that is
    hard by bad luck would be easier after training by better luck."""
    keys = []
    for seed, purpose in itertools.product((0, 1), (TRAINING, DIFFICULTY, EVALUATION)):
        for request in evaluation_requests(toy_policy, PROMPTS, 4, 9, seed, purpose=purpose):
            keys += request.keys
    assert len(set(keys)) == 72  # 2 seeds, 3 purposes, 3 problems, 4 samples


def test_a_problem_keeps_its_stream_however_problems_are_cut(toy_policy):
    """Otherwise two arms whose levels differ would be compared on different samples."""
    a, b, c = requests = evaluation_requests(toy_policy, PROMPTS, 2, 9, 0)
    assert evaluation_requests(toy_policy, PROMPTS[::-1], 2, 9, 0) == [c, b, a]
    assert evaluation_requests(toy_policy, PROMPTS, 2, 9, 0, VERIFIER, EVALUATION) == requests


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
    ((first, _),) = attempt(toy_policy, [replace(prompt, opening=opening)])
    assert first.score.verdict == verdict


def test_a_model_comes_from_the_hub_by_name_and_revision(toy_folder, monkeypatch):
    def download(name, revision, allow_patterns):
        assert (name, revision) == ("o/m", "v2") and "*.safetensors" in allow_patterns
        return toy_folder

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert load("o/m@v2").model.context == 128


def reloaded(policy, folder, **flags):
    """The policy of a checkpoint that this one is written to."""
    policy.model.save_pretrained(folder)
    policy.save(folder)
    return load(folder, **flags)


def test_stop_tokens_come_from_five_places_and_are_saved(own_folder, tmp_path):
    """Both configs, the tokenizer, the token by which its template ends a turn, and --stop. A
    checkpoint stops where its training did, without flags."""
    (own_folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    edit(own_folder / "config.json", {"eos_token_id": 9})
    turns = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    (own_folder / "chat_template.jinja").write_text(turns)
    policy = load(own_folder, stop=["\n"])
    own = {policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id}
    assert set(policy.stop_ids) == own | {7, 8, 9, *policy.tokenizer("\n")["input_ids"]}
    assert reloaded(policy, tmp_path / "saved").stop_ids == policy.stop_ids


def test_the_stop_token_is_no_text(toy_policy):
    tokens = toy_policy.tokenizer("1+1")["input_ids"]
    stopped, cut_off = Completion([*tokens, 7], [], True), Completion(tokens, [], False)
    assert toy_policy.text(stopped) == toy_policy.text(cut_off) == "1+1"


def prompt_of(policy):
    (prompt,) = policy.render(ADD)
    return policy.tokenizer.decode(prompt.tokens)


def change_tokenizer(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def begin_with_bos(tokenizer):
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )


@mark.parametrize("bos", ["", "<|pad|>"])
def test_a_base_model_gets_the_plain_template(own_folder, tmp_path, bos):
    """Its prompt is the problem, the suffix and a new line. A Llama base has seen no text without
    its BOS. A checkpoint has the same prompt, by itself."""
    (own_folder / "chat_template.jinja").unlink()
    if bos:
        change_tokenizer(own_folder, begin_with_bos)
    policy = load(own_folder, suffix=" =")
    saved = reloaded(policy, tmp_path / "saved", suffix=" =")
    assert prompt_of(policy) == prompt_of(saved) == f"{bos}1+1 =\n"


BOS = """
Q: {{ bos_token }} | Q: {{ bos_token }}
<|pad|>Q | <|pad|>Q
{# no bos_token #}Q | {# no bos_token #}Q
Q | {{ bos_token }}Q
"""


@mark.parametrize("template, expected", table(BOS))
def test_a_template_gets_the_bos_that_it_does_not_mention(template, expected):
    tokenizer = make_tokenizer()
    assert data.with_bos(tokenizer, template) == template
    begin_with_bos(tokenizer)
    assert data.with_bos(tokenizer, template) == expected


def test_a_text_is_graded_as_it_was_written(own_folder):
    """Some tokenizers remove blanks before punctuation when they decode: another program."""
    change_tokenizer(own_folder, lambda t: setattr(t, "clean_up_tokenization_spaces", True))
    assert load(own_folder).tokenizer.clean_up_tokenization_spaces is False


def test_a_config_that_names_no_end_has_none(own_folder, toy_policy, tmp_path):
    """transformers gives such a Llama token 2, and its completions would end at any "#"."""
    config = read(own_folder / "config.json")
    del config["eos_token_id"]
    (own_folder / "config.json").write_text(json.dumps(config))
    policy = load(own_folder)
    assert policy.stop_ids == toy_policy.stop_ids
    assert reloaded(policy, tmp_path / "saved").stop_ids == toy_policy.stop_ids


def no_blank(tokenizer):
    """As transformers 5 encodes for R1-Distill-Llama."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), "")


def test_a_tokenizer_that_loses_blanks_is_refused(own_folder):
    """Words that run together cost a model most of what it can, and every figure looks real."""
    change_tokenizer(own_folder, no_blank)
    with raises(ValueError, match="blanks are lost.*PreTrainedTokenizerFast"):
        load(own_folder)


@mark.parametrize("decode, number", [(str, 0), (" {}".format, 1), (chr, 1)])  # chr fails
def test_other_changes_by_a_tokenizer_are_one_line(printed, decode, number):
    """Some put a blank in front, on purpose. A toy may fail."""
    checkpoint.check_round_trip("m", SimpleNamespace(encode=lambda text, **_: text, decode=decode))
    said = printed()
    assert said.count("m: its tokenizer makes") == said.count("\n") == number


def test_a_template_takes_arguments(toy_folder):
    """Qwen3 thinks unless the template hears enable_thinking=False."""
    policy = load(toy_folder, template_kwargs='{"enable_thinking": false}')
    policy.tokenizer.chat_template = "{{ 'no' if enable_thinking is false else 'yes' }}"
    assert prompt_of(policy) == "no"


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
    right = np.mean([row["verdict"] == RIGHT for row in rows])
    assert len(rows) == 15
    assert right == approx(measures["all"]["avg@3"][0])
    run(f"{flags} --out again")  # no longer measures difficulty
    assert lines("again/completions.jsonl") != rows
    said = "levels by difficulty, up to --quality"
    both = run(f"{SHORT} --data p.jsonl g.jsonl --quality 0.5 1 --out both")
    assert list(json.loads(both[-1])["files"]["p.jsonl"]) == list(measures)
    assert f"{said} 0.5 1.0" in both and not any(said in line for line in printed)  # declared ones
    graded = read_problems("g.jsonl")
    assert np.mean([p.pass_rate for p in graded]) == approx(right)
    how = {"samples": 3, "temperature": 1.0, "max_new_tokens": 8}
    for p in graded:
        assert p.other["source"] == "s" and p.other["measured"].items() >= how.items()


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


def test_a_late_reward_measures_nothing_and_a_bad_one_ends_it(run, tmp_path, ended):
    """A slow judge made a problem the hardest of all; an infinite reward was right."""
    (tmp_path / "own.py").write_text(LATE_OR_BAD)
    write_problems("p.jsonl", 3)
    flags = f"{SHORT} --reward-timeout 0.5 --reward own.py"
    printed = run(f"{flags}:first_late --out a --add-pass-rate g.jsonl")
    assert json.loads(printed[-1])["files"]["p.jsonl"]["all"]["late"][0] == approx(1 / 3)
    assert [p.pass_rate for p in read_problems("g.jsonl")] == [None, 1, 1]
    assert any("not measured, 2 of its rewards came too late" in line for line in printed)
    ended("--reward returned, for problem 'p-1', inf", f"{flags}:infinite --out b", 1)


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
    write_result("a", {0: [1]})
    write_result("q", {0: [1]}, "q.jsonl")
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


def test_ctrl_c_keeps_what_is_written(ended, monkeypatch):
    """One line and the exit code of an interrupt, no traceback. The first batch stays on disk."""
    write_problems("p.jsonl", 9)
    batches, attempt = [], Solver.attempt

    def interrupted(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return attempt(*args)

    monkeypatch.setattr(Solver, "attempt", interrupted)
    ended("interrupted", f"{SHORT} --slots 8 --out o", 130)
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


def change_settings(folder, name):
    """Change what an evaluation in this folder began with -> flags for the change"""
    if name == "prompts":
        write_lines(folder / "p.jsonl", [{"problem": "2+1", "answer": "2"}])
    if name == "stop tokens":
        (folder / "m/generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    if name == "weights":
        path = folder / "m/model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    return {"temperature": "--temperature 0.5", "purpose": "--add-pass-rate g.jsonl"}.get(name, "")


@mark.parametrize("name", ["temperature", "prompts", "stop tokens", "weights", "purpose"])
def test_it_goes_on_with_the_same_settings_alone(own_folder, tmp_path, run, refused, name):
    """Half of a result at another temperature, or of another model, would be a number of nothing.
    With the same settings nothing is sampled again, and the tables are printed once more."""
    flags = f"--model m {SHORT} --out o"
    before = run(flags)
    i = before.index("o/completions.jsonl: 0 problems are done, 1 are left")
    again = run(f"{flags} --slots 8")
    again.remove("--slots 8: not 256 as before, so the last bits may differ")
    assert "1 problems are done, 0 are left" in again[i] and again[i + 1 :] == before[i + 1 :]
    more = change_settings(tmp_path, name)
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
    folder, config = tmp_path / "checkpoints", tmp_path / "config.json"
    folder.mkdir()
    config.write_text(TRAINED)
    with raises(ValueError, match="not a training run with a checkpoint"):
        parsed(f"--model {tmp_path}")
    for name in ("000099", "000100", "000101", "000102", "000200.part"):
        (folder / name).mkdir()
    args = parsed(f"--model {tmp_path}")
    assert len(list(folder.iterdir())) == 5  # the run may be at work
    assert args.model == str(folder / "000102")
    assert (args.temperature, args.max_new_tokens, args.dtype) == (0.7, 300, "bfloat16")
    assert (args.examples, args.suffix, args.reward) == ("e.jsonl", "", "a.py:f")
    assert (args.seed, args.slots) == (0, None)
    args = parsed(f"--model {tmp_path} --temperature 0.9 --dtype float32")
    assert (args.temperature, args.dtype) == (0.9, "float32")
    edit(config, {"reward": ["a.py:f", "math"]})
    assert parsed(f"--model {tmp_path}").reward == "math"


def test_a_level_of_a_run_is_called_as_in_the_run():
    """Levels that share their problems are one bin, called by the first; declared ones are not the
    levels of a run."""
    problems = [Problem("a", "1", "1", 0.5), Problem("b", "1", "1", 0.1)]
    assert level_names(problems, [1, 1]) == {"a": "level 1", "b": "level 1"}
    assert level_names(problems, [0.5, 1]) == {"a": "level 1", "b": "level 2"}
    declared = {"a": "declared 3"}
    assert level_names([Problem("a", "1", "1", level=3)], [1]) == declared
    # as in a run with --difficulty level
    assert level_names([Problem("a", "1", "1", 0.5, level=3)], []) == declared


def test_what_json_cannot_hold_is_refused_before_sampling(tmp_path, monkeypatch, refused):
    """A date of a data set ended the evaluation after all sampling, and again when repeated."""
    some = [Problem("p1", "1+1", "2", other={"when": date(2026, 1, 1)})]
    monkeypatch.setattr(data, "read_problems", lambda *_, **__: some)
    words = "p.jsonl, 'p1': --add-pass-rate cannot write it as JSON (TypeError"
    refused(words, f"{SHORT} --data p.jsonl --add-pass-rate {tmp_path / 'g.jsonl'}")


# ------------------------------------------------------------------------------------- comparison


def write_result(folder, right, file="p.jsonl", **settings):
    """results.jsonl of one file: right[i][k], whether sample k of problem i is right."""
    results = [{"settings": settings}]
    for i, samples in right.items():
        results.append(result(samples, file=f"{folder}/{file}", problem_id=i))
    write_lines(f"{folder}/results.jsonl", results)


def test_compare_pairs_problems(run):
    """By hand. Each side is better at one problem: paired by their order, which differs, they
    would not differ at all. A third problem has no partner."""
    write_result("a", {0: [1, 0], 1: [1, 1], 2: [1, 1]})
    write_result("b", {1: [0, 1], 0: [1, 1]})
    printed = run("--compare a b/results.jsonl")
    report = json.loads(printed[-1])["p"]
    assert "p: 2 problems in both, 3 in A, 2 in B" in printed
    expected = {"A": 0.75, "B": 0.75, "difference": 0, "low": -0.5, "high": 0.5, "p": 1}
    assert report["accuracy"] == expected
    assert report["problems"] == 2
    assert report["pass@2"]["A"] == 1.0
    assert (report["majority"]["A"], report["majority"]["B"]) == (1.0, 0.5)


def test_compare_says_which_settings_differ(run):
    """Otherwise greedy answers next to sampled ones, or pass@1 next to pass@16, would pass for a
    better model."""
    write_result("a", {0: [1, 0]}, temperature=1.0, k=2, slots=8)
    write_result("b", {0: [1, 1]}, temperature=0.6, k=2, slots=9, top_p=0.95)
    said = [line for line in run("--compare a b") if "differs" in line]
    assert said == ["temperature differs: A 1.0, B 0.6", "top_p differs: A None, B 0.95"]
