"""One layer's matrices, read where they lie in the stack of all layers.

XLA copies a layer out of its stack before a custom call or a library's matrix product reads it. For
a layer of experts these are all its experts, even when a few tokens choose two of them.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfStack:
    """Row `index` of a stack.

    An op that can read the row in place uses `stack` and `index`, any other op uses `value`, which
    is the row itself. What is not used is not computed. Only `value` receives a gradient.
    """

    value: Any
    stack: Any
    index: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype


def row(value: jax.Array, stack: jax.Array, index: jax.Array) -> OfStack:
    return OfStack(value, jax.lax.stop_gradient(stack), index)


def is_row(x: Any) -> bool:
    return isinstance(x, OfStack)


def all_experts(w: jax.Array | OfStack) -> tuple[jax.Array, Any]:
    """The experts of all layers as one array [L·E, D, F], and the number of the row's first."""
    if not isinstance(w, OfStack):
        return w, 0
    L, E, *matrix = w.stack.shape
    return w.stack.reshape(L * E, *matrix), w.index * E


def values(tree: Any) -> Any:
    """`tree` with each row's value in its place."""
    return jax.tree.map(lambda x: x.value if is_row(x) else x, tree, is_leaf=is_row)
