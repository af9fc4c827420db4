"""Whatever ends a run, and wherever: `--resume` goes on as if nothing had happened, bit for bit."""

import io
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import launch
from conftest import lines, read, write_lines
from launch import at, at_event, die, fail, full_disk, said, start, tell, wait
from pytest import fixture, mark, raises

import rewards
from common.files import Stop
from policy import attempt, memory
from run.checkpoints import LOGS, cut_logs, write_checkpoint
from run.processes import set_up_output

pytestmark = mark.slow

# Two levels, a surplus that waits for the next update, two passes of two steps, evaluations and
# checkpoints in between.
FLAGS = """--model toy --data p.jsonl --eval-data p.jsonl --reward r.py:even --group-size 4
--buffer-groups 2 --prompts 5 --max-new-tokens 8 --updates 4 --inner-epochs 2 --lr 1e-2 --warmup 2
--device cpu --length-weight 0.3 --eval-every 2 --save-every 2 --schedule interleaved"""
UPDATES = 8
EVEN = """
def even(problem, response):
    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
"""


@fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    """A folder with a model, problems, a reward, and a run, `whole`, that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(toy_folder, folder / "toy")
    rows = []
    for i, c in enumerate("0123456789abcdefghij"):
        row = {"id": f"p{i}", "problem": c, "answer": "1", "pass_rate": [0.5, 0.1][i % 2]}
        rows.append(row | {"level": i % 3})
    write_lines(folder / "p.jsonl", rows)
    (folder / "r.py").write_text(EVEN)
    assert began(folder, "twice", partial(at_event, None, None)) == 0
    (folder / "events").write_text(re.search(r"(\d+) events", said(folder))[1])
    assert began(folder, "whole") == 0, said(folder)
    assert_the_same(folder, "twice")
    return folder


def began(folder, out, sabotage=None, flags="", world=1):
    """Start the run `out`; -> its exit code, -9 if it was killed."""
    shutil.rmtree(folder / out, ignore_errors=True)
    return wait(start(folder, f"{FLAGS} {flags} --out '{out}'", world, sabotage))[0]


def killed(folder, out, where, call, flags=""):
    """Start the run `out`, which is killed at a call."""
    assert began(folder, out, at(where, call, die), flags) == -SIGKILL


def copied(folder, run, out):
    return shutil.copytree(folder / run, folder / out)


def resumed(folder, out, flags="", sabotage=None):
    return wait(start(folder, f"--resume '{out}' {flags}", sabotage=sabotage))[0]


def refused(folder, out, message, flags="", sabotage=None):
    assert resumed(folder, out, flags, sabotage) == 2 and message in said(folder)


def goes_on(folder, out, flags="", sabotage=None):
    assert resumed(folder, out, flags, sabotage) == 0, said(folder)


def ends_the_same(folder, out, whole="whole"):
    goes_on(folder, out)
    assert_the_same(folder, out, whole)


def without_time(path):
    rows = lines(path)
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
    states = [read(path / last / "state.json") for path in (one, other)]
    assert states[0].pop("log_sizes") and states[1].pop("log_sizes") and states[0] == states[1]
    assert not (one / "checkpoint.part").exists()


def checkpoints(folder, out):
    return sorted(p.name for p in (folder / out / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ kills


WAITING = """
import asyncio, os, signal, time
from pathlib import Path

def end(number, problem):
    if problem["id"] in ("p5", "p6") and not os.path.exists(str(number)):
        open(str(number), "x").close()
        os.kill(os.getpid(), number)
        time.sleep(30)
def even(response):
    time.sleep(0.002)
    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
def killed(problem, response):
    end(9, problem)
    return even(response)
async def interrupted(problem, response):
    if problem["id"] in ("p5", "p6") and not os.path.exists("2"):
        open("2", "x").close()
        os.kill(os.getpid(), 2)
        await asyncio.sleep(30)
    return even(response)
