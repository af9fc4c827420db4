"""LoRA (arXiv 2106.09685): the weights stay as they are, and low-rank factors beside them learn.

    W x + alpha / r B A x      W (O, I) frozen, A (r, I) and B (O, r) learned: model.Linear

Sampler and learner both compute this sum. A merged copy of W would take its memory once more, and
in bfloat16 it would lose small changes. An adapter's files are PEFT's.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from files import explained
from model import Linear, at_least_float32, check_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def layers(model):
    """[(last part of its name, linear layer), ...] of the decoder's blocks"""
    modules = model.model.named_modules()
    return [(name.rpartition(".")[2], m) for name, m in modules if isinstance(m, Linear)]


def add(model, rank, alpha=32, targets=None, seed=0):
    """Freeze the model, and give it factors that change nothing yet: A random as in PEFT, B zero.

    targets  such as ["q_proj", "v_proj"]; None: all layers of the blocks
    Raises ValueError
    """
    known = dict(layers(model))
    targets = targets or known
    if not known.keys() >= set(targets):
        raise ValueError(f"--lora-targets must be among {' '.join(known)}, found {targets}")
    if rank > model.config.hidden_size:
        raise ValueError(f"--lora-rank {rank} is more than the hidden size of the model")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
    for name, layer in layers(model):
        if name in targets:
            A, B = torch.empty(rank, layer.in_features), torch.zeros(layer.out_features, rank)
            nn.init.kaiming_uniform_(A, math.sqrt(5), generator=generator)
            layer.lora_A, layer.lora_B = (
                nn.Parameter(at_least_float32(x.to(layer.weight))) for x in (A, B)
            )
            layer.scale = alpha / rank


def tensors(model):
    """{name in PEFT's file: factor}"""
    named = model.named_parameters()
    return {f"base_model.model.{name}.weight": p.data for name, p in named if p.requires_grad}


def save(model, folder, config):
    """Write an adapter.  config: config.json of its run"""
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config["model"],
        "revision": config["revision"],
        "r": config["lora_rank"],
        "lora_alpha": 32,
        "target_modules": list(dict(layers(model))),
    }
    (folder / CONFIG).write_text(json.dumps(adapter, indent=1))
    save_file(tensors(model), folder / WEIGHTS)


def read_config(folder):
    """adapter_config.json; None if there is none. Raises ValueError"""
    if (folder / CONFIG).is_file():
        with explained(f"{folder / CONFIG}: not a JSON object that names its base"):
            config = json.loads((folder / CONFIG).read_text())
            Path(config["base_model_name_or_path"])  # fails unless it is a text
            return config


def load(model, config, folder):
    """Give a model the factors that `save` wrote.

    config  see read_config
    Raises ValueError
    """
    with explained(f"{folder}: not an adapter of its base that train.py wrote"):
        add(model, config["r"], config["lora_alpha"], config["target_modules"])
        factors = load_file(folder / WEIGHTS)
        check_tensors(folder, factors, tensors(model))
        for name, factor in tensors(model).items():
            factor.copy_(factors[name])
