"""What is done already: each result is known by a fingerprint of all that it depends on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loramerge.files import listing_digest, make_folder, write_text

MODEL = (".json", ".safetensors", ".txt")
"""Endings of the files that are a model."""


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
        make_folder(self.folder)
        write_text(self._file(result), json.dumps({"result": result, "fingerprint": fingerprint}) + "\n")

    @contextmanager
    def making(self, result: str, fingerprint: str) -> Iterator[None]:
        """While a result is made, it is known to be made from nothing: neither the old nor the new is sure to be there."""
        self._file(result).unlink(missing_ok=True)
        yield
        self.add(result, fingerprint)

    def _file(self, result: str) -> Path:
        return self.folder / f"{result.replace('/', '.')}.json"


def fingerprint(*parts: Any) -> str:
    """SHA-256 of plain data, dataclasses and paths' names."""
    return hashlib.sha256(json.dumps(parts, default=_plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def model_digest(model: str) -> str:
    """What tells a model from others: its files where it is a directory, else its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return listing_digest(folder, [file for file in folder.rglob("*") if file.suffix in MODEL])


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    from loramerge import __version__

    return {"loramerge": __version__, **{name: version(name) for name in names}}
