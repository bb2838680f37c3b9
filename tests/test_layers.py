"""Every kind of layer is what its formula says."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import loramerge as lm
from loramerge.comparing import compare
from loramerge.errors import LayerError, NoFactorsError
from loramerge.layers import DoRA, Layer, LowRank, Replaced, build
from loramerge.tensors import (
    Array,
    Shape,
    Spec,
    cast,
    code,
    float32,
    numpy_dtype,
    parse_dtype,
    row_blocks,
    scalar,
    widest,
)
from loramerge.testing import KINDS, random_layer, random_lora, relative_error

LINEAR, CONV, POINT = (48, 32), (24, 16, 3, 3), (24, 16, 1, 1)
LOW_RANK = [kind for kind in KINDS if kind not in ("full", "dora", "dora-in")]


def dense(layer: Layer) -> np.ndarray:
    """ΔW by the definition, in float64, without factors."""
    t: dict[str, Any] = {role: np.asarray(a, dtype=np.float64) for role, a in layer.tensors().items()}
    alpha = getattr(layer, "alpha", None)
    if "mid" in t:
        found = np.einsum("oa,abhw,bi->oihw", t["up"][..., 0, 0], t["mid"], t["down"][..., 0, 0])
        rank = t["down"].shape[0]
    elif "down" in t:
        found = np.einsum("or,r...->o...", t["up"].reshape(t["up"].shape[:2]), t["down"])
        rank = t["down"].shape[0]
    elif "hada_w1_a" in t:
        found = _hada(t, 1) * _hada(t, 2)
        rank = t["hada_w1_b"].shape[0]
    else:
        w1 = t.get("lokr_w1") if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            w2, rank = t["lokr_w2"], None
        elif "lokr_t2" in t:
            w2 = np.einsum("abhw,ao,bi->oihw", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
            rank = t["lokr_w2_b"].shape[0]
        else:
            w2, rank = t["lokr_w2_a"] @ t["lokr_w2_b"], t["lokr_w2_b"].shape[0]
        if rank is None and "lokr_w1_b" in t:
            rank = t["lokr_w1_b"].shape[0]
        w2 = (
            w2.reshape(*w2.shape[:2], -1) if w2.ndim > 2 else w2.reshape(w2.shape[0], layer.shape[1] // w1.shape[1], -1)
        )
        found = np.einsum("ab,cdk->acbdk", w1, w2)
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return scale * found.reshape(layer.shape)


def _hada(t: dict[str, Any], i: int) -> np.ndarray:
    a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
    return np.einsum("abhw,ao,bi->oihw", t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("alpha", [None, 2.0, 0.0, -3.0])
@pytest.mark.parametrize("shape", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("kind", LOW_RANK)
def test_the_factors_multiply_to_the_formula(
    kind: str, shape: tuple[int, ...], alpha: float | None, dtype: str
) -> None:
    layer = random_layer(shape, kind=kind, rank=3, alpha=alpha, dtype=dtype)
    up, down = layer.factors()

    assert layer.shape == shape
    assert up.shape == (shape[0], layer.rank)
    assert up.dtype == down.dtype == np.float32
    wanted = dense(layer)
    assert relative_error(up @ down, wanted) <= 1e-6 or not wanted.any()
    assert layer.norm() == pytest.approx(np.linalg.norm(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_the_rank_is_that_of_the_parts(kind: str) -> None:
    layer = random_layer(LINEAR, kind=kind, rank=3)

    wanted = {
        "loha": 9,
        "loha-tucker": 9,
        "lokr": 24,
        "lokr-w1": 12,
        "lokr-full": 8 * 4,
        "lokr-both": 9,
        "lokr-tucker": 24,
    }
    assert layer.rank == wanted.get(kind, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_knows_what_the_layer_knows(kind: str) -> None:
    layer = random_layer(CONV, kind=kind, rank=2)
    layout = layer.map(lambda t: Spec(tuple(t.shape), code(t)))

    assert (layout.shape, layout.rank, layout.kind, layout.dtype) == (layer.shape, layer.rank, layer.kind, layer.dtype)


@pytest.mark.parametrize("kind", [*LOW_RANK, "full"])
def test_rows_of_a_layer_are_the_rows_of_its_update(kind: str) -> None:
    layer = random_layer((48, 32), kind=kind, rank=2)
    if kind == "full":
        layer = replace(layer, diff_b=None)

    part = layer.rows(((32, 48), (0, 8)), "source")

    wanted = np.concatenate([layer.delta()[32:48], layer.delta()[:8]])
    assert part.shape == (24, 32)
    assert part.norm() == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
    np.testing.assert_allclose(part.delta(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [*LOW_RANK, "full"])
def test_the_update_on_a_weight_is_the_update_where_it_does_not_depend_on_the_weight(kind: str) -> None:
    layer = random_layer(CONV, kind=kind, rank=2)

    np.testing.assert_array_equal(layer.delta_on(np.ones(CONV, np.float32)), layer.delta())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_layer_on_rows_of_a_weight_are_the_rows_of_its_update(kind: str) -> None:
    layer, ranges = random_layer(LINEAR, kind=kind, rank=2), ((32, 48), (0, 8))
    if kind == "full":
        layer = replace(layer, diff_b=None)
    weight = np.random.default_rng(0).standard_normal(LINEAR).astype(np.float32)
    cut = np.concatenate([weight[32:48], weight[:8]])
    part = layer.rows(ranges, "source")

    if kind == "dora-in":
        with pytest.raises(NoFactorsError, match="only some rows"):
            part.delta_on(cut)
    else:
        whole = layer.delta_on(weight)
        np.testing.assert_allclose(part.delta_on(cut), np.concatenate([whole[32:48], whole[:8]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "dora-in"])
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_dora_gives_the_patched_weight_its_magnitudes_as_norms(kind: str, shape: tuple[int, ...]) -> None:
    layer = random_layer(shape, kind=kind, rank=2)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    axes = tuple(i for i in range(len(shape)) if i != (0 if kind == "dora" else 1))
    patched = np.float64(weight) + dense(layer.direction)

    wanted = layer.magnitude * patched / np.sqrt((patched**2).sum(axis=axes, keepdims=True)) - weight

    assert relative_error(layer.delta_on(weight), wanted) <= 1e-6


def test_a_replaced_weight_is_the_weight_after_its_update() -> None:
    weight, new = np.full((3, 2), 5, np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)

    np.testing.assert_array_equal(weight + Replaced(set_weight=new).delta_on(weight), new)


def test_a_tucker_core_folds_into_a_plain_convolution() -> None:
    layer = random_layer(CONV, kind="tucker", rank=3, alpha=2.0)
    assert isinstance(layer, LowRank)

    plain = layer.without_core()

    assert plain.mid is None
    assert plain.rank == 3
    assert relative_error(plain.delta(), layer.delta()) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "magnitude", "axis"),
    [
        (LINEAR, (48, 1), "out"),
        (LINEAR, (48,), "out"),
        (LINEAR, (1, 32), "in"),
        ((32, 32), (32, 1), "out"),
        ((32, 32), (1, 32), "in"),
        (CONV, (24, 1, 1, 1), "out"),
        (CONV, (1, 16, 1, 1), "in"),
    ],
)
def test_doras_axis_is_told_by_the_shape(shape: tuple[int, ...], magnitude: tuple[int, ...], axis: str) -> None:
    layer = DoRA(direction=random_layer(shape), magnitude=np.ones(magnitude, dtype=np.float32))

    assert layer.axis == axis


def test_pefts_norms_of_a_convolutions_rows_are_not_taken_for_columns() -> None:
    direction = random_layer((24, 24, 3, 3)).tensors()

    layer = build({**direction, "row_magnitude": np.ones((1, 24, 1, 1), np.float32)}, None, None)

    assert isinstance(layer, DoRA)
    assert layer.axis == "out"


@pytest.mark.parametrize("kind", ["full", "dora", "dora-in"])
def test_what_has_no_factors_says_so(kind: str) -> None:
    with pytest.raises(NoFactorsError, match="Ways out"):
        random_layer(LINEAR, kind=kind).factors()


WRONG: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "missing up": ({"down": (2, 8)}, "missing up"),
    "ranks differ": ({"down": (2, 8), "up": (8, 3)}, "disagree on the rank"),
    "one axis": ({"down": (8,), "up": (8, 1)}, "wanted"),
    "up with a kernel": ({"down": (2, 8, 1, 1), "up": (8, 2, 3, 3)}, "wanted"),
    "mid of another rank": ({"down": (2, 8, 1, 1), "up": (8, 2, 1, 1), "mid": (3, 3, 3, 3)}, "doesn't fit"),
    "bias of another size": ({"down": (2, 8), "up": (8, 2), "up_bias": (7,)}, "bias of up"),
    "half a hadamard": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8)}, "missing hada_w2_a"),
    "halves differ": (
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 9)},
        "two halves",
    ),
    "half a factor": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2)}, "wanted either lokr_w2"),
    "two kinds": ({"down": (2, 8), "up": (8, 2), "hada_w1_a": (8, 2)}, "not a whole"),
    "a convolution in groups": ({"down": (4, 8, 3, 3), "up": (8, 2, 1, 1)}, "A convolution in 2 groups"),
    "magnitude of rows as one of columns": ({"down": (2, 8), "up": (6, 2), "magnitude": (1, 6)}, "DoRA magnitude"),
    "magnitude of nothing": ({"down": (2, 8), "up": (6, 2), "magnitude": (5, 1)}, "DoRA magnitude"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_are_no_layer_are_refused(case: str) -> None:
    shapes, message = WRONG[case]

    with pytest.raises(LayerError, match=message):
        build({role: Spec(shape, "F32") for role, shape in shapes.items()}, None, None)


def test_a_one_by_one_convolution_and_a_matrix_are_the_same_layer() -> None:
    matrix = {"down": np.ones((2, 16), np.float32), "up": np.ones((24, 2), np.float32)}

    layer = build(matrix, None, POINT)

    assert layer.shape == POINT
    assert layer.delta().shape == POINT


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Scaled(Layer):
    """ΔW = diag(b) · up · diag(d) · down, as VeRA's: a kind that no other file knows."""

    kind_name: ClassVar[str] = "scaled"
    required: ClassVar[tuple[str, ...]] = ("up", "b", "d", "down")

    up: Array | Spec
    b: Array | Spec
    d: Array | Spec
    down: Array | Spec

    @property
    def shape(self) -> Shape:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return int(self.d.shape[0])

    def factors(self) -> tuple[Array, Array]:
        return self.b[:, None] * self.up * self.d, self.down


