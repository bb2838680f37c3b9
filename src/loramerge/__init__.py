"""loramerge merges LoRA adapters of diffusion models: any dialect in, an exact merge, any dialect out.

import loramerge as lm

both = lm.merge(["person.safetensors", "jersey.safetensors"], weights=[0.7, 0.5])
lm.save(both, "both.safetensors", dialect="kohya")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "Comparison": "analysis",
    "LoRA": "lora",
    "LoRAMergeError": "errors",
    "Plan": "merging",
    "compare": "analysis",
    "bake": "baking",
    "Recipe": "recipe",
    "convert": "files",
    "errors": "errors",
    "extract": "extracting",
    "load": "files",
    "merge": "merging",
    "open": "files",
    "plan": "merging",
    "resize": "merging",
    "save": "files",
    "sweep": "sweeping",
}
"""Where each public name lives: imported when it is first used, so that importing loramerge is cheap."""

if TYPE_CHECKING:
    from . import errors
    from .analysis import Comparison, compare
    from .baking import bake
    from .errors import LoRAMergeError
    from .extracting import extract
    from .files import convert, load, open, save
    from .lora import LoRA
    from .merging import Plan, merge, plan, resize
    from .recipe import Recipe
    from .sweeping import sweep


if not TYPE_CHECKING:  # a checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'loramerge' has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f".{_HOMES[name]}", __name__)
        value = module if name == _HOMES[name] else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Comparison",
    "LoRA",
    "LoRAMergeError",
    "Plan",
    "Recipe",
    "__version__",
    "bake",
    "compare",
    "convert",
    "errors",
    "extract",
    "load",
    "merge",
    "open",
    "plan",
    "resize",
    "save",
    "sweep",
]
