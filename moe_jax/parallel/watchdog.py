"""A thread in each process of a run that ends the process, with one line, if another one is lost.

A collective with a process that died may never return. JAX's own heartbeats end the process too,
but later and with a stack trace. Only if process 0 dies do they come first, because it holds the
values read here.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator

from moe_jax import untrusted

BEAT_SECONDS = 2
SILENT_SECONDS = 20
EXIT_LOST = 1
ALIVE, LOST = "moe_jax/alive/", "moe_jax/lost/"
GO_ON = "run the same command in all processes again to go on from the last checkpoint"


@contextlib.contextmanager
def watching(client, process: int) -> Iterator[None]:
    """Runs the watchdog during the block; `client` is the client of JAX's coordination service.

    The thread ends with the block: if it were calling the client when Python exits, it would abort.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(client, process, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def announce(client, process: int, text: str) -> None:
    """Tells the other processes that the run is over, and waits long enough for them to read it."""
    client.key_value_set(f"{LOST}{process}", text)
    time.sleep(2 * BEAT_SECONDS)


def _watch(client, process: int, over: threading.Event) -> None:
    heard: dict[str, tuple[str, float]] = {}
    try:
        for beat in itertools.count():
            if over.is_set():
                return
            client.key_value_set(f"{ALIVE}{process}", str(beat), allow_overwrite=True)
            if process == 0:  # only one checks, so the work is linear in the number of processes
                silent = _silent(heard, client.key_value_dir_get(ALIVE), time.monotonic())
                if silent:
                    others = ", ".join(name.removeprefix(ALIVE) for name in silent)
                    say(f"process {others} silent for {SILENT_SECONDS} s: lost; {GO_ON}")
                    announce(client, process, f"process {others} was lost")
                    os._exit(EXIT_LOST)
            for name, text in client.key_value_dir_get(LOST):
                if name != f"{LOST}{process}":
                    say(f"{text}; {GO_ON}")
                    os._exit(EXIT_LOST)
            over.wait(BEAT_SECONDS)
    except Exception:  # the service is gone, so JAX will end this process
        return


def _silent(
    heard: dict[str, tuple[str, float]], beats: list[tuple[str, str]], now: float
) -> list[str]:
    """The processes whose beat has not changed for too long; `heard` keeps each one's last beat and
    its time."""
    for name, beat in beats:
        if heard.get(name, ("", 0.0))[0] != beat:
            heard[name] = (beat, now)
    return [name for name, (_, since) in heard.items() if now - since > SILENT_SECONDS]


def say(text: str) -> None:
    """Prints a line on stderr immediately, in any process."""
    print(untrusted.line(text), file=sys.stderr, flush=True)
