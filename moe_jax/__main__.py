"""`moe_jax NAME …`: one entry for all commands."""

import importlib
import pathlib
import sys

COMMANDS = sorted(
    path.stem
    for path in pathlib.Path(__file__).with_name("commands").glob("*.py")
    if path.stem != "__init__"
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        sys.exit(f"usage: moe_jax NAME …, NAME one of {', '.join(COMMANDS)}")
    del sys.argv[1]
    importlib.import_module(f"moe_jax.commands.{name}").main()


if __name__ == "__main__":
    main()
