"""docs/change.md: every diff applies to the project as it is, acts in a training, survives a
resume where it has state, and leaves the tests that its section names green."""

import functools
import importlib
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from itertools import groupby

import pytest
from conftest import lines, write_lines
from launch import ROOT, said, start, wait
from test_resume import assert_the_same, checkpoints

pytestmark = pytest.mark.slow
MOST_LINES, MOST_FILES = 15, 4  # of a change, its tests aside
SECTION = re.compile(r"^## (.+?)$(.*?)^```diff\n(.*?)^```$", re.M | re.S)
CHANGES = {
    title: (text, diff)
    for title, text, diff in SECTION.findall((ROOT / "docs/change.md").read_text())
}
FOLDERS = ["answers", "experiments", "policy", "run", "tests", "tools"]
FLAGS = """--model toy --data p.jsonl --reward r.py:even_start --quality 1 --group-size 4
--buffer-groups 2 --prompts 4 --max-new-tokens 8 --length-weight 0.3 --updates 6 --lr 1e-2
--warmup 0 --device cpu --save-every 1 --keep-checkpoints 99"""
REWARD = """
def even_start(problem, response):
    return float(ord(response[:1] or "1") % 2 == 0)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    """A folder with a model, problems, a reward, and a copy of the project with a run of it."""
    folder = tmp_path_factory.mktemp("change")
    shutil.copytree(toy_folder, folder / "toy")
    rows = []
    for i, c in enumerate("0123456789"):
        row = {"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": i * 7 % 5 / 5}
        rows.append(row | {"solution": f"{c} + 1 - {c} = 1"})
    write_lines(folder / "p.jsonl", rows)
    (folder / "r.py").write_text(REWARD)
    copy = folder / "project"  # without what no test here needs
    copy.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy)
    leave_out = shutil.ignore_patterns("results", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=leave_out)
    did(folder, f"{FLAGS} --out unchanged")
    return folder


def git_apply(folder, diff, *options):
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder)}  # it may lie in a repository
    command = ["git", "apply", *options]
    subprocess.run(command, input=diff, text=True, cwd=folder / "project", env=alone, check=True)


def did(folder, command, program="train"):
    """PROGRAM.main(command) in a child that imports the copy of the project: it must go well."""
    inside = functools.partial(move_to, str(folder / "project"))
    assert wait(start(folder, command, sabotage=inside, program=program)) == [0], said(folder)


def move_to(copy):
    """In the child: forget the project's modules, and import those of the copy from now on."""
    tests = ROOT / "tests"
    own = {path.stem for folder in (ROOT, tests) for path in folder.iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in own:
            del sys.modules[name]
    others = [path for path in sys.path if path not in ("", str(ROOT), str(tests))]
    sys.path[:] = [copy, f"{copy}/tests", *others]
    os.environ["PYTHONPATH"] = copy
    os.environ.pop("PYTEST_ADDOPTS", None)
    importlib.import_module("launch").quick()


def groups(out):
    """Of completions.jsonl: a list of rows for each group, in the order of drawing."""

    def number(row):
        return row["update"], row["group"]

    rows = sorted(lines(out / "completions.jsonl"), key=number)
    return [list(some) for _, some in groupby(rows, number)]


def goes_on(folder, run):
    """The last two updates of the run anew, from a checkpoint, to the same bits."""
    again, last = f"{run}, resumed", checkpoints(folder, run)[-1]
    shutil.copytree(folder / run, folder / again)
    for name in checkpoints(folder, again)[-2:]:
        shutil.rmtree(folder / again / "checkpoints" / name)
    did(folder, f'--resume "{again}"')
    assert_the_same(folder, again, run, int(last))


# ----------------------------------------------------------------------------- what must be other
# Each takes the folder, the name of the changed run in it, and what that run printed.


def leave_one_out(folder, run, _):
    for group in groups(folder / run):
        rewards = [row["outcome"] + row["length_reward"] for row in group]
        for row, reward in zip(group, rewards):
            others = (sum(rewards) - reward) / (len(group) - 1)
            assert row["advantage"] == pytest.approx(reward - others)


def one_ratio(folder, run, _):
    """Until the second step of the first update both runs are one: a mean is below its maximum."""
    ours, before = (lines(folder / out / "metrics.jsonl")[0] for out in (run, "unchanged"))
    assert ours["logprob_gap_max"] == before["logprob_gap_max"]
    assert 1 < ours["ratio_max"] < before["ratio_max"]
    assert 0 < ours["kl_old"] < before["kl_old"]


def hardest_first(folder, run, _):
    problems = {row["id"]: row["pass_rate"] for row in lines(folder / "p.jsonl")}
    drawn = [group[0]["problem_id"] for group in groups(folder / run)]
    for i in range(0, len(drawn), len(problems)):
        rates = [problems[name] for name in drawn[i : i + len(problems)]]
        assert rates == sorted(problems.values())[: len(rates)]
    assert len(drawn) > len(problems)
    goes_on(folder, run)


def no_longer_rises(folder, run, said):
    rows = lines(folder / run / "metrics.jsonl")
    accuracy = [row["accuracy"] for row in rows if row["groups_drawn"]]
    assert len(rows) < 60 and len(accuracy) >= 10 and "its accuracy no longer rises" in said
    for end in range(10, len(accuracy) + 1):
        rises = sum(accuracy[end - 5 : end]) > sum(accuracy[end - 10 : end - 5])
        assert rises == (end < len(accuracy))
    goes_on(folder, run)


def shorter_than_the_right_ones(folder, run, _):
    for group in groups(folder / run):
        right = [row["tokens"] for row in group if row["outcome"] == 1]
        for row in group:
            expected = 0
            if row["outcome"] == 1:
                z = (row["tokens"] - statistics.mean(right)) / (statistics.pstdev(right) + 1e-6)
                expected = -0.3 / (1 + math.exp(-z))
            assert row["length_reward"] == pytest.approx(expected)


def first_words_shown(folder, run, said):
    problems = {row["id"]: row for row in lines(folder / "p.jsonl")}
    for first, *_ in groups(folder / run):
        problem = problems[first["problem_id"]]
        hint = " " + problem["solution"][: len("0 + 1")] if first["level"] == 1 else ""
        assert first["problem"] == problem["problem"] + hint
    assert said.count(" + 1<") == 2  # in the prompts of level 1 that are shown, not held out
    goes_on(folder, run)


CHECKS = {
    "RLOO's advantage": (leave_one_out, "--adv-std rloo"),
    "GSPO's ratio": (one_ratio, ""),
    "Your own order of problems": (hardest_first, ""),
    "Your own end of a level": (no_longer_rises, "--updates 60"),
    "Your own length reward": (shorter_than_the_right_ones, "--length-kind efficiency"),
    "A hint from the worked solution": (first_words_shown, "--hint 0.5 0 --eval-data p.jsonl"),
}


@pytest.fixture
def diff(workshop, title):
    """It is applied for the time of a test."""
    _, diff = CHANGES[title]
    git_apply(workshop, diff)
    yield diff
    git_apply(workshop, diff, "--reverse")


@pytest.mark.parametrize("title", CHANGES)
def test_a_worked_change_applies_and_acts(workshop, tmp_path, title, diff):
    """A page of diffs that nobody applies is wrong after the next refactoring; state that a change
    adds and no checkpoint holds."""
    files = [part for part in diff.split("--- a/")[1:] if not part.startswith("tests/")]
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-)", "".join(files), re.M)) <= MOST_LINES
    assert len(files) <= MOST_FILES
    check, flags = CHECKS[title]
    did(workshop, f'{FLAGS} {flags} --out "{title}"')
    check(workshop, title, said(workshop))

    tests = re.findall(r"tests/test_\w+\.py(?:::\w+)?", CHANGES[title][0])
    options = f"-q -p no:cacheprovider --rootdir project --basetemp {tmp_path} "
    did(workshop, options + " ".join(f"project/{name}" for name in tests), "pytest")


def test_every_change_is_checked():
    """A section whose fence or title is written otherwise would be left out without a word."""
    page = (ROOT / "docs/change.md").read_text()
    assert CHANGES.keys() == CHECKS.keys() == set(re.findall(r"^## (.+)$", page, re.M))
