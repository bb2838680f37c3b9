"""Model families: their modules, the names that tools have for them, and the names that their readers take."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache, cached_property
from typing import Any, NamedTuple

from ...tensors import Shape
from .calls import FlowCall
from .names import Naming, Parts, flat, same, whole


@cache
def versions(name: str) -> Mapping[str, tuple[Shape, ...]]:
    """Read the modules of one model, in the order in which it registers them, and the shapes of their weights.

    A module has several shapes if the model has versions: LTX-2's embedding of time has 24,576 rows, LTX-2.3's 36,864.
    """
    return {
        module: (tuple(found),) if isinstance(found[0], int) else tuple(map(tuple, found))
        for module, found in _data(os.path.join("models", f"{name}.json")).items()
    }


@cache
def model(name: str) -> Mapping[str, Shape]:
    """Return the module names and weight shapes of one model; of its first version, if it has several."""
    return {module: shapes[0] for module, shapes in versions(name).items()}


class Outline(NamedTuple):
    """A summary of a denoiser's paths, kept as data so that recognition needn't build them."""

    own: list[str]
    """First names of diffusers' paths."""
    others: list[str]
    """First names of the paths of other code."""
    last: dict[str, int]
    """The largest number that follows each name in the paths: the last of its blocks."""
    inputs: list[int]
    """The numbers of inputs, with their kernels, that its weights have."""


@cache
def outlines() -> Mapping[str, Outline]:
    """Read the outline of each family."""
    return {name: Outline(*parts) for name, parts in _data("outlines.json").items()}


class Forms(NamedTuple):
    """An index of the names and sizes of all families' weights, see `dialects.forms`."""

    families: list[str]
    forms: dict[str, dict[str, list[int]]]
    """By form and size, ``"rows,columns"``, the places in `families` of those that have such a weight."""


@cache
def forms() -> Forms:
    """Read the index of forms."""
    return Forms(*_data("forms.json"))


def _data(name: str) -> Any:
    """Read a file of our own data."""
    with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
        return json.loads(file.read())


def last_numbers(paths: Iterable[str]) -> dict[str, int]:
    """Return the largest number that follows each name in paths with underscores for dots."""
    last: dict[str, int] = {}
    for name, number in dict.fromkeys(found for path in paths for found in NUMBERED.findall(path)):
        last[name] = max(last.get(name, 0), int(number))
    return last


def _heads(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.partition(".")[0] for path in paths))


NUMBERED = re.compile(r"(?<![a-z])([a-z][a-z_]*)_(\d{1,4})(?=_|$)")
"""A name and the number of a block behind it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Companion:
    """A model of a family besides its denoiser."""

    component: str
    """``text_encoder``, ``text_encoder_2`` …: the attribute of diffusers' pipeline."""
    model: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder(Companion):
    """One text encoder of a family, and the tools' names of it."""

    kohya: str
    """Its number in kohya's prefix: ``lora_te<number>_``."""
    comfyui: str
    """Its name in ComfyUI, also OMI's for the CLIPs."""
    inside: str = ""
    """The prefix that ComfyUI puts before its paths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside(Companion):
    """A model that other code has inside the denoiser, and diffusers beside it."""

    native: str
    """Its name inside the denoiser."""


@dataclass(frozen=True)
class Label:
    """The names that other tools have for a family."""

    specifications: tuple[str, ...]
    """ModelSpec's names: the first is written, unless the header's value begins with one of them already."""
    versions: tuple[str, ...]
    """The same for ``ss_base_model_version``."""
    module: str = "networks.lora"
    """sd-scripts' or musubi-tuner's ``--network_module`` for plain LoRAs."""
    v2: str | None = None
    """``ss_v2``, which tells SD 1 and 2 apart."""

    @property
    def features(self) -> tuple[str, str | None]:
        """The features that readers tell families by: A1111 takes all that begins with ``sdxl_`` for SDXL."""
        return self.versions[0].partition("_")[0], self.v2


STOPS = "loads nothing, as it stops at"
"""Said of a reader that then reads nothing of a file; others ignore a part of it."""


@dataclass(frozen=True)
class Unread:
    """A part of a family's files that one reader doesn't take, as `tools/readers` measures it."""

    reader: str
    does: str
    what: str
    dialects: tuple[str, ...]
    modules: str
    """A pattern of the modules, without the denoiser's name."""


