"""What is said of LoRAs before they are merged is what dense algebra says of their ΔW."""

import json
import math
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

import loramerge as lm
from loramerge import errors, linalg
from loramerge.comparing.advising import ALTERNATIVES, RULES, advice, place
from loramerge.comparing.analysis import Comparison
from loramerge.comparing.measures import Pair
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.architectures.blocks import Selector
from loramerge.files.lora import LoRA
from loramerge.layers import LowRank
from loramerge.merging.methods import METHODS
from loramerge.tensors import Array
from loramerge.testing import everything, random_layer, random_lora
from small import MODULES, small

UP = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
DOWN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {DOWN: (24, 16), "unet.down_blocks.0.resnets.0.conv1": (16, 8, 3, 3)}
Factors = tuple[np.ndarray, np.ndarray]


def made(factors: Mapping[str, Factors], name: str = "made", architecture: str | None = None) -> LoRA:
    """A LoRA from factors (up, down)."""
    layouts = {module: LowRank(up=up, down=down) for module, (up, down) in factors.items()}
    return LoRA(name=name, architecture=architecture, dialect="kohya", layouts=layouts)


def random_factors(seed: int, rank: int = 3, out: int = 20, size: int = 30) -> Factors:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)), rng.standard_normal((rank, size))


def tiny(seed: int, rank: int, kind: str = "lora") -> LoRA:
    """A linear layer and a convolution."""
    layouts = {m: random_layer(shape, kind=kind, rank=rank, seed=seed) for m, shape in SHAPES.items()}
    return LoRA(name="tiny", architecture=None, dialect="kohya", layouts=layouts)


def scaled(lora: LoRA, factor: float) -> LoRA:
    return replace(lora, layouts={m: replace(layer, up=layer.up * factor) for m, layer in lora.items()})


def the_pair(first: LoRA, second: LoRA, rows: int | None = None) -> Pair:
    return lm.compare([first, second], rows=rows).total.pairs[0, 1]


def dense(lora: LoRA, module: str) -> np.ndarray:
    delta = lora[module].delta().astype(np.float64)
    return delta.reshape(delta.shape[0], -1)


