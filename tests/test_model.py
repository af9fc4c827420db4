"""The decoder against transformers; chunked log-probs against dense ones, in value, gradient and memory."""

import json

import numpy as np
import pytest
import torch
from conftest import random_model, small_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as model_module
from model import ONEDNN, Chosen, KVCache, Linear, Transformer, log_softmax, micro_batches, pad

SHAPES = {
    "llama": ("llama", {}),
    "llama tied, biases everywhere": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, head_dim not hidden / heads": ("llama", {"head_dim": 20}),
    "llama, odd GQA ratio": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "llama, multi-head": ("llama", {"num_key_value_heads": 6}),
    "llama, linear scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama, llama3 scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 500.0,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, one kv head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied, biases": (
        "qwen3",
        {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 12},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    """A missing bias, a wrong rotary frequency, a norm in the wrong place: every one moves the logits."""
    family, changes = SHAPES[name]
    ours = random_model(family, **changes)
    ours.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (3, 50))
    for dtype, close in (
        (torch.float32, 1e-5),
        (torch.float64, 2e-6),
    ):  # of the largest logit; transformers' norms are float32
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        with torch.no_grad():
            expected = reference(ids).logits
            assert expected.std() > 0.3  # not a comparison of zeros
            reference.save_pretrained(tmp_path / "theirs")
            for folder in (tmp_path, tmp_path / "theirs"):
                assert (
                    Transformer.from_pretrained(folder, dtype)(ids) - expected
                ).abs().max() < close * expected.abs().max()


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}},
    ],
)
def test_old_and_new_spelling_of_rotary_settings(spelling, tmp_path):
    """Checkpoints before and after transformers 5 write theta and scaling in different places."""
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **spelling}))
    rope = Transformer.from_pretrained(tmp_path).model.rope
    assert (rope.theta, rope.kind, rope.factor) == (700.0, "linear", 2.0)


