"""Measures a model's loss on a text: nats per token and bits per byte, by label.

Examples:
  python scripts/evaluate.py --checkpoint=runs/mine
  python scripts/evaluate.py --checkpoint=path/to/moe --source=path/to/text
  python scripts/evaluate.py --checkpoint=path/to/moe --source=path/to/text --json

The checkpoint is a run's workdir (or the start of its name, if it is unique) or a Hugging Face
folder. Without --source, the text is the run's own held-out text, found in your cache by the hash
of its tokens: the paths in a run's config are not followed, because a stranger may have written
them. With --source, all of its documents count, unless its files are named as splits
(validation.jsonl): then those of the validation split.

Each loss has a 95 % interval, from a bootstrap over the sequences: it says how far another sample
of such text would move the loss, and a text of one sequence has none. Compare models with different
tokenizers by bits per byte.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import shlex

import jax

from moe_jax import command_line, model, stores, strict_json, untrusted
from moe_jax import config as configs
from moe_jax.config.resolved import LONGEST_ROW
from moe_jax.data import batches, prepare, sources, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.data.document import VALIDATION
from moe_jax.evaluation import perplexity
from moe_jax.hf import folders
from moe_jax.model.fields import without_effect
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import checkpoint

LONGEST_STORED = 32_768  # tokens; a run's own row length above it is used only if it is given


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir, RUN@STEP or a Hugging Face folder",
    )
    add(
        "--source",
        metavar="TEXT",
        help="the text, given as for config.data.source (default: the run's held-out text)",
    )
    add("--tokenizer", help="a tokenizer to use instead of the model's own")
    rows = (
        f"tokens per sequence (default: the run's, else the model's limit, at most {LONGEST_ROW})"
    )
    add("--sequence_length", type=int, help=rows)
    add("--batch_size", type=int, default=8, help="sequences per batch")
    add("--max_batches", type=int, default=0, help="number of batches to read; 0 reads all")
    fewer = "experts per token in this evaluation (default: as in training)"
    add("--num_experts_per_tok", type=int, help=fewer)
    add("--seed", type=command_line.seed, default=0, help="seed of the bootstrap for the intervals")
    add("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    add("--json", action="store_true", help="print a JSON object instead of a table")
    arguments = parser.parse_args()
    with parser.refusing():
        report = run(arguments)
    print(strict_json.text(report, indent=1) if arguments.json else text(report))


def run(arguments: argparse.Namespace) -> dict:
    """The report: losses, intervals and counts, for all labels together and for each.

    Raises: ValueError, in one line, for options that do not fit the model.
    """
    found = stores.find(arguments.checkpoint)
    folder = found.folder
    config = configs.model_of(folder)
    data = _data(arguments, folder, config)
    if (number := arguments.num_experts_per_tok) is not None:
        config = dataclasses.replace(config, num_experts_per_tok=number)
        for line in without_effect(config, ["num_experts_per_tok"], "--"):
            raise ValueError(line)
    tokenizer = tokenizers.load(arguments.tokenizer or configs.tokenizer_of(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}; "
            "is this the tokenizer that it was trained with?"
        )
    corpus = _corpus(arguments, found, data, tokenizer)
    mesh = _mesh(config)
    _, params = stores.load(found, mesh, allow_nonfinite=arguments.allow_nonfinite)
    shards = sharding.batch_shards(mesh.shape)
    rows = batches.feed(
        batches.evaluation_batches,
        corpus,
        jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=-(-arguments.batch_size // shards) * shards,
        sequence_length=data.sequence_length,
        max_batches=arguments.max_batches,
    )
    step = jax.jit(
        perplexity.make_eval_step(config, len(corpus.labels)),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )
    sums = perplexity.evaluate(meshes.under(mesh, step), params, rows, corpus.bytes_per_token)
    # The number of documents in only the first batches is not known.
    numbers = corpus.documents_per_label if not arguments.max_batches else ()
    documents = dict(zip(corpus.labels, numbers, strict=False))
    parts = {label: sums.of_label(label) for label in corpus.labels}
    return {
        "checkpoint": str(found),
        "source": data.source,
        "tokenizer": tokenizer.fingerprint,
        **_entry(sums, sum(documents.values()) or None, arguments.seed),
        "labels": {
            label: _entry(part, documents.get(label), arguments.seed)
            for label, part in parts.items()
            if part.tokens_RN.any()
        },
    }


def _data(
    arguments: argparse.Namespace, folder: pathlib.Path, config: model.ModelConfig
) -> configs.Data:
    """The text to evaluate on and its row length: a run's own, unless options override them."""
    for name, least in (("sequence_length", 1), ("batch_size", 1), ("max_batches", 0)):
        if (number := getattr(arguments, name)) is not None and number < least:
            raise ValueError(f"--{name}={number} must be at least {least}")
    own = configs.Data(source="", sequence_length=min(config.max_position_embeddings, LONGEST_ROW))
    if not folders.is_folder(folder):
        own = configs.Data(**configs.load_json(folder).data)
    source = arguments.source or own.source
    if not source:
        raise ValueError(f"{folder} has no text of its own; give --source=TEXT")
    if arguments.source:
        sources.check(source)
    if not (arguments.sequence_length or 0 < own.sequence_length <= LONGEST_STORED):
        raise ValueError(
            f"the config of {folder} has rows of {own.sequence_length} tokens, not of 1 to "
            f"{LONGEST_STORED}; give --sequence_length=N"
        )
    data = dataclasses.replace(
        own,
        source=source,
        sequence_length=arguments.sequence_length or own.sequence_length,
        validation_fraction=own.validation_fraction if source == own.source else 1.0,
    )
    config.check_rows(data.sequence_length, "lower --sequence_length")
    if config.dispatch == "merge" and data.sequence_length <= config.merge_segment_length:
        raise ValueError(
            f"--sequence_length={data.sequence_length} is one segment of merged experts, which is "
            f"not counted; use a multiple of {config.merge_segment_length}"
        )
    return data


