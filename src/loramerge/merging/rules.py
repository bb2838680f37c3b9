"""Rules that choose the weights of a merge: from the number of LoRAs, or from the norms of their updates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..errors import MergeError, computing
from ..files.lora import LoRA
from ..layers import Layer
from ..layers.base import in_one_library
from ..registry import Registry
from .methods.linear import linear
from .methods.vectors import vectors

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint

Scope: TypeAlias = Literal["module", "component", "whole"]
SCOPES: tuple[Scope, ...] = ("module", "component", "whole")

CANCELLED = 1e-6
"""Share of the updates' own size below which their sum counts as zero: the rounding of float32 factors."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the updates of N LoRAs, over one module or many."""

    each: Sequence[float]
    """‖ΔWᵢ‖ of every LoRA."""
    total: float | None
    """‖Σ ΔWᵢ‖; None where the rule doesn't ask for it."""
    where: str
    """The modules that are measured, for errors."""

    @property
    def energy(self) -> float:
        """Σ ‖ΔWᵢ‖²."""
        return math.fsum(norm * norm for norm in self.each)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for the weights of N LoRAs."""

    name: str
    text: str
    """The formula, and what it gives."""
    count: Callable[[int], float] | None = None
    """Each LoRA's weight for N of them, if that is all it depends on."""
    sizes: Callable[[Sizes], list[float]] | None = None
    """The LoRAs' weights from the sizes of their updates, otherwise."""
    total: bool = False
    """True if `sizes` asks for ‖Σ ΔWᵢ‖."""
    scope: Scope = "module"
    """The modules that are measured together, unless the user says otherwise."""


def _shares(sizes: Sizes) -> list[float]:
    total = math.fsum(sizes.each)
    return [norm / total if total else 0.0 for norm in sizes.each]


def _equal(sizes: Sizes) -> list[float]:
    acting = sum(norm > 0 for norm in sizes.each)
    return [math.sqrt(sizes.energy) / (acting * norm) if norm else 0.0 for norm in sizes.each]


def _keeping(share: Callable[[int], float]) -> Callable[[Sizes], list[float]]:
    """Return the rule that gives ‖Σ wᵢ ΔWᵢ‖² this share of Σ ‖ΔWᵢ‖², all weights being the same."""

    def weights(sizes: Sizes) -> list[float]:
        assert sizes.total is not None
        size = math.sqrt(sizes.energy)
        if not size:
            return [0.0] * len(sizes.each)
        if sizes.total <= CANCELLED * size:
            raise MergeError(
                f"the LoRAs cancel each other: the norm of their sum is {sizes.total:.3g}, where unrelated ones would have "
                f"{size:.3g}, so no strength keeps their energy. Way out: --weights sqrt, or a weight for each."
            ).at(sizes.where)
        return [math.sqrt(share(sum(norm > 0 for norm in sizes.each))) * size / sizes.total] * len(sizes.each)

    return weights


RULES: Registry[Rule] = Registry(
    "weights",
    (
        Rule(name="uniform", text="1/N each: the average", count=lambda n: 1 / n),
        Rule(name="sum", text="1 each: what loading all of them at full strength does", count=lambda n: 1.0),
        Rule(
            name="sqrt",
            text="1/√N each: the sum of unrelated updates is as large as one of them",
            count=lambda n: n**-0.5,
        ),
        Rule(name="l2", text="‖ΔWᵢ‖ / Σₖ ‖ΔWₖ‖: the stronger LoRA counts more", sizes=_shares),
        Rule(
            name="equal",
            text="√(Σₖ ‖ΔWₖ‖²) / (N ‖ΔWᵢ‖): equally strong updates, then 1/√N",
            sizes=_equal,
            scope="whole",
        ),
        Rule(
            name="energy",
            text="the same for all, so that ‖Σ wᵢ ΔWᵢ‖² is the mean of ‖ΔWᵢ‖²",
            sizes=_keeping(lambda n: 1 / n),
            total=True,
            scope="whole",
        ),
        Rule(
            name="energy-sum",
            text="the same for all, so that ‖Σ wᵢ ΔWᵢ‖² is the sum of ‖ΔWᵢ‖²",
            sizes=_keeping(lambda n: 1.0),
            total=True,
            scope="whole",
        ),
    ),
)
"""Rules for weights, by name. N counts the LoRAs that act on the modules that are measured together."""


def measured(
    rule: Rule, loras: Sequence[LoRA], scope: Scope, base: "Checkpoint | None"
) -> Callable[[str], list[float]]:
    """Return a function that gives each LoRA's weight in a module by a rule on sizes.

    Args:
        rule: The rule.
        loras: The LoRAs that are merged.
        scope: The modules that are measured together.
        base: The base model, for the norms of layers whose ΔW depends on it.
    """
    assert rule.sizes is not None
    weigh, found = rule.sizes, dict[str, list[float]]()

    def group(module: str) -> str:
        return {"module": module, "component": module.partition(".")[0], "whole": "whole file"}[scope]

    def weights(module: str) -> list[float]:
        if scope == "module":
            return weigh(_sizes(rule, loras, [module], module, base))
        if not found:
            modules: dict[str, list[str]] = {}
            for name in dict.fromkeys(name for lora in loras for name in lora):
                modules.setdefault(group(name), []).append(name)
            found.update({name: weigh(_sizes(rule, loras, held, name, base)) for name, held in modules.items()})
        return found[group(module)]

    return weights


def _sizes(rule: Rule, loras: Sequence[LoRA], modules: Sequence[str], where: str, base: "Checkpoint | None") -> Sizes:
    each, total = [0.0] * len(loras), 0.0
    for module in modules:
        layers: list[Layer] = []
        for i, lora in enumerate(loras):
            if module in lora:
                with computing(f"{lora.name}: {module}"):
                    layers.append(_on(lora[module], module, base))
                    each[i] += layers[-1].norm() ** 2
        if rule.total:
            with computing(module):
                biases = [layer for layer in layers if layer.bias_only]
                weighed = [layer for layer in layers if not layer.bias_only]
                total += sum(_sum(in_one_library(part)).norm() ** 2 for part in (biases, weighed) if part)
    return Sizes([math.sqrt(square) for square in each], math.sqrt(total) if rule.total else None, where)


def _on(layer: Layer, module: str, base: "Checkpoint | None") -> Layer:
    """Return a layer whose ΔW depends on the base as its whole ΔW, if there is a base."""
    if base is None or not (layer.needs_base and layer.computable):
        return layer
    from ..checkpoints.models import on_base

    return on_base(layer, module, base)


def _sum(layers: Sequence[Layer]) -> Layer:
    """Return the update Σ ΔWᵢ; from factors, it has factors."""
    ones = [1.0] * len(layers)
    return vectors(layers, ones) if all(layer.rankless for layer in layers) else linear.merge(layers, ones)
