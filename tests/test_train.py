"""The loop: gradients that no setting of memory changes, a policy that learns, files that mean
what they say."""

import itertools
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import torch
from conftest import column, lines, norms, random_model, read, write_lines
from pytest import approx, fixture, mark, raises
from test_rollout import sampled
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from data import Order, Problem, Prompt
from eprli import (
    Buffer,
    Group,
    LevelState,
    group_advantage,
    kl_penalty,
    learning_rate,
)
from model import pad
from policy.attempt import Attempt, Request, Sampling, Solver
from policy.checkpoint import default_dtype
from policy.learner import Learner
from rewards import Score
from rollout import TRAINING, Completion, stream_key
from run.config import PER_LEVEL, Config, levels_of, parse, resolve
from run.log import results_of, shown
from run.processes import Ranks
from run.start import check_measured, start_run
from run.update import Update
from tools import report
from train import Sample, accumulate_gradient, learn

METRICS = (
    "update level accuracy reward_mean reward_variance_within reward_variance_between "
    "outcome_mean length_reward_mean length_mean truncated_share writes_steps_share "
    "grader_timeouts grader_errors reward_timeouts "
    "groups_drawn groups_kept groups_all_right groups_all_wrong groups_broken groups_stale "
    "groups_pending carried_share objective entropy clip_low_share "
    "clip_high_share ratio_max kl_old logprob_gap_max logprob_gap_mean grad_norm lr "
    "tokens_sampled tokens_trained sample_seconds score_seconds learn_seconds tokens_per_second "
    "peak_memory_mb completions_left_out"
)


def config(flags, measured=True):
    return resolve(parse(flags.split())[0], measured)


def level(**changes):
    flags = "--quality 1 --prompts 2 --group-size 4 --max-new-tokens 30"
    flags += " --length-weight 0 --buffer-groups 2 --updates 1 --inner-epochs 1"
    (own,) = levels_of(config(flags))
    return replace(own, **changes)


# ---------------------------------------------------------------------------- gradients, in float64


def group(prompt, completions, rewards=(1.0, 0.0)):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return Group(
        prompt=prompt,
        completions=completions,
        outcome=rewards,
        length_reward=torch.zeros_like(rewards),
        advantage=group_advantage(rewards),
        policy_version=1,
    )


def off_policy_samples(model, n=7):
    """Completions of very different lengths, with old log-probs that put some ratios beyond the
    clip."""
    prompts = [[5] * (1 + 3 * i) for i in range(n)]
    limits = [[3 + 4 * i] for i in range(n)]
    keys = [[stream_key(i)] for i in range(n)]
    done = sampled(model, prompts, keys, limits, slots=8, stop_ids=set(), temperature=0.8)
    rng = torch.Generator().manual_seed(0)
    samples = []
    for prompt, (c,), A in zip(prompts, done, torch.linspace(-1.5, 1.5, n).tolist()):
        noise = 0.4 * torch.randn(len(c.tokens), generator=rng).double()
        shifted = (torch.tensor(c.logprobs).double() + noise).tolist()
        completion = Completion(c.tokens, shifted, c.stopped)
        samples.append(Sample(group(prompt, [completion]), completion, A, True))
    return samples


