"""A run's initial parameters and moments: random, from a model's folder, or upcycled."""

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from moe_jax import cards, files, model, stores, strict_json, tree
from moe_jax import config as configs
from moe_jax.analysis import parent_statistics
from moe_jax.data import chat, chat_template, tokenizer_files, tokenizers
from moe_jax.hf import folders
from moe_jax.model import comparison
from moe_jax.parallel import distributed, sharding
from moe_jax.training import checkpoint, flops, optimizer
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import step_zero, transform


def plan_of(settings: configs.Run) -> plans.Plan | None:
    """The plan of the upcycling in a run's config; None without a recipe.

    Raises: ConfigError if the source's model does not fit.
    """
    section, sources = settings.init.upcycle, settings.init.parents
    if not section.recipe:
        return None
    with _about_source(settings):
        plan = plans.make(
            configs.model_of(pathlib.Path(sources[0])),
            settings.model,
            recipe=section.recipe,
            router=section.router,
            num_parents=len(sources),
            statistics=parent_statistics.load(section.statistics) if section.statistics else None,
            parameters=section.parameters,
        )
    distributed.say(f"recipe {section.recipe}, step 0: {step_zero.in_words(plan)}")
    return plan


def parameters(settings: configs.Run, mesh: jax.sharding.Mesh, plan: plans.Plan | None) -> dict:
    """Sharded parameters for a run's model, according to its `init` section and the plan.

    Raises: ConfigError if the source's model does not fit.
    """
    create = functools.partial(model.init, settings.model)
    key = tree.fold_in(jax.random.key(settings.seed), "init")
    sources = settings.init.parents
    if not sources:
        return _jit_sharded(create, mesh, key)
    for source in filter(lambda source: _saw_these_rows(source, settings), sources):
        distributed.say(
            f"init.source={source} was trained on this text in this order, for its seed is "
            f"{settings.seed} too; set config.seed to another for another order"
        )
    with _about_source(settings):
        _, parents = stores.load_alike(
            settings.init.sources, mesh, allow_nonfinite=settings.init.allow_nonfinite
        )
        parents = [_float32(params) for params in parents]
        if plan is not None:
            return _executed(plan, parents, settings, mesh)
    [params] = parents
    trees = params, jax.eval_shape(create, key)
    have, want = (jax.tree.map(lambda x: x.shape, leaves) for leaves in trees)
    if have != want:
        theirs = configs.model_of(pathlib.Path(sources[0]))
        differing = "; ".join(comparison.differences(settings.model, theirs))
        raise configs.ConfigError(
            f"config.init.source={settings.init.source} holds another model than config.model: "
            f"{differing}; set config.init.upcycle.recipe, or leave the model to the source"
        )
    return params


def dense_parent(
    settings: configs.Run, mesh: jax.sharding.Mesh, named: Sequence[str]
) -> tuple[dict, model.ModelConfig]:
    """The parameters and the config of a run's first parent, as they are stored now.

    Args: named: the parents' names in the run's `lineage`, with the step that it started from.

    Raises: ValueError or OSError if the parent is gone or damaged.
    """
    allow = settings.init.allow_nonfinite
    config, params = stores.load(configs.source_of(named[0]), mesh, allow_nonfinite=allow)
    return params, config


def keep_from_parents(
    settings: configs.Run, tokenizer: tokenizers.Tokenizer, workdir: pathlib.Path
) -> None:
    """Copies the tokenizer, the chat template and the parents' cards into a run's workdir, where
    they are found when it is read: the paths in a stored config are not followed."""
    stores.keep_tokenizer(workdir, settings.data.tokenizer)
    if form := chat.form_of(settings.data):
        _keep_template(form.template, tokenizer, stores.tokenizer_folder(workdir))
    cards.keep(workdir, [source.folder for source in settings.init.sources])


def _keep_template(
    template: chat_template.ChatTemplate, tokenizer: tokenizers.Tokenizer, folder: pathlib.Path
) -> None:
    """Writes a chat template, and the token that ends its turns into generation_config.json:
    Transformers ends an answer at no other tokens than those of that file."""
    folder.mkdir(exist_ok=True)
    files.write_text(folder / chat_template.FILE, template.source)
    special, beside = tokenizer.special_tokens, tokenizer_files.Folder(folder)
    ends = [special[token] for token in chat.turn_ends(template, tuple(special))]
    if not ends:
        distributed.say(
            f"the chat template of {template.place} ends the assistant's turns with no special "
            "token of the tokenizer, so nothing will end an answer"
        )
    known = tokenizer_files.ends(beside) or tokenizer.end_ids
    if not set(ends) <= set(known):
        values = beside.read(tokenizer_files.GENERATION) | {"eos_token_id": [*known, *ends]}
        files.write_text(folder / tokenizer_files.GENERATION, strict_json.text(values) + "\n")


def _saw_these_rows(source: str, settings: configs.Run) -> bool:
    """True if a parent's run was trained on the rows that this run will see, in the same order."""
    if folders.is_folder(source):
        return False
    parent, own = configs.load_json(pathlib.Path(source)), settings.data
    try:
        text = configs.data_of(parent)
        theirs = parent.seed, text.source, text.mixture, text.sequence_length
        if theirs != (settings.seed, own.source, own.mixture, own.sequence_length):
            return False
        names = configs.tokenizer_of(pathlib.Path(source)), own.tokenizer
        first, second = (tokenizers.load(name).fingerprint for name in names)
    except ValueError:  # the parent keeps no tokenizer
        return False
    return first == second


