"""The processes of a run. `torchrun --nproc_per_node=N` starts N of them; plain python is one.

Sampling, grading and gradients are spread over the processes. Every process keeps a full copy of
all other state, the buffer included, and computes the same decisions from it, so none waits for a
message that never comes. A process may raise on its own only inside `on_all`, which raises on
all; where memory runs out elsewhere, see run/command.py.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from common.files import Stop, squash

# In `gather`: a process whose completions are short waits for the others. If one dies, torchrun
# ends all.
PATIENCE = timedelta(days=1)
# Gradients and shards travel once all processes learn, or save. A process that waits longer for
# them waits in vain: NCCL then says what it waited for, and ends the process.
HANG = timedelta(minutes=30)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def is_first():
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def set_up_output():
    """The first process prints, the others nothing. What a terminal cannot spell is \\u4e00."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for as long as it lives
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has it not
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def keep_freed_memory():
    """Make memory of a CPU that torch has freed stay with this process, on Linux.

    By default the system takes so much of it back that the pages of nearly every tensor are new,
    which took a third of the time of learning. glibc's malloc is told to keep up to 2 GB, but no
    blocks above 32 MB. Tensors that large lie in pages of 2 MB where the system has them: a new
    tensor of 256 MB takes 0.03 s to fill instead of 0.2 s. torch reads this setting at its first
    tensor, so the function is called before there is one.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with suppress(AttributeError):  # other C libraries have no mallopt
        if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20):  # every version accepts 32 MB
            ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def refuse(error, code=2):
    """End the program with one line of one process; 2 is the exit code of bad input."""
    if is_first():
        program = os.path.basename(sys.argv[0])
        print(f"{program}: {'error: ' * (code == 2)}{squash(str(error))}", file=sys.stderr)
    sys.exit(code)


def leave(main):
    """Call main(), and end this process at once, with what the interpreter would have said.

    Left to the interpreter, gloo's threads now and then wait for a process that has gone (torch
    2.6), or abort a process whose run has gone well, since FSDP2 keeps hold of the process group.
    And it would wait for the threads that a user's coroutine has started (asyncio.to_thread), which
    may hang. Processes that a reward has started by multiprocessing end with it.
    """
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):  # their reader may have gone
            sys.stdout.flush()
            sys.stderr.flush()
        for child in multiprocessing.active_children():  # last: a pool would start others
            child.kill()
        os._exit(code)


# An error is raised on the other processes as the first of these kinds that it is.
KINDS = KeyboardInterrupt, Stop, ValueError, OSError, torch.OutOfMemoryError, Exception


class Ranks:
    """This process among `size`.

    size, rank  from torchrun's environment; 1 and 0 without it
    first       whether this is the process that writes and prints
    device      of this process: "cpu", or its own GPU
    signal      number of the SIGINT or SIGTERM that came, or None. It takes effect at once inside
                an `on_all` that is interruptible, elsewhere at the next one, so that no update is
                left half done. Further signals change nothing.
    """

    def __init__(self, device="cpu", sharded=False):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.first = is_first()
        self.device, self.sharded = torch.device(device), sharded
        self.signal, self.interruptible, self.process = None, False, os.getpid()
        if sharded and "RANK" not in os.environ:
            raise ValueError("--fsdp needs torchrun --nproc_per_node=N train.py --fsdp")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
        if device == "cuda" and self.size > 1:
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            if local >= torch.cuda.device_count():
                raise ValueError("torchrun started more processes than there are GPUs here")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.size > 1 or sharded:
            if not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=HANG)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)  # what `gather` uses

    # ------------------------------------------------------------------------------------- work

    def share_out(self, items, work):
        """work(share) -> one result per item, each process for a contiguous share of about equal
        number; the results of all, in order, on all."""
        start, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        parts = self.gather(self.on_all(lambda: work(items[start:end])))
        return [result for part in parts for result in part]

    def from_first(self, work, interruptible=True):
        """work() of the first process, on every process."""
        result = [self.on_all(lambda: self.first and work(), interruptible)]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def on_all(self, work, interruptible=True):
        """work() on every process; what one raises, Ctrl-C included, is raised on all."""
        result = failure = words = None
        try:
            try:
                self.interruptible = interruptible
                if interruptible and self.signal:
                    raise KeyboardInterrupt
                result = work()
            finally:
                self.interruptible = False
        except KINDS as error:
            kind = next(kind for kind in KINDS if isinstance(error, kind))
            failure, words = error, (kind, f"process {self.rank}: {error}")
        for rank, told in enumerate(self.gather(words)):
            if told:  # the first failure, for all, lest each process acts on its own
                kind, message = told
                raise failure if rank == self.rank else kind(message)
        return result

    def raise_signals(self):
        """Let a signal that has come take effect now, on all processes."""
        self.on_all(lambda: None)

    def gather(self, value):
        """The values of all processes, in their order, on all."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    # ---------------------------------------------------------------------------------- signals

    @contextmanager
    def signals(self):
        """Ctrl-C and SIGTERM end the block by a KeyboardInterrupt, on all processes, where the
        state is whole."""
        numbers = signal.SIGINT, signal.SIGTERM
        before = [signal.signal(number, self.receive) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def receive(self, number, _):
        if os.getpid() != self.process:  # what a reward has forked has this handler too
            os._exit(128 + number)
        self.signal = self.signal or number
        if self.interruptible:
            self.interruptible = False  # once: what follows is saving
            raise KeyboardInterrupt
