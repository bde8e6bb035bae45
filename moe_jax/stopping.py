"""Signals that stop a program: the first is a request, the second ends the process at once."""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130
# A cloud's or a scheduler's notice, Ctrl-C, and a terminal that was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

NOT_WAITED_FOR = "not waited for: "  # begins the name of a thread that may hang

_abandoned: set[str] = set()
_over = threading.Event()


def over() -> None:
    """Tells that what the program was to do is done, so that a first signal does not stop it."""
    _over.set()


def end(status: int) -> NoReturn:
    """Raises SystemExit, again each second until `quiet`: a library's callback may swallow it.

    It leaves the process instead if a module is being imported: an extension that is raised into
    while it initialises itself can crash, and some packages turn any error into an ImportError.
    """

    def again(*_) -> NoReturn:
        if importing():
            leave(status)
        raise SystemExit(status)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    again()


def importing() -> bool:
    """True while the code that calls this, or that a signal interrupted, imports a module."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def pass_on(error: BaseException) -> None:
    """Raises the end of the program that a library has wrapped into an error of its own, if any.

    A signal's handler raises SystemExit wherever the program is, and a library that is reading a
    file may take it for a failure of the file.
    """
    wrapped, seen = [error], set[int]()
    while wrapped:
        inner = wrapped.pop()
        if isinstance(inner, SystemExit | KeyboardInterrupt):
            raise inner
        if id(inner) not in seen:
            seen.add(id(inner))
            wrapped += [e for e in (inner.__cause__, inner.__context__) if e is not None]


def quiet() -> None:
    """Stops the repetitions of `end`, where the program ends in an orderly way."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def leave(status: int) -> NoReturn:
    """Ends the process as it is: threads of libraries, in the middle of their work, can crash an
    orderly end."""
    quiet()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def abandon(name: str) -> None:
    """Notes that a library has failed: it might complain once more at an orderly end."""
    _abandoned.add(name)


def hangs() -> bool:
    """True if a library has failed, or a thread is at work that nothing waits for: the library
    might spoil an orderly end."""
    return bool(_abandoned) or any(
        thread.name.startswith(NOT_WAITED_FOR) for thread in threading.enumerate()
    )


def ask() -> None:
    """Sends SIGTERM to this process, unless a signal has asked it to stop already."""
    if signal.getsignal(signal.SIGTERM) is not _end_at_once:
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def requests(take: Callable[[signal.Signals], None], *, until_exit: bool = False) -> Iterator[None]:
    """`take` gets the first signal of the block; what it raises is raised where the program is.

    Signals that the program was told to ignore, as nohup does, are ignored, and so is the first one
    after `over`. With `until_exit` signals after the block, while the program ends by itself, are
    ignored too.
    """
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def handle(number, _):
        for other in heard:
            signal.signal(other, _end_at_once)
        hooks.append(sys.unraisablehook)
        sys.unraisablehook = functools.partial(_unraisable, hooks[0])
        if not _over.is_set():
            take(signal.Signals(number))

    _over.clear()
    before = {number: signal.getsignal(number) for number in heard}
    hooks: list[Callable] = []  # that of before a signal; without a signal none is replaced
    for number in heard:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, _ignore if until_exit else handler)
            if until_exit:  # Python's end puts back the defaults for all but what is SIG_IGN
                atexit.register(signal.signal, number, signal.SIG_IGN)
        if hooks:
            sys.unraisablehook = hooks[0]


def _ignore(*_) -> None:  # unlike SIG_IGN, a handler is not inherited by other programs
    pass


def _end_at_once(*_) -> NoReturn:
    os._exit(EXIT_INTERRUPTED)


def _unraisable(report: Callable, swallowed) -> None:
    """Reports what a callback swallowed, unless it was raised to stop the program."""
    if issubclass(swallowed.exc_type, Exception):
        report(swallowed)