def entropy_rank(delta: np.ndarray) -> float:
    shares = np.linalg.svd(delta, compute_uv=False) ** 2
    shares = shares[shares > 1e-12 * shares[0]] / shares.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def dense_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between two column spaces."""
    bases = []
    for delta in (first, second):
        u, s, _ = np.linalg.svd(delta, full_matrices=False)
        bases.append(u[:, s > 1e-5 * s[0]])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float((cosines**2).mean())


KINDS = ["lora", "tucker", "loha", "lokr-both", "lokr-full"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_is_that_of_the_dense_updates(kind: str) -> None:
    a, b = tiny(1, 2, kind), tiny(2, 3)

    for row in lm.compare([a, b], rows=None).rows:
        x, y = dense(a, row.name), dense(b, row.name)
        pair = row.pairs[0, 1]
        columns, lengths = (x * y).sum(0), np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
        mass, opposed = np.abs(x) + np.abs(y), x * y < 0
        assert [alone.norm for alone in row.alone] == pytest.approx([np.linalg.norm(x), np.linalg.norm(y)], rel=1e-5)
        assert pair.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        assert pair.input_overlap == pytest.approx(dense_overlap(x.T, y.T), abs=1e-5)
        assert pair.output_overlap == pytest.approx(dense_overlap(x, y), abs=1e-5)
        assert pair.alignment == pytest.approx(np.abs(columns).sum() / lengths.sum(), abs=1e-6)
        assert pair.conflict == pytest.approx(mass[opposed].sum() / mass.sum(), abs=1e-5)
        assert [alone.effective_rank for alone in row.alone] == pytest.approx(
            [entropy_rank(x), entropy_rank(y)], rel=1e-5
        )
        assert pair.sum_effective_rank == pytest.approx(entropy_rank(x + y), rel=1e-5)
        assert pair.sum_norm == pytest.approx(np.linalg.norm(x + y), rel=1e-5)


@pytest.mark.parametrize("second", ["lokr-full", "lokr-both", "lora"])
def test_kronecker_products_of_full_parts_are_measured_as_dense_matrices(second: str) -> None:
    a, b = tiny(1, 2, "lokr-full"), tiny(2, 2, second)

    for row in lm.compare([a, b], rows=None).rows:
        x, y = dense(a, row.name), dense(b, row.name)
        pair = row.pairs[0, 1]
        assert pair.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        assert pair.input_overlap == pytest.approx(dense_overlap(x.T, y.T), abs=1e-5)
        assert pair.output_overlap == pytest.approx(dense_overlap(x, y), abs=1e-5)
        assert pair.sum_effective_rank == pytest.approx(entropy_rank(x + y), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(("kind", "role"), [("lokr-full", "lokr_w1"), ("lokr-both", "lokr_w2_a")])
def test_the_spectrum_of_a_kronecker_product_is_that_of_the_dense_one(kind: str, role: str, scale: float) -> None:
    layer = random_layer((24, 16), kind=kind, rank=2, seed=3, alpha=3.0)
    layer = replace(layer, **{role: scale * getattr(layer, role)})
    up, down = (np.float64(factor) for factor in layer.factors())

    found = layer.spectrum(lambda: linalg.grams(up, down))

    sigma = np.linalg.svd(np.float64(layer.delta()), compute_uv=False)
    u, v = up @ found.left, down.T @ found.right
    np.testing.assert_allclose(found.sigma, sigma[: found.rank], rtol=1e-5)
    assert (sigma[found.rank :] < 1e-5 * sigma[0]).all()
    np.testing.assert_allclose(u.T @ u, np.eye(found.rank), atol=1e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(found.rank), atol=1e-5)


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("apart", [0.0, 1e-8, 1e-5])
def test_a_direction_counts_in_a_spectrum_if_it_is_no_rounding_error(
    apart: float, library: Callable[[np.ndarray], Array]
) -> None:
    """The last column of ``up`` is that before it, moved a little, or not at all."""
    up, down = random_factors(1)
    up[:, 2] = up[:, 1] + apart * random_factors(2)[0][:, 0]

    found = linalg.spectrum(*(library(gram) for gram in linalg.grams(up, down)))

    sigma = np.linalg.svd(up @ down, compute_uv=False)
    assert found.rank == (3 if apart > linalg.RANK_TOLERANCE else 2)
    np.testing.assert_allclose(found.sigma, sigma[: found.rank], rtol=1e-4)
    for side in (up @ np.asarray(found.left), down.T @ np.asarray(found.right)):
        np.testing.assert_allclose(side.T @ side, np.eye(found.rank), atol=1e-4)


def test_the_sum_of_three_is_that_of_the_dense_updates() -> None:
    loras = [tiny(seed, rank=seed) for seed in (1, 2, 3)]

    for row in lm.compare(loras).rows:
        x, y, z = (dense(lora, row.name) for lora in loras)
        assert row.together.norm == pytest.approx(np.linalg.norm(x + y + z), rel=1e-5)
        assert row.together.effective_rank == pytest.approx(entropy_rank(x + y + z), rel=1e-5)
        assert row.pairs[0, 2].sum_effective_rank == pytest.approx(entropy_rank(x + z), rel=1e-5)
        assert row.pairs[1, 2].cosine == pytest.approx((y * z).sum() / np.linalg.norm(y) / np.linalg.norm(z), abs=1e-6)


def test_a_sum_of_more_ranks_than_rows_is_that_of_the_dense_updates() -> None:
    a, b = (made({UP: random_factors(seed, 12, 20, 30)}) for seed in (1, 2))
    pair, negated = the_pair(a, b), the_pair(a, scaled(a, -1.0))

    assert pair.sum_effective_rank == pytest.approx(entropy_rank(dense(a, UP) + dense(b, UP)), rel=1e-5)
    assert negated.sum_effective_rank == 0.0


def test_a_block_is_its_modules_side_by_side() -> None:
    modules = tuple(DOWN.replace("to_q", name) for name in ("to_q", "to_k", "to_v"))
    a = made({m: random_factors(i) for i, m in enumerate(modules)})
    b = scaled(made({m: random_factors(i, 4) for i, m in enumerate(modules, 5)}), 3.0)
    comparison = lm.compare([a, b], rows=None)
    (block,) = comparison.by_block()

    x, y = (np.concatenate([dense(lora, m).ravel() for m in modules]) for lora in (a, b))
    pair = block.pairs[0, 1]
    assert (block.component, block.block, block.modules) == ("unet", "IN04", 3)
    assert pair.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
    assert [alone.norm for alone in block.alone] == pytest.approx([np.linalg.norm(x), np.linalg.norm(y)], rel=1e-5)
    assert pair.conflict == pytest.approx((abs(x) + abs(y))[x * y < 0].sum() / (abs(x) + abs(y)).sum(), abs=1e-5)
    weights = [r.alone[0].norm * r.alone[1].norm for r in comparison.rows]
    overlaps = [r.pairs[0, 1].input_overlap for r in comparison.rows]
    assert pair.input_overlap == pytest.approx(np.average(overlaps, weights=weights))
    assert block.pairs == comparison.total.pairs


def measures(pair: Pair) -> list[float]:
    return [pair.cosine, pair.input_overlap, pair.output_overlap, pair.alignment, pair.conflict]


@pytest.mark.parametrize("architecture", ["sdxl", "sd15", "flux"])
def test_a_lora_agrees_with_itself_and_fights_its_negative(architecture: str) -> None:
    lora = small(architecture)

    assert measures(the_pair(lora, lora)) == pytest.approx([1, 1, 1, 1, 0], abs=1e-6)
    assert measures(the_pair(lora, scaled(lora, -1.0))) == pytest.approx([-1, 1, 1, 1, 1], abs=1e-6)


def test_an_update_and_its_negative_leave_nothing() -> None:
    lora = small()
    pair = the_pair(lora, scaled(lora, -1.0))

    assert pair.sum_norm <= 1e-6 * math.sqrt(pair.first)
    assert pair.sum_effective_rank == 0.0


def test_updates_of_different_inputs_and_outputs_have_nothing_in_common() -> None:
    up, down = np.eye(20)[:, :3], np.eye(30)[:3]
    other = made({UP: (np.eye(20)[:, 5:8], np.eye(30)[5:8])})

    assert measures(the_pair(made({UP: (up, down)}), other)) == [0.0] * 5


@pytest.mark.parametrize("mix", [np.diag([1e-6, 1.0, 1e6]), np.random.default_rng(3).standard_normal((3, 3))])
def test_factors_are_not_told_apart_from_others_with_the_same_product(mix: np.ndarray) -> None:
    (up, down), other = random_factors(1), made({UP: random_factors(2)})
    unmixed = up @ mix, np.linalg.solve(mix, down)

    plain, mixed = (the_pair(made({UP: factors}), other) for factors in ((up, down), unmixed))

    assert measures(mixed) == pytest.approx(measures(plain), abs=1e-5)
    assert mixed.sum_effective_rank == pytest.approx(plain.sum_effective_rank, rel=1e-5)


def test_directions_that_change_nothing_are_no_part_of_a_space() -> None:
    (up, down), other = random_factors(1), made({UP: random_factors(2)})
    idle = np.hstack([up, np.zeros((20, 2)), up[:, :1]]), np.vstack([down, random_factors(4, 2)[1], down[:1]])
    same = np.hstack([up, np.zeros((20, 3))]), np.vstack([down, np.zeros((3, 30))])

    for factors in (idle, same):
        delta = made({UP: factors})
        found = the_pair(delta, other)
        assert found.input_overlap == pytest.approx(dense_overlap(dense(delta, UP).T, dense(other, UP).T), abs=1e-6)
        assert found.output_overlap == pytest.approx(dense_overlap(dense(delta, UP), dense(other, UP)), abs=1e-6)


def test_random_spaces_overlap_by_rank_over_size() -> None:
    pairs = [made({UP: random_factors(seed, rank, 40, 60)}) for seed, rank in enumerate([4, 8] * 30)]
    found = [the_pair(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]

    assert np.mean([pair.input_overlap for pair in found]) == pytest.approx(8 / 60, rel=0.1)
    assert np.mean([pair.output_overlap for pair in found]) == pytest.approx(8 / 40, rel=0.1)
    assert np.mean([pair.clash for pair in found]) < 0.05


def test_spaces_that_are_everything_are_no_clash() -> None:
    a, b = (made({UP: random_factors(seed, 12, 10, 10)}) for seed in (1, 2))
    pair = the_pair(a, b)

    assert (pair.input_overlap, pair.output_overlap, pair.clash) == (pytest.approx(1), pytest.approx(1), 0.0)


def test_a_clash_is_the_same_place_and_another_thing() -> None:
    up, down = random_factors(1)
    lora = made({UP: (up, down)})
    elsewhere = made({UP: (up, np.linalg.svd(down)[2][3:6])})

    assert the_pair(lora, scaled(lora, -1.0)).clash == pytest.approx(1.0)
    assert the_pair(lora, lora).clash == pytest.approx(0.0, abs=1e-9)
    assert the_pair(lora, elsewhere).clash == 0.0


def test_the_order_of_two_does_not_matter() -> None:
    a, b = small(seed=1, rank=2), small(seed=2, rank=5)

    assert measures(the_pair(a, b)) == pytest.approx(measures(the_pair(b, a)), abs=1e-9)


def test_clash_is_overlap_above_chance_times_half_of_one_minus_cosine() -> None:
    up, down = random_factors(1, 5)
    a, b = made({UP: (up, down)}), made({UP: (up[:, :3], down[:3] + 0.5 * random_factors(2)[1])})
    x, y = dense(a, UP), dense(b, UP)

    above = [(o - 5 / n) / (1 - 5 / n) for o, n in ((dense_overlap(x, y), 20), (dense_overlap(x.T, y.T), 30))]
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert the_pair(a, b).clash == pytest.approx(math.sqrt(above[0] * above[1]) * (1 - cosine) / 2, abs=1e-6)


def test_signs_of_all_rows_are_counted_without_a_whole_dense_update() -> None:
    a, b = (made({UP: random_factors(seed, 1, 3000, 3000)}) for seed in (1, 2))
    x, y = dense(a, UP), dense(b, UP)
    mass = np.abs(x) + np.abs(y)

    tracemalloc.start()
    found = the_pair(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert found.conflict == pytest.approx(mass[x * y < 0].sum() / mass.sum(), abs=1e-6)
    assert peak < 4 * 3000 * 3000


def test_strength_changes_norms_only() -> None:
    a, b = small(seed=1), small(seed=2)
    plain, scaled_pair = the_pair(a, b), the_pair(scaled(a, 1e-3), scaled(b, 1e-3))

    assert measures(scaled_pair) == pytest.approx(measures(plain), abs=1e-5)
    assert scaled_pair.sum_norm == pytest.approx(1e-3 * plain.sum_norm, rel=1e-5)
    assert measures(the_pair(scaled(a, 7.0), b))[:4] == pytest.approx(measures(plain)[:4], abs=1e-5)


def test_very_small_updates_still_disagree() -> None:
    a, b = (scaled(small(seed=seed), 1e-24) for seed in (1, 2))

    assert the_pair(a, b).conflict == pytest.approx(0.5, abs=0.1)


def test_some_rows_say_nearly_what_all_rows_say() -> None:
    up, down = random_factors(1, 8, 640, 64)
    other = up + 0.5 * random_factors(2, 8, 640, 64)[0]
    a, b = made({UP: (up, down)}), made({UP: (other, down)})

    exact = the_pair(a, b)
    assert 0.05 < exact.conflict < 0.4
    assert the_pair(a, b, rows=64).conflict == pytest.approx(exact.conflict, abs=0.03)
    assert the_pair(a, b, rows=640).conflict == exact.conflict


def test_a_conflict_in_some_rows_counts_for_all_rows_of_its_module() -> None:
    """In a tall module all signs are opposite, in a low one none: most of the values are the tall one's."""
    tall, low = random_factors(1, 4, 2048, 32), random_factors(2, 4, 64, 32)
    a, b = made({UP: tall, DOWN: low}), made({UP: (-tall[0], tall[1]), DOWN: low})

    exact = the_pair(a, b).conflict
    assert exact > 0.9
    assert the_pair(a, b, rows=64).conflict == pytest.approx(exact, abs=0.02)


