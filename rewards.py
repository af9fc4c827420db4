"""R_l: is the answer right? answers/ in processes that can neither hang nor crash a run.

    python rewards.py CASES.jsonl      grade {"gold", "prediction"[, "equivalent", "kind"]} and
                                       print disagreements

A policy under reinforcement learning attacks its reward, so its text is hostile. It is parsed in
worker processes that die when they exceed a clock or a memory limit, and are replaced. The kernel
enforces both limits. A signal handler, as in math-verify's own timeout, would not interrupt one
long operation.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import answers
from answers import extract_answer
from parts.files import explained, read_records

CASE_SECONDS = 0.4  # of processor time, so that a busy machine changes no verdict
WALL = 25  # a worker that has not answered after WALL * CASE_SECONDS of wall time is given up
START_SECONDS = 120  # importing sympy on a busy machine takes seconds
WORKER_BYTES = 2 << 30  # address space of a worker
LONGEST_ANSWER = 1000  # characters; the gold answers of the usual benchmarks have under 300

RIGHT, WRONG, NO_ANSWER, TIMEOUT, ERROR = "right", "wrong", "no answer", "timeout", "error"


def writes_steps(text):
    """Whether something leads up to a box.

    The share of such completions separates choosing to reason from reasoning well.
    """
    before, box, _ = text.partition("\\boxed")
    return bool(box and before.strip())


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
    process ends without a word, which closes the pipe. A case sent in that very moment is an error
    without a judge; any later one gets a new worker.
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
    import resource  # here, so that Windows, which lacks it, comes to the sentence of parts/

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

    def __init__(self, workers=2, seconds=CASE_SECONDS, allow_last_number=False):
        self.seconds, self.allow_last_number = seconds, allow_last_number
        self.counts = Counter()
        self.known = {}  # (gold, answer) -> verdict
        self.idle = deque([None] * workers)  # None stands for one that is not started yet

    def grade(self, pairs):
        """[(gold, response text), ...] -> [right | wrong | no answer | timeout | error, ...]"""
        return self.compare([(gold, self.extract(text)) for gold, text in pairs])

    def extract(self, text):
        return extract_answer(text, self.allow_last_number)

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


# ---------------------------------------------------------------------------------- other rewards


def load_reward(name):
    """R_l by name: None for "math" (the grader's outcome), else the function of "path.py:function".

    Raises ValueError. `outcomes` says how the function is called.
    """
    if name == "math":
        return None
    path, colon, function = name.rpartition(":")
    path = Path(path)
    if not colon:
        raise ValueError(f"reward {name!r}: expected math, or path.py:function")
    if path.suffix != ".py":
        raise ValueError(f"reward {name!r}: {path} is not a Python file")
    with explained(f"reward {name!r}: importing {path} failed"):
        module, _ = import_file(path.resolve())
        reward = getattr(module, function, None)
    if not callable(reward):
        raise ValueError(f"reward {name!r}: {path} has no function {function}")
    return reward


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


ALARMS = 10  # a reward that goes on after so many cannot be stopped


class TooLate(BaseException):
    """A reward took too long. Its own `except Exception` does not catch this."""


def call_within(seconds, problem, function, *arguments):
    """function(*arguments); raises TooLate in it when that time is over, and again and again.

    A function that catches it, or sets an alarm of its own, is late all the same. If it goes on for
    ever, the process ends: no signal handler can leave a loop that catches everything. (One that
    has taken the alarm away and goes on for ever hangs.)
    """
    alarms, end = 0, time.monotonic() + seconds

    def stop(*_):
        nonlocal alarms
        alarms += 1
        if alarms >= ALARMS:
            print(
                f"\n--reward, problem {problem.id}: it does not end, and it catches TooLate (catch "
                "Exception, no more). Left at once, the last checkpoint is what remains",
                file=sys.stderr,
            )
            os._exit(1)
        raise TooLate

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        try:
            return function(*arguments)
        finally:  # the alarm may ring in it, once
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if time.monotonic() > end:
            raise TooLate


def outcomes(reward, problem, responses, seconds):
    """R_l of a group: [a number for each response].  Raises TooLate, and what the function raises

    reward   called as reward(problem, response) with the problem's record (a dict: problem, answer
             and the other fields of its file) and the text of a completion, it returns a number.
             If its first parameters are named `problems` and `responses` it is called once, with
             lists of equal length, and returns as many numbers.
    seconds  that a call may take
    """
    records = [problem.record() for _ in responses]
    if list(inspect.signature(reward).parameters)[:2] == ["problems", "responses"]:
        values = list(call_within(seconds, problem, reward, records, responses))
        if len(values) != len(responses):
            raise ValueError(f"{len(values)} numbers for {len(responses)} responses")
    else:
        values = [call_within(seconds, problem, reward, *each) for each in zip(records, responses)]
    return [float(value) for value in values]


# ----------------------------------------------------------------------------------- command line


CASE = '{"gold": text, "prediction": text, "equivalent": bool, "kind": "answer" | "response"}'


def parse_case(record, _):
    match record:
        case {"gold": str(), "prediction": str()}:
            kind, label = record.get("kind", "response"), record.get("equivalent", True)
            if kind in ("answer", "response") and isinstance(label, bool):
                return record
    raise ValueError(f"not a case; expected {CASE}")


def main():
    parser = argparse.ArgumentParser(description="Grade a file of cases.")
    parser.add_argument("cases", help=f"JSONL of {CASE}; the last two may be left out")
    try:
        cases = read_records(parser.parse_args().cases, parse_case)
    except ValueError as error:
        parser.error(str(error))
    grader, start = Grader(), time.perf_counter()
    pairs = []
    for case in cases:
        answer = case["prediction"].strip() or None
        if case.get("kind") != "answer":
            answer = grader.extract(case["prediction"])
        pairs.append((case["gold"], answer))
    result = {"cases": len(cases), "agree": 0, "false_right": 0, "false_wrong": 0}
    for case, verdict in zip(cases, grader.compare(pairs)):
        right = verdict == RIGHT
        if case.get("equivalent", right) != right:
            result["false_right" if right else "false_wrong"] += 1
            print(
                f"{verdict}, labelled {case['equivalent']}: gold {case['gold'][:200]!r}, "
                f"prediction {case['prediction'][:200]!r}"
            )
        elif "equivalent" in case:
            result["agree"] += 1
    result |= {"timeouts": grader.counts[TIMEOUT], "errors": grader.counts[ERROR]}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 3)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(Connection(int(sys.argv[2])), float(sys.argv[3]))
    else:
        main()
