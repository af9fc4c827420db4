"""Extraction, the workers against hangs and deaths, a user's reward."""

import asyncio
import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import random_model, table
from pytest import fixture, mark, raises

import rewards
from answers.equality import extract_answer
from common.files import Stop
from data import Problem
from policy.attempt import Request, Sampling, Solver
from rewards import (
    CASE_SECONDS,
    ERROR,
    LATE,
    RIGHT,
    TIMEOUT,
    WRONG,
    Grader,
    Reward,
    Scorer,
    Worker,
    load_reward,
    writes_steps,
)
from rollout import sample, stream_key

START = [("1/4", "0.25"), ("1/5", "0.2")]  # one case per worker: it is started


@fixture(scope="module")
def grader():
    grader = Grader(workers=2)
    grader.compare(START)
    yield grader
    grader.close()


def alive(grader):
    """The process ids of workers."""
    processes = [worker.process for worker in grader.workers]
    return {process.pid for process in processes if process.poll() is None}


EXTRACTED = r"""
so \boxed{42}. | 42
\boxed{1} no, \boxed{2} | 2
\boxed{\frac{1}{\sqrt{2}}} | \frac{1}{\sqrt{2}}
\boxed{\left\{1,2\right\}} | \left\{1,2\right\}
\boxed {7} | 7
\boxed{1} then \boxed{2 | None
\boxed{} | None
\boxed{ } | None
\boxed{...} | None
the answer is 42 | None
<think>\boxed{1}</think>\boxed{2} | 2
<think>\boxed{1}</think> so it is 2 | None
<think>\boxed{1} | None
<think>a</think><think>\boxed{1} | None
\boxed{1}</think>\boxed{2} | 2
</think>\boxed{1}</think>\boxed{2} | 2
</think>\boxed{1}</think> so it is 2 | None
\boxed{50}% \boxed{60} | None
\boxed{1}%\boxed{2}% or \boxed{3} | 3
\boxed{50}%, no, \boxed{60}% | 60
 | None
"""


@mark.parametrize("text, answer", table(EXTRACTED))
def test_the_answer_is_the_last_balanced_box(text, answer):
    """Escaped braces do not count; an unclosed last box gives no credit for an earlier one;
    thoughts are no answer, closed or not; % begins a comment to LaTeX, or ends the last box."""
    assert str(extract_answer(text)) == answer


MONSTERS = [
    "9^{9^{9^{9}}}",
    "(10^{10})!",
    r"\binom{10^9}{5\cdot 10^8}",
    "(x+y+z+w)^{1001}",
    "10^{10^{10}}",
    "(" * 5000,
    "{" * 300 + "1" + "}" * 300,
    "9" * 100_000,
    r"\frac{" * 200 + "1" + "}{2}" * 200,
    "\x00\ud800 \u202e",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n}",
]


def test_monsters_are_worth_nothing_and_hurt_nobody(grader):
    """Each costs its limit of processor time and raises nothing. A limit that Python enforces would
    wait for the end of one long multiplication: 5 s and more. The ordinary cases around them keep
    their verdicts and their order, and the workers survive: only their children die."""
    workers, cases = alive(grader), []
    for monster in MONSTERS:
        cases += [("(x+y+z+w)^{1000}" if "x" in monster else "17", monster)]
        cases += [(r"\frac{1}{2}", "0.5"), ("x+1", "x+2")]
    start = time.monotonic()
    verdicts = grader.compare(cases)
    assert time.monotonic() - start < 3 * CASE_SECONDS * len(MONSTERS)  # wall time, a busy machine
    assert set(verdicts[1::3]) == {RIGHT} and set(verdicts[2::3]) == {WRONG}
    found = Counter(verdicts[::3])
    assert RIGHT not in found and found[TIMEOUT] + found[ERROR] >= 3
    assert alive(grader) == workers


