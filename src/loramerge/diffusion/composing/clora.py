"""CLoRA: the base and each LoRA predict, each with a prompt of its own, and thresholded attention blends them.

The authors' code (MIT) is the reference, at the commit 76def7c of their repository. Two things differ: a name's tokens count
as one, where the authors take the union of their masks, so that long names don't fill the picture; and the descent on
the latents is off unless asked for, because it brought nothing in our miniature and can ruin pictures
(docs/explanation/compose.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError
from ...merging.methods.options import NonNegative, Positive, Share
from . import attention, places
from .base import Call, composition
from .regions import blended


@composition("clora", source="Meral et al., 2024, CLoRA, https://arxiv.org/abs/2403.19776", passes="N + 1", placed=True)
def clora(
    call: Call, *, threshold: Share = 0.4, step_size: NonNegative = 0.0, until: Share = 0.5, temperature: Positive = 0.5
) -> Tensor:
    """Predict with the base and each LoRA, each told only its own words, and blend the predictions by thresholded attention.

    Args:
        call: One call of the denoiser.
        threshold: A LoRA's mask is where its words attract more attention than this share of their highest.
        step_size: How far latents move down the contrast of the maps; the authors' is 20, and 0 leaves them.
        until: Share of the steps in which latents move.
        temperature: Of the contrast, NT-Xent.
    """
    if not all(use.found_by_words for use in call.uses) or call.latents.ndim != 4:
        raise OptionError("clora finds places by words, on models with cross-attention. Ways out: blend, regions.")
    slots = range(-1, call.count)
    told = [[only(prompt, call, slot) for prompt in call.drawing.prompts] for slot in slots]
    given = [_with(call, call.encoded(prompts, slot)) for slot, prompts in zip(slots, told, strict=True)]
    columns = [
        call.columns([_said(call, i, slot) for i in range(call.count)], prompts)
        for slot, prompts in zip(slots, told, strict=True)
    ]
    shares = torch.cat([torch.zeros(1, call.count), torch.eye(call.count)])
    with call.looking(columns) as passes:
        predicted = call.each(shares, given)
    size = places.grid_of(call.given, call.latents)
    found, grids = zip(*(attention.chosen(each, *size) for each in passes), strict=True)
    maps = torch.stack(found)  # (N + 1, pictures, places, N)
    if step_size and call.progress < until:
        nudge = -step_size * _descent(call, given, columns, shares, maps, temperature)
        call.drawing.memory["nudge"] = nudge
    masks = _masks(maps, threshold)
    return blended(predicted, F.interpolate(masks.reshape(*masks.shape[:-1], *grids[0]), size, mode="nearest"), call)


def _said(call: Call, i: int, slot: int) -> str:
    """Return what the prompt of a slot calls a LoRA: its own words in its own slot, and its noun elsewhere."""
    words = call.uses[i].required()
    return words if i == slot else call.uses[i].noun or words


def only(prompt: str, call: Call, slot: int) -> str:
    """Return a prompt in which every LoRA but one is called by its noun."""
    for i, use in enumerate(call.uses):
        if i != slot and use.noun:
            prompt = prompt.replace(use.required(), use.noun)
    return prompt


def _with(call: Call, encoded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the denoiser's arguments with other prompts in the rows that have one."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old[: -len(new)], new.to(old)])

    given = dict(call.given)
    given["encoder_hidden_states"] = put(given["encoder_hidden_states"], encoded["prompt"])
    added = given.get("added_cond_kwargs") or {}
    if "text_embeds" in added:
        given["added_cond_kwargs"] = {**added, "text_embeds": put(added["text_embeds"], encoded["pooled"])}
    return given


def _masks(maps: Tensor, threshold: float) -> Tensor:
    """Return the shares of base and LoRAs, ``(pictures, N + 1, places)``: the base has what no LoRA has."""
    own = torch.stack([maps[i + 1, :, :, i] for i in range(maps.shape[-1])], 1)
    found = (own > threshold * own.amax(-1, keepdim=True)).float()
    found = torch.cat([(found.sum(1, keepdim=True) == 0).float(), found], 1)
    return found / found.sum(1, keepdim=True)


def contrast(maps: Tensor, temperature: float) -> Tensor:
    """Return NT-Xent of one picture's maps: low where a concept's maps agree and differ from the other concepts'.

    Args:
        maps: Each concept's map in each pass, ``(passes, places, concepts)``.
        temperature: Divides the cosines.
    """
    flat = maps.permute(2, 0, 1).flatten(0, 1)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    unit = F.normalize((flat - low) / (high - low + 1e-8), dim=-1)
    cosines = unit @ unit.T / temperature
    concept = torch.arange(maps.shape[2], device=maps.device).repeat_interleave(maps.shape[0])
    same = concept[:, None] == concept[None]
    others = cosines.masked_fill(same, -torch.inf).logsumexp(-1, keepdim=True)
    pairs = torch.logaddexp(cosines, others.expand_as(cosines)) - cosines
    return pairs[same & ~torch.eye(len(flat), dtype=torch.bool, device=maps.device)].mean()


def _descent(
    call: Call,
    given: Sequence[Mapping[str, Any]],
    columns: Sequence[Tensor],
    shares: Tensor,
    maps: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of the contrast by the latents, ``(pictures, …)``, one pass with gradients at a time."""
    size = places.grid_of(call.given, call.latents)
    with torch.enable_grad():
        wanted = maps.detach().requires_grad_()
        loss = torch.stack([contrast(wanted[:, i], temperature) for i in range(wanted.shape[1])]).sum()
        (pulls,) = torch.autograd.grad(loss, [wanted])
        total = torch.zeros_like(call.latents[-call.pictures :])
        for i, share in enumerate(shares):
            latents = call.latents[-call.pictures :].detach().clone().requires_grad_()
            rows = {**_rows(given[i], call), call.sample: latents}
            with call.looking([columns[i]]) as passes:
                call.together(share.to(call.weights) * call.weights, rows)
                # Blocks with gradient checkpointing run again while this is computed, so the gates must still be these.
                found = attention.chosen(passes[0], *size)[0]
                total = total + torch.autograd.grad(found, [latents], pulls[i].to(found))[0]
    return total


def _rows(given: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """Return the denoiser's arguments for the rows with a prompt only."""

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == call.rows:
            return value[-call.pictures :]
        if isinstance(value, Mapping):
            return {key: kept(each) for key, each in value.items()}
        return type(value)(map(kept, value)) if isinstance(value, tuple | list) else value

    return {name: kept(value) for name, value in given.items()}
