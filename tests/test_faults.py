"""Numbers that go wrong: they are noticed, said, kept for study, and never reach the weights or the disk."""

import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_train import lines, workshop  # noqa: F401  the fixture

import infra.run as rundir
import train
from eprli import Buffer
from infra.ranks import Ranks
from rollout import choose

pytestmark = pytest.mark.faults

REWARDS = """
import random
calls = []

def value(bad, when):
    def reward(problem, response):
        calls.append(1)
        return bad if when(len(calls)) else float(random.Random(len(calls)).random() < 0.5)
    return reward

nan = value(float("nan"), lambda n: True)
inf = value(float("inf"), lambda n: n % 5 == 0)
once = value(float("nan"), lambda n: n == 21)
"""


@pytest.fixture
def run(workshop, tmp_path):  # noqa: F811
    """A run of five updates; -> its exit code. Each draws two groups of four, and trains on them in two steps."""
    (tmp_path / "bad.py").write_text(REWARDS)

    def run(**flags):
        try:
            workshop(
                **{
                    "quality": 1.0,
                    "updates": 5,
                    "prompts": 2,
                    "filter": "all",
                    "reward": "bad.py:once",
                    "save_every": 1,
                    "warmup": 0,
                    **flags,
                }
            )
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def weights(tmp_path, name):
    return load_file(tmp_path / "run/checkpoints" / name / "model.safetensors")


def spoil(monkeypatch, calls, change):
    """clipped_objective gives change(J, logprob) in these of its calls; an update makes two."""
    real, count = train.clipped_objective, []

    @functools.wraps(real)
    def spoiled(logprob, *others):
        count.append(1)
        J = real(logprob, *others)
        return change(J, logprob) if len(count) in calls else J

    monkeypatch.setattr(train, "clipped_objective", spoiled)


def nan_loss(J, logprob):
    return J * float("nan")


def infinite_loss(J, logprob):
    return J + float("inf")


def nan_gradient(J, logprob):
    return J + (0 * logprob.sum()).sqrt()  # 0, with a slope of 0 / 0


def conserved(row):
    fates = ("kept", "all_right", "all_wrong", "broken", "stale")
    return sum(row[f"groups_{fate}"] for fate in fates)


@pytest.mark.parametrize("reward, said", [("nan", "returned, for problem p"), ("inf", "inf")])
def test_a_reward_that_is_never_finite_stops_the_run_after_three_updates(
    run, tmp_path, capsys, reward, said
):
    assert run(reward=f"bad.py:{reward}") == 1
    printed = capsys.readouterr()
    assert (
        "3 updates in a row met numbers that are not finite" in printed.err
        and f"--reward bad.py:{reward}" in printed.err
        and said in printed.err
    )
    assert "no checkpoint was written before" in printed.err and not list(
        (tmp_path / "run/checkpoints").iterdir()
    )
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [row["update"] for row in metrics] == [1, 2, 3] and all(
        row["groups_broken"] for row in metrics
    )
    assert all(row["grad_norm"] is None for row in metrics)  # nothing was learned from them
    kept = lines(tmp_path / "run/broken/000001.jsonl")
    assert (
        kept
        and kept[0]["outcome"] in ("nan", "inf", 0.0, 1.0)
        and kept[0]["tokens"]
        and kept[0]["logprobs"]
        and kept[0]["prompt"]
    )


def test_one_bad_reward_costs_one_update_and_one_group(run, tmp_path, capsys):
    assert run() == 0
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [row["groups_broken"] for row in metrics] == [
        0,
        0,
        1,
        0,
        0,
    ]  # the 21st completion is of the third update
    assert [row["groups_kept"] for row in metrics] == [2, 2, 0, 2, 2] and metrics[2][
        "grad_norm"
    ] is None
    assert [row["groups_pending"] for row in metrics] == [
        0,
        0,
        1,
        1,
        0,
    ]  # the sound group of that draw waits for the next
    assert sum(map(conserved, metrics)) + metrics[-1]["groups_pending"] == sum(
        row["groups_drawn"] for row in metrics
    )
    assert (
        metrics[2]["reward_mean"] is None
        and [c["outcome"] for c in lines(tmp_path / "run/completions.jsonl")].count(None) == 1
    )
    assert [p.name for p in (tmp_path / "run/broken").iterdir()] == [
        "000003.jsonl"
    ] and "update 3 given up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        (nan_loss, "the loss of step 1 is nan"),
        (infinite_loss, "the loss of step 1 is -inf"),
        (nan_gradient, "the gradient's norm in step 1 is nan"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_skips_its_update(
    run, tmp_path, capsys, monkeypatch, change, said
):
    """Adam would carry a single nan on for ever."""
    spoil(monkeypatch, {5}, change)  # the first step of the third update
    assert run(reward="toy_reward.py:even", keep_checkpoints=9) == 0
    assert f"update 3 given up: {said}" in capsys.readouterr().out
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert [row["groups_kept"] for row in metrics] == [2, 2, 0, 2, 2] and metrics[2][
        "groups_broken"
    ] == 2
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "000001",
        "000002",
        "000004",
        "000005",
    ]  # none of doubt
    assert len(lines(tmp_path / "run/broken/000003.jsonl")) == 8  # two groups of four
    assert all(
        t.isfinite().all()
        for n in ("model", "optimizer")
        for t in load_file(tmp_path / f"run/checkpoints/000005/{n}.safetensors").values()
    )


