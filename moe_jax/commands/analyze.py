"""Shows what the experts of a model learned: which tokens, labels and languages go to each.

Examples:
  python scripts/analyze.py --checkpoint=runs/quickstart/drop_0.5
  python scripts/analyze.py --checkpoint=path/to/moe --text=path/to/text --output=runs/analysis
  python scripts/analyze.py --checkpoint=path/to/moe --save_routing=runs/routing_last
  python scripts/analyze.py --checkpoint=runs/mine@500 --compare=runs/routing_last
  python scripts/analyze.py --routing=runs/routing_last --json

The checkpoint is a Hugging Face folder or a run's workdir. A folder is read layer by layer, each
weight once, so a model that is larger than memory can be analysed; a run is loaded whole. Hidden
states are kept on disk meanwhile. If the command is killed, the same command goes on after the last
finished layer.

The text is a balanced sample: each label (a language, or "all") has the same number of tokens as
far as there are enough. --compare gives router saturation: the part of each token's experts that
the other recording, usually that of the final checkpoint, has too.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax import command_line, files, model, stores, strict_json, untrusted
from moe_jax import config as configs
from moe_jax.analysis import decisions, languages, recording, routing_summary
from moe_jax.data import batches, prepare, sample, sources
from moe_jax.data.cache import cache_folder
from moe_jax.data.document import VALIDATION
from moe_jax.hf import folders
from moe_jax.report import analysis_figures

EMBEDDED = "embedded"
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
    add("--routing", type=folder, metavar="FOLDER", help="read such a folder instead of the model")
    add("--compare", type=folder, metavar="FOLDER", help="such a folder of a later checkpoint")
    table = "a CSV of distances between languages, to correlate with the routing's"
    add("--distances", metavar="FILE", help=table)
    add(
        "--output",
        type=folder,
        metavar="DIR",
        help="write result.json, counts.npz and figures here",
    )
    draws = "permutations of the tests about languages; in single layers at most 999"
    add("--permutations", type=int, default=9999, help=draws)
    add("--seed", type=command_line.seed, default=0, help="seed of the sample and the permutations")
    add("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    add("--json", action="store_true", help="print a JSON object instead of tables")
    arguments = parser.parse_args()
    with parser.refusing():
        report = run(arguments)
    print(strict_json.text(report, indent=1) if arguments.json else text_of(report))


def run(arguments: argparse.Namespace) -> dict:
    """The report. Raises: ValueError, in one line, before anything slow, for a mistake."""
    if not (arguments.checkpoint or arguments.routing):
        raise ValueError("give --checkpoint=DIR, or --routing=FOLDER of an earlier analysis")
    if arguments.permutations < 1:
        raise ValueError(f"--permutations={arguments.permutations} must be at least 1")
    if arguments.output and arguments.output.exists():
        raise ValueError(f"{arguments.output} exists; choose another output or remove it")
    distances = languages.read_distances(arguments.distances) if arguments.distances else None
    final = decisions.load(arguments.compare) if arguments.compare else None
    with _decisions(arguments, final) as found:
        layers = routing_summary.layers_of(found)
        facts = found.facts
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
                facts,
                layers,
                distances=distances,
                permutations=arguments.permutations,
                seed=arguments.seed,
            ),
            "saturation": routing_summary.saturation(found, final) if final else None,
        }
    if arguments.output:
        _write(arguments, report, facts, layers)
    return report


@contextlib.contextmanager
def _decisions(
    arguments: argparse.Namespace, final: decisions.Decisions | None
) -> Iterator[decisions.Decisions]:
    """The routing that is given, or that of the model on the text."""
    if not arguments.checkpoint:
        if arguments.text:
            raise ValueError("--text with --routing needs --checkpoint, whose tokenizer reads it")
        yield decisions.load(arguments.routing)
        return
    source = stores.find(arguments.checkpoint)
    config = configs.model_of(source.folder)
    recording.check(config)
    given = decisions.load(arguments.routing) if arguments.routing else None
    rows = [] if given and not arguments.text else [_rows(arguments, source.folder, config)]
    for other in filter(None, (given, final)):
        for chunks, labels in rows:
            other.check_same(text_digest=recording.text_digest(chunks, labels))
    weights = stores.weights(source, allow_nonfinite=arguments.allow_nonfinite)
    if given:
        given.check_same(model_digest=recording.model_digest(weights))
        yield given
        return
    [(chunks, labels)] = rows
    name, text = source.name, arguments.text or EMBEDDED
    facts = recording.facts(weights, chunks, labels, model=name, text=text)
    if final:
        routing_summary.check_comparable(final, facts)  # before the model is read
    cache = cache_folder("") / "routing"
    folder = arguments.save_routing or cache / _key(facts.model_digest, facts.text_digest)
    with files.alone(cache / f"{_key(os.path.abspath(folder))}.lock"):
        recording.record(weights, chunks, facts, folder)
        yield decisions.load(folder)
        if not arguments.save_routing:
            shutil.rmtree(folder)


def _key(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]


def _rows(
    arguments: argparse.Namespace, folder: pathlib.Path, config: model.ModelConfig
) -> tuple[list[batches.Batch], tuple[str, ...]]:
    """Chunks of rows of the sample, and its labels."""
    for name in ("max_tokens", "sequence_length"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise ValueError(f"--{name}={number} must be at least 1")
    text = arguments.text or EMBEDDED
    sources.check(text)
    tokenizer = stores.tokenizer_for(folder, config, arguments.tokenizer)
    longest = config.max_position_embeddings
    if not folders.is_folder(folder):
        longest = configs.load_json(folder).data.sequence_length
    length = arguments.sequence_length or min(longest, LONGEST_ROW)
    config.check_rows(length, "lower --sequence_length")
    corpus = prepare.open_corpus(
        *(text, VALIDATION, tokenizer),
        validation_fraction=1.0,  # all documents of a source without splits
        cache=cache_folder(""),
    )
    part = sample.balanced(corpus, arguments.max_tokens, seed=arguments.seed)
    per_chunk = max(1, recording.CHUNK_TOKENS // length)
    rows = batches.evaluation_batches(part, sequence_length=length, batch_size=per_chunk)
    return list(rows), corpus.labels


def _write(arguments, report: dict, facts: decisions.Facts, layers: dict) -> None:
    with files.whole_folder(arguments.output) as unfinished:
        files.write_text(unfinished / "result.json", strict_json.text(report, indent=1))
        counts: dict[str, Any] = routing_summary.arrays(layers)
        np.savez_compressed(unfinished / "counts.npz", labels=np.array(facts.labels), **counts)
        analysis_figures.write(unfinished / "figures", facts, layers, seed=arguments.seed)


LAYER = "{:>5} {:>9} {:>8} {:>6} {:>10} {:>6} {:>6} {:>9} {:>9} {:>9} {:>7}"
LABEL = "{:16} {:16} {:>9} {:>9} {:>8} {:>10}  {:16}"


def text_of(report: dict) -> str:
    """The report as tables."""
    E, name = report["experts"], untrusted.label
    lines = [
        f"{name(report['checkpoint'])} on {name(report['text'])}: {report['tokens']:,} tokens, "
        f"{report['experts_per_token']} of {E} experts per token",
        "",
        LAYER.format(
            *("layer", "effective", "busiest", "rarely", "confidence", "1st/", "2nd/"),
            *("vocab.", "vocab.", "vocab.", "between"),
        ),
        LAYER.format(
            *("", "experts", "two", "used", "", "2nd", "3rd"),
            *("input", "target", "predicted", "labels"),
        ),
    ]
    for number, row in report["layers"].items():
        ratios = [*row["gate_ratios"], None, None][:2]
        lines.append(
            LAYER.format(
                *(number, f"{row['effective_experts']:.2f}", f"{row['busiest_two_share']:.3f}"),
                *(row["rarely_used"], f"{row['confidence']:.3f}"),
                *(_number(ratio, 2) for ratio in ratios),
                *(
                    "{mean:.2f}/{chance:.2f}".format(**row["vocabulary"][kind])
                    for kind in routing_summary.VOCABULARIES
                ),
                _number(row["label_divergence"], 3),
            )
        )
    lines += [
        "1st/2nd, 2nd/3rd: ratios of the mean probabilities. Vocabulary: the mean over ids of the "
        "largest share of one expert, and the same by chance. Between labels: the mean "
        "Jensen-Shannon divergence in bits.",
        "",
        LABEL.format("label", "family", "tokens", "effective", "largest", "divergence", "nearest"),
    ]
    for label, row in report["labels"].items():
        lines.append(
            LABEL.format(
                *(name(label)[:16], name(row["family"] or "")[:16], f"{row['tokens']:,}"),
                *(f"{row['effective_experts']:.2f}", f"{row['largest_share']:.3f}"),
                *(_number(row["divergence"], 3), name(row["nearest"] or "")[:16]),
            )
        )
    return "\n".join([*lines, *_of_languages(report["languages"]), *_of_saturation(report)])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


WORDS = {
    "mantel": "correlation of routing distance with family (Mantel)",
    "silhouette": "silhouette of families",
    "purity": "nearest language is of the same family",
    "given_distances": "correlation of routing distance with the given one (Mantel)",
}


def _of_languages(found: dict | None) -> Iterator[str]:
    if found is None:
        return
    yield ""
    for key, words in WORDS.items():
        if finding := found.get(key):
            low, high = finding["interval"] or (None, None)
            interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            yield (
                f"{words}: {finding['statistic']:.3f}{interval}, p = {finding['p']:.4f}, n = "
                f"{finding['n']}, by chance {finding['chance']:.3f}"
            )
    if left_out := found.get("left_out"):
        yield f"left out, in one of the two only: {', '.join(map(untrusted.label, left_out))}"


def _of_saturation(report: dict) -> Iterator[str]:
    if report["saturation"] is None:
        return
    row = "{:>5} {:>8} {:>8} {:>8} {:>8}"
    yield ""
    yield row.format("layer", "top-1", "chance", "top-k", "chance")
    for number, own in report["saturation"].items():
        values = (own[n] for n in ("top_1", "top_1_chance", "top_k", "top_k_chance"))
        yield row.format(number, *(f"{value:.3f}" for value in values))
