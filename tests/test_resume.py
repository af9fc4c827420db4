"""Whatever ends a run, and wherever: `--resume` goes on as if nothing had happened, bit for bit."""

import fcntl
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import torch
from launch import at_call, at_event, die, fail, full_disk, tell, words
from safetensors.torch import load_file
from test_train import level
from transformers import AutoModelForCausalLM

import model
from eprli import Buffer, LevelState
from infra import run
from infra.directory import LOGS, RunDirectory, create
from infra.ranks import Stop
from infra.setup import extend
from parts import policy as policies

pytestmark = pytest.mark.faults

# Two levels, a surplus that waits for the next update, two passes of two steps, evaluations and
# checkpoints in between.
FLAGS = {
    "model": "toy",
    "data": "p.jsonl",
    "eval_data": "p.jsonl",
    "reward": "r.py:even",
    "group_size": 4,
    "buffer_groups": 2,
    "prompts": 5,
    "max_new_tokens": 8,
    "updates": 4,
    "inner_epochs": 2,
    "lr": 1e-2,
    "warmup": 2,
    "device": "cpu",
    "length_weight": 0.3,
    "eval_every": 2,
    "save_every": 2,
    "schedule": "interleaved",
}
UPDATES = 8
EVEN = """
def even(problem, response):
    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    """A folder with a model, problems, a reward, and a run, `whole`, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(toy_folder, folder / "toy")
    rows = []
    for i, c in enumerate("0123456789abcdefghij"):
        rows.append({"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": [0.5, 0.1][i % 2]})
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "r.py").write_text(EVEN)
    assert began(folder, "twice", functools.partial(at_event, None, None)) == 0
    (folder / "events").write_text(re.search(r"(\d+) events", launch.said(folder))[1])
    assert began(folder, "whole") == 0, launch.said(folder)
    assert_the_same(folder, "twice")
    return folder


def began(folder, out, sabotage=None, world=1, **changes):
    """Start the run `out`; -> its exit code, -9 if it was killed."""
    shutil.rmtree(folder / out, ignore_errors=True)
    flags = words(**{**FLAGS, **changes}, out=out)
    return launch.wait(launch.start(folder, flags, world, sabotage))[0]


def resumed(folder, out, *more):
    return launch.wait(launch.start(folder, ["--resume", out, *more]))[0]


def ends_the_same(folder, out, whole="whole"):
    assert resumed(folder, out) == 0, launch.said(folder)
    assert_the_same(folder, out, whole)


