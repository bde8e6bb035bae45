"""Products with experts that are not in memory: a call fetches the matrices that its rows need.

Eliseev and Mazur (arXiv 2312.17238) keep a model's experts outside the accelerator's memory, keep
those that were used last inside it, and guess the next layer's experts by applying its router to
this layer's input. Here the experts lie outside of all memory, in the model's folder.
"""

import dataclasses
import itertools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops import grouped_host, host_call


class Store(Protocol):
    """Where the matrices come from; several threads may ask at once."""

    def matrix(self, layer: int, expert: int, name: str, *, again: bool) -> np.ndarray:
        """[D, F], of a sparse layer, numbered from 0; `again` for another part of a product."""

    def expect(self, layer: int, experts: list[int]) -> None:
        """These will probably be asked for next."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Offloaded:
    """One matrix of all experts of all sparse layers, or of one layer in a scan over the layers."""

    layer: jax.Array  # the number among the sparse layers, int32 [L] or []
    next_router: jax.Array | None  # [L, D, E] or [D, E]; only with the first matrix that is needed
    name: str = dataclasses.field(metadata={"static": True})
    matrices: tuple[int, int, int] = dataclasses.field(metadata={"static": True})  # E, D, F
    per_token: int = dataclasses.field(metadata={"static": True})
    store: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.matrices


def is_offloaded(x: Any) -> bool:
    return isinstance(x, Offloaded)


def register(store: Store) -> int:
    """A number by which a traced program can name the store."""
    number = next(_numbers)
    _STORES[number] = store
    return number


_STORES: dict[int, Store] = {}
_NAMES = ("gate", "up", "down")
_numbers = itertools.count()


def products(
    x_MD: jax.Array, weights: tuple[Offloaded, ...], group_sizes_E: jax.Array
) -> tuple[jax.Array, ...]:
    """`grouped_matmuls` in float32, with the same bits as if the matrices were in memory."""
    routers = (w.next_router for w in weights)
    guess = [_next_experts(x_MD, r, weights[0].per_token) for r in routers if r is not None]
    names = jnp.array([_NAMES.index(w.name) for w in weights], jnp.int32)
    integers = (group_sizes_E, weights[0].layer, jnp.int32(weights[0].store), names)
    return tuple(
        host_call.call(
            "moe_jax_offloaded_product",
            [jax.ShapeDtypeStruct((len(x_MD), w.shape[2]), jnp.float32) for w in weights],
            *(x_MD.astype(jnp.float32), *integers, *guess),
            flops=2 * len(x_MD) * sum(w.shape[1] * w.shape[2] for w in weights),
        )
    )


def _next_experts(x_MD, next_router_DE, per_token: int):
    """The experts that the next sparse layer's router chooses for the input of this layer."""
    # Otherwise XLA would merge this product with the one of this layer's router and round it anew.
    x_MD = jax.lax.optimization_barrier(x_MD)
    logits_ME = x_MD.astype(jnp.float32) @ next_router_DE.astype(jnp.float32)
    return jax.lax.top_k(logits_ME, per_token)[1]


def _product(inputs, outputs):
    x_MD, sizes_E, layer, number, names, *guess = inputs
    store, layer = _STORES[int(number)], int(layer)
    if guess:
        store.expect(layer + 1, np.unique(guess[0]).tolist())

    asked = set()

    def matrix(i, expert):
        again = (i, expert) in asked
        asked.add((i, expert))
        return store.matrix(layer, expert, _NAMES[names[i]], again=again)

    grouped_host.multiply(x_MD, matrix, sizes_E, outputs)


host_call.register("moe_jax_offloaded_product", _product)
