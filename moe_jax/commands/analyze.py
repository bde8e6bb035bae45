"""Shows what the experts of a model learned: which tokens, labels and languages go to each.

Examples:
  python scripts/analyze.py --checkpoint=runs/quickstart/drop_0.5
  python scripts/analyze.py --checkpoint=path/to/moe --text=path/to/text --output=runs/analysis
  python scripts/analyze.py --checkpoint=path/to/moe --save_routing=runs/routing_last
  python scripts/analyze.py --checkpoint=runs/mine@500 --compare=runs/routing_last
  python scripts/analyze.py --checkpoint=runs/mine --steps=all --coupling --output=runs/analysis
  python scripts/analyze.py --routing=runs/routing_last --json

The checkpoint is a Hugging Face folder or a run's workdir. A folder is read layer by layer, each
weight once, so a model that is larger than memory can be analysed; a run is loaded whole. Hidden
states are kept on disk meanwhile. If the command is killed, the same command goes on after the last
finished layer.

The text is a balanced sample: each label (a language, or "all") has the same number of tokens as
far as there are enough.

--compare gives the part of each token's experts that the other recording has too. If that is of the
final checkpoint, the number is router saturation; if it is of a run with another seed, read the
number after the best matching of experts. --steps draws saturation over the checkpoints of a run.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax import command_line, files, model, stores, strict_json, untrusted
from moe_jax import config as configs
from moe_jax.analysis import (
    coupling,
    decisions,
    languages,
    recording,
    routing_comparison,
    routing_summary,
)
from moe_jax.data import batches, prepare, sample, sources, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.data.document import VALIDATION
from moe_jax.hf import folders
from moe_jax.report import analysis_figures, analysis_text

EMBEDDED, ALL = "embedded", "all"
LONGEST_ROW = 2048  # tokens, as in LOLA's and OLMoE's analyses


def main() -> None:
    parser = command_line.Parser(__doc__)
    add, folder = parser.add_argument, command_line.folder
    given = "a run's workdir, RUN@STEP or a Hugging Face folder"
    add("--checkpoint", metavar="DIR", help=given)
    text = "the text, given as for config.data.source; embedded is the held-out part of that corpus"
    add("--text", metavar="TEXT", help=f"{text} (default: {EMBEDDED})")
    add("--tokenizer", help="a tokenizer to use instead of the model's own")
    add("--max_tokens", type=int, default=100_000, help="size of the sample in tokens")
    rows = (
        f"tokens per sequence (default: the run's, else the model's limit, at most {LONGEST_ROW})"
    )
    add("--sequence_length", type=int, help=rows)
    keep = "keep every token's routing in this folder"
    add("--save_routing", type=folder, metavar="FOLDER", help=keep)
    read = "read the routing from a folder of --save_routing, and do not run the model"
    add("--routing", type=folder, metavar="FOLDER", help=read)
    compared = "a folder of --save_routing, of a later checkpoint or of a run with another seed"
    add("--compare", type=folder, metavar="FOLDER", help=compared)
    earlier = f"earlier checkpoints of the run for saturation curves: steps 100,200, or {ALL}"
    add("--steps", metavar="STEPS", help=earlier)
    rows = "measure whether each expert responds most to its own row of the router's matrix"
    add("--coupling", action="store_true", help=rows)
    table = "a CSV of distances, with the languages in its first row and in its first column, to "
    table += "correlate with the distances of their routing"
    add("--distances", metavar="FILE", help=table)
    written = "write result.json, counts.npz, vocabulary.csv and figures here"
    add("--output", type=folder, metavar="DIR", help=written)
    draws = "permutations of the tests about languages; in single layers at most 999"
    add("--permutations", type=int, default=9999, help=draws)
    add("--seed", type=command_line.seed, default=0, help="seed of the sample and the permutations")
    add("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    add("--json", action="store_true", help="print a JSON object instead of tables")
    arguments = parser.parse_args()
    with parser.refusing():
        report = run(arguments)
    print(strict_json.text(report, indent=1) if arguments.json else analysis_text.text(report))


def run(arguments: argparse.Namespace) -> dict:
    """The report. Raises: ValueError, in one line, before anything slow, for a mistake."""
    if not (arguments.checkpoint or arguments.routing):
        raise ValueError("give --checkpoint=DIR, or --routing=FOLDER of an earlier analysis")
    if arguments.routing and arguments.save_routing:
        raise ValueError("--routing reads what --save_routing has written; give one of them")
    for name in ("coupling", "steps"):
        if getattr(arguments, name) and not arguments.checkpoint:
            raise ValueError(f"--{name} needs the model: give --checkpoint")
    if arguments.permutations < 1:
        raise ValueError(f"--permutations={arguments.permutations} must be at least 1")
    if arguments.output and arguments.output.exists():
        raise ValueError(f"{arguments.output} exists; choose another output or remove it")
    distances = languages.read_distances(arguments.distances) if arguments.distances else None
    other = decisions.load(arguments.compare) if arguments.compare else None
    how = {"permutations": arguments.permutations, "seed": arguments.seed}
    with contextlib.ExitStack() as held:
        routing = _routing(arguments, other, held)
        found, facts = routing.found, routing.found.facts
        layers = routing_summary.layers_of(found)
        steps = {
            step: routing_comparison.compare(decisions.load(record()), found)
            for step, record in routing.earlier.items()
        }
        committees = routing_summary.committees(found, **how)
        report = {
            "checkpoint": facts.model,
            "text": facts.text,
            "tokens": facts.num_tokens,
            "experts": facts.num_experts,
            "experts_per_token": facts.num_experts_per_tok,
            "layers": {
                number: routing_summary.row_of_layer(layer, facts.num_tokens)
                for number, layer in layers.items()
            },
            "labels": routing_summary.rows_of_labels(facts, layers),
            "languages": routing_summary.language_statistics(
                facts, layers, distances=distances, **how
            ),
            "committee": {number: dataclasses.asdict(row) for number, row in committees.items()},
            "compared_with": other and other.facts.model,
            "compared": other and routing_comparison.compare(found, other),
            "steps": steps,
            "coupling": {
                layer: {
                    "rows": row.rows,
                    "columns": row.columns,
                    "p": row.p,
                    "n": facts.num_experts,
                }
                for layer, row in routing.couplings.items()
            },
        }
    if arguments.output:
        _write(arguments, report, routing, layers)
    return report


@dataclasses.dataclass(frozen=True)
class _Routing:
    """The routing to analyse, and what the model itself gives besides.

    earlier: functions that record the routing of earlier checkpoints, by step; they return the
      folder. decode: the text of an id; None without the model.
    """

    found: decisions.Decisions
    earlier: Mapping[int, Callable[[], pathlib.Path]] = dataclasses.field(default_factory=dict)
    couplings: Mapping[int, coupling.Coupling] = dataclasses.field(default_factory=dict)
    decode: Callable[[int], str] | None = None


def _routing(
    arguments: argparse.Namespace, other: decisions.Decisions | None, held: contextlib.ExitStack
) -> _Routing:
    """The routing that is given, or that of the model on the text; what it records is removed when
    `held` closes."""
    if not arguments.checkpoint:
        if arguments.text:
            raise ValueError("--text with --routing needs --checkpoint, whose tokenizer reads it")
        return _Routing(decisions.load(arguments.routing))
    source = stores.find(arguments.checkpoint)
    config = configs.model_of(source.folder)
    recording.check(config)
    earlier = _earlier(source, arguments.steps) if arguments.steps else {}
    given = decisions.load(arguments.routing) if arguments.routing else None
    tokenizer = stores.tokenizer_for(source.folder, config, arguments.tokenizer)
    text = arguments.text or EMBEDDED
    rows = []
    if not given or arguments.text or earlier:
        rows = [_rows(arguments, source.folder, config, tokenizer)]
    for one in filter(None, (given, other)):
        for chunks, labels in rows:
            one.check_same(text_digest=recording.text_digest(chunks, labels))

    def record(source: configs.Source, weights: recording.Weights, folder=None) -> pathlib.Path:
        [(chunks, labels)] = rows
        facts = recording.facts(weights, chunks, labels, model=source.name, text=text)
        if other:
            routing_comparison.check_comparable(other, facts)  # before the model is read
        cache = cache_folder("") / "routing"
        kept = folder or cache / _key(facts.model_digest, facts.text_digest)
        held.enter_context(files.alone(cache / f"{_key(os.path.abspath(kept))}.lock"))
        recording.record(weights, chunks, facts, kept)
        if not folder:
            # Kept after an error, so that the same command goes on from it.
            held.push(lambda error, *_: None if error else shutil.rmtree(kept))
        return kept

    def load(source: configs.Source) -> recording.Weights:
        return stores.weights(source, allow_nonfinite=arguments.allow_nonfinite)

    def record_earlier(source: configs.Source) -> pathlib.Path:
        return record(source, load(source))

    weights = load(source)
    if given:
        given.check_same(model_digest=recording.model_digest(weights))
    return _Routing(
        given or decisions.load(record(source, weights, arguments.save_routing)),
        {step: functools.partial(record_earlier, one) for step, one in earlier.items()},
        coupling.of_model(weights) if arguments.coupling else {},
        lambda number: tokenizer.decode(np.array([number])),
    )


def _earlier(source: configs.Source, steps: str) -> dict[int, configs.Source]:
    """By step, the checkpoints of a run that are named, or all, before the one to analyse.

    Raises: ValueError for a checkpoint that is not there, or none.
    """
    if folders.is_folder(source.folder):
        raise ValueError(f"--steps needs a run; {source} is a Hugging Face folder, without steps")
    there = source.steps()
    last = max(there, default=0) if source.step is None else source.step
    names = [str(step) for step in there if step < last] if steps == ALL else steps.split(",")
    found = {}
    for name in names:
        one = configs.source_of(f"{source.folder}@{name}")
        one.check()
        if one.step is None or one.step >= last:
            raise ValueError(f"--steps={steps} must be steps before {last}, such as 100,200")
        found[one.step] = one
    if not found:
        raise ValueError(
            f"{source.folder} has no checkpoint before step {last}; config.checkpoint.keep_every "
            "keeps more of them"
        )
    return found


def _key(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]


def _rows(
    arguments: argparse.Namespace,
    folder: pathlib.Path,
    config: model.ModelConfig,
    tokenizer: tokenizers.Tokenizer,
) -> tuple[list[batches.Batch], tuple[str, ...]]:
    """Chunks of rows of the sample, and its labels."""
    for name in ("max_tokens", "sequence_length"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise ValueError(f"--{name}={number} must be at least 1")
    text = arguments.text or EMBEDDED
    with command_line.naming("--text", "data.source"):
        sources.check(text)
    longest = config.max_position_embeddings
    if not folders.is_folder(folder):
        longest = configs.load_json(folder).data.sequence_length
    length = arguments.sequence_length or min(longest, LONGEST_ROW)
    config.check_rows(length, "lower --sequence_length")
    with command_line.naming("--text", "data.source"):
        corpus = prepare.open_corpus(
            *(text, VALIDATION, tokenizer),
            validation_fraction=1.0,  # all documents of a source without splits
            cache=cache_folder(""),
        )
    part = sample.balanced(corpus, arguments.max_tokens, seed=arguments.seed)
    per_chunk = max(1, recording.CHUNK_TOKENS // length)
    rows = batches.evaluation_batches(part, sequence_length=length, batch_size=per_chunk)
    return list(rows), corpus.labels


def _write(arguments, report: dict, routing: _Routing, layers: dict) -> None:
    facts = routing.found.facts
    with files.whole_folder(arguments.output) as unfinished:
        files.write_text(unfinished / "result.json", strict_json.text(report, indent=1))
        counts: dict[str, Any] = routing_summary.arrays(layers)
        counts |= {f"coupling_{layer}": row.norm_EE for layer, row in routing.couplings.items()}
        np.savez_compressed(unfinished / "counts.npz", labels=np.array(facts.labels), **counts)
        _write_vocabulary(unfinished / "vocabulary.csv", layers, routing.decode)
        steps, seed = report["steps"], arguments.seed
        analysis_figures.write(unfinished / "figures", facts, layers, steps=steps, seed=seed)


def _write_vocabulary(path: pathlib.Path, layers: dict, decode: Callable[[int], str] | None):
    """A row for each frequent id of a layer, the most specialised first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(("layer", "ids", "id", "token", "expert", "share", "occurrences"))
        for number, layer in layers.items():
            for kind, own in layer.vocabulary.items():
                columns = own.id_I, own.expert_I, own.share_I, own.occurrences_I
                for token, expert, share, occurrences in zip(*columns, strict=True):
                    text = untrusted.label(decode(int(token))) if decode else ""
                    write((number, kind, token, text, expert, f"{share:.4f}", occurrences))
