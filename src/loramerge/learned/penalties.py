"""Penalties on how much the coefficients of two LoRAs act on the same columns."""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import column_products
from ..tensors import Float
from .presets import Penalty


def penalty(kind: Penalty, m: Float[Tensor, "N n"], cross: Float[Tensor, "pairs n"] | None = None) -> Float[Tensor, ""]:
    """Return the penalty of one module, summed over the pairs of LoRAs.

    Args:
        kind: ``dot``: |mᵢ · mⱼ|, the paper's equation 3.  ``absmean``: mean |mᵢ mⱼ|, mkshing's.
            ``cos``: |cos(mᵢ, mⱼ)|, LoRA.rar's; its gradient is zero at equal coefficients.
            ``columns``: the true interference Σₐ |mᵢ[a] mⱼ[a] ⟨Dᵢ[:,a], Dⱼ[:,a]⟩|, relative to
            that at coefficients of one.
        m: Coefficients, one per LoRA and column (n = in·kh·kw).
        cross: For ``columns``, see `crossings`.
    """
    pairs = list(combinations(range(m.shape[0]), 2))
    if kind == "none" or not pairs:
        return m.new_zeros(())
    if kind == "dot":
        return sum(((m[i] @ m[j]).abs() for i, j in pairs), m.new_zeros(()))
    if kind == "absmean":
        return sum(((m[i] * m[j]).abs().mean() for i, j in pairs), m.new_zeros(()))
    if kind == "cos":
        return sum((F.cosine_similarity(m[i], m[j], dim=0).abs() for i, j in pairs), m.new_zeros(()))
    assert cross is not None
    terms = [
        (m[i] * m[j] * c).abs().sum() / c.abs().sum().clamp_min(torch.finfo(c.dtype).tiny)
        for c, (i, j) in zip(cross, pairs, strict=True)
    ]
    return sum(terms, m.new_zeros(()))


def crossings(up: Float[Tensor, "out R"], down: Float[Tensor, "R n"], slices: list[slice]) -> Float[Tensor, "pairs n"]:
    """Return ⟨Dᵢ[:,a], Dⱼ[:,a]⟩ of every pair of LoRAs and column a, from the factors."""
    found = [
        column_products(up[:, slices[i]].T @ up[:, slices[j]], down[slices[i]], down[slices[j]])
        for i, j in combinations(range(len(slices)), 2)
    ]
    return torch.stack(found) if found else down.new_zeros((0, down.shape[1]))
