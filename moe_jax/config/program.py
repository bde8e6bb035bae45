"""A config file is a Python program: it is found, executed, and one of its functions is called."""

import os
import pathlib
import sys
import types
from typing import Any

from moe_jax.config.checks import ConfigError


def call(path: str, function: str) -> Any:
    """The value of a function of FILE[:ARG], called with ARG if there is one.

    Raises: ConfigError for a file or function that is not there, and whatever the file raises.
    """
    file, arguments = _located(path)
    # Python's dataclasses look their module up by its name.
    module = types.ModuleType(f"config_file_{pathlib.Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    exec(compile(pathlib.Path(file).read_bytes(), file, "exec"), module.__dict__)
    if not hasattr(module, function):
        raise ConfigError(f"--config={file} has no {function}()")
    return getattr(module, function)(*arguments)


def _located(path: str) -> tuple[str, list[str]]:
    """The file and the argument; a file's own name may have colons too."""
    ends = [i for i, letter in enumerate(path) if letter == ":"]
    for end in (len(path), *ends):
        if os.path.isfile(path[:end]):
            return path[:end], [path[end + 1 :]] if end < len(path) else []
    raise ConfigError(f"--config={path}: no such file; the examples are under configs/")
