"""Extraction, the workers against hangs and deaths, a user's reward, the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
from conftest import table
from pytest import fixture, mark, raises

import rewards
from answers.equality import extract_answer
from data import Problem
from rewards import (
    CASE_SECONDS,
    ERROR,
    RIGHT,
    TIMEOUT,
    WRONG,
    Grader,
    Worker,
    load_reward,
    writes_steps,
)

START = [("1/4", "0.25"), ("1/5", "0.2")]  # one case per worker: it is started


@fixture(scope="module")
def grader():
    grader = Grader(workers=2)
    grader.compare(START)
    yield grader
    grader.close()


def alive(grader):
    """The process ids of idle workers."""
    workers = filter(None, grader.idle)
    return {worker.process.pid for worker in workers if worker.process.poll() is None}


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


LAST_NUMBERS = r"""
3 apples, so 1,234.5. | 1,234.5
\boxed{x} 5 | x
\boxed{x 5 | None
<think> 5 | None
so 10-5 | 5
it is -5 | -5
x=-5 | -5
(2)-7 | 7
no number | None
"""


@mark.parametrize("text, answer", table(LAST_NUMBERS))
def test_last_number_only_where_allowed_and_without_a_box(text, answer):
    """A subtraction's sign is not the number's. Where it is not allowed: see EXTRACTED."""
    assert str(extract_answer(text, allow_last_number=True)) == answer


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
    workers = alive(grader)
    before = grader.counts.total()
    pairs = []
    for monster in MONSTERS:
        gold = "(x+y+z+w)^{1000}" if "x" in monster else "17"
        pairs += [(gold, f"\\boxed{{{monster}}}")]
        pairs += [(r"\frac{1}{2}", r"\boxed{0.5}"), ("x+1", r"\boxed{x+2}")]
    start = time.monotonic()
    verdicts = grader.grade(pairs)
    assert time.monotonic() - start < 3 * CASE_SECONDS * len(MONSTERS)  # wall time, a busy machine
    assert RIGHT not in verdicts[::3]
    assert set(verdicts[1::3]) == {RIGHT} and set(verdicts[2::3]) == {WRONG}
    assert grader.counts.total() == before + len(pairs)
    assert grader.counts[TIMEOUT] + grader.counts[ERROR] >= 3
    assert alive(grader) == workers


def script(tmp_path, monkeypatch, text):
    """Let the workers run another script."""
    path = tmp_path / "worker.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(Path(rewards.__file__).parent)!r})\n{text}"
    )
    monkeypatch.setattr(Worker, "command", [sys.executable, str(path)])


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


def test_fuzz():
    """1,000 mutated completions, known ones among them: bench/grader.py says what is promised."""
    bench = Path(__file__).parents[1] / "bench/grader.py"
    command = [sys.executable, str(bench), "--fuzz", "1000", "--seed", "1"]
    # A process of its own: it measures the memory of its children.
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["verdicts"][RIGHT] > 70 and result["verdicts"][WRONG] > 300
    assert result["largest_worker_mb"] < 1000


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
        grader.idle[0].process.wait(2)
    cases = [("1/2", answer) for answer in ("0.3", "0.50", "fatal", "0.4", "5/10")]
    assert grader.compare(cases) == [WRONG, RIGHT, ERROR, WRONG, RIGHT]
    grader.close()


def test_workers_hash_alike_and_are_signalled_once(tmp_path, monkeypatch):
    """sympy's sets follow the hashes of names: a seed of the day could decide who is in time. Once
    a process was waited for, its id may belong to another one."""
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    text = """
from multiprocessing.connection import Connection
Connection(int(sys.argv[1])).send_bytes(str(hash("x")).encode())
"""
    script(tmp_path, monkeypatch, text)
    workers = [Worker(seconds=1), Worker(seconds=1)]
    assert len({worker.receive(60) for worker in workers}) == 1
    signalled = []
    monkeypatch.setattr(rewards.os, "killpg", lambda *arguments: signalled.append(arguments))
    for worker in workers:
        worker.process.wait()
        worker.kill()
    assert signalled == []


def test_while_one_worker_hangs_the_others_go_on(monkeypatch, tmp_path):
    """One hang costs its own limit, once. A worker that dies is an error. All others are graded, in
    order, and both workers are replaced. Only right and wrong are remembered: a worker that was
    slow or died says nothing about the case, which is asked again the next time."""
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
    worker = Worker(seconds=60)
    assert worker.receive(60) == "ready"
    worker.pipe.send(("3", "9^{9^{9^9}}"))
    time.sleep(0.5)
    assert os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOHANG) is None
    worker.kill()
    with raises(ProcessLookupError):
        for _ in range(100):  # until init has reaped the child
            os.killpg(worker.process.pid, 0)
            time.sleep(0.1)


def test_zombies_of_macos_are_no_error(monkeypatch):
    """There, killpg raises PermissionError if only zombies are left in the group."""
    worker = Worker(seconds=1)
    worker.process.kill()

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(rewards.os, "killpg", refuse)
    worker.kill()
    assert worker.process.poll() is not None


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
    """Else the parser's time grows with what a policy can write: 100,000 characters are a case."""
    cases = [("5", "0" * 999 + "5"), ("5", "0" * 1000 + "5"), ("x+1", "x+1" + "+0" * 500)]
    assert grader.compare(cases) == [RIGHT, WRONG, WRONG]


def test_equal_cases_are_decided_once(grader):
    before = grader.counts[RIGHT]
    start = time.monotonic()
    assert grader.grade([("x+1", r"\boxed{1+x}")] * 20_000) == [RIGHT] * 20_000
    assert time.monotonic() - start < 3 and grader.counts[RIGHT] == before + 20_000


def test_steps_are_recognised_before_the_box():
    assert writes_steps(r"1+1=2;\boxed{2}")
    assert not writes_steps(r" \boxed{2}") and not writes_steps("1+1=2")


def test_user_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(problem, response):\n    return float(len(response) < 5)\n")
    assert load_reward(f"{path}:short")({"problem": "p"}, "four") == 1.0
    assert load_reward("math") is None


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


def test_a_reward_file_is_imported_as_a_module(tmp_path, monkeypatch):
    """A dataclass looks its module up in sys.modules; helpers stand beside the file. It may have
    the name of one of our own modules. All of its files, and no others, are what --resume
    checks."""
    folder = tmp_path / "v1.2"
    folder.mkdir()
    (folder / "eval.py").write_text(MODULE)
    (folder / "near_by.py").write_text("ONE = 1")
    (folder / "relative.py").write_text("from . import deeper\ndef two(): return deeper.TWO")
    (folder / "deeper.py").write_text("TWO = 2")
    (folder / "other.py").write_text("raise ValueError")
    (folder / "torch.py").write_text("raise ValueError")  # is imported already
    (folder / "plistlib.py").write_text("raise ValueError")  # is imported later
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    ours = types.SimpleNamespace(__file__=str(folder / "train.py"))  # as where it stands in a clone
    monkeypatch.setitem(sys.modules, "a module that is imported already", ours)
    names = ("one", "three")
    one, three = (load_reward(f"v1.2/eval.py:{name}") for name in names)
    assert (one({}, ""), three({}, "")) == (1, 3)
    module, files = rewards.import_file(folder / "eval.py")
    assert one is module.one
    expected = ["deeper.py", "eval.py", "near_by.py", "relative.py"]
    assert sorted(files) == [str(folder / name) for name in expected]
    import plistlib

    assert hasattr(plistlib, "loads")


def test_a_reward_of_lists_is_known_by_the_names_of_its_parameters():
    """Called once for a group, with a record for each response. A number too few would shift all
    rewards behind it to other completions."""
    problem, calls = Problem("p", "1+1", "2", other={"source": "s"}), []

    def lists(problems, responses, scale=2):
        calls.append(problems)
        return torch.tensor([scale * len(text) for text in responses])

    def short(problems, responses):
        return [1.0]

    def single(problem, responses):
        return len(responses)

    assert rewards.outcomes(lists, problem, ["a", "bb"], 60) == [2.0, 4.0]
    record = {"id": "p", "problem": "1+1", "answer": "2", "source": "s"}
    assert calls == [[record, record]]
    assert rewards.outcomes(single, problem, ["a", "bb"], 60) == [1.0, 2.0]
    with raises(ValueError, match="1 numbers for 2 responses"):
        rewards.outcomes(short, problem, ["a", "bb"], 60)


def outcomes(reward, seconds, responses="a"):
    return rewards.outcomes(reward, Problem("p7", "1", "1"), list(responses), seconds)


def stubborn(problem, response):
    """Catches what it can, as rewards do."""
    try:
        while True:
            time.sleep(60)
    except Exception:
        return 1.0


def busy(problems, responses):
    while True:
        pass


def deaf(problem, response):
    with contextlib.suppress(BaseException):
        time.sleep(60)
    return 1.0


def indignant(problem, response):
    try:
        time.sleep(60)
    except BaseException as error:
        raise ValueError from error


def alarmed(problem, response):
    """Its own alarm replaces ours, as math-verify's does."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(0.3)
    return 1.0


@mark.parametrize("reward", [stubborn, busy, deaf, indignant, alarmed])
def test_a_reward_that_takes_too_long_is_stopped(reward):
    """Whatever it makes of that: one that caught TooLate was given its number. And its clock does
    not ring later."""
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with raises(rewards.TooLate):
        outcomes(reward, 0.2, "ab")
    assert 0.2 <= time.monotonic() - start < 5
    assert outcomes(lambda problem, response: 3, 0.2) == [3]
    time.sleep(0.3)
    assert signal.getsignal(signal.SIGALRM) == before


def test_an_alarm_after_the_return_does_not_ring_later(monkeypatch):
    """Handled between the return and the end of the clock, it left clock and handler behind."""
    before, real, rung = signal.getsignal(signal.SIGALRM), signal.setitimer, []

    def setitimer(which, seconds, *interval):
        if not seconds and not rung:
            rung.append(1)
            signal.raise_signal(signal.SIGALRM)
        return real(which, seconds, *interval)

    monkeypatch.setattr(signal, "setitimer", setitimer)
    with contextlib.suppress(rewards.TooLate):
        outcomes(lambda problem, response: 1, 60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_reward_that_cannot_be_stopped_ends_the_run(monkeypatch, capsys):
    """It hung for ever: its one alarm was caught."""
    left, end = [], time.monotonic() + 5
    monkeypatch.setattr(rewards.os, "_exit", left.append)

    def endless(problem, response):
        while not left and time.monotonic() < end:
            with contextlib.suppress(BaseException):
                time.sleep(1)

    with raises(rewards.TooLate):
        outcomes(endless, 0.05)
    assert left == [1]
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "problem p7" in line and "does not end" in line


CASES = r"""
{"gold": "1/2", "prediction": "0.5", "equivalent": true, "kind": "answer"}
{"gold": "1/2", "prediction": "so \\boxed{0.5}", "equivalent": true}
{"gold": "1/2", "prediction": "so 0.5", "equivalent": true}
{"gold": "3", "prediction": "3", "equivalent": false, "kind": "answer"}
"""


def test_command_line(tmp_path, capsys, monkeypatch):
    """The third has no box: a false wrong. The last is mislabelled."""
    (tmp_path / "cases.jsonl").write_text(CASES.lstrip())
    monkeypatch.setattr("sys.argv", ["rewards.py", str(tmp_path / "cases.jsonl")])
    rewards.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.pop("seconds") > 0
    counts = {"cases": 4, "agree": 2, "false_right": 1, "false_wrong": 1}
    assert result == {**counts, "timeouts": 0, "errors": 0}
