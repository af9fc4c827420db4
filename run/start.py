"""A run as it begins: a new one, or one that is resumed from its directory."""

import importlib.util
import os
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from files import sha256, source_of
from model import Transformer
from policy import packed
from policy.checkpoint import Policy, find_folder, is_shipped, weights_digest
from policy.learner import Learner
from rewards import Scorer
from run.directory import RunDirectory, checkpoints, create
from run.fit import Fit
from run.flags import LORA_RATE, LR, objective_line
from run.inputs import load_inputs, read_data
from run.log import Run
from run.tracker import Tracker


def start_run(cfg, ranks):
    """A new run. It makes its directory when all else has gone well.

    Raises ValueError or OSError, on all processes.
    """
    if cfg.out and ranks.from_first(lambda: os.path.lexists(cfg.out)):
        raise ValueError(
            f"--out {cfg.out}: exists already; name a new folder, or go on with --resume"
        )
    if cfg.tracker and not importlib.util.find_spec(cfg.tracker):
        raise ValueError(f"--tracker {cfg.tracker}: first `pip install {cfg.tracker}`")
    here = computing(ranks.from_first(packed.probe))
    levels, held_out, policy, facts = read_inputs(cfg, cfg.model, ranks)
    read = facts.pop("read") | {"--model": start_digest(policy.folder)}
    tqdm.write("; ".join(f"{name} {value}" for name, value in facts.items()))
    objective = objective_line(cfg, [state.level for state in levels])
    tqdm.write(objective)
    if cfg.lora_rank and is_shipped(cfg.model) and cfg.lr == LR:
        tqdm.write(f"--lr {cfg.lr:g} is a rate of full training. With --lora-rank {LORA_RATE}")
    config = {
        **with_full_paths(cfg),
        **facts,
        **here,
        # tools/report.html shows these four.
        "began": f"{datetime.now():%Y-%m-%d %H:%M}",
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "problems": [len(state.order.prompts) for state in levels],
        "objective": objective,
        "levels": [asdict(state.level) for state in levels],
        "read": read,
        "revision": None if Path(cfg.model).exists() else policy.folder.name,  # of the hub
    }
    out = ranks.from_first(lambda: create(cfg.out, config))
    directory = ranks.on_all(lambda: RunDirectory(out, ranks))
    try:
        return make_run(cfg, directory, ranks, levels, held_out, policy)
    except BaseException:  # nothing has begun: an error of the tracker, a GPU without memory
        if ranks.first:
            shutil.rmtree(out, ignore_errors=True)
        raise


def resume_run(cfg, config, ranks):
    """The run of a directory, from its newest checkpoint.

     1. run.flags.as_started has taken the flags from its config.json.
     2. Lock the directory. Nothing in it has been read but config.json.
     3. Find the newest checkpoint.
     4. Choose the kernels that the run began with, and say what else differs on this machine.
     5. Read data and policy as a new run does. Problems, prompts and rewards must be unchanged, and
        the starting model too, if it is still needed.
     6. Take up the state: counters, waiting groups, order of problems, optimizer.
     7. Cut the logs back to what they were at the checkpoint.

    What refuses to go on leaves the logs as they are: 7. checks all before it cuts one.

    config  its config.json
    Raises ValueError or OSError, on all processes.
    """
    directory = ranks.on_all(lambda: RunDirectory(cfg.out, ranks))  # locked before it is read
    checkpoint = ranks.from_first(lambda: next(iter(checkpoints(cfg.out)), None))
    for name, now in computing(config["kernels"]).items():
        if now != config[name]:
            tqdm.write(f"{name} {config[name]}, now {now}: the run is not bit for bit the same")
    model = checkpoint or cfg.model
    levels, held_out, policy, facts = read_inputs(cfg, model, ranks)
    read = config["read"] | facts["read"]
    if cfg.kl_coef or cfg.lora_rank or not checkpoint:
        read["--model"] = ranks.from_first(lambda: start_digest(find_folder(cfg.model)))
    must_be_unchanged(cfg.out, config["read"], read)
    run = make_run(cfg, directory, ranks, levels, held_out, policy)
    sizes = run.resume(checkpoint)
    ranks.from_first(lambda: directory.cut_logs(sizes))  # the last that may refuse
    tqdm.write(f"{cfg.out}: goes on after {checkpoint or 'nothing: there is no checkpoint'}")
    return run


def read_inputs(cfg, model, ranks):
    """`load_inputs`. The first process reads the problems and sends them to the others: each would
    parse a million rows on its own."""
    read = ranks.from_first(lambda: read_data(cfg))
    return ranks.on_all(lambda: load_inputs(cfg, model, ranks.device, read))


def make_run(cfg, directory, ranks, levels, held_out, policy):
    reference = None  # the starting policy's model, if the objective needs it
    if cfg.kl_coef and cfg.lora_rank:  # it has the same frozen weights
        with torch.device("meta"):
            reference = Transformer(policy.model.config)
        reference.load_state_dict(policy.model.state_dict(), strict=False, assign=True)
        reference.tie()
    elif cfg.kl_coef:
        reference = Policy.load(cfg.model, cfg.dtype, ranks.device, cfg).model
    learner, fit = Learner(policy.model, ranks, cfg.recompute), Fit(cfg, policy.model)
    scorer = Scorer(cfg)
    size = 0  # GB
    for weight, master in zip(learner.weights, learner.masters):  # and its two moments
        size += (weight.nbytes + master.nbytes * (2 + (weight.dtype != master.dtype))) / 1e9
    tqdm.write(
        f"a checkpoint of model and optimizer, every --save-every {cfg.save_every} updates, takes "
        f"{size:.3f} GB; --keep-checkpoints and one that is being written, "
        f"{(cfg.keep_checkpoints + 1) * size:.3f} GB"
    )
    run = Run(cfg, directory, ranks, policy, reference, learner, fit, scorer, levels, held_out)
    if cfg.tracker:
        run.tracker = ranks.on_all(lambda: ranks.first and Tracker(cfg, directory.out))
    return run


# -------------------------------------------------------------------------------------- config.json


def computing(choice):
    """What decides the bits of a run, beside its flags and inputs.  choice  see policy/packed.py"""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": packed.use(choice),
    }


def with_full_paths(cfg):
    """The flags, with paths that mean the same from any folder."""
    flags = asdict(cfg)
    if Path(cfg.model).exists():
        flags["model"] = str(Path(cfg.model).resolve())
    for name in ("data", "examples", "template"):
        flags[name] = full_path(flags[name])
    flags["eval_data"] = [full_path(path) for path in cfg.eval_data]
    flags["reward"] = [str(Path(r).resolve()) if ":" in r else r for r in cfg.reward]
    return flags


def full_path(name):
    """With the slice behind it. A name of the hub stays as it is."""
    source = source_of(name)
    if not (source and Path(source).exists()):
        return name
    return str(Path(source).absolute()) + name[len(source) :]  # ids hold a link's own name


def start_digest(folder):
    """Of the starting model, which is read again without a checkpoint, for the KL term, or as the
    frozen weights beside LoRA's factors."""
    return weights_digest(folder) + sha256(folder / "config.json")[:12]


def must_be_unchanged(run, before, now):
    """before, now  {name: digest}.  Raises ValueError"""
    for name in before:
        if now.get(name) != before[name]:
            raise ValueError(
                f"--resume {run}: {name} is gone, or is not what it was when the run began: put it "
                f"back, or start a new run from a checkpoint (--model {run}/checkpoints/...)"
            )
