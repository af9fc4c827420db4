"""Whatever ends a run, and wherever: `--resume` goes on as if nothing had happened, bit for bit."""

import functools
import json
import random
import shutil
import signal
import time
from pathlib import Path

import launch
import pytest
from launch import (
    at_call,
    die,
    die_after,
    die_appending,
    die_writing,
    full_disk,
    told_to_stop,
    words,
)

import infra.run as rundir
from infra.ranks import Stop

pytestmark = pytest.mark.faults

# Two levels, a surplus that waits for the next update, two passes of two steps, evaluations and checkpoints in between.
FLAGS = {
    "model": "toy",
    "data": "p.jsonl",
    "eval_data": "p.jsonl",
    "reward": "r.py:even",
    "group_size": 4,
    "buffer_groups": 2,
    "prompts": 5,
    "max_new_tokens": 8,
    "updates": 5,
    "inner_epochs": 2,
    "lr": 1e-2,
    "warmup": 2,
    "device": "cpu",
    "length_weight": 0.3,
    "eval_every": 2,
    "save_every": 2,
    "schedule": "interleaved",
}
UPDATES = 10


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    """A folder with a model, problems and a reward, and a run in it, `whole`, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(toy_folder, folder / "toy")
    rows = [
        {"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": [0.5, 0.1][i % 2]}
        for i, c in enumerate("0123456789abcdefghij")
    ]
    (folder / "elsewhere").mkdir()
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "r.py").write_text(
        "def even(problem, response):\n    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))\n"
    )
    assert launch.wait(launch.start(folder, ["--explain"])) == [
        0
    ]  # the server of processes has imported everything
    seconds = []
    for out in ("whole", "twice"):
        start = time.monotonic()
        assert launch.wait(launch.start(folder, words(**FLAGS, out=out))) == [0], launch.said(
            folder
        )
        seconds.append(time.monotonic() - start)
    (folder / "seconds").write_text(str(min(seconds)))
    assert_the_same(folder, "twice")
    return folder


def began(folder, out, sabotage=None, **changes):
    """Start the run `out`; -> its exit code, -9 if it was killed."""
    shutil.rmtree(folder / out, ignore_errors=True)
    return launch.wait(
        launch.start(folder, words(**{**FLAGS, **changes}, out=out), sabotage=sabotage)
    )[0]


def resumed(folder, out, *more, sabotage=None, world=1):
    return launch.wait(launch.start(folder, ["--resume", out, *more], world, sabotage))[0]


def without_time(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {
            k: v
            for k, v in row.items()
            if not any(word in k for word in ("seconds", "tokens_per_second", "memory"))
        }
        for row in rows
    ]


def assert_the_same(folder, out, whole="whole"):
    """Bit for bit: logs, weights, optimizer, and the state beside them."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_time(folder / out / name) == without_time(folder / whole / name)
    assert (folder / out / "completions.jsonl").read_bytes() == (
        folder / whole / "completions.jsonl"
    ).read_bytes()
    one, other = (folder / o / "checkpoints" / f"{UPDATES:06d}" for o in (out, whole))
    for name in ("model.safetensors", "optimizer.safetensors", "buffer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    state = [
        {k: v for k, v in json.loads((path / "state.json").read_text()).items() if k != "sizes"}
        for path in (one, other)
    ]
    assert state[0] == state[1]
    assert not (folder / out / "checkpoint.part").exists()


