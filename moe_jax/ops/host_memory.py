"""Experts in the host's memory beside an accelerator: those that rows chose are sent to the chip.

Eliseev and Mazur (arXiv 2312.17238) keep a model's experts outside the accelerator's memory. Here
the compiled program itself copies them, so that it knows which ones only after the router.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

KIND = "pinned_host"  # JAX's name of the memory from which a chip can copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostExperts:
    """One matrix of all experts of all layers of a slot, or of one layer in a scan over them."""

    stack_XDF: Any  # X = L·E, in the host's memory; a scan would copy it
    layer: jax.Array  # its number among the layers of the slot, int32 [L] or []
    matrices: tuple[int, int, int] = dataclasses.field(metadata={"static": True})  # E, D, F

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.matrices


def is_in_host(x: Any) -> bool:
    return isinstance(x, HostExperts)


def without_stacks(tree: Any) -> Any:
    """What a scan over the layers may have of them."""
    return jax.tree.map(
        lambda x: dataclasses.replace(x, stack_XDF=None) if is_in_host(x) else x,
        tree,
        is_leaf=is_in_host,
    )


def sent(
    weights: tuple[HostExperts, ...], group_sizes_E: jax.Array, num_rows: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The matrices [n, D, F] of the experts that have rows, on the device, and their groups' sizes.

    n is the number of experts, or of rows if these are fewer. If fewer experts have rows, the last
    of these is sent again with no rows.
    """
    E = weights[0].shape[0]
    if num_rows >= E:
        return tuple(_slice(w, w.layer * E, E) for w in weights), group_sizes_E
    has_rows_E = group_sizes_E > 0
    last = E - 1 - jnp.argmax(has_rows_E[::-1])
    (expert_n,) = jnp.nonzero(has_rows_E, size=num_rows, fill_value=last)
    is_new_n = jnp.arange(num_rows) < jnp.sum(has_rows_E)
    sizes_n = jnp.where(is_new_n, group_sizes_E[expert_n], 0)
    chosen = (
        jnp.concatenate([_slice(w, w.layer * E + expert_n[i], 1) for i in range(num_rows)])
        for w in weights
    )
    return tuple(chosen), sizes_n


def _slice(w: HostExperts, first, number: int) -> jax.Array:
    # XLA:TPU copies slices along one axis only.
    here = jax.lax.dynamic_slice_in_dim(w.stack_XDF, first, number)
    return jax.device_put(here, jax.memory.Space.Device)
