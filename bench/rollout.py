"""Time the sampler on a workload, against the machine's roofline.

    python bench/rollout.py --model DIR --workload FILE --slots 32 --dtype float32
    python bench/rollout.py --make-model 11m DIR          a random model of that size
    python bench/rollout.py --make-workload FILE --prompts 12 --group 8 --max-new 192 [--uniform]

Stop tokens are ignored: every completion has exactly the length that the workload names. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import (
    SIZES,
    ceilings,
    decode_cost,
    make_model,
    make_workload,
    peak_rss_mb,
    read_workload,
)

from model import Transformer
from rollout import Request, Slots, sample, stream


class Watch:
    """Counts, while in use, the slots that decode, and the bytes of the KV cache."""

    def __enter__(self):
        self.live = self.slots = self.positions = self.rows = self.cache_bytes = (
            self.filled_bytes
        ) = 0
        self.decode = Slots.decode
        watch = self

        def decode(slots):
            live = len(slots.live)
            if slots.waiting:
                watch.live, watch.slots = watch.live + live, watch.slots + slots.slots
            filled = slots.prompt_length + slots.count
            watch.positions, watch.rows = (
                watch.positions + filled[slots.live].sum(),
                watch.rows + live,
            )
            watch.decode(slots)
            held = sum(t.numel() * t.element_size() for t in (*slots.cache.k, *slots.cache.v))
            if held > watch.cache_bytes:
                cache = slots.cache
                watch.cache_bytes = held
                watch.filled_bytes = (
                    2
                    * len(cache.k)
                    * cache.kv_heads
                    * cache.head_dim
                    * cache.k[0].element_size()
                    * filled[slots.live].sum()
                )

        Slots.decode = decode
        return self

    def __exit__(self, *_):
        Slots.decode = self.decode


NO_KERNELS = set(
    ["view", "as_strided", "slice", "select", "transpose", "permute", "expand", "unsqueeze", "narrow", "split", "split_with_sizes", "reshape", "flatten", "unflatten", "to", "t", "alias", "empty", "empty_like", "empty_strided", "detach", "detach_", "lift_fresh", "result_type", "item", "unbind", "resize_", "resolve_conj", "resolve_neg"]
)


def kernel_share(model, work, slots, steps=30):
    """Self time of the operations that compute (no views, no allocation) over the time of a decoding step, both as
    torch.profiler sees them; the rest is Python and dispatch."""
    with torch.inference_mode(), model.laid_out(slots):
        decoding = Slots(model, work, slots)
        decoding.refill()
        for _ in range(steps):
            decoding.advance(1.0, 0, 1.0)
            decoding.decode()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            for _ in range(steps):
                decoding.advance(1.0, 0, 1.0)
                decoding.decode()
            wall = time.perf_counter() - start
    kernels = [
        e
        for e in profile.key_averages()
        if "::" in e.key and e.key.split("::")[1].lstrip("_") not in NO_KERNELS
    ]
    return sum(e.self_cpu_time_total for e in kernels) / 1e6 / wall


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--make-model", nargs=2, metavar=("SIZE", "DIR"), help=f"one of {', '.join(SIZES)}"
    )
    parser.add_argument("--make-workload", metavar="FILE")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new", type=int, default=192)
    parser.add_argument(
        "--uniform", action="store_true", help="every completion has --max-new tokens"
    )
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--workload", metavar="FILE")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of float32 products",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="profile the decoding step: the share of the time in kernels (CPU)",
    )
    args = parser.parse_args()
    if args.make_model:
        return make_model(*args.make_model)
    if args.make_workload:
        rows = make_workload(args.prompts, args.group, args.max_new, args.uniform)
        return Path(args.make_workload).write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.set_float32_matmul_precision(args.precision)
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), args.device)
    work = [
        Request(
            r["prompt"], [stream(0, i, k) for k in range(len(r["new_tokens"]))], r["new_tokens"]
        )
        for i, r in enumerate(read_workload(args.workload))
    ]
    with Watch() as watch:
        done = sample(
            model, work, slots=args.slots, stop_ids=(), temperature=1.0
        )  # warm-up, counted but not timed
    tokens = sum(len(c.tokens) for cs in done for c in cs)
    assert [[len(c.tokens) for c in cs] for cs in done] == [list(r.max_new_tokens) for r in work]
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        sample(model, work, slots=args.slots, stop_ids=(), temperature=1.0)
        seconds.append(time.perf_counter() - start)
    memory = peak_rss_mb()  # before the ceilings are measured
    gpu = {}
    if args.device != "cpu":
        gpu = {
            "device": torch.cuda.get_device_name(),
            "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20),
        }
    flops, bandwidth = ceilings(getattr(torch, args.dtype), args.device)
    cost, read = decode_cost(model, args.slots, watch.positions / watch.rows)
    speed = tokens / statistics.median(seconds)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "seconds": round(statistics.median(seconds), 3),
                "tokens_per_second": round(speed, 1),
                "slot_occupancy": round(watch.live / max(1, watch.slots), 4),
                "fraction_of_roofline": round(speed * max(cost / flops, read / bandwidth), 4),
                "peak_rss_mb": memory,
                "cache_over_filled": round(float(watch.cache_bytes / watch.filled_bytes), 3),
                "gflops": round(flops / 1e9),
                "gbytes_per_second": round(bandwidth / 1e9, 1),
                **gpu,
                **(
                    {"kernel_share": round(kernel_share(model, work, args.slots), 3)}
                    if args.kernels
                    else {}
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
