"""Errors that a person can act on. The ground floor: every room may import this one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was expected, what was found and what
    to do.

    Command lines print the message alone, without a traceback, and exit with status 2.
    """


class RunError(RuntimeError):
    """A run cannot go on (disk full, non-finite loss); the message says what is still safe.

    Command lines print the message alone, without a traceback, and exit with status 1.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the known name closest to `name`, or the whole list when none is
    close.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(
            f"{what}: expected one of {choices}, found {value!r}.{nearest(str(value), choices)}"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
