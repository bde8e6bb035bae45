"""The model card (README.md) of a model's folder: its parents, its recipe, and the command."""

import pathlib
import shlex
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

import moe_jax
from moe_jax import config as configs
from moe_jax import files, model, strict_json, untrusted
from moe_jax.config.sections import sources_in
from moe_jax.hf import folders
from moe_jax.model.config import ModelConfig
from moe_jax.training import checkpoint
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import recipes, step_zero

NAME = "README.md"
PARENTS = "parents"  # the folder of a workdir with the cards of the run's parents
MAX_BYTES = 1_000_000  # of a card that is read
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
    parents = [] if run is None else sources_in(run.init.source)
    rows = [] if run is None else [*_of_run(run, parents), *_of_training(run, converted)]
    page = _page(config, f"converted from `{converted.name}`", rows, command)
    kept = {p.folder.name: source / PARENTS / f"{p.folder.name}.md" for p in parents}
    for name, path in {source.name: source / NAME, **kept}.items():
        if text := _read(path, source):
            page += f"\n## `{name}`\n\n{text.split('---', 2)[2].lstrip()}"
    return page


def keep(workdir: pathlib.Path, parents: Sequence[pathlib.Path]) -> None:
    """Copies the cards of a run's parents into its workdir, because the paths in a stored config
    are not followed."""
    for parent in parents:
        if text := _read(parent / NAME, parent):
            (workdir / PARENTS).mkdir(exist_ok=True)
            files.write_text(workdir / PARENTS / f"{parent.name}.md", text)


def _read(path: pathlib.Path, folder: pathlib.Path) -> str:
    """The text of a card of this module in the folder; "" if there is none."""
    inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    if not inside or path.stat().st_size > MAX_BYTES:
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if f"tags: [{TAG}" in text and text.count("---") > 1 else ""


def _of_run(run: ConfigDict, parents: Sequence[configs.Source]) -> Iterator[tuple[str, str]]:
    if parents:
        yield from _of_parents([parent.name for parent in parents])
    if (recipe := run.init.upcycle.recipe) in recipes.RECIPES:
        given = {name: run.init.upcycle[name] for name in recipes.RECIPES[recipe].limits}
        yield from _of_recipe(f"`{recipe}`", {n: v for n, v in given.items() if v is not None})


def _of_training(run: ConfigDict, converted: configs.Source) -> Iterator[tuple[str, str]]:
    """The training of a run; without its losses if they are not those of the checkpoint."""
    workdir = converted.folder
    step = checkpoint.newest_data(converted.checkpoints, converted.step).get("step")
    if not step:
        return  # an imported model
    tokens = step * run.training.batch_size * run.data.sequence_length
    yield "seed", str(run.seed)
    yield "training", f"{step:,} steps, {tokens:,} tokens"
    yield "text", f"`{untrusted.label(configs.data_of(run).in_words)}`"
    try:
        found = strict_json.read_object(workdir / "result.json")
    except (ValueError, OSError):  # it is missing or damaged
        return
    numbers = [found.get(name) for name in ("bits_per_byte", "loss", "held_out_tokens")]
    if found.get("steps") == step and all(isinstance(number, int | float) for number in numbers):
        words = "{:.4f} bits/byte, {:.4f} nats/token over {:,} tokens"
        yield "held-out text", words.format(*numbers)


def _of_parents(names: list[str]) -> Iterator[tuple[str, str]]:
    shown = ", ".join(f"`{untrusted.label(name)}`" for name in names)
    yield "parents" if len(names) > 1 else "parent", shown


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
