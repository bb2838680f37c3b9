"""Overlap of LoRAs: how much two of them act along the same directions on the same inputs, before and after learning.

It is why ZipLoRA learns: where column a of ΔWᵢ and column a of ΔWⱼ are parallel, adding them up distorts
both.  Coefficients m can leave the column to one of the two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from ..comparing.pairs import Updates
from ..files.lora import LoRA
from ..layers.base import in_one_library
from ..linalg import as_numpy
from ..merging.coefficients import Coefficients


def overlaps(
    loras: Sequence[LoRA], coefficients: Coefficients, group: Callable[[str], str]
) -> Mapping[str, tuple[float, float]]:
    """Measure the overlap of columns before and after learning, by group of modules.

    With dᵢ[a] = ΔWᵢ[:, a], it is Σ |mᵢ[a] mⱼ[a] ⟨dᵢ[a], dⱼ[a]⟩| / Σ ‖mᵢ ∘ ‖dᵢ‖‖ ‖mⱼ ∘ ‖dⱼ‖‖, summed
    over the pairs of LoRAs and the modules of the group.  It lies in [0, 1]: 1 if all columns are
    parallel and their lengths proportional, 0 if they are orthogonal or one of the two coefficients is 0.  Before learning, m = 1.

    Args:
        loras: The LoRAs that the coefficients were learned for, in order.
        coefficients: The learned coefficients.
        group: Names the group of a module.

    Raises:
        OptionError: The coefficients were learned for other LoRAs.
    """
    coefficients.check(loras)
    sums: dict[str, list[float]] = {}
    for module in coefficients.columns:
        owners = [i for i, lora in enumerate(loras) if module in lora]
        updates = Updates(in_one_library([loras[i][module] for i in owners]))
        m = coefficients.columns[module].read()[owners]
        total = sums.setdefault(group(module), [0.0, 0.0, 0.0, 0.0])
        for i, j in combinations(range(len(owners)), 2):
            both, first, second = (as_numpy(updates.products(a, b)) for a, b in ((i, j), (i, i), (j, j)))
            for place, (a, b) in enumerate(((1.0, 1.0), (m[i], m[j]))):
                total[2 * place] += float(abs(a * b * both).sum())
                total[2 * place + 1] += math.sqrt(float((a * a * first).sum()) * float((b * b * second).sum()))
    return {name: (_share(t[0], t[1]), _share(t[2], t[3])) for name, t in sums.items()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
