"""Time transformers' `generate`, in static batches, on the workload of bench/rollout.py.

It runs in a virtual environment of its own: pip install torch transformers.
"""

import shared
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}


def run(model, samples, slots):
    """Every batch runs until its longest completion is done; what is shorter is not counted."""
    for start in range(0, len(samples), slots):
        prompts, lengths = zip(*samples[start : start + slots])
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(ids, device=model.device)
        settings = GenerationConfig(max_new_tokens=max(lengths), **SAMPLING)
        model.generate(ids, settings, attention_mask=(ids > 0).long())  # no prompt has token 0


@torch.inference_mode()
def main():
    args = shared.parse(__doc__, **shared.MODEL, **shared.WORK, **shared.SAMPLING)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    model.generation_config.eos_token_id = None  # stop tokens are ignored
    samples = []
    for prompt, lengths in shared.workload(args):
        samples += [(prompt, n) for n in lengths]
    run(model, [(prompt, 16) for prompt, _ in samples[: args.slots]], args.slots)  # a warm-up
    seconds = shared.seconds(lambda: run(model, samples, args.slots), args.repeats)
    shared.report(args, sum(n for _, n in samples), seconds)


if __name__ == "__main__":
    main()
