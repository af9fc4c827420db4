"""A run at work: what is due next, and all that may happen to one update.

The loop of train.py uses `Run.turns` and `Run.update`. `turns` yields the level of every update,
after the evaluation and the checkpoint that are due. `update` is the context of one update: it
counts and logs. A number that is not finite ends the update and no more. A signal or an error while
sampling takes back all that the update did. Signals take no effect while learning.
"""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import name_level
from eprli import Buffer, Group, Level
from infra.ranks import Stop
from infra.update import NotFinite, Update
from model import PART_BYTES
from parts import lora
from parts.optimizer import learning_rate
from rollout import Completion

# Updates in a row that may fail to fill a buffer, before the level ends (eprli.py, 7)
MOST_SKIPS = 3
MOST_BROKEN = 3  # updates in a row that may meet a number that is not finite, before the run ends
ENTROPY_COLLAPSE = 0.05  # of the entropy of the run's first update
BAR = "{percentage:3.0f} % of all levels |{bar}| {elapsed}<{remaining}"
COUNTERS = ("trained", "tokens", "skips", "last_update")  # of a Stage
PROGRESS = ("turns_taken", "broken", "evaluation_due", "evaluations", "first_entropy")  # of a Run


@dataclass
class Stage:
    """A level at work: what it carries from update to update."""

    number: int  # from 1
    level: Level
    order: object  # data.Order of its prompts
    reward: object  # a user's function, or None: the grader's outcome
    buffer: Buffer
    trained: int = 0  # updates of this level that changed the policy
    tokens: int = 0  # sampled in this level's updates, whatever became of them
    skips: int = 0  # in a row
    last_update: int = 0  # number of its newest update; 0: none yet
    extended_after: list = field(default_factory=list)  # every M_l that --resume --updates raised

    @property
    def progress(self):
        """Share of the level's budget that is used up: of updates or of tokens, the larger."""
        budgets = (self.trained, self.level.updates), (self.tokens, self.level.tokens)
        return max(min(1, used / of) if of else 1 for used, of in budgets if of is not None)

    @property
    def schedule(self):
        """(updates so far, progress) as the learning rate sees them: its schedule begins anew
        where each budget ended before it was extended, and then has no warm-up."""
        if not self.extended_after:
            return self.trained, self.progress
        begin = 0
        for end in (*self.extended_after, self.level.updates):
            if self.trained < end:
                break
            begin = end
        return math.inf if begin else self.trained, (self.trained - begin) / (end - begin)

    @property
    def over(self):
        return self.progress == 1 or self.skips == MOST_SKIPS


def next_stage(stages, schedule):
    """One level after the other, or each in turn; None when all are over."""
    left = [stage for stage in stages if not stage.over]
    if schedule == "interleaved":
        return min(left, key=lambda stage: stage.last_update, default=None)
    return left[0] if left else None


