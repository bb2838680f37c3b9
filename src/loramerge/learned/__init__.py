"""Merges that are learned on the model: ZipLoRA, gates by block, least squares, and a search for weights."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .calibration import calibrate as calibrate
    from .columns import Learned as Learned, Step as Step, mole as mole, ziplora as ziplora
    from .gates import BlockGates as BlockGates
    from .interference import overlaps as overlaps
    from .least_squares import (
        Report as Report,
        column_solution as column_solution,
        core_solution as core_solution,
        lsq as lsq,
    )
    from .presets import Settings as Settings, settings as settings
    from .problems import Problem as Problem
    from .search import SearchResult as SearchResult, SearchStep as SearchStep, search_weights as search_weights
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "calibration": ("calibrate",),
            "columns": (
                "Learned",
                "Step",
                "mole",
                "ziplora",
            ),
            "gates": ("BlockGates",),
            "interference": ("overlaps",),
            "least_squares": (
                "Report",
                "column_solution",
                "core_solution",
                "lsq",
            ),
            "presets": (
                "Settings",
                "settings",
            ),
            "problems": ("Problem",),
            "search": (
                "SearchResult",
                "SearchStep",
                "search_weights",
            ),
        },
    )
