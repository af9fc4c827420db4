"""Command-line flags as the fields of dataclasses: a default, a help text and a rule for each.

This module builds the parser and checks the rules. It knows no flag.
"""

import argparse
import math
import shlex
from dataclasses import MISSING, field, fields
from typing import Literal, get_args, get_origin

# Rules for the value of a flag, or for each value of a list: a test, and its words
ABOVE_0 = lambda v: 0 < v < math.inf, "above 0"
AT_LEAST_0 = lambda v: 0 <= v < math.inf, "at least 0"
AT_LEAST_1 = lambda v: v >= 1, "at least 1"


def flag(help, default=None, *, rule=None, may_change=False):
    """Return a field of a dataclass of flags.

    help        what the flag means, its unit, and in brackets where the default comes from
    rule        (test of a value, its words)
    may_change  whether a resumed run, or a resumed evaluation, may have another value
    """
    metadata = {"help": help, "rule": rule, "may_change": may_change}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def option(name):
    """Return a flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


def make_parser(description, *sections):
    """Return a parser with one option for every field of the sections, which are dataclasses with a
    `title`. It returns only the flags that were given; of two values of a flag the last wins. @FILE
    stands for the flags in a file."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--flag value ...]   (--help lists the flags)",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for section in sections:
        group = parser.add_argument_group(section.title)
        for f in fields(section):
            group.add_argument(option(f.name), help=help_of(f), **kind_of(f.type))
    return parser


def help_of(f):
    """Return the help text, with the default unless the text describes it in words."""
    text = f.metadata["help"]
    default = f.default if f.default_factory is MISSING else f.default_factory()
    if default is None or default is False or default == [] or "default" in text:
        return text
    values = default if isinstance(default, list) else [default]
    return f"{text} (default: {' '.join(map(str, values))})"


def kind_of(kind):
    """Return the arguments of add_argument for a type: T, T | None, list[T], Literal or bool."""
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"nargs": "+", "type": get_args(kind)[0]}
    return {"type": kind}


def check_rules(flags):
    """Raise ValueError where a flag's value, or one of its values, breaks its rule."""
    for f in fields(flags):
        if f.metadata["rule"]:
            test, words = f.metadata["rule"]
            values = getattr(flags, f.name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not test(value):
                    raise ValueError(f"{option(f.name)} must be {words}, found {value}")
