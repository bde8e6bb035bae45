"""Explains the upcycling recipes: what each keeps and changes, its step 0 and its parameters.

Examples:
  python scripts/recipes.py           all recipes as a table
  python scripts/recipes.py drop      one recipe with its parameters
"""

from moe_jax import command_line
from moe_jax.upcycle import explanation, recipes


def main() -> None:
    parser = command_line.Parser(__doc__)
    chosen = "the recipe to explain, one of %(choices)s"
    parser.add_argument("name", nargs="?", choices=recipes.RECIPES, metavar="NAME", help=chosen)
    name = parser.parse_args().name
    print(explanation.explained(name) if name else explanation.table())
