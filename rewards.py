"""R_l: is the answer right? answers.py behind a boundary that can neither hang nor crash a run.

    python rewards.py CASES.jsonl      grade {"gold", "prediction"[, "equivalent", "kind"]} and print disagreements

A policy under reinforcement learning attacks its reward, so its text is hostile: it is parsed in worker processes that
die when they exceed a clock or a memory limit, and are replaced. The kernel enforces both: a handler of signals, as in
math-verify's own timeout, would not interrupt one long operation.
"""

import argparse
import atexit
import importlib.util
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

from infra import answers

CASE_SECONDS = 0.4  # of processor time, so that a busy machine changes no verdict; ours: ordinary cases take milliseconds
WALL = 25  # wall time may be so many times that, before a worker that does not answer is given up
WORKER_BYTES = 2 << 30  # address space of a worker
LONGEST_ANSWER = 1000  # characters; the longest gold answer of the usual benchmarks has under 300

RIGHT, WRONG, NO_ANSWER, TIMEOUT, ERROR = "right", "wrong", "no answer", "timeout", "error"


def extract_answer(text, allow_last_number=False):
    r"""The content of the last \boxed{...}, or None.

    Only what follows the last </think> counts; a <think> that never closes means no answer. If the last box is unclosed
    or blank there is no answer, whatever stood in earlier ones. allow_last_number: without any box, the last number.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        numbers = (
            re.findall(r"(?:(?<![\w)\].])-)?\d[\d,]*(?:\.\d+)?", text) if allow_last_number else []
        )
        return numbers[-1].rstrip(",") if numbers else None
    if re.search(r"\\boxed\s*\{[^{}\n]*\}%[ \t]*$", text[: boxes[-1].start()]):
        return None  # the last box is a comment to LaTeX, and the last box to anybody else: neither of the two pays
    depth, start = 1, boxes[-1].end()
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(
        text, start
    ):  # an escaped \{ is no brace
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            answer = text[start : match.start()].strip(" \t\r\n")
            return answer if answer.strip(". ") else None
    return None


def writes_steps(text):
    """Whether something leads up to a box: the share of such completions tells choosing to reason from reasoning well."""
    before, box, _ = text.partition("\\boxed")
    return bool(box and before.strip())


def canonical(answer):
    """A spelling under which equal answers usually meet, for counting votes (not for grading): 0.5, 1/2 and \\dfrac12; 1,2 and
    \\{2,1\\}; x=5 and 5; B and \\text{B}. Units count. Takes time linear in the text, unlike the algebra of `answers.equal`."""
    text = answers.tidy(answer[:LONGEST_ANSWER])
    try:
        return spelled(answers.read(text, True)) if len(text) < 200 else answers.squeeze(text)
    except answers.TooDeep:
        return answers.squeeze(text)


def spelled(shape):
    if shape.kind in ("list", "set"):
        return ",".join(sorted(map(spelled, shape.parts)))
    if shape.kind == "tuple":
        return shape.mark[0] + ",".join(map(spelled, shape.parts)) + shape.mark[1]
    core, unit, percent = answers.quantity(shape.text)
    value = answers.number(core)
    core = answers.words(core) or answers.squeeze(core) if value is None else str(value)
    return " ".join(filter(None, (core, unit, percent and "%")))


def at_once(gold, answer):
    """The verdict where no mathematics is needed, else None: it saves the workers most of an easy data set."""
    if answer is None:
        return NO_ANSWER
    if answer == gold:
        return RIGHT
    if len(answer) > LONGEST_ANSWER:
        return WRONG
    if re.fullmatch("-?[0-9]{1,1000}", answer) and re.fullmatch("-?[0-9]{1,1000}", gold.strip()):
        return RIGHT if int(answer) == int(gold) else WRONG
    return None


# ---------------------------------------------------------------------------------------------------------- workers


def serve(seconds):
    """A worker: one JSON pair [gold, answer] a line in, one JSON verdict a line out, until the input ends.

    The cases are judged by a child. When one kills it, the verdict is the parent's, which has everything imported and
    forks the next child in milliseconds.
    """
    verdicts = os.fdopen(
        os.dup(1), "w"
    )  # for verdicts alone: whatever a library prints goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(verdict):
        print(json.dumps(verdict), file=verdicts, flush=True)

    answers.equal("x+1", "1+\\frac{x}{1}")  # imports, and fills the parser's caches
    answers.equal("\\sqrt{2}", "2^{1/2}")
    say("ready")
    while True:
        child = os.fork()
        if child == 0:
            judge(answers.equal, say, seconds)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # the input ended
            return
        say(TIMEOUT if os.WTERMSIG(status) == signal.SIGPROF else ERROR)


def judge(equal, say, seconds):
    """Answer case after case. One that takes longer than `seconds` of processor time kills this process (SIGPROF)."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    except (ValueError, OSError):  # macOS knows no such limit; the clock remains
        pass
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = RIGHT if equal(gold, answer) else WRONG
        except (
            Exception
        ):  # whatever hostile text provokes in the parser or in sympy is counted, and worth 0
            verdict = ERROR
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(verdict)


