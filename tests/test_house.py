"""The house: which modules import which, and what the pages say of each other and of the tests."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/RESULTS.md")]


def anchors(page):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading of it."""
    for path, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_promises_name_tests_that_are_there():
    """A test that is renamed or deleted leaves its promise without proof."""
    files = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("examples/test_*.py")]
    code = "".join(path.read_text() for path in files)
    rows = re.findall(r"^\|.*\|(.*)\|$", (ROOT / "docs/promises.md").read_text(), re.M)
    names = re.findall(r"`(\w+)`", "".join(rows))
    assert len(names) > 20
    for name in names:
        assert f"def test_{name}" in code, name


# The docstrings of tests/mutants.py (mutmut brings libcst) and bench/peer_trl.py install these.
INSTALLED_APART = {"mutmut", "libcst", "trl"}


def test_requirements_are_what_is_imported_each_with_its_reason():
    """A package that is installed only because another one needs it may be gone with the next
    version of that one, and a package that nothing imports any more would stay for ever."""
    rows = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {re.match(r"([\w-]+)>=[\d.]+ +# \w", row)[1].replace("-", "_") for row in rows}
    known, imported = sys.stdlib_module_names | INSTALLED_APART, set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        known |= {file.stem, file.parent.name}
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", alias.name) for alias in node.names]
                imported |= {name.split(".")[0] for name in names}
    assert imported - known == listed - {"pytest_xdist"}  # a plugin


FLOORS = """
common answers eprli
model data rewards
rollout
policy
run
eval
tools
train
examples experiments
bench
tests
"""


def test_modules_import_only_from_lower_floors():
    """Also inside functions. Modules on one floor do not import each other, so there is no circle,
    and `common`, `answers` and `eprli` import nothing of ours. eval.py is above run/, whose folders
    and processes it uses. train.py is above both, and above tools/, which draws the finished run.
    """
    floors = {}
    for number, names in enumerate(FLOORS.split("\n")):
        floors |= dict.fromkeys(names.split(), number)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                # An import statement names one module; ruff sees to that.
                name = getattr(node, "module", node.names[0].name)
                other = name.partition(".")[0]
                assert other == own or floors.get(other, -1) < floors[own], f"{path}: {name}"