def test_shards_are_read_as_one(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "parts", max_shard_size="30KB"
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    ids = torch.arange(20)[None]
    assert torch.equal(Transformer.from_pretrained(tmp_path / "parts")(ids), model(ids))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensor.*model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), r"surplus 1 tensor.*extra \(2,\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"misshapes 1 tensor.*model.norm.weight \(3,\), wanted \(48,\)",
        ),
    ],
)
def test_loading_is_strict_and_names_the_tensor(break_it, message, tmp_path):
    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    break_it(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
    """A silently ignored setting would train on wrong logits."""
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_missing_weights_and_torn_files(tmp_path):
    model = random_model()
    with pytest.raises(ValueError, match="config.json"):
        Transformer.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        Transformer.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ cache


def store(model, cache, ids, rows, lengths):
    """Prefill these rows of ids (B, T), right-padded, into their cache rows."""
    lengths = np.array(lengths)
    cache.reserve(np.array(rows), lengths)
    cache.arrange()
    width = -(-lengths.max() // 8) * 8
    model(ids[:, :width], torch.arange(width).expand(len(rows), -1), cache, torch.tensor(rows))


def step(model, cache, ids, positions):
    """Decode one token a row: row b of ids at positions[b]; -1: idle."""
    positions = np.array(positions)
    live = np.flatnonzero(positions >= 0)
    cache.reserve(live, positions[live] + 1)
    cache.arrange()
    positions = torch.from_numpy(positions)
    return model(ids[torch.arange(len(ids)), positions][:, None], positions[:, None], cache)[:, 0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cached_equals_uncached_for_rows_of_different_length(family):
    """Positions off by one, a row that sees its neighbour, another's page or the padding of its prefill, a page that is read
    before it is held, pages summed in the wrong order: all move these logits."""
    model = random_model(family, torch.float64)
    ids, lengths = torch.randint(0, 97, (4, 120)), np.array([3, 17, 40, 32])
    with torch.no_grad():
        full, cache = model(ids), KVCache(model, 4, 120)
        order = [2, 0, 3, 1]  # stored in another order
        store(model, cache, ids[order], order, lengths[order])
        for i in range(45):  # across borders of pages, at another step for each row
            logits = step(model, cache, ids, lengths + i)
            assert torch.allclose(logits, full[torch.arange(4), lengths + i], atol=1e-10)


def test_rows_idle_return_copy_and_leave(monkeypatch):
    """What the sampler does to a cache, with pages of 8: a row that idles writes nowhere, its pages go to others, a prompt is
    copied without its completion, rows are dropped and renumbered."""
    monkeypatch.setattr(KVCache, "PAGE", {"cpu": 8})
    model = random_model("qwen2", torch.float64)
    ids = torch.randint(0, 97, (4, 60))
    with torch.no_grad():
        full, cache = model(ids), KVCache(model, 4, 60)

        def check(rows, positions):
            got = step(model, cache, rows, positions)
            for b, at in enumerate(positions):
                if at >= 0:
                    assert torch.allclose(
                        got[b], model(rows[b : b + 1, : at + 1])[0, -1], atol=1e-10
                    )
            held = cache.table[cache.table > 0]
            assert sorted([*held, *cache.free]) == list(
                range(1, len(cache.k[0]))
            )  # each page is held once, or free
            assert len(held) == cache.held.sum()

        store(model, cache, ids, [0, 1, 2, 3], [16, 20, 5, 16])
        assert torch.allclose(full, model(ids))
        for i in range(12):
            check(
                ids, [16 + i, 20 + i, 5 + i, -1]
            )  # row 3 idles behind its prompt of two whole pages
        ids[1, :16] = ids[3, :16]
        cache.cut([1], np.array([0]))
        cache.copy([3], [1], np.array([16]))
        for i in range(8):
            check(ids, [28 + i, 16 + i, 17 + i, 16 + i])
        assert len(cache.k[0]) == 1 + 5 + 3 + 4 + 3  # what was given back was used again
        cache.cut([0, 2], np.array([0, 8]))
        cache.keep([3, 1])
        assert len(cache.k[0]) == 1 + cache.held.sum() == 7
        for i in range(8, 20):
            check(ids[[3, 1]], [16 + i, 16 + i])


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slow_blas", {False, ONEDNN})
def test_a_linear_layer_in_float32_and_its_gradient(shape, bias, slow_blas, monkeypatch):
    """Against float64: a transposed weight, a bias that is forgotten in the sum over rows."""
    monkeypatch.setattr(model_module, "SLOW_BLAS", slow_blas)
    ours, exact = Linear(24, 40, bias), torch.nn.Linear(24, 40, bias).double()
    exact.load_state_dict({n: p.double() for n, p in ours.state_dict().items()})
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    grad = torch.randn(*shape[:-1], 40)
    ours(x).backward(grad)
    exact(y).backward(grad.double())
    assert (ours(x) - exact(y)).abs().max() < 1e-5
    for mine, theirs in zip((x, *ours.parameters()), (y, *exact.parameters())):
        assert mine.grad.shape == theirs.grad.shape and (mine.grad - theirs.grad).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_laid_out_for_decoding_give_the_same_logits(family, dtype):
    """Products that are made together must be cut apart where they belong, biases included."""
    model = random_model(
        family, dtype, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})
    )
    ids = torch.randint(0, 97, (8, 5))
    with torch.inference_mode():
        expected = model(ids)
        with model.laid_out(8):
            found = model(ids)
            assert (model.lm_head.packed is None) == (dtype == torch.float64 or not ONEDNN)
        assert model.lm_head.packed is None
    scale = expected.abs().max()
    assert (found - expected).abs().max() < {
        torch.float32: 1e-5,
        torch.bfloat16: 0.05,
        torch.float64: 1e-12,
    }[dtype] * scale


def test_weights_are_laid_out_anew_for_every_rollout():
    """Else a policy would be sampled as it was before its update; and an interrupt must not leave the old layout behind."""
    model, ids = random_model(), torch.randint(0, 97, (8, 5))
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt), model.laid_out(8):
            raise KeyboardInterrupt
        for p in model.parameters():
            p.mul_(1.1)
        expected = model(ids)
        with model.laid_out(8):
            assert torch.allclose(model(ids), expected, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- log-probs


def dense(model, ids, mask, temperature):
    logprobs = (model(ids)[:, :-1].double() / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    zero = torch.zeros(len(ids), 1, dtype=torch.double)
    return torch.cat([zero, chosen], 1) * mask, torch.cat([zero, entropy], 1) * mask


SEQUENCES = {  # prompts, completions
    # shared prompts, one that is another's beginning, one that differs by a token 0, as padding has it
    "prompts of all lengths": (
        [[1, 2, 3], [4], [1, 2, 3], [1, 2], [1, 2, 0], [4]],
        [[7, 8], [9, 10, 11, 12], [13], [5, 6], [7, 7], [0]],
    ),
    "of one length": (
        [[1, 2, 3], [4, 5, 0], [1, 2, 3]],
        [[7, 8, 9, 10, 11], [9, 10], [13, 14, 15, 16]],
    ),  # attention without a mask
    "longer than the completions": ([[1, 2, 3, 4]] * 2, [[7, 8], [9, 10, 11]]),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 97 * 3, 10**9])
def test_chunked_log_probs_equal_dense_ones(name, temperature, chunk):
    """Values and gradients, at a temperature too: a chunk lost, a temperature forgotten, a token that sees another's prompt or
    what comes after it fails."""
    model = random_model(dtype=torch.float64)
    ids, mask = pad(*SEQUENCES[name])
    weight = torch.randn(*ids.shape, dtype=torch.double)
    results = []
    for function in (
        lambda: model.token_logprobs(ids, mask, temperature, chunk),
        lambda: dense(model, ids, mask, temperature),
    ):
        model.zero_grad()
        logprob, entropy = function()
        (weight * logprob).sum().backward()
        results.append((logprob, entropy, *(p.grad.clone() for p in model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results))
    assert all((v[~mask] == 0).all() for v in results[0][:2])


def test_the_gradient_of_the_head_in_bfloat16_does_not_depend_on_chunks():
    """A sum in bfloat16 stands still once an addend is below 1/512 of it: 512 chunks would lose half of the gradient."""
    torch.manual_seed(0)
    hidden, weight = (
        torch.rand(2048, 8).bfloat16(),
        (torch.randn(16, 8) / 8).bfloat16().requires_grad_(),
    )
    targets = torch.zeros(2048, dtype=torch.long)
    grads = []
    for size in (2, 2048):
        Chosen.apply(hidden, weight, targets, 1.0, size)[0].sum().backward()
        grads.append(weight.grad.float())
        weight.grad = None
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[1].norm()


def test_log_probs_ignore_batch_mates_and_padding():
    model = random_model(dtype=torch.float64)
    prompts, completions = [[1, 2, 3], [4]], [[7, 8], [9, 10, 11, 12, 13, 14]]
    together, _ = model.token_logprobs(*pad(prompts, completions), 1.0)
    for row, p, c in zip(together, prompts, completions):
        alone, _ = model.token_logprobs(*pad([p], [c]), 1.0)
        assert torch.allclose(row[: len(p) + len(c)], alone[0], atol=1e-12)


def test_a_shared_prompt_goes_through_the_model_once():
    model, seen = random_model(), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    model.token_logprobs(*pad([[1, 2, 3, 4, 5]] * 4, [[6, 7, 8]] * 4), 1.0)
    assert seen == [5, 4 * 2]  # nothing is predicted from the last token


@pytest.mark.faults
def test_the_gradient_is_the_same_bits_whatever_threads_do():
    """A sum over completions of one prompt whose order is left to threads: a run could not be repeated, nor resumed exactly."""
    torch.set_num_threads(2)
    model = random_model(hidden_size=960, intermediate_size=128)
    ids, mask = pad([[5, 6, 7] * 20] * 40, [[1 + i % 7] * 5 for i in range(40)])

    def gradient():
        model.zero_grad()
        model.token_logprobs(ids, mask, 1.0)[0].sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    first = gradient()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, gradient()))


