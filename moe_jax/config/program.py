"""Executes a config file, which is a Python program, and calls one of its functions."""

import os
import pathlib
import sys
import types
from typing import Any

from moe_jax.config.checks import ConfigError


def call(path: str, function: str) -> Any:
    """Calls a function of FILE[:ARG], with ARG if there is one, and returns its result.

    Raises: ConfigError for a missing file or function, and whatever the file raises.
    """
    file, arguments = _located(path)
    # Python's dataclasses look up their module by name in sys.modules.
    module = types.ModuleType(f"config_file_{pathlib.Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    exec(compile(pathlib.Path(file).read_bytes(), file, "exec"), module.__dict__)
    if not hasattr(module, function):
        raise ConfigError(f"--config={file} has no {function}()")
    return getattr(module, function)(*arguments)


def _located(path: str) -> tuple[str, list[str]]:
    """The file and its arguments; the file's name may contain colons too."""
    ends = [i for i, letter in enumerate(path) if letter == ":"]
    for end in (len(path), *ends):
        if os.path.isfile(path[:end]):
            return path[:end], [path[end + 1 :]] if end < len(path) else []
    raise ConfigError(f"--config={path}: no such file; the examples are under configs/")
