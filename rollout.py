"""Sampling: token lists in, token lists out. No text, no reward, no task.

A fixed number of slots decodes in step; a slot that finishes is refilled at once. The prompt of a group is prefilled
once and its cache row copied. Every random number is a function of its sample's key and the position in the
completion, so slots, batch mates and the order of requests change nothing (beyond rounding).
"""

from collections import deque
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences, in spite of its home

import numpy as np
import torch

from model import KVCache, log_softmax

PREFILL_TOKENS = (
    8192  # at most so many padded prompt tokens go through the model at once (memory only)
)
CAPTURED = "cuda"  # where the decoding step is captured; elsewhere it is a call like any
MIN_ROWS = 8  # matrix products of fewer rows may round differently


@dataclass(frozen=True)
class Request:
    """One prompt to complete len(keys) times."""

    prompt: list  # token ids
    keys: list  # one stream of random numbers per completion, see `stream`
    max_new_tokens: int  # of each completion; or a list, one number per key


@dataclass(frozen=True)
class Completion:
    tokens: list  # ids, the stop token included
    logprobs: list  # nats, of each token as it was sampled
    stopped: bool  # False: ran out of tokens


def stream(*counters):
    """A 64-bit key for non-negative integers such as (run seed, purpose, level, draw index, sample index).

    Each purpose has its own number of counters: trailing zeros do not count.
    """
    return np.random.SeedSequence(counters).generate_state(1, np.uint64)[0]


def uniforms(keys, positions):
    """Number `position` of each stream, in [0, 1): SplitMix64 (Steele, Lea & Flood 2014).  uint64 (R,), (R,) -> (R,)"""
    z = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def keep_likely(logprobs, top_k, top_p):
    """Restrict to the top_k likeliest tokens, then to the fewest whose mass reaches top_p; renormalised.  (R, V)"""
    ordered, order = logprobs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    mass = ordered.softmax(-1)
    ordered[mass.cumsum(-1) - mass >= top_p] = float("-inf")  # the first token always stays
    return torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)


