"""The plan of memory against what the allocator counts, and for shapes that people train."""

import gc
import shutil
from dataclasses import replace
from types import SimpleNamespace

import launch
import torch
from conftest import read, small_config
from pytest import approx, fail, mark, raises
from test_train import config, group
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

import eval
import train
from data import Order
from eprli import Buffer, LevelState, resolve_levels
from infra import memory
from infra.flags import make_parser, read_flags
from infra.memory import helps, must_hold, plan, settle, total
from infra.ranks import Ranks
from infra.run import Run
from infra.update import Update
from model import Transformer
from parts import lora
from parts.optimizer import Learner
from rollout import sample, stream_key


def peak(work):
    """-> work(); bytes that torch held meanwhile, at most, and afterwards, beyond those before"""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
        gc.collect()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most, held


def make_learner(cfg, family, tied):
    sizes = {"vocab_size": 2048, "hidden_size": 96, "intermediate_size": 384, "head_dim": 16}
    config = small_config(family, **sizes, num_hidden_layers=4, tie_word_embeddings=tied)
    model = Transformer(config).to(getattr(torch, cfg.dtype))
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # completions of a group differ
    if cfg.lora_rank:
        lora.add(model, cfg.lora_rank, cfg.lora_alpha)
    return Learner(model, Ranks(), cfg.recompute)


def fill(cfg, level, model, prompt):
    """Groups of a full step. Prompts have two lengths, and so do completions."""
    prompts = torch.randint(0, 2048, (level.prompts, prompt)).tolist()
    prompts = [tokens[i % 2 :] for i, tokens in enumerate(prompts)]
    samples = range(level.group_size)
    keys = [[stream_key(i, k) for k in samples] for i in range(len(prompts))]
    limits = [[level.max_new_tokens - k % 2 for k in samples]] * len(prompts)
    options = {"slots": cfg.slots, "stop_ids": (), "temperature": cfg.temperature}
    done = sample(model, prompts, keys, limits, **options)
    return [group(p, c, torch.arange(level.group_size) % 2) for p, c in zip(prompts, done)]


@mark.parametrize(
    "family, tied, flags",
    [
        ("qwen2", True, ""),
        ("llama", True, "--recompute"),
        ("llama", False, "--dtype bfloat16"),
        ("qwen3", True, "--temperature 0.6"),
        ("qwen2", True, "--dtype float64 --recompute"),
        ("qwen2", True, "--lora-rank 8"),
        ("llama", False, "--lora-rank 8 --dtype bfloat16"),
        ("qwen2", True, "--lora-rank 64 --dtype bfloat16 --recompute"),
    ],
)
def test_the_plan_is_what_a_run_takes(family, tied, flags, use_kernels):
    """Within 15 %, phase by phase: a tensor that is kept and was not counted, a cache that outlives
    sampling, weights laid out where no kernel reads them."""
    torch.manual_seed(0)
    prompt, length = (32, 48) if tied else (70, 50)
    group_tokens = 8 * length + prompt  # a micro-batch is one group, and full
    use_kernels({"linear": "torch", "packed": ["float32"] if family == "qwen2" else []})
    shape = f"--group-size 8 --buffer-groups 3 --max-new-tokens {length} --minibatches 1"
    memory = f"--dtype float32 --micro-batch-tokens {group_tokens} --slots 64 --device cpu"
    cfg = config(f"{shape} {memory} {flags}")
    (level,) = resolve_levels(cfg, measured=False)
    learner, _, always = peak(lambda: make_learner(cfg, family, tied))
    groups, sampling, _ = peak(lambda: fill(cfg, level, learner.model, prompt))
    state = LevelState(1, level, Order([], ""), None, Buffer())
    run = Run(cfg, None, Ranks(), None, None, learner, None, [state], {})
    update = Update(1, state, 0.0, cfg.max_draws)
    _, learning, moments = peak(lambda: train.learn(run, state, groups, update))
    parts = plan(cfg, [level], learner.model, prompt)
    always += moments  # which come with the first step
    for phase, found in {"always": always, "sampling": sampling, "learning": learning}.items():
        assert total(parts[phase]) == approx(found, rel=0.15), (phase, parts[phase], found)


