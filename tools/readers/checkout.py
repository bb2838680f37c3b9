"""Import a fetched checkout: what it needs besides its LoRA code may be missing."""

import importlib.abc
import importlib.machinery
import logging
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MISSING = (
    *(
        "cv2",
        "ftfy",
        "torchvision",
        "torchaudio",
        "optimum",
        "bitsandbytes",
        "albumentations",
        "lycoris",
        "av",
        "k_diffusion",
    ),
    *("controlnet_aux", "open_clip", "imagesize", "voluptuous", "oyaml", "hf_transfer", "prodigyopt", "lpips"),
    *(
        "flatten_json",
        "kornia",
        "pytorch_fid",
        "invisible_watermark",
        "torchsde",
        "timm",
        "tensorboard",
        "ml_collections",
    ),
    *(
        "torchcodec",
        "torchao",
        "soundfile",
        "librosa",
        "pytorch_wavelets",
        "dctorch",
        "clip",
        "sageattention",
        "xformers",
    ),
    *("comfy_aimdo", "gguf"),
)
"""Packages that the checkouts import and that reading a LoRA doesn't use: replaced by stand-ins where not installed."""


class Anything(type):
    """Makes classes of which every attribute is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, f=None, *a, **k: f})


class StandIn(types.ModuleType):
    """A module of which every name is a class that can be subclassed, called and used to decorate."""

    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        return getattr(Anything(self.__name__, (), {}), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins after all other finders found nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return a stand-in for a package of `MISSING`, or for a part of it."""
        wanted = name.partition(".")[0] in MISSING
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make the stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: a stand-in has no code."""


def enter(folder: Path) -> None:
    """Make a checkout importable; what it logs and prints is not shown."""
    import diffusers
    import transformers  # both ask which packages there are, before there are stand-ins

    assert diffusers, transformers
    sys.meta_path.append(Finder())
    sys.path.insert(0, str(folder))
    sys.argv = sys.argv[:1]
    logging.disable(logging.CRITICAL)


def commit(folder: Path) -> tuple[str, str]:
    """Return the commit that a checkout is at, and its date."""
    shown = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%H %cs"], capture_output=True, text=True, check=True
    )
    found, date = shown.stdout.split()
    return found, date
