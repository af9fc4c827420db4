"""One result, whatever the machine: no setting of memory, slots, order, micro-batches or processes changes it.

In float64 settings differ by rounding of 1e-15, so a real difference cannot hide, and no sampled token flips.
"""

import functools
import json
import signal
import subprocess
import sys

import launch
import numpy as np
import pytest
import torch
from conftest import random_model
from launch import at_call, die, words
from safetensors.torch import load_file
from test_train import level, off_policy_samples
from transformers import Qwen3Config

from infra.ranks import SHARDS_ON_CPU, Ranks
from model import ONEDNN, Transformer, log_softmax
from rollout import Request, sample, stream, uniforms
from train import Config, backward

pytestmark = pytest.mark.faults

FLAGS = {
    "model": "toy",
    "data": "p.jsonl",
    "eval_data": "p.jsonl",
    "reward": "r.py:some",
    "group_size": 4,
    "buffer_groups": 3,
    "prompts": 4,
    "max_new_tokens": 8,
    "updates": 5,
    "quality": 1.0,
    "inner_epochs": 2,
    "lr": 1e-3,
    "warmup": 2,
    "device": "cpu",
    "length_weight": 0.3,
    "kl_coef": 0.05,
    "dtype": "float64",
    "eval_every": 2,
    "save_every": 2,
    "max_grad_norm": 0.1,
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tokenizer):
    """A folder with a Qwen3 of two layers, problems, a reward, and `one`: five updates in one process, in float64."""
    folder = tmp_path_factory.mktemp("one_result")
    torch.manual_seed(0)
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    for name, tied in (("toy", False), ("tied", True)):
        model = Transformer(Qwen3Config(**shape, tie_word_embeddings=tied))
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": 0.5}
        for i, c in enumerate("0123456789abcdefghij")
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "r.py").write_text(
        "def some(problem, response):  # every group of an odd problem is dropped\n"
        "    return int(problem['id'][1:]) % 2 or sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))\n"
    )
    run(folder, "one")
    return folder


