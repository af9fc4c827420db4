"""How many completions are decoded at once: memory and speed only, no result.

A row of the KV cache is what a slot takes. So many slots are used as fit half of the free memory:
the other half is for logits and what is computed on the way. Where a GPU is full all the same, the
work is done again with half the size, and the run goes on with that.
"""

import os
import re
from pathlib import Path

import torch
from tqdm import tqdm

from rollout import MIN_ROWS, ROOM, round_up

MOST_SLOTS = 256  # by default
UNKNOWN_SLOTS = 64  # where the system does not tell what is free (macOS)
MEMINFO = Path("/proc/meminfo")  # of Linux


def free_bytes(device):
    """What this process may still take: of its GPU, or its share of what Linux calls available.
    None: unknown"""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if not MEMINFO.exists():
        return None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", MEMINFO.read_text())[1])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def row_bytes(model, length):
    """Of a row of the KV cache with `length` tokens, or as many as the context has."""
    config, room = model.config, round_up(max(1, min(length, model.context)), ROOM)
    key = config.num_key_value_heads * model.head_dim * model.lm_head.weight.itemsize
    return 2 * config.num_hidden_layers * key * room


class Fit:
    """The slots of one process: `most_slots` at most."""

    def __init__(self, flags, model):
        """flags  with slots"""
        self.model, self.given, self.most_slots = model, flags.slots, flags.slots or MOST_SLOTS

    @property
    def free(self):
        return free_bytes(self.model.device)

    def slots(self, length):
        """For prompts and completions of `length` tokens together."""
        free = self.free
        if self.given:
            fitting = self.given
        elif free is None:
            fitting = UNKNOWN_SLOTS
        else:
            fitting = free // 2 // row_bytes(self.model, length)
        return max(MIN_ROWS, min(self.most_slots, fitting // MIN_ROWS * MIN_ROWS))

    def use_less_memory(self, slots):
        """A GPU is full with so many: half of them from now on.

        Raises the OutOfMemoryError again if they are the fewest.
        """
        if slots <= MIN_ROWS:
            raise  # what is being handled
        self.most_slots = max(MIN_ROWS, slots // 2)
        tqdm.write(f"out of memory: at most {self.most_slots} slots from now on")
