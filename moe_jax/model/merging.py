"""Lory's soft merging: each segment of a row goes through one expert, a weighted average of all.

The averaging weights come from the previous segment, so no token sees a later one. The first
segment uses its own weights, without a gradient through them (Zhong et al., arXiv 2405.03133), so
its tokens do see the rest of that segment. The held-out loss leaves that segment out; the training
loss counts it, as in the paper.
"""

import jax
import jax.numpy as jnp

from moe_jax.model import layers
from moe_jax.model.config import ModelConfig
from moe_jax.model.routing import Routing, router_logits
from moe_jax.ops import stacks


def merged(x_BTD, params, groups, noise_key, config: ModelConfig):
    """Returns the layer's output, a Routing and 0 dropped assignments, like `moe.routed`.

    In the Routing each token goes to its segment's most probable expert.

    Raises: ValueError if segments do not divide a row.
    """
    del noise_key
    B, T, D = x_BTD.shape
    S = min(config.merge_segment_length, T)
    if T % S:
        raise ValueError(
            f"merge_segment_length={S} does not divide the {T} positions of a row; "
            "make data.sequence_length a multiple of it"
        )
    x_GSD, valid_GS = x_BTD.reshape(-1, S, D), groups.valid_M.reshape(-1, S)
    with jax.named_scope("router"):
        logits_GE = router_logits(segment_means(x_GSD, valid_GS), params["router"]["kernel"])
        logits_GE = shift(logits_GE.reshape(B, T // S, -1)).reshape(logits_GE.shape)
        probabilities_GE = jax.nn.softmax(logits_GE, axis=-1)
    with jax.named_scope("experts"):
        y_GSD = jax.vmap(lambda x, p: merged_expert(x, p, params["experts"], config))(
            x_GSD, probabilities_GE.astype(x_GSD.dtype)
        )

    logits_ME, probabilities_ME = (jnp.repeat(x, S, axis=0) for x in (logits_GE, probabilities_GE))
    expert_index_M1 = jnp.argmax(probabilities_ME, axis=-1, keepdims=True)
    weight_M1 = jnp.take_along_axis(probabilities_ME, expert_index_M1, axis=-1)
    routing = Routing(expert_index_M1, weight_M1, logits_ME, probabilities_ME)
    return y_GSD.reshape(B, T, D), routing, jnp.zeros((), jnp.int32)


def segment_means(x_GSD: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """The mean hidden state of each segment's valid tokens, in float32."""
    x_GSD = jnp.where(valid_GS[..., None], x_GSD.astype(jnp.float32), 0)
    return jnp.sum(x_GSD, axis=1) / jnp.maximum(jnp.sum(valid_GS, axis=1), 1)[:, None]


def shift(logits_BGE: jax.Array) -> jax.Array:
    """Shifts the logits by one segment; the first segment keeps its own, without a gradient."""
    first_B1E = jax.lax.stop_gradient(logits_BGE[:, :1])
    return jnp.concatenate([first_B1E, logits_BGE[:, :-1]], axis=1)


def merged_expert(x_SD: jax.Array, share_E: jax.Array, experts: dict, config: ModelConfig):
    """The feed-forward whose weights are the average of the experts', weighted by `share_E`."""
    # The gradient of share_E sums over the matrices, so their order decides its last bits.
    names = layers.ffn_shapes(config, config.expert_size)
    experts = stacks.values(experts)
    mean = {n: jnp.tensordot(share_E, experts[n].astype(x_SD.dtype), axes=1) for n in names}
    return layers.feed_forward(x_SD, mean, config)
