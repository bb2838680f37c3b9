"""The index of the kinds of layers, and the layer that tensors make up."""

import math
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import LayerError
from ..tensors import FLOATS, NAMES, Array, Shape, Spec, code, float32, reshape, same_weight
from .base import Layer

if TYPE_CHECKING:
    from .dora import DoRA
    from .full import Carried

KINDS = (
    ("lowrank", "LowRank"),
    ("loha", "LoHa"),
    *(("full", name) for name in ("BiasOnly", "Full", "Norm", "Table", "Replaced")),
    ("lokr", "LoKr"),
)
"""Modules and names of the kinds that are recognised by the roles of their tensors; the first that fits is taken.

LoKr is the last, as it requires no single tensor.  Each is imported when no kind before it fits: a file of plain LoRA
needs one of them.
"""


def kinds() -> Iterator[type[Layer]]:
    """Yield the kinds of `KINDS`, each imported when it is asked for."""
    return (_imported(*kind) for kind in KINDS)


@cache
def _imported(module: str, name: str) -> type[Layer]:
    found: type[Layer] = getattr(import_module(f".{module}", __package__), name)
    return found


def ranked_by() -> Iterator[str]:
    """Yield the roles of the factors whose first axis is the rank that alpha is divided by, of all kinds."""
    return (role for kind in kinds() for role in kind.ranked_by)


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
"""Algorithms that are carried and not computed with, by the roles of their tensors."""

MAGNITUDES = {"magnitude", "row_magnitude"}
"""Roles of a DoRA's magnitude; PEFT's shape for convolutions makes the second one ambiguous."""

UNKNOWN = "?"
"""Prefix of the role of a tensor that has a layer's key but an unknown suffix."""


def build(tensors: Mapping[str, Array | Spec], alpha: float | None, weight: Shape | None) -> Layer:
    """Make a layer of tensors that are named by role.

    Args:
        tensors: Arrays or Specs by role.
        alpha: Effective alpha: the scale is alpha / r.
        weight: Shape of the module's weight, if the architecture knows it.

    Raises:
        LayerError: The tensors aren't those of a layer, or one is missing.
    """
    if "diagonal" in tensors and "down" in tensors:
        _check_floats(tensors)
        tensors = _folded(tensors)
    roles = frozenset(tensors)
    if _is_carried(roles):
        return _carried(tensors, alpha)
    _check_floats(tensors)
    if roles & MAGNITUDES:
        return _dora(tensors, alpha, weight)
    kind = _kind(roles)
    options: dict[str, Any] = dict(tensors)
    if "alpha" in kind.__dataclass_fields__:
        options["alpha"] = alpha
    layer = kind(**options)
    if "weight" in kind.__dataclass_fields__ and weight and same_weight(layer.shape, weight):
        options["weight"] = weight
        return kind(**options)
    return layer.shaped(weight) if weight and not layer.dense else layer


def _carried(tensors: Mapping[str, Array | Spec], alpha: float | None) -> "Carried":
    from .dora import DoRA
    from .full import Carried

    known = next((CARRIED[role] for role in tensors if role in CARRIED), None)
    unknown = [role.removeprefix(UNKNOWN) for role in tensors if role.startswith(UNKNOWN)]
    oft = bool(unknown) and unknown[0].startswith("oft_")
    algorithm = known or ("oft" if oft else unknown[0])
    if algorithm in {DoRA.kind_name, *(kind.kind_name for kind in kinds())}:  # a tensor that is only named like a kind
        algorithm = f"unknown tensor {algorithm}"
    return Carried(algorithm=algorithm, held=dict(tensors), alpha=alpha)


def _folded(tensors: Mapping[str, Array | Spec]) -> dict[str, Array | Spec]:
    """Turn AdaLoRA's three factors into two: ``down`` is (r, in), the diagonal between it and ``up`` (r, 1)."""
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


def _dora(tensors: Mapping[str, Array | Spec], alpha: float | None, weight: Shape | None) -> "DoRA":
    from .dora import DoRA

    magnitude = tensors["magnitude"] if "magnitude" in tensors else tensors["row_magnitude"]
    factors = {role: tensor for role, tensor in tensors.items() if role not in MAGNITUDES}
    if not factors:
        raise LayerError("a magnitude needs a direction, which is missing")
    direction = build(factors, alpha, weight)
    # PEFT shapes the norms of a convolution's rows (1, out, 1, 1), as others shape those of columns.
    rows = (direction.shape[0], *(1,) * (len(direction.shape) - 1))
    peft = "row_magnitude" in tensors and math.prod(magnitude.shape) == rows[0]
    return DoRA(direction=direction, magnitude=reshape(magnitude, rows) if peft else magnitude)


@lru_cache(maxsize=256)
def _is_carried(roles: frozenset[str]) -> bool:
    return any(role in CARRIED or role.startswith(UNKNOWN) for role in roles)


@lru_cache(maxsize=256)
def _kind(roles: frozenset[str]) -> type[Layer]:
    for kind in kinds():
        if roles >= set(kind.required) and roles <= {*kind.required, *kind.optional, "diff_b"}:
            return kind
    nearest = max(kinds(), key=lambda kind: len(roles & {*kind.required, *kind.optional}))
    missing = [role for role in nearest.required if role not in roles]
    strange = sorted(roles - {*nearest.required, *nearest.optional, "diff_b"})
    problems = [f"missing {', '.join(missing)}"] * bool(missing) + [f"not wanted {', '.join(strange)}"] * bool(strange)
    raise LayerError(f"not a whole {nearest.kind_name} layer: {'; '.join(problems)}")
