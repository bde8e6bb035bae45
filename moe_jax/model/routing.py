"""Routing is data: the experts and weights of each token, and the statistics of a batch."""

import dataclasses
import fractions

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops import bins


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The routing decision for M tokens. `weight` multiplies the output of the chosen expert.

    An `expert_index` of E marks an unused slot. `load_ME`, if a router has it, is the probability
    that an expert is chosen: a differentiable estimate of its token count.
    """

    expert_index_MA: jax.Array
    weight_MA: jax.Array
    logits_ME: jax.Array
    probabilities_ME: jax.Array
    load_ME: jax.Array | None = None

    def reshaped(self, *shape: int) -> "Routing":
        """The same with other axes instead of M."""
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), self)


def router_logits(x_MD: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    """x · kernel [M, E] in float32 at highest precision, which holds for its gradients too.

    Otherwise a TPU would multiply in bfloat16 and a GPU in TF32, and the rounding would decide
    close calls between experts.
    """
    float32 = jnp.float32
    return jnp.matmul(x_MD.astype(float32), kernel_DE.astype(float32), precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over the tokens of a batch shard or, by `Counted.by_row`, of a row without its padding.

    In `model.Output` every field has two leading axes: sparse layers (in the model's order) and
    batch shards. The shards are kept apart so that a balance loss can be computed either per device
    or over the global batch. `routing`, if requested, has the leading axes sparse layers, batch,
    time.
    """

    tokens_per_expert_E: jax.Array  # assignments, all A slots together
    probability_sum_E: jax.Array
    weight_sum_E: jax.Array
    load_sum_E: jax.Array  # sum of `Routing.load_ME`; without one, the assignments
    z_sum: jax.Array  # sum of logsumexp(logits)^2
    entropy_sum: jax.Array  # summed entropy of the probabilities, in nats
    num_tokens: jax.Array
    num_dropped: jax.Array  # assignments beyond an expert's capacity; 0 when dropless
    shortfall_EH: jax.Array | None = None  # histogram: see `shortfall_histogram`
    routing: Routing | None = None


@dataclasses.dataclass(frozen=True)
class Counted:
    """Selects the statistics of a training step; by default they are the sums of a batch shard.

    by_row: the sums are those of each row instead. `num_dropped` and `shortfall_EH`, which no
      loss reads, keep one entry for each batch shard.
    shortfalls: `RouterStats.shortfall_EH` is there.
    """

    by_row: bool = False
    shortfalls: bool = False


BY_SHARD = Counted()


@dataclasses.dataclass(frozen=True)
class Groups:
    """Consecutive groups of equally many tokens; those of a group compete for the experts' slots.

    In training all tokens of a device are one group, as in GShard (arXiv 2006.16668) and DeepSpeed.
    In evaluation each row is a group, so that no loss depends on the other rows of a batch.

    key: for the random order in which a full expert keeps tokens; None keeps the earlier ones.
    """

    valid_M: jax.Array
    number: int = 1
    key: jax.Array | None = None

    def slots(self, per_token: int, *sizes) -> tuple[int, jax.Array]:
        """An expert's number of slots for a group without padding, and for each actual group.

        `sizes` are the last three arguments of `capacity`.
        """
        valid_GM = self.valid_M.reshape(self.number, -1)
        tokens_G = jnp.sum(valid_GM, axis=1)
        return capacity(valid_GM.shape[1] * per_token, *sizes), capacity(
            tokens_G * per_token, *sizes
        )


