"""The products of the whole train step, counted in its compiled text."""

import jax
import pytest

from moe_jax import model
from moe_jax.config import Run
from moe_jax.data.batches import Batch
from moe_jax.dryrun import hlo
from moe_jax.training import flops, optimizer
from moe_jax.training.state import TrainState
from moe_jax.training.step import make_train_step

B, T = 8, 256
TOKENS = B * T


def compiled_step(config):
    """The text of the whole train step, compiled from shapes alone."""
    settings = Run(model=config)
    adamw = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    state = jax.eval_shape(lambda: TrainState.create(model.init(config, jax.random.key(0)), adamw))
    batch = Batch.of_shape((B, T), jax.ShapeDtypeStruct)
    step = make_train_step(settings, adamw)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()


def step_config(E, A, **changes):
    return model.ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,  # most of the work, as in a large model
        num_hidden_layers=2,  # a loop of one is unrolled, and its recomputation merged away
        num_attention_heads=2,
        num_experts=E,
        num_experts_per_tok=A,
        **changes,
    )


def ratio_to_analytic(text, config):
    return hlo.product_flops(text) / (flops.analytic_flops(config, T) * TOKENS)


def buffers_of_every_expert_on_every_token(text, config):
    E, rows = config.num_experts, (TOKENS, TOKENS * config.num_experts_per_tok)
    return {s for s in hlo.buffer_shapes(text) if len(s) >= 3 and s[0] == E and s[1] in rows}


@pytest.mark.parametrize(
    ("E", "A", "remat"),
    [
        pytest.param(8, 2, "full", id="8e-top2"),
        pytest.param(8, 2, "none", id="8e-top2-no remat", marks=pytest.mark.long),
        pytest.param(64, 8, "full", id="64e-top8", marks=pytest.mark.long),
        pytest.param(64, 8, "none", id="64e-top8-no remat", marks=pytest.mark.long),
    ],
)
def test_the_step_executes_the_due_products_and_at_most_a_quarter_more(E, A, remat):
    config = step_config(E, A, remat=remat)
    text = compiled_step(config)
    # Less would be an under-count; more is the padding of the experts' blocks.
    ratio = ratio_to_analytic(text, config)
    assert 0.98 <= ratio <= 1.25, ratio
    assert not buffers_of_every_expert_on_every_token(text, config)


def test_an_implementation_with_every_expert_on_every_token_is_caught():
    config = step_config(8, 2, grouped_matmul="reference")
    text = compiled_step(config)
    assert ratio_to_analytic(text, config) > 1.25
    assert buffers_of_every_expert_on_every_token(text, config)
