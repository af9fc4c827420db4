"""Kernels: what a GPU may use, and packed weights for sampling on a CPU.

For few rows a product by oneDNN is faster with packed weights: copied once into the order in which
the kernel reads them. Some CPUs and builds of torch lack these kernels, or have them in float32
only. The name of a vendor does not tell, so `probe` tries them. Everything works without them.
"""

import ctypes
import os
import timeit
from contextlib import suppress
from pathlib import Path

# What glibc's malloc does with memory that torch has freed on a CPU, see mallopt(3): up to 2 GB
# stay with the process, but for blocks above 32 MB. By default so little stays that the pages of
# nearly every tensor are new, which took a third of the time of learning.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_FREE = 1 << 30  # bytes, see `give_back`

# Read at torch's first tensor: large tensors of a CPU then lie in pages of 2 MB where Linux has
# them. A new tensor of 256 MB takes 0.03 s to fill instead of 0.2 s.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with suppress(AttributeError, TypeError, OSError):  # other C libraries lack this call
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20):  # all versions take as much
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

# What torch raises where an operation does not exist, or has no kernel for this CPU or dtype.
MISSING = (RuntimeError, AttributeError)
GAIN = 1.1  # a kernel of oneDNN must be faster than torch's by this factor: a clock is not exact
_in_use = None  # the choice in force, see `chosen`
_others = 0  # bytes that `give_back` could not give, such as Python's

# Both act on a GPU alone. cuDNN's attention comes first on an H100 and makes a plan for every new
# shape, which takes up to a second; an update has hundreds of shapes.
torch.backends.cuda.enable_cudnn_sdp(False)
# A product in bfloat16 adds up its parts in float32.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class Malloc(ctypes.Structure):
    """What mallinfo2(3) tells. In use are numbers 4, `hblkhd`, and 7, `uordblks`, in bytes."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def give_back():
    """Give memory that is free to the system, also where it lies between blocks in use: batches of
    ever new shapes leave more and more of it. At most MOST_FREE stays."""
    global _others
    with suppress(AttributeError, OSError):  # other systems lack these calls
        if beyond_malloc() - _others > MOST_FREE:
            ctypes.CDLL(None).malloc_trim(0)
            _others = beyond_malloc()


def beyond_malloc():
    """Bytes of this process that are not in use by malloc: free, or Python's. malloc cannot tell
    which of its free pages the system has back already."""
    statm = Path("/proc/self/statm").read_text().split()
    resident = (int(statm[1]) - int(statm[2])) * os.sysconf("SC_PAGESIZE")
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Malloc
    numbers = mallinfo2().numbers
    return resident - numbers[4] - numbers[7]


def packed_linear(x, weight, bias=None):
    """x (..., I), packed weight (O, I), bias (O,) -> (..., O), without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight, rows):
    """A copy of the weight (O, I) for `packed_linear` with about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def probe():
    """Try the kernels and time them against torch's; takes some 50 ms.

    Returns what JSON can hold: {"packed": the dtypes in which sampling packs its weights}.
    """
    return {"packed": [name for name in ("float32", "bfloat16") if gain(name) > GAIN]}


def use(choice):
    """Set the choice for this process; returns what is used.

    What this machine cannot run is left to torch's kernel.
    """
    global _in_use
    _in_use = {"packed": list(filter(gain, choice["packed"]))}
    return _in_use


def chosen():
    """The choice in force. The first call probes, unless `use` came before."""
    return _in_use or use(probe())


def gain(name):
    """How many times as fast as torch's product that with packed weights is, in a layer of a real
    model; 0 where this machine has none.  name  of a dtype"""
    x, weight = (torch.ones(n, 576, dtype=getattr(torch, name), device="cpu") for n in (32, 1536))
    with suppress(*MISSING):
        packed = pack(weight, len(x))
        return seconds(F.linear, x, weight) / seconds(packed_linear, x, packed)
    return 0


def seconds(linear, x, weight):
    """The fastest of a few times that the product takes."""
    return min(timeit.repeat(lambda: linear(x, weight), number=1, repeat=5))


def packs(device, dtype):
    """Whether sampling packs its weights. device: "cpu" or "cuda"."""
    return device == "cpu" and str(dtype).removeprefix("torch.") in chosen()["packed"]
