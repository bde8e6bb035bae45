"""Threads of libraries that print a traceback for a fault which the run reports in one line."""

import contextlib
import logging
import threading
from collections.abc import Iterator

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
