"""Attempts of a policy at problems: sampled and scored.

Training, evaluation and the measurement of difficulty share one template, one sampler, one grader.
"""

import math
import time
import zlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import Prompt
from policy.memory import free_bytes
from policy.packed import packed
from rewards import VERIFIER, Reward, Score
from rollout import EVALUATION, MIN_ROWS, Completion, sample, stream_key


@dataclass(frozen=True)
class Request:
    """A prompt that is to be completed once for each key."""

    prompt: Prompt
    keys: list  # see rollout.stream_key
    reward: Reward  # R_l
    limit: int  # tokens of a completion at most, see Policy.limit


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, see rollout.sample."""

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


@dataclass(frozen=True)
class SampledGroup:
    """The completions of a prompt, which are being scored."""

    completions: list
    texts: list  # see Attempt
    scores: object  # a function that waits for them, see Scorer.begin

    def attempts(self):
        return list(map(Attempt, self.completions, self.texts, self.scores()))


class Solver:
    """A policy that attempts problems: it samples completions and has them scored.

    most_slots  once a GPU has had no memory for more: the slots of all that follows, at most
    """

    def __init__(self, policy, scorer, show_progress=False):
        self.policy, self.scorer, self.show_progress = policy, scorer, show_progress
        self.most_slots = math.inf

    def attempt(self, requests, sampling, slots, seconds=None):
        """Complete every prompt once per key, and score: one list of Attempt per Request.

        The completions of a prompt are scored together: a user's R_l begins as soon as the last of
        them is there, the verifier compares after all sampling.

        slots    completions decoded together
        seconds  a Counter: the time of sampling is added as `sample`, that of scoring after the
                 last sample as `score`
        """
        start = time.perf_counter()
        try:
            groups = self.sample_what_fits(requests, sampling, slots)
            sampled = time.perf_counter()
            attempts = [group.attempts() for group in groups]
        finally:
            self.scorer.calls.drop()
        if seconds is not None:
            seconds.update(sample=sampled - start, score=time.perf_counter() - sampled)
        return attempts

    def sample_what_fits(self, requests, sampling, slots):
        """`sample_groups`, and again with half of the slots as long as a GPU has no memory for
        them. Raises OutOfMemoryError if it has none for the fewest."""
        wanted = sum(len(request.keys) for request in requests)
        slots = min(slots, max(MIN_ROWS, wanted))
        while True:
            slots = min(slots, self.most_slots)
            try:
                return self.sample_groups(requests, sampling, slots)
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

    def sample_groups(self, requests, sampling, slots):
        """Return a SampledGroup for each Request."""
        policy, groups = self.policy, [None] * len(requests)
        silent = not self.show_progress
        bar = tqdm(desc="sampling", unit=" tokens", leave=False, disable=silent, delay=2)
        with bar, packed(policy.model, slots, free_bytes(policy.model.device)):
            for number, done in sample(
                policy.model,
                [request.prompt.tokens for request in requests],
                [request.keys for request in requests],
                [[request.limit] * len(request.keys) for request in requests],
                slots=slots,
                stop_ids=policy.stop_ids,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            ):
                prompt, reward = requests[number].prompt, requests[number].reward
                texts = [prompt.opening + policy.text(completion) for completion in done]
                scores = self.scorer.begin(reward, prompt.problem, texts)
                groups[number] = SampledGroup(done, texts, scores)
                bar.update(sum(len(completion.tokens) for completion in done))
        return groups


def evaluation_requests(
    policy, prompts, samples, max_new_tokens, seed, reward=VERIFIER, purpose=EVALUATION
):
    """Return a Request for each prompt. The keys of its samples are functions of the problem's id.

    Every evaluation uses the same streams, so two evaluations differ less by chance. Training and
    the measurement of difficulty use others: problems that were called hard after unlucky samples
    look easier with new samples, even without any training.
    """
    requests = []
    for prompt in prompts:
        number = zlib.crc32(prompt.problem.id.encode())
        keys = [stream_key(seed, purpose, number, k) for k in range(samples)]
        limit = policy.limit(prompt, max_new_tokens)
        requests.append(Request(prompt, keys, reward, limit))
    return requests