MOMENTS = {  # where a kill -9 strikes: (function, which of its calls, how)
    "before the first draw": ("train.draw", 1, die),
    "in the first evaluation": ("train.evaluate", 1, die),
    "in the prefill of a rollout": ("rollout.Slots.prefill", 9, die),
    "while decoding": ("rollout.Slots.decode", 40, die),
    "while decoding, later": ("rollout.Slots.decode", 111, die),
    "while grading": ("rewards.Grader.compare", 8, die),
    "between two draws": ("train.draw", 3, die_after),
    "in the backward pass of an update": ("train.backward", 11, die),
    "before an optimizer step": ("train.Learner.step", 10, die),
    "after an optimizer step": ("train.Learner.step", 9, die_after),
    "within an optimizer step": ("train.Learner.publish", 15, die),
    "in the middle of a line of metrics.jsonl": ("infra.run.Run.append", 7, die_appending),
    "between completions.jsonl and metrics.jsonl": ("infra.run.Run.append", 8, die_after),
    "before a checkpoint": ("infra.run.Run._write", 2, die),
    "in the middle of the weights' file": ("model.save_file", 3, die_writing),
    "between the files of a checkpoint": ("infra.run.save_file", 5, die),
    "in the middle of the optimizer's file": ("infra.run.save_file", 3, die_writing),
    "between the optimizer's file and the rest": ("infra.run.save_file", 3, die_after),
    "before the checksums": ("infra.run.sha256", 25, die),
    "before the rename": ("infra.run.flush", 40, die),
    "after the rename, before old ones are deleted": ("infra.run.checkpoints", 3, die),
    "while an old checkpoint is deleted": ("shutil.rmtree", 8, die),
    "at the last checkpoint": ("infra.run.Run._write", 5, die),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_changes_nothing(workshop, moment):
    """State that lives in memory alone, a file that is trusted though half of it is there, lines written twice."""
    out = "killed"
    assert began(workshop, out, functools.partial(at_call, *MOMENTS[moment])) == -signal.SIGKILL, (
        launch.said(workshop)
    )
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert_the_same(workshop, out)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"kl_coef": 0.1, "schedule": "sequential"},
        {"filter": "all", "lr_decay": "cosine", "prompts": 9},
        {"save_every": 0},
    ],
    ids=str,
)
def test_a_kill_changes_nothing_under_other_settings(workshop, changes):
    """float32 masters, the starting policy of the KL term, a surplus that grows stale, no checkpoint at all."""
    assert began(workshop, "settled", **changes) == 0, launch.said(workshop)
    assert (
        began(
            workshop, "killed", functools.partial(at_call, "train.Learner.step", 26, die), **changes
        )
        == -signal.SIGKILL
    )
    assert resumed(workshop, "killed") == 0, launch.said(workshop)
    assert_the_same(workshop, "killed", "settled")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kills_at_random_moments_one_after_the_other(workshop, seed):
    """Eight kills by the clock, wherever a run stands, from reading its flags to its last checkpoint."""
    rng, out, kills = random.Random(seed), f"random{seed}", 0
    arguments, seconds = words(**FLAGS, out=out), float((workshop / "seconds").read_text())
    while kills < 8:
        (process,) = launch.start(workshop, arguments)
        process.join(rng.uniform(0.2, 1) * seconds)
        kills += process.is_alive()
        process.kill()
        process.join()
        if process.exitcode == 0:  # it came to its end: once more from the beginning
            assert_the_same(workshop, out)
            shutil.rmtree(workshop / out)
        arguments = ["--resume", out] if (workshop / out).exists() else words(**FLAGS, out=out)
    assert launch.wait(launch.start(workshop, arguments)) == [0], launch.said(workshop)
    assert_the_same(workshop, out)


def test_resuming_a_finished_run_adds_nothing(workshop):
    shutil.copytree(workshop / "whole", workshop / "again")
    assert resumed(workshop, "again") == 0
    assert_the_same(workshop, "again")


# ---------------------------------------------------------------------------------------------- damaged checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights flipped": lambda c: flip(c / "model.safetensors"),
    "a bit of the optimizer flipped": lambda c: flip(c / "optimizer.safetensors"),
    "a bit of the state flipped": lambda c: flip(c / "state.json"),
    "a bit of the tokenizer flipped": lambda c: flip(c / "tokenizer.json"),
    "a bit of the checksums flipped": lambda c: flip(c / "checksums.json"),
    "the weights torn": lambda c: (c / "model.safetensors").write_bytes(
        (c / "model.safetensors").read_bytes()[:-100]
    ),
    "the buffer missing": lambda c: (c / "buffer.safetensors").unlink(),
    "the checksums missing": lambda c: (c / "checksums.json").unlink(),
    "the checksums empty": lambda c: (c / "checksums.json").write_text("{}"),
    "an empty folder": lambda c: shutil.rmtree(c) or c.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_aloud(workshop, damage):
    """The one before it serves, and the run still ends in the very same bits."""
    out = "damaged"
    shutil.rmtree(workshop / out, ignore_errors=True)
    shutil.copytree(workshop / "whole", workshop / out)
    DAMAGE[damage](workshop / out / "checkpoints/000010")
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert "000010: skipped, it is damaged" in launch.said(
        workshop
    ) and "goes on after damaged/checkpoints/000008" in launch.said(workshop)
    assert_the_same(workshop, out)