def test_a_seed_chooses_the_rows_and_nothing_else() -> None:
    a, b = small(seed=1), small(seed=2)
    first, again, other = (lm.compare([a, b], rows=5, seed=seed).total.pairs[0, 1] for seed in (0, 0, 1))

    assert first == again
    assert first.conflict != other.conflict
    assert replace(first, opposed=0, mass=0) == replace(other, opposed=0, mass=0)


def test_a_module_that_one_lacks_is_no_part_of_the_pair() -> None:
    a, b = small(seed=1), small(seed=2, modules=MODULES["sdxl"][:1])
    comparison = lm.compare([a, b])

    assert comparison.total.pairs[0, 1] == replace(the_pair(a, b, rows=64), modules=1)
    assert [alone.modules for alone in comparison.total.alone] == [4, 1]
    assert comparison.total.alone[0].norm == pytest.approx(a.norm(), rel=1e-6)


def test_a_zero_update_is_compared_without_harm() -> None:
    a = small(seed=1)
    comparison = lm.compare([a, scaled(a, 0.0)])

    assert measures(comparison.total.pairs[0, 1]) == [0.0, 0.0, 0.0, 0.0, 0.0]
    assert "changes nothing" in advice(comparison)


def test_layers_without_factors_are_listed_not_compared() -> None:
    lora, dora = small(seed=1), small(seed=2, kind="dora")
    part = MODULES["sdxl"][0]
    mixed = replace(dora, layouts={**dora.layouts, part: small(seed=2)[part]})
    comparison = lm.compare([lora, mixed])

    assert [(n.lora, n.kind) for n in comparison.not_compared] == [(1, "dora")] * 3
    assert comparison.total.pairs[0, 1].modules == 1
    assert comparison.total.alone[0].modules == 4
    with pytest.raises(errors.NoFactorsError, match=r"random-2 can't be compared.*DoRA"):
        lm.compare([lora, dora])


