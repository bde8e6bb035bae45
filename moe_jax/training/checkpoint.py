"""Checkpoints with verification: Orbax files, and a digest of every leaf to check them against.

Orbax notices missing and truncated files, but not flipped bits, and takes any folder named by a
number for a checkpoint. Here a checkpoint counts only if its leaves match the digests saved with
them.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from moe_jax import files, tree
from moe_jax.parallel import distributed
from moe_jax.training import bounds


@dataclasses.dataclass(frozen=True)
class Restored:
    step: int
    state: object
    data: dict
    config: dict


class Mismatch(ValueError):
    """The checkpoint is intact, but its state is not the one requested."""


class NoneVerifies(ValueError):
    """There are checkpoints, but none of them verifies."""


def save(
    directory: pathlib.Path,
    step: int,
    state,
    *,
    data: dict,
    config: dict,
    keep: int,
    sound: frozenset[int] = frozenset(),
) -> frozenset[int]:
    """Writes <directory>/<step> atomically, then deletes older checkpoints.

    With several processes, each writes its parts of the leaves into the same `directory`. `sound`
    are the steps known to verify. Returns the newest `keep` of these and the new step; once there
    are that many, older checkpoints are deleted. A folder that is not a checkpoint of the step in
    its name is never deleted. Whatever is in the new checkpoint's place is renamed.
    """
    leaves = tree.flatten(state)
    meta = {
        "data": {**data, "step": step},
        "config": config,
        "leaves": {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()},
        "digests": digests(leaves),
    }
    folder = (directory / str(step)).absolute()
    if distributed.is_first() and os.path.lexists(folder):
        aside = files.set_aside(folder, "unverified")
        distributed.say(f"{folder} was there and had not been read: it is renamed to {aside.name}")
    distributed.of_first(None)  # the others wait until the path is free
    ocp.save_checkpointables(folder, {"state": leaves, "meta": meta})
    kept = frozenset(sorted(sound | {step})[-keep:])
    if distributed.is_first() and len(kept) == keep:
        for old in steps(directory):
            if old < min(kept) and _own(directory / str(old)) is not None:
                shutil.rmtree(directory / str(old))
    return kept


def steps(directory: pathlib.Path) -> list[int]:
    """The steps that have a folder, oldest first; their checkpoints may fail verification."""
    folders = (p for p in directory.glob("*") if p.is_dir() and not p.is_symlink())
    return sorted(int(p.name) for p in folders if re.fullmatch("0|[1-9][0-9]*", p.name))


def newest_data(directory: pathlib.Path) -> dict:
    """The `data` of the newest checkpoint whose step matches its name, unverified; {} if none."""
    found = (_own(directory / str(step)) for step in reversed(steps(directory)))
    return next((meta["data"] for meta in found if meta is not None), {})


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes the temporary folders left by a run that was killed while saving."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        if re.fullmatch(r"[0-9]+\.orbax-checkpoint-tmp.*", path.name) and not path.is_symlink():
            shutil.rmtree(path)


def _own(folder: pathlib.Path) -> dict | None:
    """The description of a checkpoint; None for a folder that is not what its name says."""
    try:
        return described(folder)
    except Exception:  # damaged files make Orbax and TensorStore raise any type
        return None


def described(folder: pathlib.Path) -> dict:
    """The description of a checkpoint: leaves, digests, data and config, without values.

    Raises: ValueError if it is not of the step in its name; an error of any type if it is damaged.
    """
    _check_links(folder)
    with _reading():
        meta = ocp.load_checkpointables(folder.absolute(), {"meta": None})["meta"]
    bounds.check_form(meta)
    bounds.check_size(folder, meta["leaves"].values())
    if (step := meta["data"].get("step")) != int(folder.name):
        raise ValueError(
            f"it is a checkpoint of step {step}, not of the step that it is named after"
        )
    return meta


def restore_latest(directory: pathlib.Path, abstract_state) -> Restored | None:
    """The newest checkpoint that verifies; None if there are no checkpoints.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore to, which may differ
        from the shardings at saving.

    Raises: Mismatch if the checkpoint's leaves are not those of `abstract_state`; NoneVerifies.
    """
    abstract = tree.flatten(abstract_state)
    found = _newest(directory, abstract)
    if found is None:
        return None
    step, leaves, meta = found
    if surplus := sorted(set(meta["leaves"]) - set(abstract)):
        raise Mismatch(f"{directory / str(step)} also holds {', '.join(surplus)}: another model?")
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
    return Restored(step, state, meta["data"], meta["config"])


def load(directory: pathlib.Path, abstract: dict, *, own_dtypes: bool = False) -> tuple[dict, dict]:
    """The parts in `abstract`, such as {"params": …}, of the newest checkpoint that verifies, and
    the config that was saved with it.

    Args:
      own_dtypes: leaves may have, and keep, a dtype other than in `abstract`.

    Raises: FileNotFoundError if there is no checkpoint; NoneVerifies if none of them verifies;
      Mismatch if it is of another model.
    """
    found = _newest(directory, tree.flatten(abstract), own_dtypes)
    if found is None:
        raise FileNotFoundError(f"{directory} holds no checkpoint")
    _, leaves, meta = found
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves.values()), meta["config"]


def verified(folder: pathlib.Path) -> Iterator[tuple[str, jax.Array]]:
    """The leaves of one checkpoint, one in memory at a time, each compared with its digest.

    Raises: an error of any type if the checkpoint does not verify.
    """
    meta = described(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for path, (shape, dtype) in meta["leaves"].items():
        form = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here)
        leaves = _read(folder, {path: form})
        _check_digests(leaves, meta)
        yield path, leaves[path]


def _check_digests(leaves: dict[str, jax.Array], meta: dict) -> None:
    for path, digest in digests(leaves).items():
        if digest != meta["digests"][path]:
            raise ValueError(f"{path} has another digest than it was saved with")


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
    found, reason = distributed.of_first(steps(directory)), ""
    for step in reversed(found):
        try:
            with distributed.together(ValueError):
                leaves, meta = _load(directory / str(step), abstract, own_dtypes)
            _check_digests(leaves, meta)
            return step, leaves, meta
        except Mismatch:
            raise
        except Exception as error:  # damaged files make Orbax and TensorStore raise any type
            reason = " ".join(str(error).split())[:300]
            logging.warning("checkpoint %s does not verify: %s", directory / str(step), reason)
    if found:
        raise NoneVerifies(
            f"none of the {len(found)} checkpoints in {directory} verifies (the oldest: {reason}); "
            "restore one from a copy, or move them away to begin anew"
        )
    return None


def _load(folder: pathlib.Path, abstract: dict, own_dtypes: bool) -> tuple[dict, dict]:
    meta = described(folder)
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
        raise Mismatch(f"{folder} is of another model: {'; '.join(problems[:5])}{more}")
    return _read(folder, abstract), meta


def _read(folder: pathlib.Path, abstract: dict) -> dict[str, jax.Array]:
    with _reading():
        leaves = ocp.load_checkpointables(folder.absolute(), {"state": abstract})["state"]
    return {path: leaves[path] for path in abstract}


def _check_links(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link out of the checkpoint")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder")


def _reading() -> ocp.Context:
    """A context in which each process reads its own parts and never waits for one that failed."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if distributed.process_count() > 1:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.barrier_sync_key_prefix = f"process_{jax.process_index()}"
    return context
