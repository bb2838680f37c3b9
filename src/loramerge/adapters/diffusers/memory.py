"""What to do when the device's memory does not suffice for learning."""

from contextlib import AbstractContextManager

from ..memory import memory_for

WAYS_OUT = "Ways out, the first first: gradient checkpointing, bf16, a batch size of 1, a smaller resolution."


def within_memory(resolution: int, batch_size: int, count: int) -> AbstractContextManager[None]:
    """Have running out of memory say what to lower.

    Args:
        resolution: Side of the images in pixels.
        batch_size: Examples of each LoRA in a batch.
        count: How many LoRAs.

    Raises:
        DeviceMemoryError: The memory did not suffice.
    """
    loras = f"{count} LoRA{'s' * (count > 1)}"
    return memory_for(f"{loras} × {batch_size} examples at {resolution} × {resolution}", WAYS_OUT)
