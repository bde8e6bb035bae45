"""Saves a run's checkpoints in the background, and removes those that are not to be kept."""

import contextlib
import errno
import math
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Mapping

import jax

from moe_jax import config as configs
from moe_jax import files, stopping
from moe_jax.parallel import distributed
from moe_jax.training import checkpoint, ownership


class Saver:
    """Writes one checkpoint at a time in a thread, so that the training goes on meanwhile.

    `save` waits for the save before it, copies the state to the host and returns. The host thus
    holds at most one copy of the state.

    Args:
      sound: the steps whose checkpoints are known to verify.
      losses: the held-out loss at each step where it was evaluated, for `checkpoint.keep_best`.
      owned: notes that the run has saved, and refuses a folder that another run has taken.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        run: configs.Run,
        sound: Iterable[int],
        losses: Mapping[str, float],
        owned: ownership.Ownership | None = None,
    ):
        self._directory, self._config = directory, run.config.to_dict()
        self._settings, self._owned = run.checkpoint, owned
        self._sound = frozenset(sound)
        self._losses = {int(step): loss for step, loss in losses.items()}
        self._thread: threading.Thread | None = None
        self._failed: checkpoint.SaveError | None = None

    def save(self, step: int, state, data: dict) -> None:
        """Starts to save.

        Raises: SaveError for this save or the one before it; ConfigError if another run has taken
          the folder.
        """
        self.wait()
        losses = {str(at): loss for at, loss in self._losses.items()}
        with self._naming(step):
            if self._owned:
                self._owned.check_owner()
            check_room(self._directory, num_bytes(state))
            begun = checkpoint.start(
                *(self._directory, step, state),
                data={**data, "losses": losses},
                config=self._config,
            )

        def finish() -> None:
            try:
                with self._naming(step):
                    begun.result()
                    self._sound = frozenset(sorted(self._sound | {step})[-self._settings.keep :])
                    if distributed.is_first():
                        if self._owned:
                            self._owned.saved()
                        self._remove_old()
            except checkpoint.SaveError as error:
                self._failed = error

        self._thread = threading.Thread(target=finish, daemon=True, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises: SaveError if a save in the background has failed; does not wait for it."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def wait(self) -> None:
        """Waits for the save in the background. Raises: SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def evaluated(self, step: int, loss: float) -> None:
        """Notes the held-out loss at a step."""
        if math.isfinite(loss):
            self._losses[step] = loss

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax and the file system raise into a SaveError of one line."""
        try:
            yield
        except configs.ConfigError:
            raise
        except Exception as error:
            stopping.abandon("Orbax")  # its other threads may fail a moment later
            reason = " ".join(str(error).split())[:300]
            newest = f"step {max(self._sound)}" if self._sound else "the start"
            raise checkpoint.SaveError(
                f"the checkpoint of step {step} could not be saved in {self._directory} "
                f"({reason}); make it writable or free some space, and run again to go on from "
                f"{newest}"
            ) from error

    def _remove_old(self) -> None:
        """Removes checkpoints once `keep` newer ones are known to verify."""
        settings = self._settings
        if len(self._sound) < settings.keep:
            return
        there = checkpoint.steps(self._directory)
        known = sorted((self._losses[step], step) for step in there if step in self._losses)
        best = {step for _, step in known[: settings.keep_best]}
        for step in there:
            milestone = settings.keep_every and step % settings.keep_every == 0
            if step < min(self._sound) and step not in best and not milestone:
                checkpoint.remove(self._directory, step)


@contextlib.contextmanager
def finishing(saver: Saver) -> Iterator[Saver]:
    """Waits for the last save at the end of the block, also if the block raises."""
    try:
        yield saver
    except BaseException:
        try:
            saver.wait()
        except checkpoint.SaveError as error:
            distributed.say(str(error))
        raise
    saver.wait()


def num_bytes(state) -> int:
    """The size of a state, or of its `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def check_room(directory: pathlib.Path, needed: int) -> None:
    """Raises: OSError if the file system has fewer than `needed` bytes, or no file, left. A bucket
    has no end."""
    if files.is_remote(directory):
        return
    there = files.nearest(directory)
    left = os.statvfs(there)
    if (free := left.f_bavail * left.f_frsize) < needed:
        room = f"{_amount(free)} are free and a checkpoint takes {_amount(needed)}"
        raise OSError(errno.ENOSPC, room, str(there))
    if left.f_files and not left.f_favail:
        raise OSError(errno.ENOSPC, "the file system has no inode left", str(there))


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
