"""Methods that drop entries of the ΔWs before adding them up or electing signs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Literal

from ...errors import OptionError
from ...linalg import power_of_two
from ...tensors import Array, Bool, Float, namespace
from .engines import elementwise
from .options import Density, Range, Seed
from .selection import between, chance, largest, ranks_in_rows

Consensus = Literal["linear", "ties"]
"""The merge of the entries that are left: the weighted sum, or TIES' mean of those with the elected sign."""

Deltas = Sequence[Float[Array, "out in"]]
Weights = Sequence[float]


@elementwise("ties", source="Yadav et al., 2023, section 3, https://arxiv.org/abs/2306.01708")
def ties(deltas: Deltas, weights: Weights, *, density: Density = 0.2) -> Float[Array, "out in"]:
    """TIES: keep each ΔW's largest entries, elect a sign for every entry, average those that agree with it.

    Of every ΔW the share ``density`` of the entries with the largest magnitudes is kept.  The sign of an entry is
    that of Σ wᵢτᵢ, and the entry Σ|w| · (Σ wᵢτᵢ / Σ|wᵢ|), where the sums in brackets run over the
    LoRAs that agree with the sign and Σ|w| over all.  So Σ|w| takes the place of the paper's λ:
    with equal weights that add up to one it is the paper's formula at λ = 1.  Where all LoRAs
    agree it is the weighted sum; an entry that one alone has kept is Σ|w| times its value there.
    """
    return agreeing(_weighted(deltas, weights, lambda _, d: d * largest(d, density)), weights)


@elementwise("dare", source="Yu et al., 2023, section 3, https://arxiv.org/abs/2311.03099")
def dare(
    deltas: Deltas, weights: Weights, *, density: Density = 0.7, consensus: Consensus = "linear", seed: Seed = 0
) -> Float[Array, "out in"]:
    """DARE: drop entries at random, scale the others up by 1/density, and merge.

    Σ wᵢ (mᵢ ∘ ΔWᵢ) / density, where every entry of the mask mᵢ is 1 with the chance ``density``.
    Its mean over all seeds is the weighted sum.  A low density adds noise that no small rank can
    hold: of a merge at density 0.2 a LoRA of the inputs' rank keeps a fifth to a half of the
    energy, and loses that noise.
    """
    scaled = [weight / density for weight in weights]
    left = _weighted(deltas, scaled, lambda i, d: d * (chance(d, seed, i) < density))
    return CONSENSUS[consensus](left, weights)


@elementwise("magnitude_prune", source="Yadav et al., 2023, section 3.1, https://arxiv.org/abs/2306.01708")
def magnitude_prune(deltas: Deltas, weights: Weights, *, density: Density = 0.2) -> Float[Array, "out in"]:
    """The weighted sum of each ΔW's largest entries.

    Σ wᵢ (mᵢ ∘ ΔWᵢ), where the mask mᵢ is 1 in the share ``density`` of the entries with the largest
    magnitude, and 0 elsewhere.
    """
    return added(_weighted(deltas, weights, lambda _, d: d * largest(d, density)), weights)


@elementwise("della", source="Deep et al., 2024, section 3, https://arxiv.org/abs/2406.11617")
def della(
    deltas: Deltas,
    weights: Weights,
    *,
    density: Density = 0.7,
    epsilon: Annotated[float, Range(0, 0.5, open_high=True)] = 0.15,
    consensus: Consensus = "ties",
    seed: Seed = 0,
) -> Float[Array, "out in"]:
    """DELLA: drop entries at random, small ones more often, scale each by 1/its chance, and merge.

    Σ wᵢ (mᵢ ∘ ΔWᵢ / pᵢ), where an entry of the mask mᵢ is 1 with the chance that pᵢ has there.  In every
    row of ΔW it grows with the rank of the magnitude, from ``density`` − ``epsilon`` to ``density`` +
    ``epsilon``.

    Raises:
        OptionError: A chance would not lie in (0, 1].
    """
    if not 0 < density - epsilon <= density + epsilon <= 1:
        raise OptionError(f"density ± epsilon must lie in (0, 1], got {density:g} ± {epsilon:g}.")

    def thinned(i: int, delta: Float[Array, "out in"]) -> Float[Array, "out in"]:
        kept = ranks_in_rows(delta)
        kept *= 2 * epsilon
        kept += density - epsilon
        left = delta * (chance(delta, seed, i) < kept)
        left /= kept
        return left

    return CONSENSUS[consensus](_weighted(deltas, weights, thinned), weights)


@elementwise("breadcrumbs", source="Davari and Belilovsky, 2023, section 3, https://arxiv.org/abs/2312.06795")
def breadcrumbs(
    deltas: Deltas,
    weights: Weights,
    *,
    density: Density = 0.143,
    gamma: Annotated[float, Range(0, 1, open_high=True)] = 0.007,
    consensus: Consensus = "linear",
) -> Float[Array, "out in"]:
    """Model Breadcrumbs: drop each ΔW's largest entries as outliers and its small ones as noise, and merge.

    Σ wᵢ (mᵢ ∘ ΔWᵢ), where the mask mᵢ is 1 in the entries between two magnitudes:
    ``gamma`` is the share of the largest that is dropped, ``density`` the share that is kept; the
    defaults are the paper's.
    """
    kept = _weighted(deltas, weights, lambda _, d: d * between(d, density, gamma))
    return CONSENSUS[consensus](kept, weights)


