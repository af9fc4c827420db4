"""Joined and packed weights, with which a policy samples.

On a GPU the layers that read one input are one product: fewer kernels.

For few rows a product by oneDNN is faster with packed weights: copied once into the order in which
the kernel reads them. Some CPUs and builds of torch lack this kernel, or have it in float32 only.
The name of a vendor does not tell, so it is tried. Everything works without it.
"""

import functools
import math
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Attention
from policy.lora import add_factors

JOINED = {Attention: ("q_proj", "k_proj", "v_proj"), MLP: ("gate_proj", "up_proj")}


@contextmanager
def packed(model, rows, free=math.inf):
    """Within the block, inference uses the weights of this moment, joined, and on a CPU packed for
    about `rows` rows.

    That costs as much as one decoding step, and the memory of these weights once more. On a CPU
    without the kernel, or on a GPU where the copies take more than a quarter of its `free` bytes,
    the block changes nothing.
    """
    on_cpu = model.device.type == "cpu"
    if on_cpu:
        packs = has_kernel(model.lm_head.weight.dtype)
    else:
        packs = 4 * joined_bytes(model) <= free
    joined = set()
    try:
        for module in model.modules() if packs else ():  # from the outside to the inside
            if names := JOINED.get(type(module)):
                layers = [getattr(module, name) for name in names]
                joined.update(layers)
                module.project = product(layers, rows)
            elif on_cpu and isinstance(module, nn.Linear) and module not in joined:
                project = product([module], rows)
                module.forward = lambda x, project=project: project(x)[0]
        yield
    finally:
        for module in model.modules():  # the methods of its class are in force again
            vars(module).pop("project", None)
            vars(module).pop("forward", None)


def joined_bytes(model):
    """Of the weights that `packed` joins on a GPU."""
    layers = (getattr(m, name) for m in model.modules() for name in JOINED.get(type(m), ()))
    return sum(layer.weight.nbytes for layer in layers)


@torch.no_grad()
def product(layers, rows):
    """-> a function of x, which these layers read: [the output of each], by one product"""
    weight, bias, linear = torch.cat([layer.weight for layer in layers]), None, F.linear
    if not weight.is_cuda:
        weight, linear = torch.ops.mkldnn._reorder_linear_weight(weight, rows), packed_linear
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    sizes = [layer.out_features for layer in layers]

    def project(x):
        outputs = linear(x, weight, bias).split(sizes, -1)
        return [add_factors(layer, x, out) for layer, out in zip(layers, outputs)]

    return project


def packed_linear(x, weight, bias=None):
    """x (..., I), packed weight (O, I), bias (O,) -> (..., O), without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def has_kernel(dtype):
    """Whether this machine has the product with packed weights."""
    x = torch.ones(32, 64, dtype=dtype, device="cpu")
    # Raised where an operation does not exist, or has no kernel for this CPU or dtype.
    with suppress(RuntimeError, AttributeError):
        packed_linear(x, torch.ops.mkldnn._reorder_linear_weight(x, len(x)))
        return True
    return False
