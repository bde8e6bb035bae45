"""Converts a folder's tensors to leaves of our parameter tree and back, part by part."""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from moe_jax import model, tree
from moe_jax.hf import safetensors
from moe_jax.hf.families import IGNORED, Entry, Family, Table
from moe_jax.model.layout import layer_groups
from moe_jax.parallel import distributed

MOST_PARTS = 200_000  # listed for a folder of fewer tensors, which may have its experts stacked


class MismatchError(ValueError):
    """A folder's tensors do not match its config.json; the message lists the differences."""


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """A tensor of a folder, or part of one: a leaf for one layer or one expert of a layer."""

    path: str  # in our tree, "blocks/0/moe/experts/up"
    row: tuple[int, ...]  # leading indices of the leaf: (), (layer) or (layer, expert)
    entry: Entry
    name: str  # the tensor's name
    shape: tuple[int, ...]  # the part's shape in our layout

    def tensor_shape(self) -> tuple[int, ...]:
        theirs, ours = _axes(self.entry.axes)
        size = dict(zip(ours, self.shape, strict=True))
        return tuple(
            math.prod(int(a) if a.isdigit() else size[a] for a in group) for group in theirs
        )


@functools.cache
def _axes(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Parses "(N H) D -> D N H" into (("N", "H"), ("D",)) and ("D", "N", "H")."""
    theirs, ours = axes.split(" -> ")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", theirs)
    return tuple(tuple((fused or one).split()) for fused, one in groups), tuple(ours.split())


def shapes(config: model.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of the model's parameters."""
    abstract = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in tree.flatten(abstract).items()}


def tensor_parts(config: model.ModelConfig, table: Table) -> Iterator[TensorPart]:
    """All parts of a model: those outside the layers, then layer by layer, expert by expert."""
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


def count_parts(config: model.ModelConfig, table: Table) -> int:
    """The length of `tensor_parts`, without a list of them."""
    number = 0
    for path, shape in shapes(config).items():
        apart = path.startswith("blocks/") and "{expert}" in table[path.split("/", 2)[2]].name
        number += math.prod(shape[: 1 + apart]) if path.startswith("blocks/") else 1
    return number


def match(
    config: model.ModelConfig, family: Family, tensors: dict[str, safetensors.Tensor]
) -> list[TensorPart]:
    """The parts of the family's layout that fits the tensors.

    Names without the family's prefix are accepted only where both Transformers 4 and 5 accept them:
    in a tied model saved without its head.

    Raises: MismatchError with the missing, extra and misshapen tensors of the closest layout, or
      with the part of the name that most tensors have in excess or lack.
    """
    found = {name for name in tensors if not re.search(IGNORED, name)}
    tables, tied = (family.table, *family.read_only), config.tie_word_embeddings
    bare = family.without_prefix()
    if tied and bare[0]["embed/tokens"].name in found and "lm_head.weight" not in found:
        tables = bare
    if tied:
        found.discard("lm_head.weight")  # a copy of the embedding; the caller compares the two

    def problems(layout) -> list[list[str]]:
        wanted = {part.name: part.tensor_shape() for part in layout}
        return [
            [f"{name} is missing" for name in wanted if name not in found],
            [f"{name} is not part of this model" for name in sorted(found - set(wanted))],
            [
                f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
                for name, shape in wanted.items()
                if name in found and tensors[name].shape != shape
            ],
        ]

    for table in tables:
        if (number := count_parts(config, table)) > max(MOST_PARTS, 4 * len(found)):
            raise MismatchError(
                f"num_hidden_layers={config.num_hidden_layers} and num_experts="
                f"{config.num_experts} make {number:,} tensors, but the files hold {len(found):,}"
            )
    layouts = [list(tensor_parts(config, table)) for table in tables]
    wrong = [problems(layout) for layout in layouts]
    number, best = min((sum(map(len, kinds)), i) for i, kinds in enumerate(wrong))
    if not number:
        return layouts[best]
    if renamed := _renamed(found, {part.name for part in layouts[best]}):
        raise MismatchError(renamed)
    shown = [problem for kind in wrong[best] for problem in kind[:4]]
    more = f" and {number - len(shown)} more" if number > len(shown) else ""
    raise MismatchError("; ".join(shown) + more)


def _renamed(found: set[str], wanted: set[str]) -> str:
    """A message if most names have an extra part ("_orig_mod.") or lack one ("model."); else "".

    Compiled and wrapped modules save such names, and Transformers does not find their tensors. Only
    a few missing names are matched, each with the unknown names most similar to it, so the time is
    linear in the number of names.
    """
    missing, strange = wanted - found, sorted(found - wanted)
    pairs = [(name, due) for due in sorted(missing)[:3] for name in _most_alike(due, strange)]
    for name, due in pairs:
        end = os.path.commonprefix([name.split(".")[::-1], due.split(".")[::-1]])
        first, other = (n.removesuffix(".".join(reversed(end))) for n in (name, due))
        new = {other + n.removeprefix(first) for n in strange if n.startswith(first)}
        wrapper = [s for s in name.split(".") if s not in due.split(".")]
        # The extra part can also be inside each layer's names.
        if _without(wrapper, name) == due and len(missing & new) < len(missing):
            first, other = f"{'.'.join(dict.fromkeys(wrapper))}.", ""
            new = {_without(wrapper, n) for n in strange}
        if 2 * len(missing & new) > len(missing):
            has = f"have {first!r}" if first else ""
            lack = f"lack {other!r}" if other else ""
            return (
                f"{len(missing & new)} names of tensors {' and '.join(filter(None, (has, lack)))}, "
                f"such as {name} for {due}; rename them in the file, or save the inner model by "
                "save_pretrained"
            )
    return ""


