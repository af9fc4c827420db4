"""What the tests share: tiny random models and a toy policy, made here; no network, no GPU."""

import gc
import json
import re
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from pytest import fail, fixture, mark
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from experiments.warmstart import make_tokenizer
from model import Transformer
from policy.checkpoint import Policy

OPTIONS = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("suite", derandomize=True, max_examples=12, **OPTIONS)
settings.register_profile("long", max_examples=600, **OPTIONS)
settings.load_profile("suite")
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def write_lines(path, rows):
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return json.loads(Path(path).read_text())


def lines(path):
    """Rows of a log; nan and infinity are no JSON."""

    def refuse(name):
        fail(f"{name} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def column(rows, name):
    return [row[name] for row in rows]


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def edit(path, changes):
    """Change some fields of a JSON file."""
    path.write_text(json.dumps((read(path) if path.exists() else {}) | changes))


def spoil(path, change):
    """change: {the fields that are other}, = all that the file holds now, or nothing: it is gone"""
    if change.startswith("="):
        path.write_text(change[2:])
    elif change:
        edit(path, json.loads(change))
    else:
        path.unlink()


def table(text):
    """Lines of "cell | cell | ..." -> [[cell, cell, ...]]"""
    return [re.split(r" *\|(?: |$)", line) for line in text.strip("\n").splitlines()]


SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)


@fixture(autouse=True)
def one_thread():
    """Threads that spin on a busy machine cost more than they give at these sizes."""
    torch.set_num_threads(1)


@fixture
def printed(capsys):
    """What was printed since it was last asked for."""
    return lambda: capsys.readouterr().out


def peak(work):
    """-> work(); bytes that torch held meanwhile, at most, and afterwards, beyond those before"""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
        gc.collect()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most, held


families = mark.parametrize("family", ["llama", "qwen2", "qwen3"])
norms = mark.parametrize("norm", ["sequence", "token", "constant"])
dtypes = mark.parametrize("dtype", ["float64", "float32", "bfloat16"])


def small_config(family="llama", **changes):
    return CONFIGS[family](**{**SMALL, **changes})


def random_model(family="llama", dtype=torch.float32, seed=0, **changes):
    """A model with weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model = Transformer(small_config(family, **changes))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.25)
        else:  # norms are 1 and biases 0 on average, as they were
            torch.nn.init.normal_(p, mean=p.min().item(), std=0.1)
    return model.to(dtype)


@fixture
def model():
    return random_model()


@fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@fixture(scope="session")
def toy_folder(tmp_path_factory, tokenizer):
    """A checkpoint folder: one layer, the byte tokenizer, random weights."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Transformer(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # tied: near-uniform at first
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@fixture
def toy_policy(toy_folder):
    return Policy.load(str(toy_folder))
