"""Time transformers on the workload of bench/rollout.py: `generate` in static batches, or its
continuous batching (--continuous: `generate_batch`).

It runs in a virtual environment of its own: pip install torch transformers.
"""

import functools
import json

import common
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}


def static(model, samples, slots):
    """Every batch runs until its longest completion is done; what is shorter is not counted."""
    for start in range(0, len(samples), slots):
        prompts, lengths = zip(*samples[start : start + slots])
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(ids, device=model.device)
        settings = GenerationConfig(max_new_tokens=max(lengths), **SAMPLING)
        model.generate(ids, settings, attention_mask=(ids > 0).long())  # no prompt has token 0


def continuous(model, samples, slots):
    longest = max(len(prompt) + n for prompt, n in samples)
    settings = GenerationConfig(max_new_tokens=longest, eos_token_id=-1, **SAMPLING)
    blocks = slots * (longest // 32 + 2)
    batching = ContinuousBatchingConfig(
        block_size=32, num_blocks=blocks, max_batch_tokens=max(256, slots)
    )
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching
    ) as manager:
        for prompt, n in samples:
            manager.add_request(input_ids=prompt, max_new_tokens=n)
        left = len(samples)
        while left:
            result = manager.get_result(timeout=120)
            if result is None:
                raise RuntimeError("generate_batch gave no answer for two minutes")
            left -= result.is_finished()


@torch.inference_mode()
def main():
    args = common.parse(__doc__, **common.MODEL, workload="", continuous=False, slots=32, repeats=1)
    attention = "paged|sdpa" if args.continuous else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=attention
    )
    model.to(args.device).generation_config.eos_token_id = None  # stop tokens are ignored
    samples = []
    for prompt, lengths in common.read_workload(args.workload):
        samples += [(prompt, n) for n in lengths]
    run = functools.partial(continuous if args.continuous else static, model)
    run([(prompt, 16) for prompt, _ in samples[: args.slots]], args.slots)  # a warm-up
    seconds = common.seconds(lambda: run(samples, args.slots), args.repeats)
    tokens = sum(n for _, n in samples)
    result = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    print(json.dumps(result | common.peak_memory(args)))


if __name__ == "__main__":
    main()