@pytest.mark.parametrize("prompts", [1, 2])
def test_keys_copied_to_every_head_are_those_of_its_group(prompts, monkeypatch):
    """What a GPU takes where there is a mask: heads that meet the keys of another group."""
    model = random_model("qwen3", torch.float64)
    ids, mask = pad([[5, 6, 7], [5, 6, 7] if prompts == 1 else [5, 6]], [[1, 2, 3, 4], [4, 3, 2]])
    results = []
    for copied in (False, True):
        monkeypatch.setattr(model_module, "keys_for_every_head", lambda device, masked: copied)
        model.zero_grad()
        logprob = model.token_logprobs(ids, mask, 1.0)[0]
        logprob.sum().backward()
        results.append([logprob.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-10)


def test_all_layers_share_one_mask():
    """Given a mask of booleans, attention would make one of numbers in every layer and keep them all for the backward pass."""
    model, kept = random_model("qwen2"), {}
    ids, mask = pad([[5] * 4, [6] * 7], [[8] * 9, [9] * 9])  # prompts of two lengths
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        model.token_logprobs(ids, mask, 1.0)
    assert (
        len(model.model.layers) > 1
        and [t.shape for t in kept.values()].count((2, 1, 8, 7 + 8)) == 1
    )


def test_memory_of_log_probs_stays_far_below_the_logits():
    """(B, T, V) logits at 4,096 tokens and a vocabulary of 49,152 are 805 MB; ours stay under a quarter, backward included."""
    torch.manual_seed(0)
    model = Transformer(
        small_config(
            vocab_size=49152,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )
    ids = torch.randint(0, 49152, (1, 4096))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        logprob, entropy = model.token_logprobs(ids, mask, 1.0)
        logprob.sum().backward()
    balance = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            balance += event.nbytes()
            peak = max(peak, balance)
    assert 1e6 < peak < 0.25 * 4096 * 49152 * 4


def test_log_softmax_keeps_float64_and_raises_bfloat16():
    assert log_softmax(torch.zeros(2, dtype=torch.bfloat16), 1.0).dtype == torch.float32
    assert log_softmax(torch.zeros(2, dtype=torch.float64), 1.0).dtype == torch.float64


def test_micro_batches_cover_everything_within_the_budget():
    """Padding counts, and so does every different prompt of a batch, once."""
    prompts = [[1] * 20, [2] * 10, [1] * 20, [2] * 10, [2] * 10, [1] * 20, [1] * 20]
    completions = [[0] * n for n in (5, 90, 7, 33, 33, 1, 64)]
    batches = micro_batches(prompts, completions, 100)
    assert [[len(completions[i]) for i in b] for b in batches] == [[90], [64], [33, 33], [7, 5, 1]]
    for b in batches:
        used = {tuple(prompts[i]) for i in b}
        cost = len(b) * max(len(completions[i]) for i in b) + len(used) * max(map(len, used))
        assert cost <= 100 or len(b) == 1
