"""A model's folder: a Hugging Face folder or a run's workdir, read and written alike."""

import dataclasses
import functools
import os
import pathlib
import reprlib
import shutil
from collections.abc import Sequence

import jax

from moe_jax import config as configs
from moe_jax import files, hf, model
from moe_jax.hf import configs as hf_configs
from moe_jax.hf import folders, safetensors, tensors, writing
from moe_jax.model import comparison
from moe_jax.parallel import sharding
from moe_jax.training import checkpoint
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import streaming


def load_alike(
    sources: list[pathlib.Path], mesh: jax.sharding.Mesh
) -> tuple[model.ModelConfig, list[dict]]:
    """The config and the parameters of models that are alike; raises ValueError if one is not."""
    check_alike({source: config_of(source) for source in sources})
    loaded = [load(source, mesh) for source in sources]
    return loaded[0][0], [params for _, params in loaded]


def check_alike(models: dict[pathlib.Path, model.ModelConfig]) -> None:
    """Raises ValueError for models that do not compute alike, with the fields that differ."""
    (first, ours), *others = (
        (path, comparison.in_force(config)) for path, config in models.items()
    )
    for path, theirs in others:
        differing = [
            f"{name} is {reprlib.repr(theirs.get(name))}, not {reprlib.repr(ours.get(name))}"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]
        if differing:
            raise ValueError(
                f"{path} is another model than {first}: {'; '.join(differing)}; "
                "parents must be of one size and kind"
            )


def load(workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[model.ModelConfig, dict]:
    """The model config and the sharded parameters of a Hugging Face folder or a run's workdir.

    A run gives its newest checkpoint that verifies. Raises: ValueError for a folder that is
    neither, or damaged.
    """
    if folders.is_folder(workdir):
        return hf.load(workdir, mesh=mesh)
    model_config = config_of(workdir)
    shapes = jax.eval_shape(functools.partial(model.init, model_config), jax.random.key(0))
    abstract = sharding.abstract(shapes, mesh)
    loaded = checkpoint.load(workdir / "checkpoints", {"params": abstract}, own_dtypes=True)
    return model_config, loaded["params"]


def config_of(workdir: pathlib.Path) -> model.ModelConfig:
    """The config of a model in a Hugging Face folder or a workdir; ValueError if it is neither."""
    if folders.is_folder(workdir):
        return hf_configs.of_folder(workdir)
    if not (workdir / "checkpoints").exists():
        raise ValueError(
            f"{workdir} is neither a Hugging Face folder (config.json with a model_type) "
            "nor a run's workdir"
        )
    return configs.resolve(configs.load_json(workdir)).model


def tokenizer_of(workdir: pathlib.Path) -> str:
    """The name by which `tokenizers.load` finds the tokenizer of a model's folder."""
    if not folders.is_folder(workdir):
        return configs.load_json(workdir).data.tokenizer
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    found = [name for name in names if (workdir / name).exists()]
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
    dtype: str | None = None,
) -> None:
    """A model as "hf", a Hugging Face folder, or "orbax", a workdir; with the source's tokenizer.

    Raises: ValueError when `output` exists or cannot hold the model, or `dtype` its values.
    """
    try:
        tokenizer = tokenizer_of(source)
    except ValueError:
        tokenizer = "bytes"
    if kind == "orbax":
        params = tensors.cast(params, dtype) if dtype else params
        save(output, model_config, params, tokenizer=tokenizer)
        return
    beside = pathlib.Path(tokenizer).parent if os.path.isfile(tokenizer) else None
    hf.save(output, model_config, params, source=beside, dtype=dtype)


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


def upcycle_folders(
    plan: plans.Plan,
    parents: Sequence[folders.Folder],
    output: str | pathlib.Path,
    key: jax.Array,
    *,
    progress: bool = False,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Writes the model that the plan makes of the parents, as a folder, an expert at a time.

    Raises: ValueError for parents that are not alike, and as `hf.save`.
    """
    first = parents[0]
    check_alike({parent.path: parent.config for parent in parents})
    for other in parents[1:]:
        for path, dtype in first.dtypes().items():
            if (theirs := other.dtypes()[path]) != dtype:
                raise ValueError(
                    f"{other.path} is not stored in the dtypes of {first.path}: {path} is "
                    f"{theirs}, not {dtype}; convert one with scripts/convert.py --dtype, or give "
                    "--to=orbax"
                )
    stream = streaming.Stream(plan, parents, key)
    writing.write(
        output,
        plan.config,
        stream.dtypes(),
        lambda part: stream.part(part.path, part.row),
        source=first.path,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )
