"""The attention that words of the prompt attract, read by forward hooks while the denoiser runs.

No attention processor is replaced: queries and keys are taken from the outputs of ``to_q`` and ``to_k``, and for joint
attention of ``add_k_proj``. Only the columns of the wanted words are kept, head by head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import OptionError

Maps: TypeAlias = dict[int, Tensor]
"""Attention ``(pictures, places, words)``, summed over modules and heads, by the number of places that a module sees."""

TOKENIZERS = {
    "UNet2DConditionModel": ("tokenizer",),
    "SD3Transformer2DModel": ("tokenizer", "tokenizer_3"),
    "FluxTransformer2DModel": ("tokenizer_2",),
}
"""By class of the denoiser: the tokenizers whose tokens are the text that it sees, in order."""

COARSE = 4
"""Latents per side of the place that attention is read at, if modules have it: fine maps are noisy."""
FEWEST = 6
"""Places per side below which maps are too coarse."""


@contextmanager
def looking(model: nn.Module, passes: list[Maps], columns: Sequence[Tensor], pictures: int) -> Iterator[None]:
    """Add the attention of every pass of the denoiser to the last of some maps.

    Args:
        model: The denoiser.
        passes: The maps; whoever runs the denoiser appends an empty one before each pass.
        columns: For each pass the shares of the text's tokens, ``(pictures, tokens, words)``.
        pictures: How many of the last rows are looked at.
    """
    handles: list[Any] = []
    try:
        for module in model.modules():
            if _sees_text(module):
                handles += _watched(module, lambda q, k, m: _add(passes, columns, q[-pictures:], k[-pictures:], m))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sees_text(module: nn.Module) -> bool:
    joint = getattr(module, "add_k_proj", None) is not None
    return hasattr(module, "to_q") and (joint or bool(getattr(module, "is_cross_attention", False)))


def _watched(module: nn.Module, add: Any) -> list[Any]:
    """Register the hooks of one attention module."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept[name] = output

    def done(_module: nn.Module, _args: Any, named: dict[str, Any], _output: Any) -> None:
        if "to_q" in kept:  # fused projections have no queries of their own
            add(*_queries_and_keys(module, kept, named.get("image_rotary_emb")), module)
        kept.clear()

    parts = [name for name in ("to_q", "to_k", "add_k_proj", "add_q_proj") if getattr(module, name, None) is not None]
    handles = [getattr(module, name).register_forward_hook(partial(keep, name)) for name in parts]
    return [*handles, module.register_forward_hook(done, with_kwargs=True)]


def _queries_and_keys(module: Any, kept: dict[str, Tensor], rotary: Any) -> tuple[Tensor, Tensor]:
    """Return the queries of places, ``(rows, places, heads, d)``, and the keys: words, and then places if they have any."""

    def heads(name: str, norm: str) -> Tensor:
        found = kept[name].reshape(*kept[name].shape[:-1], module.heads, -1)
        normed = getattr(module, norm, None)
        return found if normed is None else normed(found)

    q, k = heads("to_q", "norm_q"), heads("to_k", "norm_k")
    if "add_k_proj" in kept:
        words = heads("add_k_proj", "norm_added_k")
        k = torch.cat([words, k], 1)
        if rotary is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            q = apply_rotary_emb(torch.cat([torch.zeros_like(words), q], 1), rotary, sequence_dim=1)[
                :, words.shape[1] :
            ]
            k = apply_rotary_emb(k, rotary, sequence_dim=1)
    return q, k


def _add(passes: list[Maps], columns: Sequence[Tensor], q: Tensor, k: Tensor, module: Any) -> None:
    """Add one module's attention to the maps of the pass at work."""
    wanted = columns[len(passes) - 1].float()
    scale = getattr(module, "scale", q.shape[-1] ** -0.5)
    for head in range(q.shape[2]):
        found = _looked(q[:, :, head], k[:, :, head], scale, wanted)
        passes[-1][q.shape[1]] = passes[-1].get(q.shape[1], 0) + found


def _looked(q: Tensor, k: Tensor, scale: float, wanted: Tensor) -> Tensor:
    """Return one head's attention of places to words, ``(pictures, places, words)``."""
    attention = (q.float() @ k.float().transpose(1, 2) * scale).softmax(-1)
    return attention[:, :, : wanted.shape[1]] @ wanted


def chosen(maps: Maps, height: int, width: int) -> tuple[Tensor, tuple[int, int]]:
    """Choose the maps at a quarter of the latents' side, or the nearest finer ones, with their height and width.

    Raises:
        OptionError: No module looks at the prompt.
    """
    grids = {h * w: (h, w) for h, w in levels(height, width)}
    found = sorted(n for n in maps if n in grids)
    if not found:
        raise OptionError(
            "No attention of the denoiser to the prompt can be read, so places can't be found by words. "
            "Ways out: box= (--box), or unfuse_qkv_projections() where they are fused."
        )
    wanted = [n for n in found if min(grids[n]) >= max(FEWEST, min(height, width) // COARSE)]
    place = wanted[0] if wanted else found[-1]
    return maps[place], grids[place]


def levels(height: int, width: int) -> list[tuple[int, int]]:
    """List the grids that latents of a size go through, each half of the one before, rounded up."""
    found = [(height, width)]
    while found[-1] != (1, 1):
        found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return found


def tokens(pipe: Any, prompt: str, words: str, length: int | None = None) -> list[int]:
    """Return where words are among the text's tokens, every time that they occur.

    Args:
        pipe: The pipeline.
        prompt: What the picture is drawn from.
        words: A part of it.
        length: Number of tokens that the denoiser sees; all that the tokenizers can take by default.

    Raises:
        OptionError: The prompt doesn't have them, or too late.
    """
    names = TOKENIZERS.get(type(pipe.unet if getattr(pipe, "unet", None) else pipe.transformer).__name__)
    if names is None:
        raise OptionError(f"Where the words of a {type(pipe).__name__} are isn't known. Way out: box= (--box).")
    found, start = [], 0
    for tokenizer in (getattr(pipe, name, None) for name in names):
        if tokenizer is not None:
            found += [start + i for i in _occurrences(tokenizer, prompt, words)]
            start += tokenizer.model_max_length
    length = start if length is None else length
    found = [i for i in found if i < length]
    if not found:
        raise OptionError(
            f"The prompt {prompt!r} doesn't have the words {words!r} among the {length} tokens that the model reads. "
            "Way out: words that are in it (--words), or a place: box= (--box)."
        )
    return found


def _occurrences(tokenizer: Any, prompt: str, words: str) -> list[int]:
    have = tokenizer(prompt).input_ids
    want = tokenizer(words, add_special_tokens=False).input_ids
    starts = [i for i in range(len(have) - len(want) + 1) if want and have[i : i + len(want)] == want]
    return [i + j for i in starts for j in range(len(want))]