def without_time(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in list(row):
            if name.endswith(("seconds", "per_second", "memory_mb")):
                del row[name]
    return rows


def assert_the_same(folder, out, whole="whole", last=UPDATES):
    """Bit for bit: logs, weights, optimizer, and the state beside them."""
    one, other = folder / out, folder / whole
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_time(one / name) == without_time(other / name)
    last = f"checkpoints/{last:06d}"
    tensors = [f"{last}/{path.name}" for path in (other / last).glob("*.safetensors")]
    assert len(tensors) == 2  # of the policy and of the optimizer
    for name in ("completions.jsonl", *tensors):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    states = [json.loads((path / last / "state.json").read_text()) for path in (one, other)]
    assert states[0].pop("sizes") and states[1].pop("sizes") and states[0] == states[1]
    assert not (one / "checkpoint.part").exists()


def checkpoints(folder, out):
    return sorted(p.name for p in (folder / out / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ kills


@pytest.mark.parametrize("share", [0.02, 0.15, 0.29, 0.41, 0.57, 0.68, 0.83, 0.97])
def test_a_kill_at_any_moment_changes_nothing(workshop, share):
    """State that lives in memory alone; a file that is trusted though it is half written."""
    event = int(share * int((workshop / "events").read_text()))
    out = f"killed{share}"
    assert began(workshop, out, functools.partial(at_event, event, die)) == -signal.SIGKILL
    ends_the_same(workshop, out)


@pytest.mark.parametrize(
    "where, call",
    [
        ("infra.directory.sha256", 9),  # before the checksums of the second checkpoint
        ("infra.directory.RunDirectory.delete_old", 3),  # after the rename
        ("infra.run.Run.write", 4),  # the last checkpoint
    ],
)
def test_a_kill_around_a_checkpoint_changes_nothing(workshop, where, call):
    """Writing one takes few events; so these moments are looked for."""
    out = f"killed at {where}"
    sabotage = functools.partial(at_call, where, call, die)
    assert began(workshop, out, sabotage) == -signal.SIGKILL
    ends_the_same(workshop, out)


def test_what_a_kill_leaves_half_written_is_cut_off(workshop):
    """A torn line of a log; a torn file of a checkpoint that was never renamed."""
    out = workshop / "torn"
    assert began(workshop, "torn", functools.partial(at_call, "train.learn", 6, die)) < 0
    for log in LOGS:
        with open(out / log, "a") as file:
            file.write('{"update": 5, "le')
    shutil.copytree(out / "checkpoints/000004", out / "checkpoint.part")
    flip(out / "checkpoint.part/model.safetensors")
    ends_the_same(workshop, "torn")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "save_every": 0},
        {"kl_coef": 0.1, "schedule": "sequential"},
        {"filter": "all", "lr_decay": "cosine", "prompts": 9},
        {"lora_rank": 2, "kl_coef": 0.1},
        {"lora_rank": 2, "dtype": "bfloat16", "save_every": 0},
    ],
    ids=str,
)
def test_a_kill_changes_nothing_under_other_settings(workshop, changes):
    """float32 masters, no checkpoint, the starting policy of the KL term, a stale surplus, factors
    that are drawn anew."""
    assert began(workshop, "settled", **changes) == 0, launch.said(workshop)
    sabotage = functools.partial(at_call, "parts.optimizer.Learner.step", 22, die)
    assert began(workshop, "killed", sabotage, **changes) == -signal.SIGKILL
    ends_the_same(workshop, "killed", "settled")


def with_two_threads(step=0):
    """As on a laptop. step: the call of Learner.step that kills"""
    torch.set_num_threads(2)
    at_call("parts.optimizer.Learner.step", step, die)


def test_a_kill_changes_nothing_where_two_threads_learn(workshop):
    """A sum in the order in which threads end. Any other number of threads is said."""
    few = {"updates": 1, "save_every": 1}  # threads that spin take long on a busy machine
    assert began(workshop, "threads", with_two_threads, **few) == 0, launch.said(workshop)
    kill = functools.partial(with_two_threads, 6)
    assert began(workshop, "killed", kill, **few) == -signal.SIGKILL
    shutil.copytree(workshop / "killed", workshop / "one thread")
    again = launch.start(workshop, ["--resume", "killed"], sabotage=with_two_threads)
    assert launch.wait(again) == [0] and "not bit for bit" not in launch.said(workshop)
    assert_the_same(workshop, "killed", "threads", last=2)
    assert resumed(workshop, "one thread") == 0
    (said,) = re.findall(".*not bit for bit.*", launch.said(workshop))
    assert said == "threads 2, now 1: the run is not bit for bit the same"


def test_kills_at_random_moments_one_after_the_other(workshop):
    """Six kills by the clock, wherever a run stands, from reading its flags to its end."""
    rng, out, kills = random.Random(0), "random", 0
    processes = launch.start(workshop, words(**FLAGS, out=out))
    while kills < 6:
        time.sleep(rng.uniform(0.1, 0.6))
        processes[0].kill()
        kills += launch.wait(processes) == [-signal.SIGKILL]
        again = ["--resume", out] if (workshop / out).exists() else words(**FLAGS, out=out)
        if (workshop / out / f"checkpoints/{UPDATES:06d}").exists():
            break
        processes = launch.start(workshop, again)
    launch.wait(processes)
    ends_the_same(workshop, out)
    assert kills > 1


# ---------------------------------------------------------------------------------------- damages


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_text("{}")


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", flip),
        ("optimizer.safetensors", truncate),
        ("state.json", flip),
        ("state.json", Path.unlink),
        ("checksums.json", Path.unlink),
        ("checksums.json", empty),
        ("", shutil.rmtree),
    ],
)
def test_a_damaged_checkpoint_is_skipped_aloud(workshop, name, damage):
    """The one before it serves, and the run still ends in the very same bits."""
    out = workshop / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(workshop / "whole", out)
    damage(out / "checkpoints/000008" / name)
    (out / "checkpoints/000008").mkdir(exist_ok=True)
    ends_the_same(workshop, "damaged")
    assert "000008: skipped, it is damaged" in launch.said(workshop)
    assert "goes on after damaged/checkpoints/000006" in launch.said(workshop)


