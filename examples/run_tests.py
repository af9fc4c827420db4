"""Tests of a program, safe from its mistakes and its tricks, not from an attacker (gVisor is).

    python train.py --data "assets/programs.jsonl[:200]" --reward examples/run_tests.py:reward ...

A program runs in a process of its own. Before its first line that process gives up all system calls
but CALLS (by seccomp): it can compute, take memory, write to the two files that it has, and end. It
opens no file, reaches no network, starts no process and sends no signal, even in machine code. The
kernel limits its processor time, memory and output. It dies with the run.

The process has the arguments of the tests, not their results: those are compared outside. A program
that exits, prints, or patches `assert` and `==` only changes what it returns itself.

It is no sandbox against an attacker. What remains: a hole of the kernel in one of CALLS, and side
channels of the processor. And a program that is right for these tests alone is called right. It
needs Linux on x86_64; elsewhere `reward` raises an error.
"""

import ctypes
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

CPU_SECONDS = 2  # of processor time, the start included; a busy machine changes no verdict
WALL_SECONDS = 30  # a program that waits reaches it; a busy machine should not
MEMORY_BYTES = 256 << 20  # address space
OUTPUT_BYTES = 256 << 10  # of all that it returns, and of all that it prints
# What a program can import: these, and what they import. It cannot open the files of others.
MODULES = """__future__ _strptime bisect collections copy dataclasses datetime decimal fractions
functools heapq itertools math operator re statistics string typing"""
CALLS = (1, 9, 11, 12, 25, 202, 231)  # write, mmap, munmap, brk, mremap, futex, exit_group
X86_64 = 0xC000003E


def reward(problem, response):
    """1.0 if the program in the response passes all tests of the problem, else 0.0"""
    return float(share(problem, response) == 1)


def share(problem, response):
    """The share of the tests that it passes: a reward that grows step by step.

    problem   {"function": name, "tests": [[arguments, result], ...]}, arguments and results in JSON
    response  a text with a program, see `program`
    """
    if not problem["tests"]:
        raise ValueError("no tests")
    arguments, results = zip(*problem["tests"])
    outputs = run(program(response, problem["function"]), problem["function"], arguments)
    return sum(same(out, [result]) for out, result in zip(outputs, results)) / len(results)


def program(response, name):
    """The last block of ``` that defines the function, or the last one, or all of the text."""
    blocks = response.split("```")[1::2] or ["\n" + response]
    defining = [block for block in blocks if f"def {name}" in block]
    return (defining or blocks)[-1].partition("\n")[2]  # behind the language


def same(value, expected):
    """Types count: neither True nor 1.0 is 1. Floats may differ in their last digits."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(value, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    return value == expected


def run(text, function, arguments):
    """What the function returns, call by call: [value], or [] if it raised an error. They are fewer
    if the process died. Raises RuntimeError if no program can be run here."""
    with tempfile.TemporaryDirectory() as folder:
        returned, printed = Path(folder, "returned"), Path(folder, "printed")
        # Each is open for writing alone: what was written can be neither read nor replaced.
        with (
            returned.open("wb") as out,
            printed.open("wb") as err,
            suppress(subprocess.TimeoutExpired),
        ):
            subprocess.run(
                [sys.executable, "-S", __file__],
                input=json.dumps([text, function, arguments]).encode(),
                stdout=out,
                stderr=err,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},  # sets have one order
                start_new_session=True,
                timeout=WALL_SECONDS,
            )
        first, *lines = returned.read_bytes().splitlines() or [b""]
        if first != b"ready":
            why = printed.read_text().strip()[-300:] or "Python ended, or did not start in time"
            raise RuntimeError(f"no program can be run here: {why}")
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return []


def serve():
    """The process of a program. Nothing that comes after "ready" can be trusted."""
    import resource  # here, so that Windows comes to the error of `run`

    text, function, arguments = json.load(sys.stdin)
    for name in MODULES.split():
        importlib.import_module(name)
    returned = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output kills
    limits = {
        resource.RLIMIT_FSIZE: OUTPUT_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    give_up_system_calls()
    os.write(returned, b"ready\n")
    names = {}
    exec(text, names)
    for each in arguments:
        try:
            line = json.dumps([names[function](*each)])
        except Exception:
            line = "[]"
        os.write(returned, f"{line}\n".encode())


def give_up_system_calls():
    """From here on all system calls but CALLS fail with EPERM, for ever: seccomp(2)"""
    load, equal, back = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x50001, 0x80000000
    # (instruction, steps to skip if it holds, if not, value); the numbers of CALLS mean other calls
    # on other machines.
    steps = [(load, 0, 0, 4), (equal, 1, 0, X86_64), (back, 0, 0, kill), (load, 0, 0, 0)]
    for call in CALLS:
        steps += [(equal, 0, 1, call), (back, 0, 0, allow)]
    steps += [(back, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    prctl = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: if the parent dies
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code)))  # PR_SET_SECCOMP
    with suppress(PermissionError):
        os.open("/", os.O_RDONLY)
        sys.exit("the kernel does not filter system calls")


if __name__ == "__main__":
    serve()