def test_the_steps_before_a_bad_one_stand_and_those_after_it_are_not_taken(
    run, tmp_path, capsys, monkeypatch
):
    real, seen = train.Learner.publish, []
    monkeypatch.setattr(
        train.Learner,
        "publish",
        lambda self: (real(self), seen.append(self.weights[1].detach().clone())),
    )
    spoil(monkeypatch, {6}, nan_loss)  # the second step of the second update, of four
    assert run(reward="toy_reward.py:even", inner_epochs=2, keep_checkpoints=9, updates=2) == 0
    spoiled = lines(tmp_path / "run/metrics.jsonl")[1]
    assert "update 2 given up: the loss of step 2 is nan" in capsys.readouterr().out
    assert spoiled["groups_broken"] == 2 and spoiled["grad_norm"] is not None
    assert len(seen) == 4 + 1 and not torch.equal(
        seen[3], seen[4]
    )  # four steps of update 1, one of update 2


@pytest.mark.parametrize("change", [nan_loss, nan_gradient])
def test_three_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    run, tmp_path, capsys, monkeypatch, change
):
    spoil(monkeypatch, range(3, 99), change)
    assert run(reward="toy_reward.py:even", updates=20) == 1
    printed = capsys.readouterr()
    assert (
        "3 updates in a row" in printed.err
        and "the last good checkpoint is run/checkpoints/000001" in printed.err
    )
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 4 and [
        p.name for p in (tmp_path / "run/checkpoints").iterdir()
    ] == ["000001"]


def test_two_in_a_row_do_not(run, tmp_path, monkeypatch):
    spoil(
        monkeypatch, {3, 4, 7, 8}, nan_loss
    )  # each bad update ends at its first step, so these are four updates
    assert run(reward="toy_reward.py:even", updates=7) == 0
    assert [row["groups_broken"] for row in lines(tmp_path / "run/metrics.jsonl")] == [
        0,
        2,
        2,
        0,
        2,
        2,
        0,
    ]


def test_an_absurd_learning_rate_leaves_the_last_good_checkpoint(run, tmp_path, capsys):
    """Finite weights of 1e30 whose logits are nan: no checkpoint of them pushes out a good one."""
    assert run(reward="toy_reward.py:even", lr=1e30, warmup=0, updates=20, minibatches=1) == 1
    assert "3 updates in a row" in capsys.readouterr().err
    for path in (tmp_path / "run/checkpoints").iterdir():
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_a_sampler_without_finite_logits_says_so_in_its_log_probs():
    """An index behind the vocabulary, or a token of a made-up probability, would hide what is wrong."""
    tokens, logprobs = choose(
        torch.full((3, 5), float("nan")), torch.tensor([0.0, 0.5, 0.999]), 1.0
    )
    assert ((tokens >= 0) & (tokens < 5)).all() and logprobs.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(run, tmp_path, capsys, monkeypatch, value):
    """By whatever means they became so."""
    real, steps = train.Learner.publish, []

    def spoiled(self):
        real(self)
        steps.append(1)
        if len(steps) == 4:
            self.weights[1].data[0] = value

    monkeypatch.setattr(train.Learner, "publish", spoiled)
    assert run(reward="toy_reward.py:even") == 1
    error = capsys.readouterr().err
    assert (
        "the weights are no longer finite" in error
        and "the last good checkpoint is run/checkpoints/000001" in error
    )
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000001"]
    assert all(t.isfinite().all() for t in weights(tmp_path, "000001").values())


def test_the_buffer_loses_no_broken_group():
    from test_eprli import group  # a Group with given outcomes

    buffer = Buffer()
    buffer.add([group([1, 0]), group([float("nan"), 0]), group([float("inf"), 1]), group([1, 1])])
    assert dict(buffer.counts) == {"drawn": 4, "broken": 2, "all_right": 1} and buffer.pending == 1
    buffer.take(1, "broken")
    assert buffer.counts["broken"] == 3 and buffer.counts["kept"] == 0


