"""report.html: one self-contained page about finished runs, which answers first.

A section is a row of SECTIONS: a function from the report to HTML, which is "" if it has nothing to
show.
"""

import base64
import dataclasses
import functools
import html
import pathlib
from collections.abc import Callable

from moe_jax import files, untrusted
from moe_jax.report import figures, markup, style, tables
from moe_jax.report.records import Group, Record, groups, left_out, read_record

REGISTERS = {"embedded": "LibreOffice help in 19 languages: a technical register only"}
MOST_SENTENCES = 8  # before the others are folded


@dataclasses.dataclass(frozen=True)
class Report:
    """What a section can show.

    missing: the names of unfinished runs. commands: those that made the runs and the page.
    images: the figures by name.
    """

    records: list[Record]
    missing: list[str]
    commands: list[str]
    images: dict[str, style.Files]

    @functools.cached_property
    def groups(self) -> list[Group]:
        return groups(self.records)


def records_of(folders: dict[str, pathlib.Path | None]) -> list[Record]:
    """The records of the finished runs, each with its index among all runs."""
    every = enumerate(folders.items())
    return [read_record(name, place, folder) for place, (name, folder) in every if folder]


def write(
    output: pathlib.Path, folders: dict[str, pathlib.Path | None], commands: list[str]
) -> pathlib.Path:
    """Writes <output>/report.html and <output>/figures/*.{png,svg}; returns the page's path.

    Args:
      folders: the runs' workdirs by name, in the order of display; None for unfinished runs.
      commands: commands to be shown besides those that the runs have kept.

    Raises: ValueError for a run whose files are damaged.
    """
    try:
        return _write(output, folders, commands)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{output / 'report.html'} is not written: config.json, result.json or metrics.jsonl "
            f"of one of its runs is not as a run writes it ({error!r})"[:400]
        ) from error


def _write(
    output: pathlib.Path, folders: dict[str, pathlib.Path | None], commands: list[str]
) -> pathlib.Path:
    records = records_of(folders)
    missing = [name for name, folder in folders.items() if not folder]
    (output / "figures").mkdir(parents=True, exist_ok=True)
    if (output / "figures").is_symlink():
        raise ValueError(f"{output / 'figures'} is a link; remove it")
    untrusted.check_folder(output / "figures")
    images = figures.draw(records)
    for name, image in images.items():
        for kind, content in (("png", image.wide), ("svg", image.svg)):
            with files.whole_file(output / "figures" / f"{name}.{kind}") as unfinished:
                unfinished.write_bytes(content)
    report = Report(records, missing, commands, images)
    sections = [section(report) for section in SECTIONS.values()]
    page = output / "report.html"
    files.write_text(page, markup.page(f"moe_jax: {output.resolve().name}", sections))
    return page


def _answer(report: Report) -> str:
    """A sentence per comparison, and what the numbers are of."""
    sentences = tables.sentences(report.groups)
    first, rest = sentences[:MOST_SENTENCES], sentences[MOST_SENTENCES:]
    more = markup.folded(f"{len(rest)} more comparisons", markup.items(rest)) if rest else ""
    texts = dict.fromkeys(record.source for record in report.records)
    notes = [f"Text: {REGISTERS.get(source, source)}." for source in texts]
    unigrams = sorted({f"{r.result['byte_unigram_bits']:.3f}" for r in report.records})
    notes.append(f"A model that knows only byte frequencies needs {', '.join(unigrams)} bits/byte.")
    if report.missing:
        notes.append(f"Not finished, and not shown here: {', '.join(report.missing)}.")
    if again := left_out(report.records, report.groups):
        names = ", ".join(record.name for record in again)
        notes.append(f"In no mean, because a run of the same config and seed is in it: {names}.")
    notes += [tables.skipped_records(report.records), tables.methods(report.groups)]
    return markup.items(first) + more + markup.paragraph(" ".join(filter(None, notes)))


def _runs(report: Report) -> str:
    parts = ["<h2>Runs</h2>", tables.summary(report.groups)]
    if len(report.groups) < len(report.records):
        parts.append(markup.folded("each run", tables.each_run(report.records)))
    return "\n".join(parts)


def _figures(report: Report) -> str:
    parts = []
    for name, image in report.images.items():
        row = figures.FIGURES[name]
        wide, narrow = (base64.b64encode(png).decode() for png in (image.wide, image.narrow))
        parts.append(
            f"<h2>{row.title}</h2>\n<figure><picture>"
            f'<source media="(max-width: 700px)" srcset="data:image/png;base64,{narrow}">'
            f'<img src="data:image/png;base64,{wide}" '
            f'alt="{html.escape(row.result(report.records))}"></picture>'
            f"<figcaption>{html.escape(row.caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _compute(report: Report) -> str:
    parts = ["<h2>Compute</h2>", tables.compute(report.groups, report.records)]
    if crossings := tables.crossings(report.groups):
        parts += ["<h3>Catching up</h3>", crossings]
    if recoveries := tables.recoveries(report.groups, report.records):
        parts += ["<h3>Dip and recovery after a start from a parent</h3>", recoveries]
    return "\n".join(parts)


def _sources(report: Report) -> str:
    table = tables.of_sources(report.groups)
    return markup.folded("what each source of the mixtures gave", table) if table else ""


def _samples(report: Report) -> str:
    prompts = [sample["prompt"] for sample in report.records[0].result["samples"]]
    parts = []
    for prompt in prompts:
        rows = [
            f"<tr><td>{html.escape(record.name)}</td><td class='text'><b>{html.escape(prompt)}</b>"
            f"{html.escape(sample['continuation'])}</td></tr>"
            for record in report.records
            for sample in record.result["samples"]
            if sample["prompt"] == prompt
        ]
        parts.append(f'<div class="scroll" tabindex="0"><table>{"".join(rows)}</table></div><br>')
    if not parts:
        return ""
    summary = f"{len(prompts)} prompts, one continuation per run"
    whole = "<h2>Sample continuations</h2>\n" + tables.of_texts(report.records)
    return whole + markup.folded(summary, "\n".join(parts))


def _commands(report: Report) -> str:
    kept = (record.result.get("command") or "" for record in report.records)
    shown = dict.fromkeys([*report.commands, *filter(None, kept)])
    lines = [f"<h2>Commands and versions</h2><pre>{html.escape(chr(10).join(shown))}</pre>"]
    for versions, names in tables.versions(report.records).items():
        whose = "" if len(names) == len(report.records) else f" ({', '.join(names)})"
        lines.append(f"<p>{html.escape(versions + whose)}</p>")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Report], str]] = {
    "answer": _answer,
    "runs": _runs,
    "figures": _figures,
    "compute": _compute,
    "sources": _sources,
    "samples": _samples,
    "commands": _commands,
}
