"""How much is done at once: slots, and tokens of a micro-batch. Memory and speed only, no result.

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
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
LEAST_TOKENS = 256  # of a micro-batch that was halved; one completion may be longer
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
    """The sizes of one process."""

    def __init__(self, flags, model):
        """flags  with slots, device and, to learn, micro_batch_tokens"""
        self.model, self.given, self.most_slots = model, flags.slots, flags.slots or MOST_SLOTS
        self.tokens = getattr(flags, "micro_batch_tokens", None) or MICRO_BATCH_TOKENS[flags.device]

    def slots(self, length):
        """For prompts and completions of `length` tokens together."""
        free = free_bytes(self.model.device)
        if self.given:
            fitting = self.given
        elif free is None:
            fitting = UNKNOWN_SLOTS
        else:
            fitting = free // 2 // row_bytes(self.model, length)
        return max(MIN_ROWS, min(self.most_slots, fitting // MIN_ROWS * MIN_ROWS))

    def sample(self, length, work, undo):
        """work(slots), with fewer slots where memory is full."""
        first = self.slots(length)
        result, slots = halving("--slots", first, MIN_ROWS, work, undo)
        if slots < first:
            self.most_slots = slots
        return result

    def learn(self, work, undo):
        """work(tokens of a micro-batch), with fewer where memory is full."""
        result, self.tokens = halving("--micro-batch-tokens", self.tokens, LEAST_TOKENS, work, undo)
        return result


def halving(flag, size, least, work, undo):
    """-> work(size), size. undo() follows a try that memory did not hold.

    Raises OutOfMemoryError if the least size is too much.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size <= least:
                raise
        undo()
        size = max(least, size // 2)
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory: done again with {flag} {size}")
