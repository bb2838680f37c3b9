"""Parts of files that readers are known to leave out: a row per reader, dialect and kind of layer.

What diffusers and ComfyUI take of each family, tools/readers measures with their own code; tests/test_readers.py holds the
rows to it, tests/oracles/test_readers.py those about kinds of layers to diffusers.  The rows of A1111, Forge and
sd-scripts were found by running theirs.  `READERS` says what each was run with: of anything else nothing is known.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ...layers import Layer
from ...registry import Registry
from ..architectures import ARCHITECTURES, STOPS, Architecture, Kin, Unread, flat

Finds = Callable[[Architecture | None, Mapping[str, Layer]], Iterable[str]]
"""Picks the modules that a row is about from a family's layers as they are written."""


@dataclass(frozen=True)
class Drop:
    """A part of a file that one reader doesn't read."""

    reader: str
    does: str
    """``ignores``, or ``loads nothing, as it stops at``."""
    what: str
    dialects: tuple[str, ...]
    concerns: Callable[[Architecture | None], bool]
    """Returns whether it is true of a family."""
    finds: Finds
    style: str = ""
    """The spelling of the tensors that it is about, see `suffixes`; empty for that in which loramerge writes the dialect."""
    at_once: bool = True
    """True if a conversion says it; False if only a check does, as nobody converts to such a file for that reader."""


def each(concerns: Callable[[str, Layer], bool]) -> Finds:
    """Pick the modules for which a test is true."""
    return lambda a, layers: [module for module, layer in layers.items() if concerns(module, layer)]


def _is_dora(module: str, layer: Layer) -> bool:
    return layer.axis is not None


def _is_no_lora(module: str, layer: Layer) -> bool:
    """True unless the layer is a LoRA without a Tucker core, a DoRA of one, or a bias."""
    return layer.inner.kind not in ("lora", "bias") or layer.has_core


def _has_bias(module: str, layer: Layer) -> bool:
    return layer.inner.kind in ("lora", "bias") and layer.delta_bias() is not None


def _has_core(module: str, layer: Layer) -> bool:
    return layer.inner.kind == "lora" and layer.has_core


def _has_lokr_core(module: str, layer: Layer) -> bool:
    return layer.inner.kind == "lokr" and layer.has_core


def _matching(pattern: str) -> Finds:
    """Pick a denoiser's modules by their paths in it."""
    return each(lambda module, _: re.match(rf"(unet|transformer|prior)\.({pattern})", module) is not None)


def _is_dora_by_row(module: str, layer: Layer) -> bool:
    return layer.axis == "out"


def _is_any(module: str, layer: Layer) -> bool:
    return True


def _is_t5(module: str, layer: Layer) -> bool:
    return ".block." in module and module.startswith("text_encoder")


def _has_alpha(module: str, layer: Layer) -> bool:
    return layer.own_alpha is not None


def _is_text(module: str, layer: Layer) -> bool:
    return module.startswith("text_encoder")


def _is_attention(module: str, layer: Layer) -> bool:
    return module.startswith("unet.") and ".to_" in module


def _is_outside_blocks(module: str, layer: Layer) -> bool:
    return module.startswith("transformer.") and "blocks." not in module


def _is_fused_in_comfyui(module: str, layer: Layer) -> bool:
    """True for Z-Image's layers that have other names in ComfyUI, where q, k and v are one weight."""
    return ".attention.to_" in module or module.startswith("transformer.all_")


def _is_added_embedding(module: str, layer: Layer) -> bool:
    return module.startswith("unet.add_embedding.")


