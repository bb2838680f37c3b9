"""The least-squares merge, held against dense least squares by numpy in float64."""

import pytest
import torch
from torch import Tensor

from dense import FAMILIES, IN, OUT, RANKS, TOKENS, World, close, merged
from loramerge.errors import MergeError
from loramerge.learned.least_squares import (
    LEAST,
    RIDGE,
    Granularity,
    Prior,
    column_solution,
    core_solution,
    solve,
)
from loramerge.learned.problems import column_system, layer_system, positive, rank_system

NESTED = [("layer", "rank"), ("rank", "core"), ("core", "full"), ("layer", "column"), ("column", "full")]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_ridge_the_best_of_each_family_is_that_of_the_dense_problem(family: Granularity) -> None:
    world = World()

    assert close(merged(world, family), world.optimum(family), 1e-6)


@pytest.mark.parametrize("prior", ["sum", "mean"])
@pytest.mark.parametrize("family", ["layer", "rank", "column"])
def test_the_ridge_is_relative_to_the_diagonal_of_the_dense_problem(family: Granularity, prior: Prior) -> None:
    world = World()
    start = 1.0 if prior == "sum" else 0.5

    assert close(merged(world, family, 0.3, prior), world.optimum(family, 0.3, start), 1e-6)


@pytest.mark.parametrize("family", ["core", "full"])
def test_the_ridge_of_core_and_full_is_the_distance_to_the_prior_as_a_matrix(family: Granularity) -> None:
    world = World()
    p = world.problem
    prior = sum(world.deltas)
    if family == "full":
        strength = 0.3 * p.gram.diagonal().mean()
    else:
        rows = torch.linalg.qr(p.down.T)[0]  # an orthonormal basis of A's rows
        strength = 0.3 * (rows.T @ p.gram @ rows).diagonal().mean()

    def cost(m: Tensor) -> Tensor:
        return world.loss(m) + strength * (m - prior).square().sum()

    found = merged(world, family, 0.3)
    slopes = [
        torch.autograd.functional.jacobian(lambda t, g=g: cost(found + t * g), torch.zeros((), dtype=torch.float64))
        for g in world.basis(family)
    ]

    assert max(map(abs, slopes)) <= 1e-6 * float(cost(prior))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_loss_is_zero_at_the_solution(family: Granularity) -> None:
    world = World(seed=3)
    found = merged(world, family).requires_grad_()
    (gradient,) = torch.autograd.grad(world.loss(found), found)
    slopes = [float((gradient * g).sum() / g.norm()) for g in world.basis(family)]
    scale = float(torch.autograd.grad(world.loss(at := sum(world.deltas).requires_grad_()), at)[0].norm())

    assert max(map(abs, slopes)) <= 1e-6 * scale