def test_when_no_checkpoint_is_whole_nothing_is_cut(workshop):
    """Starting over would throw away logs that are sound."""
    shutil.copytree(workshop / "whole", workshop / "hopeless")
    for path in (workshop / "hopeless/checkpoints").iterdir():
        flip(path / "model.safetensors")
    before = (workshop / "hopeless/metrics.jsonl").read_bytes()
    for _ in range(2):  # the second time too
        assert (
            resumed(workshop, "hopeless") == 2
            and "no checkpoint is whole (000010: model.safetensors is not what was written"
            in launch.said(workshop)
        )
    assert (workshop / "hopeless/metrics.jsonl").read_bytes() == before


def test_checkpoints_hold_no_pickle(workshop):
    for path in (workshop / "whole/checkpoints/000010").iterdir():
        assert path.suffix in (".json", ".safetensors", ".jinja")


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_checkpoints_are_kept(workshop, keep):
    assert began(workshop, f"keep{keep}", keep_checkpoints=keep) == 0
    kept = sorted(p.name for p in (workshop / f"keep{keep}/checkpoints").iterdir())
    assert kept == ["000006", "000008", "000010"][-keep:]


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(workshop):
    out = "full"
    assert (
        began(
            workshop,
            out,
            functools.partial(
                at_call,
                "infra.run.Run._write",
                3,
                functools.partial(full_disk, "whole/checkpoints/000010/model.safetensors"),
            ),
        )
        == 1
    )
    assert "checkpoint 000006 cannot be written" in launch.said(
        workshop
    ) and "full/checkpoints/000004" in launch.said(workshop)
    assert not (workshop / out / "checkpoint.part").exists()
    assert resumed(workshop, out) == 0
    assert_the_same(workshop, out)


def test_a_full_disk_while_a_line_is_appended(workshop):
    """The line is torn, the run ends with a message, and the resumed run cuts the torn line off."""
    out = "full2"
    assert (
        began(
            workshop,
            out,
            functools.partial(
                at_call, "train.learn", 5, functools.partial(full_disk, "full2/completions.jsonl")
            ),
        )
        == 1
    )
    assert "completions.jsonl cannot be written" in launch.said(
        workshop
    ) and "Traceback" not in launch.said(workshop)
    assert resumed(workshop, out) == 0
    assert_the_same(workshop, out)


def test_no_checkpoint_counts_on_a_log_that_lacks_lines(workshop):
    """The disk was full for a line, and then had room for a checkpoint: it would go on behind a line that is not there."""
    out = "torn"
    assert began(workshop, out, functools.partial(at_call, "infra.run.Run._put", 11, no_room)) == 1
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert_the_same(workshop, out)


def no_room(original, arguments):
    raise Stop("no room for this line")


def test_nor_on_an_update_that_could_not_be_described(workshop):
    out = "torn"
    assert began(workshop, out, functools.partial(at_call, "infra.run.Stats.row", 5, crash)) == 1
    assert "ZeroDivisionError" in launch.said(workshop)
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert_the_same(workshop, out)


def crash(original, arguments):
    return 1 / 0


def test_a_disk_that_is_full_for_the_tokenizer(workshop):
    """tokenizers raises a bare Exception."""
    out = "full3"
    assert (
        began(
            workshop,
            out,
            functools.partial(at_call, "transformers.GenerationConfig.save_pretrained", 3, bare),
        )
        == 1
    )
    assert "checkpoint 000006 cannot be written (No space left on device)" in launch.said(
        workshop
    ) and "Traceback" not in launch.said(workshop)
    assert not (workshop / out / "checkpoint.part").exists()
    assert resumed(workshop, out) == 0
    assert_the_same(workshop, out)


