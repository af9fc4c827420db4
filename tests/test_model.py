"""The decoder against transformers, its kernels, and chunked log-probs against dense ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import peak, random_model, read, small_config, table
from pytest import mark, raises, skip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model as model_module
from model import (
    ChosenLogprobs,
    Transformer,
    additive_mask,
    log_softmax,
    pad,
    rotary,
)
from policy import packed
from run.processes import keep_freed_memory

ROOT = Path(__file__).parents[1]

YARN = """{"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": %s,
"original_max_position_embeddings": 64}}"""
LLAMA3 = """{"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"""
SHAPES = """
llama | {}
llama | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}
llama | {"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}
llama | {"head_dim": 20, "rms_norm_eps": 0.05}
llama | {"num_key_value_heads": 6}
qwen2 | {}
qwen2 | {"tie_word_embeddings": true, "num_key_value_heads": 1}
qwen3 | {"head_dim": 16, "rms_norm_eps": 0.05}
qwen3 | {"tie_word_embeddings": true, "attention_bias": true, "head_dim": 12}
"""


@mark.parametrize("family, changes", [*table(SHAPES), ("qwen2", YARN % 4.0), ("llama", LLAMA3)])
def test_logits_equal_transformers_both_ways(family, changes, tmp_path):
    """A missing bias, a wrong rotary frequency, a misplaced norm: each moves the logits."""
    ours = random_model(family, **json.loads(changes))
    ours.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (3, 50))
    # Relative to the largest logit; transformers computes its norms in float32.
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 2e-6)):
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        reference.save_pretrained(tmp_path / "theirs")
        with torch.no_grad():
            expected = reference(ids).logits
            assert expected.std() > 0.3  # not a comparison of zeros
            folders = tmp_path, tmp_path / "theirs"
            configs = [read(folder / "config.json") for folder in folders]
            assert configs[0]["architectures"] == configs[1]["architectures"]  # vLLM reads it
            for folder in folders:
                error = Transformer.from_pretrained(folder, dtype)(ids) - expected
                assert error.abs().max() < close * expected.abs().max()


def test_norms_round_as_those_of_transformers_do():
    """In bfloat16 they round before the weight and after it. A norm that rounds once, or that
    computes in bfloat16, makes another policy of the same checkpoint."""
    ours, x = random_model(dtype=torch.bfloat16).model.norm, torch.randn(8, 48).bfloat16()
    theirs = LlamaRMSNorm(48, ours.eps)
    theirs.weight = ours.weight
    assert torch.equal(ours(x), theirs(x))


