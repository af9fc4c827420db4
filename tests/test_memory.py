"""Slots and micro-batches follow the free memory, and where it is full the work is done again."""

from types import SimpleNamespace

import torch
from conftest import lines, random_model, read, write_lines
from pytest import mark, raises
from test_train import workshop  # noqa: F401 a fixture

import train
from data import Problem
from policy import attempt as attempts
from policy import learner, memory
from policy.attempt import Request, Sampling, Solver
from policy.learner import Learner
from rollout import KVCache


def test_slots_are_the_rows_that_half_of_the_free_memory_holds(monkeypatch):
    """Counted for all tokens of a row: no more than the context has, and rounded up to its room."""
    model = random_model("qwen2", torch.bfloat16)
    cache = KVCache(model, 1, 256)
    cache.fit(100)
    row = sum(x.nbytes for x in cache.k + cache.v)
    assert memory.row_bytes(model, 100) == row == memory.row_bytes(model, 128)
    assert memory.row_bytes(model, 10**6) == 2 * row  # the context has 256 tokens
    for free, slots in ((10**12, 256), (2 * 33 * row, 32), (0, 8), (None, 64)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.slots_that_fit(model, 100) == slots


def test_free_memory_is_what_linux_calls_available(monkeypatch, tmp_path):
    """Each process has its share. Other systems do not say."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    device = torch.device("cpu")
    assert memory.free_bytes(device) is None
    memory.MEMINFO.write_text("MemFree: 1 kB\nMemAvailable:    4096 kB\n")
    assert memory.free_bytes(device) == 4096 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(device) == 2048 * 1024


def test_a_draw_and_a_step_that_memory_does_not_hold_are_done_again(workshop, monkeypatch, printed):  # noqa: F811
    """With fewer slots, and smaller micro-batches. No result changes; a gradient that was half
    made, or a reward that was begun, does not count twice."""
    flags = "--slots 32 --prompts 8 --dtype float64 --quality 1 --updates 3"
    expected = lines(workshop(f"{flags} --out whole") / "metrics.jsonl")
    sample, objective = attempts.sample, train.objective

    def small_sample(*rest, slots, **more):
        yield from sample(*rest, slots=slots, **more)
        if slots > 8:
            raise torch.OutOfMemoryError

    def small_objective(run, level, model, micro, counts):
        if len(micro) > 1:
            J, _ = objective(run, level, model, micro[:1], counts)
            J.backward()  # part of a step
            raise torch.OutOfMemoryError
        return objective(run, level, model, micro, counts)

    monkeypatch.setattr(attempts, "sample", small_sample)
    monkeypatch.setattr(train, "objective", small_objective)
    monkeypatch.setattr(learner, "LEAST_MICRO_BATCH", 1)
    found = lines(workshop(f"{flags} --out small") / "metrics.jsonl")
    for one, other in zip(expected, found, strict=True):
        for name in ("reward_mean", "tokens_sampled", "tokens_trained", "groups_kept"):
            assert one[name] == other[name]
        assert abs(one["grad_norm"] - other["grad_norm"]) < 1e-9 * one["grad_norm"]
    said = printed()
    assert "at most 16 slots from now on, so the last bits may differ" in said
    assert "at most 8 slots from now on" in said
    assert "micro-batches of 1024 tokens from now on" in said


def test_the_smallest_micro_batch_is_the_end():
    """The error of the GPU, as it was."""
    one = SimpleNamespace(most_tokens=1, ranks=SimpleNamespace(sharded=False))
    error = torch.OutOfMemoryError()
    with raises(torch.OutOfMemoryError) as raised:
        Learner.use_less_memory(one, error)
    assert raised.value is error


@mark.parametrize("slots", [8, 9])
def test_the_fewest_slots_are_the_end(toy_policy, monkeypatch, slots):
    """A loop that halves them for ever would hang."""
    tried = []

    def full(*_, slots, **__):
        tried.append(slots)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attempts, "sample", full)
    solver, many = Solver(toy_policy, SimpleNamespace(calls=SimpleNamespace(drop=int))), [0] * 99
    (prompt,) = toy_policy.render([Problem("p", "1", "1")])
    with raises(torch.OutOfMemoryError):
        solver.attempt([Request(prompt, many, None, 3)], Sampling(1.0), slots)
    assert tried == [slots, 8][: slots - 7]


def test_each_level_has_the_slots_that_fit_its_longest_sequence(workshop, monkeypatch):  # noqa: F811
    """Of its prompts, and of the held-out ones, which are sampled at that length too."""
    lengths = []

    def fitting(model, length):
        lengths.append(length)
        return 8 * len(lengths)

    monkeypatch.setattr("run.inputs.slots_that_fit", fitting)
    write_lines("long.jsonl", [{"problem": "1" * 40, "answer": "1", "pass_rate": 0.5}])
    out = workshop("--max-new-tokens 3 9 --eval-data long.jsonl --updates 1")
    assert lengths[1] - lengths[0] == 6 and lengths[0] > 43
    assert read(out / "config.json")["slots"] == [8, 16]
    out = workshop("--slots 9 --updates 1 --out other")
    assert read(out / "config.json")["slots"] == [9, 9]  # as given
