"""Sampling: token lists in, token lists out. No text, no reward, no task.

A fixed number of slots decodes in step; a slot that finishes is refilled at once. The prompt of a
group is prefilled once, and its part of the KV cache copied. Every random number is a function of
its sample's key and the position in the completion. So the number of slots, the other rows of the
batch and the order of the prompts change nothing (beyond rounding).

Shapes: B or R rows, T tokens, V vocabulary, H heads, K key/value heads, D head size, S positions of
the KV cache.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from os.path import commonprefix  # takes any sequences

import numpy as np
import torch
import torch.nn.functional as F

from model import additive_mask, log_softmax, row_chunks, scaled_dot_product

PREFILL_TOKENS = 8192  # padded prompt tokens that go through the model at once (memory only)
ROOM = 32  # the room of the KV cache is a multiple of it, in positions
MIN_ROWS = 8  # matrix products of fewer rows (slots, or tokens of a prompt) may round differently


@dataclass(frozen=True)
class Completion:
    tokens: list  # ids, the stop token included
    logprobs: list  # nats, of each token as it was sampled
    stopped: bool  # False: ran out of tokens


# --------------------------------------------------------------------------------------- choice


TRAINING, DIFFICULTY, EVALUATION = 1, 2, 3  # purposes of completions, part of their keys


def stream_key(*counters):
    """Return the 64-bit key of a stream for non-negative integers, the first of them a seed.

    Trailing zeros do not count, so one purpose always passes equally many: (1, 2) is (1, 2, 0).

    This table lists all random streams. Whoever changes a key, or the order in which its numbers
    are taken, gets other results from the same flags.

    drawn by                     what                          key
    train.draw                   tokens of training            seed, TRAINING, level, group, sample
    attempt.evaluation_requests  tokens of evaluations         seed, EVALUATION, crc32(id), sample
    attempt.evaluation_requests  tokens that measure rates     seed, DIFFICULTY, crc32(id), sample
    data.Order                   order of a level's problems   "seed/level/epoch"
    train.minibatches            order of an update's groups   "seed/minibatches/update/epoch"
    policy.lora.add              first factors                 seed
    statistics.bootstrap         resamples for an interval     0
    statistics.difference        signs for a p-value           0

    The seed is --seed of the command, and nobody can set that of the statistics. The id is that of
    a problem, levels count from 1, and groups are those that the level has drawn. The first three
    are streams of `uniforms`, those with a text as their key are Python's random.Random, LoRA's is
    a torch.Generator, and the last two are NumPy's.
    """
    return np.random.SeedSequence(counters).generate_state(1, np.uint64)[0]


def uniforms(keys, positions):
    """Number `position` of each stream, in [0, 1): SplitMix64 (Steele, Lea & Flood 2014).

    uint64 (R,), (R,) -> float64 (R,)
    """
    z = keys + (positions + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def keep_likely(logprobs, top_k, top_p):
    """Keep the top_k likeliest tokens, of them the fewest whose mass reaches top_p; renormalise.

    (R, V) -> (R, V)
    """
    ordered, order = logprobs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    mass = ordered.softmax(-1)
    ordered[mass.cumsum(-1) - mass >= top_p] = -torch.inf  # the first token always stays
    return logprobs.scatter(-1, order, ordered).log_softmax(-1)


def choose(logits, u, temperature, top_k, top_p):
    """Pick one token per row: the inverse of its distribution function at u.

    logits (R, V), u (R, 1) in [0, 1) -> tokens, logprobs (R, 1), nats. Temperature 0 is greedy: its
    choices are certain, 0 nats; nan if their logit is nan or infinite, so that it is noticed.
    """
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # that of nan, if there is one
        return tokens, 0 * logits.gather(1, tokens)
    logprobs = log_softmax(logits, temperature)
    if top_k or top_p < 1:
        logprobs = keep_likely(logprobs, top_k, top_p)
    cdf = logprobs.exp().cumsum(-1)
    # The total is 1 up to rounding. The target stays below it even for u = 1 - 2^-53, so that no
    # token of probability 0 is reached.
    total = cdf[:, -1:]
    target = torch.minimum(u.to(cdf.dtype) * total, torch.nextafter(total, 0 * total))
    tokens = torch.searchsorted(cdf, target, right=True)
    tokens.clamp_(max=logits.shape[-1] - 1)  # with nan any token; its log-prob is nan too
    return tokens, logprobs.gather(1, tokens)


# ---------------------------------------------------------------------------------------- cache


def round_up(count, multiple):
    return -(-count // multiple) * multiple


class KVCache:
    """Keys and values of every layer for independent rows.

    k, v   one tensor per layer, (rows, K, S, D): every row has room for S positions
    room   S. It follows the longest row, up and down. Where decoding reads no further than a row is
           filled, it may be larger: each change of the room is another CUDA graph

    A query at position q sees position p of its row iff p <= q. What a row holds beyond that (the
    padding of a prefill, tokens of an earlier completion) is overwritten before it can be seen.
    """

    def __init__(self, model, rows, longest):
        """longest: tokens that a row may hold"""
        config = model.config
        empty = model.lm_head.weight.new_zeros(rows, config.num_key_value_heads, 0, model.head_dim)
        self.k = [empty] * config.num_hidden_layers
        self.v = list(self.k)
        self.longest = longest
        # Whether `filled_attention` has a kernel for such keys: flash attention in half precision,
        # of NVIDIA's cards from Ampere on.
        self.reads_filled = (
            empty.is_cuda
            and empty.itemsize == 2
            and empty.shape[3] % 8 == 0
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(empty.device) >= (8, 0)
            and not torch.version.hip
        )

    @property
    def room(self):
        return self.k[0].shape[2]

    def fit(self, length):
        """Make room for `length` positions; give room back if little of it is used."""
        growth, slack = (2, 4) if self.reads_filled else (9 / 8, 2)
        if not length <= self.room <= max(ROOM, slack * length):
            change = round_up(min(int(length * growth), self.longest), ROOM) - self.room
            self.replace(lambda x: F.pad(x, (0, 0, 0, change)))  # a negative number cuts

    def copy(self, source, targets, length):
        """Copy the first `length` positions of row source to the rows targets."""
        for x in self.k + self.v:
            x[targets, :, :length] = x[source, :, :length].clone()  # x may be all of it

    def replace(self, change):
        """Replace tensor by tensor: two caches would not fit where one does."""
        for tensors in (self.k, self.v):
            for layer, x in enumerate(tensors):
                tensors[layer] = change(x)

    def prefilling(self, positions, rows):
        """Return attend, see Body.forward, for tokens of these rows at positions (1, T)."""
        width = int(positions.max()) + 1
        mask = self.mask(positions, width)

        def attend(layer, q, k, v):
            self.store(layer, rows, positions, k, v)
            k = self.k[layer][rows, :, :width]
            v = self.v[layer][rows, :, :width]
            return scaled_dot_product(q, k, v, mask)

        return attend

    def decoding(self, positions):
        """-> attend for one token of every row, at positions (rows, 1).

        Heads that share a key are several queries of it: no key is copied to them. In float32 two
        products are up to three times as fast on a CPU as the fused attention. A product in
        bfloat16 would round the scores before their softmax, and the learner does not.
        """
        rows = torch.arange(len(positions), device=positions.device)
        if self.reads_filled:  # made once for all layers
            filled = (positions + 1).expand(-1, self.k[0].shape[1]).flatten().int()
            numbers = torch.arange(len(filled) + 1, dtype=torch.int32, device=filled.device)
            starts = numbers, numbers * self.room
        else:
            mask = self.mask(positions, self.room)

        def attend(layer, q, k, v):
            self.store(layer, rows, positions, k, v)
            q, keys, values = q.view(*k.shape[:2], -1, k.shape[3]), self.k[layer], self.v[layer]
            if self.reads_filled:
                out = filled_attention(q, keys, values, starts, filled)
            elif q.itemsize < 4:
                out = F.scaled_dot_product_attention(q, keys, values, mask)
            else:
                score = q * k.shape[3] ** -0.5 @ keys.mT + mask
                out = score.softmax(-1) @ values
            return out.reshape(len(q), 1, -1)

        return attend

    def store(self, layer, rows, positions, k, v):
        for cache, new in ((self.k, k), (self.v, v)):
            cache[layer][rows[:, None], :, positions] = new.transpose(1, 2)

    def mask(self, positions, width):
        seen = torch.arange(width, device=positions.device) <= positions[:, None, :, None]
        return additive_mask(seen, self.k[0].dtype)


def filled_attention(q, k, v, starts, filled):
    """Flash attention of one token a row: q (R, K, H / K, D), k and v (R, K, S, D)
    -> (R * K, H / K, D).

    Each row and key head is a sequence of its own to the kernel, with H / K heads and one key head.

    starts  two of (R * K + 1,) int32: where each one begins among all queries, and all keys
    filled  (R * K,) int32: the positions of each one that are read, from the first
    """
    return torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        k.flatten(0, 2)[:, None],
        v.flatten(0, 2)[:, None],
        *starts,
        max_q=1,
        max_k=k.shape[2],
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        seqused_k=filled,
    )[0]


# ---------------------------------------------------------------------------------------- slots


def capture(step, device):
    """A faster equivalent of step(), a function of tensors that stay where they are.

    On a GPU it is a CUDA graph: a step of 28 layers is a thousand kernels, most of which take less
    time than their launch. Elsewhere it is step itself.
    """
    if device.type != "cuda":
        return step
    step()  # what libraries set up at a first call is no part of the graph
    graph = torch.cuda.CUDAGraph()
    # Threads of rewards may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


@dataclass(eq=False)
class SharedPrompt:
    """A prompt, and where its keys and values are.

    From its prefill until the last of its sequences has a slot, one row of the cache keeps it to be
    copied.
    """

    number: int
    tokens: list
    unfinished: int = 0  # of its sequences
    slot: int = None  # of the row that keeps it
    logits: torch.Tensor = None  # (V,) of the first token to sample


@dataclass
class Sequence:
    """A completion in the making."""

    prompt: SharedPrompt
    key: int  # its stream of random numbers
    limit: int  # tokens
    tokens: list
    logprobs: list
    stopped: bool = False


class Slots:
    """The decoding rows: slot i decodes one sequence and uses row i of the KV cache.

    groups   the sequences of each prompt
    running  a Sequence per slot, or None where it is idle
    waiting  sequences without a slot, group by group
    fed      (2, rows): what the model is fed next, a token and its position. An idle row is fed
             too, at the position after the prompt that it may keep, so that this is not overwritten
    inputs   its copy on the device, from which `forward` reads; replay: `forward`, as captured for
             the tensors of the cache as they lie now (see `capture`)

    The cache and the next-token logits (rows, V) stay on the device; each token costs one small
    copy to the host.
    """

    def __init__(self, model, prompts, keys, limits, slots):
        """See `sample`."""
        self.model, self.groups, self.waiting = model, [], deque()
        for tokens, *own in zip(prompts, keys, limits):
            prompt = SharedPrompt(len(self.groups), tokens)
            group = [Sequence(prompt, key, limit, [], []) for key, limit in zip(*own)]
            sampled = [sequence for sequence in group if sequence.limit]
            prompt.unfinished = len(sampled)
            self.groups.append(group)
            self.waiting += sampled
        rows = max(MIN_ROWS, min(slots, len(self.waiting)))
        self.running = [None] * rows
        longest = max((len(s.prompt.tokens) + s.limit for s in self.waiting), default=0)
        self.cache = KVCache(model, rows, longest)
        self.logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self.fed = np.zeros((2, rows), int)
        self.captured = None  # a tensor of the cache for which `replay` stands

    @property
    def live(self):
        """Return (slot, its sequence) for every slot that is not idle."""
        return [pair for pair in enumerate(self.running) if pair[1]]

    def refill(self):
        """Give every idle slot the next waiting sequence, and its row the prompt of this sequence.

        Say that A, B and C have three completions each, and that slots 1 to 3 have become idle:

            row   before        after
            0     A | A0 ...    A | A0 ...
            1     A | A1 done   B | B2       copied from row 3
            2     A | A2 done   C | C0       prefilled; row 2 keeps C, because C1 waits
            3     B | B0 done   B | B1       row 3 has kept B, so B's next sequence is in it
        """
        idle = [slot for slot, sequence in enumerate(self.running) if not sequence]
        # The slot that keeps a prompt comes first, so that only a sequence of this prompt gets it.
        idle.sort(key=lambda slot: slot != self.waiting[0].prompt.slot)
        placed = defaultdict(list)  # prompt -> its new slots
        for slot in idle[: len(self.waiting)]:
            sequence = self.running[slot] = self.waiting.popleft()
            placed[sequence.prompt].append(slot)
        self.prefill_new(placed)
        self.copy_prompts(placed)

    def prefill_new(self, placed):
        """Run the prompts that no row keeps through the model, each into its first new row."""
        new = sorted((p for p in placed if p.slot is None), key=lambda p: len(p.tokens))
        for prompt in new:
            prompt.slot = placed[prompt][0]
        while new:  # the longest ones first
            size = max(1, PREFILL_TOKENS // len(new[-1].tokens))
            self.prefill(new[-size:])
            del new[-size:]

    def copy_prompts(self, placed):
        """Copy each prompt, and the logits after it, to all its new rows."""
        for prompt, slots in placed.items():
            slots = torch.tensor(slots, device=self.logits.device)
            self.cache.copy(prompt.slot, slots, len(prompt.tokens))
            self.logits[slots] = prompt.logits
            if not self.waiting or self.waiting[0].prompt is not prompt:
                prompt.slot = prompt.logits = None

    def prefill(self, prompts):
        """Run prompts into their cache rows; a beginning that all share goes through once."""
        rows, tokens = zip(*[(prompt.slot, prompt.tokens) for prompt in prompts])
        shared = 0
        if len(rows) > 1:  # at least one token is left to each
            shared = max(0, len(commonprefix(tokens)) - 1) // MIN_ROWS * MIN_ROWS
        if shared:
            self.extend(rows[:1], [tokens[0][:shared]], 0)
            self.cache.copy(rows[0], torch.tensor(rows[1:], device=self.logits.device), shared)
        rest = [row[shared:] for row in tokens]
        last = [len(row) - 1 for row in rest]
        hidden = self.extend(rows, rest, shared)[range(len(rows)), last]
        for prompt, logits in zip(prompts, self.model.lm_head(hidden)):
            prompt.logits = logits

    def extend(self, rows, tokens, start):
        """Run token lists into these cache rows from `start`; -> hidden states (B, T, C)."""
        width = round_up(max(map(len, tokens)), MIN_ROWS)
        self.cache.fit(max(self.cache.room, start + width))
        device = self.logits.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=device)
        positions = torch.arange(start, start + width, device=device)[None]
        attend = self.cache.prefilling(positions, torch.tensor(rows, device=device))
        return self.model.model(ids, positions, attend)

    def advance(self, *settings):
        """Sample the next token of every slot.  settings: temperature, top_k, top_p of `choose`"""
        places = [(s.key, len(s.tokens)) if s else (0, 0) for s in self.running]
        places = np.array(places, np.uint64)
        u = torch.from_numpy(uniforms(*places.T)).to(self.logits.device, non_blocking=True)
        chosen = []
        for logits, some in row_chunks(self.logits, u):
            pair = choose(logits, some, *settings)
            chosen.append(torch.cat([x.double() for x in pair], 1))
        chosen = torch.cat(chosen).tolist()  # one GPU sync
        for slot, sequence in self.live:
            token, logprob = chosen[slot]
            sequence.tokens.append(int(token))
            sequence.logprobs.append(logprob)

    def retire(self, stop_ids):
        """Free the slots whose completion stopped or ran out; yields what `sample` yields for the
        prompts of which it was the last."""
        for slot, sequence in self.live:
            sequence.stopped = sequence.tokens[-1] in stop_ids
            if sequence.stopped or len(sequence.tokens) == sequence.limit:
                prompt, self.running[slot] = sequence.prompt, None
                self.fed[1, slot] = len(prompt.tokens)
                prompt.unfinished -= 1
                if not prompt.unfinished:
                    own = self.groups[prompt.number]
                    yield prompt.number, [Completion(s.tokens, s.logprobs, s.stopped) for s in own]

    def compact(self):
        """Once nothing waits, drop idle rows whenever that halves the work."""
        rows = max(len(self.live), MIN_ROWS)
        if self.waiting or len(self.running) < 2 * rows:
            return
        kept = sorted(range(len(self.running)), key=lambda slot: not self.running[slot])[:rows]
        self.running = [self.running[slot] for slot in kept]
        self.fed = self.fed[:, kept]
        kept = torch.tensor(kept, device=self.logits.device)
        self.logits = self.logits[kept]
        self.cache.replace(lambda x: x[kept])

    def decode(self):
        """Feed every slot its last token."""
        for slot, sequence in self.live:
            last = len(sequence.prompt.tokens) + len(sequence.tokens) - 1
            self.fed[:, slot] = sequence.tokens[-1], last
        self.cache.fit(self.fed[1].max() + 1)
        fed = torch.from_numpy(self.fed)
        if self.captured is not self.cache.k[0]:  # the first step, or tensors have moved
            self.logits = self.replay = None  # frees their memory first
            self.inputs = fed.to(self.model.device, copy=True)
            self.replay = capture(self.forward, self.model.device)
            self.captured = self.cache.k[0]
        self.inputs.copy_(fed, non_blocking=True)
        self.logits = self.replay()

    def forward(self):
        last, positions = self.inputs[..., None]
        return self.model(last, positions, self.cache.decoding(positions))[:, 0]


@torch.inference_mode()
def sample(model, prompts, keys, limits, *, slots, stop_ids, temperature, top_k=0, top_p=1.0):
    """Complete every prompt; yields (number of a prompt, [Completion, ...]) once the last of its
    completions is finished.

    prompts      token lists
    keys         for each prompt those of its completions, see `stream_key`
    limits       for each prompt those of its completions: the most tokens that they may have
    slots        rows decoded together, at least MIN_ROWS (memory and speed only)
    stop_ids     a completion ends with the first of these ids, which is kept
    temperature  of the softmax; 0 is greedy. top_k (0: off) and top_p (1: off) are for
                 evaluation: the learner's softmax knows neither
    """
    work = Slots(model, prompts, keys, limits, slots)
    for number, own in enumerate(limits):
        if not any(own):
            yield number, [Completion([], [], False)] * len(own)
    while work.waiting or work.live:
        if work.waiting:
            work.refill()
        work.advance(temperature, top_k, top_p)
        complete = list(work.retire(stop_ids))
        work.compact()
        if work.live:
            work.decode()
        yield from complete
    work.replay = None  # a cycle, on a CPU, would keep the cache
