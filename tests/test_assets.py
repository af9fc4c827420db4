"""What ships: a checkpoint that anybody can load, problems whose difficulty was measured, and what makes them again."""

import json

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import QUALITY, cut_levels, overlap, read_problems, without_repeats
from eval import Policy, attempt, evaluation_keys
from model import Transformer
from rewards import RIGHT, Grader
from tools import report, warmstart

ASSETS = ROOT / "assets"


def test_the_checkpoint_is_small_and_loads_in_transformers():
    assert sum(f.stat().st_size for f in (ASSETS / "tiny").iterdir()) <= 8 * 2**20
    reference, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32),
        AutoTokenizer.from_pretrained(ASSETS / "tiny"),
    )
    ours = Transformer.from_pretrained(ASSETS / "tiny")
    ids = torch.tensor([tokenizer("<|user|>12+30-5<|assistant|>")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(ours(ids), reference(ids).logits, atol=1e-5)
    assert ours.context >= 4096
    text = "any text: é 漢字 🙂 \\boxed{1}\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_problems_are_measured_disjoint_and_fill_both_levels():
    training, held_out = (
        read_problems(ASSETS / "train.jsonl"),
        read_problems(ASSETS / "heldout.jsonl"),
    )
    assert (
        len(training) >= 4000
        and len(without_repeats(training)) == len(training)
        and overlap(training, held_out) == ([], [])
    )
    assert all(
        p.pass_rate is not None and p.other["pass_rate_samples"] >= 16 for p in training + held_out
    )
    for problems, least in ((training, 800), (held_out, 300)):
        assert all(len(level) >= least for level in cut_levels(problems, QUALITY, "pass_rate")[0])


def test_fresh_samples_confirm_the_levels():
    """The samples that chose a level must not be those that describe it. Level 1 is the easier; neither is hopeless or done."""
    policy, grader, rates = Policy.load(str(ASSETS / "tiny")), Grader(), []
    for level in cut_levels(read_problems(ASSETS / "heldout.jsonl"), QUALITY, "pass_rate")[0]:
        prompts = policy.render(level[:200])
        done = attempt(
            policy,
            grader,
            prompts,
            evaluation_keys(7, prompts, 2),
            max_new_tokens=96,
            temperature=1.0,
            slots=256,
        )
        rates.append(sum(a.right for group in done for a in group) / 400)
    assert 0.3 < rates[0] < 0.6 and 0.03 < rates[1] < 0.2


def test_the_warm_start_writes_a_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["warmstart.py", "--out", str(tmp_path / "tiny"), "--steps", "2", "--batch", "4"],
    )
    warmstart.main()
    policy = Policy.load(str(tmp_path / "tiny"))
    assert {f.name for f in (ASSETS / "tiny").iterdir()} == {
        f.name for f in (tmp_path / "tiny").iterdir()
    }
    prompts = policy.render(read_problems(ASSETS / "heldout.jsonl")[:1])
    assert (
        policy.tokenizer.decode(prompts[0].tokens)
        == f"<|user|>{prompts[0].problem.problem}<|assistant|>"
    )


def test_demonstrations_are_graded_right():
    """The grader and the warm start agree on what an answer looks like."""
    problems = read_problems(ASSETS / "train.jsonl")[:50]
    texts = [warmstart.demonstration(p, worked) for worked in (True, False) for p in problems]
    assert set(Grader().grade([(p.answer, t) for p, t in zip(problems * 2, texts)])) == {RIGHT}


def test_report_draws_several_runs_with_gaps(tmp_path):
    """A skipped update has nulls; a run without evaluation has no eval.jsonl."""
    keys = (
        "accuracy reward_mean outcome_mean length_reward_mean writes_steps_share truncated_share length_mean entropy clip_low_share "
        "clip_high_share kl_old grad_norm logprob_gap_max tokens_per_second lr"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [
            {
                "update": u,
                "level": 1 + u // 5,
                **{k: None if u == 3 else 0.1 * u for k in keys.split()},
                **{f"groups_{k}": 2 for k in ("kept", "all_right", "all_wrong", "stale")},
            }
            for u in range(1, 9)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a/eval.jsonl").write_text(
        json.dumps({"update": 0, "level": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9})
    )
    picture = report.draw([tmp_path / "a", tmp_path / "b"])
    assert picture == tmp_path / "a/report.png" and picture.stat().st_size > 20_000
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="c: no metrics.jsonl"):
        report.draw([tmp_path / "c"])
