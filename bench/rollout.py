"""Time the sampler: --prompts x --group completions, of lengths as bench/shared.py draws them.

    python bench/rollout.py --model DIR --prompts 12 --group 8 --new-tokens 192 --slots 32

Stop tokens are ignored. The last line is JSON.
"""

import shared
import torch

from model import Transformer
from policy.checkpoint import find_folder
from policy.packed import packed
from rollout import sample, stream_key
from run.processes import keep_freed_memory


def main():
    keep_freed_memory()
    args = shared.parse(__doc__, **shared.MODEL, **shared.WORK, **shared.SAMPLING)
    folder = find_folder(args.model)
    model = Transformer.from_pretrained(folder, getattr(torch, args.dtype), args.device)
    prompts, lengths = zip(*shared.workload(args))
    keys = [[stream_key(0, i, k) for k in range(len(many))] for i, many in enumerate(lengths)]
    options = {"slots": args.slots, "stop_ids": (), "temperature": 1.0}

    def work():
        with packed(model, args.slots):
            done = sample(model, prompts, keys, lengths, **options)
            return sum(len(completion.tokens) for _, group in done for completion in group)

    tokens = work()  # a warm-up
    assert tokens == sum(map(sum, lengths))
    shared.report(args, tokens, shared.seconds(work, args.repeats))


if __name__ == "__main__":
    main()
