"""The folder that keeps tokens, TFDS datasets and compiled steps, for all runs of a person."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

DATASETS = "tfds"  # the folder of the cache in which TFDS keeps its own
ADVICE = "set config.data.cache_dir (or XDG_CACHE_HOME) to a folder with room"


def cache_folder(cache_dir: str) -> pathlib.Path:
    """`cache_dir`, or for "" $XDG_CACHE_HOME/moe_jax (~/.cache/moe_jax).

    Raises: ValueError for a person without a home.
    """
    if cache_dir:
        return pathlib.Path(cache_dir)
    try:
        user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for the cache; {ADVICE}") from error
    return user / "moe_jax"


@contextlib.contextmanager
def writing(cache: pathlib.Path) -> Iterator[None]:
    """A failure of the block to write into the cache becomes a ValueError that says what to set."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError is array_record's
        named = getattr(error, "filename", None)
        if named is not None and not pathlib.Path(named).is_relative_to(cache):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the cache {cache} cannot be written: {reason}; {ADVICE}") from error
