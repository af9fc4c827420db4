"""The grader against a table of cases, hostile ones among them, and its workers against hangs and deaths."""

import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewards
from rewards import (
    CASE_SECONDS,
    ERROR,
    RIGHT,
    TIMEOUT,
    WRONG,
    Grader,
    canonical,
    extract_answer,
    load_reward,
    writes_steps,
)


@pytest.fixture(scope="module")
def grader():
    grader = Grader(workers=2)
    yield grader
    grader.close()


EXTRACTED = [  # response, answer
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} no, \boxed{2}", "2"),  # the last box
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),  # nested braces
    (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),  # escaped braces do not count
    (r"\boxed {7}", "7"),
    (r"\boxed{1} then \boxed{2", None),  # the last box is unclosed: no credit for an earlier one
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed{...}", None),
    ("the answer is 42", None),
    (r"<think>\boxed{1}</think>\boxed{2}", "2"),
    (r"<think>\boxed{1}</think> so it is 2", None),  # thoughts are no answer
    (r"<think>\boxed{1}", None),  # never closed
    (r"<think>a</think><think>\boxed{1}", None),
    (r"\boxed{1}</think>\boxed{2}", "2"),  # opened by the template
    (r"</think>\boxed{1}</think>\boxed{2}", "2"),  # the last close tag
    (r"</think>\boxed{1}</think> so it is 2", None),
    (r"\boxed{50}% \boxed{60}", None),
    (r"\boxed{1}%\boxed{2}% or \boxed{3}", "3"),
    (r"\boxed{50}%, no, \boxed{60}%", "60"),  # a comment to LaTeX, or the last box
    ("", None),
]


@pytest.mark.parametrize("text, answer", EXTRACTED)
def test_the_answer_is_the_last_balanced_box(text, answer):
    assert extract_answer(text) == answer


def test_last_number_only_where_allowed_and_without_a_box():
    assert extract_answer("3 apples, so 1,234.5.", allow_last_number=True) == "1,234.5"
    assert extract_answer(r"\boxed{x} 5", allow_last_number=True) == "x"
    assert extract_answer(r"\boxed{x 5", allow_last_number=True) is None
    assert extract_answer("<think> 5", allow_last_number=True) is None
    for text, number in (
        ("so 10-5", "5"),
        ("it is -5", "-5"),
        ("x=-5", "-5"),
        ("(2)-7", "7"),
        ("no number", None),
    ):
        assert (
            extract_answer(text, allow_last_number=True) == number
        )  # a subtraction's sign is not the number's


MONSTERS = [
    "9^{9^{9^{9}}}",
    "(10^{10})!",
    r"\binom{10^9}{5\cdot 10^8}",
    "(" * 5000,
    "{" * 300 + "1" + "}" * 300,
    "9" * 100_000,
    r"\frac{" * 200 + "1" + "}{2}" * 200,
    "\x00\ud800 \u202e",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n}",
]


def test_monsters_are_worth_nothing_and_hurt_nobody():
    """Each within half a second of processor time, without an exception, and the ordinary cases around them keep their
    verdicts and their order. The workers survive: only their children die."""
    grader = Grader(workers=2)
    grader.compare([("1/4", "0.25"), ("1/5", "0.2")])  # started
    workers, pairs = list(grader.workers), []
    for monster in MONSTERS:
        pairs += [
            ("17", f"\\boxed{{{monster}}}"),
            (r"\frac{1}{2}", r"\boxed{0.5}"),
            ("x+1", r"\boxed{x+2}"),
        ]
    before = cpu_of_children()
    verdicts = grader.grade(pairs)
    assert (
        RIGHT not in verdicts[::3]
        and set(verdicts[1::3]) == {RIGHT}
        and set(verdicts[2::3]) == {WRONG}
    )
    assert (
        sum(grader.counts.values()) == len(pairs) + 2
        and grader.counts[TIMEOUT] + grader.counts[ERROR] >= 3
    )
    assert grader.workers == workers and not any(w.dead for w in workers)
    grader.close()
    assert cpu_of_children() - before < 0.5 * len(MONSTERS) + 10  # and twice the imports


def cpu_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "monster",
    [
        "9^{9^{9^{9}}}",
        "(10^{9})!",
        r"\binom{10^{9}}{5 \cdot 10^{8}}",
        "(x+y+z+w)^{1001}",
        "10^{10^{10}}",
    ],
)
def test_a_case_may_take_its_time_and_no_more(monster, grader):
    """A limit that Python enforces waits for the end of one long multiplication: 5 s and more for each of these."""
    grader.compare([("1/4", "0.25"), ("1/5", "0.2")])
    start = time.monotonic()
    (verdict,) = grader.compare([("(x+y+z+w)^{1000}", monster)])
    assert verdict in (TIMEOUT, ERROR, WRONG)
    assert time.monotonic() - start < 5 * CASE_SECONDS  # wall time, on a machine that may be busy
    start = time.monotonic()
    assert (
        grader.compare([("1/3", "2/6"), ("1/3", "3/9")]) == [RIGHT] * 2
        and time.monotonic() - start < 3 * CASE_SECONDS
    )


