"""The small pure functions that every block uses: norms, matrix products, feed-forward."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.model import remat
from moe_jax.model.config import ModelConfig
from moe_jax.ops import grouped_matmul, stacks

# The keys are Hugging Face's names; gelu_new, gelu_fast and gelu_pytorch_tanh are one formula.
_GELU_TANH = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

# With more rows, copying a matrix out of the stack takes little of its product's time.
FEW_ROWS = 64


def norm_shapes(config: ModelConfig, *shape: int) -> dict:
    """The parameters of a norm over the last axes of sizes `shape`, by default the hidden size."""
    names = ("scale",) if config.norm == "rms" else ("scale", "bias")
    return dict.fromkeys(names, shape or (config.hidden_size,))


def ffn_shapes(config: ModelConfig, width: int) -> dict:
    """The matrices of one feed-forward function of `width` neurons, and its biases if any."""
    D, F = config.hidden_size, width
    inner = ("gate", "up") if config.gated_mlp else ("up",)
    shapes: dict = {**dict.fromkeys(inner, (D, F)), "down": (F, D)}
    if config.mlp_bias:
        shapes |= {**{f"{name}_bias": (F,) for name in inner}, "down_bias": (D,)}
    return shapes


def mlp_shapes(config: ModelConfig) -> dict:
    return {"norm": norm_shapes(config), **ffn_shapes(config, config.intermediate_size)}


Matrix = jax.Array | stacks.OfStack


def product(x: jax.Array, w: Matrix, contracted: int = 1) -> jax.Array:
    """Contracts the last `contracted` axes of x with the first ones of w; the result has x's dtype.

    The rows are flattened into one axis because XLA:CPU takes twice as long for the gradient of w
    with several axes of rows (a SwiGLU of 2048 rows, D=256, F=1024, with its gradients: 159 ms as
    [8, 256, D], 85 ms as [2048, D]).
    """
    return products(x, (w,), contracted)[0]


def products(
    x: jax.Array, weights: tuple[Matrix, ...], contracted: int = 1
) -> tuple[jax.Array, ...]:
    """`product` of x with each of `weights`; few rows read the weights where they lie."""
    rows, size = x.shape[: x.ndim - contracted], math.prod(x.shape[x.ndim - contracted :])
    x_MD = x.reshape(-1, size)
    if len(x_MD) <= FEW_ROWS and grouped_matmul.reads_in_place(x, weights):
        matrices = tuple(_as_one_expert(w, size) for w in weights)
        ys = grouped_matmul.grouped_matmuls(x_MD, matrices, jnp.array([len(x_MD)], jnp.int32))
    else:
        ys = tuple(x_MD @ w.astype(x.dtype).reshape(size, -1) for w in stacks.values(weights))
    return tuple(y.reshape(*rows, *w.shape[contracted:]) for y, w in zip(ys, weights, strict=True))


LOW_RANK = ("lora_a", "lora_b")  # the ends of the names of a matrix's low-rank pair


def low_rank_pair(name: str) -> tuple[str, ...]:
    """The names of the low-rank pair of a matrix."""
    return tuple(f"{name}_{end}" for end in LOW_RANK)


def add_low_rank(
    y: jax.Array, x: jax.Array, params: dict, name: str, product: Callable
) -> jax.Array:
    """y = x W plus (x A) B, if the matrix `name` has a low-rank pair.

    LoRA (Hu et al., arXiv 2106.09685, §4.1). A B itself is never made: its gradient would be that
    of the whole matrix. `product(x, name)` is x times the parameter of this name.
    """
    a, b = low_rank_pair(name)
    return y + product(product(x, a), b) if a in params else y


def projected(
    x: jax.Array, params: dict, names: tuple[str, ...], contracted: int = 1
) -> tuple[jax.Array, ...]:
    """`products` of x with the matrices of these names and their low-rank pairs."""
    ys = products(x, tuple(params[name] for name in names), contracted)

    def of_pair(x, name):
        return product(x, params[name], contracted if name.endswith(LOW_RANK[0]) else 1)

    return tuple(
        add_low_rank(y, x, params, name, of_pair) for y, name in zip(ys, names, strict=True)
    )


def _as_one_expert(w: Matrix, size: int) -> stacks.OfStack:
    """The row of a stack, which is a matrix, as one expert: [1, D, F]."""
    assert isinstance(w, stacks.OfStack)
    return stacks.OfStack(
        w.value.reshape(1, size, -1), w.stack.reshape(len(w.stack), 1, size, -1), w.index
    )


def add_bias(x: jax.Array, params: dict, name: str) -> jax.Array:
    """x plus the bias of this name, if the model has one."""
    return x + params[name].astype(x.dtype) if name in params else x


def norm(x: jax.Array, params: dict, config: ModelConfig) -> jax.Array:
    """Normalises as many last axes as the scale has, in float32; the scale is cast to x's dtype.

    "rms" is the root mean square (Zhang & Sennrich, arXiv 1910.07467); "layer" subtracts the mean
    and has a bias (Ba et al., arXiv 1607.06450); "layer_1p" is "layer" whose stored parameter is
    the scale minus 1.
    """
    axes = tuple(range(-params["scale"].ndim, 0))
    x32, scale = x.astype(jnp.float32), params["scale"]
    if config.norm != "rms":
        x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
    if config.norm == "layer_1p":
        scale = 1 + scale
    square = jnp.mean(x32 * x32, axis=axes, keepdims=True)
    unit = (x32 * jax.lax.rsqrt(square + config.rms_norm_eps)).astype(x.dtype)
    return add_bias(unit * scale.astype(x.dtype), params, "bias")


def feed_forward(x: jax.Array, params: dict, config: ModelConfig) -> jax.Array:
    """down(act(gate x) * up x) (Shazeer, arXiv 2002.05202), or down(act(up x)) without a gate."""

    @remat.made_again
    def down(hidden):
        [y] = projected(activate(hidden, config), params, ("down",))
        return add_bias(y, params, "down_bias")

    inner = tuple(name for name in ("gate", "up") if name in params)
    hidden = projected(x, params, inner)
    hidden = tuple(add_bias(h, params, f"{n}_bias") for n, h in zip(inner, hidden, strict=True))
    return down(remat.named("gate_up", hidden))


def activate(hidden: tuple[jax.Array, ...], config: ModelConfig) -> jax.Array:
    """act(gate) * up for (gate, up), or act(up) for (up,)."""
    first, *up = hidden
    y = ACTIVATIONS[config.hidden_act](first)
    return y * up[0] if up else y


def mlp(x_BTD: jax.Array, params: dict, config: ModelConfig) -> jax.Array:
    """A dense layer's norm and feed-forward: [B, T, D], to be added to x."""
    return feed_forward(norm(x_BTD, params["norm"], config), params, config)