def _most_alike(due: str, names: list[str]) -> list[str]:
    """The first name whose segments are those of `due` plus others, and the first name with the
    longest common suffix."""
    segments = due.split(".")

    def length_of_end(name: str) -> int:
        return len(os.path.commonprefix([name.split(".")[::-1], segments[::-1]]))

    wrapped = (n for n in names if [s for s in n.split(".") if s in segments] == segments)
    return [*itertools.islice(wrapped, 1), *([max(names, key=length_of_end)] if names else [])]


def _without(segments: list[str], name: str) -> str:
    return ".".join(s for s in name.split(".") if s not in segments)


def read(part: TensorPart, tensor: safetensors.Tensor, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The slices `index` of this part in our layout; reads little more than the bytes needed."""
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


def copy(array: np.ndarray, out: np.ndarray) -> None:
    """Copies into an array of the same shape, column by column where `array` is transposed.

    numpy would copy row by row: 124 instead of 19 ms for [2048, 5632] in bfloat16.
    """
    if array.ndim < 2 or array.strides[-1] <= array.strides[-2]:
        out[...] = array
        return
    for column in range(0, array.shape[-1], 16):
        part = slice(column, column + 16)
        out[..., part] = array[..., part]


def assemble(parts: list[tuple[TensorPart, np.ndarray]]) -> np.ndarray:
    """Joins these parts into one tensor; most tensors have a single part."""
    theirs, ours = _axes(parts[0][0].entry.axes)
    order = [a for group in theirs for a in group]
    arrays = [array for _, array in sorted(parts, key=lambda part: part[0].entry.part)]
    digits = [a for a in order if a.isdigit()]
    whole, letters = (np.stack(arrays) if digits else arrays[0]), (*digits, *ours)
    whole = whole.transpose([letters.index(a) for a in order])
    return whole.reshape(parts[0][0].tensor_shape())


def converted(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """The array in another dtype, and the number of finite values beyond that dtype's range."""
    if array.dtype == dtype:
        return array, 0
    with np.errstate(over="ignore"):
        new = array.astype(dtype)
    return new, int(np.count_nonzero(np.isfinite(array) & ~np.isfinite(new)))


# The bits of the exponent, all set in an infinity and in no number.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000}


def count_not_finite(array: np.ndarray) -> int:
    """The number of NaNs and infinities; for bfloat16, numpy itself would take much longer."""
    if (exponent := EXPONENTS.get(str(array.dtype))) is None:
        return int(np.count_nonzero(~np.isfinite(array.astype(np.float64))))
    bits = array.view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(exponent)
    return int(np.count_nonzero((bits & exponent) == exponent))


def count_not_finite_in(tensor: safetensors.Tensor) -> int:
    """The number of NaNs and infinities of a whole tensor, which is read by parts."""
    if not tensor.shape:
        return count_not_finite(tensor.read())
    rows = max(1, 2**24 // max(1, math.prod(tensor.shape[1:])))
    parts = (slice(i, min(i + rows, tensor.shape[0])) for i in range(0, tensor.shape[0], rows))
    return sum(count_not_finite(tensor.read((part,))) for part in parts)


def refuse_not_finite(source: object, found: dict[str, int], *, allow: bool) -> None:
    """Names the tensors or leaves of `found`, each with its number of NaNs and infinities.

    Raises: ValueError unless `allow`, which prints the line.
    """
    listed = [f"{number} values of {name}" for name, number in list(found.items())[:8]]
    more = f" and others of {len(found) - 8} more" if len(found) > 8 else ""
    line = f"{source}: {', '.join(listed)}{more} are not finite"
    if not allow:
        raise ValueError(
            f"{line}; the model computes nothing: mend it elsewhere, or allow them by "
            "--allow_nonfinite, in a config by init.allow_nonfinite=True"
        )
    distributed.say(f"{line}: this is allowed, results may be NaN")


def check_beyond(dtype: np.dtype, beyond: dict[str, int]) -> None:
    """Raises ValueError if `beyond`, a count per tensor, has values beyond the range of `dtype`."""
    if lost := {name: number for name, number in beyond.items() if number}:
        named = ", ".join(f"{number} of {name}" for name, number in list(lost.items())[:8])
        more = f" and others of {len(lost) - 8} more tensors" if len(lost) > 8 else ""
        raise ValueError(
            f"{sum(lost.values())} values are beyond the largest of {dtype}, "
            f"{float(ml_dtypes.finfo(dtype).max):g}: {named}{more}; choose float32 or bfloat16"
        )


def cast(params: dict, dtype: str) -> dict:
    """Parameters in another dtype; raises ValueError for finite values beyond its range."""
    new = np.dtype(dtype)
    pairs = {path: converted(np.asarray(leaf), new) for path, leaf in tree.flatten(params).items()}
    check_beyond(new, {path: number for path, (_, number) in pairs.items()})
    return tree.unflatten({path: leaf for path, (leaf, _) in pairs.items()})
