"""Source files, on this machine or in an object store (gs://, s3://, az://, hf://) by `fsspec`."""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from moe_jax import files, stopping

# A path in an object store is an `epath.Path`, which has the methods of pathlib.
Path = Any
STORES = ("gs://", "s3://", "az://", "hf://")
# The facts by which object stores tell whether a file's content has changed; the first that a
# store has is used.
CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5", "sha256", "blob_id")
LARGE = 16 << 20  # the hash of a file of so many bytes is kept, and not computed at every start
FRESH_SECONDS = 2  # a file may change without a change of its time, if it has just been written


def path_of(spec: str) -> Path:
    """Raises: ValueError for an address that is in none of `STORES`."""
    if not files.is_remote(spec):
        return pathlib.Path(spec)
    if not spec.startswith(STORES):
        stores = ", ".join(STORES)
        raise ValueError(f"data.source={spec!r} is neither a local path nor in one of {stores}")
    return epath.Path(spec)


def _store(path: Path | str):
    """The `fsspec` file system of an object store."""
    return epath.backend.fsspec_backend.fs(path)


def _facts(path: Path) -> dict:
    return _store(path).info(str(path))


def size(path: Path) -> int:
    return _facts(path)["size"] if files.is_remote(path) else path.stat().st_size


def state(path: Path) -> list:
    """Facts that change when the file is written, without reading it."""
    if files.is_remote(path):
        facts = _facts(path)
        return [facts["size"], *(str(facts.get(name, "")) for name in (*CHECKSUMS, "mtime"))]
    found = path.stat()
    # Nobody can set the time of the last change (ctime), as rsync sets that of the last writing.
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file; those of a file in an object store are read as they are needed."""
    with open(path, "rb") if not files.is_remote(path) else path.open("rb") as file:
        yield file


def found_in(spec: str) -> tuple[Path, list[Path]]:
    """The folder that the names of the files are relative to, and the files, of a path, folder or
    glob in an object store.

    Raises: ValueError if the store cannot be read.
    """
    root, scheme = path_of(spec), spec.partition("://")[0]
    try:
        store = _store(spec)
        if glob.has_magic(spec):
            plain = itertools.takewhile(lambda part: not glob.has_magic(part), root.parts)
            root = path_of("/".join([f"{scheme}:/", *list(plain)[2:]]))
            entries = store.glob(spec, detail=True)
            names = [name for name, facts in entries.items() if facts["type"] == "file"]
        elif store.isdir(spec):
            names = store.find(spec)
        else:
            root, names = root.parent, [spec] if store.exists(spec) else []
    except Exception as error:  # the libraries of the stores raise many types
        stopping.pass_on(error)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"data.source={spec!r} cannot be listed ({type(error).__name__}: {reason}); install "
            "the store's library (gcsfs, s3fs, adlfs, huggingface_hub) and check your credentials"
        ) from error
    # Some stores return names without their scheme.
    urls = [name if "://" in name else f"{scheme}://{name.lstrip('/')}" for name in names]
    return root, [path_of(url) for url in urls]


def digest(path: Path, memory: pathlib.Path) -> str:
    """A hash of a file's content.

    That of a file in an object store is computed by the store. That of a large local file is kept
    in the folder `memory`, with the file's size and times, so that terabytes are not read again.

    Raises: ValueError if the file changes while it is read.
    """
    before = state(path)
    if files.is_remote(path):
        facts = _facts(path)
        checksum = next((str(facts[name]) for name in CHECKSUMS if facts.get(name)), "")
        if checksum:
            return f"{before[0]}:{checksum}"
    is_large = not files.is_remote(path) and before[0] >= LARGE
    name = hashlib.sha256(os.fsencode(pathlib.Path(path).resolve())).hexdigest()[:32]
    kept = memory / "file_hashes" / f"{name}.json"
    if is_large:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["state"] == before:
                return str(found["sha256"])
    with opened(path) as content:
        hashed = hashlib.file_digest(content, "sha256").hexdigest()
    if state(path) != before:
        raise ValueError(f"data.source: {path} changes while it is read; wait until it is complete")
    if is_large and time.time_ns() - max(before[1:3]) > FRESH_SECONDS * 10**9:
        with contextlib.suppress(OSError):  # a cache that cannot be written is refused elsewhere
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(kept, json.dumps({"state": before, "sha256": hashed}))
    return hashed
