"""A model's layers, reached one by one, are the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import layers, layout, transformer

CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=2,
    num_experts=4,
    layers=("dense", "moe", "dense", "moe", "moe"),
)
PARAMS = model.init(CONFIG, jax.random.key(0))
TOKENS_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
POSITIONS_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
SHARED = transformer.Shared(POSITIONS_BT, jnp.ones_like(POSITIONS_BT))


@pytest.fixture(scope="module")
def outputs():
    """x before each layer, what each block gives, and x after the last."""
    run = jax.jit(transformer.block, static_argnames=("config", "kind", "taps"))
    x_BTD, found = transformer.embed(PARAMS["embed"], TOKENS_BT, POSITIONS_BT, CONFIG), []
    for index, kind, params in layout.layers(PARAMS, CONFIG):
        how = {"config": CONFIG, "kind": kind, "taps": ("feed_forward_input",)}
        before_BTD = x_BTD
        x_BTD, output = run(x_BTD, params, {"index": index}, SHARED, **how)
        found.append((kind, params, before_BTD, output, x_BTD))
    return found


def test_blocks_one_after_another_give_the_models_hidden_states_and_statistics(outputs):
    *_, x_BTD = outputs[-1]
    want_BTD, stats = transformer.hidden_states(PARAMS, TOKENS_BT, SHARED, CONFIG)
    got_BTD = layers.norm(x_BTD, PARAMS["final_norm"], CONFIG)
    np.testing.assert_allclose(got_BTD, want_BTD, rtol=1e-5, atol=1e-5)
    of_sparse = [output.stats for _, _, _, output, _ in outputs if output.stats is not None]
    assert len(of_sparse) == 3
    np.testing.assert_array_equal(
        [stats.tokens_per_expert_E for stats in of_sparse], stats.tokens_per_expert_E
    )


def test_a_tap_is_what_the_feed_forward_reads(outputs):
    """Without attention's output projection a dense block is x + feed_forward(tap)."""
    kind, params, before_BTD, _, _ = outputs[0]
    silent = {**params, "attention": jax.tree.map(jnp.zeros_like, params["attention"])}
    x_BTD, output = transformer.block(
        *(before_BTD, silent, {"index": 0}, SHARED),
        config=CONFIG,
        kind=kind,
        taps=("feed_forward_input",),
    )
    tapped_BTD = output.tapped["feed_forward_input"]
    want_BTD = before_BTD + layers.feed_forward(tapped_BTD, params["mlp"], CONFIG)
    np.testing.assert_allclose(x_BTD, want_BTD, rtol=1e-6)


def test_a_part_of_a_layer_is_cut_from_its_stack():
    """Layers that are not neighbours share a stack."""
    kernels = [layout.layer(PARAMS, CONFIG, i, "moe", "router")["kernel"] for i in (1, 3, 4)]
    assert layout.sparse_layers(CONFIG) == [1, 3, 4]
    for i, kernel_DE in zip((1, 3, 4), kernels, strict=True):
        slot, row = layout.slots(CONFIG.block_kinds)[i]
        stack = PARAMS["blocks"][slot]["moe"]["router"]["kernel"]
        np.testing.assert_array_equal(kernel_DE, stack[row])
    assert len({kernel_DE.tobytes() for kernel_DE in map(np.asarray, kernels)}) == 3
