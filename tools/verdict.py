"""What the logs of a run say, in words. A judge answers one question about one level, from its rows
of metrics.jsonl or eval.jsonl: it returns a short answer and its reason.

"Beyond its interval" means that two 95 % intervals do not meet.
"""

from data import name_level


def verdict(metrics, evaluations):
    """-> {question: [(name of a level, answer, reason), ...]}"""
    found = {}
    for question, judge, rows in (
        ("Did the weights move?", moved, metrics),
        ("Did held-out accuracy rise?", rose, evaluations),
        ("Was a level starved?", starved, metrics),
        ("Was a level forgotten?", forgotten, evaluations),
    ):
        found[question] = []
        for name in dict.fromkeys(map(name_level, rows)):
            own = [row for row in rows if name_level(row) == name]
            found[question].append((name, *judge(own)))
    return found


def moved(metrics):
    """The norm of the gradient is null without a step, and 0 if there was nothing to learn."""
    steps = sum(bool(row["grad_norm"]) for row in metrics)
    return "yes" if steps else "no", f"{steps} of {len(metrics)} updates changed the policy"


def starved(metrics):
    """Could an update not fill the buffer, so that it was skipped?"""
    skipped = []  # a late group is broken, but no number that is not finite ended the update
    for row in metrics:
        if row["groups_kept"] + row["groups_broken"] == row["reward_timeouts"]:
            skipped.append(row)
    reason = f"{len(skipped)} of {len(metrics)} updates were skipped"
    if not skipped:
        return "no", reason
    drawn, right, wrong, late = (
        sum(row[name] for row in skipped)
        for name in ("groups_drawn", "groups_all_right", "groups_all_wrong", "reward_timeouts")
    )
    answer = "yes, it is too easy" if right > wrong else "yes, it is too hard"
    if late > drawn / 2:  # as infra/update.py says, but for completions that are cut off
        answer = "yes, most rewards came too late"
    elif right + wrong < drawn / 2:
        answer = "yes, too few groups are drawn"
    return answer, f"{reason}: of their {drawn} groups {right} were all right, {wrong} all wrong"


def rose(evaluations):
    """From the first evaluation to the last."""
    before, after = evaluations[0], evaluations[-1]
    answer = ("not beyond its interval", "yes", "no, it fell")[beyond(before, after)]
    if before is after:
        answer = "not known"
    return answer, f"from {spell(before)} to {spell(after)}"


def forgotten(evaluations):
    """Did it end below its best?"""
    best, last = max(evaluations, key=lambda row: row["accuracy"]), evaluations[-1]
    answer = "yes" if beyond(best, last) < 0 else "no"
    if len(evaluations) == 1:
        answer = "not known"
    return answer, f"at its best {spell(best)}, at the end {spell(last)}"


def beyond(before, after):
    """1 or -1: after is above, or below, before beyond its interval. 0: not told apart"""
    return (after["low"] > before["high"]) - (after["high"] < before["low"])


def spell(row):
    return "{accuracy:.1%} [{low:.1%}, {high:.1%}] after {update} updates".format(**row)
