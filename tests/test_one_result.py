"""One result, whatever the machine: no setting of memory, slots, micro-batches or processes changes
it.

In float64 settings differ by rounding of 1e-15, so a real difference cannot hide, and no sampled
token flips.
"""

import copy
import os
import shutil
import subprocess
import sys
from functools import partial
from signal import SIGKILL, SIGTERM
from types import SimpleNamespace

import launch
import numpy as np
import torch
from conftest import random_model, read
from launch import at, fail, said, start, wait
from pytest import approx, fixture, mark
from safetensors.torch import load_file
from test_resume import without_time
from test_rollout import sampled
from test_train import a_run, level

import model
from model import log_softmax
from policy import learner as learners
from policy.learner import Learner, cut_micro_batches
from rollout import stream_key, uniforms
from run import inputs
from run import processes as ranks
from run.config import Config
from run.processes import Ranks
from train import PEAKS, SUMS, accumulate_gradient, minibatches

pytestmark = mark.slow

# Every second group is dropped, so surplus waits and draws are repeated. Of four processes one has
# no prompt of three, and in an update's first step, on one group, no sample of three.
FLAGS = """--model toy --data p.jsonl --eval-data p.jsonl --reward r.py:some --group-size 3
--buffer-groups 3 --prompts 3 --max-new-tokens 8 --updates 3 --quality 1 --inner-epochs 2 --lr 1e-3
--warmup 2 --device cpu --length-weight 0.3 --kl-coef 0.05 --dtype float64 --eval-every 2
--eval-samples 3 --save-every 2"""
REWARD = """
import time

def some(problem, response):
    share = sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
    return 1 if int(problem['id']) % 2 else share

def late(problem, response):
    if problem['id'] in ('3', '11'):
        time.sleep(60)
    return some(problem, response)

def raises(problem, response):
    import os
    return 1 / (os.environ['RANK'] == '0')
"""


@fixture(scope="module")
def workshop(tmp_path_factory, tokenizer):
    """A folder with a Qwen3 whose embedding is its head, problems, and a reward."""
    folder = tmp_path_factory.mktemp("one_result")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"num_hidden_layers": 2, "head_dim": 8, "vocab_size": len(tokenizer)}
    model = random_model("qwen3", tie_word_embeddings=True, **sizes, **ids)
    model.save_pretrained(folder / "toy")
    tokenizer.save_pretrained(folder / "toy")
    row = '{"id": "%d", "problem": "%d", "answer": "1", "pass_rate": 0.5}\n'
    (folder / "p.jsonl").write_text("".join(row % (i, i) for i in range(20)))
    (folder / "r.py").write_text(REWARD)
    return folder


def ended(folder, setting, out, sabotage=None):
    """Train under a setting, "PROCESSES --flag value ..." -> exit codes"""
    world, _, flags = setting.partition(" ")
    return wait(start(folder, f'{FLAGS} {flags} --out "{out}"', int(world), sabotage), 60)


def run(folder, setting, sabotage=None):
    """The folder of a run under this setting; tests share it."""
    if not (folder / setting).exists():
        flags = setting.replace(" small", "")
        sabotage = sabotage or (small if flags != setting else None)
        assert not any(ended(folder, flags, setting, sabotage)), said(folder)
    return folder / setting


def resume(folder, out, world, flags=""):
    assert not any(wait(start(folder, f"--resume '{out}' {flags}", world))), said(folder)


