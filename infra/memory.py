"""The memory that a run will need, before it begins:  python train.py --plan [flags of the run]

By the same arithmetic `settle` chooses --slots and --micro-batch-tokens where they are not given,
and refuses a run that cannot fit.

For N processes on another machine: WORLD_SIZE=N python train.py --plan [--fsdp] ...
All numbers are bytes of one process, with completions as long and micro-batches as full as they may
be. Sampling and learning take turns: the memory of one is free before the other begins.
(Learning may need more where keys are copied: to every completion of a long prompt, and on a GPU,
under a mask, to every head.)
"""

import math
import os
import re
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from tqdm import tqdm

from model import rows_per_chunk, tokens_per_chunk
from parts import kernels
from parts.inputs import fitting, load_policy, read_data
from rollout import MIN_ROWS, ROOM, round_up

SLOTS = range(256, 0, -MIN_ROWS)  # of which the first that fits is chosen
# Of a micro-batch that `settle` chooses; the CPU's was measured
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}
SHARE = 0.9  # of the free memory that a run may plan with: the allocator's own share is the rest
# What sampling or learning takes, by what the plan says of it. On a CPU free memory lies between
# blocks in use: 2.2 was measured, see docs/memory.md.
TAKEN = {"cpu": 2, "cuda": 1}


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
    mlp = 3 * config.intermediate_size * size  # gate, up, the product of SiLU and up
    return norms + attention + mlp, 2 * kv_heads * model.head_dim * size


def softmax_bytes(device, rows, vocabulary, wide):
    """Of what is made of (rows, V) logits, on the way to log-probs, entropy, gradient or choice."""
    if device == "cpu":
        rows = min(rows, rows_per_chunk(vocabulary))
    return 3 * wide * rows * vocabulary


def learning_bytes(cfg, level, model, prompt, size, wide):
    """While a full micro-batch is learned: completions of one length, of one prompt or several.
    -> {what: bytes}"""
    config, num_layers = model.config, len(model.model.layers)
    vocabulary, hidden = config.vocab_size, config.hidden_size
    per_token, per_key = layer_bytes(model, size, wide)
    length = min(level.max_new_tokens, model.context - prompt)
    tokens = max(cfg.micro_batch_tokens or MOST_TOKENS[cfg.device], prompt + length)
    if cfg.device == "cuda":  # where a micro-batch has one prompt
        tokens = min(tokens, prompt + level.group_size * length)
    completions = (tokens - prompt) // length
    keys = completions * (prompt + length)
    masked = prompt > length or (completions > 1 and cfg.device == "cpu")  # see model.PromptCache
    head = model.lm_head.weight.requires_grad * vocabulary * hidden
    summed = size < 4 and not cfg.sharded and not cfg.offload  # see model.gradient_to_add_to
    layer = tokens * per_token + keys * per_key
    rows = min(tokens, tokens_per_chunk(vocabulary, cfg.device))
    logits = rows * vocabulary * size + softmax_bytes(cfg.device, rows, vocabulary, wide)
    return {
        # With recomputation the input of each layer is kept, and one layer computed again.
        "activations": num_layers * (tokens * hidden * size if cfg.recompute else layer),
        "logits, or a layer again": max(logits, layer * bool(cfg.recompute)),
        "between last layer and head": 4 * tokens * hidden * wide,
        "attention mask": masked * length * keys * size,
        "gradient of the head": head * (wide * (not summed) + size * (size < 4)),
    }


def sampling_bytes(device, model, rows, length):
    """While so many completions are decoded, up to `length` tokens with their prompts. -> {what:
    bytes}"""
    layers, weight = model.model.layers, model.lm_head.weight
    wide, vocabulary, rows = max(weight.itemsize, 4), model.config.vocab_size, max(MIN_ROWS, rows)
    _, per_key = layer_bytes(model, weight.itemsize, wide)
    room = round_up(min(length, model.context), ROOM)
    parts = {
        "KV cache": rows * room * len(layers) * per_key,
        # Those of two steps, and what is made of them. Running prompts is not counted: it mostly
        # takes less (docs/memory.md).
        "logits": rows * vocabulary * 2 * weight.itemsize
        + softmax_bytes(device, rows, vocabulary, wide),
    }
    if kernels.packs(device, weight.dtype):
        parts["weights laid out"] = nbytes(layers, model.lm_head)
    return parts