def _renamed(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick the modules that kohya's trainers have under another name than ComfyUI."""
    assert a is not None
    own = {flat(path): parts for path, parts in a.native_paths.items()}
    trained = ((flat(path), parts) for path, parts in a.trained_paths.items())
    unread = {part.module for path, parts in trained if own.get(path) != parts for part in parts}
    return [module for module in layers if module in unread]


def _beside_text(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick all modules if text encoders are among them."""
    return layers if any(module.startswith("text_encoder") for module in layers) else ()


def _incomplete_clip_g(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick q, k, v and out of CLIP-G's attentions that lack one of the four."""
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    projections = [m for m in layers if m.startswith("text_encoder_2.") and m.endswith(ends)]
    return [m for m in projections if not all(f"{m.rpartition('.')[0]}.{end}" in layers for end in ends)]


def _every(a: Architecture | None) -> bool:
    return True


def _unets(a: Architecture | None) -> bool:
    return a is not None and a.denoiser == "unet"


def _those_unread_by_comfyui(a: Architecture | None) -> bool:
    return a is not None and a.denoiser != "unet" and not a.comfyui_reads_diffusers


def _those_read_as_peft(a: Architecture | None) -> bool:
    return a is not None and a.comfyui_reads_peft


def _those_unread_as_peft(a: Architecture | None) -> bool:
    return not _those_read_as_peft(a)


def _those_trained_under_other_names(a: Architecture | None) -> bool:
    return a is not None and a.trained is not None


def _those_unread_by_diffusers(dialect: str) -> Callable[[Architecture | None], bool]:
    """Return whether diffusers reads nothing of a transformer's file in a dialect besides its own."""
    return lambda a: (
        a is not None and a.denoiser != "unet" and dialect not in a.diffusers_reads and a.kin is not Kin.SD3
    )


def _those_with_t5(a: Architecture | None) -> bool:
    return a is not None and any(encoder.model == "t5-xxl" for encoder in a.text_encoders)


def _those_but(*kin: Kin) -> Callable[[Architecture | None], bool]:
    return lambda a: a is not None and a.kin not in kin


def _no_unets(a: Architecture | None) -> bool:
    return a is not None and a.denoiser != "unet"


def _those_of(*kin: Kin) -> Callable[[Architecture | None], bool]:
    return lambda a: a is not None and a.kin in kin


def _unets_and(*kin: Kin) -> Callable[[Architecture | None], bool]:
    return lambda a: _unets(a) or _those_of(*kin)(a)


KOHYA = ("kohya", "kohya-diffusers")
DOTTED = ("diffusers", "diffusers-peft")
WRITTEN = (*KOHYA, *DOTTED, "comfyui", "peft")
IN_THIS = "nothing in this dialect"

DROPS: tuple[Drop, ...] = (
    Drop("diffusers", "ignores", "T5's layers", (*DOTTED, *KOHYA, "comfyui"), _those_with_t5, each(_is_t5)),
    Drop(
        "diffusers", "ignores", "DoRA's magnitudes", (*KOHYA, "comfyui"), _unets_and(Kin.FLUX, Kin.QWEN), each(_is_dora)
    ),
    Drop(
        "diffusers",
        STOPS,
        "LoHa, LoKr, Tucker cores, whole weights and norms",
        (*KOHYA, "comfyui"),
        _unets_and(Kin.FLUX, Kin.QWEN),
        each(_is_no_lora),
    ),
    Drop("diffusers", STOPS, "biases", (*KOHYA, "comfyui"), _unets_and(Kin.QWEN), each(_has_bias)),
    Drop("diffusers", "ignores", "biases", ("kohya", "comfyui"), _those_of(Kin.FLUX), each(_has_bias)),
    Drop(
        "diffusers",
        "ignores",
        "layers outside of the blocks",
        ("kohya", "comfyui"),
        _those_of(Kin.FLUX),
        each(_is_outside_blocks),
    ),
    Drop(
        "diffusers",
        "ignores",
        "the added embeddings",
        ("kohya-diffusers",),
        _those_of(Kin.SDXL),
        each(_is_added_embedding),
    ),
    Drop("diffusers", STOPS, "the names of UNets", ("comfyui",), _unets, each(_is_any)),
    Drop("diffusers", "ignores", "the names of SD 3", ("kohya", "comfyui"), _those_of(Kin.SD3), each(_is_any)),
    Drop("diffusers", "reads", "nothing of this model", ("kohya",), _those_unread_by_diffusers("kohya"), each(_is_any)),
    Drop(
        "diffusers",
        "reads",
        "nothing of this model",
        ("comfyui",),
        _those_unread_by_diffusers("comfyui"),
        each(_is_any),
    ),
    Drop("ComfyUI", "ignores", "the attention of UNets", DOTTED, _unets, each(_is_attention)),
    Drop("ComfyUI", "ignores", "the names of diffusers", DOTTED, _those_unread_by_comfyui, each(_is_any)),
    Drop("ComfyUI", "ignores", "attention and ends", ("kohya",), _those_of(Kin.Z_IMAGE), each(_is_fused_in_comfyui)),
    Drop("ComfyUI", "ignores", "trainers' names", ("kohya",), _those_trained_under_other_names, _renamed),
    Drop("ComfyUI", "ignores", "T5's layers", DOTTED, _those_with_t5, each(_is_t5)),
    Drop("ComfyUI", "ignores", "DoRA's magnitudes", ("diffusers-peft",), _every, each(_is_dora)),
    Drop("ComfyUI", "ignores", "biases", ("diffusers-peft",), _every, each(_has_bias)),
    Drop("ComfyUI", "ignores", "LoKr's Tucker cores", KOHYA, _every, each(_has_lokr_core)),
    Drop(
        "A1111",
        "ignores",
        "CLIP-G's attention without all of q, k, v and out",
        KOHYA,
        _those_of(Kin.SDXL),
        _incomplete_clip_g,
    ),
    Drop("A1111", STOPS, "the alphas of fused weights", ("kohya",), _those_of(Kin.SD3), each(_is_any)),
    Drop("Forge", "ignores", "files with text encoders", ("comfyui",), _unets, _beside_text),
    Drop("sd-scripts", "ignores", "Tucker cores of LoRA layers", KOHYA, _every, each(_has_core)),
    Drop(
        "diffusers",
        "ignores",
        "lora_A behind these names",
        ("comfyui",),
        _those_of(Kin.FLUX),
        each(_is_any),
        style="peft",
        at_once=False,
    ),
    Drop(
        "diffusers",
        STOPS,
        "alphas beside lora_A",
        ("comfyui",),
        _those_of(Kin.FLUX2),
        each(_has_alpha),
        style="peft",
        at_once=False,
    ),
    Drop("ComfyUI", "reads", IN_THIS, ("peft",), _those_unread_as_peft, each(_is_any), at_once=False),
    Drop("ComfyUI", "ignores", "text encoders", ("peft",), _those_read_as_peft, each(_is_text), at_once=False),
    Drop("ComfyUI", "ignores", "DoRA's magnitudes", ("peft",), _those_read_as_peft, each(_is_dora), at_once=False),
    Drop("ComfyUI", "ignores", "biases", ("peft",), _those_read_as_peft, each(_has_bias), at_once=False),
    Drop(
        "A1111",
        "has no",
        "model of this family",
        WRITTEN,
        _those_but(Kin.SD, Kin.SDXL, Kin.SD3),
        each(_is_any),
        at_once=False,
    ),
    Drop("A1111", "reads", IN_THIS, (*DOTTED, "comfyui", "peft"), _every, each(_is_any), at_once=False),
    Drop("A1111", "reads wrongly", "DoRA's magnitudes by row", KOHYA, _every, each(_is_dora_by_row), at_once=False),
    Drop("sd-scripts", "reads", IN_THIS, (*DOTTED, "comfyui", "peft"), _every, each(_is_any), at_once=False),
    Drop("sd-scripts", "reads", IN_THIS, ("kohya-diffusers",), _no_unets, each(_is_any), at_once=False),
    Drop(
        "PEFT",
        "reads",
        "folders in its own layout only",
        (*KOHYA, *DOTTED, "comfyui"),
        _every,
        each(_is_any),
        at_once=False,
    ),
)


@dataclass(frozen=True)
class Reader:
    """A program that loads LoRAs, and what it was run with: there the rows say all that it leaves out."""

    name: str
    title: str
    """Its name in the rows."""
    dialects: tuple[str, ...]
    families: Callable[[Architecture | None], bool]
    modules: re.Pattern[str]
    """Matches the modules about which the rows say all."""
    takes_headers: bool
    """True if it takes the scales that are in a header or in PEFT's configuration."""
    with_alphas: bool = False
    """True if it was run with alphas beside ``lora_A`` in `comfyui`."""


ALL = re.compile("")
BLOCKS = re.compile(r"text_encoder|(unet|transformer|prior)\.(\w*blocks?|layers|\w+_refiner)\.")
"""Matches the modules of which kohya's trainers make LoRAs."""


def _known(a: Architecture | None) -> bool:
    return a is not None


def _those_in_comfyui(a: Architecture | None) -> bool:
    return a is not None and a.native is not None


def _those_trained_by_kohya(a: Architecture | None) -> bool:
    return a is not None and a.label is not None and a.label.module is not None


READERS: Registry[Reader] = Registry(
    "reader",
    [
        Reader("comfyui", "ComfyUI", WRITTEN, _those_in_comfyui, ALL, False, with_alphas=True),
        Reader("diffusers", "diffusers", (*KOHYA, *DOTTED, "comfyui"), _known, ALL, True),
        Reader("a1111", "A1111", WRITTEN, _known, ALL, False),
        Reader("kohya", "sd-scripts", WRITTEN, _those_trained_by_kohya, BLOCKS, False),
        Reader("peft", "PEFT", WRITTEN, _every, ALL, True),
    ],
    {"automatic1111": "a1111", "webui": "a1111", "comfy": "comfyui", "sd-scripts": "kohya", "musubi-tuner": "kohya"},
)
"""The readers that files are checked for."""


def drops_of(a: Architecture | None) -> tuple[Drop, ...]:
    """Return the rows that are about one family alone."""
    return tuple(map(_of, a.unread)) if a else ()


@cache
def _of(part: Unread) -> Drop:
    def concerns(a: Architecture | None) -> bool:
        return a is not None and part in a.unread

    return Drop(part.reader, part.does, part.what, part.dialects, concerns, _matching(part.modules))


def dropped(
    dialect: str, architecture: str | None, layers: Mapping[str, Layer], style: str = ""
) -> list[tuple[Drop, list[str]]]:
    """Return the rows that apply to a file, each with its modules.

    Args:
        dialect: Name of the dialect that is written.
        architecture: Name of the family, if it is known.
        layers: The layers as written, by module.
        style: The spelling of the tensors; empty for that in which loramerge writes the dialect.
    """
    family = ARCHITECTURES[architecture] if architecture else None
    rows = [
        d
        for d in (*DROPS, *drops_of(family))
        if dialect in d.dialects and d.style in ("", style) and d.concerns(family)
    ]
    concerned = [(drop, list(drop.finds(family, layers))) for drop in rows]
    return [(drop, modules) for drop, modules in concerned if modules]


def said(dialect: str, architecture: str | None, layers: Mapping[str, Layer]) -> list[str]:
    """Return `dropped` in words, a line per row."""
    return [
        f"{drop.reader} {drop.does} {drop.what} in {dialect}: {len(modules)} of {len(layers)} layers"
        for drop, modules in dropped(dialect, architecture, layers)
        if drop.at_once
    ]