class Worker:
    """A process that grades one case at a time."""

    def __init__(self, seconds):
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(seconds)]
        self.process = subprocess.Popen(  # a session of its own: Ctrl-C reaches the run, which then ends its workers
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.job = "start"  # what its next line answers; None: idle
        self.deadline = time.monotonic() + 120  # importing sympy on a busy machine takes seconds

    @property
    def dead(self):
        return self.process.poll() is not None

    def send(self, case, seconds):
        self.job, self.deadline = case, time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(case).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it died this moment; the end of its output, read next, says so
            pass

    def receive(self):
        """The verdict that it wrote; "" if it died."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else ""

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # the child too
        except ProcessLookupError:  # all gone already
            pass
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # a half-written case that nobody will read
                pass


class Grader:
    """grade(pairs of gold answer and response) -> verdicts. Counts them by kind in `counts`."""

    def __init__(self, workers=2, seconds=CASE_SECONDS, allow_last_number=False):
        self.seconds, self.allow_last_number = seconds, allow_last_number
        self.counts, self.known = Counter(), {}
        self.num_workers, self.workers = workers, []  # started by the first case that needs one
        self.failed_starts = 0  # in a row
        atexit.register(self.close)

    def grade(self, pairs):
        """[(gold, response text), ...] -> [right | wrong | no answer | timeout | error, ...], in order."""
        return self.compare([(gold, self.extract(text)) for gold, text in pairs])

    def extract(self, text):
        return extract_answer(text, self.allow_last_number)

    def compare(self, cases):
        """[(gold, answer or None), ...] -> verdicts; equal cases are decided once."""
        verdicts = {case: at_once(*case) or self.known.get(case) for case in set(cases)}
        self.ask([case for case in dict.fromkeys(cases) if verdicts[case] is None], verdicts)
        if len(self.known) > 100_000:
            self.known.clear()
        self.known |= {case: v for case, v in verdicts.items() if v in (RIGHT, WRONG)}
        self.counts.update(verdicts[case] for case in cases)
        return [verdicts[case] for case in cases]

    def ask(self, cases, verdicts):
        """Let the workers decide `cases` into `verdicts`; one that dies or exceeds its clock is replaced."""
        waiting = deque(cases)
        if waiting and not self.workers:
            self.workers = [Worker(self.seconds) for _ in range(self.num_workers)]
        while waiting or any(w.job not in (None, "start") for w in self.workers):
            for i, worker in enumerate(self.workers):
                if worker.job is None and worker.dead:  # while idle, so no case is to blame
                    worker.kill()
                    self.workers[i] = Worker(self.seconds)
                elif worker.job is None and waiting:
                    worker.send(waiting.popleft(), WALL * self.seconds)
            with selectors.DefaultSelector() as selector:
                for i, worker in enumerate(self.workers):
                    if worker.job is not None:
                        selector.register(worker.process.stdout, selectors.EVENT_READ, i)
                patience = (
                    min(w.deadline for w in self.workers if w.job is not None) - time.monotonic()
                )
                ready = {key.data for key, _ in selector.select(max(patience, 0))}
            for i, worker in enumerate(self.workers):
                if i in ready:
                    verdict = worker.receive()
                elif worker.job is not None and time.monotonic() > worker.deadline:
                    verdict = None
                else:
                    continue
                if worker.job != "start":
                    verdicts[worker.job] = TIMEOUT if verdict is None else verdict or ERROR
                else:
                    self.failed_starts = 0 if verdict == "ready" else self.failed_starts + 1
                    if self.failed_starts == 5:
                        raise RuntimeError(
                            "grading workers do not start: does `python -c 'import math_verify'` work?"
                        )
                worker.job = None
                if not verdict:
                    worker.kill()
                    self.workers[i] = Worker(self.seconds)

    def close(self):
        for worker in self.workers:
            worker.kill()
        self.workers = []
        atexit.unregister(self.close)


# ---------------------------------------------------------------------------------------------------- other rewards


def load_reward(name):
    """R_l by name: None for "math" (the grader's outcome, 1 or 0), else the function of "path.py:function".

    The function is called as reward(problem, response) with the problem's record (a dict: problem, answer and the other
    fields of its file) and the text of a completion, and returns a finite number.
    """
    if name == "math":
        return None
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"reward {name!r}: expected math, or path.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise ValueError(f"reward {name!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        reward = getattr(module, function, None)
    except (
        Exception,
        SystemExit,
    ) as error:  # the user's own code: any error in it is theirs to see, in one line
        raise ValueError(
            f"reward {name!r}: importing {path} failed ({type(error).__name__}: {error})"
        ) from error
    if not callable(reward):
        raise ValueError(f"reward {name!r}: {path} has no function {function}")
    return reward


# ------------------------------------------------------------------------------------------------------ command line


def main():
    from data import read_records

    parser = argparse.ArgumentParser(description="Grade a file of cases.")
    parser.add_argument(
        "cases",
        help='JSONL of {"gold", "prediction", "equivalent": bool, "kind": "answer" | "response"}',
    )
    parser.add_argument(
        "--allow-last-number", action="store_true", help="without a box, take the last number"
    )
    args = parser.parse_args()

    def parse_case(record, _):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(k), str) for k in ("gold", "prediction")
        ):
            raise ValueError('a case needs the texts "gold" and "prediction"')
        if not isinstance(record.get("equivalent", True), bool) or record.get(
            "kind", "response"
        ) not in ("answer", "response"):
            raise ValueError('"equivalent" must be true or false, "kind" answer or response')
        return record

    try:
        cases = read_records(args.cases, parse_case)
    except ValueError as error:
        parser.error(str(error))
    grader = Grader(allow_last_number=args.allow_last_number)
    start = time.perf_counter()

    answer_of = {"answer": lambda text: text.strip() or None, "response": grader.extract}
    verdicts = grader.compare(
        [
            (case["gold"], answer_of[case.get("kind", "response")](case["prediction"]))
            for case in cases
        ]
    )
    seconds = time.perf_counter() - start
    counts = {"cases": len(cases), "agree": 0, "false_right": 0, "false_wrong": 0}
    for case, verdict in zip(cases, verdicts):
        if "equivalent" in case:
            agree = (verdict == RIGHT) == case["equivalent"]
            counts["agree" if agree else "false_right" if verdict == RIGHT else "false_wrong"] += 1
            if not agree:
                gold, prediction = (repr(case[k][:200]) for k in ("gold", "prediction"))
                print(
                    f"{verdict}, labelled {case['equivalent']}: gold {gold}, prediction {prediction}"
                )
    failures = {
        "timeouts": grader.counts[TIMEOUT],
        "errors": grader.counts[ERROR],
        "seconds": round(seconds, 3),
    }
    print(json.dumps(counts | failures))


if __name__ == "__main__":
    serve(float(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
