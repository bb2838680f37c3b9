"""cloneofsimo's dialect: layers are numbered in the order in which diffusers 0.10 registered them.

Which layers were trained is an unordered set in the metadata, so the numbering is found by
trying each and comparing shapes.
"""

from collections.abc import Mapping
from itertools import product

from ..architectures import Architecture
from ..architectures.names import Parts, whole
from .base import Dialect, Names

SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
GEGLU = ("ff.net.0.proj",)
ORDERS = (SELF + GEGLU + CROSS, SELF + CROSS + GEGLU, SELF + CROSS, SELF, CROSS, GEGLU)
TEXT_ORDERS = (("k_proj", "v_proj", "q_proj", "out_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
SECTIONS = ("down_blocks.", "up_blocks.", "mid_block.")


def numbering(order: tuple[str, ...], text: tuple[str, ...]) -> Names:
    """Number the layers in the order of the leaves of a denoiser's and of a text encoder's block."""

    def names(a: Architecture) -> Mapping[str, Parts]:
        if a.denoiser != "unet":
            return {}
        blocks = dict.fromkeys(p.split(".attn1.")[0] for p in a.denoiser_paths if ".attn1." in p)
        # The mid block is registered last.
        ordered = [block for section in SECTIONS for block in blocks if block.startswith(section)]
        found = {f"unet:{i}": whole(f"unet.{b}.{leaf}") for i, (b, leaf) in enumerate(product(ordered, order))}
        for encoder in a.text_encoders:
            layers = dict.fromkeys(p.split(".self_attn.")[0] for p in a.text_paths(encoder) if ".self_attn." in p)
            for i, (layer, leaf) in enumerate(product(layers, text)):
                found[f"{encoder.component}:{i}"] = whole(f"{encoder.component}.{layer}.self_attn.{leaf}")
        return found

    return names


NUMBERINGS = tuple(numbering(order, text) for text in TEXT_ORDERS for order in ORDERS)

CLONEOFSIMO = Dialect(
    name="cloneofsimo",
    title="cloneofsimo/lora: numbered layers",
    source="https://github.com/cloneofsimo/lora, lora_diffusion/lora.py, save_safeloras_with_embeds",
    names=NUMBERINGS[0],
    also_names=NUMBERINGS[1:],
    style="numbered",
    begins=("unet:", "text_encoder:", "text_encoder_2:"),
    numbered=True,
)
