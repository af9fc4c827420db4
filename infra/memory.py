"""The memory that a run will need, before it begins:  python train.py --plan [flags of the run]

For N processes on another machine: WORLD_SIZE=N python train.py --plan [--fsdp] ...
All numbers are bytes of one process, with completions as long and micro-batches as full as they may
be. Sampling and learning take turns: the memory of one is free before the other begins.
(Learning may need more where keys are copied: to every completion of a long prompt, and on a GPU,
under a mask, to every head.)
"""

import os
from dataclasses import replace
from math import ceil

from model import rows_in_cache, tokens_per_chunk
from parts import kernels
from parts.inputs import fitting, load_policy, read_data
from rollout import MIN_ROWS, ROOM, round_up


def total(part):
    return sum(part.values())


def nbytes(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def layer_bytes(model, size, wide):
    """What the backward pass of a layer finds: bytes per token, per key that attention reads."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    norms = config.hidden_size * (2 * wide + 4 * size)  # two, each of the input and its quotient
    if config.model_type == "qwen3":  # norms of queries and keys
        norms += (heads + kv_heads) * model.head_dim * (wide + size)
    attention = heads * (2 * model.head_dim * size + wide)  # queries, output, log of the sum
    mlp = 4 * config.intermediate_size * size  # gate, its SiLU, up, their product
    return norms + attention + mlp, 2 * kv_heads * model.head_dim * size


def softmax_bytes(cfg, rows, vocabulary, wide):
    """Of what is made of (rows, V) logits, on the way to log-probs, entropy, gradient or choice."""
    if cfg.device == "cpu":
        rows = min(rows, rows_in_cache(vocabulary))
    return 3 * wide * rows * vocabulary


def micro_batch(cfg, level, model, prompt, size, wide):
    """A full one: completions of one length, of one prompt or several. -> {what: bytes}"""
    config, num_layers = model.config, len(model.model.layers)
    vocabulary, hidden = config.vocab_size, config.hidden_size
    per_token, per_key = layer_bytes(model, size, wide)
    length = min(level.max_new_tokens, model.context - prompt)
    tokens = max(cfg.micro_batch_tokens, prompt + length)
    completions = (tokens - prompt) // length
    keys = completions * (prompt + length)
    masked = completions > 1 or prompt > length  # see model.PromptCache
    head = model.lm_head.weight.requires_grad * vocabulary * hidden
    layer = tokens * per_token + keys * per_key
    rows = min(tokens, tokens_per_chunk(vocabulary))
    logits = rows * vocabulary * size + softmax_bytes(cfg, rows, vocabulary, wide)
    return {
        # With recomputation the input of each layer is kept, and one layer computed again.
        "activations": num_layers * (tokens * hidden * size if cfg.recompute else layer),
        "logits, or a layer again": max(logits, layer * cfg.recompute),
        "between last layer and head": 4 * tokens * hidden * wide,
        "attention mask": masked * length * keys * size,
        "gradient of the head": head * (wide + size * (size < 4)),
    }


def plan(cfg, levels, model, prompt, held_out=0, processes=1):
    """What one process holds -> {"always": {what: bytes}, "sampling": ..., "learning": ...}

    model     of the right shape and dtype; it may be on the meta device
    prompt    tokens of the longest prompt
    held_out  problems of an evaluation, each sampled once
    """
    layers = model.model.layers
    size = model.lm_head.weight.itemsize  # bytes of a weight or activation
    wide = max(size, 4)  # of a master, norm or log-prob: float32 at least
    _, per_key = layer_bytes(model, size, wide)
    level = max(levels, key=lambda level: level.max_new_tokens)
    longest = max(level.max_new_tokens, (cfg.eval_max_new_tokens or 0) if held_out else 0)
    room = round_up(min(prompt + longest, model.context), ROOM)
    drawn = max(ceil(x.prompts / processes) * x.group_size for x in levels)
    rows = max(MIN_ROWS, min(cfg.slots, max(drawn, ceil(held_out / processes))))
    vocabulary = model.config.vocab_size
    sampling = {
        "KV cache": rows * room * len(layers) * per_key,
        # Those of two steps, and what is made of them; running the prompts takes less.
        "logits": rows * vocabulary * 2 * size + softmax_bytes(cfg, rows, vocabulary, wide),
    }
    if kernels.packs(cfg.device, model.lm_head.weight.dtype):
        sampling["weights laid out"] = nbytes(layers, model.lm_head)
    learning = micro_batch(cfg, level, model, prompt, size, wide)
    learned = [p for p in model.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in learned) * max(learned[0].itemsize, 4)
    shard = whole // processes if cfg.sharded else whole
    if cfg.sharded:  # embedding, head and two layers, and the gradients of as many
        gathered = nbytes(model) - nbytes(layers[2:])
        learning["gathered layers"] = gathered * (2 + wide // size)
    learning["gradients"] = shard
    masters = learned[0].itemsize < 4 and not cfg.sharded
    always = {
        # The starting policy's too. With LoRA they are the same.
        "weights": nbytes(model) * (2 if cfg.kl_coef and not cfg.lora_rank else 1),
        "master weights": shard * (masters or cfg.sharded),
        "moments": 2 * shard,
    }
    return {"always": always, "sampling": sampling, "learning": learning}


def table(parts):
    """The plan for a terminal, and its peak."""
    lines = []
    for phase, part in parts.items():
        lines.append(f"{phase:38}{total(part) / 1e9:10.3f} GB")
        lines += [f"    {what:34}{n / 1e9:10.3f}" for what, n in part.items() if n]
    always, *phases = map(total, parts.values())
    peak = f"{(always + max(phases)) / 1e9:10.3f} GB, and what Python and its libraries take"
    return "\n".join([*lines, f"{'at its peak, one process':38}{peak}"])


def memory_table(cfg):
    """The table of --plan: only the data, the tokenizer and the model's config are read."""
    levels, train_set, held_out, _ = read_data(cfg)
    if cfg.eval_every == 0:
        held_out = []
    policy = load_policy(cfg, cfg.model, "meta")
    longest = max(len(p.tokens) for p in fitting(policy, train_set + held_out))
    limit = cfg.eval_max_new_tokens or max(level.max_new_tokens for level in levels)
    cfg = replace(cfg, eval_max_new_tokens=limit)
    levels = [level for level in levels if level.trains] or levels
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return table(plan(cfg, levels, policy.model, longest, len(held_out), processes))
