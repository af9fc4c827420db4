"""Attempts of a policy at problems: sampled and scored.

Training, evaluation and the measurement of difficulty share one template, one sampler, one grader.
"""

import math
import time
import zlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from policy.memory import free_bytes
from policy.packed import packed
from rewards import VERIFIER, Score
from rollout import MIN_ROWS, Completion, sample, stream_key

TRAINING, DIFFICULTY, EVALUATION = 1, 2, 3  # purposes of random streams: see rollout.stream_key


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: the settings of rollout.sample by their names."""

    max_new_tokens: int  # of each completion, the stop token included
    temperature: float  # 0 is greedy
    top_k: int = 0  # 0 is off, as in training
    top_p: float = 1.0  # 1 is off, as in training


@dataclass(frozen=True)
class Attempt:
    """One completion of a problem, scored."""

    completion: Completion
    text: str  # with what the prompt has begun of it, see data.Prompt
    score: Score

    @property
    def length(self):
        return len(self.completion.tokens)

    def row(self, problem_id, sample):
        """As completions.jsonl of a run and of an evaluation have it."""
        row = {
            "problem_id": problem_id,
            "sample": sample,
            "verdict": self.score.verdict,
            "tokens": self.length,
            "stopped": self.completion.stopped,
            "text": self.text,
        }
        return row | ({"values": self.score.values} if self.score.values else {})


class Solver:
    """A policy that attempts problems: it samples completions and has them scored.

    most_slots  once a GPU has had no memory for more: the slots of all that follows, at most
    """

    def __init__(self, policy, scorer, show_progress=False):
        self.policy, self.scorer, self.show_progress = policy, scorer, show_progress
        self.most_slots = math.inf

    def attempt(self, work, sampling, slots, seconds=None):
        """Complete every prompt once per key, and score: one list of Attempt per prompt.

        A completion ends where the context ends; a prompt that fills the context gets empty
        completions. The completions of a prompt are scored together: a user's R_l begins as soon as
        the last of them is there, the verifier compares after all sampling.

        work     triples: a prompt, the keys of its completions (rollout.stream_key), its Reward
        slots    completions decoded together
        seconds  a Counter: the time of sampling is added as `sample`, that of scoring after the
                 last sample as `score`
        """
        start = time.perf_counter()
        silent = not self.show_progress
        bar = tqdm(desc="sampling", unit=" tokens", leave=False, disable=silent, delay=2)
        try:
            with bar:
                groups = self.sample_what_fits(work, sampling, slots, bar)
            sampled = time.perf_counter()
            attempts = []
            for completions, texts, finish in groups:
                attempts.append(list(map(Attempt, completions, texts, finish())))
        finally:
            self.scorer.calls.drop()
        if seconds is not None:
            seconds.update(sample=sampled - start, score=time.perf_counter() - sampled)
        return attempts

    def sample_what_fits(self, work, sampling, slots, bar):
        """`sample_groups`, and again with half of the slots as long as a GPU has no memory for
        them. Raises OutOfMemoryError if it has none for the fewest."""
        while True:
            slots = min(slots, self.most_slots)
            try:
                return self.sample_groups(work, sampling, slots, bar)
            except torch.OutOfMemoryError:
                if slots <= MIN_ROWS:
                    raise
            # Out here nothing holds what the failed work had.
            self.scorer.calls.drop()
            self.most_slots = max(MIN_ROWS, slots // 2)
            tqdm.write(
                f"out of memory: at most {self.most_slots} slots from now on, so the last bits may "
                "differ from those of a run that has more memory"
            )

    def sample_groups(self, work, sampling, slots, bar):
        """-> for each prompt its completions, their texts, and what Scorer.begin returned"""
        policy, groups = self.policy, [None] * len(work)
        prompts, keys, rewards = zip(*work) if work else ((), (), ())
        tokens = [prompt.tokens for prompt in prompts]
        limits = [min(sampling.max_new_tokens, policy.room(prompt)) for prompt in prompts]
        options = vars(sampling) | {"max_new_tokens": limits, "stop_ids": policy.stop_ids}
        slots = min(slots, max(MIN_ROWS, sum(map(len, keys))))
        with packed(policy.model, slots, free_bytes(policy.model.device)):
            for number, done in sample(policy.model, tokens, keys, slots=slots, **options):
                texts = [prompts[number].opening + policy.text(c) for c in done]
                finish = self.scorer.begin(rewards[number], prompts[number].problem, texts)
                groups[number] = done, texts, finish
                bar.update(sum(len(c.tokens) for c in done))
        return groups


def evaluation_requests(seed, prompts, samples, reward=VERIFIER, purpose=EVALUATION):
    """Every prompt with a key for each of its samples, a function of the problem's id, and its R_l:
    work for `Solver.attempt`.

    Every evaluation uses the same streams, so two evaluations differ less by chance. Training and
    the measurement of difficulty use others: problems that were called hard after unlucky samples
    look easier with new samples, even without any training.
    """
    work = []
    for prompt in prompts:
        number = zlib.crc32(prompt.problem.id.encode())
        keys = [stream_key(seed, purpose, number, k) for k in range(samples)]
        work.append((prompt, keys, reward))
    return work
