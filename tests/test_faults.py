"""Numbers that go wrong: they are noticed, said, and never reach the weights or the disk."""

import json
import multiprocessing
import os
import signal
import time

import torch
from conftest import column, dtypes, lines, random_model, table
from pytest import fixture, mark
from safetensors.torch import load_file
from test_train import workshop  # noqa: F401  the fixture

import train
from experiments.warmstart import make_tokenizer
from model import Transformer
from policy.learner import Learner
from run.processes import Ranks, leave

pytestmark = mark.slow

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


@fixture
def run(workshop, tmp_path):  # noqa: F811  pytest's way to use a fixture
    """A run of five updates; -> its exit code. Each draws two groups of four, and trains on them in
    two steps."""
    (tmp_path / "bad.py").write_text(REWARDS)
    defaults = "--quality 1 --updates 5 --prompts 2 --filter all --save-every 1"

    def run(flags=""):
        try:
            workshop(f"{defaults} --keep-checkpoints 9 {flags}")
        except SystemExit as stop:
            return stop.code
        return 0

    return run


@fixture
def metrics(tmp_path):
    """The values of one key of metrics.jsonl."""
    return lambda name: column(lines(tmp_path / "run/metrics.jsonl"), name)


def checkpoints(tmp_path):
    """Their names; all of their weights and moments are finite."""
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    for path in folders:
        for name in ("model", "optimizer"):
            for tensor in load_file(path / f"{name}.safetensors").values():
                assert tensor.isfinite().all()
    return [path.name for path in folders]


def spoil(monkeypatch, calls, change):
    """clipped_objective gives change(J, logprob) in these of its calls; an update makes two."""
    real, count = train.clipped_objective, []

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


@mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_never_finite_stops_the_run(run, tmp_path, capsys, metrics, value):
    assert run(f"--reward bad.py:{value}") == 1
    error = capsys.readouterr().err
    assert "3 updates in a row met numbers that are not finite" in error
    assert f"by --reward bad.py:{value}, or" in error and "problem 'p" in error
    assert "the last good checkpoint is None" in error and not checkpoints(tmp_path)
    assert metrics("update") == [1, 2, 3] and all(metrics("groups_broken"))
    assert metrics("grad_norm") == [None] * 3  # nothing was learned from them


def test_one_bad_reward_costs_one_update_and_one_group(run, tmp_path, printed, metrics):
    assert run("--reward bad.py:once") == 0
    assert metrics("groups_broken") == [0, 0, 1, 0, 0, 0]  # the 21st completion is of update 3
    assert metrics("groups_kept") == [2, 2, 0, 2, 2, 2] and metrics("grad_norm")[2] is None
    assert metrics("groups_pending")[1:4] == [0, 1, 1]  # the sound group waits for the next update
    gone = sum(sum(metrics(f"groups_{fate}")) for fate in ("kept", "broken", "stale"))
    assert gone == sum(metrics("groups_drawn"))
    assert metrics("reward_mean")[2] is None and "update 3 given up" in printed()
    assert column(lines(tmp_path / "run/completions.jsonl"), "outcome").count(None) == 1


