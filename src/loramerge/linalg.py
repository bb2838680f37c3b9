"""Low-rank algebra.

A layer changes the weight of its module by ΔW = up @ down.  Everything here works on the
factors and never forms ΔW, which is (out, in) where they are thin.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tensors import FAINT, Array, Float, Float64, concat, is_torch, namespace, row_blocks

if TYPE_CHECKING:
    import numpy as np

GRAM_LIMIT = 320
"""Up to this sum of ranks R an R × R eigenproblem is the cheapest; above, random projection wins."""


def grams(up: Float[Array, "out r"], down: Float[Array, "r in"]) -> tuple[Float64[Array, "r r"], Float64[Array, "r r"]]:
    """Return ``upᵀ up`` and ``down downᵀ`` in float64."""
    return gram(up.T), gram(down)


def gram(matrix: Float[Array, "r n"]) -> Float64[Array, "r r"]:
    """Return ``matrix @ matrixᵀ`` in float64."""
    xp = namespace(matrix)
    wide = xp.astype(matrix, xp.float64, copy=False)
    return wide @ wide.T


def norm(up: Float[Array, "out r"], down: Float[Array, "r in"]) -> float:
    """Return the Frobenius norm of ``up @ down``, from the Gram matrices."""
    gram_up, gram_down = grams(*thin(up, down))
    return math.sqrt(max(float((gram_up * gram_down).sum()), 0.0))


RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as zero: float32 factors hold seven digits."""

ROUNDING = 1e-7
"""A relative error of ΔW that is none: float32 factors have as much."""


@dataclass(frozen=True)
class Spectrum:
    """The SVD of ΔW = up @ down, in coordinates of the factors.

    ``up @ left`` are the left singular vectors, an orthonormal basis of ΔW's column space;
    ``rightᵀ @ down`` are the right ones, of its row space.
    """

    sigma: Float64[Array, " k"]
    """The singular values that are not zero, from large to small."""
    left: Float64[Array, "r k"]
    right: Float64[Array, "r k"]

    @property
    def rank(self) -> int:
        """The numerical rank of ΔW, which may be smaller than that of the factors."""
        return int(self.sigma.shape[0])


def spectrum(gram_up: Float64[Array, "r r"], gram_down: Float64[Array, "r r"]) -> Spectrum:
    """Compute ΔW's SVD from the Gram matrices of its factors.

    Args:
        gram_up: ``upᵀ up``.
        gram_down: ``down downᵀ``.

    Returns:
        The singular values that aren't zero, with their vectors; none for ΔW = 0.
    """
    # up = Qᵤ Rᵤ and down = R_dᵀ Q_d with orthonormal columns Qᵤ and rows Q_d, so that the SVD of Rᵤ R_dᵀ is ΔW's.
    # That of a Gram matrix would square the condition: directions of 10⁻⁶ of the largest would be noise.
    xp = namespace(gram_up)
    (to_up, r_up), (to_down, r_down) = _triangle(gram_up), _triangle(gram_down)
    left, sigma, right = xp.linalg.svd(r_up @ r_down.T, full_matrices=False)
    least = max(RANK_TOLERANCE * float(xp.max(sigma)), _noise(gram_up, gram_down)) if len(sigma) else 0.0
    kept = int(xp.sum(xp.astype(sigma > least, xp.int64)))
    return Spectrum(sigma[:kept], to_up @ left[:, :kept], to_down @ right[:kept].T)


def values(gram_up: Float64[Array, "r r"], gram_down: Float64[Array, "r r"]) -> Float64[Array, " k"]:
    """Compute ΔW's singular values, from large to small, without those that are rounding errors; see `spectrum`."""
    sigma = namespace(gram_up).linalg.svdvals(_triangle(gram_up)[1] @ _triangle(gram_down)[1].T)
    return sigma[sigma > _noise(gram_up, gram_down)]


def _noise(gram_up: Float64[Array, "r r"], gram_down: Float64[Array, "r r"]) -> float:
    """Return the size of singular values that are rounding errors, which are all that is left where a sum's parts cancel."""
    xp = namespace(gram_up)
    sizes = xp.linalg.diagonal(gram_up) * xp.linalg.diagonal(gram_down)
    return RANK_TOLERANCE / 10 * math.sqrt(max(float(xp.sum(sizes)), 0.0))


