"""Text as a path of this disk, and a path as text that can be written and printed."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from ...errors import FileError

if TYPE_CHECKING:
    from pathlib import Path


def path_of(text: str | os.PathLike[str], folder: str | os.PathLike[str] = "") -> "Path":
    """Return the path that a text means; text becomes a path here and nowhere else.

    A ``~`` or ``~user`` at the beginning is a home directory, as in a shell; in ``./~`` it is a name, and so is one of
    a user that there isn't.  The path means the same when it is given again.

    Args:
        text: As it was typed, or as it stands in a file; before pathlib drops a ``./`` from it.
        folder: The directory that it is relative to.

    Raises:
        FileError: The system can't look it up: a name that is too long, a NUL, a loop of links, no permission.
    """
    from pathlib import Path

    return Path(located(text, folder))


def located(text: str | os.PathLike[str], folder: str | os.PathLike[str] = "") -> str:
    """Return `path_of` as text, without pathlib where that would change nothing: its import takes some milliseconds."""
    if not os.fspath(text):
        raise FileError("The path is empty. Wanted the name of a file or of a directory.")
    try:
        spelled = _plain(os.path.join(folder, os.path.expanduser(text)))
        found = os.path.join(os.getcwd(), spelled) if spelled.startswith("~") else spelled
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(found)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "it has a NUL in it, or half a character, which no file's name can have")
        raise FileError(f"Can't use the path {os.fspath(text)!r}: {reason}.") from None
    return found


def _plain(path: str) -> str:
    """Return a path as pathlib writes it: without ``./``, doubled slashes and a slash at the end."""
    if os.sep == "/" and not path.startswith("./") and not path.endswith("/") and "//" not in path and "/." not in path:
        return path
    from pathlib import Path

    return str(Path(path))


def is_there(text: str) -> bool:
    """Return whether a text, which may be something else too, is the path of a file or directory."""
    try:
        return path_of(text).exists()
    except FileError:
        return False


def printable(name: str) -> str:
    r"""Return a file's name as text; a byte of it that isn't UTF-8 is spelled ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def same(a: "Path", b: "Path") -> bool:
    """Return whether two paths lead to the same file or directory."""
    return a.exists() and b.exists() and a.samefile(b)
