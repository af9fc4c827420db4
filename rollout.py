"""Sampling: token lists in, token lists out. No text, no reward, no task.

A fixed number of slots decodes in step; a slot that finishes is refilled at once. The prompt of a
group is prefilled once, and its part of the KV cache copied. Every random number is a function of
its sample's key and the position in the completion. So the number of slots, the other rows of the
batch and the order of the prompts change nothing (beyond rounding).

Shapes: R rows, T tokens, V vocabulary, H heads, K key/value heads, D head size,
P positions of a page.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from os.path import commonprefix  # takes any sequences

import numpy as np
import torch
import torch.nn.functional as F

from model import additive_mask, log_softmax, scaled_dot_product

PREFILL_TOKENS = 8192  # padded prompt tokens that go through the model at once (memory only)
MIN_ROWS = 8  # matrix products of fewer rows may round differently


@dataclass(frozen=True)
class Completion:
    tokens: list  # ids, the stop token included
    logprobs: list  # nats, of each token as it was sampled
    stopped: bool  # False: ran out of tokens


# --------------------------------------------------------------------------------------- choice


def stream(*counters):
    """A 64-bit key for non-negative integers, such as (run seed, purpose, level, draw, sample).

    Each purpose has its own number of counters: trailing zeros do not count.
    """
    return np.random.SeedSequence(counters).generate_state(1, np.uint64)[0]


def uniforms(keys, positions):
    """Number `position` of each stream, in [0, 1): SplitMix64 (Steele, Lea & Flood 2014).

    uint64 (R,), (R,) -> float64 (R,)
    """
    z = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def keep_likely(logprobs, top_k, top_p):
    """Keep the top_k likeliest tokens, of them the fewest whose mass reaches top_p; renormalise.

    (R, V) -> (R, V)
    """
    ordered, order = logprobs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    mass = ordered.softmax(-1)
    ordered[mass.cumsum(-1) - mass >= top_p] = -torch.inf  # the first token always stays
    return torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)


def choose(logits, u, temperature, top_k=0, top_p=1.0):
    """Pick one token per row: the inverse of its distribution function at u.

    logits (R, V), u (R,) in [0, 1) -> tokens (R,), logprobs (R,) nats. Temperature 0 is greedy: its
    choices are certain, 0 nats.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logprobs = log_softmax(logits, temperature)
    if top_k or top_p < 1:
        logprobs = keep_likely(logprobs, top_k, top_p)
    cdf = logprobs.exp().cumsum(-1)
    # The total is 1 up to rounding. The target stays below it even for u = 1 - 2^-53, so that no
    # token of probability 0 is reached.
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u[:, None].to(cdf.dtype) * total, below_total)
    tokens = torch.searchsorted(cdf, target, right=True)
    tokens.clamp_(max=logits.shape[-1] - 1)  # with nan any token; its log-prob is nan too
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


