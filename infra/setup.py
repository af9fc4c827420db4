"""From a command line to a run, and from the end of a run to an exit code."""

import contextlib
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import data
from eprli import Buffer
from eval import SHIPPED, Policy
from infra import kernels
from infra.directory import RunDirectory, sha256
from infra.flags import (
    MAY_CHANGE,
    Config,
    check,
    explain,
    given_flags,
    make_parser,
    option,
    resolve_levels,
)
from infra.optimizer import Learner
from infra.ranks import Ranks, Stop
from infra.run import Run, Stage
from rewards import Grader, load_reward

# --------------------------------------------------------------------------------------- the flags


def read_flags(parser, arguments):
    """-> Config, config.json of the run to resume or None.  Raises ValueError"""
    cfg, config = Config(**vars(parser.parse_args(arguments))), None
    if cfg.resume is not None:
        cfg, config = as_started(given_flags(parser, arguments))
    check(cfg)
    return cfg, config


def as_started(given):
    """The flags of the run that is to be resumed, with those given now. -> Config, config.json"""
    run = given["resume"]
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {name: config[name] for name in vars(Config())}
        if not all(config[name] for name in ("inputs", "model_files", "kernels", "torch")):
            raise KeyError("inputs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"({type(error).__name__}: {error})"
        raise ValueError(f"--resume {run}: {path} is not that of a run {reason}") from error
    for name in given:
        if name not in (*MAY_CHANGE, "resume"):
            raise ValueError(
                f"--resume goes on with the flags of {run}, and {option(name)} is not one that may "
                f"differ ({' '.join(map(option, MAY_CHANGE))}): leave it out, or start a new run "
                f"from a checkpoint (--model {run}/checkpoints/...)"
            )
    return Config(**{**flags, **given, "out": run, "explain": False, "plan": False}), config


# ------------------------------------------------------------------------------------------- data


class Problems:
    """What a run trains on and is evaluated on, before any model is loaded."""

    def __init__(self, cfg):
        shipped = Path(cfg.data).resolve() == (SHIPPED / "train.jsonl").resolve()
        if shipped and not cfg.eval_data:
            cfg = replace(cfg, eval_data=str(SHIPPED / "heldout.jsonl"))
        found = data.read_problems(cfg.data)
        self.cfg, self.train = cfg, data.without_repeats(found)
        self.repeats = len(found) - len(self.train)
        self.held_out = data.read_problems(cfg.eval_data) if cfg.eval_data else []
        measured = any(p.pass_rate is not None for p in self.train)
        self.levels = resolve_levels(cfg, measured)

    def cut(self, name, problems):
        """-> a list of problems for each level, counts of those that belong to none"""
        unknown = [data.difficulty(p, self.cfg.difficulty) is None for p in problems]
        if problems and all(unknown):
            what = self.cfg.difficulty
            tqdm.write(f"{name}: no problem has a {what}, so all of them stand for every level")
            return [problems] * len(self.levels), {}
        qualities = [level.quality for level in self.levels]
        return data.cut_levels(problems, qualities, self.cfg.difficulty)


def make_stages(problems, policy):
    """Cut the levels and render everything before minutes are spent. -> stages, facts"""
    cfg, levels = problems.cfg, problems.levels
    train_sets, left_out = problems.cut(cfg.data, problems.train)
    held_out_sets, eval_left_out = problems.cut(cfg.eval_data, problems.held_out)
    if problems.held_out and not any(held_out_sets):
        raise ValueError(
            f"{cfg.eval_data}: no problem falls into any level (left out: {eval_left_out}); "
            "see --quality"
        )
    stages, too_long = [], 0
    for number, (level, train_set, held_out) in enumerate(
        zip(levels, train_sets, held_out_sets), 1
    ):
        reward = load_reward(level.reward)
        if not train_set:
            raise ValueError(
                f"level {number} (Q = {level.quality:g}) has no problem: choose another --quality "
                f"({cfg.data} left out: {left_out})"
            )
        rendered = policy.render(train_set)
        prompts = [p for p in rendered if policy.room(p)]
        too_long += len(rendered) - len(prompts)
        if not prompts:
            context = f"the context of {policy.model.context} tokens"
            raise ValueError(f"level {number}: every prompt is longer than {context}")
        order, buffer = data.endless(prompts, cfg.seed, number), Buffer(cfg.filter == "all")
        stages.append(Stage(number, level, order, policy.render(held_out), reward, buffer))
        tqdm.write(
            f"level {number}: difficulty up to {level.quality:g}, {len(prompts)} problems, "
            f"{len(held_out)} held out"
        )
    qualities = [level.quality for level in levels]
    if qualities != sorted(qualities):
        tqdm.write(
            'Q decreases: the harder level trains first. The paper says both "Q1 < Q2" and '
            '"Q_{l-1} > Q_l"; see eprli.py'
        )
    exact, near = data.overlap(problems.train, problems.held_out)
    facts = {"repeats_removed": problems.repeats, "overlap_with_eval": len(exact)}
    facts |= {"near_overlap_with_eval": len(near), "prompts_too_long": too_long}
    return stages, facts | {"left_out": left_out, "eval_left_out": eval_left_out}


# ------------------------------------------------------------------------------------ config.json


def hashes(paths):
    return {str(path.resolve()): sha256(path) for path in paths}


def input_files(cfg):
    """The files that a run reads beside its model: a resumed run must read the same."""
    names = [cfg.data, cfg.eval_data, cfg.examples, *(r.rpartition(":")[0] for r in cfg.reward)]
    return [Path(name) for name in names if name and Path(name).is_file()]


def model_files(folder):
    endings = (".safetensors", ".json", ".jinja")
    return [path for path in sorted(folder.iterdir()) if path.suffix in endings]


def must_be_unchanged(run, files):
    for name, digest in files.items():
        if not Path(name).is_file() or sha256(name) != digest:
            raise ValueError(
                f"--resume {run}: {name} is gone, or is not what it was when the run began: put it "
                f"back, or start a new run from a checkpoint (--model {run}/checkpoints/...)"
            )


def with_full_paths(cfg):
    """With paths that mean the same from any folder."""
    flags = asdict(cfg)
    for name in ("model", "data", "eval_data", "examples"):
        if flags[name] and Path(flags[name]).exists():
            flags[name] = str(Path(flags[name]).resolve())
    for i, reward in enumerate(cfg.reward):
        path, _, function = reward.rpartition(":")
        if path:
            flags["reward"][i] = f"{Path(path).resolve()}:{function}"
    return flags


# --------------------------------------------------------------------------------------- a new run


def prepare(cfg, config, ranks):
    """Read, check and load everything; make or take up the run directory. -> Run, or None

    config  config.json of the run that is to be resumed, or None
    Raises ValueError or OSError, on all processes.
    """
    if config:
        ranks.together(lambda: must_be_unchanged(cfg.resume, config["inputs"]))
    problems = ranks.together(lambda: Problems(cfg))
    cfg = problems.cfg
    if cfg.explain:
        return print(explain(cfg, problems.levels))
    out = Path(cfg.out or ranks.from_first(lambda: f"runs/{datetime.now():%Y%m%d-%H%M%S}"))
    directory = checkpoint = None
    if config:
        directory = ranks.together(lambda: RunDirectory(out, ranks))  # locked before it is read
        checkpoint = ranks.from_first(directory.newest_whole)
    elif ranks.from_first(lambda: os.path.lexists(out)):
        raise ValueError(f"--out {out}: exists already; name a new folder, or go on with --resume")
    used = choose_kernels(config, ranks)
    loaded = ranks.together(lambda: load(problems, config, checkpoint, ranks.device))
    policy, reference, stages, facts = loaded
    tqdm.write("; ".join(f"{name} {value}" for name, value in facts.items()))
    if not config:
        facts["levels"] = [asdict(level) for level in problems.levels]
        facts |= {"kernels": used, "inputs": hashes(input_files(cfg))}
        facts["model_files"] = hashes(model_files(policy.folder))
        new = {**with_full_paths(cfg), "out": str(out), **facts}
        ranks.from_first(lambda: RunDirectory.create(out, new))
        directory = ranks.together(lambda: RunDirectory(out, ranks))
    learner = Learner(policy.model, ranks, cfg.recompute)
    grader = Grader(allow_last_number=cfg.allow_last_number)
    run = Run(cfg, directory, ranks, policy, reference, learner, grader, stages)
    if config:
        run.resume(checkpoint)
        tqdm.write(f"{out}: goes on after {checkpoint or 'nothing: there is no checkpoint'}")
        if config["torch"] != torch.__version__:
            versions = f"torch {config['torch']}, this is {torch.__version__}"
            tqdm.write(f"the run began with {versions}: it goes on, but not bit for bit")
    return run


def choose_kernels(config, ranks):
    """The first process asks once what is fastest; all processes and every --resume keep it."""
    wanted = config["kernels"] if config else ranks.from_first(kernels.probe)
    used = kernels.use(wanted)
    if used != wanted:
        tqdm.write(f"of the kernels {wanted} this machine has {used}: not bit for bit the same")
    return used


def load(problems, config, checkpoint, device):
    """-> Policy, the starting policy's model if the objective needs it, stages, facts"""
    cfg = problems.cfg
    if config and (cfg.kl_coef or not checkpoint):
        must_be_unchanged(cfg.resume, config["model_files"])
    policy = Policy.load(str(checkpoint or cfg.model), cfg.dtype, device, cfg.examples)
    reference = Policy.load(cfg.model, cfg.dtype, device).model if cfg.kl_coef else None
    stages, facts = make_stages(problems, policy)
    return policy, reference, stages, {**facts, "torch": torch.__version__}


def memory_table(cfg):
    """The table of --plan: only the data, the tokenizer and the model's config are read."""
    from tools import plan

    problems = Problems(cfg)
    held_out = problems.held_out if cfg.eval_every != 0 else []
    policy = Policy.load(cfg.model, cfg.dtype, "meta", cfg.examples)
    prompts = [p for p in policy.render(problems.train + held_out) if policy.room(p)]
    if not prompts:
        raise ValueError(
            f"every prompt is longer than the context of {policy.model.context} tokens"
        )
    longest = max(len(p.tokens) for p in prompts)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    levels = problems.levels
    return plan.table(plan.plan(cfg, levels, policy.model, longest, len(held_out), processes))


# ----------------------------------------------------------------------------------------- the end


def carry_out(train, arguments):
    """Set a run up, let `train` work on it, and leave with an exit code that says how it ended."""
    parser = make_parser()
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        if not first:  # one process speaks
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            cfg, config = read_flags(parser, arguments)
            if cfg.plan:
                return print(memory_table(cfg))
            ranks = stack.enter_context(Ranks(cfg.device, cfg.fsdp))
            run = prepare(cfg, config, ranks)
        except (ValueError, OSError) as error:
            words = f"{parser.prog}: error: {data.squash(str(error))}\n"
            parser.exit(2, words if first else None)
        except KeyboardInterrupt:
            words = f"{parser.prog}: interrupted before the run began\n"
            parser.exit(128 + signal.SIGINT, words if first else None)
        if run:
            code = conduct(train, run)
            if code:
                sys.exit(code)


def conduct(train, run):
    """Train, save whatever ends it, and say what there is to see. -> exit code"""
    ended, code, ranks = None, 0, run.ranks
    total = run.num_updates
    with tqdm(initial=run.turns_taken, total=total, unit="update", disable=not ranks.first) as bar:
        run.bar = bar
        with ranks.signals():
            try:
                train(run)
            except KeyboardInterrupt:
                code = 128 + (ranks.signal or signal.SIGINT)
                ended = f"interrupted: the state is saved, --resume {run.directory.out} goes on"
            except Stop as stop:
                code, ended = 1, str(stop)
                if stop.__cause__ and ranks.first:
                    traceback.print_exception(stop.__cause__)
            try:
                if code != 1 or not run.broken:  # else the last good checkpoint is better
                    run.save()
            except Stop as stop:
                code, ended = 1, str(stop)
    run.grader.close()
    if ranks.first:
        conclude(run, ended)
    return code


def conclude(run, ended):
    """Say what there is to see."""
    out = run.directory.out
    if run.evaluations:
        print(run.table())
    if run.saved:
        print(f"model:   {out / 'checkpoints' / run.saved}")
    if ended:
        print(f"{Path(sys.argv[0]).name}: {ended}", file=sys.stderr)
    elif run.turns_taken:
        from tools import report  # matplotlib takes a second to import

        print(f"picture: {report.draw([out])}")
