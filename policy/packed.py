"""Joined and packed weights, with which a policy samples; what malloc does with freed memory.

On a GPU the layers that read one input are one product: fewer kernels.

For few rows a product by oneDNN is faster with packed weights: copied once into the order in which
the kernel reads them. Some CPUs and builds of torch lack this kernel, or have it in float32 only.
The name of a vendor does not tell, so it is tried. Everything works without it.
"""

import ctypes
import functools
import math
import os
from contextlib import contextmanager, suppress

# What glibc's malloc does with memory that torch has freed on a CPU, see mallopt(3): up to 2 GB
# stay with the process, but for blocks above 32 MB. By default so little stays that the pages of
# nearly every tensor are new, which took a third of the time of learning.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

# Read at torch's first tensor: large tensors of a CPU then lie in pages of 2 MB where Linux has
# them. A new tensor of 256 MB takes 0.03 s to fill instead of 0.2 s.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with suppress(AttributeError, TypeError, OSError):  # other C libraries lack this call
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20):  # all versions take as much
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from model import MLP, Attention  # noqa: E402
from policy.lora import add_factors  # noqa: E402

JOINED = {Attention: ("q_proj", "k_proj", "v_proj"), MLP: ("gate_proj", "up_proj")}
# What torch raises where an operation does not exist, or has no kernel for this CPU or dtype.
MISSING = (RuntimeError, AttributeError)


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
    replaced, joined = [], set()
    try:
        for module in model.modules() if packs else ():  # from the outside to the inside
            if names := JOINED.get(type(module)):
                layers = [getattr(module, name) for name in names]
                joined.update(layers)
                replaced.append((module, "project"))
                module.project = product(layers, rows)
            elif on_cpu and isinstance(module, nn.Linear) and module not in joined:
                project = product([module], rows)
                replaced.append((module, "forward"))
                module.forward = lambda x, project=project: project(x)[0]
        yield
    finally:
        for module, method in replaced:
            vars(module).pop(method, None)  # that of its class is in force again


def joined_bytes(model):
    """Of the weights that `packed` joins on a GPU."""
    layers = (getattr(m, name) for m in model.modules() for name in JOINED.get(type(m), ()))
    return sum(layer.weight.nbytes for layer in layers)


@torch.no_grad()
def product(layers, rows):
    """-> a function of x, which these layers read: [the output of each], by one product"""
    weight, bias, linear = torch.cat([layer.weight for layer in layers]), None, F.linear
    if not weight.is_cuda:
        weight, linear = pack(weight, rows), packed_linear
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


def pack(weight, rows):
    """A copy of the weight (O, I) for `packed_linear` with about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


@functools.cache
def has_kernel(dtype):
    """Whether this machine has the product with packed weights."""
    x = torch.ones(32, 64, dtype=dtype, device="cpu")
    with suppress(*MISSING):
        packed_linear(x, pack(x, len(x)))
        return True
    return False
