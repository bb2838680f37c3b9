"""The UNet's names in stability's sgm code (SDXL) and in ldm before it (SD 1 and 2).

Both number the blocks in one sequence; diffusers nests them.  One formula covers every family,
because all have two layers per block.
"""

from collections.abc import Mapping

from ...tensors import Shape
from .names import Parts, whole

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "encoder_hid_proj": "encoder_hid_proj",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def native(modules: Mapping[str, Shape]) -> dict[str, Parts]:
    """Name each module of a UNet as sgm does."""
    with_attention = {tuple(path.split(".")[:2]) for path in modules if ".attentions." in path}
    return {_name(path, with_attention): whole(f"unet.{path}") for path in modules}


def block(path: str) -> str:
    """Return sgm's name of a module, right as far as its block: ``input_blocks.4.1.…``."""
    return _name(path, set())


def _name(path: str, with_attention: set[tuple[str, ...]]) -> str:
    if path in OUTSIDE:
        return OUTSIDE[path]
    section, *rest = path.split(".")
    if section == "mid_block":
        kind, j, *inside = rest
        place = "1" if kind == "attentions" else str(2 * int(j))
        return ".".join(["middle_block", place, _inside(kind, inside)])
    block, kind, j, *inside = rest
    i = int(block)
    if kind == "downsamplers":
        return f"input_blocks.{3 * i + 3}.0.op"
    if kind == "upsamplers":
        place = "2" if (section, block) in with_attention else "1"
        return f"output_blocks.{3 * i + 2}.{place}.conv"
    number = f"input_blocks.{3 * i + int(j) + 1}" if section == "down_blocks" else f"output_blocks.{3 * i + int(j)}"
    return ".".join([number, "1" if kind == "attentions" else "0", _inside(kind, inside)])


def _inside(kind: str, path: list[str]) -> str:
    return RESNET[path[0]] if kind == "resnets" else ".".join(path)
