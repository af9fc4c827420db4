"""The benchmarks run and print what they promise; their numbers are not for tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pytest import mark

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))


@mark.slow
@mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")
def test_the_acceptance_test_of_a_gpu_without_one(tmp_path):
    """A flag that was renamed or a key that is gone would cost time on a card."""
    settings = {"SIZE": "2m", "NEW": "8", "DEVICE": "cpu", "DTYPE": "float32"}
    settings |= {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", BENCH / "gpu.sh", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(verdict == "yes |" for *_, verdict in rows[2:]) and len(rows) == 7
    gap, decoding, phases, resumed, memory = (measured for _, measured, *_ in rows[2:])
    assert 0 < float(gap) < 1e-4 and "logits differ by 0;" in decoding and "bandwidth" in decoding
    for phase in ("sample", "score", "learn"):
        assert f"{phase} " in phases
    assert resumed.startswith("weights differ by") and memory == "left out without a GPU"


# ------------------------------------------------------------------------------------- experiments
