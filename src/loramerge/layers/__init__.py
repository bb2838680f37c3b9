"""Layers: the parametrisations of ΔW, one file a family, and how tensors become one of them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..errors import LayerError
from ..tensors import FLOATS, NAMES, Array, Shape, Spec, code, float32, reshape
from .base import Layer, Rows
from .dora import DoRA
from .full import BiasOnly, Carried, Full, Norm, Replaced, Table
from .loha import LoHa
from .lokr import LoKr
from .lowrank import LowRank, low_rank
from .parts import alpha_of, bias_of, direction_of, own_rank
from .relative import FIRST, Relative

KINDS: tuple[type[Layer], ...] = (BiasOnly, LowRank, LoHa, Full, Norm, Table, Replaced, LoKr)
"""Kinds that are recognised by the roles of their tensors, the first that fits."""

FACTORED = ("lora", "loha", "lokr")
"""Kinds of layers that have an exact low-rank form."""

ON_BASE = ("dora", *FIRST)
"""Kinds of layers whose ΔW depends on the base weight, and is known where that is."""

CARRIED = {
    "oft_blocks": "oft",
    "oft_diag": "oft",
    "oft_R": "oft",
    "oft_R_scaled": "oft",
    "rescale": "oft",
    "a1": "glora",
    "a2": "glora",
    "b1": "glora",
    "b2": "glora",
    "bm": "glora",
    "on_input": "ia3",
    "embedding_A": "embedding lora",
    "embedding_B": "embedding lora",
    "reshape_weight": "reshaped weight",
}
"""Roles of algorithms that are carried and not computed with."""

MAGNITUDES = {"magnitude", "row_magnitude"}

UNKNOWN = "?"
"""Begins the role of a tensor that stands beside a layer and is none of a layer's known tensors."""


def build(tensors: Mapping[str, Array | Spec], alpha: float | None, weight: Shape | None) -> Layer:
    """The layer that tensors, named by role, make up.

    Args:
        tensors: Arrays or Specs by role.
        alpha: Effective alpha: the scale is alpha / r.
        weight: Shape of the module's weight, where the architecture knows it.

    Raises:
        LayerError: The tensors are no layer, or one is missing.
    """
    if "diagonal" in tensors and "down" in tensors:
        tensors = _folded(tensors)
    kind = _kind(frozenset(tensors))
    if kind is Carried:
        return _carried(tensors, alpha)
    _check_floats(tensors)
    if kind is DoRA:
        return _dora(tensors, alpha, weight)
    options: dict[str, Any] = dict(tensors)
    if "alpha" in kind.__dataclass_fields__:
        options["alpha"] = alpha
    layer = kind(**options)
    if "weight" in kind.__dataclass_fields__ and weight and _flattened(layer.shape, weight):
        options["weight"] = weight
        return kind(**options)
    return shaped(layer, weight) if weight and not isinstance(layer, Full) else layer


def _carried(tensors: Mapping[str, Array | Spec], alpha: float | None) -> Carried:
    known = next((CARRIED[role] for role in tensors if role in CARRIED), None)
    unknown = [role.removeprefix(UNKNOWN) for role in tensors if role.startswith(UNKNOWN)]
    oft = bool(unknown) and unknown[0].startswith("oft_")
    algorithm = known or ("oft" if oft else unknown[0])
    if algorithm in {DoRA.kind, *(kind.kind for kind in KINDS)}:  # a tensor that is only named like a kind
        algorithm = f"unknown tensor {algorithm}"
    return Carried(algorithm=algorithm, held=dict(tensors), alpha=alpha)