@dataclass
class Run:
    """All that a run consists of, and where it stands."""

    cfg: object  # flags.Config
    directory: object
    ranks: object
    policy: object
    reference: object  # the starting policy's model, for the KL term; or None
    learner: object
    grader: object
    stages: list
    held_out: dict  # {number of a bin of difficulty, None if it is not known: [data.Prompt, ...]}
    turns_taken: int = 0  # updates so far, skipped ones included
    broken: int = 0  # updates in a row that met a number that is not finite
    evaluation_due: bool = True
    saved: str | None = None  # name of the newest checkpoint
    ahead: bool = False  # weights or logs hold what the counters do not yet: no saving now
    doing: str = "setting up"  # what it does, where memory may run out
    evaluations: list = field(default_factory=list)  # rows of eval.jsonl
    first_entropy: float | None = None
    tracker: object = None  # of the first process, with --tracker

    @property
    def trained(self):
        """Updates that changed the policy."""
        return sum(stage.trained for stage in self.stages)

    @property
    def tokens(self):
        """Sampled so far, over all levels."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def progress(self):
        """Share of the whole run's budget that is used up."""
        done = total = 0
        for stage in self.stages:
            budget = stage.level.tokens or stage.level.updates or 0
            done += budget * (stage.over or stage.progress)
            total += budget
        return done / total if total else 1

    def turns(self, evaluate):
        """The stage of every update; between them what is due: evaluate(self), a checkpoint."""
        silent = not self.ranks.first
        with tqdm(initial=self.progress, total=1, bar_format=BAR, disable=silent) as bar:
            while True:
                if self.evaluation_due and self.cfg.eval_every != 0:
                    self.doing = "evaluating"
                    evaluate(self)
                self.evaluation_due = False
                if self.due(self.cfg.save_every) and not self.broken:
                    self.save()
                # A signal that came while learning takes effect here.
                stage = self.ranks.together(lambda: next_stage(self.stages, self.cfg.schedule))
                if stage is None:
                    return
                yield stage
                bar.update(self.progress - bar.n)

    def due(self, every):
        """Whether what happens after every so many updates, or never (0, None), is due now."""
        return bool(every and self.turns_taken and self.turns_taken % every == 0)

    @contextmanager
    def update(self, stage):
        """One update of a level. Raises Stop after MOST_BROKEN updates that met bad numbers."""
        self.doing = "sampling"
        lr = learning_rate(self.cfg, *stage.schedule)
        update = Update(self.turns_taken + 1, stage, lr, self.cfg.max_draws)
        drawn, buffer = stage.order.drawn, stage.buffer
        before = list(buffer.groups), Counter(buffer.counts)
        try:
            yield update
        except NotFinite as fault:
            update.fault = fault
            stage.buffer.remove(fault.groups, "broken")
        except BaseException:
            stage.order.drawn = drawn
            buffer.groups, buffer.counts = before
            self.ahead = bool(update.steps)
            raise
        self.ahead = True
        self.count(stage, update)
        self.log(stage, update)
        self.ahead = False
        if self.broken == MOST_BROKEN:
            raise Stop(
                f"{MOST_BROKEN} updates in a row met numbers that are not finite, the last time: "
                f"{update.fault}. {self.directory.last_good()}; lower --lr, or look at --reward"
            )

    def count(self, stage, update):
        """Count an update that is over, and say whether an evaluation is due."""
        self.turns_taken += 1
        stage.last_update = self.turns_taken
        stage.tokens += sum(row["tokens"] for row in update.rows)
        stage.trained += bool(update.steps)
        if update.fault:
            self.broken += 1
            stage.skips = 0
        elif update.steps:
            self.broken = stage.skips = 0
        else:
            stage.skips += 1
        if stage.over:
            stage.buffer.remove(stage.buffer.groups, "stale")
        self.evaluation_due = stage.over or self.due(self.cfg.eval_every)

    # ------------------------------------------------------------------------------------- logs

    def log(self, stage, update):
        """Write one update down, and tell of it."""
        row, written = update.row(), update.written(self.cfg, self.policy)
        row["completions_left_out"] = len(update.rows) - len(written)
        self.directory.append("completions.jsonl", written)
        self.directory.append("metrics.jsonl", [row])
        if self.tracker:
            self.tracker.send(update.number, row, update.rows)
        update.tell(row, self.directory.out)
        if stage.skips == MOST_SKIPS:
            tqdm.write(f"  level {stage.number} ends early after {MOST_SKIPS} skipped updates")
        entropy = row["entropy"]
        if not math.isfinite(entropy):
            return
        self.first_entropy = self.first_entropy or entropy
        if entropy < ENTROPY_COLLAPSE * self.first_entropy:
            tqdm.write(
                f"  entropy has collapsed from {self.first_entropy:.3f} to {entropy:.3f} nats a "
                "token: groups will become uniform and learning stop; lower --lr, or raise "
                "--temperature or --eps-high"
            )

    def evaluated(self, rows):
        """Write down and print the held-out accuracy of every level."""
        rows = [{"update": self.turns_taken, "tokens_sampled": self.tokens, **row} for row in rows]
        self.ahead = True
        self.directory.append("eval.jsonl", rows)
        if self.tracker:
            held_out = {f"held out, {name_level(r['level'])}": r["accuracy"] for r in rows}
            self.tracker.send(self.turns_taken, held_out)
        self.ahead = False
        self.saved = None  # a checkpoint of this update, if there is one, lacks these rows
        self.evaluations += rows
        for row in rows:
            text = "  held out, {0}: {accuracy:.1%} [{low:.1%}, {high:.1%}] of {n} right"
            name = name_level(row["level"])
            tqdm.write(f"{text} after {{update}} updates".format(name, **row))
            earlier = [e for e in self.evaluations if e["level"] == row["level"]]
            best = max(earlier, key=lambda e: e["accuracy"])
            if row["high"] < best["low"]:
                tqdm.write(
                    f"  {name} is being forgotten: it was at {best['accuracy']:.1%} "
                    f"after {best['update']} updates, and the intervals do not meet; give the "
                    "level that is trained a smaller budget, or take turns (--schedule interleaved)"
                )

    def table(self):
        """Held-out accuracy of every level (rows) before and after every level (columns)."""
        columns = {"before": 0}
        if self.cfg.schedule == "interleaved":
            columns["after"] = self.turns_taken
        else:
            for stage in self.stages:
                if stage.last_update:
                    columns[f"after level {stage.number}"] = stage.last_update
        cells = {}
        for row in self.evaluations:
            cell = "{accuracy:.1%} [{low:.1%}, {high:.1%}]".format(**row)
            cells[row["update"], row["level"]] = cell
        lines = ["held-out accuracy  " + "".join(f"{name:^24}" for name in columns)]
        for level in self.held_out:
            row = "".join(f"{cells.get((end, level), '-'):^24}" for end in columns.values())
            lines.append(f"{name_level(level):<19}{row}")
        return "\n".join(lines)

    # ------------------------------------------------------------------------------ checkpoints

    def save(self):
        """Write the state, unless it is on the disk. Every process must call. Raises Stop."""
        name = f"{self.turns_taken:06d}"
        if name == self.saved or self.ahead:
            return
        self.doing = "saving"
        parts = in_parts(self.learner.tensors())

        def work():
            try:
                if self.ranks.first:
                    self.directory.write_checkpoint(name, lambda f: self.write(f, parts))
                    self.directory.delete_old(self.cfg.keep_checkpoints)
            finally:  # shards are gathered by all, whatever goes wrong on the first
                for _ in parts:
                    pass

        self.ranks.together(work, interruptible=False)
        self.saved = name

    def check_weights(self, tensors):
        for name, tensor in tensors:
            if not tensor.isfinite().all():
                raise Stop(
                    f"the weights are no longer finite ({name}), so they are not saved; "
                    f"{self.directory.last_good()}"
                )

    def write(self, folder, optimizer_parts):
        """The files of a checkpoint, but for their checksums."""
        self.check_weights(self.policy.model.named_parameters())
        for number, tensors in enumerate(optimizer_parts):
            self.check_weights(tensors.items())
            save_file(tensors, folder / f"optimizer{number or ''}.safetensors")
        if self.cfg.lora_rank:
            lora.save(self.policy.model, folder, self.directory.config)
        else:
            self.policy.model.save_pretrained(folder)
        self.policy.save(folder)
        state = pack(self) | {"sizes": self.directory.log_sizes()}
        (folder / "state.json").write_text(json.dumps(state, default=plain))

    def resume(self, checkpoint):
        """Take up the state of a checkpoint (None: the beginning). -> {log: bytes it had then}"""
        if not checkpoint:
            return {}
        state = json.loads((checkpoint / "state.json").read_text())
        unpack(self, state)
        for path in checkpoint.glob("optimizer*.safetensors"):
            self.learner.load(load_file(path))
        self.saved = checkpoint.name
        return state["sizes"]


