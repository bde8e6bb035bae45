"""The attention block: norm, projections, positions, attention, output projection."""

import jax
import jax.numpy as jnp

from moe_jax.model import layers, remat, rope
from moe_jax.model.config import ModelConfig
from moe_jax.model.routing import router_logits
from moe_jax.ops import attention as ops
from moe_jax.ops import cached_attention


def shapes(config: ModelConfig) -> dict:
    """The shapes of the block's parameters, by name."""
    one, E = _shapes_of_one(config), config.num_attention_experts
    if E:
        stacks = {  # in the same order, because Flax's initial values depend on it
            n: {m: (E, *s) for m, s in shape.items()} if isinstance(shape, dict) else (E, *shape)
            for n, shape in one.items()
        }
        one = {"router": {"kernel": (config.hidden_size, E)}, "experts": stacks}
    return {"norm": layers.norm_shapes(config), **one}


def _shapes_of_one(config: ModelConfig) -> dict:
    D, N, K = config.hidden_size, config.num_attention_heads, config.num_kv_heads
    H = config.head_size
    shapes: dict = {"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D)}
    if config.attention_bias != "none":
        shapes |= {"bq": (N, H), "bk": (K, H), "bv": (K, H)}
    if config.attention_bias == "all":
        shapes["bo"] = (D,)
    if config.qk_norm != "none":
        q, k = ((H,), (H,)) if config.qk_norm == "head" else ((N, H), (K, H))
        shapes["q_norm"] = layers.norm_shapes(config, *q)
        shapes["k_norm"] = layers.norm_shapes(config, *k)
    return shapes


def attention(
    x_BTD: jax.Array,
    params: dict,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    config: ModelConfig,
    *,
    window: int | None = None,
    cache: dict | None = None,
) -> tuple[jax.Array, dict | None]:
    """Returns what the block adds to x, and the cache with the keys and values of these positions.

    With attention experts, the first is the sum of all their outputs, weighted by a softmax router;
    each expert has its own keys and values (Zhang et al., BAM, arXiv 2408.08274).

    Args:
      window: the number of keys that a query attends to, its own included; None is all up to it.
      cache: `k` and `v` [L, B, S, K, H] of the positions before these, for all layers, and this
        layer's index `at`; behind L there is an axis for the attention experts if there are any.
        None in training. A call with several positions must start at the first position of each
        row.
    """
    x_BTD = layers.norm(x_BTD, params["norm"], config)
    rest = positions_BT, segment_ids_BT, config, window
    if "experts" not in params:
        return _attention_of_one(x_BTD, params, cache, *rest)
    logits_BTE = router_logits(x_BTD, params["router"]["kernel"])
    share_BTE = jax.nn.softmax(logits_BTE).astype(x_BTD.dtype)

    def add(carry, expert):
        total_BTD, cache = carry
        index, params, share_BT = expert
        of_one = cache and {**cache, "at": (*cache["at"], index)}
        y_BTD, of_one = _attention_of_one(x_BTD, params, of_one, *rest)
        cache = cache and {**of_one, "at": cache["at"]}
        return (total_BTD + share_BT[..., None] * y_BTD, cache), None

    experts = jnp.arange(share_BTE.shape[-1]), params["experts"], jnp.moveaxis(share_BTE, -1, 0)
    return jax.lax.scan(add, (jnp.zeros_like(x_BTD), cache), experts)[0]


def _attention_of_one(x_BTD, params, cache, positions_BT, segment_ids_BT, config, window):
    qkv = layers.projected(x_BTD, params, ("wq", "wk", "wv"))
    q_BTNH, k_BTKH, v_BTKH = (
        layers.add_bias(x, params, f"b{n}") for n, x in zip("qkv", qkv, strict=True)
    )
    if config.qk_norm != "none":
        q_BTNH = layers.norm(q_BTNH, params["q_norm"], config)
        k_BTKH = layers.norm(k_BTKH, params["k_norm"], config)
    if (most := config.clip_qkv) is not None:
        q_BTNH, k_BTKH, v_BTKH = (jnp.clip(x, -most, most) for x in (q_BTNH, k_BTKH, v_BTKH))
    if config.position_embedding == "rotary":
        q_BTNH, k_BTKH = (rope.rotate(x, positions_BT, config) for x in (q_BTNH, k_BTKH))
    q_BTNH, k_BTKH, v_BTKH = remat.named("qkv", (q_BTNH, k_BTKH, v_BTKH))
    if cache is not None:
        new = {"k": k_BTKH, "v": v_BTKH}
        cache |= {n: _written(cache[n], cache["at"], x, positions_BT) for n, x in new.items()}
    if cache is not None and x_BTD.shape[1] == 1:
        y_BTNH = cached_attention.attend(
            *(q_BTNH, cache["k"][cache["at"]], cache["v"][cache["at"]], positions_BT),
            window=window,
        )
    else:
        y_BTNH = ops.attention(
            *(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT),
            window=window,
            implementation=config.attention,
        )
    y_BTNH = remat.named("attention", y_BTNH)
    [y_BTD] = layers.projected(y_BTNH, params, ("wo",), contracted=2)
    return layers.add_bias(y_BTD, params, "bo"), cache


def _written(cache, at: tuple, x_BTKH, positions_BT):
    row_B1 = jnp.arange(len(positions_BT))[:, None]
    return cache.at[(*at, row_B1, positions_BT)].set(x_BTKH.astype(cache.dtype), mode="drop")
