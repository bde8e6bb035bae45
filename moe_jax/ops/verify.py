"""Checks the values and gradients of ops' implementations against the reference on small cases.

`moe_jax doctor` checks all implementations; a training run checks those that it uses before its
first step. Kernels have been silently wrong on one chip with one version
(marin-community/marin#8339: a weight gradient, unless groups began at multiples of 64 rows).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops import attention, cross_entropy, grouped_matmul, implementations

# Errors are relative to the largest value. bfloat16 has 8 significant bits and rounds a few times
# in sequence; float32 has 24, and sums have a few hundred terms.
TOLERANCE = {"bfloat16": 4e-2, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Check:
    """`status` is "ok", "wrong" (beyond the tolerance), "fails" or "not here"."""

    op: str
    implementation: str
    status: str
    detail: str


# A case takes an implementation and a function that draws normal arrays of given shapes.


def _grouped_matmul(implementation: str, normal: Callable) -> list[jax.Array]:
    """Ragged groups, one of them empty and none a multiple of a tile, and rows beyond their sum."""
    *arrays, grad_MF = normal((200, 128), (4, 128, 128), (4, 128, 128), (200, 128))
    sizes_E = jnp.array([70, 0, 101, 9])

    def op(x_MD, gate_EDF, up_EDF):
        gate_MF, up_MF = grouped_matmul.grouped_matmuls(
            x_MD, (gate_EDF, up_EDF), sizes_E, implementation=implementation
        )
        return gate_MF * up_MF

    return _value_and_gradients(op, arrays, grad_MF)


def _attention(implementation: str, normal: Callable) -> list[jax.Array]:
    """Grouped queries: a row of two documents and a row of one, then documents of two tokens."""
    B, T, N, K, H = 2, 256, 4, 2, 128
    *arrays, grad_BTNH = normal((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    few_BT = jnp.where(jnp.arange(T) < jnp.array([[100], [T]]), 1, 2)
    many_BT = jnp.broadcast_to(1 + jnp.arange(T) // 2, (B, T))

    def both(*qkv):
        return sum(
            attention.attention(*qkv, segments_BT, implementation=implementation)
            for segments_BT in (few_BT, many_BT)
        )

    return _value_and_gradients(both, arrays, grad_BTNH)


def _cross_entropy(implementation: str, normal: Callable) -> list[jax.Array]:
    arrays = normal((2, 64, 128), (128, 256))
    targets_BT = jnp.arange(128).reshape(2, 64)

    def op(x_BTD, unembed_DV):
        weight_BT = jnp.full(targets_BT.shape, 1 / targets_BT.size)
        return cross_entropy.cross_entropy(
            x_BTD, unembed_DV / 16, targets_BT, weight_BT, implementation=implementation
        ).total

    return _value_and_gradients(op, arrays, jnp.ones(()))


CASES: dict[str, tuple[Callable, Mapping[str, implementations.Implementation]]] = {
    "grouped_matmul": (_grouped_matmul, grouped_matmul.IMPLEMENTATIONS),
    "attention": (_attention, attention.IMPLEMENTATIONS),
    "cross_entropy": (_cross_entropy, cross_entropy.IMPLEMENTATIONS),
}


def checks() -> Iterator[Check]:
    """A check for each implementation of each op, and for "auto"."""
    for op, (_, table) in CASES.items():
        for name in ("auto", *table):
            yield check(op, name)


@functools.cache
def check(op: str, name: str) -> Check:
    case, table = CASES[op]
    here = implementations.platform()
    dtype = "float32" if here == "cpu" else "bfloat16"
    if name != "auto" and (reason := implementations.why_not(table[name], here)):
        return Check(op, name, "not here", reason)
    try:
        found = case(name, functools.partial(_normal, dtype, dtype))
    except Exception as raised:  # a compiler or a kernel can raise any type
        text = " ".join(f"{type(raised).__name__}: {raised}".split())
        return Check(op, name, "fails", text[:200])
    errors = [
        np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        for a, b in zip(found, _expected(op, dtype), strict=True)
    ]
    error = float(np.nan_to_num(max(errors), nan=np.inf))
    status = "ok" if error <= TOLERANCE[dtype] else "wrong"
    picked = f"{implementations.pick(table, here)}, " if name == "auto" else ""
    detail = f"{picked}error {error:.1e}, tolerance {TOLERANCE[dtype]:.0e} in {dtype}"
    return Check(op, name, status, detail)


def verify(op: str, name: str) -> None:
    """Raises: ValueError, in one line, if implementation `name` of `op` cannot run or is wrong."""
    implementations.choose(op, name, CASES[op][1])
    found = check(op, name)
    if found.status != "ok":
        raise ValueError(
            f"{op} implementation={name!r} on this machine: {found.status}, {found.detail}; "
            "choose another, python scripts/doctor.py lists them"
        )


@functools.cache
def _expected(op: str, dtype: str) -> list[np.ndarray]:
    """The reference's results in float32 for inputs rounded to `dtype`."""
    with jax.default_matmul_precision("highest"):
        return jax.device_get(
            CASES[op][0]("reference", functools.partial(_normal, dtype, "float32"))
        )


def _normal(rounded_to: str, dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [
        jax.random.normal(jax.random.key(i), shape).astype(rounded_to).astype(dtype)
        for i, shape in enumerate(shapes)
    ]


def _value_and_gradients(op: Callable, arrays: list, cotangent: jax.Array) -> list[jax.Array]:
    @jax.jit
    def both(arrays, cotangent):
        value, transpose = jax.vjp(op, *arrays)
        return [value, *transpose(cotangent)]

    return both(arrays, cotangent)
