"""Attention in decoding: new positions attend to cached keys and values."""

import jax
import jax.numpy as jnp

from moe_jax.ops import attention_reference


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """softmax(q · k / sqrt(H)) · v over the cache's slots 0 … position of each query.

    Args:
      k_BSKH: slot s holds the key of position s; slots after a query's position are ignored.
      window: the number of keys that a query attends to, its own included; None is all up to it.

    Returns: [B, T, N, H] in q's dtype; the softmax is in float32.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    seen_BTS = attention_reference.visible(positions_BT[:, :, None], jnp.arange(S), window)
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, -jnp.inf)
    weight_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(q_BTNH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH).reshape(B, T, N, H)
