"""The page of a run: what it holds, and that no completion can break it."""

import itertools
import json
import re
import shutil
import subprocess

from conftest import lines, write_lines
from pytest import mark, skip

from tools import report

TEMPLATE = (report.Path(report.__file__).parent / "report.html").read_text()
HOSTILE = (
    "</script><script>document.title = 'broken'</script><!--<script> & \u2028 \u202e ${1} "
    "<img src=x onerror=\"document.title = 'broken'\"> CONTENT 'x' \"y\" \\u003c \U0001f600"
)


def metrics(n):
    """n rows of metrics.jsonl."""
    names = " ".join(panel.split("|")[2] for panel in report.PANELS.splitlines()).split()
    row = dict.fromkeys([*names, "reward_timeouts", "completions_left_out"], 0) | {"level": 1}
    row |= {"groups_drawn": 4, "groups_kept": 4, "accuracy": 0.5, "outcome_mean": 0.5}
    return [row | {"update": i + 1} for i in range(n)]


def evaluated(*shares, **labels):
    """Evaluations with intervals of 5 points on each side."""
    rows = []
    for i, share in enumerate(shares):
        row = {"update": 10 * i, "level": 1, "accuracy": share, "n": 300}
        rows.append(row | {"low": share - 0.05, "high": share + 0.05} | labels)
    return rows


# --------------------------------------------------------------------------------------- the page


CONFIG = """{"model": "HERE/assets/tiny", "data": "d", "eval_data": ["HERE/f.jsonl", "g.jsonl"],
"dtype": "float32", "suffix": "HERE", "objective": "1HERE/2",
"torch": "2", "device": "cpu", "seed": 0, "quality": [1.0], "buffer_groups": [4],
"group_size": [2], "max_new_tokens": [9], "updates": [9], "tokens": [null], "length_weight": [0],
"reward": ["HERE/r.py:f"]}"""
ROW = """{"level": 1, "problem_id": "p", "verdict": "right", "outcome": 1.0, "length_reward": 0.0,
"tokens": 2, "stopped": true, "advantage": null}"""


def write_config(folder, **more):
    here = json.dumps(str(report.Path.cwd()))[1:-1]
    write_lines(folder / "config.json", [json.loads(CONFIG.replace("HERE", here)) | more])


def make_run(folder, num_updates, group_size=2, text="1+1=2", num_groups=4):
    """A run directory, with a hand-made log."""
    write_config(folder)
    write_lines(folder / "metrics.jsonl", metrics(num_updates))
    both = evaluated(0.3, 0.6, file="f") + evaluated(0.1, 0.2238, file="g")
    write_lines(folder / "eval.jsonl", both)
    rows = []
    counts = range(1, num_updates + 1), range(num_groups), range(group_size)
    for update, number, sample in itertools.product(*counts):
        row = json.loads(ROW) | {"update": update, "group": number, "sample": sample, "text": text}
        rows.append(row | dict.fromkeys(("problem", "answer"), text))
    write_lines(folder / "completions.jsonl", rows)
    return folder


def content(page):
    """The JSON in a page."""
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page, re.S)[1])


@mark.parametrize("sign", "x<")
def test_the_page_of_200_updates_is_at_most_5_megabytes(tmp_path, sign):
    """It has whole groups of the whole run. JSON writes the second sign with 6 bytes."""
    folder = make_run(tmp_path / "run", 200, 20, sign * 1_600, 4)
    page = report.write_page([folder])
    assert page.stat().st_size <= 5_000_000
    rows = content(page.read_text())["rows"]
    assert len(rows) == report.SAMPLES * report.GROUPS * report.TIMES
    updates = {row["update"] for row in rows}
    assert {1, 200} <= updates and len(updates) == report.TIMES
    head, left_out, tail = rows[-1]["text"]
    assert (len(head), left_out, len(tail)) == (750, 100, 750)


def test_no_completion_ends_the_script(tmp_path):
    page = report.write_page([make_run(tmp_path / "run", 2, text=HOSTILE)])
    page = page.read_text()
    assert page.lower().count("<script") == TEMPLATE.count("<script") == page.count("</script")
    row = content(page)["rows"][0]
    assert row["text"][0] + row["text"][2] == HOSTILE
    assert page.isascii()


@mark.parametrize("text", ["1+1=2", HOSTILE])
def test_a_browser_draws_the_page(tmp_path, text):
    """In headless Chromium: every part is filled, and text of completions stays text."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        skip("no chromium here")
    first = make_run(tmp_path / "run", 6, text=text)
    rows = lines(first / "eval.jsonl")
    rows[0]["means"] = {"part_a": [1, 1, 1]}  # which a later row lacks, if all its rewards are late
    write_lines(first / "eval.jsonl", rows)
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