def test_when_no_checkpoint_is_whole_nothing_is_cut(workshop):
    """Starting over would throw away logs that are sound."""
    out = workshop / "hopeless"
    shutil.copytree(workshop / "whole", out)
    for path in (out / "checkpoints").iterdir():
        flip(path / "model.safetensors")
    before = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the second time too
        assert resumed(workshop, "hopeless") == 2
        assert "no checkpoint is whole (000008: model.safetensors" in launch.said(workshop)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_checkpoints_hold_no_pickle_and_only_the_newest_are_kept(workshop):
    assert checkpoints(workshop, "whole") == ["000006", "000008"]
    endings = {path.suffix for path in (workshop / "whole/checkpoints/000008").iterdir()}
    assert endings <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    "where, call, error, said",
    [
        (
            "infra.run.Run.write",
            3,
            "whole/checkpoints/000008/model.safetensors",
            "checkpoint 000006",
        ),
        ("train.learn", 5, "full/completions.jsonl", "completions.jsonl cannot be written"),
        # The disk was full for a line, and then had room for a checkpoint.
        ("infra.directory.RunDirectory.append", 15, Stop("no room"), "no room"),
        # tokenizers raises a bare Exception.
        ("parts.policy.GenerationConfig", 3, Exception("No space left"), "written (No space left)"),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    workshop, where, call, error, said
):
    action = full_disk if isinstance(error, str) else fail
    sabotage = functools.partial(at_call, where, call, functools.partial(action, error))
    assert began(workshop, "full", sabotage) == 1
    assert said in launch.said(workshop) and "Traceback" not in launch.said(workshop)
    assert "000004" in checkpoints(workshop, "full")
    assert not (workshop / "full/checkpoint.part").exists()
    ends_the_same(workshop, "full")


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "where, call, update, number",
    [
        ("train.evaluate", 1, 0, signal.SIGINT),  # dropped
        ("rollout.choose", 66, 5, signal.SIGTERM),  # in a rollout: its update is dropped
        ("train.accumulate_gradient", 6, 2, signal.SIGINT),  # while learning: it is finished
        ("parts.optimizer.Learner.step", 12, 3, signal.SIGTERM),
        ("infra.run.Run.write", 2, 4, signal.SIGINT),  # in a checkpoint
        ("train.interval", 8, 6, signal.SIGTERM),  # between the evaluations of two levels
        ("train.evaluate", 6, 8, signal.SIGTERM),  # in the last one: the state is saved twice
    ],
)
def test_a_signal_saves_a_whole_update_and_the_rest_follows(workshop, where, call, update, number):
    """Sampling is not waited for, an update that learns is: no weights between two updates."""
    sabotage = functools.partial(at_call, where, call, functools.partial(tell, number))
    assert began(workshop, "told", sabotage) == 128 + number, launch.said(workshop)
    assert "the state is saved" in launch.said(workshop)
    assert checkpoints(workshop, "told")[-1] == f"{update:06d}"
    assert len(without_time(workshop / "told/metrics.jsonl") if update else []) == update
    ends_the_same(workshop, "told")


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_the_last_state_is_saved_anew_changes_nothing(workshop, call):
    """It has the name of the one that lacks the evaluation, and neither may be missing."""
    told = functools.partial(at_call, "train.evaluate", 6, functools.partial(tell, signal.SIGINT))
    assert began(workshop, "anew", told, keep_checkpoints=1) == 128 + signal.SIGINT
    sabotage = functools.partial(at_call, "pathlib.Path.rename", call, die)
    processes = launch.start(workshop, ["--resume", "anew"], sabotage=sabotage)
    assert launch.wait(processes) == [-signal.SIGKILL]
    assert resumed(workshop, "anew") == 0
    assert "goes on after nothing" not in launch.said(workshop)
    assert_the_same(workshop, "anew")
    assert checkpoints(workshop, "anew") == ["000008"]