def _triangle(gram: Float64[Array, "r r"]) -> tuple[Float64[Array, "r k"], Float64[Array, "k r"]]:
    """Return T and R with X = (X T) R for orthonormal columns X T, from the Gram matrix of X.

    Columns are given length one first: else those of very different sizes would lose digits.
    """
    xp = namespace(gram)
    lengths = xp.linalg.diagonal(gram).clip(0.0) ** 0.5
    lengths = xp.where(lengths > 0, lengths, xp.ones_like(lengths))
    gram = gram / lengths[:, None] / lengths[None, :]
    lower = _lower(gram)
    if lower is not None:
        return xp.linalg.inv(lower).T / lengths[:, None], lower.T * lengths
    squares, vectors = eigenpairs(gram, 1e-13)
    return vectors / squares**0.5 / lengths[:, None], (vectors * squares**0.5).T * lengths


def _lower(gram: Float64[Array, "r r"]) -> Float64[Array, "r r"] | None:
    """Return the Cholesky factor of the Gram matrix of columns of length one; None if some nearly depend on others.

    With its inverse it takes a third of the time of the eigenproblem, which finds the rank.
    """
    xp = namespace(gram)
    try:
        lower = xp.linalg.cholesky(gram)
    except (ValueError, RuntimeError):  # the LinAlgError of numpy, and of torch
        return None
    return lower if float(xp.min(xp.linalg.diagonal(lower))) > APART else None


APART = 1e-3
"""The least distance of a column of length one from the span of those before it that a Cholesky factor is used for."""


def kron_spectrum(first: Spectrum, second: Spectrum, scale: float) -> Spectrum:
    """Compute the SVD of scale · ΔW₁ ⊗ ΔW₂: products of the singular values, Kronecker products of the vectors.

    Args:
        first: The SVD of ΔW₁ = up₁ @ down₁.
        second: The SVD of ΔW₂ = up₂ @ down₂.
        scale: A factor, which goes into ``up``.

    Returns:
        The SVD in coordinates of ``scale · up₁ ⊗ up₂`` and ``down₁ ⊗ down₂``, with the values
        above `RANK_TOLERANCE` times the largest.
    """
    xp = namespace(first.sigma)
    sigma = abs(scale) * (first.sigma[:, None] * second.sigma[None, :]).reshape((-1,))
    order = xp.flip(xp.argsort(sigma), axis=0)
    kept = int(xp.sum(xp.astype(sigma > RANK_TOLERANCE * xp.max(sigma), xp.int64))) if scale and len(sigma) else 0
    order = order[:kept]
    left = kron(first.left, second.left)[:, order]
    return Spectrum(sigma[order], left / abs(scale) if scale else left, kron(first.right, second.right)[:, order])


def kron(a: Float[Array, "m n"], b: Float[Array, "p q"]) -> Float[Array, "m*p n*q"]:
    """Return the Kronecker product of two matrices."""
    product = a[:, None, :, None] * b[None, :, None, :]
    return namespace(a).reshape(product, (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))


def tucker(core: Float[Array, "r inner kh kw"], down: Float[Array, "inner in"]) -> Float[Array, "r in_kh_kw"]:
    """Compute the ``down`` of a plain convolution from that of a Tucker decomposition and its core."""
    xp = namespace(down)
    rank, inner = core.shape[:2]
    by_place = xp.permute_dims(core.reshape((rank, inner, -1)), (2, 0, 1)) @ down
    return xp.permute_dims(by_place, (1, 2, 0)).reshape((rank, -1))


