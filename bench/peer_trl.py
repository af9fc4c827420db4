"""Time whole updates of TRL's GRPOTrainer, of the size of bench/step.py.

It runs in a virtual environment of its own: pip install torch transformers trl.
"""

import statistics
import tempfile
import time
from itertools import pairwise

import shared
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter())


def reward(completions, **_):
    return [float(shared.reward(None, text)) for text in completions]


def main():
    args = shared.parse(__doc__, **shared.MODEL, **shared.WORK, steps=3)
    completions, clock = args.prompts * args.group, Clock()
    micro_batch = min(8, completions // 4)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps + 1,  # the first is a warm-up
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=completions // micro_batch,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens, "top_k": 0},
            beta=0.0,
            epsilon_high=0.28,
            loss_type="dapo",
            learning_rate=1e-6,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=args.device == "cpu",
            model_init_kwargs={"dtype": args.dtype},
            report_to=[],
            save_strategy="no",
        )
        texts = [f"{i:?<64}" for i in range(args.prompts)]  # 64 tokens of the byte tokenizer
        data = Dataset.from_dict({"prompt": texts})
        GRPOTrainer(args.model, reward, config, data, callbacks=[clock]).train()
    seconds = statistics.median(after - before for before, after in pairwise(clock.times))
    shared.report(args, completions * args.new_tokens, seconds)


if __name__ == "__main__":
    main()