def a_run(model, flags="", reference=None, learner=None):
    learner = learner or Learner(model, Ranks())
    return SimpleNamespace(
        cfg=config(f"--temperature 0.8 {flags}"),
        learner=learner,
        reference=reference,
        ranks=Ranks(),
        policy_version=2,
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient(model, samples, flags, reference=None, most_tokens=4096):
    model.zero_grad()
    run = a_run(model, flags, reference)
    run.learner.most_tokens = most_tokens
    accumulate_gradient(run, level(), samples)
    return gradients(model)


@fixture(scope="module")
def work():
    """A model, another one as reference, and samples to train on."""
    model = random_model(dtype=torch.float64)
    return model, random_model(dtype=torch.float64, seed=1), off_policy_samples(model)


@norms
def test_gradient_does_not_depend_on_micro_batches_order_or_padding(work, norm):
    """A mean of micro-batch means, or a denominator counted per micro-batch, makes the gradient a
    function of memory."""
    model, reference, samples = work
    flags = f"--loss-norm {norm} --kl-coef 0.1"
    one = gradient(model, samples, flags, reference)
    assert one.abs().max() > 1e-3
    for tokens, order in ((1, samples), (40, samples[::-1]), (100, samples[3:] + samples[:3])):
        other = gradient(model, order, flags, reference, tokens)
        assert (one - other).abs().max() < 1e-12


def test_the_kl_term_is_subtracted(work):
    """Added, it would drive the policy away from its start. Without advantages J is that term, of
    both policies at the temperature of sampling."""
    model, reference, samples = work
    run = a_run(model, "--kl-coef 0.1", reference)
    still = [replace(s, advantage=0.0) for s in samples[3:4] * 2]
    J, _ = train.objective(run, level(), model, still, (len(still), 99))
    prompt, (ids, mask) = (
        torch.tensor(still[0].group.prompt),
        pad([s.completion.tokens for s in still]),
    )
    own, start = (m.token_logprobs(prompt, ids, mask, 0.8)[0].detach() for m in (model, reference))
    expected = -0.1 * kl_penalty(own, start, 1 / (len(still) * mask.sum(1)), mask)
    assert J.item() == approx(expected.item()) and J < -1e-3


@norms
def test_number_of_minibatches_does_not_rescale_the_gradient(work, norm):
    """Each step divides by its own count: equal halves give equal gradients, not halves of one.
    verl's Dr. GRPO mode lacks the division by B: there half a step has half the gradient."""
    model, _, samples = work
    groups = [group(s.group.prompt, [s.completion] * 2) for s in samples[3:4] * 4]
    model.zero_grad()
    seen = []

    def look(lr):  # takes no step
        seen.append(gradients(model))
        model.zero_grad()
        return 0.0

    for minibatches in (1, 2, 4):
        learner = Learner(model, Ranks())
        learner.step = look
        flags = f"--loss-norm {norm} --minibatches {minibatches}"
        state = LevelState(1, level(), Order([], ""), None, Buffer())
        update = Update(1, state, 0.1, max_draws=1)
        learn(a_run(model, flags, learner=learner), state, groups, update)
    assert len(seen) == 1 + 2 + 4
    assert all((g - seen[0]).abs().max() < 1e-12 for g in seen)


# ---------------------------------------------------------------------------------------- optimizer


def test_masters_keep_what_bfloat16_would_lose(monkeypatch):
    """lr 1e-4 on bfloat16 weights rounds to nothing; on float32 masters 20 such steps add up."""
    model = random_model(dtype=torch.bfloat16)
    learner = Learner(model, Ranks())
    weight = model.lm_head.weight
    before = weight.detach().clone()
    learner.adamw.param_groups[0]["weight_decay"] = 0.0
    monkeypatch.setattr("policy.learner.MAX_GRAD_NORM", 1e9)
    for _ in range(20):
        weight.float().sum().backward()
        assert weight.grad is None  # its master has it
        norm = learner.step(1e-4)
    assert norm == approx(math.sqrt(before.numel()), rel=1e-3)
    (master,) = [m for w, m in zip(learner.weights, learner.masters) if w is weight]
    assert torch.allclose(master, before.float() - 20e-4, atol=1e-5)
    assert torch.equal(weight, master.bfloat16()) and not torch.equal(before, weight)
    weight.grad = torch.ones_like(weight)  # memory ran out before it came to its master
    learner.drop_gradient()
    assert weight.grad is None  # else it would count once more in the step that is done again


@mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_added_to_its_masters(tied):
    """Over micro-batches, and to that of a tied embedding. Replaced, or returned as well, it would
    be one part or twice as much."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("qwen2", tie_word_embeddings=tied).to(torch.bfloat16).to(dtype)
        learner = Learner(model, Ranks())
        for seed in (0, 1):
            torch.manual_seed(seed)
            prompt, ids = torch.randint(3, 90, (3,)), torch.randint(3, 90, (2, 6))
            mask = torch.ones(2, 6, dtype=bool)
            model.token_logprobs(prompt, ids, mask, 1.0)[0].sum().backward()
        head = [w is model.lm_head.weight for w in learner.weights].index(True)
        assert dtype == torch.float32 or learner.weights[head].grad is None
        grads.append(learner.masters[head].grad)
    assert (grads[0] - grads[1]).norm() < 0.15 * grads[0].norm()


def test_learning_rate_is_warm_up_times_decay():
    def rates(n, warmup, decay):
        return [learning_rate(1.0, warmup, decay, done, done / n) for done in range(n)]

    assert rates(4, 2, "linear") == approx([0.5, 0.75, 0.5, 0.25])
    assert rates(3, 0, "none") == [1.0, 1.0, 1.0]
    cosine = rates(8, 0, "cosine")
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[4] == approx(0.5) and cosine[-1] > 0


def test_progress_follows_the_budget_that_is_used_up_first():
    """A level whose tokens are spent must end, and its rate be 0 there, whatever --updates says."""

    def progress(updates, tokens):
        own = level(updates=updates, tokens=tokens)
        return LevelState(1, own, None, None, Buffer(), num_trained=3, tokens_sampled=500).progress

    assert progress(4, None) == 0.75
    assert progress(None, 2000) == 0.25
    assert progress(4, 2000) == 0.75 and progress(30, 1000) == 0.5
    assert progress(None, 400) == progress(3, None) == progress(0, None) == progress(9, 0) == 1
    for flags, updates in (("--tokens 9 --updates 3", 3), ("--tokens 9", None)):
        assert levels_of(config(f"--quality 1 {flags}"))[0].updates == updates


def test_the_defaults_of_the_shipped_model_are_those_of_the_readme(monkeypatch):
    default = config("")
    assert (default.lr, default.warmup, default.lr_decay) == (2e-4, 2, "none")
    easy, hard = levels_of(default)
    assert (easy.quality, easy.tokens, hard.quality, hard.tokens) == (0.8, 250_000, 1, 750_000)
    for level in easy, hard:
        assert (level.max_new_tokens, level.length_weight, level.updates) == (160, 0.3, None)
        assert (level.group_size, level.buffer_groups, level.prompts) == (16, 16, 16)
    (level,) = levels_of(config("--quality 1 --updates 3"))
    assert (level.updates, level.tokens) == (3, None)
    other = config("--model other --lr 1 --max-new-tokens 9 --updates 1")
    assert other.length_weight == [0, 0] and default_dtype("other", "cuda") == "bfloat16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    assert default_dtype("other", "cuda") == "float32"  # as on a T4


def test_config_json_has_every_flag_resolved(tmp_path, printed, monkeypatch):
    """Of a default run, which has no warning. A value that a later version would fill in otherwise
    changed old runs."""
    out = tmp_path / "run"
    run = start_run(parse(["--out", str(out)])[0], Ranks())
    assert "measured otherwise" not in printed()
    config = read(out / "config.json")
    nothing = {f.name for f in fields(Config) if config[f.name] is None}
    assert nothing == {"examples", "template", "tracker", "eval_every"}  # as --help says
    for name in [*PER_LEVEL, "slots"]:
        assert len(config[name]) == 2 and (None in config[name]) == (name == "updates")
    assert config["eval_quality"] == [0.8, 1.0] and config["lr"] == 2e-4
    monkeypatch.setattr("run.config.DEFAULTS", {})
    assert parse(["--resume", str(out)])[0] == run.cfg


def test_a_step_without_signal_moves_nothing():
    """Adam's momentum and weight decay would move the weights although every advantage is 0."""
    model = random_model()
    learner = Learner(model, Ranks())
    model(torch.tensor([[1, 2]])).sum().backward()
    learner.step(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.tensor([[1, 2]])).sum() * 0).backward()
    assert learner.step(0.1) == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


