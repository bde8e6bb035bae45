"""Counts the matrix products and collectives that a compiled step executes, from its HLO text.

`cost_analysis()` counts the body of a loop once and most kernels not at all; here everything is
multiplied by the trip counts of the enclosing loops. For a conditional, the most expensive branch
counts. The text may come from CPU or TPU. On TPU a matrix product is a `convolution` (the batch
dimension of a batched product is a window over an input dilated so far that nearly all positions
fall between its elements), a Pallas kernel is a custom call, and a collective that overlaps with
products appears in every fusion that it overlaps with.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from moe_jax.dryrun import hlo_text

_KERNEL = 'custom_call_target="tpu_custom_call"'
_HOST_CALL = re.compile(r'custom_call_target="moe_jax_.*\bflops = (\d+)')  # ops/host_call.py
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*?"flops":"(\d+)"')
_WITHOUT_PRODUCTS = ("ragged-dot-metadata",)  # XLA's own kernel, which prepares a ragged dot
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
_COLLECTIVES |= {"ragged-all-to-all", "reduce-scatter"}
_BETWEEN_SLICES = 'handler_name="xla_megascale_runtime"'
_TRANSFER = re.compile(r'_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_transfer_rendezvous="([^"]+)"')
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_GROUPS_IOTA = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_GROUPS_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))? \{{([^}}]*)\}}"
)


def product_flops(
    text: str, *, kernels: Mapping[str, int] | None = None, filled: float = 1.0
) -> int:
    """FLOPs of the matrix products that one device executes, 2 for each multiply-add.

    For a Pallas kernel on TPU it takes the estimate in the call, which for megablox and
    `jax.lax.ragged_dot` is `2mkn` and does not include the padding of incomplete tiles; likewise
    for a product computed by the host (`ops/host_call.py`). A product with a vector is elementwise
    work on TPU and does not count there.

    Args:
      kernels: regular expression -> FLOPs of one call. The first one found in a kernel's name
        counts, instead of the estimate or if there is none (splash attention).
      filled: for kernels with an estimate, the fraction of rows that are in a group; other rows are
        not processed.

    Raises: ValueError for a loop around products whose trip count is unknown, and for a kernel with
      neither an estimate nor an entry in `kernels`.
    """
    module = hlo_text.Module(text)

    def own(computation, i):
        if i.operation in ("dot", "convolution"):
            left, right = (module.named[computation][x].shapes[0] for x in i.operands)
            flops = _dot_flops(i, left) if i.operation == "dot" else _window_flops(i, left, right)
            return {"flops": flops}
        if called := _HOST_CALL.search(i.rest):
            return {"flops": round(int(called[1]) * filled)}
        return {"flops": _kernel_flops(i, kernels or {}, filled)} if _KERNEL in i.rest else {}

    return module.total(own)["flops"]


def _search(pattern: str | re.Pattern, attributes: str) -> re.Match:
    if found := re.search(pattern, attributes):
        return found
    raise ValueError(f"an instruction without {pattern!r}: {attributes[:200]}")


def _dot_flops(dot: hlo_text.Instruction, left: tuple[int, ...]) -> int:
    contracted = _search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
    sizes = [left[int(axis)] for axis in contracted.split(",") if axis]
    return 2 * math.prod(dot.shapes[0]) * math.prod(sizes)


def _window_flops(
    convolution: hlo_text.Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> int:
    """FLOPs on actual elements, excluding padding and the zeros inserted by dilation."""
    labels = _search(r"dim_labels=([a-z\d]+)_([a-z\d]+)->([a-z\d]+)", convolution.rest)
    shapes = zip(labels.groups(), (left, right, convolution.shapes[0]), strict=True)
    image, kernel, result = (dict(zip(*pair, strict=True)) for pair in shapes)
    found = re.search(r"window=\{([^}]*)\}", convolution.rest)
    window = dict(field.split("=") for field in found[1].split()) if found else {}
    # With feature groups or batch groups, the kernel has only the features of one group.
    flops = 2 * result["b"] * result["f"] * kernel["i"]
    for axis, key in enumerate(sorted(key for key in image if key.isdigit())):
        defaults = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
        for name in defaults.keys() & window.keys():
            defaults[name] = int(window[name].split("x")[axis].split("_")[0])
        flops *= _positions(image[key], result[key], *defaults.values())
    return flops


@functools.cache
def _positions(
    image: int, result: int, size: int, stride: int, pad: int, spread: int, step: int
) -> int:
    """The number of pairs of a window element and an image element that meet along one axis."""
    total, first = 0, np.arange(result) * stride - pad
    for at in (first + k * step for k in range(size)):
        on = (at >= 0) & (at <= (image - 1) * spread) & (at % spread == 0)
        total += int(np.count_nonzero(on))
    return total


def _kernel_name(call: hlo_text.Instruction) -> str:
    """The innermost scope around `pallas_call`. It is preferred to the instruction's name: with jax
    0.12 that is an operand's, such as gmm.1.rhs, if another kernel takes the result."""
    if scopes := re.search(r'op_name="([^"]+)"', call.rest):
        scope = scopes[1].removesuffix("/pallas_call").split("/")[-1]
        return [name for name in re.split(r"[()]", scope) if name][-1]
    return re.sub(r"(\.(\d+|clone|remat\d*))+$", "", call.name)


