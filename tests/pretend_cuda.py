"""A pretended CUDA card on a CPU, for a process of its own: `install` changes torch for good.

Numbers are those of the CPU; the rules of devices are CUDA's. Storages are marked as on the card,
and a tensor's `device` follows the mark. An operation raises if its operands are on two devices, or
if the host waits, or its memory is read, while a graph is captured. A CUDA graph is the operations
of its capture, which are done again on the same memory. gloo stands for NCCL.

It tells nothing of speed, nor which kernels a GPU has: only `_flash_attention_forward`, which a CPU
lacks, is computed here.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)  # that of this process: the others have theirs
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
happened = []  # in order: each replay of a graph, and each operation for which the host waited
capturing = []  # the graph that is being captured
real_device, real_to, real_tolist = Tensor.device.__get__, Tensor.to, Tensor.tolist


def device_of(x):
    device = real_device(x)
    x = getattr(x, "_local_tensor", x)  # of a shard
    marked = device.type == "cpu" and getattr(x.untyped_storage(), "on_card", False)
    return CARD if marked else device


def wait(name):
    if capturing:
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    happened.append(name)


class Card(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FakeTensor in types:
            return func(*args, **(kwargs or {}))
        if set(types) - {Tensor, Parameter}:
            return NotImplemented  # shards: their parts come here
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        asked = [x.type for x in leaves if isinstance(x, torch.device)]
        on_card = [x for x in tensors if x.is_cuda]
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        if on_card or "cuda" in asked:
            self.check(name, args, kwargs, on_card, [x for x in on_cpu if x.dim()])
        if func is torch.ops.aten._flash_attention_forward.default:
            result = [filled_attention(*args, **kwargs)] * 5
        else:
            result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        known = {x.untyped_storage()._cdata for x in tensors}
        if on_card or "cuda" in asked:
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                    x.untyped_storage().on_card = True
        if capturing:
            capturing[-1].steps.append((func, args, kwargs, result))
        return result

    def check(self, name, args, kwargs, on_card, on_cpu):
        if name in INDEXING:
            where = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool or not x.is_cuda for x in where):
                wait(f"{name} by booleans, or from the host")
            on_cpu = [x for x in on_cpu if all(x is not y for y in where)]
        elif name in WAITING:
            wait(name)
        elif name in COPIES and on_cpu:
            if capturing or not (kwargs.get("non_blocking") or True in args[2:3]):
                wait(name)
            return
        if on_card and on_cpu:
            raise RuntimeError(f"{name}: operands on two devices")


def to_cpu(x):
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def to(x, *args, copy=False, **kwargs):
    """Tensor.to, which would see no difference between the card and the CPU."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    like = [y.device for y in args if isinstance(y, Tensor)]
    device = like[0] if like else device or x.device
    if device.type == x.device.type:
        return real_to(x, dtype or x.dtype, copy=copy)
    if capturing or device.type == "cpu" or not non_blocking:
        wait("to")
    result = real_to(x, dtype or x.dtype, copy=True)
    result.untyped_storage().on_card = device.type == "cuda"
    return result


def tolist(x):
    if x.is_cuda:
        wait("tolist")
    return real_tolist(x)


def tensor(data, *, device=None, real=torch.tensor, **options):
    made = real(data, **options)
    return made.to(device) if device else made


def new_tensor(x, data, dtype=None, device=None):
    return torch.tensor(data, dtype=dtype or x.dtype, device=device or x.device)


def pad_sequence(rows, *options, real=torch._C._nn.pad_sequence):
    """It makes its result of options, which tell the real device."""
    made = real(rows, *options)
    if rows[0].is_cuda:
        made.untyped_storage().on_card = True
    return made


def filled_attention(q, k, v, starts_q, starts_k, longest_q, room, *options, seqused_k):
    """Each sequence's attention to as many keys as it says, in float32. q (R, heads, D) has a token
    of each, k and v (R * S, 1, D) as many positions of each, which begin at its start."""
    assert real_tolist(starts_q) == list(range(len(q) + 1)) and longest_q == 1
    assert {x.dtype for x in (starts_q, starts_k, seqused_k)} == {torch.int32}
    assert {x.itemsize for x in (q, k, v)} == {2} and options == (0.0, False, False)
    where = starts_k[:-1, None] + torch.arange(room)
    k, v = (x.squeeze(1)[where].float() for x in (k, v))
    unseen = torch.arange(k.shape[1]) >= seqused_k[:, None, None]
    score = q.float() @ k.mT * q.shape[-1] ** -0.5
    return (score.masked_fill(unseen, -torch.inf).softmax(-1) @ v).to(q.dtype)


class CUDAGraph:
    def __init__(self):
        self.steps = []

    def replay(self):
        happened.append("replay")
        for func, args, kwargs, results in self.steps:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(again), tree_leaves(results)):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    y.copy_(x)


@contextlib.contextmanager
def graph(of, **_):
    capturing.append(of)
    try:
        yield
    finally:
        capturing.pop()


def install(free=79e9):
    """free: bytes of memory that the card has left"""
    global CARD
    CARD = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    Tensor.device, Tensor.is_cuda = property(device_of), property(lambda x: x.device.type == "cuda")
    Tensor.to, Tensor.cpu, Tensor.tolist = to, lambda x: to(x, "cpu"), tolist
    Tensor.numpy = lambda x, real=Tensor.numpy: real(x) if not x.is_cuda else 1 / 0
    Tensor.new_tensor, torch.tensor = new_tensor, tensor
    torch._C._nn.pad_sequence = pad_sequence
    fake = dict(CUDAGraph=CUDAGraph, graph=graph, device_count=lambda: 2)
    fake |= dict(is_available=lambda: True)
    fake |= {name: lambda *_: 0 for name in ("memory_reserved", "memory_allocated", "_lazy_init")}
    fake |= dict(mem_get_info=lambda _: (int(free), 80 << 30), max_memory_allocated=lambda: 0)
    fake |= dict(set_device=lambda _: None, current_device=lambda: CARD.index)
    fake |= dict(get_device_capability=lambda _: (8, 0))
    torch.backends.cuda.is_flash_attention_available = lambda: True
    for name in ("Stream", "Event", "current_stream", "stream"):
        fake[name] = getattr(torch.cpu, name)
    vars(torch.cuda).update(fake)
    begin = dist.init_process_group
    dist.init_process_group = lambda _, **options: begin("gloo", **options)
    Card().__enter__()
