"""Paths of a pytree as text, and random keys folded in by name."""

import hashlib

import jax


def path_name(path: tuple) -> str:
    """ "blocks/0/attention/wq" for a path of `jax.tree_util.tree_leaves_with_path`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def fold_in(key: jax.Array, name: str) -> jax.Array:
    """A key that depends on `name`, the same in every process and Python version."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
