"""Threads of libraries that print a traceback for a fault which we report in one line."""

import contextlib
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# `result()` of a save raises the fault, and the back end's next row does.
REPORTED = ("orbax.", "tensorboardX.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the block, such threads end silently; all others report their errors as usual."""
    hook, log = threading.excepthook, logging.getLogger("absl")

    def report(ended: threading.ExceptHookArgs) -> None:
        if not type(ended.thread).__module__.startswith(REPORTED):
            hook(ended)

    def is_new(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in record.getMessage()

    threading.excepthook = report
    log.addFilter(is_new)
    try:
        yield
    finally:
        threading.excepthook = hook
        log.removeFilter(is_new)


@functools.cache
def report_first_failure_only() -> None:
    """From now on, Orbax's reads print no traceback and no warning: when files of a checkpoint are
    missing, many reads fail at once, and Orbax raises the error of the first. The others are those
    that nobody waits for any more, those that were not begun, and those that TensorStore answers
    after the event loop has been closed."""
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and unraisable.object is None
        if not (late and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    def is_awaited(record: logging.LogRecord) -> bool:
        return "Task exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = report
    logging.getLogger("asyncio").addFilter(is_awaited)
    never_begun = r"coroutine 'Store\..*' was never awaited"  # Orbax's array metadata
    warnings.filterwarnings("ignore", never_begun, RuntimeWarning)
