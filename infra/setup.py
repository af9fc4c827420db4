"""From a command line to a run, and from the end of a run to an exit code."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import traceback
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import data
from eprli import Buffer, LevelState, resolve_levels
from infra import memory
from infra.directory import RunDirectory, create
from infra.flags import (
    MAY_CHANGE,
    Config,
    check,
    explain,
    fill,
    given_flags,
    make_parser,
    option,
    stated,
)
from infra.ranks import Ranks, Stop, is_first, refuse, silence_others
from infra.run import Run
from infra.tracker import Tracker
from parts import kernels, lora
from parts.files import explained, sha256
from parts.optimizer import Learner
from parts.policy import Policy, digest
from rewards import Grader, import_file, load_reward

# --------------------------------------------------------------------------------------- the flags


def read_flags(parser, arguments):
    """-> Config, config.json of the run to resume or None.  Raises ValueError"""
    parser.parse_args(arguments)  # --help ends here
    given, config = given_flags(parser, arguments), None
    flags = stated(given.get("preset"))
    if "resume" in given:
        flags, config = as_started(given)
    cfg = Config(**{**flags, **given})
    check(cfg)
    return fill(cfg), config


def as_started(given):
    """-> {name: value} of all flags of the run that is to be resumed, its config.json"""
    run = given.pop("resume")
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        flags = {name: config[name] for name in vars(Config())}
        check(Config(**flags))
        if not all(config[name] for name in ("read", "model_files", "kernels", "threads", "torch")):
            raise KeyError("read")
        if config["revision"]:
            flags["model"] = f"{flags['model'].partition('@')[0]}@{config['revision']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {run}: {path} is not that of a run ({type(error).__name__}: {error}); one "
            "that another version of EPRLI began goes on with that version alone"
        ) from error
    may_change = MAY_CHANGE.split()
    for name in given:
        if name not in may_change:
            raise ValueError(
                f"--resume goes on with the flags of {run}, and {option(name)} is not one that may "
                f"differ ({' '.join(map(option, may_change))}): leave it out, or start a new run "
                f"from a checkpoint (--model {run}/checkpoints/...)"
            )
    return flags | {"out": run}, config


# ------------------------------------------------------------------------------------------- data


def read_data(cfg):
    """What a run trains on and is evaluated on, before any model is loaded.

    -> the levels, training problems, held-out problems, {fact: what config.json says of them}
    """
    found = data.read_problems(cfg.data, cfg.columns)
    different = data.without_repeats(found)
    train_set = data.gradable(cfg.data, different)
    held_out = data.read_problems(cfg.eval_data, cfg.columns) if cfg.eval_data else []
    data.gradable(cfg.eval_data, held_out)  # says which; in evaluation they stay
    levels = resolve_levels(cfg, any(p.pass_rate is not None for p in train_set))
    exact, near = data.overlap(train_set, held_out)
    facts = {
        "ungradable_left_out": len(different) - len(train_set),
        "repeats_removed": len(found) - len(different),
        "overlap_with_eval": len(exact),
        "near_overlap_with_eval": len(near),
        "read": {"--data": digest(found), "--eval-data": digest(held_out)},
    }
    return levels, train_set, held_out, facts


def cut_by_difficulty(cfg, name, problems, qualities):
    """-> {number from 1: problems}, counts of those that belong to no level

    Where nothing is known of the difficulty: {None: all problems}.
    """
    if all(data.difficulty(p, cfg.difficulty) is None for p in problems):
        tqdm.write(f"{name}: no problem has a {cfg.difficulty}, so they are one set")
        return {None: problems}, {}
    parts, left_out = data.cut_levels(problems, qualities, cfg.difficulty)
    return dict(enumerate(parts, 1)), left_out


def fitting(policy, problems):
    """Prompts that leave room for a completion. Raises ValueError if there are none."""
    prompts = [p for p in policy.render(problems) if policy.room(p)]
    if not prompts:
        raise ValueError(
            f"every prompt is longer than the context of {policy.model.context} tokens"
        )
    return prompts


def check_measured(cfg, levels, train_set, policy):
    """Print in what the measurement of the pass rates differs from this run."""
    if cfg.difficulty != "pass_rate":
        return
    now = policy.measuring(cfg.temperature, max(level.max_new_tokens for level in levels))
    kinds = {json.dumps(p.other.get("measured")) for p in train_set if p.pass_rate is not None}
    for measured in map(json.loads, sorted(kinds)):
        if not measured:
            tqdm.write(f"{cfg.data}: nothing says what measured the pass rates")
            continue
        other = [f"{k} {measured.get(k)}, now {v}" for k, v in now.items() if measured.get(k) != v]
        if other:
            tqdm.write(
                f"{cfg.data}: measured with {measured.get('model')} otherwise: {'; '.join(other)}"
            )
        if measured.get("samples", 0) < 16:
            tqdm.write(
                f"{cfg.data}: measured with {measured.get('samples')} samples a problem: "
                "fewer than 16 tell little"
            )


def make_levels(cfg, levels, train_set, policy):
    """Cut the levels and render everything before minutes are spent. -> [LevelState, ...], facts"""
    qualities = [level.quality for level in levels]
    parts, left_out = cut_by_difficulty(cfg, cfg.data, train_set, qualities)
    states, too_long = [], 0
    for number, level in enumerate(levels, 1):
        own, prompts = parts.get(None) or parts[number], []  # None: one set for every level
        if level.trains:
            if not own:
                raise ValueError(
                    f"level {number} (Q = {level.quality:g}) has no problem: choose another "
                    f"--quality ({cfg.data} left out: {left_out})"
                )
            prompts = fitting(policy, own)
            too_long += len(own) - len(prompts)
        order = data.Order(prompts, f"{cfg.seed}/{number}")
        buffer = Buffer(keep_flat=cfg.filter == "all")
        states.append(LevelState(number, level, order, load_reward(level.reward), buffer))
        tqdm.write(
            f"level {number}: difficulty up to {level.quality:g}, {len(own)} problems"
            f"{'' if level.trains else ', not trained'}"
        )
    if qualities != sorted(qualities):
        tqdm.write(
            'Q decreases: the harder level trains first. The paper says both "Q1 < Q2" and '
            '"Q_{l-1} > Q_l"; see eprli.py'
        )
    return states, {"prompts_too_long": too_long, "left_out": left_out}


def cut_held_out(cfg, levels, held_out, policy):
    """-> {number of a level: its prompts}, facts. By default they are cut as the levels are."""
    if not held_out:
        return {}, {}
    qualities = cfg.eval_quality or [level.quality for level in levels]
    parts, left_out = cut_by_difficulty(cfg, cfg.eval_data, held_out, qualities)
    if cfg.eval_quality and None in parts:
        raise ValueError(f"--eval-quality: no problem of {cfg.eval_data} has a {cfg.difficulty}")
    prompts, seen = {}, [[]]
    for number, own in parts.items():
        if own not in seen:  # levels may share their problems
            seen.append(own)
            prompts[number] = policy.render(own)
            tqdm.write(f"held out, {data.name_level(number)}: {len(own)} problems")
    if not prompts:
        raise ValueError(f"{cfg.eval_data}: no problem falls into any level; see --eval-quality")
    return prompts, {"eval_left_out": left_out}


# ------------------------------------------------------------------------------------ config.json


def with_full_paths(cfg):
    """The flags, with paths that mean the same from any folder."""
    flags = asdict(cfg)
    for name in ("model", "data", "eval_data", "examples"):
        if flags[name] and Path(flags[name]).exists():
            flags[name] = str(Path(flags[name]).resolve())
    flags["reward"] = [str(Path(r).resolve()) if ":" in r else r for r in cfg.reward]
    return flags


def hashes(paths):
    """-> {full path: SHA-256} of those that are files"""
    # A hub's files are links, whose own names tell what they are.
    paths = [Path(path).absolute() for path in paths if path]
    return {str(path): sha256(path) for path in paths if path.is_file()}


def must_be_unchanged(run, before, now):
    """before, now  {name: digest}.  Raises ValueError"""
    for name in before:
        if now.get(name) != before[name]:
            raise ValueError(
                f"--resume {run}: {name} is gone, or is not what it was when the run began: put it "
                f"back, or start a new run from a checkpoint (--model {run}/checkpoints/...)"
            )


# ---------------------------------------------------------------------------------------- the run


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
    here = computing(ranks.from_first(kernels.probe))
    levels, held_out, policy, facts = ranks.on_all(
        lambda: load_inputs(cfg, cfg.model, ranks.device)
    )
    read, inputs = facts.pop("read"), hashes([cfg.data, cfg.eval_data, cfg.examples])
    tqdm.write("; ".join(f"{name} {value}" for name, value in facts.items()))
    for reward in cfg.reward:
        if path := reward.rpartition(":")[0]:
            inputs |= hashes(import_file(Path(path).resolve())[1])
    config = {
        **with_full_paths(cfg),
        **facts,
        **here,
        # tools/report.html shows these four.
        "began": f"{datetime.now():%Y-%m-%d %H:%M}",
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "problems": [len(state.order.prompts) for state in levels],
        "objective": explain(cfg, [state.level for state in levels]),
        "levels": [asdict(state.level) for state in levels],
        "read": read,
        "inputs": inputs,
        "model_files": hashes(policy.folder.iterdir()),
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

    config  its config.json
    Raises ValueError or OSError, on all processes.
    """
    directory = ranks.on_all(lambda: RunDirectory(cfg.out, ranks))  # locked before it is read
    checkpoint, files = ranks.from_first(directory.newest_whole), config["inputs"]
    if cfg.kl_coef or not checkpoint:
        files = files | config["model_files"]
    ranks.from_first(lambda: must_be_unchanged(cfg.out, files, hashes(files)))
    for name, now in computing(config["kernels"]).items():
        if now != config[name]:
            tqdm.write(f"{name} {config[name]}, now {now}: the run is not bit for bit the same")
    model = checkpoint or cfg.model
    levels, held_out, policy, facts = ranks.on_all(lambda: load_inputs(cfg, model, ranks.device))
    ranks.from_first(lambda: must_be_unchanged(cfg.out, config["read"], facts["read"]))
    run = make_run(cfg, directory, ranks, levels, held_out, policy)
    sizes = run.resume(checkpoint)
    extended = extend(run, config)
    ranks.from_first(lambda: directory.cut_logs(sizes))  # the last that may refuse
    if extended != config:
        ranks.from_first(lambda: directory.replace_config(extended))
    tqdm.write(f"{cfg.out}: goes on after {checkpoint or 'nothing: there is no checkpoint'}")
    return run