@contextlib.contextmanager
def _about_source(settings: configs.Run) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise configs.ConfigError(f"config.init.source={settings.init.source}: {error}") from error


def _executed(plan: plans.Plan, parents: list[dict], settings: configs.Run, mesh) -> dict:
    key = tree.fold_in(tree.fold_in(jax.random.key(settings.seed), "init"), "upcycle")
    return _jit_sharded(functools.partial(transform.execute, plan, key=key), mesh, parents)


def optimizer_state(
    settings: configs.Run, mesh: jax.sharding.Mesh, fresh: optax.OptState, plan: plans.Plan
) -> optax.OptState:
    """`fresh` with Adam's moments and step count from the parent's run; routers' moments are zero.

    Each moment follows its weight to the same experts and the same order of neurons.

    Raises: ConfigError if the parent has no optimizer state.
    """
    [source] = settings.init.sources
    workdir = source.folder
    if folders.is_folder(workdir):
        raise configs.ConfigError(
            "config.init.upcycle.optimizer_state='copy' needs the workdir of a run as "
            "config.init.source: a Hugging Face folder has no optimizer state"
        )
    parent = configs.of_stored(configs.load_json(workdir))
    if parent.optimizer.frozen or settings.optimizer.frozen:
        raise configs.ConfigError(
            "config.init.upcycle.optimizer_state='copy' needs moments of all parameters; "
            "use 'fresh' with optimizer.frozen"
        )
    tx = optimizer.adamw(parent.optimizer, parent.training.num_steps)
    shapes = jax.eval_shape(lambda: tx.init(model.init(plan.source, jax.random.key(0))))
    abstract = sharding.abstract({"opt_state": shapes}, mesh)
    try:
        loaded, _ = checkpoint.load(source.checkpoints, abstract, step=source.step)
        stores.check_finite(source, loaded, allow=settings.init.allow_nonfinite)
        [adam] = filter(_is_adam, jax.tree.leaves(loaded["opt_state"], is_leaf=_is_adam))
    except (ValueError, FileNotFoundError) as error:
        raise configs.ConfigError(
            f"config.init.source={source}: {error}; set init.upcycle.optimizer_state='fresh'"
        ) from error
    mu, nu = (_executed(plan.for_moments(), [m], settings, mesh) for m in (adam.mu, adam.nu))
    return jax.tree.map(
        lambda node: node._replace(count=adam.count, mu=mu, nu=nu) if _is_adam(node) else node,
        fresh,
        is_leaf=_is_adam,
    )


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


NO_LINEAGE: dict[str, Any] = {
    "tokens": 0,
    "training_flops": 0.0,
    "device_seconds": 0.0,
    "parents": [],
    "runs": {},
}
NUMBERS = ("tokens", "training_flops", "device_seconds")


def lineage(parents: Sequence[configs.Source]) -> dict[str, Any]:
    """The tokens, FLOPs and device seconds of training behind these models, added up, and the
    models' names.

    `runs` has the same numbers of each run behind them: one that several parents come from counts
    once. Runs of equal configs are the same run; at different steps, the later one counts.

    If a run is given without a step, its newest checkpoint counts, and the name has its step. The
    numbers are 0 for a Hugging Face folder, which does not record them; its device seconds are
    None, as are those of older runs. A run keeps its parents' numbers in its own checkpoints, so it
    needs the parents only for its first step.
    """
    names: list[str] = []
    runs: dict[str, dict[str, Any]] = {}
    for parent in parents:
        folder = parent.folder
        if folders.is_folder(folder):
            names.append(str(parent))
            runs[str(folder)] = {"tokens": 0, "training_flops": 0.0, "device_seconds": None}
            continue
        run = configs.load_json(folder)
        data = checkpoint.newest_data(parent.checkpoints, parent.step)
        names.append(str(configs.Source(folder, data.get("step", parent.step))))
        length = run.data.sequence_length
        tokens = data.get("step", 0) * run.training.batch_size * length
        spent = tokens * flops.model_flops(configs.model_of(folder), length)
        own = dict(zip(NUMBERS, (tokens, spent, data.get("device_seconds")), strict=True))
        for name, numbers in [*_behind(data), (_identity(run), own)]:
            if name not in runs or runs[name]["tokens"] < numbers["tokens"]:
                runs[name] = numbers
    total = {key: [numbers[key] for numbers in runs.values()] for key in NUMBERS}
    added = {key: None if None in every else sum(every) for key, every in total.items()}
    return {**NO_LINEAGE, **added, "parents": names, "runs": runs}


def _behind(data: dict) -> list[tuple[str, dict[str, Any]]]:
    """The runs behind the parent whose checkpoint keeps this data; of an older version, which kept
    their sums only, one in place of all, known by their names."""
    earlier = data.get("lineage", NO_LINEAGE)  # an imported model has none
    if "runs" in earlier:
        return list(earlier["runs"].items())
    return [(",".join(earlier["parents"]), {key: earlier.get(key) for key in NUMBERS})]


def _identity(run: ConfigDict) -> str:
    """A hash of a run's config without what is of the machine."""
    values = run.to_dict()
    values["data"] = {key: value for key, value in values["data"].items() if key != "cache_dir"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


@jax.jit
def _float32(params: dict) -> dict:
    """The parameters in float32, in which training keeps its weights whatever the source stores."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _jit_sharded(create, mesh, argument) -> dict:
    """Runs `create` under jit, with its result sharded by the rules from the start."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(create, argument)
        return jax.jit(create, out_shardings=sharding.shardings(shapes, mesh))(argument)
