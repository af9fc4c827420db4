"""The files in the folder of a run, from which it is resumed after any end.

    config.json                         the Config of the run, what it read, what it computed with
    metrics.jsonl, eval.jsonl, completions.jsonl     appended to; docs/scaling.md has the keys
    checkpoints/000123/                 after 123 updates
        config.json, model.safetensors, tokenizer ...   a Hugging Face folder; with LoRA
        adapter_config.json, adapter_model.safetensors ...   PEFT's, see policy/lora.py
        optimizer.safetensors           AdamW's moments and float32 masters, by parameter name
        state.json                      all other state, waiting groups, and the sizes of the logs

A checkpoint is written next to its place, forced to the disk and renamed, so a kill at any moment
leaves the last one. Tensors are whole, whatever number of processes wrote them.
"""

import fcntl
import itertools
import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import torch

from common.files import Stop, force_to_disk, write_records

LOGS = ("metrics.jsonl", "eval.jsonl", "completions.jsonl")


def create(out, config, kind=""):
    """Make a folder with its config.json, and return its path.

    out  None: runs/<kind><date-time>-<process>, a name of its own
    """
    path = Path(out or f"runs/{kind}{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config | {"out": str(path)}, indent=1))
    force_to_disk(path / "config.json", path, path.parent)
    return path


def lock(path):
    """Return an open file. Until it is closed, no other process gets it: there this raises
    ValueError."""
    file = open(path)  # noqa: SIM115 stays open, see above
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path.parent}: another process is writing to it") from error
    return file


# -------------------------------------------------------------------------------------------- logs


def append(path, rows):
    """Append JSON lines. JSON has neither nan nor infinity: None stands for them. Raises Stop."""
    rows = json.loads(json.dumps(rows), parse_constant=lambda _: None)
    try:
        write_records(path, rows, "a")
    except OSError as error:
        raise Stop(f"{path} cannot be written ({error}); {advice(path.parent)}") from None


def log_sizes(out):
    """Return the bytes of every log: {name: size}."""
    return {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}


def cut_logs(out, kept):
    """Cut the logs back to the bytes that they had when a checkpoint was written. None: there is no
    checkpoint (they may have been deleted), and the logs are renamed to *.before.jsonl,
    *.before1.jsonl, and so on. Raises ValueError if one is shorter, and leaves all as they are."""
    now, sizes = log_sizes(out), kept or {}
    for name, size in sizes.items():
        if now.get(name, 0) < size:
            raise ValueError(
                f"{out / name}: {now.get(name, 0)} bytes, but the checkpoint was written after "
                f"{size}: lines were lost"
            )
    for name in now:
        path = out / name
        if kept is None:
            copies = (path.with_suffix(f".before{n or ''}.jsonl") for n in itertools.count())
            path.rename(next(copy for copy in copies if not copy.exists()))
        else:
            os.truncate(path, sizes.get(name, 0))


# ------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(out, name, write_files, keep):
    """Make checkpoints/NAME, which write_files(folder) fills, and keep the newest `keep` only. The
    logs are forced to the disk before. Raises Stop."""
    part, final = out / "checkpoint.part", out / "checkpoints" / name
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
    try:
        part.mkdir()
        write_files(part)
        force_to_disk(*part.rglob("*"), part, *(out / log for log in log_sizes(out)))
        part.rename(final)
        force_to_disk(final.parent)
    except Exception as error:  # OSError, SafetensorError, and the bare Exception of tokenizers
        shutil.rmtree(part, ignore_errors=True)  # frees what it took of a full disk
        if isinstance(error, (Stop, torch.OutOfMemoryError)):
            raise
        raise Stop(f"checkpoint {name} cannot be written ({error}); {advice(out)}") from None
    for old in checkpoints(out)[keep:]:
        shutil.rmtree(old, ignore_errors=True)  # what is left of it is tried again next time


def checkpoints(out):
    """Return the folders of checkpoints, newest first. Each is whole: it got its name when it
    was."""
    folders = [p for p in Path(out).glob("checkpoints/*") if p.name.isdecimal()]
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def last_good(out):
    return f"the last good checkpoint is {next(iter(checkpoints(out)), None)}"


def advice(out):
    return f"{last_good(out)}. Free space, then go on with --resume {out}"
