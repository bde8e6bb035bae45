"""The attention block: norm, projections, rotary positions, attention, output projection."""

import jax

from moe_jax.model import layers, remat
from moe_jax.model.config import ModelConfig
from moe_jax.ops import attention as ops


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
    """What the block adds to x."""
    x_BTD = layers.rms_norm(x_BTD, params["norm"]["scale"], config.rms_norm_eps)
    q_BTNH, k_BTKH, v_BTKH = (layers.product(x_BTD, params[name]) for name in ("wq", "wk", "wv"))
    q_BTNH = layers.rotate(q_BTNH, positions_BT, config.rope_theta)
    k_BTKH = layers.rotate(k_BTKH, positions_BT, config.rope_theta)
    q_BTNH, k_BTKH, v_BTKH = remat.named("qkv", (q_BTNH, k_BTKH, v_BTKH))
    y_BTNH = ops.attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, implementation=config.attention)
    y_BTNH = remat.named("attention", y_BTNH)
    return layers.product(y_BTNH, params["wo"], contracted=2)
