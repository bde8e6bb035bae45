"""Checkpoints with verification: Orbax files, and a digest of every leaf to check them against.

Orbax notices missing and truncated files, but not flipped bits, and takes any folder named by a
number for a checkpoint. Here a checkpoint counts only if its leaves match the digests saved with
them. `directory` may be in a bucket: an `epath.Path` of gs://bucket/folder.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging
from etils import epath

from moe_jax import files, stopping, tree, untrusted
from moe_jax.parallel import distributed
from moe_jax.training import bounds, library_threads

DESCRIPTION = "meta/data.json"  # JsonHandler's file
COMMITTED = "commit_success.txt"  # Orbax's last file of a checkpoint in a bucket


@dataclasses.dataclass(frozen=True)
class Restored:
    step: int
    state: Any
    data: dict
    config: dict


class Mismatch(ValueError):
    """The checkpoint is intact, but its state is not the one requested."""


class NoneVerifies(ValueError):
    """There are checkpoints, but none of them verifies."""


class SaveError(OSError):
    """A checkpoint could not be saved."""


def start(
    directory: pathlib.Path, step: int, state, *, data: dict, config: dict
) -> ocp.AsyncResponse[None]:
    """Copies the state to the host and starts to write <directory>/<step>, which appears whole.

    The arrays may be donated or deleted as soon as this returns; `result()` waits for the files.
    With several processes, each writes its parts of the leaves into the same `directory`. Whatever
    is in the new checkpoint's place is renamed.
    """
    leaves = tree.flatten(state)
    meta = {
        "data": {**data, "step": step},
        "config": config,
        "leaves": {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()},
        "digests": digests(leaves),
    }
    folder = _absolute(directory / str(step))
    if distributed.is_first() and files.is_there(folder):
        aside = files.set_aside(folder, "unverified")
        distributed.say(f"{folder} was there and had not been read: it is renamed to {aside.name}")
    distributed.of_first(None)  # the others wait until the path is free
    context = _context()
    # Otherwise a save into a directory that cannot be written waits for 300 s before it fails.
    context.asynchronous.create_directories_asynchronously = False
    if files.is_remote(folder):  # a bucket renames file by file; a last file shows completeness
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    with context:
        return ocp.save_checkpointables_async(folder, {"state": leaves, "meta": _sealed(meta)})


def save(directory: pathlib.Path, step: int, state, *, data: dict, config: dict) -> None:
    """`start`, and waits for the files."""
    start(directory, step, state, data=data, config=config).result()


def steps(directory: pathlib.Path) -> list[int]:
    """The steps that have a folder, oldest first; their checkpoints may fail verification."""
    found = files.numbered(epath.Path(directory))
    if files.is_remote(directory):  # a save that was killed has its folder, but not its last file
        return [step for step in found if (directory / str(step) / COMMITTED).exists()]
    return found


def _absolute(path: pathlib.Path) -> epath.Path:
    return epath.Path(path if files.is_remote(path) else path.absolute())


def newest_data(directory: pathlib.Path, step: int | None = None) -> dict:
    """The `data` of the newest checkpoint whose step matches its name, unverified; {} if none.

    With `step`, only the checkpoint of that step counts.
    """
    named = steps(directory) if step is None else [step]
    found = (_own(directory / str(step)) for step in reversed(named))
    return next((meta["data"] for meta in found if meta is not None), {})


def remove(directory: pathlib.Path, step: int) -> None:
    """Removes a checkpoint; a folder that is not a checkpoint of the step in its name stays."""
    if _own(directory / str(step)) is not None:
        epath.Path(directory / str(step)).rmtree()


def set_aside_after(directory: pathlib.Path, step: int) -> None:
    """Renames the checkpoints of later steps, so that no run goes on from them."""
    for later in steps(directory):
        if later > step:
            aside = files.set_aside(directory / str(later), "left")
            distributed.say(f"the checkpoint of step {later} is renamed to {aside.name}")


def remove_unfinished(directory: pathlib.Path) -> None:
    """Removes the temporary folders left by a run that was killed while saving."""
    for path in epath.Path(directory).glob("*.orbax-checkpoint-tmp*"):
        unfinished = re.fullmatch(r"[0-9]+\.orbax-checkpoint-tmp.*", path.name)
        if unfinished and not os.path.islink(path):
            path.rmtree()


def check_unfinished(directory: pathlib.Path) -> None:
    """Raises: ValueError if a link or a file has the name of a save's temporary folder."""
    for path in () if files.is_remote(directory) else sorted(pathlib.Path(directory).glob("*")):
        unfinished = re.fullmatch(r"[0-9]+\.orbax-checkpoint-tmp", path.name)
        if unfinished and (path.is_symlink() or not path.is_dir()):
            raise ValueError(f"{path} is in the way of a checkpoint to be saved; remove it")


