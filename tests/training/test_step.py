"""The train step: the same on any mesh, exact under accumulation, blind to padding and NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as configs
from moe_jax import model, tree
from moe_jax.data.batches import Batch
from moe_jax.model import moe
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import checkpoint, optimizer, step
from moe_jax.training.state import TrainState

V, B, T = 64, 8, 16
DENSE = model.ModelConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
MOE = DENSE.to_moe(num_experts=4, num_experts_per_tok=2)
RUN = configs.Run(model=DENSE, optimizer=configs.Optimizer(learning_rate=1e-2))
TX = optimizer.adamw(RUN.optimizer, 10)
# So large that a gradient which a mesh scaled or lost would be seen in the norm of all.
BALANCE = configs.Balance(
    load_balancing_coefficient=0.3,
    router_z_coefficient=0.1,
    importance_coefficient=0.3,
    mutual_information_coefficient=0.3,
)


def batch_of(seed, lengths=(T,) * B):
    tokens_BT = jax.random.randint(jax.random.key(seed), (B, T + 1), 0, V)
    valid_BT = jnp.arange(T) < jnp.array(lengths)[:, None]
    return Batch.of_rows(tokens_BT, valid_BT.astype(jnp.int32))


@functools.cache
def initial(config):
    return jax.jit(lambda key: TrainState.create(model.init(config, key), TX))(jax.random.key(0))


@functools.cache
def train_step(config, accumulation_steps=1, out_shardings=None):
    training = configs.Training(num_steps=10, accumulation_steps=accumulation_steps)
    balance = BALANCE if config.num_experts else RUN.balance
    run = dataclasses.replace(RUN, model=config, training=training, balance=balance)
    return jax.jit(step.make_train_step(run, TX), out_shardings=out_shardings)


def losses_of(one_step, state, start=0):
    values = []
    for i in range(start, 3):
        state, metrics = one_step(state, batch_of(i))
        balance = metrics.terms["load_balancing_loss"]
        values.append((metrics.loss, balance, metrics.gradient_norm))
    return np.array(values)


def on_mesh(sizes, mode):
    """The mesh, a step on it, and where its state lies."""
    mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
    shardings = sharding.shardings(initial(MOE), mesh)
    with jax.set_mesh(mesh):
        config = dataclasses.replace(MOE, expert_parallel=mode)
        return mesh, train_step.__wrapped__(config, out_shardings=(shardings, None)), shardings


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ((1, 8, 1, 1), "fsdp"),
        ((8, 1, 1, 1), "fsdp"),
        ((1, 2, 2, 2), "all_to_all"),
        *(
            pytest.param(sizes, mode, marks=pytest.mark.long)
            for sizes in ((2, 1, 4, 1), (1, 2, 2, 2), (1, 2, 2, 1, 2))
            for mode in ("fsdp", "ring", "all_to_all")
        ),
    ],
    ids=str,
)
def test_eight_devices_give_the_losses_of_one(sizes, mode):
    alone = losses_of(train_step(MOE), initial(MOE))
    mesh, one_step, shardings = on_mesh(sizes, mode)
    with jax.set_mesh(mesh):
        state = jax.device_put(initial(MOE), shardings)
        np.testing.assert_allclose(losses_of(one_step, state), alone, rtol=1e-5)


@pytest.mark.long
def test_a_checkpoint_of_one_mesh_goes_on_with_the_same_losses_on_another(tmp_path):
    alone = losses_of(train_step(MOE), initial(MOE))
    mesh, one_step, shardings = on_mesh((1, 2, 2, 2), "all_to_all")
    with jax.set_mesh(mesh):
        state, _ = one_step(jax.device_put(initial(MOE), shardings), batch_of(0))
    checkpoint.save(tmp_path, 1, state, data={}, config={})
    mesh, one_step, _ = on_mesh((2, 1, 4, 1), "ring")
    restored = checkpoint.restore_latest(tmp_path, sharding.abstract(initial(MOE), mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(losses_of(one_step, restored.state, 1), alone[1:], rtol=1e-5)


def test_accumulated_microbatches_equal_one_batch():
    """With rows of different lengths: averaging the microbatches' means would not be equal."""
    batch = batch_of(0, lengths=(16, 16, 3, 1, 16, 9, 2, 5))
    whole, metrics = train_step(DENSE)(initial(DENSE), batch)
    parts, metrics_of_parts = train_step(DENSE, 4)(initial(DENSE), batch)
    np.testing.assert_allclose(metrics.loss, metrics_of_parts.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.gradient_norm, metrics_of_parts.gradient_norm, rtol=1e-5)
    moments = [jax.tree.leaves(s.opt_state) for s in (whole, parts)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_experts_rounded_once_give_the_step_in_which_each_layer_rounds_its_own(remat, monkeypatch):
    config = dataclasses.replace(MOE, dtype="bfloat16", remat=remat)
    state, metrics = train_step.__wrapped__(config)(initial(config), batch_of(0))
    monkeypatch.setattr(moe, "with_rounded_experts", lambda params, config: params)
    other, others = train_step.__wrapped__(config)(initial(config), batch_of(0))
    jax.tree.map(np.testing.assert_array_equal, metrics, others)
    # XLA:CPU adds the moments of gradients that it widens itself in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    jax.tree.map(close, state, other)


def test_only_the_experts_matrices_are_rounded():
    config = dataclasses.replace(MOE, dtype="bfloat16", model_type="lola", mlp_bias=True)
    shapes = jax.eval_shape(
        lambda key: moe.with_rounded_experts(model.init(config, key), config), jax.random.key(0)
    )
    rounded = {n.split("/", 2)[2] for n, x in tree.flatten(shapes).items() if x.dtype != "float32"}
    assert rounded == {f"moe/experts/{name}" for name in ("gate", "up", "down")}
    unchanged = initial(MOE).params
    assert moe.with_rounded_experts(unchanged, MOE) is unchanged


def test_the_router_losses_alone_have_a_gradient_that_grows_with_their_coefficients():
    """The text has no weight, so that the router losses are the only source of the gradient."""
    batch = batch_of(0).replace(weights_BT=jnp.zeros((B, T)))
    norms = []
    for factor in (1.0, 2.0):
        names = [field.name for field in dataclasses.fields(BALANCE) if "coefficient" in field.name]
        scaled = {name: factor * getattr(BALANCE, name) for name in names}
        run = dataclasses.replace(RUN, model=MOE, balance=configs.Balance(**scaled))
        _, metrics = jax.jit(step.make_train_step(run, TX))(initial(MOE), batch)
        norms.append(metrics.gradient_norm)
    assert norms[0] > 1e-3
    np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-5)


