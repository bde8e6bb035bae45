"""Measures a model: its loss on a text, its answers to items, or tasks of a harness.

Examples:
  python scripts/evaluate.py --checkpoint=runs/mine
  python scripts/evaluate.py --checkpoint=path/to/moe --source=path/to/text --json
  python scripts/evaluate.py --checkpoint=path/to/moe --items=questions.jsonl \\
      --compare=path/to/dense
  python scripts/evaluate.py --checkpoint=path/to/moe --tasks=arc_easy,piqa --limit=100
  python scripts/evaluate.py --checkpoint=path/to/moe --tasks=olmoe
  python scripts/evaluate.py --generated=generated.jsonl --checkpoint=path/to/moe \\
      --second=path/to/dense --training_text=path/to/text

The checkpoint is a run's workdir (or the start of its name, if it is unique) or a Hugging Face
folder. Without --source, the text is the run's own held-out text, found in your cache by the hash
of its tokens: the paths in a run's config are not followed, because a stranger may have written
them. With --source, all of its documents count, unless its files are named as splits
(validation.jsonl): then only those of the validation split count.

--items reads a file of lines {"context", "choices", "answer"} (multiple choice by log-likelihood)
or {"prompt", "answers"} (exact match and character F1 of greedy answers), each with an optional
"label". --compare adds a second model and a paired comparison on the same items.

--tasks runs lm-evaluation-harness, which you install by: pip install 'moe_jax[evaluation]'. olmoe,
lola and drop_upcycling are the lists of tasks of these papers.

--generated measures texts without references (docs/text_metrics.md): lines {"text"}, each with an
optional "prompt", "source", "language" and "label". A metric that needs an option says so.

A number has a 95 % interval over the sequences, items or texts: it says how far another sample of
them would move it. A mean over fewer than 20 of them has no interval. Compare the losses of models
with different tokenizers by bits per byte.
"""

import argparse
import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from moe_jax import command_line, model, stores, strict_json, untrusted
from moe_jax import config as configs
from moe_jax.config.resolved import LONGEST_ROW
from moe_jax.data import batches, chat, policy, prepare, sources, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.data.document import VALIDATION
from moe_jax.data.mixed import MixedText
from moe_jax.evaluation import generated, items, json_lines, judge, perplexity, task_lists
from moe_jax.evaluation import samples as sample_files
from moe_jax.evaluation.answers import Settings
from moe_jax.evaluation.subject import Subject
from moe_jax.hf import folders
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import checkpoint

