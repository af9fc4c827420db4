"""The page of a run: what it holds, and that no completion can break it."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

from conftest import write_lines
from pytest import mark, skip

from tools import report

TEMPLATE = Path(report.__file__).with_suffix(".html").read_text()
HOSTILE = (
    "</script><script>document.title = 'broken'</script><!--<script> & \u2028 \u202e ${1} "
    "<img src=x onerror=\"document.title = 'broken'\"> CONTENT 'x' \"y\" \\u003c \U0001f600"
)


CONFIG = """{"model": "HERE/assets/tiny", "data": "d", "eval_data": ["HERE/f.jsonl", "g.jsonl"],
"dtype": "float32", "torch": "2", "device": "cpu", "seed": 0, "quality": [1.0], "tokens": [null],
"buffer_groups": [4], "group_size": [2], "max_new_tokens": [9], "updates": [9], "reward": ["math"],
"length_weight": [0]}
"""
EVALUATIONS = """
{"update": 0, "file": "f", "level": 1, "n": 300, "accuracy": 0.3, "low": 0.25, "high": 0.35}
{"update": 10, "file": "f", "level": 1, "n": 300, "accuracy": 0.6, "low": 0.55, "high": 0.65}
{"update": 0, "file": "g", "level": 1, "n": 300, "accuracy": 0.1, "low": 0.05, "high": 0.15}
{"update": 10, "file": "g", "level": 1, "n": 300, "accuracy": 0.2238, "low": 0.2, "high": 0.25}
"""
ROW = """{"level": 1, "problem_id": "p", "verdict": "right", "outcome": 1.0, "length_reward": 0.0,
"tokens": 2, "stopped": true, "advantage": null}"""


def make_run(folder, num_updates, group_size=2, text="1+1=2"):
    """A run directory with logs that are made by hand."""
    updates = range(1, num_updates + 1)
    names = " ".join(panel.split("|")[2] for panel in report.PANELS.splitlines()).split()
    metrics = dict.fromkeys([*names, "reward_timeouts"], 0) | {"level": 1, "groups_drawn": 4}
    write_lines(folder / "metrics.jsonl", [metrics | {"update": update} for update in updates])
    row = json.loads(ROW) | dict.fromkeys(("problem", "answer", "text"), text)
    rows = []
    for update, group, sample in itertools.product(updates, range(4), range(group_size)):
        rows.append(row | {"update": update, "group": group, "sample": sample})
    write_lines(folder / "completions.jsonl", rows)
    (folder / "config.json").write_text(CONFIG.replace("HERE", str(Path.cwd())))
    (folder / "eval.jsonl").write_text(EVALUATIONS.lstrip())
    return folder


def content(page):
    """The JSON in a page."""
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page, re.S)[1])


@mark.parametrize("sign", "x<")
def test_the_page_of_200_updates_is_at_most_5_megabytes(tmp_path, sign):
    """It has whole groups of the whole run. JSON writes the second sign with 6 bytes."""
    folder = make_run(tmp_path / "run", 200, 20, sign * 1_600)
    page = report.write_page([folder])
    assert page.stat().st_size <= 5_000_000
    rows = content(page.read_text())["rows"]
    assert len(rows) == report.SAMPLES * report.GROUPS * report.TIMES
    updates = {row["update"] for row in rows}
    assert {1, 200} <= updates and len(updates) == report.TIMES
    head, left_out, tail = rows[-1]["text"]
    assert (len(head), left_out, len(tail)) == (750, 100, 750)


def test_no_completion_ends_the_script(tmp_path):
    """And paths below the working directory do not tell where that is."""
    page = report.write_page([make_run(tmp_path / "run", 2, text=HOSTILE)]).read_text()
    assert page.lower().count("<script") == TEMPLATE.count("<script") == page.count("</script")
    row = content(page)["rows"][0]
    assert row["text"][0] + row["text"][2] == HOSTILE
    assert page.isascii() and str(Path.cwd()) not in page


@mark.parametrize("text", ["1+1=2", HOSTILE])
def test_a_browser_draws_the_page(tmp_path, text):
    """In headless Chromium: every part is filled, and text of completions stays text."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        skip("no chromium here")
    first = make_run(tmp_path / "run", 6, text=text)
    log = first / "eval.jsonl"  # a later row has no such part, if all its rewards were late
    log.write_text(log.read_text().replace("0.35}", '0.35, "means": {"part_a": [1, 1, 1]}}'))
    page = report.write_page([first, make_run(tmp_path / "other", 9)])
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.S)
    assert "<title>run: training report</title>" in dom and "<img" not in dom
    assert dom.count("<figure>") == 12 and dom.count('role="img"') == 12
    assert dom.count("<details") == 5 * 2
    for name, before in (("f, level 1", "30.0 [25.0, 35.0]"), ("g, level 1", "10.0 [5.0, 15.0]")):
        name = f"held out, {name} (300 problems)"
        assert f'<th scope="row">{name}</th><td>{before}</td>' in dom
        assert dom.count(f"{name}<output>") == 1
    assert "<td>+12.4</td>" in dom  # 12.38 points were cut to 12.3
    assert "Runs: run (solid), other (dashed)" in dom
    ids = re.findall(r'\bid="([^"]*)"', dom)
    assert len(ids) == len(set(ids))