def test_loras_of_different_models_are_refused() -> None:
    a = made({UP: random_factors(1)})
    with pytest.raises(errors.MergeError, match=r"shape \(20, 30\) in made and \(20, 31\) in made"):
        lm.compare([a, made({UP: random_factors(2, size=31)})])
    with pytest.raises(errors.MergeError, match="nothing to compare"):
        lm.compare([small(modules=MODULES["sdxl"][:1]), small("flux", modules=MODULES["flux"][:1])])


def test_names_that_differ_say_nothing_where_the_family_is_unknown() -> None:
    known = small(modules=MODULES["sdxl"][:1])
    mine, other = made({"unet.mine": random_factors(1)}), made({"unet.other": random_factors(1)})
    written = replace(other, dialect="peft")

    for pair in ([known, mine], [mine, written]):
        with pytest.raises(errors.MergeError, match=r"unknown architecture.*nothing to compare.*--architecture"):
            lm.compare(pair)
    assert lm.compare([mine, other]).total.pairs[0, 1].modules == 0


@pytest.mark.parametrize("loras", [[], ["one.safetensors"], "two", small()])
def test_one_lora_is_no_comparison(loras: object) -> None:
    with pytest.raises(errors.OptionError, match="two LoRAs or more"):
        lm.compare(loras)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux", "sd3-medium"])
