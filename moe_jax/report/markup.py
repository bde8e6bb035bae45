"""Pieces of an HTML page; all texts are escaped."""

import dataclasses
import html
from collections.abc import Sequence

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
        max-width: 1160px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
h3 {{ font-size: 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
          vertical-align: top; overflow-wrap: normal; white-space: nowrap; }}
th {{ white-space: normal; vertical-align: bottom; min-width: 4rem; }}
th:first-child, td:first-child {{ text-align: left; }}
th[aria-sort] {{ cursor: pointer; }}
th[aria-sort=ascending]::after {{ content: "\\a0\\25b4"; }}
th[aria-sort=descending]::after {{ content: "\\a0\\25be"; }}
td.text {{ text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; }}
tr.best td {{ font-weight: 600; }}
img {{ display: block; width: 100%; height: auto; }}
figure {{ margin: 1rem 0; }}
pre {{ background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: .85rem; }}
summary {{ cursor: pointer; }}
.note, figcaption {{ color: #555; font-size: .9rem; }}
</style></head><body>
{body}
<script>{script}</script>
</body></html>
"""
# A click on a head sorts the rows by that column, again in the other direction. Cells without a
# number are last in both.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.value ?? "";
  heads.forEach((head, i) => {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending", rows = [...body.rows];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const number = rows.every(r => key(r, i) === "" || !isNaN(key(r, i)));
      rows.sort((r, s) => {
        const a = key(r, i), b = key(s, i);
        if (a === "" || b === "") return (a === "") - (b === "");
        return (number ? a - b : a.localeCompare(b)) * (up ? 1 : -1);
      });
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The text of a cell of a table, and the number that it is sorted by; None sorts last."""

    text: str
    value: float | None = None


def page(title: str, sections: Sequence[str]) -> str:
    body = f"<h1>{html.escape(title)}</h1>\n" + "\n".join(filter(None, sections))
    return PAGE.format(title=html.escape(title), body=body, script=SCRIPT)


def table(rows: Sequence[dict[str, Cell]], best: int | None = None) -> str:
    """A sortable table, in a box of its own that scrolls on a narrow screen.

    rows: the cells by the heads of their columns; the first column has the rows' names. Columns
      that are empty in all rows are left out. best: the index of a row to show in bold.
    """
    heads = [head for head in rows[0] if any(row[head].text for row in rows)]
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(_cell(row[head], first=head == heads[0]) for head in heads)
        lines.append(f'<tr class="best">{cells}</tr>' if i == best else f"<tr>{cells}</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    return (
        '<div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody></table></div>"
    )


def _cell(cell: Cell, *, first: bool) -> str:
    value = cell.text if first else "" if cell.value is None else f"{cell.value:.9g}"
    return f'<td data-value="{html.escape(value)}">{html.escape(cell.text)}</td>'


def paragraph(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def items(sentences: Sequence[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{html.escape(text)}</li>" for text in sentences) + "</ul>"


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>\n{inside}\n</details>"
