"""The benchmarks run and print what they promise; their numbers are not for tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import compare  # noqa: E402  it is no package


def test_only_a_peer_may_fail_in_a_comparison(capsys):
    assert compare.last_line("peer_none.py", sys.executable) is None
    assert "peer_none.py : exit 2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="none.py --slots 3: exit 2"):
        compare.last_line("none.py --slots 3", sys.executable)


def test_the_table_of_a_comparison(monkeypatch, capsys, tmp_path):
    """Sides in turns, medians, ours by the better of two peers. A peer that fails is left out."""
    speeds = {"generate": [500, 200, 300], "generate_batch": [None, 200, 100]}
    speeds |= {"ours": [100, 1200, 600]}
    turns = iter(zip(*(speeds[side] for side in compare.SAMPLERS)))
    results = [
        speed and {"tokens_per_second": speed, "peak_rss_mb": 50} for t in turns for speed in t
    ]
    monkeypatch.setattr(compare, "last_line", lambda *_: results.pop(0))
    monkeypatch.setattr(compare.common, "make_model", lambda *_: None)
    log = tmp_path / "log"
    command = f"compare.py --sizes 2m --dtypes float32 --what equal --log {log}"
    monkeypatch.setattr(sys, "argv", command.split())
    compare.main()
    row = capsys.readouterr().out.splitlines()[-1]
    medians = "{'ours': 600, 'generate': 300, 'generate_batch': 150.0}"
    assert row.startswith(f"| 2m float32 | equal | {medians} |") and row.endswith("| 2.00 x |")
    assert len(log.read_text().splitlines()) == 8


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")
def test_the_script_for_a_gpu_without_one(tmp_path):
    """A flag that was renamed or a key that is gone would cost time on a card."""
    settings = {"SIZE": "2m", "NEW": "24", "DEVICE": "cpu", "DTYPE": "float32"}
    settings |= {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", BENCH / "gpu.sh", sys.executable]
    subprocess.run(command, check=True, env=os.environ | settings)
    rollout = json.loads((tmp_path / "rollout.json").read_text())
    step = json.loads((tmp_path / "step.json").read_text())
    lines = (tmp_path / "workload.jsonl").read_text().splitlines()
    lengths = [n for line in lines for n in json.loads(line)["new_tokens"]]
    assert rollout["tokens"] == sum(lengths) and max(lengths) == 24 and len(lengths) == 256
    assert 0.9 < rollout["slot_occupancy"] <= 1 <= rollout["cache_over_filled"] < 2
    assert step["tokens_per_step"] == 8 * 16 * 3
    assert step["seconds_per_step"] > step["learn_seconds"] > 0 < step["tokens_per_second"]
