"""Grouped-query causal self-attention over packed rows: no query attends to another document.

Query head n reads kv head n // (N/K) (Ainslie et al., arXiv 2305.13245); G = N/K query heads share
a kv head. With a window a query attends only to the last `window` keys, its own included (Beltagy
et al., arXiv 2004.05150, as in Mistral 7B, arXiv 2310.06825).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.ops import attention_kernels as kernels
from moe_jax.ops.attention_chunked import chunked, chunked_executed
from moe_jax.ops.attention_reference import Executed, reference, reference_executed
from moe_jax.ops.implementations import Implementation, choose
from moe_jax.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Implementation):
    """`function` takes one device's q_BTNH, k_BSKH, v_BSKH and segment_ids_BT, and the window, and
    returns y_BTNH."""

    executed: Callable[[int, int | None], Executed]  # (T positions, window) -> products executed
    refuses: Callable[[int, int, jnp.dtype], str] = lambda T, H, dtype: ""  # why it cannot run


# "auto" tries them in this order.
IMPLEMENTATIONS = {
    "splash": Attention(
        *(kernels.splash, ("tpu",)),
        executed=kernels.splash_executed,
        refuses=kernels.splash_refuses,
    ),
    "cudnn": Attention(
        kernels.cudnn, ("gpu",), executed=kernels.cudnn_executed, refuses=kernels.cudnn_refuses
    ),
    "chunked": Attention(chunked, executed=chunked_executed),
    "reference": Attention(reference, executed=reference_executed),
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q · k / sqrt(H)) · v over the query's own and earlier positions of its segment.

    Args:
      q_BTNH: N is a multiple of K.
      segment_ids_BT: the document of each position. Padding is a segment like any other, by
        convention 0; its outputs are finite but meaningless.
      window: the most keys that a query attends to, its own included; None for no limit.
      implementation: a key of IMPLEMENTATIONS, or "auto", the first of them that can run.

    The softmax is computed in float32, or in the inputs' dtype if that is wider. With a mesh set,
    each device works on its own rows and heads, because the partitioner cannot partition a Pallas
    kernel.

    Raises: ValueError if `implementation` cannot run here or with these shapes, if the mesh's
      tensor axis does not divide the kv heads, or for a window below 1.
    """
    _, T, _, H = q_BTNH.shape
    chosen = _choose(implementation, T, H, q_BTNH.dtype)
    attend = functools.partial(chosen.function, window=_limit(window, T))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    K = k_BSKH.shape[2]
    sharding.check_divisible(f"num_key_value_heads={K}", K, mesh, sharding.TENSOR)
    heads = jax.P(sharding.BATCH_AXES, None, sharding.TENSOR)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, sharding.BATCH),
        out_specs=heads,
        check_vma=False,  # a Pallas kernel does not state along which axes its results vary
    )(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)


def executed_pairs(
    T: int, implementation: str = "auto", *, H: int, dtype: str, window: int | None = None
) -> Executed:
    """The products that `attention` executes for rows of T positions on the mesh's platform.

    Raises: ValueError under the same conditions as `attention`.
    """
    return _choose(implementation, T, H, jnp.dtype(dtype)).executed(T, _limit(window, T))


def _limit(window: int | None, T: int) -> int | None:
    """The window if it hides any key in a row of T positions, else None."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} hides a query's own key too; use at least 1, or None")
    return window if window is not None and window < T else None


def _choose(name: str, T: int, H: int, dtype) -> Attention:
    return choose("attention", name, IMPLEMENTATIONS, lambda row: row.refuses(T, H, dtype))
