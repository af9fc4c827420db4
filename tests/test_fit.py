"""Slots and micro-batches follow the free memory, and where it is full the work is done again."""

import torch
from conftest import fit, lines, random_model
from pytest import mark, raises
from test_train import workshop  # noqa: F401 a fixture

import train
from rollout import KVCache
from run import fit as fits
from run.flags import make_parser, read_flags


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
    flags = "--slots 32 --dtype float64 --quality 1 --updates 3 --micro-batch-tokens 4096"
    expected = lines(workshop(f"{flags} --out whole") / "metrics.jsonl")
    sample, objective = train.attempt.__globals__["sample"], train.objective

    def small_sample(*rest, slots, on_group, **more):
        done = sample(*rest, slots=slots, on_group=on_group, **more)
        if slots > 8:
            raise torch.OutOfMemoryError
        return done

    def small_objective(run, level, model, micro, counts):
        if len(micro) > 1:
            J, _ = objective(run, level, model, micro[:1], counts)
            J.backward()  # part of a step
            raise torch.OutOfMemoryError
        return objective(run, level, model, micro, counts)

    monkeypatch.setitem(train.attempt.__globals__, "sample", small_sample)
    monkeypatch.setattr(train, "objective", small_objective)
    monkeypatch.setattr(fits, "LEAST_TOKENS", 1)
    found = lines(workshop(f"{flags} --out small") / "metrics.jsonl")
    for one, other in zip(expected, found, strict=True):
        for name in ("reward_mean", "tokens_sampled", "tokens_trained", "groups_kept"):
            assert one[name] == other[name]
        assert abs(one["grad_norm"] - other["grad_norm"]) < 1e-9 * one["grad_norm"]
    said = printed()
    assert "done again with --slots 16" in said and "done again with --slots 8" in said
    assert "done again with --micro-batch-tokens" in said


def test_the_smallest_size_is_the_end():
    def full(size):
        raise torch.OutOfMemoryError

    with raises(torch.OutOfMemoryError):
        fits.halving("--slots", 8, 8, full, undo=None)


@mark.parametrize(
    "words, expected",
    [
        ("--device cuda", True),
        ("--device cuda --recompute False", False),
        ("--device cpu", False),
        ("--device cpu --recompute", True),
    ],
)
def test_a_gpu_computes_layers_again_unless_told_otherwise(words, expected):
    """A plan for a GPU is made where there is none: the flag decides, not this machine."""
    cfg, _ = read_flags(make_parser(), words.split())
    assert cfg.recompute is expected
