"""One decoder for Llama, Qwen2 and Qwen3, with one forward for training, prefill and decoding.

Parameters keep their Hugging Face names, so a checkpoint is read and written without a mapping.
What differs between the three families is read from the config: biases, q/k norms, head sizes,
rotary scaling.

Shapes: B rows, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size,
S positions that attention sees.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.files import explained

FAMILIES = ("llama", "qwen2", "qwen3")  # model types of transformers
PART_BYTES = 1 << 30  # of a file of a checkpoint: as much is copied to the CPU at a time
# Logits that the learner makes at once. Every chunk reads and writes the whole gradient of the
# head, which takes as long as the products of 40 to 300 tokens. So it has at least 512 tokens.
# The gradient of the head is their sum in its own dtype: in bfloat16 a sum over a thousand chunks
# would stop growing, and 37 (of 32,768 tokens, with a vocabulary of 152,000) lose little.
LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
LEAST_TOKENS = 512
# Both act on a GPU alone. cuDNN's attention comes first on an H100 and makes a plan for every new
# shape, which takes up to a second; an update has hundreds of shapes.
torch.backends.cuda.enable_cudnn_sdp(False)
# A product in bfloat16 adds up its parts in float32.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
# Numbers that a thread of a CPU works on at once: what it makes of them stays in its cache.
NUMBERS_IN_CACHE = 1 << 19


def at_least_float32(x):
    """x in the dtype of norms and softmaxes: float32, or float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- config

ROPE = {  # the rotary scalings that we know, and the numbers that each needs
    "default": "rope_theta",
    "linear": "rope_theta factor",
    "llama3": "rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "rope_theta factor original_max_position_embeddings",
}