def choose(logits, u, temperature, top_k=0, top_p=1.0):
    """Pick one token a row by inverting its distribution function at u.

    logits (R, V), u (R,) in [0, 1) -> tokens (R,), logprobs (R,) nats. Temperature 0 is greedy: a sure choice, 0 nats.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logprobs = log_softmax(logits, temperature)
    if top_k or top_p < 1:
        logprobs = keep_likely(logprobs, top_k, top_p)
    cdf = logprobs.exp().cumsum(-1)
    total = cdf[
        :, -1:
    ]  # 1 up to rounding; below it even for u = 1 - 2^-53, so that no impossible token is reached
    target = torch.minimum(
        u[:, None].to(cdf.dtype) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    tokens = torch.searchsorted(cdf, target, right=True).clamp(
        max=logits.shape[-1] - 1
    )  # nan: any, its log-prob says so
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def capture(step):
    """step(), a function of tensors that stay where they are, as a CUDA graph -> its result and what makes it anew.

    A step of 28 layers is a thousand kernels, most of which take less time than their launch.
    """
    step()  # what libraries set up at a first call is no part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph.replay


class Slots:
    """The decoding rows: whose completion each holds, its position, its row of the KV cache.

    The bookkeeping is in host arrays: keys, prompt_length, count, limit (rows,) and tokens, logprobs (rows, longest).
    The cache and the next-token logits (rows, V) stay on the device; each token costs one small copy to the host.
    """

    def __init__(self, model, requests, slots):
        self.model, self.requests = model, requests
        self.waiting = deque(
            (r, i) for r, request in enumerate(requests) for i in range(len(request.keys))
        )
        self.slots = min(slots, len(self.waiting))
        rows = max(MIN_ROWS, self.slots)  # beyond the slots: padding, never given a sample
        longest = max((np.max(r.max_new_tokens) for r in requests), default=0)
        self.owner = [None] * rows  # (request, sample) or None: idle
        self.keys = np.zeros(rows, np.uint64)
        self.prompt_length, self.count, self.limit = (np.zeros(rows, np.int64) for _ in range(3))
        self.tokens, self.logprobs = np.zeros((rows, longest), np.int64), np.zeros((rows, longest))
        self.cache = KVCache(
            model,
            rows,
            max((len(r.prompt) + np.max(r.max_new_tokens) for r in requests), default=0),
        )
        self.logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self.captured = None  # the layout of the cache for which `replay` stands
        self.held, self.first = (
            {},
            {},
        )  # request -> a slot holding its prompt; its first next-token logits (V,)

    @property
    def live(self):
        return [slot for slot, owner in enumerate(self.owner) if owner]

    def refill(self):
        """Give every idle slot the next waiting sample."""
        idle = [slot for slot, owner in enumerate(self.owner[: self.slots]) if not owner]
        self.clear(idle)
        idle.sort(
            key=lambda slot: slot not in self.held.values()
        )  # a held prompt is overwritten only by its own group
        placed, new = [], []
        for slot in idle[: len(self.waiting)]:
            r, i = self.owner[slot] = self.waiting.popleft()
            if r not in self.held:
                self.held[r] = slot
                new.append(r)
            request = self.requests[r]
            self.keys[slot], self.limit[slot] = (
                request.keys[i],
                np.broadcast_to(request.max_new_tokens, len(request.keys))[i],
            )
            self.prompt_length[slot], self.count[slot] = len(request.prompt), 0
            placed.append((slot, r))
        if not placed:
            return
        new.sort(key=lambda r: len(self.requests[r].prompt))
        while new:
            size = max(1, PREFILL_TOKENS // len(self.requests[new[-1]].prompt))
            self.prefill(new[-size:])
            del new[-size:]
        copies = [(self.held[r], slot) for slot, r in placed if self.held[r] != slot]
        if copies:
            self.cache.copy(*zip(*copies), self.prompt_length[[slot for _, slot in copies]])
        self.logits[[slot for slot, _ in placed]] = torch.stack([self.first[r] for _, r in placed])
        for r in [r for r in self.held if not self.waiting or r != self.waiting[0][0]]:
            del self.held[r], self.first[r]

    def clear(self, idle):
        """Give back the pages of idle slots, save for a prompt that may still be copied."""
        held = set(self.held.values())
        self.cache.cut(
            idle,
            np.array([self.prompt_length[slot] if slot in held else 0 for slot in idle], np.int64),
        )

    def prefill(self, batch):
        """Run the prompts of these requests into their cache rows; a beginning that all share (worked examples), once."""
        prompts, rows = [self.requests[r].prompt for r in batch], [self.held[r] for r in batch]
        shared = (
            max(0, len(commonprefix(prompts)) - 1) // MIN_ROWS * MIN_ROWS if len(batch) > 1 else 0
        )
        if shared:  # a token at least is left to each
            self.extend(rows[:1], [prompts[0][:shared]], 0)
            self.cache.copy(rows[:1] * (len(rows) - 1), rows[1:], np.full(len(rows) - 1, shared))
        hidden = self.extend(rows, [p[shared:] for p in prompts], shared)
        lengths = self.to_device(np.array([len(p) for p in prompts])) - shared
        last = hidden[torch.arange(len(batch), device=hidden.device), lengths - 1]
        self.first.update(zip(batch, self.model.lm_head(last)))

    def extend(self, rows, tokens, start):
        """Run token lists, right-padded, into these cache rows from position `start`; returns hidden states (B, T, C)."""
        width = -(-max(map(len, tokens)) // MIN_ROWS) * MIN_ROWS
        ids = np.zeros((len(rows), width), np.int64)
        for row, some in zip(ids, tokens):
            row[: len(some)] = some
        self.cache.reserve(np.array(rows), start + np.array([len(some) for some in tokens]))
        self.cache.arrange()
        positions = self.to_device(np.arange(start, start + width)).expand(len(rows), -1)
        return self.model.model(
            self.to_device(ids), positions, self.cache, self.to_device(np.array(rows))
        )

    def advance(self, temperature, top_k, top_p):
        """Sample and record the next token of every slot."""
        u = self.to_device(uniforms(self.keys, self.count))
        chosen = (
            torch.stack([x.double() for x in choose(self.logits, u, temperature, top_k, top_p)])
            .cpu()
            .numpy()
        )  # sync
        live = self.live
        self.tokens[live, self.count[live]], self.logprobs[live, self.count[live]] = chosen[:, live]
        self.count[live] += 1

    def retire(self, stop_ids):
        """Free the slots whose completion stopped or ran out; yields (request, sample, completion)."""
        last = self.tokens[np.arange(len(self.owner)), self.count - 1]
        stopped = np.isin(last, stop_ids)
        for slot in np.flatnonzero(stopped | (self.count == self.limit)):
            if self.owner[slot]:
                n = self.count[slot]
                completion = Completion(
                    self.tokens[slot, :n].tolist(),
                    self.logprobs[slot, :n].tolist(),
                    bool(stopped[slot]),
                )
                yield *self.owner[slot], completion
                self.owner[slot] = None

    def compact(self):
        """Once nothing waits, drop idle rows whenever that halves the work."""
        live = self.live
        rows = max(len(live), MIN_ROWS)
        if self.waiting or not live or len(self.owner) < 2 * rows:
            return
        idle = [slot for slot, owner in enumerate(self.owner) if not owner]
        self.clear(idle)
        keep = (live + idle)[:rows]
        self.owner = [self.owner[slot] for slot in keep]
        for name in ("keys", "prompt_length", "count", "limit", "tokens", "logprobs"):
            setattr(self, name, getattr(self, name)[keep])
        self.cache.keep(keep)
        self.logits = self.logits[keep]

    def decode(self):
        """Feed every slot its last token."""
        live = np.array(self.live)
        fed = np.stack(
            [np.zeros(len(self.owner), np.int64), np.full(len(self.owner), -1)]
        )  # last token, its position; -1: idle
        fed[:, live] = (
            self.tokens[live, self.count[live] - 1],
            self.prompt_length[live] + self.count[live] - 1,
        )
        self.cache.reserve(live, fed[1, live] + 1)
        self.cache.arrange()
        if self.logits.device.type != CAPTURED:
            self.fed = self.to_device(fed)
            self.logits = self.forward()
            return
        if (
            self.captured is not self.cache.layout
        ):  # the first step, or one whose tensors have moved
            self.fed, self.logits, self.replay = self.to_device(fed), None, None
            self.logits, self.replay = capture(self.forward)
            self.captured = self.cache.layout
        self.fed.copy_(torch.from_numpy(fed), non_blocking=True)
        self.replay()

    def forward(self):
        last, positions = self.fed[..., None]
        return self.model(last, positions, self.cache)[:, 0]

    def to_device(self, array):
        return torch.from_numpy(array).to(self.logits.device, non_blocking=True)


@torch.inference_mode()
def sample(
    model,
    requests,
    *,
    slots,
    stop_ids,
    temperature,
    top_k=0,
    top_p=1.0,
    progress=lambda tokens: None,
):
    """Complete every request; returns one list of Completion per request, in order.

    slots        rows decoded together (memory and speed only)
    stop_ids     a completion ends with the first of these ids, which is kept
    temperature  of the softmax; 0 is greedy. top_k (0: off) and top_p (1: off) are for evaluation: the learner's
                 softmax knows neither
    progress     called with the number of tokens of every finished completion
    """
    done = [[None] * len(r.keys) for r in requests]
    work, stop_ids = Slots(model, requests, slots), sorted(stop_ids)
    with model.laid_out(len(work.owner)):
        while work.waiting or work.live:
            work.refill()
            work.advance(temperature, top_k, top_p)
            for r, i, completion in work.retire(stop_ids):
                done[r][i] = completion
                progress(len(completion.tokens))
            work.compact()
            if work.live:
                work.decode()
    return done
