"""Where parameters come from: random, a run's checkpoint, a Hugging Face folder, or upcycled."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax import config as configs
from moe_jax import hf, model, upcycle
from moe_jax.hf import folders, writing
from moe_jax.parallel import naming, sharding
from moe_jax.training import checkpoint, flops


def parameters(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict:
    """Sharded parameters for the model of `config`, as its `init` section says.

    Raises: ConfigError when the source's model does not fit.
    """
    model_config = configs.model_config(config)
    key = naming.fold_in(jax.random.key(config.seed), "init")
    create = functools.partial(model.init, model_config)
    if not config.init.source:
        return _jit_sharded(create, mesh, key)
    source_config, params = load(pathlib.Path(config.init.source), mesh)
    params = _float32(params)
    section = config.init.upcycle
    if section.recipe:
        transform = functools.partial(
            upcycle.upcycle,
            config=source_config,
            moe_config=model_config,
            recipe=section.recipe,
            router=section.router,
            key=naming.fold_in(key, "upcycle"),
            **configs.upcycle_parameters(config),
        )
        try:
            return _jit_sharded(transform, mesh, params)
        except ValueError as error:
            raise configs.ConfigError(
                f"config.init.source={config.init.source}: {error}"
            ) from error
    if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(
        lambda x: x.shape, jax.eval_shape(create, key)
    ):
        raise configs.ConfigError(
            f"config.init.source={config.init.source} holds another model than config.model; "
            "set config.init.upcycle.recipe, or the same model"
        )
    return params


def load(workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[model.ModelConfig, dict]:
    """The model config and the sharded parameters of a Hugging Face folder or a run's workdir.

    Of a run it is the newest checkpoint that verifies. Raises: ValueError for a folder that is
    neither, or damaged.
    """
    if folders.is_folder(workdir):
        return hf.load(workdir, mesh=mesh)
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is neither a Hugging Face folder nor a run's workdir")
    model_config = configs.model_config(configs.load_json(workdir))
    shapes = jax.eval_shape(functools.partial(model.init, model_config), jax.random.key(0))
    abstract = sharding.abstract(shapes, mesh)
    return model_config, checkpoint.load_params(workdir / "checkpoints", abstract)


def save(workdir: pathlib.Path, model_config: model.ModelConfig, params: dict) -> None:
    """A workdir with these parameters as its checkpoint of step 0, whole or not at all."""
    config = configs.default()
    config.model.update(dataclasses.asdict(model_config))
    with writing.appearing(workdir) as unfinished:
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
    """The lineage of a run's newest checkpoint, from its workdir.

    Nothing for source "", and for a Hugging Face folder, which does not say.
    """
    if not source or folders.is_folder(source):
        return Lineage(0, 0.0)
    config = configs.load_json(pathlib.Path(source))
    earlier = lineage(config.init.source)
    steps = checkpoint.steps(pathlib.Path(source) / "checkpoints")[-1]
    length = config.data.sequence_length
    tokens = steps * config.training.batch_size * length
    per_token = flops.model_flops(configs.model_config(config), length)
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