"""


def one_worker():
    rewards.MOST_CALLS = 1


@mark.parametrize("name, code", [("killed", -SIGKILL), ("interrupted", 128 + SIGINT)])
def test_an_end_while_rewards_wait_changes_nothing(workshop, name, code):
    """With 16 threads or tasks that end in any order. Ctrl-C does not wait for the judge."""
    (workshop / "waiting.py").write_text(WAITING)
    flags, begin = f"--reward waiting.py:{name}", time.monotonic()
    assert began(workshop, name, flags=flags) == code, said(workshop)
    assert time.monotonic() - begin < 25
    goes_on(workshop, name)
    assert began(workshop, "waited", one_worker, flags=flags) == 0
    assert_the_same(workshop, name, "waited")


@mark.parametrize("share", [0.02, 0.15, 0.29, 0.41, 0.57, 0.68, 0.83, 0.97])
def test_a_kill_at_any_moment_changes_nothing(workshop, share):
    """State that lives in memory alone; a file that is trusted though it is half written."""
    event = int(share * int((workshop / "events").read_text()))
    assert began(workshop, "killed", partial(at_event, event, die)) == -SIGKILL
    ends_the_same(workshop, "killed")


@mark.parametrize(
    "where, call",
    [
        ("policy.checkpoint.Policy.save", 2),  # within the second checkpoint
        ("run.checkpoints.checkpoints", 3),  # after the rename
        ("run.state.save_file", 4),  # the last checkpoint
    ],
)
def test_a_kill_around_a_checkpoint_changes_nothing(workshop, where, call):
    """Writing one takes few events; so these moments are looked for."""
    killed(workshop, "killed", where, call)
    ends_the_same(workshop, "killed")


def test_what_a_kill_leaves_half_written_is_cut_off(workshop):
    """A torn line of a log; a torn file of a checkpoint that was never renamed."""
    killed(workshop, "torn", "train.learn", 6)
    for log in LOGS:
        with open(workshop / "torn" / log, "a") as file:
            file.write('{"update": 5, "le')
    part = copied(workshop, "torn/checkpoints/000004", "torn/checkpoint.part")
    flip(part / "model.safetensors")
    ends_the_same(workshop, "torn")


@mark.parametrize(
    "flags",
    [
        "--dtype bfloat16 --save-every 0",
        "--kl-coef 0.1 --schedule sequential",
        "--filter all --lr-decay cosine --prompts 9",
        "--eval-data p.jsonl q.jsonl --eval-samples 2",
        "--lora-rank 2 --kl-coef 0.1",
        "--lora-rank 2 --dtype bfloat16",
        "--lora-rank 2 --dtype bfloat16 --save-every 0",
    ],
)
def test_a_kill_changes_nothing_under_other_settings(workshop, flags):
    """float32 masters, no checkpoint, the starting policy of the KL term, a stale surplus, several
    held-out files, factors that are drawn anew."""
    shutil.copy(workshop / "p.jsonl", workshop / "q.jsonl")
    assert began(workshop, "settled", flags=flags) == 0, said(workshop)
    killed(workshop, "killed", "policy.learner.Learner.step", 22, flags)
    ends_the_same(workshop, "killed", "settled")


# ---------------------------------------------------------------------------------------- damages


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_checkpoints_hold_no_pickle_and_only_the_newest_are_kept(workshop):
    assert checkpoints(workshop, "whole") == ["000006", "000008"]
    endings = {path.suffix for path in (workshop / "whole/checkpoints/000008").iterdir()}
    assert endings <= {".json", ".safetensors", ".jinja"}


@mark.parametrize(
    "where, call, error, message",
    [
        ("run.state.save_file", 3, "whole/checkpoints/000008/model.safetensors", "int 000006"),
        ("train.learn", 5, "full/completions.jsonl", "completions.jsonl cannot be written"),
        # The disk was full for a line, and then had room for a checkpoint.
        ("run.log.append", 15, Stop("no room"), "no room"),
        # tokenizers raises a bare Exception.
        (
            "policy.checkpoint.GenerationConfig",
            3,
            Exception("No space left"),
            "written (No space left)",
        ),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    workshop, where, call, error, message
):
    action = full_disk if isinstance(error, str) else fail
    assert began(workshop, "full", at(where, call, partial(action, error))) == 1
    assert message in said(workshop) and "Traceback" not in said(workshop)
    assert "000004" in checkpoints(workshop, "full")
    assert not (workshop / "full/checkpoint.part").exists()
    ends_the_same(workshop, "full")


# ---------------------------------------------------------------------------------------- signals


TOLD = """
train.evaluate_held_out 1 0 SIGINT - dropped
rollout.choose 66 5 SIGTERM - in a rollout: its update is dropped
train.accumulate_gradient 6 2 SIGINT - while learning: it is finished
policy.learner.Learner.step 12 3 SIGTERM - while learning
run.state.save_file 2 4 SIGINT - in a checkpoint
train.summarise 8 6 SIGTERM - between the evaluations of two levels
"""


@mark.parametrize("where", TOLD.strip().splitlines())
def test_a_signal_saves_a_whole_update_and_the_rest_follows(workshop, where):
    """Sampling is not waited for, an update that learns is: no weights between two updates."""
    where, call, update, name, *_ = where.split()
    update, number = int(update), getattr(signal, name)
    assert began(workshop, "told", at(where, int(call), partial(tell, number))) == 128 + number
    assert "interrupted; --resume" in said(workshop)
    assert checkpoints(workshop, "told")[-1] == f"{update:06d}"
    assert len(without_time(workshop / "told/metrics.jsonl") if update else []) == update
    ends_the_same(workshop, "told")


@mark.parametrize("world, number", [(1, SIGTERM), (2, SIGINT)])
def test_a_signal_ends_a_long_rollout_within_seconds(workshop, world, number):
    """Completions of 100 tokens that take a second each: to wait for one would take minutes."""
    out = f"slow{world}"
    command = f"{FLAGS} --max-new-tokens 100 --eval-every 0 --out {out}"
    processes = start(workshop, command, world, partial(slow, "rollout.choose", 1))
    deadline = time.monotonic() + 60
    while not (workshop / out).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    begin = time.monotonic()
    for process in processes:
        os.kill(process.pid, number)
    assert wait(processes) == [128 + number] * world, said(workshop)
    assert time.monotonic() - begin < 5
    assert checkpoints(workshop, out) == ["000000"]


def slow(where, seconds):
    """Every call takes some seconds longer."""
    owner, name = launch.find(where)
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: time.sleep(seconds) or original(*a, **k))


# ------------------------------------------------------------------------------- large checkpoints

SMALL_PARTS = 4000  # bytes; the model has about 40,000


# ------------------------------------------------------------------------------------- refusals


def test_two_processes_cannot_write_to_one_run(workshop):
    """The second would cut the first's logs, or take a checkpoint that is being deleted."""
    command = f"{FLAGS} --save-every 1 --keep-checkpoints 1 --out busy"
    (first,) = start(workshop, command, sabotage=partial(slow, "run.state.save_file", 0.9))
    while not (workshop / "busy/config.json").exists():
        time.sleep(0.05)
    (workshop / "elsewhere").mkdir()
    times = 0
    while first.is_alive() and times < 3:
        assert resumed(workshop / "elsewhere", workshop / "busy") == 2
        times += "another process is writing" in said(workshop / "elsewhere")
    assert times == 3 and wait([first]) == [0], said(workshop)
    assert checkpoints(workshop, "busy") == ["000008"]
    assert_the_same(workshop, "busy")