def _kernel_flops(call: hlo_text.Instruction, kernels: Mapping[str, int], filled: float) -> int:
    name = _kernel_name(call)
    for pattern, flops in kernels.items():
        if re.search(pattern, name):
            return flops
    if estimate := _ESTIMATE.search(call.rest):
        return round(int(estimate[1]) * filled)
    if name in _WITHOUT_PRODUCTS:
        return 0
    raise ValueError(f"kernel {name} has no cost estimate; give the FLOPs of one call in kernels=")


def kernel_calls(text: str) -> dict[str, int]:
    """The number of calls of each Pallas kernel per step in TPU text, by its `pallas_call` name."""
    count = hlo_text.Module(text).total(
        lambda _, i: {_kernel_name(i): 1} if _KERNEL in i.rest else {}
    )
    return dict(sorted(count.items()))


SLICES = ("slices",)  # `axes` of collectives between TPU slices, which use another network


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """All collectives of one kind over one set of mesh axes, for one device and one step."""

    operation: str  # all-gather, all-reduce, all-to-all, collective-permute, …
    axes: tuple[str, ...]  # in the mesh's order; ("?",) if no axes form the groups; or SLICES
    count: int
    bytes: int  # bytes of the results; for a reduce-scatter, of the operands


def collectives(text: str, axes: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives of one step, sorted by operation and axes.

    `bytes` counts the result on one device, without padding: the whole array of an all-gather or
    all-reduce, everything that a device holds after an all-to-all, and the smaller buffer of a
    ragged all-to-all (one of its two buffers has room for the worst case). For a reduce-scatter it
    counts the operand, which is larger. The axes of a collective are those along which the members
    of a group differ, so never an axis of size 1; the source and target of a permutation are such
    members. With several slices the text is the program of one slice: a collective over all devices
    becomes one within each slice, and one between slices with SLICES as axes.

    Args: axes: names and sizes of the mesh's axes within one slice, in its order; devices are
      numbered row by row.
    """
    module = hlo_text.Module(text)
    sent = {
        _search(_RENDEZVOUS, i.rest)[1]: i.sizes[0]
        for instructions in module.computations.values()
        for i in instructions
        if i.operation == "send" and _BETWEEN_SLICES in i.rest
    }

    def own(computation, i):
        if i.operation == "recv" and _BETWEEN_SLICES in i.rest:
            operation = _search(_TRANSFER, i.rest)[1].lower().replace("_", "-")
            size = max(i.sizes[0], sent.get(_search(_RENDEZVOUS, i.rest)[1], 0))
            row = operation, SLICES
            return {(row, "count"): 1, (row, "bytes"): size}
        operation = i.operation.removesuffix("-start")
        if operation not in _COLLECTIVES or _is_repeated(module, computation, i.name):
            return {}
        size, number = sum(i.sizes), len(i.operands)
        operands = [sum(module.named[computation][x].sizes) for x in i.operands]
        if i.operation in ("all-gather-start", "collective-permute-start"):
            size = sum(i.sizes[number : 2 * number])  # between the operands and the semaphores
        if computation.startswith("all-reduce-scatter"):  # on TPU: an all-reduce and a slice
            operation = "reduce-scatter"
        elif operation == "reduce-scatter":
            size = max(size, sum(operands))
        elif operation == "ragged-all-to-all":
            size = min(operands[0], size)
        row = operation, _axes(i.rest, axes)
        return {(row, "count"): 1, (row, "bytes"): size}

    total = module.total(own)
    rows = sorted({row for row, _ in total})
    return tuple(Collective(a, b, total[(a, b), "count"], total[(a, b), "bytes"]) for a, b in rows)


def _is_repeated(module: hlo_text.Module, computation: str, collective: str) -> bool:
    """True for a collective repeated in TPU text: in the fusions that overlap with it or end it,
    after the fusion that starts it. The channel does not identify it, because several collectives
    may share one."""
    ends = [i for i in module.computations[computation] if '"AsyncCollective' in i.rest]
    if not ends and not computation.startswith("async_collective_fusion"):
        return False
    starts = [i.operands for i in ends if '"AsyncCollectiveStart"' in i.rest]
    return not any(collective in operands for operands in starts)


def _axes(attributes: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    devices = math.prod(axes.values())
    groups = _groups(attributes, devices)
    if max(map(max, groups)) >= devices:
        return ("?",)
    places = [np.stack(np.unravel_index(group, tuple(axes.values()))) for group in groups]
    moves = np.any([np.ptp(place, axis=1) > 0 for place in places], axis=0)
    moving = {name: size for (name, size), moved in zip(axes.items(), moves, strict=True) if moved}
    if "source_target_pairs" in attributes:
        return tuple(moving)
    sizes = [len(group) for group in groups]
    whole = set(sizes) == {math.prod(moving.values())} and sum(sizes) == devices
    return tuple(moving) if whole else ("?",)


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """The devices of each group, or the pairs of a permutation."""
    if found := _GROUPS.search(attributes):
        groups = [_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return groups or [list(range(devices))]
    if found := _GROUPS_IOTA.search(attributes):
        return _iota(found[2], found[3]).reshape(_integers(found[1])).tolist()
    if not (found := _GROUPS_MESH.search(attributes)):
        raise ValueError(f"a collective whose groups cannot be read: {attributes[:200]}")
    mesh, dims, order, listed, grouped = found.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    ids = _integers(listed) if listed else _iota(dims or str(devices), order).ravel().tolist()
    # The devices of a group have equal coordinates along all axes that the group does not span. It
    # may span a sub-axis, written a:(before)part: axis a is split into before x part x rest, and
    # the group spans `part`.
    rest = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    for name, before, part in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", grouped):
        part = int(part or sizes[name])
        after = sizes[name] // (int(before or 1) * part)
        row = rest[list(sizes).index(name)]
        row -= row // after % part * after
    members: dict[tuple, list[int]] = collections.defaultdict(list)
    for device, key in zip(ids, map(tuple, rest.T.tolist()), strict=True):
        members[key].append(device)
    return list(members.values())


def _iota(dims: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return numbers.transpose(_integers(order)) if order else numbers


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def buffer_shapes(text: str) -> set[tuple[int, ...]]:
    """All shapes that instructions of the text produce."""
    computations, _ = hlo_text.parse(text)
    return {shape for c in computations.values() for i in c for shape in i.shapes}
