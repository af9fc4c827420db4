"""R_l: the verifier, or a function of the user's.

A policy under reinforcement learning attacks its reward, so its text is hostile. The verifier
parses it in worker processes that die when they exceed a clock or a memory limit, and are replaced.
The kernel enforces both limits. A signal handler, as in math-verify's own timeout, would not
interrupt one long operation. What protects a run from a user's own R_l stands at `Calls`.
"""

import asyncio
import copy
import functools
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from subprocess import DEVNULL, Popen
from threading import Thread

import answers
from answers import extract_answer
from common.files import Stop, explained, sha256

CASE_SECONDS = 0.4  # of processor time, so that a busy machine changes no verdict
WALL = 25  # a worker that has not answered after WALL * CASE_SECONDS of wall time is given up
START_SECONDS = 120  # importing sympy on a busy machine takes seconds
WORKER_BYTES = 2 << 30  # address space of a worker
LONGEST_ANSWER = 1000  # characters; the gold answers of the usual benchmarks have under 300

RIGHT, WRONG, NO_ANSWER, TIMEOUT, ERROR = "right", "wrong", "no answer", "timeout", "error"
LATE = "late"  # R_l of your own took longer than --reward-timeout
MATH = "math"  # the name of the verifier


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
    import resource  # here: on Windows, which lacks it, common/files.py says so first

    with suppress(ValueError, OSError):  # macOS has no such limit; the clock remains
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
    """A process that judges one case at a time. It begins, and begins anew, where it is needed."""

    command = (sys.executable, os.path.abspath(__file__))
    process = None

    def __init__(self, seconds):
        self.seconds = seconds

    def ask(self, case):
        """-> a verdict.  Raises RuntimeError if no process begins"""
        if self.process is None or self.process.poll() is not None:  # dead: no case is to blame
            self.start()
        with suppress(OSError):  # it died this moment: `receive` finds out
            self.pipe.send(case)
        return self.receive(WALL * self.seconds)

    def start(self):
        for _ in range(5):
            self.pipe, end = Pipe()
            with end:
                self.process = Popen(
                    [*self.command, str(end.fileno()), str(self.seconds)],
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    stderr=DEVNULL,
                    env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's work depends on it
                    pass_fds=[end.fileno()],
                    start_new_session=True,  # Ctrl-C reaches the run, which then ends its workers
                )
            if self.receive(START_SECONDS) == "ready":
                return
        raise RuntimeError(
            "grading workers do not start: does `python -c 'import math_verify'` work?"
        )

    def receive(self, seconds):
        """What the process says within that wall time, else TIMEOUT, or ERROR if it died."""
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
            with suppress(PermissionError):  # only zombies are left (macOS)
                os.killpg(self.process.pid, signal.SIGKILL)  # the child too
        self.process.wait()
        self.pipe.close()


class Grader:
    """The verifier, in some worker processes."""

    def __init__(self, workers=2, seconds=CASE_SECONDS):
        self.workers = [Worker(seconds) for _ in range(workers)]

    def compare(self, cases):
        """[(gold, answer or None), ...] -> [right | wrong | no answer | timeout | error, ...]

        Equal cases are decided once.
        """
        verdicts = {case: judge_at_once(*case) for case in cases}
        waiting = iter([case for case in verdicts if verdicts[case] is None])

        def work(worker):
            for case in waiting:  # of all workers: whichever is free takes the next one
                verdicts[case] = worker.ask(case)

        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(work, self.workers))  # raises what they raise
        return [verdicts[case] for case in cases]

    def close(self):
        for worker in self.workers:
            if worker.process:
                worker.kill()


# ------------------------------------------------------------------------------------------- R_l


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


@dataclass(frozen=True)
class Reward:
    """R_l.

    name      "math": the verifier; or "path.py:function"
    function  of that file
    lists     whether a call takes the lists of a group; else it takes one completion
    weights   {name of a part: its weight}, WEIGHTS of that file
    """

    name: str = MATH
    function: object = None
    lists: bool = False
    weights: dict = field(default_factory=dict)

    def scores(self, returned, answers):
        """What a call returned for completions in whose boxes stand `answers` -> their scores

        Raises an error of any kind for what is not a number, or dict of all parts, for each.
        """
        values = list(returned) if self.lists else [returned]
        if len(values) != len(answers):
            raise ValueError(f"{len(values)} numbers for {len(answers)} responses")
        return list(map(self.score, values, answers))

    def score(self, value, answer):
        """R_l is rounded to 6 decimals, so 0.7 + 0.2 + 0.1, to a computer 1 - 1e-16, is right."""
        parts = {}
        if isinstance(value, dict):
            if self.weights.keys() != value.keys():
                raise ValueError(f"parts {list(value)}, but WEIGHTS of its file is {self.weights}")
            parts = {f"part_{name}": float(part) for name, part in value.items()}
            value = sum(self.weights[name] * float(part) for name, part in value.items())
        outcome = round(float(value), 6)
        verdict = RIGHT if outcome >= 1 else WRONG
        return Score(outcome, verdict, answer, {"R_l": outcome, **parts, "late": 0.0})


VERIFIER = Reward()