def assert_equal(one, other, tolerance=1e-9):
    """Tokens identical, metrics and weights to 1e-9."""
    assert (one / "completions.jsonl").read_bytes() == (other / "completions.jsonl").read_bytes()
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = [without_time(path / name) for path in (one, other)]
        for row, expected in zip(*rows, strict=True):
            for name, numbers in row.pop("means", {}).items():
                assert numbers == approx(expected["means"][name], abs=tolerance)
            expected.pop("means", None)
            assert row == approx(expected, abs=tolerance)
    files = sorted(path.name for path in (one / "checkpoints/000003").glob("*.safetensors"))
    assert len(files) == 2  # of the policy and of the optimizer
    for name in files:
        tensors = [load_file(path / f"checkpoints/000003/{name}") for path in (one, other)]
        torch.testing.assert_close(*tensors, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------- memory and processes

SETTINGS = """1 --slots 8 small
1 --slots 9
2 small
2 --fsdp
2 --fsdp small
4
4 --fsdp"""


def small():
    """Little memory for a step: layers are computed again, and each completion stands alone."""
    learners.MICRO_BATCH_TOKENS = {"cpu": 1}
    body = model.Body.forward

    def forward(self, *arguments, **keywords):
        self.recompute = True
        return body(self, *arguments, **keywords)

    model.Body.forward = forward


@mark.parametrize("setting", SETTINGS.splitlines())
def test_memory_and_processes_change_nothing_over_three_updates(workshop, setting):
    """A denominator per process, a mean of means, a process that takes another branch or waits for
    one without samples, shared weights that are sharded as two."""
    assert_equal(run(workshop, setting), run(workshop, "1"))
    for row in without_time(workshop / "1/metrics.jsonl"):
        assert row["groups_kept"] == 3 and row["groups_all_right"] > 0  # else this would say little


def room_by_rank():
    inputs.slots_that_fit = lambda *_: 24 - 8 * int(os.environ["RANK"])


def test_slots_are_what_fits_on_every_process(workshop):
    """The process with the least memory would be full."""
    config = read(run(workshop, "2 --updates 1", room_by_rank) / "config.json")
    assert config["slots"] == [16]


LORA = "--lora-rank 2 --lr 1e-2"


@mark.parametrize("setting", ["1 --slots 8 small", "2", "2 --fsdp", "4 small"])
def test_factors_are_one_result_too(workshop, setting):
    """Factors of its own on every process, gradients of factors that are not summed, frozen weights
    that FSDP gives a gradient."""
    assert_equal(run(workshop, f"{setting} {LORA}"), run(workshop, f"1 {LORA}"))
    first, *_, last = without_time(workshop / f"1 {LORA}/metrics.jsonl")
    assert first["grad_norm"] > 0 and last["groups_kept"] == 3
    found = load_file(workshop / f"1 {LORA}/checkpoints/000003/adapter_model.safetensors")
    assert all(tensor.any() for tensor in found.values())  # B was 0, and has been learned


@mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_lower_precision_under_fsdp(workshop, dtype, tolerance):
    """FSDP frees weights and gathers them again; bfloat16 has float32
    masters, and gives its rounded copies to checkpoint and sampler."""
    flags = f"--dtype {dtype} --updates 1"
    one, two = (run(workshop, f"{n} {flags}") for n in ("1", "2 --fsdp"))
    norms = [without_time(path / "metrics.jsonl")[0]["grad_norm"] for path in (one, two)]
    assert norms[0] == approx(norms[1], rel=tolerance)
    state, expected = (
        load_file(p / "checkpoints/000001/optimizer.safetensors") for p in (two, one)
    )
    assert state.keys() == expected.keys()
    assert {x.dtype for x in state.values()} == {torch.float32}
    for name, weight in load_file(two / "checkpoints/000001/model.safetensors").items():
        assert str(weight.dtype) == f"torch.{dtype}"
        assert torch.equal(weight, state.get(f"master.{name}", weight).to(weight.dtype))


@mark.parametrize(
    "before, world, flags",
    [
        ("1", 2, "--fsdp"),
        ("2 --fsdp", 4, "--no-fsdp"),
        ("4 --fsdp", 1, "--no-fsdp"),
        ("2 --fsdp", 2, ""),
    ],
)
def test_any_number_of_processes_resumes_what_any_other_wrote(workshop, before, world, flags):
    """Checkpoints hold whole tensors, not shards. --fsdp need not be repeated; two processes that
    have it again go on bit for bit."""
    whole = run(workshop, before)
    out = shutil.copytree(whole, workshop / f"{before} resumed by {world}")
    shutil.rmtree(out / "checkpoints/000003")
    if not flags:
        assert wait(start(workshop, f"--resume '{out}'")) == [2]
        assert "--fsdp needs torchrun" in said(workshop)
    resume(workshop, out, world, flags)
    assert_equal(out, whole, 1e-9 if flags else 0)


# ------------------------------------------------------------------------- one process of several


@mark.parametrize(
    "where, call, number",
    [
        ("train.make_group", 4, SIGTERM),
        ("train.accumulate_gradient", 9, SIGKILL),
        ("train.accumulate_gradient", 6, SIGTERM),
    ],
)
def test_what_ends_one_process_ends_all_of_them(workshop, where, call, number):
    """None waits in vain for one that was killed or told to stop, and the run can be resumed."""
    out = f"{where} {call}"
    codes = ended(workshop, "2", out, at(where, call, partial(to_second, number)))
    if number == SIGKILL:
        assert codes[0] and codes[1] == -SIGKILL
    else:
        assert codes[0] > 128 and codes[1] == 128 + SIGTERM
        assert "interrupted; --resume" in said(workshop)
    resume(workshop, out, 2)
    assert_equal(workshop / out, run(workshop, "1"))


def to_second(number, original):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    return original()


def test_a_reward_that_is_late_is_late_on_all_processes(workshop):
    """One that knows the group as broken and one that waits for it would part for ever."""
    flags = "--reward r.py:late --reward-timeout 1 --prompts 20"
    one, two = (run(workshop, f"{world} {flags}") for world in (1, 2))
    assert_equal(one, two)
    rows = without_time(two / "metrics.jsonl")
    for name in ("reward_timeouts", "groups_broken"):  # the second update trains on a surplus
        assert [row[name] for row in rows] == [2, 0, 2]


ZERO = ZeroDivisionError("nobody expected this")
UNSAVED = at("run.state.pack", 1, partial(fail, ZERO))


@mark.parametrize(
    "flags, sabotage, code, words",
    [
        ("--reward r.py:raises", None, 1, "process 1: --reward r.py:raises"),
        ("", at("train.learn", 1, partial(fail, ZERO)), 1, "nobody expected this"),
        ("--fsdp", UNSAVED, 1, "checkpoint 000002 cannot be written (nobody expected this)"),
        ("--data none.jsonl", None, 2, "none.jsonl: cannot be read"),
    ],
)
def test_an_error_ends_all_processes_and_is_said(workshop, flags, sabotage, code, words):
    """A reward that raises on one process must not leave the other waiting. A process that leaves
    at once must not leave silently, or with code 0. What all processes find is said once."""
    assert ended(workshop, f"2 {flags}", words, sabotage) == [code, code]
    assert words in said(workshop)
    assert sabotage or "rror" not in said(workshop, 1)


@mark.parametrize(
    "where, phase", [("train.make_group", "sampling"), ("policy.learner.Learner.step", "learning")]
)
def test_a_gpu_without_memory_ends_all_processes(workshop, where, phase):
    """While one has left, others wait for its gradients; a common save would wait for ever."""
    codes = ended(workshop, "2", where, at(where, 1, out_of_memory))
    assert all(codes) and codes[1] == 1
    assert not any((workshop / where / "checkpoints").iterdir())
    for rank in (0, 1) if phase == "sampling" else (1,):  # sampling ends on all together
        assert "out of memory" in said(workshop, rank)
        assert "Traceback" not in said(workshop, rank)


def out_of_memory(original):
    """On the second process."""
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return original()


def test_torchrun_itself(workshop):
    """The command of the README, word for word but for its flags."""
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    command += f" {launch.ROOT / 'train.py'} --fsdp {FLAGS} --out torchrun"
    options = dict(cwd=workshop, capture_output=True, text=True, timeout=180)
    done = subprocess.run(command.split(), **options)
    assert done.returncode == 0, done.stderr
    assert_equal(workshop / "torchrun", run(workshop, "1"))
    assert done.stdout.count("held-out accuracy") == 1  # one voice


# --------------------------------------------------------------------------------------- sampling


def requests(n):
    """[(prompt, keys of its three completions)]"""
    return [
        ([5] * (1 + i % 7) + [9, i % 90], [stream_key(0, 1, i, k) for k in range(3)])
        for i in range(n)
    ]


def completed(model, work, slots=64):
    """-> {key: tokens}"""
    prompts, keys = map(list, zip(*work))
    limits, stops = [[40] * len(own) for own in keys], {3, 11, 40}
    done = sampled(model, prompts, keys, limits, slots=slots, stop_ids=stops, temperature=0.9)
    return {k: c.tokens for ks, cs in zip(keys, done) for k, c in zip(ks, cs)}


def test_sampling_is_a_function_of_its_key_alone():
    """In float64, token by token: any number of slots, any order of prompts, any batch mates."""
    model, work = random_model(dtype=torch.float64), requests(24)
    expected = completed(model, work)
    assert len({len(tokens) for tokens in expected.values()}) > 10  # so that slots are refilled
    for slots, order in ((13, work), (64, work[::-1]), (9, work[12:] + work[:12])):
        assert completed(model, order, slots) == expected
    assert expected | completed(model, work[5:7], 1) == expected  # alone


def first_differences(one, other, work, exact):
    """Of every first token that differs between two samplings: the distance of its random number to
    the nearest edge of the distribution function."""
    distances = []
    for prompt, keys in work:
        for key in keys:
            if one[key] == other[key]:
                continue
            # Else one goes on where the other stopped, and no token says why.
            t = [a != b for a, b in zip(one[key], other[key])].index(True)
            logits = exact(torch.tensor([prompt + one[key][:t]]))[0, -1]
            u = uniforms(np.array([key]), np.array([t], np.uint64))[0]
            distances.append((log_softmax(logits, 0.9).exp().cumsum(-1) - u).abs().min().item())
    return distances


@torch.no_grad()
def test_in_float32_a_token_flips_only_at_an_edge_of_its_distribution():
    """A flip in the middle of an interval would be another distribution, not another rounding."""
    model, exact, work = random_model(), random_model(dtype=torch.float64), requests(60)
    coarse = random_model()  # a machine that rounds much more coarsely
    for p in coarse.parameters():
        p *= 1 + 1e-5 * torch.randn(p.shape)
    expected = completed(model, work)
    distances = []
    for other in (completed(model, work[::-1], 8), completed(exact, work), completed(coarse, work)):
        distances += first_differences(expected, other, work, exact)
    assert distances and max(distances) < 1e-4


# --------------------------------------------------------------------------------------- learning


NOTHING = dict.fromkeys(SUMS + PEAKS, 0.0)


def gradient(model, samples, size=1, recompute=False, most_tokens=10**6):
    """The sum of what `size` processes contribute."""
    model = copy.deepcopy(model)  # a Learner may leave hooks on it
    learner = Learner(model, Ranks())
    learner.model.model.recompute, learner.most_tokens = recompute, most_tokens
    run = a_run(model, "--loss-norm token", learner=learner)
    run.ranks = SimpleNamespace(gather=lambda found: [found, [NOTHING]])
    for rank in range(size):
        learner.ranks = SimpleNamespace(rank=rank, size=size, sharded=False)
        accumulate_gradient(run, level(), samples)
    return torch.cat([master.grad.flatten() for master in learner.masters])


def test_micro_batches_have_one_prompt_and_stay_within_their_size():
    """Padding counts, and so does the prompt, once. A completion may be too long for any."""
    samples = [sample_of(prompt, length) for length in (9, 1, 2) for prompt in (3, 4)]
    samples += [sample_of(3, 9)]
    batches = cut_micro_batches(samples, 21)
    found = [[len(s.completion.tokens) for s in batch] for batch in batches]
    assert found == [[9, 9], [2, 1], [9], [2, 1]]
    assert [{len(s.group.prompt) for s in batch} for batch in batches] == [{3}, {3}, {4}, {4}]
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples))


