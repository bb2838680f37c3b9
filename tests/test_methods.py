"""Laws that hold for every merge method: one that is listed is tested."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import loramerge as lm
from loramerge.errors import MergeError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.layers import BiasOnly, Layer, LowRank
from loramerge.merging.methods import METHODS
from loramerge.merging.methods.engines import elementwise
from loramerge.merging.methods.options import options_of
from loramerge.merging.methods.selection import between, ranks_in_rows
from loramerge.merging.methods.spaces import aligned, core
from loramerge.tensors import Held
from loramerge.testing import check_method, random_layer, random_lora, relative_error

KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "linear": ("lora", (26, 18)),
    "conv": ("lora", (14, 3, 3, 3)),
    "loha": ("loha", (28, 24)),
    "lokr": ("lokr", (24, 16)),
}

Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    (name, {"space": space} if space else {})
    for name, method in METHODS.items()
    for space in (("delta", "core") if "space" in method.options else ("",))
]
WHOLE: dict[str, Any] = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
"""Options with which a method drops nothing."""

POSITIVE = ("slerp", "karcher", "subtract")
"""Methods that a negative weight has no meaning in."""

PRIORITY = ("np_lora", "subtract")
"""Methods in which the order of the LoRAs has a meaning."""


def named(case: Case) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


every_method = pytest.mark.parametrize("case", CASES, ids=named)
every_kind = pytest.mark.parametrize("kind", KINDS)
"""For laws in which the layer has a part: its rank, or its own ΔW as the oracle."""

both_ways = pytest.mark.parametrize("kind", ["conv", "loha"])
"""For laws of the formulas alone, which see no kind: layers with stored factors and a kernel, and layers that have
theirs computed."""


@cache
def layer(kind: str, rank: int, seed: int) -> Layer:
    name, shape = KINDS[kind]
    return random_layer(shape, kind=name, rank=rank, alpha=3.0, seed=seed)


def lora(layer: Layer) -> LoRA:
    return LoRA(name="one", architecture=None, dialect="kohya", layouts={"unet.m": layer})


def layers(case: Case, kind: str, count: int, mixed: bool) -> list[Layer]:
    if METHODS[case[0]].count not in (None, count):
        pytest.skip(f"{case[0]} takes {METHODS[case[0]].count} LoRAs")
    if case[0] == "factor_average" and mixed:
        pytest.skip("needs equal ranks")
    rank = {"loha": 2, "lokr": 1}.get(kind, 3)
    return [layer(kind, rank + (i % 2 if mixed else 0), seed=i) for i in range(count)]


def merged(
    case: Case, layers: Sequence[Layer], weights: Sequence[float] | None = None, rank: int | str = "sum", **options: Any
) -> np.ndarray:
    known = {name: value for name, value in options.items() if name in METHODS[case[0]].options}
    result = lm.merge([lora(x) for x in layers], weights=weights, method=case[0], rank=rank, **case[1], **known)
    return np.asarray(result["unet.m"].delta(), dtype=np.float64)


def scaled(layer: Layer, factor: float) -> Layer:
    alpha = layer.alpha * factor  # type: ignore[attr-defined]
    return replace(layer, alpha=alpha)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("mixed", [False, True], ids=["same rank", "mixed"])
@both_ways
@every_method
def test_scaling_all_loras_scales_the_result(case: Case, kind: str, count: int, mixed: bool) -> None:
    given = layers(case, kind, count, mixed)

    result = merged(case, given, rank=12)

    assert np.isfinite(result).all()
    assert np.linalg.norm(result) > 0
    assert relative_error(merged(case, [scaled(x, 2.0) for x in given], rank=12), 2.0 * result) < 1e-5


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("mixed", [False, True], ids=["same rank", "mixed"])
@every_kind
@every_method
def test_the_result_is_a_lora_of_the_sum_of_the_ranks_at_most(case: Case, kind: str, count: int, mixed: bool) -> None:
    given = layers(case, kind, count, mixed)

    result = lm.merge([lora(x) for x in given], method=case[0], **case[1])["unet.m"]

    assert isinstance(result, LowRank)
    assert result.rank <= sum(x.rank or 0 for x in given)
    assert result.shape == given[0].shape


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0])
@every_kind
@every_method
def test_one_lora_is_itself_times_its_weight(case: Case, kind: str, weight: float) -> None:
    if METHODS[case[0]].count not in (None, 1) or case[0] == "iso_c" or case[0] == "iso_cts":
        pytest.skip("takes two LoRAs, or flattens the spectrum of one")
    given = layer(kind, 2, seed=0)

    result = merged(case, [given], [weight], rank=1000, **WHOLE)

    assert relative_error(result, weight * given.delta()) < 1e-5


@pytest.mark.parametrize("count", [3, 5])
@both_ways
@every_method
def test_the_order_does_not_matter(case: Case, kind: str, count: int) -> None:
    if case[0] in PRIORITY or "seed" in METHODS[case[0]].options:
        pytest.skip("the order has a meaning, or decides who draws which random numbers")
    given = layers(case, kind, count, mixed=case[0] != "factor_average")
    weights = [0.2 + 0.3 * i for i in range(count)]

    result = merged(case, given, weights, rank=1000)

    assert relative_error(merged(case, given[::-1], weights[::-1], rank=1000), result) < 2e-5


@both_ways
@every_method
def test_a_weight_of_zero_is_the_same_as_not_being_there(case: Case, kind: str) -> None:
    if case[0] == "slerp" or "seed" in METHODS[case[0]].options:
        pytest.skip("takes two LoRAs, or draws by their places")
    given = layers(case, kind, 3, mixed=False)

    result = merged(case, given, [0.7, 0.4, 0.0], rank=1000)

    assert relative_error(result, merged(case, given[:2], [0.7, 0.4], rank=1000)) < 1e-4


@both_ways
@every_method
def test_every_weight_acts(case: Case, kind: str) -> None:
    given = layers(case, kind, 2, mixed=False)

    result = merged(case, given, [0.5, 0.5])

    assert relative_error(merged(case, given, [0.7, 0.5]), result) > 0.01
    assert relative_error(merged(case, given, [0.5, 0.7]), result) > 0.01


@every_method
def test_scaling_all_weights_scales_the_result(case: Case) -> None:
    if case[0] == "subtract":
        pytest.skip("the weights of the others are shares")
    given = layers(case, "linear", 2, mixed=False)

    result = merged(case, given, [0.4, 0.6])

    assert relative_error(merged(case, given, [0.8, 1.2]), 2.0 * result) < 1e-5


@every_method
def test_a_negative_weight_acts_or_is_refused(case: Case) -> None:
    given = layers(case, "linear", 2, mixed=False)

    if case[0] in POSITIVE:
        with pytest.raises(MergeError, match=r"negative|\[0, 1\]"):
            merged(case, given, [0.6, -0.4])
        return
    result = merged(case, given, [0.6, -0.4])

    assert relative_error(result, merged(case, given, [0.6, 0.4])) > 0.05
    assert relative_error(merged(case, given, [-0.6, 0.4]), -result) < 1e-5


@every_method
def test_a_pointwise_convolution_merges_as_the_linear_layer_does(case: Case) -> None:
    given = layers(case, "linear", 2, mixed=False)
    convs = [lm.merge([lora(x)], weights=[1])["unet.m"] for x in given]
    convs = [
        replace(c, up=c.up.reshape((*c.up.shape, 1, 1)), down=c.down.reshape((*c.down.shape, 1, 1))) for c in convs
    ]

    result = merged(case, convs)

    assert result.shape == (26, 18, 1, 1)
    assert relative_error(result, merged(case, given)) < 1e-5


@every_method
def test_half_precision_inputs_merge_close_to_single_precision(case: Case) -> None:
    given = layers(case, "linear", 2, mixed=False)
    halves = [x.map(lambda t: t.astype(np.float16)) for x in given]

    assert relative_error(merged(case, halves), merged(case, given)) < 0.03


@every_method
def test_what_authors_can_check_holds(case: Case) -> None:
    check_method(case[0], **case[1])


@every_method
def test_a_zero_lora_gives_no_nan(case: Case) -> None:
    first = layer("linear", 3, seed=0)
    nothing = first.map(np.zeros_like)

    assert np.isfinite(merged(case, [first, nothing])).all()


@every_method
def test_a_module_that_no_lora_has_trained_stays_zero(case: Case) -> None:
    trained = random_layer((200, 160), rank=2, seed=0)
    untrained = replace(trained, up=np.zeros_like(trained.up))

    assert not merged(case, [untrained, untrained], rank=2).any()


@every_method
def test_equal_loras_give_no_nan_and_keep_their_direction(case: Case) -> None:
    given = layer("linear", 3, seed=0)

    # What a method is defined to do to one that is there twice; Iso flattens its spectrum.
    defined = {"subtract": 0.25, "np_lora": 0.5 + 0.5 / 1.5, "tsv": 0.5, "factor_average": 2.0}

    result = merged(case, [given, given], [0.5, 0.5], rank=1000, **WHOLE)

    assert np.isfinite(result).all()
    if not case[0].startswith("iso"):
        assert relative_error(result, defined.get(case[0], 1.0) * np.asarray(given.delta())) < 1e-4


@pytest.mark.parametrize("case", [c for c in CASES if "seed" in METHODS[c[0]].options], ids=named)
def test_a_seed_decides_what_is_drawn(case: Case) -> None:
    given = layers(case, "linear", 2, mixed=False)
    options = {"inside": "dare"}

    first = merged(case, given, seed=1, **options)

    assert (merged(case, given, seed=1, **options) == first).all()
    assert relative_error(merged(case, given, seed=2, **options), first) > 0.01


@every_kind
def test_the_core_holds_every_lora_without_loss(kind: str) -> None:
    given = [layer(kind, 2 + i % 2, seed=i) for i in range(3)]

    space = core(given)

    for part, one in zip(space.parts, given, strict=True):
        assert relative_error(space.layer(part).delta(), one.delta().reshape(space.layer(part).shape)) < 1e-6
    left, right = space.stack.up(space.left), space.stack.down(space.right)
    np.testing.assert_allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.eye(right.shape[0]), atol=1e-5)


@pytest.mark.parametrize("space", [core, aligned])
@every_kind
def test_a_merge_in_a_common_space_is_cut_to_the_best_fit(kind: str, space: Any) -> None:
    found = space([layer(kind, 3, seed=i) for i in range(2)])
    merged = found.layer(2 * found.parts[0] - found.parts[1])
    up, down = merged.factors()
    u, s, vt = np.linalg.svd(up.astype(np.float64) @ down.astype(np.float64), full_matrices=False)

    cut = merged.cut(2)

    assert relative_error(cut.up @ cut.down, (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5
    assert cut.energy == pytest.approx((s**2).sum(), rel=1e-5)
    assert cut.lost == pytest.approx((s[2:] ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_factors_that_float32_cannot_hold_are_refused_in_a_common_space(scale: float) -> None:
    space = core([layer("linear", 3, seed=i) for i in range(2)])

    with pytest.raises(NumberError, match="outside of the range of float32"):
        space.layer(scale * space.parts[0]).factors()


def test_some_rows_may_be_too_small_for_float32() -> None:
    up, down = np.ones((1 << 18, 4), np.float32), np.eye(4, 6, dtype=np.float32)
    up[1 << 17 :] = 1e-30
    given = LowRank(up=up, down=np.float32(1e-4) * down)

    found = core([given]).layer(1e-9 * core([given]).parts[0]).factors()[0]

    assert 0 < abs(found[-1]).max() < 2.0**-126


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("mixed", [False, True], ids=["same rank", "mixed"])
@every_kind
def test_what_drops_nothing_is_the_weighted_sum_in_the_core(kind: str, mixed: bool, count: int) -> None:
    given = layers(("magnitude_prune", {}), kind, count, mixed)
    weights = [0.7, -0.2, 0.4, 1.1, -0.6][:count]
    wanted = sum(w * np.asarray(x.delta(), dtype=np.float64) for w, x in zip(weights, given, strict=True))

    for name in ("magnitude_prune", "dare", "breadcrumbs"):
        result = merged((name, {"space": "core"}), given, weights, **WHOLE)
        assert relative_error(result, wanted) < 1e-6
    exact = merged(("linear", {}), given, weights)
    assert relative_error(exact, wanted) < 1e-6


@pytest.mark.parametrize("name", [c[0] for c in CASES if c[1] == {"space": "core"}] + ["tsv", "iso_c", "knots"])
def test_the_core_does_not_depend_on_how_a_file_factorises(name: str) -> None:
    case = (name, {"space": "core"} if "space" in METHODS[name].options else {})
    given = layers(case, "linear", 2, mixed=False)
    mixing = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    other = [replace(x, up=x.up @ mixing, down=np.linalg.inv(mixing) @ x.down) for x in given]

    assert relative_error(merged(case, other), merged(case, given)) < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source_and_says_what_it_does(name: str) -> None:
    method = METHODS[name]

    assert method.source
    assert 20 < len(method.title) <= 120


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ties", {"density": 0.0}, r"density wants a number in \(0, 1\], got 0"),
        ("ties", {"density": "much"}, "density wants a number"),
        ("ties", {"space": "cor"}, "space wants delta or core, got 'cor'"),
        ("ties", {"densty": 0.5}, r"no option 'densty'. Did you mean 'density'\? Its options: space, density"),
        ("dare", {"seed": -1}, "seed wants a whole number from 0, got -1"),
        ("dare", {"seed": True}, "seed wants a whole number"),
        ("knots", {"inside": "sce"}, "inside wants ties or dare or linear"),
        ("np_lora", {"mu": float("nan")}, "mu wants a number from 0, got nan"),
        ("cart", {"scale": float("inf")}, "scale wants a number from 0, got inf"),
        ("della", {"density": 0.9, "epsilon": 0.2}, r"density ± epsilon must lie in \(0, 1\]"),
    ],
)
def test_a_wrong_option_is_refused(method: str, options: dict[str, Any], said: str) -> None:
    given = [lora(layer("linear", 2, seed=i)) for i in range(2)]

    with pytest.raises(OptionError, match=said):
        lm.merge(given, method=method, **options)


def test_a_row_is_ranked_alone_however_many_there_are() -> None:
    values = np.random.default_rng(0).standard_normal((600, 5)).astype(np.float32)

    wanted = [np.abs(row).argsort().argsort() / 4 for row in values]

    np.testing.assert_allclose(ranks_in_rows(values), wanted, atol=1e-6)


def test_the_average_is_a_rule_for_weights_and_no_method() -> None:
    with pytest.raises(OptionError, match="linear, and --weights uniform"):
        lm.plan([lora(layer("linear", 2, seed=0))] * 2, method="average")


def test_slerp_takes_two() -> None:
    with pytest.raises(OptionError, match="slerp merges 2 LoRAs, got 3"):
        lm.plan([lora(layer("linear", 2, seed=i)) for i in range(3)], method="slerp")


def test_subtracting_adds_no_module_of_what_is_subtracted() -> None:
    first, second = random_lora("sd15", seed=1), random_lora("sd15", seed=2)
    module = next(iter(first))

    found = lm.merge([first.exclude(module), second], method="subtract")

    assert module in second
    assert list(found) == [m for m in first if m != module]
    with pytest.raises(MergeError, match="weight of the first LoRA, which subtract changes, is 0"):
        lm.merge([first, second], method="subtract", weights=[0, 1])
    with pytest.raises(MergeError, match="Nothing to merge"):
        lm.merge([first.select(module), second], method="subtract", exclude=[module])


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "one whose ΔW is zero"])
@every_method
def test_biases_are_summed_by_their_weights(case: Case, dead: bool) -> None:
    if case[0] == "subtract":
        pytest.skip("keeps the bias of the first")
    given = layers(case, "linear", METHODS[case[0]].count or 3, mixed=False)
    biased = [replace(x, diff_b=np.full(26, 10.0**i, np.float32)) for i, x in enumerate(given)]
    if dead:
        biased[0] = replace(biased[0], up=0 * biased[0].up)  # type: ignore[attr-defined]

    found = lm.merge([lora(x) for x in biased], weights=[0.5] * len(biased), method=case[0], **case[1])["unet.m"]

    assert np.allclose(found.delta_bias(), 0.5 * sum(10.0**i for i in range(len(biased))), rtol=1e-6)


def test_subtracting_keeps_the_tensors_of_no_layer_of_the_first() -> None:
    loras = [
        replace(lora(layer("linear", 4, seed)), extras={f"strange.{seed}": Held(np.full(3, seed, np.float32))})
        for seed in range(2)
    ]

    assert list(lm.merge(loras, method="subtract").extras) == ["strange.0"]


@pytest.mark.parametrize("biases", [(1.0, 2.0), (1.0, None), (None, 2.0)])
def test_subtracting_keeps_the_bias_of_the_first(biases: tuple[float | None, float | None]) -> None:
    loras = [
        lora(replace(layer("linear", 4, seed), diff_b=None if bias is None else np.full(26, bias, np.float32)))
        for seed, bias in enumerate(biases)
    ]

    found = lm.merge(loras, method="subtract")["unet.m"].delta_bias()

    assert found is None if biases[0] is None else np.array_equal(found, np.full(26, 1.0))


@pytest.mark.parametrize(("weights", "share"), [(None, 1.0), ([0.5, 1.0], 0.5)])
def test_subtracting_from_a_bias_alone_leaves_that_bias(weights: list[float] | None, share: float) -> None:
    first, second = lora(BiasOnly(diff_b=np.full(26, 2, np.float32))), lora(layer("linear", 4, seed=1))

    found = lm.merge([first, second], method="subtract", weights=weights)["unet.m"]

    assert found.bias_only
    assert np.array_equal(found.diff_b, np.full(26, 2 * share))


@pytest.mark.parametrize("weights", [[1.0, 1.5], "equal", "energy", "energy-sum"])
def test_a_share_above_1_is_not_subtracted_whoever_chose_it(weights: Any) -> None:
    first = layer("linear", 4, seed=1)
    loras = [lora(first), lora(scaled(first, -0.5))]

    with pytest.raises(
        MergeError, match=r"unet.m: subtract: the weight of what is removed is a share in \[0, 1\], got"
    ):
        lm.merge(loras, method="subtract", weights=weights)

    assert lm.merge(loras, method="subtract", weights="l2")["unet.m"].norm() > 0


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("top", [0.0, 0.007, 0.3])
def test_entries_between_two_magnitudes_are_their_share_with_ties_too(share: float, top: float) -> None:
    drawn = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    tied = {"none": drawn, "all": np.sign(drawn), "some": np.round(drawn)}

    kept = {name: between(values, share, top) for name, values in tied.items()}

    order = np.sort(np.abs(drawn).ravel())[::-1]
    above = int(top * drawn.size)
    assert set(np.abs(drawn)[kept["none"]]) == set(order[above : above + int(share * drawn.size)])
    assert all(mask.mean() >= share for mask in kept.values())


def test_breadcrumbs_keeps_entries_that_are_all_of_one_size() -> None:
    signs = [
        np.sign(np.random.default_rng(seed).standard_normal(shape)) for seed, shape in enumerate(((26, 1), (1, 18)))
    ]
    up, down = (factor.astype(np.float32) for factor in signs)
    given = lora(LowRank(up=up, down=down))

    assert lm.merge([given], weights=[1.0], method="breadcrumbs", rank=1).norm() == pytest.approx(given.norm())


@pytest.mark.parametrize("method", METHODS)
def test_a_module_at_weight_zero_in_every_lora_is_not_in_the_merge(method: str) -> None:
    loras = [random_lora("sd15", seed=seed) for seed in (1, 2)]

    found = lm.merge(loras, method=method, weights=[{"*": 0.5, "text_encoder": 0}] * 2)

    assert list(found) == [module for module in loras[0] if not module.startswith("text_encoder")]
    with pytest.raises(MergeError, match="is 0 in every module"):
        lm.merge(loras, method=method, weights=[0, 0])


def test_opposite_loras_have_no_arc_and_no_mean() -> None:
    given = layer("linear", 2, seed=0)
    for name in ("slerp", "karcher", "model_stock"):
        with pytest.raises(MergeError, match=r"opposite|cancel out"):
            merged((name, {}), [given, scaled(given, -1.0)])


def directions(angles: Sequence[Sequence[float]]) -> list[Layer]:
    """LoRAs with these coordinates in three ΔWs at right angles, each of length 1."""
    rng = np.random.default_rng(0)
    down = np.linalg.qr(rng.standard_normal((18, 3)))[0].T
    axes = np.linalg.qr(rng.standard_normal((26 * 3, 3)))[0].T.reshape(3, 26, 3)
    ups = np.tensordot(np.asarray(angles), axes, 1)
    return [LowRank(down=down.astype(np.float32), up=up.astype(np.float32)) for up in ups]


THIRDS = [(math.cos(angle), math.sin(angle), 0.0) for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
CANCELLING: dict[str, list[tuple[float, float, float]]] = {
    "two": [(1, 0, 0), (-1, 0, 1e-3)],
    "two, exactly": [(1, 0, 0), (-1, 0, 0)],
    "three": [THIRDS[0], THIRDS[1], (*THIRDS[2][:2], 1e-3)],
    "one and the mean of the others": [(1, 0, 0), (0, 1, 0), (-1, -1, 1e-3)],
}


@pytest.mark.parametrize(
    ("method", "given", "weights"),
    [
        *(
            (name, "two", w)
            for name in ("slerp", "karcher", "model_stock")
            for w in ([0.5, 0.5], [0.7, 0.3], [0.9, 0.1])
        ),
        *((name, "two, exactly", [0.7, 0.3]) for name in ("slerp", "karcher", "model_stock")),
        *((name, "three", [0.4, 0.4, 0.4]) for name in ("karcher", "model_stock")),
        ("karcher", "one and the mean of the others", [0.5, 0.5, 0.1]),
    ],
)
def test_loras_that_cancel_but_for_a_thousandth_are_refused(method: str, given: str, weights: list[float]) -> None:
    with pytest.raises(MergeError, match=r"^unet\.m: .*(opposite|cancel out).* Way out: another method"):
        merged((method, {}), directions(CANCELLING[given]), weights)


def test_two_opposite_loras_have_a_karcher_mean_where_a_third_decides_it() -> None:
    given = directions([(1, 0, 0), (-1, 0, 1e-3), (0, 1, 0)])

    found = merged(("karcher", {}), given, [0.5, 0.5, 0.5])

    assert relative_error(found, 1.5 * np.asarray(given[2].delta())) < 2e-3


@pytest.mark.parametrize("cosine", [-0.9994, -0.99, 0.0])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_the_karcher_mean_of_two_is_slerps_up_to_the_largest_angle(cosine: float, share: float) -> None:
    given = directions([(1, 0, 0), (cosine, math.sqrt(1 - cosine**2), 0)])

    a, b = (merged((name, {}), given, [1 - share, share]) for name in ("slerp", "karcher"))

    assert relative_error(b, a) < 1e-5


def test_an_option_that_no_command_line_can_say_is_refused_when_a_method_is_made() -> None:
    def formula(deltas: object, weights: object, *, table: dict[str, float] = {}) -> None:  # noqa: B006
        """Do something."""

    with pytest.raises(TypeError, match="table"):
        elementwise("strange", source="nowhere")(formula)


def test_options_are_typed_as_on_a_command_line() -> None:
    options = options_of(METHODS["dare"].function)

    assert options["density"].parse("0.25") == 0.25
    assert options["seed"].parse("3") == 3
    with pytest.raises(OptionError, match="got 'x'"):
        options["seed"].parse("x")


@pytest.mark.parametrize(
    ("method", "weights", "said"),
    [
        ("slerp", [0.6, -0.4], "negative weight"),
        ("karcher", [0.6, -0.4], "negative weight"),
        ("subtract", [1.0, 1.5], r"in \[0, 1\], got 1.5"),
        ("cart", [0.5, -0.5], "add up to zero"),
    ],
)
def test_weights_without_a_meaning_are_refused_in_the_plan(method: str, weights: list[float], said: str) -> None:
    loras = [lora(layer("linear", 2, seed=i)) for i in range(2)]

    with pytest.raises(MergeError, match=said):
        lm.plan(loras, method=method, weights=weights)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_a_flat_spectrum_is_cut_before_it_is_flat(method: str) -> None:
    given = [layer("linear", 3, seed=i) for i in range(2)]
    delta = sum(0.5 * np.asarray(x.delta(), dtype=np.float64) for x in given)
    u, s, vt = np.linalg.svd(delta)

    found = merged((method, {}), given, rank=1)

    assert relative_error(found, s[0] * np.outer(u[:, 0], vt[0])) < 1e-4
