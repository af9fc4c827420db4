"""The loop: gradients that no setting of memory changes, a policy that learns, files that mean what they say."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from eprli import Group, Level
from infra.ranks import Ranks
from rollout import Completion, Request, sample, stream
from train import Config, Learner, Progress, Sample, Stats, backward, learn

METRICS = ["update", "level", "accuracy", "reward_mean", "reward_std", "length_mean", "truncated_share", "groups_drawn", "groups_kept", "groups_all_right", "groups_all_wrong", "groups_stale", "objective", "entropy", "clip_low_share", "clip_high_share", "ratio_max", "kl_old", "logprob_gap_max", "grad_norm", "lr", "tokens_sampled", "tokens_trained", "sample_seconds", "grade_seconds", "learn_seconds", "tokens_per_second", "peak_memory_mb"]


def lines(path):
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in {path}"))
        for line in path.read_text().splitlines()
    ]


def level(**changes):
    return Level(
        **{
            **dict(
                quality=1.0,
                prompts=2,
                group_size=4,
                max_new_tokens=30,
                reward="math",
                length_weight=0.0,
                eps_low=0.2,
                eps_high=0.28,
                inner_epochs=1,
                buffer_groups=2,
                updates=1,
            ),
            **changes,
        }
    )


def progress(trained):
    return Progress(trained=trained, stats=Stats(1, 1, {}, 0.1))


# ----------------------------------------------------------------------------------------- gradients, in float64


def off_policy_samples(model, n=7):
    """Completions of very different lengths, with old log-probs that put some ratios beyond the clip."""
    work = [Request([5] * (1 + 3 * i), [stream(i)], 3 + 4 * i) for i in range(n)]
    done = sample(model, work, slots=8, stop_ids=set(), temperature=0.8)
    rng = torch.Generator().manual_seed(0)
    shift = lambda c: Completion(
        c.tokens, [x + 0.4 * torch.randn((), generator=rng).item() for x in c.logprobs], c.stopped
    )  # noqa: E731
    advantage = torch.linspace(-1.5, 1.5, n).tolist()
    return [Sample(r.prompt, shift(c), A, True) for r, (c,), A in zip(work, done, advantage)]


def gradient(model, samples, reference=None, **changes):
    model.zero_grad()
    cfg = Config(temperature=0.8, **changes)
    backward(cfg, level(), model, reference, samples, True, Ranks())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_gradient_does_not_depend_on_micro_batches_order_or_padding(norm):
    """A mean of micro-batch means, or a denominator counted per micro-batch, makes the gradient a function of memory."""
    model = random_model(dtype=torch.float64)
    reference = random_model(dtype=torch.float64, seed=1)
    samples = off_policy_samples(model)
    one = gradient(model, samples, reference, loss_norm=norm, kl_coef=0.1, micro_batch_tokens=10**6)
    assert one.abs().max() > 1e-3
    for tokens in (1, 40, 100, 150):
        for order in (samples, samples[::-1], samples[3:] + samples[:3]):
            other = gradient(
                model, order, reference, loss_norm=norm, kl_coef=0.1, micro_batch_tokens=tokens
            )
            assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_doubling_a_step_by_repetition_leaves_it_unchanged(norm):
    """verl's Dr. GRPO mode lacks the division by B: there this doubles the gradient."""
    model = random_model(dtype=torch.float64)
    samples = off_policy_samples(model)
    once, twice = (gradient(model, s, loss_norm=norm) for s in (samples, samples * 2))
    assert (once - twice).abs().max() < 1e-12


