"""Every merge method, over every kind of layers, against its paper's formula in dense float64 algebra.

``LORAMERGE_CASES=1000`` runs as many cases of each pair instead of 20; ``--junitxml`` writes the largest errors down.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import loramerge as lm
from loramerge.files.lora import LoRA
from loramerge.layers import DoRA, Full, Layer, LowRank
from loramerge.merging.methods import METHODS
from loramerge.testing import random_layer, relative_error
from oracles import formulas

CASES = int(os.environ.get("LORAMERGE_CASES", "20"))
FACTORED = (
    "lora",
    "tucker",
    "loha",
    "loha-tucker",
    "lokr",
    "lokr-full",
    "lokr-w1",
    "lokr-both",
    "lokr-tucker",
)
KINDS = (*FACTORED, "full", "dora", "dora-in")
ENTRIES = tuple(name for name, method in METHODS.items() if method.dense)
SHAPES: tuple[tuple[int, ...], ...] = ((24, 16), (16, 24), (12, 6, 2, 2))
MODULE = "unet.m"
LIMITS = dict.fromkeys(("linear", "slerp", "karcher", "model_stock", "factor_average"), 4e-7)
LIMITS |= dict.fromkeys(("iso_c", "iso_cts"), 3e-5)  # a sum's faintest direction comes out as strong as the strongest
"""Largest relative errors of float32 results."""
LIMIT = 3e-6
"""That of all other methods, which may drop what is below 10⁻⁶ of the largest."""


def made(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Layer, np.ndarray]:
    """A random layer, as it is merged, and its ΔW by the formula of its kind."""
    rank, alpha, seed = int(rng.integers(1, 5)), float(rng.uniform(0.5, 4)), int(rng.integers(1 << 30))
    layer = random_layer(shape, kind=kind, rank=rank, alpha=None if rng.random() < 0.2 else alpha, seed=seed)
    if isinstance(layer, DoRA):
        weight = rng.standard_normal(shape, dtype=np.float32)
        direction = formulas.delta("lora", layer.direction.tensors(), layer.direction.own_alpha, shape)
        found = formulas.dora(direction, layer.magnitude, formulas.wide(weight), 1 if kind == "dora-in" else 0)
        return Full(diff=layer.delta_on(weight)), found
    form = "lora" if kind == "tucker" and len(shape) == 2 else kind
    return layer, formulas.delta(form, layer.tensors(), layer.own_alpha, shape)


def options_of(name: str, rng: np.random.Generator) -> dict[str, Any]:
    density = float(rng.choice([0.1, 0.3, 0.5, 0.7, 1.0]))
    consensus = str(rng.choice(["linear", "ties"]))
    found: dict[str, dict[str, Any]] = {
        "ties": {"density": density},
        "magnitude_prune": {"density": density},
        "sce": {"density": density},
        "dare": {"density": density, "consensus": consensus, "seed": int(rng.integers(99))},
        "della": {"density": 0.6, "epsilon": 0.3, "consensus": consensus, "seed": int(rng.integers(99))},
        "breadcrumbs": {"density": density, "gamma": 0.05, "consensus": consensus},
        "knots": {
            "inside": str(rng.choice(["ties", "dare", "linear"])),
            "density": density,
            "seed": int(rng.integers(99)),
        },
        "iso_cts": {"common": float(rng.choice([0.5, 0.8]))},
        "cart": {"share": float(rng.choice([0.08, 0.4])), "scale": float(rng.uniform(0.5, 1.5))},
        "np_lora": {"mu": float(rng.choice([0.0, 0.5, np.inf])), "order": str(rng.choice(["given", "none"]))},
        "wudi": {"ridge": float(rng.choice([0.3, 1.0, 4.0]))},
    }
    return found.get(name, {})


def weights_of(name: str, count: int, rng: np.random.Generator) -> list[float]:
    found = rng.uniform(0.2, 1.2, count)
    if name == "subtract":
        found[1:] = rng.uniform(0, 1, count - 1)
    elif name not in ("slerp", "karcher", "cart") and rng.random() < 0.4:
        found[-1] *= -1
    return [float(w) for w in found]


def error(name: str, kind: str, seed: int) -> float | None:
    """The error of one random merge; None if an entry or a sign is within rounding of another choice.

    It is relative to the result, or to a tenth of the sum of what is merged, where that nearly cancels.
    """
    rng = np.random.default_rng([seed, list(METHODS).index(name), KINDS.index(kind)])
    shape = SHAPES[seed % len(SHAPES)]
    count = METHODS[name].count or int(rng.integers(2, 5))
    others = [str(rng.choice(FACTORED)) for _ in range(count - 1)]
    layers, deltas = zip(*[made(each, shape, rng) for each in (kind, *others)], strict=True)
    weights, options = weights_of(name, count, rng), options_of(name, rng)
    in_core = "space" in METHODS[name].options and kind in FACTORED and rng.random() < 0.3
    loras = [
        LoRA(name=str(i), architecture=None, dialect="kohya", layouts={MODULE: layer}) for i, layer in enumerate(layers)
    ]
    formulas.gaps.clear()
    asked = {**options, "module": MODULE}
    if in_core:
        wanted = formulas.in_core(formulas.METHODS[name], deltas, weights, **asked)
    else:
        wanted = formulas.METHODS[name](deltas, weights, **asked)
    if min(formulas.gaps, default=1.0) < 1e-6:
        return None
    space = {"space": "core"} if in_core else {}
    planned = lm.plan(loras, weights=weights, method=name, rank=1000, **options, **space)
    size = sum(abs(w) * float(np.linalg.norm(d)) for w, d in zip(weights, deltas, strict=True))
    result = planned.lora()[MODULE]
    found = formulas.delta(result.kind, result.tensors(), result.own_alpha, shape)
    difference = float(np.linalg.norm(found - wanted.reshape(found.shape)))
    return difference / max(float(np.linalg.norm(wanted)), size / 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", formulas.METHODS)
def test_a_method_is_its_formula(name: str, kind: str, record_property: Callable[[str, Any], None]) -> None:
    if kind not in FACTORED and name not in ENTRIES:
        pytest.skip("this method works on factors, which such a layer has none of")
    found = [error(name, kind, seed) for seed in range(CASES)]
    measured = [e for e in found if e is not None]

    record_property("merges", len(measured))
    record_property("largest error", max(measured))
    assert len(measured) >= 0.6 * CASES
    assert max(measured) < LIMITS.get(name, LIMIT)


SHARED = [
    ("np_lora", "lokr-both", 61),
    ("np_lora", "lokr-w1", 37),
    ("np_lora", "lokr-tucker", 109),
    ("subtract", "lokr", 166),
    ("tsv", "tucker", 130),
    ("breadcrumbs", "lokr-tucker", 295),
]
"""Merges where spaces share a direction exactly, or nearly, that is 10⁻³ to 10⁻⁵ of a LoRA's largest."""


