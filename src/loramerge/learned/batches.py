"""Batches: the inputs of a model, and an entry that only learning reads."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import OptionError

Batch: TypeAlias = Mapping[str, Any]
"""The inputs of the model: tensors, or mappings of tensors, whose first axis is the batch.

An entry ``weight``, ``(count,)``, isn't given to the model: it weights each example's squared error.
"""


def seen(batch: Batch) -> Batch:
    """Return the entries of a batch that the model gets."""
    return {key: value for key, value in batch.items() if key != "weight"}


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches along the first axis, in nested mappings too.

    Raises:
        OptionError: They have different entries.
    """
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        raise OptionError(
            f"draw gave batches with the entries {', '.join(sorted(map(_entries, batches)))}; "
            "wanted the same ones in all."
        )
    return {
        key: join([b[key] for b in batches]) if isinstance(value, Mapping) else torch.cat([b[key] for b in batches])
        for key, value in first.items()
    }


def _entries(batch: Batch) -> str:
    return f"({', '.join(batch)})"


def weighed(values: Tensor, batch: Batch) -> Tensor:
    """Multiply each example's values by √w, so that their squares count w times."""
    if "weight" not in batch:
        return values
    weight: Tensor = batch["weight"]
    if weight.shape != values.shape[:1] or not bool((weight >= 0).all()):
        raise OptionError(
            f"A batch's weight must be one number from 0 per example, {len(values)}; got {weight.tolist()}."
        )
    return values * weight.sqrt().to(values).reshape(-1, *(1,) * (values.ndim - 1))
