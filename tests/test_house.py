"""What the pages say of each other and of the tests: links, anchors, names."""

import re
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
