"""The KV cache against the uncached model; sampling against transformers and the softmax itself."""

import itertools

import numpy as np
import pytest
import torch
from conftest import families, random_model
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

import rollout
from model import pad
from rollout import KVCache, choose, sample, stream_key, uniforms

# 5 6 7, then 8, and so on: prompts of different lengths.
PROMPTS = [list(range(*ends)) for ends in itertools.pairwise((5, 8, 9, 18, 20, 24))]
MORE = PROMPTS + [[30 + i] * (1 + i % 4) for i in range(15)]


def complete(model, prompts=PROMPTS, samples=3, limit=25, **settings):
    """`sample` with `samples` streams per prompt (or one number per prompt), and one limit."""
    keys = []
    for i, n in enumerate(np.broadcast_to(samples, len(prompts))):
        keys.append([stream_key(0, i, k) for k in range(n)])
    settings = dict(slots=8, stop_ids={3, 50}, temperature=1.0) | settings
    return sampled(model, prompts, keys, [[limit] * len(own) for own in keys], **settings)


def sampled(model, prompts, *arguments, **settings):
    """The completions of every prompt, in order."""
    done = dict(sample(model, prompts, *arguments, **settings))
    return [done[number] for number in range(len(prompts))]


def tokens_of(done):
    return [[c.tokens for c in completions] for completions in done]


# ----------------------------------------------------------------------------------------- cache


@families
def test_cached_equals_uncached_for_rows_of_different_length(family):
    """Positions off by one, a row that sees its neighbour or the padding of its prefill, a cache
    that loses tokens when it grows: all move these logits."""
    model = random_model(family, torch.float64)
    ids, lengths = torch.randint(0, 97, (4, 120)), torch.tensor([3, 17, 40, 32])
    order, positions = torch.tensor([2, 0, 3, 1]), torch.arange(40)[None]
    with torch.no_grad():
        full, cache = model(ids), KVCache(model, 4, 120)
        cache.fit(40)
        model(ids[order, :40], positions, cache.prefilling(positions, order))
        for i in range(45):
            at = lengths[:, None] + i
            cache.fit(41 + i)
            logits = model(ids.gather(1, at), at, cache.decoding(at))[:, 0]
            assert torch.allclose(logits, full[range(4), lengths + i], atol=1e-10)


def test_decoding_in_bfloat16_rounds_no_score_before_its_softmax():
    """A product in bfloat16 rounds a score of 100 to a multiple of a half, and the learner's fused
    attention does not: on large scores the two would be other policies."""
    torch.manual_seed(0)
    cache = KVCache(random_model(dtype=torch.bfloat16), 8, 32)
    cache.fit(32)
    cache.k = [torch.randn_like(k) + 6 for k in cache.k]
    cache.v = [torch.randn_like(v) for v in cache.v]
    q, new = (torch.randn(8, heads, 1, 8, dtype=torch.bfloat16) + 6 for heads in (6, 2))
    positions = torch.arange(8)[:, None] + 20
    out = cache.decoding(positions)(0, q, new, new)
    keys, values = (x[0].double().repeat_interleave(3, 1) for x in (cache.k, cache.v))
    score = q.double() @ keys.mT / 8**0.5
    score = score.masked_fill(torch.arange(32) > positions[:, None, None], -torch.inf)
    expected = (score.softmax(-1) @ values).transpose(1, 2).flatten(2)
    assert score.max() > 100 and (out - expected).abs().max() < 0.02


def test_the_room_of_the_cache_follows_its_longest_row(monkeypatch):
    """A room that never shrinks makes each step as slow as the longest one; one that changes with
    every token copies the whole cache for it."""
    monkeypatch.setattr(rollout, "ROOM", 8)
    cache = KVCache(random_model(), 8, 60)
    for length, room in ((16, 24), (24, 24), (25, 32), (59, 64), (32, 64), (31, 40)):
        cache.fit(length)
        assert cache.room == room


def test_choosing_a_few_rows_at_a_time_changes_nothing(monkeypatch):
    """A part of the logits with the random numbers of another."""
    model = random_model(dtype=torch.float64)
    expected = complete(model, slots=16)
    monkeypatch.setattr("model.rows_per_chunk", lambda width: 3)
    assert complete(model, slots=16) == expected


