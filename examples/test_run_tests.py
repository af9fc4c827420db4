"""examples/run_tests.py: what programs return, and what they try."""

import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pytest import fixture, mark, raises

from data import only_gradable, read_problems
from examples.programs import generate
from rewards import import_file
from tools.overlap import overlap

ASSETS = Path(__file__).parents[1] / "assets"
FILE = ASSETS.parent / "examples/run_tests.py"
runner = import_file(FILE)
PROBLEM = {"function": "f", "tests": [[[1], 2], [[5], 6]]}
GOOD = "def f(n):\n    return n + 1\n"
pytestmark = mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86_64"
)


@fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Whatever happens, no folder is left."""
    parent = tmp_path / "temporary"
    parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    yield tmp_path
    assert not list(parent.iterdir())


def share(text, tests=PROBLEM["tests"]):
    return runner.share({"function": "f", "tests": tests}, text)


# ------------------------------------------------------------------------------- honest programs


BLOCKS = [
    GOOD,
    f"So:\n```python\n{GOOD}```\nIt adds one.",
    f"```\n{GOOD}```",
    f"```python\n{GOOD}",
    f"```python\ndef f(n):\n    return n\n```\nNo:\n```py\n{GOOD}```",
    f"```python\n{GOOD}```\nFor example:\n```python\nprint(f(1))\n```",
    f"```python\nfrom __future__ import annotations\n{GOOD}```\n```",
]


@mark.parametrize("text", BLOCKS)
def test_the_last_block_with_the_function_is_the_program(text):
    """Or all of the text, and a block may be cut off at its end. The language is no code."""
    assert runner.reward(PROBLEM, text) == 1


@mark.parametrize("text", ["", "n + 1", f"```\n{GOOD}```\n```\ndef f(n):\n pass\n```", "```", "\0"])
def test_without_a_program_nothing_is_right(text):
    """An earlier block gives no credit for the last one."""
    assert share(text) == 0


def test_all_tests_must_pass():
    """The share is exact. A call that raises is wrong, and the next one is another test."""
    text = "def f(n):\n    return n + 1 if n != 1 else 1 / 0"
    assert share(text) == 0.5 and runner.reward(PROBLEM, text) == 0
    with raises(ValueError):  # not: all of none are right
        runner.reward(PROBLEM | {"tests": []}, GOOD)


VALUES = [  # returned, expected, right?
    ("1", 1, True),
    ("True", 1, False),
    ("1", True, False),
    ("1.0", 1, False),
    ("0.1 + 0.2", 0.3, True),
    ("0.301", 0.3, False),
    ("float('nan')", 0.0, False),
    ("(1, [2])", [1, [2]], True),
    ("[1, 2]", [1], False),
    ("[1]", [1, 2], False),
    ("[True]", [1], False),
    ("{'a': 1.0}", {"a": 1.0}, True),
    ("{'a': 1, 'b': 2}", {"a": 1}, False),
    ("{'a': True}", {"a": 1}, False),
    ("'é\\n\\ud800'", "é\n\ud800", True),
    ("None", None, True),
    ("{1}", [1], False),  # no JSON
    ("1 / 0", None, False),
    ("10 ** 5000", 0, False),  # Python reads no number of so many digits
    ("f", None, False),
]


def test_results_are_equal_in_value_and_type():
    """A call that returns no JSON is wrong, whatever was expected."""
    calls = ", ".join(f"lambda: {returned}" for returned, _, _ in VALUES)
    text = f"calls = [{calls}]\ndef f(i):\n    return calls[i]()"
    outputs = runner.run(text, "f", [[i] for i in range(len(VALUES))])
    rights = [runner.same(out, [row[1]]) for out, row in zip(outputs, VALUES, strict=True)]
    assert rights == [right for *_, right in VALUES]


def test_a_program_may_print_and_import():
    """What it prints does not come between its results. It is not run as a script."""
    text = "import collections.abc, heapq, math, re, statistics, typing\nprint('[2]')\n"
    text += "try:\n    import numpy\nexcept ImportError:\n    pass\n"
    text += "if __name__ == '__main__':\n    input()\n"
    assert share(text + GOOD.replace("return", "print('[7]', flush=True); return")) == 1


def test_sets_have_one_order():
    """Else a program has its reward by chance, and no run repeats another."""
    text = "def f():\n    return ''.join({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    first, second = (runner.run(text, "f", [[]]) for _ in range(2))
    assert first == second and len(first[0][0]) == 7


def test_many_threads_call_it_at_once():
    """Verdicts are not mixed up."""
    texts = [f"def f(n):\n    return n + {i % 2}" for i in range(24)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(share, texts)) == [0, 1] * 12


# ------------------------------------------------------------------------------ hostile programs


# Each is right but for what it tries: if it succeeds it is called right.
HOSTILE = {
    "endless loop": "while True:\n    pass",
    "one endless operation, which no handler of signals interrupts": "10 ** 10 ** 10",
    "fork": "import os\nif not os.fork():\n    os._exit(0)",
    "threads": "import _thread\n_thread.start_new_thread(print, ())",
    "memory": "all_of_it = bytes(1 << 30)",
    "memory, bit by bit": "parts = [bytes(10**6) for _ in range(1000)]",
    "a gigabyte printed": "for _ in range(1 << 20):\n    print('x' * 1023)",
    "a gigabyte printed, errors caught": """