def plan(cfg, levels, model, prompt, held_out=0, processes=1):
    """What one process holds -> {"always": {what: bytes}, "sampling": ..., "learning": ...}

    levels    all; what is not trained takes part as a limit of evaluation alone
    model     of the right shape and dtype; it may be on the meta device
    prompt    tokens of the longest prompt
    held_out  problems of an evaluation, each sampled --eval-samples times
    """
    layers = model.model.layers
    size = model.lm_head.weight.itemsize  # bytes of a weight or activation
    wide = max(size, 4)  # of a master, norm or log-prob: float32 at least
    longest = cfg.eval_max_new_tokens or max(level.max_new_tokens for level in levels)
    levels = [level for level in levels if level.trains] or levels
    longest = max([level.max_new_tokens for level in levels] + [longest] * bool(held_out))
    drawn = max(ceil(x.prompts / processes) * x.group_size for x in levels)
    rows = min(cfg.slots or SLOTS[0], max(drawn, ceil(held_out / processes) * cfg.eval_samples))
    sampling = sampling_bytes(cfg.device, model, rows, prompt + longest)
    by_level = [learning_bytes(cfg, level, model, prompt, size, wide) for level in levels]
    learning = max(by_level, key=total)
    if cfg.sharded:  # embedding, head and two layers, and the gradients of as many
        gathered = nbytes(model) - nbytes(layers[2:])
        learning["gathered layers"] = gathered * (2 + wide // size)
    here, _ = held_bytes(cfg, model, processes)
    return {"always": here, "sampling": sampling, "learning": learning | gradients(here)}


def held_bytes(cfg, model, processes):
    """What one process always holds, {what: bytes}: on its device; with --offload, on the host."""
    learned = [p for p in model.parameters() if p.requires_grad]
    shard = sum(p.numel() for p in learned) * max(learned[0].itemsize, 4)
    if cfg.sharded:
        shard //= processes
    # The starting policy's too. With LoRA they are the same.
    here = {"weights": nbytes(model) * (2 if cfg.kl_coef and not cfg.lora_rank else 1)}
    if cfg.offload:
        return here, {"master weights": shard, "moments": 2 * shard, "gradients": shard}
    here["master weights"] = shard * (learned[0].itemsize < 4 or cfg.sharded)
    return here | {"moments": 2 * shard}, {}


def gradients(here):
    """{what: bytes} on the device while it learns; with --offload the host holds them."""
    return {"gradients": here.get("moments", 0) // 2}


# ------------------------------------------------------------------------------------- what fits


MEMINFO, MY_GROUPS, GROUPS = map(Path, ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"))


def free_bytes(device):
    """What this process may still take: of its GPU, or its share of what Linux calls available, in
    a container or a job of a cluster at most what its limit leaves. Infinity where the system does
    not say (macOS)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return math.inf
    free = int(re.search(r"MemAvailable:\s+(\d+)", MEMINFO.read_text())[1]) * 1024
    free = max(0, min([free, *left_by_limits()]))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def left_by_limits():
    """-> yields bytes that each control group of this process leaves: its own, those above it"""
    for line in MY_GROUPS.read_text().splitlines() if MY_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, most, used = GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):  # version 1
            root, most, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not (folder / most).exists() or not (folder / most).read_text().strip().isdecimal():
                continue  # it is outside, or has no limit
            # Pages of files that were read Linux takes back where memory is short. Version 1 says
            # first how many are the group's own, and last how many with those of groups below it.
            files = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())[-1]
            yield int((folder / most).read_text()) - int((folder / used).read_text()) + int(files)


def helps(cfg):
    """Flags that are not set yet, and with which less is held."""
    flags = [] if cfg.lora_rank else ["--lora-rank 16"]
    if cfg.device == "cuda" and not cfg.offload and not cfg.sharded:
        flags.append("--offload")
    if cfg.device == "cuda" and not cfg.offload and not cfg.fsdp and not cfg.lora_rank:
        flags.append("--fsdp over several processes")
    return flags


def must_hold(cfg, model, ranks):
    """Raise ValueError if a process cannot even hold what every step takes. The model may be on the
    meta device: this is known before weights are loaded, and moments come with the first step."""
    here, on_host = held_bytes(cfg, model, ranks.size)
    must_fit("of its device", here | gradients(here), ranks.device, cfg.dtype, helps(cfg))
    must_fit("of the host", on_host, torch.device("cpu"), cfg.dtype, helps(cfg))


def must_fit(where, parts, device, dtype, flags=()):
    """flags  each of which leaves little to hold but the weights"""
    free, weights = free_bytes(device), parts.get("weights", 0)
    if total(parts) <= free:
        return
    if weights > free or not flags:  # only smaller weights help
        half = 2 * weights // getattr(torch, dtype).itemsize  # in bfloat16
        flags = (
            [" ".join([*flags[:1], "--dtype bfloat16"])] if half <= min(free, weights - 1) else ()
        )
    listed = ", ".join(f"{what} {n / 1e9:.1f}" for what, n in parts.items() if n)
    raise ValueError(
        f"this process needs at least {total(parts) / 1e9:.1f} GB {where} ({listed}), and "
        f"{free / 1e9:.1f} GB are free: less is needed with "
        f"{' or '.join([*flags, 'a smaller --model'])}"
    )


def most_that_fits(flag, sizes, needed, free, flags=()):
    """The first of some falling sizes with which so much is free.

    needed  size -> bytes;  flags  that help;  raises ValueError if the last does not fit either
    """
    for size in sizes:
        if needed(size) <= SHARE * free:
            return size
    words = " or ".join(["a lower --max-new-tokens", *flags])
    raise ValueError(
        f"{flag} {size} would take {needed(size) / 1e9:.1f} GB with completions as long as they "
        f"may be, and of the {free / 1e9:.1f} GB that are free {SHARE * free / 1e9:.1f} may be "
        f"planned with: less is needed with {words}. If most completions are shorter, give {flag}"
    )


def settle(cfg, levels, model, prompt, held_out, processes, free):
    """Choose --slots and --micro-batch-tokens, where they are not given, by the free memory.

    free  bytes that a process may take for all of the run;  the others: see `plan`
    -> Config.  Raises ValueError if the run cannot fit
    """

    def needed(phase, **flags):
        parts = plan(replace(cfg, **flags), levels, model, prompt, held_out, processes)
        return total(parts["always"]) + TAKEN[cfg.device] * total(parts[phase])

    flags = helps(cfg)
    if cfg.slots is None:
        slots = most_that_fits("--slots", SLOTS, lambda n: needed("sampling", slots=n), free, flags)
        cfg = replace(cfg, slots=slots)
    if cfg.micro_batch_tokens is None:
        sizes = [MOST_TOKENS[cfg.device] >> halvings for halvings in range(8)]
        tokens = most_that_fits(
            "--micro-batch-tokens",
            sizes,
            lambda n: needed("learning", micro_batch_tokens=n),
            free,
            flags if cfg.recompute else ["--recompute", *flags],
        )
        cfg = replace(cfg, micro_batch_tokens=tokens)
    return cfg


def settle_on_all(cfg, states, held_out, policy, ranks):
    """`settle` for a run whose weights are loaded, the same on all processes.

    states  [LevelState, ...];  held_out  see parts/inputs.py, cut_held_out
    """
    prompts = [prompt for _, part, _ in held_out for prompt in part]
    held_out = len(prompts) if cfg.eval_every != 0 else 0
    prompts += [prompt for state in states for prompt in state.order.prompts]
    longest = max((len(p.tokens) for p in prompts if policy.room(p)), default=0)
    free = min(ranks.gather(free_bytes(ranks.device))) + nbytes(policy.model)
    levels = [state.level for state in states]
    shape = levels, policy.model, longest, held_out, ranks.size
    cfg = settle(cfg, *shape, free)
    tqdm.write(
        f"memory: by the plan {peak(plan(cfg, *shape)) / 1e9:.2f} GB of {free / 1e9:.2f} GB with "
        f"--slots {cfg.slots} --micro-batch-tokens {cfg.micro_batch_tokens}; --plan says for what"
    )
    return cfg


# ------------------------------------------------------------------------------------- the table


def peak(parts):
    always, *phases = map(total, parts.values())
    return always + max(phases)


def table(parts):
    """The plan for a terminal, and its peak."""
    lines = []
    for phase, part in parts.items():
        lines.append(f"{phase:38}{total(part) / 1e9:10.3f} GB")
        lines += [f"    {what:34}{n / 1e9:10.3f}" for what, n in part.items() if n]
    most = f"{peak(parts) / 1e9:10.3f} GB, and what Python and its libraries take"
    return "\n".join([*lines, f"{'at its peak, one process':38}{most}"])


def memory_table(cfg):
    """The table of --plan: only the data, the tokenizer and the model's config are read."""
    levels, train_set, held_out, _ = read_data(cfg)
    held_out = sum(held_out.values(), []) if cfg.eval_every != 0 else []
    policy = load_policy(cfg, cfg.model, "meta")
    longest = max(len(p.tokens) for p in fitting(policy, train_set + held_out))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lines = table(plan(cfg, levels, policy.model, longest, len(held_out), processes))
    on_host = total(held_bytes(cfg, policy.model, processes)[1])
    return lines + f"\n{'in the memory of the host':38}{on_host / 1e9:10.3f} GB" * bool(on_host)
