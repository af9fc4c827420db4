"""Runs in processes of their own, which a server that has imported everything forks."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import resource
import shlex
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = """train tools.report launch torch.distributed.tensor torch.distributed.fsdp
transformers.models.llama.configuration_llama transformers.models.qwen3.configuration_qwen3
transformers.tokenization_utils_tokenizers scipy.stats"""


@functools.cache
def server():
    """Not a fork of the test's own process: autograd does not work in a fork of a process that has
    used it."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD.split())
    return context


def quick():
    """Leave out what costs a run seconds."""
    from tools import report

    report.draw = lambda runs: "left out: it takes a second"


def child(folder, arguments, environment, sabotage, log, program):
    os.chdir(folder)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    torch.set_num_threads(1)
    quick()
    if sabotage:
        sabotage()
    code = 1
    try:
        code = importlib.import_module(program).main(arguments) or 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(folder, command, world=1, sabotage=None, program="train"):
    """Start PROGRAM.main(command) in `world` processes; `sabotage` runs first in each. What main
    returns is the exit code, None being 0."""
    arguments, environment = shlex.split(command), {}
    if world > 1 or "--fsdp" in arguments:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world):
        if environment:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = str(Path(folder) / f"log{rank}")
        given = str(folder), arguments, dict(environment), sabotage, log, program
        process = server().Process(target=child, daemon=True, args=given)
        process.start()
        processes.append(process)
    return processes


def wait(processes, seconds=120):
    """Exit codes. A process that does not end is killed and fails the test: it waits in vain."""
    for process in processes:
        process.join(seconds)
    stuck = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
    assert not stuck, f"processes {stuck} hang"
    return [process.exitcode for process in processes]


def said(folder, rank=0):
    return (Path(folder) / f"log{rank}").read_text()


# --------------------------------------------------------------------------------------- sabotage
# They run in the child, before the run begins.


def at_event(number, action):
    """Call action() at the number-th Python or C call that is made once training has begun.

    number None  prints how many there are, at the end
    """
    import train

    begin, count = train.train.__code__, []

    def profile(frame, event, argument):
        if event in ("call", "c_call") and (count or frame.f_code is begin):
            count.append(None)
            if len(count) == number:
                action()

    sys.setprofile(profile)
    if number is None:
        leave = os._exit

        def telling(code):
            sys.setprofile(None)
            print(f"\n{len(count)} events")
            leave(code)

        os._exit = telling


def at(where, number, action):
    """at_call, to be made in the child."""
    return functools.partial(at_call, where, number, action)


def at_call(where, number, action):
    """action(original) in place of the number-th call of where, "module.function" or
    "module.Class.function"; original() makes the call."""
    owner, name = find(where)
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def wrapper(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            return action(functools.partial(original, *arguments, **keywords))
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def find(where):
    path, _, name = where.rpartition(".")
    module, _, owner = path.rpartition(".")
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(path), name
    return getattr(importlib.import_module(module), owner), name


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def tell(number, original=None):
    """A signal arrives; if a call is under way, while it is."""
    os.kill(os.getpid(), number)
    return original() if original else None


def full_disk(path, original):
    """No file may grow beyond this one's size from now on: the kernel refuses the writes."""
    size = os.path.getsize(path) - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return original()


def fail(error, original):
    raise error
