"""Devices: checks that they exist, errors for too little memory, and arrays as torch tensors."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from .errors import DeviceMemoryError, OptionError, first_line, needed
from .tensors import Array

if TYPE_CHECKING:
    import torch


@contextmanager
def memory_for(what: str, ways_out: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what didn't fit, and what to lower.

    Raises:
        DeviceMemoryError: Memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch and (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise DeviceMemoryError(f"Out of memory with {what}: {first_line(error)} {ways_out}") from error
        raise


def within_memory(resolution: int, batch_size: int, count: int) -> AbstractContextManager[None]:
    """Turn an out-of-memory error in training into one that says what to lower.

    Args:
        resolution: Side of the images in pixels.
        batch_size: Examples per LoRA in a batch.
        count: Number of LoRAs.

    Raises:
        DeviceMemoryError: Memory ran out.
    """
    return memory_for(
        f"{count} LoRA{'s' * (count > 1)} × {batch_size} examples at {resolution} × {resolution}",
        "Ways out, the first first: gradient checkpointing, bf16, a batch size of 1, a smaller resolution.",
    )


def check_device(device: str) -> None:
    """Refuse a device that torch can't compute on.

    Raises:
        OptionError: The device is unknown, or this machine doesn't have it.
    """
    with needed("Computing on a device"):
        import torch

    try:
        torch.ones(1, device=device).item()  # a device such as meta has no values
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(
            f"Can't compute on the device {device!r}: {str(error).splitlines()[0]}. Way out: leave the device out, or give cpu."
        ) from None


def to_torch(array: Array) -> "torch.Tensor":
    """Return a torch tensor with the values of an array; they share memory where that is possible."""
    import numpy as np

    with needed("Making tensors of torch"):
        import torch

    if isinstance(array, torch.Tensor):
        return array
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar 1-D
    array = array if array.flags.writeable else array.copy()
    if array.dtype.name.startswith(("bfloat16", "float8")):
        return torch.from_numpy(array.view(f"u{array.itemsize}")).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