def extend(run, config):
    """Give the last level of a resumed run its larger --updates.

    config  its config.json, as it was -> as it is from now on.  Raises ValueError
    """
    last = run.levels[-1]
    last.extended_after = config.get("extended_after", [])
    before = [level["updates"] for level in config["levels"]]
    now = [state.level.updates for state in run.levels]
    if now == before:
        return config
    if run.cfg.tokens or now[:-1] != before[:-1] or now < before or last.over:
        raise ValueError(
            f"--updates {now}: with --resume it extends the last level, which must not have ended "
            f"early, or by --tokens; {run.directory.out} has {before}"
        )
    last.extended_after = [*last.extended_after, before[-1]]
    levels = [asdict(state.level) for state in run.levels]
    return config | {"updates": now, "levels": levels, "extended_after": last.extended_after}


def load_inputs(cfg, model, device):
    """Read and check everything. -> levels, held-out prompts, Policy, facts about the data"""
    levels, train_set, held_out, facts = read_data(cfg)
    policy = load_policy(cfg, model, device)
    if model == cfg.model:
        with explained(f'{cfg.data}: "measured" is not what eval.py writes'):
            check_measured(cfg, levels, train_set, policy)
    states, cut_facts = make_levels(cfg, levels, train_set, policy)
    policy.show(cfg.data, states[0].order.prompts)
    prompts, eval_facts = cut_held_out(cfg, levels, held_out, policy)
    return states, prompts, policy, facts | cut_facts | eval_facts