def check_supported(config):
    """Raise ValueError for what this decoder would silently compute wrong.

    config.rope_parameters also holds what older checkpoints spell in other places.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported ({', '.join(FAMILIES)} are): take "
            "one of SmolLM2, Llama 3, Qwen2.5 (Math, Coder, R1-Distill too), Qwen3"
        )
    rope = config.rope_parameters
    kind, sliding = rope["rope_type"], getattr(config, "use_sliding_window", False)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    wrong = {
        f"hidden_act {config.hidden_act!r} is not supported (silu is)": config.hidden_act != "silu",
        "sliding-window attention (use_sliding_window) is not supported": sliding,
        f"rotary scaling {kind!r} is not supported ({', '.join(ROPE)} are)": kind not in ROPE,
        "partial_rotary_factor other than 1 is not supported": (
            rope.get("partial_rotary_factor", 1) != 1
        ),
        f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}": (
            heads % kv_heads
        ),
    }
    for name in ROPE.get(kind, "").split():
        value = rope.get(name, 0)
        wrong[f"{name} {value} of the rotary embedding must be above 0"] = not 0 < value < math.inf
    for message, found in wrong.items():
        if found:
            raise ValueError(message)


def rotary(config, head_dim, device):
    """-> radians per position of each pair of channels, (D/2,) float32; a factor of cos and sin"""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device)
    exponents = -torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return rope["rope_theta"] ** exponents, 1.0


# ------------------------------------------------------------------------------------- attention


def additive_mask(seen, dtype):
    """What is added to scores: 0 where seen (bool), else -1e30, after which exp gives 0.

    Not infinity: the softmax of an idle slot, which sees nothing, stays finite. Made once for all
    layers. Given booleans, each layer would make and keep a mask of its own.
    """
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -1e30)


def keys_for_every_head(q, masked):
    """Whether keys and values are copied to every head that shares them.

    On a GPU only the slowest kernel, which holds all scores, takes a mask or float32 without.
    """
    return q.is_cuda and (masked or q.itemsize > 2)


def scaled_dot_product(q, k, v, mask=None):
    """Grouped-query attention: q (B, H, T, D), k and v (B, K, S, D) -> (B, T, H * D).

    mask  (B, 1, T, S), see `additive_mask`, or None for causal attention over T = S tokens
    """
    causal, copies = mask is None, q.shape[1] // k.shape[1]
    shared = copies > 1
    if shared and keys_for_every_head(q, masked=not causal):
        k, v, shared = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1), False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2).flatten(2)


def causal_attention(layer, q, k, v):
    """Within each row. Padding on the right is never seen."""
    return scaled_dot_product(q, k, v)


class PromptCache:
    """The learner's cache: keys and values of one prompt, with gradients, for all its completions.

    The prompt goes through the model first, with `attend_in_prompt`.
    """

    def __init__(self):
        self.layers = {}  # layer -> k, v (1, K, P, D)

    def attend_in_prompt(self, layer, q, k, v):
        self.layers[layer] = k, v
        return scaled_dot_product(q, k, v)

    def attend_after_prompt(self, layer, q, k, v):
        """Tokens attend to the prompt, and to those before them.

        Padding the query at the front makes this plain causal attention, which needs no mask of
        T x (P + T) numbers: a completion of 24,576 tokens could not afford one. Where the prompt is
        longer than the completions the padding would cost more than a mask.
        """
        rows, width = len(q), q.shape[2]
        k, v = (
            torch.cat([of_prompt.expand(rows, -1, -1, -1), new], 2)
            for of_prompt, new in zip(self.layers[layer], (k, v))
        )
        padding = k.shape[2] - width
        if padding <= width:
            return scaled_dot_product(F.pad(q, (0, 0, padding, 0)), k, v)[:, padding:]
        seen = torch.ones(width, k.shape[2], dtype=torch.bool, device=k.device).tril(padding)
        return scaled_dot_product(q, k, v, additive_mask(seen[None, None], k.dtype))


# ---------------------------------------------------------------------------------------- layers


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)  # one kernel
        # It computes in float32 too, and rounds before the weight, as transformers does.
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, D): channels i and i + D/2 turn by one angle.

    cos, sin (B, 1, T, D): of minus the angles, then of the angles.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config, head_dim, layer):
        super().__init__()
        self.layer, self.head_dim = layer, head_dim
        hidden, bias = config.hidden_size, getattr(config, "attention_bias", False)
        query_size = config.num_attention_heads * head_dim
        key_size = config.num_key_value_heads * head_dim
        qkv_bias = bias or config.model_type == "qwen2"  # which has no switch for it
        self.q_proj = nn.Linear(hidden, query_size, qkv_bias)
        self.k_proj = nn.Linear(hidden, key_size, qkv_bias)
        self.v_proj = nn.Linear(hidden, key_size, qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden, bias)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(head_dim, config.rms_norm_eps)
        self.k_norm = norm(head_dim, config.rms_norm_eps)

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, attend):
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.project(x))
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v.transpose(1, 2)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(hidden, inner, bias)
        self.up_proj = nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, head_dim, layer):
        super().__init__()
        self.self_attn = Attention(config, head_dim, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything below the head: token ids to hidden states."""

    def __init__(self, config, head_dim):
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self.rotary = {}  # device -> see `rotary`
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, head_dim, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # activation checkpointing: backward computes each layer again

    def forward(self, ids, positions=None, attend=causal_attention):
        """ids (B, T) at positions (B, T), or from 0 -> hidden states (B, T, C).

        attend(layer, q, k, v), with q (B, H, T, D) and k, v (B, K, T, D), returns (B, T, H * D).
        A cache makes such functions. They store k and v, and let each token attend to what its row
        holds up to there.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.embed_tokens(ids)
        if ids.device not in self.rotary:
            self.rotary[ids.device] = rotary(self.config, self.head_dim, ids.device)
        frequencies, factor = self.rotary[ids.device]
        angle = positions[:, None, :, None] * torch.cat([-frequencies, frequencies])
        cos, sin = ((factor * y).to(x.dtype) for y in (angle.cos(), angle.sin()))  # (B, 1, T, D)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            x = layer(x, cos, sin, attend)
        return self.norm(x)


# ----------------------------------------------------------------------------------------- model


class Transformer(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V). Hidden states are those of `model.model(ids)`."""

    def __init__(self, config):
        super().__init__()
        check_supported(config)
        self.config = config
        given = getattr(config, "head_dim", None)  # a config may lack it, or have None
        self.head_dim = given or config.hidden_size // config.num_attention_heads
        self.model = Body(config, self.head_dim)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, *inputs):
        """See Body.forward."""
        return self.lm_head(self.model(*inputs))

    def token_logprobs(self, prompt, completions, mask, temperature):
        """Log-prob of each token of a prompt's completions given those before it, and its entropy.

        prompt       (P,)
        completions  (B, T), padded on the right
        mask         (B, T)  bool, False on padding
        -> logprob, entropy (B, T) nats, 0 on padding; no gradient through the entropy

        The prompt goes through the model once for all rows. Logits are made chunk by chunk, and
        again in the backward pass: (B, T, V) never exists.
        """
        cache, (rows, length) = PromptCache(), completions.shape
        # The last token of the prompt predicts the first one of each completion.
        last = self.model(prompt[None], attend=cache.attend_in_prompt)[:, -1:]
        # At least 1, so that the model is called twice in every case: FSDP counts on it.
        width = max(1, length - 1)  # of all but the last token
        positions = torch.arange(len(prompt), len(prompt) + width, device=prompt.device)[None]
        more = self.model(completions[:, :width], positions, cache.attend_after_prompt)
        hidden = torch.cat([last.expand(rows, -1, -1), more], 1)[:, :length][mask]
        values = ChosenLogprobs.apply(hidden, self.lm_head.weight, completions[mask], temperature)
        empty = values[0].new_zeros(mask.shape)
        return tuple(empty.masked_scatter(mask, value) for value in values)

    @property
    def context(self):
        """Longest sequence, prompt and completion together, in tokens."""
        rope, longest = self.config.rope_parameters, self.config.max_position_embeddings
        if rope["rope_type"] == "yarn":  # Qwen2.5's configs leave the number as it was
            longest = max(longest, int(rope["factor"] * rope["original_max_position_embeddings"]))
        return longest

    @property
    def device(self):
        return self.lm_head.weight.device

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face folder (config.json; model.safetensors, or its shards).

        Raises ValueError that names what does not fit.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path}: no config.json, so this is not a Hugging Face checkpoint folder"
            )
        try:
            with torch.device("meta"):  # allocates nothing that the file will replace
                model = cls(AutoConfig.from_pretrained(path, trust_remote_code=False))
        except Exception as error:  # transformers and arithmetic raise many types for a bad config
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        # As it stands there: transformers gives a Llama whose config names no end token 2.
        named = json.loads((path / "config.json").read_text())
        model.config.eos_token_id = named.get("eos_token_id")
        tensors = read_tensors(path)
        if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            tie_head(path, tensors)
        check_tensors(path, tensors, model.state_dict())
        # Copied even where the dtype is the same: a file's tensors are not aligned, and products
        # of unaligned weights round differently.
        tensors = {n: tensor.to(device, dtype, copy=True) for n, tensor in tensors.items()}
        infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if infinite:
            raise ValueError(
                f"{path}: the checkpoint holds nan or infinity in {len(infinite)} tensor(s), "
                f"as {dtype}: {'; '.join(infinite[:5])}"
            )
        model.load_state_dict(tensors, assign=True)
        model.tie()
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, or several such files and their index, if it is
        large; transformers loads the folder as it is."""
        config = self.config
        config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
        config.dtype = self.lm_head.weight.dtype
        config.save_pretrained(path)
        tensors = self.state_dict()
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_torch_state_dict(tensors, path, max_shard_size=PART_BYTES)


def weight_files(path):
    """model.safetensors, or the shards that its index names; no others are read."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] * whole.exists()
    with explained(f"{index}: not an index of weights"):
        return sorted(
            {path / name for name in json.loads(index.read_text())["weight_map"].values()}
        )


