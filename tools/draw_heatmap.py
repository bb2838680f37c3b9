"""Draw the heat map of ``docs/how-to/compare.md``.

The two LoRAs are made up: the second takes over part of the first's spaces, more of them the
deeper a block lies, and turns what is done there.  Run it when the drawing changes:

    python tools/draw_heatmap.py

It writes ``docs/how-to/compare.png``.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from loramerge import compare
from loramerge.comparing.advising import advice
from loramerge.comparing.plots import save_heatmap
from loramerge.files.architectures.blocks import block
from loramerge.layers import Layer
from loramerge.testing import random_lora

OUT = Path(__file__).parents[1] / "docs/how-to/compare.png"
SHARED = {"IN07": 0.2, "IN08": 0.3, "MID": 0.4, "OUT00": 0.9, "OUT01": 0.6}
"""Part of the rank that both LoRAs spend on the same spaces, by block."""


def chosen(module: str, shape: tuple[int, ...]) -> bool:
    text = module.startswith("text_encoder.") and "layers.0.self_attn" in module
    return text or (module.startswith("unet") and "transformer_blocks.0.attn" in module)


def related(module: str, first: Layer, second: Layer) -> Layer:
    """Return the second layer with some of its directions taken from the spaces of the first."""
    up, down = (np.array(x) for x in second.factors())
    count = round(SHARED.get(block(module, "sdxl"), 0.0) * up.shape[1])
    rng = np.random.default_rng(zlib.crc32(module.encode()))
    turn = np.linalg.qr(rng.standard_normal((count, count)))[0] - 0.5 * np.eye(count)
    up[:, :count], down[:count] = first.factors()[0][:, :count] @ turn, first.factors()[1][:count]
    return replace(second, up=up.astype(np.float32), down=down.astype(np.float32))


def main() -> None:
    person = random_lora("sdxl", rank=16, seed=1, only=chosen, name="person.safetensors")
    jersey = random_lora("sdxl", rank=16, seed=2, only=chosen, name="jersey.safetensors")
    unet = {m: related(m, person[m], layer) for m, layer in jersey.items() if m.startswith("unet")}
    found = compare([person, replace(jersey, layouts=unet)])
    print(save_heatmap(found, OUT), advice(found), sep="\n")


if __name__ == "__main__":
    main()
