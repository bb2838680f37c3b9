"""Dialects: the index.  A file is recognised by its names and styles; ties go to the first listed."""

from ...registry import Registry
from .base import Dialect, table
from .cloneofsimo import CLONEOFSIMO
from .comfyui import COMFYUI, NATIVE, OMI
from .diffusers import BARE, DIFFUSERS, DIFFUSERS_OLD, DIFFUSERS_PEFT, PEFT, ZIPLORA
from .kohya import KOHYA, KOHYA_BROKEN, KOHYA_DIFFUSERS, LYCORIS, ONETRAINER
from .other import OTHER
from .xlabs import XLABS

DIALECTS: Registry[Dialect] = Registry(
    "dialect",
    [
        KOHYA,
        KOHYA_DIFFUSERS,
        DIFFUSERS,
        DIFFUSERS_PEFT,
        PEFT,
        COMFYUI,
        DIFFUSERS_OLD,
        ONETRAINER,
        LYCORIS,
        OMI,
        XLABS,
        CLONEOFSIMO,
        NATIVE,
        BARE,
        ZIPLORA,
        KOHYA_BROKEN,
        OTHER,
    ],
    aliases={
        "a1111": "kohya",
        "automatic1111": "kohya",
        "civitai": "kohya",
        "forge": "kohya",
        "sd-scripts": "kohya",
        "kohya-ss": "kohya",
        "auto1111": "kohya",
        "webui": "kohya",
        "sgm": "kohya",
        "comfy": "comfyui",
        "diffusers-new": "diffusers",
        "ai-toolkit": "diffusers-peft",
        "omi-standard": "omi",
        "one-trainer": "onetrainer",
        "x-flux": "xlabs",
    },
)


def written_dialect(name: str) -> Dialect:
    """Find a dialect to write in by any of its names.

    Raises:
        OptionError: It is unknown; the error lists those that can be written.
    """
    return DIALECTS.find(name, [_with_aliases(d.name) for d in DIALECTS.values() if d.writes])


def _with_aliases(name: str) -> str:
    others = ", ".join(alias for alias, meant in DIALECTS.aliases.items() if meant == name)
    return f"{name} ({others})" if others else name


__all__ = ["DIALECTS", "Dialect", "table", "written_dialect"]