def test_hangs_cost_their_limit_shared_by_the_workers():
    """Ordinary cases go on beside them: hangs x (limit + 0.5 s) / workers is all that the wall clock may add."""
    grader = Grader(workers=2)
    ordinary = [("1/4", f"{i}/{4 * i}") for i in range(1, 201)]
    start = time.monotonic()
    grader.compare(
        [("1/3", "2/6"), ("1/3", "3/9"), *((g, f"-{a}") for g, a in ordinary)]
    )  # started, and as many
    alone, hangs = time.monotonic() - start, 10
    start = time.monotonic()
    verdicts = grader.compare(
        [
            case
            for i, case in enumerate(ordinary)
            for case in ([("3", f"{i}^{{9^{{9^9}}}}")] if 0 < i <= hangs else []) + [case]
        ]
    )
    assert (
        verdicts.count(RIGHT) == 200
        and verdicts.count(TIMEOUT) + verdicts.count(ERROR) >= hangs - 1
    )  # 1 to any power may be known
    assert time.monotonic() - start < alone + hangs * (CASE_SECONDS + 0.5) / 2
    grader.close()


def test_hostile_text_cannot_take_the_memory():
    """The power wants gigabytes; the limit turns that into an error before the clock does."""
    code = "import rewards; rewards.WORKER_BYTES = 400 << 20; rewards.serve(60)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(rewards.__file__).parent,
        text=True,
        bufsize=1,
        **pipes,
    ) as worker:
        assert worker.stdout.readline() == '"ready"\n'
        for gold, answer, verdict in (("3", "2^{10^{10}}", ERROR), ("1/4", "0.25", RIGHT)):
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            assert json.loads(worker.stdout.readline()) == verdict
        worker.stdin.close()


def test_fuzz():
    """2,000 mutated completions, known ones among them: bench/grader.py says what is promised."""
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "bench/grader.py"),
        "--fuzz",
        "2000",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True
    )  # a process of its own: it measures its children's memory
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (
        result["verdicts"][RIGHT] > 100
        and result["verdicts"][WRONG] > 500
        and result["largest_worker_mb"] < 1000
    )


def slow_worker(monkeypatch, tmp_path):
    """Workers that hang on the answer `hang`, die on `die`, and are right otherwise."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\nprint(json.dumps('ready'), flush=True)\n"
        "for line in sys.stdin:\n    gold, answer = json.loads(line)\n    time.sleep(1000) if answer == 'hang' else None\n"
        "    os._exit(1) if answer == 'die' else None\n    print(json.dumps('right'), flush=True)\n"
    )
    monkeypatch.setattr(rewards.os.path, "abspath", lambda _: str(script))


def test_while_one_worker_hangs_the_others_go_on(monkeypatch, tmp_path):
    """One hang costs its own limit, once; a worker that dies is an error; all others are graded, in order."""
    slow_worker(monkeypatch, tmp_path)
    grader = Grader(workers=2, seconds=2 / rewards.WALL)
    grader.compare([("a", "x"), ("a", "y")])  # started
    first, second = grader.workers
    start = time.monotonic()
    verdicts = grader.compare(
        [
            ("a", "hang"),
            *[("a", f"b{i}") for i in range(50)],
            ("a", "die"),
            *[("a", f"c{i}") for i in range(50)],
        ]
    )
    assert verdicts == [TIMEOUT] + [RIGHT] * 50 + [ERROR] + [RIGHT] * 50
    assert 2 <= time.monotonic() - start < 3.5
    assert (
        first not in grader.workers and second not in grader.workers and len(grader.workers) == 2
    )  # both replaced
    assert first.process.poll() is not None
    assert grader.compare([("a", "again")]) == [RIGHT]
    grader.close()


def test_a_killed_worker_takes_its_child_along():
    """Else a hang would outlive the run that gave it up."""
    worker = rewards.Worker(seconds=60)
    assert worker.receive() == "ready"
    worker.send(("3", "9^{9^{9^9}}"), 60)
    time.sleep(0.5)
    output = os.dup(worker.process.stdout.fileno())
    worker.kill()
    assert (
        select.select([output], [], [], 10)[0] and os.read(output, 1) == b""
    )  # its end: nobody is left to write
    os.close(output)


def test_a_worker_that_dies_while_idle_costs_no_verdict(grader):
    """A minute of sampling lies between two gradings: what happens to a worker meanwhile is no answer's fault."""
    assert grader.compare([("1/4", "0.25"), ("1/5", "0.2")]) == [RIGHT] * 2
    for worker in grader.workers:
        worker.process.kill()
        worker.process.wait()
    assert grader.compare([("1/8", "0.125"), ("1/2", "0.5"), ("3/4", "0.75")]) == [RIGHT] * 3