LONGEST_STORED = 32_768  # tokens; a run's own row length above it is used only if it is given


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        help="a run's workdir, RUN@STEP or a Hugging Face folder; with --generated, the model that "
        "wrote the texts",
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
    add("--items", metavar="FILE", help="a .jsonl of items for the model to answer")
    add("--compare", metavar="DIR", help="another checkpoint to answer the same items")
    tokens = f"tokens of a short answer (default: {NUM_TOKENS})"
    add("--num_tokens", type=int, help=tokens)
    stop = "a text that ends a short answer; can be given several times (default: a line end)"
    add("--stop", action="append", metavar="TEXT", help=stop)
    tasks = f"tasks of lm-evaluation-harness, or lists: {', '.join(task_lists.TASK_LISTS)}"
    add("--tasks", metavar="TASK,TASK", help=tasks)
    add("--include_path", metavar="DIR", help="a folder with the harness's YAML of more tasks")
    add("--num_fewshot", type=int, help="examples before each item (default: the task's or list's)")
    add("--limit", type=int, help="number of items of each task (default: all)")
    add("--generated", metavar="FILE", help="a .jsonl of generated texts to measure")
    add("--second", metavar="DIR", help="another model, for the perplexity of generated texts")
    add("--judge", metavar="DIR", help="a model that is asked for a score of each generated text")
    template = "a file with the question to the judge, with {text}, perhaps {prompt} and {source}"
    template += "; can be given several times (default: two of our own)"
    add("--judge_template", action="append", metavar="FILE", help=template)
    scale = "the judge's lowest and highest score (default: 1,10)"
    add("--judge_scale", metavar="LOW,HIGH", help=scale)
    text = "the text that the model was trained on, given as for config.data.source"
    add("--training_text", metavar="TEXT", help=text)
    add("--metrics", metavar="NAME,NAME", help="metrics of generated texts (default: all)")
    add("--max_batches", type=int, default=0, help="number of batches to read; 0 reads all")
    fewer = "experts per token in this evaluation (default: as in training)"
    add("--num_experts_per_tok", type=int, help=fewer)
    add("--seed", type=command_line.seed, default=0, help="seed of the bootstrap for the intervals")
    add("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    add("--json", action="store_true", help="print a JSON object instead of a table")
    arguments = parser.parse_args()
    with parser.refusing():
        run, shown = MODES[_mode(arguments)]
        report = run(arguments)
    print(strict_json.text(report, indent=1) if arguments.json else shown(report))


def _mode(arguments: argparse.Namespace) -> str:
    """The option that says what to measure; "source", which may be absent, is the default."""
    given = [name for name in MODES if getattr(arguments, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are two measurements; give one of them")
    mode = given[0] if given else "source"
    if arguments.checkpoint is None and mode != "generated":
        raise ValueError("--checkpoint is missing; give a run or a Hugging Face folder")
    for name, needed in NEEDS.items():
        if getattr(arguments, name) not in (None, 0) and mode != needed:
            without = f"without --{needed}" if needed != "source" else f"with --{mode}"
            raise ValueError(f"--{name} does nothing {without}; leave it out")
    return mode


def of_text(arguments: argparse.Namespace) -> dict:
    """The report: losses, intervals and counts, for all labels together and for each.

    Raises: ValueError, in one line, for options that do not fit the model.
    """
    found = stores.find(arguments.checkpoint)
    folder = found.folder
    config = configs.model_of(folder)
    data = _data(arguments, folder, config)
    config = stores.with_experts_per_token(config, arguments.num_experts_per_tok)
    tokenizer = stores.tokenizer_for(folder, config, arguments.tokenizer)
    corpus = _corpus(arguments, found, data, tokenizer)
    mesh = stores.evaluation_mesh(config)
    _, params = stores.load(found, mesh, allow_nonfinite=arguments.allow_nonfinite)
    shards = sharding.batch_shards(mesh.shape)
    rows = batches.feed(
        batches.evaluation_batches,
        corpus,
        sharding=jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=-(-arguments.batch_size // shards) * shards,
        sequence_length=data.sequence_length,
        max_batches=arguments.max_batches,
        columns=corpus.columns(),
    )
    step = jax.jit(
        perplexity.make_eval_step(config, len(corpus.labels)),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )
    sums = perplexity.evaluate(meshes.under(mesh, step), params, rows, corpus.bytes_per_token)
    # The number of documents in only the first batches is not known.
    numbers = corpus.documents_per_label if not arguments.max_batches else ()
    documents = dict(zip(corpus.labels, numbers, strict=False))
    of_sources = corpus.labels_of if len(corpus.sources) > 1 else {}
    of_labels = {label: (label,) for label in corpus.labels}
    entries = functools.partial(_entries, sums, documents, arguments.seed)
    return {
        "checkpoint": str(found),
        "source": data.in_words,
        "tokenizer": tokenizer.fingerprint,
        **_entry(sums, sum(documents.values()) or None, arguments.seed),
        "sources": dict(entries(of_sources)),
        "labels": dict(entries(of_labels)),
    }


def _entries(
    sums: perplexity.Sums,
    documents: Mapping[str, int],
    seed: int,
    labels_of: Mapping[str, Sequence[str]],
) -> Iterator[tuple[str, dict]]:
    """An entry for each name, over all its labels."""
    for name, labels in labels_of.items():
        own = sums.of_labels(*labels)
        number = sum(documents[label] for label in labels) if documents else None
        if own.tokens_RN.any():
            yield name, _entry(own, number, seed)


def of_items(arguments: argparse.Namespace) -> dict:
    """The report of `items.report` on the file --items."""
    names = [name for name in (arguments.checkpoint, arguments.compare) if name]
    for name in names:  # before the first model works for long
        stores.readable(name, **_options(arguments))
    stops = tuple(arguments.stop or ["\n"])
    settings = Settings(arguments.num_tokens or NUM_TOKENS, stops)
    load = functools.partial(_subject, arguments)
    return items.report(load, names, arguments.items, settings, seed=arguments.seed)


def of_tasks(arguments: argparse.Namespace) -> dict:
    """The harness's results on --tasks."""
    tasks, missing = task_lists.expand(arguments.tasks.split(","))
    for line in missing:
        print(line, file=sys.stderr)
    task_lists.check_harness("--tasks")
    from moe_jax.evaluation import harness

    shots, limit = arguments.num_fewshot, arguments.limit
    manager = harness.manager_of(tasks, arguments.include_path, shots, limit)
    subject = _subject(arguments, arguments.checkpoint)
    return harness.run(subject, tasks, manager, num_fewshot=shots, limit=limit)


def of_generated(arguments: argparse.Namespace) -> dict:
    """The report of `generated.report` on the file --generated."""
    models = [name for name in ("checkpoint", "second", "judge") if getattr(arguments, name)]
    given = {name: getattr(arguments, name) for name in models}
    if arguments.training_text:
        with command_line.naming("--training_text", "data.source"):
            sources.check(arguments.training_text)
        given["training_text"] = arguments.training_text
    names = arguments.metrics.split(",") if arguments.metrics else []
    reasons = generated.choose(names, given)
    samples = json_lines.read(arguments.generated, sample_files.parse)
    paths = arguments.judge_template or []
    templates = [judge.read_template(path) for path in paths] or judge.TEMPLATES
    scale = judge.scale(arguments.judge_scale) if arguments.judge_scale else judge.SCALE
    options = {**vars(arguments), "tokenizer": None, "num_experts_per_tok": None}
    others = argparse.Namespace(**options)  # these two options are of --checkpoint

    def owner(name: str) -> argparse.Namespace:
        return arguments if name == arguments.checkpoint else others

    for name in models:  # before the first model works for long
        stores.readable(given[name], **_options(owner(given[name])))

    def load(name: str) -> Subject:
        return _subject(owner(name), name)

    tools = generated.tools(given, load, templates=templates, scale=scale, seed=arguments.seed)
    found = generated.report(samples, reasons, tools)
    return {"generated": arguments.generated, **given, **found}


def _subject(arguments: argparse.Namespace, name: str) -> Subject:
    allow = arguments.allow_nonfinite
    return stores.subject(name, allow_nonfinite=allow, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokenizer": arguments.tokenizer,
        "batch_size": arguments.batch_size,
        "limit": arguments.sequence_length,
        "num_experts_per_tok": arguments.num_experts_per_tok,
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
        own = configs.data_of(configs.load_json(folder))
    source = arguments.source or own.source
    mixture = configs.Mixture() if arguments.source else own.mixture
    if not source:
        raise ValueError(f"{folder} has no text of its own; give --source=TEXT")
    if arguments.source:
        with command_line.naming("--source", "data.source"):
            sources.check(source)
    if not (arguments.sequence_length or 0 < own.sequence_length <= LONGEST_STORED):
        raise ValueError(
            f"the config of {folder} has rows of {own.sequence_length} tokens, not of 1 to "
            f"{LONGEST_STORED}; give --sequence_length=N"
        )
    fields: dict = {} if source == own.source else policy.keys(policy.STRICT)
    template = stores.template_of(folder)
    fields["chat_template"] = str(template) if template.exists() else ""
    data = dataclasses.replace(
        own,
        **fields,
        source=source,
        mixture=mixture,
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
) -> MixedText:
    """The text given by the person, or else the run's own, which is looked up by its hashes."""
    cache = cache_folder("")
    if arguments.source or data.named_sources == {"": "embedded"}:
        with command_line.naming("--source", "data.source"):
            given = prepare.open_corpus(
                *(data.source, VALIDATION, tokenizer),
                validation_fraction=data.validation_fraction,
                cache=cache,
                reading=policy.of_config(data),
                form=chat.form_of(data),
            )
        return MixedText({"": given})
    hashes = checkpoint.newest_data(source.checkpoints, source.step).get("text")
    hashes = hashes if isinstance(hashes, dict) else {}
    corpora = {}
    for name, spec in data.named_sources.items():
        digest = hashes.get(f"{name}/{VALIDATION}" if name else VALIDATION)
        found = prepare.of_digest(digest, cache) if isinstance(digest, str) else None
        if found is None:
            raise ValueError(
                f"the held-out text of {source} is not in the cache {cache}, and {spec}, which "
                f"its config names, is not read for it; give --source={shlex.quote(spec)}"
            )
        corpora[name] = found
    return MixedText(corpora)


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


NUM_TOKENS = 32  # of a short answer
ROW = "{:16} {:>10} {:>12} {:>10} {:>17} {:>10} {:>17}"


def text(report: dict) -> str:
    """The report as a table."""
    labels = report["labels"] if len(report["labels"]) > 1 else {}
    rows = {"all": report, **report["sources"], **labels}
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
            shown = "too few rows" if interval is None else "{:.4f} – {:.4f}".format(*interval)
            cells += [f"{row[name]:.4f}", shown]
        lines.append(ROW.format(untrusted.label(label), *counts, *cells))
    return "\n".join(map(untrusted.line, lines))


# What to measure: the function of the options, and the one that shows its report.
MODES = {
    "source": (of_text, text),
    "items": (of_items, items.text),
    "tasks": (of_tasks, task_lists.text),
    "generated": (of_generated, generated.text),
}
# Options that belong to one measurement only.
NEEDS = {
    "max_batches": "source",
    "compare": "items",
    "num_tokens": "items",
    "stop": "items",
    "include_path": "tasks",
    "num_fewshot": "tasks",
    "limit": "tasks",
    "second": "generated",
    "judge": "generated",
    "judge_template": "generated",
    "judge_scale": "generated",
    "training_text": "generated",
    "metrics": "generated",
}
