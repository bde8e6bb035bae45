"""The model card (README.md) of a model's folder: its parents, its recipe, and the command."""

import json
import pathlib
import shlex
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

import moe_jax
from moe_jax import config as configs
from moe_jax import files, model
from moe_jax.config.sections import parents_in, sources_in
from moe_jax.hf import folders
from moe_jax.model.config import ModelConfig
from moe_jax.training import checkpoint
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import recipes, step_zero

NAME = "README.md"
TAG = "moe_jax"  # the tag in the header of cards written by this module


def write(folder: pathlib.Path, page: str) -> None:
    """Writes the card into a folder that is complete but for it."""
    files.write_text(folder / NAME, page)


def of_upcycling(
    plan: plans.Plan, parents: Sequence[configs.Source], seed: int, command: list[str]
) -> str:
    """The card of a model that was just upcycled from its parents and is not trained yet."""
    rows = [
        *_of_parents([parent.name for parent in parents]),
        *_of_recipe(f"`{plan.name}` ({plan.recipe.source})", plan.parameters),
        ("initialiser of the routers", plan.router or "none"),
        ("seed", str(seed)),
        ("before training", step_zero.in_words(plan)),
    ]
    return _page(plan.config, "made by upcycling and not trained since", rows, command)


def of_conversion(config: ModelConfig, converted: configs.Source, command: list[str]) -> str:
    """The card of a converted model, followed by those of its source and of its parents."""
    source = converted.folder
    run = None if folders.is_folder(source) else configs.load_json(source)
    parents = [] if run is None else [pathlib.Path(p) for p in parents_in(run.init.source)]
    rows = [] if run is None else [*_of_run(run), *_of_training(run, converted)]
    page = _page(config, f"converted from `{converted.name}`", rows, command)
    for folder in (source, *parents):
        own = folder / NAME
        if own.exists() and f"tags: [{TAG}" in (text := own.read_text(encoding="utf-8")):
            page += f"\n## `{folder.name}`\n\n{text.split('---', 2)[2].lstrip()}"
    return page


def _of_run(run: ConfigDict) -> Iterator[tuple[str, str]]:
    if parents := sources_in(run.init.source):
        yield from _of_parents([parent.name for parent in parents])
    if recipe := run.init.upcycle.recipe:
        given = {name: run.init.upcycle[name] for name in recipes.RECIPES[recipe].limits}
        yield from _of_recipe(f"`{recipe}`", {n: v for n, v in given.items() if v is not None})


def _of_training(run: ConfigDict, converted: configs.Source) -> Iterator[tuple[str, str]]:
    """The training of a run; without its losses if they are not those of the checkpoint."""
    workdir = converted.folder
    step = checkpoint.newest_data(workdir / "checkpoints", converted.step).get("step")
    if not step:
        return  # an imported model
    tokens = step * run.training.batch_size * run.data.sequence_length
    yield "seed", str(run.seed)
    yield "training", f"{step:,} steps, {tokens:,} tokens"
    yield "text", f"`{run.data.source}`"
    path = workdir / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    losses = found.get("bits_per_byte"), found.get("loss")
    if found.get("steps") == step and None not in losses:
        yield (
            "held-out text",
            "{:.4f} bits/byte, {:.4f} nats/token over {:,} tokens".format(
                *losses, found["held_out_tokens"]
            ),
        )


def _of_parents(names: list[str]) -> Iterator[tuple[str, str]]:
    yield "parents" if len(names) > 1 else "parent", ", ".join(f"`{name}`" for name in names)


def _of_recipe(recipe: str, parameters: dict) -> Iterator[tuple[str, str]]:
    yield "recipe", recipe
    if parameters:
        given = (f"{parameter}={value}" for parameter, value in parameters.items())
        yield "parameters of the recipe", ", ".join(given)


def _page(config: ModelConfig, origin: str, rows: list[tuple[str, str]], command: list[str]) -> str:
    total, active = model.count_parameters(config)
    kind = "A dense language model"
    if config.num_experts:
        kind = (
            f"A Mixture-of-Experts language model ({config.num_experts} experts, "
            f"{config.num_experts_per_tok} for each token)"
        )
    rows = [
        *rows,
        ("parameters", f"{total:,}, of which a token uses {active:,}"),
        ("versions", f"moe_jax {moe_jax.__version__}, jax {jax.__version__}"),
    ]
    tags = [TAG, *(["mixture-of-experts"] if config.num_experts else [])]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"tags: [{', '.join(tags)}]",
            "---",
            "",
            f"{kind}, {origin}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "It was written by",
            "",
            "```bash",
            shlex.join(command),
            "```",
            "",
        ]
    )
