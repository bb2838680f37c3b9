"""The differences between model families: how prompts are encoded and how the denoiser is called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import OptionError
from ..files.architectures import ARCHITECTURES, Kin
from ..files.architectures.calls import FlowCall
from . import flows

Conditions: TypeAlias = Mapping[str, Tensor]
"""The denoiser's inputs besides latents and timestep; the first axis is the batch."""

Size: TypeAlias = tuple[tuple[int, int], tuple[int, int], int]
"""Height and width of a picture, top and left of its square, and the square's side."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of pipeline."""

    pipelines: tuple[str, ...]
    """Class names."""
    denoiser: str
    architectures: tuple[str, ...]
    """Names of the families of the LoRAs that fit it."""
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    """Encodes prompts into conditions."""
    call: Callable[[Any, Tensor, Tensor, Conditions], Tensor]
    """Calls a pipeline's denoiser and returns its prediction."""
    place: Callable[[Sequence[Size]], dict[str, Tensor]] = lambda sizes: {}
    """Returns the conditions that say how each example was cropped out of its picture."""
    flow: FlowCall | None = None
    """The call of a rectified flow from data to noise; None for a diffusion."""
    guidance: float
    """Scale of the classifier-free guidance that pictures are usually made with; 1 for none."""


def _sd_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    return {"prompt": pipe.encode_prompt(prompts, device, 1, False)[0]}


def _sd_call(pipe: Any, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    found: Tensor = pipe.unet(sample, timestep, given["prompt"], return_dict=False)[0]
    return found


def _sdxl_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"prompt": found[0], "pooled": found[2]}


def _sdxl_call(pipe: Any, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    found: Tensor = pipe.unet(sample, timestep, given["prompt"], added_cond_kwargs=added, return_dict=False)[0]
    return found


def _sdxl_place(sizes: Sequence[Size]) -> dict[str, Tensor]:
    """Return original size, crop and target size: section 2.2 of the SDXL paper."""
    return {"time_ids": torch.tensor([[*size, *corner, side, side] for size, corner, side in sizes], dtype=torch.float)}


def _of(kin: Kin) -> tuple[str, ...]:
    return tuple(a.name for a in ARCHITECTURES.values() if a.kin is kin)


def _flow(flow: FlowCall) -> Family:
    return Family(
        pipelines=flow.pipelines,
        denoiser="transformer",
        architectures=tuple(a.name for a in ARCHITECTURES.values() if a.flow is flow),
        encode=partial(flows.encode, flow),
        call=partial(flows.call, flow),
        flow=flow,
        guidance=flow.guidance,
    )


FAMILIES = (
    Family(
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        architectures=_of(Kin.SDXL),
        encode=_sdxl_encode,
        call=_sdxl_call,
        place=_sdxl_place,
        guidance=5.0,
    ),
    Family(
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        architectures=_of(Kin.SD),
        encode=_sd_encode,
        call=_sd_call,
        guidance=7.5,
    ),
    *map(_flow, dict.fromkeys(a.flow for a in ARCHITECTURES.values() if a.flow)),
)


def family_of(pipe: Any) -> Family:
    """Find the family of a pipeline.

    Raises:
        OptionError: LoRAs can't be learned on it here.
    """
    name = type(pipe).__name__
    found = next((family for family in FAMILIES if name in family.pipelines), None)
    if found is None:
        known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
        raise OptionError(
            f"The base model is a {name}; wanted {known}. For another model give loramerge.learned the model as a function."
        )
    check_single(pipe)
    return found


def check_single(pipe: Any) -> None:
    """Refuse a pipeline with two denoisers, one for much noise and one for little: each has LoRAs of its own.

    Raises:
        OptionError: It has two.
    """
    name = type(pipe).__name__
    if getattr(pipe, "transformer_2", None) is not None:
        raise OptionError(
            f"This {name} has two denoisers, transformer and transformer_2, each with LoRAs of its own. Way out: one at a "
            f"time, in Python: {name}.from_pretrained(BASE, transformer_2=None, boundary_ratio=None) for the LoRAs of much "
            "noise; for those of little noise also transformer=whole.transformer_2, of the pipeline loaded whole."
        )
