"""The recipe for conda and the image of Docker follow pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import loramerge

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def recipe() -> dict:
    return yaml.safe_load((ROOT / "integrations" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))


def test_conda_needs_what_pip_needs(recipe: dict) -> None:
    python, *packages = recipe["requirements"]["run"]
    least = recipe["context"]["python_min"]

    assert python == "python >=${{ python_min }}"
    assert f">={least}" == PROJECT["requires-python"]
    assert [name.replace(" ", "") for name in packages] == PROJECT["dependencies"]


def test_conda_builds_this_version_with_these_commands(recipe: dict) -> None:
    (script,) = recipe["build"]["python"]["entry_points"]

    assert recipe["context"]["version"] == loramerge.__version__
    assert dict([script.split(" = ")]) == PROJECT["scripts"]
    assert recipe["about"]["summary"] == PROJECT["description"]
    assert recipe["about"]["license"] == PROJECT["license"]


def test_the_image_is_given_what_a_wheel_is_built_from() -> None:
    folder = ROOT / "integrations" / "docker"
    copied = re.findall(r"^COPY (.+) \S+$", (folder / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    given = {line[1:] for line in (folder / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}

    assert {name for line in copied for name in line.split()} == given
    assert given >= {"src", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