def test_a_signal_that_comes_twice_at_once_is_one(workshop):
    """torchrun passes Ctrl-C on to processes that have it from the terminal."""
    assert began(workshop, "doubled", tell_twice) == 128 + signal.SIGINT
    assert "the state is saved" in launch.said(workshop)
    ends_the_same(workshop, "doubled")


def hang_up(ignored):
    """A signal of a terminal that has gone, while an update learns. ignored: by nohup"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    at_call("train.accumulate_gradient", 6, functools.partial(tell, signal.SIGHUP))


@pytest.mark.parametrize("ignored, code", [(False, 128 + signal.SIGHUP), (True, 0)])
def test_a_dropped_connection_saves_unless_nohup_ignores_it(workshop, ignored, code):
    """Its default is to end the process at once."""
    assert began(workshop, "dropped", functools.partial(hang_up, ignored)) == code
    assert checkpoints(workshop, "dropped")[-1] == ("000008" if ignored else "000002")
    ends_the_same(workshop, "dropped")


def lose_terminal():
    """Let a terminal be what controls this process, and then take it away."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSCTTY)
    sys.stdout = sys.stderr = open(terminal, "w", buffering=1)  # noqa: SIM115

    def close(original):
        os.close(master)  # the kernel sends SIGHUP
        return original()

    at_call("train.accumulate_gradient", 6, close)


def test_a_terminal_that_has_gone_is_no_longer_written_to(workshop):
    """The line of the update that is being finished would be an error, and nothing be saved."""
    assert began(workshop, "terminal", lose_terminal) == 128 + signal.SIGHUP
    assert checkpoints(workshop, "terminal")[-1] == "000002"
    ends_the_same(workshop, "terminal")


def tell_twice():
    at_call("train.learn", 4, functools.partial(tell, signal.SIGINT))
    at_call("infra.run.Run.write", 2, functools.partial(tell, signal.SIGTERM))


def test_a_second_signal_leaves_at_once(workshop):
    """While an update learns for minutes, the one before it is what remains."""
    sabotage = functools.partial(slow, "train.accumulate_gradient", 100)
    processes = launch.start(workshop, words(**FLAGS, out="impatient"), sabotage=sabotage)
    time.sleep(4)
    for _ in range(2):
        os.kill(processes[0].pid, signal.SIGINT)
        time.sleep(1.5)
    assert launch.wait(processes, 5) == [128 + signal.SIGINT]
    assert "left at once" in launch.said(workshop)
    ends_the_same(workshop, "impatient")


@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_ends_a_long_rollout_within_seconds(workshop, world, number):
    """Completions of 100 tokens that take a second each: to wait for one would take minutes."""
    out = f"slow{world}"
    flags = {**FLAGS, "max_new_tokens": 100, "out": out, "eval_every": 0}
    sabotage = functools.partial(slow, "rollout.choose", 1)
    processes = launch.start(workshop, words(**flags), world, sabotage)
    deadline = time.monotonic() + 60
    while not (workshop / out).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    start = time.monotonic()
    for process in processes:
        os.kill(process.pid, number)
    assert launch.wait(processes) == [128 + number] * world, launch.said(workshop)
    assert time.monotonic() - start < 5
    assert checkpoints(workshop, out) == ["000000"]


def slow(where, seconds):
    """Every call takes some seconds longer."""
    owner, name = launch.find(where)
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: time.sleep(seconds) or original(*a, **k))


# ------------------------------------------------------------------------------- large checkpoints

SMALL_PARTS = 4000  # bytes; the model has about 40,000


def in_small_parts(number=None):
    """number  of the call of train.learn that kills the process"""
    model.PART_BYTES = run.PART_BYTES = SMALL_PARTS
    for where in ("infra.run.save_file", "safetensors.torch.save_file"):
        owner, name = launch.find(where)
        setattr(owner, name, functools.partial(save_no_more_at_once, getattr(owner, name)))
    if number:
        at_call("train.learn", number, die)


