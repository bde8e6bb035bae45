"""Grouped-query causal self-attention that never looks across a document's border."""

import jax
import jax.numpy as jnp

from moe_jax.model import layers
from moe_jax.model.config import ModelConfig

NEGATIVE = -1e30  # finite, so that a row with nothing to see gives no NaN


def shapes(config: ModelConfig) -> dict:
    D, N, K = config.hidden_size, config.num_attention_heads, config.num_kv_heads
    H = config.head_size
    return {
        "norm": layers.norm_shapes(config),
        "wq": (D, N, H),
        "wk": (D, K, H),
        "wv": (D, K, H),
        "wo": (N, H, D),
    }


def attention(
    x_BTD: jax.Array,
    params: dict,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    """Norm, projections, rotary positions, masked attention, output projection.

    Query head n reads key head n // (N/K) (Ainslie et al., arXiv 2305.13245).
    """
    x_BTD = layers.rms_norm(x_BTD, params["norm"]["scale"], config.rms_norm_eps)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.einsum("btd,dnh->btnh", x_BTD, params[name].astype(x_BTD.dtype))
        for name in ("wq", "wk", "wv")
    )
    q_BTNH = layers.rotate(q_BTNH, positions_BT, config.rope_theta)
    k_BTKH = layers.rotate(k_BTKH, positions_BT, config.rope_theta)
    y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return jnp.einsum("btnh,nhd->btd", y_BTNH, params["wo"].astype(x_BTD.dtype))


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Softmax attention, causal within a row and blind to other segments; softmax in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH).astype(jnp.float32)
    seen_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    seen_BTS &= jnp.tril(jnp.ones((T, T), bool))
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, NEGATIVE)
    weight_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(q_BTNH.dtype)
    y_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH)
    return y_BTKGH.reshape(B, T, N, H)