def bare(original, arguments):
    raise Exception("No space left on device")


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where, call",
    [
        ("rollout.Slots.decode", 3),
        ("rollout.Slots.decode", 60),
        ("train.evaluate", 1),
        ("train.interval", 5),
        ("train.minibatch", 4),
        ("train.minibatch", 11),
        ("train.Learner.step", 6),
        ("infra.run.Run._write", 2),
        ("infra.run.Run.log", 3),
    ],
)
def test_a_signal_saves_the_state_at_once_and_the_rest_follows_bit_for_bit(
    workshop, where, call, number
):
    """In a rollout, between the evaluations of two levels, in a step, in a checkpoint: nothing is waited for, nothing lost."""
    out = "told"
    assert (
        began(
            workshop,
            out,
            functools.partial(at_call, where, call, functools.partial(told_to_stop, number)),
        )
        == 128 + number
    ), launch.said(workshop)
    assert "the state is saved" in launch.said(workshop)
    newest = rundir.newest_whole(workshop / out)
    assert ("+" in newest.name) == (where in ("train.minibatch", "train.Learner.step")), newest
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert_the_same(workshop, out)


def test_a_second_signal_while_the_state_is_saved_changes_nothing(workshop):
    """A person who is impatient, or torchrun, which sends two."""
    out = "twice told"
    assert began(workshop, out, tell_twice) == 128 + signal.SIGINT
    assert "the state is saved" in launch.said(workshop) and "Traceback" not in launch.said(
        workshop
    )
    assert resumed(workshop, out) == 0, launch.said(workshop)
    assert_the_same(workshop, out)


def tell_twice():
    at_call("train.minibatch", 4, functools.partial(told_to_stop, signal.SIGINT))
    at_call("model.save_file", 1, functools.partial(told_to_stop, signal.SIGTERM))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_rollout_within_seconds(workshop, world, number):
    """Completions of 100 tokens that take a second each: to wait for one would take minutes."""
    out = f"slow{world}{number}"
    flags = {**FLAGS, "max_new_tokens": 100, "out": out, "eval_every": 0, "group_size": 8}
    processes = launch.start(
        workshop, words(**flags), world, functools.partial(slow, "rollout.Slots.decode")
    )
    deadline = time.monotonic() + 60
    while not (workshop / out).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    start = time.monotonic()
    for process in processes:
        os_kill(process.pid, number)
    assert launch.wait(processes) == [128 + number] * world, launch.said(workshop)
    assert time.monotonic() - start < 5
    assert rundir.newest_whole(workshop / out).name == "000000"


def slow(where):
    """Every call takes a second longer."""
    import importlib

    module, owner, name = where.split(".")
    owner = getattr(importlib.import_module(module), owner)
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments: time.sleep(1) or original(*arguments))


def os_kill(pid, number):
    import os

    os.kill(pid, number)


# ------------------------------------------------------------------------------------------- what resume refuses


def test_two_processes_cannot_write_to_one_run(workshop):
    """The second would cut the first's logs, or take a checkpoint that is being deleted for a damaged one."""
    out = "busy"
    shutil.rmtree(workshop / out, ignore_errors=True)
    flags = {**FLAGS, "out": out, "save_every": 1, "keep_checkpoints": 1}
    (first,) = launch.start(
        workshop, words(**flags), sabotage=functools.partial(slow, "infra.run.Run._write")
    )
    while not (workshop / out / "config.json").exists():
        time.sleep(0.05)
    refused = 0
    while first.is_alive():
        (second,) = launch.start(workshop / "elsewhere", ["--resume", workshop / out])
        refused += launch.wait([second]) == [
            2
        ] and "another process is writing to this run" in launch.said(workshop / "elsewhere")
    assert refused > 3 and launch.wait([first]) == [0], launch.said(workshop)
    assert not list((workshop / out / "checkpoints").glob("*.damaged"))
    assert_the_same(workshop, out)