def save_no_more_at_once(original, tensors, *others, **keywords):
    """safetensors copies from a GPU all tensors of a file before it writes the first one."""
    *before, _ = (tensor.nbytes for tensor in tensors.values()) if tensors else [0]
    assert sum(before) < SMALL_PARTS
    original(tensors, *others, **keywords)


@pytest.mark.parametrize("world", [1, 2])
def test_a_large_checkpoint_is_several_files_and_goes_on(workshop, world):
    """Bit for bit, as from one file; transformers reads the model; a damaged part is noticed."""
    out, sabotage = workshop / f"parts{world}", functools.partial(in_small_parts, 7)
    assert began(workshop, out.name, sabotage, world) == -signal.SIGKILL
    folder = out / "checkpoints/000006"
    for name in ("model", "optimizer"):
        parts = sorted(folder.glob(f"{name}*.safetensors"))
        whole = load_file(workshop / f"whole/checkpoints/000006/{name}.safetensors")
        found = [load_file(path) for path in parts]
        assert len(parts) > 3 and sum(map(len, found)) == len(whole)
        for key, tensor in itertools.chain(*(some.items() for some in found)):
            assert tensor.equal(whole[key]) or world > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = model.Transformer.from_pretrained(folder)
    assert theirs.lm_head.weight.equal(ours.lm_head.weight)
    if world == 1:
        return ends_the_same(workshop, out.name)
    flip(folder / "optimizer3.safetensors")
    assert resumed(workshop, out.name) == 0
    damage = "000006: skipped, it is damaged (optimizer3.safetensors is not what was written)"
    assert damage in launch.said(workshop)


def test_the_size_of_checkpoints_is_said_before_the_run_begins(workshop):
    """A disk that fills up overnight. Weights in bfloat16, masters and two moments in float32."""
    assert began(workshop, "said", dtype="bfloat16", updates=0, keep_checkpoints=3) == 0
    size = sum(p.numel() for p in model.Transformer.from_pretrained(workshop / "toy").parameters())
    said = launch.said(workshop)
    assert f"every --save-every 2 updates, takes {14 * size / 1e9:.3f} GB" in said
    assert f"being written, {4 * 14 * size / 1e9:.3f} GB" in said


# -------------------------------------------------------------------------------------- extension

LONGER = ["--updates", "4", "6"]
SEQUENTIAL = {"schedule": "sequential", "quality": (0.8, 1.0)}


@pytest.fixture(scope="module")
def extended(workshop):
    """A run of two levels, four updates each, whose last level was given two more."""
    assert began(workshop, "longer", **SEQUENTIAL) == 0, launch.said(workshop)
    shutil.copytree(workshop / "longer", workshop / "not longer")
    assert resumed(workshop, "longer", *LONGER) == 0, launch.said(workshop)
    return workshop


def test_more_updates_extend_the_last_level(extended):
    """By hand: 0.01, of level 1 with two updates of warm-up, falls to 0 over four updates; and then
    anew over the two that were added, without a warm-up. What was there stays as it is."""
    rates = [row["lr"] for row in without_time(extended / "longer/metrics.jsonl")]
    level = [0.005, 0.0075, 0.005, 0.0025]
    assert rates == pytest.approx([*level, *level, 0.01, 0.005])
    before = without_time(extended / "not longer/metrics.jsonl")
    assert without_time(extended / "longer/metrics.jsonl")[:8] == before
    lines = (extended / "longer/completions.jsonl").read_text().splitlines()
    drawn = [json.loads(line) for line in lines]
    again = {row["text"] for row in drawn if row["update"] > 8}
    assert not again <= {row["text"] for row in drawn if row["update"] <= 8}  # other random numbers
    old, new = (
        json.loads((extended / f"{name}longer/config.json").read_text()) for name in ("not ", "")
    )
    changed = {name for name in new if new[name] != old.get(name)}
    assert changed == {"updates", "levels", "extended_after"}
    assert (new["updates"], new["extended_after"]) == ([4, 6], [4])
    assert [level["updates"] for level in new["levels"]] == [4, 6]