def test_flags_that_change_the_result_are_refused_and_those_of_memory_are_not(workshop):
    copied(workshop, "whole", "flags")
    refused(workshop, "flags", "--lr is not one that may differ", "--lr 0.1")
    goes_on(workshop, "flags", "--slots 9 --save-every 3")


def test_inputs_that_changed_are_refused(workshop):
    copied(workshop, "whole", "inputs")
    data = workshop / "p.jsonl"
    before = data.read_text()
    try:
        data.write_text(before + '{"problem": "new", "answer": 1, "pass_rate": 0.5}')
        refused(workshop, "inputs", "--data is not what it was")
        data.unlink()
        refused(workshop, "inputs", "p.jsonl: cannot be read")
    finally:
        data.write_text(before)


def test_a_slice_and_a_template_are_resumed_from_any_folder(workshop):
    """Neither name is that of a file as it stands on the command line, or where one resumes."""
    template = workshop / "t.jinja"
    template.write_text("{% for turn in messages %}{{ turn['content'] }}={% endfor %}")
    killed(workshop, "part", "train.learn", 4, "--data p.jsonl[:12] --template t.jinja --updates 2")
    config = read(workshop / "part/config.json")
    assert config["data"] == f"{workshop / 'p.jsonl'}[:12]" and sum(config["problems"]) == 12
    folder = workshop / "another"
    folder.mkdir()
    before = template.read_text()
    template.write_text("{{ messages[0]['content'] }}")
    refused(folder, workshop / "part", "--template is not what it was")
    template.write_text(before)
    goes_on(folder, workshop / "part")
    (saved,) = (workshop / "part/checkpoints").glob("000004/chat_template.jinja")
    assert saved.read_text() == before


def less_memory():
    """Also write down the slots: on some CPUs few rows have the same bits as many."""
    memory.free_bytes = lambda device: 0
    original = attempt.sample

    def sample(*arguments, slots, **keywords):
        with open("slots", "a") as file:
            file.write(f"{slots} ")
        return original(*arguments, slots=slots, **keywords)

    attempt.sample = sample


