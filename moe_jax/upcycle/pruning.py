"""Structured pruning: a smaller model of the parts that are most important in a larger one.

Minitron (Muralidharan et al., arXiv 2407.14679, §2) removes channels of the residual stream, heads
and neurons in one step; ShortGPT (Men et al., arXiv 2403.03853) removes layers, and REAP (Lasby et
al., arXiv 2510.13999) experts. `analysis/importance.py` measures the importances.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import spelling, tree
from moe_jax.model import layout
from moe_jax.model.config import ModelConfig

SIZES = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads"),
    *("num_hidden_layers", "num_experts"),
)


@dataclasses.dataclass(frozen=True)
class Importance:
    """The importance of each part of a model with L layers; entries of lists are layers.

    channels_D: of the residual stream. heads: [K], query heads that share keys together.
    neurons: [F] of a dense layer, [E, F] of a sparse one. experts: [E]; None of a dense layer.
    """

    channels_D: np.ndarray
    layers_L: np.ndarray
    heads: list[np.ndarray]
    neurons: list[np.ndarray]
    experts: list[np.ndarray | None]


# Paths in a layer, and in the shell -> what each axis of the leaf is counted in; "" is kept whole.
AXES = (
    (r"(^|/)norm/\w+$|^final_norm/", ("channel",)),
    (r"^embed/", ("", "channel")),
    (r"^unembed$", ("channel", "")),
    (r"attention/wq$", ("channel", "query", "")),
    (r"attention/w[kv]$", ("channel", "key", "")),
    (r"attention/wo$", ("query", "", "channel")),
    (r"attention/bq$", ("query", "")),
    (r"attention/b[kv]$", ("key", "")),
    (r"attention/bo$", ("channel",)),
    (r"attention/q_norm/", ("query", "")),
    (r"attention/k_norm/", ("key", "")),
    (r"mlp/(gate|up)$", ("channel", "neuron")),
    (r"mlp/down$", ("neuron", "channel")),
    (r"mlp/(gate|up)_bias$", ("neuron",)),
    (r"shared/(gate|up)$", ("channel", "")),
    (r"shared/down$", ("", "channel")),
    (r"shared/(gate|up)_bias$", ("",)),
    (r"(mlp|shared)/down_bias$", ("channel",)),
    (r"experts/(gate|up)$", ("expert", "channel", "neuron")),
    (r"experts/down$", ("expert", "neuron", "channel")),
    (r"experts/(gate|up)_bias$", ("expert", "neuron")),
    (r"experts/down_bias$", ("expert", "channel")),
    (r"router/bias$", ("expert",)),
    (r"router/\w+$", ("channel", "expert")),
)


def config_of(config: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    """The pruned model's config; `pruned` replaces its kinds of layers by those that are kept.

    Raises: ValueError, in one line, for a size that pruning cannot change or that is no smaller.
    """
    if config.num_attention_experts or config.router == "noisy_topk_mlp":
        raise ValueError(
            "a model with attention experts or a router of two layers cannot be pruned"
        )
    if not sizes:
        raise ValueError(f"nothing is pruned: give --model.NAME=SIZE, one of {', '.join(SIZES)}")
    for name, size in sizes.items():
        if name not in SIZES:
            raise ValueError(spelling.unknown("--model", name, SIZES))
        own = config.expert_size if name == "moe_intermediate_size" else getattr(config, name)
        if not 0 < size <= own:
            raise ValueError(f"--model.{name}={size} must be from 1 to the parent's {own}")
    N, group = sizes.get("num_attention_heads", config.num_attention_heads), _group(config)
    if N % group:
        raise ValueError(
            f"--model.num_attention_heads={N} must be a multiple of {group}, the query heads that "
            "share keys"
        )
    if "num_experts" in sizes and config.num_expert_groups > 1:
        raise ValueError("--model.num_experts: experts in groups cannot be pruned; leave it out")
    rows = range(sizes.get("num_hidden_layers", config.num_hidden_layers))
    own = {"head_dim": config.head_size, "num_key_value_heads": N // group}
    return dataclasses.replace(config, **{**_kinds(config, rows), **own, **sizes})


def _kinds(config: ModelConfig, layers: Iterable[int]) -> dict[str, Any]:
    """The fields that name the kinds of layers, for these layers alone."""
    fields = {name: getattr(config, name) for name in ("layers", "layer_types")}
    return {name: kinds and tuple(kinds[i] for i in layers) for name, kinds in fields.items()}


def pruned(
    params: dict, config: ModelConfig, smaller: ModelConfig, importance: Importance
) -> tuple[ModelConfig, dict]:
    """The config and the parameters that remain: the most important parts, in their order.

    Parts of the same size stay bitwise the parent's.
    """
    layers = best(importance.layers_L, smaller.num_hidden_layers)
    smaller = dataclasses.replace(smaller, **_kinds(config, layers))
    channels = {"channel": best(importance.channels_D, smaller.hidden_size)}
    shell = {name: leaf for name, leaf in params.items() if name != "blocks"}
    made = {name: _taken(name, leaf, channels) for name, leaf in tree.flatten(shell).items()}
    blocks = []
    for i in layers:
        kept, of_layer = {**channels, **_kept(importance, i, smaller)}, {}
        for name, leaf in tree.flatten(layout.layer(params, config, i)).items():
            of_layer[name] = _taken(name, leaf, kept)
        blocks.append(of_layer)
    for group in layout.layer_groups(smaller.block_kinds):
        for slot, rows in group.layers.items():
            for name in blocks[rows[0]]:
                made[f"blocks/{slot}/{name}"] = jnp.stack([blocks[row][name] for row in rows])
    return smaller, tree.unflatten(made)


def best(score_X: np.ndarray, number: int) -> np.ndarray:
    """The indices, in ascending order, of the largest scores along the last axis."""
    return np.sort(np.argsort(-score_X, axis=-1, kind="stable")[..., :number], axis=-1)


def _group(config: ModelConfig) -> int:
    return config.num_attention_heads // config.num_kv_heads


def _kept(importance: Importance, layer: int, smaller: ModelConfig) -> dict[str, np.ndarray]:
    """The indices that remain in a layer, by the names in AXES; each expert has its own neurons."""
    keys, group = best(importance.heads[layer], smaller.num_kv_heads), _group(smaller)
    kept = {"key": keys, "query": (keys[:, None] * group + np.arange(group)).ravel()}
    neurons, experts = importance.neurons[layer], importance.experts[layer]
    if experts is None:
        return {**kept, "neuron": best(neurons, smaller.intermediate_size)}
    kept["expert"] = best(experts, smaller.num_experts)
    return {**kept, "neuron": best(neurons[kept["expert"]], smaller.expert_size)}


def _taken(name: str, leaf: jax.Array, kept: dict[str, np.ndarray]) -> jax.Array:
    names = next(names for pattern, names in AXES if re.search(pattern, name))
    if len(names) > leaf.ndim:  # a norm of each head, which all heads share
        return leaf
    for axis, part in enumerate(names):
        if part == "neuron" and "expert" in names:
            index = kept[part].reshape(
                [-1 if i == axis else len(leaf) if i == 0 else 1 for i in range(leaf.ndim)]
            )
            leaf = jnp.take_along_axis(leaf, index, axis=axis)
        elif part:
            leaf = jnp.take(leaf, kept[part], axis=axis)
    return leaf
