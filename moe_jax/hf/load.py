"""A Hugging Face folder to ModelConfig and parameters, whole or straight into sharded arrays."""

import pathlib

import jax

from moe_jax import model, tree
from moe_jax.hf import folders, tensors
from moe_jax.parallel import sharding


def load(
    folder: str | pathlib.Path, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[model.ModelConfig, dict]:
    """(ModelConfig, parameters) of a folder of config.json and safetensors.

    Parameters keep the dtype they are stored in. With a mesh they are placed by the rules of
    `parallel/sharding.py`, and each process reads only the parts that its devices hold; without
    one they are numpy arrays.

    Raises: ValueError, in one line, for a folder that is not a model we know, with the list of
      missing, extra and misshapen tensors.
    """
    source = folders.Folder(folder)
    if mesh is None:
        return source.config, source.params()
    dtypes = source.dtypes()
    abstract = {
        path: jax.ShapeDtypeStruct(shape, dtypes[path])
        for path, shape in tensors.shapes(source.config).items()
    }
    placed = sharding.shardings(tree.unflatten(abstract), mesh)
    return source.config, tree.map_with_name(
        lambda path, leaf, where: jax.make_array_from_callback(
            leaf.shape, where, lambda index: source.leaf(path, index)
        ),
        tree.unflatten(abstract),
        placed,
    )
