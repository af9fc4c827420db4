"""Time the sampler on a workload.

    python bench/rollout.py --model DIR --workload FILE --slots 32 --dtype float32
    python bench/rollout.py --make-model 11m DIR          a random model of that size
    python bench/rollout.py --make-workload FILE --prompts 12 --group 8 --max-new 192 [--uniform]

Stop tokens are ignored: a completion has exactly the length that the workload names. The last line
is JSON.
"""

import json

import common
import torch

from model import Transformer
from policy.packed import packed
from rollout import sample, stream_key


def measure(args):
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), args.device)
    prompts, lengths = zip(*common.read_workload(args.workload))
    keys = [[stream_key(0, i, k) for k in range(len(many))] for i, many in enumerate(lengths)]
    options = {"slots": args.slots, "stop_ids": (), "temperature": 1.0}

    def work():
        with packed(model, args.slots):
            return sample(model, prompts, keys, lengths, **options)

    done = work()  # a warm-up
    tokens = sum(map(sum, lengths))
    assert tokens == sum(len(c.tokens) for group in done for c in group)
    seconds = common.seconds(work, args.repeats)
    result = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return result | common.peak_memory(args)


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
