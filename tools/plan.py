"""What a run will hold in memory, said before it begins:  python train.py --plan [flags of the run]

For N processes that one does not have at hand: WORLD_SIZE=N python train.py --plan [--fsdp] ...
Everything is counted in bytes, for one process, with every completion as long as it may be. (Many short ones behind a long
prompt, whose keys each of them copies while learning, may take more.) Setting up, sampling and learning come one after the
other: what one needs is gone before the next begins.
"""

from infra import kernels
from model import Linear, keys_for_every_head
from rollout import KVCache, MIN_ROWS, PREFILL_TOKENS


def up_to(n, unit):
    return -(-n // unit) * unit


def layer_bytes(config, head_dim, size, wide):
    """-> bytes that the backward pass of one layer wants to find, per token that goes through the model; and per key that
    its attention sees. size, wide: bytes of a number in the model's dtype, and in its norms."""
    C, I, H, K = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )  # noqa: E741
    norms = (
        2 * C * wide + 4 * C * size
    )  # of two: the input, what was divided by its root mean square, the output
    if config.model_type == "qwen3":
        norms += (H + K) * head_dim * (wide + size)
    attention = 2 * H * head_dim * size + H * wide  # queries, output, log-sum-exp
    return (
        norms + attention + 4 * I * size,
        2 * K * head_dim * size,
    )  # gate, its SiLU, up, their product; keys and values


def total(part):
    return sum(part.values())


def micro_batch(cfg, model, prompts, together, prompt, length):
    """-> {what: bytes} of the learner for `together` completions of `length` tokens, of so many prompts of `prompt` tokens."""
    config, size, layers, V = (
        model.config,
        model.lm_head.weight.element_size(),
        len(model.model.layers),
        model.config.vocab_size,
    )
    wide = max(size, 4)
    per_token, per_key = layer_bytes(config, model.head_dim, size, wide)
    tokens, keys = together * length + prompts * prompt, together * (prompt + length)
    masked = prompts > 1 or prompt > length  # see PromptCache
    expanded = (
        config.num_attention_heads // config.num_key_value_heads
        if keys_for_every_head(cfg.device, masked)
        else 1
    )
    one_layer = tokens * per_token + keys * per_key * expanded
    chunk = min(cfg.logits_per_chunk, together * length * V)
    ends = {
        "logits": chunk
        * 3
        * wide,  # log-probs, and two of what leads to them, to the entropy or back
        "gradient of the head": V * config.hidden_size * (wide + size * (size < 4)),
    }
    states = 4 * tokens * config.hidden_size * wide  # between the last layer and the head
    if cfg.recompute:  # first the logits, then one layer after the other
        kept = layers * tokens * config.hidden_size * size + prompts * prompt * layers * per_key
        again = {"activations of one layer, again": one_layer}
        if config.tie_word_embeddings:  # the head's gradient waits for that of the embedding
            again |= {"gradient of the head": V * config.hidden_size * wide}
        ends = max(ends, again, key=total)
    else:
        kept = layers * one_layer
    learn = {"activations": kept + states, "attention mask": masked * length * keys * size} | ends
    if cfg.fsdp:
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        root = (
            sum(p.numel() for p in model.parameters()) - layers * block
        )  # embedding and head, which stay
        learn["gathered layers"] = (root + 2 * block) * size + max(root, block) * (
            size + wide
        )  # the latter: a gradient on its way
    return learn


def plan(cfg, levels, model, prompt, held_out=0, processes=1):
    """-> {"always": {what: bytes}, "setting up": ..., "sampling": ..., "learning": ...} for one of `processes`.

    model     of the right shape and dtype; it may be on the meta device
    prompt    tokens of the longest prompt
    held_out  problems of an evaluation, each sampled once
    """
    config, size = model.config, model.lm_head.weight.element_size()
    wide, layers, V = max(size, 4), len(model.model.layers), config.vocab_size
    parameters = sum(p.numel() for p in model.parameters())
    shards, copied = processes if cfg.fsdp else 1, size < 4 or cfg.fsdp
    always = {
        "weights": parameters * size * (2 if cfg.kl_coef else 1),  # the reference's too
        "master weights": parameters * wide // shards * copied,
        "moments": 2 * parameters * wide // shards,
    }
    gradients = {"gradients": parameters * wide // shards}
    if copied and not cfg.fsdp:
        always |= gradients  # they stay
    linears = sum(
        p.numel() for m in model.modules() if isinstance(m, Linear) for p in m.parameters()
    )
    sampling, learning = {}, {} if copied and not cfg.fsdp else gradients
    if kernels.packs(cfg.device, model.lm_head.weight.dtype):
        sampling["weights laid out"] = linears * size

    _, per_key = layer_bytes(config, model.head_dim, size, wide)
    phases = []
    for level in levels:
        length = min(level.max_new_tokens, model.context - prompt)
        draw = up_to(level.prompts, processes) // processes  # prompts of a draw
        rows = max(
            MIN_ROWS,
            min(cfg.slots, max(draw * level.group_size, up_to(held_out, processes) // processes)),
        )
        page = KVCache.PAGE[cfg.device]
        pages = rows * (up_to(prompt + length, page) // page)
        prefilled = min(max(PREFILL_TOKENS, prompt), (min(rows, held_out) or draw) * prompt)
        step = {"logits": rows * V * (size + 4 * wide)}
        prefill = {
            "activations of prompts": prefilled
            * (2 * config.hidden_size + 3 * config.intermediate_size)
            * size
        }
        sample = (
            sampling | {"KV cache": pages * page * layers * per_key} | max(step, prefill, key=total)
        )
        groups = -(-level.buffer_groups // cfg.minibatches)  # of a step
        batch = -(
            -groups * level.group_size // processes
        )  # completions of a step, for one process: one part of them, as they lie
        if processes > 1:
            groups = min(groups, (batch - 1) // level.group_size + 2)
        candidates = []
        for prompts in range(
            1, groups + 1
        ):  # that meet in a micro-batch, since it holds completions of one length, not of one group
            together = min(
                batch,
                prompts * level.group_size,
                max(1, (cfg.micro_batch_tokens - prompts * prompt) // length),
            )
            if together >= prompts:
                candidates.append(
                    learning | micro_batch(cfg, model, prompts, together, prompt, length)
                )
        phases.append((sample, max(candidates, key=total)))
    before = {"whole copy, before it is cut": parameters * wide} if cfg.fsdp else {}
    return {
        "always": always,
        "setting up": before,
        "sampling": max((s for s, _ in phases), key=total),
        "learning": max((x for _, x in phases), key=total),
    }


def table(parts):
    """The plan for a terminal, and its peak."""
    lines = []
    sums = {phase: total(part) for phase, part in parts.items()}
    for phase, part in parts.items():
        if not part:
            continue
        lines.append(f"{phase:38}{sums[phase] / 1e9:10.3f} GB")
        lines += [f"    {what:34}{n / 1e9:10.3f}" for what, n in part.items() if n]
    peak = sums.pop("always") + max(sums.values())
    return "\n".join(
        [
            *lines,
            f"{'at its peak, one process':38}{peak / 1e9:10.3f} GB, and what Python and its libraries take",
        ]
    )
