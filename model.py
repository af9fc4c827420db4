"""One decoder for Llama, Qwen2 and Qwen3, with one forward for training, prefill and decoding.

Parameters keep their Hugging Face names, so a checkpoint is read and written without a mapping.
What differs between the three families is read from the config: biases, q/k norms, head sizes,
rotary scaling.

Shapes: B rows, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size,
S positions that attention sees.
"""

import json
import math
from contextlib import contextmanager
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

from files import explained
from policy import packed

FAMILIES = ("llama", "qwen2", "qwen3")  # model types of transformers
PART_BYTES = 1 << 30  # of a file of a checkpoint: as much is copied to the CPU at a time
# Logits that the learner makes at once. Every chunk reads and writes the whole gradient of the
# head, which takes as long as the products of 40 to 300 tokens. So it has at least 512 tokens.
LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}
LEAST_TOKENS = 512
# Numbers that a thread of a CPU works on at once: what it makes of them stays in its cache.
NUMBERS_IN_CACHE = 1 << 19


def at_least_float32(x):
    """x in the dtype of norms and softmaxes: float32, or float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- config

POSITIVE = (  # sizes and constants of a config
    "rms_norm_eps hidden_size num_attention_heads num_key_value_heads vocab_size "
    "max_position_embeddings"
)
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
            f"model type {config.model_type!r} is not supported ({', '.join(FAMILIES)} are)"
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
    for name in POSITIVE.split():
        value = getattr(config, name)
        wrong[f"{name} {value} must be above 0"] = not 0 < value < math.inf
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


def keys_for_every_head(device, masked):
    """Whether keys and values are copied to every head that shares them.

    On a GPU only the slowest kernel takes a mask without such copies.
    """
    return masked and device == "cuda"


def scaled_dot_product(q, k, v, mask=None):
    """Grouped-query attention: q (B, H, T, D), k and v (B, K, S, D) -> (B, T, H * D).

    mask  (B, 1, T, S), see `additive_mask`, or None for causal attention over T = S tokens
    """
    causal = mask is None
    if keys_for_every_head(q.device.type, masked=not causal):
        copies = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    shared = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2).flatten(2)


def gather_rows(x, rows):
    """x[rows], where rows may repeat, with a gradient that is the same bits every time.

    Indexing adds gradients up in the order of threads on a CPU; index_select does so on a GPU.
    """
    return x[rows] if x.is_cuda else x.index_select(0, rows)


def causal_attention(layer, q, k, v):
    """Within each row. Padding on the right is never seen."""
    return scaled_dot_product(q, k, v)


class PromptCache:
    """The learner's cache: keys and values of prompts, with gradients, for all their completions.

    The right-padded prompts go through the model first, by `attend_in_prompts`.
    """

    def __init__(self):
        self.layers = {}  # layer -> k, v (prompts, K, P, D) of prompts padded to P tokens

    def attend_in_prompts(self, layer, q, k, v):
        self.layers[layer] = k, v
        return scaled_dot_product(q, k, v)

    def attention(self, rows, lengths, width):
        """-> attend, for rows of `width` tokens: row b goes on from prompt rows[b], which has
        lengths[b] tokens."""
        mask = self.mask(lengths, width)

        def attend(layer, q, k, v):
            prompt_k, prompt_v = self.layers[layer]
            k = torch.cat([gather_rows(prompt_k, rows), k], 2)
            v = torch.cat([gather_rows(prompt_v, rows), v], 2)
            if mask is not None:
                return scaled_dot_product(q, k, v, mask)
            padding = prompt_k.shape[2]
            return scaled_dot_product(F.pad(q, (0, 0, padding, 0)), k, v)[:, padding:]

        return attend

    def mask(self, lengths, width):
        """What `width` tokens see that follow prompts of these lengths; None: attention is causal.

        Where all prompts have one length, padding the query at the front turns this into plain
        causal attention, which needs no mask of B x T x (P + T) numbers: a completion of 24,576
        tokens could not afford one.
        """
        keys = self.layers[0][0]
        padded = keys.shape[2]
        if padded <= width and (lengths == padded).all():
            return None
        key = torch.arange(padded + width, device=lengths.device)
        query = key[padded:, None]
        in_prompt = key < lengths[:, None, None, None]
        return additive_mask(in_prompt | ((key >= padded) & (key <= query)), keys.dtype)


# ---------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    joined = ()  # further layers that read the same input: see `project`
    packed = None  # packed weight and bias of all these layers, within Transformer.laid_out
    scale = None  # of the factors lora_A (r, I) and lora_B (O, r), where policy/lora.py adds them

    def forward(self, x):
        return self.add_factors(x, self.product(x))

    def product(self, x):
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return packed.packed_linear(x, *self.packed)

    def add_factors(self, x, out):
        """out + scale B A x. Float32 factors are rounded to the dtype of x, as masters are."""
        if self.scale is None:
            return out
        low_rank = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        factor = self.lora_B.to(x.dtype).t()
        return torch.addmm(out.flatten(0, -2), low_rank, factor, alpha=self.scale).view(out.shape)

    def pack(self, rows):
        layers, bias = (self, *self.joined), None
        if self.bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
        self.packed = packed.pack(torch.cat([layer.weight for layer in layers]), rows), bias


def project(x, first, *joined):
    """The outputs of layers that read the same input: one product while they are packed."""
    layers = first, *joined
    if first.packed is None:
        return [layer(x) for layer in layers]
    outputs = first.product(x).split([layer.out_features for layer in layers], -1)
    return [layer.add_factors(x, out) for layer, out in zip(layers, outputs)]


class Embedding(nn.Embedding):
    def forward(self, ids):
        return EmbeddedTokens.apply(ids, self.weight)


class EmbeddedTokens(torch.autograd.Function):
    """weight[ids]. A gradient that is added to a Learner's sum has a row for each different id,
    where torch's has one for each token of the vocabulary."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        ids, weight = ctx.saved_tensors
        options = {"padding_idx": -1, "scale_grad_by_freq": False}
        dense = partial(torch.ops.aten.embedding_dense_backward, **options)
        if not hasattr(weight, "master"):  # set by policy/learner.py, see gradient_to_add_to
            return None, dense(grad, ids, len(weight))
        different, rows = ids.unique(return_inverse=True)
        rows_grad = dense(grad.float(), rows, len(different))
        gradient_to_add_to(weight).index_add_(0, different, rows_grad)
        return None, None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        normalized = F.rms_norm(at_least_float32(x), self.normalized_shape, eps=self.eps)
        return self.weight * normalized.type_as(x)


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
        self.q_proj = Linear(hidden, query_size, qkv_bias)
        self.k_proj = Linear(hidden, key_size, qkv_bias)
        self.v_proj = Linear(hidden, key_size, qkv_bias)
        self.o_proj = Linear(query_size, hidden, bias)
        self.q_proj.joined = self.k_proj, self.v_proj
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(head_dim, config.rms_norm_eps)
        self.k_norm = norm(head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        projections = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v.transpose(1, 2)))


