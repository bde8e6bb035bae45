"""The recent results of a function, which pickling leaves behind."""

import functools
from collections.abc import Callable
from typing import Any


class Recent:
    """`function`, with its `maxsize` most recent results in memory.

    An object that has it as a field can be sent to a worker process, which begins without results.
    """

    def __init__(self, function: Callable, maxsize: int):
        self._made_of = function, maxsize
        self._kept = functools.lru_cache(maxsize)(function)

    def __call__(self, *key: Any) -> Any:
        return self._kept(*key)

    def __reduce__(self) -> tuple:
        return Recent, self._made_of