def test_a_captured_step_is_the_step(monkeypatch):
    """What a GPU does, with torch.fx in the place of a CUDA graph: a trace of the operations of the
    step on the tensors that it met, blind to everything in Python. A trace that is replayed after
    the cache has moved, or is fed elsewhere, samples other tokens. So do rows that lose their
    place when half of them are dropped."""
    captured = []

    def trace(step, device):
        graph, result = make_fx(lambda: step())(), step().clone()
        captured.append(len(result))
        return lambda: result.copy_(graph())

    monkeypatch.setattr(rollout, "ROOM", 8)
    model = random_model(dtype=torch.float64, num_hidden_layers=1)
    expected = tokens_of(complete(model, PROMPTS[:2], samples=12))  # in 8 slots, to the end
    monkeypatch.setattr(rollout, "capture", trace)
    assert tokens_of(complete(model, PROMPTS[:2], samples=12, slots=16)) == expected
    steps = sum(map(len, itertools.chain(*expected))) / 16
    assert len(set(captured)) > 1  # again for fewer rows
    assert len(captured) < steps  # but not at every step


ROOMS = [
    (False, "1 32 33 100 128 64 63 250 390 1 1", "32 32 64 128 128 128 96 288 416 32 32"),
    (True, "1 32 33 97 224 56 55 250 1", "32 32 96 224 224 224 128 416 32"),
]


@pytest.mark.parametrize("reads_filled, lengths, rooms", ROOMS)
def test_room_grows_ahead_of_the_rows(reads_filled, lengths, rooms):
    """Where attention reads all of the room, doubling it would cost time at every token. Where a
    graph is captured again at every change, small steps would. A change to the same room copies
    the cache in vain, and room for more than the longest row is never used."""
    cache = KVCache(random_model(), 1, 400)
    cache.reads_filled = reads_filled
    for length, room in zip(lengths.split(), rooms.split(), strict=True):
        before, keys = cache.room, cache.k[0]
        cache.fit(int(length))
        assert cache.room == int(room) and (cache.k[0] is keys) == (cache.room == before)


# --------------------------------------------------------------------------------------- sampling


@families
def test_greedy_equals_transformers(family, tmp_path):
    """Token for token, through refilled slots: a stale cache row or a position off by one diverges
    at once."""
    ours = random_model(family)
    ours.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    settings = dict(samples=1, limit=40, stop_ids={3}, temperature=0)
    done = complete(ours, MORE, slots=64, **settings)
    for slots in (1, 3):
        assert tokens_of(complete(ours, MORE, slots=slots, **settings)) == tokens_of(done)
    for prompt, (completion,) in zip(MORE, done):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=3,
            pad_token_id=0,
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert completion.stopped == (completion.tokens[-1] == 3)
    assert len({len(c.tokens) for (c,) in done}) > 1  # some stopped, some ran out


def test_a_prompt_is_not_overwritten_while_it_is_still_copied():
    """All 8 slots fall idle at once. The last sample of the second prompt copies it from slot 5,
    where the fourth prompt would be prefilled: the order of idle slots must prevent that."""
    model = random_model(dtype=torch.float64)
    prompts = [[10 + r] * (3 + r) for r in range(4)]
    settings = dict(samples=(5, 4, 4, 1), limit=12, stop_ids=())
    together = complete(model, prompts, **settings)
    assert tokens_of(together) == tokens_of(complete(model, prompts, slots=64, **settings))


def gaps(model, temperature, **settings):
    """Of every token that is sampled: how far the learner's log-prob is from the sampler's."""
    found = []
    for prompt, completions in zip(PROMPTS, complete(model, temperature=temperature, **settings)):
        ids, mask = pad([c.tokens for c in completions])
        logprob, _ = model.token_logprobs(torch.tensor(prompt), ids, mask, temperature)
        recorded = torch.tensor([x for c in completions for x in c.logprobs], dtype=torch.float64)
        found.append((logprob[mask].double() - recorded).abs())
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_equal_the_learners(temperature):
    """The first ratio is 1. A temperature forgotten on one side, or a shift by one token,
    is far off."""
    # Rounding; a temperature or a position that is off moves tenths.
    assert 0 < gaps(random_model(), temperature).max() < 5e-5


@pytest.mark.parametrize("stop", [0, 3])
def test_stop_token_is_kept_and_trained_exactly_once(stop):
    """Also where it is the padding id 0: masks come from lengths, never from token values."""
    model = random_model()
    done = sum(complete(model, samples=8, limit=60, slots=16, stop_ids={stop}), [])
    stopped = [c.tokens for c in done if c.stopped]
    assert 0 < len(stopped) < len(done)
    assert all(tokens[-1] == stop and tokens.count(stop) == 1 for tokens in stopped)
    ids, mask = pad(stopped)
    trained = (ids == stop) & mask
    assert (trained.sum(1) == 1).all()
    logprob, _ = model.token_logprobs(torch.tensor([5, stop]), ids, mask, 1.0)
    assert (logprob[trained] < 0).all() and (logprob[~mask] == 0).all()


