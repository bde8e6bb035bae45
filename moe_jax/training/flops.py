"""Two counts of floating-point operations, never mixed.

`model_flops` counts the operations that the model needs; it is the numerator of MFU.
`analytic_flops` counts the operations that the compiled step should execute; it is compared with
the matrix products that the step does execute.
"""

import collections
import dataclasses
import timeit
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from moe_jax import config as configs
from moe_jax.model.config import MOE, ModelConfig
from moe_jax.model.router import ROUTERS
from moe_jax.ops import attention
from moe_jax.parallel import chips

# Peak FLOP/s of one device for dense bfloat16 matrix products, from the vendors' data sheets.
PEAK_FLOPS = {chip.device_kind: chip.flops for chip in chips.CHIPS.values()}


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a step of a run."""

    tokens_per_step: int
    model_flops_per_token: float
    analytic_flops_per_token: float
    peak_flops: float  # of all devices together, in FLOP/s


def costs(run: configs.Run, frozen: Iterable[ModelConfig]) -> Costs:
    """The costs on this machine's devices, with the forward passes of frozen models."""
    length = run.data.sequence_length
    # A forward pass is a third of the FLOPs of forward and backward pass.
    forward = sum(model_flops(config, length) / 3 for config in frozen)
    return Costs(
        tokens_per_step=run.training.batch_size * length,
        model_flops_per_token=model_flops(run.model, length) + forward,
        analytic_flops_per_token=analytic_flops(run.model, length),
        peak_flops=peak_flops(jax.devices()[0]) * jax.device_count(),
    )


def _products(config: ModelConfig) -> dict[str, float]:
    """Multiply-adds of one token's forward pass by kind, over all layers, excluding attention."""
    D, H = config.hidden_size, config.head_size
    N, K = config.num_attention_heads, config.num_kv_heads
    sparse = config.layer_kinds.count(MOE)
    dense = config.num_hidden_layers - sparse
    attentions = config.num_attention_experts or 1
    row, E = ROUTERS[config.router], config.num_experts
    routers = sparse * E * (D * row.products + E * row.inner_products)
    per_token: float = config.active_experts
    if config.dispatch == "merge":  # the cost of merging, divided among a segment's tokens
        per_token += config.num_experts / config.merge_segment_length
    shared = config.shared_expert_intermediate_size or 0
    neurons: float = dense * config.intermediate_size
    neurons += sparse * (per_token * config.expert_size + shared)
    return {
        "projections": config.num_hidden_layers * attentions * D * H * (2 * N + 2 * K),
        "router": routers + D * config.num_hidden_layers * config.num_attention_experts,
        "gate_up": (1 + config.gated_mlp) * D * neurons,
        "down": D * neurons,
        "head": D * config.vocab_size,
    }


def _heads(config: ModelConfig) -> int:
    """Multiply-adds per layer for all heads' queries of one token times one position's keys."""
    return config.num_attention_heads * config.head_size * (config.num_attention_experts or 1)


def _windows(config: ModelConfig) -> dict[int | None, int]:
    """The number of layers with each attention window."""
    return collections.Counter(kind.window for kind in config.block_kinds)


def model_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per trained token: active parameters, causal attention, backward = 2x forward."""
    T, pairs = sequence_length, 0.0
    for window, number in _windows(config).items():
        W = min(window or T, T)
        pairs += number * W * (2 * T - W + 1) / 2
    return 6 * (sum(_products(config).values()) + 2 * _heads(config) * (pairs / T))


# The matrix products that each remat policy recomputes, besides elementwise operations. The down
# projection is never recomputed, because no gradient needs its result.
AGAIN = {
    "none": (),
    "full": ("projections", "attention", "router", "gate_up"),
    "save_experts": ("projections", "attention", "router"),
    "save_dots": ("saved_attention",),
}
AGAIN |= {"offload_experts": AGAIN["save_experts"], "offload_dots": AGAIN["save_dots"]}


def analytic_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per trained token that the compiled step should execute in matrix products.

    For attention it counts the positions that the implementation on the mesh's platform visits, and
    the products that it computes with them.
    """
    products, T = _products(config), sequence_length
    forward = backward = saved = 0.0
    for window, number in _windows(config).items():
        pairs = attention.executed_pairs(
            T, config.attention, H=config.head_size, dtype=config.dtype, window=window
        )
        per_token = number * _heads(config) / T
        forward += per_token * pairs.forward
        backward += per_token * pairs.backward
        saved += per_token * pairs.from_saved
    repeatable = {**products, "attention": forward, "saved_attention": saved}
    again = sum(repeatable[name] for name in AGAIN[config.remat])
    return 2 * (3 * sum(products.values()) + forward + backward + again)


def peak_flops(device: jax.Device) -> float:
    """The device's peak FLOP/s: from the table, or else measured with a matrix product."""
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak
    size = 1024
    x = jax.device_put(jnp.ones((size, size)), device)
    square = jax.jit(lambda x: x @ x)
    square(x).block_until_ready()  # compiles
    seconds = timeit.repeat(lambda: square(x).block_until_ready(), number=1, repeat=5)
    return 2 * size**3 / min(seconds)
