"""Make synthetic LoRAs with the module shapes of SDXL, from a seed.

``attn`` has the attention projections of the UNet, which diffusers' training script adapts;
``kohya`` every linear layer inside the UNet's transformers and the text encoders' layers, as
sd-scripts does; ``widest`` a single layer, the largest there is.  ``down`` lies near the uniform start that trainers use; ``up`` gives ΔW a
spectrum σₖ ∝ k^-p exp(-k / 0.6r), with a fifth of its energy in directions that all files share.

    python benchmarks/loras.py FOLDER attn 8 --count 2
"""

import argparse
import math
import re
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import loramerge as lm
from loramerge.files.architectures import ARCHITECTURES
from loramerge.layers import LowRank
from loramerge.tensors import Shape

ATTENTION = re.compile(r"unet\..*\.attn[12]\.to_(q|k|v|out\.0)")
TRANSFORMERS = re.compile(r"unet\..*\.attentions\..*|text_encoder.*\.layers\..*")
WIDEST = re.compile(r"unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.ff\.net\.0\.proj")
PATTERNS = {"attn": ATTENTION, "kohya": TRANSFORMERS, "widest": WIDEST}
DIALECTS = {"attn": "diffusers-peft", "kohya": "kohya", "widest": "diffusers-peft"}


def modules(variant: str) -> dict[str, Shape]:
    """Return names and weight shapes of the modules that a variant's trainer adapts."""
    pattern = PATTERNS[variant]
    shapes = ARCHITECTURES["sdxl"].shapes
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and pattern.fullmatch(name)}


def layer(module: str, shape: Shape, rank: int, seed: int) -> LowRank:
    """Make one module's layer; it depends on the arguments only."""
    own, common = _random(module, rank, seed), _random(module, rank, "common")
    rows, columns = shape
    directions = math.sqrt(0.8) * _normal(own, rows, rank) + math.sqrt(0.2) * _normal(common, rows, rank)
    rotation = np.linalg.qr(_normal(own, rank, rank))[0]
    up = (directions * _spectrum(own, rank)) @ rotation / math.sqrt(rows)
    bound = 1 / math.sqrt(columns)
    start = own.uniform(-bound, bound, (rank, columns)).astype(np.float32)
    down = start + 0.2 * bound * _normal(own, rank, columns)
    return LowRank(up=up.astype(np.float16), down=down.astype(np.float16))


def _spectrum(random: np.random.Generator, rank: int) -> NDArray[np.float32]:
    k = np.arange(1, rank + 1)
    sigma = k ** -random.uniform(0.6, 1.2) * np.exp(-k / (0.6 * rank))
    norm = random.lognormal(0.0, 0.4)
    return (norm * sigma / np.linalg.norm(sigma)).astype(np.float32)


def _normal(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    return random.standard_normal((rows, columns), dtype=np.float32)


def _random(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def write(path: Path, variant: str, rank: int, seed: int) -> None:
    """Make one file, unless it is there."""
    if path.exists():
        return
    layouts = {name: layer(name, shape, rank, seed) for name, shape in modules(variant).items()}
    dialect = DIALECTS[variant]
    lora = lm.LoRA(name=path.stem, architecture="sdxl", dialect=dialect, layouts=layouts)
    lm.save(lora, path, dialect=dialect)


def path(folder: Path, variant: str, rank: int, seed: int) -> Path:
    return folder / f"{variant}-r{rank}-{seed}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic LoRAs with the module shapes of SDXL.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("variant", choices=DIALECTS)
    parser.add_argument("rank", type=int)
    parser.add_argument("--count", type=int, default=2)
    given = parser.parse_args()
    for seed in range(given.count):
        write(path(given.folder, given.variant, given.rank, seed), given.variant, given.rank, seed)


if __name__ == "__main__":
    main()
