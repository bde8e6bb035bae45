"""The importance of a model's channels, heads, neurons, experts and layers, measured on a text.

The score of a unit is its activation's L2 norm over the batch, averaged over the positions of a row
(Muralidharan et al., Minitron, arXiv 2407.14679, §2.2). Layers and experts have scores of their
own.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax.analysis import parent_statistics
from moe_jax.model import attention, layers, layout, transformer
from moe_jax.model.config import DENSE, BlockKind, ModelConfig
from moe_jax.upcycle.pruning import Importance

# How experts are ranked -> their scores from the sums over the tokens routed to them, of
# weight · ||output|| and of 1. REAP: Lasby et al., arXiv 2510.13999, eq. 9; its weights are those
# that the model multiplies outputs by.
EXPERT_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "reap": lambda saliency_E, load_E: saliency_E / np.maximum(load_E, 1),
    "frequency": lambda saliency_E, load_E: load_E,
}


def measure(
    params: dict,
    config: ModelConfig,
    tokens_NBT: Sequence[np.ndarray],
    experts_by: str = "reap",
) -> Importance:
    """The importances on N batches of tokens, with all rows of the batches as one batch.

    Channels: outputs of the norms before attention and feed-forward, summed over these. Heads: the
    norm of a head's output, summed over heads that share keys. Neurons: the input of the down
    projection; in an expert, for the tokens routed to it. Layers: block influence, the mean of
    1 - cos between a block's input and its output (Men et al., ShortGPT, arXiv 2403.03853, eq. 1).
    Experts: the row `experts_by` of EXPERT_SCORES; "reap" is the mean of weight · ||output|| over
    the tokens routed to an expert, "frequency" the number of these tokens.

    Raises: ValueError for tokens that this model cannot read.
    """
    parent_statistics.check_tokens(config, tokens_NBT)
    sums: list[dict] = [{} for _ in range(config.num_hidden_layers)]
    for tokens_BT in tqdm.tqdm(tokens_NBT, "importance", unit="batch", disable=None):
        shared = parent_statistics.one_document(tokens_BT)
        x_BTD = transformer.embed(params["embed"], tokens_BT, shared.positions_BT, config)
        for layer, kind, block in layout.layers(params, config):
            own = {"config": config, "kind": kind}
            x_BTD, found = _block(x_BTD, block, {"index": layer}, shared, **own)
            for name, value in jax.device_get(found).items():
                sums[layer][name] = sums[layer].get(name, 0) + np.asarray(value, np.float64)
    score_experts = EXPERT_SCORES[experts_by]
    K, tokens = config.num_kv_heads, sum(tokens_BT.size for tokens_BT in tokens_NBT)
    score = [{n: np.sqrt(s[n]).mean(axis=0) for n in SQUARES} for s in sums]
    return Importance(
        channels_D=np.sum([s["channels"] for s in score], axis=0),
        layers_L=np.array([s["influence"] for s in sums]) / tokens,
        heads=[s["heads"].reshape(K, -1).sum(axis=1) for s in score],
        neurons=[s["neurons"] for s in score],
        experts=[score_experts(s["saliency"], s["load"]) if "load" in s else None for s in sums],
    )


SQUARES = ("channels", "heads", "neurons")  # sums of squares by position; the others are sums


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _block(x_BTD, block, per_layer, shared, *, config: ModelConfig, kind: BlockKind):
    """The block's output, and its sums over the rows of the batch."""
    normed_BTD = layers.norm(x_BTD, block["attention"]["norm"], config)
    out_BTD, output = transformer.block(
        *(x_BTD, block, per_layer, shared),
        config=config,
        kind=kind,
        taps=("feed_forward_input",),
        return_routing=kind.feed_forward != DENSE,
    )
    y_BTD = output.tapped["feed_forward_input"]
    found = {
        "channels": _square(normed_BTD) + _square(y_BTD),
        "heads": jnp.sum(
            jnp.square(_heads(x_BTD, block["attention"], shared, config, kind)), axis=(0, 3)
        ),
        "influence": jnp.sum(1 - _cosine(x_BTD, out_BTD)),
    }
    if output.stats is None:
        h_BTF = parent_statistics.hidden_neurons(y_BTD, block["mlp"], config)
        return out_BTD, {**found, "neurons": _square(h_BTF)}
    routing, experts = output.stats.routing, block["moe"]["experts"]

    def of_expert(numbered):
        e, expert = numbered
        chosen_BTA = routing.expert_index_MA == e
        weight_BT = jnp.sum(jnp.where(chosen_BTA, routing.weight_MA, 0), axis=-1)
        routed_BT = chosen_BTA.any(axis=-1)
        h_BTF = parent_statistics.hidden_neurons(y_BTD, expert, config)
        h_BTF = jnp.where(routed_BT[..., None], h_BTF, 0)
        norm_BT = jnp.linalg.norm(layers.feed_forward(y_BTD, expert, config), axis=-1)
        saliency = jnp.sum(jnp.where(routed_BT, weight_BT * norm_BT, 0))
        return {"neurons": _square(h_BTF), "saliency": saliency, "load": jnp.sum(routed_BT)}

    of_experts = jax.lax.map(of_expert, (jnp.arange(config.num_experts), experts))
    of_experts["neurons"] = of_experts["neurons"].swapaxes(0, 1)  # [T, E, F]
    return out_BTD, {**found, **of_experts}


def _square(x_BTX: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x_BTX.astype(jnp.float32)), axis=0)


def _cosine(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    x_BTD, y_BTD = (z.astype(jnp.float32) for z in (x_BTD, y_BTD))
    norms = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1)
    return jnp.sum(x_BTD * y_BTD, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def _heads(x_BTD, params: dict, shared, config: ModelConfig, kind: BlockKind) -> jax.Array:
    """[B, T, N, H]: the heads' outputs, by an output projection that returns them as they are."""
    N, H = config.num_attention_heads, config.head_size
    own = {name: leaf for name, leaf in params.items() if name != "bo"}
    own["wo"] = jnp.eye(N * H).reshape(N, H, N * H)
    y_BTX, _ = attention.attention(
        *(x_BTD, own, shared.positions_BT, shared.segment_ids_BT, config), window=kind.window
    )
    return y_BTX.astype(jnp.float32).reshape(*x_BTD.shape[:2], N, H)


def loss(params: dict, config: ModelConfig, tokens_NBT: Sequence[np.ndarray]) -> float:
    """The mean loss, in nats per token, of the same batches."""
    of_batch = jax.jit(parent_statistics.loss, static_argnames="config")
    return float(np.mean([of_batch(params, jnp.asarray(tokens), config) for tokens in tokens_NBT]))
