"""The loss of a model on a text, without training: nats per token and bits per byte, by label.

Examples:
  python scripts/evaluate.py --checkpoint=runs/mine
  python scripts/evaluate.py --checkpoint=path/to/moe --source=path/to/text
  python scripts/evaluate.py --checkpoint=path/to/moe --source=path/to/text --json

The checkpoint is a run's workdir (or the only one that begins so) or a Hugging Face folder. Without
--source it is a run's own held-out text. All documents of another --source count, unless files of
it are named as splits (validation.jsonl): then those of the validation split.

Each loss has its 95 % interval, by a bootstrap over rows of the text: it says how far another
sample of such text would move the loss. Compare models of different tokenizers by bits per byte.
"""

import argparse
import contextlib
import dataclasses
import functools
import json

import jax

from moe_jax import command_line, model, stores
from moe_jax import config as configs
from moe_jax.data import batches, prepare, tokenizers
from moe_jax.data.document import VALIDATION
from moe_jax.evaluation import perplexity
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

LONGEST_ROW = 1024  # tokens, where neither an option nor a run says how many


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir or a Hugging Face folder",
    )
    add("--source", metavar="TEXT", help="as config.data.source (the run's own held-out text)")
    add("--tokenizer", help="a tokenizer to use instead of the model's own")
    rows = f"tokens of a row (the run's; else the model's positions, at most {LONGEST_ROW})"
    add("--sequence_length", type=int, metavar="N", help=rows)
    add("--batch_size", type=int, default=8, metavar="N", help="rows of a batch (8)")
    add("--max_batches", type=int, default=0, metavar="N", help="batches to read; 0 is all (0)")
    fewer = "experts of a token in this evaluation (the model's own number)"
    add("--num_experts_per_tok", type=int, metavar="K", help=fewer)
    add("--seed", type=command_line.seed, default=0, help="seed of the intervals (0)")
    add("--json", action="store_true", help="print an object, no table")
    arguments = parser.parse_args()
    with parser.refusing():
        report = run(arguments)
    print(json.dumps(report, indent=1, ensure_ascii=False) if arguments.json else text(report))


def run(arguments: argparse.Namespace) -> dict:
    """The report: losses, intervals and counts, of all labels together and of each."""
    folder = stores.find(arguments.checkpoint)
    config = stores.config_of(folder)
    if arguments.num_experts_per_tok:
        config = dataclasses.replace(config, num_experts_per_tok=arguments.num_experts_per_tok)
    own = stores.data_of(folder)
    source = arguments.source or (own.source if own else "")
    if not source:
        raise ValueError(f"{folder} has no text of its own; give --source=TEXT")
    longest = min(config.max_position_embeddings, LONGEST_ROW)
    length = arguments.sequence_length or (own.sequence_length if own else longest)
    config.check_rows(length, "lower --sequence_length")
    tokenizer = tokenizers.load(arguments.tokenizer or configs.tokenizer_of(folder))
    mesh = _mesh(config)
    _, params = stores.load(folder, mesh)
    corpus = prepare.open_corpus(
        source,
        VALIDATION,
        tokenizer,
        validation_fraction=own.validation_fraction if own and source == own.source else 1.0,
        cache=prepare.cache_folder(own.cache_dir if own else ""),
    )
    shards = sharding.batch_shards(mesh.shape)
    rows = batches.feed(
        batches.evaluation_batches,
        corpus,
        jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=-(-arguments.batch_size // shards) * shards,
        sequence_length=length,
        max_batches=arguments.max_batches,
    )
    step = jax.jit(
        perplexity.make_eval_step(config, len(corpus.labels)),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )
    sums = perplexity.evaluate(meshes.under(mesh, step), params, rows, corpus.bytes_per_token)
    documents = dict(zip(corpus.labels, corpus.documents_per_label, strict=True))
    return {
        "checkpoint": str(folder),
        "source": source,
        "tokenizer": tokenizer.fingerprint,
        **_entry(sums, sum(documents.values()), arguments.seed),
        "labels": {
            label: _entry(sums.of_label(label), documents[label], arguments.seed)
            for label in corpus.labels
            if sums.of_label(label).tokens_RN.any()
        },
    }


def _mesh(config: model.ModelConfig) -> jax.sharding.Mesh:
    """All devices, with the parameters cut into as many parts as their sizes allow."""
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    for parts in range(jax.device_count(), 1, -1):
        if jax.device_count() % parts == 0:
            mesh = meshes.make({"fsdp": parts, "data": -1})
            with contextlib.suppress(ValueError):  # an axis that so many do not divide
                sharding.abstract(shapes, mesh)
                return mesh
    return meshes.make({"data": -1})


def _entry(sums: perplexity.Sums, documents: int, seed: int) -> dict:
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
        counts = f"{row['documents']:,}", f"{row['tokens']:,}"
        cells = []
        for name in ("loss", "bits_per_byte"):
            low, high = row[f"{name}_interval"]
            cells += [f"{row[name]:.4f}", f"{low:.4f} – {high:.4f}"]
        lines.append(ROW.format(label, *counts, *cells))
    return "\n".join(lines)
