"""The size of studies that a CPU trains, and the config that their runs have in common.

Studies that share it have parents of the same id, so that one workdir trains them once.
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax import config as configs
from moe_jax.model.presets import PRESETS

STEPS, LENGTH, WIDTH = 1000, 128, 288  # WIDTH is that of the parent's feed-forward
DENSE = dataclasses.replace(PRESETS["quickstart"], intermediate_size=WIDTH)  # the parent
PARENT, ARMS = 0, 10  # seeds: arms read the text in another order


def config() -> ConfigDict:
    """The config of a study's parent, which the overrides of its arms change."""
    config = configs.default()
    config.seed = PARENT
    config.model.preset = "quickstart"
    config.model.intermediate_size = WIDTH
    config.data.source = "tfds:lo_parallel19_sealed"
    config.data.sequence_length = LENGTH
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 40
    config.training.num_steps = STEPS
    config.training.batch_size = 8
    config.training.log_every = 25
    config.training.log_to = ()
    config.evaluation.every_steps = 125
    config.evaluation.batch_size = 64
    config.evaluation.max_batches = 4
    config.evaluation.final_max_batches = 4
    config.evaluation.test_split = True
    config.checkpoint.every_steps = STEPS
    config.checkpoint.keep = 1
    return config
