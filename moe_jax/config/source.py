"""How a model is named: by its folder or, for one checkpoint of a run, as RUN@STEP."""

import dataclasses
import os
import pathlib
import re

from moe_jax.config.checks import ConfigError
from moe_jax.hf import folders

STEP = "0|[1-9][0-9]*"  # how a step is written


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

    def check(self) -> None:
        """Raises: ConfigError, with the steps that there are, for a step that the run has not."""
        if self.step is None:
            return
        if folders.is_folder(self.folder):
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no steps: leave "
                f"{self._at()} out"
            )
        names = [path.name for path in (self.folder / "checkpoints").glob("*") if path.is_dir()]
        steps = sorted(int(name) for name in names if re.fullmatch(STEP, name))
        if self.step not in steps:
            has = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise ConfigError(f"{self.folder} has no checkpoint of step {self.step}; {has}")


def source_of(name: str) -> Source:
    """The source named FOLDER or RUN@STEP; a folder that has such a name itself is meant itself."""
    folder, _, step = name.rpartition("@")
    if not folder or os.path.exists(name) or not re.fullmatch(STEP, step):
        return Source(pathlib.Path(name))
    return Source(pathlib.Path(folder), int(step))
