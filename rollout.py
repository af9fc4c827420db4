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
from itertools import chain
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
    z = keys + (positions.astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
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


def round_up(count, multiple):
    return -(-count // multiple) * multiple


class KVCache:
    """Keys and values of every layer for independent rows, each with as many pages as it needs.

    k, v   one tensor per layer, (pages, K, D, P) and (pages, K, P, D): the order in which products
           with queries and weights read them
    table  (rows, most pages of a row) on the host: the pages of each row in order, then zeros.
           Page 0 is a dummy. Idle rows and prompt padding write to it; attention never reads it.
    width  columns of the table that the device knows

    A query at position q sees position p of its row iff p <= q. What a page holds beyond that (the
    padding of a prefill, tokens of an earlier row) is overwritten before it can be seen.
    """

    # Positions of a page. Small pages waste less, large ones make less work. MIN_ROWS divides them.
    PAGE = {"cpu": 32, "cuda": 256}
    # (s, w): the pool of pages grows by at least 1/s of itself, and the width is a multiple of w.
    # Both change rarely on a GPU, since each time the decoding step must be captured again.
    GROWTH = {"cpu": (8, 1), "cuda": (2, 4)}

    def __init__(self, model, rows, longest):
        """longest: tokens that a row may hold"""
        kind, layers = model.device.type, model.config.num_hidden_layers
        self.page, self.growth = self.PAGE[kind], self.GROWTH[kind]
        self.heads, self.device = model.config.num_attention_heads, model.device
        size = 1, model.config.num_key_value_heads, model.head_dim, self.page
        empty = model.lm_head.weight.new_zeros(size)
        self.k = [empty.clone() for _ in range(layers)]
        self.v = [empty.mT.contiguous() for _ in range(layers)]
        self.table, self.width = np.zeros((rows, self.num_pages(longest)), np.int64), 0
        self.layout, self.changed = (), True

    def num_pages(self, tokens):
        return round_up(tokens, self.page) // self.page

    # Pages are given and taken on the host; `arrange` tells the device.

    def reserve(self, rows, lengths):
        """Make room for positions below lengths (one per row), keeping what is stored."""
        slack, wider = self.growth
        needed = self.num_pages(lengths)
        self.width = max(self.width, round_up(needed.max(), wider))
        pages = self.table[rows]
        new = (pages == 0) & (np.arange(pages.shape[1]) < needed[:, None])
        if not new.any():
            return
        in_pool = len(self.k[0])
        held = np.append(0, self.table)
        free = np.flatnonzero(np.bincount(held, minlength=in_pool) == 0)
        wanted = new.sum() - len(free)
        if wanted > 0:
            more = max(wanted, min(in_pool // slack, 1 + self.table.size - in_pool))
            free = np.append(free, np.arange(in_pool, in_pool + wanted))
            # Copies of the dummy, since what is not seen must be finite too: 0 * nan is nan.
            self.gather_pages(np.append(np.arange(in_pool), np.zeros(more, int)))
        pages[new] = free[: new.sum()]
        self.table[rows] = pages
        self.changed = True

    def cut(self, row, length):
        """Take back the pages of this row beyond length."""
        self.table[row, self.num_pages(length) :] = 0
        self.changed = True

    def copy(self, source, targets, length):
        """Copy the first `length` positions of row source to the rows targets."""
        self.reserve(targets, np.full(len(targets), length))
        pages = self.num_pages(length)
        old = self.to_device(self.table[source, :pages])
        new = self.to_device(self.table[targets, :pages])
        for pool in self.k + self.v:
            pool[new] = pool[old]

    def keep(self, rows):
        """Keep only these rows, renumbered in this order, and the pages that they hold."""
        table = self.table[rows]
        pages = np.unique(np.append(0, table))
        self.gather_pages(pages)
        self.table = np.searchsorted(pages, table)
        self.width, self.changed = table.any(0).sum(), True

    def gather_pages(self, pages):
        """Make new pools, in which page i is a copy of the old page pages[i]."""
        pages = self.to_device(pages)
        for pools in (self.k, self.v):
            for layer, pool in enumerate(pools):
                pools[layer] = pool[pages]

    def to_device(self, array):
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def arrange(self):
        """Send the index tensors of attention to the device, if the table has changed.

        As long as `layout` is the same object, neither these tensors nor the pools have moved in
        memory (a pool that moves has another number of pages), so a captured step may be replayed.
        """
        if not self.changed:
            return
        table = self.table[:, : self.width].copy()
        owner, number = np.zeros((2, len(self.k[0])), np.int64)  # of each page: row, place in it
        row, place = np.nonzero(table)
        owner[table[row, place]] = row
        number[table[row, place]] = place
        table, owner, number = map(self.to_device, (table, owner, number))
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

    def prefilling(self, positions, rows):
        """-> attend, see Body.forward: row b of the tokens, at positions (B, T), is rows[b]."""
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
        """-> attend for one token per row, at positions (rows, 1), or idle at -1.

        Each page is multiplied in place by the query of the row that owns it; softmax is over all
        pages of a row. Only filled pages are read. For long completions that is nearly all that a
        step costs beyond the weights.
        """
        table, owner, start, to_rows, to_pages = self.layout
        pages, kv_heads, head_dim, page = self.k[0].shape
        own_page = table.gather(1, positions.clamp(min=0) // page)
        place = own_page * (positions >= 0), positions % page  # idle rows write to the dummy
        seen = start[:, None] + torch.arange(page, device=self.device) <= positions[owner]
        seen[0] = False  # the dummy
        hidden = additive_mask(seen, self.k[0].dtype)
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
class SharedPrompt:
    """A prompt and where its keys and values are.

    Once it is prefilled, and as long as some of its samples wait, a slot keeps it to be copied.
    """

    tokens: list
    slot: int = None
    logits: torch.Tensor = None  # (V,) of the first token to sample


@dataclass(eq=False)
class Sequence:
    """A completion in the making."""

    prompt: SharedPrompt
    key: int  # its stream of random numbers
    limit: int  # tokens
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    stopped: bool = False

    @property
    def filled(self):
        """Tokens of prompt and completion so far."""
        return len(self.prompt.tokens) + len(self.tokens)


class Slots:
    """The decoding rows: slot i decodes one sample and uses row i of the KV cache.

    groups   the samples of each prompt
    running  a Sequence per slot, or None where it is idle
    waiting  samples without a slot, group by group

    The cache and the next-token logits (rows, V) stay on the device; each token costs one small
    copy to the host.
    """

    def __init__(self, model, prompts, keys, max_new_tokens, slots):
        """See `sample`."""
        self.model, self.groups = model, []
        for tokens, streams, limit in zip(prompts, keys, max_new_tokens):
            prompt, limits = SharedPrompt(tokens), np.broadcast_to(limit, len(streams)).tolist()
            self.groups.append([Sequence(prompt, *each) for each in zip(streams, limits)])
        self.waiting = deque(sample for sample in chain(*self.groups) if sample.limit)
        self.slots = rows = max(MIN_ROWS, min(slots, len(self.waiting)))
        self.running = [None] * rows
        longest = max((sample.filled + sample.limit for sample in self.waiting), default=0)
        self.cache = KVCache(model, rows, longest)
        self.logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self.captured = None  # the layout of the cache for which `replay` stands

    @property
    def live(self):
        return [slot for slot, sample in enumerate(self.running) if sample]

    @property
    def filled(self):
        """Tokens of prompt and completion so far, of each live slot."""
        return np.array([self.running[slot].filled for slot in self.live])

    def refill(self):
        """Give every idle slot the next waiting sample."""
        if not self.waiting:
            return
        idle = [slot for slot, sample in enumerate(self.running) if not sample]
        # The slot that keeps a prompt comes first, so that only a sample of this prompt gets it.
        idle.sort(key=lambda slot: slot != self.waiting[0].prompt.slot)
        placed = defaultdict(list)  # prompt -> its new slots
        for slot in idle[: len(self.waiting)]:
            sample = self.running[slot] = self.waiting.popleft()
            placed[sample.prompt].append(slot)
        new = [prompt for prompt in placed if prompt.slot is None]
        new.sort(key=lambda prompt: len(prompt.tokens))
        while new:  # the longest ones first
            size = max(1, PREFILL_TOKENS // len(new[-1].tokens))
            self.prefill(new[-size:], [placed[prompt][0] for prompt in new[-size:]])
            del new[-size:]
        for prompt, slots in placed.items():
            self.cache.copy(prompt.slot, slots, len(prompt.tokens))
            self.logits[slots] = prompt.logits
            if not self.waiting or self.waiting[0].prompt is not prompt:
                prompt.slot = prompt.logits = None

    def prefill(self, prompts, rows):
        """Run prompts into these cache rows; a beginning that all share goes through once."""
        tokens, shared = [prompt.tokens for prompt in prompts], 0
        if len(rows) > 1:  # at least one token is left to each
            shared = max(0, len(commonprefix(tokens)) - 1) // MIN_ROWS * MIN_ROWS
        if shared:
            self.extend(rows[:1], [tokens[0][:shared]], 0)
            self.cache.copy(rows[0], rows[1:], shared)
        rest = [row[shared:] for row in tokens]
        last = [len(row) - 1 for row in rest]
        hidden = self.extend(rows, rest, shared)[range(len(rows)), last]
        for prompt, slot, logits in zip(prompts, rows, self.model.lm_head(hidden)):
            prompt.slot, prompt.logits = slot, logits

    def extend(self, rows, tokens, start):
        """Run token lists into these cache rows from `start`; -> hidden states (B, T, C)."""
        lengths = np.array([len(row) for row in tokens])
        width = round_up(lengths.max(), MIN_ROWS)
        self.cache.reserve(rows, start + lengths)
        self.cache.arrange()
        device = self.cache.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=device)
        positions = torch.arange(start, start + width, device=device).expand(ids.shape)
        attend = self.cache.prefilling(positions, torch.tensor(rows, device=device))
        return self.model.model(ids, positions, attend)

    def advance(self, temperature, top_k, top_p):
        """Sample the next token of every slot."""
        samples = [sample or Sequence(None, 0, 0) for sample in self.running]
        keys = np.array([sample.key for sample in samples], np.uint64)
        positions = np.array([len(sample.tokens) for sample in samples])
        u = self.cache.to_device(uniforms(keys, positions))
        tokens, logprobs = choose(self.logits, u, temperature, top_k, top_p)
        chosen = torch.stack([tokens.double(), logprobs.double()]).tolist()  # one GPU sync
        for sample, token, logprob in zip(samples, *chosen):
            sample.tokens.append(int(token))
            sample.logprobs.append(logprob)

    def retire(self, stop_ids):
        """Free the slots whose completion stopped or ran out; yields their samples."""
        for slot in self.live:
            sample = self.running[slot]
            sample.stopped = sample.tokens[-1] in stop_ids
            if sample.stopped or len(sample.tokens) == sample.limit:
                yield sample
                self.running[slot] = None
                keeps_prompt = sample.prompt.slot == slot
                self.cache.cut(slot, len(sample.prompt.tokens) if keeps_prompt else 0)

    def compact(self):
        """Once nothing waits, drop idle rows whenever that halves the work."""
        rows = max(len(self.live), MIN_ROWS)
        if self.waiting or len(self.running) < 2 * rows:
            return
        kept = sorted(range(len(self.running)), key=lambda slot: not self.running[slot])[:rows]
        self.running = [self.running[slot] for slot in kept]
        self.logits = self.logits[kept]
        self.cache.keep(kept)

    def decode(self):
        """Feed every slot its last token."""
        live = self.live
        # The last token of each slot, and its position (-1: idle).
        fed = np.array([[0], [-1]]).repeat(len(self.running), 1)
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
        return self.model(last, positions, self.cache.decoding(positions))[:, 0]


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
    with model.laid_out(len(work.running)):
        while work.waiting or work.live:
            work.refill()
            work.advance(temperature, top_k, top_p)
            for sample in work.retire(stop_ids):
                on_finished(len(sample.tokens))
            work.compact()
            if work.live:
                work.decode()
    return [[Completion(s.tokens, s.logprobs, s.stopped) for s in group] for group in work.groups]
