"""Leaves of our parameter tree out of a folder's tensors and back, part by part."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

from moe_jax import model, tree
from moe_jax.hf import safetensors
from moe_jax.hf.families import IGNORED, Entry, Family, Table
from moe_jax.model.layout import layer_groups


class MismatchError(ValueError):
    """A folder's tensors are not those of its config.json; the text lists what and where."""


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """A tensor of a folder or a part of one: one leaf of one layer, or of one of its experts."""

    path: str  # in our tree, "blocks/0/moe/experts/up"
    row: tuple[int, ...]  # leading indices of the leaf: (), (layer) or (layer, expert)
    entry: Entry
    name: str  # of the tensor
    shape: tuple[int, ...]  # in our layout

    def tensor_shape(self) -> tuple[int, ...]:
        theirs, ours = _axes(self.entry.axes)
        size = dict(zip(ours, self.shape, strict=True))
        return tuple(
            math.prod(int(a) if a.isdigit() else size[a] for a in group) for group in theirs
        )


@functools.cache
def _axes(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """ "(N H) D -> D N H" to (("N", "H"), ("D",)) and ("D", "N", "H")."""
    theirs, ours = axes.split(" -> ")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", theirs)
    return tuple(tuple((fused or one).split()) for fused, one in groups), tuple(ours.split())


def shapes(config: model.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of the model's parameters."""
    abstract = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in tree.flatten(abstract).items()}


def tensor_parts(config: model.ModelConfig, table: Table) -> Iterator[TensorPart]:
    """All parts of a model: those in no layer, then layer by layer, expert by expert."""
    layers_of = {
        slot: layers
        for group in layer_groups(config.block_kinds)
        for slot, layers in group.layers.items()
    }
    in_layers = []
    for path, shape in shapes(config).items():
        if not path.startswith("blocks/"):
            yield TensorPart(path, (), table[path], table[path].name, shape)
            continue
        _, slot, inner = path.split("/", 2)
        entry = table[inner]
        apart = "{expert}" in entry.name
        for row, layer in enumerate(layers_of[slot]):
            for expert in range(shape[1]) if apart else (0,):
                name = entry.name.format(layer=layer, expert=expert)
                index = (row, expert) if apart else (row,)
                part = TensorPart(path, index, entry, name, shape[len(index) :])
                in_layers.append(((layer, expert if apart else -1), part))
    yield from (part for _, part in sorted(in_layers, key=lambda item: item[0]))


def match(
    config: model.ModelConfig, family: Family, tensors: dict[str, safetensors.Tensor]
) -> list[TensorPart]:
    """The parts of the family's layout that fits the tensors.

    Raises: MismatchError with the missing, extra and misshapen tensors of the closest layout.
    """
    found = {name for name in tensors if not re.search(IGNORED, name)}
    if config.tie_word_embeddings:
        found.discard("lm_head.weight")  # the embedding once more; the caller compares them

    def problems(layout):
        wanted = {part.name: part.tensor_shape() for part in layout}
        return [
            *(f"{name} is missing" for name in wanted if name not in found),
            *(f"{name} is not part of this model" for name in sorted(found - set(wanted))),
            *(
                f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
                for name, shape in wanted.items()
                if name in found and tensors[name].shape != shape
            ),
        ]

    layouts = [list(tensor_parts(config, table)) for table in (family.table, *family.read_only)]
    best = min(layouts, key=lambda layout: len(problems(layout)))
    if wrong := problems(best):
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise MismatchError("; ".join(wrong[:8]) + more)
    return best


def read(part: TensorPart, tensor: safetensors.Tensor, index: tuple[slice, ...] = ()) -> np.ndarray:
    """`index` of our array of this part; reads little more than the bytes that it needs."""
    theirs, ours = _axes(part.entry.axes)
    size = dict(zip(ours, part.shape, strict=True))
    index = (*index, *(slice(None),) * (len(ours) - len(index)))
    wanted = {a: range(size[a])[i] for a, i in zip(ours, index, strict=True)}
    ranges, split, order = [], [], []
    for group in theirs:
        letters = [a for a in group if not a.isdigit()]
        first, *inner = letters
        width = math.prod(size[a] for a in inner)
        base = part.entry.part * size[first] * width if group[0].isdigit() else 0
        own = wanted[first]
        ranges.append(slice(base + own.start * width, base + own.stop * width))
        split += [len(own), *(size[a] for a in inner)]
        order += letters
        wanted[first] = range(len(own))
    block = tensor.read(tuple(ranges)).reshape(split)
    block = block.transpose([order.index(a) for a in ours])
    return block[tuple(slice(wanted[a].start, wanted[a].stop) for a in ours)]


def assemble(parts: list[tuple[TensorPart, np.ndarray]]) -> np.ndarray:
    """The tensor of these parts; most tensors have one."""
    theirs, ours = _axes(parts[0][0].entry.axes)
    order = [a for group in theirs for a in group]
    arrays = [array for _, array in sorted(parts, key=lambda part: part[0].entry.part)]
    digits = [a for a in order if a.isdigit()]
    whole, letters = (np.stack(arrays) if digits else arrays[0]), (*digits, *ours)
    whole = whole.transpose([letters.index(a) for a in order])
    return whole.reshape(parts[0][0].tensor_shape())


def cast(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype), params)
