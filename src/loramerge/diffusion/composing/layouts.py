"""The layout of the words and the places that a denoiser sees, by its class."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError

Grid = tuple[int, int, int]
"""Frames, height and width of the latents, in places."""

WORDS = re.compile(
    r"(?<!\.attn2)\.add_[qkv]_proj$|_context\b|\.to_add_out$|\.context_embedder$"
    r"|\.txt_(in|mlp|mod)\b|\.text_embedder\.|\.context_refiner\."
)
"""Modules of a stream of the prompt's words alone."""
CROSS = re.compile(r"\.attn2\.to_[kv]$")
"""Modules of attention to the words, where a block's second attention is that."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One denoiser's layout."""

    tokenizers: tuple[str, ...] = ()
    """The tokenizers whose tokens are the text that it sees, in order; none where a template surrounds the prompt, so
    that the tokens are those which the text encoder was given."""
    cross: bool = True
    """True if a block's second attention is to the words; False if it is the picture's to itself."""
    both: re.Pattern[str] = re.compile(r"\bsingle_transformer_blocks\b")
    """Modules that see the words and the places in one sequence."""
    places_first: bool = False
    """True if places are before the words there, and rows with the prompt before those without."""
    multiple: int = 1
    """Words and places are each filled up to a multiple of this."""

    def sees_words(self, module: str) -> bool:
        """Return whether a module sees the words of the prompt, and no places."""
        return bool(WORDS.search(module) or (self.cross and CROSS.search(module)))

    def filled(self, count: int) -> int:
        """Return the length of a sequence that has a number of places."""
        return count + -count % self.multiple


LAYOUTS: Mapping[str, Layout] = {
    "UNet2DConditionModel": Layout(tokenizers=("tokenizer",)),
    "SD3Transformer2DModel": Layout(tokenizers=("tokenizer", "tokenizer_3"), cross=False),
    "FluxTransformer2DModel": Layout(tokenizers=("tokenizer_2",)),
    "WanTransformer3DModel": Layout(tokenizers=("tokenizer",)),
    "QwenImageTransformer2DModel": Layout(),
    "Flux2Transformer2DModel": Layout(),
    "ZImageTransformer2DModel": Layout(both=re.compile(r"\blayers\.\d{1,9}\."), places_first=True, multiple=32),
}


def layout_of(model: Any) -> Layout:
    """Return a denoiser's layout; that of FLUX for a class that isn't known."""
    return LAYOUTS.get(type(model).__name__, Layout())


def grid_of(given: Mapping[str, Any], latents: Tensor) -> Grid:
    """Return frames, height and width of the latents, in places.

    Packed latents have their rows and columns in ``img_ids`` or ``img_shapes``.

    Raises:
        OptionError: They have neither, or there are other pictures among them.
    """
    if latents.ndim > 3:
        return latents.shape[2] if latents.ndim == 5 else 1, latents.shape[-2], latents.shape[-1]
    if (ids := given.get("img_ids")) is not None:
        ids = ids.reshape(-1, ids.shape[-1])
        grid = 1, int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    elif (shapes := given.get("img_shapes")) is not None:
        frames, height, width = map(int, shapes[0][0])
        grid = frames, height, width
    else:
        raise OptionError("The denoiser's latents have no height and width, so compositions by place don't work on it.")
    if math.prod(grid) != latents.shape[1]:
        raise OptionError(
            f"The denoiser sees {latents.shape[1]} places, and the picture has {' × '.join(map(str, grid[1:]))}: compositions "
            "by place don't work beside reference images. Ways out: schedule, switch, composite."
        )
    return grid


def levels(height: int, width: int) -> list[tuple[int, int]]:
    """List the grids that latents of a size go through, each half of the one before, rounded up."""
    found = [(height, width)]
    while found[-1] != (1, 1):
        found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return found


def text_of(given: Mapping[str, Any]) -> int:
    """Return the number of tokens of the longest text that a denoiser is given."""
    text = given["encoder_hidden_states"] if "encoder_hidden_states" in given else given["cap_feats"]
    return max(map(len, text)) if isinstance(text, list) else int(text.shape[1])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Return queries or keys ``(rows, tokens, heads, d)`` turned by complex numbers, ``(…, tokens, d / 2)``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(3).to(x)
