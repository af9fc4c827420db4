"""What a run is, and where it stands: counted here, saved here, restored from here.

train.py decides what happens. An update works on a copy of its level's state, and `end_update`
replaces the state by it. So what interrupts an update leaves the state before it.
"""

import json
import math
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.files import Stop
from eprli import Group, LevelState
from model import Transformer
from policy import lora
from policy.attempt import Solver
from policy.checkpoint import Policy
from policy.learner import Learner
from rollout import Completion
from run.checkpoints import last_good, log_sizes, write_checkpoint
from run.config import Config
from run.log import Log
from run.processes import Ranks

MOST_BROKEN = 3  # updates in a row that may meet a number that is not finite, before the run ends
# What state.json has of a Run, and of a LevelState: there, what changes is what has a default
SAVED = "num_updates", "num_steps", "evaluation_due", "evaluations", "first_entropy", "log_sizes"
COUNTERS = [f.name for f in fields(LevelState) if f.default is not MISSING]


@dataclass
class Run:
    """All that a run consists of, and where it stands."""

    cfg: Config
    out: Path  # its folder
    ranks: Ranks
    policy: Policy
    reference: Transformer | None  # the starting policy's model, for the KL term
    learner: Learner
    solver: Solver
    levels: list  # of LevelState
    held_out: list  # of ({what names a bin in eval.jsonl: ...}, [data.Prompt, ...], R_l)
    log: Log
    locked: object  # its config.json, open as long as the run may write
    num_updates: int = 0  # so far, skipped ones included
    num_steps: int = 0  # optimizer steps of these updates
    num_broken: int = 0  # updates that met a number that is not finite, since one trained
    evaluation_due: bool = True
    evaluations: list = field(default_factory=list)  # rows of eval.jsonl
    first_entropy: float | None = None
    log_sizes: dict = field(default_factory=dict)  # bytes of each log, as far as it is counted
    saved: str | None = None  # name of the newest checkpoint

    @property
    def policy_version(self):
        """Updates that changed the policy."""
        return sum(state.num_trained for state in self.levels)

    @property
    def tokens_sampled(self):
        """Sampled so far, over all levels."""
        return sum(state.tokens_sampled for state in self.levels)

    @property
    def progress(self):
        """Share of the whole run's budget that is used up."""
        done = total = 0
        for state in self.levels:
            budget = state.level.tokens or state.level.updates or 0
            done += budget * (state.over or state.progress)
            total += budget
        return done / total if total else 1

    def due(self, every):
        """Whether what happens every so many updates (0, None: never) is due now."""
        return bool(every and self.num_updates and self.num_updates % every == 0)

    @property
    def save_due(self):
        return 0 < self.cfg.save_every <= self.num_updates - int(self.saved or 0)

    def end_update(self, update):
        """Count and log an update. Raises Stop after MOST_BROKEN updates that met bad numbers."""
        state, tokens = update.state, sum(row["tokens"] for row in update.rows)
        state.count(update.number, tokens, update.changed_policy, bool(update.fault))
        row = self.log.update(update, self.first_entropy)
        # Now it has happened: weights, logs and counters belong together again.
        self.levels[state.number - 1] = state
        self.num_updates, self.num_steps = update.number, self.learner.num_steps
        self.log_sizes = log_sizes(self.out)
        self.evaluation_due = state.over or self.due(self.cfg.eval_every)
        if not math.isnan(row["entropy"]):
            self.first_entropy = self.first_entropy or row["entropy"]
        if update.fault:
            self.num_broken += 1
        elif update.steps:
            self.num_broken = 0
        self.log.show(self.progress)
        if self.num_broken == MOST_BROKEN:
            raise Stop(
                f"{MOST_BROKEN} updates in a row met numbers that are not finite (skipped ones do "
                f"not count), the last time: {update.fault}. {last_good(self.out)}; lower --lr, or "
                "look at --reward"
            )

    def add_evaluation(self, rows):
        """Count and log the held-out accuracy of every bin."""
        now = {"update": self.num_updates, "tokens_sampled": self.tokens_sampled}
        rows = [now | row for row in rows]
        self.log.evaluation(rows, self.num_updates)
        self.evaluation_due = False
        self.evaluations += rows
        self.log_sizes = log_sizes(self.out)

    def save(self):
        """Write a checkpoint, unless it is there, or the last good one is better: numbers are not
        finite, or the weights are ahead of the counters. Every process must call. Raises Stop."""
        name = f"{self.num_updates:06d}"
        if name == self.saved or self.num_broken or self.num_steps != self.learner.num_steps:
            return
        optimizer = {}  # whole, on the first process: shards are gathered from all
        for key, tensor in self.learner.tensors():
            if self.ranks.first:
                optimizer[key] = tensor.cpu()

        def write(folder):
            for key, tensor in (*self.policy.model.named_parameters(), *optimizer.items()):
                if not tensor.isfinite().all():
                    raise Stop(
                        f"the weights are no longer finite ({key}), so they are not saved; "
                        f"{last_good(self.out)}"
                    )
            save_file(optimizer, folder / "optimizer.safetensors")
            if self.cfg.lora_rank:
                lora.save(self.policy.model, folder, self.cfg.model, self.cfg.lora_rank)
            else:
                self.policy.model.save_pretrained(folder)
            self.policy.save(folder)
            (folder / "state.json").write_text(json.dumps(pack(self), default=plain))

        keep = self.cfg.keep_checkpoints
        work = lambda: write_checkpoint(self.out, name, write, keep)  # noqa: E731
        self.ranks.from_first(work, interruptible=False)
        self.saved = name

    def restore(self, checkpoint):
        """Take the state of a checkpoint."""
        unpack(self, json.loads((checkpoint / "state.json").read_text()))
        self.learner.load(load_file(checkpoint / "optimizer.safetensors"))
        self.learner.num_steps = self.num_steps
        self.saved = checkpoint.name


def pack(run):
    """Return everything but weights and optimizer, for json.dumps(..., default=plain)."""
    levels = []
    for state in run.levels:
        level = {name: getattr(state, name) for name in COUNTERS}
        level |= {"drawn": state.order.drawn, "counts": state.buffer.counts}
        levels.append(level | {"groups": state.buffer.groups})
    return {name: getattr(run, name) for name in SAVED} | {"levels": levels}


def plain(value):
    """What JSON holds of a Group, its tensors and completions; a float comes back bit by bit."""
    return value.tolist() if isinstance(value, torch.Tensor) else vars(value)


def unpack(run, packed):
    """The inverse of `pack`, into a run that has just begun."""
    for state, level in zip(run.levels, packed.pop("levels"), strict=True):
        state.order.drawn = level["drawn"]
        state.buffer.counts = Counter(level["counts"])
        for name in COUNTERS:
            setattr(state, name, level[name])
        for row in level["groups"]:
            row["completions"] = [Completion(**completion) for completion in row["completions"]]
            for name in ("outcome", "length_reward", "advantage"):
                row[name] = torch.tensor(row[name], dtype=torch.float64)
            state.buffer.groups.append(Group(**row))
    vars(run).update(packed)
