"""Time transformers on the workload of bench/rollout.py: `generate` in static batches, or `generate_batch`. Runs in a
virtual environment of its own: pip install torch transformers."""

import argparse
import json
import statistics
import time

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)


class Lengths(StoppingCriteria):
    """Row i is done once it has its number of new tokens."""

    def __init__(self, width, wanted):
        self.width, self.wanted = width, wanted

    def __call__(self, ids, scores, **_):
        return ids.shape[1] - self.width >= self.wanted


def static(model, samples, slots):
    for low in range(0, len(samples), slots):
        batch = samples[low : low + slots]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]
        )
        wanted = torch.tensor([n for _, n in batch])
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(wanted.max()),
            pad_token_id=0,
        )
        model.generate(
            ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([Lengths(width, wanted)]),
        )


def continuous(model, samples, slots):
    from transformers.generation import ContinuousBatchingConfig

    longest = max(len(prompt) + n for prompt, n in samples)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=longest,
    )
    batching = ContinuousBatchingConfig(
        block_size=32, num_blocks=slots * (longest // 32 + 2), max_batch_tokens=max(256, slots)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--continuous", action="store_true", help="generate_batch")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    attention = "paged|sdpa" if args.continuous else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=attention
    ).eval()
    model.generation_config.eos_token_id = None  # stop tokens are ignored
    with open(args.workload) as file:
        samples = [(row["prompt"], n) for row in map(json.loads, file) for n in row["new_tokens"]]
    run, seconds = continuous if args.continuous else static, []
    with torch.inference_mode():
        run(model, [(prompt, 16) for prompt, _ in samples[: args.slots]], args.slots)  # warm-up
        for _ in range(args.repeats):
            start = time.perf_counter()
            run(model, samples, args.slots)
            seconds.append(time.perf_counter() - start)
    tokens = sum(n for _, n in samples)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "seconds": round(statistics.median(seconds), 3),
                "tokens_per_second": round(tokens / statistics.median(seconds), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
