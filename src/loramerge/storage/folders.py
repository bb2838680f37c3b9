"""Directories to write into."""

from pathlib import Path

from ..errors import FileError


def made(folder: Path) -> Path:
    """The directory, which is made where it is missing.

    Raises:
        FileError: It can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Can't make the directory {folder}: {error.strerror}.") from None
    return folder
