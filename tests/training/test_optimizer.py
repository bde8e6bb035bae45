"""Schedules at points known by hand, what decays, what is clipped, rules of paths, OMoE."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import tree
from moe_jax.config.sections import Optimizer
from moe_jax.training import optimizer


def settings(**changes):
    return Optimizer(learning_rate=1.0, final_learning_rate_ratio=0.1, **changes)


def rates(section, num_steps):
    schedule = optimizer.schedule(section, num_steps)
    return np.array([float(schedule(step)) for step in range(num_steps + 1)])


def test_cosine_rises_linearly_and_falls_along_a_half_cosine():
    rate = rates(settings(schedule="cosine", warmup_steps=4), 14)
    np.testing.assert_allclose(rate[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    along = np.arange(11) / 10
    np.testing.assert_allclose(rate[4:], 0.1 + 0.9 * (1 + np.cos(np.pi * along)) / 2, rtol=1e-5)


def test_wsd_is_constant_until_a_linear_decay():
    rate = rates(settings(schedule="wsd", warmup_steps=2, decay_steps=5), 12)
    np.testing.assert_allclose(rate[:2], [0.5, 1.0])
    np.testing.assert_allclose(rate[2:8], 1.0)
    np.testing.assert_allclose(rate[7:], np.linspace(1.0, 0.1, 6), rtol=1e-6)


def test_a_warmup_starts_from_the_ratio_that_is_given():
    rate = rates(settings(warmup_steps=4, initial_learning_rate_ratio=0.1), 14)
    np.testing.assert_allclose(rate[:5], [0.1, 0.4, 0.7, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak_rate(name):
    assert rates(settings(schedule=name, warmup_steps=0, decay_steps=0), 3)[0] == 1.0


def test_weight_decay_leaves_norm_scales_alone():
    params = {"wq": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    tx = optimizer.adamw(settings(weight_decay=0.5, warmup_steps=0), 10)
    zero = {"wq": jnp.zeros(2), "norm": {"scale": jnp.zeros(2)}}
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["wq"], -0.5)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam is blind to a constant scale, so the clip is seen in its first moment."""
    tx = optimizer.adamw(settings(gradient_clip_norm=1.0), 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, state = tx.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, tx.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moment["a"] / 0.1, 0.6, rtol=1e-5)
    np.testing.assert_allclose(moment["b"] / 0.1, 0.8, rtol=1e-5)


def tree_of(embed, up, bias=1.0):
    """Parameters of an embedding, a router's bias and the experts of one layer."""
    experts = {"up": jnp.broadcast_to(jnp.asarray(up, jnp.float32), (1, 2, 2, 3))}
    moe = {"router": {"bias": jnp.full((1, 2), bias)}, "experts": experts}
    return {"embed": {"tokens": jnp.full((2, 2), embed)}, "blocks": {"0": {"moe": moe}}}


def values(tree):
    """One number of the embedding, of the experts and of the bias."""
    moe = tree["blocks"]["0"]["moe"]
    return tree["embed"]["tokens"][0, 0], moe["experts"]["up"][0, 0, 0, 0], moe["router"]["bias"][0]


def first_update(section, gradients):
    tx = optimizer.adamw(section, 10)
    return tx.update(gradients, tx.init(tree_of(1.0, 1.0)), tree_of(1.0, 1.0))


RULES = (("experts/up", 0.5), ("moe", 7.0), (r"^embed/", 0.25))


def test_gradient_factors_come_before_the_clip_and_the_first_rule_decides():
    section = settings(gradient_factors=RULES, gradient_clip_norm=1.0)
    _, state = first_update(section, tree_of(8.0, 0.0, 0.0))
    np.testing.assert_allclose(values(optax.tree.get(state, "mu"))[0], 0.1 / 2, rtol=1e-5)
    section = dataclasses.replace(section, gradient_clip_norm=1e9)
    _, state = first_update(section, tree_of(8.0, 6.0, 0.0))
    np.testing.assert_allclose(values(optax.tree.get(state, "mu"))[:2], [0.2, 0.3], rtol=1e-5)


def test_weight_decay_factors_leave_a_balancing_bias_and_what_does_not_decay_alone():
    section = settings(weight_decay=0.4, weight_decay_factors=RULES, no_weight_decay="embed")
    updates, _ = first_update(section, tree_of(0.0, 0.0, 0.0))
    embed, up, bias = values(updates)
    np.testing.assert_allclose([embed, up, *bias], [0, -0.2, 0, 0], rtol=1e-6)


def test_learning_rate_factors_multiply_the_whole_update():
    plain = settings(weight_decay=0.4, no_weight_decay="")
    ruled = settings(weight_decay=0.4, no_weight_decay="", learning_rate_factors=RULES)
    (one, _), (other, _) = (first_update(s, tree_of(1.0, 1.0, 0.0)) for s in (plain, ruled))
    ratio = np.array(values(other)[:2]) / np.array(values(one)[:2])
    np.testing.assert_allclose(ratio, [0.25, 0.5], rtol=1e-6)


