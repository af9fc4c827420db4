"""LoRA: factors beside frozen weights, against autograd, the base alone and PEFT's own library."""

import gc
import math
import shutil
from pathlib import Path

import torch
from conftest import edit, families, files, random_model, read, spoil, table, write_lines
from pytest import approx, fixture, importorskip, mark, raises, skip
from test_rollout import gaps

import eval as evaluation
import train
from model import Transformer
from policy import lora
from policy.checkpoint import Policy
from policy.learner import Learner
from policy.packed import has_kernel, packed
from run import command
from run.processes import Ranks

FLAGS = """--model toy --data p.jsonl --reward r.py:even --group-size 4 --buffer-groups 2
--max-new-tokens 6 --updates 2 --lr 1e-2 --device cpu --lora-rank 2 --out run"""


def adapted(family="llama", dtype=torch.float32, **changes):
    """A model whose factors are all random: with B at 0 nothing would be seen of A."""
    model = random_model(family, dtype, **changes)
    lora.add(model, 3)
    for i, p in enumerate(lora.tensors(model).values()):
        p.copy_(0.13 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def write(model, folder):
    """The model's weights as a checkpoint, and its factors as the adapter of a run beside it."""
    base = random_model(model.config.model_type, model.lm_head.weight.dtype)
    base.load_state_dict(model.state_dict(), strict=False)
    base.save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    lora.save(model, folder / "adapter", str(folder / "base"), 3)
    return folder / "base", folder / "adapter"


def some_ids():
    return torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))


def logprob_sum(model):
    """A function of the log-probs of completions with a gradient that is not uniform."""
    ids, mask = some_ids(), torch.arange(20) < torch.tensor([[10], [11], [20]])
    logprob, _ = model.token_logprobs(torch.tensor([5, 6, 7]), ids, mask, 0.8)
    return (logprob * torch.linspace(-1, 2, 60).view(3, 20)).sum()


# ------------------------------------------------------------------------------------ the function


@mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_new_factors_change_no_bit(dtype):
    """A learner that starts elsewhere than the sampler's model was measured. A that is 0 too would
    never learn."""
    model, base = random_model("qwen2", dtype), random_model("qwen2", dtype)
    lora.add(model, 8, seed=3)
    with torch.no_grad():
        assert torch.equal(model(some_ids()), base(some_ids()))
    for layer in filter(lambda module: isinstance(module, lora.LoraLinear), model.modules()):
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming's uniform of PEFT
        assert 0.8 * bound < layer.lora_A.abs().max() <= 1.01 * bound
        assert layer.lora_A.std().item() == approx(bound / math.sqrt(3), rel=0.2)
        assert layer.lora_A.dtype == layer.lora_B.dtype == dtype


def test_new_factors_are_a_function_of_the_seed():
    """Processes that draw their own would learn different policies; so would a resumed run."""
    torch.manual_seed(1)  # torch's own stream must not matter
    models = [random_model(seed=5 - i) for i in range(3)]
    for model, seed in zip(models, (7, 7, 8)):
        lora.add(model, 4, seed=seed)
    one, same, other = (lora.tensors(model) for model in models)
    drawn = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    first, second, *_ = (one[name] for name in drawn if "q_proj" in name)  # of two layers
    assert not torch.equal(first, second)


