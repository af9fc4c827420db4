"""Attempts of a policy at problems: sampled and scored.

Training, evaluation and the measurement of difficulty share one template, one sampler, one grader.
"""

import time
import zlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

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


def attempt(policy, scorer, work, sampling, fit, *, show_progress=False, seconds=None):
    """Complete every prompt once per key, and score: one list of Attempt per prompt.

    A completion ends where the context ends; a prompt that fills the context gets empty ones. The
    completions of a prompt are scored together: a user's R_l begins as soon as the last of them is
    there, the verifier compares after all sampling.

    work     triples: a prompt, the keys of its completions (rollout.stream_key), its Reward
    fit      a run.fit.Fit: how many are decoded at once
    seconds  a Counter: the time of sampling is added as `sample`, that of scoring after the last
             sample as `score`
    """
    start = time.perf_counter()
    bar = tqdm(desc="sampling", unit=" tokens", leave=False, disable=not show_progress, delay=2)
    try:
        with bar:
            groups = sample_groups(policy, scorer, work, sampling, fit, bar)
        sampled = time.perf_counter()
        attempts = []
        for number in range(len(work)):
            completions, texts, finish = groups[number]
            attempts.append(list(map(Attempt, completions, texts, finish())))
    finally:
        scorer.calls.drop()
    if seconds is not None:
        seconds.update(sample=sampled - start, score=time.perf_counter() - sampled)
    return attempts


def sample_groups(policy, scorer, work, sampling, fit, bar):
    """-> {number of the request: its completions, their texts, and what Scorer.begin returned}"""
    prompts, keys, rewards = zip(*work) if work else ((), (), ())
    limits = [min(sampling.max_new_tokens, policy.room(p)) for p in prompts]
    longest = max((len(p.tokens) + limit for p, limit in zip(prompts, limits)), default=0)
    options = vars(sampling) | {"max_new_tokens": limits, "stop_ids": policy.stop_ids}
    slots, groups = min(fit.slots(longest), max(MIN_ROWS, sum(map(len, keys)))), {}
    try:
        with packed(policy.model, slots, fit.free):
            tokens = [p.tokens for p in prompts]
            for number, done in sample(policy.model, tokens, keys, slots=slots, **options):
                texts = [prompts[number].opening + policy.text(c) for c in done]
                finish = scorer.begin(rewards[number], prompts[number].problem, texts)
                groups[number] = done, texts, finish
                bar.update(sum(len(c.tokens) for c in done))
        return groups
    except torch.OutOfMemoryError:
        fit.use_less_memory(slots)
    scorer.calls.drop()
    return sample_groups(policy, scorer, work, sampling, fit, bar)


def evaluation_requests(seed, prompts, samples, reward=VERIFIER, purpose=EVALUATION):
    """Every prompt with a key for each of its samples, a function of the problem's id, and its R_l:
    work for `attempt`.

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
