"""Layers: the parametrisations of ΔW, one file per family, and how tensors become one of them."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .base import DeltaRows as DeltaRows, Layer as Layer, Rows as Rows
    from .building import MAGNITUDES as MAGNITUDES, UNKNOWN as UNKNOWN, build as build, ranked_by as ranked_by
    from .dora import DoRA as DoRA
    from .full import (
        BiasOnly as BiasOnly,
        Carried as Carried,
        Full as Full,
        Norm as Norm,
        Replaced as Replaced,
        Table as Table,
    )
    from .loha import LoHa as LoHa
    from .lokr import LoKr as LoKr
    from .lowrank import LowRank as LowRank, low_rank as low_rank
    from .relative import Relative as Relative
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "base": ("DeltaRows", "Layer", "Rows"),
            "building": ("MAGNITUDES", "UNKNOWN", "build", "ranked_by"),
            "dora": ("DoRA",),
            "full": ("BiasOnly", "Carried", "Full", "Norm", "Replaced", "Table"),
            "loha": ("LoHa",),
            "lokr": ("LoKr",),
            "lowrank": ("LowRank", "low_rank"),
            "relative": ("Relative",),
        },
    )
