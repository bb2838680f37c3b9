"""Architectures: the module names and weight shapes of each model family, as data.

The names inside loramerge are diffusers'; ``native`` says how the model's own code
(stability's sgm, Black Forest Labs' flux …) names, orders and fuses the same weights.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from ..registry import Registry
from ..tensors import Shape
from . import flux, sd3, sgm
from .names import Parts, whole


@cache
def model(name: str) -> Mapping[str, Shape]:
    """Module names and weight shapes of one model, in the order in which it registers them."""
    with open(os.path.join(os.path.dirname(__file__), "models", f"{name}.json"), "rb") as file:
        data = json.loads(file.read())
    return {module: tuple(shape) for module, shape in data.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """One text encoder of a family, and what the tools call it."""

    component: str
    """``text_encoder``, ``text_encoder_2`` …: the attribute of diffusers' pipeline."""
    model: str
    kohya: str
    """Its number in kohya's prefix: ``lora_te<number>_``."""
    comfyui: str
    """Its name in ComfyUI, also OMI's for the CLIPs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A model family that LoRAs are made for."""

    name: str
    title: str
    denoiser: str
    """``"unet"`` or ``"transformer"``."""
    model: str
    text_encoders: tuple[TextEncoder, ...]
    native: Callable[[Mapping[str, Shape]], Mapping[str, Parts]]
    """The denoiser's own names, each with the modules that it holds."""
    kohya_uses_diffusers_names: bool = False
    """sd-scripts trains SD 1 and 2 on diffusers' UNet, and later families on their own code."""
    within: str | None = None
    """The larger family of which this is a distilled part: the same names, fewer of them."""
    hints: tuple[str, ...] = field(default=())
    """Beginnings of ``modelspec.architecture`` or ``ss_base_model_version`` that mean this family."""

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Weight shape of every module, ``component.path``."""
        modules = {f"{self.denoiser}.{path}": shape for path, shape in model(self.model).items()}
        for encoder in self.text_encoders:
            modules |= {f"{encoder.component}.{path}": shape for path, shape in model(encoder.model).items()}
        return modules

    @cached_property
    def denoiser_paths(self) -> Mapping[str, Parts]:
        """diffusers' path of each module of the denoiser."""
        return {path: whole(f"{self.denoiser}.{path}") for path in model(self.model)}

    @cached_property
    def native_paths(self) -> Mapping[str, Parts]:
        """The native path of each weight of the denoiser."""
        return self.native(model(self.model))

    def text_paths(self, encoder: TextEncoder) -> Mapping[str, Parts]:
        return {path: whole(f"{encoder.component}.{path}") for path in model(encoder.model)}


def _same(modules: Mapping[str, Shape]) -> Mapping[str, Parts]:
    return {path: whole(f"transformer.{path}") for path in modules}


CLIP_L = TextEncoder(component="text_encoder", model="clip-l", kohya="1", comfyui="clip_l")
CLIP_G = TextEncoder(component="text_encoder_2", model="clip-g", kohya="2", comfyui="clip_g")
SD3_TEXT = (
    TextEncoder(component="text_encoder", model="clip-l-projection", kohya="1", comfyui="clip_l"),
    CLIP_G,
    TextEncoder(component="text_encoder_3", model="t5-xxl", kohya="3", comfyui="t5xxl"),
)

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    [
        Architecture(
            name="sdxl",
            title="Stable Diffusion XL",
            denoiser="unet",
            model="unet-sdxl",
            text_encoders=(CLIP_L, CLIP_G),
            native=sgm.native,
            hints=("stable-diffusion-xl-v1-base", "sdxl_base"),
        ),
        Architecture(
            name="sd15",
            title="Stable Diffusion 1.x",
            denoiser="unet",
            model="unet-sd15",
            text_encoders=(TextEncoder(component="text_encoder", model="clip-l", kohya="", comfyui="clip_l"),),
            native=sgm.native,
            kohya_uses_diffusers_names=True,
            hints=("stable-diffusion-v1", "sd_v1", "sd_1"),
        ),
        Architecture(
            name="flux",
            title="FLUX.1",
            denoiser="transformer",
            model="transformer-flux",
            text_encoders=(
                CLIP_L,
                TextEncoder(component="text_encoder_2", model="t5-xxl", kohya="3", comfyui="t5xxl"),
            ),
            native=flux.native,
            hints=("flux",),
        ),
        Architecture(
            name="sd3-medium",
            title="Stable Diffusion 3 Medium",
            denoiser="transformer",
            model="transformer-sd3-medium",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=("stable-diffusion-3-medium", "stable-diffusion-v3-m"),
        ),
        Architecture(
            name="sd3.5-medium",
            title="Stable Diffusion 3.5 Medium",
            denoiser="transformer",
            model="transformer-sd35-medium",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=("stable-diffusion-3.5-medium", "stable-diffusion-v3.5-m"),
        ),
        Architecture(
            name="sd3.5-large",
            title="Stable Diffusion 3.5 Large",
            denoiser="transformer",
            model="transformer-sd35-large",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=("stable-diffusion-3.5-large", "stable-diffusion-v3.5-l"),
        ),
        Architecture(
            name="sd21",
            title="Stable Diffusion 2.x",
            denoiser="unet",
            model="unet-sd21",
            text_encoders=(TextEncoder(component="text_encoder", model="clip-h", kohya="", comfyui="clip_h"),),
            native=sgm.native,
            kohya_uses_diffusers_names=True,
            hints=("stable-diffusion-v2", "sd_v2", "sd_2"),
        ),
        Architecture(
            name="sdxl-refiner",
            title="Stable Diffusion XL refiner",
            denoiser="unet",
            model="unet-sdxl-refiner",
            text_encoders=(TextEncoder(component="text_encoder_2", model="clip-g", kohya="", comfyui="clip_g"),),
            native=sgm.native,
            hints=("stable-diffusion-xl-v1-refiner", "sdxl_refiner"),
        ),
        Architecture(
            name="ssd-1b",
            title="Segmind SSD-1B",
            denoiser="unet",
            model="unet-ssd-1b",
            text_encoders=(CLIP_L, CLIP_G),
            native=sgm.native,
            within="sdxl",
        ),
        Architecture(
            name="segmind-vega",
            title="Segmind Vega",
            denoiser="unet",
            model="unet-segmind-vega",
            text_encoders=(CLIP_L, CLIP_G),
            native=sgm.native,
            within="sdxl",
        ),
        Architecture(
            name="qwen-image",
            title="Qwen-Image",
            denoiser="transformer",
            model="transformer-qwen-image",
            text_encoders=(),
            native=_same,
            hints=("qwen-image", "qwen_image"),
        ),
    ],
    aliases={
        "sd1": "sd15",
        "sd1.5": "sd15",
        "sd2": "sd21",
        "sd2.1": "sd21",
        "sd3": "sd3-medium",
        "sd35-medium": "sd3.5-medium",
        "sd35-large": "sd3.5-large",
        "flux.1": "flux",
        "flux-dev": "flux",
        "vega": "segmind-vega",
        "qwen": "qwen-image",
    },
)
"""Commonest first: where several fit, the first is taken."""

NAME_FAMILY = "name the model family (--architecture sdxl; in Python open(…, architecture='sdxl'))"
"""The way out where a file leaves its family open."""