def test_the_norms_differ_by_what_they_divide_by():
    """For completions of one length T the token mean is the sequence mean, and `constant` is T / Len of it."""
    model = random_model(dtype=torch.float64)
    samples = off_policy_samples(model)[4:5] * 3  # T = 19 of Len = 30
    sequence, token, constant = (
        gradient(model, samples, loss_norm=norm) for norm in ("sequence", "token", "constant")
    )
    assert (sequence - token).abs().max() < 1e-12 and (
        sequence * 19 / 30 - constant
    ).abs().max() < 1e-12 < constant.abs().max()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_number_of_minibatches_does_not_rescale_the_gradient(norm):
    """Each step divides by its own count: equal halves give equal gradients, not halves of one (TRL's normaliser once did)."""
    model = random_model(dtype=torch.float64)
    samples = off_policy_samples(model)
    seen = {}
    for minibatches in (1, 2, 4):
        groups = [
            Group(
                prompt=s.prompt,
                completions=[s.completion] * 2,
                outcome=torch.tensor([1.0, 0.0]).double(),
                length_reward=torch.zeros(2).double(),
                update=1,
            )
            for s in samples[3:4] * 4
        ]
        cfg = Config(loss_norm=norm, minibatches=minibatches)
        recorder = SimpleNamespace(
            model=model,
            step=lambda _: (
                seen.setdefault(minibatches, []).append(  # takes no step: only looks
                    torch.cat([p.grad.flatten() for p in model.parameters()])
                )
                or model.zero_grad()
                or 0.0
            ),
        )
        learn(cfg, level(), recorder, None, groups, Ranks(), progress(trained=2))  # off-policy
    assert [len(v) for v in seen.values()] == [1, 2, 4]
    assert all((g - seen[1][0]).abs().max() < 1e-12 for v in seen.values() for g in v)


