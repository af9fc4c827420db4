"""Sampling against transformers' greedy decoding, the softmax itself, and the learner's log-probs."""

import numpy as np
import pytest
import torch
from conftest import random_model
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

import model as model_module
import rollout
from model import KVCache, pad
from rollout import Request, choose, sample, stream, uniforms

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [20, 21, 22, 23]]
MORE = PROMPTS + [[30 + i] * (1 + i % 4) for i in range(15)]


def requests(samples=3, max_new_tokens=25, prompts=PROMPTS):
    return [
        Request(p, [stream(0, i, k) for k in range(samples)], max_new_tokens)
        for i, p in enumerate(prompts)
    ]


@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_equals_transformers(family, slots, tmp_path):
    """Token for token, through refilled slots: a stale cache row or a position off by one diverges at once."""
    ours = random_model(family)
    ours.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stop = 3
    done = sample(ours, requests(1, 40, MORE), slots=slots, stop_ids={stop}, temperature=0)
    for prompt, (completion,) in zip(MORE, done):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=stop,
            pad_token_id=0,
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert completion.stopped == (completion.tokens[-1] == stop)
    assert len({len(c.tokens) for (c,) in done}) > 1  # some stopped, some ran out


@pytest.mark.parametrize("slots", [1, 9, 11, 64])
def test_slots_and_order_do_not_change_completions(slots):
    """float64, so that rounding cannot flip a token: what remains is a cache row overwritten while its prompt is still copied."""
    model = random_model(dtype=torch.float64)

    def run(work):
        done = sample(model, work, slots=slots, stop_ids={3, 50}, temperature=1.0)
        return [
            [(c.tokens, np.round(c.logprobs, 9).tolist()) for c in completions]
            for completions in done
        ]

    alone = [run([request])[0] for request in requests(7)]
    assert run(requests(7)) == alone
    assert run(requests(7)[::-1])[::-1] == alone
    lengths = {len(tokens) for cs in alone for tokens, _ in cs}
    assert len(lengths) > 5 and 25 in lengths  # ragged, and some ran out


@pytest.mark.parametrize("wider,slack", [(1, 8), (4, 2)])
def test_a_captured_step_is_the_step(monkeypatch, wider, slack):
    """What a GPU does, with torch.fx in the place of a CUDA graph: a trace of the step's operations on the very tensors that it
    met, blind to everything in Python. One that is replayed after the cache has moved, or fed elsewhere, samples other tokens."""
    captured = []

    def trace(step):
        graph, result = make_fx(lambda: step())(), step().clone()
        captured.append(len(result))
        return result, lambda: result.copy_(graph())

    for name, value in (("PAGE", 8), ("WIDER", wider), ("SLACK", slack)):
        monkeypatch.setattr(KVCache, name, {"cpu": value})
    model = random_model(dtype=torch.float64)
    expected = sample(model, requests(7), slots=24, stop_ids={3}, temperature=1.0)
    monkeypatch.setattr(rollout, "capture", trace)
    monkeypatch.setattr(rollout, "CAPTURED", "cpu")
    assert sample(model, requests(7), slots=24, stop_ids={3}, temperature=1.0) == expected
    steps = sum(len(c.tokens) for cs in expected for c in cs) / 24
    assert (
        len(set(captured)) > 1 and len(captured) < steps
    )  # again for fewer rows, but not at every step


def test_a_slot_holds_the_pages_that_its_tokens_need(monkeypatch):
    """Not those of its last occupant: long completions must not hold memory for the short ones that follow."""
    monkeypatch.setattr(KVCache, "PAGE", {"cpu": 8})
    decode, steps = rollout.Slots.decode, []

    def watch(self):
        decode(self)
        live = self.live
        assert (self.cache.held[live] == -(-(self.prompt_length + self.count) // 8)[live]).all()
        steps.append(self.cache.held.sum())

    monkeypatch.setattr(rollout.Slots, "decode", watch)
    work = [
        Request([10 + r], [stream(r, k) for k in range(5)], [40, 3, 3, 40, 9]) for r in range(12)
    ]
    sample(random_model(), work, slots=8, stop_ids=set(), temperature=1.0)
    assert max(steps) > 20 and len(steps) > 100


def test_a_prompt_is_not_overwritten_while_it_is_still_copied():
    """All 8 slots fall idle at once. The last sample of the second request copies its prompt from slot 5, which is where
    the fourth request would be prefilled: the order in which idle slots are given away must see to that."""
    model = random_model(dtype=torch.float64)
    work = [
        Request([10 + r] * (3 + r), [stream(r, k) for k in range(n)], 12)
        for r, n in enumerate((5, 4, 4, 1))
    ]
    alone = [
        sample(model, [request], slots=8, stop_ids=set(), temperature=1.0)[0] for request in work
    ]
    together = sample(model, work, slots=8, stop_ids=set(), temperature=1.0)
    assert [[c.tokens for c in cs] for cs in together] == [[c.tokens for c in cs] for cs in alone]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_equal_the_learners(temperature):
    """The ratio of the first step is 1. A temperature forgotten on one side, or a shift by one token, is far off."""
    model = random_model()
    done = sample(model, requests(), slots=8, stop_ids={3, 50}, temperature=temperature)
    gap = 0.0
    for request, completions in zip(requests(), done):
        ids, mask = pad([request.prompt] * len(completions), [c.tokens for c in completions])
        logprob, _ = model.token_logprobs(ids, mask, temperature)
        recorded = torch.tensor([x for c in completions for x in c.logprobs])
        gap = max(gap, (logprob[mask] - recorded).abs().max().item())
    assert 0 < gap < 5e-5  # rounding; a temperature or a position that is off moves tenths


@pytest.mark.parametrize("stop", [0, 3])
def test_stop_token_is_kept_and_trained_exactly_once(stop):
    """Also when the stop id is the padding id 0: masks come from lengths, never from token values."""
    model = random_model()
    done = [
        c
        for cs in sample(model, requests(8, 60), slots=16, stop_ids={stop}, temperature=1.0)
        for c in cs
    ]
    stopped = [c for c in done if c.stopped]
    assert stopped and any(not c.stopped for c in done)
    assert all(c.tokens[-1] == stop and c.tokens.count(stop) == 1 for c in stopped)
    ids, mask = pad([[5, stop]] * len(stopped), [c.tokens for c in stopped])
    trained = (ids == stop) & mask
    assert (trained.sum(1) == 1).all()
    logprob, _ = model.token_logprobs(ids, mask, 1.0)
    assert (logprob[trained] < 0).all() and (logprob[~mask] == 0).all()


def test_sampled_frequencies_follow_the_softmax():
    """Chi-square of 20,000 first tokens against the model's softmax; p is about 1e-4 at the bound."""
    model = random_model(vocab_size=12)
    prompt, n = [5, 6, 7], 20_000
    done = sample(
        model,
        [Request(prompt, [stream(1, k) for k in range(n)], 1)],
        slots=4096,
        stop_ids=set(),
        temperature=0.7,
    )[0]
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / 0.7).softmax(-1).numpy()
    assert (n * p > 5).all()
    counts = np.bincount([c.tokens[0] for c in done], minlength=12)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 37  # 11 degrees of freedom


def test_uniforms_are_uniform_and_independent():
    """The streams of neighbouring samples must not be shifted copies of each other."""
    keys = np.array([stream(0, 1, 0, d, i) for d in range(30) for i in range(20)])
    u = np.array([uniforms(keys, np.full(len(keys), t)) for t in range(100)])  # (100, 600)
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert np.bincount((u.ravel() * 10).astype(int)).std() < 4 * np.sqrt(u.size * 0.09)
    assert np.abs(np.corrcoef(u.T) - np.eye(600)).max() < 0.5


def test_edges_of_the_distribution_function():
    """u = 0 must not pick a leading token of probability 0, nor u -> 1 run off the end."""
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 2)
    tokens, logprobs = choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 2] and torch.allclose(logprobs, torch.tensor(0.5).log())