def tucker_norm(
    up: Float[Array, "out r"], core: Float[Array, "r inner kh kw"], down: Float[Array, "inner in"]
) -> float:
    """Return the norm of the ΔW of a Tucker decomposition, from the Gram matrices of its factors."""
    xp = namespace(core)
    gram_up, gram_down = gram(up.T), gram(down)
    places = xp.permute_dims(core.reshape((*core.shape[:2], -1)), (2, 0, 1))
    step = max(1, 2**20 // math.prod(core.shape[:2]))
    square = 0.0
    for start in range(0, places.shape[0], step):
        part = xp.astype(places[start : start + step], xp.float64)
        square += float(((gram_up @ part) * (part @ gram_down)).sum())
    return math.sqrt(max(square, 0.0))


def thin(up: Float[Array, "out r"], down: Float[Array, "r in"]) -> tuple[Float[Array, "out k"], Float[Array, "k in"]]:
    """Return factors of the same product that are no wider than its smaller side, if many are."""
    if up.shape[1] <= max(GRAM_LIMIT, min(up.shape[0], down.shape[1])):
        return up, down
    xp = namespace(up)
    return trivial(xp.astype(xp.astype(up, xp.float64) @ xp.astype(down, xp.float64), up.dtype))


def padded(
    up: Float[Array, "out r *kernel"], down: Float[Array, "r in *other"], rank: int
) -> tuple[Float[Array, "out rank *kernel"], Float[Array, "rank in *other"]]:
    """Raise the rank of a product without changing it, by columns of ``up`` and rows of ``down`` that are zero.

    Args:
        up: Left factor.
        down: Right factor.
        rank: The rank wanted, at least r.
    """
    more = rank - up.shape[1]
    columns = namespace(up).zeros((up.shape[0], more, *up.shape[2:]), dtype=up.dtype, device=up.device)
    rows = namespace(down).zeros((more, *down.shape[1:]), dtype=down.dtype, device=down.device)
    return concat([up, columns], axis=1), concat([down, rows])


def block_diagonal(blocks: Sequence[Float[Array, "_ _"]]) -> Float[Array, "rows columns"]:
    """Put matrices of one dtype along the diagonal, and zeros elsewhere."""
    rows, columns = sum(block.shape[0] for block in blocks), sum(block.shape[1] for block in blocks)
    xp = namespace(blocks[0])
    whole = xp.zeros((rows, columns), dtype=blocks[0].dtype, device=blocks[0].device)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def singular_values(delta: Float64[Array, "out in"], size: float) -> Float64[Array, " k"]:
    """Compute the singular values that are not zero, from the eigenvalues of the smaller side's Gram matrix.

    Args:
        delta: ΔW.
        size: Size of the terms that ΔW is the sum of: values below their rounding error are zero.
    """
    small = delta if delta.shape[0] <= delta.shape[1] else delta.T
    sigma = namespace(delta).linalg.eigvalsh(small @ small.T).clip(0.0) ** 0.5
    sigma = namespace(delta).flip(sigma, axis=0)
    least = max(RANK_TOLERANCE * float(sigma[0]), RANK_TOLERANCE / 10 * size)
    return sigma[: int((sigma > least).sum())]


def trivial(delta: Float[Array, "out in"]) -> tuple[Float[Array, "out k"], Float[Array, "k in"]]:
    """Write a dense matrix as a product of itself and the identity, which is on its smaller side."""
    xp = namespace(delta)
    rows, columns = delta.shape
    eye = xp.eye(min(rows, columns), dtype=delta.dtype, device=delta.device)
    return (eye, delta) if rows <= columns else (delta, eye)


def dense_spectrum(delta: Float64[Array, "out in"]) -> Spectrum:
    """Compute a dense matrix's SVD from its smaller side's Gram matrix, in coordinates of its `trivial` factors."""
    wide = delta.shape[0] <= delta.shape[1]
    squares, vectors = eigenpairs(gram(delta if wide else delta.T), RANK_TOLERANCE**2)
    sigma = squares**0.5
    return Spectrum(sigma, *((vectors, vectors / sigma) if wide else (vectors / sigma, vectors)))


def leading(spectrum: Spectrum, share: float) -> Spectrum:
    """Keep the fewest directions that carry a share of ‖ΔW‖², those of the largest singular values."""
    xp = namespace(spectrum.sigma)
    carried = xp.cumulative_sum(spectrum.sigma**2)
    kept = int(xp.sum(xp.astype(carried < share * carried[-1:], xp.int64))) + 1
    return Spectrum(spectrum.sigma[:kept], spectrum.left[:, :kept], spectrum.right[:, :kept])


def eigenpairs(
    gram: Float[Array, "r r"], relative: float | None = None, absolute: float = 0.0
) -> tuple[Float[Array, " k"], Float[Array, "r k"]]:
    """Compute the eigenvalues of a Gram matrix with their vectors, from large to small.

    Args:
        gram: Symmetric.
        relative: Keep only eigenvalues above this share of the largest. By default keep all, negative ones set to 0.
        absolute: With ``relative``, keep only those above this value, too.
    """
    xp = namespace(gram)
    values, vectors = xp.linalg.eigh(gram)
    values, vectors = xp.flip(values, axis=0), xp.flip(vectors, axis=1)
    if relative is None:
        return values * (values > 0), vectors
    least = max(relative * float(values[0]), absolute) if values.shape[0] else 0.0
    kept = int(xp.sum(xp.astype(values > least, xp.int64)))
    return values[:kept], vectors[:, :kept]


def effective_rank(sigma: Float[Array, " k"]) -> float:
    """Return exp(−Σ pₖ ln pₖ) with pₖ = σₖ² / Σ σ²: how many singular values carry the energy, from 1 to the rank.

    It is Roy and Vetterli's effective rank of ΔWᵀ ΔW, whose singular values are σ²; 0 for ΔW = 0.

    Source:
        Roy and Vetterli, 2007, "The effective rank: a measure of effective dimensionality",
        https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf
    """
    xp = namespace(sigma)
    if not sigma.shape[0]:
        return 0.0
    shares = sigma**2 / (sigma**2).sum()
    return math.exp(-float((shares * xp.log(shares)).sum()))


def overlap(gram: Float[Array, "ri rj"], first: Float[Array, "ri ki"], second: Float[Array, "rj kj"]) -> float:
    """Return ‖Qᵢᵀ Qⱼ‖² / min(kᵢ, kⱼ), the mean squared cosine of the principal angles of two subspaces, in [0, 1].

    It is 1 where the smaller lies within the larger, 0 where they are orthogonal; for random subspaces of n
    dimensions the expectation is max(kᵢ, kⱼ) / n.

    Args:
        gram: Inner products of the vectors that span them.
        first: Coordinates of the orthonormal basis Qᵢ.
        second: The same of Qⱼ.

    Source:
        Björck and Golub, 1973, https://doi.org/10.2307/2005662
    """
    smaller = min(first.shape[1], second.shape[1])
    if not smaller:
        return 0.0
    cosines = first.T @ gram @ second
    return float(min(float((cosines**2).sum()) / smaller, 1.0))


def column_products(
    gram: Float[Array, "ri rj"], first: Float[Array, "ri in"], second: Float[Array, "rj in"]
) -> Float[Array, " in"]:
    """Return the inner products of corresponding columns of two ΔW.

    Args:
        gram: ``upᵢᵀ upⱼ``.
        first: ``downᵢ``.
        second: ``downⱼ``.
    """
    return namespace(first).sum(first * (gram @ second), axis=0)


@dataclass(frozen=True)
class Cut:
    """Factors of a smaller rank, and the energy that they leave out."""

    up: Float[Array, "out rank"]
    down: Float[Array, "rank in"]
    energy: float
    """‖ΔW‖² before the cut."""
    lost: float
    """‖ΔW − up @ down‖²: the part of the energy that is cut off."""


def truncate(up: Float[Array, "out r"], down: Float[Array, "r in"], rank: int, exact: bool = False) -> Cut:
    """Compute the best factors of a given rank.

    Args:
        up: ΔW = up @ down.
        down: The other factor.
        rank: Rank of the result, at least 1.
        exact: Never use the randomised range finder, because the error is promised.

    Returns:
        Factors of shape ``(out, rank)`` and ``(rank, in)`` whose product is the nearest to
        ``up @ down`` in Frobenius norm, each carrying the square root of the singular
        values.  The arguments themselves when ``rank >= r``.  When r is above
        ``GRAM_LIMIT`` and more than three times the rank, a randomised range finder is used
        instead: its error exceeds the optimum by a few parts in 10⁵ where singular values
        decay as those of trained LoRAs do, and by a few in 10³ where they don't decay at all.

    Source:
        Eckart and Young, 1936, https://doi.org/10.1007/BF02288367; Halko, Martinsson and
        Tropp, 2011, https://arxiv.org/abs/0909.4061
    """
    total = up.shape[1]
    if rank >= total:
        return Cut(up, down, norm(up, down) ** 2, 0.0)
    up, down = thin(up, down)
    total = up.shape[1]
    if total > GRAM_LIMIT and total > 3 * rank and not exact and power_of_two(up) == power_of_two(down) == 1:
        return _truncate_randomised(up, down, rank)
    return _truncate_gram(up, down, rank)


def squares(up: Float[Array, "out r"], down: Float[Array, "r in"]) -> "np.ndarray":
    """Return the squared singular values of ``up @ down``, falling, float64; the last are left out if ΔW rounds to the rest."""
    found = as_numpy(values(*grams(*thin(up, down)))) ** 2
    kept: np.ndarray = found[found[::-1].cumsum()[::-1] > ROUNDING**2 * found.sum()]
    return kept


def as_numpy(array: Array) -> "np.ndarray":
    """Return an array as numpy's."""
    import numpy as np

    return np.asarray(array.detach().cpu() if is_torch(array) else array)


def _truncate_gram(up: Float[Array, "out r"], down: Float[Array, "r in"], rank: int) -> Cut:
    # With down downᵀ = L Lᵀ, the eigenpairs W, S² of Lᵀ (upᵀ up) L give ΔW's singular
    # values S, and its factors without a QR: up L W S^-½ and S^-3/2 Wᵀ Lᵀ (upᵀ up) down.
    xp = namespace(up)
    gram_up, gram_down = grams(up, down)
    lower = cholesky(gram_down)
    half = gram_up @ lower
    squares, vectors = eigenpairs(lower.T @ half)
    sigma, vectors = squares[:rank] ** 0.5, vectors[:, :rank]
    inverse = _inverse(sigma)
    left = (lower @ vectors) * inverse**0.5
    right = (half @ vectors) * inverse**1.5
    return Cut(
        up @ xp.astype(left, up.dtype),
        xp.astype(right, down.dtype).T @ down,
        float(squares.sum()),
        float(squares[rank:].sum()),
    )


def truncate_dense(delta: Float[Array, "out in"], rank: int, within: int = 0) -> Cut:
    """Compute the best factors of a given rank for a dense matrix, and the energy that they leave out.

    Args:
        delta: ΔW.
        rank: Rank of the result, at least 1.
        within: A larger rank whose directions are found first.  At any smaller rank the result then loses what it does
            at this one, and the squares of the singular values between.

    Returns:
        Factors as from `truncate`.  For ranks from a third of the smaller side on they are exact, by
        an eigenproblem of that side; for smaller ranks they come from a randomised range finder.

    Source:
        Halko, Martinsson and Tropp, 2011, algorithm 4.4, https://arxiv.org/abs/0909.4061
    """
    xp, dtype, unit = namespace(delta), delta.dtype, power_of_two(delta)
    delta = delta if unit == 1 else delta / unit
    up, down = _fit(delta, rank, within)
    whole, lost = energies(xp.astype(delta, up.dtype, copy=False), up, down)
    up, down = xp.astype(up, dtype), xp.astype(down, dtype)
    return Cut(up if unit == 1 else up * unit, down, whole * unit**2, lost * unit**2)


def fit_dense(delta: Float[Array, "out in"], rank: int) -> tuple[Float[Array, "out r"], Float[Array, "r in"]]:
    """Compute the factors of `truncate_dense` alone."""
    unit = power_of_two(delta)
    up, down = _fit(delta if unit == 1 else delta / unit, rank)
    return up if unit == 1 else up * unit, down


def energies(
    delta: Float[Array, "out in"], up: Float[Array, "out r"], down: Float[Array, "r in"]
) -> tuple[float, float]:
    """Return ‖ΔW‖² and ‖ΔW − up @ down‖²."""
    squares = [(energy(delta[rows]), energy(delta[rows] - up[rows] @ down)) for rows in row_blocks(delta)]
    return math.fsum(whole for whole, _ in squares), math.fsum(lost for _, lost in squares)


def _fit(
    delta: Float[Array, "out in"], rank: int, within: int = 0, iterations: int = 3
) -> tuple[Float[Array, "out r"], Float[Array, "r in"]]:
    """Compute the factors of `truncate_dense` for values of a size whose squares are in range, in float64 if within a rank."""
    xp, found = namespace(delta), max(rank, within)
    found += max(16, found // 2)
    exact = 3 * found >= min(delta.shape)
    turned = exact and delta.shape[0] > delta.shape[1]
    side = delta.T if turned else delta
    basis = xp.eye(side.shape[0], dtype=delta.dtype, device=side.device) if exact else _columns(side, found, iterations)
    if within:  # what is promised isn't spoilt by sums in float32
        side, basis = xp.astype(side, xp.float64), xp.astype(basis, xp.float64)
    left, right, _ = project(basis, side if exact else basis.T @ side, rank)
    return (right.T, left.T) if turned else (left, right)


def _columns(delta: Float[Array, "out in"], count: int, iterations: int) -> Float[Array, "out count"]:
    """Return an orthonormal basis that nearly holds the leading left singular vectors, by a random projection."""
    basis = delta @ _gaussian(delta, count)
    for _ in range(iterations):
        basis = delta @ (delta.T @ _orthonormal(basis))
    return _orthonormal(basis)


def power_of_two(array: Float[Array, "*shape"]) -> float:
    """Return 1, or the power of two near the largest magnitude if squares and products would leave float32."""
    xp = namespace(array)
    largest = max(float(xp.max(array)), -float(xp.min(array)))
    return 1.0 if 1e-9 < largest < 1e9 or not 0 < largest < math.inf else 2.0 ** math.floor(math.log2(largest))


def energy(values: Float[Array, "*shape"]) -> float:
    """Return ‖values‖² of a block of numbers, in their dtype unless squares could leave float32's range."""
    xp, flat = namespace(values), values.reshape((-1,))
    if not is_torch(values):  # which isn't cut into blocks, so that float32 would lose digits in long sums
        import numpy as np

        with np.errstate(over="ignore"):
            found = float(flat @ flat)
        if 1e-20 < found < 1e30:
            return found
    wide = xp.astype(flat, xp.float64)
    return float(wide @ wide)


def faint(up: Float[Array, "out r"]) -> bool:
    """Return whether a column of ``up`` is too faint for float16."""
    xp = namespace(up)
    ones = xp.ones((1, up.shape[0]), dtype=up.dtype, device=up.device)
    return bool((ones @ (up * up) < up.shape[0] * FAINT**2).any())


def balanced(
    up: Float[Array, "out r"], down: Float[Array, "r in"]
) -> tuple[Float[Array, "out r"], Float[Array, "r in"]]:
    """Raise faint columns of ``up`` and lower their rows of ``down``, which keeps the product.

    Both are scaled by powers of two, so nothing is rounded; float16 then keeps all its digits.
    """
    xp = namespace(up)
    high, low = _largest(up, 0), _largest(down, 1)
    raised = (high < 4 * FAINT) & (high > 0) & (low > high)
    ratio = xp.where(raised, low / xp.where(raised, high, xp.ones_like(high)), xp.ones_like(high))
    factor = 2.0 ** xp.floor(0.5 * xp.log2(ratio))
    return up * factor, down / factor[:, None]


def _largest(matrix: Float[Array, "m n"], axis: int) -> Float[Array, " k"]:
    """Return the largest magnitude along an axis."""
    xp = namespace(matrix)
    return xp.maximum(xp.max(matrix, axis=axis), -xp.min(matrix, axis=axis))


def _inverse(sigma: Float[Array, " k"]) -> Float[Array, " k"]:
    """Return 1/σ, and 0 for the singular values that are zero but for rounding."""
    xp = namespace(sigma)
    small = sigma <= 1e-7 * sigma[:1]
    return xp.where(small, 0.0, 1.0 / xp.where(small, 1.0, sigma))


def cholesky(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Return the lower Cholesky factor of a Gram matrix, which may be rank-deficient and have rows of any size."""
    # The jitter keeps a rank-deficient Gram matrix (two equal LoRAs, a zero row) positive.  Rows that it would
    # swamp are raised before, by powers of two, which round nothing; the rest share one power, so nothing changes.
    xp = namespace(gram)
    # The inverse must fit in float32 even when all is zero: an untrained module, a weight of 0.
    lengths = 2.0 ** xp.floor(0.5 * xp.log2(xp.linalg.diagonal(gram).clip(1e-60)))
    largest = xp.max(lengths)
    lengths = xp.where(lengths < 0.01 * largest, lengths, largest)
    gram = gram / lengths[:, None] / lengths[None, :]
    jitter = 1e-13 * max(float(xp.linalg.trace(gram)), 1.0)
    eye = xp.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return lengths[:, None] * xp.linalg.cholesky(gram + jitter * eye)


def _truncate_randomised(
    up: Float[Array, "out r"], down: Float[Array, "r in"], rank: int, oversampling: int = 16, iterations: int = 4
) -> Cut:
    size = min(rank + oversampling, up.shape[0], down.shape[1])
    basis = up @ (down @ _gaussian(down, size))
    for _ in range(iterations):
        basis = _orthonormal(basis)
        basis = up @ (down @ (down.T @ (up.T @ basis)))
    basis = _orthonormal(basis)
    inside = basis.T @ up
    found_up, found_down, tail = project(basis, inside @ down, rank)
    # The part outside the basis and the part cut off inside it are orthogonal, so their energies add up; taking the
    # difference of the energies before and after instead would leave little but rounding.
    missed = norm(up - basis @ inside, down) ** 2
    return Cut(found_up, found_down, norm(up, down) ** 2, missed + tail)


def project(
    basis: Float[Array, "out k"], core: Float[Array, "k in"], rank: int
) -> tuple[Float[Array, "out r"], Float[Array, "r in"], float]:
    """Compute the best factors of ``basis @ core``, with an orthonormal basis, and the energy that they leave out."""
    xp = namespace(core)
    squares, vectors = eigenpairs(gram(core))
    tail = float(squares[rank:].sum())
    vectors, root = xp.astype(vectors[:, :rank], core.dtype), squares[:rank] ** 0.25
    inverse = xp.astype(_inverse(root), core.dtype)
    return (basis @ vectors) * xp.astype(root, core.dtype), inverse[:, None] * (vectors.T @ core), tail


def _gaussian(like: Float[Array, "_ in"], columns: int) -> Float[Array, "in columns"]:
    """Return a fixed Gaussian test matrix: the same for every run and device."""
    import numpy as np

    test = np.random.default_rng(0).standard_normal((like.shape[1], columns), dtype=np.float32)
    return namespace(like).asarray(test, dtype=like.dtype, device=like.device)


def _orthonormal(basis: Float[Array, "out k"]) -> Float[Array, "out k"]:
    """Compute an orthonormal basis of the columns, by two rounds of Cholesky QR in float64."""
    xp = namespace(basis)
    for _ in range(2):
        wide = xp.astype(basis, xp.float64)
        lower = cholesky(wide.T @ wide)
        basis = basis @ xp.astype(xp.linalg.inv(lower).T, basis.dtype)
    return basis


def distance(
    first: tuple[Float[Array, "out r"], Float[Array, "r in"]],
    second: tuple[Float[Array, "out s"], Float[Array, "s in"]],
) -> float:
    """Return ‖up₁ down₁ − up₂ down₂‖ in Frobenius norm, without forming either product.

    The difference is itself a product, [up₁, −up₂] @ [down₁; down₂], with a norm from its Gram matrices.  Where these
    nearly cancel, QR of both sides leaves a small core, so that a difference of the order of rounding isn't hidden.
    """
    xp = namespace(first[0])
    up = xp.concat([xp.astype(first[0], xp.float64), -xp.astype(second[0], xp.float64)], axis=1)
    down = xp.concat([xp.astype(first[1], xp.float64), xp.astype(second[1], xp.float64)], axis=0)
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        return math.sqrt(float(((up @ down) ** 2).sum()))
    terms = gram(up.T) * gram(down)
    square = float(terms.sum())
    if not square > CANCELLED * float(abs(terms).sum()):
        core = _triangular(up) @ _triangular(down.T).T
        square = float((core**2).sum())
    return math.sqrt(square)


CANCELLED = 1e-9
"""The share of its terms below which a sum that should be a square has lost too many digits: six are left here."""


def _triangular(columns: Float64[Array, "n r"]) -> Float64[Array, "k r"]:
    """Return R of the QR decomposition, which takes half the time or less without Q."""
    found = namespace(columns).linalg.qr(columns, mode="r")
    return found.R if is_torch(columns) else found


def numerical_rank(matrix: Float[Array, "out in"]) -> int:
    """Count the singular values above max(out, in) · ε · σ₁, with float32's ε; at least 1.

    Source:
        The tolerance is numpy's, ``numpy.linalg.matrix_rank``.
    """
    xp = namespace(matrix)
    small = matrix if matrix.shape[0] <= matrix.shape[1] else xp.permute_dims(matrix, (1, 0))
    squares = xp.linalg.eigvalsh(gram(small))
    least = (max(matrix.shape) * 2.0**-23) ** 2 * float(squares[-1])
    return max(1, int((squares > least).sum()))


def whole_number(rank: object) -> int:
    """Return ``rank`` as an int, or 0 if it isn't an integer."""
    try:
        return 0 if isinstance(rank, bool) else operator.index(rank)  # type: ignore[arg-type]
    except TypeError:
        return 0
