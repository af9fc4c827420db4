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


def metrics(n=12, **columns):
    """n rows of metrics.jsonl; a value of `columns` is one for all rows, or a list."""
    rows = []
    defaults = {
        name: 0 for panel in report.PANELS.splitlines() for name in panel.split("|")[2].split()
    }
    defaults |= {"groups_drawn": 8, "groups_kept": 8, "grad_norm": 0.5, "outcome_mean": 0.5}
    defaults["reward_timeouts"] = 0
    for i in range(n):
        row = {"update": i + 1, "level": 1, "accuracy": 0.5, "completions_left_out": 0}
        for name, value in {**defaults, **columns}.items():
            row[name] = value[i] if isinstance(value, list) else value
        rows.append(row)
    return rows


def evaluated(*shares, level=1, **labels):
    """Evaluations of a level with intervals of 5 points on each side."""
    rows = []
    for i, share in enumerate(shares):
        bounds = {"low": share - 0.05, "high": share + 0.05}
        rows.append(
            {"update": 10 * i, "level": level, "accuracy": share, "n": 300, **bounds, **labels}
        )
    return rows


# -------------------------------------------------------------------------------- what is written


# --------------------------------------------------------------------------------------- the page


CONFIG = """{"model": "HERE/assets/tiny", "data": "d", "eval_data": ["HERE/f.jsonl", "g.jsonl"],
"dtype": "float32", "suffix": "HERE", "objective": "1HERE/2",
"torch": "2", "device": "cpu", "seed": 0, "levels": [{"quality": 1.0, "buffer_groups": 4,
"group_size": 2, "max_new_tokens": 9, "updates": 9, "tokens": null, "length_weight": 0,
"reward": "HERE/r.py:f"}]}"""
ROW = """{"level": 1, "problem_id": "p", "verdict": "right", "outcome": 1.0, "length_reward": 0.0,
"tokens": 2, "stopped": true, "advantage": null}"""


def write_config(folder, **more):
    here = json.dumps(str(report.Path.cwd()))[1:-1]
    write_lines(folder / "config.json", [json.loads(CONFIG.replace("HERE", here)) | more])


def make_run(folder, num_updates, group_size=2, text="1+1=2", num_groups=4):
    """A run directory, with a hand-made log."""
    write_config(folder)
    write_lines(folder / "metrics.jsonl", metrics(num_updates, groups_drawn=num_groups))
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


@mark.parametrize("length", [0, 1, 1499, 1500, 1501, 1502])
def test_nothing_is_cut_without_a_count(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    head, left_out, tail = report.cut(text)
    assert head + text[len(head) : len(head) + left_out] + tail == text
    assert left_out == max(0, length - 1500)


def test_no_completion_ends_the_script(tmp_path):
    page = report.write_page([make_run(tmp_path / "run", 2, text=HOSTILE)])
    page = page.read_text()
    assert page.lower().count("<script") == TEMPLATE.count("<script") == page.count("</script")
    row = content(page)["rows"][0]
    assert row["text"][0] + row["text"][2] == HOSTILE
    assert page.isascii()


def test_several_runs_with_gaps_are_drawn(tmp_path, printed):
    """A skipped update has nulls; a run without evaluation has no eval.jsonl. The last lines of a
    run that was killed may be torn, within a letter."""
    a, b = (make_run(tmp_path / name, 8) for name in "ab")
    (b / "eval.jsonl").unlink()
    rows = metrics(8, level=[1] * 4 + [2] * 4)
    rows[2] = dict.fromkeys(rows[2]) | {"update": 3, "level": 1}
    write_lines(a / "metrics.jsonl", rows)
    names = [f"{name}.jsonl" for name in ("metrics", "eval", "completions")]
    for name in names:
        with open(a / name, "ab") as file:
            file.write('{"text": "\u00e9'.encode()[:-1])
    picture, page = report.draw([a, b]), report.write_page([a, b])
    assert picture == a / "report.png" and picture.stat().st_size > 20_000
    assert max(row["update"] for row in content(page.read_text())["rows"]) == 8
    said = printed()
    assert all(f"{name}: its last line is torn" in said for name in names)


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