def test_padding_reaches_neither_loss_nor_balance():
    lengths = (16, 10, 0, 16, 0, 16, 1, 16)
    batch = batch_of(0, lengths)
    state, metrics = train_step(MOE)(initial(MOE), batch)
    other = batch_of(1)
    is_pad = batch.segment_ids_BT == 0
    changed = batch.replace(
        tokens_BT=jnp.where(is_pad, other.tokens_BT, batch.tokens_BT),
        targets_BT=jnp.where(is_pad, other.targets_BT, batch.targets_BT),
    )
    state_changed, metrics_changed = train_step(MOE)(initial(MOE), changed)
    np.testing.assert_allclose(metrics.loss, metrics_changed.loss, rtol=1e-6)
    balance, balance_changed = (m.terms["load_balancing_loss"] for m in (metrics, metrics_changed))
    np.testing.assert_allclose(balance, balance_changed, rtol=1e-6)
    assert metrics.tokens_per_expert_LE.sum() == 2 * 2 * sum(lengths)
    # Padding changes which rows share a block, and so the order of float32 sums.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, state_changed.params
    )


def test_a_batch_of_padding_alone_changes_nothing_but_by_weight_decay():
    _, metrics = train_step(MOE)(initial(MOE), batch_of(0, (0,) * B))
    assert metrics.loss == 0
    assert not metrics.skipped
    assert np.isfinite(metrics.gradient_norm)


def test_merged_experts_have_no_balance_loss():
    """Nothing is chosen between them: neither a term of the loss nor a number to report."""
    merged = dataclasses.replace(MOE, dispatch="merge", merge_segment_length=8)
    for config, terms in ((MOE, {"load_balancing_loss", "router_z_loss"}), (merged, set())):
        run = dataclasses.replace(RUN, model=config)
        one_step = step.make_train_step(run, TX)
        _, metrics = jax.eval_shape(one_step, initial(MOE), batch_of(0))
        assert set(metrics.terms) == terms


def test_a_skipped_step_does_not_move_the_schedule_and_each_step_says_its_rate():
    """Parameters after an update, a skipped step and another are those without the skipped one."""
    batches = [batch_of(0), batch_of(1).replace(weights_BT=jnp.full((B, T), jnp.nan)), batch_of(2)]
    one_step, skipping, others = train_step(DENSE), initial(DENSE), initial(DENSE)
    rates = []
    for batch in batches:
        skipping, metrics = one_step(skipping, batch)
        rates.append(metrics.learning_rate)
    for batch in batches[::2]:
        others, metrics = one_step(others, batch)
    jax.tree.map(np.testing.assert_array_equal, skipping.params, others.params)
    schedule = optimizer.schedule(RUN.optimizer, 10)
    np.testing.assert_allclose(rates, [schedule(0), schedule(1), schedule(1)], rtol=1e-6)
    assert schedule(1) != schedule(2) and metrics.learning_rate == rates[-1]


def test_a_step_that_is_not_finite_leaves_parameters_and_moments_bitwise():
    state = initial(MOE)
    gate = state.params["blocks"]["0"]["moe"]["experts"]["gate"]
    # A single weight of one expert.
    state.params["blocks"]["0"]["moe"]["experts"]["gate"] = gate.at[1, 2, 0, 0].set(jnp.nan)
    after, metrics = train_step(MOE)(state, batch_of(0))
    state.params["blocks"]["0"]["moe"]["experts"]["gate"] = gate
    assert metrics.skipped
    assert after.step == state.step + 1
    after.params["blocks"]["0"]["moe"]["experts"]["gate"] = (
        after.params["blocks"]["0"]["moe"]["experts"]["gate"].at[1, 2, 0, 0].set(gate[1, 2, 0, 0])
    )
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_an_update_that_is_not_finite_is_said_though_loss_and_gradient_are():
    """Adam with beta1=1 divides by zero; the config refuses it, and another optimizer may too."""
    tx = optax.chain(optax.adam(1e-3, b1=1.0), optax.scale_by_schedule(lambda count: 1.0))
    state = initial(MOE)
    state = TrainState.create(state.params, tx, state.router_state)
    run = dataclasses.replace(RUN, model=MOE)
    after, metrics = jax.jit(step.make_train_step(run, tx))(state, batch_of(0))
    assert metrics.diverged and not metrics.skipped
    assert not np.isfinite(after.params["embed"]["tokens"]).all()
    _, metrics = train_step(MOE)(initial(MOE), batch_of(0))
    assert not metrics.diverged
