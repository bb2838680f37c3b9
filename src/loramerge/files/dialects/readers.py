"""Parts of files that readers are known to leave out: a row per reader, dialect and kind of layer.

The rows of diffusers are held by tests/oracles/test_readers.py, those of ComfyUI by tools/comfyui.py, which runs
ComfyUI's own loader; those of A1111, Forge and sd-scripts were found by running theirs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...layers import Layer
from ..architectures import ARCHITECTURES

Finds = Callable[[Mapping[str, Layer]], Iterable[str]]
"""Picks the modules that a row is about from the layers as they are written."""


@dataclass(frozen=True)
class Drop:
    """A part of a file that one reader doesn't read."""

    reader: str
    does: str
    """``ignores``, or ``stops with an error at``: then it reads nothing at all."""
    what: str
    dialects: tuple[str, ...]
    families: tuple[str, ...]
    """Names of families; empty for all of them."""
    finds: Finds


def each(concerns: Callable[[str, Layer], bool]) -> Finds:
    """Pick the modules for which a test is true."""
    return lambda layers: [module for module, layer in layers.items() if concerns(module, layer)]


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


def _is_any(module: str, layer: Layer) -> bool:
    return True


def _is_t5(module: str, layer: Layer) -> bool:
    return ".block." in module and module.startswith("text_encoder")


def _is_attention(module: str, layer: Layer) -> bool:
    return module.startswith("unet.") and ".to_" in module


def _is_outside_blocks(module: str, layer: Layer) -> bool:
    return module.startswith("transformer.") and "blocks." not in module


def _is_added_embedding(module: str, layer: Layer) -> bool:
    return module.startswith("unet.add_embedding.")


def _beside_text(layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick all modules if text encoders are among them."""
    return layers if any(module.startswith("text_encoder") for module in layers) else ()


def _incomplete_clip_g(layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick q, k, v and out of CLIP-G's attentions that lack one of the four."""
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    projections = [m for m in layers if m.startswith("text_encoder_2.") and m.endswith(ends)]
    return [m for m in projections if not all(f"{m.rpartition('.')[0]}.{end}" in layers for end in ends)]


UNETS = tuple(a.name for a in ARCHITECTURES.values() if a.denoiser == "unet")
XL = ("sdxl", "ssd-1b", "segmind-vega")
SD3 = ("sd3-medium", "sd3.5-medium", "sd3.5-large")
KOHYA = ("kohya", "kohya-diffusers")
DOTTED = ("diffusers", "diffusers-peft")
STOPS = "stops with an error at"

DROPS: tuple[Drop, ...] = (
    Drop("diffusers", "ignores", "T5's layers", (*DOTTED, *KOHYA, "comfyui"), ("flux", *SD3), each(_is_t5)),
    Drop(
        "diffusers", "ignores", "DoRA's magnitudes", (*KOHYA, "comfyui"), (*UNETS, "flux", "qwen-image"), each(_is_dora)
    ),
    Drop(
        "diffusers",
        STOPS,
        "LoHa, LoKr, Tucker cores, whole weights and norms",
        (*KOHYA, "comfyui"),
        (*UNETS, "flux", "qwen-image"),
        each(_is_no_lora),
    ),
    Drop("diffusers", STOPS, "biases", (*KOHYA, "comfyui"), (*UNETS, "qwen-image"), each(_has_bias)),
    Drop("diffusers", "ignores", "biases", ("kohya", "comfyui"), ("flux",), each(_has_bias)),
    Drop(
        "diffusers",
        "ignores",
        "layers outside of the blocks",
        ("kohya", "comfyui"),
        ("flux",),
        each(_is_outside_blocks),
    ),
    Drop("diffusers", "ignores", "the added embeddings", ("kohya-diffusers",), XL, each(_is_added_embedding)),
    Drop("diffusers", STOPS, "the names of UNets", ("comfyui",), UNETS, each(_is_any)),
    Drop("diffusers", "ignores", "the names of SD 3", ("kohya", "comfyui"), SD3, each(_is_any)),
    Drop("ComfyUI", "ignores", "the attention of UNets", DOTTED, UNETS, each(_is_attention)),
    Drop("ComfyUI", "ignores", "T5's layers", DOTTED, ("flux", *SD3), each(_is_t5)),
    Drop("ComfyUI", "ignores", "DoRA's magnitudes", ("diffusers-peft",), (), each(_is_dora)),
    Drop("ComfyUI", "ignores", "biases", ("diffusers-peft",), (), each(_has_bias)),
    Drop("ComfyUI", "ignores", "LoKr's Tucker cores", KOHYA, (), each(_has_lokr_core)),
    Drop("A1111", "ignores", "CLIP-G's attention without all of q, k, v and out", KOHYA, XL, _incomplete_clip_g),
    Drop("A1111", STOPS, "the alphas of fused weights", ("kohya",), SD3, each(_is_any)),
    Drop("Forge", "ignores", "files with text encoders", ("comfyui",), UNETS, _beside_text),
    Drop("sd-scripts", "ignores", "Tucker cores of LoRA layers", KOHYA, (), each(_has_core)),
)


def dropped(dialect: str, architecture: str | None, layers: Mapping[str, Layer]) -> list[tuple[Drop, list[str]]]:
    """Return the rows that apply to a file, each with its modules.

    Args:
        dialect: Name of the dialect that is written.
        architecture: Name of the family, if it is known.
        layers: The layers as written, by module.
    """
    rows = [d for d in DROPS if dialect in d.dialects and (not d.families or architecture in d.families)]
    concerned = [(drop, list(drop.finds(layers))) for drop in rows]
    return [(drop, modules) for drop, modules in concerned if modules]


def said(dialect: str, architecture: str | None, layers: Mapping[str, Layer]) -> list[str]:
    """Return `dropped` in words, a line per row."""
    return [
        f"{drop.reader} {drop.does} {drop.what} in {dialect}: {len(modules)} of {len(layers)} layers"
        for drop, modules in dropped(dialect, architecture, layers)
    ]
