"""loramerge merges LoRA adapters of diffusion models: any dialect in, an exact merge, any dialect out.

import loramerge as lm

both = lm.merge(["person.safetensors", "jersey.safetensors"], weights=[0.7, 0.5])
lm.save(both, "both.safetensors", dialect="kohya")
"""

from typing import TYPE_CHECKING

from . import errors as errors
from ._version import __version__ as __version__
from .registry import face

if TYPE_CHECKING:
    from .checkpoints import extract as extract
    from .comparing import Check as Check, Comparison as Comparison, check as check, compare as compare
    from .errors import LoRAMergeError as LoRAMergeError
    from .files import (
        LoRA as LoRA,
        convert as convert,
        edit_metadata as edit_metadata,
        load as load,
        open as open,
        read_metadata as read_metadata,
        save as save,
    )
    from .merging import (
        Plan as Plan,
        Recipe as Recipe,
        average as average,
        bake as bake,
        merge as merge,
        plan as plan,
        push as push,
        resize as resize,
        sweep as sweep,
    )
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "_version": ("__version__",),
            "checkpoints": ("extract",),
            "comparing": ("Check", "Comparison", "check", "compare"),
            "errors": ("LoRAMergeError",),
            "files": ("LoRA", "convert", "edit_metadata", "load", "open", "read_metadata", "save"),
            "merging": ("Plan", "Recipe", "average", "bake", "merge", "plan", "push", "resize", "sweep"),
        },
    )
    __all__ = sorted([*__all__, "errors"])
