"""The table of a sweep, on the disk and in memory: a row per merge."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, OptionError, did_you_mean
from ..files.storage.texts import as_json, read_json
from ..files.storage.writer import write_text


@dataclass(frozen=True)
class Row:
    """One merge of a sweep."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    figures: Mapping[str, float | None]
    """``size`` in bytes; ``rank_min`` and ``rank_max``; ``error``, ‖ΔW − kept‖ / ‖ΔW‖ of the cut to the rank;
    ``kept:NAME`` per LoRA and ``interference``, see `figures.measure`; and the columns of the score."""
    reused: bool = False
    """True if an earlier sweep had merged it."""
    failed: str | None = None
    """Why the merge, its figures or its score are missing; None if nothing failed."""

    def __getitem__(self, column: str) -> Any:
        return {"name": self.name, **self.settings, **self.figures}.get(column)


class Ledger:
    """The table on the disk, written after every merge, so that an interrupted sweep can go on.

    Args:
        folder: The sweep's directory.
        score: A text that identifies the score; None for a sweep without one, or one that can't be identified.
    """

    def __init__(self, folder: Path, score: str | None) -> None:
        self.folder = folder
        self.score = score
        self.entries: dict[str, dict[str, Any]] = {}
        with suppress(FileError, KeyError, TypeError, AttributeError):
            rows = read_json(folder / "sweep.json")["rows"]
            # What failed is tried again, so it is said of the new try alone.
            kept = [{key: value for key, value in row.items() if key != "failed"} for row in rows if row["figures"]]
            self.entries = {str(row["name"]): row for row in kept if _is_whole(row)}

    def figures(self, name: str) -> dict[str, Any] | None:
        """Return the figures of an earlier merge, or None."""
        return self.entries.get(name, {}).get("figures")

    def scores(self, name: str) -> dict[str, Any] | None:
        """Return what the same score gave for an earlier merge, or None."""
        entry = self.entries.get(name, {})
        return entry.get("scores") if self.score and entry.get("score") == self.score else None

    def add(self, row: Row, scores: Mapping[str, float | None] | None = None) -> None:
        """Write a row into the table."""
        entry: dict[str, Any] = {
            "name": row.name,
            "file": row.path.name,
            "settings": row.settings,
            "figures": row.figures,
        }
        entry |= {"failed": row.failed} if row.failed else {}
        self.entries[row.name] = {**entry, **({"score": self.score, "scores": scores} if scores is not None else {})}
        self._write(self.entries)

    def forget(self, name: str) -> None:
        """Drop the figures of a file that is about to be replaced, so that the new file never keeps the old figures."""
        if self.entries.pop(name, None):
            self._write(self.entries)

    def close(self, rows: Sequence[Row], settings: Sequence[str]) -> None:
        """Write the rows of this sweep only, in its order, to ``sweep.json`` and ``sweep.csv``."""
        self._write([row.name for row in rows])
        write_text(self.folder / "sweep.csv", _csv(rows, settings))

    def _write(self, names: Iterable[str]) -> None:
        from .._version import __version__

        data = {"loramerge": __version__, "rows": [self.entries[name] for name in names]}
        write_text(self.folder / "sweep.json", as_json(data, 2) + "\n")


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the file, which anyone may have written, has its figures, and they are numbers."""
    figures = {**row["figures"], **row.get("scores", {})}
    return {"size", "rank_min", "rank_max", "error"} <= figures.keys() and all(
        value is None or type(value) in (int, float) for value in figures.values()
    )


def _csv(rows: Sequence[Row], settings: Sequence[str]) -> str:
    text = io.StringIO()
    figures = dict.fromkeys(column for row in rows for column in row.figures)
    writer = csv.writer(text, lineterminator="\n")
    failed = ["failed"] if any(row.failed for row in rows) else []
    writer.writerow(["name", "file", *settings, *figures, *failed])
    for row in rows:
        values = [*(row[column] for column in (*settings, *figures)), *(row.failed for _ in failed)]
        writer.writerow([row.name, row.path.name, *("" if v is None else v for v in values)])
    return text.getvalue()


def ordered(rows: Sequence[Row], column: str) -> list[Row]:
    """Sort rows by a column, rising, or falling if its name has a minus in front.  Empty cells come last.

    Raises:
        OptionError: No row has the column.
    """
    name = column.removeprefix("-")
    known = dict.fromkeys(c for row in rows for c in ("name", *row.settings, *row.figures))
    if name not in known:
        raise OptionError(f"Can't sort by {name!r}.{did_you_mean(name, known)} Columns: {', '.join(known)}.")
    filled = [row for row in rows if row[name] is not None]
    filled.sort(key=lambda row: _key(row[name]), reverse=column.startswith("-"))
    return filled + [row for row in rows if row[name] is None]


def _key(value: Any) -> tuple[bool, float, str]:
    """Return a sort key: numbers come first, then text."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, "" if number else str(value)
