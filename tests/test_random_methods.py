"""Methods that draw random numbers: the same for a seed wherever and however they run, and right on average."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import app
from loramerge.files.lora import LoRA
from loramerge.files.storage.writer import SMALL
from loramerge.layers import low_rank
from loramerge.merging.methods import METHODS
from loramerge.merging.methods.selection import chance
from loramerge.tensors import nbytes
from loramerge.testing import random_layer, random_lora

OPTIONS: dict[str, dict[str, Any]] = {
    "dare": {"density": 0.6},
    "dare-ties": {"density": 0.6, "consensus": "ties"},
    "della": {"density": 0.6, "epsilon": 0.2},
    "knots": {"density": 0.6, "inside": "dare"},
}
RANK = 48
"""So large that a module of 320 × 320 is worth a thread."""

every_random = pytest.mark.parametrize("case", OPTIONS)


def test_every_method_with_a_seed_is_tested_here() -> None:
    assert {name for name, m in METHODS.items() if "seed" in m.options} == {case.partition("-")[0] for case in OPTIONS}


def planned(case: str, loras: list[LoRA]) -> lm.Plan:
    return lm.plan(loras, method=case.partition("-")[0], seed=4, rank=RANK, **OPTIONS[case])


def pair() -> list[LoRA]:
    return [random_lora("sd15", rank=RANK, seed=seed, only=attention) for seed in (1, 2)]


def attention(module: str, shape: tuple[int, ...]) -> bool:
    return module.startswith("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_")


def backwards(lora: LoRA) -> LoRA:
    layouts = {module: lora[module] for module in reversed(list(lora))}
    return LoRA(name=lora.name, architecture=lora.architecture, dialect=lora.dialect, layouts=layouts)


@every_random
def test_the_order_of_the_modules_does_not_matter(case: str) -> None:
    loras = pair()

    first = planned(case, loras).lora().in_memory()
    second = planned(case, [backwards(x) for x in loras]).lora().in_memory()

    assert list(second) == list(first)[::-1]
    for module in first:
        np.testing.assert_array_equal(second[module].delta(), first[module].delta())


@every_random
def test_a_module_draws_the_same_whether_or_not_others_are_there(case: str) -> None:
    loras = pair()
    last = list(loras[0])[-1]

    whole = planned(case, loras).merger.outcome(last).layer
    alone = planned(case, [lora.select(last) for lora in loras]).merger.outcome(last).layer

    np.testing.assert_array_equal(alone.delta(), whole.delta())


@every_random
def test_modules_draw_different_numbers(case: str) -> None:
    shape, layers = (24, 16), [random_layer((24, 16), rank=3, seed=seed) for seed in (1, 2)]
    loras = [
        LoRA(name=f"lora{i}", architecture=None, dialect="kohya", layouts={"unet.one": x, "unet.two": x})
        for i, x in enumerate(layers)
    ]

    merged = planned(case, loras).lora()

    assert merged["unet.one"].shape == shape
    assert not np.allclose(merged["unet.one"].delta(), merged["unet.two"].delta())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("random")
    return [str(lm.save(lora, folder / f"{lora.name}.safetensors")) for lora in pair()]


@every_random
def test_the_bytes_are_the_same_for_any_number_of_workers(case: str, files: list[str], tmp_path: Path) -> None:
    written = []
    for workers in (1, 2):
        merged = planned(case, [lm.open(f) for f in files]).lora()
        path = lm.save(merged, tmp_path / f"{workers}.safetensors", workers=workers)
        written.append(path.read_bytes())

    assert nbytes((640, RANK), "F32") > SMALL
    assert written[0] == written[1]


@every_random
def test_the_command_line_writes_the_same_bytes_for_any_number_of_workers(
    case: str, files: list[str], tmp_path: Path
) -> None:
    options = [part for name, value in OPTIONS[case].items() for part in ("-O", f"{name}={value}")]
    command = [
        "merge",
        *files,
        "--method",
        case.partition("-")[0],
        *options,
        "-O",
        "seed=4",
        "--rank",
        str(RANK),
        "--quiet",
    ]
    written = []
    for workers in ("1", "2"):
        path = tmp_path / f"{workers}.safetensors"
        done = CliRunner().invoke(app, [*command, "-o", str(path), "--workers", workers])
        assert done.exit_code == 0, done.output
        written.append(path.read_bytes())

    wanted = lm.save(planned(case, [lm.open(f) for f in files]).lora(), tmp_path / "python.safetensors")

    assert written[0] == written[1] == wanted.read_bytes()


@pytest.mark.parametrize("shape", [(7, 5), (64, 320), (16, 3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_torch_draws_what_numpy_draws(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for which in range(3):
        drawn = chance(np.zeros(shape), 11, which)

        np.testing.assert_array_equal(chance(torch.zeros(shape, dtype=dtype), 11, which).numpy(), drawn)


@pytest.mark.parametrize("case", ["dare", "dare-ties", "della"])
def test_torch_keeps_the_entries_that_numpy_keeps(case: str) -> None:
    given = [random_layer((30, 20), rank=3, seed=seed) for seed in (1, 2)]
    merge = METHODS[case.partition("-")[0]].merge

    found = merge(given, [0.7, 0.4], seed=9, **OPTIONS[case]).delta()
    theirs = merge([x.map(torch.from_numpy) for x in given], [0.7, 0.4], seed=9, **OPTIONS[case]).delta().numpy()

    np.testing.assert_array_equal(theirs == 0, found == 0)
    np.testing.assert_allclose(theirs, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.4), (0.2, 0.5, 0.8)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dare", {"density": 0.2}),
        ("dare", {"density": 0.7}),
        ("dare", {"density": 0.4, "space": "core"}),
        ("della", {"density": 0.5, "epsilon": 0.3, "consensus": "linear"}),
        ("della", {"density": 0.5, "epsilon": 0.3, "consensus": "linear", "space": "core"}),
        ("knots", {"density": 0.4, "inside": "dare"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_mean_over_seeds_is_the_weighted_sum(
    name: str, options: dict[str, Any], weights: tuple[float, ...]
) -> None:
    given = [random_layer((12, 10), rank=3 + i, seed=i) for i in range(len(weights))]
    wanted = sum(w * x.delta().astype(np.float64) for w, x in zip(weights, given, strict=True))

    drawn = np.stack([METHODS[name].merge(given, weights, seed=seed, **options).delta() for seed in range(200)])
    deviation = drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))

    assert (np.abs(drawn.mean(axis=0) - wanted) <= 5 * deviation + 1e-6).all()
    assert (deviation > 0).all()


def of_values(module: str, *values: float) -> list[LoRA]:
    """LoRAs of one module with all entries equal: masks show in the result."""
    shape = (24, 16)
    ones = np.ones((24, 1), np.float32), np.ones((1, 16), np.float32)
    return [
        LoRA(name=f"lora{i}", architecture=None, dialect="kohya", layouts={module: low_rank(v * ones[0], ones[1], shape)})
        for i, v in enumerate(values)
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["dare", "dare-ties", "della"])
def test_a_weight_of_zero_leaves_the_numbers_of_the_others_as_they_are(case: str) -> None:
    loras = of_values("unet.one", 1.0, 100.0)

    def merged(weights: list[float]) -> np.ndarray:
        plan = lm.plan(loras, weights=weights, method=case.partition("-")[0], seed=4, rank=16, **OPTIONS[case])
        return np.asarray(plan.merger.outcome("unet.one").layer.delta())

    both, second = merged([1e-3, 1.0]), merged([0.0, 1.0])

    np.testing.assert_array_equal(both > 50, second > 50)
    assert 0 < (second > 50).mean() < 1


@pytest.mark.parametrize("case", ["dare", "dare-ties", "della", "knots"])
def test_a_lora_that_lacks_a_module_counts_in_the_numbering(case: str) -> None:
    loras = [replace(lora, architecture="sdxl") for lora in of_values("unet.one", 1.0, 1.0)]
    other = replace(of_values("unet.two", 1.0)[0], architecture="sdxl")

    def merged(given: list[LoRA], weights: list[float]) -> np.ndarray:
        plan = lm.plan(given, weights=weights, method=case.partition("-")[0], seed=4, rank=16, **OPTIONS[case])
        return np.asarray(plan.merger.outcome("unet.one").layer.delta())

    np.testing.assert_array_equal(merged([other, loras[1]], [1.0, 1.0]), merged(loras, [0.0, 1.0]))
