"""Temporary files and directories next to their final path, renamed when complete.

Each is locked by the process that makes it, and by its forks.  A killed process leaves one behind
whose lock is free: the next process that writes to the same path deletes it.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import FileError

SUFFIX = ".part"

LONGEST = 255 - len(f"..12345678{SUFFIX}")
"""The most bytes of a name that has room for a temporary one."""


def file(target: Path) -> tuple[int, str]:
    """Make an empty file in the target's directory; return its descriptor and its path.

    Raises:
        OSError: It can't be made.
    """
    clear(target.parent, target.name)
    while True:
        path = target.parent / f"{_beginning(target.name)}{os.urandom(4).hex()}{SUFFIX}"
        with suppress(FileExistsError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            _lock(fd, wait=True)
            if os.fstat(fd).st_nlink:  # no other process deleted it before it was locked
                return fd, str(path)
            os.close(fd)


def _beginning(name: str) -> str:
    """Return the beginning of temporary names for a final one, which is hashed if it leaves no room for the rest."""
    data = os.fsencode(name)
    return f".{name}." if len(data) <= LONGEST else f".{hashlib.sha256(data).hexdigest()}."


@contextmanager
def held(fd: int) -> Iterator[None]:
    """Keep a file locked after it is closed, so that no other process deletes it before it is renamed."""
    if sys.platform == "win32":  # has no such locks, and can't rename an open file
        yield
        return
    also = os.dup(fd)
    try:
        yield
    finally:
        os.close(also)


@contextmanager
def folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a temporary directory, and delete it at the end with all that is left in it.

    Args:
        parent: The directory to make it in.
        name: The final name there of what it will hold.

    Raises:
        OSError: It can't be made.
    """
    import tempfile

    clear(parent, name)
    while True:
        with (
            tempfile.TemporaryDirectory(prefix=_beginning(name), suffix=SUFFIX, dir=parent) as made,
            locked(made) as there,
        ):
            if there:
                yield Path(made)
                return


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Lock a directory inside of the block, once no other process has it; False if it is gone by then."""
    if sys.platform == "win32":  # has no such locks
        yield True
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        _lock(fd, wait=True)
        yield os.path.exists(folder) and os.path.samestat(os.fstat(fd), os.stat(folder))
    finally:
        os.close(fd)


def clear(parent: Path, name: str) -> None:
    """Delete what killed processes left of writing to a name."""
    ours = re.compile(re.escape(_beginning(name)) + r"\w{8}" + re.escape(SUFFIX))
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
    """Lock a file until it is closed; False if another process has the lock, or the file system has no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_folder(folder: Path) -> Path:
    """Make a directory if it is missing, and return it.

    Raises:
        FileError: It can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Can't make the directory {folder}: {error.strerror}.") from None
    return folder
