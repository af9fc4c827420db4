"""The branches for a GPU, executed on a pretended card: see pretend_cuda.py."""

import shutil
from types import SimpleNamespace

import pretend_cuda
import torch
from conftest import lines, random_model, write_lines
from launch import said, start, wait
from pytest import fixture, mark, param
from test_resume import EVEN

import rollout
from model import Transformer
from policy import learner as learners
from policy.learner import Learner
from policy.packed import joined_bytes, packed
from run.processes import Ranks

FLAGS = """--model toy --data p.jsonl --eval-data p.jsonl --reward r.py:even --group-size 4
--buffer-groups 2 --prompts 3 --max-new-tokens 8 --updates 2 --lr 1e-3 --length-weight 0
--device cuda --quality 1"""


@fixture(scope="module")
def workshop(tmp_path_factory, toy_folder):
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(toy_folder, folder / "toy")
    rows = [{"id": str(i), "problem": str(i), "answer": "1", "pass_rate": 0.5} for i in range(12)]
    write_lines(folder / "p.jsonl", rows)
    (folder / "r.py").write_text(EVEN)
    return folder


def watch():
    """The host waits once a decoded step, for the tokens."""
    pretend_cuda.install()
    advance, decode = rollout.Slots.advance, rollout.Slots.decode

    def waiting(method, expected, slots, *arguments):
        pretend_cuda.happened.clear()
        captured = slots.captured
        method(slots, *arguments)
        if captured is slots.captured:  # else a graph was captured
            assert pretend_cuda.happened == expected

    rollout.Slots.advance = lambda *a: waiting(advance, ["tolist"], *a)
    rollout.Slots.decode = lambda *a: waiting(decode, ["replay"], *a)


def full():
    """Memory runs out while a graph of more than 8 rows is captured."""
    pretend_cuda.install()
    real = rollout.Slots.forward

    def forward(slots):
        if pretend_cuda.capturing and len(slots.running) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(slots)

    rollout.Slots.forward = forward


def run(folder, flags, sabotage=watch, world=1):
    name = flags.replace(" ", "")
    codes = wait(start(folder, f"{FLAGS} {flags} --out={name}", world, sabotage), 200)
    assert codes == [0] * world, said(folder)
    return lines(folder / name / "metrics.jsonl")


SETTINGS = "", "--lora-rank 2", "--kl-coef 0.1 --dtype float32", "--fsdp"


@mark.parametrize("flags", [SETTINGS[0], *(param(f, marks=mark.slow) for f in SETTINGS[1:])])
def test_a_gpu_trains_and_samples_one_policy(workshop, flags):
    """A tensor that was made on the CPU, a step that waits twice, a graph that reads the host."""
    rows = run(workshop, f"--dtype bfloat16 {flags}", world=1 + ("fsdp" in flags))
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)


@mark.slow
def test_a_graph_that_memory_does_not_hold_is_captured_for_fewer_slots(workshop):
    run(workshop, "--slots 16 --dtype bfloat16", full)
    assert "at most 8 slots from now on" in said(workshop)


# --------------------------------------------------------------------------- parts, in a child too


def main(names):
    pretend_cuda.install()
    globals()[names[0]]()


@mark.parametrize("part", ["attention", "memory"])
def test_parts(workshop, part):
    assert wait(start(workshop, part, program="test_gpu")) == [0], said(workshop)


def on_card(dtype=torch.float32):
    random_model("qwen2", dtype, num_hidden_layers=1).save_pretrained("m")
    return Transformer.from_pretrained("m", dtype, "cuda")


@torch.inference_mode()
def attention():
    """Decoding reads what each row has filled: one token less, or more, are other logits. Keys are
    copied to every head where only a slow kernel would do without. A norm is a single kernel:
    the two of a CPU would read and write the hidden states twice."""
    copies, copy = [], torch.Tensor.repeat_interleave
    torch.Tensor.repeat_interleave = lambda *a: copies.append(1) or copy(*a)
    for dtype, close, copied in ((torch.bfloat16, 0.03, False), (torch.float32, 1e-5, True)):
        model = on_card(dtype)
        ids, filled = torch.randint(0, 97, (8, 40)).to("cuda"), torch.arange(3, 35, 4).to("cuda")
        expected = model(ids)[range(8), filled.tolist()]
        assert bool(copies) == copied
        norm, x = model.model.norm, model.model.embed_tokens(ids)
        assert torch.equal(norm(x), torch.nn.RMSNorm.forward(norm, x))
        cache, rows = rollout.KVCache(model, 8, 40), torch.arange(8).to("cuda")
        cache.fit(40)
        positions = torch.arange(40).to("cuda").expand(8, -1)
        model(ids, positions, cache.prefilling(positions, rows))
        later = torch.arange(cache.room).to("cuda") >= filled[:, None]
        for x in cache.k + cache.v:
            x.masked_fill_(later[:, None, :, None], 9.0)
        assert copies and cache.reads_filled == (dtype == torch.bfloat16)
        token = ids.gather(1, filled[:, None])
        found = model(token, filled[:, None], cache.decoding(filled[:, None]))[:, 0]
        assert (found - expected).abs().max() < close * expected.abs().max()
        copies.clear()
    torch.cuda.get_device_capability = lambda _: (7, 5)  # a T4 has no such kernel
    assert not rollout.KVCache(on_card(torch.bfloat16), 8, 40).reads_filled


def memory():
    """Weights are joined where their copies fit. Once memory is full, layers are computed twice;
    then micro-batches are halved. Under FSDP, which cannot begin a step anew, layers are computed
    twice from the start on a GPU."""
    model = on_card()
    learner = Learner(model, Ranks())
    for room, joined in ((4, True), (3, False)):
        with packed(model, 8, room * joined_bytes(model)):
            assert ("project" in vars(model.model.layers[0].mlp)) == joined
    for again, tokens in ((False, 8192), (True, 8192), (True, 4096)):
        assert (learner.model.model.recompute, learner.most_tokens) == (again, tokens)
        learner.use_less_memory(torch.OutOfMemoryError())
    learners.shard = lambda model, ranks: model
    for model in (on_card(), random_model()):
        body = Learner(model, SimpleNamespace(sharded=True)).model.model
        assert body.recompute == (model.device.type == "cuda")
