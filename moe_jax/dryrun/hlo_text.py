"""Parses HLO text into computations and instructions, and sums over everything they execute.

It reads CPU and TPU text. CPU text states the trip counts of loops. On TPU they follow from the
start, step and bound of the loop's counter. The compiler moves these in and out of loops, and the
step need not be 1: a ring's products may be unrolled. A loop with a data-dependent trip count has
the expected count in its name.
"""

import collections
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping

from moe_jax.ops import grouped_blocked

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXPECTED_TRIPS = re.compile(grouped_blocked.expected_trips(r"(\d+)") + '/while"')
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[tuple[int, ...], ...]  # the result's shape; several for a tuple
    sizes: tuple[int, ...]  # the bytes of each result, without padding
    resident: tuple[int, ...]  # the bytes of each in main memory; 0 if elsewhere, as in TPU's VMEM
    operation: str
    rest: str  # operands and attributes
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        depth, end = 1, 0
        while depth and end < len(self.rest):
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    @functools.cached_property
    def called(self) -> list[str]:
        """The computations that it runs; an asynchronous instruction counts where it starts."""
        if self.operation.endswith(("-done", "-update")):
            return []
        branches = ",".join(_BRANCHES.findall(self.rest))
        return _CALLED.findall(self.rest) + re.findall(r"[\w.\-]+", branches)

    def attribute(self, name: str) -> str:
        if found := re.search(rf"\b{name}=%?([\w.\-]+)", self.rest):
            return found[1]
        raise LookupError(f"{self.name} has no {name}")


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of `compiled.as_text()`, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", list[Instruction]()
    text = re.sub(r'\n(?="|\}[},])', "", text)  # joins a kernel's metadata, which has its own lines
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, result, operation, rest = found.groups()
            shapes, sizes, resident = list[tuple[int, ...]](), list[int](), list[int]()
            for element, dims, layout in _SHAPE.findall(result):
                width = re.search(r"\d+", element)  # the bits in bf16, s32, f8e4m3fn
                bits = int(width[0]) if width else 8 * (element == "pred")
                shapes.append(tuple(int(n) for n in dims.split(",") if n))
                sizes.append(math.prod(shapes[-1]) * bits // 8)
                resident.append(0 if "S(" in layout else sizes[-1])
            of_result = tuple(shapes), tuple(sizes), tuple(resident)
            current.append(Instruction(name, *of_result, operation, rest, bool(root)))
    return computations, entry


class Module:
    """The computations of a compiled step, and their callers."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.named, self.root, self.callers = {}, {}, collections.defaultdict(list)
        for name, instructions in self.computations.items():
            self.named[name] = {i.name: i for i in instructions}
            for i in instructions:
                if i.root:
                    self.root[name] = i
                for called in i.called:
                    self.callers[called].append((name, i))

    def total(self, own: Callable[[str, Instruction], Mapping]) -> collections.Counter:
        """Sums `own(computation, instruction)`, numbers by key, over all executed instructions.

        For a conditional, the branch with the largest number counts, separately for each key.

        Raises: ValueError if a loop around counted instructions has an unknown trip count.
        """

        @functools.cache
        def total(computation):
            result = collections.Counter()
            for i in self.computations[computation]:
                costs = [total(c) for c in i.called if c in self.computations]
                join = operator.or_ if i.operation == "conditional" else operator.add
                inner = functools.reduce(join, costs, collections.Counter())
                if inner and i.operation == "while":
                    trips = self.trips(computation, i)
                    inner = {key: trips * number for key, number in inner.items()}
                result.update(inner)
                result.update(own(computation, i))
            return result

        return total(self.entry)

    def trips(self, computation: str, loop: Instruction) -> int:
        for known in (_TRIP_COUNT, _EXPECTED_TRIPS):
            if found := known.search(loop.rest):
                return int(found[1])
        try:
            return self._counted(computation, loop)
        except LookupError:
            raise ValueError(f"the trip count of loop {loop.name} is not known") from None

    def _counted(self, computation: str, loop: Instruction) -> int:
        condition, body = loop.attribute("condition"), loop.attribute("body")
        test = self.root[condition]
        if test.operation == "fusion":
            condition, test = test.called[0], self.root[test.called[0]]
        if test.operation != "compare":
            raise LookupError
        (slot, shift), (other, bound) = (self._affine(condition, x) for x in test.operands)
        direction = test.attribute("direction")
        if slot is None:  # the counter is on the right: n > i
            slot, shift, other, bound = other, bound, slot, shift
            direction = _SWAPPED[direction]
        if slot is None or other is not None:
            raise LookupError
        before, start = self._element(computation, loop.operands[0], slot[1])
        same, step = self._element(body, self.root[body].name, slot[1])
        if before is not None or same != slot:
            raise LookupError
        bound += {"LE": 1, "GE": -1}.get(direction, 0) - shift
        ends = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0}
        ends["NE"] = step != 0 and (bound - start) % step == 0 and (bound - start) // step >= 0
        if not ends[direction]:
            raise LookupError
        return len(range(start, bound, step))

    def _affine(self, computation: str, name: str) -> tuple[tuple[str, int] | None, int]:
        """A scalar as a sum: a slot (loop, index) of a loop's state, or None, plus a constant.

        Raises: LookupError if it is anything else.
        """
        i = self.named[computation][name]
        if i.operation == "constant" and (found := re.match(r"(-?\d+)\)", i.rest)):
            return None, int(found[1])
        if i.operation in _SAME:
            return self._affine(computation, i.operands[0])
        if i.operation == "get-tuple-element":
            return self._element(computation, i.operands[0], int(i.attribute("index")))
        if i.operation == "fusion":
            return self._affine(i.called[0], self.root[i.called[0]].name)
        if i.operation == "parameter":
            outside, _, argument = self._argument(computation, i)
            return self._affine(outside, argument)
        if i.operation in ("add", "subtract"):
            (slot, number), (other, change) = (self._affine(computation, x) for x in i.operands)
            if i.operation == "subtract" and other is None:
                return slot, number - change
            if i.operation == "add" and None in (slot, other):
                return slot or other, number + change
        raise LookupError

    def _element(self, computation: str, name: str, index: int) -> tuple:
        """`_affine` for an element of a tuple."""
        i = self.named[computation][name]
        if i.operation == "tuple":
            return self._affine(computation, i.operands[index])
        if i.operation == "fusion":
            return self._element(i.called[0], self.root[i.called[0]].name, index)
        if i.operation == "while" and self._carried(i, index):
            return self._element(computation, i.operands[0], index)
        if i.operation == "parameter":
            outside, caller, argument = self._argument(computation, i)
            if caller.operation == "while" and not self._carried(caller, index):
                return (caller.name, index), 0
            return self._element(outside, argument, index)
        raise LookupError

    def _argument(self, computation: str, parameter: Instruction) -> tuple[str, Instruction, str]:
        """The origin of a parameter: the calling computation, the call, the operand's name."""
        callers = self.callers[computation]
        if len(callers) != 1 or callers[0][1].operation == "conditional":
            raise LookupError
        outside, caller = callers[0]
        return outside, caller, caller.operands[int(parameter.rest.split(")")[0])]

    def _carried(self, loop: Instruction, index: int) -> bool:
        """True if the body returns this element of the loop's state unchanged."""
        body = loop.attribute("body")
        if self.root[body].operation != "tuple":
            return False
        i = self.named[body][self.root[body].operands[index]]
        while i.operation in _SAME:
            i = self.named[body][i.operands[0]]
        if i.operation != "get-tuple-element" or int(i.attribute("index")) != index:
            return False
        return self.named[body][i.operands[0]].operation == "parameter"
