"""Every kind of layer, with and without a bias, keeps its update in every dialect that can hold it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import loramerge as lm
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.lora import LoRA
from loramerge.layers import DoRA, Layer, LowRank
from loramerge.layers.base import dense_norm
from loramerge.testing import KINDS, random_layer, relative_error
from small import MODULES, WRITTEN

PLAIN = ("transformer.x_embedder",)
SWAPPED = ("transformer.norm_out.linear",)
FUSED = tuple(f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v"))
PLACES = {"plain": PLAIN, "swapped": SWAPPED, "fused": FUSED}
CASES = list(
    product(
        PLACES,
        [k for k in KINDS if k != "lokr-full"],
        ["none", "diff_b", "up_bias"],
        ["comfyui", "kohya", "diffusers-peft"],
    )
)


def layer_for(module: str, kind: str, bias: str, seed: int) -> Layer:
    shape = ARCHITECTURES["flux"].shapes[module]
    layer = random_layer(shape, kind=kind, rank=2, alpha=3.0, seed=seed)
    values = np.random.default_rng(seed).standard_normal(shape[0], dtype=np.float32)
    direction = layer.direction if isinstance(layer, DoRA) else layer
    if bias == "diff_b":
        direction = replace(direction, diff_b=values)
    elif isinstance(direction, LowRank) and bias == "up_bias":
        direction = replace(direction, up_bias=values)
    elif direction.diff_b is not None:
        direction = replace(direction, diff_b=None)
    return replace(layer, direction=direction) if isinstance(layer, DoRA) else direction


def updates(layer: Layer) -> Iterator[np.ndarray]:
    """ΔW, the difference of the bias, and the magnitude: all that a layer does."""
    direction = layer.direction if isinstance(layer, DoRA) else layer
    yield direction.delta()
    bias = np.zeros(direction.shape[0], dtype=np.float32)
    for part in (direction.bias() if isinstance(direction, LowRank) else None, direction.diff_b):
        bias = bias if part is None else bias + part
    yield bias
    if isinstance(layer, DoRA):
        yield np.asarray(layer.magnitude).reshape(-1)


@pytest.mark.parametrize(("place", "kind", "bias", "dialect"), CASES)
def test_a_layer_keeps_all_that_it_does(place: str, kind: str, bias: str, dialect: str) -> None:
    modules = PLACES[place]
    layers = {module: layer_for(module, kind, bias, seed) for seed, module in enumerate(modules)}
    lora = LoRA(name="case", architecture="flux", dialect="comfyui", layouts=layers)
    try:
        tensors = lora.state_dict(dialect)
    except lm.errors.DialectError:
        assert kind in ("full", "dora", "dora-in") or place != "plain"
        return

    found = lm.load({key: tensor.numpy() for key, tensor in tensors.items()})

    for module, layer in layers.items():
        for after, before in zip(updates(found[module]), updates(layer), strict=True):
            assert relative_error(after, before) <= 1e-6 or dense_norm(before) == dense_norm(after) == 0


@pytest.mark.parametrize("dialect", WRITTEN)
def test_only_kinds_without_a_low_rank_form_are_refused_when_nothing_is_fused(dialect: str) -> None:
    if dialect == "kohya-diffusers":
        return
    for kind in KINDS:
        layer = layer_for(PLAIN[0], kind, "none", 1)
        lora = LoRA(name="case", architecture="flux", dialect="comfyui", layouts={PLAIN[0]: layer})
        if layer.kind not in ("full", "dora"):
            assert lora.state_dict(dialect)


def test_the_bias_of_a_fused_weight_is_shared_out() -> None:
    rng = np.random.default_rng(0)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    keys = {
        f"{stem}.lora_A.weight": rng.standard_normal((2, 3072), dtype=np.float32),
        f"{stem}.lora_B.weight": rng.standard_normal((9216, 2), dtype=np.float32),
        f"{stem}.lora_B.bias": rng.standard_normal(9216, dtype=np.float32),
    }

    apart = lm.load(lm.load(keys).state_dict("diffusers-peft"))
    merged = lm.merge([lm.load(keys), lm.load(keys)], weights=[1.0, 0.5])

    bias = np.concatenate([apart[m].up_bias for m in FUSED])
    np.testing.assert_array_equal(bias, keys[f"{stem}.lora_B.bias"])
    np.testing.assert_allclose(np.concatenate([merged[m].diff_b for m in FUSED]), 1.5 * bias, rtol=1e-6)


def test_scales_beside_the_tensors_go_into_a_state_dict() -> None:
    module = MODULES["sd15"][1]
    keys = LoRA(
        name="case", architecture="sd15", dialect="peft", layouts={module: random_layer((320, 768), rank=4)}
    ).state_dict("peft")
    lora = lm.load(keys, config={"r": 4, "lora_alpha": 8})

    for dialect in ("peft", "diffusers-peft", None):
        again = lm.load(lora.state_dict(dialect))
        assert relative_error(again[module].delta(), lora[module].delta()) <= 1e-6
    assert lora.layout(module).scale == 2.0


def test_a_changed_lora_is_saved_as_changed() -> None:
    lora = lm.load(
        LoRA(
            name="case", architecture="flux", dialect="kohya", layouts={PLAIN[0]: random_layer((3072, 64))}
        ).state_dict("kohya")
    )
    doubled = replace(lora, layouts={m: replace(layer, up=layer.up * 2) for m, layer in lora.items()})

    again = lm.load(doubled.state_dict())

    assert relative_error(again[PLAIN[0]].delta(), 2 * lora[PLAIN[0]].delta()) <= 1e-6
