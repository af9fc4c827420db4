"""The acceptance test of a GPU runs where there is none; its numbers are not for tests."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import lines
from pytest import mark

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import gpu  # noqa: E402  it is no package


@mark.slow
def test_the_acceptance_test_of_a_gpu_without_one(tmp_path):
    """A flag that was renamed, or a key that is gone, would cost time on a card. A model that is
    not to be had is replaced; a row that has no time left costs none of those before it."""
    settings = {"MODEL": "nobody/nothing-2m", "SIZE": "2m", "NEW": "8", "DEVICE": "cpu"}
    settings |= {"DTYPE": "float32", "TOTAL": "60", "OUT": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = ["bash", BENCH / "gpu.sh", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    table = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0][2:] for row in table] == list(gpu.ROWS)
    assert all(row.endswith("| yes |") for row in table[:3]), done.stderr
    assert "random_weights_of_the_shape 2m; because model 'nobody/nothing-2m'" in table[1]
    assert "0 s are over" in table[-1] and table[-1].endswith("| NO |") and done.returncode == 1
    (found,) = [row for row in lines(tmp_path / "rows.jsonl") if row["row"].startswith("gap")]
    assert 0 < found["gap_nats_a_token"] < 1e-4


def test_arithmetic_by_hand():
    """3.09 GB of weights and 256 rows of 29.4 MB at 3,350 GB a second, 549 kernels of 2 us."""
    step = (3.087 + 256 * 0.02936) / 3350 + 549 * 2e-6
    found = gpu.expect("H100", "1.5b", False, 1024)
    assert found.startswith(f"256: {1e3 * step:.1f} ms, {0.256 / step:.1f} k/s")
