"""Damaged and forged contents of a file: changed bytes, and changed values where it is JSON."""

import copy
import json
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308)
TEXTS = (
    "",
    "a",
    "é",
    "\0",
    "\n",
    "..",
    "../a",
    "/etc/passwd",
    "bytes",
    "$x^$",
    "\ud800",
    "A" * 999,
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=5),
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(child, (*path, key))
    return found


@st.composite
def forged(draw, content: bytes) -> bytes:
    """JSON text with some values or keys replaced, removed or added."""
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            break
        *outer, key = draw(st.sampled_from(found))
        inside = value
        for step in outer:
            inside = inside[step]
        match draw(st.sampled_from(("replace", "remove", "swap", "rename"))):
            case "replace":
                inside[key] = draw(values)
            case "remove":
                del inside[key]
            case "swap":
                other = value
                for step in draw(st.sampled_from(found)):
                    other = other[step]
                inside[key] = copy.deepcopy(other)
            case "rename" if isinstance(inside, dict):
                inside[draw(st.sampled_from(TEXTS) | st.just(str(key)[:-1]))] = inside.pop(key)
    return json.dumps(value).encode()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        new = draw(st.binary(max_size=4))
        size = draw(st.integers(0, 8))
        match draw(st.sampled_from(("flip", "cut", "double", "put", "end"))):
            case "flip" if at < len(content):
                flipped = content[at] ^ 1 << draw(st.integers(0, 7))
                content = content[:at] + bytes([flipped]) + content[at + 1 :]
            case "cut":
                content = content[:at] + content[at + size :]
            case "double":
                content = content[:at] + content[at : at + size] * 2 + content[at + size :]
            case "put":
                content = content[:at] + new + content[at:]
            case "end":
                content = content[:at]
    return content


def strange(content: bytes, is_json: bool) -> st.SearchStrategy[bytes]:
    """Contents like this one, but of a stranger or a broken disk."""
    if not is_json:
        return damaged(content)
    anything = values.map(lambda value: json.dumps(value).encode())
    return st.one_of(forged(content), damaged(content), anything)


def run(check: Callable[[bytes], None], strategy: st.SearchStrategy, examples: int) -> None:
    """Calls the check with so many examples; always the same ones."""
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(check))()
