"""The config of a run of two steps on ten short texts, for tests of whole runs in this process."""

import pathlib

import ml_collections

from moe_jax import config as configs
from moe_jax import model


def config(folder: pathlib.Path, model_config: model.ModelConfig) -> ml_collections.ConfigDict:
    """A run that trains this model; its texts and its cache are in the folder."""
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"one and two are {i} " * 20)
    found = configs.default()
    fields = vars(model_config).items()
    found.model.update({k: v for k, v in fields if v is not None and k != "model_type"})
    found.data.update(source=str(folder), sequence_length=16, validation_fraction=0.3)
    found.data.cache_dir = str(folder / "cache")
    found.training.update(num_steps=2, batch_size=8, log_every=1)
    found.evaluation.update(batch_size=8, max_batches=1, final_max_batches=1)
    return found
