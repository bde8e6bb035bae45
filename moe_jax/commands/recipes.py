"""The upcycling recipes: what each keeps, what it changes, its step 0 and its parameters.

Examples:
  python scripts/recipes.py           all recipes as a table
  python scripts/recipes.py drop      one recipe with its parameters
  python scripts/recipes.py --write   update the table in docs/upcycling.md

The table comes from the registry in moe_jax/upcycle/recipes.py. --check ends with status 1 if
docs/upcycling.md has another table.
"""

import pathlib

from moe_jax import command_line
from moe_jax.upcycle import recipes

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "upcycling.md"
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("name", nargs="?", choices=recipes.RECIPES, metavar="NAME", help="the recipe to explain")
    purpose = parser.add_mutually_exclusive_group()
    purpose.add_argument("--write", action="store_true", help="update docs/upcycling.md")
    purpose.add_argument("--check", action="store_true", help="compare with docs/upcycling.md")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print(recipes.explained(arguments.name) if arguments.name else recipes.table())
        return
    with parser.refusing():
        if not PAGE.is_file():
            raise ValueError(f"{PAGE} does not exist; --write and --check are for a checkout")
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{recipes.table()}\n{END}{after}"
    if arguments.write:
        PAGE.write_text(new, encoding="utf-8")
    elif new != text:
        parser.exit(1, "docs/upcycling.md is old; run python scripts/recipes.py --write\n")
