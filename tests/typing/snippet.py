"""A user's program, for type checkers: they agree with every `assert_type`, and find the mistakes that are marked."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import assert_type

import numpy as np

import loramerge as lm
from loramerge.comparing.analysis import Row
from loramerge.layers import DoRA, Layer, LowRank
from loramerge.merging.methods import METHODS, Method, find


def merged(person: Path, jersey: str) -> lm.LoRA:
    first = lm.load(person, architecture="sdxl")
    with lm.open(jersey) as second:
        assert_type(second, lm.LoRA)
        both = lm.merge([first, second], weights=[0.7, {"unet.*": 0.5}], rank=8)
    lm.merge([first, jersey], weights=np.array([0.7, 0.5]))
    lm.merge([first, jersey], weights=[np.float32(0.7), {"unet.*": np.float64(0.5)}])
    ties = lm.merge([first, jersey], method="ties", weights="l2", rank="max", density=0.3)
    lm.load(person.read_bytes())
    with person.open("rb") as file:
        assert_type(lm.load(file), lm.LoRA)
    assert_type(lm.resize(ties, max_size="150MB"), lm.LoRA)
    assert_type(lm.average([ties, "b.safetensors"], ema="sigma=0.1"), lm.LoRA)
    assert_type(lm.save(both, "both.safetensors", dialect="kohya"), Path)
    assert_type(lm.convert(jersey, Path("jersey.safetensors"), "diffusers"), Path)
    return both


def layers(lora: lm.LoRA) -> Mapping[str, Layer]:
    assert_type(lora.architecture, str | None)
    for module, layer in lora.items():
        assert_type(module, str)
        assert_type(layer, Layer)
        assert_type(layer.rank, int | None)
        assert_type(layer.shape, tuple[int, ...])
        assert_type(layer.norm(), float)
        if isinstance(layer, LowRank):
            assert_type(layer.rank, int)
            assert_type(layer.scale, float)
        if isinstance(layer, DoRA):
            assert_type(layer.direction, Layer)
    return lora


def planned(loras: list[str]) -> Iterator[tuple[str, Layer]]:
    plan = lm.plan(loras, scope="component", max_error="1%")
    assert_type(plan.size, int)
    assert_type(plan.lora(), lm.LoRA)
    return iter(plan.lora().items())


def compared(person: lm.LoRA, jersey: Path) -> float | None:
    found = lm.compare([person, jersey], rows=None)
    assert_type(found, lm.Comparison)
    assert_type(found.by_block(), tuple[Row, ...])
    return found.total.pairs[0, 1].cosine


def methods() -> list[str]:
    assert_type(METHODS["ties"], Method)
    lm.plan(["person.safetensors"], method=find("package.module:name"))
    return [method.name for method in METHODS.values()]


def recipes(path: Path) -> None:
    try:
        recipe = lm.Recipe.read(path)
    except lm.errors.FileError:
        return
    except lm.LoRAMergeError as error:
        raise SystemExit(str(error)) from error
    assert_type(recipe.plan(), lm.Plan)
    assert_type(lm.sweep(recipe, {"rank": [4, 8]}, "out")[0].failed, str | None)


def mistakes(lora: lm.LoRA) -> None:
    lm.marge([lora])  # type: ignore[attr-defined]
    lm.load("person.safetensors", allow_pickles=True)  # type: ignore[call-arg]
    lm.load(None)  # type: ignore[arg-type]
    lm.merge(lora)  # type: ignore[arg-type]
    lm.merge([lora], scope="modules")  # type: ignore[arg-type]
    lm.save(lora)  # type: ignore[call-arg]
