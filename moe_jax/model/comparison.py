"""Two models compared by what they compute, not by what their configs say."""

import dataclasses
import reprlib
from typing import Any

from moe_jax.model.config import DENSE, ModelConfig, fields_of
from moe_jax.model.fields import COMPUTATION, ORIGIN, ROPE
from moe_jax.model.rope import ROPES
from moe_jax.model.router import ROUTERS

# Activation names in Hugging Face's files, each mapped to another name for the same formula.
SAME_ACTIVATION = {"swish": "silu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_new"
)


def in_force(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes, each with the value in force.

    Two models are alike, and can be parents of one MoE, if these are equal.
    """
    fields = {
        **dataclasses.asdict(config),
        **(ROUTERS[config.router].same_as if config.num_experts else {}),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": SAME_ACTIVATION.get(config.hidden_act, config.hidden_act),
        "moe_intermediate_size": config.expert_size,
        "layers": config.layer_kinds,
        "layer_types": tuple(kind.window for kind in config.block_kinds),
    }
    idle = {
        field.name
        for field in dataclasses.fields(config)
        if not all(need.holds(config) for need in field.metadata["needs"])
    }
    unused = fields_of(COMPUTATION, ORIGIN) | {"sliding_window"} | idle - {"num_experts", "layers"}
    unused |= fields_of(ROPE) - set(ROPES[config.rope_type].reads)
    if config.num_experts and DENSE not in config.layer_kinds:
        unused |= {"intermediate_size"}
    if config.dispatch != "capacity":
        unused |= {"capacity_factor"}  # read by a report, but by no layer
    if config.position_embedding == "rotary":
        unused |= {"max_position_embeddings"}  # only the recommended length; it sizes no weights
    return {name: value for name, value in fields.items() if name not in unused}


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which what `config` computes differs from `other`: "NAME is X, not Y"."""
    ours, theirs = in_force(config), in_force(other)
    return [
        f"{name} is {reprlib.repr(ours.get(name))}, not {reprlib.repr(theirs.get(name))}"
        for name in theirs | ours
        if ours.get(name) != theirs.get(name)
    ]
