"""Scores of pictures against references: encoders, intervals, contact sheets."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .bootstrap import FEWEST as FEWEST, Interval as Interval, interval as interval
    from .captions import METADATA as METADATA, Picture as Picture, captioned as captioned, digest as digest
    from .dino import dinov2 as dinov2
    from .drifting import drift as drift
    from .encoders import Encoder as Encoder, pixels as pixels
    from .pictures import (
        Box as Box,
        Preprocessing as Preprocessing,
        ignored_in as ignored_in,
        images_in as images_in,
        read as read,
    )
    from .png import recipe_in as recipe_in
    from .quiet import silence as silence
    from .reports import save_scores as save_scores
    from .scores import (
        Reference as Reference,
        Row as Row,
        Scores as Scores,
        Shot as Shot,
        score as score,
        shots_of as shots_of,
    )
    from .sheets import save_sheet as save_sheet, sheet as sheet
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "bootstrap": (
                "FEWEST",
                "Interval",
                "interval",
            ),
            "captions": (
                "METADATA",
                "Picture",
                "captioned",
                "digest",
            ),
            "dino": ("dinov2",),
            "drifting": ("drift",),
            "encoders": (
                "Encoder",
                "pixels",
            ),
            "pictures": (
                "Box",
                "Preprocessing",
                "images_in",
                "ignored_in",
                "read",
            ),
            "png": ("recipe_in",),
            "quiet": ("silence",),
            "reports": ("save_scores",),
            "scores": (
                "Reference",
                "Row",
                "Scores",
                "Shot",
                "score",
                "shots_of",
            ),
            "sheets": (
                "save_sheet",
                "sheet",
            ),
        },
    )