@mark.parametrize(
    "change, said",
    [
        (nan_loss, "the loss of step 1 is nan"),
        (infinite_loss, "the loss of step 1 is -inf"),
        (nan_gradient, "the gradient's norm in step 1 is nan"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_skips_its_update(
    run, tmp_path, printed, monkeypatch, metrics, change, said
):
    """Adam would carry a single nan on for ever."""
    spoil(monkeypatch, {5}, change)  # the first step of the third update
    assert run() == 0
    assert f"update 3 given up: {said}" in printed()
    assert metrics("groups_kept") == [2, 2, 0, 2, 2, 2] and metrics("groups_broken")[2] == 2
    assert checkpoints(tmp_path) == [f"{i:06d}" for i in (1, 2, 4, 5, 6)]  # none of doubt


def test_the_steps_before_a_bad_one_stand(run, printed, monkeypatch, metrics):
    """And those after it are not taken."""
    real, steps = Learner.publish, []
    monkeypatch.setattr(Learner, "publish", lambda self: steps.append(real(self)))
    spoil(monkeypatch, {6}, nan_loss)  # the second step of the second update, of four
    assert run("--inner-epochs 2 --updates 2") == 1
    assert "update 2 given up: the loss of step 2 is nan" in printed()
    assert metrics("groups_broken")[1] == 2 and metrics("grad_norm")[1] is not None
    assert len(steps) == 4 + 1


@mark.parametrize("change", [nan_loss, nan_gradient])
def test_three_in_a_row_stop_the_run(run, tmp_path, capsys, monkeypatch, metrics, change):
    spoil(monkeypatch, range(3, 99), change)
    assert run("--updates 20") == 1
    error = capsys.readouterr().err
    assert "3 updates in a row" in error
    assert "the last good checkpoint is run/checkpoints/000001" in error
    assert len(metrics("update")) == 4 and checkpoints(tmp_path) == ["000001"]


def test_two_in_a_row_do_not(run, monkeypatch, metrics):
    spoil(monkeypatch, {3, 4, 7, 8}, nan_loss)  # a bad update ends at its first step: four updates
    assert run("--updates 3") == 0
    assert metrics("groups_broken") == [0, 2, 2, 0, 2, 2, 0]


def test_a_run_that_ends_while_broken_keeps_the_last_good_checkpoint(
    run, tmp_path, printed, monkeypatch
):
    """At a normal end, weights in doubt were saved, and the good ones deleted."""
    spoil(monkeypatch, {4}, nan_loss)  # the second step of the last update
    assert run("--updates 2 --keep-checkpoints 1") == 1
    assert "the last good checkpoint is run/checkpoints/000001" in printed()
    assert checkpoints(tmp_path) == ["000001"]


def test_a_checkpoint_that_was_due_while_broken_is_made_up_for(run, tmp_path, monkeypatch):
    """A kill would else cost up to twice --save-every updates."""
    spoil(monkeypatch, {3}, nan_loss)  # the first step of the second update
    assert run("--updates 4 --save-every 2") == 0
    assert checkpoints(tmp_path) == ["000003", "000005"]


@mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(run, tmp_path, capsys, monkeypatch, value):
    """By whatever means they became so."""
    real, steps = Learner.publish, []

    def spoiled(self):
        real(self)
        steps.append(1)
        if len(steps) == 4:
            self.weights[1].data[0] = value

    monkeypatch.setattr(Learner, "publish", spoiled)
    assert run() == 1
    error = capsys.readouterr().err
    assert "the weights are no longer finite" in error and "Free space" not in error
    assert "the last good checkpoint is run/checkpoints/000001" in error
    assert checkpoints(tmp_path) == ["000001"]


# ----------------------------------------------------------------------------------------- watchdog


@dtypes
def test_the_watchdog_is_silent_while_learner_and_sampler_agree(run, metrics, dtype):
    assert run(f"--dtype {dtype}") == 0
    gaps = [gap for gap in metrics("logprob_gap_mean") if gap is not None]
    assert gaps and max(gaps) < train.MOST_GAP[dtype] / 3


@dtypes
def test_the_watchdog_stops_a_learner_that_is_off_by_a_tenth_of_a_nat(
    run, capsys, monkeypatch, dtype
):
    """A bound of 0.2 nats let any small mistake pass: rounding of a real model is 0.01."""
    real = Transformer.token_logprobs

    def shifted(*arguments):
        logprob, entropy = real(*arguments)
        return logprob - 0.1, entropy

    monkeypatch.setattr(Transformer, "token_logprobs", shifted)
    assert run(f"--dtype {dtype}") == 1
    assert "differ from the sampler's by 0.1 nats" in capsys.readouterr().err


def sharp(tmp_path, stop_ids=None):
    """A checkpoint with distributions far from uniform: what it reads makes a difference."""
    tokenizer, folder = make_tokenizer(), tmp_path / "sharp"
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
    random_model(**shape, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if stop_ids:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return folder


# ------------------------------------------------------------------------------------------- advice


@mark.parametrize(
    "flags, said",
    [
        ("always", "4 were all right and 0 all wrong; "),
        ("always", "The level is too easy: raise --quality"),
        ("never", "Completions do not end: raise --max-new-tokens (now 6)"),
        ("never --max-new-tokens 90 --model stops", "The level is too hard: lower --quality"),
        ("even --buffer-groups 50 --max-new-tokens 90", "raise --max-draws or --prompts"),
    ],
)
def test_a_level_that_cannot_fill_its_buffer_says_why(run, tmp_path, printed, flags, said):
    if "stops" in flags:  # most of its tokens are likely to be stop tokens
        folder = sharp(tmp_path, list(range(0, len(make_tokenizer()), 2)))
        flags = flags.replace("stops", str(folder))
    assert run(f"--filter mixed --max-draws 2 --reward toy_reward.py:{flags}") == 0
    text = printed()
    assert "4 groups did not fill the buffer" in text and said in text
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3  # it does not draw for ever


def test_a_collapse_of_entropy_is_warned_of(run, printed, monkeypatch):
    real, calls = train.diagnostics, []

    def collapsing(*arguments):
        calls.append(1)
        found = real(*arguments)
        return {**found, "entropy": found["entropy"] * (0.01 if len(calls) > 6 else 1)}

    monkeypatch.setattr(train, "diagnostics", collapsing)
    assert run() == 0
    text = printed().splitlines()
    warned = [i for i, line in enumerate(text) if "entropy has collapsed from" in line]
    assert len(warned) == 2 and "(80%) update 4 " in text[warned[0] - 1]


# ----------------------------------------------------------------------------------------- memory


FULL = """
run.start.Learner |
policy.attempt.Solver.sample_groups | 000000
train.objective | 000000
train.evaluation_requests | 000000
run.state.save_file |
"""


@mark.parametrize("where, saved", table(FULL))
def test_a_gpu_without_memory_is_said_in_one_sentence(
    run, tmp_path, capsys, monkeypatch, where, saved
):
    """A traceback of forty lines does not name the flag that helps."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(where, full)
    assert run("--save-every 0 --eval-every 1 --eval-data p.jsonl") == 1
    error = capsys.readouterr().err
    (said,) = [line for line in error.splitlines() if "out of memory" in line]
    assert "use --lora-rank, --fsdp" in said and "Traceback" not in error
    assert "".join(path.name for path in tmp_path.glob("run/checkpoints/*")) == saved
    assert (tmp_path / "run").exists() == (where != "run.start.Learner")


# ------------------------------------------------------------------- processes that a reward starts


def test_a_forked_process_ends_on_sigterm():
    """multiprocessing.Pool waits for it. With the handler of the run it now and then hung."""
    with Ranks().signals():
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_processes_of_a_reward_end_with_the_run(monkeypatch):
    """They held the pipe of `torchrun ... | tee` open for ever."""
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    leave(lambda: None)
    child.join(10)
    assert child.exitcode == -signal.SIGKILL and codes == [0]
