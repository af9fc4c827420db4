"""LoRA (arXiv 2106.09685): the weights stay as they are, and low-rank factors beside them learn.

    W x + alpha / r B A x      W (O, I) frozen, A (r, I) and B (O, r) learned

All linear layers of the decoder's blocks have factors, which does better than attention alone at
equal numbers of parameters (Schulman et al. 2025, LoRA Without Regret). Sampler and learner both
compute this sum. A merged copy of W would take its memory once more, and in bfloat16 it would lose
small changes. The factors have the dtype of W. In bfloat16 they have float32 masters, as all other
learned weights have (policy/learner.py). An adapter's files are PEFT's.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import explained
from model import check_tensors

ALPHA = 32  # with alpha / r as the scale the best --lr hardly depends on the rank (the same)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraLinear(nn.Linear):
    """A linear layer with factors lora_A (r, I) and lora_B (O, r), and a scale."""

    def forward(self, x):
        return add_factors(self, x, super().forward(x))


def add_factors(layer, x, out):
    """Return out + scale B A x, or only out if the layer has no factors."""
    if not isinstance(layer, LoraLinear):
        return out
    low_rank = F.linear(x, layer.lora_A).flatten(0, -2)
    total = torch.addmm(out.flatten(0, -2), low_rank, layer.lora_B.t(), alpha=layer.scale)
    return total.view(out.shape)


def add(model, rank, alpha=ALPHA, seed=0):
    """Freeze the model, and give it factors that change nothing yet: A random as in PEFT, B zero.

    Raises ValueError
    """
    if rank > model.config.hidden_size:
        raise ValueError(f"--lora-rank {rank} is more than the hidden size of the model")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = LoraLinear  # its weight and bias stay as they are
            layer.scale = alpha / rank
            A = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(A, math.sqrt(5), generator=generator)
            layer.lora_A = nn.Parameter(A.to(layer.weight))
            layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))


def tensors(model):
    """{name in PEFT's file: factor}"""
    named = model.named_parameters()
    return {f"base_model.model.{name}.weight": p.data for name, p in named if p.requires_grad}


def save(model, folder, base, rank):
    """Write an adapter.  base  folder or hub name of the frozen weights"""
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
    }
    (folder / CONFIG).write_text(json.dumps(adapter, indent=1))
    save_file(tensors(model), folder / WEIGHTS)


def read_config(folder):
    """adapter_config.json; None if there is none. Raises ValueError"""
    path = folder / CONFIG
    if path.is_file():
        with explained(f"{path}: not a JSON object that names its base"):
            config = json.loads(path.read_text())
            Path(config["base_model_name_or_path"])  # fails unless it is a text
            return config


def load(model, config, folder):
    """Give a model the factors that `save` wrote.

    config  see read_config
    Raises ValueError
    """
    with explained(f"{folder}: not an adapter of its base that train.py wrote"):
        if set(config["target_modules"]) != set(TARGETS):
            raise ValueError(f"target_modules must be all of {' '.join(TARGETS)}")
        add(model, config["r"], config["lora_alpha"])
        factors, own = load_file(folder / WEIGHTS), tensors(model)
        check_tensors(folder, factors, own)
        for name in own:
            own[name].copy_(factors[name])