def test_other_free_memory_changes_nothing(workshop):
    """A run that was resumed on a busier machine had fewer slots, and products of other rows have
    other last bits. Other slots must be asked for, and a line says what they cost."""
    flags = "--group-size 16 --prompts 9 --updates 2"
    assert began(workshop, "roomy", flags=flags) == 0
    killed(workshop, "busy", "train.learn", 3, flags)
    copied(workshop, "busy", "fewer")
    goes_on(workshop, "busy", sabotage=less_memory)
    assert_the_same(workshop, "busy", "roomy", 4)
    assert set((workshop / "slots").read_text().split()) == {"144", "20"}  # as many as completions
    goes_on(workshop, "fewer", "--slots 8", less_memory)
    assert (workshop / "slots").read_text().split()[-1] == "8"
    assert "--slots: not [256, 256] as before, so the last bits may differ" in said(workshop)


@mark.parametrize("log", LOGS)
def test_a_log_that_lost_lines_is_refused_and_the_others_stay(tmp_path, log):
    (tmp_path / "config.json").write_text("{}")
    for name in LOGS:
        (tmp_path / name).write_text("0123456789")
    (tmp_path / log).write_text("01234")
    with raises(ValueError, match=f"{log}: 5 bytes, .* lines were lost"):
        cut_logs(tmp_path, dict.fromkeys(LOGS, 6))
    assert [len((tmp_path / name).read_text()) for name in LOGS if name != log] == [10, 10]
    cut_logs(tmp_path, {LOGS[0]: 4})
    assert [(tmp_path / name).read_text() for name in LOGS] == ["0123", "", ""]


def test_without_a_checkpoint_the_logs_are_kept_beside(tmp_path):
    """Someone may have deleted checkpoints/ to free space: --resume emptied all that was left."""
    (tmp_path / "config.json").write_text("{}")
    texts = {".before": "minutes", ".before1": "weeks", ".before2": "hours"}
    for text in texts.values():  # the older ones stay, whatever their number
        for name in LOGS:
            (tmp_path / name).write_text(text)
        cut_logs(tmp_path, None)
    for name in LOGS:
        assert not (tmp_path / name).exists()
        for suffix, text in texts.items():
            assert (tmp_path / name).with_suffix(f"{suffix}.jsonl").read_text() == text


def test_a_run_killed_before_its_first_checkpoint_needs_the_same_start(workshop):
    """It would begin anew from other weights, without a word. What no run reads may change."""
    copied(workshop, "toy", "origin")
    killed(workshop, "early", "train.learn", 1, "--model origin --save-every 0")
    (workshop / "origin/README.md").write_text("changed")
    goes_on(workshop, "early")
    killed(workshop, "early", "train.learn", 1, "--model origin --save-every 0")
    flip(workshop / "origin/model.safetensors")
    refused(workshop, "early", "--model is not what it was")


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_its_name(workshop, monkeypatch):
    """A power cut left an empty newest checkpoint, or a log shorter than state.json says."""
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda d: events.append(os.readlink(f"/proc/self/fd/{d}")) or fsync(d)
    )
    monkeypatch.setattr(Path, "rename", lambda p, to: events.append(Path(to).name) or rename(p, to))
    out = copied(workshop, "whole", "synced")
    write_checkpoint(out, "000009", lambda folder: (folder / "model").write_text("1"), 2)
    forced = {Path(path).name for path in events[: events.index("000009")]}
    assert {"model", "checkpoint.part", *LOGS} <= forced


def test_what_a_terminal_cannot_spell_is_escaped(monkeypatch):
    """It ended a run in UnicodeEncodeError."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="latin-1"))
    set_up_output()
    print("é 漢")
    assert buffer.getvalue() == b"\xe9 \\u6f22\n"


@mark.parametrize("kl_coef, damage, code", [(0.1, flip, 2), (0, Path.unlink, 0)])
def test_the_starting_policy_of_a_kl_term_must_be_the_same(workshop, kl_coef, damage, code):
    """Another one would be another penalty, without a word. Without the term it may be gone."""
    shutil.rmtree(workshop / "start", ignore_errors=True)
    copied(workshop, "toy", "start")
    killed(workshop, "kl", "train.learn", 5, f"--kl-coef {kl_coef} --model start")
    damage(workshop / "start/model.safetensors")
    assert resumed(workshop, "kl") == code, said(workshop)
    message = "--model is not what it was"
    assert (message in said(workshop)) == (code == 2)