def test_sampled_frequencies_follow_the_softmax():
    """Chi-square of 20,000 first tokens against the softmax; p is about 1e-4 at the bound."""
    model, n = random_model(vocab_size=12), 20_000
    done = complete(model, [[5, 6, 7]], n, 1, slots=4096, stop_ids=(), temperature=0.7)
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]]))[0, -1] / 0.7).softmax(-1).numpy()
    assert (n * p > 5).all()
    counts = np.bincount([c.tokens[0] for c in done[0]], minlength=12)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 37  # 11 degrees of freedom


def test_uniforms_are_uniform_and_independent():
    """The streams of neighbouring samples must not be shifted copies of each other."""
    keys = np.array([stream_key(0, 1, 0, d, i) for d in range(30) for i in range(20)])
    u = np.array(
        [uniforms(keys, np.full(len(keys), t, np.uint64)) for t in range(100)]
    )  # (100, 600)
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert np.bincount((u.ravel() * 10).astype(int)).std() < 4 * np.sqrt(u.size * 0.09)
    assert np.abs(np.corrcoef(u.T) - np.eye(600)).max() < 0.5


def test_edges_of_the_distribution_function():
    """u = 0 must not pick a leading token of probability 0, nor u -> 1 a trailing one. The
    log-probs of nan say what is wrong, and it must not run off the end of the vocabulary."""
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 2)
    u = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    tokens, logprobs = choose(logits, u, 1.0, 0, 1.0)
    assert tokens.tolist() == [[1], [2]] and torch.allclose(logprobs, torch.tensor(0.5).log())
    tokens, logprobs = choose(logits * torch.nan, u, 1.0, 0, 1.0)
    assert logprobs.isnan().all() and set(tokens[:, 0].tolist()) <= {0, 1, 2, 3}


def test_top_k_and_top_p_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(1000, 1)
    u = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)[:, None]
    assert choose(logits, u, 1.0, 2, 1.0)[1][0].exp().item() == pytest.approx(0.625)  # renormalised
    # 0.5 < 0.7 <= 0.5 + 0.3; one always stays; of the two likeliest, the first has 0.625.
    for top_k, top_p, kept in ((2, 1, {0, 1}), (0, 0.7, {0, 1}), (0, 0.4, {0}), (2, 0.6, {0})):
        assert set(choose(logits, u, 1.0, top_k, top_p)[0][:, 0].tolist()) == kept


def test_limits_and_equal_prompts():
    """A limit for each completion. A prompt that is drawn twice is sampled
    twice: equal completions would count one sample double."""
    keys = [[stream_key(i, k) for k in range(4)] for i in range(3)]
    limits = [[7] * 4, [3, 1, 9, 2], [7] * 4]
    settings = dict(slots=2, stop_ids=(), temperature=1.0)
    done = sampled(random_model(), [[5, 6]] * 3, keys, limits, **settings)
    lengths = [[len(tokens) for tokens in cs] for cs in tokens_of(done)]
    assert lengths == limits
    assert all(a.tokens != b.tokens for a, b in zip(done[0], done[2]))


def test_prompts_and_what_they_share_are_prefilled_once(monkeypatch):
    """A prompt that is prefilled for every completion costs time, and more prompts at once than the
    bound allows cost memory. A part that is run into the rows of another samples from the wrong
    prompt: completions must be those of a prompt alone, in few slots and in small parts."""
    model, shapes = random_model(dtype=torch.float64), []
    alike = [list(range(3, 43)) + [50 + i] * (4 - i) for i in range(4)]
    alone = complete(model, alike[:1], samples=6)
    model.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    done = tokens_of(complete(model, alike, samples=6, slots=8))
    assert done[0] == tokens_of(alone)[0]
    assert sum(rows for rows, width in shapes if width % 32 and width > 1) == 4
    # 40 tokens are shared. One is left to each prompt, and the rest rounded down to whole eights.
    # 130 tokens are two prompts of 44, the longest ones, or three of 43.
    bounds = (8192, [(1, 32), (4, 16)]), (130, [(1, 32), (2, 16)] * 2), (43, [(1, 48)] * 4)
    for bound, expected in bounds:
        monkeypatch.setattr(rollout, "PREFILL_TOKENS", bound)
        shapes.clear()
        assert tokens_of(complete(model, alike, samples=6, slots=24)) == done
        assert [shape for shape in shapes if shape[1] > 1] == expected
