"""Methods on the singular values and directions of the LoRAs, in their common space."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Annotated, Literal

from ... import linalg
from ...errors import MergeError
from ...tensors import Array, Float64, namespace
from .engines import on_core
from .options import Positive, Range
from .spaces import FAINT, Core

Weights = Sequence[float]
Share = Annotated[float, Range(0, 1, open_low=True)]


@on_core("tsv", source="Gargiulo et al., 2025, algorithm 1 (TSV-Merge), https://arxiv.org/abs/2412.00081")
def tsv(core: Core, weights: Weights) -> Float64[Array, "p q"]:
    """TSV-M: the singular vectors of all wᵢΔWᵢ, made orthogonal to each other, with their singular values.

    With wᵢΔWᵢ = Uᵢ Sᵢ Vᵢᵀ it is U⊥ S V⊥ᵀ, where U⊥ is the orthogonal matrix nearest to [U₁ … U_N], V⊥ that to
    [V₁ … V_N], and S has all Sᵢ.  The published code keeps min(out, in) / N vectors of each ΔW.  A LoRA of rank r has
    only r; the others are arbitrary and move a third of the result or more out of the LoRAs' span.
    Here exactly the r of each are kept.
    """
    xp = namespace(core.parts[0])
    u = xp.concat([u for u, _, _ in core.spectra], axis=1)
    s = xp.concat([w * s for w, (_, s, _) in zip(weights, core.spectra, strict=True)])
    vt = xp.concat([vt for _, _, vt in core.spectra], axis=0)
    return (_polar(u) * s) @ _polar(vt)


@on_core("iso_c", source="Marczak et al., 2025, section 4, https://arxiv.org/abs/2502.04959", ranked=True)
def iso_c(core: Core, weights: Weights) -> Float64[Array, "p q"]:
    """Iso-C: the weighted sum with all its singular values set to their mean.

    Σ wᵢΔWᵢ = U S Vᵀ becomes σ̄ U Vᵀ, σ̄ the mean of S over the rank of the sum.  The published form
    takes it over min(out, in) values, nearly all of which are zero for LoRAs, and spreads it over
    directions that no LoRA has.  A smaller rank takes the sum's leading directions before they are made
    equal.
    """
    u, s, vt = _svd(_sum(core, weights), _size(core, weights), core.most)
    return s.mean() * (u @ vt) if s.shape[0] else u @ vt


@on_core("iso_cts", source="Marczak et al., 2025, section 4, https://arxiv.org/abs/2502.04959", ranked=True)
def iso_cts(core: Core, weights: Weights, *, common: Share = 0.8) -> Float64[Array, "p q"]:
    """Iso-CTS: Iso-C on the sum's leading directions, and each LoRA's own directions in addition.

    The share ``common`` of the rank goes to the leading singular vectors of Σ wᵢΔWᵢ; the rest is
    divided equally between the LoRAs, rounded as in the published code, each of which adds the
    leading ones of what is left of it outside of the common left vectors.  All are made orthogonal
    and get the mean of their singular values: σ̄ U⊥ V⊥ᵀ, as in tsv and iso_c.  A smaller rank is
    divided in the same way.
    """
    xp = namespace(core.parts[0])
    u, s, vt = _svd(_sum(core, weights), _size(core, weights), core.most)
    rank, n = s.shape[0], len(weights)
    if not rank:
        return u @ vt
    each = min(round((rank - int(common * rank)) / n), (rank - 1) // n)
    shared = rank - n * each
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [vt[:shared]]
    for weight, (part_u, part_s, part_vt) in zip(weights, core.spectra, strict=True):
        own = weight * part_s * part_u
        own = own - lefts[0] @ (lefts[0].T @ own)
        own_u, own_s, turn = _svd(
            own, abs(weight) * float(part_s[:1].sum()), each
        )  # of a LoRA within the sum nothing is left
        lefts.append(own_u)
        values.append(own_s)
        rights.append(turn @ part_vt)
    mean = xp.concat(values).mean()
    return mean * (_polar(xp.concat(lefts, axis=1)) @ _polar(xp.concat(rights, axis=0)))


def _has_a_mean(weights: Weights) -> None:
    if any(weights) and abs(math.fsum(weights)) < 1e-9 * math.fsum(map(abs, weights)):
        raise MergeError("cart: the weights add up to zero, so that there is no mean. Way out: other weights")


@on_core("cart", source="Choi et al., 2024, https://arxiv.org/abs/2412.12153", allows=_has_a_mean)
def cart(
    core: Core, weights: Weights, *, share: Share = 0.08, scale: Annotated[float, Range(0, open_high=True)] = 1.0
) -> Float64[Array, "p q"]:
    """CART: the weighted mean, and the leading directions of each LoRA's difference from it.

    With τ̄ = Σ wᵢΔWᵢ / Σw the result is Σw · (τ̄ + scale · Σ (N wᵢ / Σw) · SVDₖ(ΔWᵢ − τ̄)); k is the
    share of the common space's dimensions, at least one.

    Raises:
        MergeError: The weights add up to zero.
    """
    total = math.fsum(weights)
    mean = _sum(core, weights) / total
    k = max(1, math.ceil(share * min(mean.shape)))
    merged = mean
    for weight, part in zip(weights, core.parts, strict=True):
        merged = merged + (scale * len(weights) * weight / total) * _leading(part - mean, k)
    return total * merged


@on_core("np_lora", source="Chen et al., 2025, https://arxiv.org/abs/2511.11051")
def np_lora(
    core: Core,
    weights: Weights,
    *,
    mu: Annotated[float, Range(0)] = 0.5,
    order: Literal["given", "none"] = "given",
) -> Float64[Array, "p q"]:
    """NP-LoRA: keep the first LoRA, and damp the parts of the others that act on the same inputs.

    Each LoRA becomes ΔWᵢ (I − μ/(1+μ) Q Qᵀ), where Q spans the row spaces of those before it: so
    the order sets the priority, and the first (in the paper the style) is unchanged.
    With ``order`` "none" Q spans the row spaces of all others, and no LoRA comes first.
    μ = 0 is the weighted sum; μ = inf removes the others from those row spaces.
    """
    damping = mu / (1 + mu) if mu < math.inf else 1.0
    spans = [vt for _, _, vt in core.spectra]
    none = spans[0][:0]
    if order == "given":
        others = [none, *accumulate(spans[:-1], _more)]
    else:
        rest = [spans[:i] + spans[i + 1 :] for i in range(len(spans))]
        others = [reduce(_more, some) if some else none for some in rest]
    merged: Array = 0.0
    for weight, part, rows in zip(weights, core.parts, others, strict=True):
        merged = merged + weight * (part - damping * (part @ rows.T) @ rows)
    return merged


@on_core("wudi", source="Cheng et al., 2025, equation 8, https://arxiv.org/abs/2503.08099; in closed form")
def wudi(core: Core, weights: Weights, *, ridge: Positive = 1.0) -> Float64[Array, "p q"]:
    """WUDI: the update that answers each LoRA's own inputs most nearly as that LoRA does.

    The rows of a ΔW are taken for its inputs.  With Dᵢ = N wᵢΔWᵢ and their mean P the result is the W with the least
    Σ ‖(W − Dᵢ) Dᵢᵀ‖² / ‖Dᵢ‖² + ridge · ‖W − P‖²: (Σ DᵢCᵢ + ridge · P) (Σ Cᵢ + ridge · I)⁻¹ with Cᵢ = DᵢᵀDᵢ / ‖Dᵢ‖².
    A large ``ridge`` gives the weighted sum P.  Below 0.1 the result grows to several times the LoRAs' size where
    their row spaces nearly coincide.  The published code takes 300 steps of Adam from the sum without a ridge,
    whose result outside of the LoRAs' rows stays what the sum is there, zero, as here.
    """
    xp = namespace(core.parts[0])
    count = len(weights)
    mean = _sum(core, weights)
    covariance = ridge * xp.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
    wanted = ridge * mean
    for weight, part in zip(weights, core.parts, strict=True):
        own = part.T @ part / (part**2).sum()
        covariance = covariance + own
        wanted = wanted + count * weight * (part @ own)
    return xp.linalg.solve(covariance, wanted.T).T


def _shares(weights: Weights) -> None:
    for weight in weights[1:]:
        if not 0 <= weight <= 1:
            raise MergeError(f"subtract: the weight of what is removed is a share in [0, 1], got {weight:g}")


@on_core(
    "subtract",
    source="Projection onto the other LoRAs' column and row spaces",
    weights="sum",
    of_first=True,
    allows=_shares,
)
def subtract(core: Core, weights: Weights) -> Float64[Array, "p q"]:
    """The first LoRA without the component that it shares with the others.

    The component wᵢ P ΔW Q is subtracted from ΔW = w₁ΔW₁, where P projects onto the column space and Q
    onto the row space of another LoRA.  The weight wᵢ of the other is the share of the component that is
    removed: 1 removes all of it.  A LoRA that shares only one of the two spaces removes nothing.  Modules
    and biases that the first LoRA lacks aren't in the result.

    Raises:
        MergeError: The weight of another LoRA isn't in [0, 1].
    """
    merged = weights[0] * core.parts[0]
    for weight, (u, _, vt) in zip(weights[1:], core.spectra[1:], strict=True):
        merged = merged - weight * (u @ (u.T @ merged @ vt.T) @ vt)
    return merged


def _sum(core: Core, weights: Weights) -> Float64[Array, "p q"]:
    total: Array = 0.0
    for weight, part in zip(weights, core.parts, strict=True):
        total = total + weight * part
    return total


def _size(core: Core, weights: Weights) -> float:
    """Return the size below which the sum's singular values are the rounding errors of parts that cancel."""
    return sum(abs(w) * float(s[:1].sum()) for w, (_, s, _) in zip(weights, core.spectra, strict=True)) / 10


