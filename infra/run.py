"""The run directory: what a run leaves behind, and what it goes on from after any end.

    config.json                         every flag, resolved; it comes into being with the directory
    metrics.jsonl, eval.jsonl, completions.jsonl        appended to; README.md defines the keys
    broken/000123.jsonl                 completions of an update that met a number that is not finite
    checkpoints/000123/                 after 123 updates (000123+002.001: and 2 draws and 1 step of the next)
        config.json, model.safetensors, tokenizer ...   a Hugging Face folder
        optimizer.safetensors           AdamW's moments and float32 masters, by the names of the parameters
        buffer.safetensors, state.json  the groups that wait; all other state, the sizes of the three logs among it
        checksums.json                  SHA-256 of all of these; a folder without it is not whole

A checkpoint is written elsewhere, forced to the disk and renamed, so a kill at any moment leaves the last one. Tensors are
whole, whatever number of processes wrote them, and any number can go on from them.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import GenerationConfig

from eprli import Group
from infra.ranks import Stop
from rewards import ERROR, RIGHT, TIMEOUT, writes_steps
from rollout import Completion

LOGS = ("metrics.jsonl", "eval.jsonl", "completions.jsonl")
MOST_FAILURES = 0.05  # share of an update's completions on which the grader may fail without a word
ENTROPY_COLLAPSE = 0.05  # of the entropy of the run's first update
CHECKPOINT = re.compile(r"\d{6,}(\+\d{3,}\.\d{3,})?")


# ------------------------------------------------------------------------------------------------------- one update


@dataclass
class Stats:
    """What happens in one update: the makings of its line of metrics.jsonl. Plain numbers and texts, so that an update
    in progress is part of a checkpoint."""

    update: int
    level: int
    counts_before: dict  # fates of the buffer's groups
    lr: float
    draws: int = 0
    rows: list = field(default_factory=list)  # of completions.jsonl, one per completion drawn
    seconds: Counter = field(default_factory=Counter)
    sums: Counter = field(
        default_factory=Counter
    )  # over the tokens trained on, and the steps' objectives
    grad_norms: list = field(default_factory=list)  # one per optimizer step done
    ratio_max: float | None = None
    gap_max: float | None = None
    trouble: str | None = None  # which number was not finite

    def __post_init__(self):
        self.seconds, self.sums, self.start = (
            Counter(self.seconds),
            Counter(self.sums),
            time.perf_counter(),
        )

    def state(self):
        return {k: v for k, v in vars(self).items() if k != "start"}

    def learned(self, grad_norm, sums, peaks):
        """One optimizer step was taken."""
        self.grad_norms.append(grad_norm)
        self.sums.update(sums)
        self.ratio_max = max(self.ratio_max or 0.0, peaks["ratio_max"])
        if sums["fresh"]:
            self.gap_max = max(self.gap_max or 0.0, peaks["gap_max"])

    def row(self, buffer):
        """Its line of metrics.jsonl."""
        seconds, n = time.perf_counter() - self.start, len(self.rows)
        nan = lambda x: float("nan") if x is None else x  # noqa: E731  a reward that was not finite
        reward = torch.tensor(
            [nan(r["outcome"]) + nan(r["length_reward"]) for r in self.rows], dtype=torch.float64
        )
        sampled = sum(r["tokens"] for r in self.rows)
        mean = lambda values: sum(values) / n if n else None  # noqa: E731  over completions drawn
        per = lambda name, what: self.sums[name] / self.sums[what] if self.sums[what] else None  # noqa: E731
        steps = len(self.grad_norms)
        fates = ("drawn", "kept", "all_right", "all_wrong", "broken", "stale")
        row = {
            "update": self.update,
            "level": self.level,
            "accuracy": mean(r["verdict"] == RIGHT for r in self.rows),
            "reward_mean": mean(reward.tolist()),
            "reward_std": reward.std(correction=0).item() if n else None,
            "outcome_mean": mean(nan(r["outcome"]) for r in self.rows),
            "length_reward_mean": mean(nan(r["length_reward"]) for r in self.rows),
            "length_mean": mean(r["tokens"] for r in self.rows),
            "truncated_share": mean(not r["stopped"] for r in self.rows),
            "writes_steps_share": mean(writes_steps(r["text"]) for r in self.rows),
            **{
                f"grader_{kind}s": sum(r["verdict"] == kind for r in self.rows)
                for kind in (TIMEOUT, ERROR)
            },
            **{
                f"groups_{fate}": buffer.counts[fate] - self.counts_before.get(fate, 0)
                for fate in fates
            },
            "groups_pending": buffer.pending,
            "objective": self.sums["objective"] / steps if steps else None,
            "entropy": per("entropy", "tokens"),
            "clip_low_share": per("clip_low", "tokens"),
            "clip_high_share": per("clip_high", "tokens"),
            "ratio_max": self.ratio_max,
            "kl_old": per("kl_old", "tokens"),
            "logprob_gap_max": self.gap_max,
            "logprob_gap_mean": per("gap", "fresh"),
            "grad_norm": sum(self.grad_norms) / steps if steps else None,
            "lr": self.lr,
            "tokens_sampled": sampled,
            "tokens_trained": int(self.sums["tokens"]),
            **{f"{phase}_seconds": self.seconds[phase] for phase in ("sample", "grade", "learn")},
            "tokens_per_second": sampled / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        return {
            k: None if isinstance(v, float) and not -float("inf") < v < float("inf") else v
            for k, v in row.items()
        }


def peak_memory_mb():
    """Of the GPU where there is one, else of this process (Linux counts in KiB, macOS in bytes)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


