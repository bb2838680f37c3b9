"""Calibration: the model runs with one LoRA at a time on that LoRA's own data; every module's inputs are recorded."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import OptionError
from ..files.lora import LoRA
from .attach import Models, Site, attach, fingerprints
from .batches import Batch, seen
from .moments import Kind, Moments

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
    shard: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> Moments:
    """Take the second moments of every module's inputs under each LoRA.

    Args:
        predict: The model; what it returns is not used.
        models: The components that it runs, by name.
        loras: The LoRAs that will be merged.
        draw: Draws each LoRA's data.
        kind: ``"core"`` or ``"gram"``, see `Moments`.
        batches: Number of batches per LoRA.
        batch_size: Examples per batch.
        seed: Seed of the data.
        merged: Second pass: record inputs while this merged LoRA is active, any merge of them, instead of
            each LoRA alone.  Average the result with the first pass's.
        progress: Called with the number of batches done and of all.
        shard: This process's number, from 0, if several take moments: each does it on data of its own, and averages its
            `Moments.tensors` with the others'.
        identity: What else the moments depend on, such as the base model and hashes of the data: stored with them,
            and copied into the metadata of results.

    Raises:
        MergeError: The LoRAs don't fit the model.
        OptionError: The kind is unknown, or a number is below 1.
    """
    if kind not in get_args(Kind):
        raise OptionError(f"Unknown kind of moments {kind!r}. Available: {', '.join(get_args(Kind))}.")
    if min(batches, batch_size) < 1:
        raise OptionError(f"Calibration needs batches and examples: got {batches} batches of {batch_size}.")
    taken = {"batches": batches, "batch_size": batch_size, "seed": seed}
    moments = Moments(
        kind,
        tuple(lora.name for lora in loras),
        fingerprints(loras),
        identity={**(identity or {}), "calibration": taken},
    )
    generator = seeded(seed, shard)
    acting = attach(models, [merged]) if merged is not None else nullcontext()
    with torch.no_grad(), attach(models, loras) as attachment, acting:
        current = 0
        attachment.active = merged is None

        def listen(module: str, site: Site, x: Tensor) -> None:
            moments.update(module, site, current, x)

        attachment.listeners.append(listen)
        for done in range(batches * len(loras)):
            current = done % len(loras)
            attachment.only(torch.full((batch_size,), current))
            predict(seen(draw(current, generator, batch_size)))
            if progress:
                progress(done + 1, batches * len(loras))
        attachment.check_all_ran()
    return moments


def seeded(seed: int, shard: int = 0) -> torch.Generator:
    """Return the random generator of a process's data; each process has its own."""
    return torch.Generator().manual_seed(seed + 1_000_003 * shard)