def load_reward(name):
    """R_l by its name, see Reward.  Raises ValueError"""
    if name == MATH:
        return VERIFIER
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"reward {name!r}: expected math, or path.py:function")
    with explained(f"reward {name!r}: importing {path} failed"):
        module = import_file(Path(path).resolve())
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name!r}: {path} has no function {attribute}")
    with explained(
        f"reward {name!r}: expected reward(problem, response), reward(problems, responses) for the "
        "lists of a group, or async def of one of them; and WEIGHTS, a dict of numbers, if it "
        "returns parts"
    ):
        weights = {part: float(weight) for part, weight in getattr(module, "WEIGHTS", {}).items()}
        if not all(map(str.isidentifier, weights)):
            raise ValueError("the name of a part has letters, digits and _")
        signature = inspect.signature(function)
        signature.bind(None, None)
        names = list(signature.parameters)[:2]
        lists = names == ["problems", "responses"]
        if not lists and {"problems", "responses"} & set(names):
            raise TypeError(f"{', '.join(names)}: one completion, or the lists of a group?")
    return Reward(name, function, lists, weights)


@functools.cache
def import_file(path):
    """Import a Python file, once.  path  absolute -> module

    What stands beside it is found by `import helper`, before other modules of that name that are
    not imported yet, and by `from .helper import f`.
    """
    name, folder = str(path).replace(".", "_"), str(path.parent)
    # As if it were a package, so that it may import relatively.
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    sys.path.append(sys.path.pop(0))  # the modules that we import later come first
    return module


def identity(name):
    """A reward's name, and what tells another file of that name."""
    if name == MATH:
        return name
    path = Path(name.rpartition(":")[0])
    return f"{Path(name).name} {sha256(path)[:8]}"


MOST_CALLS = 64  # at the same time, on each process
MOST_LEFT = 64  # calls that go on after their time is over, before the run ends


class Calls:
    """Calls of users' functions: at most MOST_CALLS at once, each with a clock of its own. One that
    is over its time goes on, beside those.

    A call runs in a thread of its own, and its coroutine, if it returns one, on `loop`, which all
    of them share. Beside it a thread of `pool` waits. That runs no code of users: nothing that they
    catch stops the clock, and only Python's lock holds it up. A call that is over its time is left
    behind, since no thread can be ended from outside.
    """

    def __init__(self, seconds):
        """seconds  see --reward-timeout"""
        self.seconds, self.pool = seconds, ThreadPoolExecutor(MOST_CALLS)
        self.left = []  # (problem id, future) of calls that were left behind
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()

    def drop(self):
        """No further call is begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = ThreadPoolExecutor(MOST_CALLS)

    def submit(self, reward, problem_id, answers, *arguments):
        """-> a future of the scores of what a call with these arguments returns, for completions in
        whose boxes stand `answers`; of [] if it is late. It raises Stop for what it raises."""
        hanging = [name for name, future in self.left if not future.done()]
        if len(hanging) >= MOST_LEFT:
            raise Stop(
                f"{len(hanging)} calls of --reward go on after --reward-timeout {self.seconds:g}, "
                f"the last of problem {hanging[-1]!r}: let your function end by itself"
            )
        return self.pool.submit(self.call, reward, problem_id, answers, arguments)

    def call(self, reward, problem_id, answers, arguments):
        end, future = time.monotonic() + self.seconds, Future()
        # As a daemon it keeps no process from its end.
        Thread(target=self.run, args=(future, reward, answers, arguments), daemon=True).start()
        wait([future], self.seconds)
        # What holds Python's lock holds up this thread too, and may be done.
        if not future.done() or time.monotonic() > end:
            self.left.append((problem_id, future))
            return []
        if error := future.exception():
            raise Stop(
                f"--reward {reward.name}, problem {problem_id!r}: {type(error).__name__}: {error}. "
                "If this may pass (a busy server), let the function itself try again: "
                "docs/rewards.md"
            ) from error
        return future.result()

    def run(self, future, reward, answers, arguments):
        """The call itself: the future gets its scores, or raises what it raises."""
        try:
            returned = reward.function(*arguments)
            if inspect.isawaitable(returned):
                task = asyncio.run_coroutine_threadsafe(returned, self.loop)
                try:
                    returned = task.result(self.seconds)
                finally:
                    task.cancel()  # if it is late
            future.set_result(reward.scores(returned, answers))
        except BaseException as error:
            future.set_exception(error)


# ---------------------------------------------------------------------------------------- scoring


class Scorer:
    """R_l of completions, group by group. A user's function runs while others are still sampled."""

    def __init__(self, timeout):
        """timeout  seconds, see --reward-timeout"""
        self.grader = Grader()
        self.calls = Calls(timeout)

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
        records = [copy.deepcopy(problem.record()) for _ in responses]
        work = zip([[answer] for answer in extracted], records, responses)
        if reward.lists:
            work = [(extracted, records, responses)]
        calls = [self.calls.submit(reward, problem.id, *each) for each in work]

        def finish():
            done = [call.result() for call in calls]
            if not all(done):  # if one comes late, all do
                return [Score(math.nan, LATE, a, {"R_l": 0.0, "late": 1.0}) for a in extracted]
            return sum(done, [])

        return finish

    def close(self):
        self.grader.close()


if __name__ == "__main__":  # as a Worker
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
