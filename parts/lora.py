"""LoRA (arXiv 2106.09685): the weights stay as they are, and low-rank factors beside them learn.

    W x + alpha / r B A x      W (O, I) frozen, A (r, I) and B (O, r) learned: model.Linear

Sampler and learner both compute this sum. A merged copy of W would take its memory once more, and
in bfloat16 it would lose small changes. An adapter's files are PEFT's. The header of the tensors
names the files of the base by their SHA-256.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from model import Linear, at_least_float32, check_tensors
from parts.files import explained, sha256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = ".safetensors", "/config.json"  # what its files that must not change end in


def layers(model):
    """[(last part of its name, linear layer), ...] of the decoder's blocks"""
    modules = model.model.named_modules()
    return [(name.rpartition(".")[2], m) for name, m in modules if isinstance(m, Linear)]


def add(model, rank, alpha, targets=None, seed=0):
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
        "lora_alpha": config["lora_alpha"],
        "target_modules": config["lora_targets"] or list(dict(layers(model))),
    }
    (folder / CONFIG).write_text(json.dumps(adapter, indent=1))
    files = config["model_files"].items()
    base = {Path(path).name: digest for path, digest in files if path.endswith(BASE)}
    # One entry: several would be written in any order, and the same adapter in other bytes.
    metadata = {"base": json.dumps(base, sort_keys=True)}
    save_file(tensors(model), folder / WEIGHTS, metadata)


def read_config(folder):
    """adapter_config.json; None if there is none. Raises ValueError"""
    if (folder / CONFIG).is_file():
        with explained(f"{folder / CONFIG}: not a JSON object that names its base"):
            config = json.loads((folder / CONFIG).read_text())
            Path(config["base_model_name_or_path"])  # fails unless it is a text
            return config


def load(model, config, folder, base):
    """Give a model the factors that `save` wrote; on the meta device their shapes alone.

    config  see read_config
    base    the folder that the model was read from: it must be the one that was trained
    Raises ValueError
    """
    with explained(f"{folder}: not an adapter of {base} that train.py wrote"):
        add(model, config["r"], config["lora_alpha"], config["target_modules"])
        if model.device.type == "meta":
            return
        trained = json.loads(safe_open(folder / WEIGHTS, "pt").metadata()["base"])
        for name in trained.keys() | {path.name for path in base.glob("*.safetensors")}:
            if sha256(base / name) != trained.get(name):
                raise ValueError(f"its {name} is not what it was")
        factors = load_file(folder / WEIGHTS)
        check_tensors(folder, factors, tensors(model))
        for name, factor in tensors(model).items():
            factor.copy_(factors[name])
