"""Which variants of a file came before, of however many, in memory that does not grow with them."""

import sqlite3
from types import TracebackType

from hyena_dist.data.errors import DataError

_MEMORY = 16 << 10
"""KiB that are held in memory, some half a million variants; what is more lies in a temporary file."""


class Seen:
    """Numbers variants from 0 in the order in which they come first. It is used in a `with` statement, at whose end
    nothing of it is left.
    """

    def __enter__(self) -> "Seen":
        self._table = sqlite3.connect("")  # a file of its own, made when it is needed, which nobody else sees
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_MEMORY}"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute("CREATE TABLE seen (at INTEGER, removed INTEGER, alt BLOB, number INTEGER, "
                            "PRIMARY KEY (at, removed, alt)) WITHOUT ROWID")
        self._count = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 where: TracebackType | None) -> None:
        self._table.close()

    def number(self, at: int, removed: int, alt: bytes) -> tuple[int, bool]:
        """The number of a variant, and whether this is the first time that it comes.

        Raises:
            DataError: there is no room for the temporary file.
        """
        key = (at, removed, alt)
        try:
            added = self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?)", (*key, self._count)).rowcount
            if added:
                self._count += 1
                return self._count - 1, True
            known = self._table.execute("SELECT number FROM seen WHERE at = ? AND removed = ? AND alt = ?", key)
            return known.fetchone()[0], False
        except sqlite3.Error as error:
            raise DataError(f"the variants that were seen do not fit into a temporary file ({error}): free some of the "
                            "disk, or name a directory that has room with TMPDIR") from error
