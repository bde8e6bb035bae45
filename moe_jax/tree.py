"""Names for the paths of a pytree, and random keys derived from names."""

import functools
import hashlib
from collections.abc import Callable, Iterable

import jax
import numpy as np

FLOAT32 = np.dtype(np.float32)


def path_name(path: tuple) -> str:
    """The name of a path of `jax.tree_util.tree_leaves_with_path`: "blocks/0/attention/wq"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(pytree) -> dict:
    """Name of a leaf's path -> leaf, in the order of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(pytree)}


def unflatten(leaves: dict) -> dict:
    """Nested dicts from leaves by name: the inverse of `flatten` for a tree of dicts."""
    nested: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def map_with_name(function: Callable, pytree, *others):
    """`jax.tree.map` for a function whose first argument is the name of the leaf's path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), pytree, *others
    )


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """A dtype that holds the values of all dtypes; float32 for float16 with bfloat16."""
    dtypes = set(dtypes)
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(np.promote_types, dtypes, FLOAT32)


def fold_in(key: jax.Array, name: str) -> jax.Array:
    """A key that depends on `name`, the same in every process and Python version."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