def load_policy(cfg, model, device):
    """The policy of a checkpoint of this run, or the one that the run starts from (cfg.model)."""
    policy = Policy.load(str(model), cfg.dtype, device, cfg)
    if model == cfg.model and lora.read_config(policy.folder):
        raise ValueError(
            f"--model {model} is an adapter: make a whole checkpoint of it first (python eval.py "
            f"--model {model} --merge FOLDER)"
        )
    if model == cfg.model and cfg.lora_rank:
        lora.add(policy.model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    return policy


def computing(choice):
    """What decides the bits of a run, beside its flags and inputs.  choice  see parts/kernels.py"""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": kernels.use(choice),
    }


def make_run(cfg, directory, ranks, levels, held_out, policy):
    reference = None  # the starting policy's model, if the objective needs it
    if cfg.kl_coef:
        device = "meta" if cfg.lora_rank else ranks.device
        reference = Policy.load(cfg.model, cfg.dtype, device).model
        if cfg.lora_rank:  # it has the same frozen weights
            reference.load_state_dict(policy.model.state_dict(), strict=False, assign=True)
    learner = Learner(policy.model, ranks, cfg.recompute)
    grader = Grader(allow_last_number=cfg.allow_last_number)
    size = 0  # GB
    for weight, master in zip(learner.weights, learner.masters):  # and its two moments
        size += (weight.nbytes + master.nbytes * (2 + (weight.dtype != master.dtype))) / 1e9
    tqdm.write(
        f"a checkpoint of model and optimizer, every --save-every {cfg.save_every} updates, takes "
        f"{size:.3f} GB; --keep-checkpoints and one that is being written, "
        f"{(cfg.keep_checkpoints + 1) * size:.3f} GB"
    )
    run = Run(cfg, directory, ranks, policy, reference, learner, grader, levels, held_out)
    if cfg.tracker:
        run.tracker = ranks.on_all(lambda: ranks.first and Tracker(cfg, directory.out))
    return run


