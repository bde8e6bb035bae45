"""Counts of one sparse layer's routing decisions, made on the device, one batch at a time.

Every field is an integer, so the sum over batches or devices equals the count of all tokens at
once exactly, whatever their order. Means of probabilities and gates are sums of fixed-point
numbers for the same reason.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops import bins

MOST_TOKENS = 2**18  # per call: no int32 sum overflows, no float32 sum of ones passes 2^24
RESOLUTION = 2**20  # fixed-point steps of 1.0
WORD = 2**12  # a fixed-point number is summed as two words, so that each sum fits in int32
LARGEST = 16 - 1 / RESOLUTION  # probabilities and gates above it are counted as it
BINS_PER_OCTAVE, NUM_BINS = 16, 256  # bin b has ratios from 2^(b/16); the last has all above 2^15.9
RANKS = 3  # the largest probabilities whose ratios are counted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Integer counts of a layer's decisions for N tokens; `+` adds them on the host in int64.

    label_GE: assignments of each label's tokens to each expert, over all A slots.
    first_GE: the same over the first slot, the expert with the largest gate.
    tokens_G: tokens of each label.
    pairs_EE: tokens whose set of experts holds both; the diagonal counts each expert's tokens.
    probability_PW: sums of the P largest probabilities, in two words of a fixed-point number.
    weight_AW: sums of the gates of each slot, in two words.
    ratio_RB: tokens by the ratio of the first to the second probability (R=0) and of the second to
      the third (R=1), in bins of 1/16 of an octave.
    """

    label_GE: np.ndarray | jax.Array
    first_GE: np.ndarray | jax.Array
    tokens_G: np.ndarray | jax.Array
    pairs_EE: np.ndarray | jax.Array
    probability_PW: np.ndarray | jax.Array
    weight_AW: np.ndarray | jax.Array
    ratio_RB: np.ndarray | jax.Array

    def __add__(self, other: "Counts") -> "Counts":
        return jax.tree.map(
            lambda a, b: np.add(a, b, dtype=np.int64), *jax.device_get((self, other))
        )

    @property
    def num_tokens(self) -> int:
        return int(np.asarray(self.tokens_G).sum(dtype=np.int64))

    @property
    def mean_probability_P(self) -> np.ndarray:
        """The mean of each of the largest probabilities, to 5e-7."""
        return _mean_of_words(self.probability_PW, self.num_tokens)

    @property
    def mean_weight_A(self) -> np.ndarray:
        """The mean gate of each slot, to 5e-7."""
        return _mean_of_words(self.weight_AW, self.num_tokens)


def no_counts(num_labels: int, num_experts: int, per_token: int) -> Counts:
    """The counts of no tokens, to which those of batches are added."""
    G, E, P = num_labels, num_experts, min(RANKS, num_experts)
    shapes = (G, E), (G, E), (G,), (E, E), (P, 2), (per_token, 2), (P - 1, NUM_BINS)
    return Counts(*(np.zeros(shape, np.int64) for shape in shapes))


