"""What the benchmarks share: flags, random models, workloads, a clock, the machine's top speed.

The peers have a virtual environment of their own and import this file too. It imports the project's
modules only where it makes a model.
"""

import argparse
import json
import random
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size"
)
# The last three are Qwen2.5's; the 7b alone has a head that is not the embedding.
SIZES = {
    "2m": "128 384 4 4 2 2048",
    "11m": "320 896 8 10 2 8192",
    "135m": "576 1536 30 9 3 49152",
    "0.5b": "896 4864 24 14 2 151936",
    "1.5b": "1536 8960 28 12 2 151936",
    "7b": "3584 18944 28 28 4 152064",
}
MODEL = {
    "model": "",
    "dtype": "float32",
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
WORK = {"prompts": 8, "group": 8, "new_tokens": 128}
SAMPLING = {"slots": 32, "repeats": 3}
KINDS = {bool: {"action": "store_true"}, int: {"type": int}, list: {"nargs": "+"}, str: {}}


def parse(docstring, **flags):
    """The command line. A flag has the type of its default."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in flags.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=default, **KINDS[type(default)])
    return parser.parse_args()


def numbers(size):
    """Those of SHAPE."""
    return map(int, SIZES[size].split())


def make_model(size, out, dtype=torch.float32, device="cpu"):
    """A random Qwen2 in a Hugging Face folder, with a tokenizer and a chat template."""
    from transformers import Qwen2Config

    from experiments.warmstart import make_tokenizer
    from model import Transformer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = dict(zip(SHAPE.split(), numbers(size)), tie_word_embeddings=size != "7b")
    shape |= {"max_position_embeddings": 8192, "eos_token_id": tokenizer.eos_token_id}
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Transformer(Qwen2Config(**shape))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    torch.set_default_dtype(torch.float32)


def workload(args):
    """A list of (prompt, lengths of its completions), of --prompts x --group.

    Lengths are as reasoning models have them: log-normal, 40 % of --new-tokens on average, a few
    per cent cut off there.
    """
    rng, work = random.Random(0), []
    for _ in range(args.prompts):
        prompt = [rng.randrange(4, 256) for _ in range(rng.randint(32, 96))]
        lengths = []
        for _ in range(args.group):
            drawn = int(0.32 * args.new_tokens * rng.lognormvariate(0, 0.8))
            lengths.append(min(args.new_tokens, max(8, drawn)))
        work.append((prompt, lengths))
    return work


def reward(problem, text):
    """Differs within a group, whatever the model can do."""
    return sum(map(ord, text)) % 7 < 3


def seconds(work, repeats=1):
    """Median wall time of work()."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def product_speed(args):
    """FLOP/s of a large matrix product in this dtype."""
    n = 2048 if args.device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=args.device).to(getattr(torch, args.dtype))
    return 2 * n**3 / seconds(lambda: a @ b, 3)


def say(**found):
    """Print a line of JSON."""
    for name, value in found.items():
        if isinstance(value, float):
            found[name] = float(f"{value:.4g}")
    print(json.dumps(found), flush=True)


def report(args, tokens, seconds, **more):
    """The line that a script ends with; mebibytes are held at most so far."""
    if args.device != "cpu":
        more["peak_gpu_mib"] = torch.cuda.max_memory_allocated() // 2**20
    more["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    say(tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds, **more)
