"""The core's commands do all of their work where torch can't be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import loramerge as lm
from loramerge.testing import random_layer
from models import base, single_file

WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'array_api_compat', 'diffusers', 'matplotlib')));"
    "from loramerge.cli import main; main()"
)


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core")
    for seed, name in enumerate(("a", "b")):
        weights = base("sdxl", seed=seed)
        shapes = {
            key.removesuffix(".weight"): w.shape for key, w in weights.items() if key.endswith("attn1.to_q.weight")
        }
        layers = {module: random_layer(shape, rank=2, seed=seed) for module, shape in shapes.items()}
        lora = lm.LoRA(name=name, architecture="sdxl", dialect="kohya", layouts=layers)
        lm.save(lora, folder / f"{name}.safetensors")
        single_file(folder / f"model-{name}.safetensors", "sdxl", weights)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "inspect a.safetensors --norms",
        "convert a.safetensors --to comfyui -o out.safetensors",
        "merge a.safetensors b.safetensors -o out.safetensors",
        "merge a.safetensors b.safetensors -o out.safetensors --rank 4 --method ties",
        "resize a.safetensors -o out.safetensors --max-error 10%",
        "compare a.safetensors b.safetensors",
        "diff a.safetensors a.safetensors",
        "bake a.safetensors -b model-a.safetensors -o out.safetensors",
        "extract model-a.safetensors -b model-b.safetensors -o out.safetensors --rank 4",
        "dialects",
        "methods",
        "doctor",
    ],
)
def test_the_core_needs_no_torch(command: str, folder: Path) -> None:
    done = run(folder, *command.split())

    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("merge a.safetensors b.safetensors -o out.safetensors --device cpu", "loramerge[torch]"),
        ("inspect a.bin --allow-pickle", "loramerge[torch]"),
        ("compare a.safetensors b.safetensors --heatmap map.png", "loramerge[plots]"),
        ("generate -b model -p words -o out --lora a.safetensors", "loramerge[diffusers]"),
        ("zip a.safetensors b.safetensors -b model -p one -p two -o out.safetensors", "loramerge[diffusers]"),
        ("calibrate a.safetensors b.safetensors -b model -p one -p two -o out.safetensors", "loramerge[diffusers]"),
    ],
)
def test_what_needs_more_names_the_extra(command: str, needs: str, folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"")

    done = run(folder, *command.split())

    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"pip install '{needs}'" in done.stderr, done.stderr