# ---------------------------------------------------------------------------------------------------------- the run


class Run:
    """One run's directory, in the hands of one run at a time: its first process writes, the others only follow."""

    def __init__(self, out, ranks, keep):
        self.out, self.ranks, self.keep, self.saved, self.bar = Path(out), ranks, keep, None, None
        self.evaluations, self.first_entropy = [], None
        self.torn = False  # a log lacks lines, so that no checkpoint may count on it
        if ranks.first:
            self.lock = open(
                self.out / "config.json"
            )  # held until this process ends, however it ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{out}: another process is writing to this run") from error

    @staticmethod
    def create(out, config):
        """Make the directory with its config.json, both or neither."""
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.parent / f".{out.name}.{os.getpid()}"
        try:
            (part / "checkpoints").mkdir(parents=True)
            (part / "config.json").write_text(json.dumps(config, indent=1))
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def begin(self, done, total):
        self.bar = tqdm(
            initial=done, total=total, unit="update", smoothing=0.1, disable=not self.ranks.first
        )

    def append(self, name, rows):
        """Lines are written at once and whole."""
        self._put(
            self.out / name,
            "a",
            "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows),
        )

    def _put(self, path, mode, text):
        """Let the first process write; what goes wrong ends the run on all."""

        def write():
            if self.ranks.first:
                path.parent.mkdir(exist_ok=True)
                with open(path, mode, encoding="utf-8") as file:
                    file.write(text)

        try:
            self.ranks.together(write, interruptible=False)
        except OSError as error:
            raise Stop(
                f"{path} cannot be written ({error}); {self.last_good()}. Free space, then go on with --resume {self.out}"
            ) from None

    def keep_broken(self, stats, groups):
        """broken/000123.jsonl: every completion of the groups, with what it takes to see which number was not finite."""
        plain = lambda values: [v if abs(v) < float("inf") else str(v) for v in values]  # noqa: E731  JSON knows no nan
        rows = [
            {
                "reason": stats.trouble,
                "prompt": group.prompt,
                "tokens": c.tokens,
                "stopped": c.stopped,
                "logprobs": plain(c.logprobs),
                "outcome": outcome,
                "length_reward": length,
            }
            for group in groups
            for c, outcome, length in zip(
                group.completions,
                plain(group.outcome.tolist()),
                plain(group.length_reward.tolist()),
            )
        ]
        self._put(
            self.out / "broken" / f"{stats.update:06d}.jsonl",
            "w",
            "".join(json.dumps(row) + "\n" for row in rows),
        )

    # ---------------------------------------------------------------------------------------------- checkpoints

    def save(self, progress, stages, policy, learner):
        """Write the state as it is, unless it is on the disk. Every process must call; raises Stop if it cannot be done."""
        stats = progress.stats
        begun = stats and (stats.draws or stats.grad_norms)
        name = f"{progress.update:06d}" + (
            f"+{stats.draws:03d}.{len(stats.grad_norms):03d}" if begun else ""
        )
        if name == self.saved or self.torn:
            return
        tensors = {
            n: t.cpu() for n, t in learner.tensors() if self.ranks.first
        }  # all processes gather, one keeps

        def write():
            if self.ranks.first:
                self._write(name, tensors, progress, stages, policy)

        self.ranks.together(write, interruptible=False)
        self.saved = name
        for old in checkpoints(self.out)[self.keep :] if self.ranks.first else ():
            shutil.rmtree(old, ignore_errors=True)  # what is left of it is tried again next time

    def _write(self, name, tensors, progress, stages, policy):
        bad = [
            n
            for n, t in itertools.chain(policy.model.named_parameters(), tensors.items())
            if not t.isfinite().all()
        ]
        if bad:
            raise Stop(
                f"the weights are no longer finite ({bad[0]} and {len(bad) - 1} more), so they are not saved; {self.last_good()}"
            )
        part = self.out / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
        try:
            policy.model.save_pretrained(part)
            policy.tokenizer.save_pretrained(part)
            GenerationConfig(
                eos_token_id=list(policy.stop_ids), pad_token_id=policy.tokenizer.pad_token_id
            ).save_pretrained(part)
            save_file(tensors, part / "optimizer.safetensors")
            state, waiting = pack(progress, stages)
            save_file(waiting, part / "buffer.safetensors")
            for log in LOGS:
                if (self.out / log).exists():
                    flush(self.out / log)
                    state["sizes"][log] = (self.out / log).stat().st_size
            (part / "state.json").write_text(json.dumps(state))
            (part / "checksums.json").write_text(
                json.dumps({p.name: sha256(p) for p in sorted(part.iterdir())}, indent=1)
            )
            for path in (*part.iterdir(), part):
                flush(path)
            part.rename(self.out / "checkpoints" / name)
            flush(self.out / "checkpoints")
        except Exception as error:  # OSError, SafetensorError, and the bare Exception of tokenizers
            shutil.rmtree(part, ignore_errors=True)  # frees what it took of a full disk
            raise Stop(
                f"checkpoint {name} cannot be written ({error}); {self.last_good()}. Free space, then go on "
                f"with --resume {self.out}"
            ) from None

    def last_good(self):
        last = checkpoints(self.out)[:1]
        return (
            f"the last good checkpoint is {last[0]}" if last else "no checkpoint was written before"
        )

    def resume(self, path, progress, stages, learner):
        """Take up the state of a checkpoint (None: the beginning), and cut the logs back to it."""
        state = {"sizes": {}}
        if path:
            state = json.loads((path / "state.json").read_text())
            unpack(state, load_file(path / "buffer.safetensors"), progress, stages)
            learner.load(load_file(path / "optimizer.safetensors"))
            self.saved = path.name
        self.ranks.together(lambda: self._cut(state["sizes"]))  # before the others read
        self.evaluations = self._read("eval.jsonl")
        self.first_entropy = next(
            (row["entropy"] for row in self._read("metrics.jsonl") if row["entropy"] is not None),
            None,
        )

    def _cut(self, sizes):
        """Cut the logs back to the bytes that they had when a checkpoint was written."""
        logs = {self.out / log: sizes.get(log, 0) for log in LOGS} if self.ranks.first else {}
        for path, size in logs.items():
            held = path.stat().st_size if path.exists() else 0
            if held < size:
                raise ValueError(
                    f"{path}: {held} bytes, but the checkpoint was written after {size}: lines were lost"
                )
        for path, size in logs.items():  # once all are known to be long enough
            if size:
                os.truncate(path, size)
            else:
                path.unlink(missing_ok=True)

    def _read(self, name):
        path = self.out / name
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            if path.exists()
            else []
        )

    # ------------------------------------------------------------------------------------------------ for people

    def log(self, stats, stage):
        """Write down one update, and print its line and whatever a person should hear of."""
        self.torn = True  # until it is written down, whatever happens
        row = stats.row(stage.buffer)
        self.append("completions.jsonl", stats.rows)
        self.append("metrics.jsonl", [row])
        self.torn = False
        self.bar.update()
        number = lambda name, spec: "-" if row[name] is None else format(row[name], spec)  # noqa: E731
        tqdm.write(
            f"level {stage.number} update {stage.updates}/{stage.level.updates} | reward {number('reward_mean', '.3f')} = "
            f"right {number('outcome_mean', '.3f')} + length {number('length_reward_mean', '.3f')} | "
            f"{number('length_mean', '.0f')} tok, {number('truncated_share', '.0%')} cut off | groups {row['groups_kept']} of "
            f"{row['groups_drawn']} drawn, {row['groups_all_right']} all right, {row['groups_all_wrong']} all wrong | "
            f"clipped {number('clip_low_share', '.1%')} + {number('clip_high_share', '.1%')} | kl {number('kl_old', '.0e')} | "
            f"entropy {number('entropy', '.2f')} | grad {number('grad_norm', '.2f')} | {row['tokens_per_second']:,.0f} tok/s"
        )
        failures = row["grader_timeouts"] + row["grader_errors"]
        if failures > MOST_FAILURES * len(stats.rows):
            tqdm.write(
                f"  the grader gave up on {failures} of {len(stats.rows)} completions, which count as wrong: look for the verdicts "
                f'"{TIMEOUT}" and "{ERROR}" in {self.out / "completions.jsonl"}'
            )
        if stats.trouble:
            tqdm.write(
                f"  update {stats.update} given up: {stats.trouble}; its completions are in {self.out / 'broken'}"
            )
        elif not stats.grad_norms:
            tqdm.write(
                f"  update {stats.update} skipped: {unfilled(row, stage.level, stats.draws)}"
            )
        if row["entropy"] is not None:
            if self.first_entropy is None:
                self.first_entropy = row["entropy"]
            elif row["entropy"] < ENTROPY_COLLAPSE * self.first_entropy:
                tqdm.write(
                    f"  entropy has collapsed from {self.first_entropy:.3f} to {row['entropy']:.3f} nats a token: groups will become "
                    "uniform and learning stop; lower --lr, or raise --temperature or --eps-high"
                )

    def evaluated(self, row):
        """Write down and print the held-out accuracy of one level."""
        best = max(
            (e for e in self.evaluations if e["level"] == row["level"]),
            key=lambda e: e["accuracy"],
            default=row,
        )
        self.evaluations.append(row)
        self.torn = True
        self.append("eval.jsonl", [row])
        self.torn = False
        tqdm.write(
            "  held out, level {level}: {accuracy:.1%} [{low:.1%}, {high:.1%}] of {n} right after {update} updates".format(
                **row
            )
        )
        if row["high"] < best["low"]:
            tqdm.write(
                f"  level {row['level']} is being forgotten: it was at {best['accuracy']:.1%} after {best['update']} updates, and the "
                "intervals do not meet; give this level fewer --updates, or take turns (--schedule interleaved)"
            )

    def table(self, stages, schedule):
        """Held-out accuracy of every level (rows) before and after every level (columns), with 95 % intervals."""
        ends = list(itertools.accumulate((stage.updates for stage in stages), initial=0))
        names = ["before", *(f"after level {stage.number}" for stage in stages)]
        if schedule == "interleaved":
            ends, names = [0, ends[-1]], ["before", "after"]
        show = "{accuracy:.1%} [{low:.1%}, {high:.1%}]"
        cells = {(row["update"], row["level"]): show.format(**row) for row in self.evaluations}
        lines = ["held-out accuracy  " + "".join(f"{name:^24}" for name in names)]
        for stage in stages:
            lines.append(
                f"level {stage.number:<13}"
                + "".join(f"{cells.get((end, stage.number), '-'):^24}" for end in ends)
            )
        return "\n".join(lines)


