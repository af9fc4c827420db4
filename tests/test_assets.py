"""What ships: a checkpoint that anybody can load, problems whose difficulty was measured, and what
makes them again."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from pytest import mark
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
            for level in cut_levels(problems, DEFAULTS["quality"], "pass_rate")[0].values()
        )
    assert len(without_repeats(TRAINING)) == len(TRAINING) >= 2000
    assert overlap(TRAINING, HELD_OUT) == {}


ROOT = Path(__file__).resolve().parents[1]


@mark.slow
def test_the_commands_of_the_docs_make_the_assets_again(tmp_path):
    """All but the warm start, which takes long; of the measurements the first 24 problems. The
    record of what measured them is the same too: the default run warned about its own data."""
    commands = re.findall(r"^python (.*)", (ROOT / "docs/data.md").read_text(), re.M)
    chosen = [words for words in commands if "experiments.problems" in words or "1000" in words]
    assert len(chosen) == 4
    (tmp_path / "assets").mkdir()
    for words in chosen:
        words = words.replace(".jsonl ", ".jsonl[:24] ").replace("eval.py", f"{ROOT}/eval.py")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *shlex.split(words, comments=True)]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name in ("train", "heldout"):
        made = (tmp_path / f"assets/{name}.jsonl").read_text().splitlines()
        assert made == (SHIPPED / f"{name}.jsonl").read_text().splitlines()[:24]
