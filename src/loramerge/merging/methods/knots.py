"""KnOTS: the LoRAs in one common left basis, merged there by an elementwise method."""

from collections.abc import Sequence
from typing import Literal

from ...layers import Layer
from .base import alive, method, sum_of_ranks, with_bias
from .engines import alive_streams
from .options import Density, Seed
from .spaces import InSpace, aligned
from .sparse import dare, ties


@method("knots", source="Stoica et al., 2024, section 4, https://arxiv.org/abs/2410.19735", rank=sum_of_ranks)
def knots(
    layers: Sequence[Layer],
    weights: Sequence[float],
    *,
    inside: Literal["ties", "dare", "linear"] = "ties",
    density: Density = 0.2,
    seed: Seed = 0,
) -> InSpace:
    """KnOTS: align the LoRAs by one SVD, [ΔW₁ … ΔW_N] = U S [V₁ … V_N], and merge the S Vᵢ inside.

    ``inside`` is the method for the S Vᵢ, at ``density``: ties with the magnitudes of S Vᵢ, a
    random choice for dare, or the weighted sum.  Each module has its own threshold; the published
    code has one for the whole model.
    """
    live, shares, kept = alive(layers, weights)
    space = aligned(live)
    if space.empty:
        merged = space.parts[0]
    elif inside == "linear":
        merged = sum(w * part for w, part in zip(shares, space.parts, strict=True))
    elif inside == "dare":
        merged = dare.function(space.parts, shares, density=density, seed=alive_streams(seed, kept))
    else:
        merged = ties.function(space.parts, shares, density=density)
    return with_bias(space.layer(merged), layers, weights)
