"""Random inputs, where a mutant cannot be: code that is missing. Some in the suite;
`python -m pytest tests/test_random.py --hypothesis-profile=long` takes some 20 minutes."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import torch
from conftest import lines, random_model, write_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch import at, die, said, start, wait
from pytest import MonkeyPatch, approx, fixture, mark
from test_resume import EVEN, assert_the_same
from test_rollout import sampled, tokens_of
from test_train import a_run, group, level

import rollout
from data import read_problems
from eprli import clipped_objective, loss_weight
from rollout import Completion, stream_key
from train import Sample, accumulate_gradient

MODEL = random_model(dtype=torch.float64)
small = st.integers(5, 96)  # a token


@given(
    st.lists(st.lists(small, max_size=70), min_size=1, max_size=8),
    st.sampled_from([1, 16, 33]),
    st.lists(st.integers(0, 12), min_size=8, max_size=8),
    st.lists(st.integers(1, 4), min_size=8, max_size=8),
    st.integers(1, 20),
    st.sampled_from([1, 100, 8192]),
    st.sampled_from([8, 32]),
)
@example([[], [5]], 16, [3] * 8, [1] * 8, 8, 8192, 8)  # one prompt is the beginning of the other
def test_any_sampling_is_that_of_each_prompt_alone(
    prompts, shared, limits, counts, slots, prefill, room
):
    """A prompt that filled its room was copied onto itself; a prefill in parts forgot prompts."""
    prompts = [[9] * shared + prompt for prompt in prompts]
    keys = [[stream_key(i, k) for k in range(n)] for i, n in enumerate(counts)]
    options = dict(stop_ids={3, 50}, temperature=1.0)
    with MonkeyPatch.context() as patch:
        patch.setattr(rollout, "PREFILL_TOKENS", prefill)
        patch.setattr(rollout, "ROOM", room)
        own = [[limit] * n for limit, n in zip(limits, counts)]
        work = prompts, keys[: len(prompts)], own[: len(prompts)]
        done = sampled(MODEL, *work, slots=slots, **options)
        for one, *alone in zip(done, *work):
            (expected,) = sampled(MODEL, *([each] for each in alone), slots=8, **options)
            assert tokens_of([one]) == tokens_of([expected])
            for a, b in zip(one, expected):
                assert a.logprobs == approx(b.logprobs, abs=1e-9)


@given(
    st.lists(
        st.tuples(
            st.lists(small, min_size=1, max_size=30),
            st.lists(st.lists(small, min_size=1, max_size=20), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["sequence", "token", "constant"]),
    st.sampled_from([1, 40, 4096]),
    st.integers(0, 9),
)
def test_any_gradient_is_the_dense_one(groups, norm, most_tokens, seed):
    """Of each completion behind its prompt, alone, by autograd through a plain softmax."""
    torch.manual_seed(seed)
    samples = []
    for prompt, rows in groups:
        done = [Completion(r, (-3 + torch.randn(len(r))).tolist(), True) for r in rows]
        own = group(prompt, done, [0.0] * len(done))
        samples += [Sample(own, c, torch.randn(()).item(), True) for c in done]
    counts = len(samples), sum(len(s.completion.tokens) for s in samples)
    run, own = a_run(MODEL, f"--loss-norm {norm}"), level()
    run.learner.most_tokens = most_tokens
    MODEL.zero_grad()
    accumulate_gradient(run, own, samples)
    found = [p.grad.clone() for p in MODEL.parameters()]
    MODEL.zero_grad()
    for s in samples:
        prompt, ids = torch.tensor(s.group.prompt), torch.tensor(s.completion.tokens)
        logits = MODEL(torch.cat([prompt, ids])[None])[0, len(prompt) - 1 : -1]
        logprob = (logits / 0.8).log_softmax(-1).gather(-1, ids[:, None]).T
        old, A = torch.tensor([s.completion.logprobs]).double(), torch.tensor([s.advantage])
        length = torch.tensor([len(ids)]).double()
        weight = loss_weight(norm, length, *counts, own.max_new_tokens)
        mask = torch.ones_like(logprob, dtype=bool)
        bounds = own.eps_low, own.eps_high
        (-clipped_objective(logprob, old, A.double(), weight, mask, *bounds)).backward()
    for p, gradient in zip(MODEL.parameters(), found):
        assert (p.grad - gradient).abs().max() < 1e-10 * (1 + p.grad.abs().max())


PLAIN = {"id": "7", "problem": "1+1", "answer": "2", "pass_rate": 0.25, "level": 3, "more": [None]}
values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=2), st.just("Level 4"), st.just("#### 5"),
)  # fmt: skip


@settings(max_examples=10 * settings().max_examples)
@given(
    st.lists(st.dictionaries(st.sampled_from([*PLAIN, "solution"]), values), max_size=4),
    st.binary(max_size=3),
    st.integers(0, 400),
)
def test_any_file_of_problems_is_read_or_is_one_line_of_error(tmp_path_factory, changes, bytes, at):
    """What is read is what stands there. No error but ValueError, of one line."""
    path = tmp_path_factory.mktemp("random") / "p.jsonl"
    rows = [PLAIN | {"id": str(i)} | change for i, change in enumerate(changes)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(text[:at] + bytes + text[at:])
    try:
        problems = read_problems(path)
    except ValueError as error:
        assert "\n" not in str(error).strip() and path.name in str(error)
        return
    assert all(p.problem.strip() for p in problems)
    assert len({p.id for p in problems}) == len(problems)
    assert all(p.pass_rate is None or 0 <= p.pass_rate <= 1 for p in problems)
    if not bytes:
        for p, row in zip(problems, rows, strict=True):
            assert p.problem == row["problem"]
            assert p.answer == row["answer"] or not row["answer"]  # without one, a solution has it


@fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    folder = tmp_path_factory.mktemp("random")
    rows = []
    for i, c in enumerate("0123456789abcdefghij"):
        rows.append({"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": [0.5, 0.1][i % 2]})
    write_lines(folder / "p.jsonl", rows)
    (folder / "r.py").write_text(EVEN + "def none(problem, response):\n    return 0.0\n")
    return SimpleNamespace(folder=folder, model=toy_folder)


def run(folder, flags, sabotage=None):
    return wait(start(folder, flags, sabotage=sabotage))[0]


@mark.slow
@settings(max_examples=settings().max_examples // 4)
@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from(["keep", "drop", "missing"]),
    st.sampled_from(["sequential", "interleaved"]),
    st.sampled_from(["mixed", "all"]),
    st.sampled_from(["even", "even none", "none even"]),
    st.integers(1, 2),
    st.integers(1, 12),
)
def test_no_group_is_lost_in_any_run(
    workshop, prompts, wanted, surplus, schedule, kept, reward, minibatches, call
):
    """Whatever the flags, and wherever a kill: drawn = the five fates + those that wait, and the
    run that was killed ends as the one that was not."""
    folder, flags = workshop.folder, f"--model {workshop.model} --data p.jsonl --group-size 4"
    rewards = " ".join(f"r.py:{name}" for name in reward.split())
    flags += f" --prompts {prompts} --buffer-groups {max(wanted, minibatches)} --surplus {surplus}"
    flags += (
        f" --schedule {schedule} --filter {kept} --reward {rewards} --minibatches {minibatches}"
    )
    flags += " --max-new-tokens 6 --updates 3 --lr 1e-2 --device cpu --save-every 1"

    for old in folder.glob("*/config.json"):
        shutil.rmtree(old.parent)
    assert run(folder, f"{flags} --out whole") == 0, said(folder)
    if run(folder, f"{flags} --out killed", at("train.learn", call, die)):
        assert run(folder, "--resume killed") == 0, said(folder)
    rows = lines(folder / "killed/metrics.jsonl")
    fates = Counter()
    for row in rows:
        for name in ("drawn", "kept", "all_right", "all_wrong", "broken", "stale"):
            fates[name] += row[f"groups_{name}"]
    pending = {row["level"]: row["groups_pending"] for row in rows}
    assert fates.pop("drawn") == fates.total() + sum(pending.values())
    assert_the_same(folder, "killed", last=len(rows))
