"""Taking moments: the model runs with one LoRA at a time on that LoRA's own data, and the inputs are looked at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..lora import LoRA
from .attach import Attachment, Models, Site, attach
from .moments import Kind, Moments

Batch: TypeAlias = Mapping[str, Any]
"""What the model takes: tensors, or mappings of tensors, whose first axis is the batch."""

Predict: TypeAlias = Callable[[Batch], Tensor]
"""The model as a function of a batch."""

Draw: TypeAlias = Callable[[int, torch.Generator, int], Batch]
"""``draw(lora, generator, count)``: ``count`` examples of a LoRA's own data, noised, at random."""

Progress: TypeAlias = Callable[[int, int], None]


def calibrate(
    predict: Predict,
    models: Models,
    loras: Sequence[LoRA],
    draw: Draw,
    *,
    kind: Kind = "core",
    batches: int = 16,
    batch_size: int = 1,
    seed: int = 0,
    merged: LoRA | None = None,
    progress: Progress | None = None,
) -> Moments:
    """The second moments of every module's inputs under each LoRA.

    Args:
        predict: The model; what it returns is not used.
        models: The components that it runs, by name.
        loras: What will be merged.
        draw: Gives data of each LoRA.
        kind: ``"core"`` or ``"gram"``, see `Moments`.
        batches: How many of each LoRA.
        batch_size: Examples in a batch.
        seed: Of the data.
        merged: Another round: the inputs that modules see while this merge of the LoRAs acts,
            instead of each LoRA alone.  Average it with the first round's.
        progress: Called with the number of batches done and of all.

    Raises:
        MergeError: The LoRAs don't fit the model.
    """
    moments = Moments(kind, tuple(lora.name for lora in loras))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), attach(models, loras) as attachment:
        current = 0

        def listen(module: str, site: Site, x: Tensor) -> None:
            moments.update(module, site, current, x)

        attachment.listeners.append(listen)
        if merged is not None:
            _act_as(attachment, merged)
        for done in range(batches * len(loras)):
            current = done % len(loras)
            if merged is None:
                attachment.only(torch.full((batch_size,), current))
            predict(draw(current, generator, batch_size))
            if progress:
                progress(done + 1, batches * len(loras))
    return moments


def _act_as(attachment: Attachment, merged: LoRA) -> None:
    """Have the student be a merge of the same LoRAs, whose ``up`` factors are the stacked ones."""
    attachment.all()
    for module, site in attachment.sites.items():
        down = torch.as_tensor(merged[module].factors()[1])
        attachment.downs[module] = down.to(site.down.device, site.down.dtype)