@pytest.mark.parametrize(("name", "kind", "seed"), SHARED)
def test_whether_a_faint_direction_is_shared_is_decided_in_float64(name: str, kind: str, seed: int) -> None:
    found = error(name, kind, seed)

    assert found is not None
    assert found < LIMIT


@pytest.mark.parametrize("name", ["knots", "cart", "np_lora", "tsv", "subtract", "iso_c", "iso_cts"])
def test_a_rank_is_that_of_the_product_not_of_the_factors(name: str) -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    down, up = normal(32, 96), normal(128, 64)
    layers = [LowRank(up=up, down=np.concatenate([down, down])), LowRank(up=normal(128, 4), down=normal(4, 96))]
    options = {key: option.default for key, option in METHODS[name].options.items()}
    deltas = [formulas.delta("lora", layer.tensors(), None, layer.shape) for layer in layers]
    wanted = formulas.METHODS[name](deltas, [0.5, 0.5], module="", **options)

    found = METHODS[name].merge(layers, [0.5, 0.5], **options).delta()

    assert relative_error(found, wanted) < LIMIT


def test_every_method_has_a_formula_here() -> None:
    assert {*METHODS} == {*formulas.METHODS, "factor_average"}


@pytest.mark.parametrize("seed", range(min(CASES, 100)))
def test_the_average_of_factors_is_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [float(w) for w in rng.uniform(-1, 1, 3)]
    layers = [random_layer((24, 16), rank=3, alpha=float(rng.uniform(0.5, 4)), seed=seed * 9 + i) for i in range(3)]
    factors = [(formulas.wide(x.up), formulas.wide(x.down), (x.alpha or 3.0) / 3) for x in layers]  # type: ignore[attr-defined]
    wanted = formulas.factor_average(factors, weights)

    found = METHODS["factor_average"].merge(layers, weights).delta()

    assert relative_error(found, wanted) < LIMITS["factor_average"]