@mark.parametrize("recompute", [False, True])
@families
def test_gradients_are_those_of_the_summed_weights(family, recompute):
    """A scale that is forgotten or squared, a factor of another layer, a layer that is recomputed
    without its factors; a base, head or embedding that has a gradient after all."""
    model = adapted(family, torch.float64, tie_word_embeddings=True)
    model.model.recompute = recompute
    value = logprob_sum(model)
    value.backward()
    model.model.recompute = False
    plain = random_model(family, torch.float64, tie_word_embeddings=True)
    copies = {n: p.detach().requires_grad_("lora_" in n) for n, p in model.named_parameters()}
    weights = dict(copies)
    for name in [n for n in copies if n.endswith("lora_A")]:
        stem = name.removesuffix("lora_A")
        A, B = weights.pop(name), weights.pop(stem + "lora_B")
        weights[stem + "weight"] = weights[stem + "weight"] + 32 / 3 * B @ A  # alpha / r
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = torch.func.functional_call(
        Whole(plain), {f"model.{n}": w for n, w in weights.items()}, ()
    )
    expected.backward()
    assert value.item() == approx(expected.item(), rel=1e-12)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.grad.abs().max() > 1e-3
            torch.testing.assert_close(p.grad, copies[name].grad, rtol=1e-9, atol=1e-11)
        else:
            assert p.grad is None and not p.requires_grad


