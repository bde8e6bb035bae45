"""Prints rows of a run's training text as the model gets them, with what is trained in colour.

Examples:
  python scripts/show_data.py --config=configs/quickstart.py
  python scripts/show_data.py --config=configs/continue.py --config.init.source=path/to/model \\
      --config.data.source=talks.jsonl --config.data.conversations=True --row=3 --rows=2

Tokens with a loss are green, the others are grey, and a line stands between documents that do not
see each other. Without a terminal, [[ and ]] stand around what is trained. The text is tokenized
as a run would do it, and kept in the cache for the run. A row is shown as its targets, with special
tokens such as </s>: the begin token of a document is an input only.
"""

import itertools
import sys
from collections.abc import Iterator

import numpy as np

from moe_jax import command_line, untrusted
from moe_jax import config as configs
from moe_jax.data import batches, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.training import text as texts

GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.usage = "%(prog)s --config=FILE [--row=N] [--rows=N] [--config.SECTION.KEY=VALUE ...]"
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", required=True, help="a Python file with get_config()")
    add("--row", type=int, default=0, help="the first row")
    add("--rows", type=int, default=1, help="number of rows")
    add("--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key")
    arguments, overrides = parser.parse_known_args()
    with parser.refusing():
        for name, least in (("row", 0), ("rows", 1)):
            if (number := getattr(arguments, name)) < least:
                raise ValueError(f"--{name}={number} must be at least {least}")
        settings = configs.resolve(configs.parse([f"--config={arguments.config}", *overrides]))
        for line in lines(settings, arguments.row, arguments.rows, colour=sys.stdout.isatty()):
            print(line)


def lines(settings: configs.Run, first: int, number: int, *, colour: bool) -> Iterator[str]:
    """Rows `first`, `first` + 1, … of the run, each with a heading.

    Raises: ConfigError, ValueError for a text that cannot be read.
    """
    tokenizer = tokenizers.load(settings.data.tokenizer)
    text = texts.open_text(settings, tokenizer, cache_folder(settings.data.cache_dir))
    settings = texts.with_steps(settings, text)
    rows = texts.rows(text, settings, {"left_out": ()}, 0)
    made = batches.batches(
        text.train,
        rows.plan,
        batch_size=1,
        start_step=first,
        columns=text.columns,
        document_mask=settings.data.document_mask,
    )
    for at, batch in enumerate(itertools.islice(made, number), start=first):
        row = batches.Batch(**{n: x[0] for n, x in vars(batch).items() if x is not None})
        length, trained = int(np.sum(row.segment_ids_BT > 0)), int(np.sum(row.weights_BT > 0))
        documents = len(set(row.segment_ids_BT.tolist()) - {0})
        yield (
            f"row {at}: {length} of {settings.data.sequence_length} tokens, {documents} "
            f"documents, {trained} tokens with a loss"
        )
        yield from _documents(row, tokenizer, colour)


def _documents(row: batches.Batch, tokenizer: tokenizers.Tokenizer, colour: bool) -> Iterator[str]:
    """The targets of each document of a row, marked by whether they are trained."""
    clean = untrusted.page if colour else str
    trained_from, trained_to = (GREEN, PLAIN) if colour else ("[[", "]]")
    others_from, others_to = (GREY, PLAIN) if colour else ("", "")
    segments, targets = np.asarray(row.segment_ids_BT), np.asarray(row.targets_BT)
    weights = np.asarray(row.weights_BT)
    for segment in sorted(set(segments.tolist()) - {0}):
        own = np.flatnonzero(segments == segment)
        parts = []
        for part in np.split(own, np.flatnonzero(np.diff(weights[own] > 0)) + 1):
            is_trained = weights[part[0]] > 0
            begin, end = (trained_from, trained_to) if is_trained else (others_from, others_to)
            parts.append(f"{begin}{clean(_decoded(targets[part], tokenizer))}{end}")
        yield "".join(parts)
        yield "-" * 20


def _decoded(ids: np.ndarray, tokenizer: tokenizers.Tokenizer) -> str:
    """The text of ids, with the special tokens, which `decode` leaves out: one of them ends a
    turn."""
    special = {i: token for token, i in tokenizer.special_tokens.items()}
    runs = itertools.groupby(ids.tolist(), key=special.get)
    return "".join(
        token * len(list(run)) if token is not None else tokenizer.decode(np.array(list(run)))
        for token, run in runs
    )