def test_every_family_has_its_blocks(architecture: str) -> None:
    modules = list(ARCHITECTURES[architecture].shapes)
    some = {m for m in modules[:: len(modules) // 12] if everything(m, ARCHITECTURES[architecture].shapes[m])}
    a, b = (random_lora(architecture, rank=1, seed=seed, only=lambda m, shape: m in some) for seed in (1, 2))
    comparison = lm.compare([a, b], rows=1)

    assert sum(row.modules for row in comparison.by_block()) == len(some) == comparison.total.modules


def test_torch_and_numpy_say_the_same() -> None:
    a, b = small(seed=1), small(seed=2)
    torches = lm.load(a.state_dict("kohya"), architecture="sdxl")

    assert measures(the_pair(torches, b)) == pytest.approx(measures(the_pair(a, b)), abs=1e-5)


def test_progress_counts_modules() -> None:
    seen: list[tuple[int, int]] = []
    lm.compare([small(seed=1), small(seed=2)], progress=lambda done, total: seen.append((done, total)))

    assert seen == [(n, 4) for n in (1, 2, 3, 4)]


def test_a_comparison_is_plain_data() -> None:
    data = json.loads(json.dumps(lm.compare([small(seed=1), small(seed=2, modules=(DOWN,))]).to_dict()))

    assert data["loras"] == ["random-1", "random-2"]
    assert len(data["modules"]) == 4
    assert data["total"]["pairs"][0]["loras"] == [0, 1]
    assert [m["pairs"][0]["cosine"] is None for m in data["modules"]].count(True) == 3


def test_the_spectrum_is_the_svd() -> None:
    up, down = random_factors(1, 5)
    found = linalg.spectrum(*linalg.grams(up, down))
    delta = up @ down

    left, right = up @ found.left, found.right.T @ down
    np.testing.assert_allclose(found.sigma, np.linalg.svd(delta, compute_uv=False)[:5], rtol=1e-9)
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=1e-9)
    np.testing.assert_allclose(right @ right.T, np.eye(5), atol=1e-9)
    np.testing.assert_allclose((left * found.sigma) @ right, delta, atol=1e-9)


def test_the_effective_rank_counts_equal_singular_values() -> None:
    assert linalg.effective_rank(np.full(7, 3.0)) == pytest.approx(7.0)
    assert linalg.effective_rank(np.array([1.0])) == 1.0
    assert linalg.effective_rank(np.zeros(0)) == 0.0


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_place_matches_its_own_modules_only(architecture: str) -> None:
    modules = [m for m, shape in ARCHITECTURES[architecture].shapes.items() if len(shape) > 1]
    patterns: dict[str, set[str]] = {}
    for module in modules:
        patterns.setdefault(place(module).pattern, set()).add(module)

    assert len(patterns) < 80
    for pattern, members in patterns.items():
        assert {m for m in modules if Selector([pattern], architecture).matching(m)} == members


def test_places_have_names_that_people_use() -> None:
    assert place(UP).words == "the up blocks' attn2"
    assert place("unet.mid_block.resnets.0.conv1").words == "the mid block's resnets"
    assert place("transformer.single_transformer_blocks.7.attn.to_q").words == "the single transformer blocks' attn"
    assert place("text_encoder_2.text_model.encoder.layers.3.mlp.fc1").words == "the text encoder 2's mlp"
    assert place("unet.conv_in").words == "the conv_in"


def turned(factors: Factors, cosine: float, seed: int = 9) -> Factors:
    """An update with the same spaces and norm as an orthonormal one, at a cosine to it."""
    up, down = factors
    rank = up.shape[1]
    other = np.zeros((rank, rank))
    other[range(rank), np.roll(range(rank), 1)] = 1.0
    return up @ (cosine * np.eye(rank) + math.sqrt(1 - cosine**2) * other), down


def orthonormal(seed: int, rank: int = 4, out: int = 40, size: int = 50) -> Factors:
    up, down = random_factors(seed, rank, out, size)
    return np.linalg.qr(up)[0], np.linalg.qr(down.T)[0].T


def two(factors: Callable[[str], tuple[Factors, Factors]]) -> Comparison:
    pairs = {module: factors(module) for module in (UP, DOWN)}
    a, b = (made({m: pair[i] for m, pair in pairs.items()}, "ab"[i]) for i in (0, 1))
    return lm.compare([a, b])


def collided() -> Comparison:
    """One place where both do different things, another where they don't meet."""
    here = orthonormal(1)
    return two(lambda m: (here, turned(here, -0.2)) if m == UP else (orthonormal(2), orthonormal(3)))


def test_a_collision_is_named_with_its_place() -> None:
    said = advice(collided())

    assert said.startswith("These two mostly collide in the up blocks' attn2 (overlap 1.00, cosine -0.20 over 50% of")
    assert said.endswith("a lower weight there: -w '1;unet.up_blocks.*.attn2.*=0.5' -w 1.")


def test_advised_weights_and_methods_are_taken_by_a_merge() -> None:
    shapes = ARCHITECTURES["sdxl"].shapes
    here = orthonormal(1, 4, *shapes[UP])
    a, b = (made({UP: f}, n, "sdxl") for f, n in ((here, "a"), (turned(here, 0.0), "b")))
    said = advice(lm.compare([a, b]))

    weights = [text.strip("'") for text in said.rstrip(".").split("-w ")[1:]]
    assert lm.plan([a, b], weights=[w.strip().strip("'") for w in weights]).weights.of(UP) == [0.5, 1.0]
    assert all(name in METHODS for name in ("ties", "np_lora") if name in said)


def test_what_is_advised_is_a_method() -> None:
    assert set(ALTERNATIVES) <= set(METHODS)


def test_every_rule_is_reached() -> None:
    one = orthonormal(1)
    strong = one[0] * 4.0, one[1]
    other = orthonormal(7)
    half = np.hstack([one[0][:, :2], other[0][:, :2]]), np.vstack([one[1][:2], other[1][:2]])
    said = [
        advice(lm.compare([made({UP: one}), made({DOWN: one})])),
        advice(lm.compare([made({UP: one}), made({UP: (0 * one[0], one[1])})])),
        advice(lm.compare([made({UP: one}), made({UP: turned(one, 0.97)})])),
        advice(lm.compare([made({UP: strong}, "tall"), made({UP: orthonormal(2)}, "short")])),
        advice(collided()),
        advice(lm.compare([made({UP: one}), made({UP: turned(one, 0.6)})])),
        advice(lm.compare([made({UP: turned(one, 0.0)}), made({UP: half})])),
        advice(lm.compare([made({UP: one}), made({UP: orthonormal(2)})])),
    ]

    beginnings = [
        "These two change different modules",
        "made changes nothing",
        "These two are nearly the same update (cosine 0.97)",
        "tall is 4.0 times as strong as short",
        "These two mostly collide",
        "These two agree in part (cosine 0.60)",
        "These two share some of their space",
        "These two barely touch: a plain weighted sum keeps both.",
    ]
    assert len(RULES) == len(beginnings)
    for text, beginning in zip(said, beginnings, strict=True):
        assert text.startswith(beginning), text
        assert text.count(". ") == 0


def test_advised_weights_make_norms_equal() -> None:
    one = orthonormal(1)
    a, b = made({UP: (one[0] * 4.0, one[1])}, "a"), made({UP: orthonormal(2)}, "b")

    assert "-w 0.25 -w 1." in advice(lm.compare([a, b]))


def test_of_three_the_pair_that_collides_is_named() -> None:
    here = orthonormal(1)
    a, b, c = (made({UP: f}, n) for f, n in ((here, "a"), (orthonormal(2), "b"), (turned(here, 0.0), "c")))

    said = advice(lm.compare([a, b, c]))
    assert said.startswith("a and c mostly collide")
    assert said.endswith("-w '1;unet.up_blocks.*.attn2.*=0.5' -w 1 -w 1.")


def test_a_lora_that_was_not_compared_everywhere_is_not_said_to_change_nothing() -> None:
    modules = MODULES["sdxl"][:2]
    lora, dora = small(seed=1, modules=modules), small(seed=2, kind="dora", modules=modules)
    plain = small(seed=2)[modules[0]]
    mixed = replace(dora, layouts={**dora.layouts, modules[0]: plain.times(0.0)})
    zero = replace(dora, layouts={modules[0]: plain.times(0.0)})

    assert advice(lm.compare([lora, mixed])).endswith("in the modules that were compared; 1 other layer can't be.")
    assert "needn't have it" in advice(lm.compare([lora, zero]))


def test_loras_that_meet_only_where_nothing_can_be_said_are_not_called_free_of_conflict() -> None:
    lora, dora = small(seed=1, modules=MODULES["sdxl"][:1]), small(seed=2, kind="dora")
    conv = MODULES["sdxl"][1]
    mixed = replace(dora, layouts={**dora.layouts, conv: small(seed=2)[conv]})

    assert "can't be compared" in advice(lm.compare([lora, mixed]))
