"""The results of `moe_jax conformance` as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence

from moe_jax.conformance import ours
from moe_jax.conformance.peers import Found

PASS, FAIL = "pass", "FAIL"


def of_rules(found: Mapping[str, ours.Differences]) -> tuple[str, bool]:
    """A row for each rule, a column for each check; whether all pass."""
    rows = [
        (name, *(_cell(differences[check], ours.LIMIT) for check in ours.CHECKS))
        for name, differences in found.items()
    ]
    return _table(("rule", *ours.CHECKS), rows), not any(FAIL in "".join(row) for row in rows)


def of_updates(found: Mapping[str, tuple[float, float]]) -> tuple[str, bool]:
    rows = [(name, _cell(*pair), f"{pair[1]:.1e}") for name, pair in found.items()]
    return _table(("update", "result", "limit"), rows), not any(FAIL in row[1] for row in rows)


def of_peer(name: str, found: Iterable[Found]) -> str:
    """A row for each family of a peer, with its version as the title of a column."""
    rows = [
        (one.rule, one.code, *(("not run", one.missing) if one.missing else _pair(one)))
        for one in found
    ]
    return _table(("rule", name, "loss", "gradient"), rows)


def _pair(one: Found) -> tuple[str, str]:
    return _cell(one.loss, ours.LIMIT), _cell(one.gradient, ours.LIMIT)


def _cell(difference: float | None, limit: float) -> str:
    if difference is None:
        return "-"
    return f"{PASS if difference <= limit else FAIL} {difference:.0e}"


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    lines = [titles, tuple("-" * width for width in widths), *rows]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)