def read_tensors(path):
    """Every tensor of a checkpoint folder, by name."""
    tensors = {}
    for file in weight_files(path):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    if not tensors:
        raise ValueError(
            f"{path}: model.safetensors is missing (weights are read from safetensors only)"
        )
    # Old checkpoints of Llama hold what follows from their config.json.
    return {n: x for n, x in tensors.items() if not n.endswith("rotary_emb.inv_freq")}


def tie_head(path, tensors):
    """The embedding stands for the head too, whether or not the file repeats it."""
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    if not torch.equal(head.to(embedding), embedding):
        raise ValueError(
            f"{path}: config.json ties lm_head to the embedding, and the file holds two different "
            "ones: set tie_word_embeddings to false there"
        )
    tensors["lm_head.weight"] = embedding


def check_tensors(path, found, wanted):
    """Both are tensors by name. Raise ValueError unless they agree in names and shapes, and all
    are floats: quantised weights would load as nonsense."""
    for name, tensor in found.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, and only floats are supported")
    found = {f"{name} {tuple(tensor.shape)}" for name, tensor in found.items()}
    wanted = {f"{name} {tuple(tensor.shape)}" for name, tensor in wanted.items()}
    lacking, surplus = sorted(wanted - found), sorted(found - wanted)
    if lacking or surplus:
        raise ValueError(
            f"{path}: the checkpoint lacks {len(lacking)} tensor(s): {'; '.join(lacking[:5])}; "
            f"has surplus {len(surplus)} tensor(s): {'; '.join(surplus[:5])}"
        )


