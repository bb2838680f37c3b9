"""Scores of pictures: preprocessing and embeddings against transformers, scores and intervals against numpy."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from typer.testing import CliRunner

from adapters import toys
from loramerge.cli.app import app
from loramerge.cli.score import settings_in
from loramerge.errors import DeviceMemoryError, FileError, LoRAMergeError, MissingExtraError, NumberError, OptionError
from loramerge.scoring.bootstrap import Interval, interval, student
from loramerge.scoring.dino import dinov2
from loramerge.scoring.drifting import drift
from loramerge.scoring.encoders import Encoder, embed, pixels
from loramerge.scoring.pictures import Box, Preprocessing, read
from loramerge.scoring.png import save_png
from loramerge.scoring.scores import Reference, Scores, score, shots_of

RUNNER = CliRunner(env={"COLUMNS": "200"})


def colours(images: Sequence[Image.Image]) -> np.ndarray:
    """An encoder that anyone could write: means and spreads of the channels."""
    arrays = [np.asarray(image, np.float32) / 255 for image in images]
    return np.stack([np.concatenate([a.mean((0, 1)), a.std((0, 1))]) for a in arrays])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def study(tmp_path: Path) -> dict[str, Any]:
    """Three settings of two prompts and six seeds, and two reference sets."""
    for number, setting in enumerate(("none", "person", "both")):
        folder = tmp_path / "out" / setting
        folder.mkdir(parents=True)
        for prompt in ("smiling", "on-a-field"):
            for seed in range(6):
                toys.picture(1000 * number + 10 * seed + len(prompt)).save(folder / f"{prompt}-{seed}.png")
    return {
        "settings": {name: tmp_path / "out" / name for name in ("none", "person", "both")},
        "references": {
            "face": toys.folder_of(tmp_path / "face", range(5)),
            "shirt": toys.folder_of(tmp_path / "shirt", range(20, 23)),
        },
    }


# ---- preprocessing


CONFIGS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "defaults": {},
    "exact size": {"size": {"height": 30, "width": 44}, "do_center_crop": False, "resample": 2},
    "odd crop": {"size": {"shortest_edge": 21}, "crop_size": {"height": 32, "width": 17}},
    "no resize": {"do_resize": False, "crop_size": {"height": 25, "width": 50}, "rescale_factor": 0.1},
    "bare": {"do_resize": False, "do_center_crop": False, "do_normalize": False},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(40, 30), (31, 57), (224, 224)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_preprocessing_is_that_of_transformers(
    config: dict[str, Any], size: tuple[int, int], mode: str, tmp_path: Path
) -> None:
    source = {"P": "RGB", "1": "L"}.get(mode, mode)
    image = toys.picture(3, *size, mode=source).convert(mode)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "BitImageProcessor", **config}))

    ours = Preprocessing.read(path)(image)

    theirs = BitImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "config", ['{"image_processor_type": "ViTImageProcessor"}', '{"size": {"longest_edge": 9}}', "no"]
)
def test_another_processor_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(config)

    with pytest.raises(FileError, match="preprocessor_config"):
        Preprocessing.read(tmp_path / "preprocessor_config.json")


def test_pictures_are_read_upright_and_on_white(tmp_path: Path) -> None:
    image = toys.picture(1, 12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")

    assert read(tmp_path / "turned.png").size == (8, 12)
    assert (
        read(tmp_path / "turned.png").tobytes()
        == ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).tobytes()
    )
    assert read(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_box_is_a_share_of_the_picture() -> None:
    image = toys.picture(0, 40, 20)

    assert Box(0.25, 0.5, 0.75, 1).of(image).tobytes() == image.crop((10, 10, 30, 20)).tobytes()
    assert Box.parse("0.25,0.5,0.75,1") == Box(0.25, 0.5, 0.75, 1)
    assert Box(0.5, 0.5, 0.5001, 0.5001).of(image).size == (1, 1)


@pytest.mark.parametrize("box", ["0,0,0,1", "0.5,0,0.4,1", "0,0,1.1,1", "nan,0,1,1"])
def test_an_impossible_box_is_refused(box: str) -> None:
    with pytest.raises(OptionError, match="Can't crop to left"):
        Box.parse(box)


@pytest.mark.parametrize("box", ["0,0,1", "a,b,c,d"])
def test_what_is_no_box_is_refused(box: str) -> None:
    with pytest.raises(OptionError, match=f"Can't read the box '{box}'"):
        Box.parse(box)


# ---- embeddings


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("pool", ["cls", "patches"])
def test_embeddings_are_those_of_transformers(pool: Any, registers: bool, tmp_path: Path) -> None:
    folder = toys.dinov2(tmp_path / "model", registers=registers)
    files = sorted(toys.folder_of(tmp_path / "pictures", range(5), width=50, height=40).iterdir())

    ours = embed(dinov2(folder, pool=pool, batch=2, device="cpu"), files)

    inputs = BitImageProcessorPil.from_pretrained(folder)([Image.open(f) for f in files], return_tensors="pt")
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    theirs = tokens[:, 0] if pool == "cls" else tokens[:, -16:].mean(1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_box_is_what_the_encoder_sees(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    toys.picture(0, 40, 20).save(file)
    toys.picture(0, 40, 20).crop((10, 0, 30, 20)).save(tmp_path / "part.png")
    encoder = dinov2(model, device="cpu")

    boxed = embed(encoder, [file], box=Box(0.25, 0, 0.75, 1))

    np.testing.assert_allclose(boxed, embed(encoder, [tmp_path / "part.png"]), rtol=1e-5)


def test_embeddings_on_the_disk_are_used_again(tmp_path: Path) -> None:
    files = sorted(toys.folder_of(tmp_path / "pictures", range(4)).iterdir())
    seen: list[int] = []

    def counted(images: Sequence[Image.Image]) -> np.ndarray:
        seen.append(len(images))
        return colours(images)

    encoder, cache = Encoder(counted, "colours", "colours 1"), tmp_path / "cache"
    first = embed(encoder, files, cache=cache)
    toys.picture(9).save(files[1])
    (tmp_path / "moved.png").write_bytes(files[2].read_bytes())
    second = embed(encoder, [*files, tmp_path / "moved.png"], cache=cache)

    assert seen == [4, 1]
    np.testing.assert_array_equal(first[[0, 2, 3, 2]], second[[0, 2, 3, 4]])
    assert not np.array_equal(first[1], second[1])


@pytest.mark.parametrize("change", ["key", "box", "broken", "none"])
def test_a_changed_encoder_box_or_broken_file_is_embedded_again(change: str, tmp_path: Path) -> None:
    files = sorted(toys.folder_of(tmp_path / "pictures", range(2)).iterdir())
    calls: list[int] = []

    def counted(images: Sequence[Image.Image]) -> np.ndarray:
        calls.append(len(images))
        return colours(images)

    cache = tmp_path / "cache"
    embed(Encoder(counted, "", None if change == "none" else "1"), files, cache=cache)
    if change == "broken":
        for entry in cache.rglob("*.f32"):
            entry.write_bytes(entry.read_bytes()[:-5])
    key = {"key": "2", "none": None}.get(change, "1")
    found = embed(Encoder(counted, "", key), files, cache=cache, box=Box(0, 0, 0.5, 1) if change == "box" else None)

    assert calls == [2, 2]
    assert change == "box" or np.allclose(found, colours([read(file) for file in files]))


def test_pools_and_preprocessings_have_keys_of_their_own(model: Path) -> None:
    keys = {
        dinov2(model, pool="cls").key,
        dinov2(model, pool="patches").key,
        dinov2(model, preprocessing=Preprocessing(resample=2, crop=(28, 28))).key,
    }

    assert len(keys) == 3
    assert dinov2(model).key == dinov2(model, batch=3).key


@pytest.mark.parametrize(
    ("vectors", "error", "told"),
    [
        (lambda images: np.zeros(3), OptionError, r"gave the shape \(3,\)"),
        (lambda images: np.ones((1, 3)), OptionError, r"gave the shape \(1, 3\)"),
        (lambda images: np.zeros((len(images), 3)), NumberError, "it has no direction"),
        (lambda images: torch.full((len(images), 3), torch.nan), NumberError, "it has no direction"),
    ],
)
def test_what_is_no_embedding_is_refused(
    vectors: Any, error: type[LoRAMergeError], told: str, study: dict[str, Any]
) -> None:
    with pytest.raises(error, match=told):
        score(study["settings"], study["references"], vectors)


def test_a_torch_encoder_gives_the_scores_of_a_numpy_one(study: dict[str, Any]) -> None:
    plain = score(**study, encoder=colours)
    torches = score(**study, encoder=lambda images: torch.from_numpy(colours(images)).requires_grad_())

    assert [r.cosine for r in torches.rows] == [r.cosine for r in plain.rows]


# ---- scores


def vectors(files: Sequence[Path]) -> np.ndarray:
    return colours([Image.open(file) for file in files]).astype(np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_scores_are_cosines_with_the_mean_and_means_of_cosines(study: dict[str, Any]) -> None:
    scores = score(**study, encoder=colours)

    for setting, folder in study["settings"].items():
        ours = vectors(sorted(folder.iterdir()))
        for reference, place in study["references"].items():
            theirs = vectors(sorted(place.iterdir()))
            mean = np.mean([cosine(e, theirs.mean(0)) for e in ours])
            pairwise = np.mean([[cosine(e, r) for r in theirs] for e in ours])
            assert scores.mean(setting, reference).mean == pytest.approx(mean, abs=1e-6)
            assert scores.mean(setting, reference, "pairwise").mean == pytest.approx(pairwise, abs=1e-6)


def test_a_set_is_like_itself(study: dict[str, Any]) -> None:
    face = study["references"]["face"]

    scores = score({"face": face}, study["references"], pixels())

    assert scores.mean("face", "face").mean > scores.mean("face", "shirt").mean


def test_a_crop_counts_for_its_own_reference_only(study: dict[str, Any]) -> None:
    face, shirt = study["references"].values()
    box, own = Box(0, 0.5, 1, 1), Box(0.2, 0, 0.8, 1)
    plain = score(**study, encoder=colours)

    cropped = score(
        study["settings"], [Reference("face", face), Reference("shirt", shirt, crop=box, own_crop=own)], colours
    )

    assert cropped.mean("both", "face") == plain.mean("both", "face")
    ours = colours([box.of(Image.open(f)) for f in sorted(study["settings"]["both"].iterdir())])
    theirs = colours([own.of(Image.open(f)) for f in sorted(shirt.iterdir())]).mean(0)
    expected = np.mean([cosine(e, theirs) for e in ours])
    assert cropped.mean("both", "shirt").mean == pytest.approx(expected, abs=1e-6)


def test_a_difference_is_paired_by_prompt_and_seed(study: dict[str, Any]) -> None:
    (study["settings"]["both"] / "smiling-3.png").unlink()
    (study["settings"]["none"] / "on-a-field-0.png").unlink()
    scores = score(**study, encoder=colours)

    found = scores.difference("both", "none", "face")

    by_key = {(r.shot.setting, r.shot.prompt, r.shot.seed): r.cosine for r in scores.rows if r.reference == "face"}
    keys = [(p, s) for p in ("smiling", "on-a-field") for s in range(6)]
    pairs = [by_key["both", *k] - by_key["none", *k] for k in keys if k not in (("smiling", 3), ("on-a-field", 0))]
    assert found.values == len(pairs) == 10
    assert found.mean == pytest.approx(np.mean(pairs))
    assert found.low < found.mean < found.high


def test_drift_is_the_distance_from_the_bases_picture_of_the_same_prompt_and_seed(study: dict[str, Any]) -> None:
    settings = study["settings"]

    found = drift(settings, colours)

    assert found.settings == ("person", "both")
    for name in found.settings:
        pairs = [(file, settings["none"] / file.name) for file in sorted(settings[name].glob("*.png"))]
        wanted = [1 - cosine(*(vectors([file])[0] for file in pair)) for pair in pairs]
        assert found.mean(name, "drift").mean == pytest.approx(np.mean(wanted), abs=1e-6)
        assert found.mean(name, "drift").low is not None
    same = drift({"none": settings["both"], "copy": settings["both"]}, colours)
    assert same.mean("copy", "drift").mean == pytest.approx(0, abs=1e-6)


def test_drift_needs_the_bases_pictures(study: dict[str, Any]) -> None:
    settings = study["settings"]
    with pytest.raises(OptionError, match=r"Drift is measured from 'base'.*none, person, both"):
        drift(settings, colours, base="base")
    with pytest.raises(OptionError, match="Drift is measured from 'none'"):
        drift({"none": settings["none"]}, colours)
    (settings["none"] / "smiling-3.png").unlink()
    with pytest.raises(OptionError, match=r"smiling-3\.png: 'none' has no picture of the same prompt and seed"):
        drift(settings, colours)


def test_drift_on_the_command_line(study: dict[str, Any], tmp_path: Path) -> None:
    folders = list(map(str, study["settings"].values()))
    encoder = ("--encoder", "adapters.test_scoring:colours", "--no-cache", "--no-pixels")

    alone = RUNNER.invoke(app, ["score", *folders, "--drift", "none", *encoder, "-o", str(tmp_path / "tables")])
    nothing = RUNNER.invoke(app, ["score", *folders, *encoder])

    assert alone.exit_code == 0, alone.output
    assert "1 − cosine with the base's picture" in alone.output
    wanted = drift(study["settings"], colours).mean("both", "drift").mean
    rows = list(csv.DictReader((tmp_path / "tables" / "scores.csv").open()))
    assert {row["setting"]: float(row["cosine"]) for row in rows}["both"] == pytest.approx(wanted)
    assert isinstance(nothing.exception, OptionError)
    assert "--drift SETTING" in str(nothing.exception)


def test_the_recipe_inside_goes_before_the_name(tmp_path: Path) -> None:
    save_png(toys.picture(0), tmp_path / "x-7.png", {"prompt": "A portrait.", "seed": 3})
    toys.picture(1).save(tmp_path / "a-b-12.png")
    toys.picture(1).save(tmp_path / "nameless.png")

    shots = {shot.path.name: (shot.prompt, shot.seed) for shot in shots_of({"s": tmp_path})}

    assert shots == {"x-7.png": ("A portrait.", 3), "a-b-12.png": ("a-b", 12), "nameless.png": ("nameless", None)}


def test_pictures_without_seeds_are_clusters_of_their_own(study: dict[str, Any]) -> None:
    (study["settings"]["none"] / "smiling-0.png").rename(study["settings"]["none"] / "smiling.png")

    scores = score(**study, encoder=colours)

    assert scores.cluster == "image"
    assert scores.mean("none", "face").clusters == 12
    with pytest.raises(OptionError, match="has no seed"):
        score(**study, encoder=colours, cluster="seed")


# ---- intervals


@pytest.mark.parametrize(
    ("level", "freedom", "tabulated"),
    [(0.95, 1, 12.7062), (0.95, 4, 2.776445), (0.95, 9, 2.262157), (0.9, 4, 2.131847), (0.99, 30, 2.749996)],
)
def test_student_is_that_of_the_tables(level: float, freedom: int, tabulated: float) -> None:
    assert student(level, freedom) == pytest.approx(tabulated, rel=1e-6)


def experiment(rng: np.random.Generator, seeds: int, prompts: int) -> tuple[list[float], list[int]]:
    """Values of mean 0.3 whose seeds have an effect as large as the noise."""
    effects = rng.normal(0, 0.1, seeds)
    values = 0.3 + effects[:, None] + rng.normal(0, 0.1, (seeds, prompts))
    return values.ravel().tolist(), np.repeat(np.arange(seeds), prompts).tolist()


@pytest.mark.parametrize("seeds", [5, 8, 20])
def test_intervals_hold_the_truth_in_95_of_100_experiments(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    found = [interval(*experiment(rng, seeds, 5), resamples=1000) for _ in range(600)]

    coverage = np.mean([i.low < 0.3 < i.high for i in found])

    assert 0.92 <= coverage <= 0.975


def test_single_pictures_would_promise_too_much() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        values, _ = experiment(rng, 8, 5)
        found.append(interval(values, range(len(values)), resamples=500))

    assert np.mean([i.low < 0.3 < i.high for i in found]) < 0.8


def test_an_interval_is_written_in_a_numbers_form() -> None:
    assert f"{Interval(0.5, 0.25, 0.75, 8, 16):+.2f}" == "+0.50 [+0.25, +0.75]"
    assert f"{Interval(0.5, None, None, 3, 3):.1f}" == "0.5"
    assert str(Interval(0.5, 0.25, 0.75, 8, 16)) == f"{Interval(0.5, 0.25, 0.75, 8, 16):.4f}"


def test_with_few_clusters_there_is_no_interval() -> None:
    found = interval([0.1, 0.2, 0.3, 0.4] * 3, [0, 1, 2, 3] * 3)

    assert (found.low, found.high, found.clusters, found.values) == (None, None, 4, 12)
    assert found.mean == pytest.approx(0.25)


def test_an_interval_is_the_same_in_every_run(study: dict[str, Any]) -> None:
    first, second = (score(**study, encoder=colours) for _ in range(2))

    assert first.mean("both", "face") == second.mean("both", "face")


# ---- errors


def test_what_cannot_be_scored_is_refused(study: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    toys.picture(0).save(tmp_path / "broken" / "a-0.png")
    data = (tmp_path / "broken" / "a-0.png").read_bytes()
    (tmp_path / "broken" / "a-0.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a-0.png").write_text("no picture")
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep" / "a.png")

    for place, message in {
        "empty": "holds no image",
        "missing": "No such directory",
        "broken": "a-0.png",
        "text": "a-0.png",
        "deep": "8 bits",
    }.items():
        with pytest.raises(FileError, match=message):
            score({"s": tmp_path / place}, study["references"], colours)
        with pytest.raises(FileError, match=message):
            score(study["settings"], {"r": tmp_path / place}, colours)


def test_two_pictures_of_one_prompt_and_seed_are_refused(tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        save_png(toys.picture(0), tmp_path / name, {"prompt": "A portrait.", "seed": 3})

    with pytest.raises(FileError, match=r"x\.png and .*y\.png"):
        score({"s": tmp_path}, {"r": tmp_path}, colours)


def test_pictures_of_two_recipes_in_one_folder_are_refused(tmp_path: Path) -> None:
    recipe = {"prompt": "A portrait.", "seed": 3, "loras": [{"file": "a", "weight": 1.0}]}
    save_png(toys.picture(0), tmp_path / "x.png", recipe)
    save_png(toys.picture(1), tmp_path / "y.png", recipe | {"seed": 4})
    assert len(shots_of({"s": tmp_path})) == 2

    save_png(toys.picture(2), tmp_path / "z.png", recipe | {"seed": 5, "loras": [{"file": "a", "weight": 0.5}]})
    with pytest.raises(FileError, match=r"x\.png and .*z\.png .*drawn with other loras"):
        shots_of({"s": tmp_path})
    assert len(shots_of({"s": sorted(tmp_path.glob("*.png"))})) == 3


def test_a_folder_with_pictures_of_its_own_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "both" / "rejected").mkdir(parents=True)
    toys.picture(0).save(tmp_path / "both" / "rejected" / "0.png")
    toys.picture(0).save(tmp_path / "sheet.png")
    assert list(settings_in([tmp_path])) == ["both"]
    assert list(settings_in([tmp_path / "both"])) == ["rejected"]

    toys.picture(0).save(tmp_path / "both" / "0.png")
    assert list(settings_in([tmp_path / "both"])) == ["both"]


def test_a_missing_or_wrong_model_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(FileError, match=r"model|directory"):
            dinov2(name)
    bare = toys.dinov2(tmp_path / "bare", preprocessing=False)
    with pytest.raises(FileError, match=r"preprocessor_config\.json"):
        dinov2(bare)
    with pytest.raises(OptionError, match="cls, patches"):
        dinov2(model, pool="mean")  # type: ignore[arg-type]
    toys.clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(OptionError, match="wanted a DINOv2"):
        dinov2(tmp_path / "clip")


def test_half_a_model_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = toys.dinov2(tmp_path / "half")
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(FileError, match="lacks weights"):
        dinov2(folder)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'loramerge\[diffusers\]'"):
        dinov2()


# ---- command line


def test_scores_on_the_command_line(study: dict[str, Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "sheet.png").write_text("not a setting")
    references = [f"--reference={name}={folder}" for name, folder in study["references"].items()]
    options = ["--model", model, "--crop", "shirt=0,0.4,1,1", "--against", "none", "--by-prompt", "--device", "cpu"]
    files = ["-o", tmp_path / "scores", "--cache", tmp_path / "cache"]

    result = RUNNER.invoke(app, list(map(str, ["score", tmp_path / "out", *references, *options, *files])))

    assert result.exit_code == 0, result.output
    assert "95 % intervals over 6 seeds" in result.output
    assert "difference from none" in result.output
    assert "32 × 32 pixels" in result.output
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())
    expected = oracle_in_python(study, model)
    assert [entry["encoder"] for entry in found] == [str(model), "32 × 32 pixels"]
    for line in found[0]["scores"]:
        wanted = expected.mean(line["setting"], line["reference"])
        assert (line["cosine"], line["cosine_low"]) == pytest.approx((wanted.mean, wanted.low), abs=1e-6)
    with (tmp_path / "scores" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["cosine"]) for row in rows] == [x["cosine"] for entry in found for x in entry["scores"]]
    images = list(csv.DictReader((tmp_path / "scores" / "images.csv").open()))
    assert len(images) == 2 * 2 * 36
    assert len(list(csv.DictReader((tmp_path / "scores" / "differences.csv").open()))) == 2 * 3 * 2


def oracle_in_python(study: dict[str, Any], model: Path) -> Scores:
    references = [
        Reference("face", study["references"]["face"]),
        Reference("shirt", study["references"]["shirt"], crop=Box(0, 0.4, 1, 1)),
    ]
    return score(study["settings"], references, dinov2(model, device="cpu"))


def test_an_encoder_of_ones_own_on_the_command_line(study: dict[str, Any]) -> None:
    folders = [str(folder) for folder in study["settings"].values()]
    face = str(study["references"]["face"])
    function = "adapters.test_scoring:colours"

    result = RUNNER.invoke(app, ["score", *folders, "-r", face, "--encoder", function, "--no-cache", "--no-pixels"])

    assert result.exit_code == 0, result.output
    assert function in result.output
    assert f"{score(**study, encoder=colours).mean('both', 'face').mean:.3f}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "-r", "face", "--crop", "hat=0,0,1,1"], "no such reference"),
        (["out", "-r", "face", "--against", "nobody"], "No setting 'nobody'"),
        (["nowhere", "-r", "face"], "No such directory"),
        (["out", "out/none", "-r", "face"], "Two settings"),
        (["out", "-r", "face", "-r", "other/face"], "given twice"),
        (["out", "-r", "face", "--encoder", "builtins:list"], "encoder builtins:list gave the shape"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    arguments: list[str], message: str, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = RUNNER.invoke(app, ["score", *arguments, "--no-cache"])

    assert result.exit_code == 1
    assert isinstance(result.exception, LoRAMergeError)
    assert message in str(result.exception)


def test_an_encoder_that_runs_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    def hungry(images: Sequence[Image.Image]) -> np.ndarray:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    toys.picture(0).save(tmp_path / "a.png")
    with pytest.raises(DeviceMemoryError, match=r"Out of memory with 1 pictures at a time.*--batch"):
        embed(Encoder(hungry, "hungry"), [tmp_path / "a.png"])
