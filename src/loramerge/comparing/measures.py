"""Additive statistics of one update or a pair; adding those of its modules gives a block's."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One update, in a module or in several."""

    modules: int = 0
    square: float = 0.0
    """‖ΔW‖²."""
    spread: float = 0.0
    """Σ ‖ΔW‖² · effective rank."""

    @property
    def norm(self) -> float:
        """‖ΔW‖ in Frobenius norm, over all the modules."""
        return math.sqrt(self.square)

    @property
    def effective_rank(self) -> float:
        """Effective rank of ΔW (`linalg.effective_rank`), a mean over modules weighted by their ‖ΔW‖²."""
        return ratio(self.spread, self.square)

    def to_dict(self) -> dict[str, Any]:
        """Return the measures by name."""
        return {"modules": self.modules, "norm": self.norm, "effective_rank": self.effective_rank}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two updates ΔW₁ and ΔW₂, in the modules that both change.

    Means over modules are weighted by ‖ΔW₁‖·‖ΔW₂‖, the largest inner product that the two can have in a module.
    """

    modules: int = 0
    first: float = 0.0
    """‖ΔW₁‖²."""
    second: float = 0.0
    """‖ΔW₂‖²."""
    inner: float = 0.0
    """⟨ΔW₁, ΔW₂⟩."""
    weight: float = 0.0
    """Σ ‖ΔW₁‖·‖ΔW₂‖."""
    inputs: float = 0.0
    outputs: float = 0.0
    clashes: float = 0.0
    columns: float = 0.0
    """Σ |⟨column, column⟩|."""
    column_weight: float = 0.0
    """Σ ‖column‖·‖column‖."""
    opposed: float = 0.0
    """Σ |v₁| + |v₂| over values v of different signs."""
    mass: float = 0.0
    """Σ |v₁| + |v₂|."""
    spread: float = 0.0
    """Σ ‖ΔW₁ + ΔW₂‖² · effective rank of the sum."""

    @property
    def cosine(self) -> float:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), in [−1, 1]."""
        return max(-1.0, min(1.0, ratio(self.inner, math.sqrt(self.first * self.second))))

    @property
    def input_overlap(self) -> float:
        """Overlap of the row spaces (`linalg.overlap`), in [0, 1]: 1 if both act on the same inputs."""
        return ratio(self.inputs, self.weight)

    @property
    def output_overlap(self) -> float:
        """Overlap of the column spaces, in [0, 1]: 1 if both write to the same outputs."""
        return ratio(self.outputs, self.weight)

    @property
    def overlap(self) -> float:
        """Geometric mean of both overlaps: two updates meet only where inputs and outputs are the same."""
        return math.sqrt(self.input_overlap * self.output_overlap)

    @property
    def alignment(self) -> float:
        """Σ |⟨dₐ, d'ₐ⟩| / Σ ‖dₐ‖·‖d'ₐ‖ over the columns a of both ΔW, in [0, 1].

        It is the mean of ZipLoRA's |cos| of corresponding columns, weighted by the columns' norms, so that
        columns of zeros don't count.

        Source:
            Shah et al., 2023, section 3.2, https://arxiv.org/abs/2311.13600
        """
        return min(ratio(self.columns, self.column_weight), 1.0)

    @property
    def conflict(self) -> float:
        """Share of Σ |v₁| + |v₂| in values with opposite signs, in [0, 1]; one half for unrelated updates."""
        return ratio(self.opposed, self.mass)

    @property
    def clash(self) -> float:
        """Mean of √(overlaps above chance) · (1 − cosine) / 2, in [0, 1]: shared spaces, opposite directions.

        An overlap o above that of random subspaces, c, is (o − c) / (1 − c).
        """
        return ratio(self.clashes, self.weight)

    @property
    def sum_norm(self) -> float:
        """‖ΔW₁ + ΔW₂‖."""
        return math.sqrt(self.sum_square)

    @property
    def sum_square(self) -> float:
        """‖ΔW₁ + ΔW₂‖²."""
        return max(self.first + self.second + 2 * self.inner, 0.0)

    @property
    def sum_effective_rank(self) -> float:
        """Effective rank of ΔW₁ + ΔW₂."""
        return ratio(self.spread, self.sum_square)

    def to_dict(self) -> dict[str, Any]:
        """Return the measures by name; each is None if no module is in both."""
        return {"modules": self.modules} | {name: getattr(self, name) if self.modules else None for name in MEASURES}


MEASURES = (
    "cosine",
    "input_overlap",
    "output_overlap",
    "alignment",
    "conflict",
    "clash",
    "sum_norm",
    "sum_effective_rank",
)
"""Names of the measures of a `Pair`."""


def ratio(part: float, whole: float) -> float:
    """Return part / whole; 0 if the whole is 0."""
    return part / whole if whole > 0 else 0.0
