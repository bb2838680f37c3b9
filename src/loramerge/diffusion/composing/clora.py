"""CLoRA: the base and each LoRA predict, each with a prompt of its own, and thresholded attention blends them.

The authors' code (MIT) is the reference, at the commit 76def7c of their repository. As there, each token of a name has
a mask of its own, which are united, and a vector of its own in the contrast. The descent on the latents is off unless
asked for, because it brought nothing in our miniature and can ruin pictures (docs/explanation/compose.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError
from ...merging.methods.options import NonNegative, Positive, Share
from . import attention
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
    given, columns = call.once("prompts of clora", lambda: _told(call))
    given = [_with(call, encoded) for encoded in given]
    shares = torch.cat([torch.zeros(1, call.count), torch.eye(call.count)])
    with call.looking(columns) as passes:
        predicted = call.each(shares, given)
    size = call.grid[1:]
    found, grids = zip(*(attention.chosen(each, *size) for each in passes), strict=True)
    maps = torch.stack(found)
    maps = maps.reshape(*maps.shape[:-1], call.count, -1)
    if step_size and call.progress < until:
        nudge = -step_size * _descent(call, given, columns, shares, maps, temperature)
        call.drawing.memory["nudge"] = nudge
    masks = _masks(maps, threshold)
    return blended(predicted, F.interpolate(masks.reshape(*masks.shape[:-1], *grids[0]), size, mode="nearest"), call)


def _told(call: Call) -> tuple[list[Mapping[str, Tensor]], list[Tensor]]:
    """Return each pass's prompts, encoded, and the tokens of each LoRA's words there, ``(pictures, tokens, N · most)``."""
    slots = range(-1, call.count)
    told = [[only(prompt, call, slot) for prompt in call.drawing.prompts] for slot in slots]
    pieces = [
        call.pieces([_said(call, i, slot) for i in range(call.count)], prompts)
        for slot, prompts in zip(slots, told, strict=True)
    ]
    most = max(each.shape[-1] for each in pieces)
    columns = [F.pad(each, (0, most - each.shape[-1])).flatten(2) for each in pieces]
    return [call.encoded(prompts, slot) for slot, prompts in zip(slots, told, strict=True)], columns


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
    """Return the shares of base and LoRAs, ``(pictures, N + 1, places)``: the base has what no LoRA has.

    Args:
        maps: Attention, ``(N + 1, pictures, places, N, most)``; zeros where a name has fewer tokens than most.
        threshold: Share of a token's highest attention.
    """
    own = torch.stack([maps[i + 1, :, :, i] for i in range(maps.shape[3])], 1)
    found = (own > threshold * own.amax(2, keepdim=True)).any(-1).float()
    found = torch.cat([(found.sum(1, keepdim=True) == 0).float(), found], 1)
    return found / found.sum(1, keepdim=True)


def contrast(vectors: Tensor, concept: Tensor, temperature: float) -> Tensor:
    """Return NT-Xent: low where the vectors of a concept agree and differ from those of the other concepts.

    Args:
        vectors: ``(count, n)``.
        concept: The number of each one's concept, ``(count,)``.
        temperature: Divides the cosines.
    """
    unit = F.normalize(vectors, dim=-1)
    cosines = unit @ unit.T / temperature
    same = concept[:, None] == concept[None]
    others = cosines.masked_fill(same, -torch.inf).logsumexp(-1, keepdim=True)
    pairs = torch.logaddexp(cosines, others.expand_as(cosines)) - cosines
    return pairs[same & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)].mean()


def _contrasts(maps: Tensor, temperature: float) -> Tensor:
    """Return the sum over pictures of the contrast of the maps of all tokens in all passes, each spread over [0, 1]."""
    total = maps.new_zeros(())
    for picture in maps.unbind(1):
        flat = picture.permute(2, 0, 3, 1)  # (N, N + 1, most, places)
        there = flat.amax(-1) > 0
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        concept = torch.arange(len(flat), device=maps.device)[:, None, None].expand_as(there)
        total = total + contrast(((flat - low) / (high - low + 1e-8))[there], concept[there], temperature)
    return total


def _descent(
    call: Call,
    given: Sequence[Mapping[str, Any]],
    columns: Sequence[Tensor],
    shares: Tensor,
    maps: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of the contrast by the latents, ``(pictures, …)``, one pass with gradients at a time."""
    size = call.grid[1:]
    with torch.enable_grad():
        wanted = maps.detach().requires_grad_()
        (pulls,) = torch.autograd.grad(_contrasts(wanted, temperature), [wanted])
        total = torch.zeros_like(call.latents[-call.pictures :])
        for i, share in enumerate(shares):
            latents = call.latents[-call.pictures :].detach().clone().requires_grad_()
            rows = {**_rows(given[i], call), call.sample: latents}
            with call.looking([columns[i]]) as passes:
                call.together(share.to(call.weights) * call.weights, rows)
                # Blocks with gradient checkpointing run again while this is computed, so the gates must still be these.
                found = attention.chosen(passes[0], *size)[0]
                total = total + torch.autograd.grad(found, [latents], pulls[i].flatten(2).to(found))[0]
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