def script(tmp_path, monkeypatch, text):
    """Let the workers run another script."""
    path = tmp_path / "worker.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(Path(rewards.__file__).parent)!r})\n{text}"
    )
    monkeypatch.setattr(Worker, "command", [sys.executable, str(path)])


def started(seconds=60):
    worker = Worker(seconds)
    worker.start()
    return worker


@mark.slow
def test_hostile_text_cannot_take_the_memory(tmp_path, monkeypatch):
    """The power wants gigabytes. The limit turns that into an error before the clock does."""
    text = """
import rewards
rewards.WORKER_BYTES = 400 << 20
rewards.serve(rewards.Connection(int(sys.argv[1])), 60)
"""
    script(tmp_path, monkeypatch, text)
    grader = Grader(workers=1, seconds=60)
    cases = [("3", "2^{10^{10}}"), ("1/4", "0.25")]
    assert grader.compare(cases) == [ERROR, RIGHT]
    grader.close()


def bench(*arguments):
    """bench/grader.py in a process of its own: it measures the memory of its children."""
    command = [sys.executable, str(Path(__file__).parents[1] / "bench/grader.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


CASES = r"""
{"gold": "1/2", "prediction": "0.5", "equivalent": true, "kind": "answer"}
{"gold": "1/2", "prediction": "so \\boxed{0.5}", "equivalent": true}
{"gold": "1/2", "prediction": "so 0.5", "equivalent": true}
{"gold": "3", "prediction": "3", "equivalent": false, "kind": "answer"}
"""


def test_cases_are_compared_with_their_labels(tmp_path):
    """The third has no box: a false wrong. The last is mislabelled."""
    (tmp_path / "cases.jsonl").write_text(CASES.lstrip())
    result = bench(str(tmp_path / "cases.jsonl"))
    assert result.pop("seconds") > 0
    counts = {"cases": 4, "agree": 2, "false_right": 1, "false_wrong": 1}
    assert result == {**counts, "timeouts": 0, "errors": 0}


WATCHED = """
import os, rewards
def equal(gold, answer, judge=rewards.answers.equal):
    open(r"CHILD", "w").write(str(os.getpid()))
    if answer == "fatal":
        os.kill(os.getpid(), 9)
    return judge(gold, answer)
rewards.answers.equal = equal
rewards.serve(rewards.Connection(int(sys.argv[1])), 60)
"""


@mark.parametrize("number", [signal.SIGKILL, signal.SIGPROF])
def test_what_kills_an_idle_child_decides_no_case(tmp_path, monkeypatch, number):
    """Its death was reported as a verdict, which the next case took for its own, and so on: 0.3 was
    graded as 0.5, right. While it judges, its death is an error of that case alone."""
    child = tmp_path / "child"
    script(tmp_path, monkeypatch, WATCHED.replace("CHILD", str(child)))
    grader = Grader(workers=1, seconds=60)
    assert grader.compare([("1/2", "0.5")]) == [RIGHT]
    os.kill(int(child.read_text()), number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        grader.workers[0].process.wait(2)
    cases = [("1/2", answer) for answer in ("0.3", "0.50", "fatal", "0.4", "5/10")]
    assert grader.compare(cases) == [WRONG, RIGHT, ERROR, WRONG, RIGHT]
    grader.close()


def test_workers_hash_alike_and_are_signalled_once(tmp_path, monkeypatch):
    """sympy's sets follow the hashes of names: a seed of the day could decide who is in time. Once
    a process was waited for, its id may belong to another one."""
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    text = """
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
for word in ("ready", str(hash("x"))):
    pipe.send_bytes(word.encode())
"""
    script(tmp_path, monkeypatch, text)
    workers = [started(), started()]
    assert len({worker.receive(60) for worker in workers}) == 1
    signalled = []
    monkeypatch.setattr(rewards.os, "killpg", lambda *arguments: signalled.append(arguments))
    for worker in workers:
        worker.process.wait()
        worker.kill()
    assert signalled == []


def test_while_one_worker_hangs_the_others_go_on(monkeypatch, tmp_path):
    """One hang costs its own limit, once. A worker that dies is an error. All others are graded, in
    order, and both workers are replaced. A worker that was slow or died says nothing about the
    case, which is asked again the next time."""
    text = """
import os, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.send_bytes(b"ready")
while True:
    gold, answer = pipe.recv()
    if gold in ("hang", "die") and not os.path.exists(answer):
        open(answer, "x")
        time.sleep(1000 if gold == "hang" else 0)
        os._exit(1)
    pipe.send_bytes(b"right")
"""
    script(tmp_path, monkeypatch, text)
    grader = Grader(workers=2, seconds=2 / rewards.WALL)
    grader.compare([("a", "x"), ("a", "y")])  # started
    workers = alive(grader)
    many = [("a", f"b{i}") for i in range(50)]
    hang, die = [("hang", str(tmp_path / "hang"))], [("die", str(tmp_path / "die"))]
    start = time.monotonic()
    verdicts = grader.compare(hang + many + die + many)
    assert verdicts == [TIMEOUT] + [RIGHT] * 50 + [ERROR] + [RIGHT] * 50
    assert 2 <= time.monotonic() - start < 3.5
    assert grader.compare(hang + die) == [RIGHT] * 2
    assert len(alive(grader)) == 2 and not alive(grader) & workers
    grader.close()


def test_a_killed_worker_takes_its_child_along():
    """Else a hang would outlive the run that gave it up."""
    worker = started()
    worker.pipe.send(("3", "9^{9^{9^9}}"))
    time.sleep(0.5)
    assert os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOHANG) is None
    worker.kill()
    with raises(ProcessLookupError):
        for _ in range(100):  # until init has reaped the child
            os.killpg(worker.process.pid, 0)
            time.sleep(0.1)


def test_a_worker_that_dies_while_idle_costs_no_verdict(grader):
    """A minute of sampling lies between two gradings. What happens to a worker meanwhile is no
    answer's fault."""
    for pid in alive(grader):
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    cases = [("1/8", "0.125"), ("1/2", "0.5"), ("3/4", "0.75")]
    assert grader.compare(cases) == [RIGHT] * 3


def test_a_worker_that_cannot_start_is_an_error_not_a_zero(monkeypatch, tmp_path):
    script(tmp_path, monkeypatch, "raise SystemExit('no math-verify')")
    with raises(RuntimeError, match="do not start"):
        Grader(workers=1).compare([("1/2", "0.5")])


def test_no_answer_is_longer_than_a_page(grader):
    """Else the parser's time grows with what a policy can write: 100,000 characters are a case.
    Equal cases are decided once."""
    cases = [("5", "0" * 999 + "5"), ("5", "0" * 1000 + "5"), ("x+1", "x+1" + "+0" * 500)]
    start = time.monotonic()
    assert (
        grader.compare(cases + [("x+1", "1+x")] * 20_000)
        == [RIGHT, WRONG, WRONG] + [RIGHT] * 20_000
    )
    assert time.monotonic() - start < 3


def test_steps_are_recognised_before_the_box():
    assert writes_steps(r"1+1=2;\boxed{2}")
    assert not writes_steps(r" \boxed{2}") and not writes_steps("1+1=2")
    assert not writes_steps(r"$$ \boxed{2} $$") and not writes_steps(r"\[\boxed{2}\]")


MODULE = """
from dataclasses import dataclass
import near_by
from .relative import two
from statistics import fmean

@dataclass
class Point:
    x: float = near_by.ONE

def one(problem, response):
    return Point().x

def three(problem, response):
    return Point().x + two()
"""


FILES = {
    "eval": MODULE,
    "near_by": "ONE = 1",
    "relative": "from . import deeper\ndef two(): return deeper.TWO",
    "deeper": "TWO = 2",
    "other": "raise ValueError",
    "torch": "raise ValueError",  # is imported already
    "plistlib": "raise ValueError",  # is imported later
}


def test_a_reward_file_is_imported_as_a_module(tmp_path, monkeypatch):
    """A dataclass looks its module up in sys.modules; helpers stand beside the file. It may have
    the name of one of our own modules."""
    folder = tmp_path / "v1.2"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    names = ("one", "three")
    one, three = (load_reward(f"v1.2/eval.py:{name}").function for name in names)
    assert load_reward("math") is rewards.VERIFIER
    assert (one({}, ""), three({}, "")) == (1, 3)
    assert one is rewards.import_file(folder / "eval.py").one
    import plistlib

    assert hasattr(plistlib, "loads")


# ------------------------------------------------------------------------------ one's own R_l

FORMS = """
import numpy
def single(problem, response): return len(response)
async def later(problem, response): return len(response)
def lists(problems, responses, scale=1): return [scale * len(text) for text in responses]
async def lists_later(problems, responses): return lists(problems, responses)
class Judge:
    async def __call__(self, problem, response): return len(response)
judge = Judge()
def one(response): return 1
def three(problem, response, more): return 1
def mixed(problem, responses): return 1
def lazy(problems, responses): return map(len, responses)
def array(problems, responses): return numpy.array(lists(problems, responses))
def parts(problem, response): return {"right": len(response) > 1, "form": 1}
def other_parts(problem, response): return {"right": 1}
def empty(problem, response): pass
def short(problems, responses): return [1.0]
def leaves(problem, response): raise SystemExit("no")
WEIGHTS = {"right": 1, "form": 0.25}
"""


@fixture
def own(tmp_path):
    """own(name) -> that R_l of FORMS"""
    (tmp_path / "own.py").write_text(FORMS)
    return lambda name: load_reward(f"{tmp_path / 'own.py'}:{name}")


def scorer(reward_timeout=60):
    return Scorer(reward_timeout)


def scores(reward, responses="a", using=None, problem=Problem("p7", "1", "1")):  # noqa: B008
    using = using or scorer()
    return using.begin(reward, problem, list(responses))()


def outcomes(*arguments, **more):
    return [score.outcome for score in scores(*arguments, **more)]


def function(call, **more):
    return Reward("f", call, **more)


@mark.parametrize("form", ["single", "later", "lists", "lists_later", "judge", "lazy", "array"])
def test_a_reward_has_one_of_four_forms(own, form):
    """A plain function or a coroutine, of one completion or of the lists of a group. An array that
    was compared with a word ended the run, and nothing was saved."""
    assert outcomes(own(form), ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]


@mark.parametrize("form", ["one", "three", "mixed"])
def test_a_function_of_another_form_is_refused_at_the_start(own, form):
    """It failed after minutes of sampling. `mixed` would be called with one completion, whose
    letters it takes for completions."""
    with raises(ValueError, match="reward\\(problem, response\\), reward\\(problems, responses"):
        own(form)


def test_the_parts_of_a_reward_are_weighed_by_its_file(own):
    low, high = scores(own("parts"), ["a", "bb"])
    assert (low.outcome, high.outcome) == (0.25, 1.25)
    assert (low.verdict, high.verdict) == (WRONG, RIGHT)
    assert high.values == {"R_l": 1.25, "part_right": 1.0, "part_form": 1.0, "late": 0.0}
    assert low.values["part_right"] == 0.0


SUMS = [
    (0.7 + 0.2 + 0.1, 1.0),
    (np.float32(0.65) + np.float32(0.15) + np.float32(0.2), 1.0),
    ({"a": 1, "b": 1, "c": 1}, 1.0),
    (0.999999, 0.999999),
]


@mark.parametrize("value, outcome", SUMS)
def test_parts_that_add_up_to_1_are_right(value, outcome):
    """0.7 + 0.2 + 0.1 is 0.9999999999999999: such a completion was wrong, its group all wrong."""
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    assert outcomes(function(lambda *_: value, weights=weights)) == [outcome]


def test_a_reward_sees_what_the_template_opened(toy_policy):
    """A format reward that asks for <think>...</think> gave 0 to every completion; the page showed
    an end of thoughts without their beginning."""
    seen = []
    reward = function(lambda problem, response: seen.append(response) or 1)
    prompt = replace(*toy_policy.render([Problem("p", "1", "1")]), opening="<think>")
    requests = [Request(prompt, [stream_key(1, 0)], reward, 3)]
    ((one,),) = Solver(toy_policy, scorer()).attempt(requests, Sampling(1.0), 8)
    assert seen == [one.text] and one.text.startswith("<think>")
    assert not writes_steps("<think>\\boxed{1}")


FAILURES = """
other_parts | parts ['right'], but WEIGHTS of its file is {'right': 1.0, 'form': 0.25}
empty       | TypeError
short       | 1 numbers for 2 responses
leaves      | SystemExit: no
"""


@mark.parametrize("name, words", table(FAILURES))
def test_what_a_reward_does_wrong_is_said_with_its_problem(own, name, words):
    """A number too few would shift all rewards behind it to other completions."""
    with raises(Stop, match="own.py:" + name + ", problem 'p7': ") as caught:
        scores(own(name), "ab")
    assert words in str(caught.value)


def test_a_reward_gets_the_record_of_the_file_and_its_answer_as_it_is():
    """A list or an object that became a text could not be compared."""
    problem = Problem("p", "1+1", {"tests": [1, None]}, other={"source": "s"})
    calls = []
    scores(function(lambda *each: calls.append(each) or 1), "a", problem=problem)
    record = {"id": "p", "problem": "1+1", "answer": {"tests": [1, None]}, "source": "s"}
    assert calls == [(record, "a")]


@mark.parametrize("lists", [False, True])
def test_calls_share_no_record(lists):
    """One that empties a list in it would change what the next call sees, whichever comes first."""

    def last(record, _):
        return record["answer"].pop() + len(record["answer"])

    call = (lambda *each: map(last, *each)) if lists else last
    problem = Problem("p", "1", [1, 2, 3])
    assert outcomes(function(call, lists=lists), "abc", problem=problem) == [5.0] * 3


@mark.parametrize("workers", [1, 16])
def test_so_many_calls_wait_together_and_no_more(workers, monkeypatch):
    """256 calls of 40 ms take 10 s one after the other. Their order is that of the completions,
    whichever comes first."""
    monkeypatch.setattr(rewards, "MOST_CALLS", workers)
    running, counts = [], []

    def watched(problem, response):
        running.append(response)
        counts.append(len(running))
        time.sleep(0.02 * (1 + int(response) % 3))
        running.remove(response)
        return float(response)

    responses, start = list(map(str, range(256 if workers > 1 else 8))), time.monotonic()
    assert outcomes(function(watched), responses) == list(map(float, responses))
    assert max(counts) == workers
    assert time.monotonic() - start < 5


def test_a_group_is_scored_while_others_are_sampled():
    """Sampling hides a slow judge. The first group is asked for long before the last is there."""
    model, steps, begun = random_model(), [], {}
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    keys, settings = [[stream_key(i, 0)] for i in range(2)], dict(stop_ids=(), temperature=1.0)
    for number, _ in sample(model, [[5, 6]] * 2, keys, [[3], [40]], slots=8, **settings):
        begun[number] = len(steps)
    assert begun[0] + 30 < begun[1]


def stubborn(problem, response):
    """Catches what it can, as rewards do."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.1)
    return 1.0


def busy(problem, response):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    return 1.0


def locked(problem, response):
    """Holds Python's lock all the time, so that no clock of Python's runs."""
    ctypes.PyDLL(None).usleep(500_000)
    return 1.0


async def deaf(problem, response):
    """An async judge that does not wait, but stands in the way of all others."""
    time.sleep(1)
    return 1.0


async def clinging(problem, response):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
    return 1.0


@mark.parametrize("call", [stubborn, busy, locked, deaf, clinging], ids=lambda call: call.__name__)
def test_a_call_over_its_time_breaks_its_group_alone(call, monkeypatch):
    """Whatever it catches. The group behind it is scored in time: a place that a late call kept
    for ever would be missing."""
    monkeypatch.setattr(rewards, "MOST_CALLS", 1)
    using = scorer(reward_timeout=0.2)
    slow = using.begin(function(call), Problem("p", "1", "1"), "a")
    good = using.begin(function(lambda *_: 2), Problem("q", "1", "1"), ["b"])
    start = time.monotonic()
    (late,), (on_time,) = slow(), good()
    assert time.monotonic() - start < 0.9
    assert late.verdict == LATE and math.isnan(late.outcome) and on_time.outcome == 2
    assert late.values == {"R_l": 0.0, "late": 1.0}


def test_one_late_completion_makes_its_group_late():
    """Also where numbers are made one by one: `map` returns at once, and its work was done outside
    of the clock, and could hang the run."""
    using, pauses = scorer(reward_timeout=0.2), {"a": 0.4, "b": 0}

    def slow(_, response):
        return time.sleep(pauses[response]) or 1

    for reward in (function(slow), function(lambda *each: map(slow, *each), lists=True)):
        assert [score.verdict for score in scores(reward, "ba", using)] == [LATE, LATE]
        assert outcomes(reward, "bb", using) == [1, 1]


def test_calls_that_hang_end_the_run(monkeypatch):
    """Each keeps a thread, its memory and perhaps a core. One that ends later is forgotten."""
    monkeypatch.setattr(rewards, "MOST_LEFT", 3)
    using, end = scorer(reward_timeout=0.1), threading.Event()
    hanging = function(lambda problem, response: end.wait(20))
    scores(hanging, "aaa", using)
    with raises(Stop, match="3 calls of --reward go on after .* the last of problem 'p7'"):
        scores(hanging, "a", using)
    end.set()
    time.sleep(0.2)
    assert outcomes(function(lambda *_: 1), "a", using) == [1]


async def standing(problem, response):
    time.sleep(0.1)
    return 1.0


def test_a_task_that_never_began_does_not_hang(monkeypatch):
    """One that holds up the loop keeps the others from their beginning: they are late, but no call
    goes on for ever."""
    monkeypatch.setattr(rewards, "MOST_CALLS", 8)
    using = scorer(reward_timeout=0.15)
    assert math.isnan(outcomes(function(standing), "a" * 24, using)[0])
    end = time.monotonic() + 5
    while not all(future.done() for _, future in using.calls.left):
        assert time.monotonic() < end
        time.sleep(0.05)
    monkeypatch.setattr(rewards, "MOST_LEFT", 1)
    assert using.calls.left and outcomes(function(lambda *_: 1), "a", using) == [1]


def test_what_is_dropped_is_not_called(monkeypatch):
    """After Ctrl-C a judge that costs money must not go on with the rest of the draw."""
    monkeypatch.setattr(rewards, "MOST_CALLS", 1)
    called, using, free = [], scorer(), threading.Event()
    reward = function(lambda problem, response: called.append(response) or free.wait(5))
    using.begin(reward, Problem("p", "1", "1"), list("abc"))
    time.sleep(0.2)
    using.calls.drop()
    free.set()
    assert outcomes(reward, "d", using) == [1] and called == ["a", "d"]


def test_a_coroutine_that_is_late_is_cancelled():
    """It would go on, and cost."""
    ended = []

    async def reward(problem, response):
        try:
            await asyncio.sleep(20)
        finally:
            ended.append(problem["id"])

    assert math.isnan(*outcomes(function(reward), "a", scorer(reward_timeout=0.05)))
    time.sleep(0.2)
    assert ended == ["p7"]
