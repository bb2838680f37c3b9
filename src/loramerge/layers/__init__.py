"""Layers: the parametrisations of ΔW, one file per family, and how tensors become one of them."""

from .base import Layer, Rows
from .building import MAGNITUDES, RANKED_BY, UNKNOWN, build
from .dora import DoRA
from .full import BiasOnly, Carried, Full, Norm, Replaced, Table
from .loha import LoHa
from .lokr import LoKr
from .lowrank import LowRank, low_rank
from .relative import Relative

__all__ = [
    "MAGNITUDES",
    "RANKED_BY",
    "UNKNOWN",
    "BiasOnly",
    "Carried",
    "DoRA",
    "Full",
    "Layer",
    "LoHa",
    "LoKr",
    "LowRank",
    "Norm",
    "Relative",
    "Replaced",
    "Rows",
    "Table",
    "build",
    "low_rank",
]