# --------------------------------------------------------------------------------------- whole runs

REWARDS = """
import asyncio
def even(problem, response):
    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
def sometimes(problem, response):
    return even(problem, response) if int(problem["id"][1:]) % 4 < 2 else 0.0
def never(problem, response):
    return 0.0
def always(problem, response):
    return 1.0
def crash(problem, response):
    return problem['nothing']
WEIGHTS = {"even": 0.5, "long": 0.5}
def parted(problem, response):
    assert problem["answer"] == [1, None]
    return {"even": even(problem, response) > 0.5, "long": len(response) > 4}
async def slow(problems, responses):
    if problems[0]["id"] in ("p0", "p4", "p8"):
        await asyncio.sleep(60)
    return [even(*pair) for pair in zip(problems, responses)]
"""
DEFAULTS = """--data p.jsonl --reward toy_reward.py:even --group-size 4 --buffer-groups 2
--max-new-tokens 6 --updates 2 --out run --device cpu --lr 1e-2 --warmup 0 --length-weight 0
--lr-decay linear"""


@fixture
def workshop(tmp_path, toy_folder, monkeypatch):
    """A folder with problems whose answer is one token away, and a function that trains on them;
    -> the folder of the run"""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i, text in enumerate("0123456789abcdefghij"):
        rows.append({"id": f"p{i}", "problem": text, "answer": "1", "level": i % 2 + 1})
        rows[-1]["pass_rate"] = [0.5, 0.1][i % 2]
    write_lines("p.jsonl", rows)
    (tmp_path / "toy_reward.py").write_text(REWARDS)
    monkeypatch.setattr(report, "draw", lambda runs: "left out: it takes a second")

    def run(flags="", defaults=DEFAULTS):
        words = f"--model {toy_folder} {defaults} {flags}".split()
        train.main(words)
        return tmp_path / parse(words)[0].out

    return run


@fixture
def metrics(workshop):
    """Train; -> the rows of metrics.jsonl"""
    return lambda flags: lines(workshop(flags) / "metrics.jsonl")


def test_pass_rates_of_other_models_and_settings_are_said(printed):
    """The shipped problems have the rates of the shipped model, and cut wrong levels for any other.
    With what measured them nothing is said."""
    cfg = config("--model m --lr 1 --updates 1 --max-new-tokens 8 --temperature 1")
    now = {"weights": "w", "temperature": 1.0, "max_new_tokens": 8}
    own = now | {"model": "m", "samples": 64}
    cases = {
        "": own,
        "weights x, now": own | {"weights": "x"},
        "temperature 0.6, now 1.0": own | {"temperature": 0.6},
        "max_new_tokens 9, now 8": own | {"max_new_tokens": 9},
        "4 samples a problem, fewer than 16": own | {"samples": 4},
        "None samples a problem": now | {"model": "m"},
        "nothing says what measured": None,
    }
    for words, measured in cases.items():
        problems = [Problem("i", "1", "1", 0.5, other={"measured": measured})]
        check_measured(cfg, problems, "w")
        said = printed()
        assert words in said and bool(words) == bool(said)


