"""Time the sampler on a workload, beside the two ceilings of the machine.

    python bench/rollout.py --model DIR --workload FILE --slots 32 --dtype float32
    python bench/rollout.py --make-model 11m DIR          a random model of that size
    python bench/rollout.py --make-workload FILE --prompts 12 --group 8 --max-new 192 [--uniform]

Stop tokens are ignored: a completion has exactly the length that the workload names. --kernels adds
the share of the time in kernels. The last line is JSON.
"""

import functools
import json
from unittest.mock import patch

import common
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from model import Transformer
from rollout import Slots, sample, stream

VIEWS = (  # operations that compute nothing
    "view as_strided slice select transpose permute expand unsqueeze narrow split split_with_sizes "
    "reshape flatten unflatten to t alias empty empty_like empty_strided detach detach_ lift_fresh "
    "result_type item unbind resize_ resolve_conj resolve_neg"
)


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


def decode_cost(model, slots, positions):
    """FLOPs and bytes of one token, in a step of `slots` rows that hold `positions` tokens each.

    A step reads the weights once (the embedding is the head), and the keys and values of all rows.
    """
    weights = sum(p.numel() for p in model.parameters())
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    read = weights * model.lm_head.weight.itemsize / slots + positions * token_bytes(model)
    return 2 * weights + 4 * heads * model.head_dim * positions, read


def kernel_share(work):
    """The share of the time of work() in operations that compute, on a CPU. The rest is Python and
    dispatch."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        seconds = common.seconds(work)
    kernels = 0
    for event in profiled.key_averages():
        name = event.key.partition("::")[2].lstrip("_")
        if name and name not in VIEWS.split():
            kernels += event.self_cpu_time_total / 1e6
    return kernels / seconds


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
    result |= common.peak_memory(args)  # before the ceilings are measured
    flops, bandwidth = common.ceilings(args)
    filled, live, slots, cache = np.array(Watched.steps).T
    needed, read = decode_cost(model, args.slots, filled.sum() / live.sum())
    fullest = cache.argmax()
    result["slot_occupancy"] = live[slots > 0].sum() / max(1, slots.sum())
    result["fraction_of_roofline"] = tokens / seconds * max(needed / flops, read / bandwidth)
    result["cache_over_filled"] = cache[fullest] / filled[fullest] / token_bytes(model)
    result |= {"gflops": flops / 1e9, "gbytes_per_second": bandwidth / 1e9}
    if args.kernels:
        result["kernel_share"] = kernel_share(work)
    return result


def main():
    workload = {"prompts": 12, "group": 8, "max_new": 192, "uniform": False}
    flags = {"make_model": [], "make_workload": "", "workload": "", "kernels": False}
    flags |= {"slots": 32, "repeats": 3}
    args = common.parse(__doc__, **common.MODEL, **workload, **flags)
    if args.make_model:
        common.make_model(*args.make_model)
    if args.make_workload:
        shape = args.prompts, args.group, args.max_new, args.uniform
        common.make_workload(args.make_workload, *shape)
    if args.model:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
