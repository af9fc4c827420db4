"""The page of a run: what it holds, and that no completion can break it."""

import itertools
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import torch
from conftest import column, lines, write_lines
from matplotlib.figure import Figure
from pytest import mark, raises, skip
from test_train import group

from eprli import Buffer, group_advantage
from rewards import Score
from rollout import Completion
from run.update import Update
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


LEVEL_STATE = SimpleNamespace(
    number=1,
    buffer=Buffer(),
    order=SimpleNamespace(drawn=0),
    level=SimpleNamespace(prompts=9),
)


def drawn(*outcomes):
    """An Update that has drawn these groups."""
    update = Update(1, LEVEL_STATE, 0.1, 1)
    groups, prompts, attempts = [], [], []
    for number, outcome in enumerate(outcomes):
        done = [Completion([i, number], [-1e-9, -0.12345], True) for i in range(len(outcome))]
        groups.append(group([1], done, outcome))
        problem = SimpleNamespace(id=f"p{number}", problem="1+1", answer="2")
        prompts.append(SimpleNamespace(problem=problem))
        facts = {"score": Score(1.0, "right", "2"), "length": 2, "text": "x"}
        attempts.append([SimpleNamespace(completion=c, **facts) for c in done])
    update.add_draw(prompts, attempts, groups)
    return update


def test_whole_groups_are_written_with_their_advantages(monkeypatch):
    monkeypatch.setattr("run.update.KEEP", 2)
    update = drawn([0, 1, 0.5], [1, 1, 1], [0, 0, 0])
    rows = update.rows_to_write()
    assert column(rows, "group") == [0, 0, 0, 1, 1, 1]
    assert column(rows, "sample") == [0, 1, 2] * 2
    expected = group_advantage(torch.tensor([0, 1, 0.5]).double()).tolist()
    assert column(rows[:3], "advantage") == expected
    assert len(update.rows) == 9  # the statistics are of all


# --------------------------------------------------------------------------------------- the page


CONFIG = """{"model": "HERE/assets/tiny", "data": "d", "eval_data": ["HERE/f.jsonl", "g.jsonl"],
"dtype": "float32",
"torch": "2", "device": "cpu", "seed": 0, "levels": [{"quality": 1.0, "buffer_groups": 4,
"group_size": 2, "max_new_tokens": 9, "updates": 9, "tokens": null, "length_weight": 0,
"reward": "HERE/r.py:f"}]}"""
ROW = """{"level": 1, "problem_id": "p", "verdict": "right", "outcome": 1.0, "length_reward": 0.0,
"tokens": 2, "stopped": true, "advantage": null}"""


def make_run(folder, num_updates, group_size=2, text="1+1=2", num_groups=4, problem=None):
    """A run directory, with a hand-made log."""
    here = json.dumps(str(report.Path.cwd()))[1:-1]
    write_lines(
        folder / "config.json", [json.loads(CONFIG.replace("HERE", here)) | {"suffix": text}]
    )
    write_lines(folder / "metrics.jsonl", metrics(num_updates, groups_drawn=num_groups))
    both = evaluated(0.3, 0.6, file="f") + evaluated(0.1, 0.2238, file="g")
    write_lines(folder / "eval.jsonl", both)
    rows = []
    counts = range(1, num_updates + 1), range(num_groups), range(group_size)
    for update, number, sample in itertools.product(*counts):
        row = json.loads(ROW) | {"update": update, "group": number, "sample": sample, "text": text}
        row |= dict.fromkeys(("problem", "answer"), problem or text)
        rows.append(row)
    write_lines(folder / "completions.jsonl", rows)
    return folder


