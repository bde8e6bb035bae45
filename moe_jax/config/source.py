"""A model is named by its folder or, for one checkpoint of a run, as RUN@STEP."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re

from etils import epath

from moe_jax import files, strict_json
from moe_jax.config.checks import ConfigError
from moe_jax.hf import folders

TRUSTED = "MOE_JAX_CHECKPOINTS"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face folder or a run's workdir, and the step of the run's checkpoint; without a
    step, the newest checkpoint that verifies is meant."""

    folder: pathlib.Path
    step: int | None = None

    @property
    def name(self) -> str:
        """The folder's own name, with the step."""
        return self.folder.name + self._at()

    def __str__(self) -> str:
        return f"{self.folder}{self._at()}"

    def _at(self) -> str:
        return "" if self.step is None else f"@{self.step}"

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of a run's checkpoints.

        The run's stored config may put them elsewhere. A stranger may have written it, so it is
        followed only to the directory in the environment variable MOE_JAX_CHECKPOINTS.

        Raises: ConfigError if it leads to another one.
        """
        elsewhere = ""
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            stored = strict_json.read_object(self.folder / "config.json")
            elsewhere = str(stored["checkpoint"]["directory"])
        if elsewhere and elsewhere != os.environ.get(TRUSTED):
            raise ConfigError(
                f"{self.folder} keeps its checkpoints in {elsewhere}; set {TRUSTED}={elsewhere} if "
                "that is right"
            )
        return checkpoints_of(self.folder, elsewhere)

    def steps(self) -> list[int]:
        """The steps that have a folder among the checkpoints, which may be damaged."""
        return files.numbered(self.checkpoints)

    def check(self) -> None:
        """Raises: ConfigError, with the steps that there are, for a step that the run has not."""
        if self.step is None:
            return
        if folders.is_folder(self.folder):
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no steps: leave "
                f"{self._at()} out"
            )
        steps = self.steps()
        if self.step not in steps:
            has = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise ConfigError(f"{self.folder} has no checkpoint of step {self.step}; {has}")


def checkpoints_of(workdir: pathlib.Path, directory: str) -> epath.Path:
    """The folder of a run's checkpoints; `directory` is its `checkpoint.directory`.

    Raises: ConfigError for a bucket that this machine cannot reach.
    """
    if not directory:
        return epath.Path(workdir) / "checkpoints"
    scheme = directory.partition("://")[0] if "://" in directory else ""
    if scheme not in ("", "gs"):
        raise ConfigError(
            f"config.checkpoint.directory={directory}: Orbax writes to folders and to gs:// only; "
            f"mount the {scheme} bucket and give that folder"
        )
    if scheme and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(
            f"config.checkpoint.directory={directory} needs a package that is not installed; "
            "pip install gcsfs"
        )
    return epath.Path(directory) / workdir.absolute().name


def source_of(name: str) -> Source:
    """The source named FOLDER or RUN@STEP; a folder that has such a name itself is meant itself."""
    folder, _, step = name.rpartition("@")
    if not folder or os.path.exists(name) or not re.fullmatch(files.NUMBER, step):
        return Source(pathlib.Path(name))
    return Source(pathlib.Path(folder), int(step))
