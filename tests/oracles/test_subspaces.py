"""Methods in a common space against the papers' formulas in dense float64 algebra, on whole ΔWs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from loramerge.layers import Layer, LowRank
from loramerge.merging.methods import METHODS
from loramerge.testing import relative_error
from oracles.dense import deltas, layers, uncut

Array = np.ndarray
Merge = Callable[[Sequence[Array], Sequence[float], Sequence[int]], Array]
"""Of ΔWs, weights and ranks."""

every_shape = pytest.mark.parametrize("shape", ["linear", "conv"])
every_weights = pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.3), (0.2, 0.7, 1.4), (0.25, 0.25, 0.25, 0.25)])


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Array) -> Array:
    u, _, vt = svd(matrix)
    return u @ vt


def rank_of(matrix: Array) -> int:
    return int(np.linalg.matrix_rank(matrix, tol=1e-6 * np.linalg.norm(matrix, 2)))


def low(matrix: Array, rank: int) -> Array:
    """The nearest matrix of a rank."""
    u, s, vt = svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def total(given: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum(w * d for w, d in zip(weights, given, strict=True))


def largest(matrix: Array, density: float) -> Array:
    order = np.sort(np.abs(matrix), axis=None)
    return matrix * (np.abs(matrix) >= order[-max(1, int(density * matrix.size))])


def ties(parts: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Yadav et al., 2023, algorithm 1, with the weights in the vote and their sum for λ."""
    trimmed = np.stack([largest(part, density) for part in parts])
    share = np.asarray(weights)[:, None, None]
    agrees = np.sign(share * trimmed) == np.where((share * trimmed).sum(0) >= 0, 1, -1)
    mass = (np.abs(share) * agrees).sum(0)
    return np.abs(share).sum() * (share * trimmed * agrees).sum(0) / np.where(mass > 0, mass, 1)


