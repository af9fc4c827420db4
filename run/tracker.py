"""--tracker: what a run logs, sent to wandb or trackio, which share one interface."""

import importlib

from tqdm import tqdm

from files import explained

SHOWN = ["problem_id", "sample", "verdict", "outcome", "length_reward", "text"]  # of a completion


class Tracker:
    """The run's page at a tracker: its config, the keys of its logs, and a group of completions.

    What goes wrong once the run is at work is said, and does not end it.
    """

    def __init__(self, cfg, out):
        name = cfg.tracker
        with explained(f"--tracker {name}: cannot begin; is `pip install {name}` done?"):
            self.library = importlib.import_module(name)
            self.library.init(
                project="eprli", name=out.name, config=dict(vars(cfg)), resume="allow"
            )

    def send(self, update, values, completions=()):
        """completions  rows of completions.jsonl; those of the first problem are sent"""
        values = {name: value for name, value in values.items() if value == value}  # no nan
        table = [
            [row[name] for name in SHOWN]
            for row in completions
            if row["problem_id"] == completions[0]["problem_id"]
        ]
        try:
            if table:
                values["completions"] = self.library.Table(columns=SHOWN, data=table)
            self.library.log(values, step=update)
        except Exception as error:  # of all kinds, from libraries and networks
            tqdm.write(f"--tracker: update {update} is not sent ({type(error).__name__}: {error})")

    def finish(self):
        try:
            self.library.finish()
        except Exception as error:  # as above
            tqdm.write(f"--tracker: cannot finish ({type(error).__name__}: {error})")
