"""What drawing a picture into a file needs, looked at before the work."""

from pathlib import Path

from .errors import FileError, MissingExtraError


def check_drawable(path: Path, what: str) -> None:
    """Refuse a picture that can't be drawn.

    Args:
        path: Where it shall go.
        what: What is drawn, for the message.

    Raises:
        FileError: The folder doesn't exist.
        MissingExtraError: matplotlib is not installed.
    """
    if not path.parent.is_dir():
        raise FileError(f"Can't write {path}: there is no directory {path.parent}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError(f"{what} needs matplotlib: pip install 'loramerge[plots]'.") from None
