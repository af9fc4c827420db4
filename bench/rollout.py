"""Time the sampler on a workload.

    python bench/rollout.py --model DIR --workload FILE --slots 32 --dtype float32
    python bench/rollout.py --make-model 11m DIR          a random model of that size
    python bench/rollout.py --make-workload FILE --prompts 12 --group 8 --max-new 192

Stop tokens are ignored: a completion has exactly the length that the workload names. The last line
is JSON.
"""

import common
import torch

from model import Transformer
from policy.checkpoint import find_folder
from policy.packed import packed
from rollout import sample, stream_key


def measure(args):
    folder = find_folder(args.model)
    model = Transformer.from_pretrained(folder, getattr(torch, args.dtype), args.device)
    prompts, lengths = zip(*common.read_workload(args.workload))
    keys = [[stream_key(0, i, k) for k in range(len(many))] for i, many in enumerate(lengths)]
    options = {"slots": args.slots, "stop_ids": (), "temperature": 1.0}

    def work():
        with packed(model, args.slots):
            done = sample(model, prompts, keys, lengths, **options)
            return sum(len(completion.tokens) for _, group in done for completion in group)

    tokens = work()  # a warm-up
    assert tokens == sum(map(sum, lengths))
    common.report(args, tokens, common.seconds(work, args.repeats))


def main():
    make = {"make_model": [], "make_workload": "", "prompts": 12, "group": 8, "max_new": 192}
    args = common.parse(__doc__, **common.MODEL, **make, workload="", slots=32, repeats=3)
    if args.make_model:
        common.make_model(*args.make_model)
    if args.make_workload:
        common.make_workload(args.make_workload, args.prompts, args.group, args.max_new)
    if args.model:
        measure(args)


if __name__ == "__main__":
    main()