@pytest.mark.parametrize("step", [3, 7])
def test_a_kill_changes_nothing_in_what_was_added(extended, step):
    """It is resumed without the flag: config.json has it."""
    out = f"added{step}"
    shutil.copytree(extended / "not longer", extended / out)
    sabotage = functools.partial(at_call, "parts.optimizer.Learner.step", step, die)
    words = ["--resume", out, *LONGER]
    assert launch.wait(launch.start(extended, words, sabotage=sabotage)) == [-signal.SIGKILL]
    assert resumed(extended, out) == 0, launch.said(extended)
    assert_the_same(extended, out, "longer", last=10)


def test_a_run_that_is_under_way_is_extended_too(extended):
    """Its rates are those of one that was extended at its end. (Groups that wait are not dropped in
    between: the level goes on.)"""
    sabotage = functools.partial(at_call, "train.learn", 7, die)
    assert began(extended, "early", sabotage, **SEQUENTIAL) == -signal.SIGKILL
    assert resumed(extended, "early", *LONGER) == 0, launch.said(extended)
    rows, others = (without_time(extended / out / "metrics.jsonl") for out in ("early", "longer"))
    assert [row["lr"] for row in rows] == [row["lr"] for row in others]


def test_a_second_extension_leaves_the_first_as_it_is(extended):
    """The rate of an update that a first extension added jumped where a second one came early."""
    shutil.copytree(extended / "not longer", extended / "twice longer")
    kill = functools.partial(at_call, "parts.optimizer.Learner.step", 5, die)
    words = ["--resume", "twice longer", "--updates", "4", "6", "--save-every", "1"]
    assert launch.wait(launch.start(extended, words, sabotage=kill)) == [-signal.SIGKILL]
    assert resumed(extended, "twice longer", "--updates", "4", "8") == 0, launch.said(extended)
    rates = [row["lr"] for row in without_time(extended / "twice longer/metrics.jsonl")]
    assert rates[8:] == pytest.approx([0.01, 0.005] * 2)


@pytest.mark.parametrize("updates", [(4, 3), (5, 9), (9,), (4, 4, 9)])
def test_only_the_last_level_can_be_extended(extended, updates):
    before = (extended / "not longer/config.json").read_bytes()
    assert resumed(extended, "not longer", "--updates", *map(str, updates)) == 2
    words = "with --resume it extends the last level" if len(updates) < 3 else "there are 3 levels"
    assert words in launch.said(extended)
    assert (extended / "not longer/config.json").read_bytes() == before
    assert resumed(extended, "not longer", "--updates", "4", "4") == 0  # nothing changes
    assert (extended / "not longer/config.json").read_bytes() == before


def test_an_extension_that_is_refused_cuts_no_log(extended):
    """Without a checkpoint all lines were lost."""
    sabotage = functools.partial(at_call, "train.learn", 5, die)
    assert began(extended, "refused", sabotage, **SEQUENTIAL, save_every=0) == -signal.SIGKILL
    before = [(extended / "refused" / name).read_bytes() for name in LOGS]
    assert resumed(extended, "refused", "--updates", "4", "3") == 2
    assert "it extends the last level" in launch.said(extended)
    assert [(extended / "refused" / name).read_bytes() for name in LOGS] == before


def test_an_extension_leaves_the_config_that_it_was_given():
    """The list in it grew, so that the old config was the new one."""
    state = LevelState(1, level(updates=9), None, None, Buffer())
    longer = SimpleNamespace(levels=[state], cfg=SimpleNamespace(tokens=None))
    config = {"levels": [{"updates": 4}], "extended_after": [2]}
    assert extend(longer, config)["extended_after"] == state.extended_after == [2, 4]
    assert config["extended_after"] == [2]


def test_a_refused_extension_is_not_written_down(extended):
    """config.json had the larger budget, though a log had lost lines."""
    out = extended / "lost"
    shutil.copytree(extended / "longer", out)
    truncate(out / "metrics.jsonl")
    before = (out / "config.json").read_bytes()
    assert resumed(extended, "lost", "--updates", "4", "9") == 2
    assert "lines were lost" in launch.said(extended)
    assert (out / "config.json").read_bytes() == before


# ------------------------------------------------------------------------------------- refusals


