"""The state of a run, and its one writer: counters, logs, checkpoints.

train.py decides what happens. A Run counts it, writes it down, saves it, takes up a saved state.
"""

import importlib
import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common.files import Stop, explained
from data import name_level
from eprli import Group
from model import Transformer
from policy import lora
from policy.attempt import Solver
from policy.checkpoint import Policy
from policy.learner import Learner
from rollout import Completion
from run.config import Config
from run.directory import RunDirectory
from run.processes import Ranks
from run.update import Update

MOST_BROKEN = 3  # updates in a row that may meet a number that is not finite, before the run ends
ENTROPY_COLLAPSE = 0.05  # of the entropy of the run's first update
BAR = "{percentage:3.0f} % of all levels |{bar}| {elapsed}<{remaining}"
# Of a Run and of a LevelState, in state.json
SAVED = ("num_updates", "evaluation_due", "evaluations", "first_entropy")
COUNTERS = ("num_trained", "tokens_sampled", "skips", "last_update")


@dataclass
class Run:
    """All that a run consists of, and where it stands."""

    cfg: Config
    directory: RunDirectory
    ranks: Ranks
    policy: Policy
    reference: Transformer | None  # the starting policy's model, for the KL term
    learner: Learner
    solver: Solver
    levels: list  # of LevelState
    held_out: list  # of ({what names a bin in eval.jsonl: ...}, [data.Prompt, ...], R_l)
    num_updates: int = 0  # so far, skipped ones included
    num_broken: int = 0  # updates that met a number that is not finite, since one trained
    evaluation_due: bool = True
    saved: str | None = None  # name of the newest checkpoint
    update: Update | None = None  # at work
    half_done: bool = False  # weights or logs hold what the counters do not yet: no saving now
    evaluations: list = field(default_factory=list)  # rows of eval.jsonl
    first_entropy: float | None = None
    bar: tqdm | None = None
    estimate_at: int = 0  # updates, after which the rest can be guessed
    tracker: object = None  # the library, on the first process, with --tracker

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

    def progress_bar(self):
        silent = not self.ranks.first
        self.bar = tqdm(initial=self.progress, total=1, bar_format=BAR, smoothing=0, disable=silent)
        self.estimate_at = self.num_updates + 2
        return self.bar

    def due(self, every):
        """Whether what happens every so many updates (0, None: never) is due now."""
        return bool(every and self.num_updates and self.num_updates % every == 0)

    @property
    def save_due(self):
        return 0 < self.cfg.save_every <= self.num_updates - int(self.saved or 0)

    def start_update(self, state, lr):
        """-> the next Update, of this level"""
        if self.bar and self.num_updates == self.estimate_at - 2:
            self.bar.start_t = time.time()  # an evaluation at the start says nothing of updates
        self.update = Update(self.num_updates + 1, state, lr, self.cfg.max_draws)
        return self.update

    def take_back(self):
        """Undo an update that a signal or an error has ended. Weights that it has changed stay."""
        if self.update:
            self.update.take_back()
            self.half_done |= self.update.changed_policy

    def end_update(self, update):
        """Count and log. Raises Stop after MOST_BROKEN updates that met bad numbers."""
        self.update, self.half_done = None, True
        state, tokens = update.state, sum(row["tokens"] for row in update.rows)
        self.num_updates += 1
        state.count(self.num_updates, tokens, update.changed_policy, bool(update.fault))
        if update.fault:
            self.num_broken += 1
        elif update.steps:
            self.num_broken = 0
        self.evaluation_due = state.over or self.due(self.cfg.eval_every)
        self.log(update)
        self.half_done = False
        if self.bar:
            self.bar.update(self.progress - self.bar.n)
            if self.ranks.first and self.num_updates == self.estimate_at and self.progress < 1:
                tqdm.write(f"  two updates took, and the rest takes: {self.bar}")
        if self.num_broken == MOST_BROKEN:
            raise Stop(
                f"{MOST_BROKEN} updates in a row met numbers that are not finite (skipped ones do "
                "not count), the last time: "
                f"{update.fault}. {self.directory.last_good()}; lower --lr, or look at --reward"
            )

    # ------------------------------------------------------------------------------------- logs

    def log(self, update):
        """Write one update down, and tell of it."""
        row, written = update.row(), update.rows_to_write()
        row["completions_left_out"] = len(update.rows) - len(written)
        self.directory.append("completions.jsonl", written)
        self.directory.append("metrics.jsonl", [row])
        self.track(row)
        update.tell(row)
        entropy = row["entropy"]
        if math.isnan(entropy):
            return
        self.first_entropy = self.first_entropy or entropy
        if entropy < ENTROPY_COLLAPSE * self.first_entropy:
            tqdm.write(
                f"  entropy has collapsed from {self.first_entropy:.3f} to {entropy:.3f} nats a "
                "token: groups will become uniform and learning stop; lower --lr, or raise "
                "--temperature or --eps-high"
            )

    def add_evaluation(self, rows):
        """Write down and print the held-out accuracy of every bin."""
        self.evaluation_due = False
        now = {"update": self.num_updates, "tokens_sampled": self.tokens_sampled}
        rows = [now | row for row in rows]
        self.half_done = True
        self.directory.append("eval.jsonl", rows)
        self.track({f"held out, {name_level(row)}": row["accuracy"] for row in rows})
        self.half_done = False
        self.evaluations += rows
        for row in rows:
            text = "; ".join(f"{name} {value}" for name, value in results_of(row).items())
            tqdm.write(f"  held out, {text} of {row['n']} right after {self.num_updates} updates")

    def table(self):
        """Held-out accuracy of every bin (rows) before and after every level (columns)."""
        columns = {"before": 0}
        for state in self.levels:
            if state.last_update:
                columns[f"after level {state.number}"] = state.last_update
        rows = defaultdict(dict)  # name of a result -> {update: its text}
        for row in self.evaluations:
            for name, value in results_of(row).items():
                rows[name][row["update"]] = value
        width = max(map(len, ["held-out accuracy", *rows])) + 2
        lines = ["held-out accuracy".ljust(width) + "".join(f"{name:^24}" for name in columns)]
        for name, cells in rows.items():
            row = "".join(f"{cells.get(end, '-'):^24}" for end in columns.values())
            lines.append(name.ljust(width) + row)
        return "\n".join(lines)

    def start_tracker(self):
        """Raises ValueError"""
        name = self.cfg.tracker
        if name and self.ranks.first:
            with explained(f"--tracker {name}: cannot begin; is `pip install {name}` done?"):
                self.tracker = importlib.import_module(name)
                run = self.directory.out.name
                self.tracker.init(project="eprli", name=run, config=vars(self.cfg), resume="allow")

    def track(self, values):
        """None: the run is over. What goes wrong at the tracker is said, and does not end a run."""
        if not self.tracker:
            return
        try:
            if values is None:
                return self.tracker.finish()
            values = {name: value for name, value in values.items() if value == value}  # no nan
            self.tracker.log(values, step=self.num_updates)
        except Exception as error:  # of all kinds, from libraries and networks
            tqdm.write(f"--tracker: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------------------ checkpoints

    def save(self):
        """Write the state, unless it is on the disk, or the last good checkpoint is better: numbers
        are not finite. Every process must call. Raises Stop."""
        name = f"{self.num_updates:06d}"
        if name == self.saved or self.half_done or self.num_broken:
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
                        f"{self.directory.last_good()}"
                    )
            save_file(optimizer, folder / "optimizer.safetensors")
            if self.cfg.lora_rank:
                lora.save(self.policy.model, folder, self.directory.config)
            else:
                self.policy.model.save_pretrained(folder)
            self.policy.save(folder)
            state = pack(self) | {"sizes": self.directory.log_sizes()}
            (folder / "state.json").write_text(json.dumps(state, default=plain))

        def work():
            self.directory.write_checkpoint(name, write, self.cfg.keep_checkpoints)

        self.ranks.from_first(work, interruptible=False)
        self.saved = name

    def resume(self, checkpoint):
        """Take up the state of a checkpoint. -> {log: bytes it had then}"""
        state = json.loads((checkpoint / "state.json").read_text())
        unpack(self, state)
        self.learner.load(load_file(checkpoint / "optimizer.safetensors"))
        self.saved = checkpoint.name
        return state["sizes"]