@pytest.mark.parametrize("dialect", ["kohya", "diffusers-peft", "comfyui"])
def test_a_kind_that_only_its_own_file_knows_is_merged_compared_and_saved_as_its_lora(
    dialect: str, tmp_path: Path
) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = random_lora("sd15", only=lambda name, shape: name == module)
    rng = np.random.default_rng(1)
    sizes = {"up": (1280, 2), "b": (1280,), "d": (2,), "down": (2, 1280)}
    layer = Scaled(**{role: rng.standard_normal(size).astype(np.float32) for role, size in sizes.items()})
    strange = replace(lora, name="strange", layouts={module: layer})

    lm.save(strange, tmp_path / "strange.safetensors", dialect=dialect)
    merged = lm.merge([strange, lora], weights=[0.5, 2.0])

    assert relative_error(lm.load(tmp_path / "strange.safetensors")[module].delta(), layer.delta()) <= 1e-6
    assert relative_error(merged[module].delta(), 0.5 * layer.delta() + 2.0 * lora[module].delta()) <= 1e-6
    assert compare([strange, lora]).total.alone[0].norm == pytest.approx(layer.norm())


HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)


def test_every_finite_half_becomes_the_same_float() -> None:
    finite = HALVES[np.isfinite(HALVES)]

    np.testing.assert_array_equal(float32(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_floats_are_rounded_to_halves_as_by_numpys_cast() -> None:
    halves = np.sort(HALVES[np.isfinite(HALVES)].astype(np.float32))
    between = np.concatenate([(halves[:-1] + halves[1:]) / 2, np.float32([1e-8, -1e-8, -0.0, 65519, -65519])])
    floats = np.concatenate([halves, between, np.nextafter(between, 1), np.nextafter(between, -1)]).astype(np.float32)

    np.testing.assert_array_equal(cast(floats, "F16").view(np.uint16), floats.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        (["F16"], "F16"),
        (["F16", "BF16"], "F32"),
        (["BF16", "F8_E4M3"], "BF16"),
        (["I64", "F16"], "F32"),
        (["F64", "F32"], "F64"),
    ],
)
def test_the_widest_dtype_holds_them_all(codes: list[str], wanted: str) -> None:
    assert widest(codes) == wanted


@pytest.mark.parametrize("name", ["fp16", "float16", "half", "F16", "torch.float16", "FP16"])
def test_dtypes_have_many_names(name: str) -> None:
    assert parse_dtype(name) == "F16"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32"])
def test_a_scalar_is_read_without_numpy(dtype: str) -> None:
    from loramerge.tensors import Stored

    data = np.array(2.5 if dtype[0] != "I" else 3, dtype=numpy_dtype(dtype))

    assert scalar(Stored((), dtype, 0, data.nbytes, lambda begin, end: data.tobytes())) == float(data)


def test_the_largest_half_is_kept_and_the_next_refused() -> None:
    from loramerge.errors import NumberError

    assert math.isfinite(cast(np.array([65519.0], np.float32), "F16")[0])
    with pytest.raises(NumberError, match="too large"):
        cast(np.array([65520.0], np.float32), "F16")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"up": (6, 3), "down": (2, 5), "mid": (3, 2, 3, 3)}, "mid of shape"),
        ({"up": (6, 2), "down": (2, 5), "magnitude": (5,)}, "magnitude"),
        ({"lokr_w1": (2, 2, 1, 1), "lokr_w2": (3, 3)}, "more than two axes"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3, 3)}, "more than two axes"),
    ],
)
def test_shapes_that_no_tool_writes_are_refused(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(LayerError, match=said):
        build({role: np.ones(shape, np.float32) for role, shape in shapes.items()}, 1.0, None)


def test_quantised_factors_are_refused_beside_a_diagonal_too() -> None:
    """AdaLoRA's diagonal is multiplied into ``down`` before anything else is looked at."""
    tensors = {
        "up": np.ones((6, 2), np.float32),
        "down": np.ones((2, 5), np.int8),
        "diagonal": np.ones((2, 1), np.float32),
    }
    with pytest.raises(LayerError, match="down is int8"):
        build(tensors, 1.0, None)


def test_rows_of_a_layer_have_its_alpha_and_magnitude() -> None:
    loha = random_layer((12, 8), kind="loha", rank=2, alpha=1.0)
    dora = random_layer((12, 8), kind="dora-in", rank=2, alpha=1.0)

    assert loha.rows([(0, 4)], "qkv").own_alpha == 1.0
    assert dora.rows([(0, 4)], "qkv").axis == "in"


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("shape", [(300, 1024), (3, 100000), (70, 40, 5, 5)])
def test_a_dora_of_many_blocks_is_the_formula(axis: str, shape: Shape) -> None:
    random = np.random.default_rng(0)
    layer = random_layer(shape, kind="dora", rank=2)
    assert isinstance(layer, DoRA)
    own = 0 if axis == "out" else 1
    sizes = [size if i == own else 1 for i, size in enumerate(shape)]
    magnitude = random.uniform(0.5, 2.0, sizes).astype(np.float32)
    layer = replace(layer, magnitude=magnitude)
    weight = random.normal(size=shape).astype(np.float32)

    patched = weight.astype(np.float64) + layer.direction.delta()
    others = tuple(i for i in range(len(shape)) if i != own)
    wanted = patched * (magnitude / np.sqrt((patched**2).sum(others, keepdims=True))) - weight
    np.testing.assert_array_equal(layer.delta_on(weight), wanted.astype(np.float32))


@pytest.mark.parametrize("shape", [(70000,), (300, 1024), (0, 5), (1 << 16,), ((1 << 16) + 1,)])
def test_a_cast_to_half_of_many_blocks_is_numpys(shape: Shape) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for array in (values, np.asfortranarray(values), values[::-1]):
        found = cast(array, "F16")
        assert found.shape == shape
        np.testing.assert_array_equal(found, array.astype(np.float16))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_kernels_dora_per_column_is_the_formula_once_the_kernel_is_known(kind: str) -> None:
    """LyCORIS stores a LoHa's kernel as a matrix, beside magnitudes of shape (1, in, 1, 1)."""
    flat, whole = (12, 6 * 9), (12, 6, 3, 3)
    direction = random_layer(flat, kind=kind, rank=2)
    magnitude = np.random.default_rng(0).uniform(0.5, 2.0, (1, 6, 1, 1)).astype(np.float32)
    layer = DoRA(direction=direction, magnitude=magnitude)
    weight = np.random.default_rng(1).normal(size=whole).astype(np.float32)

    patched = weight.astype(np.float64) + direction.delta().reshape(whole)
    wanted = patched * magnitude / np.sqrt((patched**2).sum((0, 2, 3), keepdims=True)) - weight

    np.testing.assert_allclose(layer.shaped(whole).delta_on(weight), wanted, atol=1e-6)
    with pytest.raises(LayerError, match="the kernel's shape isn't known"):
        layer.delta_on(weight.reshape(flat))


def test_blocks_of_rows_are_all_rows_once() -> None:
    for shape in [(1, 1 << 20), (7, 1 << 14), (1000, 1000), (5,), (0, 3)]:
        array = np.zeros(shape)
        assert [i for rows in row_blocks(array) for i in range(shape[0])[rows]] == list(range(shape[0]))