def in_parts(tensors):
    """(name, tensor) pairs -> dicts of about PART_BYTES on the CPU: few are held at a time."""
    part, size = {}, 0
    for name, tensor in tensors:  # shards are gathered here, from all processes
        part[name] = tensor.cpu()
        size += tensor.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
    yield part


def pack(run):
    """Everything but weights, optimizer and logs, for json.dumps(..., default=plain)."""
    levels = []
    for stage in run.stages:
        drawn, buffer = stage.order.drawn, stage.buffer
        level = {"drawn": drawn, "counts": buffer.counts, "groups": buffer.groups}
        levels.append(level | {name: getattr(stage, name) for name in COUNTERS})
    return {"progress": {name: getattr(run, name) for name in PROGRESS}, "levels": levels}


def plain(value):
    """What JSON holds of a Group, its tensors and completions; a float comes back bit by bit."""
    return value.tolist() if isinstance(value, torch.Tensor) else vars(value)


def unpack(run, state):
    """The inverse of `pack`, into a run that has just begun."""
    vars(run).update(state["progress"])
    for stage, level in zip(run.stages, state["levels"], strict=True):
        stage.order.drawn = level["drawn"]
        for name in COUNTERS:
            setattr(stage, name, level[name])
        stage.buffer.counts = Counter(level["counts"])
        for row in level["groups"]:
            row["completions"] = [Completion(**completion) for completion in row["completions"]]
            for name in ("outcome", "length_reward"):
                row[name] = torch.tensor(row[name], dtype=torch.float64)
            stage.buffer.groups.append(Group(**row))
