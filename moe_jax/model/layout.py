"""Layer groups: layers that repeat are stacked, so that they are traced and compiled once.

Because the leaves of blocks are stacked, this module is also the only way to reach the parameters
of one layer.
"""

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator
from typing import Any

import jax

from moe_jax.model.config import MOE, BlockKind, ModelConfig
from moe_jax.ops import host_memory, offloaded, stacks

_FEED_FORWARD = ("gate", "up", "down")
MATRICES = {
    *(("attention", name) for name in ("wq", "wk", "wv", "wo")),
    *((part, name) for part in ("mlp", "shared", "experts") for name in _FEED_FORWARD),
}


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """A repeating pattern of layer kinds; its parameters are stacked and scanned.

    `layers[slot]` are the indices of the layers at that slot of the pattern, one for each repeat.
    Slots are numbered "0", "1", … across all layer groups of a model.
    """

    kinds: dict[str, Any]
    layers: dict[str, tuple[int, ...]]

    @property
    def repeats(self) -> int:
        return len(next(iter(self.layers.values())))


@functools.lru_cache
def layer_groups(kinds: tuple[Hashable, ...]) -> tuple[LayerGroup, ...]:
    """Splits a model's layers into the layer groups that trace the fewest blocks.

    A leading dense layer becomes a layer group of its own; LOLA's alternation of dense and sparse
    layers becomes one group with two slots.
    """
    # best[i] = (blocks traced, layer groups used, cuts) for the layers from i on.
    best: dict[int, tuple[int, int, tuple]] = {len(kinds): (0, 0, ())}
    for i in reversed(range(len(kinds))):
        options: list[tuple[int, int, tuple]] = []
        fewest = len(set(kinds[i:])), 1  # blocks and groups, of any way to split the rest
        for period in range(1, len(kinds) - i + 1):
            pattern, end = kinds[i : i + period], i
            while kinds[end : end + period] == pattern:
                end += period
                blocks, used, cuts = best[end]
                options.append((blocks + period, used + 1, ((i, period, end), *cuts)))
            if min(options)[:2] == fewest:
                break
        best[i] = min(options)
    groups, names = [], map(str, itertools.count())
    for start, period, end in best[0][2]:
        firsts = {next(names): first for first in range(start, start + period)}
        layers = {slot: tuple(range(first, end, period)) for slot, first in firsts.items()}
        groups.append(LayerGroup({slot: kinds[i] for slot, i in firsts.items()}, layers))
    return tuple(groups)


@functools.lru_cache
def slots(kinds: tuple[Hashable, ...]) -> tuple[tuple[str, int], ...]:
    """Each layer's slot, and its row in that slot's stack."""
    found = {
        layer: (slot, row)
        for group in layer_groups(kinds)
        for slot, layers in group.layers.items()
        for row, layer in enumerate(layers)
    }
    return tuple(found[layer] for layer in range(len(kinds)))


def layer(params: dict, config: ModelConfig, index: int, *path: str) -> dict:
    """The parameters of one layer, or the subtree at a path in them ("moe", "experts")."""
    slot, row = slots(config.block_kinds)[index]
    stacks = functools.reduce(dict.__getitem__, path, params["blocks"][slot])
    return jax.tree.map(lambda stack: stack[row], stacks)


def rows_of_stacks(params: dict, all_layers: dict, index: jax.Array) -> dict:
    """One layer's parameters, whose large matrices know where they lie in the stacks."""

    def row(path, value, stack):
        names = tuple(key.key for key in path)
        if host_memory.is_in_host(value):
            return dataclasses.replace(value, stack_XDF=stack.stack_XDF)
        in_stack = names[-2:] in MATRICES and not offloaded.is_offloaded(value)
        return stacks.row(value, stack, index) if in_stack else value

    def is_leaf(x):
        return offloaded.is_offloaded(x) or host_memory.is_in_host(x)

    return jax.tree_util.tree_map_with_path(row, params, all_layers, is_leaf=is_leaf)


def layers(params: dict, config: ModelConfig) -> Iterator[tuple[int, BlockKind, dict]]:
    """Each layer's index, kind and parameters, in the order of the model."""
    for index, kind in enumerate(config.block_kinds):
        yield index, kind, layer(params, config, index)


def sparse_layers(config: ModelConfig) -> list[int]:
    """The indices of the sparse layers."""
    return [index for index, kind in enumerate(config.layer_kinds) if kind == MOE]
