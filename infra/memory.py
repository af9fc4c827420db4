"""The memory that a run will need, before it begins:  python train.py --plan [flags of the run]

For N processes on another machine: WORLD_SIZE=N python train.py --plan [--fsdp] ...
All numbers are bytes of one process, with completions as long and micro-batches as full as they may
be. Setting up, sampling and learning follow one another: the memory of one phase is free before the
next begins. (Learning may need more where keys are copied: to every completion of a long prompt,
and on a GPU, under a mask, to every head.)
"""

from math import ceil

from parts import kernels
from rollout import MIN_ROWS, ROOM, round_up


def total(part):
    return sum(part.values())


def nbytes(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def widths(model):
    """Bytes of a weight or activation; of a master, norm or log-prob: float32 at least."""
    size = model.lm_head.weight.itemsize
    return size, max(size, 4)


def layer_bytes(model):
    """What the backward pass of a layer finds: bytes per token, per key that attention reads."""
    config, (size, wide) = model.config, widths(model)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    norms = config.hidden_size * (2 * wide + 4 * size)  # two, each of the input and its quotient
    if config.model_type == "qwen3":  # norms of queries and keys
        norms += (heads + kv_heads) * model.head_dim * (wide + size)
    attention = heads * (2 * model.head_dim * size + wide)  # queries, output, log of the sum
    mlp = 4 * config.intermediate_size * size  # gate, its SiLU, up, their product
    return norms + attention + mlp, 2 * kv_heads * model.head_dim * size


def sampling(cfg, model, level, prompt, held_out, processes):
    config, (size, wide) = model.config, widths(model)
    draw, held_out = ceil(level.prompts / processes), ceil(held_out / processes)  # prompts
    rows = max(MIN_ROWS, min(cfg.slots, max(draw * level.group_size, held_out)))
    longest = level.max_new_tokens
    if held_out:
        longest = max(longest, cfg.eval_max_new_tokens or 0)
    room = round_up(min(prompt + longest, model.context), ROOM)
    part = {
        "KV cache": rows * room * config.num_hidden_layers * layer_bytes(model)[1],
        # With what is made of them; running the prompts takes less.
        "logits": rows * config.vocab_size * (size + 4 * wide),
    }
    if kernels.packs(cfg.device, model.lm_head.weight.dtype):
        part["weights laid out"] = nbytes(model.model.layers, model.lm_head)
    return part


def learning(cfg, model, level, prompt):
    """A full micro-batch: completions of one length, of one prompt or several."""
    config, (size, wide) = model.config, widths(model)
    layers, hidden, vocabulary = model.model.layers, config.hidden_size, config.vocab_size
    length = min(level.max_new_tokens, model.context - prompt)
    tokens = max(cfg.micro_batch_tokens, prompt + length)
    rows = (tokens - prompt) // length
    keys = rows * (prompt + length)
    masked = rows > 1 or prompt > length  # see model.PromptCache
    per_token, per_key = layer_bytes(model)
    learned = model.lm_head.weight.requires_grad
    layer = kept = tokens * per_token + keys * per_key
    # Log-probs, and two tensors on the way to them, to the entropy or to the gradient
    largest = {"logits": 3 * wide * min(cfg.logits_per_chunk, tokens * vocabulary)}
    if cfg.recompute:  # only the input of a layer is kept
        kept = tokens * hidden * size
        largest = max(largest, {"activations of one layer, again": layer}, key=total)
    if cfg.sharded:  # embedding, head and two layers, and the gradients of as many
        gathered = nbytes(model) - nbytes(layers[2:])
        largest["gathered layers"] = gathered * (2 + wide // size)
    return largest | {
        "activations": len(layers) * kept,
        "between last layer and head": 4 * tokens * hidden * wide,
        "attention mask": masked * length * keys * size,
        "gradient of the head": learned * vocabulary * hidden * (wide + size * (size < 4)),
    }


def plan(cfg, levels, model, prompt, held_out=0, processes=1):
    """-> {"always": {what: bytes}, "setting up": ..., "sampling": ..., "learning": ...}

    model     of the right shape and dtype; it may be on the meta device
    prompt    tokens of the longest prompt
    held_out  problems of an evaluation, each sampled once
    """
    weights, learned = nbytes(model), [p for p in model.parameters() if p.requires_grad]
    size = learned[0].itemsize
    whole = sum(p.numel() for p in learned) * max(size, 4)
    shard = whole // processes if cfg.sharded else whole
    sampled = (sampling(cfg, model, level, prompt, held_out, processes) for level in levels)
    parts = {
        "always": {
            # The starting policy's too. With LoRA they are the same.
            "weights": weights * (2 if cfg.kl_coef and not cfg.lora_rank else 1),
            "master weights": shard * (size < 4 or cfg.sharded),
            "moments": 2 * shard,
        },
        "setting up": {"whole copy, before it is cut": whole * cfg.sharded},
        "sampling": max(sampled, key=total),
        "learning": max((learning(cfg, model, level, prompt) for level in levels), key=total),
    }
    masters = size < 4 and not cfg.sharded  # their gradients stay between updates
    parts["always" if masters else "learning"]["gradients"] = shard
    return parts


def table(parts):
    """The plan for a terminal, and its peak."""
    lines = []
    for phase, part in parts.items():
        lines.append(f"{phase:38}{total(part) / 1e9:10.3f} GB")
        lines += [f"    {what:34}{n / 1e9:10.3f}" for what, n in part.items() if n]
    always, *phases = map(total, parts.values())
    peak = f"{(always + max(phases)) / 1e9:10.3f} GB, and what Python and its libraries take"
    return "\n".join([*lines, f"{'at its peak, one process':38}{peak}"])
