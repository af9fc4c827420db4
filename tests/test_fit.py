"""Slots and micro-batches follow the free memory, and where it is full the work is done again."""

from types import SimpleNamespace

import torch
from conftest import fit, lines, random_model
from pytest import mark, raises
from test_train import workshop  # noqa: F401 a fixture

import train
from policy import attempt as attempts
from policy import learner
from policy.learner import Learner
from rollout import KVCache
from run import fit as fits
from run.fit import Fit


def test_slots_are_the_rows_that_half_of_the_free_memory_holds(monkeypatch):
    """Counted for all tokens of a row: no more than the context has, and rounded up to its room."""
    model = random_model("qwen2", torch.bfloat16)
    cache = KVCache(model, 1, 256)
    cache.fit(100)
    row = sum(x.nbytes for x in cache.k + cache.v)
    assert fits.row_bytes(model, 100) == row == fits.row_bytes(model, 128)
    assert fits.row_bytes(model, 10**6) == 2 * row  # the context has 256 tokens
    for free, slots in ((10**12, 256), (2 * 33 * row, 32), (0, 8), (None, 64)):
        monkeypatch.setattr(fits, "free_bytes", lambda device, free=free: free)
        assert fit(model, slots=None).slots(100) == slots
        assert fit(model, slots=16).slots(100) == 16  # as it was given


def test_free_memory_is_what_linux_calls_available(monkeypatch, tmp_path):
    """Each process has its share. Other systems do not say."""
    monkeypatch.setattr(fits, "MEMINFO", tmp_path / "meminfo")
    device = torch.device("cpu")
    assert fits.free_bytes(device) is None
    fits.MEMINFO.write_text("MemFree: 1 kB\nMemAvailable:    4096 kB\n")
    assert fits.free_bytes(device) == 4096 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fits.free_bytes(device) == 2048 * 1024


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
    assert "at most 16 slots from now on" in said and "at most 8 slots from now on" in said
    assert "micro-batches of 1024 tokens from now on" in said


@mark.parametrize("smallest", [Fit.use_less_memory, Learner.use_less_memory])
def test_the_smallest_size_is_the_end(smallest):
    one = SimpleNamespace(most_tokens=1, ranks=SimpleNamespace(sharded=False))
    arguments = [8] if smallest is Fit.use_less_memory else []
    with raises(torch.OutOfMemoryError):
        try:
            raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            smallest(one, *arguments)
