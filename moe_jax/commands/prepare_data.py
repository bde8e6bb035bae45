"""Tokenizes a source into a folder that training reads as prepared:FOLDER, on all cores.

Examples:
  python scripts/prepare_data.py --source='dolma/*.json.gz' --tokenizer=mine.model --output=tokens
  python scripts/prepare_data.py --source=embedded --tokenizer=bytes --output=tokens \\
      --filter=gopher --filter=exact_duplicates --filter=repeated_ngrams
  python scripts/prepare_data.py --output=tokens --verify
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/1 \\
      --config.data.source=prepared:tokens --config.data.tokenizer=bytes

Killed and started again with the same options, it goes on: finished shards are not made again. The
folder has a corpus for each split, with a manifest of its shards, its counts by language, and the
documents that were dropped, by filter. The filters of text come first, then those that compare
documents (training text that equals held-out text is dropped), then those of tokens. The filters,
each with its default argument after a colon:
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import shlex
import textwrap

import tqdm

from moe_jax import command_line, config
from moe_jax.config.data import Data
from moe_jax.data import corpus, filters, policy, prepare, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.data.preparation import SHARD_BYTES, Job, Text

FIELDS = ("text_field", "label_field", "label_pattern")  # of a record


def main() -> None:
    parser = command_line.Parser(__doc__ + table())
    text = 'a path or a glob, "tfds:NAME", "hf:NAME" or "embedded"'
    parser.add_argument("--source", help=text)
    parser.add_argument(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="FOLDER",
        help="the folder to write",
    )
    kinds = "bytes, or the path of a tokenizer.json or SentencePiece model"
    parser.add_argument("--tokenizer", help=kinds)
    parser.add_argument(
        "--filter",
        action="append",
        metavar="NAME[:ARGUMENT]",
        help="drops documents (see above); may be given several times",
    )
    parser.add_argument("--workers", default=_cores(), type=int, help="processes that tokenize")
    parser.add_argument(
        "--shard_mb",
        default=SHARD_BYTES >> 20,
        type=int,
        help="MiB of text of a shard; each worker holds a few times as much",
    )
    for name in FIELDS:
        explanation = Data.__dataclass_fields__[name].metadata["explanation"]
        parser.add_argument(f"--{name}", default=getattr(policy.STRICT, name), help=explanation)
    parser.add_argument(
        "--validation_fraction",
        default=config.default().data.validation_fraction,
        type=float,
        help="share of documents to hold out if no file or split is named validation",
    )
    parser.add_argument(
        "--skip_damaged",
        default=0,
        type=int,
        help="records that cannot be used and are set aside, with the reason, in the split's "
        "quarantine.jsonl; one more is an error",
    )
    parser.add_argument(
        "--runner",
        metavar="NAME",
        help="the Apache Beam runner that does the work instead of --workers (needs apache-beam)",
    )
    parser.add_argument(
        "--runner_options",
        default="",
        metavar="OPTIONS",
        help="further options of Beam, as one word, such as '--direct_num_workers=2'",
    )
    parser.add_argument(
        "--verify", action="store_true", help="only compare the folder's files with their hashes"
    )
    arguments = parser.parse_args()
    with parser.refusing():
        if arguments.verify:
            print(verify(arguments.output))
        else:
            print("\n".join(prepare_data(arguments)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table() -> str:
    """The filters, as a part of the help."""
    rows = []
    for name, row in filters.FILTERS.items():
        default = f":{row.default}" if row.default else ""
        rows.append(
            textwrap.fill(
                f"  {name + default:24} {row.explanation}", 100, subsequent_indent=" " * 27
            )
        )
    groups = (f"  {name:24} {', '.join(rows)}" for name, rows in filters.GROUPS.items())
    return "\n".join([*rows, *groups]) + "\n"


def verify(output: pathlib.Path) -> str:
    """Compares all files with their hashes; returns a line.

    Raises: ValueError, with the first file that has changed.
    """
    with tqdm.tqdm(desc=f"hashing {output}", unit="B", unit_scale=True, disable=None) as bar:
        number = 0
        for num_bytes in prepare.verify(output):
            bar.update(num_bytes)
            number += 1
    return f"{output}: {number} files have their hashes"


def prepare_data(arguments: argparse.Namespace) -> list[str]:
    """Prepares the folder; returns lines about what it has.

    Raises: ValueError, OSError.
    """
    for name in ("source", "tokenizer"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is missing; only --verify works without it")
    for name, least in (("workers", 1), ("shard_mb", 1), ("skip_damaged", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name}={getattr(arguments, name)} must be at least {least}")
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(
            f"--validation_fraction={arguments.validation_fraction} must be at least 0 and below 1"
        )
    if arguments.runner_options and not arguments.runner:
        raise ValueError("--runner_options does nothing without --runner; give both or neither")
    if arguments.runner and arguments.skip_damaged:
        raise ValueError("--runner cannot count skipped records; leave out --skip_damaged")
    specs = tuple(arguments.filter or ())
    filters.Chosen(specs)
    with command_line.naming("--tokenizer", "data.tokenizer"):
        tokenizer = tokenizers.load(arguments.tokenizer)
    job = Job(tokenizer, specs, arguments.skip_damaged, arguments.shard_mb << 20)
    fields = {name: getattr(arguments, name) for name in (*FIELDS, "skip_damaged")}
    reading = policy.Reading(**fields)
    text = Text(arguments.source, arguments.validation_fraction, cache_folder(""), reading)
    how = {"write_shards": _by_beam(arguments)} if arguments.runner else {}
    workers = 1 if arguments.runner else arguments.workers
    with command_line.naming("--source", "data.source"):
        made = prepare.prepare_folder(text, arguments.output, job, workers=workers, **how)
    lines = [line for split, facts in made.items() for line in summary(split, facts)]
    return [*lines, f"use --config.data.source=prepared:{arguments.output}"]


def _by_beam(arguments: argparse.Namespace):
    """The function that writes shards by a pipeline.

    Raises: ValueError if apache-beam is missing.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise ValueError(
            f"--runner={arguments.runner} needs apache-beam: pip install 'apache-beam>=2.77'"
        )
    from moe_jax.data import beam_pipeline

    options = [f"--runner={arguments.runner}", *shlex.split(arguments.runner_options)]
    return functools.partial(beam_pipeline.write_shards, options=options)


def summary(split: str, facts: dict) -> list[str]:
    """Lines about a split: what it has, and what was dropped."""
    documents, num_bytes, tokens = (
        sum(facts[f"{name}_per_label"]) for name in ("documents", "bytes", "pairs")
    )
    lines = [
        f"{split}: {documents:,} documents, {num_bytes:,} bytes, {tokens:,} tokens "
        f"({num_bytes / tokens:.2f} bytes/token) in {corpus.in_shards(facts)}"
    ]
    lines += [f"  dropped by {name}: {number:,}" for name, number in facts["dropped"].items()]
    lines += [f"  skipped, {reason}: {number:,}" for reason, number in facts["skipped"].items()]
    if facts["skipped"]:
        lines.append("  the records that were skipped are named in quarantine.jsonl")
    return lines