def _corpus(
    arguments: argparse.Namespace,
    source: configs.Source,
    data: configs.Data,
    tokenizer: tokenizers.Tokenizer,
) -> TokenizedCorpus:
    """The text given by the person, or else the run's own, which is looked up by its hash."""
    cache = cache_folder("")
    if arguments.source or data.source == "embedded":
        fraction = data.validation_fraction
        return prepare.open_corpus(
            data.source, VALIDATION, tokenizer, validation_fraction=fraction, cache=cache
        )
    hashes = checkpoint.newest_data(source.checkpoints, source.step).get("text")
    digest = hashes.get(VALIDATION) if isinstance(hashes, dict) else None
    found = prepare.of_digest(digest, cache) if isinstance(digest, str) else None
    if found is None:
        raise ValueError(
            f"the held-out text of {source} is not in the cache {cache}, and {data.source}, which "
            f"its config names, is not read for it; give --source={shlex.quote(data.source)}"
        )
    return found


def _mesh(config: model.ModelConfig) -> jax.sharding.Mesh:
    """A mesh of all devices, with the parameters in as many shards as their sizes allow."""
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    for parts in range(jax.device_count(), 1, -1):
        if jax.device_count() % parts == 0:
            mesh = meshes.make({"fsdp": parts, "data": -1})
            with contextlib.suppress(ValueError):  # an axis is not divisible by this number
                sharding.abstract(shapes, mesh)
                return mesh
    return meshes.make({"data": -1})


def _entry(sums: perplexity.Sums, documents: int | None, seed: int) -> dict:
    loss, intervals = sums.loss(), sums.intervals(seed=seed)
    return {
        "documents": documents,
        "tokens": loss.held_out_tokens,
        "loss": loss.loss,
        "loss_interval": intervals["loss"],
        "bits_per_byte": loss.bits_per_byte,
        "bits_per_byte_interval": intervals["bits_per_byte"],
    }


ROW = "{:16} {:>10} {:>12} {:>10} {:>17} {:>10} {:>17}"


def text(report: dict) -> str:
    """The report as a table."""
    rows = {"all": report, **report["labels"]} if len(report["labels"]) > 1 else {"all": report}
    lines = [
        f"{report['checkpoint']} on {report['source']}",
        ROW.format("label", "documents", "tokens", "nats/token", "95 %", "bits/byte", "95 %"),
    ]
    for label, row in rows.items():
        documents = "" if row["documents"] is None else f"{row['documents']:,}"
        counts = documents, f"{row['tokens']:,}"
        cells = []
        for name in ("loss", "bits_per_byte"):
            interval = row[f"{name}_interval"]
            shown = "one row" if interval is None else "{:.4f} – {:.4f}".format(*interval)
            cells += [f"{row[name]:.4f}", shown]
        lines.append(ROW.format(untrusted.label(label), *counts, *cells))
    return "\n".join(map(untrusted.line, lines))