class Whole(torch.nn.Module):
    """logprob_sum as a module, for functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return logprob_sum(self.model)


@mark.parametrize("family", ["llama", "qwen2"])
def test_packed_weights_compute_the_same(family):
    """q, k and v are one product there: each has factors of its own, and only its own."""
    if not has_kernel(torch.float32):
        skip("this CPU has no kernel for packed weights")
    model = adapted(family)
    with torch.inference_mode():
        expected = model(some_ids())
        with packed(model, 60):
            assert "project" in vars(model.model.layers[0].self_attn)
            found = model(some_ids())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@mark.parametrize("dtype, most", [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.2)])
def test_sampler_and_learner_agree(dtype, most):
    """A sampler of the base, or of merged weights that were rounded, is another policy."""
    assert gaps(adapted("qwen3", getattr(torch, dtype)), 0.8, stop_ids=()).mean() < most


def test_a_step_moves_factors_alone():
    """Weight decay on frozen weights, moments of theirs in memory, a gradient of the head; in
    bfloat16 factors without masters, which a small step would not move."""
    model = adapted("qwen2", torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    learner = Learner(model, Ranks())
    for _ in range(2):
        (-logprob_sum(model)).backward()
        assert learner.step(1e-2) > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name)
    kinds, _, names = zip(*(name.partition(".") for name, _ in learner.tensors()))
    assert set(kinds) == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert set(names) == {name for name in before if "lora_" in name}


# ----------------------------------------------------------------------------------------- files


@mark.parametrize("dtype, close", [("float64", 2e-6), ("float32", 1e-5), ("bfloat16", 0.15)])
@families
def test_logits_equal_those_of_peft(family, dtype, close, tmp_path):
    """A transposed factor, a scale of its own, a name that PEFT does not find (it only warns)."""
    peft = importorskip("peft", reason="adapters are compared with PEFT's own: pip install peft")
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, dtype)
    model = adapted(family, dtype)
    base, adapter = write(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    with torch.no_grad():
        without = theirs(some_ids()).logits
        theirs = peft.PeftModel.from_pretrained(theirs, adapter)
        expected = theirs(some_ids()).logits
        ours = Transformer.from_pretrained(base, dtype)
        lora.load(ours, lora.read_config(adapter), adapter)
        for found in (model(some_ids()), ours(some_ids())):
            assert (found - expected).float().norm() < close * expected.float().norm()
    assert (without - expected).norm() > 0.5 * expected.norm()  # factors do matter


@fixture
def workshop(tmp_path, toy_folder, monkeypatch):
    """train(flags) in a folder with a model and problems; -> the folder of the last checkpoint"""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_folder, tmp_path / "toy")
    rows = [{"id": str(i), "problem": str(i), "answer": "1"} for i in range(6)]
    write_lines(tmp_path / "p.jsonl", rows)
    (tmp_path / "r.py").write_text(
        "def even(p, r): return sum(ord(c) % 2 for c in r) / max(1, len(r))"
    )

    def run(flags="", train=train.train):
        command.run_command(train, lambda out: None, f"{FLAGS} {flags}".split())
        return sorted((tmp_path / "run/checkpoints").iterdir())[-1]

    return run


def evaluate(flags):
    evaluation.main(f"--device cpu {flags}".split())


def logits(folder):
    with torch.no_grad():
        return Policy.load(str(folder), "float32").model(some_ids())


def test_a_checkpoint_is_an_adapter_that_evaluation_reads(workshop, tmp_path):
    """The base is not written with every checkpoint, is not changed, and is found again."""
    before = files("toy")
    folder = workshop()
    names = {p.name for p in folder.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert files("toy") == before
    config = read(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "toy")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 32.0, "LORA")
    assert (logits(folder) - logits("toy")).abs().max() > 1e-4
    for name, model in (("a", folder), ("b", "toy")):
        evaluate(f"--model {model} --data p.jsonl --samples 1 --max-new-tokens 4 --out {name}")
    one, other = ((tmp_path / name / "completions.jsonl").read_text() for name in "ab")
    assert one != other


def test_the_reference_is_the_base(workshop):
    """With factors it would follow the policy, and the penalty would be 0 for ever."""
    found = []

    def look(run):
        with torch.no_grad():
            for p in lora.tensors(run.policy.model).values():
                p.copy_(0.3 * torch.randn(p.shape))
            found.extend(model(some_ids()) for model in (run.reference, run.policy.model))

    workshop("--kl-coef 0.1", look)
    (reference, policy), start = found, logits("toy")
    assert torch.equal(reference, start) and not torch.equal(policy, start)


# -------------------------------------------------------------------------------------- refusals


DAMAGES = """
base/model.safetensors = other | not a readable safetensors
base renamed | model.safetensors is missing
adapter/adapter_model.safetensors = torn | not an adapter of
adapter/adapter_config.json {"r": 5} | lacks
adapter/adapter_config.json {"target_modules": ["q_proj"]} | target_modules must be all of q_proj
adapter/adapter_config.json = [ | not a JSON object
adapter/adapter_config.json = {"r": 2} | names its base
adapter/adapter_config.json {"base_model_name_or_path": null} | names its base
adapter/adapter_config.json {"base_model_name_or_path": "/no/where"} | '/no/where' is neither a fol
"""


@mark.parametrize("damage, message", table(DAMAGES))
def test_an_adapter_of_something_else_is_refused(
    tmp_path, tokenizer, damage, message, capsys, monkeypatch
):
    """Factors on another base compute nonsense without a word."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, adapter = write(adapted(), tmp_path)
    for folder in (base, adapter):
        tokenizer.save_pretrained(folder)
    name, _, change = damage.partition(" ")
    if name == "base":
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    else:
        spoil(tmp_path / name, change)
    before = sorted(tmp_path.rglob("*"))
    with raises(SystemExit, match="^2$"):
        evaluate(f"--model {adapter} --out {tmp_path / 'out'} --max-new-tokens 4")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and ": error: " in said
    assert sorted(tmp_path.rglob("*")) == before


def test_training_on_an_adapter_or_another_base_is_refused(workshop, tmp_path, capsys):
    """Its factors would be frozen, or trained without being saved."""
    folder = workshop()
    for rank in (0, 2):
        with raises(SystemExit, match="^2$"):
            workshop(f"--model {folder} --lora-rank {rank} --out other")
        assert "merge it into its base with PEFT" in capsys.readouterr().err
    gc.collect()  # the first run's lock goes with its last reference
    config = Path("toy/config.json").read_text()
    edit(Path("toy/config.json"), {"rope_theta": 500.0})
    with raises(SystemExit, match="^2$"):
        train.main(["--resume", "run"])
    assert "--model is not what it was" in capsys.readouterr().err
    Path("toy/config.json").write_text(config)
    state = Transformer.from_pretrained("toy")
    state.model.norm.weight.data *= 2
    state.save_pretrained("toy")
    with raises(SystemExit, match="^2$"):
        train.main(["--resume", "run"])
    assert "not what it was" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
