"""What ships: a checkpoint that anybody can load, problems whose difficulty was measured, and what
makes them again."""

import itertools

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import cut_levels, read_problems, without_repeats
from experiments.problems import generate
from model import Transformer
from policy.checkpoint import SHIPPED
from run.config import DEFAULTS
from tools.overlap import overlap

TINY = SHIPPED / "tiny"
TRAINING, HELD_OUT = (read_problems(SHIPPED / f"{name}.jsonl") for name in ("train", "heldout"))


def test_the_checkpoint_is_small_and_loads_in_transformers():
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 8 * 2**20
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer, ours = AutoTokenizer.from_pretrained(TINY), Transformer.from_pretrained(TINY)
    ids = torch.tensor([tokenizer("<|user|>12+30-5<|assistant|>")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(ours(ids), reference(ids).logits, atol=1e-5)
    assert ours.context >= 4096
    text = " any text: é 漢字 🙂 \x00\x7f \\boxed{\\boxed{1}}\n\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text
    assert len(tokenizer("\\boxed{")["input_ids"]) == 1


def test_problems_are_generated_measured_disjoint_and_fill_both_levels():
    for split, problems, least in (("train", TRAINING, 800), ("heldout", HELD_OUT, 300)):
        generated = itertools.islice(generate(split, 0), len(problems))
        assert [(p.id, p.problem) for p in generated] == [(p.id, p.problem) for p in problems]
        assert all(p.pass_rate is not None for p in problems)
        assert all(p.other["measured"]["samples"] >= 16 for p in problems)
        assert all(
            len(level) >= least
            for level in cut_levels(problems, DEFAULTS["quality"], "pass_rate")[0]
        )
    assert len(without_repeats(TRAINING)) == len(TRAINING) >= 2000
    assert overlap(TRAINING, HELD_OUT) == {}
