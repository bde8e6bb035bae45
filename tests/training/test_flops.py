"""FLOP counts against parameter counts and against the products of a compiled step."""

import dataclasses

import jax
import pytest

from moe_jax import model
from moe_jax.config import Run
from moe_jax.data.batches import Batch
from moe_jax.dryrun import hlo
from moe_jax.training import flops, optimizer, step
from moe_jax.training.state import TrainState

T = 128  # two blocks of attention
DENSE = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MOE = DENSE.to_moe(num_experts=8, num_experts_per_tok=2)


TWO_LAYERS = dataclasses.replace(MOE, router="noisy_topk_mlp")


@pytest.mark.parametrize("config", [DENSE, MOE, TWO_LAYERS], ids=["dense", "moe", "two layers"])
def test_model_flops_are_six_per_active_matrix_entry_and_causal_attention(config):
    D, L, N, H = 32, 3, 4, 8
    norms = D * (2 * L + 1)
    active_matrices = model.count_parameters(config)[1] - norms - 64 * D  # less the embedding
    pairs = (T + 1) / 2  # positions that a token sees on average, itself included
    attention = 2 * L * N * H * pairs
    assert flops.model_flops(config, T) == 6 * (active_matrices + attention)


LESS_OFTEN = ("save_experts", "offload_experts", "offload_dots")


@pytest.mark.parametrize(
    "remat",
    [
        *("none", "full", "save_dots"),
        *(pytest.param(name, marks=pytest.mark.long) for name in LESS_OFTEN),
    ],
)
@pytest.mark.parametrize("T", [pytest.param(32, marks=pytest.mark.long, id="one block"), T])
def test_a_dense_step_executes_the_analytic_flops_exactly(remat, T):
    config = dataclasses.replace(DENSE, remat=remat)
    settings = Run(model=config)
    tx = optimizer.adamw(settings.optimizer, 10)
    state = jax.eval_shape(
        lambda key: TrainState.create(model.init(config, key), tx), jax.random.key(0)
    )
    batch = Batch.of_shape((2, T), jax.ShapeDtypeStruct)
    compiled = jax.jit(step.make_train_step(settings, tx)).lower(state, batch)
    executed = hlo.product_flops(compiled.compile().as_text())
    assert executed == 2 * T * flops.analytic_flops(config, T)