def results_of(row):
    """{what: its mean and interval as text} of a row of eval.jsonl: accuracy; then R_l, its parts,
    and `late` if any was, where R_l is a function of the user's."""
    bin_name = name_level(row)
    results = {bin_name: "{accuracy:.1%} [{low:.1%}, {high:.1%}]".format(**row)}
    for name, values in row.get("means", {}).items():
        if name != "late" or values[0]:
            results[f"{bin_name}, {name}"] = shown(name, values)
    return results


def shown(name, measure):
    """A measure (mean, low, high) as text: `length` in tokens, R_l and its parts as they are, all
    others in per cent."""
    if name.startswith(("R_l", "part_")):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*measure)
    scale, unit = (1, "") if name == "length" else (100, " %")
    mean, low, high = (scale * value for value in measure)
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"


def pack(run):
    """Everything but weights, optimizer and logs, for json.dumps(..., default=plain)."""
    levels = []
    for state in run.levels:
        drawn, buffer = state.order.drawn, state.buffer
        level = {"drawn": drawn, "counts": buffer.counts, "groups": buffer.groups}
        levels.append(level | {name: getattr(state, name) for name in COUNTERS})
    return {"progress": {name: getattr(run, name) for name in SAVED}, "levels": levels}


def plain(value):
    """What JSON holds of a Group, its tensors and completions; a float comes back bit by bit."""
    return value.tolist() if isinstance(value, torch.Tensor) else vars(value)


def unpack(run, packed):
    """The inverse of `pack`, into a run that has just begun."""
    vars(run).update(packed["progress"])
    for state, level in zip(run.levels, packed["levels"], strict=True):
        state.order.drawn = level["drawn"]
        for name in COUNTERS:
            setattr(state, name, level[name])
        state.buffer.counts = Counter(level["counts"])
        for row in level["groups"]:
            row["completions"] = [Completion(**completion) for completion in row["completions"]]
            for name in ("outcome", "length_reward", "advantage"):
                row[name] = torch.tensor(row[name], dtype=torch.float64)
            state.buffer.groups.append(Group(**row))
