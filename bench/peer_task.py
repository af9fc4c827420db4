"""Train the default task with TRL's GRPOTrainer, and print when level 2 is as good as it should be.

    pip install -r requirements.txt trl            in a virtual environment of its own
    python bench/peer_task.py --target 64 --limit 1200 --seed 0

The shipped model, problems, prompts, grader and sizes of an update: 16 prompts x 16 completions and
two optimizer steps; level 1 for 20 updates, then level 2. TRL has no dynamic sampling and no length
reward of this kind. Evaluations are those of `python train.py --eval-every 5`, and not counted.
"""

import json
import random
import tempfile
import time

import common
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import data
from eprli import QUALITY
from parts.policy import MAX_NEW_TOKENS, SHIPPED, TINY, Policy, Sampling, attempt, requests
from rewards import RIGHT, Grader

PROMPTS, GROUP, STEPS = 16, 16, 2  # of an update: prompts, completions of each, optimizer steps


class Clock(TrainerCallback):
    """Seconds of training, and level 2's accuracy every five updates; stops at the target."""

    def __init__(self, args, prompts):
        self.args, self.policy, self.grader = args, Policy.load(str(TINY)), Grader()
        self.work = requests(args.seed, prompts, 1)
        self.seconds, self.start = 0.0, time.perf_counter()

    def on_step_end(self, _, state, control, model=None, **__):
        if state.global_step % (5 * STEPS):
            return
        self.seconds += time.perf_counter() - self.start
        self.policy.model.load_state_dict(model.state_dict())
        done = attempt(self.policy, self.grader, self.work, Sampling(MAX_NEW_TOKENS, 1.0, 256))
        accuracy = 100 * sum(a.right for (a,) in done) / len(done)
        update = state.global_step // STEPS
        row = {"update": update, "seconds": round(self.seconds, 1), "level 2": round(accuracy, 1)}
        print(json.dumps(row), flush=True)
        control.should_training_stop = accuracy >= self.args.target or (
            self.seconds > self.args.limit
        )
        self.start = time.perf_counter()


def texts(policy, problems, seed):
    """Endless problems in a random order, as TRL's columns."""
    rng = random.Random(seed)
    while True:
        for prompt in rng.sample(policy.render(problems), len(problems)):
            text = policy.tokenizer.decode(prompt.tokens)
            yield {"prompt": text, "gold": prompt.problem.answer}


def main():
    args = common.parse(__doc__, target=64, limit=1200, seed=0)
    policy, grader = Policy.load(str(TINY)), Grader()
    parts = {}
    for name in ("train", "heldout"):
        problems = data.read_problems(SHIPPED / f"{name}.jsonl")
        parts[name] = data.cut_levels(problems, QUALITY, "pass_rate")[0]
    easy, hard = (texts(policy, level, args.seed) for level in parts["train"])
    rows = [next(easy) for _ in range(20 * PROMPTS)]  # 20 updates of level 1
    rows += [next(hard) for _ in range(400 * PROMPTS)]

    def reward(completions, gold, **_):
        return [float(v == RIGHT) for v in grader.grade(list(zip(gold, completions)))]

    clock = Clock(args, policy.render(parts["heldout"][1]))
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=PROMPTS * GROUP // STEPS,
            steps_per_generation=STEPS,
            num_generations=GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            generation_kwargs={"top_k": 0},
            beta=0.0,
            epsilon_high=0.28,
            loss_type="grpo",
            learning_rate=3e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5 * STEPS,
            seed=args.seed,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
            save_strategy="no",
            logging_steps=10,
        )
        trainer = GRPOTrainer(str(TINY), reward, config, Dataset.from_list(rows), callbacks=[clock])
        clock.start = time.perf_counter()
        trainer.train()


if __name__ == "__main__":
    main()