def test_masters_keep_what_bfloat16_would_lose():
    """lr 1e-6 on bfloat16 weights rounds to nothing; on float32 masters 200 such steps add up."""
    model = random_model(dtype=torch.bfloat16)
    optimizer = Learner(model, Ranks())
    before = model.lm_head.weight.detach().clone()
    optimizer.adamw.param_groups[0].update(lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        model.lm_head.weight.float().sum().backward()
        assert model.lm_head.weight.grad is None  # collected by the master
        norm = optimizer.step(1e9)
    assert norm == pytest.approx(math.sqrt(before.numel()), rel=1e-3)
    master = next(
        m for w, m in zip(optimizer.weights, optimizer.masters) if w is model.lm_head.weight
    )
    assert torch.allclose(master, before.float() - 20e-4, atol=1e-5)
    assert torch.equal(model.lm_head.weight, master.bfloat16()) and not torch.equal(
        before, model.lm_head.weight
    )


def test_learning_rate_warms_up_and_decays_to_zero_behind_the_end():
    optimizer = Learner(random_model(), Ranks())
    linear = [
        optimizer.set_lr(Config(lr=1.0, warmup=4, lr_decay="linear"), u, 10) for u in range(1, 11)
    ]
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert [
        optimizer.set_lr(Config(lr=1.0, warmup=0, lr_decay="none"), u, 10) for u in (1, 10)
    ] == [1.0, 1.0]
    cosine = [
        optimizer.set_lr(Config(lr=1.0, warmup=0, lr_decay="cosine"), u, 9) for u in range(1, 10)
    ]
    assert (
        cosine == sorted(cosine, reverse=True)
        and cosine[4] == pytest.approx(0.5)
        and cosine[-1] > 0
    )


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def workshop(tmp_path, toy_folder, monkeypatch):
    """A folder with problems whose answer is one token away, and a function that trains on them."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": f"p{i}",
            "problem": f"{i % 10}",
            "answer": "1",
            "pass_rate": [0.5, 0.1][i % 2],
            "level": i % 2 + 1,
        }
        for i in range(20)
    ]
    for row, text in zip(rows, "0123456789abcdefghij"):
        row["problem"] = text
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy_reward.py").write_text(
        "def even(problem, response):\n    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))\n"
        "def never(problem, response):\n    return 0.0\n"
        "def always(problem, response):\n    return 1.0\n"
        "def broken(problem, response):\n    return float('nan')\n"
        "def crash(problem, response):\n    return problem['nothing']\n"
    )

    def run(*arguments, out="run", **flags):
        defaults = {
            "model": toy_folder,
            "data": "p.jsonl",
            "reward": "toy_reward.py:even",
            "group_size": 4,
            "buffer_groups": 2,
            "max_new_tokens": 6,
            "updates": 2,
            "seed": 0,
            "out": out,
            "device": "cpu",
            "lr": 1e-2,
            "warmup": 0,
        }
        words = list(arguments)
        for name, value in {**defaults, **flags}.items():
            words += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
        train.main(words)
        return tmp_path / out

    return run


def test_a_run_leaves_its_numbers_in_plain_files(workshop, tmp_path):
    out = workshop(eval_data="p.jsonl", save_every=1, length_weight=0.5)
    metrics, evaluations, completions = (
        lines(out / f"{name}.jsonl") for name in ("metrics", "eval", "completions")
    )
    assert [(row["update"], row["level"]) for row in metrics] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all(set(METRICS) <= set(row) for row in metrics)
    for row in metrics:
        mine = [c for c in completions if c["update"] == row["update"]]
        assert len(mine) == 4 * row["groups_drawn"] and row["tokens_sampled"] == sum(
            c["tokens"] for c in mine
        )
        assert row["reward_mean"] == pytest.approx(
            sum(c["outcome"] + c["length_reward"] for c in mine) / len(mine)
        )
        assert row["accuracy"] == sum(c["verdict"] == "right" for c in mine) / len(
            mine
        )  # the verifiable outcome, not R_l
        assert (
            row["logprob_gap_max"] < 1e-5
            and row["kl_old"] >= 0
            and 0 < row["entropy"] < math.log(262)
        )
    assert [(row["update"], row["level"]) for row in evaluations] == [
        (u, number) for u in (0, 2, 4) for number in (1, 2)
    ]
    assert all(
        0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["n"] == 10
        for row in evaluations
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "000003",
        "000004",
    ]  # the two newest
    assert json.loads((out / "config.json").read_text())["levels"][1]["quality"] == 1.0
    assert (out / "report.png").stat().st_size > 10_000
    reloaded = AutoModelForCausalLM.from_pretrained(out / "checkpoints/000004")
    assert (
        AutoTokenizer.from_pretrained(out / "checkpoints/000004").chat_template
        and reloaded.config.model_type == "llama"
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fifteen_updates_raise_the_reward(workshop, seed):
    """The smallest proof that sign, ratio and advantage fit together; the reward is the share of even characters."""
    out = workshop(updates=15, quality=1.0, group_size=8, buffer_groups=4, seed=seed)
    rewards = [row["reward_mean"] for row in lines(out / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def without_time(rows):
    return [
        {
            k: v
            for k, v in row.items()
            if not any(word in k for word in ("seconds", "tokens_per_second", "memory"))
        }
        for row in rows
    ]


def test_the_same_seed_gives_the_same_metrics(workshop):
    first, second, other = (
        without_time(lines(workshop(out=f"run{i}", seed=seed) / "metrics.jsonl"))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second != other


def test_memory_settings_change_nothing(workshop):
    """In float64: slots and micro-batches, through sampling and learning, over whole updates."""
    runs = [
        lines(
            workshop(
                out=f"run{i}",
                dtype="float64",
                slots=slots,
                micro_batch_tokens=tokens,
                group_size=16,
            )
            / "metrics.jsonl"
        )
        for i, (slots, tokens) in enumerate(((64, 10**6), (9, 1)))
    ]
    for one, other in zip(*map(without_time, runs)):
        one.pop("logprob_gap_max"), other.pop("logprob_gap_max")  # rounding itself
        assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_any_number_of_levels(workshop, levels):
    quality = {1: (1.0,), 2: (0.5, 1.0), 3: (0.5, 0.9, 0.9), 4: (0.5, 0.9, 0.9, 0.5)}[levels]
    out = workshop(quality=quality, updates=1, max_new_tokens=tuple(range(3, 3 + levels)))
    metrics = lines(out / "metrics.jsonl")
    assert [row["level"] for row in metrics] == list(range(1, levels + 1))
    assert all(row["length_mean"] <= 2 + row["level"] for row in metrics)  # each level's own cap


def test_decreasing_quality_trains_the_harder_bin_first_and_warns(workshop, capsys):
    out = workshop(quality=(1.0, 0.5), updates=1)
    first = {c["problem_id"] for c in lines(out / "completions.jsonl") if c["update"] == 1}
    assert first <= {f"p{i}" for i in range(1, 20, 2)}  # pass rate 0.1
    assert "Q1 < Q2" in capsys.readouterr().out


def test_interleaved_levels_take_turns(workshop):
    out = workshop(schedule="interleaved", updates=(3, 1))
    assert [row["level"] for row in lines(out / "metrics.jsonl")] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    "reward, kind", [("never", "groups_all_wrong"), ("always", "groups_all_right")]
)
def test_it_ends_when_every_problem_is_solved_or_none_is(workshop, reward, kind, capsys):
    """Dynamic sampling must not draw for ever: three skipped updates end a level, and each says what it saw."""
    out = workshop(reward=f"toy_reward.py:{reward}", updates=9, max_draws=2)
    metrics = lines(out / "metrics.jsonl")
    assert [row["level"] for row in metrics] == [1, 1, 1, 2, 2, 2]
    assert all(
        row["groups_drawn"] == 4 == row[kind]
        and row["groups_kept"] == 0
        and row["objective"] is None
        for row in metrics
    )
    assert "ends early after 3 skipped updates" in capsys.readouterr().out


def test_surplus_is_trained_on_next_and_then_stale(workshop):
    """Without buffer.expire in the loop old groups would be trained on under log-probs of a policy long gone."""
    metrics = lines(
        workshop(quality=1.0, updates=3, prompts=7) / "metrics.jsonl"
    )  # 7 groups drawn, 2 wanted
    assert [row["groups_pending"] for row in metrics] == [5, 3, 0]
    assert [(row["groups_drawn"], row["groups_stale"]) for row in metrics] == [
        (7, 0),
        (0, 0),
        (7, 3 + 5),
    ]
    assert metrics[1]["accuracy"] is None and metrics[1]["ratio_max"] > 1.001  # trained off-policy
    assert [row["logprob_gap_max"] is None for row in metrics] == [False, True, False]


def test_a_skipped_update_does_not_age_the_buffer(workshop):
    """Groups wait for the next draws under the very policy that sampled them: three short draws fill one buffer."""
    metrics = lines(
        workshop(quality=1.0, updates=4, prompts=2, buffer_groups=6, max_draws=1, filter="all")
        / "metrics.jsonl"
    )
    assert [row["groups_kept"] for row in metrics] == [0, 0, 6, 0] and sum(
        row["groups_stale"] for row in metrics[:3]
    ) == 0


def test_one_problem_drawn_twice_makes_two_groups(workshop, tmp_path):
    """Grouping by prompt text would merge them; forgetting the draw index would sample the same completions twice."""
    (tmp_path / "one.jsonl").write_text('{"problem": "a", "answer": "1", "pass_rate": 0.5}')
    out = workshop(
        data="one.jsonl",
        quality=1.0,
        updates=1,
        prompts=1,
        group_size=8,
        max_new_tokens=30,
        dtype="float64",
    )
    drawn = [c["text"] for c in lines(out / "completions.jsonl")]
    assert (
        lines(out / "metrics.jsonl")[0]["groups_kept"] == 2
        and len(drawn) % 16 == 0
        and len(set(drawn)) == len(drawn)
    )


def test_what_is_logged_is_what_its_name_says(workshop):
    """Against recomputation from the completions and the schedule."""
    out = workshop(
        quality=1.0,
        updates=4,
        filter="all",
        inner_epochs=2,
        warmup=2,
        lr=1e-3,
        lr_decay="linear",
        eps_low=1e-3,
        eps_high=0.9,
    )
    for row in lines(out / "metrics.jsonl"):
        assert row["tokens_trained"] == 2 * row["tokens_sampled"]  # every group kept, two passes
        assert row["lr"] == pytest.approx(1e-3 * [0.5, 1, 2 / 3, 1 / 3][row["update"] - 1])
        assert (
            row["clip_high_share"] == 0 < row["clip_low_share"] < 1
        )  # a bound of 1.9 is never reached, 0.999 often
        assert 1 < row["ratio_max"] < 1.9 and row["grad_norm"] > 0


def test_the_math_reward_is_the_graders_outcome(workshop):
    out = workshop(reward="math", filter="all", updates=2)
    assert all(c["outcome"] == (c["verdict"] == "right") for c in lines(out / "completions.jsonl"))


@pytest.mark.parametrize("one_in, said", [(10, True), (40, False)])
def test_failures_of_the_grader_are_counted_apart_and_many_are_said(
    workshop, monkeypatch, capsys, one_in, said
):
    """A reward that silently turns into zeros looks like a policy that does not learn."""
    monkeypatch.setattr(
        train.Grader,
        "compare",
        lambda self, cases: ["timeout" if i % one_in == 0 else "wrong" for i in range(len(cases))],
    )
    out = workshop(quality=1.0, updates=1, buffer_groups=10, filter="all")
    (row,) = lines(out / "metrics.jsonl")
    assert (
        row["grader_timeouts"] == 40 // one_in
        and row["grader_errors"] == 0
        and row["accuracy"] == 0
    )
    assert (f"the grader gave up on {40 // one_in} of 40" in capsys.readouterr().out) == said


def test_overlap_with_held_out_problems_is_printed_at_the_start(workshop, capsys):
    out = workshop(eval_data="p.jsonl", quality=1.0, updates=1, eval_every=0)
    assert "overlap_with_eval 20; near_overlap_with_eval 0" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["overlap_with_eval"] == 20


def test_a_step_without_signal_moves_nothing():
    """Adam's momentum and weight decay would move the weights although every advantage is 0."""
    model = random_model()
    optimizer = Learner(model, Ranks())
    optimizer.adamw.param_groups[0]["lr"] = 0.1
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step(1.0)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.tensor([[1, 2]])).sum() * 0).backward()
    assert optimizer.step(1.0) == 0 and all(
        torch.equal(p, b) for p, b in zip(model.parameters(), before)
    )


