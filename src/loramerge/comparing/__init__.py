"""Comparing LoRAs: how strong they are, how much they overlap, what differs between two files."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .advising import advice as advice
    from .analysis import Comparison as Comparison, NotCompared as NotCompared, Row as Row, compare as compare
    from .checking import Check as Check, Finding as Finding, check as check
    from .diffs import Difference as Difference, differences as differences
    from .measures import Alone as Alone, Pair as Pair
    from .plots import heatmap as heatmap, save_heatmap as save_heatmap
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "advising": ("advice",),
            "analysis": (
                "Comparison",
                "NotCompared",
                "Row",
                "compare",
            ),
            "checking": ("Check", "Finding", "check"),
            "diffs": (
                "Difference",
                "differences",
            ),
            "measures": (
                "Alone",
                "Pair",
            ),
            "plots": (
                "heatmap",
                "save_heatmap",
            ),
        },
    )
