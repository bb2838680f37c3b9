"""What to do when the device's memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import DeviceMemoryError


@contextmanager
def within_memory(resolution: int, batch_size: int, count: int) -> Iterator[None]:
    """Have running out of memory say what to lower.

    Args:
        resolution: Side of the images in pixels.
        batch_size: Examples of each LoRA in a batch.
        count: How many LoRAs.

    Raises:
        DeviceMemoryError: The memory did not suffice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known:
            raise
        first = str(error).splitlines()[0]
        raise DeviceMemoryError(
            f"Out of memory with {count} LoRA{'s' * (count > 1)} × {batch_size} examples at {resolution} × {resolution}: {first} Ways out, "
            "the first first: gradient checkpointing, bf16, a batch size of 1, a smaller resolution."
        ) from error