def test_a_worker_that_cannot_start_is_an_error_not_a_zero(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit('no math-verify')")
    monkeypatch.setattr(rewards.os.path, "abspath", lambda _: str(tmp_path / "broken.py"))
    with pytest.raises(RuntimeError, match="do not start"):
        Grader(workers=1).compare([("1/2", "0.5")])


def test_no_answer_is_longer_than_a_page(grader):
    """Else the parser's time grows with what a policy can write: 100,000 characters are a case."""
    assert grader.compare(
        [("5", "0" * 999 + "5"), ("5", "0" * 1000 + "5"), ("x+1", "x+1" + "+0" * 500)]
    ) == [RIGHT, WRONG, WRONG]


def test_equal_cases_are_decided_once(grader):
    before = grader.counts[RIGHT]
    start = time.monotonic()
    assert grader.grade([("x+1", r"\boxed{1+x}")] * 20_000) == [RIGHT] * 20_000
    assert time.monotonic() - start < 3 and grader.counts[RIGHT] == before + 20_000


def test_canonical_answers_meet():
    assert (
        len(
            {
                canonical(a)
                for a in (r"\frac{1}{2}", r"\dfrac{1}{2}", r"$\frac{1} {2}$", r"\tfrac{1}{2}.")
            }
        )
        == 1
    )
    assert canonical("025") == "25" != canonical("-25")
    for same in (
        ("1,2", "2,1", r"\{1,2\}", "x=2, x=1"),
        ("B", r"\text{B}", r"\text{(B)}"),
        ("x=5", "5", "5.0"),
        (r"5\text{ km}", r"5\text{ kilometers}"),
        ("(1,0.5)", r"(1, \frac12)"),
    ):
        assert len({canonical(a) for a in same}) == 1, same


def test_canonical_answers_stay_apart():
    """Votes for wrong answers must not be counted for the right one, nor hostile text take the time or raise."""
    different = (
        "5 m",
        "5 km",
        "5",
        "4",
        "2x=4",
        "x<4",
        "(1,2)",
        "(2,1)",
        "[1,2]",
        "1,2",
        "B",
        "b",
        r"\sqrt{4}x",
        "4\\%",
    )
    assert len({canonical(a) for a in different}) == len(different)
    start = time.process_time()
    for monster in (
        *MONSTERS,
        "((" * 99,
        "a" * 199,
        r"\text{" * 30,
        "x," * 99,
        "((((1,2),3),4),5)",
        "=" * 150,
        "1" * 150 + "/0",
        r"\pm" * 60,
        "",
        "a b " * 49 + "=1",
        "4" + " orxt" * 21 + "{",
    ):
        assert isinstance(canonical(monster), str)
    assert time.process_time() - start < 1


def test_steps_are_recognised_before_the_box():
    assert (
        writes_steps(r"1+1=2;\boxed{2}")
        and not writes_steps(r" \boxed{2}")
        and not writes_steps("1+1=2")
    )


def test_user_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(problem, response):\n    return 1.0 if len(response) < 5 else 0.0\n")
    assert load_reward(f"{path}:short")({"problem": "p"}, "four") == 1.0
    assert load_reward("math") is None
    for name, message in (
        (f"{path}:long", "no function long"),
        (f"{tmp_path}/none.py:f", "no file"),
        ("maths", "expected math"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(name)


def test_command_line(tmp_path, capsys, monkeypatch):
    cases = [
        {"gold": "1/2", "prediction": "0.5", "equivalent": True, "kind": "answer"},
        {"gold": "1/2", "prediction": r"so \boxed{0.5}", "equivalent": True},
        {
            "gold": "1/2",
            "prediction": "so 0.5",
            "equivalent": True,
        },  # no box in a response: false wrong
        {
            "gold": "3",
            "prediction": "3",
            "equivalent": False,
            "kind": "answer",
        },  # mislabelled: false right
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    monkeypatch.setattr("sys.argv", ["rewards.py", str(tmp_path / "cases.jsonl")])
    rewards.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.pop("seconds") > 0
    assert result == {
        "cases": 4,
        "agree": 2,
        "false_right": 1,
        "false_wrong": 1,
        "timeouts": 0,
        "errors": 0,
    }
