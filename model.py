"""One decoder for Llama, Qwen2 and Qwen3, with one forward for training, prefill and decoding.

Parameters keep their Hugging Face names, so a checkpoint is read and written without a mapping.
What differs between the three families is read from the config: biases, q/k norms, head sizes, rotary scaling.

Shapes: B rows, T tokens, C hidden size, V vocabulary, H heads, K key/value heads, D head size, S cached positions.
"""

import copy
import functools
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # x86 builds of torch have it
CPU = Path("/proc/cpuinfo")
SLOW_BLAS = (
    ONEDNN and CPU.is_file() and "GenuineIntel" not in CPU.read_text()
)  # MKL on others' CPUs, in float32: half the speed
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what checkpoints may hold
LOGITS_PER_CHUNK = (
    1 << 26 if torch.cuda.is_available() else 1 << 22
)  # elements; token_logprobs holds three such tensors in float32


def at_least_float32(x):
    """x in the dtype in which norms and softmaxes are computed: float32, or float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base theta and the scaling of its frequencies (`default`, `linear` or `llama3`)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0  # tokens

    @classmethod
    def of(cls, config):
        """From a transformers config, in the new spelling (`rope_parameters`) or the old (`rope_theta`, `rope_scaling`)."""
        fields = dict(
            getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        )
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rotary scaling {kind!r} is not supported (default, linear and llama3 are)"
            )
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1 is not supported")
        for name in (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ):
            if not 0 < fields.get(name, 1) < math.inf:
                raise ValueError(f"{name} {fields[name]} of the rotary embedding must be above 0")
        return cls(
            theta=fields.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0),
            kind=kind,
            factor=fields.get("factor", 1.0),
            low_freq_factor=fields.get("low_freq_factor", 1.0),
            high_freq_factor=fields.get("high_freq_factor", 1.0),
            original_context=fields.get(
                "original_max_position_embeddings", config.max_position_embeddings
            ),
        )


@functools.lru_cache(maxsize=32)
def inverse_frequencies(rope, head_dim, device):
    """Radians per position of each pair of channels, (D/2,) float32. Llama 3's scaling: arXiv 2407.21783."""
    freq = rope.theta ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    )
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = (
            rope.original_context * freq / (2 * math.pi)
        )  # rotations within the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)  # 0: slow channels, interpolated; 1: fast channels, left alone
        return freq * (blend + (1 - blend) / rope.factor)
    return freq


