"""From a command line to a run, and from the end of a run to an exit code.

What ends a run             the update at work          what is saved then    exit code
the end of the last level   -                           the state             0
SIGINT, SIGTERM             is finished if it learns,   the state             128 + signal
                            else rolled back
SIGKILL, SIGHUP, a crash    is lost                     nothing               -
Stop                        is rolled back              the state before it   1
Stop after a step (a)       is lost                     nothing               1
any other exception         is lost                     nothing               1, and a traceback

(a) An optimizer step has changed the weights, or a line of a log cannot be written, or one of
    several processes has no memory left: weights and counters no longer belong together.

If the last update met a number that is not finite, nothing is saved either, and 0 becomes 1.
Whatever the row, --resume goes on from the newest checkpoint that is whole, and cuts the logs back
to it. Bad input ends with exit code 2 before a run directory is made.
"""

import contextlib
import signal
import sys
import traceback

import torch

from common.files import Stop
from run.checkpoints import last_good
from run.config import parse
from run.log import table
from run.processes import Ranks, keep_freed_memory, refuse, set_up_output
from run.start import resume_run, start_run


def run_command(train, report, arguments):
    """Set a run up, let train(run) work on it, and leave with an exit code that says how it ended.
    report(its folder) makes the pictures of a run that came to its end."""
    keep_freed_memory()
    set_up_output()
    try:
        cfg, config = parse(arguments)
        ranks = Ranks(cfg.device, cfg.sharded)
        with memory_explained():
            run = resume_run(cfg, config, ranks) if config else start_run(cfg, ranks)
    except (ValueError, OSError) as error:
        refuse(error)
    except Stop as stop:
        refuse(stop, 1)
    except KeyboardInterrupt:
        refuse("interrupted before the run began", 128 + signal.SIGINT)
    code, ended = train_and_save(train, run)
    if ranks.first:
        if run.evaluations:
            print(table(run.evaluations, run.levels))
        print(f"model: {last_good(run.out)}")
        if not ended and run.num_updates:
            report(run.out)
    if ended:
        refuse(ended, code)


def train_and_save(train, run):
    """Train, and save when it comes to its end, or when a signal or a Stop ends it.

    -> exit code, what ended it before its time or None
    """
    code, ended, together = 0, None, True
    with run.ranks.signals():
        try:
            run.log.show(run.progress)
            with memory_explained():
                train(run)
        except KeyboardInterrupt:
            code = 128 + (run.ranks.signal or signal.SIGINT)
            ended = f"interrupted; --resume {run.out} goes on"
        except Stop as stop:
            code, ended = 1, str(stop)
            if stop.__cause__ and run.ranks.first:
                traceback.print_exception(stop.__cause__)
            # The other processes may be elsewhere: then they cannot save together.
            together = run.ranks.size == 1 or not isinstance(stop, NoMemory)
            if not (together or run.ranks.first):  # which prints it at its end
                print(ended, file=sys.stderr)
        try:
            with memory_explained():
                if together:
                    run.save()
        except Stop as stop:
            code, ended = 1, str(stop)
    if run.num_broken and not code:
        code, ended = 1, "nothing is saved: the run ended while its numbers were not finite"
    run.solver.scorer.close()
    run.log.close()
    return code, ended


class NoMemory(Stop):
    """A GPU is full."""


@contextlib.contextmanager
def memory_explained():
    """Within the block, a GPU whose memory is full is a Stop that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise NoMemory(
            "out of memory, and nothing can be done in smaller parts: use --lora-rank, --fsdp over "
            "several processes, or a smaller --model or --max-new-tokens"
        ) from None
