"""The rooms of the house: who may import whom, and that nobody imports in a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a module imports those that stand before it, and no other.
ORDER = """
answers.spelling answers.shapes answers.equality answers
files
eprli model rollout
data rewards
policy.lora policy.packed policy.learner policy.checkpoint policy.attempt
run.processes run.directory run.fit run.flags run.update run.state run.start run.command
tools.overlap tools.report
eval train
"""
FLOORS = ORDER.split()
ROOMS = ("answers", "policy", "run", "tools")


def modules():
    """{name: path} of all modules outside tests, bench, experiments and examples."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            found[room if path.stem == "__init__" else f"{room}.{path.stem}"] = path
    return found


def imported(path, known):
    """Names of the project's modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known


def test_every_module_has_its_floor():
    assert sorted(modules()) == sorted(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down(name):
    """A circle loads a module twice or half, and a reader who follows it never arrives."""
    own = FLOORS.index(name)
    above = {
        other for other in imported(modules()[name], set(FLOORS)) if FLOORS.index(other) >= own
    }
    assert not above, f"{name} imports {above}"


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
