"""The differences between model families: how prompts are encoded and how the denoiser is called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..files.architectures import ARCHITECTURES, Kin

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
    kin: Kin
    """The families of the LoRAs that fit it."""
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    """Encodes prompts into conditions."""
    call: Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]
    """Calls the denoiser and returns its prediction."""
    place: Callable[[Sequence[Size]], dict[str, Tensor]] = lambda sizes: {}
    """Returns the conditions that say how each example was cropped out of its picture."""
    flow: bool = False
    """True for a rectified flow from data to noise, False for a diffusion."""
    guidance: float
    """Scale of the classifier-free guidance that pictures are usually made with; 1 for none."""
    packed: bool = False
    """True if the denoiser takes 2 × 2 latents as one token."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names of the families of the LoRAs that fit it."""
        return tuple(a.name for a in ARCHITECTURES.values() if a.kin is self.kin)


def _sd_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    return {"prompt": pipe.encode_prompt(prompts, device, 1, False)[0]}


def _sd_call(model: nn.Module, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    found: Tensor = model(sample, timestep, given["prompt"], return_dict=False)[0]
    return found


def _sdxl_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"prompt": found[0], "pooled": found[2]}


def _sdxl_call(model: nn.Module, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    found: Tensor = model(sample, timestep, given["prompt"], added_cond_kwargs=added, return_dict=False)[0]
    return found


def _sdxl_place(sizes: Sequence[Size]) -> dict[str, Tensor]:
    """Return original size, crop and target size: section 2.2 of the SDXL paper."""
    return {"time_ids": torch.tensor([[*size, *corner, side, side] for size, corner, side in sizes], dtype=torch.float)}


def _sd3_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompts, prompts, prompts, device=device, do_classifier_free_guidance=False)
    return {"prompt": found[0], "pooled": found[2]}


def _sd3_call(model: nn.Module, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    found: Tensor = model(
        hidden_states=sample,
        timestep=timestep,
        encoder_hidden_states=given["prompt"],
        pooled_projections=given["pooled"],
        return_dict=False,
    )[0]
    return found


def _flux_encode(pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(prompts, prompts, device=device)
    return {"prompt": embeds, "pooled": pooled}


def _flux_call(model: Any, sample: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    guidance = torch.full((len(sample),), FLUX_GUIDANCE, device=sample.device) if model.config.guidance_embeds else None
    side = int(sample.shape[1] ** 0.5)
    where = torch.zeros(side, side, 3, device=sample.device, dtype=sample.dtype)
    where[..., 1] = torch.arange(side)[:, None]
    where[..., 2] = torch.arange(side)[None, :]
    found: Tensor = model(
        hidden_states=sample,
        timestep=timestep / 1000,
        guidance=guidance,
        encoder_hidden_states=given["prompt"],
        pooled_projections=given["pooled"],
        txt_ids=torch.zeros(given["prompt"].shape[1], 3, device=sample.device, dtype=sample.dtype),
        img_ids=where.reshape(-1, 3),
        return_dict=False,
    )[0]
    return found


FLUX_GUIDANCE = 3.5
"""The guidance that FLUX.1 [dev] takes as an input, in sampling and here."""

FAMILIES = (
    Family(
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        kin=Kin.SDXL,
        encode=_sdxl_encode,
        call=_sdxl_call,
        place=_sdxl_place,
        guidance=5.0,
    ),
    Family(
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        kin=Kin.SD,
        encode=_sd_encode,
        call=_sd_call,
        guidance=7.5,
    ),
    Family(
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="transformer",
        kin=Kin.SD3,
        encode=_sd3_encode,
        call=_sd3_call,
        flow=True,
        guidance=5.0,
    ),
    Family(
        pipelines=("FluxPipeline",),
        denoiser="transformer",
        kin=Kin.FLUX,
        encode=_flux_encode,
        call=_flux_call,
        flow=True,
        guidance=1.0,
        packed=True,
    ),
)


def family_of(pipe: Any) -> Family:
    """Find the family of a pipeline.

    Raises:
        OptionError: LoRAs can't be learned on it here.
    """
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise OptionError(
        f"The base model is a {name}; wanted {known}. For another model give loramerge.learned the model as a function."
    )
