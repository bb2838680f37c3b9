"""What is done already: each result is known by a fingerprint of all that it depends on."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loramerge.adapters.folders import made
from loramerge.storage.writer import write_text

WHOLE = 1 << 28
"""Bytes of a folder up to which every one is looked at."""
END = 1 << 20
"""Bytes at each end of a file that are looked at in a larger folder."""


class Ledger:
    """The fingerprints of results, one small file each, so that several processes can keep it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, result: str, fingerprint: str, files: Iterable[Path] = ()) -> bool:
        """Whether a result was made from the same, and its files are still there."""
        try:
            kept = json.loads(self._file(result).read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return kept == fingerprint and all(file.exists() for file in files)

    def has_any(self, result: str) -> bool:
        """Whether a result was ever made, from whatever."""
        return self._file(result).exists()

    def add(self, result: str, fingerprint: str) -> None:
        """Note that a result is made."""
        made(self.folder)
        write_text(self._file(result), json.dumps({"result": result, "fingerprint": fingerprint}) + "\n")

    def _file(self, result: str) -> Path:
        return self.folder / f"{result.replace('/', '.')}.json"


def fingerprint(*parts: Any) -> str:
    """SHA-256 of plain data, dataclasses and paths' names."""
    return hashlib.sha256(json.dumps(parts, default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def folder_digest(folder: Path, *suffixes: str) -> str:
    """SHA-256 of a folder's files: every byte of a small one, names, sizes and both ends of a large one's."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and (not suffixes or file.suffix in suffixes))
    small = sum(file.stat().st_size for file in files) <= WHOLE
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            whole.update(stream.read() if small else stream.read(END))
            if not small and file.stat().st_size > END:
                stream.seek(-END, 2)
                whole.update(stream.read())
    return whole.hexdigest()


def model_digest(model: str) -> str:
    """What tells a model from others: its files where it is a directory, else its name."""
    return folder_digest(Path(model), ".json", ".safetensors", ".txt") if Path(model).is_dir() else model


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    from loramerge import __version__

    return {"loramerge": __version__, **{name: version(name) for name in names}}