def unfilled(row, level, draws):
    """What was seen in draws that did not fill the buffer, and what to change."""
    drawn, right, wrong, cut = (
        row["groups_drawn"],
        row["groups_all_right"],
        row["groups_all_wrong"],
        row["truncated_share"] or 0.0,
    )
    seen = (
        f"{draws} draws of {level.prompts} prompts did not fill the buffer of {level.buffer_groups}: of {drawn} groups {right} were all "
        f"right and {wrong} all wrong; {cut:.0%} of the completions were cut off. "
    )
    if right + wrong < drawn / 2:
        return seen + "Most groups would serve: raise --max-draws or --prompts"
    if right > wrong:
        return (
            seen
            + "The level is too easy: raise --quality, or measure the problems' pass rates anew"
        )
    if cut > 0.5:
        return (
            seen
            + f"Completions do not come to an end: raise --max-new-tokens (now {level.max_new_tokens})"
        )
    return seen + "The level is too hard: lower --quality, show --examples, or raise --group-size"


def checkpoints(out):
    """Folders of checkpoints, newest first; whether they are whole is another question."""
    found = [p for p in (out / "checkpoints").iterdir() if CHECKPOINT.fullmatch(p.name)]
    return sorted(
        found, key=lambda p: [int(number) for number in re.findall(r"\d+", p.name)], reverse=True
    )