# ---------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of every layer for independent rows, each with as many pages as it needs.

    k, v   one tensor per layer, (pages, K, D, P) and (pages, K, P, D): the order in which products
           with queries and weights read them
    table  (rows, width) on the host: the pages of each row in order, then zeros. Page 0 is a dummy.
           Idle rows and prompt padding write to it; attention never reads it.

    A query at position q sees position p of its row iff p <= q. What a page holds beyond that (the
    padding of a prefill, tokens of an earlier row) is overwritten before it can be seen.
    """

    # Positions of a page. Small pages waste less, large ones make less work. MIN_ROWS divides them.
    PAGE = {"cpu": 32, "cuda": 256}
    # The pool of pages grows by at least 1 / SLACK of itself, and the table by a multiple of WIDER.
    # Rarely on a GPU, since each time the decoding step must be captured again.
    SLACK = {"cpu": 8, "cuda": 2}
    WIDER = {"cpu": 1, "cuda": 4}
    HIDDEN = -1e30  # added to scores of what is not seen; finite, since an idle row sees nothing

    def __init__(self, model, rows, longest):
        """longest: tokens that a row may hold"""
        kind, layers = model.device.type, model.config.num_hidden_layers
        self.page, self.slack, self.wider = self.PAGE[kind], self.SLACK[kind], self.WIDER[kind]
        self.max_pages = 1 + rows * self.num_pages(longest)
        self.heads, self.device = model.config.num_attention_heads, model.device
        size = 1, model.config.num_key_value_heads, model.head_dim, self.page
        empty = model.lm_head.weight.new_zeros(size)
        self.k = [empty.clone() for _ in range(layers)]
        self.v = [empty.mT.contiguous() for _ in range(layers)]
        self.table = np.zeros((rows, 0), np.int64)
        self.free, self.layout, self.changed = [], (), True

    def num_pages(self, tokens):
        return -(-tokens // self.page)

    # Pages are given and taken on the host; `arrange` tells the device.

    def reserve(self, rows, lengths):
        """Make room for positions below lengths (one per row), keeping what is stored."""
        needed = self.num_pages(lengths)
        missing = needed.max() - self.table.shape[1]
        if missing > 0:
            self.table = np.pad(self.table, ((0, 0), (0, -(-missing // self.wider) * self.wider)))
        pages = self.table[rows]
        new = (pages == 0) & (np.arange(pages.shape[1]) < needed[:, None])
        if not new.any():
            return
        in_pool, wanted = len(self.k[0]), new.sum() - len(self.free)
        if wanted > 0:
            more = max(wanted, min(in_pool // self.slack, self.max_pages - in_pool))
            self.free.extend(range(in_pool, in_pool + more))
            # Zeros, since hidden keys must be finite: 0 * nan is nan.
            self.each_pool(lambda pool: torch.cat([pool, pool.new_zeros(more, *pool.shape[1:])]))
        pages[new] = [self.free.pop() for _ in range(new.sum())]
        self.table[rows] = pages
        self.changed = True

    def cut(self, row, length):
        """Take back the pages of this row beyond length."""
        pages = self.table[row, self.num_pages(length) :]
        self.free.extend(pages[pages > 0])
        self.changed |= pages.any()
        pages[:] = 0

    def copy(self, source, targets, length):
        """Copy the first `length` positions of row source to the rows targets."""
        self.reserve(targets, np.full(len(targets), length))
        pages = self.num_pages(length)
        old, new = self.table[source, :pages], self.table[targets, :pages]
        old, new = self.to_device(old), self.to_device(new)
        self.each_pool(lambda pool: pool.index_put_((new,), pool[old]))

    def keep(self, rows):
        """Keep only these rows, renumbered in this order, and the pages that they hold."""
        table = self.table[rows]
        table = table[:, table.any(0)]
        pages = np.unique(np.append(0, table))
        self.table, self.free, self.changed = np.searchsorted(pages, table), [], True
        kept = self.to_device(pages)
        self.each_pool(lambda pool: pool[kept])

    def each_pool(self, change):
        for pools in (self.k, self.v):
            for layer, pool in enumerate(pools):
                pools[layer] = change(pool)

    def to_device(self, array):
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def arrange(self):
        """Tell the device who holds what, once pages changed hands: the index tensors of attention.

        While `layout` stays the same object, these and the pools lie where they lay (a pool that
        moves has another number of pages, or of rows). A captured step may then be replayed.
        """
        if not self.changed:
            return
        owner, number = np.zeros((2, len(self.k[0])), np.int64)  # of each page: row, place in it
        row, place = np.nonzero(self.table)
        owner[self.table[row, place]] = row
        number[self.table[row, place]] = place
        table, owner, number = map(self.to_device, (self.table, owner, number))
        head = torch.arange(self.heads, device=self.device)
        # Scores are (pages * H, P). Which of them are those of (rows * H, width), and back:
        to_rows = (table[:, None] * self.heads + head[:, None]).flatten(0, 1)
        to_pages = (owner[:, None] * self.heads + head) * table.shape[1] + number[:, None]
        layout = table, owner, number * self.page, to_rows, to_pages
        if [x.shape for x in layout] == [x.shape for x in self.layout]:
            for old, new in zip(self.layout, layout):
                old.copy_(new)
        else:
            self.layout = layout
        self.changed = False

    def attention(self, positions, rows):
        """See Body.forward. rows=None is decoding: T = 1, row b is cache row b, or idle at -1."""
        if rows is None:
            return self.decoding(positions)
        table = self.layout[0][rows, : int(positions.max()) // self.page + 1]
        place = table.gather(1, positions // self.page), positions % self.page
        key_position = torch.arange(table.shape[1] * self.page, device=self.device)
        mask = additive_mask(key_position <= positions[:, None, :, None], self.k[0].dtype)

        def attend(layer, q, k, v):
            self.store(layer, place, k, v)
            k = self.k[layer][table].permute(0, 2, 1, 4, 3).flatten(2, 3)
            v = self.v[layer][table].transpose(1, 2).flatten(2, 3)
            return scaled_dot_product(q, k, v, mask)

        return attend

    def store(self, layer, place, k, v):
        self.k[layer].permute(0, 3, 1, 2)[place] = k.transpose(1, 2)
        self.v[layer].transpose(1, 2)[place] = v.transpose(1, 2)

    def decoding(self, positions):
        """Every page meets the query of its owner, as it lies; softmax is over all pages of a row.

        What is read is what is filled. For long completions that is nearly all that a step costs
        beyond the weights.
        """
        table, owner, start, to_rows, to_pages = self.layout
        pages, kv_heads, head_dim, page = self.k[0].shape
        own_page = table.gather(1, positions.clamp(min=0) // page)
        place = own_page * (positions >= 0), positions % page  # idle rows write to the dummy
        seen = start[:, None] + torch.arange(page, device=self.device) <= positions[owner]
        seen[0] = False  # the dummy
        hidden = additive_mask(seen, self.k[0].dtype, self.HIDDEN)
        hidden = hidden.repeat_interleave(kv_heads, 0)[:, None]

        def attend(layer, q, k, v):  # F.embedding(index, x) gathers rows of x
            self.store(layer, place, k, v)
            q = F.embedding(owner, q.flatten(1)).view(pages * kv_heads, -1, head_dim)
            score = torch.baddbmm(hidden, q, self.k[layer].flatten(0, 1), alpha=head_dim**-0.5)
            weight = F.embedding(to_rows, score.view(-1, page)).flatten(1)
            weight = weight.softmax(-1).view(-1, page)  # in float32 inside
            weight = F.embedding(to_pages, weight).view_as(score)
            out = torch.bmm(weight, self.v[layer].flatten(0, 1)).view(pages, -1)
            out[0] = 0  # the dummy
            return F.embedding(table, out).sum(1, keepdim=True)

        return attend


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
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


@dataclass(eq=False)
class Sample:
    """A completion in the making."""

    group: int  # index of its prompt
    prompt: list  # token ids
    key: int  # its stream of random numbers
    limit: int  # tokens
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    stopped: bool = False

    @property
    def filled(self):
        """Tokens of prompt and completion so far."""
        return len(self.prompt) + len(self.tokens)


class Slots:
    """The decoding rows: slot i decodes one sample and uses row i of the KV cache.

    running  a Sample per slot, or None where it is idle
    waiting  samples without a slot, in order

    The cache and the next-token logits (rows, V) stay on the device; each token costs one small
    copy to the host.
    """

    def __init__(self, model, prompts, keys, max_new_tokens, slots):
        """See `sample`."""
        self.model, self.prompts, self.waiting = model, prompts, deque()
        for group, (streams, limit) in enumerate(zip(keys, max_new_tokens)):
            for key, tokens in zip(streams, np.broadcast_to(limit, len(streams)).tolist()):
                self.waiting.append(Sample(group, prompts[group], key, tokens))
        self.slots = rows = max(MIN_ROWS, min(slots, len(self.waiting)))
        self.running = [None] * rows
        longest = max((sample.filled + sample.limit for sample in self.waiting), default=0)
        self.cache = KVCache(model, rows, longest)
        self.logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self.captured = None  # the layout of the cache for which `replay` stands
        # Of prompts whose samples still wait: a slot that holds its keys and values, first logits.
        self.source, self.first_logits = {}, {}

    @property
    def live(self):
        return [slot for slot, sample in enumerate(self.running) if sample]

    @property
    def filled(self):
        """Tokens of prompt and completion so far, of each live slot."""
        return np.array([self.running[slot].filled for slot in self.live])

    def refill(self):
        """Give every idle slot the next waiting sample."""
        idle = [slot for slot, sample in enumerate(self.running) if not sample]
        # A prompt that is still copied is overwritten only by its own group: its slot comes first.
        idle.sort(key=lambda slot: slot not in self.source.values())
        filled = idle[: len(self.waiting)]
        placed = defaultdict(list)  # group -> its new slots
        for slot in filled:
            sample = self.running[slot] = self.waiting.popleft()
            placed[sample.group].append(slot)
            self.source.setdefault(sample.group, slot)
        self.prefill_new()
        for group, slots in placed.items():
            self.cache.copy(self.source[group], slots, len(self.prompts[group]))
            self.logits[slots] = self.first_logits[group]
            if not self.waiting or self.waiting[0].group != group:
                del self.source[group], self.first_logits[group]

    def prefill_new(self):
        """Prefill the prompts that have a slot but no logits, the longest ones first."""
        new = [group for group in self.source if group not in self.first_logits]
        new.sort(key=lambda group: len(self.prompts[group]))
        while new:
            size = max(1, PREFILL_TOKENS // len(self.prompts[new[-1]]))
            self.prefill(new[-size:])
            del new[-size:]

    def prefill(self, groups):
        """Run these prompts into their cache rows; a beginning that all share goes through once."""
        prompts = [self.prompts[group] for group in groups]
        rows = [self.source[group] for group in groups]
        shared = 0
        if len(groups) > 1:  # at least one token is left to each
            shared = max(0, len(commonprefix(prompts)) - 1) // MIN_ROWS * MIN_ROWS
        if shared:
            self.extend(rows[:1], [prompts[0][:shared]], 0)
            self.cache.copy(rows[0], rows[1:], shared)
        rest = [prompt[shared:] for prompt in prompts]
        hidden = self.extend(rows, rest, shared)
        last = [len(tokens) - 1 for tokens in rest]
        logits = self.model.lm_head(hidden[range(len(rows)), last])
        self.first_logits.update(zip(groups, logits))

    def extend(self, rows, tokens, start):
        """Run token lists into these cache rows from `start`; -> hidden states (B, T, C)."""
        lengths = np.array([len(row) for row in tokens])
        width = -(-lengths.max() // MIN_ROWS) * MIN_ROWS
        self.cache.reserve(rows, start + lengths)
        self.cache.arrange()
        device = self.cache.device
        padded = [row + [0] * (width - len(row)) for row in tokens]
        ids, rows = torch.tensor(padded, device=device), torch.tensor(rows, device=device)
        positions = torch.arange(start, start + width, device=device).expand(ids.shape)
        return self.model.model(ids, positions, self.cache, rows)

    def advance(self, temperature, top_k, top_p):
        """Sample the next token of every slot."""
        samples = [sample or Sample(0, [], 0, 0) for sample in self.running]
        keys = np.array([sample.key for sample in samples], np.uint64)
        positions = np.array([len(sample.tokens) for sample in samples])
        u = self.cache.to_device(uniforms(keys, positions))
        tokens, logprobs = choose(self.logits, u, temperature, top_k, top_p)
        for sample, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist()):  # GPU sync
            sample.tokens.append(token)
            sample.logprobs.append(logprob)

    def retire(self, stop_ids):
        """Free the slots whose completion stopped or ran out; yields their samples."""
        for slot in self.live:
            sample = self.running[slot]
            sample.stopped = sample.tokens[-1] in stop_ids
            if sample.stopped or len(sample.tokens) == sample.limit:
                yield sample
                self.running[slot] = None
                # A prompt that will still be copied stays.
                kept = sample.prompt if slot in self.source.values() else []
                self.cache.cut(slot, len(kept))

    def compact(self):
        """Once nothing waits, drop idle rows whenever that halves the work."""
        live = self.live
        rows = max(len(live), MIN_ROWS)
        if self.waiting or not live or len(self.running) < 2 * rows:
            return
        kept = sorted(range(len(self.running)), key=lambda slot: not self.running[slot])[:rows]
        self.running = [self.running[slot] for slot in kept]
        self.logits = self.logits[kept]
        self.cache.keep(kept)

    def decode(self):
        """Feed every slot its last token."""
        live = self.live
        fed = np.zeros((2, len(self.running)), int)  # last token, its position (-1: idle)
        fed[1] = -1
        fed[0, live] = [self.running[slot].tokens[-1] for slot in live]
        fed[1, live] = self.filled - 1
        self.cache.reserve(live, self.filled)
        self.cache.arrange()
        if self.captured is not self.cache.layout:  # the first step, or tensors have moved
            self.logits = self.replay = None  # frees their memory first
            self.fed = self.cache.to_device(fed)
            self.replay = capture(self.forward, self.fed.device)
            self.captured = self.cache.layout
        self.fed.copy_(torch.from_numpy(fed), non_blocking=True)
        self.logits = self.replay()

    def forward(self):
        last, positions = self.fed[..., None]
        return self.model(last, positions, self.cache)[:, 0]


@torch.inference_mode()
def sample(
    model,
    prompts,
    keys,
    max_new_tokens,
    *,
    slots,
    stop_ids,
    temperature,
    top_k=0,
    top_p=1.0,
    on_finished=lambda num_tokens: None,
):
    """Complete every prompt; returns one list of Completion per prompt, in order.

    prompts         token lists
    keys            for each prompt the streams of its completions, see `stream`
    max_new_tokens  for each prompt the limit of its completions, or a list with one per completion
    slots           rows decoded together, at least MIN_ROWS (memory and speed only)
    stop_ids        a completion ends with the first of these ids, which is kept
    temperature     of the softmax; 0 is greedy. top_k (0: off) and top_p (1: off) are for
                    evaluation: the learner's softmax knows neither
    on_finished     called with the number of tokens of every finished completion
    """
    work = Slots(model, prompts, keys, max_new_tokens, slots)
    samples = list(work.waiting)
    with model.laid_out(len(work.running)):
        while work.waiting or work.live:
            work.refill()
            work.advance(temperature, top_k, top_p)
            for sample in work.retire(stop_ids):
                on_finished(len(sample.tokens))
            work.compact()
            if work.live:
                work.decode()
    done = [[] for _ in prompts]
    for sample in samples:
        done[sample.group].append(Completion(sample.tokens, sample.logprobs, sample.stopped))
    return done
