"""The plan of memory against what the allocator counts while a run samples and learns, and for the shapes people train."""

import gc

import pytest
import torch
from conftest import small_config
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

import train
from eprli import Group, Level
from infra.ranks import Ranks
from infra.run import Stats
from model import ONEDNN, Linear, Transformer
from rollout import Request, sample, stream
from tools.plan import plan
from train import Config, Learner, Progress, learn


def level(**changes):
    return Level(
        **dict(
            quality=1.0,
            prompts=2,
            group_size=8,
            max_new_tokens=192,
            reward="math",
            length_weight=0.0,
            eps_low=0.2,
            eps_high=0.28,
            inner_epochs=1,
            buffer_groups=2,
            updates=1,
        )
        | changes
    )


def peak(work):
    """Bytes that torch held during work() beyond those that it held before: most at once, in the end; and what work() returns."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
        gc.collect()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, held, result


@pytest.mark.parametrize(
    "family,flags,groups,prompt,length",
    [
        ("qwen2", {}, (2, 8), 64, 192),
        ("llama", {"recompute": True}, (2, 8), 64, 192),
        ("qwen2", {"dtype": "bfloat16"}, (2, 8), 64, 192),
        (
            "qwen2",
            {"dtype": "bfloat16", "recompute": True, "micro_batch_tokens": 1100},
            (2, 8),
            64,
            192,
        ),
        ("qwen3", {"temperature": 0.6, "logits_per_chunk": 1 << 18}, (2, 8), 64, 192),
        ("qwen2", {"dtype": "float64"}, (2, 8), 64, 192),
        ("llama", {"tie_word_embeddings": False, "dtype": "bfloat16"}, (2, 8), 200, 40),
        (
            "qwen2",
            {"recompute": True, "micro_batch_tokens": 1300, "logits_per_chunk": 1 << 18},
            (4, 4),
            100,
            500,
        ),
    ],
)
def test_the_plan_is_what_a_run_takes(family, flags, groups, prompt, length):
    """Within 15 %, phase by phase: a tensor that is kept and was not counted, a cache that outlives sampling. Completions of
    several lengths: a micro-batch is of one length, so that groups mix in it and attention needs a mask."""
    torch.manual_seed(0)
    flags = dict(flags)
    tied = flags.pop("tie_word_embeddings", True)
    cfg = Config(minibatches=1, filter="all", device="cpu", **flags)
    some = level(
        max_new_tokens=length, prompts=groups[0], buffer_groups=groups[0], group_size=groups[1]
    )

    def make():
        config = small_config(
            family,
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
        )
        model = Transformer(config).to(getattr(torch, cfg.dtype))
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # completions of a group differ
        return model, Learner(model, Ranks(), cfg.recompute)

    _, always, (model, learner) = peak(make)
    prompts = [
        p[i:] for i, p in enumerate(torch.randint(0, 4096, (some.prompts, prompt)).tolist())
    ]  # of two lengths, so there is a mask
    requests = [
        Request(
            p,
            [stream(i, k) for k in range(some.group_size)],
            [length - k % 4 for k in range(some.group_size)],
        )
        for i, p in enumerate(prompts)
    ]
    sampling, _, done = peak(
        lambda: sample(model, requests, slots=cfg.slots, stop_ids=(), temperature=cfg.temperature)
    )
    groups = [
        Group(
            prompt=p,
            completions=c,
            outcome=torch.arange(groups[1]).double() % 2,
            length_reward=torch.zeros(groups[1]).double(),
            update=0,
        )
        for p, c in zip(prompts, done)
    ]

    def update():
        learn(cfg, some, learner, None, groups, Ranks(), Progress(stats=Stats(1, 1, {}, 1e-6)))

    update()  # Adam's moments come with the first step
    learning, _, _ = peak(update)
    parts = plan(cfg, [some], model, prompt)
    moments = parts["always"].pop("moments")
    assert moments == sum(
        t.numel() * t.element_size()
        for s in learner.adamw.state.values()
        for t in (s["exp_avg"], s["exp_avg_sq"])
    )
    for phase, found in (("always", always), ("sampling", sampling), ("learning", learning)):
        assert sum(parts[phase].values()) == pytest.approx(found, rel=0.15), (
            phase,
            parts[phase],
            found,
        )
    assert parts["learning"]["attention mask"]  # prompts of two lengths meet


def test_without_kernels_for_them_no_weights_are_laid_out(monkeypatch):
    """As on ARM: the plan would count what no run takes."""
    some = Transformer(small_config("qwen2"))
    assert (
        "weights laid out" in plan(Config(device="cpu"), [level()], some, 64)["sampling"]
        or not ONEDNN
    )
    monkeypatch.setattr("model.ONEDNN", False)
    assert "weights laid out" not in plan(Config(device="cpu"), [level()], some, 64)["sampling"]
    with some.laid_out(8):
        assert all(m.packed is None for m in some.modules() if isinstance(m, Linear))


def shape(hidden, inner, layers, heads, kv_heads, tied):
    """A Qwen2 without data."""
    with torch.device("meta"):
        return Transformer(
            Qwen2Config(
                vocab_size=151936,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=32768,
                tie_word_embeddings=tied,
            )
        ).to(torch.bfloat16)


def gigabytes(parts):
    sums = {phase: sum(part.values()) / 1e9 for phase, part in parts.items()}
    return sums.pop("always") + max(sums.values())


LONG = dict(dtype="bfloat16", device="cuda", recompute=True, slots=16, minibatches=1)


def test_sixteen_completions_of_24576_tokens_fit_one_80_gb_card():
    """Of a 1.5 B model: only with activation checkpointing, and with the cache gone before learning."""
    model, some = (
        shape(1536, 8960, 28, 12, 2, True),
        level(prompts=1, group_size=16, max_new_tokens=24576, buffer_groups=1),
    )
    parts = plan(Config(**LONG), [some], model, 256)
    assert parts["always"]["weights"] == 2 * 1_543_714_304
    assert (
        parts["sampling"]["KV cache"] == 16 * 97 * 256 * 28 * 2 * 2 * 128 * 2
    )  # 24,576 + 256 tokens are 97 pages of 256
    assert gigabytes(parts) < 60
    assert gigabytes(plan(Config(**{**LONG, "recompute": False}), [some], model, 256)) > 80


def test_an_evaluation_fills_the_slots():
    model, cfg = shape(1536, 8960, 28, 12, 2, True), Config(**{**LONG, "slots": 64})
    few, many, split = (
        plan(cfg, [level()], model, 256, *rest)["sampling"]["KV cache"]
        for rest in ((), (1000,), (320, 8))
    )
    assert 4 * few == many and split * 64 == many * 40  # 16, 64 and 40 rows


def test_7b_over_8_cards_is_sharded():
    model, some = (
        shape(3584, 18944, 28, 28, 4, False),
        level(prompts=8, group_size=16, max_new_tokens=24576, buffer_groups=8),
    )
    one = plan(Config(**LONG, fsdp=True), [some], model, 256, processes=1)
    eight = plan(Config(**LONG, fsdp=True), [some], model, 256, processes=8)
    for phase, what in (
        ("always", "master weights"),
        ("always", "moments"),
        ("learning", "gradients"),
    ):
        assert eight[phase][what] == one[phase][what] // 8
    assert eight["always"]["weights"] == one["always"]["weights"]  # whole, to sample from
    assert gigabytes(eight) < 80 < gigabytes(one)


def test_the_flag_prints_the_plan_and_stops(toy_folder, tmp_path, capsys, monkeypatch):
    """No weights are needed, no GPU, no processes; nothing is written."""
    config = tmp_path / "config"
    config.mkdir()
    for file in toy_folder.iterdir():
        if file.suffix != ".safetensors":
            (config / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    train.main(["--plan", "--model", str(config), "--device", "cuda", "--fsdp", "--recompute"])
    printed = capsys.readouterr().out
    assert (
        "KV cache" in printed
        and "gathered layers" in printed
        and "at its peak, one process" in printed
    )
    assert [p.name for p in tmp_path.iterdir()] == ["config"]
