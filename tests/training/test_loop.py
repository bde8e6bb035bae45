"""The step loop moves nothing between host and device but what it says it moves."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax.model import PRESETS
from moe_jax.training import loop


def test_a_step_with_an_implicit_transfer_is_refused():
    settings = configs.Run(model=PRESETS["quickstart"], training=configs.Training(num_steps=1))
    host_array = np.ones(3, np.float32)
    parts = loop.Parts(
        train_step=lambda state, batch: (state + host_array, None),
        evaluators={},
        save=lambda step, state: None,
        write=lambda row: None,
        tokens_per_step=1,
        model_flops_per_token=1.0,
        analytic_flops_per_token=1.0,
        peak_flops=1.0,
        largest=lambda number: number,
    )
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(jnp.zeros(3), 0, iter([None]), settings, parts)
