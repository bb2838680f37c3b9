"""Make LoRAs and base models of any size with random values, a tensor at a time: the file never is in memory.

    python benchmarks/made.py lora FILE flux --rank 64 --modules blocks
    python benchmarks/made.py base FILE_OR_FOLDER sdxl

Shapes are those of the family; ``--narrow 16`` divides every width by 16.  Of LoRAs of two ranks and more, ``up`` falls
from column to column, so that a smaller rank keeps most of ΔW.  A base is one file under the names of the model's own
code, or a folder in diffusers' layout whose files are cut into shards; it has the weights of all matrices and kernels
without embeddings.
"""

import argparse
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import loramerge as lm
import loras
from loramerge.checkpoints.models import stored_names
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.storage.writer import write
from loramerge.layers import LowRank
from loramerge.tensors import Array, Shape, Spec, cast, parse_dtype
from loramerge.testing import everything, random_layer

MODULES = {**loras.PATTERNS, "blocks": re.compile(r"(unet|transformer)\..*blocks?\..*")}
SDXL = ("model.diffusion_model.", "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.")
SHARD = 4 << 30
"""The most bytes in a shard at full width."""


def main() -> None:
    given = _arguments()
    if given.path.exists():
        return
    if given.what == "base" and given.path.suffix == ".safetensors":
        write(given.path, [Weight(key, shape) for key, shape in _own_names(given).items()], {})
    elif given.what == "base":
        _folder(given)
    else:
        lm.save(_lora(given), given.path, dialect=given.to)


def _lora(given: argparse.Namespace) -> lm.LoRA:
    """Return a LoRA whose plain layers are made when they are asked for."""
    shapes = dict(list(_chosen(given).items())[:: given.every])
    seeds = {module: zlib.crc32(f"{given.seed} {module}".encode()) for module in shapes}
    names = {"name": "made", "architecture": given.family, "dialect": given.to}
    if given.kind != "lora":
        options = {"kind": given.kind, "rank": given.rank, "dtype": given.dtype}
        return lm.LoRA(**names, layouts={m: random_layer(s, seed=seeds[m], **options) for m, s in shapes.items()})
    dtype = parse_dtype(given.dtype)
    layouts = {
        m: LowRank(down=Spec((given.rank, columns), dtype), up=Spec((rows, given.rank), dtype))
        for m, (rows, columns) in shapes.items()
    }
    return lm.LoRA(**names, layouts=layouts, compute=lambda m: _low_rank(layouts[m], seeds[m]))


def _low_rank(layout: LowRank, seed: int) -> LowRank:
    up = values(layout.up, seed + 1, falling=True)
    return LowRank(down=values(layout.down, seed), up=up)


def _chosen(given: argparse.Namespace) -> dict[str, Shape]:
    pattern = MODULES[given.modules]
    return {m: shape for m, shape in _shapes(given).items() if len(shape) == 2 and pattern.fullmatch(m)}


def _shapes(given: argparse.Namespace) -> dict[str, Shape]:
    """Return all matrices and kernels without embeddings, at the width asked for."""
    shapes = {m: shape for m, shape in ARCHITECTURES[given.family].shapes.items() if everything(m, shape)}
    return {m: (_narrow(s[0], given.narrow), _narrow(s[1], given.narrow), *s[2:]) for m, s in shapes.items()}


def _narrow(size: int, by: int) -> int:
    return max(size // by, min(size, 4))


def values(spec: Spec, seed: int, *, falling: bool = False) -> Array:
    """Return normal values of a shape and dtype, falling from column to column if asked."""
    made = np.random.default_rng(seed).standard_normal(spec.shape, dtype=np.float32)
    made /= math.sqrt(math.prod(spec.shape[1:]))
    return cast(made / np.arange(1, spec.shape[1] + 1, dtype=np.float32) if falling else made, spec.dtype)


@dataclass(frozen=True)
class Weight:
    """One tensor of a base model, as a group that the writer takes."""

    key: str
    shape: Shape

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {self.key: Spec(self.shape, "F16")}

    def arrays(self) -> Mapping[str, Array]:
        return {key: values(spec, zlib.crc32(key.encode())) for key, spec in self.specs.items()}


def _own_names(given: argparse.Namespace) -> dict[str, Shape]:
    """Return the keys and shapes of a single file: SDXL's code fuses the q, k and v of a text encoder."""
    shapes, keys = _shapes(given), {}
    for name, parts in stored_names(ARCHITECTURES[given.family]).items():
        if name.startswith(SDXL) and parts[0].module in shapes and not name.endswith("text_projection"):
            rows = sum(shapes[part.module][0] for part in parts)
            end = "_weight" if name.endswith("in_proj") else ".weight"
            keys[name + end] = (rows, *shapes[parts[0].module][1:])
    return keys


def _folder(given: argparse.Namespace) -> None:
    """Write a folder in diffusers' layout, the files of each component in shards with their index."""
    shapes = _shapes(given)
    for component in dict.fromkeys(module.partition(".")[0] for module in shapes):
        place = given.path / component
        place.mkdir(parents=True)
        weights = [
            Weight(module.partition(".")[2] + ".weight", shape)
            for module, shape in shapes.items()
            if module.startswith(f"{component}.")
        ]
        _shards(place, "model" if "text" in component else "diffusion_pytorch_model", weights, SHARD // given.narrow**2)
    (given.path / "model_index.json").write_text("{}")


def _shards(place: Path, stem: str, weights: list[Weight], most: int) -> None:
    size, shards = 0, dict[int, list[Weight]]()
    for weight in weights:
        shards.setdefault(size // most, []).append(weight)
        size += 2 * math.prod(weight.shape)
    held: dict[str, str] = {}
    for i, part in shards.items():
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write(place / name, part, {})
        held |= dict.fromkeys((weight.key for weight in part), name)
    index = {"metadata": {"total_size": size}, "weight_map": held}
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a LoRA or a base model of random values, unless it is there.")
    parser.add_argument("what", choices=["lora", "base"])
    parser.add_argument("path", type=Path)
    parser.add_argument("family", choices=list(ARCHITECTURES))
    parser.add_argument("--narrow", type=int, default=1, help="divide every width by this")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", choices=MODULES, default="blocks")
    parser.add_argument("--every", type=int, default=1, help="take one module of so many")
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--to", default="kohya", help="the dialect")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