def memory_table(cfg):
    """The table of --plan: only the data, the tokenizer and the model's config are read."""
    levels, train_set, held_out, _ = read_data(cfg)
    if cfg.eval_every == 0:
        held_out = []
    policy = load_policy(cfg, cfg.model, "meta")
    longest = max(len(p.tokens) for p in fitting(policy, train_set + held_out))
    limit = cfg.eval_max_new_tokens or max(level.max_new_tokens for level in levels)
    cfg = replace(cfg, eval_max_new_tokens=limit)
    levels = [level for level in levels if level.trains] or levels
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return memory.table(memory.plan(cfg, levels, policy.model, longest, len(held_out), processes))


# ----------------------------------------------------------------------------------------- the end


@contextlib.contextmanager
def memory_explained(run=None):
    """Within the block, a GPU whose memory is full is a Stop: what the run did, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        words = (
            f"out of memory while {run.doing if run else 'setting up'}: lower --slots (sampling, "
            "evaluating), --micro-batch-tokens or --logits-per-chunk (learning), or use "
            "--recompute, --lora-rank or --fsdp; --plan tells what takes how much"
        )
        if run and run.ranks.size > 1:  # the others may be elsewhere: they cannot save together
            run.half_done = True
            if not run.ranks.first:  # which says it at its end
                print(words, file=sys.stderr)
        raise Stop(words) from None


def run_command(train, draw, arguments):
    """Set a run up, let train(run) work on it, and leave with an exit code that says how it ended.
    draw(its folder) makes the pictures of a run that came to its end."""
    parser = make_parser()
    silence_others()
    with contextlib.ExitStack() as stack:
        try:
            cfg, config = read_flags(parser, arguments)
            if cfg.plan:
                return print(memory_table(cfg))
            if cfg.explain:
                return print(explain(cfg, read_data(cfg)[0]))
            ranks = stack.enter_context(Ranks(cfg.device, cfg.sharded))
            with memory_explained():
                run = resume_run(cfg, config, ranks) if config else start_run(cfg, ranks)
        except Stop as stop:
            parser.exit(1, f"{parser.prog}: {stop}\n")
        except (ValueError, OSError) as error:
            refuse(parser, error)
        except KeyboardInterrupt:
            words = f"{parser.prog}: interrupted before the run began\n"
            parser.exit(128 + signal.SIGINT, words if is_first() else None)
        code, ended = train_and_save(train, run)
        if is_first():
            say_results(run, ended)
            if not ended and run.num_updates:
                draw(run.directory.out)
        if code:
            sys.exit(code)


def train_and_save(train, run):
    """Train, and save when it comes to its end, or when a signal or a Stop ends it.

    -> exit code, what ended it before its time or None
    """
    code, ended = 0, None
    with run.ranks.signals():
        try:
            with memory_explained(run), run.progress_bar():
                train(run)
        except KeyboardInterrupt:
            code = 128 + (run.ranks.signal or signal.SIGINT)
            state = run.directory.last_good() if run.broken else "the state is saved"
            ended = f"interrupted: {state}, --resume {run.directory.out} goes on"
        except Stop as stop:
            code, ended = 1, str(stop)
            if stop.__cause__ and run.ranks.first:
                traceback.print_exception(stop.__cause__)
        run.take_back()
        try:
            if not run.broken:  # else the last good checkpoint is better
                with memory_explained(run):
                    run.save()
        except Stop as stop:
            code, ended = 1, str(stop)
    if run.broken and not code:
        code, ended = 1, "the run ended while its numbers were not finite"
    run.grader.close()
    if run.tracker:
        run.tracker.finish()
    return code, ended


def say_results(run, ended):
    out = run.directory.out
    if run.evaluations:
        print(run.table())
    if run.broken:
        print(f"not saved, its numbers were not finite; {run.directory.last_good()}")
    elif run.saved:
        print(f"model:   {out / 'checkpoints' / run.saved}")
    if ended:
        print(f"{Path(sys.argv[0]).name}: {ended}", file=sys.stderr)
