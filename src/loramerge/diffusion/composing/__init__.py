"""Several LoRAs at work at once, where no merged file can do it: this LoRA only there, or only then."""

from ...registry import Registry
from .base import Call, Composition, Use, composition
from .clora import clora
from .gated import mole
from .regions import blend, composite, regions
from .times import schedule, switch

COMPOSITIONS: Registry[Composition] = Registry(
    "composition", [blend, regions, schedule, switch, composite, clora, mole]
)

__all__ = ["COMPOSITIONS", "Call", "Composition", "Use", "composition"]
