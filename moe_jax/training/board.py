"""TensorBoard, written by a thread of its own: a fault of it stops no run, and delays none but for
at most 20 seconds at the end."""

import pathlib
import queue
import threading

import tensorboardX

from moe_jax.parallel import distributed

ROWS, SECONDS = 1000, 10  # rows that wait at most, and the time to write them at the end


class Board:
    """Writes scalars in the order in which they come; rows beyond `ROWS` are dropped and counted.

    metrics.jsonl has the same numbers, so a fault is reported once and is not worth a run.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None):
        self._rows: queue.Queue = queue.Queue(ROWS)
        self._dropped, self._fault = 0, ""
        arguments = (str(folder), purge_step)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def add(self, step: int, scalars: dict[str, float]) -> None:
        try:
            self._rows.put_nowait((step, scalars))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits for the rows to be written, but not for a thread that hangs."""
        try:
            self._rows.put(None, timeout=SECONDS)
            self._thread.join(SECONDS)
        except queue.Full:
            pass
        hangs = self._thread.is_alive()
        if self._fault or self._dropped or hangs:
            why = self._fault or ("it hangs" if hangs else f"it is slow, {self._dropped} dropped")
            distributed.say(f"TensorBoard lacks rows that metrics.jsonl has: {why}")

    def _write(self, folder: str, purge_step: int | None) -> None:
        row: tuple | None = ()
        try:
            board = tensorboardX.SummaryWriter(folder, purge_step=purge_step)
            while (row := self._rows.get()) is not None:
                step, scalars = row
                for name, value in scalars.items():
                    board.add_scalar(name, value, step)
                board.flush()
            board.close()
        except Exception as error:  # whatever the library raises
            self._fault = repr(error)[:200]
            while row is not None:  # so that the queue never fills
                row = self._rows.get()
