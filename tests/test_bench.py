"""The benchmarks run and print what they promise; their numbers are not for tests."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def test_only_a_peer_may_fail_in_a_comparison(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from compare import last_line

    assert (
        last_line(sys.executable, "peer_none.py") is None
        and "peer_none.py : exit 2" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="none.py --slots 3: exit 2"):
        last_line(sys.executable, "none.py", "--slots", 3)


def test_the_tables_of_a_comparison(monkeypatch, capsys, tmp_path):
    """Runs in turns, medians, the ratio by the better of two peers, and the right way round for seconds."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import compare

    runs = []

    def last_line(python, script, *arguments):
        who = "generate_batch" if "--continuous" in arguments else script.removesuffix(".py")
        runs.append(who)
        speed = {"rollout": 1000, "peer_generate": 300, "generate_batch": 200}.get(who, 0) + 100 * (
            runs.count(who) % 3
        )  # 100, 200, 0 more
        seconds = {"step": 2.0, "peer_trl": 5.0}.get(who, 0)
        return {
            "tokens_per_second": speed,
            "seconds_per_step": seconds,
            "fraction_of_roofline": 0.5,
            "peak_rss_mb": 50 if who == "step" else 200,
            "kernel_share": 0.7,
        }

    monkeypatch.setattr(compare, "last_line", last_line)
    monkeypatch.setattr(compare, "workload", lambda *_: None)
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "compare.py",
            "--peer-python",
            "peer",
            "--sizes",
            "2m",
            "--dtypes",
            "float32",
            "--what",
            "equal",
            "update",
            "growth",
            "kernels",
            "batch",
            "--log",
            str(tmp_path / "log.jsonl"),
        ],
    )
    compare.main()
    said = capsys.readouterr().out
    assert runs[:6] == ["rollout", "peer_generate", "generate_batch"] * 2
    assert (
        "| 2m float32 | equal | ours 1,100.0, generate 400.0, generate_batch 300.0 | **2.75 x** |"
        in said
    )
    assert (
        "| 2m float32 | update | ours 2.0, TRL 5.0 | **2.50 x** |" in said
        and "memory by TRL's 0.25" in said
    )
    assert (
        "growth" in said
        and "**0.70**" in said
        and "8, 16, 32, 64 slots | roofline" in said
        and (tmp_path / "batch.png").is_file()
    )
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 and {row.count("|") for row in rows} == {6}
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 * 3 + 3 * 2


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")
def test_the_script_for_a_gpu_without_one(tmp_path):
    """A flag that was renamed, a key that is gone, a workload that is not sampled to its lengths would cost time on a card."""
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), sys.executable],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "SIZE": "2m",
            "NEW": "64",
            "DEVICE": "cpu",
            "OUT": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    rollout, step = (
        json.loads((tmp_path / name).read_text()) for name in ("rollout.json", "step.json")
    )
    lengths = [
        n
        for line in (tmp_path / "workload.jsonl").read_text().splitlines()
        for n in json.loads(line)["new_tokens"]
    ]
    assert rollout["tokens"] == sum(lengths) and max(lengths) == 64 and len(lengths) == 256
    assert (
        rollout["slot_occupancy"] > 0.9
        and 1 <= rollout["cache_over_filled"] < 1.5
        and rollout["peak_rss_mb"] > 0
    )
    assert 0 < rollout["fraction_of_roofline"] < 1 and rollout[
        "tokens_per_second"
    ] == pytest.approx(rollout["tokens"] / rollout["seconds"], rel=0.01)
    assert (
        step["tokens_per_step"] == 8 * 16 * 8
        and step["seconds_per_step"] >= step["learn_seconds"] > 0
    )
