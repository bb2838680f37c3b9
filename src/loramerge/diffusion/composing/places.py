"""Where LoRAs act: masks of the picture as weights of each module's rows, places and words."""

import os
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError
from ...files.storage.paths import path_of
from ...learned.attach import Gates, Site
from ...scoring.pictures import Box, read
from .layouts import Grid, Layout, levels

UNPLACED = re.compile(r"\.attn2\.add_[kv]_proj$|\.image_embedder\.|\.cap_embedder\.")
"""Modules that see neither the places nor the words one by one: an image as a prompt, or all rows' words in one."""
FLAT = re.compile(r"\.all_x_embedder\.")
"""Modules that see the places of all rows in one."""


def everywhere(weights: Tensor) -> Gates:
    """Return gates that are the same in every row and place."""
    return lambda _module, site, _x: weights if site.convolution is None else weights[None, :, None, None]


def gates(masks: Tensor, weights: Tensor, words: Tensor | None, rows: int, grid: Grid, layout: Layout) -> Gates:
    """Return gates that confine each LoRA to its mask.

    Args:
        masks: In [0, 1], ``(pictures, N, h, w)``.
        weights: The LoRAs' weights, ``(N,)``.
        words: Factors for the words of the prompt, ``(pictures, tokens, N)``; None for 1.
        rows: Rows of the batch, several per picture with guidance.
        grid: Frames, height and width of the latents, in places.
        layout: What the denoiser's modules see.
    """
    repeats = rows // len(masks)
    masks = masks.repeat(repeats, 1, 1, 1)
    texts = None
    if words is not None:  # they aren't those of the rows without the prompt
        others = [torch.ones_like(words)] * (repeats - 1)
        texts = torch.cat([words, *others] if layout.places_first else [*others, words])
    counts = [(grid[0] * h * w, (h, w)) for h, w in reversed(levels(*grid[1:]))]
    grids = {layout.filled(count): size for count, size in counts} | dict(counts)

    def at(size: tuple[int, int]) -> Tensor:
        return F.interpolate(masks, size, mode="area")

    def places(module: str, count: int) -> Tensor:
        if count not in grids:
            frames = f"{grid[0]} × " if grid[0] > 1 else ""
            raise OptionError(
                f"{module} sees {count} places, which isn't a grid of latents {frames}{grid[1]} × {grid[2]}."
            )
        return fitted(at(grids[count]).flatten(2).transpose(1, 2).repeat(1, grid[0], 1), count)

    def fitted(found: Tensor | None, count: int) -> Tensor:
        """Factors of 1 for what is beyond the words or places, such as padding."""
        found = masks.new_ones(len(masks), 0, len(weights)) if found is None else found[:, :count]
        return F.pad(found, (0, 0, 0, count - found.shape[1]), value=1.0)

    def gate(module: str, site: Site, x: Tensor) -> Tensor:
        if site.convolution is not None:
            return at(_output(site, x)) * weights[:, None, None]
        if FLAT.search(module):
            raise OptionError(
                f"{module} sees all pictures in one, so no part of them. Way out: lora.exclude({module!r})."
            )
        if x.ndim == 2 or UNPLACED.search(module):  # of the time step, and the same for all places
            return weights
        if layout.sees_words(module):
            return fitted(texts, x.shape[1]) * weights
        if layout.both.search(module):
            count = layout.filled(grid[0] * grid[1] * grid[2] // (4 if layout.places_first else 1))
            both = [fitted(texts, x.shape[1] - count), places(module, count)]
            return torch.cat(both[::-1] if layout.places_first else both, 1) * weights
        return places(module, x.shape[1]) * weights

    return gate


def _output(site: Site, x: Tensor) -> tuple[int, int]:
    """Return height and width of a convolution's output."""
    step, pad, spread = (site.convolution[key] for key in ("stride", "padding", "dilation"))  # type: ignore[index]
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, s, p, d, k in zip(x.shape[-2:], step, pad, spread, site.shape[-2:], strict=True)
    ]
    return sides[0], sides[1]


def drawn(box: Box | None, mask: str | os.PathLike[str] | None, size: tuple[int, int]) -> Tensor | None:
    """Return a LoRA's mask as the user gave it, ``(h, w)``, or None if its words are to find it."""
    if box is None:
        return None if mask is None else _picture(mask, size)
    inside = [
        _inside(low, high, side)
        for low, high, side in zip((box.top, box.left), (box.bottom, box.right), size, strict=True)
    ]
    found = inside[0][:, None] * inside[1][None, :]
    return found if mask is None else found * _picture(mask, size)


def _inside(low: float, high: float, side: int) -> Tensor:
    """Return the share of each of a side's cells that lies between two bounds."""
    edges = torch.arange(side + 1) / side
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * side).clamp(max=1)


def _picture(path: str | os.PathLike[str], size: tuple[int, int]) -> Tensor:
    import numpy as np

    values = np.asarray(read(path_of(path)).convert("L"), np.float32) / 255
    return F.interpolate(torch.from_numpy(values)[None, None], size, mode="area")[0, 0]


def stacked(masks: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return masks ``(1, N, h, w)``, zeros where there is none."""
    h, w = next(mask.shape for mask in masks if mask is not None)
    return torch.stack([torch.zeros(h, w) if mask is None else mask for mask in masks]).to(like)[None]