@pytest.mark.parametrize("seed", range(3))
def test_larger_families_fit_better(seed: int) -> None:
    world = World(seed)
    losses = {family: float(world.loss(merged(world, family))) for family in FAMILIES}

    assert all(losses[small] >= losses[large] - 1e-9 * losses[small] for small, large in NESTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_from_moments_is_the_dense_loss(family: Granularity) -> None:
    world = World()
    p = world.problem
    v = solve(p, family, 0.1, "sum")

    assert p.loss(v) == pytest.approx(float(world.loss(p.up @ v)), rel=1e-9)


def test_the_loss_of_a_core_is_the_dense_loss() -> None:
    world = World()
    p = world.problem
    k = core_solution(p, 0.1, "sum")

    assert p.core_loss(k) == pytest.approx(float(world.loss(p.up @ k @ p.down)), rel=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("ranks", [(2, 3), (1, 2, 3)])
def test_conjugate_gradients_solve_the_column_system(ridge: float, ranks: tuple[int, ...]) -> None:
    p = World(ranks=ranks).problem
    direct, iterated = (column_solution(p, ridge, 1.0, solver) for solver in ("direct", "pcg"))

    assert float((direct - iterated).abs().max()) <= 1e-4


@pytest.mark.parametrize("system", [layer_system, rank_system, column_system])
def test_the_systems_are_positive_semidefinite(system: object) -> None:
    h, _ = system(World(seed=5).problem)
    eigenvalues = torch.linalg.eigvalsh(h)

    assert torch.equal(h, h.T) or close(h, h.T, 1e-12)
    assert float(eigenvalues.min()) >= -1e-12 * float(eigenvalues.max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", ["sum", "mean"])
def test_a_large_ridge_gives_the_prior(family: Granularity, prior: Prior) -> None:
    world = World()
    wanted = sum(world.deltas) * (1.0 if prior == "sum" else 0.5)

    assert close(merged(world, family, 1e9, prior), wanted, 1e-7)


@pytest.mark.parametrize("ranks", [(2, 3), (2, 1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_inputs_give_the_average(family: Granularity, ranks: tuple[int, ...]) -> None:
    x = torch.randn(TOKENS, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    world = World(ranks=ranks, inputs=[x] * len(ranks), out=12)

    assert close(merged(world, family), sum(world.deltas) / len(ranks), 1e-7)


def test_equal_inputs_give_coefficients_of_one_by_n() -> None:
    world = World(inputs=[torch.eye(IN, dtype=torch.float64)] * 2, out=12)

    assert float((column_solution(world.problem, 0.0, 1.0) - 0.5).abs().max()) <= 1e-8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prior", "ridge"), [("sum", 0.0), ("mean", 0.0), ("mean", 0.1)])
def test_equal_adapters_give_that_adapter(family: Granularity, prior: Prior, ridge: float) -> None:
    world = World(ranks=(2, 2))
    world.ups, world.downs = [world.ups[0]] * 2, [world.downs[0]] * 2

    assert close(merged(world, family, ridge, prior), world.deltas[0], 1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3, 1e-4, 1e-7, 1e-8, 1e-9, 0.0])
def test_the_metric_of_core_is_inverted_where_it_has_directions(apart: float, seed: int) -> None:
    world = World(seed, ranks=(2, 2))
    world.downs[1] = world.downs[0] + apart * world.downs[1]
    world.downs = [down / down.norm(dim=1, keepdim=True) for down in world.downs]
    p = world.problem
    total, metric = p.core.sum(0), p.down @ p.down.T
    own = torch.cat([p.core[i][s] for i, s in enumerate(p.slices)])
    inverse = torch.linalg.pinv(p.down, rtol=1e-6)
    energy = float(((inverse.T @ inverse) * total).sum()) / 4
    pull = 0.1 * energy * metric
    pull = pull + LEAST * (total + pull).diagonal().mean() * torch.eye(4, dtype=metric.dtype)
    wanted = torch.linalg.solve(total + pull, (own + pull).T).T

    assert close(p.up @ core_solution(p, 0.1, "sum") @ p.down, p.up @ wanted @ p.down, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", ["sum", "mean"])
def test_one_adapter_is_kept(family: Granularity, prior: Prior) -> None:
    world = World(ranks=(3,))

    assert close(merged(world, family, 0.1, prior), world.deltas[0], 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_adapters_does_not_matter(family: Granularity) -> None:
    world, turned = World(), World()
    for part in (turned.ups, turned.downs, turned.inputs):
        part.reverse()

    assert close(merged(turned, family, 0.1), merged(world, family, 0.1), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_updates_give_a_result_as_much_larger(family: Granularity) -> None:
    world, larger = World(), World()
    larger.ups = [3.0 * up for up in world.ups]

    assert close(merged(larger, family, 0.1), 3.0 * merged(world, family, 0.1), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_scale_is_kept_does_not_matter(family: Granularity) -> None:
    world, moved = World(), World()
    moved.ups = [up / f for up, f in zip(world.ups, (4.0, 0.5), strict=True)]
    moved.downs = [down * f for down, f in zip(world.downs, (4.0, 0.5), strict=True)]

    assert close(merged(moved, family, 0.1), merged(world, family, 0.1), 1e-8)


@pytest.mark.parametrize("family", ["layer", "core", "column", "full"])
def test_the_basis_of_the_factors_does_not_matter(family: Granularity) -> None:
    world, turned = World(), World()
    bases = [torch.randn(r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in RANKS]
    turned.ups = [up @ g for up, g in zip(world.ups, bases, strict=True)]
    turned.downs = [torch.linalg.solve(g, down) for down, g in zip(world.downs, bases, strict=True)]

    assert close(merged(turned, family, 0.1), merged(world, family, 0.1), 1e-7)


def subspaces(*bases: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(TOKENS, len(b), generator=generator, dtype=torch.float64) @ b for b in bases]


def test_on_inputs_in_disjoint_subspaces_full_keeps_every_adapter() -> None:
    basis = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))[0]
    world = World(inputs=subspaces(basis[:3], basis[3:]))
    base = float(world.loss(torch.zeros(OUT, IN, dtype=torch.float64)))

    assert float(world.loss(merged(world, "full"))) <= 1e-12 * base
    assert float(world.loss(merged(world, "column"))) >= 1e-2 * base


def test_on_disjoint_subspaces_no_larger_than_the_ranks_core_keeps_every_adapter() -> None:
    basis = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))[0]
    world = World(inputs=subspaces(basis[:2], basis[2:5]))
    base = float(world.loss(torch.zeros(OUT, IN, dtype=torch.float64)))

    assert float(world.loss(merged(world, "core"))) <= 1e-8 * base


def test_on_disjoint_columns_column_keeps_every_adapter() -> None:
    eye = torch.eye(IN, dtype=torch.float64)
    world = World(inputs=subspaces(eye[:3], eye[3:]))
    base = float(world.loss(torch.zeros(OUT, IN, dtype=torch.float64)))

    assert float(world.loss(merged(world, "column"))) <= 1e-12 * base


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["inputs", "updates"])
def test_zero_inputs_or_updates_give_the_prior(family: Granularity, what: str) -> None:
    world = World()
    if what == "inputs":
        world.inputs = [torch.zeros_like(x) for x in world.inputs]
    else:
        world.ups = [torch.zeros_like(up) for up in world.ups]

    assert close(merged(world, family, 0.1), sum(world.deltas), 1e-6)


@pytest.mark.parametrize("family", ["layer", "rank"])
def test_inner_products_come_from_factors(family: Granularity) -> None:
    world = World(inputs=[torch.eye(IN, dtype=torch.float64)] * 2)
    h, _ = (layer_system if family == "layer" else rank_system)(world.problem)
    basis = torch.stack(world.basis(family)).flatten(1)

    assert close(h, 2 * basis @ basis.T, 1e-12)


def weak(seed: int, what: str, scale: float) -> World:
    """Adapters with a row that is nearly zero or nearly a sum of other rows, on inputs far from zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    faint = torch.logspace(0, -4, 24, dtype=torch.float64)
    mean = 10 * normal(24)
    world = World(seed, (4, 5), [normal(60, 24) @ (normal(24, 24) * faint) + normal(24) + mean for _ in range(2)], 12)
    world.downs = [normal(4, 24), normal(5, 24)]
    if what == "zero":
        world.downs[0][0] *= scale
    else:
        world.downs[0][0] = world.downs[1][0] + world.downs[1][1] + scale * normal(24)
    return world


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("what", ["zero", "dependent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_in_float32_make_no_merge_worse_than_the_sum(
    family: Granularity, what: str, scale: float, seed: int
) -> None:
    world = weak(seed, what, scale)
    p = world.rounded
    plain = sum(world.deltas)
    found = {ridge: p.up @ solve(p, family, ridge, "sum") for ridge in (0.0, 1e-6, 1e-4, RIDGE[family])}

    assert all(float(world.loss(m)) <= float(world.loss(plain)) for m in found.values())
    if family in ("core", "full"):
        assert float((found[RIDGE[family]] - plain).norm()) <= 10 * float(plain.norm())


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_is_small_where_its_column_is_large_is_a_row_like_others(family: Granularity, scale: float) -> None:
    world, turned = weak(0, "zero", 1.0), weak(0, "zero", 1.0)
    turned.downs[0][0] *= scale
    turned.ups[0][:, 0] /= scale
    p, q = world.rounded, turned.rounded

    assert close(q.up @ solve(q, family, 0.01, "sum"), p.up @ solve(p, family, 0.01, "sum"), 1e-3)


def test_moments_that_rounding_does_not_explain_are_refused() -> None:
    p = World().problem

    with pytest.raises(MergeError, match=r"none below zero\. Way out: calibrate again"):
        positive(p.core - 0.1 * p.core.diagonal(dim1=1, dim2=2).amax() * torch.eye(5, dtype=p.core.dtype), p.down)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_computed_where_the_moments_are(family: Granularity) -> None:
    p = World().problem
    with torch.device("meta"):  # where anything made without a place would land, and could not be computed with
        found = solve(p, family, 0.1, "sum")
        iterated = column_solution(p, 0.1, 1.0, "pcg")

    assert found.device.type == iterated.device.type == "cpu"


def test_conjugate_gradients_that_do_not_converge_are_an_error() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    faint = torch.logspace(0, -3, 300, dtype=torch.float64)
    inputs = [normal(150, 300) * faint @ torch.linalg.qr(normal(300, 300))[0] + 5 * normal(300) for _ in range(2)]
    world = World(inputs=inputs, out=40)
    world.downs = [normal(r, 300) for r in RANKS]

    with pytest.raises(MergeError, match="did not converge"):
        column_solution(world.problem, 0.0, 1.0, "pcg")
    assert column_solution(world.problem, 0.1, 1.0, "pcg").isfinite().all()
