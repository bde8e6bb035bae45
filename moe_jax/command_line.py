"""What all scripts share: help that is the module's docstring, mistakes that end in one line."""

import argparse
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


def seed(text: str) -> int:
    """A type of argument: what a random key can be made of."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**31 - 1")
    return number
