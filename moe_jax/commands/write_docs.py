"""Writes the generated parts of docs/: tables of recipes, config keys, constants and metrics.

Examples:
  python scripts/write_docs.py
  python scripts/write_docs.py --check

A generated part stands between two markers. --check writes nothing, and exits with status 1 if a
page differs from what the code generates.
"""

import pathlib

from moe_jax import command_line
from moe_jax.config import listing, published
from moe_jax.evaluation import text_metrics
from moe_jax.upcycle import explanation

DOCS = pathlib.Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
GENERATED = {
    "upcycling.md": explanation.table,
    "configuration.md": listing.page,
    "published_configs.md": published.page,
    "text_metrics.md": text_metrics.card,
}


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only compare the pages, write nothing"
    )
    arguments = parser.parse_args()
    with parser.refusing():
        if not DOCS.is_dir():
            raise ValueError(f"{DOCS} does not exist; this command is for a checkout")
        for name, part in GENERATED.items():
            page = DOCS / name
            text = page.read_text(encoding="utf-8")
            new = replaced(text, part())
            if arguments.check and new != text:
                parser.exit(1, f"docs/{name} is old; run python scripts/write_docs.py\n")
            elif new != text:
                page.write_text(new, encoding="utf-8")
                print(f"docs/{name}")


def replaced(page: str, part: str) -> str:
    """The page with another generated part between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{part}\n{END}{after}"
