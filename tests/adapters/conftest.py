"""A model that commands take."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.pipeline("sdxl").save_pretrained(folder)
    return folder
