"""Counts the bytes that a compiled step moves to and from a device's main memory."""

import collections
import functools

from moe_jax.dryrun import hlo_text

_CONTROL = ("while", "conditional", "call", "call-start", "async-start")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "optimization-barrier", *_CONTROL}
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "convert", "copy")


def traffic(text: str, experts: int = 0) -> int:
    """Bytes that one device reads from and writes to main memory in one step.

    Each instruction reads its operands and writes its results once. If a fusion slices an array, it
    reads only the slice; if it updates one in place, it writes only the update. Arrays in a chip's
    on-chip memory (TPU's VMEM) do not count. An operand that a kernel reads several times counts
    once, so the sum is a lower bound.

    Args: experts: the number of experts of one layer; a kernel that multiplies by matrices of all
      layers (`ops/stacks.py`) reads this number of them. 0 counts all.
    """
    reader = _Traffic(hlo_text.Module(text), experts)
    return reader.module.total(lambda *which: {"bytes": reader.moved(*which)})["bytes"]


class _Traffic:
    def __init__(self, module: hlo_text.Module, experts: int = 0):
        self.module, self.inner, self.experts = module, set[str](), experts
        self.users: dict = {}
        self.parameters: dict[str, dict[int, str]] = {}
        for name, instructions in module.computations.items():
            users = self.users[name] = collections.defaultdict(list)
            parameters = self.parameters[name] = {}
            for i in instructions:
                for position, operand in enumerate(i.operands):
                    users[operand].append((i, position))
                if i.operation == "parameter":
                    parameters[int(i.rest.split(")")[0])] = i.name
                if i.operation not in _CONTROL:
                    self._mark_inner(i)

    def _mark_inner(self, caller: hlo_text.Instruction) -> None:
        """Marks the computations inside a fusion or reduction, which do not use main memory."""
        for name in caller.called:
            if name in self.module.computations and name not in self.inner:
                self.inner.add(name)
                for i in self.module.computations[name]:
                    self._mark_inner(i)

    def moved(self, computation: str, i: hlo_text.Instruction) -> int:
        free = i.operation in _FREE or i.operation.endswith(("-done", "-update"))
        if free or computation in self.inner:
            return 0
        if i.operation in ("slice-start", "dynamic-slice-start"):  # results: operands, slice, mark
            return (i.resident[0] > 0) * i.sizes[-2] + i.resident[-2]
        if i.operation.endswith("-start"):  # the results include the operands
            return sum(i.resident)
        operands = [self.module.named[computation][x] for x in i.operands]
        if i.operation in _SLICES:
            return (1 + any(operands[0].resident)) * sum(i.resident)
        if i.operation == "dynamic-update-slice":
            return sum(operands[1].resident) + any(i.resident) * sum(operands[1].sizes)
        if i.operation == "custom-call" and i.name.startswith("gmm"):
            return sum(i.resident) + sum(map(self.of_one_layer, operands))
        if i.operation != "fusion":
            return sum(i.resident) + sum(sum(x.resident) for x in operands)
        inside = i.called[0]
        read = sum(
            min(sum(x.resident), self.read(inside, self.parameters[inside][number]))
            for number, x in enumerate(operands)
        )
        written = self.written(inside, self.module.root[inside].name)
        return read + sum(
            size if number >= len(written) else min(size, written[number])
            for number, size in enumerate(i.resident)
        )

    def of_one_layer(self, operand: hlo_text.Instruction) -> int:
        """Bytes that a grouped product reads of an operand: one layer's of a stack of matrices."""
        number = operand.shapes[0][0] if len(operand.shapes[0]) == 3 else 0
        if 0 < self.experts < number:
            return sum(operand.resident) * self.experts // number
        return sum(operand.resident)

    @functools.cache  # noqa: B019 - the object lives only while one text is read
    def read(self, computation: str, name: str) -> int:
        """Bytes that a fusion reads of a value: only the slices' if nothing else reads it."""
        total = 0
        for user, position in self.users[computation][name]:
            if user.operation in _SLICES and position == 0:
                total += sum(user.sizes)
            elif user.operation == "dynamic-update-slice" and position == 0:
                continue
            elif user.operation == "fusion":
                inside = user.called[0]
                total += self.read(inside, self.parameters[inside][position])
            elif user.operation in _SAME and not user.root:
                total += self.read(computation, user.name)
            else:
                return sum(self.module.named[computation][name].sizes)
        return total

    def written(self, computation: str, name: str) -> list[int]:
        """Bytes of each result that a fusion writes; an in-place update counts only the update."""
        i = self.module.named[computation][name]
        if i.operation == "tuple":
            return [size for x in i.operands for size in self.written(computation, x)]
        if i.operation == "dynamic-update-slice":
            return [sum(self.module.named[computation][i.operands[1]].sizes)]
        if i.operation == "fusion":
            return self.written(i.called[0], self.module.root[i.called[0]].name)
        if i.operation in ("bitcast", "reshape", "copy"):
            return self.written(computation, i.operands[0])
        return list(i.sizes)