def test_two_processes_cannot_write_to_one_run(workshop):
    """The second would cut the first's logs, or take a checkpoint that is being deleted."""
    out = "busy"
    sabotage = functools.partial(slow, "infra.run.Run.write", 0.9)
    flags = words(**{**FLAGS, "out": out, "save_every": 1, "keep_checkpoints": 1})
    (first,) = launch.start(workshop, flags, sabotage=sabotage)
    while not (workshop / out / "config.json").exists():
        time.sleep(0.05)
    (workshop / "elsewhere").mkdir()
    refused = 0
    while first.is_alive() and refused < 3:
        (second,) = launch.start(workshop / "elsewhere", ["--resume", workshop / out])
        assert launch.wait([second]) == [2]
        refused += "another process is writing" in launch.said(workshop / "elsewhere")
    assert refused == 3 and launch.wait([first]) == [0], launch.said(workshop)
    assert checkpoints(workshop, out) == ["000008"]
    assert_the_same(workshop, out)


def test_flags_that_change_the_result_are_refused_and_those_of_memory_are_not(workshop):
    shutil.copytree(workshop / "whole", workshop / "flags")
    assert resumed(workshop, "flags", "--lr", "0.1") == 2
    assert "--lr is not one that may differ" in launch.said(workshop)
    memory = ["--slots", "9", "--micro-batch-tokens", "100", "--recompute"]
    assert resumed(workshop, "flags", *memory) == 0


def test_inputs_that_changed_are_refused(workshop):
    shutil.copytree(workshop / "whole", workshop / "inputs")
    data = workshop / "p.jsonl"
    before = data.read_text()
    try:
        data.write_text(before + '\n{"problem": "new", "answer": 1, "pass_rate": 0.5}')
        assert resumed(workshop, "inputs") == 2
        assert "p.jsonl is gone, or is not what it was" in launch.said(workshop)
        data.unlink()
        assert resumed(workshop, "inputs") == 2
        assert "p.jsonl is gone, or is not what it was" in launch.said(workshop)
    finally:
        data.write_text(before)


class Image:
    """Of a data set. Its text is another one in every process."""

    def __repr__(self):
        return f"<at {os.getpid()}>"


def with_a_hub(folder, newest, rows, kill=False):
    """A hub of one data set, and of one model that has a new revision every day."""

    def snapshot_download(name, revision, allow_patterns):
        assert name == "o/m"
        return folder / (revision or newest)

    datasets = SimpleNamespace(load_dataset=lambda name, split, revision: rows)
    sys.modules["datasets"] = datasets
    policies.snapshot_download = snapshot_download
    if kill:
        at_call("train.learn", 5, die)


@pytest.mark.parametrize("changes", [{"save_every": 0}, {"lora_rank": 2}], ids=str)
def test_what_comes_from_the_hub_is_what_it_was(workshop, changes):
    """Data and model of the hub alone: no file is read that could be checked. The model of today is
    another than that of yesterday, and one row of the data as well."""
    shutil.copytree(workshop / "toy", workshop / "yesterday")
    shutil.copytree(workshop / "toy", workshop / "today")
    flip(workshop / "today/model.safetensors")
    rows = [json.loads(line) for line in (workshop / "p.jsonl").read_text().splitlines()]
    rows[0]["image"] = Image()
    flags = {"model": "o/m", "data": "o/d:train", "eval_data": "o/d:test", "reward": "math"}
    flags |= {"filter": "all"} | changes
    hub = functools.partial(with_a_hub, workshop, "yesterday")
    assert began(workshop, "hub whole", functools.partial(hub, rows), **flags) == 0
    assert began(workshop, "hub", functools.partial(hub, rows, kill=True), **flags) < 0
    other = [rows[0] | {"answer": "2"}, *rows[1:]]
    source = [rows[0] | {"source": "another"}, *rows[1:]]  # a reward may read it
    for some, code in ((other, 2), (source, 2), (rows, 0)):
        sabotage = functools.partial(with_a_hub, workshop, "today", some)
        processes = launch.start(workshop, ["--resume", "hub"], sabotage=sabotage)
        assert launch.wait(processes) == [code], launch.said(workshop)
        assert ("--data is gone, or is not what it was" in launch.said(workshop)) == (code == 2)
    assert_the_same(workshop, "hub", "hub whole")
    shutil.rmtree(workshop / "yesterday")
    shutil.rmtree(workshop / "today")


