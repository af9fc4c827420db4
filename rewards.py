"""R_l: the verifier, or a function of the user's.

A policy under reinforcement learning attacks its reward, so its text is hostile. The verifier
parses it in worker processes that die when they exceed a clock or a memory limit, and are replaced.
The kernel enforces both limits. A signal handler, as in math-verify's own timeout, would not
interrupt one long operation. What protects a run from a user's own R_l stands at `Calls`.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Thread

import answers
from answers import extract_answer
from files import Stop, explained, sha256

CASE_SECONDS = 0.4  # of processor time, so that a busy machine changes no verdict
WALL = 25  # a worker that has not answered after WALL * CASE_SECONDS of wall time is given up
START_SECONDS = 120  # importing sympy on a busy machine takes seconds
WORKER_BYTES = 2 << 30  # address space of a worker
LONGEST_ANSWER = 1000  # characters; the gold answers of the usual benchmarks have under 300

RIGHT, WRONG, NO_ANSWER, TIMEOUT, ERROR = "right", "wrong", "no answer", "timeout", "error"
LATE = "late"  # R_l of your own took longer than --reward-timeout
OVER = object()  # in place of what such a call would have returned
MATH = "math"  # the name of the verifier
WORKERS = 64  # calls of a user's function at the same time, on each process


def writes_steps(text):
    """Whether any text but signs of maths stands before a box.

    Beside accuracy, their share tells whether a model writes no steps, or wrong ones.
    """
    before, box, _ = text.removeprefix("<think>").partition("\\boxed")
    return bool(box and before.strip("$\\[( \t\r\n"))


def judge_at_once(gold, answer):
    """The verdict where no mathematics is needed, else None. It saves work on easy data."""
    if answer is None:
        return NO_ANSWER
    if answer == gold:
        return RIGHT
    if len(answer) > LONGEST_ANSWER:
        return WRONG
    if all(re.fullmatch("-?[0-9]{1,1000}", text) for text in (answer, gold.strip())):
        return RIGHT if int(answer) == int(gold) else WRONG
    return None


# ---------------------------------------------------------------------------------------- workers


def serve(pipe, seconds):
    """A worker: receives pairs (gold, answer), sends a verdict for each, until the pipe is closed.

    The cases are judged by a child process. If the clock kills it, this process says so and forks
    the next child. That takes milliseconds, because everything is already imported here.

    No verdict is without its case: SIGPROF, the clock, can kill a child only between receiving a
    case and sending the verdict. If the child dies of anything else, it may have been idle, so this
    process ends without a word, which closes the pipe. A case that is sent in this moment gets
    ERROR, though nobody judged it. Later cases get a new worker.
    """
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    answers.equal("x+1", "1+\\frac{x}{1}")  # imports, and fills the parser's caches
    answers.equal("\\sqrt{2}", "2^{1/2}")
    pipe.send_bytes(b"ready")
    while True:
        if os.fork() == 0:
            try:
                judge(pipe, seconds)
            finally:
                os._exit(0)
        _, status = os.wait()
        if os.WTERMSIG(status) != signal.SIGPROF:  # 0 if it ended by itself: the pipe was closed
            return
        pipe.send_bytes(TIMEOUT.encode())


def judge(pipe, seconds):
    """Judge case after case. SIGPROF kills this process if one takes more processor time."""
    import resource  # here: on Windows, which lacks it, files.py says so first

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the clock remains
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    while True:
        gold, answer = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        try:
            verdict = RIGHT if answers.equal(gold, answer) else WRONG
        except Exception:  # whatever hostile text provokes in the parser or in sympy is worth 0
            verdict = ERROR
        signal.signal(signal.SIGPROF, signal.SIG_IGN)  # before the verdict: see `serve`
        pipe.send_bytes(verdict.encode())


class Worker:
    """A process that grades one case at a time."""

    command = (sys.executable, os.path.abspath(__file__), "--worker")

    def __init__(self, seconds):
        self.pipe, end = Pipe()
        with end:
            self.process = subprocess.Popen(
                [*self.command, str(end.fileno()), str(seconds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's work depends on it
                pass_fds=[end.fileno()],
                start_new_session=True,  # Ctrl-C reaches the run, which then ends its workers
            )

    def receive(self, seconds):
        """What the worker says within that wall time, else TIMEOUT, or ERROR if it died."""
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv_bytes().decode()
            verdict = TIMEOUT
        except (EOFError, OSError):
            verdict = ERROR
        self.kill()
        return verdict

    def kill(self):
        if self.process.returncode is None:  # once it was waited for, its id may be another's
            with contextlib.suppress(PermissionError):  # only zombies are left (macOS)
                os.killpg(self.process.pid, signal.SIGKILL)  # the child too
        self.process.wait()
        self.pipe.close()


class Grader:
    """grade(pairs of gold answer and response) -> verdicts. Counts them by kind in `counts`."""

    def __init__(self, workers=2, seconds=CASE_SECONDS):
        self.seconds, self.counts = seconds, Counter()
        self.known = {}  # (gold, answer) -> verdict
        self.idle = deque([None] * workers)  # None stands for one that is not started yet

    def grade(self, pairs):
        """[(gold, response text), ...] -> [right | wrong | no answer | timeout | error, ...]"""
        return self.compare([(gold, extract_answer(text)) for gold, text in pairs])

    def compare(self, cases):
        """[(gold, answer or None), ...] -> verdicts, in order. Equal cases are decided once."""
        verdicts = {case: judge_at_once(*case) or self.known.get(case) for case in cases}
        waiting = [case for case in verdicts if verdicts[case] is None]
        with ThreadPoolExecutor(len(self.idle)) as pool:  # one thread per worker
            verdicts.update(zip(waiting, pool.map(self.ask, waiting)))
        if len(self.known) > 100_000:
            self.known.clear()
        self.known |= {case: v for case, v in verdicts.items() if v in (RIGHT, WRONG)}
        result = [verdicts[case] for case in cases]
        self.counts.update(result)
        return result

    def ask(self, case):
        """Let an idle worker judge. One that is dead is replaced first: no case is to blame."""
        worker = self.idle.popleft()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = self.start()
            with contextlib.suppress(OSError):  # it died this moment: `receive` finds out
                worker.pipe.send(case)
            return worker.receive(WALL * self.seconds)
        finally:
            self.idle.append(worker)

    def start(self):
        for _ in range(5):
            worker = Worker(self.seconds)
            if worker.receive(START_SECONDS) == "ready":
                return worker
        raise RuntimeError(
            "grading workers do not start: does `python -c 'import math_verify'` work?"
        )

    def close(self):
        for worker in filter(None, self.idle):
            worker.kill()


# ------------------------------------------------------------------------------------------- R_l


FORMS = (
    "reward(problem, response), reward(problems, responses) for the lists of a group, or async def "
    "of one of them"
)


@dataclass(frozen=True)
class Reward:
    """R_l.

    name      "math": the verifier; or "path.py:function"
    function  of that file
    lists     whether a call takes the lists of a group; else it takes one completion
    awaited   whether it is an async def
    weights   {name of a part: its weight}, WEIGHTS of that file; None: it has none
    """

    name: str = MATH
    function: object = None
    lists: bool = False
    awaited: bool = False
    weights: dict | None = None

    def total(self, value):
        """What the function returned for a completion -> R_l, {"part_NAME": the part's value}

        R_l is rounded to 6 decimals: 0.7 + 0.2 + 0.1, which is 1 - 1e-16 to a computer, is right.
        Raises an error of any kind for what is neither a number nor a dict of all parts.
        """
        if not isinstance(value, dict):
            return round(float(value), 6), {}
        if self.weights is None or self.weights.keys() != value.keys():
            raise ValueError(f"parts {list(value)}, but WEIGHTS of its file is {self.weights}")
        parts = {f"part_{name}": float(part) for name, part in value.items()}
        outcome = sum(self.weights[name] * float(part) for name, part in value.items())
        return round(outcome, 6), parts


VERIFIER = Reward()


def load_reward(name):
    """R_l by its name, see Reward.  Raises ValueError"""
    if name == MATH:
        return VERIFIER
    path, colon, attribute = name.rpartition(":")
    path = Path(path)
    if not colon:
        raise ValueError(f"reward {name!r}: expected math, or path.py:function")
    if path.suffix != ".py":
        raise ValueError(f"reward {name!r}: {path} is not a Python file")
    with explained(f"reward {name!r}: importing {path} failed"):
        module, _ = import_file(path.resolve())
    function, weights = (getattr(module, each, None) for each in (attribute, "WEIGHTS"))
    if not callable(function):
        raise ValueError(f"reward {name!r}: {path} has no function {attribute}")
    with explained(f"reward {name!r}: WEIGHTS is not a dict of numbers"):
        weights = weights and {part: float(weight) for part, weight in weights.items()}
        if not all(map(str.isidentifier, weights or ())):
            raise ValueError("the name of a part has letters, digits and _")
    with explained(f"reward {name!r}: expected {FORMS}"):
        signature = inspect.signature(function)
        signature.bind(None, None)
        names = list(signature.parameters)[:2]
        lists = names == ["problems", "responses"]
        if not lists and {"problems", "responses"} & set(names):
            raise TypeError(f"{', '.join(names)}: one completion, or the lists of a group?")
    coroutines = function, type(function).__call__  # an object may be called
    return Reward(name, function, lists, any(map(inspect.iscoroutinefunction, coroutines)), weights)


@functools.cache
def import_file(path):
    """Import a Python file, once.  path  absolute -> module, the files of its folder that it needs

    What stands beside it is found by `import helper`, before other modules of that name that are
    not imported yet, and by `from .helper import f`.
    """
    name, folder, before = str(path).replace(".", "_"), str(path.parent), set(sys.modules)
    # As if it were a package, so that it may import relatively.
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    sys.path.append(sys.path.pop(0))  # the modules that we import later come first
    files = []
    for new in sys.modules.keys() - before:
        file = getattr(sys.modules[new], "__file__", None) or ""
        if file.startswith(folder + os.sep) and "site-packages" not in file:
            files.append(file)
    return module, files


def reward_files(names):
    """The files that these rewards consist of: their own, and what it imports from its folder."""
    files = []
    for name in names:
        if name != MATH:
            files += import_file(Path(name.rpartition(":")[0]).resolve())[1]
    return files


def identity(name):
    """A reward's name, and what tells another file of that name."""
    if name == MATH:
        return name
    digests = "".join(map(sha256, sorted(reward_files([name]))))
    return f"{Path(name).name} {hashlib.sha256(digests.encode()).hexdigest()[:8]}"


MOST_LEFT = 64  # calls that go on after their time is over, before the run ends


class Calls:
    """Calls of users' functions: at most `workers` at once, each with a clock of its own. A plain
    function that is over its time goes on, beside those `workers`.

    A plain function runs in a thread, a coroutine on `loop`, which all of them share. Beside each
    a thread of `pool` waits. It runs no code of users: nothing that they hold up or catch stops the
    clock. A call that is over its time is left behind, since no thread can be ended from outside.

    workers, seconds  see the flags --reward-...
    """

    def __init__(self, workers, seconds):
        self.workers, self.seconds = workers, seconds
        self.left = []  # (problem id, future) of calls that were left behind
        self.open()

    def open(self):
        self.pool, self.dropped = ThreadPoolExecutor(self.workers), Future()

    def drop(self):
        """No further call is begun, and coroutines are cancelled."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.dropped.set_result(None)
        self.open()

    @functools.cached_property
    def loop(self):
        """In a thread of its own, for as long as the process lives."""
        loop = asyncio.new_event_loop()
        Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def submit(self, reward, problem_id, *arguments):
        """-> a future of what the call returns, or of OVER. It raises Stop for what it raises."""
        hanging = [name for name, future in self.left if future.running()]
        if len(hanging) >= MOST_LEFT:
            raise Stop(
                f"{len(hanging)} calls of --reward go on after --reward-timeout {self.seconds:g}, "
                f"the last of problem {hanging[-1]!r}: let your function end by itself"
            )
        loop = self.loop if reward.awaited else None
        return self.pool.submit(self.call, loop, self.dropped, reward, problem_id, arguments)

    def call(self, loop, dropped, reward, problem_id, arguments):
        begin, future = time.monotonic(), Future()
        work = run(reward, arguments, future)
        if loop:
            task = asyncio.run_coroutine_threadsafe(work, loop)
        else:  # nothing in it waits, so it needs no loop; the thread keeps no process from its end
            Thread(target=next, args=(work.__await__(), None), daemon=True).start()
        wait([future, dropped], self.seconds, FIRST_COMPLETED)
        if loop:
            task.cancel()
        # What holds Python's lock holds up this thread too, and may be done.
        if not future.done() or time.monotonic() - begin > self.seconds:
            self.left.append((problem_id, future))
            return OVER
        if error := future.exception():
            raise failure(reward, problem_id, error) from error
        return future.result()


async def run(reward, arguments, future):
    """A call: the future gets what it returns, or raises what it raises."""
    future.set_running_or_notify_cancel()  # a task that never began does not hang
    try:
        value = reward.function(*arguments)
        value = await value if reward.awaited else value
        future.set_result(list(value) if reward.lists else value)  # an iterator works in here, too
    except BaseException as error:
        future.set_exception(error)


def failure(reward, problem_id, error):
    where = f"--reward {reward.name}, problem {problem_id!r}"
    return Stop(
        f"{where}: {type(error).__name__}: {error}. If this may pass (a busy server), let the "
        "function itself try again: docs/rewards.md"
    )


# ---------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Score:
    """Of one completion.

    outcome  R_l: 1 and above is right; nan if it came too late
    verdict  of the verifier, or by another R_l: right, wrong or late
    answer   what stands in its box, or None
    values   what is reported of another R_l: "R_l"; "part_NAME" for each part, before its weight;
             "late", 1 if R_l came too late
    """

    outcome: float
    verdict: str
    answer: str | None
    values: dict = field(default_factory=dict)


class Scorer:
    """R_l of completions, group by group. A user's function runs while others are still sampled."""

    def __init__(self, flags):
        self.grader = Grader()
        self.calls = Calls(WORKERS, flags.reward_timeout)

    def begin(self, reward, problem, responses):
        """Begin to score the completions of a problem.  -> finish() -> [Score, ...]"""
        extracted = [extract_answer(text) for text in responses]
        if not reward.function:
            cases = [(problem.gold, answer) for answer in extracted]
            return lambda: [
                Score(float(verdict == RIGHT), verdict, answer)
                for verdict, answer in zip(self.grader.compare(cases), extracted)
            ]
        # Calls share nothing, so that a record which one changes is not changed for another.
        records, calls = [copy.deepcopy(problem.record()) for _ in responses], []
        for arguments in [(records, responses)] if reward.lists else zip(records, responses):
            calls.append(self.calls.submit(reward, problem.id, *arguments))
        return lambda: own_scores(reward, problem, extracted, [call.result() for call in calls])

    def close(self):
        self.grader.close()


def own_scores(reward, problem, extracted, returned):
    """The scores of a group by a user's R_l. If one comes late, all do.

    extracted  what stands in the box of each completion, or None
    returned   by the call of each completion, or by that of the group
    """
    if any(value is OVER for value in returned):
        return [Score(math.nan, LATE, answer, {"R_l": 0.0, "late": 1.0}) for answer in extracted]
    scores = []
    try:
        values = returned[0] if reward.lists else returned
        if len(values) != len(extracted):
            raise ValueError(f"{len(values)} numbers for {len(extracted)} responses")
        for value, answer in zip(values, extracted):
            outcome, parts = reward.total(value)
            verdict = RIGHT if outcome >= 1 else WRONG
            reported = {"R_l": outcome, **parts, "late": 0.0}
            scores.append(Score(outcome, verdict, answer, reported))
    except Exception as error:
        raise failure(reward, problem.id, error) from error
    return scores


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    serve(Connection(int(sys.argv[2])), float(sys.argv[3]))
