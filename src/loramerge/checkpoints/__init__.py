"""Checkpoints of base models: opening them, changing their weights, extracting a LoRA from two of them."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .extracting import (
        Extraction as Extraction,
        Fit as Fit,
        NotHeld as NotHeld,
        extract as extract,
        plan_extraction as plan_extraction,
    )
    from .models import Checkpoint as Checkpoint, Place as Place, open_checkpoint as open_checkpoint
    from .rewriting import Change as Change
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "extracting": (
                "Extraction",
                "Fit",
                "NotHeld",
                "extract",
                "plan_extraction",
            ),
            "models": (
                "Checkpoint",
                "Place",
                "open_checkpoint",
            ),
            "rewriting": ("Change",),
        },
    )