@functools.partial(jax.jit, static_argnames=("num_labels", "num_experts"))
def count(
    expert_NA: jax.Array,
    weight_NA: jax.Array,
    probability_NP: jax.Array,
    label_N: jax.Array,
    *,
    num_labels: int,
    num_experts: int,
) -> Counts:
    """The counts of one batch, in int32.

    Args:
      expert_NA: the experts of each token in order of falling gate; E marks an unused slot.
      weight_NA: the gates as the layer applies them, from 0 to 16.
      probability_NP: the min(3, E) largest probabilities of the router, falling.
      label_N: the label of each token. A token whose label is not in 0 … G - 1 is not counted, so a
        batch may be padded with -1.

    Raises: ValueError for more than 262,144 tokens.
    """
    check_tokens(len(label_N))
    counted_N = (label_N >= 0) & (label_N < num_labels)
    label_NG = label_N[:, None] == jnp.arange(num_labels)
    chosen_NE = _members(expert_NA, num_experts) & counted_N[:, None]
    ratio_NR = probability_NP[:, :-1] / jnp.maximum(
        probability_NP[:, 1:], jnp.finfo(jnp.float32).tiny
    )
    # The edges are compared with an IEEE quotient: a logarithm could round differently by device.
    edges_B = jnp.asarray(2.0 ** (np.arange(1, NUM_BINS) / BINS_PER_OCTAVE), jnp.float32)
    bin_NR = jnp.searchsorted(edges_B, ratio_NR, side="right")
    bin_NR = jnp.where(counted_N[:, None], bin_NR, NUM_BINS)
    of_ratio = [bins.count_by_bin(bin_N, NUM_BINS) for bin_N in bin_NR.T]
    return Counts(
        label_GE=_both(label_NG, chosen_NE),
        first_GE=_both(label_NG, _members(expert_NA[:, :1], num_experts)),
        tokens_G=jnp.sum(label_NG, axis=0, dtype=jnp.int32),
        pairs_EE=_both(chosen_NE, chosen_NE),
        probability_PW=_words(probability_NP, counted_N),
        weight_AW=_words(weight_NA, counted_N),
        ratio_RB=jnp.stack(of_ratio) if of_ratio else jnp.zeros((0, NUM_BINS), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("vocab_size", "num_experts"))
def count_vocabulary(
    id_N: jax.Array, expert_N: jax.Array, *, vocab_size: int, num_experts: int
) -> jax.Array:
    """int32 [V, E]: how often tokens with this id went to this expert, the first of their slots.

    An id outside 0 … V - 1, such as the -1 of a token without a next one, and an unused slot's E
    are not counted. The ids may be those of the input, of the next token or of the prediction
    (Muennighoff et al., OLMoE, arXiv 2409.02060, §5.4); each needs a call of its own.

    Raises: ValueError for more than 262,144 tokens.
    """
    check_tokens(len(id_N))
    id_N = jnp.where(id_N < 0, vocab_size, id_N)  # a negative index would count from the end
    counts_VE = jnp.zeros((vocab_size, num_experts), jnp.int32)
    return counts_VE.at[id_N, expert_N].add(1, mode="drop")


@functools.partial(jax.jit, static_argnames="num_experts")
def count_joint(expert_NA: jax.Array, other_NA: jax.Array, *, num_experts: int) -> jax.Array:
    """int32 [E, E]: tokens that one router sends to expert i and another one to expert j.

    Raises: ValueError for more than 262,144 tokens.
    """
    check_tokens(len(expert_NA))
    return _both(_members(expert_NA, num_experts), _members(other_NA, num_experts))


@jax.jit
def count_shared(expert_NA: jax.Array, final_NA: jax.Array) -> jax.Array:
    """int32 [N]: the number of experts that a token's two sets have in common.

    Raises: ValueError for sets of unlike sizes.
    """
    if expert_NA.shape != final_NA.shape:
        raise ValueError(
            f"decisions of shape {expert_NA.shape} and {final_NA.shape} cannot be compared; give "
            "the same tokens with the same number of experts per token"
        )
    shared_NA = jnp.any(expert_NA[:, :, None] == final_NA[:, None, :], axis=2)
    return jnp.sum(shared_NA, axis=1, dtype=jnp.int32)


def check_tokens(num_tokens: int) -> None:
    """Raises ValueError for a batch whose counts could overflow."""
    if num_tokens > MOST_TOKENS:
        raise ValueError(
            f"{num_tokens} tokens in one call are more than {MOST_TOKENS}; count them in batches "
            "and add the counts"
        )


def _members(expert_NA: jax.Array, num_experts: int) -> jax.Array:
    """bool [N, E]: each token's set of experts."""
    return jnp.any(expert_NA[:, :, None] == jnp.arange(num_experts), axis=1)


def _both(a_NX: jax.Array, b_NY: jax.Array) -> jax.Array:
    """int32 [X, Y]: the number of rows where both hold.

    A float32 product of zeros and ones is exact up to 2^24, on a TPU in bfloat16 passes too.
    """
    product_XY = jnp.einsum("nx,ny->xy", a_NX.astype(jnp.float32), b_NY.astype(jnp.float32))
    return product_XY.astype(jnp.int32)


def _words(value_NX: jax.Array, counted_N: jax.Array) -> jax.Array:
    """int32 [X, 2]: the sums of the values' high and low words."""
    steps_NX = jnp.round(jnp.clip(value_NX, 0, LARGEST) * RESOLUTION).astype(jnp.int32)
    steps_NX = jnp.where(counted_N[:, None], steps_NX, 0)
    return jnp.stack([(steps_NX // WORD).sum(axis=0), (steps_NX % WORD).sum(axis=0)], axis=1)


def _mean_of_words(sums_XW, num_tokens: int) -> np.ndarray:
    high_X, low_X = np.asarray(sums_XW, np.int64).T
    return (high_X * WORD + low_X) / (RESOLUTION * max(num_tokens, 1))