@mark.parametrize("kind", ["type", "rope_type"])
def test_old_spellings_of_rotary_settings(kind, tmp_path):
    """Checkpoints before transformers 5 write theta and scaling in other places."""
    random_model().save_pretrained(tmp_path)
    config = read(tmp_path / "config.json")
    del config["rope_parameters"]
    config |= {"rope_theta": 700.0, "rope_scaling": {kind: "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = Transformer.from_pretrained(tmp_path).config
    frequencies, _ = rotary(config, 8, torch.device("cpu"))
    assert torch.allclose(frequencies, 700 ** -torch.arange(0, 1, 0.25) / 2)


@mark.parametrize("factor, context", [(4.0, 256), (8.0, 512)])
def test_yarn_lengthens_the_context(factor, context):
    """Qwen2.5's way to 131,072 tokens leaves max_position_embeddings at 32,768."""
    changes = json.loads(YARN % factor)
    assert Transformer(small_config("qwen2", **changes)).context == context


def test_shards_are_read_as_one(tmp_path, monkeypatch):
    """Ours and those of transformers, and no others: a shard that another split left there won over
    the right one, and logits were off by 9."""
    model, (whole, parts, theirs) = random_model(), (tmp_path / name for name in "abc")
    model.save_pretrained(whole)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of Llama 2
    save_file(load_file(whole / "model.safetensors") | old, whole / "model.safetensors")
    monkeypatch.setattr("model.PART_BYTES", 30_000)
    model.save_pretrained(parts)
    AutoModelForCausalLM.from_pretrained(parts).save_pretrained(theirs, max_shard_size="30KB")
    other = {name: x + 1 for name, x in model.state_dict().items()}
    ids = torch.arange(20)[None]
    for folder in (whole, parts, theirs):
        assert (len(list(folder.glob("*.safetensors"))) > 2) == (folder != whole)
        for name in ("model_ema", "model-00001-of-00001", "model-00099-of-00099"):
            save_file(other, folder / f"{name}.safetensors")
        assert torch.equal(Transformer.from_pretrained(folder)(ids), model(ids))


def test_a_head_that_was_trained_apart_is_not_replaced(tmp_path):
    """By the embedding, as config.json says: training would begin from another policy."""
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file)
    Transformer.from_pretrained(tmp_path)
    for head in (embedding + 1, embedding[1:]):
        save_file(tensors | {"lm_head.weight": head.clone()}, file)
        with raises(ValueError, match="two different ones: set tie_word_embeddings to false"):
            Transformer.from_pretrained(tmp_path)


def test_sliding_window_attention_is_refused():
    """A setting that is silently ignored would train on wrong logits."""
    with raises(ValueError, match="sliding"):
        Transformer(small_config("qwen2", use_sliding_window=True))


# --------------------------------------------------------------------------------------- kernels


def no_kernel(*_):
    raise RuntimeError("could not create a primitive descriptor")


def test_without_the_kernel_everything_runs_by_torch(monkeypatch):
    """As on a CPU without AVX-512, in bfloat16, or on ARM."""
    monkeypatch.setattr(packed, "has_kernel", packed.has_kernel.__wrapped__)
    monkeypatch.setattr(packed, "packed_linear", no_kernel)
    assert not packed.has_kernel(torch.float32)
    prompt, (ids, mask) = torch.tensor([1, 2, 3]), pad([[4, 5], [6, 7, 8]])
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model, exact = random_model(dtype=dtype), random_model(dtype=torch.float64)
        with torch.inference_mode(), packed.packed(model, 8):
            error = model(ids) - exact(ids)
        assert error.abs().max() < close * exact(ids).abs().max()
        model.token_logprobs(prompt, ids, mask, 1.0)[0].sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_as_they_are_and_anew_for_every_rollout(dtype):
    """Else a policy would be sampled as it was before its update, or without its biases."""
    if not packed.has_kernel(dtype):
        skip(f"this machine has no packed product in {dtype}")
    model = random_model(dtype=dtype, attention_bias=True, mlp_bias=True)
    ids = torch.randint(0, 97, (8, 5))
    with torch.no_grad():
        with raises(KeyboardInterrupt), packed.packed(model, 8):
            assert "forward" in vars(model.lm_head)
            raise KeyboardInterrupt  # must not leave the packed weights behind
        for p in model.parameters():
            p.mul_(1.1)
        expected = model(ids)
        with packed.packed(model, 8):
            error = model(ids) - expected
    close = 1e-5 if dtype == torch.float32 else 0.05
    assert error.abs().max() < close * expected.abs().max()


# ------------------------------------------------------------------------------------- log-probs


def dense(model, prompt, ids, mask, temperature):
    rows = torch.cat([prompt.expand(len(ids), -1), ids], 1)
    logprobs = (model(rows)[:, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, ids[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    return chosen * mask, entropy * mask


# 0 as in padding; completions of one token; prompts that are longer than the completions, and so
# attention with a mask, and shorter ones.
SEQUENCES = """
[1, 2, 0] | [[7, 8], [9, 6, 1, 2], [3], [0]]
[1, 2, 3] | [[7, 8, 9, 10, 11], [9, 10], [13, 14, 15, 16]]
[1, 2, 3, 4] | [[7, 8], [9, 10, 11]]
[4] | [[0], [7]]
"""


@mark.parametrize("prompt, completions", table(SEQUENCES))
@mark.parametrize("temperature", [1.0, 0.6])
@mark.parametrize("chunk, rows", [(1, 1), (3, 2), (10**9, 4)])
def test_chunked_log_probs_equal_dense_ones(
    prompt, completions, temperature, chunk, rows, monkeypatch
):
    """Values and gradients: a chunk that is lost or read after the next one lies in its buffer, a
    temperature that is forgotten, a token that sees padding or what comes after it fails."""
    monkeypatch.setattr("model.tokens_per_chunk", lambda *_: chunk)
    monkeypatch.setattr("model.rows_per_chunk", lambda width: rows)
    model = random_model(dtype=torch.float64)
    prompt, (ids, mask) = torch.tensor(json.loads(prompt)), pad(json.loads(completions))
    weight = torch.randn(*ids.shape, dtype=torch.double)
    results = []
    for function in (
        lambda: model.token_logprobs(prompt, ids, mask, temperature),
        lambda: dense(model, prompt, ids, mask, temperature),
    ):
        model.zero_grad()
        logprob, entropy = function()
        (weight * logprob).sum().backward()
        results.append((logprob, entropy, *(p.grad.clone() for p in model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results))
    assert all((v[~mask] == 0).all() for v in results[0][:2])


def test_the_gradient_of_the_head_in_bfloat16_does_not_depend_on_chunks(monkeypatch):
    """A sum in bfloat16 stands still once an addend is below 1/512 of it. There are few chunks."""
    torch.manual_seed(0)
    hidden, weight = (
        torch.rand(2048, 8).bfloat16(),
        (torch.randn(16, 8) / 8).bfloat16().requires_grad_(),
    )
    targets = torch.zeros(2048, dtype=torch.long)
    grads = []
    for size in (64, 2048):
        monkeypatch.setattr("model.tokens_per_chunk", lambda *_, size=size: size)
        ChosenLogprobs.apply(hidden, weight, targets, 1.0)[0].sum().backward()
        grads.append(weight.grad.float())
        weight.grad = None
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[1].norm()


@mark.slow
def test_the_gradient_is_the_same_bits_whatever_threads_do():
    """A sum over completions of one prompt whose order is left to threads: a run could not be
    repeated, nor resumed exactly."""
    torch.set_num_threads(2)
    model = random_model(hidden_size=960, intermediate_size=32, num_hidden_layers=1)
    prompt, (ids, mask) = torch.tensor([5, 6, 7] * 20), pad([[1 + i % 7] * 3 for i in range(40)])

    def gradient():
        model.zero_grad()
        model.token_logprobs(prompt, ids, mask, 1.0)[0].sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    first = gradient()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradient()))


@mark.parametrize("length", [3, 6])
def test_keys_copied_to_every_head_are_those_of_its_group(length, monkeypatch):
    """What a GPU takes where there is a mask: heads that meet the keys of another group."""
    model, results = random_model("qwen3", torch.float64), []
    prompt, (ids, mask) = torch.arange(5, 5 + length), pad([[1, 2, 3, 4], [4, 3, 2]])
    for copied in (lambda *_, **__: False, lambda *_, **__: True):
        monkeypatch.setattr(model_module, "keys_for_every_head", copied)
        logprob = model.token_logprobs(prompt, ids, mask, 1.0)[0]
        grads = torch.autograd.grad(logprob.sum(), list(model.parameters()))
        results.append([logprob, *grads])
    assert all(torch.allclose(*pair, atol=1e-10) for pair in zip(*results))


def test_memory_of_log_probs_stays_far_below_the_logits():
    """(B, T, V) logits at 4,096 tokens and a vocabulary of 49,152 are 805 MB; ours stay under a
    quarter, backward included."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096)
    model = Transformer(small_config(**sizes, **heads, tie_word_embeddings=True))
    ids, prompt = torch.randint(0, 49152, (1, 4095)), torch.tensor([1])
    mask = torch.ones_like(ids, dtype=torch.bool)
    _, most, _ = peak(lambda: model.token_logprobs(prompt, ids, mask, 1.0)[0].sum().backward())
    assert 1e6 < most < 0.25 * 4096 * 49152 * 4


def test_log_softmax_keeps_float64_and_raises_bfloat16():
    assert log_softmax(torch.zeros(2, dtype=torch.bfloat16), 1.0).dtype == torch.float32
    assert log_softmax(torch.zeros(2, dtype=torch.float64), 1.0).dtype == torch.float64


def test_kernels_of_a_gpu_that_are_left_out():
    """cuDNN's attention makes a plan for every shape; sums in bfloat16 lose digits."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_weights_are_aligned_wherever_the_file_puts_them(tmp_path):
    """Products of unaligned weights round differently: a resumed run would not be the same bits."""
    random_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    for length in range(8):  # of the header, in steps of its 8 bytes
        save_file(load_file(path), path, metadata={"format": "pt", "x": "x" * 8 * length})
        weights = Transformer.from_pretrained(tmp_path).parameters()
        assert {p.data_ptr() % 64 for p in weights} == {0}


@mark.parametrize("known", [1, 0])
def test_memory_that_torch_frees_stays_with_the_process_or_nothing_is_changed(known, monkeypatch):
    """Where malloc refuses the first setting, the second alone would make everything slower."""
    calls = []

    def mallopt(*call):
        calls.append(call)
        return known

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert calls == [(-3, 32 << 20), (-1, 2**31 - 1)][: 1 + known]
    monkeypatch.setattr("sys.platform", "darwin")
    keep_freed_memory()
    assert len(calls) == 1 + known


SETTINGS = """
import ctypes, os
library, opened, before = ctypes.CDLL, [], dict(os.environ)
ctypes.CDLL = lambda name, *rest, **more: opened.append(name) or library(name, *rest, **more)
import PROGRAM
assert None not in opened, "the import has opened the C library"
assert os.environ == before, "the import has changed the environment"
try:
    PROGRAM.main(["--help"])
except SystemExit:
    pass
assert None in opened
import torch
large = torch.empty(1 << 26)
pages = "/sys/kernel/mm/transparent_hugepage"
assert " hg" in open("/proc/self/smaps").read() or not os.path.exists(pages)
"""


@mark.skipif(sys.platform != "linux", reason="memory is set up on Linux only")
@mark.parametrize("program", ["train", "eval"])
def test_a_command_sets_memory_up_and_an_import_does_not(program):
    """Whoever imports a function of ours keeps their own settings. A command must call before
    torch makes its first tensor, or large tensors lie in small pages."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    code = SETTINGS.replace("PROGRAM", program)
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_positions_are_exact_in_bfloat16():
    """bfloat16 has no 257: the token there would stand where its neighbour does."""
    model, seen = random_model(dtype=torch.bfloat16), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for position in (256, 257):
        model(torch.tensor([[5]]), torch.tensor([[position]]))
    assert (seen[0] - seen[1]).abs().max() > 0.5


def test_what_a_mask_hides_is_hidden_from_the_largest_score():
    """With -100 in its place large scores see the future."""
    for dtype in (torch.bfloat16, torch.float32):
        mask = additive_mask(torch.tensor([True, False]), dtype)
        assert (torch.tensor([0.0, 1e4]) + mask).softmax(-1).tolist() == [1, 0]
