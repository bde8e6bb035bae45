"""AdamW in optax, with the papers' schedules, rules per parameter path, and OMoE."""

import functools
import itertools
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from moe_jax import spelling, tree
from moe_jax.config.sections import Optimizer


def schedule(optimizer: Optimizer, num_steps: int) -> optax.Schedule:
    """Linear warmup, then "cosine" to the final rate, or "wsd": constant, then a linear decay.

    It counts the updates of this run only, so an upcycled model whose parent ended at a low rate is
    warmed up to the peak again. A step whose loss or gradient is not finite is skipped: it makes no
    update and does not advance the schedule, which therefore ends short of its final rate by as
    many updates.
    """
    peak = optimizer.learning_rate
    final = peak * optimizer.final_learning_rate_ratio
    after_warmup = num_steps - optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        ratio = optimizer.final_learning_rate_ratio
        shape = optax.cosine_decay_schedule(peak, max(after_warmup, 1), alpha=ratio)
    else:
        decay = optax.linear_schedule(peak, final, max(optimizer.decay_steps, 1))
        shape = optax.join_schedules(
            [optax.constant_schedule(peak), decay], [after_warmup - optimizer.decay_steps]
        )
    # By default the warmup starts at peak / warmup_steps, so that no step has a rate of zero.
    first = peak * optimizer.initial_learning_rate_ratio or peak / max(optimizer.warmup_steps, 1)
    warmup = optax.linear_schedule(first, peak, max(optimizer.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, shape], [optimizer.warmup_steps])


