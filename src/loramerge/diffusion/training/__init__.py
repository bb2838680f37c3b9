"""Train a LoRA on pictures: PEFT's layers in a model of diffusers give an ordinary LoRA of loramerge.

from loramerge.diffusion import TrainSettings, load, train_lora

model = load("stabilityai/stable-diffusion-xl-base-1.0", checkpointing=True)
lora = train_lora(model, "photos/", settings=TrainSettings(resolution=512), checkpoint=Path("state.safetensors"))
"""

from .checks import hints
from .loop import TrainStep, train_lora
from .samples import draw
from .settings import TrainSettings

__all__ = ["TrainSettings", "TrainStep", "draw", "hints", "train_lora"]
