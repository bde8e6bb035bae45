"""LoRA: the base at first, merged as unmerged, only the pairs trained, and few products more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model, tree
from moe_jax.config import sections
from moe_jax.data.batches import Batch
from moe_jax.dryrun import hlo
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import lora, optimizer, step
from moe_jax.training.state import TrainState

DENSE = model.ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    remat="none",
)
MOE = DENSE.to_moe(num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8)
BAM = dataclasses.replace(MOE, num_attention_experts=2)
PAIRS = sections.Lora(rank=2, alpha=6.0)
ONLY_PAIRS = "^(?!.*lora)"
tokens_BT = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)


@functools.cache
def base(config):
    return jax.jit(functools.partial(model.init, config))(jax.random.key(0))


def with_random_b(params):
    """A run's parameters after some training: no B is zero any more."""
    key = jax.random.key(7)
    return tree.map_with_name(
        lambda n, x: (
            0.1 * jax.random.normal(tree.fold_in(key, n), x.shape) if n.endswith("lora_b") else x
        ),
        params,
    )


def logits(params, config):
    return jax.jit(functools.partial(model.apply, config=config))(params, tokens_BT).logits_BTV


def test_rank_0_is_the_base_bitwise_and_so_is_a_pair_before_its_first_step():
    assert lora.added(base(MOE), sections.Lora(), jax.random.key(0)) is base(MOE)
    fresh = lora.added(base(MOE), PAIRS, jax.random.key(0))
    assert len(jax.tree.leaves(fresh)) == len(jax.tree.leaves(base(MOE))) + 2 * (4 + 3 + 3)
    np.testing.assert_array_equal(logits(lora.scaled(fresh, PAIRS), MOE), logits(base(MOE), MOE))


CAPACITY = dataclasses.replace(MOE, dispatch="capacity", capacity_factor=4.0)


@pytest.mark.parametrize(
    "config",
    [MOE, *(pytest.param(config, marks=pytest.mark.long) for config in (DENSE, BAM, CAPACITY))],
    ids=["moe", "dense", "bam", "capacity"],
)
def test_merged_equals_unmerged(config):
    trained = with_random_b(lora.added(base(config), PAIRS, jax.random.key(0)))
    merged = lora.merged(trained, PAIRS)
    assert jax.tree.structure(merged) == jax.tree.structure(base(config))
    unmerged = logits(lora.scaled(trained, PAIRS), config)
    np.testing.assert_allclose(logits(merged, config), unmerged, atol=1e-5)
    assert np.abs(unmerged - logits(base(config), config)).max() > 1e-3


def run_of(config, pairs=PAIRS, frozen=ONLY_PAIRS, **training):
    section = configs.Optimizer(learning_rate=1e-2, frozen=frozen)
    training = configs.Training(num_steps=10, **training)
    return configs.Run(model=config, optimizer=section, lora=pairs, training=training)


def started(run, params):
    tx = optimizer.adamw(run.optimizer, run.training.num_steps)
    params = lora.added(params, run.lora, jax.random.key(0))
    return TrainState.create(params, tx), jax.jit(step.make_train_step(run, tx))


def batch_of(seed):
    return Batch.of_rows(jax.random.randint(jax.random.key(seed), (8, 17), 0, 64))