def _own(folder: pathlib.Path) -> dict | None:
    """The description of a checkpoint; None for a folder that is not what its name says."""
    try:
        return described(folder)
    except Exception as error:  # damaged files make Orbax and TensorStore raise any type
        stopping.pass_on(error)
        return None


def described(folder: pathlib.Path) -> dict:
    """The description of a checkpoint: leaves, digests, data and config, without values.

    Raises: ValueError if it is not of the step in its name; an error of any type if it is damaged.
    """
    _check_links(folder)
    if folder.is_dir() and not (folder / DESCRIPTION).exists():
        raise ValueError(f"{DESCRIPTION} is missing: it is damaged, or an earlier version saved it")
    with _reading():
        meta = _opened(ocp.load_checkpointables(_absolute(folder), {"meta": None})["meta"])
    bounds.check_form(meta)
    if not files.is_remote(folder):
        bounds.check_size(folder, meta["leaves"].values())
    if (step := meta["data"].get("step")) != int(folder.name):
        raise ValueError(
            f"it is a checkpoint of step {step}, not of the step that it is named after"
        )
    return meta


def _sealed(meta: dict) -> dict:
    return {"description": meta, "sha256": _hash(meta)}


def _opened(sealed: dict) -> dict:
    if _hash(sealed["description"]) != sealed["sha256"]:
        raise ValueError("its description is not the one that was saved")
    return sealed["description"]


def _hash(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def restore_latest(
    directory: pathlib.Path,
    abstract_state,
    *,
    step: int | None = None,
    optional: str = "-",
    needed: Iterable[str] = (),
) -> Restored | None:
    """The newest checkpoint that verifies; None if there are no checkpoints.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore to, which may differ
        from the shardings at saving.
      step: only the checkpoint of this step counts, and must verify.
      optional: the beginning of paths. Such leaves of `abstract_state` become None if the
        checkpoint lacks them or has others; such leaves of the checkpoint may be left over.
      needed: names that the checkpoint's `data` must have.

    Raises: Mismatch if the checkpoint's leaves are not those of `abstract_state`; NoneVerifies.
    """
    abstract = tree.flatten(abstract_state)
    found = _newest(directory, abstract, only=step, optional=optional)
    if found is None:
        return None
    newest, leaves, meta = found
    if missing := [name for name in needed if name not in meta["data"]]:
        raise NoneVerifies(
            f"{directory / str(newest)} does not verify: its data lacks {', '.join(missing)}; give "
            "another --workdir, or start one from it by config.init.source"
        )
    surplus = sorted(set(meta["leaves"]) - set(abstract))
    if surplus := [path for path in surplus if not path.startswith(optional)]:
        raise Mismatch(f"{directory / str(newest)} also holds {', '.join(surplus)}: another model?")
    values = (leaves.get(path) for path in abstract)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), values)
    return Restored(newest, state, meta["data"], meta["config"])


def load(
    directory: pathlib.Path, abstract: dict, *, own_dtypes: bool = False, step: int | None = None
) -> tuple[dict, dict]:
    """The parts in `abstract`, such as {"params": …}, of the newest checkpoint that verifies, and
    the config that was saved with it.

    Args:
      step: only the checkpoint of this step counts, and must verify.
      own_dtypes: leaves may have, and keep, a dtype other than in `abstract`.

    Raises: FileNotFoundError if there is no checkpoint; NoneVerifies if none of them verifies;
      Mismatch if it is of another model.
    """
    found = _newest(directory, tree.flatten(abstract), own_dtypes, step)
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
    # Over the layers first: XLA:CPU sums into one number with neither vectors nor threads.
    sums = jnp.sum(_mix(words ^ position), axis=range(min(x.ndim, 1)), dtype=jnp.uint32)
    return jnp.sum(jax.lax.optimization_barrier(sums), dtype=jnp.uint32) + name


