"""Numbers at their limits: factors of unlike sizes, budgets, directions that are rounding, zeros, overflow."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import app
from loramerge.comparing.diffs import Difference, differences
from loramerge.files.lora import LoRA
from loramerge.layers import Full, LoHa
from loramerge.linalg import distance
from loramerge.merging import Kept
from loramerge.merging.methods import METHODS
from loramerge.testing import random_layer

MODULE = "unet.m"
Pair = tuple[np.ndarray, np.ndarray]


def lora(*factors: Pair, name: str = "lora") -> LoRA:
    """A LoRA of modules ``unet.m``, ``unet.m1`` …, from factors."""
    stems = [f"lora_unet_m{i or ''}" for i in range(len(factors))]
    tensors = {
        f"{stem}.lora_{role}.weight": np.asarray(factor, np.float32)
        for stem, pair in zip(stems, factors, strict=True)
        for role, factor in zip(("up", "down"), pair, strict=True)
    }
    return lm.load(tensors).renamed({f"transformer.m{i or ''}": f"{MODULE}{i or ''}" for i in range(len(factors))})


def normal(seed: int, out: int = 96, rank: int = 8, columns: int = 80) -> Pair:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)), rng.standard_normal((rank, columns))


def decaying(seed: int, rank: int, decay: float, out: int = 120, columns: int = 100) -> Pair:
    up, down = normal(seed, out, rank, columns)
    return np.linalg.qr(up)[0] * decay ** np.arange(rank), np.linalg.qr(down.T)[0].T


def product(pair: Pair) -> np.ndarray:
    return pair[0].astype(np.float32).astype(float) @ pair[1].astype(np.float32).astype(float)


def unlike(pair: Pair, power: float) -> Pair:
    """The same product with its size shared in another way, in half of the rows."""
    scale = np.where(np.arange(pair[0].shape[1]) % 2, 10.0**power, 1.0)
    return (pair[0] * scale).astype(np.float32), (pair[1] / scale[:, None]).astype(np.float32)


def measured(wanted: np.ndarray, plan: lm.Plan) -> tuple[float, float]:
    """The error of a merge by dense algebra, and the one that it tells."""
    kept = Kept(plan.steps)
    found = plan.lora(kept).in_memory()
    factors = [layer.factors() for layer in found.values()]
    stacked = np.stack([up.astype(float) @ down for up, down in factors])
    return float(np.linalg.norm(stacked - wanted) / np.linalg.norm(wanted)), kept.error


@pytest.mark.parametrize("power", [0, 3, 5, 6, 7, 10, 14, 18])
@pytest.mark.parametrize("sums", [8, 400])
def test_a_cut_is_the_nearest_matrix_however_factors_share_their_size(power: int, sums: int) -> None:
    rank, sides = sums // 2, (sums + 40, sums + 20)
    pairs = [unlike(normal(1, sides[0], rank, sides[1]), power), normal(2, sides[0], rank, sides[1])]
    wanted = sum(w * product(p) for w, p in zip((0.6, 0.5), pairs, strict=True))
    sigma = np.linalg.svd(wanted, compute_uv=False)
    kept = sums * 5 // 8
    best = float(np.linalg.norm(sigma[kept:]) / np.linalg.norm(sigma))

    error, told = measured(wanted, lm.plan([lora(p) for p in pairs], weights=[0.6, 0.5], rank=kept))

    assert error <= best * (1 + 1e-5)
    assert told == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "factor_average"])
def test_a_method_sees_the_product_and_not_how_it_is_factored(name: str) -> None:
    pairs = [normal(seed, 40, 6, 30) for seed in (1, 2)]

    def merged(power: float) -> np.ndarray:
        loras = [lora(unlike(pairs[0], power)), lora(pairs[1])]
        return np.asarray(lm.merge(loras, weights=[0.6, 0.5], method=name, rank=30)[MODULE].delta(), float)

    plain = merged(0)
    for power in (5, 8, -12):
        assert np.linalg.norm(merged(power) - plain) <= 3e-6 * np.linalg.norm(plain)


def large(seed: int, rank: int, decay: float) -> Pair:
    return decaying(seed, rank, decay, 420, 400)


BUDGETS: dict[str, tuple[list[Pair], dict[str, Any], tuple[float, ...]]] = {
    "many ranks": ([large(i, 16, 0.97) for i in range(24)], {}, (0.5, 0.3)),
    "few ranks": ([decaying(i, 16, 0.5) for i in (1, 2)], {}, (0.1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0)),
    "faint": ([decaying(1, 20, 0.4)], {}, (1e-5, 0.0)),
    "more ranks than rows": ([decaying(i, 96, 0.9) for i in range(4)], {}, (0.1, 1e-3, 0.0)),
    "entries": (
        [large(i, 12, 0.6) for i in (1, 2)],
        {"method": "magnitude_prune", "density": 1.0, "rank": 40},
        (0.1, 1e-3, 1e-4, 1e-5, 0.0),
    ),
    "entries, pruned": (
        [large(i, 8, 0.8) for i in (7, 8)],
        {"method": "magnitude_prune", "density": 0.3, "rank": 80},
        (0.4, 0.35),
    ),
    "entries of one sign": ([decaying(i, 12, 0.6) for i in (1, 2)], {"method": "ties", "rank": 100}, (0.3, 1e-2, 0.0)),
}


@pytest.mark.parametrize(("case", "limit"), [(case, limit) for case, (*_, limits) in BUDGETS.items() for limit in limits])  # fmt: skip
def test_a_budget_is_kept_and_what_is_told_is_there(case: str, limit: float) -> None:
    pairs, options, _ = BUDGETS[case]
    weights = [1 / len(pairs)] * len(pairs)
    wanted = sum(w * product(p) for w, p in zip(weights, pairs, strict=True))
    if "method" in options:  # what the method makes before it is cut
        method = METHODS[options["method"]]
        merged = method.merge([lora(p)[MODULE] for p in pairs], weights, density=options.get("density", 0.2))
        wanted = np.asarray(merged.delta(), float)

    plan = lm.plan([lora(p) for p in pairs], weights=weights, max_error=limit, **options)
    error, told = measured(wanted, plan)

    sigma = np.linalg.svd(wanted, compute_uv=False)
    best = float(np.linalg.norm(sigma[plan.rank_of(MODULE) :]) / np.linalg.norm(sigma))
    assert error <= limit + 3e-7
    assert error <= best * (1 + (1e-5 if "method" in options else 1e-7)) + 3e-7
    assert told == pytest.approx(error, rel=1e-4, abs=3e-7)


def test_energy_is_kept_too_where_ranks_are_many() -> None:
    pairs = BUDGETS["many ranks"][0]
    weights = [1 / len(pairs)] * len(pairs)
    wanted = sum(w * product(p) for w, p in zip(weights, pairs, strict=True))

    error, _ = measured(wanted, lm.plan([lora(p) for p in pairs], weights=weights, energy=0.9))

    assert 1 - error**2 >= 0.9


def test_the_error_of_every_part_of_a_fused_weight_is_measured() -> None:
    parts = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    rng = np.random.default_rng(0)
    layers = {m: random_layer((3072, 3072), rank=4, seed=int(rng.integers(99))) for m in parts}
    layers[parts[2]] = layers[parts[2]].map(lambda factor: factor * np.float32(1e-3))  # its loss is small
    given = LoRA(name="a", architecture="flux", dialect="kohya", layouts=layers)
    plan = lm.plan([given], rank=6)
    kept = Kept(plan.steps)
    found = plan.lora(kept).in_memory()

    for module in parts:
        wanted, got = (x[module].factors() for x in (given, found))
        error = distance(wanted, got) / np.linalg.norm(wanted[0].astype(float) @ wanted[1])
        assert kept.errors[module] == pytest.approx(error, rel=1e-5)


def refactored(pair: Pair, seed: int) -> Pair:
    mixing = np.random.default_rng(seed).standard_normal((pair[0].shape[1],) * 2)
    return pair[0] @ mixing, np.linalg.solve(mixing, pair[1])


def strong_and_weak() -> list[Pair]:
    """Two LoRAs at right angles, one a thousandth of the other: the common directions are all of one."""
    (up, down), (low, wide) = normal(1, 96, 16, 80), normal(2, 96, 4, 80)
    up[48:], low[:48], down[:, 40:], wide[:, :40] = 0, 0, 0, 0
    turn, other = (np.linalg.qr(normal(seed, n, n, 1)[0])[0] for seed, n in ((5, 96), (6, 80)))
    return [(turn @ up, down @ other), (1e-3 * turn @ low, wide @ other)]


@pytest.mark.parametrize("pairs", [strong_and_weak(), [normal(3, 96, 16, 80)] * 2], ids=["disjoint", "itself"])
@pytest.mark.parametrize("name", ["iso_cts", "iso_c", "tsv", "np_lora", "subtract", "cart"])
@pytest.mark.parametrize("rank", [16, "sum"])
def test_directions_that_are_rounding_are_not_taken(pairs: list[Pair], name: str, rank: Any) -> None:
    columns = np.linalg.svd(np.concatenate([product(p) for p in pairs], axis=1), full_matrices=False)
    span = columns[0][:, columns[1] > 1e-7 * columns[1][0]]
    results = []
    for seed in (1, 2):
        loras = [lora(refactored(p, seed + i)) for i, p in enumerate(pairs)]
        found = lm.merge(loras, weights=[0.5, 0.5], method=name, rank=rank)[MODULE].delta().astype(float)
        results.append(found)
        assert np.linalg.norm(found - span @ (span.T @ found)) <= 1e-4 * np.linalg.norm(found)
    assert np.linalg.norm(results[0] - results[1]) <= 1e-3 * max(np.linalg.norm(results[0]), 1e-9)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_loras_that_cancel_make_nothing(name: str) -> None:
    pair = normal(1)
    found = lm.merge([lora(pair), lora(refactored(pair, 1))], weights=[1.0, -1.0], method=name)

    assert np.linalg.norm(found[MODULE].delta()) <= 1e-6 * np.linalg.norm(product(pair))


ZEROS: Mapping[str, Callable[[Pair], Pair]] = {
    "up": lambda pair: (0 * pair[0], pair[1]),
    "down": lambda pair: (pair[0], 0 * pair[1]),
    "by turns": lambda pair: (pair[0] * ([1, 0] * 4), pair[1] * np.array([0, 1] * 4)[:, None]),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in METHODS if name != "factor_average"),  # PEFT adds the other factor all the same
        *((name, {"space": "core"}) for name, method in METHODS.items() if "space" in method.options),
        ("dare", {"consensus": "ties"}),
        ("knots", {"inside": "dare"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_an_update_of_zero_is_a_missing_module(name: str, options: dict[str, Any], place: int, zero: str) -> None:
    count = METHODS[name].count or 3
    pairs = [normal(seed, 40, 8, 30) for seed in range(count)]
    other = normal(9, 40, 8, 30)
    weights = [0.5, 0.7, 0.4][:count]
    nothing = ZEROS[zero](pairs[place])
    zeroed = [lora(nothing if i == place else p, other) for i, p in enumerate(pairs)]
    lacking = [lm.load(x.state_dict()) for x in zeroed]
    lacking = [x.renamed({m: m.replace("transformer", "unet") for m in x}) for x in lacking]
    lacking[place] = lacking[place].part([f"{MODULE}1"])

    found, wanted = (lm.merge(x, weights=weights, method=name, rank=30, **options) for x in (zeroed, lacking))

    assert (MODULE in wanted) == (name != "subtract" or place != 0)
    got = found[MODULE].delta()
    np.testing.assert_allclose(got, wanted[MODULE].delta() if MODULE in wanted else 0 * got, rtol=1e-4, atol=1e-5)


STEEP = 10.0 ** -np.linspace(0, 12, 8)
FACTORS: Mapping[str, Callable[[Pair], Pair]] = {
    "plain": lambda pair: pair,
    "steep": lambda pair: (pair[0] * STEEP, pair[1]),
    "faint directions": lambda pair: (pair[0] @ (np.eye(8) - 0.125 * (1 - 1e-7)), pair[1]),
    "twice": lambda pair: (np.hstack([pair[0], pair[0]]), np.vstack([pair[1], pair[1]]) / 2),
    "a column of zeros": lambda pair: (pair[0] * ([0] + [1] * 7), pair[1]),
    "small": lambda pair: (pair[0] * 1e-30, pair[1] * 1e-8),
    "large": lambda pair: (pair[0] * 1e30, pair[1] * 1e-38),
    "zero": lambda pair: (pair[0] * 0, pair[1]),
}


@pytest.mark.parametrize("change", [0.0, 1e-14, 1e-9, 1e-4, 1.0, math.inf])
@pytest.mark.parametrize("second", FACTORS)
def test_a_distance_is_that_of_the_dense_products(second: str, change: float) -> None:
    noise = np.random.default_rng(0).standard_normal
    up, down = (matrix.astype(np.float64) for matrix in normal(1, 60, 8, 50))
    a = FACTORS[second]((up, down))
    other = [matrix.astype(np.float64) for matrix in normal(2, 60, 8, 50)]
    b = (
        FACTORS["plain"]((other[0], other[1]))
        if change == math.inf
        else (a[0] * (1 + change * noise(a[0].shape)), a[1])
    )

    products = [up.astype(np.longdouble) @ down.astype(np.longdouble) for up, down in (a, b)]
    wanted = float(np.sqrt(((products[0] - products[1]) ** 2).sum()))
    size = max(float(np.sqrt((product**2).sum())) for product in products)
    for found in (distance(a, b), distance(b, a)):
        assert found == pytest.approx(wanted, rel=1e-7, abs=1e-14 * size)


@pytest.mark.parametrize(("norm", "apart"), [(1.0, math.nan), (math.nan, 1.0), (math.inf, math.inf), (0.0, math.nan)])
def test_a_distance_that_is_no_number_is_infinite(norm: float, apart: float) -> None:
    assert Difference("m", norm, apart).relative == math.inf


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("factor", [1e25, 1e38])
def test_files_that_can_not_be_compared_are_not_the_same(place: int, factor: float, tmp_path: Path) -> None:
    pairs = [normal(seed, 20, 2, 16) for seed in range(4)]
    lm.save(lora(*pairs), tmp_path / "good.safetensors")
    pairs[place] = (pairs[place][0] * factor, pairs[place][1] * factor)
    with np.errstate(over="ignore"):
        tensors = lora(*pairs).state_dict("kohya")
    save_file({k: np.asarray(np.nan_to_num(v.numpy(), posinf=3e38, neginf=-3e38)) for k, v in tensors.items()}, tmp_path / "bad.safetensors")  # fmt: skip

    for files in (("good", "bad"), ("bad", "good")):
        done = CliRunner().invoke(app, ["diff", *(str(tmp_path / f"{f}.safetensors") for f in files), "-q"])
        assert done.exit_code == 1
        assert not isinstance(done.exception, ValueError)


LIMITS: dict[str, dict[str, Any]] = {
    "weight": {"weight": 1e39},
    "negative weight": {"weight": -1e39},
    "alpha": {"alpha": 3e38, "scale": 1e3},
    "float64": {"scale": 1e39, "dtype": np.float64},
    "float64, tiny": {"scale": 1e38, "other": 1e-50, "dtype": np.float64},
}


def extreme(
    alpha: float | None = None, scale: float = 1.0, other: float = 1.0, dtype: Any = np.float32, **_: Any
) -> LoRA:
    up, down = normal(5, 40, 4, 30)
    tensors = {"lora_unet_m.lora_up.weight": (up * scale).astype(dtype)}
    tensors |= {"lora_unet_m.lora_down.weight": (down * other).astype(dtype)}
    if alpha is not None:
        tensors["lora_unet_m.alpha"] = np.array(alpha, np.float32)
    return lm.load(tensors)


@pytest.mark.parametrize("case", LIMITS)
@pytest.mark.parametrize(
    "how",
    [{}, {"rank": 2}, {"max_error": 0.1}, *({"method": m, "rank": 8} for m in METHODS)],
    ids=lambda how: "-".join(map(str, how.values())) or "exact",
)
def test_what_leaves_float32_is_refused_by_name(case: str, how: dict[str, Any]) -> None:
    given = LIMITS[case]
    weights = [given.get("weight", 0.5), 0.5]
    if how.get("method") in ("slerp", "karcher") and weights[0] < 0:
        pytest.skip("a negative weight is refused anyway")
    if how.get("method") == "factor_average" and "dtype" not in given:
        pytest.skip("the root of the weight or the alpha is not too large")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(lm.errors.NumberError, match=r"transformer\.m: .*[Ww]eight or alpha"):
            lm.merge([extreme(**given), extreme()], weights=weights, **how)


@pytest.mark.parametrize("case", ["alpha", "float64"])
def test_what_leaves_float32_is_no_zero(case: str) -> None:
    given = extreme(**LIMITS[case])
    asked: list[Callable[[], Any]] = [
        given.norm,
        lambda: lm.compare([given, extreme()]),
        lambda: list(differences(given, extreme())),
        lambda: lm.merge([given, extreme()], weights="l2"),
    ]
    for ask in asked:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(lm.errors.NumberError, match=r"transformer\.m: "):
                ask()


@pytest.mark.parametrize("power", [-24, -14, -12, -6, 6, 9, 12, 14])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("factor_average",)])
def test_a_method_scales_with_its_inputs(name: str, power: int) -> None:
    if name not in ("sce", "ties", "linear", "tsv") and power not in (-12, 12):
        pytest.skip("one of each sign is enough")
    pairs = [normal(seed, 40, 6, 30) for seed in (1, 2)]

    def merged(scale: float) -> np.ndarray:
        loras = [lora((up * scale, down)) for up, down in pairs]
        return np.asarray(lm.merge(loras, method=name, weights=[0.7, 0.4], rank=12)[MODULE].delta(), float) / scale

    wanted = merged(1.0)
    assert np.linalg.norm(merged(10.0**power) - wanted) <= 2e-5 * np.linalg.norm(wanted)


def test_an_infinite_option_can_be_written_and_read_again(tmp_path: Path) -> None:
    files = [str(lm.save(lora(normal(seed)), tmp_path / f"{seed}.safetensors")) for seed in (1, 2)]
    first = lm.save(lm.plan(files, method="np_lora", mu=math.inf).lora(), tmp_path / "first.safetensors")
    text = CliRunner().invoke(app, ["inspect", str(first), "--recipe"])
    assert text.exit_code == 0, text.output
    (tmp_path / "again.toml").write_text(text.stdout)
    assert b"Infinity" not in first.read_bytes()

    done = CliRunner().invoke(app, ["merge", str(tmp_path / "again.toml"), "-o", str(tmp_path / "again.safetensors")])

    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(
        lm.load(first)["transformer.m"].delta(), lm.load(tmp_path / "again.safetensors")["transformer.m"].delta()
    )


def test_a_loha_forms_its_update_without_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer((24, 20), kind="loha", rank=3)
    up, down = layer.factors()
    monkeypatch.setattr(LoHa, "factors", lambda self: pytest.fail("the factors are nine times as many"))

    np.testing.assert_allclose(layer.delta(), up @ down, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("largest", [1.0, 1e5])
def test_a_merge_in_memory_of_bfloat16_still_has_values_of_bfloat16(largest: float) -> None:
    import torch

    def given(dtype: Any, scale: float) -> LoRA:
        factors = {role: torch.from_numpy(f).to(dtype) for role, f in zip(("up", "down"), normal(1), strict=True)}
        factors["up"] *= scale  # a sum has its ups in float32, and its downs as they were
        return lm.load({f"lora_unet_m.lora_{role}.weight": factor for role, factor in factors.items()})

    merged = lm.merge([given(torch.bfloat16, largest)] * 2)
    assert merged.dtype == "BF16"

    assert lm.plan([merged, given(torch.float16, 1.0)]).dtype == ("F16" if largest == 1 else "BF16")


def test_a_dense_layer_in_a_small_budget_is_a_full_one() -> None:
    given = LoRA(name="a", architecture=None, dialect="kohya", layouts={MODULE: Full(diff=product(normal(1)).astype(np.float32))})  # fmt: skip

    plan = lm.plan([given], max_error=0.2, rank=40)

    assert measured(product(normal(1)), plan)[0] <= 0.2
