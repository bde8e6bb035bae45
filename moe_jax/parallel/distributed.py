"""One run in several processes: how they join, exchange values and end together.

Every process runs the same program on its own devices. Values that a process takes from files or
its environment must be made equal in all processes before they decide what is computed next:
processes that disagree on the next collective wait for each other forever.

Values are exchanged through JAX's coordination service (a server in process 0), not through
devices. It has no timeout, so one process can tokenize while the others wait.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import stopping
from moe_jax.parallel import clusters, jax_private, watchdog

HEARTBEAT_SECONDS = 45  # after this, JAX ends the other processes if the watchdog has not
JOINING_SECONDS, LEAVING_SECONDS = 20, 5
FOREVER_MS = 2**31 - 1
# A JAX error that contains one of these means that another process is lost, not that ours failed.
SIGNS_OF_LOSS = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "Connection", "coordination service")

_exchanges = itertools.count()


def check_flags(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Raises: ValueError if one of the flags is missing or does not fit the others."""
    if not coordinator and process_id is None and num_processes in (None, 1):
        return
    if not coordinator or num_processes is None or process_id is None:
        missing = "num_processes" if num_processes is None else "process_id"
        raise ValueError(
            f"--{missing if coordinator else 'coordinator'} is missing; --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I go together"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator}: use HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} is not from 0 to --num_processes={num_processes} less 1"
        )


def initialize(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; does nothing for a single process.

    It uses the flags, or otherwise the cluster that `clusters.detect` finds; with `num_processes=1`
    a process stays alone wherever it was started. Call it before anything that asks for devices.

    Raises: ValueError for incomplete flags, or an environment that is incomplete.
    """
    check_flags(coordinator, num_processes, process_id)
    cluster = "" if num_processes else clusters.detect(os.environ)
    if num_processes == 1 or not (coordinator or cluster):
        return
    # The service would handle SIGTERM, but `training.loop` must stop all at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX waits silently for five minutes, and then ends the process with a stack trace.
    line = f"still waiting for all processes ({cluster or coordinator})"
    waiting = threading.Timer(JOINING_SECONDS, watchdog.say, [line])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            local_device_ids=[] if cluster and clusters.alone_on_host(os.environ) else None,
            cluster_detection_method=cluster or "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot join the other processes ({cluster or coordinator}): "
            f"{' '.join(str(error).split())[:300]}; start all of them, "
            "or give --coordinator, --num_processes and --process_id"
        ) from error
    finally:
        waiting.cancel()


# Facts and values shared by all processes -------------------------------------------------------

process_count = jax_private.process_count


def is_first() -> bool:
    """True if this is the process that writes and prints for all."""
    return jax_private.process_id() == 0


def say(*texts: str) -> None:
    """Prints a line on stderr, once for all processes."""
    if is_first():
        watchdog.say("; ".join(texts))


def exchange(value) -> list:
    """The values (serialisable to JSON) of all processes, in their order; waits for all of them.

    All processes must make the same calls in the same order.
    """
    if process_count() == 1:
        return [value]
    client, key = jax_private.client(), f"moe_jax/exchange/{next(_exchanges)}/"
    client.key_value_set(f"{key}{jax_private.process_id()}", json.dumps(value))
    client.wait_at_barrier(key, FOREVER_MS)
    said = {int(name.rpartition("/")[2]): text for name, text in client.key_value_dir_get(key)}
    return [json.loads(text) for _, text in sorted(said.items())]


def of_first(value):
    """Process 0's `value`, which must be serialisable to JSON."""
    return exchange(value if is_first() else None)[0]


@contextlib.contextmanager
def together(error: type[Exception]) -> Iterator[None]:
    """If the block raises in any process, raises in all others too, as `error`.

    The block must not contain a collective, in which the others would wait.
    """
    raised = None
    try:
        yield
    except Exception as own:
        stopping.pass_on(own)
        raised = own
    said = exchange("" if raised is None else str(raised) or repr(raised))
    if raised is not None:
        raise raised
    for process, text in enumerate(said):
        if text:
            raise error(f"process {process}: {text}")


def first_alone(make: Callable, error: type[Exception]):
    """Calls `make()` first in process 0 and then in the others, which find its result in a cache.

    If the cache is not shared, each process makes its own. It raises like `together`.
    """
    for turn in (True, False):
        with together(error):
            if is_first() == turn:
                made = make()
    return made


def check_equal(name: str, text: str) -> None:
    """Raises: ValueError in all processes if `text` is not the same in all."""
    digests = exchange(hashlib.sha256(text.encode()).hexdigest())
    others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"{name} of process {', '.join(others)} is not that of process 0; "
            "start all processes with the same command"
        )


# Arrays -----------------------------------------------------------------------------------------


def rows_of(
    devices: Collection[jax.Device], sharding: jax.NamedSharding, batch_size: int
) -> np.ndarray:
    """The rows of a batch that these devices hold, ascending.

    Only the mesh decides which device holds row N, so a batch is the same for any number of
    processes. Processes whose devices hold the same row all feed it.
    """
    slices = sharding.devices_indices_map((batch_size,))
    return np.unique([row for d in devices for row in range(batch_size)[slices[d][0]]])


def whole(tree) -> Any:
    """The arrays of a tree as numpy arrays, all of them in every process."""
    if process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class Largest:
    """Each call returns the maximum over all processes of the previous call's number.

    Because of this delay no step waits for it. After the same number of calls all processes get the
    same result, so they can act on it at the same step. A single process gets its own number at
    once.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        one_each = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._spread = functools.cache(
            lambda number: jax.make_array_from_callback(
                (mesh.size,), one_each, lambda _: np.array([number], np.int32)
            )
        )
        self._largest = jax.jit(jax.numpy.max, out_shardings=jax.NamedSharding(mesh, jax.P()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if process_count() == 1:
            return number
        before, self._before = self._before, self._largest(self._spread(number))
        return 0 if before is None else int(before)


# The end ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends the run in all processes if it fails in one, so that none waits for a failed one.

    At exit JAX would make this process wait for others that are waiting for it. If the block
    raises, this process therefore ends at once; if the others do not fail too, the watchdog ends
    them.
    """
    if process_count() == 1:
        yield
        return
    client, process = jax_private.client(), jax_private.process_id()
    with watchdog.watching(client, process):
        try:
            yield
            client.wait_at_barrier("moe_jax/done", FOREVER_MS)
        except BaseException as error:
            _leave(error, client, process)
    jax.distributed.shutdown()


def _leave(error: BaseException, client, process: int) -> NoReturn:
    stopping.quiet()
    status = _report(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        client.wait_at_barrier("moe_jax/failed", LEAVING_SECONDS * 1000)
        jax.distributed.shutdown()  # process 0, which runs the service, waits for the others
    except Exception:  # the others are still running, or lost
        with contextlib.suppress(Exception):
            watchdog.announce(client, process, f"process {process} ended with status {status}")
    os._exit(status)


def _report(error: BaseException) -> int:
    """Prints the error that ended this process, unless it was a SystemExit; returns the status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    text = " ".join(str(error).split())
    if isinstance(error, jax.errors.JaxRuntimeError) and any(s in text for s in SIGNS_OF_LOSS):
        watchdog.say(
            f"process {jax_private.process_id()} of {process_count()} lost another one "
            f"({text[:120]}); {watchdog.GO_ON}"
        )
    else:
        traceback.print_exception(error)
    return watchdog.EXIT_LOST