def test_top_k_and_top_p_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(1000, 1)
    u = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)
    tokens, logprobs = choose(logits, u, 1.0, top_k=2)
    assert set(tokens.tolist()) == {0, 1} and logprobs[tokens == 0][
        0
    ].exp().item() == pytest.approx(0.625)
    tokens, _ = choose(logits, u, 1.0, top_p=0.7)  # 0.5 < 0.7 <= 0.5 + 0.3: two tokens
    assert set(tokens.tolist()) == {0, 1}
    assert set(choose(logits, u, 1.0, top_p=0.4)[0].tolist()) == {0}  # the likeliest always stays


def test_limits_are_per_request():
    model = random_model()
    work = [Request([5, 6], [stream(i)], n) for i, n in enumerate((1, 7, 30))]
    assert [
        len(c.tokens) for (c,) in sample(model, work, slots=8, stop_ids=set(), temperature=1.0)
    ] == [1, 7, 30]
    several = [Request([5, 6], [stream(i) for i in range(4)], [3, 1, 9, 2])]
    assert [
        len(c.tokens) for c in sample(model, several, slots=2, stop_ids=set(), temperature=1.0)[0]
    ] == [3, 1, 9, 2]


@pytest.mark.parametrize("slots", [8, 24])
def test_one_prefill_per_prompt(slots, monkeypatch):
    """Every prompt token goes through the model once, however many completions share it and however few slots there are."""
    model = random_model()
    seen = []
    forward = model_module.Body.forward

    def counting(self, ids, positions=None, cache=None, rows=None):
        if rows is not None:
            seen.extend(rows.tolist())
        return forward(self, ids, positions, cache, rows)

    monkeypatch.setattr(model_module.Body, "forward", counting)
    sample(model, requests(12), slots=slots, stop_ids={3}, temperature=1.0)
    assert len(seen) == len(PROMPTS)


def test_a_prompt_drawn_twice_is_sampled_twice():
    """Two draws differ in their draw index alone; equal completions would count one sample double."""
    model = random_model()
    twice = [
        Request([5, 6, 7], [stream(0, 1, 1, draw, i) for i in range(4)], 20) for draw in (0, 1)
    ]
    first, second = sample(model, twice, slots=8, stop_ids={3}, temperature=1.0)
    assert all(a.tokens != b.tokens for a, b in zip(first, second))
    assert len({tuple(c.tokens) for c in first + second}) == 8


def test_a_beginning_that_prompts_share_is_prefilled_once(monkeypatch):
    """And changes nothing: the completions are those of each prompt alone."""
    monkeypatch.setattr(KVCache, "PAGE", {"cpu": 8})  # it has several pages
    model, seen = random_model(dtype=torch.float64), []
    few_shot = list(range(3, 43))
    alike = [
        Request(few_shot + [50 + i] * (i + 1), [stream(7, i, k) for k in range(2)], 12)
        for i in range(4)
    ]
    settings = dict(slots=8, stop_ids=set(), temperature=1.0)
    alone = [sample(model, [r], **settings)[0] for r in alike]
    hook = model.model.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    together = sample(model, alike, **settings)
    hook.remove()
    assert [[c.tokens for c in many] for many in together] == [
        [c.tokens for c in many] for many in alone
    ]
    assert seen[:2] == [
        (1, 32),
        (4, 16),
    ]  # 40 shared tokens, rounded down to whole eights and one left to each: 39