def test_whatever_ends_a_run_its_state_is_saved(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workshop(save_every=1)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [
        "000000+001.000"
    ]  # one draw was made


def test_ctrl_c_waits_for_the_update_in_progress():
    done = []
    with pytest.raises(KeyboardInterrupt):
        ranks = Ranks()
        with ranks.signals():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
            ranks.check()
    assert done


def test_kept_and_dropped_groups_add_up_over_a_run(workshop):
    metrics = lines(
        workshop(reward="toy_reward.py:even", updates=4, prompts=3, max_new_tokens=1)
        / "metrics.jsonl"
    )
    total = {
        k: sum(row[f"groups_{k}"] for row in metrics)
        for k in ("drawn", "kept", "all_right", "all_wrong", "stale")
    }
    assert (
        total["drawn"]
        == total["kept"]
        + total["all_right"]
        + total["all_wrong"]
        + total["stale"]
        + metrics[-1]["groups_pending"]
    )
    assert total["kept"] == 2 * len(metrics) and metrics[-1]["groups_pending"] == 0


@pytest.mark.parametrize(
    "flags",
    [
        {"loss_norm": "token", "adv_std": "none"},
        {"length_kind": "kimi", "length_weight": 1.0},
        {"length_kind": "cosine", "length_weight": (0.0, 0.5)},
        {"kl_coef": 0.1, "filter": "all", "reward": "math"},
        {"dtype": "bfloat16"},
        {"inner_epochs": (2, 1), "minibatches": 1, "lr_decay": "cosine"},
        {"difficulty": "level", "quality": (1, 2)},
        {"examples": "e.jsonl"},
        {"eval_data": "p.jsonl", "eval_every": 1},
        {"eval_data": "p.jsonl", "eval_every": 0},
    ],
    ids=str,
)
def test_settings_run(workshop, tmp_path, flags):
    (tmp_path / "e.jsonl").write_text('{"problem": "8", "solution": "\\\\boxed{1}"}')
    out = workshop(**{"updates": 1, **flags})
    assert len(lines(out / "metrics.jsonl")) == 2
    expected = {1: 6, 0: 0}.get(flags.get("eval_every"), 0)
    assert (
        len(lines(out / "eval.jsonl")) == expected
        if expected
        else not (out / "eval.jsonl").exists()
    )


def test_data_without_pass_rates_is_one_level_and_says_so(workshop, tmp_path, capsys):
    (tmp_path / "plain.jsonl").write_text(
        "\n".join(json.dumps({"problem": c, "answer": 1}) for c in "abcdeea")
    )
    out = workshop(data="plain.jsonl", updates=1)
    printed = capsys.readouterr().out
    assert "plain.jsonl: no problem has a pass_rate" in printed and "repeats_removed 2" in printed
    assert [row["level"] for row in lines(out / "metrics.jsonl")] == [1]


def test_held_out_problems_without_pass_rates_stand_for_every_level(workshop, tmp_path, capsys):
    """Measured training problems and a plain held-out file are an ordinary pair."""
    (tmp_path / "plain.jsonl").write_text(
        "\n".join(json.dumps({"problem": c, "answer": 1}) for c in "xyz")
    )
    out = workshop(eval_data="plain.jsonl", updates=1)
    assert [(row["level"], row["n"]) for row in lines(out / "eval.jsonl")] == [(1, 3), (2, 3)] * 3
    assert "stand for every level" in capsys.readouterr().out


def test_prompts_longer_than_the_context_are_dropped_and_counted(workshop, tmp_path, capsys):
    rows = [
        {"problem": c * n, "answer": "1", "pass_rate": 0.5}
        for c, n in (("a", 1), ("b", 300), ("c", 1), ("d", 300))
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = workshop(data="long.jsonl", quality=1.0, updates=1)
    assert "prompts_too_long 2" in capsys.readouterr().out
    assert {c["problem_id"] for c in lines(out / "completions.jsonl")} == {"long-1", "long-3"}


def test_an_interrupt_keeps_what_was_written_and_saves_the_state(workshop, monkeypatch, tmp_path):
    real, calls = train.draw, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "draw", interrupted)
    with pytest.raises(SystemExit) as stop:
        workshop(updates=5)
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert stop.value.code == 130 and rows
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()][0].startswith(
        f"{len(rows):06d}"
    )


def test_explain_prints_the_resolved_objective(workshop, capsys, tmp_path):
    workshop("--explain", eps_high=(0.28, 0.4), length_weight=0.5)
    printed = capsys.readouterr().out
    for part in (
        "eps_low = 0.2 [DAPO]",
        "eps_high = 0.4 [given]",
        "0.5 [given] x overlong",
        "rho = pi / pi_old",
        "level 2",
    ):
        assert part in printed
    assert not (tmp_path / "run").exists()


def test_an_error_in_ones_own_reward_is_said_with_its_name_and_the_problem(workshop, capsys):
    with pytest.raises(SystemExit) as stop:
        workshop(reward="toy_reward.py:crash")
    error = capsys.readouterr().err
    assert (
        stop.value.code == 1
        and "--reward toy_reward.py:crash, problem p" in error
        and "KeyError: 'nothing'" in error
    )
