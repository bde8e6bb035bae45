"""Datasets that the library `datasets` loads, from the hub or its cache, as a source.

The library needs the optional extra [hub]; it is imported where it is used. It downloads a dataset
and converts it to Arrow files in its own cache, which this package reads.
"""

import functools
import importlib.util
import pathlib
import re

from moe_jax import stopping
from moe_jax.data import text_files

PREFIX = "hf:"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")


def check(spec: str) -> None:
    """Raises ValueError for an invalid name, or if `datasets` is missing."""
    if not _NAME.fullmatch(spec.removeprefix(PREFIX)):
        raise ValueError(f"data.source={spec!r} names no dataset; use hf:OWNER/NAME[/CONFIG]")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"data.source={spec!r} needs the library datasets, an optional extra of this project: "
            "pip install 'moe_jax[hub]'"
        )


@functools.cache  # so that the name stands for the same files as long as the program runs
def find(spec: str) -> list[text_files.File]:
    """The files into which `datasets` converts the splits of OWNER/NAME, or of its CONFIG.

    Their names begin with the split's name, by which they are trained on or held out.

    Raises: ValueError if the dataset cannot be loaded.
    """
    check(spec)
    import datasets

    name = spec.removeprefix(PREFIX)
    config = name.split("/", 2)[2] if name.count("/") == 2 else None
    repository = name.removesuffix(f"/{config}")
    try:
        splits = datasets.load_dataset(repository, config)
    except Exception as error:  # the library and those below it raise many types
        stopping.pass_on(error)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data.source={spec!r} cannot be loaded ({type(error).__name__}: {reason}); check the "
            "name, its config and the network"
        ) from error
    found = {
        pathlib.Path(entry["filename"]): split
        for split, dataset in splits.items()
        for entry in dataset.cache_files
    }
    if not found:
        raise ValueError(f"data.source={spec!r} has no records")
    named = {path: text_files.split_in(pathlib.Path(split)) for path, split in found.items()}
    return [
        text_files.File(path, f"{found[path]}/{path.name}", split)
        for path, split in text_files.divided(spec, named).items()
    ]
