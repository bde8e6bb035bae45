"""The upcycling recipes as a table: what each keeps, what it changes, and its step 0.

Examples:
  python scripts/recipes.py
  python scripts/recipes.py --write
  python scripts/recipes.py --check

The table comes from the registry in moe_jax/upcycle/recipes.py. --write puts it into README.md,
between its two markers; --check ends with status 1 if README.md has another table.
"""

import pathlib

from moe_jax import command_line
from moe_jax.upcycle import recipes

README = pathlib.Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"


def main() -> None:
    parser = command_line.Parser(__doc__)
    purpose = parser.add_mutually_exclusive_group()
    purpose.add_argument("--write", action="store_true", help="update README.md")
    purpose.add_argument("--check", action="store_true", help="compare with README.md")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print(recipes.table())
        return
    with parser.refusing():
        if not README.is_file():
            raise ValueError(f"{README} does not exist; --write and --check are for a checkout")
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{recipes.table()}\n{END}{after}"
    if arguments.write:
        README.write_text(new, encoding="utf-8")
    elif new != text:
        parser.exit(1, "README.md has another table; run python scripts/recipes.py --write\n")
