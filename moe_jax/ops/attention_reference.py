"""Attention over all pairs at once, and the parts that all implementations share."""

import dataclasses

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a query without visible keys does not give NaN

# A remat policy may keep y and the logsumexp under this name; then no product is recomputed.
SAVED_NAME = "attention"


@dataclasses.dataclass(frozen=True)
class Executed:
    """Counts of (query, key) pairs times products, per head and row; times 2 H they are FLOPs."""

    forward: int  # executed a second time if remat recomputes the forward pass
    backward: int
    from_saved: int = 0  # the part that is recomputed even if remat keeps all named values


def visible(t, s, window: int | None):
    """True where a query at position t attends to a key at position s of its segment."""
    seen = t >= s
    return seen if window is None else seen & (t - s < window)


def block_pairs(T: int, block: int, window: int | None) -> list[tuple[int, int]]:
    """(query block, key block) of all pairs in which a query attends to a key, in order of the
    query block; a query's own block comes first."""
    blocks = -(-T // block)
    # The nearest positions of blocks that are d blocks apart are (d - 1) · block + 1 apart.
    reach = blocks if window is None else -(-(window - 1) // block)
    return [(i, j) for i in range(blocks) for j in range(i, max(i - reach, 0) - 1, -1)]


def reference(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window: int | None = None):
    """Attention with the logits of all pairs at once, [B, K, G, T, T]."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)
    logits_BKGTS = logits_BKGTS.astype(wide_type(q_BTNH.dtype))
    seen_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    seen_BTS &= visible(jnp.arange(T)[:, None], jnp.arange(T), window)
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, NEGATIVE)
    weight_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(q_BTNH.dtype)
    y_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH)
    return y_BTKGH.reshape(B, T, N, H)


def reference_executed(T: int, window: int | None) -> Executed:
    """All pairs are computed, whatever the window."""
    return Executed(2 * T**2, 4 * T**2, from_saved=T**2)  # the logits have no name


def wide_type(dtype):
    return jnp.promote_types(dtype, jnp.float32)
