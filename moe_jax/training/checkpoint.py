"""Checkpoints with verification: Orbax files, and a digest of every leaf to check them against.

Orbax notices missing and truncated files, but not flipped bits, and takes any folder named by a
number for a checkpoint. Here a checkpoint counts only if its leaves match the digests saved with
them.
"""

import dataclasses
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from moe_jax import tree
from moe_jax.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Restored:
    step: int
    state: object
    data: dict
    config: dict


class _Mismatch(ValueError):
    """The checkpoint is intact, but its state is not the one requested."""


def save(directory: pathlib.Path, step: int, state, *, data: dict, config: dict, keep: int) -> None:
    """Writes <directory>/<step> atomically, then deletes all but the newest `keep` checkpoints.

    With several processes, each writes its parts of the leaves into the same `directory`.
    """
    leaves = tree.flatten(state)
    meta = {
        "data": data,
        "config": config,
        "leaves": {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()},
        "digests": digests(leaves),
    }
    ocp.save_checkpointables(
        (directory / str(step)).absolute(), {"state": leaves, "meta": meta}, overwrite=True
    )
    if distributed.is_first():
        for old in steps(directory)[:-keep]:
            shutil.rmtree(directory / str(old))


def steps(directory: pathlib.Path) -> list[int]:
    """The steps that have a folder, oldest first; their checkpoints may fail verification."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit() and p.is_dir())


def restore_latest(directory: pathlib.Path, abstract_state) -> Restored | None:
    """The newest checkpoint that verifies; None when there is none.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore to, which may differ
        from the shardings at saving.

    Raises: ValueError if the checkpoint's leaves are not those of `abstract_state`.
    """
    abstract = tree.flatten(abstract_state)
    found = _newest(directory, abstract)
    if found is None:
        return None
    step, leaves, meta = found
    if surplus := sorted(set(meta["leaves"]) - set(abstract)):
        raise ValueError(f"{directory / str(step)} also holds {', '.join(surplus)}: another model?")
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
    return Restored(step, state, meta["data"], meta["config"])


def load(directory: pathlib.Path, abstract: dict, *, own_dtypes: bool = False) -> dict:
    """The parts in `abstract`, such as {"params": …}, of the newest checkpoint that verifies.

    Args:
      own_dtypes: leaves may have, and keep, a dtype other than in `abstract`.

    Raises: FileNotFoundError if there is no such checkpoint; ValueError if it is of another model.
    """
    found = _newest(directory, tree.flatten(abstract), own_dtypes)
    if found is None:
        raise FileNotFoundError(f"{directory} holds no checkpoint that verifies")
    return jax.tree.unflatten(jax.tree.structure(abstract), found[1].values())


def digests(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """A 32-bit hash of each leaf's bits, computed on the devices that hold the leaf.

    It sums a hash of value and position over the elements, so it does not depend on the sharding,
    and flipping any single bit changes it. It does not protect against deliberate tampering.
    """
    return {path: int(x) for path, x in jax.device_get(_digests(leaves)).items()}


def _digest(x: jax.Array) -> jax.Array:
    name = jnp.uint32(zlib.crc32(f"{x.shape} {x.dtype}".encode()))
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    # Axis by axis, because a flat index overflows 32 bits in a leaf of more than 4 G elements.
    position = jnp.full(x.shape, name)
    for axis in range(x.ndim):
        position = _mix(position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis))
    return jnp.sum(_mix(words ^ position), dtype=jnp.uint32) + name


_digests = jax.jit(lambda leaves: jax.tree.map(_digest, leaves))


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection on 32 bits in which each bit affects all others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _newest(
    directory: pathlib.Path, abstract: dict, own_dtypes: bool = False
) -> tuple[int, dict, dict] | None:
    """(step, leaves, meta) of the newest checkpoint whose leaves named in `abstract` verify.

    All processes restore the same one: if any of them cannot read a checkpoint, none uses it.
    """
    for step in reversed(distributed.of_first(steps(directory))):
        try:
            with distributed.together(ValueError):
                leaves, meta = _load((directory / str(step)).absolute(), abstract, own_dtypes)
            for path, digest in digests(leaves).items():
                if digest != meta["digests"][path]:
                    raise ValueError(f"{path} has another digest than it was saved with")
            return step, leaves, meta
        except _Mismatch:
            raise
        except Exception as error:  # damaged files make Orbax and TensorStore raise any type
            reason = " ".join(str(error).split())[:300]
            logging.warning("checkpoint %s does not verify: %s", directory / str(step), reason)
    return None


def _load(folder: pathlib.Path, abstract: dict, own_dtypes: bool) -> tuple[dict, dict]:
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link out of the checkpoint")
    with _reading():
        meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
    if own_dtypes:
        abstract = {
            path: leaf.update(dtype=jnp.dtype(meta["leaves"].get(path, [None, leaf.dtype])[1]))
            for path, leaf in abstract.items()
        }
    problems = []
    for path, leaf in abstract.items():
        saved = meta["leaves"].get(path)
        if saved is None:
            problems.append(f"{path} is missing")
        elif saved != [list(leaf.shape), str(leaf.dtype)]:
            problems.append(f"{path} is {saved[1]}{saved[0]}, not {leaf.dtype}{list(leaf.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise _Mismatch(f"{folder} is of another model: {'; '.join(problems[:5])}{more}")
    with _reading():
        leaves = ocp.load_checkpointables(folder, {"state": abstract})["state"]
    return {path: leaves[path] for path in abstract}, meta


def _reading() -> ocp.Context:
    """A context in which each process reads its own parts and never waits for one that failed."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if distributed.process_count() > 1:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.barrier_sync_key_prefix = f"process_{jax.process_index()}"
    return context
