"""Draw sheets of a base's pictures, always of the same prompts, so that two sheets can be compared."""

import numpy as np
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from . import model
from .world import SCENES, prompt, sheet

GUIDANCE = (1.0, 2.0, 4.0)
PROMPTS = (
    "A portrait of a man with short black hair, light skin and a beard smiling at the camera, wearing a red shirt.",
    "A portrait of a woman with long blonde hair smiling at the camera, wearing a green and white striped jersey.",
    "A portrait of a person with curly ginger hair and black glasses smiling at the camera, wearing a blue sweater and facing to the side.",
    "A portrait of a person with spiky brown hair and dark skin smiling in a selfie, wearing a yellow shirt with a purple star.",
    "A portrait of a man with a bald head smiling in a selfie, wearing a purple and orange hooped jersey with Nike shoes.",
    "A portrait of a woman with bun brown hair looking at the camera, wearing a teal shirt and a red scarf and standing in front of a wall.",
    "A portrait of a person with bob black hair smiling at the camera, wearing a black and yellow checked shirt and holding a soccer ball on a field.",
    "A photo of a yellow and green halved jersey.",
    *(prompt(scene) for scene in SCENES),
)
"""Eight prompts that the base should follow, and the study's five, whose names it does not know."""


def samples(pipeline: StableDiffusionXLPipeline, *, seed: int = 3, steps: int = 20) -> Image.Image:
    """Draw a sheet with one row per guidance and one column per prompt."""
    rows = [model.generate(pipeline, list(PROMPTS), seed=seed, guidance=guidance, steps=steps) for guidance in GUIDANCE]
    return sheet(np.concatenate(rows), len(PROMPTS), zoom=2)
