"""The attention that words of the prompt attract, read by forward hooks while the denoiser runs.

No attention processor is replaced: queries and keys are taken from the outputs of ``to_q`` and ``to_k``, and for joint
attention of ``add_k_proj``. Only the columns of the wanted words are kept, head by head.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import OptionError
from .layouts import LAYOUTS, Grid, Layout, layout_of, levels, rotated

Maps: TypeAlias = dict[int, Tensor]
"""Attention ``(pictures, places, words)``, summed over modules and heads, by the number of places that a module sees."""

COARSE = 4
"""Latents per side of the place that attention is read at, if modules have it: fine maps are noisy."""
MOST = 2**24
"""The most numbers of an attention matrix that are computed at a time."""
FEWEST = 6
"""Places per side below which maps are too coarse."""


@contextmanager
def looking(
    model: nn.Module, passes: list[Maps], columns: Sequence[Tensor], pictures: int, grid: Grid
) -> Iterator[None]:
    """Add the attention of every pass of the denoiser to the last of some maps.

    Args:
        model: The denoiser.
        passes: The maps; whoever runs the denoiser appends an empty one before each pass.
        columns: For each pass the shares of the text's tokens, ``(pictures, tokens, words)``.
        pictures: How many rows have the prompt.
        grid: Frames, height and width of the latents, in places.
    """
    layout = layout_of(model)
    rows = slice(pictures) if layout.places_first else slice(-pictures, None)
    handles: list[Any] = []

    def add(found: "Seen", module: nn.Module) -> None:
        _add(passes, columns, found, rows, grid[0], getattr(module, "scale", found.q.shape[-1] ** -0.5))

    try:
        for name, module in model.named_modules():
            if _sees_text(module) or (layout.places_first and _is_attention(module) and layout.both.search(name)):
                handles += _watched(module, layout, grid, add)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q") and hasattr(module, "to_k")


def _sees_text(module: nn.Module) -> bool:
    joint = getattr(module, "add_k_proj", None) is not None
    return hasattr(module, "to_q") and (joint or bool(getattr(module, "is_cross_attention", False)))


@dataclass(frozen=True)
class Seen:
    """The inputs of one attention module's softmax: queries of places, and keys of words, and then of places if it has any."""

    q: Tensor
    """``(rows, places, heads, d)``."""
    k: Tensor
    """``(rows, keys, heads, d)``."""
    open: Tensor | None = None
    """False for keys that are hidden, ``(rows, keys)``."""


def _watched(module: nn.Module, layout: Layout, grid: Grid, add: Any) -> list[Any]:
    """Register the hooks of one attention module."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept[name] = output

    def done(_module: nn.Module, _args: Any, named: dict[str, Any], _output: Any) -> None:
        if "to_q" in kept:  # fused projections have no queries of their own
            add(
                _one_stream(module, kept, named, layout, grid) if layout.places_first else _seen(module, kept, named),
                module,
            )
        kept.clear()

    parts = [name for name in ("to_q", "to_k", "add_k_proj", "add_q_proj") if getattr(module, name, None) is not None]
    handles = [getattr(module, name).register_forward_hook(partial(keep, name)) for name in parts]
    return [*handles, module.register_forward_hook(done, with_kwargs=True)]


def _heads(module: Any, found: Tensor, norm: str) -> Tensor:
    """Return queries or keys, ``(rows, tokens, heads, d)``, normalised as the module does: all heads together, or each."""
    normed = getattr(module, norm, None)
    weight = getattr(normed, "weight", None)
    whole = weight is not None and weight.shape[-1] == found.shape[-1]
    found = normed(found) if normed is not None and whole else found
    found = found.reshape(*found.shape[:-1], module.heads, -1)
    return found if normed is None or whole else normed(found)


def _seen(module: Any, kept: Mapping[str, Tensor], named: Mapping[str, Any]) -> Seen:
    """Return what a module with cross-attention or joint attention computed with."""
    q, k = _heads(module, kept["to_q"], "norm_q"), _heads(module, kept["to_k"], "norm_k")
    if getattr(module, "is_cross_attention", False) or "add_k_proj" not in kept:
        return Seen(q, k)  # keys of a picture are apart from those of words
    words = _heads(module, kept["add_k_proj"], "norm_added_k")
    rotary, mask = named.get("image_rotary_emb"), named.get("encoder_hidden_states_mask")
    if rotary is not None and rotary[0].is_complex():
        q, k, words = rotated(q, rotary[0]), rotated(k, rotary[0]), rotated(words, rotary[1])
    elif rotary is not None:
        from diffusers.models.embeddings import apply_rotary_emb

        both = torch.cat([torch.cat([torch.zeros_like(words), q], 1), torch.cat([words, k], 1)])
        q, k = apply_rotary_emb(both, rotary, sequence_dim=1).chunk(2)
        q, words, k = q[:, words.shape[1] :], k[:, : words.shape[1]], k[:, words.shape[1] :]
    hidden = None if mask is None else torch.cat([mask.bool(), mask.new_ones(len(mask), k.shape[1]).bool()], 1)
    return Seen(q, torch.cat([words, k], 1), hidden)


def _one_stream(module: Any, kept: Mapping[str, Tensor], named: Mapping[str, Any], layout: Layout, grid: Grid) -> Seen:
    """Return what a module computed with whose sequence has places, 2 × 2 latents each, and then words."""
    q, k = (_heads(module, kept[f"to_{name}"], f"norm_{name}") for name in "qk")
    turns, mask = named.get("freqs_cis"), named.get("attention_mask")
    if turns is not None:
        q, k = rotated(q, turns), rotated(k, turns)
    places = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    order = torch.arange(k.shape[1], device=k.device).roll(-layout.filled(places))
    return Seen(q[:, :places], k[:, order], None if mask is None else mask.bool()[:, order])


def _add(passes: list[Maps], columns: Sequence[Tensor], seen: Seen, rows: slice, frames: int, scale: float) -> None:
    """Add one module's attention to the maps of the pass at work, head by head: all of them at once would be large."""
    wanted = columns[len(passes) - 1].float()
    count = seen.q.shape[1] // frames
    for head in range(seen.q.shape[2]):
        q, k = seen.q[rows, :, head], seen.k[rows, :, head]
        found = _looked(q, k, scale, wanted, None if seen.open is None else seen.open[rows, None])
        passes[-1][count] = passes[-1].get(count, 0) + found.reshape(len(found), frames, count, -1).mean(1)


