"""The benchmarks run and print what they promise; their numbers are not for tests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pytest import approx, fixture, mark, raises

BENCH = Path(__file__).parents[1] / "bench"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path += [str(BENCH), str(EXPERIMENTS)]

import arms  # noqa: E402  these are no packages
import compare  # noqa: E402
import gpu  # noqa: E402
import runs as runner  # noqa: E402
import tables  # noqa: E402

from data import Problem, read_problems  # noqa: E402
from eprli import resolve_levels  # noqa: E402
from files import write_records  # noqa: E402
from run.flags import Config, make_parser  # noqa: E402


def test_only_a_peer_may_fail_in_a_comparison(capsys):
    assert compare.last_line("peer_none.py", sys.executable) is None
    assert "peer_none.py : exit 2" in capsys.readouterr().err
    with raises(SystemExit, match="none.py --slots 3: exit 2"):
        compare.last_line("none.py --slots 3", sys.executable)


def test_the_table_of_a_comparison(monkeypatch, printed, tmp_path):
    """Sides in turns, medians, ours by the better of two peers. A peer that fails is left out."""
    speeds = {"generate": [500, 200, 300], "generate_batch": [None, 200, 100]}
    speeds |= {"ours": [100, 1200, 600]}
    turns = iter(zip(*(speeds[side] for side in compare.SAMPLERS)))
    results = [
        speed and {"tokens_per_second": speed, "peak_rss_mib": 50} for t in turns for speed in t
    ]
    monkeypatch.setattr(compare, "last_line", lambda *_: results.pop(0))
    monkeypatch.setattr(compare.common, "make_model", lambda *_: None)
    log = tmp_path / "log"
    command = f"compare.py --sizes 2m --dtypes float32 --what equal --log {log}"
    monkeypatch.setattr(sys, "argv", command.split())
    compare.main()
    row = printed().splitlines()[-1]
    medians = "{'ours': 600, 'generate': 300, 'generate_batch': 150.0}"
    assert row.startswith(f"| 2m float32 | equal | {medians} |") and row.endswith("| 2.00 x |")
    assert len(log.read_text().splitlines()) == 8


def test_what_the_benchmarks_of_sampling_and_updates_print(tmp_path):
    compare.common.make_model("2m", tmp_path / "model")
    compare.common.make_workload(tmp_path / "work", 4, 4, 24)
    lengths = [n for _, some in compare.common.read_workload(tmp_path / "work") for n in some]
    assert len(lengths) == 16 and max(lengths) <= 24 and len(set(lengths)) > 4
    flags = f"--model {tmp_path}/model --slots 8"
    command = f"rollout.py {flags} --workload {tmp_path}/work --repeats 1"
    rollout = compare.last_line(command, sys.executable)
    assert rollout["tokens"] == sum(lengths) and rollout["tokens_per_second"] > 0
    command = f"step.py {flags} --prompts 2 --group 4 --new-tokens 3 --steps 1"
    step = compare.last_line(command, sys.executable)
    assert step["tokens_per_step"] == 2 * 4 * 3
    assert step["seconds_per_step"] > step["learn_seconds"] > 0 < step["tokens_per_second"]


@mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")
def test_the_acceptance_test_of_a_gpu_without_one(tmp_path):
    """A flag that was renamed or a key that is gone would cost time on a card."""
    settings = {"SIZE": "2m", "NEW": "8", "DEVICE": "cpu", "DTYPE": "float32"}
    settings |= {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", BENCH / "gpu.sh", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(verdict == "yes |" for *_, verdict in rows[2:]) and len(rows) == 7
    gap, decoding, phases, resumed, memory = (measured for _, measured, *_ in rows[2:])
    assert 0 < float(gap) < 1e-4 and "logits differ by 0;" in decoding and "bandwidth" in decoding
    for phase in ("sample", "score", "learn"):
        assert f"{phase} " in phases
    assert resumed.startswith("weights differ by") and memory == "left out without a GPU"


def test_an_acceptance_test_that_fails_says_so(monkeypatch, capsys):
    """One part that cannot be measured must cost none of the others, nor pass; nor a model that
    cannot be loaded."""
    monkeypatch.setattr(gpu.step, "make_run", lambda *_: {}["model"])
    for name in ("decoding", "phases", "resuming", "full_memory"):
        monkeypatch.setattr(gpu, name, named(name, lambda *_: ("1", "2", True)))
    monkeypatch.setattr(gpu, "phases", named("phases", lambda *_: 1 / 0))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with raises(SystemExit, match="True"):
        gpu.main()
    rows = capsys.readouterr().out.splitlines()[-5:]
    assert rows[0] == "| learner less sampler, nats a token | KeyError: 'model' |  | NO |"
    assert rows[2] == "| phases | ZeroDivisionError: division by zero |  | NO |"
    assert rows[4] == "| full_memory | 1 | 2 | yes |"


@mark.parametrize(
    "code, good",
    [
        ("import sys; sys.exit('train.py: out of memory while sampling')", True),
        ("raise MemoryError('out of memory')", False),  # a traceback
        ("import sys; print('train.py: out of memory', file=sys.stderr)", False),
    ],
)
def test_a_full_memory_must_be_said_in_one_line(monkeypatch, tmp_path, code, good):
    """Of a GPU, so that its logic is tried without one."""
    args = SimpleNamespace(device="cuda", out=tmp_path)
    monkeypatch.setattr(gpu, "small_run", lambda *_: gpu.start(args, "-c", code))
    said, _, found = gpu.full_memory(args, None)
    assert found is good and "out of memory" in said


def named(docstring, part):
    part.__doc__ = docstring
    return part


# ------------------------------------------------------------------------------------- experiments


UPDATES = """{"groups_drawn": [10, 20], "groups_kept": [5, 5], "entropy": [0.2, null, 0.1],
"groups_all_right": [3, 3], "groups_all_wrong": [0, 3], "carried_share": [0, 0.5],
"reward_variance_within": [0.2, 0.1, null], "reward_variance_between": [0.1, null, 0.0]}"""


@fixture
def results(monkeypatch, tmp_path):
    """The folder of results: an empty one."""
    for module in (tables, runner):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def result(final, tokens=(0, 200_000, 500_000)):
    """Of a run that was evaluated three times; level 2 has three times as many problems."""
    rows = []
    for update, (sampled, share) in enumerate(zip(tokens, (0.0, 0.5, 1.0))):
        for level, n in ((1, 100), (2, 300)):
            accuracy = final * share if level == 2 else 0.8 - 0.1 * share
            row = {"update": update, "tokens_sampled": sampled, "level": level, "n": n}
            rows.append(row | {"accuracy": accuracy, "length_mean": 40.0})
    updates = json.loads(UPDATES)
    return {"evaluations": rows, "pass@16": 0.9, "updates": updates, "budget": 400_000}


def test_measures_are_taken_at_the_budget_not_at_the_end():
    """An arm that overshoots its budget must gain nothing by it."""
    found = tables.measure(result(0.9))
    level_2 = 45 + 45 * 2 / 3  # two thirds of the way from 200 to 500 thousand
    assert found["level 2"] == approx(level_2)
    assert found["level 1"] == approx(75 - 5 * 2 / 3)
    assert found["accuracy"] == approx((3 * level_2 + found["level 1"]) / 4)
    assert found["to 50 %"] == approx(200 + 300 * 5 / 45, abs=4)
    assert found["forgotten"] == approx(80 - found["level 1"])
    assert found["pass@16"] == 90 and found["drawn"] == 3
    assert found["all right"] == 20 and found["all wrong"] == 10
    assert found["entropy"] == approx(0.15)


def test_differences_are_paired_by_seed():
    """Seeds differ by 10 points, arms by 1: unpaired, nothing would be seen."""
    a = {seed: {"accuracy": 10.0 * seed} for seed in range(5)}
    b = {seed: {"accuracy": 10.0 * seed + 1 + 0.1 * (-1) ** seed} for seed in range(6)}
    mean, half = tables.difference(b, a)
    assert mean == approx(1.02) and 0 < half < 0.2


def test_arms_are_compared_with_the_first_of_their_base():
    """Beside the other base, every arm of a bad one would be worse."""
    measured = {}
    for base, start in (("good", 50), ("bad", 10)):
        for arm, gain in (("EPRLI", 0), ("L = 1", 4), ("hard only", -2)):
            by_seed = {}
            for seed in range(3):
                value = start + gain + 0.1 * gain * seed
                by_seed[seed] = dict.fromkeys((*tables.COMPARED, "ratio", "budget"), value)
            measured[f"{base}: {arm}"] = by_seed
    measured["bad: equal"] = measured["bad: EPRLI"]
    _, _, *lines = tables.compare(measured, tables.with_first(measured))
    found = [line.strip("| ").split(" | ")[:2] for line in lines]
    assert found == [
        ["good: L = 1, less good: EPRLI", "**+4.4 ± 1.0**"],
        ["good: hard only, less good: EPRLI", "**-2.2 ± 0.5**"],
        ["bad: L = 1, less bad: EPRLI", "**+4.4 ± 1.0**"],
        ["bad: hard only, less bad: EPRLI", "**-2.2 ± 0.5**"],
        ["bad: equal, less bad: EPRLI", "+0.0 ± 0.0"],
    ]


def test_tokens_to_a_half_are_compared_as_ratios(results):
    """A mean of differences would be that of the slowest seed. An area over another budget is
    another measure."""
    for arm, tokens in (("mix", (800, 400, 400)), ("levels", (400, 200, 100))):
        for seed, at in enumerate(tokens):
            write_result("lost", arm, seed, 0.9, tokens=(0, at * 500, at * 1000))
    measured = {arm: tables.measures("lost", arm) for arm in ("mix", "levels")}
    line = list(tables.compare(measured, [("levels", "mix")]))[2]
    ratio, low, high = map(float, re.findall(r"[\d.]+", line.split("|")[-2]))
    assert ratio == approx((0.5 * 0.5 * 0.25) ** (1 / 3), abs=0.02) and low < ratio < high
    for numbers in measured["mix"].values():
        numbers["budget"] *= 2
    names, _, line = tables.compare(measured, [("levels", "mix")])
    cells = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (names, line))))
    assert cells["area"] == cells["area 2"] == cells["tokens to 50 %, ratio"] == "-"
    assert cells["accuracy"] != "-"


def test_the_map_names_the_best_arm_and_whether_it_is_told_apart(results, monkeypatch):
    """An arm that is ahead by luck must be hatched, also beside one that is surely behind; a budget
    is read along the way."""
    arms = ("mix", "levels", "ladder", "easy only")
    monkeypatch.setitem(tables.ARMS, "map", {f"1 %: {arm}": "" for arm in arms})
    finals = {"mix": (0.5, 0.5, 0.5), "levels": (0.6, 0.62, 0.61), "ladder": (0.1, 0.95, 0.3)}
    for arm, by_seed in finals.items():
        for seed, final in enumerate(by_seed):
            write_result("map", f"1 %: {arm}", seed, final)
    for seed in range(3):
        write_result("map", "1 %: easy only", seed, 0.01 * seed)
    monkeypatch.setattr(tables, "BUDGETS", (200_000,))  # half of the way

    def best_at():
        measured = {name: tables.measures("map", name) for name in tables.ARMS["map"]}
        own = tables.of_base({name: some for name, some in measured.items() if some}, "1 %")
        return tables.best_at(own, 200_000)

    best, lead, apart = best_at()
    assert (best, apart) == ("levels", True) and lead == approx(5.5)
    path = results / "map.jsonl"
    rows = [row for row in path.read_text().splitlines(keepends=True) if "levels" not in row]
    path.write_text("".join(rows))
    assert best_at() == ("mix", 0, False)  # the second is the ladder


def of_arm(tokens, area=30.0, level_2=60.0, at_first=40.0):
    """Measures of four seeds, which differ a little; tokens in thousands, nan: never."""
    by_seed = {}
    for seed, factor in enumerate((1.0, 1.1, 0.9, 1.0)):
        at = tokens * factor
        numbers = {"to 50 %": at, "ratio": np.log(1600 if np.isnan(at) else at)}
        numbers["area 2"] = area + factor
        by_seed[seed] = numbers | {"level 2": level_2, "at first": at_first}
    return by_seed


NEVER = {"tokens": float("nan")}
BETTER = [
    (of_arm(400), of_arm(800), True),
    (of_arm(800), of_arm(400), False),
    (of_arm(700), of_arm(800), False),  # told apart, and less than of use
    (of_arm(400), of_arm(**NEVER), False),  # by area, which is equal here
    (of_arm(400, area=34), of_arm(**NEVER), True),
    (of_arm(**NEVER, area=34), of_arm(**NEVER), True),  # by area, where neither gets there
    (of_arm(**NEVER, area=33), of_arm(**NEVER), False),
]


@mark.parametrize("arm, other, expected", BETTER)
def test_an_arm_is_ahead_by_the_protocol(arm, other, expected):
    """A lead that is told apart but of no use to anyone, or a mean without an interval, is none."""
    assert tables.lead(arm, other, tables.outcome(arm, other))[1] == expected


def test_an_arm_that_gets_there_in_three_seeds_of_four_is_judged_by_area():
    """By the ratio no such arm could be told apart: three equal ones and a 0 have t = 3.0, and 3.18
    is needed."""
    arm, mix = of_arm(400, area=60), of_arm(**NEVER)
    arm[3] |= {"to 50 %": np.nan, "ratio": np.log(1600), "area 2": 45}
    assert tables.lead(arm, mix, tables.outcome(arm, mix))[1]
    assert not tables.lead(arm, mix, ("ratio", -1, 0))[1]


def test_easy_first_is_not_said_where_hard_problems_alone_do_as_well():
    """A threshold that is read where nothing was learned would be one of the budget."""
    arms = {"mix": of_arm(800), "ladder": of_arm(700), "easy only": of_arm(900)}
    assert tables.easy_first({**arms, "levels": of_arm(400), "hard only": of_arm(600)})
    assert not tables.easy_first({**arms, "levels": of_arm(400), "hard only": of_arm(390)})
    assert not tables.easy_first({**arms, "levels": of_arm(700), "hard only": of_arm(900)})
    lost = dict.fromkeys([*arms, "levels", "hard only"], of_arm(**NEVER, level_2=9.9))
    assert tables.easy_first(lost) is None
    # By the measure of levels and mix: here the area, though hard only alone gets to 50 %
    lost = dict.fromkeys([*arms, "levels", "hard only"], of_arm(**NEVER))
    lost |= {"levels": of_arm(**NEVER, area=50), "hard only": of_arm(1500, area=42)}
    assert tables.easy_first(lost)


def test_a_rule_is_read_from_four_bases_and_tested_on_two():
    w = {"0.6 %": 70, "1 %": 60, "2.5 %": 50, "6 %": 30, "8 %": 25, "20 %": 10}
    first = {base: share > 40 for base, share in w.items()}
    assert tables.rule(w, first) == (45, True)
    assert tables.rule(w, first | {"2.5 %": False}) == (45, False)
    assert tables.rule(w, first | {"8 %": None, "0.6 %": None}) == (45, True)
    assert tables.rule(w, first | {"20 %": True}) is None  # the four cannot be parted
    assert tables.rule(w, dict.fromkeys(w, False)) is None
    assert tables.rule(w, first | {"2.5 %": None}) == (45, False)  # the one that is new


def test_the_decisions_of_the_map_are_those_of_each_base():
    """The arms of 0.6 % are not those of 6 %; where one is missing, nothing is decided. A seed that
    an arm lacks counts for none."""
    measured = {}
    for base, levels, w in zip(
        tables.BASES, (300, 400, 400, 900, 900, 900), (70, 60, 50, 30, 25, 10)
    ):
        tokens = {
            "mix": 1000,
            "levels": levels,
            "ladder": 900,
            "easy only": 1100,
            "hard only": 1050,
        }
        for arm, at in tokens.items():
            measured[f"{base}: {arm}"] = of_arm(at, at_first=w)
    lines = list(tables.decisions(measured))
    bases = [line for line in lines if "easy first" in line]
    assert [line.endswith("True") for line in bases] == [True] * 3 + [False] * 3
    assert bases[3] == "- 6 %: w = 30.0 %, by seed [30 30 30 30]; easy first: False"
    assert lines[:4] == [
        "- 0.6 %: w = 70.0 %, by seed [70 70 70 70]; easy first: True",
        "  - levels: ahead of the mix, by ratio",
        "  - ladder: neither ahead of nor behind the mix, by ratio",
        "  - easy only: neither ahead of nor behind the mix, by ratio",
    ]
    assert "(45.0, True)" in lines[-1]
    del measured["6 %: ladder"]
    six = range(lines.index(bases[3]), lines.index(bases[4]))
    others = [line for i, line in enumerate(lines[:-1]) if i not in six]
    assert list(tables.decisions(measured)) == others
    measured["0.6 %: mix"][4] = {"at first": 100.0}
    assert list(tables.decisions(measured)) == others


def test_every_arm_is_a_command_that_train_reads():
    """A blank or a slash in the name of an arm must not end up in a path. Arms of older experiments
    come from their results."""
    budgets = {"confounds": {800_000, 2_000_000}, "lost": {400_000, 800_000}}
    budgets |= {"choose": {800_000}, "levels": {400_000}, "map": {1_600_000}}
    for name, expected in budgets.items():
        some = tables.commands(name)
        folders = {runner.folder(name, arm, 0).parent for arm in some}
        assert len(folders) == len(some) > 5
        for folder in folders:
            assert re.fullmatch(r"[\w-]+", folder.name) and folder.parent.name == name
        found = set()
        for flags in some.values():
            if "--target-pass-rate" not in flags and "--online" not in flags:  # which are gone
                cfg = Config(**vars(make_parser().parse_args(shlex.split(flags))))
                assert cfg.eval_data and cfg.lr and cfg.save_every == 0
                levels = resolve_levels(cfg, measured="declared.jsonl" not in flags)
                found.add(sum(level.tokens for level in levels))
        assert found == expected


def test_seeds_that_choose_are_not_reported(results):
    for seed in (19, 20, 29, 30):
        write_result("levels", "EPRLI", seed, 0.8)
    assert list(tables.measures("levels", "EPRLI")) == [19, 30]


def test_a_run_becomes_one_line_and_runs_are_not_made_twice(monkeypatch, results):
    """Two threads must not write into one line. A run that is there is not run again; the line that
    a kill has torn must not be joined to the next one."""
    made = []

    def train(_, arm, seed, command):
        made.append(command)
        return {"arm": arm, "seed": seed, "command": command, "pad": "x" * 100_000}

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setitem(tables.ARMS, "choose", {f"8 %: {lr}": f"--lr {lr}" for lr in range(9)})
    tasks = runner.missing("choose", None, range(30, 32))
    assert len(tasks) == 18
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: runner.one_run(*task), tasks))
    assert sorted(made) == sorted(command for *_, command in tasks)
    lines = {(run["arm"], run["seed"]): run["command"] for run in tables.read_runs("choose")}
    assert lines == {(arm, seed): command for _, arm, seed, command in tasks}
    assert len(runner.missing("choose", None, range(31, 33))) == 9
    path = results / "choose.jsonl"
    path.write_text(path.read_text()[:-1])
    with raises(SystemExit, match="choose.jsonl: a kill has torn its last line"):
        runner.missing("choose", None, [30])


def write_result(name, arm, seed, final, **changes):
    line = {"arm": arm, "seed": seed} | result(final, **changes)
    write_records(tables.RESULTS / f"{name}.jsonl", [line], "a")


def test_dealt_out_pass_rates_keep_the_sizes_of_the_levels():
    problems = [
        Problem(str(i), "1+" * i + "1", "1", rate) for i, rate in enumerate((0.2, 0.9, 0.5))
    ]
    dealt = arms.ranked(problems, lambda p: -len(p.problem))
    assert {p.id: p.pass_rate for p in dealt} == {"2": 0.9, "1": 0.5, "0": 0.2}


def test_random_levels_hold_the_problems_of_the_others(monkeypatch, tmp_path):
    """With problems that are always solved among them, they would waste tokens by construction."""
    monkeypatch.setattr(arms, "VARIANTS", tmp_path / "data")
    arms.prepare()
    shipped = [p for p in read_problems(arms.SHIPPED / "train.jsonl") if p.pass_rate < 1]
    dealt = read_problems(tmp_path / "data/random.jsonl")
    assert {p.id for p in dealt} == {p.id for p in shipped}
    assert sorted(p.pass_rate for p in dealt) == sorted(p.pass_rate for p in shipped)


def test_the_tables_of_results_hold_what_was_measured():
    """A number copied wrongly, or left behind when runs are made anew."""
    measured = "".join(path.read_text() for path in tables.RESULTS.glob("*.md"))
    folder = tables.RESULTS.parent
    pages = [folder / "RESULTS.md", *(folder / "notes").glob("*.md")]
    for row in "\n".join(page.read_text() for page in pages).splitlines():
        if row.startswith("| "):
            for number in re.findall(r"[-+]?\d+\.\d ± \d+\.\d", row):
                assert number in measured, row


def test_promises_name_tests_that_are_there():
    """A test that is renamed or deleted leaves its promise without proof."""
    tests = Path(__file__).parent
    code = "".join(path.read_text() for path in tests.glob("test_*.py"))
    promises = (tests.parent / "docs/promises.md").read_text()
    for name in re.findall(r"`(test_\w+)", promises):  # `test_a_kill_around_...` is a beginning
        assert f"def {name}" in code, name
