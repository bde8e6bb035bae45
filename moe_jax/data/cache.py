"""The cache folder for tokens, TFDS datasets and compiled steps, shared by all of a user's runs."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from moe_jax import files

DATASETS = "tfds"  # the folder in the cache for datasets that TFDS prepares
# A folder with this file is a cache: backups, and text sources, leave it out
# (https://bford.info/cachedir/).
TAG, SIGNATURE = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"
ADVICE = "set config.data.cache_dir (or XDG_CACHE_HOME) to a folder with room"


def cache_folder(cache_dir: str) -> pathlib.Path:
    """`cache_dir`, or if it is "", $XDG_CACHE_HOME/moe_jax (by default ~/.cache/moe_jax).

    Raises: ValueError for a user without a home folder, and for a place in an object store.
    """
    if files.is_remote(cache_dir):
        raise ValueError(f"config.data.cache_dir={cache_dir!r} must be local; {ADVICE}")
    if cache_dir:
        return pathlib.Path(cache_dir)
    try:
        user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for the cache; {ADVICE}") from error
    return user / "moe_jax"


@contextlib.contextmanager
def writing(cache: pathlib.Path) -> Iterator[None]:
    """Marks the cache as one, for the block to write into.

    Raises: ValueError, which gives the fix, for a failure to write into the cache in the block.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(cache / TAG, "x") as tag:
            tag.write(SIGNATURE)
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        named = getattr(error, "filename", None)
        if named is not None and not _on_the_way(pathlib.Path(named), cache):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the cache {cache} cannot be written: {reason}; {ADVICE}") from error


def _on_the_way(path: pathlib.Path, cache: pathlib.Path) -> bool:
    """True for a path in the cache, and for a folder above it, which is made with it."""
    return path.is_relative_to(cache) or cache.is_relative_to(path)
