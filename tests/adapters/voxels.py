"""Persons in outfits, drawn by DiceBear's voxel-art (CC0): pip install dicebear-core dicebear-styles resvg-py."""

import io
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

PERSON = {"topVariant": ["bob"], "hairColor": ["#3fb27f"], "skinColor": ["#95562f"]}
JERSEY = {"outfitVariant": ["stripes"], "shirtColor": ["#c2255c"], "jacketColor": ["#1c3a8c"]}


@cache
def style() -> Any:
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath("voxel-art.json").read_text("utf-8")))


def drawn(seed: int, options: Mapping[str, Any], side: int = 224) -> Image.Image:
    """A person; what the options leave open is random by the seed."""
    import resvg_py
    from dicebear import Avatar

    chosen = {"seed": str(seed), "topProbability": 100, "animationVariant": ["none"], **options}
    svg = Avatar(style(), chosen).to_string()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGB")


def folder(path: Path, seeds: range, options: Mapping[str, Any]) -> Path:
    path.mkdir(parents=True)
    for seed in seeds:
        drawn(seed, options).save(path / f"person-{seed}.png")
    return path