def _folded(tensors: Mapping[str, Array | Spec]) -> dict[str, Array | Spec]:
    """AdaLoRA's three factors as two: ``down`` is (r, in), the diagonal between it and ``up`` (r, 1)."""
    down, diagonal = tensors["down"], tensors["diagonal"]
    if tuple(diagonal.shape) != (down.shape[0], 1):
        raise LayerError(f"the diagonal has shape {tuple(diagonal.shape)} and down {tuple(down.shape)}")
    spec = isinstance(down, Spec) or isinstance(diagonal, Spec)
    product = Spec(tuple(down.shape), "F32") if spec else float32(down) * float32(diagonal)
    return {**{role: t for role, t in tensors.items() if role != "diagonal"}, "down": product}


def _check_floats(tensors: Mapping[str, Array | Spec]) -> None:
    for role, tensor in tensors.items():
        if code(tensor) not in FLOATS:
            raise LayerError(
                f"{role} is {NAMES[code(tensor)]}: quantised numbers mean nothing without their scale. Wanted floats"
            )


def _dora(tensors: Mapping[str, Array | Spec], alpha: float | None, weight: Shape | None) -> DoRA:
    magnitude = tensors["magnitude"] if "magnitude" in tensors else tensors["row_magnitude"]
    rest = {role: t for role, t in tensors.items() if role not in MAGNITUDES}
    if not rest:
        raise LayerError("a magnitude needs a direction, which is missing")
    direction = build(rest, alpha, weight)
    # PEFT shapes the norms of a convolution's rows (1, out, 1, 1), as others shape those of columns.
    rows = (direction.shape[0], *(1,) * (len(direction.shape) - 1))
    peft = "row_magnitude" in tensors and math.prod(magnitude.shape) == rows[0]
    return DoRA(direction=direction, magnitude=reshape(magnitude, rows) if peft else magnitude)


def _flattened(shape: Shape, weight: Shape) -> bool:
    """Whether a shape is a weight's, its kernel maybe flattened."""
    return shape[0] == weight[0] and math.prod(shape) == math.prod(weight)


@lru_cache(maxsize=256)
def _kind(roles: frozenset[str]) -> type[Layer]:
    if any(role in CARRIED or role.startswith(UNKNOWN) for role in roles):
        return Carried
    if roles & MAGNITUDES:
        return DoRA
    for kind in KINDS:
        if roles >= set(kind.required) and roles <= {*kind.required, *kind.optional, "diff_b"}:
            return kind
    nearest = max(KINDS, key=lambda kind: len(roles & {*kind.required, *kind.optional}))
    missing = [role for role in nearest.required if role not in roles]
    strange = sorted(roles - {*nearest.required, *nearest.optional, "diff_b"})
    problems = [f"missing {', '.join(missing)}"] * bool(missing) + [f"not wanted {', '.join(strange)}"] * bool(strange)
    raise LayerError(f"not a whole {nearest.kind} layer: {'; '.join(problems)}")


def shaped(layer: Layer, weight: Shape) -> Layer:
    """A layer in the form of its weight, where its kernel was flattened: a convolution stored as a matrix, or the reverse.

    A layer of another shape, or of a kind that has only one form, stays what it is.
    """
    if layer.shape == weight or not layer.shape or not _flattened(layer.shape, weight):
        return layer
    if isinstance(layer, LoHa | LoKr):
        return replace(layer, weight=weight)
    if isinstance(layer, Full):
        return replace(layer, diff=reshape(layer.diff, weight))
    if not isinstance(layer, LowRank) or layer.mid is not None:
        return layer
    up = reshape(layer.up, (weight[0], layer.rank, *(1,) * (len(weight) - 2)))
    return replace(layer, up=up, down=reshape(layer.down, (layer.rank, *weight[1:])))


__all__ = [
    "FACTORED",
    "MAGNITUDES",
    "ON_BASE",
    "UNKNOWN",
    "BiasOnly",
    "Carried",
    "DoRA",
    "Full",
    "Layer",
    "LoHa",
    "LoKr",
    "LowRank",
    "Norm",
    "Relative",
    "Replaced",
    "Rows",
    "Table",
    "alpha_of",
    "bias_of",
    "build",
    "direction_of",
    "low_rank",
    "own_rank",
    "shaped",
]
