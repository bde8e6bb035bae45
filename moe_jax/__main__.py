"""`moe_jax NAME …` runs the command NAME; `moe_jax` alone lists all commands."""

import ast
import importlib
import os
import pathlib
import signal
import sys
from typing import NoReturn

from moe_jax import spelling, stopping

FILES = {
    path.stem: path
    for path in sorted(pathlib.Path(__file__).with_name("commands").glob("*.py"))
    if path.stem != "__init__"
}
GO_ON = ("train", "sweep")  # where they were, if they are run again


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(listing())
        return
    if name not in FILES:
        meant = spelling.did_you_mean(name, FILES)
        print(f"moe_jax: no command {name!r}{meant} (moe_jax --help lists all)", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"moe_jax {name}"]  # the program's name in help and error messages
    run(name)


def run(name: str) -> None:
    """Runs the command `name` with the arguments in sys.argv.

    Any of `stopping.SIGNALS` ends it with one line, from its imports on, unless the command itself
    takes signals, as a training loop does. What it began to write is removed.
    """
    status, then = stopping.EXIT_INTERRUPTED, ""
    if name in GO_ON:
        status, then = stopping.EXIT_PREEMPTED, "; run again to go on"

    def stop(number: signal.Signals) -> NoReturn:
        program = os.path.basename(sys.argv[0])
        print(f"{program}: stopped by {number.name}{then}", file=sys.stderr)
        stopping.end(status)

    with stopping.requests(stop, until_exit=True):
        try:
            importlib.import_module(f"moe_jax.commands.{name}").main()
        except SystemExit as ended:
            if ended.code == status or stopping.hangs():
                stopping.leave(int(ended.code or 0))
            raise
        if stopping.hangs():
            stopping.leave(0)


def listing() -> str:
    """Every command with the first line of its docstring, read without importing its file."""
    lines = ["usage: moe_jax NAME [options]; moe_jax NAME --help explains them", "", "commands:"]
    for name, path in FILES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{max(map(len, FILES))}}  {text.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
