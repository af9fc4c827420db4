"""How a run begins: a new one, or one that is resumed from its folder."""

import os
import shutil
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from policy import packed
from policy.attempt import Solver
from policy.checkpoint import Policy, find_folder, weights_digest
from policy.learner import Learner
from rewards import Scorer
from run.checkpoints import checkpoints, create, cut_logs, lock
from run.config import resolve, with_full_paths
from run.inputs import check_measured, default_slots, read_inputs, read_train_set, start_digest
from run.log import Log
from run.state import Run


def start_run(flags, ranks):
    """Return a new Run. It makes its folder once its inputs are read, and deletes it if the run
    cannot begin.

    flags  see run.config.parse
    Raises ValueError or OSError, on all processes.
    """
    if flags.out and ranks.from_first(lambda: os.path.lexists(flags.out)):
        raise ValueError(
            f"--out {flags.out}: exists already; name a new folder, or go on with --resume"
        )

    def read():
        train_set, counts = read_train_set(flags)
        cfg = resolve(flags, measured=any(p.pass_rate is not None for p in train_set))
        inputs = read_inputs(cfg, train_set, cfg.model, ranks.device)
        check_measured(cfg, train_set, weights_digest(inputs.policy.folder))
        return cfg, inputs, counts

    cfg, inputs, counts = ranks.on_all(read)
    if not cfg.slots:
        fitting = ranks.gather(default_slots(inputs))
        cfg = replace(cfg, slots=[min(of_level) for of_level in zip(*fitting)])
    cfg = with_full_paths(cfg)
    config = {
        **asdict(cfg),
        **computing(cfg),
        "began": f"{datetime.now():%Y-%m-%d %H:%M}",
        "parameters": sum(p.numel() for p in inputs.policy.model.parameters()),
        "problems": [len(state.order.prompts) for state in inputs.levels],
        **counts,
        "left_out": inputs.left_out,
        "read": inputs.read | {"--model": start_digest(inputs.policy.folder)},
    }
    out = ranks.from_first(lambda: create(cfg.out, config))
    cfg = replace(cfg, out=str(out))
    try:
        locked = ranks.on_all(lambda: ranks.first and lock(out / "config.json"))
        return make_run(cfg, inputs, ranks, locked)
    except BaseException:  # nothing has begun: an error of the tracker, a GPU without memory
        if ranks.first:
            shutil.rmtree(out, ignore_errors=True)
        raise


def resume_run(cfg, config, ranks):
    """Return the Run of a folder, from its newest checkpoint.

     1. run.config.as_started has taken the Config from its config.json.
     2. Lock the folder. Nothing in it has been read but config.json.
     3. Find the newest checkpoint.
     4. Print what differs on this machine.
     5. Read data and policy as a new run does. Problems, prompts and rewards must be unchanged, and
        the starting model too, if it is still needed.
     6. Restore the state: counters, waiting groups, order of problems, optimizer.
     7. Cut the logs back to what they were at the checkpoint.

    What refuses to go on leaves the logs as they are: 7. checks all before it cuts one.

    config  its config.json
    Raises ValueError or OSError, on all processes.
    """
    out = Path(cfg.out)
    locked = ranks.on_all(lambda: ranks.first and lock(out / "config.json"))
    checkpoint = ranks.from_first(lambda: next(iter(checkpoints(out)), None))
    for name, now in computing(cfg).items():
        if now != config.get(name):
            tqdm.write(f"{name} {config.get(name)}, now {now}: the run is not bit for bit the same")

    def read():
        train_set, _ = read_train_set(cfg)
        inputs = read_inputs(cfg, train_set, checkpoint or cfg.model, ranks.device)
        read = inputs.read
        if cfg.kl_coef or cfg.lora_rank or not checkpoint:
            read["--model"] = start_digest(find_folder(cfg.model))
        for name, before in config["read"].items():
            if read.get(name, before) != before:
                raise ValueError(
                    f"--resume {out}: {name} is not what it was when the run began: put it back, "
                    f"or start a new run from a checkpoint (--model {out}/checkpoints/...)"
                )
        return inputs

    run = make_run(cfg, ranks.on_all(read), ranks, locked)
    if checkpoint:
        run.restore(checkpoint)
    sizes = run.log_sizes if checkpoint else None
    ranks.from_first(lambda: cut_logs(out, sizes))  # the last that may refuse
    tqdm.write(f"{out}: goes on after {checkpoint or 'nothing: there is no checkpoint'}")
    return run


def make_run(cfg, inputs, ranks, locked):
    """Return the Run of these Inputs.  locked: the open config.json of its folder, see `lock`"""
    out = Path(cfg.out)
    if ranks.first:
        (out / "checkpoints").mkdir(exist_ok=True)
    reference = None  # the starting policy's model, if the objective needs it
    if cfg.kl_coef:
        reference = Policy.load(cfg.model, cfg.dtype, ranks.device).model
    learner = Learner(inputs.policy.model, ranks)
    solver = Solver(inputs.policy, Scorer(cfg.reward_timeout), show_progress=ranks.first)
    return Run(
        cfg=cfg,
        out=out,
        locked=locked,
        ranks=ranks,
        policy=inputs.policy,
        reference=reference,
        learner=learner,
        solver=solver,
        levels=inputs.levels,
        held_out=inputs.held_out,
        log=ranks.on_all(lambda: Log(cfg, out, ranks)),
    )


def computing(cfg):
    """Return what decides the bits of a run, beside its flags and inputs."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "packed": packed.has_kernel(getattr(torch, cfg.dtype)),
    }