class GatedUnit(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again: of the tensors of a layer only
    those of an MLP are wide, so each that is kept counts."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for g, u, part in row_chunks(gate, up, out):
            torch.mul(F.silu(g), u, out=part)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
        for d, g, u, dg, du in row_chunks(grad, gate, up, gate_grad, up_grad):
            torch.ops.aten.silu_backward(d * u, g, grad_input=dg)
            torch.mul(d, F.silu(g), out=du)
        return gate_grad, up_grad


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)
        self.gate_proj.joined = (self.up_proj,)

    def forward(self, x):
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(GatedUnit.apply(gate, up))


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
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
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
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, *inputs):
        """See Body.forward."""
        return self.lm_head(self.model(*inputs))

    def token_logprobs(self, ids, mask, temperature):
        """Log-prob of each completion token given those before it in its row, and its entropy.

        ids   (B, T)  each row is a prompt, its completion, and any ids as padding
        mask  (B, T)  bool, True on completions
        -> logprob, entropy (B, T) nats, 0 outside the mask; no gradient through the entropy

        A prompt that rows share, as those of a group do, goes through the model once. Logits are
        made for completion tokens alone, chunk by chunk, and again in the backward pass:
        (B, T, V) never exists.
        """
        starts, lengths = mask.int().argmax(1), mask.sum(1)
        in_prompt = torch.arange(starts.max(), device=ids.device) < starts[:, None]
        # The length is compared too: token 0 may stand in a prompt.
        keyed = torch.cat([starts[:, None], ids[:, : in_prompt.shape[1]] * in_prompt], 1)
        keyed, rows = keyed.unique(dim=0, return_inverse=True)
        prompts, cache = keyed[:, 1:], PromptCache()
        prompt_hidden = self.model(prompts, attend=cache.attend_in_prompts).flatten(0, 1)
        # The last token of a prompt predicts the first one of each of its completions.
        last = gather_rows(prompt_hidden, rows * prompts.shape[1] + starts - 1)[:, None]
        # At least 2, so that the model is called twice in every case: FSDP counts on it.
        offset = torch.arange(max(2, lengths.max()), device=ids.device)
        positions = starts[:, None] + offset[:-1]  # of all but the last token
        tokens = ids.gather(1, positions.clamp(max=ids.shape[1] - 1))
        more = self.model(tokens, positions, cache.attention(rows, starts, len(offset) - 1))
        hidden = torch.cat([last, more], 1)[offset < lengths[:, None]]  # in the order of ids[mask]
        values = ChosenLogprobs.apply(hidden, self.lm_head.weight, ids[mask], temperature)
        empty = values[0].new_zeros(ids.shape)
        return tuple(empty.masked_scatter(mask, value) for value in values)

    @contextmanager
    def laid_out(self, rows):
        """Within the block, inference uses the weights of this moment, packed for about `rows` rows
        (see policy/packed.py).

        Packing costs as much as one decoding step, and the memory of the weights once more. Where
        packed.packs says no, the block changes nothing.
        """
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        try:
            if packed.packs(self.device.type, self.lm_head.weight.dtype):
                joined = {layer for first in linears for layer in first.joined}
                for layer in set(linears) - joined:
                    layer.pack(rows)
            yield
        finally:
            for layer in linears:
                layer.packed = None

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
    narrow = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)
    head, same = head.to(narrow), embedding.to(narrow)
    alike = head.shape == same.shape and head.allclose(same, rtol=0, atol=0, equal_nan=True)
    if head.numel() and not alike:  # an empty one is a placeholder
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
    """x (..., V) -> its rows, and those of the others, part by part (rows, V or what they have):
    what is made of a part stays in the cache of a CPU."""
    rows = x.view(-1, x.shape[-1])
    size = len(rows) if x.is_cuda else rows_per_chunk(x.shape[-1])
    return zip(*(y.view(len(rows), -1).split(size) for y in (rows, *others)))


