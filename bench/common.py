"""What the benchmarks share: flags, random models, workloads, and the two ceilings of the machine.

The peers run in a virtual environment of their own and import this file too, so it imports the
project's modules only where it makes a model.
"""

import argparse
import json
import random
import resource
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "2m": (128, 384, 4, 4, 2, 2048),
    "11m": (320, 896, 8, 10, 2, 8192),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}


def arguments(description, **numbers):
    """A parser of the flags that all scripts have, and of one integer flag per keyword."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    precisions = ("highest", "high", "medium")
    parser.add_argument("--precision", choices=precisions, default="highest", help="of float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser


def make_model(size, out, seed=0):
    """A random Qwen2 in a Hugging Face folder, with a tokenizer and a chat template."""
    from transformers import Qwen2Config

    from model import Transformer
    from tools.warmstart import make_tokenizer

    torch.manual_seed(seed)
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[size]
    tokenizer = make_tokenizer()
    config = Qwen2Config(
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
    model = Transformer(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_workload(prompts, group, max_new, uniform=False, seed=0):
    """Rows {"prompt": ids, "new_tokens": [one length per completion]}. Lengths are as reasoning
    models have them: log-normal, 40 % of max_new on average, a few per cent cut off there; or, if
    uniform, all max_new."""
    rng = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = [rng.randrange(4, 256) for _ in range(rng.randint(32, 96))]
        lengths = [max_new] * group
        if not uniform:
            lengths = [int(0.32 * max_new * rng.lognormvariate(0, 0.8)) for _ in range(group)]
        rows.append({"prompt": prompt, "new_tokens": [min(max_new, max(8, n)) for n in lengths]})
    return rows


def read_workload(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def best_seconds(statement, **variables):
    timer = Timer(statement, globals=variables, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=1).times)


def ceilings(dtype, device):
    """FLOP/s of a matrix product in this dtype; bytes/s of a copy, reading and writing."""
    n, floats = (2048, 1 << 26) if device == "cpu" else (8192, 1 << 30)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.randn(floats, device=device)
    flops = 2 * n**3 / best_seconds("a @ b", a=a, b=b)
    copy = best_seconds("b.copy_(a)", a=source, b=torch.empty_like(source))
    return flops, 2 * source.nbytes / copy


def peak_memory(device="cpu"):
    """Megabytes that the process took at most so far, and the GPU."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    found = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    if device != "cpu":
        found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found
