"""Time the sampler on a workload.

    python bench/rollout.py --model DIR --workload FILE --slots 32 --dtype float32
    python bench/rollout.py --make-model 11m DIR          a random model of that size
    python bench/rollout.py --make-workload FILE --prompts 12 --group 8 --max-new 192 [--uniform]

Stop tokens are ignored: a completion has exactly the length that the workload names. The last line
is JSON; in it, slot_occupancy is the share of the slots that decode, while completions wait, and
cache_over_filled the bytes of the cache at its largest by those of the tokens in it.
"""

import functools
import json
from unittest.mock import patch

import common
import numpy as np
import torch

from model import Transformer
from rollout import Slots, sample, stream


class Watched(Slots):
    """Slots that note what they hold after every decoding step."""

    steps = []  # tokens filled, live rows, slots (0: no completion waits), bytes of the KV cache

    def decode(self):
        super().decode()
        slots = self.slots if self.waiting else 0
        size = sum(tensor.nbytes for tensor in self.cache.k + self.cache.v)
        filled = [self.running[slot].filled for slot in self.live]
        self.steps.append((sum(filled), len(filled), slots, size))


def token_bytes(model):
    """Keys and values of one token in all layers."""
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    return 2 * heads * model.head_dim * model.lm_head.weight.itemsize


def measure(args):
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), args.device)
    prompts, lengths = zip(*common.read_workload(args.workload))
    keys = [[stream(0, i, k) for k in range(len(many))] for i, many in enumerate(lengths)]
    options = {"slots": args.slots, "stop_ids": (), "temperature": 1.0}
    work = functools.partial(sample, model, prompts, keys, lengths, **options)
    with patch("rollout.Slots", Watched):
        done = work()  # a warm-up
    tokens = sum(map(sum, lengths))
    assert tokens == sum(len(c.tokens) for group in done for c in group)
    seconds = common.seconds(work, args.repeats)
    result = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    result |= common.peak_memory(args)
    filled, live, slots, cache = np.array(Watched.steps).T
    fullest = cache.argmax()
    result["slot_occupancy"] = live[slots > 0].sum() / max(1, slots.sum())
    result["cache_over_filled"] = cache[fullest] / filled[fullest] / token_bytes(model)
    return result


def main():
    args = common.parse(
        __doc__,
        **common.MODEL,
        make_model=[],
        make_workload="",
        prompts=12,
        group=8,
        max_new=192,
        uniform=False,
        workload="",
        slots=32,
        repeats=3,
    )
    if args.make_model:
        common.make_model(*args.make_model)
    if args.make_workload:
        shape = args.prompts, args.group, args.max_new, args.uniform
        common.make_workload(args.make_workload, *shape)
    if args.model:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
