"""What ships: a checkpoint that anybody can load, problems whose difficulty was measured, and what
makes them again."""

import itertools

import pytest
import torch
from conftest import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from answers import extract_answer
from data import cut_levels, read_problems, without_repeats
from experiments import warmstart
from experiments.problems import generate
from model import Transformer
from policy.attempt import Sampling, attempt, evaluation_requests
from policy.checkpoint import SHIPPED, Policy
from rewards import RIGHT, WRONG, Grader, Scorer, writes_steps
from run.flags import DEFAULTS, Config
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


@pytest.mark.slow
def test_fresh_samples_confirm_the_levels():
    """The samples that chose a level must not be those that describe it. Level 1 is the easier one;
    neither is hopeless or done. Greedy decoding does not solve level 2: its mistakes are no noise.
    All completions write steps: that is not what is learned."""
    policy, scorer, found = Policy.load(str(TINY)), Scorer(Config()), []
    for level in cut_levels(HELD_OUT, DEFAULTS["quality"], "pass_rate")[0]:
        prompts = policy.render(level[:200])
        for temperature in (1.0, 0.0):
            sampling = Sampling(128, temperature)
            done = attempt(
                policy, scorer, evaluation_requests(7, prompts, 2), sampling, fit(policy.model, 256)
            )
            attempts = [a for group in done for a in group]
            assert sum(writes_steps(a.text) for a in attempts) > 0.99 * len(attempts)
            found.append(sum(a.score.outcome for a in attempts) / len(attempts))
    assert 0.3 < found[0] < 0.6
    assert 0.01 < found[2] < 0.1 and found[3] < 0.05


def test_the_warm_start_writes_a_policy(tmp_path):
    """The same files as the shipped ones; those of the tokenizer are the same bytes."""
    warmstart.main(["--out", str(tmp_path), "--steps", "2", "--batch", "4"])
    assert {f.name for f in TINY.iterdir()} == {f.name for f in tmp_path.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (TINY / name).read_bytes() == (tmp_path / name).read_bytes()
    policy = Policy.load(str(tmp_path))
    (prompt,) = policy.render(HELD_OUT[:1])
    text = policy.tokenizer.decode(prompt.tokens)
    assert text == f"<|user|>{HELD_OUT[0].problem}<|assistant|>"


def test_demonstrations_are_right_or_fall_into_a_trap():
    """The grader and the warm start agree on what an answer looks like. Who falls into a trap is
    wrong: slips are rare at first, and come in full at the end."""
    shares = []
    for batch in warmstart.demonstrations(warmstart.Recipe("", steps=3, batch=400)):
        verdicts = Grader().compare([(p.answer, extract_answer(text)) for p, text in batch])
        assert set(verdicts) == {RIGHT, WRONG}
        assert all(text.count("=") >= len(p.other["steps"]) for p, text in batch)
        shares.append(verdicts.count(RIGHT) / 400)
    assert shares[0] > 0.7 and 0.25 < shares[2] < 0.45
