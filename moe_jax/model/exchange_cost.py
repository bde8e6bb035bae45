"""Chooses the mode of `exchange.py` that sends the fewest bytes for one layer."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.model import layers
from moe_jax.model.config import ModelConfig
from moe_jax.ops import implementations


def choose(config: ModelConfig, num_tokens: int) -> str:
    """`config.expert_parallel`, or for "auto" the mode that sends the fewest bytes.

    A choice made for "auto" is printed once on stderr.

    Args: num_tokens: the tokens of one device. A mesh must be set.
    """
    if config.expert_parallel != "auto":
        return config.expert_parallel
    mesh = jax.sharding.get_abstract_mesh()
    here = implementations.platform()
    sent = bytes_sent(config, mesh.shape, num_tokens, here)
    mode = min(sent, key=sent.__getitem__)
    if mesh.shape["expert"] > 1:
        shown = ", ".join(f"{name} {size / 1e6:,.3g}" for name, size in sent.items())
        implementations.say_once(
            f"expert_parallel: {mode} over expert={mesh.shape['expert']} on {here} "
            f"(MB a layer and device: {shown})"
        )
    return mode


def bytes_sent(
    config: ModelConfig, mesh: Mapping[str, int], num_tokens: int, platform: str
) -> dict[str, float]:
    """Bytes that cross a device's links along the expert axis in a layer's forward pass, by mode.

    In each mode the backward pass sends as much again, and a recomputed layer once more. The count
    assumes that tokens are spread evenly over the devices, that the TPUs of an axis form a ring, in
    which a message crosses X/4 links on average, and that elsewhere a switch connects all devices.
    The count includes the weights that are gathered: a device's part along edp, sharded along
    tensor.

    Args: num_tokens: the tokens of one device.
    """
    X, T, A = mesh["expert"], mesh["tensor"], config.num_experts_per_tok
    size = jnp.dtype(config.dtype).itemsize
    others = (X - 1) / X
    weights = sum(map(math.prod, layers.ffn_shapes(config, config.expert_size).values()))
    experts = config.num_experts / mesh["edp"] * weights / T * size
    tokens = num_tokens * config.hidden_size * size
    chosen = tokens * A / mesh["edp"]  # each device along edp serves only its own experts
    hops = max(others, X / 4) if platform == "tpu" else others
    sent = {"fsdp": experts * others}
    if config.dispatch == "dropless":
        sent["ring"] = 2 * tokens * (X - 1)
        # XLA:CPU has no ragged all-to-all: every row is sent to every device.
        sent["all_to_all"] = 2 * (tokens * A * (X - 1) if platform == "cpu" else chosen * hops)
    elif config.dispatch == "capacity":
        sent["all_to_all"] = 2 * chosen * config.capacity_factor * hops
    return sent


def filled(mode: str, dispatch: str, mesh: Mapping[str, int]) -> float:
    """The fraction of a grouped matmul's rows that belong to a group, if all loads are even.

    A dropless buffer has room for all rows of all devices that may send any; rows of other devices'
    experts and padding belong to no group.
    """
    sources = 1 if mode == "fsdp" else mesh["expert"]
    return 1 / (sources * mesh["edp"]) if dispatch == "dropless" else 1.0