def learning_rate(
    optimizer: Optimizer, num_steps: int, opt_state: optax.OptState
) -> jax.Array | float:
    """The learning rate of the next update, given the state of `adamw`."""

    def counts_updates(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    counters = filter(counts_updates, jax.tree.leaves(opt_state, is_leaf=counts_updates))
    return schedule(optimizer, num_steps)(next(counters).count)


def adamw(optimizer: Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW, with the factors that the config's rules give each path.

    A rule is (regular expression of parameter paths, factor); the first that matches decides, and
    the factor is 1 if none does. Gradient factors apply before clipping (Artetxe et al., arXiv
    2112.10684, divide the experts' gradients by the square root of the number of devices that the
    experts are sharded over), weight-decay factors inside AdamW, and learning-rate factors after
    it, weight decay included. Paths of `no_weight_decay` do not decay. Nor does a router's
    selection bias, which gets no gradient and is updated by `training/balance.py`. Parameters on
    `frozen` paths have no moments and do not count in the norm (MoE-CT, arXiv 2407.00875, trains
    only the experts): gradients and updates are those of `split`'s first part.
    """
    undecayed = ((optimizer.no_weight_decay or NOTHING, 0.0), (r"moe/router/bias$", 0.0))
    gradient = optax.chain(
        _scaled(optimizer.gradient_factors), _clipped(optimizer.gradient_clip_norm)
    )
    adam = optax.chain(
        optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.epsilon),
        _decayed(optimizer.weight_decay, (*undecayed, *optimizer.weight_decay_factors)),
        optax.scale_by_learning_rate(schedule(optimizer, num_steps)),
    )
    rate, orthogonal = optimizer.learning_rate_factors, optimizer.orthogonal_every
    whole = optax.chain(gradient, adam, optax.chain(_scaled(rate), orthogonal_experts(orthogonal)))

    def trained(params):
        return split(params, optimizer.frozen)[0]

    return optax.GradientTransformation(
        lambda params: whole.init(trained(params)),
        lambda grads, state, params: whole.update(trained(grads), state, trained(params)),
    )


NOTHING = r"(?!)"  # matches no path
FACTORS = ("gradient_factors", "weight_decay_factors", "learning_rate_factors")
Rules = Iterable[tuple[str, float]]


def check_paths(optimizer: Optimizer, params: dict) -> None:
    """Raises: ValueError for a pattern of the config that matches no path of `params`."""
    names = list(tree.flatten(params))
    patterns = [(key, pattern) for key in FACTORS for pattern, _ in getattr(optimizer, key)]
    single = ((key, getattr(optimizer, key)) for key in ("frozen", "no_weight_decay"))
    default = Optimizer()
    patterns += [
        (key, pattern) for key, pattern in single if pattern not in ("", getattr(default, key))
    ]
    for key, pattern in patterns:
        check_pattern(f"optimizer.{key}", pattern, names)


def check_pattern(key: str, pattern: str, names: Sequence[str]) -> None:
    """Raises: ValueError, with the nearest part of a path, if a key's pattern matches no name."""
    if any(re.search(pattern, name) for name in names):
        return
    parts = {
        "/".join(words[i:j])
        for words in (name.split("/") for name in names)
        for i, j in itertools.combinations(range(len(words) + 1), 2)
    }
    meant = spelling.did_you_mean(pattern, sorted(parts))
    raise ValueError(
        f"{key}: {pattern!r} matches no parameter{meant}; paths are like {names[-1]!r}"
    )


def split(params: dict, frozen: str) -> tuple[dict, dict]:
    """The trained and the frozen part of a tree of parameters; `joined` is the inverse.

    A step differentiates and updates the first part only, so the second has no gradient in memory,
    and its values are the same bits after any number of steps.
    """
    if not frozen:
        return params, {}
    parts: tuple[dict, dict] = ({}, {})
    for name, leaf in tree.flatten(params).items():
        parts[bool(re.search(frozen, name))][name] = leaf
    return tree.unflatten(parts[0]), tree.unflatten(parts[1])


def joined(trained: dict, frozen: dict) -> dict:
    """One tree from the parts of `split`."""
    return tree.unflatten(tree.flatten(trained) | tree.flatten(frozen)) if frozen else trained


def orthogonal_experts(every: int) -> optax.GradientTransformation:
    """OMoE (Liu et al., arXiv 2310.09762): experts that move away from each other in weight space.

    The first `every` updates pass unchanged. In the next `every`, each expert's update of a matrix
    is replaced by its part orthogonal to the other experts' weights in that matrix; then the two
    phases alternate. 0 turns it off. The paper projects by the average of the others' accumulated
    projectors (orthogonal weight modification) instead of by their weights' span.
    """
    if not every:
        return optax.identity()

    def part(name, update, weight):
        if "moe/experts/" not in name:
            return update
        # Layer by layer, to save memory: a layer's differences are 2E vectors in float32.
        return jax.lax.map(lambda layer: orthogonal_part(*layer), (update, weight))

    def project(updates, params):
        return tree.map_with_name(part, updates, params)

    def update(updates, state, params):
        updates = jax.lax.cond(
            (state.count // every) % 2 == 1, project, lambda updates, _: updates, updates, params
        )
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def orthogonal_part(update: jax.Array, weight: jax.Array) -> jax.Array:
    """Each expert's update less its projection onto the span of the other experts' weights.

    Both are [E, ...]. The projection is V^T (V V^T)^+ V u, where the rows of V span that space:
    they are differences between similar experts, scaled to length one. After upcycling, experts
    are nearly equal: all of them, or the copies of each parent or shard. A Gram matrix of the
    weights themselves would lose to rounding the small differences that training makes, which are
    the very directions to stay orthogonal to. The inverse is a pseudo-inverse because exact
    copies have a difference of zero.
    """
    E = weight.shape[0]
    u_EN, w_EN = (x.reshape(E, -1).astype(jnp.float32) for x in (update, weight))
    dot = functools.partial(jnp.matmul, precision="highest")
    v_VN, row_EE = _differences(w_EN)
    v_VN /= jnp.maximum(jnp.linalg.norm(v_VN, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    gram_VV, product_EV = dot(v_VN, v_VN.T), dot(u_EN, v_VN.T)
    is_other_EE = 1 - jnp.eye(E)
    gram_EEE = gram_VV[row_EE[:, :, None], row_EE[:, None]]
    gram_EEE *= is_other_EE[:, :, None] * is_other_EE[:, None]
    product_EE = jnp.take_along_axis(product_EV, row_EE, axis=1) * is_other_EE
    value_EE, vector_EEE = jnp.linalg.eigh(gram_EEE)
    # Directions with smaller eigenvalues are rounding errors of the Gram matrix.
    kept_EE = value_EE > E * jnp.finfo(jnp.float32).eps * value_EE[:, -1:]
    inverse_EE = kept_EE / jnp.where(kept_EE, value_EE, 1)
    along_EE = jnp.einsum("ekj,ek->ej", vector_EEE, product_EE, precision="highest")
    share_EE = jnp.einsum("ekj,ej->ek", vector_EEE, along_EE * inverse_EE, precision="highest")
    share_EV = jnp.zeros_like(product_EV).at[jnp.arange(E)[:, None], row_EE].add(share_EE)
    return (u_EN - dot(share_EV, v_VN)).reshape(update.shape).astype(update.dtype)


def _differences(w_EN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [2E, N], and for each expert the indices [E, E] of those that span the other experts.

    The index in an expert's own column is not used.

    An expert's first vector is its difference from the nearest expert before it, which has no
    rounding error if the two are similar. Its second vector is the difference from the second
    nearest one before it, and replaces the first when the nearest is the expert left out. If there
    is no such expert, the vector is the expert's weights.
    """
    E = len(w_EN)
    apart_EN = w_EN - jnp.mean(w_EN, axis=0)
    gram_EE = jnp.matmul(apart_EN, apart_EN.T, precision="highest")
    square_E = jnp.diagonal(gram_EE)
    is_before_EE = jnp.tri(E, k=-1, dtype=bool)
    distance_EE = jnp.where(is_before_EE, square_E[:, None] + square_E - 2 * gram_EE, jnp.inf)
    nearest_E = jnp.argmin(distance_EE, axis=1)
    second_E = jnp.argmin(jnp.where(jnp.eye(E)[nearest_E], jnp.inf, distance_EE), axis=1)

    def apart_from(other_E, number_before):
        has_other_E1 = (jnp.arange(E) >= number_before)[:, None]
        return w_EN - jnp.where(has_other_E1, w_EN[other_E], 0)

    v_VN = jnp.concatenate([apart_from(nearest_E, 1), apart_from(second_E, 2)])
    left_out_E1 = jnp.arange(E)[:, None]
    return v_VN, jnp.where(nearest_E == left_out_E1, jnp.arange(E) + E, jnp.arange(E))


def _clipped(most: float) -> optax.GradientTransformation:
    """Scales all gradients so that their global norm is at most `most`.

    It is `optax.clip_by_global_norm`, but with one factor that is multiplied where the gradients
    are used. Optax's quotients are separate arrays: the update of 25 million parameters
    on a CPU takes 112 ms with them, 72 ms without.
    """

    def clip(updates, _):
        factor = jnp.minimum(1, most / optax.tree.norm(updates))
        return jax.tree.map(lambda update: (factor * update).astype(update.dtype), updates)

    return optax.stateless(clip)


def _scaled(rules: Rules) -> optax.GradientTransformation:
    def scale(name, update):
        factor = _factor(name, rules)
        return update if factor == 1 else factor * update

    return optax.stateless(lambda updates, _: tree.map_with_name(scale, updates))


def _decayed(weight_decay: float, rules: Rules) -> optax.GradientTransformation:
    def decay(name, update, param):
        factor = weight_decay * _factor(name, rules)
        return update + factor * param if factor else update

    return optax.stateless(lambda updates, params: tree.map_with_name(decay, updates, params))


def _factor(name: str, rules: Rules) -> float:
    return next((factor for pattern, factor in rules if re.search(pattern, name)), 1.0)
