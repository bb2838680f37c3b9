"""What to do when the device's memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceMemoryError
from ..wording import first_line


@contextmanager
def memory_for(what: str, ways_out: str) -> Iterator[None]:
    """Have running out of memory say what it did not suffice for, and what to lower.

    Raises:
        DeviceMemoryError: The memory did not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise DeviceMemoryError(f"Out of memory with {what}: {first_line(error)} {ways_out}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
