"""The processes of a run. `torchrun --nproc_per_node=N` starts N of them, plain python is a world of one.

Sampling, grading and gradients are spread over the processes; everything else, the buffer included, every process holds
and decides itself, from the same numbers: so all take the same branches, and none waits for another in vain. A process
may raise on its own only inside `together`, which raises on all.
"""

import copy
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(
    days=1
)  # a rank whose completions are short waits for the others: torchrun ends it if one dies
SHARDS_ON_CPU = torch.__version__ >= (
    2,
    10,
)  # before 2.9 gloo adds up where FSDP2 asks for a mean; 2.9 rounds the factor that clips


class Stop(Exception):
    """The run cannot go on. The message says why, and what to do."""


class Ranks:
    """This process among `size`.

    size, rank  from torchrun's environment; 1 and 0 without it
    device      of this process: "cpu", or its own GPU
    signal      the SIGINT or SIGTERM that came, or None. It takes effect in `together` at once, elsewhere at the next
                `check`, so that no collective operation and no optimizer step is torn.
    """

    def __init__(self, device="cpu", sharded=False):
        self.size, self.rank = (
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("RANK", "0")),
        )
        self.device, self.sharded, self.signal, self.listening = (
            torch.device(device),
            sharded,
            None,
            False,
        )
        if sharded and "RANK" not in os.environ:
            raise ValueError(
                "--fsdp needs the processes that torchrun starts: torchrun --nproc_per_node=N train.py --fsdp (or --fsdp False)"
            )
        if sharded and device == "cpu" and not SHARDS_ON_CPU:
            raise ValueError(
                f"--fsdp on CPUs needs torch 2.10 or newer (this is {torch.__version__}): older ones compute other gradients"
            )
        if device == "cuda" and self.size > 1:
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"torchrun started more processes than this machine's {torch.cuda.device_count()} GPU(s)"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if (self.size > 1 or sharded) and not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE
            )

    @property
    def first(self):
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------------ work

    def share(self, items):
        """This process's part of a list: contiguous, of equal number."""
        return items[
            len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size
        ]

    def spread(self, items, work):
        """work(share) -> one result an item, each process for its share; the results of all, in order, on all."""
        return [
            result
            for part in self.together(lambda: work(self.share(items)), gather=True)
            for result in part
        ]

    def from_first(self, work):
        """work() of the first process, on every process."""
        return self.together(lambda: work() if self.first else None, gather=True)[0]

    def together(self, work, interruptible=True, gather=False):
        """work(), on every process; what one raises, Ctrl-C included, is raised on all. gather: the results of all."""
        mine = failure = None
        try:
            try:
                self.listening = interruptible
                if interruptible and self.signal:
                    raise KeyboardInterrupt
                mine = work()
            finally:
                self.listening = False
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        everyone = [(mine, None)]
        if self.size > 1:  # an exception travels as its kind and its words
            kinds = (KeyboardInterrupt, Stop, ValueError, OSError, Exception)
            words = failure and (
                next(k for k in kinds if isinstance(failure, k)),
                f"process {self.rank}: {failure}",
            )
            everyone = [None] * self.size
            dist.all_gather_object(everyone, (mine if gather else None, words))
        elif failure:
            raise failure
        failed = next((rank for rank, (_, words) in enumerate(everyone) if words), None)
        if failed is not None:  # one failure for all, lest each act on its own
            kind, message = everyone[failed][1]
            raise failure if failed == self.rank else kind(message)
        return [result for result, _ in everyone] if gather else mine

    # --------------------------------------------------------------------------------------------------- numbers

    def sum(self, numbers):
        """{name: number} -> the sums over all processes, float64."""
        return self._reduce(numbers, dist.ReduceOp.SUM if self.size > 1 else None)

    def max(self, numbers):
        return self._reduce(numbers, dist.ReduceOp.MAX if self.size > 1 else None)

    def _reduce(self, numbers, operation):
        if self.size == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(values, operation)
        return dict(zip(numbers, values.tolist()))

    def sum_gradients(self, parameters):
        """Every gradient becomes the sum over all processes (under FSDP the backward pass has done it)."""
        if self.size > 1 and not self.sharded:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)

    # --------------------------------------------------------------------------------------------------- signals

    @contextmanager
    def signals(self):
        """Ctrl-C and SIGTERM end the block by a KeyboardInterrupt, on all processes, where the state is whole."""

        def receive(number, _):
            self.signal = number
            if self.listening:
                self.listening = False  # once: what follows is saving
                raise KeyboardInterrupt

        before = {
            number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self):
        """Raise KeyboardInterrupt on all processes if one was told to stop."""
        if self.max({"signal": self.signal or 0})["signal"]:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Where there are other processes, end this one at once, with what the interpreter would have said. Left to the
        interpreter, gloo's threads now and then wait for a peer that has gone (torch 2.6), or abort a process whose run has
        gone well, since FSDP2 keeps hold of the process group."""
        if not dist.is_initialized():
            return
        code = (
            error.code or 0 if kind is SystemExit else 0 if kind is None else 1
        )  # ours exit with numbers
        if kind not in (None, SystemExit):
            sys.excepthook(kind, error, trace)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    # -------------------------------------------------------------------------------------------------- sharding

    def shard(self, model):
        """A copy of the model that FSDP2 cuts over the processes: float32 (or wider) weights, which are the masters,
        computing in the model's own dtype."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        dtype = model.lm_head.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sharded = copy.deepcopy(model).to(wide)
        mesh = init_device_mesh(self.device.type, (self.size,))
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
        for part in (*sharded.model.layers, sharded):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        register_fsdp_forward_method(sharded, "token_logprobs")
        return sharded


def whole(tensor):
    """The full tensor of a shard, gathered from all processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(parameter, tensor):
    """A full tensor laid out as the parameter is: on its device, or cut into its shards."""
    tensor = tensor.to(parameter.device)
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
