"""Methods whose result is a sum of the ΔWs, with coefficients computed from their angles."""

import math
from collections.abc import Sequence

from ...errors import MergeError
from ...tensors import Array, Float64
from .engines import combination
from .options import Count, Share

PARALLEL = 0.9995
"""From this cosine on the arc counts as a straight line: sin Ω would be a small number in a denominator."""

CANCELLED = math.sqrt(2 / (1 - PARALLEL))
"""The ratio of the parts' lengths to their mean's above which the mean is rounding: that of two ΔWs at slerp's limit."""

WAY_OUT = "Way out: another method, such as linear"


def _positive(weights: Sequence[float]) -> None:
    if min(weights) < 0:
        raise MergeError(f"a negative weight has no meaning on an arc, got {min(weights):g}. {WAY_OUT}")


@combination("slerp", source="Shoemake, 1985, https://doi.org/10.1145/325165.325242", count=2, allows=_positive)
def slerp(products: Float64[Array, "n n"], weights: Sequence[float]) -> list[float]:
    """Spherical interpolation of two ΔWs: along the arc between their directions instead of the straight line.

    At t = w₂ / (w₁ + w₂) on the arc of the angle Ω between them, the result is (w₁ + w₂) ·
    (sin((1 − t)Ω) ΔW₁ + sin(tΩ) ΔW₂) / sin Ω.  It is longer than the straight mean, which
    shortens the parts that don't agree.

    Raises:
        MergeError: A weight is negative, or both ΔWs are opposite.
    """
    scale = sum(weights)
    t = weights[1] / scale
    cosine = _cosine(products, 0, 1)
    if cosine <= -PARALLEL:
        raise MergeError(f"slerp: the two ΔWs are opposite to each other, so that no arc is the shortest. {WAY_OUT}")
    if cosine >= PARALLEL or not products[0, 0] or not products[1, 1]:
        return list(weights)
    angle = math.acos(cosine)
    return [scale * math.sin((1 - t) * angle) / math.sin(angle), scale * math.sin(t * angle) / math.sin(angle)]


@combination(
    "karcher",
    source="Karcher, 1977, https://doi.org/10.1002/cpa.3160300502; https://arxiv.org/abs/2603.04972",
    allows=_positive,
)
def karcher(
    products: Float64[Array, "n n"],
    weights: Sequence[float],
    *,
    steps: Count = 50,
    tolerance: Share = 1e-9,
) -> list[float]:
    """The Karcher mean: slerp for any number of LoRAs, the point of the sphere nearest to all directions.

    The directions ΔWᵢ/‖ΔWᵢ‖ are averaged on the sphere with the shares wᵢ / Σw; the length is
    Σ wᵢ‖ΔWᵢ‖.  The mean lies in the span of the ΔWs, so that only their N × N inner products
    are computed with.  At most ``steps`` steps, until one is shorter than ``tolerance``.

    Raises:
        MergeError: A weight is negative, or the directions cancel out.
    """
    norms = [math.sqrt(max(float(products[i, i]), 0.0)) for i in range(len(weights))]
    live = [i for i, norm in enumerate(norms) if norm and weights[i]]
    if not live:
        return [0.0] * len(weights)
    total = sum(weights[i] for i in live)
    shares = [weights[i] / total for i in live]
    cosines = [[_cosine(products, i, j) for j in live] for i in live]
    mean = _unit(shares, cosines)
    for _ in range(steps):
        tangent, length = _tangent(mean, shares, cosines)
        if length < max(tolerance, 1e-15):
            break
        turned = [math.cos(length) * m + math.sin(length) * t / length for m, t in zip(mean, tangent, strict=True)]
        mean = _unit(turned, cosines)
    length = sum(weights[i] * norms[i] for i in live)
    found = dict(zip(live, mean, strict=True))
    return [length * found[i] / norms[i] if i in found else 0.0 for i in range(len(weights))]


@combination("model_stock", source="Jang et al., 2024, https://arxiv.org/abs/2403.19522")
def model_stock(products: Float64[Array, "n n"], weights: Sequence[float]) -> list[float]:
    """Model stock: the weighted sum, shrunk by how little the ΔWs agree.

    t = N cos θ / (1 + (N − 1) cos θ) scales Σ wᵢΔWᵢ, with cos θ the mean cosine of the pairs: 1 for
    equal LoRAs, 0 for those at right angles, below 0 beyond.  The base model is the origin.

    Raises:
        MergeError: The ΔWs point away from each other, and t has no meaning.
    """
    n = len(weights)
    pairs = [_cosine(products, i, j) for i in range(n) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    if cosine <= -PARALLEL / (n - 1):
        raise MergeError(
            f"model_stock: the ΔWs cancel out (mean cosine {cosine:.3g}), so that no scale is defined. {WAY_OUT}"
        )
    t = n * cosine / (1 + (n - 1) * cosine)
    return [t * weight for weight in weights]


def _cosine(products: Float64[Array, "n n"], i: int, j: int) -> float:
    size = math.sqrt(float(products[i, i]) * float(products[j, j]))
    return min(max(float(products[i, j]) / size, -1.0), 1.0) if size else 0.0


NO_MEAN = f"karcher: the directions of the ΔWs cancel out, so that they have no mean. {WAY_OUT}"

Vector = Sequence[float]
"""Coordinates of a ΔW in the unit directions of the inputs."""


def _dot(a: Vector, b: Vector, cosines: Sequence[Vector]) -> float:
    return sum(x * y * cosines[i][j] for i, x in enumerate(a) for j, y in enumerate(b))


def _unit(vector: Vector, cosines: Sequence[Vector]) -> list[float]:
    length = math.sqrt(max(_dot(vector, vector, cosines), 0.0))
    if sum(map(abs, vector)) >= CANCELLED * length:
        raise MergeError(NO_MEAN)
    return [x / length for x in vector]


def _tangent(mean: Vector, shares: Vector, cosines: Sequence[Vector]) -> tuple[list[float], float]:
    """Return the weighted sum of the tangent vectors from the mean to every direction, and its length."""
    tangent = [0.0] * len(mean)
    for i, share in enumerate(shares):
        cosine = min(max(sum(m * cosines[j][i] for j, m in enumerate(mean)), -1.0), 1.0)
        if cosine <= -PARALLEL:
            raise MergeError(NO_MEAN)
        angle = math.acos(cosine)
        if angle < 1e-12:
            continue
        step = share * angle / math.sin(angle)
        tangent = [t - step * cosine * m for t, m in zip(tangent, mean, strict=True)]
        tangent[i] += step
    return tangent, math.sqrt(max(_dot(tangent, tangent, cosines), 0.0))
