"""XLabs' dialect: FLUX attention processors, 1 for the image stream and 2 for the text stream."""

from collections.abc import Mapping

from ..architectures import Architecture, Kin
from ..architectures.names import Parts, stacked
from .base import Dialect


def xlabs_names(a: Architecture) -> Mapping[str, Parts]:
    """Name the attention of FLUX blocks by their processors."""
    names: dict[str, Parts] = {}
    if a.kin is not Kin.FLUX:  # XLabs' trainer supports no other family
        return names
    for path, parts in a.native_paths.items():
        block, _, rest = path.rpartition("_attn.")
        if path.startswith("double_blocks.") and rest in ("qkv", "proj"):
            block, _, stream = block.rpartition(".")
            names[f"{block}.processor.{rest}_lora{1 if stream == 'img' else 2}"] = parts
        elif path.startswith("single_blocks.") and path.endswith(".linear1"):
            qkv = parts[:3]
            rows = [(part.module, part.rows[0][1] - part.rows[0][0]) for part in qkv if part.rows]
            names[path.replace("linear1", "processor.qkv_lora")] = stacked(rows)
        elif path.startswith("single_blocks.") and path.endswith(".linear2"):
            names[path.replace("linear2", "processor.proj_lora")] = parts
    return names


XLABS = Dialect(
    name="xlabs",
    title="XLabs x-flux",
    source="https://github.com/XLabs-AI/x-flux, src/flux/util.py",
    names=xlabs_names,
    style="bare",
    rewrites=True,
    begins=("double_blocks.", "single_blocks.", "diffusion_model.double_blocks.", "diffusion_model.single_blocks."),
)
