"""Architectures: the module names and weight shapes of each model family, as data.

The names inside loramerge are diffusers'; ``native`` says how the model's own code
(stability's sgm, Black Forest Labs' flux …) names, orders and fuses the same weights.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

from ...registry import Registry
from ...tensors import Shape
from . import auraflow, cosmos, flux, flux2, hunyuan, krea, ltx, lumina, mochi, pixart, sd3, sgm, wan
from .names import Naming, Part, Parts, flat, same, whole


@cache
def model(name: str) -> Mapping[str, Shape]:
    """Read the module names and weight shapes of one model, in the order in which it registers them."""
    with open(os.path.join(os.path.dirname(__file__), "models", f"{name}.json"), "rb") as file:
        data = json.loads(file.read())
    return {module: tuple(shape) for module, shape in data.items()}


class Outline(NamedTuple):
    """A summary of a denoiser's paths, kept as data so that recognition needn't build them."""

    own: list[str]
    """First names of diffusers' paths."""
    others: list[str]
    """First names of the paths of other code."""
    last: dict[str, int]
    """The largest number that follows each name in the paths: the last of its blocks."""


@cache
def outlines() -> Mapping[str, Outline]:
    """Read the outline of each family."""
    with open(os.path.join(os.path.dirname(__file__), "outlines.json"), "rb") as file:
        return {name: Outline(*parts) for name, parts in json.loads(file.read()).items()}


def last_numbers(paths: Iterable[str]) -> dict[str, int]:
    """Return the largest number that follows each name in paths with underscores for dots."""
    last: dict[str, int] = {}
    for path in paths:
        for name, number in NUMBERED.findall(path):
            last[name] = max(last.get(name, 0), int(number))
    return last


def _heads(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.partition(".")[0] for path in paths))


NUMBERED = re.compile(r"(?<![a-z])([a-z][a-z_]*)_(\d{1,4})(?=_|$)")
"""A name and the number of a block behind it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """One text encoder of a family, and the tools' names of it."""

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
    denoiser: str = "transformer"
    """``"unet"`` or ``"transformer"``."""
    model: str
    text_encoders: tuple[TextEncoder, ...] = ()
    native: Naming | None = same
    """The denoiser's own names, each with the modules that it holds; None if they aren't listed yet."""
    also_native: tuple[Naming, ...] = ()
    """Other names of the denoiser that files have: read, never written."""
    also: tuple[str, ...] = ()
    """Prefixes of native paths that the model has besides the listed ones."""
    kohya_uses_diffusers_names: bool = False
    """True for SD 1 and 2, which sd-scripts trains on diffusers' UNet; it trains later families on their own code."""
    within: str | None = None
    """The larger family that this one was distilled from: it has a part of that family's names."""
    hints: tuple[str, ...] = field(default=())
    """Words of ``modelspec.architecture`` or ``ss_base_model_version`` that mean this family, see `hints.named`."""

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Weight shape of every module, by ``component.path``."""
        modules = {f"{self.denoiser}.{path}": shape for path, shape in model(self.model).items()}
        for encoder in self.text_encoders:
            modules |= {f"{encoder.component}.{path}": shape for path, shape in model(encoder.model).items()}
        return modules

    @cached_property
    def denoiser_paths(self) -> Mapping[str, Parts]:
        """The denoiser's modules by diffusers' path."""
        return {path: whole(f"{self.denoiser}.{path}") for path in model(self.model)}

    @cached_property
    def native_paths(self) -> Mapping[str, Parts]:
        """The denoiser's modules by the native path of the weight that holds them."""
        return self.native(model(self.model)) if self.native else {}

    @cached_property
    def other_paths(self) -> Mapping[str, Parts]:
        """The same by the paths of all other code, without `native_paths`: read, never written."""
        also = {path: parts for naming in self.also_native for path, parts in naming(model(self.model)).items()}
        return {path: parts for path, parts in {**self.denoiser_paths, **also}.items() if path not in self.native_paths}

    def outlined(self) -> Outline:
        """Compute the outline that ``outlines.json`` keeps."""
        others = {**self.native_paths, **self.other_paths}
        return Outline(
            _heads(self.denoiser_paths),
            _heads(others),
            last_numbers(map(flat, (*self.denoiser_paths, *others))),
        )

    @property
    def outline(self) -> Outline:
        """A summary of the denoiser's paths, read from ``outlines.json``."""
        return outlines()[self.name]

    def text_paths(self, encoder: TextEncoder) -> Mapping[str, Parts]:
        """Return a text encoder's modules by path."""
        return {path: whole(f"{encoder.component}.{path}") for path in model(encoder.model)}