def content(page):
    """The JSON in a page."""
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_template_is_small_and_loads_nothing():
    assert len(TEMPLATE.encode()) <= 25_000
    assert TEMPLATE.isascii() and TEMPLATE.count("CONTENT") == 1
    # The name of a namespace, which nothing loads.
    assert set(re.findall(r"https?://[^\"' ]*", TEMPLATE)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in TEMPLATE
    assert not re.search(r"\bsrc=|url\(|@import|<link|fetch\(|import\(|XMLHttp", TEMPLATE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", TEMPLATE)


def test_the_page_of_200_updates_is_at_most_5_megabytes(tmp_path):
    """Without a bound, the page of these long completions would have 40 MB. It has whole groups of
    the whole run."""
    folder = make_run(tmp_path / "run", 200, 16, "x" * 3_100, 3, "y" * 300)
    page = report.write_page([folder])
    assert page.stat().st_size <= 5_000_000
    rows = content(page.read_text())["rows"]
    assert len(rows) == 16 * 3 * report.TIMES
    updates = {row["update"] for row in rows}
    assert {1, 200} <= updates and len(updates) == report.TIMES
    head, left_out, tail = rows[-1]["text"]
    assert (len(head), left_out, len(tail)) == (1500, 100, 1500)


def test_completions_of_nothing_but_escapes_are_bounded_too(tmp_path):
    """A bound by characters would let signs that JSON writes with 6 bytes pass."""
    folder = make_run(tmp_path / "run", 14, 16, "<" * 3_000, 3)
    assert report.write_page([folder]).stat().st_size <= 5_000_000
    rows = content((folder / "report.html").read_text())["rows"]
    assert rows and len(rows) % 16 == 0 and rows[0]["update"] == 1


@mark.parametrize("length", [0, 1, 2999, 3000, 3001, 3002])
def test_nothing_is_cut_without_a_count(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    head, left_out, tail = report.shorten({"text": text})["text"]
    assert head + text[len(head) : len(head) + left_out] + tail == text
    assert left_out == max(0, length - 3000)


def test_no_completion_ends_the_script(tmp_path):
    page = report.write_page([make_run(tmp_path / "run", 2, text=HOSTILE)])
    page = page.read_text()
    assert page.lower().count("<script") == TEMPLATE.count("<script") == page.count("</script")
    row = content(page)["rows"][0]
    assert row["text"][0] + row["text"][2] == HOSTILE
    assert page.isascii()


def test_the_page_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    """A folder with an umlaut was named: config.json spells it in ASCII."""
    (tmp_path / "Übung").mkdir()
    monkeypatch.chdir(tmp_path / "Übung")
    folder = make_run(tmp_path / "run", 2)
    page = report.write_page([folder]).read_text()
    config = content(page)["config"]
    assert (config["model"], config["levels"][0]["reward"]) == ("assets/tiny", "r.py:f")
    assert config["eval_data"] == "f.jsonl, g.jsonl"
    assert "bung" not in page


def test_the_page_loses_no_text(tmp_path, monkeypatch):
    """From the folder "/" every "//" vanished, and from "/x" the text 1/x/2 became 12: of
    completions, and of a suffix."""
    for here in (report.Path("/"), tmp_path):
        monkeypatch.chdir(here)
        text = f"1//2, 1{here}/2"
        page = report.write_page([make_run(tmp_path / f"run{len(str(here))}", 2, text=text)])
        found = content(page.read_text())
        assert all(row["text"][0] == text for row in found["rows"][:4])
        assert found["config"]["suffix"] == text


def test_several_runs_with_gaps_are_drawn(tmp_path):
    """A skipped update has nulls; a run without evaluation has no eval.jsonl."""
    a, b = (make_run(tmp_path / name, 8) for name in "ab")
    (b / "eval.jsonl").unlink()
    rows = metrics(8, level=[1] * 4 + [2] * 4)
    rows[2] = dict.fromkeys(rows[2]) | {"update": 3, "level": 1}
    write_lines(a / "metrics.jsonl", rows)
    picture = report.draw([a, b])
    assert picture == a / "report.png" and picture.stat().st_size > 20_000
    (b / "metrics.jsonl").unlink()
    with raises(ValueError, match="b: no metrics.jsonl"):
        report.draw([b])


def test_a_run_whose_last_lines_are_torn_is_drawn(tmp_path, printed):
    """One looks at a run that was killed. A line may end within a letter."""
    folder = make_run(tmp_path / "run", 3)
    report.read_completions(folder / "completions.jsonl", 3)
    assert not printed()
    names = [f"{name}.jsonl" for name in ("metrics", "eval", "completions")]
    for name in names:
        with open(folder / name, "ab") as file:
            file.write('{"text": "\u00e9'.encode()[:-1])
    report.draw([folder])
    rows = content(report.write_page([folder]).read_text())["rows"]
    assert max(row["update"] for row in rows) == 3
    said = printed()
    assert all(f"{name}: its last line is torn" in said for name in names)
    (folder / "eval.jsonl").write_text("{oops\n")
    with raises(ValueError, match="eval.jsonl: cannot be read"):
        report.draw([folder])


def test_other_held_out_problems_of_one_name_are_not_drawn_together(tmp_path, printed):
    """Level 1 up to 0.8 beside level 1 of all problems: two measures on one axis."""
    folders = [make_run(tmp_path / name, 2) for name in ("a", "b")]
    rows = lines(folders[1] / "eval.jsonl")
    rows[0]["n"] = 723
    write_lines(folders[1] / "eval.jsonl", rows)
    (_, _, first), (_, _, second) = report.read_runs(folders)
    assert len(first) == len(rows) and second == rows[1:]
    assert "b: f, level 1 (723 problems) is no set of the first run, left out" in printed()


def test_another_held_out_file_of_one_size_is_not_drawn_with_it(tmp_path, printed):
    """A single file has no name in eval.jsonl, and 300 problems are as many as 300 others."""
    folders = [make_run(tmp_path / name, 2) for name in ("a", "b", "c")]
    for folder, hashed in zip(folders, ("1", "2", "1")):
        config = json.loads(CONFIG) | {"read": {f"--eval-data {folder.name}": hashed}}
        write_lines(folder / "config.json", [config])
        write_lines(folder / "eval.jsonl", evaluated(0.3, 0.6))
    assert [len(evaluations) for _, _, evaluations in report.read_runs(folders)] == [2, 0, 2]
    assert "b: level 1 (300 problems) is no set of the first run, left out" in printed()
    for folder, hashed in zip(folders, ("1", "2", "1")):  # with names: a hash for each file
        config = json.loads(CONFIG) | {"read": {"--eval-data f": "0", "--eval-data g": hashed}}
        write_lines(folder / "config.json", [config])
        both = evaluated(0.3, file="f") + evaluated(0.6, file="g")
        write_lines(folder / "eval.jsonl", both)
    assert [len(evaluations) for _, _, evaluations in report.read_runs(folders)] == [2, 1, 2]


def test_a_name_has_one_color_in_all_runs(tmp_path):
    """By its place in its own run, level 2 of a second run was drawn as the first's level 1. Names
    with dollar signs ended a run with an error of TeX."""
    first, second = make_run(tmp_path / "a$^$", 2), make_run(tmp_path / "b", 2)
    write_lines(second / "eval.jsonl", lines(second / "eval.jsonl")[2:])  # g alone
    write_lines(first / "metrics.jsonl", metrics(2, part_a=1, part_b=2))
    write_lines(second / "metrics.jsonl", metrics(2, part_b=3))
    runs, axes = report.read_runs([first, second]), Figure().subplots(3, 4).flatten()
    held_out = ["f, level 1", "g, level 1"]
    for _, rows, evaluations in runs:
        report.draw_run(axes, rows, evaluations, "-", ["part_a", "part_b"], held_out)
    report.finish(axes, runs[0][1])
    for ax, name in ((axes[0], "held out, g, level 1"), (axes[2], "part_b")):
        colors = [line.get_color() for line in ax.lines if line.get_label() == name]
        assert len(colors) == 2 and len(set(colors)) == 1
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend.count(name) == 1
    assert report.draw([first, second]).exists()


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
    assert dom.count("<figure>") == 13 and dom.count('role="img"') == 13
    assert dom.count("<details") == 6 * 3  # three groups of each update
    for name, before in (("f, level 1", "30.0 [25.0, 35.0]"), ("g, level 1", "10.0 [5.0, 15.0]")):
        assert f'<th scope="row">{name}</th><td>300</td><td>{before}</td>' in dom
        assert dom.count(f"held out, {name}<output>") == 1
    assert "<td>+12.4</td>" in dom  # 12.38 points were cut to 12.3
    assert "completions shown" in dom and "Runs: run (solid), other (dashed)" in dom
    ids = re.findall(r'\bid="([^"]*)"', dom)
    assert len(ids) == len(set(ids))
