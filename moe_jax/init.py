"""Where parameters come from: random, a run's checkpoint, a Hugging Face folder, or upcycled."""

import dataclasses
import functools
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import optax

from moe_jax import config as configs
from moe_jax import files, hf, model, tree, upcycle
from moe_jax.analysis import parent_statistics
from moe_jax.config.sections import Upcycle
from moe_jax.hf import folders, safetensors
from moe_jax.parallel import distributed, sharding
from moe_jax.training import checkpoint, flops, optimizer
from moe_jax.upcycle import plan, recipes

HOW_IT_IS_COMPUTED = ("dtype", "remat", "expert_parallel", "grouped_matmul", "attention")


def parameters(settings: configs.Run, mesh: jax.sharding.Mesh) -> dict:
    """Sharded parameters for the model of a run, as its `init` section says.

    Raises: ConfigError when the source's model does not fit.
    """
    model_config, section = settings.model, settings.init
    key = tree.fold_in(jax.random.key(settings.seed), "init")
    create = functools.partial(model.init, model_config)
    if not section.parents:
        return _jit_sharded(create, mesh, key)
    try:
        source_config, parents = load_alike([pathlib.Path(s) for s in section.parents], mesh)
        parents = [_float32(params) for params in parents]
        if section.upcycle.recipe:
            method = _method(section.upcycle)
            made = plan.make(
                *(source_config, model_config),
                **method,
                num_parents=len(parents),
                parameters=section.upcycle.parameters,
            )
            distributed.say(f"recipe {section.upcycle.recipe}, step 0: {made.at_start}")
            return _jit_sharded(_transform(settings, source_config, method), mesh, parents)
    except (ValueError, OSError) as error:
        raise configs.ConfigError(f"config.init.source={section.source}: {error}") from error
    [params] = parents
    if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(
        lambda x: x.shape, jax.eval_shape(create, key)
    ):
        raise configs.ConfigError(
            f"config.init.source={section.source} holds another model than config.model; "
            "set config.init.upcycle.recipe, or the same model"
        )
    return params


def _method(section: Upcycle) -> dict:
    return {
        "recipe": section.recipe,
        "router": section.router,
        "statistics": parent_statistics.load(section.statistics) if section.statistics else None,
    }


def _transform(settings: configs.Run, source_config: model.ModelConfig, method: dict, **changes):
    """The upcycling that a run's config asks for, of parents' parameters."""
    how = {
        **method,
        "key": tree.fold_in(tree.fold_in(jax.random.key(settings.seed), "init"), "upcycle"),
        **settings.init.upcycle.parameters,
        **changes,
    }
    return functools.partial(
        upcycle.upcycle, config=source_config, moe_config=settings.model, **how
    )


def optimizer_state(
    settings: configs.Run, mesh: jax.sharding.Mesh, fresh: optax.OptState
) -> optax.OptState:
    """`fresh` with Adam's moments and their count from the parent's run, routers' zero.

    Each moment goes the way of its weight: to the same experts, in the same order of neurons.
    Raises: ConfigError when the parent has no optimizer state.
    """
    workdir = pathlib.Path(settings.init.source)
    if folders.is_folder(workdir):
        raise configs.ConfigError(
            "config.init.upcycle.optimizer_state='copy' needs the workdir of a run as "
            "config.init.source: a Hugging Face folder has no optimizer state"
        )
    parent = configs.resolve(configs.load_json(workdir))
    if parent.optimizer.frozen or settings.optimizer.frozen:
        raise configs.ConfigError(
            "config.init.upcycle.optimizer_state='copy' needs moments of all parameters; "
            "use 'fresh' with optimizer.frozen"
        )
    tx = optimizer.adamw(parent.optimizer, parent.training.num_steps)
    shapes = jax.eval_shape(lambda: tx.init(model.init(parent.model, jax.random.key(0))))
    abstract = sharding.abstract({"opt_state": shapes}, mesh)
    try:
        [adam] = _adam_states(checkpoint.load(workdir / "checkpoints", abstract)["opt_state"])
    except (ValueError, FileNotFoundError) as error:
        raise configs.ConfigError(
            f"config.init.source={workdir}: {error}; set init.upcycle.optimizer_state='fresh'"
        ) from error
    section = settings.init.upcycle
    changes = recipes.parameters_of_moments(section.recipe, section.parameters)
    transform = _transform(settings, parent.model, _method(section), router="zero", **changes)
    mu, nu = (_jit_sharded(transform, mesh, moments) for moments in (adam.mu, adam.nu))
    return jax.tree.map(
        lambda node: node._replace(count=adam.count, mu=mu, nu=nu) if _is_adam(node) else node,
        fresh,
        is_leaf=_is_adam,
    )


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _adam_states(opt_state: optax.OptState) -> list[optax.ScaleByAdamState]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(node)]