# ------------------------------------------------------------------------- shapes that people train


def shape(hidden, inner, heads, kv_heads, tied):
    """A Qwen2 of 28 layers in bfloat16, without data."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return Transformer(config).to(torch.bfloat16)


GPU = "--dtype bfloat16 --device cuda --minibatches 1"


def planned(model, flags, held_out=0, processes=1):
    """For one group."""
    cfg = config(f"{GPU} --buffer-groups 1 --micro-batch-tokens 2048 {flags}")
    return plan(cfg, resolve_levels(cfg, measured=False), model, 256, held_out, processes)


def long_run(model, flags="--recompute", **settings):
    """The plan for completions of 24,576 tokens, 16 a group."""
    length = "--group-size 16 --max-new-tokens 24576 --slots 16"
    return planned(model, f"{length} {flags}", **settings)


def peak_gigabytes(parts):
    always, *phases = map(total, parts.values())
    return (always + max(phases)) / 1e9


def test_sixteen_completions_of_24576_tokens_fit_one_80_gb_card():
    """Of a 1.5 B model: only with activation checkpointing."""
    model = shape(1536, 8960, 12, 2, True)
    parts = long_run(model)
    cache = 16 * (24_576 + 256) * 28 * 2 * 2 * 128 * 2
    assert parts["sampling"]["KV cache"] == cache
    evaluation = long_run(model, "--slots 64", held_out=1000)  # fills the slots
    assert evaluation["sampling"]["KV cache"] == 4 * cache
    assert long_run(model, "--slots 64 --eval-samples 4", held_out=16) == evaluation
    assert peak_gigabytes(parts) < 60
    doc = (launch.ROOT / "docs/memory.md").read_text()
    assert all(f"    {line}\n" in doc for line in memory.table(parts).splitlines())
    assert peak_gigabytes(long_run(model, "")) > 80


def lora_run(model, length, flags=""):
    """The plan for 8 completions of so many tokens, with LoRA of rank 16."""
    lora.add(model, 16, 32.0)
    shape = f"--slots 8 --group-size 8 --max-new-tokens {length} --lora-rank 16"
    return planned(model, f"{shape} {flags}", held_out=8)


def test_lora_trains_1_5b_on_a_card_of_24_gb():
    """8 x 4,096 tokens in one micro-batch, or one by one without activation checkpointing."""
    model = shape(1536, 8960, 12, 2, True)
    whole = lora_run(model, 4096, f"--micro-batch-tokens {8 * 4096 + 256} --recompute")
    assert 5 < peak_gigabytes(whole) < 20
    assert 5 < peak_gigabytes(lora_run(model, 4096)) < 20
    assert whole["learning"]["gradient of the head"] == 0
    factors = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert factors == 16 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert whole["always"]["moments"] == 8 * factors and not whole["always"]["master weights"]
    with_reference = lora_run(model, 4096, "--kl-coef 0.1")
    assert with_reference["always"]["weights"] == whole["always"]["weights"]  # shared


def test_lora_trains_7b_on_a_card_of_24_gb():
    """With completions of 12,288 tokens, one at a time and with activation checkpointing."""
    model = shape(3584, 18944, 28, 4, False)
    assert 17 < peak_gigabytes(lora_run(model, 12_288, "--recompute")) < 24
    assert peak_gigabytes(lora_run(model, 12_288)) > 24


def test_the_plan_is_that_of_the_level_that_takes_most():
    """On a GPU a micro-batch has one prompt: Len_l is equal, and a larger group takes more."""
    model = shape(1536, 8960, 12, 2, True)
    size = "--micro-batch-tokens 40000 --max-new-tokens 2048 --quality 1"
    small, large, both, turned = (
        planned(model, f"{size} --group-size {G}")["learning"] for G in ("4", "16", "4 16", "16 4")
    )
    assert total(small) < 0.5 * total(large) and both == turned == large


def test_7b_over_8_cards_is_sharded():
    model = shape(3584, 18944, 28, 4, False)
    one, eight = (long_run(model, "--fsdp --recompute", processes=n) for n in (1, 8))
    assert eight["always"]["moments"] == one["always"]["moments"] // 8
    assert eight["learning"]["gradients"] == one["learning"]["gradients"] // 8
    assert eight["always"]["weights"] == one["always"]["weights"]  # whole, to sample from
    assert peak_gigabytes(eight) < 80 < peak_gigabytes(one)


@mark.parametrize(
    "gigabytes, length, flags",
    [
        (80, 24576, "--recompute"),  # 256 slots would take 182 GB for their cache alone
        (48, 8192, "--recompute"),
        (48, 4096, ""),
        (24, 8192, "--recompute --lora-rank 16"),
        (24, 4096, "--device cpu --recompute --lora-rank 16"),
    ],
)
def test_what_is_not_given_is_the_most_that_fits(gigabytes, length, flags):
    """A default that dies in the middle of the first draw, or that wastes a large card. A CPU took
    twice of what the plan says of a phase."""
    model = shape(1536, 8960, 12, 2, True)
    if "lora" in flags:
        lora.add(model, 16, 32.0)
    cfg = config(f"{GPU} --group-size 16 --buffer-groups 64 --max-new-tokens {length} {flags}")
    levels = resolve_levels(cfg, measured=False)
    cfg = settle(cfg, levels, model, 256, 0, 1, gigabytes * 1e9)

    def fits(**flags):
        always, *phases = map(total, plan(replace(cfg, **flags), levels, model, 256).values())
        taken = 2 if cfg.device == "cpu" else 1
        return always + taken * max(phases) <= 0.9e9 * gigabytes

    assert fits() and 8 <= cfg.slots < 256 and not fits(slots=cfg.slots + 8)
    twice = 2 * cfg.micro_batch_tokens
    assert twice > memory.MOST_TOKENS[cfg.device] or not fits(micro_batch_tokens=twice)
    given = replace(cfg, slots=16, micro_batch_tokens=512)
    assert settle(given, levels, model, 256, 0, 1, gigabytes * 1e9) == given


def test_a_run_that_cannot_fit_is_refused(toy_folder, tmp_path, capsys, monkeypatch):
    """At the start, before it has a folder: AdamW's moments would come with the first step."""
    model = shape(1536, 8960, 12, 2, True)
    cfg = config(f"{GPU} --max-new-tokens 8192")
    levels = resolve_levels(cfg, measured=False)
    words = (
        r"--slots 8 would take 23.6 GB .* 24.5 GB that are free 22.1 .* a lower --max-new-tokens or"
    )
    with raises(ValueError, match=f"{words} --lora-rank"):
        settle(cfg, levels, model, 256, 0, 1, 24.5e9)
    sizes = {"cuda": 27e9, "cpu": 25e9, "meta": 27e9}
    monkeypatch.setattr(memory, "free_bytes", lambda device: sizes[device.type])
    ranks = SimpleNamespace(size=1, device=torch.device("cuda"))
    # 21.6 GB are always held; with the gradients of the first step it would have died there.
    words = r"at least 27.8 GB of its device \(.* moments 12.3, gradients 6.2\), and 27.0 GB"
    with raises(ValueError, match=words) as refused:
        must_hold(cfg, model, ranks)
    smaller = shape(1536, 8960, 12, 2, True)
    lora.add(smaller, 16, 32.0)
    for flag, fitting in (("--lora-rank 16", smaller), ("--offload", model)):
        assert flag in str(refused.value)
        cfg = config(f"{GPU} --max-new-tokens 8192 --recompute {flag}")
        must_hold(cfg, fitting, ranks)
        assert settle(cfg, levels, fitting, 256, 0, 1, 27e9).slots > 8
    sizes["cpu"] = 24e9
    with raises(ValueError, match=r"at least 24.7 GB of the host .* gradients 6.2.* --lora"):
        must_hold(cfg, model, ranks)
    assert helps(cfg) == ["--lora-rank 16"]
    assert helps(config("--device cpu")) == ["--lora-rank 16"]  # shards share one host's memory
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    words = f"--model {toy_folder} --lr 1 --max-new-tokens 9 --out {tmp_path}/run --device cpu"
    monkeypatch.setattr("model.load_file", lambda _: fail("weights are not read"))
    with raises(SystemExit, match="^2$"):
        train.main(words.split())
    assert "needs at least" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with raises(SystemExit, match="^2$"):
        eval.main(f"--model {toy_folder} --max-new-tokens 9 --device cpu".split())
    assert "needs at least" in capsys.readouterr().err


