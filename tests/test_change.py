"""docs/change.md: every diff applies to the project as it is, acts in a training, survives a
resume where it has state, and leaves the tests that its section names green."""

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import column, lines, write_lines
from launch import ROOT, said, start, wait
from test_resume import assert_the_same, checkpoints

pytestmark = pytest.mark.slow
MOST_LINES, MOST_FILES = 15, 4  # of a change, its tests aside
SECTION = re.compile(r"^## (.+?)$(.*?)^```diff\n(.*?)^```$", re.M | re.S)
CHANGES = {
    title: (text, diff)
    for title, text, diff in SECTION.findall((ROOT / "docs/change.md").read_text())
}
FOLDERS = ["answers", "common", "experiments", "policy", "run", "tests", "tools"]
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


def goes_on(folder, run):
    """The last two updates of the run anew, from a checkpoint, to the same bits."""
    again, last = f"{run}, resumed", checkpoints(folder, run)[-1]
    shutil.copytree(folder / run, folder / again)
    for name in checkpoints(folder, again)[-2:]:
        shutil.rmtree(folder / again / "checkpoints" / name)
    did(folder, f'--resume "{again}"')
    assert_the_same(folder, again, run, int(last))


FLAGS_OF = {
    "RLOO's advantage": "--adv-std rloo",
    "GSPO's ratio": "",
    "Your own order of problems": "",
    "Your own end of a level": "--updates 60",
    "Your own length reward": "--length-kind efficiency",
    "A hint from the worked solution": "--hint 0.5 0 --eval-data p.jsonl",
}


@pytest.fixture
def diff(workshop, title):
    """It is applied for the time of a test."""
    _, diff = CHANGES[title]
    git_apply(workshop, diff)
    yield diff
    git_apply(workshop, diff, "--reverse")


@pytest.mark.parametrize("title", CHANGES)
def test_a_worked_change_applies_and_goes_on(workshop, tmp_path, title, diff):
    """A page of diffs that nobody applies is wrong after the next refactoring; a change that acts
    on nothing; state that it adds and no checkpoint holds."""
    files = [part for part in diff.split("--- a/")[1:] if not part.startswith("tests/")]
    assert len(re.findall(r"^(?:\+(?!\+\+ )|-)", "".join(files), re.M)) <= MOST_LINES
    assert len(files) <= MOST_FILES
    did(workshop, f'{FLAGS} {FLAGS_OF[title]} --out "{title}"')
    one, other = (lines(workshop / run / "metrics.jsonl") for run in (title, "unchanged"))
    assert column(one, "kl_old") != column(other, "kl_old")
    goes_on(workshop, title)

    tests = re.findall(r"tests/test_\w+\.py(?:::\w+)?", CHANGES[title][0])
    options = f"-q -p no:cacheprovider --rootdir project --basetemp {tmp_path} "
    did(workshop, options + " ".join(f"project/{name}" for name in tests), "pytest")


def test_every_change_is_checked():
    """A section whose fence or title is written otherwise would be left out without a word."""
    page = (ROOT / "docs/change.md").read_text()
    assert CHANGES.keys() == FLAGS_OF.keys() == set(re.findall(r"^## (.+)$", page, re.M))
