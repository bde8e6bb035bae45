"""Signals that stop a program: the first is a request, the second ends the process at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130
# A cloud's or a scheduler's notice, Ctrl-C, and a terminal that was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end(status: int) -> NoReturn:
    """Raises SystemExit, again each second: a callback of a library may have swallowed it."""

    def again(*_):
        raise SystemExit(status)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    raise SystemExit(status)


def leave(status: int) -> NoReturn:
    """Ends the process as it is: threads of libraries, in the middle of their work, can crash an
    orderly end."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextlib.contextmanager
def requests(take: Callable[[signal.Signals], None]) -> Iterator[None]:
    """`take` gets the first signal of the block; what it raises is raised where the program is.

    Signals that the program was told to ignore, as nohup does, are ignored.
    """
    asked = False

    def handle(number, _):
        nonlocal asked
        asked = True
        for other in before:
            signal.signal(other, lambda *_: os._exit(EXIT_INTERRUPTED))
        sys.unraisablehook = _unraisable
        take(signal.Signals(number))

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items() if not asked else ():
            signal.signal(number, handler)


def _unraisable(swallowed) -> None:
    """Python's report of what a callback swallowed, unless it was raised to stop the program."""
    if issubclass(swallowed.exc_type, Exception):
        sys.__unraisablehook__(swallowed)