def tsv(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Gargiulo et al., 2025, algorithm 1, of the r singular vectors that are each LoRA's own."""
    spectra = [svd(d) for d in given]
    u = np.concatenate([u[:, :r] for (u, _, _), r in zip(spectra, ranks, strict=True)], axis=1)
    s = np.concatenate([w * s[:r] for w, (_, s, _), r in zip(weights, spectra, ranks, strict=True)])
    vt = np.concatenate([vt[:r] for (_, _, vt), r in zip(spectra, ranks, strict=True)])
    return polar(u) * s @ polar(vt)


def iso_c(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Marczak et al., 2025, equation 5, over the rank of the sum."""
    u, s, vt = svd(total(given, weights))
    r = sum(ranks)
    return s[:r].mean() * (u[:, :r] @ vt[:r])


def iso_cts(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Marczak et al., 2025, algorithm 2, over the rank of the sum, with the published code's shares."""
    u, s, vt = svd(total(given, weights))
    r, n = sum(ranks), len(given)
    own = round((r - int(0.8 * r)) / n)
    shared = r - n * own
    common = u[:, :shared]
    us, values, vts = [common], [s[:shared]], [vt[:shared]]
    for weight, delta in zip(weights, given, strict=True):
        rest_u, rest_s, rest_vt = svd(weight * delta - common @ common.T @ (weight * delta))
        us.append(rest_u[:, :own])
        values.append(rest_s[:own])
        vts.append(rest_vt[:own])
    return np.concatenate(values).mean() * polar(np.concatenate(us, axis=1)) @ polar(np.concatenate(vts))


def cart(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Choi et al., 2024, equation 4, weighted: at 1/N it is θ̄ + Σ SVDₖ(τᵢ − θ̄)."""
    whole, n = sum(weights), len(given)
    mean = total(given, weights) / whole
    k = int(np.ceil(0.08 * sum(ranks)))
    return whole * (mean + sum(n * w / whole * low(d - mean, k) for w, d in zip(weights, given, strict=True)))


def np_lora(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Chen et al., 2025: the content off the style's rows, by QR of the style's ΔWᵀ."""
    merged = weights[0] * given[0]
    for i in range(1, len(given)):
        rows = np.concatenate([svd(d)[2][:r] for d, r in zip(given[:i], ranks[:i], strict=True)])
        q = np.linalg.qr(rows.T)[0]
        merged = merged + weights[i] * given[i] @ (np.eye(q.shape[0]) - 0.5 / 1.5 * q @ q.T)
    return merged


def wudi(given: Sequence[Array], weights: Sequence[float], ranks: Sequence[int]) -> Array:
    """Cheng et al., 2025, equation 8, with a ridge of 1 to the mean, as one least-squares problem on whole ΔWs."""
    own = [len(given) * w * d for w, d in zip(weights, given, strict=True)]
    norms = [np.linalg.norm(d) for d in own]
    equations = np.concatenate([*(d / n for d, n in zip(own, norms, strict=True)), np.eye(own[0].shape[1])])
    answers = np.concatenate([*(d @ d.T / n for d, n in zip(own, norms, strict=True)), np.mean(own, axis=0).T])
    return np.linalg.lstsq(equations, answers, rcond=None)[0].T


PAPERS: dict[str, Merge] = {
    "wudi": wudi,
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "cart": cart,
    "np_lora": np_lora,
}


@every_weights
@every_shape
@pytest.mark.parametrize("name", PAPERS)
def test_a_method_is_the_papers_on_whole_deltas(name: str, shape: str, weights: tuple[float, ...]) -> None:
    given = layers(len(weights), shape)

    wanted = PAPERS[name](deltas(given), weights, [x.rank for x in given])

    assert relative_error(uncut(name, given, weights), wanted) < 5e-5


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0, np.inf])
def test_np_lora_is_the_papers_with_the_down_factor_s_qr(mu: float) -> None:
    style, content = given = layers(2)
    q = np.linalg.qr(style.factors()[1].T.astype(np.float64))[0]
    first, second = deltas(given)
    damping = 1.0 if mu == np.inf else mu / (1 + mu)

    wanted = 0.6 * first + 0.8 * second @ (np.eye(q.shape[0]) - damping * q @ q.T)

    assert relative_error(uncut("np_lora", [style, content], [0.6, 0.8], mu=mu), wanted) < 1e-6


@pytest.mark.parametrize("shares", [(1.0,), (0.4,), (1.0, 0.5)])
@every_shape
def test_subtract_is_the_projection_by_dense_projectors(shape: str, shares: tuple[float, ...]) -> None:
    given = layers(1 + len(shares), shape, rank=4)
    first, *others = deltas(given)
    wanted = 0.7 * first
    for share, other in zip(shares, others, strict=True):
        pseudo = np.linalg.pinv(other, rcond=1e-5)
        wanted = wanted - share * (other @ pseudo) @ wanted @ (pseudo @ other)

    found = uncut("subtract", given, [0.7, *shares])

    assert relative_error(0.7 * first - found, 0.7 * first - wanted) < 1e-4
    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("density", [0.1, 0.2, 0.6])
@every_weights
@every_shape
def test_knots_is_the_dense_svd_of_the_deltas_side_by_side(
    shape: str, weights: tuple[float, ...], density: float
) -> None:
    given = layers(len(weights), shape)
    u, s, vt = svd(np.concatenate(deltas(given), axis=1))
    r = sum(x.rank for x in given)
    parts = np.split(s[:r, None] * vt[:r], len(given), axis=1)

    wanted = u[:, :r] @ ties(parts, weights, density)

    assert relative_error(uncut("knots", given, weights, density=density), wanted) < 1e-6


def balanced(layer: Layer) -> LowRank:
    """The same ΔW with the factors U√S and √SVᵀ."""
    assert isinstance(layer, LowRank)
    u, s, vt = svd(deltas([layer])[0])
    root, r = np.sqrt(s[: layer.rank]), layer.rank
    up, down = (u[:, :r] * root).astype(np.float32), (root[:, None] * vt[:r]).astype(np.float32)
    return replace(layer, up=up, down=down, alpha=None)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
@every_weights
def test_ties_in_the_core_is_the_papers_core_space_of_balanced_factors(
    weights: tuple[float, ...], density: float
) -> None:
    given = [balanced(x) for x in layers(len(weights))]
    factors = [(up.astype(np.float64), down.astype(np.float64)) for up, down in (x.factors() for x in given)]
    left = svd(np.concatenate([up for up, _ in factors], axis=1))[0]
    right = svd(np.concatenate([down for _, down in factors], axis=0))[2]
    cores = [left.T @ up @ down @ right.T for up, down in factors]

    wanted = left @ ties(cores, weights, density) @ right

    assert relative_error(uncut("ties", given, weights, density=density, space="core"), wanted) < 1e-5


def in_span(matrix: Array, given: Sequence[Layer], rows: bool = True, columns: bool = True) -> float:
    """The share of a matrix's energy in the rows and columns that the LoRAs have."""
    factors = [x.factors() for x in given]
    left = np.linalg.qr(np.concatenate([up for up, _ in factors], axis=1).astype(np.float64))[0]
    right = np.linalg.qr(np.concatenate([down for _, down in factors], axis=0).T.astype(np.float64))[0]
    kept = left.T @ matrix if columns else matrix
    kept = kept @ right if rows else kept
    return float(np.linalg.norm(kept) ** 2 / np.linalg.norm(matrix) ** 2)


def published_tsv(given: Sequence[Array]) -> Array:
    """min(out, in) / N singular vectors of each, as the published code takes them."""
    return tsv(given, [1.0] * len(given), [min(given[0].shape) // len(given)] * len(given))


def published_iso_c(given: Sequence[Array]) -> Array:
    """The mean over all min(out, in) singular values, as the published code takes it."""
    u, s, vt = svd(sum(given))
    return s.mean() * (u @ vt)


@pytest.mark.parametrize("name", [*PAPERS, "subtract"])
@pytest.mark.parametrize("count", [2, 4])
def test_a_result_lies_in_the_span_of_the_loras(name: str, count: int) -> None:
    given = layers(count, (160, 96), rank=4)

    share = in_span(uncut(name, given, [1.0] * count), given)

    assert share > 1 - 1e-6, f"{share:.4%} of the energy lies in the LoRAs' span"


@pytest.mark.parametrize("inside", ["ties", "dare"])
def test_knots_stays_in_the_columns_of_the_loras_and_prunes_its_way_out_of_their_rows(inside: str) -> None:
    given = layers(2, (160, 96), rank=4)

    found = uncut("knots", given, [1.0, 1.0], inside=inside)

    assert in_span(found, given, rows=False) > 1 - 1e-6
    assert in_span(found, given, columns=False) < 0.9


@pytest.mark.parametrize(("published", "most"), [(published_tsv, 0.75), (published_iso_c, 0.1)])
def test_the_published_full_space_forms_leave_the_span_of_the_loras(
    published: Callable[[Sequence[Array]], Array], most: float
) -> None:
    given = layers(2, (320, 320), rank=8)

    share = in_span(published(deltas(given)), given)

    assert share < most, f"{1 - share:.1%} of the energy lies outside of the LoRAs' span"


def test_every_method_in_a_common_space_has_an_oracle() -> None:
    from loramerge.merging.methods import subspaces

    here = {*PAPERS, "subtract"}

    assert {name for name, m in METHODS.items() if m.function.__module__ == subspaces.__name__} == here
