"""Everything that the README and the guides tell users to type works, and prints what they say it prints."""

import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.checkpoints.models import stored_names
from loramerge.files.architectures import ARCHITECTURES
from loramerge.testing import random_lora

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *sorted((ROOT / "docs" / "explanation").glob("*.md")),
]
FENCE = re.compile(r"^```(python|console|\w+ title=\"[\w.-]+\")\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACES = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn",
    "text_encoder.text_model.encoder.layers.0.self_attn.",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.",
)


def chosen(module: str, shape: tuple[int, ...]) -> bool:
    return module.startswith(PLACES)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    person = random_lora("sdxl", rank=4, alpha=2, dtype="float16", seed=1, only=chosen)
    jersey = random_lora("sdxl", rank=8, seed=2, only=chosen)
    lm.save(person, folder / "person.safetensors", dialect="kohya")
    lm.save(jersey, folder / "jersey.safetensors", dialect="diffusers-peft")
    base_model(folder / "sdxl.safetensors")
    (folder / "run").mkdir()
    for step in (500, 1000, 1500, 2000):
        checkpoint = random_lora("sdxl", rank=4, alpha=2, dtype="float16", seed=step, only=chosen)
        lm.save(checkpoint, folder / f"run/person-step{step:08d}.safetensors", dialect="kohya")
    return folder


FILES = {
    "wan-style": "wan21-t2v-14b__musubi",
    "wan-lightning": "wan21-t2v-14b__lightx2v",
    "wan-lokr": "wan21-t2v-1.3b__simpletuner-lokr",
    "wan-small": "wan21-t2v-1.3b__musubi",
    "qwen-style": "qwen-image__musubi",
    "qwen-lightning": "qwen-image__lightning",
    "flux-style": "flux1__sdscripts",
    "kontext": "flux1__onetrainer-comfy",
    "klein-ai-toolkit": "flux2-klein-4b__aitoolkit",
    "klein-musubi": "flux2-klein-4b__musubi",
    "zimage-musubi": "z-image__musubi",
    "zimage-pipe": "z-image__diffusion-pipe",
}
"""Files of the guides, each with the listing of a tool's file."""


@pytest.fixture(scope="session")
def files_of_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first block of each file."""
    listings = json.loads(lzma.decompress((ROOT / "tests" / "data" / "families.json.xz").read_bytes()))
    folder = tmp_path_factory.mktemp("tools")
    rng = np.random.default_rng(0)
    for name, listing in FILES.items():
        keys = {
            k: shape for k, (_, shape) in listings[listing]["keys"].items() if re.search(r"(blocks|layers)[._]0[._]", k)
        }
        tensors = {
            key: (0.02 * rng.standard_normal(shape, dtype=np.float32)).astype(np.float16) if shape else np.float16(2)
            for key, shape in keys.items()
        }
        save_file(
            {k: np.asarray(v) for k, v in tensors.items()},
            folder / f"{name}.safetensors",
            listings[listing]["metadata"],
        )
    return folder


def base_model(path: Path) -> None:
    """A part of an SDXL file: the weights that the LoRAs change."""
    sdxl = ARCHITECTURES["sdxl"]
    begins = (
        "model.diffusion_model.",
        "conditioner.embedders.0.transformer.text_model",
        "conditioner.embedders.1.model.",
    )
    values = (0.02 * np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)).astype(np.float16)
    tensors = {}
    for name, parts in stored_names(sdxl).items():
        if name.startswith(begins) and parts[0].module.startswith(PLACES):
            rows = sum(sdxl.shapes[part.module][0] for part in parts)
            shape = (rows, *sdxl.shapes[parts[0].module][1:])
            end = "_weight" if name.endswith("in_proj") else ".weight"
            tensors[name + end] = values[: rows * shape[1]].reshape(shape)
    save_file(tensors, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_they_show(
    page: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page.stem == "compare":  # it draws a heat map
        pytest.importorskip("matplotlib")
    more = request.getfixturevalue("files_of_tools").iterdir() if page.stem == "families" else ()
    for sample in (*samples.iterdir(), *more):
        copy = shutil.copytree if sample.is_dir() else shutil.copyfile
        copy(sample, tmp_path / sample.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}

    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
        elif "title=" in language:
            (tmp_path / language.split('"')[1]).write_text(text, encoding="utf-8")
        else:
            run_console(text)


def run_console(text: str) -> None:
    for command, shown in sessions(text):
        words = [word for typed in shlex.split(command) for word in sorted(glob(typed)) or [typed]]
        if words[0] != "loramerge":
            continue
        done = subprocess.run([sys.executable, "-X", "utf8", "-m", *words], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        check_shown(command, shown, done.stdout)


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the lines of output below it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


def check_shown(command: str, shown: list[str], printed: str) -> None:
    """Every line shown is printed, in order; '…' stands for anything, alone for lines left out."""
    left = iter(printed.splitlines())
    for line in shown:
        if line.strip() not in ("", "…"):
            wanted = re.compile(".*".join(re.escape(part) for part in line.rstrip().split("…")))
            found = any(wanted.fullmatch(given.rstrip()) for given in left)
            assert found, f"$ {command}\ndoes not print the line\n{line}\nbut\n{printed}"
