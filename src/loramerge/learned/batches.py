"""Batches: what a model is given, and what learning alone looks at."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import OptionError

Batch: TypeAlias = Mapping[str, Any]
"""What the model takes: tensors, or mappings of tensors, whose first axis is the batch.

An entry ``weight``, ``(count,)``, is not given to the model: it says how much each example's squared error counts.
"""


def seen(batch: Batch) -> Batch:
    """What the model sees of a batch."""
    return {key: value for key, value in batch.items() if key != "weight"}


def join(batches: Sequence[Batch]) -> Batch:
    """Batches below each other; nested mappings are joined too.

    Raises:
        OptionError: They have different entries.
    """
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        raise OptionError(
            f"draw gave batches with the entries {', '.join(sorted(map(_entries, batches)))}; wanted alike."
        )
    return {
        key: join([b[key] for b in batches]) if isinstance(value, Mapping) else torch.cat([b[key] for b in batches])
        for key, value in first.items()
    }


def _entries(batch: Batch) -> str:
    return f"({', '.join(batch)})"


def weighed(values: Tensor, batch: Batch) -> Tensor:
    """√w times each example's values, so that their squares count w times."""
    if "weight" not in batch:
        return values
    weight: Tensor = batch["weight"]
    if weight.shape != values.shape[:1] or not bool((weight >= 0).all()):
        raise OptionError(f"A batch's weight is one number from 0 an example, {len(values)}; got {weight.tolist()}.")
    return values * weight.sqrt().to(values).reshape(-1, *(1,) * (values.ndim - 1))