# ------------------------------------------------------------------------------------- log-probs


def pad(rows, device="cpu"):
    """Token lists -> ids (B, T), padded on the right with 0; mask (B, T), False on padding."""
    rows = [torch.tensor(row, device=device) for row in rows]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def log_softmax(logits, temperature):
    """The distribution over the next token that is sampled from and learned, log-probs in nats."""
    logits = at_least_float32(logits)
    if temperature != 1:  # x / 1 is x, and would take a pass over memory
        logits = logits / temperature
    return torch.log_softmax(logits, -1)


def rows_per_chunk(width):
    """Rows of so many numbers that a CPU works on at once."""
    return max(1, torch.get_num_threads() * NUMBERS_IN_CACHE // width)


def row_chunks(x, *others):
    """x (rows, V) -> its rows, and those of the others, part by part (rows, V or what they have):
    what is made of a part stays in the cache of a CPU."""
    size = len(x) if x.is_cuda else rows_per_chunk(x.shape[-1])
    return zip(*(y.view(len(x), -1).split(size) for y in (x, *others)))


def tokens_per_chunk(vocab_size, device):
    """Tokens whose logits the learner holds at once.  device: "cpu" or "cuda"."""
    return max(LEAST_TOKENS, LOGITS_PER_CHUNK[device] // vocab_size)


class ChosenLogprobs(torch.autograd.Function):
    """Log-probs of chosen tokens from hidden states and the head, chunk by chunk.

    hidden (N, C), weight (V, C), targets (N,) -> logprob, entropy (N,) nats; the entropy has no
    gradient. The logits of all tokens never exist: those of a chunk are made in one buffer, and
    their gradient is written over them. A second buffer takes the gradient of the head, unless it
    is frozen.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        chosen, entropy = [], []
        for _, logits, target in chunks_of_logits(hidden, weight, targets):
            for part, ids in row_chunks(logits, target):
                logprobs = log_softmax(part, temperature)
                chosen.append(logprobs.gather(-1, ids)[:, 0])
                entropy.append(-torch.linalg.vecdot(logprobs.exp(), logprobs))
        chosen, entropy = torch.cat(chosen), torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad / ctx.temperature
        for at, logits, target in chunks_of_logits(hidden, weight, targets):
            for part, ids, g in row_chunks(logits, target, grad[at]):
                # (1[v = chosen] - p_v) g
                logits_grad = log_softmax(part, ctx.temperature).exp_().mul_(-g)
                part.copy_(logits_grad.scatter_add_(-1, ids, g))
            hidden_grad[at] = logits @ weight
            if weight_grad is not None:
                weight_grad.addmm_(logits.t(), hidden[at])
        return hidden_grad, weight_grad, None, None


def chunks_of_logits(hidden, weight, targets):
    """-> yields a slice of the tokens, their logits (n, V), their targets.

    The next logits are written over these.
    """
    size = min(len(hidden), tokens_per_chunk(len(weight), hidden.device.type))
    buffer = hidden.new_empty(size, len(weight))
    for start in range(0, len(hidden), size):
        at = slice(start, min(start + size, len(hidden)))
        logits = torch.mm(hidden[at], weight.t(), out=buffer[: at.stop - start])
        yield at, logits, targets[at]