# ------------------------------------------------------------------------------------------------------- watchdog


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_watchdog_is_silent_while_learner_and_sampler_agree(run, tmp_path, dtype):
    assert run(reward="toy_reward.py:even", dtype=dtype) == 0
    for row in lines(tmp_path / "run/metrics.jsonl"):
        if row["logprob_gap_mean"] is not None:
            assert row["logprob_gap_mean"] < train.MOST_GAP[dtype] / 3


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_watchdog_stops_a_learner_that_computes_another_policy(
    run, tmp_path, capsys, monkeypatch, dtype
):
    """A temperature that one side forgets, a cache that is off by one: nothing crashes, and the ratio of Eq. 1 is wrong."""
    real = train.pad
    monkeypatch.setattr(
        train,
        "pad",
        lambda prompts, *others: real([[*p[:-1], 77, 78, 79] for p in prompts], *others),
    )  # other prompts
    assert run(reward="toy_reward.py:even", dtype=dtype, lr=1e-3, model=sharp(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "differ from the sampler's by" in error and f"rounding in {dtype} explains" in error
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert saved.name == "000000+001.000"  # before the first step: no weight was touched


def sharp(tmp_path):
    """The toy's checkpoint with distributions far from uniform, so that what it reads makes a difference."""
    from conftest import random_model

    from tools.warmstart import make_tokenizer

    tokenizer = make_tokenizer()
    random_model(
        vocab_size=len(tokenizer), num_hidden_layers=1, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(tmp_path / "sharp")
    tokenizer.save_pretrained(tmp_path / "sharp")
    return tmp_path / "sharp"


# ------------------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"reward": "toy_reward.py:always"}, "of 4 groups 4 were all right and 0 all wrong; "),
        ({"reward": "toy_reward.py:always"}, "The level is too easy: raise --quality"),
        (
            {"reward": "toy_reward.py:never"},
            "Completions do not come to an end: raise --max-new-tokens (now 6)",
        ),
        (
            {"reward": "toy_reward.py:never", "max_new_tokens": 90, "model": "stops"},
            "The level is too hard: lower --quality",
        ),
        (
            {"reward": "toy_reward.py:even", "buffer_groups": 50, "max_new_tokens": 90},
            "Most groups would serve: raise --max-draws or --prompts",
        ),
    ],
)
def test_a_level_that_cannot_fill_its_buffer_says_what_it_saw_and_what_to_change(
    run, tmp_path, capsys, flags, said
):
    if flags.get("model"):
        flags = {**flags, "model": stops_at_once(tmp_path)}
    assert run(filter="mixed", max_draws=2, **flags) == 0
    printed = capsys.readouterr().out
    assert (
        "2 draws of 2 prompts did not fill the buffer" in printed
        and said in printed
        and "ends early after 3 skipped updates" in printed
    )
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3  # it does not draw for ever


def stops_at_once(tmp_path):
    """A policy whose every token is likely a stop token, so that hardly any completion is cut off."""
    import shutil

    from tools.warmstart import make_tokenizer

    folder = sharp(tmp_path)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(0, len(make_tokenizer()), 2))})
    )
    return shutil.move(folder, tmp_path / "stops")


def a_run(tmp_path):
    tmp_path.joinpath("config.json").write_text("{}")
    return rundir.Run(tmp_path, Ranks(), 2)


def evaluated(run, update, level, right, n=200):
    from eval import wilson

    low, high = wilson(right, n)
    run.evaluated(
        {"update": update, "level": level, "accuracy": right / n, "low": low, "high": high, "n": n}
    )


def test_an_earlier_level_that_is_forgotten_is_warned_of(tmp_path, capsys):
    run = a_run(tmp_path)
    for update, one, two in ((0, 50, 10), (10, 150, 20), (20, 145, 100)):
        evaluated(run, update, 1, one)
        evaluated(run, update, 2, two)
    assert "forgotten" not in capsys.readouterr().out  # 145 after 150 of 200 may be chance
    evaluated(run, 30, 1, 100)
    assert "level 1 is being forgotten: it was at 75.0% after 10 updates" in capsys.readouterr().out


def test_a_collapse_of_entropy_is_warned_of(run, tmp_path, capsys, monkeypatch):
    real = train.diagnostics
    calls = []

    def collapsing(*arguments):
        calls.append(1)
        found = real(*arguments)
        return {**found, "entropy": found["entropy"] * (0.01 if len(calls) > 6 else 1)}

    monkeypatch.setattr(train, "diagnostics", collapsing)
    assert run(reward="toy_reward.py:even") == 0
    printed = capsys.readouterr().out.splitlines()
    warned = [i for i, line in enumerate(printed) if "entropy has collapsed from" in line]
    assert len(warned) == 2 and "update 4/5" in printed[warned[0] - 1]


def test_a_run_that_is_resumed_remembers_its_first_entropy(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"entropy": null}\n{"entropy": 1.5}\n{"entropy": 0.5}\n'
    )
    run = a_run(tmp_path)
    run._cut = lambda sizes: None
    run.resume(None, train.Progress(), [], None)
    assert run.first_entropy == 1.5 and math.isfinite(run.first_entropy)
