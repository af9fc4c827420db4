"""The run directory: what a run leaves behind, and what it goes on from after any end.

    config.json                         every flag, resolved; it comes into being with the directory
    metrics.jsonl, eval.jsonl, completions.jsonl     appended to; docs/scaling.md has the keys
    checkpoints/000123/                 after 123 updates
        config.json, model.safetensors, tokenizer ...   a Hugging Face folder; with LoRA
        adapter_config.json, adapter_model.safetensors ...   PEFT's, see policy/lora.py
        optimizer.safetensors           AdamW's moments and float32 masters, by parameter name
        state.json                      all other state, waiting groups, and the sizes of the logs

A checkpoint is written beside its place, forced to the disk and renamed, so a kill at any moment
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


class RunDirectory:
    """A run's directory, owned by one run at a time. The first process writes; others follow."""

    def __init__(self, out, ranks):
        """The directory must exist, see `create`. Raises ValueError if another process has it."""
        self.out, self.ranks = Path(out), ranks
        if ranks.first:
            self.lock = lock(self.out / "config.json")
            self.config = json.load(self.lock)
            (self.out / "checkpoints").mkdir(exist_ok=True)

    # ------------------------------------------------------------------------------------- logs

    def append(self, name, rows):
        """Append JSON lines, all at once; what goes wrong ends the run on all processes."""
        path = self.out / name
        # JSON has neither nan nor infinity: None stands for them.
        rows = json.loads(json.dumps(rows), parse_constant=lambda _: None)
        try:
            self.ranks.from_first(lambda: write_records(path, rows, "a"), interruptible=False)
        except OSError as error:
            raise Stop(f"{path} cannot be written ({error}); {self.advice()}") from None

    def log_sizes(self):
        """Bytes of every log, once they are on the disk."""
        sizes = {}
        for name in LOGS:
            path = self.out / name
            if path.exists():
                force_to_disk(path)
                sizes[name] = path.stat().st_size
        return sizes

    def cut_logs(self, kept):
        """Cut the logs back to the bytes that they had when a checkpoint was written. None: there
        is none (they may have been deleted), and the logs stay beside as *.before.jsonl,
        *.before1.jsonl, and so on."""
        now, sizes = self.log_sizes(), kept or {}
        for name, size in sizes.items():
            if now.get(name, 0) < size:
                raise ValueError(
                    f"{self.out / name}: {now.get(name, 0)} bytes, but the checkpoint was "
                    f"written after {size}: lines were lost"
                )
        for name in now:  # once all are known to be long enough
            path = self.out / name
            if kept is None:
                copies = (path.with_suffix(f".before{n or ''}.jsonl") for n in itertools.count())
                path.rename(next(copy for copy in copies if not copy.exists()))
            else:
                os.truncate(path, sizes.get(name, 0))

    # ------------------------------------------------------------------------------ checkpoints

    def write_checkpoint(self, name, write_files, keep):
        """write_files(folder) fills a folder, which becomes checkpoints/NAME; the newest `keep`
        stay. Raises Stop."""
        part, final = self.out / "checkpoint.part", self.out / "checkpoints" / name
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
        try:
            part.mkdir()
            write_files(part)
            force_to_disk(*part.rglob("*"), part)
            part.rename(final)
            force_to_disk(final.parent)
        except Exception as error:  # OSError, SafetensorError, and the bare Exception of tokenizers
            shutil.rmtree(part, ignore_errors=True)  # frees what it took of a full disk
            if isinstance(error, (Stop, torch.OutOfMemoryError)):
                raise
            raise Stop(f"checkpoint {name} cannot be written ({error}); {self.advice()}") from None
        for old in checkpoints(self.out)[keep:]:
            shutil.rmtree(old, ignore_errors=True)  # what is left of it is tried again next time

    def last_good(self):
        return f"the last good checkpoint is {next(iter(checkpoints(self.out)), None)}"

    def advice(self):
        return f"{self.last_good()}. Free space, then go on with --resume {self.out}"


def checkpoints(run):
    """Folders of checkpoints, newest first. Each is whole: it got its name when it was."""
    folders = [p for p in (Path(run) / "checkpoints").iterdir() if p.name.isdecimal()]
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def create(out, config, kind=""):
    """Make a folder with its config.json -> its path

    out  None: runs/<kind><date-time>-<process>, a name of its own
    """
    path = Path(out or f"runs/{kind}{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config | {"out": str(path)}, indent=1))
    force_to_disk(path / "config.json", path, path.parent)
    return path


def lock(path):
    """-> an open file; until it is closed, no other process gets it. Raises ValueError"""
    file = open(path)  # noqa: SIM115 stays open, see above
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path.parent}: another process is writing to it") from error
    return file