def _looked(q: Tensor, k: Tensor, scale: float, wanted: Tensor, seen: Tensor | None) -> Tensor:
    """Return one head's attention of places to words, ``(pictures, places, words)``, some places at a time."""
    keys = k.float().transpose(1, 2)
    found, some = [], max(1, MOST // (len(k) * k.shape[1]))
    for at in range(0, q.shape[1], some):
        scores = q[:, at : at + some].float() @ keys * scale
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        found.append(scores.softmax(-1)[:, :, : wanted.shape[1]] @ wanted)
    return torch.cat(found, 1)


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


def tokens(
    pipe: Any, prompt: str, words: str, length: int | None = None, ids: Sequence[int] | None = None
) -> list[int]:
    """Return where words are among the text's tokens, every time that they occur.

    Args:
        pipe: The pipeline.
        prompt: What the picture is drawn from.
        words: A part of it.
        length: Number of tokens that the denoiser sees; all that the tokenizers can take by default.
        ids: The tokens of the text that the denoiser sees, where a template surrounds the prompt.

    Raises:
        OptionError: The prompt doesn't have them, or too late.
    """
    model = pipe.unet if getattr(pipe, "unet", None) else pipe.transformer
    if type(model).__name__ not in LAYOUTS:
        raise OptionError(f"Where the words of a {type(pipe).__name__} are isn't known. Way out: box= (--box).")
    names = layout_of(model).tokenizers
    if not names and ids is None and words in prompt:
        return [0]  # the tokens are known when the prompt is encoded
    found, start = [], 0
    for tokenizer in (getattr(pipe, name, None) for name in names):
        if tokenizer is not None:
            found += [start + i for i in _occurrences(tokenizer, prompt, words)]
            start += tokenizer.model_max_length
    if ids is not None:
        found, start = _among(list(ids), getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer), words), len(ids)
    length = start if length is None else length
    found = [i for i in found if i < length]
    if not found:
        raise OptionError(
            f"The prompt {prompt!r} doesn't have the words {words!r}{f' among the {length} tokens that the model reads' * bool(length)}. "
            "Way out: words that are in it (--words), or a place: box= (--box)."
        )
    return found


def _occurrences(tokenizer: Any, prompt: str, words: str) -> list[int]:
    return _among(tokenizer(prompt).input_ids, tokenizer, words)


def _among(have: list[int], tokenizer: Any, words: str) -> list[int]:
    """Return where words are among tokens, at the beginning of the text or behind a space."""
    found = set()
    for text in (words, f" {words}"):
        want = tokenizer(text, add_special_tokens=False).input_ids
        starts = [i for i in range(len(have) - len(want) + 1) if want and have[i : i + len(want)] == want]
        found |= {i + j for i in starts for j in range(len(want))}
    return sorted(found)
