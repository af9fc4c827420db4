"""The benchmarks run and print what they promise; their numbers are not for tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from pytest import fixture, mark, raises

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import compare  # noqa: E402  it is no package
import gpu  # noqa: E402

from experiments import arms, runs, tables  # noqa: E402
from run.flags import Config, make_parser, resolve_levels  # noqa: E402


@mark.slow
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


@mark.slow
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


@fixture
def results(monkeypatch, tmp_path):
    """The folder of results: an empty one."""
    for module in (tables, runs):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_every_arm_is_a_command_that_train_reads():
    """A blank or a slash in the name of an arm must not end up in a path."""
    assert len(arms.ARMS["map"]) == 32
    for arm, flags in arms.ARMS["map"].items():
        assert re.fullmatch(r"[\w-]+", arms.path_of(arm).name)
        cfg = Config(**vars(make_parser().parse_args(shlex.split(flags))))
        levels = resolve_levels(cfg, measured="declared.jsonl" not in flags)
        assert sum(level.tokens for level in levels) == 1_600_000
        assert cfg.eval_data and cfg.save_every == 0


def test_a_run_becomes_one_line_and_runs_are_not_made_twice(monkeypatch, results, capsys):
    """Two threads must not write into one line. A run that is there is not run again, one that
    failed is; the line that a kill has torn must not be joined to the next one."""

    def train(arm, seed, command):
        if (arm, seed) == ("8 %: 3", 31) and not failed:
            failed.append(1)
            raise RuntimeError("no memory")
        return {"arm": arm, "seed": seed, "command": command, "pad": "x" * 100_000}

    failed = []
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setitem(arms.ARMS, "map", {f"8 %: {lr}": f"--lr {lr}" for lr in range(9)})
    with raises(SystemExit, match="some runs failed"):
        runs.make("map", range(30, 32), 4)
    assert "no memory" in capsys.readouterr().out and len(tables.read_runs("map")) == 17
    runs.make("map", range(30, 32), 4)
    lines = {(run["arm"], run["seed"]): run["command"] for run in tables.read_runs("map")}
    assert len(lines) == 18 and lines["8 %: 3", 31] == "train.py --lr 3 --seed 31"
    assert len(runs.missing("map", range(31, 33))) == 9
    path = results / "map.jsonl"
    path.write_text(path.read_text()[:-1])
    with raises(SystemExit, match="map.jsonl: a kill has torn its last line"):
        runs.missing("map", [30])
