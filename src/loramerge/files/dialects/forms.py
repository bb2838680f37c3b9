"""An index of the names and sizes of all families' weights, by which a file is compared with all of them at once.

A form is a path in a denoiser without its numbers, ``transformer_blocks_#_attn_to_q``, whichever tool spelled it.  A file
of a thousand layers has some fifty forms, and a family whose weights have other forms or sizes is ruled out before any
of its tables is built.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ...tensors import Shape
from ..architectures import ARCHITECTURES, Architecture, Forms, flat, forms as index
from ..architectures.names import Parts

TEXT = re.compile(
    r"(?:module\.|_orig_mod\.|pipe\.)*(?:lora_te\d?_|text_encoders?[._/\d]|base_model\.model\.(?:text_model|encoder)\.|"
    r"clip_\w\.|t5\.|lycoris_text_model_|text_model\.|te\d?:)"
)
"""Beginnings of text encoders' stems, in any dialect."""

BEFORE = re.compile(
    r"(?:module\.|_orig_mod\.|pipe\.|lora_unet_+(?:unet_)?|lora_transformer_|lycoris_|oft_unet_|diffusion_model\.|model\.|"
    r"base_model\.model\.|lora_prior_unet_|(?:unet|transformer|prior|text_conditioner)[./]|net\.|Hunyuan_video_I2V_lora_)*"
)
"""Prefixes of the denoiser's paths, in any dialect."""

MASK = str.maketrans("0123456789", "##########")


def made() -> Forms:
    """Compute the index from the tables of every dialect and family."""
    from . import DIALECTS
    from .base import table

    families = list(ARCHITECTURES)
    forms: dict[str, dict[str, list[int]]] = {}
    namings = {names: None for d in DIALECTS.values() if not d.numbered for names in d.tables}
    for place, a in enumerate(ARCHITECTURES.values()):
        for stem, parts in (item for names in namings for item in table(names, a).items() if not is_text(item[0])):
            for shape in a.sizes(parts[0].module) if len(parts) == 1 else (wanted(parts, a),):
                places = forms.setdefault(form(stem), {}).setdefault(size(shape), [])
                if places[-1:] != [place]:
                    places.append(place)
    return Forms(families, {name: forms[name] for name in sorted(forms)})


def is_text(stem: str) -> bool:
    """Return whether a stem is that of a text encoder in any dialect."""
    return TEXT.match(stem) is not None


def path_of(stem: str) -> str:
    """Return a denoiser's stem without its prefix, with underscores for dots and one more at the end."""
    return flat(BEFORE.sub("", stem, count=1)) + "_"


def form(stem: str) -> str:
    """Return the form of a denoiser's stem."""
    return re.sub("#+", "#", path_of(stem).translate(MASK))


def size(shape: Shape) -> str:
    """Return the rows of a weight, and its columns with their kernel, as the index spells them."""
    return f"{shape[0]},{math.prod(shape[1:])}" if len(shape) > 1 else f"{shape[0]},"


def wanted(parts: Parts, a: Architecture) -> Shape:
    """Return the shape of the family's weight that holds the modules."""
    if len(parts) == 1:
        return a.shapes[parts[0].module]
    shapes = [a.shapes[part.module] for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def having(layers: Iterable[tuple[str, Shape]]) -> Mapping[str, int]:
    """Count the layers that each family has a weight of the form and the size for.

    Args:
        layers: The form of each layer, and the shape of the weight that it is for: without axes if it isn't known,
            and with one for a vector, such as a bias.
    """
    families, forms = index()
    counts: Counter[int] = Counter()
    for (found, shape), count in Counter(layers).items():
        sizes = forms.get(found, {})
        if len(shape) > 1:
            places: Iterable[int] = sizes.get(size(shape), ())
        else:
            rows = size(shape) if shape else ""
            places = {place for known, those in sizes.items() if known.startswith(rows) for place in those}
        counts.update(dict.fromkeys(places, count))
    return {families[place]: count for place, count in counts.items()}
