"""Keys of the documents seen so far, on disk, so that the memory of deduplication is bounded."""

import pathlib
import sqlite3
from collections.abc import Sequence


class Seen:
    """A table from each key to the first document that has it.

    It may be asked about a document again, as after a restart, and answers the same.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, document INTEGER) WITHOUT ROWID"
        )

    def is_new(self, number: int, name: str, keys: Sequence[bytes]) -> bool:
        """Notes a document, unless one with a smaller number has one of its keys."""
        keys = [name.encode() + key for key in keys]
        marks = ",".join("?" * len(keys))
        first = self._database.execute(
            f"SELECT MIN(document) FROM seen WHERE key IN ({marks})", keys
        ).fetchone()[0]
        if first is not None and first < number:
            return False
        rows = [(key, number) for key in keys]
        self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)
        return True

    def commit(self) -> None:
        """Keeps what was noted so far if the process is killed."""
        self._database.commit()

    def close(self) -> None:
        self._database.close()

    def remove(self) -> None:
        self.close()
        self._path.unlink()