def test_a_helper_of_the_reward_that_changed_is_refused(workshop):
    """The reward would be another one, though its own file is what it was."""
    (workshop / "with_helper.py").write_text("from reward_helper import even")
    (workshop / "reward_helper.py").write_text(EVEN)
    assert began(workshop, "helped", reward="with_helper.py:even") == 0, launch.said(workshop)
    assert resumed(workshop, "helped") == 0
    (workshop / "reward_helper.py").write_text("raise SystemExit('it must not be executed')")
    assert resumed(workshop, "helped") == 2
    assert "reward_helper.py is gone, or is not what it was" in launch.said(workshop)


def test_a_folder_that_is_no_run_is_refused(workshop):
    (workshop / "empty").mkdir()
    for name in ("nowhere", "empty", "toy"):
        assert resumed(workshop, name) == 2 and "is not that of a run" in launch.said(workshop)
    assert not (workshop / "nowhere").exists() and not list((workshop / "empty").iterdir())


def test_config_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a crash of the machine a run would be there whose flags are an empty file."""
    out, forced = tmp_path / "run", []

    def force(*paths):
        forced.append(([path.name for path in paths], (out / "config.json").exists()))

    monkeypatch.setattr("infra.directory.force_to_disk", force)
    create(out, {})
    (names, early), last = forced
    assert names[0] == "config.json" and not early and last == ([tmp_path.name], True)
    RunDirectory(out, SimpleNamespace(first=True)).replace_config({})
    assert [names for names, _ in forced[2:]] == [["config.part"], ["run"]]


@pytest.mark.parametrize("log", LOGS)
def test_a_log_that_lost_lines_is_refused_and_the_others_stay(tmp_path, log):
    (tmp_path / "config.json").write_text("{}")
    for name in LOGS:
        (tmp_path / name).write_text("0123456789")
    directory = RunDirectory(tmp_path, SimpleNamespace(first=True))
    (tmp_path / log).write_text("01234")
    with pytest.raises(ValueError, match=f"{log}: 5 bytes, .* lines were lost"):
        directory.cut_logs(dict.fromkeys(LOGS, 6))
    assert [len((tmp_path / name).read_text()) for name in LOGS if name != log] == [10, 10]
    directory.cut_logs({LOGS[0]: 4})
    assert [(tmp_path / name).read_text() for name in LOGS] == ["0123", "", ""]


@pytest.mark.parametrize("kl_coef, damage, code", [(0.1, flip, 2), (0, Path.unlink, 0)])
def test_the_starting_policy_of_a_kl_term_must_be_the_same(workshop, kl_coef, damage, code):
    """Another one would be another penalty, without a word. Without the term it may be gone."""
    model, sabotage = workshop / "start", functools.partial(at_call, "train.learn", 5, die)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(workshop / "toy", model)
    assert began(workshop, "kl", sabotage, kl_coef=kl_coef, model="start") == -signal.SIGKILL
    damage(model / "model.safetensors")
    assert resumed(workshop, "kl") == code, launch.said(workshop)
    refused = "model.safetensors is gone, or is not what it was" in launch.said(workshop)
    assert refused == (code == 2)


def test_the_choice_of_kernels_is_kept(workshop):
    """A clock decided it once; a second decision might be another, and change bits."""
    path = workshop / "whole/config.json"
    assert set(json.loads(path.read_text())["kernels"]) == {"linear", "packed"}
    sabotage = functools.partial(
        at_call, "parts.kernels.probe", 1, functools.partial(fail, Stop(""))
    )
    shutil.copytree(workshop / "whole", workshop / "kernels")
    processes = launch.start(workshop, ["--resume", "kernels"], sabotage=sabotage)
    assert launch.wait(processes) == [0], launch.said(workshop)


def test_from_another_folder(workshop, tmp_path):
    """config.json holds paths that mean the same everywhere."""
    assert began(workshop, "far", functools.partial(at_call, "train.learn", 5, die)) < 0
    assert launch.wait(launch.start(tmp_path, ["--resume", workshop / "far"])) == [0]
    assert_the_same(workshop, "far")
