"""Time whole updates of TRL's GRPOTrainer, of the size of bench/step.py. Runs in a virtual environment of its own:
pip install torch transformers trl."""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_train_begin(self, *_, **__):
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=8, help="completions per backward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    completions = args.prompts * args.group
    texts = [
        f"{37 * i} plus {91 * i} is ".ljust(64, "?") for i in range(args.prompts)
    ]  # about 64 tokens of a byte tokenizer
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=args.model,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps + 1,
                per_device_train_batch_size=args.micro_batch,
                gradient_accumulation_steps=completions // args.micro_batch,
                num_generations=args.group,
                max_completion_length=args.new_tokens,
                generation_kwargs={"min_new_tokens": args.new_tokens, "top_k": 0},
                temperature=1.0,
                beta=0.0,
                epsilon=0.2,
                epsilon_high=0.28,
                loss_type="dapo",
                learning_rate=1e-6,
                bf16=False,
                fp16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                model_init_kwargs={"dtype": args.dtype},
                report_to=[],
                logging_steps=1000,
                save_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts * (args.steps + 1)}),
            reward_funcs=lambda completions, **_: [
                float(sum(map(ord, text)) % 7 < 3) for text in completions
            ],
            callbacks=[clock],
        )
        trainer.train()
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:])]
    print(
        json.dumps(
            {
                "seconds_per_step": round(statistics.median(steps), 3),
                "tokens_per_step": completions * args.new_tokens,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