def run(folder, out, world=1, sabotage=None, **changes):
    codes = launch.wait(
        launch.start(folder, words(**{**FLAGS, **changes}, out=out), world, sabotage)
    )
    assert codes == [0] * world, launch.said(folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_equal(folder, out, one="one", tolerance=1e-9):
    """Tokens identical, metrics and weights to 1e-9."""
    assert (folder / out / "completions.jsonl").read_bytes() == (
        folder / one / "completions.jsonl"
    ).read_bytes()
    for name in ("metrics.jsonl", "eval.jsonl"):
        for row, other in zip(lines(folder / out / name), lines(folder / one / name), strict=True):
            timeless = [
                {
                    k: v
                    for k, v in r.items()
                    if not any(word in k for word in ("seconds", "tokens_per_second", "memory"))
                }
                for r in (row, other)
            ]
            assert timeless[0] == pytest.approx(timeless[1], abs=tolerance)
    for name in ("model", "optimizer"):
        mine, its = (
            load_file(folder / o / f"checkpoints/000005/{name}.safetensors") for o in (out, one)
        )
        assert mine.keys() == its.keys() and all(
            (mine[k] - its[k]).abs().max() <= tolerance for k in mine
        )


MEMORY = {
    "slots": {"slots": 9},
    "one slot": {"slots": 1},
    "micro-batches": {"micro_batch_tokens": 1},
    "micro-batches of some": {"micro_batch_tokens": 70},
    "chunks of the logits": {"logits_per_chunk": 1},
    "activation checkpointing": {"recompute": True},
    "all of them": {
        "slots": 10,
        "micro_batch_tokens": 50,
        "logits_per_chunk": 1000,
        "recompute": True,
    },
}


@pytest.mark.parametrize("setting", MEMORY)
def test_settings_of_memory_change_nothing_over_five_updates(workshop, setting):
    run(workshop, setting, **MEMORY[setting])
    assert_equal(workshop, setting)
    kept = [row["groups_kept"] for row in lines(workshop / "one/metrics.jsonl")]
    dropped = sum(row["groups_all_right"] for row in lines(workshop / "one/metrics.jsonl"))
    assert kept == [3] * 5 and dropped > 5  # else this would say little


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fsdp": True},
        {"fsdp": True, "recompute": True, "micro_batch_tokens": 60},
        {"micro_batch_tokens": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_changes_nothing_over_five_updates(workshop, world, changes):
    """A denominator per rank, a mean of means, a rank that takes another branch, a learning rate per rank. Three groups a step
    on four processes leave one without a sample, and four prompts often leave one with nothing but dropped groups."""
    out = f"{world} {changes}"
    run(workshop, out, world, **changes)
    assert_equal(workshop, out)


def test_a_mean_over_tokens_is_over_those_of_all_processes(workshop):
    for world in (1, 2):
        run(workshop, f"token{world}", world, loss_norm="token")
    assert_equal(workshop, "token2", "token1")


def test_processes_without_any_prompt(workshop):
    """Fewer prompts than processes, so that some sample nothing at all."""
    for world in (1, 4):
        run(workshop, f"few{world}", world, prompts=2)
    assert_equal(workshop, "few4", "few1")


def test_shared_weights_of_embedding_and_head_are_sharded_as_one(workshop):
    for world in (1, 2):
        run(workshop, f"tied{world}", world, model="tied", fsdp=world > 1, updates=5)
    assert_equal(workshop, "tied2", "tied1")


@pytest.mark.skipif(not ONEDNN, reason="torch without oneDNN")
def test_float32_under_fsdp(workshop):
    """float32 has products of its own (model.Product) on some CPUs, whose saved weights FSDP frees and gathers again."""
    for world in (1, 2):
        run(
            workshop,
            f"float{world}",
            world,
            launch.products_by_onednn,
            dtype="float32",
            fsdp=world > 1,
            updates=1,
        )
    one, two = (lines(workshop / f"float{w}/metrics.jsonl")[0] for w in (1, 2))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5) and two[
        "objective"
    ] == pytest.approx(one["objective"], abs=1e-6)


def test_bfloat16_under_fsdp_has_float32_masters(workshop):
    """As in one process: weights of bfloat16 in checkpoint and sampler, masters and moments of float32."""
    for world in (1, 2):
        run(workshop, f"bf{world}", world, dtype="bfloat16", fsdp=world > 1, updates=1)
    one, two = (
        load_file(workshop / f"bf{w}/checkpoints/000001/optimizer.safetensors") for w in (1, 2)
    )
    assert one.keys() == two.keys() and all(t.dtype == torch.float32 for t in two.values())
    weights = load_file(workshop / "bf2/checkpoints/000001/model.safetensors")
    assert all(
        t.dtype == torch.bfloat16 and torch.equal(t, two[f"master.{n}"].bfloat16())
        for n, t in weights.items()
    )
    norms = [lines(workshop / f"bf{w}/metrics.jsonl")[0]["grad_norm"] for w in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


@pytest.mark.parametrize(
    "before, after",
    [
        ((1, False), (2, True)),
        ((2, True), (1, False)),
        ((4, True), (2, False)),
        ((2, False), (4, True)),
    ],
)
def test_any_number_of_processes_resumes_what_any_other_wrote(workshop, before, after):
    """Also in the middle of an update: checkpoints hold whole tensors, not shards."""
    out, (world, fsdp) = f"{before}{after}", before
    stop = functools.partial(
        at_call, "train.minibatch", 14, functools.partial(launch.told_to_stop, signal.SIGTERM)
    )
    processes = launch.start(
        workshop, words(**FLAGS, out=out, **({"fsdp": True} if fsdp else {})), world, stop
    )
    assert launch.wait(processes) == [128 + signal.SIGTERM] * world, launch.said(workshop)
    assert "+" in next((workshop / out / "checkpoints").glob("000003*")).name
    world, fsdp = after
    codes = launch.wait(launch.start(workshop, ["--resume", out, "--fsdp", str(fsdp)], world))
    assert codes == [0] * world, launch.said(workshop)
    assert_equal(workshop, out)


@pytest.mark.parametrize("fsdp", [True, False])
def test_a_resumed_run_has_the_flags_it_was_started_with(workshop, fsdp):
    """--fsdp need not be repeated; and then two processes go on bit for bit."""
    for out, sabotage in (
        (f"whole {fsdp}", None),
        (f"cut {fsdp}", functools.partial(at_call, "train.Learner.step", 14, die)),
    ):
        launch.wait(
            launch.start(
                workshop, words(**FLAGS, out=out, **({"fsdp": True} if fsdp else {})), 2, sabotage
            )
        )
    codes = launch.wait(
        launch.start(
            workshop,
            ["--resume", f"cut {fsdp}"],
            2,
            functools.partial(at_call, "ranks.Ranks.shard", 1, aloud),
        )
    )
    assert codes == [0, 0] and ("sharded" in launch.said(workshop)) == fsdp, launch.said(workshop)
    assert_equal(workshop, f"cut {fsdp}", f"whole {fsdp}", tolerance=0)
    if fsdp:
        assert launch.wait(launch.start(workshop, ["--resume", f"cut {fsdp}"])) == [2]
        assert "--fsdp needs the processes that torchrun starts" in launch.said(
            workshop
        ) and "(or --fsdp False)" in launch.said(workshop)


def aloud(original, arguments):
    print("sharded")
    return original()


def die_if_second(original, arguments):
    return die(None, None) if Ranks().rank == 1 else original()


@pytest.mark.parametrize("where", ["train.backward", "train.score", "train.Learner.step"])
def test_when_one_process_is_killed_none_hangs_and_the_run_can_be_resumed(workshop, where):
    out = f"killed {where}"
    processes = launch.start(
        workshop, words(**FLAGS, out=out), 2, functools.partial(at_call, where, 9, die_if_second)
    )
    codes = launch.wait(processes, 60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert launch.wait(launch.start(workshop, ["--resume", out], 2)) == [0, 0], launch.said(
        workshop
    )
    assert_equal(workshop, out)


@pytest.mark.parametrize(
    "where, call", [("train.minibatch", 9), ("train.score", 5), ("train.Learner.step", 8)]
)
def test_a_signal_to_one_process_stops_all_of_them(workshop, where, call):
    out = f"one told {where}"
    processes = launch.start(
        workshop,
        words(**FLAGS, out=out, micro_batch_tokens=50),
        2,
        functools.partial(at_call, where, call, tell_second),
    )
    codes = launch.wait(processes, 60)
    assert (
        codes[0] > 128
        and codes[1] == 128 + signal.SIGTERM
        and "the state is saved" in launch.said(workshop)
    ), launch.said(workshop)
    assert launch.wait(launch.start(workshop, ["--resume", out], 2)) == [0, 0], launch.said(
        workshop
    )
    assert_equal(workshop, out)


def tell_second(original, arguments):
    return (
        launch.told_to_stop(signal.SIGTERM, original, arguments)
        if Ranks().rank == 1
        else original()
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_process_ends_all_of_them(workshop, rank):
    """A reward that raises on one of two processes must not leave the other waiting."""
    (workshop / "raises.py").write_text(
        f"import os\ndef f(problem, response):\n    return 1 / (os.environ['RANK'] != '{rank}') + len(response)\n"
    )
    codes = launch.wait(
        launch.start(workshop, words(**{**FLAGS, "reward": "raises.py:f"}, out=f"raises{rank}"), 2),
        60,
    )
    assert codes == [1, 1] and "ZeroDivisionError" in launch.said(workshop)


def test_an_error_that_nobody_expected_leaves_its_trace(workshop):
    """A process that leaves at once must not leave silently, or with code 0."""
    codes = launch.wait(
        launch.start(
            workshop,
            words(**FLAGS, out="bug"),
            2,
            functools.partial(at_call, "train.learn", 1, divide),
        )
    )
    assert (
        codes == [1, 1]
        and "ZeroDivisionError" in launch.said(workshop)
        and "in divide" in launch.said(workshop)
    )


def divide(original, arguments):
    return 1 / 0


def test_bad_input_is_said_once(workshop):
    codes = launch.wait(
        launch.start(workshop, words(**{**FLAGS, "data": "none.jsonl"}, out="bad"), 2)
    )
    assert (
        codes == [2, 2]
        and "none.jsonl: cannot be read" in launch.said(workshop)
        and "error" not in launch.said(workshop, 1)
    )


def test_fsdp_without_torchrun_says_what_it_needs():
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        Ranks("cpu", sharded=True)


def test_fsdp_on_a_cpu_needs_a_torch_that_averages(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("ranks.SHARDS_ON_CPU", False)
    with pytest.raises(ValueError, match="needs torch 2.10 or newer"):
        Ranks("cpu", sharded=True)


@pytest.mark.skipif(not SHARDS_ON_CPU, reason=launch.NO_FSDP)
def test_torchrun_itself(workshop):
    """The command of the README, word for word but for its flags."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(launch.ROOT / "train.py"),
        "--fsdp",
    ]
    done = subprocess.run(
        [*command, *words(**FLAGS, out="torchrun")],
        cwd=workshop,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert_equal(workshop, "torchrun")
    assert done.stdout.count("held-out accuracy") == 1  # one voice


# ------------------------------------------------------------------------------------------------------- sampling


def requests(n=24):
    return [
        Request([5] * (1 + i % 7) + [9, i % 90], [stream(0, 1, i, k) for k in range(3)], 40)
        for i in range(n)
    ]


def completed(model, work, slots, order=None):
    order = list(range(len(work))) if order is None else order
    done = dict(
        zip(
            order,
            sample(
                model, [work[i] for i in order], slots=slots, stop_ids={3, 11, 40}, temperature=0.9
            ),
        )
    )
    return [done[i] for i in sorted(done)]


def test_sampling_is_a_function_of_its_key_alone():
    """In float64, token by token: any number of slots, any order of requests, any batch mates."""
    model, work = random_model(dtype=torch.float64), requests()
    expected = [[c.tokens for c in cs] for cs in completed(model, work, 64)]
    assert (
        len({len(t) for ts in expected for t in ts}) > 10
    )  # completions of many lengths, so that slots are refilled
    for slots, order in (
        (1, None),
        (8, None),
        (13, None),
        (64, range(23, -1, -1)),
        (9, [*range(12, 24), *range(12)]),
    ):
        assert [[c.tokens for c in cs] for cs in completed(model, work, slots, order)] == expected
    for i in (0, 7, 23):  # alone
        assert [c.tokens for c in completed(model, [work[i]], 8)[0]] == expected[i]


def edge(model, request, key, before):
    """How far the number drawn for the next token lies from the nearest edge of its distribution function."""
    logits = model(torch.tensor([request.prompt + before]))[0, -1]
    cdf = log_softmax(logits, 0.9).exp().cumsum(-1)
    u = uniforms(np.array([key], np.uint64), np.array([len(before)]))[0]
    return (cdf - u).abs().min().item()


def first_differences(one, other, work, exact):
    """Distance to an edge of every first token that differs between two samplings."""
    found = []
    for request, cs, ds in zip(work, one, other):
        for key, c, d in zip(request.keys, cs, ds):
            if c.tokens != d.tokens:
                at = next((i for i, (a, b) in enumerate(zip(c.tokens, d.tokens)) if a != b), None)
                assert at is not None, (
                    "one completion goes on where the other stopped: no token says why"
                )
                found.append(edge(exact, request, key, c.tokens[:at]))
    return found


@torch.no_grad()
def test_in_float32_a_token_flips_only_at_an_edge_of_its_distribution(capsys):
    """A flip in the middle of an interval would be another distribution, not another rounding."""
    model, exact, rough, work = (
        random_model(),
        random_model(dtype=torch.float64),
        random_model(),
        requests(150),
    )
    for p in (
        rough.parameters()
    ):  # stands for a machine that rounds much more coarsely: here all ways above are alike
        p *= 1 + 3e-6 * torch.randn(p.shape)
    expected = completed(model, work, 64)
    tokens = sum(len(c.tokens) for cs in expected for c in cs)
    with capsys.disabled():
        for name, other in (
            ("8 slots", completed(model, work, 8)),
            ("another order", completed(model, work, 64, range(149, -1, -1))),
            ("float64", completed(exact, work, 64)),
            ("coarse rounding", completed(rough, work, 64)),
        ):
            distances = first_differences(expected, other, work, exact)
            print(
                f"\n  float32, 64 slots, against {name}: {len(distances)} of {tokens} tokens flip",
                end="",
            )
            assert all(d < 1e-4 for d in distances)
    assert distances  # else this would say nothing
    shifted = [
        Request(r.prompt, [k + np.uint64(1) for k in r.keys], 40) for r in work[:5]
    ]  # and the measure can tell
    assert (
        max(first_differences(expected[:5], completed(model, shifted, 64), work[:5], exact)) > 1e-3
    )


# ------------------------------------------------------------------------------------------- gradients in float32


class Part(Ranks):
    """One of several processes, without the others: its gradient is a summand of the whole."""

    def __init__(self, rank, size):
        super().__init__()
        self.part, self.parts = rank, size

    def sum(self, numbers):
        return numbers

    max = sum

    def check(self):
        pass


def gradient(model, samples, ranks=None, recompute=False, **changes):
    model.model.recompute = recompute
    cfg = Config(temperature=0.8, **changes)
    for part in ranks or [Ranks()]:
        if isinstance(part, Part):
            part.size, part.rank = part.parts, part.part
        backward(cfg, level(), model, None, samples, True, part)
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return grad


def test_in_float32_the_gradient_of_recorded_completions_is_the_same_to_1e_5():
    model = random_model()
    samples = off_policy_samples(model, 9)
    one = gradient(model, samples, micro_batch_tokens=10**6)
    others = {
        "micro-batches": gradient(model, samples, micro_batch_tokens=1),
        "order": gradient(model, samples[::-1]),
        "chunks": gradient(model, samples, logits_per_chunk=200),
        "activation checkpointing": gradient(model, samples, recompute=True),
        "3 processes": gradient(model, samples, [Part(r, 3) for r in range(3)]),
        "12 processes": gradient(model, samples, [Part(r, 12) for r in range(12)]),
    }
    for name, other in others.items():
        assert (one - other).norm() < 1e-5 * one.norm(), name
    assert (one - gradient(model, samples[:-1])).norm() > 1e-2 * one.norm()
