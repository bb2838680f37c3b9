"""Compositions by place: each LoRA where its words attract attention, or where a box or a mask says."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ...learned.attach import Gates
from ...merging.methods.options import NonNegative, Share
from . import attention, places
from .base import Call, composition
from .layouts import layout_of

INERTIA = 0.7
"""Share of the earlier steps in the maps: those of a single step are noisy."""
WARM = 0.3
"""Share of the steps after which words have attracted attention to the right places."""


@composition(
    "blend",
    source="after Meral et al., CLoRA, section 3.3, https://arxiv.org/abs/2403.19776; shares and soft masks are ours",
    passes="N",
    placed=True,
)
def blend(call: Call, *, others: NonNegative = 1.0, hard: bool = False) -> Tensor:
    """Predict with each LoRA, the others at a share, and blend the predictions where each LoRA's words attract attention.

    Args:
        call: One call of the denoiser.
        others: Weight of the other LoRAs in each LoRA's prediction, in units of 1/N: 0 separates the LoRAs,
            N gives each of them the sum.
        hard: Give each place to one LoRA only.
    """
    shares = torch.full((call.count, call.count), others / call.count).fill_diagonal_(1.0)
    found = Regions(call)
    with found.looking():
        predicted = call.each(shares)
    return blended(predicted, found.blending(hard), call)


@composition(
    "composite", source="Zhong et al., 2024, Multi-LoRA Composition, https://arxiv.org/abs/2402.16843", passes="N"
)
def composite(call: Call) -> Tensor:
    """Predict with each LoRA alone, and take the mean of the predictions."""
    return call.each(torch.eye(call.count)).mean(0)


@composition(
    "regions",
    source="after Liu et al., FreeFuse, https://arxiv.org/abs/2510.23515, and Dalva et al., LoRAShop, "
    "https://arxiv.org/abs/2505.23758; soft masks are ours",
    passes="1",
    placed=True,
)
def regions(call: Call, *, hard: bool = False, warm: Share = WARM) -> Tensor:
    """Run all LoRAs in one pass, each of them only in its own part of the picture and not on the words of others.

    Args:
        call: One call of the denoiser.
        hard: Give each place to one LoRA only.
        warm: Share of the steps in which LoRAs without a box or a mask act everywhere, since the picture has no
            places yet; of three LoRAs or more they act at 1/N of their weight then.  Afterwards they keep out of the
            others' boxes and masks.
    """
    found = Regions(call)
    masks, weights, words = None, call.weights, None
    if call.progress >= warm or not found.by_words:
        masks, words = found.acting(hard), found.words()
    if masks is None:
        masks = found.warming()
        weights = weights / torch.where(found.worded, call.count if call.count > 2 else 1, 1)
    gates: Gates | Tensor = (
        weights if masks is None else places.gates(masks, weights, words, call.rows, found.grid, layout_of(call.model))
    )
    with found.looking():
        return call.together(gates)


class Regions:
    """The part of the picture that belongs to each LoRA, in one call of the denoiser."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.grid = call.grid
        self.size = self.grid[1:]
        self.given: list[Tensor | None] = call.once(
            f"masks {self.size[0]} × {self.size[1]}",
            lambda: [places.drawn(use.box, use.mask, self.size) for use in call.uses],
        )
        self.worded = torch.tensor([mask is None for mask in self.given], device=call.latents.device)
        """True for each LoRA that its words find."""
        self.by_words = bool(self.worded.any())
        # A pipeline may call the denoiser several times per step: the first time with the prompt.
        first = call.drawing.calls == 0
        self.columns: Tensor | None = call.once("columns", call.columns) if self.by_words and first else None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Remember the attention that each LoRA's words attract inside the block, in the LoRA's own pass if there is one."""
        if self.columns is None:
            yield
            return
        with self.call.looking([self.columns] * self.call.count) as passes:
            yield
        found = [attention.chosen(maps, *self.size) for maps in passes]
        maps = torch.stack([found[min(i, len(found) - 1)][0][..., i] for i in range(self.call.count)], 1)
        self.call.remember("attention", maps.reshape(*maps.shape[:-1], *found[0][1]), INERTIA)

    def attracted(self) -> Tensor:
        """Return each LoRA's place, ``(pictures, N, h, w)``: 1 where its words attract most attention, or in its box."""
        maps: Tensor | None = self.call.drawing.memory.get("attention")
        if maps is None:
            return places.stacked(self.given, self.call.latents.float()).expand(self.call.pictures, -1, -1, -1)
        scaled = maps / maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        for i, mask in enumerate(self.given):
            if mask is not None:
                scaled[:, i] = F.interpolate(mask.to(scaled)[None, None], scaled.shape[-2:], mode="area")[0]
        return scaled

    def acting(self, hard: bool) -> Tensor | None:
        """Return masks in which LoRAs act in one pass, ``(pictures, N, h, w)``; None before any attention was read."""
        if self.by_words and "attention" not in self.call.drawing.memory:
            return None
        found = self.attracted()
        if hard:
            return _hard(found)
        worded = self.worded[:, None, None]
        total = (found * worded).sum(1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        beside = 1 - (found * ~worded).amax(1, keepdim=True)
        return torch.where(worded, beside * found / total, found)

    def warming(self) -> Tensor | None:
        """Return masks for the first steps: boxes and masks as they are, and everywhere for the others; None for all."""
        if self.worded.all():
            return None
        masks = places.stacked(self.given, self.call.latents.float())
        return torch.where(self.worded[:, None, None], 1.0, masks).expand(self.call.pictures, -1, -1, -1)

    def blending(self, hard: bool) -> Tensor:
        """Return shares of predictions that add up to 1 over the LoRAs, ``(pictures, N, h, w)``."""
        found = self.attracted()
        found = _hard(found) if hard else found**2 if self.by_words else found
        found = F.interpolate(found, self.size, mode="nearest" if hard else "bilinear")
        found = torch.where(found.sum(1, keepdim=True) > 0, found, 1.0)  # places outside of all boxes belong to all
        return found / found.sum(1, keepdim=True)

    def words(self) -> Tensor | None:
        """Return factors for the words of the prompt, ``(pictures, tokens, N)``: 0 for a LoRA at the words of others."""
        if self.columns is None:
            return None
        mine = self.columns > 0
        return (~(mine.any(-1, keepdim=True) & ~mine)).to(self.call.weights)


def _hard(found: Tensor) -> Tensor:
    """Return 1 for the LoRA with the largest value at each place, and 0 for all where there is none."""
    return F.one_hot(found.argmax(1), found.shape[1]).movedim(-1, 1).to(found) * (found.amax(1, keepdim=True) > 0)


def blended(predicted: Tensor, shares: Tensor, call: Call) -> Tensor:
    """Return the sum of predictions at their shares.

    Args:
        predicted: ``(N, rows, …)``.
        shares: ``(pictures, N, h, w)``, the same for all rows of a picture.
        call: The call that they are for.
    """
    shares = shares.repeat(call.rows // len(shares), 1, 1, 1).movedim(1, 0).to(predicted)
    if predicted.ndim == 4:  # (N, rows, places, channels)
        return (predicted * shares.flatten(2)[..., None]).sum(0)
    axes = (1,) * (predicted.ndim - 4)  # channels, and frames if there are any
    return (predicted * shares.reshape(*shares.shape[:2], *axes, *shares.shape[2:])).sum(0)