@mark.parametrize(
    "dtype, flags, share, named",
    [
        ("float32", "", 0.9, "--lora-rank 16 --dtype bfloat16 or a smaller --model"),
        ("float32", "", 1.1, "--lora-rank 16 or a smaller --model"),
        ("float32", "--lora-rank 2", 0.9, "--dtype bfloat16 or a smaller --model"),
        ("float32", "--lora-rank 2", 0.4, "a smaller --model"),
        ("bfloat16", "", 0.9, "a smaller --model"),  # no flag makes its weights smaller
    ],
)
def test_the_flags_that_are_named_make_it_fit(monkeypatch, dtype, flags, share, named):
    """Three flags were listed for weights that alone are too large, and the one that halves them
    was not."""
    cfg = config(f"--device cpu --dtype {dtype} {flags}")
    model = make_learner(cfg, "llama", False).model
    monkeypatch.setattr(memory, "free_bytes", lambda device: share * memory.nbytes(model))
    with raises(ValueError, match=f"less is needed with {named}$"):
        must_hold(cfg, model, SimpleNamespace(size=1, device=torch.device("cpu")))


def test_a_run_says_what_it_chose(toy_folder, tmp_path, capsys, monkeypatch):
    """And config.json holds it: a run is repeated on another machine, or resumed."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4_000_000)
    words = f"--model {toy_folder} --lr 1e-3 --max-new-tokens 9 --out {tmp_path}/run --device cpu"
    train.main(f"{words} --updates 1 --eval-every 0".split())
    chosen = read(tmp_path / "run/config.json")
    slots, tokens = chosen["slots"], chosen["micro_batch_tokens"]
    assert f"with --slots {slots} --micro-batch-tokens {tokens};" in capsys.readouterr().out
    assert 8 <= slots < 256 and tokens < 2048


@mark.parametrize(
    "own_groups, folder, most, used, stat",
    [
        ("0::/", "", "memory.max", "memory.current", ""),
        ("0::/slurm/job_1", "slurm", "memory.max", "memory.current", ""),
        (
            "9:cpu:/\n4:blkio,memory:/docker/1\n0::/",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file 650\n",
        ),
    ],
)
def test_a_limit_leaves_what_files_have_filled(
    monkeypatch, tmp_path, own_groups, folder, most, used, stat
):
    """Linux counts the pages of files that were read, such as a model's, and takes them back. The
    limit may be that of a group above the process's own; a container sees its own as the root."""
    folder = tmp_path / "groups" / folder
    folder.mkdir(parents=True)
    files = {most: "1000\n", used: "900\n", "memory.stat": "anon 200\ninactive_file 650\n"}
    if stat:  # version 1 counts groups below only there
        files["memory.stat"] = f"inactive_file 10\n{stat}"
    for name, text in files.items():
        (folder / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8 kB\n")
    (tmp_path / "own").write_text(own_groups + "\n")
    for name, path in (("MEMINFO", "meminfo"), ("MY_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_bytes(torch.device("cpu")) == 1000 - 250
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(torch.device("cpu")) == 375
    (folder / most).write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) == 4096


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


def test_the_flag_prints_the_plan_and_stops(toy_folder, tmp_path, capsys, monkeypatch):
    """No weights are needed, no GPU, no processes; nothing is written."""
    shutil.copytree(toy_folder, tmp_path / "config")
    (tmp_path / "config/model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = "--plan --model config --device cuda --fsdp --recompute --lr 1 --max-new-tokens 96"
    train.main(words.split())
    printed = capsys.readouterr().out
    assert "KV cache" in printed and "gathered layers" in printed and "at its peak" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["config"]