def _svd(
    matrix: Float64[Array, "m n"], size: float = 0.0, most: int | None = None
) -> tuple[Float64[Array, "m k"], Float64[Array, " k"], Float64[Array, "k n"]]:
    """Compute the singular value decomposition without the values that are rounding noise.

    Args:
        matrix: The matrix.
        size: Values are noise below `FAINT` times the largest, or times this.
        most: The number of values to keep, at most.
    """
    u, s, vt = namespace(matrix).linalg.svd(matrix, full_matrices=False)
    kept = int((s > FAINT * max(float(s[0]), size)).sum()) if s.shape[0] else 0
    kept = kept if most is None else min(kept, most)
    return u[:, :kept], s[:kept], vt[:kept]


def _leading(matrix: Float64[Array, "m n"], k: int) -> Float64[Array, "m n"]:
    """Project a matrix onto its k leading left singular vectors."""
    vectors = linalg.eigenpairs(matrix @ matrix.T)[1][:, :k]
    return vectors @ (vectors.T @ matrix)


def _polar(matrix: Float64[Array, "m n"]) -> Float64[Array, "m n"]:
    """Return the nearest matrix with orthonormal columns, or orthonormal rows if it is wide, within its numerical rank."""
    u, _, vt = _svd(matrix)
    return u @ vt


def _more(rows: Float64[Array, "k n"], others: Float64[Array, "l n"]) -> Float64[Array, "m n"]:
    """Extend orthonormal rows by further ones, so that they span other orthonormal rows, too."""
    xp = namespace(rows)
    rest = others
    for _ in range(2):  # the second pass removes the rounding errors of the first
        rest = rest - (rest @ rows.T) @ rows
    squares, vectors = linalg.eigenpairs(rest @ rest.T, FAINT**2, FAINT**2)
    return xp.concat([rows, (vectors.T @ rest) / squares[:, None] ** 0.5], axis=0)
