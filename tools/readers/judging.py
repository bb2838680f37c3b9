"""Compare a reader's result with the file, weight by weight."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import loramerge as lm
from loramerge import LoRA
from loramerge.files.architectures import Architecture
from loramerge.files.architectures.names import Part, Parts, flat, whole
from loramerge.files.dialects import DIALECTS
from loramerge.testing import random_layer

COLUMNS = 4
"""Only the first columns of every ΔW are compared: all that readers move or cut are rows."""

DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_linear_layer.down.weight", ".lora.down.weight")
NO_LAYERS = re.compile(
    r"_table$|_tokens?$|pos_embed$|pos_embed\.pos_embed$|positional_encoding$|pos_frequencies$|ff_i\.gate$"
)
"""Weights that no LoRA is made for: they are no layer's."""

BLOCKS = re.compile(r"^(unet|transformer|prior)\.(\w*blocks|layers|\w+_refiner)\.\d")

Changes = Mapping[str, torch.Tensor]
"""The first columns of the change of each weight, by the reader's own path of it, with underscores for dots."""


class Verdict(NamedTuple):
    """The share of a file that a reader takes."""

    taken: int
    modules: int
    lost: str
    """The groups of modules that it doesn't take, or the error it stops with."""


def dialects() -> list[str]:
    """Return the dialects that are written as one file."""
    return [d.name for d in DIALECTS.values() if d.writes and d.name != "peft"]


def is_layer(module: str, shape: tuple[int, ...]) -> bool:
    """Return whether LoRAs are made for a module; PEFT makes none for kernels of one channel each."""
    return len(shape) > 1 and not NO_LAYERS.search(module) and not (len(shape) == 4 and shape[1] == 1)


@cache
def lora_of(a: Architecture, part: str = "all") -> LoRA:
    """Make a LoRA of rank 1 on every layer of a denoiser, on its matrices, or on those of its blocks."""
    shapes = {m: s for m, s in a.shapes.items() if is_layer(m, s) and not m.startswith("text_encoder")}
    if part != "all":
        shapes = {m: s for m, s in shapes.items() if len(s) == 2 and (part == "matrices" or BLOCKS.search(m))}
    layers = {m: random_layer(s, rank=1, seed=zlib.crc32(m.encode())) for m, s in shapes.items()}
    return LoRA(name=a.name, architecture=a.name, dialect="diffusers-peft", layouts=layers)


def written(a: Architecture, dialect: str, folder: Path, part: str = "all") -> Path | None:
    """Write that LoRA, or return None if the dialect has no names for the family."""
    try:
        return lm.save(lora_of(a, part), folder / f"{dialect}-{part}.safetensors", dialect=dialect)
    except lm.errors.DialectError:
        return None


def narrow(tensors: Mapping[str, torch.Tensor], kernels: bool) -> dict[str, torch.Tensor]:
    """Keep the first columns of every ``down``: every ΔW then has only these, and costs little.

    Args:
        tensors: A file's.
        kernels: True to do so with kernels too, as matrices.
    """

    def cut(down: torch.Tensor) -> torch.Tensor:
        return down.flatten(1)[:, :COLUMNS].contiguous() if kernels or down.ndim == 2 else down

    return {key: cut(value) if key.endswith(DOWN) else value for key, value in tensors.items()}


def product(up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the first columns of a layer's ΔW."""
    return scale * up.detach().float().flatten(1) @ down.detach().float().flatten(1)[:, :COLUMNS]


def places(a: Architecture) -> Mapping[str, Parts]:
    """Return the modules of each weight by all of its paths, with underscores for dots."""
    beside = {f"{b.component}.{path}": whole(f"{b.component}.{path}") for b in a.beside for path in a.text_paths(b)}
    paths = {**a.other_paths, **a.native_paths, **beside}
    return {flat(path): parts for path, parts in paths.items()}


def judge(a: Architecture, paths: Iterable[str], found: Changes) -> Verdict:
    """Count the modules whose whole change a reader makes, of those that its model has.

    Args:
        a: The family.
        paths: The paths of the layers of the reader's model, with underscores for dots.
        found: What it changes.
    """
    lora, homes, got = lora_of(a), places(a), dict[str, list[torch.Tensor]]()
    for path, change in found.items():
        for part, rows in _parted(homes.get(path, ()), change):
            got.setdefault(part.module, []).append(rows)
    modules = [m for m in dict.fromkeys(part.module for path in paths for part in homes.get(path, ())) if m in lora]
    missed = [m for m in modules if not any(bool(rows.any()) for rows in got.get(m, ()))]
    wrong = [m for m in modules if m not in missed and not _is_right(lora, m, got[m])]
    lost = [_groups(modules, missed)] * bool(missed) + [f"wrong: {_groups(modules, wrong)}"] * bool(wrong)
    return Verdict(len(modules) - len(missed) - len(wrong), len(modules), "; ".join(lost))


def _parted(parts: Parts, change: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    rows, columns = [part.rows or ((0, len(change)),) for part in parts], change.flatten(1)[:, :COLUMNS]
    return [(p, torch.cat([columns[i:j] for i, j in r])) for p, r in zip(parts, rows, strict=True)]


def _is_right(lora: LoRA, module: str, changes: list[torch.Tensor]) -> bool:
    up, down = (torch.from_numpy(np.asarray(factor)) for factor in lora[module].factors())
    total, wanted = torch.stack(changes).sum(0), product(up, down)
    return total.shape == wanted.shape and bool((total - wanted).abs().max() < 1e-3 * wanted.abs().max())


def _groups(every: list[str], modules: list[str]) -> str:
    """Name the groups that modules are of: as few as name them all, without the blocks' numbers."""
    if len(modules) == len(every):
        return "all"
    wholes, parts = Counter(map(_top, every)), Counter(map(_group, every))
    lost, tops = Counter(map(_group, modules)), Counter(map(_top, modules))
    named = [
        top if tops[top] == wholes[top] else group
        for top, group in dict.fromkeys((_top(m), _group(m)) for m in modules)
    ]
    return ", ".join(
        name if name in wholes or lost[name] == parts[name] else f"{name} ({lost[name]} of {parts[name]})"
        for name in dict.fromkeys(named)
    )


def _top(module: str) -> str:
    return module.split(".")[1]


def _group(module: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", module.partition(".")[2])


def zeros(rows: int, shape: Sequence[int]) -> torch.Tensor:
    """Return a weight of zeros for a ΔW of `narrow`, with the shape but the rows and columns."""
    return torch.zeros(rows, *(shape[1:] if len(shape) > 2 else [min(shape[1], COLUMNS)]))
