"""The rules outside of the gradient against loops by hand; what they remember is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as configs
from moe_jax import model, tree
from moe_jax.data.batches import Batch
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import balance, checkpoint, optimizer, step
from moe_jax.training.state import Measures, RouterState, TrainState

V, B, T, E = 32, 4, 8, 4
CONFIG = model.ModelConfig(
    vocab_size=V,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=E,
    router="sigmoid_topk",
    remat="none",
)
RUN = configs.Run(
    model=CONFIG,
    balance=configs.Balance(
        load_balancing_schedule="adaptive", load_balancing_coefficient=0.02, bias_update_rate=0.5
    ),
    optimizer=configs.Optimizer(no_weight_decay="", weight_decay=1.0, learning_rate=0.1),
)
TX = optimizer.adamw(RUN.optimizer, 10)


def counted(counts_LE, dropped_L=None):
    """The measures of a step with these loads."""
    dropped_L = jnp.zeros(len(counts_LE), int) if dropped_L is None else dropped_L
    router = {"tokens_per_expert_E": counts_LE, "num_dropped": dropped_L}
    return Measures(loss=jnp.zeros(()), router=router)


def biases_of(params):
    """The layers' biases in the order of the model, whatever their slots in the tree."""
    biases = [x for name, x in tree.flatten(params).items() if name.endswith("moe/router/bias")]
    return np.concatenate(biases)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_coefficients_follow_the_drop_rates_as_a_loop_says(dispatch):
    config = dataclasses.replace(CONFIG, dispatch=dispatch, capacity_factor=1.0)
    run = dataclasses.replace(RUN, model=config)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(64, [0.4, 0.3, 0.2, 0.1], size=(100, 2))
    counts[:, 1] = 16  # the second layer is balanced: nothing would be dropped
    dropped = rng.integers(0, 4, size=(100, 2))

    def one(state, now):
        _, state = balance.adapted({}, state, run, counted(*now))
        return state, state.coefficients_L

    state = balance.initial(config, RUN.balance)
    _, trace = jax.jit(lambda s: jax.lax.scan(one, s, (counts, dropped)))(state)

    alpha = np.array([0.02, 0.02])
    for i in range(100):
        for layer in range(2):
            d = dropped[i, layer] / 64
            if dispatch == "dropless":
                d = sum(max(0, n - 64 // E) for n in counts[i, layer]) / 64
            alpha[layer] = 0.99 * alpha[layer] + 0.01 * min(0.2 * d, 0.01)
        np.testing.assert_allclose(trace[i], alpha, rtol=1e-4)


def test_a_bias_rises_where_the_load_is_low_layer_by_layer_and_keeps_a_mean_of_zero():
    # The slots of the tree have the sparse layers 0 and 3, 1 and 4 in two stacks.
    layers = ("moe", "moe", "dense") * 2
    config = dataclasses.replace(CONFIG, num_hidden_layers=6, layers=layers)
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    counts = jnp.array([[10, 4, 4, 6], [1, 1, 1, 5], [2, 2, 2, 2], [4, 4, 10, 6]])
    run = dataclasses.replace(RUN, model=config)
    new, _ = balance.with_updated_biases(params, RouterState(), run, counted(counts))
    # Signs (-1, 1, 1, 0), (1, 1, 1, -1), none, (1, 1, -1, 0), less their means, times 0.5.
    by_hand = [
        [-0.625, 0.375, 0.375, -0.125],
        [0.25, 0.25, 0.25, -0.75],
        [0, 0, 0, 0],
        [0.375, 0.375, -0.625, -0.125],
    ]
    np.testing.assert_allclose(biases_of(new), np.array(by_hand)[[0, 2, 1, 3]])
    frozen = dataclasses.replace(RUN.optimizer, frozen="blocks/0/.*router")
    run = dataclasses.replace(run, optimizer=frozen)
    frozen, _ = balance.with_updated_biases(params, RouterState(), run, counted(counts))
    np.testing.assert_allclose(biases_of(frozen), [*np.zeros((2, 4)), *biases_of(new)[2:]])


def batch():
    tokens_BT = jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)
    return Batch.of_rows(tokens_BT)


def test_a_step_moves_biases_and_coefficients_by_their_rules_alone_from_its_own_loads():
    """Weight decay on everything moves no bias, and a step that is not finite moves nothing."""
    params = jax.jit(lambda key: model.init(CONFIG, key))(jax.random.key(0))
    router = params["blocks"]["0"]["moe"]["router"]
    router["bias"] = jnp.array([[0.3, -0.3, 0.1, -0.1], [0.2, 0.2, -0.2, -0.2]])
    before = TrainState.create(params, TX, balance.initial(CONFIG, RUN.balance))
    one_step = jax.jit(step.make_train_step(RUN, TX))
    after, metrics = one_step(before, batch())

    counts = np.asarray(metrics.tokens_per_expert_LE)
    moved = router["bias"] + 0.5 * np.sign(counts.mean(axis=1, keepdims=True) - counts)
    moved -= moved.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(biases_of(after.params), moved, rtol=1e-5, atol=1e-6)
    for moment in ("mu", "nu"):
        np.testing.assert_array_equal(biases_of(optax.tree.get(after.opt_state, moment)), 0)

    np.testing.assert_array_equal(metrics.load_balancing_coefficients_L, np.float32([0.02] * 2))
    _, adapted = balance.adapted(
        {}, before.router_state, RUN, counted(counts, metrics.router["num_dropped"])
    )
    np.testing.assert_allclose(after.router_state.coefficients_L, adapted.coefficients_L, rtol=1e-6)
    assert (after.router_state.coefficients_L < 0.02).all()

    params["unembed"] = params["unembed"].at[0, 0].set(jnp.nan)
    after, metrics = one_step(before.replace(params=params), batch())
    assert metrics.skipped
    np.testing.assert_array_equal(biases_of(after.params), router["bias"])
    np.testing.assert_array_equal(after.router_state.coefficients_L, np.float32([0.02] * 2))


def test_a_checkpoint_keeps_what_the_rules_remember(tmp_path):
    # The leaf that is the rules', and one more.
    state = {"router_state": RouterState(jnp.array([0.1, 0.2])), "step": jnp.int32(1)}
    checkpoint.save(tmp_path, 1, state, data={}, config={})
    mesh = meshes.make({axis: 8 if axis == "fsdp" else 1 for axis in meshes.AXES})
    restored = checkpoint.restore_latest(tmp_path, sharding.abstract(state, mesh)).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("config", "schedule"),
    [(CONFIG, "constant"), (dataclasses.replace(CONFIG, layers=None, num_experts=0), "adaptive")],
)
def test_a_state_without_rules_has_the_leaves_it_always_had(config, schedule):
    settings = dataclasses.replace(RUN.balance, load_balancing_schedule=schedule)
    assert jax.tree.leaves(balance.initial(config, settings)) == []