_digests = jax.jit(lambda leaves: jax.tree.map(_digest, leaves))


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection on 32 bits in which each bit affects all others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _newest(
    directory: pathlib.Path,
    abstract: dict,
    own_dtypes: bool = False,
    only: int | None = None,
    optional: str = "-",
) -> tuple[int, dict, dict] | None:
    """(step, leaves, meta) of the newest checkpoint whose leaves named in `abstract` verify.

    All processes restore the same one: if any of them cannot read a checkpoint, none uses it.
    """
    there, reason = distributed.of_first(steps(directory)), ""
    if only is not None and only not in there:
        has = ", ".join(map(str, there)) or "none"
        raise NoneVerifies(f"{directory} has no checkpoint of step {only}; it has {has}")
    found = there if only is None else [only]
    for step in reversed(found):
        try:
            with distributed.together(ValueError):
                leaves, meta = _load(directory / str(step), abstract, own_dtypes, optional)
            _check_digests(leaves, meta)
            return step, leaves, meta
        except Mismatch:
            raise
        except Exception as error:  # damaged files make Orbax and TensorStore raise any type
            stopping.pass_on(error)
            # Orbax raises an error about its handlers for any failure; the failure is its cause.
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            line = untrusted.line(f"checkpoint {directory / str(step)} does not verify: {reason}")
            logging.warning("%s", line)
    if only is not None:
        raise NoneVerifies(
            f"{directory / str(only)} does not verify: {reason}; give another of the steps "
            f"{', '.join(map(str, there))}"
        )
    if found:
        raise NoneVerifies(
            f"none of the {len(found)} checkpoints in {directory} verifies (the oldest: {reason}); "
            "restore one from a copy, or move them away to begin anew"
        )
    return None


def _load(
    folder: pathlib.Path, abstract: dict, own_dtypes: bool, optional: str
) -> tuple[dict, dict]:
    meta = described(folder)
    if own_dtypes:
        abstract = {
            path: leaf.update(dtype=jnp.dtype(meta["leaves"].get(path, [None, leaf.dtype])[1]))
            for path, leaf in abstract.items()
        }
    problems = {}
    for path, leaf in abstract.items():
        saved = meta["leaves"].get(path)
        if saved is None:
            problems[path] = "is missing"
        elif saved != [list(leaf.shape), str(leaf.dtype)]:
            problems[path] = f"is {saved[1]}{saved[0]}, not {leaf.dtype}{list(leaf.shape)}"
    named = [f"{path} {problem}" for path, problem in problems.items()]
    if named := [problem for problem in named if not problem.startswith(optional)]:
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise Mismatch(f"{folder} is of another model: {'; '.join(named[:5])}{more}")
    return _read(folder, {path: x for path, x in abstract.items() if path not in problems}), meta


def _read(folder: pathlib.Path, abstract: dict) -> dict[str, jax.Array]:
    library_threads.report_first_failure_only()
    with _reading():
        leaves = ocp.load_checkpointables(_absolute(folder), {"state": abstract})["state"]
    return {path: leaves[path] for path in abstract}


def _check_links(folder: pathlib.Path) -> None:
    if files.is_remote(folder):
        return
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link out of the checkpoint")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder")


def _context() -> ocp.Context:
    """The description is one JSON file; by default Orbax would store each of its numbers apart."""
    context, registry = ocp.Context(), ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context.checkpointables.registry = registry
    return context


def _reading() -> ocp.Context:
    """A context in which each process reads its own parts and never waits for one that failed."""
    context = _context()
    context.pytree.loading.partial_load = True
    if distributed.process_count() > 1:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.barrier_sync_key_prefix = f"process_{jax.process_index()}"
    return context
