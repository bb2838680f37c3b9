"""SHA-256 of files and of models in directories, cached until a file changes."""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from ...errors import FileError

CHUNK = 1 << 22
SAMPLES, SAMPLE = 64, 1 << 12
"""Number and size in bytes of the parts of a large file that `listing_digest` hashes."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        FileError: It can't be read.
    """
    return _known(_bytes, path)


def blob_digest(content: Path | bytes) -> str:
    """Return the SHA-1 by which git names a file with this content.

    Raises:
        FileError: It can't be read.
    """
    return _git(content) if isinstance(content, bytes) else _known(_blob, content)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _blob(path: Path) -> str:
    with path.open("rb") as file:
        return _git(file.read())


def listing_digest(root: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 of a listing of files: the path of each below ``root``, its size, and a hash of parts of it.

    The parts are spread evenly from the file's beginning (a safetensors header) to its end; a small file
    is hashed whole.

    Raises:
        FileError: A file can't be read.
    """
    lines = [f"{file.relative_to(root).as_posix()} {_known(_glance, file)}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _known(find: Callable[[Path], str], path: Path) -> str:
    try:
        status = path.stat()
        return _found(find, path.resolve(), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise FileError(f"Can't read {path}: {error.strerror}.") from error


@lru_cache(maxsize=256)
def _found(find: Callable[[Path], str], path: Path, changed: int, size: int) -> str:
    return find(path)


def _bytes(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            found.update(part)
    return found.hexdigest()


def _glance(path: Path) -> str:
    size = os.path.getsize(path)
    if size <= CHUNK:
        return f"{size} {_bytes(path)}"
    found = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek((size - SAMPLE) * i // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return f"{size} {found.hexdigest()}"
