"""report.html: one self-contained page about a set of finished runs."""

import base64
import html
import pathlib

from moe_jax import files, strict_json, untrusted
from moe_jax.analysis import measures
from moe_jax.model.router import ROUTERS
from moe_jax.report import figures
from moe_jax.report.figures import Record
from moe_jax.training import metrics

CAPTIONS = {
    "loss": "Loss against the tokens seen after the parent; an untrained model's is off the scale. "
    "Dotted: the dense parent's loss in its last training steps, and its last held-out loss, on "
    "the same sample of the held-out text; the table's losses are on all of it. A "
    "run that starts at its parent's loss first gets worse: its learning rate warms up again, and "
    "Adam's moments start at zero.",
    "languages": "Final held-out bits per byte by language. Bytes are not comparable between "
    "scripts (a Cyrillic letter has two, a CJK character three): compare runs within one line.",
    "expert_load": "Where the routers send held-out tokens: each row of a panel sums to 100 %.",
    "router_health": "Evenness of the load on held-out text during training.",
    "experts_by_layer": "At the end of training. Left: the effective number of experts in each "
    "layer (dotted: all, evenly). Middle: the similarity of their weights, entry by entry: 1 for "
    "copies, 0 for random ones and for copies with their neurons in a different order. Right: the "
    "distance of the routers' weights from their initial values.",
    "training_flops": "The cost of each run, without and with that of its dense parent.",
}
REGISTERS = {"embedded": "LibreOffice help in 19 languages: a technical register only"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
        max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th, td {{ white-space: nowrap; }}
td.text {{ text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 34rem; }}
tr.best td {{ font-weight: 600; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: .85rem; }}
.note {{ color: #555; }}
</style></head><body>
{body}
</body></html>
"""


def read_record(name: str, place: int, folder: pathlib.Path) -> Record:
    """The record of a finished run's workdir; its name mentions a router that does not learn."""
    untrusted.check_folder(folder)
    config = strict_json.read_object(folder / "config.json")
    row = ROUTERS.get(config["model"]["router"])
    if row and not row.learned:
        name += f" ({config['model']['router'].replace('_', ' ')})"
    return Record(
        name=untrusted.label(name),
        place=place,
        config=config,
        result=strict_json.read_object(folder / "result.json"),
        rows=metrics.read(folder / "metrics.jsonl"),
    )


def records_of(folders: dict[str, pathlib.Path | None]) -> list[Record]:
    """The records of the finished runs, each with its index among all runs."""
    every = enumerate(folders.items())
    return [read_record(name, place, folder) for place, (name, folder) in every if folder]


def write(
    output: pathlib.Path, folders: dict[str, pathlib.Path | None], commands: list[str]
) -> pathlib.Path:
    """Writes <output>/report.html and <output>/figures/*.png; returns the page's path.

    Args:
      folders: the runs' workdirs by name, in the order of display; None for unfinished runs.
      commands: the runs' commands, to be shown.

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
    title = f"moe_jax: {output.name}"
    sections = [f"<h1>{html.escape(title)}</h1>", _summary(records, missing)]
    for name, png in figures.draw(records).items():
        with files.whole_file(output / "figures" / f"{name}.png") as unfinished:
            unfinished.write_bytes(png)
        encoded = base64.b64encode(png).decode()
        sections.append(
            f"<h2>{name.replace('_', ' ').capitalize()}</h2>"
            f'<p class="note">{CAPTIONS[name]}</p>'
            f'<img src="data:image/png;base64,{encoded}" alt="{CAPTIONS[name]}">'
        )
    sections += [_samples(records), _commands(records, commands)]
    page = output / "report.html"
    files.write_text(page, _PAGE.format(title=html.escape(title), body="\n".join(sections)))
    return page


def _table(head: list[str], rows: list[list[str]], best: int | None = None) -> str:
    """An HTML table with escaped cells; `best` is the index of a row to highlight."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="best">{cells}</tr>' if i == best else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _summary(records: list[Record], missing: list[str]) -> str:
    table = []
    for result in (record.result for record in records):
        own, parent = result["training_flops"], result["parent_training_flops"]
        cells = {
            "bits/byte": f"{result['bits_per_byte']:.3f}",
            "nats/token": f"{result['loss']:.3f}",
            "tokens": f"{result['tokens'] / 1e6:.2f} M",
            "parameters": f"{result['parameters'] / 1e6:.2f} M",
            "active": f"{result['active_parameters'] / 1e6:.2f} M",
            "TFLOP": f"{own / 1e12:.3g}",
            "TFLOP with parent": f"{(own + parent) / 1e12:.3g}",
        }
        for name, value in measures.columns(result).items():
            cells[name.replace("_", " ")] = "" if value == "" else f"{value:.1f}"
        table.append(cells)
    rows = [[record.name, *row.values()] for record, row in zip(records, table, strict=True)]
    best = min(range(len(records)), key=lambda i: records[i].result["bits_per_byte"])
    texts = dict.fromkeys(record.config["data"]["source"] for record in records)
    notes = [f"Text: {REGISTERS.get(source, source)}." for source in texts]
    unigram = records[0].result["byte_unigram_bits"]
    notes.append(f"A model that knows only byte frequencies needs {unigram:.3f} bits/byte.")
    if missing:
        notes.append(f"Not finished, and not shown here: {', '.join(missing)} (see results.csv).")
    note = html.escape(" ".join(notes))
    return f'<p class="note">{note}</p>\n{_table(["run", *table[0]], rows, best)}'


def _samples(records: list[Record]) -> str:
    prompts = [sample["prompt"] for sample in records[0].result["samples"]]
    if not prompts:
        return ""
    parts = ["<h2>Sample continuations</h2>"]
    for prompt in prompts:
        rows = [
            f"<tr><td>{html.escape(record.name)}</td><td class='text'><b>{html.escape(prompt)}</b>"
            f"{html.escape(sample['continuation'])}</td></tr>"
            for record in records
            for sample in record.result["samples"]
            if sample["prompt"] == prompt
        ]
        parts.append("<table>" + "".join(rows) + "</table><br>")
    return "\n".join(parts)


def _commands(records: list[Record], commands: list[str]) -> str:
    versions = records[0].result["versions"] | {"device": records[0].result["device"]}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = html.escape("\n".join(commands))
    return f"<h2>Commands and versions</h2><pre>{lines}</pre><p>{html.escape(shown)}</p>"