class Kin(Enum):
    """Groups of families for which other tools have the same code: WebUI's block vectors, readers, pipelines."""

    SD = auto()
    SDXL = auto()
    SD3 = auto()
    FLUX = auto()
    FLUX2 = auto()
    QWEN = auto()
    Z_IMAGE = auto()


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A model family that LoRAs are made for."""

    name: str
    title: str
    denoiser: str = "transformer"
    """``"unet"``, ``"transformer"`` or ``"prior"``."""
    model: str
    text_encoders: tuple[TextEncoder, ...] = ()
    native: Naming | None = same
    """The denoiser's own names, each with the modules that it holds; None if they aren't listed yet."""
    trained: Naming | None = None
    """The denoiser's names in musubi-tuner or sd-scripts, if they aren't `native`; these read no others behind
    ``lora_unet_``, so that `kohya` has them."""
    also_native: tuple[Naming, ...] = ()
    """Other names of the denoiser that files have: read, never written."""
    by_head: Naming | None = None
    """Native names whose rows alternate head by head in files whose keys name an adapter: DiffSynth's."""
    beside: tuple[Beside, ...] = ()
    """Models that other code has inside the denoiser."""
    kohya_uses_diffusers_names: bool = False
    """True for SD 1 and 2, which sd-scripts trains on diffusers' UNet; it trains later families on their own code."""
    within: str | None = None
    """The larger family that this one was distilled from: it has a part of that family's names."""
    hints: tuple[str, ...] = field(default=())
    """Words of ``modelspec.architecture`` or ``ss_base_model_version`` that mean this family, see `hints.named`."""
    aliases: tuple[str, ...] = ()
    """Other names that users type."""
    label: Label | None = None
    """The names that other tools have for it; None if they have none, and only our own entry is written."""
    kin: Kin | None = None
    flow: FlowCall | None = None
    """The call of its denoiser in diffusers' pipeline, if that predicts a flow and merges can be learned on it."""
    diffusers_reads: tuple[str, ...] = ()
    """Dialects besides its own that diffusers reads, at least for the blocks."""
    comfyui_reads_diffusers: bool = False
    """True if ComfyUI reads a transformer's LoRAs under diffusers' names."""
    comfyui_reads_peft: bool = False
    """True if ComfyUI reads diffusers' names behind PEFT's ``base_model.model.``."""
    unread: tuple[Unread, ...] = ()
    """The parts that its readers leave out; those that they leave out of several families are in `files.dialects.readers`."""
    down_up: bool = False
    """True if diffusers reads ``lora_down`` behind ``diffusion_model.``; for other transformers only ``lora_A``."""

    @property
    def companions(self) -> tuple[Companion, ...]:
        """Its models besides the denoiser."""
        return (*self.beside, *self.text_encoders)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Weight shape of every module, by ``component.path``."""
        modules = {f"{self.denoiser}.{path}": shape for path, shape in model(self.model).items()}
        for other in self.companions:
            modules |= {f"{other.component}.{path}": shape for path, shape in model(other.model).items()}
        return modules

    def sizes(self, module: str) -> tuple[Shape, ...]:
        """Return the shapes that a module's weight has in the versions of the model; none for an unknown module."""
        if module in self.other_sizes:
            return self.other_sizes[module]
        return (self.shapes[module],) if module in self.shapes else ()

    @cached_property
    def other_sizes(self) -> Mapping[str, tuple[Shape, ...]]:
        """The denoiser's modules whose weight has several shapes, with all of them."""
        found = versions(self.model).items()
        return {f"{self.denoiser}.{path}": shapes for path, shapes in found if len(shapes) > 1}

    @cached_property
    def denoiser_paths(self) -> Mapping[str, Parts]:
        """The denoiser's modules by diffusers' path."""
        return {path: whole(f"{self.denoiser}.{path}") for path in model(self.model)}

    @cached_property
    def native_paths(self) -> Mapping[str, Parts]:
        """The denoiser's modules by the native path of the weight that holds them."""
        paths = self.native(model(self.model)) if self.native else {}
        return {
            **paths,
            **{f"{b.native}.{path}": parts for b in self.beside for path, parts in self.text_paths(b).items()},
        }

    @cached_property
    def trained_paths(self) -> Mapping[str, Parts]:
        """The same by the path in the code of kohya's trainers."""
        return self.trained(model(self.model)) if self.trained else self.native_paths

    @cached_property
    def other_paths(self) -> Mapping[str, Parts]:
        """The same by the paths of all other code, without `native_paths`: read, never written."""
        also = {path: parts for naming in self.also_native for path, parts in naming(model(self.model)).items()}
        others = {**self.denoiser_paths, **also, **self.trained_paths}
        return {path: parts for path, parts in others.items() if path not in self.native_paths}

    @cached_property
    def alternating(self) -> Mapping[str, Parts]:
        """The modules of the weights of `by_head`, by the first of them."""
        paths = self.by_head(model(self.model)) if self.by_head else {}
        return {parts[0].module: parts for parts in paths.values()}

    def outlined(self) -> Outline:
        """Compute the outline that ``outlines.json`` keeps."""
        others = {**self.native_paths, **self.other_paths}
        return Outline(
            _heads(self.denoiser_paths),
            _heads(others),
            last_numbers(map(flat, (*self.denoiser_paths, *others))),
            sorted({math.prod(shape[1:]) for shape in self.shapes.values() if len(shape) > 1}),
        )

    @property
    def outline(self) -> Outline:
        """A summary of the denoiser's paths, read from ``outlines.json``."""
        return outlines()[self.name]

    def text_paths(self, companion: Companion) -> Mapping[str, Parts]:
        """Return the modules of a text encoder, or of another companion of the denoiser, by path."""
        return {path: whole(f"{companion.component}.{path}") for path in model(companion.model)}
