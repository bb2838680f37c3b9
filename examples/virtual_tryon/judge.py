"""A judge of pictures: an encoder of DINOv2's architecture that tells the attributes of a drawing.

Its CLS embedding is the miniature's score space, as facebook/dinov2's is the study's; its heads answer "is the hair
right? are the stripes?".  It learns on the wider world, where held-out values occur one by one but no concept as a whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from .world import HELD_OUT
from .world.picture import PATTERNED
from .world.sampling import BEARDS, COLOURS, EMBLEMS, FRAMES, HAIRS, KINDS, SCENES, SKIN, STYLES

MEAN, SPREAD = 0.5, 0.25
"""Mean and standard deviation of pixels in [0, 1], for every channel."""
ATTRIBUTES: dict[str, list[str]] = {
    "skin": list(SKIN),
    "hair": [*HAIRS, *HELD_OUT["hair"]],
    "style": [*STYLES, *HELD_OUT["style"]],
    "beard": [*BEARDS, *HELD_OUT["beard"]],
    "glasses": ["none", *FRAMES, *HELD_OUT["glasses"]],
    "smile": ["yes", "no"],
    "garment": list(KINDS),
    "pattern": ["plain", *PATTERNED],
    "colour": [*COLOURS, *HELD_OUT["colour"]],
    "second": [*COLOURS, "garnet"],
    "emblem": [*EMBLEMS, *HELD_OUT["emblem"]],
    "scarf": ["none", *COLOURS, *HELD_OUT["scarf"]],
    "scene": [*SCENES, "product"],
    "wall": ["bricks", *HELD_OUT["wall"]],
}
"""The attributes that the judge classifies, and their values."""
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [SPREAD] * 3,
}


def encoder(resolution: int) -> Dinov2Model:
    """Make an untrained encoder; CLS and patches of a twelfth of the picture."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=3,
            image_size=resolution,
            patch_size=resolution // 12,
            layerscale_value=1.0,
            use_mask_token=False,
        )
    )


def new_heads(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})


def normalised(pictures: Tensor) -> Tensor:
    """Convert bytes of shape ``(n, height, width, 3)`` to the encoder's input, ``(n, 3, height, width)``."""
    return (pictures.movedim(-1, 1).float() / 255 - MEAN) / SPREAD


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A trained encoder and its heads."""

    encoder: Dinov2Model
    heads: nn.ModuleDict

    @torch.no_grad()
    def embed(self, pictures: np.ndarray, *, size: int = 256) -> Tensor:
        """Return CLS embeddings, shape ``(n, 128)``, of pictures as bytes, shape ``(n, height, width, 3)``."""
        device = self.encoder.device
        parts = [
            normalised(torch.from_numpy(pictures[at : at + size]).to(device)) for at in range(0, len(pictures), size)
        ]
        return torch.cat([self.encoder(part).last_hidden_state[:, 0] for part in parts]).cpu()

    @torch.no_grad()
    def attributes(self, pictures: np.ndarray) -> list[dict[str, str]]:
        """Return the likeliest value of every attribute of every picture."""
        embedded = self.embed(pictures).to(self.encoder.device)
        told = {name: head(embedded).argmax(1).tolist() for name, head in self.heads.items()}
        return [{name: ATTRIBUTES[name][numbers[i]] for name, numbers in told.items()} for i in range(len(pictures))]


def save(judge: Judge, folder: str | Path) -> Path:
    """Write a directory that ``AutoModel.from_pretrained`` loads, and the heads next to it, in fp16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().half().contiguous() for name, value in judge.encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    judge.encoder.config.save_pretrained(folder)
    heads = {name: value.detach().cpu().half().contiguous() for name, value in judge.heads.state_dict().items()}
    save_file(heads, folder / "heads.safetensors", {"format": "pt"})
    (folder / "attributes.json").write_text(json.dumps(ATTRIBUTES, indent=1) + "\n")
    side = judge.encoder.config.image_size
    processor = PROCESSOR | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    return folder


def load(folder: str | Path, *, device: str = "cpu") -> Judge:
    """Load a saved judge, in float32.

    Raises:
        ValueError: Its attributes are not this program's.
    """
    folder = Path(folder)
    if json.loads((folder / "attributes.json").read_text()) != ATTRIBUTES:
        raise ValueError(
            f"{folder} was trained on other attributes than this program draws. Train it again: train_scorer.py."
        )
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    heads = new_heads(model.config.hidden_size)
    heads.load_state_dict(load_file(folder / "heads.safetensors"))
    return Judge(encoder=model, heads=heads.to(device).eval())