@elementwise("magmax", source="Marczak et al., 2024, section 3.2, https://arxiv.org/abs/2407.06322")
def magmax(deltas: Deltas, weights: Weights) -> Float[Array, "out in"]:
    """MagMax: every entry from the LoRA in which it is largest.

    Of the wᵢΔWᵢ the one with the largest magnitude is chosen, entry by entry, the earlier LoRA if two are equal.  The
    entry is Σ|w| times the ΔW's there, or its negative where the weight is below zero: so at 1/N it is the paper's
    formula at λ = 1, and where all LoRAs agree it is the weighted sum.
    """
    chosen: Array = 0.0
    largest_yet: Array = -1.0
    for i, weight in enumerate(weights):
        delta = deltas[i]
        size = abs(weight) * abs(delta)
        larger = _as(size > largest_yet, delta)
        chosen = chosen * (1 - larger) + larger * (delta if weight > 0 else -delta)
        largest_yet = largest_yet * (1 - larger) + larger * size
    return sum(map(abs, weights)) * chosen


@elementwise("sce", source="Wan et al., 2024, section 3.2, https://arxiv.org/abs/2408.07990")
def sce(deltas: Deltas, weights: Weights, *, density: Density = 0.1) -> Float[Array, "out in"]:
    """SCE: keep the entries in which the LoRAs differ most, weight each LoRA by its energy there, elect signs.

    Selected is the share ``density`` of the entries with the largest variance over the wᵢτᵢ.
    A LoRA then counts by |wᵢ| · ‖selected τᵢ‖²; entries against the elected sign are erased, and
    Σ|w| scales the mean of the others, as in ties.  With a single LoRA nothing is selected.
    """
    xp = namespace(deltas[0])
    unit, scale = max(map(power_of_two, deltas)), power_of_two(xp.asarray(weights))
    if unit != 1 or scale != 1:  # squares of the entries would leave float32
        one = sce.function([d / unit for d in deltas], [w / scale for w in weights], density=density)
        return one * unit * scale
    selected = _differing(deltas, weights, density) if len(deltas) > 1 and density < 1 else xp.ones_like(deltas[0])
    energies = [float(xp.sum(xp.astype((d * selected) ** 2, xp.float64))) for d in deltas]
    counts = [abs(w) * energy for w, energy in zip(weights, energies, strict=True)]
    signs = [(w > 0) - (w < 0) for w in weights]
    voting = (w * (d * selected) for w, d in zip(weights, deltas, strict=True))
    positive = added(voting, weights) >= 0
    total: Array = 0.0
    mass: Array = 0.0
    for sign, share, delta in zip(signs, counts, deltas, strict=True):
        entry = sign * (delta * selected)
        agrees = _as((entry > 0) & positive | (entry < 0) & ~positive, entry)
        total = total + share * (entry * agrees)
        mass = mass + share * agrees
    return _ratio(total, mass, sum(map(abs, weights)))


def _differing(deltas: Deltas, weights: Weights, density: float) -> Bool[Array, "out in"]:
    """Return a mask of the share of the entries whose weighted values differ most between the LoRAs."""
    mean = added((w * d for w, d in zip(weights, deltas, strict=True)), weights) / len(deltas)
    variance = added(((w * d - mean) ** 2 for w, d in zip(weights, deltas, strict=True)), weights)
    return largest(variance, density)


def _weighted(deltas: Deltas, weights: Weights, thin: Callable[[int, Array], Array]) -> Iterator[Array]:
    """Yield the wᵢτᵢ with τᵢ = ``thin(i, ΔWᵢ)``; each ΔWᵢ is freed before its τᵢ is used."""
    for i, weight in enumerate(weights):
        yield weight * thin(i, deltas[i])


def added(weighted: Iterable[Float[Array, "out in"]], _: Weights) -> Float[Array, "out in"]:
    """Return the sum."""
    total: Array = 0.0
    for entry in weighted:
        total = total + entry
    return total


def agreeing(weighted: Iterable[Float[Array, "out in"]], weights: Weights) -> Float[Array, "out in"]:
    """Elect signs and take the disjoint mean as TIES does, in one pass over the wᵢτᵢ.

    Positive and negative entries are added up separately: the sign of their total is elected, and the
    sum of that sign is divided by the weights of the LoRAs in it.
    """
    up: Array = 0.0
    down: Array = 0.0
    up_mass: Array = 0.0
    down_mass: Array = 0.0
    for entry, weight in zip(weighted, weights, strict=True):
        up, up_mass = _with(up, up_mass, entry, entry > 0, abs(weight))
        down, down_mass = _with(down, down_mass, entry, entry < 0, abs(weight))
    elected = _as(up + down >= 0, up)
    up *= elected
    up_mass *= elected
    elected = 1 - elected
    up += down * elected
    up_mass += down_mass * elected
    return _ratio(up, up_mass, sum(map(abs, weights)))


def _with(
    total: Array, mass: Array, entry: Float[Array, "out in"], mask: Bool[Array, "out in"], weight: float
) -> tuple[Float[Array, "out in"], Float[Array, "out in"]]:
    """Add the entries under a mask to a sum, and their weight to its mass; both may start as 0.0."""
    part = _as(mask, entry)
    mass += weight * part
    part *= entry
    total += part
    return total, mass


def _ratio(total: Float[Array, "out in"], mass: Float[Array, "out in"], scale: float) -> Float[Array, "out in"]:
    """Return ``scale · total / mass``, and 0 where the mass is 0."""
    return total * (scale / (mass + _as(mass == 0, mass)))


def _as(mask: Bool[Array, "*shape"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Convert a mask to numbers: multiplying by it is several times as fast as selecting with it."""
    return namespace(like).astype(mask, like.dtype)


CONSENSUS = {"linear": added, "ties": agreeing}
