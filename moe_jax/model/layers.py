"""The small pure functions every block uses: norm, rotary positions, gated feed-forward."""

import math

import jax
import jax.numpy as jnp

from moe_jax.model import remat
from moe_jax.model.config import ModelConfig


def norm_shapes(config: ModelConfig) -> dict:
    return {"scale": (config.hidden_size,)}


def mlp_shapes(config: ModelConfig) -> dict:
    D, F = config.hidden_size, config.intermediate_size
    return {"norm": norm_shapes(config), "gate": (D, F), "up": (D, F), "down": (F, D)}


def product(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
    """The last axes of x, `contracted` of them, times the first ones of w; in x's dtype.

    As one plain matrix product: XLA:CPU takes twice as long for the gradient of w with several axes
    of rows (a SwiGLU of 2048 rows, D=256, F=1024, with its gradients: 159 ms as [8, 256, D], 85 ms
    as [2048, D]).
    """
    rows, columns = x.shape[: x.ndim - contracted], w.shape[contracted:]
    size = math.prod(w.shape[:contracted])
    y = x.reshape(-1, size) @ w.astype(x.dtype).reshape(size, -1)
    return y.reshape(*rows, *columns)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return unit.astype(x.dtype) * scale.astype(x.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary positions, pairing dimension i with i + H/2 (Su et al., arXiv 2104.09864)."""
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle).astype(x_BTNH.dtype), jnp.cos(angle).astype(x_BTNH.dtype)
    x, y = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)


def mlp(x_BTD: jax.Array, params: dict, config: ModelConfig) -> jax.Array:
    """Norm, then SwiGLU: down(silu(gate x) * up x) (Shazeer, arXiv 2002.05202)."""
    x_BTD = rms_norm(x_BTD, params["norm"]["scale"], config.rms_norm_eps)
    gate_BTF, up_BTF = remat.named(
        "gate_up", tuple(product(x_BTD, params[name]) for name in ("gate", "up"))
    )
    return product(jax.nn.silu(gate_BTF) * up_BTF, params["down"])