import os
for _ in range(1 << 20):
    try:
        os.write(2, b'x' * 1024)
    except OSError:
        pass
""",
    "a gigabyte before its results": """
import os
for _ in range(1 << 20):
    os.write(3, b' ' * 1024)
""",
    "a large result": "def f(n):\n    return 'x' * (1 << 20)",
    "a megabyte of brackets": "import os\nos.write(3, b'[' * 200_000 + b'\\n')",
    "bytes that are no text": "import os\nos.write(3, b'\\xff\\xfe\\n')",
    "exit before the tests": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in a test": "def f(n):\n    raise SystemExit(0)",
    "exit after a right result": """
import os
f = lambda n: os._exit(0) if n == 5 else n + 1
""",
    "the line of the runner replaced": """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
ctypes.memmove(libc.mmap(None, 4096, 3, 1, 3, 0), b'wrong', 5)
""",
    "abort": "import os\nos.abort()",
    "endless recursion": "f = lambda n: f(n)",
    "equal to everything": """
class Same(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
f = lambda n: Same(0)
""",
    "patches": """
import builtins, json
json.dumps = lambda value: 'true'
builtins.all = builtins.isinstance = lambda *_: True
f = lambda n: 1
""",
    "a verdict of its own": "import os\nos.write(3, b'true\\npassed\\n1.0\\n')",
}


@mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_is_never_right(text):
    """And it does not stop the run. Processor time is limited, whatever the clock says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert share(f"{GOOD}{text}") < 1
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < runner.CPU_SECONDS + 1


def test_a_program_that_waits_is_stopped(monkeypatch):
    """A deadlock takes no processor time."""
    monkeypatch.setattr(runner, "WALL_SECONDS", 3)
    wait = "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"
    start = time.monotonic()
    assert share(GOOD + wait) == 0
    assert 3 <= time.monotonic() - start < 20  # a busy machine


SEARCH = """
import gc, sys
found, frame = gc.get_objects(), sys._getframe()
while frame:
    found += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
found = [str(each) for each in found if isinstance(each, (list, tuple, dict, str))]
found += sys.argv, sys.orig_argv
results = '-'.join(['first', '7316']), '-'.join(['second', '9524'])
results = [r for r in results if any(r in str(f) for f in found)]
f = lambda n: results[n]
"""


def test_no_result_of_a_test_is_in_its_process():
    """A program would find it, in a frame or among all objects. (This one knows what it looks for,
    but in two parts: it does not find itself.)"""
    assert share(SEARCH, [[[0], "first-7316"], [[1], "second-9524"]]) == 0
    found = "def f(n, text):\n    return results[n]"  # the arguments it does find
    tests = [[[0, "first-7316"], "first-7316"], [[1, "second-9524"], "second-9524"]]
    assert share(SEARCH + found, tests) == 1


def test_files_cannot_be_read_or_written(folder):
    """The data set's file has the results; /proc has other processes of the same user."""
    results = folder / "results"
    results.write_text("2 6")
    read = "def f(n):\n    return int({}[n // 5])"
    assert share(read.format("'2 6'.split()")) == 1
    assert share(read.format(f"open({str(results)!r}).read().split()")) == 0
    for name in ("/proc/self/environ", f"/proc/{os.getpid()}/maps", str(FILE), "."):
        assert share(f"{GOOD}import os\nos.open({name!r}, 0)") == 0
    outside, inside = folder / "outside", "inside"
    for path in (outside, inside):
        assert share(f"{GOOD}open({str(path)!r}, 'w')") == 0
    assert share(f"{GOOD}import os\nos.remove({str(results)!r})") == 0
    assert results.exists() and not outside.exists()


# connect, clone, fork, execve, kill, ptrace, setrlimit, unlink, openat, prlimit, socket, read,
# rt_sigaction, ftruncate, lseek, io_uring_setup, clone3; 1 << 30: the same in the x32 ABI
FORBIDDEN = [42, 56, 57, 59, 62, 101, 160, 87, 257, 302, 41, 0, 13, 77, 8, 425, 435, 1 << 30 | 257]
CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(number):
    ctypes.set_errno(0)
    return [libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno()]
"""


def test_system_calls_are_forbidden_below_python():
    """Whoever gets at machine code (here by ctypes) has the same few. A network needs `socket`."""
    assert share(CALL, [[[number], [-1, 1]] for number in FORBIDDEN]) == 1


I386 = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
code = bytes.fromhex('31c0 31db b00c cd80 c3')  # eax = 12, ebx = 0; int 0x80
ctypes.memmove(page, code, len(code))
f = ctypes.CFUNCTYPE(ctypes.c_int)(page)
"""


def test_calls_of_32_bits_are_no_way_out():
    """There, number 12 is not `brk` but `chdir`, and 11 is `execve`: here it dies. If it were let
    through it would return EFAULT."""
    assert share(I386, [[[], -14]]) == 0
    assert runner.run(I386 + "f = lambda: 1", "f", [[]]) == [[1]]  # the code around it works


def test_no_file_of_the_run_is_inherited(folder):
    """An open file or connection of the run would be within its reach."""
    write = CALL.replace("(number, 0, 0, 0", "(1, number, b'text', 4")
    with open(folder / "log", "wb") as log, socket.socketpair()[0] as connection:
        numbers = [log.fileno(), connection.fileno()]
        for number in numbers:
            os.set_inheritable(number, True)
        closed = [-1, 9]  # EBADF
        assert share(write, [[[number], closed] for number in numbers]) == 1


ORPHAN = """
import resource, sys
_, most = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
sys.path.insert(0, sys.argv[1])
import run_tests
run_tests.run("import _thread\\nl = _thread.allocate_lock()\\nl.acquire()\\nl.acquire()", "f", [])
"""


def test_it_is_apart_from_the_run_and_dies_with_it(folder):
    """Else each kill of a run would leave a process that waits for ever. Ctrl-C is not for it: a
    program that is killed by it would be called wrong. It leaves no core in the run's folder."""
    environment = os.environ | {"TMPDIR": str(folder)}
    run = subprocess.Popen([sys.executable, "-c", ORPHAN, str(FILE.parent)], env=environment)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    wait_for(lambda: any(p.read_bytes() for p in folder.glob("tmp*/returned")), "it is ready")
    (child,) = children.read_text().split()
    assert os.getsid(int(child)) == int(child)
    assert Path(os.readlink(f"/proc/{child}/cwd")).parent == folder
    limits = Path(f"/proc/{child}/limits").read_text()
    assert ["core", "file", "size", "0"] in [line.split()[1:5] for line in limits.splitlines()]
    run.kill()
    run.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the child is dead")


def wait_for(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# --------------------------------------------------------------------------- where it cannot work


@mark.parametrize(
    "old, new, error",
    [
        ("X86_64 = 0xC000003E", "X86_64 = 0xC00000B7", "no program can be run here"),
        ("prctl(22,", "prctl(0,", "does not filter system calls"),
        ("ctypes.CDLL(None).prctl", "ctypes.CDLL(None).no_such_function", "no_such_function"),
    ],
    ids=["another architecture", "no seccomp", "macOS"],
)
def test_without_its_protection_nothing_is_run(folder, old, new, error):
    """It is an error, not a reward of 0, and the program has not run."""
    text = FILE.read_text()
    assert text.count(old) == 1
    (folder / "other.py").write_text(text.replace(old, new))
    other = import_file(folder / "other.py")
    left = folder / "left"
    with raises(RuntimeError, match=error):
        other.reward(PROBLEM, f"{GOOD}open({str(left)!r}, 'w')")
    assert not left.exists()


# ----------------------------------------------------------------------------- the shipped problems


def test_the_shipped_problems_are_those_of_the_generator():
    """And are read: 200 to train, 100 held out, without repeats, none refused for its answer."""
    lines = (ASSETS / "programs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == generate()
    train, held_out = (read_problems(f"{ASSETS}/programs.jsonl[{s}]") for s in (":200", "200:"))
    assert overlap(train, held_out) == {}
    for problems, count in ((train, 200), (held_out, 100)):
        assert len(problems) == len({p.problem for p in problems}) == count
        assert len(only_gradable("programs", problems)) == count
        assert {p.level for p in problems} == {1, 2, 3, 4}


def test_a_reference_is_right_and_a_wrong_step_is_not():
    for problem in generate()[::60]:
        head, first, *rest = problem["answer"].splitlines()
        assert runner.reward(problem, problem["answer"]) == 1
        assert runner.reward(problem, "\n".join([head, *rest])) == 0
