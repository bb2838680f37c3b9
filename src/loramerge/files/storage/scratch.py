"""Files and directories that are not whole yet, beside the place that they will take.

Each is locked by the process that makes it, and by its forks.  Whoever is killed leaves one behind
whose lock is free: the next to write to the same place clears it away.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import FileError

SUFFIX = ".part"


def file(target: Path) -> tuple[int, str]:
    """An empty file in the target's directory: its descriptor, and its path.

    Raises:
        OSError: It can't be made.
    """
    clear(target.parent, target.name)
    while True:
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent)
        _lock(fd, wait=True)
        if os.fstat(fd).st_nlink:  # it was not cleared away before it was locked
            return fd, name
        os.close(fd)


@contextmanager
def held(fd: int) -> Iterator[None]:
    """Keep a file's lock past its closing: one that waits for its new name is not to be cleared away."""
    if sys.platform == "win32":  # has no such locks, and renames no open file
        yield
        return
    also = os.dup(fd)
    try:
        yield
    finally:
        os.close(also)


@contextmanager
def folder(parent: Path, name: str) -> Iterator[Path]:
    """A directory that goes with all that is left in it.

    Args:
        parent: Where it is made.
        name: What will take a place there.

    Raises:
        OSError: It can't be made.
    """
    clear(parent, name)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=SUFFIX, dir=parent) as made:
        fd = os.open(made, os.O_RDONLY) if sys.platform != "win32" else -1
        try:
            _lock(fd, wait=True)
            yield Path(made)
        finally:
            if fd >= 0:
                os.close(fd)


def clear(parent: Path, name: str) -> None:
    """Remove what killed processes left that were to write something of a name."""
    ours = re.compile(re.escape(f".{name}.") + r"\w{8}" + re.escape(SUFFIX))
    with suppress(OSError):
        for entry in os.listdir(parent):
            if ours.fullmatch(entry):
                _remove_if_free(parent / entry)


def _remove_if_free(path: Path) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            if _lock(fd, wait=False):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(fd)


def _lock(fd: int, *, wait: bool) -> bool:
    """Lock a file until it is closed; False if another process has it, or the file system knows no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_folder(folder: Path) -> Path:
    """The directory, which is made where it is missing.

    Raises:
        FileError: It can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Can't make the directory {folder}: {error.strerror}.") from None
    return folder
