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
UPDATE = {"prompts": 8, "group": 8, "new_tokens": 128, "steps": 3}
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


def make_workload(path, prompts, group, max_new, uniform=False):
    """Write JSON lines {"prompt": ids, "new_tokens": [one length per completion]}.

    Lengths are as reasoning models have them: log-normal, 40 % of max_new on average, a few per
    cent cut off there. Or, if uniform, all are max_new.
    """
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(prompts):
            prompt = [rng.randrange(4, 256) for _ in range(rng.randint(32, 96))]
            lengths = [max_new] * group
            if not uniform:
                drawn = (0.32 * max_new * rng.lognormvariate(0, 0.8) for _ in lengths)
                lengths = [min(max_new, max(8, int(n))) for n in drawn]
            print(json.dumps({"prompt": prompt, "new_tokens": lengths}), file=file)


def read_workload(path):
    """-> a list of (prompt, lengths of its completions)"""
    return [tuple(json.loads(line).values()) for line in Path(path).read_text().splitlines()]


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


def report(args, tokens, seconds, **more):
    """Print the line of JSON that a script ends with; mebibytes are held at most so far."""
    found = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    print(json.dumps(found | more | peak_memory(args)), flush=True)


def peak_memory(args):
    """Mebibytes that this process, and the GPU, held at most so far."""
    found = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10}
    if args.device != "cpu":
        found["peak_gpu_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return found
