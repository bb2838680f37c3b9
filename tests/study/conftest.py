"""A small untrained miniature, built once."""

import pytest
from diffusers import StableDiffusionXLPipeline

from virtual_tryon import model


@pytest.fixture(scope="session")
def miniature() -> StableDiffusionXLPipeline:
    model.quiet()
    return model.build(96, captions=4_000)


@pytest.fixture(scope="session")
def folder(miniature: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory):
    return model.save(miniature, tmp_path_factory.mktemp("miniature") / "base")