def test_frozen_parameters_have_no_moments_no_decay_and_no_part_in_the_norm():
    section = settings(frozen="^(?!.*experts)", weight_decay=0.5, no_weight_decay="")
    updates, state = first_update(section, tree_of(100.0, 1.0, 100.0))
    assert list(tree.flatten(updates)) == ["blocks/0/moe/experts/up"]
    # 12 gradients of 1 are clipped to a norm of 1.
    (moment,) = jax.tree.leaves(optax.tree.get(state, "mu"))
    np.testing.assert_allclose(moment, 0.1 / np.sqrt(12), rtol=1e-5)


@pytest.mark.parametrize("frozen", ["", ".", "experts", "^(?!.*experts)"])
def test_the_parts_of_a_tree_are_joined_to_the_tree(frozen):
    whole = tree_of(1.0, 2.0)
    parts = optimizer.split(whole, frozen)
    assert not tree.flatten(parts[0]).keys() & tree.flatten(parts[1]).keys()
    together = optimizer.joined(*parts)
    assert jax.tree.structure(together) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, together, whole)


def test_without_rules_the_state_has_the_paths_of_earlier_checkpoints():
    tx = optimizer.adamw(settings(), 10)
    state = tx.init({"a": jnp.zeros(1)})
    names = [tree.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == ["1/0/count", "1/0/mu/a", "1/0/nu/a", "1/2/count"]


@pytest.mark.parametrize("key", [*optimizer.FACTORS, "frozen", "no_weight_decay"])
def test_a_pattern_without_a_parameter_is_refused(key):
    section = settings(
        **{key: (("embed", 1), ("expert/up", 2)) if key in optimizer.FACTORS else "expert/up"}
    )
    with pytest.raises(
        ValueError, match=f"{key}: 'expert/up' matches no parameter; did you mean experts/up"
    ):
        optimizer.check_paths(section, tree_of(1.0, 1.0))
    section = settings(
        **{key: (("embed", 1), ("experts/up", 2)) if key in optimizer.FACTORS else "experts/up"}
    )
    optimizer.check_paths(section, tree_of(1.0, 1.0))


def test_an_orthogonal_part_is_orthogonal_to_the_other_experts_and_loses_no_more():
    update, weight = np.array(jax.random.normal(jax.random.key(0), (2, 5, 8, 16)))
    weight[4] = weight[3] = weight[2]  # as upcycling makes them: the Gram matrix is singular
    part = np.asarray(optimizer.orthogonal_part(update, weight), np.float64)
    for e in range(5):
        others = np.delete(weight, e, axis=0).reshape(4, -1).astype(np.float64)
        along = others @ part[e].ravel()
        sizes = np.linalg.norm(others, axis=1) * np.linalg.norm(update[e])
        assert np.abs(along / sizes).max() < 1e-5
        shares = np.linalg.lstsq(others.T, update[e].ravel(), rcond=1e-6)[0]
        np.testing.assert_allclose(part[e].ravel(), update[e].ravel() - shares @ others, atol=1e-4)


@pytest.mark.parametrize("number_of_parents", [1, 2, 8])
@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5])
def test_nothing_passes_along_small_differences_of_experts_that_are_alike(
    number_of_parents, relative
):
    """Against float64, for updates along the difference of two others, and any update.

    With a Gram matrix of the weights themselves all of the former passes at 1e-3.
    """
    draw = np.random.default_rng(0).normal
    E, N = 8, 32 * 48
    parents = np.repeat(draw(size=(number_of_parents, N)), E // number_of_parents, axis=0)
    weight = (parents + relative * draw(size=(E, N))).astype(np.float32)
    others = [np.delete(weight.astype(np.float64), e, axis=0) for e in range(E)]
    along = np.stack([own[2] - own[3] for own in others])
    for update in (along, draw(size=(E, N))):
        update /= np.linalg.norm(update, axis=1, keepdims=True)
        part = optimizer.orthogonal_part(update.astype(np.float32), weight)
        bases = [np.linalg.qr(own.T)[0] for own in others]
        want = [u - q @ (q.T @ u) for u, q in zip(update, bases, strict=True)]
        assert np.linalg.norm(part - np.stack(want), axis=1).max() < 1e-4


def test_a_single_expert_is_left_alone():
    update, weight = jax.random.normal(jax.random.key(0), (2, 1, 8, 16))
    np.testing.assert_array_equal(optimizer.orthogonal_part(update, weight), update)


def test_phases_of_plain_and_orthogonal_updates_alternate_for_experts_alone():
    tx = optimizer.orthogonal_experts(2)
    params = tree_of(1.0, [[[1, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]])
    state, seen = tx.init(params), []
    one_step = jax.jit(tx.update)
    for _ in range(6):
        updates, state = one_step(tree_of(3.0, 5.0), state, params)
        seen.append(np.asarray(updates["blocks"]["0"]["moe"]["experts"]["up"][0]))
        assert values(updates)[0] == 3.0
    plain, part = np.full((2, 2, 3), 5.0), np.full((2, 2, 3), 5.0)
    part[0, 0, 1] = part[1, 0, 0] = 0
    np.testing.assert_allclose(seen, [plain, plain, part, part, plain, plain], atol=1e-6)
