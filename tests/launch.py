"""Training runs in processes of their own, started in milliseconds: a server that has imported everything forks them."""

import functools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

from infra.ranks import SHARDS_ON_CPU

ROOT = Path(__file__).resolve().parents[1]
NO_FSDP = "--fsdp on CPUs needs a newer torch"


@functools.cache
def server():
    """Not a fork of the test's own process: autograd refuses to work in a fork of a process that has used it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    context = multiprocessing.get_context("forkserver")
    lazy = [
        "transformers.models.llama.configuration_llama",
        "transformers.models.qwen3.configuration_qwen3",
        "transformers.tokenization_utils_tokenizers",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
    ]
    context.set_forkserver_preload(["train", "tools.report", "launch", *lazy])
    return context


def child(folder, arguments, environment, sabotage, log):
    os.chdir(folder)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)
    from tqdm import tqdm

    import train
    from tools import report

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    torch.set_num_threads(1)
    report.draw = lambda runs: "left out: it takes a second"
    if sabotage:
        sabotage()
    code = 1
    try:
        train.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def start(folder, arguments, world=1, sabotage=None):
    """Start train.main(arguments) in `world` processes; `sabotage`, a function of a module, runs first in each."""
    if "--fsdp" in arguments and not SHARDS_ON_CPU:
        pytest.skip(NO_FSDP)
    port = 0
    if world > 1 or "--fsdp" in arguments:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = (
            {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if port
            else {}
        )
        process = server().Process(
            target=child,
            daemon=True,
            args=(
                str(folder),
                list(map(str, arguments)),
                {k: str(v) for k, v in environment.items()},
                sabotage,
                str(Path(folder) / f"log{rank}"),
            ),
        )
        process.start()
        processes.append(process)
    return processes


def wait(processes, seconds=120):
    """Exit codes; a process that does not end is killed and fails the test: somewhere it waits in vain."""
    for process in processes:
        process.join(seconds)
    stuck = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
    assert not stuck, f"processes {stuck} hang"
    return [process.exitcode for process in processes]


def said(folder, rank=0):
    return (Path(folder) / f"log{rank}").read_text()


def words(**flags):
    """{name: value} as a command line."""
    result = []
    for name, value in flags.items():
        result.append(f"--{name.replace('_', '-')}")
        result += (
            [] if value is True else list(map(str, value if isinstance(value, tuple) else [value]))
        )
    return result


# ---------------------------------------------------------------------------------------------------------- sabotage
# Made with functools.partial; they run in the child, before the run begins.


def products_by_onednn():
    import model

    model.SLOW_BLAS = True


def at_call(where, number, action):
    """Call action(original, arguments) in place of the number-th call of where, "module.function" or "module.Class.function"."""
    import importlib

    module, *path, name = where.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def wrapper(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            return action(functools.partial(original, *arguments, **keywords), arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def die(original, arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(original, arguments):
    original()
    die(None, None)


def die_writing(original, arguments):
    """Leave half of the file that would have been written. arguments: (what, path)"""
    original()
    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
    die(None, None)


def die_appending(original, arguments):
    """Leave half of the lines that would have been appended. arguments: (run, name, rows)"""
    path = arguments[0].out / arguments[1]
    before = path.stat().st_size if path.exists() else 0
    original()
    os.truncate(path, (before + path.stat().st_size) // 2)
    die(None, None)


def full_disk(path, original, arguments):
    """No file may grow beyond the size of this one from now on: the kernel itself refuses the writes."""
    size = os.path.getsize(path) - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return original()


def told_to_stop(number, original, arguments):
    """A signal arrives while this call is under way."""
    os.kill(os.getpid(), number)
    return original()
