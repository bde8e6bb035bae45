"""Rows of a benchmark: the time of a part, compared with a bound measured in the same run.

The functions of a case (`cases.py`) are timed in turn, so that a slowdown of the machine affects
all of them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import jax

from moe_jax.benchmark import peers, sizes
from moe_jax.benchmark.cases import BENCHMARKS


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds are medians. `ratio_to_bound` is median_seconds / bound_seconds."""

    benchmark: str
    case: str
    implementation: str
    backend: str
    dtype: str
    median_seconds: float
    tokens_per_second: float
    bound: str
    bound_seconds: float
    ratio_to_bound: float

    @classmethod
    def of(cls, benchmark, case, implementation, dtype, *, tokens, seconds, bound, bound_seconds):
        """A row for a call that handles `tokens` in `seconds`."""
        return cls(
            benchmark=benchmark,
            case=case,
            implementation=implementation,
            backend=jax.default_backend(),
            dtype=dtype,
            median_seconds=seconds,
            tokens_per_second=tokens / seconds,
            bound=bound,
            bound_seconds=bound_seconds,
            ratio_to_bound=seconds / bound_seconds,
        )


def run(name: str, repeats: int, peer: str = "") -> Iterator[Row]:
    """The rows of a benchmark at the sizes of the default backend (`sizes.py`).

    With `peer`, a key of `peers.PEERS`, there is another row for each case that it supports.

    Raises: ValueError for a peer that does not support this benchmark or is not installed.
    """
    if peer:
        peers.check(peer, name)
    return _rows(name, repeats, peer)


def _rows(name: str, repeats: int, peer: str) -> Iterator[Row]:
    for case in BENCHMARKS[name]():
        functions = dict(case.implementations)
        if peer:
            functions[peer] = peers.PEERS[peer][name](case.config)
        seconds = medians({**functions, case.bound: case.bound_function}, repeats)
        for implementation in functions:
            yield Row.of(
                *(name, case.name, implementation, sizes.here().dtype),
                tokens=case.tokens,
                seconds=seconds[implementation],
                bound=case.bound,
                bound_seconds=seconds[case.bound],
            )
        del case, functions  # the device may not have room for the next case's arrays as well


def medians(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they are called in turn, after one call that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}