def check_supported(config):
    """Raise ValueError for what this decoder would silently compute wrong."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported ({', '.join(ARCHITECTURES)} are)"
        )
    for name in (
        "rms_norm_eps",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} {getattr(config, name)} must be above 0")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads {config.num_key_value_heads}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported (silu is)")
    if getattr(config, "use_sliding_window", False):
        raise ValueError("sliding-window attention (use_sliding_window) is not supported")


# ----------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of every layer for independent rows, in pages of which a row holds as many as its tokens need.

    k, v   one tensor per layer, (pages, K, D, page) and (pages, K, page, D): keys lie as their product with a query reads them
    table  (rows, pages of the longest row so far), on the host: which pages a row holds, in order. Page 0 is nobody's: it stands for
           none, and takes what idle rows and the padding of prompts write, which never counts.
    Position p of a row is visible to a query at position q iff p <= q: what a row holds beyond its own length (padding of a
    prefill, an earlier occupant's tokens) is overwritten before it can be seen.
    """

    PAGE = {
        "cpu": 32,
        "cuda": 256,
    }  # positions: small ones waste less, large ones make less work; MIN_ROWS divides them
    SLACK = {
        "cpu": 8,
        "cuda": 2,
    }  # the pool grows by at least 1 / SLACK of itself, up to `limit`; on a GPU seldom, since each time
    WIDER = {
        "cpu": 1,
        "cuda": 4,
    }  # a step must be captured again, as when the table gets wider, by a multiple of this
    NEVER = 1 << 40  # first position of a page that nobody holds
    HIDDEN = -1e30  # score of what may not be seen: finite, since a row may have nothing to see

    def __init__(self, model, rows, longest):
        """longest: tokens that a row may hold"""
        config, kind = model.config, model.device.type
        self.page, self.slack, self.wider = self.PAGE[kind], self.SLACK[kind], self.WIDER[kind]
        self.limit = 1 + rows * -(-longest // self.page)  # pages
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            model.head_dim,
        )
        empty = model.lm_head.weight.new_zeros(1, self.kv_heads, self.head_dim, self.page)
        self.k = [empty.clone() for _ in model.model.layers]
        self.v = [empty.transpose(2, 3).contiguous() for _ in model.model.layers]
        self.table, self.held, self.free = (
            np.zeros((rows, 0), np.int64),
            np.zeros(rows, np.int64),
            [],
        )
        self.device, self.layout, self.changed = model.device, (), True

    # Pages are given and taken on the host; `arrange` tells the device.

    def reserve(self, rows, lengths):
        """Make room for positions below lengths (one per row), keeping what is stored."""
        needed = -(-lengths // self.page)
        more = np.flatnonzero(needed > self.held[rows])
        if not len(more):
            return
        rows, needed = rows[more], needed[more]
        self._grow((needed - self.held[rows]).sum() - len(self.free))
        wider = max(0, -(-(needed.max() - self.table.shape[1]) // self.wider) * self.wider)
        self.table = np.pad(self.table, ((0, 0), (0, wider)))
        for row, n in zip(rows, needed):
            for i in range(self.held[row], n):
                self.table[row, i] = self.free.pop()
            self.held[row] = n
        self.changed = True

    def cut(self, rows, lengths):
        """Take back the pages of these rows that lie beyond lengths."""
        for row, n in zip(rows, -(-lengths // self.page)):
            if n < self.held[row]:
                self.free.extend(self.table[row, n : self.held[row]].tolist())
                self.table[row, n:], self.held[row], self.changed = 0, n, True

    def _grow(self, wanted):
        if wanted > 0:
            pages = len(self.k[0])
            more = max(int(wanted), min(pages // self.slack, self.limit - pages))
            self.free.extend(range(pages, pages + more))
            for tensors in (self.k, self.v):
                for i, old in enumerate(
                    tensors
                ):  # zeros: what is hidden must be finite, 0 * nan would be nan
                    tensors[i] = torch.cat([old, old.new_zeros(more, *old.shape[1:])])

    def copy(self, source, target, lengths):
        """The first lengths[i] positions of row source[i] to row target[i]."""
        source, target = np.array(source), np.array(target)
        self.reserve(target, lengths)
        pages = [
            (self.table[s, :n], self.table[t, :n])
            for s, t, n in zip(source, target, -(-lengths // self.page))
        ]
        source, target = (
            torch.from_numpy(np.concatenate(side)).to(self.device) for side in zip(*pages)
        )
        for tensors in (self.k, self.v):
            for pool in tensors:
                pool[target] = pool[source]

    def keep(self, rows):
        """Keep only these rows, renumbered in this order, and the pages that they hold."""
        self.table, self.held = self.table[rows, : self.held[rows].max()], self.held[rows]
        pages = np.unique(self.table[self.table > 0])
        number = np.zeros(len(self.k[0]), np.int64)
        number[pages] = np.arange(1, len(pages) + 1)
        self.table, self.free, self.changed = number[self.table], [], True
        kept = torch.from_numpy(np.append(0, pages)).to(self.device)
        for tensors in (self.k, self.v):
            for i, pool in enumerate(tensors):
                tensors[i] = pool[kept]

    def arrange(self):
        """Tell the device who holds what, once pages changed hands: the index tensors of `attention`. As long as `layout` is the
        same object, these and the pools lie where they lay (a pool that moves has another number of pages, or of rows), so that
        a step that was captured may be replayed."""
        if not self.changed:
            return
        rows, width = self.table.shape
        owner, start = np.zeros(len(self.k[0]), np.int64), np.full(len(self.k[0]), self.NEVER)
        row, number = np.nonzero(self.table)
        owner[self.table[row, number]], start[self.table[row, number]] = row, number * self.page
        table, owner, start = (
            torch.from_numpy(x).to(self.device, non_blocking=True)
            for x in (self.table, owner, start)
        )
        head = torch.arange(self.heads, device=self.device)
        to_rows = (
            table[:, None] * self.heads + head[:, None]
        ).flatten()  # (rows * H * width,), out of (pages * H)
        to_pages = (
            (owner[:, None] * self.heads + head) * width
            + (start % self.NEVER)[:, None] // self.page
        ).flatten()  # the inverse
        layout = table, owner, start, to_rows, to_pages
        if [x.shape for x in layout] == [x.shape for x in self.layout]:
            for old, new in zip(self.layout, layout):
                old.copy_(new)
        else:
            self.layout = layout
        self.changed = False

    def attention(self, positions, rows):
        """How each layer stores k, v (B, K, T, D) at positions (B, T) of rows (B,), and attends from q (B, H, T, D):
        (layer, q, k, v) -> (B, T, H * D). rows=None: decoding, T = 1, row b is cache row b, idle at position -1."""
        table, owner, start, to_rows, to_pages = self.layout
        B, T = positions.shape
        H, K, D, P = self.heads, self.kv_heads, self.head_dim, self.page
        held = table if rows is None else table[rows, : int(positions.max()) // P + 1]
        page, place = held.gather(1, positions.clamp(min=0) // P) * (positions >= 0), positions % P
        within = torch.arange(P, device=positions.device)

        def put(layer, k, v):
            self.k[layer].permute(0, 3, 1, 2)[page, place] = k.transpose(1, 2)
            self.v[layer].transpose(1, 2)[page, place] = v.transpose(1, 2)

        def prefill(layer, q, k, v):
            put(layer, k, v)
            k = self.k[layer][held].permute(0, 2, 1, 4, 3).reshape(B, K, -1, D)
            return scaled_dot_product(
                q, k, self.v[layer][held].transpose(1, 2).reshape(B, K, -1, D), seen
            )

        def decode(layer, q, k, v):
            # Every page meets the query of its owner, as it lies; softmax is over the pages of a row together. What is read
            # is what is filled, and in long completions that is nearly all that a step costs beyond the weights.
            put(layer, k, v)
            q = q.reshape(B, H * D).index_select(0, owner).view(-1, H // K, D)
            score = torch.baddbmm(hidden, q, self.k[layer].flatten(0, 1), alpha=D**-0.5).view(-1, P)
            weight = score.index_select(0, to_rows).view(B * H, -1).softmax(-1)  # in float32 inside
            out = torch.bmm(
                weight.view(-1, P).index_select(0, to_pages).view(-1, H // K, P),
                self.v[layer].flatten(0, 1),
            )
            out = out.view(-1, H * D)
            out[0] = 0  # nobody's page, which stands for none
            return (
                out.index_select(0, table.flatten()).view(*table.shape, H * D).sum(1, keepdim=True)
            )

        if rows is not None:
            seen = only(
                torch.arange(held.shape[1] * P, device=positions.device)
                <= positions[:, None, :, None],
                self.k[0].dtype,
            )
            return prefill
        unseen = start[:, None] + within > positions[owner]  # (pages, page)
        hidden = torch.zeros(
            unseen.shape, dtype=self.k[0].dtype, device=positions.device
        ).masked_fill_(unseen, self.HIDDEN)
        hidden = hidden[:, None, None].expand(-1, K, 1, P).reshape(-1, 1, P)
        return decode


class PromptCache:
    """The learner's cache: keys and values of prompts, with their gradients, for all completions that follow them.

    First the prompts go through the model (rows=None), right-padded, then completions, row b after prompt rows[b].
    """

    def __init__(self, lengths):
        self.lengths, self.layers = (
            lengths,
            {},
        )  # (prompts,) tokens; layer -> k, v (prompts, K, P, D)

    def attention(self, positions, rows):
        if rows is None:

            def causal(layer, q, k, v):
                self.layers[layer] = k, v
                return scaled_dot_product(q, k, v)

            return causal
        B, T = positions.shape
        P, device = self.layers[0][0].shape[2], positions.device
        # Where prompts have one length, queries that nobody asks in front make it plain causal attention, which needs no mask
        # of B x T x (P + T): a completion of 24,576 tokens could not afford one.
        plain = P <= T and bool((self.lengths[rows] == P).all())
        if not plain:
            prompt = torch.arange(P, device=device) < self.lengths[rows, None, None, None]
            own = torch.ones(T, T, dtype=torch.bool, device=device).tril()
            seen = only(
                torch.cat([prompt.expand(B, 1, T, P), own.expand(B, 1, T, T)], -1),
                self.layers[0][0].dtype,
            )

        def after_prompt(layer, q, k, v):
            k, v = (
                torch.cat([take(old, rows), new], 2) for old, new in zip(self.layers[layer], (k, v))
            )
            if plain:
                return scaled_dot_product(F.pad(q, (0, 0, P, 0)), k, v)[:, P:]
            return scaled_dot_product(q, k, v, seen)

        return after_prompt


def take(x, rows):
    """x[rows], where rows may repeat: kernels whose gradients add up in one order, so that a run can be repeated bit for bit.
    Indexing leaves the order to the threads on a CPU, index_select on a GPU."""
    return x[rows] if x.is_cuda else x.index_select(0, rows)


def only(seen, dtype):
    """What is added to scores: 0 where seen (bool), else minus infinity. Made once for all layers, which would each make, and
    keep for the backward pass, one of its own."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def keys_for_every_head(device, masked):
    """Whether keys and values are copied to every head that shares them, since only the slowest kernel takes fewer: on a GPU
    where there is a mask, on a CPU before torch 2.9."""
    return masked if device == "cuda" else torch.__version__ < (2, 9)


def scaled_dot_product(q, k, v, seen=None):
    """Grouped-query attention: q (B, H, T, D), k and v (B, K, S, D) -> (B, T, H * D).

    seen  (B, 1, T, S), see `only`, or None for causal attention over T = S tokens
    """
    shared = q.shape[1] // k.shape[1]
    if keys_for_every_head(q.device.type, masked=seen is not None):
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    out = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, enable_gqa=shared > 1
    )
    return out.transpose(1, 2).flatten(2)


# ----------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps).type_as(x)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, D): channels i and i + D/2 turn by one angle. cos, sin (B, 1, T, D): cos of the angles,
    twice; minus their sin, then their sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def product(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) -> (..., O) by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """A linear layer and its gradient by oneDNN, in float32, for SLOW_BLAS: on an AMD EPYC twice as fast as the BLAS behind
    F.linear, as exact (4e-7), and the same sums whatever torch's matmul precision is set to."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return (
            product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            product(flat.t(), x.flatten(0, -2).t()),
            flat.sum(0) if ctx.bias else None,
        )


def linear(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) -> (..., O), with a gradient."""
    if SLOW_BLAS and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer that may hold its weight once more, laid out for products with few rows: see Transformer.laid_out.

    packed  None, or that weight, with those of the layers `beside` it that read the same input
    """

    packed, beside = None, ()

    def forward(self, x):
        if self.packed is not None:
            return product(x, *self.packed)
        return linear(x, self.weight, self.bias)

    def pack(self, rows):
        parts = (self, *self.beside)
        weight, bias = torch.cat([p.weight.detach() for p in parts]), None
        if self.bias is not None:
            bias = torch.cat([p.bias.detach() for p in parts])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias


def lays_out(device, dtype):
    """Whether there are kernels for weights that are laid out."""
    return ONEDNN and device == "cpu" and dtype in (torch.float32, torch.bfloat16)


def together(x, first, *others):
    """The outputs of linear layers that read the same input: one product while they are laid out, else one each."""
    if first.packed is None:
        return [linear(x) for linear in (first, *others)]
    return first(x).split([linear.out_features for linear in (first, *others)], -1)


class Attention(nn.Module):
    def __init__(self, config, head_dim, layer):
        super().__init__()
        C, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        bias = getattr(config, "attention_bias", False)
        qkv_bias = (
            True if config.model_type == "qwen2" else bias
        )  # Qwen2 has no switch: biases on q, k, v alone
        self.layer, self.head_dim = layer, head_dim
        self.q_proj = Linear(C, H * head_dim, qkv_bias)
        self.k_proj = Linear(C, K * head_dim, qkv_bias)
        self.v_proj = Linear(C, K * head_dim, qkv_bias)
        self.o_proj = Linear(H * head_dim, C, bias and config.model_type != "qwen2")
        self.q_proj.beside = self.k_proj, self.v_proj  # a tuple, which registers nothing
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        B, T, _ = x.shape
        q, k, v = (
            y.view(B, T, -1, self.head_dim)
            for y in together(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            rotate(q.transpose(1, 2), cos, sin),
            rotate(k.transpose(1, 2), cos, sin),
            v.transpose(1, 2),
        )
        return self.o_proj(attend(self.layer, q, k, v))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, bias = (
            config.hidden_size,
            config.intermediate_size,
            getattr(config, "mlp_bias", False),
        )
        self.gate_proj, self.up_proj = Linear(C, inner, bias), Linear(C, inner, bias)
        self.down_proj = Linear(inner, C, bias)
        self.gate_proj.beside = (self.up_proj,)

    def forward(self, x):
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, head_dim, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, head_dim, layer), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything below the head: token ids to hidden states."""

    def __init__(self, config, head_dim):
        super().__init__()
        self.rope, self.head_dim = Rope.of(config), head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, head_dim, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = (
            False  # activation checkpointing: the backward pass makes a layer's inside again
        )

    def forward(self, ids, positions=None, cache=None, rows=None):
        """ids (B, T) -> hidden states (B, T, C).

        Without a cache: causal attention within each row, positions from 0 (right padding is never seen).
        With one: the tokens are stored at `positions` (B, T) of cache rows `rows` (B,) (None: all, in order) and
        attend to what their row holds up to there (prefill: positions 0..T-1; decoding: one token a row; learning:
        a PromptCache, which says its own rules).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        attend = (
            cache.attention(positions, rows)
            if cache is not None
            else lambda layer, q, k, v: scaled_dot_product(q, k, v)
        )
        x = self.embed_tokens(ids)
        angle = positions[:, None, :, None] * inverse_frequencies(
            self.rope, self.head_dim, ids.device
        )  # (B, 1, T, D/2)
        cos, sin = (
            torch.cat([angle.cos()] * 2, -1).to(x.dtype),
            torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype),
        )
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)


class Transformer(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V); `model.model(ids)` stops at the hidden states, `model.lm_head` goes on."""

    def __init__(self, config):
        super().__init__()
        check_supported(config)
        self.config = config
        self.head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.model = Body(config, self.head_dim)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, positions=None, cache=None, rows=None):
        return self.lm_head(self.model(ids, positions, cache, rows))

    def token_logprobs(self, ids, mask, temperature, logits_per_chunk=LOGITS_PER_CHUNK):
        """Log-prob of each completion token given those before it in its row, and (without gradient) the entropy of that choice.

        ids (B, T), each row a prompt, its completion, and any ids as padding;  mask (B, T) bool, True on completions
        -> logprob, entropy (B, T), nats, 0 outside the mask

        Prompts that rows share, as those of a group do, go through the model once. The logits are made for completion
        tokens alone, chunk by chunk, and again in the backward pass: (B, T, V) never exists.
        """
        starts, lengths = mask.int().argmax(1), mask.sum(1)
        in_prompt = torch.arange(starts.max(), device=ids.device) < starts[:, None]
        keyed = torch.cat([starts[:, None], ids[:, : in_prompt.shape[1]] * in_prompt], 1)
        prompts, rows = keyed.unique(
            dim=0, return_inverse=True
        )  # the length counts: token 0 may be a token
        prompt_lengths, prompts = prompts[:, 0], prompts[:, 1:]
        cache = PromptCache(prompt_lengths)
        last = rows * prompts.shape[1] + starts - 1
        hidden = take(self.model(prompts, cache=cache).flatten(0, 1), last)[
            :, None
        ]  # chooses the first token of each completion
        offset = torch.arange(
            max(2, lengths.max()), device=ids.device
        )  # never only one: shards count on two passes
        inside = offset < lengths[:, None]  # (B, longest completion)
        targets = ids.gather(1, (starts[:, None] + offset).clamp(max=ids.shape[1] - 1))
        more = self.model(targets[:, :-1], starts[:, None] + offset[:-1], cache, rows)
        hidden, targets = torch.cat([hidden, more], 1)[inside], targets[inside]
        size = max(1, logits_per_chunk // self.config.vocab_size)
        values = Chosen.apply(hidden, self.lm_head.weight, targets, temperature, size)
        return tuple(
            torch.zeros(ids.shape, dtype=v.dtype, device=v.device).masked_scatter(mask, v)
            for v in values
        )

    @contextmanager
    def laid_out(self, rows):
        """Within the block, inference with the weights of the moment, laid out by oneDNN for products of about `rows` rows.

        On the AMD CPU of bench/RESULTS.md such products take a third (float32) to a half (bfloat16) of the time; the layout costs as
        much as one step, and the memory of the weights once more. Where there is no such kernel it is a block like any.
        """
        able = lays_out(self.device.type, self.lm_head.weight.dtype)
        linears = [m for m in self.modules() if isinstance(m, Linear)] if able else []
        beside = {id(other) for layer in linears for other in layer.beside}
        try:
            for layer in linears:
                if id(layer) not in beside:
                    layer.pack(rows)
            yield
        finally:
            for layer in linears:
                layer.packed = None

    @property
    def context(self):
        """Longest sequence, prompt and completion together, in tokens."""
        return self.config.max_position_embeddings

    @property
    def device(self):
        return self.lm_head.weight.device

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face folder (config.json, *.safetensors). Raises ValueError naming what does not fit. On the meta device
        it has shapes alone, and config.json is all that is read."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path}: no config.json, so this is not a Hugging Face checkpoint folder"
            )
        try:
            with torch.device("meta"):  # allocate nothing that the file is about to replace
                model = cls(AutoConfig.from_pretrained(path))
        except (
            Exception
        ) as error:  # the many answers of transformers and of arithmetic to a bad config
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        if device == "meta":
            return model.to(dtype)
        tensors = read_tensors(path)
        if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors[
                "model.embed_tokens.weight"
            ]  # whether or not the file repeats it
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        for complaint, names in (
            ("lacks", [f"{n} {wanted[n]}" for n in wanted if n not in found]),
            ("has surplus", [f"{n} {found[n]}" for n in found if n not in wanted]),
            (
                "holds something else than floats in",
                [f"{n} {t.dtype}" for n, t in tensors.items() if t.dtype not in FLOATS],
            ),
            (
                "misshapes",
                [
                    f"{n} {found[n]}, wanted {wanted[n]}"
                    for n in wanted
                    if found.get(n, wanted[n]) != wanted[n]
                ],
            ),
        ):
            if names:
                raise ValueError(
                    f"{path}: the checkpoint {complaint} {len(names)} tensor(s): {'; '.join(names[:5])}"
                )
        tensors = {n: t.to(device, dtype) for n, t in tensors.items()}
        infinite = [n for n, t in tensors.items() if not t.isfinite().all()]
        if infinite:
            raise ValueError(
                f"{path}: the checkpoint holds nan or infinity in {len(infinite)} tensor(s), as {dtype}: {'; '.join(infinite[:5])}"
            )
        model.load_state_dict(tensors, assign=True)
        model.tie()
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors; transformers loads the folder as it is."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.architectures = [ARCHITECTURES[config.model_type]]
        config.dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config.save_pretrained(path)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def read_tensors(path):
    """Every tensor of a checkpoint folder, by name: model.safetensors, or the shards that its index lists."""
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (path / files[0]).is_file():
        try:
            files = sorted(
                {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors shards ({error!r})") from error
    tensors = {}
    for name in files:
        if not (path / name).is_file():
            raise ValueError(f"{path}: {name} is missing (weights are read from safetensors only)")
        try:
            tensors |= load_file(path / name)
        except SafetensorError as error:
            raise ValueError(f"{path / name}: not a readable safetensors file ({error})") from error
    return {
        n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")
    }  # old files store this constant


# -------------------------------------------------------------------------------------------------------- log-probs


def log_softmax(logits, temperature):
    """The policy's distribution over the next token, log-probs in nats: what is sampled from and what is learned."""
    logits = at_least_float32(logits)
    return torch.log_softmax(
        logits if temperature == 1 else logits / temperature, -1
    )  # x / 1 is x, and takes a pass over memory


class Chosen(torch.autograd.Function):
    """Log-probs of chosen tokens out of hidden states and the head, a chunk of `size` tokens at a time, forth and back: the
    logits of all never exist, and one buffer takes the gradient of the head.

    hidden (N, C), weight (V, C), targets (N,) -> logprob (N,) nats; entropy (N,) nats, without a gradient
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.size = temperature, size
        chosen, entropy = [], []
        for h, t in zip(hidden.split(size), targets.split(size)):
            logprobs = log_softmax(linear(h, weight), temperature)
            chosen.append(logprobs.gather(-1, t[:, None])[:, 0])
            entropy.append(-torch.linalg.vecdot(logprobs.exp(), logprobs))
        chosen, entropy = torch.cat(chosen), torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        wide = torch.promote_types(
            weight.dtype, torch.float32
        )  # in bfloat16 a sum of a thousand chunks would stand still
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        addend = None if weight.dtype == wide else torch.empty_like(weight)
        starts = range(0, len(hidden), ctx.size)
        for i, start in enumerate(starts):
            part = slice(start, start + ctx.size)
            h, g = hidden[part], grad[part] / ctx.temperature
            logits_grad = (
                log_softmax(linear(h, weight), ctx.temperature).exp_().mul_(-g[:, None])
            )  # (1[v = chosen] - p_v) g
            logits_grad[torch.arange(len(h), device=h.device), targets[part]] += g
            logits_grad = logits_grad.to(weight.dtype)
            hidden_grad[part] = linear(logits_grad, weight.t())
            if addend is None:
                weight_grad.addmm_(logits_grad.t(), h)
            else:  # eight chunks lose nothing yet, and spare seven passes over a large tensor
                addend.addmm_(
                    logits_grad.t(), h, beta=min(i % 8, 1)
                )  # 0: what it held is forgotten
                if i % 8 == 7 or i == len(starts) - 1:
                    weight_grad += addend
        return hidden_grad, weight_grad, None, None, None


# ---------------------------------------------------------------------------------------------------- micro-batches


def micro_batches(prompts, completions, max_tokens):
    """Indices of sequences (token lists, pairwise), from the longest completion to the shortest, cut so that the padded
    tokens of their completions and of their different prompts stay within max_tokens (or it is one sequence)."""
    batches, known = [], {}  # the different prompts of the last batch, and their lengths
    for i in sorted(range(len(completions)), key=lambda i: -len(completions[i])):
        known[tuple(prompts[i])] = len(prompts[i])
        if (
            not batches
            or (len(batches[-1]) + 1) * len(completions[batches[-1][0]])
            + len(known) * max(known.values())
            > max_tokens
        ):
            batches.append([])
            known = {tuple(prompts[i]): len(prompts[i])}
        batches[-1].append(i)
    return batches


def pad(prompts, completions, device="cpu"):
    """Token lists, pairwise -> ids (B, T), prompt and completion right-padded with 0; mask (B, T), True on completions."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, marks, p, c in zip(ids, mask, prompts, completions):
        row[: len(p) + len(c)] = torch.tensor(p + c)
        marks[len(p) : len(p) + len(c)] = True
    return ids.to(device), mask.to(device)