def add_wider(total, part):
    """total += part, in the dtype of the total. torch would first copy all of the part to it."""
    for sums, numbers in row_chunks(total, part):
        sums += numbers


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
        # In bfloat16 a sum over a thousand chunks would stop growing. Eight chunks lose nothing
        # yet, so that only every eighth passes over the large sum in float32.
        learned = ctx.needs_input_grad[1]
        weight_grad = gradient_to_add_to(weight) if learned else None
        narrow = learned and weight.dtype != weight_grad.dtype
        partial_sum = torch.zeros_like(weight) if narrow else weight_grad
        grad = grad / ctx.temperature
        for i, (at, logits, target) in enumerate(chunks_of_logits(hidden, weight, targets)):
            for part, ids, g in row_chunks(logits, target, grad[at]):
                # (1[v = chosen] - p_v) g
                logits_grad = log_softmax(part, ctx.temperature).exp_().mul_(-g)
                part.copy_(logits_grad.scatter_add_(-1, ids, g))
            hidden_grad[at] = logits @ weight
            if learned:
                partial_sum.addmm_(logits.t(), hidden[at])
            if narrow and i % 8 == 7:
                add_wider(weight_grad, partial_sum)
                partial_sum.zero_()
        if narrow:
            add_wider(weight_grad, partial_sum)
        return hidden_grad, None if hasattr(weight, "master") else weight_grad, None, None


def gradient_to_add_to(weight):
    """Zeros in float32 (or wider), or the sum that a Learner keeps: no copy of it is made, none is
    rounded. weight.master is a Learner's float32 (or wider) copy of a narrow weight."""
    if not hasattr(weight, "master"):
        return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    if weight.master.grad is None:
        weight.master.grad = torch.zeros_like(weight.master)
    return weight.master.grad


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


# --------------------------------------------------------------------------------- micro-batches


def micro_batches(prompts, completions, max_tokens, one_prompt=False):
    """Indices of sequences (token lists, pairwise), cut so that the padded tokens of a batch stay
    within max_tokens, or it is one sequence.

    Padding counts for the completions of a batch, and for its different prompts, once each. Of two
    orders the one with fewer batches is taken, or else with less padding: from the longest
    completion to the shortest, or prompt by prompt, where no batch has two.  one_prompt: the second
    one in any case
    """
    by_length = sorted(range(len(completions)), key=lambda i: -len(completions[i]))
    by_prompt = sorted(by_length, key=lambda i: prompts[i])
    ways = [cut_in_order(prompts, completions, by_prompt, max_tokens, most_prompts=1)]
    if not one_prompt:
        ways.append(cut_in_order(prompts, completions, by_length, max_tokens, len(prompts)))
    _, batches = min(ways, key=lambda way: (len(way[1]), way[0]))
    return batches


def cut_in_order(prompts, completions, order, max_tokens, most_prompts):
    """As above, in one order of the indices: the first of a batch must be its longest completion.

    most_prompts  different ones in a batch  -> padded tokens of all batches, batches
    """
    batches, sizes, different = [], [], set()  # different: the prompts of the last batch
    for i in order:
        prompt = tuple(prompts[i])
        if batches:
            different.add(prompt)
            longest = len(completions[batches[-1][0]])
            size = (len(batches[-1]) + 1) * longest + len(different) * max(map(len, different))
            if size <= max_tokens and len(different) <= most_prompts:
                batches[-1].append(i)
                sizes[-1] = size
                continue
        batches.append([i])
        sizes.append(len(completions[i]) + len(prompt))
        different = {prompt}
    return sum(sizes), batches


def pad(prompts, completions, device="cpu"):
    """Token lists, pairwise -> ids (B, T), mask (B, T).

    A row of ids is a prompt and its completion, right-padded with 0. The mask is True on the
    completion.
    """
    ids, mask = [], []
    for prompt, completion in zip(prompts, completions):
        ids.append(torch.tensor(prompt + completion))
        mask.append(torch.arange(len(ids[-1])) >= len(prompt))
    return tuple(pad_sequence(rows, batch_first=True).to(device) for rows in (ids, mask))
