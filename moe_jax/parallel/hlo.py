"""What a compiled step really executes, read from its HLO text.

`cost_analysis()` counts the body of a loop once; here every product is multiplied by the trip
counts of the loops around it.
"""

import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(?[\w\[\],{}\s/*:()=]*?\)?) ([\w\-]+)\((.*)$"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[tuple[int, ...], ...]  # of the result; several for a tuple
    operation: str
    rest: str  # operands and attributes


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of `compiled.as_text()`, and the name of the entry."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            shapes = tuple(
                tuple(int(n) for n in dims.split(",") if n) for _, dims in _SHAPE.findall(found[2])
            )
            current.append(Instruction(found[1], shapes, found[3], found[4]))
    return computations, entry


def product_flops(text: str) -> int:
    """FLOPs of the matrix products of CPU HLO text, loop bodies times their trip counts.

    Of a conditional it is the most expensive branch that counts.

    Raises: ValueError for a loop around products whose trip count the compiler does not know.
    """
    computations, entry = parse(text)

    @functools.cache
    def flops(name: str) -> int:
        shapes = {i.name: i.shapes[0] for i in computations[name] if i.shapes}
        total = 0
        for instruction in computations[name]:
            if instruction.operation == "dot":
                total += _dot_flops(instruction, shapes)
            called = _CALLED.findall(instruction.rest)
            for branches in _BRANCHES.findall(instruction.rest):
                called += re.findall(r"[\w.\-]+", branches)
            costs = [flops(c) for c in called if c in computations]
            inner = max(costs) if instruction.operation == "conditional" else sum(costs)
            if inner and instruction.operation == "while":
                trips = _TRIP_COUNT.search(instruction.rest)
                if trips is None:
                    raise ValueError(f"the trip count of loop {instruction.name} is not known")
                inner *= int(trips[1])
            total += inner
        return total

    return flops(entry)


def _dot_flops(dot: Instruction, shapes: dict[str, tuple[int, ...]]) -> int:
    left = re.match(r"(?:\w+\[[\d,]*\](?:\{[^}]*\})? )?%?([\w.\-]+)", dot.rest)[1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
    sizes = [shapes[left][int(axis)] for axis in contracted.split(",") if axis]
    return 2 * math.prod(dot.shapes[0]) * math.prod(sizes)


def buffer_shapes(text: str) -> set[tuple[int, ...]]:
    """Every shape that some instruction of the text produces."""
    computations, _ = parse(text)
    return {shape for c in computations.values() for i in c for shape in i.shapes}