CLIP_L = TextEncoder(component="text_encoder", model="clip-l", kohya="1", comfyui="clip_l")
CLIP_G = TextEncoder(component="text_encoder_2", model="clip-g", kohya="2", comfyui="clip_g")
SD3_TEXT = (
    TextEncoder(component="text_encoder", model="clip-l-projection", kohya="1", comfyui="clip_l"),
    CLIP_G,
    TextEncoder(component="text_encoder_3", model="t5-xxl", kohya="3", comfyui="t5xxl"),
)

SD3_HINTS = ("sd3", "sd3m", "stable-diffusion-3", "stable-diffusion-v3")


def _sd3(version: str, size: str) -> tuple[str, ...]:
    """List the names that tools have for one size of Stable Diffusion 3."""
    names = [f"{start}{version}" for start in ("sd", "stable-diffusion-", "stable-diffusion-v", "stable-diffusion-3-")]
    return (*(f"{name}-{end}" for name in names for end in (size, size[0])), *[f"{version}-{size}"] * ("-" in version))


def _dit(name: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a family whose LoRAs train the transformer alone."""
    return Architecture(**{"name": name, "title": title, "model": f"transformer-{name}", "hints": hints} | options)


_FLUX2 = ("flux2", "flux-2", "flux-2-klein", "flux2-klein")
_HUNYUAN = {"native": hunyuan.comfyui, "also_native": (hunyuan.tencent,)}

OTHERS = (
    _dit("z-image", "Z-Image", "z-image", "zimage", also_native=(lumina.z_image,)),
    _dit("krea2", "Krea 2", "krea-2", "krea2", native=krea.native),
    _dit(
        "anima", "Anima", "anima", model="transformer-cosmos-predict2-2b", native=cosmos.native, also=("llm_adapter.",)
    ),
    _dit("wan-14b", "Wan 2.1 and 2.2, 14B", "wan", "skyreels", native=wan.native),
    _dit("wan-1.3b", "Wan 2.1, 1.3B", "wan", "skyreels", native=wan.native),
    _dit("wan-5b", "Wan 2.2, 5B", "wan", native=wan.native),
    _dit("flux2-dev", "FLUX.2 dev", *_FLUX2[:2], "flux2-dev", "flux-2-dev", native=flux2.native),
    _dit("flux2-klein-4b", "FLUX.2 klein 4B", *_FLUX2, "flux-2-klein-4b", "flux2-klein-4b", native=flux2.native),
    _dit("flux2-klein-9b", "FLUX.2 klein 9B", *_FLUX2, "flux-2-klein-9b", "flux2-klein-9b", native=flux2.native),
    _dit("hunyuanvideo", "HunyuanVideo", "hunyuan-video", "hunyuanvideo", "framepack", **_HUNYUAN),
    _dit(
        "hunyuanvideo15",
        "HunyuanVideo 1.5",
        *("hunyuan-video-1-5", "hunyuanvideo-1-5", "hunyuanvideo15"),
        native=hunyuan.comfyui,
        also_native=(hunyuan.split,),
    ),
    _dit("chroma", "Chroma", "chroma", native=flux.chroma),
    _dit("ltx2", "LTX-2", "ltx2", "ltx-2", "ltxv2", native=ltx.native),
    _dit("ltxv-2b", "LTX-Video 2B", "ltxv", "ltx-video", native=ltx.native),
    _dit("ltxv-13b", "LTX-Video 13B", "ltxv", "ltx-video", native=ltx.native),
    _dit("hidream", "HiDream-I1", "hidream"),
    _dit("lumina2", "Lumina 2", "lumina-2", "lumina2", "lumina-image-2", native=lumina.lumina2),
    _dit("hunyuanimage", "HunyuanImage 2.1", "hunyuan-image", "hunyuanimage", **_HUNYUAN),
    _dit("auraflow", "AuraFlow, Pony V7", "auraflow", "aura-flow", "pony-v7", "pony7", native=auraflow.native),
    _dit("ernie-image", "ERNIE-Image", "ernie"),
    _dit("cogvideox-2b", "CogVideoX 2B", "cogvideox", "cogvideo"),
    _dit("cogvideox-5b", "CogVideoX 5B", "cogvideox", "cogvideo"),
    _dit("kandinsky5-lite", "Kandinsky 5 Lite", "kandinsky5", "kandinsky-5"),
    _dit("sana-1.6b", "Sana 1.6B", "sana"),
    _dit("cosmos-predict2-2b", "Cosmos-Predict2 2B", "cosmos-predict2", "cosmos", native=cosmos.native),
    _dit("pixart-sigma", "PixArt-Σ", "pixart", native=pixart.native),
    _dit("mochi", "Mochi 1", "mochi", native=mochi.native),
    Architecture(
        name="kolors", title="Kolors", denoiser="unet", model="unet-kolors", native=sgm.native, hints=("kolors",)
    ),
    _dit("longcat-image", "LongCat-Image", "longcat", native=None),
    _dit("ovis-image", "Ovis-Image", "ovis", native=None),
    _dit("ideogram4", "Ideogram 4", "ideogram", native=None),
    _dit("minimax-h3", "MiniMax H3", "minimax", native=None),
)
"""Families whose LoRAs train the denoiser alone."""

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
            hints=("sdxl", "sd-xl", "stable-diffusion-xl", "pony", "illustrious", "noobai"),
        ),
        Architecture(
            name="sd15",
            title="Stable Diffusion 1.x",
            denoiser="unet",
            model="unet-sd15",
            text_encoders=(TextEncoder(component="text_encoder", model="clip-l", kohya="", comfyui="clip_l"),),
            native=sgm.native,
            kohya_uses_diffusers_names=True,
            hints=("stable-diffusion-v1", "stable-diffusion-1", "sd-v1", "sd-1", "sd1"),
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
            hints=("flux", "flux-1", "flux1"),
        ),
        Architecture(
            name="sd3-medium",
            title="Stable Diffusion 3 Medium",
            denoiser="transformer",
            model="transformer-sd3-medium",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=(*SD3_HINTS, *_sd3("3", "medium")),
        ),
        Architecture(
            name="sd3.5-medium",
            title="Stable Diffusion 3.5 Medium",
            denoiser="transformer",
            model="transformer-sd35-medium",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=(*SD3_HINTS, *_sd3("3-5", "medium")),
        ),
        Architecture(
            name="sd3.5-large",
            title="Stable Diffusion 3.5 Large",
            denoiser="transformer",
            model="transformer-sd35-large",
            text_encoders=SD3_TEXT,
            native=sd3.native,
            hints=(*SD3_HINTS, *_sd3("3-5", "large")),
        ),
        Architecture(
            name="sd21",
            title="Stable Diffusion 2.x",
            denoiser="unet",
            model="unet-sd21",
            text_encoders=(TextEncoder(component="text_encoder", model="clip-h", kohya="", comfyui="clip_h"),),
            native=sgm.native,
            kohya_uses_diffusers_names=True,
            hints=("stable-diffusion-v2", "stable-diffusion-2", "sd-v2", "sd-2", "sd2"),
        ),
        Architecture(
            name="sdxl-refiner",
            title="Stable Diffusion XL refiner",
            denoiser="unet",
            model="unet-sdxl-refiner",
            text_encoders=(TextEncoder(component="text_encoder_2", model="clip-g", kohya="", comfyui="clip_g"),),
            native=sgm.native,
            hints=("stable-diffusion-xl-v1-refiner", "stable-diffusion-xl-refiner", "sdxl-refiner"),
        ),
        Architecture(
            name="ssd-1b",
            title="Segmind SSD-1B",
            denoiser="unet",
            model="unet-ssd-1b",
            text_encoders=(CLIP_L, CLIP_G),
            native=sgm.native,
            within="sdxl",
            hints=("sdxl", "stable-diffusion-xl", "sdxl-ssd-1b", "segmind-stable-diffusion-1b"),
        ),
        Architecture(
            name="segmind-vega",
            title="Segmind Vega",
            denoiser="unet",
            model="unet-segmind-vega",
            text_encoders=(CLIP_L, CLIP_G),
            native=sgm.native,
            within="sdxl",
            hints=("sdxl", "stable-diffusion-xl", "sdxl-vega"),
        ),
        Architecture(
            name="qwen-image",
            title="Qwen-Image",
            denoiser="transformer",
            model="transformer-qwen-image",
            hints=("qwen-image",),
        ),
        *OTHERS,
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
        "wan": "wan-14b",
        "flux2": "flux2-dev",
        "flux.2": "flux2-dev",
        "klein": "flux2-klein-4b",
        "zimage": "z-image",
        "hunyuan-video": "hunyuanvideo",
        "ltx-2": "ltx2",
    },
)
"""All families, commonest first: if several fit a file, the first is taken."""


def titles(names: Iterable[str], between: str = " or ") -> str:
    """Write out families for messages: ``FLUX.1 (flux) or Chroma (chroma)``."""
    return between.join(f"{ARCHITECTURES[name].title} ({name})" for name in names)


def name_family() -> str:
    """Return the way out for a file whose family isn't known."""
    return (
        "name the model family if it is one that loramerge knows (--architecture NAME; in Python "
        f"open(…, architecture=NAME)): {', '.join(ARCHITECTURES)}"
    )


__all__ = ["ARCHITECTURES", "Architecture", "Part", "Parts", "TextEncoder", "flat"]
