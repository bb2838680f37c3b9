"""Dialects: the index.  A file is recognised by its names and styles; ties go to the first listed."""

from ..registry import Registry
from .base import Dialect
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

__all__ = ["DIALECTS", "Dialect"]
