"""Record which results are done: each by a fingerprint of all that it depends on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loramerge.errors import FileError
from loramerge.files import listing_digest, make_folder, read_json, write_text

MODEL = (".json", ".safetensors", ".txt")
"""Suffixes of a model's files."""


class Ledger:
    """Fingerprints of results, one small file each, so that several processes can write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, result: str, fingerprint: str, files: Iterable[Path] = ()) -> bool:
        """Return whether a result has this fingerprint and its files still exist."""
        try:
            kept = read_json(self._file(result)).get("fingerprint")
        except FileError:
            return False
        return kept == fingerprint and all(file.exists() for file in files)

    def has_any(self, result: str) -> bool:
        """Return whether a result was ever made, with any fingerprint."""
        return self._file(result).exists()

    def add(self, result: str, fingerprint: str) -> None:
        """Record a finished result."""
        make_folder(self.folder)
        write_text(self._file(result), json.dumps({"result": result, "fingerprint": fingerprint}) + "\n")

    @contextmanager
    def making(self, result: str, fingerprint: str) -> Iterator[None]:
        """Record a result at the end of the block; inside it, or after an interruption, it counts as unfinished."""
        self._file(result).unlink(missing_ok=True)
        yield
        self.add(result, fingerprint)

    def _file(self, result: str) -> Path:
        return self.folder / f"{result.replace('/', '.')}.json"


def fingerprint(*parts: Any) -> str:
    """Hash plain data, dataclasses and paths' names with SHA-256."""
    return hashlib.sha256(json.dumps(parts, default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def model_digest(model: str) -> str:
    """Identify a model: by its files if it is a directory, else by its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return listing_digest(folder, [file for file in folder.rglob("*") if file.suffix in MODEL])


def versions(*names: str) -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    from loramerge import __version__

    return {"loramerge": __version__, **{name: version(name) for name in names}}
