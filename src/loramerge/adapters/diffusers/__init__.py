"""Diffusion models as the functions that `loramerge.learned` takes.

from loramerge.adapters.diffusers import from_prompts, load
from loramerge.learned.ziplora import settings, ziplora

model = load("stabilityai/stable-diffusion-xl-base-1.0", checkpointing=True)
draw = from_prompts(model, loras, ["a psq-person", "a barca24_jersey"])
model.release()
learned = ziplora(model.predict, model.models, loras, draw, settings("default", steps=20))
"""

from .denoiser import Denoiser, load
from .examples import Images, Trajectories, from_images, from_prompts
from .memory import within_memory
from .processes import Team, team
from .training import TrainSettings, TrainStep, train_lora

__all__ = [
    "Denoiser",
    "Images",
    "Team",
    "TrainSettings",
    "TrainStep",
    "Trajectories",
    "from_images",
    "from_prompts",
    "load",
    "team",
    "train_lora",
    "within_memory",
]
