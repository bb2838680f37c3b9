"""Decorators that make a formula a merge method: they prepare its input and make a layer of its result.

| decorator | the formula sees | gives | the result is |
|---|---|---|---|
| `combination` | the inner products of the ΔWs | a coefficient per LoRA | a weighted sum, exact |
| `on_core` | the common space of the LoRAs, `Core` | a matrix in it | a LoRA of rank ≤ Σr, exact |
| `elementwise` | the ΔWs, or the parts of a core | their merged entries | dense, then cut to a rank; or as for `on_core` |
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...layers import Full, Layer
from ...tensors import Array, largest_rank
from .base import Merged, Method, Weights, alive, sum_of_ranks, with_bias
from .linear import linear
from .options import Option, options_of
from .selection import Streams
from .spaces import Deltas, InSpace, core, inner_products

Allows = Callable[[Weights], None]


def combination(
    name: str, *, source: str, count: int | None = None, allows: Allows | None = None
) -> Callable[[Callable[..., Weights]], Method]:
    """Make a method that only chooses coefficients: ``formula(products, weights, **options)`` returns one per LoRA.

    Args:
        name: The name that users type.
        source: The paper with the equation, or the code.
        count: The number of LoRAs it takes; None for any number.
        allows: Raises a MergeError for weights that the method can't use.
    """

    def named(formula: Callable[..., Weights]) -> Method:
        def merge(layers: Sequence[Layer], weights: Weights, **options: Any) -> Merged:
            live, shares, kept = alive(layers, weights)
            if len(live) == 1:
                return linear.merge(layers, weights)
            chosen = dict(zip(kept, formula(inner_products(live), shares, **options), strict=True))
            merged = linear.merge(layers, [chosen.get(i, 0.0) for i in range(len(layers))])
            return with_bias(replace(merged, diff_b=None), layers, weights)

        options = options_of(formula)
        return Method(name, formula, merge, source, sum_of_ranks, options, count=count, linear=True, allows=allows)

    return named


def on_core(
    name: str,
    *,
    source: str,
    weights: str = "uniform",
    of_first: bool = False,
    allows: Allows | None = None,
    ranked: bool = False,
) -> Callable[[Callable[..., Array]], Method]:
    """Make a method in the LoRAs' common space: ``formula(core, weights, **options)`` returns the merged core.

    Args:
        name: The name that users type.
        source: The paper with the equation, or the code.
        weights: The rule for the LoRAs' weights unless they are given.
        of_first: True if the result is the first LoRA, changed: modules that the first lacks aren't in it.
        allows: Raises a MergeError for weights that the method can't use.
        ranked: True if the formula uses ``core.most``, the rank that the result will have.
    """

    def named(formula: Callable[..., Array]) -> Method:
        def merge(layers: Sequence[Layer], weights: Weights, *, most: int | None = None, **options: Any) -> InSpace:
            counted = 1 if of_first else len(layers)
            live, shares, kept = alive(layers, weights)
            space = replace(core(live), most=most)
            nothing = space.empty or kept[0] >= counted or not any(weights[:counted])
            merged = 0.0 * space.parts[0] if nothing else formula(space, shares, **options)
            return with_bias(space.layer(merged), layers[:counted], weights[:counted])

        options = options_of(formula)
        flags: dict[str, Any] = {"of_first": of_first, "allows": allows, "ranked": ranked}
        return Method(name, formula, merge, source, sum_of_ranks, options, weights, **flags)

    return named


def alive_streams(seed: int | Streams, kept: Sequence[int]) -> Streams:
    """Return the random streams of the layers that are kept; they don't depend on the other layers."""
    streams = seed if isinstance(seed, Streams) else Streams(seed, tuple(range(max(kept) + 1)))
    return streams.some(kept)


SPACE = Option("space", str, "delta", ("delta", "core"))
"""The space in which an elementwise method works: ΔW, as published, or the core of the common space."""


def elementwise(name: str, *, source: str) -> Callable[[Callable[..., Array]], Method]:
    """Make a method on entries: ``formula(deltas, weights, **options)`` returns the merged matrix.

    ``deltas`` is a sequence of matrices of one shape, each formed when it is indexed, so a formula that
    takes them one after the other holds one at a time.  The method has the option ``space`` in addition
    to its own.

    Args:
        name: The name that users type.
        source: The paper with the equation, or the code.
    """

    def named(formula: Callable[..., Array]) -> Method:
        def merge(layers: Sequence[Layer], weights: Weights, *, space: str = "delta", **options: Any) -> Full | InSpace:
            live, shares, kept = alive(layers, weights)
            if "seed" in options:
                options["seed"] = alive_streams(options["seed"], kept)
            if space == "core":
                common = core(live)
                entries = common.parts[0] if common.empty else formula(common.parts, shares, **options)
                return with_bias(common.layer(entries), layers, weights)
            merged = formula(Deltas(live), shares, **options)
            return with_bias(Full(diff=merged.reshape(layers[0].shape)), layers, weights)

        return Method(name, formula, merge, source, _rank, {"space": SPACE, **options_of(formula)}, dense=True)

    return named


def _rank(layers: Sequence[Layer], *, space: str = "delta", **_: Any) -> int:
    if space == "core":
        return sum_of_ranks(layers)
    return largest_rank(layers[0].shape)


__all__ = ["SPACE", "alive", "alive_streams", "combination", "elementwise", "on_core"]
