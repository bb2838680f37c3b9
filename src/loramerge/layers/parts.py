"""What a layer holds, a DoRA looked through: its direction has the factors, alpha and the bias."""

from ..tensors import Array, Spec
from .base import Layer
from .dora import DoRA
from .full import Norm
from .relative import Relative


def direction_of(layer: Layer) -> Layer:
    """The layer that holds the factors: a DoRA's direction, any other layer itself."""
    return layer.direction if isinstance(layer, DoRA) else layer


def alpha_of(layer: Layer) -> float | None:
    """The effective alpha; None where the layer has none, or its kind knows none."""
    held = layer.direction if isinstance(layer, Relative) else direction_of(layer)
    alpha: float | None = getattr(held, "alpha", None)
    return alpha


def own_rank(layer: Layer) -> int | None:
    """The rank that alpha is divided by: of LoHa's and LoKr's own factors, not of their product."""
    tensors = direction_of(layer).tensors()
    roles = ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
    return next((int(tensors[role].shape[0]) for role in roles if role in tensors), None)


def bias_of(layer: Layer) -> Array | Spec | None:
    """The difference of the module's bias, every scale folded in; None where there is none."""
    direction = direction_of(layer)
    given = isinstance(direction, Norm) and direction.b_norm is not None
    return direction.b_norm if given else direction.delta_bias()  # type: ignore[attr-defined]
