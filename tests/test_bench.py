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


def card(out, settings):
    """What bench/gpu.sh prints of a tiny model, row by row."""
    settings = settings | {"SIZE": "2m", "NEW": "8", "OUT": str(out), "HF_HUB_OFFLINE": "1"}
    command = ["bash", BENCH / "gpu.sh", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    table = [line.split(" | ") for line in (out / "table.md").read_text().splitlines()[2:]]
    return done, {cells[0][2:]: (cells[1], cells[-1][:-2]) for cells in table}


CPU = {"MODEL": "nobody/nothing-2m", "DEVICE": "cpu", "DTYPE": "float32"}


ROWS = ["card", "model", "learning", "decoding", "draw", "recompute", "lora"]
MORE = ["float32", "fsdp", "resume", "full"]


@mark.slow
def test_the_acceptance_test_of_a_gpu_without_one(tmp_path):
    """A flag that was renamed, or a key that is gone, would cost time on a card. A model that is
    not to be had is replaced, and no model is written over."""
    done, rows = card(tmp_path, CPU)
    assert list(rows) == ROWS + MORE and {good for _, good in rows.values()} == {"yes"}, rows
    assert "random_weights_of_the_shape: 2m, because: model 'nobody/nothing-2m'" in rows["model"][0]
    found = {row["row"]: row for row in lines(tmp_path / "rows.jsonl")}
    assert list(found) == list(rows)
    assert 0 < found["learning"]["gap_nats_a_token"] < 1e-4
    assert done.returncode == 0
    again, _ = card(tmp_path, CPU)
    assert again.returncode == 2 and "must be a new or an empty folder" in again.stdout


@mark.slow
def test_a_row_has_a_time_limit(tmp_path):
    done, rows = card(tmp_path, CPU | {"TOTAL": "1"})
    assert list(rows) == ["card"] and done.returncode == 1
    assert "exit code 137 after 1 s: it has said nothing" in rows["card"][0]


PRETENDED = """
import sys
sys.path.append(TESTS)
import pretend_cuda, torch
pretend_cuda.install()
real = torch.randn
torch.randn = lambda *sizes, **options: real(*(min(n, 512) for n in sizes), **options)
torch.cuda.device_count = lambda: 1
torch.cuda.synchronize = torch.cuda.set_per_process_memory_fraction = lambda *_: None
"""


@mark.slow
def test_the_acceptance_test_on_a_pretended_card(tmp_path):
    """Where a GPU and a CPU differ. FSDP has such a test in test_gpu.py; a card cannot be full."""
    site = PRETENDED.replace("TESTS", repr(str(BENCH.parent / "tests")))
    (tmp_path / "sitecustomize.py").write_text(site)
    settings = {"DEVICE": "cuda", "PYTHONPATH": str(tmp_path), "TOTAL": "900", "LIMIT": "400"}
    _, rows = card(tmp_path / "out", settings | {"ROWS": " ".join(ROWS)})
    assert list(rows) == ROWS and {good for _, good in rows.values()} == {"yes"}, rows
    assert "_flash_attention_forward" in rows["decoding"][0]


def test_arithmetic_by_hand():
    """3.09 GB of weights and 256 rows of 29.4 MB at 3,350 GB a second, 549 kernels of 2 us."""
    step = (3.087 + 256 * 0.02936) / 3350 + 549 * 2e-6
    found = gpu.expect("H100", "1.5b", False, 1024)
    assert found.startswith(f"256: {1e3 * step:.1f} ms, {0.256 / step:.1f} k/s")


def test_the_docs_have_the_table_of_this_arithmetic(capsys):
    gpu.arithmetic()
    assert capsys.readouterr().out in (BENCH.parent / "docs/scaling.md").read_text()