BROKEN_TRACKER = """
def init(**_):
    1 / {works}
def log(values, step):
    assert values and not any(value != value for value in values.values())
def finish():
    raise OSError("no network")
"""


@mark.parametrize("works", [False, True])
def test_a_tracker_that_fails_is_one_line(workshop, tmp_path, monkeypatch, capsys, works):
    """At the start nothing may be left behind; at the end it was a traceback of a run that had gone
    well."""
    (tmp_path / "wandb.py").write_text(BROKEN_TRACKER.format(works=works))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if works:
        workshop("--tracker wandb --eval-data p.jsonl --reward toy_reward.py:never")  # skipped: nan
        said = capsys.readouterr().out
        assert "--tracker: OSError: no network" in said and said.count("--tracker:") == 1
    else:
        with raises(SystemExit, match="2"):
            workshop("--tracker wandb")
        assert "--tracker wandb: cannot begin" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == works


DRAW = report.draw


def test_a_run_leaves_its_numbers_in_plain_files(workshop, printed, monkeypatch):
    monkeypatch.setattr(report, "draw", DRAW)
    out = workshop("--eval-data p.jsonl --save-every 1 --length-weight 0.5")
    metrics, evaluations = lines(out / "metrics.jsonl"), lines(out / "eval.jsonl")
    completions = lines(out / "completions.jsonl")
    assert [(row["update"], row["level"]) for row in metrics] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    for row in metrics:
        assert set(row) == set(METRICS.split())
        mine = [c for c in completions if c["update"] == row["update"]]
        rewards = [c["outcome"] + c["length_reward"] for c in mine]
        right = [c["verdict"] == "right" for c in mine]  # the grader's word, not R_l
        assert len(mine) == 4 * row["groups_drawn"] and row["completions_left_out"] == 0
        assert row["tokens_sampled"] == sum(column(mine, "tokens"))
        assert row["reward_mean"] == approx(sum(rewards) / len(mine))
        groups = torch.tensor(rewards, dtype=torch.float64).view(-1, 4)
        within, between = groups.var(1, correction=0).mean(), groups.mean(1).var(correction=0)
        assert row["reward_variance_within"] == approx(within.item())
        assert row["reward_variance_between"] == approx(between.item())
        assert row["accuracy"] == sum(right) / len(mine)
        assert row["logprob_gap_max"] < 1e-5 and row["kl_old"] >= 0
        assert 0 < row["entropy"] < math.log(262) and 50 < row["peak_memory_mb"] < 50_000
    places = [(row["update"], row["level"]) for row in evaluations]
    assert places == [(0, 1), (0, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    for row in evaluations:
        assert 0 <= row["writes_steps_share"] <= 1
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["n"] == 10
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000003", "000004"]
    assert read(out / "config.json")["quality"] == [0.8, 1.0]
    assert (out / "report.png").stat().st_size > 10_000
    assert (out / "report.html").stat().st_size > 25_000
    last = out / "checkpoints/000004"
    assert AutoModelForCausalLM.from_pretrained(last).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(last).chat_template


@mark.parametrize("seed", [0, 1])
def test_fifteen_updates_raise_the_reward(metrics, seed):
    """The smallest proof that sign, ratio and advantage fit together; the reward is the share of
    even characters."""
    rows = metrics(f"--updates 15 --quality 1 --group-size 8 --buffer-groups 4 --seed {seed}")
    rewards = column(rows, "reward_mean")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_completions_are_bounded_and_what_is_left_out_is_counted(workshop, printed, monkeypatch):
    """A bound that cut a group, or that reached the statistics, would pass unseen: they must be of
    all completions drawn."""

    def kept(groups):
        monkeypatch.setattr("run.update.KEEP", groups)
        return workshop(f"--out keep{groups} --reward toy_reward.py:sometimes")

    every, some = kept(1000), kept(1)
    rows = lines(some / "metrics.jsonl")
    for row, whole in zip(rows, lines(every / "metrics.jsonl")):
        mine = [c for c in lines(some / "completions.jsonl") if c["update"] == row["update"]]
        assert column(mine, "sample") == [0, 1, 2, 3]
        assert row["completions_left_out"] == 4 * row["groups_drawn"] - 4
        for name in ("reward_mean", "accuracy", "length_mean", "tokens_sampled"):
            assert row[name] == whole[name]


def test_interleaved_levels_take_turns(metrics):
    assert column(metrics("--schedule interleaved --updates 3 1"), "level") == [1, 2, 1, 1]


@mark.parametrize("reward, fate", [("never", "all_wrong"), ("always", "all_right")])
def test_it_ends_when_every_problem_is_solved_or_none_is(metrics, reward, fate, printed):
    """Dynamic sampling must not draw for ever: three skipped updates end a level."""
    rows = metrics(f"--reward toy_reward.py:{reward} --updates 9 --max-draws 2")
    assert column(rows, "level") == [1, 1, 1, 2, 2, 2]
    for row in rows:
        assert row["groups_drawn"] == 4 == row[f"groups_{fate}"] and row["groups_kept"] == 0
        assert row["objective"] is None
    assert "ends early after 3 skipped updates" in printed()


def test_surplus_is_trained_on_next_and_then_stale(metrics):
    """Without buffer.expire in the loop, old groups would be trained on under log-probs of a policy
    long gone."""
    rows = metrics("--quality 1 --updates 3 --prompts 7")  # 2 are wanted
    assert column(rows, "groups_pending") == [5, 3, 0]
    assert column(rows, "groups_drawn") == [7, 0, 7]
    assert column(rows, "groups_stale") == [0, 0, 3 + 5]
    assert column(rows, "carried_share") == [0, 1, 0]
    assert rows[1]["accuracy"] is None and rows[1]["ratio_max"] > 1.001  # off-policy
    assert [gap is None for gap in column(rows, "logprob_gap_max")] == [False, True, False]


def test_a_skipped_update_does_not_age_the_buffer(metrics):
    """Groups wait under the very policy that sampled them: three short draws fill one buffer."""
    flags = "--prompts 2 --buffer-groups 6 --max-draws 1 --filter all --quality 1 --updates 1"
    rows = metrics(flags)
    assert column(rows, "groups_kept") == [0, 0, 6]
    assert not any(column(rows, "groups_stale"))


def test_what_is_logged_is_what_its_name_says(metrics):
    """Against recomputation from the completions."""
    flags = "--filter all --inner-epochs 2 --eps-low 1e-3 --eps-high 0.9 --lr 1e-3"
    for row in metrics(f"--quality 1 --updates 4 --warmup 2 {flags}"):
        assert row["tokens_trained"] == 2 * row["tokens_sampled"]  # every group kept, two passes
        assert row["clip_high_share"] == 0 < row["clip_low_share"] < 1  # 1.9 is never reached
        assert 1 < row["ratio_max"] < 1.9 and row["grad_norm"] > 0


def test_failures_of_the_grader_are_counted_and_said(metrics, monkeypatch, printed):
    """A reward that silently turns into zeros looks like a policy that does not learn."""

    number = itertools.count()

    def compare(self, cases):
        return ["wrong" if next(number) % 10 else "timeout" for _ in cases]

    monkeypatch.setattr("rewards.Grader.compare", compare)
    row = metrics("--reward math --quality 1 --updates 1 --buffer-groups 10 --filter all")[0]
    assert row["grader_timeouts"] == 4 and row["grader_errors"] == row["accuracy"] == 0
    assert "counted as wrong: {'grader_timeout': 4" in printed()


def test_surplus_that_is_dropped_is_never_trained_on(metrics):
    """DAPO and verl: all groups of an update are of the policy that it begins with."""
    rows = metrics("--quality 1 --updates 3 --prompts 7 --surplus drop")
    assert column(rows, "groups_drawn") == [7, 7, 7]
    assert column(rows, "groups_stale") == [0, 5, 5 + 5]
    assert column(rows, "carried_share") == [0, 0, 0]


def test_only_missing_prompts_are_drawn(metrics):
    """Every other group is flat. Later draws are as small as they can be, so surplus is rare;
    all together stay within max_draws x P_l prompts."""
    flags = (
        "--quality 1 --updates 1 --prompts 4 --buffer-groups 3 --max-draws 3 --reward toy_reward"
    )
    (missing,) = metrics(f"{flags}.py:sometimes --surplus missing --out missing")
    (keep,) = metrics(f"{flags}.py:sometimes --surplus keep --out keep")
    assert missing["groups_kept"] == keep["groups_kept"] == 3
    assert missing["groups_stale"] == 0 < keep["groups_stale"]
    assert missing["groups_drawn"] < keep["groups_drawn"]
    never = metrics(f"{flags} --reward toy_reward.py:never --surplus missing")
    assert never[0]["groups_drawn"] == 12


@mark.parametrize("tokens, trained", [("0 40", {2}), ("40 0", {1}), ("40 40", {1, 2})])
def test_a_budget_of_tokens_ends_a_level_and_0_switches_it_off(workshop, tokens, trained):
    """Every level is evaluated, whether it is trained or not; a level ends with the first update
    that reaches its budget, and dropped groups count."""
    flags = f"--eval-data p.jsonl --tokens {tokens} --prompts 3"
    out = workshop(flags, DEFAULTS.replace("--updates 2", ""))
    metrics, evaluations = lines(out / "metrics.jsonl"), lines(out / "eval.jsonl")
    assert set(column(metrics, "level")) == trained
    for number in trained:
        spent = [row["tokens_sampled"] for row in metrics if row["level"] == number]
        assert sum(spent[:-1]) < 40 <= sum(spent)
    assert set(column(evaluations, "level")) == {1, 2}
    assert evaluations[-1]["tokens_sampled"] == sum(column(metrics, "tokens_sampled"))


def test_a_skipped_update_consumes_neither_updates_nor_the_schedule(metrics):
    """One prompt in three fills the buffer of one group."""
    flags = "--quality 1 --prompts 1 --max-draws 1 --buffer-groups 1 --minibatches 1"
    rows = metrics(f"{flags} --reward toy_reward.py:sometimes --updates 3")
    trained = column(rows, "groups_kept")
    assert 0 in trained and sum(trained) == 3
    expected = [1e-2 * (1 - sum(trained[:i]) / 3) for i in range(len(rows))]
    assert column(rows, "lr") == approx(expected)


@mark.parametrize(
    "flags, expected",
    [
        ("--warmup 2", [0.005, 0.005, 0.005, 0.005]),
        ("", [0.01, 0.005, 0.01, 0.005]),
        ("--schedule interleaved", [0.01, 0.01, 0.005, 0.005]),
    ],
)
def test_the_rate_warms_up_and_decays_within_each_level(metrics, flags, expected):
    """One schedule over all levels would give the last one the smallest steps."""
    assert column(metrics(flags), "lr") == approx(expected)


def test_levels_may_share_their_problems(workshop):
    """As when lengths rise on one set of problems; a bin keeps the number of its level."""
    out = workshop("--eval-data p.jsonl --quality 0.5 0.5 0.9 --updates 1")
    assert column(lines(out / "eval.jsonl"), "level")[:2] == [1, 3]


def test_held_out_problems_are_cut_alike_for_every_arm(workshop):
    """One level and two levels are compared on the same bins, the same problems and samples."""
    flags = "--eval-quality 0.5 1.0 --updates 1"
    one, two = (
        lines(workshop(f"--eval-data p.jsonl {flags} {more}") / "eval.jsonl")[:2]
        for more in ("--quality 1 --out one", "--quality 0.5 1 --out two")
    )
    assert one == two and column(one, "level") == [1, 2]


def test_held_out_files_are_told_apart(workshop, tmp_path, printed, monkeypatch):
    """In everything that is written down or printed. Their problems may have the same ids."""
    rows = [{"id": f"p{i}", "problem": c, "answer": "1"} for i, c in enumerate("xy0")]
    write_lines(tmp_path / "plain.jsonl", rows)
    sent = []
    monkeypatch.setattr("run.log.Log.track", lambda self, values, step: sent.append(values))
    out = workshop("--eval-data p.jsonl plain.jsonl --updates 1")
    found = [(row["file"], row["level"], row["n"]) for row in lines(out / "eval.jsonl")]
    assert found == 3 * [("p", 1, 10), ("p", 2, 10), ("plain", None, 3)]
    config = read(out / "config.json")
    assert list(config["read"])[:3] == ["--data", "--eval-data p", "--eval-data plain"]
    assert config["eval_data"] == [str(tmp_path / name) for name in ("p.jsonl", "plain.jsonl")]
    words = printed()
    assert "held out, p, level 2: " in words and "plain.jsonl: 3 problems" in words
    table = words.split("held-out accuracy")[-1].splitlines()
    names = ["p, level 1", "p, level 2", "plain, all problems"]
    table = [line for line in table[1:7] if "R_l" not in line]
    assert [line[:21].strip() for line in table] == names
    assert list(sent[0]) == [f"held out, {name}" for name in names]
    assert len({len(line) for line in table}) == 1
    first = lines(out / "eval.jsonl")[0]
    assert f"{first['accuracy']:.1%} [" in table[0][21:45]  # before
    assert first["length_mean"] > 1 > first["writes_steps_share"] == 0


def test_results_are_shown_in_their_units():
    """Of an R_l of one's own its mean and parts as they are, `late` if any was."""
    row = {"level": 2, "accuracy": 0.5, "low": 0.25, "high": 1.0, "file": "f"}
    assert results_of(row) == {"f, level 2": "50.0% [25.0%, 100.0%]"}
    row["means"] = {"R_l": [1.0, 0.5, 2.0], "late": [0.0, 0.0, 0.1]}
    assert (
        results_of(row)["f, level 2, R_l"] == "1.000 [0.500, 2.000]" and len(results_of(row)) == 2
    )
    row["means"]["late"] = [0.01, 0.0, 0.1]
    assert results_of(row)["f, level 2, late"] == "1.0 % [0.0, 10.0]"
    assert shown("length", [3.0, 2.0, 4.0]) == "3.0 [2.0, 4.0]"


def test_held_out_completions_may_be_as_long_as_any_levels(workshop, monkeypatch):
    """And are sampled as in training."""
    seen, attempt = [], Solver.attempt

    def watch(solver, work, sampling, *rest):
        if len(rest) == 1:  # an evaluation asks for no seconds
            seen.extend((request.limit, sampling.temperature) for request in work)
        return attempt(solver, work, sampling, *rest)

    monkeypatch.setattr(Solver, "attempt", watch)
    flags = "--max-new-tokens 3 9 5 --updates 1 --temperature 0.7 --quality 1"
    workshop(f"--eval-data p.jsonl {flags}")
    assert set(seen) == {(9, 0.7)}


LONG = [{"problem": c * n, "answer": "1", "pass_rate": 0.5} for c in "ab" for n in (1, 300)]


@mark.parametrize(
    "flags, evaluations",
    [
        ("--loss-norm token --adv-std none --length-kind kimi --length-weight 1", 0),
        ("--length-kind cosine --length-weight 0 0.5 --minibatches 1", 0),
        ("--kl-coef 0.1 --filter all --loss-norm constant", 0),
        ("--dtype bfloat16 --inner-epochs 2 1 --lr-decay cosine", 0),
        ("--difficulty level --quality 1 2 --examples e.jsonl", 0),
        ("--eval-data p.jsonl --eval-every 1", 6),
        ("--eval-data p.jsonl --eval-every 0", 0),
    ],
)
def test_settings_run(workshop, flags, evaluations):
    write_lines("e.jsonl", [{"problem": "8", "solution": "\\boxed{1}"}])
    out = workshop(f"--updates 1 {flags}")
    assert len(lines(out / "metrics.jsonl")) == 2
    assert sum(len(lines(path)) for path in out.glob("eval.jsonl")) == evaluations


def test_data_without_pass_rates_is_one_level_and_says_so(metrics, printed):
    write_lines("plain.jsonl", [{"problem": c, "answer": 1} for c in "abcdeea"])
    assert column(metrics("--data plain.jsonl --updates 1"), "level") == [1]
    text = printed()
    assert "plain.jsonl: no problem has a pass_rate" in text
    assert read("run/config.json")["repeats_removed"] == 2


def test_prompts_longer_than_the_context_are_dropped_and_counted(workshop, printed):
    write_lines("long.jsonl", LONG)
    out = workshop("--data long.jsonl --quality 1 --updates 1")
    assert "'prompt too long': 2" in printed()
    assert set(column(lines(out / "completions.jsonl"), "problem_id")) == {"long-1", "long-3"}


@mark.parametrize(
    "kind, lengths, expected",
    [
        ("cosine", (5, 5), (0.25, -0.25)),
        ("overlong", (5, 9), (0, -0.5)),
        ("kimi", (5, 10), (0.5, -0.5)),
    ],
)
def test_length_rewards_know_the_limit_that_applied_and_what_r_l_calls_right(
    kind, lengths, expected
):
    """The context ends before Len_l, so 5 tokens are half of what there was; and the user's R_l,
    not the grader, says which of two completions is right: one of 0.5 is not."""
    run = SimpleNamespace(cfg=Config(length_kind=kind), policy_version=0)
    own = level(max_new_tokens=40, length_weight=1.0)
    attempts = []
    for outcome, verdict, n in zip((1.0, 0.5), ("right", "wrong"), lengths):
        completion = Completion([7] * n, [-1.0] * n, True)
        attempts.append(Attempt(completion, "", Score(outcome, verdict, "1")))
    prompt = Prompt(Problem("p", "1", "1"), [1], "")
    group = train.make_group(run, own, Request(prompt, [], None, 10), attempts)
    assert group.length_reward.tolist() == approx(expected)


def test_an_error_in_ones_own_reward_names_the_problem_and_saves_the_state(workshop, capsys):
    with raises(SystemExit, match="1"):
        workshop("--reward toy_reward.py:crash")
    error = capsys.readouterr().err
    assert "--reward toy_reward.py:crash, problem 'p" in error and "KeyError: 'nothing'" in error
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["000000"]


def test_ones_own_reward_is_the_same_on_held_out_problems(workshop, printed):
    """Held-out accuracy was the grader's, whatever R_l. The parts are logged before their weights,
    and a gold answer reaches R_l as the file has it."""
    rows = [{"id": f"p{i}", "problem": c, "answer": [1, None]} for i, c in enumerate("0123456789")]
    write_lines("own.jsonl", rows)
    data = "--data own.jsonl --eval-data own.jsonl --quality 1 --max-new-tokens 8 --filter all"
    out = workshop(f"{data} --reward toy_reward.py:parted --eval-samples 4")
    row, completions = lines(out / "metrics.jsonl")[0], lines(out / "completions.jsonl")
    first = [c for c in completions if c["update"] == 1]
    for name in ("even", "long"):
        assert row[f"part_{name}_mean"] == approx(
            np.mean([c["values"][f"part_{name}"] for c in first])
        )
    for c in first:
        assert c["outcome"] == 0.5 * (c["values"]["part_even"] + c["values"]["part_long"])
        assert c["verdict"] == ("right" if c["outcome"] == 1 else "wrong")
    held_out = lines(out / "eval.jsonl")[-1]
    means = {name: mean for name, (mean, *_) in held_out["means"].items()}
    assert list(means) == ["R_l", "part_even", "part_long", "late"]
    assert means["R_l"] == approx(0.5 * (means["part_even"] + means["part_long"]))
    assert 0 < held_out["accuracy"] < means["R_l"]
    assert "all problems, part_even" in printed()


def test_a_held_out_bin_has_the_reward_of_its_level(workshop):
    """That of level 1 for easy problems, of level 2 for hard ones, however they are cut."""
    flags = "--eval-data p.jsonl --reward toy_reward.py:never toy_reward.py:always --filter all"
    for cut, found in (
        ("", [0, 1]),
        ("--eval-quality 1", [1]),
        ("--eval-quality 0.6 1", [1, 1]),
    ):
        rows = lines(workshop(f"{flags} {cut} --out o{len(cut)}") / "eval.jsonl")
        assert column(rows[: len(found)], "accuracy") == found


def test_a_reward_that_takes_too_long_costs_its_group_alone(metrics, printed, monkeypatch):
    """Not the update, as a nan does; its groups are counted, and no mean holds them."""
    monkeypatch.setattr("run.update.KEEP", 20)
    flags = "--reward-timeout 0.5 --quality 1 --prompts 20 --length-weight 0.5"
    (row, _) = metrics(f"{flags} --reward toy_reward.py:slow")
    assert (row["groups_drawn"], row["groups_broken"], row["reward_timeouts"]) == (20, 3, 3)
    assert row["groups_kept"] == 2 and row["grad_norm"] > 0
    drawn = [c for c in lines(Path("run/completions.jsonl")) if c["update"] == 1]
    on_time = [c for c in drawn if c["problem_id"] not in ("p0", "p4", "p8")]
    assert len(drawn) == 80 and all(c["outcome"] is None for c in drawn if c not in on_time)
    outcomes = sum(column(on_time, "outcome"))
    assert row["outcome_mean"] == approx(outcomes / 68)
    total = outcomes + sum(column(on_time, "length_reward"))
    assert row["reward_mean"] == approx(total / 68)
    assert row["tokens_sampled"] == sum(column(drawn, "tokens"))
    assert "3 groups broken: --reward took longer" in printed()


def test_no_two_completions_share_a_stream(workshop, monkeypatch):
    """Levels that share their streams would sample one thing twice. And an update draws P_l prompts
    at first, whatever waits in the buffer."""
    drawn, attempt = [], Solver.attempt

    def watch(solver, work, *rest):
        drawn.append([key for request in work for key in request.keys])
        return attempt(solver, work, *rest)

    monkeypatch.setattr(Solver, "attempt", watch)
    more = "--prompts 4 --buffer-groups 3 5 --surplus missing --filter all --eval-every 0 --seed 1"
    workshop(f"--quality 0.5 1 --updates 2 {more}")
    assert [len(keys) // 4 for keys in drawn] == [4, 4, 4, 1, 4, 1]
    everything = sum(drawn, [])
    assert len(set(everything)) == len(everything) == 72
    assert everything[0] == stream_key(1, TRAINING, 1, 0, 0)


def test_an_update_whose_gradient_is_0_changes_nothing(metrics, printed):
    """It counted as one that trained: a finished level went on until its last update."""
    rows = metrics("--quality 1 --updates 9 --filter all --reward toy_reward.py:always")
    assert column(rows, "grad_norm") == [0, 0, 0]
    assert "update 3 changed nothing: all its groups are flat" in printed()


def test_a_picture_that_cannot_be_drawn_fails_no_run(workshop, printed, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda runs: 1 / 0)
    workshop("--updates 1")
    assert "no picture or page of run (ZeroDivisionError" in printed()


def test_a_call_that_ends_early_drops_its_rewards(toy_policy, monkeypatch):
    """After Ctrl-C coroutines would go on, and cost."""
    monkeypatch.setattr("policy.attempt.sample", Mock(side_effect=KeyboardInterrupt))
    using = Mock()
    with raises(KeyboardInterrupt):
        Solver(toy_policy, using).attempt([], Sampling(1.0), 8)
    using.calls.drop.assert_called_once()
