"""Parameters to a Hugging Face folder."""

import pathlib

import numpy as np

from moe_jax import model, tree
from moe_jax.hf import writing


def save(
    folder: str | pathlib.Path,
    config: model.ModelConfig,
    params: dict,
    *,
    source: str | pathlib.Path | None = None,
) -> None:
    """Writes the parameters as the Hugging Face model that holds them, in their own dtype.

    Args:
      folder: must not exist; appears when all is written.
      source: a Hugging Face folder whose tokenizer, generation settings and token ids go along.

    Raises: ValueError, in one line, when no Hugging Face class can hold the model, or `folder`
      exists.
    """
    leaves = tree.flatten(params)
    dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
    writing.write(
        folder,
        config,
        dtypes,
        lambda part: np.asarray(leaves[part.path][part.row]),
        source=source,
    )