def capacity(num_assignments, num_experts: int, factor: float, minimum: int):
    """An expert's number of slots: its even share of the assignments times the factor, rounded up.

    The arithmetic is exact: the factor is replaced by the nearest fraction with a denominator of at
    most 1000, because no float equals 11/10. The number of assignments may be an array.
    """
    p, q = fractions.Fraction(factor).limit_denominator(1000).as_integer_ratio()
    # Dividing step by step keeps every product, except the one in the slots themselves, at or below
    # max(1000, num_experts) · p, with p about 1000 times the factor at most, which fits in int32.
    even, over = divmod(num_assignments, num_experts)
    whole, part = divmod(even, q)
    slots = whole * p - (-(part * p - (-over * p // num_experts)) // q)
    return slots + (minimum - slots) * (slots < minimum)


def virtual_drop_rate(tokens_per_expert_E: jax.Array | np.ndarray, factor: float):
    """The fraction of assignments that a capacity would have dropped in a run that drops none.

    It is sum_e max(0, load_e - C) / sum_e load_e with C = ceil(factor · sum_e load_e / E), and
    drives Skywork-MoE's balance coefficients (Wei et al., arXiv 2406.06563). Leading axes are kept;
    numpy and JAX arrays are accepted.
    """
    total = tokens_per_expert_E.sum(axis=-1, keepdims=True)
    C = capacity(total, tokens_per_expert_E.shape[-1], factor, 0)
    beyond = (tokens_per_expert_E - C).clip(min=0).sum(axis=-1)
    return beyond / total[..., 0].clip(min=1)


def statistics(
    routing: Routing, valid_M: jax.Array, num_dropped: jax.Array | int = 0
) -> RouterStats:
    """Sums over the tokens where `valid_M` holds."""
    E = routing.logits_ME.shape[-1]
    counted_MA = jnp.where(valid_M[:, None], routing.expert_index_MA, E)
    tokens_per_expert_E = bins.count_by_bin(counted_MA, E)
    load_sum_E = tokens_per_expert_E.astype(jnp.float32)
    if routing.load_ME is not None:
        load_sum_E = jnp.sum(routing.load_ME * valid_M[:, None], axis=0)
    z_M = jax.nn.logsumexp(routing.logits_ME, axis=-1) ** 2
    p_ME = routing.probabilities_ME
    entropy_M = -jnp.sum(p_ME * jnp.log(jnp.maximum(p_ME, jnp.finfo(p_ME.dtype).tiny)), axis=-1)
    return RouterStats(
        tokens_per_expert_E=tokens_per_expert_E,
        probability_sum_E=jnp.sum(p_ME * valid_M[:, None], axis=0),
        weight_sum_E=bins.sum_by_bin(routing.weight_MA, counted_MA, E),
        load_sum_E=load_sum_E,
        z_sum=jnp.sum(z_M * valid_M),
        entropy_sum=jnp.sum(entropy_M * valid_M),
        num_tokens=jnp.sum(valid_M),
        num_dropped=jnp.asarray(num_dropped),
    )


def grouped_statistics(routing: Routing, valid_BT: jax.Array, by_row: bool) -> RouterStats:
    """The statistics [groups, ...] of M = B · T tokens: of all as one group, or of each row."""
    shape = valid_BT.shape if by_row else (1, valid_BT.size)
    return jax.vmap(statistics)(routing.reshaped(*shape), valid_BT.reshape(shape))


NUM_BINS = 2048  # of a histogram of shortfalls


def bin_width(bias_XE: jax.Array) -> jax.Array:
    """[X, 1]: the width of the bins of a histogram of shortfalls; half of them are below 0.

    Scores are between 0 and 1, so a shortfall is at most 1 and the range of the biases. The width
    is a power of two, so that a product with it is exact: 1/512 if that range is less than 1.
    """
    reach_X1 = 1 + bias_XE.max(axis=-1, keepdims=True) - bias_XE.min(axis=-1, keepdims=True)
    _, exponent_X1 = jnp.frexp(reach_X1)
    return jnp.ldexp(jnp.float32(2 / NUM_BINS), exponent_X1)


def shortfall_histogram(shortfall_ME: jax.Array, bias_E: jax.Array, valid_M: jax.Array):
    """[E, NUM_BINS]: the number of valid tokens whose shortfall for an expert is in each bin.

    The counts are int32: their sums over devices and microbatches do not depend on the order.
    """
    E = bias_E.shape[0]
    # A shortfall of exactly 0, which one expert of every token has, is in the bin that begins at 0.
    bin_ME = jnp.floor(shortfall_ME / bin_width(bias_E)).astype(jnp.int32) + NUM_BINS // 2
    flat_ME = jnp.clip(bin_ME, 0, NUM_BINS - 1) + NUM_BINS * jnp.arange(E)
    flat_ME = jnp.where(valid_M[:, None], flat_ME, E * NUM_BINS)
    # Not `bins.count_by_bin`, which on a GPU would compare each value with all these bins.
    counts_R = jnp.zeros(E * NUM_BINS, jnp.int32).at[flat_ME.ravel()].add(1, mode="drop")
    return counts_R.reshape(E, NUM_BINS)
