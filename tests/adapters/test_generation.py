"""Pictures with LoRAs: what the model gets, what a picture depends on, what is kept, what is written down."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loramerge as lm
from adapters import toys
from loramerge.cli.app import app
from loramerge.cli.generate import read_seeds, read_settings, read_size
from loramerge.diffusion import pipelines
from loramerge.diffusion.apply import applied, fingerprint
from loramerge.diffusion.drawing import Sampling
from loramerge.diffusion.generation import Drawn, Use, generate
from loramerge.errors import (
    DeviceMemoryError,
    DialectError,
    FileError,
    LoRAMergeError,
    MergeError,
    MissingExtraError,
    NumberError,
    OptionError,
)
from loramerge.files.lora import LoRA
from loramerge.layers import BiasOnly, LowRank
from loramerge.scoring.png import recipe_in
from loramerge.scoring.scores import shots_of
from loramerge.scoring.sheets import sheet
from loramerge.testing import random_layer, relative_error
from oracles.pipelines import components, named

RUNNER = CliRunner(env={"COLUMNS": "200"})
QUICK = Sampling(steps=2)
ARCHITECTURES = ("sdxl", "sd15", "sd3-medium")
PARTS = "unet transformer text_encoder text_encoder_2"


def array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def draw(
    pipe: Any, output: Path, settings: Any = None, *, seeds: Any = 2, sampling: Sampling = QUICK, **more: Any
) -> list[Drawn]:
    return generate(pipe, settings or {"none": []}, toys.PROMPTS, seeds, output, sampling=sampling, **more)


# ---- what the model gets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_has_the_weights_of_the_merge(architecture: str) -> None:
    pipe = toys.pipeline(architecture)
    first = toys.lora(architecture, 1)
    second = toys.lora(architecture, 2, only=toys.everything, components=PARTS)
    merged = lm.merge([first, second], weights=[0.7, -0.4])

    with applied(pipe, [(first, 0.7), (second, -0.4)]):
        found = {
            named(component, path): sum(module.get_delta_weight(name) for name in module.lora_A)
            for component, model in components(pipe).items()
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }

    assert found.keys() == set(merged)
    for module, delta in found.items():
        assert (
            relative_error(delta.detach().numpy().reshape(merged[module].delta().shape), merged[module].delta()) <= 1e-5
        )


def test_the_model_is_as_before_afterwards() -> None:
    pipe = toys.pipeline("sdxl")
    before, keys = fingerprint(pipe), [list(model.state_dict()) for model in components(pipe).values()]

    with applied(pipe, [(toys.lora("sdxl", 1), 1.0)]):
        assert fingerprint(pipe) != before

    assert fingerprint(pipe) == before
    assert [list(model.state_dict()) for model in components(pipe).values()] == keys


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_loras_draw_what_their_merge_draws(architecture: str, tmp_path: Path) -> None:
    pipe, first, second = toys.pipeline(architecture), toys.lora(architecture, 1), toys.lora(architecture, 2)
    merged = lm.merge([first, second], weights=[0.6, 0.5])

    drawn = draw(
        pipe, tmp_path, {"none": [], "merged": [Use(merged)], "both": [Use(first, 0.6), Use(second, 0.5)]}, seeds=1
    )

    none, both, sum_ = ([array(d.path) for d in drawn if d.setting == name] for name in ("none", "merged", "both"))
    assert np.abs(np.subtract(both, sum_)).max() <= 1
    assert np.abs(np.subtract(both, none)).mean() > 3


def test_too_little_memory_says_what_to_lower(tmp_path: Path) -> None:
    huge = Sampling(steps=1, height=2**26, width=2**26)

    with pytest.raises(DeviceMemoryError, match=r"4 pictures at a time.*--batch.*float16.*--size.*goes on"):
        draw(toys.pipeline("sd15"), tmp_path, sampling=huge)


def test_a_picture_is_that_of_the_plain_pipeline(tmp_path: Path) -> None:
    pipe = toys.pipeline("sd15")

    drawn = draw(pipe, tmp_path, sampling=Sampling(steps=3, guidance=2.5, height=24, width=16, negative_prompt="b"))

    for picture in drawn:
        plain = pipe(
            picture.prompt,
            negative_prompt="b",
            num_inference_steps=3,
            guidance_scale=2.5,
            height=24,
            width=16,
            generator=torch.Generator().manual_seed(picture.seed),
        ).images[0]
        assert np.abs(array(picture.path) - np.asarray(plain)).max() <= 1


# ---- what a picture depends on


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_picture_is_the_same_in_any_batch(architecture: str, tmp_path: Path) -> None:
    pipe, settings = toys.pipeline(architecture), {"a": [Use(toys.lora(architecture, 1))]}

    alone = draw(pipe, tmp_path / "1", settings, batch=1)
    together = draw(pipe, tmp_path / "4", settings, batch=4)
    reordered = draw(pipe, tmp_path / "3", settings, seeds=[1, 5, 0], batch=3)

    others = {(d.prompt, d.seed): array(d.path) for d in reordered}
    for one, other in zip(alone, together, strict=True):
        assert np.abs(array(one.path) - array(other.path)).max() <= 1
        assert np.abs(array(one.path) - others[one.prompt, one.seed]).max() <= 1


def test_seeds_prompts_and_settings_draw_different_pictures(tmp_path: Path) -> None:
    drawn = draw(toys.pipeline("sdxl"), tmp_path, {"none": [], "a": [Use(toys.lora("sdxl", 1))]})

    assert len({d.path.read_bytes() for d in drawn}) == len(drawn) == 8
    assert len({array(d.path).tobytes() for d in drawn}) == 8


# ---- what is kept


def test_what_is_there_is_kept_and_what_is_not_is_drawn(tmp_path: Path) -> None:
    pipe, settings = toys.pipeline("sdxl"), {"none": [], "a": [Use(toys.lora("sdxl", 1), 0.5)]}
    first = draw(pipe, tmp_path, settings)
    before = [d.path.read_bytes() for d in first]
    times = [d.path.stat().st_mtime_ns for d in first]
    first[5].path.unlink()

    again = draw(pipe, tmp_path, settings)

    assert [d.reused for d in again] == [i != 5 for i in range(8)]
    assert [d.path.stat().st_mtime_ns == t for d, t in zip(again, times, strict=True)] == [i != 5 for i in range(8)]
    assert [np.abs(array(d.path) - old).max() <= 1 for d, old in zip(again, map(_decoded, before), strict=True)] == [
        True
    ] * 8


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(toys.pipeline("sdxl"), tmp_path, {"a": [Use(toys.lora("sdxl", 1))]}, batch=2, progress=interrupt)
    again = draw(toys.pipeline("sdxl"), tmp_path, {"a": [Use(toys.lora("sdxl", 1))]}, batch=2)

    assert [d.reused for d in again] == [True, True, False, False]


@pytest.mark.parametrize("change", ["weight", "lora", "steps", "guidance", "scheduler", "model", "negative"])
def test_a_changed_recipe_is_drawn_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, lora = toys.pipeline("sd15"), toys.lora("sd15", 1)
    draw(pipe, tmp_path, {"a": [Use(lora)]}, seeds=1)

    use, sampling = Use(lora), QUICK
    if change == "weight":
        use = Use(lora, 0.9)
    elif change == "lora":
        use = Use(toys.lora("sd15", 2))
    elif change == "scheduler":
        monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config))
    elif change == "model":
        weight = toys.denoiser(pipe).conv_in.weight
        monkeypatch.setattr(weight, "data", weight.data * 1.01)
    else:
        wanted: dict[str, Any] = {"steps": {"steps": 3}, "guidance": {"guidance": 2.0}}
        sampling = replace(QUICK, **wanted.get(change, {"negative_prompt": "b"}))
    again = draw(pipe, tmp_path, {"a": [use]}, seeds=1, sampling=sampling)

    assert not any(d.reused for d in again)


def test_pictures_of_others_are_not_overwritten(tmp_path: Path) -> None:
    drawn = draw(toys.pipeline("sdxl"), tmp_path, seeds=1)
    toys.picture(0).save(drawn[0].path)
    before = drawn[0].path.read_bytes()

    with pytest.raises(FileError, match="not made by loramerge"):
        draw(toys.pipeline("sdxl"), tmp_path, seeds=1)

    assert drawn[0].path.read_bytes() == before


# ---- what is written down


def test_a_picture_says_how_it_was_made(tmp_path: Path) -> None:
    pipe, lora = toys.pipeline("sdxl"), toys.lora("sdxl", 1)
    prompt = 'A „portrait“ of a psq-person: 人 & "quotes"\nline'

    drawn = generate(pipe, {"a": [Use(lora, 0.25)]}, [prompt], [7], tmp_path, sampling=QUICK, base="some/model")

    with Image.open(drawn[0].path) as image:
        recipe = json.loads(image.text["loramerge"])
    assert (recipe["prompt"], recipe["seed"]) == (prompt, 7)
    assert recipe["loras"] == [{"name": "lora 1", "sha256": lora.sha256, "weight": 0.25}]
    assert recipe["sampling"]["steps"] == 2
    assert recipe["sampling"]["guidance"] == 5.0
    assert recipe["base"]["name"] == "some/model"
    assert recipe["scheduler"]["name"] == "EulerDiscreteScheduler"
    assert recipe["scheduler"]["beta_end"] == 0.012
    assert recipe["versions"]["diffusers"] == version("diffusers")
    assert recipe["versions"]["loramerge"] == lm.__version__


def test_a_pipeline_that_was_loaded_by_a_path_object_draws(base: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)

    (drawn,) = generate(pipe, {"none": []}, toys.PROMPTS[:1], 1, tmp_path, sampling=QUICK)

    assert recipe_in(drawn.path)["base"]["name"] == str(base)


def test_drawn_pictures_are_shots_to_score(tmp_path: Path) -> None:
    drawn = draw(toys.pipeline("sdxl"), tmp_path)

    shots = shots_of({"none": tmp_path / "none"})

    assert {(s.prompt, s.seed, s.path) for s in shots} == {(d.prompt, d.seed, d.path) for d in drawn}


def test_a_sheet_has_a_row_a_setting_and_a_column_a_prompt(tmp_path: Path) -> None:
    drawn = draw(toys.pipeline("sdxl"), tmp_path, {"none": [], "a": [Use(toys.lora("sdxl", 1))]})
    shots = shots_of({name: tmp_path / name for name in ("none", "a")})

    found = sheet(shots, side=16, seeds=2)

    pixels = np.asarray(found).astype(int)
    places = {}
    for picture in drawn:
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3))[:, :, 0]
        apart = np.abs(windows - array(picture.path)).max((2, 3, 4))
        assert (apart == 0).sum() == 1
        places[picture] = np.argwhere(apart == 0)[0]
    rows = {place[0]: picture.setting for picture, place in places.items()}
    columns = [picture for picture in sorted(places, key=lambda p: places[p][1]) if picture.setting == "a"]
    assert [rows[y] for y in sorted(rows)] == ["none", "a"]
    assert sorted((d.prompt, d.seed) for d in columns[:2]) == [(columns[0].prompt, 0), (columns[0].prompt, 1)]
    assert [d.seed for d in columns] == [0, 1, 0, 1]


# ---- errors


def test_a_lora_for_another_model_is_refused(tmp_path: Path) -> None:
    before = fingerprint(toys.pipeline("sd15"))

    with pytest.raises(MergeError, match="modules that the model doesn't have"):
        draw(toys.pipeline("sd15"), tmp_path, {"a": [Use(toys.lora("sdxl", 1))]})

    assert fingerprint(toys.pipeline("sd15")) == before
    assert not list(tmp_path.rglob("*.png"))


def test_a_lora_of_other_shapes_is_refused(tmp_path: Path) -> None:
    lora = toys.lora("sd15", 1)
    module = next(iter(lora))
    wrong = replace(lora, layouts={**lora.layouts, module: random_layer((8, 99), rank=2)})

    with pytest.raises(MergeError, match="99"):
        draw(toys.pipeline("sd15"), tmp_path, {"a": [Use(wrong)]})


def first_of(lora: LoRA, layer: Any) -> LoRA:
    """A LoRA with another first layer."""
    return replace(lora, layouts={**lora.layouts, next(iter(lora)): layer})


def with_nan(lora: LoRA) -> LoRA:
    module = next(iter(lora))
    up, down = (np.array(factor) for factor in lora[module].factors())
    up[0, 0] = np.nan
    return first_of(lora, LowRank(up=up, down=down.reshape(len(down), *lora.layout(module).shape[1:])))


LORA = toys.lora("sdxl", 1)
BAD = {
    "of another family": (toys.lora("sd15", 1), MergeError, "modules that the model doesn't have"),
    "of other shapes": (first_of(LORA, random_layer((8, 99), rank=2)), MergeError, "99"),
    "with NaN": (with_nan(LORA), NumberError, "to_q: a value is NaN or infinite"),
    "that diffusers can't hold": (
        first_of(LORA, random_layer(LORA.layout(next(iter(LORA))).shape, kind="dora", rank=2)),
        DialectError,
        "diffusers can't hold this layer: it is a DoRA layer",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_the_last_setting_is_looked_at_before_the_first_picture(what: str, tmp_path: Path) -> None:
    wrong, error, told = BAD[what]
    good = [Use(toys.lora("sdxl", 2))]

    with pytest.raises(error, match=told):
        draw(toys.pipeline("sdxl"), tmp_path, {"none": [], "a": good, "b": [*good, Use(wrong, 0.5)]}, seeds=1)

    assert not list(tmp_path.rglob("*.png"))
    assert not any(toys.pipeline("sdxl").get_list_adapters().values())


def test_a_weight_that_is_no_number_is_refused_before_the_first_picture(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="setting 'b': lora 1 has the weight nan"):
        draw(toys.pipeline("sdxl"), tmp_path, {"a": [], "b": [Use(LORA, float("nan"))]}, seeds=1)

    assert not list(tmp_path.rglob("*.png"))


def test_loras_in_the_pipeline_already_are_refused(tmp_path: Path) -> None:
    pipe = toys.pipeline("sdxl")
    pipe.load_lora_weights(toys.lora("sdxl", 1).state_dict("diffusers"))
    try:
        with pytest.raises(OptionError, match="unload_lora_weights"):
            draw(pipe, tmp_path)
    finally:
        pipe.unload_lora_weights()


def test_nan_is_an_error_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = toys.pipeline("sdxl")
    weight = pipe.vae.decoder.conv_out.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight.data, torch.nan))

    with pytest.raises(NumberError, match="NaN"):
        draw(pipe, tmp_path)

    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("settings", "prompts", "seeds", "told"),
    [
        ({}, ["a"], 1, "Nothing to draw: 0 settings"),
        ({"a": []}, [], 1, r"Nothing to draw: .* prompts \[\]"),
        ({"a": []}, "a", 1, "Nothing to draw: .* prompts 'a'"),
        ({"a": []}, ["a"], 0, "Nothing to draw: .* 0 seeds"),
        ({"a": []}, ["a"], [-1], "Seeds are 0 or more, got -1"),
        ({"a": []}, ["a"], [1, 1], "A seed is given twice"),
        ({"a": []}, ["a", "a"], 1, "A prompt is given twice"),
        ({"../a": []}, ["a"], 1, "no name for a folder"),
        ({".a": []}, ["a"], 1, "no name for a folder"),
        ({"a": [], "A": []}, ["a"], 1, "Two settings have the same folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    settings: Any, prompts: Sequence[str], seeds: Any, told: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=told):
        generate(toys.pipeline("sdxl"), settings, prompts, seeds, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'loramerge\[diffusers\]'"):
        pipelines.load_pipeline("nothing")


# ---- command line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.pipeline("sdxl").save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        lm.save(toys.lora("sdxl", 1), tmp_path / "person.safetensors", dialect="diffusers"),
        lm.save(toys.lora("sdxl", 2), tmp_path / "jersey.safetensors", dialect="diffusers-peft"),
    )


def test_generate_and_score_on_the_command_line(base: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    person, jersey = files
    settings = [
        "--lora",
        person,
        "--lora",
        f"both={person}:0.7+{jersey}:0.5",
        "-p",
        toys.PROMPTS[0],
        "-p",
        toys.PROMPTS[1],
    ]
    settings += ["--lora", f"average={jersey}:0.2"]
    common = [
        "generate",
        "--base",
        base,
        *settings,
        "--seeds",
        "5",
        "--steps",
        "2",
        "--device",
        "cpu",
        "-o",
        tmp_path / "out",
    ]

    first = RUNNER.invoke(app, list(map(str, common)))
    second = RUNNER.invoke(app, list(map(str, [*common, "--batch", "3"])))
    model = toys.dinov2(tmp_path / "model")
    references = ["-r", f"person={tmp_path / 'out' / 'person'}", "--against", "none", "--no-cache"]
    (tmp_path / "out" / "person" / "IMG_1.HEIC").touch()
    scored = RUNNER.invoke(app, list(map(str, ["score", tmp_path / "out", "--model", model, *references])))

    assert first.exit_code == 0, first.output
    assert "40 pictures, sheet.png" in first.output
    assert (tmp_path / "out" / "sheet.png").exists()
    assert {p.parent.name for p in tmp_path.glob("out/*/*.png")} == {"none", "person", "both", "average"}
    recipe = recipe_in(next(tmp_path.glob("out/both/*.png")))
    assert [(entry["name"], entry["weight"]) for entry in recipe["loras"]] == [
        ("person.safetensors", 0.7),
        ("jersey.safetensors", 0.5),
    ]
    rows = {cells[0]: cells[1:] for line in second.output.splitlines() if (cells := line.split())}
    assert rows["both"] == ["0", "10"]
    assert scored.exit_code == 0, scored.output
    assert "95 % intervals over 5 seeds" in scored.output
    first_of_line = [line.split()[0] for line in scored.output.splitlines() if line.split()]
    drawn = ["none", "person", "both", "average"]
    assert [name for name in first_of_line if name in drawn][:4] == drawn
    assert f"Note: {tmp_path / 'out' / 'person'}: left out are IMG_1.HEIC" in scored.stderr.replace("\n", " ")


def test_a_family_that_a_file_leaves_open_can_be_said(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file(load_file(lm.save(LORA, tmp_path / "whole.safetensors", dialect="kohya")), file)
    given = ["generate", "--base", base, "-l", file, "-p", "a", "-n", "1", "--steps", "1", "--device", "cpu"]

    left = RUNNER.invoke(app, list(map(str, [*given, "-o", tmp_path / "left"])))
    said = RUNNER.invoke(app, list(map(str, [*given, "-o", tmp_path / "said", "--architecture", "sdxl"])))

    assert "say its family, by which its modules are named: --architecture" in str(left.exception)
    assert not list(tmp_path.glob("left/*/*.png"))
    assert said.exit_code == 0, said.output
    assert len(list(tmp_path.glob("said/*/*.png"))) == 2


def test_a_scheduler_can_be_chosen(base: Path) -> None:
    pipe = pipelines.load_pipeline(str(base), device="cpu", scheduler="DDIMScheduler")

    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.scheduler.config.beta_end == 0.012
    assert not pipe.scheduler.config.clip_sample
    with pytest.raises(OptionError, match="Did you mean 'DDIMScheduler'"):
        pipelines.load_pipeline(str(base), device="cpu", scheduler="DDIMSheduler")


def test_a_scheduler_whose_noise_has_a_seed_of_its_own_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeded(DDIMScheduler):
        @register_to_config
        def __init__(self, noise_sampler_seed: int | None = None, **given: Any) -> None:
            super().__init__(**given)

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Seeded)
    with pytest.raises(OptionError, match="noise that doesn't follow the pictures' seeds"):
        pipelines.load_pipeline(str(base), device="cpu", scheduler="DPMSolverSDEScheduler")


def test_a_bias_that_fits_is_not_said_to_be_for_another_model(tmp_path: Path) -> None:
    lora = toys.lora("sd15", 1)
    module = "unet.down_blocks.0.resnets.0.conv1"
    length = toys.pipeline("sd15").unet.get_submodule(module.removeprefix("unet.")).weight.shape[0]
    for size, said in ((length, "bias"), (length + 1, "Is it for another base model")):
        layouts = {**lora.layouts, module: BiasOnly(diff_b=np.ones(size, np.float32))}
        with pytest.raises(LoRAMergeError, match=said):
            draw(toys.pipeline("sd15"), tmp_path, {"a": [Use(replace(lora, layouts=layouts))]})


def test_a_missing_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no model_index\.json"):
        pipelines.load_pipeline(str(tmp_path))


def test_settings_are_read_as_typed(files: tuple[Path, Path], tmp_path: Path) -> None:
    person, jersey = files
    odd = shutil.copy(person, tmp_path / "a+b=c.safetensors")

    with ExitStack() as loras:
        typed = [str(person), f"{person}:0.5", f"x={person}:0.7+{jersey}:-1", str(odd)]
        found = read_settings(typed, loras, none=True)

    assert {name: [(use.lora.name, use.weight) for use in uses] for name, uses in found.items()} == {
        "none": [],
        "person": [("person.safetensors", 1.0)],
        "person@0.5": [("person.safetensors", 0.5)],
        "x": [("person.safetensors", 0.7), ("jersey.safetensors", -1.0)],
        "a+b=c": [("a+b=c.safetensors", 1.0)],
    }
    for wrong in (["none=" + str(person)], [str(person), str(person)]):
        with ExitStack() as loras, pytest.raises(OptionError, match="Two settings"):
            read_settings(wrong, loras, none=True)
    with ExitStack() as loras, pytest.raises(OptionError, match="Nothing to draw"):
        read_settings([], loras, none=False)


@pytest.mark.parametrize(("text", "seeds"), [("8", 8), ("3,5", [3, 5]), ("3,", [3])])
def test_seeds_are_read_as_typed(text: str, seeds: Any) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("768x1024", (768, 1024)), (None, (None, None))])
def test_sizes_are_read_as_typed(text: str | None, size: Any) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    ("read", "text"), [(read_seeds, "x"), (read_seeds, "1,x"), (read_size, "0"), (read_size, "1x2x3")]
)
def test_wrong_numbers_are_refused(read: Any, text: str) -> None:
    with pytest.raises(LoRAMergeError, match=f"Can't read the (seeds|size) '{text}'"):
        read(text)
