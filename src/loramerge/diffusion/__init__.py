"""Load pipelines, generate with LoRAs, train LoRAs, and wrap models as the functions that learned merges take.

from loramerge.diffusion import from_prompts, load
from loramerge.learned import settings, ziplora

model = load("stabilityai/stable-diffusion-xl-base-1.0", checkpointing=True)
draw = from_prompts(model, loras, ["a psq-person", "a barca24_jersey"])
model.release()
learned = ziplora(model.predict, model.models, loras, draw, settings("default", steps=20))
"""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from ..devices import within_memory as within_memory
    from .apply import applied as applied, check_fits as check_fits
    from .composing import (
        COMPOSITIONS as COMPOSITIONS,
        Composition as Composition,
        Use as Use,
        composition as composition,
    )
    from .composing.recipes import read_composed as read_composed
    from .composing.running import Composed as Composed, composed as composed
    from .denoiser import Denoiser as Denoiser, load as load
    from .drawing import Sampling as Sampling
    from .examples import (
        Images as Images,
        Trajectories as Trajectories,
        from_images as from_images,
        from_prompts as from_prompts,
    )
    from .generation import Drawn as Drawn, generate as generate, slug as slug
    from .pipelines import load_pipeline as load_pipeline, use_scheduler as use_scheduler
    from .processes import Team as Team, team as team
    from .training import (
        TrainSettings as TrainSettings,
        TrainStep as TrainStep,
        draw as draw,
        hints as hints,
        train_lora as train_lora,
    )
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            ".devices": ("within_memory",),
            "apply": (
                "applied",
                "check_fits",
            ),
            "composing": (
                "COMPOSITIONS",
                "Composition",
                "Use",
                "composition",
            ),
            "composing.recipes": ("read_composed",),
            "composing.running": (
                "Composed",
                "composed",
            ),
            "denoiser": (
                "Denoiser",
                "load",
            ),
            "drawing": ("Sampling",),
            "examples": (
                "Images",
                "Trajectories",
                "from_images",
                "from_prompts",
            ),
            "generation": (
                "Drawn",
                "generate",
                "slug",
            ),
            "pipelines": (
                "load_pipeline",
                "use_scheduler",
            ),
            "processes": (
                "Team",
                "team",
            ),
            "training": (
                "TrainSettings",
                "TrainStep",
                "draw",
                "hints",
                "train_lora",
            ),
        },
    )