def newest_whole(out):
    """The newest checkpoint whose files are what was written; None if none was ever made. Newer ones are put aside, aloud."""
    damaged = {}
    for path in checkpoints(out):
        damaged[path] = damage(path)
        if damaged[path] is None:
            break
    else:
        if damaged:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
            raise ValueError(
                f"{out}: no checkpoint is whole ({reasons}); to start over, start a new run"
            )
        return None
    for newer, reason in list(damaged.items())[:-1]:
        aside = newer.with_name(newer.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        newer.rename(aside)
        tqdm.write(f"{newer}: skipped, it is damaged ({reason}); it is now {aside.name}")
    return path


def damage(path):
    """What is wrong with a checkpoint, or None: every file must have the checksum that was written with it."""
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name in (
            "model.safetensors",
            "optimizer.safetensors",
            "buffer.safetensors",
            "state.json",
        ):
            if name not in sums:
                return f"checksums.json does not list {name}"
        return next(
            (
                f"{name} is not what was written"
                for name, digest in sums.items()
                if sha256(path / name) != digest
            ),
            None,
        )
    except (FileNotFoundError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def flush(path):
    """Force a file or a folder to the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ state


def pack(progress, stages):
    """Everything but weights and optimizer -> (what JSON holds, tensors of the completions that wait)."""
    groups = [g for stage in stages for g in stage.buffer.groups]
    waiting = [c for g in groups for c in g.completions]
    tensors = {
        "tokens": torch.tensor([t for c in waiting for t in c.tokens], dtype=torch.int64),
        "logprobs": torch.tensor([x for c in waiting for x in c.logprobs], dtype=torch.float64),
    }
    levels = [
        {
            "drawn": stage.drawn,
            "updates": stage.updates,
            "skipped": stage.skipped,
            "counts": stage.buffer.counts,
            "groups": [
                {
                    "prompt": g.prompt,
                    "outcome": g.outcome.tolist(),
                    "length_reward": g.length_reward.tolist(),
                    "update": g.update,
                    "lengths": [len(c.tokens) for c in g.completions],
                    "stopped": [c.stopped for c in g.completions],
                }
                for g in stage.buffer.groups
            ],
        }
        for stage in stages
    ]
    stats = progress.stats and progress.stats.state()
    return {"progress": {**vars(progress), "stats": stats}, "levels": levels, "sizes": {}}, tensors


def unpack(state, tensors, progress, stages):
    """The inverse of `pack`, into fresh progress and stages; draws that were made are skipped."""
    for name, value in state["progress"].items():
        setattr(progress, name, value)
    progress.stats = progress.stats and Stats(**progress.stats)
    tokens, logprobs = iter(tensors["tokens"].tolist()), iter(tensors["logprobs"].tolist())
    take = lambda values, n: [next(values) for _ in range(n)]  # noqa: E731
    for stage, level in zip(stages, state["levels"], strict=True):
        stage.skip(level["drawn"])
        stage.updates, stage.skipped = level["updates"], level["skipped"]
        stage.buffer.counts = Counter(level["counts"])
        stage.buffer.groups = [
            Group(
                prompt=g["prompt"],
                outcome=torch.tensor(g["outcome"], dtype=torch.float64),
                length_reward=torch.tensor(g["length_reward"], dtype=torch.float64),
                update=g["update"],
                completions=[
                    Completion(take(tokens, n), take(logprobs, n), s)
                    for n, s in zip(g["lengths"], g["stopped"])
                ],
            )
            for g in level["groups"]
        ]
