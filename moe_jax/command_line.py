"""Shared by all commands: a module's docstring is its help, and a mistake ends in one line."""

import argparse
import contextlib
import os
import pathlib
import re
import resource
import shlex
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from moe_jax import files, spelling, stopping, untrusted

EXIT_MISTAKE, EXIT_NONFINITE = 2, 3
ENTRY = "moe_jax"  # the console entry point, which sets sys.argv[0] to "moe_jax NAME"


def started_by_entry() -> bool:
    return sys.argv[0].startswith(f"{ENTRY} ")


def command(name: str) -> list[str]:
    """The words that start command `name` in the same way as the current one was started."""
    if started_by_entry():
        return ["python", "-m", ENTRY, name]
    script = pathlib.Path(sys.argv[0] or "python").resolve().with_name(f"{name}.py")
    here = pathlib.Path.cwd()
    return ["python", str(script.relative_to(here) if script.is_relative_to(here) else script)]


def this_command() -> str:
    """The words that started this program, as text for a shell."""
    entry = sys.argv[0].partition(" ")[2] if started_by_entry() else ""
    words = [*command(entry or pathlib.Path(sys.argv[0]).stem or "python"), *sys.argv[1:]]
    return untrusted.line(shlex.join(words))  # a path need not be UTF-8


class Parser(argparse.ArgumentParser):
    """Options must not be abbreviated; a mistake gives one line on stderr and exit status 2."""

    def __init__(self, description: str):
        if started_by_entry():
            description = re.sub(r"python scripts/(\w+)\.py", rf"{ENTRY} \1", description)
        super().__init__(
            prog=os.path.basename(sys.argv[0]),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names, **how):
        """Like argparse's, with the default at the end of the help, and N for an integer."""
        if how.get("default", "") not in ("", argparse.SUPPRESS):
            how["help"] += f" (default: {how['default']})"
        if names[0].startswith("--") and how.get("type") in (int, seed):
            how = {"metavar": "N", **how}
        return super().add_argument(*names, **how)

    def parse_known_args(self, args=None, namespace=None):
        """Reports a misspelt option before it reports a missing one."""
        names = [name for name in self._option_string_actions if "." not in name]
        for argument in sys.argv[1:] if args is None else args:
            option = argument.partition("=")[0]
            if option == "--":
                break
            if option.startswith("--") and "." not in option and option not in names:
                near = spelling.nearest(option.removeprefix("--"), [n[2:] for n in names])
                if near:
                    self.error(f"{option} is no option; did you mean --{near}?")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or str(action.metavar or action.dest)
            self.error(spelling.unknown(name, str(value), map(str, action.choices)))

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"{self.prog}: {untrusted.line(message)}\n")

    @contextlib.contextmanager
    def refusing(self, mistakes: tuple = (ValueError, OSError)) -> Iterator[None]:
        """Ends the program with one line and exit status 2 if the block raises one of `mistakes`.

        A ConfigError is a ValueError.
        """
        try:
            yield
        except mistakes as error:
            stopping.pass_on(error)
            self.error(" ".join(str(error).split()) + files.fix(error))
        except (RuntimeError, AssertionError) as error:
            if not _is_of_backend(error):
                raise
            reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
            self.error(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: this machine has no such "
                f"device, or jax is not installed for it{reason and f' ({reason})'}; unset it, or "
                "install the extra cuda12, cuda13 or tpu of this project"
            )


@contextlib.contextmanager
def naming(option: str, key: str) -> Iterator[None]:
    """Errors of the block about the value of a config key, "data.source='x' …", name the command's
    option that gave the value instead, "--text='x' …"."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("config.")
        if not text.startswith(key):
            raise
        raise type(error)(option + text.removeprefix(key)) from error


def _is_of_backend(error: BaseException) -> bool:
    """True for an error raised when JAX looks for devices; some are bare assertions."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(pathlib.Path(frame.filename).name == "xla_bridge.py" for frame in frames)


def typed(name: str, text: str, kind: type) -> object:
    """The value of an option --NAME=TEXT; commas separate the elements of a tuple.

    Raises: ValueError if the text is not of this kind.
    """
    if kind is tuple:
        return tuple(text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--{name}={text}: use true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        words = "a number"
        if kind is int:
            words = "a whole number"
            with contextlib.suppress(ValueError, OverflowError):
                words += f"; use {int(float(text))}"
        raise ValueError(f"--{name}={text} is not {words}") from None


def options(prefix: str, arguments: list[str]) -> dict[str, str]:
    """Maps NAME to TEXT for arguments "--PREFIX.NAME=TEXT".

    Raises: ValueError for any other argument.
    """
    found = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix(f"--{prefix}.").partition("=")
        if not argument.startswith(f"--{prefix}.") or not equals:
            raise ValueError(f"unexpected argument {argument!r}; use --{prefix}.NAME=VALUE")
        found[name] = text
    return found


def folder(text: str) -> pathlib.Path:
    """The type of an argument: a local folder or file, which need not exist."""
    if re.match(r"[a-z][a-z0-9]+:/", text):
        raise argparse.ArgumentTypeError(
            f"{text} is no folder of this machine; mount the bucket (gcsfuse, s3fs) and give that"
        )
    return pathlib.Path(text)


def seed(text: str) -> int:
    """The type of an argument: an integer that can seed a random key."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**31 - 1")
    return number


def peak_memory() -> str:
    """The peak resident memory of this process so far, as text."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
