"""`moe_jax NAME …` runs the command NAME; `moe_jax` alone lists all commands."""

import ast
import importlib
import pathlib
import sys

from moe_jax import spelling

FILES = {
    path.stem: path
    for path in sorted(pathlib.Path(__file__).with_name("commands").glob("*.py"))
    if path.stem != "__init__"
}


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
    importlib.import_module(f"moe_jax.commands.{name}").main()


def listing() -> str:
    """Every command with the first line of its docstring, read without importing its file."""
    lines = ["usage: moe_jax NAME [options]; moe_jax NAME --help explains them", "", "commands:"]
    for name, path in FILES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:{max(map(len, FILES))}}  {text.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