def test_flags_that_change_the_result_are_refused_and_those_of_memory_are_not(workshop):
    shutil.copytree(workshop / "whole", workshop / "flags")
    assert resumed(workshop, "flags", "--lr", "0.1") == 2
    assert "--lr is not one that may differ" in launch.said(workshop)
    assert (
        resumed(workshop, "flags", "--slots", "9", "--micro-batch-tokens", "100", "--recompute")
        == 0
    )


def test_inputs_that_changed_are_refused(workshop):
    shutil.copytree(workshop / "whole", workshop / "inputs")
    data = workshop / "p.jsonl"
    before = data.read_text()
    try:
        data.write_text(before + '\n{"problem": "new", "answer": 1, "pass_rate": 0.5}')
        assert resumed(
            workshop, "inputs"
        ) == 2 and "p.jsonl is gone, or is not what it was" in launch.said(workshop)
    finally:
        data.write_text(before)


def test_a_folder_that_is_no_run_is_refused(workshop):
    (workshop / "empty").mkdir()
    for name in ("nowhere", "empty", "toy"):
        assert resumed(workshop, name) == 2 and "is not that of a run" in launch.said(workshop)
    assert not (workshop / "nowhere").exists() and not list((workshop / "empty").iterdir())


@pytest.mark.parametrize("log", rundir.LOGS)
def test_a_log_that_lost_lines_is_refused_and_the_others_stay(workshop, log):
    """The newest checkpoint is gone, so that there is something to cut; but one log is too short even for the one before."""
    out = f"lost {log}"
    shutil.copytree(workshop / "whole", workshop / out)
    shutil.rmtree(workshop / out / "checkpoints/000010")
    path = workshop / out / log
    path.write_bytes(path.read_bytes()[:200])
    before = {name: (workshop / out / name).read_bytes() for name in rundir.LOGS}
    assert resumed(workshop, out) == 2 and "lines were lost" in launch.said(workshop)
    assert {name: (workshop / out / name).read_bytes() for name in rundir.LOGS} == before


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_the_starting_policy_of_a_kl_term_must_be_the_same(workshop, change):
    """Another one would be another penalty, without a word."""
    out, model = f"kl {change}", workshop / f"toy {change}"
    shutil.copytree(workshop / "toy", model)
    assert (
        began(
            workshop,
            out,
            functools.partial(at_call, "train.learn", 5, die),
            kl_coef=0.1,
            model=model.name,
        )
        == -signal.SIGKILL
    )
    if change == "gone":
        (model / "model.safetensors").unlink()
    else:
        flip(model / "model.safetensors")
    assert resumed(
        workshop, out
    ) == 2 and "model.safetensors is gone, or is not what it was" in launch.said(workshop)


def test_without_a_kl_term_the_starting_policy_may_be_gone(workshop):
    """The checkpoint has all that it takes."""
    shutil.copytree(workshop / "toy", workshop / "passing")
    assert (
        began(workshop, "heir", functools.partial(at_call, "train.learn", 5, die), model="passing")
        == -signal.SIGKILL
    )
    shutil.rmtree(workshop / "passing")
    assert resumed(workshop, "heir") == 0, launch.said(workshop)
    assert_the_same(workshop, "heir")


def test_checkpoints_are_ordered_by_what_was_done(tmp_path):
    names = ["000003", "000003+002.000", "000003+999.001", "000003+1000.000", "000004", "1000000"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in rundir.checkpoints(tmp_path)] == names[::-1]


def test_from_another_folder(workshop, tmp_path):
    """config.json holds paths that mean the same everywhere."""
    assert (
        began(workshop, "far", functools.partial(at_call, "train.learn", 5, die)) == -signal.SIGKILL
    )
    assert launch.wait(launch.start(tmp_path, ["--resume", workshop / "far"])) == [0], launch.said(
        tmp_path
    )
    assert_the_same(workshop, "far")
    assert Path(json.loads((workshop / "far/config.json").read_text())["data"]).is_absolute()