def load_alike(
    sources: list[pathlib.Path], mesh: jax.sharding.Mesh
) -> tuple[model.ModelConfig, list[dict]]:
    """Parents of one and the same model.

    Raises: ConfigError naming the first that is another.
    """
    loaded = [load(source, mesh) for source in sources]
    first = loaded[0][0]
    how = {name: getattr(first, name) for name in HOW_IT_IS_COMPUTED}
    for source, (other, _) in zip(sources, loaded, strict=True):
        if dataclasses.replace(other, **how) != first:
            raise configs.ConfigError(
                f"{source} is another model than {sources[0]}; "
                "parents must be of one size and family"
            )
    return first, [params for _, params in loaded]


def load(workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[model.ModelConfig, dict]:
    """The model config and the sharded parameters of a Hugging Face folder or a run's workdir.

    Of a run it is the newest checkpoint that verifies. Raises: ValueError for a folder that is
    neither, or damaged.
    """
    if folders.is_folder(workdir):
        return hf.load(workdir, mesh=mesh)
    if not (workdir / "checkpoints").exists():
        raise ValueError(
            f"{workdir} is neither a Hugging Face folder (config.json with a model_type) "
            "nor a run's workdir"
        )
    model_config = configs.resolve(configs.load_json(workdir)).model
    shapes = jax.eval_shape(functools.partial(model.init, model_config), jax.random.key(0))
    abstract = sharding.abstract(shapes, mesh)
    return model_config, checkpoint.load(workdir / "checkpoints", {"params": abstract})["params"]


def tokenizer_of(workdir: pathlib.Path) -> str:
    """What `tokenizers.load` takes for the model of a Hugging Face folder or a run's workdir."""
    if not folders.is_folder(workdir):
        return configs.load_json(workdir).data.tokenizer
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    found = [name for name in files if (workdir / name).exists()]
    for name in found:
        safetensors.resolve_inside(workdir, name)
    if found and found[0] != "tokenizer_config.json":
        return str(workdir / found[0])
    raise ValueError(f"{workdir} has no tokenizer.json or tokenizer.model; set --tokenizer")


def save_as(
    kind: str,
    output: pathlib.Path,
    model_config: model.ModelConfig,
    params: dict,
    *,
    source: pathlib.Path,
) -> None:
    """A model as "hf", a Hugging Face folder, or "orbax", a workdir; with the source's tokenizer.

    Raises: ValueError when `output` exists or cannot hold the model.
    """
    try:
        tokenizer = tokenizer_of(source)
    except ValueError:
        tokenizer = "bytes"
    if kind == "orbax":
        save(output, model_config, params, tokenizer=tokenizer)
        return
    beside = pathlib.Path(tokenizer).parent if os.path.isfile(tokenizer) else None
    hf.save(output, model_config, params, source=beside)


def save(
    workdir: pathlib.Path,
    model_config: model.ModelConfig,
    params: dict,
    *,
    tokenizer: str = "bytes",
) -> None:
    """A workdir with these parameters as its checkpoint of step 0, whole or not at all.

    A tokenizer that is a file is copied into it.
    """
    config = configs.default()
    config.model.update(dataclasses.asdict(model_config))
    with files.whole_folder(workdir) as unfinished:
        config.data.tokenizer = tokenizer
        if os.path.isfile(tokenizer):
            name = pathlib.Path(tokenizer).name
            shutil.copyfile(tokenizer, unfinished / name)
            config.data.tokenizer = str(workdir / name)
        configs.save_json(config, unfinished)
        checkpoint.save(
            unfinished / "checkpoints",
            0,
            {"params": params},
            data={"step": 0},
            config=config.to_dict(),
            keep=1,
        )


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What it took to make a source of parameters, its own sources included."""

    tokens: int
    training_flops: float


def lineage(source: str) -> Lineage:
    """The lineage of a run's newest checkpoint, from its workdir; of several, "A,B", their sum.

    Nothing for source "", and for a Hugging Face folder, which does not say.
    """
    if "," in source:
        parts = [lineage(part) for part in source.split(",")]
        return Lineage(sum(p.tokens for p in parts), sum(p.training_flops for p in parts))
    if not source or folders.is_folder(source):
        return Lineage(0, 0.0)
    run = configs.resolve(configs.load_json(pathlib.Path(source)))
    earlier = lineage(run.init.source)
    steps = checkpoint.steps(pathlib.Path(source) / "checkpoints")[-1]
    length = run.data.sequence_length
    tokens = steps * run.training.batch_size * length
    per_token = flops.model_flops(run.model, length)
    return Lineage(earlier.tokens + tokens, earlier.training_flops + tokens * per_token)


@jax.jit
def _float32(params: dict) -> dict:
    """Training keeps its weights in float32, whatever the source stores."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _jit_sharded(create, mesh, argument) -> dict:
    """Runs `create` compiled, its result sharded by the rules from the start."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(create, argument)
        return jax.jit(create, out_shardings=sharding.shardings(shapes, mesh))(argument)
