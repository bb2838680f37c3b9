"""Factors that were initialised from the base weight: ΔW is the trained product minus the initial product.

PEFT subtracts the initial product from the base weight before training (``init_lora_weights``), and
again whenever the adapter is loaded.  PiSSA's is the nearest matrix of rank r, OLoRA's the first r
columns and rows of a QR decomposition.

Sources: Meng et al., 2024, https://arxiv.org/abs/2404.02948; Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LayerError, NoFactorsError
from ..tensors import Array, Shape, Spec, namespace
from .base import Layer
from .full import LEAVE_OUT
from .lowrank import LowRank


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Relative(Layer):
    """A LoRA whose factors began as a part of the base weight."""

    trained: LowRank
    """The factors as they are after training."""
    start: str
    """PEFT's name for the beginning: ``"pissa"``, ``"olora"``, ``"corda"``."""

    @property
    def kind(self) -> str:
        return self.start

    @property
    def shape(self) -> Shape:
        return self.trained.shape

    @property
    def own_rank(self) -> int | None:
        return self.trained.own_rank

    @property
    def own_alpha(self) -> float | None:
        return self.trained.own_alpha

    @property
    def needs_base(self) -> bool:
        return self.start in FIRST

    @property
    def computable(self) -> bool:
        return self.start in FIRST

    @property
    def no_factors(self) -> str:
        return (
            f"its factors began as a part of the base weight (init_lora_weights {self.start!r}), so ΔW is not their "
            f"product. Ways out: {_ways(self.start)}, or {LEAVE_OUT}"
        )

    def tensors(self) -> dict[str, Array | Spec]:
        return self.trained.tensors()

    def map(self, function: Callable[[Any], Any]) -> "Relative":
        return replace(self, trained=self.trained.map(function))

    def delta_bias(self) -> Array | Spec | None:
        return self.trained.delta_bias()

    def delta_on(self, weight: Array) -> Array:
        first = FIRST.get(self.start)
        if first is None:
            raise NoFactorsError(self.no_factors)
        if weight.ndim != 2:
            raise LayerError(f"init_lora_weights {self.start!r} is of matrices only, the weight has shape {self.shape}")
        xp = namespace(weight)
        before = first(xp.astype(weight, xp.float64), self.trained)  # in float64: the two nearly cancel
        return xp.astype(self.trained.delta() - before, weight.dtype)

    @property
    def by_rows(self) -> bool:
        return False


def _pissa(weight: Array, trained: LowRank) -> Array:
    xp = namespace(weight)
    u, s, vh = xp.linalg.svd(weight, full_matrices=False)
    r = trained.rank
    return (u[:, :r] * s[:r]) @ vh[:r]


def _olora(weight: Array, trained: LowRank) -> Array:
    q, upper = namespace(weight).linalg.qr(weight)
    return trained.scale * (q[:, : trained.rank] @ upper[: trained.rank])


FIRST: dict[str, Callable[[Array, LowRank], Array]] = {"pissa": _pissa, "olora": _olora}
"""Functions that compute the product that the factors began as, from the base weight."""


def _ways(start: str) -> str:
    """Say how to get a plain LoRA out of such an adapter."""
    if start in FIRST:
        return "bake it into the base model, or convert it as it is saved (PEFT's path_initial_model_for_weight_conversion)"
    if start.startswith(("pissa", "corda", "lora_ga")):
        return "convert it as it is saved (PEFT's path_initial_model_for_weight_conversion)"
    return (
        "merge it with PEFT into the very weights that it was trained on, and extract a LoRA from the result and the "
        "original base (loramerge extract)"
    )