def sample_of(prompt, length):
    group, completion = SimpleNamespace(prompt=[5] * prompt), SimpleNamespace(tokens=[9] * length)
    return SimpleNamespace(group=group, completion=completion)


def test_gradients_of_micro_batches_add_up_in_float32_masters():
    """The last micro-batch in place of the sum, or a sum in bfloat16, which has no 1 + 2^-9."""
    model = random_model().bfloat16()
    learner = Learner(model, Ranks())
    master = learner.masters[learner.names.index("model.norm.weight")]
    for value in (1.0, 2**-9):
        (value * model.model.norm.weight.sum()).backward()
    assert (master.grad == 1 + 2**-9).all()
    learner.drop_gradient()
    assert master.grad is None


def test_only_what_waits_for_sampling_waits_for_a_day(monkeypatch):
    """A day of patience with gradients would also switch off NCCL's own detection of hangs."""
    made = []
    for name in ("init_process_group", "new_group", "all_gather_object"):
        monkeypatch.setattr(ranks.dist, name, partial(note, made, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks("cuda").device.index == 0
    monkeypatch.delenv("LOCAL_RANK")  # as SLURM leaves it: one node
    made.clear()
    two = Ranks("cuda")
    assert two.device.index == 1
    two.gather(1)
    (_, backend, gradients), (_, patient, messages), (_, _, gather) = made
    assert backend == ("cpu:gloo,cuda:nccl",) and gradients["timeout"].total_seconds() <= 3600
    assert messages == {"backend": "gloo", "timeout": ranks.PATIENCE} and not patient
    assert gather == {"group": "new_group"}  # what new_group returned


def note(made, name, *arguments, **keywords):
    made.append((name, arguments, keywords))
    return name


def test_minibatches_are_a_function_of_seed_update_and_pass():
    """Without the shuffle, or with one order for all passes, a group would always meet the same
    others, and the same ones would always be on-policy."""
    groups = [[i] for i in range(9)]

    def passes(seed, update):
        steps = list(minibatches(Config(seed=seed, minibatches=2), 2, groups, update))
        assert [len(step) for step in steps] == [4, 5] * 2
        return [tuple(steps[0] + steps[1]), tuple(steps[2] + steps[3])]

    orders = [*passes(3, 5), *passes(3, 6), *passes(4, 5)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(range(9)), *orders}) == 7
    assert passes(3, 5) == orders[:2]
