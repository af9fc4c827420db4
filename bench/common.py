"""What the benchmarks share: random models of three sizes, workloads, the machine's two ceilings."""

import json
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import Qwen2Config

from model import Transformer
from tools.warmstart import make_tokenizer

SIZES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "2m": (128, 384, 4, 4, 2, 2048),
    "11m": (320, 896, 8, 10, 2, 8192),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}


def make_model(size, out, seed=0):
    """A random Qwen2 in a Hugging Face folder, with a tokenizer and a chat template."""
    torch.manual_seed(seed)
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[size]
    tokenizer = make_tokenizer()
    model = Transformer(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_workload(prompts, group, max_new, uniform=False, seed=0):
    """Requests in the form {"prompt": ids, "new_tokens": [one length per completion]}. Lengths as reasoning models have
    them: log-normal, on average 40 % of the longest, a few per cent cut off there; or all of them the longest."""
    rng = random.Random(seed)
    length = lambda: (
        max_new
        if uniform
        else min(max_new, max(8, int(0.32 * max_new * rng.lognormvariate(0, 0.8))))
    )  # noqa: E731
    return [
        {
            "prompt": [rng.randrange(4, 256) for _ in range(rng.randint(32, 96))],
            "new_tokens": [length() for _ in range(group)],
        }
        for _ in range(prompts)
    ]


def read_workload(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def best_seconds(work, repeats=5):
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ceilings(dtype, device="cpu"):
    """Matrix products, FLOP/s, in this dtype; memory bandwidth, bytes/s, of a copy (read and write)."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in "ab")
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    flops = 2 * n**3 / best_seconds(lambda: (a @ b, wait()))
    big = torch.randn((1 << 26) if device == "cpu" else (1 << 30), device=device)
    copy = torch.empty_like(big)
    bandwidth = 2 * big.numel() * 4 / best_seconds(lambda: (copy.copy_(big), wait()))
    return flops, bandwidth


def peak_rss_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        2**20 if sys.platform == "darwin" else 2**10
    )


def decode_cost(model, slots, positions):
    """FLOPs and bytes of one decoded token in a step of `slots` rows that hold `positions` tokens each on average: weights
    once a step, keys and values of the row."""
    config, layers = model.config, len(model.model.layers)
    weights = (
        sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
        + model.lm_head.weight.numel() * model.config.tie_word_embeddings
    )
    size = model.lm_head.weight.element_size()
    attention = 4 * layers * config.num_attention_heads * model.head_dim * positions
    cached = 2 * layers * config.num_key_value_heads * model.head_dim * positions * size
    return 2 * weights + attention, weights * size / slots + cached
