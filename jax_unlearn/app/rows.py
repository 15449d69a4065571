"""metrics.jsonl: one row a step, and the digest that says whether they are still the same."""

import hashlib
import json
import os
import pathlib
from typing import Any

from jax_unlearn.app.files import replace_file
from jax_unlearn.app.report import read_rows

__all__ = ["RowLog", "rows_digest"]


def _first(path: pathlib.Path, count: int) -> bytes | None:
    """The first `count` lines; None where there are fewer whole ones."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = [b""]
    return None if len(lines) <= count else b"".join(line + b"\n" for line in lines[:count])


def rows_digest(path: pathlib.Path, count: int) -> str | None:
    """SHA-256 of the first `count` rows as they are in the file; None where there are fewer."""
    content = _first(path, count)
    return None if content is None else hashlib.sha256(content).hexdigest()


class RowLog:
    """Appends rows to a file.

    Attributes:
      count: rows in the file.
      seconds: those of the last row; 0 without one.
    """

    def __init__(self, path: pathlib.Path, keep: int) -> None:
        """Opens a file, and cuts it back to its first `keep` rows.

        Raises:
          ValueError: if there are fewer, or one cannot be read; it is named.
        """
        content = _first(path, keep)
        if content is None:
            raise ValueError(f"{path} has fewer rows than the {keep} steps that were done.")
        replace_file(path, content)
        rows = read_rows(path)
        self.count = len(rows)
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self._digest = hashlib.sha256(content)
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row; it reaches the file before this returns."""
        line = (json.dumps(row) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._digest.update(line)
        self.count += 1
        self.seconds = float(row["seconds"])

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Returns when the rows would survive a power cut: a checkpoint is to count on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
