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

    assert last_line(sys.executable, "peer_none.py") is None and "peer_none.py : exit 2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="none.py --slots 3: exit 2"):
        last_line(sys.executable, "none.py", "--slots", 3)


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")
def test_the_script_for_a_gpu_without_one(tmp_path):
    """A flag that was renamed, a key that is gone, a workload that is not sampled to its lengths would cost time on a card."""
    done = subprocess.run(["bash", str(ROOT / "bench/gpu.sh"), sys.executable], capture_output=True, text=True,
                          env={**os.environ, "SIZE": "2m", "NEW": "64", "DEVICE": "cpu", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rollout, step = (json.loads((tmp_path / name).read_text()) for name in ("rollout.json", "step.json"))
    lengths = [n for line in (tmp_path / "workload.jsonl").read_text().splitlines() for n in json.loads(line)["new_tokens"]]
    assert rollout["tokens"] == sum(lengths) and max(lengths) == 64 and len(lengths) == 256
    assert rollout["slot_occupancy"] > 0.9 and 1 <= rollout["cache_over_filled"] < 1.5 and rollout["peak_rss_mb"] > 0
    assert 0 < rollout["fraction_of_roofline"] < 1 and rollout["tokens_per_second"] == pytest.approx(rollout["tokens"] / rollout["seconds"], rel=0.01)
    assert step["tokens_per_step"] == 8 * 16 * 8 and step["seconds_per_step"] >= step["learn_seconds"] > 0