@pytest.mark.long
def test_the_pairs_gradients_are_those_of_the_merged_model():
    """A twin: differentiated through W + A B, whose own gradient is a whole matrix."""
    params = with_random_b(lora.added(base(MOE), PAIRS, jax.random.key(0)))
    pairs, others = optimizer.split(params, ONLY_PAIRS)

    def loss_of(whole):
        def loss(pairs):
            logits_BTV = model.apply(whole(pairs), tokens_BT, MOE).logits_BTV
            return jnp.sum(jnp.sin(jnp.arange(64.0)) * jax.nn.log_softmax(logits_BTV))

        return jax.jit(jax.grad(loss))(pairs)

    unmerged = loss_of(lambda p: lora.scaled(optimizer.joined(p, others), PAIRS))
    merged = loss_of(lambda p: lora.merged(optimizer.joined(p, others), PAIRS))
    for a, b in zip(*map(jax.tree.leaves, (unmerged, merged)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_a_step_changes_the_pairs_alone_and_keeps_moments_of_them_alone():
    run = run_of(MOE, accumulation_steps=2)
    state, one_step = started(run, base(MOE))
    before, losses = jax.device_get(state.params), []
    for _ in range(4):
        state, measures = one_step(state, batch_of(0))
        losses.append(float(measures.loss))
    assert losses[-1] < losses[0] - 0.01
    for name, leaf in tree.flatten(before).items():
        after = np.asarray(tree.flatten(state.params)[name])
        assert ("lora" in name) != (leaf.tobytes() == after.tobytes()), name
    matrices = [n for n in tree.flatten(state.params) if "lora" in n]
    moments = [n for n in tree.flatten(state.opt_state) if "mu/" in n]
    assert [n.partition("mu/")[2] for n in moments] == matrices


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ((1, 2, 2, 2), "all_to_all"),
        *(
            pytest.param(sizes, mode, marks=pytest.mark.long)
            for sizes, mode in [((1, 8, 1, 1), "fsdp"), ((1, 2, 2, 1, 2), "ring")]
        ),
    ],
    ids=str,
)
def test_eight_devices_train_the_pairs_as_one_does(sizes, mode):
    run = run_of(dataclasses.replace(MOE, expert_parallel=mode))
    state, one_step = started(run, base(MOE))
    alone = jax.device_get(one_step(state, batch_of(1))[0].params)
    mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
    shardings = sharding.shardings(state, mesh)
    with jax.set_mesh(mesh):
        tx = optimizer.adamw(run.optimizer, 10)
        on_mesh = jax.jit(step.make_train_step(run, tx), out_shardings=(shardings, None))
        together = on_mesh(jax.device_put(state, shardings), batch_of(1))[0].params
        merged = lora.merging(PAIRS, mesh)(together)
    for name, leaf in tree.flatten(alone).items():
        np.testing.assert_allclose(tree.flatten(together)[name], leaf, atol=2e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), merged, lora.merged(alone, PAIRS)
    )


def test_a_layer_of_64_experts_executes_no_product_that_is_not_due():
    """Due are x W and its gradient of x, and three products with each matrix of a pair; a matrix's
    own gradient is a third of a step in which it is trained. The first layer needs no gradient of
    its attention's input."""
    T, D, F, A, r = 32, 32, 24, 8, 4
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "remat": "none"}
    config = dataclasses.replace(DENSE, num_key_value_heads=4, **sizes)
    config = config.to_moe(num_experts=64, num_experts_per_tok=A)

    def executed(run):
        tx = optimizer.adamw(run.optimizer, 10)
        key = jax.random.key(0)
        state = jax.eval_shape(
            lambda: TrainState.create(lora.added(model.init(config, key), run.lora, key), tx)
        )
        lowered = jax.jit(step.make_train_step(run, tx)).lower(
            state, Batch.of_shape((2, T), jax.ShapeDtypeStruct)
        )
        return hlo.product_flops(lowered.compile().as_text()) / (2 * T)

    matrices, others = 4 * D * D + A * 3 * D * F, 64 * D + 64 * D  # router and head
    pairs, first = r * (8 * D + A * 3 * (D + F)), 3 * D * D + 3 * r * D
    trained = executed(run_of(config, sections.Lora(), frozen=""))
    attention = trained - 6 * (matrices + others)
    due = 4 * (matrices + others) + 6 * pairs + attention - 2 * first
    assert due <= executed(run_of(config, sections.Lora(rank=r))) <= 1.001 * due
    assert 1.1 * due < trained


def test_targets_without_a_matrix_and_pairs_beside_trained_matrices_are_refused():
    with pytest.raises(ValueError, match="lora.targets: 'atention/wq' .* mean attention/wq"):
        lora.added(base(MOE), sections.Lora(rank=1, targets="atention/wq"), jax.random.key(0))
    with pytest.raises(configs.ConfigError, match="set optimizer.frozen='.*lora.*', or lora.rank"):
        run_of(MOE, frozen="")
