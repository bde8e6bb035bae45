"""What all scripts share: help that is the module's docstring, mistakes that end in one line."""

import argparse
import resource
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Options are written out in full; a mistake is one line on stderr and exit status 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


IN_WORDS = {int: "a whole number", float: "a number"}


def typed(name: str, text: str, kind: type) -> object:
    """The value of an option --NAME=TEXT; of a tuple, its parts between commas.

    Raises: ValueError when the text is none of that kind.
    """
    words = {"true": True, "false": False}
    if kind is bool and text.lower() not in words:
        raise ValueError(f"--{name}={text}: use true or false")
    if kind is tuple:
        return tuple(text.split(","))
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text} is not {IN_WORDS[kind]}") from None


def options(prefix: str, arguments: list[str]) -> dict[str, str]:
    """NAME -> TEXT of arguments "--PREFIX.NAME=TEXT".

    Raises: ValueError for another argument.
    """
    found = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix(f"--{prefix}.").partition("=")
        if not argument.startswith(f"--{prefix}.") or not equals:
            raise ValueError(f"unexpected argument {argument!r}; use --{prefix}.NAME=VALUE")
        found[name] = text
    return found


def seed(text: str) -> int:
    """A type of argument: what a random key can be made of."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**31 - 1")
    return number


def peak_memory() -> str:
    """The most that this process had resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
