"""How much memory is free, and how many completions are decoded together in it.

A row of the KV cache is what a slot takes. By default as many slots are used as fit in half of the
free memory: the other half is for logits and for what is computed on the way.
"""

import os
import re
from pathlib import Path

import torch

from rollout import MIN_ROWS, ROOM, round_up

MOST_SLOTS = 256  # by default
UNKNOWN_SLOTS = 64  # where the system does not report what is free (macOS)
MEMINFO = Path("/proc/meminfo")  # of Linux


def free_bytes(device):
    """Return the memory that this process can still allocate, in bytes: free GPU memory, or its
    share of MemAvailable on Linux. Return None if the system does not report it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if not MEMINFO.exists():
        return None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", MEMINFO.read_text())[1])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def row_bytes(model, length):
    """Return the size in bytes of one row of the KV cache that holds `length` tokens (at most the
    model's context)."""
    config, room = model.config, round_up(max(1, min(length, model.context)), ROOM)
    key = config.num_key_value_heads * model.head_dim * model.lm_head.weight.itemsize
    return 2 * config.num_hidden_layers * key * room


def slots_that_fit(model, length):
    """Return the default number of slots for prompts and completions of `length` tokens
    together."""
    free = free_bytes(model.device)
    if free is None:
        return UNKNOWN_SLOTS
    fitting = free // 2 // row_bytes(model, length)
    return max(MIN_ROWS, min(MOST_SLOTS, fitting // MIN_ROWS * MIN_ROWS))
